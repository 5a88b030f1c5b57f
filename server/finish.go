package server

import (
	"bytes"
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"sealfs"
	"sealfs/internal/turn"
	"sealfs/op"
	"sealfs/txn"
)

// finishTimeout bounds one request of the finisher.
const finishTimeout = 5 * time.Second

// finisher tells parties of decisions that they have not heard of, makes sure
// that all have them durably, and forgets them.
type finisher struct {
	mu   sync.Mutex
	todo map[*store][]*txn.Decision
	ctx  context.Context
	end  context.CancelFunc
	done sync.WaitGroup
	quit bool
}

func (f *finisher) add(st *store, d *txn.Decision) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.quit {
		return // the row stays, and the next start finds it
	}
	if f.todo == nil {
		f.todo = map[*store][]*txn.Decision{}
		f.ctx, f.end = context.WithCancel(context.Background())
		f.done.Go(func() { f.run(st.srv.pace.finish, st.srv.o.Turns.Lane(turnFinisher)) })
	}
	f.todo[st] = append(f.todo[st], d)
}

func (f *finisher) stop() {
	f.mu.Lock()
	f.quit = true
	end := f.end
	f.mu.Unlock()
	if end != nil {
		end()
		f.done.Wait()
	}
}

func (f *finisher) run(every time.Duration, lane turn.Lane) {
	lane.Take()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-f.ctx.Done():
			return
		case <-tick.C:
		}
		lane.Take()
		f.mu.Lock()
		work := f.todo
		f.todo = make(map[*store][]*txn.Decision, len(work))
		f.mu.Unlock()
		for _, st := range slices.SortedFunc(maps.Keys(work), byID) {
			left := f.finish(st, work[st])
			f.mu.Lock()
			f.todo[st] = append(left, f.todo[st]...)
			f.mu.Unlock()
		}
	}
}

// byID orders stores.
func byID(a, b *store) int {
	x, y := a.ID(), b.ID()
	return bytes.Compare(x[:], y[:])
}

// finish does what can be done for the decisions of a store, and returns those that are left.
// A store that does not answer holds up what waits for it, and nothing else.
func (f *finisher) finish(st *store, list []*txn.Decision) (left []*txn.Decision) {
	type commit struct {
		d     *txn.Decision
		shard sealfs.Shard
		life  uint64
	}
	commits := map[int][]*commit{} // by the store that is told
	for _, d := range list {
		for _, s := range d.Open() {
			at := st.srv.primary(s)
			commits[at] = append(commits[at], &commit{d: d, shard: s})
		}
	}
	eachStore(st.srv.o.Turns, commits, func(c *commit) (answered bool) {
		c.life, answered = f.ask(st, op.Request{Type: op.Commit, Shard: c.shard, Coord: c.d.Coord, Tx: c.d.Tx, Mtime: c.d.Time})
		return answered
	})
	for _, some := range commits {
		for _, c := range some {
			if c.life != 0 {
				c.d.Committed(c.shard, c.life)
			}
		}
	}

	// One Sync makes durable what a store has committed for all of them.
	type durable struct {
		shard sealfs.Shard
		life  uint64
	}
	syncs := map[int][]*durable{}
	for _, d := range list {
		for _, s := range d.Lazy() {
			if at := st.srv.primary(s); at >= 0 && syncs[at] == nil {
				syncs[at] = []*durable{{shard: s}}
			}
		}
	}
	eachStore(st.srv.o.Turns, syncs, func(y *durable) (answered bool) {
		y.life, answered = f.ask(st, op.Request{Type: op.Sync, Shard: y.shard})
		return answered
	})
	for _, d := range list {
		for _, s := range d.Lazy() {
			if y := syncs[st.srv.primary(s)]; y != nil && y[0].life != 0 {
				d.Synced(s, y[0].life)
			}
		}
		req := op.Request{Type: op.Forget, Shard: d.Coord, Coord: d.Coord, Tx: d.Tx}
		var rep op.Reply
		if !d.Done() || st.change(&req, &rep, nil) != nil || rep.Code != 0 {
			left = append(left, d)
		}
	}
	return left
}

// ask sends a request and returns which incarnation of the store has done it, 0
// if it has not, and whether there was an answer at all.
func (f *finisher) ask(st *store, req op.Request) (life uint64, answered bool) {
	ctx, stop := context.WithTimeout(f.ctx, finishTimeout)
	defer stop()
	var rep op.Reply
	switch err := st.srv.peers().Do(ctx, &req, &rep); {
	case err != nil:
		return 0, false
	case rep.Code != 0:
		return 0, true
	}
	return rep.Off, true
}

// eachStore calls ask for each of the requests to each store, for all stores at
// once, and for one store one after another until an answer stays away: the rest can wait for the next round.
func eachStore[T any](turns turn.Turns, requests map[int][]T, ask func(T) bool) {
	var all sync.WaitGroup
	mine := turns.Mine()
	for i, at := range slices.Sorted(maps.Keys(requests)) {
		all.Go(func() {
			mine.Child(i).Take()
			for _, r := range requests[at] {
				if !ask(r) {
					return
				}
			}
		})
	}
	all.Wait()
	mine.Take()
}
