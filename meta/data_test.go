package meta

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"sealfs"
	"sealfs/op"
)

func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i>>8) ^ byte(i)*7 ^ seed
	}
	return b
}

func (f *fixture) truncate(ino sealfs.Ino, size uint64) op.Request {
	return op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetSize, Size: size}
}

func TestWrite(t *testing.T) {
	f := newFixture(t, 2)
	ino := f.create("a")
	data := pattern(10000, 1)
	rep := f.write(ino, 0, data)
	if rep.Code != 0 || rep.Attr.Size != 10000 || rep.Attr.Blocks != 20 || rep.Attr.Mtime != f.now || rep.Attr.Ctime != f.now {
		t.Fatalf("write: %+v", rep)
	}
	if !bytes.Equal(f.read(ino, 0, 20000), data) {
		t.Fatal("reads differently")
	}
	f.ok(op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetMode, Mode: 0o6755})
	f.ok(op.Request{Type: op.Write, Ino: ino, Size: 1, Data: pattern(block, 0), Flags: op.KillPriv})
	if m := f.attr("a").Mode; m != typeFile|0o755 {
		t.Errorf("mode %o after a write by another", m)
	}
	for _, c := range []struct {
		code sealfs.Code
		req  op.Request
	}{
		{sealfs.ErrInvalid, op.Request{Off: 1, Size: 10000, Data: data}},
		{sealfs.ErrInvalid, op.Request{Off: 0, Size: 10000}},
		{sealfs.ErrInvalid, op.Request{Off: 8192, Size: 10000, Data: data}},
		{sealfs.ErrInvalid, op.Request{Size: 1 << 20, Data: make([]byte, ExtentBlocksMax*block+1)}},
		{sealfs.ErrInvalid, op.Request{Size: 10000, Data: data, Sums: []uint32{1}}},
		{sealfs.ErrTooBig, op.Request{Off: 1<<63 - block, Size: 1 << 63, Data: make([]byte, block)}},
		{sealfs.ErrTooBig, op.Request{Off: 1 << 63, Size: 1 << 63, Data: data}},
		{sealfs.ErrIsDir, op.Request{Ino: f.root, Size: 10000, Data: data}},
		{sealfs.ErrNotExist, op.Request{Ino: 1 << 30, Size: 10000, Data: data}},
	} {
		c.req.Type = op.Write
		if c.req.Ino == 0 {
			c.req.Ino = ino
		}
		f.refused(c.code, c.req)
	}
	// The largest file: its last block is cut short by the largest offset.
	f.ok(op.Request{Type: op.Write, Ino: ino, Off: 1<<63 - block, Size: 1<<63 - 1, Data: make([]byte, block-1)})
	f.ok(f.truncate(ino, 0))
	if len(f.sp.live) != 0 {
		t.Errorf("%d blocks are live", len(f.sp.live))
	}
}

// TestExtents overwrites, cuts and punches a file at random and compares it
// with a slice of bytes.
func TestExtents(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			f := newFixture(t, 2)
			ino := f.create("a")
			var want []byte
			resize := func(n int) {
				if n <= len(want) {
					want = want[:n]
				} else {
					want = append(want, make([]byte, n-len(want))...)
				}
			}
			for i := range 400 {
				off, n := rng.IntN(40*block), 1+rng.IntN(20*block)
				switch rng.IntN(4) {
				case 0:
					off = off / block * block
				case 1:
					n = 1 + n%block
				}
				switch rng.IntN(6) {
				case 0, 1, 2:
					data := pattern(n, byte(i))
					if rep := f.write(ino, uint64(off), data); rep.Code != 0 {
						t.Fatal(rep.Code)
					}
					resize(max(len(want), off+n))
					copy(want[off:], data)
				case 3:
					f.ok(f.truncate(ino, uint64(off)))
					resize(off)
				case 4:
					f.ok(op.Request{Type: op.Fallocate, Ino: ino, Off: uint64(off), Len: uint64(n), Mode: fallocPunchHole | fallocKeepSize})
					from, to := (off+block-1)/block*block, (off+n)/block*block
					if off+n >= len(want) {
						to = len(want)
					}
					if from < to {
						clear(want[from:to])
					}
				case 5:
					f.ok(op.Request{Type: op.Fallocate, Ino: ino, Off: uint64(off), Len: uint64(n), Mode: uint32(rng.IntN(2))})
					if req := f.attr("a").Size; req != uint64(len(want)) {
						resize(max(len(want), off+n))
					}
				}
				if got := f.read(ino, 0, 1<<40); !bytes.Equal(got, want) {
					t.Fatalf("step %d: %d bytes read, %d wanted, or they differ", i, len(got), len(want))
				}
				if got := f.attr("a").Size; got != uint64(len(want)) {
					t.Fatalf("step %d: size %d, want %d", i, got, len(want))
				}
				a, b := rng.IntN(60*block), rng.IntN(60*block)
				got := f.read(ino, uint64(a), uint64(b))
				if w := want[min(a, len(want)):min(a+b, len(want))]; !bytes.Equal(got, w) {
					t.Fatalf("step %d: part of %d bytes at %d differs", i, b, a)
				}
				if i%50 == 0 {
					f.check()
				}
			}
			f.ok(f.named(op.Unlink, "a"))
			if len(f.sp.live) != 0 {
				t.Errorf("%d blocks are live", len(f.sp.live))
			}
		})
	}
}

// TestCover cuts a block several times: its sum goes on covering what it was made for.
func TestCover(t *testing.T) {
	f := newFixture(t, 1)
	for _, name := range []string{"inline", "row"} {
		ino := f.create(name)
		base := uint64(0)
		if name == "row" {
			base = 10 * block
		}
		f.write(ino, base, pattern(5000, 3))
		for _, n := range []uint64{4999, 4500, 4097, 4096, 100} {
			f.ok(f.truncate(ino, base+n))
			if got := f.read(ino, base, 1<<20); !bytes.Equal(got, pattern(5000, 3)[:n]) {
				t.Errorf("%s cut to %d reads differently", name, n)
			}
			f.check()
		}
		f.ok(f.truncate(ino, base+3000))
		if got := f.read(ino, base, 1<<20); !bytes.Equal(got, append(pattern(100, 3), make([]byte, 2900)...)) {
			t.Errorf("%s: cut bytes come back", name)
		}
	}
}

// manyExtents makes a file of n extents with a hole after each.
func manyExtents(f *fixture, name string, n int) sealfs.Ino {
	f.Helper()
	ino := f.create(name)
	for i := range n {
		f.ok(op.Request{Type: op.Write, Ino: ino, Off: uint64(i) * 2 * block, Size: uint64(i)*2*block + 5, Data: []byte{1, 2, 3, 4, byte(i)}})
	}
	return ino
}

func TestTail(t *testing.T) {
	f := newFixture(t, 2)
	ino := manyExtents(f, "a", 1000)
	rep := f.ok(f.truncate(ino, 3))
	if rep.Held != ino || rep.Attr.Size != 3 {
		t.Fatalf("truncation of a huge file: %+v", rep)
	}
	if got := f.read(ino, 0, 1<<40); !bytes.Equal(got, []byte{1, 2, 3}) {
		t.Errorf("reads %v", got)
	}
	f.check()
	f.refused(sealfs.ErrAgain, f.truncate(ino, 4))
	f.refused(sealfs.ErrAgain, op.Request{Type: op.Write, Ino: ino, Off: 0, Size: 5, Data: []byte("12345")})
	f.refused(sealfs.ErrAgain, op.Request{Type: op.Fallocate, Ino: ino, Off: 0, Len: 5})
	f.ok(op.Request{Type: op.Write, Ino: ino, Off: 0, Size: 3, Data: []byte("abc")})
	f.ok(f.truncate(ino, 2))
	req := f.named(op.Unlink, "a")
	req.Flags = op.Held
	f.ok(req)
	f.check()
	// Held, only the tail is freed.
	steps := 0
	for !f.ok(op.Request{Type: op.Reclaim, Ino: ino, Flags: op.Held}).Eof {
		if steps++; steps > 10 {
			t.Fatal("reclaim does not end")
		}
		f.check()
	}
	if got := f.read(ino, 0, 10); string(got) != "ab" {
		t.Errorf("held file reads %q", got)
	}
	if rep := f.ok(op.Request{Type: op.Reclaim, Ino: ino, Flags: op.Held}); !rep.Eof {
		t.Error("more to reclaim of a held file")
	}
	f.ok(f.truncate(ino, 100))
	f.ok(op.Request{Type: op.Reclaim, Ino: ino})
	f.refused(sealfs.ErrNotExist, op.Request{Type: op.Getattr, Ino: ino})
}

func TestUnlinkHuge(t *testing.T) {
	f := newFixture(t, 2)
	ino := manyExtents(f, "a", 700)
	rep := f.ok(f.named(op.Unlink, "a"))
	if rep.Held != ino || rep.Eof {
		t.Fatalf("unlink of a huge file: %+v", rep)
	}
	for steps := 1; ; steps++ {
		rep := f.ok(op.Request{Type: op.Reclaim, Ino: ino})
		if rep.Held != ino || steps > 3 {
			t.Fatalf("step %d answers %+v", steps, rep)
		}
		if rep.Eof {
			break
		}
		f.check()
	}
	if len(f.sp.live) != 0 {
		t.Errorf("%d blocks are live", len(f.sp.live))
	}
}

func TestPunchHuge(t *testing.T) {
	f := newFixture(t, 2)
	ino := manyExtents(f, "a", 700)
	size := f.attr("a").Size
	off, steps := uint64(0), 0
	for off < size {
		rep := f.ok(op.Request{Type: op.Fallocate, Ino: ino, Off: off, Len: size - off, Mode: fallocPunchHole | fallocKeepSize})
		if rep.Off <= off || rep.Attr.Size != size {
			t.Fatalf("punched up to %d from %d", rep.Off, off)
		}
		off = rep.Off
		steps++
	}
	if steps != 3 || len(f.sp.live) != 0 {
		t.Errorf("%d steps, %d blocks are live", steps, len(f.sp.live))
	}
	if got := f.read(ino, 0, size); !bytes.Equal(got, make([]byte, size)) {
		t.Error("a hole does not read as zeros")
	}
}

// TestAccess tells of several inodes at once that they were read, and of some that count no more.
func TestAccess(t *testing.T) {
	f := newFixture(t, 1)
	a, b := f.create("a"), f.create("b")
	before := [2]op.Attr{f.attr("a"), f.attr("b")}
	read := func(first sealfs.Ino, at int64, others ...op.Opens) op.Attr {
		req := op.Request{Type: op.Setattr, Ino: first, Valid: op.SetAccess, Atime: at}
		for _, o := range others {
			req.Data = op.AppendOpens(req.Data, o)
		}
		return f.ok(req).Attr
	}
	gone := op.Opens{Ino: a + b, Count: 7}
	told := read(a, 5000, gone, op.Opens{Ino: b, Count: 6000})
	for i, name := range []string{"a", "b"} {
		want := before[i]
		want.Atime = int64(5000 + 1000*i)
		if got := f.attr(name); got != want || i == 0 && told != got {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
	// Nobody has changed them since, and the one that has gone may be the first.
	if read(gone.Ino, 7, op.Opens{Ino: a, Count: 8000}) != (op.Attr{}) || f.attr("a").Atime != 5000 {
		t.Errorf("%+v", f.attr("a"))
	}
	f.now = 9000
	f.ok(op.Request{Type: op.Setattr, Ino: a, Valid: op.SetMode, Mode: 0o600})
	if at := read(a, 9500).Atime; at != 9500 {
		t.Errorf("after a change: %d", at)
	}
	if at := read(a, 9500+24*60*60*1e9).Atime; at == 9500 {
		t.Error("a day later it does not count")
	}
	many := make([]op.Opens, op.AccessMax)
	for i := range many {
		many[i] = gone
	}
	var list []byte
	for _, o := range many {
		list = op.AppendOpens(list, o)
	}
	for _, data := range [][]byte{list, {1}, {0, 1}} {
		f.refused(sealfs.ErrInvalid, op.Request{Type: op.Setattr, Ino: a, Valid: op.SetAccess, Atime: 1, Data: data})
	}
}

func TestFallocate(t *testing.T) {
	f := newFixture(t, 2)
	ino := f.create("a")
	falloc := func(mode uint32, off, n uint64) op.Request {
		return op.Request{Type: op.Fallocate, Ino: ino, Mode: mode, Off: off, Len: n}
	}
	if a := f.ok(falloc(0, 100, 900)).Attr; a.Size != 1000 || a.Mtime != f.now {
		t.Errorf("fallocate: %+v", a)
	}
	version := f.attr("a").Version
	if a := f.ok(falloc(fallocKeepSize, 0, 1<<30)).Attr; a.Size != 1000 || a.Version != version+1 || a.Mtime != f.now {
		t.Errorf("fallocate that keeps the size: %+v", a)
	}
	f.ok(falloc(fallocZeroRange, 0, 2000))
	if a := f.attr("a"); a.Size != 2000 {
		t.Errorf("zero range: %+v", a)
	}
	f.refused(sealfs.ErrNotSupported, falloc(fallocPunchHole, 0, 1))
	f.refused(sealfs.ErrNotSupported, falloc(0x08, 0, 1))
	f.refused(sealfs.ErrInvalid, falloc(0, 0, 0))
	f.refused(sealfs.ErrTooBig, falloc(0, 1<<63-1, 1))
	f.refused(sealfs.ErrTooBig, falloc(0, 1<<63, 1))
	f.refused(sealfs.ErrIsDir, op.Request{Type: op.Fallocate, Ino: f.root, Len: 1})
}

func TestSeek(t *testing.T) {
	f := newFixture(t, 2)
	ino := f.create("a")
	f.write(ino, 2*block, pattern(block+10, 1))
	f.write(ino, 9*block, pattern(3*block, 1))
	f.ok(f.truncate(ino, 20*block))
	const data, hole = 3, 4
	for _, c := range []struct {
		mode      uint32
		off, want uint64
	}{
		{data, 0, 2 * block}, {hole, 0, 0}, {data, 2*block + 5, 2*block + 5}, {hole, 2*block + 5, 4 * block}, {data, 3*block + 10, 3*block + 10}, {data, 4 * block, 9 * block},
		{hole, 10 * block, 12 * block}, {hole, 19 * block, 19 * block}, {data, 12*block - 1, 12*block - 1},
	} {
		if got := f.ok(op.Request{Type: op.Seek, Ino: ino, Mode: c.mode, Off: c.off}).Off; got != c.want {
			t.Errorf("seek %d from %d: %d, want %d", c.mode, c.off, got, c.want)
		}
	}
	f.refused(sealfs.ErrNoDevice, op.Request{Type: op.Seek, Ino: ino, Mode: data, Off: 12 * block})
	f.refused(sealfs.ErrNoDevice, op.Request{Type: op.Seek, Ino: ino, Mode: hole, Off: 20 * block})
	f.refused(sealfs.ErrInvalid, op.Request{Type: op.Seek, Ino: ino, Mode: 0})
	f.ok(f.truncate(ino, 12*block))
	if got := f.ok(op.Request{Type: op.Seek, Ino: ino, Mode: hole, Off: 9 * block}).Off; got != 12*block {
		t.Errorf("the end of the file is a hole: %d", got)
	}
}

// TestMove does what the cleaner does: it asks what lives of a payload and moves that.
func TestMove(t *testing.T) {
	f := newFixture(t, 2)
	ino := f.create("a")
	addr := f.sp.Payload()
	f.write(ino, 0, pattern(20*block-7, 1))
	f.write(ino, 5*block, pattern(2*block, 2)) // cuts the payload in two
	f.ok(f.truncate(ino, 18*block+9))
	want := f.read(ino, 0, 1<<20)
	type part struct {
		off  uint64
		addr sealfs.LSN
		n    uint32
	}
	var parts []part
	if err := Live(f.r, f.c, ino, 0, addr, 20*block-7, func(e *Extent) {
		parts = append(parts, part{e.Off, e.Addr, e.Stored()})
	}); err != nil {
		t.Fatal(err)
	}
	if len(parts) != 2 || parts[0] != (part{0, addr, 5 * block}) || parts[1] != (part{7 * block, addr + 7*block, 12 * block}) {
		t.Fatalf("live: %+v", parts)
	}
	before := f.dump()
	move := func(p part, to sealfs.LSN) bool {
		tx := f.r.Begin()
		moved, err := Move(tx, f.sp, f.c, ino, p.off, p.n, p.addr, to)
		if err != nil {
			t.Fatal(err)
		}
		if redo := len(tx.AppendRedo(nil)); redo > 24 {
			t.Errorf("moving an extent takes %d bytes of redo", redo)
		}
		tx.Commit()
		return moved
	}
	for _, p := range parts {
		to := f.sp.next
		f.sp.next += f.sp.step
		for i := sealfs.LSN(0); i < sealfs.LSN(p.n); i += block {
			f.sp.stored[to+i] = f.sp.stored[p.addr+i]
		}
		if move(part{p.off, p.addr + 64, p.n}, to) || move(part{p.off, p.addr, p.n - 1}, to) || move(part{p.off + block, p.addr, p.n}, to) {
			t.Error("what is not the extent was moved")
		}
		if !move(p, to) {
			t.Errorf("%+v was not moved", p)
		}
		if move(p, to) {
			t.Errorf("%+v was moved twice", p)
		}
	}
	if f.dump() != before {
		t.Error("a move shows in the dump")
	}
	if got := f.read(ino, 0, 1<<20); !bytes.Equal(got, want) {
		t.Error("reads differently after the move")
	}
	none := 0
	if err := Live(f.r, f.c, ino, 0, addr, 20*block-7, func(*Extent) { none++ }); err != nil || none != 0 {
		t.Errorf("%d extents still refer to the old place, %v", none, err)
	}
	if err := Live(f.r, f.c, 1<<40, 0, addr, block, func(*Extent) { none++ }); err != nil || none != 0 {
		t.Errorf("an inode that is gone has %d extents, %v", none, err)
	}
	f.check()
	// An inline extent moves, too.
	small := f.create("small")
	at := f.sp.Payload()
	f.write(small, 0, []byte("small"))
	f.sp.stored[f.sp.next] = f.sp.stored[at]
	ino = small
	if !move(part{0, at, 5}, f.sp.next) {
		t.Error("the extent in an inode was not moved")
	}
}

func TestSpaceError(t *testing.T) {
	f := newFixture(t, 1)
	ino := f.create("a")
	f.sp.full = true
	tx := f.r.Begin()
	err := Apply(tx, f.sp, f.c, &op.Request{Type: op.Write, Ino: ino, Size: 1, Data: []byte("x")}, &f.rep)
	tx.Reset()
	if err != sealfs.ErrNoSpace {
		t.Errorf("write without space: %v", err)
	}
}
