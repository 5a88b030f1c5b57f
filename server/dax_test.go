package server

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// newDax returns a server with one store on persistent memory in simulation, which
// drains as little as it may.
func newDax(t testing.TB) (*simServer, *pmem.SimDax) {
	t.Helper()
	mem := pmem.NewSimDax("pmem", 16<<20)
	s := &simServer{dev: disk.NewSim("device", 256<<20)}
	if _, err := lsfs.Format(s.dev, mem, lsfs.Geometry{SegmentBytes: 4 << 20}); err != nil {
		t.Fatal(err)
	}
	s.Server = &Server{o: Options{Shards: testShards}, cfg: meta.Config{Shards: testShards}, log: testLog(t), pace: usualPace}
	st, err := s.attach(s.dev, mem, nil, StoreOptions{Device: "device", Region: "region", Log: lsfs.Options{
		StagingBytes: 16 << 20, DrainBytes: 1 << 30, DrainInterval: time.Second, LagMax: time.Second,
	}})
	if err != nil {
		t.Fatal(err)
	}
	s.stores = []*store{st}
	st.run()
	if s.root, err = s.MakeRoot(context.Background(), 1, 0o755, 0, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, mem
}

// TestDaxCost counts what operations cost on persistent memory, in cache lines and
// fences: a measure of speed without a clock. The figures are medians, since now and
// then a page is split or the log padded. A record may be one line shorter: it
// depends on the clock how many bytes of a time change. Whoever makes them worse must know it, who
// makes them better writes the new ones down.
func TestDaxCost(t *testing.T) {
	s, _ := newDax(t)
	count := func() pmem.Persisted { return s.stores[0].Stats().Persisted }
	files := make([]op.Request, 0, 401)
	var created []*op.Reply
	cost := func(what string, want pmem.Persisted, do func(i int)) {
		t.Helper()
		const n = 401
		var stored, flushed, fences []uint64
		for i := range n {
			before := count()
			do(i)
			now := count()
			stored = append(stored, now.Stored-before.Stored)
			flushed = append(flushed, now.Flushed-before.Flushed)
			fences = append(fences, now.Fences-before.Fences)
		}
		for _, list := range [][]uint64{stored, flushed, fences} {
			slices.Sort(list)
		}
		got := pmem.Persisted{Stored: stored[n/2], Flushed: flushed[n/2], Fences: fences[n/2]}
		if got.Stored+1 == want.Stored {
			got.Stored++
		}
		if got != want {
			t.Errorf("%s: %+v, want %+v; flushed between %d and %d", what, got, want, flushed[n/20], flushed[n-n/20])
		}
	}
	for i := range 401 {
		files = append(files, op.Request{Type: op.Create, Dir: s.root, Name: fmt.Sprintf("file.%08d", i), Mode: 0o644})
	}
	data := make([]byte, 4096)
	cost("create", pmem.Persisted{Stored: 5, Flushed: 12, Fences: 1}, func(i int) { created = append(created, s.must(t, files[i])) })
	cost("write 4 KiB", pmem.Persisted{Stored: 67, Flushed: 7, Fences: 1}, func(i int) {
		s.must(t, op.Request{Type: op.Write, Ino: created[i].Attr.Ino, Data: data})
	})
	cost("overwrite 4 KiB", pmem.Persisted{Stored: 67, Flushed: 3, Fences: 1}, func(i int) {
		s.must(t, op.Request{Type: op.Write, Ino: created[i].Attr.Ino, Data: data})
	})
	cost("sync", pmem.Persisted{}, func(i int) { s.must(t, op.Request{Type: op.Sync, Ino: created[i].Attr.Ino}) })
	cost("look up", pmem.Persisted{}, func(i int) { s.must(t, op.Request{Type: op.Lookup, Dir: s.root, Name: files[i].Name}) })
	cost("rename", pmem.Persisted{Stored: 7, Flushed: 13, Fences: 1}, func(i int) {
		s.must(t, op.Request{Type: op.Rename, Dir: s.root, Name: files[i].Name, Dir2: s.root, Name2: "new" + files[i].Name})
	})
	cost("unlink", pmem.Persisted{Stored: 4, Flushed: 8, Fences: 1}, func(i int) {
		s.must(t, op.Request{Type: op.Unlink, Dir: s.root, Name: "new" + files[i].Name})
	})
}

// TestRegionMode shows the mode in the status, and that persistent memory is refused
// where there is none.
func TestRegionMode(t *testing.T) {
	s, _ := newDax(t)
	if got := s.Status().Stores[0].Stats.RegionMode; got != pmem.ModeDax {
		t.Errorf("on persistent memory: mode %q", got)
	}
	dir := t.TempDir()
	o := StoreOptions{Device: filepath.Join(dir, "device.img"), Region: filepath.Join(dir, "region"), Staging: filepath.Join(dir, "ring")}
	if pmem.CheckDax(o.Region) == nil {
		t.Skip("the directory for temporary files lies on persistent memory")
	}
	if _, err := Format(FormatOptions{Device: o.Device, Region: o.Region, Size: 64 << 20, RegionMode: pmem.ModeDax}); !errors.Is(err, sealfs.ErrNotSupported) {
		t.Errorf("format: %v", err)
	}
	if _, err := Format(FormatOptions{Device: o.Device, Region: o.Region, Size: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	o.RegionMode = pmem.ModeDax
	if _, err := Open(context.Background(), Options{Shards: testShards, Stores: []StoreOptions{o}, Logger: testLog(t)}); !errors.Is(err, sealfs.ErrNotSupported) {
		t.Errorf("open: %v", err)
	}
	o.RegionMode = ""
	f, err := Open(context.Background(), Options{Shards: testShards, Stores: []StoreOptions{o}, Logger: testLog(t)})
	if err != nil {
		t.Fatal(err)
	}
	if got := f.Status().Stores[0].Stats.RegionMode; got != pmem.ModeFile {
		t.Errorf("in a file: mode %q", got)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}
