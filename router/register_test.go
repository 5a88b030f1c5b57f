package router

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sealfs"
	"sealfs/op"
)

// TestRegister: nothing goes over a new link before it is registered.
func TestRegister(t *testing.T) {
	var mu sync.Mutex
	var order []string // what the server saw
	f := newFake(t, "tcp", func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		mu.Lock()
		defer mu.Unlock()
		order = append(order, fmt.Sprint(req.Type, " ", req.Epoch))
		return echo(ctx, req, rep)
	})
	called, proceed := make(chan struct{}, 100), make(chan error, 100)
	var addrs []string
	r := newRouter(t, makeMap(3, f.addr, f.addr), Options{
		Conns: 2, Backoff: time.Millisecond, BackoffMax: 2 * time.Millisecond, Keepalive: 5 * time.Millisecond,
		Register: func(ctx context.Context, addr string, stores []sealfs.UUID, h op.Handler) error {
			called <- struct{}{}
			if addr != f.addr || len(stores) != 2 {
				t.Errorf("%q, %v", addr, stores)
			}
			addrs = append(addrs, addr) // never two at once
			var err error
			select {
			case err = <-proceed:
			case <-ctx.Done():
				return ctx.Err()
			}
			if err != nil {
				return err
			}
			for shard := range sealfs.Shard(2) {
				if err := h.Do(ctx, &op.Request{Type: op.Register, Shard: shard}, new(op.Reply)); err != nil {
					return err
				}
			}
			return nil
		},
	})
	var answers []<-chan error
	for i := range sealfs.Shard(10) {
		answers = append(answers, start(t.Context(), r, op.Request{Type: op.Getattr, Shard: i}))
	}
	within(t, "Register", called)
	ctx, cancel := context.WithCancel(t.Context())
	impatient := start(ctx, r, op.Request{Type: op.Getattr})
	eventually(t, "all to wait", func() bool { return only(t, r).Requests == 11 })
	cancel()
	wantCode(t, within(t, "the one that gave up", impatient), sealfs.ErrInterrupted)
	mu.Lock()
	if len(order) > 0 {
		t.Errorf("before Register the server saw %v", order)
	}
	mu.Unlock()
	proceed <- nil
	for _, a := range answers {
		if err := within(t, "an answer", a); err != nil {
			t.Error(err)
		}
	}
	mu.Lock()
	if len(order) != 12 || order[0] != "register 3" || order[1] != "register 3" || order[2] != "getattr 3" {
		t.Errorf("the server saw %v", order)
	}
	order = nil
	mu.Unlock()

	// A restarted server is registered at without any request of ours, also after failures.
	f.kill()
	proceed <- errors.New("the session is unknown")
	proceed <- fmt.Errorf("really: %w", sealfs.ErrSession)
	proceed <- nil
	f.start()
	eventually(t, "the server to be registered at", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(order) == 2
	})
	eventually(t, "the link", func() bool { return only(t, r).Links == 2 })
	if _, err := ask(t.Context(), r, 0); err != nil {
		t.Error(err)
	}
	// The refused links were closed.
	for range 3 {
		within(t, "Register", called)
	}
	eventually(t, "the refused connections to end", func() bool {
		open := 0
		for _, nc := range f.l.accepted() {
			if nc.SetWriteDeadline(time.Time{}) == nil {
				open++
			}
		}
		return open == 3 // with that for Watch
	})
}

// TestRegisterStale: Register's requests are those of the newest map, like any others.
func TestRegisterStale(t *testing.T) {
	var epoch atomic.Int64
	epoch.Store(2)
	f := newFake(t, "unix", func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		if req.Epoch < sealfs.Epoch(epoch.Load()) {
			rep.Code = sealfs.ErrStale
		}
		return nil
	})
	var r *testRouter
	var heard []string
	r = newRouter(t, makeMap(1, f.addr, f.addr), Options{
		Refresh: func(context.Context, sealfs.Shard) error {
			if e := epoch.Load(); e == 2 {
				r.m.Store(makeMap(2, f.addr, f.addr))
			} else {
				r.m.Store(makeMap(3, "/elsewhere", f.addr))
			}
			return nil
		},
		Register: func(ctx context.Context, _ string, _ []sealfs.UUID, h op.Handler) error {
			for range 2 {
				var rep op.Reply
				err := h.Do(ctx, &op.Request{Type: op.Register, Shard: 4}, &rep)
				heard = append(heard, fmt.Sprint(rep.Code == 0, errors.Is(err, sealfs.ErrStale)))
				epoch.Store(3) // and the shard moves
			}
			return nil
		},
	})
	if _, err := ask(t.Context(), r, 5); err != nil {
		t.Error(err)
	}
	if want := []string{"true false", "true true"}; !slices.Equal(heard, want) {
		t.Errorf("Register heard %q", heard)
	}
}

// TestRegisterFails: who waits for the link hears why there is none.
func TestRegisterFails(t *testing.T) {
	f := newFake(t, "unix", echo)
	var calls atomic.Int64
	r := newRouter(t, makeMap(1, f.addr), Options{
		Register: func(ctx context.Context, addr string, stores []sealfs.UUID, h op.Handler) error {
			if calls.Add(1) == 1 {
				return fmt.Errorf("the session has ended: %w", sealfs.ErrSession)
			}
			// One that swallows the loss of the connection has not registered.
			f.kill()
			_ = h.Do(ctx, &op.Request{Type: op.Register}, new(op.Reply))
			return nil
		},
		Backoff: time.Millisecond,
	})
	_, err := ask(t.Context(), r, 0)
	wantCode(t, err, sealfs.ErrUnavailable, "cannot register", "the session has ended", f.addr)
	if !errors.Is(err, sealfs.ErrSession) {
		t.Errorf("%v does not say what Register said", err)
	}
	eventually(t, "the second attempt", func() bool {
		_, err := ask(t.Context(), r, 0)
		wantCode(t, err, sealfs.ErrUnavailable)
		return calls.Load() == 2
	})
	if st := only(t, r); st.Links != 0 {
		t.Errorf("%+v", st)
	}
}

// TestStoreComes: a store that comes to a server which is linked already, or is
// being linked, is registered before anything else is sent for it.
func TestStoreComes(t *testing.T) {
	var mu sync.Mutex
	told := make(map[sealfs.UUID]bool)
	h := func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		mu.Lock()
		defer mu.Unlock()
		if !told[storeID(int(req.Shard)%2)] {
			t.Errorf("shard %d is asked for before its store was registered", req.Shard)
		}
		return echo(ctx, req, rep)
	}
	here, there := newFake(t, "tcp", h), newFake(t, "tcp", h)
	begun, goon := make(chan struct{}, 8), make(chan struct{})
	r := newRouter(t, makeMap(1, here.addr, there.addr), Options{
		Backoff: time.Millisecond, BackoffMax: time.Millisecond,
		Register: func(_ context.Context, _ string, stores []sealfs.UUID, _ op.Handler) error {
			begun <- struct{}{}
			<-goon
			mu.Lock()
			defer mu.Unlock()
			for _, id := range stores {
				told[id] = true
			}
			return nil
		},
	})
	// While the link is being made.
	first := start(t.Context(), r, op.Request{Type: op.Getattr})
	within(t, "Register", begun)
	r.m.Store(makeMap(2, here.addr, here.addr))
	r.Renew()
	goon <- struct{}{}
	wantCode(t, within(t, "the first request", first), sealfs.ErrUnavailable, here.addr, "a store has come")
	close(goon)
	reaches(t, r, 0)
	reaches(t, r, 1)
	// While there is one.
	r.m.Store(makeMap(3, there.addr, here.addr))
	reaches(t, r, 0)
	mu.Lock()
	clear(told)
	told[storeID(1)] = true
	mu.Unlock()
	r.m.Store(makeMap(4, here.addr, here.addr))
	reaches(t, r, 0)
	// One that goes is no reason for a new link.
	links := only(t, r).Links
	r.m.Store(makeMap(5, here.addr, ""))
	reaches(t, r, 0)
	if now := only(t, r).Links; now != links {
		t.Errorf("%d links, then %d", links, now)
	}
}

// TestWatchStandsApart: a Watch, which waits at the server all the time, keeps none of the
// connections busy that requests go over.
func TestWatchStandsApart(t *testing.T) {
	f := newFake(t, "tcp", echo)
	r := newRouter(t, makeMap(1, f.addr), Options{
		Conns: 2, Register: func(context.Context, string, []sealfs.UUID, op.Handler) error { return nil },
	})
	for _, kind := range []op.Type{op.Watch, op.Getattr} {
		if err := r.Do(t.Context(), &op.Request{Type: kind}, new(op.Reply)); err != nil {
			t.Fatal(err)
		}
	}
	r.mu.Lock()
	l := r.servers[f.addr].link.Load()
	r.mu.Unlock()
	apart := l.conn(&op.Request{Type: op.Watch})
	for _, kind := range []op.Type{op.Getattr, op.Write, op.Sync, op.Commit} {
		for shard := range sealfs.Shard(8) {
			if l.conn(&op.Request{Type: kind, Shard: shard}) == apart {
				t.Fatalf("%v goes over the connection of Watch", kind)
			}
		}
	}
}
