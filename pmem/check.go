package pmem

import (
	"bytes"
	"fmt"

	"sealfs/alloc"
	"sealfs/pmem/layout"
)

// Check examines the committed tree and bitmaps and calls fn for every rule that
// is broken: the order of keys in and between pages, levels, overlapping or lost
// bytes, counts, and that every page is either in the tree or free. A nil error
// says that it got through, not that there was nothing to find. It reads the
// whole region. REQUIRES: latch, shared.
func (r *Region) Check(fn func(problem string)) error { return check(r, r, fn) }

// Check examines the region as the transaction sees it.
func (t *Tx) Check(fn func(problem string)) error { return check(t, t.r, fn) }

type checker struct {
	v           Reader
	fn          func(string)
	limit       PageNo
	seen        alloc.Bitmap
	pages, keys uint64
}

func check(v Reader, r *Region, fn func(string)) error {
	b, err := v.Page(layout.RootPage)
	if err != nil {
		return err
	}
	root, err := layout.DecodeRoot(r.name, b)
	if err != nil {
		fn(err.Error())
		return nil
	}
	pages := r.pages.Load()
	c := &checker{v: v, fn: fn, limit: PageNo(pages), seen: make(alloc.Bitmap, (pages+7)/8)}
	if p, err := load(v, PageNo(root.Tree), -1); err != nil {
		fn(err.Error())
	} else {
		if p.level() > 0 && p.count() < 2 {
			c.problem(PageNo(root.Tree), "the root has fewer than two children")
		}
		c.page(PageNo(root.Tree), p.level(), nil, nil)
	}
	if c.keys != root.Keys {
		c.problem(layout.RootPage, "%d keys are counted, %d are in the tree", root.Keys, c.keys)
	}
	if c.pages != root.Pages {
		c.problem(layout.RootPage, "%d pages are counted, %d are in the tree", root.Pages, c.pages)
	}
	for g := uint64(0); g*layout.GroupPages < pages; g++ {
		at := layout.BitmapPage(g, r.tablePages)
		b, err := v.Page(PageNo(at))
		if err != nil {
			return err
		}
		lo, hi := groupRange(g, pages, r.tablePages)
		bits := alloc.Bitmap(b)
		for i := range layout.GroupPages {
			n := g*layout.GroupPages + uint64(i)
			inTree := n < pages && c.seen.Get(int(n))
			switch {
			case inTree && (i < lo || i >= hi):
				c.problem(PageNo(n), "the page is in the tree and is not the tree's")
			case inTree && !bits.Get(i):
				c.problem(PageNo(n), "the page is in the tree and free")
			case !inTree && bits.Get(i):
				c.problem(PageNo(n), "the page is neither in the tree nor free")
			}
		}
	}
	return nil
}

func (c *checker) problem(n PageNo, format string, args ...any) {
	c.fn(fmt.Sprintf("page %d: ", n) + fmt.Sprintf(format, args...))
}

// page checks a page whose keys lie in [lo, hi), nil for no bound, and all below.
func (c *checker) page(n PageNo, level int, lo, hi []byte) {
	if n >= c.limit {
		c.problem(n, "beyond the region")
		return
	}
	if c.seen.Get(int(n)) {
		c.problem(n, "the page is in the tree twice")
		return
	}
	c.seen.Set(int(n))
	c.pages++
	p, err := load(c.v, n, level)
	if err != nil {
		c.problem(n, "%v", err)
		return
	}
	if p.count() == 0 && (level > 0 || lo != nil || hi != nil) {
		c.problem(n, "the page is empty")
	}
	if p.last() > p.count() {
		c.problem(n, "the last insert was at cell %d of %d", p.last(), p.count())
	}
	if level == 0 {
		c.keys += uint64(p.count())
	}
	var used [PageSize]bool
	live := 0
	var prev []byte
	for i := range p.count() {
		key, val, ok := p.cell(i)
		k, _, e, _ := p.span(i)
		if !ok || k-layout.CellHeader < p.heap() {
			c.problem(n, "cell %d lies outside the heap", i)
			return
		}
		for j := k - layout.CellHeader; j < e; j++ {
			if used[j] {
				c.problem(n, "cell %d overlaps another", i)
				break
			}
			used[j] = true
			live++
		}
		if len(key) > KeyMax || len(val) > ValueMax {
			c.problem(n, "cell %d is too large: %d and %d bytes", i, len(key), len(val))
		}
		if level > 0 && i == 0 {
			if len(key) != 0 {
				c.problem(n, "the first key of an inner page is not empty")
			}
			continue
		}
		switch {
		case len(key) == 0:
			c.problem(n, "cell %d has an empty key", i)
		case prev != nil && bytes.Compare(prev, key) >= 0:
			c.problem(n, "key %x of cell %d is not above the one before", key, i)
		case lo != nil && bytes.Compare(key, lo) < 0:
			c.problem(n, "key %x of cell %d is below the page's range", key, i)
		case hi != nil && bytes.Compare(key, hi) >= 0:
			c.problem(n, "key %x of cell %d is above the page's range", key, i)
		}
		prev = key
	}
	if want := PageSize - p.heap() - live; p.dead() != want {
		c.problem(n, "%d dead bytes are counted, there are %d", p.dead(), want)
	}
	for i := range p.count() {
		if level == 0 {
			break
		}
		kid, ok := p.child(i)
		if !ok {
			c.problem(n, "cell %d has no child", i)
			continue
		}
		from, to := lo, hi
		if i > 0 {
			from, _, _ = p.cell(i)
		}
		if i+1 < p.count() {
			to, _, _ = p.cell(i + 1)
		}
		c.page(kid, level-1, from, to)
	}
}
