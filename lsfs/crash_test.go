package lsfs

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"sealfs"
	"sealfs/disk"
)

// A history is what a crashing store has been told: the state after each
// change, and how many of them were synced.
type history struct {
	states []model
	synced int
}

func (h *history) last() model { return h.states[len(h.states)-1] }

func (h *history) add(ino sealfs.Ino, data []byte) {
	m := model{}
	for k, v := range h.last() {
		m[k] = v
	}
	if m[ino] = data; data == nil {
		delete(m, ino)
	}
	h.states = append(h.states, m)
}

// find returns which state of the history the store is in, -1 if none.
func (h *history) find(s *Store, files int) (int, error) {
	got := model{}
	for ino := sealfs.Ino(1); int(ino) <= files; ino++ {
		data, err := s.get(ino)
		if err != nil {
			return -1, err
		}
		if data != nil {
			got[ino] = data
		}
	}
	if err := got.check(s); err != nil {
		return -1, err
	}
	// What the cut tore is healed, and nothing looks damaged that is not.
	var bad error
	err := s.region.VerifyAll(s.mu.RLocker(), func(int) error { return nil }, func(c *sealfs.Corruption) { bad = c })
	if err != nil || bad != nil {
		return -1, errors.Join(err, bad)
	}
	for i := len(h.states) - 1; i >= 0; i-- {
		if same(got, h.states[i]) {
			return i, nil
		}
	}
	return -1, fmt.Errorf("the store holds a state that never was")
}

func same(a, b model) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if w, ok := b[k]; !ok || !bytes.Equal(v, w) {
			return false
		}
	}
	return true
}

// crashRun works on two simulated devices and, after every write and flush of
// either, recovers from a sample of what a power cut could leave of both. The
// recovered store must hold a state of the history, not older than the last
// sync; and so must it after a second cut during that recovery.
type crashRun struct {
	t           *testing.T
	rng         *rand.Rand
	dev, region *disk.Sim
	h           history
	files       int
	states      int
	nested      int
	every       int // look at each n-th operation of a device
	perPoint    int // states per look
	busy        bool
	ops         int
}

func (c *crashRun) hook(disk.Op) {
	c.ops++
	if c.busy || c.ops%c.every != 0 {
		return
	}
	c.busy = true
	defer func() { c.busy = false }()
	regions := collect(c.region, c.rng, c.perPoint)
	for d := range c.dev.CrashStates(c.rng, c.perPoint) {
		c.recover(d, regions[c.rng.IntN(len(regions))], true)
	}
}

func collect(d *disk.Sim, rng *rand.Rand, max int) []*disk.Sim {
	var out []*disk.Sim
	for s := range d.CrashStates(rng, max) {
		out = append(out, s)
	}
	return out
}

func (c *crashRun) recover(dev, region *disk.Sim, again bool) {
	c.states++
	region0, dev0 := region.Clone(), dev.Clone()
	cutAt := c.rng.IntN(12)
	var cut [2]*disk.Sim
	if again && c.rng.IntN(4) == 0 {
		n := 0
		watch := func(disk.Op) {
			if n++; n == cutAt {
				cut[0], cut[1] = collect(dev0, c.rng, 2)[0], collect(region0, c.rng, 2)[0]
			}
		}
		dev0.SetHook(watch)
		region0.SetHook(watch)
	}
	s := open(c.t, dev0, region0, nil, testOptions())
	at, err := c.h.find(s, c.files)
	if err != nil {
		c.t.Fatalf("state %d, after %d operations: %v", c.states, c.ops, err)
	}
	if at < c.h.synced {
		c.t.Fatalf("state %d, after %d operations: recovered to change %d, but %d were synced", c.states, c.ops, at, c.h.synced)
	}
	if cut[0] != nil {
		c.nested++
		c.recover(cut[0], cut[1], false)
	}
}

func (c *crashRun) run(changes int) {
	c.dev, c.region = testDevices(20)
	format(c.t, c.dev, c.region)
	s := open(c.t, c.dev, c.region, nil, testOptions())
	c.h = history{states: []model{{}}}
	c.dev.SetHook(c.hook)
	c.region.SetHook(c.hook)
	for i := range changes {
		ino := sealfs.Ino(1 + c.rng.IntN(c.files))
		var data []byte
		if c.h.last()[ino] == nil || c.rng.IntN(5) > 0 {
			data = content(ino, i, 1+c.rng.IntN(9000))
		}
		// A crash inside the update may leave it done: it counts before it is answered.
		c.h.add(ino, data)
		if _, err := s.put(ino, data); err != nil {
			c.t.Fatal(err)
		}
		switch c.rng.IntN(12) {
		case 0:
			if err := s.Sync(); err != nil {
				c.t.Fatal(err)
			}
			c.h.synced = len(c.h.states) - 1
		case 1:
			if err := s.drain(false); err != nil {
				c.t.Fatal(err)
			}
		case 2:
			if err := s.Checkpoint(); err != nil {
				c.t.Fatal(err)
			}
		case 4:
			if err := s.FarCheckpoint(); err != nil && !errors.Is(err, sealfs.ErrNoSpace) {
				c.t.Fatal(err)
			}
		case 3:
			if c.rng.IntN(4) == 0 {
				if _, err := s.collect(true); err != nil {
					c.t.Fatal(err)
				}
			}
		}
	}
}

func TestCrashPowerCut(t *testing.T) {
	changes, every := 400, 3
	if testing.Short() {
		changes, every = 150, 5
	}
	states, nested := 0, 0
	for seed := range uint64(3) {
		c := &crashRun{t: t, rng: rand.New(rand.NewPCG(seed, 7)), files: 30, every: every, perPoint: 4}
		c.run(changes)
		states += c.states
		nested += c.nested
	}
	t.Logf("%d crash states recovered, %d of them cut again during recovery", states, nested)
	if nested == 0 || states < 100 {
		t.Errorf("%d states, %d nested: the test did not reach its point", states, nested)
	}
}
