package lsfs

import (
	"sync"
	"testing"
	"time"

	"sealfs"
	"sealfs/disk"
)

// TestDrainerMakesDurable: a change becomes durable soon although nobody asks,
// also when it comes just as the drainer finds everything durable and rests.
func TestDrainerMakesDurable(t *testing.T) {
	dev, region := testDevices(32)
	format(t, dev, region)
	o := testOptions()
	o.manual = false
	o.DrainInterval, o.LagMax = 50*time.Microsecond, 400*time.Microsecond
	s := open(t, dev, region, nil, o)
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	tick := time.NewTicker(100 * time.Microsecond)
	defer tick.Stop()
	rounds := 1500
	if testing.Short() {
		rounds = 200
	}
	for n := range rounds {
		if _, err := s.put(1, content(1, n, 50)); err != nil {
			t.Fatal(err)
		}
		if err := s.Sync(); err != nil {
			t.Fatal(err)
		}
		for range n * 13 % 7919 { // another moment of the drainer's each time
		}
		at, err := s.put(1, content(1, n, 60))
		if err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(10 * time.Second); s.Durable() < at; <-tick.C {
			if time.Now().After(deadline) {
				t.Fatalf("round %d: answered at %v, durable is %v, and the drainer rests", n, at, s.Durable())
			}
		}
	}
}

// TestCountsGroupCommit: those who come while a flush is under way share the next.
func TestCountsGroupCommit(t *testing.T) {
	dev, region := testDevices(32)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	const workers = 8
	var appended, synced sync.WaitGroup
	appended.Add(workers)
	var first sync.Once
	dev.SetHook(func(o disk.Op) {
		if o.Kind == disk.OpFlush {
			first.Do(appended.Wait) // the first flush lasts until all have something to sync
		}
	})
	before := dev.Stats().Flushes
	for w := range workers {
		synced.Go(func() {
			at, err := s.put(sealfs.Ino(w+1), content(1, w, 100))
			appended.Done()
			if err == nil {
				err = s.SyncTo(at)
			}
			if err != nil || s.Durable() < at {
				t.Errorf("SyncTo(%v): %v; durable is %v", at, err, s.Durable())
			}
		})
	}
	synced.Wait()
	if n := dev.Stats().Flushes - before; n > 2 {
		t.Errorf("%d syncs at once cost %d flushes, want 2", workers, n)
	}
}
