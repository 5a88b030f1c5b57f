// Package placement decides which stores hold which shard. It is pure: the same
// arguments give the same table on every machine and in every build, because
// its arithmetic is integer only. The managers' state machine depends on that;
// an algorithm that places differently must come as another function.
//
// The order of preference is weighted rendezvous hashing: every (store, shard)
// pair has the cost -log2(u)/weight, where u in (0,1) is a hash of the two, and
// a shard prefers the stores of least cost. A change of the membership
// therefore leaves the preferences among the others as they were. Plain
// rendezvous is uneven, by about sqrt(share) shards; so no store takes more
// than 1.05 times its share (or the share rounded up, if that is more), nor ends
// below 0.95 times it, as far as the failure domains permit.
//
// The replicas of a shard lie in distinct failure domains of the widest kind
// (rack, host, store) of which there are enough. A store's share then is its
// weight's part, but no domain's share exceeds one replica of every shard.
package placement

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"math/bits"
	"slices"

	"sealfs"
)

// StoresMax is the largest number of stores that a table can name.
const StoresMax = 1 << 16

// A Store is a place for shards.
type Store struct {
	ID     sealfs.UUID
	Host   string // failure domain in Rack; equal names are one domain, the empty one too
	Rack   string // failure domain of hosts, compared likewise
	Weight uint32 // capacity in any unit; 0 takes no shards
}

// Table has a row per shard: the indexes of the stores that hold it, without
// repetition. A row is shorter than asked for when there are too few stores.
type Table [][]uint16

// Place returns the table of shards shards with replicas replicas each, over
// at most StoresMax stores.
func Place(stores []Store, shards uint32, replicas int) Table {
	return Rebalance(make(Table, shards), stores, replicas)
}

// Rebalance returns a table that is right for the given stores and moves
// little away from old, which it leaves alone. The indexes in old must mean the
// same stores: stores are only ever appended, and one that has left stays with
// weight 0. A replica moves only if its store takes none any more, if its
// failure domain is no longer distinct, if its store has more than 1.05 times
// its share, or if another store would stay below 0.95 times its own, 0.93
// times if that held shards before: else the loss of one store out of many,
// which raises every share a little, would move a shard to each of the others.
func Rebalance(old Table, stores []Store, replicas int) Table {
	p := newPlan(stores, len(old), replicas)
	p.keep(old)
	for i := range stores {
		if p.count[i] == 0 {
			p.low[i] = p.least[i]
		}
	}
	p.fill()
	// Those who need shards take them from those who have too many, before these
	// give away what is still above their limit: so a shard moves once.
	for i := range stores {
		p.raise(i)
	}
	p.cut()
	p.fill()
	for i := range stores {
		p.raise(i)
	}
	return p.table
}

// A plan is a table in the making.
type plan struct {
	stores   []Store
	table    Table
	replicas int      // possible ones: at most the number of domains
	seed     []uint64 // per store: its half of the hash
	domain   []int    // per store: failure domain of the chosen kind
	top      []int    // per store: share, rounded up
	most     []int    // per store: 1.05 times the share, rounded down, but not below top
	least    []int    // per store: 0.95 times the share, rounded down
	low      []int    // per store: what it is left with, 0.93 times the share if it held shards before
	count    []int    // per store: replicas in table
}

func newPlan(stores []Store, shards, replicas int) *plan {
	n := len(stores)
	p := &plan{
		stores: stores, table: make(Table, shards), replicas: max(replicas, 0),
		seed: make([]uint64, n), top: make([]int, n), most: make([]int, n), least: make([]int, n), low: make([]int, n), count: make([]int, n),
	}
	for i := range stores {
		p.seed[i] = seed(stores[i].ID)
	}
	var domains int
	for _, key := range []func(i int) string{
		func(i int) string { return stores[i].Rack },
		func(i int) string { return stores[i].Rack + "\x00" + stores[i].Host },
		func(i int) string { return string(stores[i].ID[:]) },
	} {
		if p.domain, domains = group(stores, key); domains >= p.replicas {
			break
		}
	}
	p.replicas = min(p.replicas, domains)
	p.share(shards, domains)
	return p
}

// group numbers the distinct keys of the stores with a weight, from 0 in the
// order of appearance. Stores without a weight get -1.
func group(stores []Store, key func(i int) string) (of []int, n int) {
	number := make(map[string]int)
	of = make([]int, len(stores))
	for i := range stores {
		of[i] = -1
		if stores[i].Weight == 0 {
			continue
		}
		k, ok := number[key(i)]
		if !ok {
			k = len(number)
			number[key(i)] = k
		}
		of[i] = k
	}
	return of, len(number)
}

// share divides replicas*shards over the domains by weight, where none gets
// more than shards, and a domain's part over its stores.
func (p *plan) share(shards, domains int) {
	const one = 1 << 16 // shares are fixed-point numbers
	weight := make([]uint64, domains)
	var total uint64
	for i := range p.stores {
		if d := p.domain[i]; d >= 0 {
			weight[d] += uint64(p.stores[i].Weight)
			total += uint64(p.stores[i].Weight)
		}
	}
	limit := uint64(shards) * one
	left := limit * uint64(p.replicas)
	part := make([]uint64, domains)
	full := make([]bool, domains)
	for again := true; again; { // each round fills a domain, or is the last
		again = false
		for d := range part {
			if full[d] {
				continue
			}
			if part[d] = mulDiv(left, weight[d], total); part[d] >= limit {
				part[d], full[d], again = limit, true, true
				left -= limit
				total -= weight[d]
				break
			}
		}
	}
	for i := range p.stores {
		d := p.domain[i]
		if d < 0 {
			continue
		}
		share := mulDiv(part[d], uint64(p.stores[i].Weight), weight[d])
		p.top[i] = int((share + one - 1) / one)
		p.most[i] = min(max(int(share*105/100/one), p.top[i]), shards)
		p.least[i] = int(share * 95 / 100 / one)
		p.low[i] = int(share * 93 / 100 / one)
	}
}

// mulDiv returns a*b/c for b <= c.
func mulDiv(a, b, c uint64) uint64 {
	if b == c {
		return a
	}
	hi, lo := bits.Mul64(a, b)
	q, _ := bits.Div64(hi, lo, c)
	return q
}

// keep takes over from old what may stay.
func (p *plan) keep(old Table) {
	for s, row := range old {
		p.table[s] = make([]uint16, 0, p.replicas)
		for _, i := range row {
			if int(i) < len(p.stores) && p.domain[i] >= 0 && len(p.table[s]) < p.replicas && !p.taken(s, int(i), -1) {
				p.table[s] = append(p.table[s], i)
				p.count[i]++
			}
		}
	}
}

// fill gives every shard the replicas that it lacks.
func (p *plan) fill() {
	for s := range p.table {
		for len(p.table[s]) < p.replicas {
			p.table[s] = append(p.table[s], p.pick(s))
		}
	}
}

// cut takes from stores with more than their most the shards that prefer them least.
func (p *plan) cut() {
	holds := make([][]int, len(p.stores)) // per store: its shards
	for s, row := range p.table {
		for _, i := range row {
			holds[i] = append(holds[i], s)
		}
	}
	for i := range p.stores {
		if p.count[i] <= p.most[i] {
			continue
		}
		p.sortByCost(i, holds[i])
		for _, s := range holds[i][p.most[i]:] {
			k := slices.Index(p.table[s], uint16(i))
			p.table[s] = slices.Delete(p.table[s], k, k+1)
			p.count[i]--
		}
	}
}

// taken reports whether a replica of shard s other than the one on store but
// lies in the failure domain of store i.
func (p *plan) taken(s, i, but int) bool {
	for _, j := range p.table[s] {
		if int(j) != but && p.domain[j] == p.domain[i] {
			return true
		}
	}
	return false
}

// crowd counts the racks and hosts that store i shares with the replicas of
// shard s. Where they need not be distinct, they are so if balance permits.
func (p *plan) crowd(s, i int) int {
	n := 0
	for _, j := range p.table[s] {
		if p.stores[j].Rack == p.stores[i].Rack {
			n++
			if p.stores[j].Host == p.stores[i].Host {
				n++
			}
		}
	}
	return n
}

// pick chooses the store for another replica of shard s. There is one, since
// there are at least as many domains as replicas.
func (p *plan) pick(s int) uint16 {
	best, bestOver, bestCrowd, bestCost := -1, 0, 0, uint64(0)
	for i := range p.stores {
		if p.domain[i] < 0 || p.taken(s, i, -1) {
			continue
		}
		// One by one: this loop is most of what a large placement costs.
		over := max(p.count[i]+1-p.most[i], 0)
		if best >= 0 && over > bestOver {
			continue
		}
		same := best >= 0 && over == bestOver
		crowd := p.crowd(s, i)
		if same && crowd > bestCrowd {
			continue
		}
		same = same && crowd == bestCrowd
		cost := p.cost(i, s)
		if same && (cost > bestCost || cost == bestCost && bytes.Compare(p.stores[i].ID[:], p.stores[best].ID[:]) > 0) {
			continue
		}
		best, bestOver, bestCrowd, bestCost = i, over, crowd, cost
	}
	p.count[best]++
	return uint16(best)
}

// raise moves shards to store i, if that is too low, until it has its least:
// those first that prefer it most. It takes them from stores with more than their share.
func (p *plan) raise(i int) {
	if p.count[i] >= p.low[i] {
		return
	}
	shards := make([]int, len(p.table))
	for s := range shards {
		shards[s] = s
	}
	p.sortByCost(i, shards)
	for _, s := range shards {
		if p.count[i] >= p.least[i] {
			return
		}
		if slices.Contains(p.table[s], uint16(i)) {
			continue
		}
		from, excess := -1, 0
		for k, j := range p.table[s] {
			if e := p.count[j] - p.top[j]; e > excess && !p.taken(s, i, int(j)) {
				from, excess = k, e
			}
		}
		if from >= 0 {
			p.count[p.table[s][from]]--
			p.table[s][from] = uint16(i)
			p.count[i]++
		}
	}
}

// sortByCost sorts shards by their preference for store i.
func (p *plan) sortByCost(i int, shards []int) {
	type ranked struct {
		cost  uint64
		shard int
	}
	by := make([]ranked, len(shards))
	for k, s := range shards {
		by[k] = ranked{p.cost(i, s), s}
	}
	slices.SortFunc(by, func(a, b ranked) int {
		if a.cost != b.cost {
			return cmp.Compare(a.cost, b.cost)
		}
		return a.shard - b.shard
	})
	for k, r := range by {
		shards[k] = r.shard
	}
}

// cost returns -log2(u)/weight for store i and shard s, scaled to use 63 bits.
func (p *plan) cost(i, s int) uint64 {
	return negLog2(mix(p.seed[i]+uint64(s)*golden)) << 17 / uint64(p.stores[i].Weight)
}

const golden = 0x9e3779b97f4a7c15 // 2^64 divided by the golden ratio

// seed is the store's half of the hash.
func seed(id sealfs.UUID) uint64 {
	return mix(mix(binary.LittleEndian.Uint64(id[:8])+golden) ^ binary.LittleEndian.Uint64(id[8:]))
}

// mix is the finalizer of SplitMix64: every bit of x reaches every bit of it.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Logarithms are fixed-point numbers with logBits binary places. math.Log will
// not do: its last bits differ between processors, and with them the tables of
// two managers.
const (
	logBits  = 40
	logSteps = 10 // binary logarithm of the number of intervals in logTable
)

// logTable holds log2(1 + i/1024).
var logTable = func() (t [1<<logSteps + 1]uint64) {
	for i := range t[:1<<logSteps] {
		x := uint64(1<<logSteps+i) << (63 - logSteps) // in [1,2), 63 binary places
		for b := logBits - 1; b >= 0; b-- {
			// Squaring doubles the logarithm; what exceeds 1 is its next digit.
			if x, _ = bits.Mul64(x, x); x>>63 == 1 {
				t[i] |= 1 << b
			} else {
				x <<= 1
			}
		}
	}
	t[1<<logSteps] = 1 << logBits
	return t
}()

// negLog2 returns -log2(h/2^64), at least 1 in the last place.
func negLog2(h uint64) uint64 {
	h |= 1
	lz := bits.LeadingZeros64(h)
	m := h << lz // h/2^64 = (m/2^63) / 2^(lz+1), with m/2^63 in [1,2)
	i := m >> (63 - logSteps) & (1<<logSteps - 1)
	frac := m >> (63 - logSteps - 32) & (1<<32 - 1)
	log := logTable[i] + (logTable[i+1]-logTable[i])*frac>>32
	return max(uint64(lz+1)<<logBits-log, 1)
}
