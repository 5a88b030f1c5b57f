package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"sealfs"
	"sealfs/internal/oracle"
	"sealfs/op"
)

// await waits until a condition holds.
func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for range 20_000 {
		if ok() {
			return
		}
		<-tick.C
	}
	t.Fatalf("waited in vain: %s", what)
}

// interrupted runs fn with a context that ends when ready holds, and expects EINTR.
func interrupted(t *testing.T, what string, ready func() bool, fn func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- fn(ctx) }()
	await(t, what+" does not get to the server", ready)
	select {
	case err := <-done:
		t.Fatalf("%s did not wait: %v", what, err)
	default:
	}
	cancel()
	if err := <-done; !errors.Is(err, sealfs.ErrInterrupted) || Errno(err) != syscall.EINTR {
		t.Fatalf("%s: %v", what, err)
	}
}

// content returns what the model has of a small file, past all clients.
func (u *cluster) content(t *testing.T, ino sealfs.Ino, off uint64) []byte {
	t.Helper()
	model := New(u.model, Options{Volume: 1, Root: u.root, Shards: testShards})
	b, err := model.Read(context.Background(), ino, off, 1000, nil)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestInterruptedWritesArrive interrupts those who wait for delayed writes to be
// sent to a server that is away: the data arrives, once.
func TestInterruptedWritesArrive(t *testing.T) {
	for name, test := range map[string]struct {
		off   uint64
		flags op.Flags
		size  uint64
	}{
		"home":        {0, 0, 0},
		"append":      {0, op.Append, 0},
		"chunk":       {sealfs.HomeBytes + 7*sealfs.ChunkBytes, 0, 0},
		"append far":  {sealfs.HomeBytes + 3*sealfs.ChunkBytes, op.Append, sealfs.HomeBytes + 3*sealfs.ChunkBytes},
		"append over": {sealfs.HomeBytes - 2, op.Append, sealfs.HomeBytes - 2},
	} {
		t.Run(name, func(t *testing.T) {
			u := newCluster()
			c, net := u.lone(t, 1, Options{})
			c.age = time.Hour
			bg := context.Background()
			ino := createIn(t, c, net, 1, "f")
			if test.size > 0 {
				if _, err := c.Setattr(bg, ino, &SetAttr{Valid: op.SetSize, Size: test.size}); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.Write(bg, ino, test.off, []byte("once "), test.flags); err != nil {
				t.Fatal(err)
			}
			store := net.Store(ino.DataShard(test.off, testShards))
			net.Hang(store)
			waits := func() bool { return net.Waiting(store) > 0 }
			interrupted(t, "flush", waits, func(ctx context.Context) error { return c.Flush(ctx, ino) })
			// The background has it now; others wait for that.
			interrupted(t, "fsync", waits, func(ctx context.Context) error { return c.Fsync(ctx, ino) })
			interrupted(t, "write", waits, func(ctx context.Context) error {
				return c.Write(ctx, ino, test.off, []byte("never"), test.flags)
			})
			interrupted(t, "stat", waits, func(ctx context.Context) error { _, err := c.Getattr(ctx, ino); return err })
			net.Away(store)
			await(t, "no attempt", func() bool { return net.Refused(store) > 2 })
			net.Back(store)
			if err := c.Flush(bg, ino); err != nil {
				t.Fatal(err)
			}
			if b := u.content(t, ino, test.off); string(b) != "once " {
				t.Fatalf("%q", b)
			}
			if err := c.Write(bg, ino, test.off+5, []byte("more"), test.flags); err != nil {
				t.Fatal(err)
			}
			if err := c.Release(bg, ino); err != nil {
				t.Fatal(err)
			}
			if b := u.content(t, ino, test.off); string(b) != "once more" {
				t.Fatalf("%q", b)
			}
			if c.stuck.Load() != 0 || c.buffered.Load() != 0 || c.dirtyCount.Load() != 0 {
				t.Fatalf("%d bytes stuck, %d buffered, %d nodes", c.stuck.Load(), c.buffered.Load(), c.dirtyCount.Load())
			}
		})
	}
}

// TestInterruptedReopening interrupts who opens a file again whose release is under
// way to a server that is away: nothing is left open at the end.
func TestInterruptedReopening(t *testing.T) {
	u := newCluster()
	c, net := u.lone(t, 1, Options{})
	c.lazy.Store(true) // as a mount has it
	bg := context.Background()
	ino := createIn(t, c, net, 1, "f")
	net.Hang(1)
	if err := c.Release(bg, ino); err != nil {
		t.Fatal(err)
	}
	interrupted(t, "open", func() bool { return net.Waiting(1) > 0 }, func(ctx context.Context) error {
		_, err := c.Open(ctx, ino)
		return err
	})
	net.Back(1)
	await(t, "the file stays open", func() bool { return u.model.Held() == 0 })
}

// TestOthersGoOn writes to many files of a store that is away, more than may be
// delayed altogether, while files of another store are used.
func TestOthersGoOn(t *testing.T) {
	for how, leave := range map[string]func(*oracle.Net, int){"away": (*oracle.Net).Away, "hung": (*oracle.Net).Hang} {
		t.Run(how, func(t *testing.T) {
			u := newCluster()
			const limit = 8 * bufferSmall
			c, net := u.lone(t, 1, Options{BufferBytes: limit})
			c.age = 10 * time.Millisecond
			ctx := context.Background()
			var dead, live []sealfs.Ino
			for i := range 30 {
				dead = append(dead, createIn(t, c, net, 0, fmt.Sprint("dead", i)))
				live = append(live, createIn(t, c, net, 1, fmt.Sprint("live", i)))
			}
			leave(net, 0)
			late, cancel := context.WithCancel(ctx)
			written := make(chan error, len(dead))
			for _, ino := range dead {
				go func() { written <- c.Write(late, ino, 0, []byte("dead"), 0) }()
			}
			await(t, "nothing is stuck", func() bool { return c.stuck.Load() > 0 })
			for round := range 20 {
				for _, ino := range live {
					if err := c.Write(ctx, ino, 0, fmt.Appendf(nil, "round %02d", round), 0); err != nil {
						t.Fatal(err)
					}
					if n := c.buffered.Load(); n > 2*limit+int64(len(dead)+1)*bufferSmall {
						t.Fatalf("%d bytes are delayed", n)
					}
				}
			}
			for _, ino := range live {
				await(t, "an aged write is not sent", func() bool { return string(u.content(t, ino, 0)) == "round 19" })
				if err := c.Release(ctx, ino); err != nil {
					t.Fatal(err)
				}
			}
			cancel()
			accepted := 0
			for range dead {
				if err := <-written; err == nil {
					accepted++
				} else if !errors.Is(err, sealfs.ErrInterrupted) {
					t.Fatal(err)
				}
			}
			if accepted == 0 {
				t.Fatal("no write was delayed")
			}
			net.Back(0)
			for _, ino := range dead {
				if err := c.Release(ctx, ino); err != nil {
					t.Fatal(err)
				}
			}
			if c.stuck.Load() != 0 || c.buffered.Load() != 0 {
				t.Fatalf("%d bytes stuck, %d buffered", c.stuck.Load(), c.buffered.Load())
			}
		})
	}
}

func TestRetryEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newCluster()
		net := oracle.NewNet(u.model, 3, 1)
		c := New(generous{net}, Options{Volume: 1, Root: u.root, Shards: testShards, Session: 1, Retry: time.Minute})
		defer c.Close()
		net.Away(net.Store(u.root.Home(testShards)))
		start := time.Now()
		_, err := c.Getattr(context.Background(), u.root)
		if Errno(err) != syscall.EIO || !errors.Is(err, sealfs.ErrUnavailable) {
			t.Fatalf("%v is %v", err, Errno(err))
		}
		if d := time.Since(start); d < time.Minute || d > time.Minute+2*time.Second {
			t.Fatalf("gave up after %v", d)
		}
		if n := net.Refused(net.Store(u.root.Home(testShards))); n < 60 || n > 150 {
			t.Fatalf("%d attempts in a minute", n)
		}
	})
}

// TestCloseEnds closes a client whose delayed writes cannot be sent.
func TestCloseEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newCluster()
		net := oracle.NewNet(u.model, 3, 1)
		c := New(generous{net}, Options{Volume: 1, Root: u.root, Shards: testShards, Session: 1, Each: net.Each})
		watched(t, c)
		ino := createIn(t, c, net, 2, "f")
		if err := c.Write(context.Background(), ino, 0, []byte("lost"), 0); err != nil {
			t.Fatal(err)
		}
		net.Away(2)
		waiting := make(chan error)
		go func() {
			_, err := c.Getattr(context.Background(), ino)
			waiting <- err
		}()
		start := time.Now()
		if err := c.Close(); !errors.Is(err, sealfs.ErrUnavailable) {
			t.Fatalf("close: %v", err)
		}
		if d := time.Since(start); d != closePatience {
			t.Fatalf("after %v", d)
		}
		if err := <-waiting; !errors.Is(err, sealfs.ErrInterrupted) {
			t.Fatalf("who waited hears %v", err)
		}
	})
}

func TestStatfsAddsStores(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newCluster()
		net := oracle.NewNet(u.model, 3, 1)
		var quota, files uint64
		c := New(net, Options{
			Volume: 1, Root: u.root, Shards: testShards, Session: 1, Each: net.Each,
			Quota: func() (uint64, uint64) { return quota, files },
		})
		defer c.Close()
		ctx := context.Background()
		u.model.Limit(1 << 30)
		for store := range 3 {
			ino := createIn(t, c, net, store, fmt.Sprint(store))
			if err := c.Write(ctx, ino, 0, make([]byte, 10*sealfs.BlockSize), 0); err != nil {
				t.Fatal(err)
			}
			if err := c.Release(ctx, ino); err != nil {
				t.Fatal(err)
			}
		}
		check := func(bytes, free uint64) {
			t.Helper()
			s, err := c.Statfs(ctx)
			if err != nil || s.Bytes != bytes || s.BytesFree != free {
				t.Fatalf("%+v, %v, want %d and %d", s, err, bytes, free)
			}
		}
		const used = 30 * sealfs.BlockSize
		check(3<<30, 3<<30-used)
		quota = 1 << 20
		check(1<<20, 1<<20-used)
		quota = 4096
		check(4096, 0)
		quota = 1 << 40
		check(3<<30, 3<<30-used)
		files = 5
		if s, err := c.Statfs(ctx); err != nil || s.Inodes != 5 || s.InodesFree != 0 {
			t.Fatalf("%+v, %v", s, err)
		}
		net.Away(0)
		check(2<<30, 2<<30-used/3*2)
		net.Hang(1)
		start := time.Now()
		check(1<<30, 1<<30-used/3)
		if d := time.Since(start); d > awayMax+time.Second/10 {
			t.Fatalf("took %v", d)
		}
		net.Away(1)
		net.Away(2)
		time.AfterFunc(time.Minute, func() { net.Back(2) })
		check(1<<30, 1<<30-used/3)
		if d := time.Since(start); d < time.Minute {
			t.Fatalf("answered after %v", d)
		}
	})
}

// TestLookupElsewhere looks up what lies in other stores than its directory.
func TestLookupElsewhere(t *testing.T) {
	u := newCluster()
	net := oracle.NewNet(u.model, 3, 1)
	s := &spy{Handler: net}
	c := u.clientOf(t, net, s, 1, Options{})
	ctx := context.Background()
	const dirs = 20
	for i := range dirs {
		name := fmt.Sprint(i)
		a, err := c.Mkdir(ctx, u.root, name, 0o751, Cred{UID: 3})
		if err != nil || a.Mode != modeDir|0o751 || a.UID != 3 {
			t.Fatalf("%+v, %v", a, err)
		}
		b, err := c.Lookup(ctx, u.root, name)
		if err != nil || a != b {
			t.Fatalf("%+v, %v, want %+v", b, err, a)
		}
	}
	list, _, err := c.Readdir(ctx, u.root, 0, 10000, true, nil)
	if err != nil || len(list) != dirs {
		t.Fatalf("%d entries, %v", len(list), err)
	}
	getattrs := s.n(op.Getattr)
	for _, e := range list {
		same := net.Store(e.Ino.Home(testShards)) == net.Store(u.root.Home(testShards))
		if (e.Attr.Ino != 0) != same || same && e.Attr.Version == 0 || e.Type != modeDir>>12 {
			t.Errorf("%+v", e)
		}
	}
	if s.n(op.Getattr) != getattrs {
		t.Error("readdir asked for attributes one by one")
	}
	// A name whose inode goes while it is looked up.
	var gone op.Dirent
	for _, e := range list {
		if e.Attr.Ino == 0 {
			gone = e
		}
	}
	s.setFail(func(r *op.Request) error {
		if r.Type == op.Getattr && r.Ino == gone.Ino {
			s.setFail(nil)
			req := op.Request{Type: op.Rename, Volume: 1, Dir: u.root, Name: "new", Dir2: u.root, Name2: gone.Name, Shard: u.root.Home(testShards)}
			var rep op.Reply
			u.model.Do(ctx, &req, &rep)
			return rep.Err()
		}
		return nil
	})
	want, err := c.Mkdir(ctx, u.root, "new", 0o700, Cred{})
	if err != nil {
		t.Fatal(err)
	}
	if a, err := c.Lookup(ctx, u.root, gone.Name); err != nil || a.Ino != want.Ino || a.Mode != modeDir|0o700 {
		t.Fatalf("%+v, %v, want inode %d", a, err, want.Ino)
	}
	// One that stays although its inode is gone.
	s.setFail(func(r *op.Request) error {
		if r.Type == op.Getattr {
			return sealfs.ErrNotExist
		}
		return nil
	})
	for _, e := range list {
		if e.Attr.Ino == 0 && e.Name != gone.Name {
			before := s.n(op.Lookup)
			if _, err := c.Lookup(ctx, u.root, e.Name); err != sealfs.ErrNotExist {
				t.Fatalf("%v", err)
			}
			if n := s.n(op.Lookup) - before; n != lookupMax {
				t.Fatalf("looked up %d times", n)
			}
		}
	}
	s.setFail(nil)
}

// TestAnswersGetLost checks that changes happen once although answers are lost.
func TestAnswersGetLost(t *testing.T) {
	u := newCluster()
	c, net := u.lone(t, 1, Options{})
	net.Lose(0.2)
	ctx := context.Background()
	var want []byte
	a, err := c.Create(ctx, u.root, "f", 0o600, Cred{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 300 {
		line := fmt.Appendf(nil, "%d\n", i)
		want = append(want, line...)
		name := fmt.Sprint(i)
		d, err := c.Mkdir(ctx, u.root, name, 0o700, Cred{})
		if err != nil {
			t.Fatalf("mkdir: %v", err)
		}
		for what, err := range map[string]error{
			"append": c.Write(ctx, a.Ino, 0, line, op.Append),
			"rename": c.Rename(ctx, u.root, name, d.Ino, name, op.NoReplace),
		} {
			if err != nil && what != "rename" || err == nil && what == "rename" {
				t.Fatalf("%s: %v", what, err)
			}
		}
		if err := c.Flush(ctx, a.Ino); err != nil {
			t.Fatal(err)
		}
		if err := c.Rmdir(ctx, u.root, name); err != nil {
			t.Fatalf("rmdir: %v", err)
		}
	}
	got, err := c.Read(ctx, a.Ino, 0, sealfs.IOMax, nil)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%v, or other data", err)
	}
	if net.Lost() < 50 {
		t.Fatalf("%d answers were lost", net.Lost())
	}
	if err := c.Release(ctx, a.Ino); err != nil {
		t.Fatal(err)
	}
}
