package fsck

import (
	"math/rand/v2"
	"slices"
	"testing"

	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// A region that was in use on persistent memory is judged with its ring, and only
// with it: a power cut has lost nothing then.
func TestDaxRing(t *testing.T) {
	dev, mem := disk.NewSim("dev", layout.DataStart+40*testSegment), pmem.NewSimDax("pmem", 1<<20)
	if _, err := lsfs.Format(dev, mem, lsfs.Geometry{SegmentBytes: testSegment}); err != nil {
		t.Fatal(err)
	}
	s, err := lsfs.Open(dev, mem, nil, owner{}, lazy)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, s: s, clock: 1e18}
	w.makeRoot()
	rng := rand.New(rand.NewPCG(3, 4))
	for i := range 10 {
		w.churn(rng, 40)
		if i%3 == 0 {
			w.must(s.Checkpoint())
		}
		var lost *disk.Sim
		var cuts []*pmem.SimDax
		for update := uint64(0); update != s.Superblock().Update; { // both of one moment
			update = s.Superblock().Update
			cuts = slices.Collect(mem.CrashStates(rng, 3))
			for lost = range dev.CrashStates(rng, 1) {
			}
		}
		for _, cut := range cuts {
			lost := lost.Clone()
			ring, err := cut.OpenRing()
			if err != nil {
				t.Fatal(err)
			}
			if rep := judge(t, Options{Dev: lost, Reg: cut, Ring: ring.Clone(), Shards: testShards}); !rep.Sound() {
				t.Fatalf("with its ring: %v", rep.Found)
			}
			if rep := judge(t, Options{Dev: lost, Reg: cut, Shards: testShards}); !slices.Equal(rep.IDs(), []ID{RegionRing}) {
				t.Fatalf("without its ring: %v", rep.Found)
			}
		}
	}
	w.must(s.Close())
	if rep := judge(t, Options{Dev: dev.Reopen(), Reg: mem, Shards: testShards}); !rep.Clean() {
		t.Errorf("closed: %v", rep.Found)
	}
}
