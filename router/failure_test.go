package router

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/op"
)

// Servers that die, move, do not answer or answer wrongly.

// blocker is a handler that keeps requests of some types until it is told.
type blocker struct {
	begun   chan op.Type
	release chan struct{}
	types   []op.Type
}

func newBlocker(types ...op.Type) *blocker {
	return &blocker{make(chan op.Type, 10000), make(chan struct{}), types}
}

func (b *blocker) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	for _, ty := range b.types {
		if req.Type == ty {
			b.begun <- ty
			select {
			case <-b.release:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	return echo(ctx, req, rep)
}

// TestKillRestart: requests under way, and those until the server is back,
// are unavailable; then it is found again at its address.
func TestKillRestart(t *testing.T) {
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			b := newBlocker(op.Unlink)
			f := newFake(t, network, b.Do)
			r := newRouter(t, makeMap(1, f.addr), Options{Conns: 2, Backoff: time.Millisecond})
			for round := range uint64(3) {
				reaches(t, r, 0)
				answers := []<-chan error{ // one on each connection
					start(t.Context(), r, op.Request{Type: op.Unlink, Shard: 0}),
					start(t.Context(), r, op.Request{Type: op.Unlink, Shard: 1}),
				}
				for range answers {
					within(t, "the request to begin", b.begun)
				}
				f.kill()
				for _, a := range answers {
					wantCode(t, within(t, "the request", a), sealfs.ErrUnavailable, f.addr, storeID(0).String())
				}
				for range 3 {
					_, err := ask(t.Context(), r, 0)
					wantCode(t, err, sealfs.ErrUnavailable, f.addr, storeID(0).String())
				}
				f.start()
				reaches(t, r, 0)
				if st := only(t, r); st.Links != round+2 || st.State != Up || st.Failures < 5 {
					t.Errorf("%+v", st)
				}
			}
		})
	}
}

// TestMove: a store that changes its address is found at the new one; nothing
// goes to the old one any more, and what was under way there is unavailable.
func TestMove(t *testing.T) {
	b := newBlocker(op.Unlink)
	from, to := newFake(t, "tcp", b.Do), newFake(t, "unix", echo)
	r := newRouter(t, makeMap(1, from.addr), Options{})
	reaches(t, r, 0)
	answer := start(t.Context(), r, op.Request{Type: op.Unlink})
	within(t, "the request to begin", b.begun)
	r.m.Store(makeMap(2, to.addr))
	if rep, err := ask(t.Context(), r, 0); err != nil || rep.Attr.Nlink != 2 {
		t.Errorf("%v, %+v", err, rep.Attr)
	}
	wantCode(t, within(t, "the request", answer), sealfs.ErrUnavailable, from.addr, "names it no more")
	if _, err := from.l.accepted()[0].Read(make([]byte, 1)); err == nil {
		t.Error("the old connection lives on")
	}
	if st := only(t, r); st.Addr != to.addr || st.Links != 1 {
		t.Errorf("%+v", st)
	}

	// The server dies and comes back elsewhere; there and back again.
	to.kill()
	r.m.Store(makeMap(3, from.addr))
	reaches(t, r, 0)
	if st := only(t, r); st.Addr != from.addr {
		t.Errorf("%+v", st)
	}
}

// TestDeadServer: ten thousand requests at once to a server that is not there
// return at once, and nothing stays behind.
func TestDeadServer(t *testing.T) {
	for name, addr := range map[string]string{
		"refused":    filepath.Join(t.TempDir(), "nobody"),
		"impossible": "no port here",
	} {
		t.Run(name, func(t *testing.T) {
			before := runtime.NumGoroutine()
			r := newRouter(t, makeMap(1, addr), Options{})
			const n = 10000
			begun := time.Now()
			var wg sync.WaitGroup
			for i := range n {
				wg.Go(func() {
					_, err := ask(context.Background(), r, sealfs.Shard(i%testShards))
					if !errors.Is(err, sealfs.ErrUnavailable) {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if d := time.Since(begun); d > patience/2 {
				t.Errorf("%d requests took %v", n, d)
			}
			eventually(t, "the goroutines to end", func() bool { return runtime.NumGoroutine() <= before })
			st := only(t, r)
			if st.Requests != n || st.Failures != n || st.Links != 0 || st.Err == "" {
				t.Errorf("%+v", st)
			}
		})
	}
}

// TestMuteServer: a server that accepts and says nothing costs the first
// requests the time-out, and the later ones no more than a moment.
func TestMuteServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var accepted atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		var kept []net.Conn
		for {
			nc, err := l.Accept()
			if err != nil {
				break
			}
			accepted.Add(1)
			kept = append(kept, nc)
		}
		for _, nc := range kept {
			nc.Close()
		}
	}()
	o := Options{DialTimeout: 500 * time.Millisecond, Backoff: time.Millisecond, BackoffMax: 2 * time.Millisecond}
	r := newRouter(t, makeMap(1, l.Addr().String()), o)
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			_, err := ask(context.Background(), r, 0)
			wantCode(t, err, sealfs.ErrUnavailable, l.Addr().String())
		})
	}
	wg.Wait()
	if n := accepted.Load(); n != 1 {
		t.Errorf("%d connections for 100 requests at once", n)
	}
	eventually(t, "the second attempt", func() bool {
		_, err := ask(context.Background(), r, 0)
		wantCode(t, err, sealfs.ErrUnavailable)
		return accepted.Load() == 2
	})
	for range 10 { // of which each waits for no more than Backoff
		_, err := ask(context.Background(), r, 0)
		wantCode(t, err, sealfs.ErrUnavailable, "another attempt is under way", l.Addr().String())
	}
	if n := accepted.Load(); n != 2 {
		t.Errorf("%d connections", n)
	}
	l.Close()
	within(t, "the listener", done)
}

// TestGiveUp: a context ends the wait for a connection and for an answer.
func TestGiveUp(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // nobody accepts: the connection is made, the hello is not
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	b := newBlocker(op.Unlink)
	f := newFake(t, "tcp", b.Do)
	r := newRouter(t, makeMap(1, l.Addr().String(), f.addr), Options{DialTimeout: time.Hour})
	for shard := range sealfs.Shard(2) {
		reason := errors.New("the user pressed ctrl-c")
		ctx, cancel := context.WithCancelCause(t.Context())
		answer := start(ctx, r, op.Request{Type: op.Unlink, Shard: shard})
		if shard == 1 {
			within(t, "the request to begin", b.begun)
		} else {
			eventually(t, "the dialler", func() bool {
				return slices.ContainsFunc(r.Stats(), func(s ServerStats) bool { return s.State == Connecting })
			})
		}
		cancel(reason)
		err := within(t, "the request", answer)
		wantCode(t, err, sealfs.ErrInterrupted)
		if !errors.Is(err, reason) || errors.Is(err, sealfs.ErrUnavailable) {
			t.Error(err)
		}
	}
}

// TestHostileServers: what is no server of this cluster is told apart by name.
func TestHostileServers(t *testing.T) {
	other := sealfs.UUID{9}
	frame := func(head []byte) []byte { // of a hello
		b := append(enc.AppendU64([]byte("SEAW\x01\x01\x00\x00"), 0), make([]byte, 32)...)
		copy(b[16:], enc.AppendU32(nil, uint32(len(head))))
		copy(b[24:], enc.AppendU32(nil, enc.CRC(0, head)))
		copy(b[44:], enc.AppendU32(nil, enc.CRC(0, b[:44])))
		return append(b, head...)
	}
	hello := func(lowest, highest uint16, id sealfs.UUID) []byte {
		b := enc.AppendU16(enc.AppendU16(nil, lowest), highest)
		b = append(b, make([]byte, 20)...)
		return frame(enc.AppendVarBytes(append(b, id[:]...), "fake"))
	}
	for name, c := range map[string]struct {
		greeting []byte
		words    []string
	}{
		"nothing":       {nil, []string{"no hello"}},
		"garbage":       {bytes.Repeat([]byte("HTTP/1.1 400 Bad Request\r\n"), 100), []string{"does not speak"}},
		"other cluster": {hello(2, 2, other), []string{testCluster.String(), other.String()}},
		"later version": {hello(8, 9, testCluster), []string{"8 to 9"}},
		"hello and end": {hello(2, 2, testCluster), []string{"fake1"}},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("unix", filepath.Join(t.TempDir(), "fake1"))
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					nc, err := l.Accept()
					if err != nil {
						return
					}
					_, _ = nc.Read(make([]byte, 1000))
					_, _ = nc.Write(c.greeting)
					nc.Close()
				}
			}()
			r := newRouter(t, makeMap(1, l.Addr().String()), Options{Cluster: testCluster, Backoff: time.Millisecond})
			for range 5 {
				_, err = ask(t.Context(), r, 0)
				wantCode(t, err, sealfs.ErrUnavailable, append(c.words, storeID(0).String(), l.Addr().String())...)
			}
			l.Close()
			within(t, "the listener", done)
		})
	}
	t.Run("this is another cluster's router", func(t *testing.T) {
		f := newFake(t, "unix", echo)
		r := newRouter(t, makeMap(1, f.addr), Options{Cluster: other})
		_, err := ask(t.Context(), r, 0)
		wantCode(t, err, sealfs.ErrUnavailable, testCluster.String(), other.String(), f.addr)
	})
	t.Run("takes no peers", func(t *testing.T) {
		f := newFake(t, "unix", echo)
		f.kill()
		f.o.Peer = nil
		f.start()
		r := newRouter(t, makeMap(1, f.addr), Options{Peer: true})
		_, err := ask(t.Context(), r, 0)
		wantCode(t, err, sealfs.ErrUnavailable, "other servers")
	})
	t.Run("falls silent", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			nc, err := l.Accept()
			if err != nil {
				return
			}
			defer nc.Close()
			_, _ = nc.Read(make([]byte, 1000))
			_, _ = nc.Write(hello(2, 2, testCluster))
			_, _ = io.Copy(io.Discard, nc)
		}()
		r := newRouter(t, makeMap(1, l.Addr().String()), Options{Keepalive: 20 * time.Millisecond, Timeout: 60 * time.Millisecond})
		_, err = ask(t.Context(), r, 0)
		wantCode(t, err, sealfs.ErrUnavailable, "said nothing", l.Addr().String())
		within(t, "the connection to end", done)
		l.Close()
	})
}

// TestBackoff: rests grow, are bounded, differ, and begin anew after a success.
func TestBackoff(t *testing.T) {
	b := backoff{min: 50 * time.Millisecond, max: time.Second}
	now := time.Unix(1000, 0)
	for range 3 {
		for _, most := range []time.Duration{50, 100, 200, 400, 800, 1000, 1000, 1000} {
			most *= time.Millisecond
			b.fail(now)
			if rest := b.until.Sub(now); rest < most/2 || rest > most {
				t.Errorf("a rest of %v, want %v to %v", rest, most/2, most)
			}
		}
		b.reset()
	}
	differ := make(map[time.Time]bool)
	for range 100 {
		b := b
		b.fail(now)
		differ[b.until] = true
	}
	if len(differ) < 50 {
		t.Errorf("%d different rests of 100", len(differ))
	}
}

// TestBackoffOfServer: while the server is away requests make no attempts; a
// link that lasts ends the row of failures, one that breaks at once does not.
func TestBackoffOfServer(t *testing.T) {
	f := newFake(t, "unix", echo)
	f.kill()
	r := newRouter(t, makeMap(1, f.addr), Options{Backoff: time.Hour, BackoffMax: 2 * time.Hour})
	for range 10 {
		_, err := ask(t.Context(), r, 0)
		wantCode(t, err, sealfs.ErrUnavailable)
	}
	_, err := ask(t.Context(), r, 0)
	wantCode(t, err, sealfs.ErrUnavailable, "the next attempt is in", f.addr)
	if st := only(t, r); st.State != Away {
		t.Errorf("%+v", st)
	}
	f.start()
	if _, err := ask(t.Context(), r, 0); err == nil {
		t.Error("the server was called before its time")
	}
	r.mu.Lock()
	s := r.servers[f.addr]
	r.mu.Unlock()
	rest := func() (delay time.Duration, until time.Time) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.away.delay, s.away.until
	}
	rested := func() {
		s.mu.Lock()
		s.away.until = time.Time{}
		s.mu.Unlock()
	}
	rested()
	for range 2 { // the links break at once
		if _, err := ask(t.Context(), r, 0); err != nil {
			t.Fatal(err)
		}
		f.kill()
		f.start()
		eventually(t, "the loss to be noticed", func() bool { _, err := ask(t.Context(), r, 0); return err != nil })
		if d, until := rest(); d != 2*time.Hour || time.Until(until) < 30*time.Minute {
			t.Errorf("after a link that broke at once the rest is %v", d)
		}
		rested()
	}
	if _, err := ask(t.Context(), r, 0); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.link.Load().since = time.Now().Add(-3 * time.Hour)
	s.mu.Unlock()
	f.kill()
	f.start()
	eventually(t, "the server to be found at once", func() bool { _, err := ask(t.Context(), r, 0); return err == nil && only(t, r).Links == 4 })
	if d, _ := rest(); d != 0 {
		t.Errorf("after a link that lasted the rest is %v", d)
	}
}

// TestControl: what decides transactions gets through while more Prepares wait
// than the server reads from one connection.
func TestControl(t *testing.T) {
	b := newBlocker(op.Prepare)
	f := newFake(t, "tcp", func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		return fmt.Errorf("not for clients: %w", sealfs.ErrPerm)
	})
	f.kill()
	f.o.Peer = b
	f.start()
	r := newRouter(t, makeMap(1, f.addr), Options{Peer: true})
	const n = 700
	var answers []<-chan error
	for i := range n {
		answers = append(answers, start(t.Context(), r, op.Request{Type: op.Prepare, Shard: sealfs.Shard(i % testShards)}))
	}
	for range 512 {
		within(t, "a Prepare", b.begun)
	}
	for _, ty := range []op.Type{op.Commit, op.Abort, op.Forget, op.Resolve, op.Sync} {
		if err := within(t, ty.String(), start(t.Context(), r, op.Request{Type: ty})); err != nil {
			t.Errorf("%v: %v", ty, err)
		}
	}
	if len(b.begun) > 0 {
		t.Error("the connection is not full: the test shows nothing")
	}
	close(b.release)
	for _, a := range answers {
		if err := within(t, "a Prepare's answer", a); err != nil {
			t.Error(err)
		}
	}
	if n := len(f.l.accepted()); n != 2 {
		t.Errorf("%d connections", n)
	}
}

// TestClose: whatever is under way ends.
func TestClose(t *testing.T) {
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	b := newBlocker(op.Unlink)
	busy, registering := newFake(t, "tcp", b.Do), newFake(t, "unix", echo)
	registers := make(chan struct{})
	refreshes := make(chan struct{})
	wait := func(ctx context.Context, begun chan struct{}) error {
		close(begun)
		<-ctx.Done()
		return ctx.Err()
	}
	r := newRouter(t, makeMap(1, mute.Addr().String(), busy.addr, registering.addr, ""), Options{
		DialTimeout: time.Hour, RegisterTimeout: time.Hour, RefreshTimeout: time.Hour,
		Register: func(ctx context.Context, addr string, _ []sealfs.UUID, _ op.Handler) error {
			if addr == registering.addr {
				return wait(ctx, registers)
			}
			return nil
		},
		Refresh: func(ctx context.Context, _ sealfs.Shard) error { return wait(ctx, refreshes) },
		Local: func(id sealfs.UUID) op.Handler {
			if id != storeID(3) {
				return nil
			}
			return handlerFunc(func(_ context.Context, _ *op.Request, rep *op.Reply) error {
				rep.Code = sealfs.ErrStale
				return nil
			})
		},
	})
	var answers []<-chan error
	for shard := range sealfs.Shard(3) {
		answers = append(answers, start(t.Context(), r, op.Request{Type: op.Unlink, Shard: shard}))
	}
	stale := start(t.Context(), r, op.Request{Type: op.Unlink, Shard: 3})
	within(t, "the request to begin", b.begun)
	<-registers
	<-refreshes
	r.Close()
	for i, a := range answers {
		err := within(t, "a request", a)
		wantCode(t, err, sealfs.ErrClosed)
		if errors.Is(err, sealfs.ErrUnavailable) {
			t.Errorf("request %d: %v", i, err)
		}
	}
	if err := within(t, "the stale request", stale); err != nil {
		t.Error(err)
	}
	for shard := range sealfs.Shard(4) {
		_, err := ask(t.Context(), r, shard)
		wantCode(t, err, sealfs.ErrClosed)
	}
	if st := r.Stats(); len(st) != 0 {
		t.Errorf("%+v", st)
	}
	r.Close()
}

// TestChaos: servers are killed, come back and move while callers go on; a
// caller that repeats what was unavailable gets its answer in the end.
func TestChaos(t *testing.T) {
	servers := []*fake{newFake(t, "tcp", echo), newFake(t, "unix", echo), newFake(t, "tcp", echo), newFake(t, "unix", echo)}
	addrs := func(v int) []string { // three stores at three of the four addresses
		return []string{servers[v%4].addr, servers[(v+1)%4].addr, servers[(v+2)%4].addr}
	}
	r := newRouter(t, makeMap(1, addrs(0)...), Options{
		Conns: 2, Backoff: 100 * time.Microsecond, BackoffMax: time.Millisecond,
		Register: func(ctx context.Context, _ string, stores []sealfs.UUID, h op.Handler) error {
			for _, id := range stores {
				if err := h.Do(ctx, &op.Request{Type: op.Register, Shard: sealfs.Shard(id[15] - 1)}, new(op.Reply)); err != nil {
					return err
				}
			}
			return nil
		},
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var done atomic.Int64
	var wg sync.WaitGroup
	for caller := range 8 {
		wg.Go(func() {
			for i := caller; ctx.Err() == nil; i++ {
				shard := sealfs.Shard(i % testShards)
				rep, err := ask(context.Background(), r, shard)
				for err != nil && ctx.Err() == nil {
					wantCode(t, err, sealfs.ErrUnavailable)
					runtime.Gosched()
					rep, err = ask(context.Background(), r, shard)
				}
				if err == nil && rep.Attr.Size != uint64(shard) {
					t.Errorf("shard %d got the answer of shard %d", shard, rep.Attr.Size)
				}
				done.Add(1)
			}
		})
	}
	for v := 1; v < 40; v++ {
		goal := done.Load() + 50
		switch v % 3 {
		case 0:
			r.m.Store(makeMap(uint64(v), addrs(v)...))
		case 1:
			servers[v%4].kill()
			servers[v%4].start()
		case 2:
			servers[v%4].kill()
			r.m.Store(makeMap(uint64(v), addrs(v+1)...)) // without the dead one
			eventually(t, "the callers to go on", func() bool { return done.Load() >= goal })
			servers[v%4].start()
		}
		eventually(t, "the callers to go on", func() bool { return done.Load() >= goal })
	}
	cancel()
	wg.Wait()
}
