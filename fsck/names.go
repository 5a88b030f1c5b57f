package fsck

import (
	"cmp"
	"fmt"
	"maps"
	"math/bits"
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
	renamed                 // a transaction gives it a name, so that it leaves the orphan table
	doubtful                // a transaction of unknown fate changes its names or entries
	chunked                 // it has chunks
	cutOff                  // chunks that were cut off wait to be purged
)

// Bits of meta.Inode.Flags that say which ACLs there are.
const (
	aclAccess  = 1 << 3
	aclDefault = 1 << 4
	aclBoth    = aclAccess | aclDefault
)

// aclBit returns the bit of the attribute name, 0 if that is no ACL.
func aclBit(name []byte) uint8 {
	switch string(name) {
	case op.ACLAccess:
		return aclAccess
	case op.ACLDefault:
		return aclDefault
	}
	return 0
}

// aclsOf returns which ACLs an inode can have.
func aclsOf(in *meta.Inode) uint8 {
	switch in.Mode >> 12 {
	case typeDir:
		return aclBoth
	case typeLink:
		return 0
	}
	return aclAccess
}

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
	strange uint32 // entries of a directory whose inodes are of another volume
	attrs   int32  // bytes of attribute names, less those found
	acls    uint8  // ACLs that the inode says it has
	gotACLs uint8  // and those that were found
	bound   uint16 // of a directory, see meta.Inode.Moved and Number
	gen     uint64 // of a directory
}

type usageOf struct {
	shard  sealfs.Shard
	volume sealfs.Volume
}

// start says where the inodes of a shard begin.
type start struct {
	shard sealfs.Shard
	at    uint32
}

// namespace is pass 5 of a store under way.
type namespace struct {
	c        *checker
	w        *whole
	inodes   []inode // in the order of their keys, then those that transactions make
	more     []detail
	starts   []start               // where in inodes those of a shard begin
	runs     []uint32              // the same for every shard, and the end of the last
	strays   map[sealfs.Ino]uint32 // index of inodes that stand in another shard than their home
	volumes  []sealfs.Volume
	volumeNo map[sealfs.Volume]uint16
	usage    map[usageOf]meta.Usage // of the inodes, less the rows
	counters map[sealfs.Shard]uint64
	votes    [18]int  // for 2^i shards, as differences
	rows     []uint64 // number of records, by shard

	files map[sealfs.Ino]large // those with chunks
	parts []chunks             // by shard and inode

	partitions map[partitionKey]sealfs.Ino

	prepared  []*part
	tally     tally
	inDoubt   map[sealfs.Ino][]*part // that change names, by directory
	decisions map[txKey]meta.Decision
}

func (c *checker) newNamespace() *namespace {
	return &namespace{
		c: c, w: c.w, more: make([]detail, 1), volumeNo: map[sealfs.Volume]uint16{},
		usage: map[usageOf]meta.Usage{}, counters: map[sealfs.Shard]uint64{}, rows: make([]uint64, sealfs.ShardsMax),
		tally: newTally(), inDoubt: map[sealfs.Ino][]*part{}, decisions: map[txKey]meta.Decision{}, files: map[sealfs.Ino]large{},
		partitions: map[partitionKey]sealfs.Ino{},
	}
}

// collect is the first half of pass 5, the other being records: it takes note
// of what the records of all stores are judged by.
func (c *checker) collect() error {
	c.extents = make([][]piece, len(c.segs))
	bounds := c.parts(workersMax)
	n := len(bounds) - 1
	parts := make([]*reader, n)
	err := c.share(n, func(i int, s *sink) error {
		r := c.newReader(c.newNamespace(), s)
		parts[i] = r
		return c.rows(5, bounds[i], bounds[i+1], r.first)
	})
	if err != nil {
		return err
	}
	c.names = parts[0].namespace
	for i, r := range parts {
		if i > 0 {
			c.names.join(r.namespace)
		}
		r.hand()
	}
	return nil
}

// join adds what was collected of later shards.
func (n *namespace) join(o *namespace) {
	volumes := make([]uint16, len(o.volumes))
	for i, v := range o.volumes {
		volumes[i] = n.volumeIndex(v)
	}
	for _, s := range o.starts {
		n.starts = append(n.starts, start{s.shard, s.at + uint32(len(n.inodes))})
	}
	shift := uint32(len(n.more) - 1)
	for i := range o.inodes {
		in := &o.inodes[i]
		in.volume = volumes[in.volume]
		if in.more != 0 {
			in.more += shift
		}
	}
	n.inodes, n.more, n.parts, n.prepared = append(n.inodes, o.inodes...), append(n.more, o.more[1:]...), append(n.parts, o.parts...), append(n.prepared, o.prepared...)
	maps.Copy(n.counters, o.counters)
	maps.Copy(n.decisions, o.decisions)
	maps.Copy(n.files, o.files)
	n.tally.join(&o.tally)
	maps.Copy(n.partitions, o.partitions)
	for i, v := range o.votes {
		n.votes[i] += v
	}
	for s, v := range o.rows {
		n.rows[s] += v
	}
}

// index makes the inodes to be found by number, now that the number of shards is known.
func (n *namespace) index() {
	c := n.c
	n.runs, n.strays = make([]uint32, sealfs.ShardsMax+1), map[sealfs.Ino]uint32{}
	shard := 0
	for i, s := range n.starts {
		end := len(n.inodes)
		if i+1 < len(n.starts) {
			end = int(n.starts[i+1].at)
		}
		for ; shard <= int(s.shard); shard++ {
			n.runs[shard] = s.at
		}
		run := n.inodes[s.at:end]
		if c.unordered.Load() {
			slices.SortFunc(run, func(a, b inode) int { return cmp.Compare(a.ino, b.ino) })
		}
		for j := range run {
			if ino := run[j].ino; ino.Home(n.w.shards) != s.shard {
				if _, twice := n.strays[ino]; twice {
					n.twice(ino)
				}
				n.strays[ino] = s.at + uint32(j)
			}
		}
	}
	for ; shard < len(n.runs); shard++ {
		n.runs[shard] = uint32(len(n.inodes))
	}
	for _, ino := range slices.Sorted(maps.Keys(n.strays)) {
		if n.resident(ino) != nil {
			n.twice(ino)
		}
	}
}

func (n *namespace) twice(ino sealfs.Ino) {
	n.c.problem(InoTwice, name(ino), "in two shards")
	n.mendTwice(ino)
	n.c.holes = true
}

// add adds inodes that transactions make.
func (n *namespace) add(made []inode) {
	for _, in := range made {
		n.strays[in.ino] = uint32(len(n.inodes))
		n.inodes = append(n.inodes, in)
	}
}

// resident finds an inode that stands in its home.
func (n *namespace) resident(ino sealfs.Ino) *inode {
	s := ino.Home(n.w.shards)
	run := n.inodes[n.runs[s]:n.runs[s+1]]
	if len(run) == 0 || ino < run[0].ino || ino > run[len(run)-1].ino {
		return nil
	}
	// Numbers of a shard are issued in turn, so the place can be guessed.
	lo, hi := 0, len(run)
	if span := run[hi-1].ino - run[0].ino; span > 0 {
		const reach = 8
		at := int(float64(ino-run[0].ino) / float64(span) * float64(hi-1))
		if l := max(at-reach, 0); run[l].ino <= ino {
			lo = l
		}
		if h := at + reach; h < hi && run[h].ino >= ino {
			hi = h + 1
		}
	}
	for lo < hi {
		if m := int(uint(lo+hi) / 2); run[m].ino < ino {
			lo = m + 1
		} else {
			hi = m
		}
	}
	if lo == len(run) || run[lo].ino != ino {
		return nil
	}
	return &run[lo]
}

// lookup finds an inode of this store by its number, nil if there is none.
func (n *namespace) lookup(ino sealfs.Ino) *inode {
	if i := n.resident(ino); i != nil {
		return i
	}
	if len(n.strays) > 0 {
		if at, ok := n.strays[ino]; ok {
			return &n.inodes[at]
		}
	}
	return nil
}

// records is pass 5, but for what the names of all stores tell: all records of
// the store, each for itself and against the others.
func (c *checker) records() error {
	n := c.names
	c.rep.Shards = n.w.shards
	bounds := c.parts(workersMax)
	if n.w.prepared {
		bounds = []int{0, 1 << 16} // transactions change what other records say
	}
	parts := make([]*reader, len(bounds)-1)
	err := c.share(len(parts), func(i int, s *sink) error {
		r := c.newReader(n, s)
		parts[i] = r
		if err := c.rows(5, bounds[i], bounds[i+1], r.second); err != nil {
			return err
		}
		r.endAttr()
		r.endSession()
		return nil
	})
	if err != nil {
		return err
	}
	for _, r := range parts {
		r.hand()
	}
	n.endParts()
	if c.holes {
		c.say("parts of the namespace are missing: what should refer to them or be counted with them is not judged")
	}
	return nil
}

// reader is a part of pass 5: it reads the records of some shards.
type reader struct {
	*namespace
	out      *sink
	extents  [][]piece // by slot
	rep      Report    // counts only
	used     map[usageOf]meta.Usage
	use      usageOf    // row of used that was charged last
	charged  meta.Usage // to it, and not there yet
	lastPart *chunks    // answer of the last search

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

func (c *checker) newReader(n *namespace, s *sink) *reader {
	return &reader{namespace: n, out: s, extents: make([][]piece, len(c.segs)), used: map[usageOf]meta.Usage{}}
}

// problem reports a problem of the store.
func (r *reader) problem(id ID, where, format string, args ...any) {
	r.out.problem(r.c, id, where, format, args...)
}

// holey reports whether parts of the namespace are missing, as far as r knows.
func (r *reader) holey() bool { return r.c.holes || r.out.holes }

// charge counts what a volume uses in a shard.
func (r *reader) charge(s sealfs.Shard, v sealfs.Volume, bytes, inodes int64) {
	if row := (usageOf{s, v}); row != r.use {
		r.settleUse()
		r.use = row
	}
	r.charged.Bytes += bytes
	r.charged.Inodes += inodes
}

func (r *reader) settleUse() {
	u := r.used[r.use]
	u.Bytes += r.charged.Bytes
	u.Inodes += r.charged.Inodes
	if u != (meta.Usage{}) || r.charged != (meta.Usage{}) {
		r.used[r.use] = u
	}
	r.charged = meta.Usage{}
}

// hand adds what was counted and noted to what the whole store has.
func (r *reader) hand() {
	c, a, b := r.c, r.c.rep, &r.rep
	r.settleUse()
	for row, u := range r.used {
		have := c.names.usage[row]
		c.names.usage[row] = meta.Usage{Bytes: have.Bytes + u.Bytes, Inodes: have.Inodes + u.Inodes}
	}
	for slot, list := range r.extents {
		if c.extents[slot] == nil {
			c.extents[slot] = list
		} else {
			c.extents[slot] = append(c.extents[slot], list...)
		}
	}
	a.Files += b.Files
	a.Directories += b.Directories
	a.Partitions += b.Partitions
	a.Symlinks += b.Symlinks
	a.Others += b.Others
	a.Orphans += b.Orphans
	a.Entries += b.Entries
	a.Parts += b.Parts
	a.Bytes += b.Bytes
	a.NotJudged += b.NotJudged
}

// name names an inode.
func name(ino sealfs.Ino) string { return fmt.Sprintf("inode %d", ino) }

// damaged reports a record that does not decode.
func (r *reader) damaged(k *meta.Key, key []byte, err error) error {
	where := fmt.Sprintf("shard %d", k.Shard)
	if k.Ino != 0 {
		where = name(k.Ino)
	}
	r.problem(RecordDamaged, where, "%v", err)
	r.mendRow(RecordDamaged, where, key, "the record is saved and removed")
	r.out.holes = true
	return nil
}

// first takes note of what later records are judged by.
func (r *reader) first(at ref, key, val []byte) error {
	k, err := meta.DecodeKey(key)
	if err != nil {
		r.problem(KeyUnknown, r.c.reg.Name(), "%x", key)
		r.mendRow(KeyUnknown, r.c.reg.Name(), key, "the record is saved and removed")
		r.out.holes = true
		return nil
	}
	r.rows[k.Shard]++
	switch k.Kind {
	case meta.KindShard:
		s, err := meta.DecodeShardState(val)
		if err != nil {
			return r.damaged(&k, key, err)
		}
		r.counters[k.Shard] = s.Counter
	case meta.KindUsage:
		u, err := meta.DecodeUsage(val)
		if err != nil {
			return r.damaged(&k, key, err)
		}
		r.charge(k.Shard, k.Volume, -u.Bytes, -u.Inodes)
	case meta.KindGrant:
		if _, err := meta.DecodeGrant(val); err != nil {
			// Whoever keeps the quota asks all stores after its next start.
			r.problem(RecordDamaged, fmt.Sprintf("shard %d", k.Shard), "%v", err)
			r.mendRow(RecordDamaged, fmt.Sprintf("shard %d", k.Shard), key, "the record is saved and removed")
		}
	case meta.KindInode:
		var in meta.Inode
		if err := meta.DecodeInode(val, k.Ino, &in); err != nil {
			return r.damaged(&k, key, err)
		}
		r.inode(at, &k, &in)
		r.tally.inode(&in)
	case meta.KindPrepared:
		p, err := meta.DecodePrepared(val)
		if err != nil {
			return r.damaged(&k, key, err)
		}
		r.prepare(&k, p)
	case meta.KindDecision:
		d, err := meta.DecodeDecision(val)
		if err != nil {
			return r.damaged(&k, key, err)
		}
		r.decisions[txKey{k.Shard, k.Tx}] = d
	case meta.KindPartition:
		ino, err := meta.DecodePartition(val)
		if err != nil {
			return r.damaged(&k, key, err)
		}
		r.partitionRow(&k, ino)
	case meta.KindPart:
		p, err := meta.DecodePart(val)
		if err != nil {
			return r.damaged(&k, key, err)
		}
		r.part(&k, &p)
	default:
		if err := r.tally.row(&k, val); err != nil {
			return r.damaged(&k, key, err)
		}
	}
	return nil
}

// inode takes note of an inode.
func (r *reader) inode(at ref, k *meta.Key, in *meta.Inode) {
	rep := &r.rep
	i := inode{ino: k.Ino, nlink: in.Nlink, typ: uint8(in.Mode >> 12), flags: in.Flags & (tail | linkable)}
	i.volume = r.volumeIndex(in.Volume)
	r.large(&i, in)
	d := detail{ino: k.Ino, size: in.Size, bytes: in.Bytes, parent: in.Parent, attrs: int32(in.Names), acls: in.Flags & aclBoth}
	if in.First.Len != 0 {
		r.extent(at, &i, &d, &in.First)
	}
	long := false
	switch i.typ {
	case typeFile:
		rep.Files++
		long = d.bytes != d.found
	case typeDir:
		if long = true; in.IsPartition() {
			rep.Partitions++
		} else {
			rep.Directories++
		}
		d.bound, d.gen = uint16(in.Bound), in.Gen
	case typeLink:
		rep.Symlinks++
		long = in.Size > inlineTarget
	default:
		rep.Others++
	}
	if long || in.Names != 0 || d.acls != 0 {
		i.more = uint32(len(r.more))
		r.more = append(r.more, d)
	}
	if in.Nlink == 0 {
		rep.Orphans++
	}
	rep.Bytes += in.Bytes
	if !in.IsPartition() { // which cost nothing
		r.charge(k.Shard, in.Volume, int64(in.Bytes), 1)
	}
	if n := len(r.starts); n == 0 || r.starts[n-1].shard != k.Shard {
		r.starts = append(r.starts, start{k.Shard, uint32(len(r.inodes))})
	}
	r.inodes = append(r.inodes, i)
	r.vote(k)
}

// vote votes for the numbers of shards with which an inode can stand where it does:
// twice for those in which it is at home there, and once more if its shard has issued it.
func (n *namespace) vote(k *meta.Key) {
	most := bits.TrailingZeros64(uint64(k.Ino) ^ uint64(k.Shard) | 1<<16)
	n.votes[0] += 2
	n.votes[most+1] -= 2
	for b := range most + 1 {
		if q := uint64(k.Ino) >> b; q < sealfs.InoCounterMin {
			break
		} else if q < n.counters[k.Shard] {
			n.votes[b]++
			n.votes[b+1]--
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
