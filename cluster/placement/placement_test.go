package placement

import (
	"fmt"
	"hash/crc32"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"sealfs"
)

// storeID returns a fixed identifier, so that tables are the same in every run.
func storeID(n int) (u sealfs.UUID) {
	for i := range u {
		u[i] = byte(mix(uint64(n)*16 + uint64(i)))
	}
	return u
}

// cluster returns n stores of weight 1000 with perHost on a host and perRack hosts in a rack.
func cluster(n, perHost, perRack int) []Store {
	stores := make([]Store, n)
	for i := range stores {
		stores[i] = Store{
			ID: storeID(i), Host: fmt.Sprint("h", i/perHost), Rack: fmt.Sprint("r", i/perHost/perRack), Weight: 1000,
		}
	}
	return stores
}

func counts(t Table, n int) []int {
	c := make([]int, n)
	for _, row := range t {
		for _, i := range row {
			c[i]++
		}
	}
	return c
}

// moved counts the replicas of b that are not in a.
func moved(a, b Table) int {
	n := 0
	for s := range b {
		for _, i := range b[s] {
			if !slices.Contains(a[s], i) {
				n++
			}
		}
	}
	return n
}

func TestLogarithm(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for range 100_000 {
		h := r.Uint64() >> r.IntN(64)
		got := float64(negLog2(h)) / (1 << logBits)
		want := -math.Log2(float64(h|1) / math.Exp2(64))
		if math.Abs(got-want) > 1e-3*want+1e-9 {
			t.Fatalf("-log2(%#x) = %v, want %v", h, got, want)
		}
	}
	for h := uint64(1); h != 0; h <<= 1 {
		if a, b := negLog2(h-1|1), negLog2(h|1); a < b {
			t.Fatalf("not monotonic at %#x", h)
		}
	}
}

// TestGolden freezes the algorithm: managers of different versions must agree.
func TestGolden(t *testing.T) {
	stores := cluster(7, 2, 2)
	stores[3].Weight = 2500
	table := Place(stores, 16, 2)
	want := Table{{6, 3}, {0, 4}, {6, 1}, {2, 4}, {5, 0}, {0, 4}, {3, 4}, {3, 4}, {6, 1}, {6, 2}, {5, 1}, {2, 6}, {5, 3}, {6, 3}, {4, 3}, {3, 5}}
	if fmt.Sprint(table) != fmt.Sprint(want) {
		t.Errorf("16 shards: got %v", table)
	}
	sum := crc32.ChecksumIEEE(fmt.Append(nil, Place(stores, 4096, 3)))
	if sum != 0xda6d3f3b {
		t.Errorf("4096 shards: checksum %#x", sum)
	}
	before := Place(stores[:6], 4096, 3)
	sum = crc32.ChecksumIEEE(fmt.Append(nil, Rebalance(before, stores, 3)))
	if sum != 0x1ae31a02 {
		t.Errorf("rebalanced: checksum %#x", sum)
	}
}

func TestBalance(t *testing.T) {
	for _, c := range []struct{ stores, replicas, shards int }{
		{1, 1, 4096}, {3, 1, 4096}, {3, 3, 4096}, {8, 2, 4096}, {24, 3, 4096}, {100, 3, 16384}, {5, 1, 64},
	} {
		stores := cluster(c.stores, 1, 1)
		share := float64(c.shards*c.replicas) / float64(c.stores)
		for i, n := range counts(Place(stores, uint32(c.shards), c.replicas), c.stores) {
			if float64(n) > math.Ceil(share*1.05) || float64(n) < math.Floor(share*0.95) {
				t.Errorf("%+v: store %d has %d of a share of %.1f", c, i, n, share)
			}
		}
	}
}

func TestWeights(t *testing.T) {
	stores := cluster(6, 1, 1)
	for i := range stores {
		stores[i].Weight = uint32(i) * 4_000_000 // the first takes nothing
	}
	for i, n := range counts(Place(stores, 4096, 2), 6) {
		share := 4096 * 2 * float64(i) / 15
		if float64(n) > math.Ceil(share*1.05) || float64(n) < math.Floor(share*0.95) {
			t.Errorf("store %d has %d of a share of %.1f", i, n, share)
		}
	}
}

// TestHeavyDomain has a rack of more than its replica's part: it gets one
// replica of each shard, and the others share the rest.
func TestHeavyDomain(t *testing.T) {
	stores := cluster(9, 1, 3)
	for i := range 3 {
		stores[i].Weight = 10_000
	}
	n := counts(Place(stores, 4096, 2), 9)
	if heavy := n[0] + n[1] + n[2]; heavy < 4096*93/100 {
		t.Errorf("heavy rack holds %d of 4096", heavy)
	}
}

// TestPrefersRendezvous checks that the cap bends the rendezvous order rarely.
func TestPrefersRendezvous(t *testing.T) {
	stores := cluster(10, 1, 1)
	table := Place(stores, 4096, 1)
	p := newPlan(stores, 4096, 1)
	bent := 0
	for s, row := range table {
		for i := range stores {
			if p.cost(i, s) < p.cost(int(row[0]), s) {
				bent++
				break
			}
		}
	}
	if bent > 4096/20 {
		t.Errorf("%d of 4096 shards are not where they would best be", bent)
	}
}

func TestSmallMovement(t *testing.T) {
	for _, replicas := range []int{1, 2, 3} {
		stores := cluster(12, 1, 1)
		before := Place(stores, 4096, replicas)

		grown := append(slices.Clone(stores), Store{ID: storeID(99), Host: "new", Rack: "new", Weight: 1000})
		after := Rebalance(before, grown, replicas)
		share := float64(4096*replicas) / 13
		if n := float64(moved(before, after)); n > share*1.10 || n < math.Floor(share*0.95) {
			t.Errorf("%d replicas: a store joined and %v moved, its share is %.1f", replicas, n, share)
		}
		check(t, after, grown, replicas)

		shrunk := slices.Clone(stores)
		shrunk[5].Weight = 0
		held := counts(before, 12)[5]
		after = Rebalance(before, shrunk, replicas)
		if n := moved(before, after); n < held || float64(n) > float64(held)*1.05+1 {
			t.Errorf("%d replicas: a store with %d left and %d moved", replicas, held, n)
		}
		check(t, after, shrunk, replicas)

		if n := moved(after, Rebalance(after, shrunk, replicas)); n != 0 {
			t.Errorf("%d replicas: a second rebalance moved %d", replicas, n)
		}
	}
}

// check verifies what every table promises.
func check(t *testing.T, table Table, stores []Store, replicas int) {
	t.Helper()
	distinct := func(row []uint16, key func(Store) string) int {
		seen := make(map[string]bool)
		for _, i := range row {
			seen[key(stores[i])] = true
		}
		return len(seen)
	}
	all := make([]uint16, 0, len(stores))
	for i := range stores {
		if stores[i].Weight > 0 {
			all = append(all, uint16(i))
		}
	}
	id := func(s Store) string { return s.ID.String() }
	host := func(s Store) string { return s.Rack + "/" + s.Host }
	rack := func(s Store) string { return s.Rack }
	want := min(replicas, len(all))
	for s, row := range table {
		if len(row) != want {
			t.Fatalf("shard %d has %d replicas, want %d", s, len(row), want)
		}
		for _, i := range row {
			if stores[i].Weight == 0 {
				t.Fatalf("shard %d is on store %d, which takes none", s, i)
			}
		}
		if distinct(row, id) != want {
			t.Fatalf("shard %d: a store twice in %v", s, row)
		}
		if distinct(all, host) >= replicas && distinct(row, host) != want {
			t.Fatalf("shard %d: a host twice in %v", s, row)
		}
		if distinct(all, rack) >= replicas && distinct(row, rack) != want {
			t.Fatalf("shard %d: a rack twice in %v", s, row)
		}
	}
}

// TestProperties drives random clusters through random changes.
func TestProperties(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 7))
		next := 0
		join := func() Store {
			next++
			return Store{
				ID: storeID(next + int(seed)*1000), Host: fmt.Sprint(r.IntN(8)), Rack: fmt.Sprint(r.IntN(4)),
				Weight: 1 + r.Uint32()>>r.IntN(31),
			}
		}
		var stores []Store
		shards, replicas := uint32(1)<<r.IntN(9), 1+r.IntN(4)
		table := Place(stores, shards, replicas)
		for range 12 {
			switch k := r.IntN(4); {
			case k < 2 || len(stores) == 0:
				stores = append(stores, join())
			case k == 2:
				stores[r.IntN(len(stores))].Weight = 0
			default:
				replicas = 1 + r.IntN(4)
			}
			old := make(Table, len(table))
			for s := range table {
				old[s] = slices.Clone(table[s])
			}
			next := Rebalance(table, stores, replicas)
			if moved(old, table) != 0 {
				t.Fatalf("seed %d: the old table was changed", seed)
			}
			check(t, next, stores, replicas)
			if moved(next, Rebalance(next, slices.Clone(stores), replicas)) > moved(table, next)+int(shards)*replicas/10 {
				t.Fatalf("seed %d: does not settle", seed)
			}
			table = next
		}
	}
}

func BenchmarkPlace(b *testing.B) {
	stores := cluster(100, 2, 10)
	for b.Loop() {
		Place(stores, 4096, 3)
	}
}
