package sim

import (
	"bytes"
	"flag"
	"fmt"
	"strings"
	"testing"
)

var (
	oneSeed   = flag.Uint64("seed", 0, "simulate this seed alone, and tell what happens")
	seedCount = flag.Int("seeds", 0, "how many seeds to simulate")
)

// hours is the simulated time of so many seeds.
func hours(seeds int) float64 { return float64(seeds) * 420 / 3600 }

// TestSimulate simulates clusters in which leases, sessions and transactions meet. With
// -args -seeds N it is a campaign; with -args -seed N it tells the story of one seed.
func TestSimulate(t *testing.T) {
	if *oneSeed != 0 {
		w := newWorld(*oneSeed, faults{}, true)
		err := w.run()
		fmt.Printf("seed %d: %v\n%s", *oneSeed, w.hits, w.trace.Bytes())
		if err != nil {
			t.Errorf("seed %d: %v", *oneSeed, err)
		}
		return
	}
	seeds := *seedCount
	if seeds == 0 {
		seeds = 60
		if testing.Short() {
			seeds = 12
		}
	}
	hits := map[string]int{}
	bad := 0
	for seed := range uint64(seeds) {
		w := newWorld(seed+1, faults{}, false)
		if err := w.run(); err != nil {
			bad++
			again := newWorld(seed+1, faults{}, true)
			again.run()
			lines := strings.Split(strings.TrimSpace(again.trace.String()), "\n")
			t.Errorf("seed %d: %v\nthe end of its trace:\n%s", seed+1, err, strings.Join(lines[max(0, len(lines)-40):], "\n"))
			if *seedCount == 0 {
				return
			}
		}
		for k, n := range w.hits {
			hits[k] += n
		}
	}
	t.Log(hits)
	if *seedCount != 0 {
		fmt.Printf("simulated: seeds=%d hours=%.1f violations=%d\n", seeds, hours(seeds), bad)
	}
	for _, k := range []string{
		"blocked", "believed", "used", "delayed", "flushed", "revoked", "restored", "committed", "aborted", "resolved", "prepare blocked",
		"ended", "lost", "put off", "under a lock", "doubled", "from a row", "died", "client paused", "server paused",
	} {
		if hits[k] == 0 {
			t.Errorf("%q never happened", k)
		}
	}
}

// TestReplay: a seed tells the same story each time, byte for byte.
func TestReplay(t *testing.T) {
	for seed := range uint64(4) {
		a, b := newWorld(seed+1, faults{}, true), newWorld(seed+1, faults{}, true)
		a.run()
		b.run()
		if !bytes.Equal(a.trace.Bytes(), b.trace.Bytes()) || a.trace.Len() == 0 {
			t.Errorf("seed %d has two stories, of %d and %d bytes", seed+1, a.trace.Len(), b.trace.Len())
		}
	}
}

// TestFinds: each rule that is broken is found.
func TestFinds(t *testing.T) {
	for name, c := range map[string]struct {
		bad  faults
		from uint64 // a seed not long before one that finds it
	}{
		"leases: what is acknowledged was not carried out":  {faults{noRecall: true}, 0},
		"leases: a start forgets whose writes are delayed":  {faults{noRestore: true}, 0},
		"leases: a start answers before sessions are back":  {faults{noGrace: true}, 0},
		"leases: prepared items are granted":                {faults{noKeep: true}, 0},
		"sessions: a client believes beyond its term":       {faults{longBelief: true}, 0},
		"sessions: they end before servers refuse them":     {faults{noFence: true}, 545},
		"sessions: a server that stood still takes changes": {faults{unattended: true}, 432},
		"exactly once: a start forgets what was answered":   {faults{noRows: true}, 0},
		"exactly once: retries overlap":                     {faults{noCalls: true}, 0},
		"transactions: a vote is forgotten by a start":      {faults{voteEarly: true}, 0},
		"transactions: presumed commit":                     {faults{presumeCommit: true}, 0},
		"transactions: one under way is said to be aborted": {faults{noActive: true}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(600) {
				if err := newWorld(c.from+seed+1, c.bad, false).run(); err != nil {
					t.Logf("seed %d: %v", c.from+seed+1, err)
					return
				}
			}
			t.Error("nobody notices")
		})
	}
}
