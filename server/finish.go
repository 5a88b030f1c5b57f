package server

import (
	"context"
	"sync"
	"time"

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
		f.done.Go(func() { f.run(st.srv.pace.finish) })
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

func (f *finisher) run(every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-f.ctx.Done():
			return
		case <-tick.C:
		}
		f.mu.Lock()
		work := f.todo
		f.todo = make(map[*store][]*txn.Decision, len(work))
		f.mu.Unlock()
		for st, list := range work {
			left := f.finish(st, list)
			f.mu.Lock()
			f.todo[st] = append(left, f.todo[st]...)
			f.mu.Unlock()
		}
	}
}

// finish does what can be done for the decisions of a store, and returns those that are left.
func (f *finisher) finish(st *store, list []*txn.Decision) (left []*txn.Decision) {
	lives := map[int]uint64{} // of the stores that were asked for durability in this round
	for _, d := range list {
		for _, s := range d.Open() {
			if life := f.ask(st, op.Request{Type: op.Commit, Shard: s, Coord: d.Coord, Tx: d.Tx, Mtime: d.Time}); life != 0 {
				d.Committed(s, life)
			}
		}
	}
	for _, d := range list {
		for _, s := range d.Lazy() {
			at := st.srv.primary(s)
			life, asked := lives[at]
			if !asked || at < 0 {
				life = f.ask(st, op.Request{Type: op.Sync, Shard: s})
				lives[at] = life
			}
			if life != 0 {
				d.Synced(s, life)
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

// ask sends a request and returns which incarnation of the store has done it, 0 for none.
func (f *finisher) ask(st *store, req op.Request) uint64 {
	ctx, stop := context.WithTimeout(f.ctx, finishTimeout)
	defer stop()
	var rep op.Reply
	if st.srv.peers().Do(ctx, &req, &rep) != nil || rep.Code != 0 {
		return 0
	}
	return rep.Off
}
