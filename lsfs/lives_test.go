package lsfs

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

var lives = flag.Int("lives", 40, "stores that TestCrashLives lets live")

// A history is what a crashing store has been told: the state after each
// change, and how many of them were synced.
type history struct {
	states []model
	synced int
}

func (h *history) last() model { return h.states[len(h.states)-1] }

func (h *history) add(ino sealfs.Ino, data []byte) {
	m := model{}
	for k, v := range h.last() {
		m[k] = v
	}
	if m[ino] = data; data == nil {
		delete(m, ino)
	}
	h.states = append(h.states, m)
}

// find returns which state of the history the store is in, -1 if none.
func (h *history) find(s *Store, files int) (int, error) {
	got := model{}
	for ino := sealfs.Ino(1); int(ino) <= files; ino++ {
		data, err := s.get(ino)
		if err != nil {
			return -1, err
		}
		if data != nil {
			got[ino] = data
		}
	}
	if err := got.check(s); err != nil {
		return -1, err
	}
	// What the cut tore is healed, and nothing looks damaged that is not.
	var bad error
	err := s.region.VerifyAll(s.mu.RLocker(), func(int) error { return nil }, func(c *sealfs.Corruption) { bad = c })
	if err != nil || bad != nil {
		return -1, errors.Join(err, bad)
	}
	for i := len(h.states) - 1; i >= 0; i-- {
		if same(got, h.states[i]) {
			return i, nil
		}
	}
	return -1, fmt.Errorf("the store holds a state that never was")
}

func same(a, b model) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if w, ok := b[k]; !ok || !bytes.Equal(v, w) {
			return false
		}
	}
	return true
}

func collect(d *disk.Sim, rng *rand.Rand, max int) []*disk.Sim {
	var out []*disk.Sim
	for s := range d.CrashStates(rng, max) {
		out = append(out, s)
	}
	return out
}

// A life is a store that works, is killed or loses power at any operation of a
// device, also while it recovers, and goes on from there, a dozen times over.
type life struct {
	t           *testing.T
	rng         *rand.Rand
	dev, region *disk.Sim
	kept        *pmem.Staging
	power       bool // the last end was a power cut
	s           *Store
	h           history
	files, size int

	// The end that this turn will come to, taken at the at-th operation.
	at, n int
	end   *life
	busy  bool

	cuts, kills, inRecovery, rebuilt int
}

// watch takes a picture of devices and ring when the moment has come.
func (l *life) watch(disk.Op) {
	if l.busy || l.end != nil {
		return
	}
	if l.n++; l.n != l.at {
		return
	}
	l.busy = true
	defer func() { l.busy = false }()
	e := &life{power: l.rng.IntN(3) == 0}
	if e.power {
		devs, regions := collect(l.dev, l.rng, 6), collect(l.region, l.rng, 6)
		e.dev, e.region = devs[l.rng.IntN(len(devs))], regions[l.rng.IntN(len(regions))]
	} else {
		e.dev, e.region = l.dev.Clone(), l.region.Clone()
		if l.s != nil {
			e.kept = l.s.staging.Clone()
		} else if l.kept != nil && !l.kept.Header().Store.IsZero() {
			e.kept = l.kept.Clone()
		}
	}
	l.end = e
}

// turn opens the store, checks what it holds, works, and ends.
func (l *life) turn() {
	t := l.t
	l.at, l.n, l.end, l.s = 1+l.rng.IntN(120), 0, nil, nil
	if l.rng.IntN(4) == 0 {
		l.at = 1 + l.rng.IntN(14) // most likely in recovery
	}
	if sb, err := ReadSuper(l.dev); err == nil && sb.FarRoot != 0 {
		if _, err := checkRebuild(l.dev, l.region); err != nil {
			t.Fatalf("power cut %v: %v", l.power, err)
		}
		l.rebuilt++
		if l.rng.IntN(2) == 0 {
			if l.region, _, err = rebuilt(l.dev, testRegion); err != nil {
				t.Fatal(err)
			}
		}
	}
	l.dev.SetHook(l.watch)
	l.region.SetHook(l.watch)
	s, err := Open(l.dev, pmem.NewMemory(l.region), l.kept, tinyFS{}, testOptions())
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	l.s = s
	if l.end != nil {
		l.inRecovery++
	}
	got, err := l.h.find(s, l.files)
	switch {
	case err != nil:
		t.Fatalf("power cut %v: %v", l.power, err)
	case got < l.h.synced:
		t.Fatalf("power cut %v: recovered to change %d, synced were %d", l.power, got, l.h.synced)
	case !l.power && got < len(l.h.states)-2:
		t.Fatalf("after a kill change %d of %d is the last", got, len(l.h.states)-1)
	}
	l.h.states = l.h.states[:got+1]
	for i := 0; l.end == nil && i < 400; i++ {
		l.step(i)
	}
	l.finish()
}

func (l *life) step(i int) {
	ino := sealfs.Ino(1 + l.rng.IntN(l.files))
	var data []byte
	if l.h.last()[ino] == nil || l.rng.IntN(5) > 0 {
		data = content(ino, l.rng.IntN(1<<20), 1+l.rng.IntN(l.size))
	}
	l.h.add(ino, data)
	if _, err := l.s.put(ino, data); err != nil {
		l.h.states = l.h.states[:len(l.h.states)-1]
		if data == nil || !errors.Is(err, sealfs.ErrNoSpace) {
			l.t.Fatalf("change %d: %v", i, err)
		}
	}
	if l.end != nil {
		return
	}
	var err error
	switch l.rng.IntN(14) {
	case 4:
		if err = l.s.FarCheckpoint(); errors.Is(err, sealfs.ErrNoSpace) {
			err = nil
		}
	case 0:
		if err = l.s.Sync(); err == nil && l.end == nil {
			l.h.synced = len(l.h.states) - 1
		}
	case 1:
		err = l.s.drain(false)
	case 2:
		err = l.s.Checkpoint()
	case 3:
		if _, err = l.s.collect(true); errors.Is(err, sealfs.ErrNoSpace) {
			err = nil
		}
	}
	if err != nil {
		l.t.Fatal(err)
	}
}

// finish leaves devices and ring as the end found them.
func (l *life) finish() {
	e := l.end
	if e == nil {
		kept, err := l.s.Abandon()
		if err != nil {
			l.t.Fatal(err)
		}
		e = &life{dev: l.dev.Reopen(), region: l.region.Reopen(), kept: kept}
	}
	l.dev, l.region, l.kept, l.power = e.dev, e.region, e.kept, e.power
	if l.power {
		l.cuts++
	} else {
		l.kills++
	}
	// The ring of another incarnation is not looked at: see findStaging.
	if l.kept != nil {
		if sb, err := ReadSuper(l.dev); err != nil || sb.Incarnation != l.kept.Header().Incarnation {
			l.kept = nil
		}
	}
}

func TestCrashLives(t *testing.T) {
	n := *lives
	if testing.Short() {
		n = 6
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	cuts, kills, inRecovery, rebuilt := 0, 0, 0, 0
	for i := range uint64(n) {
		l := &life{t: t, rng: rand.New(rand.NewPCG(seed, i)), power: true, h: history{states: []model{{}}}}
		l.files, l.size = 30+l.rng.IntN(60), 500+l.rng.IntN(9000)
		l.dev, l.region = testDevices(14 + l.rng.IntN(10))
		format(t, l.dev, l.region)
		for range 12 {
			l.turn()
		}
		cuts, kills, inRecovery, rebuilt = cuts+l.cuts, kills+l.kills, inRecovery+l.inRecovery, rebuilt+l.rebuilt
	}
	t.Logf("%d power cuts and %d kills, %d of them during recovery; %d regions rebuilt", cuts, kills, inRecovery, rebuilt)
	if cuts < n || kills < n || inRecovery < n/4 || rebuilt < n/4 {
		t.Error("the test did not reach its point")
	}
}

// TestKillThenPowerCut: a process dies anywhere in a checkpoint, is started
// again, and then the power goes. The region's header that the second process
// read stood in a cache only: recovery has to make it durable before it lets
// the superblock rely on it.
func TestKillThenPowerCut(t *testing.T) {
	dev, region := testDevices(32)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	m := model{}
	for ino := sealfs.Ino(1); ino <= 2; ino++ {
		m[ino] = content(ino, 1, 3000)
		if _, err := s.put(ino, m[ino]); err != nil {
			t.Fatal(err)
		}
		if err := s.Checkpoint(); err != nil {
			t.Fatal(err)
		}
	}
	type shot struct {
		dev, region *disk.Sim
		kept        *pmem.Staging
	}
	var shots []shot
	hook := func(disk.Op) { shots = append(shots, shot{dev.Clone(), region.Clone(), s.staging.Clone()}) }
	dev.SetHook(hook)
	region.SetHook(hook)
	if err := s.Checkpoint(); err != nil {
		t.Fatal(err)
	}
	for i, x := range shots {
		again := open(t, x.dev, x.region, x.kept, testOptions())
		if err := again.Sync(); err != nil {
			t.Fatal(err)
		}
		// The state that lost whatever was not flushed comes first.
		cut := open(t, collect(x.dev, rand.New(rand.NewPCG(1, 1)), 1)[0], collect(x.region, rand.New(rand.NewPCG(1, 1)), 1)[0], nil, testOptions())
		if err := m.check(cut); err != nil {
			t.Errorf("killed at operation %d: %v", i, err)
		}
	}
	if len(shots) < 4 {
		t.Errorf("a checkpoint of %d operations", len(shots))
	}
}

// TestPowerCutTwiceThenKill: two recoveries come to the same end of the log, so
// their first segments have one place and number. The header of the older one
// is on the device, that of the younger in staging only, when the process dies.
func TestPowerCutTwiceThenKill(t *testing.T) {
	dev, region := testDevices(32)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	m := model{1: content(1, 1, 3000)}
	if _, err := s.put(1, m[1]); err != nil {
		t.Fatal(err)
	}
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	// Each time the power goes before anything was flushed but the header.
	lost := func(d *disk.Sim) *disk.Sim { return collect(d, rand.New(rand.NewPCG(1, 1)), 1)[0] }
	dev, region = lost(dev), lost(region)
	s = open(t, dev, region, nil, testOptions())
	header := disk.AlignedBuffer(layout.BlockSize)
	copy(header, s.staging.Chunk(0))
	first := s.open()
	dev, region = lost(dev), lost(region)
	if _, err := dev.WriteAt(header, s.slotOffset(first.slot)); err != nil {
		t.Fatal(err)
	}
	if err := dev.Flush(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dev, region, nil, testOptions())
	if again := s.open(); again.slot != first.slot || again.seq != first.seq {
		t.Fatal("another place was chosen: the test does not reach its point")
	}
	m[2] = content(2, 1, 3000)
	if _, err := s.put(2, m[2]); err != nil {
		t.Fatal(err)
	}
	s = open(t, dev.Clone(), region.Clone(), s.staging.Clone(), testOptions())
	if err := m.check(s); err != nil {
		t.Error(err)
	}
}

// TestKillOnFullStore: a full store that is killed again and again, with one
// file deleted and a small one written each time, stays usable: restarts must
// not eat the reserve.
func TestKillOnFullStore(t *testing.T) {
	dev, region := disk.NewSim("device", 1<<20+24*testSegment), disk.NewSim("region", 4<<20)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	m := model{}
	for ino := sealfs.Ino(1); ; ino++ {
		data := content(ino, 1, 4000)
		if _, err := s.put(ino, data); err != nil {
			break
		}
		m[ino] = data
	}
	files := sealfs.Ino(len(m))
	for round := range sealfs.Ino(30) {
		if _, err := s.put(round+1, nil); err != nil {
			t.Fatalf("round %d: delete: %v", round, err)
		}
		delete(m, round+1)
		small := 1000 + round
		if _, err := s.put(small, content(small, 1, 10)); err == nil {
			m[small] = content(small, 1, 10)
		}
		kept, err := s.Abandon()
		if err != nil {
			t.Fatal(err)
		}
		dev, region = dev.Reopen(), region.Reopen()
		s = open(t, dev, region, kept, testOptions())
	}
	for ino := sealfs.Ino(31); ino <= files; ino++ {
		if _, err := s.put(ino, nil); err != nil {
			t.Fatalf("delete after the kills: %v", err)
		}
		delete(m, ino)
	}
	if err := m.check(s); err != nil {
		t.Error(err)
	}
}

// TestCleanerKeepsRot: a misread while a segment is cleaned must not replace
// good bytes by bad ones with a good checksum.
func TestCleanerKeepsRot(t *testing.T) {
	dev, region := testDevices(32)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	for ino := sealfs.Ino(1); ino <= 200; ino++ {
		if _, err := s.put(ino, content(ino, 1, 2000)); err != nil {
			t.Fatal(err)
		}
	}
	for ino := sealfs.Ino(1); ino <= 200; ino += 2 {
		if _, err := s.put(ino, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Checkpoint(); err != nil {
		t.Fatal(err)
	}
	r := s.BeginRead()
	f, _, err := tinyGet(r, 2)
	slot := s.slotOf[f.at.Seq()]
	s.EndRead()
	if err != nil {
		t.Fatal(err)
	}
	off := s.slotOffset(slot) + int64(f.at.Off()) + 100
	dev.FlipBit(off, 1)
	s.gc.mu.Lock()
	_, err = s.clean()
	s.gc.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	dev.FlipBit(off, 1)
	if _, err := s.get(2); err != nil {
		t.Errorf("the medium is sound again, but: %v", err)
	}
	if s.Stats().Cleaned == 0 {
		t.Error("nothing was cleaned: the test did not reach its point")
	}
}

// TestFullOfTinyFiles: files smaller than a record's header fill a store before
// their bytes do. The cleaner must see that copying them gains nothing, instead
// of copying for ever.
func TestFullOfTinyFiles(t *testing.T) {
	dev, region := disk.NewSim("device", 1<<20+24*testSegment), disk.NewSim("region", 4<<20)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	for ino := sealfs.Ino(1); ; ino++ {
		before := s.Stats()
		_, err := s.put(ino, content(ino, 1, 100))
		if err == nil {
			continue
		}
		if !errors.Is(err, sealfs.ErrNoSpace) {
			t.Fatal(err)
		}
		after := s.Stats()
		if n := after.Device.WriteBytes - before.Device.WriteBytes; n > uint64(2*after.Segments)*uint64(after.SegmentBytes) {
			t.Errorf("one refusal cost %d bytes of writes on a store of %d", n, int64(after.Segments)*after.SegmentBytes)
		}
		break
	}
	if _, err := s.put(1, nil); err != nil {
		t.Errorf("delete: %v", err)
	}
}

// TestCloseRefuses: what comes after Close began is refused, not lost.
func TestCloseRefuses(t *testing.T) {
	dev, region := testDevices(32)
	format(t, dev, region)
	o := testOptions()
	o.manual = false
	s := open(t, dev, region, nil, o)
	answered := make(chan int)
	started := make(chan struct{})
	go func() {
		n := 0
		for ; ; n++ {
			if n == 10 {
				close(started)
			}
			if _, err := s.put(1, content(1, n, 100)); err != nil {
				break
			}
		}
		answered <- n - 1
	}()
	<-started
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	last := <-answered
	s = open(t, dev.Reopen(), region.Reopen(), nil, testOptions())
	if got, err := s.get(1); err != nil || string(got) != string(content(1, last, 100)) {
		t.Errorf("the last answered change is %d, the file holds %.12q, %v", last, got, err)
	}
}
