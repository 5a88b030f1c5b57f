package crash

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

var (
	whole   = flag.Bool("campaign", false, "run the whole campaign and the mutants, in processes of their own")
	goal    = flag.Int("states", 400_000, "states of the whole campaign")
	matcher = flag.String("mutants", ".", "run the mutants whose names match this expression; empty: none")
)

func TestMain(m *testing.M) {
	flag.Parse()
	if !*whole {
		os.Exit(m.Run())
	}
	c, err := conduct()
	if err != nil {
		fmt.Println("crash:", err)
	}
	// The last line, whatever happened.
	fmt.Printf("crash: states=%d violations=%d mutants=%d/%d\n", c.states, c.violations, c.caught, c.mutants)
	if err != nil || c.violations > 0 || c.caught < c.mutants {
		os.Exit(1)
	}
	os.Exit(0)
}

// conductor runs the whole campaign: workers for the states, then the mutants.
type conductor struct {
	dir   string
	began time.Time

	mu                                  sync.Mutex
	of                                  []int // states of each worker
	states, violations, mutants, caught int
}

func conduct() (*conductor, error) {
	c := &conductor{began: time.Now()}
	dir, err := os.MkdirTemp("", "sealfs-crash")
	if err != nil {
		return c, err
	}
	defer os.RemoveAll(dir)
	c.dir = dir
	root, err := moduleRoot()
	if err != nil {
		return c, err
	}
	n := runtime.NumCPU()
	c.of = make([]int, n)
	var work sync.WaitGroup
	if *goal > 0 {
		for i := range n {
			work.Go(func() { c.worker(i, n) })
		}
		work.Wait()
	}
	if *matcher == "" {
		return c, nil
	}
	wanted, err := regexp.Compile(*matcher)
	if err != nil {
		return c, err
	}
	next := make(chan *mutant)
	for i := range n {
		work.Go(func() {
			for m := range next {
				c.mutant(m, root, filepath.Join(dir, fmt.Sprint("mutant", i)))
			}
		})
	}
	for i := range mutants {
		if wanted.MatchString(mutants[i].name) {
			next <- &mutants[i]
		}
	}
	close(next)
	work.Wait()
	return c, nil
}

// say prints a line with the time since the beginning.
func (c *conductor) say(format string, args ...any) {
	fmt.Printf("crash: [%4.0fs] %s\n", time.Since(c.began).Seconds(), fmt.Sprintf(format, args...))
}

// worker runs a share of the states in a process and listens to it.
func (c *conductor) worker(i, n int) {
	trail := filepath.Join(c.dir, fmt.Sprint("trail", i))
	fail := func(err error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.violations++
		at, _ := os.ReadFile(trail)
		c.say("VIOLATION a process died at -replay=%s: %v", strings.TrimSpace(string(at)), err)
	}
	self, err := os.Executable()
	if err == nil {
		err = os.WriteFile(trail, nil, 0o600)
	}
	if err != nil {
		fail(err)
		return
	}
	cmd := exec.Command(self, "-test.run=^TestWorker$", "-test.timeout=0", fmt.Sprint("-share=", (*goal+n-1)/n), fmt.Sprint("-budget=", *goal/len(sequences)/3), fmt.Sprint("-part=", i), fmt.Sprint("-of=", n), "-trail="+trail)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fail(err)
		return
	}
	found := 0
	for lines := bufio.NewScanner(out); lines.Scan(); {
		line := lines.Text()
		rest, ok := strings.CutPrefix(line, "crash: progress ")
		if !ok {
			if line != "PASS" && line != "FAIL" {
				fmt.Println(line)
			}
			continue
		}
		f := strings.SplitN(rest, " ", 3)
		c.mu.Lock()
		c.of[i], _ = strconv.Atoi(f[0])
		v, _ := strconv.Atoi(f[1])
		c.violations += v - found
		found = v
		c.states = 0
		for _, s := range c.of {
			c.states += s
		}
		c.say("%d states, %d violations; %s", c.states, c.violations, f[2])
		c.mu.Unlock()
	}
	if err := cmd.Wait(); err != nil && found == 0 {
		fail(err)
	}
}

// mutant looks for one sabotage.
func (c *conductor) mutant(m *mutant, root, dir string) {
	began := time.Now()
	err := os.MkdirAll(dir, 0o700)
	by := ""
	if err == nil {
		by, err = m.run(context.Background(), root, dir)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mutants++
	took := time.Since(began).Round(100 * time.Millisecond)
	switch {
	case err != nil:
		c.say("mutant SURVIVED %v %q: %v", took, m.name, err)
	case by == "":
		c.say("mutant SURVIVED %v %q", took, m.name)
	default:
		c.caught++
		c.say("mutant caught %v %q: %.160s", took, m.name, strings.TrimPrefix(by, "crash: VIOLATION "))
	}
}
