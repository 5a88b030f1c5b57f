package e2e

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sealfs/internal/linear"
)

// linearVariable tells the worker of TestClusterLinear which mounts there are, and for how long it works.
const linearVariable = "SEALFS_E2E_LINEAR"

// TestClusterLinear has two mounts work at the same time, while servers and managers are killed
// and started again, and wants an order for all that they were answered.
func TestClusterLinear(t *testing.T) {
	s := newSite(t, shape{managers: 3, servers: 2, disks: 2, daemons: 2, size: "1G"}, nil)
	s.up(t)
	length := 10 * time.Second
	if *full {
		length = 3 * time.Minute
	}
	var out bytes.Buffer
	// A process of its own, because whoever starts a server must hold no file open on it.
	w := exec.Command(os.Args[0], "-test.run", "^TestLinearWorker$", "-test.v", "-test.timeout", "0")
	w.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s %s", linearVariable, length, s.mounts[0].path, s.mounts[1].path))
	w.Stdout, w.Stderr = &out, &out
	if err := w.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- w.Wait() }()
	kills := 0
	for {
		select {
		case err := <-ended:
			t.Logf("%d processes were killed\n%s", kills, out.Bytes())
			if err != nil {
				t.Error(err)
			}
			return
		case <-time.After(time.Duration(500+rand.IntN(2500)) * time.Millisecond):
		}
		list := append(s.servers[:len(s.servers):len(s.servers)], s.managers...)
		p := list[rand.IntN(len(list))]
		p.kill(t)
		p.start(t)
		kills++
	}
}

// TestLinearWorker is the part of TestClusterLinear that uses the mounts.
func TestLinearWorker(t *testing.T) {
	words := strings.Fields(os.Getenv(linearVariable))
	if len(words) < 2 {
		t.Skip("skipped: it is a part of TestClusterLinear")
	}
	length, err := time.ParseDuration(words[0])
	if err != nil {
		t.Fatal(err)
	}
	mounts := words[1:]
	var actors []linear.Actor
	for i := range 4 {
		actors = append(actors, linear.NewMounted(mounts[i%len(mounts)]))
	}
	histories, operations, lost, violations := 0, 0, 0, 0
	for end := time.Now().Add(length); time.Now().Before(end) && violations == 0; histories++ {
		var dirs []string
		for _, d := range []string{"", "d0", "d1"} {
			dirs = append(dirs, filepath.Join(fmt.Sprint("arena", histories), d))
			if err := os.Mkdir(filepath.Join(mounts[0], dirs[len(dirs)-1]), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		h, err := linear.Run(linear.Plan{Seed: rand.Uint64(), Dirs: dirs[1:], Actors: actors, Calls: 30, Flat: true, Plain: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, step := range h.Steps() {
			operations++
			if step.Answer.Lost {
				lost++
			}
		}
		if v := h.Check(time.Minute); v.Bad {
			violations++
			t.Error(v.Report)
		}
	}
	fmt.Printf("%d answers were lost\nlinear: histories=%d operations=%d violations=%d\n", lost, histories, operations, violations)
}
