package meta

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/op"
	"sealfs/pmem"
)

var errSpace = errors.New("account of space")

// space is a Space that remembers every referenced block and its bytes.
type space struct {
	next   sealfs.LSN
	step   sealfs.LSN
	stored map[sealfs.LSN][]byte // what was written, by address of the block
	live   map[sealfs.LSN]uint32 // referenced bytes, by address of the block
	usage  map[sealfs.Volume]Usage
	full   bool // Retain fails
	undo   []func()
}

// begin starts an operation, whose calls rollback takes back.
func (s *space) begin() { s.undo = s.undo[:0] }

func (s *space) rollback() {
	for i := len(s.undo) - 1; i >= 0; i-- {
		s.undo[i]()
	}
	s.undo = s.undo[:0]
}

func newSpace(first, step sealfs.LSN) *space {
	return &space{next: first, step: step, stored: map[sealfs.LSN][]byte{}, live: map[sealfs.LSN]uint32{}, usage: map[sealfs.Volume]Usage{}}
}

func (s *space) Payload() sealfs.LSN { return s.next }

func (s *space) Retain(at sealfs.LSN, n uint32) error {
	if s.full {
		return sealfs.ErrNoSpace
	}
	for at := at; n > 0; at += block {
		if _, taken := s.live[at]; taken {
			return fmt.Errorf("%w: %v retained twice", errSpace, at)
		}
		s.live[at] = min(n, block)
		s.undo = append(s.undo, func() { delete(s.live, at) })
		n -= min(n, block)
	}
	return nil
}

func (s *space) Release(at sealfs.LSN, n uint32) error {
	for at := at; n > 0; at += block {
		if s.live[at] != min(n, block) {
			return fmt.Errorf("%w: %v: %d bytes released, %d are live", errSpace, at, min(n, block), s.live[at])
		}
		was := s.live[at]
		delete(s.live, at)
		s.undo = append(s.undo, func() { s.live[at] = was })
		n -= min(n, block)
	}
	return nil
}

func (s *space) Charge(v sealfs.Volume, bytes, inodes int64) {
	u := s.usage[v]
	s.usage[v] = Usage{u.Bytes + bytes, u.Inodes + inodes}
	s.undo = append(s.undo, func() { s.usage[v] = u })
}

// store keeps the payload of an operation that was applied.
func (s *space) store(data []byte) {
	for at := s.next; len(data) > 0; at += block {
		n := min(len(data), block)
		s.stored[at] = append([]byte(nil), data[:n]...)
		data = data[n:]
	}
	s.next += s.step
}

// fixture is a namespace with a root directory of volume 1.
type fixture struct {
	testing.TB
	r    *pmem.Region
	sp   *space
	c    Config
	now  int64
	root sealfs.Ino
	redo int // bytes of the last change's redo
	rep  op.Reply

	mirror *fixture // gets every change that was made, if there is one
}

func newFixture(t testing.TB, shards uint32) *fixture {
	return newFixtureOf(t, Config{Shards: shards}, newSpace(64, 1<<20), 64<<20)
}

func newFixtureOf(t testing.TB, c Config, sp *space, size int64) *fixture {
	t.Helper()
	b := pmem.NewMemory(disk.NewSim("region", size))
	if err := pmem.Format(b, pmem.Geometry{Store: sealfs.UUID{1}, TableBytes: pmem.PageSize}); err != nil {
		t.Fatal(err)
	}
	r, _, err := pmem.Open(b, pmem.Options{GrowBytes: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{TB: t, r: r, sp: sp, c: c, now: 1000}
	t.Cleanup(func() {
		if !t.Failed() {
			f.check()
		}
		r.Close()
	})
	f.root = f.ok(op.Request{Type: op.MakeRoot, Volume: 1, Mode: 0o755, Shard: sealfs.Shard(1 % c.Shards)}).Attr.Ino
	return f
}

// do executes a request, with its shard and time filled in, and answers in f.rep.
func (f *fixture) do(req op.Request) *op.Reply {
	f.Helper()
	rep := &f.rep
	if !req.Type.Changes() {
		if err := Query(f.r, f.c, &req, rep); err != nil {
			f.Fatalf("%v: %v", req.Type, err)
		}
		return rep
	}
	if req.Shard == 0 && !(aboutChunk(&req) && req.Volume != 0) {
		switch req.Type {
		case op.MakeRoot, op.DropSession, op.DropVolume, op.Purge:
		default:
			if ino := req.Dir; ino != 0 {
				req.Shard = ino.Home(f.c.Shards)
			} else {
				req.Shard = req.Ino.Home(f.c.Shards)
			}
		}
	}
	if req.Time == 0 {
		f.now++
		req.Time = f.now
	}
	if f.r.NeedsGrowth() {
		if err := f.r.Grow(); err != nil {
			f.Fatal(err)
		}
	}
	tx := f.r.Begin()
	f.sp.begin()
	err := Apply(tx, f.sp, f.c, &req, rep)
	if err != nil {
		tx.Reset()
		f.Fatalf("%v: %v", req.Type, err)
	}
	if rep.Code != 0 {
		tx.Reset()
		f.sp.rollback()
		return rep
	}
	f.redo = len(tx.AppendRedo(nil))
	tx.Commit()
	if f.mirror != nil {
		other := f.mirror.do(req)
		if rep.Code != other.Code || rep.Attr != other.Attr || rep.Off != other.Off || rep.Eof != other.Eof || rep.Held != other.Held {
			f.Fatalf("%v: the replica answers %+v, not %+v", req.Type, other, rep)
		}
	}
	if req.Type == op.Write {
		f.sp.store(req.Data)
	}
	return rep
}

// ok executes a request that must succeed.
func (f *fixture) ok(req op.Request) *op.Reply {
	f.Helper()
	rep := f.do(req)
	if rep.Code != 0 {
		f.Fatalf("%v %q %q: %v", req.Type, req.Name, req.Name2, rep.Code)
	}
	return rep
}

// refused executes a request that must be refused with code.
func (f *fixture) refused(code sealfs.Code, req op.Request) *op.Reply {
	f.Helper()
	rep := f.do(req)
	if rep.Code != code {
		f.Fatalf("%v %q %q: code %d (%v), want %v", req.Type, req.Name, req.Name2, rep.Code, rep.Code, code)
	}
	return rep
}

// check runs all checkers and compares the space with the extents.
func (f *fixture) check() {
	f.Helper()
	bad := 0
	problem := func(p string) {
		if bad++; bad < 20 {
			f.Error(p)
		}
	}
	if err := f.r.Check(problem); err != nil {
		f.Fatal(err)
	}
	if err := Check(f.r, f.c, problem); err != nil {
		f.Fatal(err)
	}
	left := len(f.sp.live)
	bytes := int64(0)
	err := walk(f.r, func(k *Key, v *record) error {
		e := &v.extent
		switch {
		case k.Kind == KindInode:
			e = &v.inode.First
		case k.Kind == KindAttribute && k.Part == 0:
			bytes += int64(len(v.attribute.Append(nil)))
			return nil
		case k.Kind == KindAttribute:
			bytes += int64(len(v.part))
			return nil
		case k.Kind != KindExtent:
			return nil
		}
		for i := range e.Blocks() {
			at := e.Addr + sealfs.LSN(i*block)
			if f.sp.live[at] != e.Covered(i) {
				problem(fmt.Sprintf("inode %d refers to %d bytes at %v, %d are live", k.Ino, e.Covered(i), at, f.sp.live[at]))
			}
			bytes += int64(e.Covered(i))
			left--
			data := f.sp.stored[at]
			if sum := BlockSum(k.Ino, e.Off/block+uint64(i), e.Stamp, data[:e.Covered(i)]); sum != e.Sum(i) {
				problem(fmt.Sprintf("inode %d: sum of block %d is %#x, its bytes have %#x", k.Ino, i, e.Sum(i), sum))
			}
		}
		return nil
	})
	if err != nil {
		f.Fatal(err)
	}
	if left != 0 {
		problem(fmt.Sprintf("%d live blocks belong to no extent", left))
	}
	usage := map[sealfs.Volume]Usage{}
	if err := VolumeUsage(f.r, f.c.Shards, func(v sealfs.Volume, bytes, inodes int64) {
		usage[v] = Usage{usage[v].Bytes + bytes, usage[v].Inodes + inodes}
	}); err != nil {
		f.Fatal(err)
	}
	total := int64(0)
	for v, u := range f.sp.usage {
		total += u.Bytes
		if usage[v] != u {
			problem(fmt.Sprintf("volume %d: rows say %v, charged %v", v, usage[v], u))
		}
	}
	if total != bytes {
		problem(fmt.Sprintf("%d bytes charged, %d stored", total, bytes))
	}
	if bad > 0 {
		f.FailNow()
	}
}

// dump returns Dump's text.
func (f *fixture) dump() string {
	var b strings.Builder
	if err := Dump(f.r, &b); err != nil {
		f.Fatal(err)
	}
	return b.String()
}

// at returns the directory and the last name of a path below the root.
func (f *fixture) at(path string) (sealfs.Ino, string) {
	f.Helper()
	dir := f.root
	names := strings.Split(path, "/")
	for _, name := range names[:len(names)-1] {
		dir = f.ok(op.Request{Type: op.Lookup, Dir: dir, Name: name}).Attr.Ino
	}
	return dir, names[len(names)-1]
}

// named returns a request for the path's last name in its directory.
func (f *fixture) named(t op.Type, path string) op.Request {
	f.Helper()
	dir, name := f.at(path)
	return op.Request{Type: t, Dir: dir, Name: name, Mode: 0o644, UID: 7, GID: 8}
}

func (f *fixture) mkdir(path string) sealfs.Ino {
	f.Helper()
	req := f.named(op.Mkdir, path)
	req.Mode = 0o755
	req.Shard2 = sealfs.Shard(f.now) % sealfs.Shard(f.c.Shards)
	return f.ok(req).Attr.Ino
}

func (f *fixture) create(path string) sealfs.Ino {
	f.Helper()
	return f.ok(f.named(op.Create, path)).Attr.Ino
}

func (f *fixture) attr(path string) op.Attr {
	f.Helper()
	return f.ok(f.named(op.Lookup, path)).Attr
}

func (f *fixture) renaming(from, to string, flags op.Flags) op.Request {
	f.Helper()
	req := f.named(op.Rename, from)
	req.Dir2, req.Name2 = f.at(to)
	req.Flags = flags
	return req
}

// write writes data at off as the server does: merged with the partial blocks at its ends.
func (f *fixture) write(ino sealfs.Ino, off uint64, data []byte) *op.Reply {
	f.Helper()
	end := off + uint64(len(data))
	size := f.ok(op.Request{Type: op.Getattr, Ino: ino}).Attr.Size
	from := off / block * block
	to := max(end, min(blocksOf(end)*block, size))
	merged := f.read(ino, from, to-from)
	merged = append(merged, make([]byte, to-from-uint64(len(merged)))...)
	copy(merged[off-from:], data)
	return f.do(op.Request{Type: op.Write, Ino: ino, Off: from, Size: end, Stamp: uint32(f.now) + 1, Data: merged})
}

// read returns the bytes [off, off+n) of a file as far as it goes, verified.
func (f *fixture) read(ino sealfs.Ino, off, n uint64) []byte {
	f.Helper()
	var b []byte
	attr, err := Extents(f.r, f.c, ino, off, n, func(e *Extent) bool {
		if e.Off+uint64(e.Len) <= off || e.Off >= off+n {
			f.Fatalf("extent at %d of %d bytes is not in [%d, +%d)", e.Off, e.Len, off, n)
		}
		for i := range e.Blocks() {
			at := e.Off + uint64(i)*block
			data := f.sp.stored[e.Addr+sealfs.LSN(i*block)]
			if sum := BlockSum(ino, at/block, e.Stamp, data[:e.Covered(i)]); sum != e.Sum(i) {
				f.Fatalf("block %d of inode %d does not verify", at/block, ino)
			}
			data = data[:min(uint64(len(data)), e.Off+uint64(e.Len)-at)]
			if at < off {
				data = data[min(off-at, uint64(len(data))):]
				at = off
			}
			if at >= off+n {
				break
			}
			b = append(b, make([]byte, at-off-uint64(len(b)))...)
			b = append(b, data[:min(uint64(len(data)), off+n-at)]...)
		}
		return true
	})
	if err != nil {
		f.Fatal(err)
	}
	if n = min(n, max(attr.Size, off)-off); n > uint64(len(b)) {
		b = append(b, make([]byte, n-uint64(len(b)))...)
	}
	return b
}

func isCorrupt(err error) bool {
	var c *sealfs.Corruption
	return errors.As(err, &c)
}
