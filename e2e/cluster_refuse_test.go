package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// another returns a process of the site that nobody has planned.
func (s *site) another(role, name string, args ...string) *proc {
	p := &proc{s: s, role: role, name: name, args: args}
	s.extra = append(s.extra, p)
	return p
}

// fails starts a process that has to end by itself, and to say why.
func (p *proc) fails(t testing.TB, says ...string) {
	t.Helper()
	p.begin(t)
	p.wait(t)
	out := p.output()
	for _, text := range says {
		if p.cmd.ProcessState.ExitCode() != 1 || !strings.Contains(out, text) {
			t.Errorf("%s: want a refusal that says %q, got %v:\n%s", p.name, says, p.cmd.ProcessState, out)
			return
		}
	}
	t.Logf("%s: %s", p.name, tail([]byte(out), 1))
}

// with returns the process's arguments with one of them changed.
func (p *proc) with(flag, value string) []string {
	args := slices.Clone(p.args)
	args[slices.Index(args, flag)+1] = value
	return args
}

// TestClusterRefusals puts together what does not belong together, while a load runs:
// it is refused by name, the others go on, and nothing is lost.
func TestClusterRefusals(t *testing.T) {
	needFull(t)
	a := newSite(t, shape{managers: 1, servers: 2, disks: 1, daemons: 1, size: "1G"}, nil)
	b := newSite(t, shape{managers: 1, servers: 1, disks: 1, daemons: 0, size: "64M"}, nil)
	a.up(t)
	b.up(t)
	b.ok(t, "sealfs", "create-volume", "--manager", b.addrs(), "photos")
	probes := a.newProbes(t)
	a.startLoad(choices(t), false)
	a.load.advances(t)
	wellStill := func() {
		t.Helper()
		a.goOn(t, probes, nil, backTime)
		a.healed(t)
		a.load.advances(t)
	}
	free := func() string { return fmt.Sprintf("127.0.0.1:%d", freePorts(t, 1)[0]) }
	clusterOf := func(s *site) string {
		var st struct {
			Cluster string `json:"cluster"`
		}
		s.decode(t, &st, "sealfs", "status", "--manager", s.addrs())
		return st.Cluster
	}

	// A copy of a server and its disk.
	first := a.servers[0]
	twin := a.another("server", "twin", "--listen", free(), "--manager", a.addrs())
	must(t, a.dir, "cp", "-a", "--sparse=always", first.data(), twin.data())
	must(t, a.dir, "cp", "--sparse=always", "server1-disk0.img", "twin-disk0.img")
	for _, name := range []string{"run", "pids", "log"} {
		if err := os.RemoveAll(filepath.Join(twin.data(), name)); err != nil {
			t.Fatal(err)
		}
	}
	inventory := filepath.Join(twin.data(), "server.yaml")
	text, err := os.ReadFile(inventory)
	if err == nil {
		err = os.WriteFile(inventory, bytes.ReplaceAll(text, []byte("server1-disk0"), []byte("twin-disk0")), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	twin.fails(t, "is not served", first.addr)
	wellStill()

	// The same directory, the same address, the same disk twice.
	again := a.another("server", first.name, "--listen", free(), "--manager", a.addrs())
	again.fails(t, first.data(), "in use")
	a.another("server", "same-address", "--listen", first.addr, "--manager", a.addrs()).fails(t, first.addr)
	disk := a.disks(t)[0]
	a.another("server", "same-disk", "--listen", free(), "--manager", a.addrs(), "--disk", disk.Device).fails(t, disk.Device, disk.ID)
	a.another("server", "same-region", "--listen", free(), "--manager", a.addrs(), "--disk", disk.Device+",region="+disk.Region).fails(t, disk.Device, disk.ID)
	wellStill()

	// A disk of another cluster, and a server of it.
	theirs := b.servers[0]
	theirs.stop(t)
	a.another("server", "thief", "--listen", free(), "--manager", a.addrs(), "--disk", filepath.Join(b.dir, "server1-disk0.img")).fails(t, clusterOf(b), clusterOf(a))
	stray := b.another("server", theirs.name)
	stray.args = theirs.with("--manager", a.addrs())
	stray.fails(t, clusterOf(b), clusterOf(a))
	theirs.start(t)
	b.healed(t)
	wellStill()

	// A volume of another cluster.
	a.refused(t, []string{`"photos"`}, "sealfs", "mount", "--manager", a.addrs(), "--daemon", a.daemons[0].data(), "photos", filepath.Join(a.dir, "photos"))

	// Where a server of ours was, one of another cluster listens.
	theirs.stop(t)
	first.kill(t)
	stray.args = theirs.with("--listen", first.addr)
	stray.start(t)
	a.goOn(t, probes, first, goOnTime)
	var ls *lister
	for _, p := range probes {
		if p.server == first {
			ls = a.list(t, p)
		}
	}
	a.pause(t, notTime)
	select {
	case <-ls.ended:
		t.Errorf("ls did not wait: %v: %s", ls.cmd.ProcessState, &ls.out)
	default:
	}
	stray.stop(t)
	first.start(t)
	theirs.start(t)
	wellStill()
	<-ls.ended
	if !ls.cmd.ProcessState.Success() || !strings.Contains(ls.out.String(), "file") {
		t.Errorf("ls that waited: %v: %s", ls.cmd.ProcessState, &ls.out)
	}
	a.finish(t, probes)
}

// TestClusterStrangers lets a manager of another cluster answer where ours did,
// and kills the daemon meanwhile: it waits for its own.
func TestClusterStrangers(t *testing.T) {
	needFull(t)
	a := newSite(t, shape{managers: 1, servers: 1, disks: 1, daemons: 1, size: "64M"}, nil)
	b := newSite(t, shape{managers: 1, servers: 1, disks: 1, daemons: 1, size: "64M"}, nil)
	a.up(t)
	b.up(t)
	ours, theirs := a.mounts[0], b.mounts[0]
	for _, m := range []*mountpoint{ours, theirs} {
		if err := os.WriteFile(filepath.Join(m.path, "whose"), []byte(m.path), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	session := b.status(t).Sessions
	a.managers[0].kill(t)
	b.managers[0].stop(t)
	stray := b.another("manager", b.managers[0].name)
	stray.args = b.managers[0].with("--listen", a.managers[0].addr)
	stray.start(t)
	// What is mounted stays as it is.
	if got, err := os.ReadFile(filepath.Join(ours.path, "whose")); string(got) != ours.path {
		t.Errorf("a stranger for a manager: %q, %v", got, err)
	}
	ours.daemon.kill(t)
	ours.daemon.begin(t)
	said := func() string {
		b, _ := os.ReadFile(filepath.Join(ours.daemon.data(), "log", "daemon.log"))
		return string(b)
	}
	a.eventually(t, commandTime, "the daemon says that it cannot mount", func() bool {
		if got, err := os.ReadFile(filepath.Join(ours.path, "whose")); err == nil {
			t.Fatalf("the daemon has mounted from another cluster: %q", got)
		}
		return strings.Contains(said(), "cannot mount yet")
	})
	stray.stop(t)
	a.managers[0].start(t)
	b.managers[0].start(t)
	a.eventually(t, backTime, "the mount is back", func() bool {
		got, err := os.ReadFile(filepath.Join(ours.path, "whose"))
		return err == nil && string(got) == ours.path
	})
	a.healed(t)
	b.healed(t)
	if now := b.status(t).Sessions; len(now) != 1 || now[0] != session[0] {
		t.Errorf("sessions of the other cluster are %v, and were %v", now, session)
	}
	if got, err := os.ReadFile(filepath.Join(theirs.path, "whose")); string(got) != theirs.path {
		t.Errorf("the other cluster's mount: %q, %v", got, err)
	}
}

// TestClusterServersOption wants `up --servers` to keep to what the directory has.
func TestClusterServersOption(t *testing.T) {
	i := newInstance(t)
	i.up("--servers", "2", "--size", "64M")
	if err := os.WriteFile(filepath.Join(i.mnt, "file"), []byte("kept"), 0o644); err != nil {
		t.Fatal(err)
	}
	i.down()
	r := sealfs(t, 1, "sealfs", "up", "--data", i.data, "--mount", i.mnt, "--servers", "3")
	if !strings.Contains(r.errOut, "--servers 2, not 3") || !strings.Contains(r.errOut, i.data) {
		t.Errorf("up with another number of stores: %v", r)
	}
	i.up("--servers", "2")
	if b, err := os.ReadFile(filepath.Join(i.mnt, "file")); err != nil || string(b) != "kept" {
		t.Errorf("after a refusal: %q, %v", b, err)
	}
	i.down()
}

// TestClusterFullDisk fills the disk of one of three managers: it stops and says
// why, the others go on, and it comes back when there is room.
func TestClusterFullDisk(t *testing.T) {
	needFull(t)
	if os.Geteuid() != 0 {
		t.Skip("skipped: only root can mount a small tmpfs")
	}
	s := newSite(t, shape{managers: 3, servers: 1, disks: 1, daemons: 1, size: "1G"}, nil)
	poor := s.managers[2]
	if err := os.Mkdir(poor.data(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", poor.data(), "tmpfs", 0, "size=16M"); err != nil {
		t.Skipf("skipped: a tmpfs cannot be mounted here: %v", err)
	}
	s.up(t)
	s.startLoad(choices(t), false)
	filler, err := os.Create(filepath.Join(poor.data(), "filler"))
	if err != nil {
		t.Fatal(err)
	}
	for piece := make([]byte, 4096); err == nil; {
		_, err = filler.Write(piece)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	made := 0
	s.eventually(t, backTime, "the manager notices that its disk is full", func() bool {
		made++
		s.ok(t, "sealfs", "create-volume", "--manager", s.addrs(), fmt.Sprint("volume-", made))
		select {
		case <-poor.ended:
			return true
		default:
			return false
		}
	})
	if out := poor.output(); !strings.Contains(out, "no space left on device") || poor.cmd.ProcessState.Success() {
		t.Errorf("a manager whose disk is full ended with %v:\n%s", poor.cmd.ProcessState, out)
	}
	t.Logf("after %d volumes: %s", made, tail([]byte(poor.output()), 1))
	s.load.advances(t)
	s.ok(t, "sealfs", "create-volume", "--manager", s.addrs(), "volume-more")
	if err := errors.Join(filler.Close(), os.Remove(filler.Name())); err != nil {
		t.Fatal(err)
	}
	poor.start(t)
	s.healed(t)
	// Alone with the one that leads it is the majority, so what it has learned counts.
	other := s.managers[0]
	if s.leader(t) == other {
		other = s.managers[1]
	}
	other.kill(t)
	s.ok(t, "sealfs", "create-volume", "--manager", s.addrs(), "volume-last")
	other.start(t)
	s.healed(t)
	if st := s.status(t); len(st.Volumes) != made+3 {
		t.Errorf("there are %d volumes, want %d", len(st.Volumes), made+3)
	}
	s.finish(t, nil)
}
