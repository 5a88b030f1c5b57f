package lsfs

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/internal/enc"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// sumFS is tinyFS as an Auditor: its files have one sum, so they must be shorter than a block.
type sumFS struct{ tinyFS }

func (sumFS) Claims(r pmem.Reader, ino sealfs.Ino, off uint64, at sealfs.LSN, n uint32, claims []Claim) ([]Claim, error) {
	f, ok, err := tinyGet(r, ino)
	if err == nil && ok && f.at == at && f.n == n {
		claims = append(claims, Claim{Part: Part{Off: off, At: at, Len: n}, Ino: ino, Sums: []uint32{f.crc}})
	}
	return claims, err
}

func (sumFS) Search(r pmem.Reader, key []byte, from, to sealfs.LSN, claims []Claim) ([]Claim, []byte, error) {
	var c pmem.Cursor
	if key == nil {
		key = []byte("f")
	}
	if !c.Seek(r, key) {
		return claims, nil, c.Err()
	}
	ino := sealfs.Ino(0)
	for _, b := range c.Key()[1:] {
		ino = ino<<8 | sealfs.Ino(b)
	}
	f, _, err := tinyGet(r, ino)
	if err == nil && f.at < to && f.at+sealfs.LSN(f.n) > from {
		claims = append(claims, Claim{Part: Part{At: f.at, Len: f.n}, Ino: ino, Sums: []uint32{f.crc}})
	}
	if !c.Next() {
		return claims, nil, c.Err()
	}
	return claims, bytes.Clone(c.Key()), err
}

func (sumFS) Match(c *Claim, i int, data []byte) bool { return enc.CRC(0, data) == c.Sums[i] }

// scrubbedStore returns a store with files, all of which are on the device, in
// several segments, hot and cold.
func scrubbedStore(t *testing.T) (*Store, *disk.Sim, model) {
	t.Helper()
	dev, region := testDevices(40)
	format(t, dev, region)
	o := testOptions()
	o.CleanLow = 30
	s, err := Open(dev, pmem.NewMemory(region), nil, sumFS{}, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	m := model{}
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 600 {
		ino := sealfs.Ino(1 + rng.IntN(200))
		m[ino] = content(ino, i, 1+rng.IntN(4000))
		if _, err := s.put(ino, m[ino]); err != nil {
			t.Fatal(err)
		}
		if i%100 == 0 {
			if _, err := s.collect(true); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := s.Checkpoint(); err != nil {
		t.Fatal(err)
	}
	return s, dev, m
}

// scrubNow scrubs to the end and returns the round.
func (s *Store) scrubNow(t testing.TB) *ScrubRound {
	t.Helper()
	if err := s.StartScrub(ScrubOptions{Restart: true}); err != nil {
		t.Fatal(err)
	}
	<-s.scrub.done
	st := s.Scrub(true)
	if st.State != ScrubIdle {
		t.Fatalf("the scrub has not come to its end: %+v", st)
	}
	return st.Last
}

// TestScrubSound: a sound store is found sound, and all that lives is looked at.
func TestScrubSound(t *testing.T) {
	s, _, m := scrubbedStore(t)
	r := s.scrubNow(t)
	if r.Damages != 0 {
		t.Errorf("damage in a sound store: %+v", r.Findings)
	}
	if int(r.Claims) != len(m) {
		t.Errorf("%d extents verified, there are %d", r.Claims, len(m))
	}
	if s.stats.cleaned.Load() == 0 {
		t.Error("there are no cold segments: the test did not reach its point")
	}
	if r.Bytes < r.Total || r.Segments == 0 {
		t.Errorf("%d of %d bytes read, in %d segments", r.Bytes, r.Total, r.Segments)
	}
}

// TestScrubFinds: every byte of what lives is flipped, one after the other. The scrub finds each,
// names the file where a file is damaged, and no other file.
func TestScrubFinds(t *testing.T) {
	s, dev, m := scrubbedStore(t)
	step := int64(unlessShort(101, 3989))
	tail := s.Superblock().Tail
	kinds := map[string]int{}
	named := 0
	for slot := range s.segs {
		used := int64(s.scrubExtent(uint32(slot), tail))
		for off := int64(0); off < used; off += step {
			at := s.slotOffset(uint32(slot)) + off
			dev.FlipBit(at, uint(off%8))
			r := s.scrubNow(t)
			s.cache = newCache(1 << 20)
			damaged := map[sealfs.Ino]bool{}
			for ino, want := range m {
				if got, err := s.get(ino); err != nil {
					damaged[ino] = true
				} else if !bytes.Equal(got, want) {
					t.Fatalf("file %d holds wrong bytes", ino)
				}
			}
			for _, f := range r.Findings {
				kinds[f.Kind]++
				inRing := f.LSN.Seq() >= s.hot[0].seq // from where it reads well, for now
				if f.Ino != 0 && !damaged[f.Ino] && !inRing {
					t.Fatalf("byte %d: the scrub names file %d, which can be read: %+v", at, f.Ino, f)
				}
				if f.Ino != 0 {
					named++
					delete(damaged, f.Ino)
				}
				if f.Offset > at || f.Offset+f.Len <= at {
					t.Fatalf("byte %d: finding names another place: %+v", at, f)
				}
			}
			if len(damaged) > 0 {
				t.Fatalf("byte %d: files %v cannot be read, the scrub names %+v", at, damaged, r.Findings)
			}
			if r.Damages == 0 && !s.padding(t, dev, uint32(slot), off) {
				t.Fatalf("byte %d (slot %d, byte %d): the scrub found nothing", at, slot, off)
			}
			dev.FlipBit(at, uint(off%8))
		}
	}
	t.Logf("found %v, %d times with a file", kinds, named)
	for _, k := range []string{FoundHeader, FoundRecord, FoundPayload, FoundBlock} {
		if kinds[k] == 0 {
			t.Errorf("nothing of kind %q was found: the test did not reach its point", k)
		}
	}
}

// padding reports whether a byte is one that means nothing: between records, or
// in a pad.
func (s *Store) padding(t *testing.T, dev disk.Device, slot uint32, off int64) (is bool) {
	t.Helper()
	is = true
	b := make([]byte, s.seg)
	if _, err := dev.ReadAt(b, s.slotOffset(slot)); err != nil {
		t.Fatal(err)
	}
	h, err := layout.DecodeSegmentHeader(b, s.store, "", slot, 0)
	if err != nil {
		return false
	}
	seed := layout.ChainSeed(s.store, h.Incarnation)
	for at := int64(layout.BlockSize); at <= off; {
		rec, _, _, _, _, err := layout.DecodeRecordLoose(b[at:], seed, sealfs.MakeLSN(h.Seq, uint32(at)))
		if err != nil {
			return false
		}
		end := at + layout.RecordHeaderBytes + int64(rec.OpLen+rec.PayloadLen+rec.RedoLen)
		if off < at+layout.RecordHeaderBytes || rec.Kind != layout.KindPad && off < end && off >= at {
			is = false
		} else {
			is = true
		}
		at += rec.Bytes()
	}
	return is
}

// TestScrubSuperblock: a damaged copy of the superblock is found and written again.
func TestScrubSuperblock(t *testing.T) {
	s, dev, _ := scrubbedStore(t)
	for i := range int64(2) {
		for off := int64(0); off < layout.BlockSize; off += 97 {
			dev.FlipBit(i*layout.BlockSize+off, 3)
			r := s.scrubNow(t)
			if r.Damages != 1 || r.Findings[0].Kind != FoundSuperblock || r.Findings[0].Offset != i*layout.BlockSize || !r.Findings[0].Healed {
				t.Fatalf("copy %d, byte %d: %+v", i, off, r.Findings)
			}
			if r := s.scrubNow(t); r.Damages != 0 {
				t.Fatalf("copy %d, byte %d: it was not healed: %+v", i, off, r.Findings)
			}
		}
	}
	if sb, err := ReadSuper(dev); err != nil || *sb != s.Superblock() {
		t.Errorf("the superblock on the device is %+v (%v), in memory %+v", sb, err, s.Superblock())
	}
}

// TestScrubLostWrites: a write of the log that the device has swallowed, or has
// put elsewhere, is found, though the device has reported success.
func TestScrubLostWrites(t *testing.T) {
	found := 0
	for _, kind := range []disk.FaultKind{disk.LostWrite, disk.Misdirect, disk.BitFlip} {
		for nth := range 12 {
			t.Run(fmt.Sprintf("%v/%d", kind, nth), func(t *testing.T) {
				dev, region := testDevices(40)
				format(t, dev, region)
				s, err := Open(dev, pmem.NewMemory(region), nil, sumFS{}, testOptions())
				if err != nil {
					t.Fatal(err)
				}
				defer s.Close()
				m := model{}
				// Everything that is written elsewhere than to the superblocks counts.
				hit := false
				seen := 0
				dev.Fail(disk.Fault{Kind: kind, Once: true, Shift: 8 * testSegment, Bit: 12345, Match: func(off int64, _, _ int) bool {
					if off < layout.DataStart {
						return false
					}
					seen++
					hit = hit || seen == nth+1
					return seen == nth+1
				}})
				for i := range 12 {
					for j := range 6 {
						ino := sealfs.Ino(1 + (6*i+j)%30)
						m[ino] = content(ino, i, 3000)
						if _, err := s.put(ino, m[ino]); err != nil {
							t.Fatal(err)
						}
					}
					if err := s.Sync(); err != nil {
						t.Fatal(err)
					}
				}
				if !hit {
					t.Fatal("the fault did not strike")
				}
				r := s.scrubNow(t)
				bad := map[sealfs.Ino]bool{}
				for _, f := range r.Findings {
					bad[f.Ino] = true
				}
				// What is still in the ring reads well, for now: so look at the device.
				s.mu.Lock()
				hot := s.hot
				s.hot = hot[len(hot)-1:]
				open := s.open().seq
				s.mu.Unlock()
				for ino, want := range m {
					if f, _, _ := tinyGet(s.region, ino); f.at.Seq() == open {
						continue
					}
					got, err := s.get(ino)
					if err == nil && !bytes.Equal(got, want) {
						t.Fatalf("file %d: wrong bytes", ino)
					}
					if err != nil && !bad[ino] {
						t.Errorf("file %d cannot be read (%v), the scrub did not say so: %+v", ino, err, r.Findings)
					}
				}
				s.hot = hot
				if r.Damages > 0 {
					found++
				} else if kind == disk.LostWrite {
					t.Errorf("write %d was lost, and the scrub found nothing", nth)
				}
			})
		}
	}
	if found < 24 {
		t.Errorf("only %d of 36 faults were found", found)
	}
}

// TestScrubUnreadable: a block that the device cannot read is named, with the
// file whose it is; everything else is verified all the same.
func TestScrubUnreadable(t *testing.T) {
	s, dev, m := scrubbedStore(t)
	whole := s.scrubNow(t).Claims
	var at int64
	for ino := range m {
		if f, _, _ := tinyGet(s.region, ino); s.segs[s.slotOf[f.at.Seq()]].state == segSealed {
			at = s.Place(f.at+sealfs.LSN(f.n/2)) &^ (layout.BlockSize - 1)
			break
		}
	}
	dev.Fail(disk.Fault{Kind: disk.ReadError, Match: func(off int64, n, _ int) bool { return off <= at && at < off+int64(n) }})
	r := s.scrubNow(t)
	if r.Damages == 0 || !slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Ino != 0 }) || r.Claims+20 < whole {
		t.Fatalf("%d of %d extents verified, %+v", r.Claims, whole, r.Findings)
	}
	for _, f := range r.Findings {
		if f.Offset >= at+layout.BlockSize || f.Offset+f.Len <= at {
			t.Errorf("a finding is not about byte %d: %+v", at, f)
		}
	}
	// A whole segment: the device is not asked for each of its blocks.
	dev.ClearFaults()
	slot := (at - layout.DataStart) / testSegment
	from, to := layout.DataStart+slot*testSegment, layout.DataStart+(slot+1)*testSegment
	dev.Fail(disk.Fault{Kind: disk.ReadError, Match: func(off int64, n, _ int) bool { return off < to && off+int64(n) > from }})
	if r := s.scrubNow(t); r.Damages == 0 || r.Segments == 0 {
		t.Errorf("%+v", r)
	}
}

// TestScrubStops: a scrub that is stopped goes on where it was, keeps to its
// rate, and ends when the store is closed.
func TestScrubStops(t *testing.T) {
	s, _, _ := scrubbedStore(t)
	all := s.scrubNow(t).Bytes
	if err := s.StartScrub(ScrubOptions{Rate: 512 << 10}); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for s.Scrub(false).Round.Segments < 2 {
		<-tick.C
	}
	done := s.scrub.done
	s.StopScrub()
	<-done
	st := s.Scrub(false)
	if st.State != ScrubStopped || st.Round.Bytes >= all {
		t.Fatalf("%+v, %+v", st, st.Round)
	}
	began := time.Now()
	if err := s.StartScrub(ScrubOptions{Rate: 4 << 20}); err != nil {
		t.Fatal(err)
	}
	<-s.scrub.done
	left := all - st.Round.Bytes
	if d, least := time.Since(began), time.Duration(float64(left)/(4<<20)*1e9)-110*time.Millisecond; d < least {
		t.Errorf("%d bytes took %v, at its rate it is %v", left, d, least)
	}
	if st := s.Scrub(false); st.Rounds != 2 || st.Last.Segments == 0 || st.Last.Bytes > all+testSegment {
		t.Errorf("%+v, %+v: it began anew", st, st.Last)
	}
	if err := s.StartScrub(ScrubOptions{Rate: 1}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.StartScrub(ScrubOptions{}); err == nil {
		t.Error("a closed store was scrubbed")
	}
}

// TestScrubYields: while others use the device a scrub goes at an eighth of its rate.
func TestScrubYields(t *testing.T) {
	s, dev, _ := scrubbedStore(t)
	p := newPacer(s, make(chan struct{}))
	s.scrub.rate.Store(1 << 30)
	b := make([]byte, 2<<20)
	now := p.looked
	for range 3 {
		if _, err := dev.ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
		p.look(now.Add(time.Second))
		now = p.looked
	}
	if !p.busy {
		t.Fatal("2 MiB a second are no use of a device")
	}
	p.due = time.Now().Add(200 * time.Millisecond) // until then a busy processor takes nothing from what is measured
	if !p.wait(8 << 20) {
		t.Fatal("stopped")
	}
	if y := p.takeYielded(); y < 40*time.Millisecond || y > 60*time.Millisecond {
		t.Errorf("8 MiB at 1 GiB/s wait %v more than they would, want about 55 ms", y)
	}
	p.look(now.Add(2 * time.Second))
	if p.busy {
		t.Error("nobody uses the device any more")
	}
}
