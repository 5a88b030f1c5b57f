package fsck

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
)

// Repairs of what the records stand on: log and segment table.

// recover plans to leave a fault to the recovery.
func (c *checker) recover(*editor) string {
	c.openStore = true
	c.w.effects++
	return fmt.Sprintf("the store is recovered to %v, and goes on in a new segment", c.end.lsn)
}

// cutLog plans to go on where the log breaks off.
func (c *checker) cutLog(f *follower) string {
	at := f.end.lsn.Off()
	b := disk.AlignedBuffer(int(c.sb.SegmentBytes))
	if f.end.slot < c.sb.Segments && int(at) <= len(b) {
		c.dev.ReadAt(b, c.sb.SlotOffset(f.end.slot)) // what cannot be read is zeros
		if rest := bytes.TrimRight(b[at:], "\x00"); len(rest) > 0 {
			c.save(Saved{Problem: LogCut, Where: c.device(f.end.slot, at), Old: rest})
		}
	}
	c.job.CutLog = true
	return c.recover(nil) + "; what was logged behind is given up"
}

// cutRing plans to go on where the log breaks off in staging.
func (c *checker) cutRing(f *follower) string {
	for i := range int(c.ring.Header().Chunks) {
		seq, chunk := c.chunkSeq(i), c.ring.Chunk(i)
		off := 0
		if seq == f.end.lsn.Seq() {
			off = min(int(f.end.lsn.Off()), len(chunk))
		}
		if rest := bytes.TrimRight(chunk[off:], "\x00"); seq >= f.end.lsn.Seq() && len(rest) > 0 {
			c.save(Saved{Problem: LogStaging, Where: fmt.Sprintf("%s, segment %d, byte %d", c.rep.Staging, seq, off), Old: rest})
		}
	}
	c.job.CutLog = true
	return c.recover(nil) + "; what staging holds behind is given up"
}

// moveAside plans to rename a ring that is of no use.
func (c *checker) moveAside(path string) string {
	c.w.effects++
	to := fmt.Sprintf("%s.damaged-%s", path, time.Now().UTC().Format("20060102-150405"))
	c.raw = append(c.raw, func() error {
		if err := os.Rename(path, to); err != nil {
			return fmt.Errorf("ring %s: %w: %w", path, err, sealfs.ErrIO)
		}
		return nil
	})
	return "it is renamed to " + to
}

// setEntry plans an entry of the segment table.
func (c *checker) setEntry(slot uint32, b []byte) {
	c.save(Saved{Problem: TableEntry, Where: fmt.Sprintf("segment table, slot %d", slot), Old: c.entries[slot], New: b})
	c.w.effects++
	if c.job.Entries == nil {
		c.job.Entries = map[uint32][]byte{}
	}
	c.entries[slot], c.job.Entries[slot] = b, b
}

func (g *segment) encode(created int64) []byte {
	b := make([]byte, entryBytes)
	le := binary.LittleEndian
	le.PutUint32(b, g.seq)
	b[4], b[5] = g.state, byte(g.kind)
	le.PutUint32(b[8:], g.live)
	le.PutUint32(b[12:], g.used)
	le.PutUint64(b[16:], uint64(created))
	return b
}

// mendSlot plans to make the entry of a slot again from the segment that stands there.
func (c *checker) mendSlot(id ID, where string, slot uint32) {
	c.mendBy(id, where, func(*editor) string { return c.remake(slot) })
}

func (c *checker) remake(slot uint32) string {
	old, sound := decodeEntry(c.entries[slot], c.sb.SegmentBytes)
	b := disk.AlignedBuffer(int(c.sb.SegmentBytes))
	h, err := c.segmentHeader(slot, b)
	if err == nil {
		if other, there := c.slotOf[h.Seq]; there && other != slot {
			err = fmt.Errorf("slot %d holds segment %d", other, h.Seq)
		} else if slot != c.end.slot && (h.Kind == layout.Hot && h.Seq >= c.end.lsn.Seq() || h.Seq >= c.nextSeq || h.Incarnation > c.sb.Incarnation) {
			err = fmt.Errorf("segment %d never became part of the store", h.Seq)
		} else if slot == c.end.slot && c.end.lsn != 0 && h.Seq != c.end.lsn.Seq() {
			err = fmt.Errorf("segment %d is not the last", h.Seq)
		}
	}
	if err != nil {
		c.setEntry(slot, make([]byte, entryBytes))
		return fmt.Sprintf("slot %d is freed: %v", slot, err)
	}
	g := segment{seq: h.Seq, state: slotSealed, kind: h.Kind, used: c.ends(slot, h, b)}
	if slot == c.end.slot && c.end.lsn != 0 {
		g.state, g.used = slotOpen, 0
	}
	if sound && old.seq == g.seq {
		g.live = min(old.live, g.used)
	}
	c.setEntry(slot, g.encode(h.Created))
	c.slotOf[g.seq] = slot
	return fmt.Sprintf("slot %d holds segment %d, of which %d bytes are used", slot, g.seq, g.used)
}

// ends returns where the records of a segment end. b has room for it.
func (c *checker) ends(slot uint32, h *layout.SegmentHeader, b []byte) uint32 {
	c.dev.ReadAt(b, c.sb.SlotOffset(slot)) // what cannot be read holds no records
	if sp, ok := c.staged[slot]; ok {
		copy(b[sp.from:], sp.ring[sp.from:max(sp.to, sp.from)])
	}
	limit := int(c.sb.SegmentBytes)
	if slot == c.end.slot {
		limit = int(c.end.lsn.Off())
	}
	seed, chain, off := layout.ChainSeed(c.sb.Store, h.Incarnation), h.Chain, layout.BlockSize
	for off+layout.RecordHeaderBytes <= limit {
		rec, crc, _, _, _, err := layout.DecodeRecord(b[off:], seed, sealfs.MakeLSN(h.Seq, uint32(off)), chain)
		if err != nil {
			break
		}
		chain = crc
		off += int(rec.Bytes())
	}
	return uint32(off)
}

// mendTwice plans to leave a segment to the one slot that holds it.
func (c *checker) mendTwice(where string, seq, one, two uint32) {
	c.mendBy(TableTwice, where, func(*editor) string {
		b := disk.AlignedBuffer(int(c.sb.SegmentBytes))
		wrong := two
		if h, err := c.segmentHeader(two, b); err == nil && h.Seq == seq {
			wrong = one
			c.slotOf[seq] = two
		}
		return c.remake(wrong)
	})
}

func (c *checker) mendNextSeq(where string, seq uint32) {
	c.mendBy(TableNextSeq, where, func(*editor) string {
		if seq < c.nextSeq || seq == 1<<32-1 {
			return ""
		}
		c.nextSeq = seq + 1
		c.job.NextSeq = c.nextSeq
		c.w.effects++
		return fmt.Sprintf("the next sequence number is at least %d", c.nextSeq)
	})
}

// mendFull plans to free slots in which nothing lives.
func (c *checker) mendFull(where string) {
	c.mendBy(TableFull, where, func(*editor) string {
		n := 0
		for slot := range c.segs {
			g := &c.segs[slot]
			if g.state == slotSealed && g.live == 0 && uint32(slot) != c.end.slot && len(c.extents) > slot && len(c.extents[slot]) == 0 && !c.holes {
				c.setEntry(uint32(slot), make([]byte, entryBytes))
				n++
			}
		}
		if n == 0 {
			return ""
		}
		return count(n, "slot") + " without live data freed"
	})
}

// mendSegment plans to move what verifies out of a segment.
func (c *checker) mendSegment(id ID, where string, slot uint32) {
	c.mendBy(id, where, func(*editor) string {
		n := 0
		if c.job.Tree == nil {
			for _, p := range c.extents[slot] {
				if ino, x, err := c.extentAt(p.ref); err == nil && c.verifies(ino, &x) {
					n++
				}
			}
		}
		if n == 0 && c.job.Tree == nil {
			return ""
		}
		if c.evacuate == nil {
			c.evacuate = map[uint32]bool{}
		}
		c.evacuate[slot] = true
		c.w.effects++
		return fmt.Sprintf("of the %s that segment %d holds, those that verify are written anew", count(len(c.extents[slot]), "extent"), c.segs[slot].seq)
	})
}

// mendLive plans to count the live bytes of a segment anew.
func (c *checker) mendLive(s *sink, slot uint32, live int64) {
	s.mendBy(c, LiveWrong, c.device(slot, 0), func(*editor) string {
		g := &c.segs[slot]
		if live < 0 || live > int64(c.sb.SegmentBytes) {
			return ""
		}
		b := bytes.Clone(c.entries[slot])
		binary.LittleEndian.PutUint32(b[8:], uint32(live))
		c.entries[slot] = b
		if planned, ok := c.job.Entries[slot]; ok {
			binary.LittleEndian.PutUint32(planned[8:], uint32(live))
			c.entries[slot] = planned
		}
		if c.job.Live == nil {
			c.job.Live, c.job.Least = map[uint32]uint32{}, map[uint32]uint32{}
		}
		c.w.effects++
		c.job.Live[g.seq] = uint32(live)
		c.job.Least[slot] = max(c.job.Least[slot], uint32(live))
		return fmt.Sprintf("segment %d counts %d live bytes, not %d", g.seq, live, g.live)
	})
}
