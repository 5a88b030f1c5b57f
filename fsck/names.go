package fsck

import (
	"fmt"
	"slices"

	"sealfs"
	"sealfs/meta"
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
	renamed                 // a transaction gives it a name, so that it leaves the orphan table
	doubtful                // a transaction of unknown fate changes its names or entries
	chunked                 // it has chunks
	cutOff                  // chunks that were cut off wait to be purged
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

// namespace is pass 5 of a store under way.
type namespace struct {
	c        *checker
	w        *whole
	inodes   []inode // by number, once all are there
	more     []detail
	volumes  []sealfs.Volume
	volumeNo map[sealfs.Volume]uint16
	usage    map[usageOf]meta.Usage // of the inodes, less the rows
	counters map[sealfs.Shard]uint64
	votes    [17]int  // for 2^i shards
	rows     []uint64 // number of records, by shard

	files    map[sealfs.Ino]large // those with chunks
	parts    []chunks             // by shard and inode
	lastPart *chunks              // answer of the last search

	prepared  []*part
	inDoubt   map[sealfs.Ino][]*part // that change names, by directory
	decisions map[txKey]meta.Decision

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

// collect is the first half of pass 5, the other being records: it takes note
// of what the records of all stores are judged by.
func (c *checker) collect() error {
	c.extents = make([][]piece, len(c.segs))
	n := &namespace{
		c: c, w: c.w, more: make([]detail, 1), volumeNo: map[sealfs.Volume]uint16{},
		usage: map[usageOf]meta.Usage{}, counters: map[sealfs.Shard]uint64{}, rows: make([]uint64, sealfs.ShardsMax),
		inDoubt: map[sealfs.Ino][]*part{}, decisions: map[txKey]meta.Decision{}, files: map[sealfs.Ino]large{},
	}
	if err := c.cells(5, n.first); err != nil {
		return err
	}
	n.sort()
	for i := 1; i < len(n.inodes); i++ {
		if n.inodes[i].ino == n.inodes[i-1].ino {
			c.problem(InoTwice, name(n.inodes[i].ino), "in two shards")
			c.holes = true
		}
	}
	c.names = n
	return nil
}

func (n *namespace) sort() {
	slices.SortFunc(n.inodes, func(a, b inode) int {
		return int(min(max(int64(a.ino)-int64(b.ino), -1), 1))
	})
}

// records is pass 5, but for what the names of all stores tell: all records of
// the store, each for itself and against the others.
func (c *checker) records() error {
	n := c.names
	c.rep.Shards = n.w.shards
	if err := c.cells(5, n.second); err != nil {
		return err
	}
	n.endAttr()
	n.endSession()
	n.endParts()
	if c.holes {
		c.say("parts of the namespace are missing: what should refer to them or be counted with them is not judged")
	}
	return nil
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
	n.rows[k.Shard]++
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
	case meta.KindPrepared:
		p, err := meta.DecodePrepared(val)
		if err != nil {
			return n.damaged(&k, err)
		}
		n.prepare(&k, p)
	case meta.KindDecision:
		d, err := meta.DecodeDecision(val)
		if err != nil {
			return n.damaged(&k, err)
		}
		n.decisions[txKey{k.Shard, k.Tx}] = d
	case meta.KindPart:
		p, err := meta.DecodePart(val)
		if err != nil {
			return n.damaged(&k, err)
		}
		n.part(&k, &p)
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
	i.volume = n.volumeIndex(in.Volume)
	n.large(&i, in)
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

// volumeIndex returns the index of a volume in n.volumes.
func (n *namespace) volumeIndex(v sealfs.Volume) uint16 {
	i, known := n.volumeNo[v]
	if !known {
		i = uint16(len(n.volumes)) // beyond 65,536 volumes of one store they are confused, which only widens what passes
		n.volumes = append(n.volumes, v)
		n.volumeNo[v] = i
	}
	return i
}

// lookup finds an inode of this store by its number, nil if there is none.
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
