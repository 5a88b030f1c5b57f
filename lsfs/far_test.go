package lsfs

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
	pmlayout "sealfs/pmem/layout"
)

// rebuilt makes a region from what dev holds. The device is a copy's.
func rebuilt(dev *disk.Sim, size int64) (*disk.Sim, *Rebuilt, error) {
	region := disk.NewSim("rebuilt region", size)
	out, err := RebuildRegion(dev, pmem.NewMemory(region), testOptions())
	return region, out, err
}

// replayedRegion returns the region as recovery makes it from the device alone.
func replayedRegion(dev, region *disk.Sim) (*pmem.Region, error) {
	sb, err := ReadSuper(dev)
	if err != nil {
		return nil, err
	}
	reg, h, err := pmem.Open(pmem.NewMemory(region), pmem.Options{})
	if err != nil {
		return nil, err
	}
	o := testOptions().withDefaults(sb.Segments)
	s := &Store{dev: disk.Watch(dev), o: o, log: o.Logger, store: sb.Store, seg: int64(sb.SegmentBytes), segs: make([]segment, sb.Segments), region: reg}
	s.super.block = *sb
	rp := &replay{s: s, next: layout.NoSlot, last: sb.FirstPrev, rec: recovered{end: h.Start, slot: h.StartSlot, chain: h.Chain}}
	return reg, rp.run()
}

// sameRegions compares two regions key by key, and then byte by byte.
func sameRegions(a, b *pmem.Region) error {
	var x, y pmem.Cursor
	n := 0
	for okX, okY := x.Seek(a, nil), y.Seek(b, nil); okX || okY; okX, okY = x.Next(), y.Next() {
		if okX != okY || !bytes.Equal(x.Key(), y.Key()) || !bytes.Equal(x.Value(), y.Value()) {
			return fmt.Errorf("key %d differs", n)
		}
		n++
	}
	if err := errors.Join(x.Err(), y.Err()); err != nil {
		return err
	}
	zeros := make([]byte, pmem.PageSize)
	page := func(r *pmem.Region, no pmem.PageNo) []byte {
		if p, err := r.Page(no); err == nil {
			return p
		}
		return zeros
	}
	h := a.Header()
	for no := pmem.PageNo(2); uint64(no) < max(a.Usage().Pages, b.Usage().Pages); no++ {
		if pmlayout.HasSum(uint64(no), h.TablePages()) && !bytes.Equal(page(a, no), page(b, no)) {
			return fmt.Errorf("page %d differs, though all keys are the same", no)
		}
	}
	return b.Check(func(string) {})
}

// checkRebuild rebuilds a copy of the region from a copy of the device and
// compares it with what recovery makes of the region itself.
func checkRebuild(dev, region *disk.Sim) (*disk.Sim, error) {
	again, _, err := rebuilt(dev.Clone(), region.Size())
	if err != nil {
		return nil, err
	}
	want, err := replayedRegion(dev.Clone(), region.Clone())
	if err != nil {
		return nil, fmt.Errorf("replay of the region itself: %w", err)
	}
	got, h, err := pmem.Open(pmem.NewMemory(again), pmem.Options{})
	if err != nil {
		return nil, err
	}
	if sb, err := ReadSuper(dev); err != nil || h.Start < sb.Tail {
		return nil, fmt.Errorf("the rebuilt region starts at %v, the tail is %v: %v", h.Start, sb.Tail, err)
	}
	return again, sameRegions(want, got)
}

// TestRebuild: after random histories, with cleaning, near and far checkpoints,
// kills and reopenings, the region made from the device is the one that was lost.
func TestRebuild(t *testing.T) {
	seeds := uint64(4)
	if testing.Short() {
		seeds = 1
	}
	for seed := range seeds {
		rng := rand.New(rand.NewPCG(seed, 11))
		dev, region := testDevices(60)
		format(t, dev, region)
		o := testOptions()
		o.FarBytes = 10 * testSegment
		s := open(t, dev, region, nil, o)
		m := model{}
		compared, cleaned := 0, uint64(0)
		for round := range 60 {
			run(t, s, m, rng, rng.IntN(150), 250, 4000)
			var err error
			switch rng.IntN(6) {
			case 0:
				err = s.FarCheckpoint()
			case 1:
				err = s.Checkpoint()
			case 2:
				_, err = s.collect(true)
			case 3:
				s.gc.mu.Lock()
				_, err = s.clean()
				s.gc.mu.Unlock()
			case 4:
				err = s.Sync()
			}
			if err != nil {
				t.Fatal(err)
			}
			cleaned += s.Stats().Cleaned
			if rng.IntN(3) > 0 {
				continue
			}
			root := s.Stats().FarReason == ""
			kept, err := s.Abandon()
			if err != nil {
				t.Fatal(err)
			}
			dev, region = dev.Reopen(), region.Reopen()
			if root {
				compared++
				again, err := checkRebuild(dev, region)
				if err != nil {
					t.Fatalf("seed %d, round %d: %v", seed, round, err)
				}
				if rng.IntN(2) == 0 {
					region = again
				}
			}
			s = open(t, dev, region, kept, o)
			if err := m.check(s); err != nil {
				t.Fatalf("seed %d, round %d: %v", seed, round, err)
			}
		}
		if compared < 5 || cleaned == 0 {
			t.Errorf("%d comparisons, %d segments cleaned: the test did not reach its point", compared, cleaned)
		}
	}
}

// TestCrashFarCheckpoint: the power goes at every write and flush of far
// checkpoints, with changes between their steps, and the region with it: from
// the device alone comes what recovery makes with the region, once there is a
// first far checkpoint.
func TestCrashFarCheckpoint(t *testing.T) {
	dev, region := testDevices(60)
	format(t, dev, region)
	o := testOptions()
	o.farStep = 1
	s := open(t, dev, region, nil, o)
	rng := rand.New(rand.NewPCG(5, 5))
	h := history{states: []model{{}}}
	const files = 60
	first, states, none := false, 0, 0
	look := func(disk.Op) {
		regions := collect(region, rng, 3)
		for d := range dev.CrashStates(rng, unlessShort(3, 2)) {
			states++
			r := regions[rng.IntN(len(regions))]
			again, err := checkRebuild(d, r)
			if errors.Is(err, sealfs.ErrNotExist) && !first {
				none++
				continue
			}
			if err != nil {
				t.Fatalf("state %d: %v", states, err)
			}
			after := open(t, d, again, nil, testOptions())
			at, err := h.find(after, files)
			if err != nil || at < h.synced {
				t.Fatalf("state %d: change %d, synced were %d: %v", states, at, h.synced, err)
			}
		}
	}
	change := func(i int) {
		ino := sealfs.Ino(1 + rng.IntN(files))
		data := content(ino, i, 1+rng.IntN(3000))
		h.add(ino, data)
		if _, err := s.put(ino, data); err != nil {
			t.Fatal(err)
		}
	}
	n, rounds, want := 0, 6, 150
	if testing.Short() {
		rounds, want = 4, 80
	}
	for round := range rounds {
		for range 40 {
			change(n)
			n++
		}
		if round == 3 { // all pages are looked at again
			kept, err := s.Abandon()
			if err != nil {
				t.Fatal(err)
			}
			dev, region = dev.Reopen(), region.Reopen()
			s = open(t, dev, region, kept, o)
		}
		dev.SetHook(look)
		region.SetHook(look)
		for done := false; !done; {
			s.gc.mu.Lock()
			var err error
			done, err = s.farStep()
			s.gc.mu.Unlock()
			if err != nil {
				t.Fatal(err)
			}
			change(n)
			n++
			switch rng.IntN(4) {
			case 0:
				if err := s.Sync(); err != nil {
					t.Fatal(err)
				}
				h.synced = len(h.states) - 1
			case 1:
				if err := s.Checkpoint(); err != nil {
					t.Fatal(err)
				}
			}
		}
		dev.SetHook(nil)
		region.SetHook(nil)
		first = true
	}
	t.Logf("%d states, %d of them before the first far checkpoint", states, none)
	if none == 0 || states < want {
		t.Error("the test did not reach its point")
	}
}

// TestKillRegionLost: a process dies and its region is lost with it: from device
// and staging comes everything that was answered.
func TestKillRegionLost(t *testing.T) {
	dev, region := testDevices(60)
	format(t, dev, region)
	m, rng := model{}, rand.New(rand.NewPCG(6, 6))
	s := open(t, dev, region, nil, testOptions())
	if err := s.FarCheckpoint(); err != nil {
		t.Fatal(err)
	}
	for round := range 30 {
		run(t, s, m, rng, rng.IntN(100), 50, 3000)
		var err error
		switch rng.IntN(5) {
		case 0:
			err = s.Sync()
		case 1:
			err = s.Checkpoint()
		case 2:
			err = s.drain(false)
		case 3:
			err = s.FarCheckpoint()
		}
		if err != nil {
			t.Fatal(err)
		}
		kept, err := s.Abandon()
		if err != nil {
			t.Fatal(err)
		}
		dev = dev.Reopen()
		region, _, err := rebuilt(dev, testRegion)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		s = open(t, dev.Reopen(), region.Reopen(), kept, testOptions())
		dev = s.dev.Device.(*disk.Sim)
		if err := m.check(s); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
}

// farSpace returns what far segments take and what they may.
func farSpace(s *Store) (have, limit int64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	u := s.region.Usage()
	return int64(len(s.far.segs)) * s.seg, 2*int64(u.Used+u.Reserved)*pmem.PageSize + 2*s.seg
}

// TestFarSpace: far segments hold at most twice the region and two segments, in
// whatever pattern its pages change.
func TestFarSpace(t *testing.T) {
	dev, region := disk.NewSim("device", 1<<20+400*testSegment), disk.NewSim("region", 8<<20)
	format(t, dev, region)
	o := testOptions()
	s := open(t, dev, region, nil, o)
	rng := rand.New(rand.NewPCG(7, 7))
	for ino := sealfs.Ino(1); ino <= 30000; ino++ {
		if _, err := s.put(ino, content(ino, 1, 10)); err != nil {
			t.Fatal(err)
		}
	}
	most := 0.0
	rounds := 60
	if testing.Short() {
		rounds = 10
	}
	for round := range rounds {
		for range 1 + rng.IntN(200) {
			ino := sealfs.Ino(1 + rng.IntN(30000))
			for i := range sealfs.Ino(1 + rng.IntN(20)) {
				if _, err := s.put(min(ino+i, 30000), content(ino, round, 10)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := s.FarCheckpoint(); err != nil {
			t.Fatal(err)
		}
		have, limit := farSpace(s)
		most = max(most, float64(have)/float64(limit))
		if have > limit {
			t.Fatalf("round %d: %d bytes of far segments, at most %d are allowed", round, have, limit)
		}
	}
	st := s.Stats()
	t.Logf("at most %.0f %% of the bound; %d pages copied in %d far checkpoints, the region has %d", 100*most, st.FarPages, st.FarCheckpoints, st.Region.Used)
	if st.Region.Used < 200 {
		t.Error("the region is too small: the test did not reach its point")
	}
	if _, err := s.Abandon(); err != nil {
		t.Fatal(err)
	}
	if _, err := checkRebuild(dev.Reopen(), region.Reopen()); err != nil {
		t.Error(err)
	}
}

// TestFullFar: a full device gives its far checkpoint up before anybody is
// refused a delete, says so, and makes a new one when there is room again.
func TestFullFar(t *testing.T) {
	dev, region := disk.NewSim("device", 1<<20+64*testSegment), disk.NewSim("region", 4<<20)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	if err := s.FarCheckpoint(); err != nil {
		t.Fatal(err)
	}
	m := model{}
	ino := sealfs.Ino(1)
	for ; ; ino++ {
		data := content(ino, 1, 4000)
		if _, err := s.put(ino, data); errors.Is(err, sealfs.ErrNoSpace) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		m[ino] = data
	}
	st := s.Stats()
	if st.FarGivenUp == 0 || !strings.Contains(st.FarReason, "given up") || st.FarSegments != 0 || st.FarHeld != 0 {
		t.Fatalf("full, but the far checkpoint keeps %d segments and %d of the log: %+v", st.FarSegments, st.FarHeld, st)
	}
	if full := st.Usable; st.Live < full*9/10 {
		t.Errorf("full at %d bytes of %d", st.Live, full)
	}
	if _, _, err := rebuilt(dev.Clone(), 4<<20); !errors.Is(err, sealfs.ErrNotExist) {
		t.Errorf("rebuilding without a far checkpoint: %v", err)
	}
	// Restarts on a full device, and then deletes until it is empty.
	for range 5 {
		kept, err := s.Abandon()
		if err != nil {
			t.Fatal(err)
		}
		dev, region = dev.Reopen(), region.Reopen()
		s = open(t, dev, region, kept, testOptions())
	}
	restored := 0
	for ino--; ino > 0; ino-- {
		if _, err := s.put(ino, nil); err != nil {
			t.Fatalf("delete: %v", err)
		}
		delete(m, ino)
		if ino%20 == 0 {
			if _, err := s.collect(true); err != nil {
				t.Fatal(err)
			}
		}
		if s.Stats().FarReason == "" && restored == 0 {
			restored = len(m)
			if _, err := checkRebuild(dev.Clone(), region.Clone()); err != nil {
				t.Error(err)
			}
		}
	}
	if restored == 0 {
		t.Errorf("there is room, and no far checkpoint: %s", s.Stats().FarReason)
	}
	if err := m.check(s); err != nil {
		t.Error(err)
	}
}

// TestFullFarChurn works at the limit with far checkpoints that come and go:
// whenever there is one, the region can be rebuilt.
func TestFullFarChurn(t *testing.T) {
	for seed := range uint64(unlessShort(3, 1)) {
		fullFarChurn(t, seed)
	}
}

func fullFarChurn(t *testing.T, seed uint64) {
	dev, region := testDevices(40)
	format(t, dev, region)
	o := testOptions()
	s := open(t, dev, region, nil, o)
	m, rng := model{}, rand.New(rand.NewPCG(8, seed))
	refused, checked := 0, 0
	drop := func() {
		// Of the files that there are, one that does not depend on the order of a map.
		for victim, n := sealfs.Ino(1+rng.IntN(600)), 0; n < 600; victim, n = victim%600+1, n+1 {
			if m[victim] == nil {
				continue
			}
			if _, err := s.put(victim, nil); err != nil {
				t.Fatalf("delete on a full store: %v", err)
			}
			delete(m, victim)
			return
		}
	}
	for i := range unlessShort(8000, 3000) {
		ino := sealfs.Ino(1 + rng.IntN(600))
		data := content(ino, i, 1+rng.IntN(8000))
		switch _, err := s.put(ino, data); {
		case err == nil:
			m[ino] = data
		case errors.Is(err, sealfs.ErrNoSpace):
			refused++
			for range 1 + rng.IntN(2)*rng.IntN(400) {
				drop()
			}
			if _, err := s.collect(true); err != nil {
				t.Fatal(err)
			}
		default:
			t.Fatal(err)
		}
		if i%100 == 0 {
			if s.Stats().FarReason == "" {
				checked++
				if err := s.Sync(); err != nil {
					t.Fatal(err)
				}
				if _, err := checkRebuild(dev.Clone(), region.Clone()); err != nil {
					t.Fatalf("operation %d: %v", i, err)
				}
			}
			if err := m.check(s); err != nil {
				t.Fatalf("operation %d: %v", i, err)
			}
		}
	}
	st := s.Stats()
	t.Logf("refused %d times; %d far checkpoints, given up %d times; %d segments cleaned; rebuilt %d times", refused, st.FarCheckpoints, st.FarGivenUp, st.Cleaned, checked)
	if refused == 0 || st.FarCheckpoints < 3 || st.FarGivenUp < 1 || checked < 3 {
		t.Error("the test did not reach its point")
	}
}

// TestFarRestart: after a start all pages are compared, and only those that
// changed are copied.
func TestFarRestart(t *testing.T) {
	dev, region := disk.NewSim("device", 1<<20+200*testSegment), disk.NewSim("region", 4<<20)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	for ino := sealfs.Ino(1); ino <= 10000; ino++ {
		if _, err := s.put(ino, content(ino, 1, 10)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.FarCheckpoint(); err != nil {
		t.Fatal(err)
	}
	all := s.Stats().FarPages
	if err := s.FarCheckpoint(); err != nil {
		t.Fatal(err)
	}
	if again := s.Stats().FarPages - all; again > 5 {
		t.Errorf("%d pages copied the second time", again)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dev.Reopen(), region.Reopen(), nil, testOptions())
	if st := s.Stats(); st.FarReason != "" || st.FarStart == 0 {
		t.Errorf("opened with a far checkpoint: %q", st.FarReason)
	}
	if _, err := s.put(1, content(1, 2, 10)); err != nil {
		t.Fatal(err)
	}
	if err := s.FarCheckpoint(); err != nil {
		t.Fatal(err)
	}
	if n := s.Stats().FarPages; all < 60 || n > all/4 {
		t.Errorf("%d pages copied at first, %d after a restart that changed few", all, n)
	}
}

// TestRotFar: whatever decays of a far checkpoint, a rebuild that needs it says
// so and where; the store opens all the same and makes another.
func TestRotFar(t *testing.T) {
	build := func() (dev, region *disk.Sim, m model) {
		dev, region = testDevices(60)
		format(t, dev, region)
		s := open(t, dev, region, nil, testOptions())
		m = model{}
		run(t, s, m, rand.New(rand.NewPCG(9, 9)), 300, 100, 2000)
		if err := s.FarCheckpoint(); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		return dev.Reopen(), region.Reopen(), m
	}
	dev, _, _ := build()
	sb, err := ReadSuper(dev)
	if err != nil {
		t.Fatal(err)
	}
	rb, err := newRebuild(dev, testOptions())
	if err != nil {
		t.Fatal(err)
	}
	place := func(at sealfs.LSN, off int64) int64 {
		return sb.SlotOffset(rb.index.slot[at.Seq()].Slot) + int64(at.Off()) + off
	}
	var page sealfs.LSN
	if err := rb.from.refs(rb.maps, rb.root.Pages, func(no pmem.PageNo, ref layout.FarRef) error { page = ref.At; return nil }); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name     string
		at       int64
		readable bool // at Open, which reads root and map
	}{
		{"root", place(sb.FarRoot, 100), false},
		{"root's references", place(sb.FarRoot, layout.BlockSize+3), false},
		{"map", place(rb.maps[0].At, 50), false},
		{"page", place(page, 70), true},
		{"log", sb.SlotOffset(rb.root.StartSlot) + int64(rb.root.Start.Off()) + 70, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dev, region, m := build()
			dev.FlipBit(c.at, 2)
			if _, _, err := rebuilt(dev.Clone(), testRegion); !errors.Is(err, sealfs.ErrCorrupt) {
				t.Errorf("rebuild: %v", err)
			}
			s := open(t, dev, region, nil, testOptions())
			if st := s.Stats(); (st.FarReason == "") != c.readable {
				t.Errorf("opened, and of far checkpoints it says %q", st.FarReason)
			}
			if err := m.check(s); err != nil {
				t.Fatal(err)
			}
			bad, err := s.VerifyFar(func(int) error { return nil })
			switch c.name {
			case "page":
				if err != nil || bad != 1 || !strings.Contains(s.Stats().FarReason, "damaged") {
					t.Errorf("%d pages do not verify, %v: %q", bad, err, s.Stats().FarReason)
				}
			case "log":
				if err != nil || bad != 0 {
					t.Errorf("%d pages do not verify: %v", bad, err)
				}
			default:
				if !errors.Is(err, sealfs.ErrNotExist) {
					t.Errorf("verified what cannot be read: %v", err)
				}
			}
			held := s.Stats().FarSegments
			if _, err := s.collect(true); err != nil || s.Stats().FarCheckpoints == 0 && c.name != "log" {
				t.Errorf("no far checkpoint was made: %v", err)
			}
			if err := s.FarCheckpoint(); err != nil {
				t.Fatal(err)
			}
			if st := s.Stats(); st.FarReason != "" || st.FarSegments > held+1 {
				t.Errorf("after a new one: %q, %d segments", st.FarReason, st.FarSegments)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := checkRebuild(dev.Reopen(), region.Reopen()); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestCrashRebuild: a rebuild that is cut off leaves nothing that a store takes
// for its region.
func TestCrashRebuild(t *testing.T) {
	t.Run("at once", func(t *testing.T) { crashRebuild(t, false) })
	t.Run("later", func(t *testing.T) { crashRebuild(t, true) })
}

// crashRebuild cuts the rebuild of a store that has been checkpointed before its
// first far checkpoint, or not.
func crashRebuild(t *testing.T, later bool) {
	dev, region := testDevices(60)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	m := model{}
	run(t, s, m, rand.New(rand.NewPCG(10, 10)), 200, 100, 2000)
	if later {
		if err := s.Checkpoint(); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.FarCheckpoint(); err != nil {
		t.Fatal(err)
	}
	run(t, s, m, rand.New(rand.NewPCG(10, 11)), 50, 100, 2000)
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Abandon(); err != nil {
		t.Fatal(err)
	}
	dev = dev.Reopen()
	again := disk.NewSim("rebuilt region", testRegion)
	rng := rand.New(rand.NewPCG(11, 11))
	opened, refused := 0, 0
	again.SetHook(func(disk.Op) {
		for r := range again.CrashStates(rng, 4) {
			s, err := Open(dev.Clone(), pmem.NewMemory(r), nil, tinyFS{}, testOptions())
			if err == nil {
				opened++
				err = m.check(s)
			} else if errors.Is(err, sealfs.ErrCorrupt) {
				refused++
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	})
	if _, err := RebuildRegion(dev, pmem.NewMemory(again), testOptions()); err != nil {
		t.Fatal(err)
	}
	if opened == 0 || refused == 0 {
		t.Errorf("%d opened, %d refused: the test did not reach its point", opened, refused)
	}
}

// TestRebuildFile: on files, and with background work. The old file is untouched
// when the rebuild fails.
func TestRebuildFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "region")
	m := model{}
	open := func() (*Store, error) {
		dev, err := disk.Open(filepath.Join(dir, "device.img"), disk.OpenOptions{Exclusive: true})
		if err != nil {
			t.Fatal(err)
		}
		region, err := pmem.OpenFile(path, false)
		if err != nil {
			t.Fatal(err)
		}
		return Open(dev, region, nil, tinyFS{}, Options{StagingPath: filepath.Join(dir, "ring"), FarBytes: 8 << 20})
	}
	if err := disk.CreateImage(filepath.Join(dir, "device.img"), 256<<20); err != nil {
		t.Fatal(err)
	}
	rebuild := func() error {
		dev, err := disk.Open(filepath.Join(dir, "device.img"), disk.OpenOptions{Exclusive: true})
		if err != nil {
			t.Fatal(err)
		}
		_, err = RebuildRegionFile(dev, path, Options{})
		return errors.Join(err, dev.Close())
	}
	func() {
		dev, err := disk.Open(filepath.Join(dir, "device.img"), disk.OpenOptions{Exclusive: true})
		if err != nil {
			t.Fatal(err)
		}
		region, err := pmem.OpenFile(path, true)
		if err != nil {
			t.Fatal(err)
		}
		_, err = Format(dev, region, Geometry{SegmentBytes: 1 << 20})
		if err := errors.Join(err, dev.Close(), region.Close()); err != nil {
			t.Fatal(err)
		}
	}()
	if err := rebuild(); !errors.Is(err, sealfs.ErrNotExist) {
		t.Fatalf("rebuild without a far checkpoint: %v", err)
	}
	for round := range 3 {
		s, err := open()
		if err != nil {
			t.Fatal(err)
		}
		if err := m.check(s); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		run(t, s, m, rand.New(rand.NewPCG(12, uint64(round))), 6000, 2000, 6000)
		if err := s.FarCheckpoint(); err != nil {
			t.Fatal(err)
		}
		run(t, s, m, rand.New(rand.NewPCG(13, uint64(round))), 500, 2000, 6000)
		if st := s.Stats(); st.FarCheckpoints < 2 {
			t.Errorf("%d far checkpoints after %d bytes of log", st.FarCheckpoints, st.LogBytes)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if err := rebuild(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRotSuperblockFar: whichever superblock decays after a far checkpoint, or
// after one was given up, when all that it no longer needs has been overwritten,
// the other says the same of it.
func TestRotSuperblockFar(t *testing.T) {
	for copyNo := range int64(2) {
		dev, region := testDevices(40)
		format(t, dev, region)
		s := open(t, dev, region, nil, testOptions())
		m, rng := model{}, rand.New(rand.NewPCG(14, uint64(copyNo)))
		look := func(what string, want error) {
			t.Helper()
			d := dev.Clone()
			d.FlipBit(copyNo*layout.BlockSize+90, 3)
			if _, err := checkRebuild(d, region.Clone()); !errors.Is(err, want) {
				t.Errorf("copy %d decayed, %s: %v", copyNo, what, err)
			}
		}
		for round := range 12 {
			run(t, s, m, rng, 100, 60, 3000)
			if err := s.FarCheckpoint(); err != nil {
				t.Fatal(err)
			}
			look("just made", nil)
			for s.Stats().Rolls < uint64(12*(round+1)) {
				run(t, s, m, rng, 10, 60, 3000)
			}
			if err := s.Sync(); err != nil {
				t.Fatal(err)
			}
			look("older", nil)
		}
		s.gc.mu.Lock()
		_, err := s.farGiveUp("a test")
		s.gc.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		look("given up", sealfs.ErrNotExist)
		if err := m.check(s); err != nil {
			t.Error(err)
		}
	}
}

// TestFarOff: a store that is opened without far checkpoints lets go of the one
// that is there.
func TestFarOff(t *testing.T) {
	dev, region := testDevices(40)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	m := model{}
	run(t, s, m, rand.New(rand.NewPCG(15, 1)), 100, 50, 3000)
	if err := s.FarCheckpoint(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	o := testOptions()
	o.FarBytes = -1
	s = open(t, dev.Reopen(), region.Reopen(), nil, o)
	if _, err := s.collect(true); err != nil {
		t.Fatal(err)
	}
	st := s.Stats()
	if sb := s.Superblock(); sb.FarRoot != 0 || st.FarSegments != 0 || st.FarHeld != 0 || !strings.Contains(st.FarReason, "switched off") {
		t.Errorf("switched off: root %v, %d segments, %d of the log, %q", sb.FarRoot, st.FarSegments, st.FarHeld, st.FarReason)
	}
	if err := s.FarCheckpoint(); !errors.Is(err, sealfs.ErrNotSupported) {
		t.Errorf("a far checkpoint was made: %v", err)
	}
	if err := m.check(s); err != nil {
		t.Error(err)
	}
}

// TestFarUnderway: while far checkpoints are made slowly, and what is given back
// is used again at once, the one before can be used; and the new one when it is
// complete.
func TestFarUnderway(t *testing.T) {
	dev, region := testDevices(100)
	format(t, dev, region)
	o := testOptions()
	o.farStep = 1
	s := open(t, dev, region, nil, o)
	m, rng := model{}, rand.New(rand.NewPCG(16, 16))
	put := func(ino sealfs.Ino, data []byte) {
		t.Helper()
		m[ino] = data
		if _, err := s.put(ino, data); err != nil {
			t.Fatal(err)
		}
	}
	for ino := sealfs.Ino(1); ino <= 4000; ino++ {
		put(ino, content(ino, 1, 10))
	}
	n := 2
	for round := range 5 {
		steps := 0
		for done := false; !done; steps++ {
			for range 70 { // a few files, so that segments die and are used again
				n++
				put(sealfs.Ino(1+rng.IntN(20)), content(1, n, 3000))
			}
			for ino := sealfs.Ino(1); ino <= 4000; ino += 200 {
				put(ino+sealfs.Ino(round), content(ino, n, 11)) // all over the region
			}
			var err error
			if err = s.Checkpoint(); err != nil {
				t.Fatal(err)
			}
			s.mu.Lock()
			slices.Reverse(s.free)
			s.mu.Unlock()
			s.gc.mu.Lock()
			done, err = s.farStep()
			s.gc.mu.Unlock()
			if err != nil {
				t.Fatalf("round %d, step %d: %v", round, steps, err)
			}
			if round > 0 || done {
				if _, err := checkRebuild(dev.Clone(), region.Clone()); err != nil {
					t.Fatalf("round %d, step %d: %v", round, steps, err)
				}
			}
		}
		if steps < 3 || s.Stats().FarCheckpoints != uint64(round)+1 {
			t.Errorf("round %d: %d steps", round, steps)
		}
	}
	if err := m.check(s); err != nil {
		t.Error(err)
	}
}

// TestRebuildHeaders: where several recoveries went on from one end of the log, the
// last one's segment continues it, and the log of the ones before ended there.
func TestRebuildHeaders(t *testing.T) {
	end := sealfs.MakeLSN(7, 8192)
	h := func(seq, incarnation, chain uint32) *layout.SegmentHeader {
		return &layout.SegmentHeader{Seq: seq, Incarnation: incarnation, Chain: chain, Prev: end, Kind: layout.Hot}
	}
	x := &headers{from: map[sealfs.LSN][]*layout.SegmentHeader{end: {h(11, 3, 5), h(12, 4, 5), h(13, 2, 5), h(14, 9, 6), h(6, 8, 5)}}}
	if got := x.after(end, 5); got == nil || got.Seq != 12 {
		t.Errorf("the log goes on in %+v, not in segment 12", got)
	}
	if got := x.after(end+64, 5); got != nil {
		t.Errorf("the log goes on in %+v at another place", got)
	}
	for incarnation, want := range map[uint32]bool{3: true, 4: false} {
		if x.ends(end, 5, incarnation) != want || x.ends(end+64, 5, incarnation) {
			t.Errorf("incarnation %d ends there: not %v", incarnation, want)
		}
	}
	if x.ends(end, 7, 1) {
		t.Error("it ends where no header fits the chain")
	}
}

// TestFarNoStart: a store dies in each of many starts, before it could make room.
// Each takes a segment, which the far checkpoint then holds. When none is left to
// start with, the far checkpoint goes.
func TestFarNoStart(t *testing.T) {
	dev, region := testDevices(16)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	m := model{}
	run(t, s, m, rand.New(rand.NewPCG(17, 17)), 60, 20, 3000)
	if err := s.FarCheckpoint(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Abandon(); err != nil {
		t.Fatal(err)
	}
	type shot struct{ dev, region *disk.Sim }
	root := s.Superblock().FarRoot
	for start := range 40 {
		dev, region = dev.Reopen(), region.Reopen()
		var last shot
		dev.SetHook(func(o disk.Op) {
			d := dev.Clone()
			if sb, err := ReadSuper(d); err == nil && sb.FarRoot == root && o.Kind == disk.OpFlush {
				last = shot{d, region.Clone()}
			}
		})
		s, err := Open(dev, pmem.NewMemory(region), nil, tinyFS{}, testOptions())
		if err != nil {
			t.Fatalf("start %d: %v", start, err)
		}
		if err := m.check(s); err != nil {
			t.Fatalf("start %d: %v", start, err)
		}
		if why := s.Stats().FarReason; strings.Contains(why, "start with") {
			return
		}
		if sb := s.Superblock(); sb.FarRoot != 0 && s.Stats().FarCheckpoints == 0 {
			if err := s.Sync(); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Abandon(); err != nil {
				t.Fatal(err)
			}
			continue
		}
		dev, region = last.dev, last.region // before there was room again
	}
	t.Error("there was always a segment to start with: the test did not reach its point")
}

// TestFarAbandoned: a far checkpoint that looks at all pages after a start, and is
// given up on the way, leaves the rest to the next one.
func TestFarAbandoned(t *testing.T) {
	dev, region := testDevices(100)
	format(t, dev, region)
	o := testOptions()
	o.farStep = 1
	s := open(t, dev, region, nil, o)
	for ino := sealfs.Ino(1); ino <= 4000; ino++ {
		if _, err := s.put(ino, content(ino, 1, 10)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.FarCheckpoint(); err != nil {
		t.Fatal(err)
	}
	for ino := sealfs.Ino(1); ino <= 4000; ino += 100 {
		if _, err := s.put(ino, content(ino, 2, 10)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	dev, region = dev.Reopen(), region.Reopen()
	s = open(t, dev, region, nil, o)
	for _, again := range []bool{true, false} { // the second looks only at what changed
		s.gc.mu.Lock()
		done, err := s.farStep()
		if again && !done && err == nil {
			s.farAbandon(errFarRoom)
		}
		s.gc.mu.Unlock()
		if err != nil || done {
			t.Fatalf("one step: %v, %v: the test did not reach its point", done, err)
		}
		if again && s.Stats().FarFailed == "" {
			t.Errorf("of the far checkpoint that was not completed it says %q", s.Stats().FarFailed)
		}
		if _, err := checkRebuild(dev.Clone(), region.Clone()); err != nil {
			t.Errorf("given up: %v", err)
		}
	}
	if err := s.FarCheckpoint(); err != nil {
		t.Fatal(err)
	}
	if _, err := checkRebuild(dev.Clone(), region.Clone()); err != nil {
		t.Error(err)
	}
	if s.Stats().FarFailed != "" {
		t.Errorf("completed, and still: %q", s.Stats().FarFailed)
	}
}

// TestFarNoRoom: a far checkpoint that finds no segment in the middle of a batch
// goes on where it was when there are some, also one that looks at all pages.
func TestFarNoRoom(t *testing.T) {
	dev, region := testDevices(100)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	for ino := sealfs.Ino(1); ino <= 4000; ino++ {
		if _, err := s.put(ino, content(ino, 1, 10)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.FarCheckpoint(); err != nil {
		t.Fatal(err)
	}
	for round := range 6 {
		if round >= 3 { // what has changed is not known then
			kept, err := s.Abandon()
			if err != nil {
				t.Fatal(err)
			}
			dev, region = dev.Reopen(), region.Reopen()
			s = open(t, dev, region, kept, testOptions())
		}
		for ino := sealfs.Ino(1 + round); ino <= 4000; ino += 100 {
			if _, err := s.put(ino, content(ino, 2+round, 10)); err != nil {
				t.Fatal(err)
			}
		}
		s.mu.Lock()
		free := s.free
		s.free = free[: s.o.ReserveSegments+round%3 : s.o.ReserveSegments+round%3]
		s.mu.Unlock()
		if err := s.FarCheckpoint(); !errors.Is(err, sealfs.ErrNoSpace) {
			t.Errorf("without room: %v", err)
		}
		if s.far.run == nil || s.Stats().FarFailed == "" {
			t.Errorf("without room: under way %v, and it says %q", s.far.run != nil, s.Stats().FarFailed)
		}
		start := s.far.run.start
		s.mu.Lock()
		s.free = append(s.free, free[s.o.ReserveSegments+round%3:]...)
		s.mu.Unlock()
		if err := s.FarCheckpoint(); err != nil {
			t.Fatal(err)
		}
		if st := s.Stats(); st.FarStart != start || st.FarFailed != "" {
			t.Errorf("it began at %v, and completed is one of %v, %q", start, st.FarStart, st.FarFailed)
		}
		if _, err := checkRebuild(dev.Clone(), region.Clone()); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
	}
}

// TestFarKeptAfterRestart: a start gives nothing back that the durable far
// checkpoint needs: a segment with the root alone, or copies that the next one
// replaces.
func TestFarKeptAfterRestart(t *testing.T) {
	dev, region := testDevices(100)
	format(t, dev, region)
	o := testOptions()
	o.farStep = 1
	s := open(t, dev, region, nil, o)
	rng := rand.New(rand.NewPCG(18, 18))
	n := 0
	churn := func(count int) {
		t.Helper()
		for range count { // a few files, so that segments die and are used again at once
			n++
			if _, err := s.put(sealfs.Ino(1+rng.IntN(20)), content(1, n, 3000)); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Checkpoint(); err != nil {
			t.Fatal(err)
		}
		s.mu.Lock()
		slices.Reverse(s.free)
		s.mu.Unlock()
	}
	restart := func() {
		t.Helper()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		dev, region = dev.Reopen(), region.Reopen()
		s = open(t, dev, region, nil, o)
		s.mu.Lock()
		slices.Reverse(s.free)
		s.mu.Unlock()
	}
	look := func(what string) {
		t.Helper()
		if _, err := checkRebuild(dev.Clone(), region.Clone()); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	for ino := sealfs.Ino(1); ino <= 4000; ino++ {
		if _, err := s.put(ino, content(ino, 1, 10)); err != nil {
			t.Fatal(err)
		}
	}
	for tries := 0; tries == 0 || s.Superblock().FarRoot.Off() != layout.BlockSize; tries++ {
		if tries == 100 {
			t.Fatal("the root never stands at the front of a segment: the test did not reach its point")
		}
		churn(1)
		for i := range tries % 15 { // another number of pages each time
			if _, err := s.put(sealfs.Ino(1+250*i), content(1, tries, 10)); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.FarCheckpoint(); err != nil {
			t.Fatal(err)
		}
	}
	restart()
	churn(150)
	look("root alone")
	for ino := sealfs.Ino(1); ino <= 4000; ino += 10 {
		if _, err := s.put(ino, content(ino, 2, 10)); err != nil {
			t.Fatal(err)
		}
	}
	restart()
	for done := false; !done; {
		var err error
		s.gc.mu.Lock()
		done, err = s.farStep()
		s.gc.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		churn(70)
		look("half replaced")
	}
	// A root that cannot be read now may be read later.
	off := s.slotOffset(s.Superblock().FarSlot) + int64(s.Superblock().FarRoot.Off()) + 100
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	dev, region = dev.Reopen(), region.Reopen()
	dev.FlipBit(off, 1)
	s = open(t, dev, region, nil, o)
	for range 5 {
		churn(50)
	}
	if s.Stats().FarReason == "" {
		t.Error("a root that cannot be read serves all the same")
	}
	dev.FlipBit(off, 1)
	look("read again")
}
