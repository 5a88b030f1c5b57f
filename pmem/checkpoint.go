package pmem

import (
	"fmt"
	"sync/atomic"

	"sealfs"
	"sealfs/pmem/layout"
)

// batchPages is how many pages a checkpoint copies at a time, so that the latch
// is held for about a millisecond.
const batchPages = 1024

// Checkpoint brings the pages that were dirty at one moment to the medium. The
// caller's part is the order:
//
//	exclusive latch   note the log's end as the new start; BeginCheckpoint
//	repeat:
//	  shared latch    more = Copy; note the log's end
//	  no latch        make the log durable up to there; Write
//	until not more
//	no latch          Finish with the new start
//
// A copied page may hold changes later than the start: their redo must be
// durable before the page is. After an error of Write or Finish: Abandon.
type Checkpoint struct {
	r      *Region
	set    int
	active bool        // begun, and its set not yet cleared
	done   atomic.Bool // finished: its set means nothing any more
	next   PageNo      // first page that Copy has not looked at
	end    PageNo
	batch  []byte
	nos    []PageNo // of the pages in batch
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
	r.set, r.dirty = 1-r.set, 0
	if r.pm != nil {
		c.next = c.end // the pages are on the medium already
		return c
	}
	if c.batch == nil {
		c.batch = make([]byte, batchPages*PageSize)
	}
	return c
}

// Copy copies the next batch of pages, in ascending order, and reports whether
// more are left. REQUIRES: latch, shared; the last batch has been written.
func (c *Checkpoint) Copy() (more bool) {
	c.nos = c.nos[:0]
	for c.next < c.end && len(c.nos) < len(c.batch)/PageSize {
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

// Write writes the batch that Copy made. It needs no latch and blocks on the
// medium; the pages are not durable yet.
func (c *Checkpoint) Write() error {
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
	c.nos = c.nos[:0]
	return nil
}

// Finish makes the pages durable, and then, in the older slot, a header with
// h's incarnation, start, start slot, chain and FeatureDax; the rest of h is the
// region's own. When it returns nil, a replay may begin at h.Start. It needs no latch.
func (c *Checkpoint) Finish(h Header) error {
	if !c.active || c.done.Load() || c.next < c.end || len(c.nos) > 0 {
		return fmt.Errorf("checkpoint of region %s has not been written: %w", c.r.name, sealfs.ErrInvalid)
	}
	if err := c.r.PutHeader(h); err != nil {
		return err
	}
	c.done.Store(true)
	return nil
}

// PutHeader writes a header as Finish does, after what the medium has been given
// until now. It is not called beside a Finish, and needs no latch.
func (r *Region) PutHeader(h Header) error {
	// Before the flush, so that the file's size is durable with what it covers.
	pages := r.pages.Load()
	if err := r.order(); err != nil {
		return err
	}
	old := &r.header
	h.Version, h.Compat = layout.Version, old.Compat
	h.Incompat = old.Incompat&^layout.FeatureDax | h.Incompat&layout.FeatureDax
	h.Store, h.TableBytes = old.Store, old.TableBytes
	h.Update, h.Pages = old.Update+1, pages
	n := PageNo(layout.Slot(h.Update))
	if r.pm != nil {
		r.pm.store(r.windows[0].bytes[n*PageSize:][:PageSize], h.Encode())
	} else if err := writeFull(r.b, h.Encode(), uint64(n)); err != nil {
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
