package router

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"sealfs"
	"sealfs/cluster"
	"sealfs/op"
)

// Where requests go, and what becomes of stale rows.

// TestRoute: each shard's requests come to its store, with its epoch.
func TestRoute(t *testing.T) {
	var at [3]atomic.Int64
	count := func(i int) handlerFunc {
		return func(ctx context.Context, req *op.Request, rep *op.Reply) error {
			at[i].Add(1)
			return echo(ctx, req, rep)
		}
	}
	unix, tcp := newFake(t, "unix", count(1)), newFake(t, "tcp", count(2))
	m := makeMap(7, "", unix.addr, tcp.addr)
	m.Table[5].Epoch = 55
	r := newRouter(t, m, Options{Local: func(id sealfs.UUID) op.Handler {
		if id == storeID(0) {
			return count(0)
		}
		return nil
	}})
	for s := range sealfs.Shard(testShards) {
		before := at[s%3].Load()
		rep, err := ask(t.Context(), r, s)
		if err != nil || rep.Attr.Size != uint64(s) || rep.Attr.Nlink != uint32(m.Table[s].Epoch) {
			t.Errorf("shard %d: %v, %+v", s, err, rep.Attr)
		}
		if at[s%3].Load() != before+1 {
			t.Errorf("shard %d did not reach store %d", s, s%3)
		}
	}
	st := r.Stats()
	if len(st) != 2 {
		t.Fatalf("%+v", st)
	}
	for i, s := range st { // in the order of their addresses: tcp begins with a digit, unix with a slash
		store := 1 + i
		if st[0].Addr == tcp.addr {
			store = 2 - i
		}
		if s.State != Up || s.Err != "" || s.Links != 1 || s.Failures != 0 || s.Requests != uint64(at[store].Load()) ||
			s.Wire.FramesOut != s.Requests+1 || !slices.Equal(s.Stores, []sealfs.UUID{storeID(store)}) {
			t.Errorf("%+v", s)
		}
	}
}

// TestNowhere: what has no place is refused by name, and does not panic.
func TestNowhere(t *testing.T) {
	r := newRouter(t, nil, Options{})
	refused := func(shard sealfs.Shard, code sealfs.Code, words ...string) {
		t.Helper()
		_, err := ask(t.Context(), r, shard)
		wantCode(t, err, code, words...)
	}
	refused(0, sealfs.ErrUnavailable, "no cluster map")
	if err := r.Each(t.Context(), nil); !errors.Is(err, sealfs.ErrUnavailable) {
		t.Error(err)
	}
	m := makeMap(1, "", "/nobody/is/here")
	m.Table[3].Replicas = nil
	m.Table[4].Replicas = []uint16{77}
	r.m.Store(m)
	refused(0, sealfs.ErrUnavailable, storeID(0).String(), "address is not known")
	refused(1, sealfs.ErrUnavailable, storeID(1).String(), "/nobody/is/here")
	refused(3, sealfs.ErrUnavailable, "shard 3")
	refused(4, sealfs.ErrUnavailable, "shard 4")
	refused(testShards, sealfs.ErrInvalid, "shard 16 of 16")
	m = makeMap(2, "", "/nobody/is/here")
	m.Stores[1].State = cluster.StoreLeft
	r.m.Store(m)
	refused(1, sealfs.ErrUnavailable, storeID(1).String(), "has left")
	if st := r.Stats(); len(st) != 0 {
		t.Errorf("a store that left keeps its server: %+v", st)
	}
}

// TestSharedAddress: stores at one address share a server, and its connections
// are chosen by shard.
func TestSharedAddress(t *testing.T) {
	var mu sync.Mutex
	conns := make(map[any][]sealfs.Shard) // by the context of the connection
	f := newFake(t, "tcp", func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		mu.Lock()
		defer mu.Unlock()
		conns[ctx] = append(conns[ctx], req.Shard)
		return nil
	})
	r := newRouter(t, makeMap(1, f.addr, f.addr, f.addr), Options{Conns: 4})
	for range 2 {
		for s := range sealfs.Shard(testShards) {
			if _, err := ask(t.Context(), r, s); err != nil {
				t.Fatal(err)
			}
		}
	}
	st := only(t, r)
	if len(st.Stores) != 3 || st.Links != 1 || len(f.l.accepted()) != 4 {
		t.Errorf("%d connections: %+v", len(f.l.accepted()), st)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(conns) != 4 {
		t.Errorf("%d connections were used", len(conns))
	}
	for _, shards := range conns {
		for _, s := range shards {
			if len(shards) != 2*testShards/4 || s%4 != shards[0]%4 {
				t.Errorf("one connection got shards %v", shards)
				break
			}
		}
	}
}

// TestRenew: what Local answers is asked for again.
func TestRenew(t *testing.T) {
	var open atomic.Bool
	r := newRouter(t, makeMap(1, ""), Options{Local: func(sealfs.UUID) op.Handler {
		if open.Load() {
			return handlerFunc(echo)
		}
		return nil
	}})
	_, err := ask(t.Context(), r, 1)
	wantCode(t, err, sealfs.ErrUnavailable)
	open.Store(true)
	r.Renew()
	if _, err := ask(t.Context(), r, 1); err != nil {
		t.Error(err)
	}
}

// TestStale: one refresh, one more attempt, and no more than that.
func TestStale(t *testing.T) {
	for _, how := range []string{"code", "error"} {
		for _, where := range []string{"local", "remote"} {
			t.Run(how+"/"+where, func(t *testing.T) {
				var epoch, calls, refreshes atomic.Int64 // epoch: as the server knows it
				h := handlerFunc(func(ctx context.Context, req *op.Request, rep *op.Reply) error {
					calls.Add(1)
					if req.Epoch == sealfs.Epoch(epoch.Load()) {
						rep.Data = append(rep.Data, " and an answer"...)
						return echo(ctx, req, rep)
					}
					rep.Attr.Size = 666
					if how == "error" {
						return fmt.Errorf("not so: %w", sealfs.ErrStale)
					}
					rep.Reset()
					rep.Code = sealfs.ErrStale
					return nil
				})
				addr := ""
				if where == "remote" {
					addr = newFake(t, "unix", h).addr
				}
				var r *testRouter
				var failure error
				fresh := uint64(2) // version, and so epoch, of the map that a refresh brings
				r = newRouter(t, makeMap(1, addr), Options{
					Local: func(sealfs.UUID) op.Handler {
						if where == "local" {
							return h
						}
						return nil
					},
					Refresh: func(_ context.Context, shard sealfs.Shard) error {
						if refreshes.Add(1); shard != 9 {
							t.Errorf("shard %d is refreshed", shard)
						}
						if failure == nil {
							r.m.Store(makeMap(fresh, addr))
						}
						return failure
					},
				})
				do := func() (code sealfs.Code) {
					rep := op.Reply{Data: []byte("before")}
					calls.Store(0)
					refreshes.Store(0)
					err := r.Do(t.Context(), &op.Request{Type: op.Readlink, Shard: 9}, &rep)
					if err != nil {
						code, _ = errors.AsType[sealfs.Code](err)
					} else if code = rep.Code; code == 0 && (string(rep.Data) != "before and an answer" || rep.Attr.Size != 9) {
						t.Errorf("answer %q, %+v", rep.Data, rep.Attr)
					}
					return code
				}
				check := func(what string, code sealfs.Code, wantCode sealfs.Code, wantCalls, wantRefreshes int64) {
					t.Helper()
					if code != wantCode || calls.Load() != wantCalls || refreshes.Load() != wantRefreshes {
						t.Errorf("%s: %v, %d calls, %d refreshes", what, code, calls.Load(), refreshes.Load())
					}
				}
				epoch.Store(1)
				check("all is well", do(), 0, 1, 0)
				epoch.Store(2)
				check("stale row", do(), 0, 2, 1)
				epoch.Store(99)
				check("stale for ever", do(), sealfs.ErrStale, 2, 1)
				failure = errors.New("no manager answers")
				check("no refresh to be had", do(), sealfs.ErrStale, 1, 1)
			})
		}
	}
}

// TestStaleMeanwhile: a map that has become newer while the request was under
// way needs no refresh; without Refresh that is all there is.
func TestStaleMeanwhile(t *testing.T) {
	var r *testRouter
	var calls int
	h := handlerFunc(func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		if calls++; req.Epoch < 5 {
			r.m.Store(makeMap(5, ""))
			rep.Code = sealfs.ErrStale
		} else if req.Ino == 1 {
			rep.Code = sealfs.ErrStale
		}
		return nil
	})
	r = newRouter(t, makeMap(1, ""), Options{Local: func(sealfs.UUID) op.Handler { return h }})
	if rep, err := ask(t.Context(), r, 0); err != nil || rep.Code != 0 || calls != 2 {
		t.Errorf("%v, %v after %d calls", err, rep.Code, calls)
	}
	var rep op.Reply
	if err := r.Do(t.Context(), &op.Request{Type: op.Getattr, Ino: 1}, &rep); err != nil || rep.Code != sealfs.ErrStale || calls != 3 {
		t.Errorf("%v, %v after %d calls", err, rep.Code, calls)
	}
}

// TestRefreshIsShared: many requests with one stale row need one refresh, and
// each gives up when its own context ends.
func TestRefreshIsShared(t *testing.T) {
	const n = 100
	var r *testRouter
	var refreshes, refused atomic.Int64
	release := make(chan struct{})
	h := handlerFunc(func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		if req.Epoch < 2 {
			refused.Add(1)
			rep.Code = sealfs.ErrStale
		}
		return nil
	})
	r = newRouter(t, makeMap(1, ""), Options{
		Local: func(sealfs.UUID) op.Handler { return h },
		Refresh: func(context.Context, sealfs.Shard) error {
			refreshes.Add(1)
			<-release
			r.m.Store(makeMap(2, ""))
			return nil
		},
	})
	answers := make(chan sealfs.Code, n+1)
	send := func(ctx context.Context) {
		rep, err := ask(ctx, r, 3)
		if err != nil {
			t.Error(err)
		}
		answers <- rep.Code
	}
	ctx, cancel := context.WithCancel(t.Context())
	go send(ctx)
	for range n {
		go send(t.Context())
	}
	eventually(t, "all to be refused", func() bool { return refused.Load() == n+1 })
	cancel()
	if code := within(t, "the one that gave up", answers); code != sealfs.ErrStale {
		t.Error(code)
	}
	close(release)
	for range n {
		if code := within(t, "an answer", answers); code != 0 {
			t.Error(code)
		}
	}
	if got := refreshes.Load(); got != 1 {
		t.Errorf("%d refreshes", got)
	}
}

// TestEach: every store that is a primary, with a shard of its own.
func TestEach(t *testing.T) {
	m := makeMap(1, "a", "b", "c")
	for s := range m.Table {
		m.Table[s].Replicas = []uint16{uint16(s % 2 * 2), 1} // store 1 is nobody's primary
	}
	m.Table[0].Replicas = nil
	r := newRouter(t, m, Options{})
	var got []string
	bad := errors.New("bad")
	err := r.Each(t.Context(), func(store cluster.StoreInfo, shard sealfs.Shard) error {
		got = append(got, fmt.Sprint(store.Addr, shard))
		return bad
	})
	if s := strings.Join(got, " "); s != "a2 c1" || !errors.Is(err, bad) {
		t.Errorf("%q, %v", s, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err = r.Each(ctx, func(cluster.StoreInfo, sealfs.Shard) error { cancel(); return nil })
	wantCode(t, err, sealfs.ErrInterrupted)
}

// TestIdleConnection sends requests for one shard while others wait for their answers: each
// goes over a connection on which nobody waits, as long as there is one.
func TestIdleConnection(t *testing.T) {
	release := make(chan struct{})
	f := newFake(t, "tcp", func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		if req.Shard == 3 {
			<-release
		}
		return echo(ctx, req, rep)
	})
	r := newRouter(t, makeMap(1, f.addr), Options{Cluster: testCluster, Conns: 3})
	reaches(t, r, 1)
	busy := func() (n []int) {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, s := range r.servers {
			for _, c := range s.link.Load().conns {
				n = append(n, c.Busy())
			}
		}
		slices.Sort(n)
		return n
	}
	var waiting []<-chan error
	for _, want := range [][]int{{0, 0, 1}, {0, 1, 1}, {1, 1, 1}, {1, 1, 2}} {
		waiting = append(waiting, start(t.Context(), r, op.Request{Type: op.Getattr, Shard: 3}))
		eventually(t, fmt.Sprint("callers on connections: ", want), func() bool { return slices.Equal(busy(), want) })
	}
	close(release)
	for _, w := range waiting {
		if err := within(t, "an answer", w); err != nil {
			t.Error(err)
		}
	}
}

// TestNoAllocations: neither a local nor a remote request allocates.
func TestNoAllocations(t *testing.T) {
	f := newFake(t, "unix", func(context.Context, *op.Request, *op.Reply) error { return nil })
	h := handlerFunc(func(context.Context, *op.Request, *op.Reply) error { return nil })
	r := newRouter(t, makeMap(1, "", f.addr), Options{Local: func(id sealfs.UUID) op.Handler {
		if id == storeID(0) {
			return h
		}
		return nil
	}})
	for shard, limit := range []float64{0, 0.5} { // a remote one may meet the server's timers
		req := op.Request{Type: op.Getattr, Shard: sealfs.Shard(shard), Ino: 5000}
		var rep op.Reply
		do := func() {
			rep.Reset()
			if err := r.Do(context.Background(), &req, &rep); err != nil {
				t.Fatal(err)
			}
		}
		do()
		if n := testing.AllocsPerRun(500, do); n > limit && !raceEnabled {
			t.Errorf("shard %d: %v allocations per request", shard, n)
		}
	}
}
