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
func (n *namespace) second(at ref, key, val []byte) error {
	c := n.c
	k, err := meta.DecodeKey(key)
	if err != nil {
		return nil
	}
	var e meta.Extent
	shards := n.w.shards
	if k.Kind == meta.KindExtent {
		if err := meta.DecodeExtent(val, k.Pos, &e); err != nil {
			return n.damaged(&k, err)
		}
		if uint32(k.Shard) < shards && n.chunk(at, &k, &e) {
			return nil
		}
	}
	if k.Ino != 0 && k.Ino.Home(shards) != k.Shard && k.Kind != meta.KindPart || uint32(k.Shard) >= shards {
		c.problem(ShardWrong, name(k.Ino), "key %x stands in shard %d of %d", key, k.Shard, shards)
		return nil
	}
	switch k.Kind {
	case meta.KindInode:
		n.issued(k.Ino)
	case meta.KindEntry:
		return n.entry(&k, val)
	case meta.KindExtent:
		i := n.lookup(k.Ino)
		switch {
		case i == nil && c.holes: // its inode may be among what is missing
		case i == nil || i.typ != typeFile:
			c.problem(ExtentNoFile, name(k.Ino), "%d bytes at %d", e.Len, e.Off)
		case i.more == 0:
			c.problem(BytesWrong, name(k.Ino), "all its bytes are in the inode, and there is an extent at %d", e.Off)
			n.extent(at, i, &detail{ino: k.Ino, size: e.Off + uint64(e.Len)}, &e)
		default:
			n.extent(at, i, &n.more[i.more], &e)
		}
	case meta.KindAttribute:
		return n.attribute(&k, val)
	case meta.KindSymlink:
		n.target(&k, val)
	case meta.KindOrphan:
		return n.orphan(&k, val)
	case meta.KindLock:
		return n.lock(&k, val)
	case meta.KindSession:
		return n.sessionRow(&k, val)
	}
	return nil
}

// entry judges an entry of a directory.
func (n *namespace) entry(k *meta.Key, val []byte) error {
	c := n.c
	var e meta.Entry
	if err := meta.DecodeEntry(val, k.Ino, k.Pos, &e); err != nil {
		return n.damaged(k, err)
	}
	c.rep.Entries++
	where := func() string { return fmt.Sprintf("directory %d, entry %q", k.Ino, e.Name) }
	dir := n.lookup(k.Ino)
	if dir == nil && !c.holes || dir != nil && dir.typ != typeDir {
		c.problem(EntryNoDir, where(), "inode %d", k.Ino)
		return nil // nobody can reach it: it is no name
	}
	if s := string(e.Name); s == "." || s == ".." || bytes.ContainsAny(e.Name, "/\x00") {
		c.problem(EntryName, where(), "%x", e.Name)
	}
	if dir != nil {
		n.more[dir.more].found++
		if want := firstCookie(k.Ino, n.volumes[dir.volume], e.Name); k.Pos&^(ordinals-1) != want {
			c.problem(EntryCookie, where(), "%#x, its name's are from %#x on", k.Pos, want)
		}
	}
	if g := k.Pos &^ (ordinals - 1); k.Ino != n.groupDir || g != n.group {
		n.groupDir, n.group, n.groupNames = k.Ino, g, n.groupNames[:0]
	}
	if slices.ContainsFunc(n.groupNames, func(b []byte) bool { return bytes.Equal(b, e.Name) }) {
		c.problem(EntryTwice, where(), "the second at cookie %#x", k.Pos)
	}
	n.groupNames = append(n.groupNames, e.Name)
	if dir != nil && n.owns(k.Ino) {
		n.refer(dir, n.after(dir, &e))
	}
	return nil
}

// issued judges the number of an inode.
func (n *namespace) issued(ino sealfs.Ino) {
	shards := n.w.shards
	next := n.counters[ino.Home(shards)]
	if q := uint64(ino) / uint64(shards); q >= next || q < sealfs.InoCounterMin {
		n.c.problem(InoBeyond, name(ino), "shard %d will issue counter %d next, this is %d", ino.Home(shards), next, q)
	}
}

// extent judges an extent against its file, and notes which part of the log it
// refers to. The extent in the inode comes first, the others in order.
func (n *namespace) extent(at ref, i *inode, d *detail, e *meta.Extent) {
	c := n.c
	if e.Off/block < d.blocks {
		c.problem(ExtentOverlap, name(d.ino), "block %d", e.Off/block)
	}
	end := e.Off + uint64(e.Len)
	if end > d.size && (i.flags&tail == 0 || e.Off < d.size) {
		c.problem(ExtentBeyond, name(d.ino), "bytes %d to %d of %d", e.Off, end, d.size)
	}
	if i.flags&chunked != 0 && end > sealfs.HomeBytes {
		c.problem(ChunkPlace, name(d.ino), "bytes %d to %d stand at home", e.Off, end)
	}
	d.blocks = e.Off/block + uint64(e.Blocks())
	d.found += uint64(e.Stored())
	n.piece(at, d.ino, e)
}

// piece notes which part of the log an extent refers to.
func (n *namespace) piece(at ref, ino sealfs.Ino, e *meta.Extent) {
	c := n.c
	slot, ok := c.slotOf[e.Addr.Seq()]
	if !ok {
		if !c.tableHoles {
			c.problem(ExtentNowhere, name(ino), "%d bytes of the file at %d lie at %v", e.Len, e.Off, e.Addr)
		}
		return
	}
	c.extents[slot] = append(c.extents[slot], piece{off: e.Addr.Off(), n: e.Stored(), ref: at})
}

// attribute judges a part of an extended attribute.
func (n *namespace) attribute(k *meta.Key, val []byte) error {
	c := n.c
	i := n.lookup(k.Ino)
	if i != nil {
		n.use(k.Shard, n.volumes[i.volume], int64(len(val)), 0)
	}
	if k.Part != 0 {
		if k.Ino != n.attr.Ino || k.Hash != n.attr.Hash || k.Ordinal != n.attr.Ordinal || k.Part != n.attrPart || len(val) != min(n.attrLeft, partBytes) || len(val) == 0 {
			if !c.holes {
				c.problem(AttrParts, name(k.Ino), "part %d of attribute %#x.%d", k.Part, k.Hash, k.Ordinal)
			}
			n.attrLeft = 0
			return nil
		}
		n.attrPart++
		n.attrLeft -= len(val)
		return nil
	}
	n.endAttr()
	var a meta.Attribute
	if err := meta.DecodeAttribute(val, &a); err != nil {
		return n.damaged(k, err)
	}
	n.attr, n.attrPart, n.attrLeft = *k, 1, a.Total-len(a.Value)
	if i == nil {
		if !c.holes {
			c.problem(AttrNoInode, name(k.Ino), "attribute %q", a.Name)
		}
		return nil
	}
	if want := attrHash(k.Ino, n.volumes[i.volume], a.Name); k.Hash != want {
		c.problem(AttrHash, name(k.Ino), "attribute %q under %#x, not %#x", a.Name, k.Hash, want)
	}
	if i.more == 0 {
		c.problem(AttrNames, name(k.Ino), "it counts none and has %q", a.Name)
		return nil
	}
	n.more[i.more].attrs -= int32(len(a.Name) + 1)
	return nil
}

// endAttr judges whether the last attribute had all its parts.
func (n *namespace) endAttr() {
	if n.attrLeft > 0 && !n.c.holes {
		n.c.problem(AttrParts, name(n.attr.Ino), "attribute %#x.%d lacks its last %d bytes", n.attr.Hash, n.attr.Ordinal, n.attrLeft)
	}
	n.attrLeft = 0
}

// target judges a part of a long target.
func (n *namespace) target(k *meta.Key, val []byte) {
	i := n.lookup(k.Ino)
	if i == nil && n.c.holes {
		return
	}
	if i == nil || i.typ != typeLink || i.more == 0 {
		n.c.problem(TargetParts, name(k.Ino), "part %d belongs to no symbolic link of that length", k.Part)
		return
	}
	d := &n.more[i.more]
	if want := uint64(k.Part) * partBytes; d.found != want || len(val) == 0 || uint64(len(val)) != min(d.size-min(d.size, want), partBytes) {
		n.c.problem(TargetParts, name(k.Ino), "part %d of %d bytes follows %d of %d", k.Part, len(val), d.found, d.size)
	}
	d.found += uint64(len(val))
}

// orphan judges a row of the orphan table.
func (n *namespace) orphan(k *meta.Key, val []byte) error {
	nameless, tailed, err := meta.DecodeOrphan(val)
	if err != nil {
		return n.damaged(k, err)
	}
	i := n.lookup(k.Ino)
	if i == nil {
		if !n.c.holes {
			n.c.problem(OrphanRow, name(k.Ino), "it does not exist")
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
func (n *namespace) lock(k *meta.Key, val []byte) error {
	l, err := meta.DecodeLock(val, k)
	if err != nil {
		return n.damaged(k, err)
	}
	if n.lookup(k.Ino) == nil && !n.c.holes {
		n.c.problem(LockNoInode, name(k.Ino), "bytes %d to %d, session %d", l.Start, l.End, l.Session)
	}
	if k.Ino != n.lockIno || k.Class != n.lockClass {
		n.lockIno, n.lockClass, n.locks = k.Ino, k.Class, n.locks[:0]
	}
	n.locks = slices.DeleteFunc(n.locks, func(o meta.LockRow) bool { return o.End < l.Start })
	for i := range n.locks {
		o := &n.locks[i]
		same := o.Session == l.Session && o.Owner == l.Owner
		if same || o.Type == op.WriteLock || l.Type == op.WriteLock {
			n.c.problem(LockOverlap, name(k.Ino), "bytes %d to %d of session %d and %d to %d of session %d", o.Start, o.End, o.Session, l.Start, l.End, l.Session)
			break
		}
	}
	n.locks = append(n.locks, l)
	return nil
}

// sessionRow judges a session's state or one of its result rows.
func (n *namespace) sessionRow(k *meta.Key, val []byte) error {
	if k.Shard != n.session.Shard || k.Session != n.session.Session || k.Pos == 0 {
		n.endSession()
		n.session = *k
	}
	if k.Pos == 0 {
		s, err := meta.DecodeSession(val)
		if err != nil {
			return n.damaged(k, err)
		}
		n.sessionRows = int64(s.Rows)
		return nil
	}
	if _, err := meta.DecodeResult(val); err != nil {
		return n.damaged(k, err)
	}
	n.sessionRows--
	return nil
}

func (n *namespace) endSession() {
	if n.sessionRows != 0 && !n.c.holes {
		n.c.problem(SessionRows, fmt.Sprintf("shard %d, session %d", n.session.Shard, n.session.Session), "off by %d", n.sessionRows)
	}
	n.sessionRows = 0
}
