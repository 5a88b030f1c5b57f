package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var keep = flag.String("keep", "", "leave directories, with logs and disks, of failed tests of clusters below this `directory`")

// liveSites are those that are not removed yet.
var liveSites sync.WaitGroup

// backTime is how long the way back to normal may take after a disturbance.
const backTime = 2 * time.Minute

// proc is a process of a cluster. It is a child of the test, so that nothing but
// it is ever signalled.
type proc struct {
	s          *site
	name, role string
	addr       string // empty for daemons
	space      string // its network namespace, if it has one of its own
	args       []string
	cmd        *exec.Cmd
	ended      chan struct{} // closed when it has ended; nil: never started
	said       int64         // size of its output before this run
}

func (p *proc) data() string { return filepath.Join(p.s.dir, p.name) }
func (p *proc) out() string  { return p.data() + ".out" }

// begin starts the process.
func (p *proc) begin(t testing.TB) {
	t.Helper()
	out, err := os.OpenFile(p.out(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if fi, err := out.Stat(); err == nil {
		p.said = fi.Size()
	}
	args := within(p.space, append([]string{filepath.Join(bin, "sealfs"), p.role, "--data", p.data()}, p.args...))
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = out, out, p.s.dir
	// An interrupt from the keyboard is for the test, which ends them in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatalf("%s: %v", p.name, err)
	}
	ended := make(chan struct{})
	p.s.mu.Lock()
	p.cmd, p.ended = cmd, ended
	p.s.mu.Unlock()
	go func() {
		cmd.Wait() // its status is in ProcessState
		close(ended)
	}()
}

// output returns what this run of the process has printed.
func (p *proc) output() string {
	b, _ := os.ReadFile(p.out())
	return string(b[min(p.said, int64(len(b))):])
}

// ready waits until the process says that it is.
func (p *proc) ready(t testing.TB) {
	t.Helper()
	p.s.eventually(t, commandTime, p.name+" says that it is ready", func() bool {
		select {
		case <-p.ended:
			t.Fatalf("%s ended at once (%v):\n%s", p.name, p.cmd.ProcessState, p.output())
		default:
		}
		return strings.Contains(p.output(), "running:")
	})
}

func (p *proc) start(t testing.TB) {
	t.Helper()
	p.begin(t)
	p.ready(t)
}

func (p *proc) signal(t testing.TB, sig os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatalf("%v to %s: %v", sig, p.name, err)
	}
}

// wait waits for the end of the process.
func (p *proc) wait(t testing.TB) {
	t.Helper()
	select {
	case <-p.ended:
	case <-time.After(commandTime):
		t.Fatalf("%s has not ended after %v", p.name, commandTime)
	}
}

// kill is SIGKILL.
func (p *proc) kill(t testing.TB) {
	t.Helper()
	p.signal(t, unix.SIGKILL)
	p.wait(t)
}

// stop is SIGTERM; it has to be a clean end.
func (p *proc) stop(t testing.TB) {
	t.Helper()
	p.signal(t, unix.SIGTERM)
	p.wait(t)
	if !p.cmd.ProcessState.Success() {
		t.Errorf("%s ended with %v:\n%s", p.name, p.cmd.ProcessState, p.output())
	}
}

// mountpoint is where one of the daemons has mounted the volume.
type mountpoint struct {
	path   string
	daemon *proc
	// broken is odd while the daemon is killed, and rises with each change: calls that
	// it rises under may fail, and calls that it is odd under do.
	broken atomic.Int64
}

// await waits while the daemon is killed.
func (m *mountpoint) await() {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for m.broken.Load()%2 == 1 {
		<-tick.C
	}
}

// excused reports whether a call may fail that began when broken was old.
func (m *mountpoint) excused(old int64) bool { return old%2 == 1 || m.broken.Load() != old }

// site is a cluster of processes in a temporary directory.
type site struct {
	t        *testing.T
	dir      string
	net      *network // nil: all are on loopback
	managers []*proc
	servers  []*proc
	daemons  []*proc
	extra    []*proc // what tests add
	mounts   []*mountpoint
	removal  sync.Once
	mu       sync.Mutex // of cmd and ended of all processes, against a removal by a signal
	load     *load      // nil: none runs
}

// shape is how large a cluster is.
type shape struct {
	managers, servers, disks, daemons int
	size                              string // of each disk
}

// newSite makes a cluster that is not started yet, and removes it with the test,
// and when the test is interrupted or has no time left.
func newSite(t *testing.T, k shape, n *network) *site {
	t.Helper()
	s := emptySite(t, n)
	ports := freePorts(t, k.managers+k.servers)
	add := func(role string, i int, port int) *proc {
		p := &proc{s: s, role: role, name: fmt.Sprintf("%s%d", role, i+1)}
		host := "127.0.0.1"
		if n != nil {
			p.space, host = n.join(t, p.name)
		}
		if role != "daemon" {
			p.addr = net.JoinHostPort(host, strconv.Itoa(port))
			p.args = []string{"--listen", p.addr}
			if n != nil {
				p.args = append(p.args, "--insecure-listen")
			}
		}
		return p
	}
	for i := range k.managers {
		p := add("manager", i, ports[i])
		if i == 0 {
			p.args = append(p.args, "--bootstrap")
		} else {
			p.args = append(p.args, "--join", s.managers[0].addr)
		}
		s.managers = append(s.managers, p)
	}
	for i := range k.servers {
		p := add("server", i, ports[k.managers+i])
		p.args = append(p.args, "--manager", s.addrs(), "--host", p.name)
		for d := range k.disks {
			p.args = append(p.args, "--disk", fmt.Sprintf("%s,size=%s", filepath.Join(s.dir, fmt.Sprintf("%s-disk%d.img", p.name, d)), k.size))
		}
		s.servers = append(s.servers, p)
	}
	for i := range k.daemons {
		p := add("daemon", i, 0)
		p.args = []string{"--foreground"}
		s.daemons = append(s.daemons, p)
		s.mounts = append(s.mounts, &mountpoint{path: filepath.Join(s.dir, fmt.Sprintf("mnt%d", i+1)), daemon: p})
	}
	return s
}

// emptySite returns a site without processes.
func emptySite(t *testing.T, n *network) *site {
	t.Helper()
	if testing.Short() {
		t.Skip("skipped: real mounts take too long for -short")
	}
	if why := cannotMount(); why != "" {
		t.Skip("skipped: " + why)
	}
	s := &site{t: t, net: n}
	dir, err := os.MkdirTemp(*keep, "sealfs-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	s.dir = dir
	liveSites.Add(1)
	interrupts := make(chan os.Signal, 1)
	signal.Notify(interrupts, os.Interrupt, unix.SIGTERM, unix.SIGHUP)
	var late <-chan time.Time
	if d, ok := t.Deadline(); ok {
		// Go would end the test without a clean-up.
		late = time.After(time.Until(d) - time.Minute)
	}
	done := make(chan struct{})
	go func() {
		var why any
		select {
		case <-done:
			return
		case why = <-interrupts:
		case <-late:
			why = "no time left"
		}
		fmt.Fprintf(os.Stderr, "%s: %v: removing %s\n", t.Name(), why, dir)
		s.remove(true)
		liveSites.Wait() // others are interrupted, too
		os.Exit(1)
	}()
	t.Cleanup(func() {
		s.remove(t.Failed())
		signal.Stop(interrupts)
		close(done)
	})
	return s
}

// freePorts returns ports that nobody listens at. They are below those that the
// kernel gives to outgoing connections: a killed process shall find its own again.
func freePorts(t testing.TB, n int) (ports []int) {
	t.Helper()
	for tries := 0; len(ports) < n; tries++ {
		port := 20000 + rand.IntN(12000)
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil && tries > 1000 {
			t.Fatal(err)
		}
		if err == nil {
			defer l.Close()
			ports = append(ports, port)
		}
	}
	return ports
}

// addrs lists the managers, as --manager wants them.
func (s *site) addrs() string {
	var list []string
	for _, p := range s.managers {
		list = append(list, p.addr)
	}
	return strings.Join(list, ",")
}

func (s *site) processes() []*proc { return slices.Concat(s.managers, s.servers, s.daemons, s.extra) }

// try runs one of our commands where it reaches the managers.
func (s *site) try(t testing.TB, args ...string) result {
	t.Helper()
	args = append([]string{filepath.Join(bin, args[0])}, args[1:]...)
	space := ""
	if s.net != nil {
		space = s.net.admin
	}
	return program{args: within(space, args)}.run(t, commandTime)
}

// ok runs one of our commands, which has to succeed.
func (s *site) ok(t testing.TB, args ...string) string {
	t.Helper()
	r := s.try(t, args...)
	if r.code != 0 {
		t.Fatalf("%s: %v", strings.Join(args, " "), r)
	}
	return r.out
}

// refused runs one of our commands, which has to fail, and to say certain things.
func (s *site) refused(t testing.TB, says []string, args ...string) {
	t.Helper()
	r := s.try(t, args...)
	for _, text := range says {
		if r.code != 1 || !strings.Contains(r.errOut, text) {
			t.Errorf("%s: want a refusal that says %q, got %v", strings.Join(args, " "), says, r)
			return
		}
	}
}

// decode runs one of our commands with --json.
func (s *site) decode(t testing.TB, v any, args ...string) {
	t.Helper()
	out := s.ok(t, append(args, "--json")...)
	if err := json.Unmarshal([]byte(out), v); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// eventually waits for a condition.
func (s *site) eventually(t testing.TB, limit time.Duration, what string, condition func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(limit)
	for !condition() {
		select {
		case <-tick.C:
		case <-s.load.broken():
			t.Fatalf("waiting until %s: the load has failed", what)
		case <-deadline:
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// pause lets an experiment last. It is the one wait that is not for a condition.
func (s *site) pause(t testing.TB, d time.Duration) {
	t.Helper()
	select {
	case <-time.After(d):
	case <-s.load.broken():
		t.Fatal("the load has failed")
	}
}

// up starts the cluster, makes the volume, and mounts it everywhere.
func (s *site) up(t testing.TB) {
	t.Helper()
	for _, p := range s.managers {
		p.start(t) // the first one makes the cluster, the others join it
	}
	for _, p := range slices.Concat(s.servers, s.daemons) {
		p.begin(t)
	}
	for _, p := range slices.Concat(s.servers, s.daemons) {
		p.ready(t)
	}
	s.ok(t, "sealfs", "create-volume", "--manager", s.addrs(), "main")
	for i := range s.mounts {
		s.mount(t, i)
	}
}

func (s *site) mount(t testing.TB, i int) {
	t.Helper()
	m := s.mounts[i]
	options := "timeout=0" // who fails has met a bug, and not only a long wait
	if i%2 == 1 {
		options += ",conns=2"
	}
	s.ok(t, "sealfs", "mount", "--manager", s.addrs(), "--daemon", m.daemon.data(), "-o", options, "main", m.path)
}

func (s *site) umount(t testing.TB, i int) {
	t.Helper()
	m := s.mounts[i]
	s.ok(t, "sealfs", "umount", "--daemon", m.daemon.data(), m.path)
	if left := mountsBelow(t, s.dir); slices.Contains(left, m.path) {
		t.Fatalf("%s is still mounted", m.path)
	}
}

// clusterState is the part of `sealfs status --manager ... --json` that is needed here.
type clusterState struct {
	State    string `json:"state"`
	Sessions []struct {
		ID int64 `json:"id"`
	} `json:"sessions"`
	Volumes []struct {
		Name  string `json:"name"`
		State string `json:"state"`
	} `json:"volumes"`
}

func (s *site) status(t testing.TB) (st clusterState) {
	t.Helper()
	s.decode(t, &st, "sealfs", "status", "--manager", s.addrs())
	return st
}

// healed waits until the cluster says of itself that all is well.
func (s *site) healed(t testing.TB) {
	t.Helper()
	s.eventually(t, backTime, "the cluster is whole again: see `sealfs status`", func() bool { return s.status(t).State == "running" })
}

// leader returns the manager that leads.
func (s *site) leader(t testing.TB) (leader *proc) {
	t.Helper()
	s.eventually(t, backTime, "a manager leads", func() bool {
		var list []struct {
			Addr   string `json:"addr"`
			Leader bool   `json:"leader"`
		}
		r := s.try(t, "sealfs", "list-managers", "--manager", s.addrs(), "--json")
		if r.code != 0 || json.Unmarshal([]byte(r.out), &list) != nil {
			return false
		}
		for _, m := range list {
			if i := slices.IndexFunc(s.managers, func(p *proc) bool { return p.addr == m.Addr }); i >= 0 && m.Leader {
				leader = s.managers[i]
			}
		}
		return leader != nil
	})
	return leader
}

// remove ends all processes and removes everything, whatever state they are in.
// It may be called while the test still runs.
func (s *site) remove(failed bool) {
	s.removal.Do(func() {
		defer liveSites.Done()
		if failed {
			s.tellLogs()
		}
		list := s.processes()
		s.mu.Lock()
		for _, p := range slices.Backward(list) {
			if p.ended != nil {
				p.cmd.Process.Kill() // also what is stopped
				<-p.ended
			}
		}
		s.mu.Unlock()
		for _, point := range slices.Backward(mountsBelow(s.t, s.dir)) {
			if unix.Unmount(point, unix.MNT_DETACH) != nil {
				exec.Command("fusermount3", "-u", "-z", point).Run()
			}
		}
		s.load.kill()
		for _, p := range s.servers {
			if p.ended != nil && (*keep == "" || !failed) {
				// It knows what lies in shared memory.
				out, err := exec.Command(filepath.Join(bin, "sealfs"), "destroy", "--data", p.data(), "--yes").CombinedOutput()
				if err != nil {
					fmt.Fprintf(os.Stderr, "destroy %s: %v\n%s", p.data(), err, out)
				}
			}
		}
		if s.net != nil {
			s.net.remove()
		}
		if *keep != "" && failed {
			fmt.Fprintf(os.Stderr, "left for a look: %s\n", s.dir)
			return
		}
		if err := os.RemoveAll(s.dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	})
}

// tellLogs prints the end of what the processes said.
func (s *site) tellLogs() {
	for _, p := range s.processes() {
		log, _ := os.ReadFile(filepath.Join(p.data(), "log", p.role+".log"))
		out, _ := os.ReadFile(p.out())
		fmt.Fprintf(os.Stderr, "--- %s at %s\n%s\n%s\n", p.name, p.addr, tail(log, 10), tail(out, 3))
		if *keep != "" {
			p.goroutines()
		}
	}
	out, _ := os.ReadFile(filepath.Join(s.dir, "load.out"))
	fmt.Fprintf(os.Stderr, "--- load\n%s\n", tail(out, 40))
}

// goroutines has a process write down what it is at.
func (p *proc) goroutines() {
	c := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", filepath.Join(p.data(), "run", p.role+".sock"))
	}}}
	r, err := c.Get("http://sealfs/debug/pprof/goroutine?debug=2")
	if err != nil {
		return // it has ended, or is stopped
	}
	defer r.Body.Close()
	if b, err := io.ReadAll(r.Body); err == nil {
		os.WriteFile(p.data()+".goroutines", b, 0o644)
	}
}

// tail returns the last lines of a text.
func tail(b []byte, n int) string {
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-n):], []byte("\n")))
}

// timely runs f, which may hang in a mount, and says whether it has ended in time.
func timely(limit time.Duration, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-time.After(limit):
		return fmt.Errorf("no answer within %v", limit)
	}
}
