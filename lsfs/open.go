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
// work. The store owns both from then on, whatever the error. kept is the
// staging memory that a process left behind; nil looks for it at
// o.StagingPath.
//
// Errors: ErrVersion, ErrCorrupt (a superblock, a region of another store or
// one that is older than the log), ErrIO.
func Open(dev disk.Device, region pmem.Backing, kept *pmem.Staging, owner Owner, o Options) (*Store, error) {
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
	}
	s.super.block = *sb
	s.sync.cond.L = &s.sync.mu
	s.gc.wait.cond.L = &s.gc.wait.Mutex
	s.gc.wake = make(chan struct{}, 1)
	s.gc.spoiled = map[uint32]struct{}{}
	s.bg.init()
	s.bg.off.Store(o.manual)

	var reg *pmem.Region
	var h pmem.Header
	s.regionName = region.Name()
	err = s.guarded(func() (err error) {
		reg, h, err = pmem.Open(region, pmem.Options{BudgetBytes: o.BudgetBytes, MaxBytes: o.RegionMaxBytes})
		return err
	})
	if err != nil {
		return nil, err
	}
	s.region = reg
	s.rings, _ = region.(pmem.Rings)
	if h.Store != sb.Store {
		return nil, &sealfs.Corruption{Where: region.Name(), Off: 0, What: fmt.Sprintf("the region belongs to store %v, but %s is store %v", h.Store, dev.Name(), sb.Store)}
	}
	if h.TableBytes != int64(sb.Segments)*entryBytes {
		return nil, &sealfs.Corruption{Where: region.Name(), Off: 0, What: "the region's segment table does not fit the device", Want: uint64(sb.Segments) * entryBytes, Got: uint64(h.TableBytes)}
	}
	if h.Start < sb.Tail {
		return nil, &sealfs.Corruption{Where: region.Name(), Off: 0, What: fmt.Sprintf("the region is older than the log of %s (checkpoint %v, tail %v): it is a stale copy, or its newer header is damaged", dev.Name(), h.Start, sb.Tail)}
	}
	if h.Incarnation > sb.Incarnation {
		return nil, &sealfs.Corruption{Where: dev.Name(), Off: -1, What: "the superblock is older than the region: its newer copy is damaged", Want: uint64(h.Incarnation), Got: uint64(sb.Incarnation)}
	}
	if reg.NeedsGrowth() {
		if err := reg.Grow(); err != nil && !errors.Is(err, sealfs.ErrNoSpace) {
			return nil, err
		}
	}
	began := time.Now()
	var rec *recovered
	err = s.guarded(func() (err error) {
		rec, err = s.recover(h, kept)
		return err
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("store recovered", "dev", dev.Name(), "store", sb.Store, "records", rec.records, "staged", rec.staged,
		"tail", rec.end.String(), "incarnation", s.incarnation, "dur", time.Since(began))
	// A restart takes a segment. Where they are short it first makes up for it,
	// or a store that is killed again and again would end without any.
	for range waitRounds {
		if s.freeSegments() > o.ReserveSegments {
			break
		}
		if stuck, err := s.collect(true); err != nil || stuck {
			if err != nil && !errors.Is(err, sealfs.ErrNoSpace) {
				return nil, err
			}
			break
		}
	}
	if !o.manual {
		s.bg.done.Add(2)
		go s.drainer()
		go s.runCollector()
		s.pokeCollector()
		if o.ScrubInterval > 0 {
			s.bg.done.Add(1)
			go s.scheduler()
		}
	}
	return s, nil
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
