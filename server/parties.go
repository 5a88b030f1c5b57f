package server

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
	"sealfs/txn"
)

const (
	// resolveTimeout bounds one question.
	resolveTimeout = 2 * time.Second
	// longDoubt is when a transaction that is still under way is worth a warning.
	longDoubt = 30 * time.Second
)

// pace says how patient a server is.
type pace struct {
	doubt time.Duration // how long a party waits to hear of a transaction before it asks
	// attributes is how long a question for attributes waits for a transaction that
	// has them in hand.
	attributes time.Duration
	hurry      time.Duration // how long it waits before the coordinator is asked for its sake
	finish     time.Duration // how long committed transactions are gathered before they are made durable and forgotten
	stalled    time.Duration // for how long a device may be silent before the status says so
	search     time.Duration // how long somebody waits for a lock before a deadlock is looked for
	tell       time.Duration // how long changed totals wait to be passed on
	recheck    time.Duration // how often it is looked for again
	plea       time.Duration // how long a change beyond a limit waits for a store that may have something to give back
}

var usualPace = pace{doubt: time.Second, finish: time.Second, tell: 100 * time.Millisecond, attributes: 2 * time.Second, hurry: time.Second / 2, stalled: 5 * time.Second, search: 50 * time.Millisecond, recheck: 10 * time.Second, plea: 5 * time.Second}

// parties are the transactions in which a store is a party: what they hold, and
// a goroutine that asks for the fate of those that nobody comes back for.
type parties struct {
	st    *store
	locks txn.Locks
	mu    sync.Mutex
	since map[op.Tx]time.Time // when it was prepared, or last asked for
	asked map[op.Tx]struct{}  // by hurry, now
	ctx   context.Context
	end   context.CancelFunc
	done  sync.WaitGroup
}

// noted says that tx was prepared just now.
func (p *parties) noted(tx op.Tx) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.since == nil {
		p.since = map[op.Tx]time.Time{}
	}
	p.since[tx] = time.Now()
}

func (p *parties) start(st *store) {
	p.st = st
	p.ctx, p.end = context.WithCancel(context.Background())
	p.done.Go(p.run)
}

func (p *parties) stop() {
	if p.end != nil {
		p.end()
		p.done.Wait()
	}
}

func (p *parties) run() {
	lane := p.st.turns().Lane(turnParties)
	lane.Take()
	tick := time.NewTicker(p.st.srv.pace.doubt / 4)
	defer tick.Stop()
	for {
		asks := map[int][]doubt{}
		for _, d := range p.doubtful() {
			at := p.st.srv.primary(d.coord)
			asks[at] = append(asks[at], d)
		}
		eachStore(p.st.turns(), asks, p.resolve)
		select {
		case <-p.ctx.Done():
			return
		case <-tick.C:
		}
		lane.Take()
	}
}

// doubt is a transaction that nobody has come back for.
type doubt struct {
	tx    op.Tx
	coord sealfs.Shard
	in    []sealfs.Shard
}

// age is how long ago the operation began, for messages.
func (d *doubt) age() string {
	return time.Since(time.Unix(0, d.tx.Age)).Round(time.Second).String()
}

func (p *parties) doubtful() []doubt {
	if p.locks.Empty() {
		p.mu.Lock()
		clear(p.since)
		p.mu.Unlock()
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []doubt
	left := make(map[op.Tx]time.Time, len(p.since))
	p.locks.Each(func(tx op.Tx, coord sealfs.Shard, in []sealfs.Shard) {
		at := p.since[tx]
		if time.Since(at) >= p.st.srv.pace.doubt {
			list = append(list, doubt{tx, coord, in})
			at = time.Now()
		}
		left[tx] = at
	})
	p.since = left
	slices.SortFunc(list, func(a, b doubt) int { // each store's in the order of age
		return cmp.Or(cmp.Compare(a.tx.Age, b.tx.Age), cmp.Compare(a.tx.Nonce, b.tx.Nonce))
	})
	return list
}

// resolve asks the coordinator, and does what it says. It reports whether the coordinator answered.
func (p *parties) resolve(d doubt) bool {
	rep, err := p.ask(d)
	switch {
	case err != nil || rep.Code != 0:
		p.st.srv.log.Warn("a transaction is in doubt: its coordinator does not answer", "shard", d.coord, "age", d.age(), "err", err, "code", rep.Code)
	case rep.Off == op.FatePending && time.Since(time.Unix(0, d.tx.Age)) > longDoubt:
		p.st.srv.log.Warn("a transaction is in doubt for long: its coordinator is still at it", "shard", d.coord, "age", d.age())
	}
	return err == nil
}

// hurry asks for the fate of tx now, in the background, for somebody who has waited
// for it so long that its Commit may be lost. One question at a time is enough.
func (p *parties) hurry(tx op.Tx) {
	coord, in := p.locks.Where(tx)
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, busy := p.asked[tx]; busy || len(in) == 0 {
		return
	}
	if p.asked == nil {
		p.asked = map[op.Tx]struct{}{}
	}
	p.asked[tx] = struct{}{}
	// A request is under way, so nobody waits for p's end yet.
	p.done.Go(func() {
		p.st.turns().Lane(turnHurry).Take()
		p.ask(doubt{tx, coord, in}) // who does not answer is told of by resolve
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.asked, tx)
	})
}

// ask asks the coordinator of d, does what it says and returns its answer.
func (p *parties) ask(d doubt) (fate op.Reply, err error) {
	ctx, stop := context.WithTimeout(p.ctx, resolveTimeout)
	defer stop()
	req := op.Request{Type: op.Resolve, Shard: d.coord, Coord: d.coord, Tx: d.tx}
	if err := p.st.srv.peers().Do(ctx, &req, &fate); err != nil || fate.Code != 0 || fate.Off == op.FatePending {
		return fate, err
	}
	t := op.Abort
	if fate.Off == op.FateCommitted {
		t = op.Commit
	}
	for _, shard := range d.in {
		req := op.Request{Type: t, Shard: shard, Coord: d.coord, Tx: d.tx, Mtime: fate.Attr.Mtime}
		var rep op.Reply
		if err := p.st.change(&req, &rep, nil); err != nil || rep.Code != 0 {
			p.st.srv.log.Error("a transaction is not brought to its end", "outcome", t.String(), "shard", shard, "code", rep.Code, "err", err)
		}
	}
	return fate, nil
}

// loadShards rebuilds from the region what is prepared, what is decided and not
// yet forgotten, and the time of the last change.
func (st *store) loadShards(r pmem.Reader) error {
	var last int64
	for s := range st.srv.cfg.Shards {
		shard := sealfs.Shard(s)
		info, err := meta.ShardInfo(r, shard)
		if err != nil {
			return err
		}
		last = max(last, info.Time)
		if err := meta.Locks(r, shard, st.lockCounts.found); err != nil {
			return err
		}
		if err := st.loadSplits(r, shard); err != nil {
			return err
		}
		err = meta.Prepared(r, shard, func(part *op.Request) { st.parties.locks.Add(part) })
		if err != nil {
			return err
		}
		err = meta.Decisions(r, shard, func(tx op.Tx, d meta.Decision) {
			st.unfinished = append(st.unfinished, txn.Decide(shard, tx, d.Time, d.Parties))
		})
		if err != nil {
			return err
		}
	}
	st.last.Store(last)
	return nil
}
