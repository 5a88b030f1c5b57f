package client

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/internal/oracle"
	"sealfs/op"
)

// TestCachedPagesEnd has one mount hold pages of a file that is open there, and the other one write to it in place. Before
// the first one reads again, it is told the file's attributes by the answer to something else than a question for them.
func TestCachedPagesEnd(t *testing.T) {
	p := startPair(t)
	old := time.Unix(1_000_000_000, 5)
	for _, test := range []struct {
		name string
		back bool // the time of modification is set back
		act  func(f *os.File, mine, others string) error
	}{
		{"nothing", false, func(*os.File, string, string) error { return nil }},
		{"nothing, same time", true, func(*os.File, string, string) error { return nil }},
		{"chmod", false, func(f *os.File, _, _ string) error { return f.Chmod(0o600) }},
		{"chmod, same time", true, func(f *os.File, _, _ string) error { return f.Chmod(0o600) }},
		{"chown", false, func(f *os.File, _, _ string) error { return f.Chown(os.Getuid(), os.Getgid()) }},
		{"utimes", false, func(f *os.File, mine, _ string) error { return os.Chtimes(mine, old, old) }},
		{"same size", false, func(f *os.File, _, _ string) error { return f.Truncate(12) }},
		{"link", true, func(_ *os.File, mine, _ string) error { return os.Link(mine, mine+"2") }},
		{"lookup", true, func(_ *os.File, mine, others string) error {
			err := os.Rename(others, others+"2")
			_, serr := os.Stat(mine + "2")
			return errors.Join(err, serr)
		}},
		{"readdir", true, func(_ *os.File, mine, others string) error {
			err := os.Rename(others, others+"2")
			_, serr := os.ReadDir(filepath.Dir(mine))
			return errors.Join(err, serr)
		}},
		{"rename", true, func(_ *os.File, mine, _ string) error { return os.Rename(mine, mine+"2") }},
		{"xattr", false, func(_ *os.File, mine, _ string) error { return unix.Setxattr(mine, "user.x", []byte("x"), 0) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir, err := os.MkdirTemp(p.dirs[0], "d")
			if err != nil {
				t.Fatal(err)
			}
			others, mine := filepath.Join(dir, "f"), filepath.Join(p.dirs[1], filepath.Base(dir), "f")
			if err := errors.Join(os.WriteFile(others, []byte("old content."), 0o644), os.Chtimes(others, old, old)); err != nil {
				t.Fatal(err)
			}
			f, err := os.OpenFile(mine, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			read := func() string {
				t.Helper()
				b := make([]byte, 20)
				n, err := f.ReadAt(b, 0)
				if n == 0 {
					t.Fatal(err)
				}
				return string(b[:n])
			}
			read()
			if got := read(); got != "old content." {
				t.Fatal(got)
			}
			w, err := os.OpenFile(others, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			_, err = w.WriteAt([]byte("new"), 0)
			if err := errors.Join(err, w.Close()); err != nil {
				t.Fatal(err)
			}
			if test.back {
				if err := os.Chtimes(others, old, old); err != nil {
					t.Fatal(err)
				}
			}
			if err := test.act(f, mine, others); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if got := read(); got != "new content." {
					t.Fatalf("what is read is %q", got)
				}
			}
		})
	}
}

// held keeps back answers to Getattr for one inode, which were right when they were given.
type held struct {
	op.Handler
	ino  atomic.Uint64 // 0: nobody's
	got  chan struct{} // told when there is an answer
	pass chan struct{} // closed to let it go
}

func (h *held) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	err := h.Handler.Do(ctx, req, rep)
	if req.Type == op.Getattr && h.ino.CompareAndSwap(uint64(req.Ino), 0) {
		h.got <- struct{}{}
		<-h.pass
	}
	return err
}

// TestOwnChangeOvertakes renames a file while a question for its attributes is under way, whose
// answer is from before that and comes afterwards: the mount, which has renamed it itself, must not believe it.
func TestOwnChangeOvertakes(t *testing.T) {
	needFUSE(t)
	u := newCluster()
	net := oracle.NewNet(u.model, 3, 7)
	server := &held{Handler: generous{net}, got: make(chan struct{}), pass: make(chan struct{})}
	c := u.clientOf(t, net, server, 7, Options{})
	connected(t, c)
	m, err := Mount(context.Background(), c, MountOptions{Dir: mountDir(t), Name: "held"})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Unmount()
	ino, path := fileIn(t, c, net, 1, "f")
	path = filepath.Join(m.Dir(), path)
	changed := func(path string) string {
		out, err := exec.Command("stat", "-c", "%.9Z", path).CombinedOutput()
		return fmt.Sprint(strings.TrimSpace(string(out)), err)
	}
	changed(path)
	c.kernel.Load().inode(ino, false)
	call := startCall(t, "rename", path)
	server.ino.Store(uint64(ino))
	old := make(chan string)
	go func() { old <- changed(path) }()
	<-server.got
	call.begin()
	if got := call.end(t); got != "<nil>" {
		t.Fatal(got)
	}
	c.kernel.Load().calm(ino) // as if it took long
	close(server.pass)
	if got := changed(path + ".r"); got == <-old {
		t.Errorf("%s is when it was changed last, from before it was renamed", got)
	}
}

// calm makes the kernel's attributes of an inode look as if nothing was revoked lately.
func (k *kernel) calm(ino sealfs.Ino) {
	p := k.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	n := k.get(p, ino)
	n.hot, n.owed = time.Time{}, false
}

// TestFirstAnswer looks at what is told first after attributes were revoked, however long ago that was: were the answer
// overtaken, who asked would go on with attributes from before.
func TestFirstAnswer(t *testing.T) {
	c := New(nil, Options{Session: 1, Shards: 1})
	defer c.die()
	k := newKernel(func(ino sealfs.Ino) uint64 { return uint64(ino) + 1 })
	const ino = 77
	c.leases.allow(func(sealfs.Shard) bool { return true })
	c.leases.alive[0].Store(new(time.Now().Add(time.Hour)))
	tell := func(how telling) time.Duration {
		q := c.begin(op.Getattr, ino)
		defer q.end()
		q.mark, q.rep.Lease, q.rep.Attr = c.leases.mark(), op.LeaseIno, op.Attr{Ino: ino, Version: 1}
		c.believe(q)
		a := q.answer()
		return k.tell(c, &a, how)
	}
	if tell(tellNamed) == 0 {
		t.Fatal("what is told first has no validity")
	}
	p := k.part(ino)
	p.inodes[ino].valid = false // there is no kernel to be notified
	k.inode(ino, true)
	p.inodes[ino].hot = time.Time{}
	if tell(0) != 0 {
		t.Error("the first answer after a revocation has validity")
	}
	if tell(0) != 0 {
		t.Error("another one, that may come before it, has validity")
	}
	p.inodes[ino].hot = time.Time{}
	if tell(0) == 0 {
		t.Error("later answers have no validity")
	}
	p.inodes[ino].valid = false
	asked := c.leases.mark()
	k.touched(c, ino)
	b := c.leases.has(ino).serial
	if k.tell(c, &answer{Attr: op.Attr{Ino: ino, Version: 1}, ino: b, mark: asked}, 0) != 0 {
		t.Error("an answer to a question from before this mount's own change has validity")
	}
	if tell(0) == 0 {
		t.Error("an answer to a question from after it has none")
	}
}

// TestMappingsDoNotGrowFiles writes to a file through a mapping, while the other mount truncates it: what lies beyond its
// end then is nobody's, and must not come back with it.
func TestMappingsDoNotGrowFiles(t *testing.T) {
	p := startPair(t)
	others, mine := filepath.Join(p.dirs[0], "f"), filepath.Join(p.dirs[1], "f")
	if err := os.WriteFile(others, make([]byte, 3*4096), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(mine, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, 3*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(m)
	m[100], m[2*4096+100] = 1, 1
	if err := os.Truncate(others, 1000); err != nil {
		t.Fatal(err)
	}
	unix.Msync(m, unix.MS_SYNC)
	for _, path := range []string{others, mine} {
		if b, err := os.ReadFile(path); err != nil || len(b) != 1000 || b[100] != 1 {
			t.Errorf("%d bytes after a truncation to 1000, %v", len(b), err)
		}
	}
}
