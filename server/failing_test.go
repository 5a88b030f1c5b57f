package server

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// file makes a file with content and returns its inode.
func (s *simServer) file(t testing.TB, name string, data []byte) sealfs.Ino {
	t.Helper()
	ino := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: name, Mode: 0o644}).Attr.Ino
	if len(data) > 0 {
		s.must(t, op.Request{Type: op.Write, Ino: ino, Data: data})
	}
	return ino
}

// pattern is n bytes that are the i-th file's alone.
func pattern(i, n int) []byte { return bytes.Repeat(fmt.Appendf(nil, "<%d>", i), n/3+1)[:n] }

// restart closes the server and starts it anew, so that ring and cache are empty.
func (s *simServer) restart(t testing.TB) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s.dev, s.region = s.dev.Reopen(), s.region.Reopen()
	s.start(t, nil)
}

// TestFailingDevice: a device whose writes or flushes fail, at any moment,
// makes the store read-only. Who waits is told, changes are refused with EROFS, the status
// names the reason, and all that was answered can be read.
func TestFailingDevice(t *testing.T) {
	for _, kind := range []disk.FaultKind{disk.WriteError, disk.FlushError, disk.TornWrite, disk.NoSpace} {
		for nth := range 6 {
			t.Run(fmt.Sprintf("%v/%d", kind, nth), func(t *testing.T) {
				s := newSim(t, 64<<20, 1<<20)
				files := map[sealfs.Ino][]byte{}
				for i := range 20 {
					data := pattern(i, 1000*(i+1))
					files[s.file(t, fmt.Sprint("f", i), data)] = data
				}
				s.dev.Fail(disk.Fault{Kind: kind, Match: func(_ int64, _, n int) bool { return n == nth }})
				failed := false
				for i := 0; i < 200 && !failed; i++ {
					rep := s.try(t, op.Request{Type: op.Create, Dir: s.root, Name: fmt.Sprint("g", i), Mode: 0o644})
					if rep.Code == 0 {
						rep = s.try(t, op.Request{Type: op.Sync, Ino: s.root})
					}
					failed = rep.Code != 0
				}
				if !failed {
					t.Fatal("nobody was told")
				}
				for _, req := range []op.Request{
					{Type: op.Create, Dir: s.root, Name: "new", Mode: 0o644},
					{Type: op.Unlink, Dir: s.root, Name: "f1"},
					{Type: op.Mkdir, Dir: s.root, Name: "d", Mode: 0o755, Shard2: 3},
				} {
					if rep := s.try(t, req); rep.Code != sealfs.ErrReadOnly {
						t.Errorf("%v is answered %v", req.Type, rep.Code)
					}
				}
				for ino := range files {
					if rep := s.try(t, op.Request{Type: op.Write, Ino: ino, Data: []byte("x")}); rep.Code != sealfs.ErrReadOnly {
						t.Errorf("a write is answered %v", rep.Code)
					}
					break
				}
				for ino, want := range files {
					if got := s.must(t, op.Request{Type: op.Read, Ino: ino, Len: 1 << 20}).Data; !bytes.Equal(got, want) {
						t.Fatalf("inode %d holds other bytes", ino)
					}
				}
				if st := s.Status().Stores[0]; st.State != "read-only" || !strings.Contains(st.Reason, kind.String()) || !strings.Contains(st.Reason, "device") {
					t.Errorf("status %q, reason %q", st.State, st.Reason)
				}
			})
		}
	}
}

// TestFailingBlock: a block that cannot be read costs the file it belongs to,
// and nothing else; the answer is EIO, and the store takes changes as before.
func TestFailingBlock(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	files := map[sealfs.Ino][]byte{}
	for i := range 40 {
		data := pattern(i, 500*(i+1))
		files[s.file(t, fmt.Sprint("f", i), data)] = data
	}
	victim := s.file(t, "victim", pattern(99, 20000))
	s.restart(t)
	at := s.placeOf(t, victim, 8192) &^ 4095
	s.dev.Fail(disk.Fault{Kind: disk.ReadError, Match: func(off int64, n, _ int) bool { return off <= at && at < off+int64(n) }})
	rep := s.try(t, op.Request{Type: op.Read, Ino: victim, Len: 1 << 20})
	if rep.Code != sealfs.ErrIO {
		t.Fatalf("the block's file is answered %v", rep.Code)
	}
	bad := 0
	for ino, want := range files {
		rep := s.try(t, op.Request{Type: op.Read, Ino: ino, Len: 1 << 20})
		if rep.Code == sealfs.ErrIO {
			bad++
		} else if rep.Code != 0 || !bytes.Equal(rep.Data, want) {
			t.Fatalf("inode %d: %v", ino, rep.Code)
		}
	}
	// Two files can have bytes in one block, as records are packed.
	if bad > 0 {
		t.Errorf("%d other files cannot be read", bad)
	}
	if st := s.Status().Stores[0]; st.State != "up" {
		t.Errorf("status %q, %q", st.State, st.Reason)
	}
	s.file(t, "another", pattern(5, 5000))
	s.must(t, op.Request{Type: op.Sync, Ino: s.root})
}

// placeOf returns the byte of the device at which a file's byte stands.
func (s *simServer) placeOf(t testing.TB, ino sealfs.Ino, off uint64) (at int64) {
	t.Helper()
	st := s.stores[0]
	r := st.BeginRead()
	var lsn sealfs.LSN
	_, err := meta.Extents(r, s.cfg, ino, off, 1, func(e *meta.Extent) bool {
		lsn = e.Addr + sealfs.LSN(off-e.Off)
		return false
	})
	st.EndRead()
	if at = st.Place(lsn); err != nil || at < 0 {
		t.Fatalf("inode %d has nothing at %d on the device: %v", ino, off, err)
	}
	return at
}

// TestStalledDevice: while a device is silent, what stands in memory can be read and
// what fits the ring can be written; the status says what is wrong; nobody is
// told anything untrue, and when the device goes on, so does everybody.
func TestStalledDevice(t *testing.T) {
	s := newSimWith(t, disk.NewSim("device", 64<<20), disk.NewSim("region", 32<<20), 256<<10, lsfs.Options{StagingBytes: 512 << 10})
	s.pace.stalled = 20 * time.Millisecond
	old := s.file(t, "old", pattern(1, 3000))
	s.must(t, op.Request{Type: op.Sync, Ino: s.root})
	resume := s.dev.Stall(true)
	defer resume()

	// Writers until the ring is full and they wait.
	var wg sync.WaitGroup
	var written atomic.Int64
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for w := range 4 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil && i < 200; i++ {
				s.file(t, fmt.Sprintf("w%d-%d", w, i), pattern(w, 8000))
				written.Add(1)
			}
		})
	}
	poll(t, "something is written", func() bool { return written.Load() > 0 })
	synced := make(chan op.Reply, 1)
	go func() {
		rep := s.try(t, op.Request{Type: op.Sync, Ino: s.root})
		synced <- *rep
	}()
	poll(t, "the device owes answers", func() bool { return s.dev.Waiting() > 0 })
	poll(t, "the status says so", func() bool { return s.Status().Stores[0].State == "stalled" })
	if st := s.Status().Stores[0]; !strings.Contains(st.Reason, "device has not answered for") {
		t.Errorf("reason %q", st.Reason)
	}
	// The ring is full when no more files come.
	last, since := int64(-1), time.Now()
	poll(t, "the ring is full", func() bool {
		if n := written.Load(); n != last {
			last, since = n, time.Now()
		}
		return time.Since(since) > 100*time.Millisecond
	})
	if last == 0 || last == 800 {
		t.Fatalf("%d files were written: the ring is not full, or nothing went in", last)
	}
	for range 20 {
		if got := s.must(t, op.Request{Type: op.Read, Ino: old, Len: 1 << 20}).Data; !bytes.Equal(got, pattern(1, 3000)) {
			t.Fatal("wrong bytes")
		}
		s.must(t, op.Request{Type: op.Lookup, Dir: s.root, Name: "old"})
	}
	if err := s.stores[0].StartScrub(lsfs.ScrubOptions{}); err != nil {
		t.Fatal(err)
	}
	s.stores[0].StopScrub()
	select {
	case rep := <-synced:
		t.Fatalf("a sync was answered %v by a device that is silent", rep.Code)
	default:
	}
	resume()
	if rep := <-synced; rep.Code != 0 {
		t.Errorf("the sync ends with %v", rep.Code)
	}
	wg.Wait()
	if written.Load() != 800 {
		t.Errorf("%d files were written", written.Load())
	}
	poll(t, "the store is up again", func() bool { return s.Status().Stores[0].State == "up" })
}

// TestFullConcurrent: writers fill the store to the last byte, again and again,
// while others delete: nobody waits for ever, errors are ENOSPC only, and in the end all space is back.
func TestFullConcurrent(t *testing.T) {
	s := newSimWith(t, disk.NewSim("device", 1<<20+64*128<<10), disk.NewSim("region", 8<<20), 128<<10, lsfs.Options{StagingBytes: 256 << 10})
	var full, made, dropped atomic.Int64
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			var names []string
			for i := range 1500 {
				name := fmt.Sprintf("w%d-%d", w, i)
				rep := s.try(t, op.Request{Type: op.Create, Dir: s.root, Name: name, Mode: 0o644})
				if rep.Code == 0 {
					names = append(names, name)
					rep = s.try(t, op.Request{Type: op.Write, Ino: rep.Attr.Ino, Data: pattern(i, 6000)})
				}
				switch {
				case rep.Code == sealfs.ErrNoSpace:
					full.Add(1)
					for range min(20, len(names)) {
						s.must(t, op.Request{Type: op.Unlink, Dir: s.root, Name: names[0]})
						names = names[1:]
						dropped.Add(1)
					}
				case rep.Code != 0:
					t.Errorf("%s: %v", name, rep.Code)
					return
				default:
					made.Add(1)
				}
			}
			for _, name := range names {
				s.must(t, op.Request{Type: op.Unlink, Dir: s.root, Name: name})
			}
		})
	}
	wg.Wait()
	s.stores[0].reclaim.settle()
	if bytes, inodes := s.Usage(1); bytes != 0 || inodes != 1 {
		t.Errorf("%d bytes in %d inodes are left", bytes, inodes)
	}
	if full.Load() < 10 {
		t.Errorf("full %d times only", full.Load())
	}
	// Everything can be had again.
	n := 0
	for ; ; n++ {
		rep := s.try(t, op.Request{Type: op.Create, Dir: s.root, Name: fmt.Sprint("again", n), Mode: 0o644})
		if rep.Code == 0 {
			rep = s.try(t, op.Request{Type: op.Write, Ino: rep.Attr.Ino, Data: pattern(n, 6000)})
		}
		if rep.Code == sealfs.ErrNoSpace {
			break
		}
		if rep.Code != 0 {
			t.Fatal(rep.Code)
		}
	}
	if room := s.Status().Stores[0].Stats.Usable; int64(n)*6000 < room*8/10 {
		t.Errorf("%d files of 6000 bytes in %d usable bytes", n, room)
	}
	t.Logf("full %d times, %d files made, %d dropped for it, %d in the end", full.Load(), made.Load(), dropped.Load(), n)
}

// TestCrampedRegion: a region whose file system is full takes no more new
// files; all that is there can be read, changed in place, and deleted; and when
// there is room it grows.
func TestCrampedRegion(t *testing.T) {
	s := &simServer{dev: disk.NewSim("device", 256<<20), region: disk.NewSim("region", 64<<20), logOptions: lsfs.Options{StagingBytes: 4 << 20}}
	var room atomic.Int64
	room.Store(8 << 20)
	c := pmem.NewCramped(s.region, room.Load)
	if _, err := lsfs.Format(s.dev, c, lsfs.Geometry{SegmentBytes: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	s.startOn(t, c, nil)
	t.Cleanup(func() { s.Close() })
	var err error
	if s.root, err = s.MakeRoot(context.Background(), 1, 0o755, 0, 0); err != nil {
		t.Fatal(err)
	}
	for round := range 3 {
		files := map[string]sealfs.Ino{}
		var names []string
		for i := 0; ; i++ {
			name := fmt.Sprintf("%0100d", i)
			rep := s.try(t, op.Request{Type: op.Create, Dir: s.root, Name: name, Mode: 0o644})
			if rep.Code == 0 {
				names, files[name] = append(names, name), rep.Attr.Ino
				rep = s.try(t, op.Request{Type: op.Write, Ino: rep.Attr.Ino, Data: pattern(i, 100)})
			}
			if rep.Code == sealfs.ErrNoSpace {
				break
			}
			if rep.Code != 0 || i > 100_000 {
				t.Fatal(i, rep.Code)
			}
		}
		if len(names) < 1000 {
			t.Fatalf("round %d: full after %d files", round, len(names))
		}
		if st := s.Status().Stores[0]; st.State != "up" {
			t.Fatalf("status %q, %q", st.State, st.Reason)
		}
		if got := s.must(t, op.Request{Type: op.Read, Ino: files[names[7]], Len: 100}).Data; !bytes.Equal(got, pattern(7, 100)) {
			t.Errorf("%q", got)
		}
		// Held files get longer rows when they lose their names, so that to delete them
		// takes pages, too: one each at worst, and there are 64.
		held := len(names)/40 + 1
		for i := len(names) - 1; i >= 0; i -= held {
			s.must(t, op.Request{Type: op.Open, Ino: files[names[i]]})
		}
		for i := len(names) - 1; i >= 0; i -= held {
			s.must(t, op.Request{Type: op.Unlink, Dir: s.root, Name: names[i]})
		}
		for i, name := range names {
			if (len(names)-1-i)%held != 0 {
				s.must(t, op.Request{Type: op.Unlink, Dir: s.root, Name: name})
			} else {
				s.must(t, op.Request{Type: op.Release, Ino: files[name]})
			}
		}
		s.stores[0].reclaim.settle()
		s.check(t)
	}
	// Room comes: more fits than ever before.
	room.Store(64 << 20)
	for i := range 20_000 {
		s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: fmt.Sprintf("%0100d", i), Mode: 0o644})
	}
}
