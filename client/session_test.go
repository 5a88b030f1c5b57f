package client

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"testing"
	"time"

	"os"

	"sealfs"
	"sealfs/internal/oracle"
	"sealfs/op"
)

// hook is a handler that calls before and after, if not nil, around each request.
type hook struct {
	op.Handler
	mu     sync.Mutex
	before func(*op.Request)
	after  func(*op.Request, *op.Reply)
}

func (h *hook) set(before func(*op.Request), after func(*op.Request, *op.Reply)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.before, h.after = before, after
}

func (h *hook) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	h.mu.Lock()
	before, after := h.before, h.after
	h.mu.Unlock()
	if before != nil {
		before(req)
	}
	err := h.Handler.Do(ctx, req, rep)
	if err == nil && after != nil {
		after(req, rep)
	}
	return err
}

// reconnect does what happens when a store restarts: it forgets, and is told again.
func (u *cluster) reconnect(t *testing.T, net *oracle.Net, c *Client, store int) {
	t.Helper()
	u.model.Restart(store)
	err := c.Register(context.Background(), u.model, func(s sealfs.Shard) bool { return net.Store(s) == store })
	if err != nil {
		t.Errorf("register: %v", err)
	}
	u.model.Settle()
}

func TestOpenFilesSurviveARestart(t *testing.T) {
	u := newCluster()
	c, net := u.client(t, 7, Options{})
	ctx := context.Background()
	inodes := u.model.Inodes()
	d, err := c.Mkdir(ctx, u.root, "d", 0o700, Cred{})
	if err != nil {
		t.Fatal(err)
	}
	store := net.Store(d.Ino.Home(testShards))
	var files []sealfs.Ino
	for i := range op.OpensMax + 10 {
		var a op.Attr
		if i%2 == 0 {
			a, err = c.Tmpfile(ctx, d.Ino, 0o600, Cred{})
		} else if a, err = c.Create(ctx, d.Ino, "f", 0o600, Cred{}); err == nil {
			err = c.Unlink(ctx, d.Ino, "f")
		}
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, a.Ino)
	}
	for range 2 {
		if _, err := c.Open(ctx, files[0]); err != nil {
			t.Fatal(err)
		}
	}
	opens := map[sealfs.Ino]uint64{}
	c.Opens(func(ino sealfs.Ino, count uint64) { opens[ino] = count })
	if len(opens) != len(files) || opens[files[0]] != 3 || opens[files[1]] != 1 {
		t.Fatalf("%d files are open, the first %d times", len(opens), opens[files[0]])
	}
	u.reconnect(t, net, c, store)
	if n := u.model.Holds(7, files[0]); n != 3 {
		t.Fatalf("held %d times", n)
	}
	for i, ino := range files {
		if _, err := c.Getattr(ctx, ino); err != nil {
			t.Fatalf("file %d: %v", i, err)
		}
		if err := c.Release(ctx, ino); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := c.Release(ctx, files[0]); err != nil {
			t.Fatal(err)
		}
	}
	if n := u.model.Inodes(); n != inodes+1 {
		t.Fatalf("%d inodes are left", n-inodes-1)
	}
}

// TestOpeningsUnderWay lets a store restart, and be told what is open, at every
// moment of an opening: it must be held afterwards.
func TestOpeningsUnderWay(t *testing.T) {
	for _, typ := range []op.Type{op.Open, op.Create, op.Tmpfile} {
		for _, when := range []string{"before", "after"} {
			t.Run(fmt.Sprint(typ, " ", when), func(t *testing.T) {
				u := newCluster()
				net := oracle.NewNet(u.model, 3, 1)
				h := &hook{Handler: net}
				c := u.clientOf(t, net, h, 7, Options{})
				ctx := context.Background()
				ino := createIn(t, c, net, 1, "f")
				if err := c.Release(ctx, ino); err != nil {
					t.Fatal(err)
				}
				dir := u.root
				store := net.Store(dir.Home(testShards))
				if typ == op.Open {
					store = 1
				}
				restart := func(req *op.Request) {
					if req.Type == typ {
						h.set(nil, nil)
						u.reconnect(t, net, c, store)
					}
				}
				if when == "before" {
					h.set(restart, nil)
				} else {
					h.set(nil, func(req *op.Request, _ *op.Reply) { restart(req) })
				}
				var a op.Attr
				var err error
				switch typ {
				case op.Open:
					a, err = c.Open(ctx, ino)
				case op.Create:
					a, err = c.Create(ctx, dir, "new", 0o600, Cred{})
				case op.Tmpfile:
					a, err = c.Tmpfile(ctx, dir, 0o600, Cred{})
					if when == "after" {
						// It was freed before anybody had it.
						if !errors.Is(err, sealfs.ErrIO) {
							t.Fatalf("%v", err)
						}
						return
					}
				}
				if err != nil {
					t.Fatal(err)
				}
				if u.model.Holds(7, a.Ino) == 0 {
					t.Fatal("not held")
				}
				u.reconnect(t, net, c, store)
				if u.model.Holds(7, a.Ino) == 0 {
					t.Fatal("not registered")
				}
				if err := c.Release(ctx, a.Ino); err != nil {
					t.Fatal(err)
				}
				if n := u.model.Holds(7, a.Ino); n != 0 {
					t.Fatalf("still held %d times", n)
				}
			})
		}
	}
}

// TestOpenWaitsForRelease opens a file while its last release is under way, which
// must not let the new opening go.
func TestOpenWaitsForRelease(t *testing.T) {
	u := newCluster()
	net := oracle.NewNet(u.model, 3, 1)
	h := &hook{Handler: net}
	c := u.clientOf(t, net, h, 7, Options{})
	ctx := context.Background()
	ino := createIn(t, c, net, 1, "f")
	reached, leave := make(chan struct{}), make(chan struct{})
	h.set(func(req *op.Request) {
		if req.Type == op.Release {
			h.set(nil, nil)
			close(reached)
			<-leave
		}
	}, nil)
	released, opened := make(chan error), make(chan error, 1)
	go func() { released <- c.Release(ctx, ino) }()
	<-reached
	short, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := c.Open(short, ino); !errors.Is(err, sealfs.ErrInterrupted) {
		t.Fatalf("interrupted: %v", err)
	}
	go func() {
		_, err := c.Open(ctx, ino)
		opened <- err
	}()
	u.reconnect(t, net, c, 1)
	select {
	case err := <-opened:
		t.Fatalf("did not wait: %v", err)
	default:
	}
	close(leave)
	if err := errors.Join(<-released, <-opened); err != nil {
		t.Fatal(err)
	}
	if n := u.model.Holds(7, ino); n != 1 {
		t.Fatalf("held %d times", n)
	}
	if err := c.Release(ctx, ino); err != nil {
		t.Fatal(err)
	}
}

// TestInterruptedOpeningsAreReleased gives up openings whose server is away.
func TestInterruptedOpeningsAreReleased(t *testing.T) {
	u := newCluster()
	c, net := u.client(t, 7, Options{})
	bg := context.Background()
	ino := createIn(t, c, net, 1, "f")
	if err := c.Release(bg, ino); err != nil {
		t.Fatal(err)
	}
	home := net.Store(u.root.Home(testShards))
	inodes := u.model.Inodes()
	for name, test := range map[string]struct {
		store int
		open  func(ctx context.Context) (op.Attr, error)
		made  int
	}{
		"open":    {1, func(ctx context.Context) (op.Attr, error) { return c.Open(ctx, ino) }, 0},
		"create":  {home, func(ctx context.Context) (op.Attr, error) { return c.Create(ctx, u.root, "g", 0o600, Cred{}) }, 1},
		"tmpfile": {home, func(ctx context.Context) (op.Attr, error) { return c.Tmpfile(ctx, u.root, 0o600, Cred{}) }, 0},
	} {
		net.Hang(test.store)
		waits := func() bool { return net.Waiting(test.store) > 0 }
		interrupted(t, name, waits, func(ctx context.Context) error { _, err := test.open(ctx); return err })
		await(t, name+" is not seen through", waits)
		net.Back(test.store)
		inodes += test.made
		await(t, name+" is not released", func() bool {
			open := 0
			c.Opens(func(sealfs.Ino, uint64) { open++ })
			return open == 0 && u.model.Held() == 0 && u.model.Inodes() == inodes
		})
	}
}

// TestSessionEnds loses the session: what is open fails, all else waits for the next one.
func TestSessionEnds(t *testing.T) {
	for _, how := range []string{"server", "owner"} {
		t.Run(how, func(t *testing.T) {
			u := newCluster()
			c, _ := u.lone(t, 7, Options{})
			c.age = time.Hour
			fs := c.FS(Cred{})
			f, err := fs.OpenFile("f", os.O_CREATE|os.O_RDWR, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.Write([]byte("kept")); err != nil {
				t.Fatal(err)
			}
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			if _, err := f.Write([]byte("lost")); err != nil {
				t.Fatal(err)
			}
			if how == "server" {
				u.model.EndSession(7)
				if err := f.Sync(); !errors.Is(err, sealfs.ErrSession) {
					t.Fatalf("sync: %v", err)
				}
			} else {
				c.Fence(errors.New("no answer from the managers"))
			}
			<-c.Expired()
			u.model.EndSession(7)
			if _, err := f.Write([]byte("x")); !errors.Is(err, sealfs.ErrSession) || Errno(err) != syscall.EIO {
				t.Fatalf("write: %v is %v", err, Errno(err))
			}
			if err := c.Resume(7); err == nil {
				t.Fatal("the same session again")
			}
			made := make(chan error, 1)
			go func() { made <- fs.Mkdir("d", 0o700) }()
			interrupted(t, "lookup", func() bool { return true }, func(ctx context.Context) error {
				_, err := c.Lookup(ctx, u.root, "f")
				return err
			})
			select {
			case err := <-made:
				t.Fatalf("mkdir did not wait: %v", err)
			default:
			}
			if err := c.Resume(8); err != nil {
				t.Fatal(err)
			}
			if err := <-made; err != nil {
				t.Fatal(err)
			}
			if _, err := f.ReadAt(make([]byte, 1), 0); !errors.Is(err, sealfs.ErrSession) {
				t.Fatalf("read: %v", err)
			}
			g, err := fs.OpenFile("f", os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); !errors.Is(err, sealfs.ErrSession) {
				t.Fatalf("close: %v", err)
			}
			if b, err := g.readAll(); err != nil || string(b) != "kept" {
				t.Fatalf("%q, %v", b, err)
			}
			if n := u.model.Holds(8, g.Ino()); n != 1 || u.model.Holds(7, g.Ino()) != 0 {
				t.Fatalf("held %d times", n)
			}
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
			await(t, "buffers are left", func() bool { return c.buffered.Load() == 0 && c.dirtyCount.Load() == 0 })
		})
	}
}

// TestDoubtfulChangesEndWithTheSession does not repeat under another session what may
// have happened under the last one.
func TestDoubtfulChangesEndWithTheSession(t *testing.T) {
	u := newCluster()
	c, net := u.client(t, 7, Options{})
	store := net.Store(u.root.Home(testShards))
	net.Away(store)
	made := make(chan error)
	go func() {
		_, err := c.Mkdir(context.Background(), u.root, "d", 0o700, Cred{})
		made <- err
	}()
	await(t, "no attempt", func() bool { return net.Refused(store) > 0 })
	c.Fence(nil)
	if err := <-made; !errors.Is(err, sealfs.ErrSession) {
		t.Fatalf("%v", err)
	}
	if err := c.Resume(8); err != nil {
		t.Fatal(err)
	}
	net.Back(store)
}
