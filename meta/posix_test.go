package meta

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"sealfs"
	"sealfs/op"
)

func TestSipHash(t *testing.T) {
	// Vectors of the authors: key 00 01 … 0f, message 00 01 … of the index's length.
	want := map[int]uint64{0: 0x726fdb47dd0e0e31, 1: 0x74f839c593dc67fd, 7: 0xab0200f58b01d137, 8: 0x93f5f5799a932462, 15: 0xa129ca6149be45e5}
	msg := "\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f"
	for n, w := range want {
		if got := op.SipHash(0x0706050403020100, 0x0f0e0d0c0b0a0908, msg[:n]); got != w {
			t.Errorf("siphash of %d bytes = %#x, want %#x", n, got, w)
		}
	}
}

func TestNames(t *testing.T) {
	f := newFixture(t, 4)
	long := strings.Repeat("n", sealfs.NameMax)
	for _, c := range []struct {
		name string
		code sealfs.Code
	}{
		{"", sealfs.ErrInvalid}, {".", sealfs.ErrInvalid}, {"..", sealfs.ErrInvalid}, {"a/b", sealfs.ErrInvalid}, {"a\x00b", sealfs.ErrInvalid},
		{long + "n", sealfs.ErrNameTooLong}, {long, 0}, {"...", 0}, {"\xff\xfe", 0}, {" ", 0}, {"\n", 0},
	} {
		req := op.Request{Type: op.Create, Dir: f.root, Name: c.name}
		if rep := f.do(req); rep.Code != c.code {
			t.Errorf("create %q: %v, want %v", c.name, rep.Code, c.code)
		}
		if c.code == 0 {
			f.ok(op.Request{Type: op.Lookup, Dir: f.root, Name: c.name})
		} else {
			f.refused(c.code, op.Request{Type: op.Lookup, Dir: f.root, Name: c.name})
			f.refused(c.code, op.Request{Type: op.Rename, Dir: f.root, Name: " ", Dir2: f.root, Name2: c.name})
		}
	}
}

func TestCreate(t *testing.T) {
	f := newFixture(t, 4)
	before := f.ok(op.Request{Type: op.Getattr, Ino: f.root}).Attr
	req := f.named(op.Create, "a")
	req.Mode = 0o4755 | typeDir // only the permission bits count
	a := f.ok(req).Attr
	if a.Mode != typeFile|0o4755 || a.Nlink != 1 || a.UID != 7 || a.GID != 8 || a.Version != 1 || a.Btime != f.now || a.Mtime != f.now {
		t.Errorf("new file: %+v", a)
	}
	if a.Ino.Home(4) != f.root.Home(4) || a.Ino < 4*sealfs.InoCounterMin {
		t.Errorf("inode number %d", a.Ino)
	}
	root := f.ok(op.Request{Type: op.Getattr, Ino: f.root}).Attr
	if root.Mtime != f.now || root.Ctime != f.now || root.Atime != before.Atime || root.Version != before.Version+1 || root.Nlink != 2 {
		t.Errorf("parent after create: %+v", root)
	}
	if again := f.ok(f.named(op.Create, "a")).Attr; again != a {
		t.Errorf("create finds %+v, want %+v", again, a)
	}
	req.Flags = op.Excl
	f.refused(sealfs.ErrExist, req)
	f.mkdir("d")
	f.refused(sealfs.ErrIsDir, f.named(op.Create, "d"))
	f.refused(sealfs.ErrExist, f.named(op.Mkdir, "d"))
	f.refused(sealfs.ErrExist, f.named(op.Mknod, "a"))
	link := f.named(op.Symlink, "s")
	link.Data = []byte("a")
	f.ok(link)
	f.refused(sealfs.ErrExist, link)
	f.refused(sealfs.ErrExist, f.named(op.Create, "s"))
	f.refused(sealfs.ErrNotDir, op.Request{Type: op.Create, Dir: a.Ino, Name: "x"})
	f.refused(sealfs.ErrNotExist, op.Request{Type: op.Create, Dir: 1, Name: "x", Shard: 1})
	f.refused(sealfs.ErrNotExist, op.Request{Type: op.Lookup, Dir: f.root, Name: "none"})
	// A request must be addressed to the object's home.
	f.refused(sealfs.ErrInvalid, op.Request{Type: op.Create, Dir: f.root, Name: "x", Shard: f.root.Home(4) ^ 2})
	f.refused(sealfs.ErrInvalid, op.Request{Type: op.Create, Dir: f.root, Name: "x", Shard: 4})
	f.refused(sealfs.ErrNoSys, op.Request{Type: op.Statfs})
}

func TestMknod(t *testing.T) {
	f := newFixture(t, 1)
	for _, c := range []struct {
		mode, want, rdev uint32
		code             sealfs.Code
	}{
		{0o600, typeFile | 0o600, 0, 0}, {typeFile | 0o600, typeFile | 0o600, 0, 0}, {typeFifo | 0o600, typeFifo | 0o600, 0, 0},
		{typeSocket, typeSocket, 0, 0}, {typeChar | 0o666, typeChar | 0o666, 0x103, 0}, {typeBlock, typeBlock, 0x103, 0},
		{typeDir, 0, 0, sealfs.ErrInvalid}, {typeLink, 0, 0, sealfs.ErrInvalid},
	} {
		req := op.Request{Type: op.Mknod, Dir: f.root, Name: fmt.Sprintf("%o", c.mode), Mode: c.mode, Rdev: 0x103}
		rep := f.do(req)
		if rep.Code != c.code || rep.Attr.Mode != c.want || rep.Attr.Rdev != c.rdev {
			t.Errorf("mknod %o: %v %o %#x", c.mode, rep.Code, rep.Attr.Mode, rep.Attr.Rdev)
		}
	}
	f.refused(sealfs.ErrInvalid, op.Request{Type: op.Write, Ino: f.attr("10600").Ino, Data: []byte("x"), Size: 1})
}

func TestMkdir(t *testing.T) {
	f := newFixture(t, 8)
	d := f.named(op.Mkdir, "d")
	d.Mode, d.Shard2 = 0o2775, 5
	a := f.ok(d).Attr
	if a.Ino.Home(8) != 5 || a.Nlink != 2 || a.Mode != typeDir|0o2775 {
		t.Errorf("new directory: %+v", a)
	}
	if n := f.ok(op.Request{Type: op.Getattr, Ino: f.root}).Attr.Nlink; n != 3 {
		t.Errorf("parent has %d links", n)
	}
	// The setgid bit hands down the group, and to directories itself.
	sub := f.ok(op.Request{Type: op.Mkdir, Dir: a.Ino, Name: "sub", Mode: 0o755, UID: 1, GID: 2, Shard2: 3}).Attr
	if sub.GID != 8 || sub.Mode != typeDir|0o2755 || sub.UID != 1 {
		t.Errorf("directory below setgid: %+v", sub)
	}
	file := f.ok(op.Request{Type: op.Create, Dir: a.Ino, Name: "file", Mode: 0o644, GID: 2}).Attr
	if file.GID != 8 || file.Mode != typeFile|0o644 {
		t.Errorf("file below setgid: %+v", file)
	}
	d.Name, d.Shard2 = "e", 8
	f.refused(sealfs.ErrInvalid, d)
	if st, err := ShardInfo(f.r, 5); err != nil || st.Counter != sealfs.InoCounterMin+2 || st.Seq != 2 {
		t.Errorf("shard 5: %+v, %v", st, err)
	}
	if st, err := ShardInfo(f.r, 3); err != nil || st.Counter != sealfs.InoCounterMin+1 || st.Seq != 0 {
		t.Errorf("shard 3, which no request was addressed to: %+v, %v", st, err)
	}
	if st, err := ShardInfo(f.r, 1); err != nil || st.Time == 0 || st.Seq != 2 {
		t.Errorf("shard 1: %+v, %v", st, err)
	}
	// Time never goes back.
	st, _ := ShardInfo(f.r, 1)
	f.ok(op.Request{Type: op.Create, Dir: f.root, Name: "old", Time: 5})
	if after, _ := ShardInfo(f.r, 1); after.Time != st.Time || after.Seq != st.Seq+1 {
		t.Errorf("shard 1 after a change from the past: %+v", after)
	}
}

func TestSymlink(t *testing.T) {
	f := newFixture(t, 2)
	for _, n := range []int{1, inlineTarget, inlineTarget + 1, symlinkPart, symlinkPart + 1, sealfs.SymlinkMax} {
		req := f.named(op.Symlink, fmt.Sprint(n))
		req.Data = bytes.Repeat([]byte("t"), n)
		a := f.ok(req).Attr
		if a.Mode != typeLink|0o777 || a.Size != uint64(n) {
			t.Errorf("symlink: %+v", a)
		}
		if got := f.ok(op.Request{Type: op.Readlink, Ino: a.Ino}).Data; !bytes.Equal(got, req.Data) {
			t.Errorf("target of %d bytes reads as %q", n, got)
		}
	}
	for target, code := range map[string]sealfs.Code{
		"": sealfs.ErrInvalid, strings.Repeat("t", sealfs.SymlinkMax+1): sealfs.ErrNameTooLong, "a\x00b": sealfs.ErrInvalid,
	} {
		req := f.named(op.Symlink, "bad")
		req.Data = []byte(target)
		f.refused(code, req)
	}
	f.refused(sealfs.ErrInvalid, op.Request{Type: op.Readlink, Ino: f.root})
	f.check()
	for _, n := range []int{1, inlineTarget + 1, sealfs.SymlinkMax} {
		f.ok(f.named(op.Unlink, fmt.Sprint(n)))
	}
}

func TestLink(t *testing.T) {
	f := newFixture(t, 4)
	a := f.create("a")
	d := f.mkdir("d")
	link := f.named(op.Link, "d/b")
	link.Ino = a
	got := f.ok(link).Attr
	if got.Ino != a || got.Nlink != 2 || got.Ctime != f.now || got.Mtime == f.now {
		t.Errorf("linked: %+v", got)
	}
	f.refused(sealfs.ErrExist, link)
	link.Name, link.Ino = "c", d
	f.refused(sealfs.ErrPerm, link)
	link.Ino = 1 << 20
	f.refused(sealfs.ErrNotExist, link)
	other := f.ok(op.Request{Type: op.MakeRoot, Volume: 2, Mode: 0o755}).Attr.Ino
	f.refused(sealfs.ErrCrossDevice, op.Request{Type: op.Link, Dir: other, Name: "x", Ino: a})
	f.refused(sealfs.ErrCrossDevice, op.Request{Type: op.Rename, Dir: f.root, Name: "a", Dir2: other, Name2: "x"})
	// Unlinking one name keeps the other.
	rep := f.ok(f.named(op.Unlink, "a"))
	if rep.Held != 0 || rep.Attr.Nlink != 1 {
		t.Errorf("unlink of one of two names: %+v", rep)
	}
	f.refused(sealfs.ErrNotExist, f.named(op.Unlink, "a"))
	f.refused(sealfs.ErrIsDir, f.named(op.Unlink, "d"))
	rep = f.ok(f.named(op.Unlink, "d/b"))
	if rep.Held != a || !rep.Eof || rep.Attr.Nlink != 0 {
		t.Errorf("unlink of the last name: %+v", rep)
	}
	f.refused(sealfs.ErrNotExist, op.Request{Type: op.Getattr, Ino: a})
}

func TestTmpfile(t *testing.T) {
	f := newFixture(t, 4)
	rep := f.ok(op.Request{Type: op.Tmpfile, Dir: f.root, Mode: 0o600})
	ino := rep.Attr.Ino
	if rep.Held != ino || rep.Attr.Nlink != 0 {
		t.Errorf("tmpfile: %+v", rep)
	}
	f.write(ino, 0, []byte("content"))
	f.check()
	if n := f.ok(op.Request{Type: op.Link, Dir: f.root, Name: "named", Ino: ino}).Attr.Nlink; n != 1 {
		t.Errorf("linked tmpfile has %d links", n)
	}
	f.check()
	// Once named it is a file like others: without a name it cannot come back.
	req := f.named(op.Unlink, "named")
	req.Flags = op.Held
	f.ok(req)
	f.refused(sealfs.ErrNotExist, op.Request{Type: op.Link, Dir: f.root, Name: "again", Ino: ino})
	excl := f.ok(op.Request{Type: op.Tmpfile, Dir: f.root, Flags: op.Excl}).Attr.Ino
	f.refused(sealfs.ErrNotExist, op.Request{Type: op.Link, Dir: f.root, Name: "excl", Ino: excl})
	var orphans []sealfs.Ino
	if err := Orphans(f.r, func(ino sealfs.Ino) bool { orphans = append(orphans, ino); return true }); err != nil || len(orphans) != 2 {
		t.Fatalf("orphans %v, %v", orphans, err)
	}
	for _, o := range orphans {
		if !f.ok(op.Request{Type: op.Reclaim, Ino: o}).Eof {
			t.Errorf("orphan %d is not freed in one step", o)
		}
		f.refused(sealfs.ErrNotExist, op.Request{Type: op.Reclaim, Ino: o})
	}
	if len(f.sp.live) != 0 {
		t.Errorf("%d blocks are live", len(f.sp.live))
	}
}

func TestRmdir(t *testing.T) {
	f := newFixture(t, 4)
	f.mkdir("d")
	f.create("d/a")
	f.refused(sealfs.ErrNotEmpty, f.named(op.Rmdir, "d"))
	f.refused(sealfs.ErrNotDir, f.named(op.Rmdir, "d/a"))
	f.refused(sealfs.ErrNotExist, f.named(op.Rmdir, "e"))
	f.ok(f.named(op.Unlink, "d/a"))
	req := f.named(op.Rmdir, "d")
	req.Flags = op.Held
	rep := f.ok(req)
	d := rep.Held
	if d == 0 || rep.Eof || rep.Attr.Nlink != 0 {
		t.Fatalf("rmdir of a held directory: %+v", rep)
	}
	if n := f.ok(op.Request{Type: op.Getattr, Ino: f.root}).Attr.Nlink; n != 2 {
		t.Errorf("parent has %d links", n)
	}
	// It still is there for who holds it, but nothing can be made in it.
	if rep := f.ok(op.Request{Type: op.Readdir, Dir: d, Len: 1000}); !rep.Eof || len(rep.Entries) != 0 {
		t.Errorf("entries of a removed directory: %+v", rep.Entries)
	}
	for _, typ := range []op.Type{op.Create, op.Mkdir, op.Mknod, op.Tmpfile} {
		f.refused(sealfs.ErrNotExist, op.Request{Type: typ, Dir: d, Name: "x"})
	}
	f.check()
	f.ok(op.Request{Type: op.Reclaim, Ino: d})
	f.refused(sealfs.ErrNotExist, op.Request{Type: op.Getattr, Ino: d})
}

// TestRenameRules checks every outcome of a rename over what may stand at its two ends.
func TestRenameRules(t *testing.T) {
	for _, c := range []struct {
		from, to string
		flags    op.Flags
		code     sealfs.Code
	}{
		{"file", "new", 0, 0}, {"file", "dir/new", 0, 0}, {"dir", "new", 0, 0}, {"dir", "full/new", 0, 0},
		{"file", "file2", 0, 0}, {"file", "full/file", 0, 0}, {"file", "dir", 0, sealfs.ErrIsDir}, {"file", "full", 0, sealfs.ErrIsDir},
		{"dir", "file", 0, sealfs.ErrNotDir}, {"dir", "empty", 0, 0}, {"full", "empty", 0, 0}, {"dir", "full", 0, sealfs.ErrNotEmpty},
		{"full/sub", "dir", 0, 0}, {"full/sub", "full", 0, sealfs.ErrNotEmpty}, {"full/file", "full", 0, sealfs.ErrIsDir},
		{"full", "full/x", 0, sealfs.ErrInvalid}, {"full", "full/sub/x", 0, sealfs.ErrInvalid}, {"full", "full/sub", 0, sealfs.ErrInvalid},
		{"none", "new", 0, sealfs.ErrNotExist}, {"none", "file", 0, sealfs.ErrNotExist},
		{"file", "file", 0, 0}, {"file", "hard", 0, 0}, {"dir", "dir", 0, 0},
		{"file", "new", op.NoReplace, 0}, {"file", "file2", op.NoReplace, sealfs.ErrExist}, {"dir", "empty", op.NoReplace, sealfs.ErrExist},
		{"file", "hard", op.NoReplace, sealfs.ErrExist}, {"file", "file2", op.NoReplace | op.Exchange, sealfs.ErrInvalid},
		{"file", "new", op.Exchange, sealfs.ErrNotExist}, {"file", "file2", op.Exchange, 0}, {"file", "full", op.Exchange, 0},
		{"file", "full/sub", op.Exchange, 0}, {"full/sub", "file", op.Exchange, 0}, {"dir", "full/sub", op.Exchange, 0},
		{"full", "full/sub", op.Exchange, sealfs.ErrInvalid}, {"full/sub", "full", op.Exchange, sealfs.ErrInvalid},
		{"full/file", "full", op.Exchange, sealfs.ErrInvalid}, {"file", "hard", op.Exchange, 0},
	} {
		t.Run(fmt.Sprintf("%s to %s %b", c.from, c.to, c.flags), func(t *testing.T) {
			f := newFixture(t, 4)
			for _, d := range []string{"dir", "empty", "full", "full/sub"} {
				f.mkdir(d)
			}
			for _, name := range []string{"file", "file2", "full/file"} {
				f.create(name)
			}
			link := f.named(op.Link, "hard")
			link.Ino = f.attr("file").Ino
			f.ok(link)
			var src, dst op.Attr
			if rep := f.do(f.named(op.Lookup, c.from)); rep.Code == 0 {
				src = rep.Attr
			}
			if rep := f.do(f.named(op.Lookup, c.to)); rep.Code == 0 {
				dst = rep.Attr
			}
			before := f.dump()
			req := f.renaming(c.from, c.to, c.flags)
			rep := f.refusedOrOK(c.code, req)
			switch {
			case c.code != 0 || src.Ino == dst.Ino:
				if rep.Held != 0 || f.dump() != before {
					t.Error("something changed")
				}
				return
			case c.flags&op.Exchange != 0:
				if a := f.attr2(req.Dir, req.Name); a.Ino != dst.Ino || a.Ctime != f.now {
					t.Errorf("%s is now %+v", c.from, a)
				}
			default:
				f.refused(sealfs.ErrNotExist, op.Request{Type: op.Lookup, Dir: req.Dir, Name: req.Name})
			}
			if want := dst.Ino; c.flags == 0 && rep.Held != want {
				t.Errorf("lost its last name: %d, want %d", rep.Held, want)
			}
			if a := f.attr2(req.Dir2, req.Name2); a.Ino != src.Ino || a.Ctime != f.now || a.Mtime != src.Mtime {
				t.Errorf("%s is now %+v", c.to, a)
			}
			for _, d := range []sealfs.Ino{req.Dir, req.Dir2} {
				if a := f.ok(op.Request{Type: op.Getattr, Ino: d}).Attr; a.Mtime != f.now || a.Ctime != f.now {
					t.Errorf("times of directory %d: %+v", d, a)
				}
			}
		})
	}
}

func (f *fixture) refusedOrOK(code sealfs.Code, req op.Request) op.Reply {
	f.Helper()
	if code == 0 {
		return *f.ok(req)
	}
	return *f.refused(code, req)
}

func (f *fixture) attr2(dir sealfs.Ino, name string) op.Attr {
	f.Helper()
	return f.ok(op.Request{Type: op.Lookup, Dir: dir, Name: name}).Attr
}

func TestRenameHeld(t *testing.T) {
	f := newFixture(t, 4)
	f.create("a")
	b := f.create("b")
	f.write(b, 0, []byte("held"))
	if rep := f.ok(f.renaming("a", "b", op.Held)); rep.Held != b || rep.Eof {
		t.Fatalf("rename over a held file: %+v", rep)
	}
	if got := f.read(b, 0, 10); string(got) != "held" {
		t.Errorf("held file reads %q", got)
	}
	f.check()
	f.ok(op.Request{Type: op.Reclaim, Ino: b})
	if len(f.sp.live) != 0 {
		t.Errorf("%d blocks are live", len(f.sp.live))
	}
}

// TestRenameDeep moves directories in a deep tree against and with its order.
func TestRenameDeep(t *testing.T) {
	f := newFixture(t, 4)
	dirs := []sealfs.Ino{f.root}
	for range 100 {
		dirs = append(dirs, f.ok(op.Request{Type: op.Mkdir, Dir: dirs[len(dirs)-1], Name: "d", Shard2: 2}).Attr.Ino)
	}
	f.refused(sealfs.ErrInvalid, op.Request{Type: op.Rename, Dir: dirs[0], Name: "d", Dir2: dirs[100], Name2: "loop"})
	f.ok(op.Request{Type: op.Rename, Dir: dirs[98], Name: "d", Dir2: dirs[0], Name2: "up"})
	f.ok(op.Request{Type: op.Rename, Dir: dirs[0], Name: "d", Dir2: dirs[100], Name2: "down"})
}

func TestReaddir(t *testing.T) {
	f := newFixture(t, 4)
	want := map[string]bool{}
	for i := range 500 {
		name := fmt.Sprintf("file-%d", i)
		want[name] = true
		f.create(name)
	}
	f.mkdir("sub")
	want["sub"] = true
	for _, flags := range []op.Flags{0, op.Plus} {
		seen := map[string]bool{}
		var at uint64
		for page := 0; ; page++ {
			rep := f.ok(op.Request{Type: op.Readdir, Dir: f.root, Off: at, Len: 4096, Flags: flags})
			used := 0
			for _, e := range rep.Entries {
				if e.Cookie <= at || e.Cookie <= 2 || e.Cookie >= 1<<63 {
					t.Fatalf("cookie %d after %d", e.Cookie, at)
				}
				at = e.Cookie
				if seen[e.Name] {
					t.Errorf("%s comes twice", e.Name)
				}
				seen[e.Name] = true
				used += direntBytes + len(e.Name)
				if flags&op.Plus != 0 {
					used += attrBytes
					if e.Attr.Ino != e.Ino || uint8(e.Attr.Mode>>12) != e.Type {
						t.Errorf("%s: %+v", e.Name, e)
					}
				} else if e.Attr.Ino != 0 {
					t.Errorf("%s has attributes", e.Name)
				}
			}
			if used > 4096 {
				t.Errorf("page %d takes %d bytes", page, used)
			}
			if rep.Eof {
				break
			}
			// What comes and goes meanwhile does not disturb the rest.
			f.ok(f.named(op.Create, fmt.Sprintf("new-%d-%d", flags, page)))
			f.ok(f.named(op.Unlink, fmt.Sprintf("new-%d-%d", flags, page)))
		}
		for name := range want {
			if !seen[name] {
				t.Errorf("%s is missing", name)
			}
		}
	}
	if rep := f.ok(op.Request{Type: op.Readdir, Dir: f.root, Len: 1}); len(rep.Entries) != 1 || rep.Eof {
		t.Errorf("a short page has %d entries", len(rep.Entries))
	}
	if rep := f.ok(op.Request{Type: op.Readdir, Dir: f.root, Off: 1<<64 - 1, Len: 1}); len(rep.Entries) != 0 || !rep.Eof {
		t.Errorf("beyond the end there are %d entries", len(rep.Entries))
	}
	f.refused(sealfs.ErrNotDir, op.Request{Type: op.Readdir, Dir: f.attr("file-1").Ino, Len: 100})
}

// TestCollisions lets all names share two cookies.
func TestCollisions(t *testing.T) {
	f := newFixtureOf(t, Config{Shards: 2, hashMask: ^uint64(1)}, newSpace(64, 1<<20), 16<<20)
	taken := 0
	for i := range 600 {
		if rep := f.do(f.named(op.Create, fmt.Sprint(i))); rep.Code == 0 {
			taken++
		} else if rep.Code != sealfs.ErrNoSpace {
			t.Fatal(rep.Code)
		}
	}
	// The hash 0 counts as 1, so there is one cookie.
	if taken != ordinals {
		t.Errorf("%d names fit one cookie", taken)
	}
	f.ok(f.named(op.Unlink, "77"))
	for _, name := range []string{"5", "200"} {
		f.attr(name)
	}
	f.refused(sealfs.ErrNotExist, f.named(op.Lookup, "77"))
	f.create("another") // in the gap
	f.attr("another")
	f.refused(sealfs.ErrNoSpace, f.named(op.Create, "one more"))
}

func TestSetattr(t *testing.T) {
	f := newFixture(t, 2)
	ino := f.create("a")
	set := func(valid uint32, fill func(*op.Request)) op.Attr {
		t.Helper()
		req := op.Request{Type: op.Setattr, Ino: ino, Valid: valid}
		fill(&req)
		return f.ok(req).Attr
	}
	before := f.attr("a")
	if a := set(0, func(*op.Request) {}); a != before {
		t.Errorf("setattr of nothing: %+v", a)
	}
	a := set(op.SetMode, func(r *op.Request) { r.Mode = typeDir | 0o7777 })
	if a.Mode != typeFile|0o7777 || a.Ctime != f.now || a.Mtime != before.Mtime || a.Version != before.Version+1 {
		t.Errorf("chmod: %+v", a)
	}
	a = set(op.SetUID|op.SetGID, func(r *op.Request) { r.UID, r.GID, r.Flags = 70, 80, op.KillPriv })
	if a.UID != 70 || a.GID != 80 || a.Mode != typeFile|0o1777 {
		t.Errorf("chown that kills privileges: %+v", a)
	}
	a = set(op.SetMode, func(r *op.Request) { r.Mode = 0o6644 })
	a = set(op.SetUID, func(r *op.Request) { r.UID, r.Flags = 71, op.KillPriv })
	if a.Mode != typeFile|0o2644 {
		t.Errorf("setgid without group execution: mode %o", a.Mode)
	}
	a = set(op.SetAtime|op.SetMtime, func(r *op.Request) { r.Atime, r.Mtime = -5, 1<<62 })
	if a.Atime != -5 || a.Mtime != 1<<62 || a.Ctime != f.now {
		t.Errorf("utimens: %+v", a)
	}
	a = set(op.SetAtimeNow|op.SetMtimeNow, func(*op.Request) {})
	if a.Atime != f.now || a.Mtime != f.now {
		t.Errorf("touch: %+v", a)
	}
	a = set(op.SetCtime, func(r *op.Request) { r.Ctime = 3 })
	if a.Ctime != 3 {
		t.Errorf("ctime: %+v", a)
	}
	if got := f.attr("a"); got != a {
		t.Errorf("stored %+v, answered %+v", got, a)
	}
	a = set(op.SetSize, func(r *op.Request) { r.Size = 1 << 40 })
	if a.Size != 1<<40 || a.Blocks != 0 || a.Mtime != f.now {
		t.Errorf("grown: %+v", a)
	}
	f.refused(sealfs.ErrTooBig, op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetSize, Size: 1 << 63})
	f.refused(sealfs.ErrIsDir, op.Request{Type: op.Setattr, Ino: f.root, Valid: op.SetSize})
}
