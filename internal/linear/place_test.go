package linear

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/client"
	"sealfs/cluster"
	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/op"
	"sealfs/pmem"
	"sealfs/server"
)

const placeShards = 64

// place is a cluster of servers with two stores each in this process. Answers between it and
// clients, and between servers, get lost, and servers are started anew.
type place struct {
	t       testing.TB
	m       atomic.Pointer[cluster.Map]
	root    sealfs.Ino
	of      []int       // server of each store
	dev     []*disk.Sim // of each store
	reg     []*disk.Sim
	loss    atomic.Int64 // of 1000 messages
	asked   atomic.Int64 // requests that came to servers
	mu      sync.Mutex   // of rng and next
	rng     *rand.Rand
	next    sealfs.Session
	servers []life
}

// life is a server that is started anew now and then.
type life struct {
	mu  sync.RWMutex
	srv *server.Server  // nil: it is down
	ctx context.Context // its requests
	end context.CancelFunc
	n   uint64 // how often it was started
}

func newPlace(t testing.TB, seed uint64, servers int) *place {
	t.Helper()
	p := &place{t: t, rng: rand.New(rand.NewPCG(seed, 4)), next: 1, servers: make([]life, servers)}
	m := &cluster.Map{Version: 1, Cluster: sealfs.NewUUID(), Name: "test", Shards: placeShards, Replicas: 1, NextVolume: 2}
	for i := range 2 * servers {
		id := sealfs.NewUUID()
		dev, reg := disk.NewSim("device", 256<<20), disk.NewSim("region", 32<<20)
		if _, err := lsfs.Format(dev, pmem.NewMemory(reg), lsfs.Geometry{Store: id, Cluster: m.Cluster, SegmentBytes: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		p.dev, p.reg, p.of = append(p.dev, dev), append(p.reg, reg), append(p.of, i/2)
		m.Stores = append(m.Stores, cluster.StoreInfo{ID: id, Weight: 1, State: cluster.StoreUp})
	}
	for shard := range placeShards {
		m.Table = append(m.Table, cluster.ShardInfo{Replicas: []uint16{uint16(shard % len(m.Stores))}, Epoch: 1})
	}
	p.m.Store(m)
	for i := range p.servers {
		p.start(i)
	}
	root, err := server.MakeRoot(t.Context(), peers{p}, placeShards, 1, 0o755, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	p.root = root
	ready := *m
	ready.Volumes = []cluster.VolumeInfo{{ID: 1, Name: "v", Root: root, State: cluster.VolumeReady}}
	p.m.Store(&ready)
	t.Cleanup(func() {
		for i := range p.servers {
			if err := p.servers[i].srv.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return p
}

// start starts a server.
func (p *place) start(i int) {
	p.t.Helper()
	o := server.Options{Shards: placeShards, Map: p.m.Load, Peers: peers{p}, KeepSessions: true}
	for k, at := range p.of {
		if at == i {
			p.dev[k], p.reg[k] = p.dev[k].Reopen(), p.reg[k].Reopen()
			o.Stores = append(o.Stores, server.StoreOptions{Device: "device", Dev: p.dev[k], Reg: pmem.NewMemory(p.reg[k]), Log: lsfs.Options{StagingBytes: 4 << 20}})
		}
	}
	s, err := server.Open(context.Background(), o)
	if err != nil {
		p.t.Error(err)
		return
	}
	l := &p.servers[i]
	l.mu.Lock()
	defer l.mu.Unlock()
	l.srv = s
	l.ctx, l.end = context.WithCancel(context.Background())
	l.n++
	s.SetSessions(p.sessions())
}

// sessions returns those that live.
func (p *place) sessions() (next sealfs.Session, live []sealfs.Session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id := range p.next - 1 {
		live = append(live, id+1)
	}
	return p.next, live
}

// restart starts a server anew. What it was asked meanwhile gets no answer.
func (p *place) restart(i int) {
	l := &p.servers[i]
	l.mu.Lock()
	s := l.srv
	l.srv = nil
	l.end()
	l.mu.Unlock()
	if err := s.Close(); err != nil {
		p.t.Error(err)
	}
	p.start(i)
}

// lose reports whether a message gets lost.
func (p *place) lose() bool {
	loss := p.loss.Load()
	if loss == 0 {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rng.Int64N(1000) < loss
}

func (p *place) serverOf(s sealfs.Shard) int { return p.of[p.m.Load().Table[s].Replicas[0]] }

var errAway = fmt.Errorf("the server does not answer: %w", sealfs.ErrUnavailable)

// ask sends a request to server i, in the life that is given; 0: in any.
func (p *place) ask(ctx context.Context, i int, n uint64, req *op.Request, rep *op.Reply) error {
	l := &p.servers[i]
	l.mu.RLock()
	s, life := l.srv, l.ctx
	if n != 0 && n != l.n {
		s = nil
	}
	l.mu.RUnlock()
	if s == nil || req.Type != op.Watch && p.lose() {
		return errAway
	}
	// As on a wire, nobody sees what becomes of the request there.
	var came op.Request
	if err := op.DecodeRequest(&came, req.AppendTo(nil)); err != nil {
		return err
	}
	if req.Type != op.Watch {
		p.asked.Add(1)
	}
	if req.Type == op.Write {
		came.Data = slices.Clone(req.Data)
	}
	came.Epoch = p.m.Load().Table[req.Shard].Epoch
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(life, stop)()
	err := s.Do(ctx, &came, rep)
	if errors.Is(err, sealfs.ErrClosed) || life.Err() != nil || err == nil && p.lose() {
		rep.Reset()
		return errAway
	}
	return err
}

// peers is the way from server to server.
type peers struct{ p *place }

func (w peers) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	return w.p.ask(ctx, w.p.serverOf(req.Shard), 0, req, rep)
}

// route is a client's way to the servers.
type route struct {
	p     *place
	c     *client.Client
	conns []conn
}

// conn is a connection to a server in one of its lives. It begins with Register.
type conn struct {
	mu sync.Mutex
	n  uint64
}

func (r *route) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	i := r.p.serverOf(req.Shard)
	n, err := r.connect(ctx, i)
	if err != nil {
		return err
	}
	return r.p.ask(ctx, i, n, req, rep)
}

func (r *route) connect(ctx context.Context, i int) (uint64, error) {
	l := &r.p.servers[i]
	c := &r.conns[i]
	c.mu.Lock()
	defer c.mu.Unlock()
	l.mu.RLock()
	n, up := l.n, l.srv != nil
	l.mu.RUnlock()
	if !up {
		return 0, errAway
	}
	if c.n == n {
		return n, nil
	}
	for k, at := range r.p.of {
		if at != i {
			continue
		}
		mine := func(s sealfs.Shard) bool { return int(s)%len(r.p.of) == k }
		h := handler(func(ctx context.Context, req *op.Request, rep *op.Reply) error { return r.p.ask(ctx, i, n, req, rep) })
		if err := r.c.Register(ctx, h, mine); err != nil {
			return 0, err
		}
	}
	c.n = n
	return n, nil
}

type handler func(ctx context.Context, req *op.Request, rep *op.Reply) error

func (h handler) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	return h(ctx, req, rep)
}

// client returns a client with a session of its own. wrap, if any, stands between it and the servers.
func (p *place) client(wrap func(op.Handler) op.Handler) *client.Client {
	p.t.Helper()
	p.mu.Lock()
	id := p.next
	p.next++
	p.mu.Unlock()
	for i := range p.servers {
		p.servers[i].srv.SetSessions(p.sessions())
	}
	r := &route{p: p, conns: make([]conn, len(p.servers))}
	var h op.Handler = r
	if wrap != nil {
		h = wrap(r)
	}
	each := func(ctx context.Context, fn func(sealfs.Shard) error) error {
		for k := range p.of {
			if err := fn(sealfs.Shard(k)); err != nil {
				return err
			}
		}
		return nil
	}
	c := client.New(h, client.Options{Volume: 1, Root: p.root, Shards: placeShards, Session: id, Chunked: true, Each: each})
	r.c = c
	// A session that has asked nothing yet would not come back to a server that is started anew.
	if _, err := c.Getattr(p.t.Context(), p.root); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		p.loss.Store(0)
		if err := c.Close(); err != nil {
			p.t.Errorf("close: %v", err)
		}
	})
	return c
}

// needFUSE skips where nothing can be mounted.
func needFUSE(t testing.TB) {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no FUSE here: %v", err)
	}
	f.Close()
	if os.Geteuid() != 0 {
		t.Skip("only root links by descriptor")
	}
}

// mount mounts a client, and returns where.
func (p *place) mount(c *client.Client) string {
	p.t.Helper()
	dir, err := os.MkdirTemp("", "sealfs-mount-")
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		for range 10 {
			if unix.Unmount(dir, unix.MNT_DETACH) != nil {
				break
			}
		}
		if err := os.Remove(dir); err != nil {
			p.t.Error(err)
		}
	})
	m, err := client.Mount(p.t.Context(), c, client.MountOptions{Dir: dir, Name: "linear"})
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		p.loss.Store(0)
		if err := m.Unmount(); err != nil {
			p.t.Error(err)
		}
	})
	return dir
}

// arena makes directories for one history.
func (p *place) arena(c *client.Client, name string) (dirs []string) {
	p.t.Helper()
	fs := c.FS(client.Cred{})
	for _, d := range []string{name, name + "/d0", name + "/d1"} {
		if err := fs.Mkdir(d, 0o755); err != nil {
			p.t.Fatal(err)
		}
		dirs = append(dirs, d)
	}
	return dirs[1:]
}

// tally is what came of histories.
type tally struct {
	histories, calls, lost, refused, bad, undecided int
	kinds                                           [kinds]int
}

func (c *tally) String() string {
	return fmt.Sprintf("linear: histories=%d operations=%d violations=%d", c.histories, c.calls, c.bad)
}

// add counts a history.
func (c *tally) add(h *History, v Verdict) {
	c.histories++
	for _, s := range h.Steps() {
		c.calls++
		c.kinds[s.Call.Kind]++
		if s.Answer.Lost {
			c.lost++
		} else if s.Answer.Errno != 0 {
			c.refused++
		}
	}
	if v.Bad {
		c.bad++
	}
	if v.Undecided {
		c.undecided++
	}
}

// plan is what histories are made with.
type plan struct {
	actors  []Actor
	first   *client.Client
	calls   int
	restart bool
	flat    bool
	files   bool
	plain   bool
}

// histories makes histories until enough says so, or one is bad.
func (p *place) histories(seed uint64, pl plan, enough func(tally) bool) (sum tally, report string) {
	p.t.Helper()
	over := make(chan struct{})
	var restarts sync.WaitGroup
	if pl.restart {
		rng := rand.New(rand.NewPCG(seed, 77))
		restarts.Go(func() {
			for i := 0; ; i = 1 - i {
				select {
				case <-over:
					return
				case <-time.After(time.Duration(20+rng.IntN(100)) * time.Millisecond):
				}
				p.restart(i % len(p.servers))
				// All are to get further before the next one.
				for at := p.asked.Load(); p.asked.Load() < at+200; {
					select {
					case <-over:
						return
					case <-time.After(5 * time.Millisecond):
					}
				}
			}
		})
	}
	defer restarts.Wait()
	defer close(over)
	for n := 0; !enough(sum); n++ {
		h, err := Run(Plan{Seed: seed + uint64(n), Dirs: p.arena(pl.first, fmt.Sprintf("arena%d", n)), Actors: pl.actors, Calls: pl.calls, Files: pl.files && n%2 == 1, Flat: pl.flat, Plain: pl.plain})
		if err != nil {
			p.t.Fatal(err)
		}
		v := h.Check(checkLimit)
		sum.add(h, v)
		if v.Bad {
			return sum, fmt.Sprintf("history %d of seed %d:\n%s", n, seed, v.Report)
		}
	}
	return sum, ""
}
