package fsck

import (
	"bytes"
	"fmt"
	"slices"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
)

// second judges the records that belong to inodes.
func (r *reader) second(at ref, key, val []byte) error {
	k, err := meta.DecodeKey(key)
	if err != nil {
		return nil
	}
	var e meta.Extent
	shards := r.w.shards
	if k.Kind == meta.KindExtent {
		if err := meta.DecodeExtent(val, k.Pos, &e); err != nil {
			return r.damaged(&k, key, err)
		}
		if uint32(k.Shard) < shards && r.chunk(at, &k, key, &e) {
			return nil
		}
	}
	if k.Ino != 0 && k.Ino.Home(shards) != k.Shard && k.Kind != meta.KindPart && k.Kind != meta.KindOutbox && k.Kind != meta.KindPartition || uint32(k.Shard) >= shards {
		r.problem(ShardWrong, name(k.Ino), "key %x stands in shard %d of %d", key, k.Shard, shards)
		r.mendPlace(key, &k)
		return nil
	}
	switch k.Kind {
	case meta.KindInode:
		if fault := r.unissued(k.Ino); fault != "" {
			r.problem(InoBeyond, name(k.Ino), "%s", fault)
			if possible(k.Ino, shards) {
				r.mendCounter(k.Ino)
			} else {
				r.mendRow(InoBeyond, name(k.Ino), key, "the inode is saved and removed: no shard issues such a number")
			}
		}
	case meta.KindEntry:
		return r.entry(&k, key, val)
	case meta.KindExtent:
		i := r.lookup(k.Ino)
		switch {
		case i == nil && r.holey(): // its inode may be among what is missing
		case i == nil || i.typ != typeFile:
			r.problem(ExtentNoFile, name(k.Ino), "%d bytes at %d", e.Len, e.Off)
			r.mendNoFile(key, k.Ino)
		case i.more == 0:
			r.problem(BytesWrong, name(k.Ino), "all its bytes are in the inode, and there is an extent at %d", e.Off)
			r.mendBytes(k.Ino)
			r.extent(at, i, &detail{ino: k.Ino, size: e.Off + uint64(e.Len)}, &e)
		default:
			r.extent(at, i, &r.more[i.more], &e)
		}
	case meta.KindAttribute:
		return r.attribute(&k, key, val)
	case meta.KindSymlink:
		r.target(&k, val)
	case meta.KindOrphan:
		return r.orphan(&k, key, val)
	case meta.KindLock:
		return r.lock(&k, key, val)
	case meta.KindSession:
		return r.sessionRow(&k, key, val)
	}
	return nil
}

// entry judges an entry of a directory.
func (r *reader) entry(k *meta.Key, key, val []byte) error {
	var e meta.Entry
	if err := meta.DecodeEntry(val, k.Ino, k.Pos, &e); err != nil {
		return r.damaged(k, key, err)
	}
	r.rep.Entries++
	where := func() string { return fmt.Sprintf("directory %d, entry %q", k.Ino, e.Name) }
	dir := r.lookup(k.Ino)
	if dir == nil && !r.holey() || dir != nil && dir.typ != typeDir {
		r.problem(EntryNoDir, where(), "inode %d", k.Ino)
		r.mendNoDir(where(), key, &e)
		return nil // nobody can reach it: it is no name
	}
	if s := string(e.Name); s == "." || s == ".." || bytes.ContainsAny(e.Name, "/\x00") {
		r.problem(EntryName, where(), "%x", e.Name)
		r.mendName(EntryName, where(), key, &e)
	}
	refers := dir != nil
	if dir != nil {
		d := &r.more[dir.more]
		if r.leftover(k, d, where) {
			return nil // it counts where it has gone to
		}
		d.found++
		refers = d.asInode().InUse()
		if want := firstCookie(d.self(), r.volumes[dir.volume], e.Name); k.Pos&^(ordinals-1) != want {
			r.problem(EntryCookie, where(), "%#x, its name's are from %#x on", k.Pos, want)
			r.mendName(EntryCookie, where(), key, &e)
		}
	}
	if g := k.Pos &^ (ordinals - 1); k.Ino != r.groupDir || g != r.group {
		r.groupDir, r.group, r.groupNames = k.Ino, g, r.groupNames[:0]
	}
	if slices.ContainsFunc(r.groupNames, func(b []byte) bool { return bytes.Equal(b, e.Name) }) {
		r.problem(EntryTwice, where(), "the second at cookie %#x", k.Pos)
		r.mendName(EntryTwice, where(), key, &e)
	}
	r.groupNames = append(r.groupNames, e.Name)
	if refers && r.owns(k.Ino) {
		r.refer(dir, r.after(dir, &e))
	}
	return nil
}

// unissued returns what is wrong with the number of an inode, or "".
func (n *namespace) unissued(ino sealfs.Ino) string {
	shards := n.w.shards
	next := n.counters[ino.Home(shards)]
	if q := uint64(ino) / uint64(shards); q >= next || q < sealfs.InoCounterMin {
		return fmt.Sprintf("shard %d will issue counter %d next, this is %d", ino.Home(shards), next, q)
	}
	return ""
}

// extent judges an extent against its file, and notes which part of the log it
// refers to. The extent in the inode comes first, the others in order.
func (r *reader) extent(at ref, i *inode, d *detail, e *meta.Extent) {
	if e.Off/block < d.blocks {
		r.problem(ExtentOverlap, name(d.ino), "block %d", e.Off/block)
		r.mendOverlap(d.ino)
	}
	end := e.Off + uint64(e.Len)
	if end > d.size && (i.flags&tail == 0 || e.Off < d.size) {
		r.problem(ExtentBeyond, name(d.ino), "bytes %d to %d of %d", e.Off, end, d.size)
		r.mendBeyond(d.ino)
	}
	if i.flags&chunked != 0 && end > sealfs.HomeBytes {
		r.problem(ChunkPlace, name(d.ino), "bytes %d to %d stand at home", e.Off, end)
		if key, _, err := r.c.record(at); err == nil {
			if k, err := meta.DecodeKey(key); err == nil && k.Kind == meta.KindExtent {
				r.mendChunk(key, k, e)
			}
		}
	}
	d.blocks = e.Off/block + uint64(e.Blocks())
	d.found += uint64(e.Stored())
	r.piece(at, d.ino, e)
}

// piece notes which part of the log an extent refers to.
func (r *reader) piece(at ref, ino sealfs.Ino, e *meta.Extent) {
	slot, ok := r.c.slotOf[e.Addr.Seq()]
	if !ok {
		if !r.c.tableHoles {
			if key, _, err := r.c.record(at); err == nil && len(r.c.moving) > 0 {
				if _, moving := r.c.moving[string(key)]; moving {
					return
				}
			}
			r.problem(ExtentNowhere, name(ino), "%d bytes of the file at %d lie at %v", e.Len, e.Off, e.Addr)
			r.out.mendPiece(r.c, ExtentNowhere, at, ino, e)
		}
		return
	}
	r.extents[slot] = append(r.extents[slot], piece{off: e.Addr.Off(), n: e.Stored(), ref: at})
}

// attribute judges a part of an extended attribute.
func (r *reader) attribute(k *meta.Key, key, val []byte) error {
	i := r.lookup(k.Ino)
	if i != nil && (i.typ != typeDir || !r.more[i.more].asInode().IsPartition()) {
		r.charge(k.Shard, r.volumes[i.volume], int64(len(val)), 0)
	}
	if k.Part != 0 {
		if k.Ino != r.attr.Ino || k.Hash != r.attr.Hash || k.Ordinal != r.attr.Ordinal || k.Part != r.attrPart || len(val) != min(r.attrLeft, partBytes) || len(val) == 0 {
			if !r.holey() {
				r.problem(AttrParts, name(k.Ino), "part %d of attribute %#x.%d", k.Part, k.Hash, k.Ordinal)
				r.mendAttr(AttrParts, *k)
			}
			r.attrLeft = 0
			return nil
		}
		r.attrPart++
		r.attrLeft -= len(val)
		return nil
	}
	r.endAttr()
	var a meta.Attribute
	if err := meta.DecodeAttribute(val, &a); err != nil {
		return r.damaged(k, key, err)
	}
	r.attr, r.attrPart, r.attrLeft = *k, 1, a.Total-len(a.Value)
	if i == nil {
		if !r.holey() {
			r.problem(AttrNoInode, name(k.Ino), "attribute %q", a.Name)
			r.mendAttr(AttrNoInode, *k)
		}
		return nil
	}
	if want := attrHash(k.Ino, r.volumes[i.volume], a.Name); k.Hash != want {
		r.problem(AttrHash, name(k.Ino), "attribute %q under %#x, not %#x", a.Name, k.Hash, want)
		r.mendHash(*k, want)
	}
	if i.more == 0 {
		r.problem(AttrNames, name(k.Ino), "it counts none and has %q", a.Name)
		r.mendAttrNames(k.Ino)
		return nil
	}
	d := &r.more[i.more]
	d.attrs -= int32(len(a.Name) + 1)
	d.gotACLs |= aclBit(a.Name)
	return nil
}

// endAttr judges whether the last attribute had all its parts.
func (r *reader) endAttr() {
	if r.attrLeft > 0 && !r.holey() {
		r.problem(AttrParts, name(r.attr.Ino), "attribute %#x.%d lacks its last %d bytes", r.attr.Hash, r.attr.Ordinal, r.attrLeft)
		r.mendAttr(AttrParts, r.attr)
	}
	r.attrLeft = 0
}

// target judges a part of a long target.
func (r *reader) target(k *meta.Key, val []byte) {
	i := r.lookup(k.Ino)
	if i == nil && r.holey() {
		return
	}
	if i == nil || i.typ != typeLink || i.more == 0 {
		r.problem(TargetParts, name(k.Ino), "part %d belongs to no symbolic link of that length", k.Part)
		r.mendTarget(k.Ino)
		return
	}
	d := &r.more[i.more]
	if want := uint64(k.Part) * partBytes; d.found != want || len(val) == 0 || uint64(len(val)) != min(d.size-min(d.size, want), partBytes) {
		r.problem(TargetParts, name(k.Ino), "part %d of %d bytes follows %d of %d", k.Part, len(val), d.found, d.size)
		r.mendTarget(k.Ino)
	}
	d.found += uint64(len(val))
}

// orphan judges a row of the orphan table.
func (r *reader) orphan(k *meta.Key, key, val []byte) error {
	nameless, tailed, err := meta.DecodeOrphan(val)
	if err != nil {
		return r.damaged(k, key, err)
	}
	i := r.lookup(k.Ino)
	if i == nil {
		if !r.holey() {
			r.problem(OrphanRow, name(k.Ino), "it does not exist")
			r.mendRow(OrphanRow, name(k.Ino), key, "the row is removed")
		}
		return nil
	}
	if nameless && i.flags&renamed == 0 {
		i.flags |= rowNameless
	}
	if tailed {
		i.flags |= rowTail
	}
	return nil
}

// lock judges a lock. Those of an inode and class come in order of their starts.
func (r *reader) lock(k *meta.Key, key, val []byte) error {
	l, err := meta.DecodeLock(val, k)
	if err != nil {
		return r.damaged(k, key, err)
	}
	if r.lookup(k.Ino) == nil && !r.holey() {
		r.problem(LockNoInode, name(k.Ino), "bytes %d to %d, session %d", l.Start, l.End, l.Session)
		r.mendRow(LockNoInode, name(k.Ino), key, "the lock is removed")
	}
	if k.Ino != r.lockIno || k.Class != r.lockClass {
		r.lockIno, r.lockClass, r.locks = k.Ino, k.Class, r.locks[:0]
	}
	r.locks = slices.DeleteFunc(r.locks, func(o meta.LockRow) bool { return o.End < l.Start })
	for i := range r.locks {
		o := &r.locks[i]
		same := o.Session == l.Session && o.Owner == l.Owner
		if same || o.Type == op.WriteLock || l.Type == op.WriteLock {
			r.problem(LockOverlap, name(k.Ino), "bytes %d to %d of session %d and %d to %d of session %d", o.Start, o.End, o.Session, l.Start, l.End, l.Session)
			r.mendRow(LockOverlap, name(k.Ino), key, "the second lock is removed")
			break
		}
	}
	r.locks = append(r.locks, l)
	return nil
}

// sessionRow judges a session's state or one of its result rows.
func (r *reader) sessionRow(k *meta.Key, key, val []byte) error {
	if k.Shard != r.session.Shard || k.Session != r.session.Session || k.Pos == 0 {
		r.endSession()
		r.session = *k
	}
	if k.Pos == 0 {
		s, err := meta.DecodeSession(val)
		if err != nil {
			return r.damaged(k, key, err)
		}
		r.sessionRows = int64(s.Rows)
		return nil
	}
	if _, err := meta.DecodeResult(val); err != nil {
		return r.damaged(k, key, err)
	}
	r.sessionRows--
	return nil
}

func (r *reader) endSession() {
	if r.sessionRows != 0 && !r.holey() {
		where := fmt.Sprintf("shard %d, session %d", r.session.Shard, r.session.Session)
		r.problem(SessionRows, where, "off by %d", r.sessionRows)
		r.mendSession(r.session.Shard, r.session.Session, where)
	}
	r.sessionRows = 0
}
