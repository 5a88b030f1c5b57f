package fsck

import (
	"errors"
	"fmt"
	"io"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	pmlayout "sealfs/pmem/layout"
)

// superblocks is pass 1: both copies, and the geometry against the device.
func (c *checker) superblocks() error {
	var copies [2]*layout.Superblock
	var faults [2]error
	for i := range copies {
		b := disk.AlignedBuffer(layout.BlockSize)
		off := int64(i) * layout.BlockSize
		n, err := c.dev.ReadAt(b, off)
		if err == nil || err == io.EOF {
			copies[i], err = layout.DecodeSuperblock(b[:n], c.dev.Name(), off)
		}
		if errors.Is(err, sealfs.ErrVersion) {
			return err
		}
		faults[i] = err
	}
	a, b := copies[0], copies[1]
	switch {
	case a == nil && b == nil:
		detail := faults[0].Error()
		if sig, err := disk.ProbeDevice(c.dev); err == nil && sig.Kind != "" {
			detail = fmt.Sprintf("it holds %v", sig)
		}
		c.problem(SuperLost, c.dev.Name(), "%s", detail)
		return nil
	case a == nil || b == nil:
		c.sb = a
		bad := 1
		if a == nil {
			c.sb, bad = b, 0
		}
		found := c.problem(SuperCopy, fmt.Sprintf("%s, copy %d", c.dev.Name(), bad), "%v", faults[bad])
		c.planSuper(found, bad)
	default:
		c.sb = a
		older := b
		if b.Update > a.Update {
			c.sb, older = b, a
		}
		c.compareSupers(a, b, older)
	}
	sb := c.sb
	c.rep.Store, c.rep.Cluster, c.rep.Label, c.rep.Segments = sb.Store, sb.Cluster, sb.Label, sb.Segments
	if size := c.dev.Size(); size < sb.End() || size < sb.DeviceBytes {
		c.problem(DeviceShort, c.dev.Name(), "%d bytes, %d when it was formatted", size, sb.DeviceBytes)
	}
	if c.o.Verbose {
		c.say("store %v %q, incarnation %d, %d segments of %d bytes", sb.Store, sb.Label, sb.Incarnation, sb.Segments, sb.SegmentBytes)
	}
	return nil
}

// compareSupers reports what two sound copies contradict each other in. They
// are written in turn, so the one is the state before the other.
func (c *checker) compareSupers(a, b, older *layout.Superblock) {
	newer := c.sb
	what := ""
	switch {
	case a.Store != b.Store:
		what = fmt.Sprintf("store %v and store %v", a.Store, b.Store)
	case a.SegmentBytes != b.SegmentBytes || a.Segments != b.Segments || a.DeviceBytes != b.DeviceBytes || a.Created != b.Created:
		what = "their geometries differ"
	case a.Update%2 != 0 || b.Update%2 != 1:
		what = fmt.Sprintf("updates %d and %d do not stand in their places", a.Update, b.Update)
	case newer.Update != older.Update+1:
		what = fmt.Sprintf("updates %d and %d do not follow each other", older.Update, newer.Update)
	case newer.Incarnation < older.Incarnation || newer.Tail < older.Tail:
		what = "the newer one is behind the older one"
	}
	if what != "" {
		c.problem(SuperDisagree, c.dev.Name(), "%s", what)
	}
}

// planSuper plans to write the damaged copy as the one before the sound one, so
// that the next update goes to its place.
func (c *checker) planSuper(found, bad int) {
	again := *c.sb
	again.Update--
	if again.Update%2 != uint64(bad) || c.sb.Update == 0 || c.sb.ROCompat != 0 {
		return // the sound copy stands in the wrong place, or must not be written by this program
	}
	c.plan(SuperCopy, found, fmt.Sprintf("copy %d of the superblock of %s is written from the other", bad, c.dev.Name()), func() error {
		if _, err := c.dev.WriteAt(again.Encode(), int64(bad)*layout.BlockSize); err != nil {
			return err
		}
		return c.dev.Flush()
	})
}

// regionHeader is pass 2: both header slots, the region's belonging to the
// device, and the intent page.
func (c *checker) regionHeader() error {
	var slots [2]*pmlayout.Header
	var faults [2]error
	for i := range slots {
		b := make([]byte, pmlayout.PageSize)
		n, err := c.reg.ReadAt(b, int64(i)*pmlayout.PageSize)
		if err == nil || err == io.EOF {
			var h pmlayout.Header
			if h, err = pmlayout.DecodeHeader(c.reg.Name(), i, b[:n]); err == nil {
				slots[i] = &h
			}
		}
		if errors.Is(err, sealfs.ErrVersion) {
			return err
		}
		faults[i] = err
	}
	a, b := slots[0], slots[1]
	switch {
	case a == nil && b == nil:
		c.problem(RegionLost, c.reg.Name(), "%v", faults[0])
		return nil
	case a == nil || b == nil:
		good, bad := a, 1
		if a == nil {
			good, bad = b, 0
		}
		c.hdr = *good
		found := c.problem(RegionSlot, fmt.Sprintf("%s, slot %d", c.reg.Name(), bad), "%v", faults[bad])
		c.planSlot(found, bad)
	default:
		newer, older := a, b
		if b.Update > a.Update {
			newer, older = b, a
		}
		c.hdr = *newer
		switch {
		case a.Store != b.Store || a.TableBytes != b.TableBytes:
			c.problem(RegionDisagree, c.reg.Name(), "they belong to different regions")
		case newer.Update != older.Update+1:
			c.problem(RegionDisagree, c.reg.Name(), "updates %d and %d do not follow each other", older.Update, newer.Update)
		case newer.Start < older.Start || newer.Incarnation < older.Incarnation || newer.Pages < older.Pages:
			c.problem(RegionDisagree, c.reg.Name(), "the newer one is behind the older one")
		}
	}
	c.belongs()
	if c.rep.Counts[RegionForeign] > 0 {
		return nil // so are its sums
	}
	return c.intent()
}

// belongs compares the region's header with the device.
func (c *checker) belongs() {
	h, sb := &c.hdr, c.sb
	where := c.reg.Name()
	if h.Store != sb.Store {
		c.problem(RegionForeign, where, "it is of store %v, %s is store %v", h.Store, c.dev.Name(), sb.Store)
		return
	}
	if h.TableBytes != int64(sb.Segments)*entryBytes {
		c.problem(RegionTable, where, "%d bytes for %d segments", h.TableBytes, sb.Segments)
	}
	least := max(h.Pages, pmlayout.Reserved(0, h.TablePages())+1)
	if size := c.reg.Size(); uint64(size)/pmlayout.PageSize < least {
		c.problem(RegionShort, where, "%d bytes, %d are needed", size, least*pmlayout.PageSize)
	}
	switch {
	case h.Start < sb.Tail:
		other := ""
		if c.rep.Counts[RegionSlot] > 0 {
			other = "; the damaged header slot was the newer one"
		}
		c.problem(RegionStale, where, "checkpoint at %v, the log's tail on %s is %v%s", h.Start, c.dev.Name(), sb.Tail, other)
	case uint64(h.Incarnation) > uint64(sb.Incarnation)+1:
		// A recovery writes the region's header before the superblock.
		c.problem(DeviceStale, c.dev.Name(), "incarnation %d, the region %s has seen incarnation %d", sb.Incarnation, where, h.Incarnation)
	}
}

// planSlot plans to write the damaged header slot as the update before the
// sound one: a replay from the same start is right.
func (c *checker) planSlot(found, bad int) {
	again := c.hdr
	again.Update--
	w, ok := c.reg.(Writer)
	if !ok || c.hdr.Update == 0 || c.hdr.Compat != 0 || pmlayout.Slot(again.Update) != bad {
		return
	}
	c.plan(RegionSlot, found, fmt.Sprintf("header slot %d of %s is written from the other", bad, c.reg.Name()), func() error {
		if _, err := w.WriteAt(again.Encode(), int64(bad)*pmlayout.PageSize); err != nil {
			return err
		}
		return w.Flush()
	})
}
