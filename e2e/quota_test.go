package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// quotaSetter sets the quota of the volume that is tested; "" leaves one as it is.
type quotaSetter func(size, inodes string)

// used returns what a mounted volume holds, by statfs.
func used(t testing.TB, mnt string) (bytes, inodes uint64) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(mnt, &st); err != nil {
		t.Fatal(err)
	}
	return (st.Blocks - st.Bfree) * uint64(st.Bsize), st.Files - st.Ffree
}

// setQuota returns how to set the quota of a volume with a command, such as sealfs with its
// surroundings.
func setQuota(volume string, run func(args ...string), where ...string) quotaSetter {
	return func(size, inodes string) {
		args := append([]string{"set-quota"}, where...)
		args = append(args, volume)
		if size != "" {
			args = append(args, size)
		}
		if inodes != "" {
			args = append(args, "--inodes", inodes)
		}
		run(args...)
	}
}

// fillUp writes to a new file, in large pieces and then in small ones, until nothing fits, and
// returns its size. Each write is told what becomes of it.
func fillUp(t testing.TB, path string) (size int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_SYNC, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for n := 1 << 20; n > 0; n /= 2 {
		for err = nil; err == nil; size += int64(n) {
			if _, err = f.WriteAt(make([]byte, n), size); err != nil {
				break
			}
		}
		if !errors.Is(err, unix.EDQUOT) {
			t.Fatalf("write of %d bytes at %d: %v", n, size, err)
		}
	}
	return size
}

// overQuota meets the quota of inodes, and that of bytes, with each call that grows a volume,
// in an empty directory of it.
func overQuota(t testing.TB, dir string, set quotaSetter) {
	t.Helper()
	at := func(name string) string { return filepath.Join(dir, name) }
	want := func(code unix.Errno, what string, err error) {
		t.Helper()
		if code == 0 && err != nil || code != 0 && !errors.Is(err, code) {
			t.Errorf("%s: %v, want %v", what, err, code)
		}
	}
	for _, name := range []string{"a", "b", "sub/file"} {
		want(0, "mkdir", os.MkdirAll(filepath.Dir(at(name)), 0o755))
		want(0, "write", os.WriteFile(at(name), make([]byte, 10_000), 0o644))
	}
	_, inodes := used(t, dir)
	set("none", fmt.Sprint(inodes))
	open := func(name string, flags int) error {
		f, err := os.OpenFile(name, flags, 0o644)
		if err == nil {
			err = f.Close()
		}
		return err
	}
	for _, in := range []string{".", "sub"} {
		name := filepath.Join(dir, in, "new")
		want(unix.EDQUOT, "create", open(name, os.O_CREATE|os.O_WRONLY))
		want(unix.EDQUOT, "create exclusively", open(name, os.O_CREATE|os.O_EXCL|os.O_RDWR))
		want(unix.EDQUOT, "mkdir", os.Mkdir(name, 0o755))
		want(unix.EDQUOT, "mkfifo", unix.Mkfifo(name, 0o644))
		want(unix.EDQUOT, "symlink", os.Symlink("target", name))
		want(unix.EDQUOT, "O_TMPFILE", open(filepath.Join(dir, in), unix.O_TMPFILE|os.O_RDWR))
	}
	want(0, "link", os.Link(at("a"), at("sub/link")))
	want(0, "rename", os.Rename(at("sub/link"), at("link")))
	want(0, "rename over another one", os.Rename(at("link"), at("b"))) // frees an inode
	want(0, "create in its place", open(at("new"), os.O_CREATE|os.O_WRONLY))
	want(unix.EDQUOT, "create one more", open(at("more"), os.O_CREATE|os.O_WRONLY))
	want(0, "unlink", os.Remove(at("new")))
	want(0, "mkdir in its place", os.Mkdir(at("instead"), 0o755))
	want(unix.EDQUOT, "mkdir one more", os.Mkdir(at("more"), 0o755))

	bytes, _ := used(t, dir)
	set(fmt.Sprint(bytes+3<<20), "0")
	size := fillUp(t, at("full"))
	if size < 2<<20 {
		t.Errorf("%d bytes were written, and 3 MiB are free", size)
	}
	a, err := os.OpenFile(at("a"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	page := make([]byte, 4096)
	delayed := func(what string, f *os.File, off int64) {
		t.Helper()
		_, err := f.WriteAt(page, off)
		if err == nil {
			err = f.Sync()
		}
		want(unix.EDQUOT, what, err)
	}
	delayed("write and fsync", a, 12<<10)
	delayed("write to a hole", a, 1<<20)
	delayed("write to a chunk far out", a, 300<<20)
	closing, err := os.OpenFile(at("b"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = closing.Write(page)
	want(unix.EDQUOT, "append and close", errors.Join(err, closing.Close()))
	want(unix.EDQUOT, "fsync after that", a.Sync()) // it is the same file
	want(unix.EDQUOT, "fallocate", unix.Fallocate(int(a.Fd()), 0, 0, 1<<20))
	want(unix.EDQUOT, "setxattr", unix.Setxattr(at("a"), "user.a", page[:512], 0))
	acl := []byte{2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 2, 0, 7, 0, 232, 3, 0, 0, 4, 0, 5, 0, 255, 255, 255, 255, 16, 0, 7, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255}
	want(unix.EDQUOT, "an ACL", unix.Setxattr(at("a"), "system.posix_acl_access", acl, 0))
	want(unix.EDQUOT, "an ACL to hand down", unix.Setxattr(at("sub"), "system.posix_acl_default", acl, 0))
	want(0, "create an empty file", open(at("empty"), os.O_CREATE|os.O_WRONLY))
	_, err = a.WriteAt(page, 0)
	want(0, "overwrite", errors.Join(err, a.Sync()))
	want(0, "truncate to more", a.Truncate(1<<30))
	want(0, "truncate to less", a.Truncate(0)) // which makes room
	_, err = a.WriteAt(page, 0)
	want(0, "write after that", errors.Join(err, a.Sync()))
	_, err = a.WriteAt(make([]byte, 1<<20), 0)
	want(unix.EDQUOT, "write much", errors.Join(err, a.Sync()))
	want(0, "unlink of what fills it", os.Remove(at("full")))
	_, err = a.WriteAt(make([]byte, 1<<20), 0)
	want(0, "write at once", errors.Join(err, a.Sync()))

	// Less than there is, then more, then anything.
	set("4096", "1")
	want(unix.EDQUOT, "create above a lowered quota", open(at("more"), os.O_CREATE|os.O_WRONLY))
	delayed("write above a lowered quota", a, 8<<20)
	want(0, "unlink above a lowered quota", os.Remove(at("empty")))
	b, err := os.ReadFile(at("sub/file"))
	if want(0, "read above a lowered quota", err); len(b) != 10_000 {
		t.Errorf("%d bytes are read", len(b))
	}
	set("none", "0")
	want(0, "write without a quota", os.WriteFile(at("more"), make([]byte, 8<<20), 0o644))
}

// TestQuota meets a quota with every call, through the first and a further mount.
func TestQuota(t *testing.T) {
	i := newInstance(t)
	i.up("--size", "1G")
	second := filepath.Join(i.dir, "second")
	sealfs(t, 0, "sealfs", "mount", "--data", i.data, "main", second)
	set := setQuota("main", func(args ...string) { sealfs(t, 0, append([]string{"sealfs"}, args...)...) }, "--data", i.data)
	for n, mnt := range []string{i.mnt, second} {
		dir := filepath.Join(mnt, fmt.Sprint(n))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		overQuota(t, dir, set)
	}
	set("256M", "5000")
	var list []struct {
		Size   uint64 `json:"bytes"`
		Inodes uint64 `json:"inodes"`
		Used   int64  `json:"used_bytes"`
	}
	out := sealfs(t, 0, "sealfs", "list-volumes", "--data", i.data, "--json").out
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 1 || list[0].Size != 256<<20 || list[0].Inodes != 5000 || list[0].Used < 16<<20 {
		t.Errorf("list-volumes: %v, %s", err, out)
	}
	for _, mnt := range []string{i.mnt, second} {
		var st unix.Statfs_t
		// A further mount asks once a second.
		limit := time.After(commandTime)
		for tick := time.NewTicker(50 * time.Millisecond); st.Blocks*uint64(st.Bsize) != 256<<20 || st.Files != 5000; {
			select {
			case <-tick.C:
			case <-limit:
				t.Fatalf("statfs of %s: %+v", mnt, st)
			}
			if err := unix.Statfs(mnt, &st); err != nil {
				t.Fatal(err)
			}
		}
	}
	sealfs(t, 2, "sealfs", "set-quota", "--data", i.data, "main")
	sealfs(t, 2, "sealfs", "set-quota", "--data", i.data, "main", "0")
	if r := sealfs(t, 1, "sealfs", "set-quota", "--data", i.data, "other", "1G"); !strings.Contains(r.errOut, `"other"`) {
		t.Errorf("quota of a volume that does not exist: %v", r)
	}
	i.killer().kill(t)
	i.up()
	if err := os.WriteFile(filepath.Join(i.mnt, "after"), make([]byte, 1<<20), 0o644); err != nil {
		t.Error(err)
	}
	i.down()
	i.fsck()
}

// TestClusterQuota fills a volume on four servers through two mounts up to its quota, while
// servers and the manager are killed.
func TestClusterQuota(t *testing.T) {
	s := newSite(t, shape{managers: 1, servers: 4, disks: 1, daemons: 2, size: "1G"}, nil)
	s.up(t)
	set := setQuota("main", func(args ...string) { s.ok(t, append([]string{"sealfs"}, args...)...) }, "--manager", s.addrs())
	// Servers hear of another quota by themselves, soon.
	slowly := func(size, inodes string) {
		set(size, inodes)
		s.pause(t, time.Second)
	}
	first := filepath.Join(s.mounts[0].path, "first")
	if err := os.Mkdir(first, 0o755); err != nil {
		t.Fatal(err)
	}
	overQuota(t, first, slowly)

	const quota, piece, writers = 192 << 20, 100_000, 4
	slowly(fmt.Sprint(quota), "0")
	var calm atomic.Bool // nobody is killed any more
	var written atomic.Int64
	var work sync.WaitGroup
	for i := range writers {
		dir := filepath.Join(s.mounts[i%2].path, fmt.Sprint("w", i))
		work.Go(func() {
			for n := 0; ; n++ {
				if n%20 == 0 {
					if err := os.MkdirAll(filepath.Join(dir, fmt.Sprint(n/20)), 0o755); err != nil {
						t.Error(err)
						return
					}
				}
				name := filepath.Join(dir, fmt.Sprint(n/20), fmt.Sprint(n))
				err := os.WriteFile(name, make([]byte, piece), 0o644)
				switch {
				case err == nil:
					written.Add(piece)
				case !errors.Is(err, unix.EDQUOT):
					t.Errorf("writer %d: %v", i, err)
					return
				case calm.Load():
					return
				}
				if err != nil {
					n--
				}
			}
		})
	}
	for i, p := range append(s.servers[:2:2], s.managers[0]) {
		s.eventually(t, backTime, "the volume fills", func() bool { return written.Load() > int64(i+1)*quota/5 })
		p.kill(t)
		s.pause(t, killLasts)
		p.start(t)
	}
	calm.Store(true)
	work.Wait()
	var list []struct {
		Used int64 `json:"used_bytes"`
	}
	// Managers hear once a second what servers hold.
	s.eventually(t, backTime, "the managers know what the volume holds", func() bool {
		s.decode(t, &list, "sealfs", "list-volumes", "--manager", s.addrs())
		return len(list) == 1 && list[0].Used > quota*99/100
	})
	if list[0].Used > quota {
		t.Errorf("%d bytes are stored under a quota of %d", list[0].Used, quota)
	}
	t.Logf("%d of %d bytes", list[0].Used, quota)
	if err := os.RemoveAll(filepath.Join(s.mounts[0].path, "w0")); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(s.mounts[1].path, "again"), make([]byte, 1<<20), 0o644); err != nil {
		t.Errorf("right after files were removed on the other mount: %v", err)
	}
	for i := range s.mounts {
		s.umount(t, i)
	}
	disks := s.disks(t)
	for _, list := range [][]*proc{s.daemons, s.servers, s.managers} {
		for _, p := range list {
			p.stop(t)
		}
	}
	s.fsck(t, disks)
}
