package placement_test

import (
	"encoding/binary"
	"fmt"
	"slices"
	"testing"
	"time"

	"sealfs"
	"sealfs/cluster"
	"sealfs/cluster/placement"
)

// evenness is what an operator of a large cluster asks of a placement.
type evenness struct {
	fullest     float64 // shards of the fullest store, as a part of its weighted share
	join, leave float64 // what moves when a store joins or leaves, as a part of what has to
	bytes       int     // of the encoded map
	took        time.Duration
}

// measure places shards over stores of two sizes, four to a host and ten hosts to a rack.
func measure(t testing.TB, stores int, shards uint32, replicas int) (e evenness) {
	all := make([]placement.Store, stores+1)
	var total float64
	for i := range all {
		all[i] = placement.Store{Host: fmt.Sprint("h", i/4), Rack: fmt.Sprint("r", i/40), Weight: 4000 + uint32(i%2)*400}
		binary.LittleEndian.PutUint64(all[i].ID[:], uint64(i+1)*0x9e3779b97f4a7c15)
		if i < stores {
			total += float64(all[i].Weight)
		}
	}
	fullest := func(table placement.Table, weights float64) (f float64) {
		for i, n := range counts(table, len(all)) {
			share := float64(shards) * float64(replicas) * float64(all[i].Weight) / weights
			f = max(f, float64(n)/share)
		}
		return f
	}
	began := time.Now()
	before := placement.Place(all[:stores], shards, replicas)
	e.took = time.Since(began)
	grown := total + float64(all[stores].Weight)
	after := placement.Rebalance(before, all, replicas)
	e.join = float64(moved(before, after)) / (float64(shards) * float64(replicas) * float64(all[stores].Weight) / grown)
	e.fullest = max(fullest(before, total), fullest(after, grown))

	gone := stores / 3
	held := counts(before, len(all))[gone]
	left := slices.Clone(all[:stores])
	left[gone].Weight = 0
	e.leave = float64(moved(before, placement.Rebalance(before, left, replicas))) / float64(held)

	m := &cluster.Map{Version: 1 << 20, Cluster: sealfs.NewUUID(), Name: "large", Shards: shards, Replicas: replicas, OpVersion: 1, NextVolume: 1, Table: make([]cluster.ShardInfo, shards)}
	for i, s := range all[:stores] {
		m.Stores = append(m.Stores, cluster.StoreInfo{
			ID: s.ID, Addr: fmt.Sprintf("10.1.%d.%d:7000", i/200, i%200), Host: s.Host, Rack: s.Rack, Weight: s.Weight, Bytes: uint64(s.Weight) << 30,
			State: cluster.StoreUp, Server: sealfs.NewUUID(),
		})
	}
	for s, row := range before {
		m.Table[s] = cluster.ShardInfo{Replicas: row, Epoch: 1}
	}
	b := m.Encode()
	if _, err := cluster.Decode(b); err != nil {
		t.Fatal(err)
	}
	e.bytes = len(b)
	return e
}

func counts(t placement.Table, n int) []int {
	c := make([]int, n)
	for _, row := range t {
		for _, i := range row {
			c[i]++
		}
	}
	return c
}

// moved counts the replicas of b that are not in a.
func moved(a, b placement.Table) (n int) {
	for s := range b {
		for _, i := range b[s] {
			if !slices.Contains(a[s], i) {
				n++
			}
		}
	}
	return n
}

// sizes are a cluster of today and the largest one.
var sizes = []struct {
	stores, replicas int
	shards           uint32
}{{64, 1, 4096}, {64, 3, 4096}, {1000, 1, 65536}, {1000, 3, 65536}}

// TestEven: no store has more than 1.05 of its share, and a change of the
// membership moves no more than 1.1 of what it has to.
func TestEven(t *testing.T) {
	for _, s := range sizes {
		if s.stores*s.replicas >= 1000 && testing.Short() {
			continue
		}
		e := measure(t, s.stores, s.shards, s.replicas)
		t.Logf("%d stores, %d shards, %d replicas: fullest %.3f of its share; a join moves %.3f, a leave %.3f of the ideal; placed in %s; map of %d bytes",
			s.stores, s.shards, s.replicas, e.fullest, e.join, e.leave, e.took.Round(time.Millisecond), e.bytes)
		if e.fullest > 1.05 || e.join > 1.1 || e.leave > 1.1 {
			t.Errorf("%+v: %+v", s, e)
		}
	}
}

// BenchmarkEven prints the same, with the time of a placement.
func BenchmarkEven(b *testing.B) {
	for _, s := range sizes {
		b.Run(fmt.Sprintf("stores=%d/shards=%d/replicas=%d", s.stores, s.shards, s.replicas), func(b *testing.B) {
			var e evenness
			var took time.Duration
			n := 0
			for b.Loop() {
				e = measure(b, s.stores, s.shards, s.replicas)
				took += e.took
				n++
			}
			b.ReportMetric(float64(took.Milliseconds())/float64(n), "ms/place")
			b.ReportMetric(e.fullest, "fullest/share")
			b.ReportMetric(e.join, "join/ideal")
			b.ReportMetric(e.leave, "leave/ideal")
			b.ReportMetric(float64(e.bytes), "map-bytes")
		})
	}
}
