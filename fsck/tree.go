package fsck

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"

	"sealfs/pmem"
	"sealfs/pmem/layout"
)

// leaf is a sound leaf of the tree, in the order of keys.
type leaf struct {
	page  uint64
	cells uint16
	shard uint16 // in whose order its first key stands
}

// tree is pass 4: every page against its sum, the pages of the tree, and the
// bitmaps against it.
func (c *checker) tree() error {
	where := c.reg.Name()
	if err := c.sweep(); err != nil {
		return err
	}
	p, err := c.img.raw(layout.RootPage)
	if err != nil {
		c.problem(RootPage, where, "%v", err)
		return nil
	}
	root, err := layout.DecodeRoot(where, p[:])
	if err != nil {
		c.problem(RootPage, where, "%v", err)
		return nil
	}
	w := c.newWalker()
	if !w.trees(root.Tree) {
		c.problem(RootPage, where, "the tree's root cannot be page %d", root.Tree)
		return nil
	}
	if err := w.all(root.Tree); err != nil {
		return err
	}
	if c.img.fits(layout.RootPage) != nil {
		c.holes = true // it may be the root of a part only
	}
	c.leaves, c.reached, c.broken = w.leaves, w.reached, w.broken
	c.rep.Keys, c.rep.Pages = w.keys, w.pages
	w.mendRotten()
	if !c.holes && (w.keys != root.Keys || w.pages != root.Pages) {
		c.problem(TreeCounts, where, "%d keys and %d pages are counted, %d and %d are there", root.Keys, root.Pages, w.keys, w.pages)
		w.mendCounts()
	}
	return w.bitmaps()
}

// bitmap holds bit i in byte i/8, from the lowest, as a region's bitmap pages do.
type bitmap []byte

func (b bitmap) has(i uint64) bool { return b[i/8]>>(i%8)&1 != 0 }
func (b bitmap) set(i uint64)      { b[i/8] |= 1 << (i % 8) }

// walker is a walk over the tree or a part of it.
type walker struct {
	*sink
	table       uint64 // pages of the segment table
	reached     bitmap
	leaves      []leaf
	broken      []subtree // pages that are damaged
	pages, keys uint64
	offs        []uint32 // of one page's cells: offset << 16 | length
	reader      pageReader
}

func (c *checker) newWalker() *walker {
	return &walker{sink: &sink{c: c}, table: c.hdr.TablePages(), reached: make(bitmap, (c.img.pages+7)/8), reader: c.img.reader()}
}

// subtree is a page of the tree, whose level is level (-1 for the root: any) and whose
// keys lie in [lo, hi), nil being no bound, and everything below it.
type subtree struct {
	page   uint64
	level  int
	lo, hi []byte
}

// treeParts is into how many parts at least the tree is divided to be walked, if it
// is large enough.
const treeParts = 64

// all walks over the tree: the top as it is, what is below in parts.
func (w *walker) all(root uint64) error {
	c := w.c
	todo := []subtree{{root, -1, nil, nil}}
	for len(todo) > 0 && len(todo) < treeParts && todo[0].level != 0 {
		var below []subtree
		for _, t := range todo {
			if err := w.visit(t, func(t subtree) error { below = append(below, t); return nil }); err != nil {
				return err
			}
		}
		todo = below
	}
	seen := map[uint64]bool{}
	todo = slices.DeleteFunc(todo, func(t subtree) bool {
		if seen[t.page] || w.reached.has(t.page) {
			w.fault(TreeTwice, t.page, "reached again")
			return true
		}
		seen[t.page] = true
		return false
	})
	w.flush()
	n := min(workersMax, len(todo))
	parts := make([]*walker, n)
	err := c.share(n, func(i int, s *sink) error {
		p := c.newWalker()
		p.sink, parts[i] = s, p
		for _, t := range todo[len(todo)*i/n : len(todo)*(i+1)/n] {
			if err := p.visit(t, p.walk); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, p := range parts {
		w.join(p)
	}
	w.flush()
	return nil
}

// join adds what a part has found.
func (w *walker) join(p *walker) {
	twice := map[uint64]bool{}
	for i, b := range p.reached {
		for both := b & w.reached[i]; both != 0; both &= both - 1 {
			n := uint64(i)*8 + uint64(bits.TrailingZeros8(both))
			twice[n] = true
			w.fault(TreeTwice, n, "reached again")
		}
		w.reached[i] |= b
	}
	if len(twice) > 0 {
		p.leaves = slices.DeleteFunc(p.leaves, func(l leaf) bool { return twice[l.page] })
	}
	w.leaves = append(w.leaves, p.leaves...)
	w.broken = append(w.broken, p.broken...)
	w.pages += p.pages
	w.keys += p.keys
}

// trees reports whether the tree may own page n.
func (w *walker) trees(n uint64) bool {
	return n < w.c.img.pages && n%layout.GroupPages >= layout.Reserved(n/layout.GroupPages, w.table)
}

func (w *walker) where(n uint64) string { return fmt.Sprintf("%s, page %d", w.c.reg.Name(), n) }

func (w *walker) fault(id ID, n uint64, format string, args ...any) {
	w.problem(w.c, id, w.where(n), format, args...)
	w.mendTree(id, n)
	w.holes = true
}

// walk checks a subtree.
func (w *walker) walk(t subtree) error { return w.visit(t, w.walk) }

// visit checks the page at the top of a subtree, and calls below for what hangs on it.
func (w *walker) visit(t subtree, below func(subtree) error) error {
	c, n := w.c, t.page
	if w.reached.has(n) {
		w.fault(TreeTwice, n, "reached again")
		return nil
	}
	w.reached.set(n)
	w.pages++
	if w.pages%1024 == 0 {
		if err := c.tick(4, int64(w.pages), int64(c.img.pages)); err != nil {
			return err
		}
	}
	get := c.img.page
	if t.level == 0 {
		get = w.reader.page // nobody needs it afterwards
	}
	p, err := get(n)
	if err != nil {
		if c.img.rotten[n] == "" {
			w.fault(TreePage, n, "%v", err)
			return nil
		}
		w.holes = true // it was reported, and is mended with the others that have rotted
		w.broken = append(w.broken, t)
		return nil
	}
	fault := w.shape(p, t.level)
	if fault != "" {
		w.fault(TreePage, n, "%s", fault)
		w.broken = append(w.broken, t)
		return nil
	}
	if fault = order(p, t.lo, t.hi); fault != "" {
		w.fault(TreeOrder, n, "%s", fault)
		c.unordered.Store(true)
	}
	cells := u16(p, layout.TreeCountOff)
	if p[layout.TreeLevelOff] == 0 {
		w.keys += uint64(cells)
		if cells > 0 {
			key, _ := cell(p, 0)
			w.leaves = append(w.leaves, leaf{n, uint16(cells), uint16(shardOf(key))})
		}
		return nil
	}
	for i := range cells {
		_, val := cell(p, i)
		child := uint64(binary.LittleEndian.Uint32(val)) | uint64(binary.LittleEndian.Uint16(val[4:]))<<32
		if !w.trees(child) {
			w.fault(TreeChild, n, "cell %d refers to page %d of %d", i, child, c.img.pages)
			continue
		}
		s := subtree{child, int(p[layout.TreeLevelOff]) - 1, t.lo, t.hi}
		if fault == "" && i > 0 {
			s.lo, _ = cell(p, i)
		}
		if fault == "" && i+1 < cells {
			s.hi, _ = cell(p, i+1)
		}
		if err := below(s); err != nil {
			return err
		}
	}
	return nil
}

func u16(p *[pageSize]byte, off int) int { return int(binary.LittleEndian.Uint16(p[off:])) }

// span returns where cell i of p begins and ends, and the length of its key.
func cellSpan(p *[pageSize]byte, i int) (off, end, key int) {
	off = u16(p, layout.TreeHeader+2*i)
	if off > pageSize-layout.CellHeader {
		return off, pageSize + 1, 0
	}
	h := int(p[off]) | int(p[off+1])<<8 | int(p[off+2])<<16
	key = h & (1<<layout.CellKeyBits - 1)
	return off, off + layout.CellHeader + key + h>>layout.CellKeyBits, key
}

// cell returns key and value of a cell of a page that shape found sound. They
// are empty if that is no longer so: somebody writes to what is being checked.
func cell(p *[pageSize]byte, i int) (key, val []byte) {
	off, end, n := cellSpan(p, i)
	off += layout.CellHeader
	if end > pageSize {
		return nil, nil
	}
	return p[off : off+n : off+n], p[off+n : end : end]
}

// shape returns the rule that the page's header or cells break, or "".
func (w *walker) shape(p *[pageSize]byte, level int) string {
	cells, heap, dead := u16(p, layout.TreeCountOff), u16(p, layout.TreeHeapOff), u16(p, layout.TreeDeadOff)
	own := int(p[layout.TreeLevelOff])
	switch {
	case u16(p, 0) != layout.TreeMagic:
		return "no tree page (magic)"
	case own > layout.TreeLevelMax || level >= 0 && own != level:
		return fmt.Sprintf("level %d, %d is expected", own, level)
	case p[layout.TreeLevelOff+1] != 0:
		return "a reserved byte is not zero"
	case heap > pageSize || layout.TreeHeader+2*cells > heap:
		return fmt.Sprintf("%d cells from byte %d on", cells, heap)
	case u16(p, layout.TreeLastOff) > cells:
		return fmt.Sprintf("the last insert was at cell %d of %d", u16(p, layout.TreeLastOff), cells)
	case own > 0 && cells == 0:
		return "no children"
	}
	w.offs = w.offs[:0]
	live := 0
	for i := range cells {
		off, end, key := cellSpan(p, i)
		if off < heap || end > pageSize {
			return fmt.Sprintf("cell %d lies outside the heap", i)
		}
		val := end - off - layout.CellHeader - key
		if key > pmem.KeyMax || val > pmem.ValueMax || own > 0 && val != layout.ChildBytes {
			return fmt.Sprintf("cell %d has a key of %d and a value of %d bytes", i, key, val)
		}
		live += end - off
		w.offs = append(w.offs, uint32(off)<<16|uint32(end-off))
	}
	if heap+dead+live != pageSize {
		return fmt.Sprintf("%d bytes are neither in cells nor counted as dead", pageSize-heap-dead-live)
	}
	slices.Sort(w.offs)
	for i := 1; i < len(w.offs); i++ {
		if a := w.offs[i-1]; a>>16+a&0xffff > w.offs[i]>>16 {
			return fmt.Sprintf("cells at %d and %d overlap", a>>16, w.offs[i]>>16)
		}
	}
	return ""
}

// order returns what is wrong with the keys of a page with bounds [lo, hi), or "".
func order(p *[pageSize]byte, lo, hi []byte) string {
	first := 0
	if p[layout.TreeLevelOff] > 0 {
		if key, _ := cell(p, 0); len(key) != 0 {
			return "the first key of an inner page is not empty"
		}
		first = 1
	}
	var prev []byte
	for i := first; i < u16(p, layout.TreeCountOff); i++ {
		key, _ := cell(p, i)
		switch {
		case len(key) == 0:
			return fmt.Sprintf("cell %d has no key", i)
		case prev != nil && bytes.Compare(prev, key) >= 0:
			return fmt.Sprintf("key %x of cell %d is not above the one before", key, i)
		case lo != nil && bytes.Compare(key, lo) < 0 || hi != nil && bytes.Compare(key, hi) >= 0:
			return fmt.Sprintf("key %x of cell %d lies outside the page's range", key, i)
		}
		prev = key
	}
	return ""
}

// bitmaps compares the pages that were reached with those that are taken.
func (w *walker) bitmaps() error {
	c := w.c
	for g := uint64(0); g*layout.GroupPages < c.img.pages; g++ {
		if err := c.tick(4, int64(g*layout.GroupPages), int64(c.img.pages)); err != nil {
			return err
		}
		at := layout.BitmapPage(g, w.table)
		p, err := c.img.raw(at) // if it has rotted, everything that it says is compared
		if err != nil {
			c.problem(BitmapReserved, w.where(at), "the bitmap cannot be read: %v", err)
			continue
		}
		base := g * layout.GroupPages
		used := bitmap(p[:])
		for i := range uint64(layout.GroupPages) {
			n := base + i
			taken := used.has(i)
			inside := i >= layout.Reserved(g, w.table) && n < c.img.pages
			switch {
			case taken && !inside:
				c.problem(BitmapReserved, w.where(n), "taken in the bitmap at page %d", at)
				w.mendBit(BitmapReserved, n, false)
			case inside && w.reached.has(n) && !taken:
				c.problem(PageFree, w.where(n), "in the tree")
				w.mendBit(PageFree, n, true)
			case inside && taken && !w.reached.has(n) && !c.holes:
				c.problem(PageLeaked, w.where(n), "taken in the bitmap at page %d", at)
				w.mendBit(PageLeaked, n, false)
			}
		}
	}
	return nil
}
