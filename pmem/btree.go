package pmem

import (
	"encoding/binary"
	"fmt"

	"sealfs"
	"sealfs/pmem/layout"
)

// Limits of the tree's keys and values, in bytes. Keys are not empty.
const (
	KeyMax   = 300
	ValueMax = 1000
)

const (
	// A page with fewer live bytes is merged with a neighbour, if the two
	// together leave a quarter of a page free: otherwise the next insert would
	// split them again.
	mergeBelow = nodeBytes / 4
	mergeMost  = nodeBytes * 3 / 4
	// compactSlack is what a compaction must gain beyond the present need. With
	// less, a nearly full page would be rewritten for every few inserts.
	compactSlack = nodeBytes / 16
)

// step is one page of a descent and the cell taken in it.
type step struct {
	no   PageNo
	slot int
}

// corrupt is the error for a page that breaks a rule.
func corrupt(r Reader, n PageNo, what string) error {
	where := "region"
	switch v := r.(type) {
	case *Region:
		where = v.name
	case *Tx:
		where = v.r.name
	}
	return &sealfs.Corruption{Where: where, Off: int64(n * PageSize), What: what}
}

// treeRoot returns the page of the tree's root.
func treeRoot(r Reader) (PageNo, error) {
	p, err := r.Page(layout.RootPage)
	if err != nil {
		return 0, err
	}
	return PageNo(binary.LittleEndian.Uint64(p[layout.RootTreeOff:])), nil
}

// load returns a tree page of level, or of any level if that is negative.
func load(r Reader, n PageNo, level int) (*node, error) {
	b, err := r.Page(n)
	if err != nil {
		return nil, err
	}
	p := (*node)(b)
	if what := p.fault(); what != "" {
		return nil, corrupt(r, n, what)
	}
	if level >= 0 && p.level() != level {
		return nil, corrupt(r, n, "tree page level differs from its parent's")
	}
	return p, nil
}

// Get returns the value of key, aliasing the page: it is valid while the latch
// is held and nothing is changed. The error for an absent key is the bare
// sealfs.ErrNotExist. It allocates nothing. REQUIRES: latch.
func Get(r Reader, key []byte) ([]byte, error) {
	n, err := treeRoot(r)
	if err != nil {
		return nil, err
	}
	p, err := load(r, n, -1)
	if err != nil {
		return nil, err
	}
	for level := p.level(); level > 0; level-- {
		i, ok := p.route(key)
		if !ok {
			return nil, corrupt(r, n, "inner page cell")
		}
		kid, ok := p.child(i)
		if !ok {
			return nil, corrupt(r, n, "inner page child")
		}
		n = kid
		if p, err = load(r, n, level-1); err != nil {
			return nil, err
		}
	}
	i, found, ok := p.search(key, 0)
	if !ok {
		return nil, corrupt(r, n, "leaf cell")
	}
	if !found {
		return nil, sealfs.ErrNotExist
	}
	_, v, e, _ := p.span(i)
	return p[v:e:e], nil
}

// descend finds the leaf for key, the cell in it, and notes the path.
func (t *Tx) descend(key []byte) (leaf *node, found bool, err error) {
	n, err := treeRoot(t)
	if err != nil {
		return nil, false, err
	}
	p, err := load(t, n, -1)
	if err != nil {
		return nil, false, err
	}
	t.depth = p.level()
	for d := 0; d < t.depth; d++ {
		i, ok := p.route(key)
		if !ok {
			return nil, false, corrupt(t, n, "inner page cell")
		}
		t.path[d] = step{n, i}
		if n, ok = p.child(i); !ok {
			return nil, false, corrupt(t, t.path[d].no, "inner page child")
		}
		if p, err = load(t, n, t.depth-d-1); err != nil {
			return nil, false, err
		}
	}
	i, found, ok := p.search(key, 0)
	if !ok {
		return nil, false, corrupt(t, n, "leaf cell")
	}
	t.path[t.depth] = step{n, i}
	return p, found, nil
}

// Set makes val the value of key. Both are copied. ErrInvalid if one of them is
// out of its limits, ErrNoSpace if the region may have too few free pages; then
// nothing has changed.
func (t *Tx) Set(key, val []byte) error {
	if len(key) == 0 || len(key) > KeyMax || len(val) > ValueMax {
		return fmt.Errorf("key of %d and value of %d bytes: %w", len(key), len(val), sealfs.ErrInvalid)
	}
	p, found, err := t.descend(key)
	if err != nil {
		return err
	}
	// Each level may split, and the tree grow by one.
	if t.free() < t.depth+2 && !t.fits(p, found, key, val) {
		return fmt.Errorf("region %s has %d free pages: %w", t.r.name, t.free(), sealfs.ErrNoSpace)
	}
	leaf := t.path[t.depth]
	o, err := t.edit(leaf.no)
	if err != nil {
		return err
	}
	if found {
		_, v, e, _ := o.buf.span(leaf.slot)
		if len(val) <= e-v {
			if !o.rewrite(leaf.slot, key, val) {
				return corrupt(t, leaf.no, "dead bytes")
			}
			return nil
		}
		if !o.remove(leaf.slot) {
			return corrupt(t, leaf.no, "leaf cell")
		}
	} else if err := t.add(layout.RootKeysOff, 1); err != nil {
		return err
	}
	return t.insert(t.depth, leaf.slot, key, val)
}

// fits reports whether Set needs no page.
func (t *Tx) fits(p *node, found bool, key, val []byte) bool {
	need := cellBytes(len(key), len(val)) + 2
	if found {
		_, v, e, _ := p.span(t.path[t.depth].slot)
		if len(val) <= e-v {
			return true
		}
	}
	return p.gap() >= need || p.gap()+p.dead() >= need+compactSlack
}

// insert puts a cell into the page at depth d of the path, and splits it and
// those above as far as they are full.
func (t *Tx) insert(d, slot int, key, val []byte) error {
	for {
		n := t.path[d].no
		o, err := t.edit(n)
		if err != nil {
			return err
		}
		if o.insert(slot, key, val) {
			return nil
		}
		// From here on cells move. The arguments may alias one.
		key, val = t.keyBuf[:copy(t.keyBuf[:], key)], t.valBuf[:copy(t.valBuf[:], val)]
		if o.buf.gap()+o.buf.dead() >= cellBytes(len(key), len(val))+2+compactSlack {
			if !o.compact(&t.scratch) {
				return corrupt(t, n, "cells exceed the page")
			}
			if o.insert(slot, key, val) {
				return nil
			}
			return corrupt(t, n, "dead bytes")
		}
		right, sep, err := t.split(o, slot, key, val)
		if err != nil {
			return err
		}
		kid := putChild(&t.kidBuf, right)
		if d == 0 {
			return t.growRoot(n, sep, kid)
		}
		d--
		slot, key, val = t.path[d].slot+1, sep, kid
	}
}

// growRoot puts a new root above the old one and its new sibling.
func (t *Tx) growRoot(left PageNo, sep, right []byte) error {
	p, err := load(t, left, -1)
	if err != nil {
		return err
	}
	if p.level() == layout.TreeLevelMax {
		return corrupt(t, left, "tree is too high")
	}
	o, err := t.allocPage(p.level() + 1)
	if err != nil {
		return err
	}
	var kid [layout.ChildBytes]byte
	if !o.insert(0, nil, putChild(&kid, left)) || !o.insert(1, sep, right) {
		return corrupt(t, o.no, "new root")
	}
	return t.setRoot(o.no)
}

func (t *Tx) setRoot(n PageNo) error {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(n))
	return t.put(layout.RootPage, layout.RootTreeOff, b[:])
}

// split moves the upper cells of a page to a new one to its right, with the new
// cell among them or inserted on the left. It returns the new page and the
// separator, in a buffer of the transaction. key and val must not alias the page.
func (t *Tx) split(o *overlay, slot int, key, val []byte) (PageNo, []byte, error) {
	p := &o.buf
	s, ok := splitPoint(p, slot, cellBytes(len(key), len(val))+2)
	if !ok {
		return 0, nil, corrupt(t, o.no, "cells exceed the page")
	}
	// item returns cell j of the page as if the new cell were in it.
	item := func(j int) (k, v []byte, ok bool) {
		switch {
		case j < slot:
			return p.cell(j)
		case j == slot:
			return key, val, true
		}
		return p.cell(j - 1)
	}
	first, _, ok1 := item(s)
	before, _, ok2 := item(s - 1)
	if !ok1 || !ok2 {
		return 0, nil, corrupt(t, o.no, "cell")
	}
	level := p.level()
	sep := first
	if level == 0 {
		// The shortest key that is above all on the left.
		n := 0
		for n < len(before) && n < len(first)-1 && before[n] == first[n] {
			n++
		}
		sep = first[:min(n+1, len(first))]
	}
	sep = t.sepBuf[:copy(t.sepBuf[:], sep)]

	r, err := t.allocPage(level)
	if err != nil {
		return 0, nil, err
	}
	for j := s; j <= p.count(); j++ {
		k, v, ok := item(j)
		if level > 0 && j == s {
			k = nil
		}
		if !ok || !r.insert(j-s, k, v) {
			return 0, nil, corrupt(t, o.no, "cells exceed the page")
		}
	}
	last := 0 // the run of inserts goes on where the new cell is
	if slot >= s {
		last = slot - s + 1
	}
	r.header(r.buf.dead(), r.buf.count(), r.buf.heap(), last)

	if slot >= s {
		if s < p.count() && !o.truncate(s) {
			return 0, nil, corrupt(t, o.no, "dead bytes")
		}
		return r.no, sep, nil
	}
	if !o.truncate(s - 1) {
		return 0, nil, corrupt(t, o.no, "dead bytes")
	}
	if !o.insert(slot, key, val) {
		if !o.compact(&t.scratch) || !o.insert(slot, key, val) {
			return 0, nil, corrupt(t, o.no, "cells exceed the page")
		}
	}
	return r.no, sep, nil
}

// splitPoint returns how many cells stay on the left when a cell of need bytes
// (with its slot) is to become cell slot of the full page p.
func splitPoint(p *node, slot, need int) (int, bool) {
	n := p.count()
	if n == 0 {
		return 0, false
	}
	if slot == n {
		return n, true // ascending: leave the left page full
	}
	run := slot > 0 && p.last() == slot
	total, left, best, at := p.live()+need, 0, 1<<30, 0
	for j := 0; j < n; j++ { // j+1 items on the left
		size := need
		if j != slot {
			i := j
			if j > slot {
				i--
			}
			k, _, e, ok := p.span(i)
			if !ok {
				return 0, false
			}
			size = e - k + layout.CellHeader + 2
		}
		left += size
		if run && j == slot {
			// An ascending run inside the page: what follows it moves away.
			if left <= nodeBytes {
				return slot + 1, true
			}
			return slot, true
		}
		if bigger := max(left, total-left); bigger < best {
			best, at = bigger, j+1
		}
	}
	return at, true
}

// Delete removes key; ErrNotExist, bare, if it is absent. It needs no free page.
func (t *Tx) Delete(key []byte) error {
	_, found, err := t.descend(key)
	if err != nil {
		return err
	}
	if !found {
		return sealfs.ErrNotExist
	}
	leaf := t.path[t.depth]
	o, err := t.edit(leaf.no)
	if err != nil {
		return err
	}
	if !o.remove(leaf.slot) {
		return corrupt(t, leaf.no, "leaf cell")
	}
	if err := t.add(layout.RootKeysOff, -1); err != nil {
		return err
	}
	return t.shrink()
}

// shrink removes empty pages of the path and merges small ones, from the leaf
// upward.
func (t *Tx) shrink() error {
	d := t.depth
	for ; d > 0; d-- {
		n := t.path[d].no
		p, err := load(t, n, t.depth-d)
		if err != nil {
			return err
		}
		if p.count() == 0 {
			if err := t.dropChild(d-1, t.path[d-1].slot); err != nil {
				return err
			}
			if err := t.freePage(n); err != nil {
				return err
			}
			continue
		}
		if p.live() >= mergeBelow {
			return nil
		}
		merged, err := t.merge(d, p.live())
		if err != nil || !merged {
			return err
		}
	}
	// The root has lost a cell: it goes as long as it has one child only.
	n := t.path[0].no
	p, err := load(t, n, t.depth)
	if err != nil {
		return err
	}
	if p.level() == 0 || p.count() > 1 {
		return nil
	}
	for p.level() > 0 && p.count() == 1 {
		kid, ok := p.child(0)
		if !ok {
			return corrupt(t, n, "inner page child")
		}
		level := p.level() - 1
		if err := t.freePage(n); err != nil {
			return err
		}
		n = kid
		if p, err = load(t, n, level); err != nil {
			return err
		}
	}
	if p.level() > 0 && p.count() == 0 {
		return corrupt(t, n, "inner page without children")
	}
	return t.setRoot(n)
}

// dropChild removes cell i of the inner page at depth d of the path.
func (t *Tx) dropChild(d, i int) error {
	n := t.path[d].no
	o, err := t.edit(n)
	if err != nil {
		return err
	}
	if i >= o.buf.count() || !o.remove(i) {
		return corrupt(t, n, "inner page cell")
	}
	if i == 0 && o.buf.count() > 0 {
		// The new first cell stands for minus infinity.
		_, v, ok := o.buf.cell(0)
		if !ok || !o.rewrite(0, nil, v) {
			return corrupt(t, n, "inner page cell")
		}
	}
	return nil
}

// merge joins the page at depth d of the path, which has live bytes, with a
// neighbour under the same parent, if the two leave enough room.
func (t *Tx) merge(d, live int) (bool, error) {
	parentNo, at := t.path[d-1].no, t.path[d-1].slot
	level := t.depth - d
	parent, err := load(t, parentNo, level+1)
	if err != nil {
		return false, err
	}
	for _, i := range [2]int{at, at - 1} { // the left one of the two
		if i < 0 || i+1 >= parent.count() {
			continue
		}
		leftNo, ok1 := parent.child(i)
		rightNo, ok2 := parent.child(i + 1)
		sep, _, ok3 := parent.cell(i + 1)
		if !ok1 || !ok2 || !ok3 || leftNo == rightNo {
			return false, corrupt(t, parentNo, "inner page child")
		}
		left, err := load(t, leftNo, level)
		if err != nil {
			return false, err
		}
		right, err := load(t, rightNo, level)
		if err != nil {
			return false, err
		}
		if right.count() == 0 {
			return false, corrupt(t, rightNo, "empty page")
		}
		size := left.live() + right.live()
		if level > 0 {
			size += len(sep)
		}
		if size > mergeMost {
			continue
		}
		o, err := t.edit(leftNo)
		if err != nil {
			return false, err
		}
		if o.buf.gap() < size-left.live() && !o.compact(&t.scratch) {
			return false, corrupt(t, leftNo, "cells exceed the page")
		}
		last := o.buf.last()
		for j := range right.count() {
			k, v, ok := right.cell(j)
			if level > 0 && j == 0 {
				k = sep
			}
			if !ok || len(k) > KeyMax || !o.insert(o.buf.count(), k, v) {
				return false, corrupt(t, rightNo, "cells exceed the page")
			}
		}
		o.header(o.buf.dead(), o.buf.count(), o.buf.heap(), last)
		if err := t.dropChild(d-1, i+1); err != nil {
			return false, err
		}
		return true, t.freePage(rightNo)
	}
	return false, nil
}
