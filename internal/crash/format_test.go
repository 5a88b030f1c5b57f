package crash

import (
	"errors"
	"fmt"
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

// TestDeterministic: the same seed gives the same operations of media, with the same
// bytes at the same time, in life and in recovery, or a state could not be judged
// again. Goroutines take turns, so the number of processors does not matter.
func TestDeterministic(t *testing.T) {
	for i := range sequences {
		seq := &sequences[i]
		first, again := lived(t, seq), lived(t, seq)
		for n := range max(len(first), len(again)) {
			if n < len(first) && n < len(again) && first[n].trace == again[n].trace {
				continue
			}
			t.Errorf("sequence %s: two runs with the same seed differ from moment %d on:\n%s\n%s", seq.name, n, about(first, n), about(again, n))
			break
		}
	}
}

// lived returns the moments of two lives of a sequence, and of a recovery from each.
func lived(t *testing.T, seq *sequence) (all []moment) {
	c := &campaign{t: t, goal: 1 << 60}
	r, err := newRun(t, seq, 3)
	if err != nil {
		t.Fatal(err)
	}
	lives := 2
	if testing.Short() {
		lives = 1
	}
	for life := range lives {
		l, err := r.live()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, l.moments...)
		mo := &l.moments[r.rngFor(6).IntN(len(l.moments))]
		cuts, rec := mo.cuts(), &recorder{}
		cl := l.claim.at(mo)
		if _, err := r.seq.g.verdict(t, cuts.state(cuts.random(r.rngFor(7))), nil, cl, rec); err != nil {
			t.Fatal(err)
		}
		all = append(all, rec.moments...)
		if err := c.advance(r, l, place{seq: seq.name, seed: r.seed, life: life}); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// about describes a moment, if there is one.
func about(moments []moment, n int) string {
	if n >= len(moments) {
		return "nothing"
	}
	mo := &moments[n]
	return fmt.Sprintf("%s; %d operations begun, at %d, trace %#x", mo.what, mo.begun, mo.clock, mo.trace)
}
