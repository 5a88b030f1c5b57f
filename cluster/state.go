package cluster

import (
	"fmt"
	"time"

	"sealfs"
	"sealfs/internal/enc"
)

// The encoding of a map: the contents of a snapshot's state.bin, and what a
// manager sends to servers and clients. Numbers in the header are little-endian.
//
//	off size field
//	  0    8 magic    "SEALFSc1"
//	  8    2 version  1
//	 10    2 zero
//	 12    4 length   of the body in bytes
//	 16    4 crc      CRC-32C of bytes [0,16) and of the body
//	 20      body
//
// The body is a sequence of varints (v), zigzag varints (z), texts (t: v length,
// bytes), identifiers (u: 16 bytes) and single bytes (b):
//
//	v version, u cluster, t name, v shards, v replicas, v op version, v next volume
//	v stores,  each: u id, t addr, t host, t rack, v weight, v bytes, b state
//	v volumes, each: v id, t name, v bytes, v inodes, v root, b state,
//	                 z created (ns since 1970), v mode, v uid, v gid
//	per shard: v replicas, each: v store; v epoch
//
// The encoding of a map is unique, and it decodes to a map that keeps all rules.
const (
	stateMagic   = "SEALFSc1"
	stateVersion = 1
	stateHeader  = 20
	// StateMax bounds an encoded map, in bytes.
	StateMax = 64 << 20
)

// Encode returns the encoding of m.
func (m *Map) Encode() []byte {
	b := make([]byte, stateHeader, stateHeader+64+len(m.Stores)*64+len(m.Volumes)*64+len(m.Table)*4)
	b = enc.AppendUvarint(b, m.Version)
	b = append(b, m.Cluster[:]...)
	b = enc.AppendVarBytes(b, m.Name)
	b = enc.AppendUvarint(b, uint64(m.Shards))
	b = enc.AppendUvarint(b, uint64(m.Replicas))
	b = enc.AppendUvarint(b, uint64(m.OpVersion))
	b = enc.AppendUvarint(b, uint64(m.NextVolume))
	b = enc.AppendUvarint(b, uint64(len(m.Stores)))
	for _, s := range m.Stores {
		b = appendStore(b, s)
		b = append(b, byte(s.State))
	}
	b = enc.AppendUvarint(b, uint64(len(m.Volumes)))
	for _, v := range m.Volumes {
		b = enc.AppendUvarint(b, uint64(v.ID))
		b = enc.AppendVarBytes(b, v.Name)
		b = enc.AppendUvarint(b, v.Bytes)
		b = enc.AppendUvarint(b, v.Inodes)
		b = enc.AppendUvarint(b, uint64(v.Root))
		b = append(b, byte(v.State))
		b = enc.AppendVarint(b, v.Created.UnixNano())
		b = enc.AppendUvarint(b, uint64(v.Mode))
		b = enc.AppendUvarint(b, uint64(v.UID))
		b = enc.AppendUvarint(b, uint64(v.GID))
	}
	for _, row := range m.Table {
		b = enc.AppendUvarint(b, uint64(len(row.Replicas)))
		for _, i := range row.Replicas {
			b = enc.AppendUvarint(b, uint64(i))
		}
		b = enc.AppendUvarint(b, uint64(row.Epoch))
	}
	h := append(b[:0], stateMagic...)
	h = enc.AppendU16(h, stateVersion)
	h = enc.AppendU16(h, 0)
	h = enc.AppendU32(h, uint32(len(b)-stateHeader))
	enc.AppendU32(h, enc.CRC(enc.CRC(0, h), b[stateHeader:]))
	return b
}

// Decode reads what Encode wrote; the map does not alias b. Damage is reported
// as *sealfs.Corruption, a version this program does not know as ErrVersion.
func Decode(b []byte) (*Map, error) {
	damaged := func(what string, want, got uint64) error {
		return &sealfs.Corruption{Where: "cluster map", Off: -1, What: what, Want: want, Got: got}
	}
	r := enc.Reader{B: b}
	magic, version, zero, length, sum := r.Bytes(8), r.U16(), r.U16(), r.U32(), r.U32()
	switch {
	case r.Err:
		return nil, damaged("header", stateHeader, uint64(len(b)))
	case string(magic) != stateMagic:
		return nil, damaged("magic", 0, 0)
	case version != stateVersion:
		// Before the checksum, so that a newer format may change all that follows.
		return nil, fmt.Errorf("cluster map of format version %d, this program knows %d: %w", version, stateVersion, sealfs.ErrVersion)
	case zero != 0 || uint64(length) != uint64(len(r.B)):
		return nil, damaged("length", uint64(length), uint64(len(r.B)))
	}
	if got := enc.CRC(enc.CRC(0, b[:16]), r.B); got != sum {
		return nil, damaged("checksum", uint64(sum), uint64(got))
	}
	m := readMap(&r)
	if !r.Done() {
		return nil, damaged("body", 0, 0)
	}
	if err := m.check(); err != nil {
		return nil, damaged(err.Error(), 0, 0)
	}
	return m, nil
}

// readMap reads the body; it is to be believed only if r is Done.
func readMap(r *enc.Reader) *Map {
	m := &Map{
		Version: r.Uvarint(), Cluster: readUUID(r), Name: string(r.VarBytes(NameMax)), Shards: readU32(r),
		Replicas: int(readU32(r)), OpVersion: readU32(r), NextVolume: sealfs.Volume(readU32(r)),
	}
	m.Stores = make([]StoreInfo, readCount(r, StoresMax))
	for i := range m.Stores {
		m.Stores[i] = readStore(r)
		m.Stores[i].State = StoreState(r.U8())
	}
	m.Volumes = make([]VolumeInfo, readCount(r, VolumesMax))
	for i := range m.Volumes {
		m.Volumes[i] = VolumeInfo{
			ID: sealfs.Volume(readU32(r)), Name: string(r.VarBytes(NameMax)), Bytes: r.Uvarint(), Inodes: r.Uvarint(),
			Root: sealfs.Ino(r.Uvarint()), State: VolumeState(r.U8()), Created: time.Unix(0, r.Varint()).UTC(),
			Mode: readU32(r), UID: readU32(r), GID: readU32(r),
		}
	}
	if r.Err || m.Shards > sealfs.ShardsMax || int64(m.Shards) > int64(len(r.B)) {
		r.Err = true
		return m
	}
	m.Table = make([]ShardInfo, m.Shards)
	for s := range m.Table {
		if n := readCount(r, ReplicasMax); n > 0 {
			m.Table[s].Replicas = make([]uint16, n)
		}
		for k := range m.Table[s].Replicas {
			i := readU32(r)
			if i > StoresMax {
				r.Err = true
			}
			m.Table[s].Replicas[k] = uint16(i)
		}
		m.Table[s].Epoch = sealfs.Epoch(readU32(r))
	}
	return m
}

// appendStore appends s without its state; readStore reads it.
func appendStore(b []byte, s StoreInfo) []byte {
	b = append(b, s.ID[:]...)
	b = enc.AppendVarBytes(b, s.Addr)
	b = enc.AppendVarBytes(b, s.Host)
	b = enc.AppendVarBytes(b, s.Rack)
	b = enc.AppendUvarint(b, uint64(s.Weight))
	return enc.AppendUvarint(b, s.Bytes)
}

func readStore(r *enc.Reader) StoreInfo {
	return StoreInfo{
		ID: readUUID(r), Addr: string(r.VarBytes(LocationMax)), Host: string(r.VarBytes(LocationMax)),
		Rack: string(r.VarBytes(LocationMax)), Weight: readU32(r), Bytes: r.Uvarint(),
	}
}

func readUUID(r *enc.Reader) (u sealfs.UUID) {
	copy(u[:], r.Bytes(len(u)))
	return u
}

// readU32 reads a varint of at most 32 bits.
func readU32(r *enc.Reader) uint32 {
	v := r.Uvarint()
	if v > 1<<32-1 {
		r.Err = true
	}
	return uint32(v)
}

// readCount reads the number of things that follow, of a byte or more each.
func readCount(r *enc.Reader, limit int) int {
	n := r.Uvarint()
	if r.Err || n > uint64(limit) || n > uint64(len(r.B)) {
		r.Err = true
		return 0
	}
	return int(n)
}
