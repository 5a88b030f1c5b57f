package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/internal/turn"
	"sealfs/lsfs"
	"sealfs/meta"
	"sealfs/op"
)

// kill ends the server as SIGKILL would and starts it again.
func (s *simServer) kill(t testing.TB) {
	t.Helper()
	st := s.stores[0]
	st.srv.teller.stop(turn.Turns{})
	st.reclaim.stop()
	kept, err := st.Abandon()
	if err != nil {
		t.Fatal(err)
	}
	s.dev, s.region = s.dev.Reopen(), s.region.Reopen()
	s.start(t, kept)
}

// TestModelKill: the comparison with the oracle goes on across kills.
func TestModelKill(t *testing.T) {
	w := newTwin(t, 2, 512<<20, 1<<20)
	rounds := 30
	if testing.Short() {
		rounds = 8
	}
	for range rounds {
		for until := w.n + 1 + w.rng.IntN(600); w.n < until; {
			w.step()
		}
		w.sim.kill(t)
		w.sim.check(t)
		w.forgetLocks()
	}
}

// forgetLocks ends the oracle's sessions, as a restart does.
func (w *twin) forgetLocks() {
	w.t.Helper()
	for shard := range sealfs.Shard(testShards) {
		req := op.Request{Type: op.DropSession, Shard: shard}
		if err := w.o.Do(context.Background(), &req, &op.Reply{}); err != nil {
			w.t.Fatal(err)
		}
	}
}

// TestRot: whatever bit of the device is flipped, a read gives the right bytes
// or EIO, and other files are untouched.
func TestRot(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	rng := rand.New(rand.NewPCG(5, 5))
	files := map[sealfs.Ino][]byte{}
	for i := range 80 {
		rep := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: fmt.Sprint("f", i), Mode: 0o644})
		data := make([]byte, 1+rng.IntN(30000))
		for j := range data {
			data[j] = byte(rng.Uint32())
		}
		s.must(t, op.Request{Type: op.Write, Ino: rep.Attr.Ino, Data: data})
		files[rep.Attr.Ino] = data
	}
	// A clean restart empties ring and cache: every read comes from the device.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s.dev, s.region = s.dev.Reopen(), s.region.Reopen()
	s.start(t, nil)
	used := int64(1 << 20)
	bad := 0
	for range 120 {
		off := 1<<20 + 4096 + rng.Int64N(used)
		bit := uint(rng.IntN(8))
		s.dev.FlipBit(off, bit)
		damaged := 0
		for ino, want := range files {
			rep := s.try(t, op.Request{Type: op.Read, Ino: ino, Len: 1 << 20})
			switch {
			case rep.Code == sealfs.ErrIO:
				damaged++
			case rep.Code != 0:
				t.Fatalf("read: %v", rep.Code)
			case !bytes.Equal(rep.Data, want):
				t.Fatalf("inode %d: wrong bytes were returned", ino)
			}
			s.stores[0].forgetAll(ino)
		}
		if damaged > 1 {
			t.Fatalf("one flipped bit damaged %d files", damaged)
		}
		bad += damaged
		s.dev.FlipBit(off, bit)
	}
	if bad < 8 {
		t.Errorf("only %d flips hit a file: the test did not reach its point", bad)
	}
}

// forgetAll drops the cached blocks of a file, so that damage is met at once.
func (st *store) forgetAll(ino sealfs.Ino) {
	rd := &reading{}
	r := st.BeginRead()
	defer st.EndRead()
	dst := make([]byte, 1<<20)
	if _, err := meta.Extents(r, st.srv.cfg, ino, 0, uint64(len(dst)), func(e *meta.Extent) bool {
		rd.add(e, 0, dst)
		return true
	}); err != nil {
		panic(err)
	}
	rd.place(dst)
	for i := range rd.pieces {
		st.Forget(&rd.pieces[i].fetch)
	}
}

// TestFullDelete: on a full store files can be deleted, and then written again.
func TestFullDelete(t *testing.T) {
	for _, g := range []struct {
		name           string
		device, region int64
		segment        uint32
		size           int
		log            lsfs.Options
	}{
		{"segments=512K", 24 << 20, 32 << 20, 512 << 10, 100000, lsfs.Options{}},
		{"segments=32K", 1<<20 + 48*32<<10, 4 << 20, 32 << 10, 3000, lsfs.Options{StagingBytes: 64 << 10}},
		{"always-cleaning", 1<<20 + 48*32<<10, 4 << 20, 32 << 10, 3000, lsfs.Options{StagingBytes: 64 << 10, CleanLow: 30}},
	} {
		t.Run(g.name, func(t *testing.T) {
			s := newSimWith(t, disk.NewSim("device", g.device), disk.NewSim("region", g.region), g.segment, g.log)
			fullDelete(t, s, bytes.Repeat([]byte{7}, g.size))
		})
	}
}

func fullDelete(t *testing.T, s *simServer, data []byte) {
	for round := range 3 {
		var names []string
		for i := 0; ; i++ {
			name := fmt.Sprint("r", round, "f", i)
			rep := s.try(t, op.Request{Type: op.Create, Dir: s.root, Name: name, Mode: 0o644})
			if rep.Code == 0 {
				names = append(names, name)
				rep = s.try(t, op.Request{Type: op.Write, Ino: rep.Attr.Ino, Data: data})
			}
			if rep.Code == sealfs.ErrNoSpace {
				break
			}
			if rep.Code != 0 {
				t.Fatal(rep.Code)
			}
		}
		if len(names) < 100 {
			t.Fatalf("round %d: full after %d files", round, len(names))
		}
		for _, n := range names {
			s.must(t, op.Request{Type: op.Unlink, Dir: s.root, Name: n})
		}
	}
}

// TestConcurrent: many clients at once, each with files of its own and some
// shared ones; every file holds what its last writer wrote.
func TestConcurrent(t *testing.T) {
	s := newSim(t, 128<<20, 1<<20)
	shared := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: "shared", Mode: 0o644}).Attr.Ino
	var wg sync.WaitGroup
	fail := make(chan error, 8)
	for c := range 6 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(c), 9))
			dir := s.must(t, op.Request{Type: op.Mkdir, Dir: s.root, Name: fmt.Sprint("d", c), Mode: 0o755, Shard2: sealfs.Shard(c)}).Attr.Ino
			for i := range 150 {
				name := fmt.Sprint("f", rng.IntN(20))
				ino := s.must(t, op.Request{Type: op.Create, Dir: dir, Name: name, Mode: 0o644}).Attr.Ino
				data := bytes.Repeat([]byte{byte(i)}, 1+rng.IntN(20000))
				s.must(t, op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetSize})
				s.must(t, op.Request{Type: op.Write, Ino: ino, Data: data})
				s.must(t, op.Request{Type: op.Write, Ino: shared, Off: uint64(rng.IntN(100)) * 1000, Data: bytes.Repeat([]byte{byte(c)}, 1000)})
				if i%20 == 0 {
					s.must(t, op.Request{Type: op.Sync, Ino: ino})
				}
				got := s.must(t, op.Request{Type: op.Read, Ino: ino, Len: 1 << 20}).Data
				if !bytes.Equal(got, data) {
					fail <- errors.New("a file does not hold what was written last")
					return
				}
				if rng.IntN(5) == 0 {
					s.must(t, op.Request{Type: op.Unlink, Dir: dir, Name: name})
				}
			}
		})
	}
	wg.Wait()
	close(fail)
	for err := range fail {
		t.Error(err)
	}
	got := s.must(t, op.Request{Type: op.Read, Ino: shared, Len: 1 << 20}).Data
	for i := 0; i+1000 <= len(got); i += 1000 {
		if c := got[i]; !bytes.Equal(got[i:i+1000], bytes.Repeat([]byte{c}, 1000)) {
			t.Fatalf("the shared file holds a torn write at %d", i)
		}
	}
}

// TestHeld: a file that is held open lives without a name until it is released.
func TestHeld(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	ino := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: "f", Mode: 0o644, Flags: op.OpenIt}).Attr.Ino
	s.must(t, op.Request{Type: op.Write, Ino: ino, Data: []byte("content")})
	s.must(t, op.Request{Type: op.Unlink, Dir: s.root, Name: "f"})
	s.must(t, op.Request{Type: op.Write, Ino: ino, Off: 7, Data: []byte(" and more")})
	if got := s.must(t, op.Request{Type: op.Read, Ino: ino, Len: 100}).Data; string(got) != "content and more" {
		t.Fatalf("read %q", got)
	}
	s.must(t, op.Request{Type: op.Release, Ino: ino})
	s.stores[0].reclaim.settle()
	if rep := s.try(t, op.Request{Type: op.Getattr, Ino: ino}); rep.Code != sealfs.ErrNotExist {
		t.Fatalf("after the release: %v", rep.Code)
	}
	if b, n := s.Usage(1); b != 0 || n != 1 {
		t.Errorf("%d bytes in %d inodes are left, want 0 in 1", b, n)
	}
}

// TestFailedDevice: a device that stops to write makes the store read-only,
// and says so.
func TestFailedDevice(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: "f", Mode: 0o644})
	s.dev.Fail(disk.Fault{Kind: disk.WriteError, Match: func(int64, int, int) bool { return true }})
	if rep := s.try(t, op.Request{Type: op.Sync, Ino: s.root}); rep.Code == 0 {
		t.Fatal("sync succeeded on a dead device")
	}
	if rep := s.try(t, op.Request{Type: op.Create, Dir: s.root, Name: "g", Mode: 0o644}); rep.Code != sealfs.ErrReadOnly {
		t.Fatalf("create on a dead device: %v", rep.Code)
	}
	if st := s.Status().Stores[0]; st.State != "read-only" || st.Reason == "" {
		t.Errorf("status %q, reason %q", st.State, st.Reason)
	}
	s.must(t, op.Request{Type: op.Lookup, Dir: s.root, Name: "f"})
}
