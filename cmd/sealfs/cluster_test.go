package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"sealfs/cluster"
	"sealfs/internal/metrics"
	"sealfs/node"
	"sealfs/wire"
)

// devSite is a cluster for a test; it is ended and removed with the test.
type devSite struct {
	dir      string
	Managers []string
	Servers  []string
}

func newDevSite(t *testing.T, flags ...string) *devSite {
	t.Helper()
	s := &devSite{dir: filepath.Join(t.TempDir(), "c")}
	t.Cleanup(func() {
		if t.Failed() {
			logs, _ := filepath.Glob(s.dir + "/*/log/*.log")
			for _, path := range logs {
				log, _ := os.ReadFile(path)
				t.Logf("%s:\n%s", path, log)
			}
		}
		ok(t, "dev-cluster", "down", "--dir", s.dir, "--remove")
		if entries, err := os.ReadDir(s.dir); err == nil {
			t.Errorf("down --remove left %v", entries)
		}
	})
	s.up(t, flags...)
	return s
}

// up starts what does not run.
func (s *devSite) up(t *testing.T, flags ...string) {
	t.Helper()
	out := ok(t, append([]string{"dev-cluster", "up", "--dir", s.dir, "--json"}, flags...)...)
	if err := json.Unmarshal([]byte(out), s); err != nil {
		t.Fatal(err)
	}
}

func (s *devSite) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

func (s *devSite) managers() string { return strings.Join(s.Managers, ",") }

func (s *devSite) status(t *testing.T) (st node.ClusterStatus) {
	t.Helper()
	if err := json.Unmarshal([]byte(ok(t, "status", "--manager", s.managers(), "--json")), &st); err != nil {
		t.Fatal(err)
	}
	return st
}

func (s *devSite) mounts(t *testing.T) (list []node.MountStatus) {
	t.Helper()
	if err := json.Unmarshal([]byte(ok(t, "list-mountpoints", "--daemon", s.path("daemon"), "--json")), &list); err != nil {
		t.Fatal(err)
	}
	return list
}

// kill does what SIGKILL of a process does, and waits for its end.
func kill(t *testing.T, data, role string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(data, "run", role+".lock"))
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(string(text), &pid); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	d, err := node.OpenDir(data)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "a killed process is gone", func() bool { return !d.Runs(role) })
}

// ask asks the admin socket of a process.
func ask(t *testing.T, data, role, path string) (code int, body []byte) {
	t.Helper()
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return wire.DialUnix(ctx, filepath.Join(data, "run", role+".sock"))
	}}}
	defer c.CloseIdleConnections()
	r, err := c.Get("http://sealfs" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if body, err = io.ReadAll(r.Body); err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, body
}

// noSurvivors skips a test that kills servers where their regions die with them.
func noSurvivors(t *testing.T) {
	t.Helper()
	if raceDetector {
		t.Skip("SKIPPED: with the race detector region and staging are on the heap, and die with the process")
	}
}

// TestCluster: a cluster of processes, and SIGKILL of each kind of them.
func TestCluster(t *testing.T) {
	needFUSE(t)
	noSurvivors(t)
	s := newDevSite(t, "--managers", "1", "--servers", "2", "--disks", "2", "--size", "64M")
	one, two := s.path("mnt1"), s.path("mnt2")
	for i := range 40 {
		dir := filepath.Join(one, fmt.Sprintf("d%d", i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, dir+"/f", fmt.Sprint(i))
	}
	check := func() {
		t.Helper()
		for i := range 40 {
			read(t, filepath.Join(two, fmt.Sprintf("d%d/f", i)), fmt.Sprint(i))
		}
	}
	check()
	st := s.status(t)
	if st.State != node.StateRunning || len(st.Managers) != 1 || len(st.Stores) != 4 || len(st.Sessions) != 2 || len(st.Volumes) != 1 {
		t.Errorf("status: %+v", st)
	}
	for _, x := range st.Stores {
		if x.Primary == 0 || x.State != cluster.StoreUp {
			t.Errorf("store %+v", x)
		}
	}
	var loc node.Location
	if err := json.Unmarshal([]byte(ok(t, "locate", "--daemon", s.path("daemon"), "--json", one+"/d1/f")), &loc); err != nil || loc.Volume != "main" || len(loc.Replicas) != 1 || !slices.Contains(s.Servers, loc.Replicas[0].Addr) {
		t.Errorf("locate: %+v, %v", loc, err)
	}
	if out := ok(t, "locate", "--daemon", s.path("daemon"), one); !strings.Contains(out, "volume main") {
		t.Errorf("locate of the root: %s", out)
	}
	// Across servers and back.
	if err := os.Rename(one+"/d1/f", one+"/d2/g"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(one+"/d2/g", one+"/d1/f"); err != nil {
		t.Fatal(err)
	}
	if m := s.mounts(t); len(m) != 2 || m[0].State != node.MountActive || len(m[0].Servers) != 2 {
		t.Errorf("mounts: %+v", m)
	}
	if out := ok(t, "probe", "--daemon", s.path("daemon"), one); !strings.HasPrefix(out, "alive\n") || !strings.Contains(out, s.Servers[0]+" is up") {
		t.Errorf("probe: %s", out)
	}
	refused(t, []string{"main", "mnt1", "unmount"}, "delete-volume", "--manager", s.managers(), "main", "--yes")
	refused(t, []string{one, "busy"}, "mount", "--manager", s.managers(), "--daemon", s.path("daemon"), "-o", "ro", "main", one)

	// Files are served while no manager lives.
	kill(t, s.path("manager1"), node.RoleManager)
	check()
	write(t, one+"/without-manager", "yes")
	read(t, two+"/without-manager", "yes")
	if out := ok(t, "status", "--manager", s.managers()); !strings.HasPrefix(out, node.StateUnavailable+"\n") {
		t.Errorf("status without a manager: %s", out)
	}
	s.up(t)

	// A call waits for a server that is away.
	kill(t, s.path("server1"), node.RoleServer)
	kill(t, s.path("server2"), node.RoleServer)
	waited := make(chan error, 1)
	go func() { waited <- os.WriteFile(one+"/waits", []byte("yes"), 0o644) }()
	s.up(t)
	if err := <-waited; err != nil {
		t.Errorf("a write while the servers were away: %v", err)
	}
	read(t, two+"/waits", "yes")
	check()

	// A killed daemon's mounts are stale until the next one comes.
	old := s.mounts(t)
	kill(t, s.path("daemon"), node.RoleDaemon)
	if _, err := os.ReadDir(one); !errors.Is(err, syscall.ENOTCONN) && !errors.Is(err, syscall.ECONNABORTED) {
		t.Errorf("a mount whose daemon was killed: %v", err)
	}
	if r := sealfs(t, "probe", "--daemon", s.path("daemon"), one); r.code != 1 || !strings.HasPrefix(r.out, "dead\n") {
		t.Errorf("probe of a stale mount: %+v", r)
	}
	ok(t, "daemon", "--data", s.path("daemon"))
	check()
	for i, m := range s.mounts(t) {
		if m.State != node.MountActive || m.Session <= old[i].Session {
			t.Errorf("mounted again: %+v", m)
		}
	}
	if st := s.status(t); len(st.Sessions) != 2 {
		t.Errorf("the old sessions live: %+v", st.Sessions)
	}

	ok(t, "umount", "--daemon", s.path("daemon"), two)
	if isMounted(t, two) || len(s.mounts(t)) != 1 {
		t.Error("still mounted")
	}
	// By somebody who does not ask the daemon.
	if out, err := exec.Command("umount", one).CombinedOutput(); err != nil {
		t.Fatal(err, string(out))
	}
	eventually(t, "the daemon notices", func() bool { return len(s.mounts(t)) == 0 })
	eventually(t, "sessions end", func() bool { return len(s.status(t).Sessions) == 0 })
	ok(t, "delete-volume", "--manager", s.managers(), "main", "--yes")
	if out := ok(t, "list-volumes", "--manager", s.managers()); strings.Contains(out, "main") {
		t.Errorf("volumes: %s", out)
	}
}

// TestLazyUmount: what is open on a mount that was detached stays usable, and the
// mount point is free.
func TestLazyUmount(t *testing.T) {
	needFUSE(t)
	s := newDevSite(t, "--managers", "1", "--servers", "1", "--disks", "1", "--mounts", "1", "--size", "64M")
	point := s.path("mnt1")
	f, err := os.Create(point + "/open")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	refused(t, []string{point, "in use", "--lazy"}, "umount", "--daemon", s.path("daemon"), point)
	ok(t, "umount", "--daemon", s.path("daemon"), "--lazy", point)
	if isMounted(t, point) {
		t.Error("still mounted")
	}
	ok(t, "mount", "--manager", s.managers(), "--daemon", s.path("daemon"), "main", point)
	if _, err := f.WriteString("late"); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	read(t, point+"/open", "late")
	eventually(t, "the first session ends", func() bool { return len(s.status(t).Sessions) == 1 })
}

// TestSessionEnds: a mount whose session has ended gets another one. What was open
// fails with EIO, since it is no longer held; everything else works.
func TestSessionEnds(t *testing.T) {
	needFUSE(t)
	s := newDevSite(t, "--managers", "1", "--servers", "2", "--disks", "1", "--mounts", "1", "--size", "64M")
	point := s.path("mnt1")
	f, err := os.Create(point + "/open")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	old := s.mounts(t)[0].Session
	r := cluster.NewRemote(s.Managers, cluster.RemoteOptions{})
	defer r.Close()
	if err := r.EndSession(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	i := 0
	eventually(t, "the mount has another session", func() bool {
		// Whoever asks a server learns that the session has ended.
		i++
		if err := os.Mkdir(fmt.Sprintf("%s/d%d", point, i), 0o755); err != nil {
			t.Fatal(err)
		}
		return s.mounts(t)[0].Session > old
	})
	_, err = f.WriteString("lost")
	if err == nil {
		err = f.Sync()
	}
	if !errors.Is(err, syscall.EIO) {
		t.Errorf("a write to what was open: %v", err)
	}
	for ; i > 0; i-- {
		write(t, fmt.Sprintf("%s/d%d/f", point, i), "new")
		read(t, fmt.Sprintf("%s/d%d/f", point, i), "new")
	}
	if st := s.status(t); len(st.Sessions) != 1 || st.Sessions[0].ID <= old {
		t.Errorf("sessions: %+v", st.Sessions)
	}
}

// TestMountHelper: what mount(8) calls.
func TestMountHelper(t *testing.T) {
	needFUSE(t)
	s := newDevSite(t, "--managers", "1", "--servers", "1", "--disks", "1", "--mounts", "0", "--size", "64M")
	program := filepath.Join(t.TempDir(), "mount.sealfs")
	if err := os.Symlink(os.Args[0], program); err != nil {
		t.Fatal(err)
	}
	helper := func(argv0 string, args ...string) result {
		cmd := exec.Command(program, args...)
		cmd.Args[0] = argv0
		cmd.Env = append(environment(), "SEALFS_DAEMON="+s.path("daemon"))
		var out, err bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &err
		if e := cmd.Run(); e != nil && cmd.ProcessState == nil {
			t.Fatal(e)
		}
		return result{out.String(), err.String(), cmd.ProcessState.ExitCode()}
	}
	spec, point := s.managers()+":/main", s.path("point")
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{spec}, mountUsage, "MOUNTPOINT"},
		{[]string{"main", point}, mountUsage, "is not MANAGER"},
		{[]string{s.managers() + ":/a/b", point}, mountUsage, "is not MANAGER"},
		{[]string{spec, point, "-o", "wibble"}, mountFailed, "wibble"},
		{[]string{s.managers() + ":/nope", point}, mountFailed, `no volume "nope"`},
		{[]string{spec, point, "-f"}, 0, ""},
	} {
		if r := helper(program, c.args...); r.code != c.code || !strings.Contains(r.err, c.says) || isMounted(t, point) {
			t.Errorf("%q: %+v", c.args, r)
		}
	}
	if r := helper(program, spec, point, "-n", "-o", "rw,noatime,_netdev,timeout=9", "-t", "sealfs"); r.code != 0 || !isMounted(t, point) {
		t.Errorf("mount -t sealfs: %+v", r)
	}
	write(t, point+"/x", "y")
	if r := helper("/sbin/sealfs", spec, point+"2", "-o", "ro"); r.code != 0 || !isMounted(t, point+"2") {
		t.Errorf("by way of mount.fuse: %+v", r)
	}
	read(t, point+"2/x", "y")
	for _, p := range []string{point, point + "2"} {
		ok(t, "umount", "--daemon", s.path("daemon"), p)
		if err := os.Remove(p); err != nil {
			t.Error(err)
		}
	}
}

// TestStrangers: a daemon that starts again takes no other cluster for the one that
// it had mounted from, whoever listens at the managers' address by then.
func TestStrangers(t *testing.T) {
	needFUSE(t)
	s := newDevSite(t, "--managers", "1", "--servers", "1", "--disks", "1", "--mounts", "1", "--size", "64M")
	point := s.path("mnt1")
	write(t, point+"/whose", "ours")
	own := s.status(t).Cluster
	kill(t, s.path("daemon"), node.RoleDaemon)
	ok(t, "down", "--data", s.path("manager1"))
	other := newRole(t)
	ok(t, "manager", "--data", other, "--listen", s.Managers[0], "--bootstrap", "--background")
	r := cluster.NewRemote(s.Managers, cluster.RemoteOptions{})
	defer r.Close()
	stranger, err := r.OpenSession(t.Context(), cluster.SessionInfo{Volume: "main", Host: "elsewhere"})
	if err != nil {
		t.Fatal(err)
	}
	ok(t, "daemon", "--data", s.path("daemon"))
	m := s.mounts(t)[0]
	if m.State != node.MountWaiting || !strings.Contains(m.Reason, own.String()) || !strings.Contains(m.Reason, s.Managers[0]) || m.Cluster != own || isMounted(t, point) {
		t.Errorf("managers of another cluster: %+v", m)
	}
	// So does the next one: that it waits is remembered as well.
	ok(t, "down", "--data", s.path("daemon"))
	ok(t, "daemon", "--data", s.path("daemon"))
	if m := s.mounts(t)[0]; m.State != node.MountWaiting || m.Cluster != own {
		t.Errorf("managers of another cluster, after a clean end: %+v", m)
	}
	if list, err := r.Sessions(t.Context()); err != nil || len(list) != 1 || list[0].ID != stranger.ID {
		t.Errorf("sessions of the other cluster: %+v, %v", list, err)
	}
	ok(t, "down", "--data", other)
	s.up(t)
	eventually(t, "it is mounted again", func() bool { return s.mounts(t)[0].State == node.MountActive })
	read(t, point+"/whose", "ours")
	if st := s.status(t); len(st.Sessions) != 1 {
		t.Errorf("sessions: %+v", st.Sessions)
	}
}

// free returns addresses that nobody listens at.
func free(t *testing.T, n int) (addrs []string) {
	t.Helper()
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		addrs = append(addrs, l.Addr().String())
	}
	return addrs
}

// newRole returns a data directory for a role, on which nothing runs after the test.
func newRole(t *testing.T) string {
	t.Helper()
	data := filepath.Join(t.TempDir(), "data")
	t.Cleanup(func() { ok(t, "down", "--data", data, "--force") })
	return data
}

// TestManagers: three managers, of which some are lost.
func TestManagers(t *testing.T) {
	addrs := free(t, 3)
	dirs := []string{newRole(t), newRole(t), newRole(t)}
	all := strings.Join(addrs, ",")
	refused(t, []string{dirs[0], "--bootstrap", "--join"}, "manager", "--data", dirs[0], "--listen", addrs[0])
	refused(t, []string{"--insecure-listen", "authentication"}, "manager", "--data", dirs[0], "--listen", "0.0.0.0:0", "--bootstrap")
	refused(t, []string{"--shards", `"3"`}, "manager", "--data", dirs[0], "--listen", addrs[0], "--bootstrap", "--shards", "3")
	out := ok(t, "manager", "--data", dirs[0], "--listen", addrs[0], "--bootstrap", "--name", "test", "--shards", "64", "--background")
	if !strings.Contains(out, addrs[0]) || !strings.Contains(out, dirs[0]) {
		t.Errorf("it prints %s", out)
	}
	refused(t, []string{dirs[0], "in use"}, "manager", "--data", dirs[0], "--listen", "127.0.0.1:0")
	refused(t, []string{addrs[0], "another process"}, "manager", "--data", dirs[1], "--listen", addrs[0], "--bootstrap")
	for i := 1; i < 3; i++ {
		ok(t, "manager", "--data", dirs[i], "--listen", addrs[i], "--join", addrs[0], "--background")
	}
	managers := func() (list []cluster.ManagerInfo) {
		t.Helper()
		if err := json.Unmarshal([]byte(ok(t, "list-managers", "--manager", all, "--json")), &list); err != nil {
			t.Fatal(err)
		}
		return list
	}
	if list := managers(); len(list) != 3 || !list[0].Leader || !list[2].Voter {
		t.Errorf("managers: %+v", list)
	}
	refused(t, []string{"no disk", "sealfs server"}, "create-volume", "--manager", all, "v")
	if out := ok(t, "status", "--manager", all); !strings.HasPrefix(out, "running\n") || !strings.Contains(out, "test") || !strings.Contains(out, "64 shards") {
		t.Errorf("status: %s", out)
	}
	if out := ok(t, "status", "--data", dirs[1]); !strings.HasPrefix(out, "running\n") || !strings.Contains(out, addrs[1]) {
		t.Errorf("status of a directory: %s", out)
	}
	if code, body := ask(t, dirs[0], node.RoleManager, "/v1/health"); code != 200 || !bytes.Contains(body, []byte(`"ok":true`)) {
		t.Errorf("health: %d %s", code, body)
	}
	if _, body := ask(t, dirs[0], node.RoleManager, "/metrics"); metrics.Lint(body) != nil || !bytes.Contains(body, []byte("\nsealfs_manager_leading 1\n")) {
		t.Errorf("metrics: %v\n%s", metrics.Lint(body), body)
	}
	if code, _ := ask(t, dirs[0], node.RoleManager, "/debug/pprof/goroutine?debug=1"); code != 200 {
		t.Errorf("pprof: %d", code)
	}

	// One is replaced.
	refused(t, []string{"127.0.0.1:1", "list-managers"}, "remove-manager", "--manager", all, "127.0.0.1:1")
	ok(t, "down", "--data", dirs[2])
	ok(t, "remove-manager", "--manager", all, addrs[2])
	if list := managers(); len(list) != 2 {
		t.Errorf("managers: %+v", list)
	}
	third := newRole(t)
	ok(t, "manager", "--data", third, "--listen", addrs[2], "--join", addrs[0]+","+addrs[1], "--background")
	if list := managers(); len(list) != 3 {
		t.Errorf("managers: %+v", list)
	}

	// Two are lost for good.
	kill(t, dirs[0], node.RoleManager)
	kill(t, third, node.RoleManager)
	if code, body := ask(t, dirs[1], node.RoleManager, "/v1/health"); code == 200 && bytes.Contains(body, []byte("no manager leads")) {
		t.Errorf("health without a majority: %d %s", code, body)
	}
	refused(t, []string{dirs[1], "in use"}, "manager", "recover", "--data", dirs[1], "--listen", addrs[1], "--yes")
	ok(t, "down", "--data", dirs[1])
	refused(t, []string{"--yes"}, "manager", "recover", "--data", dirs[1])
	refused(t, []string{"no manager"}, "manager", "recover", "--data", dirs[1]+"x", "--yes")
	ok(t, "manager", "recover", "--data", dirs[1], "--listen", addrs[1], "--yes")
	ok(t, "manager", "--data", dirs[1], "--listen", addrs[1], "--background")
	all = addrs[1]
	if list := managers(); len(list) != 1 || !list[0].Leader {
		t.Errorf("managers: %+v", list)
	}
}
