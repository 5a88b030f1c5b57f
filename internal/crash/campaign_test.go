package crash

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"
)

var (
	replayed  = flag.String("replay", "", "state to judge again: sequence/seed/life/moment/choice[/moment/choice]")
	share     = flag.Int("share", 0, "states that TestWorker judges")
	budget    = flag.Int("budget", 0, "states of one life of which all subsets are judged")
	part      = flag.Int("part", 0, "number of this worker")
	of        = flag.Int("of", 1, "number of workers")
	sample    = flag.Bool("sample", false, "judge a sample of each moment's states")
	stop      = flag.Bool("stop", false, "end at the first violation")
	limit     = flag.Duration("limit", 0, "end after this time")
	firstSeqs = flag.String("first", "", "sequences to begin with")
	trailPath = flag.String("trail", "", "file that always names the state which is being judged")
)

// place names a state, so that it can be judged again.
type place struct {
	seq   string
	seed  uint64
	life  int
	at    int // number of the moment; -1: what the life began with
	end   end
	keep  choice
	again int // number of the moment in the recovery, -1: none
	keep2 choice
}

func (p *place) String() string {
	s := fmt.Sprintf("%s/%d/%d/%d/", p.seq, p.seed, p.life, p.at)
	if p.end != 0 && p.end != power {
		s += string(p.end) + ":"
	}
	s += p.keep.String()
	if p.again >= 0 {
		s += fmt.Sprintf("/%d/%v", p.again, p.keep2)
	}
	return s
}

func parsePlace(s string) (*place, error) {
	f := strings.Split(s, "/")
	if len(f) != 5 && len(f) != 7 {
		return nil, fmt.Errorf("%q is not sequence/seed/life/moment/choice[/moment/choice]", s)
	}
	p := &place{seq: f[0], end: power, again: -1}
	if how, rest, found := strings.Cut(f[4], ":"); found && how != "" {
		p.end, f[4] = end(how[0]), rest
	}
	p.keep = parseChoice(f[4])
	var errs [4]error
	p.seed, errs[0] = strconv.ParseUint(f[1], 10, 64)
	p.life, errs[1] = strconv.Atoi(f[2])
	p.at, errs[2] = strconv.Atoi(f[3])
	if len(f) == 7 {
		p.again, errs[3] = strconv.Atoi(f[5])
		p.keep2 = parseChoice(f[6])
	}
	return p, errors.Join(errs[:]...)
}

// violation is a state that should not be.
type violation struct {
	place
	mo  *moment // nil: the script itself failed
	err error
}

func (v *violation) Error() string {
	if v.mo == nil {
		return fmt.Sprintf("crash: VIOLATION in the script of sequence %s, seed %d, life %d: %v", v.seq, v.seed, v.life, v.err)
	}
	return fmt.Sprintf("crash: VIOLATION sequence %s, seed %d, life %d, moment %d (%s; %d operations begun, synced %v, trace %#x), choice %v: %v\ncrash: replay with -replay=%v",
		v.seq, v.seed, v.life, v.at, v.mo.what, v.mo.begun, v.mo.synced, v.mo.trace, v.keep, v.err, &v.place)
}

// campaign judges states.
type campaign struct {
	t       *testing.T
	full    bool // all subsets, else some of each moment
	budget  int  // of states of a life; what comes beyond is sampled even so
	per     int  // these
	quick   bool // only live, and judge what a life ends with
	goal    int  // ends when so many states are judged
	until   time.Time
	stop    bool // at the first violation
	states  int
	nested  int
	lost    int // regions that were made again
	moments int
	found   []*violation
	watch   *time.Timer
	told    time.Time
	trail   *os.File
}

// over reports whether the campaign is.
func (c *campaign) over() bool {
	return c.states >= c.goal || c.stop && len(c.found) > 0 || !c.until.IsZero() && time.Now().After(c.until)
}

func (c *campaign) violated(v *violation) {
	c.found = append(c.found, v)
	fmt.Println(v.Error())
}

// note tells whoever looks after a process that has died what it was busy with.
func (c *campaign) note(what any) {
	if c.watch != nil {
		c.watch.Reset(hang)
	}
	if c.trail != nil {
		line := fmt.Sprintf("%-200v", what)
		c.trail.WriteAt([]byte(line), 0)
	}
}

// progress says now and then where the campaign stands, to who conducts it.
func (c *campaign) progress(p *place) {
	if c.watch != nil && time.Since(c.told) > 5*time.Second {
		c.told = time.Now()
		fmt.Printf("crash: progress %d %d sequence %s, seed %d, life %d, moment %d\n", c.states, len(c.found), p.seq, p.seed, p.life, p.at)
	}
}

// hang is how long a state may take to be judged.
const hang = time.Minute

// unit lives the lives of one sequence with one seed and judges them.
func (c *campaign) unit(seq *sequence, seed uint64) {
	p := place{seq: seq.name, seed: seed, again: -1, at: -1}
	c.note(&p)
	r, err := newRun(c.t, seq, seed)
	if err != nil {
		c.violated(&violation{place: p, err: err})
		return
	}
	for p.life = range seq.lives {
		p.at = -1
		c.note(&p)
		l, err := r.live()
		if err != nil {
			c.violated(&violation{place: p, err: err})
			return
		}
		if !c.quick {
			c.life(r, l, p)
		}
		if c.over() || p.life == seq.lives-1 {
			return
		}
		if err := c.advance(r, l, p); err != nil {
			return
		}
	}
}

// replay judges one state again.
func replay(t *testing.T, p *place) error {
	seq := sequenceNamed(p.seq)
	if seq == nil {
		return fmt.Errorf("there is no sequence %q", p.seq)
	}
	c := &campaign{t: t, goal: 1 << 60}
	r, err := newRun(t, seq, p.seed)
	if err != nil {
		return err
	}
	for n := 0; ; n++ {
		l, err := r.live()
		if err != nil || n == p.life && p.at < 0 {
			return err
		}
		if n < p.life {
			if err := c.advance(r, l, place{seq: p.seq, seed: p.seed, life: n}); err != nil {
				return err
			}
			continue
		}
		if p.at >= len(l.moments) {
			return fmt.Errorf("life %d has only %d moments", n, len(l.moments))
		}
		return c.again(r, l, p)
	}
}

// again judges the state of a life that p names.
func (c *campaign) again(r *run, l *life, p *place) error {
	mo := &l.moments[p.at]
	cuts := mo.cuts()
	if !cuts.fits(p.keep) {
		return fmt.Errorf("moment %d (%s) does not have what %v chooses from", p.at, mo.what, p.keep)
	}
	c.t.Logf("moment %d: %s; %d operations begun, synced %v, trace %#x", p.at, mo.what, mo.begun, mo.synced, mo.trace)
	for k := range l.h.done[:mo.begun] {
		c.t.Logf("operation %d: %v", k+1, &l.h.done[k])
	}
	for m := range cuts.at {
		for i, sector := range cuts.at[m] {
			c.t.Logf("%s: sector %d (byte %d): version %d of %d", mo.m[m].Name(), sector, sector*512, p.keep[m][i], cuts.of[m].Versions(i))
		}
	}
	cl := l.claim.at(mo)
	var rec *recorder
	if p.again >= 0 {
		rec = &recorder{keep: func(n int) bool { return n == p.again }}
	}
	first := cl
	if p.end == kill {
		first = l.claim.killed(mo)
	}
	m, rings := mo.left(cuts, p.keep, p.end)
	at, err := r.seq.g.verdict(c.t, m, rings, first, rec)
	c.t.Logf("found positions %v: %v", at, err)
	if err == nil {
		err = c.lose(r, mo, cuts, p.keep, p.end, first, p.key(mo, cuts))
	}
	if err != nil || rec == nil {
		return err
	}
	if len(rec.moments) == 0 {
		return fmt.Errorf("the recovery has no moment %d", p.again)
	}
	of := rec.moments[0].cuts()
	if !of.fits(p.keep2) {
		return fmt.Errorf("moment %d of the recovery (%s) does not have what %v chooses from", p.again, rec.moments[0].what, p.keep2)
	}
	if _, err = r.seq.g.verdict(c.t, of.state(p.keep2), nil, cl, nil); err != nil {
		return err
	}
	return c.lose(r, &rec.moments[0], of, p.keep2, power, cl, rec.moments[0].key(of, p.keep2))
}

// key identifies the state of a moment that p names, within a life.
func (p *place) key(mo *moment, cuts *cuts) uint64 {
	if p.end == power {
		return mo.key(cuts, p.keep)
	}
	return uint64(p.at)<<8 | uint64(p.end)
}

// lose judges a state without its regions.
func (c *campaign) lose(r *run, mo *moment, cuts *cuts, ch choice, how end, cl *claim, key uint64) error {
	if !r.seq.far {
		return nil
	}
	copied, err := cuts.copied(&r.seq.g)
	if err != nil {
		return err
	}
	m, rings := mo.left(cuts, ch, how)
	n, err := r.seq.g.lost(c.t, m, rings, cl, copied, rand.New(rand.NewPCG(r.seed, key)))
	c.states += n
	c.lost += n
	if err != nil {
		return fmt.Errorf("without the regions: %w", err)
	}
	return nil
}

// life judges the moments of a life.
func (c *campaign) life(r *run, l *life, p place) {
	c.moments += len(l.moments)
	judged := map[uint64]bool{}
	rng := r.rngFor(4)
	begin := c.states
	for i := range l.moments {
		mo := &l.moments[i]
		cuts := mo.cuts()
		each := func(ch choice) bool {
			key := mo.key(cuts, ch)
			if judged[key] {
				return true
			}
			judged[key] = true
			p.at, p.keep, p.end, p.again = i, ch, power, -1
			c.judge(r, l, mo, cuts, p, key)
			return !c.over()
		}
		if mo.rings != nil {
			for _, how := range []end{kill, oldRing} {
				p.at, p.keep, p.end, p.again = i, cuts.random(rng), how, -1
				c.judge(r, l, mo, cuts, p, p.key(mo, cuts))
				if c.over() {
					return
				}
			}
		}
		if c.full && (c.budget == 0 || c.states-begin < c.budget) {
			cuts.every(rng, each)
		} else {
			cuts.some(rng, c.per, each)
		}
		if c.over() {
			return
		}
	}
}

// nestedOf is how many states it takes until a recovery is cut itself.
const nestedOf = 5

// judge judges one state, and of some also states within their recovery.
func (c *campaign) judge(r *run, l *life, mo *moment, cuts *cuts, p place, key uint64) []position {
	c.note(&p)
	c.states++
	c.progress(&p)
	cl := l.claim.at(mo)
	var again *recorder
	rng := rand.New(rand.NewPCG(r.seed, key))
	first, often := cl, nestedOf
	if p.end == kill {
		first, often = l.claim.killed(mo), 1
	}
	if rng.IntN(often) == 0 {
		a, b := rng.IntN(20), rng.IntN(20)
		again = &recorder{keep: func(n int) bool { return n == a || n == b }}
	}
	m, rings := mo.left(cuts, p.keep, p.end)
	at, err := r.seq.g.verdict(c.t, m, rings, first, again)
	if err != nil {
		c.violated(&violation{p, mo, err})
		return nil
	}
	if key%lostOf == 0 {
		if err := c.lose(r, mo, cuts, p.keep, p.end, first, key); err != nil {
			c.violated(&violation{p, mo, err})
			return nil
		}
	}
	if again != nil {
		for i := range again.moments {
			sub := &again.moments[i]
			of := sub.cuts()
			of.some(rng, 2, func(ch choice) bool {
				p.again, p.keep2 = sub.no, ch
				c.note(&p)
				c.states++
				c.nested++
				_, err := r.seq.g.verdict(c.t, of.state(ch), nil, cl, nil)
				if key2 := sub.key(of, ch); err == nil && key2%lostOf2 == 0 {
					err = c.lose(r, sub, of, ch, power, cl, key2)
				}
				if err != nil {
					c.violated(&violation{p, mo, fmt.Errorf("after a second cut at %s: %w", sub.what, err)})
				}
				return !c.over()
			})
		}
	}
	return at
}

// advance ends a life by one of its states, with which the next begins.
func (c *campaign) advance(r *run, l *life, p place) error {
	rng := r.rngFor(3)
	for range 100 {
		i := len(l.moments) - 1 - rng.IntN((len(l.moments)+2)/3)
		mo := &l.moments[i]
		cuts := mo.cuts()
		var ch choice
		cuts.some(rng, 1, func(x choice) bool { ch = x; return true })
		p.at, p.keep, p.end, p.again = i, ch, power, -1
		c.note(&p)
		cl := l.claim.at(mo)
		c.states++
		at, err := r.seq.g.verdict(c.t, cuts.state(ch), nil, cl, nil)
		if err != nil {
			c.violated(&violation{p, mo, err})
			return err
		}
		whole := true
		for _, x := range at {
			whole = whole && x%2 == 0
		}
		if whole {
			return r.next(l, at, cuts.state(ch), mo.clock)
		}
	}
	return fmt.Errorf("no cut of life %d ends between two operations", p.life)
}

// alone keeps the campaign to one processor: there is a process for each, and the
// goroutines of a simulation take turns anyway.
func alone(t *testing.T) {
	procs, percent := runtime.GOMAXPROCS(1), debug.SetGCPercent(400)
	t.Cleanup(func() {
		runtime.GOMAXPROCS(procs)
		debug.SetGCPercent(percent)
	})
}

// TestCampaign judges a sample of the states that `make crash` judges.
func TestCampaign(t *testing.T) {
	alone(t)
	goal := 5000
	if testing.Short() {
		goal = 600
	}
	c := &campaign{t: t, per: 2}
	for seed := uint64(1); c.states < goal; seed++ {
		begin := c.states
		for i := range sequences { // each has its part
			c.goal = begin + (goal-begin)*(i+1)/len(sequences)
			c.unit(&sequences[i], seed)
		}
	}
	for _, v := range c.found {
		t.Error(v)
	}
	t.Logf("%d states at %d moments, %d of them of a second cut, %d of regions that were made again", c.states, c.moments, c.nested, c.lost)
	if c.lost == 0 {
		t.Error("no region was made again")
	}
}

// TestLives: lives come to their end, whatever is under way then: a file's chunks may
// be being purged.
func TestLives(t *testing.T) {
	alone(t)
	c := &campaign{t: t, goal: 1 << 60, quick: true}
	for seed := range uint64(10) {
		c.unit(sequenceNamed("chunks"), seed)
	}
	for _, v := range c.found {
		t.Error(v)
	}
}

// TestReplay judges the state that -replay names.
func TestReplay(t *testing.T) {
	if *replayed == "" {
		t.Skip("no -replay")
	}
	alone(t)
	p, err := parsePlace(*replayed)
	if err != nil {
		t.Fatal(err)
	}
	if err := replay(t, p); err != nil {
		t.Error(err)
	}
}

// TestWorker is a part of the campaign of `make crash`, in a process of its own.
func TestWorker(t *testing.T) {
	if *share == 0 {
		t.Skip("no -share")
	}
	alone(t)
	c := &campaign{t: t, full: !*sample, per: 4, goal: *share, stop: *stop, budget: *budget}
	if *limit > 0 {
		c.until = time.Now().Add(*limit)
	}
	if *trailPath != "" {
		f, err := os.OpenFile(*trailPath, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		c.trail = f
	}
	c.watch = time.AfterFunc(hang, func() { panic("crash: a state is not judged within " + hang.String()) })
	defer c.watch.Stop()
	var first []*sequence
	for name := range strings.FieldsFuncSeq(*firstSeqs, func(r rune) bool { return r == ',' }) {
		first = append(first, sequenceNamed(name))
	}
	// What shows in the lives themselves needs many seeds, and is found soon.
	for seed := uint64(1); *stop && seed <= 20 && !c.over(); seed++ {
		for _, seq := range first {
			c.quick = true
			c.unit(seq, seed)
		}
	}
	c.quick = false
	for named, n := 0, *part; ; {
		if c.goal = *share; c.over() {
			break
		}
		if *budget > 0 { // each sequence has its part
			c.goal = min(*share, c.states+max(1, *share**of/len(sequences)))
		}
		// Each process has seeds of its own. What is named comes first, and then every
		// other time.
		seq, seed := &sequences[n%len(sequences)], uint64(1+n/len(sequences))
		if len(first) > 0 && (named < len(first) || named <= n) {
			seq, seed = first[named%len(first)], uint64(1+named/len(first))
			named++
		} else {
			n += *of
		}
		c.unit(seq, seed)
	}
	fmt.Printf("crash: progress %d %d done, %d moments, %d cuts within recoveries, %d regions made again\n", c.states, len(c.found), c.moments, c.nested, c.lost)
	if len(c.found) > 0 {
		t.Fail()
	}
}
