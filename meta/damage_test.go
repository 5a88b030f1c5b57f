package meta

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"sealfs"
	"sealfs/op"
	"sealfs/pmem"
)

// row is a raw record.
type row struct{ key, val []byte }

func (f *fixture) raw() (all []row) {
	f.Helper()
	var cur pmem.Cursor
	for ok := cur.Seek(f.r, nil); ok; ok = cur.Next() {
		all = append(all, row{bytes.Clone(cur.Key()), bytes.Clone(cur.Value())})
	}
	if err := cur.Err(); err != nil {
		f.Fatal(err)
	}
	return all
}

// populated returns a namespace with records of every kind.
func populated(t *testing.T) *model {
	m := newModel(t, Config{Shards: 4}, 5)
	for range 1500 {
		m.step(12)
	}
	ino := manyExtents(m.fixture, "tail", 300)
	m.ok(m.truncate(ino, 5))
	for i := range 4 {
		req := m.named(op.Create, fmt.Sprint("session", i))
		req.Session, req.Seq = 9, uint64(i+1)
		ino = m.ok(req).Attr.Ino
		m.ok(setLock(ino, 9, 1, op.WriteLock, 0, 5))
		m.ok(op.Request{Type: op.Setxattr, Ino: ino, Name: "user.long", Data: pattern(3000, 1)})
		m.write(ino, 0, pattern(20*block, 1))
		m.files = append(m.files, ino)
	}
	link := m.named(op.Symlink, "longlink")
	link.Data = bytes.Repeat([]byte("l"), 2000)
	m.files = append(m.files, m.ok(link).Attr.Ino)
	// A file that counts in two directories, and what is due. Shards beyond those that there
	// are play the part of another store.
	dir := m.ok(m.named(op.Mkdir, "elsewhere")).Attr.Ino
	m.ok(op.Request{Type: op.Link, Dir: dir, Name: "other", Ino: ino})
	m.write(ino, 0, pattern(30*block, 1))
	kinds := map[Kind]bool{}
	for _, r := range m.raw() {
		kinds[Kind(r.key[2])] = true
	}
	if len(kinds) != 12 {
		t.Fatalf("kinds %v", kinds)
	}
	return m
}

// TestDamage changes records at random and then asks and changes at random:
// nothing may panic, and what fails must fail as damage.
func TestDamage(t *testing.T) {
	m := populated(t)
	rows := m.raw()
	var rep op.Reply
	found := 0
	for round := range 1500 {
		rng := rand.New(rand.NewPCG(uint64(round), 9))
		tx := m.r.Begin()
		m.sp.begin()
		// Three records, so that they may disagree in interesting ways.
		for range 1 + rng.IntN(3) {
			r := rows[rng.IntN(len(rows))]
			if rng.IntN(8) == 0 {
				if err := tx.Delete(r.key); err != nil && err != sealfs.ErrNotExist {
					t.Fatal(err)
				}
				continue
			}
			val := bytes.Clone(r.val)
			switch rng.IntN(4) {
			case 0:
				val = val[:rng.IntN(len(val)+1)]
			case 1:
				val = append(val, byte(rng.Uint32()))
			case 2:
				val = bytes.Clone(rows[rng.IntN(len(rows))].val)
			}
			if len(val) > 0 && rng.IntN(2) == 0 {
				val[rng.IntN(len(val))] ^= 1 << rng.IntN(8)
			}
			if err := tx.Set(r.key, val); err != nil {
				t.Fatal(err)
			}
		}
		for range 8 {
			types := op.Types()
			req := op.Request{
				Type: types[rng.IntN(len(types))], Dir: m.dirs[rng.IntN(min(len(m.dirs), 5))], Dir2: m.dirs[rng.IntN(min(len(m.dirs), 5))],
				Name: fmt.Sprintf("n%d", rng.IntN(12)), Name2: fmt.Sprintf("n%d", rng.IntN(12)), Ino: m.files[rng.IntN(len(m.files))],
				Valid: uint32(rng.IntN(1 << 9)), Size: uint64(rng.IntN(40 * block)), Len: uint64(rng.IntN(5000)), Mode: 3, Volume: 1,
				Time: 1 << 40, Session: 9, Seq: uint64(rng.IntN(8)), Data: []byte("data"), Flags: op.Flags(rng.IntN(1 << 11)),
			}
			req.Shard = req.Ino.Home(4)
			if rng.IntN(2) == 0 {
				req.Shard = req.Dir.Home(4)
			}
			if req.Type == op.Getxattr || req.Type == op.Setxattr {
				req.Name = "user.long"
			}
			var err error
			if req.Type.Changes() {
				err = Apply(tx, m.sp, m.c, &req, &rep)
			} else {
				err = Query(tx, m.c, &req, &rep)
			}
			if err == nil {
				_, err = Extents(tx, m.c, req.Ino, 0, 1<<40, func(*Extent) bool { return true })
			}
			if err == sealfs.ErrNotExist {
				err = nil
			}
			if err != nil {
				found++
				if !isCorrupt(err) && !errors.Is(err, errSpace) {
					t.Fatalf("round %d: %v: %v", round, req.Type, err)
				}
			}
		}
		if err := Check(tx, m.c, func(string) {}); err != nil {
			t.Fatal(err)
		}
		if err := Dump(tx, &bytes.Buffer{}); err != nil && !isCorrupt(err) {
			t.Fatal(err)
		}
		tx.Reset()
		m.sp.rollback()
	}
	if found < 40 {
		t.Errorf("only %d operations met damage", found)
	}
}

// TestCheck damages one thing at a time and expects the checker to see it.
func TestCheck(t *testing.T) {
	f := newFixture(t, 4)
	d := f.mkdir("d")
	file := f.create("d/file")
	f.write(file, 0, pattern(5000, 1))
	f.write(file, 10*block, pattern(20*block, 1))
	f.ok(op.Request{Type: op.Setxattr, Ino: file, Name: "user.a", Data: pattern(2000, 1)})
	req := f.named(op.Symlink, "link")
	req.Data = bytes.Repeat([]byte("x"), 1000)
	link := f.ok(req).Attr.Ino
	tmp := f.ok(op.Request{Type: op.Tmpfile, Dir: f.root, Session: 3, Seq: 1}).Attr.Ino
	f.ok(setLock(file, 1, 1, op.ReadLock, 0, 1))

	inode := func(ino sealfs.Ino, change func(*Inode)) func(*pmem.Tx) error {
		return func(tx *pmem.Tx) error {
			var in Inode
			if err := GetInode(tx, f.c, ino, &in); err != nil {
				return err
			}
			in.own()
			change(&in)
			return f.changing(tx).put(&in)
		}
	}
	drop := func(key []byte) func(*pmem.Tx) error {
		return func(tx *pmem.Tx) error { return tx.Delete(key) }
	}
	put := func(key, val []byte) func(*pmem.Tx) error {
		return func(tx *pmem.Tx) error { return tx.Set(key, val) }
	}
	key := func(match func(*Key) bool) []byte {
		for _, r := range f.raw() {
			if k, err := DecodeKey(r.key); err == nil && match(&k) {
				return r.key
			}
		}
		t.Fatal("no such key")
		return nil
	}
	kind := func(kind Kind, ino sealfs.Ino) []byte {
		return key(func(k *Key) bool { return k.Kind == kind && k.Ino == ino })
	}
	e := Entry{Ino: file, Type: typeFile >> 12, Name: []byte("file")}
	wrongCookie := EntryKey(4, d, 77<<ordinalBits)
	lockKey := LockKey(4, 4*1000, 0, 1, 1, 1)
	l := LockRow{Lock: op.Lock{Type: op.ReadLock, End: 5}}
	for name, damage := range map[string]func(*pmem.Tx) error{
		"link count":        inode(file, func(in *Inode) { in.Nlink++ }),
		"directory's links": inode(d, func(in *Inode) { in.Nlink++ }),
		"directory's size":  inode(d, func(in *Inode) { in.Size++ }),
		"parent":            inode(d, func(in *Inode) { in.Parent = tmp }),
		"no root":           inode(d, func(in *Inode) { in.Parent = d }),
		"size":              inode(file, func(in *Inode) { in.Size = 100 }),
		"bytes":             inode(file, func(in *Inode) { in.Bytes++ }),
		"volume":            inode(file, func(in *Inode) { in.Volume++ }),
		"names":             inode(file, func(in *Inode) { in.Names++ }),
		"type":              inode(file, func(in *Inode) { in.Mode = typeLink; in.First = Extent{}; in.kept = 0 }),
		"target":            inode(link, func(in *Inode) { in.Size-- }),
		"orphan's links":    inode(tmp, func(in *Inode) { in.Nlink = 1; in.Flags = 0 }),
		"tail":              inode(file, func(in *Inode) { in.Flags |= flagTail }),
		"linkable":          inode(file, func(in *Inode) { in.Flags |= flagLinkable }),
		"record":            put(kind(KindInode, file), []byte{1, 2, 3}),
		"key":               put([]byte{0, 0, 0x33}, nil),
		"shard":             put([]byte{0, 9, byte(KindOrphan), 0, 0, 0, 0, 0, 0, 0, 9}, []byte{1}),
		"home":              put([]byte{0, 1, byte(KindOrphan), 0, 0, 0, 0, 0, 0, 0, 8}, []byte{1}),
		"inode gone":        drop(kind(KindInode, file)),
		"directory gone":    drop(kind(KindInode, d)),
		"entry gone":        drop(kind(KindEntry, d)),
		"extent gone":       drop(kind(KindExtent, file)),
		"target gone":       drop(kind(KindSymlink, link)),
		"orphan row gone":   drop(kind(KindOrphan, tmp)),
		"attribute gone":    drop(kind(KindAttribute, file)),
		"part gone":         drop(key(func(k *Key) bool { return k.Kind == KindAttribute && k.Part == 2 })),
		"middle part gone":  drop(key(func(k *Key) bool { return k.Kind == KindAttribute && k.Part == 1 })),
		"usage gone":        drop(key(func(k *Key) bool { return k.Kind == KindUsage })),
		"shard row gone":    drop(key(func(k *Key) bool { return k.Kind == KindShard && k.Shard == f.root.Home(4) })),
		"result gone":       drop(key(func(k *Key) bool { return k.Kind == KindSession && k.Pos > 0 })),
		"session gone":      drop(key(func(k *Key) bool { return k.Kind == KindSession && k.Pos == 0 })),
		"wrong cookie":      put(wrongCookie[:], e.Append(nil)),
		"lock on nothing":   put(lockKey[:], l.Append(nil)),
		"overlap": func(tx *pmem.Tx) error {
			x := Extent{Off: 9 * block, Len: 2 * block, Addr: 64, Sums: make([]byte, 8)}
			k := ExtentKey(4, file, 10)
			return tx.Set(k[:], x.Append(nil))
		},
	} {
		tx := f.r.Begin()
		if err := damage(tx); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		problems := 0
		if err := Check(tx, f.c, func(string) { problems++ }); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if problems == 0 {
			t.Errorf("%s: nothing was noticed", name)
		}
		tx.Reset()
	}
}

// changing returns an operation under way in tx.
func (f *fixture) changing(tx *pmem.Tx) *change { return &change{tx: tx, sp: f.sp, c: f.c} }

// TestParentLoop makes damaged parents go round in circles.
func TestParentLoop(t *testing.T) {
	f := newFixture(t, 1)
	dirs := make([]sealfs.Ino, 30)
	at := f.root
	for i := range dirs {
		dirs[i] = f.ok(op.Request{Type: op.Mkdir, Dir: at, Name: "d"}).Attr.Ino
		at = dirs[i]
	}
	f.mkdir("other")
	for _, back := range []int{0, 5, 28, 29} {
		tx := f.r.Begin()
		var in Inode
		if err := GetInode(tx, f.c, dirs[0], &in); err != nil {
			t.Fatal(err)
		}
		in.Parent = dirs[back]
		if back == 0 { // that would be a root
			in.Parent = dirs[1]
		}
		if err := f.changing(tx).put(&in); err != nil {
			t.Fatal(err)
		}
		err := Apply(tx, f.sp, f.c, &op.Request{Type: op.Rename, Dir: f.root, Name: "other", Dir2: at, Name2: "x"}, &f.rep)
		if !isCorrupt(err) {
			t.Errorf("loop of %d directories: %v, %v", back+1, err, f.rep.Code)
		}
		tx.Reset()
	}
}
