package txn_test

import (
	"errors"
	"slices"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
	"sealfs/txn"
)

const volume = 1

// medium is a region's device that forgets everything: the log is what lasts.
type medium []byte

func (m medium) ReadAt(p []byte, off int64) (int, error)  { return copy(p, m[off:]), nil }
func (m medium) WriteAt(p []byte, off int64) (int, error) { return copy(m[off:], p), nil }
func (m medium) Flush() error                             { return nil }
func (m medium) Size() int64                              { return int64(len(m)) }
func (m medium) Name() string                             { return "region" }

func newRegion() (*pmem.Region, error) {
	b := pmem.NewMemory(make(medium, 256<<10))
	if err := pmem.Format(b, pmem.Geometry{Store: sealfs.UUID{1}, TableBytes: pmem.PageSize}); err != nil {
		return nil, err
	}
	r, _, err := pmem.Open(b, pmem.Options{GrowBytes: 64 << 10})
	return r, err
}

// free is a Space that counts nothing: there is no data.
type free struct{}

func (free) Payload() sealfs.LSN                { return 1 << 20 }
func (free) Retain(sealfs.LSN, uint32) error    { return nil }
func (free) Release(sealfs.LSN, uint32) error   { return nil }
func (free) Charge(sealfs.Volume, int64, int64) {}

// server is a server with its one store. It outlives its processes.
type server struct {
	s        *sim
	id       int
	log      []record
	durable  int   // so many records are on the device
	promised int   // so many were said to be
	skew     int64 // of its clock
	lives    uint64
	proc     *proc // nil: it is down
}

type record struct {
	redo  []byte
	event *event
}

// proc is one life of a server: everything that it keeps in memory.
type proc struct {
	at   *server
	s    *sim
	life uint64
	dead bool

	region *pmem.Region
	cfg    meta.Config
	last   int64
	locks  txn.Locks
	calls  txn.Calls

	waiting []*waiter
	syncs   []waitSync
	syncing bool
	broken  []func() // ends of connections: told when the process dies

	active map[op.Tx]bool
	since  map[op.Tx]int64
	todo   []*txn.Decision
	twice  map[op.Tx][]*op.Request
}

// waiter is who waits for a transaction to be out of the way.
type waiter struct {
	done <-chan struct{}
	fn   func()
}

type waitSync struct {
	end int
	fn  func()
}

// crash ends a server's process, and with power takes what was not durable.
func (s *sim) crash(at *server, power bool) {
	p := at.proc
	if p == nil || !s.faulty() {
		return
	}
	p.dead, at.proc = true, nil
	kept := len(at.log)
	if power {
		kept = at.durable + s.rng.IntN(kept-at.durable+1)
	}
	s.logf("server %d dies, %d of %d records are left, %d were durable", at.id, kept, len(at.log), at.durable)
	if kept < at.promised {
		s.fail("server %d lost record %d, but had said that %d are durable", at.id, kept, at.promised)
	}
	var lost []*event
	for _, r := range at.log[kept:] {
		if r.event != nil {
			s.logf("lost: %s", describe(r.event.req))
			lost = append(lost, r.event)
		}
	}
	at.log = at.log[:kept]
	if len(lost) > 0 {
		s.forget(lost)
	}
	for _, broken := range p.broken {
		broken()
	}
	away := s.between(milli, 200*milli)
	if s.chance(0.1) {
		away = s.between(milli, 2*sec)
	}
	s.after(away, nil, at.start)
}

// start recovers the store and begins to answer.
func (at *server) start() {
	s := at.s
	at.lives++
	at.durable = len(at.log)
	p := &proc{at: at, s: s, life: at.lives, active: map[op.Tx]bool{}, since: map[op.Tx]int64{}, twice: map[op.Tx][]*op.Request{}}
	p.cfg = meta.Config{Shards: s.shards, Local: p.local, Guard: p.guard}
	var err error
	if p.region, err = newRegion(); err != nil {
		s.fail("region: %v", err)
		return
	}
	for _, r := range at.log {
		if err := p.region.ApplyRedo(r.redo); err != nil {
			s.fail("redo: %v", err)
			return
		}
	}
	at.proc = p
	s.logf("server %d starts, life %d, %d records", at.id, p.life, len(at.log))
	if err := p.loadShards(); err != nil {
		s.fail("start: %v", err)
		return
	}
	p.watch()
	p.finishLater()
}

func (p *proc) local(shard sealfs.Shard) bool { return p.s.home(shard) == p.at }

// guard is Locks.Guard, but for sabotage.
func (p *proc) guard(tx op.Tx, t meta.Touch) error {
	switch {
	case p.s.bad.noNameLocks && t.Kind == meta.TouchName,
		p.s.bad.noEmptyLocks && t.Kind == meta.TouchEmpty,
		p.s.bad.noLinkLocks && t.Kind == meta.TouchLinks:
		return nil
	}
	return p.locks.Guard(tx, t)
}

// clock returns the time of a change.
func (p *proc) clock() int64 {
	p.last = max(p.s.now+p.at.skew, p.last+1)
	return p.last
}

// errRefused says that an update was refused: the reply says why.
var errRefused = errors.New("refused")

// update executes a change at one moment, as lsfs.Store.Update does, and
// returns where the log ends then. before, if any,
// is called at that moment.
func (p *proc) update(req *op.Request, rep *op.Reply, before func()) (end int, err error) {
	s := p.s
	end = len(p.at.log)
	if p.region.NeedsGrowth() {
		if err := p.region.Grow(); err != nil {
			return end, err
		}
	}
	numbered := req.Session != 0
	if numbered {
		k := meta.SessionKey(req.Shard, req.Session, req.Seq)
		if _, err := pmem.Get(p.region, k[:]); err == nil {
			numbered, before = false, nil // it will be answered from this row
		}
	}
	if before != nil {
		before()
	}
	was, err := meta.ShardInfo(p.region, req.Shard)
	if err != nil {
		return end, err
	}
	var parts []*op.Request
	if s.bad.commitTwice && req.Type == op.Commit {
		if err := meta.Prepared(p.region, req.Shard, func(part *op.Request) {
			if part.Tx == req.Tx {
				parts = append(parts, part)
			}
		}); err != nil {
			return end, err
		}
	}
	tx := p.region.Begin()
	if err := meta.Apply(tx, free{}, p.cfg, req, rep); err != nil || rep.Code != 0 {
		tx.Reset()
		if err == nil {
			err = errRefused
		}
		return end, err
	}
	redo := tx.AppendRedo(nil)
	tx.Commit()
	now, err := meta.ShardInfo(p.region, req.Shard)
	if err != nil {
		return end, err
	}
	r := record{redo: redo}
	s.logf("server %d executes %s: inode %d", p.at.id, describe(req), rep.Attr.Ino)
	if numbered && now.Seq != was.Seq {
		kept := *req
		r.event = s.happened(p.at, &kept, rep.Attr.Ino)
	}
	p.at.log = append(p.at.log, r)
	end = len(p.at.log)
	switch req.Type {
	case op.Prepare:
		part := *req
		p.locks.Add(&part)
	case op.Commit, op.Abort:
		gone := p.locks.Drop(req.Tx, req.Shard)
		gone.Tell()
		p.wake()
		if parts != nil {
			p.twice[req.Tx] = append(p.twice[req.Tx], parts...)
		}
	}
	return end, nil
}

// wake has those go on whose transaction is out of the way.
func (p *proc) wake() {
	p.waiting = slices.DeleteFunc(p.waiting, func(w *waiter) bool {
		select {
		case <-w.done:
			p.s.after(p.s.between(0, 100*micro), p, w.fn)
			return true
		default:
			return false
		}
	})
}

// sync calls fn when all records up to end are durable: group commit.
func (p *proc) sync(end int, fn func()) {
	if end <= p.at.durable {
		fn()
		return
	}
	p.syncs = append(p.syncs, waitSync{end, fn})
	p.flush()
}

func (p *proc) flush() {
	if p.syncing || len(p.syncs) == 0 {
		return
	}
	p.syncing = true
	target, limit := len(p.at.log), 2*milli
	if p.s.faulty() && p.s.chance(0.05) {
		limit = 300 * milli
	}
	p.s.after(p.s.between(50*micro, limit), p, func() {
		p.syncing = false
		p.at.durable = max(p.at.durable, target)
		var ready []waitSync
		p.syncs = slices.DeleteFunc(p.syncs, func(w waitSync) bool {
			if w.end <= p.at.durable {
				ready = append(ready, w)
				return true
			}
			return false
		})
		for _, w := range ready {
			w.fn()
		}
		p.flush()
	})
}

// promise notes that somebody was told that the records up to end are durable.
func (p *proc) promise(end int) { p.at.promised = max(p.at.promised, end) }
