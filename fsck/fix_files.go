package fsck

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"sealfs"
	"sealfs/fsck/mend"
	"sealfs/meta"
)

// Repairs of what belongs to files: extents, attributes, targets, parts.

// mendNoFile plans what becomes of an extent of no file: one that is gone is made again.
func (r *reader) mendNoFile(key []byte, ino sealfs.Ino) {
	key = bytes.Clone(key)
	r.mendBy(ExtentNoFile, name(ino), func(e *editor) string {
		var in meta.Inode
		old := e.get(key)
		if old == nil {
			return ""
		}
		if !e.inode(ino, &in) && possible(ino, e.c.w.shards) {
			return e.rebuildFile(ino)
		}
		if in.Mode>>12 == typeFile {
			return "" // it has been made again
		}
		e.c.save(Saved{Problem: ExtentNoFile, Where: name(ino), Key: key, Old: bytes.Clone(old), Data: e.c.dataOf(key, old)})
		e.del(key)
		return "the extent is saved with its data and removed"
	})
}

// rebuildFile makes a file again of which only extents are left.
func (e *editor) rebuildFile(ino sealfs.Ino) string {
	w := e.c.w
	home := ino.Home(w.shards)
	now := e.lastTime(home)
	in := meta.Inode{Ino: ino, Mode: typeFile<<12 | 0o600, Nlink: 1, Version: 1, Volume: e.volumeOf(ino), Atime: now, Mtime: now, Ctime: now, Btime: now}
	list, _ := e.extents(ino)
	for i := range list {
		in.Size = max(in.Size, list[i].Off+uint64(list[i].Len))
		in.Bytes += uint64(list[i].Stored())
	}
	for _, n := range w.stores {
		for i := range n.parts {
			if p := &n.parts[i]; p.ino == ino {
				in.Gen, in.Bound, in.Size = max(in.Gen, p.Gen), max(in.Bound, p.Part.Bound), max(in.Size, p.end)
			}
		}
	}
	counterFix(ino)(e)
	e.putInode(&in)
	e.charge(home, in.Volume, int64(in.Bytes), 1)
	return fmt.Sprintf("file %d is made again, of %d bytes", ino, in.Size)
}

// mendOverlap plans to remove one of the extents of a file that overlap: one that
// does not verify, or the older one.
func (r *reader) mendOverlap(ino sealfs.Ino) {
	r.mendBy(ExtentOverlap, name(ino), func(e *editor) string {
		list, keys := e.extents(ino)
		worst := -1
		better := func(a, b int) bool { // a is to be removed rather than b
			va, vb := e.c.verifies(ino, &list[a]), e.c.verifies(ino, &list[b])
			if va != vb {
				return vb
			}
			return list[a].Addr < list[b].Addr
		}
		var over []int
		for i := range list {
			x := &list[i]
			for j := range list {
				y := &list[j]
				if i != j && x.Off/block < y.Off/block+uint64(y.Blocks()) && y.Off/block < x.Off/block+uint64(x.Blocks()) {
					over = append(over, i)
					break
				}
			}
		}
		for _, i := range over {
			if worst < 0 || better(i, worst) {
				worst = i
			}
		}
		if worst < 0 {
			return ""
		}
		x := &list[worst]
		data, _ := e.c.bytesOf(x)
		s := Saved{Problem: ExtentOverlap, Where: fmt.Sprintf("%s, byte %d", name(ino), x.Off), Key: keys[worst], Data: data}
		if keys[worst] == nil {
			e.change(ino, func(in *meta.Inode) {
				s.Old = in.Append(nil)
				in.Bytes -= min(in.Bytes, uint64(in.First.Stored()))
				in.First = meta.Extent{}
			})
		} else {
			s.Old = bytes.Clone(e.get(keys[worst]))
			e.del(keys[worst])
			e.change(ino, func(in *meta.Inode) {
				in.Bytes = max(in.Bytes-min(in.Bytes, uint64(x.Stored())), uint64(in.First.Stored()))
			})
		}
		e.c.save(s)
		var in meta.Inode
		if e.inode(ino, &in) {
			e.charge(ino.Home(e.c.w.shards), in.Volume, -int64(x.Stored()), 0)
		}
		return fmt.Sprintf("the extent of %d bytes at %d is saved with its data and removed", x.Len, x.Off)
	})
}

// mendBeyond plans to make a file as long as its data reaches.
func (r *reader) mendBeyond(ino sealfs.Ino) {
	r.mendBy(ExtentBeyond, name(ino), func(e *editor) string {
		list, _ := e.extents(ino)
		what := ""
		e.change(ino, func(in *meta.Inode) {
			for i := range list {
				if end := list[i].Off + uint64(list[i].Len); end > in.Size && end <= sealfs.FileSizeMax && in.Flags&tail == 0 {
					what = fmt.Sprintf("its size becomes %d, not %d", end, in.Size)
					in.Size = end
				}
			}
			if what == "" && in.Flags&tail != 0 {
				// What was cut off begins in the middle of an extent.
				in.Flags &^= tail
				what = "nothing of it is cut off any more"
			}
		})
		return what
	})
}

// mendPiece plans to write an extent anew.
func (s *sink) mendPiece(c *checker, id ID, at ref, ino sealfs.Ino, x *meta.Extent) {
	key, _, err := c.record(at)
	if err != nil {
		return
	}
	key = bytes.Clone(key)
	v := mend.Move{Key: key, Ino: ino, Off: x.Off, From: x.Addr, Blind: true}
	s.mendBy(c, id, fmt.Sprintf("%s, byte %d", name(ino), x.Off), func(e *editor) string {
		if _, known := c.moving[string(key)]; known || e.get(key) == nil {
			return ""
		}
		if c.moving == nil {
			c.moving = map[string]mend.Move{}
		}
		c.moving[string(key)] = v
		c.w.effects++
		return "it is written anew, with the bytes that are there; what of them does not verify is an I/O error for those who read it"
	})
}

// mendShared plans to write anew those of two extents at one place that do not verify there.
func (s *sink) mendShared(c *checker, one, two ref) {
	var wrong []ref
	for _, at := range []ref{one, two} {
		if ino, x, err := c.extentAt(at); err == nil && !c.verifies(ino, &x) {
			wrong = append(wrong, at)
		}
	}
	if len(wrong) == 0 {
		wrong = []ref{two}
	}
	for _, at := range wrong {
		if ino, x, err := c.extentAt(at); err == nil {
			s.mendPiece(c, ExtentShared, at, ino, &x)
		}
	}
}

// attrRows returns the rows of an attribute.
func (e *editor) attrRows(k *meta.Key) []row {
	key := meta.AttributeKey(e.c.w.shards, k.Ino, k.Hash, k.Ordinal, 0)
	return e.under(key[:len(key)-2], 1<<16)
}

// mendAttr plans to save and remove all parts of an attribute.
func (r *reader) mendAttr(id ID, k meta.Key) {
	r.mendBy(id, name(k.Ino), func(e *editor) string {
		rows := e.attrRows(&k)
		if len(rows) == 0 {
			return ""
		}
		bytesGone := int64(0)
		names, acl := uint32(0), uint8(0)
		for i, x := range rows {
			e.c.save(Saved{Problem: id, Where: name(k.Ino), Key: x.key, Old: bytes.Clone(x.val)})
			bytesGone += int64(len(x.val))
			var a meta.Attribute
			if i == 0 && meta.DecodeAttribute(x.val, &a) == nil {
				names, acl = uint32(len(a.Name)+1), aclBit(a.Name)
			}
			e.del(x.key)
		}
		e.change(k.Ino, func(in *meta.Inode) {
			in.Names -= min(in.Names, names)
			in.Flags &^= acl
			if !in.IsPartition() {
				e.charge(k.Shard, in.Volume, -bytesGone, 0)
			}
		})
		return fmt.Sprintf("the attribute's %s saved and removed", plural(len(rows), "row is", "rows are"))
	})
}

// mendHash plans to put an attribute under the hash of its name.
func (r *reader) mendHash(k meta.Key, want uint32) {
	r.mendBy(AttrHash, name(k.Ino), func(e *editor) string {
		rows := e.attrRows(&k)
		for ordinal := range ordinals {
			to := k
			to.Hash, to.Ordinal = want, uint8(ordinal)
			if len(e.attrRows(&to)) > 0 {
				continue
			}
			for _, x := range rows {
				val := bytes.Clone(x.val)
				at := meta.AttributeKey(e.c.w.shards, k.Ino, want, uint8(ordinal), binary.BigEndian.Uint16(x.key[len(x.key)-2:]))
				e.del(x.key)
				e.put(at[:], val)
			}
			return fmt.Sprintf("it stands under %#x.%d", want, ordinal)
		}
		return ""
	})
}

// mendTarget plans what becomes of the parts of a target that are no whole.
func (r *reader) mendTarget(ino sealfs.Ino) { r.mendBy(TargetParts, name(ino), targetFix(ino)) }

func (n *namespace) mendTarget(ino sealfs.Ino) { n.c.mendBy(TargetParts, name(ino), targetFix(ino)) }

func targetFix(ino sealfs.Ino) func(e *editor) string {
	return func(e *editor) string {
		w := e.c.w
		k := meta.SymlinkKey(w.shards, ino, 0)
		rows := e.under(k[:len(k)-1], 256)
		size, whole := 0, len(rows) > 0
		for i, x := range rows {
			whole = whole && int(x.key[len(x.key)-1]) == i && (len(x.val) == partBytes || i == len(rows)-1)
			size += len(x.val)
		}
		whole = whole && size > inlineTarget && size <= sealfs.SymlinkMax && possible(ino, w.shards)
		var in meta.Inode
		switch ok := e.inode(ino, &in); {
		case !ok && whole:
			now := e.lastTime(ino.Home(w.shards))
			in = meta.Inode{Ino: ino, Mode: typeLink<<12 | 0o777, Nlink: 1, Version: 1, Size: uint64(size), Volume: e.volumeOf(ino), Atime: now, Mtime: now, Ctime: now, Btime: now}
			counterFix(ino)(e)
			e.putInode(&in)
			e.charge(ino.Home(w.shards), in.Volume, 0, 1)
			return fmt.Sprintf("symbolic link %d is made again", ino)
		case ok && in.Mode>>12 == typeLink && in.Size > inlineTarget && whole && uint64(size) == in.Size:
			return ""
		}
		for _, x := range rows {
			e.c.save(Saved{Problem: TargetParts, Where: name(ino), Key: x.key, Old: bytes.Clone(x.val)})
			e.del(x.key)
		}
		if in.Ino == 0 || in.Mode>>12 != typeLink || in.Size <= inlineTarget {
			if len(rows) == 0 {
				return ""
			}
			return "the parts are saved and removed"
		}
		in.Target = fmt.Appendf(nil, "lost-target-of-inode-%d", ino)
		in.Size = uint64(len(in.Target))
		e.putInode(&in)
		return fmt.Sprintf("the parts are saved and removed, the target becomes %q", in.Target)
	}
}

// mendBytes plans to count the stored bytes of a file anew.
func (n *namespace) mendBytes(ino sealfs.Ino) { n.c.mendBy(BytesWrong, name(ino), bytesFix(ino)) }

func (r *reader) mendBytes(ino sealfs.Ino) { r.mendBy(BytesWrong, name(ino), bytesFix(ino)) }

func bytesFix(ino sealfs.Ino) func(e *editor) string {
	return func(e *editor) string {
		list, _ := e.extents(ino)
		var in meta.Inode
		if !e.inode(ino, &in) {
			return ""
		}
		was := in.Bytes
		in.Bytes = 0
		for i := range list {
			in.Bytes += uint64(list[i].Stored())
		}
		if in.Bytes == was {
			return ""
		}
		e.putInode(&in)
		e.charge(ino.Home(e.c.w.shards), in.Volume, int64(in.Bytes)-int64(was), 0)
		return fmt.Sprintf("it counts %d bytes, not %d", in.Bytes, was)
	}
}

// mendAttrNames plans to count the names of an inode's attributes anew.
func (n *namespace) mendAttrNames(ino sealfs.Ino) { n.c.mendBy(AttrNames, name(ino), namesFix(ino)) }

func (r *reader) mendAttrNames(ino sealfs.Ino) { r.mendBy(AttrNames, name(ino), namesFix(ino)) }

func namesFix(ino sealfs.Ino) func(e *editor) string {
	return func(e *editor) string {
		k := meta.AttributeKey(e.c.w.shards, ino, 0, 0, 0)
		n, acls := 0, uint8(0)
		for _, x := range e.under(k[:11], 1<<20) {
			var a meta.Attribute
			if binary.BigEndian.Uint16(x.key[len(x.key)-2:]) == 0 && meta.DecodeAttribute(x.val, &a) == nil {
				n += len(a.Name) + 1
				acls |= aclBit(a.Name)
			}
		}
		if n > sealfs.XattrListMax {
			return ""
		}
		e.change(ino, func(in *meta.Inode) { in.Names, in.Flags = uint32(n), in.Flags&^aclBoth|acls&aclsOf(in) })
		return fmt.Sprintf("they count %d bytes", n)
	}
}

// mendPartOverlap plans to remove the extents of a part that overlap those before, as mendOverlap does.
func (r *reader) mendPartOverlap(s sealfs.Shard, ino sealfs.Ino) {
	r.mendBy(ExtentOverlap, name(ino), func(e *editor) string {
		k := meta.PartExtentKey(s, ino, 0)
		var prev *meta.Extent
		var prevKey []byte
		for _, x := range e.under(k[:11], 1<<40) {
			var y meta.Extent
			if meta.DecodeExtent(x.val, binary.BigEndian.Uint64(x.key[11:]), &y) != nil || y.Off < sealfs.HomeBytes {
				continue
			}
			if prev == nil || y.Off/block >= prev.Off/block+uint64(prev.Blocks()) {
				prev, prevKey = &y, x.key
				continue
			}
			worse, worseKey := prev, prevKey
			if v := e.c.verifies(ino, prev); v != e.c.verifies(ino, &y) && v || v == e.c.verifies(ino, &y) && y.Addr < prev.Addr {
				worse, worseKey = &y, x.key
			}
			old := bytes.Clone(e.get(worseKey))
			e.c.save(Saved{Problem: ExtentOverlap, Where: fmt.Sprintf("%s, byte %d", name(ino), worse.Off), Key: worseKey, Old: old, Data: e.c.dataOf(worseKey, old)})
			e.del(worseKey)
			e.uncount(&meta.Key{Shard: s, Ino: ino}, worse)
			return fmt.Sprintf("the extent of %d bytes at %d is saved with its data and removed", worse.Len, worse.Off)
		}
		return ""
	})
}

// mendChunk plans what becomes of an extent in a shard where it does not belong.
func (r *reader) mendChunk(key []byte, k meta.Key, x *meta.Extent) {
	key, off := bytes.Clone(key), x.Off
	r.mendBy(ChunkPlace, name(k.Ino), func(e *editor) string {
		w := e.c.w
		old := bytes.Clone(e.get(key))
		var y meta.Extent
		if old == nil || meta.DecodeExtent(old, k.Pos, &y) != nil {
			return ""
		}
		e.c.save(Saved{Problem: ChunkPlace, Where: fmt.Sprintf("%s, byte %d", name(k.Ino), off), Key: key, Old: old, Data: e.c.dataOf(key, old)})
		e.del(key)
		e.uncount(&k, &y)
		to := k.Ino.DataShard(off, w.shards)
		at := meta.PartExtentKey(to, k.Ino, k.Pos)
		end := off + uint64(y.Len)
		if w.owner[to] != e.c.names || to == k.Shard || end > off/sealfs.ChunkBytes*sealfs.ChunkBytes+sealfs.ChunkBytes || e.get(at[:]) != nil || !e.c.verifies(k.Ino, &y) {
			return fmt.Sprintf("the extent of %d bytes at %d is saved with its data and removed", y.Len, off)
		}
		e.put(at[:], old)
		return fmt.Sprintf("the extent of %d bytes at %d is moved to shard %d", y.Len, off, to)
	})
}

// uncount takes an extent that has been removed from what its file or part counts.
func (e *editor) uncount(k *meta.Key, x *meta.Extent) {
	n := uint64(x.Stored())
	pk := meta.PartKey(k.Shard, k.Ino)
	if b := e.get(pk[:]); b != nil && x.Off >= sealfs.HomeBytes {
		if p, err := meta.DecodePart(b); err == nil && p.Bytes > n {
			p.Bytes -= n
			e.put(pk[:], p.Append(nil))
			e.charge(k.Shard, p.Volume, -int64(n), 0)
		} else if err == nil {
			e.del(pk[:])
			e.charge(k.Shard, p.Volume, -int64(p.Bytes), 0)
		}
		return
	}
	if k.Ino.Home(e.c.w.shards) == k.Shard {
		e.change(k.Ino, func(in *meta.Inode) {
			if in.Bytes >= n+uint64(in.First.Stored()) {
				in.Bytes -= n
				e.charge(k.Shard, in.Volume, -int64(n), 0)
			}
		})
	}
}

// mendNoPart plans to make the part of a file in a shard again.
func (r *reader) mendNoPart(s sealfs.Shard, ino sealfs.Ino) {
	r.mendBy(ChunkNoPart, name(ino), func(e *editor) string {
		w := e.c.w
		k := meta.PartKey(s, ino)
		if e.get(k[:]) != nil {
			return ""
		}
		var in meta.Inode
		home := w.editor(ino)
		if home == nil || !home.inode(ino, &in) || in.Bound == 0 {
			in = meta.Inode{Volume: e.volumeOf(ino)} // the file is made of it afterwards
		}
		p := meta.Part{Gen: in.Gen, Bound: max(in.Bound, sealfs.HomeBytes+1), Volume: in.Volume}
		xk := meta.PartExtentKey(s, ino, 0)
		for _, x := range e.under(xk[:11], 1<<40) {
			var y meta.Extent
			if meta.DecodeExtent(x.val, binary.BigEndian.Uint64(x.key[11:]), &y) == nil && y.Off >= sealfs.HomeBytes {
				p.Bytes += uint64(y.Stored())
				p.Bound = max(p.Bound, y.Off+uint64(y.Len))
			}
		}
		if !possible(ino, w.shards) {
			for _, x := range e.under(xk[:11], 1<<40) {
				e.c.save(Saved{Problem: ChunkNoPart, Where: name(ino), Key: x.key, Old: bytes.Clone(x.val), Data: e.c.dataOf(x.key, x.val)})
				e.del(x.key)
			}
			return "the extents are saved with their data and removed: no shard issues such a number"
		}
		if p.Bytes == 0 {
			return ""
		}
		e.put(k[:], p.Append(nil))
		e.charge(s, p.Volume, int64(p.Bytes), 0)
		return fmt.Sprintf("the part in shard %d is made again, of %d bytes", s, p.Bytes)
	})
}

// mendPart plans to change a part, or its file as far as that is given.
func (n *namespace) mendPart(id ID, p *chunks, fn func(e *editor, part *meta.Part, file *editor, in *meta.Inode) string) {
	where, s, ino := p.where(), p.shard, p.ino
	n.c.mendBy(id, where, func(e *editor) string {
		k := meta.PartKey(s, ino)
		b := e.get(k[:])
		part, err := meta.DecodePart(b)
		if b == nil || err != nil {
			return ""
		}
		was := part
		home := n.w.editor(ino)
		var in meta.Inode
		if home == nil || !home.inode(ino, &in) {
			in.Ino = 0
		}
		what := fn(e, &part, home, &in)
		switch {
		case what == "" || part == was:
		case part.Bytes == 0:
			e.del(k[:])
		default:
			e.put(k[:], part.Append(nil))
		}
		if part.Bytes != was.Bytes || part.Volume != was.Volume {
			e.charge(s, was.Volume, -int64(was.Bytes), 0)
			e.charge(s, part.Volume, int64(part.Bytes), 0)
		}
		return what
	})
}

// mendFileOf plans to make the file of a part again, or to give it chunks.
func (n *namespace) mendFileOf(p *chunks) {
	n.mendPart(PartNoFile, p, func(_ *editor, part *meta.Part, file *editor, in *meta.Inode) string {
		switch {
		case file == nil:
			return ""
		case in.Ino == 0 && possible(p.ino, n.w.shards):
			return file.rebuildFile(p.ino)
		case in.Ino == 0:
			part.Bytes = 0
			return "the part is removed: no shard issues such a number"
		case in.Mode>>12 != typeFile || in.Chunked():
			return ""
		}
		in.Gen, in.Bound = max(in.Gen, part.Gen), max(part.Bound, p.end)
		in.Size = max(in.Size, p.end)
		file.putInode(in)
		return fmt.Sprintf("file %d has chunks up to %d", in.Ino, in.Bound)
	})
}

// mendBound plans to raise the bounds of a part and its file to what is there.
func (n *namespace) mendBound(p *chunks) {
	n.mendPart(PartBound, p, func(_ *editor, part *meta.Part, file *editor, in *meta.Inode) string {
		part.Bound = max(part.Bound, p.end)
		if file != nil && in.Ino != 0 && in.Chunked() && max(in.Bound, in.Cut) < part.Bound {
			in.Bound = part.Bound
			file.putInode(in)
		} else if file != nil && in.Ino != 0 && in.Chunked() && part.Gen == in.Gen && in.Bound < part.Bound {
			in.Bound = part.Bound
			file.putInode(in)
		}
		return fmt.Sprintf("the bound of part and file is at least %d", part.Bound)
	})
}

// moves returns the extents that are to be written anew.
func (c *checker) moves() (list []mend.Move) {
	for _, v := range c.moving {
		list = append(list, v)
	}
	for key, v := range c.strays {
		if _, known := c.moving[key]; !known {
			list = append(list, v)
		}
	}
	for slot := range c.evacuate {
		for _, p := range c.extents[slot] {
			key, _, err := c.record(p.ref)
			if err != nil {
				continue
			}
			_, known := c.moving[string(key)]
			if _, stray := c.strays[string(key)]; known || stray {
				continue
			}
			if ino, x, err := c.extentAt(p.ref); err == nil {
				list = append(list, mend.Move{Key: bytes.Clone(key), Ino: ino, Off: x.Off, From: x.Addr, Counted: true})
			}
		}
	}
	slices.SortFunc(list, func(a, b mend.Move) int { return bytes.Compare(a.Key, b.Key) })
	return list
}
