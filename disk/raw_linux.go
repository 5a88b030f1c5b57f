package disk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"sealfs"
)

const (
	// directAlign suits every device whose own needs the kernel does not tell.
	directAlign = 4096
	// bounceSize is the piece in which unaligned memory is copied.
	bounceSize = 256 << 10
)

// OpenOptions say how Open treats a device.
type OpenOptions struct {
	// ReadOnly refuses every change with ErrReadOnly.
	ReadOnly bool
	// Direct bypasses the page cache (O_DIRECT). Where a file system refuses
	// that, as tmpfs does, the file is opened buffered: see File.Direct.
	Direct bool
	// Exclusive keeps others away: a block device is claimed from the kernel
	// (which also refuses one that is mounted), an image file is locked, shared if
	// ReadOnly is set. If it is taken, Open fails with ErrBusy. An image file's
	// lock binds only those who ask for it too.
	Exclusive bool
}

// File is a Device on a block device or an image file.
type File struct {
	f        *os.File
	io       readerWriterAt // f
	path     string
	size     int64
	sector   int
	memAlign int // alignment of memory for direct I/O, 0 if buffered
	block    bool
	readOnly bool
	latch    latch
	counters

	// using is held shared by every operation on f, so that Close waits for them;
	// it comes before flushing.
	using    sync.RWMutex
	closed   bool
	flushing sync.Mutex
	rounds   atomic.Uint64 // flushes begun
}

// readerWriterAt is what File needs of os.File to move bytes. Calls by way of an
// interface keep buffers off the stack, which could move, and with it the
// alignment, between the look at their address and the system call.
type readerWriterAt interface {
	io.ReaderAt
	io.WriterAt
}

var _ Device = (*File)(nil)

// Open opens a block device or image file. The length of an image is rounded
// down to whole sectors, and is not followed if it changes later. The sector of
// an image is what direct I/O on it requires, whether or not Direct is set, so
// that both ways see the same geometry.
func Open(path string, o OpenOptions) (*File, error) {
	var st unix.Stat_t
	// Before opening: to open a FIFO would block, a tape would rewind.
	if err := unix.Stat(path, &st); err != nil {
		return nil, failure("open", path, err)
	}
	if err := usable(path, st.Mode); err != nil {
		return nil, err
	}
	f, direct, err := openFile(path, o, st.Mode&unix.S_IFMT == unix.S_IFBLK)
	if err != nil {
		return nil, err
	}
	d := &File{f: f, io: f, path: path, readOnly: o.ReadOnly}
	if err := d.setUp(direct, o.Exclusive); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return d, nil
}

func usable(path string, mode uint32) error {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFBLK:
		return nil
	case unix.S_IFDIR:
		return fmt.Errorf("open %s: %w", path, sealfs.ErrIsDir)
	}
	return fmt.Errorf("open %s: neither a block device nor an image file: %w", path, sealfs.ErrInvalid)
}

// openFile opens path and reports whether it got O_DIRECT.
func openFile(path string, o OpenOptions, block bool) (f *os.File, direct bool, err error) {
	flags := os.O_RDWR
	if o.ReadOnly {
		flags = os.O_RDONLY
	}
	if o.Exclusive && block {
		flags |= unix.O_EXCL
	}
	if o.Direct {
		f, err = os.OpenFile(path, flags|unix.O_DIRECT, 0)
		direct = err == nil
	}
	if !o.Direct || errors.Is(err, unix.EINVAL) {
		f, err = os.OpenFile(path, flags, 0)
	}
	if err != nil {
		if block && errors.Is(err, unix.EBUSY) {
			return nil, false, busy(path)
		}
		return nil, false, failure("open", path, err)
	}
	return f, direct, nil
}

// setUp learns the geometry of the opened file and locks it.
func (d *File) setUp(direct, exclusive bool) error {
	fd := int(d.f.Fd())
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return failure("stat", d.path, err)
	}
	if err := usable(d.path, st.Mode); err != nil { // replaced meanwhile
		return err
	}
	d.block = st.Mode&unix.S_IFMT == unix.S_IFBLK
	if exclusive && !d.block {
		if err := lockImage(fd, d.path, d.readOnly); err != nil {
			return err
		}
		// Whoever held the lock until now may have changed the length.
		if err := unix.Fstat(fd, &st); err != nil {
			return failure("stat", d.path, err)
		}
	}
	memAlign, offAlign, able := directNeeds(fd)
	d.sector, d.size = min(max(offAlign, simSector), directAlign), st.Size
	if d.block {
		n, err := deviceSize(fd)
		if err != nil {
			return failure("size of", d.path, err)
		}
		if d.sector, err = unix.IoctlGetInt(fd, unix.BLKSSZGET); err != nil {
			return failure("sector size of", d.path, err)
		}
		if d.sector != 512 && d.sector != 4096 {
			return fmt.Errorf("open %s: sectors of %d bytes: %w", d.path, d.sector, sealfs.ErrNotSupported)
		}
		d.size = n
	}
	d.size -= d.size % int64(d.sector)
	// Some file systems take the flag and then use the page cache all the same, and
	// some ask for more than a sector.
	if direct && (!able || offAlign > d.sector) {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err == nil {
			_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags&^unix.O_DIRECT)
		}
		if err != nil {
			return failure("open", d.path, err)
		}
		direct = false
	}
	if direct {
		d.memAlign = memAlign
	}
	return nil
}

// directNeeds returns the alignment of memory and of offsets that direct I/O on
// fd requires, and whether fd is capable of it at all.
func directNeeds(fd int) (mem, off int, able bool) {
	var sx unix.Statx_t
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &sx)
	if err == nil && sx.Mask&unix.STATX_DIOALIGN != 0 {
		if sx.Dio_offset_align == 0 {
			return 0, directAlign, false
		}
		return max(int(sx.Dio_mem_align), 1), int(sx.Dio_offset_align), true
	}
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) == nil && (fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC) {
		return 0, directAlign, false
	}
	return directAlign, directAlign, true
}

// deviceSize returns the length of a block device.
func deviceSize(fd int) (int64, error) {
	var n uint64
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&n)))
	if errno != 0 {
		return 0, errno
	}
	return int64(n), nil
}

// Name returns the path given to Open.
func (d *File) Name() string { return d.path }

// Size implements Device.
func (d *File) Size() int64 { return d.size }

// SectorSize implements Device.
func (d *File) SectorSize() int { return d.sector }

// Direct reports whether I/O bypasses the page cache: OpenOptions.Direct was set
// and the file system agreed.
func (d *File) Direct() bool { return d.memAlign > 0 }

// Block reports whether this is a block device, not an image file.
func (d *File) Block() bool { return d.block }

// Stats implements Device.
func (d *File) Stats() Stats { return d.stats() }

// ReadAt implements Device.
func (d *File) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("read %s at %d: %w", d.path, off, sealfs.ErrInvalid)
	}
	d.using.RLock()
	defer d.using.RUnlock()
	if d.closed {
		return 0, fmt.Errorf("read %s: %w", d.path, sealfs.ErrClosed)
	}
	if len(p) == 0 {
		return 0, nil
	}
	if off >= d.size {
		return 0, io.EOF
	}
	want := p[:min(int64(len(p)), d.size-off)]
	if d.straight(want, off) {
		n, err = d.io.ReadAt(want, off)
	} else {
		n, err = d.readBounced(want, off)
	}
	if err != nil {
		if err == io.EOF {
			return n, fmt.Errorf("read %s at %d: shorter than when it was opened: %w", d.path, off, sealfs.ErrIO)
		}
		return n, failure(fmt.Sprintf("read %d bytes at %d of", len(want), off), d.path, err)
	}
	d.read(n)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt implements Device.
func (d *File) WriteAt(p []byte, off int64) (n int, err error) {
	if err := aligned(d, "write", off, int64(len(p))); err != nil {
		return 0, err
	}
	d.using.RLock()
	defer d.using.RUnlock()
	if err := d.changeable("write"); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if d.straight(p, off) {
		n, err = d.io.WriteAt(p, off)
	} else {
		n, err = d.writeBounced(p, off)
	}
	if err != nil {
		err = failure(fmt.Sprintf("write %d bytes at %d of", len(p), off), d.path, err)
		return n, d.latch.trip(d.path, err)
	}
	d.write(n)
	return n, nil
}

// straight reports whether p can go between the device and memory without a copy.
func (d *File) straight(p []byte, off int64) bool {
	return d.memAlign == 0 ||
		off%int64(d.sector) == 0 && len(p)%d.sector == 0 &&
			uintptr(unsafe.Pointer(unsafe.SliceData(p)))%uintptr(d.memAlign) == 0
}

// bounces lends aligned memory for requests that lack it.
var bounces = sync.Pool{New: func() any {
	b := AlignedBuffer(bounceSize)
	return &b
}}

// readBounced reads p by way of aligned memory and whole sectors. The device's
// size being whole sectors too, they never reach beyond it.
func (d *File) readBounced(p []byte, off int64) (int, error) {
	buf := bounces.Get().(*[]byte)
	defer bounces.Put(buf)
	sector, done := int64(d.sector), 0
	for done < len(p) {
		at := off + int64(done)
		skip := at % sector
		span := min((skip+int64(len(p)-done)+sector-1)/sector*sector, bounceSize)
		n, err := d.io.ReadAt((*buf)[:span], at-skip)
		if int64(n) > skip {
			done += copy(p[done:], (*buf)[skip:n])
		}
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// writeBounced writes p, which is whole sectors, by way of aligned memory.
func (d *File) writeBounced(p []byte, off int64) (int, error) {
	buf := bounces.Get().(*[]byte)
	defer bounces.Put(buf)
	done := 0
	for done < len(p) {
		n, err := d.io.WriteAt((*buf)[:copy(*buf, p[done:])], off+int64(done))
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// changeable refuses what changes a device that is closed, read-only or latched.
// REQUIRES: d.using.
func (d *File) changeable(what string) error {
	switch {
	case d.closed:
		return fmt.Errorf("%s %s: %w", what, d.path, sealfs.ErrClosed)
	case d.readOnly:
		return fmt.Errorf("%s %s: %w", what, d.path, sealfs.ErrReadOnly)
	}
	return d.latch.check()
}

// Flush implements Device. Calls that wait while one is under way share the
// next: it began after all of them. One at a time also makes sure that a
// failure, which the kernel reports to one caller only, is seen by all.
func (d *File) Flush() error {
	d.using.RLock()
	defer d.using.RUnlock()
	if err := d.changeable("flush"); err != nil {
		return err
	}
	before := d.rounds.Load()
	d.flushing.Lock()
	defer d.flushing.Unlock()
	if err := d.latch.check(); err != nil {
		return err
	}
	if d.rounds.Load() > before {
		return nil
	}
	d.rounds.Add(1)
	if err := d.control(unix.Fdatasync); err != nil {
		return d.latch.trip(d.path, failure("flush", d.path, err))
	}
	d.flushes.Add(1)
	return nil
}

// Discard implements Device: BLKDISCARD, or a hole punched into an image.
func (d *File) Discard(off, n int64) error {
	if err := aligned(d, "discard", off, n); err != nil {
		return err
	}
	d.using.RLock()
	defer d.using.RUnlock()
	if err := d.changeable("discard"); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	err := d.control(func(fd int) error {
		if d.block {
			return discardDevice(fd, off, n)
		}
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if err != nil {
		return failure(fmt.Sprintf("discard %d bytes at %d of", n, off), d.path, err)
	}
	d.discards.Add(1)
	return nil
}

func discardDevice(fd int, off, n int64) error {
	span := [2]uint64{uint64(off), uint64(n)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&span)))
	if errno != 0 {
		return errno
	}
	return nil
}

// control runs fn on the descriptor. REQUIRES: d.using.
func (d *File) control(fn func(fd int) error) error {
	for {
		if err := fn(int(d.f.Fd())); err != unix.EINTR {
			return err
		}
	}
}

// Close implements Device.
func (d *File) Close() error {
	d.using.Lock()
	defer d.using.Unlock()
	if d.closed {
		return fmt.Errorf("close %s: %w", d.path, sealfs.ErrClosed)
	}
	d.closed = true
	if err := d.f.Close(); err != nil {
		return failure("close", d.path, err)
	}
	return nil
}

// lockImage takes the lock of an image file.
func lockImage(fd int, path string, shared bool) error {
	how := unix.LOCK_EX
	if shared {
		how = unix.LOCK_SH
	}
	err := unix.Flock(fd, how|unix.LOCK_NB)
	if err == unix.EWOULDBLOCK {
		return busy(path)
	}
	if err != nil {
		return failure("lock", path, err)
	}
	return nil
}

// busy returns the error for a device that is taken, naming by whom if that can
// be found.
func busy(path string) error {
	if at, err := Mounted(path); err == nil && at != "" {
		return fmt.Errorf("open %s: mounted at %s: %w", path, at, sealfs.ErrBusy)
	}
	var st unix.Stat_t
	if unix.Stat(path, &st) == nil {
		pid := lockHolder(st)
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			pid = deviceHolder(st.Rdev)
		}
		if pid > 0 {
			return fmt.Errorf("open %s: in use by process %d: %w", path, pid, sealfs.ErrBusy)
		}
	}
	return fmt.Errorf("open %s: in use: %w", path, sealfs.ErrBusy)
}

// lockHolder returns the process that holds a flock on the file, 0 if unknown.
func lockHolder(st unix.Stat_t) int {
	table, err := os.ReadFile("/proc/locks")
	if err != nil {
		return 0
	}
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for line := range strings.Lines(string(table)) {
		// 1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF
		w := strings.Fields(line)
		if len(w) >= 6 && w[1] == "FLOCK" && w[5] == file {
			pid, _ := strconv.Atoi(w[4])
			return pid
		}
	}
	return 0
}

// deviceHolder returns a process that has the block device open, 0 if unknown.
func deviceHolder(rdev uint64) int {
	open, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, name := range open {
		target, err := os.Readlink(name)
		if err != nil || !strings.HasPrefix(target, "/dev/") {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(name, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == rdev {
			pid, _ := strconv.Atoi(strings.Split(name, "/")[2])
			return pid
		}
	}
	return 0
}

// CreateImage makes a sparse image file of size bytes, a positive multiple of
// 4096, that reads as zeros. It fails with ErrExist if there is anything at path.
// On return file and name are durable; after a failure there is no file.
func CreateImage(path string, size int64) (err error) {
	if size <= 0 || size%sealfs.BlockSize != 0 {
		return fmt.Errorf("create %s: %d is no positive multiple of %d: %w",
			path, size, sealfs.BlockSize, sealfs.ErrInvalid)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return failure("create", path, err)
	}
	err = f.Truncate(size)
	if err == nil {
		err = f.Sync()
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return errors.Join(failure("create", path, err), os.Remove(path))
	}
	return nil
}

// syncDir makes the names in a directory durable.
func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	err = dir.Sync()
	if closed := dir.Close(); err == nil {
		err = closed
	}
	return err
}

// AlignedBuffer returns n zero bytes of Go memory, aligned to 4096 bytes, that a
// direct Device transfers without a copy. The collector does not move it.
//
//go:noinline
func AlignedBuffer(n int) []byte {
	// Kept out of line so that the array cannot land on a stack, which moves. Go
	// aligns many sizes by itself; the others get room to choose from.
	b := make([]byte, n)
	if n > 0 && misaligned(b) != 0 {
		b = make([]byte, n+directAlign)
		b = b[directAlign-misaligned(b):]
	}
	return b[:n:n]
}

func misaligned(b []byte) int {
	return int(uintptr(unsafe.Pointer(unsafe.SliceData(b))) % directAlign)
}

// failure wraps an error of the operating system and its Code.
func failure(what, path string, err error) error {
	code := sealfs.ErrIO
	errno, known := errors.AsType[unix.Errno](err)
	if !known {
		return fmt.Errorf("%s %s: %w: %w", what, path, code, err)
	}
	switch errno {
	case unix.ENOENT:
		code = sealfs.ErrNotExist
	case unix.EEXIST:
		code = sealfs.ErrExist
	case unix.ENOTDIR:
		code = sealfs.ErrNotDir
	case unix.EISDIR:
		code = sealfs.ErrIsDir
	case unix.ENAMETOOLONG:
		code = sealfs.ErrNameTooLong
	case unix.ELOOP:
		code = sealfs.ErrTooManySymlinks
	case unix.EACCES:
		code = sealfs.ErrAccess
	case unix.EPERM:
		code = sealfs.ErrPerm
	case unix.EROFS:
		code = sealfs.ErrReadOnly
	case unix.EBUSY, unix.ETXTBSY:
		code = sealfs.ErrBusy
	case unix.ENOSPC:
		code = sealfs.ErrNoSpace
	case unix.EDQUOT:
		code = sealfs.ErrQuota
	case unix.EFBIG:
		code = sealfs.ErrTooBig
	case unix.EOPNOTSUPP, unix.ENOSYS, unix.ENOTTY:
		code = sealfs.ErrNotSupported
	}
	return fmt.Errorf("%s %s: %w (%w)", what, path, code, errno)
}
