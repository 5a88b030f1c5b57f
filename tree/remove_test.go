package tree

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"sealfs"
)

func mkdir(t *testing.T, path ...string) string {
	t.Helper()
	p := filepath.Join(path...)
	if err := os.MkdirAll(p, 0o755); err != nil {
		t.Fatal(err)
	}
	return p
}

func touch(t *testing.T, path ...string) string {
	t.Helper()
	p := filepath.Join(path...)
	if err := os.WriteFile(p, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	return p
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// openFiles counts the file descriptors of this process.
func openFiles(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// grow makes a tree of so many levels, and returns what is in it.
func grow(t *testing.T, at string, levels, dirs, files int) (nDirs, nFiles int64) {
	t.Helper()
	mkdir(t, at)
	nDirs = 1
	for i := range files {
		touch(t, at, fmt.Sprint("file", i))
	}
	nFiles = int64(files)
	for i := range dirs {
		if levels > 0 {
			d, f := grow(t, filepath.Join(at, fmt.Sprint("dir", i)), levels-1, dirs, files)
			nDirs, nFiles = nDirs+d, nFiles+f
		}
	}
	return nDirs, nFiles
}

func TestRemove(t *testing.T) {
	for _, jobs := range []int{1, 2, 8} {
		base := t.TempDir()
		before := openFiles(t)
		dirs, files := grow(t, base+"/a", 3, 6, 7)
		outside := touch(t, base, "outside")
		mkdir(t, base, "linked")
		inside := touch(t, base, "linked/inside")
		for i, target := range []string{outside, base + "/linked", "nowhere"} {
			if err := os.Symlink(target, fmt.Sprintf("%s/a/dir2/link%d", base, i)); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink(base+"/linked", base+"/top"); err != nil {
			t.Fatal(err)
		}
		single := touch(t, base, "single")
		var n Removed
		if err := Remove(t.Context(), Options{Jobs: jobs}, []string{base + "/a/", single, base + "/top"}, &n); err != nil {
			t.Fatal(err)
		}
		if d, f := n.Dirs.Load(), n.Files.Load(); d != dirs || f != files+3+2 || n.Failed.Load() != 0 {
			t.Errorf("%d jobs: %d directories and %d files were removed, want %d and %d", jobs, d, f, dirs, files+5)
		}
		if exists(base+"/a") || exists(single) || exists(base+"/top") || !exists(outside) || !exists(inside) {
			t.Errorf("%d jobs: not what was to go is gone", jobs)
		}
		if after := openFiles(t); after != before {
			t.Errorf("%d jobs: %d descriptors are open, %d were before", jobs, after, before)
		}
	}
}

// TestRemoveDeep removes a tree that is deeper than directories may be open, and than a
// path can say.
func TestRemoveDeep(t *testing.T) {
	for _, jobs := range []int{1, 3} {
		base := t.TempDir()
		fd, err := unix.Open(mkdir(t, base, "deep"), unix.O_RDONLY|unix.O_DIRECTORY, 0)
		const levels = 2 * openMax
		for range levels {
			for _, name := range []string{"a", "bbb", "c"} {
				if err == nil {
					err = unix.Mkdirat(fd, name, 0o755)
				}
			}
			var next int
			if err == nil {
				next, err = unix.Openat(fd, "bbb", unix.O_RDONLY|unix.O_DIRECTORY, 0)
			}
			if err != nil {
				t.Fatal(err)
			}
			unix.Close(fd)
			fd = next
		}
		unix.Close(fd)
		var n Removed
		if err := Remove(t.Context(), Options{Jobs: jobs}, []string{base + "/deep"}, &n); err != nil {
			t.Fatalf("%d jobs: %.300s", jobs, err.Error())
		}
		if d := n.Dirs.Load(); d != 3*levels+1 || exists(base+"/deep") {
			t.Errorf("%d jobs: %d directories of %d were removed", jobs, d, 3*levels+1)
		}
	}
}

func TestRemoveRefuses(t *testing.T) {
	base := t.TempDir()
	file := touch(t, base, "file")
	t.Chdir(base)
	before := openFiles(t)
	for path, want := range map[string]error{
		"/": sealfs.ErrInvalid, ".": sealfs.ErrInvalid, "..": sealfs.ErrInvalid, "": sealfs.ErrInvalid, base + "/.": sealfs.ErrInvalid,
		"/proc": sealfs.ErrBusy, file + "/": unix.ENOTDIR, file + "/x": unix.ENOTDIR, base + "/none": unix.ENOENT, base + "/none/x": unix.ENOENT,
	} {
		var n Removed
		err := Remove(t.Context(), Options{Jobs: 2}, []string{path}, &n)
		if !errors.Is(err, want) || !strings.Contains(err.Error(), strings.TrimSuffix(path, "/")) || n.Failed.Load() != 1 {
			t.Errorf("%q: %v, want %v", path, err, want)
		}
	}
	refusal := errors.New("no")
	o := Options{Jobs: 2, Force: true, Allow: func(path string, dev uint64) error { return refusal }}
	if err := Remove(t.Context(), o, []string{"file"}, new(Removed)); err != refusal || !exists(file) {
		t.Errorf("a device that is not allowed: %v", err)
	}
	if err := Remove(t.Context(), o, []string{base + "/none", base + "/none/x"}, new(Removed)); err != nil {
		t.Errorf("with force, of what does not exist: %v", err)
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d descriptors are open, %d were before", after, before)
	}
}

// TestRemoveGoesOn meets what cannot be removed: all else goes, and what stays is named.
func TestRemoveGoesOn(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: needs root, to mount")
	}
	base := t.TempDir()
	_, files := grow(t, base+"/a", 2, 3, 5)
	point := mkdir(t, base, "a/dir1/dir1/mounted")
	if err := unix.Mount("none", point, "tmpfs", 0, ""); err != nil {
		t.Skipf("SKIPPED: no mounts here: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(point, unix.MNT_DETACH) })
	touch(t, point, "other")
	var told []error
	var n Removed
	o := Options{Jobs: 3, Failed: func(err error) { told = append(told, err) }}
	err := Remove(t.Context(), o, []string{base + "/a"}, &n)
	if !errors.Is(err, sealfs.ErrBusy) || !strings.Contains(err.Error(), point) || len(told) != 1 || n.Failed.Load() != 1 {
		t.Errorf("%v, told %v", err, told)
	}
	if f, d := n.Files.Load(), n.Dirs.Load(); f != files || d != 10 || !exists(point+"/other") {
		t.Errorf("%d files and %d directories were removed", f, d)
	}
}

// TestRemoveEnds ends a removal, after which all that was counted is gone and nothing else.
func TestRemoveEnds(t *testing.T) {
	base := t.TempDir()
	before := openFiles(t)
	_, files := grow(t, base+"/a", 3, 6, 7)
	ctx, cancel := context.WithCancel(t.Context())
	var n Removed
	o := Options{Jobs: 4, Allow: func(string, uint64) error { cancel(); return nil }}
	if err := Remove(ctx, o, []string{base + "/a"}, &n); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	left := int64(0)
	filepath.WalkDir(base, func(_ string, e fs.DirEntry, _ error) error {
		if !e.IsDir() {
			left++
		}
		return nil
	})
	if left+n.Files.Load() != files || openFiles(t) != before {
		t.Errorf("%d files are left, %d were removed of %d; %d descriptors, %d were before", left, n.Files.Load(), files, openFiles(t), before)
	}
}

// TestRemoveMoved renames directories of the tree while it is removed, and puts links in
// their place: nothing outside is ever touched, and the end comes.
func TestRemoveMoved(t *testing.T) {
	base := t.TempDir()
	keep := mkdir(t, base, "keep")
	for i := range 50 {
		touch(t, keep, fmt.Sprint("file", i))
	}
	for round := range 10 {
		grow(t, base+"/a", 3, 4, 5)
		var stop atomic.Bool
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for i := 0; !stop.Load(); i++ {
				for _, d := range []string{"dir0", "dir1/dir2", "dir3/dir3/dir0"} {
					from, to := base+"/a/"+d, fmt.Sprintf("%s/moved-%d-%d", base, round, i)
					if os.Rename(from, to) == nil {
						os.Symlink(keep, from)
					}
				}
			}
		}()
		var n Removed
		err := Remove(t.Context(), Options{Jobs: 4}, []string{base + "/a"}, &n)
		stop.Store(true)
		<-ended
		if err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, sealfs.ErrStale) {
			t.Fatal(err)
		}
		if names, err := os.ReadDir(keep); err != nil || len(names) != 50 {
			t.Fatalf("outside of the tree %d of 50 files are left, %v", len(names), err)
		}
		os.RemoveAll(base + "/a")
	}
}
