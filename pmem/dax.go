package pmem

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/pmem/layout"
)

// LineBytes is the size of a cache line: what is written back at a time.
const LineBytes = 64

// Persistence is how stores to a mapping become durable. What is durable after a
// power cut is every 8-byte word as it stood at the last WriteBack or Store before a
// Fence, or, word by word, as some later store left it. The caller serializes
// stores to the same bytes.
type Persistence interface {
	// Store copies src to dst, past the cache: it is durable after the next
	// Fence. dst begins at a cache line, and src is whole lines long.
	Store(dst, src []byte)
	// WriteBack begins to write back the lines that b touches: what has been
	// stored there is durable after the next Fence.
	WriteBack(b []byte)
	// Fence orders: no store that follows is durable before what was stored and
	// written back until now, by any goroutine whose mutex the caller has taken since.
	Fence()
}

// Persistent is a Backing whose mappings are the medium itself. The ring of its
// store lies beside it, on the same medium.
type Persistent interface {
	Backing
	Rings
	Persistence() Persistence
	// CreateRing is CreateStaging for a ring that survives power cuts. The ring
	// is durable on return, and empty; of no boot.
	CreateRing(h StagingHeader) (*Staging, error)
}

// Rings is a Backing that knows where a ring on persistent memory belongs to it.
type Rings interface {
	// OpenRing is OpenStaging for the ring that CreateRing made; on a medium that
	// is not persistent memory any more too.
	OpenRing() (*Staging, error)
	// RemoveRing removes it, if it is there.
	RemoveRing() error
}

// The ways in which a region's file may be mapped.
const (
	ModeAuto = "auto" // ModeDax where that is possible, else ModeFile
	ModeFile = "file" // privately: checkpoints write the file
	ModeDax  = "dax"  // MAP_SYNC: the mapping is persistent memory
)

// OpenFileMode is OpenFile for a file that exists, mapped as mode says; "" is
// ModeAuto. With ModeDax the error tells why it is not possible: it wraps
// ErrNotSupported.
func OpenFileMode(path, mode string) (Backing, error) {
	if mode != "" && mode != ModeAuto && mode != ModeFile && mode != ModeDax {
		return nil, fmt.Errorf("region mode %q is none of %s, %s and %s: %w", mode, ModeAuto, ModeFile, ModeDax, sealfs.ErrInvalid)
	}
	b, err := OpenFile(path, false)
	if err != nil || mode == ModeFile {
		return b, err
	}
	d, err := newDax(b.(*file))
	if err == nil {
		// Of damage Open tells.
		if h, e := readHeader(b); e == nil {
			err = fitsDax(path, &h)
		}
	}
	switch {
	case err == nil:
		return d, nil
	case mode == ModeDax:
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

// fitsDax refuses a region with page sums: changes in place would leave them
// behind, and without them pages that recovery gave up would be believed.
func fitsDax(name string, h *Header) error {
	if h.Incompat&layout.FeatureNoSums != 0 {
		return nil
	}
	return fmt.Errorf("region %s has page sums, since it was not made for persistent memory, and cannot be used as such: %w", name, sealfs.ErrNotSupported)
}

// CheckDax tells why a region at path could not be mapped as persistent memory,
// nil if it could. It makes a file in the directory of path, and removes it.
func CheckDax(path string) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".sealfs-dax-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := f.Truncate(PageSize); err != nil {
		return fileError("grow", f.Name(), err)
	}
	_, err = newDax(&file{f: f, path: path})
	return err
}

// dax is a region in a file on persistent memory.
type dax struct {
	*file
	cpu *processor
}

// newDax refuses files whose mapping is not persistent memory.
func newDax(f *file) (*dax, error) {
	cpu, err := detect()
	if err != nil {
		return nil, err
	}
	m, err := mapSync(f.f, 0, PageSize)
	if err == nil {
		err = unix.Munmap(m)
	}
	if err != nil {
		return nil, fmt.Errorf("region %s: its file system does not map persistent memory (MAP_SYNC: %v): %w", f.path, err, sealfs.ErrNotSupported)
	}
	return &dax{f, cpu}, nil
}

// Persistence implements Persistent.
func (b *dax) Persistence() Persistence { return b.cpu }

// Map maps the range of the file.
func (b *dax) Map(off, n int64) (Mapping, error) {
	m, err := mapSync(b.f, off, int(n))
	if err != nil {
		return nil, fileError("map region", b.path, err)
	}
	return &direct{m, b.path}, nil
}

// Grow fills what is new with zeros, so that every page has its place on the
// medium: a store to one that cannot get any would be a signal.
func (b *dax) Grow(size int64) error {
	old := b.Size()
	if size <= old {
		return nil
	}
	if err := zeroFill(b.f, old, size); err != nil {
		return fileError("grow region", b.path, errors.Join(err, b.f.Truncate(old)))
	}
	return nil
}

// zeroFill writes zeros to [from, to) of f and makes them durable.
func zeroFill(f *os.File, from, to int64) error {
	zeros := make([]byte, 1<<20)
	for from < to {
		n, err := f.WriteAt(zeros[:min(to-from, int64(len(zeros)))], from)
		if err != nil {
			return err
		}
		from += int64(n)
	}
	return f.Sync()
}

// direct is a shared mapping of persistent memory.
type direct struct {
	m    []byte
	path string
}

func (m *direct) Bytes() []byte           { return m.m }
func (m *direct) Drop(off, n int64) error { return nil }

func (m *direct) Unmap() error {
	if err := unix.Munmap(m.m); err != nil {
		return fileError("unmap region", m.path, err)
	}
	return nil
}

// RingPath returns where the ring lies that belongs to the region in the file at
// path, when it is on persistent memory.
func RingPath(path string) string { return path + ".ring" }

func (b *file) ringPath() string { return RingPath(b.path) }

// OpenRing implements Rings: the ring is mapped as any other.
func (b *file) OpenRing() (*Staging, error) { return OpenStaging(b.ringPath()) }

// RemoveRing implements Rings.
func (b *file) RemoveRing() error {
	if err := os.Remove(b.ringPath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return stagingError("remove", b.ringPath(), err)
	}
	return nil
}

// OpenRing implements Rings.
func (b *dax) OpenRing() (*Staging, error) {
	return openStaging(b.ringPath(), b.mapRing)
}

// CreateRing implements Persistent.
func (b *dax) CreateRing(h StagingHeader) (*Staging, error) {
	h.BootID = [16]byte{}
	return createStaging(b.ringPath(), h, func(f *os.File) error {
		if err := zeroFill(f, 0, int64(h.bytes())); err != nil {
			return err
		}
		dir, err := os.Open(filepath.Dir(b.path))
		if err != nil {
			return err
		}
		return errors.Join(dir.Sync(), dir.Close())
	}, b.mapRing)
}

// mapRing maps the ring's file as persistent memory.
func (b *dax) mapRing(f *os.File, path string, h StagingHeader) (*Staging, error) {
	m, err := mapSync(f, 0, h.bytes())
	if err != nil {
		return nil, stagingError("map", path, err)
	}
	return &Staging{path: path, header: h, mem: m, pm: newMedium(b.cpu),
		sync: func() error { return nil }, release: func() error { return unix.Munmap(m) }, remove: func() error { return os.Remove(path) }}, nil
}

// medium is a Persistence that counts.
type medium struct {
	p Persistence

	stored  atomic.Uint64 // lines
	flushed atomic.Uint64 // lines
	fences  atomic.Uint64
}

func newMedium(p Persistence) *medium { return &medium{p: p} }

func (m *medium) store(dst, src []byte) {
	m.stored.Add(uint64(len(src) / LineBytes))
	m.p.Store(dst, src)
}

// flush flushes p[lo:hi], where p begins at a cache line.
func (m *medium) flush(p []byte, lo, hi int) {
	m.flushed.Add(uint64((hi-1)/LineBytes - lo/LineBytes + 1))
	m.p.WriteBack(p[lo:hi])
}

func (m *medium) fence() {
	m.fences.Add(1)
	m.p.Fence()
}

// Persisted counts what was done to make stores durable.
type Persisted struct {
	Stored  uint64 `json:"lines_stored"`  // cache lines stored past the cache
	Flushed uint64 `json:"lines_flushed"` // cache lines written back
	Fences  uint64 `json:"fences"`
}

// Plus returns the sum of both.
func (p Persisted) Plus(q Persisted) Persisted {
	return Persisted{p.Stored + q.Stored, p.Flushed + q.Flushed, p.Fences + q.Fences}
}

func (m *medium) persisted() Persisted {
	if m == nil {
		return Persisted{}
	}
	return Persisted{m.stored.Load(), m.flushed.Load(), m.fences.Load()}
}

// Persisted returns what was done for the region, zeros for one that is not on
// persistent memory.
func (r *Region) Persisted() Persisted { return r.pm.persisted() }

// Persisted returns what was done for the ring.
func (s *Staging) Persisted() Persisted { return s.pm.persisted() }

// Durable reports whether the region's mapping is durable itself.
func (r *Region) Durable() bool { return r.pm != nil }

// Durable reports whether the ring survives power cuts.
func (s *Staging) Durable() bool { return s.pm != nil }

// Both kinds of persistent memory.
var (
	_ Persistent = (*dax)(nil)
	_ Persistent = (*SimDax)(nil)
)
