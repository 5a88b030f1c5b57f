package fsck

import (
	"bytes"
	"fmt"
	"slices"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
)

// The values of an inode's type (the upper four bits of its mode).
const (
	typeDir  = 0o4
	typeFile = 0o10
	typeLink = 0o12
)

// What is noted of an inode in inode.flags.
const (
	tail        = 1 << iota // meta's own bits: it has extents beyond its size
	linkable                // it was made without a name and may still get one
	rowNameless             // the orphan table says that it has no name
	rowTail                 // the orphan table says that it has a tail
)

const (
	block = sealfs.BlockSize
	// partBytes is how much of an attribute or a long target a row holds.
	partBytes = 900
	// inlineTarget is the longest target that stands in the inode.
	inlineTarget = 160
)

// inode is what is kept of every inode: 24 bytes.
type inode struct {
	ino    sealfs.Ino
	nlink  uint32
	names  uint32 // entries that refer to it
	more   uint32 // index in namespace.more, 0 for none
	volume uint16 // index in namespace.volumes
	typ    uint8
	flags  uint8
}

// detail is what is kept of directories, of files with extents outside the
// inode, of long symlinks and of what has extended attributes.
type detail struct {
	ino     sealfs.Ino
	size    uint64 // bytes, of a directory entries
	bytes   uint64 // of a file, stored
	blocks  uint64 // of a file, one more than the last block of the extents so far
	found   uint64 // bytes of extents or of a target, or entries
	parent  sealfs.Ino
	subdirs uint32
	attrs   int32 // bytes of attribute names, less those found
}

type usageOf struct {
	shard  sealfs.Shard
	volume sealfs.Volume
}

// namespace is pass 5 under way.
type namespace struct {
	c        *checker
	inodes   []inode // by number, once all are there
	more     []detail
	volumes  []sealfs.Volume
	volumeNo map[sealfs.Volume]uint16
	usage    map[usageOf]meta.Usage // of the inodes, less the rows
	counters map[sealfs.Shard]uint64
	votes    [17]int // for 2^i shards

	last *inode // answer of the last lookup

	group      uint64 // cookie without the ordinal, of the names below
	groupDir   sealfs.Ino
	groupNames [][]byte // names of the present directory that share a hash

	attr     meta.Key // of the attribute whose parts are being read
	attrPart uint16   // next one
	attrLeft int      // bytes of its value that are still to come

	lockIno   sealfs.Ino
	lockClass uint8
	locks     []meta.LockRow // that reach beyond the start of the last one

	session     meta.Key // whose rows are being read
	sessionRows int64    // that are still to come
}

// namespace is pass 5: all records, each for itself and against the others.
func (c *checker) namespace() error {
	c.extents = make([][]piece, len(c.segs))
	n := &namespace{
		c: c, more: make([]detail, 1), volumeNo: map[sealfs.Volume]uint16{},
		usage: map[usageOf]meta.Usage{}, counters: map[sealfs.Shard]uint64{},
	}
	if err := c.cells(5, n.first); err != nil {
		return err
	}
	slices.SortFunc(n.inodes, func(a, b inode) int {
		return int(min(max(int64(a.ino)-int64(b.ino), -1), 1))
	})
	for i := 1; i < len(n.inodes); i++ {
		if n.inodes[i].ino == n.inodes[i-1].ino {
			c.problem(InoTwice, name(n.inodes[i].ino), "in two shards")
			c.holes = true
		}
	}
	c.shards = n.shardCount()
	c.rep.Shards = c.shards
	if err := c.cells(5, n.second); err != nil {
		return err
	}
	n.endAttr()
	n.endSession()
	if c.holes {
		c.say("parts of the namespace are missing: what should refer to them or be counted with them is not judged")
		return nil
	}
	return n.finish()
}

// name names an inode.
func name(ino sealfs.Ino) string { return fmt.Sprintf("inode %d", ino) }

// damaged reports a record that does not decode.
func (n *namespace) damaged(k *meta.Key, err error) error {
	n.c.problem(RecordDamaged, fmt.Sprintf("shard %d", k.Shard), "%v", err)
	n.c.holes = true
	return nil
}

// first takes note of what later records are judged by.
func (n *namespace) first(at ref, key, val []byte) error {
	k, err := meta.DecodeKey(key)
	if err != nil {
		n.c.problem(KeyUnknown, n.c.reg.Name(), "%x", key)
		n.c.holes = true
		return nil
	}
	switch k.Kind {
	case meta.KindShard:
		s, err := meta.DecodeShardState(val)
		if err != nil {
			return n.damaged(&k, err)
		}
		n.counters[k.Shard] = s.Counter
	case meta.KindUsage:
		u, err := meta.DecodeUsage(val)
		if err != nil {
			return n.damaged(&k, err)
		}
		n.use(k.Shard, k.Volume, -u.Bytes, -u.Inodes)
	case meta.KindInode:
		var in meta.Inode
		if err := meta.DecodeInode(val, k.Ino, &in); err != nil {
			return n.damaged(&k, err)
		}
		n.inode(at, &k, &in)
	}
	return nil
}

func (n *namespace) use(s sealfs.Shard, v sealfs.Volume, bytes, inodes int64) {
	u := n.usage[usageOf{s, v}]
	u.Bytes += bytes
	u.Inodes += inodes
	n.usage[usageOf{s, v}] = u
}

// inode takes note of an inode.
func (n *namespace) inode(at ref, k *meta.Key, in *meta.Inode) {
	rep := n.c.rep
	i := inode{ino: k.Ino, nlink: in.Nlink, typ: uint8(in.Mode >> 12), flags: in.Flags & (tail | linkable)}
	var known bool
	if i.volume, known = n.volumeNo[in.Volume]; !known {
		i.volume = uint16(len(n.volumes)) // beyond 65,536 volumes of one store they are confused, which only widens what passes
		n.volumes = append(n.volumes, in.Volume)
		n.volumeNo[in.Volume] = i.volume
	}
	d := detail{ino: k.Ino, size: in.Size, bytes: in.Bytes, parent: in.Parent, attrs: int32(in.Names)}
	if in.First.Len != 0 {
		n.extent(at, &i, &d, &in.First)
	}
	long := false
	switch i.typ {
	case typeFile:
		rep.Files++
		long = d.bytes != d.found
	case typeDir:
		rep.Directories++
		long = true
	case typeLink:
		rep.Symlinks++
		long = in.Size > inlineTarget
	default:
		rep.Others++
	}
	if long || in.Names != 0 {
		i.more = uint32(len(n.more))
		n.more = append(n.more, d)
	}
	if in.Nlink == 0 {
		rep.Orphans++
	}
	rep.Bytes += in.Bytes
	n.use(k.Shard, in.Volume, int64(in.Bytes), 1)
	n.inodes = append(n.inodes, i)
	for bits := range n.votes {
		if uint64(k.Ino)&(1<<bits-1) == uint64(k.Shard) {
			n.votes[bits] += 2
			if q := uint64(k.Ino) >> bits; q >= sealfs.InoCounterMin && q < n.counters[k.Shard] {
				n.votes[bits]++
			}
		}
	}
}

// shardCount returns the cluster's number of shards: what was said, or what
// explains most inode numbers. Of equal ones the usual number is taken.
func (n *namespace) shardCount() uint32 {
	if n.c.o.Shards != 0 {
		return n.c.o.Shards
	}
	best := slices.Max(n.votes[:])
	for bits, v := range n.votes {
		if v == best && 1<<bits == sealfs.ShardsDefault {
			return sealfs.ShardsDefault
		}
	}
	return 1 << slices.Index(n.votes[:], best)
}

// lookup finds an inode by its number, nil if there is none.
func (n *namespace) lookup(ino sealfs.Ino) *inode {
	if n.last != nil && n.last.ino == ino {
		return n.last
	}
	at, ok := slices.BinarySearchFunc(n.inodes, ino, func(i inode, ino sealfs.Ino) int {
		return int(min(max(int64(i.ino)-int64(ino), -1), 1))
	})
	if !ok {
		return nil
	}
	n.last = &n.inodes[at]
	return n.last
}

// second judges the records that belong to inodes.
func (n *namespace) second(at ref, key, val []byte) error {
	c := n.c
	k, err := meta.DecodeKey(key)
	if err != nil {
		return nil
	}
	if k.Ino != 0 && k.Ino.Home(c.shards) != k.Shard || uint32(k.Shard) >= c.shards {
		c.problem(ShardWrong, name(k.Ino), "key %x stands in shard %d of %d", key, k.Shard, c.shards)
		return nil
	}
	switch k.Kind {
	case meta.KindInode:
		if q := uint64(k.Ino) / uint64(c.shards); q >= n.counters[k.Shard] || q < sealfs.InoCounterMin {
			c.problem(InoBeyond, name(k.Ino), "shard %d will issue counter %d next, this is %d", k.Shard, n.counters[k.Shard], q)
		}
	case meta.KindEntry:
		return n.entry(&k, val)
	case meta.KindExtent:
		var e meta.Extent
		if err := meta.DecodeExtent(val, k.Pos, &e); err != nil {
			return n.damaged(&k, err)
		}
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
	where := fmt.Sprintf("directory %d, entry %q", k.Ino, e.Name)
	dir := n.lookup(k.Ino)
	if dir == nil && !c.holes || dir != nil && dir.typ != typeDir {
		c.problem(EntryNoDir, where, "inode %d", k.Ino)
		return nil // nobody can reach it: it is no name
	}
	if s := string(e.Name); s == "." || s == ".." || bytes.ContainsAny(e.Name, "/\x00") {
		c.problem(EntryName, where, "%x", e.Name)
	}
	if dir != nil {
		n.more[dir.more].found++
		if want := firstCookie(k.Ino, n.volumes[dir.volume], e.Name); k.Pos&^(ordinals-1) != want {
			c.problem(EntryCookie, where, "%#x, its name's are from %#x on", k.Pos, want)
		}
	}
	if g := k.Pos &^ (ordinals - 1); k.Ino != n.groupDir || g != n.group {
		n.groupDir, n.group, n.groupNames = k.Ino, g, n.groupNames[:0]
	}
	if slices.ContainsFunc(n.groupNames, func(b []byte) bool { return bytes.Equal(b, e.Name) }) {
		c.problem(EntryTwice, where, "the second at cookie %#x", k.Pos)
	}
	n.groupNames = append(n.groupNames, e.Name)
	in := n.lookup(e.Ino)
	if in == nil {
		if !c.holes {
			c.problem(EntryNoInode, where, "inode %d", e.Ino)
		}
		return nil
	}
	in.names++
	if in.typ != e.Type {
		c.problem(EntryType, where, "type %#o, inode %d has %#o", e.Type, e.Ino, in.typ)
	}
	if dir != nil && dir.volume != in.volume {
		c.problem(EntryVolume, where, "volume %d, inode %d is in %d", n.volumes[dir.volume], e.Ino, n.volumes[in.volume])
	}
	if in.typ != typeDir {
		return nil
	}
	if dir != nil {
		n.more[dir.more].subdirs++
	}
	if p := n.more[in.more].parent; p != k.Ino && p != in.ino {
		c.problem(DirParent, name(in.ino), "its parent is %d, its name %q stands in %d", p, e.Name, k.Ino)
	}
	return nil
}

// extent judges an extent against its file, and notes which part of the log it
// refers to. The extent in the inode comes first, the others in order.
func (n *namespace) extent(at ref, i *inode, d *detail, e *meta.Extent) {
	c := n.c
	if e.Off/block < d.blocks {
		c.problem(ExtentOverlap, name(d.ino), "block %d", e.Off/block)
	}
	if end := e.Off + uint64(e.Len); end > d.size && (i.flags&tail == 0 || e.Off < d.size) {
		c.problem(ExtentBeyond, name(d.ino), "bytes %d to %d of %d", e.Off, end, d.size)
	}
	d.blocks = e.Off/block + uint64(e.Blocks())
	d.found += uint64(e.Stored())
	slot, ok := c.slotOf[e.Addr.Seq()]
	if !ok {
		if !c.tableHoles {
			c.problem(ExtentNowhere, name(d.ino), "%d bytes of the file at %d lie at %v", e.Len, e.Off, e.Addr)
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
	if nameless {
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

// finish judges what only the whole can tell.
func (n *namespace) finish() error {
	c := n.c
	for j := range n.inodes {
		if j%65536 == 0 {
			if err := c.tick(5, int64(j), int64(len(n.inodes))); err != nil {
				return err
			}
		}
		i := &n.inodes[j]
		n.links(i)
		if i.more == 0 {
			continue
		}
		d := &n.more[i.more]
		if d.attrs != 0 {
			c.problem(AttrNames, name(i.ino), "off by %d bytes", d.attrs)
		}
		switch i.typ {
		case typeDir:
			n.directory(i, d)
		case typeFile:
			if d.found != d.bytes {
				c.problem(BytesWrong, name(i.ino), "%d, its extents hold %d", d.bytes, d.found)
			}
		case typeLink:
			if d.size > inlineTarget && d.found != d.size {
				c.problem(TargetParts, name(i.ino), "%d bytes of %d", d.found, d.size)
			}
		}
	}
	for row, u := range n.usage {
		if u != (meta.Usage{}) {
			c.problem(UsageWrong, fmt.Sprintf("shard %d, volume %d", row.shard, row.volume), "%d bytes and %d inodes too few", u.Bytes, u.Inodes)
		}
	}
	n.loops()
	return nil
}

// links judges an inode's names and its rows in the orphan table.
func (n *namespace) links(i *inode) {
	c := n.c
	root := i.typ == typeDir && n.more[i.more].parent == i.ino
	switch {
	case i.typ == typeDir && root && i.names != 0, i.typ == typeDir && i.names > 1:
		c.problem(DirNames, name(i.ino), "%d", i.names)
	case i.nlink == 0 && i.names > 0, i.typ != typeDir && i.names != i.nlink && i.names != 0:
		c.problem(LinkCount, name(i.ino), "%s, %s", count(int(i.nlink), "link"), count(int(i.names), "name"))
	case i.nlink > 0 && i.names == 0 && !root:
		c.problem(NoName, name(i.ino), "%s", count(int(i.nlink), "link"))
	}
	switch {
	case i.flags&rowNameless != 0 && i.nlink != 0:
		c.problem(OrphanRow, name(i.ino), "%s", count(int(i.nlink), "link"))
	case i.flags&rowNameless == 0 && i.nlink == 0:
		c.problem(OrphanMissing, name(i.ino), "of type %#o", i.typ)
	}
	if i.flags&tail != 0 != (i.flags&rowTail != 0) {
		c.problem(TailRow, name(i.ino), "the inode says %v, the table %v", i.flags&tail != 0, i.flags&rowTail != 0)
	}
}

func (n *namespace) directory(i *inode, d *detail) {
	if d.found != d.size {
		n.c.problem(DirSize, name(i.ino), "%d, there are %d", d.size, d.found)
	}
	if i.nlink != 0 && i.nlink != 2+d.subdirs {
		n.c.problem(DirLinks, name(i.ino), "%d links, %s", i.nlink, plural(int(d.subdirs), "subdirectory", "subdirectories"))
	}
}

// loops follows every directory's parents up to a root.
func (n *namespace) loops() {
	const unknown, onPath, fine = 0, 1, 2
	state := make([]uint8, len(n.more))
	var path []uint32
	for at := range n.more {
		path = path[:0]
		for m := uint32(at); m != 0 && state[m] == unknown; {
			state[m] = onPath
			path = append(path, m)
			d := &n.more[m]
			up := n.lookup(d.parent)
			if d.parent == 0 || d.parent == d.ino || up == nil || up.typ != typeDir {
				break
			}
			if m = up.more; state[m] == onPath {
				n.c.problem(DirLoop, name(up.ino), "by way of %d", d.ino)
			}
		}
		for _, m := range path {
			state[m] = fine
		}
	}
}
