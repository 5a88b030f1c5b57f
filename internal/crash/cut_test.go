package crash

import (
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"sealfs/disk"
	"sealfs/internal/turn"
)

// exhaustive is up to how many pending sectors all subsets are judged.
const exhaustive = 12

// moment is the instant after a write, flush or discard: the power may go now.
type moment struct {
	no     int // among those of the life or recovery
	m      media
	rings  rings
	what   string // the operation of the medium
	begun  int    // operations of the script that had begun
	synced []int  // of each store, the last operation that was certainly durable
	trace  uint64 // hash of all operations of media in this life
	epochs []int  // flushes of each medium in this life
	clock  int64  // nanoseconds since 1970
}

// recorder takes the moments of a life, or of a recovery.
type recorder struct {
	g   *geometry // whose rings are noted, too; nil: none
	m   media
	rng *rand.Rand // of the time that operations take, in which others overtake them; nil: none

	mu      sync.Mutex // what goes on in the background has its own goroutines
	begun   int
	synced  []int
	trace   uint64
	epochs  []int
	moments []moment
	keep    func(n int) bool // whether to keep the nth moment; nil: all
	seen    int
}

// watch hooks into the media.
func (r *recorder) watch(m media) {
	r.m, r.epochs = m, make([]int, len(m))
	for i := range m {
		m[i].SetHook(func(o disk.Op) { r.hook(i, o) })
	}
}

// begin says that another operation of the script begins, durable that all up to it
// are on a store.
func (r *recorder) begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.begun++
}

func (r *recorder) durable(s int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.synced[s] = r.begun
}

func (r *recorder) hook(i int, o disk.Op) {
	if d := r.note(i, o); d > 0 {
		<-time.After(d)
	}
}

// note takes the moment, and returns how long the operation is to take.
func (r *recorder) note(i int, o disk.Op) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := fnv.New64a()
	fmt.Fprint(h, r.trace, i, o, time.Now().UnixNano())
	if o.Kind == disk.OpWrite {
		b := make([]byte, o.Len)
		r.m[i].ReadAt(b, o.Off)
		h.Write(b)
	}
	r.trace = h.Sum64()
	if o.Kind == disk.OpFlush {
		r.epochs[i]++
	}
	if r.keep == nil || r.keep(r.seen) {
		r.moments = append(r.moments, moment{
			no: r.seen, m: r.m.clone(), what: fmt.Sprintf("%s, %v", r.m[i].Name(), o), begun: r.begun, synced: append([]int(nil), r.synced...),
			rings: r.rings(), trace: r.trace, epochs: append([]int(nil), r.epochs...), clock: time.Now().UnixNano(),
		})
	}
	r.seen++
	if r.rng == nil || r.rng.IntN(3) != 0 {
		return 0
	}
	return time.Duration(r.rng.IntN(400)) * turn.Period
}

// taken returns the moments so far.
func (r *recorder) taken() []moment {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.moments)
}

func (r *recorder) rings() rings {
	if r.g == nil || r.g.dir == "" {
		return nil
	}
	return r.g.rings()
}

func (r *recorder) stop() {
	for _, d := range r.m {
		d.SetHook(nil)
	}
}

// end is how a life ends.
type end byte

// The ends: the power goes, the process is killed, or the power goes and there is a
// ring of an earlier boot afterwards.
const (
	power   end = 'p'
	kill    end = 'k'
	oldRing end = 'r'
)

// left returns what an end leaves.
func (mo *moment) left(c *cuts, ch choice, e end) (media, rings) {
	switch e {
	case kill:
		m := make(media, len(mo.m))
		for i := range m {
			m[i] = mo.m[i].Reopen()
		}
		return m, mo.rings
	case oldRing:
		return c.state(ch), mo.rings.rebooted()
	}
	return c.state(ch), nil
}

// choice says of every medium which version of each pending sector survived; see
// disk.Cut.
type choice [][]byte

func (c choice) String() string {
	var b strings.Builder
	for i, m := range c {
		if i > 0 {
			b.WriteByte(',')
		}
		for _, v := range m {
			b.WriteByte("0123456789abcdefghijklmnopqrstuvwxyz"[v])
		}
	}
	return b.String()
}

func parseChoice(s string) choice {
	var c choice
	for m := range strings.SplitSeq(s, ",") {
		b := make([]byte, len(m))
		for i := range m {
			b[i] = byte(strings.IndexByte("0123456789abcdefghijklmnopqrstuvwxyz", m[i]))
		}
		c = append(c, b)
	}
	return c
}

// versionsMax is how many versions of a sector are told apart.
const versionsMax = 35

// cuts is what can be chosen from at a moment: the pending sectors of all media.
type cuts struct {
	of      []*disk.Cut
	at      [][]int64 // sector numbers, of each medium
	sectors int
}

func (mo *moment) cuts() *cuts {
	c := &cuts{}
	for _, d := range mo.m {
		k := d.Cut()
		c.of = append(c.of, k)
		c.at = append(c.at, k.Sectors())
		c.sectors += len(c.at[len(c.at)-1])
	}
	return c
}

// none is the choice that lost everything pending.
func (c *cuts) none() choice {
	ch := make(choice, len(c.of))
	for i := range c.at {
		ch[i] = make([]byte, len(c.at[i]))
	}
	return ch
}

// all is the choice that kept everything.
func (c *cuts) all() choice {
	ch := c.none()
	c.each(func(m, i int) { ch[m][i] = byte(min(c.of[m].Versions(i), versionsMax)) })
	return ch
}

// each calls fn for each pending sector.
func (c *cuts) each(fn func(m, i int)) {
	for m := range c.at {
		for i := range c.at[m] {
			fn(m, i)
		}
	}
}

// random keeps a random part of the sectors: nearly all or nearly none as likely as half.
func (c *cuts) random(rng *rand.Rand) choice {
	ch := c.none()
	kept := 0.1 + 0.8*rng.Float64()
	c.each(func(m, i int) {
		if rng.Float64() < kept {
			v := min(c.of[m].Versions(i), versionsMax)
			if v > 1 && rng.IntN(4) == 0 {
				v = 1 + rng.IntN(v)
			}
			ch[m][i] = byte(v)
		}
	})
	return ch
}

// without is all but one sector, alone one sector of none.
func (c *cuts) without(m, i int) choice {
	ch := c.all()
	ch[m][i] = 0
	return ch
}

func (c *cuts) alone(m, i int) choice {
	ch := c.none()
	ch[m][i] = byte(min(c.of[m].Versions(i), versionsMax))
	return ch
}

// prefixes yields what the first 1, 2, … sectors in the order of writing leave. Of
// several media, the others keep nothing, then everything.
func (c *cuts) prefixes(yield func(choice) bool) bool {
	for m, k := range c.of {
		for _, rest := range []choice{c.none(), c.all()} {
			clear(rest[m])
			for i, v := range k.Order() {
				rest[m][i] = byte(min(v, versionsMax))
				if !yield(rest.clone()) {
					return false
				}
			}
			if len(c.of) == 1 {
				break
			}
		}
	}
	return true
}

func (c choice) clone() choice {
	d := make(choice, len(c))
	for i := range c {
		d[i] = append([]byte(nil), c[i]...)
	}
	return d
}

// samples is how many random subsets are judged where not all are.
const samples = 24

// every yields all subsets while few sectors are pending; beyond that none, all,
// each sector missing, each alone, each prefix, and random subsets.
func (c *cuts) every(rng *rand.Rand, yield func(choice) bool) {
	if c.sectors <= exhaustive {
		c.count(yield)
		return
	}
	if !yield(c.all()) || !yield(c.none()) {
		return
	}
	more := true
	c.each(func(m, i int) { more = more && yield(c.without(m, i)) && yield(c.alone(m, i)) })
	if !more || !c.prefixes(yield) {
		return
	}
	for range samples {
		if !yield(c.random(rng)) {
			return
		}
	}
}

// count yields all subsets.
func (c *cuts) count(yield func(choice) bool) {
	ch := c.none()
	for {
		if !yield(ch.clone()) {
			return
		}
		carry := true
		c.each(func(m, i int) {
			if !carry {
				return
			}
			if int(ch[m][i]) < min(c.of[m].Versions(i), versionsMax) {
				ch[m][i]++
				carry = false
			} else {
				ch[m][i] = 0
			}
		})
		if carry {
			return
		}
	}
}

// some yields n subsets, of every kind some.
func (c *cuts) some(rng *rand.Rand, n int, yield func(choice) bool) {
	if c.sectors == 0 {
		yield(c.none())
		return
	}
	for range n {
		var ch choice
		m := rng.IntN(len(c.of))
		for len(c.at[m]) == 0 {
			m = rng.IntN(len(c.of))
		}
		i := rng.IntN(len(c.at[m]))
		switch rng.IntN(8) {
		case 0:
			ch = c.none()
		case 1:
			ch = c.all()
		case 2:
			ch = c.without(m, i)
		case 3:
			ch = c.alone(m, i)
		case 4, 5: // a prefix, or one medium whole and the others not at all
			ch = c.none()
			if rng.IntN(2) == 0 {
				ch = c.all()
				clear(ch[m])
			}
			stop := 0
			for range c.of[m].Order() {
				stop++
			}
			stop = rng.IntN(stop + 1)
			for i, v := range c.of[m].Order() {
				if stop--; stop < 0 {
					break
				}
				ch[m][i] = byte(min(v, versionsMax))
			}
		default:
			ch = c.random(rng)
		}
		if !yield(ch) {
			return
		}
	}
}

// state returns the media as the choice leaves them.
func (c *cuts) state(ch choice) media {
	m := make(media, len(c.of))
	for i := range c.of {
		m[i] = c.of[i].State(ch[i])
	}
	return m
}

// fits reports whether a choice can be made.
func (c *cuts) fits(ch choice) bool {
	if len(ch) != len(c.of) {
		return false
	}
	for m, k := range c.of {
		if len(ch[m]) != len(c.at[m]) {
			return false
		}
		for i, v := range ch[m] {
			if int(v) > k.Versions(i) {
				return false
			}
		}
	}
	return true
}

// key identifies the state that a choice leaves, with what must be found in it,
// within a life.
func (mo *moment) key(c *cuts, ch choice) uint64 {
	h := fnv.New64a()
	fmt.Fprint(h, mo.epochs, mo.synced)
	var b [10]byte
	c.each(func(m, i int) {
		if v := ch[m][i]; v != 0 {
			s := c.at[m][i]
			b = [10]byte{byte(m), v, byte(s), byte(s >> 8), byte(s >> 16), byte(s >> 24), byte(s >> 32)}
			h.Write(b[:])
		}
	})
	return h.Sum64()
}
