package lease

import (
	"errors"
	"fmt"
	"testing"

	"sealfs"
	"sealfs/op"
)

// rig is a table with sessions that acknowledge when they are told to.
type rig struct {
	*testing.T
	*Table
}

func newRig(t *testing.T, max int, sessions ...sealfs.Session) rig {
	r := rig{t, New(5, max)}
	for _, s := range sessions {
		r.watch(s, 0)
	}
	return r
}

// watch returns what a session is told.
func (r rig) watch(s sealfs.Session, off uint64, drops ...sealfs.Ino) []op.Revoke {
	r.Helper()
	w, err := r.Watch(s, 0, off, drops, func() {})
	if err != nil {
		r.Fatal(err)
	}
	revs, _, _, err := r.Poll(w, nil)
	if err != nil {
		r.Fatal(err)
	}
	return revs
}

// wants asks, and compares what is granted.
func (r rig) wants(a Ask, want op.Lease) {
	r.Helper()
	if !r.Ask(&a) {
		r.Fatalf("%+v must wait", a)
	}
	if a.Lease != want {
		r.Fatalf("%+v is granted %v, want %v", a, a.Lease, want)
	}
}

// blocked asks, and must wait.
func (r rig) blocked(a *Ask) {
	r.Helper()
	if r.Ask(a) || r.Notify(a.Ticket, func() {}) {
		r.Fatalf("%+v need not wait", *a)
	}
}

// told compares revocations but for their numbers, and returns the last number.
func (r rig) told(revs []op.Revoke, want ...op.Revoke) uint64 {
	r.Helper()
	if len(revs) != len(want) {
		r.Fatalf("revocations %v, want %v", revs, want)
	}
	for i := range revs {
		if w := want[i]; revs[i].Kind != w.Kind || revs[i].Ino != w.Ino || revs[i].Name != w.Name || i > 0 && revs[i].Num != revs[i-1].Num+1 {
			r.Fatalf("revocations %v, want %v", revs, want)
		}
	}
	return revs[len(revs)-1].Num
}

const all = op.LeaseIno | op.LeaseWrite

// TestChange: a change waits until the other holder has acknowledged, and nobody gets
// anything meanwhile.
func TestChange(t *testing.T) {
	r := newRig(t, 0, 1, 2)
	r.wants(Ask{Session: 1, Tells: 9, Ino: 9}, op.LeaseIno)
	r.wants(Ask{Session: 1, Changes: []Change{{Ino: 9}}, Ino: 9}, op.LeaseIno) // its own
	a := Ask{Session: 2, Changes: []Change{{Ino: 9}}, Ino: 9, Write: true}
	r.blocked(&a)
	r.wants(Ask{Session: 1, Tells: 9, Ino: 9}, 0)
	r.wants(Ask{Session: 2, Tells: 9, Ino: 9}, 0)
	r.blocked(&a) // the same revocation
	num := r.told(r.watch(1, 0), op.Revoke{Kind: op.RevokeInode, Ino: 9})
	r.told(r.watch(1, 0), op.Revoke{Kind: op.RevokeInode, Ino: 9}) // the answer was lost
	if a.Ticket.ready() {
		t.Error("ready before the acknowledgement")
	}
	r.watch(1, num)
	if !a.Ticket.ready() {
		t.Error("not ready after the acknowledgement")
	}
	r.wants(a, all)
	r.Done(a.Ticket)
	if st := r.Stats(); st.Held != 1 || st.Waiting != 0 || st.Revoked != 1 || st.Sessions != 2 {
		t.Errorf("%+v", st)
	}
}

// TestNames: a name is taken without the rest of its directory, the directory as a
// whole after many names in a row.
func TestNames(t *testing.T) {
	r := newRig(t, 0, 1, 2)
	var off uint64
	last := op.RevokeName
	for i := range 2 * takenMax {
		if i == 0 || last == op.RevokeInode {
			r.wants(Ask{Session: 1, Dir: 9}, op.LeaseDir)
		}
		a := Ask{Session: 2, Changes: []Change{{Ino: 9, Name: fmt.Sprint(i)}}, Dir: 9}
		r.blocked(&a)
		revs := r.watch(1, off)
		off, last = revs[0].Num, revs[0].Kind
		r.watch(1, off)
		r.wants(a, op.LeaseDir)
		r.Done(a.Ticket)
		if want := op.RevokeName; i != takenMax && last != want || i == takenMax && last != op.RevokeInode {
			t.Fatalf("name %d: %v", i, revs)
		}
	}
}

// TestRecall: a question waits for the holder of Write, which keeps Read; before it is
// taken wholly it may send what is delayed.
func TestRecall(t *testing.T) {
	r := newRig(t, 0, 1, 2)
	r.wants(Ask{Session: 1, Ino: 9, Write: true}, all)
	r.wants(Ask{Session: 1, Changes: []Change{{Ino: 9}}, Ino: 9}, op.LeaseIno)
	a := Ask{Session: 2, Tells: 9, Ino: 9, Write: true}
	r.blocked(&a)
	num := r.told(r.watch(1, 0), op.Revoke{Kind: op.RecallWrite, Ino: 9})
	r.wants(Ask{Session: 1, Changes: []Change{{Ino: 9}}}, 0) // what was delayed
	r.watch(1, num)
	r.wants(a, op.LeaseIno)
	r.Done(a.Ticket)
	r.wants(Ask{Session: 1, Ino: 9, Write: true}, op.LeaseIno) // not alone any more

	r.wants(Ask{Session: 1, Ino: 8, Write: true}, all)
	b := Ask{Changes: []Change{{Ino: 8}}} // without a session
	r.blocked(&b)
	num = r.told(r.watch(1, num), op.Revoke{Kind: op.RecallWrite, Ino: 8}, op.Revoke{Kind: op.RevokeInode, Ino: 8})
	r.watch(1, num-1)
	r.blocked(&b)
	r.watch(1, num)
	r.wants(b, 0)
	r.Done(b.Ticket)

	r.wants(Ask{Session: 1, Ino: 7, Write: true}, all)
	r.Lower(1, 7)
	r.wants(Ask{Session: 2, Tells: 7, Ino: 7}, op.LeaseIno)
}

// TestEnd: who waits for a session that ends goes on, and the session never comes back.
func TestEnd(t *testing.T) {
	r := newRig(t, 0, 1, 2)
	for ino := range sealfs.Ino(3 * sweepStep) {
		r.wants(Ask{Session: 1, Ino: ino + 1, Write: true}, all)
	}
	a := Ask{Session: 2, Changes: []Change{{Ino: 9}}}
	r.blocked(&a)
	w, err := r.Watch(1, 0, 0, nil, func() {})
	if err != nil {
		t.Fatal(err)
	}
	woken := false
	r.Notify(a.Ticket, func() { woken = true })
	r.End(func(s sealfs.Session) bool { return s == 1 })
	if !woken {
		t.Error("nobody was told")
	}
	r.wants(a, 0)
	r.Done(a.Ticket)
	if st := r.Stats(); st.Held != 0 || st.Sessions != 1 || len(r.inodes) != 0 {
		t.Errorf("%+v, %d inodes", st, len(r.inodes))
	}
	if _, _, _, err := r.Poll(w, nil); !errors.Is(err, sealfs.ErrSession) {
		t.Error(err)
	}
	if _, err := r.Watch(1, 0, 0, nil, func() {}); !errors.Is(err, sealfs.ErrSession) {
		t.Error(err)
	}
	r.wants(Ask{Session: 1, Ino: 9}, 0)
}

// TestWatch: a newer Watch ends an older one; numbers of other incarnations are
// refused, and a Watch that others have overtaken does nothing.
func TestWatch(t *testing.T) {
	r := newRig(t, 0, 1, 2)
	woken := 0
	w, err := r.Watch(1, 1, 0, nil, func() { woken++ })
	if err != nil {
		t.Fatal(err)
	}
	if _, stamp, wait, _ := r.Poll(w, nil); !wait || stamp != 5<<32 {
		t.Errorf("waits %v, stamp %#x", wait, stamp)
	}
	newer, err := r.Watch(1, 2, 0, nil, func() {})
	if err != nil || woken == 0 {
		t.Fatal(err, woken)
	}
	if revs, _, wait, _ := r.Poll(w, nil); wait || len(revs) != 0 {
		t.Error("the older one is not ended")
	}
	if _, _, wait, _ := r.Poll(newer, nil); !wait {
		t.Error("the newer one is answered")
	}
	r.wants(Ask{Session: 1, Ino: 9}, op.LeaseIno)
	late, err := r.Watch(1, 1, 0, []sealfs.Ino{9}, func() {})
	if err != nil || r.Stats().Held != 1 {
		t.Error("a late Watch was heard", err)
	}
	if _, _, wait, _ := r.Poll(late, nil); wait {
		t.Error("a late Watch waits")
	}
	if r.watch(1, 0, 9); r.Stats().Held != 0 {
		t.Error("the lease was not dropped")
	}
	for _, off := range []uint64{1, 4<<32 + 7, 5<<32 + 1, 6 << 32} {
		if _, err := r.Watch(1, 0, off, nil, func() {}); !errors.Is(err, sealfs.ErrInvalid) {
			t.Errorf("acknowledges %#x: %v", off, err)
		}
		if _, err := r.Watch(3, 0, off, nil, func() {}); !errors.Is(err, sealfs.ErrInvalid) {
			t.Errorf("a new session acknowledges %#x: %v", off, err)
		}
	}
}

// TestBounds: there are no more leases than the table may hold, and no more
// revocations in an answer than fit.
func TestBounds(t *testing.T) {
	r := newRig(t, 1000, 1, 2)
	var entries []op.Dirent
	for ino := sealfs.Ino(1); ino <= 1001; ino++ {
		want := op.LeaseIno
		if ino > 1000 {
			want = 0
		}
		r.wants(Ask{Session: 1, Ino: ino}, want)
		entries = append(entries, op.Dirent{Attr: op.Attr{Ino: ino}})
	}
	if l := r.List(&Ask{Session: 1}, entries); l != 0 || entries[1000].Attr.Ino != 1001 {
		t.Errorf("a listing is granted %v though the table is full", l)
	}
	var tickets []*Ticket
	for ino := sealfs.Ino(1); ino <= 1000; ino++ {
		a := Ask{Session: 2, Changes: []Change{{Ino: ino}}}
		r.blocked(&a)
		tickets = append(tickets, a.Ticket)
	}
	var off uint64
	n := 0
	for revs := r.watch(1, 0); len(revs) > 0; revs = r.watch(1, off) {
		if len(revs) > op.RevokesMax {
			t.Fatalf("%d revocations", len(revs))
		}
		off = revs[len(revs)-1].Num
		n += len(revs)
	}
	if n != 1000 {
		t.Errorf("%d revocations", n)
	}
	for _, k := range tickets {
		if !k.ready() {
			t.Fatal("not all are ready")
		}
		r.Done(k)
	}
	if st := r.Stats(); st.Held != 0 || len(r.inodes) != 0 {
		t.Errorf("%+v", st)
	}
}

// TestList: a listing waits for nobody; it leaves out what it cannot tell.
func TestList(t *testing.T) {
	r := newRig(t, 0, 1, 2, 3)
	list := func(s sealfs.Session) (op.Lease, string) {
		entries := []op.Dirent{{Attr: op.Attr{Ino: 7}}, {Attr: op.Attr{Ino: 8}}, {Attr: op.Attr{Ino: 9}}, {}}
		l := r.List(&Ask{Session: s}, entries)
		text := ""
		for _, e := range entries {
			text += fmt.Sprint(e.Attr.Ino, " ")
		}
		return l, text
	}
	r.wants(Ask{Session: 1, Ino: 8, Write: true}, all)
	if l, text := list(2); l != op.LeaseIno || text != "7 0 9 0 " {
		t.Errorf("%v, %s", l, text)
	}
	if l, text := list(0); l != 0 || text != "7 0 9 0 " {
		t.Errorf("without a session: %v, %s", l, text)
	}
	a := Ask{Session: 1, Changes: []Change{{Ino: 9}}}
	r.blocked(&a)
	if l, text := list(2); l != op.LeaseIno || text != "7 0 0 0 " {
		t.Errorf("while a change waits: %v, %s", l, text)
	}
	r.Done(a.Ticket)
}

// TestKeep: what a request keeps nobody is granted, but itself.
func TestKeep(t *testing.T) {
	r := newRig(t, 0)
	a := Ask{Session: 1, Changes: []Change{{Ino: 9}}, Keep: true}
	if !r.Ask(&a) || a.Ticket == nil {
		t.Fatal("nothing is kept")
	}
	r.watch(1, 0) // they come later
	r.watch(2, 0)
	r.wants(Ask{Session: 2, Tells: 9, Ino: 9}, 0)
	a.Ino, a.Write = 9, true
	r.wants(a, all)
	r.Done(a.Ticket)
	r.Forget(9)
	r.wants(Ask{Session: 2, Tells: 9, Ino: 9}, op.LeaseIno)
}

// BenchmarkAlone: what leases cost a mount that is alone.
func BenchmarkAlone(b *testing.B) {
	setup := func(b *testing.B) *Table {
		t := New(1, 0)
		if _, err := t.Watch(1, 0, 0, nil, func() {}); err != nil {
			b.Fatal(err)
		}
		for ino := range sealfs.Ino(100_000) {
			t.Ask(&Ask{Session: 1, Ino: ino + 1})
		}
		b.ReportAllocs()
		return t
	}
	b.Run("getattr", func(b *testing.B) {
		t := setup(b)
		n := sealfs.Ino(0)
		for b.Loop() {
			n = n%100_000 + 1
			if a := (Ask{Session: 1, Tells: n, Ino: n}); !t.Ask(&a) || a.Lease == 0 {
				b.Fatal("not granted")
			}
		}
	})
	b.Run("create", func(b *testing.B) {
		t := setup(b)
		var changes [1]Change
		n := sealfs.Ino(0)
		for b.Loop() {
			n++
			changes[0] = Change{Ino: 1, Name: "name"}
			a := Ask{Session: 1, Changes: changes[:], Ino: n + 100_000, Write: true, Dir: 1}
			if !t.Ask(&a) || a.Lease == 0 {
				b.Fatal("not granted")
			}
			if n > 50_000 {
				t.Forget(n + 50_000) // as many as are made are removed
			}
		}
	})
	b.Run("nobody watches", func(b *testing.B) {
		t := New(1, 0)
		for b.Loop() {
			if a := (Ask{Session: 1, Tells: 1, Ino: 1}); !t.Ask(&a) {
				b.Fatal("must wait")
			}
		}
	})
}

// TestRestore: who registers with delayed writes gets Write back, before it watches; nobody is told
// of the inode before it has sent them. It gets nothing where others hold something.
func TestRestore(t *testing.T) {
	r := newRig(t, 0, 2)
	r.Restore(1, 7)
	a := Ask{Session: 2, Tells: 7, Ino: 7}
	r.blocked(&a)
	off := r.told(r.watch(1, 0), op.Revoke{Kind: op.RecallWrite, Ino: 7})
	r.watch(1, off)
	if !r.Ask(&a) || a.Lease != op.LeaseIno {
		t.Errorf("after that it is granted %v", a.Lease)
	}
	r.Done(a.Ticket)
	r.Restore(1, 7) // it holds Read by now, and so does the other one
	r.Restore(3, 7) // it comes too late
	r.wants(Ask{Session: 2, Tells: 7}, 0)
	r.End(func(s sealfs.Session) bool { return s == 3 })
	r.Restore(3, 8)
	r.wants(Ask{Session: 2, Changes: []Change{{Ino: 8}}, Ino: 8, Write: true}, all)
}

// TestSilentFlood: a session that takes leases and never answers costs a bounded amount of memory, however
// much others change; what it does not hold is granted to others.
func TestSilentFlood(t *testing.T) {
	const inodes = 100
	r := newRig(t, 2*inodes, 1, 2)
	for ino := sealfs.Ino(1); ino <= inodes; ino++ {
		r.wants(Ask{Session: 1, Ino: ino}, op.LeaseIno)
	}
	for n := range 50 * inodes {
		dir := sealfs.Ino(1 + n%inodes)
		a := Ask{Session: 2, Changes: []Change{{Ino: dir, Name: fmt.Sprint("n", n)}}}
		r.blocked(&a)
		r.Done(a.Ticket) // its sender gives up
	}
	s := r.sessions[1]
	if n, most := len(s.queue), inodes*(takenMax+1); n > most || len(s.pending) != n || len(s.tickets) != 0 {
		t.Errorf("%d revocations wait, %d at most should; %d and %d are remembered", n, most, len(s.pending), len(s.tickets))
	}
	r.wants(Ask{Session: 2, Ino: inodes + 1, Write: true}, all)
	if st := r.Stats(); st.Waiting != 0 || st.Held != inodes+1 {
		t.Errorf("%+v", st)
	}
	r.End(func(s sealfs.Session) bool { return s == 1 })
	if st := r.Stats(); st.Held != 1 || len(r.inodes) != 1 {
		t.Errorf("after its end: %+v", st)
	}
}
