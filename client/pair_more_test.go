package client

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestMountsAgreeOnMore is TestMountsAgree for less usual calls; all look through descriptors, too, that stay open.
func TestMountsAgreeOnMore(t *testing.T) {
	p := startPair(t)
	rounds := 200
	if testing.Short() {
		rounds = 40
	}
	const size = 20_000
	var content []byte // what is in the file
	open := func(dir string, flags int) (*os.File, error) {
		return os.OpenFile(filepath.Join(dir, "f"), flags, 0o644)
	}
	change := func(dir string, flags int, fn func(f *os.File) error) error {
		f, err := open(dir, flags)
		if err != nil {
			return err
		}
		return errors.Join(fn(f), f.Close())
	}
	same := func(dir string, f *os.File) error {
		for _, from := range [...]func() ([]byte, error){
			func() ([]byte, error) { return os.ReadFile(filepath.Join(dir, "f")) },
			func() ([]byte, error) { b := make([]byte, size+10); n, err := f.ReadAt(b, 0); return b[:n], err },
		} {
			if b, err := from(); err != nil && err != io.EOF || !bytes.Equal(b, content) {
				return fmt.Errorf("%d bytes of %d, or others, %v", len(b), len(content), err)
			}
		}
		return nil
	}
	inode := func(path string) uint64 {
		var st unix.Stat_t
		if unix.Stat(path, &st) != nil {
			return 0
		}
		return st.Ino
	}
	var inodes [2]uint64
	for _, test := range []struct {
		name       string
		act, check func(dir string, f *os.File, i int) error
	}{
		{"hole", func(dir string, _ *os.File, i int) error {
			off := rand.IntN(size - 5000)
			if i%2 == 0 {
				fill := bytes.Repeat([]byte{byte(i)}, 5000)
				copy(content[off:], fill)
				return change(dir, os.O_RDWR, func(f *os.File) error { _, err := f.WriteAt(fill, int64(off)); return err })
			}
			clear(content[off : off+5000])
			return change(dir, os.O_RDWR, func(f *os.File) error {
				return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), 5000)
			})
		}, func(dir string, f *os.File, _ int) error { return same(dir, f) }},
		{"copy", func(dir string, f *os.File, i int) error {
			return change(dir, os.O_RDWR, func(f *os.File) error {
				from, to := int64(rand.IntN(4000)), int64(10_000+rand.IntN(4000))
				if i%3 == 0 {
					copy(content, fmt.Append(nil, i))
					if _, err := f.WriteAt(fmt.Append(nil, i), 0); err != nil {
						return err
					}
				}
				copy(content[to:], content[from:from+5000])
				n, err := unix.CopyFileRange(int(f.Fd()), &from, int(f.Fd()), &to, 5000, 0)
				if err == nil && n != 5000 {
					err = fmt.Errorf("%d bytes were copied", n)
				}
				return err
			})
		}, func(dir string, f *os.File, _ int) error { return same(dir, f) }},
		{"direct", func(dir string, f *os.File, i int) error {
			room := make([]byte, 8192)
			b := room[4096-int(uintptr(unsafe.Pointer(&room[0]))%4096):][:4096]
			for j := range b {
				b[j] = byte(i + j)
			}
			copy(content[4096:], b)
			return change(dir, os.O_RDWR|syscall.O_DIRECT, func(f *os.File) error { _, err := f.WriteAt(b, 4096); return err })
		}, func(dir string, f *os.File, _ int) error { return same(dir, f) }},
		{"mapping", func(dir string, f *os.File, i int) error {
			return change(dir, os.O_RDWR, func(f *os.File) error {
				m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
				if err != nil {
					return err
				}
				at := rand.IntN(size)
				m[at], content[at] = byte(i), byte(i)
				return errors.Join(unix.Msync(m, unix.MS_SYNC), unix.Munmap(m))
			})
		}, func(dir string, f *os.File, _ int) error { return same(dir, f) }},
		{"links", func(dir string, _ *os.File, i int) error {
			name := filepath.Join(dir, "l")
			if i%2 == 0 {
				return os.Link(filepath.Join(dir, "f"), name)
			}
			return os.Remove(name)
		}, func(dir string, f *os.File, i int) error {
			var byFile, byName unix.Stat_t
			err := errors.Join(unix.Fstat(int(f.Fd()), &byFile), unix.Stat(filepath.Join(dir, "f"), &byName))
			if want := uint64(2 - i%2); err != nil || uint64(byFile.Nlink) != want || uint64(byName.Nlink) != want || byFile.Ctim != byName.Ctim {
				return fmt.Errorf("%d, %d links of %d, %v", byFile.Nlink, byName.Nlink, want, err)
			}
			return nil
		}},
		{"replace", func(dir string, _ *os.File, i int) error {
			name := filepath.Join(dir, "new")
			if err := os.WriteFile(name, fmt.Append(nil, i), 0o644); err != nil {
				return err
			}
			return os.Rename(name, filepath.Join(dir, "r"))
		}, func(dir string, _ *os.File, i int) error {
			b, err := os.ReadFile(filepath.Join(dir, "r"))
			if err != nil || string(b) != fmt.Sprint(i) || inode(filepath.Join(dir, "new")) != 0 {
				return fmt.Errorf("%q, %v", b, err)
			}
			return nil
		}},
		{"exchange", func(dir string, _ *os.File, i int) error {
			a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
			if i == 0 {
				if err := errors.Join(os.MkdirAll(filepath.Join(a, "x"), 0o755), os.Mkdir(b, 0o755)); err != nil {
					return err
				}
				inodes = [2]uint64{inode(a), inode(b)}
				return nil
			}
			inodes[0], inodes[1] = inodes[1], inodes[0]
			return unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
		}, func(dir string, _ *os.File, i int) error {
			a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
			x, y := inode(filepath.Join(a, "x")) != 0, inode(filepath.Join(b, "x")) != 0
			if inode(a) != inodes[0] || inode(b) != inodes[1] || x != (i%2 == 0) || y == x {
				return fmt.Errorf("the directories are %v, %v", x, y)
			}
			return nil
		}},
		{"tmpfile", func(dir string, _ *os.File, i int) error {
			name := filepath.Join(dir, "t")
			if i%2 == 1 {
				return os.Remove(name)
			}
			fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_WRONLY, 0o600)
			if err != nil {
				return err
			}
			_, err = unix.Write(fd, fmt.Append(nil, i))
			if err == nil {
				err = unix.Linkat(unix.AT_FDCWD, fmt.Sprint("/proc/self/fd/", fd), unix.AT_FDCWD, name, unix.AT_SYMLINK_FOLLOW)
			}
			return errors.Join(err, unix.Close(fd))
		}, func(dir string, _ *os.File, i int) error {
			b, err := os.ReadFile(filepath.Join(dir, "t"))
			if i%2 == 0 && (err != nil || string(b) != fmt.Sprint(i)) || i%2 == 1 && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("%q, %v", b, err)
			}
			return nil
		}},
		{"symlink", func(dir string, _ *os.File, i int) error {
			name := filepath.Join(dir, "s")
			os.Remove(name)
			return os.Symlink(fmt.Sprint(i), name)
		}, func(dir string, _ *os.File, i int) error {
			if to, err := os.Readlink(filepath.Join(dir, "s")); err != nil || to != fmt.Sprint(i) {
				return fmt.Errorf("%q, %v", to, err)
			}
			return nil
		}},
		{"move directory", func(dir string, _ *os.File, i int) error {
			name := func(i int) string { return filepath.Join(dir, fmt.Sprint("p", i%3), "d") }
			if i == 0 {
				return errors.Join(os.MkdirAll(filepath.Join(name(0), "x"), 0o755), os.Mkdir(filepath.Dir(name(1)), 0o755), os.Mkdir(filepath.Dir(name(2)), 0o755))
			}
			return os.Rename(name(i-1), name(i))
		}, func(dir string, _ *os.File, i int) error {
			for j := range 3 {
				var st unix.Stat_t
				p := filepath.Join(dir, fmt.Sprint("p", j))
				if err := unix.Stat(p, &st); err != nil {
					return err
				}
				err := unix.Stat(filepath.Join(p, "d", "x"), new(unix.Stat_t))
				if err != nil && err != unix.ENOENT {
					return err
				}
				there, links := err == nil, uint64(st.Nlink)
				up := inode(p+"/d/x/../..") == st.Ino
				if want := j == i%3; there != want || links != map[bool]uint64{true: 3, false: 2}[want] || up != want {
					return fmt.Errorf("%d: there %v, %d links, .. is it %v", j, there, links, up)
				}
			}
			return nil
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			content = make([]byte, size)
			sub := strings.ReplaceAll(test.name, " ", "-")
			if err := os.Mkdir(filepath.Join(p.dirs[0], sub), 0o755); err != nil {
				t.Fatal(err)
			}
			var files [2]*os.File
			for i, dir := range p.dirs {
				if i == 0 {
					if err := os.WriteFile(filepath.Join(dir, sub, "f"), content, 0o644); err != nil {
						t.Fatal(err)
					}
				}
				var err error
				if files[i], err = open(filepath.Join(dir, sub), os.O_RDONLY); err != nil {
					t.Fatal(err)
				}
				defer files[i].Close()
			}
			for i := range rounds {
				actor := rand.IntN(2)
				if err := test.act(filepath.Join(p.dirs[actor], sub), files[actor], i); err != nil {
					t.Fatalf("round %d, mount %d: %v", i, actor, err)
				}
				for _, looker := range []int{1 - actor, actor} {
					if err := test.check(filepath.Join(p.dirs[looker], sub), files[looker], i); err != nil {
						t.Fatalf("round %d by mount %d, seen by mount %d: %v", i, actor, looker, err)
					}
				}
			}
		})
	}
}
