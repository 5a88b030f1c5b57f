package meta

import (
	"encoding/binary"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/op"
	"sealfs/pmem"
)

// The file types and bits of a mode, as in stat(2).
const (
	typeMask   = 0o170000
	typeSocket = 0o140000
	typeLink   = 0o120000
	typeFile   = 0o100000
	typeBlock  = 0o060000
	typeDir    = 0o040000
	typeChar   = 0o020000
	typeFifo   = 0o010000
	setuid     = 0o4000
	setgid     = 0o2000
	groupExec  = 0o010
	permMask   = 0o7777
)

// Flags of an inode.
const (
	flagTail     = 1 << iota // extents at home beyond the size wait for Reclaim: the file must not grow
	flagLinkable             // made by Tmpfile and never linked: Link may give it a name
	flagDying                // being freed in steps: attributes and target may be gone in part
	flagAccess               // it has the attribute op.ACLAccess; with it and the next, the store's device needs layout.FeatureACL
	flagDefault              // it has the attribute op.ACLDefault
	flagQueued               // it has a row of KindQueued; with it and the next, the store's device needs layout.FeatureTotals
	flagSpread               // a file whose size is counted where its rows of KindPlace say, not in Parent
	flagsAll     = 1<<iota - 1
)

// inlineTarget is the longest symlink target that stands in the inode, in bytes.
const inlineTarget = 160

// Inode is an inode's record:
//
//	size field
//	   2  presence mask, little-endian: bit i set = field marked i is there
//	   2  mode
//	   8  birth time
//	   8  0  change time, if it is not the birth time
//	   8  1  modification time, if it is not the change time
//	   8  2  access time, if it is not the birth time
//	   4  3  link count, if it is not 1
//	   …  version, volume (varints)
//	   …  4 uid, 5 gid, 6 rdev, 7 size, 8 bytes if they are not those of the extent inside,
//	      9 parent, 10 flags (one byte), 11 length of the attributes' names: varints, if not 0
//	   …  12 first extent, when it begins at offset 0 and is short
//	   …  13 symlink target, when it is short: varint length, bytes
//	   …  15 (behind 14) totals of a directory, and those that it has told: six signed varints
//	   …  14 generation, bound and cut of a file that has chunks, or of a directory that was split: varints
//
// What changes all the time and by a lot, the times and a directory's link
// count, has a fixed width, so that updates stay in place and their redo is a
// few bytes. Version, size and bytes are varints: they change their width
// once in 128 changes or less often, fixed ones would cost a small file 18 bytes
// for ever. A new file's four times are one, a written file's are two.
type Inode struct {
	Ino                        sealfs.Ino // from the key, not in the record
	Mode, Nlink                uint32
	UID, GID, Rdev             uint32
	Size                       uint64 // of a directory: the number of its entries
	Bytes                      uint64 // stored, of all extents
	Atime, Mtime, Ctime, Btime int64
	Version                    uint64
	Volume                     sealfs.Volume
	Parent                     sealfs.Ino // of a directory; of a file or symbolic link, where all its names are, if it counts
	Flags                      uint8
	Names                      uint32 // bytes of the list of attribute names
	First                      Extent // Len 0: none
	Target                     []byte // of a symlink; aliases the page

	// A file with a Bound has chunks: see chunk.go. A directory with one is split, or a
	// partition: see partition.go.
	Gen   uint64 // grows whenever chunks are cut off
	Bound uint64 // no chunk of this generation has data beyond
	Cut   uint64 // from the size up to here chunks of earlier generations wait to be purged; 0: none

	// A directory that is Counted has totals: see totals.go.
	Counted     bool
	Total, Told Totals

	told    uint64 // of a file: the size in the record
	part    bool   // stands for what shard at holds of the file: see loadPart
	at      sealfs.Shard
	fresh   bool               // made by this operation
	foreign bool               // lies in another store: what is known came with the request
	kept    int                // bytes in keep that stand for First.Sums or Target
	keep    [inlineTarget]byte // see own
}

const inodeRecordMax = 2 + 2 + 32 + 4 + 10 + 5 + 3*5 + 10 + 10 + 8 + 1 + 3 + (17 + 4*inlineBlocks) + 2 + inlineTarget + 3*10 + 2*totalsMax

// own copies what aliases the page, so that in outlives changes of the tree.
func (in *Inode) own() {
	if in.First.Len != 0 {
		in.kept = copy(in.keep[:], in.First.Sums)
		in.First.Sums = nil
	} else if len(in.Target) != 0 {
		in.kept = copy(in.keep[:], in.Target)
		in.Target = nil
	}
}

// first returns the extent inside; its sums alias in.
func (in *Inode) first() Extent {
	e := in.First
	if in.kept > 0 && e.Len > 0 {
		e.Sums = in.keep[:in.kept]
	}
	return e
}

// setFirst makes e the extent inside; an e without length takes it away.
func (in *Inode) setFirst(e *Extent) {
	in.kept = copy(in.keep[:], e.Sums)
	in.First = Extent{Len: e.Len, Addr: e.Addr, Cover: e.Cover, Stamp: e.Stamp}
}

// target returns the target inside, which may alias in.
func (in *Inode) target() []byte {
	if in.kept > 0 && in.First.Len == 0 {
		return in.keep[:in.kept]
	}
	return in.Target
}

func (in *Inode) isDir() bool  { return in.Mode&typeMask == typeDir }
func (in *Inode) isFile() bool { return in.Mode&typeMask == typeFile }
func (in *Inode) isLink() bool { return in.Mode&typeMask == typeLink }

// touch notes a change of the inode's contents at time now.
func (in *Inode) touch(now int64) {
	in.Mtime, in.Ctime = now, now
	in.Version++
}

// change notes a change of the inode itself at time now.
func (in *Inode) change(now int64) {
	in.Ctime = now
	in.Version++
}

// Attr fills a with what stat(2) tells of in.
func (in *Inode) Attr(a *op.Attr) {
	*a = op.Attr{
		Ino: in.Ino, Mode: in.Mode, Nlink: in.Nlink, UID: in.UID, GID: in.GID, Rdev: in.Rdev,
		Size: in.Size, Blocks: (in.Bytes + 511) / 512,
		Atime: in.Atime, Mtime: in.Mtime, Ctime: in.Ctime, Btime: in.Btime, Version: in.Version,
		Gen: in.Gen, Bound: in.Bound,
	}
	if in.IsPartition() {
		a.Gen = uint64(in.Parent)
	}
	if in.Flags&flagAccess != 0 {
		a.Mode |= op.ModeACL
	}
	if reach := min(in.Size, in.Bound); reach > sealfs.HomeBytes && !in.foreign {
		// What chunks hold is known only where they are: as if they had no holes.
		a.Blocks = (in.Bytes + 511 + reach - sealfs.HomeBytes) / 512
	}
}

// Append appends the record of in to b.
func (in *Inode) Append(b []byte) []byte {
	at := len(b)
	var mask uint16
	b = append(b, 0, 0, byte(in.Mode), byte(in.Mode>>8))
	b = binary.LittleEndian.AppendUint64(b, uint64(in.Btime))
	if in.Ctime != in.Btime {
		mask |= 1 << 0
		b = binary.LittleEndian.AppendUint64(b, uint64(in.Ctime))
	}
	if in.Mtime != in.Ctime {
		mask |= 1 << 1
		b = binary.LittleEndian.AppendUint64(b, uint64(in.Mtime))
	}
	if in.Atime != in.Btime {
		mask |= 1 << 2
		b = binary.LittleEndian.AppendUint64(b, uint64(in.Atime))
	}
	if in.Nlink != 1 {
		mask |= 1 << 3
		b = binary.LittleEndian.AppendUint32(b, in.Nlink)
	}
	b = binary.AppendUvarint(b, in.Version)
	b = binary.AppendUvarint(b, uint64(in.Volume))
	first := in.first()
	bytes := in.Bytes
	if bytes == uint64(first.Stored()) {
		bytes = 0
	}
	for i, v := range [...]uint64{
		uint64(in.UID), uint64(in.GID), uint64(in.Rdev), in.Size, bytes, uint64(in.Parent), uint64(in.Flags), uint64(in.Names),
	} {
		if v != 0 {
			mask |= 1 << (4 + i)
			b = binary.AppendUvarint(b, v)
		}
	}
	if first.Len != 0 {
		mask |= 1 << 12
		b = first.Append(b)
	} else if target := in.target(); len(target) != 0 {
		mask |= 1 << 13
		b = enc.AppendVarBytes(b, target)
	}
	if in.Bound != 0 || in.Gen != 0 && in.isDir() {
		mask |= 1 << 14
		for _, v := range [...]uint64{in.Gen, in.Bound, in.Cut} {
			b = binary.AppendUvarint(b, v)
		}
	}
	if in.Counted {
		mask |= 1 << 15
		b = in.Told.Append(in.Total.Append(b))
	}
	binary.LittleEndian.PutUint16(b[at:], mask)
	return b
}

// DecodeInode reads the record b of inode ino; First.Sums and Target alias b.
// It returns a *sealfs.Corruption for bytes that Append cannot have written.
func DecodeInode(b []byte, ino sealfs.Ino, in *Inode) error {
	*in = Inode{Ino: ino, Nlink: 1}
	r := enc.Reader{B: b}
	mask := r.U16()
	in.Mode = uint32(r.U16())
	in.Btime = int64(r.U64())
	ok := true
	in.Ctime, in.Atime = in.Btime, in.Btime
	if mask&(1<<0) != 0 {
		in.Ctime = int64(r.U64())
		ok = ok && in.Ctime != in.Btime
	}
	in.Mtime = in.Ctime
	if mask&(1<<1) != 0 {
		in.Mtime = int64(r.U64())
		ok = ok && in.Mtime != in.Ctime
	}
	if mask&(1<<2) != 0 {
		in.Atime = int64(r.U64())
		ok = ok && in.Atime != in.Btime
	}
	if mask&(1<<3) != 0 {
		in.Nlink = r.U32()
		ok = ok && in.Nlink != 1 && in.Nlink <= sealfs.LinkMax
	}
	in.Version = r.Uvarint()
	volume := r.Uvarint()
	var v [8]uint64
	for i := range v {
		if mask&(1<<(4+i)) != 0 {
			v[i] = r.Uvarint()
			ok = ok && v[i] != 0
		}
	}
	const u32 = 1<<32 - 1
	if r.Err || !ok || volume > u32 || v[0] > u32 || v[1] > u32 || v[2] > u32 || v[3] > sealfs.FileSizeMax ||
		v[5] > sealfs.InoMax || v[6] > flagsAll || v[7] > sealfs.XattrListMax {
		return damaged("record %x of inode %d", b, ino)
	}
	in.Volume = sealfs.Volume(volume)
	in.UID, in.GID, in.Rdev = uint32(v[0]), uint32(v[1]), uint32(v[2])
	in.Size, in.Bytes = v[3], v[4]
	in.told = in.Size
	in.Parent, in.Flags, in.Names = sealfs.Ino(v[5]), uint8(v[6]), uint32(v[7])
	if mask&(1<<12) != 0 {
		ok = in.First.read(&r, inlineBlocks) && mask&(1<<13) == 0 && in.Bytes != uint64(in.First.Stored())
		if in.Bytes == 0 {
			in.Bytes = uint64(in.First.Stored())
		}
	}
	if mask&(1<<13) != 0 {
		in.Target = r.VarBytes(inlineTarget)
		ok = ok && len(in.Target) > 0
	}
	if mask&(1<<14) != 0 {
		in.Gen, in.Bound, in.Cut = r.Uvarint(), r.Uvarint(), r.Uvarint()
		ok = ok && (in.isDir() && in.plausibleDir() || in.isFile() && in.Bound >= sealfs.HomeBytes && in.Bound <= boundMax &&
			(in.Cut == 0 || in.Cut > sealfs.HomeBytes && in.Cut <= boundMax))
	}
	if in.Counted = mask&(1<<15) != 0; in.Counted {
		in.Total.read(&r)
		in.Told.read(&r)
	}
	if !ok || !r.Done() || !in.plausible() {
		return damaged("record %x of inode %d", b, ino)
	}
	return nil
}

// plausible reports whether the fields fit the file's type.
func (in *Inode) plausible() bool {
	flags := in.Flags &^ (flagDying | flagAccess)
	if in.Parent != 0 && in.Flags&flagSpread != 0 || in.Counted && !in.isDir() {
		return false
	}
	const told = flagQueued | flagSpread
	switch in.Mode & typeMask {
	case typeFile:
		return in.Target == nil && in.Bytes >= uint64(in.First.Stored()) && flags&flagDefault == 0
	case typeDir:
		return in.Parent != 0 && in.Target == nil && in.First.Len == 0 && in.Bytes == 0 && flags&^(flagDefault|flagQueued) == 0
	case typeLink:
		return in.First.Len == 0 && in.Bytes == 0 && in.Flags&^(flagDying|told) == 0 && in.Size > 0 && in.Size <= sealfs.SymlinkMax &&
			(in.Target == nil) == (in.Size > inlineTarget) && (in.Target == nil || uint64(len(in.Target)) == in.Size)
	case typeSocket, typeBlock, typeChar, typeFifo:
		return in.Parent == 0 && in.Target == nil && in.First.Len == 0 && in.Bytes == 0 && in.Size == 0 && flags == 0
	}
	return false
}

// GetInode reads an inode; what aliases the page is valid as pmem.Get says. It
// returns sealfs.ErrNotExist when there is none.
func GetInode(r pmem.Reader, c Config, ino sealfs.Ino, in *Inode) error {
	if ino == 0 || ino > sealfs.InoMax {
		return sealfs.ErrNotExist
	}
	k := InodeKey(c.Shards, ino)
	b, err := pmem.Get(r, k[:])
	if err != nil {
		return err
	}
	return DecodeInode(b, ino, in)
}

// getInode is GetInode for an inode that a request names: that there is none is a refusal.
func getInode(r pmem.Reader, c Config, ino sealfs.Ino, in *Inode) error {
	err := GetInode(r, c, ino, in)
	if err == sealfs.ErrNotExist {
		return refusal(sealfs.ErrNotExist)
	}
	return err
}

// getDir is getInode for a directory that has a name.
func getDir(r pmem.Reader, c Config, ino sealfs.Ino, in *Inode) error {
	if err := getInode(r, c, ino, in); err != nil {
		return err
	}
	if !in.isDir() {
		return refusal(sealfs.ErrNotDir)
	}
	return nil
}

// refusal is a code that goes into the reply; other errors are damage or a full region.
type refusal sealfs.Code

// Error returns the sentence of the code.
func (r refusal) Error() string { return sealfs.Code(r).Error() }
