package server

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"sealfs"
	"sealfs/op"
)

// lockRequest is a request about bytes start to end of ino.
func lockRequest(t op.Type, ino sealfs.Ino, who op.Owner, kind op.LockType, start, end uint64) op.Request {
	req := op.Request{Type: t, Ino: ino, Session: who.Session, Lock: op.Lock{Type: kind, Start: start, End: end, Owner: who.Owner}}
	address(&req)
	return req
}

// begin sends a request, again and again while its server is away, and says where its answer comes.
func (w *world) begin(ctx context.Context, req op.Request) <-chan error {
	got := make(chan error, 1)
	go func() {
		for {
			var rep op.Reply
			err := w.send(ctx, &req, &rep)
			if errors.Is(err, sealfs.ErrUnavailable) && ctx.Err() == nil {
				runtime.Gosched()
				continue
			}
			if err == nil {
				err = rep.Err()
			}
			got <- err
			return
		}
	}()
	return got
}

func (w *world) must(req op.Request) *op.Reply {
	w.t.Helper()
	if req.Shard == 0 {
		address(&req)
	}
	rep := &op.Reply{}
	if err := w.Do(context.Background(), &req, rep); err != nil || rep.Code != 0 {
		w.t.Fatalf("%v: %v, %v", req.Type, err, rep.Code)
	}
	return rep
}

// graphs calls fn for all graphs of waits.
func (w *world) graphs(fn func(*waitGraph)) {
	for i := range w.srv {
		for _, st := range w.srv[i].Load().all() {
			st.circles.mu.Lock()
			fn(&st.circles)
			st.circles.mu.Unlock()
		}
	}
}

// waits returns when so many waits are known to the graphs, of any server.
func (w *world) waits(n int) {
	w.t.Helper()
	poll(w.t, fmt.Sprint("not ", n, " waits are known"), func() bool {
		known := 0
		w.graphs(func(g *waitGraph) { known += len(g.waits) })
		return known == n
	})
}

// files makes n files, spread over the stores.
func (w *world) files(n int) (inos []sealfs.Ino) {
	for i := range n {
		dir := w.must(op.Request{Type: op.Mkdir, Dir: w.root, Name: fmt.Sprint(i), Mode: 0o755, Shard2: sealfs.Shard(i % testShards)}).Attr.Ino
		inos = append(inos, w.must(op.Request{Type: op.Create, Dir: dir, Name: "f", Mode: 0o644}).Attr.Ino)
	}
	return inos
}

func (w *world) never(what string, got <-chan error) {
	w.t.Helper()
	select {
	case err := <-got:
		w.t.Fatalf("%s: %v", what, err)
	default:
	}
}

// TestDeadlock closes circles of several sizes, over files of two servers. Who closes
// it is refused, the others go on when he gives up what he holds.
func TestDeadlock(t *testing.T) {
	for _, n := range []int{2, 3, 7, 13} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			w := newWorld(t, 3, 2, 1)
			files := w.files(n)
			who := func(i int) op.Owner { return op.Owner{Session: sealfs.Session(7 + i%3), Owner: uint64(100 + i)} }
			for i, ino := range files {
				w.must(lockRequest(op.SetLock, ino, who(i), op.WriteLock, 10, 19))
			}
			var waiting []<-chan error
			for i := range n - 1 {
				waiting = append(waiting, w.begin(context.Background(), lockRequest(op.WaitLock, files[i+1], who(i), op.WriteLock, 15, 30)))
			}
			w.waits(n - 1)
			last := lockRequest(op.WaitLock, files[0], who(n-1), op.WriteLock, 0, 10)
			// One that does not conflict closes nothing, nor does an open file's.
			w.must(lockRequest(op.WaitLock, files[0], who(n-1), op.WriteLock, 0, 9))
			ctx, cancel := context.WithCancel(context.Background())
			ofd := last
			ofd.Flags = op.OFD
			patient := w.begin(ctx, ofd)
			if err := <-w.begin(context.Background(), last); err != sealfs.ErrDeadlock {
				t.Fatalf("the last wait ends with %v", err)
			}
			w.never("an open file's wait", patient)
			cancel()
			<-patient
			for i, got := range waiting {
				w.never(fmt.Sprint("wait ", i), got)
			}
			for i := n - 1; i >= 0; i-- {
				drop := lockRequest(op.DropOwner, files[i], who(i), op.Unlock, 0, 0)
				w.must(drop)
				if i > 0 {
					if err := <-waiting[i-1]; err != nil {
						t.Fatalf("wait %d ends with %v", i-1, err)
					}
				}
			}
			w.waits(0)
		})
	}
}

// TestDeadlockLater: a circle that is closed not by a new wait, but by a new holder.
func TestDeadlockLater(t *testing.T) {
	w := newWorld(t, 3, 2, 1)
	files := w.files(2)
	a, b, c := op.Owner{Session: 7, Owner: 1}, op.Owner{Session: 8, Owner: 1}, op.Owner{Session: 9, Owner: 1}
	w.must(lockRequest(op.SetLock, files[0], a, op.WriteLock, 0, 9))
	w.must(lockRequest(op.SetLock, files[1], c, op.ReadLock, 0, 9))
	first := w.begin(context.Background(), lockRequest(op.WaitLock, files[1], a, op.WriteLock, 0, 9)) // for c
	w.waits(1)
	w.must(lockRequest(op.SetLock, files[1], b, op.ReadLock, 5, 5)) // and for b
	second := w.begin(context.Background(), lockRequest(op.WaitLock, files[0], b, op.WriteLock, 0, 9))
	var refused op.Owner
	select {
	case err := <-first:
		if refused = a; err != sealfs.ErrDeadlock {
			t.Fatal(err)
		}
	case err := <-second:
		if refused = b; err != sealfs.ErrDeadlock {
			t.Fatal(err)
		}
	}
	w.must(lockRequest(op.DropOwner, files[1], c, op.Unlock, 0, 0))
	for _, ino := range files {
		w.must(lockRequest(op.DropOwner, ino, refused, op.Unlock, 0, 0))
	}
	other := first
	if refused == a {
		other = second
	}
	if err := <-other; err != nil {
		t.Error(err)
	}
}

// TestDeadlockStale: what the graph knows of waits that are over refuses nobody.
func TestDeadlockStale(t *testing.T) {
	w := newWorld(t, 3, 2, 1)
	files := w.files(2)
	a, b := op.Owner{Session: 7, Owner: 1}, op.Owner{Session: 8, Owner: 1}
	// As if b waited for a by a request whose end was never told.
	w.must(op.Request{
		Type: op.WaitFor, Shard: waitsShard(1, testShards), Volume: 1, Session: b.Session, Ino: files[0], Lock: op.Lock{Owner: b.Owner}, Off: 77,
		Data: op.AppendOwner(nil, a),
	})
	w.must(lockRequest(op.SetLock, files[1], b, op.WriteLock, 0, 9))
	got := w.begin(context.Background(), lockRequest(op.WaitLock, files[1], a, op.WriteLock, 0, 9))
	// It is found out, and dropped: a's wait alone is left.
	stale := func() (known bool) {
		w.graphs(func(g *waitGraph) { known = known || g.waits[77] != nil })
		return known
	}
	poll(t, "a stale wait is not dropped", func() bool {
		w.never("a wait", got)
		return !stale()
	})
	w.never("a wait", got)
	w.must(lockRequest(op.DropOwner, files[1], b, op.Unlock, 0, 0))
	if err := <-got; err != nil {
		t.Error(err)
	}
}

// TestDeadlockAfterRestart: the graph's server has forgotten it; it is told again.
func TestDeadlockAfterRestart(t *testing.T) {
	w := newWorld(t, 3, 2, 1)
	files := w.files(testShards)
	server := func(shard sealfs.Shard) int { return w.of[w.m.Load().Table[shard].Replicas[0]] }
	graph := server(waitsShard(1, testShards))
	files = slices.DeleteFunc(files, func(ino sealfs.Ino) bool { return server(ino.Home(testShards)) == graph })
	a, b := op.Owner{Session: 7, Owner: 1}, op.Owner{Session: 8, Owner: 1}
	w.must(lockRequest(op.SetLock, files[0], a, op.WriteLock, 0, 9))
	w.must(lockRequest(op.SetLock, files[1], b, op.WriteLock, 10, 19))
	first := w.begin(context.Background(), lockRequest(op.WaitLock, files[1], a, op.WriteLock, 10, 19))
	w.waits(1)
	w.kill(graph)
	second := w.begin(context.Background(), lockRequest(op.WaitLock, files[0], b, op.WriteLock, 0, 9))
	select {
	case err := <-first:
		if err != sealfs.ErrDeadlock {
			t.Error(err)
		}
		w.must(lockRequest(op.DropOwner, files[0], a, op.Unlock, 0, 0))
		err = <-second
		if err != nil {
			t.Error(err)
		}
	case err := <-second:
		if err != sealfs.ErrDeadlock {
			t.Error(err)
		}
		w.must(lockRequest(op.DropOwner, files[1], b, op.Unlock, 0, 0))
		if err := <-first; err != nil {
			t.Error(err)
		}
	}
}

// lockClaim is a range of a file that somebody holds or wants.
type lockClaim struct {
	file       int
	kind       op.LockType
	start, end uint64
}

func (c lockClaim) against(o lockClaim) bool {
	return c.file == o.file && c.start <= o.end && o.start <= c.end && (c.kind == op.WriteLock || o.kind == op.WriteLock)
}

// lockers are owners that lock at random, and what is known of them: who waits does so in truth,
// and holds what it says.
type lockers struct {
	mu    sync.Mutex
	holds [][]lockClaim
	wants []*lockClaim
}

// inCircle reports whether an owner waits for itself in the end.
func (l *lockers) inCircle(me int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	seen := make([]bool, len(l.wants))
	var reach func(i int) bool
	reach = func(i int) bool {
		if l.wants[i] == nil {
			return false
		}
		for j, held := range l.holds {
			if j == i || !slices.ContainsFunc(held, l.wants[i].against) {
				continue
			}
			if j == me {
				return true
			}
			if !seen[j] {
				seen[j] = true
				if reach(j) {
					return true
				}
			}
		}
		return false
	}
	return reach(me)
}

// TestDeadlockRandom lets owners lock in any order. Every circle must be found, or the
// test stands still; and whoever is refused must be in one.
func TestDeadlockRandom(t *testing.T) {
	w := newWorld(t, 3, 2, 1)
	const owners, each = 8, 6
	rounds := 60
	if testing.Short() {
		rounds = 15
	}
	files := w.files(4)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	l := &lockers{holds: make([][]lockClaim, owners), wants: make([]*lockClaim, owners)}
	var refused, granted int
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var all sync.WaitGroup
	for me := range owners {
		rng := rand.New(rand.NewPCG(seed, uint64(me)))
		who := op.Owner{Session: sealfs.Session(7 + me%3), Owner: uint64(1 + me)}
		all.Go(func() {
			do := func(req op.Request) error { return <-w.begin(ctx, req) }
			for range rounds {
				for range each {
					start := rng.Uint64N(8)
					c := lockClaim{rng.IntN(len(files)), op.LockType(1 + rng.IntN(2)), start, start + rng.Uint64N(3)}
					l.mu.Lock()
					l.wants[me] = &c
					l.mu.Unlock()
					err := do(lockRequest(op.WaitLock, files[c.file], who, c.kind, c.start, c.end))
					if err != nil && (err != sealfs.ErrDeadlock || !l.inCircle(me)) {
						t.Errorf("owner %d waits for %v: %v", me, c, err)
						cancel()
					}
					l.mu.Lock()
					l.wants[me] = nil
					if err == nil {
						// A read lock that takes the place of a write lock must not count as both.
						var held []lockClaim
						for _, h := range l.holds[me] {
							if h.file == c.file && h.start <= c.end && c.start <= h.end {
								if h.start < c.start {
									held = append(held, lockClaim{h.file, h.kind, h.start, c.start - 1})
								}
								if h.end > c.end {
									held = append(held, lockClaim{h.file, h.kind, c.end + 1, h.end})
								}
								continue
							}
							held = append(held, h)
						}
						l.holds[me] = append(held, c)
						granted++
					} else {
						refused++
					}
					l.mu.Unlock()
					if err != nil {
						break
					}
				}
				l.mu.Lock()
				held := l.holds[me]
				l.holds[me] = nil
				l.mu.Unlock()
				for _, h := range held {
					if err := do(lockRequest(op.DropOwner, files[h.file], who, op.Unlock, 0, 0)); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	all.Wait()
	if n := w.counted(); n != 0 {
		t.Errorf("%d locks are left", n)
	}
	t.Logf("%d granted, %d refused", granted, refused)
	if refused == 0 || granted == 0 {
		t.Error("nothing was tested")
	}
}
