package fsck

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"strings"
	"sync"
	"testing"
	"time"

	"sealfs"
	"sealfs/lsfs"
	"sealfs/lsfs/layout"
	"sealfs/meta"
	"sealfs/pmem"
)

// rotten is a killed store of which parts stand on the device, below and above
// the checkpoint, and parts in staging only; and what it must hold.
type rotten struct {
	images
	files  map[sealfs.Ino][]byte
	digest uint64
	// before is the namespace before the last sync, or digest. Nothing durable tells that
	// the last round of a log was durable, so where there is no ring to tell,
	// rot in it looks as if a power cut had taken it.
	before uint64
}

// rotOptions make small stores, since thousands are opened.
func rotOptions() lsfs.Options {
	o := lazy
	o.RegionMaxBytes, o.StagingBytes, o.CacheBytes = 5<<20, 12*testSegment, 128<<10
	return o
}

// newRotten makes a store that was killed, or, without a ring, one that lost power.
func newRotten(t *testing.T, ring bool) *rotten {
	t.Helper()
	w := newWorld(t, 48, rotOptions())
	r := &rotten{files: map[sealfs.Ino][]byte{}}
	n := byte(0)
	more := func(files int) {
		for range files {
			n++
			ino := w.create(w.root, fmt.Sprint("file", n))
			data := pattern(n, 700*int(n%9)+10)
			w.write(ino, 0, data)
			r.files[ino] = data
		}
	}
	more(15)
	w.must(w.s.Checkpoint())
	for range 4 { // what was synced, in the log that recovery reads
		more(5)
		w.must(w.s.Sync())
	}
	h := fnv.New64a()
	w.must(meta.Dump(w.s.BeginRead(), h))
	w.s.EndRead()
	w.create(w.root, "last")
	w.must(w.s.Sync())
	// The device as it is now: what comes is in staging only.
	r.images = images{dev: load(t, w.dev), region: load(t, w.region)}
	if ring {
		more(12)
	}
	w.kill()
	if ring {
		r.ring = w.load().ring
	}
	digest, bad, err := r.look(t, r.clone())
	if err != nil || len(bad) > 0 {
		t.Fatalf("the store is not sound to begin with: %v, %v", bad, err)
	}
	if r.digest, r.before = digest, h.Sum64(); ring {
		r.before = digest
	}
	return r
}

// look opens a store as a server does, and returns what its namespace is and
// which files cannot be read. Wrong bytes fail the test.
func (r *rotten) look(t *testing.T, m images) (digest uint64, bad map[sealfs.Ino]bool, err error) {
	t.Helper()
	s, err := lsfs.Open(m.dev, pmem.NewMemory(m.region), m.ring, owner{}, rotOptions())
	if err != nil {
		return 0, nil, err
	}
	defer func() {
		if e := s.Close(); e != nil {
			t.Errorf("close: %v", e)
		}
	}()
	h := fnv.New64a()
	err = meta.Dump(s.BeginRead(), h)
	s.EndRead()
	if err != nil {
		t.Fatalf("the namespace of a store that was opened: %v", err)
	}
	bad = map[sealfs.Ino]bool{}
	for ino, want := range r.files {
		got, err := readFile(s, ino)
		switch {
		case errors.Is(err, sealfs.ErrCorrupt) || errors.Is(err, sealfs.ErrIO):
			bad[ino] = true
		case err != nil:
			t.Fatalf("inode %d: %v", ino, err)
		case !bytes.Equal(got, want):
			t.Fatalf("inode %d holds wrong bytes", ino)
		}
	}
	return h.Sum64(), bad, nil
}

// readFile reads a file as the server does: every block is compared with its sum.
func readFile(s *lsfs.Store, ino sealfs.Ino) (data []byte, err error) {
	type piece struct {
		lsfs.Fetch
		off   uint64
		stamp uint32
		sums  []uint32
	}
	var pieces []*piece
	r := s.BeginRead()
	attr, err := meta.Extents(r, testConfig, ino, 0, 1<<40, func(e *meta.Extent) bool {
		p := &piece{Fetch: lsfs.Fetch{At: e.Addr, Dst: make([]byte, e.Stored())}, off: e.Off, stamp: e.Stamp}
		for i := range e.Blocks() {
			p.sums = append(p.sums, e.Sum(i))
		}
		pieces = append(pieces, p)
		return true
	})
	for _, p := range pieces {
		err = errors.Join(err, s.Load(&p.Fetch))
	}
	s.EndRead()
	data = make([]byte, attr.Size)
	for _, p := range pieces {
		err = errors.Join(err, s.Finish(&p.Fetch))
		for i, sum := range p.sums {
			b := p.Dst[i*block : min((i+1)*block, len(p.Dst))]
			if meta.BlockSum(ino, p.off/block+uint64(i), p.stamp, b) != sum {
				err = errors.Join(err, &sealfs.Corruption{Where: "file", Off: -1, What: "block sum"})
			}
		}
		copy(data[p.off:], p.Dst)
	}
	return data, err
}

// sentence checks, and returns what it has said, too.
func sentence(t *testing.T, o Options) (*Report, *strings.Builder) {
	t.Helper()
	out := &strings.Builder{}
	o.Out = out
	rep, err := Check(context.Background(), o)
	if err != nil {
		t.Fatalf("check: %v\n%s", err, out)
	}
	return rep, out
}

// judgeRot judges one flipped byte: the store is opened with its whole history,
// and what cannot be read of it is at most what the byte belongs to; or it is
// refused with the place. fsck says that something is wrong whenever something is.
func (r *rotten) judgeRot(t *testing.T, what string, m images, count map[string]int) {
	t.Helper()
	verdict, out := sentence(t, Options{Dev: m.dev.Clone(), Reg: m.region.Clone(), Ring: m.clone().ring, Shards: testShards})
	defer func() {
		if t.Failed() {
			t.Log(out.String())
		}
	}()
	digest, bad, err := r.look(t, m)
	var place *sealfs.Corruption
	switch {
	case errors.As(err, &place):
		count["refused"]++
		if place.Where == "" || place.Off < 0 && place.What == "" {
			t.Errorf("%s: refused without a place: %v", what, err)
		}
	case err != nil:
		t.Fatalf("%s: refused: %v", what, err)
	case digest == r.before && digest != r.digest:
		count["last round lost"]++
	case digest != r.digest:
		t.Fatalf("%s: the store was opened with another history; fsck: %v", what, verdict.IDs())
	case len(bad) > 1:
		t.Fatalf("%s: %d files cannot be read", what, len(bad))
	case len(bad) == 1:
		count["EIO"]++
	default:
		count["no harm"]++
	}
	if (err != nil || len(bad) > 0) && verdict.Clean() {
		t.Fatalf("%s: fsck finds the store clean; opening it: %v, unreadable %v", what, err, bad)
	}
}

// rotDevice flips bytes of all that stands on the device.
func (r *rotten) rotDevice(t *testing.T, step int64) (count map[string]int) {
	sb, err := lsfs.ReadSuper(r.dev)
	if err != nil {
		t.Fatal(err)
	}
	ranges := [][2]int64{{0, 2 * layout.BlockSize}}
	for slot := range sb.Segments {
		at := sb.SlotOffset(slot)
		if h, err := layout.DecodeSegmentHeader(read(t, r.dev, at, layout.BlockSize), sb.Store, "", slot, at); err == nil && h.Seq > 0 {
			ranges = append(ranges, [2]int64{at, at + testSegment})
		}
	}
	count = map[string]int{}
	for _, x := range ranges {
		for off := x[0]; off < x[1]; off += step {
			m := r.clone()
			m.dev.FlipBit(off, uint(off%8))
			r.judgeRot(t, fmt.Sprintf("byte %d of the device", off), m, count)
		}
	}
	return count
}

// rotRing flips bytes of all that stands in staging.
func (r *rotten) rotRing(t *testing.T, step int64) (count map[string]int) {
	count = map[string]int{}
	for i := range int(r.ring.Header().Chunks) {
		if r.ring.ChunkSeq(i) == 0 {
			continue
		}
		for off := int64(0); off < testSegment; off += step {
			m := r.clone()
			m.ring.Chunk(i)[off] ^= 1 << (off % 8)
			r.judgeRot(t, fmt.Sprintf("byte %d of chunk %d", off, i), m, count)
		}
		for bit := 0; bit < 32; bit += 5 {
			m := r.clone()
			m.ring.SetChunkSeq(i, m.ring.ChunkSeq(i)^1<<bit)
			r.judgeRot(t, fmt.Sprintf("bit %d of the number of chunk %d", bit, i), m, count)
		}
	}
	return count
}

// TestRotEverywhere: a byte of the device or of staging has rotted, whichever it is.
func TestRotEverywhere(t *testing.T) {
	step := int64(163)
	if testing.Short() {
		step = 1999
	}
	for _, x := range []struct {
		name string
		ring bool
		rot  func(*rotten, *testing.T, int64) map[string]int
		must []string
	}{
		{"device after a power cut", false, (*rotten).rotDevice, []string{"EIO", "refused", "no harm"}},
		{"device after SIGKILL", true, (*rotten).rotDevice, []string{"EIO", "no harm"}},
		{"staging after SIGKILL", true, (*rotten).rotRing, []string{"EIO", "refused", "no harm"}},
	} {
		t.Run(x.name, func(t *testing.T) {
			count := x.rot(newRotten(t, x.ring), t, step)
			t.Log(count)
			for _, k := range x.must {
				if count[k] == 0 {
					t.Errorf("no byte came out as %q: the test did not reach its point", k)
				}
			}
		})
	}
}

// TestRotRegion: a byte of the region has rotted. The store is refused with the
// place, or each file reads right or not at all, and a scrub tells of it.
func TestRotRegion(t *testing.T) {
	type verifiable interface {
		VerifyAll(sync.Locker, func(int) error, func(*sealfs.Corruption)) error
	}
	if _, ok := any((*pmem.Region)(nil)).(verifiable); !ok {
		t.Skip("SKIPPED: the pages of the region have no sums")
	}
	r := newRotten(t, false)
	step := int64(1499)
	if testing.Short() {
		step = 20011
	}
	count := map[string]int{}
	for off := int64(0); off < r.region.Size(); off += step {
		m := r.clone()
		m.region.FlipBit(off, uint(off%8))
		what := fmt.Sprintf("byte %d of the region", off)
		verdict, _ := sentence(t, Options{Dev: m.dev.Clone(), Reg: m.region.Clone(), Shards: testShards})
		s, err := lsfs.Open(m.dev, pmem.NewMemory(m.region), nil, owner{}, rotOptions())
		if err != nil {
			if count["refused"]++; !errors.Is(err, sealfs.ErrCorrupt) || verdict.Clean() {
				t.Fatalf("%s: refused: %v; fsck: %v", what, err, verdict.IDs())
			}
			continue
		}
		bad := 0
		for ino, want := range r.files {
			got, err := readFile(s, ino)
			switch {
			case errors.Is(err, sealfs.ErrCorrupt):
				bad++
			case err != nil:
				t.Fatalf("%s: inode %d: %v", what, ino, err)
			case !bytes.Equal(got, want):
				t.Fatalf("%s: inode %d holds wrong bytes", what, ino)
			}
		}
		if err := s.StartScrub(lsfs.ScrubOptions{}); err != nil {
			t.Fatal(err)
		}
		tick := time.NewTicker(time.Millisecond)
		for s.Scrub(false).State == lsfs.ScrubRunning {
			<-tick.C
		}
		tick.Stop()
		if bad > 0 {
			count["EIO"]++
			if s.Scrub(false).Last.Damages == 0 || verdict.Clean() {
				t.Fatalf("%s: %d files cannot be read, the scrub found nothing, or fsck: %v", what, bad, verdict.IDs())
			}
		} else {
			count["no harm"]++
		}
		s.Close() // it may not be able to checkpoint
	}
	t.Log(count)
}

// TestCutLog: a store whose log has rotted is left alone, unless what was done after
// that place may be lost.
func TestCutLog(t *testing.T) {
	for _, ring := range []bool{false, true} {
		r := newRotten(t, ring)
		cuts := 0
		try := func(what string, m images) {
			o := m.options()
			rep := judge(t, o)
			if rep.Counts[LogCut]+rep.Counts[LogStaging] == 0 {
				return
			}
			cuts++
			before := m.clone()
			o.Repair, o.SaveDir = RepairAll, t.TempDir()
			if rep := judge(t, o); len(rep.Fixed) > 0 || !m.same(before) {
				t.Errorf("%s: repaired without consent: %v", what, rep.Fixed)
			}
			x := m.clone()
			if _, err := lsfs.Open(x.dev, pmem.NewMemory(x.region), x.ring, owner{}, rotOptions()); err == nil || !strings.Contains(err.Error(), "--cut-log") {
				t.Errorf("%s: the store says %v", what, err)
			}
			o.CutLog = true
			if rep := judge(t, o); !rep.Sound() || rep.Exit()&ExitRepaired == 0 || rep.Fixed[LogCut]+rep.Fixed[LogStaging] == 0 {
				t.Errorf("%s: exit status %d, %v", what, rep.Exit(), rep.IDs())
			}
			m.ring = nil
			s, err := lsfs.Open(m.dev, pmem.NewMemory(m.region), nil, owner{}, rotOptions())
			if err != nil {
				t.Fatalf("%s: after the repair: %v", what, err)
			}
			have := 0
			for ino, want := range r.files {
				got, err := readFile(s, ino)
				if err == nil && bytes.Equal(got, want) {
					have++
				}
			}
			if have < 15 || have == len(r.files) { // those below the checkpoint
				t.Errorf("%s: %d of %d files are left", what, have, len(r.files))
			}
			if err := s.Close(); err != nil {
				t.Errorf("%s: close: %v", what, err)
			}
		}
		if ring {
			for i := range int(r.ring.Header().Chunks) {
				for off := layout.BlockSize; r.ring.ChunkSeq(i) != 0 && off < testSegment && cuts < 5; off += 1999 {
					m := r.clone()
					m.ring.Chunk(i)[off] ^= 4
					try(fmt.Sprintf("byte %d of chunk %d", off, i), m)
				}
			}
		} else {
			for off := int64(layout.DataStart); off < r.dev.Size() && cuts < 5; off += 1999 {
				m := r.clone()
				m.dev.FlipBit(off, 2)
				try(fmt.Sprintf("byte %d of the device", off), m)
			}
		}
		if !ring { // one that costs nothing
			sb := (&hurt{images: r.clone(), t: t}).super()
			m := r.clone()
			m.dev.FlipBit(sb.SlotOffset(2)+41, 2)
			o := m.options()
			o.Repair, o.SaveDir = RepairAll, t.TempDir()
			if rep := judge(t, o); rep.Fixed[LogHeader] != 1 || rep.Exit() != ExitRepaired {
				t.Errorf("header of a segment: exit status %d, %v", rep.Exit(), rep.IDs())
			}
			if digest, bad, err := r.look(t, m); err != nil || len(bad) > 0 || digest != r.digest {
				t.Errorf("header of a segment: %v, %v", bad, err)
			}
		}
		if cuts < 3 {
			t.Errorf("with a ring %v: only %d places of the log were cut", ring, cuts)
		}
	}
}
