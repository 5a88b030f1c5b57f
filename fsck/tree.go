package fsck

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"sealfs/pmem"
	"sealfs/pmem/layout"
)

// leaf is a sound leaf of the tree, in the order of keys.
type leaf struct {
	page  uint64
	cells uint16
}

// tree is pass 4: every page against its sum, the pages of the tree, and the
// bitmaps against it.
func (c *checker) tree() error {
	where := c.reg.Name()
	if err := c.sweep(); err != nil {
		return err
	}
	p, err := c.img.page(layout.RootPage)
	if err != nil {
		c.problem(RootPage, where, "%v", err)
		return nil
	}
	root, err := layout.DecodeRoot(where, p[:])
	if err != nil {
		c.problem(RootPage, where, "%v", err)
		return nil
	}
	w := &walker{c: c, table: c.hdr.TablePages(), reached: make(bitmap, (c.img.pages+7)/8)}
	if !w.trees(root.Tree) {
		c.problem(RootPage, where, "the tree's root cannot be page %d", root.Tree)
		return nil
	}
	if err := w.walk(root.Tree, -1, nil, nil); err != nil {
		return err
	}
	c.rep.Keys, c.rep.Pages = w.keys, w.pages
	if !c.holes && (w.keys != root.Keys || w.pages != root.Pages) {
		c.problem(TreeCounts, where, "%d keys and %d pages are counted, %d and %d are there", root.Keys, root.Pages, w.keys, w.pages)
	}
	return w.bitmaps()
}

// bitmap holds bit i in byte i/8, from the lowest, as a region's bitmap pages do.
type bitmap []byte

func (b bitmap) has(i uint64) bool { return b[i/8]>>(i%8)&1 != 0 }
func (b bitmap) set(i uint64)      { b[i/8] |= 1 << (i % 8) }

// walker is a walk over the tree.
type walker struct {
	c           *checker
	table       uint64 // pages of the segment table
	reached     bitmap
	pages, keys uint64
	offs        []uint32 // of one page's cells: offset << 16 | length
}

// trees reports whether the tree may own page n.
func (w *walker) trees(n uint64) bool {
	return n < w.c.img.pages && n%layout.GroupPages >= layout.Reserved(n/layout.GroupPages, w.table)
}

func (w *walker) where(n uint64) string { return fmt.Sprintf("%s, page %d", w.c.reg.Name(), n) }

// walk checks page n, whose level is level (-1 for the root: any) and whose keys
// lie in [lo, hi), nil being no bound, and everything below it.
func (w *walker) walk(n uint64, level int, lo, hi []byte) error {
	c := w.c
	if w.reached.has(n) {
		c.problem(TreeTwice, w.where(n), "reached again")
		c.holes = true
		return nil
	}
	w.reached.set(n)
	w.pages++
	if w.pages%1024 == 0 {
		if err := c.tick(4, int64(w.pages), int64(c.img.pages)); err != nil {
			return err
		}
	}
	p, err := c.img.page(n)
	if err != nil {
		if c.img.rotten[n] == "" { // that was reported
			c.problem(TreePage, w.where(n), "%v", err)
		}
		c.holes = true
		return nil
	}
	fault := w.shape(p, level)
	if fault != "" {
		c.problem(TreePage, w.where(n), "%s", fault)
		c.holes = true
		return nil
	}
	if fault = order(p, lo, hi); fault != "" {
		c.problem(TreeOrder, w.where(n), "%s", fault)
		c.holes = true
	}
	cells := u16(p, layout.TreeCountOff)
	if level = int(p[layout.TreeLevelOff]); level == 0 {
		w.keys += uint64(cells)
		c.leaves = append(c.leaves, leaf{n, uint16(cells)})
		return nil
	}
	for i := range cells {
		_, val := cell(p, i)
		child := uint64(binary.LittleEndian.Uint32(val)) | uint64(binary.LittleEndian.Uint16(val[4:]))<<32
		if !w.trees(child) {
			c.problem(TreeChild, w.where(n), "cell %d refers to page %d of %d", i, child, c.img.pages)
			c.holes = true
			continue
		}
		from, to := lo, hi
		if fault == "" && i > 0 {
			from, _ = cell(p, i)
		}
		if fault == "" && i+1 < cells {
			to, _ = cell(p, i+1)
		}
		if err := w.walk(child, level-1, from, to); err != nil {
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

// cell returns key and value of a cell of a page that shape found sound.
func cell(p *[pageSize]byte, i int) (key, val []byte) {
	off, end, n := cellSpan(p, i)
	off += layout.CellHeader
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
		p, err := c.img.page(at)
		if err != nil {
			if c.img.rotten[at] == "" {
				c.problem(BitmapReserved, w.where(at), "the bitmap cannot be read: %v", err)
			}
			continue
		}
		base := g * layout.GroupPages
		bits := bitmap(p[:])
		for i := range uint64(layout.GroupPages) {
			n := base + i
			taken := bits.has(i)
			inside := i >= layout.Reserved(g, w.table) && n < c.img.pages
			switch {
			case taken && !inside:
				c.problem(BitmapReserved, w.where(n), "taken in the bitmap at page %d", at)
			case inside && w.reached.has(n) && !taken:
				c.problem(PageFree, w.where(n), "in the tree")
			case inside && taken && !w.reached.has(n) && !c.holes:
				c.problem(PageLeaked, w.where(n), "taken in the bitmap at page %d", at)
			}
		}
	}
	return nil
}

// cells calls fn for every cell of the sound leaves, in order of their keys.
func (c *checker) cells(number int, fn func(at ref, key, val []byte) error) error {
	for i, l := range c.leaves {
		if i%256 == 0 {
			if err := c.tick(number, int64(i), int64(len(c.leaves))); err != nil {
				return err
			}
		}
		p, err := c.img.page(l.page)
		if err != nil { // it could be read before
			c.problem(TreePage, fmt.Sprintf("%s, page %d", c.reg.Name(), l.page), "%v", err)
			c.holes = true
			continue
		}
		for j := range int(l.cells) {
			key, val := cell(p, j)
			if err := fn(ref{uint32(i), uint16(j)}, key, val); err != nil {
				return err
			}
		}
	}
	return nil
}

// ref says where a cell stands.
type ref struct {
	leaf uint32 // index in leaves
	cell uint16
}
