package txn_test

import (
	"cmp"
	"errors"
	"slices"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/txn"
)

// This file does what package server does with transactions, in the same steps
// and under the same names, but for goroutines, which are callbacks here, and with
// less patience.

const (
	prepareTimeout = 2 * sec
	commitTimeout  = 300 * milli
	abortTimeout   = 200 * milli
	doubtAfter     = 200 * milli
	resolveTimeout = 300 * milli
	finishTimeout  = sec
)

var errDie = errors.New("an older transaction is in the way")

// serve answers a request.
func (p *proc) serve(c *scope, req *op.Request, done func(*op.Reply, error)) {
	rep := new(op.Reply)
	end := func(err error) { done(rep, err) }
	switch req.Type {
	case op.Sync:
		at := len(p.at.log)
		p.sync(at, func() {
			p.promise(at)
			rep.Off = p.life
			end(nil)
		})
		return
	case op.Prepare:
		p.prepare(c, req, rep, end)
		return
	case op.Resolve:
		if p.active[req.Tx] && !p.s.bad.resolveAborted {
			rep.Off = op.FatePending
			end(nil)
			return
		}
	case op.Commit, op.Abort, op.Forget:
		p.execute(c, req, rep, nil, func(_ int, err error) {
			p.settleTwice(req)
			if err == nil && rep.Code == 0 {
				rep.Off = p.life
			}
			p.s.point(p)
			end(err)
		})
		return
	}
	if !req.Type.Changes() {
		p.query(c, req, rep, end)
		return
	}
	if req.Seq == 0 || p.s.bad.retriesOverlap {
		p.changeWithin(c, req, rep, end)
		return
	}
	p.once(c, req, rep, end)
}

// once keeps apart the requests for the same change.
func (p *proc) once(c *scope, req *op.Request, rep *op.Reply, end func(error)) {
	call, first, err := p.calls.Enter(req.Session, req.Seq, req.Low)
	switch {
	case err != nil:
		rep.Code = sealfs.ErrStale
		end(nil)
	case first:
		p.changeWithin(c, req, rep, func(err error) {
			code := rep.Code
			if err != nil {
				code = 0
			}
			p.calls.Leave(req.Session, req.Seq, call, code)
			p.wake()
			end(err)
		})
	default:
		p.waitFor(c, call.Done, func(err error) {
			if err == nil && call.Code == 0 {
				p.once(c, req, rep, end)
				return
			}
			if err == nil {
				rep.Reset()
				rep.Code = call.Code
			}
			end(err)
		})
	}
}

// waitFor calls fn when done is closed, or c ends.
func (p *proc) waitFor(c *scope, done <-chan struct{}, fn func(error)) {
	called := false
	once := func(err error) {
		if !called {
			called = true
			fn(err)
		}
	}
	w := &waiter{done, func() { once(nil) }}
	p.waiting = append(p.waiting, w)
	c.onEnd(func() {
		p.waiting = slices.DeleteFunc(p.waiting, func(o *waiter) bool { return o == w })
		p.s.after(0, p, func() { once(sealfs.ErrInterrupted) })
	})
	if c.ended {
		p.s.after(0, p, func() { once(sealfs.ErrInterrupted) })
	}
	p.wake()
}

func (p *proc) changeWithin(c *scope, req *op.Request, rep *op.Reply, done func(error)) {
	p.execute(c, req, rep, nil, func(_ int, err error) {
		if _, foreign := err.(*meta.Foreign); foreign {
			p.transact(c, req, rep, done)
			return
		}
		done(err)
	})
}

// execute executes a change. It waits for transactions that are in its way,
// unless it must die: then it answers ErrDeadlock.
func (p *proc) execute(c *scope, req *op.Request, rep *op.Reply, before func(), done func(end int, err error)) {
	req.Time = p.clock()
	var try func()
	try = func() {
		end, err := p.update(req, rep, before)
		if err == nil || err == errRefused {
			done(end, nil)
			return
		}
		p.await(c, err, req.Tx, func(err error) {
			switch err {
			case nil:
				try()
			case errDie:
				rep.Reset()
				rep.Code = sealfs.ErrDeadlock
				done(end, nil)
			default:
				done(end, err)
			}
		})
	}
	try()
}

func (p *proc) await(c *scope, err error, tx op.Tx, done func(error)) {
	blocked, ok := err.(*txn.Blocked)
	if !ok {
		done(err)
		return
	}
	if blocked.Dies(tx) && !p.s.bad.noWaitDie {
		done(errDie)
		return
	}
	p.waitFor(c, blocked.Done, done)
}

// query answers a question.
func (p *proc) query(c *scope, req *op.Request, rep *op.Reply, done func(error)) {
	cfg := p.cfg
	switch {
	case p.s.bad.questionsPass && req.Type != op.Ancestors:
		cfg.Guard = p.locks.Now()
	case p.s.bad.dirsUnlocked:
		cfg.Guard = func(tx op.Tx, t meta.Touch) error {
			if t.Kind == meta.TouchEmpty {
				return nil
			}
			return p.guard(tx, t)
		}
	}
	p.queryAt(c, cfg, req, rep, done)
}

func (p *proc) queryAt(c *scope, cfg meta.Config, req *op.Request, rep *op.Reply, done func(error)) {
	err := meta.Query(p.region, cfg, req, rep)
	if err == nil {
		if req.Type == op.Resolve && rep.Off == op.FateAborted && p.s.bad.presumedCommit {
			rep.Off = op.FateCommitted
		}
		done(nil)
		return
	}
	tx := req.Tx
	if p.s.bad.walkWaits {
		tx = op.Tx{}
	}
	p.await(c, err, tx, func(err error) {
		switch err {
		case nil:
			p.queryAt(c, cfg, req, rep, done)
		case errDie:
			rep.Reset()
			rep.Code = sealfs.ErrDeadlock
			done(nil)
		default:
			done(err)
		}
	})
}

// transact executes an operation whose parties lie on several stores.
func (p *proc) transact(c *scope, req *op.Request, rep *op.Reply, done func(error)) {
	age, wait := p.clock(), milli
	var try, again func()
	try = func() {
		rep.Reset()
		p.attempt(c, op.Tx{Age: age, Nonce: p.s.rng.Uint64()}, req, rep, func(more bool, err error) {
			if err != nil || !more {
				done(err)
				return
			}
			delay := p.s.between(wait/2, wait+wait/2)
			wait = min(2*wait, 100*milli)
			p.s.after(delay, p, again)
		})
	}
	again = func() {
		if c.ended {
			done(sealfs.ErrInterrupted)
			return
		}
		if p.s.bad.stuckLocal {
			try()
			return
		}
		// It may have become a plain change meanwhile, or be refused.
		p.execute(c, req, rep, nil, func(_ int, err error) {
			if _, foreign := err.(*meta.Foreign); foreign {
				try()
				return
			}
			done(err)
		})
	}
	try()
}

func (p *proc) attempt(c *scope, tx op.Tx, req *op.Request, rep *op.Reply, done func(again bool, err error)) {
	p.plan(c, req, meta.Target{}, func(plan meta.Plan, target meta.Target, err error) {
		var code sealfs.Code
		switch {
		case errors.As(err, &code) && code != sealfs.ErrUnavailable && code != sealfs.ErrInterrupted:
			rep.Code = code
			done(false, nil)
			return
		case err != nil:
			done(false, err)
			return
		case plan.Same != 0:
			rep.Attr.Ino = plan.Same
			done(false, nil)
			return
		case len(plan.Parts) == 0:
			done(true, nil) // it is not foreign any more
			return
		}
		co := txn.Begin(tx, req.Shard, slices.Clone(plan.Parts))
		p.active[tx] = true
		p.collect(c, co, func() {
			p.walks(c, co, plan.Walks, func() {
				p.decide(c, co, plan, target, req, rep, func(at int64, err error) {
					holds := func() bool {
						now, err := p.makePlan(req, target)
						return p.s.bad.refuseBlind || err == nil && now.Equal(&plan)
					}
					p.conclude(c, co, at, holds, rep, err, done)
				})
			})
		})
	})
}

// conclude tells the parties; at is when a decision was made. holds reports
// whether the plan would be the same now: if not, it is to blame for a refusal.
func (p *proc) conclude(c *scope, co *txn.Coordinator, at int64, holds func() bool, rep *op.Reply, err error, done func(again bool, err error)) {
	if err != nil {
		done(false, err)
		return
	}
	p.s.point(p)
	delete(p.active, co.Tx())
	p.s.settled[co.Tx()] = true
	if co.State() == txn.Aborted {
		stale := !holds()
		p.announce(co, op.Abort, 0, abortTimeout, func(map[sealfs.Shard]uint64) {
			switch code := co.Code(); {
			case code == 0:
				done(false, nil)
			case stale, code == sealfs.ErrDeadlock, code == sealfs.ErrStale, code == sealfs.ErrAgain:
				done(true, nil)
			default:
				rep.Reset()
				rep.Code = code
				var err error
				if c.ended {
					err = sealfs.ErrInterrupted
				}
				done(false, err)
			}
		})
		return
	}
	p.announce(co, op.Commit, at, commitTimeout, func(lives map[sealfs.Shard]uint64) {
		d := txn.Decide(co.Parts()[0].Coord, co.Tx(), at, co.Parties())
		for _, s := range co.Parties() {
			if life, ok := lives[s]; ok {
				d.Committed(s, life)
			}
		}
		p.todo = append(p.todo, d)
		done(false, nil)
	})
}

// plan says what parts other stores have in the operation. It holds nothing, so
// it waits for whatever transaction is in the way. before is the target of the
// last try.
func (p *proc) plan(c *scope, req *op.Request, before meta.Target, done func(meta.Plan, meta.Target, error)) {
	p.target(c, req, func(target meta.Target, err error) {
		if err != nil {
			done(meta.Plan{}, meta.Target{}, err)
			return
		}
		plan, err := p.makePlan(req, target)
		if err == nil {
			done(plan, target, nil)
			return
		}
		if (err == sealfs.ErrIsDir || err == sealfs.ErrNotDir) && before != target && !p.s.bad.refuseBlind {
			// Source and target were looked at one after the other: look again.
			p.plan(c, req, target, done)
			return
		}
		p.await(c, err, op.Tx{}, func(err error) {
			if err != nil {
				done(meta.Plan{}, meta.Target{}, err)
				return
			}
			p.plan(c, req, meta.Target{}, done)
		})
	})
}

// target asks what the new name of a Rename stands for, if its directory lies elsewhere.
func (p *proc) target(c *scope, req *op.Request, done func(meta.Target, error)) {
	if req.Type != op.Rename || p.local(req.Dir2.Home(p.s.shards)) {
		done(meta.Target{}, nil)
		return
	}
	look := op.Request{Type: op.Lookup, Dir: req.Dir2, Name: req.Name2, Shard: req.Dir2.Home(p.s.shards), Volume: req.Volume}
	p.s.send(p.at.id, p, c, &look, func(found *op.Reply, err error) {
		if err == nil && found.Code != 0 && found.Code != sealfs.ErrNotExist {
			err = found.Code
		}
		if err != nil {
			done(meta.Target{}, err)
			return
		}
		done(meta.Target{Ino: found.Attr.Ino, Type: uint8(found.Attr.Mode >> 12)}, nil)
	})
}

func (p *proc) makePlan(req *op.Request, target meta.Target) (meta.Plan, error) {
	cfg := p.cfg
	if p.s.bad.planBlind {
		cfg.Guard = nil
	}
	plan, err := meta.MakePlan(p.region, cfg, req, target, func(sealfs.Volume) sealfs.Ino { return p.s.root })
	if p.s.bad.sameBlind && plan.Ino == plan.Src && plan.Ino != 0 {
		plan = meta.Plan{Same: plan.Src}
	}
	if p.s.bad.noVolumeLock {
		plan.Parts = slices.DeleteFunc(plan.Parts, func(part op.Request) bool { return part.Part == op.PartVolume })
	}
	if p.s.bad.noWalk {
		plan.Walks = nil
	}
	return plan, err
}

// collect sends the Prepares and gathers the votes.
func (p *proc) collect(outer *scope, co *txn.Coordinator, done func()) {
	c := p.s.within(outer, prepareTimeout, p)
	parts := co.Parts()
	codes, votes, left := make([]sealfs.Code, len(parts)), make([]op.Attr, len(parts)), len(parts)
	for i := range parts {
		part := parts[i]
		p.s.send(p.at.id, p, c, &part, func(rep *op.Reply, err error) {
			if codes[i] = codeOf(rep, err); err == nil {
				votes[i] = rep.Attr
			}
			if left--; left > 0 {
				return
			}
			for i := range parts {
				if codes[i] == sealfs.ErrInterrupted && !outer.ended {
					codes[i] = sealfs.ErrDeadlock // it took too long: let others go first
				}
				co.Voted(i, codes[i], votes[i])
			}
			p.s.point(p)
			done()
		})
	}
}

func codeOf(rep *op.Reply, err error) sealfs.Code {
	switch err {
	case nil:
		return rep.Code
	case sealfs.ErrInterrupted:
		return sealfs.ErrInterrupted
	}
	return sealfs.ErrUnavailable
}

// walks makes all walks, and aborts if one forbids the operation.
func (p *proc) walks(c *scope, co *txn.Coordinator, list []meta.Walk, done func()) {
	if co.State() != txn.Ready || len(list) == 0 {
		done()
		return
	}
	p.walk(c, co.Tx(), list[0].From, list[0].Not, 0, func(code sealfs.Code) {
		if code != 0 {
			co.Abort(code)
		}
		p.walks(c, co, list[1:], done)
	})
}

func (p *proc) walk(c *scope, tx op.Tx, at, not sealfs.Ino, steps int, done func(sealfs.Code)) {
	if at == not {
		done(sealfs.ErrInvalid)
		return
	}
	req := op.Request{Type: op.Ancestors, Ino: at, Shard: at.Home(p.s.shards), Tx: tx}
	p.s.send(p.at.id, p, c, &req, func(rep *op.Reply, err error) {
		code := codeOf(rep, err)
		switch {
		case code == sealfs.ErrNotExist:
			done(sealfs.ErrStale)
		case code != 0:
			done(code)
		case slices.ContainsFunc(rep.Entries, func(e op.Dirent) bool { return e.Ino == not }):
			done(sealfs.ErrInvalid)
		case steps > 100:
			p.s.fail("a walk from %d does not end", at)
		case rep.Off == 0:
			done(0)
		default:
			p.walk(c, tx, sealfs.Ino(rep.Off), not, steps+1, done)
		}
	})
}

// decide records the decision durably. An error leaves it open whether there is one.
func (p *proc) decide(c *scope, co *txn.Coordinator, plan meta.Plan, target meta.Target, req *op.Request, rep *op.Reply, done func(at int64, err error)) {
	if co.State() != txn.Ready {
		done(0, nil)
		return
	}
	d := *req
	d.Tx, d.Coord, d.Votes = co.Tx(), req.Shard, co.Votes()
	if req.Type == op.Rename {
		d.Off, d.Ino, d.Flags = uint64(plan.Src), plan.Ino, d.Flags|op.Walked
	}
	var before func()
	if p.s.bad.stalePlan {
		before = func() {
			if now, err := p.makePlan(req, target); err == nil && req.Type == op.Rename {
				d.Off, d.Ino = uint64(now.Src), now.Ino
			}
		}
	}
	p.execute(c, &d, rep, before, func(end int, err error) {
		if _, foreign := err.(*meta.Foreign); foreign {
			co.Abort(sealfs.ErrStale)
			done(d.Time, nil)
			return
		}
		if err != nil {
			co.Abort(0)
			delete(p.active, co.Tx())
			p.s.settled[co.Tx()] = true
			p.announce(co, op.Abort, 0, abortTimeout, func(map[sealfs.Shard]uint64) { done(0, err) })
			return
		}
		switch {
		case rep.Code == sealfs.ErrDeadlock || rep.Code == sealfs.ErrStale:
			co.Abort(rep.Code)
			done(d.Time, nil)
			return
		case rep.Code != 0 || !p.decided(req.Shard, co.Tx()):
			co.Abort(0)
			done(d.Time, nil)
			return
		}
		p.s.settled[co.Tx()] = true
		p.s.point(p)
		ready := func() {
			p.promise(end)
			co.Decided()
			done(d.Time, nil)
		}
		if p.s.bad.answerEarly {
			ready()
			return
		}
		p.sync(end, ready)
	})
}

func (p *proc) decided(coord sealfs.Shard, tx op.Tx) bool {
	req := op.Request{Type: op.Resolve, Shard: coord, Tx: tx}
	var rep op.Reply
	return meta.Query(p.region, p.cfg, &req, &rep) == nil && rep.Off == op.FateCommitted
}

// announce tells the parties of the outcome, waits no longer than limit, and
// says in which lives they have executed it.
func (p *proc) announce(co *txn.Coordinator, t op.Type, at, limit int64, done func(lives map[sealfs.Shard]uint64)) {
	c := p.s.within(nil, limit, p)
	open := slices.Clone(co.Open())
	left, lives := len(open), map[sealfs.Shard]uint64{}
	for _, shard := range open {
		req := op.Request{Type: t, Shard: shard, Coord: co.Parts()[0].Coord, Tx: co.Tx(), Mtime: at}
		p.s.send(p.at.id, p, c, &req, func(rep *op.Reply, err error) {
			if err == nil && rep.Code == 0 {
				co.Acknowledged(shard)
				lives[shard] = rep.Off
			}
			if left--; left == 0 {
				done(lives)
			}
		})
	}
}

// prepare answers Prepare: the vote is durable before it is given.
func (p *proc) prepare(c *scope, req *op.Request, rep *op.Reply, done func(error)) {
	p.execute(c, req, rep, nil, func(end int, err error) {
		if err != nil || rep.Code != 0 {
			done(err)
			return
		}
		p.since[req.Tx] = p.s.now
		p.s.point(p)
		if p.s.bad.voteEarly {
			done(nil)
			return
		}
		p.sync(end, func() { done(nil) })
	})
}

// watch asks for the fate of what nobody comes back for, again and again.
func (p *proc) watch() {
	var list []doubt
	left := make(map[op.Tx]int64, len(p.since))
	p.locks.Each(func(tx op.Tx, coord sealfs.Shard, in []sealfs.Shard) {
		at := p.since[tx]
		if p.s.now-at >= doubtAfter {
			list = append(list, doubt{tx, coord, in})
			at = p.s.now
		}
		left[tx] = at
	})
	p.since = left
	slices.SortFunc(list, func(a, b doubt) int {
		return cmp.Or(cmp.Compare(a.tx.Age, b.tx.Age), cmp.Compare(a.tx.Nonce, b.tx.Nonce))
	})
	p.resolve(list)
}

type doubt struct {
	tx    op.Tx
	coord sealfs.Shard
	in    []sealfs.Shard
}

// resolve asks the coordinators one after the other, and does what they say.
func (p *proc) resolve(list []doubt) {
	if len(list) == 0 {
		p.s.after(doubtAfter/4, p, p.watch)
		return
	}
	d := list[0]
	c := p.s.within(nil, resolveTimeout, p)
	req := op.Request{Type: op.Resolve, Shard: d.coord, Coord: d.coord, Tx: d.tx}
	p.s.send(p.at.id, p, c, &req, func(rep *op.Reply, err error) {
		if err == nil && rep.Code == 0 && rep.Off != op.FatePending {
			t := op.Abort
			if rep.Off == op.FateCommitted {
				t = op.Commit
			}
			for _, shard := range d.in {
				req := op.Request{Type: t, Shard: shard, Coord: d.coord, Tx: d.tx, Mtime: rep.Attr.Mtime}
				p.change(&req)
			}
			p.s.point(p)
		}
		p.resolve(list[1:])
	})
}

// change executes a change that nothing can be in the way of.
func (p *proc) change(req *op.Request) bool {
	req.Time = p.clock()
	rep := new(op.Reply)
	_, err := p.update(req, rep, nil)
	if err != nil && err != errRefused {
		p.s.fail("server %d: %s: %v", p.at.id, describe(req), err)
	}
	return err == nil
}

// settleTwice is the sabotage that executes a Commit anew when it comes again.
func (p *proc) settleTwice(req *op.Request) {
	if req.Type != op.Commit || len(p.twice[req.Tx]) == 0 {
		return
	}
	for _, part := range p.twice[req.Tx] {
		if again := *part; again.Shard == req.Shard && again.Part == op.PartLink {
			rep := new(op.Reply)
			again.Time = p.clock()
			if _, err := p.update(&again, rep, nil); err == nil {
				commit := *req
				commit.Time = p.clock()
				if _, err := p.update(&commit, rep, nil); err != nil {
					p.s.logf("second commit: %v", err)
				}
			}
		}
	}
	delete(p.twice, req.Tx)
}

// loadShards rebuilds what is prepared, and what is decided and not yet forgotten.
func (p *proc) loadShards() error {
	for n := range p.s.shards {
		shard := sealfs.Shard(n)
		info, err := meta.ShardInfo(p.region, shard)
		if err != nil {
			return err
		}
		p.last = max(p.last, info.Time)
		err = meta.Prepared(p.region, shard, func(part *op.Request) {
			if !p.s.bad.locksLost {
				p.locks.Add(part)
			}
		})
		if err != nil {
			return err
		}
		err = meta.Decisions(p.region, shard, func(tx op.Tx, d meta.Decision) {
			p.s.settled[tx] = true
			p.todo = append(p.todo, txn.Decide(shard, tx, d.Time, d.Parties))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// finishLater is the finisher: it gathers decisions for a while.
func (p *proc) finishLater() {
	p.s.after(p.s.finishDelay, p, func() {
		work := p.todo
		p.todo = nil
		p.finish(work)
	})
}

// finish does what can be done for the decisions: Commits first, then one Sync
// for each shard, then Forgets.
func (p *proc) finish(list []*txn.Decision) {
	bad := &p.s.bad
	p.commits(list, func() {
		var shards []sealfs.Shard
		for _, d := range list {
			if len(d.Open()) == 0 {
				shards = append(shards, d.Lazy()...)
			}
		}
		slices.Sort(shards)
		p.makeDurable(list, slices.Compact(shards), func() {
			for _, d := range list {
				if d.Done() || bad.forgetUnheard || bad.forgetEarly && len(d.Open()) == 0 {
					p.change(&op.Request{Type: op.Forget, Shard: d.Coord, Coord: d.Coord, Tx: d.Tx})
					p.s.point(p)
				} else {
					p.todo = append(p.todo, d)
				}
			}
			p.finishLater()
		})
	})
}

// commits tells those who have not heard of it.
func (p *proc) commits(list []*txn.Decision, done func()) {
	if len(list) == 0 || p.s.bad.forgetUnheard {
		done()
		return
	}
	d := list[0]
	open := d.Open()
	var next func()
	next = func() {
		if len(open) == 0 {
			p.commits(list[1:], done)
			return
		}
		s := open[0]
		open = open[1:]
		p.ask(op.Request{Type: op.Commit, Shard: s, Coord: d.Coord, Tx: d.Tx, Mtime: d.Time}, func(life uint64, ok bool) {
			if ok {
				d.Committed(s, life)
			}
			next()
		})
	}
	next()
}

// makeDurable asks for durability, once for all decisions whose parties have all committed.
func (p *proc) makeDurable(list []*txn.Decision, shards []sealfs.Shard, done func()) {
	if len(shards) == 0 || p.s.bad.forgetEarly {
		done()
		return
	}
	s := shards[0]
	p.ask(op.Request{Type: op.Sync, Shard: s}, func(life uint64, ok bool) {
		for _, d := range list {
			if ok && p.s.bad.finishBlind && slices.Contains(d.Lazy(), s) {
				d.Committed(s, life) // whoever that was
			}
			if ok {
				d.Synced(s, life)
			}
		}
		p.makeDurable(list, shards[1:], done)
	})
}

// ask sends a request of the finisher, and says in which life it was answered.
func (p *proc) ask(req op.Request, done func(life uint64, ok bool)) {
	c := p.s.within(nil, finishTimeout, p)
	p.s.send(p.at.id, p, c, &req, func(rep *op.Reply, err error) {
		if err != nil || rep.Code != 0 {
			done(0, false)
			return
		}
		done(rep.Off, true)
	})
}
