package crash

import (
	"errors"
	"math/rand/v2"
	"testing"
	"testing/synctest"

	"sealfs"
	"sealfs/fsck"
)

// TestCampaignFormat cuts the power while a store is made, over an older one of
// the same identity: afterwards there is none, and opening it says so, or there is
// one that is sound and empty; never the old one with another one's region.
func TestCampaignFormat(t *testing.T) {
	alone(t)
	g := sequenceNamed("names").g
	rec := &recorder{synced: []int{0}}
	synctest.Test(t, func(*testing.T) {
		m, err := g.format()
		if err != nil {
			t.Fatal(err)
		}
		w, err := g.open(m, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.srv.Close(); err != nil {
			t.Fatal(err)
		}
		for i := range m {
			m[i] = m[i].Reopen()
		}
		rec.watch(m)
		if err := g.formatStore(0, m[0], m[1]); err != nil {
			t.Fatal(err)
		}
		rec.stop()
	})
	rng := rand.New(rand.NewPCG(1, 1))
	states, refused, empty := 0, 0, 0
	for i := range rec.moments {
		mo := &rec.moments[i]
		cuts := mo.cuts()
		cuts.some(rng, 40, func(ch choice) bool {
			states++
			at := place{seq: "format", at: i, keep: ch, again: -1}
			m := cuts.state(ch)
			before, err := g.check(m)
			synctest.Test(t, func(*testing.T) {
				w, e := g.open(m, mo.clock)
				if e != nil {
					if !errors.Is(e, sealfs.ErrCorrupt) {
						t.Errorf("%v: %s: %v", &at, mo.what, e)
					}
					if sound(before) && err == nil {
						t.Errorf("%v: %s: fsck finds nothing, but: %v", &at, mo.what, e)
					}
					refused++
					return
				}
				empty++
				if e := w.srv.Close(); e != nil {
					t.Errorf("%v: %v", &at, e)
				}
			})
			return true
		})
	}
	t.Logf("%d states: %d refused, %d stores", states, refused, empty)
	if refused == 0 || empty == 0 {
		t.Error("the test did not reach its point")
	}
}

// sound reports whether fsck found nothing but warnings.
func sound(t *fsck.Together) bool {
	for _, r := range t.Stores {
		if !r.Sound() {
			return false
		}
	}
	return true
}

// TestDeterministic: the same seed gives the same operations of media, or a state
// could not be judged again.
func TestDeterministic(t *testing.T) {
	alone(t)
	for i := range sequences {
		seq := &sequences[i]
		var traces []uint64
		for range 2 {
			r, err := newRun(t, seq, 3)
			if err != nil {
				t.Fatal(err)
			}
			l, err := r.live()
			if err != nil {
				t.Fatal(err)
			}
			traces = append(traces, l.moments[len(l.moments)-1].trace)
		}
		if traces[0] != traces[1] {
			t.Errorf("sequence %s: two runs with the same seed differ", seq.name)
		}
	}
}
