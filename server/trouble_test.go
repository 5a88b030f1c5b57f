package server

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"sealfs"
	"sealfs/cluster"
	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/op"
	"sealfs/pmem"
)

// ask sends a request, and returns its reply.
func (w *world) ask(req op.Request) (*op.Reply, error) {
	rep := &op.Reply{}
	req.Volume = 1
	err := w.Do(context.Background(), &req, rep)
	return rep, err
}

// A session that comes and goes between two lists keeps its locks and opens.
func TestTroubleShortSession(t *testing.T) {
	w := newWorld(t, 1, 1)
	s := w.srv[0].Load()
	rep, _ := w.ask(op.Request{Type: op.Create, Dir: w.root, Shard: w.root.Home(testShards), Name: "f", Mode: 0o644})
	ino := rep.Attr.Ino
	sh := ino.Home(testShards)
	lock := op.Request{Type: op.SetLock, Ino: ino, Shard: sh, Session: 8, Lock: op.Lock{Type: op.WriteLock, End: 1<<63 - 1, Owner: 1}}
	if rep, err := w.ask(lock); err != nil || rep.Code != 0 {
		t.Fatal(err, rep.Code)
	}
	w.ask(op.Request{Type: op.Open, Ino: ino, Shard: sh, Session: 8})
	s.SetSessions(9, []sealfs.Session{7}) // 8 came and went since the last list
	lock.Session = 7
	if rep, err := w.ask(lock); err != nil || rep.Code != 0 {
		t.Errorf("lock of an ended session: %v %v", err, rep.Code)
	}
	if s.stores[0].holds.any(ino) {
		t.Error("file is held by an ended session")
	}
}

// A store that is added at run time stays in its time of grace.
func TestTroubleAddStoreGrace(t *testing.T) {
	dir := t.TempDir()
	mk := func(n string) StoreOptions {
		so := StoreOptions{Device: filepath.Join(dir, n+".img"), Region: filepath.Join(dir, n+".reg"), Staging: filepath.Join(dir, n+".ring")}
		if err := disk.CreateImage(so.Device, 64<<20); err != nil {
			t.Skip(err)
		}
		dev, err := disk.Open(so.Device, disk.OpenOptions{})
		if err != nil {
			t.Skip(err)
		}
		reg, err := pmem.OpenFile(so.Region, true)
		if err != nil {
			t.Skip(err)
		}
		if _, err := lsfs.Format(dev, reg, lsfs.Geometry{Store: sealfs.NewUUID(), SegmentBytes: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		reg.Close()
		dev.Close()
		return so
	}
	s, err := Open(context.Background(), Options{Shards: testShards, KeepSessions: true, Grace: time.Millisecond, Stores: []StoreOptions{mk("a")}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.SetSessions(8, []sealfs.Session{7})
	if err := s.AddStore(context.Background(), mk("b")); err != nil {
		t.Fatal(err)
	}
	s.SetSessions(9, []sealfs.Session{7})
	for _, st := range s.all() {
		poll(t, "everything counts as held", func() bool { return !st.holds.any(12345) })
	}
}

// Register in two parts: between them the files of the second count as not held.
func TestTroubleRegisterParts(t *testing.T) {
	w := newWorld(t, 1, 1)
	s := w.srv[0].Load()
	st := s.stores[0]
	mk := func(n string) sealfs.Ino {
		rep, _ := w.ask(op.Request{Type: op.Create, Dir: w.root, Shard: w.root.Home(testShards), Name: n, Mode: 0o644, Session: 7, Flags: op.OpenIt})
		return rep.Attr.Ino
	}
	a, b := mk("a"), mk("b")
	w.ask(op.Request{Type: op.Unlink, Dir: w.root, Shard: w.root.Home(testShards), Name: "b"})
	st.reclaim.settle()
	// The connection was lost; the client tells in two parts.
	w.ask(op.Request{Type: op.Register, Shard: a.Home(testShards), Session: 7, Len: 2, Data: op.AppendOpens(nil, op.Opens{Ino: a, Count: 1})})
	st.reclaim.settle()
	w.ask(op.Request{Type: op.Register, Shard: a.Home(testShards), Session: 7, Off: 1, Len: 2, Data: op.AppendOpens(nil, op.Opens{Ino: b, Count: 1})})
	if rep, err := w.ask(op.Request{Type: op.Getattr, Ino: b, Shard: b.Home(testShards)}); err != nil || rep.Code != 0 {
		t.Errorf("a file that is open was freed: %v %v", err, rep.Code)
	}
}

// No map yet.
func TestTroubleNoMap(t *testing.T) {
	s, err := Open(context.Background(), Options{Shards: testShards, Map: func() *cluster.Map { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var rep op.Reply
	err = s.Do(context.Background(), &op.Request{Type: op.Getattr, Ino: 8}, &rep)
	t.Log(err, rep.Code)
}

// With two stores and no map a Commit goes to the first store and "succeeds".
func TestTroubleNoMapCommit(t *testing.T) {
	w := newWorld(t, 1, 2)
	s := w.srv[0].Load()
	old := s.o.Map
	s.o.Map = func() *cluster.Map { return nil }
	defer func() { s.o.Map = old }()
	req := op.Request{Type: op.Commit, Shard: 1, Epoch: 3, Tx: op.Tx{Age: 1, Nonce: 1}, Mtime: 1} // shard 1 is in store 1
	var rep op.Reply
	err := s.Do(context.Background(), &req, &rep)
	if err == nil && rep.Code == 0 {
		t.Errorf("a Commit for store 1 was answered by store 0, incarnation %d", rep.Off)
	}
}

// A transaction whose asker goes away answers EIO.
func TestTroubleInterrupted(t *testing.T) {
	w := newWorld(t, 1, 1, 1)
	ctx, cancel := context.WithCancel(context.Background())
	sh := w.root.Home(testShards)
	row := w.m.Load().Table[sh]
	s := w.srv[w.of[row.Replicas[0]]].Load()
	s.o.Peers = opFunc(func(c context.Context, req *op.Request, rep *op.Reply) error {
		if req.Type == op.Prepare {
			cancel()
			<-c.Done()
			return sealfs.ErrInterrupted
		}
		return (*wires)(w).Do(c, req, rep)
	})
	req := op.Request{Type: op.Mkdir, Dir: w.root, Name: "d", Mode: 0o755, Shard: sh, Shard2: sh ^ 1, Volume: 1, Epoch: row.Epoch}
	var rep op.Reply
	err := s.Do(ctx, &req, &rep)
	if !errors.Is(err, sealfs.ErrInterrupted) {
		t.Errorf("got %v, %v", err, rep.Code)
	}
	s.o.Peers = (*wires)(w)
}

type opFunc func(context.Context, *op.Request, *op.Reply) error

func (f opFunc) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	return f(ctx, req, rep)
}

// A transaction in doubt blocks all reclaiming.
func TestTroubleReclaimBlocked(t *testing.T) {
	w := newWorld(t, 1, 1)
	s := w.srv[0].Load()
	st := s.stores[0]
	d := w.root
	sh := d.Home(testShards)
	rep, _ := w.ask(op.Request{Type: op.Tmpfile, Dir: d, Shard: sh, Mode: 0o600, Session: 7, Flags: op.OpenIt})
	tmp := rep.Attr.Ino
	rep, _ = w.ask(op.Request{Type: op.Create, Dir: d, Shard: sh, Name: "big", Mode: 0o600, Session: 7, Flags: op.OpenIt})
	big := rep.Attr.Ino
	// linkat of the Tmpfile from elsewhere; its coordinator is away for long.
	s.o.Peers = opFunc(func(c context.Context, req *op.Request, rep *op.Reply) error { return sealfs.ErrUnavailable })
	tx := op.Tx{Age: 1, Nonce: 9}
	if rep, err := w.ask(op.Request{Type: op.Prepare, Part: op.PartLink, Ino: tmp, Dir: d, Shard: sh, Coord: 3, Tx: tx}); err != nil || rep.Code != 0 {
		t.Fatal(err, rep.Code)
	}
	w.ask(op.Request{Type: op.Release, Ino: tmp, Shard: sh, Session: 7, Len: 1})
	// Another file loses its last name while held, and is released.
	w.ask(op.Request{Type: op.Unlink, Dir: d, Shard: sh, Name: "big"})
	w.ask(op.Request{Type: op.Release, Ino: big, Shard: sh, Session: 7, Len: 1})
	poll(t, "nothing is freed in the store while a transaction is in doubt", func() bool {
		rep, err := w.ask(op.Request{Type: op.Getattr, Ino: big, Shard: sh})
		return err == nil && rep.Code == sealfs.ErrNotExist
	})
	if rep, err := w.ask(op.Request{Type: op.Abort, Shard: sh, Coord: 3, Tx: tx}); err != nil || rep.Code != 0 {
		t.Fatal(err, rep.Code)
	}
	st.reclaim.settle()
	s.o.Peers = (*wires)(w)
}

// Getattr of any directory in which a name is in hand waits for the transaction.
func TestTroubleDirBlocked(t *testing.T) {
	w := newWorld(t, 1, 1)
	s := w.srv[0].Load()
	s.pace.attributes = 50 * time.Millisecond
	d := w.root
	sh := d.Home(testShards)
	rep, _ := w.ask(op.Request{Type: op.Create, Dir: d, Shard: sh, Name: "f", Mode: 0o600})
	f := rep.Attr.Ino
	s.o.Peers = opFunc(func(c context.Context, req *op.Request, rep *op.Reply) error { return sealfs.ErrUnavailable })
	tx := op.Tx{Age: 9, Nonce: 9}
	w.ask(op.Request{Type: op.Prepare, Part: op.PartName, Dir: d, Name: "x", Ino: f, Mode: 0o100000, Shard: sh, Coord: 3, Tx: tx})
	ctx, cancel := context.WithTimeout(context.Background(), testPace.attributes*8/10)
	defer cancel()
	if err := w.Do(ctx, &op.Request{Type: op.Getattr, Ino: d, Shard: sh, Volume: 1}, &op.Reply{}); err != nil {
		t.Error("stat of the root of the volume hangs:", err)
	}
	w.ask(op.Request{Type: op.Abort, Shard: sh, Coord: 3, Tx: tx})
	s.o.Peers = (*wires)(w)
}

// A name whose inode is lost: unlink must end.
func TestTroubleDangling(t *testing.T) {
	w := newWorld(t, 1, 1, 1)
	w.damaged = true
	d := w.root
	sh := d.Home(testShards)
	ino := sealfs.Ino(1<<30)&^7 | sealfs.Ino(sh^1)
	tx := op.Tx{Age: 9, Nonce: 9}
	w.ask(op.Request{Type: op.Prepare, Part: op.PartName, Dir: d, Name: "x", Ino: ino, Mode: 0o100000, Shard: sh, Coord: sh, Tx: tx})
	w.ask(op.Request{Type: op.Commit, Shard: sh, Coord: 3, Tx: tx, Mtime: time.Now().UnixNano()})
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var rep op.Reply
	err := w.Do(ctx, &op.Request{Type: op.Unlink, Dir: d, Shard: sh, Name: "x", Volume: 1}, &rep)
	if err != nil || rep.Code != sealfs.ErrIO {
		t.Errorf("unlink of a name whose inode is lost: %v, %v", err, rep.Code)
	}
}
