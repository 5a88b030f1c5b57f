package lsfs

import (
	"errors"
	"fmt"
	"time"

	"sealfs"
	"sealfs/alloc"
	"sealfs/disk"
	"sealfs/internal/enc"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// A coldSegment is the open segment of the cleaner: outside the chain of the
// log, filled in memory and written whole, before any record refers to it.
type coldSegment struct {
	slot, seq uint32
	buf       []byte
	filled    uint32
	chain     uint32
	moves     []move
}

// move is a live part and where its copy stands.
type move struct {
	ino  sealfs.Ino
	part Part
	to   sealfs.LSN
}

// moveBatch bounds the redo of one KindMove record.
const moveBatch = 32

// clean moves what lives in the best victims together, as much as fits one cold
// segment, and reports whether victims were emptied. They are given back by the
// next checkpoint. Needs gc.mu.
func (s *Store) clean() (bool, error) {
	victims := s.victims()
	if len(victims) == 0 {
		return false, nil
	}
	cold, err := s.openCold()
	if err != nil {
		return false, err
	}
	if cold == nil {
		return false, nil
	}
	full := false                 // the cold segment is
	emptied, paid := 0, uint32(0) // victims that are empty then, and what of the cold segment is theirs
	for _, slot := range victims {
		full, err = s.gather(cold, slot)
		if errors.Is(err, sealfs.ErrCorrupt) || errors.Is(err, sealfs.ErrIO) {
			s.spoil(slot, err)
			continue
		}
		if err != nil {
			return false, errors.Join(err, s.closeCold(cold))
		}
		if full {
			break
		}
		emptied++
		paid = cold.filled
	}
	// A round must empty more than it fills: two victims, or one and a part of
	// the next. Copies of small files take more than their bytes, so what costs as
	// much as it frees is left undone.
	if !full && emptied < 2 || int64(emptied)*s.seg-int64(paid) < s.seg/cleanGain {
		return false, s.closeCold(cold)
	}
	if err := s.writeCold(cold); err != nil {
		return false, s.fail(err)
	}
	if err := s.move(cold.moves); err != nil {
		return false, errors.Join(err, s.closeCold(cold))
	}
	if err := s.closeCold(cold); err != nil {
		return false, err
	}
	s.stats.cleaned.Add(uint64(emptied))
	return true, nil
}

// cleanGain is the least that a cleaning must gain: a twentieth of a segment.
const cleanGain = 20

// spoil takes a segment that cannot be cleaned out of the choice. Its files
// stay where they are, to be reported when they are read.
func (s *Store) spoil(slot uint32, err error) {
	s.log.Error("segment cannot be cleaned", "dev", s.dev.Name(), "slot", slot, "err", err)
	s.gc.spoiled[slot] = struct{}{}
}

// move appends the records that make extents refer to their copies. What the
// namespace finds damaged is left behind, one by one.
func (s *Store) move(moves []move) error {
	for n := moveBatch; len(moves) > 0; {
		n = min(n, len(moves))
		ch := &moving{s: s, moves: moves[:n]}
		_, err := s.Update(&Intent{Class: cleaning, kind: layout.KindMove}, ch)
		switch {
		case errors.Is(err, sealfs.ErrCorrupt) && n > 1:
			n = 1
			continue
		case errors.Is(err, sealfs.ErrCorrupt):
			s.mu.RLock()
			slot, ok := s.slotOf[moves[0].part.At.Seq()]
			s.mu.RUnlock()
			if ok {
				s.spoil(slot, err)
			}
		case err != nil:
			return err
		}
		s.stats.moved.Add(ch.n)
		s.stats.movedBytes.Add(ch.bytes)
		moves = moves[n:]
	}
	return nil
}

// victims chooses segments to clean. Those in the ring are left alone: what is
// young dies soon, and the device may not hold all of it yet.
func (s *Store) victims() []uint32 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	now := time.Now().UnixNano()
	var list []alloc.Segment
	oldest := s.hot[0].seq
	for slot := range s.segs {
		g := &s.segs[slot]
		if _, spoiled := s.gc.spoiled[uint32(slot)]; spoiled && g.state == segSealed {
			continue
		}
		if g.state == segSealed && g.live > 0 && (g.kind == layout.Cold || g.seq < oldest) {
			list = append(list, alloc.Segment{Slot: uint32(slot), Live: g.cost(), Used: g.used, Age: (now - g.time) / 1e6})
		}
	}
	return alloc.Victims(list, uint32(s.seg), s.o.CleanLimit, 16)
}

// opening puts a cold segment into the segment table.
type opening struct{ slot, seq uint32 }

func (o *opening) Apply(tx *Tx) error {
	return tx.openSegment(o.slot, o.seq, layout.Cold, time.Now().UnixNano())
}

// openCold takes a slot and a sequence number; nil when no slot is free. The
// segment table knows the segment before it is used, so that a crash leaves a
// sealed segment without live bytes at worst.
func (s *Store) openCold() (*coldSegment, error) {
	s.mu.Lock()
	slot, ok := s.takeFree(0)
	if !ok {
		s.mu.Unlock()
		return nil, nil
	}
	o := &opening{slot: slot, seq: s.nextSeq}
	s.nextSeq++
	s.mu.Unlock()
	if _, err := s.Update(&Intent{Class: cleaning, kind: layout.KindMove}, o); err != nil {
		s.mu.Lock()
		s.free = append(s.free, slot)
		s.mu.Unlock()
		return nil, err
	}
	c := &coldSegment{slot: o.slot, seq: o.seq, buf: disk.AlignedBuffer(int(s.seg)), filled: layout.BlockSize}
	h := layout.SegmentHeader{Incarnation: s.incarnation, Seq: c.seq, Kind: layout.Cold, Slot: c.slot, Created: time.Now().UnixNano()}
	h.Put(c.buf, s.store)
	return c, nil
}

// gather reads a victim and appends what lives in it to the cold segment. It
// reports whether something did not fit; that stays where it is.
func (s *Store) gather(c *coldSegment, slot uint32) (full bool, err error) {
	s.mu.RLock()
	g := s.segs[slot]
	s.mu.RUnlock()
	return full, s.scan(slot, g.seq, int(g.used), func(rec *layout.Record, payload []byte) error {
		if rec.Ino == 0 || rec.PayloadLen == 0 {
			return nil
		}
		var parts []Part
		err := s.View(func(r pmem.Reader) error {
			return s.owner.Live(r, rec.Ino, rec.Offset, rec.PayloadLSN(), rec.PayloadLen, func(p Part) { parts = append(parts, p) })
		})
		for _, p := range parts {
			at := p.At - rec.PayloadLSN()
			if uint64(at)+uint64(p.Len) > uint64(len(payload)) {
				return s.badAddress(p.At)
			}
			if !c.add(s, rec.Ino, p, payload[at:][:p.Len]) {
				full = true
			}
		}
		return err
	})
}

// add appends one part, if it fits.
func (c *coldSegment) add(s *Store, ino sealfs.Ino, p Part, data []byte) bool {
	rec := layout.Record{
		LSN: sealfs.MakeLSN(c.seq, c.filled), Prev: c.chain, Kind: layout.KindCold,
		PayloadLen: p.Len, PayloadCRC: enc.CRC(0, data), Ino: ino, Offset: p.Off,
	}
	n := rec.Bytes()
	if int64(c.filled)+n > s.seg {
		return false
	}
	b := c.buf[c.filled:][:n]
	copy(b[layout.RecordHeaderBytes:], data)
	c.chain = rec.Put(b, s.seed, nil, nil)
	c.moves = append(c.moves, move{ino, p, rec.PayloadLSN()})
	c.filled += uint32(n)
	return true
}

// writeCold writes the cold segment and makes it durable.
func (s *Store) writeCold(c *coldSegment) error {
	n := (int64(c.filled) + layout.BlockSize - 1) &^ (layout.BlockSize - 1)
	if _, err := s.dev.WriteAt(c.buf[:n], s.slotOffset(c.slot)); err != nil {
		return fmt.Errorf("write of a cold segment: %w", err)
	}
	if err := s.dev.Flush(); err != nil {
		return fmt.Errorf("flush of a cold segment: %w", err)
	}
	return nil
}

// closing seals the cold segment in the table.
type closing struct{ c *coldSegment }

func (k closing) Apply(tx *Tx) error {
	g := *tx.segmentNow(k.c.slot)
	g.state, g.used, g.time, g.full = segSealed, k.c.filled, time.Now().UnixNano(), g.live
	return tx.setSegment(k.c.slot, g)
}

func (s *Store) closeCold(c *coldSegment) error {
	_, err := s.Update(&Intent{Class: cleaning, kind: layout.KindMove}, closing{c})
	return err
}

// moving makes extents refer to their copies.
type moving struct {
	s        *Store
	moves    []move
	n, bytes uint64 // what was moved
}

func (m *moving) Apply(tx *Tx) error {
	m.n, m.bytes = 0, 0
	for _, v := range m.moves {
		moved, err := m.s.owner.Move(tx, v.ino, v.part, v.to)
		if err != nil {
			return err
		}
		if moved {
			m.n++
			m.bytes += uint64(v.part.Len)
		}
	}
	return nil
}

// scan calls fn for each record of a sealed segment.
func (s *Store) scan(slot, seq uint32, used int, fn func(*layout.Record, []byte) error) error {
	s.pins[slot].Add(1)
	defer s.pins[slot].Add(-1)
	b := disk.AlignedBuffer((used + layout.BlockSize - 1) &^ (layout.BlockSize - 1))
	if _, err := s.dev.ReadAt(b, s.slotOffset(slot)); err != nil {
		return fmt.Errorf("read of segment %d in slot %d of %s: %w: %w", seq, slot, s.dev.Name(), err, sealfs.ErrIO)
	}
	h, err := layout.DecodeSegmentHeader(b, s.store, s.dev.Name(), slot, s.slotOffset(slot))
	if err != nil {
		return err
	}
	seed := layout.ChainSeed(s.store, h.Incarnation)
	for off := layout.BlockSize; off < used; {
		rec, _, _, payload, _, err := layout.DecodeRecordLoose(b[off:], seed, sealfs.MakeLSN(seq, uint32(off)))
		if err != nil && h.Kind == layout.Cold && int64(used) == s.seg {
			return nil // the cleaner died while this was its open segment
		}
		if err != nil {
			return &sealfs.Corruption{Where: s.dev.Name(), Off: s.slotOffset(slot) + int64(off), What: "a record of a sealed segment does not verify"}
		}
		if !rec.PayloadOK(payload) {
			return &sealfs.Corruption{Where: s.dev.Name(), Off: s.slotOffset(slot) + int64(off), What: "the payload of a record in a sealed segment does not verify"}
		}
		if err := fn(&rec, payload); err != nil {
			return err
		}
		off += int(rec.Bytes())
	}
	return nil
}
