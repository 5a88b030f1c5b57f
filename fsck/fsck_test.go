package fsck

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/lsfs/layout"
	"sealfs/op"
	"sealfs/pmem"
)

// sums returns checksums of all files of the store.
func (w *world) sums() [3]string {
	w.t.Helper()
	var s [3]string
	for i, path := range []string{w.dev, w.region, w.staging} {
		b, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			w.t.Fatal(err)
		}
		s[i] = fmt.Sprintf("%d %x", len(b), sha256.Sum256(b))
	}
	return s
}

func (w *world) clean(what string, o Options) *Report {
	w.t.Helper()
	before := w.sums()
	rep := w.check(o)
	if !rep.Clean() || rep.Exit() != ExitClean || len(rep.Found) != 0 {
		w.t.Fatalf("%s: %v, exit %d: %v", what, rep.IDs(), rep.Exit(), rep.Found)
	}
	if after := w.sums(); after != before {
		w.t.Fatalf("%s: the check has changed the files", what)
	}
	return rep
}

func TestEmptyStoreIsClean(t *testing.T) {
	w := newWorld(t, 40, lazy)
	w.must(w.s.Close())
	if rep := w.clean("closed", Options{}); rep.Directories != 1 || rep.Keys == 0 || rep.Segments != 40 {
		t.Errorf("%+v", rep)
	}
}

// A store that was formatted and never opened has no log.
func TestFormattedStoreIsClean(t *testing.T) {
	dev, region := disk.NewSim("dev", 2<<20), disk.NewSim("region", 1<<20)
	if _, err := lsfs.Format(dev, pmem.NewMemory(region), lsfs.Geometry{SegmentBytes: testSegment}); err != nil {
		t.Fatal(err)
	}
	if rep := judge(t, Options{Dev: dev, Reg: region}); !rep.Clean() || rep.Records != 0 || rep.LogEnd != 0 {
		t.Errorf("%+v", rep)
	}
}

func TestClosedStoreIsClean(t *testing.T) {
	w := newWorld(t, 60, lazy)
	w.zoo()
	w.must(w.s.Close())
	rep := w.clean("closed", Options{})
	if rep.Files != 8 || rep.Directories != 5 || rep.Symlinks != 2 || rep.Others != 1 || rep.Orphans != 1 {
		t.Errorf("%d files, %d directories, %d symlinks, %d others, %d orphans", rep.Files, rep.Directories, rep.Symlinks, rep.Others, rep.Orphans)
	}
	if rep.Bytes == 0 || rep.ReadBytes != rep.Bytes {
		t.Errorf("%d of %d bytes were verified", rep.ReadBytes, rep.Bytes)
	}
	if rep.Shards != testShards {
		t.Errorf("%d shards were found out, there are %d", rep.Shards, testShards)
	}
	if rep := w.clean("without data", Options{NoData: true}); rep.ReadBytes != 0 {
		t.Errorf("%d bytes of data were read", rep.ReadBytes)
	}
}

// What SIGKILL leaves is clean: the judge replays the log from the device and
// from staging, and finds what the next start finds.
func TestKilledStoreIsClean(t *testing.T) {
	w := newWorld(t, 60, lazy)
	w.zoo()
	w.must(w.s.Checkpoint())
	a := w.mkdir(w.root, "after", 2)
	w.must(w.s.Sync())
	early := images{dev: load(t, w.dev), region: load(t, w.region)}
	for i := range 40 { // through several segments
		w.write(w.create(a, fmt.Sprint("file", i)), 0, pattern(byte(i), 5000))
	}
	w.kill()
	rep := w.clean("killed", Options{})
	if rep.Staged == 0 || rep.Records < 80 || rep.Files != 48 || rep.Staging == "" {
		t.Errorf("%d records, %d of them from staging %q, %d files", rep.Records, rep.Staged, rep.Staging, rep.Files)
	}

	// Had nothing been drained since the last sync, staging would have had all.
	early.ring = w.load().ring
	if all := judge(t, early.options()); !all.Clean() || all.Staged < 80 || all.LogEnd != rep.LogEnd || all.Bytes != rep.Bytes {
		t.Errorf("only from staging: %v, %d staged, end %v, %d bytes", all.IDs(), all.Staged, all.LogEnd, all.Bytes)
	}
	// Without staging, as after a power cut, the log ends earlier.
	early.ring = nil
	if cut := judge(t, early.options()); !cut.Clean() || cut.Staged != 0 || cut.LogEnd >= rep.LogEnd || cut.Files != 8 {
		t.Errorf("without staging: %v, %d staged, end %v, %d files", cut.IDs(), cut.Staged, cut.LogEnd, cut.Files)
	}

	// The next start agrees.
	w.open(lazy)
	if sb := w.s.Superblock(); sb.FirstPrev != rep.LogEnd {
		t.Errorf("the store recovered to %v, the judge found %v", sb.FirstPrev, rep.LogEnd)
	}
	w.kill()
	if again := w.clean("killed again", Options{}); again.Files != rep.Files || again.Bytes != rep.Bytes {
		t.Errorf("%d files with %d bytes, before %d with %d", again.Files, again.Bytes, rep.Files, rep.Bytes)
	}
}

func TestKilledBeforeTheFirstCheckpoint(t *testing.T) {
	w := newWorld(t, 60, lazy)
	w.zoo()
	w.kill()
	if rep := w.clean("killed", Options{}); rep.Files != 8 || rep.Records == 0 {
		t.Errorf("%d files from %d records", rep.Files, rep.Records)
	}
}

type file struct {
	ino  sealfs.Ino
	name string
	size uint64
}

// churn makes, overwrites, truncates and removes files.
func (w *world) churn(rng *rand.Rand, n int) {
	w.t.Helper()
	files := w.files
	defer func() { w.files = files }()
	for i := range n {
		switch k := rng.IntN(10); {
		case (k < 4 || len(files) < 5) && len(files) < 30:
			f := file{name: fmt.Sprint("churn", w.clock)}
			rep, err := w.try(&op.Request{Type: op.Create, Dir: w.root, Name: f.name, Mode: 0o600})
			if errors.Is(err, sealfs.ErrNoSpace) {
				continue
			}
			w.must(err)
			f.ino = rep.Attr.Ino
			files = append(files, f)
		case k < 8:
			f := &files[rng.IntN(len(files))]
			data := pattern(byte(i), 1+rng.IntN(6000))
			off := uint64(rng.IntN(6)) * block
			if off+uint64(len(data)) < f.size { // whole blocks inside the file
				data = pattern(byte(i), block)
			}
			_, err := w.try(&op.Request{Type: op.Write, Ino: f.ino, Off: off, Size: off + uint64(len(data)), Data: data})
			if errors.Is(err, sealfs.ErrNoSpace) {
				continue
			}
			w.must(err)
			f.size = max(f.size, off+uint64(len(data)))
		case k < 9:
			f := &files[rng.IntN(len(files))]
			f.size = uint64(rng.IntN(int(f.size) + 1))
			w.do(&op.Request{Type: op.Setattr, Ino: f.ino, Valid: op.SetSize, Size: f.size})
		default:
			j := rng.IntN(len(files))
			w.do(&op.Request{Type: op.Unlink, Dir: w.root, Name: files[j].name})
			files = append(files[:j], files[j+1:]...)
		}
	}
}

// A store that was cleaned has cold segments and slots that were used again.
func TestCleanedStoreIsClean(t *testing.T) {
	o := lsfs.Options{StagingBytes: 1 << 20, CheckpointBytes: 256 << 10, CleanLow: 30}
	w := newWorld(t, 48, o)
	rng := rand.New(rand.NewPCG(1, 2))
	for range 3 {
		w.churn(rng, 600)
		w.kill()
		w.clean("killed", Options{})
		w.open(o)
	}
	if w.churn(rng, 300); w.s.Stats().Moved == 0 {
		t.Fatal("the cleaner has not moved anything: the test tests nothing")
	}
	w.must(w.s.Close())
	w.clean("closed", Options{})
}

// instants copies two devices at the same instant, after some of their writes.
type instants struct {
	mu          sync.RWMutex // shared by every change of the two
	dev, region *disk.Sim
	writes      int
	every       int // that many writes
	taken       [][2]*disk.Sim
}

// take copies both now and then.
func (n *instants) take() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.writes++; n.writes%n.every == 0 {
		n.taken = append(n.taken, [2]*disk.Sim{n.dev.Clone(), n.region.Clone()})
	}
}

// gate is one of the two.
type gate struct {
	*disk.Sim
	n *instants
}

func (g gate) WriteAt(p []byte, off int64) (int, error) {
	g.n.mu.RLock()
	n, err := g.Sim.WriteAt(p, off)
	g.n.mu.RUnlock()
	g.n.take()
	return n, err
}

func (g gate) Flush() error {
	g.n.mu.RLock()
	defer g.n.mu.RUnlock()
	return g.Sim.Flush()
}

// What a power cut leaves has lost nothing that counts, and at most one of two
// superblocks or header slots.
func TestPowerCutIsSound(t *testing.T) {
	dev, region := disk.NewSim("dev", layout.DataStart+40*testSegment), disk.NewSim("region", 1<<20)
	if _, err := lsfs.Format(dev, pmem.NewMemory(region), lsfs.Geometry{SegmentBytes: testSegment}); err != nil {
		t.Fatal(err)
	}
	n := &instants{dev: dev, region: region, every: 8}
	o := lsfs.Options{StagingBytes: 1 << 20, CheckpointBytes: 100 << 10, DrainBytes: 20 << 10, CleanLow: 12}
	s, err := lsfs.Open(gate{dev, n}, pmem.NewMemory(gate{region, n}), nil, owner{}, o)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, s: s, clock: 1e18}
	w.makeRoot()
	w.must(s.Sync())
	rng := rand.New(rand.NewPCG(3, 4))
	for range 25 {
		w.churn(rng, 40)
		w.must(s.Sync())
	}
	w.must(s.Close())
	if rep := judge(t, Options{Dev: dev.Reopen(), Reg: region.Reopen(), Shards: testShards}); !rep.Clean() {
		t.Errorf("closed: %v", rep.Found)
	}
	states, ends := 0, map[sealfs.LSN]bool{}
	for i, at := range n.taken {
		for cut := range at[0].CrashStates(rng, 4) {
			for reg := range at[1].CrashStates(rng, 2) {
				rep := judge(t, Options{Dev: cut, Reg: reg, Shards: testShards})
				if !rep.Sound() {
					t.Fatalf("instant %d: %v: %v", i, rep.IDs(), rep.Found)
				}
				states++
				ends[rep.LogEnd] = true
			}
		}
	}
	if states < 100 || len(ends) < 10 {
		t.Errorf("%d states were judged, their logs had %d different ends", states, len(ends))
	}
}

func TestLiveStoreIsRefused(t *testing.T) {
	w := newWorld(t, 40, lazy)
	rep, err := Check(context.Background(), Options{Device: w.dev, Staging: w.staging})
	if !errors.Is(err, sealfs.ErrBusy) || rep == nil {
		t.Errorf("a live store: %v", err)
	}
	w.must(w.s.Close())
	w.clean("closed", Options{})
}

func TestMissingParts(t *testing.T) {
	w := newWorld(t, 40, lazy)
	w.must(w.s.Close())
	if _, err := Check(context.Background(), Options{Device: w.dev + "x"}); !errors.Is(err, sealfs.ErrNotExist) {
		t.Errorf("no device: %v", err)
	}
	if _, err := Check(context.Background(), Options{Device: w.dev, Region: w.region + "x"}); !errors.Is(err, sealfs.ErrNotExist) {
		t.Errorf("no region: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Check(ctx, Options{Device: w.dev, Staging: w.staging}); !errors.Is(err, sealfs.ErrInterrupted) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestStores(t *testing.T) {
	dir := t.TempDir()
	if _, err := Stores(dir); !errors.Is(err, sealfs.ErrNotExist) {
		t.Errorf("an empty directory: %v", err)
	}
	for _, f := range []string{"/stores/1/device.img", "/stores/1/region", "/stores/2/region"} {
		if err := errors.Join(os.MkdirAll(dir+f[:9], 0o755), os.WriteFile(dir+f, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(what string, want ...Place) {
		t.Helper()
		if got, err := Stores(dir); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v", what, got, err)
		}
	}
	list := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(dir+name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	expect("no lists", Place{Device: dir + "/stores/1/device.img"}, Place{Device: dir + "/stores/2/device.img"})
	list("/config.yaml", "version: 9\nstores:\n- {id: x, device: /dev/one, region: regions/one, new: 1}\n- device: stores/2/device.img\n")
	expect("config.yaml", Place{Device: "/dev/one", Region: dir + "/regions/one"}, Place{Device: dir + "/stores/2/device.img"})
	list("/server.yaml", "disks:\n  - store: x\n    device: \"/dev/two\" # the second\n    region: /regions/two\n  - device: /dev/three\n    formatting: true\n")
	expect("server.yaml", Place{Device: "/dev/two", Region: "/regions/two"})
	list("/server.yaml", "formatting: true\ndisks: [{device: /dev/two}]\n")
	expect("server.yaml without disks", Place{Device: "/dev/one", Region: dir + "/regions/one"}, Place{Device: dir + "/stores/2/device.img"})
	for _, text := range []string{"disks: {", "disks: 7", "disks: [{region: x}]"} {
		list("/server.yaml", text)
		if got, err := Stores(dir); !errors.Is(err, sealfs.ErrInvalid) || !strings.Contains(err.Error(), "server.yaml") {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
}
