package lsfs

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sealfs/disk"
	"sealfs/pmem"
)

// TestOpenLeavesNothing: what cannot be opened is closed and not mapped any more.
func TestOpenLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	files := func(name string) (disk.Device, pmem.Backing) {
		t.Helper()
		path := filepath.Join(dir, name)
		if f, err := os.Create(path); err != nil {
			t.Fatal(err)
		} else if err := f.Truncate(8 << 20); err != nil {
			t.Fatal(err)
		} else if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		dev, err := disk.Open(path, disk.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		region, err := pmem.OpenFile(path+".region", true)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Format(dev, region, Geometry{SegmentBytes: 64 << 10}); err != nil {
			t.Fatal(err)
		}
		return dev, region
	}
	dev, region := files("a")
	dev2, region2 := files("b")
	if _, err := Open(dev, region2, nil, tinyFS{}, testOptions()); err == nil || !strings.Contains(err.Error(), "belongs to store") {
		t.Fatal(err)
	}
	o := testOptions()
	o.StagingBytes = -1
	if _, err := Open(dev2, region, nil, tinyFS{}, o); err == nil {
		t.Fatal("opened with a negative ring")
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(maps, []byte(dir)) {
		t.Errorf("still mapped:\n%s", maps)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, dir) {
			t.Errorf("%s is still open", to)
		}
	}
}
