package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sealfs/disk"
	"sealfs/fsck"
	"sealfs/lsfs"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// makeStore formats a store in dir and returns the device's path.
func makeStore(t *testing.T, dir string) string {
	t.Helper()
	device := filepath.Join(dir, "device.img")
	if err := errors.Join(os.MkdirAll(dir, 0o755), disk.CreateImage(device, 2<<20)); err != nil {
		t.Fatal(err)
	}
	dev, err := disk.Open(device, disk.OpenOptions{Exclusive: true})
	if err != nil {
		t.Fatal(err)
	}
	region, err := pmem.OpenFile(filepath.Join(dir, fsck.RegionName), true)
	if err != nil {
		t.Fatal(err)
	}
	_, err = lsfs.Format(dev, region, lsfs.Geometry{SegmentBytes: layout.SegmentBytesMin})
	if err := errors.Join(err, dev.Close(), region.Close()); err != nil {
		t.Fatal(err)
	}
	return device
}

// damage inverts a byte of a file.
func damage(t *testing.T, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	_, err = f.ReadAt(b, off)
	b[0] ^= 0xff
	_, err2 := f.WriteAt(b, off)
	if err := errors.Join(err, err2, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// fsckOf runs the command.
func fsckOf(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(context.Background(), args, &out, &errs)
	return code, out.String(), errs.String()
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{}, {"-n", "-y", "d"}, {"-p", "-n", "d"}, {"--wrong", "d"}, {"--data", "x", "d"}, {"--data", "x", "--region", "y"},
		{"--region", "r", "d", "e"}, {"--shards", "12", "d"}, {"--shards", "x", "d"},
	} {
		if code, out, errs := fsckOf(t, args...); code != fsck.ExitUsage || out != "" || !strings.HasPrefix(errs, "sealfs-fsck: ") {
			t.Errorf("%q: exit status %d, %q, %q", args, code, out, errs)
		}
	}
	if code, out, _ := fsckOf(t, "--help"); code != 0 || !strings.Contains(out, "--no-data") {
		t.Errorf("--help: exit status %d, %q", code, out)
	}
	if code, out, _ := fsckOf(t, "--list-problems"); code != 0 || strings.Count(out, "\n") != len(fsck.Problems()) {
		t.Errorf("--list-problems: exit status %d, %q", code, out)
	}
}

func TestStatuses(t *testing.T) {
	dir := t.TempDir()
	one, two := makeStore(t, dir+"/stores/1"), makeStore(t, dir+"/stores/2")
	code, out, errs := fsckOf(t, "-f", one)
	if code != fsck.ExitClean || errs != "" || !strings.Contains(out, "\nPass 7: data\n") || !strings.HasSuffix(out, "(0/32 segments in use)\n") || !strings.Contains(out, one+": clean, 0 files, 0 directories, 0 bytes") {
		t.Errorf("clean: exit status %d, %q, %q", code, out, errs)
	}
	damage(t, two, 50)
	if code, out, _ = fsckOf(t, "-n", "--data", dir); code != fsck.ExitUncorrected || !strings.Contains(out, "[102]") || !strings.Contains(out, two+": 1 warning left, ") {
		t.Errorf("one of two damaged: exit status %d, %q", code, out)
	}
	if code, out, _ = fsckOf(t, "-y", "--data", dir); code != fsck.ExitRepaired || !strings.Contains(out, two+": 1 repaired, ") {
		t.Errorf("repair: exit status %d, %q", code, out)
	}
	if code, _, _ = fsckOf(t, "-p", "--data", dir); code != fsck.ExitClean {
		t.Errorf("repaired: exit status %d", code)
	}
	if code, _, errs = fsckOf(t, dir+"/nothing"); code != fsck.ExitOperational || !strings.Contains(errs, dir+"/nothing") {
		t.Errorf("no device: exit status %d, %q", code, errs)
	}
	if code, _, errs = fsckOf(t, "--data", dir+"/stores"); code != fsck.ExitOperational || !strings.Contains(errs, "no stores") {
		t.Errorf("no stores: exit status %d, %q", code, errs)
	}
	damage(t, two, 50)
	damage(t, two, 5000)
	if code, out, _ = fsckOf(t, "-y", two); code != fsck.ExitUncorrected || !strings.Contains(out, "[101]") || !strings.Contains(out, "skipped") {
		t.Errorf("both superblocks: exit status %d, %q", code, out)
	}
}

func TestLive(t *testing.T) {
	device := makeStore(t, t.TempDir())
	dev, err := disk.Open(device, disk.OpenOptions{Exclusive: true})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	for _, mode := range []string{"-n", "-y"} {
		if code, _, errs := fsckOf(t, mode, device); code != fsck.ExitOperational || !strings.Contains(errs, "stop it first") {
			t.Errorf("%s on a live store: exit status %d, %q", mode, code, errs)
		}
	}
}

func TestCancelled(t *testing.T) {
	device := makeStore(t, t.TempDir())
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	var out, errs bytes.Buffer
	if code := run(ctx, []string{device}, &out, &errs); code != fsck.ExitCancelled {
		t.Errorf("exit status %d, %q", code, errs.String())
	}
}

func TestJSON(t *testing.T) {
	device := makeStore(t, t.TempDir())
	damage(t, device, 50)
	code, out, errs := fsckOf(t, "--json", "-C", "0", device)
	var got struct {
		Stores []struct {
			Device, Region, Store string
			Found                 []struct {
				Problem                       int
				Name, Severity, Where, Detail string
			}
			Error string
		}
		Exit *int
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v: %q", err, out)
	}
	if len(got.Stores) != 1 || got.Exit == nil || *got.Exit != code || code != fsck.ExitUncorrected || !strings.Contains(errs, "pass 1") {
		t.Fatalf("exit status %d, %q, %q", code, out, errs)
	}
	s := got.Stores[0]
	if s.Device != device || len(s.Store) != 36 || len(s.Found) != 1 || s.Found[0].Problem != 102 || s.Found[0].Severity != "warning" || s.Found[0].Detail == "" {
		t.Errorf("%+v", s)
	}
	code, out, _ = fsckOf(t, "--json", device+"x")
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != fsck.ExitOperational || got.Stores[0].Error == "" {
		t.Errorf("exit status %d, %q, %v", code, out, err)
	}
}
