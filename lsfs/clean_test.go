package lsfs

import (
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// TestCleanWindows cleans segments of several pieces with records of all
// sizes, so that they lie across the pieces' ends, with and without the
// background's overlapping reads and writes.
func TestCleanWindows(t *testing.T) {
	for _, manual := range []bool{true, false} {
		const segment = 4 << 20
		dev, region := disk.NewSim("device", 1<<20+24*segment), disk.NewSim("region", 4<<20)
		if _, err := Format(dev, pmem.NewMemory(region), Geometry{SegmentBytes: segment}); err != nil {
			t.Fatal(err)
		}
		o := Options{StagingBytes: 2 * segment, CheckpointBytes: segment, manual: manual}
		s := open(t, dev, region, nil, o)
		m, rng := model{}, rand.New(rand.NewPCG(5, 5))
		n := 0
		for s.Stats().Live < s.usable()*17/20 {
			n++
			ino := sealfs.Ino(n)
			m[ino] = content(ino, 0, 1+rng.IntN(s.PayloadMax()))
			if _, err := s.put(ino, m[ino]); err != nil {
				t.Fatal(err)
			}
		}
		for i := range unlessShort(n, n/2) {
			ino := sealfs.Ino(1 + rng.IntN(n))
			data := content(ino, i+1, len(m[ino]))
			if _, err := s.put(ino, data); err != nil {
				t.Fatal(err)
			}
			m[ino] = data
		}
		if err := m.check(s); err != nil {
			t.Error(err)
		}
		if s.Stats().Cleaned == 0 {
			t.Error("nothing was cleaned: the test did not reach its point")
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = open(t, dev.Reopen(), region.Reopen(), nil, o)
		if err := m.check(s); err != nil {
			t.Errorf("after a restart: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// sparse returns a store whose older segments are half empty, and what lives.
func sparse(t *testing.T) (dev, region *disk.Sim, s *Store, m model) {
	t.Helper()
	dev, region = testDevices(32)
	format(t, dev, region)
	s = open(t, dev, region, nil, testOptions())
	m = model{}
	for ino := sealfs.Ino(1); ino <= 200; ino++ {
		m[ino] = content(ino, 1, 2000)
		if _, err := s.put(ino, m[ino]); err != nil {
			t.Fatal(err)
		}
	}
	for ino := sealfs.Ino(1); ino <= 200; ino += 2 {
		if _, err := s.put(ino, nil); err != nil {
			t.Fatal(err)
		}
		delete(m, ino)
	}
	if err := s.Checkpoint(); err != nil {
		t.Fatal(err)
	}
	return dev, region, s, m
}

func cleanOnce(t *testing.T, s *Store) {
	t.Helper()
	s.gc.mu.Lock()
	gained, err := s.clean()
	s.gc.mu.Unlock()
	if err != nil || !gained {
		t.Fatalf("gained %v, %v", gained, err)
	}
}

// TestCleanKeepsAge: what is moved does not become young by it, also not by a restart.
func TestCleanKeepsAge(t *testing.T) {
	dev, region, s, m := sparse(t)
	oldest, youngest := int64(1<<62), int64(0)
	for _, v := range s.victims() {
		oldest, youngest = min(oldest, v.time), max(youngest, v.time)
	}
	cleanOnce(t, s)
	check := func(s *Store) {
		t.Helper()
		i := slices.IndexFunc(s.segs, func(g segment) bool { return g.kind == layout.Cold && g.live > 0 })
		if i < 0 {
			t.Fatal("there is no cold segment")
		}
		if got := s.segs[i].time; got < oldest || got > youngest {
			t.Errorf("the copies are of %v, the originals of %v to %v", time.Unix(0, got), time.Unix(0, oldest), time.Unix(0, youngest))
		}
	}
	check(s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dev.Reopen(), region.Reopen(), nil, testOptions())
	check(s)
	if err := m.check(s); err != nil {
		t.Error(err)
	}
}

// TestCleanDeadRot: rot in what nobody refers to any more does not keep a
// segment from being cleaned.
func TestCleanDeadRot(t *testing.T) {
	dev, region := testDevices(32)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	for ino := sealfs.Ino(1); ino <= 200; ino++ {
		if _, err := s.put(ino, content(ino, 1, 2000)); err != nil {
			t.Fatal(err)
		}
	}
	r := s.BeginRead()
	f, _, err := tinyGet(r, 1)
	slot := s.slotOf[f.at.Seq()]
	s.EndRead()
	if err != nil {
		t.Fatal(err)
	}
	for ino := sealfs.Ino(1); ino <= 200; ino += 2 {
		if _, err := s.put(ino, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Checkpoint(); err != nil {
		t.Fatal(err)
	}
	dev.FlipBit(s.slotOffset(slot)+int64(f.at.Off())+100, 1)
	for range 3 {
		cleanOnce(t, s)
	}
	if len(s.gc.spoiled) != 0 || s.segs[slot].live != 0 {
		t.Errorf("the segment keeps %d live bytes; %d are given up", s.segs[slot].live, len(s.gc.spoiled))
	}
}

// TestCleanReused: a victim that was given back and used again before its turn
// is left alone.
func TestCleanReused(t *testing.T) {
	_, _, s, m := sparse(t)
	v := s.victims()[0]
	for ino := range m {
		if _, err := s.put(ino, nil); err != nil {
			t.Fatal(err)
		}
		delete(m, ino)
	}
	for i := 0; s.segs[v.slot].seq == v.seq || s.segs[v.slot].seq == 0; i++ {
		ino := sealfs.Ino(1000 + i)
		m[ino] = content(ino, 1, 2000)
		if _, err := s.put(ino, m[ino]); err != nil {
			t.Fatal(err)
		}
		if i%20 == 0 {
			if err := s.Checkpoint(); err != nil {
				t.Fatal(err)
			}
		}
	}
	err := s.scan(v, func(rec *layout.Record, _ []byte) error {
		t.Errorf("a record of inode %d", rec.Ino)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if n := s.pins[v.slot].Load(); n != 0 {
		t.Errorf("the slot is pinned %d times", n)
	}
}

// TestPace: the fewer segments are free, the harder the cleaner works, and the
// slower changes may come; with enough of them nobody is held up.
func TestPace(t *testing.T) {
	dev, region := testDevices(256)
	format(t, dev, region)
	o := testOptions()
	o.CleanLow = 35
	s := open(t, dev, region, nil, o)
	s.gc.pace.gains.Store(1 << 20)
	all := s.free
	defer func() { s.free = all }()
	urgency, brake := 0.0, int64(0)
	for free := 40; free >= 0; free-- {
		s.mu.Lock()
		s.free = all[:free]
		s.setBrake()
		s.mu.Unlock()
		u, b := s.urgency(), s.gc.pace.brake.Load()
		if u < urgency || b < brake {
			t.Errorf("with %d free: urgency %.2f after %.2f, brake %d after %d", free, u, urgency, b, brake)
		}
		urgency, brake = u, b
		switch {
		case free >= 35 && (u > 1./16 || b != 0):
			t.Errorf("with %d free: urgency %.2f, brake %d", free, u, b)
		case free == 10 && (u != 1 || b != 0):
			t.Errorf("half-way: urgency %.2f, brake %d", u, b)
		case free == 3 && b == 0:
			t.Error("on the reserve: no brake")
		case free == 0 && b > int64(2*time.Second):
			t.Errorf("changes stand still: %v a MiB, though cleaning gains one in a second", time.Duration(b))
		}
	}
	// Who comes behind others waits for as much as they take.
	s.free = all
	s.gc.pace.brake.Store(int64(time.Second))
	began := time.Now()
	for range 5 {
		s.slowDown(10 << 10)
	}
	if d := time.Since(began); d < 39*time.Millisecond {
		t.Errorf("50 KiB at 1 MiB a second came in %v", d)
	}
}

func TestCleanLow(t *testing.T) {
	for _, c := range []struct{ segments, want int }{{8, 5}, {64, 5}, {128, 8}, {256, 8}, {1024, 32}, {32768, 1024}} {
		if got := cleanLow(c.segments, 3); got != c.want {
			t.Errorf("of %d segments %d are kept free, want %d", c.segments, got, c.want)
		}
	}
}

// TestFullOverwriteGoesOn: a store that is full by df takes overwrites for ever,
// from several clients at once that come as fast as they can, of which the cleaner gains
// a segment in many rounds only; with and without far checkpoints.
func TestFullOverwriteGoesOn(t *testing.T) {
	for _, c := range []struct {
		name string
		far  int64
		live float64 // of what is usable
		size int
	}{{"no far checkpoints", -1, 0.99, 4000}, {"far checkpoints", 0, 0.9, 4000}, {"small files", 0, 0.9, 700}} {
		t.Run(c.name, func(t *testing.T) {
			dev, region := disk.NewSim("device", 1<<20+256*testSegment), disk.NewSim("region", 8<<20)
			format(t, dev, region)
			o := testOptions()
			o.manual, o.FarBytes = false, c.far
			s := open(t, dev, region, nil, o)
			const lanes = 3
			n := int(c.live * float64(s.Stats().Usable) / float64(c.size))
			var wg sync.WaitGroup
			for lane := range lanes {
				wg.Add(1)
				go func() {
					defer wg.Done()
					rng := rand.New(rand.NewPCG(21, uint64(lane)))
					for i := range 2 * n / lanes {
						ino := i
						if i >= n/lanes { // all are there: a tenth of them takes most
							if ino = rng.IntN(n / lanes); rng.IntN(10) > 0 {
								ino %= n / lanes / 10
							}
						}
						ino = ino*lanes + lane + 1
						if _, err := s.put(sealfs.Ino(ino), content(sealfs.Ino(ino), i, c.size)); err != nil {
							t.Errorf("change %d: %v", i, err)
							return
						}
					}
				}()
			}
			wg.Wait()
			st := s.Stats()
			t.Logf("%d segments cleaned, %d waits, %d far checkpoints, %d given up, %d free", st.Cleaned, st.SpaceWaits, st.FarCheckpoints, st.FarGivenUp, st.Free)
			if st.Cleaned == 0 || st.SpaceWaits == 0 {
				t.Error("the test did not reach its point")
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestCleanForWaiting: while somebody waits for space, rounds of cleaning go on
// that leave no more free than before, since several of them gain a segment, and
// they are no reason to refuse him. Without anybody the cleaner rests.
func TestCleanForWaiting(t *testing.T) {
	const segment = 512 << 10
	dev, region := disk.NewSim("device", 1<<20+96*segment), disk.NewSim("region", 4<<20)
	if _, err := Format(dev, pmem.NewMemory(region), Geometry{SegmentBytes: segment}); err != nil {
		t.Fatal(err)
	}
	s := open(t, dev, region, nil, Options{StagingBytes: 2 * segment, CheckpointBytes: segment, FarBytes: -1, manual: true})
	s.free = s.free[:len(s.free)-2] // fuller than usable allows
	rng := rand.New(rand.NewPCG(22, 22))
	n := int(s.usable() * 99 / 100 / 8000)
	i := 0
	change := func() {
		ino := sealfs.Ino(i)
		if i >= n {
			ino = sealfs.Ino(rng.IntN(n))
		}
		if _, err := s.put(ino+1, content(ino, i, 8000)); err != nil {
			t.Fatalf("change %d of %d: %v", i, n, err)
		}
		i++
	}
	for i < 2*n {
		change()
	}
	most := 0
	for range 20 {
		for s.freeSegments() > s.o.ReserveSegments {
			change()
		}
		rounds := 0
		s.gc.starved.Store(1)
		for ; s.freeSegments() <= s.o.ReserveSegments; rounds++ {
			if stuck, err := s.collect(false); stuck || err != nil {
				t.Fatalf("after %d rounds: stuck %v, %v", rounds, stuck, err)
			}
		}
		s.gc.starved.Store(0)
		most = max(most, rounds)
	}
	if most < 2 {
		t.Errorf("at most %d rounds gained a segment: the test did not reach its point", most)
	}
	for range 1000 {
		if _, err := s.collect(false); err != nil {
			t.Fatal(err)
		}
		s.mu.RLock()
		pays := s.cleaningPays()
		s.mu.RUnlock()
		if !pays || s.freeSegments() >= s.o.CleanLow {
			return
		}
	}
	t.Error("the cleaner does not come to rest")
}

// TestFarAhead: on a store that is full by df a far checkpoint that is due finds
// its segments before requests do: it is neither put off, while ever more of the log
// waits for it, nor given up.
func TestFarAhead(t *testing.T) {
	dev, region := disk.NewSim("device", 1<<20+256*testSegment), disk.NewSim("region", 4<<20)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	rng := rand.New(rand.NewPCG(23, 23))
	n := int(s.usable() * 9 / 10 / 4000)
	most := 0
	for i := range 6 * n {
		ino := i
		if i == n {
			if err := s.FarCheckpoint(); err != nil {
				t.Fatal(err)
			}
		}
		if i >= n {
			if ino = rng.IntN(n); rng.IntN(10) > 0 {
				ino %= n / 10
			}
		}
		if _, err := s.put(sealfs.Ino(ino+1), content(1, i, 4000)); err != nil {
			t.Fatalf("change %d of %d: %v", i, n, err)
		}
		if i > 2*n {
			most = max(most, s.far.rolls-s.far.base)
		}
	}
	st := s.Stats()
	t.Logf("%d far checkpoints, at most %d segments of the log behind one, %d are due", st.FarCheckpoints, most, s.farRolls())
	if st.FarGivenUp > 0 || st.FarReason != "" || st.FarFailed != "" {
		t.Errorf("given up %d times, %q, %q", st.FarGivenUp, st.FarReason, st.FarFailed)
	}
	if most > 2*s.farRolls() {
		t.Errorf("%d segments of the log behind a far checkpoint, one is due after %d", most, s.farRolls())
	}
	if st.SpaceWaits == 0 {
		t.Error("the test did not reach its point")
	}
}
