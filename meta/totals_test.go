package meta

import (
	"fmt"
	"strconv"
	"testing"

	"sealfs"
	"sealfs/op"
)

// queue gathers what Config.Queued tells.
type queue struct {
	line []sealfs.Ino
	in   map[sealfs.Ino]bool
}

func (q *queue) add(_ sealfs.Shard, ino sealfs.Ino, _ bool) {
	if q.in == nil {
		q.in = map[sealfs.Ino]bool{}
	}
	if !q.in[ino] {
		q.in[ino] = true
		q.line = append(q.line, ino)
	}
}

// tally passes on what one inode has to tell.
func (q *queue) tally(f *fixture) {
	f.Helper()
	ino := q.line[0]
	q.line = q.line[1:]
	delete(q.in, ino)
	req := op.Request{Type: op.Tally, Mode: op.TallyTell, Ino: ino}
	for {
		rep := f.ok(req)
		if rep.Eof {
			return
		}
		req.Dir, req.Gen = sealfs.Ino(rep.Off), rep.Attr.Version
	}
}

// totals returns what the attributes of a directory say.
func (f *fixture) totals(dir sealfs.Ino) (t Totals) {
	f.Helper()
	for name, to := range map[string]*int64{op.AttrBytes: &t.Bytes, op.AttrFiles: &t.Files, op.AttrDirs: &t.Dirs} {
		rep := f.ok(op.Request{Type: op.Getxattr, Ino: dir, Name: name, Len: 20})
		v, err := strconv.ParseUint(string(rep.Data), 10, 64)
		if err != nil || rep.Off != uint64(len(rep.Data)) {
			f.Fatal(string(rep.Data), rep.Off, err)
		}
		*to = int64(v)
	}
	return t
}

// walk adds up what is below a directory, and compares the totals of each.
func (f *fixture) walk(dir sealfs.Ino) (t Totals) {
	f.Helper()
	rep := f.ok(op.Request{Type: op.Readdir, Dir: dir, Len: 1 << 30})
	for _, e := range append([]op.Dirent(nil), rep.Entries...) {
		a := f.ok(op.Request{Type: op.Getattr, Ino: e.Ino}).Attr
		t.Add(nameTotals(a.Mode), 1)
		switch a.Mode & typeMask {
		case typeDir:
			t.Add(f.walk(e.Ino), 1)
		default:
			t.Bytes += int64(a.Size)
		}
	}
	if got := f.totals(dir); got != t {
		f.Fatalf("directory %d has the totals %d, a walk finds %d", dir, got, t)
	}
	return t
}

// TestTotals: in any history, and whenever totals are passed on, they are those of a walk
// once nothing is queued. That they are right at any moment, with what is queued, Check says.
func TestTotals(t *testing.T) {
	for shards := uint32(1); shards <= 64; shards *= 4 {
		var q queue
		m := newModel(t, Config{Shards: shards, Queued: q.add}, uint64(shards))
		most := Totals{}
		for step := range 4000 {
			m.step(10)
			if m.rng.IntN(8) == 0 && len(q.line) > 0 {
				q.tally(m.fixture)
			}
			if step%200 != 199 {
				continue
			}
			if step%400 == 399 {
				m.check()
			}
			for len(q.line) > 0 {
				q.tally(m.fixture)
			}
			if err := Queued(m.r, shards, func(s sealfs.Shard, ino sealfs.Ino, _ bool) { t.Errorf("inode %d of shard %d is still queued", ino, s) }); err != nil {
				t.Fatal(err)
			}
			if sum := m.walk(m.root); sum.Bytes > most.Bytes {
				most = sum
			}
		}
		if most.Bytes < 1<<14 || most.Files < 10 || most.Dirs < 5 {
			t.Errorf("the largest tree of %d shards had %d", shards, most)
		}
	}
}

// TestTotalsManyLinks: a file with names in more directories than one step tells.
func TestTotalsManyLinks(t *testing.T) {
	var q queue
	f := newFixtureOf(t, Config{Shards: 4, Queued: q.add}, newSpace(64, 1<<20), 64<<20)
	ino := f.ok(f.named(op.Create, "file")).Attr.Ino
	dirs := []sealfs.Ino{}
	for i := range 2*placesSeen + 5 {
		req := f.named(op.Mkdir, fmt.Sprint("dir", i))
		req.Shard2 = sealfs.Shard(i % 4)
		dir := f.ok(req).Attr.Ino
		dirs = append(dirs, dir)
		f.ok(op.Request{Type: op.Link, Dir: dir, Name: "name", Ino: ino})
	}
	for _, size := range []uint64{1000, 70} {
		f.ok(op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetSize, Size: size})
		// Half-way it changes again.
		f.ok(op.Request{Type: op.Tally, Mode: op.TallyTell, Ino: ino})
		f.ok(op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetSize, Size: size + 1})
		for len(q.line) > 0 {
			q.tally(f)
		}
		if got, n := f.totals(f.root), int64(len(dirs)); got != (Totals{(n + 1) * int64(size+1), n + 1, n}) {
			t.Errorf("totals %d of %d links to %d bytes", got, n+1, size+1)
		}
	}
}

// TestTotalsAttributes: they can only be read, of directories, and are not listed.
func TestTotalsAttributes(t *testing.T) {
	f := newFixture(t, 4)
	file := f.ok(f.named(op.Create, "file")).Attr.Ino
	for _, name := range []string{op.AttrBytes, op.AttrTotals + "x"} {
		f.refused(sealfs.ErrNotSupported, op.Request{Type: op.Setxattr, Ino: f.root, Name: name, Data: []byte("1")})
		f.refused(sealfs.ErrNoData, op.Request{Type: op.Removexattr, Ino: f.root, Name: name})
	}
	f.refused(sealfs.ErrNoData, op.Request{Type: op.Getxattr, Ino: file, Name: op.AttrBytes, Len: 20})
	f.refused(sealfs.ErrNoData, op.Request{Type: op.Getxattr, Ino: f.root, Name: op.AttrTotals + "x", Len: 20})
	if rep := f.ok(op.Request{Type: op.Getxattr, Ino: f.root, Name: op.AttrFiles}); rep.Off != 1 || len(rep.Data) != 0 {
		t.Errorf("the length of the number 1 is %d", rep.Off)
	}
	if rep := f.ok(op.Request{Type: op.Listxattr, Ino: f.root, Len: 1000}); len(rep.Data) != 0 {
		t.Errorf("listed are %q", rep.Data)
	}
}

// TestTotalsOldVolume: a volume that was made before there were totals has none, and
// nothing of it is ever written.
func TestTotalsOldVolume(t *testing.T) {
	m := newModel(t, Config{Shards: 4, Queued: func(_ sealfs.Shard, ino sealfs.Ino, _ bool) { t.Errorf("inode %d is queued", ino) }}, 11)
	tx := m.r.Begin()
	var root Inode
	if err := GetInode(m.r, m.c, m.root, &root); err != nil {
		t.Fatal(err)
	}
	root.Counted = false
	k := InodeKey(m.c.Shards, m.root)
	if err := tx.Set(k[:], root.Append(nil)); err != nil {
		t.Fatal(err)
	}
	tx.Commit()
	for range 3000 {
		m.step(10)
	}
	m.check()
	inodes := 0
	err := walk(m.r, func(k *Key, v *record) error {
		switch k.Kind {
		case KindInode:
			if inodes++; v.inode.Counted || v.inode.Flags&(flagQueued|flagSpread) != 0 || !v.inode.isDir() && v.inode.Parent != 0 {
				t.Errorf("inode %d takes part in totals", k.Ino)
			}
		case KindQueued, KindPlace, KindOutbox, KindInbox:
			t.Errorf("row of kind %#x", k.Kind)
		}
		return nil
	})
	if err != nil || inodes < 10 {
		t.Errorf("%d inodes, %v", inodes, err)
	}
	m.refused(sealfs.ErrNoData, op.Request{Type: op.Getxattr, Ino: m.root, Name: op.AttrBytes, Len: 20})
}

// TestLetters brings letters to a directory as a bad network does: none is lost, none counts twice.
func TestLetters(t *testing.T) {
	f := newFixture(t, 4)
	take := func(number uint64, shard sealfs.Shard, bytes int64) {
		t.Helper()
		d := Totals{Bytes: bytes}
		f.ok(op.Request{Type: op.Tally, Mode: op.TallyTake, Ino: f.root, Shard2: shard, Gen: number, Data: d.Append(nil)})
	}
	want := func(bytes int64) {
		t.Helper()
		if got := f.totals(f.root); got.Bytes != bytes {
			t.Errorf("%d bytes, want %d", got.Bytes, bytes)
		}
	}
	take(5, 2, 100)
	take(5, 2, 100)
	take(4, 2, 1000)
	want(100)
	take(4, 3, 10)
	take(9, 2, -50)
	take(9, 2, -50)
	take(5, 2, 100)
	want(60)
	f.refused(sealfs.ErrInvalid, op.Request{Type: op.Tally, Mode: op.TallyTake, Ino: f.root, Gen: 1, Data: []byte{1}})
	f.refused(sealfs.ErrInvalid, op.Request{Type: op.Tally, Mode: 77, Ino: f.root})
	take(10, 2, -50)
	take(5, 3, -10) // so that Check finds what there is
	want(0)
	gone := f.ok(f.named(op.Mkdir, "gone")).Attr.Ino
	f.ok(f.named(op.Rmdir, "gone"))
	f.ok(op.Request{Type: op.Tally, Mode: op.TallyTake, Ino: gone, Gen: 1, Data: (&Totals{Bytes: 1}).Append(nil)})

	// A sender: what a letter holds does not change any more, and what is new waits.
	ch := func(bytes int64) {
		t.Helper()
		tx := f.r.Begin()
		c := change{tx: tx, sp: f.sp, c: f.c, req: &op.Request{Shard: 1}}
		if err := c.post(1000, Totals{Bytes: bytes}); err != nil {
			t.Fatal(err)
		}
		tx.Commit()
	}
	step := func(mode uint32, number uint64, eof bool) Outbox {
		t.Helper()
		if rep := f.ok(op.Request{Type: op.Tally, Mode: mode, Ino: 1000, Shard: 1, Gen: number}); rep.Eof != eof {
			t.Errorf("step %d answers %v", mode, rep.Eof)
		}
		o, err := GetOutbox(f.r, 1, 1000)
		if err != nil && err != sealfs.ErrNotExist {
			t.Fatal(err)
		}
		return o
	}
	step(op.TallySend, 0, true)
	ch(7)
	first := step(op.TallySend, 0, false)
	ch(3)
	if again := step(op.TallySend, 0, false); again.Number != first.Number || again.Letter.Bytes != 7 || again.Waiting.Bytes != 3 {
		t.Errorf("a letter has become %+v", again)
	}
	step(op.TallySent, first.Number+1, true)
	step(op.TallySent, first.Number, false)
	second := step(op.TallySend, 0, false)
	if second.Number <= first.Number || second.Letter.Bytes != 3 {
		t.Errorf("the second letter is %+v after %d", second, first.Number)
	}
	if o := step(op.TallySent, second.Number, true); o != (Outbox{}) {
		t.Errorf("left is %+v", o)
	}
}
