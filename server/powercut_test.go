package server

import (
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"sync"
	"testing"

	"sealfs/disk"
	"sealfs/internal/oracle"
	"sealfs/lsfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// cut is a state that a power cut could leave, to be judged later.
type cut struct {
	dev, region *disk.Sim
	synced      int // operations that were synced when it was taken
}

// cutter samples power cuts at the writes and flushes of both devices, also
// those of the drainer and the collector in the background.
type cutter struct {
	mu          sync.Mutex
	rng         *rand.Rand
	dev, region *disk.Sim
	synced      int
	every, seen int
	cuts        []cut
}

func (c *cutter) hook(disk.Op) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.seen++; c.seen%c.every != 0 {
		return
	}
	synced := c.synced
	for d := range c.dev.CrashStates(c.rng, 3) {
		for r := range c.region.CrashStates(c.rng, 1) {
			c.cuts = append(c.cuts, cut{d, r, synced})
		}
	}
}

// digest is a hash of the whole namespace.
func digest(t *testing.T, r pmem.Reader) uint64 {
	t.Helper()
	h := fnv.New64a()
	if err := meta.Dump(r, h); err != nil {
		t.Fatal(err)
	}
	return h.Sum64()
}

// TestCrashNamespace: after a power cut at any moment the store holds the
// namespace as it was after one of the operations, not older than the last
// sync, sound in itself, and every file can be read.
func TestCrashNamespace(t *testing.T) {
	steps := 1200
	if testing.Short() {
		steps = 300
	}
	w := newTwinOn(t, 3, disk.NewSim("device", 64<<20), disk.NewSim("region", 8<<20), 256<<10)
	c := &cutter{rng: rand.New(rand.NewPCG(11, 11)), dev: w.sim.dev, region: w.sim.region, every: 2}
	st := w.sim.stores[0]
	look := func() uint64 {
		r := st.BeginRead()
		defer st.EndRead()
		return digest(t, r)
	}
	history := map[uint64]int{look(): 0} // digest → last operation after which it was so
	w.sim.dev.SetHook(c.hook)
	w.sim.region.SetHook(c.hook)
	judged, files, between := 0, 0, 0
	for i := 1; i <= steps; i++ {
		w.step()
		st.reclaim.settle()
		history[look()] = i
		if w.rng.IntN(15) == 0 {
			w.do(op.Request{Type: op.Sync, Ino: w.root})
			c.mu.Lock()
			c.synced = i
			c.mu.Unlock()
		}
		c.mu.Lock()
		cuts := c.cuts
		c.cuts = nil
		c.mu.Unlock()
		for _, k := range cuts {
			n, known := judge(t, w, k, history)
			judged++
			files += n
			if !known {
				between++
			}
		}
	}
	w.sim.dev.SetHook(nil)
	w.sim.region.SetHook(nil)
	t.Logf("%d power cuts recovered, %d files read, %d cuts fell between the records of one operation", judged, files, between)
	if judged < steps/20 || files < steps/20 || between > judged/3 {
		t.Errorf("%d cuts, %d files, %d between: the test did not reach its point", judged, files, between)
	}
}

// judge recovers one cut. It returns how many files it read, and whether the
// namespace is that after a whole operation.
func judge(t *testing.T, w *twin, k cut, history map[uint64]int) (int, bool) {
	t.Helper()
	s := &simServer{Server: &Server{o: w.sim.o, cfg: w.sim.cfg, log: w.sim.Server.log}}
	ls, err := lsfs.Open(k.dev, pmem.NewMemory(k.region), nil, &owner{s.cfg}, lsfs.Options{StagingBytes: 1 << 20})
	if err != nil {
		t.Fatalf("after a power cut: %v", err)
	}
	st := &store{Store: ls, srv: s.Server}
	s.stores = []*store{st}
	r := st.BeginRead()
	at, known := history[digest(t, r)]
	st.EndRead()
	// A step may be several records (a truncation and the reclaim of its tail,
	// a large write): between them the namespace need not be in the history.
	if known && at < k.synced {
		t.Fatalf("recovered to operation %d, but %d were synced", at, k.synced)
	}
	s.check(t)
	n := 0
	var inos []meta.Inode
	r = st.BeginRead()
	var cur pmem.Cursor
	for ok := cur.Seek(r, nil); ok; ok = cur.Next() {
		key, err := meta.DecodeKey(cur.Key())
		if err != nil || key.Kind != meta.KindInode {
			continue
		}
		var in meta.Inode
		if err := meta.DecodeInode(cur.Value(), key.Ino, &in); err != nil {
			t.Fatal(err)
		}
		inos = append(inos, meta.Inode{Ino: key.Ino, Mode: in.Mode, Size: in.Size})
	}
	st.EndRead()
	buf := make([]byte, 1<<20)
	for _, in := range inos {
		if in.Mode&modeType != modeRegular {
			continue
		}
		if _, _, err := st.readAt(in.Ino, 0, buf[:min(in.Size, uint64(len(buf)))]); err != nil {
			t.Fatalf("inode %d after a power cut: %v", in.Ino, err)
		}
		n++
	}
	if _, err := st.Abandon(); err != nil {
		t.Fatal(err)
	}
	return n, known
}

func newTwinOn(t *testing.T, seed uint64, dev, region *disk.Sim, segment uint32) *twin {
	return newTwinFor(t, seed, newSimOn(t, dev, region, segment))
}

func newTwinFor(t *testing.T, seed uint64, s *simServer) *twin {
	w := &twin{t: t, s: s, sim: s, root: s.root, o: oracle.New(testShards), rng: rand.New(rand.NewPCG(seed, 1))}
	w.begin()
	for i := range 12 {
		w.names = append(w.names, fmt.Sprintf("name%d", i))
	}
	return w
}
