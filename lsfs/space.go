package lsfs

import (
	"errors"
	"fmt"
	"sync"

	"sealfs"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// collector is the goroutine that keeps space available: it checkpoints by log
// volume and cleans when few segments are free.
type collector struct {
	mu      sync.Mutex // one checkpoint or cleaning at a time
	wake    chan struct{}
	spoiled map[uint32]struct{} // slots that could not be read; they are left alone (mu)

	wait struct {
		sync.Mutex
		cond  sync.Cond
		round uint64 // rounds that ended
		stuck uint64 // of them, the last in which nothing more could be gained
	}
}

// usable returns how many live bytes the store accepts: what remains of the
// segments without the reserve, less what the cleaner needs to work at a
// bearable cost. Needs nothing.
func (s *Store) usable() int64 {
	n := int64(len(s.segs)) - int64(s.o.ReserveSegments) - 2 // the open hot and cold ones
	return max(n, 0) * (s.seg - layout.BlockSize) / 100 * 92
}

// full is the error for a store without room.
func (s *Store) full() error {
	return fmt.Errorf("store on %s is full: %w", s.dev.Name(), sealfs.ErrNoSpace)
}

// waitRounds bounds how many rounds of the collector a change waits for. At 92 %
// utilisation cleaning must move a dozen segments to gain one.
const waitRounds = 64

// waitSpace waits for the collector to free a segment that a request of class c
// may use. It returns ErrNoSpace when a whole round since the call gained nothing.
func (s *Store) waitSpace(c Class) error {
	s.stats.spaceWaits.Add(1)
	if c == cleaning {
		return fmt.Errorf("store on %s has no segment left: %w", s.dev.Name(), sealfs.ErrNoSpace)
	}
	enough := func() bool { return s.freeSegments() > s.keepFor(c) }
	if s.bg.off.Load() {
		for range waitRounds {
			stuck, err := s.collect(true)
			if err != nil || enough() {
				return err
			}
			if stuck {
				break
			}
		}
		return s.full()
	}
	w := &s.gc.wait
	w.Lock()
	defer w.Unlock()
	// A round under way may have begun before the need: its verdict does not count.
	for from := w.round; w.round < from+waitRounds && !s.bg.off.Load(); {
		s.pokeCollector()
		w.cond.Wait()
		if err := s.Failure(); err != nil {
			return err
		}
		if enough() {
			return nil
		}
		if w.stuck > from+1 {
			break
		}
	}
	return s.full()
}

func (s *Store) freeSegments() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.free)
}

func (s *Store) pokeCollector() {
	select {
	case s.gc.wake <- struct{}{}:
	default:
	}
}

// collectEvery is how much log passes between two looks at the collector's needs.
const collectEvery = 1 << 20

// needsCollection reports whether a checkpoint or cleaning is due, and notes
// whether the region takes more memory than it may. Needs mu.
func (s *Store) needsCollection() bool {
	s.crowded.Store(s.region.Usage().PrivateBytes() > s.o.BudgetBytes)
	return len(s.free) < s.o.CleanLow || s.checkpointDue() || s.region.NeedsGrowth()
}

// checkpointDue reports whether log or changed pages ask for a checkpoint: a
// quarter of the budget, so that pages are clean, and can be dropped, before
// the budget is used up. Needs mu, shared.
func (s *Store) checkpointDue() bool {
	return s.logged >= s.o.CheckpointBytes || int64(s.region.Usage().Dirty)*pmem.PageSize > s.o.BudgetBytes/4
}

// waitMemory waits for the collector to bring the region back to its budget,
// two rounds at most: then the change goes on all the same.
func (s *Store) waitMemory() {
	if s.bg.off.Load() {
		return
	}
	s.stats.memoryWaits.Add(1)
	w := &s.gc.wait
	w.Lock()
	defer w.Unlock()
	for until := w.round + 2; w.round < until && s.crowded.Load() && s.Failure() == nil && !s.bg.off.Load(); {
		s.pokeCollector()
		w.cond.Wait()
	}
}

// runCollector runs until the store is closed.
func (s *Store) runCollector() {
	defer s.bg.done.Done()
	for {
		select {
		case <-s.bg.stop:
			return
		case <-s.gc.wake:
		}
		stuck, err := s.collect(false)
		if err != nil && !errors.Is(err, sealfs.ErrNoSpace) {
			s.log.Error("collector", "dev", s.dev.Name(), "err", err)
		}
		s.View(func(pmem.Reader) error { // an error is the store's, which everybody meets
			s.crowded.Store(s.region.Usage().PrivateBytes() > s.o.BudgetBytes)
			return nil
		})
		w := &s.gc.wait
		w.Lock()
		w.round++
		if stuck || err != nil {
			w.stuck = w.round
		}
		w.cond.Broadcast()
		w.Unlock()
	}
}

// cleanRounds bounds the cleaning of one collector round.
const cleanRounds = 8

// collect runs one round: growth of the region, a checkpoint if log, memory or
// space ask for it, and cleaning while space is short. It reports whether space
// is short and no more can be gained.
func (s *Store) collect(force bool) (stuck bool, err error) {
	s.gc.mu.Lock()
	defer s.gc.mu.Unlock()
	if s.region.NeedsGrowth() {
		if err := s.region.Grow(); err != nil && !errors.Is(err, sealfs.ErrNoSpace) {
			return false, err
		}
	}
	var before int
	due := false
	err = s.View(func(pmem.Reader) error {
		before = len(s.free)
		due = force || before < s.o.CleanLow || s.crowded.Load() || s.checkpointDue()
		return nil
	})
	if err != nil || !due {
		return false, err
	}
	if err := s.checkpoint(); err != nil {
		return false, err
	}
	for range cleanRounds {
		if s.freeSegments() >= s.o.CleanLow {
			return false, nil
		}
		gained, err := s.clean()
		if err != nil {
			return false, err
		}
		if !gained {
			return s.freeSegments() <= before, nil
		}
		if err := s.checkpoint(); err != nil {
			return false, err
		}
	}
	return false, nil
}
