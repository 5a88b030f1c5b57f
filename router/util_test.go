package router

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sealfs"
	"sealfs/cluster"
	"sealfs/op"
	"sealfs/wire"
)

var testCluster = sealfs.UUID{0x5e, 0xa1, 15: 0xf5}

// testShards is the number of shards of the tests' clusters.
const testShards = 16

// patience is how long a test waits for what should come at once.
const patience = 20 * time.Second

// storeID returns the name of the store with index i.
func storeID(i int) sealfs.UUID { return sealfs.UUID{0: 0x57, 15: byte(i + 1)} }

// handlerFunc is a function as an op.Handler.
type handlerFunc func(ctx context.Context, req *op.Request, rep *op.Reply) error

func (f handlerFunc) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	return f(ctx, req, rep)
}

// echo answers with what the request says.
func echo(_ context.Context, req *op.Request, rep *op.Reply) error {
	rep.Attr = op.Attr{Ino: req.Ino, Nlink: uint32(req.Epoch), Size: uint64(req.Shard)}
	return nil
}

// makeMap returns a map in which shard s lies in store s modulo the number of
// stores, whose addresses are given.
func makeMap(version uint64, addrs ...string) *cluster.Map {
	m := &cluster.Map{Version: version, Cluster: testCluster, Shards: testShards, Replicas: 1}
	for i, a := range addrs {
		m.Stores = append(m.Stores, cluster.StoreInfo{ID: storeID(i), Addr: a, State: cluster.StoreUp})
	}
	for s := range testShards {
		row := cluster.ShardInfo{Epoch: sealfs.Epoch(version)}
		if len(addrs) > 0 {
			row.Replicas = []uint16{uint16(s % len(addrs))}
		}
		m.Table = append(m.Table, row)
	}
	return m
}

// testRouter is a router with a map of its own.
type testRouter struct {
	*Router
	m atomic.Pointer[cluster.Map]
}

// newRouter returns a router, whose end is checked when the test ends: nothing
// of it may run any more.
func newRouter(t testing.TB, m *cluster.Map, o Options) *testRouter {
	t.Helper()
	r := new(testRouter)
	r.m.Store(m)
	o.Map = r.m.Load
	r.Router = New(o)
	t.Cleanup(func() {
		closed := make(chan struct{})
		go func() {
			r.Close()
			close(closed)
		}()
		within(t, "Close", closed)
		if n := strings.Count(string(stacks()), "sealfs/router.(*server)"); n > 0 {
			t.Errorf("goroutines of the router are left:\n%s", stacks())
		}
	})
	return r
}

func stacks() []byte {
	buf := make([]byte, 4<<20)
	return buf[:runtime.Stack(buf, true)]
}

// fake is a server at an address, with or without life.
type fake struct {
	t       testing.TB
	network string
	addr    string
	h       op.Handler
	o       wire.ServerOptions
	s       *wire.Server
	l       *sniffer
	cancel  context.CancelFunc
	ended   chan error
}

// newFake starts a server at an address of its own.
func newFake(t testing.TB, network string, h handlerFunc) *fake {
	t.Helper()
	f := &fake{t: t, network: network, h: h, o: wire.ServerOptions{Cluster: testCluster, Grace: time.Millisecond, Peer: h}}
	if f.addr = "127.0.0.1:0"; network == "unix" {
		f.addr = filepath.Join(t.TempDir(), "s")
	}
	f.start()
	t.Cleanup(f.kill)
	return f
}

// sniffer keeps the connections that a listener has accepted.
type sniffer struct {
	net.Listener
	mu    sync.Mutex
	conns []net.Conn
}

func (l *sniffer) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err == nil {
		l.mu.Lock()
		l.conns = append(l.conns, nc)
		l.mu.Unlock()
	}
	return nc, err
}

func (l *sniffer) accepted() []net.Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.conns)
}

// start serves at the same address as before.
func (f *fake) start() {
	f.t.Helper()
	var l net.Listener
	var err error
	if f.network == "unix" {
		l, err = wire.ListenUnix(f.addr)
	} else {
		l, err = net.Listen("tcp", f.addr)
	}
	if err != nil {
		f.t.Fatal(err)
	}
	f.addr = l.Addr().String()
	f.l = &sniffer{Listener: l}
	f.s = wire.NewServer(f.h, f.o)
	var ctx context.Context
	ctx, f.cancel = context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func(s *wire.Server, l net.Listener) { ended <- s.Serve(ctx, l) }(f.s, f.l)
	f.ended = ended
}

// kill ends the server as SIGKILL would: connections break without a word.
func (f *fake) kill() {
	if f.cancel == nil {
		return
	}
	f.l.Close()
	for _, nc := range f.l.accepted() {
		nc.Close()
	}
	f.cancel()
	f.cancel = nil
	within(f.t, "the server to end", f.ended)
}

// eventually waits for a condition that no channel tells of.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(100 * time.Microsecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s:\n%s", what, stacks())
		}
		<-tick.C
	}
}

// within returns what comes from ch, which should come soon.
func within[T any](t testing.TB, what string, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		t.Fatalf("waited in vain for %s:\n%s", what, stacks())
		panic("unreachable")
	}
}

// wantCode fails unless err is of the code and its text has the words.
func wantCode(t testing.TB, err error, code sealfs.Code, words ...string) {
	t.Helper()
	if !errors.Is(err, code) {
		t.Errorf("the error is %v, want code %q", err, code)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the error %q does not say %q", err, w)
		}
	}
}

// ask sends a Getattr for a shard.
func ask(ctx context.Context, r *testRouter, shard sealfs.Shard) (op.Reply, error) {
	var rep op.Reply
	err := r.Do(ctx, &op.Request{Type: op.Getattr, Shard: shard, Ino: 5000}, &rep)
	return rep, err
}

// start is ask on a goroutine of its own.
func start(ctx context.Context, r *testRouter, req op.Request) <-chan error {
	ch := make(chan error, 1)
	go func() { ch <- r.Do(ctx, &req, new(op.Reply)) }()
	return ch
}

// reaches waits until requests for a shard are answered; until then they must
// be refused as unavailable.
func reaches(t testing.TB, r *testRouter, shard sealfs.Shard) {
	t.Helper()
	eventually(t, "the server to be reached", func() bool {
		_, err := ask(t.Context(), r, shard)
		if err != nil {
			wantCode(t, err, sealfs.ErrUnavailable)
		}
		return err == nil
	})
}

// only returns the statistics of the only server.
func only(t testing.TB, r *testRouter) ServerStats {
	t.Helper()
	all := r.Stats()
	if len(all) != 1 {
		t.Fatalf("%d servers, want one: %+v", len(all), all)
	}
	return all[0]
}
