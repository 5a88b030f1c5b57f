package node

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sealfs"
)

func TestParseMount(t *testing.T) {
	m, ok := parseMount(`36 35 0:98 / /mnt/a\040b\134c rw,noatime shared:1 - fuse.sealfs sealfs:main rw,user_id=0` + "\n")
	if !ok || m != (mountEntry{`/mnt/a b\c`, "fuse.sealfs", "sealfs:main", "0:98"}) || !m.ours() {
		t.Errorf("%+v, %v", m, ok)
	}
	for _, line := range []string{"", "1 2 3", "36 35 0:98 / /mnt rw -", "36 35 0:98 / - ext4 /dev/sda"} {
		if m, ok := parseMount(line); ok {
			t.Errorf("%q is read as %+v", line, m)
		}
	}
	for in, want := range map[string]string{`a`: `a`, `\`: `\`, `\04`: `\04`, `\040\011`: " \t", `x\999`: `x\999`} {
		if got := unescape(in); got != want {
			t.Errorf("unescape(%q) = %q, want %q", in, got, want)
		}
	}
	if _, mounted, err := mountAt("/proc"); !mounted || err != nil {
		t.Errorf("/proc: mounted %v, %v", mounted, err)
	}
	if stale("/proc") || stale("/nowhere") {
		t.Error("what is not ours is taken for a stale mount")
	}
}

func TestMountPath(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir+"/real", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("real", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	for in, want := range map[string]string{
		dir + "/real": dir + "/real", dir + "/link": dir + "/real", dir + "/link/x": dir + "/real/x", dir + "/./new/": dir + "/new", dir + "/a/b/c": dir + "/a/b/c",
	} {
		if got, err := mountPath(in); err != nil || got != want {
			t.Errorf("mountPath(%q) = %q, %v, want %q", in, got, err, want)
		}
	}
	if _, err := mountPath("/"); !errors.Is(err, sealfs.ErrInvalid) {
		t.Errorf("mountPath(/): %v", err)
	}
}

func TestParseMountOptions(t *testing.T) {
	o, err := parseMountOptions("ro,_netdev,x-systemd.automount,comment=hi,noallow_other,suid,nodev,,debug")
	if err != nil || !o.readOnly || !o.suid || o.dev || !o.debug || o.allowOther == nil || *o.allowOther {
		t.Errorf("%+v, %v", o, err)
	}
	for _, s := range []string{"wibble", "ro,noexec", "RO", "uid=0"} {
		if _, err := parseMountOptions(s); !errors.Is(err, sealfs.ErrInvalid) || !strings.Contains(err.Error(), "is not known") {
			t.Errorf("%q: %v", s, err)
		}
	}
}
