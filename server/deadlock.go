package server

import (
	"cmp"
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// Owners of POSIX locks may wait for each other in a circle, over several files,
// stores and mounts. A wait that lasts is told, with the owners in its way, to the store
// of one shard of the volume (waitsShard), which holds the graph of the volume's waits in
// memory. Whose wait closes a circle is told the circle, asks the servers of
// all waits in it whether they last, and if so has the graph take it out and its request is
// refused with ErrDeadlock. Taking it out is refused when another wait of the circle was
// taken out meanwhile: a circle is broken once.
//
// No refusal is wrong. All waits of the circle stood in the graph when it was
// found, and have a number each that is never used again; one that lasts when it is asked
// about has lasted all the time. So all of them lasted at the moment when the circle was
// found; an owner that waits takes no locks and releases none, so those in the way now
// were in the way then. (As on Linux this is so for owners with one thread: another
// one could still have released what the circle waits for.)
//
// What the graph does not know costs time, not correctness: every wait is told again
// from time to time, so that a store that starts learns them, and what is not told
// again is forgotten.

const (
	// graphMax bounds the edges of the graph, and the owners that it searches; beyond, deadlocks are not found.
	graphMax = 1 << 18
	// circleMax bounds the waits of a circle that is told.
	circleMax = 256
)

// waitGraph knows who waits for whom in the volumes whose waitsShard the store holds.
type waitGraph struct {
	mu    sync.Mutex
	waits map[uint64]*knownWait // by number
	of    map[waiter][]*knownWait
	edges int
	swept time.Time
}

type waiter struct {
	volume sealfs.Volume
	op.Owner
}

// knownWait is one request that waits.
type knownWait struct {
	who  waiter
	ino  sealfs.Ino
	id   uint64
	on   []op.Owner
	told time.Time
}

// tell replaces what is known of the wait w.id, nothing any more if it waits for nobody,
// and returns the waits that close a circle with it, w itself first. What was not told for
// longer than keep is forgotten.
func (g *waitGraph) tell(w knownWait, keep time.Duration) []op.Wait {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.drop(w.id)
	if w.told.Sub(g.swept) > keep {
		g.swept = w.told
		for id, k := range g.waits {
			if w.told.Sub(k.told) > keep {
				g.drop(id)
			}
		}
	}
	if len(w.on) == 0 || g.edges+len(w.on) > graphMax {
		return nil
	}
	if g.waits == nil {
		g.waits, g.of = map[uint64]*knownWait{}, map[waiter][]*knownWait{}
	}
	g.waits[w.id] = &w
	g.of[w.who] = append(g.of[w.who], &w)
	g.edges += len(w.on)
	return g.circle(&w)
}

func (g *waitGraph) drop(id uint64) {
	k := g.waits[id]
	if k == nil {
		return
	}
	delete(g.waits, id)
	g.edges -= len(k.on)
	if rest := slices.DeleteFunc(g.of[k.who], func(o *knownWait) bool { return o == k }); len(rest) > 0 {
		g.of[k.who] = rest
	} else {
		delete(g.of, k.who)
	}
}

func (g *waitGraph) forget(id uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.drop(id)
}

// take takes the wait id out of a circle that is whole, and reports whether it was.
func (g *waitGraph) take(id uint64, circle []uint64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, at := range circle {
		if g.waits[at] == nil {
			return false
		}
	}
	g.drop(id)
	return true
}

// circle returns a shortest circle through w.
func (g *waitGraph) circle(w *knownWait) []op.Wait {
	by := map[op.Owner]op.Wait{} // the wait through which an owner was found
	next := []*knownWait{w}
	for len(next) > 0 {
		k := next[0]
		next = next[1:]
		for _, o := range k.on {
			if _, seen := by[o]; seen {
				continue
			}
			by[o] = op.Wait{Who: k.who.Owner, For: o, Ino: k.ino, ID: k.id}
			if o == w.who.Owner {
				return trace(by, o)
			}
			next = append(next, g.of[waiter{w.who.volume, o}]...)
		}
	}
	return nil
}

// trace follows by from an owner back to itself.
func trace(by map[op.Owner]op.Wait, o op.Owner) (circle []op.Wait) {
	for at := o; len(circle) < circleMax; {
		edge := by[at]
		circle = append(circle, edge)
		if at = edge.Who; at == o {
			slices.Reverse(circle)
			return circle
		}
	}
	return nil
}

// noteWait answers WaitFor.
func (st *store) noteWait(req *op.Request, rep *op.Reply) error {
	if req.Mode == 1 {
		ids := []uint64{req.Off}
		err := op.DecodeWaits(req.Data, func(w op.Wait) { ids = append(ids, w.ID) })
		rep.Eof = err == nil && st.circles.take(req.Off, ids)
		return err
	}
	w := knownWait{
		who: waiter{req.Volume, op.Owner{Session: req.Session, Owner: req.Lock.Owner}}, ino: req.Ino, id: req.Off, told: time.Now(),
	}
	if err := op.DecodeOwners(req.Data, func(o op.Owner) { w.on = append(w.on, o) }); err != nil {
		return err
	}
	if req.Len != 0 {
		st.circles.forget(req.Len)
	}
	for _, edge := range st.circles.tell(w, 3*st.srv.pace.recheck) {
		rep.Data = op.AppendWait(rep.Data, edge)
	}
	return nil
}

// stillWaits answers Waiting.
func (st *store) stillWaits(req *op.Request, rep *op.Reply) error {
	return op.DecodeWaits(req.Data, func(w op.Wait) {
		st.locks.mu.Lock()
		waits := st.locks.long[w.ID]
		st.locks.mu.Unlock()
		if waits != nil && waits.Ino == w.Ino && waits.Session == w.Who.Session && waits.Lock.Owner == w.Who.Owner {
			rep.Eof = slices.Contains(st.blockers(waits), w.For)
		}
	})
}

// blockers returns who is in the way of a lock, each once.
func (st *store) blockers(req *op.Request) (on []op.Owner) {
	seen := map[op.Owner]struct{}{}
	err := st.View(func(r pmem.Reader) error {
		clear(seen)
		return meta.Blockers(r, st.srv.cfg, req, func(o op.Owner) bool {
			seen[o] = struct{}{}
			return len(seen) < op.OwnersMax
		})
	})
	if err != nil {
		return nil // the request itself will meet it
	}
	return slices.Collect(maps.Keys(seen))
}

// longWait is a WaitLock that has waited for long. A nil one is none yet.
type longWait struct {
	st      *store
	req     op.Request
	id      uint64
	changed chan struct{}
	circle  chan struct{} // closed when it waits in a circle
	stop    context.CancelFunc
	done    chan struct{}
	told    bool // the graph knows it
}

// waitLong begins to look for a circle in which req waits.
func (st *store) waitLong(ctx context.Context, req *op.Request) *longWait {
	w := &longWait{st: st, req: *req, id: rand.Uint64() | 1, changed: make(chan struct{}, 1), circle: make(chan struct{}), done: make(chan struct{})}
	ctx, w.stop = context.WithCancel(ctx)
	st.locks.mu.Lock()
	if st.locks.long == nil {
		st.locks.long = map[uint64]*op.Request{}
	}
	st.locks.long[w.id] = &w.req
	st.locks.mu.Unlock()
	go w.search(ctx)
	return w
}

// look says that somebody else may be in the way now.
func (w *longWait) look() {
	if w != nil {
		poke(w.changed)
	}
}

func (w *longWait) dead() <-chan struct{} {
	if w == nil {
		return nil
	}
	return w.circle
}

// end is called when the request does not wait any more.
func (w *longWait) end() {
	if w == nil {
		return
	}
	w.st.locks.mu.Lock()
	delete(w.st.locks.long, w.id)
	w.st.locks.mu.Unlock()
	w.stop()
	<-w.done
	if w.told {
		go w.tell(context.Background(), nil, 0) // if that fails it is forgotten by and by
	}
}

func (w *longWait) search(ctx context.Context) {
	defer close(w.done)
	var before []op.Owner
	var over uint64
	timer := time.NewTimer(0)
	defer timer.Stop()
	again := true
	for {
		on := w.st.blockers(&w.req)
		slices.SortFunc(on, func(a, b op.Owner) int {
			return cmp.Or(cmp.Compare(a.Session, b.Session), cmp.Compare(a.Owner, b.Owner))
		})
		if len(on) > 0 && (again || !slices.Equal(on, before)) {
			before = on
			patience := w.st.srv.pace.recheck
			circle, err := w.tell(ctx, on, over)
			over = 0
			switch {
			case ctx.Err() != nil:
				return
			case err != nil:
				patience = min(patience, w.st.srv.pace.doubt)
			case len(circle) > 0:
				var proved bool
				if over, proved = w.prove(ctx, circle); proved {
					close(w.circle)
					return
				}
				patience = min(patience, w.st.srv.pace.doubt)
			}
			timer.Reset(patience)
		}
		select {
		case <-ctx.Done():
			return
		case <-w.changed:
			again = false
		case <-timer.C:
			again = true
		}
	}
}

// graphPatience bounds the questions about waits.
const graphPatience = 5 * time.Second

// toGraph is a request to the graph about the wait.
func (w *longWait) toGraph() op.Request {
	w.told = true
	return op.Request{
		Type: op.WaitFor, Shard: waitsShard(w.req.Volume, w.st.srv.cfg.Shards), Volume: w.req.Volume,
		Session: w.req.Session, Ino: w.req.Ino, Lock: op.Lock{Owner: w.req.Lock.Owner}, Off: w.id,
	}
}

// tell says to the graph who is in the way, and returns a circle. over is
// a wait that does not last any more, 0 for none.
func (w *longWait) tell(ctx context.Context, on []op.Owner, over uint64) (circle []op.Wait, err error) {
	ctx, cancel := context.WithTimeout(ctx, graphPatience)
	defer cancel()
	req := w.toGraph()
	req.Len = over
	for _, o := range on {
		req.Data = op.AppendOwner(req.Data, o)
	}
	var rep op.Reply
	if err = w.st.srv.ask(ctx, &req, &rep); err == nil {
		err = rep.Err()
	}
	if err == nil {
		err = op.DecodeWaits(rep.Data, func(e op.Wait) { circle = append(circle, e) })
	}
	return circle, err
}

// prove asks whether all waits of a circle last, and then has w taken out of it. If one does
// not last, over is its number.
func (w *longWait) prove(ctx context.Context, circle []op.Wait) (over uint64, proved bool) {
	ctx, cancel := context.WithTimeout(ctx, graphPatience)
	defer cancel()
	yes := func(req op.Request) (known, yes bool) {
		var rep op.Reply
		err := w.st.srv.ask(ctx, &req, &rep)
		return err == nil && rep.Code == 0, rep.Eof
	}
	take := w.toGraph()
	take.Mode = 1
	for _, e := range circle {
		edge := op.AppendWait(nil, e)
		take.Data = append(take.Data, edge...)
		known, lasts := yes(op.Request{Type: op.Waiting, Ino: e.Ino, Shard: e.Ino.Home(w.st.srv.cfg.Shards), Volume: w.req.Volume, Data: edge})
		switch {
		case known && lasts:
		case known && e.ID != w.id:
			return e.ID, false
		default:
			return 0, false
		}
	}
	_, proved = yes(take)
	return 0, proved
}

// waitsShard is the shard whose store knows who waits for whom in a volume.
func waitsShard(v sealfs.Volume, shards uint32) sealfs.Shard { return sealfs.Shard(uint32(v) % shards) }
