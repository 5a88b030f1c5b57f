package lsfs

import (
	"errors"
	"math/rand/v2"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// run does n random operations and keeps the model in step.
func run(t testing.TB, s *Store, m model, rng *rand.Rand, n, files, size int) {
	t.Helper()
	for i := range n {
		ino := sealfs.Ino(1 + rng.IntN(files))
		if m[ino] != nil && rng.IntN(4) == 0 {
			if _, err := s.put(ino, nil); err != nil {
				t.Fatal(err)
			}
			delete(m, ino)
			continue
		}
		data := content(ino, i, 1+rng.IntN(size))
		if _, err := s.put(ino, data); err != nil {
			t.Fatalf("operation %d: %v", i, err)
		}
		m[ino] = data
	}
}

func TestReopen(t *testing.T) {
	dev, region := testDevices(32)
	format(t, dev, region)
	m, rng := model{}, rand.New(rand.NewPCG(1, 1))
	for range 5 {
		s := open(t, dev, region, nil, testOptions())
		if err := m.check(s); err != nil {
			t.Fatal(err)
		}
		run(t, s, m, rng, 300, 50, 3000)
		if err := m.check(s); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		dev, region = dev.Reopen(), region.Reopen()
	}
}

// TestKill: whatever was answered is there after the process died, with the
// ring as the only witness of what had not been drained.
func TestKill(t *testing.T) {
	dev, region := testDevices(32)
	format(t, dev, region)
	m, rng := model{}, rand.New(rand.NewPCG(2, 2))
	s := open(t, dev, region, nil, testOptions())
	for round := range 40 {
		run(t, s, m, rng, rng.IntN(100), 50, 3000)
		switch rng.IntN(4) {
		case 0:
			if err := s.Sync(); err != nil {
				t.Fatal(err)
			}
		case 1:
			if err := s.Checkpoint(); err != nil {
				t.Fatal(err)
			}
		case 2:
			if err := s.drain(false); err != nil {
				t.Fatal(err)
			}
		}
		kept, err := s.Abandon()
		if err != nil {
			t.Fatal(err)
		}
		dev, region = dev.Reopen(), region.Reopen()
		s = open(t, dev, region, kept, testOptions())
		if err := m.check(s); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
}

// TestFullOverwrite keeps a small store at its limit: the cleaner must make
// room for ever, nothing may be lost, and a delete always works.
func TestFullOverwrite(t *testing.T) {
	dev, region := testDevices(24)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	m, rng := model{}, rand.New(rand.NewPCG(3, 3))
	full := 0
	for i := range unlessShort(6000, 2000) {
		ino := sealfs.Ino(1 + rng.IntN(400))
		data := content(ino, i, 1+rng.IntN(8000))
		_, err := s.put(ino, data)
		switch {
		case err == nil:
			m[ino] = data
		case errors.Is(err, sealfs.ErrNoSpace):
			full++
			for victim := range m {
				if _, err := s.put(victim, nil); err != nil {
					t.Fatalf("delete on a full store: %v", err)
				}
				delete(m, victim)
				break
			}
		default:
			t.Fatal(err)
		}
		if i%500 == 0 {
			if err := m.check(s); err != nil {
				t.Fatalf("operation %d: %v", i, err)
			}
		}
	}
	st := s.Stats()
	if full == 0 || st.Cleaned == 0 || st.Moved == 0 {
		t.Errorf("full %d times, %d segments cleaned, %d extents moved: the test did not reach its point", full, st.Cleaned, st.Moved)
	}
	if err := m.check(s); err != nil {
		t.Fatal(err)
	}
	// An emptied store takes as much again.
	for ino := range m {
		if _, err := s.put(ino, nil); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 100 {
		if _, err := s.put(sealfs.Ino(i+1), content(1, i, 4096)); err != nil {
			t.Fatalf("after everything was deleted: %v", err)
		}
	}
	t.Logf("full %d times, cleaned %d segments, moved %d extents", full, st.Cleaned, st.Moved)
}

// TestFailedFlush: after a failed flush nothing is accepted, and the reason is told.
func TestFailedFlush(t *testing.T) {
	dev, region := testDevices(24)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	if _, err := s.put(1, content(1, 1, 100)); err != nil {
		t.Fatal(err)
	}
	dev.Fail(disk.Fault{Kind: disk.FlushError, Match: func(int64, int, int) bool { return true }})
	if err := s.Sync(); err == nil {
		t.Fatal("Sync succeeded though the flush failed")
	}
	dev.ClearFaults()
	if err := s.Sync(); err == nil || s.Failure() == nil {
		t.Fatal("a second Sync lied")
	}
	if _, err := s.put(2, content(2, 1, 100)); err == nil {
		t.Fatal("a change was accepted after the failure")
	}
	if got, err := s.get(1); err != nil || string(got) != string(content(1, 1, 100)) {
		t.Fatalf("reading after the failure: %q, %v", got, err)
	}
}

// TestCountsSync: a sync costs one write and one flush, whatever it covers, and
// none when there is nothing to do.
func TestCountsSync(t *testing.T) {
	dev, region := testDevices(24)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	before := dev.Stats()
	for i := range 10 {
		if _, err := s.put(sealfs.Ino(i+1), content(1, 1, 1000)); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		if err := s.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	after := dev.Stats()
	if w, f := after.Writes-before.Writes, after.Flushes-before.Flushes; w != 1 || f != 1 {
		t.Errorf("ten changes and three syncs cost %d writes and %d flushes, want 1 and 1", w, f)
	}
}

// TestHeaderRot: a decayed copy of a superblock or region header never makes
// the store forget what was synced: it is opened whole, or refused.
func TestHeaderRot(t *testing.T) {
	for _, kind := range []string{"device", "region"} {
		for copyNo := range int64(2) {
			for checkpoints := range 3 {
				dev, region := testDevices(32)
				format(t, dev, region)
				m, rng := model{}, rand.New(rand.NewPCG(4, uint64(checkpoints)))
				s := open(t, dev, region, nil, testOptions())
				for range 3 {
					run(t, s, m, rng, 40, 20, 2000)
					for range checkpoints {
						if err := s.Checkpoint(); err != nil {
							t.Fatal(err)
						}
					}
					if err := s.Sync(); err != nil {
						t.Fatal(err)
					}
					if _, err := s.Abandon(); err != nil { // a power cut: the ring is lost
						t.Fatal(err)
					}
					dev, region = dev.Reopen(), region.Reopen()
					s = open(t, dev, region, nil, testOptions())
				}
				if _, err := s.Abandon(); err != nil {
					t.Fatal(err)
				}
				dev, region = dev.Reopen(), region.Reopen()
				if kind == "device" {
					dev.FlipBit(copyNo*4096+80, 3)
				} else {
					region.FlipBit(copyNo*4096+40, 3)
				}
				s, err := Open(dev, pmem.NewMemory(region), nil, tinyFS{}, testOptions())
				if err != nil {
					if !errors.Is(err, sealfs.ErrCorrupt) {
						t.Errorf("%s copy %d: %v", kind, copyNo, err)
					}
					if kind == "device" {
						t.Errorf("a single decayed superblock keeps the store from opening: %v", err)
					}
					continue
				}
				if err := m.check(s); err != nil {
					t.Errorf("%s copy %d, %d checkpoints: %v", kind, copyNo, checkpoints, err)
				}
			}
		}
	}
}

// TestRequire makes a feature stand in both superblocks, once.
func TestRequire(t *testing.T) {
	dev, region := disk.NewSim("device", 1<<20+64*testSegment), disk.NewSim("region", testRegion)
	format(t, dev, region)
	s := open(t, dev, region, nil, Options{StagingBytes: 2 * testSegment})
	for range 2 {
		if err := s.Require(layout.FeatureACL); err != nil {
			t.Fatal(err)
		}
	}
	update := s.Superblock().Update
	if err := s.Require(layout.FeatureACL); err != nil || s.Superblock().Update != update {
		t.Errorf("written again: %v", err)
	}
	for i := range int64(2) {
		b := make([]byte, layout.BlockSize)
		if _, err := dev.ReadAt(b, i*layout.BlockSize); err != nil {
			t.Fatal(err)
		}
		if sb, err := layout.DecodeSuperblock(b, "device", i*layout.BlockSize); err != nil || sb.Incompat&layout.FeatureACL == 0 {
			t.Errorf("superblock %d: %+v, %v", i, sb, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
