package fsck

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
	pmlayout "sealfs/pmem/layout"
)

// logEnd is a place in the log: behind a record.
type logEnd struct {
	lsn   sealfs.LSN
	slot  uint32 // of the segment
	chain uint32 // header checksum of the record before
}

// span is the part of a segment, in bytes, that the next recovery copies from
// staging to the device.
type span struct {
	from, to int
	ring     []byte // the whole segment
}

// log is pass 3: the log is followed from the checkpoint and replayed, on the
// device and where that ends in staging; then the segment table is checked
// against the segments.
func (c *checker) log() error {
	c.img = newImage(c.reg, c.cachePages, c.sums)
	c.findRing()
	if c.ring == nil && c.hdr.Incompat&pmlayout.FeatureDax != 0 {
		c.problem(RegionRing, c.rep.Region, "it needs the ring of incarnation %d, by convention %s", c.hdr.Incarnation, pmem.RingPath(c.rep.Region))
		return nil
	}
	f := &follower{c: c, next: layout.NoSlot}
	f.end = logEnd{c.hdr.Start, c.hdr.StartSlot, c.hdr.Chain}
	err := f.run()
	c.end = f.end
	c.rep.Records, c.rep.Staged, c.rep.LogEnd = f.records, f.staged, f.end.lsn
	var damage *found
	if errors.As(err, &damage) {
		c.problem(damage.id, damage.where, "%s", damage.detail)
		return nil
	}
	if err != nil {
		return err
	}
	if f.records > 0 {
		c.say("recovering %s in memory, %d of them from staging, to %v", count(f.records, "record"), f.staged, f.end.lsn)
	} else if c.o.Verbose {
		c.say("the log ends at %v, nothing to recover", f.end.lsn)
	}
	where := c.device(f.end.slot, f.end.lsn.Off())
	prev, durable := c.sb.FirstPrev, f.witnessed()
	before := c.hdr.Start <= prev && f.end.lsn < prev
	if before {
		c.problem(LogCut, where, "it ends at %v; an earlier recovery found it to reach %v", f.end.lsn, prev)
	}
	if durable > f.end.lsn {
		c.problem(LogCut, where, "it ends at %v; what was written later says that it was durable up to %v", f.end.lsn, durable)
	}
	if before || durable > f.end.lsn {
		c.mendBy(LogCut, where, func(*editor) string { return c.cutLog(f) })
	}
	f.lookBehind()
	return c.table()
}

// found is a problem on its way up to where it is reported.
type found struct {
	id            ID
	where, detail string
}

func (f *found) Error() string { return f.where + ": " + f.detail }

func stop(id ID, where, format string, args ...any) error {
	return &found{id, where, fmt.Sprintf(format, args...)}
}

// device names a place on the device.
func (c *checker) device(slot, off uint32) string {
	if slot >= c.sb.Segments {
		return c.dev.Name()
	}
	return fmt.Sprintf("%s, byte %d", c.dev.Name(), c.sb.SlotOffset(slot)+int64(off))
}

// findRing opens the ring that the last process left, and forgets it again if it is not
// of this store, its last incarnation and this boot.
func (c *checker) findRing() {
	sb := c.sb
	path := c.o.Staging
	if c.ring == nil && c.o.Reg == nil {
		// On persistent memory it lies beside the region, and is of any boot.
		beside := pmem.RingPath(c.rep.Region)
		ring, err := pmem.OpenStaging(beside)
		if err == nil && ring.Header().Store == sb.Store && ring.Header().Incarnation == sb.Incarnation {
			c.ring, path = ring, beside
		} else if err == nil {
			ring.Close(false)
		} else if !errors.Is(err, sealfs.ErrNotExist) {
			c.problem(StagingLost, beside, "%v", err)
			c.mendBy(StagingLost, beside, func(*editor) string { return c.moveAside(beside) })
		}
	}
	if path == "" && (c.o.Dev == nil || c.o.devOurs) {
		path = c.ringPath()
	}
	if c.ring == nil && path != "" {
		ring, err := pmem.OpenStaging(path)
		if errors.Is(err, sealfs.ErrNotExist) {
			return
		}
		if err != nil {
			c.problem(StagingLost, path, "%v", err)
			c.mendBy(StagingLost, path, func(*editor) string { return c.moveAside(path) })
			return
		}
		boot, err := pmem.BootID()
		if h := ring.Header(); err != nil || h.BootID != boot {
			// A power cut took what was in it; this is a file that somebody copied.
			ring.Close(false)
			return
		}
		c.ring = ring
	}
	if c.ring == nil {
		return
	}
	if h := c.ring.Header(); h.Store != sb.Store || h.Incarnation != sb.Incarnation || h.SegmentBytes != sb.SegmentBytes {
		if c.ring != c.o.Ring {
			c.ring.Close(false)
		}
		c.ring = nil
		return
	}
	c.rep.Staging = path
	if path == "" {
		c.rep.Staging = "memory"
	}
}

// chunk returns the ring's copy of segment seq, nil if it has none.
func (c *checker) chunk(seq uint32) []byte {
	if c.ring == nil || seq == 0 {
		return nil
	}
	for i := range int(c.ring.Header().Chunks) {
		if c.chunkSeq(i) == seq {
			return c.ring.Chunk(i)
		}
	}
	return nil
}

// chunkSeq returns the number of the segment in chunk i of the ring: as the segment's
// own header says it if that is sound, or else as the ring's header does.
func (c *checker) chunkSeq(i int) uint32 {
	b := c.ring.Chunk(i)
	h, err := layout.DecodeSegmentHeader(b, c.sb.Store, "", binary.LittleEndian.Uint32(b[20:]), 0)
	if err != nil || h.Incarnation != c.ring.Header().Incarnation {
		return c.ring.ChunkSeq(i)
	}
	return h.Seq
}

// follower walks along the chain of the log.
type follower struct {
	c       *checker
	end     logEnd
	next    uint32 // slot of the successor, as announced in the segment
	records int
	staged  int    // of them, only in staging
	buf     []byte // a segment of the device
	known   int    // how much of buf has been read

	incarnation uint32 // of the segment in which the end is
	asked       bool   // answer is that of witnessed at askedAt
	askedAt     sealfs.LSN
	answer      sealfs.LSN
}

// run follows the log to its end. Damage that makes the store useless comes
// back as a *found.
func (f *follower) run() error {
	c := f.c
	seg := int(c.sb.SegmentBytes)
	f.buf = disk.AlignedBuffer(seg)
	if f.end.lsn != 0 {
		at := f.end
		if at.slot >= c.sb.Segments || at.lsn.Off() < layout.BlockSize || int(at.lsn.Off()) > seg || at.lsn.Off()%layout.RecordAlign != 0 || at.lsn.Seq() == 0 {
			return stop(LogStart, c.reg.Name(), "slot %d, %v", at.slot, at.lsn)
		}
		if err := f.segment(at.slot, at.lsn.Seq(), at.lsn.Off(), 0); err != nil {
			return err
		}
	}
	for {
		slot, h, err := f.successor()
		if err != nil || h == nil {
			return err
		}
		before, records := f.end, f.records
		f.end.lsn, f.end.slot = sealfs.MakeLSN(h.Seq, layout.BlockSize), slot
		if err := f.segment(slot, h.Seq, layout.BlockSize, h.Incarnation); err != nil {
			return err
		}
		if f.records == records {
			f.end = before // a header alone: the segment was never entered
			delete(c.staged, slot)
			return nil
		}
	}
}

// successor finds the segment that continues the log behind the end; nil if
// there is none.
func (f *follower) successor() (uint32, *layout.SegmentHeader, error) {
	sb := f.c.sb
	slot, least := f.next, uint32(0)
	if sb.FirstPrev == f.end.lsn {
		// A recovery continued the log elsewhere. An earlier one that came to the same
		// end may have left its header in the same slot.
		slot, least = sb.FirstSlot, sb.Incarnation
	}
	if slot >= sb.Segments {
		return slot, nil, nil
	}
	if err := f.load(slot, layout.BlockSize); err != nil {
		return slot, nil, err
	}
	fits := func(b []byte, where string) *layout.SegmentHeader {
		h, err := layout.DecodeSegmentHeader(b, sb.Store, where, slot, sb.SlotOffset(slot))
		if err != nil || h.Kind != layout.Hot || h.Prev != f.end.lsn || h.Chain != f.end.chain || h.Seq <= f.end.lsn.Seq() || h.Incarnation < least || h.Incarnation > sb.Incarnation {
			return nil
		}
		return h
	}
	if h := fits(f.buf, f.c.dev.Name()); h != nil {
		return slot, h, nil
	}
	if ring := f.c.ring; ring != nil {
		for i := range int(ring.Header().Chunks) {
			if h := fits(ring.Chunk(i), f.c.rep.Staging); h != nil {
				return slot, h, nil
			}
		}
	}
	if _, err := layout.DecodeSegmentHeader(f.buf, sb.Store, f.c.dev.Name(), slot, sb.SlotOffset(slot)); err != nil {
		h, e := f.headless(slot, least)
		if h != nil {
			f.c.problem(LogHeader, f.c.device(slot, 0), "segment %d: %v", h.Seq, err)
			f.c.mendBy(LogHeader, f.c.device(slot, 0), f.c.recover)
		}
		return slot, h, e
	}
	return slot, nil, nil
}

// headless makes up the header of the segment in slot if its first record continues the
// log, and the log is known to have been durable beyond; else a power cut took the header.
func (f *follower) headless(slot, least uint32) (*layout.SegmentHeader, error) {
	sb := f.c.sb
	if err := f.load(slot, layout.BlockSize+recordReach); err != nil {
		return nil, err
	}
	first := f.buf[layout.BlockSize:]
	at := sealfs.LSN(binary.LittleEndian.Uint64(first[8:]))
	if at.Off() != layout.BlockSize || at.Seq() <= f.end.lsn.Seq() || f.witnessed() <= f.end.lsn {
		return nil, nil
	}
	for _, inc := range []uint32{sb.Incarnation, max(f.incarnation, 1)} {
		rec, _, _, _, _, err := layout.DecodeRecord(first, layout.ChainSeed(sb.Store, inc), at, f.end.chain)
		if err == nil && rec.Kind == layout.KindOpen && inc >= least {
			return &layout.SegmentHeader{Kind: layout.Hot, Slot: slot, Seq: at.Seq(), Incarnation: inc, Prev: f.end.lsn, Chain: f.end.chain}, nil
		}
	}
	return nil, nil
}

// load reads the front of the segment in slot, at least n bytes of it, to buf.
// For another slot than before it must be called with BlockSize first.
func (f *follower) load(slot uint32, n int) error {
	if n == layout.BlockSize {
		f.known = 0
	}
	for f.known < min(n, len(f.buf)) {
		step := min(1<<20, len(f.buf)-f.known)
		if n == layout.BlockSize {
			step = n
		}
		off := f.c.sb.SlotOffset(slot) + int64(f.known)
		if _, err := f.c.dev.ReadAt(f.buf[f.known:f.known+step], off); err != nil && err != io.EOF {
			return stop(LogUnreadable, f.c.device(slot, uint32(f.known)), "%v", err)
		}
		f.known += step
	}
	return nil
}

// recordReach is how far a record can reach beyond its start: the most that must
// be read to judge it.
const recordReach = 2 << 20

// segment replays the records of a segment from byte from on. incarnation is that
// of its header, 0 if it is not known yet.
func (f *follower) segment(slot, seq, from, incarnation uint32) error {
	c := f.c
	if err := f.load(slot, layout.BlockSize); err != nil {
		return err
	}
	f.next = layout.NoSlot
	ring := c.chunk(seq)
	h, seedErr := layout.DecodeSegmentHeader(f.buf, c.sb.Store, c.dev.Name(), slot, c.sb.SlotOffset(slot))
	onDevice := seedErr == nil && h.Seq == seq && (incarnation == 0 || h.Incarnation == incarnation)
	if !onDevice && ring != nil {
		h, seedErr = layout.DecodeSegmentHeader(ring, c.sb.Store, c.rep.Staging, slot, 0)
	}
	if seedErr == nil && h.Seq != seq {
		seedErr = fmt.Errorf("slot %d holds segment %d, not %d", slot, h.Seq, seq)
	}
	if seedErr != nil && incarnation != 0 { // it was made up
		h, seedErr = &layout.SegmentHeader{Seq: seq, Incarnation: incarnation, Chain: f.end.chain}, nil
	}
	if seedErr != nil {
		return stop(LogStartHeader, c.device(slot, 0), "%v", seedErr)
	}
	if h.Incarnation > c.sb.Incarnation {
		return stop(DeviceStale, c.dev.Name(), "its incarnation is %d, that of the log %d", c.sb.Incarnation, h.Incarnation)
	}
	seed := layout.ChainSeed(c.sb.Store, h.Incarnation)
	f.incarnation = h.Incarnation
	if from > layout.BlockSize {
		if err := f.before(slot, h, seed, ring, from); err != nil {
			return err
		}
	}
	staged := -1 // first byte that only staging has
	if !onDevice {
		staged = 0
	}
	for off := int(from); off+layout.RecordHeaderBytes <= len(f.buf) && f.end.lsn != c.sb.FirstPrev; {
		if f.records%1024 == 0 {
			if err := c.tick(3, int64(f.records), 0); err != nil {
				return err
			}
		}
		if err := f.load(slot, off+recordReach); err != nil {
			return err
		}
		at := sealfs.MakeLSN(seq, uint32(off))
		rec, crc, op, redo, ok := f.record(f.buf[off:], seed, at)
		torn := rec
		if !ok && f.known < len(f.buf) { // it may be longer than usual
			if err := f.load(slot, len(f.buf)); err != nil {
				return err
			}
			rec, crc, op, redo, ok = f.record(f.buf[off:], seed, at)
			torn = rec
		}
		if !ok && ring != nil {
			// A payload goes into the ring before its header: if it is not sound, it has rotted,
			// and the file whose it is says so. On persistent memory a cut may have taken it,
			// if it is that of the last record.
			var fits error
			var payload []byte
			rec, crc, op, payload, redo, fits = layout.DecodeRecord(ring[off:], seed, at, f.end.chain)
			if fits == nil && (!c.lasting() || rec.PayloadOK(payload) || f.reached(at+sealfs.LSN(rec.Bytes()))) {
				ok = true
				f.staged++
				if staged < 0 {
					staged = off
				}
			}
		}
		if !ok && torn.LSN == at && f.witnessed() >= at+sealfs.LSN(torn.Bytes()) {
			// So does one that was durable.
			var fits error
			rec, crc, op, _, redo, fits = layout.DecodeRecord(f.buf[off:], seed, at, f.end.chain)
			ok = fits == nil
		}
		if !ok {
			break
		}
		if err := c.img.redo(redo); err != nil {
			return stop(LogRedo, c.device(slot, uint32(off)), "record at %v: %v", at, err)
		}
		f.announce(&rec, op)
		off += int(rec.Bytes())
		f.end = logEnd{sealfs.MakeLSN(seq, uint32(off)), slot, crc}
		f.records++
	}
	if staged >= 0 && ring != nil {
		c.staged[slot] = span{staged &^ (layout.BlockSize - 1), min(int(f.end.lsn.Off()+layout.BlockSize-1)&^(layout.BlockSize-1), len(ring)), ring}
	}
	return nil
}

// record decodes the record that continues the chain at the front of b.
func (f *follower) record(b []byte, seed uint32, at sealfs.LSN) (rec layout.Record, crc uint32, op, redo []byte, ok bool) {
	rec, crc, op, payload, redo, err := layout.DecodeRecord(b, seed, at, f.end.chain)
	return rec, crc, op, redo, err == nil && rec.PayloadOK(payload)
}

func (f *follower) announce(rec *layout.Record, op []byte) {
	if rec.Kind == layout.KindOpen || rec.Kind == layout.KindNext {
		if next, ok := layout.ReadSlot(op); ok {
			f.next = next
		}
	}
}

// before walks the records of the checkpoint's segment up to the checkpoint: one
// of them may have announced the successor, and the chain must lead there.
func (f *follower) before(slot uint32, h *layout.SegmentHeader, seed uint32, ring []byte, upto uint32) error {
	chain := h.Chain
	off := uint32(layout.BlockSize)
	for off < upto {
		if err := f.load(slot, int(off)+recordReach); err != nil {
			return err
		}
		at := sealfs.MakeLSN(h.Seq, off)
		rec, crc, op, _, _, err := layout.DecodeRecord(f.buf[off:], seed, at, chain)
		if err != nil && ring != nil {
			rec, crc, op, _, _, err = layout.DecodeRecord(ring[off:], seed, at, chain)
		}
		if err != nil {
			f.c.problem(LogBefore, f.c.device(slot, off), "no sound record at %v, the checkpoint is at %v", at, f.end.lsn)
			f.c.mendBy(LogBefore, f.c.device(slot, off), f.c.recover)
			return nil
		}
		f.announce(&rec, op)
		off += uint32(rec.Bytes())
		chain = crc
	}
	if off != upto || chain != f.end.chain {
		f.c.problem(LogBefore, f.c.device(slot, upto), "the records lead to %v and chain value %#x, the checkpoint is at %v with %#x",
			sealfs.MakeLSN(h.Seq, off), chain, f.end.lsn, f.end.chain)
		f.c.mendBy(LogBefore, f.c.device(slot, upto), f.c.recover)
	}
	return nil
}

// lookBehind looks for sound records in the ring behind the end of the log. A
// process that dies leaves none: it writes one record after the other.
func (f *follower) lookBehind() {
	c := f.c
	if c.ring == nil {
		return
	}
	if tail := c.tail(); tail > f.end.lsn {
		c.problem(LogStaging, c.rep.Staging, "the log ends at %v, and was written up to %v", f.end.lsn, tail)
		c.mendBy(LogStaging, c.rep.Staging, func(*editor) string { return c.cutRing(f) })
		return
	}
	if at := c.ringHolds(f.end.lsn); at != 0 {
		c.problem(LogStaging, c.rep.Staging, "the log ends at %v, and there is a record at %v", f.end.lsn, at)
		c.mendBy(LogStaging, c.rep.Staging, func(*editor) string { return c.cutRing(f) })
	}
}

// lasting reports whether the ring was written as persistent memory.
func (c *checker) lasting() bool {
	h := c.ring.Header()
	return h.Lasting()
}

// tail returns up to where the ring's header says that the log was written, 0 if it
// does not. On persistent memory the record is durable before it is said.
func (c *checker) tail() sealfs.LSN {
	boot, err := pmem.BootID()
	if !c.lasting() && (err != nil || c.ring.Header().BootID != boot) {
		return 0
	}
	return sealfs.LSN(c.ring.Tail())
}

// reached reports whether something proves that the log reached end once.
func (f *follower) reached(end sealfs.LSN) bool {
	return f.witnessed() >= end || f.c.tail() >= end || f.c.ringHolds(end) != 0
}

// ringHolds returns where a sound record stands in the ring, from end on, 0 if none does.
func (c *checker) ringHolds(end sealfs.LSN) sealfs.LSN {
	seed := layout.ChainSeed(c.sb.Store, c.ring.Header().Incarnation)
	for i := range int(c.ring.Header().Chunks) {
		seq, chunk := c.chunkSeq(i), c.ring.Chunk(i)
		off := layout.BlockSize
		if seq == end.Seq() {
			off = int(end.Off())
		}
		for ; seq >= end.Seq() && off+layout.RecordHeaderBytes <= len(chunk); off += layout.RecordAlign {
			if string(chunk[off:off+4]) != layout.RecordMagic {
				continue
			}
			at := sealfs.MakeLSN(seq, uint32(off))
			rec, _, _, payload, _, err := layout.DecodeRecordLoose(chunk[off:], seed, at)
			if err == nil && (!c.lasting() || rec.PayloadOK(payload)) {
				return at
			}
		}
	}
	return 0
}
