package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sealfs/node"
	"sealfs/wire"
)

// needFUSE skips a test that needs real mounts where there can be none.
func needFUSE(t *testing.T) {
	t.Helper()
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("SKIPPED: no mounts on this machine: %v", err)
	}
	f.Close()
}

// site is a data directory and a mount point for a test; what runs there is
// ended with the test.
type site struct{ data, mount string }

func newSite(t *testing.T) site { return newSiteIn(t, "data") }

// newSiteIn is newSite with the data directory at a path of one's own.
func newSiteIn(t *testing.T, data string) site {
	t.Helper()
	dir := t.TempDir()
	s := site{filepath.Join(dir, data), filepath.Join(dir, "mnt")}
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(s.data, "log", "sealfs.log"))
			t.Logf("log:\n%s", log)
		}
		if r := sealfs(t, "down", "--data", s.data, "--timeout", "20s", "--force"); r.code != 0 {
			t.Errorf("clean-up: %s%s", r.out, r.err)
		}
		if r := sealfs(t, "destroy", "--data", s.data, "--yes"); r.code != 0 && !strings.Contains(r.err, "no data directory") && !strings.Contains(r.err, "has no config.yaml") {
			t.Errorf("clean-up: %s%s", r.out, r.err)
		}
	})
	return s
}

func (s site) status(t *testing.T) node.Status {
	t.Helper()
	var st node.Status
	if err := json.Unmarshal([]byte(ok(t, "status", "--data", s.data, "--json")), &st); err != nil {
		t.Fatal(err)
	}
	return st
}

func (s site) up(t *testing.T, more ...string) string {
	t.Helper()
	return ok(t, append([]string{"up", "--data", s.data, "--mount", s.mount}, more...)...)
}

// killAll does what SIGKILL of everything does. It does not wait.
func (s site) killAll(t *testing.T) {
	t.Helper()
	for _, pid := range s.status(t).PIDs {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path, want string) {
	t.Helper()
	if b, err := os.ReadFile(path); err != nil || string(b) != want {
		t.Errorf("%s holds %q, %v, want %q", path, b, err, want)
	}
}

func isMounted(t *testing.T, path string) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Contains(b, []byte(" "+path+" "))
}

// eventually polls a condition that becomes true without our doing.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(20 * time.Second); !cond(); {
		select {
		case <-deadline:
			t.Fatalf("not within 20 s: %s", what)
		case <-tick.C:
		}
	}
}

func TestLife(t *testing.T) {
	needFUSE(t)
	if raceDetector {
		t.Skip("SKIPPED: with the race detector region and staging are on the heap, and die with the process")
	}
	// Longer than the address of a socket may be.
	s := newSiteIn(t, strings.Repeat("long/", 30)+"data")
	out := s.up(t, "--size", "256M")
	st := s.status(t)
	if st.State != node.StateRunning || len(st.PIDs) != 1 || !slices.Equal(st.Mounts, []string{s.mount}) || len(st.Stores) != 1 || len(st.Volumes) != 1 || st.Volumes[0].Name != "main" {
		t.Fatalf("status after up: %+v", st)
	}
	device, region := st.Stores[0].Device, st.Stores[0].Region
	for _, path := range []string{device, region, st.Log, st.Data} {
		if _, err := os.Stat(path); err != nil || !filepath.IsAbs(path) {
			t.Errorf("%s: %v", path, err)
		}
		if path != st.Data && !strings.Contains(out, path) {
			t.Errorf("up does not print %s:\n%s", path, out)
		}
	}
	if st.Stores[0].Allocated > 64<<20 {
		t.Errorf("a new store of 256M takes up %d bytes", st.Stores[0].Allocated)
	}
	fi, err := os.Stat(s.mount)
	if err != nil || fi.Mode() != fs.ModeDir|0o755 || int(fi.Sys().(*syscall.Stat_t).Uid) != os.Getuid() {
		t.Errorf("root directory: %v, %v", fi, err)
	}
	if entries, err := os.ReadDir(s.mount); err != nil || len(entries) != 0 {
		t.Errorf("a new root holds %v, %v", entries, err)
	}
	write(t, s.mount+"/first", "one")
	if out := ok(t, "status", "--data", s.data); !strings.HasPrefix(out, "running\n") || !strings.Contains(out, device) {
		t.Errorf("status for people:\n%s", out)
	}
	pid := fmt.Sprint(st.PIDs[0])
	refused(t, []string{s.data, "process " + pid}, "up", "--data", s.data, "--mount", s.mount+"2")
	refused(t, []string{"process " + pid}, "destroy", "--data", s.data, "--yes")

	// A further volume, in a process of its own.
	ok(t, "create-volume", "--data", s.data, "photos", "64M")
	refused(t, []string{"photos", "already"}, "create", "--data", s.data, "photos")
	refused(t, []string{"no volume \"fotos\"", "photos"}, "mount", "--data", s.data, "fotos", s.mount+"2")
	second := s.mount + "2"
	ok(t, "mount", "--data", s.data, "photos", second)
	write(t, second+"/second", "two")
	st = s.status(t)
	if len(st.PIDs) != 2 || !slices.Contains(st.Mounts, second) || len(st.Volumes) != 2 {
		t.Errorf("status with two mounts: %+v", st)
	}
	refused(t, []string{"photos", second, "unmount"}, "delete-volume", "--data", s.data, "photos", "--yes")
	if out := ok(t, "list-volumes", "--data", s.data); !strings.Contains(out, "photos") || !strings.Contains(out, "64M") {
		t.Errorf("list-volumes:\n%s", out)
	}
	var loc node.Location
	if err := json.Unmarshal([]byte(ok(t, "locate", "--data", s.data, "--json", second+"/second")), &loc); err != nil || len(loc.Replicas) != 1 || loc.Replicas[0].Device != device || loc.Volume != "photos" {
		t.Errorf("locate: %+v, %v", loc, err)
	}
	refused(t, []string{"not in a mount"}, "locate", "--data", s.data, s.data)
	if out := ok(t, "list-servers", "--data", s.data); !strings.Contains(out, st.Stores[0].ID.String()) {
		t.Errorf("list-servers:\n%s", out)
	}

	// SIGKILL of everything, and at once up again.
	for i := range 3 {
		write(t, s.mount+"/killed", fmt.Sprint(i))
		s.killAll(t)
		s.up(t)
		read(t, s.mount+"/killed", fmt.Sprint(i))
		if isMounted(t, second) {
			t.Error("up left a stale mount")
		}
		ok(t, "mount", "--data", s.data, "photos", second)
		read(t, second+"/second", "two")
	}
	// A killed main process takes its further mounts along.
	main := s.status(t).Processes
	i := slices.IndexFunc(main, func(p node.Process) bool { return p.Role == node.RoleMain })
	if err := syscall.Kill(main[i].PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the further mount ends", func() bool { return len(s.status(t).PIDs) == 0 })
	st = s.status(t)
	if st.State != node.StateDown || !slices.Equal(st.Stale, []string{s.mount}) || len(st.Volumes) != 2 || st.Stores[0].Device != device {
		t.Errorf("status after SIGKILL: %+v", st)
	}
	ok(t, "down", "--data", s.data)
	if isMounted(t, s.mount) || isMounted(t, second) {
		t.Error("down left a stale mount")
	}

	// What was not flushed when a further mount is told to end is not lost.
	s.up(t, "--size", "256M")
	ok(t, "mount", "--data", s.data, "photos", second)
	f, err := os.Create(second + "/open")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("three"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if out := ok(t, "down", "--data", s.data); strings.Count(out, "ended process") != 2 {
		t.Errorf("down:\n%s", out)
	}
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("down took %v", d)
	}
	if isMounted(t, s.mount) || isMounted(t, second) {
		t.Error("down left a mount")
	}
	if st := s.status(t); st.State != node.StateDown || len(st.PIDs) != 0 {
		t.Errorf("status after down: %+v", st)
	}
	if _, err := os.Stat(st.Stores[0].Staging); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a clean end left %s: %v", st.Stores[0].Staging, err)
	}
	s.up(t)
	ok(t, "mount", "--data", s.data, "-o", "ro", "photos", second)
	read(t, second+"/open", "three")
	read(t, s.mount+"/first", "one")
	if err := os.WriteFile(second+"/no", nil, 0o644); !errors.Is(err, syscall.EROFS) {
		t.Errorf("write to a read-only mount: %v", err)
	}
	ok(t, "umount", second)
	eventually(t, "the process of the mount ends", func() bool { return len(s.status(t).PIDs) == 1 })
	ok(t, "delete-volume", "--data", s.data, "photos", "--yes")
	if st := s.status(t); len(st.Volumes) != 1 {
		t.Errorf("volumes after the deletion: %+v", st.Volumes)
	}
}

// TestRefusals: each mistake gets one sentence, and nothing is changed by it.
func TestRefusals(t *testing.T) {
	needFUSE(t)
	for name, c := range map[string]struct {
		prepare func(t *testing.T, s, other site)
		args    []string
		words   []string
	}{
		"other size":      {nil, []string{"--size", "128M"}, []string{"--size 64M", "128M"}},
		"other device":    {nil, []string{"--device", "/dev/null"}, []string{"--device", "/dev/null"}},
		"no such option":  {nil, []string{"-o", "wibble"}, []string{`"wibble"`}},
		"bad durability":  {nil, []string{"--durability", "maybe"}, []string{"--durability", `"maybe"`}},
		"not empty mount": {func(t *testing.T, s, _ site) { write(t, s.mount+"/letter", "") }, nil, []string{"/mnt", "not empty", `"letter"`}},
		"file as mount": {func(t *testing.T, s, _ site) {
			if err := os.Remove(s.mount); err != nil {
				t.Fatal(err)
			}
			write(t, s.mount, "")
		}, nil, []string{"/mnt", "not a directory"}},
		"unknown key": {func(t *testing.T, s, _ site) {
			edit(t, s.data+"/config.yaml", func(b []byte) []byte { return append([]byte("flavour: sweet\n"), b...) })
		}, nil, []string{"config.yaml", "line 1", `"flavour"`}},
		"other version": {func(t *testing.T, s, _ site) {
			edit(t, s.data+"/config.yaml", func(b []byte) []byte { return bytes.Replace(b, []byte("version: 1"), []byte("version: 9"), 1) })
		}, nil, []string{"config.yaml", "version 9"}},
		"truncated image": {func(t *testing.T, s, _ site) {
			if err := os.Truncate(s.data+"/stores/0/device.img", 1<<20); err != nil {
				t.Fatal(err)
			}
		}, nil, []string{"device.img", "truncated", "restore"}},
		"damaged superblocks": {func(t *testing.T, s, _ site) {
			edit(t, s.data+"/stores/0/device.img", func(b []byte) []byte { clear(b[:8192]); return b })
		}, nil, []string{"device.img", "sealfs-fsck"}},
		"other region": {func(t *testing.T, s, other site) {
			b, err := os.ReadFile(other.data + "/stores/0/region")
			if err != nil {
				t.Fatal(err)
			}
			edit(t, s.data+"/stores/0/region", func([]byte) []byte { return b })
		}, nil, []string{"/region", "belongs to store"}},
		"other image": {func(t *testing.T, s, other site) {
			if err := os.Rename(other.data+"/stores/0/device.img", s.data+"/stores/0/device.img"); err != nil {
				t.Fatal(err)
			}
		}, nil, []string{"device.img", "another data directory"}},
		"wrong cluster": {func(t *testing.T, s, other site) {
			if err := os.RemoveAll(s.data + "/manager"); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(other.data+"/manager", s.data+"/manager"); err != nil {
				t.Fatal(err)
			}
		}, nil, []string{"manager", "cluster"}},
		"damaged manager": {func(t *testing.T, s, _ site) {
			edit(t, s.data+"/manager/raft.db", func(b []byte) []byte { clear(b); return b })
		}, nil, []string{"manager", "raft.db"}},
		"lost configuration": {func(t *testing.T, s, _ site) {
			if err := os.Remove(s.data + "/config.yaml"); err != nil {
				t.Fatal(err)
			}
		}, nil, []string{"config.yaml", "restore"}},
	} {
		t.Run(name, func(t *testing.T) {
			s, other := newSite(t), newSite(t)
			for _, s := range []site{s, other} {
				s.up(t, "--size", "64M")
				ok(t, "down", "--data", s.data)
			}
			if c.prepare != nil {
				c.prepare(t, s, other)
			}
			before := fingerprint(t, s.data)
			refused(t, c.words, append([]string{"up", "--data", s.data, "--mount", s.mount}, c.args...)...)
			if after := fingerprint(t, s.data); after != before {
				t.Errorf("a refused start changed\n%s into\n%s", before, after)
			}
			if isMounted(t, s.mount) {
				t.Error("mounted all the same")
			}
			if r := sealfs(t, "status", "--data", s.data); r.code == 0 && !strings.HasPrefix(r.out, "down\n") && !strings.HasPrefix(r.out, "empty\n") {
				t.Errorf("status after a refused start:\n%s", r.out)
			}
			os.RemoveAll(s.data + "/config.yaml") // so that clean-up does not judge it
		})
	}
}

func edit(t *testing.T, path string, f func([]byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, f(b), 0o600); err != nil {
		t.Fatal(err)
	}
}

// fingerprint describes what must not change: the stores and the configuration.
func fingerprint(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	for _, name := range []string{"config.yaml", "stores/0/device.img", "stores/0/region"} {
		fi, err := os.Stat(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(&b, name, fi.Size(), fi.ModTime())
	}
	return b.String()
}

func TestBusyAndForeign(t *testing.T) {
	needFUSE(t)
	s, other := newSite(t), newSite(t)
	s.up(t, "--size", "64M")
	// Another instance at the same mount point.
	refused(t, []string{s.mount, "busy", "sealfs:main"}, "up", "--data", other.data, "--mount", s.mount, "--size", "64M")
	refused(t, []string{s.mount, "busy"}, "mount", "--data", s.data, "main", s.mount)
	if st := other.status(t); st.State != node.StateEmpty {
		t.Errorf("a refused start left state %s", st.State)
	}
	// A directory of somebody else.
	if err := os.MkdirAll(other.data, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(other.data); err != nil {
		t.Fatal(err)
	}
	write(t, mkdir(t, other.data)+"/thesis.tex", "")
	refused(t, []string{other.data, "thesis.tex"}, "up", "--data", other.data, "--mount", other.mount)
	refused(t, []string{other.data, "nothing was removed"}, "destroy", "--data", other.data, "--yes")
	if entries, err := os.ReadDir(other.data); err != nil || len(entries) != 1 {
		t.Errorf("the foreign directory holds %v, %v", entries, err)
	}
	refused(t, []string{"too few"}, "up", "--data", mkdir(t, other.data+"2"), "--mount", other.mount, "--size", "64K")
	// A copy must not be served beside the original.
	if out, err := exec.Command("cp", "-a", s.data, other.data+"3").CombinedOutput(); err != nil {
		t.Fatal(err, string(out))
	}
	refused(t, []string{"copy of this data directory"}, "up", "--data", other.data+"3", "--mount", other.mount)
	// Somebody is in the mount: it is detached.
	f, err := os.Create(s.mount + "/open")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	refused(t, []string{s.mount, "in use", "--lazy"}, "umount", s.mount)
	refused(t, []string{"nothing is mounted"}, "umount", other.mount)
	ok(t, "down", "--data", s.data)
	if isMounted(t, s.mount) {
		t.Error("still mounted")
	}
	if _, err := f.WriteString("x"); err == nil {
		t.Error("a write to what is down succeeded")
	}
}

func mkdir(t *testing.T, path string) string {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestForeground(t *testing.T) {
	needFUSE(t)
	s := newSite(t)
	cmd := exec.Command(os.Args[0], "up", "--data", s.data, "--mount", s.mount, "--size", "64M", "--foreground")
	cmd.Env = environment()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it runs", func() bool { return s.status(t).State == node.StateRunning && isMounted(t, s.mount) })
	write(t, s.mount+"/x", "y")
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("it ended with %v\n%s", err, out.String())
	}
	if isMounted(t, s.mount) || !strings.HasPrefix(out.String(), "running: "+s.data) {
		t.Errorf("still mounted, or it printed\n%s", out.String())
	}
}

// TestWithoutMount: everything but the mount works without FUSE.
func TestWithoutMount(t *testing.T) {
	s := newSite(t)
	dir := filepath.Dir(s.data)
	image, region := dir+"/disk.img", dir+"/disk.region"
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 64<<20); err != nil {
		t.Fatal(err)
	}
	ok(t, "up", "--data", s.data, "--device", image, "--region", region)
	st := s.status(t)
	if st.State != node.StateRunning || st.Stores[0].Device != image || st.Stores[0].Region != region || st.Stores[0].Size != 64<<20 || len(st.Mounts) != 0 {
		t.Errorf("status: %+v", st)
	}
	conn, err := wire.Dial(t.Context(), "unix", filepath.Join(s.data, "run", "data.sock"), wire.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if conn.Protocol() != wire.ProtocolVersion || conn.Cluster() != st.Cluster {
		t.Errorf("the socket speaks protocol %d for cluster %s", conn.Protocol(), conn.Cluster())
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	ok(t, "create-volume", "--data", s.data, "v", "1G")
	if raceDetector {
		ok(t, "down", "--data", s.data)
	} else {
		s.killAll(t)
	}
	ok(t, "up", "--data", s.data)
	if st := s.status(t); len(st.Volumes) != 2 {
		t.Errorf("volumes: %+v", st.Volumes)
	}
	ok(t, "down", "--data", s.data)
	// The device is somebody's now.
	refused(t, []string{image, "sealfs"}, "up", "--data", s.data+"2", "--device", image)
	ok(t, "destroy", "--data", s.data, "--yes")
	if _, err := os.Stat(image); err != nil {
		t.Errorf("destroy removed what it did not make: %v", err)
	}
}

// TestBackgroundDies: a process that ends before it is ready is an error, with
// what it said.
func TestBackgroundDies(t *testing.T) {
	t.Setenv("SEALFS_TEST_MAIN", "1")
	if _, err := node.Background(t.Context(), []string{"frobnicate"}); err == nil || !strings.Contains(err.Error(), "before it was ready (exit status 2)") || !strings.Contains(err.Error(), `no command "frobnicate"`) {
		t.Errorf("a process that fails: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s := newSite(t)
	if _, err := node.Background(ctx, []string{"up", "--foreground", "--data", s.data, "--size", "64M"}); err == nil {
		t.Error("cancelled, but ready")
	}
	// Whatever it had come to, it has ended.
	if st := s.status(t); len(st.PIDs) != 0 {
		t.Errorf("it still runs: %+v", st)
	}
}
