package pmem

import (
	"fmt"
	"unsafe"

	"sealfs"
)

// The instructions, in flush_amd64.s. line and dst begin at a cache line, lines
// is at least 1.

func cpuid(leaf, sub uint32) (a, b, c, d uint32)

//go:noescape
func clwb(line unsafe.Pointer, lines int)

//go:noescape
func clflushopt(line unsafe.Pointer, lines int)

//go:noescape
func clflush(line unsafe.Pointer, lines int)

//go:noescape
func storeNT(dst, src unsafe.Pointer, lines int)

func sfence()

// processor makes stores durable by instructions of the processor.
//
// SFENCE orders what this processor has stored and flushed, and the caller may
// have moved to another one since it did: the scheduler of Go and the kernel both
// execute locked instructions on that way, as does the release of a mutex, and
// those order flushes and non-temporal stores as SFENCE does.
type processor struct {
	writeBack func(line unsafe.Pointer, lines int)
	name      string // of the instruction
}

// detect returns the best way of this processor to write back cache lines: CLWB
// keeps the line, CLFLUSHOPT drops it, CLFLUSH drops one after the other. If it
// has none, the error is ErrNotSupported.
func detect() (*processor, error) {
	most, _, _, _ := cpuid(0, 0)
	_, b, _, d := cpuid(1, 0)
	if bytes := b >> 8 & 0xff * 8; d>>19&1 == 0 || bytes != LineBytes {
		return nil, fmt.Errorf("persistent memory: this processor cannot flush cache lines of %d bytes: %w", LineBytes, sealfs.ErrNotSupported)
	}
	if most >= 7 {
		_, b, _, _ = cpuid(7, 0)
		switch {
		case b>>24&1 != 0:
			return &processor{clwb, "clwb"}, nil
		case b>>23&1 != 0:
			return &processor{clflushopt, "clflushopt"}, nil
		}
	}
	return &processor{clflush, "clflush"}, nil
}

// Store implements Persistence by non-temporal stores, which pass the cache by.
func (*processor) Store(dst, src []byte) {
	if len(src) > 0 {
		storeNT(unsafe.Pointer(unsafe.SliceData(dst[:len(src)])), unsafe.Pointer(unsafe.SliceData(src)), len(src)/LineBytes)
	}
}

// WriteBack implements Persistence.
func (p *processor) WriteBack(b []byte) {
	if len(b) == 0 {
		return
	}
	start := unsafe.Pointer(unsafe.SliceData(b))
	in := uintptr(start) % LineBytes
	p.writeBack(unsafe.Add(start, -int(in)), (int(in)+len(b)+LineBytes-1)/LineBytes)
}

// Fence implements Persistence.
func (*processor) Fence() { sfence() }
