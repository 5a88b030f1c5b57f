package op

import (
	"encoding/binary"
	"fmt"

	"sealfs"
	"sealfs/internal/enc"
)

// A name's place in its directory is its cookie: a hash of 55 bits, and an ordinal of
// eight for names that share it. A large directory in a cluster of several stores is
// split by the hash's upper bits: each partition is a directory of its own, which has no name and
// whose entries stand under the cookies that they had.
const (
	// OrdinalBits is how many bits of a cookie tell names with the same hash apart.
	OrdinalBits = 8
	// Partitions is how many there are of a directory that is split.
	Partitions     = 1 << partitionBits
	partitionBits  = 6
	partitionShift = 63 - partitionBits
)

// NameHash returns the hash of a name in a directory. The key is no secret (the inode
// number is in stat(2)), but to fill the ordinals of one hash takes 256 names with the same 55 bits under a
// key that no other directory has.
func NameHash(dir sealfs.Ino, v sealfs.Volume, name string) uint64 {
	return SipHash(uint64(dir)^0x5345414c46536469, uint64(v)^0x72656e7472696573, name) >> (1 + OrdinalBits)
}

// PartitionOf returns the number of the partition to which a cookie belongs.
func PartitionOf(cookie uint64) uint64 { return cookie >> partitionShift }

// PartitionStart returns the first cookie that a partition may have.
func PartitionStart(number uint64) uint64 { return number << partitionShift }

// The directory in Attr.Bound: how far the home of a directory has got, or what a partition is.
const (
	movedFrom = 1 // Bound of a home: one more than the number of partitions that have moved
	// PartitionBound is the least Bound of a partition; its Gen is the directory that it is a part of.
	PartitionBound = 1024
)

// IsSplit reports whether a are attributes of a directory whose entries are, or may be, elsewhere
// as well: times, link count and size are what stands at its home.
func (a *Attr) IsSplit() bool { return a.isDir() && a.Bound != 0 && a.Bound < PartitionBound }

// Moved returns how many partitions of the directory with attributes a are in use.
func (a *Attr) Moved() uint64 {
	if !a.IsSplit() {
		return 0
	}
	return a.Bound - movedFrom
}

func (a *Attr) isDir() bool { return a.Mode&0o170000 == 0o040000 }

// Merge adds to a, attributes of the home of a directory, those of a partition.
func (a *Attr) Merge(p *Attr) {
	a.Size += p.Size
	a.Nlink += p.Nlink - 2
	a.Version += p.Version
	a.Ctime, a.Mtime = max(a.Ctime, p.Ctime), max(a.Mtime, p.Mtime)
}

// MovedEntry is an entry on its way to a partition.
type MovedEntry struct {
	Cookie uint64
	Ino    sealfs.Ino
	Type   uint8  // upper four bits of the mode
	Name   string // aliases nothing
}

// AppendEntry appends the encoding of e, for the Data of a Partition, to b.
func AppendEntry(b []byte, e *MovedEntry) []byte {
	b = enc.AppendU64(b, e.Cookie)
	b = binary.AppendUvarint(b, uint64(e.Ino))
	b = append(b, e.Type)
	return enc.AppendVarBytes(b, e.Name)
}

// MovedBytes bounds the Data of one Partition request.
const MovedBytes = 32 << 10

// DecodeEntries calls fn for what AppendEntry wrote until it returns an error. Bytes that are
// something else are ErrInvalid.
func DecodeEntries(b []byte, fn func(*MovedEntry) error) error {
	in := enc.Reader{B: b}
	for len(in.B) > 0 {
		e := MovedEntry{Cookie: in.U64(), Ino: sealfs.Ino(in.Uvarint()), Type: in.U8(), Name: string(in.VarBytes(sealfs.NameMax))}
		if in.Err || e.Ino == 0 || e.Ino > sealfs.InoMax || e.Type == 0 || e.Type > 15 || e.Name == "" || e.Cookie < 1<<OrdinalBits || e.Cookie >= 1<<63 {
			return fmt.Errorf("list of entries is malformed: %w", sealfs.ErrInvalid)
		}
		if err := fn(&e); err != nil {
			return err
		}
	}
	return nil
}

// AppendPartition appends the directory that is the next partition, for the Data of an answer to a Getattr with the
// flag Plus, to b.
func AppendPartition(b []byte, ino sealfs.Ino) []byte { return binary.AppendUvarint(b, uint64(ino)) }

// DecodePartitions returns what AppendPartition wrote, and ErrInvalid for other bytes.
func DecodePartitions(b []byte) ([]sealfs.Ino, error) {
	var list []sealfs.Ino
	in := enc.Reader{B: b}
	for len(in.B) > 0 {
		ino := sealfs.Ino(in.Uvarint())
		if in.Err || ino == 0 || ino > sealfs.InoMax || len(list) == Partitions {
			return nil, fmt.Errorf("list of partitions is malformed: %w", sealfs.ErrInvalid)
		}
		list = append(list, ino)
	}
	return list, nil
}
