package pmem

import (
	"encoding/binary"
	"fmt"
	"slices"

	"sealfs"
	"sealfs/alloc"
	"sealfs/pmem/layout"
)

// rangesMax bounds the changed ranges that an overlay page keeps apart; the
// nearest two are joined beyond it. An insert makes three.
const rangesMax = 8

// rangeGap is the distance at which two changed ranges are kept as one.
const rangeGap = 16

// overlaysKept is how many page buffers survive a larger transaction.
const overlaysKept = 256

// span of bytes of a page: [lo, hi).
type span struct{ lo, hi int }

// overlay is a page as a transaction sees it. Outside its ranges it equals the
// region's.
type overlay struct {
	buf    node
	no     PageNo
	nr     int
	ranges [rangesMax]span // ascending, with gaps
}

// mark notes that [lo, hi) may have changed.
func (o *overlay) mark(lo, hi int) {
	if lo >= hi {
		return
	}
	// Find the ranges [i, j) that touch the new one.
	i := 0
	for i < o.nr && o.ranges[i].hi+rangeGap < lo {
		i++
	}
	j := i
	for j < o.nr && o.ranges[j].lo <= hi+rangeGap {
		lo, hi = min(lo, o.ranges[j].lo), max(hi, o.ranges[j].hi)
		j++
	}
	if i < j {
		o.ranges[i] = span{lo, hi}
		o.nr = i + 1 + copy(o.ranges[i+1:], o.ranges[j:o.nr])
		return
	}
	if o.nr == rangesMax {
		// Join the two nearest neighbours and try again.
		at, best := 0, PageSize
		for k := range o.nr - 1 {
			if gap := o.ranges[k+1].lo - o.ranges[k].hi; gap < best {
				at, best = k, gap
			}
		}
		o.ranges[at].hi = o.ranges[at+1].hi
		o.nr = at + 1 + copy(o.ranges[at+1:], o.ranges[at+2:o.nr])
		o.mark(lo, hi)
		return
	}
	copy(o.ranges[i+1:], o.ranges[i:o.nr])
	o.ranges[i] = span{lo, hi}
	o.nr++
}

// Tx is the region's transaction: changes that nobody else sees until Commit.
// It is used under the exclusive latch. After an error other than ErrNotExist
// or ErrInvalid, and ErrNoSpace from Set, its changes may be half done: the
// caller must Reset it.
type Tx struct {
	r        *Region
	overlays []*overlay // [0, n) are in use
	n        int
	index    []indexSlot // hash of page numbers; a power of two long
	gen      uint32      // index slots of another generation are empty
	order    []*overlay  // by page number, for AppendRedo
	spans    []span      // of one page, for AppendRedo

	taken int // pages allocated less pages freed
	freed int // pages freed
	hint  PageNo

	path  [layout.TreeLevelMax + 1]step // of the last descent, root first
	depth int                           // index of the leaf in path

	scratch node
	keyBuf  [KeyMax]byte
	valBuf  [ValueMax]byte
	sepBuf  [KeyMax]byte
	kidBuf  [layout.ChildBytes]byte
}

// indexSlot says which overlay holds a page.
type indexSlot struct {
	no  PageNo
	gen uint32
	at  uint32
}

// Begin resets the region's only transaction and returns it. In the steady
// state it allocates nothing. REQUIRES: exclusive latch, until Commit or Reset.
func (r *Region) Begin() *Tx {
	r.tx.Reset()
	return &r.tx
}

// Reset drops all changes.
func (t *Tx) Reset() {
	if len(t.overlays) > overlaysKept && t.n > overlaysKept {
		clear(t.overlays[overlaysKept:])
		t.overlays = t.overlays[:overlaysKept]
		clear(t.order[:cap(t.order)])
	}
	t.n = 0
	t.gen++
	if t.gen == 0 { // the numbers start again: no old slot may look new
		clear(t.index)
		t.gen = 1
	}
	t.taken, t.freed = 0, 0
	t.hint = t.r.hint
}

// find returns the overlay of a page, or nil, and the index slot where it is or
// would be.
func (t *Tx) find(n PageNo) (*overlay, int) {
	mask := len(t.index) - 1
	i := int(uint64(n)*0x9e3779b97f4a7c15>>32) & mask
	for t.index[i].gen == t.gen {
		if t.index[i].no == n {
			return t.overlays[t.index[i].at], i
		}
		i = (i + 1) & mask
	}
	return nil, i
}

// Page implements Reader with the transaction's changes.
func (t *Tx) Page(n PageNo) ([]byte, error) {
	if o, _ := t.find(n); o != nil {
		return o.buf[:], nil
	}
	return t.r.Page(n)
}

// edit returns the page's overlay, made from the region's bytes if need be.
func (t *Tx) edit(n PageNo) (*overlay, error) {
	o, at := t.find(n)
	if o != nil {
		return o, nil
	}
	b, err := t.r.Page(n)
	if err != nil {
		return nil, err
	}
	if t.n == len(t.overlays) {
		t.overlays = append(t.overlays, new(overlay))
	}
	o = t.overlays[t.n]
	copy(o.buf[:], b)
	o.no, o.nr = n, 0
	t.index[at] = indexSlot{n, t.gen, uint32(t.n)}
	t.n++
	if 2*t.n > len(t.index) {
		t.index = make([]indexSlot, 2*len(t.index))
		for i, o := range t.overlays[:t.n] {
			_, at := t.find(o.no)
			t.index[at] = indexSlot{o.no, t.gen, uint32(i)}
		}
	}
	return o, nil
}

// put changes bytes of a page; it marks only from the first to the last byte
// that differs.
func (t *Tx) put(n PageNo, off int, b []byte) error {
	o, err := t.edit(n)
	if err != nil {
		return err
	}
	old := o.buf[off : off+len(b)]
	lo, hi := 0, len(b)
	for lo < hi && old[lo] == b[lo] {
		lo++
	}
	for lo < hi && old[hi-1] == b[hi-1] {
		hi--
	}
	copy(old[lo:hi], b[lo:hi])
	o.mark(off+lo, off+hi)
	return nil
}

// add adds v to the eight-byte number at off of the root page.
func (t *Tx) add(off int, v int64) error {
	o, err := t.edit(layout.RootPage)
	if err != nil {
		return err
	}
	b := o.buf[off : off+8]
	binary.LittleEndian.PutUint64(b, binary.LittleEndian.Uint64(b)+uint64(v))
	o.mark(off, off+8)
	return nil
}

// Table returns n bytes of the segment table at off, with the transaction's
// changes. They alias the page; the range must not cross a page.
func (t *Tx) Table(off, n int) ([]byte, error) { return t.r.table(t, off, n) }

// PutTable changes bytes of the segment table. b is copied.
func (t *Tx) PutTable(off int, b []byte) error {
	if off < 0 || off > int(t.r.header.TableBytes)-len(b) {
		return fmt.Errorf("table of %s: %d bytes at %d: %w", t.r.name, len(b), off, sealfs.ErrInvalid)
	}
	for len(b) > 0 {
		n := min(len(b), PageSize-off%PageSize)
		if err := t.put(PageNo(layout.TablePage+off/PageSize), off%PageSize, b[:n]); err != nil {
			return err
		}
		b, off = b[n:], off+n
	}
	return nil
}

// State returns lsfs's state with the transaction's changes, aliasing the page.
func (t *Tx) State() []byte {
	if o, _ := t.find(layout.RootPage); o != nil {
		return o.buf[layout.StateOff:]
	}
	return t.r.State()
}

// PutState changes bytes of lsfs's state. b is copied.
func (t *Tx) PutState(off int, b []byte) error {
	if off < 0 || off > layout.StateBytes-len(b) {
		return fmt.Errorf("state of %s: %d bytes at %d: %w", t.r.name, len(b), off, sealfs.ErrInvalid)
	}
	return t.put(layout.RootPage, layout.StateOff+off, b)
}

// Patch changes bytes of a page, whatever it holds: for repairs of what the
// tree's own methods cannot mend. Pages without a sum are refused: headers, intent and
// sums. b is copied.
func (t *Tx) Patch(n PageNo, off int, b []byte) error {
	if !layout.HasSum(uint64(n), t.r.tablePages) || off < 0 || off > PageSize-len(b) {
		return fmt.Errorf("patch of page %d of %s: %d bytes at %d: %w", n, t.r.name, len(b), off, sealfs.ErrInvalid)
	}
	return t.put(n, off, b)
}

// sorted returns the changed pages in ascending order.
func (t *Tx) sorted() []*overlay {
	t.order = t.order[:0]
	for _, o := range t.overlays[:t.n] {
		if o.nr > 0 {
			t.order = append(t.order, o)
		}
	}
	slices.SortFunc(t.order, func(a, b *overlay) int {
		if a.no < b.no {
			return -1
		}
		return 1
	})
	return t.order
}

// AppendRedo appends the transaction's redo to b and returns the result; a
// transaction that changed nothing appends nothing. The region must still be in
// the state that the transaction began with.
func (t *Tx) AppendRedo(b []byte) []byte {
	prev := PageNo(0)
	for _, o := range t.sorted() {
		old, err := t.r.Page(o.no)
		if err != nil {
			continue // edit has read this page, and a region never shrinks
		}
		t.spans = t.spans[:0]
		for _, s := range o.ranges[:o.nr] {
			t.spans = diff(t.spans, (*node)(old), &o.buf, s)
		}
		if len(t.spans) > 0 {
			b = appendPage(b, o.no-prev, t.spans, &o.buf)
			prev = o.no
		}
	}
	return b
}

// Commit copies the changed ranges into the region and marks their pages dirty;
// in a region on persistent memory its redo must be durable by then. The
// transaction is empty afterwards.
func (t *Tx) Commit() {
	for _, o := range t.overlays[:t.n] {
		if o.nr == 0 {
			continue
		}
		p, err := t.r.Page(o.no)
		if err != nil {
			continue // as in AppendRedo
		}
		for _, s := range o.ranges[:o.nr] {
			t.r.replace(o.no, p, s.lo, o.buf[s.lo:s.hi])
		}
		t.r.markDirty(o.no)
	}
	t.r.hint = t.hint
	t.Reset()
}

// bitmapOf returns the bitmap of group g as this transaction sees it.
func (t *Tx) bitmapOf(g uint64) (alloc.Bitmap, error) {
	b, err := t.Page(PageNo(layout.BitmapPage(g, t.r.tablePages)))
	return alloc.Bitmap(b), err
}
