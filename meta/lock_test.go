package meta

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"sealfs"
	"sealfs/op"
)

func setLock(ino sealfs.Ino, session sealfs.Session, owner uint64, typ op.LockType, start, end uint64) op.Request {
	return op.Request{Type: op.SetLock, Ino: ino, Session: session, Lock: op.Lock{Type: typ, Start: start, End: end, Owner: owner, PID: uint32(owner)}}
}

// rows returns the locks of a class on ino.
func (f *fixture) rows(ino sealfs.Ino, class uint8) (all []LockRow) {
	f.Helper()
	if err := locks(f.r, f.c, ino, class, func(l *LockRow) bool { all = append(all, *l); return true }); err != nil {
		f.Fatal(err)
	}
	return all
}

func TestLock(t *testing.T) {
	f := newFixture(t, 2)
	ino := f.create("a")
	f.ok(setLock(ino, 1, 1, op.WriteLock, 10, 19))
	rep := f.refused(sealfs.ErrAgain, setLock(ino, 1, 2, op.ReadLock, 19, 30))
	if rep.Lock != (op.Lock{Type: op.WriteLock, Start: 10, End: 19, Owner: 1, PID: 1}) {
		t.Errorf("in the way: %+v", rep.Lock)
	}
	f.refused(sealfs.ErrAgain, setLock(ino, 2, 1, op.ReadLock, 0, lockEnd)) // the same owner of another session
	f.ok(setLock(ino, 1, 2, op.ReadLock, 20, lockEnd))
	test := setLock(ino, 1, 2, op.WriteLock, 0, 12)
	test.Type = op.TestLock
	if l := f.ok(test).Lock; l.Owner != 1 || l.Type != op.WriteLock {
		t.Errorf("test finds %+v", l)
	}
	test.Lock.End = 9
	if l := f.ok(test).Lock; l.Type != op.Unlock {
		t.Errorf("test of free bytes finds %+v", l)
	}
	// A downgrade in the middle splits, the upgrade joins again.
	f.ok(setLock(ino, 1, 1, op.ReadLock, 13, 15))
	if n := len(f.rows(ino, classPOSIX)); n != 4 {
		t.Errorf("%d locks after a split", n)
	}
	f.ok(setLock(ino, 1, 1, op.WriteLock, 12, 16))
	if n := len(f.rows(ino, classPOSIX)); n != 2 {
		t.Errorf("%d locks after joining", n)
	}
	f.refused(sealfs.ErrInvalid, setLock(ino, 1, 1, op.WriteLock, 2, 1))
	f.refused(sealfs.ErrInvalid, setLock(ino, 1, 1, op.WriteLock, 2, 1<<63))
	f.refused(sealfs.ErrInvalid, setLock(ino, 1, 1, 3, 2, 3))
	f.refused(sealfs.ErrNotExist, setLock(1<<40, 1, 1, op.WriteLock, 2, 3))
	// Locks do not show in the inode, and flocks not among POSIX locks.
	flock := setLock(ino, 1, 9, op.WriteLock, 5, 5)
	flock.Flags = op.Flock
	f.ok(flock)
	flock.Lock.Owner, flock.Lock.Type = 8, op.ReadLock
	f.refused(sealfs.ErrAgain, flock)
	flock.Lock.Owner = 9
	f.ok(flock) // conversion
	if l := f.rows(ino, classFlock); len(l) != 1 || l[0].Type != op.ReadLock || l[0].End != lockEnd {
		t.Errorf("flock: %+v", l)
	}
	f.ok(op.Request{Type: op.DropOwner, Ino: ino, Session: 1, Lock: op.Lock{Owner: 1}})
	if l := f.rows(ino, classPOSIX); len(l) != 1 || l[0].Owner != 2 {
		t.Errorf("after close: %+v", l)
	}
	f.ok(op.Request{Type: op.DropOwner, Ino: ino, Session: 1, Lock: op.Lock{Owner: 9}, Flags: op.Flock})
	if l := f.rows(ino, classFlock); len(l) != 0 {
		t.Errorf("after the flock's close: %+v", l)
	}
	f.ok(f.named(op.Unlink, "a")) // takes the last lock along
	f.check()
}

// TestLockModel compares locks with an array of bytes for each owner.
func TestLockModel(t *testing.T) {
	const owners, bytes, tail = 4, 40, 40 // index tail stands for everything beyond
	for seed := range uint64(4) {
		rng := rand.New(rand.NewPCG(seed, 2))
		f := newFixture(t, 1)
		ino := f.create("a")
		var held [owners][bytes + 1]op.LockType
		for step := range 3000 {
			o := rng.IntN(owners)
			typ := op.LockType(rng.IntN(3))
			a := rng.IntN(bytes)
			b := a + rng.IntN(bytes-a)
			end := uint64(b)
			if rng.IntN(6) == 0 {
				b, end = tail, lockEnd
			}
			blocked := false
			for other := range held {
				for i := a; i <= b && other != o && typ != op.Unlock; i++ {
					blocked = blocked || held[other][i] == op.WriteLock || held[other][i] == op.ReadLock && typ == op.WriteLock
				}
			}
			if rng.IntN(50) == 0 {
				f.ok(op.Request{Type: op.DropOwner, Ino: ino, Session: sealfs.Session(o), Lock: op.Lock{Owner: 7}})
				held[o] = [bytes + 1]op.LockType{}
			} else if req := setLock(ino, sealfs.Session(o), 7, typ, uint64(a), end); blocked {
				f.refused(sealfs.ErrAgain, req)
			} else {
				f.ok(req)
				for i := a; i <= b; i++ {
					held[o][i] = typ
				}
			}
			var got [owners][bytes + 1]op.LockType
			last := map[sealfs.Session]LockRow{}
			for _, l := range f.rows(ino, classPOSIX) {
				if p, ok := last[l.Session]; ok && (p.End >= l.Start || p.End+1 == l.Start && p.Type == l.Type) {
					t.Fatalf("step %d: locks %+v and %+v should be one", step, p, l)
				}
				last[l.Session] = l
				for i := l.Start; i <= min(l.End, tail); i++ {
					got[l.Session][i] = l.Type
				}
			}
			if got != held {
				t.Fatalf("seed %d step %d: %v, want %v", seed, step, got, held)
			}
		}
	}
}

func TestLockLimit(t *testing.T) {
	f := newFixture(t, 1)
	ino := f.create("a")
	tx := f.r.Begin()
	for i := range uint64(sealfs.LocksPerFile) {
		l := LockRow{classPOSIX, 1, op.Lock{Type: op.ReadLock, Start: 3 * i, End: 3*i + 1, Owner: i}}
		if err := f.changing(tx).putLock(ino, &l); err != nil {
			t.Fatal(err)
		}
	}
	tx.Commit()
	f.refused(sealfs.ErrNoLocks, setLock(ino, 1, 1<<40, op.ReadLock, 0, 0))
	f.refused(sealfs.ErrNoLocks, setLock(ino, 1, 5, op.WriteLock, 15, 15))
	f.ok(setLock(ino, 1, 5, op.Unlock, 15, 16))
	f.ok(setLock(ino, 1, 1<<40, op.ReadLock, 0, 0))
	steps := 0
	for !f.ok(op.Request{Type: op.DropSession, Lock: op.Lock{Owner: 1}}).Eof {
		steps++
	}
	if n := len(f.rows(ino, classPOSIX)); n != 0 || steps != sealfs.LocksPerFile/FreeMax {
		t.Errorf("%d locks are left after %d steps", n, steps)
	}
}

func TestDropSession(t *testing.T) {
	f := newFixture(t, 2)
	for i := range 5 {
		ino := f.create(fmt.Sprint(i))
		f.ok(setLock(ino, 3, 1, op.WriteLock, 0, 5))
		f.ok(setLock(ino, 4, 1, op.WriteLock, 6, 9))
	}
	req := f.named(op.Create, "x")
	req.Session, req.Seq = 3, 1
	f.ok(req)
	drop := op.Request{Type: op.DropSession, Shard: 1, Lock: op.Lock{Owner: 3}}
	holders := func() map[sealfs.Session]bool {
		m := map[sealfs.Session]bool{}
		if err := Sessions(f.r, 1, func(s sealfs.Session) { m[s] = true }); err != nil {
			t.Fatal(err)
		}
		return m
	}
	if m := holders(); !m[3] || !m[4] {
		t.Errorf("sessions that hold something: %v", m)
	}
	if !f.ok(drop).Eof {
		t.Error("dropping ten rows takes more than a step")
	}
	f.check()
	for i := range 5 {
		if l := f.rows(f.attr(fmt.Sprint(i)).Ino, classPOSIX); len(l) != 1 || l[0].Session != 4 {
			t.Errorf("left: %+v", l)
		}
	}
	if m := holders(); m[3] || !m[4] {
		t.Errorf("sessions that hold something: %v", m)
	}
	before := f.dump()
	if !f.ok(drop).Eof || f.dump() != before {
		t.Error("dropping a session twice does something")
	}
}
