package node

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sealfs"
)

// TestMain makes this test program a helper process too: with the variable set
// it registers, says so, and stays until its input ends.
func TestMain(m *testing.M) {
	if path := os.Getenv("NODE_TEST_HOLD"); path != "" {
		os.Exit(hold(path))
	}
	os.Exit(m.Run())
}

func hold(path string) int {
	d, err := OpenDir(path)
	if err == nil {
		_, err = d.lock(0)
	}
	if err == nil {
		_, err = d.register(Process{Role: RoleMain, Mount: "/nowhere", Volume: "main"})
	}
	fmt.Println("held", err)
	io.Copy(io.Discard, os.Stdin)
	return 0
}

// holder starts a process that holds d; end kills it.
func startHolder(t *testing.T, d Dir) (pid int, end func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "NODE_TEST_HOLD="+d.path)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = func() { cmd.Process.Kill(); cmd.Wait(); in.Close() }
	t.Cleanup(end)
	line, err := bufio.NewReader(out).ReadString('\n')
	if line != "held <nil>\n" {
		t.Fatalf("helper: %q, %v", line, err)
	}
	return cmd.Process.Pid, end
}

func TestLockNamesHolder(t *testing.T) {
	d := testDir(t)
	if _, held, err := d.holder(); held || err != nil {
		t.Fatalf("a new directory: held %v, %v", held, err)
	}
	pid, kill := startHolder(t, d)
	for range 3 { // asking must not disturb
		if p, held, err := d.holder(); p != pid || !held || err != nil {
			t.Fatalf("holder() = %d, %v, %v, want %d", p, held, err, pid)
		}
	}
	_, err := d.lock(0)
	if !errors.Is(err, sealfs.ErrBusy) || !strings.Contains(err.Error(), fmt.Sprintf("process %d:", pid)) || !strings.Contains(err.Error(), "sealfs down --data "+d.path) {
		t.Errorf("second lock: %v", err)
	}
	kill()
	if _, held, err := d.holder(); held || err != nil {
		t.Errorf("after the holder was killed: held %v, %v", held, err)
	}
	l, err := d.lock(0)
	if err != nil {
		t.Fatal(err)
	}
	if p, held, err := d.holder(); p != os.Getpid() || !held || err != nil {
		t.Errorf("own lock: %d, %v, %v", p, held, err)
	}
	if err := l.release(); err != nil {
		t.Error(err)
	}
}

func TestProcesses(t *testing.T) {
	d := testDir(t)
	pid, kill := startHolder(t, d)
	own, err := d.register(Process{Role: RoleMount, Mount: "/elsewhere", Volume: "v"})
	if err != nil {
		t.Fatal(err)
	}
	live, dead, err := d.processes()
	if err != nil || len(live) != 2 || len(dead) != 0 {
		t.Fatalf("live %v, dead %v, %v", live, dead, err)
	}
	for _, p := range live {
		want := Process{PID: pid, Role: RoleMain, Mount: "/nowhere", Volume: "main", Started: p.Started}
		if p.PID == os.Getpid() {
			want = Process{PID: os.Getpid(), Role: RoleMount, Mount: "/elsewhere", Volume: "v", Started: p.Started}
		}
		if p != want || p.Started.IsZero() {
			t.Errorf("entry %+v, want %+v", p, want)
		}
	}
	if err := own.end(); err != nil {
		t.Fatal(err)
	}
	kill()
	live, dead, err = d.processes()
	if err != nil || len(live) != 0 || len(dead) != 1 || dead[0].PID != pid || dead[0].Mount != "/nowhere" {
		t.Fatalf("after the end: live %v, dead %v, %v", live, dead, err)
	}
	// An entry that a power cut left empty is one of a dead process too.
	if err := os.WriteFile(d.join("pids", "99999999"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.clearStale(""); err != nil {
		t.Fatal(err)
	}
	live, dead, err = d.processes()
	if err != nil || len(live)+len(dead) != 0 {
		t.Errorf("after clearing: live %v, dead %v, %v", live, dead, err)
	}
	// A living process is never forgotten.
	if own, err = d.register(Process{Role: RoleMount}); err != nil {
		t.Fatal(err)
	}
	defer own.end()
	if err := d.forget([]Process{{PID: os.Getpid()}}); err != nil {
		t.Fatal(err)
	}
	if live, _, _ := d.processes(); len(live) != 1 {
		t.Errorf("a living process was forgotten")
	}
}

func TestInspect(t *testing.T) {
	write := func(d Dir, name, text string) {
		t.Helper()
		path := d.join(name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	formatted := fmt.Sprintf("version: 1\ncluster: %s\nshards: 16\nstores: [{id: %s, device: stores/0/device.img, region: stores/0/region, size: 1G}]\n", sealfs.NewUUID(), sealfs.NewUUID())
	for name, c := range map[string]struct {
		files map[string]string
		size  Size
		want  string // in the error, "" for none
	}{
		"empty":                  {nil, 0, ""},
		"only a configuration":   {map[string]string{"config.yaml": "options: {cache: 1M}"}, 0, ""},
		"a mount point's":        {map[string]string{"lost+found/x": ""}, 0, ""},
		"foreign":                {map[string]string{"thesis.tex": ""}, 0, `holds "thesis.tex", which SealFS did not make`},
		"formatted":              {map[string]string{"config.yaml": formatted, "stores/0/region": ""}, 0, ""},
		"formatted, and foreign": {map[string]string{"config.yaml": formatted, "mnt/x": ""}, 0, ""},
		"equal size":             {map[string]string{"config.yaml": formatted}, 1 << 30, ""},
		"other size":             {map[string]string{"config.yaml": formatted}, 2 << 30, "was formatted with --size 1G, not 2G"},
		"lost configuration":     {map[string]string{"stores/0/device.img": "x"}, 0, "restore config.yaml from a copy"},
		"lost, manager left":     {map[string]string{"manager/raft.db": "x", "config.yaml": ""}, 0, "restore config.yaml from a copy"},
		"interrupted formatting": {map[string]string{"stores/0/device.img": "x", "config.yaml": strings.Replace(formatted, "version", "formatting: true\nversion", 1)}, 4 << 30, ""},
	} {
		d, err := OpenDir(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		for file, text := range c.files {
			write(d, file, text)
		}
		before := tree(t, d.path)
		if _, err = d.inspect(shape{size: c.size}); c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if after := tree(t, d.path); after != before {
			t.Errorf("%s: looking changed\n%s into\n%s", name, before, after)
		}
	}
}

// tree lists all names below a directory.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		fmt.Fprintln(&b, strings.TrimPrefix(path, dir))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestDestroy(t *testing.T) {
	if err := (Dir{path: filepath.Join(t.TempDir(), "none")}).Destroy(); !errors.Is(err, sealfs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	d, err := OpenDir(filepath.Join(t.TempDir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.make(); err != nil {
		t.Fatal(err)
	}
	if err := d.Destroy(); !errors.Is(err, sealfs.ErrNotExist) {
		t.Errorf("no configuration: %v", err)
	}
	if err := d.format(&Config{Version: 1}, shape{size: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	_, kill := startHolder(t, d)
	if err := d.Destroy(); !errors.Is(err, sealfs.ErrBusy) {
		t.Errorf("in use: %v", err)
	}
	if cfg, err := d.Config(); err != nil || d.checkStores(cfg) != nil {
		t.Errorf("a refused destroy did harm: %v", err)
	}
	kill()
	if err := os.WriteFile(d.join("letter"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Destroy(); err != nil {
		t.Fatal(err)
	}
	if got := tree(t, d.path); got != "\n/letter\n" {
		t.Errorf("left: %q", got)
	}
	if err := os.Remove(d.join("letter")); err != nil {
		t.Fatal(err)
	}
	if err := d.make(); err != nil {
		t.Fatal(err)
	}
	if err := d.writeConfig(&Config{Version: 1}); err != nil {
		t.Fatal(err)
	}
	if err := d.Destroy(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(d.path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory is still there: %v", err)
	}
}

func TestFormatAgain(t *testing.T) {
	d := testDir(t)
	cfg := &Config{Version: 1, Shards: 64, Options: map[string]string{"cache": "8M"}}
	if err := d.format(cfg, shape{size: 64<<20 + 1}); !errors.Is(err, sealfs.ErrInvalid) || !strings.Contains(err.Error(), "take 64M") {
		t.Errorf("odd size: %v", err)
	}
	if err := d.format(cfg, shape{size: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	// As if it had been interrupted: it begins anew, with what people had written.
	cfg.Formatting = true
	if err := d.writeConfig(cfg); err != nil {
		t.Fatal(err)
	}
	cfg, err := d.inspect(shape{size: 128 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.format(cfg, shape{size: 128 << 20}); err != nil {
		t.Fatal(err)
	}
	if cfg, err = d.inspect(shape{size: 128 << 20}); err != nil || cfg.Options["cache"] != "8M" || cfg.Shards != 64 {
		t.Fatalf("%+v, %v", cfg, err)
	}
	if err := d.checkStores(cfg); err != nil {
		t.Error(err)
	}
	st, err := d.Stores()
	if err != nil || len(st) != 1 || !filepath.IsAbs(st[0].Device) || !filepath.IsAbs(st[0].Region) {
		t.Errorf("stores %+v, %v", st, err)
	}
}

func TestCheckStores(t *testing.T) {
	for name, c := range map[string]struct {
		harm func(d, other Dir, cfg *Config) error
		want string
	}{
		"truncated": {func(d, _ Dir, _ *Config) error { return os.Truncate(d.join("stores/0/device.img"), 1<<20) },
			"was truncated: it has 1048576 bytes of 67108864; restore it from a copy"},
		"image missing":  {func(d, _ Dir, _ *Config) error { return os.Remove(d.join("stores/0/device.img")) }, "device.img is missing: put it back"},
		"region missing": {func(d, _ Dir, _ *Config) error { return os.Remove(d.join("stores/0/region")) }, "region is missing: put it back"},
		"other image": {func(d, other Dir, _ *Config) error {
			return os.Rename(other.join("stores/0/device.img"), d.join("stores/0/device.img"))
		}, "is the image of another data directory"},
		"wrong cluster": {func(d, _ Dir, cfg *Config) error { cfg.Cluster = sealfs.NewUUID(); return nil }, "belongs to cluster"},
		"damaged superblock": {func(d, _ Dir, _ *Config) error {
			f, err := os.OpenFile(d.join("stores/0/device.img"), os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt(make([]byte, 8192), 0)
			return err
		}, "see `sealfs-fsck -n "},
	} {
		d, other := testDir(t), testDir(t)
		for _, d := range []Dir{d, other} {
			if err := d.format(&Config{Version: 1}, shape{size: 64 << 20}); err != nil {
				t.Fatal(err)
			}
		}
		cfg, err := d.Config()
		if err != nil {
			t.Fatal(err)
		}
		if err := d.checkStores(cfg); err != nil {
			t.Fatal(err)
		}
		if err := c.harm(d, other, cfg); err != nil {
			t.Fatal(err)
		}
		if err := d.checkStores(cfg); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func TestStatusDown(t *testing.T) {
	d, err := OpenDir(filepath.Join(t.TempDir(), "none"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := d.Status(t.Context())
	if err != nil || s.State != StateEmpty || s.PIDs == nil || s.Stores == nil || s.Volumes == nil || s.Mounts == nil {
		t.Errorf("no directory: %+v, %v", s, err)
	}
	d = testDir(t)
	if err := d.format(&Config{Version: 1}, shape{size: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	s, err = d.Status(t.Context())
	if err != nil || s.State != StateDown || len(s.PIDs) != 0 || len(s.Stores) != 1 {
		t.Fatalf("down: %+v, %v", s, err)
	}
	st := s.Stores[0]
	if st.Device != d.join("stores/0/device.img") || st.Region != d.join("stores/0/region") || st.Size != 64<<20 || st.Allocated <= 0 || st.Allocated > 32<<20 || st.State != StateDown {
		t.Errorf("store %+v", st)
	}
	var b strings.Builder
	if _, err := s.WriteTo(&b); err != nil || !strings.HasPrefix(b.String(), "down") || !strings.Contains(b.String(), st.Device) {
		t.Errorf("for people: %q, %v", b.String(), err)
	}
	// Somebody holds the directory, but does not answer.
	pid, _ := startHolder(t, d)
	if s, err = d.Status(t.Context()); err != nil || s.State != StateBusy || len(s.PIDs) != 1 || s.PIDs[0] != pid {
		t.Errorf("busy: %+v, %v", s, err)
	}
}
