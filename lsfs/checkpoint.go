package lsfs

import (
	"fmt"

	"sealfs"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// Checkpoint brings the region's medium up to date, so that recovery starts
// where the log stands now, and gives back the segments that were dead by then.
// It waits for the device and the region's file; updates go on meanwhile.
func (s *Store) Checkpoint() error {
	s.gc.mu.Lock()
	defer s.gc.mu.Unlock()
	return s.checkpoint()
}

// checkpoint needs gc.mu. The order of its writes is the crash argument:
// the log before each page, all pages before the header, the header before the
// superblock's tail, the tail before any dead segment may be overwritten. On
// persistent memory there are no pages to be written, and the header is all.
func (s *Store) checkpoint() error {
	if err := s.Failure(); err != nil {
		return err
	}
	s.mu.RLock()
	early, dying := s.tail(), s.dying
	s.mu.RUnlock()
	// What is dead before the start is dead at the start.
	dead := s.dead(early)
	s.mu.Lock()
	start, h := s.tail(), s.header()
	ck := s.region.BeginCheckpoint()
	s.logged = 0
	s.dying -= dying
	s.mu.Unlock()

	err := s.flushTo(start)
	for more := !s.isDax(); err == nil && more; {
		var applied sealfs.LSN
		for err == nil && more && !ck.Full() { // by pieces, so that changes wait for none of them for long
			err = s.View(func(pmem.Reader) error {
				more, applied = ck.Copy(), s.tail()
				return nil
			})
		}
		if err == nil {
			err = s.flushTo(applied)
		}
		if err == nil {
			err = ck.Write()
		}
	}
	if err == nil {
		err = s.guarded(func() error { return ck.Finish(h) })
	}
	if err != nil {
		s.mu.Lock()
		ck.Abandon()
		s.mu.Unlock()
		return s.fail(fmt.Errorf("checkpoint of the region: %w", err))
	}
	if err := s.writeSuper(func(sb *layout.Superblock) { sb.Tail = start }); err != nil {
		return err
	}
	s.stats.checkpoints.Add(1)
	s.mu.Lock()
	s.far.held = nil
	s.mu.Unlock()
	for len(dead) > 0 {
		n := min(len(dead), giveBackPart)
		s.mu.Lock()
		s.giveBackOrHold(dead[:n])
		s.setBrake()
		s.mu.Unlock()
		dead = dead[n:]
	}
	s.wake()
	return s.trim()
}

// trim drops clean private pages of the region, a bounded number at a time,
// until they keep to the budget or no more can be dropped.
func (s *Store) trim() error {
	for {
		var before, after uint64
		err := s.locked(func() (err error) {
			before = s.region.Counts().Private
			err = s.region.Trim()
			after = s.region.Counts().Private
			return err
		})
		if err != nil || after >= before {
			return err
		}
	}
}

// header returns what recovery must know to start at the tail. Needs mu.
func (s *Store) header() pmem.Header {
	var features uint64
	if s.isDax() {
		features = pmem.FeatureDax
	}
	return pmem.Header{
		Incompat: features, Store: s.store, Incarnation: s.incarnation, Start: s.tail(), StartSlot: s.open().slot, Chain: s.chain,
	}
}

// giveBackPart is how many segments are given back under the lock at a time.
const giveBackPart = 256

// dead returns the slots of segments that nothing refers to and recovery from
// start does not need. Needs gc.mu, but not in a recovery. Nothing will refer to them again: only moves
// and writes make references, and those go to open segments.
func (s *Store) dead(start sealfs.LSN) []uint32 {
	var slots []uint32
	for lo := 0; lo < len(s.segs); lo += tablePart {
		s.mu.RLock()
		for slot := lo; slot < min(lo+tablePart, len(s.segs)); slot++ {
			g := &s.segs[slot]
			if g.state != segSealed || g.live > 0 {
				continue
			}
			if g.kind == layout.Cold || g.kind == layout.Far && s.farDead(g.seq) || g.kind == layout.Hot && g.seq < start.Seq() {
				slots = append(slots, uint32(slot))
			}
		}
		s.mu.RUnlock()
	}
	return slots
}

// giveBack makes dead segments available. A checkpoint that began after they
// died must be complete. Their table entries stay as they are, sealed without
// live bytes, until the slots are used again: after a crash they are found dead
// once more. Needs mu.
func (s *Store) giveBack(dead []uint32) {
	for _, slot := range dead {
		delete(s.slotOf, s.segs[slot].seq)
		delete(s.gc.spoiled, slot)
		delete(s.far.segs, s.segs[slot].seq)
		s.segs[slot] = segment{}
	}
	s.free = append(s.free, dead...)
	s.stats.givenBack.Add(uint64(len(dead)))
}
