package server

import (
	"context"
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
	// in is the incarnation of its store in which a party has committed. Only the
	// same one can make that durable: one that came after a power cut may have lost it.
	in map[sealfs.Shard]uint64
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
	synced := map[sealfs.Shard]uint64{} // by which incarnation, in this round
	for _, d := range list {
		for _, s := range d.parties {
			if d.in[s] == 0 {
				d.in[s] = f.ask(st, op.Request{Type: op.Commit, Shard: s, Coord: d.coord, Tx: d.tx, Mtime: d.time})
			}
			synced[s] = 0
		}
	}
	byStore := map[int]uint64{} // the shards of a store are asked for at once
	for s := range synced {
		at := st.srv.primary(s)
		incarnation, asked := byStore[at]
		if !asked || at < 0 {
			incarnation = f.ask(st, op.Request{Type: op.Sync, Shard: s})
			byStore[at] = incarnation
		}
		synced[s] = incarnation
	}
	for _, d := range list {
		done := true
		for _, s := range d.parties {
			if d.in[s] == 0 || synced[s] != d.in[s] {
				done = false
				if synced[s] != 0 {
					d.in[s] = 0 // it must hear of it again
				}
			}
		}
		req := op.Request{Type: op.Forget, Shard: d.coord, Coord: d.coord, Tx: d.tx}
		var rep op.Reply
		if !done || st.change(&req, &rep, nil) != nil || rep.Code != 0 {
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
