package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"io/fs"
	"os"

	"sealfs"
	"sealfs/op"
)

// spy is a handler that counts requests and may answer instead of the model.
type spy struct {
	op.Handler
	mu    sync.Mutex
	count map[op.Type]int
	fail  func(*op.Request) error // a Code is answered, anything else returned
	reqs  []op.Request            // of types in keep
	keep  op.Type
}

func (s *spy) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	s.mu.Lock()
	if s.count == nil {
		s.count = map[op.Type]int{}
	}
	s.count[req.Type]++
	if req.Type == s.keep {
		r := *req
		r.Data = bytes.Clone(req.Data)
		s.reqs = append(s.reqs, r)
	}
	fail := s.fail
	s.mu.Unlock()
	if fail != nil {
		if err := fail(req); err != nil {
			if code, ok := err.(sealfs.Code); ok {
				rep.Code = code
				return nil
			}
			return err
		}
	}
	return s.Handler.Do(ctx, req, rep)
}

func (s *spy) setFail(fail func(*op.Request) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = fail
}

func (s *spy) n(t op.Type) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.count[t]
}

// newSpied returns a client of a model that is watched, and an open file.
func newSpied(t testing.TB, o Options) (*Client, *spy, sealfs.Ino) {
	h, root := newModel()
	s := &spy{Handler: h, keep: op.Write}
	o.Volume, o.Root, o.Shards = 1, root, testShards
	c := New(s, o)
	c.age = time.Hour // unless a test is about it
	a, err := c.Create(context.Background(), root, "f", 0o644, Cred{})
	if err != nil {
		t.Fatal(err)
	}
	return c, s, a.Ino
}

func TestErrnoKnowsEveryCode(t *testing.T) {
	for _, code := range sealfs.Codes() {
		if int(code) >= len(errnos) || errnos[code] == 0 {
			t.Errorf("%d (%v) has no errno", code, code)
			continue
		}
		if got := Errno(fmt.Errorf("wrapped: %w", code)); got != errnos[code] {
			t.Errorf("%v: %v", code, got)
		}
	}
	for _, test := range []struct {
		err  error
		want syscall.Errno
	}{
		{nil, 0},
		{errors.New("x"), syscall.EIO},
		{&sealfs.Corruption{What: "x"}, syscall.EIO},
		{context.Canceled, syscall.EINTR},
		{sealfs.Code(60000), syscall.EIO},
	} {
		if got := Errno(test.err); got != test.want {
			t.Errorf("%v: %v, want %v", test.err, got, test.want)
		}
	}
	if status(sealfs.ErrNoSys) == status(nil) || syscall.Errno(status(sealfs.ErrNoSys)) == syscall.ENOSYS {
		t.Error("the kernel must not hear ENOSYS from an operation that exists")
	}
}

func TestSmallWritesAreCollected(t *testing.T) {
	c, s, ino := newSpied(t, Options{})
	ctx := context.Background()
	want := make([]byte, 300<<10)
	for i := range want {
		want[i] = byte(i * 7)
		if err := c.Write(ctx, ino, uint64(i), want[i:i+1], 0); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.n(op.Write); n != 2 {
		t.Fatalf("%d requests before flush, want 2 of 128 KiB", n)
	}
	got, err := c.Read(ctx, ino, 0, len(want), nil)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%v, or other data", err)
	}
	for _, r := range s.reqs {
		if r.Off%bufferMax != 0 {
			t.Errorf("piece at %d is not aligned", r.Off)
		}
	}
	if err := c.Release(ctx, ino); err != nil {
		t.Fatal(err)
	}
	if s.n(op.Write) != 3 || s.n(op.Release) != 1 || c.buffered.Load() != 0 || c.dirtyCount.Load() != 0 {
		t.Fatalf("%d writes, %d releases, %d bytes and %d nodes left", s.n(op.Write), s.n(op.Release), c.buffered.Load(), c.dirtyCount.Load())
	}
}

func TestEveryViewSeesDelayedWrites(t *testing.T) {
	ctx := context.Background()
	size := func(a op.Attr, err error) (uint64, error) { return a.Size, err }
	for name, view := range map[string]func(*Client, sealfs.Ino) (uint64, error){
		"getattr": func(c *Client, ino sealfs.Ino) (uint64, error) { return size(c.Getattr(ctx, ino)) },
		"lookup":  func(c *Client, ino sealfs.Ino) (uint64, error) { return size(c.Lookup(ctx, c.Root(), "f")) },
		"open":    func(c *Client, ino sealfs.Ino) (uint64, error) { return size(c.Open(ctx, ino)) },
		"setattr": func(c *Client, ino sealfs.Ino) (uint64, error) {
			return size(c.Setattr(ctx, ino, &SetAttr{Valid: op.SetMode}))
		},
		"link": func(c *Client, ino sealfs.Ino) (uint64, error) { return size(c.Link(ctx, ino, c.Root(), "g")) },
		"read": func(c *Client, ino sealfs.Ino) (uint64, error) {
			b, err := c.Read(ctx, ino, 0, 100, nil)
			return uint64(len(b)), err
		},
		"seek": func(c *Client, ino sealfs.Ino) (uint64, error) { return c.Seek(ctx, ino, 0, SeekHole) },
		"readdir": func(c *Client, ino sealfs.Ino) (uint64, error) {
			// A name whose size is uncertain comes without attributes.
			list, _, err := c.Readdir(ctx, c.Root(), 0, 1000, true, nil)
			if err != nil || len(list) != 1 || list[0].Attr.Ino != 0 && list[0].Attr.Size != 5 {
				return 0, fmt.Errorf("%v %+v", err, list)
			}
			return 5, nil
		},
	} {
		c, _, ino := newSpied(t, Options{})
		if err := c.Write(ctx, ino, 0, []byte("hello"), 0); err != nil {
			t.Fatal(err)
		}
		if n, err := view(c, ino); n != 5 || err != nil {
			t.Errorf("%s: %d, %v", name, n, err)
		}
	}
}

// TestLookupDuringSend holds back the answer of a Lookup until a write that was
// delayed before it has been sent.
func TestLookupDuringSend(t *testing.T) {
	c, s, ino := newSpied(t, Options{})
	ctx := context.Background()
	if err := c.Write(ctx, ino, 0, []byte("hello"), 0); err != nil {
		t.Fatal(err)
	}
	s.setFail(func(r *op.Request) error {
		if r.Type == op.Lookup {
			s.setFail(nil)
			// The model's answer is taken now, and the write sent before it arrives.
			var rep op.Reply
			s.Handler.Do(ctx, r, &rep)
			if err := c.Flush(ctx, ino); err != nil {
				return err
			}
			s.Handler = stale{s.Handler, rep.Attr}
		}
		return nil
	})
	a, err := c.Lookup(ctx, c.Root(), "f")
	if err != nil || a.Size != 5 {
		t.Fatalf("size %d, %v", a.Size, err)
	}
}

// stale answers the next Lookup with old attributes.
type stale struct {
	op.Handler
	attr op.Attr
}

func (s stale) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	if req.Type == op.Lookup {
		rep.Attr = s.attr
		return nil
	}
	return s.Handler.Do(ctx, req, rep)
}

// TestRandomWrites compares delayed writes of all kinds with a byte slice.
func TestRandomWrites(t *testing.T) {
	c, _, ino := newSpied(t, Options{BufferBytes: 200 << 10})
	ctx := context.Background()
	rng := rand.New(rand.NewPCG(7, 7))
	var want []byte
	at := 0
	for i := range 4000 {
		n := 1 + rng.IntN(5000)
		switch rng.IntN(20) {
		case 0:
			n = bufferMax + rng.IntN(bufferMax)
		case 1:
			at = rng.IntN(600 << 10)
		case 2:
			at = max(at-rng.IntN(3000), 0)
		case 3:
			size := rng.IntN(len(want) + 1)
			if _, err := c.Setattr(ctx, ino, &SetAttr{Valid: op.SetSize, Size: uint64(size)}); err != nil {
				t.Fatal(err)
			}
			want = want[:size]
		case 4:
			got, err := c.Read(ctx, ino, uint64(at), n, nil)
			if lo, hi := min(at, len(want)), min(at+n, len(want)); err != nil || !bytes.Equal(got, want[lo:hi]) {
				t.Fatalf("step %d: read at %d: %v", i, at, err)
			}
		}
		data := bytes.Repeat([]byte{byte(i)}, n)
		flags := op.Flags(0)
		if rng.IntN(10) == 0 {
			flags, at = op.Append, len(want)
		}
		if err := c.Write(ctx, ino, uint64(at), data, flags); err != nil {
			t.Fatal(err)
		}
		if at+n > len(want) {
			want = append(want, make([]byte, at+n-len(want))...)
		}
		copy(want[at:], data)
		at += n
		if at > 900<<10 {
			at = 0
		}
		if len(want) > 950<<10 {
			want = want[:100]
			if _, err := c.Setattr(ctx, ino, &SetAttr{Valid: op.SetSize, Size: 100}); err != nil {
				t.Fatal(err)
			}
		}
	}
	got, err := c.Read(ctx, ino, 0, sealfs.IOMax, nil)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%v, or other data", err)
	}
}

func TestErrorOfDelayedWriteIsToldOnce(t *testing.T) {
	ctx := context.Background()
	full := func(r *op.Request) error {
		if r.Type == op.Write {
			return sealfs.ErrNoSpace
		}
		return nil
	}
	for name, tell := range map[string]func(*Client, sealfs.Ino) error{
		"write":   func(c *Client, ino sealfs.Ino) error { return c.Write(ctx, ino, 0, []byte("x"), 0) },
		"fsync":   func(c *Client, ino sealfs.Ino) error { return c.Fsync(ctx, ino) },
		"release": func(c *Client, ino sealfs.Ino) error { return c.Release(ctx, ino) },
	} {
		c, s, ino := newSpied(t, Options{})
		s.setFail(full)
		if err := c.Write(ctx, ino, 0, []byte("hello"), 0); err != nil {
			t.Fatalf("%s: the write was not delayed: %v", name, err)
		}
		// Somebody else looks and hears nothing of it.
		if a, err := c.Getattr(ctx, ino); err != nil || a.Size != 0 {
			t.Fatalf("%s: size %d, %v", name, a.Size, err)
		}
		s.setFail(nil)
		// The close of another descriptor, a child's or a reader's, must not
		// take it from the writer.
		if err := c.Flush(ctx, ino); err != sealfs.ErrNoSpace {
			t.Errorf("%s: the first flush: %v", name, err)
		}
		if err := tell(c, ino); err != sealfs.ErrNoSpace {
			t.Errorf("%s: %v", name, err)
		}
		if err := c.Flush(ctx, ino); err != nil {
			t.Errorf("%s: told again: %v", name, err)
		}
	}
}

func TestBuffersAreBounded(t *testing.T) {
	const files, limit = 64, 20 * bufferSmall
	h, root := newModel()
	c := New(h, Options{Volume: 1, Root: root, Shards: testShards, BufferBytes: limit})
	c.age = time.Hour
	ctx := context.Background()
	var inos []sealfs.Ino
	for i := range files {
		a, err := c.Create(ctx, root, fmt.Sprint(i), 0o600, Cred{})
		if err != nil {
			t.Fatal(err)
		}
		inos = append(inos, a.Ino)
		if err := c.Write(ctx, a.Ino, 0, []byte("data"), 0); err != nil {
			t.Fatal(err)
		}
		if n := c.buffered.Load(); n > limit {
			t.Fatalf("%d bytes delayed", n)
		}
	}
	if n := c.nodes.get(inos[0]); n.dirty.Load() {
		t.Fatal("the oldest is still delayed")
	}
	if n := c.nodes.get(inos[files-1]); !n.dirty.Load() {
		t.Fatal("the newest was not delayed")
	}
	if err := c.Close(); err != nil || c.dirtyCount.Load() != 0 || c.buffered.Load() != 0 {
		t.Fatalf("after close: %v, %d, %d", err, c.dirtyCount.Load(), c.buffered.Load())
	}
}

func TestDelayedWritesAge(t *testing.T) {
	c, s, ino := newSpied(t, Options{})
	c.age = 50 * time.Millisecond
	sent := make(chan struct{})
	s.setFail(func(r *op.Request) error {
		if r.Type == op.Write {
			close(sent)
		}
		return nil
	})
	start := time.Now()
	if err := c.Write(context.Background(), ino, 0, []byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	select {
	case <-sent:
		if d := time.Since(start); d < c.age {
			t.Fatalf("sent after %v", d)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("never sent")
	}
}

func TestDurableWritesAreNotDelayed(t *testing.T) {
	c, s, ino := newSpied(t, Options{Durable: true})
	for i := range 3 {
		if err := c.Write(context.Background(), ino, uint64(i), []byte("x"), 0); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.n(op.Write); n != 3 {
		t.Fatalf("%d requests", n)
	}
}

func TestHeldFileOutlivesItsName(t *testing.T) {
	c, s, ino := newSpied(t, Options{})
	ctx := context.Background()
	for range 2 {
		if _, err := c.Open(ctx, ino); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Unlink(ctx, c.Root(), "f"); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if a, err := c.Getattr(ctx, ino); err != nil || a.Nlink != 0 {
			t.Fatalf("after %d releases: %v, %d links", i, err, a.Nlink)
		}
		if err := c.Write(ctx, ino, 0, []byte("x"), 0); err != nil {
			t.Fatal(err)
		}
		if err := c.Release(ctx, ino); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Getattr(ctx, ino); err != sealfs.ErrNotExist {
		t.Fatalf("after the last release: %v", err)
	}
	if s.n(op.Release) != 1 {
		t.Fatalf("%d requests to release", s.n(op.Release))
	}
	if err := c.Release(ctx, ino); err != sealfs.ErrClosed {
		t.Fatalf("one release too many: %v", err)
	}
}

// TestConcurrentUse lets many goroutines open, write, look at and close the same few files.
func TestConcurrentUse(t *testing.T) {
	h, root := newModel()
	c := New(h, Options{Volume: 1, Root: root, Shards: testShards, BufferBytes: 64 << 10})
	ctx := context.Background()
	var wg sync.WaitGroup
	var writes atomic.Int64
	for g := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 1))
			for range 400 {
				name := fmt.Sprint(rng.IntN(4))
				a, err := c.Create(ctx, root, name, 0o600, Cred{})
				if err == sealfs.ErrExist {
					if a, err = c.Lookup(ctx, root, name); err == nil {
						a, err = c.Open(ctx, a.Ino)
					}
				}
				if err != nil {
					t.Errorf("open: %v", err)
					return
				}
				for range 5 {
					if err := c.Write(ctx, a.Ino, 0, []byte("line\n"), op.Append); err != nil {
						t.Errorf("write: %v", err)
					}
					writes.Add(1)
				}
				if b, err := c.Lookup(ctx, root, name); err != nil || b.Size < 25 {
					t.Errorf("lookup: %v, size %d", err, b.Size)
				}
				if err := c.Release(ctx, a.Ino); err != nil {
					t.Errorf("release: %v", err)
				}
			}
		})
	}
	wg.Wait()
	var size uint64
	list, _, err := c.Readdir(ctx, root, 0, 1000, true, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		size += e.Attr.Size
	}
	if size != uint64(writes.Load()*5) {
		t.Fatalf("%d bytes of %d writes", size, writes.Load())
	}
	if len(c.nodes.parts[0].nodes) != 0 || c.dirtyCount.Load() != 0 {
		t.Fatal("nodes are left")
	}
}

func TestSessionsNumberAndRetry(t *testing.T) {
	h, root := newModel()
	s := &spy{Handler: h, keep: op.Mkdir}
	c := New(s, Options{Volume: 1, Root: root, Shards: testShards, Session: 9, Retry: 5 * time.Second})
	lost := 2
	s.setFail(func(r *op.Request) error {
		if r.Type == op.Mkdir && lost > 0 {
			lost--
			return fmt.Errorf("no route: %w", sealfs.ErrUnavailable)
		}
		return nil
	})
	ctx := context.Background()
	for _, name := range []string{"a", "b"} {
		if _, err := c.Mkdir(ctx, root, name, 0o755, Cred{}); err != nil {
			t.Fatal(err)
		}
	}
	var got []uint64
	for _, r := range s.reqs {
		if r.Session != 9 || r.Low > r.Seq {
			t.Fatalf("request %+v", r)
		}
		got = append(got, r.Seq)
	}
	if fmt.Sprint(got) != "[1 1 1 2]" {
		t.Fatalf("sequences %v", got)
	}
	s.setFail(func(r *op.Request) error { return sealfs.ErrUnavailable })
	c.o.Retry = time.Millisecond
	if _, err := c.Getattr(ctx, root); !errors.Is(err, sealfs.ErrUnavailable) {
		t.Fatalf("no server: %v", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	c.o.Retry = time.Hour
	if _, err := c.Getattr(ctx, root); !errors.Is(err, sealfs.ErrInterrupted) {
		t.Fatalf("cancelled: %v", err)
	}
}

func TestUnlockSendsDelayedWrites(t *testing.T) {
	c, s, ino := newSpied(t, Options{})
	ctx := context.Background()
	l := op.Lock{Type: op.WriteLock, End: 99, Owner: 1}
	if err := c.SetLock(ctx, ino, l, 0); err != nil {
		t.Fatal(err)
	}
	if err := c.Write(ctx, ino, 0, []byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	l.Type = op.Unlock
	if err := c.SetLock(ctx, ino, l, 0); err != nil || s.n(op.Write) != 1 {
		t.Fatalf("%v, %d writes", err, s.n(op.Write))
	}
}

func TestMkdirSpreadsDirectories(t *testing.T) {
	c, _ := newClient(t)
	shards := map[sealfs.Shard]bool{}
	for i := range 200 {
		a, err := c.Mkdir(context.Background(), c.Root(), fmt.Sprint(i), 0o755, Cred{})
		if err != nil {
			t.Fatal(err)
		}
		shards[a.Ino.Home(testShards)] = true
	}
	if len(shards) < testShards/2 {
		t.Fatalf("200 directories lie in %d shards", len(shards))
	}
}

func TestFSIsAnIOFS(t *testing.T) {
	c, _ := newClient(t)
	f := c.FS(Cred{UID: 1, GID: 2})
	for _, err := range []error{
		f.MkdirAll("a/b/c", 0o755),
		f.WriteFile("a/b/c/file", []byte("contents"), 0o644),
		f.WriteFile("top", bytes.Repeat([]byte("0123456789"), 50000), 0o600),
		f.WriteFile("a/empty", nil, 0o644),
		f.Symlink("b/c/file", "a/link"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := fstest.TestFS(f.IOFS(), "a/b/c/file", "top", "a/empty", "a/link"); err != nil {
		t.Fatal(err)
	}
}

func TestPaths(t *testing.T) {
	c, model := newClient(t)
	f := c.FS(Cred{UID: 1, GID: 2})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	fails := func(err error, code sealfs.Code, std error) {
		t.Helper()
		if !errors.Is(err, code) || std != nil && !errors.Is(err, std) {
			t.Fatalf("%v, want %v", err, code)
		}
	}
	must(f.MkdirAll("/a/b", 0o750))
	must(f.MkdirAll("/a/b", 0o750))
	must(f.WriteFile("a/b/f", []byte("one"), 0o640))
	must(f.Symlink("/a/b", "abs"))
	must(f.Symlink("../b/../b/f", "a/b/rel"))
	must(f.Symlink("loop", "loop"))
	must(f.Symlink("a/new", "tonew"))
	must(f.Link("a/b/f", "hard"))
	for _, name := range []string{"a/b/f", "abs/f", "abs/rel", "hard", "./a//b/../b/f", "/../hard"} {
		if b, err := f.ReadFile(name); err != nil || string(b) != "one" {
			t.Fatalf("%s: %q, %v", name, b, err)
		}
	}
	must(f.WriteFile("tonew", []byte("through the link"), 0o600))
	if b, err := f.ReadFile("a/new"); err != nil || string(b) != "through the link" {
		t.Fatalf("%q, %v", b, err)
	}
	_, err := f.ReadFile("loop")
	fails(err, sealfs.ErrTooManySymlinks, nil)
	_, err = f.Stat("nothing")
	fails(err, sealfs.ErrNotExist, fs.ErrNotExist)
	_, err = f.Stat("hard/x")
	fails(err, sealfs.ErrNotDir, nil)
	_, err = f.OpenFile("hard", os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	fails(err, sealfs.ErrExist, fs.ErrExist)
	_, err = f.OpenFile("a", os.O_WRONLY, 0)
	fails(err, sealfs.ErrIsDir, nil)
	fails(f.Remove("a"), sealfs.ErrNotEmpty, nil)
	fails(f.Mkdir("/", 0o755), sealfs.ErrExist, fs.ErrExist)

	info, err := f.Stat("hard")
	must(err)
	attr := info.Sys().(*op.Attr)
	if info.Size() != 3 || info.Mode() != 0o640 || attr.Nlink != 2 || attr.UID != 1 || attr.GID != 2 {
		t.Fatalf("%v %+v", info, attr)
	}
	if info, err = f.Lstat("abs"); err != nil || info.Mode().Type() != fs.ModeSymlink {
		t.Fatalf("%v, %v", info, err)
	}
	must(f.Chmod("hard", 0o755|fs.ModeSetuid))
	must(f.Chtimes("hard", time.Time{}, time.Unix(1000, 5)))
	if info, err = f.Stat("hard"); err != nil || info.Mode() != 0o755|fs.ModeSetuid || !info.ModTime().Equal(time.Unix(1000, 5)) {
		t.Fatalf("%v, %v", info, err)
	}
	must(f.Chown("hard", 7, -1))
	if info, err = f.Stat("hard"); err != nil || info.Mode() != 0o755 || info.Sys().(*op.Attr).UID != 7 {
		t.Fatalf("%v, %v", info, err)
	}
	must(f.Setxattr("hard", "user.a", []byte("v")))
	if names, err := f.Listxattr("hard"); err != nil || len(names) != 1 || names[0] != "user.a" {
		t.Fatalf("%q, %v", names, err)
	}
	if v, err := f.Getxattr("hard", "user.a"); err != nil || string(v) != "v" {
		t.Fatalf("%q, %v", v, err)
	}
	must(f.Removexattr("hard", "user.a"))
	must(f.Truncate("hard", 1))
	must(f.Rename("hard", "a/b/f2"))

	file, err := f.OpenFile("log", os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	must(err)
	for _, s := range []string{"one ", "two"} {
		_, err := file.Write([]byte(s))
		must(err)
	}
	var b [16]byte
	if n, err := file.ReadAt(b[:7], 0); err != nil || string(b[:n]) != "one two" {
		t.Fatalf("%q, %v", b[:n], err)
	}
	must(file.Sync())
	must(file.Close())
	_, err = file.Write(nil)
	fails(err, sealfs.ErrClosed, fs.ErrClosed)

	entries, err := f.ReadDir("/")
	must(err)
	for _, e := range entries {
		must(f.RemoveAll(e.Name()))
	}
	must(f.RemoveAll("nothing"))
	if n := model.Inodes(); n != 1 {
		t.Fatalf("%d inodes are left", n)
	}
}

func BenchmarkCreateWriteRelease(b *testing.B) {
	c, _ := newClient(b)
	ctx := context.Background()
	data := make([]byte, 4096)
	b.ReportAllocs()
	for i := range b.N {
		a, err := c.Create(ctx, c.Root(), fmt.Sprint(i), 0o600, Cred{})
		if err != nil {
			b.Fatal(err)
		}
		c.Write(ctx, a.Ino, 0, data, 0)
		if err := c.Release(ctx, a.Ino); err != nil {
			b.Fatal(err)
		}
	}
}
