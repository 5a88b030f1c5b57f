package lsfs

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

func isVersion(err error) bool { return errors.Is(err, sealfs.ErrVersion) }

// Open recovers the store on a device and its region and starts its background
// work. The store owns both from then on; after an error they are closed. kept is
// the staging memory that a process left behind; nil looks for it at
// o.StagingPath.
//
// Errors: ErrVersion, ErrCorrupt (a superblock, a region of another store or
// one that is older than the log), ErrIO.
func Open(dev disk.Device, region pmem.Backing, kept *pmem.Staging, owner Owner, o Options) (*Store, error) {
	s, err := newStore(dev, region, owner, o)
	if err != nil {
		return nil, errors.Join(err, region.Close(), dev.Close())
	}
	if err := s.attach(region, kept); err != nil {
		s.stopBackground()
		return nil, errors.Join(err, s.closeAll(region))
	}
	if !s.o.manual {
		s.bg.done.Add(2)
		go s.drainer()
		go s.runCollector()
		s.pokeCollector()
		if s.o.ScrubInterval > 0 {
			s.bg.done.Add(1)
			go s.scheduler()
		}
	}
	return s, nil
}

// newStore returns a store that knows no more than the superblock.
func newStore(dev disk.Device, region pmem.Backing, owner Owner, o Options) (*Store, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	sb, err := ReadSuper(dev)
	if err != nil {
		return nil, err
	}
	if sb.ROCompat != 0 {
		return nil, fmt.Errorf("%s: writing needs features %#x that this program does not know: %w", dev.Name(), sb.ROCompat, sealfs.ErrVersion)
	}
	o = o.withDefaults(sb.Segments)
	s := &Store{
		dev: disk.Watch(dev), owner: owner, o: o, log: o.Logger, store: sb.Store, seg: int64(sb.SegmentBytes),
		segs: make([]segment, sb.Segments), pins: make([]atomic.Int32, sb.Segments),
		slotOf: map[uint32]uint32{}, nextSlot: layout.NoSlot, cache: newCache(o.CacheBytes),
		regionName: region.Name(),
	}
	s.super.block = *sb
	s.sync.cond.L = &s.sync.mu
	s.gc.wait.cond.L = &s.gc.wait.Mutex
	s.gc.wake = make(chan struct{}, 1)
	s.gc.spoiled = map[uint32]struct{}{}
	s.bg.init()
	s.bg.off.Store(o.manual)
	return s, nil
}

// attach opens the region, recovers, and makes sure that there is a reserve.
func (s *Store) attach(region pmem.Backing, kept *pmem.Staging) error {
	var h pmem.Header
	err := s.guarded(func() (err error) {
		s.region, h, err = pmem.Open(region, pmem.Options{BudgetBytes: s.o.BudgetBytes, MaxBytes: s.o.RegionMaxBytes})
		return err
	})
	if err != nil {
		return err
	}
	s.rings, _ = region.(pmem.Rings)
	if err := s.fits(&h); err != nil {
		return err
	}
	if s.region.NeedsGrowth() {
		if err := s.region.Grow(); err != nil && !errors.Is(err, sealfs.ErrNoSpace) {
			return err
		}
	}
	began := time.Now()
	var rec *recovered
	err = s.guarded(func() (err error) {
		rec, err = s.recover(h, kept)
		return err
	})
	if err != nil {
		return err
	}
	s.log.Info("store recovered", "dev", s.dev.Name(), "store", s.store, "records", rec.records, "staged", rec.staged,
		"tail", rec.end.String(), "incarnation", s.incarnation, "dur", time.Since(began))
	// A restart takes a segment. Where they are short it first makes up for it,
	// or a store that is killed again and again would end without any.
	for range waitRounds {
		if s.freeSegments() > s.o.ReserveSegments {
			break
		}
		if stuck, err := s.collect(true); err != nil || stuck {
			if err != nil && !errors.Is(err, sealfs.ErrNoSpace) {
				return err
			}
			break
		}
	}
	return nil
}

// fits returns why a region with this header does not belong to the device as it is.
func (s *Store) fits(h *pmem.Header) error {
	sb, dev := &s.super.block, s.dev.Name()
	table := int64(sb.Segments) * entryBytes
	switch {
	case h.Store != sb.Store:
		return &sealfs.Corruption{Where: s.regionName, Off: 0, What: fmt.Sprintf("the region belongs to store %v, but %s is store %v", h.Store, dev, sb.Store)}
	case h.TableBytes != table:
		return &sealfs.Corruption{Where: s.regionName, Off: 0, What: "the region's segment table does not fit the device", Want: uint64(table), Got: uint64(h.TableBytes)}
	case h.Start < sb.Tail:
		return &sealfs.Corruption{Where: s.regionName, Off: 0, What: fmt.Sprintf("the region is older than the log of %s (checkpoint %v, tail %v): it is a stale copy, or its newer header is damaged", dev, h.Start, sb.Tail)}
	case h.Incarnation > sb.Incarnation:
		return &sealfs.Corruption{Where: dev, Off: -1, What: "the superblock is older than the region: its newer copy is damaged", Want: uint64(h.Incarnation), Got: uint64(sb.Incarnation)}
	}
	return nil
}

// closeAll closes what a store has open that could not be opened wholly.
func (s *Store) closeAll(region pmem.Backing) error {
	var errs []error
	if s.staging != nil {
		errs = append(errs, s.staging.Close(false))
	}
	if s.region != nil {
		errs = append(errs, s.region.Close())
	} else {
		errs = append(errs, region.Close())
	}
	return errors.Join(append(errs, s.dev.Close())...)
}

// Close makes everything durable, checkpoints, and gives device and region
// back. Updates that are not answered by then get ErrClosed. A store that
// failed is closed as it is.
func (s *Store) Close() error {
	s.stopBackground()
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	var err error
	whole := false
	if s.Failure() == nil {
		err = s.Checkpoint()
		if err == nil {
			err = s.flushLog()
		}
		if err == nil && s.Failure() == nil && s.isDax() {
			err = s.leaveRing()
		}
		whole = err == nil && (s.Failure() == nil || s.isDax())
	}
	// Staging of a store that is wholly durable serves nobody.
	return errors.Join(err, s.release(whole))
}

// release gives back everything that the store has open.
func (s *Store) release(removeStaging bool) error {
	s.fail(sealfs.ErrClosed)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gone = true
	return errors.Join(s.staging.Close(removeStaging), s.region.Close(), s.dev.Close())
}

// Abandon closes the store as SIGKILL would: nothing is written any more. It
// returns a copy of the ring as the process would leave it.
func (s *Store) Abandon() (*pmem.Staging, error) {
	s.stopBackground()
	s.fail(sealfs.ErrClosed)
	kept := s.staging.Clone()
	return kept, s.release(false)
}

func (s *Store) stopBackground() {
	s.closeScrub()
	if !s.bg.off.Swap(true) {
		lane := s.o.Turns.Mine()
		close(s.bg.stop)
		s.bg.done.Wait()
		lane.Take()
		// Nobody ends rounds any more: let those go who wait for one.
		w := &s.gc.wait
		w.Lock()
		w.round += 1 << 32
		w.cond.Broadcast()
		w.Unlock()
	}
}
