package pmem

import (
	"fmt"
	"sync/atomic"

	"sealfs"
	"sealfs/pmem/layout"
)

// batchPages is how many pages a checkpoint writes at a time, copyPages how many
// it copies under the latch at a time: that takes some 50 µs.
const (
	batchPages = 1024
	copyPages  = 64
)

// Checkpoint brings the pages that were dirty at one moment to the medium. The
// caller's part is the order:
//
//	exclusive latch   note the log's end as the new start; BeginCheckpoint
//	repeat:
//	  until Full or not more: shared latch    more = Copy; note the log's end
//	  no latch        make the log durable up to there; Write
//	until not more
//	no latch          Finish with the new start
//
// A copied page may hold changes later than the start: their redo must be
// durable before the page is. After an error of Write or Finish: Abandon.
//
// Before its first page a checkpoint makes the intent durable that says so: only
// while there is one may a page not fit its sum.
type Checkpoint struct {
	r      *Region
	set    int
	active bool        // begun, and its set not yet cleared
	done   atomic.Bool // finished: its set means nothing any more
	next   PageNo      // first page that Copy has not looked at
	end    PageNo
	batch  []byte
	nos    []PageNo // of the pages in batch

	update    uint64 // counter of the header that ends it
	announced bool   // the intent is durable
	sums      sumWriter
}

// BeginCheckpoint starts a checkpoint of the pages that are dirty now; those
// changed from now on are the next one's. One that was not finished is
// abandoned. In the steady state it allocates nothing. REQUIRES: exclusive latch.
func (r *Region) BeginCheckpoint() *Checkpoint {
	c := &r.ckpt
	c.Abandon()
	c.set, c.active = r.set, true
	c.done.Store(false)
	c.next, c.end = 0, PageNo(r.pages.Load())
	c.nos = c.nos[:0]
	c.announced, c.sums.no = false, 0
	c.update = r.nextUpdate()
	r.set, r.dirty = 1-r.set, 0
	if r.pm != nil {
		c.next = c.end // the pages are on the medium already
		return c
	}
	if c.batch == nil {
		c.batch = make([]byte, min(batchPages, int(c.end))*PageSize)
	}
	return c
}

// Full reports whether the batch must be written before more is copied.
func (c *Checkpoint) Full() bool { return len(c.nos) > 0 && len(c.nos) == len(c.batch)/PageSize }

// Copy copies some more pages into the batch, in ascending order, and reports
// whether more are left. REQUIRES: latch, shared.
func (c *Checkpoint) Copy() (more bool) {
	upto := min(len(c.nos)+copyPages, len(c.batch)/PageSize)
	for c.next < c.end && len(c.nos) < upto {
		w, base := c.r.windows[c.next>>c.r.shift], c.next>>c.r.shift<<c.r.shift
		limit := int(min(c.end-base, 1<<c.r.shift))
		i := w.dirty[c.set].NextSet(int(c.next-base), limit)
		if i < 0 {
			c.next = base + PageNo(limit)
			continue
		}
		copy(c.batch[len(c.nos)*PageSize:], w.bytes[i*PageSize:(i+1)*PageSize])
		c.nos = append(c.nos, base+PageNo(i))
		c.next = base + PageNo(i) + 1
	}
	return c.next < c.end
}

// Write writes the batch that Copy made, with the sums of its pages, and begins a
// new one. It needs no latch and blocks on the medium; the pages are not durable yet.
func (c *Checkpoint) Write() error {
	if len(c.nos) > 0 && !c.announced && !c.r.sums.off {
		if err := c.announce(); err != nil {
			return err
		}
	}
	for i := 0; i < len(c.nos); {
		j := i + 1
		for j < len(c.nos) && c.nos[j] == c.nos[j-1]+1 {
			j++
		}
		if err := writeFull(c.r.b, c.batch[i*PageSize:j*PageSize], uint64(c.nos[i])); err != nil {
			return err
		}
		i = j
	}
	if !c.r.sums.off {
		for i, n := range c.nos {
			sum := layout.Sum(c.r.sums.seed, uint64(n), c.batch[i*PageSize:(i+1)*PageSize])
			if err := c.sums.put(c.r, n, sum); err != nil {
				return err
			}
		}
		if err := c.sums.flush(c.r); err != nil {
			return err
		}
	}
	c.nos = c.nos[:0]
	return nil
}

// announce makes the intent durable.
func (c *Checkpoint) announce() error {
	c.r.sums.fixed.Lock()
	err := writeFull(c.r.b, layout.EncodeIntent(c.r.header.Store, c.update), layout.IntentPage)
	c.r.sums.fixed.Unlock()
	if err == nil {
		err = c.r.b.Flush()
	}
	c.announced = err == nil
	return err
}

// Finish makes the pages durable, and then, in the older slot, a header with
// h's incarnation, start, start slot, chain and FeatureDax; the rest of h is the
// region's own. When it returns nil, a replay may begin at h.Start. It needs no latch.
func (c *Checkpoint) Finish(h Header) error {
	if !c.active || c.done.Load() || c.next < c.end || len(c.nos) > 0 {
		return fmt.Errorf("checkpoint of region %s has not been written: %w", c.r.name, sealfs.ErrInvalid)
	}
	if err := c.r.putHeader(h, c.update); err != nil {
		return err
	}
	c.done.Store(true)
	return nil
}

// PutHeader writes a header as Finish does, after what the medium has been given
// until now. It is not called beside a Finish, and needs no latch.
func (r *Region) PutHeader(h Header) error { return r.putHeader(h, r.nextUpdate()) }

// nextUpdate returns the counter of the next header. One that failed may be there
// or not: its counter is not used again, or it would void an intent that is not its
// own; its slot is.
func (r *Region) nextUpdate() uint64 {
	update := r.header.Update + 1
	for update <= r.sums.tried {
		update += 2
	}
	return update
}

func (r *Region) putHeader(h Header, update uint64) error {
	// Before the flush, so that the file's size is durable with what it covers.
	pages := r.pages.Load()
	if err := r.order(); err != nil {
		return err
	}
	old := &r.header
	h.Version, h.Compat = layout.Version, old.Compat
	h.Incompat = old.Incompat&^layout.FeatureDax | h.Incompat&layout.FeatureDax
	h.Store, h.TableBytes = old.Store, old.TableBytes
	h.Update, h.Pages = update, pages
	r.sums.tried = update
	n := PageNo(layout.Slot(update))
	r.sums.fixed.Lock()
	var err error
	if r.pm != nil {
		r.pm.store(r.windows[0].bytes[n*PageSize:][:PageSize], h.Encode())
	} else {
		err = writeFull(r.b, h.Encode(), uint64(n))
	}
	r.sums.fixed.Unlock()
	if err != nil {
		return err
	}
	if err := r.order(); err != nil {
		return err
	}
	old.Update, old.Incompat = h.Update, h.Incompat
	return nil
}

// order makes durable what the medium has been given until now.
func (r *Region) order() error {
	if r.pm != nil {
		r.pm.fence()
		return nil
	}
	return r.b.Flush()
}

// Abandon ends a checkpoint that failed: its pages are dirty again. Of one that
// is finished it only clears what it remembers. REQUIRES: exclusive latch.
func (c *Checkpoint) Abandon() {
	if !c.active {
		return
	}
	c.active = false
	for _, w := range c.r.mapped() {
		if !c.done.Load() {
			for i := w.dirty[c.set].NextSet(0, 1<<c.r.shift); i >= 0; i = w.dirty[c.set].NextSet(i+1, 1<<c.r.shift) {
				if cur := w.dirty[c.r.set]; !cur.Get(i) {
					cur.Set(i)
					c.r.dirty++
				}
			}
		}
		clear(w.dirty[c.set])
	}
}
