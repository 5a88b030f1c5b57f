package pmem

import (
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"sync"

	"sealfs"
	"sealfs/pmem/layout"
)

// sums is what a region knows of the sums of its pages. The sums themselves stand
// on the medium only, where a checkpoint changes them: a page that is in memory
// as the medium has it, and so may have to be compared, is never one of those
// that a checkpoint is writing.
type sums struct {
	off   bool   // the region has none
	seed  uint32 // of all of them
	tried uint64 // highest update counter of a header whose writing was begun
	// healing says that a checkpoint was writing when the region was left, and
	// that its log has not been applied yet: a page may be torn.
	healing   bool
	recovered bool
	// rotten holds pages that redo should have changed and could not, because they
	// did not fit their sums: they must not be believed even if they fit later.
	// Changed by recovery only.
	rotten map[PageNo]struct{}
	fixed  sync.Mutex // held while header slots or the intent page are written
}

// openSums reads the intent page. What it says counts only if it is sound: a
// power cut leaves it whole.
func (r *Region) openSums() error {
	r.sums.off = r.header.Incompat&layout.FeatureNoSums != 0
	r.sums.seed = layout.SumSeed(r.header.Store)
	if r.sums.off {
		return nil
	}
	p := make([]byte, PageSize)
	if err := readFull(r.b, p, layout.IntentPage); err != nil {
		return err
	}
	if update, err := layout.DecodeIntent(r.name, r.header.Store, p); err == nil {
		r.sums.healing = update > r.header.Update
	}
	return nil
}

// readFull reads whole pages from page n on. What lies beyond the medium's end
// is zeros.
func readFull(b Backing, p []byte, n uint64) error {
	got, err := b.ReadAt(p, int64(n)*PageSize)
	if err != nil && err != io.EOF {
		return err
	}
	clear(p[got:])
	return nil
}

func (r *Region) isVerified(n PageNo) bool {
	w, i := r.windows[n>>r.shift], uint(n&(1<<r.shift-1))
	return w.verified[i/32].Load()>>(i%32)&1 != 0
}

func (r *Region) setVerified(n PageNo) {
	w, i := r.windows[n>>r.shift], uint(n&(1<<r.shift-1))
	w.verified[i/32].Or(1 << (i % 32))
}

// sumBufs keeps verify from allocating: what is given to a Backing escapes.
var sumBufs = sync.Pool{New: func() any { return new([layout.SumBytes]byte) }}

// storedSum reads the sum of page n from the medium.
func (r *Region) storedSum(n PageNo) (uint32, error) {
	page, off := layout.SumPage(uint64(n), r.tablePages)
	b := sumBufs.Get().(*[layout.SumBytes]byte)
	defer sumBufs.Put(b)
	got, err := r.b.ReadAt(b[:], int64(page)*PageSize+int64(off))
	if err != nil && err != io.EOF {
		return 0, err
	}
	if got < len(b) { // the region ends before it
		return layout.SumNone, nil
	}
	return binary.LittleEndian.Uint32(b[:]), nil
}

// verify compares a page with its sum and notes that they fit. Readers may come
// together to the same page.
func (r *Region) verify(n PageNo) error {
	if _, rotten := r.sums.rotten[n]; rotten {
		return r.corrupt(n, "page did not fit its sum when it was to be changed", 0, 0)
	}
	if layout.HasSum(uint64(n), r.tablePages) {
		stored, err := r.storedSum(n)
		if err != nil {
			return err
		}
		if what, got := layout.SumFault(r.sums.seed, uint64(n), r.raw(n), stored); what != "" {
			return r.corrupt(n, what, stored, got)
		}
	}
	r.setVerified(n)
	return nil
}

func (r *Region) corrupt(n PageNo, what string, want, got uint32) error {
	return &sealfs.Corruption{Where: r.name, Off: int64(n) * PageSize, What: what, Want: uint64(want), Got: uint64(got)}
}

// admit decides about a page that redo is to change and that was not looked at
// yet: whether redo is applied. REQUIRES: exclusive latch.
func (r *Region) admit(n PageNo) (use bool, err error) {
	err = r.verify(n)
	switch {
	case err == nil:
		return true, nil
	case !isCorrupt(err) || r.sums.recovered:
		return false, err
	}
	if r.sums.healing {
		stored, err := r.storedSum(n)
		if err != nil {
			return false, err
		}
		if stored != layout.SumLost {
			r.setVerified(n) // torn: its redo has all that was being written
			return true, nil
		}
	}
	if r.sums.rotten == nil {
		r.sums.rotten = map[PageNo]struct{}{}
	}
	r.sums.rotten[n] = struct{}{}
	return false, nil
}

// Recovered ends the recovery that Open began: all redo from the header's start
// has been applied, and from now on a page that does not fit its sum has rotted.
// It returns the rotten pages of the tree that recovery met, ascending; they are
// given up durably, since they lack redo that the next recovery will not see.
//
// If what everything depends on has rotted (root page, table, a bitmap), the
// error is a *sealfs.Corruption, with the way out in its text, and the region is
// of no use. It may block on the medium. REQUIRES: exclusive latch.
func (r *Region) Recovered() (rotten []PageNo, err error) {
	r.sums.recovered = true
	check := func(n uint64, kind string) error {
		if _, err := r.Page(PageNo(n)); err != nil {
			return fmt.Errorf("the %s of the region cannot be used, page %d: %w; sealfs-fsck --rebuild-region makes a new region from the device", kind, n, err)
		}
		return nil
	}
	if err := check(layout.RootPage, "root page"); err != nil {
		return nil, err
	}
	for n := range r.tablePages {
		if err := check(layout.TablePage+n, "segment table"); err != nil {
			return nil, err
		}
	}
	for g := uint64(0); g*layout.GroupPages < r.pages.Load(); g++ {
		if err := check(layout.BitmapPage(g, r.tablePages), "page bitmap"); err != nil {
			return nil, err
		}
	}
	for n := range r.sums.rotten {
		rotten = append(rotten, n)
	}
	slices.Sort(rotten)
	if len(rotten) == 0 {
		return nil, nil
	}
	// Before the next checkpoint says that pages may be torn: a power cut in it
	// must not make these pages look like it.
	var w sumWriter
	for _, n := range rotten {
		if err := w.put(r, n, layout.SumLost); err != nil {
			return nil, err
		}
	}
	if err := w.flush(r); err != nil {
		return nil, err
	}
	return rotten, r.b.Flush()
}

// sumWriter changes sums on the medium, given in the order of their pages, by
// reading and writing each sum page once.
type sumWriter struct {
	page [PageSize]byte
	no   uint64 // of page; 0: none
}

func (w *sumWriter) put(r *Region, n PageNo, sum uint32) error {
	page, off := layout.SumPage(uint64(n), r.tablePages)
	if page != w.no {
		if err := w.flush(r); err != nil {
			return err
		}
		if err := readFull(r.b, w.page[:], page); err != nil {
			return err
		}
		w.no = page
	}
	binary.LittleEndian.PutUint32(w.page[off:], sum)
	return nil
}

func (w *sumWriter) flush(r *Region) error {
	if w.no == 0 {
		return nil
	}
	no := w.no
	w.no = 0
	return writeFull(r.b, w.page[:], no)
}

// scanPages is how many pages VerifyAll reads at a time, of one sum page.
const scanPages = 256

// VerifyAll reads the whole region from the medium, not from memory, and calls
// bad for everything that does not fit its sum or its place, in ascending order:
// header slots, intent, pages, and sums where there should be none. Pages that a
// checkpoint will write anew are passed over, as far as they do not fit. Of a region
// without sums only the header slots can be judged; all of it is read.
//
// It reads without the latch, and then calls pace with the number of bytes read;
// an error from that ends the walk and is returned, as is an error of the medium.
// latch is the latch's shared side; it is taken for single pages only, to be sure
// of one that looked bad. The region must not be closed meanwhile.
func (r *Region) VerifyAll(latch sync.Locker, pace func(bytes int) error, bad func(*sealfs.Corruption)) error {
	buf, sums := make([]byte, scanPages*PageSize), make([]byte, PageSize)
	if err := r.verifyFixed(buf[:PageSize], bad); err != nil {
		return err
	}
	if r.sums.off { // whether the medium can read it
		for n := uint64(0); n < r.pages.Load(); n += scanPages {
			if err := readFull(r.b, buf, n); err != nil {
				return err
			}
			if err := pace(len(buf)); err != nil {
				return err
			}
		}
		return nil
	}
	// Up to the end of the last group: there may be sums of pages beyond the region.
	for n := uint64(0); n < r.pages.Load() || n%layout.GroupPages != 0; n += scanPages {
		if n < r.pages.Load() {
			if err := readFull(r.b, buf, n); err != nil {
				return err
			}
		}
		at, off := layout.SumPage(n, r.tablePages)
		if err := readFull(r.b, sums, at); err != nil {
			return err
		}
		for i := range scanPages {
			no := n + uint64(i)
			stored := binary.LittleEndian.Uint32(sums[off+i*layout.SumBytes:])
			if r.mediumFault(no, buf[i*PageSize:(i+1)*PageSize], stored) == nil {
				continue
			}
			latch.Lock()
			fault, err := r.suspect(PageNo(no))
			latch.Unlock()
			if err != nil {
				return err
			}
			if fault != nil {
				bad(fault)
			}
		}
		if n < r.pages.Load() {
			if err := pace(scanPages * PageSize); err != nil {
				return err
			}
		}
	}
	return nil
}

// mediumFault compares a page's bytes on the medium with the sum that is stored
// for it there.
func (r *Region) mediumFault(n uint64, p []byte, stored uint32) *sealfs.Corruption {
	if n >= r.pages.Load() || !layout.HasSum(n, r.tablePages) {
		if stored == layout.SumNone {
			return nil
		}
		at, off := layout.SumPage(n, r.tablePages)
		return &sealfs.Corruption{Where: r.name, Off: int64(at)*PageSize + int64(off),
			What: fmt.Sprintf("a sum for page %d, which has none", n), Got: uint64(stored)}
	}
	what, got := layout.SumFault(r.sums.seed, n, p, stored)
	if what == "" {
		return nil
	}
	return &sealfs.Corruption{Where: r.name, Off: int64(n) * PageSize, What: what, Want: uint64(stored), Got: uint64(got)}
}

// suspect looks again at a page that does not seem to fit its sum on the medium.
// What is dirty is being written or will be; what is not stays as it is on the
// medium while the latch is held. REQUIRES: latch, shared.
func (r *Region) suspect(n PageNo) (*sealfs.Corruption, error) {
	if uint64(n) < r.pages.Load() {
		w, i := r.windows[n>>r.shift], int(n&(1<<r.shift-1))
		busy := r.ckpt.active && !r.ckpt.done.Load()
		if w.dirty[r.set].Get(i) || busy && w.dirty[1-r.set].Get(i) {
			return nil, nil
		}
	}
	p := make([]byte, PageSize)
	if err := readFull(r.b, p, uint64(n)); err != nil {
		return nil, err
	}
	stored, err := r.storedSum(n)
	if err != nil {
		return nil, err
	}
	return r.mediumFault(uint64(n), p, stored), nil
}

// verifyFixed looks at the pages that have no sum, but a checksum of their own.
func (r *Region) verifyFixed(p []byte, bad func(*sealfs.Corruption)) error {
	r.sums.fixed.Lock()
	defer r.sums.fixed.Unlock()
	for n := range uint64(layout.RootPage) {
		if err := readFull(r.b, p, n); err != nil {
			return err
		}
		var err error
		if n == layout.IntentPage {
			if r.sums.off {
				continue
			}
			_, err = layout.DecodeIntent(r.name, r.header.Store, p)
		} else {
			_, err = layout.DecodeHeader(r.name, int(n), p)
		}
		if c, ok := err.(*sealfs.Corruption); ok {
			bad(c)
		}
	}
	return nil
}
