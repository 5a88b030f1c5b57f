package pmem

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"sealfs"
	"sealfs/disk"
)

// history is a region with its log in memory; an LSN is the log's length.
type history struct {
	t       *testing.T
	rng     *rand.Rand
	shape   shape
	r       *Region
	dev     *disk.Sim
	log     [][]byte
	durable int // what the caller has made durable of log
}

func newHistory(t *testing.T, s shape, seed uint64) *history {
	r, dev := newRegion(t, 1<<20)
	r.ckpt.batch = make([]byte, 3*PageSize) // many batches
	return &history{t: t, rng: rand.New(rand.NewPCG(seed, 7)), shape: s, r: r, dev: dev}
}

func (h *history) step() {
	tx := h.r.Begin()
	change(h.t, tx, h.shape, h.rng, len(h.log))
	if redo := tx.AppendRedo(nil); h.r.freePages() > 60 {
		tx.Commit()
		h.log = append(h.log, redo)
	}
}

// at returns a region that has executed the first n records and nothing else.
func (h *history) at(n int) *Region {
	ref, _ := newRegion(h.t, h.dev.Size())
	for _, redo := range h.log[:n] {
		if err := ref.ApplyRedo(redo); err != nil {
			h.t.Fatal(err)
		}
	}
	return ref
}

// recover opens what a power cut left and replays the log up to n. Nothing must
// look damaged.
func (h *history) recover(dev *disk.Sim, n int, ref *Region) {
	h.t.Helper()
	r, header, err := Open(NewMemory(dev), Options{})
	if err != nil {
		h.t.Fatal(err)
	}
	defer r.Close()
	if int(header.Start) > n {
		h.t.Fatalf("start %d is beyond the durable log, %d", header.Start, n)
	}
	for _, redo := range h.log[header.Start:n] {
		if err := r.ApplyRedo(redo); err != nil {
			h.t.Fatal(err)
		}
	}
	if rotten, err := r.Recovered(); err != nil || len(rotten) > 0 {
		h.t.Fatalf("pages %v are thought to have rotted, %v", rotten, err)
	}
	sameRegion(h.t, "after recovery", r, ref)
	// What the replay has changed is in the next checkpoint.
	h.finish(r, n)
	r, _, err = Open(NewMemory(dev.CrashClone(nil)), Options{})
	if err != nil {
		h.t.Fatal(err)
	}
	defer r.Close()
	sameRegion(h.t, "after recovery and checkpoint", r, ref)
}

// finish makes a checkpoint without changes in between.
func (h *history) finish(r *Region, n int) {
	h.t.Helper()
	c := r.BeginCheckpoint()
	for more := true; more; {
		more = c.Copy()
		if err := c.Write(); err != nil {
			h.t.Fatal(err)
		}
	}
	if err := c.Finish(Header{Start: sealfs.LSN(n)}); err != nil {
		h.t.Fatal(err)
	}
}

// checkpoint runs one, with changes in between.
func (h *history) checkpoint() {
	h.t.Helper()
	start := len(h.log)
	c := h.r.BeginCheckpoint()
	for more := true; more; {
		for range h.rng.IntN(3) {
			h.step()
		}
		more = c.Copy()
		h.durable = len(h.log)
		for range h.rng.IntN(3) {
			h.step()
		}
		if err := c.Write(); err != nil {
			h.t.Fatal(err)
		}
	}
	for range h.rng.IntN(3) {
		h.step()
	}
	if err := c.Finish(Header{Start: sealfs.LSN(start), Incarnation: 1}); err != nil {
		h.t.Fatal(err)
	}
}

// TestCrashCheckpoint cuts the power at every write and flush of checkpoints,
// keeps any choice of the unflushed sectors and any part of the log that need
// not be durable yet, and compares the recovered region byte for byte.
func TestCrashCheckpoint(t *testing.T) {
	for i, s := range shapes[:5] {
		t.Run(s.name, func(t *testing.T) {
			h := newHistory(t, s, uint64(i))
			for range scale(120) {
				h.step()
			}
			states := 0
			h.dev.SetHook(func(disk.Op) {
				n := h.durable + h.rng.IntN(len(h.log)-h.durable+1)
				ref := h.at(n)
				for dev := range h.dev.CrashStates(h.rng, scale(4)) {
					h.recover(dev, n, ref)
					states++
				}
				ref.Close()
			})
			for range 5 {
				for range 10 {
					h.step()
				}
				h.checkpoint()
			}
			h.dev.SetHook(nil)
			mustCheck(t, h.r)
			if states < scale(60) {
				t.Errorf("only %d crash states were tried", states)
			}
		})
	}
}

// TestCrashRecovery cuts the power in a checkpoint, and again in the recovery
// from that: torn pages and sums of the first cut meet those of the second.
func TestCrashRecovery(t *testing.T) {
	h := newHistory(t, shapes[1], 11)
	for range 60 {
		h.step()
	}
	states, cuts := 0, 0
	again := func(dev *disk.Sim, n int, ref *Region) {
		for second := range dev.CrashStates(h.rng, 8) {
			if h.rng.IntN(8) > 0 { // of any kind of states a few
				continue
			}
			h.recover(second, n, ref)
			states++
		}
	}
	h.dev.SetHook(func(disk.Op) {
		if cuts++; cuts%2 != 0 {
			return
		}
		n := h.durable + h.rng.IntN(len(h.log)-h.durable+1)
		ref := h.at(n)
		for dev := range h.dev.CrashStates(h.rng, scale(4)) {
			dev.SetHook(func(disk.Op) { again(dev, n, ref) })
			h.recover(dev, n, ref)
		}
		ref.Close()
	})
	for range 3 {
		for range 6 {
			h.step()
		}
		h.checkpoint()
	}
	h.dev.SetHook(nil)
	if states < scale(300) {
		t.Errorf("only %d crash states were tried", states)
	}
}

// TestCheckpointAbandon fails writes and flushes; the pages of a failed
// checkpoint must be in the next one.
func TestCheckpointAbandon(t *testing.T) {
	h := newHistory(t, shapes[1], 3)
	for round := range 18 {
		for range 10 {
			h.step()
		}
		start := len(h.log)
		c := h.r.BeginCheckpoint()
		h.dev.Fail(disk.Fault{Kind: []disk.FaultKind{disk.WriteError, disk.TornWrite, disk.FlushError}[round%3],
			Match: func(_ int64, _ int, nth int) bool { return nth == round/3%3 }, Once: true})
		var err error
		for more := true; more && err == nil; {
			more = c.Copy()
			h.step()
			err = c.Write()
		}
		if err == nil {
			err = c.Finish(Header{Start: sealfs.LSN(start)})
		}
		if err == nil {
			t.Fatalf("round %d: nothing failed", round)
		}
		if !errors.Is(err, sealfs.ErrIO) {
			t.Fatal(err)
		}
		if round%2 == 0 {
			c.Abandon() // else BeginCheckpoint does
		}
		h.durable = len(h.log)
		// The device is latched: its successor is opened as after a restart,
		// with the region's memory as it is.
		h.dev.ClearFaults()
		h.dev = h.dev.Reopen()
		h.r.b = NewMemory(h.dev)
		cuts := 0
		h.dev.SetHook(func(disk.Op) {
			if cuts++; cuts%4 != round%4 {
				return
			}
			ref := h.at(len(h.log))
			for dev := range h.dev.CrashStates(h.rng, 3) {
				h.recover(dev, len(h.log), ref)
			}
			ref.Close()
		})
		h.checkpoint()
		h.dev.SetHook(nil)
		ref := h.at(len(h.log))
		h.recover(h.dev.CrashClone(nil), len(h.log), ref)
		h.finish(h.r, len(h.log))
		if u := h.r.Usage(); u.Dirty != 0 {
			t.Fatalf("round %d: %d pages are dirty after a checkpoint", round, u.Dirty)
		}
	}
}

// TestCheckpointUnfinished: Finish refuses while pages have not been written.
func TestCheckpointUnfinished(t *testing.T) {
	h := newHistory(t, shapes[0], 3)
	h.step()
	c := h.r.BeginCheckpoint()
	if err := c.Finish(Header{}); !errors.Is(err, sealfs.ErrInvalid) {
		t.Errorf("Finish before Copy: %v", err)
	}
	c.Copy()
	if err := c.Finish(Header{}); !errors.Is(err, sealfs.ErrInvalid) {
		t.Errorf("Finish before Write: %v", err)
	}
	if err := c.Write(); err != nil {
		t.Fatal(err)
	}
	if err := c.Finish(Header{}); err != nil {
		t.Fatal(err)
	}
	if err := c.Finish(Header{}); !errors.Is(err, sealfs.ErrInvalid) {
		t.Errorf("Finish twice: %v", err)
	}
}

// TestTrim drops clean pages only, down to the budget, and loses nothing.
func TestTrim(t *testing.T) {
	for _, kind := range []string{"memory", "file"} {
		t.Run(kind, func(t *testing.T) {
			var b Backing
			if kind == "file" {
				b = newFile(t, 16<<20, 0)
			} else {
				b = NewMemory(disk.NewSim("region", 6<<20))
				if err := Format(b, Geometry{}); err != nil {
					t.Fatal(err)
				}
			}
			const budget = 100
			r := open(t, b, Options{BudgetBytes: budget * PageSize})
			rng := rand.New(rand.NewPCG(8, 8))
			want := map[string]string{}
			put := func(n int) {
				for range n {
					k, v := composite(1, 1, rng.Uint64()%6000), randomBytes(rng, 100)
					tx := r.Begin()
					if err := tx.Set(k, v); err != nil {
						t.Fatal(err)
					}
					tx.Commit()
					want[string(k)] = string(v)
				}
			}
			trim := func() {
				t.Helper()
				for range scale(120) {
					if err := r.Trim(); err != nil {
						t.Fatal(err)
					}
				}
			}
			put(6000)
			before := r.Usage()
			trim()
			if u := r.Usage(); u.Private != before.Private || u.Private <= budget || u.PrivateBytes() != int64(u.Private)*PageSize {
				t.Fatalf("dirty pages were dropped: %+v, before %+v", u, before)
			}
			for round := range 3 {
				c := r.BeginCheckpoint()
				for c.Copy() {
				}
				trim() // the checkpoint's pages are not clean yet
				put(20)
				if err := c.Write(); err != nil {
					t.Fatal(err)
				}
				trim()
				compareAll(t, r, want)
				if err := c.Finish(Header{}); err != nil {
					t.Fatal(err)
				}
				trim()
				if u := r.Usage(); u.Private > budget {
					t.Fatalf("round %d: %d private pages, the budget is %d", round, u.Private, budget)
				}
				compareAll(t, r, want)
				mustCheck(t, r)
				put(2000)
			}
		})
	}
}

// TestConcurrent runs readers, a writer, growth and checkpoints together under
// a latch, as lsfs does, for the race detector and for the contents.
func TestConcurrent(t *testing.T) {
	r := open(t, newFile(t, 0, 0), Options{GrowBytes: 1 << 20, MaxBytes: 24 << 20})
	var latch sync.RWMutex
	var stop atomic.Bool
	var wg sync.WaitGroup
	const keys = 3000
	val := func(i uint64, gen int) []byte { return bytes.Repeat([]byte{byte(i), byte(gen)}, 100) }

	wg.Go(func() {
		defer stop.Store(true)
		for gen := range 4 {
			for i := range uint64(keys) {
				latch.Lock()
				tx := r.Begin()
				err := tx.Set(composite(1, mix(i), 0), val(i, gen))
				tx.Commit()
				latch.Unlock()
				if err != nil {
					t.Error(err)
					return
				}
				if r.NeedsGrowth() {
					if err := r.Grow(); err != nil {
						t.Error(err)
						return
					}
				}
			}
		}
	})
	for range 2 {
		wg.Go(func() {
			for i := uint64(0); !stop.Load(); i++ {
				latch.RLock()
				v, err := Get(r, composite(1, mix(i%keys), 0))
				if err == nil && (v[0] != byte(i%keys) || !bytes.Equal(v, val(i%keys, int(v[1])))) {
					t.Errorf("key %d has a torn value", i%keys)
				}
				latch.RUnlock()
				if err != nil && err != sealfs.ErrNotExist {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Go(func() {
		for rounds := 0; !stop.Load() || rounds < 3; rounds++ {
			latch.Lock()
			c := r.BeginCheckpoint()
			latch.Unlock()
			for more := true; more; {
				latch.RLock()
				more = c.Copy()
				latch.RUnlock()
				if err := c.Write(); err != nil {
					t.Error(err)
					return
				}
			}
			if err := c.Finish(Header{Start: sealfs.LSN(rounds)}); err != nil {
				t.Error(err)
				return
			}
			latch.Lock()
			err := r.Trim()
			latch.Unlock()
			if err != nil {
				t.Error(err)
			}
		}
	})
	wg.Go(func() {
		for !stop.Load() {
			verified(t, r, latch.RLocker())
		}
	})
	wg.Wait()
	mustCheck(t, r)
	verified(t, r)
	if u := r.Usage(); u.Keys != keys {
		t.Errorf("%d keys, want %d", u.Keys, keys)
	}
}
