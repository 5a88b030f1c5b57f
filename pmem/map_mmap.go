//go:build !race

package pmem

import (
	"os"

	mmap "github.com/edsrzf/mmap-go"
	"golang.org/x/sys/unix"
)

// limits: windows of 1 GiB, because mapping much more privately at once is
// refused by the kernel's overcommit heuristic.
func (b *file) limits() (window, size int64) { return 1 << 30, 0 }

// Map maps the file privately: the kernel never writes what is stored there.
func (b *file) Map(off, n int64) (Mapping, error) {
	m, err := mmap.MapRegion(b.f, int(n), mmap.COPY, 0, off)
	if err != nil {
		return nil, fileError("map region", b.path, err)
	}
	return &private{m: m, path: b.path}, nil
}

// mapSync maps n bytes at off of f so that stores need no system call to be
// durable; mmap-go does not know that way. Only persistent memory can do it.
func mapSync(f *os.File, off int64, n int) ([]byte, error) {
	return unix.Mmap(int(f.Fd()), off, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED_VALIDATE|unix.MAP_SYNC)
}

// private is a private mapping of a file.
type private struct {
	m    mmap.MMap
	path string
}

func (m *private) Bytes() []byte { return m.m }

func (m *private) Drop(off, n int64) error {
	if err := unix.Madvise(m.m[off:off+n], unix.MADV_DONTNEED); err != nil {
		return fileError("drop pages of region", m.path, err)
	}
	return nil
}

func (m *private) Unmap() error {
	if err := m.m.Unmap(); err != nil {
		return fileError("unmap region", m.path, err)
	}
	return nil
}

// mapShared maps all of f so that stores are seen by every process that maps
// or reads it. sync is called before release, and does nothing here.
func mapShared(f *os.File, size int) (mem []byte, sync, release func() error, err error) {
	m, err := mmap.MapRegion(f, size, mmap.RDWR, 0, 0)
	if err != nil {
		return nil, nil, nil, err
	}
	return m, func() error { return nil }, m.Unmap, nil
}
