package lsfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"sealfs"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// recordMax bounds a record, in bytes. Recovery reads so far beyond the start of
// a record before it judges it.
const recordMax = 2 << 20

// Class says what a request may use of the reserve.
type Class uint8

// The classes.
const (
	Normal   Class = iota // leaves the reserve alone
	Freeing               // deletes and truncations: may use the reserve
	cleaning              // the cleaner's and the checkpoint's own records
)

// Intent is what an update brings along. Op and Payload are not kept.
type Intent struct {
	Class      Class
	Op         []byte     // encoded logical operation
	Payload    []byte     // at most PayloadMax
	PayloadCRC uint32     // CRC-32C of Payload, computed by the caller outside the lock
	Ino        sealfs.Ino // whose data the payload is
	Offset     uint64     // where it begins in the file
	kind       layout.Kind
}

// Change is a change of the region. Apply may be called more than once, each
// time on the same state with another payload address, and must not keep tx. If
// it returns an error, nothing has happened. It runs under the store's lock: no
// I/O, no waiting.
type Change interface {
	Apply(tx *Tx) error
}

// Tx is a transaction on the region that keeps account of the log's space.
type Tx struct {
	*pmem.Tx
	s       *Store
	payload sealfs.LSN
	touched []touched
}

type touched struct {
	slot uint32
	seg  segment
}

// Payload returns the position at which the payload of this update will stand.
func (t *Tx) Payload() sealfs.LSN { return t.payload }

// Retain says that n bytes of the log at at are referenced from now on.
func (t *Tx) Retain(at sealfs.LSN, n uint32) error { return t.addLive(at, int64(n)) }

// Release says that n bytes of the log at at are no longer referenced.
func (t *Tx) Release(at sealfs.LSN, n uint32) error { return t.addLive(at, -int64(n)) }

// Update executes a change and appends its record to the log. On return the
// change is visible and survives the death of the process; to survive a power
// cut it needs Sync with the returned position, which lies behind the record.
//
// Update may wait for space in the ring or on the device. It returns what
// ch.Apply returned (nothing has happened then), ErrNoSpace, or why the store
// is read-only.
func (s *Store) Update(in *Intent, ch Change) (sealfs.LSN, error) {
	if in.kind == 0 {
		in.kind = layout.KindOp
	}
	if in.Class == Normal && s.crowded.Load() {
		s.waitMemory()
	}
	if in.Class == Normal && s.gc.pace.brake.Load() != 0 {
		s.slowDown(len(in.Payload) + len(in.Op))
	}
	for {
		end, at, err := s.appendLocked(in, ch)
		switch {
		case err == nil:
			return end, nil
		case err == errRingFull:
			err = s.waitRing()
		case err == errNoSlot:
			err = s.waitSpace(in.Class, at)
		case errors.Is(err, sealfs.ErrNoSpace) && s.region.NeedsGrowth() && s.region.Grow() == nil:
			err = nil // the region was too small, and is larger now
		}
		if err != nil {
			return 0, err
		}
	}
}

// begin starts the only transaction. Needs mu.
func (s *Store) begin(payload sealfs.LSN) *Tx {
	t := &s.tx
	t.Tx, t.s, t.payload, t.touched = s.region.Begin(), s, payload, t.touched[:0]
	return t
}

// Undoer is a Change that keeps something beside the region. Undo takes back
// what Apply did there, before anybody else can see it: the change does not
// happen, or not yet. It may be called when there is nothing to take back.
type Undoer interface{ Undo() }

func undo(ch Change) {
	if u, ok := ch.(Undoer); ok {
		u.Undo()
	}
}

// appendLocked is append with the lock, for which the cleaner lets others go first.
func (s *Store) appendLocked(in *Intent, ch Change) (end sealfs.LSN, at uint32, err error) {
	if in.Class != cleaning {
		s.gc.waiting.Add(1)
	}
	err = s.locked(func() (err error) {
		if in.Class != cleaning {
			s.gc.waiting.Add(-1)
		}
		end, err = s.append(in, ch)
		at = s.open().seq
		return err
	})
	return end, at, err
}

// append executes, publishes and applies one update. Needs mu.
func (s *Store) append(in *Intent, ch Change) (sealfs.LSN, error) {
	if err := s.Failure(); err != nil {
		return 0, err
	}
	if s.closed && in.Class != cleaning {
		return 0, fmt.Errorf("store on %s: %w", s.dev.Name(), sealfs.ErrClosed)
	}
	if len(in.Payload) > s.PayloadMax() {
		return 0, fmt.Errorf("payload of %d bytes is longer than %d: %w", len(in.Payload), s.PayloadMax(), sealfs.ErrInvalid)
	}
	if n := int64(len(in.Payload)); in.Class == Normal && n > 0 && s.live+n > s.usable() {
		return 0, s.full()
	}
	if in.Class == Normal && s.region.Tight() {
		return 0, fmt.Errorf("region of the store on %s is full: %w", s.dev.Name(), sealfs.ErrNoSpace)
	}
	if in.Class == Normal && len(in.Payload) > 0 && len(s.free) < s.o.ReserveSegments {
		return 0, errNoSlot // the open segment is the reserve's, too: data in it would not come back
	}
	end := s.seg - layout.BlockSize // the last block stays free for a KindNext record
	if in.Class != cleaning && s.nextSlot == layout.NoSlot {
		// The next segment may be long in coming, and has to come from the cleaner.
		if err := s.announce(in.Class); err != nil {
			if len(in.Payload) > 0 {
				return 0, err
			}
			end -= s.seg / 4
		}
	}
	for rolled := false; ; rolled = true {
		open := s.open()
		rec := layout.Record{
			LSN: s.tail(), Prev: s.chain, Kind: in.kind,
			OpLen: uint32(len(in.Op)), PayloadLen: uint32(len(in.Payload)), PayloadCRC: in.PayloadCRC,
			Ino: in.Ino, Offset: in.Offset,
		}
		if int64(open.filled)+rec.Bytes() > end && !rolled {
			if err := s.roll(in.Class); err != nil {
				return 0, err
			}
			end = s.seg - layout.BlockSize
			continue
		}
		tx := s.begin(rec.PayloadLSN())
		if err := ch.Apply(tx); err != nil {
			tx.Reset()
			return 0, err
		}
		s.redo = tx.AppendRedo(s.redo[:0])
		if len(s.redo) == 0 && len(in.Payload) == 0 {
			tx.Reset() // nothing changed: no record
			return s.tail(), nil
		}
		rec.RedoLen = uint32(len(s.redo))
		if rec.Bytes() > recordMax {
			tx.Reset()
			undo(ch)
			return 0, fmt.Errorf("a change of %d bytes is larger than a record may be: %w", rec.Bytes(), sealfs.ErrNoSpace)
		}
		if int64(open.filled)+rec.Bytes() <= end {
			s.publish(&rec, in.Op, in.Payload, s.redo)
			tx.commitSegments()
			tx.Commit()
			if in.Class != cleaning {
				s.changes++
			}
			return s.tail(), nil
		}
		tx.Reset()
		undo(ch)
		if rolled {
			return 0, fmt.Errorf("a change of %d bytes does not fit a segment of %d: %w", rec.Bytes(), s.seg, sealfs.ErrNoSpace)
		}
		if err := s.roll(in.Class); err != nil {
			return 0, err
		}
		end = s.seg - layout.BlockSize
	}
}

// publish puts a record into the ring: from here on it survives SIGKILL, on
// persistent memory a power cut. Needs mu, and that the record fits.
func (s *Store) publish(rec *layout.Record, op, payload, redo []byte) {
	open := s.open()
	n := rec.Bytes()
	s.changing = true
	b := s.stage(open.chunk, open.filled, uint32(n))
	if rec.Kind == layout.KindPad {
		clear(b)
	}
	copy(b[layout.RecordHeaderBytes+len(op):], payload)
	s.chain = rec.Put(b, s.seed, op, redo)
	s.staged(open.chunk, open.filled, b)
	s.staging.Fence()
	open.filled += uint32(n)
	s.staging.SetTail(uint64(s.tail()))
	s.logged += n
	s.waiting += n
	s.stats.records.Add(1)
	s.stats.logBytes.Add(uint64(n))
	s.stats.redoBytes.Add(uint64(len(redo)))
	s.bg.kick(s.waiting >= s.o.DrainBytes)
	if s.unchecked += n; s.unchecked >= collectEvery {
		s.unchecked = 0
		if s.needsCollection() {
			s.pokeCollector()
		}
	}
}

// pad fills the open segment's last block. Needs mu.
func (s *Store) pad() {
	open := s.open()
	if gap := -open.filled & (layout.BlockSize - 1); gap != 0 {
		rec := layout.Record{LSN: s.tail(), Prev: s.chain, Kind: layout.KindPad, PayloadLen: gap - layout.RecordHeaderBytes, Offset: uint64(s.Durable())}
		s.publish(&rec, nil, nil, nil)
		s.stats.padBytes.Add(uint64(gap))
	}
}

// roll seals the open segment and opens its successor, whose first record makes
// both known to the segment table. Needs mu.
func (s *Store) roll(c Class) error {
	old := s.open()
	chunk := (old.chunk + 1) % s.chunks()
	if len(s.hot) == s.chunks() && !s.hot[0].durable.Load() {
		return errRingFull
	}
	if s.nextSlot == layout.NoSlot {
		if err := s.announce(c); err != nil {
			return err
		}
	}
	after, ok := s.takeFor(c)
	if !ok && c != cleaning {
		return errNoSlot
	}
	now := time.Now().UnixNano()
	next := &hotSegment{seq: s.nextSeq, slot: s.nextSlot, chunk: chunk}
	h := layout.SegmentHeader{
		Incarnation: s.incarnation, Seq: next.seq, Kind: layout.Hot, Slot: next.slot,
		Chain: s.chain, Prev: s.tail(), Created: now,
	}
	tx := s.begin(0)
	sealed := s.segs[old.slot]
	sealed.state, sealed.used, sealed.time = segSealed, old.filled, now
	err := tx.setSegment(old.slot, sealed)
	if err == nil {
		err = tx.openSegment(next.slot, next.seq, layout.Hot, now)
	}
	if err != nil {
		tx.Reset()
		if ok {
			s.free = append(s.free, after)
		}
		return err
	}
	s.seal(old)
	if len(s.hot) == s.chunks() {
		s.hot = append(s.hot[:0], s.hot[1:]...)
	}
	s.enter(next, &h, tx, after)
	return nil
}

// openSegment writes the table entry of a segment that is about to be used and
// takes its sequence number.
func (t *Tx) openSegment(slot, seq uint32, kind layout.SegmentKind, now int64) error {
	if err := t.setSegment(slot, segment{seq: seq, state: segOpen, kind: kind, time: now}); err != nil {
		return err
	}
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], max(seq+1, t.s.nextSeq))
	return t.PutState(stateNextSeq, b[:])
}

// seal ends a hot segment; the rest of its last block becomes zeros. Needs mu.
func (s *Store) seal(h *hotSegment) {
	gap := -h.filled & (layout.BlockSize - 1)
	clear(s.staging.Chunk(h.chunk)[h.filled:][:gap])
	h.sealed = true
}

// enter makes next the open segment: its header and first record go into the
// ring, tx into the region. Needs mu.
func (s *Store) enter(next *hotSegment, h *layout.SegmentHeader, tx *Tx, after uint32) {
	s.staging.SetChunkSeq(next.chunk, 0)
	b := s.stage(next.chunk, 0, layout.BlockSize)
	h.Put(b, s.store)
	s.staged(next.chunk, 0, b)
	next.filled = layout.BlockSize
	s.hot = append(s.hot, next)
	s.nextSlot, s.nextSeq = after, next.seq+1
	s.redo = tx.AppendRedo(s.redo[:0])
	op := layout.AppendSlot(nil, after)
	rec := layout.Record{
		LSN: s.tail(), Prev: s.chain, Kind: layout.KindOpen,
		OpLen: uint32(len(op)), RedoLen: uint32(len(s.redo)), Offset: uint64(s.Durable()),
	}
	s.publish(&rec, op, nil, s.redo)
	s.staging.SetChunkSeq(next.chunk, next.seq)
	tx.commitSegments()
	tx.Commit()
	s.stats.rolls.Add(1)
	s.far.rolls++
	s.bg.kick(true)
	s.unchecked = collectEvery // look at the next record, when the region is whole again
}

// announce names a successor for the open segment, which had none when it was
// opened. The last block is kept free for the record.
func (s *Store) announce(c Class) error {
	slot, ok := s.takeFor(c)
	if !ok {
		return errNoSlot
	}
	op := layout.AppendSlot(nil, slot)
	rec := layout.Record{LSN: s.tail(), Prev: s.chain, Kind: layout.KindNext, OpLen: uint32(len(op)), Offset: uint64(s.Durable())}
	if int64(s.open().filled)+rec.Bytes() > s.seg {
		s.free = append(s.free, slot)
		return errNoSlot
	}
	s.publish(&rec, op, nil, nil)
	s.nextSlot = slot
	return nil
}

func (s *Store) chunks() int { return int(s.staging.Header().Chunks) }
