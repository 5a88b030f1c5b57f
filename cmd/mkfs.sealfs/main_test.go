package main

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs"
)

func mkfs(args ...string) (out, stderr string, code int) {
	var o, e bytes.Buffer
	code = run(args, &o, &e)
	return o.String(), e.String(), code
}

func TestMakesStore(t *testing.T) {
	image := filepath.Join(t.TempDir(), "a.img")
	id := sealfs.NewUUID()
	args := []string{"-s", "64M", "-L", "archive", "-U", id.String(), "--segment", "1M", image}

	// First only the plan: the same text, and nothing made.
	plan, stderr, code := mkfs(append([]string{"-n"}, args...)...)
	if code != 0 {
		t.Fatal(stderr)
	}
	for _, path := range []string{image, image + ".region"} {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("-n made %s: %v", path, err)
		}
	}
	out, stderr, code := mkfs(args...)
	if code != 0 || out != plan {
		t.Fatalf("exit code %d, %s\nplanned\n%s, made\n%s", code, stderr, plan, out)
	}
	for _, word := range []string{"store    =" + image, "uuid=" + id.String(), "size=64M", "segments=63, segsize=1M", image + ".region", `label    ="archive"`} {
		if !strings.Contains(out, word) {
			t.Errorf("%q is missing in\n%s", word, out)
		}
	}
	dev, err := disk.Open(image, disk.OpenOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	sb, err := lsfs.ReadSuper(dev)
	if err != nil || sb.Store != id || sb.Label != "archive" || sb.SegmentBytes != 1<<20 {
		t.Errorf("superblock %+v, %v", sb, err)
	}

	// What is there is not overwritten, unless forced.
	if _, stderr, code := mkfs(image); code != exitFailure || !strings.Contains(stderr, image) || !strings.Contains(stderr, "-f") {
		t.Errorf("a second time: exit code %d, %s", code, stderr)
	}
	if _, stderr, code := mkfs("-n", image); code != exitFailure || !strings.Contains(stderr, "sealfs") {
		t.Errorf("planned a second time: exit code %d, %s", code, stderr)
	}
	if out, stderr, code := mkfs("-f", "-q", image); code != 0 || out != "" || stderr != "" {
		t.Errorf("forced: exit code %d, %q, %q", code, out, stderr)
	}
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	ext4 := filepath.Join(dir, "ext4")
	b := make([]byte, 1<<20)
	b[1080], b[1081] = 0x53, 0xef // the magic of ext2 to ext4
	if err := os.WriteFile(ext4, b, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string
		code int
	}{
		{nil, "one DEVICE is needed", exitUsage},
		{[]string{"a", "b"}, "one DEVICE is needed", exitUsage},
		{[]string{"--nonsense", "a"}, "--nonsense", exitUsage},
		{[]string{"-s", "4GB", dir + "/a"}, `"4GB" is not a size`, exitUsage},
		{[]string{dir + "/a"}, "does not exist: give --size", exitFailure},
		{[]string{"-s", "64K", dir + "/a"}, "too few", exitFailure},
		{[]string{"-s", "64M", ext4}, "exists, and keeps its size", exitFailure},
		{[]string{"-s", "64M", "/dev/nosuchdisk"}, "hardly meant", exitFailure},
		{[]string{ext4}, "holds ext", exitFailure},
		{[]string{dir}, "directory", exitFailure},
		{[]string{"/dev/null", "--region", dir + "/r"}, "neither a block device nor an image", exitFailure},
		{[]string{"-U", "x", "-s", "64M", dir + "/a"}, "not a UUID", exitFailure},
		{[]string{"--segment", "3M", "-s", "64M", dir + "/a"}, "power of two", exitFailure},
		{[]string{"--segment", "8G", "-s", "64M", dir + "/a"}, "the largest is 256M", exitFailure},
		{[]string{"-L", strings.Repeat("x", 100), "-s", "64M", dir + "/a"}, "longer than 64", exitFailure},
	} {
		out, stderr, code := mkfs(c.args...)
		if code != c.code || out != "" || !strings.HasPrefix(stderr, "mkfs.sealfs: ") || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, c.want) {
			t.Errorf("%q: exit code %d, %q, %q; want %d and %q", c.args, code, out, stderr, c.code, c.want)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("refused, but made %v, %v", entries, err)
	}
	if got, err := os.ReadFile(ext4); err != nil || !bytes.Equal(got, b) {
		t.Errorf("what was there has changed: %v", err)
	}
	if out, _, code := mkfs("--help"); code != 0 || !strings.Contains(out, "Examples:") {
		t.Errorf("--help: exit code %d\n%s", code, out)
	}
	if out, _, code := mkfs("--version"); code != 0 || !strings.Contains(out, "device format") {
		t.Errorf("--version: exit code %d, %s", code, out)
	}
}
