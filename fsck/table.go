package fsck

import (
	"encoding/binary"
	"fmt"
	"io"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	pmlayout "sealfs/pmem/layout"
)

// The segment table, 32 bytes a slot:
//
//	off size field
//	  0    4 seq    of the segment in the slot, 0 if the slot is free
//	  4    1 state  0 free, 1 open, 2 sealed
//	  5    1 kind   as in the segment's header
//	  6    2 zero
//	  8    4 live   bytes of payload that are referenced
//	 12    4 used   bytes written, when sealed
//	 16    8 time   when it was sealed, in nanoseconds since 1970
//	 24    4 live bytes of a cold segment when it was sealed
//	 28    4 zero
const entryBytes = 32

// States of a segment.
const (
	slotFree   = 0
	slotOpen   = 1
	slotSealed = 2
)

// segment is a decoded entry; damaged ones are kept as free.
type segment struct {
	seq        uint32
	state      uint8
	kind       layout.SegmentKind
	live, used uint32
}

// limit returns the end of what may have been written to the segment.
func (c *checker) limit(slot uint32) uint32 {
	g := &c.segs[slot]
	switch {
	case g.state == slotSealed:
		return g.used
	case g.kind == layout.Hot && slot == c.end.slot:
		return c.end.lsn.Off()
	}
	return c.sb.SegmentBytes
}

// table reads the segment table and compares it with the segments.
func (c *checker) table() error {
	where := c.reg.Name() + ", segment table"
	c.segs = make([]segment, c.sb.Segments)
	c.slotOf = map[uint32]uint32{}
	state, err := c.img.state()
	if err != nil {
		c.problem(TableEntry, where, "%v", err)
		c.tableHoles = true
		return nil
	}
	nextSeq := binary.LittleEndian.Uint32(state)
	startable := false
	for slot := range c.segs {
		off := slot * entryBytes
		p, err := c.img.page(uint64(pmlayout.TablePage + off/pageSize))
		if err != nil {
			c.problem(TableEntry, where, "%v", err)
			c.tableHoles = true
			c.tableHoles = true
			return nil
		}
		g, ok := decodeEntry(p[off%pageSize:][:entryBytes], c.sb.SegmentBytes)
		if !ok {
			c.problem(TableEntry, where, "slot %d: %x", slot, p[off%pageSize:][:entryBytes])
			c.tableHoles = true
			continue
		}
		startable = startable || g.state == slotFree ||
			g.state == slotSealed && g.live == 0 && (g.kind != layout.Hot || g.seq < c.end.lsn.Seq()) // far ones can be given up
		if g.state == slotFree {
			continue
		}
		c.rep.InUse++
		if other, twice := c.slotOf[g.seq]; twice {
			c.problem(TableTwice, where, "segment %d stands in slots %d and %d", g.seq, other, slot)
			c.tableHoles = true
			continue
		}
		c.segs[slot] = g
		c.slotOf[g.seq] = uint32(slot)
		if g.seq >= nextSeq {
			c.problem(TableNextSeq, where, "the next is %d, slot %d holds %d", nextSeq, slot, g.seq)
		}
		if g.state == slotOpen && g.kind == layout.Hot && (uint32(slot) != c.end.slot || g.seq != c.end.lsn.Seq()) {
			c.problem(TableOpen, where, "slot %d is open, the log ends in slot %d at %v", slot, c.end.slot, c.end.lsn)
		}
	}
	if !startable && !c.tableHoles {
		c.problem(TableFull, where, "%d slots", len(c.segs))
	}
	if err := c.checkEnd(where); err != nil {
		return err
	}
	return c.headers()
}

// checkEnd compares the place where the log ends with the table. A store that was
// never opened has no log.
func (c *checker) checkEnd(where string) error {
	if c.end.lsn == 0 {
		return nil
	}
	if g := &c.segs[c.end.slot]; g.seq != c.end.lsn.Seq() || g.kind != layout.Hot {
		c.problem(TableOpen, where, "the log ends at %v in slot %d, which holds segment %d", c.end.lsn, c.end.slot, g.seq)
	}
	return nil
}

func decodeEntry(b []byte, segmentBytes uint32) (g segment, ok bool) {
	le := binary.LittleEndian
	g = segment{seq: le.Uint32(b), state: b[4], kind: layout.SegmentKind(b[5]), live: le.Uint32(b[8:]), used: le.Uint32(b[12:])}
	if g.state == slotFree {
		return g, allZero(b)
	}
	ok = g.seq != 0 && g.state <= slotSealed && g.kind >= layout.Hot && g.kind <= layout.Far && b[6]|b[7] == 0 && allZero(b[28:]) &&
		g.live <= segmentBytes && g.used <= segmentBytes && (g.state != slotSealed || g.used >= layout.BlockSize && g.live <= g.used)
	return g, ok
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// headers reads the header of every segment in which something lives. Others
// may have been overwritten by a segment that a power cut took.
func (c *checker) headers() error {
	b := disk.AlignedBuffer(layout.BlockSize)
	for slot := range c.segs {
		g := &c.segs[slot]
		if g.live == 0 {
			continue
		}
		if slot%256 == 0 {
			if err := c.tick(3, int64(slot), int64(len(c.segs))); err != nil {
				return err
			}
		}
		h, err := c.segmentHeader(uint32(slot), b)
		where := c.device(uint32(slot), 0)
		switch {
		case err != nil:
			c.problem(SegmentHeader, where, "segment %d with %d live bytes: %v", g.seq, g.live, err)
		case h.Seq != g.seq || h.Kind != g.kind:
			c.problem(SegmentOther, where, "segment %d of kind %d, the segment table says %d of kind %d", h.Seq, h.Kind, g.seq, g.kind)
		case h.Incarnation > c.sb.Incarnation:
			c.problem(SegmentOther, where, "it is of incarnation %d, the store's is %d", h.Incarnation, c.sb.Incarnation)
		}
	}
	return nil
}

// segmentHeader reads the header of a segment as the next recovery leaves it.
func (c *checker) segmentHeader(slot uint32, b []byte) (*layout.SegmentHeader, error) {
	if sp, ok := c.staged[slot]; ok && sp.from == 0 {
		copy(b, sp.ring[:layout.BlockSize])
	} else if n, err := c.dev.ReadAt(b[:layout.BlockSize], c.sb.SlotOffset(slot)); err != nil && (err != io.EOF || n < layout.BlockSize) {
		return nil, fmt.Errorf("%w: %w", err, sealfs.ErrIO)
	}
	return layout.DecodeSegmentHeader(b, c.sb.Store, c.dev.Name(), slot, c.sb.SlotOffset(slot))
}
