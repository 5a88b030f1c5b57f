package sim

import (
	"slices"

	"sealfs"
	"sealfs/lease"
	"sealfs/op"
	"sealfs/txn"
)

type kind int

const (
	get kind = iota
	put
	take // a lock
	give // a lock
	both // a transaction
)

// call is a request of a client.
type call struct {
	from     *client
	session  sealfs.Session
	kind     kind
	item     int
	other    int  // of a transaction
	n        int  // to add
	lock     int  // -1: none; a put is made under this one
	write    bool // a get that wants to delay writes
	seq, low uint64
	gen      int // of the connection
	mark     int // of the item, when it was asked
}

// row is the answer to a change, which outlives the server.
type row struct{ value int }

type reply struct {
	code  sealfs.Code
	value int
	lease op.Lease
	stamp uint64
}

// pending is a call at the server that waits.
type pending struct {
	c      call
	since  int64
	ready  bool // ask again
	ticket *lease.Ticket
	entry  *txn.Call
	first  bool
	busy   bool // its transaction is under way
}

// server is a server with its one store. What stands first outlives its processes.
type server struct {
	process
	w        *world
	id       int
	value    map[int]int
	locks    map[int]sealfs.Session
	rows     map[[2]uint64]row
	lows     map[sealfs.Session]uint64 // of changes below, all answers have been heard
	prepared map[int]op.Tx
	decided  map[op.Tx]bool
	lives    uint32

	table    *lease.Table
	calls    *txn.Calls
	waiting  []*pending
	active   map[op.Tx]bool
	known    bool // the sessions are
	next     sealfs.Session
	live     map[sealfs.Session]bool
	fenced   map[sealfs.Session]bool
	attended int64
	grace    bool
	since    int64 // of the time of grace
	back     map[sealfs.Session]bool
	watches  []*watch
	age      int64
}

func (s *server) uuid() sealfs.UUID { return sealfs.UUID{byte(s.id + 1)} }

func (s *server) start() {
	s.life++
	s.lives++
	s.up = true
	s.table, s.calls = lease.New(s.lives, 0), &txn.Calls{}
	s.waiting, s.watches, s.active = nil, nil, map[op.Tx]bool{}
	s.known, s.grace, s.fenced, s.back = false, true, map[sealfs.Session]bool{}, map[sealfs.Session]bool{}
	s.w.logf("%s starts", s.name)
	if s.w.bad.noRows {
		clear(s.rows)
	}
	if s.w.bad.voteEarly {
		clear(s.prepared)
	}
	s.beat()
	for i := range items {
		if tx, in := s.prepared[i]; in {
			s.doubt(i, tx)
		}
	}
}

func (s *server) die() {
	if !s.up {
		return
	}
	s.up = false
	s.w.logf("%s dies", s.name)
	s.w.hits["died"]++
	for _, c := range s.w.clients {
		c.broken(s)
	}
	s.w.after(nil, s.w.between(50, 15*sec), s.start)
}

// beat tells the manager of the server, and the server of sessions.
func (s *server) beat() {
	w, sent := s.w, s.w.now
	w.after(&s.process, sec, s.beat)
	var refused []sealfs.Session
	for id := range s.fenced {
		refused = append(refused, id)
	}
	life := s.life
	w.send(&w.mgr.process, false, func() {
		m := w.mgr
		m.beats[s.id] = w.now
		m.fences.Confirm(s.uuid(), refused)
		fences, next := m.fences.List(), m.next
		live := map[sealfs.Session]bool{}
		for id := range m.live {
			live[id] = true
		}
		w.send(&s.process, false, func() {
			if s.life != life || sent < s.attended-9*downTime/10 {
				return // an older answer
			}
			s.attended = sent + 9*downTime/10
			s.learn(next, live, fences)
		})
	})
}

// learn takes the manager's list.
func (s *server) learn(next sealfs.Session, live map[sealfs.Session]bool, fences []sealfs.Session) {
	clear(s.fenced)
	for _, id := range fences {
		s.fenced[id] = true
	}
	if !s.known {
		s.known, s.since = true, s.w.now
	}
	s.next, s.live = next, live
	s.table.End(s.ended)
	s.calls.End(s.ended)
	for l, id := range s.locks {
		if s.ended(id) {
			delete(s.locks, l)
		}
	}
	for k := range s.rows {
		if s.ended(sealfs.Session(k[0])) {
			delete(s.rows, k)
		}
	}
	s.settle()
}

func (s *server) ended(id sealfs.Session) bool { return id < s.next && !s.live[id] }

// settle ends the time of grace when all are back.
func (s *server) settle() {
	if !s.grace || !s.known {
		return
	}
	for id := range s.live {
		if !s.back[id] && s.w.now-s.since < termTime && !s.w.bad.noGrace {
			return
		}
	}
	s.grace = false
	s.w.logf("%s: the time of grace is over", s.name)
	for _, p := range s.waiting {
		p.ready = true
	}
}

// register is a client's first message on a connection. dirty is what it has delayed.
func (s *server) register(id sealfs.Session, dirty []int) sealfs.Code {
	if !s.known {
		return sealfs.ErrUnavailable
	}
	if s.fenced[id] || s.ended(id) {
		return sealfs.ErrSession
	}
	for _, i := range dirty {
		if !s.w.bad.noRestore {
			s.table.Restore(id, sealfs.Ino(i+1))
			s.w.hits["restored"]++
		}
	}
	s.back[id] = true
	s.settle()
	return 0
}

// kick lets those go on who can.
func (s *server) kick() {
	if !s.up || s.paused > s.w.now {
		return
	}
	for n := 0; n < len(s.waiting); n++ {
		p := s.waiting[n]
		if p.entry != nil && !p.first {
			select {
			case <-p.entry.Done:
				p.ready = true
			default:
			}
		}
		if !p.ready {
			continue
		}
		p.ready = false
		s.waiting = slices.Delete(s.waiting, n, n+1)
		n = -1
		s.serve(p)
	}
	s.answerWatches()
}

// wait keeps a call for later.
func (s *server) wait(p *pending) { s.waiting = append(s.waiting, p) }

// answer ends a call.
func (s *server) answer(p *pending, r reply) {
	s.table.Done(p.ticket)
	if p.first {
		code := r.code
		if code == sealfs.ErrUnavailable {
			code = 0
		}
		s.calls.Leave(p.c.session, p.c.seq, p.entry, code)
	}
	c := p.c
	s.w.send(&c.from.process, false, func() { c.from.answered(s, c, r) })
}

// serve looks at a call.
func (s *server) serve(p *pending) {
	c, w := &p.c, s.w
	switch {
	case !s.known:
		s.answer(p, reply{code: sealfs.ErrUnavailable})
		return
	case s.fenced[c.session] || s.ended(c.session):
		s.answer(p, reply{code: sealfs.ErrSession})
		return
	case c.kind != get && w.now > s.attended && !w.bad.unattended:
		w.hits["put off"]++
		s.answer(p, reply{code: sealfs.ErrUnavailable})
		return
	case s.grace && c.kind != take && c.kind != give:
		s.wait(p)
		s.w.after(&s.process, termTime-(w.now-s.since)+1, func() { s.settle() })
		return
	}
	if c.kind != get && !p.first && !w.bad.noCalls {
		entry, first, err := s.calls.Enter(c.session, c.seq, c.low)
		if err != nil {
			s.answer(p, reply{code: sealfs.ErrStale})
			return
		}
		if p.entry, p.first = entry, first; !first {
			w.hits["doubled"]++
			if entry.Code != 0 {
				s.answer(p, reply{code: entry.Code})
				return
			}
			s.wait(p)
			return
		}
	}
	if r, ok := s.rows[[2]uint64{uint64(c.session), c.seq}]; ok && c.kind != get {
		w.hits["from a row"]++
		s.answer(p, reply{value: r.value})
		return
	}
	if c.kind != get && c.seq < s.lows[c.session] {
		s.answer(p, reply{code: sealfs.ErrStale})
		return
	}
	switch c.kind {
	case take, give:
		s.lock(p)
	case both:
		s.transact(p)
	default:
		s.execute(p)
	}
}

func (s *server) lock(p *pending) {
	c := &p.c
	owner, held := s.locks[c.lock]
	switch {
	case c.kind == give && owner == c.session:
		delete(s.locks, c.lock)
	case c.kind == take && held && owner != c.session:
		s.answer(p, reply{code: sealfs.ErrAgain})
		return
	case c.kind == take:
		s.locks[c.lock] = c.session
	}
	s.did(c, 0)
	s.answer(p, reply{})
}

// did notes that a change has happened, with its answer.
func (s *server) did(c *call, value int) {
	s.w.done[[3]uint64{uint64(s.id), uint64(c.session), c.seq}]++
	s.rows[[2]uint64{uint64(c.session), c.seq}] = row{value}
	s.lows[c.session] = max(s.lows[c.session], c.low)
	for k := range s.rows {
		if k[0] == uint64(c.session) && k[1] < c.low {
			delete(s.rows, k)
		}
	}
}

// ask asks the leases, and has p wait if it must.
func (s *server) ask(p *pending, a *lease.Ask) bool {
	a.Ticket = p.ticket
	ok := s.table.Ask(a)
	if p.ticket = a.Ticket; ok {
		return true
	}
	s.w.hits["blocked"]++
	p.ready = s.table.Notify(p.ticket, func() { p.ready = true })
	s.wait(p)
	return false
}

// execute is a get or a put.
func (s *server) execute(p *pending) {
	c, w := &p.c, s.w
	ino := sealfs.Ino(c.item + 1)
	if _, in := s.prepared[c.item]; in && !w.bad.noKeep {
		p.ready = false
		s.wait(p)
		w.after(&s.process, 20, func() { p.ready = true })
		return
	}
	a := lease.Ask{Session: c.session, Ino: ino, Write: c.write}
	if c.kind == get {
		a.Tells = ino
	} else {
		a.Changes = []lease.Change{{Ino: ino}}
	}
	if !s.ask(p, &a) {
		return
	}
	if o := w.delays(c.item, c.session); o != nil {
		w.fail("session %d is told of item %d or changes it, while session %d delays writes to it", c.session, c.item, o.session)
	}
	if c.kind == put {
		if c.lock >= 0 {
			w.hits["under a lock"]++
			if now := w.home(c.lock).locks[c.lock]; now != c.session {
				w.fail("a write of session %d under lock %d, which session %d has by now", c.session, c.lock, now)
			}
		}
		s.value[c.item] += c.n
		w.logf("%s: session %d makes item %d %d", s.name, c.session, c.item, s.value[c.item])
		s.did(c, s.value[c.item])
	}
	s.answer(p, reply{value: s.value[c.item], lease: a.Lease, stamp: a.Stamp})
}

// transact adds to two items, of which another server has one.
func (s *server) transact(p *pending) {
	c, w := &p.c, s.w
	if p.busy {
		return
	}
	if _, in := s.prepared[c.item]; in {
		s.wait(p)
		w.after(&s.process, 20, func() { p.ready = true })
		return
	}
	if !s.ask(p, &lease.Ask{Session: c.session, Changes: []lease.Change{{Ino: sealfs.Ino(c.item + 1)}}, Keep: true}) {
		return
	}
	s.age = max(s.age+1, w.now*10+int64(s.id))
	tx := op.Tx{Age: s.age, Nonce: uint64(s.id + 1)}
	peer := w.home(c.other)
	co := txn.Begin(tx, sealfs.Shard(s.id), []op.Request{{Shard: sealfs.Shard(peer.id)}})
	s.active[tx] = true
	w.txs[tx] = &[2]int{}
	p.busy = true
	// While it lasts it must not be looked at again: it is in no list.
	voted, life := false, s.life
	vote := func(code sealfs.Code) {
		if voted || s.life != life { // connections end with the process
			return
		}
		voted = true
		co.Voted(0, code, op.Attr{})
		s.decide(p, co, peer)
	}
	w.send(&peer.process, true, func() {
		peer.prepare(tx, c.other, w.now+50, nil, func(code sealfs.Code) { w.send(&s.process, true, func() { vote(code) }) })
	})
	w.after(&s.process, 2*sec, func() { vote(sealfs.ErrUnavailable) })
}

// decide ends a transaction.
func (s *server) decide(p *pending, co *txn.Coordinator, peer *server) {
	c, w, tx := &p.c, s.w, co.Tx()
	p.busy = false
	delete(s.active, tx)
	refused := s.fenced[c.session] || s.ended(c.session) || w.now > s.attended && !w.bad.unattended
	if co.State() == txn.Ready && !refused {
		a := lease.Ask{Session: c.session, Changes: []lease.Change{{Ino: sealfs.Ino(c.item + 1)}}, Keep: true, Ticket: p.ticket}
		if !s.table.Ask(&a) {
			w.fail("a decision is blocked by leases")
			return
		}
		s.value[c.item] += c.n
		s.did(c, s.value[c.item])
		s.decided[tx] = true
		w.txs[tx][0]++
		co.Decided()
		w.hits["committed"]++
		w.logf("%s: transaction %d is decided", s.name, tx.Age)
		w.send(&peer.process, false, func() { peer.settled(tx, true) })
		// Whoever asks the peer waits there until it has heard of it.
		s.answer(p, reply{value: s.value[c.item]})
		return
	}
	co.Abort(0)
	w.hits["aborted"]++
	w.send(&peer.process, false, func() { peer.settled(tx, false) })
	s.table.Done(p.ticket)
	p.ticket = nil
	s.wait(p)
	w.after(&s.process, w.between(10, 60), func() { p.ready = true })
}

// prepare votes.
func (s *server) prepare(tx op.Tx, i int, late int64, k *lease.Ticket, vote func(sealfs.Code)) {
	w := s.w
	if _, in := s.prepared[i]; in || s.grace || !s.known || w.now > late {
		s.table.Done(k)
		vote(sealfs.ErrDeadlock)
		return
	}
	a := lease.Ask{Changes: []lease.Change{{Ino: sealfs.Ino(i + 1)}}, Ticket: k}
	if !s.table.Ask(&a) {
		s.w.hits["prepare blocked"]++
		w.after(&s.process, 10, func() { s.prepare(tx, i, late, a.Ticket, vote) })
		return
	}
	if o := w.delays(i, 0); o != nil {
		w.fail("item %d is prepared, while session %d delays writes to it", i, o.session)
	}
	s.table.Done(a.Ticket)
	s.prepared[i] = tx
	w.logf("%s: transaction %d prepares item %d", s.name, tx.Age, i)
	s.doubt(i, tx)
	vote(0)
}

// doubt asks for the fate of what nobody comes back for.
func (s *server) doubt(i int, tx op.Tx) {
	w := s.w
	w.after(&s.process, sec, func() {
		if s.prepared[i] != tx {
			return
		}
		s.doubt(i, tx)
		co := w.servers[tx.Nonce-1]
		w.send(&co.process, false, func() {
			committed := co.decided[tx]
			if co.active[tx] && !w.bad.noActive {
				return
			}
			if w.bad.presumeCommit {
				committed = true
			}
			w.hits["resolved"]++
			w.send(&s.process, false, func() { s.settled(tx, committed) })
		})
	})
}

// settled is a Commit or an Abort.
func (s *server) settled(tx op.Tx, committed bool) {
	for i, at := range s.prepared {
		if at != tx {
			continue
		}
		delete(s.prepared, i)
		s.w.logf("%s: transaction %d on item %d: %t", s.name, tx.Age, i, committed)
		if committed {
			s.value[i]++
			s.w.txs[tx][1]++
		}
	}
}
