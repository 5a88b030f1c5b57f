package meta

import (
	"fmt"
	"testing"

	"sealfs"
	"sealfs/op"
)

// TestRetry sends every change twice: the second answer is the first, and
// nothing happens again.
func TestRetry(t *testing.T) {
	f := newFixture(t, 4)
	f.mkdir("d")
	seq := uint64(0)
	twice := func(req op.Request) op.Reply {
		t.Helper()
		seq++
		req.Session, req.Seq = 9, seq
		first := *f.ok(req)
		state := f.dump()
		second := *f.ok(req)
		if first.Attr.Nlink == 0 { // it may be gone
			first.Attr = op.Attr{Ino: first.Attr.Ino}
			second.Attr = op.Attr{Ino: second.Attr.Ino}
		}
		if first.Attr != second.Attr || first.Off != second.Off || first.Held != second.Held || first.Eof != second.Eof {
			t.Errorf("%v: first %+v, then %+v", req.Type, first, second)
		}
		if f.dump() != state {
			t.Errorf("%v happened twice", req.Type)
		}
		return first
	}
	ino := twice(f.named(op.Create, "a")).Attr.Ino
	twice(f.named(op.Mkdir, "e"))
	link := f.named(op.Link, "d/b")
	link.Ino = ino
	twice(link)
	twice(op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetSize, Size: 4096})
	twice(op.Request{Type: op.Fallocate, Ino: ino, Len: 5000})
	twice(op.Request{Type: op.Setxattr, Ino: ino, Name: "user.a", Data: []byte("v"), Flags: op.XCreate})
	twice(f.renaming("a", "c", 0))
	twice(f.named(op.Unlink, "c"))
	twice(f.named(op.Unlink, "d/b"))
	twice(f.named(op.Rmdir, "e"))
	twice(op.Request{Type: op.Tmpfile, Dir: f.root})
	f.check()
}

func TestSessionRows(t *testing.T) {
	f := newFixture(t, 1)
	req := func(seq, low uint64) op.Request {
		r := f.named(op.Create, fmt.Sprintf("%d-%d", seq, f.now))
		r.Session, r.Seq, r.Low = 5, seq, low
		return r
	}
	rows := func() (n int) {
		if err := walk(f.r, func(key *Key, _ *record) error {
			if key.Kind == KindSession && key.Session == 5 && key.Pos > 0 {
				n++
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return n
	}
	for seq := uint64(1); seq <= SessionRowsMax; seq++ {
		f.ok(req(seq, 0))
	}
	f.refused(sealfs.ErrBusy, req(SessionRowsMax+1, 0))
	f.ok(req(SessionRowsMax+1, 200))
	if n := rows(); n != SessionRowsMax+1-199 {
		t.Errorf("%d rows", n)
	}
	f.refused(sealfs.ErrStale, req(150, 0))
	f.refused(sealfs.ErrInvalid, req(500, 501))
	f.ok(req(500, 500))
	if n := rows(); n != 1 {
		t.Errorf("%d rows", n)
	}
	// Low may come late and out of order.
	f.ok(req(501, 3))
	f.check()
	// A refused change leaves no row: it is decided anew.
	bad := f.named(op.Unlink, "none")
	bad.Session, bad.Seq = 5, 502
	f.refused(sealfs.ErrNotExist, bad)
	f.create("none")
	f.ok(bad)
	f.ok(bad)
}

func TestDropVolume(t *testing.T) {
	f := newFixture(t, 2)
	other := f.ok(op.Request{Type: op.MakeRoot, Volume: 2, Mode: 0o755, Shard: 1}).Attr.Ino
	f.create("stays")
	var dirs []sealfs.Ino
	for i := range 3 {
		d := f.ok(op.Request{Type: op.Mkdir, Dir: other, Name: fmt.Sprint(i), Shard2: sealfs.Shard(i % 2)}).Attr.Ino
		dirs = append(dirs, d)
		for j := range 150 {
			ino := f.ok(op.Request{Type: op.Create, Dir: d, Name: fmt.Sprint(j)}).Attr.Ino
			f.write(ino, 0, []byte("data"))
			if j%20 == 0 {
				f.ok(op.Request{Type: op.Setxattr, Ino: ino, Name: "user.a", Data: pattern(2000, 1)})
				f.ok(setLock(ino, 1, 1, op.WriteLock, 0, 1))
			}
		}
	}
	f.ok(op.Request{Type: op.Tmpfile, Dir: dirs[0]})
	f.check()
	for s := range sealfs.Shard(2) {
		from, steps := sealfs.Ino(0), 0
		for {
			rep := f.ok(op.Request{Type: op.DropVolume, Shard: s, Volume: 2, Ino: from})
			if rep.Eof {
				break
			}
			from = sealfs.Ino(rep.Off)
			if steps++; steps > 20 {
				t.Fatal("does not end")
			}
		}
	}
	f.check()
	if len(f.sp.live) != 0 || f.sp.usage[2] != (Usage{}) {
		t.Errorf("%d blocks are live, usage %+v", len(f.sp.live), f.sp.usage[2])
	}
	f.attr("stays")
	f.refused(sealfs.ErrNotExist, op.Request{Type: op.Getattr, Ino: other})
}
