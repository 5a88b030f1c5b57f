package alloc

import (
	"encoding/binary"
	"math/bits"
)

// Bitmap is a view of bytes as bits: bit i is bit i%8 (from the lowest) of byte
// i/8. A set bit means taken. The order is part of the region's format. Methods
// that take a bit panic when it lies outside the bitmap, as indexing does.
type Bitmap []byte

// Get reports whether bit i is set.
func (b Bitmap) Get(i int) bool { return b[i>>3]&(1<<(i&7)) != 0 }

// Set sets bit i.
func (b Bitmap) Set(i int) { b[i>>3] |= 1 << (i & 7) }

// Clear clears bit i.
func (b Bitmap) Clear(i int) { b[i>>3] &^= 1 << (i & 7) }

// Count returns the number of set bits.
func (b Bitmap) Count() int {
	n := 0
	for ; len(b) >= 8; b = b[8:] {
		n += bits.OnesCount64(binary.LittleEndian.Uint64(b))
	}
	for _, c := range b {
		n += bits.OnesCount8(c)
	}
	return n
}

// NextClear returns the first clear bit in [from, limit), or -1. A limit beyond
// the bitmap means its end.
func (b Bitmap) NextClear(from, limit int) int { return b.next(from, limit, ^uint64(0)) }

// NextSet returns the first set bit in [from, limit), or -1. A limit beyond the
// bitmap means its end.
func (b Bitmap) NextSet(from, limit int) int { return b.next(from, limit, 0) }

// next finds the first set bit of b XOR flip, a word at a time.
func (b Bitmap) next(from, limit int, flip uint64) int {
	from = max(from, 0)
	limit = min(limit, len(b)*8)
	for from < limit {
		start := from &^ 63
		var w uint64
		if tail := b[start>>3:]; len(tail) >= 8 {
			w = binary.LittleEndian.Uint64(tail)
		} else {
			for i, c := range tail {
				w |= uint64(c) << (8 * i)
			}
		}
		w = (w ^ flip) >> (from & 63)
		if w != 0 {
			if i := from + bits.TrailingZeros64(w); i < limit {
				return i
			}
			return -1
		}
		from = start + 64
	}
	return -1
}
