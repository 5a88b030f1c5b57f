package sim

import (
	"slices"

	"sealfs"
	"sealfs/lease"
	"sealfs/op"
)

// client is a client with its session.
type client struct {
	process
	w       *world
	id      int
	session sealfs.Session
	until   int64 // the session cannot have ended before
	era     int   // counts sessions
	ended   bool  // it knows that its session has ended, and has no other one yet

	conns []conn // by server
	open  []*call
	seqs  []uint64

	knows map[int]int  // what it believes
	write map[int]bool // it may delay writes
	dirty map[int]int  // delayed
	owed  map[int]bool // told by Register to be delayed
	own   map[int]int  // changes under way
	marks map[int]int  // answers that were asked for before do not count
	lock  int          // that it holds, -1: none
	under int          // puts under it that are not answered
}

// conn is what a client has with a server.
type conn struct {
	gen   int // raised when it breaks
	ready bool
	off   uint64
	seq   uint64
	todo  []op.Revoke
	seen  map[int]uint64
	fresh bool // a Watch was answered
}

// watch is a Watch at the server.
type watch struct {
	from *client
	w    lease.Watcher
	gen  int
	seq  uint64
	wake bool
}

// begin begins a session.
func (c *client) begin() {
	c.session, c.until, c.ended = c.w.mgr.open(), c.w.now+9*termTime/10, false
	c.era++
	c.knows, c.write, c.dirty, c.owed, c.own, c.marks = map[int]int{}, map[int]bool{}, map[int]int{}, map[int]bool{}, map[int]int{}, map[int]int{}
	c.lock, c.under, c.open = -1, 0, nil
	c.seqs = make([]uint64, len(c.w.servers))
	gens := c.conns
	c.conns = make([]conn, len(c.w.servers))
	for i := range c.conns {
		if gens != nil {
			c.conns[i].gen = gens[i].gen + 1
		}
		c.connect(c.w.servers[i])
	}
	c.renew(c.era)
}

// lost is for a session that has ended.
func (c *client) lost() {
	if c.ended {
		return
	}
	c.ended = true
	c.w.logf("%s: session %d is lost", c.name, c.session)
	c.w.hits["lost"]++
	clear(c.knows)
	clear(c.write)
	clear(c.dirty)
	era := c.era
	c.w.after(&c.process, c.w.between(10, 500), func() {
		if c.era == era {
			c.begin()
		}
	})
}

func (c *client) believes() bool {
	return c.up && !c.ended && (c.w.now < c.until || c.w.bad.longBelief && c.paused <= c.w.now)
}

func (c *client) renew(era int) {
	w, sent := c.w, c.w.now
	if c.era != era {
		return
	}
	w.after(&c.process, termTime/4, func() { c.renew(era) })
	id := c.session
	w.send(&w.mgr.process, false, func() {
		ok := w.mgr.renew(id)
		w.send(&c.process, false, func() {
			switch {
			case c.era != era:
			case ok:
				c.until = max(c.until, sent+9*termTime/10)
			default:
				c.lost()
			}
		})
	})
}

// broken breaks the connection to a server.
func (c *client) broken(s *server) {
	k := &c.conns[s.id]
	k.gen++
	k.ready = false
	gen := k.gen
	c.w.after(&c.process, c.w.between(1, 200), func() {
		if k.gen == gen && !k.ready {
			c.connect(s)
		}
	})
}

// connect registers with a server, which ends all belief in it.
func (c *client) connect(s *server) {
	w, k := c.w, &c.conns[s.id]
	gen, era, id := k.gen, c.era, c.session
	k.off, k.todo, k.fresh, k.seen = 0, nil, false, map[int]uint64{}
	w.logf("%s: session %d connects to %s", c.name, id, s.name)
	var dirty []int
	for i := range items {
		if w.home(i) != s {
			continue
		}
		c.forget(i)
		delete(c.owed, i)
		if c.dirty[i] > 0 {
			dirty = append(dirty, i)
			c.owed[i] = true
		}
	}
	w.after(&c.process, sec, func() {
		if c.era == era && k.gen == gen && !k.ready {
			k.gen++
			c.connect(s)
		}
	})
	w.send(&s.process, true, func() {
		code := s.register(id, dirty)
		w.send(&c.process, true, func() {
			switch {
			case c.era != era || k.gen != gen || k.ready:
			case code == sealfs.ErrSession:
				c.lost()
			case code == 0:
				k.ready = true
				c.watch(s)
				for _, o := range slices.Clone(c.open) {
					if c.serverOf(o) == s {
						c.send(o)
					}
				}
			}
		})
	})
}

// forget ends belief in an item.
func (c *client) forget(i int) {
	delete(c.knows, i)
	delete(c.write, i)
	c.marks[i]++
}

// watch sends a Watch, which acknowledges what was carried out.
func (c *client) watch(s *server) {
	w, k := c.w, &c.conns[s.id]
	if !k.ready || c.ended {
		return
	}
	k.seq++
	gen, era, seq, off, id := k.gen, c.era, k.seq, k.off, c.session
	w.after(&c.process, 10*sec, func() {
		if c.era == era && k.gen == gen && k.seq == seq {
			c.watch(s) // its answer is lost
		}
	})
	w.send(&s.process, false, func() {
		if !s.known || s.fenced[id] || s.ended(id) {
			return
		}
		x := &watch{from: c, gen: gen, seq: seq, wake: true}
		var err error
		if x.w, err = s.table.Watch(id, seq, off, nil, func() { x.wake = true }); err != nil {
			return // of another incarnation: the connection will break
		}
		s.watches = append(s.watches, x)
	})
}

// answerWatches answers those that have something to say.
func (s *server) answerWatches() {
	s.watches = slices.DeleteFunc(s.watches, func(x *watch) bool {
		if !x.wake {
			return false
		}
		x.wake = false
		revs, _, wait, err := s.table.Poll(x.w, nil)
		if err != nil || wait {
			return err != nil
		}
		c := x.from
		s.w.send(&c.process, false, func() { c.told(s, x, revs) })
		return true
	})
}

// told is the answer to a Watch.
func (c *client) told(s *server, x *watch, revs []op.Revoke) {
	k := &c.conns[s.id]
	if k.gen != x.gen || k.seq != x.seq || !k.ready || c.ended {
		return
	}
	k.fresh = true
	last := k.off
	if n := len(k.todo); n > 0 {
		last = k.todo[n-1].Num
	}
	for _, r := range revs {
		if r.Num > last {
			k.todo = append(k.todo, r)
			last = r.Num
		}
	}
	c.carry(s)
}

// carry carries out revocations, as far as that goes without a wait.
func (c *client) carry(s *server) {
	k := &c.conns[s.id]
	for len(k.todo) > 0 {
		r := k.todo[0]
		i := int(r.Ino) - 1
		if c.w.bad.noRecall {
			k.seen[i], k.off, k.todo = r.Num, r.Num, k.todo[1:]
			continue
		}
		if c.dirty[i] > 0 && (c.write[i] || c.owed[i]) {
			c.flush(i)
			return // comes back when it is answered
		}
		if c.own[i] > 0 && c.dirty[i] > 0 {
			return
		}
		w := c.w
		w.logf("%s gives back item %d (%d of kind %d)", c.name, i, r.Num, r.Kind)
		delete(c.write, i)
		delete(c.owed, i)
		if r.Kind == op.RevokeInode {
			c.forget(i)
		}
		c.w.hits["revoked"]++
		k.seen[i], k.off, k.todo = r.Num, r.Num, k.todo[1:]
	}
	c.watch(s)
}

// flush sends what is delayed. It stays delayed until that is answered.
func (c *client) flush(i int) {
	if slices.ContainsFunc(c.open, func(o *call) bool { return o.kind == put && o.item == i && o.write }) {
		return
	}
	c.ask(&call{kind: put, item: i, n: c.dirty[i], lock: -1, write: true})
}

func (c *client) serverOf(o *call) *server {
	if o.kind == take || o.kind == give {
		return c.w.home(o.lock)
	}
	return c.w.home(o.item)
}

// ask begins a call.
func (c *client) ask(o *call) {
	s := c.serverOf(o)
	o.from, o.session = c, c.session
	if o.kind != get {
		c.seqs[s.id]++
		o.seq = c.seqs[s.id]
	}
	if o.kind == put || o.kind == both {
		c.own[o.item]++
		delete(c.knows, o.item)
		c.marks[o.item]++
	}
	if o.kind == both {
		c.own[o.other]++
		delete(c.knows, o.other)
		c.marks[o.other]++
	}
	c.open = append(c.open, o)
	c.send(o)
}

func (c *client) send(o *call) {
	s := c.serverOf(o)
	k := &c.conns[s.id]
	if !k.ready {
		return // connect sends it
	}
	o.gen, o.low = k.gen, o.seq
	for _, x := range c.open {
		if x.kind != get && c.serverOf(x) == s {
			o.low = min(o.low, x.seq)
		}
	}
	o.mark = c.marks[o.item]
	sent, era := *o, c.era
	c.w.send(&s.process, false, func() { s.serve(&pending{c: sent, since: c.w.now}) })
	c.w.after(&c.process, c.w.between(2*sec, 4*sec), func() {
		if c.era == era && slices.Contains(c.open, o) {
			c.send(o) // no answer
		}
	})
}

// answered is the answer to a call.
func (c *client) answered(s *server, o call, r reply) {
	w := c.w
	n := slices.IndexFunc(c.open, func(x *call) bool {
		return x.kind == o.kind && x.seq == o.seq && c.serverOf(x) == s && x.item == o.item
	})
	if n < 0 || o.session != c.session || c.ended {
		return
	}
	x := c.open[n]
	switch r.code {
	case sealfs.ErrSession:
		c.lost()
		return
	case sealfs.ErrUnavailable, sealfs.ErrStale:
		return // asked again after a while
	}
	c.open = slices.Delete(c.open, n, n+1)
	k := &c.conns[s.id]
	usable := o.gen == k.gen && k.fresh && r.stamp >= k.seen[o.item] && o.mark == c.marks[o.item] && x.mark == o.mark
	switch o.kind {
	case take:
		if r.code == 0 {
			c.lock = o.lock
			w.hits["locked"]++
		}
	case give:
		c.lock = -1
	case put, both:
		c.own[o.item]--
		c.marks[o.item]++ // an answer to another change may be older
		if o.kind == both {
			c.own[o.other]--
			c.marks[o.other]++
		}
		if o.lock >= 0 {
			c.under--
		}
		if o.write {
			if c.dirty[o.item] -= o.n; c.dirty[o.item] == 0 {
				delete(c.owed, o.item)
			}
			w.hits["flushed"]++
		}
		defer c.carry(s)
	}
	if r.lease&op.LeaseIno != 0 && usable && c.own[o.item] == 0 && (o.kind == get || o.kind == put) {
		w.hits["believed"]++
		c.knows[o.item] = r.value
		w.logf("%s believes %d of item %d (stamp %d)", c.name, r.value, o.item, r.stamp)
		if r.lease&op.LeaseWrite != 0 && o.kind == get {
			c.write[o.item] = true
		}
	}
}

// work is what the client does, one thing after the other.
func (c *client) work() {
	w := c.w
	w.after(&c.process, w.between(10, 400), c.work)
	if c.ended || len(c.open) > 3 || w.now > w.over-90*sec {
		return
	}
	i := w.rng.IntN(items)
	switch w.rng.IntN(12) {
	case 0, 1, 2:
		if _, ok := c.knows[i]; ok && c.believes() {
			w.hits["used"]++ // judged all the time
			return
		}
		c.ask(&call{kind: get, item: i, lock: -1, write: w.rng.IntN(3) == 0})
	case 3, 4:
		if c.write[i] && c.believes() && c.own[i] == 0 {
			if _, ok := c.knows[i]; ok {
				// The program is answered; nobody else may look before it is sent.
				c.dirty[i]++
				delete(c.knows, i)
				c.marks[i]++
				w.hits["delayed"]++
				return
			}
		}
		if c.dirty[i] == 0 {
			c.ask(&call{kind: put, item: i, n: 1, lock: -1})
		}
	case 5:
		if c.dirty[i] > 0 {
			c.flush(i)
		}
	case 6, 7:
		if c.lock < 0 && !slices.ContainsFunc(c.open, func(o *call) bool { return o.kind == take || o.kind == give }) {
			c.ask(&call{kind: take, lock: w.rng.IntN(locks)})
		}
	case 8, 9:
		if c.lock >= 0 && c.dirty[i] == 0 && !slices.ContainsFunc(c.open, func(o *call) bool { return o.kind == give }) {
			c.under++
			c.ask(&call{kind: put, item: i, n: 1, lock: c.lock})
		}
	case 10:
		if c.lock >= 0 && c.under == 0 && !slices.ContainsFunc(c.open, func(o *call) bool { return o.kind == give }) {
			c.ask(&call{kind: give, lock: c.lock})
		}
	case 11:
		j := w.rng.IntN(items)
		if w.home(i) != w.home(j) && c.dirty[i] == 0 && c.dirty[j] == 0 {
			c.ask(&call{kind: both, item: i, other: j, n: 1, lock: -1})
		}
	}
}
