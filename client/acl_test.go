package client

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/op"
)

// aclBytes returns an ACL of entries (tag, permissions, who) as Linux has it.
func aclBytes(entries ...[3]uint32) []byte {
	b := []byte{2, 0, 0, 0}
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return b
}

const noID = 1<<32 - 1

// plainACL is the mode 0644.
var plainACL = aclBytes([3]uint32{1, 6, noID}, [3]uint32{4, 4, noID}, [3]uint32{32, 4, noID})

// TestPermissionsLikeLocal does the same random calls as several users below the mount
// and in a local directory: ACLs, modes, owners, umasks, sticky and setgid
// directories, programs that run as others. Every answer must be the same, and
// so must be all modes, owners and ACLs in the end.
func TestPermissionsLikeLocal(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be other users")
	}
	local := localWithACLs(t)
	t.Run("model", func(t *testing.T) { randomPermissions(t, local, startServer(t)) })
	t.Run("engine", func(t *testing.T) { randomPermissions(t, local, startEngine(t)) })
	t.Run("net", func(t *testing.T) { randomPermissions(t, local, startNet(t)) })
}

// localWithACLs returns a directory of a local file system that has POSIX ACLs.
func localWithACLs(t *testing.T) string {
	for _, in := range []string{"/dev/shm", ""} {
		dir, err := os.MkdirTemp(in, "sealfs-local-")
		if err != nil {
			continue
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if unix.Setxattr(dir, op.ACLDefault, plainACL, 0) == nil && unix.Removexattr(dir, op.ACLDefault) == nil {
			return dir
		}
	}
	t.Skip("no local file system with POSIX ACLs to compare with")
	return ""
}

func randomPermissions(t *testing.T, local string, s *server) {
	local, err := os.MkdirTemp(local, "")
	if err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	failed := make(chan string, 1)
	go func() {
		defer close(failed)
		// Who it is and its umask belong to the thread from here on, which ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			failed <- "unshare: " + err.Error()
			return
		}
		a := &actor{dir: local, rng: rand.New(rand.NewPCG(seed, 0))}
		b := &actor{dir: s.dir, rng: rand.New(rand.NewPCG(seed, 0))}
		unix.Chmod(local, 0o1777)
		unix.Chmod(s.dir, 0o1777)
		var told []string
		for i := range *permissionSteps {
			want, got := a.step(), b.step()
			if got != want {
				failed <- fmt.Sprintf("step %d:\nmount: %s\nlocal: %s\nbefore:\n%s", i, got, want, strings.Join(told, "\n"))
				return
			}
			if told = append(told, got); len(told) > 40 {
				told = told[1:]
			}
			if i%500 != 499 {
				continue
			}
			if want, got := permissions(local), permissions(s.dir); !slices.Equal(got, want) {
				for n := range min(len(got), len(want)) {
					if got[n] != want[n] {
						failed <- fmt.Sprintf("after step %d:\nmount: %s\nlocal: %s\nbefore:\n%s", i, got[n], want[n], strings.Join(told, "\n"))
						return
					}
				}
				failed <- fmt.Sprintf("after step %d: %d below the mount, %d local", i, len(got), len(want))
				return
			}
		}
		t.Logf("%d calls, %d of them refused; %d ACLs at the end", a.calls, a.refused, a.acls)
		if a.refused == 0 || a.refused == a.calls {
			failed <- "the calls test nothing"
		}
	}()
	if why, bad := <-failed; bad {
		t.Fatal(why)
	}
}

// actor does random calls in a directory, as random users.
type actor struct {
	dir            string
	rng            *rand.Rand
	calls, refused int
	acls           int
}

// The users, with their groups.
var actors = [][]int{{0}, {1001, 2001, 2002}, {1002, 2002, 2003}, {1003, 2003}}

// become lets the thread do its file calls as a user. The kernel answers with who it was.
func become(user []int) {
	var groups []uint32
	for _, g := range user[1:] {
		groups = append(groups, uint32(g))
	}
	var list *uint32
	if len(groups) > 0 {
		list = &groups[0]
	}
	gid := 0
	if len(user) > 1 {
		gid = user[1]
	}
	unix.Setfsuid(0)
	if errno := setgroups(len(groups), list); errno != 0 {
		panic(errno)
	}
	unix.Setfsgid(gid)
	unix.Setfsuid(user[0])
}

// name returns a path of least to three parts out of few names.
func (a *actor) name(least int) string {
	p := a.dir
	for range least + a.rng.IntN(4-least) {
		p = filepath.Join(p, string(rune('a'+a.rng.IntN(4))))
	}
	return p
}

func (a *actor) acl() []byte {
	perm := func() uint32 { return uint32(a.rng.IntN(8)) }
	list := [][3]uint32{{1, perm() | 4, noID}}
	users, groups := a.rng.IntN(3), a.rng.IntN(3)
	for range users {
		list = append(list, [3]uint32{2, perm(), uint32(1001 + a.rng.IntN(3))})
	}
	list = append(list, [3]uint32{4, perm(), noID})
	for range groups {
		list = append(list, [3]uint32{8, perm(), uint32(2001 + a.rng.IntN(3))})
	}
	if users+groups > 0 || a.rng.IntN(4) == 0 {
		list = append(list, [3]uint32{16, perm(), noID})
	}
	b := aclBytes(append(list, [3]uint32{32, perm(), noID})...)
	switch a.rng.IntN(20) {
	case 0:
		b[a.rng.IntN(len(b))]++
	case 1:
		b = b[:4]
	case 2:
		b = nil
	}
	return b
}

// unclear reports whether a file has setgid without group execution: who may not keep
// that when he writes, depends on his groups, of which a mount is not told.
func unclear(user []int, p string) bool {
	become(actors[0])
	defer become(user)
	var st unix.Stat_t
	return unix.Stat(p, &st) == nil && st.Mode&(unix.S_IFMT|0o2010) == unix.S_IFREG|0o2000
}

// step does a call and tells it with its outcome, without the directory.
func (a *actor) step() string {
	user := actors[a.rng.IntN(len(actors))]
	umask := []int{0, 0o022, 0o027, 0o777, 0o111}[a.rng.IntN(5)]
	unix.Umask(umask)
	become(user)
	told, err := a.call(user)
	become(actors[0])
	a.calls++
	if err != nil {
		a.refused++
	}
	return strings.ReplaceAll(fmt.Sprintf("user %v, umask %o: %s: %v", user, umask, told, err), a.dir, "")
}

func (a *actor) call(user []int) (told string, err error) {
	p, q, r := a.name(0), a.name(1), a.name(1)
	mode := uint32(a.rng.IntN(0o10000))
	if a.rng.IntN(2) == 0 {
		mode |= 0o770
	}
	which := []string{op.ACLAccess, op.ACLDefault}[a.rng.IntN(2)]
	acl := a.acl()
	if len(acl) <= 4 && user[0] != 0 {
		// Whether it costs the setgid bit to remove an ACL, too, is not the same on ext4 and tmpfs.
		which = op.ACLDefault
	}
	flags := []int{unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR, unix.O_WRONLY | unix.O_TRUNC, unix.O_WRONLY | unix.O_APPEND}[a.rng.IntN(5)]
	owner := actors[a.rng.IntN(len(actors))]
	uid, gid := []int{-1, owner[0]}[a.rng.IntN(2)], []int{-1, 2001 + a.rng.IntN(3)}[a.rng.IntN(2)]
	if uid == -1 && gid == -1 {
		uid = owner[0] // a call that changes nothing does not reach a mount's server
	}
	switch a.rng.IntN(22) {
	case 0, 1, 2:
		return fmt.Sprintf("setxattr %s %s %x", p, which, acl), unix.Setxattr(p, which, acl, 0)
	case 3:
		if user[0] != 0 {
			which = op.ACLDefault
		}
		return fmt.Sprintf("removexattr %s %s", p, which), unix.Removexattr(p, which)
	case 4, 5:
		b := make([]byte, 200)
		n, err := unix.Getxattr(p, which, b)
		return fmt.Sprintf("getxattr %s %s: %x", p, which, b[:max(n, 0)]), err
	case 6, 7:
		return fmt.Sprintf("chmod %s %o", p, mode), unix.Chmod(p, mode)
	case 8, 9, 10:
		if unclear(user, q) {
			return "", nil
		}
		fd, err := unix.Open(q, unix.O_CREAT|unix.O_NONBLOCK|unix.O_CLOEXEC|flags, mode)
		if err == nil {
			unix.Close(fd)
		}
		return fmt.Sprintf("create %s %#x %o", q, flags, mode), err
	case 11, 12, 13:
		return fmt.Sprintf("mkdir %s %o", q, mode), unix.Mkdir(q, mode)
	case 14:
		kind := []uint32{unix.S_IFIFO, unix.S_IFREG, unix.S_IFSOCK}[a.rng.IntN(3)]
		return fmt.Sprintf("mknod %s %o", q, kind|mode), unix.Mknod(q, kind|mode, 0)
	case 15:
		var st unix.Stat_t
		var acl [200]byte
		n := 0
		fd, err := unix.Open(p, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, mode)
		if err == nil {
			unix.Fstat(fd, &st)
			n, _ = unix.Fgetxattr(fd, op.ACLAccess, acl[:])
			unix.Close(fd)
		}
		return fmt.Sprintf("tmpfile %s %o: %o of %d %d, ACL %x", p, mode, st.Mode, st.Uid, st.Gid, acl[:max(n, 0)]), err
	case 16:
		if a.rng.IntN(2) == 0 {
			return fmt.Sprintf("unlink %s", q), unix.Unlink(q)
		}
		return fmt.Sprintf("rmdir %s", q), unix.Rmdir(q)
	case 17:
		return fmt.Sprintf("rename %s %s", q, r), unix.Rename(q, r)
	case 18:
		if a.rng.IntN(4) == 0 {
			return fmt.Sprintf("symlink %s", q), unix.Symlink("a", q)
		}
		if unclear(user, p) {
			return "", nil
		}
		return fmt.Sprintf("chown %s %d %d", p, uid, gid), unix.Lchown(p, uid, gid)
	case 19, 20:
		if unclear(user, p) {
			return "", nil
		}
		told := fmt.Sprintf("open %s %#x", p, flags)
		fd, err := unix.Open(p, flags|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return told, err
		}
		defer unix.Close(fd)
		var st unix.Stat_t
		unix.Fstat(fd, &st)
		if flags != unix.O_RDONLY && st.Mode&unix.S_IFMT == unix.S_IFREG {
			_, err = unix.Write(fd, []byte("x"))
			unix.Fstat(fd, &st)
		}
		return fmt.Sprintf("%s: %o", told, st.Mode), err
	default:
		var st unix.Stat_t
		err := unix.Lstat(p, &st)
		how := uint32(a.rng.IntN(8))
		return fmt.Sprintf("lstat %s: %o of %d %d; access %o: %v", p, st.Mode, st.Uid, st.Gid, how, unix.Faccessat2(unix.AT_FDCWD, p, how, unix.AT_EACCESS)), err
	}
}

// permissions describes everything below dir.
func permissions(dir string) []string {
	var all []string
	err := filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("%s %o %d %d", strings.TrimPrefix(p, dir), st.Mode, st.Uid, st.Gid)
		names := make([]byte, 1000)
		n, err := unix.Llistxattr(p, names)
		if err != nil {
			return err
		}
		list := xattrNames(names[:n])
		slices.Sort(list)
		for _, name := range list {
			b := make([]byte, 1000)
			n, err := unix.Lgetxattr(p, name, b)
			line += fmt.Sprintf(" %s=%x %v", name, b[:max(n, 0)], err)
		}
		all = append(all, line)
		return nil
	})
	if err != nil {
		return []string{err.Error()}
	}
	slices.Sort(all)
	return all
}

// TestBareInodes checks who is believed to have no ACL.
func TestBareInodes(t *testing.T) {
	var b bareInodes
	c := New(nil, Options{})
	bare, acl := op.Attr{Ino: 20, Mode: modeFile | 0o644, Version: 1}, op.Attr{Ino: 20, Mode: modeFile | op.ModeACL, Version: 2}
	note := func(a op.Attr, mark uint64, ttl time.Duration) { b.note(&answer{Attr: a, mark: mark}, ttl) }
	want := func(what string, want bool) {
		t.Helper()
		if b.has(c, 20) != want {
			t.Errorf("%s: %v", what, !want)
		}
	}
	want("at first", false)
	before := c.leases.mark()
	note(bare, before, time.Hour)
	want("told", true)
	note(acl, c.leases.mark(), time.Hour)
	want("it has one", false)
	note(bare, c.leases.mark(), time.Hour)
	b.forget(c, 20)
	want("changed", false)
	note(bare, before, time.Hour)
	want("asked before the change", false)
	note(op.Attr{Ino: 20, Mode: modeFile}, c.leases.mark(), time.Hour)
	want("attributes that are not all there", false)
	note(bare, c.leases.mark(), time.Hour)
	want("asked after it", true)
	note(bare, c.leases.mark(), -time.Millisecond)
	want("for too long", false)
	note(bare, c.leases.mark(), time.Hour)
	for ino := range sealfs.Ino(20 * bareSlots) {
		note(op.Attr{Ino: ino + 21, Version: 1}, c.leases.mark(), time.Hour)
	}
	want("others took its place", false)
}

// TestBareLeased checks that a client with leases believes that an inode has no ACL for as long
// as it holds the lease under which it was told so.
func TestBareLeased(t *testing.T) {
	var b bareInodes
	c := New(nil, Options{Session: 7})
	defer c.die()
	c.leases.alive[0].Store(new(time.Now()))
	c.leases.allow(func(sealfs.Shard) bool { return true })
	told := func() {
		k := call{mark: c.leases.mark()}
		k.rep.Stamp = 9
		b.note(&answer{Attr: op.Attr{Ino: 20, Mode: modeFile, Version: 1}, ino: c.leases.grant(20, &k, false), mark: k.mark}, 0)
	}
	told()
	if !b.has(c, 20) {
		t.Error("told under a lease, and not believed")
	}
	c.Renewed(time.Now().Add(-time.Second))
	if b.has(c, 20) {
		t.Error("believed after the session's term")
	}
	c.Renewed(time.Now().Add(time.Hour))
	c.leases.revoke(&op.Revoke{Num: 9, Ino: 20, Kind: op.RevokeInode})
	if b.has(c, 20) {
		t.Error("believed after the lease was revoked")
	}
	told()
	if !b.has(c, 20) {
		t.Error("not believed under another lease")
	}
	b.note(&answer{Attr: op.Attr{Ino: 20, Mode: modeFile, Version: 1}, mark: c.leases.mark()}, time.Hour)
	if b.has(c, 20) {
		t.Error("believed without a lease")
	}
}

// TestACLQuestions checks that what the kernel asks of an inode without ACLs is answered
// from its attributes for as long as these are believed, and no longer.
func TestACLQuestions(t *testing.T) {
	c, h := newClient(t)
	f := newFilesystem(c, MountOptions{AttrTimeout: time.Hour})
	a, err := c.Mknod(t.Context(), c.Root(), "f", modeFile|0o640, 0, Cred{})
	if err != nil {
		t.Fatal(err)
	}
	look := func() {
		t.Helper()
		if s := f.Lookup(nil, &fuse.InHeader{NodeId: fuse.FUSE_ROOT_ID}, "f", &fuse.EntryOut{}); s != fuse.OK {
			t.Fatal(s)
		}
	}
	want := func(what string, has bool) {
		t.Helper()
		n, s := f.GetXAttr(nil, &fuse.InHeader{NodeId: uint64(a.Ino)}, op.ACLAccess, make([]byte, sealfs.ACLMax))
		if has && (s != fuse.OK || n == 0) || !has && s != fuse.ENODATA {
			t.Errorf("%s: %d bytes, %v", what, n, s)
		}
	}
	elsewhere := func(acl []byte) {
		t.Helper()
		var rep op.Reply
		err := h.Do(t.Context(), &op.Request{Type: op.Setxattr, Ino: a.Ino, Shard: a.Ino.Home(testShards), Name: op.ACLAccess, Data: acl}, &rep)
		if err != nil || rep.Code != 0 {
			t.Fatal(err, rep.Code)
		}
	}
	named := aclBytes([3]uint32{1, 6, noID}, [3]uint32{2, 4, 9}, [3]uint32{4, 4, noID}, [3]uint32{16, 4, noID}, [3]uint32{32, 0, noID})
	want("a new file", false)
	look()
	elsewhere(named)
	want("set by another client within the time-out", false)
	look()
	want("attributes have told of it", true)
	elsewhere(nil)
	look()
	want("removed", false)
	if s := f.SetXAttr(nil, &fuse.SetXAttrIn{InHeader: fuse.InHeader{NodeId: uint64(a.Ino)}}, op.ACLAccess, named); s != fuse.OK {
		t.Fatal(s)
	}
	want("set here", true)
}
