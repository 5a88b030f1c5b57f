package meta

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"sealfs"
	"sealfs/op"
	"sealfs/pmem"
)

// farOff is where a chunk begins.
const farOff = sealfs.HomeBytes + 7*sealfs.ChunkBytes

// chunkAt returns a request for the chunk at off.
func (f *fixture) chunkAt(t op.Type, ino sealfs.Ino, off, gen uint64) op.Request {
	return op.Request{Type: t, Ino: ino, Shard: ino.DataShard(off, f.c.Shards), Off: off, Gen: gen, Volume: 1}
}

// writeChunk writes data to one chunk as the server does that has asked the home.
func (f *fixture) writeChunk(ino sealfs.Ino, off uint64, data []byte) *op.Reply {
	f.Helper()
	a := f.ok(op.Request{Type: op.Getattr, Ino: ino}).Attr
	end := off + uint64(len(data))
	if a.Bound < end {
		a = f.ok(op.Request{Type: op.Extend, Ino: ino, Gen: a.Gen, Off: end + sealfs.ChunkBytes}).Attr
	}
	from := off / block * block
	to := max(end, min(blocksOf(end)*block, f.partEnd(ino, end)))
	merged := f.readChunk(ino, from, to-from)
	copy(merged[off-from:], data)
	req := f.chunkAt(op.Write, ino, from, a.Gen)
	req.Len, req.Size, req.Data, req.Stamp = a.Bound, end, merged, uint32(f.now)+1
	return f.do(req)
}

// partEnd returns where the extent ends that holds the block of end.
func (f *fixture) partEnd(ino sealfs.Ino, end uint64) (at uint64) {
	f.Helper()
	_, err := PartExtents(f.r, ino.DataShard(end-1, f.c.Shards), ino, end/block*block, block, func(e *Extent) bool {
		at = e.Off + uint64(e.Len)
		return false
	})
	if err != nil && err != sealfs.ErrNotExist {
		f.Fatal(err)
	}
	return at
}

// readChunk returns n bytes of a chunk, verified.
func (f *fixture) readChunk(ino sealfs.Ino, off, n uint64) []byte {
	f.Helper()
	b := make([]byte, n)
	_, err := PartExtents(f.r, ino.DataShard(off, f.c.Shards), ino, off, n, func(e *Extent) bool {
		for i := range e.Blocks() {
			at := e.Off + uint64(i)*block
			data := f.sp.stored[e.Addr+sealfs.LSN(i*block)]
			if sum := BlockSum(ino, at/block, e.Stamp, data[:e.Covered(i)]); sum != e.Sum(i) {
				f.Fatalf("block %d of inode %d does not verify", at/block, ino)
			}
			data = data[:min(uint64(len(data)), e.Off+uint64(e.Len)-at)]
			if at < off {
				data, at = data[min(off-at, uint64(len(data))):], off
			}
			if at < off+n {
				copy(b[at-off:], data)
			}
		}
		return true
	})
	if err != nil && err != sealfs.ErrNotExist {
		f.Fatal(err)
	}
	return b
}

// purgeAll does what the server of ino's home does, and returns how many
// requests that took.
func (f *fixture) purgeAll(ino sealfs.Ino) (steps int) {
	f.Helper()
	for {
		rep := f.do(op.Request{Type: op.Reclaim, Ino: ino})
		if rep.Code == sealfs.ErrNotExist {
			return steps
		}
		if rep.Code != 0 || rep.Held != ino {
			f.Fatalf("reclaim: %+v", rep)
		}
		if rep.Eof {
			return steps
		}
		if rep.Off == 0 {
			continue
		}
		gen, from := rep.Attr.Gen, max(rep.Attr.Size, sealfs.HomeBytes)
		for s := range f.c.Shards {
			req := op.Request{Type: op.Purge, Ino: ino, Shard: sealfs.Shard(s), Off: from, Gen: gen}
			for steps++; !f.ok(req).Eof; steps++ {
			}
		}
		// News of another generation changes nothing.
		if rep := f.do(op.Request{Type: op.Reclaim, Ino: ino, Flags: op.Purged, Gen: gen - 1}); rep.Off == 0 {
			f.Fatal("what was cut off is forgotten")
		}
		f.do(op.Request{Type: op.Reclaim, Ino: ino, Flags: op.Purged, Gen: gen})
	}
}

// TestChunks writes, punches, cuts and moves chunks of a file at random and
// compares them with plain bytes, here and on a replica.
func TestChunks(t *testing.T) {
	for _, shards := range []uint32{1, 2, 4096} {
		t.Run(fmt.Sprint(shards), func(t *testing.T) {
			const chunks, used = 12, 40 * block
			rng := rand.New(rand.NewPCG(uint64(shards), 4))
			f := newFixture(t, shards)
			f.mirror = newFixtureOf(t, f.c, newSpace(sealfs.MakeLSN(900, 128), 3<<20), 64<<20)
			ino := f.create("a")
			var want [chunks][used]byte
			size := uint64(sealfs.HomeBytes)
			cut := func(to uint64) {
				for c := range uint64(chunks) {
					if at := sealfs.HomeBytes + c*sealfs.ChunkBytes; to < at+used {
						clear(want[c][max(to, at)-at:])
					}
				}
			}
			home := pattern(3*block, 1)
			f.write(ino, sealfs.HomeBytes-3*block, home)
			for i := range 600 {
				c := rng.Uint64N(chunks)
				at := sealfs.HomeBytes + c*sealfs.ChunkBytes
				off, n := rng.IntN(used-1), 1+rng.IntN(10*block)
				n = min(n, used-off)
				pos := at + uint64(off)
				switch rng.IntN(8) {
				case 0, 1, 2, 3:
					data := pattern(n, byte(i))
					if rep := f.writeChunk(ino, pos, data); rep.Code != 0 || rep.Off != pos/block*block || rep.Attr.Version != 0 {
						t.Fatalf("write: %+v", rep)
					}
					copy(want[c][off:], data)
					size = max(size, pos+uint64(n))
					a := f.ok(op.Request{Type: op.Getattr, Ino: ino}).Attr
					f.ok(op.Request{Type: op.Extend, Ino: ino, Gen: a.Gen, Size: pos + uint64(n)})
				case 4:
					req := f.chunkAt(op.Fallocate, ino, pos/block*block, f.attr("a").Gen)
					req.Len, req.Mode = blocksOf(uint64(n))*block, fallocPunchHole|fallocKeepSize
					if rep := f.ok(req); rep.Off != req.Off+req.Len {
						t.Fatalf("hole up to %d", rep.Off)
					}
					clear(want[c][req.Off-at : min(req.Off+req.Len-at, used)])
				case 5:
					f.ok(f.truncate(ino, min(pos, size)))
					size = min(pos, size)
					cut(size)
					f.purgeAll(ino)
				case 6:
					f.moveSome(rng)
				default:
					got := f.readChunk(ino, pos, uint64(n))
					if !bytes.Equal(got, want[c][off:off+n]) {
						t.Fatalf("step %d: %d bytes at %d differ", i, n, pos)
					}
				}
				if i%50 == 0 {
					f.check()
				}
			}
			size = f.attr("a").Size
			if size > sealfs.HomeBytes {
				if got := f.read(ino, sealfs.HomeBytes-3*block, 3*block); !bytes.Equal(got, home) {
					t.Error("what stands at home has changed")
				}
			}
			if ours, theirs := f.dump(), f.mirror.dump(); ours != theirs {
				t.Error("the replica's dump differs")
			}
			f.ok(f.named(op.Unlink, "a"))
			f.purgeAll(ino)
			f.refused(sealfs.ErrNotExist, op.Request{Type: op.Getattr, Ino: ino})
			if len(f.sp.live) != 0 {
				t.Errorf("%d blocks are live", len(f.sp.live))
			}
		})
	}
}

// TestChunkGenerations follows one chunk through the generations of its file.
func TestChunkGenerations(t *testing.T) {
	f := newFixture(t, 64)
	ino := f.create("a")
	write := func(gen, bound uint64) op.Request {
		req := f.chunkAt(op.Write, ino, farOff, gen)
		req.Data, req.Len = pattern(block, byte(gen)), bound
		return req
	}
	f.refused(sealfs.ErrStale, write(0, 0)) // nobody has asked the home
	f.ok(op.Request{Type: op.Extend, Ino: ino, Off: farOff + block})
	f.refused(sealfs.ErrStale, write(0, farOff))
	f.ok(write(0, farOff+block))
	f.ok(write(0, 0)) // the part knows it
	beyond := write(0, 0)
	beyond.Off += block
	f.refused(sealfs.ErrStale, beyond)
	f.ok(op.Request{Type: op.Extend, Ino: ino, Size: farOff + block})
	if a := f.attr("a"); a.Size != farOff+block || a.Bound != farOff+block || a.Gen != 0 || a.Blocks != (farOff+block-sealfs.HomeBytes)/512 {
		t.Errorf("extended: %+v", a)
	}
	// A truncation that cuts nothing off leaves the generation alone.
	f.ok(f.truncate(ino, farOff+2*block))
	if a := f.attr("a"); a.Gen != 0 || a.Bound != farOff+block {
		t.Errorf("grown: %+v", a)
	}
	if rep := f.ok(f.truncate(ino, farOff+5)); rep.Held != ino || rep.Attr.Gen != 1 || rep.Attr.Bound != farOff+5 {
		t.Errorf("cut: %+v", rep)
	}
	f.refused(sealfs.ErrAgain, f.truncate(ino, farOff+6))
	f.refused(sealfs.ErrAgain, op.Request{Type: op.Extend, Ino: ino, Gen: 1, Off: farOff + 6})
	f.refused(sealfs.ErrStale, op.Request{Type: op.Extend, Ino: ino, Off: farOff + 6})
	f.ok(f.truncate(ino, 10))
	f.ok(f.truncate(ino, 20)) // below the chunks it may grow
	f.ok(op.Request{Type: op.Write, Ino: ino, Size: 30, Data: pattern(30, 1)})
	f.ok(write(0, 0)) // late, but not yet purged
	purge := op.Request{Type: op.Purge, Ino: ino, Shard: ino.DataShard(farOff, 64), Off: sealfs.HomeBytes, Gen: 2}
	if !f.ok(purge).Eof {
		t.Error("one extent takes several steps")
	}
	f.refused(sealfs.ErrStale, write(0, 0))
	f.ok(op.Request{Type: op.Reclaim, Ino: ino, Flags: op.Purged, Gen: 2})
	if _, chunks := f.inode(ino).Tails(); chunks {
		t.Error("what was cut off is still to be purged")
	}
	f.ok(op.Request{Type: op.Extend, Ino: ino, Gen: 2, Off: farOff + block})
	f.ok(write(2, farOff+block))
	f.refused(sealfs.ErrStale, write(1, farOff+block)) // whatever the home has said
	if !f.ok(purge).Eof {
		t.Error("a purge that comes again finds something")
	}
	if got := f.readChunk(ino, farOff, block); !bytes.Equal(got, pattern(block, 2)) {
		t.Error("a purge that comes again has taken what is new")
	}
	// Nobody told of that write: growing without data cuts it off.
	f.refused(sealfs.ErrAgain, f.truncate(ino, 1<<40))
	if rep := f.ok(op.Request{Type: op.Reclaim, Ino: ino, Valid: op.SetSize}); rep.Off != farOff+block || rep.Attr.Gen != 3 {
		t.Errorf("reclaim: %+v", rep)
	}
	f.purgeAll(ino)
	f.ok(f.truncate(ino, 1<<40))
}

func (f *fixture) inode(ino sealfs.Ino) *Inode {
	f.Helper()
	in := new(Inode)
	if err := GetInode(f.r, f.c, ino, in); err != nil {
		f.Fatal(err)
	}
	in.own()
	return in
}

// TestPurgeSteps frees a part of many extents in bounded steps.
func TestPurgeSteps(t *testing.T) {
	f := newFixture(t, 64)
	ino := f.create("a")
	for i := range uint64(500) {
		if rep := f.writeChunk(ino, farOff+2*i*block, []byte("x")); rep.Code != 0 {
			t.Fatal(rep.Code)
		}
	}
	f.ok(op.Request{Type: op.Extend, Ino: ino, Size: farOff + 1000*block})
	f.ok(f.truncate(ino, farOff+3))
	if steps := f.purgeAll(ino); steps != 64+1 {
		t.Errorf("%d steps", steps)
	}
	if got := f.readChunk(ino, farOff, 3*block); got[0] != 'x' || !bytes.Equal(got[1:], make([]byte, 3*block-1)) {
		t.Error("the rest of the file is another")
	}
	if len(f.sp.live) != 1 {
		t.Errorf("%d blocks are live", len(f.sp.live))
	}
}

// TestChunkRecords pins the bytes of what chunks add to a region.
func TestChunkRecords(t *testing.T) {
	p := Part{Gen: 3, Bound: 1 << 30, Bytes: 5000, Volume: 7}
	k := PartKey(0x0102, 0x0304)
	e := PartExtentKey(0x0102, 0x0304, farOff/block)
	in := Inode{Ino: 1 << 20, Mode: typeFile | 0o644, Nlink: 1, Size: 100, Btime: 1, Atime: 1, Mtime: 1, Ctime: 1, Version: 2, Volume: 1, Gen: 1, Bound: 1 << 30, Cut: 1 << 31}
	for _, c := range []struct {
		what, want string
		got        []byte
	}{
		{"part", "038080808004882707", p.Append(nil)},
		{"key of a part", "0102180000000000000304", k[:]},
		{"key of its extent", "01023000000000000003040000000000005c00", e[:]},
		{"inode", "8040a4810100000000000000020164018080808004" + "8080808008", in.Append(nil)},
	} {
		if got := hex.EncodeToString(c.got); got != c.want {
			t.Errorf("%s: %s, want %s", c.what, got, c.want)
		}
	}
	for _, bad := range []Part{{Bound: sealfs.HomeBytes, Bytes: 1, Volume: 1}, {Bound: 1<<63 + 1, Bytes: 1, Volume: 1}, {Bound: 1 << 30, Volume: 1}, {Bound: 1 << 30, Bytes: 1}} {
		if _, err := DecodePart(bad.Append(nil)); !isCorrupt(err) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func FuzzPart(f *testing.F) {
	p := Part{Gen: 3, Bound: 1 << 30, Bytes: 5000, Volume: 7}
	f.Add(p.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := DecodePart(b)
		if err != nil {
			if !isCorrupt(err) {
				t.Fatal(err)
			}
		} else if got := p.Append(nil); !bytes.Equal(got, b) || len(got) > partRecordMax {
			t.Fatalf("%x becomes %+v becomes %x", b, p, got)
		}
	})
}

// TestCheckChunks damages one thing at a time and expects the checker to see it.
func TestCheckChunks(t *testing.T) {
	f := newFixture(t, 4)
	ino := f.create("a")
	for i := range uint64(4) {
		f.writeChunk(ino, farOff+i*sealfs.ChunkBytes, pattern(3*block, 1))
	}
	f.ok(op.Request{Type: op.Extend, Ino: ino, Size: farOff + 3*sealfs.ChunkBytes + 3*block})
	other := f.create("other")
	s := ino.DataShard(farOff, 4)
	part := func(change func(*Part)) func(*pmem.Tx) error {
		return func(tx *pmem.Tx) error {
			p, err := GetPart(tx, s, ino)
			if err != nil {
				return err
			}
			change(&p)
			k := PartKey(s, ino)
			return tx.Set(k[:], p.Append(nil))
		}
	}
	inode := func(change func(*Inode)) func(*pmem.Tx) error {
		return func(tx *pmem.Tx) error {
			in := f.inode(ino)
			change(in)
			return f.changing(tx).put(in)
		}
	}
	extent := PartExtentKey(s, ino, farOff/block+2)
	for name, damage := range map[string]func(*pmem.Tx) error{
		"generation": part(func(p *Part) { p.Gen++ }),
		"bound":      part(func(p *Part) { p.Bound = farOff + block }),
		"high bound": part(func(p *Part) { p.Bound *= 2 }),
		"bytes":      part(func(p *Part) { p.Bytes++ }),
		"volume":     part(func(p *Part) { p.Volume++ }),
		"file bound": inode(func(in *Inode) { in.Bound = sealfs.HomeBytes }),
		"whole":      inode(func(in *Inode) { in.Bound = 0 }),
		"cut":        inode(func(in *Inode) { in.Cut = 1 << 40 }),
		"part gone": func(tx *pmem.Tx) error {
			k := PartKey(s, ino)
			return tx.Delete(k[:])
		},
		"inode gone": func(tx *pmem.Tx) error {
			k := InodeKey(4, ino)
			return tx.Delete(k[:])
		},
		"extent gone": func(tx *pmem.Tx) error { return tx.Delete(extent[:]) },
		"wrong shard": func(tx *pmem.Tx) error {
			x := Extent{Off: farOff, Len: block, Addr: 1 << 20, Sums: make([]byte, 4)}
			k := PartExtentKey((s+1)%4, ino, farOff/block)
			return tx.Set(k[:], x.Append(nil))
		},
		"overlap": func(tx *pmem.Tx) error {
			x := Extent{Off: farOff, Len: block, Addr: 1 << 20, Sums: make([]byte, 4)}
			k := PartExtentKey(s, ino, farOff/block)
			return tx.Set(k[:], x.Append(nil))
		},
		"part of nothing": func(tx *pmem.Tx) error {
			k := PartKey(s, other)
			p := Part{Bound: 1 << 30, Bytes: 1, Volume: 1}
			return tx.Set(k[:], p.Append(nil))
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

// TestDamagedChunks changes records of a file with chunks at random, and then
// asks and changes: nothing may panic, and what fails must fail as damage.
func TestDamagedChunks(t *testing.T) {
	f := newFixture(t, 4)
	ino := f.create("a")
	f.write(ino, 0, pattern(20*block, 1))
	for i := range uint64(6) {
		f.writeChunk(ino, farOff+i*sealfs.ChunkBytes, pattern(30*block, 1))
	}
	f.ok(op.Request{Type: op.Extend, Ino: ino, Size: farOff + 5*sealfs.ChunkBytes + 30*block})
	f.ok(f.truncate(ino, farOff+3*sealfs.ChunkBytes))
	rows := f.raw()
	types := []op.Type{op.Write, op.Fallocate, op.Seek, op.Extend, op.Purge, op.Reclaim, op.Setattr, op.DropVolume, op.Getattr}
	found := 0
	for round := range 3000 {
		rng := rand.New(rand.NewPCG(uint64(round), 2))
		tx := f.r.Begin()
		f.sp.begin()
		for range 1 + rng.IntN(2) {
			r := rows[rng.IntN(len(rows))]
			val := bytes.Clone(r.val)
			if rng.IntN(4) == 0 {
				val = bytes.Clone(rows[rng.IntN(len(rows))].val)
			}
			val[rng.IntN(len(val))] ^= 1 << rng.IntN(8)
			if err := tx.Set(r.key, val); err != nil {
				t.Fatal(err)
			}
		}
		for range 4 {
			off := farOff + rng.Uint64N(8)*sealfs.ChunkBytes
			req := f.chunkAt(types[rng.IntN(len(types))], ino, off, rng.Uint64N(4))
			switch req.Type {
			case op.Extend, op.Reclaim, op.Setattr:
				req.Shard = ino.Home(4)
			case op.Purge, op.DropVolume:
				req.Off = max(req.Off, sealfs.HomeBytes)
			}
			req.Time, req.Size, req.Valid, req.Mode, req.Flags = f.now+1, off, op.SetSize, 3, op.Flags(rng.IntN(2))*op.Purged
			req.Len = []uint64{block, 1 << 40}[rng.IntN(2)]
			if req.Type == op.Write {
				req.Data = pattern(block, 3)
			}
			var err error
			if req.Type.Changes() {
				err = Apply(tx, f.sp, f.c, &req, &f.rep)
			} else {
				err = Query(tx, f.c, &req, &f.rep)
			}
			if err == nil {
				_, err = PartExtents(tx, req.Shard, ino, off, 1<<40, func(*Extent) bool { return true })
			}
			if err == nil || err == sealfs.ErrNotExist {
				err = Live(tx, f.c, ino, off, 1, 1<<20, func(*Extent) {})
			}
			if err != nil && err != sealfs.ErrNotExist {
				found++
				if !isCorrupt(err) && !errors.Is(err, errSpace) {
					t.Fatalf("round %d: %v: %v", round, req.Type, err)
				}
			}
		}
		if err := Check(tx, f.c, func(string) {}); err != nil {
			t.Fatal(err)
		}
		tx.Reset()
		f.sp.rollback()
	}
	if found < 50 {
		t.Errorf("only %d operations met damage", found)
	}
}
