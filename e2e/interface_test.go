package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestInterface holds the programs to what the README says of them, and what
// scripts rely on.
func TestInterface(t *testing.T) {
	i := newInstance(t)
	if s := i.status(); s.State != "empty" || s.PIDs == nil || len(s.PIDs) > 0 {
		t.Errorf("status of a directory that was never used: %+v", s)
	}
	said := i.up("--size", "1G")
	s := i.status()
	if s.State != "running" || len(s.PIDs) == 0 || len(s.Stores) == 0 || len(s.Volumes) != 1 || s.Volumes[0].Name == "" {
		t.Fatalf("status after up: %+v", s)
	}
	if len(s.Mounts) != 1 || s.Mounts[0] != i.mnt {
		t.Errorf("mounts are %q, want %q", s.Mounts, i.mnt)
	}
	for _, st := range s.Stores {
		if !filepath.IsAbs(st.Device) || !filepath.IsAbs(st.Region) {
			t.Errorf("paths of a store are not absolute: %+v", st)
		}
		if !strings.Contains(said, st.Device) {
			t.Errorf("up does not name the device %s:\n%s", st.Device, said)
		}
	}
	if entries, err := os.ReadDir(i.mnt); err != nil || len(entries) > 0 {
		t.Errorf("a new root directory holds %v, %v", entries, err)
	}
	if out := sealfs(t, 0, "sealfs", "status", "--data", i.data).out; !strings.HasPrefix(out, "running") {
		t.Errorf("status for people begins with %.20q", out)
	}
	again := sealfs(t, 1, "sealfs", "up", "--data", i.data, "--mount", filepath.Join(i.dir, "other"))
	if !strings.Contains(again.errOut, fmt.Sprint(s.PIDs[0])) {
		t.Errorf("a second up does not name process %d: %v", s.PIDs[0], again)
	}
	sealfs(t, 8, "sealfs-fsck", "--data", i.data)

	second := filepath.Join(i.dir, "second")
	sealfs(t, 0, "sealfs", "mount", "--data", i.data, s.Volumes[0].Name, second)
	if both := i.status(); len(both.PIDs) != len(s.PIDs)+1 || len(both.Mounts) != 2 {
		t.Errorf("status with a further mount: %+v", both)
	}
	if err := os.WriteFile(filepath.Join(i.mnt, "file"), []byte("written here"), 0o644); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(second, "file")); err != nil || string(b) != "written here" {
		t.Errorf("through the second mount: %q, %v", b, err)
	}
	i.down()
	if out := sealfs(t, 0, "sealfs", "status", "--data", i.data).out; !strings.HasPrefix(out, "down") {
		t.Errorf("status for people begins with %.20q", out)
	}
	if s := i.status(); len(s.Stores) == 0 || len(s.Volumes) != 1 {
		t.Errorf("status when down: %+v", s)
	}
	i.down() // nothing runs: a success
	i.fsck()
	for _, st := range i.status().Stores {
		sealfs(t, 0, "sealfs-fsck", "-n", st.Device)
	}

	if r := sealfs(t, 1, "sealfs", "up", "--data", i.data, "--mount", i.mnt, "--size", "2G"); !strings.Contains(r.errOut, "1G") {
		t.Errorf("up with another size does not name the one it has: %v", r)
	}
	if err := os.WriteFile(filepath.Join(i.mnt, "hidden"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if r := sealfs(t, 1, "sealfs", "up", "--data", i.data, "--mount", i.mnt); !strings.Contains(r.errOut, i.mnt) {
		t.Errorf("up on a mount point that is not empty does not name it: %v", r)
	}
	if err := os.Remove(filepath.Join(i.mnt, "hidden")); err != nil {
		t.Fatal(err)
	}
	i.up("--size", "1G")
	if b, err := os.ReadFile(filepath.Join(i.mnt, "file")); err != nil || string(b) != "written here" {
		t.Errorf("after a restart: %q, %v", b, err)
	}
}

// TestStaleMount kills everything and has `down` clear the mount that is left.
func TestStaleMount(t *testing.T) {
	i := newInstance(t)
	i.up()
	i.killer().kill(t)
	if s := i.status(); s.State != "down" || len(s.PIDs) > 0 {
		t.Errorf("status after SIGKILL: %+v", s)
	}
	if len(mountsBelow(t, i.dir)) == 0 {
		t.Fatal("SIGKILL left no mount: there is nothing to be cleared")
	}
	i.down()
	if _, err := os.ReadDir(i.mnt); err != nil {
		t.Errorf("the mount point after down: %v", err)
	}
}

// TestVersion looks at what `version` says, which needs neither data nor mount.
func TestVersion(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: the programs are not built for -short")
	}
	var v struct {
		Version  string `json:"version"`
		Protocol int    `json:"protocol"`
		Device   int    `json:"device_format"`
		Region   int    `json:"region_format"`
	}
	out := sealfs(t, 0, "sealfs", "version", "--json").out
	if err := json.Unmarshal([]byte(out), &v); err != nil || v.Version == "" || v.Protocol == 0 || v.Device == 0 || v.Region == 0 {
		t.Errorf("version --json: %v\n%s", err, out)
	}
	if r := sealfs(t, 2, "sealfs", "upp"); !strings.Contains(r.errOut, `"up"`) {
		t.Errorf("a mistyped command does not suggest the one that was meant: %v", r)
	}
}
