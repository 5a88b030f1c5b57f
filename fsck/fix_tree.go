package fsck

import (
	"bytes"
	"fmt"
	"slices"

	"sealfs/fsck/mend"
	"sealfs/meta"
	"sealfs/pmem"
	"sealfs/pmem/layout"
)

// mendTree plans to build the tree anew, and saves the page for the sake of which it is.
func (w *walker) mendTree(id ID, n uint64) {
	c := w.c
	w.mendBy(c, id, w.where(n), func(*editor) string {
		if p, err := c.img.page(n); err == nil {
			c.save(Saved{Problem: id, Where: w.where(n), Old: bytes.Clone(p[:])})
		}
		return c.newTree()
	})
}

// newTree plans to build the tree anew, if that is not planned yet.
func (c *checker) newTree() string {
	c.w.effects++
	if c.job.Tree == nil {
		c.salvage()
	}
	return fmt.Sprintf("the tree is built anew from %s, %d of them found apart from it", count(len(c.leaves)+c.conflicts, "page"), c.apart)
}

// kept is a leaf that is to be kept, and between which keys it reaches.
type kept struct {
	leaf
	lo, hi []byte
	lost   bool // nothing refers to it
}

// salvage finds the leaves that nothing sound refers to any more: taken pages that
// the walk has not reached and that are sound leaves by themselves. What contradicts
// the tree's own leaves loses against them. The new tree is built from all records.
func (c *checker) salvage() {
	w := c.newWalker()
	w.reached = c.reached
	var all []kept
	var odd []leaf // whose records are taken one by one
	add := func(l leaf, lost bool) {
		p, err := c.img.page(l.page)
		if err != nil {
			return
		}
		if order(p, nil, nil) != "" {
			odd = append(odd, l)
			return
		}
		lo, _ := cell(p, 0)
		hi, _ := cell(p, int(l.cells)-1)
		all = append(all, kept{l, bytes.Clone(lo), bytes.Clone(hi), lost})
	}
	for _, l := range c.leaves {
		add(l, false)
	}
	var free, taken []uint64
	enough := int(max(c.img.stored, 1<<16)) // if it is not, the region grows
	for g := uint64(0); g*layout.GroupPages < c.img.pages; g++ {
		b, err := c.img.raw(layout.BitmapPage(g, w.table))
		if err != nil {
			continue
		}
		used := bitmap(b[:])
		for i := layout.Reserved(g, w.table); i < layout.GroupPages && g*layout.GroupPages+i < c.img.pages; i++ {
			n := g*layout.GroupPages + i
			switch {
			case w.reached.has(n):
				taken = append(taken, n)
				continue
			case !used.has(i):
				if len(free) < enough && c.img.fits(n) == nil {
					free = append(free, n)
				}
				continue
			}
			taken = append(taken, n)
			p, err := c.img.raw(n)
			if err == nil && c.img.fits(n) != nil {
				c.broken = append(c.broken, subtree{page: n})
				continue
			}
			if err != nil || p[layout.TreeLevelOff] != 0 || w.shape(p, 0) != "" || u16(p, layout.TreeCountOff) == 0 {
				continue
			}
			key, _ := cell(p, 0)
			c.apart++
			add(leaf{n, uint16(u16(p, layout.TreeCountOff)), uint16(shardOf(key))}, true)
		}
	}
	slices.SortStableFunc(all, func(a, b kept) int { return bytes.Compare(a.lo, b.lo) })
	var list []kept
	for _, k := range all {
		for len(list) > 0 && list[len(list)-1].lost && !k.lost && bytes.Compare(k.lo, list[len(list)-1].hi) <= 0 {
			odd = append(odd, list[len(list)-1].leaf)
			list = list[:len(list)-1]
		}
		if len(list) > 0 && bytes.Compare(k.lo, list[len(list)-1].hi) <= 0 {
			odd = append(odd, k.leaf)
			continue
		}
		list = append(list, k)
	}
	c.leaves = c.leaves[:0]
	for _, k := range list {
		c.leaves = append(c.leaves, k.leaf)
	}
	c.unordered.Store(false)
	c.conflicts = len(odd)
	for _, l := range odd {
		p, err := c.img.page(l.page)
		if err != nil {
			continue
		}
		for j := range int(l.cells) {
			key, val := cell(p, j)
			c.found(key, val)
		}
	}
	for _, t := range c.broken {
		c.cellsOf(t)
	}
	c.job.Tree = &mend.Tree{Free: free, Old: taken, Rows: func(add func(key, val []byte) error) error {
		return c.rows(4, 0, 1<<16, func(_ ref, key, val []byte) error { return add(key, val) })
	}}
}

// found takes a record that stood apart into the new tree, unless there is one already.
func (c *checker) found(key, val []byte) {
	if _, known := c.over.get(key); known || len(key) == 0 {
		return
	}
	if _, known := c.stored(key); !known {
		c.over.put(edit{key: bytes.Clone(key), val: bytes.Clone(val)})
	}
}

// cellsOf takes what can be read as records of a damaged page into the new tree.
func (c *checker) cellsOf(t subtree) {
	p, err := c.img.raw(t.page)
	if err != nil || t.level > 0 || u16(p, 0) != layout.TreeMagic || p[layout.TreeLevelOff] != 0 {
		return // of an inner page the leaves are found without it
	}
	for i := range min(u16(p, layout.TreeCountOff), (pageSize-layout.TreeHeader)/2) {
		key, val := cell(p, i)
		if len(key) == 0 || len(key) > pmem.KeyMax || len(val) > pmem.ValueMax ||
			t.lo != nil && bytes.Compare(key, t.lo) < 0 || t.hi != nil && bytes.Compare(key, t.hi) >= 0 {
			continue
		}
		if k, err := meta.DecodeKey(key); err == nil && readable(&k, val) {
			c.found(key, val)
		}
	}
}

// readable reports whether a value is one that can stand under a key.
func readable(k *meta.Key, val []byte) bool {
	var err error
	switch k.Kind {
	case meta.KindShard:
		_, err = meta.DecodeShardState(val)
	case meta.KindUsage:
		_, err = meta.DecodeUsage(val)
	case meta.KindGrant:
		_, err = meta.DecodeGrant(val)
	case meta.KindInode:
		err = meta.DecodeInode(val, k.Ino, new(meta.Inode))
	case meta.KindPart:
		_, err = meta.DecodePart(val)
	case meta.KindPartition:
		_, err = meta.DecodePartition(val)
	case meta.KindEntry:
		err = meta.DecodeEntry(val, k.Ino, k.Pos, new(meta.Entry))
	case meta.KindExtent:
		err = meta.DecodeExtent(val, k.Pos, new(meta.Extent))
	case meta.KindAttribute:
		if k.Part == 0 {
			err = meta.DecodeAttribute(val, new(meta.Attribute))
		}
	case meta.KindSymlink:
		return len(val) > 0 && len(val) <= partBytes
	case meta.KindOrphan:
		_, _, err = meta.DecodeOrphan(val)
	case meta.KindLock:
		_, err = meta.DecodeLock(val, k)
	case meta.KindSession:
		if _, err = meta.DecodeResult(val); k.Pos == 0 {
			_, err = meta.DecodeSession(val)
		}
	case meta.KindPrepared:
		_, err = meta.DecodePrepared(val)
	case meta.KindDecision:
		_, err = meta.DecodeDecision(val)
	}
	return err == nil
}

// mendBit plans to set or clear the bit of a page.
func (w *walker) mendBit(id ID, n uint64, taken bool) {
	c := w.c
	c.mendBy(id, w.where(n), func(*editor) string {
		if c.job.Bits == nil {
			c.job.Bits = map[uint64]bool{}
		}
		c.job.Bits[n] = taken
		c.w.effects++
		if taken {
			return "it is taken in the bitmap"
		}
		return "it is freed in the bitmap"
	})
}

// mendCounts plans to write what was counted.
func (w *walker) mendCounts() {
	c := w.c
	c.mendBy(TreeCounts, c.reg.Name(), func(*editor) string {
		c.w.effects++
		c.job.Counts = &mend.Counts{Pages: w.pages, Keys: w.keys}
		return fmt.Sprintf("the root page says %s and %s", count(w.keys, "key"), count(w.pages, "page"))
	})
}
