package lease

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"

	"sealfs"
	"sealfs/op"
)

var (
	oneSeed   = flag.Uint64("seed", 0, "simulate this seed alone")
	seedCount = flag.Int("seeds", 0, "how many seeds to simulate")
)

// The simulation: one store with a few inodes and names, and sessions whose clients
// follow the rules of leases over a network that delays, reorders, loses and doubles. After
// each step, whatever a live session believes must be true.

const (
	simInodes = 4 // 1 to 3 are directories, too
	simNames  = 3
)

type item struct {
	ino  sealfs.Ino
	name string // of the directory ino; empty: its attributes and content
}

// call is a request on its way, at the server, or answered and on its way back.
type call struct {
	from    *peer
	ask     Ask
	change  bool
	subject item // that the caller learns
	count   bool // an opening
	at      int  // the caller's clock when it was asked
	era     int  // how many own changes of the subject it had begun or ended then
	ready   bool
	value   int
	flush   bool
}

// watching is a Watch on its way, or at the server.
type watching struct {
	from  *peer
	seq   uint64
	off   uint64
	drops []sealfs.Ino
	w     Watcher
	revs  []op.Revoke
	stamp uint64
	err   error
}

// belief is what a client takes for true.
type belief struct{ value int }

// peer is the client of a session.
type peer struct {
	id     sealfs.Session
	paused bool
	ended  bool
	clock  int

	knows  map[item]belief
	write  map[sealfs.Ino]bool
	dirty  map[sealfs.Ino]bool
	opens  map[sealfs.Ino]int
	seen   map[sealfs.Ino]uint64 // last revocation carried out
	own    map[item]int          // own changes under way
	eras   map[item]int
	floor  map[sealfs.Ino]int    // answers that were asked before are not believed
	gives  map[sealfs.Ino]uint64 // dropped; the newest Watch that says so
	seq    uint64
	off    uint64
	todo   []op.Revoke
	flushs map[sealfs.Ino]bool // a flush is under way
}

type sim struct {
	rng     *rand.Rand
	t       *Table
	value   map[item]int
	peers   []*peer
	all     []*peer
	next    sealfs.Session
	there   []*call // on the way to the server
	blocked []*call // at the server
	back    []*call
	wthere  []*watching
	wserver []*watching
	wback   []*watching
	opened  map[sealfs.Session]map[sealfs.Ino]int // at the server
	calm    bool                                  // nothing new, no losses
	soft    bool                                  // a client that believes again before its Watch is answered
	hasty   bool                                  // a client that believes again when any Watch is answered
	nostamp bool                                  // a client that does not compare stamps
	err     error
	hits    map[string]int
}

func newSim(seed uint64) *sim {
	s := &sim{
		rng: rand.New(rand.NewPCG(seed, 3)), t: New(uint32(seed%3)+1, 0), value: map[item]int{}, next: 1,
		opened: map[sealfs.Session]map[sealfs.Ino]int{}, hits: map[string]int{},
	}
	for range 3 {
		s.join()
	}
	return s
}

func (s *sim) join() {
	p := &peer{
		id: s.next, knows: map[item]belief{}, write: map[sealfs.Ino]bool{}, dirty: map[sealfs.Ino]bool{}, opens: map[sealfs.Ino]int{},
		seen: map[sealfs.Ino]uint64{}, own: map[item]int{}, eras: map[item]int{}, floor: map[sealfs.Ino]int{}, gives: map[sealfs.Ino]uint64{}, flushs: map[sealfs.Ino]bool{},
	}
	s.next++
	s.peers, s.all = append(s.peers, p), append(s.all, p)
	s.opened[p.id] = map[sealfs.Ino]int{}
}

func (s *sim) fail(format string, args ...any) {
	if s.err == nil {
		s.err = fmt.Errorf(format, args...)
	}
}

func (s *sim) ino() sealfs.Ino { return sealfs.Ino(1 + s.rng.IntN(simInodes)) }
func (s *sim) name() item {
	return item{sealfs.Ino(1 + s.rng.IntN(simInodes-1)), fmt.Sprint("n", s.rng.IntN(simNames))}
}

func (p *peer) given(ino sealfs.Ino) bool {
	_, ok := p.gives[ino]
	return ok
}

// forget drops all that p believes of an inode.
func (p *peer) forget(ino sealfs.Ino) {
	for it := range p.knows {
		if it.ino == ino {
			delete(p.knows, it)
		}
	}
	delete(p.write, ino)
}

// begin and finish enclose an own change of it; a name is a part of its directory.
func (p *peer) begin(it item) {
	for _, at := range it.parts() {
		p.own[at]++
		p.eras[at]++
		delete(p.knows, at)
	}
}

func (p *peer) finish(it item) {
	for _, at := range it.parts() {
		p.own[at]--
		p.eras[at]++
	}
}

func (it item) parts() []item {
	if it.name == "" {
		return []item{it}
	}
	return []item{it, {ino: it.ino}}
}

// start has p ask for something, or change something.
func (s *sim) start(p *peer) {
	p.clock++
	c := &call{from: p, at: p.clock}
	c.ask.Session = p.id
	switch k := s.rng.IntN(10); {
	case k < 3: // Getattr, or an opening for writing
		c.subject = item{ino: s.ino()}
		c.ask.Tells, c.ask.Ino = c.subject.ino, c.subject.ino
		c.ask.Write = s.rng.IntN(2) == 0
		c.count = c.ask.Write
	case k < 5: // Lookup
		c.subject = s.name()
		c.ask.Dir = c.subject.ino
	case k < 7: // Setattr
		c.change, c.subject = true, item{ino: s.ino()}
		c.ask.Changes = []Change{{Ino: c.subject.ino}}
		c.ask.Ino = c.subject.ino
		p.begin(c.subject)
	case k < 9: // Create, Unlink
		c.change, c.subject = true, s.name()
		c.ask.Changes = []Change{{Ino: c.subject.ino, Name: c.subject.name}}
		c.ask.Dir = c.subject.ino
		p.begin(c.subject)
	default: // a rename over something of which the answer does not tell
		c.change, c.subject = true, s.name()
		c.ask.Changes = []Change{{Ino: c.subject.ino, Name: c.subject.name}, {Ino: simInodes, Self: true}}
		c.ask.Keep = s.rng.IntN(2) == 0
		p.begin(c.subject)
	}
	c.era = p.eras[c.subject]
	s.there = append(s.there, c)
}

// serve lets the server look at a request: it is answered, or waits.
func (s *sim) serve(c *call) {
	if c.from.ended {
		s.t.Done(c.ask.Ticket) // refused
		return
	}
	if !s.t.Ask(&c.ask) {
		s.hits["blocked"]++
		c.ready = s.t.Notify(c.ask.Ticket, func() { c.ready = true })
		s.blocked = append(s.blocked, c)
		return
	}
	if c.change {
		for _, ch := range c.ask.Changes {
			it := item{ch.Ino, ch.Name}
			s.value[it]++
			if ch.Name != "" {
				s.value[item{ino: ch.Ino}]++ // a directory's attributes change with its names
			}
			for _, p := range s.peers {
				if p != c.from {
					s.hits["told"]++
					if p.write[ch.Ino] && ch.Name == "" {
						s.fail("session %d changes %v, session %d delays writes to it", c.from.id, it, p.id)
					}
				}
			}
		}
	}
	if c.ask.Tells != 0 {
		for _, p := range s.peers {
			if p != c.from && (p.dirty[c.ask.Tells] || p.write[c.ask.Tells]) {
				s.fail("session %d is told of %d, for which session %d delays writes", c.from.id, c.ask.Tells, p.id)
			}
		}
	}
	if c.count {
		s.opened[c.from.id][c.ask.Ino]++
	}
	c.value = s.value[c.subject]
	s.t.Done(c.ask.Ticket)
	s.back = append(s.back, c)
}

// answered brings an answer to its client.
func (s *sim) answered(c *call) {
	p := c.from
	if p.ended {
		return
	}
	p.clock++
	it := c.subject
	if c.change {
		p.finish(it)
	}
	if c.flush {
		delete(p.flushs, it.ino)
		delete(p.dirty, it.ino)
	}
	if c.count {
		p.opens[it.ino]++
	}
	bit := op.LeaseIno
	if it.name != "" {
		bit = op.LeaseDir
	}
	era := c.era
	if c.change {
		era++ // its own end
	}
	switch {
	case c.ask.Lease&bit == 0, p.own[it] > 0, p.eras[it] != era, p.given(it.ino), c.at < p.floor[it.ino]:
		return
	case c.ask.Stamp < p.seen[it.ino] && !s.nostamp:
		s.hits["overtaken"]++
		return
	}
	s.hits["believed"]++
	p.knows[it] = belief{c.value}
	if c.ask.Lease&op.LeaseWrite != 0 && p.opens[it.ino] > 0 {
		s.hits["write"]++
		p.write[it.ino] = true
	}
}

// use has a client do what needs no request.
func (s *sim) use(p *peer) {
	p.clock++
	ino := s.ino()
	switch s.rng.IntN(4) {
	case 0: // write
		if p.write[ino] {
			p.dirty[ino] = true
			s.hits["delayed"]++
		}
	case 1: // close
		if p.opens[ino] == 0 {
			return
		}
		if p.opens[ino] == 1 {
			if p.dirty[ino] || p.flushs[ino] {
				s.flush(p, ino)
				return
			}
			delete(p.write, ino)
		}
		p.opens[ino]--
		// Releases overtake nothing of their own session here; counts would not mind.
		if s.opened[p.id][ino]--; s.opened[p.id][ino] == 0 {
			s.t.Lower(p.id, ino)
		}
	case 2: // the kernel forgets an inode
		if !p.dirty[ino] && !p.write[ino] && p.opens[ino] == 0 && len(p.todo) == 0 {
			p.forget(ino)
			p.gives[ino] = 0
		}
	case 3:
		if p.dirty[ino] {
			s.flush(p, ino)
		}
	}
}

func (s *sim) flush(p *peer, ino sealfs.Ino) {
	if p.flushs[ino] {
		return
	}
	p.flushs[ino] = true
	it := item{ino: ino}
	p.begin(it)
	p.clock++
	c := &call{from: p, at: p.clock, change: true, subject: it, flush: true, era: p.eras[it]}
	c.ask = Ask{Session: p.id, Changes: []Change{{Ino: ino}}, Ino: ino, Write: true}
	s.there = append(s.there, c)
}

// watch sends a Watch.
func (s *sim) watch(p *peer) {
	p.seq++
	w := &watching{from: p, seq: p.seq, off: p.off}
	for ino := range p.gives {
		w.drops = append(w.drops, ino)
		p.gives[ino] = w.seq
	}
	if s.soft {
		clear(p.gives)
		for _, ino := range w.drops {
			p.floor[ino] = p.clock
		}
	}
	s.wthere = append(s.wthere, w)
	if !s.calm && s.rng.IntN(5) == 0 {
		twice := *w
		s.wthere = append(s.wthere, &twice)
	}
}

// carry has a client carry out one revocation, and reports whether it did.
func (s *sim) carry(p *peer) {
	if len(p.todo) == 0 {
		return
	}
	p.clock++
	r := p.todo[0]
	switch r.Kind {
	case op.RecallWrite:
		if p.dirty[r.Ino] || p.flushs[r.Ino] {
			s.flush(p, r.Ino) // comes back when it is answered
			return
		}
		delete(p.write, r.Ino)
		s.hits["recalled"]++
	case op.RevokeInode:
		if p.dirty[r.Ino] {
			s.fail("session %d loses what it delayed", p.id)
		}
		p.forget(r.Ino)
	case op.RevokeName:
		delete(p.knows, item{r.Ino, r.Name})
		delete(p.knows, item{ino: r.Ino})
		s.hits["named"]++
	case op.RevokeOwn:
		delete(p.knows, item{r.Ino, r.Name})
		delete(p.knows, item{ino: r.Ino})
		s.hits["own"]++
	}
	p.seen[r.Ino] = r.Num
	p.off = r.Num
	p.todo = p.todo[1:]
}

// watched brings the answer to a Watch to its client.
func (s *sim) watched(w *watching) {
	p := w.from
	if p.ended {
		return
	}
	p.clock++
	if w.err != nil {
		s.fail("watch of session %d: %v", p.id, w.err)
		return
	}
	last := p.off
	if n := len(p.todo); n > 0 {
		last = p.todo[n-1].Num
	}
	for _, r := range w.revs {
		if r.Num > last {
			p.todo = append(p.todo, r)
			last = r.Num
		}
	}
	for _, ino := range w.drops {
		// As long as a newer one is on its way the server may hear of it again.
		if last, ok := p.gives[ino]; ok && (last == w.seq || s.hasty) {
			delete(p.gives, ino)
			p.floor[ino] = p.clock
			s.hits["dropped"]++
		}
	}
}

// end ends a session, at the server and in the world.
func (s *sim) end(k int) {
	p := s.peers[k]
	p.ended = true
	s.peers = append(s.peers[:k], s.peers[k+1:]...)
	s.t.End(func(at sealfs.Session) bool { return at == p.id })
	s.hits["ended"]++
	s.join()
}

func take[T any](s *sim, list *[]T) (x T, ok bool) {
	if len(*list) == 0 {
		return x, false
	}
	k := s.rng.IntN(len(*list))
	x = (*list)[k]
	*list = append((*list)[:k:k], (*list)[k+1:]...)
	return x, true
}

// step does one random thing.
func (s *sim) step() {
	p := s.peers[s.rng.IntN(len(s.peers))]
	switch k := s.rng.IntN(20); {
	case k < 4:
		if !s.calm && !p.paused && len(s.there)+len(s.blocked)+len(s.back) < 12 {
			s.start(p)
		}
	case k < 6:
		if !p.paused && !s.calm {
			s.use(p)
		}
	case k < 9:
		if c, ok := take(s, &s.there); ok {
			s.serve(c)
		}
	case k < 11:
		for i, c := range s.blocked {
			if c.ready || c.from.ended {
				s.blocked = append(s.blocked[:i:i], s.blocked[i+1:]...)
				s.serve(c)
				break
			}
		}
	case k < 13:
		if c, ok := take(s, &s.back); ok {
			if c.from.paused {
				s.back = append(s.back, c)
				return
			}
			s.answered(c)
		}
	case k < 14:
		if !p.paused && len(s.wthere)+len(s.wserver)+len(s.wback) < 10 {
			s.watch(p)
		}
	case k < 15:
		w, ok := take(s, &s.wthere)
		switch {
		case !ok:
		case !s.calm && s.rng.IntN(6) == 0: // lost
		case !s.calm && s.rng.IntN(4) == 0: // late
			s.wthere = append(s.wthere, w)
		default:
			w.w, w.err = s.t.Watch(w.from.id, w.seq, w.off, w.drops, func() {})
			if w.err != nil {
				if !w.from.ended || !errors.Is(w.err, sealfs.ErrSession) {
					s.fail("watch of session %d: %v", w.from.id, w.err)
				}
				return
			}
			s.wserver = append(s.wserver, w)
		}
	case k < 17:
		if w, ok := take(s, &s.wserver); ok {
			var wait bool
			if w.revs, w.stamp, wait, w.err = s.t.Poll(w.w, nil); wait && s.rng.IntN(4) != 0 {
				s.wserver = append(s.wserver, w)
			} else {
				s.wback = append(s.wback, w)
			}
		}
	case k < 18:
		if w, ok := take(s, &s.wback); ok && (s.calm || s.rng.IntN(6) != 0) {
			if w.from.paused {
				s.wback = append(s.wback, w)
				return
			}
			s.watched(w)
		}
	case k < 19:
		if !p.paused {
			s.carry(p)
		}
	default:
		switch {
		case s.calm:
			p.paused = false
		case s.rng.IntN(40) == 0:
			s.end(s.rng.IntN(len(s.peers)))
		default:
			p.paused = s.rng.IntN(4) == 0
		}
	}
	s.judge()
}

// judge fails if anybody believes what is not true.
func (s *sim) judge() {
	for _, p := range s.peers {
		for it, b := range p.knows {
			if p.own[it] == 0 && b.value != s.value[it] {
				s.fail("session %d believes %d of %v, which is %d", p.id, b.value, it, s.value[it])
			}
			for _, o := range s.peers {
				if o != p && o.write[it.ino] {
					s.fail("session %d believes something of %d, for which session %d delays writes", p.id, it.ino, o.id)
				}
			}
		}
	}
}

// run lets n things happen, then everything come to rest.
func (s *sim) run(n int) error {
	for range n {
		if s.step(); s.err != nil {
			return s.err
		}
	}
	s.calm = true
	for range 40 * n {
		if len(s.there)+len(s.blocked)+len(s.back) == 0 {
			break
		}
		if s.step(); s.err != nil {
			return s.err
		}
	}
	if len(s.blocked) > 0 {
		return fmt.Errorf("%d requests wait for ever", len(s.blocked))
	}
	if st := s.t.Stats(); st.Waiting != 0 {
		return fmt.Errorf("%d tickets are left", st.Waiting)
	}
	for ino, in := range s.t.inodes {
		if in.waits != 0 {
			return fmt.Errorf("inode %d is kept from everybody", ino)
		}
	}
	return nil
}

// TestSimulate: whatever the network and the clients do, nobody believes what is
// not true, and nobody waits for ever.
func TestSimulate(t *testing.T) {
	seeds, steps := uint64(150), 3000
	switch {
	case *oneSeed != 0:
		if err := newSim(*oneSeed).run(steps); err != nil {
			t.Errorf("seed %d: %v", *oneSeed, err)
		}
		return
	case *seedCount != 0:
		seeds = uint64(*seedCount)
		defer func() {
			bad := 0
			if t.Failed() {
				bad = 1
			}
			// Its steps take no time.
			fmt.Printf("simulated: seeds=%d hours=0 violations=%d\n", seeds, bad)
		}()
	case testing.Short():
		seeds = 25
	}
	hits := map[string]int{}
	for seed := range seeds {
		s := newSim(seed)
		if err := s.run(steps); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		for k, n := range s.hits {
			hits[k] += n
		}
	}
	t.Log(hits)
	for _, k := range []string{"blocked", "told", "overtaken", "believed", "write", "delayed", "recalled", "named", "own", "dropped", "ended"} {
		if hits[k] < int(seeds)/20 {
			t.Errorf("%q happened %d times only", k, hits[k])
		}
	}
}

// TestSimulateFinds: each rule that is broken is found by the simulation.
func TestSimulateFinds(t *testing.T) {
	for name, plant := range map[string]func(*sim){
		"a grant while a change waits":                    func(s *sim) { s.t.faults = faultGrantWaiting },
		"a grant while a revocation is under way":         func(s *sim) { s.t.faults = faultGrantPending },
		"a revocation that counts when it is sent":        func(s *sim) { s.t.faults = faultAckSent },
		"names that need not be given back":               func(s *sim) { s.t.faults = faultForgetNames },
		"Write beside others":                             func(s *sim) { s.t.faults = faultShareWrite },
		"a late Watch that drops what was granted since":  func(s *sim) { s.t.faults = faultLateWatch },
		"a client that does not compare stamps":           func(s *sim) { s.nostamp = true },
		"a client whose drop is heard once more":          func(s *sim) { s.hasty = true },
		"a client that believes before its drop is heard": func(s *sim) { s.soft = true },
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(2000) {
				s := newSim(seed)
				plant(s)
				if err := s.run(3000); err != nil {
					t.Logf("seed %d: %v", seed, err)
					return
				}
			}
			t.Error("nobody notices")
		})
	}
}
