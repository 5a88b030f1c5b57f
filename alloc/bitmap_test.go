package alloc

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// TestBitmapOrder pins the order of bits, which is part of the region's format.
func TestBitmapOrder(t *testing.T) {
	b := make(Bitmap, 3)
	for _, i := range []int{0, 3, 9, 23} {
		b.Set(i)
	}
	if want := []byte{0x09, 0x02, 0x80}; !bytes.Equal(b, want) {
		t.Fatalf("bits 0, 3, 9, 23 are % x, want % x", b, want)
	}
	b.Clear(3)
	if b.Get(3) || !b.Get(0) || b.Count() != 3 {
		t.Fatalf("after Clear(3): % x, count %d", b, b.Count())
	}
}

// TestBitmapSearch compares the word-wise searches with a loop over bits, for
// lengths around a word, all kinds of densities, and every start.
func TestBitmapSearch(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for _, size := range []int{0, 1, 7, 8, 9, 16, 23, 64} {
		for round := range 30 {
			b := make(Bitmap, size)
			for i := range b {
				switch round % 3 {
				case 0:
					b[i] = byte(rng.Uint32())
				case 1:
					if rng.IntN(9) == 0 {
						b[i] = 1 << rng.IntN(8)
					}
				case 2:
					b[i] = 0xff
					if rng.IntN(9) == 0 {
						b[i] ^= 1 << rng.IntN(8)
					}
				}
			}
			count := 0
			for i := range size * 8 {
				if b.Get(i) {
					count++
				}
			}
			if got := b.Count(); got != count {
				t.Fatalf("Count of % x = %d, want %d", b, got, count)
			}
			for from := -1; from <= size*8+1; from++ {
				limit := rng.IntN(size*8 + 70)
				clear, set := -1, -1
				for i := max(from, 0); i < min(limit, size*8); i++ {
					if b.Get(i) && set < 0 {
						set = i
					}
					if !b.Get(i) && clear < 0 {
						clear = i
					}
				}
				if got := b.NextClear(from, limit); got != clear {
					t.Fatalf("NextClear(%d, %d) of % x = %d, want %d", from, limit, b, got, clear)
				}
				if got := b.NextSet(from, limit); got != set {
					t.Fatalf("NextSet(%d, %d) of % x = %d, want %d", from, limit, b, got, set)
				}
			}
		}
	}
}
