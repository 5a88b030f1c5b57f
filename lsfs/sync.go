package lsfs

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/lsfs/layout"
)

// syncer elects who drains. There is no flusher goroutine to hand work to:
// whoever needs durability first does it, on its own goroutine, for all who
// come meanwhile; they wait, and the next of them leads the next round.
type syncer struct {
	mu      sync.Mutex
	cond    sync.Cond
	busy    bool
	durable atomic.Uint64 // LSN below which everything is on the device, flushed
}

// Sync returns when everything that was answered before the call survives a
// power cut.
func (s *Store) Sync() error {
	s.mu.RLock()
	t := s.tail()
	s.mu.RUnlock()
	return s.SyncTo(t)
}

// Durable returns the position below which the log survives a power cut on the
// device alone.
func (s *Store) Durable() sealfs.LSN { return sealfs.LSN(s.sync.durable.Load()) }

// SyncTo returns when the log below end survives a power cut. It waits for the
// device: for one round of writes and a flush if nobody else is at it. On
// persistent memory it does not wait: every record survives from the moment on
// at which its position is known.
func (s *Store) SyncTo(end sealfs.LSN) error {
	if s.isDax() && s.Failure() == nil {
		return nil
	}
	return s.flushTo(end)
}

// flushLog returns when the device has what was answered before the call.
func (s *Store) flushLog() error {
	s.mu.RLock()
	t := s.tail()
	s.mu.RUnlock()
	return s.flushTo(t)
}

// flushTo returns when the device has the log below end, durably.
func (s *Store) flushTo(end sealfs.LSN) error {
	if s.Durable() >= end {
		return nil
	}
	y := &s.sync
	y.mu.Lock()
	defer y.mu.Unlock()
	for {
		if s.Durable() >= end {
			return nil
		}
		if err := s.Failure(); err != nil {
			return err
		}
		if y.busy {
			s.o.Turns.Wait(&y.cond)
			continue
		}
		s.lead(true)
	}
}

// lead runs one round of the drain as its leader. Needs sync.mu, which is
// released meanwhile.
func (s *Store) lead(flush bool) {
	y := &s.sync
	y.busy = true
	y.mu.Unlock()
	err := s.guarded(func() error { return s.drain(flush) })
	y.mu.Lock()
	y.busy = false
	if err != nil {
		s.fail(err)
	}
	y.cond.Broadcast()
}

// drain writes what the ring holds and the device does not; with flush it pads
// the last block and makes everything durable. Only the leader calls it.
func (s *Store) drain(flush bool) error {
	type run struct {
		h        *hotSegment
		from, to uint32
	}
	var some [4]run
	runs := some[:0]
	var end sealfs.LSN
	err := s.locked(func() error {
		if flush {
			s.pad()
		}
		s.waiting = 0
		end = s.tail()
		for _, h := range s.hot {
			to := h.filled &^ (layout.BlockSize - 1)
			if h.sealed {
				to = (h.filled + layout.BlockSize - 1) &^ (layout.BlockSize - 1)
			}
			if to > h.given || h.sealed && !h.durable.Load() {
				runs = append(runs, run{h, h.given, to})
			}
		}
		return nil
	})
	if err != nil {
		return err
	}

	for _, r := range runs {
		if r.from == r.to {
			continue
		}
		off := s.slotOffset(r.h.slot) + int64(r.from)
		if _, err := s.dev.WriteAt(s.staging.Chunk(r.h.chunk)[r.from:r.to], off); err != nil {
			return fmt.Errorf("write of %d bytes at byte %d of %s: %w", r.to-r.from, off, s.dev.Name(), err)
		}
		r.h.given = r.to
		s.stats.drains.Add(1)
		s.stats.drainBytes.Add(uint64(r.to - r.from))
	}
	if !flush {
		return nil
	}
	if err := s.dev.Flush(); err != nil {
		return fmt.Errorf("flush of %s: %w", s.dev.Name(), err)
	}
	s.stats.flushes.Add(1)
	s.sync.durable.Store(uint64(end))
	for _, r := range runs {
		// Whether a segment is sealed was decided before the write above.
		if r.h.seq != end.Seq() {
			r.h.durable.Store(true)
		}
	}
	return nil
}

// waitRing makes the oldest segments of the ring durable, so that the next one
// finds a chunk.
func (s *Store) waitRing() error {
	s.stats.ringWaits.Add(1)
	return s.flushLog()
}

func (s *Store) slotOffset(slot uint32) int64 {
	return layout.DataStart + int64(slot)*s.seg
}

// background is the drainer: it writes early, so that a sync finds little to
// do, and bounds what a power cut can take.
type background struct {
	wake   chan struct{} // something waits
	now    chan struct{} // much waits
	stop   chan struct{}
	done   sync.WaitGroup
	kicked atomic.Bool
	off    atomic.Bool // nothing runs in the background
}

// kick tells the drainer that there is something in the ring, or much. It never blocks.
func (b *background) kick(much bool) {
	if much {
		select {
		case b.now <- struct{}{}:
		default:
		}
	}
	if !b.kicked.Load() && b.kicked.CompareAndSwap(false, true) {
		select {
		case b.wake <- struct{}{}:
		default:
		}
	}
}

func (b *background) init() {
	b.wake, b.now, b.stop = make(chan struct{}, 1), make(chan struct{}, 1), make(chan struct{})
}

// drainer runs until the store is closed. It is woken once per DrainInterval
// under load, never per record, and not at all when nothing happens.
func (s *Store) drainer() {
	defer s.bg.done.Done()
	lane := s.o.Turns.Lane(turnDrainer)
	lane.Take()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		// Much that waits is something, too, and is seen below.
		select {
		case <-s.bg.stop:
			return
		case <-s.bg.wake:
		}
		lane.Take()
		for begun := time.Now(); s.Failure() == nil; {
			timer.Reset(s.o.DrainInterval)
			select {
			case <-s.bg.stop:
				return
			case <-s.bg.now:
			case <-timer.C:
			}
			lane.Take()
			if s.drainStep(time.Since(begun) >= s.o.LagMax) {
				break
			}
		}
	}
}

// drainStep drains once and, when late, makes everything durable; it reports
// whether everything is, and the drainer may rest.
func (s *Store) drainStep(late bool) bool {
	// Before the tail is read: who finds it set from now on has published
	// something that the tail below includes.
	s.bg.kicked.Store(false)
	s.mu.RLock()
	full := len(s.hot) == s.chunks() && !s.hot[0].durable.Load()
	tail := s.tail()
	s.mu.RUnlock()
	if late || full {
		return s.flushTo(tail) != nil || late
	}
	if s.Durable() >= tail {
		return true
	}
	y := &s.sync
	y.mu.Lock()
	if !y.busy {
		s.lead(false)
	}
	y.mu.Unlock()
	return false
}
