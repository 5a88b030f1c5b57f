//go:build race

package pmem

import (
	"errors"
	"io"
	"os"
)

// mapSync refuses.
func mapSync(*os.File, int64, int) ([]byte, error) {
	return nil, errors.New("not under the race detector")
}

// The race detector does not see into mappings: under it a region file is
// copied to the heap, in windows small enough to be cheap.

func (b *file) limits() (window, size int64) { return 16 << 20, 0 }

// Map copies the range.
func (b *file) Map(off, n int64) (Mapping, error) { return mapHeap(b, off, n) }

// mapShared copies all of f to the heap; sync writes it back, also when f has
// been closed.
func mapShared(f *os.File, size int) (mem []byte, sync, release func() error, err error) {
	mem = make([]byte, size)
	if _, err := f.ReadAt(mem, 0); err != nil && err != io.EOF {
		return nil, nil, nil, err
	}
	sync = func() error {
		w, err := os.OpenFile(f.Name(), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = w.WriteAt(mem, 0)
		if e := w.Close(); err == nil {
			err = e
		}
		return err
	}
	return mem, sync, func() error { return nil }, nil
}
