package lsfs

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/internal/enc"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// farState is what the store knows of its far checkpoints; see DESIGN.md 4.7.
// It is guarded by gc.mu; what is marked (mu) is changed with both locks held.
type farState struct {
	maps  []*farMap // where the newest copy of each page stands; nil: no copies
	segs  map[uint32]*farSegment
	out   *farSegment // the one that is being filled
	gen   uint64
	whole bool // the region's far set has all changes since the copies in maps
	hurry bool // it is made to gain room, and may use the reserve

	pages  []byte        // of the batch that is being copied
	nos    []pmem.PageNo // those in it, until their copies are written
	record []byte

	run    *farRun      // (mu) the one under way
	root   sealfs.LSN   // (mu) of the durable one, 0 if there is none
	start  sealfs.LSN   // (mu) its start
	sound  bool         // (mu) it has been read, or written
	reason string       // (mu) why the region cannot be rebuilt; "" if it can
	failed string       // (mu) why the last attempt was not completed; "" if it was
	held   []uint32     // (mu) slots of the log that only far checkpoints need
	ahead  atomic.Int32 // segments that requests leave to one that is due or under way
	rolls  int          // (mu) hot segments opened so far
	base   int          // (mu) of them, those below the far start
	retry  int          // (mu) no new attempt before that many
}

// farSegment is a segment of copies.
type farSegment struct {
	seq, slot uint32
	filled    uint32
	chain     uint32
	seed      uint32
	current   int  // pages and map pages in it that are the newest copies
	named     bool // the durable root needs it
}

// farMap is a map page: the newest copies of 256 pages.
type farMap struct {
	refs [layout.FarMapPages]layout.FarRef
	at   layout.FarRef // its own copy; none if it has changed since
}

// farRun is a far checkpoint under way.
type farRun struct {
	copy        *pmem.FarCopy
	all         bool
	start       sealfs.LSN
	slot, chain uint32
	base        int
	thin        map[uint32]struct{} // segments that are copied again
	rounds      int                 // of thinning
	pages       uint64
	began       time.Time
	told        bool // that it lasts long
}

const (
	farRecordPages = 255 // of one record: a megabyte with its first block
	farStepBatches = 256 // that one step looks at, at most
	farThinRounds  = 4   // of one far checkpoint
	farAhead       = 16  // segments that requests leave to one that is due, at most
)

// farPatience is how long a far checkpoint waits for room before the log tells it.
const farPatience = time.Minute

// errFarRoom says that a far checkpoint cannot go on before segments are free.
var errFarRoom = errors.New("there is no room for a far checkpoint")

// farBytes returns how much log a far checkpoint may leave behind it; less than
// 0 for no far checkpoints.
func (s *Store) farBytes() int64 {
	if s.o.FarBytes != 0 {
		return s.o.FarBytes
	}
	return min(max(int64(len(s.segs))*s.seg/16, 4*s.seg), 2<<30)
}

// farRolls is farBytes in segments.
func (s *Store) farRolls() int { return int(max(1, s.farBytes()/s.seg)) }

// farKeep returns the sequence number from which on far checkpoints need the
// log. Needs mu.
func (s *Store) farKeep() uint32 {
	keep := uint32(math.MaxUint32)
	if s.far.root != 0 {
		keep = s.far.start.Seq()
	}
	if r := s.far.run; r != nil {
		keep = min(keep, r.start.Seq())
	}
	return keep
}

// farNeed estimates how many segments copies of all pages take. Needs mu.
func (s *Store) farNeed() int {
	u := s.region.Counts()
	return int(u.Used+u.Reserved)/(int(s.seg/layout.BlockSize)-2) + 2
}

// farWanted reports whether a far checkpoint is under way or due. Needs mu.
func (s *Store) farWanted() bool {
	f := &s.far
	switch {
	case s.farBytes() < 0:
		return false
	case f.run != nil:
		return true
	case f.rolls < f.retry:
		return false
	case f.root != 0 && f.sound:
		return f.reason != "" || f.rolls-f.base >= s.farRolls()
	}
	// With as much log behind it as may be, and one more beside it.
	return s.live+int64(2*s.farNeed()+s.farRolls())*s.seg <= s.usable()
}

// farTarget returns how many segments should be free for the far checkpoint that
// is wanted, besides those that always should. Needs mu and gc.mu.
func (s *Store) farTarget() int {
	return int(s.farCost()/(s.seg-2*layout.BlockSize)) + 2
}

// farCost estimates what completing a far checkpoint now would write, in bytes.
// Needs mu and gc.mu.
func (s *Store) farCost() int64 {
	u := s.region.Counts()
	n := int(u.FarDirty)
	switch {
	case s.far.run != nil:
		n = s.far.run.copy.Left()
	case !s.far.whole:
		n = int(u.Used + u.Reserved)
	}
	return int64(n+3) * layout.BlockSize
}

// FarCheckpoint brings copies of all pages of the region to the device, so that a
// lost region can be made again: see RebuildRegion. It waits for the device;
// updates go on meanwhile. ErrNoSpace if there is no room: it goes on when there is.
func (s *Store) FarCheckpoint() error {
	s.gc.mu.Lock()
	defer s.gc.mu.Unlock()
	if err := s.Failure(); err != nil {
		return err
	}
	if s.farBytes() < 0 {
		return fmt.Errorf("far checkpoints of the store on %s are switched off: %w", s.dev.Name(), sealfs.ErrNotSupported)
	}
	return s.farFinish()
}

// farFinish begins a far checkpoint if none is under way, and completes it.
func (s *Store) farFinish() error {
	for {
		if done, err := s.farStep(); err != nil || done {
			return err
		}
	}
}

// farStep takes a far checkpoint a step further, and reports whether that
// completed it. After an error it is not under way any more, but if that is ErrNoSpace:
// then it goes on with the next step. The store has failed only if Failure says
// so. Needs gc.mu.
func (s *Store) farStep() (done bool, err error) {
	if err := s.Failure(); err != nil {
		return false, err
	}
	if s.far.run == nil {
		if err := s.farBegin(); err != nil {
			return false, err
		}
	}
	if done, err = s.farCopy(); err == nil && done {
		err = s.farSeal()
	}
	switch {
	case err == nil:
		return done, nil
	case errors.Is(err, errFarRoom):
		s.farStarve()
		return false, fmt.Errorf("store on %s: %w: %w", s.dev.Name(), errFarRoom, sealfs.ErrNoSpace)
	}
	s.log.Warn("far checkpoint not completed", "dev", s.dev.Name(), "err", err)
	s.farAbandon(err)
	return false, err
}

// farStarve notes that the far checkpoint under way waits for segments. What it
// has not written of its batch it looks at again.
func (s *Store) farStarve() {
	f := &s.far
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, no := range f.nos {
		f.run.copy.Add(no)
	}
	f.nos = f.nos[:0]
	f.failed = errFarRoom.Error()
	if d := time.Since(f.run.began); d > farPatience && !f.run.told {
		f.run.told = true
		s.log.Warn("far checkpoint has waited long for room", "dev", s.dev.Name(), "dur", d, "free", len(s.free))
	}
}

// farBegin is step 1: from here on the log is needed.
func (s *Store) farBegin() error {
	f := &s.far
	if s.Superblock().Incompat&layout.FeatureFar == 0 {
		if err := s.writeSuper(func(sb *layout.Superblock) { sb.Incompat |= layout.FeatureFar }); err != nil {
			return err
		}
	}
	if f.pages == nil {
		n := min(farRecordPages, int(s.seg/layout.BlockSize)-2)
		f.pages = make([]byte, n*pmem.PageSize)
		f.record = disk.AlignedBuffer((n + 1) * layout.BlockSize)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f.run = &farRun{
		copy: s.region.BeginFar(!f.whole), all: !f.whole, thin: map[uint32]struct{}{}, base: f.rolls,
		start: s.tail(), slot: s.open().slot, chain: s.chain, began: time.Now(),
	}
	f.run.pages = f.run.copy.Pages()
	f.whole = true
	return nil
}

// farAbandon ends the far checkpoint under way. The copies that were made stay
// the newest ones; the durable root keeps what it needs.
func (s *Store) farAbandon(err error) {
	f := &s.far
	s.mu.Lock()
	defer s.mu.Unlock()
	f.run.copy.End()
	for _, no := range f.nos { // some of them have not been written
		s.region.MarkFar(no)
	}
	f.nos = f.nos[:0]
	if f.run.all {
		f.whole = false
	}
	f.run = nil
	f.ahead.Store(0)
	f.retry, f.failed = f.rolls+s.farRolls(), err.Error()
	if f.root == 0 {
		f.reason = err.Error()
	}
}

// farCopy is steps 2 and 3: it copies pages, up to the bound of a step, and
// reports whether there are no more.
func (s *Store) farCopy() (done bool, err error) {
	f := &s.far
	r := f.run
	written := int64(0)
	for range farStepBatches {
		if written >= s.o.farStep {
			return false, nil
		}
		if err := r.copy.Warm(f.pages); err != nil {
			return false, err
		}
		err = s.View(func(pmem.Reader) (err error) {
			f.nos, err = r.copy.Copy(f.pages, f.nos[:0])
			return err
		})
		if err != nil {
			return false, fmt.Errorf("far checkpoint of %s: %w", s.regionName, err)
		}
		if len(f.nos) == 0 {
			if r.rounds == farThinRounds || !s.farThin() {
				return true, nil
			}
			r.rounds++
			continue
		}
		n, err := s.farPages()
		if err != nil {
			return false, err
		}
		f.nos = f.nos[:0]
		written += int64(n)
	}
	return false, nil
}

// farPages writes what has changed of the batch, and returns how many bytes.
func (s *Store) farPages() (int, error) {
	f := &s.far
	nos := make([]uint64, 0, len(f.nos))
	for i, no := range f.nos {
		p := f.pages[i*pmem.PageSize:][:pmem.PageSize]
		ref := f.ref(no)
		_, again := f.run.thin[ref.At.Seq()]
		switch {
		case (layout.FarRef{}).Is(p):
			f.set(no, layout.FarRef{})
		case again || !ref.Is(p):
			copy(f.pages[len(nos)*pmem.PageSize:], p)
			nos = append(nos, uint64(no))
		}
	}
	total := 0
	for b := f.pages; len(nos) > 0; {
		n, at, err := s.farWrite(layout.KindFarPage, nos, b)
		if err != nil {
			return total, err
		}
		for i, no := range nos[:n] {
			f.set(pmem.PageNo(no), layout.MakeFarRef(at+sealfs.LSN(i*pmem.PageSize), b[i*pmem.PageSize:][:pmem.PageSize]))
		}
		s.stats.farPages.Add(uint64(n))
		nos, b, total = nos[n:], b[n*pmem.PageSize:], total+n*pmem.PageSize
	}
	return total, nil
}

// farThin adds the pages in segments of which less than half is current, and
// reports whether there were any.
func (s *Store) farThin() bool {
	f := &s.far
	low := false
	for _, g := range f.segs {
		_, before := f.run.thin[g.seq]
		if g != f.out && !before && g.current > 0 && 2*int64(g.current)*layout.BlockSize < s.seg {
			f.run.thin[g.seq] = struct{}{}
			low = true
		}
	}
	if !low {
		return false
	}
	added := false
	for i, m := range f.maps {
		if m == nil {
			continue
		}
		for j := range m.refs {
			if _, ok := f.run.thin[m.refs[j].At.Seq()]; ok {
				f.run.copy.Add(pmem.PageNo(i*layout.FarMapPages + j))
				added = true
			}
		}
		if _, ok := f.run.thin[m.at.At.Seq()]; ok {
			f.touch(m)
		}
	}
	return added
}

// farSeal is steps 4 to 6.
func (s *Store) farSeal() error {
	f := &s.far
	r := f.run
	if err := s.farMaps(); err != nil {
		return err
	}
	s.mu.RLock()
	h := s.region.Header()
	s.mu.RUnlock()
	root := layout.FarRoot{
		Generation: f.gen + 1, Start: r.start, StartSlot: r.slot, Chain: r.chain, Incarnation: s.incarnation,
		RegionVersion: h.Version, RegionIncompat: h.Incompat, TableBytes: h.TableBytes, Pages: r.pages,
	}
	at, slot, parts, err := s.farRoot(root)
	if err != nil {
		return err
	}
	if err := s.flushLog(); err != nil {
		return err
	}
	if err := s.dev.Flush(); err != nil {
		return s.fail(fmt.Errorf("flush of a far checkpoint: %w", err))
	}
	// Both copies, before anything of the old root is given back: the decay of
	// one must not bring it back.
	for range 2 {
		err := s.writeSuper(func(sb *layout.Superblock) { sb.FarRoot, sb.FarStart, sb.FarSlot = at, r.start, slot })
		if err != nil {
			return err
		}
	}
	s.stats.farCheckpoints.Add(1)
	f.gen++
	for seq, g := range f.segs {
		_, part := parts[seq]
		g.named = part || g.current > 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r.copy.End()
	f.run, f.root, f.start, f.sound, f.reason, f.failed, f.base, f.retry = nil, at, r.start, true, "", "", r.base, 0
	f.ahead.Store(0)
	s.farRelease()
	s.log.Info("far checkpoint", "dev", s.dev.Name(), "generation", f.gen, "start", r.start.String(), "segments", len(f.segs), "dur", time.Since(r.began))
	return nil
}

// farMaps writes the map pages that have no copy.
func (s *Store) farMaps() error {
	f := &s.far
	var nos []uint64
	flush := func() error {
		b := f.pages
		for len(nos) > 0 {
			n, at, err := s.farWrite(layout.KindFarMap, nos, b)
			if err != nil {
				return err
			}
			for i, no := range nos[:n] {
				m := f.maps[no]
				m.at = layout.MakeFarRef(at+sealfs.LSN(i*layout.BlockSize), b[i*layout.BlockSize:][:layout.BlockSize])
				f.segs[at.Seq()].current++
			}
			nos, b = nos[n:], b[n*layout.BlockSize:]
		}
		nos = nos[:0]
		return nil
	}
	for i, m := range f.maps {
		if m == nil || m.at.At != 0 {
			continue
		}
		b := f.pages[len(nos)*layout.BlockSize:]
		for j, ref := range m.refs {
			ref.Put(b[j*layout.FarRefBytes:])
		}
		if nos = append(nos, uint64(i)); len(nos)*layout.BlockSize == len(f.pages) {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

// farRoot writes the parts of a root. It returns where the last one stands, and
// the segments of all.
func (s *Store) farRoot(root layout.FarRoot) (at sealfs.LSN, slot uint32, segs map[uint32]struct{}, err error) {
	f := &s.far
	refs := make([]layout.FarRef, layout.FarMaps(root.Pages))
	for i := range min(len(refs), len(f.maps)) {
		if m := f.maps[i]; m != nil {
			refs[i] = m.at
		}
	}
	per := len(f.pages) / layout.FarRefBytes
	root.Parts = uint32(max(1, (len(refs)+per-1)/per))
	root.PrevSlot = layout.NoSlot
	segs = map[uint32]struct{}{}
	for root.Part = 0; root.Part < root.Parts; root.Part++ {
		n := min(per, len(refs))
		payload := f.pages[:(n*layout.FarRefBytes+layout.BlockSize-1)&^(layout.BlockSize-1)]
		clear(payload)
		for i, ref := range refs[:n] {
			ref.Put(payload[i*layout.FarRefBytes:])
		}
		refs = refs[n:]
		if err := s.farRoom(1 + len(payload)/layout.BlockSize); err != nil {
			return 0, 0, nil, err
		}
		// Now the table knows all segments of the far checkpoint.
		s.mu.RLock()
		root.Applied = s.tail()
		s.mu.RUnlock()
		root.Refs = uint32(n)
		if at, err = s.farAppend(layout.KindFarRoot, layout.AppendFarRoot(nil, &root), payload); err != nil {
			return 0, 0, nil, err
		}
		slot = f.out.slot
		segs[at.Seq()] = struct{}{}
		root.Prev, root.PrevSlot = at, slot
	}
	return at, slot, segs, nil
}

// farWrite writes the first n of the pages in b, as many as go into one record,
// and returns where their copies begin.
func (s *Store) farWrite(kind layout.Kind, nos []uint64, b []byte) (n int, at sealfs.LSN, err error) {
	if err := s.farRoom(2); err != nil {
		return 0, 0, err
	}
	n = min(len(nos), farRecordPages, int(s.seg-int64(s.far.out.filled))/layout.BlockSize-1)
	at, err = s.farAppend(kind, layout.AppendFarList(nil, nos[:n]), b[:n*layout.BlockSize])
	return n, at + layout.BlockSize, err
}

// farAppend writes a record to the open far segment, where it fits, and returns
// its position.
func (s *Store) farAppend(kind layout.Kind, op, payload []byte) (sealfs.LSN, error) {
	o := s.far.out
	rec := layout.Record{
		LSN: sealfs.MakeLSN(o.seq, o.filled), Prev: o.chain, Kind: kind,
		OpLen: uint32(len(op)), PayloadLen: uint32(len(payload)), PayloadCRC: enc.CRC(0, payload),
	}
	b := s.far.record[:rec.Bytes()]
	copy(b[layout.BlockSize:], payload)
	chain := rec.Put(b, o.seed, op, nil)
	if _, err := s.dev.WriteAt(b, s.slotOffset(o.slot)+int64(o.filled)); err != nil {
		return 0, s.fail(fmt.Errorf("write of a far segment: %w", err))
	}
	o.chain = chain
	o.filled += uint32(len(b))
	s.stats.farBytes.Add(uint64(len(b)))
	return rec.LSN, nil
}

// farRoom sees to it that so many blocks can be appended to the open far segment.
func (s *Store) farRoom(blocks int) error {
	if o := s.far.out; o != nil && int64(o.filled)+int64(blocks)*layout.BlockSize <= s.seg {
		return nil
	}
	keep := s.o.ReserveSegments
	if s.far.hurry {
		keep = 1 // if that does not do, it is given up, which needs no segment
	}
	s.mu.Lock()
	slot, ok := s.takeFree(keep)
	seq := s.nextSeq
	if ok {
		s.nextSeq++
		s.taken.Add(1)
	}
	s.mu.Unlock()
	if !ok {
		return errFarRoom
	}
	g := &farSegment{seq: seq, slot: slot, filled: layout.BlockSize, seed: s.seed}
	if _, err := s.Update(&Intent{Class: cleaning, kind: layout.KindMove}, &farOpening{s.far.out, g}); err != nil {
		s.mu.Lock()
		s.free = append(s.free, slot)
		s.mu.Unlock()
		if errors.Is(err, sealfs.ErrNoSpace) {
			return errFarRoom
		}
		return err
	}
	h := layout.SegmentHeader{Incarnation: s.incarnation, Seq: seq, Kind: layout.Far, Slot: slot, Created: time.Now().UnixNano()}
	h.Put(s.far.record, s.store)
	if _, err := s.dev.WriteAt(s.far.record[:layout.BlockSize], s.slotOffset(slot)); err != nil {
		return s.fail(fmt.Errorf("write of a far segment: %w", err))
	}
	s.stats.farBytes.Add(layout.BlockSize)
	s.mu.Lock()
	s.far.out = g
	s.far.segs[seq] = g
	s.mu.Unlock()
	return nil
}

// farOpening seals a far segment, if there is one, and opens the next in the
// segment table.
type farOpening struct{ old, next *farSegment }

func (o *farOpening) Apply(tx *Tx) error {
	now := time.Now().UnixNano()
	if o.old != nil {
		g := *tx.segmentNow(o.old.slot)
		g.state, g.used, g.time = segSealed, o.old.filled, now
		if err := tx.setSegment(o.old.slot, g); err != nil {
			return err
		}
	}
	return tx.openSegment(o.next.slot, o.next.seq, layout.Far, now)
}

// farDead reports whether nothing needs a far segment any more.
func (s *Store) farDead(seq uint32) bool {
	g := s.far.segs[seq]
	return g == nil || g != s.far.out && !g.named && g.current == 0
}

// farRelease gives back what no far checkpoint needs any more. Needs mu, too.
func (s *Store) farRelease() {
	var dead []uint32
	for seq, g := range s.far.segs {
		if s.farDead(seq) {
			dead = append(dead, g.slot)
		}
	}
	slices.Sort(dead)
	s.giveBack(dead)
	held := s.far.held
	s.far.held = nil
	s.giveBackOrHold(held)
}

// giveBackOrHold gives back dead segments but those that far checkpoints need:
// these wait for the next one. Needs mu.
func (s *Store) giveBackOrHold(dead []uint32) {
	keep := s.farKeep()
	var now, held []uint32
	for _, slot := range dead {
		if g := &s.segs[slot]; g.kind == layout.Hot && g.seq >= keep {
			held = append(held, slot)
		} else {
			now = append(now, slot)
		}
	}
	s.far.held = append(s.far.held, held...)
	s.giveBack(now)
}

// farGiveUp durably lets go of the far checkpoint: from then on the region
// cannot be rebuilt. It reports whether that freed anything, or made way for
// cleaner or requests. Needs gc.mu.
func (s *Store) farGiveUp(why string) (bool, error) {
	f := &s.far
	way := f.ahead.Swap(0) > 0 || f.run != nil
	if f.run != nil {
		s.farAbandon(errFarRoom)
	}
	if f.root == 0 && len(f.segs) == 0 && len(f.held) == 0 {
		if way { // another one shall not begin for a while
			s.mu.Lock()
			f.retry = f.rolls + s.farRolls()
			s.mu.Unlock()
		}
		return way, nil
	}
	if f.root != 0 {
		for range 2 {
			if err := s.writeSuper(noRoot); err != nil {
				return false, err
			}
		}
		s.stats.farGivenUp.Add(1)
		s.log.Warn("far checkpoint given up", "dev", s.dev.Name(), "reason", why)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.farForget(why)
	s.farRelease()
	return true, nil
}

func noRoot(sb *layout.Superblock) { sb.FarRoot, sb.FarStart, sb.FarSlot = 0, 0, 0 }

// farForget drops what is known of far checkpoints: all their segments are dead.
// The superblock must not name a root, or is about to stop. Needs mu.
func (s *Store) farForget(why string) {
	f := &s.far
	f.maps, f.out, f.whole = nil, nil, false
	f.root, f.start, f.sound, f.reason, f.retry = 0, 0, false, why, f.rolls+s.farRolls()
	for _, g := range f.segs {
		g.current, g.named = 0, false
	}
}

// farBlocks reports whether segments that could be emptied, or are dead, wait for
// the far start to move on.
func (s *Store) farBlocks() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.farBytes() < 0 {
		return false
	}
	keep := s.farKeep()
	for slot := range s.segs {
		g := &s.segs[slot]
		if g.state == segSealed && g.kind == layout.Hot && g.seq >= keep && float64(g.live) <= s.o.CleanLimit*float64(s.seg) {
			return true
		}
	}
	return false
}

// makeRoom frees segments, or makes them dead for the next checkpoint, by what
// costs least; false if nothing can be gained. Needs gc.mu.
func (s *Store) makeRoom() (bool, error) {
	s.mu.Lock()
	fits := s.farBytes() >= 0 && s.farTarget() < len(s.free)
	cheap := fits && len(s.far.held) > 0 && s.farCost() <= int64(len(s.far.held))*s.seg
	s.gc.dry = false
	s.mu.Unlock()
	f := &s.far
	f.hurry = true
	defer func() { f.hurry = false }()
	if cheap {
		if err := s.farFinish(); err == nil || s.Failure() != nil {
			return err == nil, err
		}
	}
	// Where nothing fits any more, giving up the far checkpoint still does.
	if gained, err := s.clean(); gained || err != nil && !errors.Is(err, sealfs.ErrNoSpace) {
		return gained, err
	}
	s.mu.RLock()
	enough := len(s.free)+s.dying > s.keepFor(Normal) // for requests, or a checkpoint must tell
	read := len(s.free) > 0 && !s.unpinned()
	s.mu.RUnlock()
	if read { // what is free is still being read, for a moment
		s.doze(restMin)
		return false, nil
	}
	if !cheap && (fits || !enough) && s.farBlocks() {
		if err := s.farFinish(); err == nil || s.Failure() != nil {
			return err == nil, err
		}
	}
	if enough {
		return false, nil
	}
	gained, err := s.farGiveUp("given up for the last free space of the device")
	s.mu.Lock()
	s.gc.dry = !gained
	s.mu.Unlock()
	return gained, err
}

// ref returns where the newest copy of a page stands.
func (f *farState) ref(no pmem.PageNo) layout.FarRef {
	if i := int(no / layout.FarMapPages); i < len(f.maps) && f.maps[i] != nil {
		return f.maps[i].refs[no%layout.FarMapPages]
	}
	return layout.FarRef{}
}

// set notes the newest copy of a page.
func (f *farState) set(no pmem.PageNo, ref layout.FarRef) {
	i := int(no / layout.FarMapPages)
	for i >= len(f.maps) {
		f.maps = append(f.maps, nil)
	}
	if f.maps[i] == nil {
		if ref.At == 0 {
			return
		}
		f.maps[i] = &farMap{}
	}
	m := f.maps[i]
	old := &m.refs[no%layout.FarMapPages]
	if *old == ref {
		return
	}
	if old.At != 0 {
		f.segs[old.At.Seq()].current--
	}
	if ref.At != 0 {
		f.segs[ref.At.Seq()].current++
	}
	*old = ref
	f.touch(m)
}

// touch notes that a map page is not what its copy is, or that the copy is to go.
func (f *farState) touch(m *farMap) {
	if m.at.At != 0 {
		f.segs[m.at.At.Seq()].current--
		m.at = layout.FarRef{}
	}
}

// farRound takes a far checkpoint a step further, as one round of the collector.
func (s *Store) farRound() error {
	for {
		done, err := s.farStep()
		switch {
		case err != nil:
			return s.Failure() // what else ended it is told by Stats
		case done:
			return nil
		case !s.o.manual:
			s.pokeCollector()
			return nil
		}
	}
}
