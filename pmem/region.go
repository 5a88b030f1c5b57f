package pmem

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"

	"sealfs"
	"sealfs/alloc"
	"sealfs/pmem/layout"
)

// PageSize is the size of a region's page in bytes.
const PageSize = layout.PageSize

// PageNo is the number of a page, from the region's start.
type PageNo uint64

// Reader sees the pages of a region: *Region in their committed state, *Tx with
// a transaction's changes. A page is 4,096 bytes, read-only, and valid while the
// latch is held and nothing is changed. ErrCorrupt when n is beyond the region, or
// the page does not fit its sum.
type Reader interface {
	Page(n PageNo) ([]byte, error)
}

// Header is what a header slot says about the region; see package layout.
type Header = layout.Header

// FeatureDax is the header's bit of a region that needs its ring; see package
// layout.
const FeatureDax = layout.FeatureDax

// FeatureNoSums is the header's bit of a region without page sums.
const FeatureNoSums = layout.FeatureNoSums

// Geometry is what Format fixes for ever.
type Geometry struct {
	Store      sealfs.UUID
	TableBytes int64 // size of the segment table
	MaxBytes   int64 // largest size at first; 0 for no limit
	NoSums     bool  // pages have no sums; always so if b is Persistent
}

// Options of an open region. Zeros stand for the defaults.
type Options struct {
	// BudgetBytes is how much memory private pages may take before Trim drops
	// clean ones; 0 for no limit.
	BudgetBytes int64
	// MaxBytes is how far the region may grow: 1 TiB by default. A region that
	// is larger already stays so.
	MaxBytes int64
	// GrowBytes is the step of growth, 64 MiB by default.
	GrowBytes int64
}

const (
	defaultMaxBytes  = 1 << 40
	defaultGrowBytes = 64 << 20
	trimBytes        = 8 << 20 // of pages that one Trim drops
	trimScanPages    = 1 << 19 // that one Trim looks at
)

// Region is an open region.
type Region struct {
	b          Backing
	name       string
	pm         *medium // nil if the region is file-backed
	tablePages uint64
	maxPages   uint64
	growBytes  int64
	growLess   bool // in smaller steps while the region is small
	budget     int64

	// The pages of window i are [i<<shift, (i+1)<<shift). pages is stored after
	// the windows it covers, so who has read it may use them.
	pages   atomic.Uint64
	shift   uint
	windows []*window

	// used counts the tree pages of each group, usedTotal all of them. Atomic
	// because NeedsGrowth looks without the latch.
	used      []atomic.Int32
	usedTotal atomic.Int64
	hint      PageNo // no page below it is free, as far as is known

	header  Header // the newest slot's; Update changes in Checkpoint.Finish only
	sums    sums
	set     int    // which dirty set collects
	dirty   int    // pages in it
	farSet  int    // which far set collects
	farDirt int    // pages in it
	private int    // pages stored to since they were last dropped
	hand    PageNo // where Trim goes on

	tx     Tx
	ckpt   Checkpoint
	growMu sync.Mutex
	// cramped says that the medium had no room when the region should grow.
	cramped atomic.Bool
}

// window is a mapped part of the region and what is known of its pages.
type window struct {
	Mapping
	bytes   []byte
	private alloc.Bitmap
	dirty   [2]alloc.Bitmap // one collects, the other is the checkpoint's
	// verified has a bit for each page that was found to fit its sum, or was
	// changed since. Readers set them side by side.
	verified []atomic.Uint32
	far      [2]alloc.Bitmap // the same for copies elsewhere: see FarCopy
}

// Format makes b an empty region: no keys, a table and a state of zeros, start
// LSN 0. What was there is lost. It blocks until the region is durable.
func Format(b Backing, g Geometry) error {
	if g.TableBytes < 0 || g.TableBytes > layout.TableBytesMax {
		return fmt.Errorf("format region %s: table of %d bytes, at most %d: %w",
			b.Name(), g.TableBytes, layout.TableBytesMax, sealfs.ErrInvalid)
	}
	h := Header{Version: layout.Version, Store: g.Store, TableBytes: g.TableBytes}
	if _, ok := b.(Persistent); ok || g.NoSums {
		h.Incompat |= layout.FeatureNoSums
	}
	table := h.TablePages()
	tree := layout.Reserved(0, table)
	need := int64(tree+1) * PageSize
	// Room for the first transactions; the store grows it to its step soon.
	size := need + 4<<20
	if g.MaxBytes > 0 {
		size = min(size, g.MaxBytes/PageSize*PageSize)
	}
	if l, ok := b.(limited); ok {
		if _, most := l.limits(); most > 0 {
			size = min(size, most/PageSize*PageSize)
		}
	}
	if size < need {
		return fmt.Errorf("format region %s: %d bytes are needed, %d allowed: %w",
			b.Name(), need, size, sealfs.ErrNoSpace)
	}
	// First nothing may be believed any more, last everything at once.
	if err := erase(b); err != nil {
		return err
	}
	if err := b.Grow(size); err != nil {
		return err
	}
	h.Pages = uint64(b.Size()) / PageSize
	bitmap := make(alloc.Bitmap, PageSize)
	bitmap.Set(int(tree))
	if err := writePages(b, &h, map[uint64][]byte{
		layout.RootPage:             layout.EncodeRoot(layout.Root{Tree: tree, Pages: 1}),
		layout.BitmapPage(0, table): bitmap,
		tree:                        layout.EncodeTree(),
	}); err != nil {
		return err
	}
	if err := b.Flush(); err != nil {
		return err
	}
	for h.Update = 0; h.Update < 2; h.Update++ {
		if err := writeFull(b, h.Encode(), uint64(layout.Slot(h.Update))); err != nil {
			return err
		}
	}
	return b.Flush()
}

// erase makes all of the medium zeros, and the header slots durably so before
// anything else.
func erase(b Backing) error {
	if s, ok := b.(interface{ shorten() error }); ok {
		return s.shorten()
	}
	const step = 256 * PageSize
	zeros, buf := make([]byte, step), make([]byte, step)
	size := b.Size() / PageSize * PageSize
	if size >= 2*PageSize {
		if err := writeFull(b, zeros[:2*PageSize], 0); err != nil {
			return err
		}
		if err := b.Flush(); err != nil {
			return err
		}
	}
	for off := int64(0); off < size; off += step {
		p := buf[:min(step, size-off)]
		if _, err := b.ReadAt(p, off); err != nil && err != io.EOF {
			return err
		}
		if bytes.Equal(p, zeros[:len(p)]) { // of a sparse medium nothing is filled
			continue
		}
		if err := writeFull(b, zeros[:len(p)], uint64(off)/PageSize); err != nil {
			return err
		}
	}
	return nil
}

// writePages writes the pages of a fresh region, and their sums.
func writePages(b Backing, h *Header, pages map[uint64][]byte) error {
	seed, sums := layout.SumSeed(h.Store), map[uint64][]byte{}
	for _, n := range slices.Sorted(maps.Keys(pages)) {
		p := pages[n]
		if err := writeFull(b, p, n); err != nil {
			return err
		}
		at, off := layout.SumPage(n, h.TablePages())
		if sums[at] == nil {
			sums[at] = make([]byte, PageSize)
		}
		binary.LittleEndian.PutUint32(sums[at][off:], layout.Sum(seed, n, p))
	}
	if h.Incompat&layout.FeatureNoSums != 0 {
		return nil
	}
	for _, n := range slices.Sorted(maps.Keys(sums)) {
		if err := writeFull(b, sums[n], n); err != nil {
			return err
		}
	}
	return nil
}

// writeFull writes pages from page n on.
func writeFull(b Backing, p []byte, n uint64) error {
	got, err := b.WriteAt(p, int64(n)*PageSize)
	if err == nil && got != len(p) {
		err = fmt.Errorf("write region %s: %w", b.Name(), io.ErrShortWrite)
	}
	return err
}

// Open maps the region on b and returns it with its newest valid header. It
// refuses, with a *sealfs.Corruption, a medium without one, or one shorter than
// the header says, with ErrVersion a format it does not know, and with
// ErrNotSupported page sums on persistent memory. The pages may
// be older or newer than the header's start: they are to be used only after the
// log from there has been applied and Recovered has been called. b stays the
// caller's if Open fails, and belongs to the region otherwise. It blocks on the
// medium.
func Open(b Backing, o Options) (*Region, Header, error) {
	h, err := readHeader(b)
	if err != nil {
		return nil, Header{}, err
	}
	size := b.Size()
	if uint64(size) < h.Pages*PageSize {
		return nil, Header{}, &sealfs.Corruption{Where: b.Name(), Off: size,
			What: "the region is shorter than its header says; it was truncated or copied in part",
			Want: h.Pages * PageSize, Got: uint64(size)}
	}
	if uint64(size) < (layout.Reserved(0, h.TablePages())+1)*PageSize {
		return nil, Header{}, &sealfs.Corruption{Where: b.Name(), Off: size,
			What: "the region is too short for its table", Got: uint64(size)}
	}
	r := &Region{
		b: b, name: b.Name(), header: h, tablePages: h.TablePages(),
		budget: o.BudgetBytes, growBytes: o.GrowBytes,
	}
	if r.growBytes <= 0 {
		r.growBytes, r.growLess = defaultGrowBytes, true
	}
	if p, ok := b.(Persistent); ok {
		if err := fitsDax(b.Name(), &h); err != nil {
			return nil, Header{}, err
		}
		r.pm = newMedium(p.Persistence())
	}
	r.growBytes = (r.growBytes + PageSize - 1) / PageSize * PageSize
	most := o.MaxBytes
	if most <= 0 {
		most = defaultMaxBytes
	}
	windowBytes := int64(1 << 30)
	if l, ok := b.(limited); ok {
		w, size := l.limits()
		windowBytes = w
		if size > 0 {
			most = min(most, size)
		}
	}
	r.maxPages = uint64(max(most, size) / PageSize)
	r.shift = uint(bits.TrailingZeros64(uint64(windowBytes / PageSize)))
	r.windows = make([]*window, (r.maxPages+1<<r.shift-1)>>r.shift)
	r.used = make([]atomic.Int32, (r.maxPages+layout.GroupPages-1)/layout.GroupPages)
	r.tx = Tx{r: r, index: make([]indexSlot, 64), gen: 1}
	r.ckpt.r = r
	if err := r.openSums(); err != nil {
		return nil, Header{}, err
	}
	if err := r.mapTo(uint64(size) / PageSize); err != nil {
		r.unmap()
		return nil, Header{}, err
	}
	for g := uint64(0); g*layout.GroupPages < r.pages.Load(); g++ {
		// It may be torn still. What replay changes in it is counted then.
		n := alloc.Bitmap(r.raw(PageNo(layout.BitmapPage(g, r.tablePages)))).Count()
		r.used[g].Store(int32(n))
		r.usedTotal.Add(int64(n))
	}
	return r, h, nil
}

// readHeader returns the newest valid header. One slot may be damaged: a power
// cut can tear the one that was being written.
func readHeader(b Backing) (Header, error) {
	var newest Header
	var found bool
	var first error
	page := make([]byte, PageSize)
	for slot := range 2 {
		n, err := b.ReadAt(page, int64(slot)*PageSize)
		if n < PageSize && err != nil && err != io.EOF {
			return Header{}, err
		}
		h, err := layout.DecodeHeader(b.Name(), slot, page[:n])
		switch {
		case err == nil:
			if !found || h.Update > newest.Update {
				newest, found = h, true
			}
		case !isCorrupt(err):
			return Header{}, err // another version: the other slot is its past
		case first == nil:
			first = err
		}
	}
	if !found {
		return Header{}, first
	}
	return newest, nil
}

func isCorrupt(err error) bool {
	_, ok := err.(*sealfs.Corruption)
	return ok
}

// mapTo maps the windows that pages pages need and makes those pages usable.
// REQUIRES: growMu, but in Open.
func (r *Region) mapTo(pages uint64) error {
	for i := range r.windows {
		if uint64(i)<<r.shift >= pages {
			break
		}
		if r.windows[i] != nil {
			continue
		}
		size := int64(PageSize) << r.shift
		m, err := r.b.Map(int64(i)*size, size)
		if err != nil {
			return err
		}
		w := &window{Mapping: m, bytes: m.Bytes(), private: make(alloc.Bitmap, 1<<r.shift/8+1), verified: make([]atomic.Uint32, 1<<r.shift/32+1)}
		for i := range w.verified {
			if r.sums.off {
				w.verified[i].Store(1<<32 - 1)
			}
		}
		for s := range w.dirty {
			w.dirty[s] = make(alloc.Bitmap, 1<<r.shift/8+1)
			w.far[s] = make(alloc.Bitmap, 1<<r.shift/8+1)
		}
		r.windows[i] = w
	}
	r.pages.Store(pages)
	return nil
}

// mapped returns the windows in use. Only these may be looked at while Grow can
// run.
func (r *Region) mapped() []*window {
	return r.windows[:(r.pages.Load()+1<<r.shift-1)>>r.shift]
}

func (r *Region) unmap() error {
	var first error
	for i, w := range r.windows {
		if w == nil {
			break
		}
		if err := w.Unmap(); err != nil && first == nil {
			first = err
		}
		r.windows[i] = nil
	}
	return first
}

// Close unmaps the region and closes its backing. Changes since the last
// checkpoint are in the caller's log or lost. Nothing may use the region any
// more.
func (r *Region) Close() error {
	r.pages.Store(0)
	err := r.unmap()
	if e := r.b.Close(); err == nil {
		err = e
	}
	return err
}

// Page implements Reader with the committed state. A page that is looked at first
// since it came from the medium is compared with its sum, which may block on the
// medium. REQUIRES: latch.
func (r *Region) Page(n PageNo) ([]byte, error) {
	if uint64(n) >= r.pages.Load() {
		return nil, r.beyond(n)
	}
	w, i := r.windows[n>>r.shift], uint(n&(1<<r.shift-1))
	if w.verified[i/32].Load()>>(i%32)&1 == 0 {
		if err := r.verify(n); err != nil {
			return nil, err
		}
	}
	off := i * PageSize
	return w.bytes[off : off+PageSize : off+PageSize], nil
}

// Find returns which byte of the region stands at an address of the process's
// memory, -1 if none does. No latch is needed.
func (r *Region) Find(addr uintptr) int64 {
	for i, w := range r.mapped() {
		if off := offsetIn(w.bytes, addr); off >= 0 {
			return int64(i)<<r.shift*PageSize + off
		}
	}
	return -1
}

// raw returns the bytes of a page of the region, whatever they are worth.
func (r *Region) raw(n PageNo) []byte {
	w, off := r.windows[n>>r.shift], int(n&(1<<r.shift-1))*PageSize
	return w.bytes[off : off+PageSize : off+PageSize]
}

func (r *Region) beyond(n PageNo) error {
	return &sealfs.Corruption{Where: r.name, Off: -1, What: "page number beyond the region",
		Want: r.pages.Load(), Got: uint64(n)}
}

// Table returns n bytes of the segment table at off, aliasing the region. The
// range must lie in the table and not cross a page. REQUIRES: latch.
func (r *Region) Table(off, n int) ([]byte, error) { return r.table(r, off, n) }

func (r *Region) table(v Reader, off, n int) ([]byte, error) {
	if off < 0 || n < 0 || off > int(r.header.TableBytes)-n || off%PageSize+n > PageSize {
		return nil, fmt.Errorf("table of %s: %d bytes at %d: %w", r.name, n, off, sealfs.ErrInvalid)
	}
	p, err := v.Page(PageNo(layout.TablePage + off/PageSize))
	if err != nil {
		return nil, err
	}
	return p[off%PageSize:][:n], nil
}

// State returns lsfs's 2 KiB of the root page, aliasing the region. REQUIRES:
// latch.
func (r *Region) State() []byte {
	p, err := r.Page(layout.RootPage)
	if err != nil {
		return make([]byte, layout.StateBytes) // after Close, or the page has rotted since Recovered
	}
	return p[layout.StateOff:]
}

// markDirty notes that the page has changed: it differs from its far copy, and
// from the medium's, but on persistent memory, where the page is the medium's.
func (r *Region) markDirty(n PageNo) {
	r.MarkFar(n)
	if r.pm != nil {
		return
	}
	w, i := r.windows[n>>r.shift], int(n&(1<<r.shift-1))
	if !w.dirty[r.set].Get(i) {
		w.dirty[r.set].Set(i)
		r.dirty++
	}
	if !w.private.Get(i) {
		w.private.Set(i)
		r.private++
	}
}

func (r *Region) freePages() int {
	pages := r.pages.Load()
	return int(int64(pages-reservedPages(pages, r.tablePages)) - r.usedTotal.Load())
}

// NeedsGrowth reports whether it is time to call Grow: less than a quarter of a
// step is free, and the region may grow. No latch is needed.
func (r *Region) NeedsGrowth() bool {
	return int64(r.freePages())*PageSize < r.step()/4 && r.pages.Load() < r.maxPages
}

// step is by how much the region grows, in bytes: since a step takes up room on
// its medium at once, no more than a quarter of what the region has.
func (r *Region) step() int64 {
	if !r.growLess {
		return r.growBytes
	}
	return min(r.growBytes, max(4<<20, int64(r.pages.Load())/4*PageSize))
}

// tightPages is how many pages of a region that cannot grow are kept for what
// must not fail.
const tightPages = 256

// Tight reports whether the region cannot grow, since it may not or its medium
// is full, and has hardly a page left. No latch is needed.
func (r *Region) Tight() bool {
	pages := r.pages.Load()
	return (pages >= r.maxPages || r.cramped.Load()) && int64(r.freePages()) < min(tightPages, int64(pages)/16)
}

// Grow makes the region a step larger, or as large as it may become; ErrNoSpace
// if it is that already. No latch is needed; it may block on the medium.
func (r *Region) Grow() error {
	r.growMu.Lock()
	defer r.growMu.Unlock()
	return r.grow(int64(r.pages.Load())*PageSize + 1)
}

// growTo makes the region at least size bytes large.
func (r *Region) growTo(size int64) error {
	r.growMu.Lock()
	defer r.growMu.Unlock()
	return r.grow(size)
}

// grow makes the region at least size bytes, in steps. REQUIRES: growMu.
func (r *Region) grow(size int64) error {
	old := int64(r.pages.Load()) * PageSize
	if size <= old {
		return nil
	}
	most := int64(r.maxPages) * PageSize
	if size > most {
		return fmt.Errorf("region %s has its largest size, %d bytes: %w", r.name, most, sealfs.ErrNoSpace)
	}
	step := r.step()
	size = old + (size-old+step-1)/step*step
	size = min(size, most)
	err := r.b.Grow(size)
	r.cramped.Store(errors.Is(err, sealfs.ErrNoSpace))
	if err != nil {
		return err
	}
	return r.mapTo(uint64(size) / PageSize)
}

// Usage is an account of a region's pages.
type Usage struct {
	Pages    uint64 `json:"pages"`          // all pages of the region
	Reserved uint64 `json:"reserved_pages"` // headers, intent, root, table, bitmaps, sums
	Used     uint64 `json:"used_pages"`     // tree pages
	Free     uint64 `json:"free_pages"`
	MaxPages uint64 `json:"max_pages"`       // size beyond which it does not grow
	Keys     uint64 `json:"keys"`            // in the tree
	Dirty    uint64 `json:"dirty_pages"`     // changed since the last checkpoint began
	FarDirty uint64 `json:"far_dirty_pages"` // changed since the last FarCopy began
	Private  uint64 `json:"private_pages"`   // in memory of the process's own: changed since they were last dropped
}

// PrivateBytes is the memory that private pages take.
func (u Usage) PrivateBytes() int64 { return int64(u.Private) * PageSize }

// Usage returns the account of the committed state. REQUIRES: latch.
func (r *Region) Usage() Usage {
	u := r.Counts()
	if p, err := r.Page(layout.RootPage); err == nil {
		if root, err := layout.DecodeRoot(r.name, p); err == nil {
			u.Keys = root.Keys
		}
	}
	return u
}

// Counts is Usage without the number of keys: no page is looked at for it.
// REQUIRES: latch.
func (r *Region) Counts() Usage {
	pages := r.pages.Load()
	return Usage{
		Pages: pages, Reserved: reservedPages(pages, r.tablePages), MaxPages: r.maxPages,
		Used: uint64(max(r.usedTotal.Load(), 0)), Free: uint64(max(r.freePages(), 0)),
		Dirty: uint64(r.dirty), FarDirty: uint64(r.farDirt), Private: uint64(r.private),
	}
}

// Trim drops clean private pages while they take more memory than the budget,
// at most 8 MiB of them per call.
// REQUIRES: exclusive latch.
func (r *Region) Trim() error {
	excess := r.private - int(r.budget/PageSize)
	if r.budget <= 0 || excess <= 0 {
		return nil
	}
	todo := min(excess, trimBytes/PageSize)
	pages := PageNo(r.pages.Load())
	busy := r.ckpt.active && !r.ckpt.done.Load()
	for scanned := PageNo(0); todo > 0 && scanned < min(pages, trimScanPages); {
		if r.hand >= pages {
			r.hand = 0
		}
		w, i := r.windows[r.hand>>r.shift], int(r.hand&(1<<r.shift-1))
		end := min(1<<r.shift, i+int(pages-r.hand))
		clean := func(i int) bool {
			return w.private.Get(i) && !w.dirty[r.set].Get(i) && !(busy && w.dirty[1-r.set].Get(i))
		}
		// One run of private pages, as far as it is clean.
		lo := w.private.NextSet(i, end)
		if lo < 0 {
			lo = end
		}
		hi := lo
		for hi < end && hi-lo < todo && clean(hi) {
			hi++
		}
		if hi > lo {
			if err := w.Drop(int64(lo)*PageSize, int64(hi-lo)*PageSize); err != nil {
				return err
			}
			for j := lo; j < hi; j++ {
				w.private.Clear(j)
				if !r.sums.off {
					w.verified[j/32].And(^uint32(1 << (j % 32)))
				}
			}
			r.private -= hi - lo
			todo -= hi - lo
		} else if lo < end {
			hi++ // dirty: step over it
		}
		scanned += PageNo(hi - i)
		r.hand += PageNo(hi - i)
	}
	return nil
}
