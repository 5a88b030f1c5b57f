package fsck

import (
	"cmp"
	"fmt"
	"slices"

	"sealfs"
	"sealfs/meta"
)

// A large file has chunks: what lies at or beyond HomeBytes of it stands in the
// shards of the chunks, with one row for all chunks of the file in the shard, the part.

// large is what is kept of an inode with chunks.
type large struct{ gen, bound, cut uint64 }

// chunks is what is kept of a part.
type chunks struct {
	meta.Part
	shard  sealfs.Shard
	ino    sealfs.Ino
	found  uint64 // bytes of its extents
	blocks uint64 // one more than the last block of the extents so far
	end    uint64 // of the extents so far, in the file
}

func (p *chunks) where() string { return fmt.Sprintf("%s, part in shard %d", name(p.ino), p.shard) }

// large takes note of an inode's chunks.
func (r *reader) large(i *inode, in *meta.Inode) {
	if !in.Chunked() {
		return
	}
	i.flags |= chunked
	if in.Cut != 0 {
		i.flags |= cutOff
	}
	r.files[in.Ino] = large{in.Gen, in.Bound, in.Cut}
}

// part takes note of a part. Its bytes count where it stands.
func (r *reader) part(k *meta.Key, p *meta.Part) {
	r.parts = append(r.parts, chunks{Part: *p, shard: k.Shard, ino: k.Ino})
	r.charge(k.Shard, p.Volume, int64(p.Bytes), 0)
	r.rep.Parts++
	r.rep.Bytes += p.Bytes
}

// partOf finds a part of this store, nil if there is none.
func (r *reader) partOf(s sealfs.Shard, ino sealfs.Ino) *chunks {
	if p := r.lastPart; p != nil && p.ino == ino && p.shard == s {
		return p
	}
	// They were noted in the order of their keys.
	at, ok := slices.BinarySearchFunc(r.parts, chunks{shard: s, ino: ino}, func(a, b chunks) int {
		return cmp.Or(cmp.Compare(a.shard, b.shard), cmp.Compare(a.ino, b.ino))
	})
	if !ok {
		return nil
	}
	r.lastPart = &r.parts[at]
	return r.lastPart
}

// chunk judges an extent that belongs to a chunk, and reports whether it does.
func (r *reader) chunk(at ref, k *meta.Key, key []byte, e *meta.Extent) bool {
	shards := r.w.shards
	if e.Off < sealfs.HomeBytes {
		return false
	}
	p, right := r.partOf(k.Shard, k.Ino), k.Ino.DataShard(e.Off, shards) == k.Shard
	if p == nil {
		i := r.lookup(k.Ino)
		if home := k.Ino.Home(shards) == k.Shard; !right || home && (i == nil || i.flags&chunked == 0) {
			return false // of a file that is whole, or of nothing at all
		}
		r.piece(at, k.Ino, e)
		if !r.holey() {
			r.problem(ChunkNoPart, name(k.Ino), "%d bytes at %d in shard %d", e.Len, e.Off, k.Shard)
			r.mendNoPart(k.Shard, k.Ino)
		}
		return true
	}
	r.piece(at, k.Ino, e)
	p.found += uint64(e.Stored())
	end := e.Off + uint64(e.Len)
	if !right || end > e.Off/sealfs.ChunkBytes*sealfs.ChunkBytes+sealfs.ChunkBytes {
		r.problem(ChunkPlace, p.where(), "%d bytes at %d belong in shard %d", e.Len, e.Off, k.Ino.DataShard(e.Off, shards))
		r.mendChunk(key, *k, e)
	}
	if e.Off/block < p.blocks {
		r.problem(ExtentOverlap, p.where(), "block %d", e.Off/block)
		r.mendPartOverlap(p.shard, k.Ino)
	}
	if end > p.Bound {
		r.problem(PartBound, p.where(), "bytes %d to %d, its bound is %d", e.Off, end, p.Bound)
		r.mendBound(p)
	}
	p.blocks, p.end = e.Off/block+uint64(e.Blocks()), max(p.end, end)
	return true
}

// finishParts judges the parts against their files, wherever these are.
func (n *namespace) finishParts() {
	c := n.c
	for j := range n.parts {
		p := &n.parts[j]
		if n.w.owner[p.shard] != n {
			continue
		}
		if p.found != p.Bytes {
			c.problem(PartBytes, p.where(), "%d, its extents hold %d", p.Bytes, p.found)
			n.mendPart(PartBytes, p, func(_ *editor, part *meta.Part, _ *editor, _ *meta.Inode) string {
				part.Bytes = p.found
				return fmt.Sprintf("it counts %d bytes", p.found)
			})
		}
		home, i := n.w.lookup(p.ino)
		switch {
		case home == nil || i == nil && home.c.holes:
			c.rep.NotJudged++
			continue
		case i == nil:
			c.problem(PartNoFile, p.where(), "it does not exist")
			n.mendFileOf(p)
			continue
		case i.flags&chunked == 0:
			c.problem(PartNoFile, p.where(), "type %#o, without chunks", i.typ)
			n.mendFileOf(p)
			continue
		}
		f := home.files[p.ino]
		if v := home.volumes[i.volume]; v != p.Volume {
			c.problem(PartVolume, p.where(), "volume %d, the file is in %d", p.Volume, v)
			n.mendPart(PartVolume, p, func(_ *editor, part *meta.Part, _ *editor, in *meta.Inode) string {
				if in.Ino == 0 {
					return ""
				}
				part.Volume = in.Volume
				return fmt.Sprintf("it is of volume %d", in.Volume)
			})
		}
		switch {
		case p.Gen > f.gen:
			c.problem(PartGen, p.where(), "generation %d, the file has %d", p.Gen, f.gen)
			n.mendPart(PartGen, p, func(_ *editor, part *meta.Part, _ *editor, in *meta.Inode) string {
				if in.Ino == 0 {
					return ""
				}
				part.Gen = min(part.Gen, in.Gen)
				return fmt.Sprintf("it is of generation %d", part.Gen)
			})
		case p.Gen == f.gen && p.Part.Bound > f.bound:
			c.problem(PartBound, p.where(), "its bound is %d, the file's %d", p.Part.Bound, f.bound)
			n.mendBound(p)
		case p.end > max(f.bound, f.cut):
			c.problem(PartBound, p.where(), "it holds bytes up to %d, the file's chunks end at %d", p.end, max(f.bound, f.cut))
			n.mendBound(p)
		}
	}
}
