package lsfs

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"sealfs"
	"sealfs/alloc"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// collector is the goroutine that keeps space available: it checkpoints, near and
// far, by log volume and cleans when few segments are free.
type collector struct {
	mu      sync.Mutex // one checkpoint or cleaning at a time
	wake    chan struct{}
	spoiled map[uint32]struct{} // slots that could not be read; they are left alone (mu)
	pace    pacer

	// Of the cleaner (mu).
	choice alloc.Choice
	cold   [2][]byte // buffers, kept between rounds, nil before the first
	window []byte    // the same
	gain   int64     // bytes by which rounds emptied more than they filled

	// After a round that left no more free than before (Store.mu): cleaning again
	// would move for ever, where CleanLow is out of reach, what its own records
	// take. For somebody who waits for space it goes on, until a round is dry:
	// several of them may add up to a segment.
	rests   bool
	dry     bool   // there was nothing at all to be gained, last (Store.mu)
	changes uint64 // by requests, when it began to rest

	waiting atomic.Int32 // requests that wait for Store.mu
	starved atomic.Int32 // requests that wait for space

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

// waitRounds bounds how many rounds of the collector a change waits for in which
// nobody gets a segment. At 92 % utilisation cleaning must move a dozen segments to gain one.
const waitRounds = 64

// waitSpace waits for the collector to free a segment that a request of class c
// may use, or for another request to open a segment after at. It returns
// ErrNoSpace when there was nothing to be gained in a whole round since the call.
func (s *Store) waitSpace(c Class, at uint32) error {
	s.stats.spaceWaits.Add(1)
	if c == cleaning {
		return fmt.Errorf("store on %s has no segment left: %w", s.dev.Name(), sealfs.ErrNoSpace)
	}
	enough := func() bool {
		s.mu.RLock()
		defer s.mu.RUnlock()
		return len(s.free) > s.keepFor(c) || s.open().seq != at && s.nextSlot != layout.NoSlot
	}
	if s.bg.off.Load() {
		for range waitRounds {
			stuck, err := s.collect(true)
			if enough() {
				return nil
			}
			if err != nil && !errors.Is(err, sealfs.ErrNoSpace) {
				return err
			}
			if stuck || err != nil {
				break
			}
		}
		return s.full()
	}
	w := &s.gc.wait
	w.Lock()
	defer w.Unlock()
	s.gc.starved.Add(1)
	defer s.gc.starved.Add(-1)
	// A round under way may have begun before the need: its verdict does not count.
	valid, taken := w.round+2, s.taken.Load()
	for until := w.round + waitRounds; w.round < until && !s.bg.off.Load(); {
		s.pokeCollector()
		s.o.Turns.Wait(&w.cond)
		if err := s.Failure(); err != nil {
			return err
		}
		if enough() {
			return nil
		}
		if w.stuck >= valid {
			break
		}
		if now := s.taken.Load(); now != taken {
			until, taken = w.round+waitRounds, now // it does gain, for others that come first
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
// whether the region takes more memory than it may, and how fast changes may
// come. Needs mu.
func (s *Store) needsCollection() bool {
	s.crowded.Store(s.region.Counts().PrivateBytes() > s.o.BudgetBytes)
	s.setBrake()
	return len(s.free) < s.o.CleanLow && (s.cleaningPays() || s.dying > 0) || s.checkpointDue() || s.region.NeedsGrowth() || s.farWanted()
}

// cleaningPays reports whether there may be something to gain that is wanted:
// requests have changed something since a round last left no more free than
// before, or one waits for what several rounds gain. Needs mu, shared.
func (s *Store) cleaningPays() bool {
	return !s.gc.rests || s.changes != s.gc.changes || s.gc.starved.Load() > 0 && !s.gc.dry
}

// cleaningEnds notes what a round of cleaning came to that began with before free
// segments, after so many changes, and reports whether nothing was to be gained.
func (s *Store) cleaningEnds(before int, changes uint64) (stuck bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gc.rests, s.gc.changes = len(s.free) <= before, changes
	return s.gc.dry && s.gc.rests
}

// checkpointDue reports whether log or changed pages ask for a checkpoint: a
// quarter of the budget, so that pages are clean, and can be dropped, before
// the budget is used up. Needs mu, shared.
func (s *Store) checkpointDue() bool {
	return s.logged >= s.o.CheckpointBytes || int64(s.region.Counts().Dirty)*pmem.PageSize > s.o.BudgetBytes/4
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
		s.o.Turns.Wait(&w.cond)
	}
}

// wake lets those look again who wait for what the collector does.
func (s *Store) wake() {
	w := &s.gc.wait
	w.Lock()
	w.cond.Broadcast()
	w.Unlock()
}

// runCollector runs until the store is closed.
func (s *Store) runCollector() {
	defer s.bg.done.Done()
	lane := s.o.Turns.Lane(turnCollector)
	lane.Take()
	for {
		select {
		case <-s.bg.stop:
			return
		case <-s.gc.wake:
		}
		lane.Take()
		stuck, err := s.collect(false)
		if err != nil && !errors.Is(err, sealfs.ErrNoSpace) {
			s.log.Error("collector", "dev", s.dev.Name(), "err", err)
		}
		s.mu.RLock()
		s.crowded.Store(s.region.Counts().PrivateBytes() > s.o.BudgetBytes)
		s.mu.RUnlock()
		w := &s.gc.wait
		w.Lock()
		w.round++
		if stuck || err != nil {
			w.stuck = w.round
		}
		w.cond.Broadcast()
		w.Unlock()
		s.mu.RLock()
		again := len(s.free) < s.o.CleanLow && s.cleaningPays()
		s.mu.RUnlock()
		if !stuck && err == nil && again {
			s.pokeCollector()
		}
	}
}

// cleanRounds bounds the cleaning of one collector round.
const cleanRounds = 8

// collect runs one round: growth of the region, a checkpoint if log, memory or
// space ask for it, cleaning while less is free than should be, and a step of a
// far checkpoint. It reports whether space
// is short and no more can be gained.
func (s *Store) collect(force bool) (stuck bool, err error) {
	s.gc.mu.Lock()
	defer s.gc.mu.Unlock()
	if s.region.NeedsGrowth() {
		if err := s.region.Grow(); err != nil && !errors.Is(err, sealfs.ErrNoSpace) {
			return false, err
		}
	}
	var before, target int
	var far, due, pays bool
	var changes uint64
	err = s.View(func(pmem.Reader) error {
		before, target = len(s.free), s.o.CleanLow
		ahead := 0
		if far = s.farWanted(); far {
			need := s.farTarget()
			target += need
			ahead = max(min(need, (s.o.CleanLow-s.o.ReserveSegments)/2, farAhead), 0)
		}
		s.far.ahead.Store(int32(ahead))
		due = force || s.checkpointDue() || s.crowded.Load()
		pays, changes = force || s.cleaningPays(), s.changes
		return nil
	})
	if err != nil || !due && !far && before >= target {
		return false, err
	}
	if due || before < target && s.giveBackDue() {
		if err := s.checkpoint(); err != nil {
			return false, err
		}
	}
	stuck = !pays && s.freeSegments() < s.o.CleanLow
	for range cleanRounds {
		if !pays || s.freeSegments() >= target {
			break
		}
		s.gc.pace.begin()
		gained, err := s.makeRoom()
		if err != nil {
			return false, err
		}
		switch {
		case gained && s.gc.gain == 0: // what a far checkpoint before needed is dead now
			err = s.checkpoint()
		case !gained || s.giveBackDue():
			err = s.checkpointIfDying()
		}
		if err != nil {
			return false, err
		}
		if !gained {
			break
		}
		s.gc.pace.end(s.gc.gain)
		s.gc.gain = 0
	}
	if pays && before < target {
		stuck = s.cleaningEnds(before, changes)
	}
	s.mu.RLock()
	far = s.farWanted() // it may have been given up meanwhile
	s.mu.RUnlock()
	if far {
		return stuck, s.farRound()
	}
	return stuck, nil
}

// giveBackDue reports whether it is time for a checkpoint because of the segments
// that died since the last one: there are many, for the space that is kept free,
// or they are needed now.
func (s *Store) giveBackDue() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.checkpointDue() {
		return true
	}
	return s.dying > 0 && (s.dying >= (s.o.CleanLow-s.o.ReserveSegments)/4 || len(s.free) <= s.o.ReserveSegments+1)
}

// checkpointIfDying makes the segments available that died.
func (s *Store) checkpointIfDying() error {
	s.mu.RLock()
	dying := s.dying
	s.mu.RUnlock()
	if dying == 0 {
		return nil
	}
	return s.checkpoint()
}
