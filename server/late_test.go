package server

import (
	"testing"
	"time"

	"sealfs"
	"sealfs/op"
)

// lateWorld is two servers on which no party asks for the fate of a transaction by
// itself: what a Commit that was lost leaves behind stays until somebody else asks.
type lateWorld struct {
	*world
	far sealfs.Ino // a directory of the server that does not hold the root
}

func newLateWorld(t *testing.T) *lateWorld {
	w := &lateWorld{world: newWorld(t, 1, 1, 1)}
	w.pace.doubt, w.pace.attributes = time.Hour, time.Minute
	w.kill(0)
	w.kill(1)
	home := w.root.Home(testShards)
	w.far = w.must(op.Request{Type: op.Mkdir, Dir: w.root, Name: "far", Mode: 0o755, Shard2: home ^ 1}).Ino
	w.settle()
	return w
}

// commits matches what tells far's server that something is committed.
func (w *lateWorld) commits(req *op.Request) bool {
	return req.Type == op.Commit && req.Shard%2 == w.far.Home(testShards)%2
}

// must does req on the server of its directory or inode.
func (w *lateWorld) must(req op.Request) op.Attr {
	w.t.Helper()
	return w.reply(req).Attr
}

func (w *lateWorld) reply(req op.Request) *op.Reply {
	w.t.Helper()
	address(&req)
	rep, err := w.ask(req)
	if err != nil || rep.Code != 0 {
		w.t.Fatalf("%v: %v, %v", req.Type, err, rep.Code)
	}
	return rep
}

// moveDirectory makes a directory and moves it to far. The move is answered,
// and far's server has not heard that it is committed. It returns when it happened.
func (w *lateWorld) moveDirectory(name string) (at int64) {
	w.t.Helper()
	w.must(op.Request{Type: op.Mkdir, Dir: w.root, Name: name, Mode: 0o755, Shard2: w.root.Home(testShards)})
	w.silence(w.commits)
	w.must(op.Request{Type: op.Rename, Dir: w.root, Name: name, Dir2: w.far, Name2: name})
	return w.must(op.Request{Type: op.Getattr, Ino: w.root}).Mtime
}

// TestLostCommit: who has the answer to an operation sees its outcome everywhere,
// also where its Commit was lost, as long as its coordinator can be asked.
func TestLostCommit(t *testing.T) {
	w := newLateWorld(t)
	began := time.Now()
	at := w.moveDirectory("a")
	if a := w.must(op.Request{Type: op.Getattr, Ino: w.far}); a.Nlink != 3 || a.Size != 1 || a.Mtime != at {
		t.Errorf("a directory that got a subdirectory: %+v", a)
	}
	w.moveDirectory("b")
	if rep := w.reply(op.Request{Type: op.Readdir, Dir: w.far, Len: 1 << 20}); len(rep.Entries) != 2 {
		t.Errorf("entries %v", rep.Entries)
	}
	// A time that is set afterwards stays.
	w.moveDirectory("c")
	if a := w.must(op.Request{Type: op.Setattr, Ino: w.far, Valid: op.SetMtime, Mtime: 5}); a.Nlink != 5 || a.Mtime != 5 {
		t.Errorf("answer to Setattr: %+v", a)
	}
	w.silence(nil)
	w.settle()
	if a := w.must(op.Request{Type: op.Getattr, Ino: w.far}); a.Mtime != 5 {
		t.Errorf("the time that was set last is %d afterwards", a.Mtime)
	}
	if took := time.Since(began); took > w.pace.attributes/2 {
		t.Errorf("nobody asked for %v", took)
	}
}

// TestLateCommit: while a party has not heard of a Commit, what others are told
// besides does not show the attributes that the transaction has in hand, and what they do
// meanwhile keeps the time at which it has happened.
func TestLateCommit(t *testing.T) {
	w := newLateWorld(t)
	file := w.must(op.Request{Type: op.Create, Dir: w.far, Name: "file", Mode: 0o644}).Ino
	w.silence(w.commits)
	w.must(op.Request{Type: op.Link, Dir: w.root, Name: "link", Ino: file})
	plus := func() op.Attr {
		t.Helper()
		for _, e := range w.reply(op.Request{Type: op.Readdir, Dir: w.far, Len: 1 << 20, Flags: op.Plus}).Entries {
			if e.Name == "file" {
				return e.Attr
			}
		}
		t.Fatal("no such entry")
		return op.Attr{}
	}
	if a := plus(); a.Ino != 0 {
		t.Errorf("Readdir tells attributes that a transaction has in hand: %+v", a)
	}
	w.moveDirectory("d")
	if rep := w.reply(op.Request{Type: op.Create, Dir: w.far, Name: "new", Mode: 0o644}); rep.Dir.Ino != 0 {
		t.Errorf("Create tells attributes of a directory that a transaction has in hand: %+v", rep.Dir)
	}
	made := w.must(op.Request{Type: op.Lookup, Dir: w.far, Name: "new"}).Ctime
	w.silence(nil)
	w.settle()
	if a := w.must(op.Request{Type: op.Getattr, Ino: w.far}); a.Mtime != made || a.Ctime != made {
		t.Errorf("the directory's last change was at %d: %+v", made, a)
	}
	if a := plus(); a.Nlink != 2 {
		t.Errorf("Readdir tells %+v", a)
	}
	if rep := w.reply(op.Request{Type: op.Unlink, Dir: w.far, Name: "new"}); rep.Dir.Nlink != 3 {
		t.Errorf("Unlink tells of its directory %+v", rep.Dir)
	}

	// What changes something else than entries is no change of entries.
	at := w.moveDirectory("e")
	w.must(op.Request{Type: op.Setxattr, Ino: w.far, Name: "user.a", Data: []byte("b")})
	w.silence(nil)
	w.settle()
	if a := w.must(op.Request{Type: op.Getattr, Ino: w.far}); a.Mtime != at || a.Ctime <= at {
		t.Errorf("entries changed last at %d: %+v", at, a)
	}
}
