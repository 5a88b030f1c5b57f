package pmem

import (
	"fmt"

	"sealfs"
	"sealfs/pmem/layout"
)

// groupRange returns the tree's part [lo, hi) of group g, as page numbers in
// the group, in a region of pages pages.
func groupRange(g, pages, tablePages uint64) (lo, hi int) {
	return int(layout.Reserved(g, tablePages)), int(min(pages-g*layout.GroupPages, layout.GroupPages))
}

// reservedPages is how many of a region's pages are not the tree's.
func reservedPages(pages, tablePages uint64) uint64 {
	n := layout.Reserved(0, tablePages) + (max(pages/layout.GroupPages, 1)-1)*layout.Reserved(1, tablePages)
	if pages > layout.GroupPages { // the last group may end within them
		n += min(pages%layout.GroupPages, layout.Reserved(1, tablePages))
	}
	return n
}

// free returns how many pages the transaction can still allocate.
func (t *Tx) free() int { return t.r.freePages() - t.taken }

// allocPage takes the lowest free page from the hint on, and makes it an empty
// tree page of level. Without any it fails with ErrNoSpace and changes nothing.
func (t *Tx) allocPage(level int) (*overlay, error) {
	pages := t.r.pages.Load()
	for g := uint64(t.hint) / layout.GroupPages; g*layout.GroupPages < pages; g++ {
		lo, hi := groupRange(g, pages, t.r.tablePages)
		if int(t.r.used[g].Load())-t.freed >= hi-lo {
			continue // full, whatever this transaction has freed
		}
		bits, err := t.bitmapOf(g)
		if err != nil {
			return nil, err
		}
		bit := bits.NextClear(max(lo, int(int64(t.hint)-int64(g*layout.GroupPages))), hi)
		// A free page that has rotted is stepped over: redo builds on its bytes.
		for bit >= 0 && t.rotten(PageNo(g*layout.GroupPages+uint64(bit))) {
			bit = bits.NextClear(bit+1, hi)
		}
		if bit < 0 {
			continue
		}
		n := PageNo(g*layout.GroupPages + uint64(bit))
		if err := t.flip(n); err != nil {
			return nil, err
		}
		t.hint = n + 1
		t.taken++
		o, err := t.edit(n)
		if err != nil {
			return nil, err
		}
		if o.nr > 0 || t.onPath(n) {
			return nil, corrupt(t, n, "page is in use and free")
		}
		o.format(level)
		return o, t.add(layout.RootPagesOff, 1)
	}
	if t.hint > 0 {
		t.hint = 0
		return t.allocPage(level)
	}
	return nil, fmt.Errorf("region %s: %w", t.r.name, sealfs.ErrNoSpace)
}

// rotten reports whether the page is known not to fit its sum.
func (t *Tx) rotten(n PageNo) bool {
	_, err := t.Page(n)
	return err != nil && isCorrupt(err)
}

// onPath reports whether the last descent went through page n.
func (t *Tx) onPath(n PageNo) bool {
	for _, s := range t.path[:t.depth+1] {
		if s.no == n {
			return true
		}
	}
	return false
}

// flip inverts the page's bit.
func (t *Tx) flip(n PageNo) error {
	g := uint64(n) / layout.GroupPages
	o, err := t.edit(PageNo(layout.BitmapPage(g, t.r.tablePages)))
	if err != nil {
		return err
	}
	bit := int(uint64(n) % layout.GroupPages)
	o.buf[bit>>3] ^= 1 << (bit & 7)
	o.mark(bit>>3, bit>>3+1)
	return nil
}

// freePage gives a tree page back. Its bytes are as they were before the
// transaction, so that none of them is redone.
func (t *Tx) freePage(n PageNo) error {
	g := uint64(n) / layout.GroupPages
	bit := int(uint64(n) % layout.GroupPages)
	if bit < int(layout.Reserved(g, t.r.tablePages)) || uint64(n) >= t.r.pages.Load() {
		return corrupt(t, n, "page that is not the tree's is to be freed")
	}
	bits, err := t.bitmapOf(g)
	if err != nil {
		return err
	}
	if !bits.Get(bit) {
		return corrupt(t, n, "page is freed twice")
	}
	if err := t.flip(n); err != nil {
		return err
	}
	if o, _ := t.find(n); o != nil {
		old, err := t.r.Page(n)
		if err != nil {
			return err
		}
		copy(o.buf[:], old)
		o.nr = 0
	}
	t.taken--
	t.freed++
	t.hint = min(t.hint, n)
	return t.add(layout.RootPagesOff, -1)
}
