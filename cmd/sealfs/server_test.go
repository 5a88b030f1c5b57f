package main

import (
	"bytes"
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

	"sealfs/internal/metrics"
	"sealfs/node"
)

// TestServerRole: disks are found, made, refused, added and removed.
func TestServerRole(t *testing.T) {
	addrs := free(t, 2)
	m := newRole(t)
	ok(t, "manager", "--data", m, "--listen", addrs[0], "--bootstrap", "--background")
	data, dir := newRole(t), t.TempDir()
	image := dir + "/a.img"
	start := []string{"server", "--data", data, "--manager", addrs[0], "--listen", addrs[1], "--background"}
	refused(t, []string{"--manager"}, "server", "--data", data)
	refused(t, []string{"no disk", "--disk"}, start...)
	refused(t, []string{image, "size="}, append(start, "--disk", image)...)
	refused(t, []string{"--disk", `"colour=red"`}, append(start, "--disk", image+",colour=red")...)
	refused(t, []string{"--insecure-listen"}, append(start, "--disk", image+",size=64M", "--advertise", "10.0.0.1:8085")...)
	ok(t, append(start, "--disk", image+",size=64M")...)
	disks := func() (list []node.DiskStatus) {
		t.Helper()
		if err := json.Unmarshal([]byte(ok(t, "disk", "list", "--data", data, "--json")), &list); err != nil {
			t.Fatal(err)
		}
		return list
	}
	if l := disks(); len(l) != 1 || l[0].Device != image || l[0].State != "up" || l[0].Size != 64<<20 || l[0].Shards == 0 {
		t.Errorf("disks: %+v", l)
	}
	if out := ok(t, "create-volume", "--manager", addrs[0], "v", "1G"); !strings.Contains(out, "--manager "+addrs[0]) {
		t.Errorf("create-volume: %s", out)
	}
	refused(t, []string{`"v"`, "already"}, "create-volume", "--manager", addrs[0], "v")
	if _, body := ask(t, data, node.RoleServer, "/metrics"); metrics.Lint(body) != nil || !bytes.Contains(body, []byte("sealfs_store_live_bytes{")) || !bytes.Contains(body, []byte(`role="peer"`)) {
		t.Errorf("metrics: %v\n%s", metrics.Lint(body), body)
	}

	// Another disk, which gets no shards, since the volume was there before.
	ok(t, "disk", "add", "--data", data, dir+"/b.img,size=64M")
	refused(t, []string{dir + "/b.img", "size=128M"}, "disk", "add", "--data", data, dir+"/b.img,size=128M")
	if l := disks(); len(l) != 2 || l[1].State != "up" || l[1].Shards != 0 {
		t.Errorf("disks: %+v", l)
	}
	ok(t, "disk", "bad", "--data", data, dir+"/b.img")
	eventually(t, "the disk is bad", func() bool { return disks()[1].Bad })
	ok(t, "disk", "good", "--data", data, disks()[1].ID.String())
	eventually(t, "the disk is good", func() bool { return !disks()[1].Bad })
	refused(t, []string{image, "cannot be moved"}, "disk", "drain", "--data", data, image)
	refused(t, []string{image, "cannot be removed"}, "disk", "remove", "--data", data, image)
	refused(t, []string{"no disk", image}, "disk", "remove", "--data", data, "/dev/nope")
	ok(t, "disk", "drain", "--data", data, dir+"/b.img")
	ok(t, "disk", "remove", "--data", data, dir+"/b.img")
	if l := disks(); len(l) != 1 {
		t.Errorf("disks: %+v", l)
	}

	// It is refused from now on, and not remembered for that.
	for range 2 {
		refused(t, []string{dir + "/b.img", "for ever", "mkfs.sealfs"}, "disk", "add", "--data", data, dir+"/b.img")
		if l := disks(); len(l) != 1 {
			t.Errorf("disks: %+v", l)
		}
	}

	// The disks are remembered; so is whom they belong to.
	ok(t, "down", "--data", data)
	refused(t, []string{"no server runs", data}, "disk", "list", "--data", data)
	ok(t, start...)
	if l := disks(); len(l) != 1 || l[0].Device != image || l[0].State != "up" {
		t.Errorf("disks after a restart: %+v", l)
	}

	// A broken disk does not keep the others from being served.
	ok(t, "disk", "add", "--data", data, dir+"/c.img,size=64M")
	region := disks()[1].Region
	for _, broken := range []struct {
		path string
		do   func()
	}{
		{dir + "/c.img", func() {}},
		{region, func() { // of which only the store's opening can tell
			if err := os.WriteFile(region, bytes.Repeat([]byte{0xa5}, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		ok(t, "down", "--data", data)
		if err := os.Rename(broken.path, broken.path+".away"); err != nil {
			t.Fatal(err)
		}
		broken.do()
		ok(t, start...)
		if l := disks(); len(l) != 2 || l[0].State != "up" || l[1].State != "refused" || !strings.Contains(l[1].Reason, dir+"/c.img") {
			t.Errorf("disks without %s: %+v", broken.path, l)
		}
		if out := ok(t, "status", "--data", data); !strings.HasPrefix(out, "degraded\n") || !strings.Contains(out, dir+"/c.img") {
			t.Errorf("status: %s", out)
		}
		refused(t, []string{dir + "/c.img"}, "disk", "add", "--data", data, dir+"/c.img")
		if err := os.Rename(broken.path+".away", broken.path); err != nil {
			t.Fatal(err)
		}
		ok(t, "disk", "add", "--data", data, dir+"/c.img")
		if l := disks(); len(l) != 2 || l[1].State != "up" || l[1].Reason != "" {
			t.Errorf("disks, when it is back: %+v", l)
		}
	}

	other, more := newRole(t), free(t, 2)
	ok(t, "manager", "--data", other, "--listen", more[0], "--bootstrap", "--background")
	refused(t, []string{image, "cluster"}, "server", "--data", newRole(t), "--manager", more[0], "--listen", more[1], "--disk", image)
	ok(t, "down", "--data", data)
	if r := sealfs(t, "server", "--data", data, "--manager", more[0], "--listen", addrs[1]); r.code == 0 || !strings.Contains(r.err, "cluster") {
		t.Errorf("managers of another cluster: %+v", r)
	}
}

// TestTwins: of two servers with one identity, one serves.
func TestTwins(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: waiting for a lease to end takes too long for -short")
	}
	noSurvivors(t)
	s := newDevSite(t, "--managers", "1", "--servers", "1", "--disks", "1", "--mounts", "0", "--size", "64M")
	twin := newRole(t)
	if out, err := exec.Command("cp", "-a", s.path("server1"), twin).CombinedOutput(); err != nil {
		t.Fatal(err, string(out))
	}
	for _, name := range []string{"run", "pids", "log"} {
		if err := os.RemoveAll(filepath.Join(twin, name)); err != nil {
			t.Fatal(err)
		}
	}
	edit(t, twin+"/server.yaml", func(b []byte) []byte { return bytes.ReplaceAll(b, []byte(s.path("server1")), []byte(twin)) })
	refused(t, []string{"is not served", s.Servers[0], "copy"}, "server", "--data", twin, "--manager", s.managers(), "--listen", free(t, 1)[0], "--background")
	if st := s.status(t); st.State != node.StateRunning || st.Stores[0].Addr != s.Servers[0] {
		t.Errorf("status: %+v", st)
	}
}

// TestServerWaits: a start without a manager waits for one, and can be ended.
func TestServerWaits(t *testing.T) {
	addrs := free(t, 2)
	data, m := newRole(t), newRole(t)
	cmd := exec.Command(os.Args[0], "server", "--data", data, "--manager", addrs[0], "--listen", addrs[1], "--disk", data+".img,size=64M")
	cmd.Env = environment()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d, err := node.OpenDir(data)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "it begins", func() bool { return d.Runs(node.RoleServer) })
	ok(t, "manager", "--data", m, "--listen", addrs[0], "--bootstrap", "--background")
	eventually(t, "it serves", func() bool {
		return strings.Contains(ok(t, "list-servers", "--manager", addrs[0]), addrs[1]) && strings.HasPrefix(ok(t, "status", "--data", data), "running\n")
	})
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("it ended with %v\n%s", err, out.String())
	}
	if !strings.HasPrefix(out.String(), "running: server of "+data) {
		t.Errorf("it printed\n%s", out.String())
	}
	// Its lease ended with it.
	eventually(t, "the manager knows that it has ended", func() bool { return strings.Contains(ok(t, "list-servers", "--manager", addrs[0]), "down") })
}

// TestServers: several stores in one process, which roles take over later.
func TestServers(t *testing.T) {
	needFUSE(t)
	s := newSite(t)
	refused(t, []string{"--servers 2", "--device"}, "up", "--data", s.data, "--servers", "2", "--device", "/dev/null")
	s.up(t, "--servers", "3", "--size", "64M")
	for i := range 30 {
		if err := os.MkdirAll(fmt.Sprintf("%s/d%d/e/f", s.mount, i), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, fmt.Sprintf("%s/d%d/e/f/x", s.mount, i), fmt.Sprint(i))
	}
	check := func() {
		t.Helper()
		for i := range 30 {
			read(t, fmt.Sprintf("%s/d%d/e/f/x", s.mount, i), fmt.Sprint(i))
		}
	}
	if err := os.Rename(s.mount+"/d1/e", s.mount+"/d2/g"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(s.mount+"/d2/g", s.mount+"/d1/e"); err != nil {
		t.Fatal(err)
	}
	st := s.status(t)
	if len(st.Stores) != 3 || slices.ContainsFunc(st.Stores, func(x node.StoreStatus) bool { return x.Files == 0 || x.Size != 64<<20 }) {
		t.Errorf("stores: %+v", st.Stores)
	}
	refused(t, []string{s.data, "--servers 3, not 2"}, "up", "--data", s.data+"/../data", "--servers", "2")
	ok(t, "down", "--data", s.data)
	s.up(t, "--servers", "3")
	check()
	ok(t, "down", "--data", s.data)

	// Growth: manager and server become processes of their own.
	addrs := free(t, 2)
	ok(t, "manager", "--data", s.data, "--listen", addrs[0], "--background")
	refused(t, []string{s.data, "sealfs server"}, "up", "--data", s.data)
	ok(t, "server", "--data", s.data, "--manager", addrs[0], "--listen", addrs[1], "--background")
	daemon := newRole(t)
	ok(t, "mount", "--manager", addrs[0], "--daemon", daemon, "main", s.mount)
	check()
	write(t, s.mount+"/grown", "yes")
	if st := s.status(t); st.State != node.StateRunning || len(st.PIDs) != 2 || len(st.Stores) != 3 || len(st.Roles) != 2 {
		t.Errorf("status: %+v", st)
	}
	ok(t, "down", "--data", daemon)
	if out := ok(t, "down", "--data", s.data); strings.Count(out, "ended process") != 2 {
		t.Errorf("down: %s", out)
	}
	if st := s.status(t); st.State != node.StateDown {
		t.Errorf("status after down: %+v", st)
	}
	if _, err := os.Stat(st.Stores[0].Staging); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a clean end left %s: %v", st.Stores[0].Staging, err)
	}
}
