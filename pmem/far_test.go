package pmem

import (
	"bytes"
	"testing"
)

// TestFarCopy: copies of pages, made while the region changes, some of them by
// copies that were ended early, and the log from where the last one began give
// the region, on a medium that knew nothing of it.
func TestFarCopy(t *testing.T) {
	for _, s := range shapes[:4] {
		for seed := range uint64(3) {
			h := newHistory(t, s, 100+seed)
			copies := map[PageNo][]byte{}
			known := false // the set has all changes since the copies
			complete := 0
			for range 12 {
				for range h.rng.IntN(60) {
					h.step()
				}
				start, dirty := len(h.log), h.r.Usage().FarDirty
				c := h.r.BeginFar(!known)
				if left := c.Left(); known && left != int(dirty) || h.r.Usage().FarDirty != 0 {
					t.Fatalf("%d pages of %d are left to be copied", left, dirty)
				}
				whole := !known
				known = true
				b := make([]byte, PageSize*(1+h.rng.IntN(5)))
				early, again := h.rng.IntN(3) == 0, false
				for n := 0; ; n++ {
					if err := c.Warm(b); err != nil {
						t.Fatal(err)
					}
					nos, err := c.Copy(b, nil)
					if err != nil {
						t.Fatal(err)
					}
					for i, no := range nos {
						if !h.r.content(no) {
							t.Fatalf("page %d is not content", no)
						}
						copies[no] = bytes.Clone(b[i*PageSize:][:PageSize])
					}
					if len(nos) == 0 && !again {
						again = true
						for no := range copies {
							c.Add(no) // and it comes once more
							delete(copies, no)
							break
						}
						continue
					}
					if len(nos) == 0 || early && n == 3 {
						break
					}
					h.step()
				}
				done := c.Left() == 0
				c.End()
				if !done {
					known = known && !whole
					if !whole && h.r.Usage().FarDirty == 0 {
						t.Fatal("pages that were not copied are forgotten")
					}
					continue
				}
				complete++
				for range h.rng.IntN(20) {
					h.step()
				}
				copied, _ := newRegion(t, h.dev.Size())
				if err := copied.Extend(c.Pages()); err != nil {
					t.Fatal(err)
				}
				for no, p := range copies {
					if err := copied.Restore(no, p); err != nil {
						t.Fatal(err)
					}
				}
				for _, redo := range h.log[start:] {
					if err := copied.ApplyRedo(redo); err != nil {
						t.Fatal(err)
					}
				}
				sameRegion(t, s.name, copied, h.r)
				if a, b := copied.Usage(), h.r.Usage(); a.Used != b.Used || a.Keys != b.Keys {
					t.Fatalf("restored %+v, want %+v", a, b)
				}
			}
			if complete == 0 {
				t.Error("no copy was completed: the test did not reach its point")
			}
		}
	}
}

// TestRestoreRefuses: only whole pages, and the medium's own are left alone.
func TestRestoreRefuses(t *testing.T) {
	r, dev := newRegion(t, 1<<20)
	before := make([]byte, 2*PageSize)
	if _, err := dev.ReadAt(before, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.Restore(9, make([]byte, 100)); err == nil {
		t.Error("a part of a page was restored")
	}
	if err := r.Restore(1<<40, make([]byte, PageSize)); err == nil {
		t.Error("a page beyond all regions was restored")
	}
	if err := r.Restore(0, make([]byte, PageSize)); err != nil || r.Usage().Dirty != 0 {
		t.Errorf("a header was restored: %v", err)
	}
}
