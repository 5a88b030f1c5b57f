package linear

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// checkLimit is how long the checker may look for an order. Histories are made so short that
// it needs a small part of it.
const checkLimit = 30 * time.Second

// local makes an arena on a file system of the machine that does not use inode numbers
// again, as ours does not.
func local(t testing.TB, actors int) Plan {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs("/dev/shm", &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		t.Skip("there is no tmpfs")
	}
	root, err := os.MkdirTemp("/dev/shm", "sealfs-linear-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(root); err != nil {
			t.Error(err)
		}
	})
	p := Plan{Dirs: []string{"d0", "d1"}}
	for _, d := range p.Dirs {
		if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for range actors {
		p.Actors = append(p.Actors, NewMounted(root))
	}
	return p
}

// TestModelIsLinux: what a local file system answers to one caller is what the model answers, step
// by step, so the model is that of Linux.
func TestModelIsLinux(t *testing.T) {
	seeds := uint64(60)
	if testing.Short() {
		seeds = 10
	}
	done := map[string]int{}
	for seed := range seeds {
		p := local(t, 1)
		p.Seed, p.Calls, p.Files = seed, 400, seed%2 == 1
		h, err := Run(p)
		if err != nil {
			t.Fatal(err)
		}
		s := newState(h.Dirs)
		for i, step := range h.Steps() {
			ok, next := s.step(&step.Call, &step.Answer)
			if !ok {
				t.Fatalf("seed %d, step %d: %v: %s", seed, i, &step.Call, step.Answer.describe(step.Call.Kind))
			}
			s = next
			what := "refused"
			if step.Answer.Errno == 0 {
				what = "done"
			}
			done[fmt.Sprint(step.Call.Kind, " ", what)]++
		}
	}
	t.Log(done)
	for k := range kinds {
		if done[fmt.Sprint(k, " done")] == 0 {
			t.Errorf("%v never succeeded", k)
		}
	}
}

// TestLocalIsLinear: several callers of a local file system are answered as if they had come one
// after the other, and the checker finds the order. Reads are left out: tmpfs may tell them a part of a
// write that goes on at that time.
func TestLocalIsLinear(t *testing.T) {
	seeds := uint64(60)
	if testing.Short() {
		seeds = 10
	}
	for seed := range seeds {
		p := local(t, 4)
		p.Seed, p.Calls, p.Files = seed, 60, seed%2 == 1
		h, err := Run(p)
		if err != nil {
			t.Fatal(err)
		}
		h.steps = slices.DeleteFunc(h.steps, func(s Step) bool { return s.Call.Kind == Read })
		if v := h.Check(checkLimit); v.Bad || v.Undecided {
			t.Fatalf("seed %d: undecided %t\n%s", seed, v.Undecided, v.Report)
		}
	}
}
