package lsfs

import (
	"encoding/binary"
	"errors"

	"sealfs"
	"sealfs/lsfs/layout"
)

// The segment table stands in the region, 32 bytes a slot:
//
//	off size field
//	  0    4 seq    of the segment in the slot, 0 if the slot is free
//	  4    1 state  0 free, 1 open, 2 sealed
//	  5    1 kind   as in the segment's header
//	  6    2 zero
//	  8    4 live   bytes of payload that are referenced
//	 12    4 used   bytes written, when sealed
//	 16    8 time   when it was sealed, in nanoseconds since 1970; of a cold one when
//	                its bytes were written by their users, on average
//	 24    4 full   of a sealed cold segment: live bytes when it was sealed
//	 28    4 zero
//
// The mirror in memory is what decisions are taken from; both change together.
const entryBytes = 32

type segState uint8

const (
	segFree segState = iota
	segOpen
	segSealed
)

type segment struct {
	seq   uint32
	state segState
	kind  layout.SegmentKind
	live  uint32
	used  uint32
	time  int64
	full  uint32 // live when a cold one was sealed, else 0
}

func (g *segment) encode() [entryBytes]byte {
	var b [entryBytes]byte
	le := binary.LittleEndian
	le.PutUint32(b[0:], g.seq)
	b[4], b[5] = byte(g.state), byte(g.kind)
	le.PutUint32(b[8:], g.live)
	le.PutUint32(b[12:], g.used)
	le.PutUint64(b[16:], uint64(g.time))
	le.PutUint32(b[24:], g.full)
	return b
}

// cost estimates what copying the segment's live part takes in a cold segment.
// A cold segment from which nothing died takes as much as it did.
func (g *segment) cost() uint32 {
	if g.full == 0 {
		return g.live
	}
	return uint32(uint64(g.used) * uint64(g.live) / uint64(g.full))
}

// decodeSegment reads a table entry; ok is false for bytes that no store writes.
func decodeSegment(b []byte) (g segment, ok bool) {
	if len(b) < entryBytes {
		return segment{}, false
	}
	le := binary.LittleEndian
	g = segment{
		seq: le.Uint32(b), state: segState(b[4]), kind: layout.SegmentKind(b[5]),
		live: le.Uint32(b[8:]), used: le.Uint32(b[12:]), time: int64(le.Uint64(b[16:])),
		full: le.Uint32(b[24:]),
	}
	if g.state == segFree {
		return g, g == segment{}
	}
	ok = g.seq != 0 && g.state <= segSealed && g.kind >= layout.Hot && g.kind <= layout.Far &&
		le.Uint16(b[6:]) == 0 && le.Uint32(b[28:]) == 0
	return g, ok
}

// The 2 KiB of state in the region's root page: the next sequence number.
const stateNextSeq = 0

// errNoSlot and errRingFull tell Update to wait, with the lock released.
var (
	errNoSlot   = errors.New("no free segment for this class of request")
	errRingFull = errors.New("the ring is full of what is not durable")
)

// takeFree removes a slot from the free list, if more than keep are there and
// one of them has no readers left. Needs mu.
func (s *Store) takeFree(keep int) (uint32, bool) {
	if len(s.free) <= keep {
		return layout.NoSlot, false
	}
	for i := range s.free {
		if slot := s.free[i]; s.pins[slot].Load() == 0 {
			s.free = append(s.free[:i], s.free[i+1:]...)
			return slot, true
		}
	}
	return layout.NoSlot, false
}

// takeFor removes a slot from the free list for the log, if a request of class c
// may have one. Needs mu.
func (s *Store) takeFor(c Class) (uint32, bool) {
	slot, ok := s.takeFree(s.keepFor(c))
	if ok && c != cleaning {
		s.taken.Add(1)
	}
	return slot, ok
}

// keepFor returns how many free slots a request of class c must leave.
func (s *Store) keepFor(c Class) int {
	switch c {
	case Freeing:
		return 1
	case cleaning:
		return 0
	}
	return s.o.ReserveSegments + int(s.far.ahead.Load())
}

// setSegment writes a table entry through the transaction. The mirror follows
// when the transaction is committed.
func (t *Tx) setSegment(slot uint32, g segment) error {
	b := g.encode()
	*t.segmentNow(slot) = g
	return t.PutTable(int(slot)*entryBytes, b[:])
}

// segmentNow returns the slot's entry as the transaction sees it.
func (t *Tx) segmentNow(slot uint32) *segment {
	for i := range t.touched {
		if t.touched[i].slot == slot {
			return &t.touched[i].seg
		}
	}
	t.touched = append(t.touched, touched{slot, t.s.segs[slot]})
	return &t.touched[len(t.touched)-1].seg
}

// addLive changes the live bytes of the segment that holds at.
func (t *Tx) addLive(at sealfs.LSN, n int64) error {
	slot, ok := t.s.slotOf[at.Seq()]
	if !ok {
		return &sealfs.Corruption{Where: t.s.dev.Name(), Off: -1, What: "an extent names a segment that does not exist", Want: uint64(at.Seq()), Got: 0}
	}
	g := t.segmentNow(slot)
	live := int64(g.live) + n
	if live < 0 || live > t.s.seg {
		return &sealfs.Corruption{Where: t.s.dev.Name(), Off: -1, What: "live bytes of a segment leave their range", Want: uint64(g.live), Got: uint64(live)}
	}
	g.live = uint32(live)
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], g.live)
	return t.PutTable(int(slot)*entryBytes+8, b[:])
}

// commitSegments brings the mirror up to what the transaction wrote. Needs mu.
func (t *Tx) commitSegments() {
	s := t.s
	for _, c := range t.touched {
		old := &s.segs[c.slot]
		s.live += int64(c.seg.live) - int64(old.live)
		if c.seg.state == segSealed && c.seg.live == 0 && (old.state != segSealed || old.live != 0) {
			s.dying++
		}
		if old.seq != c.seg.seq {
			delete(s.slotOf, old.seq)
			if c.seg.seq != 0 {
				s.slotOf[c.seg.seq] = c.slot
			}
		}
		*old = c.seg
	}
}
