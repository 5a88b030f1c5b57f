package pmem

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sealfs"
)

// Backing is the medium of a region. Its methods may be called concurrently;
// all but Size and Name may block. Errors wrap a sealfs.Code and name the medium.
type Backing interface {
	// ReadAt is io.ReaderAt's; WriteAt takes whole pages. What was written is
	// durable after the next Flush.
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	Flush() error
	// Size is the present size in bytes. Grow makes it at least size; the new
	// bytes are zeros.
	Size() int64
	Grow(size int64) error
	Name() string
	Close() error
	// Map returns memory that shows the n bytes at off; what is stored there is
	// private. The range may reach beyond Size, where it must not be touched
	// before Grow.
	Map(off, n int64) (Mapping, error)
}

// Mapping is a window of a region in memory.
type Mapping interface {
	// Bytes is the memory, from a page's start.
	Bytes() []byte
	// Drop forgets what was stored in [off, off+n), whole pages: they show the
	// medium's bytes again. Nobody else may use them during the call.
	Drop(off, n int64) error
	// Unmap ends the mapping; its bytes must not be touched any more.
	Unmap() error
}

// limited is a Backing with its own idea of how it is to be mapped.
type limited interface {
	// limits returns the size of a window, a power of two of at least a page,
	// and the size beyond which the medium cannot grow, 0 if there is none.
	limits() (window, size int64)
}

// file is a region in a file.
type file struct {
	f    *os.File
	path string
}

// OpenFile opens the region file at path, with create also one that does not
// exist yet (mode 0600). The file is locked against every other opener until
// Close: if somebody else has it, the error wraps ErrBusy.
func OpenFile(path string, create bool) (Backing, error) {
	flags := os.O_RDWR
	if create {
		flags |= os.O_CREATE
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, fileError("open region", path, err)
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("region %s is not a regular file: %w", path, sealfs.ErrInvalid)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("region %s is in use by another process: %w", path, sealfs.ErrBusy)
		}
		return nil, fileError("lock region", path, err)
	}
	return &file{f: f, path: path}, nil
}

// fileError wraps an error of the operating system in the code that callers
// act on. what says what was tried on which kind of file.
func fileError(what, path string, err error) error {
	code := sealfs.ErrIO
	switch {
	case errors.Is(err, os.ErrNotExist):
		code = sealfs.ErrNotExist
	case errors.Is(err, os.ErrPermission):
		code = sealfs.ErrAccess
	case errors.Is(err, os.ErrClosed):
		code = sealfs.ErrClosed
	case errors.Is(err, unix.EROFS):
		code = sealfs.ErrReadOnly
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EFBIG), errors.Is(err, unix.EDQUOT):
		code = sealfs.ErrNoSpace
	}
	var pe *os.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return fmt.Errorf("%s %s: %w (%v)", what, path, code, err)
}

func (b *file) Name() string { return b.path }

func (b *file) ReadAt(p []byte, off int64) (int, error) {
	n, err := b.f.ReadAt(p, off)
	if err != nil && err != io.EOF {
		err = fileError("read region", b.path, err)
	}
	return n, err
}

func (b *file) WriteAt(p []byte, off int64) (int, error) {
	n, err := b.f.WriteAt(p, off)
	if err != nil {
		err = fileError("write region", b.path, err)
	}
	return n, err
}

func (b *file) Flush() error {
	// The size is metadata that fdatasync keeps, as the bytes cannot be read
	// without it.
	if err := unix.Fdatasync(int(b.f.Fd())); err != nil {
		return fileError("flush region", b.path, err)
	}
	return nil
}

func (b *file) Size() int64 {
	st, err := b.f.Stat()
	if err != nil {
		return 0 // closed: nothing can be read either
	}
	return st.Size()
}

func (b *file) Grow(size int64) error {
	old := b.Size()
	if size <= old {
		return nil
	}
	// With its blocks: a file system that is full says so now, when the step can be
	// done without, and not to a checkpoint, after which nobody knows what is written.
	err := unix.Fallocate(int(b.f.Fd()), 0, 0, size)
	for errors.Is(err, unix.EINTR) {
		err = unix.Fallocate(int(b.f.Fd()), 0, 0, size)
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = b.f.Truncate(size)
	}
	if err != nil {
		err = fileError("grow region", b.path, err)
		if b.Size() > old { // it got a part of the way
			err = errors.Join(err, b.f.Truncate(old))
		}
	}
	return err
}

// shorten makes the file empty, durably: what is grown again is zeros.
func (b *file) shorten() error {
	if err := b.f.Truncate(0); err != nil {
		return fileError("erase region", b.path, err)
	}
	return b.Flush()
}

func (b *file) Close() error {
	if err := b.f.Close(); err != nil {
		return fileError("close region", b.path, err)
	}
	return nil
}

// Device is what NewMemory needs of a device; every disk.Device has it.
type Device interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	Flush() error
	Size() int64
	Name() string
}

// memory is a region on a device of fixed size, mapped by copying.
type memory struct{ dev Device }

// cramped is a region on a device that it shares with others.
type cramped struct {
	memory
	size atomic.Int64
	room func() int64
}

// NewCramped is NewMemory for a region that begins empty and grows as far as
// room allows at that moment, in bytes: the simulation of a file system that is full.
func NewCramped(dev Device, room func() int64) Backing {
	return &cramped{memory: memory{dev}, room: room}
}

func (b *cramped) Size() int64 { return b.size.Load() }

func (b *cramped) Grow(size int64) error {
	if size > min(b.room(), b.dev.Size()) {
		return fmt.Errorf("grow region %s to %d bytes: %w", b.Name(), size, sealfs.ErrNoSpace)
	}
	b.size.Store(max(size, b.size.Load()))
	return nil
}

// NewMemory returns a region medium over dev, for simulation: all of dev is
// copied to the heap when it is mapped. Close does not close dev.
func NewMemory(dev Device) Backing { return &memory{dev} }

func (b *memory) ReadAt(p []byte, off int64) (int, error)  { return b.dev.ReadAt(p, off) }
func (b *memory) WriteAt(p []byte, off int64) (int, error) { return b.dev.WriteAt(p, off) }
func (b *memory) Flush() error                             { return b.dev.Flush() }
func (b *memory) Size() int64                              { return b.dev.Size() }
func (b *memory) Name() string                             { return b.dev.Name() }
func (b *memory) Close() error                             { return nil }
func (b *memory) Map(off, n int64) (Mapping, error)        { return mapHeap(b, off, n) }

func (b *memory) Grow(size int64) error {
	if size > b.dev.Size() {
		return fmt.Errorf("grow region %s to %d bytes: %w", b.Name(), size, sealfs.ErrNoSpace)
	}
	return nil
}

// limits makes one window of the whole device.
func (b *memory) limits() (window, size int64) {
	window = PageSize
	for window < b.dev.Size() {
		window *= 2
	}
	return window, b.dev.Size()
}

// heap is a mapping made by copying.
type heap struct {
	b     Backing
	off   int64
	bytes []byte
}

func mapHeap(b Backing, off, n int64) (Mapping, error) {
	m := &heap{b: b, off: off, bytes: make([]byte, n)}
	if err := m.Drop(0, n); err != nil {
		return nil, err
	}
	return m, nil
}

func (m *heap) Bytes() []byte { return m.bytes }
func (m *heap) Unmap() error  { m.bytes = nil; return nil }

// Drop reads the range again, as a mapping of a file would show it.
func (m *heap) Drop(off, n int64) error {
	p := m.bytes[off : off+n]
	got, err := m.b.ReadAt(p, m.off+off)
	if err != nil && err != io.EOF {
		return err
	}
	clear(p[got:])
	return nil
}
