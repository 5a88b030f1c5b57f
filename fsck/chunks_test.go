package fsck

import (
	"slices"
	"testing"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
)

// writeChunk writes a block to a chunk, wherever it stands.
func (c *stores) writeChunk(ino sealfs.Ino, gen, bound, off uint64) sealfs.Shard {
	c.t.Helper()
	s := ino.DataShard(off, testShards)
	data := pattern(byte(off/block), block)
	c.of(s).do(&op.Request{Type: op.Write, Shard: s, Ino: ino, Volume: testVolume, Off: off, Size: off + block, Data: data, Gen: gen, Len: bound})
	return s
}

// bigEnd is the size of a file with a dozen chunks.
const bigEnd = sealfs.HomeBytes + 12*sealfs.ChunkBytes

// big makes a file with chunks. It returns the shard of one on another store than
// the file's, and where that begins.
func (c *stores) big(dir sealfs.Ino) (ino sealfs.Ino, away sealfs.Shard, off uint64) {
	c.t.Helper()
	ino = c.create(dir, "big")
	w := c.home(ino)
	w.write(ino, 0, pattern(1, block))
	w.do(&op.Request{Type: op.Extend, Ino: ino, Size: bigEnd, Off: bigEnd})
	for at := uint64(sealfs.HomeBytes); at < bigEnd; at += sealfs.ChunkBytes {
		s := c.writeChunk(ino, 0, bigEnd, at)
		c.writeChunk(ino, 0, 0, at+5*block)
		if off == 0 && (len(c.all) == 1 || c.of(s) != w) {
			away, off = s, at
		}
	}
	return ino, away, off
}

func TestChunksAreClean(t *testing.T) {
	for _, n := range []int{1, 2, 3} {
		c := newStores(t, n)
		z := c.grow()
		ino, _, _ := c.big(z.a)
		clean := func(what string) {
			t.Helper()
			all := c.copies()
			for _, l := range []*Layout{nil, c.layout()} {
				subsets(all, func(given []images, whole bool) {
					rep := together(t, given, l)
					if ids := rep.numbers(); len(ids) != 0 || (rep.NotJudged == 0) != whole {
						t.Errorf("%s, %d of %d stores: %v, %d not judged", what, len(rep.Stores), n, ids, rep.NotJudged)
					}
					if what == "whole" && whole {
						parts := uint64(0)
						for _, r := range rep.Stores {
							parts += r.Parts
							if r.ReadBytes != r.Bytes {
								t.Errorf("%d of %d bytes were verified", r.ReadBytes, r.Bytes)
							}
						}
						if parts < 6 {
							t.Errorf("%d parts: the test tests little", parts)
						}
					}
				})
			}
		}
		clean("whole")
		// Cut off, and purged one by one.
		size := uint64(sealfs.HomeBytes + 5*sealfs.ChunkBytes)
		c.home(ino).do(&op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetSize, Size: size})
		clean("cut off")
		for s := range sealfs.Shard(testShards) {
			c.of(s).do(&op.Request{Type: op.Purge, Shard: s, Ino: ino, Gen: 1, Off: size})
			if s == testShards/2 {
				clean("purged in part")
			}
		}
		c.home(ino).do(&op.Request{Type: op.Reclaim, Ino: ino, Gen: 1, Flags: op.Held | op.Purged})
		clean("purged")
	}
}

func TestDamagedChunks(t *testing.T) {
	c := newStores(t, 2)
	z := c.grow()
	ino, s, off := c.big(z.a)
	all := c.copies()
	home, there := int(ino.Home(testShards))%2, int(s)%2
	if home == there {
		t.Fatal("the chunk stands on the file's own store")
	}
	key := meta.PartKey(s, ino)
	first := meta.PartExtentKey(s, ino, off/block)
	part := func(fn func(p *meta.Part)) func(h []*hurt) {
		return func(h []*hurt) {
			p, err := meta.DecodePart(h[there].get(key[:]))
			h[0].must(err)
			fn(&p)
			h[there].set(key[:], p.Append(nil))
		}
	}
	file := func(fn func(in *meta.Inode)) func(h []*hurt) {
		return func(h []*hurt) { h[home].inode(ino, fn) }
	}
	// move puts the extent at off under another key.
	move := func(h *hurt, shard sealfs.Shard, to uint64) {
		b := h.get(first[:])
		h.del(first[:])
		k := meta.PartExtentKey(shard, ino, to/block)
		h.set(k[:], b)
	}
	for _, x := range []struct {
		name string
		want []ID
		at   int
		do   func(h []*hurt)
		left []ID
	}{
		{"generation", []ID{PartGen}, there, part(func(p *meta.Part) { p.Gen++ }), nil},
		{"bound", []ID{PartBound}, there, part(func(p *meta.Part) { p.Bound++ }), nil},
		{"bound below its extents", []ID{PartBound}, there, part(func(p *meta.Part) { p.Bound = sealfs.HomeBytes + 1 }), nil},
		{"bytes", []ID{UsageWrong, PartBytes}, there, part(func(p *meta.Part) { p.Bytes++ }), nil},
		{"volume", []ID{UsageWrong, PartVolume}, there, part(func(p *meta.Part) { p.Volume++ }), nil},
		{"part is lost", []ID{UsageWrong, ChunkNoPart}, there, func(h []*hurt) { h[there].del(key[:]) }, nil},
		{"part is damaged", []ID{RecordDamaged}, there, func(h []*hurt) { h[there].set(key[:], []byte{0xff}) }, nil},
		{"extent is lost", []ID{PartBytes, LiveWrong}, there, func(h []*hurt) { h[there].del(first[:]) }, nil},
		{"extent in another chunk", []ID{ChunkPlace, DataSum, ExtentOrphan}, there, func(h []*hurt) {
			to := off
			for ino.DataShard(to, testShards) == s {
				to += sealfs.ChunkBytes
			}
			move(h[there], s, to)
		}, nil},
		{"extent in another shard", []ID{ShardWrong, PartBytes, LiveWrong}, there, func(h []*hurt) {
			other := (s + 2) % testShards
			for at := uint64(sealfs.HomeBytes); at < bigEnd; at += sealfs.ChunkBytes {
				if ino.DataShard(at, testShards) == other {
					other, at = (other+2)%testShards, sealfs.HomeBytes-sealfs.ChunkBytes
				}
			}
			move(h[there], other, off)
		}, nil},
		{"the file is lost", []ID{PartNoFile, LiveWrong}, -1, func(h []*hurt) {
			k := meta.InodeKey(testShards, ino)
			h[home].del(k[:])
			h[home].unlink(z.a, "big")
			h[home].inode(z.a, func(in *meta.Inode) { in.Size-- })
			h[home].usage(ino, testVolume, -block, -1)
		}, nil},
		{"file's generation", nil, home, file(func(in *meta.Inode) { in.Gen++ }), nil},
		{"file's bound", []ID{PartBound}, -1, file(func(in *meta.Inode) { in.Bound -= sealfs.ChunkBytes }), nil},
		{"file without chunks", []ID{PartNoFile}, -1, file(func(in *meta.Inode) { in.Gen, in.Bound = 0, 0 }), nil},
		{"file's cut", []ID{TailRow}, home, file(func(in *meta.Inode) { in.Cut = in.Bound }), nil},
		{"file's volume", []ID{EntryVolume, PartVolume}, -1, func(h []*hurt) {
			h[home].inode(ino, func(in *meta.Inode) { in.Volume++ })
			h[home].usage(ino, testVolume, -block, -1)
			h[home].usage(ino, testVolume+1, block, 1)
		}, nil},
	} {
		t.Run(x.name, func(t *testing.T) {
			var h []*hurt
			for _, m := range all {
				h = append(h, &hurt{images: m.clone(), t: t})
			}
			x.do(h)
			rep := together(t, []images{h[0].images, h[1].images}, nil)
			if got := rep.numbers(); !slices.Equal(got, x.want) {
				t.Errorf("%v, want %v", got, x.want)
			}
			mended(t, []images{h[0].images.clone(), h[1].images.clone()}, nil, x.left)
			if x.at >= 0 && len(rep.Stores[1-x.at].IDs()) != 0 {
				t.Errorf("on the other store: %v", rep.Stores[1-x.at].IDs())
			}
		})
	}
}
