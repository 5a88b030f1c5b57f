package pmem

import (
	"bytes"
	"errors"
	"strings"
	"sync"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/pmem/layout"
)

// faults runs VerifyAll.
func faults(t testing.TB, r *Region, latch ...sync.Locker) (bad []*sealfs.Corruption) {
	t.Helper()
	latch = append(latch, new(sync.Mutex))
	read := uint64(0)
	err := r.VerifyAll(latch[0], func(n int) error { read += uint64(n); return nil }, func(c *sealfs.Corruption) { bad = append(bad, c) })
	if err != nil {
		t.Error(err)
	}
	if read < r.pages.Load()*PageSize && !r.sums.off && len(latch) == 1 {
		t.Errorf("only %d bytes were read", read)
	}
	return bad
}

// verified fails the test if anything on the medium does not fit its sum.
func verified(t testing.TB, r *Region, latch ...sync.Locker) {
	t.Helper()
	for _, c := range faults(t, r, latch...) {
		t.Error(c)
	}
}

// closed returns a region as a closed store leaves it, in which pages were freed
// and the last ones never written, and its log's end.
func closed(t *testing.T, o Geometry) (*history, *disk.Sim) {
	t.Helper()
	h := newHistory(t, shapes[1], 5)
	if o.NoSums {
		o.Store, o.TableBytes = sealfs.UUID{1}, 3*PageSize
		if err := Format(NewMemory(h.dev), o); err != nil {
			t.Fatal(err)
		}
		h.r = open(t, NewMemory(h.dev), Options{})
	}
	for range 40 {
		h.step()
		h.step()
		h.checkpoint()
	}
	tx := h.r.Begin() // so that there are free pages that were written
	var c Cursor
	for i := 0; c.Seek(tx, nil) && i < 500; i++ {
		if err := tx.Delete(bytes.Clone(c.Key())); err != nil {
			t.Fatal(err)
		}
	}
	tx.Commit()
	h.finish(h.r, len(h.log))
	if u := h.r.Usage(); u.Used < 10 || u.Free < 20 {
		t.Fatalf("%+v", u)
	}
	return h, h.dev.CrashClone(nil)
}

// TestRottenBit: a bit that flips in any page of a closed region is found, and
// the page named; all others can be used.
func TestRottenBit(t *testing.T) {
	h, dev := closed(t, Geometry{})
	table := h.r.tablePages
	rng := newRand(3)
	bitmap := layout.BitmapPage(0, table)
	for n := range h.r.pages.Load() {
		off := int64(n)*PageSize + int64(rng.IntN(PageSize))
		if n == layout.IntentPage {
			off = int64(n)*PageSize + int64(rng.IntN(layout.PageSize/2)) // not only in its padding
		}
		d := dev.Clone()
		d.FlipBit(off, uint(rng.IntN(8)))
		r := open(t, NewMemory(d), Options{})
		want := n // the page that is named
		fixed := n < layout.RootPage
		if !layout.HasSum(n, table) && !fixed { // a sum page
			want = (n-bitmap-1)*layout.SumsPerPage + uint64(off%PageSize/layout.SumBytes)
		}
		alone := want >= h.r.pages.Load() || !layout.HasSum(want, table) // a sum without a page
		bad := faults(t, r)
		if len(bad) != 1 {
			t.Fatalf("page %d: %v", n, bad)
		}
		if at := uint64(bad[0].Off) / PageSize; at != want && !(alone && at == n) || bad[0].Where != "region" {
			t.Fatalf("page %d: %v", n, bad[0])
		}
		_, err := r.Recovered()
		if want == layout.RootPage || want >= layout.TablePage && want <= bitmap {
			if !errors.Is(err, sealfs.ErrCorrupt) || !strings.Contains(err.Error(), "--rebuild-region") {
				t.Fatalf("page %d: %v", n, err)
			}
		} else if err != nil {
			t.Fatalf("page %d: %v", n, err)
		}
		for m := range r.pages.Load() {
			_, err := r.Page(PageNo(m))
			var c *sealfs.Corruption
			switch {
			case m != want || fixed || alone:
				if err != nil {
					t.Fatalf("page %d has rotted, and %d cannot be used: %v", n, m, err)
				}
			case !errors.As(err, &c) || c.Off != int64(m)*PageSize || c.Where != "region":
				t.Fatalf("page %d has rotted: %v", n, err)
			}
		}
		r.Close()
	}
	r := open(t, NewMemory(dev.Clone()), Options{})
	verified(t, r)
	mustCheck(t, r)
}

// TestMisplacedPage: a page at another's place does not fit the sum there, nor
// does another store's.
func TestMisplacedPage(t *testing.T) {
	h, dev := closed(t, Geometry{})
	first := int64(layout.Reserved(0, h.r.tablePages))
	d := dev.Clone()
	p := make([]byte, PageSize)
	d.ReadAt(p, first*PageSize)
	d.Overwrite((first+1)*PageSize, p)
	var sum [layout.SumBytes]byte // its sum goes with it
	at, off := layout.SumPage(uint64(first), h.r.tablePages)
	d.ReadAt(sum[:], int64(at)*PageSize+int64(off))
	d.Overwrite(int64(at)*PageSize+int64(off)+layout.SumBytes, sum[:])
	r := open(t, NewMemory(d), Options{})
	if bad := faults(t, r); len(bad) != 1 || bad[0].Off != (first+1)*PageSize {
		t.Errorf("%v", bad)
	}
	if layout.SumSeed(sealfs.UUID{1}) == layout.SumSeed(sealfs.UUID{2}) {
		t.Error("the sums of two stores have the same seed")
	}
}

// TestRottenTx: a transaction that meets a rotten page fails, and nothing has
// happened; others go on, and free pages that have rotted are not used.
func TestRottenTx(t *testing.T) {
	h, dev := closed(t, Geometry{})
	rootNo, _ := treeRoot(h.r)
	root, err := load(h.r, rootNo, -1)
	if err != nil || root.level() != 1 || root.count() < 4 {
		t.Fatalf("the tree is too small: %v", err)
	}
	lost, _ := root.child(1)
	leaf, err := load(h.r, lost, 0)
	if err != nil {
		t.Fatal(err)
	}
	key, _, _ := leaf.cell(leaf.count() / 2)
	first, _, _ := leaf.cell(0)
	dev.FlipBit(int64(lost)*PageSize+2000, 2)
	// The free pages that were written, but for one.
	free, spared := []PageNo{}, PageNo(0)
	bits, _ := h.r.tx.bitmapOf(0)
	for n := layout.Reserved(0, h.r.tablePages); n < h.r.pages.Load(); n++ {
		if p, _ := h.r.Page(PageNo(n)); !bits.Get(int(n)) && !bytes.Equal(p, make([]byte, PageSize)) {
			free = append(free, PageNo(n))
		}
	}
	if len(free) < 3 {
		t.Fatalf("%d free pages", len(free))
	}
	for i, n := range free {
		if i == 1 {
			spared = n
			continue
		}
		dev.FlipBit(int64(n)*PageSize, 2)
	}
	r := open(t, NewMemory(dev), Options{})
	if _, err := r.Recovered(); err != nil {
		t.Fatal(err)
	}
	if _, err := Get(r, key); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("Get of what has rotted: %v", err)
	}
	n := 0
	var c Cursor
	for ok := c.Seek(r, nil); ok; ok = c.Next() {
		n++
	}
	if err := c.Err(); !errors.Is(err, sealfs.ErrCorrupt) || n == 0 {
		t.Errorf("a walk over what has rotted ends after %d keys with %v", n, err)
	}
	for _, set := range []bool{true, false} {
		tx := r.Begin()
		if err := tx.Set(composite(0, 0, 0), []byte("before it")); err != nil {
			t.Fatal(err)
		}
		if set {
			err = tx.Set(key, []byte("new"))
		} else {
			err = tx.Delete(key)
		}
		if !errors.Is(err, sealfs.ErrCorrupt) {
			t.Errorf("change of what has rotted: %v", err)
		}
		tx.Reset()
	}
	if _, err := Get(r, composite(0, 0, 0)); err != sealfs.ErrNotExist {
		t.Errorf("a transaction that failed has left something: %v", err)
	}
	used := r.Usage().Used
	for i := uint64(0); r.Usage().Used < used+3; i++ {
		tx := r.Begin()
		if err := tx.Set(composite(0, 0, i), make([]byte, 900)); err != nil {
			t.Fatal(err)
		}
		tx.Commit()
	}
	bits, _ = r.Begin().bitmapOf(0)
	for _, n := range free {
		if bits.Get(int(n)) != (n == spared) {
			t.Errorf("free page %d: taken %v", n, bits.Get(int(n)))
		}
	}
	if bytes.Compare(first, key) > 0 {
		t.Error("the leaf is not sorted: the test tests nothing")
	}
}

// TestRottenRedo: a page that has rotted and that redo should change is given
// up, once and for all: also when its bytes come back, and when the power fails
// in the checkpoint that follows. No cut makes it look torn.
func TestRottenRedo(t *testing.T) {
	h, dev := closed(t, Geometry{})
	start := len(h.log)
	rootNo, _ := treeRoot(h.r)
	root, _ := load(h.r, rootNo, -1)
	lost, _ := root.child(1)
	leaf, _ := load(h.r, lost, 0)
	key, val, _ := leaf.cell(0)
	key = bytes.Clone(key)
	tx := h.r.Begin()
	if err := tx.Set(key, make([]byte, len(val))); err != nil {
		t.Fatal(err)
	}
	other := composite(9, 9, 9)
	if err := tx.Set(other, []byte("elsewhere")); err != nil {
		t.Fatal(err)
	}
	redo := tx.AppendRedo(nil)
	tx.Commit()

	refused := func(what string, d *disk.Sim, applied bool) *Region {
		t.Helper()
		r := open(t, NewMemory(d), Options{})
		if !applied || r.header.Start == sealfs.LSN(start) {
			if err := r.ApplyRedo(redo); err != nil {
				t.Fatal(err)
			}
		}
		rotten, err := r.Recovered()
		if err != nil || len(rotten) > 1 || len(rotten) == 1 && rotten[0] != lost {
			t.Fatalf("%s: %v, %v", what, rotten, err)
		}
		if _, err := Get(r, key); !errors.Is(err, sealfs.ErrCorrupt) || !strings.Contains(err.Error(), "region") {
			t.Fatalf("%s: Get of what has rotted: %v", what, err)
		}
		if v, err := Get(r, other); err != nil || string(v) != "elsewhere" {
			t.Fatalf("%s: %q, %v", what, v, err)
		}
		return r
	}
	dev.FlipBit(int64(lost)*PageSize+3000, 2)
	cuts := dev.Clone()
	states := 0
	cuts.SetHook(func(disk.Op) {
		for d := range cuts.CrashStates(h.rng, 20) {
			states++
			r := refused("after a cut", d, true)
			h.finish(r, start+1)
			r = refused("after a cut and a checkpoint", d.CrashClone(nil), true)
			r.Close()
		}
	})
	h.finish(refused("first", cuts, false), start+1)
	cuts.SetHook(nil)
	if states < 30 {
		t.Errorf("only %d crash states were tried", states)
	}
	// The bytes come back: they lack the redo.
	cuts.FlipBit(int64(lost)*PageSize+3000, 2)
	r := refused("the bytes are back", cuts.Reopen(), true)
	if bad := faults(t, r); len(bad) != 1 || bad[0].Off != int64(lost)*PageSize || !strings.Contains(bad[0].What, "given up") {
		t.Errorf("%v", bad)
	}
	// Redo that comes later than recovery must not build on it either.
	if err := r.ApplyRedo(redo); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("redo for a page that was given up: %v", err)
	}
}

// TestRottenBeside: while pages may be torn, those that redo does not touch may
// not.
func TestRottenBeside(t *testing.T) {
	h, dev := closed(t, Geometry{})
	leafNo := func(i int) PageNo {
		rootNo, _ := treeRoot(h.r)
		root, _ := load(h.r, rootNo, -1)
		n, _ := root.child(i)
		return n
	}
	dev.Overwrite(layout.IntentPage*PageSize, layout.EncodeIntent(sealfs.UUID{1}, h.r.header.Update+1))
	beside, torn := leafNo(0), leafNo(2)
	dev.FlipBit(int64(beside)*PageSize+3000, 2)
	page, _ := h.r.Page(torn)
	redo := []byte{byte(torn), 0, 0x80, 0x20} // all of its bytes
	redo = append(redo, page...)
	dev.Overwrite(int64(torn)*PageSize+512, make([]byte, 1024))
	r := open(t, NewMemory(dev), Options{})
	if err := r.ApplyRedo(redo); err != nil {
		t.Fatal(err)
	}
	if rotten, err := r.Recovered(); err != nil || len(rotten) != 0 {
		t.Fatalf("%v, %v", rotten, err)
	}
	if p, err := r.Page(torn); err != nil || !bytes.Equal(p, page) {
		t.Errorf("a torn page is not healed: %v", err)
	}
	if _, err := r.Page(beside); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("a page that nothing was writing: %v", err)
	}
}

// TestTrimVerifies: what was dropped from memory is compared again when it comes
// back.
func TestTrimVerifies(t *testing.T) {
	for _, kind := range []string{"memory", "file"} {
		t.Run(kind, func(t *testing.T) {
			b := NewMemory(disk.NewSim("region", 4<<20))
			if kind == "file" {
				b = newFile(t, 4<<20, 0)
			} else if err := Format(b, Geometry{}); err != nil {
				t.Fatal(err)
			}
			r := open(t, b, Options{BudgetBytes: 1})
			for i := range uint64(2000) {
				tx := r.Begin()
				if err := tx.Set(composite(1, mix(i), 0), make([]byte, 100)); err != nil {
					t.Fatal(err)
				}
				tx.Commit()
			}
			h := &history{t: t}
			h.finish(r, 1)
			for r.Usage().Private > 0 {
				if err := r.Trim(); err != nil {
					t.Fatal(err)
				}
			}
			verified(t, r)
			mustCheck(t, r)
			// All pages are verified, and none is private: only what is dropped from
			// here on may be found.
			n := PageNo(layout.Reserved(0, r.tablePages)) + 3
			p := bytes.Clone(r.raw(n))
			p[100] ^= 1
			if err := writeFull(b, p, uint64(n)); err != nil {
				t.Fatal(err)
			}
			if bad := faults(t, r); len(bad) != 1 || bad[0].Off != int64(n)*PageSize {
				t.Errorf("%v", bad)
			}
			r.markDirty(n)
			if bad := faults(t, r); len(bad) != 0 {
				t.Errorf("a page that will be written is blamed: %v", bad)
			}
			clear(r.windows[0].dirty[r.set])
			for range 10 {
				if err := r.Trim(); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := r.Page(n); !errors.Is(err, sealfs.ErrCorrupt) {
				t.Errorf("a page that rotted while it was not in memory: %v", err)
			}
		})
	}
}

// TestVerifyWhileWriting looks at everything between the writes of a checkpoint,
// when pages are there and their sums are not: nothing is blamed.
func TestVerifyWhileWriting(t *testing.T) {
	h, _ := closed(t, Geometry{})
	for range 10 {
		h.step()
	}
	looks := 0
	h.dev.SetHook(func(op disk.Op) {
		if op.Kind == disk.OpWrite && op.Off >= layout.RootPage*PageSize { // else a lock is held
			looks++
			verified(t, h.r)
		}
	})
	h.finish(h.r, len(h.log))
	h.dev.SetHook(nil)
	if looks < 10 {
		t.Errorf("only %d looks", looks)
	}
}

// TestNoSums: a region without sums works, finds nothing, and writes none.
func TestNoSums(t *testing.T) {
	h, dev := closed(t, Geometry{NoSums: true})
	dev.FlipBit(int64(layout.Reserved(0, h.r.tablePages)+1)*PageSize+2000, 1)
	r := open(t, NewMemory(dev), Options{})
	if r.header.Incompat != layout.FeatureNoSums {
		t.Errorf("features %#x", r.header.Incompat)
	}
	if rotten, err := r.Recovered(); err != nil || rotten != nil {
		t.Errorf("%v, %v", rotten, err)
	}
	for n := range r.pages.Load() {
		p, err := r.Page(PageNo(n))
		if err != nil {
			t.Fatal(err)
		}
		if n >= 2 && !layout.HasSum(n, r.tablePages) && !bytes.Equal(p, make([]byte, PageSize)) {
			t.Errorf("page %d is not zeros", n)
		}
	}
	if bad := faults(t, r); len(bad) != 0 {
		t.Errorf("%v", bad)
	}
}

// TestSumPageFails: an error of the medium on a sum page is an error of the page,
// not a judgement, and passes.
func TestSumPageFails(t *testing.T) {
	h, dev := closed(t, Geometry{})
	n := PageNo(layout.Reserved(0, h.r.tablePages))
	r := open(t, NewMemory(dev), Options{})
	dev.Fail(disk.Fault{Kind: disk.ReadError, Once: true})
	if _, err := r.Page(n); !errors.Is(err, sealfs.ErrIO) || errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("%v", err)
	}
	if _, err := r.Page(n); err != nil {
		t.Error(err)
	}
	dev.Fail(disk.Fault{Kind: disk.ReadError, Once: true})
	if err := r.VerifyAll(new(sync.Mutex), func(int) error { return nil }, func(*sealfs.Corruption) {}); !errors.Is(err, sealfs.ErrIO) {
		t.Errorf("VerifyAll: %v", err)
	}
	if err := r.VerifyAll(new(sync.Mutex), func(int) error { return sealfs.ErrInterrupted }, func(*sealfs.Corruption) {}); err != sealfs.ErrInterrupted {
		t.Errorf("VerifyAll that is to stop: %v", err)
	}
}

// TestSumsOfGroups: growth over groups, and a region that ends within the first
// pages of one, where its sums have no room.
func TestSumsOfGroups(t *testing.T) {
	const pages = layout.GroupPages
	for _, extra := range []int64{0, 1, 2, 20, 33, 34, 40} {
		b := newFile(t, 1<<20, 0)
		r := open(t, b, Options{GrowBytes: PageSize, MaxBytes: (pages + extra) * PageSize})
		if err := r.growTo((pages + extra) * PageSize); err != nil {
			t.Fatal(err)
		}
		want := int64(pages - int64(layout.Reserved(0, 0)) - 1 + max(extra-33, 0))
		if u := r.Usage(); int64(u.Free) != want || int64(u.Free+u.Used+u.Reserved) != pages+extra {
			t.Errorf("%d pages in the second group: %+v, want %d free", extra, u, want)
		}
		r.hint = pages - 2
		for i := range uint64(200) {
			tx := r.Begin()
			if err := tx.Set(composite(1, mix(i), 0), make([]byte, 900)); err != nil {
				t.Fatal(err)
			}
			tx.Commit()
		}
		if got := int64(r.used[1%len(r.used)].Load()); extra > 33 && got != extra-33 {
			t.Errorf("%d pages in the second group: %d used", extra, got)
		}
		mustCheck(t, r)
		h := &history{t: t}
		h.finish(r, 1)
		verified(t, r)
		if _, err := r.Recovered(); err != nil {
			t.Error(err)
		}
	}
}

// BenchmarkVerify is the first look at a page, which compares it with its sum.
func BenchmarkVerify(b *testing.B) {
	r, _ := fill(b, 1e5)
	(&history{t: new(testing.T)}).finish(r, 1)
	first := PageNo(layout.Reserved(0, r.tablePages))
	used := PageNo(r.Usage().Used)
	n := PageNo(0)
	b.ReportAllocs()
	b.SetBytes(PageSize)
	for b.Loop() {
		if err := r.verify(first + n%used); err != nil {
			b.Fatal(err)
		}
		n++
	}
}
