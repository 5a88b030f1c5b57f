package sealfs

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
)

// UUID identifies a cluster or a store for ever. The zero UUID means "none".
type UUID [16]byte

// NewUUID returns a random UUID (RFC 9562, version 4).
func NewUUID() UUID {
	var u UUID
	rand.Read(u[:]) // never fails: see crypto/rand
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u
}

// String formats u in the usual form with dashes.
func (u UUID) String() string {
	h := hex.EncodeToString(u[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// IsZero reports whether u is the zero UUID.
func (u UUID) IsZero() bool { return u == UUID{} }

// ParseUUID reads the form that String writes.
func ParseUUID(s string) (UUID, error) {
	var u UUID
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return UUID{}, fmt.Errorf("%q is not a UUID", s)
	}
	if _, err := hex.Decode(u[:], []byte(s[:8]+s[9:13]+s[14:18]+s[19:23]+s[24:])); err != nil {
		return UUID{}, fmt.Errorf("%q is not a UUID", s)
	}
	return u, nil
}

// MarshalText and UnmarshalText let a UUID stand in JSON and YAML as text.
func (u UUID) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

// UnmarshalText reads the form that MarshalText writes.
func (u *UUID) UnmarshalText(b []byte) error {
	v, err := ParseUUID(string(b))
	if err == nil {
		*u = v
	}
	return err
}

// Shard is the unit of placement, replication and migration: a number below
// the cluster's shard count, which is a power of two of at most ShardsMax.
type Shard uint16

// Ino is an inode number: counter*shards + shard. It carries its home shard,
// stays below 2^53 and is never reused. 0 is no inode.
type Ino uint64

// Home returns the shard of the inode in a cluster of shards shards.
func (i Ino) Home(shards uint32) Shard { return Shard(uint64(i) & uint64(shards-1)) }

// DataShard returns the shard that holds the byte at off of the file's data, if
// the file has chunks: its home up to HomeBytes, beyond that a shard for each ChunkBytes.
func (i Ino) DataShard(off uint64, shards uint32) Shard {
	if off < HomeBytes {
		return i.Home(shards)
	}
	// The finalizer of SplitMix64 (Steele, Lea, Flood 2014), over file and chunk.
	h := uint64(i)*0x9e3779b97f4a7c15 + off/ChunkBytes
	h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
	h = (h ^ h>>27) * 0x94d049bb133111eb
	return Shard((h ^ h>>31) & uint64(shards-1))
}

// Volume is the number of a volume in its cluster, from 1; never reused.
type Volume uint32

// Epoch counts the changes of a shard's replica set. A request carries the
// epoch its sender believes in; a stale one is answered ErrStale.
type Epoch uint32

// Session is a client's identity at the cluster. 0 is "no session": the sender
// lives and dies with the server, so that no retry of its requests can happen.
type Session uint64

// LSN is a position in a store's log: the segment's sequence number in the
// upper, the byte offset in the segment in the lower 32 bits. It grows
// monotonically and is never issued twice. 0 is no position.
type LSN uint64

// MakeLSN joins a segment sequence number and an offset.
func MakeLSN(seq, off uint32) LSN { return LSN(seq)<<32 | LSN(off) }

// Seq returns the sequence number of the segment.
func (l LSN) Seq() uint32 { return uint32(l >> 32) }

// Off returns the byte offset in the segment.
func (l LSN) Off() uint32 { return uint32(l) }

// String formats l as seq:offset.
func (l LSN) String() string { return fmt.Sprintf("%d:%#x", l.Seq(), l.Off()) }
