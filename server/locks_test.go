package server

import (
	"context"
	"errors"
	"testing"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
)

// counted compares the counts of locks with the locks that are there, and returns how many those are.
func (w *world) counted() (n int) {
	w.t.Helper()
	for i := range w.srv {
		for _, st := range w.srv[i].Load().all() {
			var there lockCounts
			r := st.BeginRead()
			for shard := range sealfs.Shard(testShards) {
				if err := meta.Locks(r, shard, there.found); err != nil {
					w.t.Error(err)
				}
			}
			st.EndRead()
			st.lockCounts.mu.Lock()
			if st.lockCounts.all != there.all || len(st.lockCounts.of) != len(there.of) {
				w.t.Errorf("%d locks of %d sessions are counted, there are %d of %d", st.lockCounts.all, len(st.lockCounts.of), there.all, len(there.of))
			}
			st.lockCounts.mu.Unlock()
			n += there.all
		}
	}
	return n
}

// TestLockLimits: locks beyond the limits of a session and of a store are refused, and those that
// go make room, however they go.
func TestLockLimits(t *testing.T) {
	w := newWorld(t, 5, 1)
	limit := func() { w.srv[0].Load().lockLimits = lockLimits{session: 5, store: 8} }
	limit()
	ino := w.must(op.Request{Type: op.Create, Dir: w.root, Name: "f", Mode: 0o644, Flags: op.OpenIt, Session: 8}).Attr.Ino
	a, b := op.Owner{Session: 7, Owner: 1}, op.Owner{Session: 8, Owner: 1}
	lock := func(who op.Owner, kind op.LockType, start, end uint64, want sealfs.Code) {
		t.Helper()
		req := lockRequest(op.SetLock, ino, who, kind, start, end)
		var rep op.Reply
		if err := w.Do(context.Background(), &req, &rep); err != nil || rep.Code != want {
			t.Fatalf("lock of %v at %d: %v, %v, want %v", who, start, err, rep.Code, want)
		}
	}
	full := func() {
		t.Helper()
		for i := range uint64(4) {
			lock(a, op.WriteLock, 10*i, 10*i+2, 0)
		}
		lock(a, op.WriteLock, 40, 49, 0)
		lock(a, op.WriteLock, 60, 60, sealfs.ErrNoLocks)
		lock(a, op.Unlock, 44, 45, sealfs.ErrNoLocks) // makes two of one
		for i := range uint64(3) {
			lock(b, op.WriteLock, 100+10*i, 100+10*i, 0)
		}
		lock(b, op.WriteLock, 130, 130, sealfs.ErrNoLocks)
		if n := w.counted(); n != 8 {
			t.Fatalf("%d locks", n)
		}
	}
	full()
	lock(a, op.WriteLock, 3, 9, 0) // makes one of two
	lock(b, op.WriteLock, 130, 130, 0)
	w.kill(0)
	limit()
	lock(b, op.WriteLock, 140, 140, sealfs.ErrNoLocks) // they have survived
	w.must(lockRequest(op.DropOwner, ino, a, op.Unlock, 0, 0))
	if n := w.counted(); n != 4 {
		t.Errorf("%d locks after one owner's", n)
	}
	req := lockRequest(op.DropOwner, ino, b, op.Unlock, 0, 0)
	req.Flags = op.AllOwners
	w.must(req)
	full()
	w.srv[0].Load().SetSessions(10, []sealfs.Session{8, 9})
	if n := w.counted(); n != 3 {
		t.Errorf("%d locks after the end of a session", n)
	}
	w.must(op.Request{Type: op.Unlink, Dir: w.root, Name: "f"})
	w.must(op.Request{Type: op.Release, Ino: ino, Session: 8, Len: 9})
	w.srv[0].Load().stores[0].reclaim.settle()
	if n := w.counted(); n != 0 {
		t.Errorf("%d locks of a file that is gone", n)
	}
}

// TestLocksSurvive kills servers while locks are held and waited for: what is held stays so, who waits
// waits on, and gets his lock when it comes free.
func TestLocksSurvive(t *testing.T) {
	w := newWorld(t, 6, 1, 1)
	files := w.files(4)
	holder, next := op.Owner{Session: 7, Owner: 1}, op.Owner{Session: 8, Owner: 2}
	var waits []<-chan error
	for _, ino := range files {
		for i, flags := range []op.Flags{0, op.Flock} {
			take, want := lockRequest(op.SetLock, ino, holder, op.WriteLock, 0, 9), lockRequest(op.WaitLock, ino, next, op.WriteLock, 5, 20)
			take.Flags, want.Flags = flags, flags
			w.must(take)
			if i == 0 {
				want.Flags |= op.OFD
			}
			waits = append(waits, w.begin(context.Background(), want))
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	given := w.begin(ctx, lockRequest(op.WaitLock, files[0], op.Owner{Session: 9, Owner: 3}, op.WriteLock, 0, 9))
	for range 2 {
		for i := range w.srv {
			w.kill(i)
		}
		for _, got := range waits {
			w.never("a wait", got)
		}
	}
	cancel()
	if err := <-given; !errors.Is(err, sealfs.ErrInterrupted) && !errors.Is(err, sealfs.ErrUnavailable) {
		t.Errorf("an interrupted wait: %v", err)
	}
	if n := w.counted(); n != 2*len(files) {
		t.Errorf("%d locks are held", n)
	}
	for _, ino := range files {
		for _, flags := range []op.Flags{0, op.Flock} {
			drop := lockRequest(op.DropOwner, ino, holder, op.Unlock, 0, 0)
			drop.Flags = flags
			w.must(drop)
		}
	}
	for _, got := range waits {
		if err := <-got; err != nil {
			t.Error(err)
		}
	}
	if n := w.counted(); n != len(waits) {
		t.Errorf("%d locks, want %d", n, len(waits))
	}
}
