package meta

import (
	"encoding/binary"

	"sealfs"
	"sealfs/pmem"
)

// Usage is what a volume uses in a shard: two little-endian numbers of eight
// bytes. A row with two zeros is deleted.
type Usage struct {
	Bytes  int64 // stored, of all extents
	Inodes int64
}

const usageRecordLen = 16

// Append appends the record of u to b.
func (u *Usage) Append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(u.Bytes))
	return binary.LittleEndian.AppendUint64(b, uint64(u.Inodes))
}

// DecodeUsage reads what Append wrote, or returns a *sealfs.Corruption.
func DecodeUsage(b []byte) (Usage, error) {
	if len(b) != usageRecordLen {
		return Usage{}, damaged("usage record %x", b)
	}
	u := Usage{int64(binary.LittleEndian.Uint64(b)), int64(binary.LittleEndian.Uint64(b[8:]))}
	if u.Bytes < 0 || u.Inodes < 0 || u == (Usage{}) {
		return Usage{}, damaged("usage record %x", b)
	}
	return u, nil
}

// usageDelta is a change of usage that an operation has yet to write.
type usageDelta struct {
	shard  sealfs.Shard
	volume sealfs.Volume
	Usage
}

// charge changes the usage of in's volume where in stands, when the operation ends. Partitions are the server's affair, and
// cost nothing: nobody's wish makes them, and what a directory hands down must come to all of them.
func (ch *change) charge(in *Inode, bytes, inodes int64) error {
	if in.foreign || in.IsPartition() {
		return nil // its own store pays
	}
	s := in.place(ch.c)
	for i := range ch.usages {
		if d := &ch.usage[i]; d.shard == s && d.volume == in.Volume {
			d.Bytes += bytes
			d.Inodes += inodes
			return nil
		}
	}
	if ch.usages == len(ch.usage) {
		// Operations touch at most four inodes, and frees stay in one shard:
		// only a damaged volume field can lead here.
		return damaged("inode %d of volume %d is the fifth party of an operation", in.Ino, in.Volume)
	}
	ch.usage[ch.usages] = usageDelta{s, in.Volume, Usage{bytes, inodes}}
	ch.usages++
	return nil
}

// flushUsage writes the changes of usage.
func (ch *change) flushUsage() error {
	for i := range ch.usages {
		d := &ch.usage[i]
		if d.Usage == (Usage{}) {
			continue
		}
		k := UsageKey(d.shard, d.volume)
		u, err := getUsage(ch.tx, k[:])
		if err != nil {
			return err
		}
		u.Bytes += d.Bytes
		u.Inodes += d.Inodes
		if u.Bytes < 0 || u.Inodes < 0 {
			return damaged("usage of volume %d in shard %d falls to %d bytes, %d inodes", d.volume, d.shard, u.Bytes, u.Inodes)
		}
		if u == (Usage{}) {
			err = ch.tx.Delete(k[:])
		} else {
			var b [usageRecordLen]byte
			err = ch.tx.Set(k[:], u.Append(b[:0]))
		}
		if err != nil {
			return err
		}
		ch.sp.Charge(d.volume, d.Bytes, d.Inodes)
	}
	return nil
}

func getUsage(r pmem.Reader, key []byte) (Usage, error) {
	b, err := pmem.Get(r, key)
	if err == sealfs.ErrNotExist {
		return Usage{}, nil
	}
	if err != nil {
		return Usage{}, err
	}
	return DecodeUsage(b)
}

// VolumeUsage calls fn for every usage row of a store's shards, in order of
// shards: a volume appears once for each shard in which it has inodes.
func VolumeUsage(r pmem.Reader, shards uint32, fn func(v sealfs.Volume, bytes, inodes int64)) error {
	var cur pmem.Cursor
	for s := range shards {
		k := UsageKey(sealfs.Shard(s), 0)
		for ok := cur.Seek(r, k[:]); ok && inRange(&cur, k[:3]); ok = cur.Next() {
			key, err := DecodeKey(cur.Key())
			if err != nil {
				return err
			}
			u, err := DecodeUsage(cur.Value())
			if err != nil {
				return err
			}
			fn(key.Volume, u.Bytes, u.Inodes)
		}
		if err := cur.Err(); err != nil {
			return err
		}
	}
	return nil
}
