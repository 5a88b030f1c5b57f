package txn_test

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

var (
	oneSeed   = flag.Uint64("seed", 0, "simulate this seed alone, and tell what happens")
	seedCount = flag.Int("seeds", 0, "how many seeds to simulate")
	firstSeed = flag.Uint64("first", 1, "the first of them")
)

// sabotage is what the driver does wrong, to see whether anybody notices.
type sabotage struct {
	voteEarly      bool // the vote is given before it is durable
	answerEarly    bool // the parties and the client hear of a decision before it is durable
	forgetEarly    bool // a decision is forgotten before the commits are durable
	forgetUnheard  bool // a decision is forgotten before all parties have heard of it
	finishBlind    bool // the life of a party that committed is not compared with that of the one that synced
	resolveAborted bool // a transaction under way is answered to have been aborted
	presumedCommit bool // a transaction that is not known is answered to have been committed
	commitTwice    bool // a Commit that comes twice is executed twice
	latePrepare    bool // the connection doubles a Prepare after the outcome
	noNameLocks    bool // names that are prepared are not locked
	noLinkLocks    bool // inodes that are prepared are not locked
	noEmptyLocks   bool // a directory may be removed in which a name is prepared
	noVolumeLock   bool // directories are moved without the volume's lock
	noWalk         bool // directories are moved below themselves
	noWaitDie      bool // who is in the way of an older transaction waits
	walkWaits      bool // questions of a transaction wait for older ones
	locksLost      bool // a restart forgets what is prepared
	stalePlan      bool // the decision is not compared with the plan
	stuckLocal     bool // an operation that has become local is planned again and again
	planBlind      bool // a plan is made from names that transactions have in hand
	dirsUnlocked   bool // a directory's attributes are told while names of it are in hand
	refuseBlind    bool // a refusal is believed though the plan does not hold any more
	sameBlind      bool // two names of an inode that were seen at different times are the same
	questionsPass  bool // transactions that come after a question are not in its way
	retriesOverlap bool // two requests for the same change run side by side
}

// client does one or two operations at a time, and asks until they are answered.
type client struct {
	s       *sim
	id      int
	session sealfs.Session
	seq     uint64
	open    []uint64 // those that are not answered
	left    int      // operations in the quiet at the end
	pause   int64    // between operations, at most
}

func newSim(seed uint64, bad sabotage, keep bool) *sim {
	s := &sim{seed: seed, rng: rand.New(rand.NewPCG(seed, 2)), bad: bad, now: epoch, cut: map[[2]int]int64{}, kept: keep}
	r := s.rng
	s.shards = uint32(8) << r.IntN(2)
	s.history = history{calls: map[[2]uint64]*call{}, settled: map[op.Tx]bool{}}
	for i := range 2 + r.IntN(4) {
		s.servers = append(s.servers, &server{s: s, id: i, skew: s.between(-20*milli, 20*milli)})
	}
	for i := range 2 + r.IntN(5) {
		s.clients = append(s.clients, &client{s: s, id: len(s.servers) + i, session: sealfs.Session(i + 1), left: 12})
	}
	for _, at := range s.servers {
		at.start()
	}
	s.makeRoot()
	s.planFaults()
	for _, c := range s.clients {
		c.pause = (s.faultsEnd - s.now) / (10 + r.Int64N(20))
		for range 1 + r.IntN(2) {
			s.after(s.between(0, 10*milli), nil, c.next)
		}
	}
	return s
}

// makeRoot makes the root directory, durably.
func (s *sim) makeRoot() {
	shard := sealfs.Shard(s.rng.IntN(int(s.shards)))
	at := s.home(shard)
	req := op.Request{Type: op.MakeRoot, Shard: shard, Volume: volume, Mode: 0o755, Time: s.now}
	var rep op.Reply
	if _, err := at.proc.update(&req, &rep, nil); err != nil {
		s.fail("root: %v", err)
		return
	}
	at.durable = len(at.log)
	s.root = rep.Attr.Ino
	s.names = newNames(s.root)
}

// dirs and files return what there is, in a stable order.
func (s *sim) inodes(dirs bool) []sealfs.Ino {
	var list []sealfs.Ino
	for ino, n := range s.names {
		if n.dir == dirs {
			list = append(list, ino)
		}
	}
	slices.Sort(list)
	return list
}

// next begins the client's next operation.
func (c *client) next() {
	s := c.s
	switch {
	case s.faulty():
	case s.now < s.calm:
		s.after(s.calm-s.now+s.between(0, milli), nil, c.next)
		return
	case c.left == 0:
		return
	default:
		c.left--
	}
	req := c.pick()
	if req.Type == op.Sync {
		s.send(c.id, nil, s.within(nil, 3*sec, nil), &req, func(*op.Reply, error) { s.after(c.think(), nil, c.next) })
		return
	}
	o := &call{by: c, req: req, began: s.now}
	s.begin(o)
	s.logf("client: %s", describe(&o.req))
	again := 5 * milli
	var send func()
	send = func() {
		limit := s.between(20*milli, 2*sec)
		if !s.faulty() {
			limit = 100 * sec
		}
		s.send(c.id, nil, s.within(nil, limit, nil), &o.req, func(rep *op.Reply, err error) {
			if err != nil || o.seen != nil && rep.Code == sealfs.ErrUnavailable {
				s.after(s.between(0, again), nil, send)
				again = min(2*again, 200*milli)
				return
			}
			s.logf("client: %s is answered %d, inode %d", describe(&o.req), rep.Code, rep.Attr.Ino)
			c.open = slices.DeleteFunc(c.open, func(seq uint64) bool { return seq == o.req.Seq })
			s.answered(o, rep)
			s.after(c.think(), nil, c.next)
		})
	}
	send()
}

// think returns how long the client rests.
func (c *client) think() int64 {
	if c.s.faulty() && c.s.rng.IntN(2) == 0 {
		return c.s.between(0, 2*c.pause)
	}
	return c.s.between(0, milli)
}

// pick makes up an operation.
func (c *client) pick() op.Request {
	s, r := c.s, c.s.rng
	dirs, files := s.inodes(true), s.inodes(false)
	dir := func() sealfs.Ino { return dirs[r.IntN(min(len(dirs), s.crowd))] }
	name := func() string { return string(rune('a' + r.IntN(1+s.crowd/2))) }
	req := op.Request{Dir: dir(), Name: name(), Mode: 0o755, Volume: volume}
	if r.IntN(3) > 0 { // a name that is there, if there is one
		if d := s.names[req.Dir]; len(d.entries) > 0 {
			var list []string
			for n := range d.entries {
				list = append(list, n)
			}
			slices.Sort(list)
			req.Name = list[r.IntN(len(list))]
		}
	}
	switch n := r.IntN(100); {
	case n < 14:
		req.Type, req.Flags, req.Name = op.Create, op.Excl, name()
	case n < 32:
		req.Type, req.Shard2, req.Name = op.Mkdir, sealfs.Shard(r.IntN(int(s.shards))), name()
	case n < 39:
		req.Type = op.Rmdir
	case n < 48:
		req.Type = op.Unlink
	case n < 57 && len(files) > 0:
		req.Type, req.Ino, req.Name = op.Link, files[r.IntN(len(files))], name()
	case n < 86:
		req.Type, req.Dir2, req.Name2 = op.Rename, dir(), name()
		if r.IntN(6) == 0 {
			req.Dir2 = req.Dir
		}
		req.Flags = []op.Flags{0, 0, 0, op.NoReplace, op.Exchange, op.Exchange}[r.IntN(6)]
	case n < 90:
		req.Type = op.Lookup
	case n < 93:
		req.Type, req.Name, req.Len = op.Readdir, "", 1<<20
	case n < 98:
		req = op.Request{Type: op.Getattr, Ino: append(files, dirs...)[r.IntN(len(files)+len(dirs))], Volume: volume}
	default:
		return op.Request{Type: op.Sync, Shard: sealfs.Shard(r.IntN(int(s.shards)))}
	}
	at := req.Dir
	if at == 0 {
		at = req.Ino
	}
	req.Shard = at.Home(s.shards)
	if req.Type.Changes() {
		c.seq++
		c.open = append(c.open, c.seq) // in ascending order
		req.Session, req.Seq, req.Low = c.session, c.seq, c.open[0]
	}
	return req
}

// simulate runs a seed to its end and returns what was found.
func simulate(seed uint64, bad sabotage, keep bool) (*sim, error) {
	s := newSim(seed, bad, keep)
	idle := func() bool {
		return len(s.pending) == 0 && !slices.ContainsFunc(s.clients, func(c *client) bool { return c.left > 0 })
	}
	s.run(epoch+120*sec, idle)
	if s.failed == nil && !idle() {
		for _, c := range s.pending {
			s.logf("never answered: %s", describe(&c.req))
		}
		s.fail("%d operations are never answered", len(s.pending))
	}
	limit := max(s.now, s.faultsEnd) + 30*sec
	s.run(limit, func() bool { return !s.faulty() && s.settledAll() })
	if s.failed == nil {
		s.check()
	}
	return s, s.failed
}

// settledAll reports whether no transaction is left anywhere.
func (s *sim) settledAll() bool {
	for _, at := range s.servers {
		if at.proc == nil || !at.proc.locks.Empty() || len(at.proc.todo) > 0 {
			return false
		}
	}
	return s.rows() == 0
}

// rows counts the rows of transactions.
func (s *sim) rows() (n int) {
	for _, at := range s.servers {
		for shard := range s.shards {
			err := meta.Prepared(at.proc.region, sealfs.Shard(shard), func(*op.Request) { n++ })
			if err == nil {
				err = meta.Decisions(at.proc.region, sealfs.Shard(shard), func(op.Tx, meta.Decision) { n++ })
			}
			if err != nil {
				s.fail("rows: %v", err)
			}
		}
	}
	return n
}

// check looks at the whole when all is quiet.
func (s *sim) check() {
	for _, at := range s.servers {
		if at.proc == nil {
			s.fail("server %d is down", at.id)
			return
		}
		if n := at.proc.locks.Len(); n > 0 {
			s.fail("server %d: %d transactions hold locks", at.id, n)
		}
	}
	if n := s.rows(); n > 0 {
		s.fail("%d rows of transactions are left", n)
	}
	var readers []pmem.Reader
	inodes := int64(0)
	for _, at := range s.servers {
		readers = append(readers, at.proc.region)
		if err := at.proc.region.Check(func(problem string) { s.fail("server %d: %s", at.id, problem) }); err != nil {
			s.fail("server %d: %v", at.id, err)
		}
		if err := meta.VolumeUsage(at.proc.region, s.shards, func(_ sealfs.Volume, _, n int64) { inodes += n }); err != nil {
			s.fail("server %d: %v", at.id, err)
		}
	}
	if err := meta.CheckAll(readers, meta.Config{Shards: s.shards}, func(problem string) { s.fail("check: %s", problem) }); err != nil {
		s.fail("check: %v", err)
	}
	if inodes != int64(len(s.names)) {
		s.fail("there are %d inodes, should be %d", inodes, len(s.names))
	}
	for _, ino := range append(s.inodes(true), s.inodes(false)...) {
		s.checkInode(ino, s.names[ino])
	}
	for _, c := range s.calls {
		if c.ended && c.code == 0 && c.event == nil && !c.unknown && !c.why.has(0) {
			s.fail("%s was answered and is not there", describe(&c.req))
		}
	}
}

func (s *sim) checkInode(ino sealfs.Ino, want *node) {
	p := s.home(ino.Home(s.shards)).proc
	var rep op.Reply
	req := op.Request{Type: op.Getattr, Ino: ino, Shard: ino.Home(s.shards), Volume: volume}
	if err := meta.Query(p.region, p.cfg, &req, &rep); err != nil || rep.Code != 0 {
		s.fail("inode %d: %v, code %v", ino, err, rep.Code)
		return
	}
	links := want.links
	if want.dir {
		links = 2 + want.subdirs
	}
	if rep.Attr.Nlink != links {
		s.fail("inode %d has %d links, should have %d", ino, rep.Attr.Nlink, links)
	}
	if !want.dir {
		return
	}
	req = op.Request{Type: op.Readdir, Dir: ino, Shard: ino.Home(s.shards), Volume: volume, Len: 1 << 20}
	if err := meta.Query(p.region, p.cfg, &req, &rep); err != nil || rep.Code != 0 {
		s.fail("directory %d: %v, code %v", ino, err, rep.Code)
		return
	}
	if len(rep.Entries) != len(want.entries) {
		s.fail("directory %d has %d entries, should have %d", ino, len(rep.Entries), len(want.entries))
	}
	for _, e := range rep.Entries {
		if want.entries[e.Name] != e.Ino {
			s.fail("%d/%s is %d, should be %d", ino, e.Name, e.Ino, want.entries[e.Name])
		}
	}
}

// tail returns the end of a trace.
func tail(b []byte, lines int) string {
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// TestSimulate simulates clusters of stores between which transactions run, while
// messages get lost, late and doubled, and servers die. With -args -seeds N it
// is a campaign; with -args -seed N it tells the story of one seed.
func TestSimulate(t *testing.T) {
	if *oneSeed != 0 {
		s, err := simulate(*oneSeed, sabotage{}, true)
		t.Logf("seed %d: %d servers, %d clients, %d answers, %d events\n%s", *oneSeed, len(s.servers), len(s.clients), s.done, len(s.events), s.trace.Bytes())
		if err != nil {
			t.Errorf("seed %d: %v", *oneSeed, err)
		}
		return
	}
	seeds := *seedCount
	if seeds == 0 {
		seeds = 200 / slower
	}
	var time int64
	bad := 0
	if *seedCount != 0 {
		defer func() {
			fmt.Printf("simulated: seeds=%d hours=%.1f violations=%d\n", seeds, float64(time)/float64(3600*sec), bad)
		}()
	}
	for n := range seeds {
		seed := *firstSeed + uint64(n)
		w, err := simulate(seed, sabotage{}, false)
		time += w.now - epoch
		if err != nil {
			bad++
			s, _ := simulate(seed, sabotage{}, true)
			t.Fatalf("seed %d: %v\nthe end of its trace (all of it: go test ./txn -v -run Simulate -args -seed %d):\n%s", seed, err, seed, tail(s.trace.Bytes(), 60))
		}
	}
}

// TestReplay makes sure that a seed tells the same story each time.
func TestReplay(t *testing.T) {
	for seed := range uint64(5) {
		a, err := simulate(seed+1, sabotage{}, true)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := simulate(seed+1, sabotage{}, true)
		if !bytes.Equal(a.trace.Bytes(), b.trace.Bytes()) || a.trace.Len() == 0 {
			t.Errorf("seed %d has two stories, of %d and %d bytes", seed+1, a.trace.Len(), b.trace.Len())
		}
	}
}

// TestTeeth makes sure that the simulator finds what is done wrong.
func TestTeeth(t *testing.T) {
	if slower > 1 {
		t.Skip("there is one goroutine, in which the race detector finds nothing")
	}
	for _, c := range []struct {
		name string
		bad  sabotage
		from uint64 // a seed not long before one that finds it
	}{
		{"vote before durable", sabotage{voteEarly: true}, 1},
		{"answer before the decision is durable", sabotage{answerEarly: true}, 6},
		{"forget before commits are durable", sabotage{forgetEarly: true}, 30},
		{"forget before all have heard", sabotage{forgetUnheard: true}, 1},
		{"a party lost its commit, then synced", sabotage{finishBlind: true}, 325},
		{"resolve answers aborted while active", sabotage{resolveAborted: true}, 20},
		{"presumed commit", sabotage{presumedCommit: true}, 1},
		{"commit applied twice", sabotage{commitTwice: true}, 1},
		{"prepare after the outcome", sabotage{latePrepare: true}, 30},
		{"no locks on names", sabotage{noNameLocks: true}, 1},
		{"no locks on inodes", sabotage{noLinkLocks: true}, 1},
		{"no locks on emptiness", sabotage{noEmptyLocks: true}, 40},
		{"no lock of the volume", sabotage{noVolumeLock: true}, 1},
		{"no walk", sabotage{noWalk: true}, 1},
		{"no wait-die", sabotage{noWaitDie: true}, 10},
		{"a walk waits for older ones", sabotage{walkWaits: true}, 40},
		{"locks lost at a restart", sabotage{locksLost: true}, 1},
		{"decision by a stale plan", sabotage{stalePlan: true}, 15},
		{"an operation becomes local", sabotage{stuckLocal: true}, 40},
		{"plan without regard to locks", sabotage{planBlind: true}, 225},
		{"attributes of directories without locks", sabotage{dirsUnlocked: true}, 40},
		{"refusal by a stale plan", sabotage{refuseBlind: true}, 6900},
		{"two names of different times", sabotage{sameBlind: true}, 420},
		{"questions pass by what comes later", sabotage{questionsPass: true}, 5750},
		{"retries overlap", sabotage{retriesOverlap: true}, 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			limit := 2000
			for n := range limit {
				if s, err := simulate(c.from+uint64(n), c.bad, false); err != nil {
					t.Logf("seed %d, %d servers: %v", s.seed, len(s.servers), err)
					return
				}
			}
			t.Errorf("%d seeds have found nothing", limit)
		})
	}
}
