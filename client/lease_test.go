package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"sealfs"
	"sealfs/internal/oracle"
	"sealfs/op"
)

// lessor is generous, until the test has it revoke something.
type lessor struct {
	op.Handler
	mu      sync.Mutex
	base    uint64 // of numbers: another one for each incarnation
	issued  uint64
	acked   uint64
	queue   []op.Revoke
	changed chan struct{} // closed and replaced with each of these
	last    op.Request    // Watch
	mute    bool          // answers grant nothing
	log     []string
}

func newLessor(h op.Handler) *lessor { return &lessor{Handler: h, changed: make(chan struct{})} }

func (l *lessor) wake() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// revoke issues a revocation and returns its number.
func (l *lessor) revoke(kind op.RevokeKind, ino sealfs.Ino, name string) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.issued++
	l.queue = append(l.queue, op.Revoke{Num: l.issued, Kind: kind, Ino: ino, Name: name})
	l.wake()
	return l.issued
}

// await returns when a revocation is acknowledged.
func (l *lessor) await(num uint64) {
	for {
		l.mu.Lock()
		changed, done := l.changed, l.acked >= num
		l.mu.Unlock()
		if done {
			return
		}
		<-changed
	}
}

// restart begins another incarnation, which knows nobody.
func (l *lessor) restart() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.base += 1 << 32
	l.issued, l.acked, l.queue = l.base, l.base, nil
	l.wake()
}

func (l *lessor) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	if req.Type == op.Watch {
		return l.watch(ctx, req, rep)
	}
	l.mu.Lock()
	if req.Type == op.Write {
		l.log = append(l.log, string(req.Data))
	}
	l.mu.Unlock()
	err := l.Handler.Do(ctx, req, rep)
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.mute {
		rep.Lease = op.LeaseIno | op.LeaseDir
		if req.Type == op.Create || req.Flags&op.WantWrite != 0 {
			rep.Lease |= op.LeaseWrite
		}
		rep.Stamp = l.issued
	}
	return err
}

func (l *lessor) watch(ctx context.Context, req *op.Request, rep *op.Reply) error {
	timer := time.NewTimer(time.Duration(req.Len) * time.Millisecond)
	defer timer.Stop()
	for first, late := true, false; ; first = false {
		l.mu.Lock()
		if req.Off != 0 && req.Off < l.base || req.Off > l.issued {
			l.mu.Unlock()
			rep.Code = sealfs.ErrInvalid
			return nil
		}
		if first {
			l.last = *req
			if l.acked = max(l.acked, req.Off); len(l.log) < 100 {
				l.log = append(l.log, fmt.Sprint("ack ", req.Off-min(req.Off, l.base)))
			}
			l.queue = slices.DeleteFunc(l.queue, func(v op.Revoke) bool { return v.Num <= l.acked })
			l.wake()
		}
		rep.Revokes = append(rep.Revokes[:0], l.queue...)
		rep.Stamp = l.issued
		changed := l.changed
		l.mu.Unlock()
		if len(rep.Revokes) > 0 || late || req.Len == 0 {
			return nil
		}
		select {
		case <-changed:
		case <-timer.C:
			late = true
		case <-ctx.Done():
			return errGaveUp
		}
	}
}

func (l *lessor) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	log := l.log
	l.log = nil
	return log
}

// leased runs a test with a client of a lessor.
func leased(t *testing.T, fn func(t *testing.T, c *Client, l *lessor)) {
	synctest.Test(t, func(t *testing.T) {
		h, root := newModel()
		l := newLessor(h)
		c := New(l, Options{Volume: 1, Root: root, Shards: testShards, Session: 1})
		defer func() {
			if err := c.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
		}()
		watched(t, c)
		fn(t, c, l)
	})
}

// TestRevocationsEndBelief believes what was told under a lease, until its revocation, and not what
// an older answer says that comes afterwards.
func TestRevocationsEndBelief(t *testing.T) {
	leased(t, func(t *testing.T, c *Client, l *lessor) {
		ctx := context.Background()
		a, err := c.create(ctx, c.Root(), "f", 0o644, Cred{})
		if err != nil || !c.believes(a.Ino, a.ino) || !c.believes(c.Root(), a.dir) || !c.mayDelay(a.Ino) {
			t.Fatalf("%+v, %v", a, err)
		}
		if _, err := c.Setattr(ctx, c.Root(), &SetAttr{Valid: op.SetMode, Mode: 0o700}); err != nil {
			t.Fatal(err)
		}
		if _, ok := c.dirAttr(c.Root()); !ok {
			t.Error("the directory's attributes are not believed")
		}
		// A name: the lease on the directory stays, but nothing told before counts.
		l.await(l.revoke(op.RevokeName, c.Root(), "g"))
		if _, ok := c.dirAttr(c.Root()); ok || c.believes(c.Root(), a.dir) || c.leases.has(c.Root()).serial == 0 || !c.believes(a.Ino, a.ino) {
			t.Error("after the revocation of a name")
		}
		// The right to delay alone.
		l.await(l.revoke(op.RecallWrite, a.Ino, ""))
		if c.mayDelay(a.Ino) || !c.believes(a.Ino, a.ino) {
			t.Error("after a recall")
		}
		num := l.revoke(op.RevokeInode, a.Ino, "")
		l.await(num)
		if c.believes(a.Ino, a.ino) {
			t.Error("after a revocation")
		}
		// Answers from before.
		late := func(ino sealfs.Ino, stamp, mark uint64) belief {
			k := c.begin(op.Getattr, ino)
			defer k.end()
			k.mark, k.rep.Lease, k.rep.Stamp, k.rep.Attr = mark, op.LeaseIno, stamp, op.Attr{Ino: ino, Version: 1}
			c.believe(k)
			return k.ino
		}
		if late(a.Ino, num-1, c.leases.mark()) != 0 {
			t.Error("an older answer is believed")
		}
		// Also when the revocation is forgotten.
		for i := range 100 * revokedMax {
			c.leases.revoke(&op.Revoke{Num: num + 1 + uint64(i), Kind: op.RevokeInode, Ino: a.Ino + sealfs.Ino(i+1)*testShards})
		}
		if late(a.Ino, num-1, c.leases.mark()) != 0 {
			t.Error("an older answer is believed once its revocation is forgotten")
		}
		if late(a.Ino, num+1<<32, c.leases.mark()) == 0 {
			t.Error("a new answer is not believed")
		}
		n := 0
		for i := range c.leases.parts {
			n += len(c.leases.parts[i].revoked)
		}
		if n > len(c.leases.parts)*revokedMax {
			t.Errorf("%d revocations are remembered", n)
		}
	})
}

// TestRecallSends has delayed writes asked for: they are sent before the acknowledgement,
// also when a writer has the gate, and later ones at once.
func TestRecallSends(t *testing.T) {
	for _, kind := range []op.RevokeKind{op.RecallWrite, op.RevokeInode} {
		leased(t, func(t *testing.T, c *Client, l *lessor) {
			c.age = time.Hour
			ctx := context.Background()
			a, err := c.Create(ctx, c.Root(), "f", 0o644, Cred{})
			if err != nil {
				t.Fatal(err)
			}
			write := func(off uint64, text string) {
				t.Helper()
				if err := c.Write(ctx, a.Ino, off, []byte(text), 0); err != nil {
					t.Fatal(err)
				}
			}
			write(0, "one ")
			write(4, "two ")
			synctest.Wait()
			l.take()
			n := c.nodes.get(a.Ino)
			turn, err := n.turn(ctx)
			if err != nil {
				t.Fatal(err)
			}
			num := l.revoke(kind, a.Ino, "")
			synctest.Wait()
			if log := l.take(); len(log) != 0 {
				t.Errorf("before the writer is done: %q", log)
			}
			turn.end()
			l.await(num)
			want := []string{"one two ", fmt.Sprint("ack ", num)}
			if log := l.take(); !slices.Equal(log, want) {
				t.Errorf("%q", log)
			}
			write(8, "three")
			if log := l.take(); !slices.Equal(log, []string{"three"}) {
				t.Errorf("after the recall: %q", log)
			}
			if err := c.Release(ctx, a.Ino); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// delayed makes a file to which a write is delayed, for as long as nobody asks for it.
func delayed(t *testing.T, c *Client) op.Attr {
	t.Helper()
	c.age = time.Hour
	a, err := c.Create(t.Context(), c.Root(), "f", 0o644, Cred{})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Write(t.Context(), a.Ino, 0, []byte("delayed"), 0); err != nil {
		t.Fatal(err)
	}
	return a
}

// TestRecallSendsWhatWasDelayedBefore loses the store after a write was delayed: belief is over,
// the data is not; when the server asks for it, it is sent before the acknowledgement.
func TestRecallSendsWhatWasDelayedBefore(t *testing.T) {
	leased(t, func(t *testing.T, c *Client, l *lessor) {
		ctx, a := context.Background(), delayed(t, c)
		l.mu.Lock()
		l.mute = true
		l.mu.Unlock()
		c.disbelieve(func(sealfs.Shard) bool { return true })
		if c.mayDelay(a.Ino) {
			t.Error("writes may be delayed without a lease")
		}
		watched(t, c)
		l.take()
		num := l.revoke(op.RecallWrite, a.Ino, "")
		l.await(num)
		if log := l.take(); !slices.Equal(log, []string{"delayed", fmt.Sprint("ack ", num)}) {
			t.Errorf("%q", log)
		}
		if err := c.Release(ctx, a.Ino); err != nil {
			t.Fatal(err)
		}
	})
}

// TestBeliefNeedsLife stops to believe when no server has given a sign of life for a term, and
// when the session has ended, and begins again.
func TestBeliefNeedsLife(t *testing.T) {
	leased(t, func(t *testing.T, c *Client, l *lessor) {
		ctx := context.Background()
		a, err := c.getattr(ctx, c.Root())
		if err != nil {
			t.Fatal(err)
		}
		<-time.After(10 * leaseTerm)
		if !c.believes(c.Root(), a.ino) {
			t.Error("not believed while the session is watched")
		}
		home := c.leases.home(c.Root())
		c.leases.alive[home].Store(new(time.Now().Add(-leaseTerm)))
		if c.believes(c.Root(), a.ino) || c.mayDelay(c.Root()) {
			t.Error("believed after the term")
		}
		<-time.After(watchTime)
		c.Fence(errors.New("test"))
		synctest.Wait()
		if c.believes(c.Root(), a.ino) {
			t.Error("believed after the session's end")
		}
		if err := c.Resume(2); err != nil {
			t.Fatal(err)
		}
		watched(t, c)
		if a, err = c.getattr(ctx, c.Root()); err != nil || !c.believes(c.Root(), a.ino) {
			t.Errorf("not believed in the next session: %v", err)
		}
	})
}

// unheard answers no Watch of one store.
type unheard struct {
	op.Handler
	from atomic.Int32 // 0: all are answered
}

func (h *unheard) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	if store := h.from.Load(); req.Type == op.Watch && store != 0 && int32(req.Shard%3) == store {
		<-ctx.Done()
		return errGaveUp
	}
	return h.Handler.Do(ctx, req, rep)
}

// TestBeliefNeedsItsStore cuts a client off from one of three stores while its session is renewed all the time: what it has from
// there is not believed for longer than a server would wait for it after a new start.
func TestBeliefNeedsItsStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newCluster()
		net := oracle.NewNet(u.model, 3, 7)
		h := &unheard{Handler: generous{net}}
		c := u.clientOf(t, net, h, 7, Options{})
		connected(t, c)
		ctx := context.Background()
		var seen [3]answer
		for store := range seen {
			ino := createIn(t, c, net, store, fmt.Sprint(store))
			var err error
			if seen[store], err = c.getattr(ctx, ino); err != nil || !c.believes(ino, seen[store].ino) {
				t.Fatalf("store %d: not believed, %v", store, err)
			}
		}
		c.Renewed(time.Now().Add(time.Hour))
		h.from.Store(1)
		<-time.After(leaseTerm + watchTime)
		for store, a := range seen {
			if got := c.believes(a.Ino, a.ino); got != (store != 1) {
				t.Errorf("store %d, store 1 is away: believed is %v", store, got)
			}
			if got := c.mayDelay(a.Ino); got != (store != 1) {
				t.Errorf("store %d, store 1 is away: delaying is %v", store, got)
			}
		}
		c.die()
	})
}

// TestBeliefEndsWithTheIncarnation restarts the server: nothing of before is believed,
// acknowledgements begin anew, and so does belief.
func TestBeliefEndsWithTheIncarnation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newCluster()
		net := oracle.NewNet(u.model, 3, 1)
		l := newLessor(net)
		c := New(l, Options{Volume: 1, Root: u.root, Shards: testShards, Session: 1})
		defer c.Close()
		net.Register = c.Register
		ctx := context.Background()
		if _, err := c.Getattr(ctx, u.root); err != nil {
			t.Fatal(err)
		}
		home := u.root.Home(testShards)
		ready := func() bool { synctest.Wait(); return c.leases.after[home].Load() != 1<<64-1 }
		if !ready() {
			t.Fatal("not watched")
		}
		a, err := c.getattr(ctx, u.root)
		if err != nil || !c.believes(u.root, a.ino) {
			t.Fatal(err)
		}
		l.await(l.revoke(op.RevokeName, u.root, "x"))
		if a, err = c.getattr(ctx, u.root); err != nil || !c.believes(u.root, a.ino) {
			t.Fatal(err)
		}
		// Found out by the Watch.
		l.restart()
		synctest.Wait()
		if c.believes(u.root, a.ino) {
			t.Error("believed after a restart")
		}
		<-time.After(2 * pauseMax)
		if l.mu.Lock(); l.last.Off != 0 || !ready() {
			t.Errorf("the last Watch acknowledges %d", l.last.Off)
		}
		l.mu.Unlock()
		if a, err = c.getattr(ctx, u.root); err != nil || !c.believes(u.root, a.ino) {
			t.Fatalf("not believed again: %v", err)
		}
		// Found out by Register, on a new connection.
		net.Away(net.Store(home))
		net.Back(net.Store(home))
		b, err := c.getattr(ctx, u.root)
		if err != nil || c.believes(u.root, a.ino) || c.believes(u.root, b.ino) {
			t.Errorf("believed over a registration: %v", err)
		}
		if !ready() {
			t.Error("not watched again")
		}
		if b, err = c.getattr(ctx, u.root); err != nil || !c.believes(u.root, b.ino) {
			t.Errorf("not believed after the registration: %v", err)
		}
	})
}

// TestLeftInodesAreTold forgets an inode: the server is told, and until it has answered
// nothing is believed of it again.
func TestLeftInodesAreTold(t *testing.T) {
	leased(t, func(t *testing.T, c *Client, l *lessor) {
		ctx := context.Background()
		a, err := c.create(ctx, c.Root(), "f", 0o644, Cred{})
		if err != nil || !c.believes(a.Ino, a.ino) {
			t.Fatal(err)
		}
		c.left(a.Ino)
		b, err := c.getattr(ctx, a.Ino)
		if err != nil || c.believes(a.Ino, a.ino) || b.ino != 0 {
			t.Errorf("believed although it was left: %v", err)
		}
		l.mu.Lock()
		l.last.Data = nil
		l.mu.Unlock()
		<-time.After(leftAge + time.Millisecond)
		synctest.Wait()
		if b, err = c.getattr(ctx, a.Ino); err != nil || !c.believes(a.Ino, b.ino) {
			t.Errorf("not believed after the server knows: %v", err)
		}
		if err := c.Release(ctx, a.Ino); err != nil {
			t.Fatal(err)
		}
	})
}

// TestDelayedWritesKeepTheLease leaves an inode for which something is delayed, as the kernel does when a process that
// wrote was killed: the server must still know whom to ask for it.
func TestDelayedWritesKeepTheLease(t *testing.T) {
	leased(t, func(t *testing.T, c *Client, l *lessor) {
		ctx, a := context.Background(), delayed(t, c)
		c.left(a.Ino)
		if !c.leases.has(a.Ino).write {
			t.Error("the lease was given up under which a write is delayed")
		}
		if err := c.Release(ctx, a.Ino); err != nil {
			t.Fatal(err)
		}
		c.left(a.Ino)
		if c.leases.has(a.Ino).serial != 0 {
			t.Error("nothing is delayed, and the lease is kept")
		}
	})
}

// TestWithoutLeases works with a server that grants nothing: each write is sent at once.
func TestWithoutLeases(t *testing.T) {
	leased(t, func(t *testing.T, c *Client, l *lessor) {
		l.mute = true
		ctx := context.Background()
		a, err := c.create(ctx, c.Root(), "f", 0o644, Cred{})
		if err != nil || a.ino != 0 || a.dir != 0 {
			t.Fatalf("%+v, %v", a, err)
		}
		synctest.Wait()
		l.take()
		for _, text := range []string{"a", "b", "c"} {
			if err := c.Write(ctx, a.Ino, 0, []byte(text), op.Append); err != nil {
				t.Fatal(err)
			}
		}
		if log := l.take(); !slices.Equal(log, []string{"a", "b", "c"}) {
			t.Errorf("%q", log)
		}
		if err := c.Release(ctx, a.Ino); err != nil {
			t.Fatal(err)
		}
	})
}
