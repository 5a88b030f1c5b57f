package client

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"golang.org/x/sys/unix"

	"sealfs"
)

func TestPosix(t *testing.T) {
	s := startServer(t)
	for name, test := range posixtest.All {
		t.Run(name, func(t *testing.T) {
			if name == "FcntlFlockLocksFile" {
				t.Skip("it wants a process to be refused its own POSIX lock, which no local file system does")
			}
			// Each expects an empty directory of its own.
			dir := filepath.Join(s.dir, name)
			if err := os.Mkdir(dir, 0o777); err != nil {
				t.Fatal(err)
			}
			test(t, dir)
		})
	}
}

func TestMountShowsAsSealFS(t *testing.T) {
	s := startServer(t)
	at, err := findMount(s.dir)
	if err != nil || at == nil || at.fsType != "fuse.sealfs" || at.source != "sealfs:test" {
		t.Fatalf("%+v, %v", at, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil || st.Bsize != 4096 || st.Namelen != 255 || st.Blocks == 0 {
		t.Fatalf("%+v, %v", st, err)
	}
	fd, err := unix.Open(s.dir, unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	const fsGetFlags, unknown = 0x80086601, 0x5801
	for _, cmd := range []uint{fsGetFlags, unknown} {
		if _, err := unix.IoctlGetInt(fd, cmd); err != unix.ENOTTY {
			t.Errorf("ioctl %#x: %v", cmd, err)
		}
	}
}

// TestCalls runs system calls with the answers that Linux gives on a local file system.
func TestCalls(t *testing.T) {
	s := startServer(t)
	dir := filepath.Join(s.dir, "d")
	p := func(name string) string { return filepath.Join(dir, name) }
	long := strings.Repeat("n", 256)
	at := unix.AT_FDCWD
	for _, test := range []struct {
		name string
		do   func() error
		want error
	}{
		{"mkdir", func() error { return unix.Mkdir(dir, 0o755) }, nil},
		{"mkdir again", func() error { return unix.Mkdir(dir, 0o755) }, unix.EEXIST},
		{"mkdir a", func() error { return unix.Mkdir(p("a"), 0o755) }, nil},
		{"mkdir a/b", func() error { return unix.Mkdir(p("a/b"), 0o755) }, nil},
		{"file", func() error { return os.WriteFile(p("f"), []byte("f"), 0o644) }, nil},
		{"file g", func() error { return os.WriteFile(p("g"), []byte("g"), 0o644) }, nil},
		{"long name", func() error { return unix.Mkdir(p(long), 0o755) }, unix.ENAMETOOLONG},
		{"longest name", func() error { return unix.Mkdir(p(long[1:]), 0o755) }, nil},
		{"rmdir not empty", func() error { return unix.Rmdir(p("a")) }, unix.ENOTEMPTY},
		{"rmdir a file", func() error { return unix.Rmdir(p("f")) }, unix.ENOTDIR},
		{"unlink a directory", func() error { return unix.Unlink(p("a")) }, unix.EISDIR},
		{"below a file", func() error { return unix.Mkdir(p("f/x"), 0o755) }, unix.ENOTDIR},
		{"link", func() error { return unix.Link(p("f"), p("l")) }, nil},
		{"link to a directory", func() error { return unix.Link(p("a"), p("l2")) }, unix.EPERM},
		{"link exists", func() error { return unix.Link(p("f"), p("g")) }, unix.EEXIST},
		{"rename to another link", func() error { return unix.Rename(p("f"), p("l")) }, nil},
		{"both links stay", func() error { return unix.Access(p("f"), unix.F_OK) }, nil},
		{"rename below itself", func() error { return unix.Rename(p("a"), p("a/b/c")) }, unix.EINVAL},
		{"rename over its parent", func() error { return unix.Rename(p("a/b"), p("a")) }, unix.ENOTEMPTY},
		{"rename directory over file", func() error { return unix.Rename(p("a"), p("f")) }, unix.ENOTDIR},
		{"rename file over directory", func() error { return unix.Rename(p("f"), p("a")) }, unix.EISDIR},
		{"noreplace", func() error { return unix.Renameat2(at, p("f"), at, p("g"), unix.RENAME_NOREPLACE) }, unix.EEXIST},
		{"noreplace to a new name", func() error { return unix.Renameat2(at, p("g"), at, p("g2"), unix.RENAME_NOREPLACE) }, nil},
		{"exchange", func() error { return unix.Renameat2(at, p("g2"), at, p("a"), unix.RENAME_EXCHANGE) }, nil},
		{"exchanged", func() error { return unix.Rmdir(p("g2/b")) }, nil},
		{"exchange with nothing", func() error { return unix.Renameat2(at, p("a"), at, p("no"), unix.RENAME_EXCHANGE) }, unix.ENOENT},
		{"whiteout", func() error { return unix.Renameat2(at, p("a"), at, p("no"), unix.RENAME_WHITEOUT) }, unix.EINVAL},
		{"symlink", func() error { return unix.Symlink(strings.Repeat("x", 4095), p("s")) }, nil},
		{"readlink", func() error {
			if l, err := os.Readlink(p("s")); err != nil || len(l) != 4095 {
				return fmt.Errorf("%d bytes, %v", len(l), err)
			}
			return nil
		}, nil},
		{"fifo", func() error { return unix.Mkfifo(p("fifo"), 0o600) }, nil},
		{"socket", func() error { return unix.Mknod(p("sock"), unix.S_IFSOCK|0o600, 0) }, nil},
		{"no such attribute", func() error { _, err := unix.Getxattr(p("f"), "user.no", nil); return err }, unix.ENODATA},
		{"no ACL", func() error { _, err := unix.Getxattr(p("f"), "system.posix_acl_access", nil); return err }, unix.ENODATA},
		{"no such namespace", func() error { _, err := unix.Getxattr(p("f"), "system.other", nil); return err }, unix.EOPNOTSUPP},
		{"remove no ACL", func() error { return unix.Removexattr(p("f"), "system.posix_acl_access") }, nil},
		{"default ACL of a file", func() error { return unix.Setxattr(p("f"), "system.posix_acl_default", plainACL, 0) }, unix.EACCES},
		{"no valid ACL", func() error { return unix.Setxattr(p("f"), "system.posix_acl_access", plainACL[:12], 0) }, unix.EINVAL},
		{"minimal ACL", func() error { return unix.Setxattr(p("f"), "system.posix_acl_access", plainACL, 0) }, nil},
		{"it is the mode", func() error { _, err := unix.Getxattr(p("f"), "system.posix_acl_access", nil); return err }, unix.ENODATA},
		{"attribute", func() error { return unix.Setxattr(p("f"), "user.a", []byte("value"), 0) }, nil},
		{"attribute exists", func() error { return unix.Setxattr(p("f"), "user.a", nil, unix.XATTR_CREATE) }, unix.EEXIST},
		{"attribute replaced", func() error { return unix.Setxattr(p("f"), "user.n", nil, unix.XATTR_REPLACE) }, unix.ENODATA},
		{"attribute too small", func() error { _, err := unix.Getxattr(p("f"), "user.a", make([]byte, 2)); return err }, unix.ERANGE},
		{"large attribute", func() error { return unix.Setxattr(p("f"), "user.big", make([]byte, 65536), 0) }, nil},
		{"too large attribute", func() error { return unix.Setxattr(p("f"), "user.big", make([]byte, 65537), 0) }, unix.E2BIG},
		{"truncate a directory", func() error { return unix.Truncate(p("g2"), 0) }, unix.EISDIR},
		{"truncate far", func() error { return unix.Truncate(p("f"), 1<<62) }, nil},
	} {
		if err := test.do(); !errors.Is(err, test.want) && err != test.want {
			t.Errorf("%s: %v, want %v", test.name, err, test.want)
		}
	}
}

func TestTimesAndModes(t *testing.T) {
	s := startServer(t)
	name := filepath.Join(s.dir, "f")
	old := syscall.Umask(0o027)
	err := os.WriteFile(name, []byte("x"), 0o777)
	syscall.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	stat := func() unix.Stat_t {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil {
			t.Fatal(err)
		}
		return st
	}
	if st := stat(); st.Mode != unix.S_IFREG|0o750 {
		t.Fatalf("mode %o with umask 027", st.Mode)
	}
	for _, ns := range []int64{-1_500_000_001, 0, 1, 1<<33*1e9 + 999_999_999} {
		ts := []unix.Timespec{unix.NsecToTimespec(ns), unix.NsecToTimespec(ns + 1)}
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, name, ts, 0); err != nil {
			t.Fatal(err)
		}
		if st := stat(); st.Atim != ts[0] || st.Mtim != ts[1] {
			t.Errorf("%v %v, want %v", st.Atim, st.Mtim, ts)
		}
	}
	// A time that was set survives a delayed write that came before it.
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteString("delayed")
	ts := []unix.Timespec{{Sec: 7}, {Sec: 8}}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, name, ts, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if st := stat(); st.Mtim != ts[1] || st.Size != 7 {
		t.Errorf("time %v, size %d", st.Mtim, st.Size)
	}
	var sx unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, name, 0, unix.STATX_BTIME, &sx); err != nil || sx.Mask&unix.STATX_BTIME == 0 || sx.Btime.Sec < 1e9 {
		t.Errorf("birth time: %+v, %v", sx.Btime, err)
	}
}

func TestSetgidDirectory(t *testing.T) {
	s := startServer(t)
	if os.Geteuid() != 0 {
		t.Skip("only root can give a directory another group")
	}
	dir := filepath.Join(s.dir, "d")
	var st unix.Stat_t
	for _, err := range []error{
		os.Mkdir(dir, 0o755), os.Chown(dir, 0, 1234), unix.Chmod(dir, 0o2777),
		os.Mkdir(dir+"/sub", 0o755), unix.Stat(dir+"/sub", &st),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if st.Gid != 1234 || st.Mode&0o7777 != 0o2755 {
		t.Errorf("group %d, mode %o", st.Gid, st.Mode)
	}
}

// TestPrivilegesAreLost checks who loses setuid bits and capabilities, by a write of
// somebody else, also past the page cache.
func TestPrivilegesAreLost(t *testing.T) {
	s := startServer(t)
	if os.Geteuid() != 0 {
		t.Skip("needs another user")
	}
	if err := os.Chmod(s.dir, 0o777); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(s.dir, "f")
	mode := func() uint32 {
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil {
			t.Fatal(err)
		}
		return st.Mode & 0o7777
	}
	for _, how := range []string{"printf x >> f", "printf x 1<>f", "truncate -s 3 f", ": > f", "dd if=/dev/zero of=f bs=4096 count=1 oflag=direct conv=notrunc status=none"} {
		if err := os.WriteFile(name, []byte("12345"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := unix.Chmod(name, 0o6777); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("sh", "-c", how)
		cmd.Dir = s.dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v %s", how, err, out)
		}
		if m := mode(); m != 0o777 {
			t.Errorf("%s: mode %o", how, m)
		}
	}
	// Version 2 of a capability set, empty, is the shortest valid one.
	value := append([]byte{0, 0, 0, 2}, make([]byte, 16)...)
	set := func() {
		t.Helper()
		if err := unix.Setxattr(name, capability, value, 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, flags := range []int{os.O_WRONLY, os.O_RDWR, os.O_WRONLY | unix.O_DIRECT} {
		set()
		f, err := os.OpenFile(name, flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(alignedBlock()); err != nil {
			t.Fatal(err)
		}
		f.Close()
		if _, err := unix.Getxattr(name, capability, nil); err != unix.ENODATA {
			t.Errorf("flags %#x: capabilities survive a write: %v", flags, err)
		}
	}
	// A new file that gets capabilities while it is still open, past the page cache.
	os.Remove(name)
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	set()
	if _, err := f.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Getxattr(name, capability, nil); err != unix.ENODATA {
		t.Errorf("new file: capabilities survive a write: %v", err)
	}
}

// alignedBlock returns 4 KiB that O_DIRECT takes.
func alignedBlock() []byte {
	b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(err)
	}
	return b
}

func TestAppendersAndReadersShareAFile(t *testing.T) {
	s := startServer(t)
	name := filepath.Join(s.dir, "log")
	var files []*os.File
	for range 3 {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	r, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var want []byte
	for i := range 300 {
		line := fmt.Appendf(nil, "%d %s\n", i, strings.Repeat("x", i%50))
		if _, err := files[i%3].Write(line); err != nil {
			t.Fatal(err)
		}
		want = append(want, line...)
		if i%7 == 0 {
			got := make([]byte, len(want)+1)
			if n, _ := r.ReadAt(got, 0); !bytes.Equal(got[:n], want) {
				t.Fatalf("after %d lines: %d bytes, want %d", i, n, len(want))
			}
		}
		if info, err := os.Stat(name); err != nil || info.Size() != int64(len(want)) {
			t.Fatalf("size %d, want %d", info.Size(), len(want))
		}
	}
}

func TestMappings(t *testing.T) {
	s := startServer(t)
	name := filepath.Join(s.dir, "m")
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(16 << 10); err != nil {
		t.Fatal(err)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, 16<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	copy(m[5000:], "mapped")
	if err := unix.Msync(m, unix.MS_SYNC); err != nil {
		t.Fatal(err)
	}
	if err := unix.Munmap(m); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(name)
	if err != nil || string(b[5000:5006]) != "mapped" {
		t.Fatalf("%v, %q", err, b[5000:5006])
	}
}

// TestReopenSeesOthersWrites changes a file through a second mount of the same
// volume: whoever opens the file afterwards must see it, cache or not.
func TestReopenSeesOthersWrites(t *testing.T) {
	needFUSE(t)
	h, root := newModel()
	var dirs [2]string
	for i := range dirs {
		c := New(h, Options{Volume: 1, Root: root, Shards: testShards})
		m, err := Mount(context.Background(), c, MountOptions{Dir: mountDir(t), Name: "two"})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Unmount()
		dirs[i] = m.Dir()
	}
	// Programs of their own use the mounts, which this process serves.
	script := `
		for i in 1 2 3 4 5 6 7 8; do
			echo $i-one > $A/f; cat $A/f > /dev/null; cat $A/f > /dev/null
			test "$(cat $B/f)" = $i-one || { echo "B: $(cat $B/f) in round $i"; exit 1; }
			echo $i-two > $B/f
			test "$(cat $A/f)" = $i-two || { echo "A: $(cat $A/f) in round $i"; exit 1; }
		done`
	cmd := exec.Command("sh", "-c", script)
	cmd.Env = append(os.Environ(), "A="+dirs[0], "B="+dirs[1])
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// TestRandomCallsMatchLocalFileSystem does the same random calls below the mount
// and in a local directory, and compares every answer and then the trees.
func TestRandomCallsMatchLocalFileSystem(t *testing.T) {
	t.Run("model", func(t *testing.T) { randomCalls(t, startServer(t), *randomSteps) })
	t.Run("engine", func(t *testing.T) { randomCalls(t, startEngine(t), *randomSteps) })
	t.Run("net", func(t *testing.T) { randomCalls(t, startNet(t), *randomSteps/4) })
}

var randomSteps = flag.Int("steps", 6000, "calls that TestRandomCallsMatchLocalFileSystem compares")

var permissionSteps = flag.Int("permissions", 6000, "calls that TestPermissionsLikeLocal compares")

func randomCalls(t *testing.T, s *server, steps int) {
	local, err := os.MkdirTemp("/dev/shm", "sealfs-local-")
	if err != nil {
		local = t.TempDir()
	}
	defer os.RemoveAll(local)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	a := &caller{dir: local, rng: rand.New(rand.NewPCG(seed, 0)), files: map[int]*os.File{}}
	b := &caller{dir: s.dir, rng: rand.New(rand.NewPCG(seed, 0)), files: map[int]*os.File{}}
	defer a.close()
	defer b.close()
	for i := range steps {
		want, got := a.step(), b.step()
		if got != want {
			t.Fatalf("step %d:\nmount: %s\nlocal: %s", i, got, want)
		}
		if i%1000 == 999 {
			want, got := tree(t, local), tree(t, s.dir)
			if !slices.Equal(got, want) {
				t.Fatalf("after step %d:\nmount: %s\nlocal: %s", i, strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		}
	}
}

// caller does random calls in a directory.
type caller struct {
	dir   string
	rng   *rand.Rand
	files map[int]*os.File
}

func (c *caller) close() {
	for _, f := range c.files {
		f.Close()
	}
}

// name returns a path of up to three parts out of few names.
func (c *caller) name() string {
	p := c.dir
	for range 1 + c.rng.IntN(3) {
		p = filepath.Join(p, string(rune('a'+c.rng.IntN(4))))
	}
	return p
}

// step does a call and tells it with its outcome, without the directory.
func (c *caller) step() string {
	told := c.call()
	return strings.ReplaceAll(told, c.dir, "")
}

func (c *caller) call() string {
	errno := func(err error) string {
		var e syscall.Errno
		if errors.As(err, &e) {
			return e.Error()
		}
		return fmt.Sprint(err)
	}
	slot := c.rng.IntN(6)
	f := c.files[slot]
	p, q := c.name(), c.name()
	off, n := int64(c.rng.IntN(200_000)), 1+c.rng.IntN(20_000)
	if c.rng.IntN(3) == 0 {
		n = 1 + c.rng.IntN(10)
	}
	flags := []int{os.O_RDONLY, os.O_WRONLY, os.O_RDWR}[c.rng.IntN(3)]
	for _, fl := range []int{os.O_CREATE, os.O_TRUNC, os.O_EXCL, os.O_APPEND} {
		if c.rng.IntN(3) == 0 {
			flags |= fl
		}
	}
	kind, fill := c.rng.IntN(24), byte(c.rng.IntN(256))
	switch kind {
	case 0, 1, 2:
		if f != nil {
			err := f.Close()
			delete(c.files, slot)
			return "close " + errno(err)
		}
		f, err := os.OpenFile(p, flags, 0o644)
		if err == nil {
			if info, _ := f.Stat(); info.IsDir() {
				f.Close()
				return fmt.Sprintf("open %s %#x directory", p, flags)
			}
			c.files[slot] = f
		}
		return fmt.Sprintf("open %s %#x %s", p, flags, errno(err))
	case 3, 4, 5:
		if f == nil {
			return ""
		}
		n, err := unix.Pwrite(int(f.Fd()), bytes.Repeat([]byte{fill}, n), off)
		return fmt.Sprintf("pwrite at %d: %d %s", off, n, errno(err))
	case 6, 7:
		if f == nil {
			return ""
		}
		n, err := f.Write(bytes.Repeat([]byte{fill}, n))
		return fmt.Sprintf("write %d %s", n, errno(err))
	case 8, 9:
		if f == nil {
			return ""
		}
		b := make([]byte, n)
		n, err := unix.Pread(int(f.Fd()), b, off)
		return fmt.Sprintf("pread at %d: %d %s %x", off, n, errno(err), sum(b[:max(n, 0)]))
	case 10:
		if f == nil {
			return ""
		}
		return fmt.Sprintf("ftruncate %d %s", off, errno(f.Truncate(off)))
	case 11:
		if f == nil {
			return ""
		}
		var st unix.Stat_t
		err := unix.Fstat(int(f.Fd()), &st)
		return fmt.Sprintf("fstat %o %d links, %d bytes, %s", st.Mode, st.Nlink, st.Size, errno(err))
	case 12:
		if f == nil {
			return ""
		}
		mode := []uint32{0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE}[c.rng.IntN(3)]
		return fmt.Sprintf("fallocate %d at %d +%d: %s", mode, off, n, errno(unix.Fallocate(int(f.Fd()), mode, off, int64(n))))
	case 13:
		return fmt.Sprintf("mkdir %s %s", p, errno(unix.Mkdir(p, 0o755)))
	case 14:
		return fmt.Sprintf("rmdir %s %s", p, errno(unix.Rmdir(p)))
	case 15:
		return fmt.Sprintf("unlink %s %s", p, errno(unix.Unlink(p)))
	case 16, 17:
		return fmt.Sprintf("rename %s %s %s", p, q, errno(unix.Rename(p, q)))
	case 18:
		return fmt.Sprintf("link %s %s %s", p, q, errno(unix.Link(p, q)))
	case 19:
		return fmt.Sprintf("symlink %s %s", p, errno(unix.Symlink("a", p)))
	case 20:
		how := []uint{unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE}[c.rng.IntN(2)]
		return fmt.Sprintf("rename %d %s %s %s", how, p, q, errno(unix.Renameat2(unix.AT_FDCWD, p, unix.AT_FDCWD, q, how)))
	case 21:
		return fmt.Sprintf("truncate %s %d %s", p, off, errno(unix.Truncate(p, off)))
	case 22:
		return fmt.Sprintf("chmod %s %s", p, errno(unix.Chmod(p, uint32(0o600+c.rng.IntN(0o200)))))
	default:
		var st unix.Stat_t
		err := unix.Lstat(p, &st)
		size := st.Size
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			size = 0 // every file system has its own idea
		}
		return fmt.Sprintf("lstat %s %o %d links, %d bytes, %s", p, st.Mode, st.Nlink, size, errno(err))
	}
}

func sum(b []byte) uint64 {
	h := uint64(len(b))
	for _, c := range b {
		h = h*0x100000001b3 ^ uint64(c)
	}
	return h
}

// tree describes everything below dir.
func tree(t *testing.T, dir string) []string {
	var all []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("%s %o %d", strings.TrimPrefix(p, dir), st.Mode, st.Nlink)
		switch {
		case d.Type().IsRegular():
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d %x", len(b), sum(b))
		case d.Type() == fs.ModeSymlink:
			l, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += " " + l
		}
		if p != dir {
			all = append(all, line)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sort.Strings(all)
	return all
}

// TestReaddirDuringChanges lists a large directory while others create and remove
// in it: what is there all the time must be seen exactly once.
func TestReaddirDuringChanges(t *testing.T) {
	s := startServer(t)
	const stable = 2000
	for i := range stable {
		if err := os.WriteFile(filepath.Join(s.dir, fmt.Sprintf("stable-%d", i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for g := range 2 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				name := filepath.Join(s.dir, fmt.Sprintf("coming-%d-%d", g, i%50))
				os.WriteFile(name, nil, 0o600)
				os.Rename(name, name+"x")
				os.Remove(name + "x")
			}
		})
	}
	for range 5 {
		seen := map[string]int{}
		d, err := os.Open(s.dir)
		if err != nil {
			t.Fatal(err)
		}
		for {
			names, err := d.Readdirnames(100)
			for _, n := range names {
				seen[n]++
			}
			if err != nil {
				break
			}
		}
		d.Close()
		for i := range stable {
			if n := seen[fmt.Sprintf("stable-%d", i)]; n != 1 {
				t.Errorf("stable-%d was seen %d times", i, n)
			}
		}
	}
	close(stop)
	wg.Wait()
}

// TestOpenFilesAndDirectoriesOutliveTheirNames works on what was removed.
func TestOpenFilesAndDirectoriesOutliveTheirNames(t *testing.T) {
	s := startServer(t)
	name := filepath.Join(s.dir, "f")
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.WriteString("before ")
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("after"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 20)
	if n, _ := f.ReadAt(b, 0); string(b[:n]) != "before after" {
		t.Errorf("%q", b[:n])
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Nlink != 0 || st.Size != 12 {
		t.Errorf("%v, %d links, %d bytes", err, st.Nlink, st.Size)
	}
	dir := filepath.Join(s.dir, "d")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fstat(int(d.Fd()), &st); err != nil || st.Nlink != 0 {
		t.Errorf("removed directory: %v, %d links", err, st.Nlink)
	}
	if _, err := unix.Openat(int(d.Fd()), "x", unix.O_CREAT|unix.O_WRONLY, 0o600); err != unix.ENOENT {
		t.Errorf("create in a removed directory: %v", err)
	}
}

// TestLocksOfProcesses lets a child process want what we hold.
func TestLocksOfProcesses(t *testing.T) {
	s := startServer(t)
	if _, err := exec.LookPath("flock"); err != nil {
		t.Skip("no flock(1)")
	}
	name := filepath.Join(s.dir, "lock")
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	// flock: not granted while we hold it, granted when we close.
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if err := exec.Command("flock", "-n", name, "true").Run(); err == nil {
		t.Fatal("an exclusive lock was granted twice")
	}
	// A waiter ends by a signal although the lock is held all the time.
	wait := exec.Command("flock", name, "true")
	if err := wait.Start(); err != nil {
		t.Fatal(err)
	}
	waitBlocked(t, wait.Process.Pid)
	wait.Process.Signal(syscall.SIGTERM)
	if err := wait.Wait(); err == nil {
		t.Fatal("the waiter got a lock that is held")
	}
	// A waiter gets the lock when it is free.
	wait = exec.Command("flock", name, "true")
	if err := wait.Start(); err != nil {
		t.Fatal(err)
	}
	waitBlocked(t, wait.Process.Pid)
	if err := unix.Flock(int(f.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if err := wait.Wait(); err != nil {
		t.Fatalf("waiter: %v", err)
	}
	// The last close drops a flock, too. Release is asynchronous, so the next one waits for it.
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := exec.Command("flock", "-w", "10", name, "true").Run(); err != nil {
		t.Fatalf("after close: %v", err)
	}

	// POSIX locks of this process end when it closes any descriptor of the file.
	f1, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f1.Close()
	f2, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	lk := unix.Flock_t{Type: unix.F_WRLCK, Start: 10, Len: 10}
	if err := unix.FcntlFlock(f1.Fd(), unix.F_SETLK, &lk); err != nil {
		t.Fatal(err)
	}
	// An open file description is another owner.
	test := func() int16 {
		t.Helper()
		l := unix.Flock_t{Type: unix.F_WRLCK, Start: 0, Len: 100}
		if err := unix.FcntlFlock(f1.Fd(), unix.F_OFD_GETLK, &l); err != nil {
			t.Fatal(err)
		}
		return l.Type
	}
	if test() != unix.F_WRLCK {
		t.Error("the lock is not seen")
	}
	f2.Close()
	if test() != unix.F_UNLCK {
		t.Error("the lock survives a close")
	}
}

// waitBlocked waits until the process sleeps in a lock call.
func waitBlocked(t *testing.T, pid int) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 1000 {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", pid))
		if err != nil {
			t.Fatal(err)
		}
		if nr, _, _ := strings.Cut(string(b), " "); nr == fmt.Sprint(unix.SYS_FLOCK) {
			return
		}
		<-tick.C
	}
	t.Fatal("the process does not wait")
}

func TestSparseFiles(t *testing.T) {
	s := startServer(t)
	f, err := os.OpenFile(filepath.Join(s.dir, "f"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("data"), 1<<20); err != nil {
		t.Fatal(err)
	}
	fd := int(f.Fd())
	for _, test := range []struct {
		off    int64
		whence int
		want   int64
		err    error
	}{
		{0, unix.SEEK_DATA, 1 << 20, nil}, {0, unix.SEEK_HOLE, 0, nil}, {1 << 20, unix.SEEK_HOLE, 1<<20 + 4, nil},
		{1<<20 + 4, unix.SEEK_DATA, -1, unix.ENXIO},
	} {
		if got, err := unix.Seek(fd, test.off, test.whence); got != test.want || err != test.err {
			t.Errorf("seek %d %d: %d, %v", test.off, test.whence, got, err)
		}
	}
	if err := unix.Fallocate(fd, unix.FALLOC_FL_COLLAPSE_RANGE, 0, 4096); err != unix.EOPNOTSUPP {
		t.Errorf("collapse: %v", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Blocks != 8 {
		t.Errorf("%d blocks, %v", st.Blocks, err)
	}
}

func TestReadOnlyMount(t *testing.T) {
	needFUSE(t)
	c, _ := newClient(t)
	if err := c.FS(Cred{}).WriteFile("f", []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	m, err := Mount(context.Background(), c, MountOptions{Dir: mountDir(t), ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Unmount()
	cmd := exec.Command("sh", "-c", `cat f && ! touch f && ! mkdir d && ! rm f`)
	cmd.Dir = m.Dir()
	if out, err := cmd.CombinedOutput(); err != nil || strings.Count(string(out), "Read-only file system") != 3 {
		t.Fatalf("%v: %s", err, out)
	}
}

func TestStaleMountIsCleared(t *testing.T) {
	s := startServer(t)
	s.kill(t)
	if _, err := os.ReadDir(s.dir); !errors.Is(err, unix.ENOTCONN) {
		t.Fatalf("a dead mount answers %v", err)
	}
	if cleared, err := ClearStale(s.dir); !cleared || err != nil {
		t.Fatalf("%v, %v", cleared, err)
	}
	if cleared, err := ClearStale(s.dir); cleared || err != nil {
		t.Fatalf("nothing to clear: %v, %v", cleared, err)
	}
	// Mount does it by itself, also when two died one above the other.
	s = startServerAt(t, s.dir)
	s.kill(t)
	s = startServerAt(t, s.dir)
	if err := os.WriteFile(filepath.Join(s.dir, "f"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestMountPointsThatAreRefused(t *testing.T) {
	s := startServer(t)
	c, _ := newClient(t)
	tmp := t.TempDir()
	file, full := filepath.Join(tmp, "file"), filepath.Join(tmp, "full")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.MkdirAll(filepath.Join(full, "x"), 0o700)); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]error{
		"": sealfs.ErrInvalid, file: sealfs.ErrNotDir, full: sealfs.ErrNotEmpty, s.dir: sealfs.ErrBusy, filepath.Join(tmp, "no"): fs.ErrNotExist,
	} {
		m, err := Mount(context.Background(), c, MountOptions{Dir: dir})
		if !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", dir, err, want)
		}
		if err == nil {
			m.Unmount()
		}
	}
}

// TestBusyMountIsDetached unmounts while a file is open: the name is free at once, and
// the open file works on until it is closed.
func TestBusyMountIsDetached(t *testing.T) {
	s := startServer(t)
	f, err := os.Create(filepath.Join(s.dir, "f"))
	if err != nil {
		t.Fatal(err)
	}
	s.pipe.Close()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range 500 {
		if at, _ := findMount(s.dir); at == nil {
			break
		}
		<-tick.C
	}
	if at, _ := findMount(s.dir); at != nil {
		t.Fatal("still mounted")
	}
	if _, err := f.WriteString("still works"); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	s.stop(t)
}

// BenchmarkSmallFiles creates, writes and closes 4 KiB files through the mount.
func BenchmarkSmallFiles(b *testing.B) {
	s := startServer(b)
	data := make([]byte, 4096)
	for i := range b.N {
		if err := os.WriteFile(fmt.Sprintf("%s/%d", s.dir, i), data, 0o600); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkOneByteWrites appends single bytes to a file through the mount.
func BenchmarkOneByteWrites(b *testing.B) {
	s := startServer(b)
	f, err := os.Create(s.dir + "/f")
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	for range b.N {
		if _, err := f.Write([]byte{'x'}); err != nil {
			b.Fatal(err)
		}
	}
}
