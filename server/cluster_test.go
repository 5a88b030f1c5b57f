package server

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sealfs"
	"sealfs/cluster"
	"sealfs/disk"
	"sealfs/internal/oracle"
	"sealfs/internal/turn"
	"sealfs/lsfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// world is a cluster of servers in one process, on simulated devices. It is the
// router of all of them, and can lose what they say to each other.
type world struct {
	t    testing.TB
	m    atomic.Pointer[cluster.Map]
	root sealfs.Ino
	of   []int // server of each store
	mu   sync.Mutex
	rng  *rand.Rand             // guarded by mu
	loss int                    // of 1000 messages between servers, so many are lost
	mute func(*op.Request) bool // says which requests between servers are lost; guarded by mu
	pace pace
	// split is Options.SplitEntries.
	split uint64
	gate  sync.RWMutex
	// damaged says that the test has made names that stand for nothing.
	damaged bool
	srv     []atomic.Pointer[Server]
	dev     []*disk.Sim // of each store
	reg     []*disk.Sim
}

// newWorld makes servers with one or more stores each.
func newWorld(t testing.TB, seed uint64, stores ...int) *world {
	t.Helper()
	return newWorldWith(t, seed, 0, stores...)
}

// newWorldWith is newWorld with Options.SplitEntries.
func newWorldWith(t testing.TB, seed, split uint64, stores ...int) *world {
	t.Helper()
	w := &world{t: t, rng: rand.New(rand.NewPCG(seed, 9)), pace: testPace, split: split}
	m := &cluster.Map{Version: 1, Cluster: sealfs.NewUUID(), Name: "test", Shards: testShards, Replicas: 1, NextVolume: 2}
	for srv, n := range stores {
		for range n {
			id := sealfs.NewUUID()
			dev, reg := disk.NewSim("device", 256<<20), disk.NewSim("region", 32<<20)
			if _, err := lsfs.Format(dev, pmem.NewMemory(reg), lsfs.Geometry{Store: id, Cluster: m.Cluster, SegmentBytes: 1 << 20}); err != nil {
				t.Fatal(err)
			}
			m.Stores = append(m.Stores, cluster.StoreInfo{ID: id, Weight: 1, State: cluster.StoreUp})
			w.of, w.dev, w.reg = append(w.of, srv), append(w.dev, dev), append(w.reg, reg)
		}
	}
	for shard := range testShards {
		m.Table = append(m.Table, cluster.ShardInfo{Replicas: []uint16{uint16(shard % len(m.Stores))}, Epoch: 3})
	}
	w.m.Store(m)
	w.srv = make([]atomic.Pointer[Server], len(stores))
	for i := range stores {
		w.start(i, nil)
	}
	root, err := MakeRoot(context.Background(), w, testShards, 1, 0o755, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	w.root = root
	next := *m
	next.Volumes = []cluster.VolumeInfo{{ID: 1, Name: "v", Root: root, State: cluster.VolumeReady}}
	w.m.Store(&next)
	t.Cleanup(func() {
		w.lose(0)
		w.silence(nil)
		w.settle()
		if !w.damaged {
			w.check()
		}
		for i := range w.srv {
			if err := w.srv[i].Load().Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return w
}

// testPace gives no transaction up that can be brought to its end, however slow the machine is.
var testPace = pace{doubt: 40 * time.Millisecond, finish: 20 * time.Millisecond, attributes: 10 * time.Second, hurry: 10 * time.Millisecond,
	search: 2 * time.Millisecond, recheck: 200 * time.Millisecond, plea: 10 * time.Second}

// start starts server i; kept is what staging holds of its stores.
func (w *world) start(i int, kept []*pmem.Staging) {
	w.t.Helper()
	s := &Server{
		o: Options{Shards: testShards, Map: w.m.Load, Peers: (*wires)(w), KeepSessions: true, Grace: time.Millisecond, SplitEntries: w.split}, cfg: meta.Config{Shards: testShards},
		log: testLog(w.t), quit: make(chan struct{}), pace: w.pace,
	}
	for k, at := range w.of {
		if at != i {
			continue
		}
		var ring *pmem.Staging
		if kept != nil {
			ring, kept = kept[0], kept[1:]
		}
		st, err := s.attach(w.dev[k], pmem.NewMemory(w.reg[k]), ring, StoreOptions{Device: "device", Log: lsfs.Options{StagingBytes: 4 << 20}})
		if err != nil {
			w.t.Fatal(err)
		}
		s.mu.Lock()
		s.stores = append(s.stores, st)
		s.mu.Unlock()
	}
	s.way.Store(nil)
	w.srv[i].Store(s)
	for _, st := range s.stores {
		st.run()
	}
	s.SetSessions(8, []sealfs.Session{7})
	poll(w.t, "the time of grace does not end", func() bool {
		for _, st := range s.stores {
			if st.holds.any(1 << 50) {
				return false
			}
		}
		return true
	})
}

// kill ends a server as SIGKILL would and starts it again.
func (w *world) kill(i int) { w.restart(i, false) }

// restart is kill, or takes away the power of the server's machine, with all that was not synced.
func (w *world) restart(i int, power bool) {
	w.t.Helper()
	s := w.srv[i].Load()
	// What is under way gets no further.
	s.closed.Store(true)
	close(s.quit)
	for _, st := range s.all() {
		st.locks.close()
	}
	w.gate.Lock()
	defer w.gate.Unlock()
	s.finisher.stop()
	s.teller.stop(turn.Turns{})
	s.gate.Lock()
	defer s.gate.Unlock()
	var kept []*pmem.Staging
	n := 0
	for k, at := range w.of {
		if at != i {
			continue
		}
		st := s.stores[n]
		n++
		st.splits.stop()
		st.parties.stop()
		st.reclaim.stop()
		ring, err := st.Abandon()
		if err != nil {
			w.t.Fatal(err)
		}
		if power {
			none := func(int64) bool { return false }
			w.dev[k], w.reg[k] = w.dev[k].CrashClone(none), w.reg[k].CrashClone(none)
			continue
		}
		kept = append(kept, ring)
		w.dev[k], w.reg[k] = w.dev[k].Reopen(), w.reg[k].Reopen()
	}
	w.start(i, kept)
}

func (w *world) lose(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.loss = n
}

// silence has those requests between servers be lost that match says; nil: none.
func (w *world) silence(match func(*op.Request) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mute = match
}

// Do sends a client's request to the server of its shard.
func (w *world) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	w.gate.RLock()
	defer w.gate.RUnlock()
	return w.send(ctx, req, rep)
}

func (w *world) send(ctx context.Context, req *op.Request, rep *op.Reply) error {
	row := w.m.Load().Table[req.Shard]
	req.Epoch = row.Epoch
	s := w.srv[w.of[row.Replicas[0]]].Load()
	if s == nil {
		return fmt.Errorf("not started yet: %w", sealfs.ErrUnavailable)
	}
	err := s.Do(ctx, req, rep)
	if errors.Is(err, sealfs.ErrClosed) {
		err = fmt.Errorf("%w: %w", err, sealfs.ErrUnavailable)
	}
	return err
}

// wires are the way from server to server: it loses requests and answers, and
// brings some twice. Its requests pass through the codec.
type wires world

func (b *wires) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	w := (*world)(b)
	w.mu.Lock()
	luck, loss, mute := w.rng.IntN(1000), w.loss, w.mute
	w.mu.Unlock()
	if mute != nil && mute(req) {
		return fmt.Errorf("lost on the way: %w", sealfs.ErrUnavailable)
	}
	if luck < loss/2 {
		return fmt.Errorf("lost on the way: %w", sealfs.ErrUnavailable)
	}
	var came op.Request
	if err := op.DecodeRequest(&came, req.AppendTo(nil)); err != nil {
		return err
	}
	if luck > 1000-loss/2 {
		twice := came
		if err := w.send(ctx, &twice, &op.Reply{}); err != nil {
			return err
		}
	}
	if err := w.send(ctx, &came, rep); err != nil {
		return err
	}
	if luck < loss {
		rep.Reset()
		return fmt.Errorf("the answer was lost: %w", sealfs.ErrUnavailable)
	}
	return nil
}

// settle waits until no transaction is left anywhere, and all totals are told: with the rule that
// check holds them to, they are right then.
func (w *world) settle() {
	w.t.Helper()
	poll(w.t, "transactions or totals are left", func() bool {
		for i := range w.srv {
			for _, st := range w.srv[i].Load().stores {
				r := st.BeginRead()
				n := st.parties.locks.Len() + int(st.splits.busy.Load())
				for shard := range sealfs.Shard(testShards) {
					if err := meta.Decisions(r, shard, func(op.Tx, meta.Decision) { n++ }); err != nil {
						w.t.Error(err)
					}
				}
				if err := meta.Queued(r, testShards, func(sealfs.Shard, sealfs.Ino, bool) { n++ }); err != nil {
					w.t.Error(err)
				}
				st.EndRead()
				if n > 0 {
					return false
				}
			}
		}
		return true
	})
}

// poll waits until done reports true.
func poll(t testing.TB, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for limit := time.After(30 * time.Second); !done(); {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatal(what)
		}
	}
}

// check looks for names that dangle, inodes without names and all else that
// only the stores together can tell.
func (w *world) check() {
	w.t.Helper()
	var all []pmem.Reader
	for i := range w.srv {
		for _, st := range w.srv[i].Load().stores {
			st.reclaim.settle()
			all = append(all, st.BeginRead())
			defer st.EndRead()
		}
	}
	if err := meta.CheckAll(all, meta.Config{Shards: testShards}, func(p string) { w.t.Error(p) }); err != nil {
		w.t.Error(err)
	}
}

// retrier is a client of the world: it asks again, and fills in what a client would ask for.
type retrier struct {
	w   *world
	seq uint64
}

func (c *retrier) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	if req.Type == op.TestLock {
		req.Session = 7
	}
	if req.Type.Changes() {
		// A change whose answer is lost is asked for again.
		c.seq++
		req.Session, req.Seq, req.Low = 7, c.seq, c.seq
	}
	for {
		rep.Reset()
		err := c.w.Do(ctx, req, rep)
		if err != nil && !errors.Is(err, sealfs.ErrUnavailable) {
			return err
		}
		if err == nil && rep.Code != sealfs.ErrUnavailable {
			break
		}
	}
	req.Session, req.Seq, req.Low = 0, 0, 0
	if a := rep.Attr; a.Ino != 0 && a.Version == 0 && rep.Code == 0 && req.Type != op.Rename {
		look := op.Request{Type: op.Getattr, Ino: a.Ino, Shard: a.Ino.Home(testShards)}
		return c.w.Do(ctx, &look, rep)
	}
	return nil
}

// newTwinWorld compares a world with the oracle.
func newTwinWorld(t *testing.T, seed uint64, w *world) *twin {
	tw := &twin{t: t, s: &retrier{w: w}, apart: true, root: w.root, o: oracle.New(testShards), rng: rand.New(rand.NewPCG(seed, 1))}
	tw.begin()
	for i := range 12 {
		tw.names = append(tw.names, fmt.Sprintf("name%d", i))
	}
	return tw
}

// TestModelCluster: random operations on five stores of three servers give what
// the oracle gives, while messages between the servers are lost and come twice,
// and servers are killed.
func TestModelCluster(t *testing.T) {
	steps := 6000
	if testing.Short() {
		steps = 1500
	}
	for _, loss := range []int{0, 100} {
		t.Run(fmt.Sprint(loss), func(t *testing.T) {
			w := newWorld(t, 1, 2, 2, 1)
			tw := newTwinWorld(t, 21, w)
			for tw.n < steps {
				if tw.n%100 == 0 {
					// An attempt that is given up costs the number of a new directory,
					// and then the oracle counts otherwise.
					tw.near = loss > 0 && tw.n%200 == 0
					w.lose(0)
					if tw.near {
						w.lose(loss)
					}
				}
				tw.step()
				if tw.n%500 == 0 {
					w.kill(tw.rng.IntN(3))
				}
				if tw.n%2000 == 0 {
					w.lose(0)
					w.settle()
					w.check()
				}
			}
		})
	}
}
