package lsfs

import (
	"errors"
	"fmt"
	"runtime"
	"time"

	"sealfs"
	"sealfs/alloc"
	"sealfs/disk"
	"sealfs/internal/enc"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// A coldSegment is the open segment of the cleaner: outside the chain of the
// log, written as it fills, and durable before any record refers to it.
type coldSegment struct {
	slot, seq uint32
	buf       []byte     // one of the store's two; what was not given to the device begins in its first block
	given     uint32     // bytes of the segment that were given to the device: whole blocks
	writing   chan error // of the piece that is being written; nil if there is none
	filled    uint32
	chain     uint32
	moves     []move
	age       ageSum
	want      uint32 // when filled so far it may end before a victim does
}

// move is a live part and where its copy stands.
type move struct {
	ino  sealfs.Ino
	part Part
	to   sealfs.LSN
}

// ageSum is a mean of the times at which segments were written, by bytes.
type ageSum struct {
	first int64 // the mean counts from here, to keep its precision
	sum   float64
	bytes float64
}

func (a *ageSum) add(t int64, n uint32) {
	if a.bytes == 0 {
		a.first = t
	}
	a.sum += float64(t-a.first) * float64(n)
	a.bytes += float64(n)
}

// mean returns the mean, or now if nothing was added.
func (a *ageSum) mean(now int64) int64 {
	if a.bytes == 0 {
		return now
	}
	return min(a.first+int64(a.sum/a.bytes), now)
}

// moveBatch bounds the redo of one KindMove record, and so for how long the lock is held.
const moveBatch = 8

// cleanPiece is how much the cleaner reads or writes at once, so that those who
// wait for the device behind it do not wait for long.
const cleanPiece = 1 << 20

// victim is a segment that was chosen, as it was then.
type victim struct {
	slot uint32
	segment
}

// clean moves what lives in the best victims together, as much as fits one cold
// segment, and reports whether victims were emptied. They are given back by the
// next checkpoint. Needs gc.mu.
func (s *Store) clean() (bool, error) {
	victims := s.victims()
	if !s.worthwhile(victims) {
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
	for _, v := range victims {
		full, err = s.gather(cold, v)
		if errors.Is(err, sealfs.ErrCorrupt) || errors.Is(err, sealfs.ErrIO) {
			s.spoil(v.slot, v.seq, err)
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
		cold.want = 0
		if emptied == 1 {
			cold.want = paid + uint32(s.seg/cleanGain)
		}
	}
	// Copies of small files take more than the table knows.
	if !gains(emptied, int64(cold.filled-paid), s.seg) {
		return false, s.closeCold(cold)
	}
	if err := s.writeCold(cold, true); err != nil {
		return false, err
	}
	all, err := s.move(cold.moves)
	if err = errors.Join(err, s.closeCold(cold)); err != nil || !all {
		return false, err
	}
	s.stats.cleaned.Add(uint64(emptied))
	s.gc.gain += int64(emptied)*s.seg - int64(paid)
	return true, nil
}

// gains reports whether a round empties more than it fills: two victims, or one
// and a part of the next that is worth it.
func gains(emptied int, part, segment int64) bool {
	least := segment / cleanGain
	return emptied >= 2 || emptied == 1 && part >= least
}

// worthwhile estimates, before anything is read, whether a round gains anything.
func (s *Store) worthwhile(victims []victim) bool {
	room, paid, emptied := s.seg-layout.BlockSize, int64(0), 0
	for _, v := range victims {
		if paid+int64(v.cost()) > room {
			return gains(emptied, room-paid, s.seg)
		}
		paid += int64(v.cost())
		emptied++
	}
	return gains(emptied, 0, s.seg)
}

// cleanGain is the least that a cleaning must gain: a twentieth of a segment.
const cleanGain = 20

// spoil takes a segment that cannot be cleaned out of the choice. Its files
// stay where they are, to be reported when they are read.
func (s *Store) spoil(slot, seq uint32, err error) {
	s.log.Error("segment cannot be cleaned", "dev", s.dev.Name(), "slot", slot, "err", err)
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.segs[slot].seq == seq { // else it was given back meanwhile
		s.gc.spoiled[slot] = struct{}{}
	}
}

// move appends the records that make extents refer to their copies, and reports
// whether there was room for all. What the namespace finds damaged is left
// behind, one by one.
func (s *Store) move(moves []move) (all bool, err error) {
	for n := moveBatch; len(moves) > 0; {
		s.mu.RLock()
		fits := s.logFits()
		s.mu.RUnlock()
		if !fits {
			return false, nil
		}
		n = min(n, len(moves))
		s.letPass()
		ch := &moving{s: s, moves: moves[:n]}
		_, err := s.Update(&Intent{Class: cleaning, kind: layout.KindMove}, ch)
		switch {
		case errors.Is(err, sealfs.ErrCorrupt) && n > 1:
			n = 1
			continue
		case errors.Is(err, sealfs.ErrCorrupt):
			seq := moves[0].part.At.Seq()
			s.mu.RLock()
			slot, ok := s.slotOf[seq]
			s.mu.RUnlock()
			if ok {
				s.spoil(slot, seq, err)
			}
		case err != nil:
			return false, err
		}
		s.stats.moved.Add(ch.n)
		s.stats.movedBytes.Add(ch.bytes)
		moves = moves[n:]
	}
	return true, nil
}

// logFits reports whether the log takes a batch of moves and what ends a cold
// segment. Needs mu, shared.
func (s *Store) logFits() bool {
	if s.nextSlot != layout.NoSlot || s.seg-int64(s.open().filled) >= 4*layout.BlockSize {
		return true
	}
	return s.unpinned()
}

// unpinned reports whether there is a free segment that nobody reads any more.
// Needs mu, shared.
func (s *Store) unpinned() bool {
	for _, slot := range s.free {
		if s.pins[slot].Load() == 0 {
			return true
		}
	}
	return false
}

// letPass lets the requests go first that wait for the lock: who asks for it
// again at once would mostly get it before those who have to be woken.
func (s *Store) letPass() {
	for range 64 {
		if s.gc.waiting.Load() == 0 {
			return
		}
		runtime.Gosched()
	}
}

// tablePart is how many entries of the segment table are looked at under the
// lock at a time: a terabyte has 32,768.
const tablePart = 1024

// victims chooses segments to clean. Those in the ring are left alone: what is
// young dies soon, and the device may not hold all of it yet. So are those that
// far checkpoints need: emptying them takes a segment and frees none.
func (s *Store) victims() []victim {
	now := time.Now().UnixNano()
	c := &s.gc.choice
	*c = alloc.Choice{Size: uint32(s.seg), Limit: s.o.CleanLimit, N: victimsMax}
	part := make([]segment, tablePart)
	for lo := 0; lo < len(s.segs); lo += tablePart {
		s.mu.RLock()
		oldest := min(s.hot[0].seq, s.farKeep())
		n := copy(part, s.segs[lo:])
		s.mu.RUnlock()
		for i := range part[:n] {
			g, slot := &part[i], uint32(lo+i)
			if g.state != segSealed || g.live == 0 || g.kind != layout.Cold && g.seq >= oldest {
				continue
			}
			if _, spoiled := s.gc.spoiled[slot]; !spoiled {
				c.Add(alloc.Segment{Slot: slot, Live: g.cost(), Used: g.used, Age: (now - g.time) / 1e6})
			}
		}
	}
	var list []victim
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, v := range c.Victims() {
		if g := s.segs[v.Slot]; g.state == segSealed {
			list = append(list, victim{v.Slot, g})
		}
	}
	return list
}

// victimsMax bounds how many segments one round looks into.
const victimsMax = 32

// opening puts a cold segment into the segment table.
type opening struct{ slot, seq uint32 }

func (o *opening) Apply(tx *Tx) error {
	return tx.openSegment(o.slot, o.seq, layout.Cold, time.Now().UnixNano())
}

// openCold takes a slot and a sequence number; nil when there is no room. The
// segment table knows the segment before it is used, so that a crash leaves a
// sealed segment without live bytes at worst.
func (s *Store) openCold() (*coldSegment, error) {
	s.mu.Lock()
	slot, ok := s.takeFree(0)
	if !ok || !s.logFits() {
		if ok {
			s.free = append(s.free, slot)
		}
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
	if s.gc.cold[0] == nil {
		for i := range s.gc.cold {
			s.gc.cold[i] = disk.AlignedBuffer(int(min(s.seg, cleanPiece+recordMax+layout.BlockSize)))
		}
	}
	c := &coldSegment{slot: o.slot, seq: o.seq, buf: s.gc.cold[0], filled: layout.BlockSize}
	h := layout.SegmentHeader{Incarnation: s.incarnation, Seq: c.seq, Kind: layout.Cold, Slot: c.slot, Created: time.Now().UnixNano()}
	h.Put(c.buf, s.store)
	return c, nil
}

// gather reads a victim and appends what lives in it to the cold segment. It
// reports whether something did not fit; that stays where it is.
func (s *Store) gather(c *coldSegment, v victim) (full bool, err error) {
	var parts []Part
	return full, s.scan(v, func(rec *layout.Record, payload []byte) error {
		runtime.Gosched() // a request may wait for a processor
		if rec.Ino == 0 || rec.PayloadLen == 0 {
			return nil
		}
		parts = parts[:0]
		err := s.View(func(r pmem.Reader) error {
			return s.owner.Live(r, rec.Ino, rec.Offset, rec.PayloadLSN(), rec.PayloadLen, func(p Part) { parts = append(parts, p) })
		})
		if err != nil || len(parts) == 0 {
			return err
		}
		if !rec.PayloadOK(payload) {
			return &sealfs.Corruption{Where: s.dev.Name(), Off: s.slotOffset(v.slot) + int64(rec.LSN.Off()), What: "the payload of a record in a sealed segment does not verify"}
		}
		for _, p := range parts {
			at := p.At - rec.PayloadLSN()
			if uint64(at)+uint64(p.Len) > uint64(len(payload)) {
				return s.badAddress(p.At)
			}
			sum := rec.PayloadCRC
			if p.Len != rec.PayloadLen {
				sum = enc.CRC(0, payload[at:][:p.Len])
			}
			if !c.add(s, rec.Ino, p, payload[at:][:p.Len], sum) {
				full = true
				continue
			}
			c.age.add(v.time, p.Len)
			if err := s.writeCold(c, false); err != nil {
				return err
			}
		}
		if full && c.filled >= c.want {
			return errFull
		}
		return nil
	})
}

// errFull ends a scan: the cold segment takes no more.
var errFull = errors.New("the cold segment is full")

// add appends one part, whose CRC-32C is sum, if it fits.
func (c *coldSegment) add(s *Store, ino sealfs.Ino, p Part, data []byte, sum uint32) bool {
	rec := layout.Record{
		LSN: sealfs.MakeLSN(c.seq, c.filled), Prev: c.chain, Kind: layout.KindCold,
		PayloadLen: p.Len, PayloadCRC: sum, Ino: ino, Offset: p.Off,
	}
	n := rec.Bytes()
	if int64(c.filled)+n > s.seg {
		return false
	}
	b := c.buf[c.filled-c.given:][:n]
	copy(b[layout.RecordHeaderBytes:], data)
	c.chain = rec.Put(b, s.seed, nil, nil)
	c.moves = append(c.moves, move{ino, p, rec.PayloadLSN()})
	c.filled += uint32(n)
	return true
}

// writeCold writes what waits of the cold segment once it is a piece, while the
// next one is gathered; at the end all of it, and makes it durable.
func (s *Store) writeCold(c *coldSegment, end bool) error {
	n := c.filled - c.given
	if !end && n < cleanPiece {
		return nil
	}
	if rest := n & (layout.BlockSize - 1); end && rest != 0 {
		clear(c.buf[n:][:layout.BlockSize-rest])
		n += layout.BlockSize - rest
	}
	n &^= layout.BlockSize - 1
	if err := s.settleCold(c); err != nil {
		return err
	}
	piece, off := c.buf[:n], s.slotOffset(c.slot)+int64(c.given)
	c.given += n
	if end || s.bg.off.Load() {
		if _, err := s.dev.WriteAt(piece, off); err != nil {
			return s.fail(fmt.Errorf("write of a cold segment: %w", err))
		}
	} else {
		c.writing = make(chan error, 1)
		lane := s.o.Turns.Mine().Child(0)
		go func() {
			lane.Take()
			_, err := s.dev.WriteAt(piece, off)
			c.writing <- err
		}()
	}
	if end {
		if err := s.dev.Flush(); err != nil {
			return s.fail(fmt.Errorf("flush of a cold segment: %w", err))
		}
		return nil
	}
	s.gc.cold[0], s.gc.cold[1] = s.gc.cold[1], s.gc.cold[0]
	copy(s.gc.cold[0], c.buf[n:][:c.filled-c.given])
	c.buf = s.gc.cold[0]
	s.rest()
	return nil
}

// settleCold waits for the piece that is being written.
func (s *Store) settleCold(c *coldSegment) error {
	if c.writing == nil {
		return nil
	}
	lane := s.o.Turns.Mine()
	err := <-c.writing
	lane.Take()
	c.writing = nil
	if err != nil {
		return s.fail(fmt.Errorf("write of a cold segment: %w", err))
	}
	return nil
}

// closing seals the cold segment in the table.
type closing struct{ c *coldSegment }

func (k closing) Apply(tx *Tx) error {
	g := *tx.segmentNow(k.c.slot)
	g.state, g.used, g.time, g.full = segSealed, k.c.filled, k.c.age.mean(time.Now().UnixNano()), g.live
	return tx.setSegment(k.c.slot, g)
}

func (s *Store) closeCold(c *coldSegment) error {
	if err := s.settleCold(c); err != nil {
		return err
	}
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

// scan calls fn for each record of a victim, until it returns errFull. The
// payload is not verified; it is fn's only during the call. A segment that
// was given back meanwhile has no records.
func (s *Store) scan(v victim, fn func(*layout.Record, []byte) error) error {
	s.mu.RLock()
	same := s.segs[v.slot].seq == v.seq
	if same {
		s.pins[v.slot].Add(1)
	}
	s.mu.RUnlock()
	if !same {
		return nil
	}
	defer s.pins[v.slot].Add(-1)
	w := window{s: s, slot: v.slot, end: (int(v.used) + layout.BlockSize - 1) &^ (layout.BlockSize - 1)}
	defer w.settle() // what nobody asked for does no harm, but must not come later
	b, err := w.at(0, layout.BlockSize)
	if err != nil {
		return err
	}
	h, err := layout.DecodeSegmentHeader(b, s.store, s.dev.Name(), v.slot, s.slotOffset(v.slot))
	if err != nil {
		return err
	}
	seed := layout.ChainSeed(s.store, h.Incarnation)
	for off := layout.BlockSize; off < int(v.used); {
		b, err := w.at(off, layout.RecordHeaderBytes)
		if err != nil {
			return err
		}
		// Lengths are believed no further than to read so much.
		if n := layout.RecordLen(b); n <= int64(int(v.used)-off) && n <= recordMax {
			if b, err = w.at(off, int(n)); err != nil {
				return err
			}
		}
		rec, _, _, payload, _, err := layout.DecodeRecordLoose(b, seed, sealfs.MakeLSN(v.seq, uint32(off)))
		if err != nil && h.Kind == layout.Cold && int64(v.used) == s.seg {
			return nil // the cleaner died while this was its open segment
		}
		if err != nil {
			return &sealfs.Corruption{Where: s.dev.Name(), Off: s.slotOffset(v.slot) + int64(off), What: "a record of a sealed segment does not verify"}
		}
		if err := fn(&rec, payload); err != nil {
			if err == errFull {
				return nil
			}
			return err
		}
		off += int(rec.Bytes())
	}
	return nil
}

// A window is the part of a segment that the cleaner has read, a piece at a
// time, while the next one is being read.
type window struct {
	s        *Store
	slot     uint32
	end      int // of what may be read, in whole blocks
	from, to int // what of it stands in gc.window, in whole blocks
	coming   chan error
	piece    int // being read behind to
}

// at returns what has been read from off on: at least n bytes, or all up to the
// end. off never decreases. The bytes are valid until the next call.
func (w *window) at(off, n int) ([]byte, error) {
	buf := w.s.gc.window
	if buf == nil {
		buf = disk.AlignedBuffer(int(min(w.s.seg, 2*cleanPiece+recordMax+layout.BlockSize)))
		w.s.gc.window = buf
	}
	for w.to < min(off+n, w.end) {
		if err := w.settle(); err != nil {
			return nil, err
		}
		if keep := min(off&^(layout.BlockSize-1), w.to); keep > w.from {
			copy(buf, buf[keep-w.from:w.to-w.from])
			w.from = keep
		}
		if w.to < min(off+n, w.end) {
			w.read(buf)
			if err := w.settle(); err != nil {
				return nil, err
			}
		}
		if !w.s.bg.off.Load() {
			w.read(buf)
		}
		w.s.rest()
	}
	return buf[off-w.from : w.to-w.from], nil
}

// read begins to read the next piece, if there is one and room for it.
func (w *window) read(buf []byte) {
	w.piece = min(cleanPiece, w.end-w.to, len(buf)-(w.to-w.from))
	if w.piece <= 0 {
		return
	}
	b, off := buf[w.to-w.from:][:w.piece], w.s.slotOffset(w.slot)+int64(w.to)
	w.coming = make(chan error, 1)
	lane := w.s.o.Turns.Mine().Child(1)
	read := func() {
		_, err := w.s.dev.ReadAt(b, off)
		w.coming <- err
	}
	if w.s.bg.off.Load() {
		read()
		return
	}
	go func() {
		lane.Take()
		read()
	}()
}

// settle waits for the piece that is being read. It must be called before the
// window is given up.
func (w *window) settle() error {
	if w.coming == nil {
		return nil
	}
	lane := w.s.o.Turns.Mine()
	err := <-w.coming
	lane.Take()
	w.coming = nil
	if err != nil {
		return fmt.Errorf("read of slot %d of %s: %w: %w", w.slot, w.s.dev.Name(), err, sealfs.ErrIO)
	}
	w.to += w.piece
	return nil
}
