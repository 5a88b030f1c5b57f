package lsfs

import (
	"errors"
	"fmt"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// Claim is a live part of a payload, and what its bytes must be.
type Claim struct {
	Part
	Ino   sealfs.Ino
	Stamp uint32
	Sums  []uint32 // of each block of 4 KiB; nil if they are not known
}

// Auditor is an Owner that knows the sums of what lives. A scrub then verifies
// each block under the seed that its file has for it, and so finds writes that
// the device lost or put elsewhere although everything about them is sound.
type Auditor interface {
	Owner
	// Claims is Live with the sums: it appends to claims, and keeps nothing of r.
	Claims(r pmem.Reader, ino sealfs.Ino, off uint64, at sealfs.LSN, n uint32, claims []Claim) ([]Claim, error)
	// Search looks at some keys from key on, nil for the first, for what lies in
	// [from, to) of the log, whoever it belongs to. next is where to go on, nil at the end.
	Search(r pmem.Reader, key []byte, from, to sealfs.LSN, claims []Claim) (all []Claim, next []byte, err error)
	// Match reports whether data are block i of the claim.
	Match(c *Claim, i int, data []byte) bool
}

// audit verifies segments, one after the other: a goroutine reads, the caller verifies
// behind it, in one buffer of a segment's size.
type audit struct {
	s    *Store
	pace *scrubPacer
	room []byte

	slot     uint32
	g        segment
	buf      []byte // the segment, as far as it is to be verified
	known    int    // bytes of buf that have been read
	fed      chan fed
	holes    []hole
	batch    []payload // whose claims are to be asked for
	claims   []Claim
	live     int64  // bytes claimed
	broken   bool   // records are missing, so live says nothing
	verified uint64 // claims, since the caller asked
	searches int    // of the whole namespace, in this run
}

// fed says up to where the segment has been read, and what could not be.
type fed struct {
	upto, read int
	holes      []hole
	dead       bool // nothing of it can be read, nor is what follows
	err        error
}

// hole is a part of the segment that the device cannot read.
type hole struct {
	from, to int
	told     bool // a finding names it
}

// payload is that of a record, at off in the segment.
type payload struct {
	rec  layout.Record
	off  int
	data []byte
	to   int // end of its claims
}

// The claims of so many payloads are asked for together, under the lock.
const auditBatch = 16

// searchesMax bounds the searches of the namespace in one run, each of which
// takes a look at every file.
const searchesMax = 16

// segment verifies the segment in a slot, if there is one, and returns how many
// bytes of it.
func (a *audit) segment(slot uint32) (int, error) {
	s := a.s
	tail := s.Superblock().Tail
	s.mu.RLock()
	g := s.segs[slot]
	used := int(s.scrubExtent(slot, tail))
	if used > 0 {
		s.pins[slot].Add(1)
	}
	s.mu.RUnlock()
	if used == 0 {
		return 0, nil
	}
	defer s.pins[slot].Add(-1)
	if a.room == nil {
		a.room = disk.AlignedBuffer(int(s.seg))
	}
	a.slot, a.g, a.buf, a.known = slot, g, a.room[:used], 0
	a.holes, a.batch, a.live, a.broken = a.holes[:0], a.batch[:0], 0, false
	a.fed = make(chan fed, used/pieceMin+2)
	go a.read(a.fed)
	err := a.records(g.kind != layout.Hot && int64(used) == s.seg && g.full == 0)
	for f := range a.fed { // the buffer is the reader's until it has ended
		if err == nil {
			err = a.take(f)
		}
	}
	if err != nil {
		return 0, err
	}
	for _, h := range a.holes {
		if !h.told {
			a.report(FoundUnreadable, h.from, h.to-h.from, "the device cannot read it", nil)
		}
	}
	a.account(used)
	return used, nil
}

// readsAhead is how many pieces are read at once, so that the device does not
// wait for the processor.
const readsAhead = 4

// read reads the segment in pieces. What the device cannot read becomes holes.
func (a *audit) read(out chan<- fed) {
	defer close(out)
	var flying []chan fed // reads under way, in the order of their pieces
	land := func() (ok bool) {
		f := <-flying[0]
		flying = flying[1:]
		a.s.scrubbed(int64(f.read))
		out <- f
		return f.err == nil && !f.dead
	}
	ok := true
	for off := 0; off < len(a.buf) && ok; {
		n := min(a.pace.piece(), len(a.buf)-off)
		if !a.pace.wait(n) {
			break
		}
		c := make(chan fed, 1)
		go func(off int) { c <- a.readPiece(off, n) }(off)
		off += n
		if flying = append(flying, c); len(flying) == readsAhead {
			ok = land()
		}
	}
	for len(flying) > 0 {
		ok = land() && ok
	}
	if !ok {
		// Not a block of a piece: the rest was not asked for.
		out <- fed{upto: len(a.buf), dead: true}
	}
}

// readPiece reads n bytes at off of the segment.
func (a *audit) readPiece(off, n int) fed {
	base := a.s.slotOffset(a.slot)
	f := fed{upto: off + n, read: n}
	// Whole blocks, for the sake of direct reads; the room has them.
	whole := a.room[off:][:(n+layout.BlockSize-1)&^(layout.BlockSize-1)]
	_, err := a.s.dev.ReadAt(whole, base+int64(off))
	a.pace.count(len(whole))
	switch {
	case errors.Is(err, sealfs.ErrClosed):
		f.err = err
	case err != nil:
		f.holes = a.blocks(base, off, off+n)
		f.dead = len(f.holes) == 1 && f.holes[0] == (hole{from: off, to: off + n}) && n > layout.BlockSize
	}
	return f
}

// blocks reads a piece block by block, and returns those that cannot be read.
func (a *audit) blocks(base int64, from, to int) (holes []hole) {
	for off := from; off < to; off += layout.BlockSize {
		b := a.room[off:][:layout.BlockSize]
		_, err := a.s.dev.ReadAt(b, base+int64(off))
		a.pace.count(len(b))
		if err == nil {
			continue
		}
		clear(b)
		end := min(off+layout.BlockSize, to)
		if n := len(holes); n > 0 && holes[n-1].to == off {
			holes[n-1].to = end
		} else {
			holes = append(holes, hole{from: off, to: end})
		}
	}
	return holes
}

func (a *audit) take(f fed) error {
	if f.err != nil {
		return f.err
	}
	if f.dead && f.upto > a.known && f.read == 0 {
		clear(a.buf[a.known:f.upto])
		a.holes = append(a.holes, hole{from: a.known, to: f.upto})
	}
	a.known = max(a.known, f.upto)
	a.holes = append(a.holes, f.holes...)
	return nil
}

// need waits until n bytes of the segment have been read, or all of it.
func (a *audit) need(n int) error {
	for a.known < min(n, len(a.buf)) {
		f, ok := <-a.fed
		if !ok {
			return errScrubStopped
		}
		if err := a.take(f); err != nil {
			return err
		}
	}
	return nil
}

// records verifies the header and follows the records. loose says that the
// segment may end earlier than the table says: the cleaner died while it was open.
func (a *audit) records(loose bool) error {
	if err := a.need(layout.BlockSize); err != nil {
		return err
	}
	seed, chain, chained, err := a.header()
	if err != nil {
		return err
	}
	for off := layout.BlockSize; off < len(a.buf); {
		if err := a.need(off + recordMax); err != nil {
			return err
		}
		at := sealfs.MakeLSN(a.g.seq, uint32(off))
		rec, crc, _, data, _, err := layout.DecodeRecordLoose(a.buf[off:], seed, at)
		if err != nil {
			next, err := a.resync(seed, off)
			if err != nil {
				return err
			}
			if loose && next == len(a.buf) {
				if whole, err := a.whole(); err != nil || whole {
					return err
				}
			}
			if err := a.gap(off, next); err != nil {
				return err
			}
			off, chained = next, false
			continue
		}
		if chained && rec.Prev != chain {
			a.report(FoundChain, off, int(rec.Bytes()), "the record does not continue the one before it", nil)
		}
		chain, chained = crc, true
		if rec.PayloadLen > 0 && rec.Kind != layout.KindPad {
			a.batch = append(a.batch, payload{rec: rec, off: off + layout.RecordHeaderBytes + int(rec.OpLen), data: data})
			if len(a.batch) == auditBatch {
				if err := a.flush(); err != nil {
					return err
				}
			}
		}
		off += int(rec.Bytes())
	}
	return a.flush()
}

// whole reports whether all that lives in the segment has been found. What died
// since it was found does not matter.
func (a *audit) whole() (bool, error) {
	if err := a.flush(); err != nil {
		return false, err
	}
	a.s.mu.RLock()
	defer a.s.mu.RUnlock()
	return a.live >= int64(a.s.segs[a.slot].live), nil
}

// header verifies the segment's header, and returns the seed of its records. If
// it is of no use, the seed is that under which a record is found.
func (a *audit) header() (seed, chain uint32, chained bool, err error) {
	s := a.s
	h, err := layout.DecodeSegmentHeader(a.buf, s.store, s.dev.Name(), a.slot, s.slotOffset(a.slot))
	if err == nil && (h.Seq != a.g.seq || h.Kind != a.g.kind || h.Incarnation > s.incarnation) {
		err = fmt.Errorf("it is the header of segment %d, not of segment %d: a write was lost, or went elsewhere", h.Seq, a.g.seq)
	}
	if err == nil {
		return layout.ChainSeed(s.store, h.Incarnation), h.Chain, true, nil
	}
	a.report(FoundHeader, 0, layout.BlockSize, err.Error(), nil)
	if err := a.need(layout.BlockSize + recordMax); err != nil {
		return 0, 0, false, err
	}
	at := sealfs.MakeLSN(a.g.seq, layout.BlockSize)
	for inc := s.incarnation; inc > 0; inc-- {
		seed := layout.ChainSeed(s.store, inc)
		if len(a.buf) > layout.BlockSize {
			if _, _, _, _, _, err := layout.DecodeRecordLoose(a.buf[layout.BlockSize:], seed, at); err == nil {
				return seed, 0, false, nil
			}
		}
	}
	return s.seed, 0, false, nil
}

// resync returns where the next sound record behind off begins, the end of the segment if there is
// none. A record names its own place, so that nothing else is taken for one.
func (a *audit) resync(seed uint32, off int) (int, error) {
	for off += layout.RecordAlign; off+layout.RecordHeaderBytes <= len(a.buf); off += layout.RecordAlign {
		if err := a.need(off + recordMax); err != nil {
			return 0, err
		}
		if string(a.buf[off:off+4]) != layout.RecordMagic {
			continue
		}
		if _, _, _, _, _, err := layout.DecodeRecordLoose(a.buf[off:], seed, sealfs.MakeLSN(a.g.seq, uint32(off))); err == nil {
			return off, nil
		}
	}
	return len(a.buf), nil
}

// gap reports that no records can be read in [from, to). To whom their payloads
// belong only the namespace as a whole can say.
func (a *audit) gap(from, to int) error {
	if err := a.flush(); err != nil {
		return err
	}
	a.broken = true
	a.report(FoundRecord, from, to-from, fmt.Sprintf("no record stands where one should, up to the next %d bytes further on: files can be read, the segment cannot be cleaned", to-from), nil)
	owner, ok := a.s.owner.(Auditor)
	if a.searches++; !ok || a.searches > searchesMax {
		return nil
	}
	lo, hi := sealfs.MakeLSN(a.g.seq, uint32(from)), sealfs.MakeLSN(a.g.seq, 0)+sealfs.LSN(to)
	for key := []byte(nil); ; {
		if a.pace.stopped() {
			return errScrubStopped
		}
		err := a.s.View(func(r pmem.Reader) (err error) {
			a.claims, key, err = owner.Search(r, key, lo, hi, a.claims[:0])
			return err
		})
		if err != nil {
			a.report(FoundRegion, -1, 0, fmt.Sprintf("whose data stand there cannot be found out: %v", err), nil)
			return nil
		}
		for i := range a.claims {
			a.claim(&a.claims[i], false)
		}
		if key == nil {
			return nil
		}
	}
}

// flush asks whose the payloads of the batch are, and verifies them.
func (a *audit) flush() error {
	if len(a.batch) == 0 {
		return nil
	}
	s := a.s
	a.claims = a.claims[:0]
	var failed error
	err := s.View(func(r pmem.Reader) error {
		for i := range a.batch {
			p := &a.batch[i]
			if p.rec.Ino != 0 {
				n := len(a.claims)
				var err error
				if a.claims, err = a.ask(r, &p.rec); err != nil {
					failed, a.claims = err, a.claims[:n]
				}
			}
			p.to = len(a.claims)
		}
		return nil
	})
	if err != nil { // the region's memory failed, and with it the store
		a.batch = a.batch[:0]
		return err
	}
	if failed != nil {
		a.broken = true
		a.report(FoundRegion, -1, 0, fmt.Sprintf("whose data stand in the segment cannot be found out: %v", failed), nil)
	}
	from := 0
	for i := range a.batch {
		p := &a.batch[i]
		claims := a.claims[from:p.to]
		from = p.to
		// The sums of blocks say more than that of the payload, where all of it lives:
		// then it is not computed.
		covered, known, bad := 0, true, false
		for j := range claims {
			covered, known = covered+int(claims[j].Len), known && claims[j].Sums != nil
		}
		sound := known && covered == len(p.data) || p.rec.PayloadOK(p.data)
		for j := range claims {
			bad = a.claim(&claims[j], !sound) || bad
		}
		if !sound && !bad {
			a.report(FoundPayload, p.off, int(p.rec.PayloadLen), "the payload of a record does not match its sum, where no file refers to it", nil)
		}
	}
	a.batch = a.batch[:0]
	return nil
}

// ask appends the claims on a record's payload.
func (a *audit) ask(r pmem.Reader, rec *layout.Record) ([]Claim, error) {
	claims := a.claims
	if owner, ok := a.s.owner.(Auditor); ok {
		return owner.Claims(r, rec.Ino, rec.Offset, rec.PayloadLSN(), rec.PayloadLen, claims)
	}
	err := a.s.owner.Live(r, rec.Ino, rec.Offset, rec.PayloadLSN(), rec.PayloadLen, func(p Part) {
		claims = append(claims, Claim{Part: p, Ino: rec.Ino})
	})
	return claims, err
}

// claim verifies the blocks of one claim and reports whether one is bad. Of a claim
// without sums nothing is known but whether the payload around it is torn.
func (a *audit) claim(c *Claim, torn bool) (bad bool) {
	a.live += int64(c.Len)
	a.verified++
	at := int64(c.At.Off())
	if c.At.Seq() != a.g.seq || at+int64(c.Len) > int64(len(a.buf)) {
		a.report(FoundAccount, -1, int(c.Len), fmt.Sprintf("an extent refers to %d bytes at %v, behind the end of what was written", c.Len, c.At), c)
		return true
	}
	data := a.buf[at:][:c.Len]
	owner, ok := a.s.owner.(Auditor)
	if !ok || c.Sums == nil {
		if torn {
			a.report(FoundBlock, int(at), len(data), "the payload of a record does not match its sum", c)
		}
		return torn
	}
	tell := func(from, to int) {
		a.report(FoundBlock, int(at)+from, to-from, fmt.Sprintf("block %d of inode %d does not match its sum", (c.Off+uint64(from))/sealfs.BlockSize, c.Ino), c)
	}
	from := -1 // of the run of bad blocks
	for off := 0; off < len(data); off += sealfs.BlockSize {
		b := data[off:min(off+sealfs.BlockSize, len(data))]
		switch match := owner.Match(c, off/sealfs.BlockSize, b); {
		case !match && from < 0:
			from, bad = off, true
		case match && from >= 0:
			tell(from, off)
			from = -1
		}
	}
	if from >= 0 {
		tell(from, len(data))
	}
	return bad
}

// report makes a finding of n bytes at off of the segment, -1 for what is not on
// the device.
func (a *audit) report(kind string, off, n int, what string, c *Claim) {
	f := Finding{Kind: kind, Offset: -1, Len: int64(n), Slot: a.slot, LSN: sealfs.MakeLSN(a.g.seq, uint32(max(off, 0))), What: what}
	if off >= 0 {
		f.Offset = a.s.slotOffset(a.slot) + int64(off)
		for i := range a.holes {
			if h := &a.holes[i]; h.from < off+n && off < h.to {
				h.told = true
				if kind != FoundUnreadable {
					f.What += fmt.Sprintf(": the device cannot read %d bytes at byte %d", h.to-h.from, a.s.slotOffset(a.slot)+int64(h.from))
				}
			}
		}
	}
	if c != nil {
		f.Ino, f.At = c.Ino, c.Off
		if off >= 0 {
			f.At += uint64(off) - uint64(c.At.Off())
		}
	}
	a.s.found(f)
}

// account compares what is claimed of a sealed segment with what the segment table
// says, if nothing changed meanwhile: live bytes of a sealed segment only fall.
func (a *audit) account(used int) {
	s := a.s
	s.mu.RLock()
	now := s.segs[a.slot]
	s.mu.RUnlock()
	whole := a.g.state == segSealed && uint32(used) == a.g.used && !a.broken && (a.g.kind == layout.Hot || a.g.kind == layout.Cold)
	if whole && now.seq == a.g.seq && now.live == a.g.live && a.live != int64(a.g.live) {
		a.report(FoundAccount, -1, 0, fmt.Sprintf("%d bytes of segment %d are referred to, the segment table says %d", a.live, a.g.seq, a.g.live), nil)
	}
}
