package disk

import (
	"cmp"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
)

// Cut is what a power cut at one instant can choose from: for each sector that is
// pending then, its durable bytes or any of the versions written since the last
// flush. It stays what it is while the device goes on. Its methods may be called
// concurrently.
type Cut struct {
	name         string
	size         int64
	durable, now pages
	sectors      []unflushed // ascending
	order        []written   // every version, in the order of the writes
}

// unflushed is a pending sector and what was written to it, oldest first.
type unflushed struct {
	sector   int64
	versions [][]byte // nil for zeros
}

// written names a version: version v (from 1) of Cut.sectors[i].
type written struct{ i, v int }

// put stores version v of u in t; 0 stands for the durable bytes, which must be
// there.
func (u *unflushed) put(t *pages, v int) {
	if v == 0 {
		return
	}
	if data := u.versions[v-1]; data != nil {
		t.write(data, u.sector*simSector)
	} else {
		t.zero(u.sector*simSector, simSector)
	}
}

// Cut takes a snapshot of what is pending.
func (d *Sim) Cut() *Cut {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := &Cut{name: d.name, size: d.size, durable: d.durable.share(), now: d.now.share()}
	at := make(map[int64]int)
	for _, ch := range d.pending {
		for o := int64(0); o < ch.n; o += simSector {
			s := (ch.off + o) / simSector
			i, ok := at[s]
			if !ok {
				i = len(c.sectors)
				at[s] = i
				c.sectors = append(c.sectors, unflushed{sector: s})
			}
			u := &c.sectors[i]
			if ch.data == nil {
				u.versions = append(u.versions, nil)
			} else {
				u.versions = append(u.versions, ch.data[o:o+simSector:o+simSector])
			}
			c.order = append(c.order, written{i, len(u.versions)})
		}
	}
	// Ascending by number, so that the order in which states come does not hang on
	// the order of the writes; the places in c.order follow.
	byNumber := make([]int, len(c.sectors))
	for i := range byNumber {
		byNumber[i] = i
	}
	slices.SortFunc(byNumber, func(a, b int) int {
		return cmp.Compare(c.sectors[a].sector, c.sectors[b].sector)
	})
	sorted, place := make([]unflushed, len(byNumber)), make([]int, len(byNumber))
	for to, from := range byNumber {
		sorted[to], place[from] = c.sectors[from], to
	}
	c.sectors = sorted
	for k := range c.order {
		c.order[k].i = place[c.order[k].i]
	}
	return c
}

// Sectors returns the numbers of the pending sectors, ascending.
func (c *Cut) Sectors() []int64 {
	numbers := make([]int64, len(c.sectors))
	for i := range c.sectors {
		numbers[i] = c.sectors[i].sector
	}
	return numbers
}

// Versions returns how many versions of the i-th pending sector were written since
// the last flush, at least one.
func (c *Cut) Versions(i int) int { return len(c.sectors[i].versions) }

// Order yields the versions in the order in which they were written: i is the
// place of the sector in Sectors, v counts its versions from 1.
func (c *Cut) Order() iter.Seq2[int, int] {
	return func(yield func(i, v int) bool) {
		for _, w := range c.order {
			if !yield(w.i, w.v) {
				return
			}
		}
	}
}

// State returns the device after a power cut that left version choice[i] of the
// i-th pending sector, 0 standing for its durable bytes. It panics when choice does
// not fit Sectors and Versions.
func (c *Cut) State(choice []byte) *Sim {
	if len(choice) != len(c.sectors) {
		panic(fmt.Sprintf("disk: a choice of %d sectors, %d are pending", len(choice), len(c.sectors)))
	}
	t := c.durable.fork()
	for i := range c.sectors {
		c.sectors[i].put(&t, int(choice[i]))
	}
	return c.state(t)
}

// state returns a fresh device whose bytes are t's.
func (c *Cut) state(t pages) *Sim { return newSim(c.name, c.size, t) }

// count returns the number of states, or something above limit.
func (c *Cut) count(limit int) int {
	n := 1
	for _, u := range c.sectors {
		if n *= 1 + len(u.versions); n > limit {
			return limit + 1
		}
	}
	return n
}

// all yields every state, the one that lost everything first.
func (c *Cut) all(yield func(*Sim) bool) {
	choice := make([]int, len(c.sectors))
	for {
		t := c.durable.fork()
		for i := range c.sectors {
			c.sectors[i].put(&t, choice[i])
		}
		if !yield(c.state(t)) {
			return
		}
		i := 0
		for ; i < len(choice); i++ {
			if choice[i]++; choice[i] <= len(c.sectors[i].versions) {
				break
			}
			choice[i] = 0
		}
		if i == len(choice) {
			return
		}
	}
}

// sample yields at most limit states as Sim.CrashStates describes.
func (c *Cut) sample(rng *rand.Rand, limit int, yield func(*Sim) bool) {
	if limit <= 0 || !yield(c.state(c.durable)) {
		return
	}
	if limit == 1 || !yield(c.state(c.now)) {
		return
	}
	limit -= 2

	// Candidates are numbered: sector i missing, sector i alone, prefix of k+1.
	s := len(c.sectors)
	chosen := make([]int, 2*s+len(c.order)-1)
	for i := range chosen {
		chosen[i] = i
	}
	if places := limit - limit/4; len(chosen) > places {
		rng.Shuffle(len(chosen), func(i, j int) { chosen[i], chosen[j] = chosen[j], chosen[i] })
		chosen = chosen[:places]
		slices.Sort(chosen)
	}
	prefix, length := c.durable.fork(), 0
	for _, k := range chosen {
		var t pages
		switch {
		case k < s:
			t = c.now.fork()
			c.restore(&t, k)
		case k < 2*s:
			t = c.durable.fork()
			u := &c.sectors[k-s]
			u.put(&t, len(u.versions))
		default:
			for ; length <= k-2*s; length++ {
				w := c.order[length]
				c.sectors[w.i].put(&prefix, w.v)
			}
			t = prefix.share()
		}
		if !yield(c.state(t)) {
			return
		}
	}
	for range limit - len(chosen) {
		if !yield(c.state(c.random(rng))) {
			return
		}
	}
}

// restore puts the durable bytes of pending sector i into t.
func (c *Cut) restore(t *pages, i int) {
	var buf [simSector]byte
	off := c.sectors[i].sector * simSector
	c.durable.read(buf[:], off)
	t.write(buf[:], off)
}

// random returns a state in which each sector kept something at random. How many
// were kept is itself random, so that nearly complete and nearly empty states
// come up as well as even ones.
func (c *Cut) random(rng *rand.Rand) pages {
	kept := 0.1 + 0.8*rng.Float64()
	t := c.durable.fork()
	if kept > 0.5 {
		t = c.now.fork()
	}
	for i := range c.sectors {
		u := &c.sectors[i]
		v := 0
		if rng.Float64() < kept {
			// The newest version is the likeliest, older ones remain possible.
			v = len(u.versions)
			if v > 1 && rng.IntN(4) == 0 {
				v = 1 + rng.IntN(v)
			}
		}
		switch {
		case kept > 0.5 && v == len(u.versions): // already there
		case kept > 0.5 && v == 0:
			c.restore(&t, i)
		default:
			u.put(&t, v)
		}
	}
	return t
}
