package fsck

import (
	"encoding/binary"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
)

// witnessed returns the highest place up to which sound records on the device
// behind the end of the log say that the log was durable when they were written, 0
// without such records. Behind a place to which the log was once durable, no loss
// of power can have cut it off.
func (f *follower) witnessed() (most sealfs.LSN) {
	if f.asked && f.askedAt == f.end.lsn {
		return f.answer
	}
	f.asked, f.askedAt = true, f.end.lsn
	defer func() { f.answer = most }()
	c, sb := f.c, f.c.sb
	slot, seq, off, next := f.end.slot, f.end.lsn.Seq(), int(f.end.lsn.Off()), f.next
	inc := f.incarnation
	if f.end.lsn == sb.FirstPrev { // the rest of its segment has been dead since
		slot, next = layout.NoSlot, sb.FirstSlot
	}
	b := disk.AlignedBuffer(int(sb.SegmentBytes))
	for range sb.Segments {
		if slot < sb.Segments {
			if _, err := c.dev.ReadAt(b, sb.SlotOffset(slot)); err != nil {
				return most
			}
			seed := layout.ChainSeed(sb.Store, inc)
			for ; off+layout.RecordHeaderBytes <= len(b); off += layout.RecordAlign {
				rec, _, op, _, _, err := layout.DecodeRecordLoose(b[off:], seed, sealfs.MakeLSN(seq, uint32(off)))
				if err != nil {
					continue
				}
				most = max(most, rec.Witness())
				if to, ok := layout.ReadSlot(op); ok && (rec.Kind == layout.KindOpen || rec.Kind == layout.KindNext) {
					next = to
				}
				off += int(rec.Bytes()) - layout.RecordAlign
			}
		}
		if next >= sb.Segments {
			return most
		}
		if _, err := c.dev.ReadAt(b, sb.SlotOffset(next)); err != nil {
			return most
		}
		h, err := layout.DecodeSegmentHeader(b, sb.Store, "", next, 0)
		if err != nil { // rotten: its first record tells
			h = &layout.SegmentHeader{Kind: layout.Hot, Seq: sealfs.LSN(binary.LittleEndian.Uint64(b[layout.BlockSize+8:])).Seq(), Incarnation: sb.Incarnation}
			if _, _, _, _, _, err := layout.DecodeRecordLoose(b[layout.BlockSize:], layout.ChainSeed(sb.Store, h.Incarnation), sealfs.MakeLSN(h.Seq, layout.BlockSize)); err != nil {
				return most
			}
		}
		if h.Kind != layout.Hot || h.Seq <= seq || h.Incarnation < inc || h.Incarnation > sb.Incarnation {
			return most
		}
		slot, seq, inc, off, next = next, h.Seq, h.Incarnation, layout.BlockSize, layout.NoSlot
	}
	return most
}
