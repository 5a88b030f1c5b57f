package lsfs

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/pmem"
)

func openDax(dev disk.Device, mem *pmem.SimDax) (*Store, error) {
	return Open(dev, mem, nil, tinyFS{}, testOptions())
}

func formatDax(t testing.TB) (*disk.Sim, *pmem.SimDax) {
	t.Helper()
	dev, _ := testDevices(20)
	mem := pmem.NewSimDax("pmem", testRegion/4)
	if _, err := Format(dev, mem, Geometry{SegmentBytes: testSegment, Label: "test"}); err != nil {
		t.Fatal(err)
	}
	return dev, mem
}

// daxRun is crashRun on persistent memory: every change that was answered must
// survive every power cut, also one in the recovery from another, and one in the
// recovery from a SIGKILL.
type daxRun struct {
	rng             *rand.Rand
	dev             *disk.Sim
	mem             *pmem.SimDax
	h               history
	files           int
	answered        int
	flushed         int // of them, those that the device has for certain
	rebuilt         int // states without region and ring
	states, nested  int
	every, perPoint int
	ops             int
	events          int // of the last recovery that was watched
	busy            bool
	err             error // the first violation
}

func (c *daxRun) hook() {
	c.ops++
	if c.busy || c.err != nil || c.ops%c.every != 0 {
		return
	}
	c.busy = true
	defer func() { c.busy = false }()
	devs := collect(c.dev, c.rng, 2)
	for mem := range c.mem.CrashStates(c.rng, c.perPoint) {
		if c.recover(devs[c.rng.IntN(len(devs))].Clone(), mem, 2); c.err != nil {
			return
		}
	}
	// A SIGKILL here: memory and device are as the process saw them. Some power
	// cut follows in the recovery.
	if c.rng.IntN(4) == 0 {
		c.recover(c.dev.Clone(), c.mem.Clone(), 2)
	}
}

// recover opens what a cut left and looks for what was answered; cuts bounds how
// many more cuts may follow, one inside another.
func (c *daxRun) recover(dev *disk.Sim, mem *pmem.SimDax, cuts int) {
	c.states++
	if c.rng.IntN(8) == 0 {
		if c.rebuild(dev.Clone()); c.err != nil {
			return
		}
	}
	var cutDev *disk.Sim
	var cutMem *pmem.SimDax
	if cuts > 0 && c.rng.IntN(2) == 0 {
		n, at := 0, 1+c.rng.IntN(max(c.events, 60))
		watch := func() {
			if n++; n != at {
				return
			}
			devs := collect(dev, c.rng, 3)
			cutDev = devs[c.rng.IntN(len(devs))]
			for m := range mem.CrashStates(c.rng, 6) {
				if cutMem = m; c.rng.IntN(4) == 0 {
					break
				}
			}
		}
		defer func() { c.events = n }()
		dev.SetHook(func(disk.Op) { watch() })
		mem.SetHook(watch)
	}
	s, err := openDax(dev, mem)
	if err != nil {
		c.err = fmt.Errorf("state %d, after %d operations: %w", c.states, c.ops, err)
		return
	}
	dev.SetHook(nil)
	mem.SetHook(nil)
	at, err := c.h.find(s, c.files)
	if err == nil && at < c.answered {
		err = fmt.Errorf("recovered to change %d, but %d were answered", at, c.answered)
	}
	if err != nil {
		c.err = fmt.Errorf("state %d, after %d operations: %w", c.states, c.ops, err)
		return
	}
	if cutMem != nil {
		c.nested++
		c.recover(cutDev, cutMem, cuts-1)
	}
}

// rebuild goes on with nothing but the device, if it has a far checkpoint: the
// persistent memory is lost.
func (c *daxRun) rebuild(dev *disk.Sim) {
	sb, err := ReadSuper(dev)
	if err != nil || sb.FarRoot == 0 {
		return
	}
	c.rebuilt++
	mem := pmem.NewSimDax("pmem", testRegion/4)
	var s *Store
	if _, err = RebuildRegion(dev, mem, testOptions()); err == nil {
		s, err = openDax(dev, certain(mem))
	}
	if err == nil {
		var at int
		if at, err = c.h.find(s, c.files); err == nil && at < c.flushed {
			err = fmt.Errorf("rebuilt to change %d, but %d were flushed", at, c.flushed)
		}
	}
	if err != nil {
		c.err = fmt.Errorf("rebuilt in state %d, after %d operations: %w", c.states, c.ops, err)
	}
}

// certain returns what is left of memory that loses all that it may.
func certain(mem *pmem.SimDax) *pmem.SimDax {
	for lost := range mem.CrashStates(rand.New(rand.NewPCG(1, 1)), 1) {
		return lost
	}
	return nil // there is always one
}

func (c *daxRun) run(t *testing.T, changes int) {
	s, err := openDax(c.dev, c.mem)
	if err != nil {
		t.Fatal(err)
	}
	c.h = history{states: []model{{}}}
	c.dev.SetHook(func(disk.Op) { c.hook() })
	c.mem.SetHook(c.hook)
	for i := 0; i < changes && c.err == nil; i++ {
		ino := sealfs.Ino(1 + c.rng.IntN(c.files))
		var data []byte
		if c.h.last()[ino] == nil || c.rng.IntN(5) > 0 {
			data = content(ino, i, 1+c.rng.IntN(9000))
		}
		c.h.add(ino, data)
		if _, err := s.put(ino, data); err != nil {
			t.Fatal(err)
		}
		c.answered = len(c.h.states) - 1
		op := c.rng.IntN(24)
		switch op {
		case 0:
			err = s.flushLog()
		case 1:
			err = s.drain(false)
		case 2:
			err = s.Checkpoint()
		case 3:
			_, err = s.collect(true)
		case 5, 6:
			if err = s.FarCheckpoint(); errors.Is(err, sealfs.ErrNoSpace) {
				err, op = nil, 1
			}
		case 4:
			if c.rng.IntN(3) > 0 {
				break
			}
			if err = s.Close(); err == nil {
				c.dev = c.dev.Clone() // the closed one stays closed
				c.dev.SetHook(func(disk.Op) { c.hook() })
				s, err = openDax(c.dev, c.mem)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		if op == 0 || op == 2 || op > 4 && op < 7 {
			c.flushed = c.answered
		}
	}
}

func newDaxRun(t *testing.T, seed uint64, every int) *daxRun {
	c := &daxRun{rng: rand.New(rand.NewPCG(seed, 7)), files: 30, every: every, perPoint: 4}
	c.dev, c.mem = formatDax(t)
	return c
}

func TestCrashDax(t *testing.T) {
	changes, every := unlessShort(200, 100), unlessShort(11, 23)
	states, nested, rebuilt := 0, 0, 0
	for seed := range uint64(unlessShort(3, 2)) {
		c := newDaxRun(t, seed, every)
		if c.run(t, changes); c.err != nil {
			t.Fatalf("seed %d: %v", seed, c.err)
		}
		states += c.states
		nested += c.nested
		rebuilt += c.rebuilt
	}
	t.Logf("%d crash states recovered, %d of them cuts during recovery, %d regions rebuilt", states, nested, rebuilt)
	if nested < 20 || states < 200 || rebuilt < 20 {
		t.Errorf("%d states, %d nested, %d rebuilt: the test did not reach its point", states, nested, rebuilt)
	}
}

// careless leaves out a part of what makes stores durable.
type careless struct {
	pmem.Persistence
	noFence, noWriteBack, noRedo, noStore bool
}

func (c careless) Fence() {
	if !c.noFence {
		c.Persistence.Fence()
	}
}

func (c careless) WriteBack(b []byte) {
	// Redo comes in lines, numbers of chunks are shorter, headers longer.
	if redo := len(b) > 4 && len(b) <= pmem.LineBytes; !c.noWriteBack && !(c.noRedo && redo) {
		c.Persistence.WriteBack(b)
	}
}

// Store without the way past the cache is a plain store that nobody flushes.
func (c careless) Store(dst, src []byte) {
	if c.noStore {
		copy(dst, src)
		return
	}
	c.Persistence.Store(dst, src)
}

// TestCrashDaxSeen is the proof that TestCrashDax sees what it is for: without
// fences, or without flushes, it fails.
func TestCrashDaxSeen(t *testing.T) {
	for name, with := range map[string]careless{
		"no fence": {noFence: true}, "no write-back": {noWriteBack: true}, "no write-back of redo": {noRedo: true}, "no store past the cache": {noStore: true},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(8) {
				c := newDaxRun(t, seed, 5)
				c.mem.SetWrap(func(p pmem.Persistence) pmem.Persistence {
					with.Persistence = p
					return with
				})
				if c.run(t, 150); c.err != nil {
					t.Logf("seen: %v", c.err)
					return
				}
			}
			t.Error("nothing was seen")
		})
	}
}

// TestDaxSync shows that a store on persistent memory keeps what was answered
// without any flush of the device, and that a clean end needs no ring.
func TestDaxSync(t *testing.T) {
	dev, mem := formatDax(t)
	s, err := openDax(dev, mem)
	if err != nil {
		t.Fatal(err)
	}
	flushes := dev.Stats().Flushes
	m := model{}
	for i := range sealfs.Ino(20) {
		m[i+1] = content(i+1, 1, 3000)
		if _, err := s.put(i+1, m[i+1]); err != nil {
			t.Fatal(err)
		}
		if err := s.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	if n := dev.Stats().Flushes; n != flushes {
		t.Errorf("%d flushes of the device for 20 syncs", n-flushes)
	}
	lost := certain(mem) // and of the device all that it was not told to keep
	cut := collect(dev, rand.New(rand.NewPCG(1, 1)), 1)[0]
	if s, err = openDax(cut, lost); err != nil {
		t.Fatal(err)
	}
	if err := m.check(s); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	cut = cut.Clone()
	if _, err := lost.OpenRing(); !errors.Is(err, sealfs.ErrNotExist) {
		t.Errorf("the ring after a clean end: %v", err)
	}
	// The region is as good as any other now.
	region := disk.NewSim("region", mem.Size())
	b := make([]byte, mem.Size())
	if _, err := lost.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := region.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if err := m.check(open(t, cut, region, nil, testOptions())); err != nil {
		t.Fatal(err)
	}
}

// TestDaxNeedsRing shows that a region that was in use is refused without its ring.
func TestDaxNeedsRing(t *testing.T) {
	dev, mem := formatDax(t)
	s, err := openDax(dev, mem)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.put(1, content(1, 1, 3000)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Abandon(); err != nil {
		t.Fatal(err)
	}
	dev = dev.Clone()
	whole := mem.Clone()
	if err := mem.RemoveRing(); err != nil {
		t.Fatal(err)
	}
	if _, err := openDax(dev.Clone(), mem); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("without its ring: %v", err)
	}
	if s, err = openDax(dev, whole); err != nil {
		t.Fatal(err)
	}
	if err := (model{1: content(1, 1, 3000)}).check(s); err != nil {
		t.Error(err)
	}
}

// asDax returns persistent memory that holds what a region's medium does.
func asDax(t *testing.T, region *disk.Sim) *pmem.SimDax {
	t.Helper()
	mem, b := pmem.NewSimDax("pmem", region.Size()), make([]byte, region.Size())
	if _, err := region.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := mem.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	mem.Fence()
	return mem
}

// asFile is the opposite: it returns region and ring as files that hold what is in
// mem, and have been flushed.
func asFile(t *testing.T, mem *pmem.SimDax) (region *disk.Sim, ring *pmem.Staging) {
	t.Helper()
	region = disk.NewSim("region", mem.Size())
	b := make([]byte, mem.Size())
	if _, err := mem.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := region.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if err := region.Flush(); err != nil {
		t.Fatal(err)
	}
	if ring, err := mem.OpenRing(); err == nil {
		return region, ring.Clone()
	}
	return region, nil
}

// TestDaxAfterKill kills a store with a file-backed region, whose ring no power cut
// would survive, and goes on on persistent memory: a cut while it does must find
// what was synced at least, and the region not ahead of the log.
func TestDaxAfterKill(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	dev, region := testDevices(20)
	if _, err := Format(dev, pmem.NewMemory(region), Geometry{SegmentBytes: testSegment, NoSums: true}); err != nil {
		t.Fatal(err)
	}
	s := open(t, dev, region, nil, testOptions())
	h := history{states: []model{{}}}
	for i := range 60 {
		ino := sealfs.Ino(1 + rng.IntN(10))
		h.add(ino, content(ino, i, 1+rng.IntN(3000)))
		if _, err := s.put(ino, h.last()[ino]); err != nil {
			t.Fatal(err)
		}
		if i == 30 {
			if err := s.Sync(); err != nil {
				t.Fatal(err)
			}
			h.synced = len(h.states) - 1
		}
	}
	crashed := dev.Clone()
	kept, err := s.Abandon()
	if err != nil {
		t.Fatal(err)
	}
	look := func(s *Store, least int) {
		t.Helper()
		if at, err := h.find(s, 10); err != nil || at < least {
			t.Fatalf("recovered to change %d of %d, %d at least: %v", at, len(h.states)-1, least, err)
		}
	}
	dev, mem := crashed, asDax(t, region)
	var cuts []func()
	events := 0
	watch := func() {
		if events++; testing.Short() && events%5 > 0 {
			return
		}
		devs := collect(dev, rng, 3)
		for m := range mem.CrashStates(rng, 3) {
			d := devs[rng.IntN(len(devs))].Clone()
			cuts = append(cuts, func() {
				s, err := openDax(d, m)
				if err != nil {
					t.Fatal(err)
				}
				look(s, h.synced)
			})
		}
	}
	dev.SetHook(func(disk.Op) { watch() })
	mem.SetHook(watch)
	if s, err = Open(dev, mem, kept, tinyFS{}, testOptions()); err != nil {
		t.Fatal(err)
	}
	dev.SetHook(nil)
	mem.SetHook(nil)
	look(s, len(h.states)-1)
	for _, cut := range cuts {
		cut()
	}
	if len(cuts) < 50 {
		t.Errorf("only %d cuts", len(cuts))
	}
}

// TestDaxToFile opens what a power cut left of a store on persistent memory as
// files: nothing that was answered is lost, and the ring is not needed afterwards.
func TestDaxToFile(t *testing.T) {
	rng := rand.New(rand.NewPCG(4, 4))
	dev, mem := formatDax(t)
	s, err := openDax(dev, mem)
	if err != nil {
		t.Fatal(err)
	}
	h := history{states: []model{{}}}
	for i := range 40 {
		ino := sealfs.Ino(1 + rng.IntN(10))
		h.add(ino, content(ino, i, 1+rng.IntN(3000)))
		if _, err := s.put(ino, h.last()[ino]); err != nil {
			t.Fatal(err)
		}
		for m := range mem.CrashStates(rng, 2) {
			d := collect(dev, rng, 1)[0].Clone()
			region, ring := asFile(t, m)
			if _, err := Open(d.Clone(), pmem.NewMemory(region.Clone()), nil, tinyFS{}, testOptions()); !errors.Is(err, sealfs.ErrCorrupt) {
				t.Fatalf("without its ring: %v", err)
			}
			s := open(t, d, region, ring, testOptions())
			if at, err := h.find(s, 10); err != nil || at < len(h.states)-1 {
				t.Fatalf("recovered to change %d of %d: %v", at, len(h.states)-1, err)
			}
			if _, err := s.Abandon(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestCrashDaxKill kills a store between any two stores of an update, and cuts the
// power between any two stores of the recovery that follows: what recovery has taken
// for true in caches must be true on the medium before it builds on it.
func TestCrashDaxKill(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	dev, mem := formatDax(t)
	s, err := openDax(dev, mem)
	if err != nil {
		t.Fatal(err)
	}
	h := history{states: []model{{}}}
	change := func(i int) {
		ino := sealfs.Ino(1 + i%4)
		h.add(ino, content(ino, i, 100))
		if _, err := s.put(ino, h.last()[ino]); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 6 {
		change(i)
	}
	// What the last change changes, no other record's redo will put right.
	if err := s.Checkpoint(); err != nil {
		t.Fatal(err)
	}
	least, states := len(h.states)-1, 0
	cut := func(dev *disk.Sim, mem *pmem.SimDax) {
		s, err := openDax(dev, mem)
		if err != nil {
			t.Fatal(err)
		}
		if at, err := h.find(s, 4); err != nil || at < least {
			t.Fatalf("recovered to change %d, %d were answered: %v", at, least, err)
		}
		states++
	}
	mem.SetHook(func() {
		dev, mem := dev.Clone(), mem.Clone()
		watch := func() {
			d := collect(dev, rng, 1)[0]
			for m := range mem.CrashStates(rng, 5) {
				cut(d.Clone(), m)
			}
		}
		dev.SetHook(func(disk.Op) { watch() })
		mem.SetHook(watch)
		if _, err := openDax(dev, mem); err != nil {
			t.Fatal(err)
		}
	})
	change(6)
	mem.SetHook(nil)
	if states < 300 {
		t.Errorf("only %d states", states)
	}
}

// TestRebuildDax loses the persistent memory, region and ring: the device alone
// gives back all that it was told to keep, and on persistent memory again. With
// the ring, which may lie elsewhere then, nothing is lost.
func TestRebuildDax(t *testing.T) {
	dev, mem := formatDax(t)
	s, err := openDax(dev, mem)
	if err != nil {
		t.Fatal(err)
	}
	m := model{}
	put := func(ino sealfs.Ino, version int) {
		t.Helper()
		m[ino] = content(ino, version, 3000)
		if _, err := s.put(ino, m[ino]); err != nil {
			t.Fatal(err)
		}
	}
	for ino := range sealfs.Ino(30) {
		put(ino+1, 1)
	}
	if err := errors.Join(s.Checkpoint(), s.FarCheckpoint()); err != nil {
		t.Fatal(err)
	}
	copied := s.Stats().FarPages
	put(3, 2) // changed in place: its pages are far dirty
	if n := s.Stats().Region.FarDirty; n == 0 || n > 20 {
		t.Errorf("%d pages are far dirty after one change", n)
	}
	if err := s.FarCheckpoint(); err != nil {
		t.Fatal(err)
	}
	if n := s.Stats().FarPages - copied; n == 0 || n > 20 {
		t.Errorf("%d pages copied after one change", n)
	}
	put(4, 2)
	if err := s.flushLog(); err != nil {
		t.Fatal(err)
	}
	drained := model{}
	for ino, data := range m {
		drained[ino] = data
	}
	put(5, 2) // answered, and nowhere but in the ring
	lost := collect(dev, rand.New(rand.NewPCG(1, 1)), 1)[0]

	rebuild := func(dev *disk.Sim) *pmem.SimDax {
		t.Helper()
		fresh := pmem.NewSimDax("fresh", mem.Size())
		if _, err := RebuildRegion(dev, fresh, testOptions()); err != nil {
			t.Fatal(err)
		}
		return certain(fresh)
	}
	look := func(dev *disk.Sim, mem *pmem.SimDax, kept *pmem.Staging, m model) {
		t.Helper()
		s, err := Open(dev, mem, kept, tinyFS{}, testOptions())
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(m.check(s), s.Close()); err != nil {
			t.Fatal(err)
		}
		if s, err = openDax(dev.Clone(), mem); err != nil {
			t.Fatal(err)
		}
		if err := m.check(s); err != nil {
			t.Fatal(err)
		}
	}
	// Of a rebuild that a power cut ends nothing is taken for a region that is not one.
	half, rng, refused := pmem.NewSimDax("half", mem.Size()), rand.New(rand.NewPCG(2, 2)), 0
	half.SetHook(func() {
		if rng.IntN(2) > 0 {
			return
		}
		for m := range half.CrashStates(rng, 2) {
			s, err := openDax(lost.Clone(), m)
			if err != nil {
				refused++
			} else if err := drained.check(s); err != nil {
				t.Fatal(err)
			}
		}
	})
	reading := lost.Clone()
	if _, err := RebuildRegion(reading, half, testOptions()); err != nil || refused < 20 {
		t.Errorf("%d cuts refused, %v", refused, err)
	}
	alone := lost.Clone()
	look(alone, rebuild(alone), nil, drained)
	ring, err := mem.OpenRing()
	if err != nil {
		t.Fatal(err)
	}
	with := lost.Clone()
	look(with, rebuild(with), ring.Clone(), m)
	// As a file, it has no sums either, so that it may go back to such memory.
	file := disk.NewSim("region", testRegion)
	if _, err := RebuildRegion(lost, pmem.NewMemory(file), testOptions()); err != nil {
		t.Fatal(err)
	}
	look(lost, asDax(t, file), nil, drained)
}

// TestDaxTorn damages the payload of a record in the ring. If it is the last one, a
// power cut took it, and it has not happened. If others follow it has rotted, which
// costs its file and nothing else.
func TestDaxTorn(t *testing.T) {
	for _, last := range []bool{true, false} {
		dev, mem := formatDax(t)
		s, err := openDax(dev, mem)
		if err != nil {
			t.Fatal(err)
		}
		put := func(ino sealfs.Ino) {
			t.Helper()
			if _, err := s.put(ino, content(ino, 1, 3000)); err != nil {
				t.Fatal(err)
			}
		}
		put(1)
		lostDev := collect(dev, rand.New(rand.NewPCG(1, 1)), 1)[0]
		lost := certain(mem)
		at := s.tail()
		put(2)
		if !last {
			put(3)
		}
		if s.open().seq != at.Seq() {
			t.Fatal("the log went on in another segment")
		}
		chunk := s.open().chunk
		ring, err := s.Abandon()
		if err != nil {
			t.Fatal(err)
		}
		ring.Chunk(chunk)[at.Off()+1000] ^= 1
		ring.SetTail(uint64(at)) // as a power cut may leave it
		if s, err = Open(lostDev, lost, ring, tinyFS{}, testOptions()); err != nil {
			t.Fatal(err)
		}
		want := model{1: content(1, 1, 3000)}
		if last {
			if err := want.check(s); err != nil {
				t.Error(err)
			}
			continue
		}
		if err := s.check(3); err != nil {
			t.Error(err)
		}
		for ino := range sealfs.Ino(3) {
			got, err := s.get(ino + 1)
			if sound := err == nil && bytes.Equal(got, content(ino+1, 1, 3000)); sound == (ino+1 == 2) {
				t.Errorf("file %d: sound %v, %v", ino+1, sound, err)
			}
		}
	}
}

// TestDaxScrub scrubs a store on persistent memory: it is sound, and the header slots
// of its region, which have sums, are looked at.
func TestDaxScrub(t *testing.T) {
	dev, mem := formatDax(t)
	s, err := Open(dev, mem, nil, sumFS{}, testOptions())
	if err != nil {
		t.Fatal(err)
	}
	for ino := range sealfs.Ino(30) {
		if _, err := s.put(ino+1, content(ino+1, 1, 3000)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Checkpoint(); err != nil {
		t.Fatal(err)
	}
	if r := s.scrubNow(t); r.Damages != 0 || r.Claims != 30 {
		t.Errorf("%d extents, damage in a sound store: %+v", r.Claims, r.Findings)
	}
	b := make([]byte, pmem.PageSize)
	if _, err := mem.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	b[100] ^= 1
	if _, err := mem.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if r := s.scrubNow(t); r.Damages != 1 || r.Findings[0].Kind != FoundRegion {
		t.Errorf("a damaged header slot: %+v", r.Findings)
	}
}
