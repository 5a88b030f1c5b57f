package pmem

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"sealfs"
	"sealfs/pmem/layout"
)

// sameRegion compares all pages that redo can change, byte for byte.
func sameRegion(t testing.TB, what string, got, want *Region) {
	t.Helper()
	for n := PageNo(layout.RootPage); uint64(n) < want.pages.Load(); n++ {
		if !layout.HasSum(uint64(n), want.tablePages) {
			continue
		}
		a, err1 := got.Page(n)
		b, err2 := want.Page(n)
		if err1 != nil || err2 != nil || !bytes.Equal(a, b) {
			t.Fatalf("%s: page %d differs (%v, %v)", what, n, err1, err2)
		}
	}
	if a, b := got.usedTotal.Load(), want.usedTotal.Load(); a != b {
		t.Fatalf("%s: %d pages are counted as used, want %d", what, a, b)
	}
	for g := range want.used {
		if a, b := got.used[g].Load(), want.used[g].Load(); a != b {
			t.Fatalf("%s: group %d has %d used pages, want %d", what, g, a, b)
		}
	}
}

// change does a few random operations in the open transaction.
func change(t testing.TB, tx *Tx, s shape, rng *rand.Rand, i int) {
	t.Helper()
	for range 1 + rng.IntN(6) {
		switch rng.IntN(10) {
		case 0, 1, 2, 3, 4:
			for j := range 1 + rng.IntN(20) {
				if err := tx.Set(s.key(rng, i*20+j), s.val(rng)); err != nil {
					t.Fatal(err)
				}
			}
		case 5, 6, 7:
			var c Cursor
			if !c.Seek(tx, s.key(rng, rng.IntN(i*20+1))) {
				continue
			}
			for range rng.IntN(30) {
				key := bytes.Clone(c.Key())
				if err := tx.Delete(key); err != nil {
					t.Fatal(err)
				}
				if !c.Seek(tx, key) {
					break
				}
			}
		case 8:
			if err := tx.PutTable(rng.IntN(3*PageSize-64), randomBytes(rng, 1+rng.IntN(64))); err != nil {
				t.Fatal(err)
			}
		case 9:
			if err := tx.PutState(rng.IntN(2000), randomBytes(rng, 1+rng.IntN(32))); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestRedoEqualsCommit: the redo of a transaction does to one region what its
// Commit does to another, byte for byte.
func TestRedoEqualsCommit(t *testing.T) {
	for _, s := range shapes {
		t.Run(s.name, func(t *testing.T) {
			a, _ := newRegion(t, 6<<20)
			b, _ := newRegion(t, 6<<20)
			rng := rand.New(rand.NewPCG(5, 6))
			var redo []byte
			for i := range scale(600) {
				tx := a.Begin()
				change(t, tx, s, rng, i)
				redo = tx.AppendRedo(redo[:0])
				if i%7 == 0 {
					tx.Reset()
					if got := a.Begin().AppendRedo(nil); len(got) != 0 {
						t.Fatalf("an empty transaction has %d bytes of redo", len(got))
					}
					continue
				}
				tx.Commit()
				if err := b.ApplyRedo(redo); err != nil {
					t.Fatal(err)
				}
				if i%20 == 0 {
					sameRegion(t, "redo", b, a)
				}
			}
			sameRegion(t, "redo", b, a)
			mustCheck(t, b)
			// The other region goes on from there as if it had done it itself.
			for i := range 50 {
				tx := b.Begin()
				change(t, tx, s, rng, 600+i)
				tx.Commit()
			}
			mustCheck(t, b)
		})
	}
}

// TestRedoSize pins the redo of the usual changes, in bytes.
func TestRedoSize(t *testing.T) {
	r, _ := newRegion(t, 8<<20)
	rng := rand.New(rand.NewPCG(1, 1))
	size := func(fn func(tx *Tx)) int {
		tx := r.Begin()
		fn(tx)
		n := len(tx.AppendRedo(nil))
		tx.Commit()
		return n
	}
	val := randomBytes(rng, 40)
	total := 0
	for i := range 5000 {
		total += size(func(tx *Tx) {
			if err := tx.Set(composite(1, rng.Uint64(), uint64(i)), val); err != nil {
				t.Fatal(err)
			}
		})
	}
	if got := total / 5000; got < 62 || got > 190 {
		t.Errorf("an insert of 59 bytes makes %d bytes of redo on average", got)
	}
	key := composite(2, 1, 1)
	size(func(tx *Tx) { tx.Set(key, val) })
	val[20] ^= 1
	if got := size(func(tx *Tx) { tx.Set(key, val) }); got > 8 {
		t.Errorf("a change of one byte makes %d bytes of redo", got)
	}
	if got := size(func(tx *Tx) { tx.Set(key, val) }); got != 0 {
		t.Errorf("a change of nothing makes %d bytes of redo", got)
	}
}

// TestRedoRefused lists redo that breaks a rule; it must change nothing.
func TestRedoRefused(t *testing.T) {
	r, _ := newRegion(t, 8<<20)
	ref, _ := newRegion(t, 8<<20)
	good := []byte{5, 3 << 1, 1, 'x'} // page 5, offset 3, one byte
	bad := map[string][]byte{
		"page delta 0 later":   {5, 6, 1, 'x', 0, 6, 1, 'x'},
		"first page 0":         {0, 6, 1, 'x'},
		"header slot":          {1, 6, 1, 'x'},
		"intent page":          {2, 6, 1, 'x'},
		"sum page":             {8, 6, 1, 'x'},
		"last sum page":        {39, 6, 1, 'x'},
		"page beyond":          {0xff, 0xff, 0xff, 0x7f, 6, 1, 'x'},
		"page overflow":        {5, 6, 1, 'x', 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 6, 1, 'x'},
		"good, then cut":       {5, 6, 1, 'x', 1, 6},
		"no range":             {5},
		"no length":            {5, 6},
		"length 0":             {5, 6, 0},
		"bytes missing":        {5, 6, 2, 'x'},
		"beyond the page":      {5, 0xfe, 0x3f, 2, 'x', 'x'},
		"offset beyond":        {5, 0x82, 0x40, 1, 'x'},
		"touching ranges":      {5, 7, 1, 'x', 0, 1, 'x'},
		"range promised":       {5, 7, 1, 'x'},
		"long form of a page":  {0x85, 0, 6, 1, 'x'},
		"long form of a range": {5, 0x86, 0, 1, 'x'},
	}
	for name, redo := range bad {
		if err := r.ApplyRedo(redo); !errors.Is(err, sealfs.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	sameRegion(t, "refused redo", r, ref)
	if err := r.ApplyRedo(good); err != nil {
		t.Fatal(err)
	}
	if p, _ := r.Page(5); p[3] != 'x' {
		t.Error("good redo did nothing")
	}
}

// TestRedoGrows: replay may come to pages that the file has not yet.
func TestRedoGrows(t *testing.T) {
	b := newFile(t, 1<<20, 0)
	r := open(t, b, Options{GrowBytes: 1 << 20, MaxBytes: 8 << 20})
	redo := []byte{0x80, 0x08, 0, 1, 'x'} // page 1024, offset 0
	if err := r.ApplyRedo(redo); err != nil {
		t.Fatal(err)
	}
	if p, err := r.Page(1024); err != nil || p[0] != 'x' {
		t.Fatalf("page 1024: %v", err)
	}
	if got := r.Usage().Pages * PageSize; got != 5<<20 || b.Size() != 5<<20 {
		t.Errorf("the region has %d bytes, the file %d, want whole steps", got, b.Size())
	}
	if err := r.ApplyRedo([]byte{0x80, 0x10, 0, 1, 'x'}); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("redo beyond the largest size: %v", err)
	}
}

// newFile returns a formatted region file of at most size bytes.
func newFile(t testing.TB, size, table int64) Backing {
	t.Helper()
	b, err := OpenFile(filepath.Join(t.TempDir(), "region"), true)
	if err != nil {
		t.Fatal(err)
	}
	if err := Format(b, Geometry{Store: sealfs.UUID{1}, TableBytes: table, MaxBytes: size}); err != nil {
		t.Fatal(err)
	}
	return b
}

// FuzzApplyRedo: arbitrary redo is refused, or applied like any other.
func FuzzApplyRedo(f *testing.F) {
	r, _ := newRegion(f, 1<<20)
	rng := rand.New(rand.NewPCG(5, 6))
	for i := range 8 {
		tx := r.Begin()
		change(f, tx, shapes[i%len(shapes)], rng, i)
		f.Add(tx.AppendRedo(nil))
	}
	f.Add([]byte{5, 7, 1, 'x', 2, 1, 'x'})
	f.Fuzz(func(t *testing.T, redo []byte) {
		r, _ := newRegion(t, 1<<20)
		if err := r.ApplyRedo(redo); err != nil {
			if !errors.Is(err, sealfs.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		var c Cursor
		for ok := c.Seek(r, nil); ok; ok = c.Next() {
		}
		if err := r.Check(func(string) {}); err != nil {
			t.Fatal(err)
		}
	})
}
