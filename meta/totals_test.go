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
