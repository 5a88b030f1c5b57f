package pmem

import (
	"fmt"
	"io"

	"sealfs"
	"sealfs/pmem/layout"
)

// Version is the format of the regions that this program writes and reads.
const Version = layout.Version

// FeaturesOfMedium are the incompatible features of a header that say something
// of the medium, not of the pages: a copy of the pages serves without them.
const FeaturesOfMedium uint64 = layout.FeatureNoSums | layout.FeatureDax

// Header returns what the newest header says of the region itself: store, size
// of the table, version, features. Its start is not kept up to date.
func (r *Region) Header() Header { return r.header }

// content reports whether a copy of the region needs page n.
func (r *Region) content(n PageNo) bool { return layout.HasSum(uint64(n), r.tablePages) }

// FarCopy names the pages that have changed since the FarCopy before, or all, so
// that somebody can keep copies of them elsewhere. It is apart from checkpoints:
// both may be under way at once. A page that changes while one is under way is
// in the next one, whether it has been copied by then or not.
//
// One goroutine at a time may use it, and for some methods it needs the latch.
type FarCopy struct {
	r         *Region
	set       int
	all       bool   // every page, not just those of the set
	next, end PageNo // Copy goes on at next
	left      int    // pages of the set
}

// BeginFar begins a copy of the pages that changed since the last one began; of
// all pages if that is not known: then those of zeros come, too. The copy before
// must have ended. REQUIRES: exclusive latch.
func (r *Region) BeginFar(all bool) *FarCopy {
	c := &FarCopy{r: r, set: r.farSet, all: all, end: PageNo(r.pages.Load()), left: r.farDirt}
	r.farSet, r.farDirt = 1-r.farSet, 0
	return c
}

// Pages returns the size of the region when the copy began, in pages.
func (c *FarCopy) Pages() uint64 { return uint64(c.end) }

// Left returns how many pages are still to be copied, at most.
func (c *FarCopy) Left() int {
	if c.all {
		return int(c.end-c.next) + c.left
	}
	return c.left
}

// Add makes Copy return page n once more, which it may have returned already.
func (c *FarCopy) Add(n PageNo) {
	if n >= c.end {
		return
	}
	w, i := c.r.windows[n>>c.r.shift], int(n&(1<<c.r.shift-1))
	if w.far[c.set].Get(i) {
		return
	}
	w.far[c.set].Set(i)
	c.left++
	if !c.all { // else the set is looked through at the end
		c.next = min(c.next, n)
	}
}

// Warm reads from the medium what Copy is about to look at, so that Copy does
// not wait for it with the latch held. b is scratch. No latch is needed.
func (c *FarCopy) Warm(b []byte) error {
	if !c.all {
		return nil
	}
	if _, err := c.r.b.ReadAt(b, int64(c.next)*PageSize); err != nil && err != io.EOF {
		return err
	}
	return nil
}

// Copy copies the next pages to b, as many as fit, and appends their numbers to
// nos. It returns none when all have been copied. A page that cannot be read ends
// it with that error. REQUIRES: latch, shared.
func (c *FarCopy) Copy(b []byte, nos []PageNo) ([]PageNo, error) {
	most := len(b) / PageSize
	for len(nos) < most {
		if c.next >= c.end {
			if !c.all {
				break
			}
			c.all, c.next = false, 0 // now those that were added
			continue
		}
		w, base := c.r.windows[c.next>>c.r.shift], c.next>>c.r.shift<<c.r.shift
		i := int(c.next - base)
		if !c.all {
			limit := int(min(c.end-base, 1<<c.r.shift))
			if i = w.far[c.set].NextSet(i, limit); i < 0 {
				c.next = base + PageNo(limit)
				continue
			}
		}
		n := base + PageNo(i)
		if c.r.content(n) {
			p, err := c.r.Page(n)
			if err != nil {
				return nos, err
			}
			copy(b[len(nos)*PageSize:], p)
			nos = append(nos, n)
		}
		if w.far[c.set].Get(i) {
			w.far[c.set].Clear(i)
			c.left--
		}
		c.next = n + 1
	}
	return nos, nil
}

// MarkFar makes page n part of the next FarCopy, as if it had changed.
// REQUIRES: exclusive latch.
func (r *Region) MarkFar(n PageNo) {
	if uint64(n) >= r.pages.Load() {
		return
	}
	w, i := r.windows[n>>r.shift], int(n&(1<<r.shift-1))
	if !w.far[r.farSet].Get(i) {
		w.far[r.farSet].Set(i)
		r.farDirt++
	}
}

// End ends the copy. What it has not returned is in the next one. If it was to
// return all pages and has not, the next one must be told to do so, too.
// REQUIRES: exclusive latch.
func (c *FarCopy) End() {
	for _, w := range c.r.mapped() {
		if c.left == 0 {
			break
		}
		for i := w.far[c.set].NextSet(0, 1<<c.r.shift); i >= 0; i = w.far[c.set].NextSet(i+1, 1<<c.r.shift) {
			w.far[c.set].Clear(i)
			c.left--
			if cur := w.far[c.r.farSet]; !cur.Get(i) {
				cur.Set(i)
				c.r.farDirt++
			}
		}
	}
}

// Restore makes page n what a copy of it says, and the region large enough to
// have it. Pages that are not content are left alone. It may block on the medium.
// REQUIRES: exclusive latch, no transaction under way.
func (r *Region) Restore(n PageNo, b []byte) error {
	if len(b) != PageSize {
		return fmt.Errorf("page %d of region %s restored from %d bytes: %w", n, r.name, len(b), sealfs.ErrInvalid)
	}
	if !r.content(n) {
		return nil
	}
	if err := r.Extend(uint64(n) + 1); err != nil {
		return err
	}
	p, err := r.Page(n)
	if err != nil {
		return err
	}
	r.replay(n, p, 0, b)
	r.markDirty(n)
	r.hint = 0
	return nil
}

// Extend makes the region at least pages pages large. No latch is needed; it may
// block on the medium.
func (r *Region) Extend(pages uint64) error {
	if pages <= r.pages.Load() {
		return nil
	}
	return r.growTo(int64(pages) * PageSize)
}
