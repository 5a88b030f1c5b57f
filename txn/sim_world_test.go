package txn_test

import (
	"bytes"
	"container/heap"
	"fmt"
	"math/rand/v2"
	"slices"

	"sealfs"
	"sealfs/op"
)

// Times of the simulation are nanoseconds of a counter that starts at epoch.
const (
	micro = int64(1000)
	milli = 1000 * micro
	sec   = 1000 * milli
	epoch = int64(1 << 40)

	patience = prepareTimeout - 500*milli // how long a call may take when all is calm
)

// sim is a pretended cluster. One seed determines everything that happens in it.
type sim struct {
	seed uint64
	rng  *rand.Rand
	bad  sabotage
	now  int64
	due  dueList
	n    uint64 // of things that were ever due

	shards  uint32
	root    sealfs.Ino
	servers []*server
	clients []*client
	cut     map[[2]int]int64 // pairs of nodes that do not hear each other, until when

	faultsEnd, calm   int64 // when the last thing goes wrong, and when nobody feels it any more
	finishDelay       int64
	crowd             int     // how many directories they all work in
	lossy, doubling   float64 // chances of a message
	slow, pointChance float64
	delayMax          int64

	history
	kept   bool // the trace is kept
	trace  bytes.Buffer
	failed error
}

// due is something that is to happen.
type due struct {
	at int64
	n  uint64
	in *proc // it happens only if this one still lives; nil: in any case
	fn func()
}

type dueList []due

func (d dueList) Len() int { return len(d) }
func (d dueList) Less(i, j int) bool {
	return d[i].at < d[j].at || d[i].at == d[j].at && d[i].n < d[j].n
}
func (d dueList) Swap(i, j int) { d[i], d[j] = d[j], d[i] }
func (d *dueList) Push(x any)   { *d = append(*d, x.(due)) }
func (d *dueList) Pop() any {
	last := len(*d) - 1
	x := (*d)[last]
	(*d)[last] = due{}
	*d = (*d)[:last]
	return x
}

// after has fn called when delay has passed, if in (nil: in any case) still lives.
func (s *sim) after(delay int64, in *proc, fn func()) {
	s.n++
	heap.Push(&s.due, due{s.now + delay, s.n, in, fn})
}

// run lets things happen until done says so or limit has come.
func (s *sim) run(limit int64, done func() bool) {
	for s.failed == nil && len(s.due) > 0 && !done() {
		if s.due[0].at > limit {
			s.now = limit
			return
		}
		d := heap.Pop(&s.due).(due)
		s.now = d.at
		if d.in == nil || !d.in.dead {
			d.fn()
		}
	}
}

func (s *sim) logf(format string, args ...any) {
	if s.kept {
		fmt.Fprintf(&s.trace, "%9.3f ms ", float64(s.now-epoch)/float64(milli))
		fmt.Fprintf(&s.trace, format, args...)
		s.trace.WriteByte('\n')
	}
}

// fail ends the run; what was found first counts.
func (s *sim) fail(format string, args ...any) {
	if s.failed == nil {
		s.failed = fmt.Errorf(format, args...)
		s.logf("FAILED: %v", s.failed)
	}
}

func (s *sim) chance(p float64) bool { return p > 0 && s.rng.Float64() < p }

// between returns a random time.
func (s *sim) between(low, high int64) int64 { return low + s.rng.Int64N(high-low+1) }

// faulty reports whether things still go wrong.
func (s *sim) faulty() bool { return s.now < s.faultsEnd }

// delay returns how long a message takes.
func (s *sim) delay() int64 {
	if s.faulty() && s.chance(s.slow) {
		return s.between(milli, sec<<s.rng.IntN(2))
	}
	return s.between(20*micro, s.delayMax)
}

// reaches reports whether a message from a comes through to b.
func (s *sim) reaches(a, b int) bool {
	if !s.faulty() {
		return true
	}
	return s.cut[[2]int{min(a, b), max(a, b)}] <= s.now && !s.chance(s.lossy)
}

// scope is what context.Context is to the server.
type scope struct {
	ended bool
	hooks []func()
}

func (c *scope) onEnd(fn func()) { c.hooks = append(c.hooks, fn) }

func (c *scope) end() {
	if c.ended {
		return
	}
	c.ended = true
	for _, fn := range c.hooks {
		fn()
	}
	c.hooks = nil
}

// within returns a scope that ends with c, or when limit has passed.
func (s *sim) within(c *scope, limit int64, in *proc) *scope {
	d := &scope{}
	if c != nil {
		if c.ended {
			d.ended = true
			return d
		}
		c.onEnd(d.end)
	}
	s.after(limit, in, d.end)
	return d
}

// home returns the server that holds a shard.
func (s *sim) home(shard sealfs.Shard) *server { return s.servers[int(shard)%len(s.servers)] }

// send sends a request from a node, which lives as long as the process life
// (nil: for ever), and calls done once: with the reply, or with ErrInterrupted
// when c ends, or ErrUnavailable when the connection breaks. A message reaches only
// the life of the server that it was sent to: connections die with it.
func (s *sim) send(from int, life *proc, c *scope, req *op.Request, done func(*op.Reply, error)) {
	to := s.home(req.Shard)
	q := to.proc
	answered := false
	finish := func(rep *op.Reply, err error) {
		if answered || life != nil && life.dead {
			return
		}
		answered = true
		done(rep, err)
	}
	broken := func() { s.after(s.between(micro, 20*milli), life, func() { finish(nil, sealfs.ErrUnavailable) }) }
	if c.ended {
		s.after(0, life, func() { finish(nil, sealfs.ErrInterrupted) })
		return
	}
	there := &scope{} // at the other end
	c.onEnd(func() {
		s.after(0, life, func() { finish(nil, sealfs.ErrInterrupted) })
		if from == to.id || s.chance(0.5) {
			s.after(s.delay(), q, there.end)
		}
	})
	if q == nil {
		broken()
		return
	}
	bytes := req.AppendTo(nil)
	arrive := func() {
		in := new(op.Request)
		if err := op.DecodeRequest(in, bytes); err != nil {
			s.fail("a request does not decode: %v", err)
			return
		}
		q.serve(there, in, func(rep *op.Reply, err error) {
			if from == to.id {
				finish(rep, err)
				return
			}
			if err != nil || !s.reaches(from, to.id) {
				s.logf("server %d: answer to %s is lost (%v)", to.id, describe(in), err)
				broken()
				return
			}
			s.after(s.delay(), nil, func() { finish(rep, nil) })
		})
	}
	if from == to.id {
		s.after(0, q, arrive)
		return
	}
	q.broken = append(q.broken, broken)
	if !s.reaches(from, to.id) {
		s.logf("%s to server %d is lost", describe(req), to.id)
		s.after(s.between(0, sec), life, broken)
		return
	}
	arrived := false
	once := func() {
		// A Prepare is never sent again by anybody, and a connection does not
		// double it: after the outcome it would be executed as a new one.
		if arrived && req.Type == op.Prepare && s.settled[req.Tx] && !s.bad.latePrepare {
			return
		}
		if arrived {
			s.logf("%s to server %d comes twice", describe(req), to.id)
		}
		arrived = true
		arrive()
	}
	s.after(s.delay(), q, once)
	if s.faulty() && s.chance(s.doubling) {
		s.after(s.delay()+s.between(0, s.delayMax), q, once)
	}
}

// point is a step of the protocol at which a server may die, or lose its power.
func (s *sim) point(p *proc) {
	if s.faulty() && s.chance(s.pointChance) {
		s.after(0, p, func() { s.crash(p.at, s.chance(0.7)) })
	}
}

// planFaults decides what will go wrong.
func (s *sim) planFaults() {
	r := s.rng
	s.faultsEnd = s.now + s.between(200*milli, 2*sec)
	s.calm = s.faultsEnd + 4*sec
	s.crowd = []int{2, 4, 8, 16}[r.IntN(4)]
	s.finishDelay = []int64{20 * milli, 100 * milli, 500 * milli}[r.IntN(3)]
	s.delayMax = []int64{200 * micro, 2 * milli, 20 * milli}[r.IntN(3)]
	pick := func(of ...float64) float64 { return of[r.IntN(len(of))] }
	s.lossy, s.doubling = pick(0, 0, 0.005, 0.05), pick(0, 0.01, 0.1)
	s.slow, s.pointChance = pick(0, 0, 0.01, 0.05), pick(0, 0.002, 0.01, 0.03)
	for range r.IntN(4) {
		to := s.servers[r.IntN(len(s.servers))]
		s.after(s.between(0, s.faultsEnd-s.now), nil, func() { s.crash(to, s.chance(0.6)) })
	}
	if r.IntN(4) == 0 {
		s.after(s.between(0, s.faultsEnd-s.now), nil, func() {
			for _, at := range s.servers {
				s.crash(at, true)
			}
		})
	}
	for range r.IntN(4) {
		a, b := r.IntN(len(s.servers)), r.IntN(len(s.servers)+len(s.clients))
		s.after(s.between(0, s.faultsEnd-s.now), nil, func() {
			until := s.now + s.between(10*milli, sec)
			s.logf("nodes %d and %d do not hear each other for %d ms", a, b, (until-s.now)/milli)
			s.cut[[2]int{min(a, b), max(a, b)}] = until
		})
	}
}

// history is what has happened, as somebody sees it who sees all at once.
type history struct {
	events  []*event
	names   names
	calls   map[[2]uint64]*call // by session and sequence
	pending []*call
	settled map[op.Tx]bool // decided for good, or given up
	done    int            // calls that were answered
}

// event is a change of a client that was executed.
type event struct {
	req  *op.Request
	ino  sealfs.Ino
	at   *server
	lost bool // by a power cut
}

// call is a client's operation.
type call struct {
	by      *client
	req     op.Request
	began   int64
	why     codes            // for what it could have been refused since it began
	seen    map[outcome]bool // what could have been answered
	event   *event
	ended   bool
	code    sealfs.Code
	unknown bool // it was given up without knowing its outcome
}

func (s *sim) begin(c *call) {
	s.pending = append(s.pending, c)
	if c.req.Seq != 0 {
		s.calls[[2]uint64{uint64(c.req.Session), c.req.Seq}] = c
	} else {
		c.seen = map[outcome]bool{}
	}
	s.observe(c)
}

// observe notes what the call could be answered now.
func (s *sim) observe(c *call) {
	if c.seen != nil {
		c.seen[s.names.ask(&c.req)] = true
	} else {
		c.why |= s.names.refusals(&c.req)
	}
}

func (s *sim) changed() {
	for _, c := range s.pending {
		s.observe(c)
	}
}

// happened takes note of a client's change at the moment of its execution.
func (s *sim) happened(at *server, req *op.Request, ino sealfs.Ino) *event {
	e := &event{req: req, ino: ino, at: at}
	c := s.calls[[2]uint64{uint64(req.Session), req.Seq}]
	switch {
	case c == nil:
		s.fail("%s was executed, but nobody has asked for it", describe(req))
	case c.event != nil:
		s.fail("%s was executed twice", describe(req))
	case c.ended && !c.unknown:
		s.fail("%s was executed after it had been answered %v", describe(req), c.code)
	}
	if s.failed != nil {
		return e
	}
	if err := s.names.apply(req, ino); err != nil {
		s.fail("%v", err)
	}
	c.event = e
	s.events = append(s.events, e)
	s.changed()
	return e
}

// answered judges the answer to a call.
func (s *sim) answered(c *call, rep *op.Reply) {
	c.ended, c.code = true, rep.Code
	s.done++
	s.pending = slices.DeleteFunc(s.pending, func(o *call) bool { return o == c })
	what := describe(&c.req)
	if took := s.now - max(c.began, s.calm); took > patience {
		s.fail("%s took %d ms though nothing went wrong", what, took/milli)
	}
	if c.seen != nil {
		if o := outcomeOf(&c.req, rep); !c.seen[o] && rep.Code != sealfs.ErrUnavailable {
			s.fail("%s was answered %+v, which it never was: %v", what, o, c.seen)
		}
		return
	}
	switch {
	case rep.Code == sealfs.ErrUnavailable || rep.Code == sealfs.ErrInterrupted:
		// It has not happened, but for no reason that lies in the names.
		if c.began > s.calm {
			s.fail("%s was answered %v though nothing goes wrong any more", what, rep.Code)
		}
		fallthrough
	case rep.Code != 0:
		if c.event != nil {
			s.fail("%s was answered %v but has happened", what, rep.Code)
		} else if !c.why.has(rep.Code) && rep.Code != sealfs.ErrUnavailable && rep.Code != sealfs.ErrInterrupted {
			s.fail("%s was answered %v, for which there was no reason (%b)", what, rep.Code, c.why)
		}
	case c.event == nil && !c.why.has(0):
		s.fail("%s was answered, but has not happened", what)
	case c.event != nil && rep.Attr.Ino != 0 && rep.Attr.Ino != c.event.ino:
		s.fail("%s was answered with inode %d, it was %d", what, rep.Attr.Ino, c.event.ino)
	}
}

// forget takes back what a power cut has taken, and makes sure that what is
// left could have happened alone.
func (s *sim) forget(lost []*event) {
	for _, e := range lost {
		e.lost = true
		c := s.calls[[2]uint64{uint64(e.req.Session), e.req.Seq}]
		if c.event = nil; c.ended {
			c.unknown = true // nobody will ask again
		} else {
			c.why.add(0) // its answer may be on the way
		}
	}
	s.events = slices.DeleteFunc(s.events, func(e *event) bool { return e.lost })
	s.names = newNames(s.root)
	for _, e := range s.events {
		if err := s.names.apply(e.req, e.ino); err != nil {
			s.fail("after a power cut: %v", err)
			return
		}
	}
	s.changed()
}
