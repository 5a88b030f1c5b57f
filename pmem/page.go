package pmem

import (
	"bytes"
	"encoding/binary"

	"sealfs/pmem/layout"
)

// node is a tree page; layout describes it. Its methods rely on fault having
// been called on these bytes and having found nothing, and check themselves
// whatever lies beyond that.
type node [PageSize]byte

const (
	nodeBytes = PageSize - layout.TreeHeader // room for slots and cells
	keyMask   = 1<<layout.CellKeyBits - 1
)

func (p *node) u16(off int) int  { return int(binary.LittleEndian.Uint16(p[off:])) }
func (p *node) level() int       { return int(p[layout.TreeLevelOff]) }
func (p *node) dead() int        { return p.u16(layout.TreeDeadOff) }
func (p *node) count() int       { return p.u16(layout.TreeCountOff) }
func (p *node) heap() int        { return p.u16(layout.TreeHeapOff) }
func (p *node) last() int        { return p.u16(layout.TreeLastOff) }
func (p *node) slot(i int) int   { return p.u16(layout.TreeHeader + 2*i) }
func (p *node) slotsEnd() int    { return layout.TreeHeader + 2*p.count() }
func (p *node) gap() int         { return p.heap() - p.slotsEnd() }
func (p *node) live() int        { return PageSize - p.heap() - p.dead() + 2*p.count() }
func cellBytes(key, val int) int { return layout.CellHeader + key + val }

// fault returns the rule that the page's header breaks, or "". After "" all
// slots lie within the page.
func (p *node) fault() string {
	heap := p.heap()
	switch {
	case p.u16(0) != layout.TreeMagic:
		return "tree page magic"
	case p.level() > layout.TreeLevelMax:
		return "tree page level"
	case heap > PageSize:
		return "tree page heap start"
	case p.slotsEnd() > heap:
		return "tree page cell count"
	case p.dead() > PageSize-heap:
		return "tree page dead bytes"
	}
	return ""
}

// span returns where cell i's key and value begin, and where it ends.
func (p *node) span(i int) (key, val, end int, ok bool) {
	off := p.slot(i)
	if off > PageSize-layout.CellHeader {
		return 0, 0, 0, false
	}
	n := int(p[off]) | int(p[off+1])<<8 | int(p[off+2])<<16
	key = off + layout.CellHeader
	val = key + n&keyMask
	end = val + n>>layout.CellKeyBits
	return key, val, end, end <= PageSize
}

// cell returns key and value of cell i, aliasing the page.
func (p *node) cell(i int) (key, val []byte, ok bool) {
	k, v, e, ok := p.span(i)
	if !ok {
		return nil, nil, false
	}
	return p[k:v:v], p[v:e:e], true
}

// child returns the child of cell i of an inner page.
func (p *node) child(i int) (PageNo, bool) {
	_, val, ok := p.cell(i)
	if !ok || len(val) != layout.ChildBytes {
		return 0, false
	}
	return PageNo(binary.LittleEndian.Uint32(val)) | PageNo(binary.LittleEndian.Uint16(val[4:]))<<32, true
}

// putChild encodes a child's page number.
func putChild(b *[layout.ChildBytes]byte, n PageNo) []byte {
	binary.LittleEndian.PutUint32(b[:], uint32(n))
	binary.LittleEndian.PutUint16(b[4:], uint16(n>>32))
	return b[:]
}

// search returns the first cell from lo on whose key is not below key, and
// whether it is equal.
func (p *node) search(key []byte, lo int) (i int, found, ok bool) {
	hi := p.count()
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		k, v, _, ok := p.span(mid)
		if !ok {
			return 0, false, false
		}
		switch c := bytes.Compare(p[k:v], key); {
		case c < 0:
			lo = mid + 1
		case c > 0:
			hi = mid
		default:
			return mid, true, true
		}
	}
	return lo, false, true
}

// route returns the cell of an inner page whose child holds key.
func (p *node) route(key []byte) (i int, ok bool) {
	i, found, ok := p.search(key, 1)
	if !found {
		i--
	}
	return i, ok && i < p.count()
}

// The methods below change a page in the overlay and note what they changed.

// header sets all of the page's numbers that change with its cells.
func (o *overlay) header(dead, count, heap, last int) {
	p := o.buf[:]
	binary.LittleEndian.PutUint16(p[layout.TreeDeadOff:], uint16(dead))
	binary.LittleEndian.PutUint16(p[layout.TreeCountOff:], uint16(count))
	binary.LittleEndian.PutUint16(p[layout.TreeHeapOff:], uint16(heap))
	binary.LittleEndian.PutUint16(p[layout.TreeLastOff:], uint16(last))
	o.mark(layout.TreeDeadOff, layout.TreeHeader)
}

// format makes the page an empty one of level.
func (o *overlay) format(level int) {
	binary.LittleEndian.PutUint16(o.buf[0:], layout.TreeMagic)
	o.buf[layout.TreeLevelOff] = byte(level)
	o.buf[layout.TreeLevelOff+1] = 0
	o.mark(0, layout.TreeDeadOff)
	o.header(0, 0, PageSize, 0)
}

// insert makes (key, val) cell i and reports whether there was room in the gap;
// if not, nothing has changed. key and val may alias the page.
func (o *overlay) insert(i int, key, val []byte) bool {
	p := &o.buf
	n := cellBytes(len(key), len(val))
	if p.gap() < n+2 {
		return false
	}
	off := p.heap() - n
	h := len(key) | len(val)<<layout.CellKeyBits
	p[off], p[off+1], p[off+2] = byte(h), byte(h>>8), byte(h>>16)
	copy(p[off+layout.CellHeader:], key)
	copy(p[off+layout.CellHeader+len(key):], val)
	o.mark(off, off+n)

	at, end := layout.TreeHeader+2*i, p.slotsEnd()
	copy(p[at+2:end+2], p[at:end])
	binary.LittleEndian.PutUint16(p[at:], uint16(off))
	o.mark(at, end+2)
	o.header(p.dead(), p.count()+1, off, i+1)
	return true
}

// remove takes out cell i.
func (o *overlay) remove(i int) bool {
	p := &o.buf
	k, _, e, ok := p.span(i)
	if !ok {
		return false
	}
	off := k - layout.CellHeader
	dead, heap, last := p.dead(), p.heap(), p.last()
	if off == heap {
		heap = e
	} else {
		dead += e - off
	}
	if dead > PageSize-heap { // cells overlap, or dead bytes were wrong
		return false
	}
	at, end := layout.TreeHeader+2*i, p.slotsEnd()
	copy(p[at:], p[at+2:end])
	o.mark(at, end-2)
	if last > i { // the run goes on behind the cell before
		last--
	}
	o.header(dead, p.count()-1, heap, last)
	return true
}

// truncate takes out all cells from i on; their bytes become dead.
func (o *overlay) truncate(i int) bool {
	p := &o.buf
	dead := p.dead()
	for j := i; j < p.count(); j++ {
		k, _, e, ok := p.span(j)
		if !ok {
			return false
		}
		dead += e - k + layout.CellHeader
	}
	if dead > PageSize-p.heap() {
		return false
	}
	o.header(dead, i, p.heap(), min(p.last(), i))
	return true
}

// rewrite replaces key and value of cell i where it stands. The new ones
// together must not be longer; they may alias the cell.
func (o *overlay) rewrite(i int, key, val []byte) bool {
	p := &o.buf
	k, _, e, ok := p.span(i)
	if !ok || len(key)+len(val) > e-k {
		return false
	}
	off := k - layout.CellHeader
	less := e - k - len(key) - len(val)
	h := len(key) | len(val)<<layout.CellKeyBits
	p[off], p[off+1], p[off+2] = byte(h), byte(h>>8), byte(h>>16)
	// Both calls that shorten a key or a value move bytes downward only.
	copy(p[k:], key)
	copy(p[k+len(key):], val)
	o.mark(off, e-less)
	if less > 0 {
		if p.dead()+less > PageSize-p.heap() {
			return false
		}
		o.header(p.dead()+less, p.count(), p.heap(), p.last())
	}
	return true
}

// compact moves all cells to the end of the page, so that dead bytes become
// gap. scratch is overwritten.
func (o *overlay) compact(scratch *node) bool {
	p := &o.buf
	*scratch = *p
	n, heap := p.count(), PageSize
	for i := range n {
		k, _, e, ok := scratch.span(i)
		size := e - k + layout.CellHeader
		if !ok || heap-size < p.slotsEnd() {
			return false
		}
		heap -= size
		copy(p[heap:], scratch[k-layout.CellHeader:e])
		binary.LittleEndian.PutUint16(p[layout.TreeHeader+2*i:], uint16(heap))
	}
	o.mark(layout.TreeHeader, p.slotsEnd())
	o.mark(heap, PageSize)
	o.header(0, n, heap, p.last())
	return true
}
