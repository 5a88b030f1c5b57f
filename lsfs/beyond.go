package lsfs

import (
	"encoding/binary"
	"fmt"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// A log that breaks off has either been cut by the loss of power, which takes
// what was not durable and nothing else, or has rotted. The two are told apart by
// what stands behind the break: pads and records that open a segment say how far the
// log was durable when they were written (layout.Record.Witness). A process that dies
// writes no record behind one that is not whole, so in staging every sound
// record behind the break is a proof, and so is the tail that the ring's header names.

// beyond refuses a log that breaks off before a place that it has reached: to go
// on would silently roll back what was answered.
func (rp *replay) beyond() error {
	s := rp.s
	end := rp.rec.end
	name, way := rp.ringName()
	if at, chunk := rp.staged(end); chunk >= 0 {
		return rp.refuse(way, &sealfs.Corruption{Where: name, Off: int64(chunk)*s.seg + layout.BlockSize + int64(end.Off()),
			What: fmt.Sprintf("the log breaks off at %v, and staging holds a sound record at %v", end, at)})
	}
	if tail := rp.tail(); tail > end {
		return rp.refuse(way, &sealfs.Corruption{Where: name, Off: -1,
			What: fmt.Sprintf("the log breaks off at %v, and was written up to %v", end, tail)})
	}
	w := rp.witness()
	if w <= end {
		return nil
	}
	return rp.refuse(way, &sealfs.Corruption{Where: s.dev.Name(), Off: s.slotOffset(min(rp.rec.slot, uint32(len(s.segs)-1))) + int64(end.Off()),
		What: fmt.Sprintf("the log breaks off at %v, and was durable up to %v", end, w)})
}

// refuse refuses a log that breaks off, unless it may be cut off there. A region on
// persistent memory may be newer than the break.
func (rp *replay) refuse(way string, why *sealfs.Corruption) error {
	if rp.s.o.CutLog && !rp.lasting() {
		rp.s.log.Error("the log is cut off as was asked for; what came later is lost", "dev", rp.s.dev.Name(), "err", why)
		return nil
	}
	why.What += "; to go on without what is behind the break, " + way
	return why
}

// tail returns up to where the dead process wrote the log, 0 if that is not
// known. Over the loss of power nothing orders the tail behind the record, but on
// persistent memory: there the record is durable before the tail is stored.
func (rp *replay) tail() sealfs.LSN {
	if rp.kept == nil {
		return 0
	}
	if rp.lasting() {
		return sealfs.LSN(rp.kept.Tail())
	}
	if boot, err := pmem.BootID(); err != nil || boot != rp.kept.Header().BootID {
		return 0
	}
	return sealfs.LSN(rp.kept.Tail())
}

// lasting reports whether the ring was written as persistent memory.
func (rp *replay) lasting() bool {
	if rp.kept == nil {
		return false
	}
	h := rp.kept.Header()
	return h.Lasting()
}

// ringName returns what the ring is called, and how to do without it.
func (rp *replay) ringName() (name, way string) {
	switch {
	case rp.lasting():
		return "the ring of " + rp.s.regionName, "remove the ring, and have sealfs-fsck --rebuild-region make a new region"
	case rp.s.o.StagingPath != "":
		return rp.s.o.StagingPath, "use sealfs-fsck -y --cut-log"
	}
	return "staging", "use sealfs-fsck -y --cut-log"
}

// chunk returns which chunk of the ring is a copy of segment seq, -1 if none is.
func (rp *replay) chunk(seq uint32) int {
	if rp.kept == nil {
		return -1
	}
	for i := range int(rp.kept.Header().Chunks) {
		if rp.chunkSeq(i) == seq {
			return i
		}
	}
	return -1
}

// reached reports whether the log is known to have reached end, behind the present one.
func (rp *replay) reached(end sealfs.LSN) bool {
	if rp.witness() >= end || rp.tail() >= end {
		return true
	}
	_, chunk := rp.staged(end)
	return chunk >= 0
}

// chunkSeq returns the number of the segment in chunk i: as the segment's own
// header says it if that is sound, or else as the ring's header does, which has no checksum.
func (rp *replay) chunkSeq(i int) uint32 {
	b := rp.kept.Chunk(i)
	slot := binary.LittleEndian.Uint32(b[20:]) // whichever it is
	h, err := layout.DecodeSegmentHeader(b, rp.s.store, "", slot, 0)
	if err != nil || h.Incarnation != rp.kept.Header().Incarnation {
		return rp.kept.ChunkSeq(i)
	}
	return h.Seq
}

// staged looks for a sound record in the ring from end on, and returns its place and
// chunk, which is -1 if there is none. On persistent memory the last record may have
// come to the medium in part, so that one whose payload is not sound proves nothing.
func (rp *replay) staged(end sealfs.LSN) (sealfs.LSN, int) {
	if rp.kept == nil {
		return 0, -1
	}
	seed := layout.ChainSeed(rp.s.store, rp.kept.Header().Incarnation)
	for i := range int(rp.kept.Header().Chunks) {
		b, seq, off := rp.kept.Chunk(i), rp.chunkSeq(i), layout.BlockSize
		if seq == end.Seq() {
			off = max(off, int(end.Off()))
		}
		for ; seq != 0 && seq >= end.Seq() && off+layout.RecordHeaderBytes <= len(b); off += layout.RecordAlign {
			if string(b[off:off+4]) != layout.RecordMagic {
				continue
			}
			at := sealfs.MakeLSN(seq, uint32(off))
			rec, _, _, payload, _, err := layout.DecodeRecordLoose(b[off:], seed, at)
			if err == nil && (!rp.lasting() || rec.PayloadOK(payload)) {
				return at, i
			}
		}
	}
	return 0, -1
}

// witness returns the highest place up to which records on the device behind the
// present end of the log say that it was durable; 0 if there are none. It
// reads the segment, and those that were opened after it.
func (rp *replay) witness() (w sealfs.LSN) {
	s := rp.s
	sb := s.Superblock()
	end := rp.rec.end
	if rp.seen == end && rp.looked {
		return rp.proof
	}
	defer func() { rp.seen, rp.looked, rp.proof = end, true, w }()
	b := disk.AlignedBuffer(int(s.seg))
	slot, seq, from, next := rp.rec.slot, end.Seq(), end.Off(), rp.next
	incarnation := rp.incarnation
	if end == sb.FirstPrev {
		// What stands behind it in its segment is dead since a recovery ended there.
		from, next = uint32(s.seg), sb.FirstSlot
	}
	for range len(s.segs) {
		if slot < uint32(len(s.segs)) && int64(from) < s.seg {
			if _, err := s.dev.ReadAt(b[:], s.slotOffset(slot)); err != nil {
				s.log.Warn("what stands behind the end of the log cannot be read", "dev", s.dev.Name(), "slot", slot, "err", err)
				return w
			}
			var told sealfs.LSN
			told, next = rp.testimony(b, incarnation, seq, from, next)
			w = max(w, told)
		}
		if next >= uint32(len(s.segs)) {
			return w
		}
		h := rp.opened(next, seq, max(incarnation, 1), &sb)
		if h == nil {
			return w
		}
		slot, seq, from, incarnation, next = next, h.Seq, layout.BlockSize, h.Incarnation, layout.NoSlot
	}
	return w
}

// testimony reads the sound records of a segment from byte from on: what the
// highest witness among them is, and which successor they name.
func (rp *replay) testimony(b []byte, incarnation, seq, from, next uint32) (w sealfs.LSN, successor uint32) {
	seed := layout.ChainSeed(rp.s.store, incarnation)
	for off := int(from); off+layout.RecordHeaderBytes <= len(b); {
		n := int64(layout.RecordAlign)
		if string(b[off:off+4]) == layout.RecordMagic {
			rec, _, op, _, _, err := layout.DecodeRecordLoose(b[off:], seed, sealfs.MakeLSN(seq, uint32(off)))
			if err == nil {
				n = rec.Bytes()
				w = max(w, rec.Witness())
				if at, ok := layout.ReadSlot(op); ok && (rec.Kind == layout.KindOpen || rec.Kind == layout.KindNext) {
					next = at
				}
			}
		}
		off += int(n)
	}
	return w, next
}

// chained reports whether the first record of a segment continues the log.
func (rp *replay) chained(slot uint32, h *layout.SegmentHeader) bool {
	s := rp.s
	b := disk.AlignedBuffer(int(min(layout.BlockSize+recordMax, s.seg)))
	if _, err := s.dev.ReadAt(b, s.slotOffset(slot)); err != nil {
		return false
	}
	at := sealfs.MakeLSN(h.Seq, layout.BlockSize)
	_, _, _, _, _, err := layout.DecodeRecord(b[layout.BlockSize:], layout.ChainSeed(s.store, h.Incarnation), at, rp.rec.chain)
	return err == nil
}

// opened returns the header of the segment that was opened in a slot after
// segment seq, made up from its first record if it has rotted; nil if there is none.
func (rp *replay) opened(slot, seq, incarnation uint32, sb *layout.Superblock) *layout.SegmentHeader {
	s := rp.s
	b := disk.AlignedBuffer(int(min(layout.BlockSize+recordMax, s.seg)))
	if _, err := s.dev.ReadAt(b[:2*layout.BlockSize], s.slotOffset(slot)); err != nil {
		return nil
	}
	h, err := layout.DecodeSegmentHeader(b, s.store, s.dev.Name(), slot, s.slotOffset(slot))
	if err == nil {
		if h.Kind == layout.Hot && h.Seq > seq && h.Incarnation >= incarnation && h.Incarnation <= sb.Incarnation {
			return h
		}
		return nil
	}
	first := b[layout.BlockSize:]
	at := sealfs.LSN(binary.LittleEndian.Uint64(first[8:]))
	if at.Off() != layout.BlockSize || at.Seq() <= seq {
		return nil
	}
	if _, err := s.dev.ReadAt(b, s.slotOffset(slot)); err != nil {
		return nil
	}
	for _, inc := range []uint32{sb.Incarnation, incarnation} {
		rec, _, _, _, _, err := layout.DecodeRecordLoose(first, layout.ChainSeed(s.store, inc), at)
		if err == nil && rec.Kind == layout.KindOpen {
			return &layout.SegmentHeader{Seq: at.Seq(), Incarnation: inc, Kind: layout.Hot, Slot: slot}
		}
	}
	return nil
}
