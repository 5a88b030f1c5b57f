package oracle

import (
	"bytes"
	"context"
	"math/rand/v2"
	"strings"
	"testing"

	"sealfs"
	"sealfs/op"
)

const shards = 8

// env is a model with a root and short forms of requests.
type env struct {
	t    *testing.T
	fs   *FS
	root sealfs.Ino
}

func newEnv(t *testing.T) *env {
	e := &env{t: t, fs: New(shards)}
	e.root = e.do(0, op.Request{Type: op.MakeRoot, Volume: 1, Shard: 3, Mode: 0o755}).Attr.Ino
	return e
}

// do sends a request and expects code.
func (e *env) do(code sealfs.Code, req op.Request) op.Reply {
	e.t.Helper()
	if ino := max(req.Ino, req.Dir); req.Type != op.MakeRoot && ino != 0 {
		req.Shard = ino.Home(shards)
		if req.Dir != 0 {
			req.Shard = req.Dir.Home(shards)
		}
	}
	var rep op.Reply
	if err := e.fs.Do(context.Background(), &req, &rep); err != nil {
		e.t.Fatalf("%v: %v", req.Type, err)
	}
	if rep.Code != code {
		e.t.Fatalf("%v %q: %v, want %v", req.Type, req.Name, rep.Code, code)
	}
	return rep
}

func (e *env) mkdir(dir sealfs.Ino, name string, shard sealfs.Shard) sealfs.Ino {
	e.t.Helper()
	return e.do(0, op.Request{Type: op.Mkdir, Dir: dir, Name: name, Shard2: shard, Mode: 0o755}).Attr.Ino
}

func (e *env) create(dir sealfs.Ino, name string) sealfs.Ino {
	e.t.Helper()
	return e.do(0, op.Request{Type: op.Create, Dir: dir, Name: name, Mode: 0o644, Flags: op.Excl}).Attr.Ino
}

func (e *env) attr(ino sealfs.Ino) op.Attr {
	e.t.Helper()
	return e.do(0, op.Request{Type: op.Getattr, Ino: ino}).Attr
}

func TestNames(t *testing.T) {
	e := newEnv(t)
	a, b := e.mkdir(e.root, "a", 5), e.mkdir(e.root, "b", 6)
	if a.Home(shards) != 5 || e.attr(e.root).Nlink != 4 {
		t.Fatalf("directory %d in the wrong shard, or root has %d links", a, e.attr(e.root).Nlink)
	}
	f := e.create(a, "f")
	e.do(sealfs.ErrExist, op.Request{Type: op.Create, Dir: a, Name: "f", Flags: op.Excl})
	e.do(sealfs.ErrIsDir, op.Request{Type: op.Create, Dir: e.root, Name: "a"})
	e.do(sealfs.ErrNotDir, op.Request{Type: op.Lookup, Dir: f, Name: "x"})
	e.do(sealfs.ErrNameTooLong, op.Request{Type: op.Lookup, Dir: a, Name: strings.Repeat("x", 256)})
	e.do(sealfs.ErrInvalid, op.Request{Type: op.Lookup, Dir: a, Name: "x/y"})
	e.do(sealfs.ErrNotEmpty, op.Request{Type: op.Rmdir, Dir: e.root, Name: "a"})
	e.do(sealfs.ErrIsDir, op.Request{Type: op.Unlink, Dir: e.root, Name: "a"})
	e.do(sealfs.ErrNotDir, op.Request{Type: op.Rmdir, Dir: a, Name: "f"})
	e.do(sealfs.ErrPerm, op.Request{Type: op.Link, Dir: b, Name: "l", Ino: a})
	if n := e.do(0, op.Request{Type: op.Link, Dir: b, Name: "l", Ino: f}).Attr.Nlink; n != 2 {
		t.Fatalf("%d links", n)
	}
	// A file that has lost its last name does not get another one; a Tmpfile gets its first.
	for flags, want := range map[op.Flags]sealfs.Code{0: 0, op.Excl: sealfs.ErrNotExist} {
		tmp := e.do(0, op.Request{Type: op.Tmpfile, Dir: b, Flags: op.OpenIt | flags, Session: 3}).Attr.Ino
		e.do(want, op.Request{Type: op.Link, Dir: b, Name: "tmp", Ino: tmp})
		if want == 0 {
			e.do(0, op.Request{Type: op.Unlink, Dir: b, Name: "tmp"})
		}
		e.do(sealfs.ErrNotExist, op.Request{Type: op.Link, Dir: b, Name: "tmp", Ino: tmp})
		e.do(0, op.Request{Type: op.Release, Ino: tmp, Session: 3})
	}
	// Two names of one file: rename does nothing.
	e.do(0, op.Request{Type: op.Rename, Dir: a, Name: "f", Dir2: b, Name2: "l"})
	e.do(0, op.Request{Type: op.Lookup, Dir: a, Name: "f"})
	e.do(sealfs.ErrExist, op.Request{Type: op.Rename, Dir: a, Name: "f", Dir2: b, Name2: "l", Flags: op.NoReplace})
	e.do(sealfs.ErrInvalid, op.Request{Type: op.Rename, Dir: e.root, Name: "a", Dir2: a, Name2: "a"})
	e.do(sealfs.ErrNotDir, op.Request{Type: op.Rename, Dir: e.root, Name: "a", Dir2: b, Name2: "l"})
	e.do(sealfs.ErrIsDir, op.Request{Type: op.Rename, Dir: a, Name: "f", Dir2: e.root, Name2: "b"})
	e.do(sealfs.ErrNotEmpty, op.Request{Type: op.Rename, Dir: e.root, Name: "a", Dir2: e.root, Name2: "b"})
	e.do(0, op.Request{Type: op.Rename, Dir: e.root, Name: "a", Dir2: b, Name2: "l", Flags: op.Exchange})
	if e.attr(e.root).Nlink != 3 || e.attr(b).Nlink != 3 {
		t.Fatalf("links after exchange: root %d, b %d", e.attr(e.root).Nlink, e.attr(b).Nlink)
	}
	e.do(0, op.Request{Type: op.Unlink, Dir: e.root, Name: "a"})
	e.do(0, op.Request{Type: op.Unlink, Dir: a, Name: "f"})
	e.do(0, op.Request{Type: op.Rmdir, Dir: b, Name: "l"})
	e.do(0, op.Request{Type: op.Rmdir, Dir: e.root, Name: "b"})
	if n := e.fs.Inodes(); n != 1 {
		t.Fatalf("%d inodes are left", n)
	}
}

func TestHeldFilesLiveUntilTheLastRelease(t *testing.T) {
	e := newEnv(t)
	f := e.do(0, op.Request{Type: op.Create, Dir: e.root, Name: "f", Flags: op.OpenIt}).Attr.Ino
	e.do(0, op.Request{Type: op.Open, Ino: f, Session: 7})
	e.do(0, op.Request{Type: op.Open, Ino: f, Session: 7})
	e.do(0, op.Request{Type: op.Unlink, Dir: e.root, Name: "f"})
	e.do(0, op.Request{Type: op.Release, Ino: f})
	e.do(0, op.Request{Type: op.Release, Ino: f, Session: 7})
	e.do(0, op.Request{Type: op.Write, Ino: f, Data: []byte("x")})
	e.do(0, op.Request{Type: op.Release, Ino: f, Session: 7, Len: 1})
	e.do(sealfs.ErrNotExist, op.Request{Type: op.Getattr, Ino: f})
}

func TestSetgidIsHandedDown(t *testing.T) {
	e := newEnv(t)
	d := e.do(0, op.Request{Type: op.Mkdir, Dir: e.root, Name: "d", Mode: 0o2775, GID: 42}).Attr.Ino
	if a := e.attr(e.mkdir(d, "sub", 1)); a.GID != 42 || a.Mode != 0o42755 {
		t.Fatalf("directory: group %d, mode %o", a.GID, a.Mode)
	}
	if a := e.attr(e.create(d, "f")); a.GID != 42 || a.Mode != 0o100644 {
		t.Fatalf("file: group %d, mode %o", a.GID, a.Mode)
	}
}

// TestData compares random data operations with a plain byte slice.
func TestData(t *testing.T) {
	e := newEnv(t)
	f := e.create(e.root, "f")
	rng := rand.New(rand.NewPCG(1, 2))
	var want []byte
	grow := func(n int) {
		if n > len(want) {
			want = append(want, make([]byte, n-len(want))...)
		}
	}
	for range 3000 {
		off, n := rng.IntN(40000), 1+rng.IntN(9000)
		switch rng.IntN(6) {
		case 0, 1:
			data := bytes.Repeat([]byte{byte(1 + rng.IntN(255))}, n)
			req := op.Request{Type: op.Write, Ino: f, Off: uint64(off), Data: data}
			if rng.IntN(4) == 0 && len(want) < 40000 {
				req.Flags, off = op.Append, len(want)
			}
			if got := e.do(0, req).Off; got != uint64(off) {
				t.Fatalf("written at %d, want %d", got, off)
			}
			grow(off + n)
			copy(want[off:], data)
		case 2:
			e.do(0, op.Request{Type: op.Setattr, Ino: f, Valid: op.SetSize, Size: uint64(off)})
			grow(off)
			want = want[:off]
		case 3:
			e.do(0, op.Request{Type: op.Fallocate, Ino: f, Off: uint64(off), Len: uint64(n), Mode: punchHole | keepSize})
			if off < len(want) {
				clear(want[off:min(off+n, len(want))])
			}
		case 4:
			e.do(0, op.Request{Type: op.Fallocate, Ino: f, Off: uint64(off), Len: uint64(n), Mode: zeroRange})
			grow(off + n)
			clear(want[off : off+n])
		case 5:
			if off < len(want) {
				at := e.do(0, op.Request{Type: op.Seek, Ino: f, Off: uint64(off), Mode: 4}).Off
				end := min(at+block, uint64(len(want)))
				if at < uint64(len(want)) && len(bytes.Trim(want[at:end], "\x00")) > 0 && at%block == 0 {
					t.Fatalf("hole at %d has data", at)
				}
			}
		}
		if a := e.attr(f); a.Size != uint64(len(want)) || a.Blocks > uint64(len(want)+block-1)/block*8 {
			t.Fatalf("size %d, %d blocks, want %d bytes", a.Size, a.Blocks, len(want))
		}
		rep := e.do(0, op.Request{Type: op.Read, Ino: f, Len: sealfs.IOMax})
		if !bytes.Equal(rep.Data, want) || !rep.Eof {
			t.Fatal("contents differ")
		}
	}
}

func TestXattrs(t *testing.T) {
	e := newEnv(t)
	f := e.create(e.root, "f")
	set := func(code sealfs.Code, name, value string, flags op.Flags) {
		t.Helper()
		e.do(code, op.Request{Type: op.Setxattr, Ino: f, Name: name, Data: []byte(value), Flags: flags})
	}
	set(sealfs.ErrNoData, "user.a", "1", op.XReplace)
	set(0, "user.a", "one", op.XCreate)
	set(sealfs.ErrExist, "user.a", "2", op.XCreate)
	set(0, "user.b", "", 0)
	set(sealfs.ErrArgTooBig, "user.c", strings.Repeat("x", sealfs.XattrValueMax+1), 0)
	e.do(sealfs.ErrRange, op.Request{Type: op.Getxattr, Ino: f, Name: "user.a", Len: 2})
	if rep := e.do(0, op.Request{Type: op.Getxattr, Ino: f, Name: "user.a"}); rep.Off != 3 || len(rep.Data) != 0 {
		t.Fatalf("size %d, data %q", rep.Off, rep.Data)
	}
	if rep := e.do(0, op.Request{Type: op.Listxattr, Ino: f, Len: 100}); string(rep.Data) != "user.a\x00user.b\x00" {
		t.Fatalf("list %q", rep.Data)
	}
	e.do(0, op.Request{Type: op.Removexattr, Ino: f, Name: "user.a"})
	e.do(sealfs.ErrNoData, op.Request{Type: op.Getxattr, Ino: f, Name: "user.a", Len: 9})
}

// TestLocks compares random byte-range locks of three owners with a table of bytes.
func TestLocks(t *testing.T) {
	e := newEnv(t)
	f := e.create(e.root, "f")
	const size, owners = 24, 3
	var held [owners][size]op.LockType
	rng := rand.New(rand.NewPCG(3, 4))
	for range 5000 {
		who, a, b := rng.IntN(owners), rng.IntN(size), rng.IntN(size)
		l := op.Lock{Type: op.LockType(rng.IntN(3)), Start: uint64(min(a, b)), End: uint64(max(a, b)), Owner: uint64(who)}
		var want sealfs.Code
		for o := range owners {
			for i := l.Start; i <= l.End; i++ {
				if o != who && l.Type != op.Unlock && held[o][i] != op.Unlock && (l.Type == op.WriteLock || held[o][i] == op.WriteLock) {
					want = sealfs.ErrAgain
				}
			}
		}
		test := e.do(0, op.Request{Type: op.TestLock, Ino: f, Lock: l})
		if (test.Lock.Type == op.Unlock) != (want == 0) {
			t.Fatalf("test of %+v answers %+v", l, test.Lock)
		}
		e.do(want, op.Request{Type: op.SetLock, Ino: f, Lock: l})
		if want == 0 {
			for i := l.Start; i <= l.End; i++ {
				held[who][i] = l.Type
			}
		}
	}
}

func TestWaitLock(t *testing.T) {
	e := newEnv(t)
	f := e.create(e.root, "f")
	l := op.Lock{Type: op.WriteLock, End: lockEnd, Owner: 1}
	e.do(0, op.Request{Type: op.SetLock, Ino: f, Lock: l})
	l.Owner = 2
	req := op.Request{Type: op.WaitLock, Ino: f, Lock: l, Shard: f.Home(shards)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- e.fs.Do(ctx, &req, new(op.Reply)) }()
	cancel()
	if err := <-done; err != sealfs.ErrInterrupted {
		t.Fatalf("interrupted wait: %v", err)
	}
	var rep op.Reply
	go func() { done <- e.fs.Do(context.Background(), &req, &rep) }()
	e.do(0, op.Request{Type: op.DropOwner, Ino: f, Lock: op.Lock{Owner: 1}})
	if err := <-done; err != nil || rep.Code != 0 {
		t.Fatalf("wait: %v, %v", err, rep.Code)
	}
	e.do(sealfs.ErrAgain, op.Request{Type: op.SetLock, Ino: f, Lock: op.Lock{Type: op.ReadLock, Owner: 1}})
}

func TestReaddirContinuesAtCookies(t *testing.T) {
	e := newEnv(t)
	want := map[string]bool{}
	for _, n := range []string{"a", "b", "c", "d", "e"} {
		e.create(e.root, n)
		want[n] = true
	}
	var cookie uint64
	for eof := false; !eof; {
		rep := e.do(0, op.Request{Type: op.Readdir, Dir: e.root, Off: cookie, Len: 60, Flags: op.Plus})
		for _, d := range rep.Entries {
			if !want[d.Name] || d.Cookie <= max(cookie, 2) || d.Attr.Ino != d.Ino {
				t.Fatalf("entry %+v after cookie %d", d, cookie)
			}
			delete(want, d.Name)
			cookie = d.Cookie
		}
		eof = rep.Eof
		// What is replaced keeps its place, so it is not seen twice.
		e.create(e.root, "new")
		e.do(0, op.Request{Type: op.Rename, Dir: e.root, Name: "new", Dir2: e.root, Name2: "a"})
	}
	if len(want) != 0 {
		t.Fatalf("missing %v", want)
	}
}

// TestEveryTypeIsKnown makes sure that no request type of clients was forgotten.
func TestEveryTypeIsKnown(t *testing.T) {
	e := newEnv(t)
	f := e.create(e.root, "f")
	for _, typ := range op.Types() {
		switch typ {
		case op.WaitLock, op.DropVolume:
			continue // what waits, and what is about more than files
		case op.Prepare, op.Commit, op.Abort, op.Forget, op.Purge, op.Resolve, op.Ancestors, op.WaitFor, op.Waiting, op.Grant, op.Recall, op.Tally, op.Split, op.Partition:
			continue // servers among themselves: the model is one
		case op.Watch, op.Join:
			continue // it grants no leases, and splits no directories
		}
		ino, req := f, op.Request{Type: typ, Name: "n", Name2: "m", Data: op.AppendOpens(nil, op.Opens{Ino: f, Count: 1}), Dir: e.root, Dir2: e.root, Len: 1}
		switch typ {
		case op.Create, op.Mknod, op.Mkdir, op.Symlink, op.Tmpfile, op.Link, op.Unlink, op.Rmdir, op.Rename, op.Lookup, op.Readdir:
			ino = e.root
		}
		req.Ino, req.Shard = f, ino.Home(shards)
		var rep op.Reply
		if err := e.fs.Do(context.Background(), &req, &rep); err != nil || rep.Code == sealfs.ErrNoSys {
			t.Errorf("%v: %v, %v", typ, err, rep.Code)
		}
	}
}
