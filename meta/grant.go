package meta

import (
	"encoding/binary"

	"sealfs"
	"sealfs/pmem"
)

// Grant is how far a store may grow in a volume that has a quota, as whoever keeps that
// quota has noted it: 32 bytes, little-endian, in the order of the fields. The store
// itself may know of less, never of more.
type Grant struct {
	Bytes, Inodes int64
	Version       uint64 // grows with each change; never 0
	Since         uint64 // of the quota: see cluster.VolumeInfo
}

const grantRecordLen = 32

// Append appends the record of g to b.
func (g *Grant) Append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(g.Bytes))
	b = binary.LittleEndian.AppendUint64(b, uint64(g.Inodes))
	b = binary.LittleEndian.AppendUint64(b, g.Version)
	return binary.LittleEndian.AppendUint64(b, g.Since)
}

// DecodeGrant reads what Append wrote, or returns a *sealfs.Corruption.
func DecodeGrant(b []byte) (Grant, error) {
	if len(b) != grantRecordLen {
		return Grant{}, damaged("grant record %x", b)
	}
	g := Grant{
		Bytes:   int64(binary.LittleEndian.Uint64(b)),
		Inodes:  int64(binary.LittleEndian.Uint64(b[8:])),
		Version: binary.LittleEndian.Uint64(b[16:]),
		Since:   binary.LittleEndian.Uint64(b[24:]),
	}
	if g.Bytes < 0 || g.Inodes < 0 || g.Version == 0 {
		return Grant{}, damaged("grant record %x", b)
	}
	return g, nil
}

// Grants calls fn for what shard s has noted of the quota of volume v.
func Grants(r pmem.Reader, s sealfs.Shard, v sealfs.Volume, fn func(sealfs.UUID, Grant)) error {
	first := GrantKey(s, v, sealfs.UUID{})
	var cur pmem.Cursor
	for ok := cur.Seek(r, first[:]); ok && inRange(&cur, first[:7]); ok = cur.Next() {
		key, err := DecodeKey(cur.Key())
		if err != nil {
			return err
		}
		g, err := DecodeGrant(cur.Value())
		if err != nil {
			return err
		}
		fn(key.Store, g)
	}
	return cur.Err()
}

// grant notes how far a store may grow in req.Volume.
func (ch *change) grant() error {
	req := ch.req
	var store sealfs.UUID
	g := Grant{Bytes: int64(req.Off), Inodes: int64(req.Len), Version: req.Gen, Since: req.Size}
	if copy(store[:], req.Data) != len(req.Data) || store.IsZero() || len(req.Data) != len(store) || req.Volume == 0 ||
		g.Bytes < 0 || g.Inodes < 0 || g.Version == 0 {
		return refusal(sealfs.ErrInvalid)
	}
	k := GrantKey(req.Shard, req.Volume, store)
	var b [grantRecordLen]byte
	return ch.tx.Set(k[:], g.Append(b[:0]))
}

// dropGrants does one bounded step of forgetting what stores could use of req.Volume, of
// which nothing is left in req.Shard.
func (ch *change) dropGrants() error {
	ch.quiet = true
	for range FreeMax {
		k := GrantKey(ch.req.Shard, ch.req.Volume, sealfs.UUID{})
		var cur pmem.Cursor
		if !cur.Seek(ch.tx, k[:]) || !inRange(&cur, k[:7]) {
			ch.rep.Eof = true
			return cur.Err()
		}
		if copy(k[:], cur.Key()) != len(cur.Key()) {
			return damaged("key %x", cur.Key())
		}
		if err := ch.tx.Delete(k[:]); err != nil {
			return err
		}
		ch.quiet = false
	}
	ch.rep.Off = uint64(ch.req.Ino)
	return nil
}
