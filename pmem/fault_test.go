//go:build !race

package pmem

import (
	"errors"
	"os"
	"path/filepath"
	"runtime/debug"
	"testing"

	"golang.org/x/sys/unix"

	"sealfs"
)

// TestProcessorFault shows that a fault inside the instructions is a panic like any
// other, with the address at which it happened.
func TestProcessorFault(t *testing.T) {
	cpu, err := detect()
	if errors.Is(err, sealfs.ErrNotSupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "memory"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(2 * PageSize); err != nil {
		t.Fatal(err)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, 2*PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(m)
	if err := f.Truncate(PageSize); err != nil {
		t.Fatal(err)
	}
	for name, touch := range map[string]func(){
		"store":      func() { cpu.Store(m, make([]byte, 2*PageSize)) },
		"write-back": func() { cpu.WriteBack(m); m[PageSize]++ },
	} {
		func() {
			defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
			defer func() {
				fault, ok := recover().(interface{ Addr() uintptr })
				if !ok {
					t.Errorf("%s: no fault", name)
				} else if off := offsetIn(m, fault.Addr()); off != PageSize {
					t.Errorf("%s: fault at %d", name, off)
				}
			}()
			touch()
		}()
	}
}
