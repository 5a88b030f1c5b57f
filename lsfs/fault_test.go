//go:build !race

package lsfs

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/pmem"
)

// openOnFiles opens a store whose region and ring are files, with some content.
func openOnFiles(t *testing.T) (s *Store, region, ring string, m model) {
	t.Helper()
	dir := t.TempDir()
	region, ring = filepath.Join(dir, "region"), filepath.Join(dir, "ring")
	dev, _ := testDevices(20)
	b, err := pmem.OpenFile(region, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Format(dev, b, Geometry{SegmentBytes: testSegment}); err != nil {
		t.Fatal(err)
	}
	o := testOptions()
	o.StagingPath, o.RegionMaxBytes = ring, 16<<20
	if s, err = Open(dev, b, nil, tinyFS{}, o); err != nil {
		t.Fatal(err)
	}
	m = model{}
	for i := range sealfs.Ino(200) {
		m[i+1] = content(i+1, 1, 100)
		if _, err := s.put(i+1, m[i+1]); err != nil {
			t.Fatal(err)
		}
	}
	return s, region, ring, m
}

// expectFailed holds a store whose memory failed against what is promised: no
// crash, no change, no wrong answer, and a reason.
func expectFailed(t *testing.T, s *Store, m model, where string) {
	t.Helper()
	if _, err := s.put(1, content(1, 2, 100)); err == nil {
		t.Error("a change of a store that failed")
	}
	for ino, want := range m {
		if got, err := s.get(ino); err == nil && string(got) != string(want) {
			t.Fatalf("file %d holds %.20q", ino, got)
		} else if err != nil && !errors.Is(err, sealfs.ErrIO) {
			t.Errorf("read of file %d: %v", ino, err)
		}
	}
	if err := s.Failure(); !errors.Is(err, sealfs.ErrIO) || !strings.Contains(err.Error(), where) {
		t.Errorf("the failure is %v", err)
	}
	s.Stats()
	if err := s.Checkpoint(); err == nil {
		t.Error("a checkpoint of a store that failed")
	}
	if err := s.Close(); errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("close: %v", err)
	}
}

// TestFaultRegion cuts the region's file short under an open store.
func TestFaultRegion(t *testing.T) {
	for name, touch := range map[string]func(*Store) error{
		"read":       func(s *Store) error { _, err := s.get(1); return err },
		"change":     func(s *Store) error { _, err := s.put(1, content(1, 2, 100)); return err },
		"checkpoint": func(s *Store) error { return s.Checkpoint() },
		"collect":    func(s *Store) error { _, err := s.collect(true); return err },
	} {
		t.Run(name, func(t *testing.T) {
			s, region, _, m := openOnFiles(t)
			if err := os.Truncate(region, 2*pmem.PageSize); err != nil {
				t.Fatal(err)
			}
			if err := touch(s); !errors.Is(err, sealfs.ErrIO) {
				t.Errorf("the first touch: %v", err)
			}
			expectFailed(t, s, m, region)
		})
	}
}

// TestFaultRing cuts the ring's file short: the change in whose middle that is found
// is answered with an error, and nothing can be read until the store is opened again.
func TestFaultRing(t *testing.T) {
	s, region, ring, m := openOnFiles(t)
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	dev := s.dev.Device.(*disk.Sim)
	if err := os.Truncate(ring, pmem.PageSize); err != nil {
		t.Fatal(err)
	}
	if _, err := s.put(1, content(1, 2, 100)); !errors.Is(err, sealfs.ErrIO) {
		t.Errorf("the first touch: %v", err)
	}
	if !s.Torn() {
		t.Error("the store can still be read")
	}
	durable := dev.Clone()
	expectFailed(t, s, m, "ring")
	b, err := pmem.OpenFile(region, false)
	if err != nil {
		t.Fatal(err)
	}
	o := testOptions()
	o.StagingPath, o.RegionMaxBytes = ring, 16<<20
	if err := os.Remove(ring); err != nil { // a ring that is no ring is refused
		t.Fatal(err)
	}
	if s, err = Open(durable, b, nil, tinyFS{}, o); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.check(s), s.Close()); err != nil {
		t.Error(err)
	}
}
