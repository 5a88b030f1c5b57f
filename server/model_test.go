package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"testing"

	"sealfs"
	"sealfs/internal/oracle"
	"sealfs/op"
)

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(string(bytes.TrimSpace(p)))
	return len(p), nil
}

func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// twin sends every request to the server and to the oracle and compares.
type twin struct {
	t     *testing.T
	s     op.Handler
	sim   *simServer // if s is one
	apart bool       // s is several stores: see late
	near  bool       // new directories lie in the shard of their parent
	root  sealfs.Ino
	o     *oracle.FS
	rng   *rand.Rand
	inos  []sealfs.Ino // of files and directories that were seen
	dirs  []sealfs.Ino
	names []string
	n     int

	// ours are the server's numbers of inodes by the oracle's, and theirs the way back, where they differ.
	ours, theirs map[sealfs.Ino]sealfs.Ino
}

// renumber translates the inode numbers of a request for the server.
func (w *twin) renumber(req *op.Request) {
	for _, ino := range [...]*sealfs.Ino{&req.Ino, &req.Dir, &req.Dir2} {
		if other := w.ours[*ino]; other != 0 {
			*ino = other
		}
	}
	address(req)
}

// renumbered translates those of the server's answer, whose inode the oracle knows as ino.
func (w *twin) renumbered(rep *op.Reply, ino sealfs.Ino) {
	if a := rep.Attr.Ino; a != 0 && w.theirs[a] == 0 && ino != 0 {
		w.ours[ino], w.theirs[a] = a, ino
	}
	if rep.Attr.Ino != 0 {
		rep.Attr.Ino = w.theirs[rep.Attr.Ino]
	}
	for i := range rep.Entries {
		rep.Entries[i].Ino = w.theirs[rep.Entries[i].Ino]
	}
}

func newTwin(t *testing.T, seed uint64, deviceBytes, segment int64) *twin {
	s := newSim(t, deviceBytes, segment)
	w := &twin{t: t, s: s, sim: s, root: s.root, o: oracle.New(testShards), rng: rand.New(rand.NewPCG(seed, 1))}
	w.begin()
	for i := range 12 {
		w.names = append(w.names, fmt.Sprintf("name%d", i))
	}
	return w
}

// begin gives both the same root.
func (w *twin) begin() {
	req := op.Request{Type: op.MakeRoot, Volume: 1, Shard: w.root.Home(testShards), Mode: 0o755, Time: 1}
	var rep op.Reply
	if err := w.o.Do(context.Background(), &req, &rep); err != nil || rep.Attr.Ino != w.root {
		w.t.Fatalf("oracle's root is %d (%v), the server's %d", rep.Attr.Ino, err, w.root)
	}
	w.dirs = []sealfs.Ino{w.root}
	w.inos = []sealfs.Ino{w.root}
	w.do(op.Request{Type: op.Setattr, Ino: w.root, Valid: op.SetAtime | op.SetMtime, Atime: 5, Mtime: 6})
}

func (w *twin) do(req op.Request) *op.Reply {
	w.t.Helper()
	w.n++
	address(&req)
	mine := req
	if w.ours != nil {
		w.renumber(&mine)
	}
	a, b := &op.Reply{}, &op.Reply{}
	if err := w.s.Do(context.Background(), &mine, a); err != nil {
		w.t.Fatalf("step %d: %v: %v", w.n, req.Type, err)
	}
	req.Time = mine.Time
	if err := w.o.Do(context.Background(), &req, b); err != nil {
		w.t.Fatal(err)
	}
	if w.ours != nil {
		w.renumbered(a, b.Attr.Ino)
	}
	if w.apart {
		w.late(&req, a, b)
	}
	if d := differ(&req, a, b); d != "" {
		req.Data = req.Data[:min(len(req.Data), 16)]
		w.t.Fatalf("step %d: %+v\n%s", w.n, req, d)
	}
	return a
}

// differ compares two replies in what both must agree on.
func differ(req *op.Request, got, want *op.Reply) string {
	if got.Code != want.Code {
		return fmt.Sprintf("code %v, want %v", got.Code, want.Code)
	}
	if got.Code != 0 {
		return ""
	}
	ga, wa := got.Attr, want.Attr
	ga.Version, wa.Version, ga.Blocks, wa.Blocks, ga.Btime, wa.Btime = 0, 0, 0, 0, 0, 0
	if ga.Ino != 0 && wa.Ino != 0 {
		if ga.Mode&0o170000 == 0o040000 {
			ga.Size, wa.Size = 0, 0
		}
		if ga != wa {
			return fmt.Sprintf("attributes\n %+v, want\n %+v", ga, wa)
		}
	}
	if !bytes.Equal(got.Data, want.Data) && req.Type != op.Listxattr {
		return fmt.Sprintf("data of %d bytes, want %d; first difference at %d", len(got.Data), len(want.Data), firstDifference(got.Data, want.Data))
	}
	if len(got.Data) != len(want.Data) {
		return fmt.Sprintf("%d bytes of names, want %d", len(got.Data), len(want.Data))
	}
	if req.Type == op.Readdir {
		names := func(r *op.Reply) map[string]sealfs.Ino {
			m := map[string]sealfs.Ino{}
			for _, e := range r.Entries {
				m[e.Name] = e.Ino
			}
			return m
		}
		if g, w := names(got), names(want); !reflect.DeepEqual(g, w) {
			return fmt.Sprintf("entries %v, want %v", g, w)
		}
	}
	if req.Type == op.Seek && got.Off != want.Off {
		return fmt.Sprintf("offset %d, want %d", got.Off, want.Off)
	}
	if req.Type == op.TestLock && got.Lock.Type != want.Lock.Type {
		return fmt.Sprintf("lock %+v, want %+v", got.Lock, want.Lock)
	}
	return ""
}

// late takes care of what several stores may answer in another way than one does:
// which of two faults of a link or a rename is told, and, in answers that are not there to tell the
// attributes, what a transaction has in hand whose Commit the party has not heard: names,
// and that the last one is gone. Who asks for the attributes gets them as they are.
func (w *twin) late(req *op.Request, got, want *op.Reply) {
	w.t.Helper()
	dir := want.Attr.Mode&modeType == modeDirectory
	switch req.Type {
	case op.Link:
		if got.Code == sealfs.ErrExist && want.Code != 0 {
			got.Code = want.Code
		}
		return
	case op.Rename: // a loop is looked for when everything else has been found right
		if want.Code == sealfs.ErrInvalid && (got.Code == sealfs.ErrNotDir || got.Code == sealfs.ErrNotEmpty) {
			got.Code = want.Code
		}
		return
	case op.Read, op.Write, op.Fallocate, op.Seek, op.Readlink, op.Setxattr, op.Removexattr, op.Getxattr, op.SetLock, op.TestLock:
	default:
		return
	}
	g, e := &got.Attr, &want.Attr
	switch {
	case want.Code == sealfs.ErrNotExist && got.Code != want.Code:
		got.Code = want.Code
	case got.Code == 0 && want.Code == 0 && g.Ino != 0 && e.Ino != 0 && (g.Nlink != e.Nlink || g.Ctime != e.Ctime || dir && g.Mtime != e.Mtime):
		g.Nlink, g.Ctime = e.Nlink, e.Ctime
		if dir {
			g.Mtime = e.Mtime
		}
	default:
		return
	}
	w.n-- // it belongs to the same step
	w.do(op.Request{Type: op.Getattr, Ino: req.Ino})
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

func pick[T any](w *twin, s []T) T { return s[w.rng.IntN(len(s))] }

// acl returns a random ACL, at times one that does not go into a part of a transaction.
func (w *twin) acl() []byte {
	entry := func(b []byte, tag byte, who uint32) []byte {
		return binary.LittleEndian.AppendUint32(append(b, tag, 0, byte(w.rng.IntN(8)), 0), who)
	}
	b := entry([]byte{2, 0, 0, 0}, 1, 1<<32-1)
	named := []int{0, 0, 1, 2, 150}[w.rng.IntN(5)]
	for range named {
		b = entry(b, 2, uint32(w.rng.IntN(3)))
	}
	b = entry(b, 4, 1<<32-1)
	if named > 0 {
		b = entry(b, 16, 1<<32-1)
	}
	return entry(b, 32, 1<<32-1)
}

// spread says where a new directory lies.
func (w *twin) spread(dir sealfs.Ino) sealfs.Shard {
	shard := sealfs.Shard(w.rng.IntN(testShards))
	if w.near {
		return dir.Home(testShards)
	}
	return shard
}

// step does one random operation.
func (w *twin) step() {
	dir, dir2 := pick(w, w.dirs), pick(w, w.dirs)
	name, name2 := pick(w, w.names), pick(w, w.names)
	ino := pick(w, w.inos)
	uid := uint32(w.rng.IntN(3))
	learn := func(r *op.Reply, isDir bool) {
		if r.Code != 0 {
			return
		}
		w.inos = append(w.inos, r.Attr.Ino)
		if isDir {
			w.dirs = append(w.dirs, r.Attr.Ino)
		}
		if len(w.inos) > 60 {
			w.inos = w.inos[len(w.inos)-40:]
		}
		if len(w.dirs) > 12 {
			w.dirs = append([]sealfs.Ino{w.root}, w.dirs[len(w.dirs)-8:]...)
		}
	}
	umask := uint32(w.rng.IntN(4)) * 0o011
	switch w.rng.IntN(32) {
	case 30:
		in, acl := pick(w, w.dirs), op.ACLDefault
		if w.rng.IntN(3) == 0 {
			in, acl = ino, op.ACLAccess
		}
		w.do(op.Request{Type: op.Setxattr, Ino: in, Name: acl, Data: w.acl()})
	case 31:
		acl := []string{op.ACLAccess, op.ACLDefault}[w.rng.IntN(2)]
		for _, in := range []sealfs.Ino{ino, dir} {
			w.do(op.Request{Type: op.Getxattr, Ino: in, Name: acl, Len: sealfs.ACLMax})
		}
	case 0, 1, 2:
		f := op.Flags(0)
		if w.rng.IntN(2) == 0 {
			f = op.Excl
		}
		learn(w.do(op.Request{Type: op.Create, Dir: dir, Name: name, Mode: 0o666, Valid: umask, UID: uid, GID: uid, Flags: f}), false)
	case 3:
		learn(w.do(op.Request{Type: op.Mkdir, Dir: dir, Name: name, Mode: 0o2777, Valid: umask, UID: uid, GID: uid, Shard2: w.spread(dir)}), true)
	case 4:
		learn(w.do(op.Request{Type: op.Symlink, Dir: dir, Name: name, UID: uid, Data: bytes.Repeat([]byte("x/"), 1+w.rng.IntN(1000))}), false)
	case 5:
		learn(w.do(op.Request{Type: op.Mknod, Dir: dir, Name: name, Mode: 0o010644, UID: uid}), false)
	case 6:
		w.do(op.Request{Type: op.Link, Dir: dir, Name: name, Ino: ino})
	case 7, 8:
		w.do(op.Request{Type: op.Unlink, Dir: dir, Name: name})
	case 9:
		w.do(op.Request{Type: op.Rmdir, Dir: dir, Name: name})
	case 10, 11:
		f := []op.Flags{0, 0, op.NoReplace, op.Exchange}[w.rng.IntN(4)]
		w.do(op.Request{Type: op.Rename, Dir: dir, Name: name, Dir2: dir2, Name2: name2, Flags: f})
	case 12:
		w.do(op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetSize, Size: w.offset()})
	case 13:
		w.do(op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetMode | op.SetUID | op.SetMtime, Mode: uint32(w.rng.IntN(0o10000)), UID: uid, Mtime: int64(w.rng.IntN(1e9)) - 1e6})
	case 14, 15, 16, 17:
		f := []op.Flags{0, 0, op.Append, op.KillPriv}[w.rng.IntN(4)]
		data := make([]byte, 1+w.rng.IntN([]int{100, 5000, 300000}[w.rng.IntN(3)]))
		for i := range data {
			data[i] = byte(w.rng.Uint32())
		}
		w.do(op.Request{Type: op.Write, Ino: ino, Off: w.offset(), Data: data, Flags: f})
	case 18:
		mode := []uint32{0, 1, 3, 0x10, 0x11, 0x20}[w.rng.IntN(6)]
		w.do(op.Request{Type: op.Fallocate, Ino: ino, Off: w.offset(), Len: 1 + w.offset(), Mode: mode})
	case 19:
		f := []op.Flags{0, op.XCreate, op.XReplace}[w.rng.IntN(3)]
		w.do(op.Request{Type: op.Setxattr, Ino: ino, Name: "user." + name, Data: bytes.Repeat([]byte{byte(w.n)}, 1+w.rng.IntN(3000)), Flags: f})
	case 20:
		w.do(op.Request{Type: op.Removexattr, Ino: ino, Name: "user." + name})
	case 21:
		w.do(op.Request{Type: op.Lookup, Dir: dir, Name: name})
	case 22:
		w.do(op.Request{Type: op.Getattr, Ino: ino})
	case 23:
		w.do(op.Request{Type: op.Readlink, Ino: ino})
	case 24, 25:
		w.do(op.Request{Type: op.Read, Ino: ino, Off: w.offset(), Len: uint64(1 + w.rng.IntN(400000))})
	case 26:
		w.do(op.Request{Type: op.Readdir, Dir: dir, Len: 1 << 20})
	case 27:
		w.do(op.Request{Type: op.Getxattr, Ino: ino, Name: "user." + name, Len: 65536})
	case 28:
		w.do(op.Request{Type: op.Seek, Ino: ino, Off: w.offset(), Mode: uint32(3 + w.rng.IntN(2))})
	case 29:
		lk := op.Lock{Type: op.LockType(w.rng.IntN(3)), Start: uint64(w.rng.IntN(50)), Owner: uint64(w.rng.IntN(3)), PID: 1}
		lk.End = lk.Start + uint64(w.rng.IntN(50))
		t := op.SetLock
		if lk.Type != op.Unlock && w.rng.IntN(3) == 0 {
			t = op.TestLock
		}
		w.do(op.Request{Type: t, Ino: ino, Lock: lk})
	}
}

func (w *twin) offset() uint64 {
	switch w.rng.IntN(4) {
	case 0:
		return 0
	case 1:
		return uint64(w.rng.IntN(20)) * 4096
	case 2:
		return uint64(w.rng.IntN(10000))
	}
	return uint64(w.rng.IntN(600000))
}

// TestModelOracle: random operations through the server and its store give what
// the oracle gives, across restarts.
func TestModelOracle(t *testing.T) {
	steps := 100000
	if testing.Short() {
		steps = 4000
	}
	w := newTwin(t, 1, 512<<20, 1<<20)
	for w.n < steps {
		w.step()
		if w.n%5000 == 0 {
			w.sim.check(t)
		}
	}
}
