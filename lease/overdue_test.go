package lease

import (
	"slices"
	"testing"

	"sealfs"
)

// TestOverdue checks who is taken for late, and who for silent.
func TestOverdue(t *testing.T) {
	a, b := New(1, 0), New(1, 0)
	tables := []*Table{a, b}
	watch := func(tab *Table, sess sealfs.Session, off uint64) {
		t.Helper()
		if _, err := tab.Watch(sess, 0, off, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	const looks = 3
	var o Overdue
	want := func(when string, late, silent []sealfs.Session) {
		t.Helper()
		l, s := o.Look(tables, looks)
		slices.Sort(l)
		if !slices.Equal(l, late) || !slices.Equal(s, silent) {
			t.Fatalf("%s: late %v, silent %v; want %v, %v", when, l, s, late, silent)
		}
	}
	for _, sess := range []sealfs.Session{1, 2} {
		watch(a, sess, 0)
		watch(b, sess, 0)
		if !a.Ask(&Ask{Session: sess, Ino: 10}) || !a.Ask(&Ask{Session: sess, Ino: 11}) {
			t.Fatal("not granted")
		}
	}
	for range 2 * looks {
		want("nobody was asked for anything", nil, nil)
	}
	// Both are asked for the first inode. Session 2 answers, but goes on being asked.
	ask := Ask{Changes: []Change{{Ino: 10}}}
	if a.Ask(&ask) {
		t.Fatal("a leased inode was changed")
	}
	defer a.Done(ask.Ticket)
	want("just asked", nil, nil)
	want("once more", nil, nil)
	watch(a, 2, a.base+1)
	ask2 := Ask{Changes: []Change{{Ino: 11}}}
	a.Ask(&ask2)
	defer a.Done(ask2.Ticket)
	want("the second one has acknowledged", nil, nil)
	want("the first one has not", []sealfs.Session{1}, []sealfs.Session{1})
	watch(b, 1, 0)
	want("it lives, but does not acknowledge", []sealfs.Session{1}, nil)
	want("both are late", []sealfs.Session{1, 2}, []sealfs.Session{2})
	a.End(func(s sealfs.Session) bool { return s == 2 })
	b.End(func(s sealfs.Session) bool { return s == 2 })
	want("the second one was ended", []sealfs.Session{1}, nil)
	want("the first one is silent", []sealfs.Session{1}, []sealfs.Session{1})
	watch(a, 1, a.base+2)
	want("it is back", nil, nil)
	if len(o.of) != 1 {
		t.Errorf("%d sessions are remembered", len(o.of))
	}
}
