package pmem

import (
	"errors"
	"math/rand/v2"
	"testing"

	"sealfs"
	"sealfs/pmem/layout"
)

// useDamaged runs every operation on a region whose pages may hold anything.
// All may fail; none may panic or run for ever, and an error must be one that
// callers know.
func useDamaged(t *testing.T, r *Region, s shape, rng *rand.Rand) {
	t.Helper()
	known := func(err error) {
		if err != nil && !errors.Is(err, sealfs.ErrCorrupt) && !errors.Is(err, sealfs.ErrNotExist) &&
			!errors.Is(err, sealfs.ErrNoSpace) {
			t.Fatalf("unexpected error %v", err)
		}
	}
	walk := func(v Reader) {
		var c Cursor
		n := 0
		for ok := c.Seek(v, nil); ok; ok = c.Next() {
			if n++; n > 1<<20 {
				t.Fatal("the walk does not end")
			}
		}
		known(c.Err())
	}
	walk(r)
	known(r.Check(func(string) {}))
	for i := range 60 {
		tx := r.Begin()
		for range 8 {
			key := s.key(rng, i)
			_, err := Get(tx, key)
			known(err)
			if rng.IntN(2) == 0 {
				err = tx.Set(key, s.val(rng))
			} else {
				err = tx.Delete(key)
			}
			known(err)
			if err != nil && rng.IntN(2) == 0 { // also go on where callers must not
				break
			}
		}
		tx.AppendRedo(nil)
		tx.Commit()
	}
	walk(r)
	r.Usage()
}

// TestDamage damages pages of a tree in many ways.
func TestDamage(t *testing.T) {
	for seed := range uint64(150) {
		rng := rand.New(rand.NewPCG(seed, 99))
		s := shapes[seed%uint64(len(shapes))]
		r, _ := newRegion(t, 1<<20)
		for i := range 300 {
			tx := r.Begin()
			if err := tx.Set(s.key(rng, i), s.val(rng)); err != nil {
				break
			}
			tx.Commit()
		}
		first := layout.RootPage
		if rng.IntN(3) > 0 {
			first = int(layout.Reserved(0, r.tablePages)) // the tree
		}
		last := int(layout.Reserved(0, r.tablePages)) + 1 + int(r.usedTotal.Load())
		for range 1 + rng.IntN(8) {
			p, _ := r.Page(PageNo(first + rng.IntN(last-first+1)))
			switch rng.IntN(4) {
			case 0:
				p[rng.IntN(PageSize)] ^= 1 << rng.IntN(8)
			case 1: // page header and slots
				p[rng.IntN(64)] = byte(rng.Uint32())
			case 2:
				q, _ := r.Page(PageNo(first + rng.IntN(last-first+1)))
				copy(p, q)
			case 3:
				at := rng.IntN(PageSize)
				copy(p[at:], randomBytes(rng, rng.IntN(PageSize-at+1)))
			}
		}
		useDamaged(t, r, s, rng)
	}
}

// TestDamageFound: whatever single byte of a used part of a leaf or inner page
// is damaged, Check, which knows no checksums, must at least not blame a sound
// region, and finds damage of structure.
func TestDamageFound(t *testing.T) {
	r, _ := newRegion(t, 2<<20)
	rng := rand.New(rand.NewPCG(1, 99))
	for i := range 3000 {
		tx := r.Begin()
		if err := tx.Set(shapes[1].key(rng, i), shapes[1].val(rng)); err != nil {
			t.Fatal(err)
		}
		tx.Commit()
	}
	mustCheck(t, r)
	rootNo, _ := treeRoot(r)
	root, _ := load(r, rootNo, -1)
	leafNo, _ := root.child(1)
	for _, no := range []PageNo{rootNo, leafNo} {
		p, _ := r.Page(no)
		for _, off := range []int{0, layout.TreeLevelOff, layout.TreeDeadOff, layout.TreeCountOff,
			layout.TreeHeapOff, layout.TreeHeader, layout.TreeHeader + 3} {
			old := p[off]
			p[off] ^= 1
			n := 0
			if err := r.Check(func(string) { n++ }); err == nil && n == 0 {
				t.Errorf("byte %d of page %d is damaged, and nothing found", off, no)
			}
			p[off] = old
		}
	}
	bitmap, _ := r.Page(PageNo(layout.BitmapPage(0, r.tablePages)))
	for _, i := range []int{0, int(rootNo) / 8, 100} {
		bitmap[i] ^= 0xff
		n := 0
		if r.Check(func(string) { n++ }); n == 0 {
			t.Errorf("byte %d of the bitmap is damaged, and nothing found", i)
		}
		bitmap[i] ^= 0xff
	}
	mustCheck(t, r)
}

// FuzzDamage lays arbitrary bytes over a page.
func FuzzDamage(f *testing.F) {
	f.Add(uint8(1), uint16(6), []byte{1, 2, 3}, uint64(1))
	f.Add(uint8(2), uint16(12), []byte{0xff, 0x0f, 0, 0}, uint64(2))
	f.Add(uint8(0), uint16(0), []byte{0}, uint64(3))
	f.Fuzz(func(t *testing.T, page uint8, off uint16, b []byte, seed uint64) {
		rng := rand.New(rand.NewPCG(seed, 99))
		s := shapes[seed%uint64(len(shapes))]
		r, _ := newRegion(t, 1<<20)
		for i := range 200 {
			tx := r.Begin()
			if tx.Set(s.key(rng, i), s.val(rng)) != nil {
				break
			}
			tx.Commit()
		}
		p, err := r.Page(PageNo(layout.BitmapPage(0, r.tablePages)) + PageNo(page))
		if err != nil {
			t.Skip()
		}
		copy(p[int(off)%PageSize:], b)
		useDamaged(t, r, s, rng)
	})
}
