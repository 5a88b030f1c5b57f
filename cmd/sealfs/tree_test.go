package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sealfs/tree"
)

func TestRemoveTree(t *testing.T) {
	needFUSE(t)
	s := newSite(t)
	s.up(t, "--size", "256M")
	refused(t, []string{s.data, "not on SealFS", "--anywhere"}, "rmr", s.data)
	refused(t, []string{s.mount, "root of a mount"}, "rmr", s.mount)
	refused(t, []string{s.mount + "/none", "no such file"}, "rmr", s.mount+"/none")
	refused(t, []string{"--jobs"}, "rmr", "--jobs", "0", s.mount)
	ok(t, "rmr", "--force", s.mount+"/none")
	write(t, s.mount+"/kept", "kept")
	for i := range 5 {
		dir := fmt.Sprintf("%s/tree/d%d/e", s.mount, i)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for j := range 20 {
			write(t, fmt.Sprintf("%s/f%d", dir, j), "text")
		}
		if err := os.Symlink(s.mount+"/kept", dir+"/link"); err != nil {
			t.Fatal(err)
		}
	}
	var r removal
	if err := json.Unmarshal([]byte(ok(t, "rmr", "--json", "--jobs", "4", s.mount+"/tree/")), &r); err != nil || r.Files != 105 || r.Dirs != 11 || r.Failed != 0 {
		t.Errorf("rmr: %+v, %v", r, err)
	}
	if names, err := os.ReadDir(s.mount); err != nil || len(names) != 1 {
		t.Errorf("after rmr %v are left, %v", names, err)
	}
	read(t, s.mount+"/kept", "kept")
	ok(t, "rmr", "--anywhere", s.data+"/log/none", "--force")
}

// measured runs du for one path.
func measured(t *testing.T, args ...string) tree.Usage {
	t.Helper()
	var list []tree.Usage
	if err := json.Unmarshal([]byte(ok(t, append([]string{"du", "--json"}, args...)...)), &list); err != nil || len(list) == 0 {
		t.Fatalf("du %q: %v, %v", args, list, err)
	}
	return list[len(list)-1]
}

// TestTotals compares what directories tell, over several stores, with a walk.
func TestTotals(t *testing.T) {
	needFUSE(t)
	s := newSite(t)
	s.up(t, "--size", "128M", "--servers", "3")
	want := tree.Usage{Path: s.mount + "/tree"}
	for i := range 12 {
		dir := fmt.Sprintf("%s/tree/d%d/e", s.mount, i)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for j := range 5 {
			text := strings.Repeat("x", 100*i+j)
			write(t, fmt.Sprintf("%s/f%d", dir, j), text)
			want.Bytes += uint64(len(text))
			want.Files++
		}
		want.Dirs += 2
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	right := func() {
		t.Helper()
		var got tree.Usage
		eventually(t, fmt.Sprintf("du says %+v, not %+v", got, want), func() bool {
			got = measured(t, want.Path)
			return got == want
		})
		walk := tree.Usage{}
		must(filepath.WalkDir(want.Path, func(p string, e os.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				var fi os.FileInfo
				if fi, err = e.Info(); err == nil {
					walk.Bytes += uint64(fi.Size())
				}
			}
			return err
		}))
		if walk.Bytes != want.Bytes {
			t.Errorf("a walk finds %d bytes, not %d", walk.Bytes, want.Bytes)
		}
	}
	right()
	// Files and directories move, files get names elsewhere and other sizes there.
	must(os.Rename(s.mount+"/tree/d1/e/f1", s.mount+"/tree/d2/f1"))
	must(os.Rename(s.mount+"/tree/d3/e", s.mount+"/tree/d4/e3"))
	must(os.Rename(s.mount+"/tree/d5", s.mount+"/d5"))
	want.Files, want.Bytes, want.Dirs = want.Files-5, want.Bytes-5*500-10, want.Dirs-2
	must(os.Link(s.mount+"/tree/d2/f1", s.mount+"/tree/d6/f1"))
	must(os.Truncate(s.mount+"/tree/d6/f1", 5000))
	want.Files, want.Bytes = want.Files+1, want.Bytes+2*5000-101
	must(os.RemoveAll(s.mount + "/tree/d7"))
	want.Files, want.Bytes, want.Dirs = want.Files-5, want.Bytes-5*700-10, want.Dirs-2
	right()
	s.killAll(t)
	s.up(t)
	right()
	if got := measured(t, s.mount+"/tree/d2/f1"); got.Bytes != 5000 || got.Files != 1 {
		t.Errorf("du of a file: %+v", got)
	}
	if out := ok(t, "du", "-d", "1", "-b", s.mount+"/tree"); strings.Count(out, "\n") != 12 || !strings.Contains(out, fmt.Sprint(want.Bytes)) {
		t.Errorf("du -d 1:\n%s", out)
	}
	var b [20]byte
	n, err := unix.Getxattr(want.Path, "sealfs.dir.files", b[:])
	if err != nil || string(b[:n]) != fmt.Sprint(want.Files) {
		t.Errorf("getfattr: %q, %v", b[:n], err)
	}
	if err := unix.Setxattr(want.Path, "sealfs.dir.files", []byte("7"), 0); err != unix.EOPNOTSUPP {
		t.Errorf("setfattr: %v", err)
	}
	if got := measured(t, s.data); !got.Walked || got.Files == 0 {
		t.Errorf("du of another file system: %+v", got)
	}
	refused(t, []string{s.mount + "/none", "no such file"}, "du", s.mount+"/none")
	ok(t, "down", "--data", s.data)
	ok(t, "rmr", "--anywhere", "--force", s.mount+"/none")
}
