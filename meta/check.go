package meta

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"sealfs"
	"sealfs/op"
	"sealfs/pmem"
)

// Check reads the whole namespace and calls fn with one sentence for every rule
// that is broken: records that do not decode, keys in the wrong shard, entries
// without inodes and inodes without entries, wrong link counts, parents, sizes
// and usage, overlapping extents, missing rows in the orphan table, rows of
// inodes that are gone, chunks that do not fit their file. It takes some 100 bytes of memory for each inode. The
// error is for a tree that cannot be walked.
//
// A volume that DropVolume is busy with is inconsistent until it is done.
func Check(r pmem.Reader, c Config, fn func(problem string)) error {
	return CheckAll([]pmem.Reader{r}, c, fn)
}

// CheckAll is Check of a namespace that lies on several stores. No transaction
// may be under way.
func CheckAll(stores []pmem.Reader, c Config, fn func(problem string)) error {
	ck := checker{
		c: c, fn: fn,
		inodes: map[sealfs.Ino]*seen{}, usage: map[usageRow]Usage{}, counters: map[sealfs.Shard]uint64{},
		sessions: map[sessionRow]uint32{}, parts: map[partRow]*seenPart{}, letters: map[letterRow]uint64{},
		partitions: map[partitionRow]sealfs.Ino{},
	}
	for _, r := range stores {
		if err := ck.read(r); err != nil {
			return err
		}
	}
	ck.finish()
	return nil
}

// read takes note of all records of a store.
func (ck *checker) read(r pmem.Reader) error {
	var cur pmem.Cursor
	var v record
	for ok := cur.Seek(r, nil); ok; ok = cur.Next() {
		k, err := DecodeKey(cur.Key())
		if err == nil {
			err = v.decode(&k, cur.Value())
		}
		if err != nil {
			var damage *sealfs.Corruption
			if !errors.As(err, &damage) {
				return err
			}
			ck.fn(damage.What)
			continue
		}
		ck.record(&k, &v)
	}
	return cur.Err()
}

// seen is what the checker gathers about an inode from the records of others.
type seen struct {
	exists                   bool
	rowNameless, rowTail     bool
	mode, nlink, flags       uint32
	size, bytes, names       uint64
	volume                   sealfs.Volume
	parent                   sealfs.Ino
	links, subdirs           uint32 // entries that refer to it; of a directory: subdirectories
	entries, stored, named   uint64 // found: entries of it, bytes of its extents and attribute names
	entryParent              sealfs.Ino
	entryType                uint8
	lastBlock                uint64 // one more than the last block of the extents so far
	targetBytes, targetParts uint64
	attrLeft                 int // bytes of the present attribute that are still to come
	attrPart                 uint16
	acls                     uint32 // flags of the ACLs found
	bound, cut, gen          uint64
	rowQueued, counted       bool
	total, told, sum         Totals // of a directory: sum is what total must be
	dir                      sealfs.Ino
	scattered                bool                  // it has names in several directories
	places                   map[sealfs.Ino]uint64 // names by places, less those that were found
	apart                    uint32                // subdirectories that partitions name
	leftover                 uint64                // entries that have moved and still stand here
	partition                bool
	number                   uint64 // of a partition
	open                     bool   // a partition that is in use
}

// self is Inode.self.
func (s *seen) self(ino sealfs.Ino) sealfs.Ino {
	if s.partition {
		return s.parent
	}
	return ino
}

type partitionRow struct {
	shard  sealfs.Shard
	dir    sealfs.Ino
	number uint16
}

// seenPart is what the checker gathers about a part.
type seenPart struct {
	Part
	stored, lastBlock, end uint64 // of the extents so far: bytes, one more than the last block, end
}

type partRow struct {
	ino   sealfs.Ino
	shard sealfs.Shard
}

type usageRow struct {
	shard  sealfs.Shard
	volume sealfs.Volume
}

type sessionRow struct {
	shard   sealfs.Shard
	session sealfs.Session
}

type checker struct {
	c          Config
	fn         func(string)
	inodes     map[sealfs.Ino]*seen
	usage      map[usageRow]Usage // rows less what inodes add up to
	counters   map[sealfs.Shard]uint64
	sessions   map[sessionRow]uint32 // rows that are still to come
	parts      map[partRow]*seenPart
	letters    map[letterRow]uint64 // the last ones that were taken
	outboxes   []outboxRow
	partitions map[partitionRow]sealfs.Ino
}

func (ck *checker) problem(format string, args ...any) { ck.fn(fmt.Sprintf(format, args...)) }

func (ck *checker) inode(ino sealfs.Ino) *seen {
	s := ck.inodes[ino]
	if s == nil {
		s = &seen{}
		ck.inodes[ino] = s
	}
	return s
}

// record takes note of one record. Keys come in order: an inode's record is
// before its entries, extents and attributes.
func (ck *checker) record(k *Key, v *record) {
	if uint32(k.Shard) >= ck.c.Shards {
		ck.problem("record of kind %#x in shard %d, but there are %d", k.Kind, k.Shard, ck.c.Shards)
		return
	}
	if k.Kind == KindPart {
		ck.partRecord(k, &v.chunks)
		return
	}
	if k.Kind == KindPartition {
		ck.partitions[partitionRow{k.Shard, k.Ino, k.Part}] = v.partition
		return
	}
	if k.Kind == KindExtent && v.extent.Off >= sealfs.HomeBytes {
		if p := ck.parts[partRow{k.Ino, k.Shard}]; p != nil {
			ck.partExtent(k, p, &v.extent)
			return
		}
	}
	if k.Kind == KindOutbox {
		ck.outboxes = append(ck.outboxes, outboxRow{letterRow{k.Ino, k.Shard}, v.outbox})
		return
	}
	if k.Ino != 0 && k.Ino.Home(ck.c.Shards) != k.Shard {
		ck.problem("record of kind %#x of inode %d in shard %d", k.Kind, k.Ino, k.Shard)
		return
	}
	switch k.Kind {
	case KindShard:
		ck.counters[k.Shard] = v.shard.Counter
	case KindUsage:
		ck.usage[usageRow{k.Shard, k.Volume}] = v.usage
	case KindInode:
		ck.inodeRecord(k, &v.inode)
	case KindEntry:
		ck.entryRecord(k, &v.entry)
	case KindExtent:
		ck.extent(k.Ino, &v.extent)
	case KindAttribute:
		ck.attributeRecord(k, v)
	case KindSymlink:
		s := ck.inode(k.Ino)
		if uint64(k.Part) != s.targetParts || s.mode&typeMask != typeLink {
			ck.problem("part %d of a target of inode %d does not belong there", k.Part, k.Ino)
		}
		s.targetParts++
		s.targetBytes += uint64(len(v.part))
	case KindQueued:
		ck.inode(k.Ino).rowQueued = true
	case KindPlace:
		ck.placeRecord(k, &v.place)
	case KindInbox:
		ck.letters[letterRow{k.Ino, k.From}] = v.letter
	case KindOrphan:
		s := ck.inode(k.Ino)
		s.rowNameless, s.rowTail = v.nameless, v.tail
	case KindLock:
		if !ck.inode(k.Ino).exists {
			ck.problem("lock on inode %d, which does not exist", k.Ino)
		}
	case KindSession:
		ck.sessionRecord(k, v)
	case KindPrepared:
		if v.prepared.Part == op.PartNew { // it is paid for already
			row := usageRow{k.Shard, v.prepared.Volume}
			u := ck.usage[row]
			u.Inodes--
			u.Bytes -= PaidAhead(v.prepared)
			ck.usage[row] = u
		}
	}
}

func (ck *checker) inodeRecord(k *Key, in *Inode) {
	s := ck.inode(k.Ino)
	s.exists, s.mode, s.nlink, s.flags = true, in.Mode, in.Nlink, uint32(in.Flags)
	s.size, s.bytes, s.names = in.Size, in.Bytes, uint64(in.Names)
	s.volume, s.parent = in.Volume, in.Parent
	s.gen, s.bound, s.cut = in.Gen, in.Bound, in.Cut
	ck.totalsRecord(in, s)
	if s.partition = in.IsPartition(); s.partition {
		s.number, s.open = in.Number(), in.partState() != partFilling
	}
	if in.First.Len != 0 {
		ck.extent(k.Ino, &in.First)
	}
	s.targetBytes = uint64(len(in.Target))
	if row := (usageRow{k.Shard, in.Volume}); !s.partition {
		u := ck.usage[row]
		u.Inodes--
		u.Bytes -= int64(in.Bytes)
		ck.usage[row] = u
	}
	if counter := uint64(k.Ino) / uint64(ck.c.Shards); counter >= ck.counters[k.Shard] {
		ck.problem("inode %d is beyond its shard's counter %d", k.Ino, ck.counters[k.Shard])
	}
	if in.isDir() && in.Parent != in.Ino && in.Nlink != 0 && !s.partition {
		ck.inode(in.Parent).sum.Add(in.Told, 1)
		ck.inode(in.Parent).subdirs++
	}
}

func (ck *checker) entryRecord(k *Key, e *Entry) {
	d := ck.inode(k.Ino)
	self := d.self(k.Ino)
	if d.mode&typeMask == typeDir && (&Inode{Mode: d.mode, Bound: d.bound}).hasMoved(k.Pos) {
		d.leftover++
		return
	}
	d.entries++
	if d.partition && !d.open {
		return // they count where they come from
	}
	if !d.exists || d.mode&typeMask != typeDir {
		ck.problem("entry %q stands in inode %d, which is no directory", e.Name, k.Ino)
	} else if first := ck.c.firstCookie(&Inode{Ino: self, Volume: d.volume}, string(e.Name)); first != k.Pos&^(ordinals-1) {
		ck.problem("entry %q of directory %d has the cookie %d of another name", e.Name, k.Ino, k.Pos)
	}
	if d.partition && op.PartitionOf(k.Pos) != d.number {
		ck.problem("entry %q of directory %d, partition %d of %d, belongs to partition %d", e.Name, k.Ino, d.number, self, op.PartitionOf(k.Pos))
	}
	s := ck.inode(e.Ino)
	s.links++
	ck.inode(self).sum.Add(nameTotals(uint32(e.Type)<<12), 1)
	s.found(self)
	if e.Type == typeDir>>12 {
		s.entryParent = self
		if d.partition {
			ck.inode(self).apart++
		}
	}
	if s.entryType != 0 && s.entryType != e.Type {
		ck.problem("entry %q of directory %d has type %o, another one of inode %d has type %o", e.Name, k.Ino, e.Type, e.Ino, s.entryType)
	}
	s.entryType = e.Type
}

// extent checks e, the next one of ino. The extent in the inode comes first.
func (ck *checker) extent(ino sealfs.Ino, e *Extent) {
	s := ck.inode(ino)
	if !s.exists || s.mode&typeMask != typeFile {
		ck.problem("extent at %d of inode %d, which is no regular file", e.Off, ino)
	}
	if e.Off/block < s.lastBlock {
		ck.problem("extent at %d of inode %d overlaps the one before", e.Off, ino)
	}
	s.lastBlock = e.lastBlock() + 1
	s.stored += uint64(e.Stored())
	if e.Off+uint64(e.Len) > s.size && (s.flags&flagTail == 0 || e.Off < s.size) {
		ck.problem("extent at %d of inode %d goes beyond the size %d", e.Off, ino, s.size)
	}
	if s.bound != 0 && e.Off+uint64(e.Len) > sealfs.HomeBytes {
		ck.problem("extent at %d of inode %d stands at home, but the file has chunks", e.Off, ino)
	}
}

func (ck *checker) partRecord(k *Key, p *Part) {
	ck.parts[partRow{k.Ino, k.Shard}] = &seenPart{Part: *p}
	row := usageRow{k.Shard, p.Volume}
	u := ck.usage[row]
	u.Bytes -= int64(p.Bytes)
	ck.usage[row] = u
}

// partExtent checks e, the next one of a part.
func (ck *checker) partExtent(k *Key, p *seenPart, e *Extent) {
	end := e.Off + uint64(e.Len)
	if k.Ino.DataShard(e.Off, ck.c.Shards) != k.Shard || end > chunkEnd(e.Off) {
		ck.problem("extent at %d of inode %d, of %d bytes, stands in shard %d", e.Off, k.Ino, e.Len, k.Shard)
	}
	if e.Off/block < p.lastBlock {
		ck.problem("extent at %d of inode %d overlaps the one before", e.Off, k.Ino)
	}
	if end > p.Bound {
		ck.problem("extent at %d of inode %d goes beyond the bound %d of its part", e.Off, k.Ino, p.Bound)
	}
	p.lastBlock, p.end = e.lastBlock()+1, end
	p.stored += uint64(e.Stored())
}

// part compares a part with its file.
func (ck *checker) part(row partRow, p *seenPart) {
	if p.stored != p.Bytes {
		ck.problem("part of inode %d in shard %d counts %d bytes and has %d", row.ino, row.shard, p.Bytes, p.stored)
	}
	s := ck.inodes[row.ino]
	switch {
	case s == nil || !s.exists:
		ck.problem("inode %d does not exist but has a part in shard %d", row.ino, row.shard)
	case s.bound == 0 || s.mode&typeMask != typeFile:
		ck.problem("inode %d has a part in shard %d, but no chunks", row.ino, row.shard)
	case s.volume != p.Volume:
		ck.problem("inode %d is of volume %d, its part in shard %d of volume %d", row.ino, s.volume, row.shard, p.Volume)
	case p.Gen > s.gen:
		ck.problem("part of inode %d in shard %d has the generation %d, the file has %d", row.ino, row.shard, p.Gen, s.gen)
	case p.Gen == s.gen && p.Bound > s.bound, p.end > max(s.bound, s.cut):
		ck.problem("part of inode %d in shard %d reaches up to %d, within %d, the file up to %d and %d", row.ino, row.shard, p.end, p.Bound, s.bound, s.cut)
	}
}

func (ck *checker) attributeRecord(k *Key, v *record) {
	s := ck.inode(k.Ino)
	row := usageRow{k.Shard, s.volume}
	u := ck.usage[row]
	if s.partition {
		// What it has from its directory costs nothing.
	} else if k.Part == 0 {
		u.Bytes -= attrLength(len(v.attribute.Name), v.attribute.Total) - int64(v.attribute.Total-len(v.attribute.Value))
	} else {
		u.Bytes -= int64(len(v.part))
	}
	ck.usage[row] = u
	if k.Part == 0 {
		if s.attrLeft != 0 {
			ck.problem("an attribute of inode %d lacks its last %d bytes", k.Ino, s.attrLeft)
		}
		s.named += uint64(len(v.attribute.Name) + 1)
		s.acls |= uint32(aclFlag(string(v.attribute.Name)))
		s.attrLeft, s.attrPart = v.attribute.Total-len(v.attribute.Value), 0
		return
	}
	s.attrPart++
	if k.Part != s.attrPart || s.attrLeft == 0 || len(v.part) != min(s.attrLeft, attrPart) {
		ck.problem("part %d of attribute %x of inode %d does not belong there", k.Part, k.Hash, k.Ino)
	}
	s.attrLeft -= min(s.attrLeft, len(v.part))
}

func (ck *checker) sessionRecord(k *Key, v *record) {
	row := sessionRow{k.Shard, k.Session}
	if k.Pos == 0 {
		ck.sessions[row] = v.session.Rows
		return
	}
	if ck.sessions[row] == 0 {
		ck.problem("session %d has more result rows in shard %d than it counts", k.Session, k.Shard)
		return
	}
	ck.sessions[row]--
}

// finish checks what only the whole can tell, in a stable order.
func (ck *checker) finish() {
	ck.letterSums()
	for _, ino := range slices.Sorted(maps.Keys(ck.inodes)) {
		s := ck.inodes[ino]
		if !s.exists {
			ck.problem("inode %d does not exist but has %d entries, %d bytes of extents, %d subdirectories", ino, s.links, s.stored, s.subdirs)
			continue
		}
		ck.counts(ino, s)
		ck.totals(ino, s)
		if s.mode&typeMask == typeDir {
			ck.directory(ino, s)
		} else if s.links != s.nlink {
			ck.problem("inode %d has %d links and %d entries", ino, s.nlink, s.links)
		}
	}
	for row, p := range ck.parts {
		ck.part(row, p)
	}
	for row, u := range ck.usage {
		if u != (Usage{}) {
			ck.problem("usage of volume %d in shard %d is wrong by %d bytes, %d inodes", row.volume, row.shard, u.Bytes, u.Inodes)
		}
	}
	for row, n := range ck.sessions {
		if n != 0 {
			ck.problem("session %d counts %d result rows in shard %d that are not there", row.session, n, row.shard)
		}
	}
}

func (ck *checker) counts(ino sealfs.Ino, s *seen) {
	if s.links != 0 && uint32(s.entryType) != s.mode>>12 {
		ck.problem("inode %d has mode %o, its entries have type %o", ino, s.mode, s.entryType)
	}
	if s.stored != s.bytes {
		ck.problem("inode %d counts %d bytes and has %d", ino, s.bytes, s.stored)
	}
	dying := s.flags&flagDying != 0 // what is left of its attributes and target says nothing
	if !dying && (s.named != s.names || s.attrLeft != 0) {
		ck.problem("inode %d counts %d bytes of attribute names and has %d", ino, s.names, s.named)
	}
	if acls := s.flags & (flagAccess | flagDefault); !dying && s.acls != acls {
		ck.problem("inode %d has the flags %#x of ACLs and the ACLs %#x", ino, acls, s.acls)
	}
	if s.mode&typeMask == typeLink && s.targetBytes != s.size && !dying {
		ck.problem("symlink %d has the size %d and %d bytes", ino, s.size, s.targetBytes)
	}
	if (s.nlink == 0) != s.rowNameless {
		ck.problem("inode %d has %d links, its row in the orphan table says nameless: %v", ino, s.nlink, s.rowNameless)
	}
	if (s.flags&flagTail != 0 || s.cut != 0) != s.rowTail {
		ck.problem("inode %d has flags %#x and the cut %d, its row in the orphan table says tail: %v", ino, s.flags, s.cut, s.rowTail)
	}
	if s.flags&flagLinkable != 0 && s.nlink != 0 {
		ck.problem("inode %d has %d links but never got a name", ino, s.nlink)
	}
}

func (ck *checker) directory(ino sealfs.Ino, s *seen) {
	if s.entries != s.size {
		ck.problem("directory %d counts %d entries and has %d", ino, s.size, s.entries)
	}
	if s.partition {
		ck.partition(ino, s)
		return
	}
	ck.home(ino, s)
	if s.nlink != 0 && s.nlink != 2+s.subdirs-s.apart {
		ck.problem("directory %d has %d links and %d subdirectories, %d of them in partitions", ino, s.nlink, s.subdirs, s.apart)
	}
	root := s.parent == ino
	switch {
	case s.nlink == 0 && s.links == 0, root && s.links == 0:
	case root || s.links != 1:
		ck.problem("directory %d has %d entries that refer to it", ino, s.links)
	case s.entryParent != s.parent:
		ck.problem("directory %d stands in %d but has the parent %d", ino, s.entryParent, s.parent)
	}
}

// home checks what the home of a directory says of its partitions.
func (ck *checker) home(ino sealfs.Ino, s *seen) {
	in := Inode{Ino: ino, Mode: s.mode, Bound: s.bound}
	shard := ino.Home(ck.c.Shards)
	for i := range in.Moved() {
		p := ck.partitions[partitionRow{shard, ino, uint16(i)}]
		if at := ck.inodes[p]; p == 0 || at == nil || !at.partition || !at.open && s.gen == 0 || at.parent != ino || at.number != i || at.volume != s.volume {
			ck.problem("directory %d has the partition %d, which is not its partition %d", ino, p, i)
		}
	}
	if _, working := ck.partitions[partitionRow{shard, ino, workRow}]; working != (s.gen != 0) {
		ck.problem("directory %d has the generation %d, a row says that there is something to do: %v", ino, s.gen, working)
	}
	if s.leftover != 0 && s.gen == 0 {
		ck.problem("directory %d has %d entries that have moved", ino, s.leftover)
	}
}

// partition checks what a partition says of itself.
func (ck *checker) partition(ino sealfs.Ino, s *seen) {
	if s.links != 0 {
		ck.problem("partition %d of directory %d has %d names", ino, s.parent, s.links)
	}
	if at := ck.partitions[partitionRow{ino.Home(ck.c.Shards), s.parent, uint16(s.number)}]; at != ino {
		ck.problem("inode %d is partition %d of directory %d, whose row says %d", ino, s.number, s.parent, at)
	}
	home := ck.inodes[s.parent]
	if home == nil || !home.exists {
		ck.problem("partition %d is of directory %d, which does not exist", ino, s.parent)
		return
	}
	if in := (Inode{Mode: home.mode, Bound: home.bound}); home.gen == 0 && in.Moved() <= s.number {
		ck.problem("directory %d has %d partitions, and %d is number %d", s.parent, in.Moved(), ino, s.number)
	}
	if s.open && s.nlink < 2 {
		ck.problem("partition %d has %d links", ino, s.nlink)
	}
}
