package fsck

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"slices"

	"sealfs"
	"sealfs/disk"
	"sealfs/fsck/mend"
	"sealfs/lsfs/layout"
	"sealfs/meta"
)

// piece is a part of a segment that an extent refers to: 16 bytes.
type piece struct {
	off, n uint32
	ref    ref // of the extent's record
}

// segments is pass 6: the parts of the log that extents refer to, against the
// segment table and each other.
func (c *checker) segments() error {
	const step = 256 // segments
	n := (len(c.segs) + step - 1) / step
	return c.share(n, func(i int, s *sink) error {
		if err := c.tick(6, int64(i), int64(n)); err != nil {
			return err
		}
		for slot := i * step; slot < min((i+1)*step, len(c.segs)); slot++ {
			c.segment(uint32(slot), s)
		}
		return nil
	})
}

// segment judges what extents refer to in one segment.
func (c *checker) segment(slot uint32, s *sink) {
	g := &c.segs[slot]
	list := c.extents[slot]
	byPlace := func(a, b piece) int { return cmp.Or(cmp.Compare(a.off, b.off), cmp.Compare(a.n, b.n)) }
	if !slices.IsSortedFunc(list, byPlace) {
		slices.SortFunc(list, byPlace)
	}
	live, end := int64(0), uint64(0)
	limit := uint64(c.limit(slot))
	bad := false
	last := piece{}
	for _, p := range list {
		if c.isMoving(p.ref) {
			continue // it will not be here any more
		}
		live += int64(p.n)
		if p.off < layout.BlockSize+layout.RecordHeaderBytes || uint64(p.off)+uint64(p.n) > limit {
			s.problem(c, ExtentOutside, c.owner(p), "%d bytes at %v, the segment is used up to %#x", p.n, sealfs.MakeLSN(g.seq, p.off), limit)
			if ino, x, err := c.extentAt(p.ref); err == nil {
				s.mendPiece(c, ExtentOutside, p.ref, ino, &x)
			}
			bad = true
			continue
		}
		if uint64(p.off) < end {
			s.problem(c, ExtentShared, c.owner(p), "%d bytes at %v", p.n, sealfs.MakeLSN(g.seq, p.off))
			s.mendShared(c, last.ref, p.ref)
			bad = true
		}
		last = p
		end = max(end, uint64(p.off)+uint64(p.n))
	}
	if live != int64(g.live) && !c.holes && !bad {
		s.problem(c, LiveWrong, c.device(slot, 0), "segment %d: %d in the table, extents refer to %d", g.seq, g.live, live)
		c.mendLive(s, slot, live)
	}
}

// isMoving reports whether the extent of a record is to be written anew.
func (c *checker) isMoving(at ref) bool {
	if len(c.moving) == 0 {
		return false
	}
	key, _, err := c.record(at)
	_, moving := c.moving[string(key)]
	return err == nil && moving
}

// owner names the file and the place in it of an extent.
func (c *checker) owner(p piece) string {
	ino, e, err := c.extentAt(p.ref)
	if err != nil {
		return "an extent"
	}
	return fmt.Sprintf("%s, byte %d", name(ino), e.Off)
}

// extentAt decodes the extent whose record stands at a place of the tree.
func (c *checker) extentAt(at ref) (sealfs.Ino, meta.Extent, error) {
	var e meta.Extent
	key, val, err := c.record(at)
	if err != nil {
		return 0, e, err
	}
	k, err := meta.DecodeKey(key)
	if err != nil {
		return 0, e, err
	}
	if k.Kind == meta.KindExtent {
		return k.Ino, e, meta.DecodeExtent(val, k.Pos, &e)
	}
	var in meta.Inode
	err = meta.DecodeInode(val, k.Ino, &in)
	return k.Ino, in.First, err
}

// data is pass 7: every segment in which something lives is read as the next
// recovery leaves it; its records must follow each other, and every block that
// an extent refers to must have its checksum.
func (c *checker) data() error {
	var done, total int64
	for slot := range c.segs {
		total += int64(c.segs[slot].live)
	}
	buf := disk.AlignedBuffer(int(c.sb.SegmentBytes))
	for slot := range c.segs {
		if len(c.extents[slot]) == 0 {
			continue
		}
		if err := c.tick(7, done, total); err != nil {
			return err
		}
		b, err := c.load(uint32(slot), buf)
		if err != nil {
			c.problem(SegmentRead, c.device(uint32(slot), 0), "%v", err)
		}
		if err := c.verify(uint32(slot), b); err != nil {
			return err
		}
		done += int64(c.segs[slot].live)
	}
	return c.tick(7, total, total)
}

// mendStray plans to write an extent anew that verifies and is not part of a payload of its file.
func (c *checker) mendStray(p piece) {
	key, _, err := c.record(p.ref)
	if err != nil {
		return
	}
	key = bytes.Clone(key)
	c.mendBy(ExtentOrphan, c.owner(p), func(e *editor) string {
		ino, x, err := c.extentAt(p.ref)
		if err != nil || e.get(key) == nil || c.job.Tree != nil || !c.verifies(ino, &x) {
			return ""
		}
		if c.strays == nil {
			c.strays = map[string]mend.Move{}
		}
		c.w.effects++
		c.strays[string(key)] = mend.Move{Key: key, Ino: ino, Off: x.Off, From: x.Addr, Counted: true}
		return "it is written anew"
	})
}

// load reads the used part of a segment. What cannot be read is zeros, and
// the error is that of the first such piece.
func (c *checker) load(slot uint32, buf []byte) ([]byte, error) {
	n := (int64(c.limit(slot)) + layout.BlockSize - 1) &^ (layout.BlockSize - 1)
	return c.read(slot, 0, buf[:min(n, int64(len(buf)))])
}

// span is load of a part of a segment, between whole blocks.
func (c *checker) span(slot uint32, from, to int64) ([]byte, error) {
	return c.read(slot, from, disk.AlignedBuffer(int(to-from)))
}

// read reads a part of a segment to b.
func (c *checker) read(slot uint32, from int64, b []byte) ([]byte, error) {
	const step = 1 << 20
	read := func(p []byte, off int) error {
		got, err := c.dev.ReadAt(p, c.sb.SlotOffset(slot)+from+int64(off))
		if err == nil || err == io.EOF && got == len(p) {
			return nil
		}
		return err
	}
	var first error
	for off := 0; off < len(b); off += step {
		part := b[off:min(off+step, len(b))]
		if read(part, off) == nil {
			continue
		}
		for i := 0; i < len(part); i += layout.BlockSize { // find the bad blocks
			one := part[i : i+layout.BlockSize]
			if err := read(one, off+i); err != nil {
				clear(one)
				if first == nil {
					first = fmt.Errorf("byte %d: %w", from+int64(off+i), err)
				}
			}
		}
	}
	if sp, ok := c.staged[slot]; ok {
		lo, hi := max(int64(sp.from), from), min(int64(max(sp.to, sp.from)), from+int64(len(b)))
		if lo < hi {
			copy(b[lo-from:], sp.ring[lo:hi])
		}
	}
	return b, first
}

// verify checks the records of a segment, and the extents in it.
func (c *checker) verify(slot uint32, b []byte) error {
	g := &c.segs[slot]
	list := c.extents[slot]
	next := 0 // first extent that is not verified yet
	h, err := layout.DecodeSegmentHeader(b, c.sb.Store, c.dev.Name(), slot, c.sb.SlotOffset(slot))
	sound := err == nil && h.Seq == g.seq // pass 3 has reported it otherwise
	if sound {
		seed, chain := layout.ChainSeed(c.sb.Store, h.Incarnation), h.Chain
		end := int(c.limit(slot))
		for off := layout.BlockSize; off < end; {
			at := sealfs.MakeLSN(g.seq, uint32(off))
			rec, crc, _, _, _, err := layout.DecodeRecord(b[off:], seed, at, chain)
			if err != nil {
				// A cold segment ends where its records do, and so does one whose end is unknown.
				endless := g.kind == layout.Cold || g.state == slotOpen && slot != c.end.slot
				if !endless || next < len(list) {
					c.problem(SegmentRecord, c.device(slot, uint32(off)), "no sound record at %v, %d bytes are used", at, end)
					c.mendSegment(SegmentRecord, c.device(slot, uint32(off)), slot)
				}
				sound = false
				break
			}
			from := uint32(rec.PayloadLSN().Off())
			for ; next < len(list) && list[next].off < from+rec.PayloadLen; next++ {
				c.block(slot, list[next], b, &rec, from)
			}
			off += int(rec.Bytes())
			chain = crc
		}
	}
	for ; next < len(list); next++ {
		if sound {
			c.problem(ExtentOrphan, c.owner(list[next]), "behind the last record of segment %d", g.seq)
			c.mendStray(list[next])
		}
		c.block(slot, list[next], b, nil, 0)
	}
	return nil
}

// block verifies the blocks of one extent. rec is the record in whose payload,
// which begins at from, it should lie, nil if that is not known.
func (c *checker) block(slot uint32, p piece, b []byte, rec *layout.Record, from uint32) {
	ino, e, err := c.extentAt(p.ref)
	if err != nil || uint64(p.off)+uint64(p.n) > uint64(len(b)) {
		return // reported before
	}
	where := fmt.Sprintf("%s, byte %d", name(ino), e.Off)
	if rec != nil && (p.off < from || p.off+p.n > from+rec.PayloadLen || rec.Ino != ino || rec.Offset+uint64(p.off-from) != e.Off) {
		c.problem(ExtentOrphan, where, "at %v; the record at %v holds %d bytes of inode %d at %d", e.Addr, rec.LSN, rec.PayloadLen, rec.Ino, rec.Offset)
		c.mendStray(p)
	}
	for i := range e.Blocks() {
		data := b[p.off+uint32(i)*block:][:e.Covered(i)]
		c.rep.ReadBytes += uint64(len(data))
		no := e.Off/block + uint64(i)
		if got, want := meta.BlockSum(ino, no, e.Stamp, data), e.Sum(i); got != want {
			c.problem(DataSum, fmt.Sprintf("%s, block %d", name(ino), no), "%#x, %#x is recorded; it lies at %s",
				got, want, c.device(slot, p.off+uint32(i)*block))
		}
	}
}
