package e2e

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// item is a file, directory or link of a tree.
type item struct {
	name  string // from the tree's root
	mode  fs.FileMode
	mtime time.Time
	data  []byte
	link  string // target of a symbolic link
	same  string // of a further name of a file: its first
}

// goTree returns Go's own source tree without cmd and testdata, parents first.
// With names, only what is below these top directories.
func goTree(t testing.TB, names ...string) []item {
	t.Helper()
	root := strings.TrimSpace(must(t, "", "go", "env", "GOROOT")) + "/src"
	var items []item
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		rel := strings.TrimPrefix(path, root+"/")
		top, _, _ := strings.Cut(rel, "/")
		if d.IsDir() && (rel == "cmd" || d.Name() == "testdata") || len(names) > 0 && !slices.Contains(names, top) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		it := item{name: rel, mode: fi.Mode(), mtime: fi.ModTime()}
		switch fi.Mode().Type() {
		case 0:
			it.data, err = os.ReadFile(path)
		case fs.ModeSymlink:
			it.link, err = os.Readlink(path)
		case fs.ModeDir:
		default:
			return nil
		}
		items = append(items, it)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(items) < 100 {
		t.Fatalf("%s holds only %d files", root, len(items))
	}
	return items
}

// oddities are what a source tree does not have.
func oddities() []item {
	when := time.Unix(1_000_000_000, 123_456_789)
	return []item{
		{name: "odd", mode: fs.ModeDir | 0o755, mtime: when},
		{name: "odd/empty", mode: 0o600, mtime: when},
		{name: "odd/read-only", mode: 0o444, mtime: when, data: []byte("x")},
		{name: "odd/" + strings.Repeat("n", 255), mode: 0o644, mtime: when, data: []byte("long name")},
		{name: "odd/Ünïcode and blanks", mode: 0o755, mtime: when, data: bytes.Repeat([]byte("0123456789abcde\n"), 1<<16)},
		{name: "odd/link", mode: fs.ModeSymlink | 0o777, mtime: when, link: "../odd/empty"},
		{name: "odd/long link", mode: fs.ModeSymlink | 0o777, mtime: when, link: strings.Repeat("a/", 1500) + "b"},
		{name: "odd/second name", mode: 0o444, mtime: when, data: []byte("x"), same: "odd/read-only"},
		{name: "odd/empty directory", mode: fs.ModeDir | 0o700, mtime: time.Unix(1, 0)},
	}
}

// writeTar makes an archive of the items.
func writeTar(t testing.TB, path string, items []item) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	for _, it := range items {
		h := &tar.Header{Name: it.name, Mode: int64(it.mode.Perm()), ModTime: it.mtime, Format: tar.FormatPAX, Uid: os.Getuid(), Gid: os.Getgid()}
		switch {
		case it.same != "":
			h.Typeflag, h.Linkname = tar.TypeLink, it.same
		case it.mode.IsDir():
			h.Typeflag = tar.TypeDir
		case it.mode.Type() == fs.ModeSymlink:
			h.Typeflag, h.Linkname = tar.TypeSymlink, it.link
		default:
			h.Typeflag, h.Size = tar.TypeReg, int64(len(it.data))
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatalf("%s: %v", it.name, err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(it.data); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// copyTree writes the items below dir without times.
func copyTree(t testing.TB, dir string, items []item) {
	t.Helper()
	for _, it := range items {
		path := filepath.Join(dir, it.name)
		var err error
		switch {
		case it.mode.IsDir():
			err = os.MkdirAll(path, it.mode.Perm())
		case it.mode.Type() == fs.ModeSymlink:
			err = os.Symlink(it.link, path)
		default:
			err = os.WriteFile(path, it.data, it.mode.Perm())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// compare wants below dir exactly the items. Modes and times are compared if
// exact. Names in skip, and what is below them, are not looked at.
func compare(t testing.TB, dir string, items []item, exact bool, skip ...string) {
	t.Helper()
	faults := 0
	fault := func(format string, args ...any) {
		t.Helper()
		if faults++; faults <= 20 {
			t.Errorf(format, args...)
		}
	}
	want := make(map[string]item, len(items))
	for _, it := range items {
		want[it.name] = it
	}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		rel := strings.TrimPrefix(path, dir+"/")
		if slices.Contains(skip, rel) {
			return fs.SkipDir
		}
		it, ok := want[rel]
		if !ok {
			fault("%s is there, but was never made", rel)
			return nil
		}
		delete(want, rel)
		fi, err := d.Info()
		if err != nil {
			return err
		}
		if fi.Mode().Type() != it.mode.Type() {
			fault("%s: type %v, want %v", rel, fi.Mode().Type(), it.mode.Type())
			return nil
		}
		if exact && (fi.Mode() != it.mode || !fi.ModTime().Equal(it.mtime)) {
			fault("%s: mode %v, time %v; want %v, %v", rel, fi.Mode(), fi.ModTime(), it.mode, it.mtime)
		}
		switch fi.Mode().Type() {
		case 0:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if int64(len(data)) != fi.Size() || !bytes.Equal(data, it.data) {
				fault("%s: %s (stat says %d bytes)", rel, difference(data, it.data), fi.Size())
			}
			if it.same != "" {
				first, err := os.Stat(filepath.Join(dir, it.same))
				if err != nil {
					return err
				}
				if !os.SameFile(first, fi) {
					fault("%s and %s are not the same file", rel, it.same)
				}
			}
		case fs.ModeSymlink:
			if link, err := os.Readlink(path); err != nil || link != it.link {
				fault("%s: links to %q (%v), want %q", rel, link, err, it.link)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range want {
		fault("%s is missing", name)
	}
	if faults > 0 {
		t.Fatalf("%d differences in %s", faults, dir)
	}
}

// difference says where two contents differ.
func difference(got, want []byte) string {
	n := min(len(got), len(want))
	for i := range n {
		if got[i] != want[i] {
			return fmt.Sprintf("%d bytes, want %d; byte %d is %#x, want %#x", len(got), len(want), i, got[i], want[i])
		}
	}
	return fmt.Sprintf("%d bytes, want %d, equal as far as both go", len(got), len(want))
}

// TestTree unpacks an archive of Go's source with tar, and compares all of it:
// at once, and after a clean restart.
func TestTree(t *testing.T) {
	i := newInstance(t)
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skip("skipped: there is no tar")
	}
	items := append(goTree(t), oddities()...)
	archive := filepath.Join(i.dir, "src.tar")
	writeTar(t, archive, items)
	i.up()
	tree := filepath.Join(i.mnt, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	// Archives store times of directories; tar sets them when it has filled them.
	must(t, "", "tar", "--no-same-owner", "-xpf", archive, "-C", tree)
	t.Logf("tar unpacked %d files in %v", len(items), time.Since(start).Round(time.Millisecond))
	compare(t, tree, items, true)
	i.down()
	i.fsck()
	i.up()
	start = time.Now()
	compare(t, tree, items, true)
	t.Logf("compared after a restart in %v", time.Since(start).Round(time.Millisecond))
	must(t, "", "rm", "-rf", tree)
	if left, err := os.ReadDir(i.mnt); err != nil || len(left) > 0 {
		t.Errorf("after rm -rf of all: %v, %v", left, err)
	}
	i.down()
	i.fsck()
}
