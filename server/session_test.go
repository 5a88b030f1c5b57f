package server

import (
	"context"
	"fmt"
	"testing"
	"time"

	"sealfs"
	"sealfs/op"
)

// TestPunchWithSession: a hole over more extents than one step frees, asked
// for by a session, whose result row must not answer the second step.
func TestPunchWithSession(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	ino := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: "f", Mode: 0o644}).Attr.Ino
	const blocks = 700
	for i := range uint64(blocks) {
		s.must(t, op.Request{Type: op.Write, Ino: ino, Off: i * 8192, Data: make([]byte, 4096)})
	}
	req := op.Request{Type: op.Fallocate, Ino: ino, Len: blocks * 8192, Mode: punchHole | keepSize, Session: 9, Seq: 1, Low: 1}
	for range 2 { // and once more, as after a lost answer
		s.must(t, req)
		if rep := s.try(t, op.Request{Type: op.Seek, Ino: ino, Mode: 3}); rep.Code != sealfs.ErrNoDevice {
			t.Fatalf("data at %d is left, %v", rep.Off, rep.Code)
		}
	}
}

// TestFlockConversion: two holders of a shared lock both want it exclusively.
// The one that asks gives up its own first, so one of them gets it.
func TestFlockConversion(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	ino := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: "f", Mode: 0o644}).Attr.Ino
	lock := func(ty op.Type, owner uint64, kind op.LockType) op.Request {
		return op.Request{Type: ty, Ino: ino, Flags: op.Flock, Session: sealfs.Session(owner), Lock: op.Lock{Type: kind, End: 1<<63 - 1, Owner: owner}}
	}
	s.must(t, lock(op.SetLock, 1, op.ReadLock))
	s.must(t, lock(op.SetLock, 2, op.ReadLock))
	got := make(chan sealfs.Code, 2)
	for owner := range uint64(2) {
		req := lock(op.WaitLock, owner+1, op.WriteLock)
		address(&req)
		go func() {
			var rep op.Reply
			if err := s.Do(context.Background(), &req, &rep); err != nil {
				rep.Code = sealfs.ErrIO
			}
			got <- rep.Code
			drop := lock(op.DropOwner, owner+1, op.Unlock)
			address(&drop)
			_ = s.Do(context.Background(), &drop, &op.Reply{})
		}()
	}
	for range 2 {
		if code := <-got; code != 0 {
			t.Error(code)
		}
	}
}

// TestDropAllOwners: what open files hold themselves is released for all owners.
func TestDropAllOwners(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	ino := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: "f", Mode: 0o644}).Attr.Ino
	for owner := range uint64(5) {
		s.must(t, op.Request{Type: op.SetLock, Ino: ino, Session: 3, Lock: op.Lock{Type: op.WriteLock, Start: owner * 10, End: owner*10 + 5, Owner: owner + 1}})
	}
	s.must(t, op.Request{Type: op.SetLock, Ino: ino, Session: 4, Lock: op.Lock{Type: op.WriteLock, Start: 100, End: 200, Owner: 1}})
	s.must(t, op.Request{Type: op.DropOwner, Ino: ino, Session: 3, Flags: op.AllOwners})
	test := func(start, end uint64) op.LockType {
		return s.must(t, op.Request{Type: op.TestLock, Ino: ino, Session: 7, Lock: op.Lock{Type: op.WriteLock, Start: start, End: end, Owner: 1}}).Lock.Type
	}
	if k := test(0, 99); k != op.Unlock {
		t.Errorf("a lock of the session is left: %v", k)
	}
	if k := test(100, 100); k != op.WriteLock {
		t.Errorf("another session's lock is gone: %v", k)
	}
}

// TestOpenDying: a file that is being freed cannot be opened any more.
func TestOpenDying(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	ino := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: "f", Mode: 0o644, Flags: op.OpenIt}).Attr.Ino
	s.must(t, op.Request{Type: op.Unlink, Dir: s.root, Name: "f"})
	s.must(t, op.Request{Type: op.Open, Ino: ino})
	s.stores[0].holds.end(func(at sealfs.Session) bool { return at == 0 }) // as if the release were on its way to the reclaimer
	rep := s.try(t, op.Request{Type: op.Open, Ino: ino})
	if rep.Code != sealfs.ErrStale && rep.Code != sealfs.ErrNotExist {
		t.Errorf("open of a dying file: %v", rep.Code)
	}
	s.stores[0].reclaim.add(ino)
	s.stores[0].reclaim.settle()
	if _, n := s.Usage(1); n != 1 {
		t.Errorf("%d inodes are left", n)
	}
}

// TestRestartEndsSessions: locks of the last run do not outlive it, and the
// root of a volume is still made only once.
func TestRestartEndsSessions(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	for i := range uint64(20) {
		ino := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: fmt.Sprint(i), Mode: 0o644, Session: 5, Seq: i + 1, Low: 1}).Attr.Ino
		s.must(t, op.Request{Type: op.SetLock, Ino: ino, Session: sealfs.Session(i % 3), Lock: op.Lock{Type: op.WriteLock, End: 10, Owner: i}})
	}
	s.kill(t)
	for i := range uint64(20) {
		ino := s.must(t, op.Request{Type: op.Lookup, Dir: s.root, Name: fmt.Sprint(i)}).Attr.Ino
		if k := s.must(t, op.Request{Type: op.TestLock, Ino: ino, Session: 77, Lock: op.Lock{Type: op.WriteLock, End: 10, Owner: 1}}).Lock.Type; k != op.Unlock {
			t.Errorf("file %d is still locked", i)
		}
	}
	if root, err := s.MakeRoot(context.Background(), 1, 0o755, 0, 0); err != nil || root != s.root {
		t.Errorf("the volume's root is %d, was %d: %v", root, s.root, err)
	}
}

// TestGuests: a client outside cannot ask for what is the server's own business.
func TestGuests(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	ino := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: "f", Mode: 0o644}).Attr.Ino
	for _, req := range []op.Request{
		{Type: op.MakeRoot, Shard: 1},
		{Type: op.DropVolume, Shard: s.root.Home(testShards)},
		{Type: op.DropSession, Shard: 1, Lock: op.Lock{Owner: 3}},
		{Type: op.Reclaim, Ino: ino},
		{Type: op.Getattr, Ino: ino, Session: volumeSession},
	} {
		address(&req)
		var rep op.Reply
		if err := s.Guests().Do(context.Background(), &req, &rep); err != nil || rep.Code != sealfs.ErrPerm {
			t.Errorf("%v: %v, %v", req.Type, err, rep.Code)
		}
	}
	req := op.Request{Type: op.Getattr, Ino: ino}
	address(&req)
	var rep op.Reply
	if err := s.Guests().Do(context.Background(), &req, &rep); err != nil || rep.Code != 0 {
		t.Errorf("getattr: %v, %v", err, rep.Code)
	}
}

// TestWaitersRest: who waits for a lock does nothing until one goes.
func TestWaitersRest(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	ino := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: "f", Mode: 0o644}).Attr.Ino
	for _, flags := range []op.Flags{op.Flock, 0} {
		lock := func(ty op.Type, sess sealfs.Session, kind op.LockType) op.Request {
			req := op.Request{Type: ty, Ino: ino, Flags: flags, Session: sess, Lock: op.Lock{Type: kind, End: 1<<63 - 1, Owner: 1}}
			address(&req)
			return req
		}
		s.must(t, lock(op.SetLock, 1, op.WriteLock))
		got := make(chan sealfs.Code, 1)
		go func() {
			req := lock(op.WaitLock, 2, op.WriteLock)
			var rep op.Reply
			if err := s.Do(context.Background(), &req, &rep); err != nil {
				rep.Code = sealfs.ErrIO
			}
			got <- rep.Code
		}()
		// Every attempt takes a time of its own: it must come to rest.
		st := s.stores[0]
		tick := time.NewTicker(5 * time.Millisecond)
		waiting := func() bool {
			st.locks.mu.Lock()
			defer st.locks.mu.Unlock()
			return len(st.locks.of[ino]) == 1
		}
		rested := false
		for i := 0; i < 400 && !rested; i++ {
			before := st.last.Load()
			<-tick.C
			rested = waiting() && st.last.Load() == before
		}
		tick.Stop()
		if !rested {
			t.Errorf("flags %#x: the waiting request never rests", flags)
		}
		s.must(t, lock(op.DropOwner, 1, op.Unlock))
		if code := <-got; code != 0 {
			t.Errorf("flags %#x: %v", flags, code)
		}
		s.must(t, lock(op.DropOwner, 2, op.Unlock))
	}
}
