package meta

import (
	"fmt"
	"testing"

	"sealfs"
	"sealfs/op"
)

// TestRedoSize bounds the redo of the usual operations in a directory of some
// size. These bytes are written to the log for every operation.
func TestRedoSize(t *testing.T) {
	f := newFixture(t, 4096)
	f.now = 1_763_726_400_000_000_000
	sum := map[string]int{}
	most := map[string]int{}
	const n = 2000
	long := 0 // creates that split a page
	note := func(what string) {
		if what == "create" && f.redo > 600 {
			long++
		}
		sum[what] += f.redo
		most[what] = max(most[what], f.redo)
	}
	for i := range n {
		name := fmt.Sprintf("file-%011d", i)
		f.now += 1_000_003
		ino := f.ok(op.Request{Type: op.Create, Dir: f.root, Name: name, Mode: 0o644, UID: 1000, GID: 1000}).Attr.Ino
		note("create")
		f.now += 1_000_003
		f.ok(op.Request{Type: op.Write, Ino: ino, Size: 4096, Stamp: uint32(i), Data: make([]byte, 4096)})
		note("write")
		f.ok(op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetAtimeNow})
		f.ok(op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetAtimeNow})
		note("utimes")
		f.ok(op.Request{Type: op.Create, Dir: f.root, Name: "x" + name, Session: 5, Seq: uint64(i + 1), Low: uint64(i)})
		note("create, session")
		f.ok(op.Request{Type: op.Rename, Dir: f.root, Name: "x" + name, Dir2: f.root, Name2: "y" + name})
		note("rename")
		f.ok(op.Request{Type: op.Unlink, Dir: f.root, Name: "y" + name})
		note("unlink")
	}
	if long > n/20 {
		t.Errorf("%d of %d creates take more than 600 bytes of redo", long, n)
	}
	for what, limit := range map[string]int{"create": 280, "write": 200, "utimes": 60, "create, session": 440, "rename": 420, "unlink": 260} {
		if mean := sum[what] / n; mean > limit {
			t.Errorf("%s takes %d bytes of redo in the mean, the limit is %d", what, mean, limit)
		}
		t.Logf("%s: %d bytes of redo, at most %d", what, sum[what]/n, most[what])
	}
}

// TestRegionPerFile bounds the region that small files take, all told.
func TestRegionPerFile(t *testing.T) {
	for _, shards := range []uint32{1, 4096} {
		f := newFixture(t, shards)
		f.now = 1_763_726_400_000_000_000
		const dirs, files = 40, 250
		before := f.r.Usage()
		for d := range dirs {
			dir := f.ok(op.Request{Type: op.Mkdir, Dir: f.root, Name: fmt.Sprint(d), Mode: 0o755, Shard2: sealfs.Shard(uint32(d*97) % shards)}).Attr.Ino
			for i := range files {
				f.now += 1_000_003
				name := fmt.Sprintf("file-%011d", d*files+i)
				ino := f.ok(op.Request{Type: op.Create, Dir: dir, Name: name, Mode: 0o644, UID: 1000, GID: 1000}).Attr.Ino
				f.now += 1_000_003
				f.ok(op.Request{Type: op.Write, Ino: ino, Size: 4096, Stamp: uint32(i), Data: make([]byte, 4096)})
			}
		}
		bytes := (f.r.Usage().Used - before.Used) * 4096 / (dirs * files)
		t.Logf("%d shards: %d bytes of region for a file", shards, bytes)
		if bytes > 250 {
			t.Errorf("%d shards: %d bytes of region for a file", shards, bytes)
		}
	}
}

// TestInodeSize pins how long the record of a small file is.
func TestInodeSize(t *testing.T) {
	in := Inode{Ino: 1 << 20, Mode: typeFile | 0o644, Nlink: 1, UID: 1000, GID: 1000, Size: 4096, Bytes: 4096, Btime: 1, Atime: 1, Mtime: 2, Ctime: 2, Version: 2, Volume: 1}
	in.First = Extent{Len: 4096, Addr: 1 << 40, Stamp: 7, Sums: []byte{1, 2, 3, 4}}
	if n := len(in.Append(nil)); n != 47 {
		t.Errorf("a small file's inode takes %d bytes", n)
	}
	if n := len(in.Append(nil)); n > inodeRecordMax {
		t.Errorf("a record of %d bytes", n)
	}
}

// TestAllocs bounds what the common operations allocate.
func TestAllocs(t *testing.T) {
	f := newFixture(t, 64)
	for i := range 200 {
		f.create(fmt.Sprint("file-", i))
	}
	ino := f.attr("file-7").Ino
	f.write(ino, 0, []byte("content"))
	f.ok(op.Request{Type: op.Setxattr, Ino: ino, Name: "user.a", Data: []byte("value")})
	var rep op.Reply
	rep.Data = make([]byte, 0, 100)
	query := func(req op.Request) func() {
		return func() {
			if err := Query(f.r, f.c, &req, &rep); err != nil || rep.Code != 0 {
				t.Fatal(err, rep.Code)
			}
		}
	}
	change := func(req op.Request) func() {
		req.Shard = f.root.Home(64)
		return func() {
			f.sp.begin()
			tx := f.r.Begin()
			if err := Apply(tx, f.sp, f.c, &req, &rep); err != nil || rep.Code != 0 {
				t.Fatal(err, rep.Code)
			}
			tx.Reset()
			f.sp.rollback()
		}
	}
	for _, c := range []struct {
		name  string
		limit float64
		fn    func()
	}{
		{"lookup", 0, query(op.Request{Type: op.Lookup, Dir: f.root, Name: "file-77"})},
		{"getattr", 0, query(op.Request{Type: op.Getattr, Ino: ino})},
		{"getxattr", 0, query(op.Request{Type: op.Getxattr, Ino: ino, Name: "user.a", Len: 100})},
		{"listxattr", 0, query(op.Request{Type: op.Listxattr, Ino: ino, Len: 100})},
		{"extents", 1, func() {
			if _, err := Extents(f.r, f.c, ino, 0, 10, func(*Extent) bool { return true }); err != nil {
				t.Fatal(err)
			}
		}},
		// What is left is the closures of the test's space.
		{"create", 1, change(op.Request{Type: op.Create, Dir: f.root, Name: "new"})},
		{"setattr", 0, change(op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetMode})},
		{"rename", 0, change(op.Request{Type: op.Rename, Dir: f.root, Name: "file-1", Dir2: f.root, Name2: "new"})},
		{"unlink", 1, change(op.Request{Type: op.Unlink, Dir: f.root, Name: "file-1"})},
		{"lock", 1, change(op.Request{Type: op.SetLock, Ino: ino, Lock: op.Lock{Type: op.ReadLock, End: 10}})},
	} {
		c.fn()
		if n := testing.AllocsPerRun(100, c.fn); n > c.limit {
			t.Errorf("%s allocates %v times, at most %v", c.name, n, c.limit)
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	f := newFixture(b, 4096)
	names := make([]string, 2000)
	for i := range names {
		names[i] = fmt.Sprintf("file-%011d", i)
		f.create(names[i])
	}
	var rep op.Reply
	i := 0
	b.ReportAllocs()
	for b.Loop() {
		i++
		if err := Query(f.r, f.c, &op.Request{Type: op.Lookup, Dir: f.root, Name: names[i%len(names)]}, &rep); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCreateUnlink(b *testing.B) {
	f := newFixture(b, 4096)
	for i := range 20000 {
		f.create(fmt.Sprintf("file-%011d", i))
	}
	create := op.Request{Type: op.Create, Dir: f.root, Name: "new", Shard: f.root.Home(4096), Mode: 0o644}
	unlink := create
	unlink.Type = op.Unlink
	var rep op.Reply
	var redo []byte
	b.ReportAllocs()
	for b.Loop() {
		for _, req := range []*op.Request{&create, &unlink} {
			f.sp.begin()
			tx := f.r.Begin()
			if err := Apply(tx, f.sp, f.c, req, &rep); err != nil || rep.Code != 0 {
				b.Fatal(err, rep.Code)
			}
			redo = tx.AppendRedo(redo[:0])
			tx.Commit()
		}
	}
}
