package txn_test

import (
	"errors"
	"slices"
	"testing"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/txn"
)

func closed(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}

func TestCalls(t *testing.T) {
	var c txn.Calls
	enter := func(seq, low uint64, wantFirst bool, want error) *txn.Call {
		t.Helper()
		call, first, err := c.Enter(7, seq, low)
		if first != wantFirst || err != want {
			t.Fatalf("request %d: first %v, %v; want %v, %v", seq, first, err, wantFirst, want)
		}
		return call
	}
	first := enter(1, 1, true, nil)
	second := enter(1, 1, false, nil)
	if closed(second.Done) {
		t.Error("the second request does not wait")
	}
	c.Leave(7, 1, first, 0)
	if !closed(second.Done) || second.Code != 0 {
		t.Errorf("the second request is answered %v, still waits: %v", second.Code, !closed(second.Done))
	}
	again := enter(1, 1, true, nil) // it was done: the row says so
	c.Leave(7, 1, again, 0)

	c.Leave(7, 2, enter(2, 2, true, nil), sealfs.ErrExist)
	if late := enter(2, 2, false, nil); late.Code != sealfs.ErrExist || !closed(late.Done) {
		t.Errorf("what was refused is answered %v", late.Code)
	}
	third := enter(3, 3, true, nil)
	enter(2, 2, false, sealfs.ErrStale)
	c.Leave(7, 3, third, sealfs.ErrExist)
	enter(3, 3, false, nil)

	sixth := enter(6, 6, true, nil)
	waits := enter(6, 6, false, nil)
	c.End(func(at sealfs.Session) bool { return at == 7 })
	if !closed(waits.Done) {
		t.Error("who waits for a session that has ended waits on")
	}
	next := enter(6, 1, true, nil) // whoever has the number now
	c.Leave(7, 6, sixth, sealfs.ErrExist)
	if closed(next.Done) {
		t.Error("the end of a request ends another one")
	}
}

func TestDecision(t *testing.T) {
	tx := op.Tx{Age: 5, Nonce: 6}
	d := txn.Decide(1, tx, 9, []sealfs.Shard{2, 3, 2})
	check := func(open, lazy []sealfs.Shard, done bool) {
		t.Helper()
		if !slices.Equal(d.Open(), open) || !slices.Equal(d.Lazy(), lazy) || d.Done() != done {
			t.Fatalf("open %v, lazy %v, done %v; want %v, %v, %v", d.Open(), d.Lazy(), d.Done(), open, lazy, done)
		}
	}
	check([]sealfs.Shard{2, 3}, nil, false)
	d.Synced(2, 1) // it has not committed
	check([]sealfs.Shard{2, 3}, nil, false)
	d.Committed(2, 1)
	d.Committed(9, 1) // no party
	check([]sealfs.Shard{3}, []sealfs.Shard{2}, false)
	d.Synced(2, 2) // another life: it may have lost the commit
	check([]sealfs.Shard{2, 3}, nil, false)
	d.Committed(2, 2)
	d.Committed(3, 8)
	d.Synced(2, 2)
	check(nil, []sealfs.Shard{3}, false)
	d.Synced(2, 3) // what is durable stays so
	d.Committed(2, 3)
	d.Synced(3, 8)
	check(nil, nil, true)
}

func TestCoordinator(t *testing.T) {
	tx := op.Tx{Age: 1, Nonce: 2}
	begin := func() *txn.Coordinator {
		return txn.Begin(tx, 4, []op.Request{{Part: op.PartDrop, Shard: 5, Ino: 21}, {Part: op.PartName, Shard: 6, Dir: 22, Name: "a"}, {Part: op.PartVolume, Shard: 6, Ino: 6}})
	}
	if c := txn.Begin(tx, 4, nil); c.State() != txn.Ready {
		t.Errorf("without parties: %v", c.State())
	}
	c := begin()
	c.Voted(0, 0, op.Attr{Ino: 21})
	c.Voted(0, sealfs.ErrStale, op.Attr{}) // too late
	c.Decided()                            // too early
	c.Voted(1, 0, op.Attr{Ino: 22})
	if c.State() != txn.Preparing {
		t.Fatalf("with a vote to come: %v", c.State())
	}
	c.Voted(2, 0, op.Attr{Ino: 6})
	if c.State() != txn.Ready || c.Votes()[1].Ino != 22 {
		t.Fatalf("with all votes: %v, %v", c.State(), c.Votes())
	}
	c.Decided()
	c.Abort(sealfs.ErrStale) // too late
	c.Acknowledged(6)
	if c.State() != txn.Committing || !slices.Equal(c.Open(), []sealfs.Shard{5}) {
		t.Errorf("state %v, open %v", c.State(), c.Open())
	}
	c.Acknowledged(5)
	if c.State() != txn.Done {
		t.Errorf("at the end: %v", c.State())
	}
	for i, want := range []sealfs.Code{sealfs.ErrStale, sealfs.ErrNotExist} {
		// What a name stood for is gone: that is the plan's fault. That a
		// directory is gone is the request's.
		c := begin()
		c.Voted(i, sealfs.ErrNotExist, op.Attr{})
		if c.State() != txn.Aborted || c.Code() != want || !slices.Equal(c.Open(), []sealfs.Shard{5, 6}) {
			t.Errorf("part %d refused: state %v, code %v, open %v", i, c.State(), c.Code(), c.Open())
		}
	}
}

func TestLocks(t *testing.T) {
	var l txn.Locks
	old, young := op.Tx{Age: 1, Nonce: 9}, op.Tx{Age: 2, Nonce: 1}
	parts := []*op.Request{
		{Tx: young, Shard: 1, Part: op.PartName, Dir: 9, Name: "a"},
		{Tx: old, Shard: 1, Part: op.PartName, Dir: 9, Name: "b"},
		{Tx: young, Shard: 2, Part: op.PartNew, Ino: 10},
		{Tx: young, Shard: 2, Part: op.PartDrop, Ino: 18},
		{Tx: old, Shard: 3, Part: op.PartVolume, Ino: 3},
	}
	if err := l.Guard(op.Tx{}, meta.Touch{Kind: meta.TouchName, Ino: 9, Name: "a"}); err != nil || !l.Empty() {
		t.Fatalf("locks of nobody: %v", err)
	}
	for _, p := range parts {
		if !l.Add(p) {
			t.Fatalf("part %d was there", p.Part)
		}
	}
	if again := *parts[0]; l.Add(&again) || l.Len() != 2 {
		t.Errorf("a part that came twice was added; %d transactions", l.Len())
	}
	for _, c := range []struct {
		by    op.Tx
		touch meta.Touch
		want  op.Tx // who is in the way
	}{
		{op.Tx{}, meta.Touch{Kind: meta.TouchName, Ino: 9, Name: "a"}, young},
		{young, meta.Touch{Kind: meta.TouchName, Ino: 9, Name: "a"}, op.Tx{}},
		{young, meta.Touch{Kind: meta.TouchName, Ino: 9, Name: "b"}, old},
		{op.Tx{}, meta.Touch{Kind: meta.TouchName, Ino: 9, Name: "c"}, op.Tx{}},
		{op.Tx{}, meta.Touch{Kind: meta.TouchEmpty, Ino: 9}, old},
		{old, meta.Touch{Kind: meta.TouchEmpty, Ino: 9}, young},
		{op.Tx{}, meta.Touch{Kind: meta.TouchEmpty, Ino: 10}, op.Tx{}},
		{op.Tx{}, meta.Touch{Kind: meta.TouchExists, Ino: 10}, young},
		{op.Tx{}, meta.Touch{Kind: meta.TouchExists, Ino: 18}, op.Tx{}},
		{op.Tx{}, meta.Touch{Kind: meta.TouchLinks, Ino: 18}, young},
		{op.Tx{}, meta.Touch{Kind: meta.TouchName, Ino: 18, Name: "new"}, young},
		{op.Tx{}, meta.Touch{Kind: meta.TouchVolume, Ino: 3}, old},
		{op.Tx{}, meta.Touch{Kind: meta.TouchLinks, Ino: 3}, op.Tx{}},
	} {
		err := l.Guard(c.by, c.touch)
		var blocked *txn.Blocked
		if errors.As(err, &blocked); (err != nil) != !c.want.IsZero() || blocked != nil && blocked.By != c.want {
			t.Errorf("%+v by %v: %v, want %v", c.touch, c.by, err, c.want)
		}
	}
	if b := (&txn.Blocked{By: old}); !b.Dies(young) || b.Dies(op.Tx{}) || (&txn.Blocked{By: young}).Dies(old) {
		t.Error("the wrong one dies")
	}
	var blocked *txn.Blocked
	errors.As(l.Guard(op.Tx{}, meta.Touch{Kind: meta.TouchLinks, Ino: 18}), &blocked)
	if d := l.Drop(young, 2); len(d.Parts()) != 2 {
		t.Errorf("%d parts dropped", len(d.Parts()))
	} else if d.Tell(); closed(blocked.Done) {
		t.Error("who waits is told of a half")
	}
	if d := l.Drop(young, 1); len(d.Parts()) != 1 || closed(blocked.Done) {
		t.Errorf("%d parts dropped", len(d.Parts()))
	} else if d.Tell(); !closed(blocked.Done) {
		t.Error("who waits is not told")
	}
	l.Remove(parts[1])
	l.Remove(parts[4])
	if !l.Empty() {
		t.Errorf("%d transactions are left", l.Len())
	}
}

// TestUndoneDrop: who was asked to wait for a transaction waits until it is over,
// also if that had to be begun twice.
func TestUndoneDrop(t *testing.T) {
	var l txn.Locks
	tx := op.Tx{Age: 1, Nonce: 1}
	parts := []*op.Request{{Tx: tx, Shard: 1, Part: op.PartName, Dir: 9, Name: "a"}, {Tx: tx, Shard: 2, Part: op.PartLink, Ino: 18}}
	for _, p := range parts {
		l.Add(p)
	}
	links := meta.Touch{Kind: meta.TouchLinks, Ino: 18}
	guard := l.Now()
	blocked := guard(op.Tx{}, links).(*txn.Blocked)
	first := l.Drop(tx, 1)
	last := l.Drop(tx, 2)
	if guard(op.Tx{}, links) != nil || !l.Empty() {
		t.Fatal("what was dropped is held")
	}
	l.Undo(last)
	if guard(op.Tx{}, links) == nil {
		t.Error("a question goes ahead of a transaction that was there before it")
	}
	l.Undo(first)
	if l.Len() != 1 || closed(blocked.Done) || guard(op.Tx{}, meta.Touch{Kind: meta.TouchName, Ino: 9, Name: "a"}) == nil {
		t.Error("what was taken back is not held as before")
	}
	first, last = l.Drop(tx, 1), l.Drop(tx, 2)
	first.Tell()
	last.Tell()
	if !closed(blocked.Done) || !l.Empty() {
		t.Error("who waits is not told in the end")
	}
	l.Undo(l.Drop(tx, 1)) // nothing
	if !l.Empty() {
		t.Error("nothing is held")
	}
}
