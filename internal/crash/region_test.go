package crash

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/pmem"
)

// One of so many states is judged without its regions, too, and one of so many that a
// second cut left.
const (
	lostOf  = 7
	lostOf2 = 3
)

// copied says of each store whether a far checkpoint is there whatever the cut leaves:
// with nothing and with all of what was pending.
func (c *cuts) copied(g *geometry) ([]bool, error) {
	all := make([]bool, g.stores)
	for i := range all {
		all[i] = true
		for _, ch := range []choice{c.none(), c.all()} {
			sb, err := lsfs.ReadSuper(c.of[2*i].State(ch[2*i]))
			if err != nil {
				return nil, err
			}
			all[i] = all[i] && sb.FarRoot != 0
		}
	}
	return all, nil
}

// lost judges what a power cut left when the regions are lost with it: those of which
// there is a far checkpoint, as there must be where copied says so, are made again from
// the devices. They come to the same end of the log, and to a sound store that holds
// what the claim allows. If the power goes once more while a region is made, what is
// there then is refused, or is a region; and it can be made again in its place. m
// stays as it is. lost returns how many states it has judged.
func (g *geometry) lost(t *testing.T, m media, r rings, c *claim, copied []bool, rng *rand.Rand) (states int, err error) {
	if err := g.put(nil); err != nil {
		return 0, err
	}
	whole, err := g.check(m)
	if err != nil {
		return 0, fmt.Errorf("fsck of the device alone: %w", err)
	}
	again, half := m.clone(), m.clone()
	for i := range g.stores {
		sb, err := lsfs.ReadSuper(m[2*i])
		if err != nil {
			return 0, err
		}
		if sb.FarRoot == 0 {
			if copied[i] {
				return 0, fmt.Errorf("store %d has no far checkpoint, though it had one before and after the cut", i)
			}
			continue
		}
		states++
		rec := &recorder{}
		again[2*i+1] = disk.NewSim(m[2*i+1].Name(), g.region)
		rec.watch(media{again[2*i+1]})
		out, err := again.rebuild(g, i)
		if err != nil {
			return states, fmt.Errorf("region of store %d: %w", i, err)
		}
		if end := whole.Stores[i].LogEnd; out.End != end {
			return states, fmt.Errorf("the region of store %d was made up to %v; with the old one fsck finds the end of the log at %v", i, out.End, end)
		}
		cuts := rec.moments[rng.IntN(len(rec.moments))].cuts()
		half[2*i+1] = cuts.state(cuts.random(rng))[0]
	}
	if states == 0 {
		return 0, nil
	}
	if _, err := g.verdict(t, again, r, c, nil); err != nil {
		return states, fmt.Errorf("with a region made again: %w", err)
	}
	states++
	over := half.clone()
	if err := g.refused(t, half, r, c); err != nil {
		return states, fmt.Errorf("after a cut while a region was made: %w", err)
	}
	for i := range g.stores {
		if sb, err := lsfs.ReadSuper(m[2*i]); err != nil || sb.FarRoot == 0 {
			continue
		}
		if _, err := over.rebuild(g, i); err != nil {
			return states, fmt.Errorf("region of store %d, over a half of one: %w", i, err)
		}
	}
	if _, err := g.verdict(t, over, r, c, nil); err != nil {
		return states, fmt.Errorf("with a region made over a half of one: %w", err)
	}
	return states, nil
}

// rebuild makes the region of store i again, on its medium.
func (m media) rebuild(g *geometry, i int) (*lsfs.Rebuilt, error) {
	out, err := lsfs.RebuildRegion(m[2*i], pmem.NewMemory(m[2*i+1]), g.log)
	m[2*i], m[2*i+1] = m[2*i].Reopen(), m[2*i+1].Reopen()
	return out, err
}

// refused makes sure that stores of which regions may be halves are refused, or hold
// what the claim allows.
func (g *geometry) refused(t *testing.T, m media, r rings, c *claim) (err error) {
	if err := g.put(r); err != nil {
		return err
	}
	synctest.Test(t, func(*testing.T) {
		w, e := g.open(m, c.clock)
		if e != nil {
			if !errors.Is(e, sealfs.ErrCorrupt) {
				err = e
			}
			return
		}
		w.settle()
		if _, err = w.compare(c); err != nil {
			w.srv.Close()
			return
		}
		err = w.srv.Close()
	})
	return err
}

// TestFarSequence: far checkpoints begin and are completed again and again in the
// sequence that is about them.
func TestFarSequence(t *testing.T) {
	alone(t)
	seq := sequenceNamed("far")
	for seed := range uint64(3) {
		r, err := newRun(t, seq, seed)
		if err != nil {
			t.Fatal(err)
		}
		l, err := r.live()
		if err != nil {
			t.Fatal(err)
		}
		var last sealfs.LSN
		roots := 0
		for i := range l.moments {
			sb, err := lsfs.ReadSuper(l.moments[i].m[0])
			if err != nil {
				t.Fatal(err)
			}
			if sb.FarRoot != last {
				last = sb.FarRoot
				roots++
			}
		}
		t.Logf("seed %d: %d far checkpoints at %d moments", seed, roots, len(l.moments))
		if roots < 3 {
			t.Errorf("seed %d: only %d far checkpoints", seed, roots)
		}
	}
}
