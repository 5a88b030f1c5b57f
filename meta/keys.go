package meta

import (
	"encoding/binary"
	"fmt"

	"sealfs"
	"sealfs/op"
)

// Kind is the third byte of every key: what its record is. Values stand in
// regions: append only.
type Kind uint8

// The kinds. All keys begin with the shard (two bytes) and the kind; the rest
// is listed here. Numbers are big-endian, so that memcmp orders them.
const (
	KindShard     Kind = 0x01 // ShardState
	KindUsage     Kind = 0x02 // volume(4): Usage
	KindGrant     Kind = 0x03 // volume(4) store(16): Grant, in the shard of who keeps the volume's quota
	KindInode     Kind = 0x10 // ino(8): Inode
	KindPart      Kind = 0x18 // ino(8): Part, in a shard that holds chunks of the file
	KindPartition Kind = 0x19 // directory(8) number(1): the inode that is the partition
	KindEntry     Kind = 0x20 // directory(8) cookie(8): Entry
	KindQueued    Kind = 0x28 // ino(8): one byte; what it has not told yet waits for a Tally. See totals.go for these four
	KindPlace     Kind = 0x29 // ino(8) directory(8): Place
	KindOutbox    Kind = 0x2a // directory(8) elsewhere, in the shard of the sender: Outbox
	KindInbox     Kind = 0x2b // directory(8) shard(2) of the sender: number of the last letter, a varint
	KindExtent    Kind = 0x30 // ino(8) last block(8): Extent, in the file's home or with its part
	KindAttribute Kind = 0x40 // ino(8) hash(4) ordinal(1) part(2): name and value
	KindSymlink   Kind = 0x48 // ino(8) part(1): target
	KindOrphan    Kind = 0x50 // ino(8): why it is there
	KindLock      Kind = 0x60 // ino(8) class(1) start(8) session(8) owner(8): LockRow
	KindSession   Kind = 0x70 // session(8) sequence(8): SessionState under sequence 0, result rows above
	KindPrepared  Kind = 0x80 // transaction(16) ordinal(1): the Prepare, as op encodes it
	KindDecision  Kind = 0x88 // transaction(16): the shards of the other parties, two bytes each
)

// Classes of locks, in keys of KindLock.
const (
	classPOSIX = 0
	classFlock = 1
)

func putHead(b []byte, s sealfs.Shard, k Kind) {
	binary.BigEndian.PutUint16(b, uint16(s))
	b[2] = byte(k)
}

func putIno(b []byte, shards uint32, k Kind, ino sealfs.Ino) {
	putInoAt(b, ino.Home(shards), k, ino)
}

// putInoAt is putIno for what may stand elsewhere than in ino's home.
func putInoAt(b []byte, s sealfs.Shard, k Kind, ino sealfs.Ino) {
	putHead(b, s, k)
	binary.BigEndian.PutUint64(b[3:], uint64(ino))
}

// ShardKey returns the key of a shard's state.
func ShardKey(s sealfs.Shard) (b [3]byte) {
	putHead(b[:], s, KindShard)
	return b
}

// UsageKey returns the key of what a volume uses in a shard.
func UsageKey(s sealfs.Shard, v sealfs.Volume) (b [7]byte) {
	putHead(b[:], s, KindUsage)
	binary.BigEndian.PutUint32(b[3:], uint32(v))
	return b
}

// GrantKey returns the key of what a store may use of a volume's quota.
func GrantKey(s sealfs.Shard, v sealfs.Volume, store sealfs.UUID) (b [23]byte) {
	putHead(b[:], s, KindGrant)
	binary.BigEndian.PutUint32(b[3:], uint32(v))
	copy(b[7:], store[:])
	return b
}

// InodeKey returns the key of an inode, in a cluster of shards shards like all below.
func InodeKey(shards uint32, ino sealfs.Ino) (b [11]byte) {
	putIno(b[:], shards, KindInode, ino)
	return b
}

// PartKey returns the key of what shard s knows of the chunks of ino that it holds.
func PartKey(s sealfs.Shard, ino sealfs.Ino) (b [11]byte) {
	putInoAt(b[:], s, KindPart, ino)
	return b
}

// PartitionKey returns the key of what shard s knows of a partition of a directory.
func PartitionKey(s sealfs.Shard, dir sealfs.Ino, number uint8) (b [12]byte) {
	putInoAt(b[:], s, KindPartition, dir)
	b[11] = number
	return b
}

// EntryKey returns the key of the entry of directory dir at cookie.
func EntryKey(shards uint32, dir sealfs.Ino, cookie uint64) (b [19]byte) {
	putIno(b[:], shards, KindEntry, dir)
	binary.BigEndian.PutUint64(b[11:], cookie)
	return b
}

// QueuedKey returns the key of the row which says that a Tally of ino is due.
func QueuedKey(shards uint32, ino sealfs.Ino) (b [11]byte) {
	putIno(b[:], shards, KindQueued, ino)
	return b
}

// PlaceKey returns the key of the place of a file in the directory dir.
func PlaceKey(shards uint32, ino, dir sealfs.Ino) (b [19]byte) {
	putIno(b[:], shards, KindPlace, ino)
	binary.BigEndian.PutUint64(b[11:], uint64(dir))
	return b
}

// OutboxKey returns the key of what shard s has to tell a directory elsewhere.
func OutboxKey(s sealfs.Shard, to sealfs.Ino) (b [11]byte) {
	putInoAt(b[:], s, KindOutbox, to)
	return b
}

// InboxKey returns the key of what a directory knows of letters from shard s.
func InboxKey(shards uint32, dir sealfs.Ino, s sealfs.Shard) (b [13]byte) {
	putIno(b[:], shards, KindInbox, dir)
	binary.BigEndian.PutUint16(b[11:], uint16(s))
	return b
}

// ExtentKey returns the key of the extent whose last block is last. Extents
// stand under their last block, not their first, so that one seek to a block
// finds the extent that holds it or else the next one.
func ExtentKey(shards uint32, ino sealfs.Ino, last uint64) (b [19]byte) {
	return PartExtentKey(ino.Home(shards), ino, last)
}

// PartExtentKey is ExtentKey for an extent that stands in shard s.
func PartExtentKey(s sealfs.Shard, ino sealfs.Ino, last uint64) (b [19]byte) {
	putInoAt(b[:], s, KindExtent, ino)
	binary.BigEndian.PutUint64(b[11:], last)
	return b
}

// AttributeKey returns the key of a part of an extended attribute.
func AttributeKey(shards uint32, ino sealfs.Ino, hash uint32, ordinal uint8, part uint16) (b [18]byte) {
	putIno(b[:], shards, KindAttribute, ino)
	binary.BigEndian.PutUint32(b[11:], hash)
	b[15] = ordinal
	binary.BigEndian.PutUint16(b[16:], part)
	return b
}

// SymlinkKey returns the key of a part of a long symlink target.
func SymlinkKey(shards uint32, ino sealfs.Ino, part uint8) (b [12]byte) {
	putIno(b[:], shards, KindSymlink, ino)
	b[11] = part
	return b
}

// OrphanKey returns the key of an inode's row in the orphan table.
func OrphanKey(shards uint32, ino sealfs.Ino) (b [11]byte) {
	putIno(b[:], shards, KindOrphan, ino)
	return b
}

// LockKey returns the key of a lock of the given class (0 POSIX, 1 flock).
func LockKey(shards uint32, ino sealfs.Ino, class uint8, start uint64, session sealfs.Session, owner uint64) (b [36]byte) {
	putIno(b[:], shards, KindLock, ino)
	b[11] = class
	binary.BigEndian.PutUint64(b[12:], start)
	binary.BigEndian.PutUint64(b[20:], uint64(session))
	binary.BigEndian.PutUint64(b[28:], owner)
	return b
}

// SessionKey returns the key of the result row of a session's change seq, or
// with seq 0 of the session's state in the shard.
func SessionKey(s sealfs.Shard, session sealfs.Session, seq uint64) (b [19]byte) {
	putHead(b[:], s, KindSession)
	binary.BigEndian.PutUint64(b[3:], uint64(session))
	binary.BigEndian.PutUint64(b[11:], seq)
	return b
}

func putTx(b []byte, s sealfs.Shard, k Kind, tx op.Tx) {
	putHead(b, s, k)
	// The age is a time after 1970, so its bytes order as unsigned ones do.
	binary.BigEndian.PutUint64(b[3:], uint64(tx.Age))
	binary.BigEndian.PutUint64(b[11:], tx.Nonce)
}

// PreparedKey returns the key of what a transaction has prepared in a shard.
func PreparedKey(s sealfs.Shard, tx op.Tx, ordinal uint8) (b [20]byte) {
	putTx(b[:], s, KindPrepared, tx)
	b[19] = ordinal
	return b
}

// DecisionKey returns the key of the row which says that a transaction is committed.
func DecisionKey(s sealfs.Shard, tx op.Tx) (b [19]byte) {
	putTx(b[:], s, KindDecision, tx)
	return b
}

// Key is a decoded key of any kind. Only the fields of its kind are set.
type Key struct {
	Shard   sealfs.Shard
	Kind    Kind
	Volume  sealfs.Volume
	Ino     sealfs.Ino     // for an entry, the directory
	Pos     uint64         // cookie, last block, start of a lock, or sequence of a result row
	Dir     sealfs.Ino     // of a place
	From    sealfs.Shard   // of an inbox
	Session sealfs.Session // of a lock, row or state
	Owner   uint64         // of a lock
	Hash    uint32         // of an attribute's name
	Part    uint16         // of an attribute or a symlink; number of a partition
	Ordinal uint8          // of an attribute or a prepared row
	Class   uint8          // of a lock
	Tx      op.Tx          // of a prepared row or a decision
	Store   sealfs.UUID    // of a grant
}

// keyLen returns the length of keys of kind k, 0 if there is no such kind.
func keyLen(k Kind) int {
	switch k {
	case KindShard:
		return 3
	case KindUsage:
		return 7
	case KindInode, KindOrphan, KindPart, KindQueued, KindOutbox:
		return 11
	case KindInbox:
		return 13
	case KindSymlink, KindPartition:
		return 12
	case KindAttribute:
		return 18
	case KindEntry, KindExtent, KindPlace, KindSession, KindDecision:
		return 19
	case KindPrepared:
		return 20
	case KindGrant:
		return 23
	case KindLock:
		return 36
	}
	return 0
}

// DecodeKey reads a key that one of the functions above made, or returns a
// *sealfs.Corruption.
func DecodeKey(b []byte) (Key, error) {
	if len(b) < 3 || keyLen(Kind(b[2])) != len(b) {
		return Key{}, damaged("key %x", b)
	}
	k := Key{Shard: sealfs.Shard(binary.BigEndian.Uint16(b)), Kind: Kind(b[2])}
	switch k.Kind {
	case KindShard:
		return k, nil
	case KindUsage:
		k.Volume = sealfs.Volume(binary.BigEndian.Uint32(b[3:]))
		return k, nil
	case KindGrant:
		k.Volume = sealfs.Volume(binary.BigEndian.Uint32(b[3:]))
		copy(k.Store[:], b[7:])
		return k, nil
	case KindSession:
		k.Session = sealfs.Session(binary.BigEndian.Uint64(b[3:]))
		k.Pos = binary.BigEndian.Uint64(b[11:])
		return k, nil
	case KindPrepared, KindDecision:
		k.Tx = op.Tx{Age: int64(binary.BigEndian.Uint64(b[3:])), Nonce: binary.BigEndian.Uint64(b[11:])}
		if k.Kind == KindPrepared {
			k.Ordinal = b[19]
		}
		if k.Tx.Age <= 0 {
			return Key{}, damaged("key %x", b)
		}
		return k, nil
	}
	k.Ino = sealfs.Ino(binary.BigEndian.Uint64(b[3:]))
	ok := k.Ino > 0 && k.Ino <= sealfs.InoMax
	switch k.Kind {
	case KindEntry:
		k.Pos = binary.BigEndian.Uint64(b[11:])
		ok = ok && k.Pos >= cookieMin && k.Pos < 1<<63
	case KindPlace:
		k.Dir = sealfs.Ino(binary.BigEndian.Uint64(b[11:]))
		ok = ok && k.Dir > 0 && k.Dir <= sealfs.InoMax
	case KindInbox:
		k.From = sealfs.Shard(binary.BigEndian.Uint16(b[11:]))
	case KindExtent:
		k.Pos = binary.BigEndian.Uint64(b[11:])
		ok = ok && k.Pos <= sealfs.FileSizeMax/sealfs.BlockSize
	case KindAttribute:
		k.Hash = binary.BigEndian.Uint32(b[11:])
		k.Ordinal = b[15]
		k.Part = binary.BigEndian.Uint16(b[16:])
	case KindSymlink:
		k.Part = uint16(b[11])
	case KindPartition:
		k.Part = uint16(b[11])
		ok = ok && (k.Part < op.Partitions || k.Part == workRow)
	case KindLock:
		k.Class = b[11]
		k.Pos = binary.BigEndian.Uint64(b[12:])
		k.Session = sealfs.Session(binary.BigEndian.Uint64(b[20:]))
		k.Owner = binary.BigEndian.Uint64(b[28:])
		ok = ok && k.Class <= classFlock && k.Pos <= lockEnd
	}
	if !ok {
		return Key{}, damaged("key %x", b)
	}
	return k, nil
}

// Append appends the encoding of k to b.
func (k *Key) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(k.Shard))
	b = append(b, byte(k.Kind))
	switch k.Kind {
	case KindShard:
		return b
	case KindUsage:
		return binary.BigEndian.AppendUint32(b, uint32(k.Volume))
	case KindGrant:
		b = binary.BigEndian.AppendUint32(b, uint32(k.Volume))
		return append(b, k.Store[:]...)
	case KindSession:
		b = binary.BigEndian.AppendUint64(b, uint64(k.Session))
		return binary.BigEndian.AppendUint64(b, k.Pos)
	case KindPrepared, KindDecision:
		b = binary.BigEndian.AppendUint64(b, uint64(k.Tx.Age))
		b = binary.BigEndian.AppendUint64(b, k.Tx.Nonce)
		if k.Kind == KindPrepared {
			b = append(b, k.Ordinal)
		}
		return b
	}
	b = binary.BigEndian.AppendUint64(b, uint64(k.Ino))
	switch k.Kind {
	case KindEntry, KindExtent:
		b = binary.BigEndian.AppendUint64(b, k.Pos)
	case KindPlace:
		b = binary.BigEndian.AppendUint64(b, uint64(k.Dir))
	case KindInbox:
		b = binary.BigEndian.AppendUint16(b, uint16(k.From))
	case KindAttribute:
		b = binary.BigEndian.AppendUint32(b, k.Hash)
		b = append(b, k.Ordinal)
		b = binary.BigEndian.AppendUint16(b, k.Part)
	case KindSymlink, KindPartition:
		b = append(b, byte(k.Part))
	case KindLock:
		b = append(b, k.Class)
		b = binary.BigEndian.AppendUint64(b, k.Pos)
		b = binary.BigEndian.AppendUint64(b, uint64(k.Session))
		b = binary.BigEndian.AppendUint64(b, k.Owner)
	}
	return b
}

// damaged reports a record that no code of ours can have written.
func damaged(format string, args ...any) error {
	return &sealfs.Corruption{Where: "region", Off: -1, What: fmt.Sprintf(format, args...)}
}
