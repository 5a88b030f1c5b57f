package node

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sealfs"
)

func TestGather(t *testing.T) {
	file := filepath.Join(t.TempDir(), "server.yaml")
	text := "manager: [a:1, b:2]\nlisten: 127.0.0.1:1\nrack: r1\nhost: h1\ndisk:\n  - /dev/x,format\n  - /dev/y\ninsecure_listen: true\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	env := func(k string) string {
		return map[string]string{"SEALFS_RACK": "r2", "SEALFS_HOST": "h2", "SEALFS_CONFIG_PATH": filepath.Dir(file)}[k]
	}
	for _, name := range []string{file, ""} { // by name, and by SEALFS_CONFIG_PATH
		v, err := Gather(RoleServer, name, map[string][]string{"host": {"h3"}}, env)
		if err != nil {
			t.Fatal(err)
		}
		for key, want := range map[string]string{"manager": "a:1,b:2", "listen": "127.0.0.1:1", "rack": "r2", "host": "h3", "cache": "32M"} {
			if got := v.Text(key); got != want {
				t.Errorf("%s is %q, want %q", key, got, want)
			}
		}
		if !slices.Equal(v.List("disk"), []string{"/dev/x,format", "/dev/y"}) || !v.Yes("insecure_listen") {
			t.Errorf("disks %q, insecure_listen %v", v.List("disk"), v.Yes("insecure_listen"))
		}
		if s, err := v.settings(); err != nil || s.Cache != 32<<20 {
			t.Errorf("settings: %+v, %v", s, err)
		}
	}
	for text, want := range map[string]string{
		"flavour: sweet":            `line 1: key "flavour" is not known`,
		"listen: {a: b}":            "line 1: listen: a text is needed",
		"insecure_listen: perhaps":  `"perhaps" is neither true nor false`,
		"- a list":                  "server.yaml",
		"manager: x:1\nshards: 128": `line 2: key "shards" is not known`,
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Gather(RoleServer, file, nil, noEnv); err == nil || !strings.Contains(err.Error(), want) || !errors.Is(err, sealfs.ErrInvalid) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	if _, err := Gather(RoleServer, file+"x", nil, noEnv); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that was named, but is not there: %v", err)
	}
	v, err := Gather(RoleServer, "", map[string][]string{"cache": {"much"}}, noEnv)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.settings(); err == nil || !strings.Contains(err.Error(), "flag --cache") {
		t.Errorf("a bad setting: %v", err)
	}
}

// TestDeploy: what deploy/ shows is what the roles read.
func TestDeploy(t *testing.T) {
	for _, role := range []string{RoleManager, RoleServer, RoleDaemon} {
		path := filepath.Join("..", "deploy", role+".yaml")
		v, err := Gather(role, path, nil, noEnv)
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		if _, err := v.settings(); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range RoleOptions(role) {
			if !strings.Contains("\n"+strings.ReplaceAll(string(text), "\n#", "\n"), "\n"+o.Key+":") {
				t.Errorf("%s does not show %s", path, o.Key)
			}
		}
		for _, disk := range v.List("disk") {
			if _, err := parseDisk(disk); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}
		unit, err := os.ReadFile(filepath.Join("..", "deploy", "systemd", "sealfs-"+role+".service"))
		if err != nil || !strings.Contains(string(unit), "Type=notify") || !strings.Contains(string(unit), "/sealfs "+role+" ") {
			t.Errorf("unit of %s: %v\n%s", role, err, unit)
		}
	}
}

func TestListen(t *testing.T) {
	for _, c := range []struct {
		l    Listen
		want string // "" for none
		code sealfs.Code
	}{
		{Listen{Addr: "127.0.0.1:0"}, "", 0},
		{Listen{Addr: "localhost:0"}, "", 0},
		{Listen{Addr: "[::1]:0"}, "", 0},
		{Listen{Addr: "0.0.0.0:0"}, "--insecure-listen", sealfs.ErrPerm},
		{Listen{Addr: ":0"}, "--insecure-listen", sealfs.ErrPerm},
		{Listen{Addr: "10.1.2.3:8081"}, "--insecure-listen", sealfs.ErrPerm},
		{Listen{Addr: "example.net:8081"}, "--insecure-listen", sealfs.ErrPerm},
		{Listen{Addr: "127.0.0.1:0", Advertise: "10.1.2.3:8081"}, "--advertise 10.1.2.3:8081", sealfs.ErrPerm},
		{Listen{Addr: "127.0.0.1:0", Advertise: "127.0.0.1:0"}, "port 0", sealfs.ErrInvalid},
		{Listen{Addr: "0.0.0.0:0", Insecure: true}, "--advertise", sealfs.ErrInvalid},
		{Listen{Addr: "0.0.0.0:0", Advertise: "10.1.2.3:8081", Insecure: true}, "", 0},
		{Listen{Addr: "127.0.0.1"}, "HOST:PORT", sealfs.ErrInvalid},
		{Listen{Addr: "127.0.0.1:http"}, `"http" is not a port`, sealfs.ErrInvalid},
		{Listen{Addr: "127.0.0.1:70000"}, "is not a port", sealfs.ErrInvalid},
	} {
		l, addr, err := c.l.open(t.Context())
		if l != nil {
			l.Close()
		}
		if c.code == 0 {
			if _, port, e := net.SplitHostPort(addr); err != nil || e != nil || port == "0" {
				t.Errorf("%+v: address %q, %v", c.l, addr, err)
			}
			continue
		}
		if !errors.Is(err, c.code) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.l, err, c.want)
		}
	}
	first, addr, err := Listen{Addr: "127.0.0.1:0"}.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if _, _, err := (Listen{Addr: addr}).open(t.Context()); !errors.Is(err, sealfs.ErrBusy) || !strings.Contains(err.Error(), addr) {
		t.Errorf("an address that is taken: %v", err)
	}
}

func TestParseAddrs(t *testing.T) {
	if got, err := ParseAddrs("--manager", "a:1, b:2,"); err != nil || !slices.Equal(got, []string{"a:1", "b:2"}) {
		t.Errorf("%q, %v", got, err)
	}
	for _, list := range []string{"", ",", "a", "a:1,b"} {
		if _, err := ParseAddrs("--manager", list); !errors.Is(err, sealfs.ErrInvalid) || !strings.Contains(err.Error(), "--manager") {
			t.Errorf("%q: %v", list, err)
		}
	}
}

func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	if err := Notify("READY=1"); err != nil {
		t.Fatal(err)
	}
	if err := l.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	if n, err := l.Read(b); err != nil || string(b[:n]) != "READY=1" {
		t.Errorf("systemd gets %q, %v", b[:n], err)
	}
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Notify("READY=1"); err != nil {
		t.Errorf("without systemd: %v", err)
	}
}

func TestMountOptionsOfClusters(t *testing.T) {
	for text, want := range map[string]mountOptions{
		"":                           {timeout: defaultMountTimeout, conns: defaultConns},
		"timeout=0,conns=4":          {conns: 4},
		"timeout=7,noatime,user=joe": {timeout: 7 * time.Second, conns: defaultConns, noAtime: true},
	} {
		if o, err := parseMountOptions(text); err != nil || o != want {
			t.Errorf("%q: %+v, %v", text, o, err)
		}
	}
	for _, text := range []string{"timeout", "timeout=-1", "timeout=1h", "conns=0", "conns=65", "noexec", "sync"} {
		if _, err := parseMountOptions(text); !errors.Is(err, sealfs.ErrInvalid) || !strings.Contains(err.Error(), text) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
