package layout

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"

	"sealfs"
	"sealfs/internal/enc"
)

// TestGoldenSums pins the sums, where they stand, and the intent page.
func TestGoldenSums(t *testing.T) {
	store := sample().Store
	p := bytes.Repeat([]byte("page"), PageSize/4)
	if got, want := Sum(SumSeed(store), 77, p), uint32(0xe36a9ce6); got != want {
		t.Errorf("sum %#x, want %#x", got, want)
	}
	b := EncodeIntent(store, 0x2122232425262728)
	const intent = "5345414c46536931" + "a00102030405060708090a0b0c0d0eaf" + "2827262524232221"
	if got := hex.EncodeToString(b[:32]); got != intent || !isZero(b[32:508]) || !isZero(b[512:]) || len(b) != PageSize {
		t.Errorf("intent page %s, want %s", got, intent)
	}
	if got, want := hex.EncodeToString(b[508:512]), "64461385"; got != want {
		t.Errorf("checksum of the intent page %s, want %s", got, want)
	}
	for _, c := range []struct{ n, page, off uint64 }{
		{0, 12, 0}, {1023, 12, 4092}, {1024, 13, 0}, {32767, 43, 4092}, {32768, 32769, 0}, {32768*3 + 5000, 32768*3 + 5, 904 * 4},
	} {
		if page, off := SumPage(c.n, 7); page != c.page || uint64(off) != c.off {
			t.Errorf("the sum of page %d stands in page %d at %d, want %d and %d", c.n, page, off, c.page, c.off)
		}
	}
	for n, want := range map[uint64]bool{
		0: false, 1: false, 2: false, 3: true, 4: true, 11: true, 12: false, 43: false, 44: true,
		32767: true, 32768: true, 32769: false, 32800: false, 32801: true,
	} {
		if HasSum(n, 7) != want {
			t.Errorf("page %d has a sum: %v", n, !want)
		}
	}
}

// TestSumFault: what fits and what does not.
func TestSumFault(t *testing.T) {
	seed := SumSeed(sample().Store)
	p, none := bytes.Repeat([]byte{7}, PageSize), make([]byte, PageSize)
	sum := Sum(seed, 5, p)
	for _, c := range []struct {
		n      uint64
		p      []byte
		stored uint32
		ok     bool
	}{
		{5, p, sum, true}, {6, p, sum, false}, {5, p, sum ^ 1, false}, {5, p, SumNone, false}, {5, p, SumLost, false},
		{5, none, SumNone, true}, {5, none, SumLost, false}, {5, none, Sum(seed, 5, none), true}, {5, none, sum, false},
	} {
		if what, _ := SumFault(seed, c.n, c.p, c.stored); (what == "") != c.ok {
			t.Errorf("page %d with %d and sum %#x: %q", c.n, c.p[0], c.stored, what)
		}
	}
	// A CRC maps seeds to sums one to one, so that some pages have the two that are
	// taken: four bytes of a page suffice to find them.
	for _, want := range []uint32{SumNone, SumLost} {
		p := make([]byte, PageSize)
		reach(seed, 9, p, want)
		if got := plain(seed, 9, p); got != want {
			t.Fatalf("CRC %#x, want %#x", got, want)
		}
		if got := Sum(seed, 9, p); got == SumNone || got == SumLost {
			t.Errorf("a page has the sum %#x", got)
		}
	}
}

// plain is the CRC that Sum makes a sum of.
func plain(seed uint32, n uint64, p []byte) uint32 { return enc.CRC(enc.Seed(seed, n), p) }

// reach changes the last four bytes of p so that its plain CRC is want. The CRC
// is linear in them: 33 of them give a system of equations.
func reach(seed uint32, n uint64, p []byte, want uint32) {
	tail := p[PageSize-4:]
	base := plain(seed, n, p)
	var col [32]uint32
	for i := range col {
		tail[i/8] = 1 << (i % 8)
		col[i] = plain(seed, n, p) ^ base
		clear(tail)
	}
	goal, pick := want^base, [32]uint32{}
	for i := range pick {
		pick[i] = 1 << i
	}
	answer := uint32(0)
	for bit := range 32 {
		for i := bit; i < 32; i++ {
			if col[i]>>bit&1 != 0 {
				col[bit], col[i], pick[bit], pick[i] = col[i], col[bit], pick[i], pick[bit]
				break
			}
		}
		for i := range col {
			if i != bit && col[i]>>bit&1 != 0 {
				col[i] ^= col[bit]
				pick[i] ^= pick[bit]
			}
		}
	}
	for bit := range 32 {
		if goal>>bit&1 != 0 {
			answer ^= pick[bit]
		}
	}
	for i := range tail {
		tail[i] = byte(answer >> (8 * i))
	}
}

// TestFlippedIntent: no single bit of the intent page can change unnoticed, and
// no other store's counts.
func TestFlippedIntent(t *testing.T) {
	store := sample().Store
	b := EncodeIntent(store, 9)
	for bit := range PageSize * 8 {
		b[bit/8] ^= 1 << (bit % 8)
		if _, err := DecodeIntent("r", store, b); !errors.Is(err, sealfs.ErrCorrupt) {
			t.Fatalf("bit %d flipped: %v", bit, err)
		}
		b[bit/8] ^= 1 << (bit % 8)
	}
	if u, err := DecodeIntent("r", store, b); err != nil || u != 9 {
		t.Errorf("%d, %v", u, err)
	}
	if _, err := DecodeIntent("r", sealfs.UUID{1}, b); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("another store's: %v", err)
	}
	if _, err := DecodeIntent("r", store, b[:100]); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("100 bytes: %v", err)
	}
	if u, err := DecodeIntent("r", store, make([]byte, PageSize)); err != nil || u != 0 {
		t.Errorf("zeros: %d, %v", u, err)
	}
}

// FuzzDecodeIntent: what is accepted is exactly what EncodeIntent writes.
func FuzzDecodeIntent(f *testing.F) {
	store := sample().Store
	f.Add(EncodeIntent(store, 5))
	f.Add(make([]byte, PageSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		u, err := DecodeIntent("r", store, b)
		if err == nil && !isZero(b) && !bytes.Equal(EncodeIntent(store, u), b) {
			t.Errorf("intent %d does not encode to what it was decoded from", u)
		}
	})
}
