package lsfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// seqGap is skipped at each recovery, so that the sequence numbers of segments
// that a power cut took are not issued again. No power cut takes more: what is
// not durable spans at most the ring and a second of writing.
const seqGap = 4096

// recovered is what recovery found.
type recovered struct {
	end     sealfs.LSN // of the log
	slot    uint32     // of the segment it lies in
	chain   uint32
	records int
	staged  int // of them, only in staging
}

// recover replays the log from the region's checkpoint, first on the device
// and where that ends in staging, drains what only staging held, checkpoints,
// and opens a segment under a new incarnation. Each step leaves a state from
// which a crash recovers to the same end.
func (s *Store) recover(h pmem.Header, kept *pmem.Staging) (*recovered, error) {
	sb := s.Superblock()
	if kept == nil {
		var err error
		if kept, err = s.findStaging(&sb, &h); err != nil {
			return nil, err
		}
	}
	replayFrom := func(dry bool) (*replay, error) {
		rp := &replay{s: s, kept: kept, dry: dry, next: layout.NoSlot, last: sb.FirstPrev, rec: recovered{end: h.Start, slot: h.StartSlot, chain: h.Chain}}
		return rp, rp.run()
	}
	if s.isDax() && (kept == nil || !kept.Durable()) {
		// Redo goes in place for good, so its records must be durable before: those
		// that only the ring holds, and those that stand in the device's cache.
		if kept != nil {
			if _, err := replayFrom(true); err != nil {
				return nil, err
			}
		}
		if err := s.dev.Flush(); err != nil {
			return nil, fmt.Errorf("flush of %s: %w", s.dev.Name(), err)
		}
	}
	rp, err := replayFrom(false)
	if err != nil {
		return nil, err
	}
	if err := rp.beyond(); err != nil {
		return nil, err
	}
	rotten, err := s.region.Recovered()
	if err != nil {
		return nil, err
	}
	if len(rotten) > 0 {
		s.log.Warn("pages of the region are damaged: what stands in them is answered with errors", "region", s.regionName, "pages", rotten)
	}
	if err := s.mend(); err != nil {
		return nil, err
	}
	if err := s.loadTable(); err != nil {
		return nil, err
	}
	s.loadFar(&sb)
	// Also what was read from the device may stand in its cache only; the
	// region must not know more than the device.
	if err := s.dev.Flush(); err != nil {
		return nil, fmt.Errorf("flush of %s: %w", s.dev.Name(), err)
	}
	s.incarnation = sb.Incarnation + 1
	s.seed = layout.ChainSeed(s.store, s.incarnation)
	if err := s.settle(&rp.rec); err != nil {
		return nil, err
	}
	if kept != nil {
		if err := kept.Close(false); err != nil {
			return nil, err
		}
	}
	if s.rings != nil && !s.isDax() {
		if err := s.rings.RemoveRing(); err != nil {
			return nil, err
		}
	}
	return &rp.rec, s.start(&rp.rec)
}

// mend lets a repair change what was recovered.
func (s *Store) mend() error {
	if s.o.Mend == nil {
		return nil
	}
	tx := s.region.Begin()
	if err := s.o.Mend(tx); err != nil {
		tx.Reset()
		return err
	}
	tx.Commit()
	return nil
}

// findStaging opens the ring that the last process left, if it is this store's
// and of its last incarnation, and lies on persistent memory or is of this boot;
// nil if there is none. One that has rotted is refused: what was answered may be
// nowhere else.
func (s *Store) findStaging(sb *layout.Superblock, rh *pmem.Header) (*pmem.Staging, error) {
	ring, err := s.findRing(sb, rh)
	if ring != nil || err != nil || s.o.StagingPath == "" {
		return ring, err
	}
	st, err := pmem.OpenStaging(s.o.StagingPath)
	if errors.Is(err, sealfs.ErrNotExist) || err != nil && unfinished(s.o.StagingPath) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("staging may hold what is not yet on %s, and cannot be used (to go on without it, remove it): %w", s.dev.Name(), err)
	}
	boot, err := pmem.BootID()
	h := st.Header()
	if err != nil || h.Store != sb.Store || h.Incarnation != sb.Incarnation || h.BootID != boot || h.SegmentBytes != sb.SegmentBytes {
		return nil, st.Close(false)
	}
	return st, nil
}

// unfinished reports whether the file at path is a ring whose maker died before it
// had a header.
func unfinished(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	b := make([]byte, layout.BlockSize)
	n, err := f.ReadAt(b, 0)
	return (err == nil || err == io.EOF) && len(bytes.Trim(b[:n], "\x00")) == 0
}

// replay follows the chain.
type replay struct {
	s     *Store
	kept  *pmem.Staging
	dry   bool // bring to the device what only staging holds, apply nothing
	rec   recovered
	next  uint32       // successor of the segment, as announced in it
	last  sealfs.LSN   // where the incarnation before the present one ended
	index *headers     // of all segments, for a replay over several incarnations; or nil
	after func() error // called after each segment, if not nil

	incarnation uint32     // of the segment in which the log ends so far
	looked      bool       // proof is that for the log's end at seen
	seen, proof sealfs.LSN // see witness
}

// source is one copy of a segment: on the device or in staging.
type source struct {
	data  []byte
	known int // bytes of data that are read
	fetch func(upto int) error
}

// run replays from the checkpoint's segment to the end of the log.
func (rp *replay) run() error {
	s := rp.s
	slot, from := rp.rec.slot, rp.rec.end
	if from == 0 {
		return rp.follow() // the log begins where the first incarnation does
	}
	if slot >= uint32(len(s.segs)) || int64(from.Off()) > s.seg {
		return &sealfs.Corruption{Where: s.regionName, Off: 0, What: "the checkpoint names a place outside the device"}
	}
	// The successor of the checkpoint's segment may have been announced before
	// the checkpoint, so the whole segment is read for its announcements.
	if err := rp.segment(slot, from.Seq(), from.Off(), nil); err != nil {
		return err
	}
	return rp.follow()
}

// follow replays the segments that continue the log.
func (rp *replay) follow() error {
	for {
		h, err := rp.successor()
		if err != nil || h == nil {
			return err
		}
		slot, seq := h.Slot, h.Seq
		before := rp.rec.records
		end := rp.rec
		rp.rec.slot, rp.rec.end = slot, sealfs.MakeLSN(seq, layout.BlockSize)
		if err := rp.segment(slot, seq, layout.BlockSize, h); err != nil {
			return err
		}
		if rp.rec.records == before {
			// Its header is there, its first record is not: it was never entered.
			rp.rec = end
			return nil
		}
	}
}

// successor finds the header of the segment that continues the log behind the
// current end, nil if there is none.
func (rp *replay) successor() (*layout.SegmentHeader, error) {
	s := rp.s
	sb := s.Superblock()
	slot, least := rp.next, uint32(0)
	if sb.FirstPrev == rp.rec.end {
		// The log was continued by a recovery. An earlier one that came to the same
		// end may have left a header in the same slot, under the same number.
		slot, least = sb.FirstSlot, sb.Incarnation
	}
	if rp.index != nil && sb.FirstPrev != rp.rec.end {
		return rp.index.after(rp.rec.end, rp.rec.chain), nil
	}
	if slot == layout.NoSlot || slot >= uint32(len(s.segs)) {
		return nil, nil
	}
	return rp.header(slot, func(h *layout.SegmentHeader) bool {
		return h.Kind == layout.Hot && h.Prev == rp.rec.end && h.Chain == rp.rec.chain && h.Seq > rp.rec.end.Seq() &&
			h.Incarnation >= least && h.Incarnation <= sb.Incarnation
	})
}

// header reads a segment header from the device, or from staging if the device
// has none that continues the log; nil if neither has.
func (rp *replay) header(slot uint32, continues func(*layout.SegmentHeader) bool) (*layout.SegmentHeader, error) {
	s := rp.s
	b := disk.AlignedBuffer(layout.BlockSize)
	off := s.slotOffset(slot)
	if _, err := s.dev.ReadAt(b, off); err != nil {
		return nil, fmt.Errorf("read of the header of slot %d of %s: %w: %w", slot, s.dev.Name(), err, sealfs.ErrIO)
	}
	h, err := layout.DecodeSegmentHeader(b, s.store, s.dev.Name(), slot, off)
	if err == nil && continues(h) {
		return h, nil
	}
	if rp.kept != nil {
		for i := range int(rp.kept.Header().Chunks) {
			h, err := layout.DecodeSegmentHeader(rp.kept.Chunk(i), s.store, s.o.StagingPath, slot, 0)
			if err == nil && continues(h) {
				return h, nil
			}
		}
	}
	if err != nil {
		return rp.rotten(slot, continues), nil
	}
	return nil, nil
}

// rotten makes up the header of a segment that continues the log, if its own has rotted:
// nothing stands in it but what its first record says, or is known. Without a witness
// that the log was durable beyond it, a power cut took the header, and the log ends before it.
func (rp *replay) rotten(slot uint32, continues func(*layout.SegmentHeader) bool) *layout.SegmentHeader {
	sb := rp.s.Superblock()
	h := rp.opened(slot, rp.rec.end.Seq(), max(rp.incarnation, 1), &sb)
	if h == nil {
		return nil
	}
	h.Prev, h.Chain = rp.rec.end, rp.rec.chain
	if !continues(h) || !rp.chained(slot, h) || rp.witness() <= rp.rec.end {
		return nil
	}
	rp.s.log.Error("header of a segment is damaged; the log is followed without it", "dev", rp.s.dev.Name(), "slot", slot, "offset", rp.s.slotOffset(slot))
	return h
}

// segment replays the records of one segment from byte from on. Its header is
// known; without one, the device has it, and the records before from are read for the
// successor they name.
func (rp *replay) segment(slot, seq, from uint32, known *layout.SegmentHeader) error {
	s := rp.s
	dev := &source{data: disk.AlignedBuffer(int(s.seg))}
	dev.fetch = func(upto int) error {
		for dev.known < upto {
			n := min(1<<20, len(dev.data)-dev.known)
			off := s.slotOffset(slot) + int64(dev.known)
			if _, err := s.dev.ReadAt(dev.data[dev.known:dev.known+n], off); err != nil {
				return fmt.Errorf("read of %d bytes at byte %d of %s: %w: %w", n, off, s.dev.Name(), err, sealfs.ErrIO)
			}
			dev.known += n
		}
		return nil
	}
	if err := dev.fetch(layout.BlockSize); err != nil {
		return err
	}
	sources := []*source{dev}
	var ring []byte
	chunk := rp.chunk(seq)
	if chunk >= 0 {
		ring = rp.kept.Chunk(chunk)
		sources = append(sources, &source{data: ring, known: len(ring), fetch: func(int) error { return nil }})
	}
	// The incarnation of the segment seeds its records' sums. The device's
	// header may be missing when only staging has the segment.
	h, err := layout.DecodeSegmentHeader(dev.data, s.store, s.dev.Name(), slot, s.slotOffset(slot))
	onDevice := err == nil && h.Seq == seq && (known == nil || h.Incarnation == known.Incarnation)
	if !onDevice {
		h = known
	}
	if h == nil && ring != nil {
		if x, err := layout.DecodeSegmentHeader(ring, s.store, s.o.StagingPath, slot, 0); err == nil && x.Seq == seq {
			h = x
		}
	}
	if h == nil {
		h = rp.guess(dev, seq)
	}
	if h == nil {
		return &sealfs.Corruption{Where: s.dev.Name(), Off: s.slotOffset(slot), What: fmt.Sprintf("the header of segment %d, where the log continues, does not verify", seq)}
	}
	seed := layout.ChainSeed(s.store, h.Incarnation)
	rp.incarnation = h.Incarnation
	if known == nil {
		rp.announcements(dev, seed, seq, from)
	}

	staged := -1 // first byte that only staging had
	if !onDevice {
		staged = 0
	}
	for off := int(from); off+layout.RecordHeaderBytes <= int(s.seg); {
		at := sealfs.MakeLSN(seq, uint32(off))
		if at == rp.last || rp.index != nil && rp.index.ends(at, rp.rec.chain, h.Incarnation) {
			break // an incarnation ended here: what follows is dead
		}
		rec, crc, op, redo, which, err := rp.record(sources, off, seed, at)
		if err != nil {
			return err
		}
		if which < 0 {
			break
		}
		if which > 0 {
			rp.rec.staged++
			if staged < 0 {
				staged = off
			}
			// The process may have died before the record was durable.
			rp.kept.Settle(chunk, off, int(rec.Bytes()))
		}
		if !rp.dry {
			if err := s.region.ApplyRedo(redo); err != nil {
				return fmt.Errorf("redo of the record at %v: %w", at, err)
			}
		}
		if rec.Kind == layout.KindOpen || rec.Kind == layout.KindNext {
			if next, ok := layout.ReadSlot(op); ok {
				rp.next = next
			}
		}
		off += int(rec.Bytes())
		rp.rec.end, rp.rec.chain, rp.rec.slot = sealfs.MakeLSN(seq, uint32(off)), crc, slot
		rp.rec.records++
	}
	if rp.after != nil {
		if err := rp.after(); err != nil {
			return err
		}
	}
	return rp.drain(ring, slot, staged)
}

// record reads one record from the first source that has it; which is its
// index, -1 if none has.
func (rp *replay) record(sources []*source, off int, seed uint32, at sealfs.LSN) (rec layout.Record, crc uint32, op, redo []byte, which int, err error) {
	torn := -1 // the last source whose record is sound but for the payload
	for i, src := range sources {
		if err := src.fetch(min(off+recordMax, len(src.data))); err != nil {
			return rec, 0, nil, nil, -1, err
		}
		rec, crc, op, payload, redo, err := layout.DecodeRecord(src.data[off:], seed, at, rp.rec.chain)
		if err != nil {
			continue
		}
		if rec.PayloadOK(payload) {
			return rec, crc, op, redo, i, nil
		}
		torn = i
	}
	if torn < 0 {
		return rec, 0, nil, nil, -1, nil
	}
	rec, crc, op, _, redo, err = layout.DecodeRecord(sources[torn].data[off:], seed, at, rp.rec.chain)
	// A payload goes into the ring before its header, and what was durable on the
	// device was whole: then it has rotted, which costs its file and nothing else.
	// Else a power cut took a part of it, and the log ends here. On persistent memory
	// nothing but the fence behind the record orders payload and header.
	end, cut := at+sealfs.LSN(rec.Bytes()), false
	if rp.lasting() {
		cut = !rp.reached(end)
	} else {
		cut = torn == 0 && rp.witness() < end
	}
	if cut {
		torn = -1
	} else {
		rp.s.log.Error("payload in the log is damaged", "dev", rp.s.dev.Name(), "lsn", at.String(), "ino", uint64(rec.Ino), "file_offset", rec.Offset)
	}
	return rec, crc, op, redo, torn, err
}

// guess makes up the header of a segment in which the log starts, if its own has
// rotted: its first record verifies under the right incarnation only.
func (rp *replay) guess(dev *source, seq uint32) *layout.SegmentHeader {
	if dev.fetch(min(layout.BlockSize+recordMax, len(dev.data))) != nil {
		return nil
	}
	sb := rp.s.Superblock()
	for inc := sb.Incarnation; inc > 0 && inc+seeds > sb.Incarnation; inc-- {
		at := sealfs.MakeLSN(seq, layout.BlockSize)
		if _, _, _, _, _, err := layout.DecodeRecordLoose(dev.data[layout.BlockSize:], layout.ChainSeed(rp.s.store, inc), at); err == nil {
			return &layout.SegmentHeader{Seq: seq, Incarnation: inc, Kind: layout.Hot}
		}
	}
	return nil
}

// seeds is how many incarnations are tried where a header has rotted.
const seeds = 16

// announcements looks for the successor that the part of a segment before the
// checkpoint names. That part is durable and known to be true.
func (rp *replay) announcements(dev *source, seed uint32, seq, upto uint32) {
	for off := uint32(layout.BlockSize); off < upto; {
		if dev.fetch(min(int(off)+recordMax, len(dev.data))) != nil {
			return
		}
		rec, _, op, _, _, err := layout.DecodeRecordLoose(dev.data[off:], seed, sealfs.MakeLSN(seq, off))
		if err != nil {
			return
		}
		if next, ok := layout.ReadSlot(op); ok && (rec.Kind == layout.KindOpen || rec.Kind == layout.KindNext) {
			rp.next = next
		}
		off += uint32(rec.Bytes())
	}
}

// drain writes what only staging held of a segment, from the block in which
// byte staged lies up to the end of the log. Blocks that the device has already
// are written again with the same bytes.
func (rp *replay) drain(ring []byte, slot uint32, staged int) error {
	if staged < 0 || ring == nil || rp.rec.slot != slot {
		return nil
	}
	s := rp.s
	from := staged &^ (layout.BlockSize - 1)
	to := (int(rp.rec.end.Off()) + layout.BlockSize - 1) &^ (layout.BlockSize - 1)
	if _, err := s.dev.WriteAt(ring[from:to], s.slotOffset(slot)+int64(from)); err != nil {
		return fmt.Errorf("write of what staging held: %w", err)
	}
	return nil
}

// loadTable builds the mirror of the segment table.
func (s *Store) loadTable() error {
	for slot := range s.segs {
		b, err := s.region.Table(slot*entryBytes, entryBytes)
		if err != nil {
			return err
		}
		g, ok := decodeSegment(b)
		if !ok || int64(g.live) > s.seg || int64(g.used) > s.seg {
			return &sealfs.Corruption{Where: s.regionName, Off: -1, What: fmt.Sprintf("the segment table's entry for slot %d is impossible", slot)}
		}
		s.segs[slot] = g
		if g.state == segFree {
			s.free = append(s.free, uint32(slot))
			continue
		}
		if other, dup := s.slotOf[g.seq]; dup {
			return &sealfs.Corruption{Where: s.regionName, Off: -1, What: fmt.Sprintf("slots %d and %d hold the same segment %d", other, slot, g.seq)}
		}
		s.slotOf[g.seq] = uint32(slot)
		s.live += int64(g.live)
	}
	s.nextSeq = binary.LittleEndian.Uint32(s.region.State()[stateNextSeq:])
	return nil
}

// settle checkpoints what was replayed, so that the next recovery begins at the
// end of this one's log, and then durably raises the incarnation and names the
// first segment of it.
func (s *Store) settle(rec *recovered) error {
	// Always, also when nothing was replayed: the header that was read may stand
	// in a cache only, left by a process that died before it was flushed.
	// Under the old incarnation: the region's is never above the superblock's.
	if err := s.writeRegion(pmem.Header{Store: s.store, Incarnation: s.incarnation - 1, Start: rec.end, StartSlot: rec.slot, Chain: rec.chain}); err != nil {
		return err
	}
	s.nextSeq = max(s.nextSeq, rec.end.Seq()+1) + seqGap
	s.giveBackOrHold(s.dead(rec.end))
	if s.far.root != 0 && len(s.free) == 0 {
		s.farForget("given up for a segment to start with")
		s.farRelease()
	}
	if len(s.free) == 0 {
		return fmt.Errorf("store on %s has no free segment to begin with: %w", s.dev.Name(), sealfs.ErrNoSpace)
	}
	s.nextSlot, _ = s.takeFree(0)
	// Both copies: without this link the incarnation's log would not be found,
	// so the decay of one copy must not hide it.
	for range 2 {
		err := s.writeSuper(func(sb *layout.Superblock) {
			sb.Incarnation, sb.FirstSlot, sb.FirstPrev, sb.Tail = s.incarnation, s.nextSlot, rec.end, rec.end
			if s.far.root == 0 {
				noRoot(sb)
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// beginning is the first change of an incarnation: what was open is sealed, the
// first segment is opened.
type beginning struct {
	s    *Store
	rec  *recovered
	slot uint32
	seq  uint32
}

func (b *beginning) Apply(tx *Tx) error {
	now := time.Now().UnixNano()
	for slot, g := range b.s.segs {
		if g.state != segOpen {
			continue
		}
		g.state, g.time = segSealed, now
		g.used = uint32(b.s.seg) // a cold one: its records tell where they end
		if uint32(slot) == b.rec.slot {
			g.used = b.rec.end.Off()
		}
		if err := tx.setSegment(uint32(slot), g); err != nil {
			return err
		}
	}
	return tx.openSegment(b.slot, b.seq, layout.Hot, now)
}

// start makes the new ring and opens the first segment.
func (s *Store) start(rec *recovered) error {
	boot, err := pmem.BootID()
	if err != nil {
		return err
	}
	h := pmem.StagingHeader{
		Store: s.store, Incarnation: s.incarnation, BootID: boot, SegmentBytes: uint32(s.seg),
		Chunks: uint32(max(2, min(s.o.StagingBytes/s.seg, int64(len(s.segs))/4, pmem.StagingChunksMax))),
	}
	switch {
	case s.isDax():
		err = s.createRing(h, rec)
	case s.o.StagingPath == "":
		s.staging = pmem.NewStaging(h)
	default:
		s.staging, err = s.roomFor(h, func(h pmem.StagingHeader) (*pmem.Staging, error) { return pmem.CreateStaging(s.o.StagingPath, h) })
	}
	if err != nil {
		return err
	}
	s.sync.durable.Store(uint64(rec.end))
	s.chain = rec.chain
	first := &hotSegment{seq: s.nextSeq, slot: s.nextSlot}
	after, _ := s.takeFree(s.o.ReserveSegments) // else it is announced when there is one
	tx := s.begin(0)
	if err := (&beginning{s, rec, first.slot, first.seq}).Apply(tx); err != nil {
		tx.Reset()
		return err
	}
	sh := layout.SegmentHeader{
		Incarnation: s.incarnation, Seq: first.seq, Kind: layout.Hot, Slot: first.slot,
		Chain: s.chain, Prev: rec.end, Created: time.Now().UnixNano(),
	}
	s.enter(first, &sh, tx, after)
	return nil
}

// roomFor makes the ring's file, a smaller one where shared memory is short:
// containers often have but 64 MiB of it.
func (s *Store) roomFor(h pmem.StagingHeader, create func(pmem.StagingHeader) (*pmem.Staging, error)) (*pmem.Staging, error) {
	for {
		st, err := create(h)
		if !errors.Is(err, sealfs.ErrNoSpace) || h.Chunks == 2 {
			return st, err
		}
		h.Chunks = max(2, h.Chunks/2)
		s.log.Warn("not enough room for the ring, trying a smaller one", "path", s.o.StagingPath, "bytes", int64(h.Chunks)*s.seg)
	}
}
