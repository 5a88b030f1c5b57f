package server

import (
	"context"
	"slices"
	"sync"
	"time"

	"sealfs"
	"sealfs/op"
)

// finishTimeout bounds one request of the finisher.
const finishTimeout = 5 * time.Second

// decision is a transaction that this server has decided and must not forget
// until every party has committed it durably.
type decision struct {
	coord   sealfs.Shard
	tx      op.Tx
	time    int64
	parties []sealfs.Shard
	open    []sealfs.Shard // those that have not said that they have committed
}

// finisher tells parties of decisions that they have not heard of, makes sure
// that all have them durably, and forgets them.
type finisher struct {
	mu   sync.Mutex
	todo map[*store][]decision
	ctx  context.Context
	end  context.CancelFunc
	done sync.WaitGroup
	quit bool
}

func (f *finisher) add(st *store, d decision) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.quit {
		return // the row stays, and the next start finds it
	}
	if f.todo == nil {
		f.todo = map[*store][]decision{}
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
		f.todo = make(map[*store][]decision, len(work))
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
func (f *finisher) finish(st *store, list []decision) (left []decision) {
	synced := map[sealfs.Shard]bool{} // asked in this round, and the answer
	for _, d := range list {
		d.open = slices.DeleteFunc(slices.Clone(d.open), func(s sealfs.Shard) bool {
			return f.ask(st, op.Request{Type: op.Commit, Shard: s, Coord: d.coord, Tx: d.tx, Mtime: d.time})
		})
		if len(d.open) > 0 {
			left = append(left, d)
			continue
		}
		for _, s := range d.parties {
			if _, asked := synced[s]; !asked {
				synced[s] = false
			}
		}
	}
	for s := range synced {
		synced[s] = f.ask(st, op.Request{Type: op.Sync, Shard: s})
	}
	for _, d := range list {
		if slices.ContainsFunc(left, func(o decision) bool { return o.tx == d.tx }) {
			continue
		}
		if slices.ContainsFunc(d.parties, func(s sealfs.Shard) bool { return !synced[s] }) {
			d.open = nil
			left = append(left, d)
			continue
		}
		req := op.Request{Type: op.Forget, Shard: d.coord, Coord: d.coord, Tx: d.tx}
		var rep op.Reply
		if err := st.change(&req, &rep, nil); err != nil || rep.Code != 0 {
			left = append(left, d)
		}
	}
	return left
}

// ask reports whether a request was done.
func (f *finisher) ask(st *store, req op.Request) bool {
	ctx, stop := context.WithTimeout(f.ctx, finishTimeout)
	defer stop()
	var rep op.Reply
	return st.srv.peers().Do(ctx, &req, &rep) == nil && rep.Code == 0
}
