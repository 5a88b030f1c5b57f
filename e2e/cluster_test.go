package e2e

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var only = flag.String("only", "", "disturb only where \"PROCESS THING\", such as \"server1 killed\", matches this regular `expression`")

// How long disturbances last. These are the experiment; nothing waits for them otherwise.
const (
	killLasts = time.Second // at least: until all has been looked at
	stopLasts = 20 * time.Second
	cutLasts  = 12 * time.Second
)

// How soon things must happen.
const (
	volumeTime = 10 * time.Second // a new volume, when the leader has been killed
	goOnTime   = 10 * time.Second // a file of a server that lives: seconds, on a machine that is busy
	// notTime is how long is waited for what must not happen, and so is no condition.
	notTime = 2 * time.Second
)

// probe is a directory with a file in it, both on one server.
type probe struct {
	server *proc
	path   string
	// root is open: through it the file is reached whatever is with the servers of the
	// directories above.
	root *os.Root
	n    int
}

const probeText = "probe"

// newProbes makes a probe for each server, on the first mount.
func (s *site) newProbes(t testing.TB) (probes []*probe) {
	t.Helper()
	where := func(path string) string {
		t.Helper()
		var l struct {
			Replicas []struct {
				Addr string `json:"addr"`
			} `json:"replicas"`
		}
		s.decode(t, &l, "sealfs", "locate", "--daemon", s.daemons[0].data(), path)
		if len(l.Replicas) == 0 {
			t.Fatalf("locate %s: on no server", path)
		}
		return l.Replicas[0].Addr
	}
	above := filepath.Join(s.mounts[0].path, "probes")
	if err := os.Mkdir(above, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := 0; len(probes) < len(s.servers); i++ {
		if i == 100*len(s.servers) {
			t.Fatalf("of %d directories, some server has none", i)
		}
		p := &probe{path: filepath.Join(above, fmt.Sprint("p", i))}
		if err := os.Mkdir(p.path, 0o755); err != nil {
			t.Fatal(err)
		}
		addr := where(p.path)
		k := slices.IndexFunc(s.servers, func(x *proc) bool { return x.addr == addr })
		if k < 0 || slices.ContainsFunc(probes, func(o *probe) bool { return o.server == s.servers[k] }) {
			continue
		}
		p.server = s.servers[k]
		if err := os.WriteFile(filepath.Join(p.path, "file"), []byte(probeText), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := where(filepath.Join(p.path, "file")); got != addr {
			t.Fatalf("a file is at %s, its directory at %s", got, addr)
		}
		root, err := os.OpenRoot(p.path)
		if err != nil {
			t.Fatal(err)
		}
		p.root = root
		probes = append(probes, p)
	}
	return probes
}

// touch reads the file, and makes, writes and removes another one.
func (p *probe) touch() error {
	p.n++
	name := fmt.Sprint("new", p.n)
	b, err := p.root.ReadFile("file")
	if err == nil && string(b) != probeText {
		err = fmt.Errorf("it holds %q", b)
	}
	if err == nil {
		err = p.root.WriteFile(name, b, 0o644)
	}
	if err == nil {
		err = p.root.Remove(name)
	}
	return err
}

// goOn wants the probes of all servers but one to work.
func (s *site) goOn(t testing.TB, probes []*probe, but *proc, limit time.Duration) {
	t.Helper()
	for _, p := range probes {
		if p.server == but {
			continue
		}
		if err := timely(limit, p.touch); err != nil {
			t.Fatalf("a file of %s: %v", p.server.name, err)
		}
	}
}

// lister is an ls of a probe.
type lister struct {
	cmd   *exec.Cmd
	out   bytes.Buffer
	ended chan struct{}
}

func (s *site) list(t testing.TB, p *probe) *lister {
	t.Helper()
	l := &lister{cmd: exec.Command("ls", "-la", p.path), ended: make(chan struct{})}
	l.cmd.Stdout, l.cmd.Stderr = &l.out, &l.out
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		l.cmd.Wait() // its status is in ProcessState
		close(l.ended)
	}()
	return l
}

// asks reports whether the ls waits for the answer to a request of its own.
func (l *lister) asks(t testing.TB) bool {
	t.Helper()
	stack, err := os.ReadFile(fmt.Sprintf("/proc/%d/stack", l.cmd.Process.Pid)) // root may read it
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Contains(stack, []byte("request_wait_answer"))
}

// disturbance is something that is done to a process, and undone.
type disturbance struct {
	name       string
	lasts      time.Duration
	begin, end func(t testing.TB, p *proc)
}

// disturbances returns what is done to each process. To be stopped is the same in
// any network, so that is done on loopback only.
func (s *site) disturbances() []disturbance {
	all := []disturbance{
		{"killed", killLasts, func(t testing.TB, p *proc) { p.kill(t) }, func(t testing.TB, p *proc) { p.start(t) }},
	}
	cut := func(name string, ways int) disturbance {
		return disturbance{
			name, cutLasts,
			func(t testing.TB, p *proc) { s.net.cut(t, p.space, ways) }, func(t testing.TB, p *proc) { s.net.heal(t, p.space, ways) },
		}
	}
	switch {
	case !*full:
		return all
	case s.net != nil:
		return append(all, cut("unheard", cutFrom), cut("deaf", cutTo), cut("cut off", cutFrom|cutTo))
	}
	return append(all, disturbance{
		"stopped", stopLasts,
		func(t testing.TB, p *proc) { p.signal(t, unix.SIGSTOP) }, func(t testing.TB, p *proc) { p.signal(t, unix.SIGCONT) },
	})
}

// disturb does a thing to a process, looks how the others are meanwhile, and
// how all are when it has ended.
func (s *site) disturb(t testing.TB, p *proc, d disturbance, probes []*probe) {
	t.Helper()
	if ok, err := regexp.MatchString(*only, p.name+" "+d.name); err != nil {
		t.Fatal(err)
	} else if !ok {
		return
	}
	led := p.role == "manager" && s.leader(t) == p
	from := time.Now()
	d.begin(t, p)
	over := time.After(d.lasts)
	took := ""
	if led && len(s.managers) > 1 {
		limit := volumeTime
		if d.name != "killed" {
			limit = backTime // it has to be noticed first
		}
		name := fmt.Sprintf("volume-%d", from.UnixMilli())
		start := time.Now()
		s.ok(t, "sealfs", "create-volume", "--manager", s.addrs(), name)
		if took = fmt.Sprintf(", a new volume after %v", time.Since(start).Round(time.Millisecond)); time.Since(start) > limit {
			t.Errorf("create-volume took %v after the manager that leads was %s, want %v", time.Since(start), d.name, limit)
		}
	}
	s.goOn(t, probes, p, goOnTime)
	var waits, stopped *lister
	for _, o := range probes {
		if o.server == p {
			waits, stopped = s.list(t, o), s.list(t, o)
		}
	}
	if waits != nil {
		s.pause(t, notTime)
		for _, l := range []*lister{waits, stopped} {
			select {
			case <-l.ended:
				t.Fatalf("ls of a directory of %s, which is %s, did not wait (%v): %s", p.name, d.name, l.cmd.ProcessState, &l.out)
			default:
			}
		}
		// Two that look for a name that the kernel does not know share one request, and the second
		// waits in the kernel for the first, where no interrupt reaches it.
		if !stopped.asks(t) && waits.asks(t) {
			waits, stopped = stopped, waits
		}
		if err := stopped.cmd.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		select {
		case <-stopped.ended:
		case <-time.After(goOnTime):
			stack, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stack", stopped.cmd.Process.Pid)) // root may read it
			t.Fatalf("an interrupt does not end ls of a directory of %s, which is %s; it waits in\n%s", p.name, d.name, stack)
		}
		if ws, ok := stopped.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || ws.Signal() != unix.SIGINT && ws.ExitStatus() == 0 {
			t.Errorf("ls was interrupted, and ended with %v", stopped.cmd.ProcessState)
		}
	}
	select {
	case <-over:
	case <-s.load.broken():
		t.Fatalf("the load failed while %s was %s", p.name, d.name)
	}
	s.goOn(t, probes, p, goOnTime)
	lasted := time.Since(from)
	d.end(t, p)
	back := time.Now()
	if waits != nil {
		select {
		case <-waits.ended:
		case <-time.After(backTime):
			t.Fatalf("ls still waits for %s %v after it came back", p.name, backTime)
		}
		if !waits.cmd.ProcessState.Success() || !strings.Contains(waits.out.String(), "file") {
			t.Errorf("ls that waited for %s: %v: %s", p.name, waits.cmd.ProcessState, &waits.out)
		}
	}
	s.goOn(t, probes, nil, backTime)
	s.healed(t)
	s.load.advances(t)
	s.t.Logf("%s was %s for %v%s; all went on %v later", p.name, d.name, lasted.Round(10*time.Millisecond), took, time.Since(back).Round(10*time.Millisecond))
}

// killDaemon kills a daemon and starts it again. Its mount comes back by itself.
func (s *site) killDaemon(t testing.TB, i int) {
	t.Helper()
	m := s.mounts[i]
	broken := fmt.Sprint("broken ", i)
	s.load.ask(t, broken)
	m.daemon.kill(t)
	start := time.Now()
	m.daemon.start(t)
	s.eventually(t, backTime, "the mount is back", func() bool {
		var list []struct {
			Mount string `json:"mount"`
			State string `json:"state"`
		}
		s.decode(t, &list, "sealfs", "list-mountpoints", "--daemon", m.daemon.data())
		return len(list) == 1 && list[0].Mount == m.path && list[0].State == "mounted"
	})
	s.load.ask(t, broken)
	s.load.advances(t)
	s.t.Logf("%s was killed, mounted again after %v", m.daemon.name, time.Since(start).Round(time.Millisecond))
}

// verify holds what is seen through both mounts against what the load was answered.
func (s *site) verify(t testing.TB, a account, when string) {
	t.Helper()
	for _, m := range s.mounts {
		start, files := time.Now(), 0
		err := timely(programTime, func() error {
			var faults []string
			for _, w := range a.Scribes {
				n, f := w.check(m.path)
				files, faults = files+n, append(faults, f...)
			}
			faults = append(faults, a.Large.check(m.path)...)
			for _, f := range faults[:min(len(faults), 20)] {
				t.Errorf("%s, %s: %s", when, filepath.Base(m.path), f)
			}
			return nil
		})
		if err != nil {
			t.Fatalf("%s: %s: %v", when, m.path, err)
		}
		t.Logf("%s, %s: %d files and the large one compared in %v", when, filepath.Base(m.path), files, time.Since(start).Round(time.Millisecond))
	}
	if t.Failed() {
		t.FailNow()
	}
}

// inodes counts what is seen through a mount point, its root included.
func inodes(t testing.TB, mnt string) int {
	t.Helper()
	seen := make(map[uint64]bool)
	err := filepath.WalkDir(mnt, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err == nil {
			seen[fi.Sys().(*syscall.Stat_t).Ino] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return len(seen)
}

// disk is the part of `sealfs disk list --json` that is needed here.
type diskState struct {
	ID     string `json:"id"`
	Device string `json:"device"`
	Region string `json:"region"`
	State  string `json:"state"`
	Files  int    `json:"files"`
}

func (s *site) disks(t testing.TB) (all []diskState) {
	t.Helper()
	for _, p := range s.servers {
		var list []diskState
		s.decode(t, &list, "sealfs", "disk", "list", "--data", p.data())
		all = append(all, list...)
	}
	return all
}

// finish ends the load and looks at all it has left: by both mounts, by both
// again after a remount, and, when all has ended, on the disks.
func (s *site) finish(t testing.TB, probes []*probe) {
	t.Helper()
	for _, p := range probes {
		p.root.Close()
	}
	account := s.load.end(t)
	s.healed(t)
	s.verify(t, account, "when all is over")
	for i := range s.mounts {
		s.umount(t, i)
	}
	for i := range s.mounts {
		s.mount(t, i)
	}
	s.verify(t, account, "after a remount")
	for _, v := range s.status(t).Volumes {
		if v.Name != "main" {
			s.ok(t, "sealfs", "delete-volume", "--manager", s.addrs(), v.Name, "--yes")
		}
	}
	want := inodes(t, s.mounts[0].path)
	for i := range s.mounts {
		s.umount(t, i)
	}
	s.eventually(t, backTime, "all sessions have ended", func() bool { return len(s.status(t).Sessions) == 0 })
	got := 0
	tidy := func() bool {
		got = 0
		for _, d := range s.disks(t) {
			got += d.Files
		}
		return got == want
	}
	for deadline := time.After(backTime); !tidy(); {
		select {
		case <-time.After(time.Second / 4):
			continue
		case <-deadline:
			t.Errorf("the stores hold %d inodes, and %d have names", got, want)
		}
		break
	}
	disks := s.disks(t)
	for _, p := range slices.Concat(s.daemons, s.servers, s.managers) {
		p.stop(t)
	}
	s.fsck(t, disks)
}

// fsck wants the stores to be clean, each server's for itself and all together.
func (s *site) fsck(t testing.TB, disks []diskState) {
	t.Helper()
	for _, p := range s.servers {
		s.ok(t, "sealfs-fsck", "-n", "--data", p.data())
	}
	args := []string{"sealfs-fsck", "-n", "--json"}
	for _, d := range disks {
		args = append(args, d.Device+",region="+d.Region)
	}
	r := s.try(t, args...)
	var all struct {
		Stores []struct {
			Device  string `json:"device"`
			Orphans int    `json:"orphans"`
			InDoubt int    `json:"in_doubt"`
			Found   []struct {
				Name   string `json:"name"`
				Where  string `json:"where"`
				Detail string `json:"detail"`
			} `json:"found"`
			Error string `json:"error"`
		} `json:"stores"`
		Together struct {
			Absent    int `json:"absent_shards"`
			InDoubt   int `json:"in_doubt"`
			NotJudged int `json:"not_judged"`
		} `json:"together"`
	}
	if err := json.Unmarshal([]byte(r.out), &all); err != nil || len(all.Stores) != len(disks) {
		t.Fatalf("%v: %v: %v", args, err, r)
	}
	for _, st := range all.Stores {
		for _, f := range st.Found {
			t.Errorf("%s: %s at %s: %s", filepath.Base(st.Device), f.Name, f.Where, f.Detail)
		}
		if st.Orphans > 0 || st.InDoubt > 0 || st.Error != "" {
			t.Errorf("%s: %d orphans, %d transactions in doubt, %s", filepath.Base(st.Device), st.Orphans, st.InDoubt, st.Error)
		}
	}
	if w := all.Together; w.Absent > 0 || w.InDoubt > 0 || w.NotJudged > 0 {
		t.Errorf("all stores together: %+v", w)
	}
	if r.code != 0 {
		t.Errorf("sealfs-fsck of all stores ended with %d: %s", r.code, r.errOut)
	}
}

// run is the test: a load, everything that is done to every process, and what is left.
func (s *site) run() {
	t := s.t
	s.up(t)
	probes := s.newProbes(t)
	s.startLoad(choices(t), *full)
	s.load.advances(t)
	all := s.disturbances()
	for _, d := range all {
		// Whoever leads is next, if it has not had its turn: each thing is done to a leader.
		for rest := slices.Clone(s.managers); len(rest) > 0; {
			k := max(0, slices.Index(rest, s.leader(t)))
			s.disturb(t, rest[k], d, probes)
			rest = slices.Delete(rest, k, k+1)
		}
	}
	for _, p := range s.servers {
		for _, d := range all {
			s.disturb(t, p, d, probes)
		}
	}
	last := len(s.daemons) - 1
	for _, d := range all {
		if d.name != "killed" {
			s.disturb(t, s.daemons[last], d, probes)
		}
	}
	s.load.ask(t, "end-programs") // nobody can go on in a mount whose daemon is killed
	s.killDaemon(t, last)
	s.finish(t, probes)
}

// TestCluster disturbs every process of a cluster on loopback while programs work
// on its mounts: nothing that was answered is lost, and what can go on does.
// The sample is one kill of each; -full also stops each for a while.
func TestCluster(t *testing.T) {
	k := shape{managers: 1, servers: 2, disks: 1, daemons: 2, size: "1G"}
	if *full {
		k = shape{managers: 3, servers: 4, disks: 2, daemons: 2, size: "1G"}
	}
	newSite(t, k, nil).run()
}

// needFull skips a test that is too long for the sample.
func needFull(t *testing.T) {
	t.Helper()
	if !*full {
		t.Skip("skipped: it takes too long; `make e2e-cluster` does it")
	}
}

// TestClusterNet does the same in a network, in which each process is also
// cut off from all others, one way and both ways.
func TestClusterNet(t *testing.T) {
	needFull(t)
	n := newNetwork(t)
	newSite(t, shape{managers: 3, servers: 4, disks: 2, daemons: 2, size: "1G"}, n).run()
}

// TestClusterCheck shows that the judges of TestCluster notice each kind of
// damage: it is done here to files that nobody has disturbed.
func TestClusterCheck(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func(w *scribe, mnt, path string) error
	}{
		{"none", nil},
		{"short", func(_ *scribe, _, p string) error { return os.Truncate(p, 5) }},
		{"other bytes", func(_ *scribe, _, p string) error { return os.WriteFile(p, make([]byte, 100), 0o644) }},
		{"gone", func(_ *scribe, _, p string) error { return os.Remove(p) }},
		{"back again", func(w *scribe, mnt, _ string) error {
			return os.WriteFile(filepath.Join(mnt, w.Name, "d0", "removed"), nil, 0o644)
		}},
		{"another link", func(w *scribe, mnt, p string) error { return os.Link(p, filepath.Join(mnt, "link")) }},
		{"large", func(_ *scribe, mnt, _ string) error {
			return os.WriteFile(filepath.Join(mnt, largeName), make([]byte, 100), 0o644)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			mnt := t.TempDir()
			m := &mountpoint{path: mnt}
			rng := choices(t)
			var journal bytes.Buffer
			w := newScribe(t, m, "scribe", &journal, rng)
			large := newLargeFile(t, m, rng)
			for range 300 {
				w.step()
			}
			for range 10 {
				large.step()
			}
			b := w.open[slices.IndexFunc(w.open, func(b *book) bool { return b.Low > 100 && len(b.Names) == 1 })]
			if c.damage != nil {
				if err := c.damage(w, mnt, w.path(mnt, b.Names[0])); err != nil {
					t.Fatal(err)
				}
			}
			files, faults := w.check(mnt)
			faults = append(faults, large.check(mnt)...)
			if files < 20 || (len(faults) > 0) != (c.damage != nil) {
				t.Errorf("%d files, faults are %q", files, faults)
			}
		})
	}
}
