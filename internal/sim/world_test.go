package sim

import (
	"bytes"
	"container/heap"
	"fmt"
	"math/rand/v2"
	"time"

	"sealfs"
	"sealfs/cluster/fencing"
	"sealfs/op"
)

// Times are milliseconds.
const (
	sec      = 1000
	termTime = 60 * sec // a session lives so long after it was renewed
	downTime = 10 * sec // without a heartbeat for so long a server is down
	items    = 6
	locks    = 2
)

// faults are rules that are broken, to see whether anybody notices.
type faults struct {
	noRecall      bool // a client acknowledges what it does not carry out
	noRestore     bool // a start forgets whose writes are delayed
	noGrace       bool // a start answers before sessions have come back
	longBelief    bool // a client believes though its session may have ended
	noFence       bool // a session ends before servers refuse it
	unattended    bool // a server that stood still takes changes of sessions at once
	noRows        bool // a start forgets what was answered
	noCalls       bool // retries overlap
	voteEarly     bool // a vote is forgotten by a start
	presumeCommit bool // who does not know a transaction says that it was committed
	noActive      bool // a transaction under way is said to be aborted
	noKeep        bool // prepared items are granted
}

// process is somebody whom events happen to.
type process struct {
	name   string
	life   int // events for another one are lost
	up     bool
	paused int64 // it stands still until then
}

type event struct {
	at, n int64
	of    *process // nil: the world
	life  int
	fn    func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].n < e[j].n
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	x := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return x
}

type world struct {
	rng     *rand.Rand
	bad     faults
	now     int64
	due     events
	n       int64
	quiet   int64 // from then on nothing goes wrong
	over    int64
	loss    float64
	double  float64
	slow    float64
	mgr     *manager
	servers []*server
	clients []*client
	txs     map[op.Tx]*[2]int // how often each half of a transaction has happened
	done    map[[3]uint64]int // how often a change has: server, session, number
	hits    map[string]int
	kept    bool
	trace   bytes.Buffer
	failed  error
}

func newWorld(seed uint64, bad faults, kept bool) *world {
	w := &world{
		rng: rand.New(rand.NewPCG(seed, 5)), bad: bad, kept: kept, over: 420 * sec, quiet: 250 * sec,
		txs: map[op.Tx]*[2]int{}, done: map[[3]uint64]int{}, hits: map[string]int{},
	}
	pick := func(of ...float64) float64 { return of[w.rng.IntN(len(of))] }
	w.loss, w.double, w.slow = pick(0, 0.01, 0.05), pick(0, 0.02), pick(0, 0.02)
	w.mgr = &manager{w: w, process: process{name: "manager", up: true}, next: 1, fences: fencing.New(2 * downTime * time.Millisecond)}
	w.mgr.live, w.mgr.beats = map[sealfs.Session]int64{}, map[int]int64{}
	for i := range 2 + w.rng.IntN(2) {
		s := &server{w: w, id: i, process: process{name: fmt.Sprint("server", i)}}
		s.value, s.locks, s.rows = map[int]int{}, map[int]sealfs.Session{}, map[[2]uint64]row{}
		s.lows = map[sealfs.Session]uint64{}
		s.prepared, s.decided = map[int]op.Tx{}, map[op.Tx]bool{}
		w.servers = append(w.servers, s)
	}
	w.after(nil, sec, w.mgr.look)
	for _, s := range w.servers {
		s.start()
	}
	for i := range 2 + w.rng.IntN(2) {
		c := &client{w: w, id: i, process: process{name: fmt.Sprint("client", i), up: true}}
		w.clients = append(w.clients, c)
		c.begin()
		w.after(&c.process, w.between(0, 500), c.work)
	}
	w.after(nil, w.between(0, 10*sec), w.trouble)
	return w
}

// after has fn called when delay has passed, if of lives the same life then; nil: in any case.
func (w *world) after(of *process, delay int64, fn func()) {
	w.n++
	e := event{at: w.now + delay, n: w.n, of: of, fn: fn}
	if of != nil {
		e.life = of.life
	}
	heap.Push(&w.due, e)
}

func (w *world) between(low, high int64) int64 { return low + w.rng.Int64N(high-low+1) }
func (w *world) chance(p float64) bool         { return p > 0 && w.rng.Float64() < p }

// run lets everything happen.
func (w *world) run() error {
	for w.failed == nil && len(w.due) > 0 && w.due[0].at <= w.over {
		e := heap.Pop(&w.due).(event)
		w.now = e.at
		if e.of != nil && (e.life != e.of.life || !e.of.up) {
			continue
		}
		if e.of != nil && e.of.paused > w.now {
			e.at = e.of.paused
			heap.Push(&w.due, e)
			continue
		}
		e.fn()
		for _, s := range w.servers {
			s.kick()
		}
		w.judge()
	}
	if w.failed == nil {
		w.finish()
	}
	return w.failed
}

func (w *world) logf(format string, args ...any) {
	if w.kept {
		fmt.Fprintf(&w.trace, "%9.3f s ", float64(w.now)/sec)
		fmt.Fprintf(&w.trace, format, args...)
		w.trace.WriteByte('\n')
	}
}

func (w *world) fail(format string, args ...any) {
	if w.failed == nil {
		w.failed = fmt.Errorf(format, args...)
		w.logf("FAILED: %v", w.failed)
	}
}

func (w *world) calm() bool { return w.now >= w.quiet }

// send brings a message to a process as it is now, perhaps never, late, or twice.
func (w *world) send(to *process, once bool, fn func()) {
	if !w.calm() && w.chance(w.loss) {
		w.logf("a message to %s is lost", to.name)
		return
	}
	times := 1
	if !once && !w.calm() && w.chance(w.double) {
		times = 2
	}
	for range times {
		delay := w.between(1, 5)
		if !w.calm() && w.chance(w.slow) {
			delay = w.between(1, 3*sec)
		}
		w.after(to, delay, fn)
	}
}

// trouble is what goes wrong besides messages.
func (w *world) trouble() {
	if w.calm() {
		return
	}
	switch w.rng.IntN(10) {
	case 0, 1, 2:
		s := w.servers[w.rng.IntN(len(w.servers))]
		s.die()
	case 3, 4:
		c := w.clients[w.rng.IntN(len(w.clients))]
		c.paused = w.now + []int64{300, 20 * sec, 100 * sec}[w.rng.IntN(3)]
		w.logf("%s stands still until %d ms", c.name, c.paused)
		w.hits["client paused"]++
	case 5, 6:
		s := w.servers[w.rng.IntN(len(w.servers))]
		s.paused = w.now + []int64{300, 5 * sec, 75 * sec}[w.rng.IntN(3)]
		w.logf("%s stands still until %d ms", s.name, s.paused)
		w.hits["server paused"]++
	case 7:
		w.mgr.fences = fencing.New(2 * downTime * time.Millisecond)
		for id := range w.mgr.live {
			w.mgr.live[id] = w.now
		}
		w.logf("another manager leads")
	default:
		c := w.clients[w.rng.IntN(len(w.clients))]
		s := w.servers[w.rng.IntN(len(w.servers))]
		c.broken(s)
	}
	w.after(nil, w.between(100, 15*sec), w.trouble)
}

// judge fails if anybody believes what is not true.
func (w *world) judge() {
	for _, c := range w.clients {
		if !c.believes() {
			continue
		}
		for i := range items {
			b, ok := c.knows[i]
			if !ok || c.own[i] > 0 {
				continue
			}
			if v := w.home(i).value[i]; b != v {
				w.fail("%s believes %d of item %d, which is %d", c.name, b, i, v)
			}
		}
	}
}

func (w *world) home(i int) *server { return w.servers[i%len(w.servers)] }

// delays reports whether another live session than sess has writes to i that it has answered and not sent.
func (w *world) delays(i int, sess sealfs.Session) *client {
	for _, c := range w.clients {
		if _, live := w.mgr.live[c.session]; live && c.session != sess && c.dirty[i] > 0 && w.now < c.until {
			return c
		}
	}
	return nil
}

// finish looks at what is left when all has been quiet.
func (w *world) finish() {
	for _, s := range w.servers {
		for i, tx := range s.prepared {
			w.fail("%s: transaction %d still has item %d in hand", s.name, tx.Age, i)
		}
		for _, p := range s.waiting {
			if w.now-p.since > termTime+20*sec {
				w.fail("%s: a call of session %d waits for ever", s.name, p.c.session)
			}
		}
	}
	for tx, n := range w.txs {
		if n[0] != n[1] || n[0] > 1 {
			w.fail("transaction %d: its halves have happened %d and %d times", tx.Age, n[0], n[1])
		}
	}
	for k, n := range w.done {
		if n > 1 {
			w.fail("change %d of session %d has happened %d times on server %d", k[2], k[1], n, k[0])
		}
	}
}

// manager knows the sessions.
type manager struct {
	process
	w      *world
	next   sealfs.Session
	live   map[sealfs.Session]int64 // when they were renewed
	beats  map[int]int64
	fences *fencing.Fences
}

func (m *manager) time() time.Time { return time.UnixMilli(m.w.now) }

func (m *manager) open() sealfs.Session {
	id := m.next
	m.next++
	m.live[id] = m.w.now
	return id
}

// renew is a client's sign of life.
func (m *manager) renew(id sealfs.Session) bool {
	if _, ok := m.live[id]; !ok || m.fences.Has(id) {
		return false
	}
	m.live[id] = m.w.now
	return true
}

// look ends sessions.
func (m *manager) look() {
	w := m.w
	w.after(nil, sec, m.look)
	var serving []sealfs.UUID
	for _, s := range w.servers {
		if w.now-m.beats[s.id] < downTime {
			serving = append(serving, s.uuid())
		}
	}
	for id := range m.next {
		at, live := m.live[id]
		if !live || w.now-at < termTime {
			continue
		}
		m.fences.Add(m.time(), id)
	}
	if w.bad.noFence {
		serving = nil
	}
	ended, _ := m.fences.Due(m.time(), serving)
	for _, id := range ended {
		w.logf("session %d has ended", id)
		w.hits["ended"]++
		delete(m.live, id)
	}
	m.fences.Over(ended)
}
