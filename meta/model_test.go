package meta

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"sealfs"
	"sealfs/internal/oracle"
	"sealfs/op"
)

// model drives a namespace and the oracle with the same requests.
type model struct {
	*fixture
	fs    *oracle.FS
	rng   *rand.Rand
	held  map[sealfs.Ino]bool
	files []sealfs.Ino // every inode that was ever made, also those that are gone
	dirs  []sealfs.Ino
	acls  int // ACLs that were compared
}

func newModel(t *testing.T, c Config, seed uint64) *model {
	m := &model{
		fixture: newFixtureOf(t, c, newSpace(64, 1<<20), 64<<20), fs: oracle.New(c.Shards),
		rng: rand.New(rand.NewPCG(seed, 3)), held: map[sealfs.Ino]bool{},
	}
	root := m.ask(op.Request{Type: op.MakeRoot, Volume: 1, Mode: 0o755, Shard: sealfs.Shard(1 % c.Shards), Time: m.now})
	if root.Attr.Ino != m.root {
		t.Fatalf("root %d, the oracle's %d", m.root, root.Attr.Ino)
	}
	m.dirs = append(m.dirs, m.root)
	return m
}

// ask sends a request to the oracle.
func (m *model) ask(req op.Request) *op.Reply {
	rep := new(op.Reply)
	if err := m.fs.Do(context.Background(), &req, rep); err != nil {
		m.Fatal(err)
	}
	return rep
}

// both sends a request to both sides and compares the answers.
func (m *model) both(req op.Request) *op.Reply {
	m.Helper()
	ino := req.Ino
	if req.Dir != 0 {
		ino = req.Dir
	}
	req.Shard = ino.Home(m.c.Shards)
	if req.Type.Changes() {
		m.now++
		req.Time = m.now
	}
	mine := req
	if m.loses(&req) {
		mine.Flags |= op.Held
	}
	want := m.ask(req)
	var got *op.Reply
	switch req.Type {
	case op.Write:
		m.now-- // write takes the next time itself
		got = m.write(req.Ino, req.Off, req.Data)
	case op.Read:
		got = &op.Reply{Data: m.read(req.Ino, req.Off, req.Len)}
		want.Attr, want.Eof = op.Attr{}, false
	default:
		got = m.do(mine)
	}
	a, b := got.Attr, want.Attr
	a.Blocks, b.Blocks = 0, 0 // the oracle counts whole blocks
	if req.Type == op.Readlink {
		a, b = op.Attr{}, op.Attr{}
	}
	if got.Code != want.Code || a != b || !bytes.Equal(got.Data, want.Data) || req.Type != op.Write && got.Off != want.Off {
		m.Fatalf("%v %+v:\n got %v %+v off %d, %d bytes\nwant %v %+v off %d, %d bytes",
			req.Type, req, got.Code, a, got.Off, len(got.Data), want.Code, b, want.Off, len(want.Data))
	}
	return got
}

// loses reports whether an inode that is held may lose its last name by req.
func (m *model) loses(req *op.Request) bool {
	dir, name := req.Dir, req.Name
	switch req.Type {
	case op.Unlink, op.Rmdir:
	case op.Rename:
		dir, name = req.Dir2, req.Name2
	default:
		return false
	}
	rep := m.do(op.Request{Type: op.Lookup, Dir: dir, Name: name})
	return rep.Code == 0 && m.held[rep.Attr.Ino]
}

// release lets go of a held inode on both sides.
func (m *model) release(ino sealfs.Ino) {
	m.Helper()
	delete(m.held, ino)
	m.ask(op.Request{Type: op.Release, Ino: ino, Len: 1 << 40, Shard: ino.Home(m.c.Shards)})
	if a := m.do(op.Request{Type: op.Getattr, Ino: ino}); a.Code == 0 && a.Attr.Nlink == 0 {
		for !m.ok(op.Request{Type: op.Reclaim, Ino: ino}).Eof {
		}
	}
}

func (m *model) pick(from []sealfs.Ino) sealfs.Ino {
	if len(from) > 12 && m.rng.IntN(8) > 0 { // the young ones are more likely to be there
		from = from[len(from)-12:]
	}
	return from[m.rng.IntN(len(from))]
}

func (m *model) step(names int) {
	rng := m.rng
	name := func() string { return fmt.Sprintf("n%d", rng.IntN(names)) }
	req := op.Request{Dir: m.pick(m.dirs), Name: name(), Mode: uint32(rng.IntN(0o10000)), UID: uint32(rng.IntN(3)), GID: uint32(rng.IntN(3))}
	if rng.IntN(4) == 0 {
		req.Dir = m.root
	}
	req.Valid = []uint32{0, 0o22, uint32(rng.IntN(0o1000))}[rng.IntN(3)]
	onIno := func(t op.Type) op.Request { return op.Request{Type: t, Ino: m.pick(append(m.files, m.pick(m.dirs)))} }
	switch n := rng.IntN(100); {
	case n < 12:
		req.Type = op.Create
		req.Flags = []op.Flags{0, op.Excl}[rng.IntN(2)]
	case n < 15:
		req.Type = op.Mknod
		req.Mode = []uint32{0, typeFile, typeFifo, typeChar, typeSocket, typeDir}[rng.IntN(6)] | 0o644
		req.Rdev = 259
	case n < 23:
		req.Type = op.Mkdir
		req.Shard2 = sealfs.Shard(rng.IntN(int(m.c.Shards)))
	case n < 26:
		req.Type = op.Symlink
		req.Data = bytes.Repeat([]byte("t"), 1+rng.IntN(400))
	case n < 28:
		req.Type = op.Tmpfile
		req.Flags = op.OpenIt
	case n < 33:
		req.Type = op.Link
		req.Ino = onIno(op.Link).Ino
		if a := m.do(op.Request{Type: op.Getattr, Ino: req.Ino}); a.Code == 0 && a.Attr.Nlink == 0 {
			return // whether it was a Tmpfile only we know
		}
	case n < 43:
		req.Type = op.Unlink
	case n < 48:
		req.Type = op.Rmdir
	case n < 63:
		req.Type = op.Rename
		req.Dir2, req.Name2 = m.pick(m.dirs), name()
		if rng.IntN(3) == 0 {
			req.Dir2 = req.Dir
		}
		req.Flags = []op.Flags{0, 0, 0, op.NoReplace, op.Exchange, op.Exchange}[rng.IntN(6)]
	case n < 68:
		req = onIno(op.Setattr)
		req.Valid = uint32(rng.IntN(1<<9)) &^ op.SetSize
		req.Mode, req.UID, req.GID = uint32(rng.IntN(1<<15)), uint32(rng.IntN(300)), uint32(rng.IntN(300))
		req.Atime, req.Mtime, req.Ctime = rng.Int64(), rng.Int64(), rng.Int64()
		req.Flags = []op.Flags{0, op.KillPriv}[rng.IntN(2)]
	case n < 72:
		req = onIno(op.Setattr)
		req.Valid, req.Size = op.SetSize, uint64(rng.IntN(12*block))
	case n < 80:
		req = onIno(op.Write)
		if a := m.do(op.Request{Type: op.Getattr, Ino: req.Ino}); a.Code != 0 || a.Attr.Mode&typeMask != typeFile {
			return
		}
		req.Off, req.Data = uint64(rng.IntN(12*block)), pattern(1+rng.IntN(3*block), byte(n))
	case n < 84:
		req = onIno(op.Fallocate)
		req.Mode = []uint32{0, 1, 3, 16, 17, 8}[rng.IntN(6)]
		req.Off, req.Len = uint64(rng.IntN(12))*block, uint64(rng.IntN(6))*block
	case n < 86:
		req = onIno(op.Setxattr)
		if req.Name = op.ACLAccess; rng.IntN(2) == 0 {
			req.Name, req.Ino = op.ACLDefault, m.pick(append(m.dirs, req.Ino))
		}
		req.Data = randomACL(rng)
		req.Flags = []op.Flags{0, 0, op.XCreate, op.XReplace, op.KillPriv}[rng.IntN(5)]
	case n < 87:
		req = onIno(op.Setxattr)
		req.Name, req.Data = "user."+name(), pattern(rng.IntN(2000), 1)
		req.Flags = []op.Flags{0, 0, op.XCreate, op.XReplace}[rng.IntN(4)]
	case n < 88:
		req = onIno(op.Removexattr)
		req.Name = []string{"user." + name(), "user." + name(), op.ACLAccess, op.ACLDefault}[rng.IntN(4)]
	case n < 90:
		req = onIno(op.SetLock)
		req.Lock = op.Lock{Type: op.LockType(rng.IntN(3)), Start: uint64(rng.IntN(9)), End: uint64(9 + rng.IntN(9)), Owner: uint64(rng.IntN(3))}
	case n < 92:
		req = onIno(op.Seek)
		req.Off, req.Mode = uint64(rng.IntN(12*block)), uint32(3+rng.IntN(2))
	case n < 94:
		req = onIno(op.Getxattr)
		req.Name, req.Len = []string{"user." + name(), op.ACLAccess, op.ACLDefault}[rng.IntN(3)], uint64(rng.IntN(6000))
	case n < 96:
		req = onIno(op.Readlink)
	case n < 98: // hold
		req = onIno(op.Getattr)
		if m.both(req).Code == 0 {
			m.ask(op.Request{Type: op.Open, Ino: req.Ino, Shard: req.Ino.Home(m.c.Shards)})
			m.held[req.Ino] = true
		}
		return
	default: // let go
		for ino := range m.held {
			m.release(ino)
			break
		}
		return
	}
	rep := m.both(req)
	if rep.Code != 0 || rep.Attr.Ino == 0 {
		return
	}
	switch req.Type {
	case op.Mkdir:
		m.dirs = append(m.dirs, rep.Attr.Ino)
	case op.Tmpfile:
		m.held[rep.Attr.Ino] = true
		m.files = append(m.files, rep.Attr.Ino)
	case op.Create, op.Mknod, op.Symlink:
		m.files = append(m.files, rep.Attr.Ino)
	}
}

// compare compares everything that exists on both sides.
func (m *model) compare() {
	m.Helper()
	m.check()
	for _, dir := range m.dirs {
		var names [2][]string
		for i, do := range []func(op.Request) *op.Reply{m.do, m.ask} {
			rep := do(op.Request{Type: op.Readdir, Dir: dir, Len: 1 << 30, Flags: op.Plus, Shard: dir.Home(m.c.Shards)})
			for _, e := range rep.Entries {
				e.Attr.Blocks = 0
				names[i] = append(names[i], fmt.Sprintf("%s %d %d %+v", e.Name, e.Ino, e.Type, e.Attr))
			}
			slices.Sort(names[i])
		}
		if !slices.Equal(names[0], names[1]) {
			m.Fatalf("directory %d:\n got %v\nwant %v", dir, names[0], names[1])
		}
	}
	for _, ino := range append(m.files, m.dirs...) {
		a := m.both(op.Request{Type: op.Getattr, Ino: ino})
		if a.Code == 0 && a.Attr.Mode&typeMask == typeFile {
			m.both(op.Request{Type: op.Read, Ino: ino, Len: sealfs.IOMax})
		}
		for _, name := range []string{op.ACLAccess, op.ACLDefault} {
			if m.both(op.Request{Type: op.Getxattr, Ino: ino, Name: name, Len: sealfs.ACLMax}).Code == 0 {
				m.acls++
			}
		}
	}
	inodes := int64(0)
	for _, u := range m.sp.usage {
		inodes += u.Inodes
	}
	if int(inodes) != m.fs.Inodes() {
		m.Fatalf("%d inodes, the oracle has %d", inodes, m.fs.Inodes())
	}
}

// TestModel does random operations here and in the oracle.
func TestModel(t *testing.T) {
	for i, c := range []Config{{Shards: 1}, {Shards: 4}, {Shards: 1 << 16}, {Shards: 2, hashMask: ^uint64(3)}} {
		t.Run(fmt.Sprint(c.Shards, c.hashMask), func(t *testing.T) {
			m := newModel(t, c, uint64(i))
			for step := range 12000 {
				m.step(12)
				if step%1000 == 999 {
					m.compare()
				}
			}
			for ino := range m.held {
				m.release(ino)
			}
			m.compare()
			if m.acls == 0 {
				t.Error("no ACL was compared")
			}
		})
	}
}

// TestReplica repeats a history on a region of another layout and with other
// addresses of payloads, half of them moved since.
func TestReplica(t *testing.T) {
	m := newModel(t, Config{Shards: 8}, 77)
	m.mirror = newFixtureOf(t, m.c, newSpace(sealfs.MakeLSN(900, 128), 3<<20), 128<<20)
	for step := range 8000 {
		m.step(15)
		if step%100 == 0 {
			m.mirror.moveSome(m.rng)
		}
	}
	ours, theirs := m.dump(), m.mirror.dump()
	if ours != theirs {
		a, b := strings.Split(ours, "\n"), strings.Split(theirs, "\n")
		for i := range min(len(a), len(b)) {
			if a[i] != b[i] {
				t.Fatalf("line %d of the dumps:\n%s\n%s", i, a[i], b[i])
			}
		}
		t.Fatalf("dumps of %d and %d lines", len(a), len(b))
	}
	if len(ours) < 10000 {
		t.Errorf("a dump of %d bytes says little", len(ours))
	}
}

// moveSome moves half of the extents, as the cleaner does.
func (f *fixture) moveSome(rng *rand.Rand) {
	f.Helper()
	type place struct {
		ino sealfs.Ino
		off uint64
		at  sealfs.LSN
		n   uint32
	}
	var all []place
	err := walk(f.r, func(k *Key, v *record) error {
		e := &v.extent
		if k.Kind == KindInode {
			e = &v.inode.First
		}
		if (k.Kind == KindInode || k.Kind == KindExtent) && e.Len > 0 && rng.IntN(2) == 0 {
			all = append(all, place{k.Ino, e.Off, e.Addr, e.Stored()})
		}
		return nil
	})
	if err != nil {
		f.Fatal(err)
	}
	for _, p := range all {
		to := f.sp.next
		f.sp.next += f.sp.step
		for i := sealfs.LSN(0); i < sealfs.LSN(p.n); i += block {
			f.sp.stored[to+i] = f.sp.stored[p.at+i]
		}
		tx := f.r.Begin()
		f.sp.begin()
		if moved, err := Move(tx, f.sp, f.c, p.ino, p.off, p.n, p.at, to); err != nil || !moved {
			f.Fatalf("move of %+v: %v, %v", p, moved, err)
		}
		tx.Commit()
	}
}
