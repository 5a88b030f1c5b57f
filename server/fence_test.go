package server

import (
	"context"
	"testing"
	"time"

	"sealfs"
	"sealfs/op"
)

// TestFencedSession: a fenced session changes nothing anywhere, in its home nor in chunks, and keeps its
// locks until its end.
func TestFencedSession(t *testing.T) {
	w := newWorld(t, 5, 1, 1)
	ino := w.must(op.Request{Type: op.Create, Dir: w.root, Name: "f", Mode: 0o644}).Attr.Ino
	x, y := op.Owner{Session: 7, Owner: 1}, op.Owner{Session: 8, Owner: 1}
	w.must(lockRequest(op.SetLock, ino, x, op.WriteLock, 0, 9))
	try := func(req op.Request) sealfs.Code {
		t.Helper()
		if req.Shard == 0 {
			address(&req)
		}
		var rep op.Reply
		if err := w.Do(context.Background(), &req, &rep); err != nil {
			t.Fatal(err)
		}
		return rep.Code
	}
	big := make([]byte, sealfs.IOMax) // several records
	write := op.Request{Type: op.Write, Ino: ino, Session: 7, Data: big}
	if code := try(write); code != 0 {
		t.Fatal(code)
	}
	fence := func(list ...sealfs.Session) {
		for i := range w.srv {
			w.srv[i].Load().Fence(list)
		}
	}
	fence(7)
	far := write
	far.Off, far.Volume = sealfs.HomeBytes+3*sealfs.ChunkBytes, 1
	far.Shard = ino.DataShard(far.Off, testShards)
	hole := op.Request{Type: op.Fallocate, Ino: ino, Session: 7, Len: 4096, Mode: punchHole | keepSize}
	for _, req := range []op.Request{write, hole, lockRequest(op.SetLock, ino, x, op.WriteLock, 20, 29), {Type: op.Open, Ino: ino, Session: 7}} {
		if code := try(req); code != sealfs.ErrSession {
			t.Errorf("%v of a fenced session: %v", req.Type, code)
		}
	}
	if code := try(far); code != sealfs.ErrSession && code != sealfs.ErrStale {
		t.Errorf("write to a chunk: %v", code)
	}
	other := lockRequest(op.SetLock, ino, y, op.WriteLock, 0, 9)
	if code := try(other); code != sealfs.ErrAgain {
		t.Errorf("the lock of a fenced session is given to another: %v", code)
	}
	waits := w.begin(context.Background(), lockRequest(op.WaitLock, ino, y, op.WriteLock, 0, 9))
	for i := range w.srv {
		w.srv[i].Load().SetSessions(10, []sealfs.Session{8, 9})
	}
	fence()
	if err := <-waits; err != nil {
		t.Errorf("after the end: %v", err)
	}
	if code := try(write); code != sealfs.ErrSession {
		t.Errorf("write after the end: %v", code)
	}
}

// TestFencedLease: what a fenced session believes is not changed before its end is known, also when it
// goes on watching meanwhile.
func TestFencedLease(t *testing.T) {
	w := newWorld(t, 5, 1)
	s := w.srv[0].Load()
	ino := w.must(op.Request{Type: op.Create, Dir: w.root, Name: "f", Mode: 0o644}).Attr.Ino
	watch := op.Request{Type: op.Watch, Session: 7, Shard: ino.Home(testShards), Volume: 1, Seq: 1}
	w.must(watch)
	if rep := w.must(op.Request{Type: op.Getattr, Ino: ino, Session: 7}); rep.Lease&op.LeaseIno == 0 {
		t.Fatal("no lease")
	}
	s.Fence([]sealfs.Session{7})
	watch.Seq++
	var rep op.Reply
	if err := w.Do(context.Background(), &watch, &rep); err != nil || rep.Code != sealfs.ErrSession {
		t.Fatalf("watch of a fenced session: %v, %v", err, rep.Code)
	}
	change := op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetMode, Mode: 0o600}
	address(&change)
	changed := w.begin(context.Background(), change)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for s.Status().Stores[0].Leases.Waits == 0 {
		select {
		case err := <-changed:
			t.Fatalf("changed while a fenced session believes it: %v", err)
		case <-tick.C:
		}
	}
	s.SetSessions(10, []sealfs.Session{8, 9})
	if err := <-changed; err != nil {
		t.Errorf("after the end: %v", err)
	}
}

// TestUnattended: a server that the managers may have given up takes no changes of sessions until
// it has heard of them.
func TestUnattended(t *testing.T) {
	w := newWorld(t, 5, 1)
	s := w.srv[0].Load()
	ino := w.must(op.Request{Type: op.Create, Dir: w.root, Name: "f", Mode: 0o644}).Attr.Ino
	write := op.Request{Type: op.Write, Ino: ino, Session: 7, Data: []byte("x")}
	address(&write)
	try := func() sealfs.Code {
		req := write
		var rep op.Reply
		if err := w.Do(context.Background(), &req, &rep); err != nil {
			t.Fatal(err)
		}
		return rep.Code
	}
	for range 2 {
		s.Attend(time.Hour)
		if code := try(); code != 0 {
			t.Error(code)
		}
		s.Attend(-time.Nanosecond)
		if code := try(); code != sealfs.ErrUnavailable {
			t.Error(code)
		}
	}
	req := op.Request{Type: op.Read, Ino: ino, Session: 7, Len: 1}
	address(&req)
	var rep op.Reply
	if err := w.Do(context.Background(), &req, &rep); err != nil || rep.Code != 0 || string(rep.Data) != "x" {
		t.Errorf("a read waits, too: %v, %v", err, rep.Code)
	}
}
