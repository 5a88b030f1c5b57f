package cluster

import (
	"fmt"
	"time"

	"sealfs"
	"sealfs/internal/enc"
)

// The encoding of a map: what a manager sends to servers and clients, and the
// first half of a snapshot's state.bin. Numbers in the header are little-endian.
//
//	off size field
//	  0    8 magic    "SEALFSc1"
//	  8    2 version  3; 1 and 2 are still read
//	 10    2 zero
//	 12    4 length   of the body in bytes
//	 16    4 crc      CRC-32C of bytes [0,16) and of the body
//	 20      body
//
// The body is a sequence of varints (v), zigzag varints (z), texts (t: v length,
// bytes), identifiers (u: 16 bytes) and single bytes (b):
//
//	v version, u cluster, t name, v shards, v replicas, v op version, v next volume
//	v stores,  each: u id, t addr, t host, t rack, v weight, v bytes, b state,
//	                 from version 2: u server, b bad (0, 1)
//	v volumes, each: v id, t name, v bytes, v inodes, v root, b state,
//	                 z created (ns since 1970), v mode, v uid, v gid,
//	                 from version 3: v since
//	per shard: v replicas, each: v store; v epoch
//
// The encoding of a map is unique within a version, and it decodes to a map that keeps all rules.
//
// A snapshot goes on with the sessions, unless its map is of version 1:
//
//	header as above  magic "SEALFSn1", version 1
//	body             v version, v next session, v live sessions, each: v id,
//	                 t volume, t host, t mount, v pid, z opened (ns since 1970)
const (
	stateMagic      = "SEALFSc1"
	stateVersion    = 3
	stateVersionMin = 1
	stateHeader     = 20

	sessionsMagic   = "SEALFSn1"
	sessionsVersion = 1
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
		b = append(b, s.Server[:]...)
		b = append(b, boolByte(s.Bad))
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
		b = enc.AppendUvarint(b, v.Since)
	}
	for _, row := range m.Table {
		b = enc.AppendUvarint(b, uint64(len(row.Replicas)))
		for _, i := range row.Replicas {
			b = enc.AppendUvarint(b, uint64(i))
		}
		b = enc.AppendUvarint(b, uint64(row.Epoch))
	}
	sealBlock(b, stateMagic, stateVersion)
	return b
}

// sealBlock fills in the header of a block whose body begins at b[stateHeader].
func sealBlock(b []byte, magic string, version uint16) {
	h := append(b[:0], magic...)
	h = enc.AppendU16(h, version)
	h = enc.AppendU16(h, 0)
	h = enc.AppendU32(h, uint32(len(b)-stateHeader))
	enc.AppendU32(h, enc.CRC(enc.CRC(0, h), b[stateHeader:]))
}

// openBlock verifies the block at the start of b, and returns its version, its
// body and what follows it.
func openBlock(b []byte, what, magic string, versionMin, versionMax uint16) (version uint16, body, rest []byte, err error) {
	damaged := func(rule string, want, got uint64) (uint16, []byte, []byte, error) {
		return 0, nil, nil, &sealfs.Corruption{Where: what, Off: -1, What: rule, Want: want, Got: got}
	}
	r := enc.Reader{B: b}
	m, version, zero, length, sum := r.Bytes(8), r.U16(), r.U16(), r.U32(), r.U32()
	switch {
	case r.Err:
		return damaged("header", stateHeader, uint64(len(b)))
	case string(m) != magic:
		return damaged("magic", 0, 0)
	case version < versionMin || version > versionMax:
		// Before the checksum, so that a newer format may change all that follows.
		return 0, nil, nil, fmt.Errorf("%s of format version %d, this program knows %d to %d: %w", what, version, versionMin, versionMax, sealfs.ErrVersion)
	case zero != 0 || uint64(length) > uint64(len(r.B)):
		return damaged("length", uint64(length), uint64(len(r.B)))
	}
	body, rest = r.B[:length], r.B[length:]
	if got := enc.CRC(enc.CRC(0, b[:16]), body); got != sum {
		return damaged("checksum", uint64(sum), uint64(got))
	}
	return version, body, rest, nil
}

// Decode reads what Encode wrote; the map does not alias b. Damage is reported
// as *sealfs.Corruption, a version this program does not know as ErrVersion.
func Decode(b []byte) (*Map, error) {
	m, _, rest, err := decodeMap(b)
	if err == nil && len(rest) > 0 {
		return nil, &sealfs.Corruption{Where: mapName, Off: -1, What: "bytes after its end", Got: uint64(len(rest))}
	}
	return m, err
}

const mapName = "cluster map"

// decodeMap reads the map at the start of b.
func decodeMap(b []byte) (m *Map, version uint16, rest []byte, err error) {
	version, body, rest, err := openBlock(b, mapName, stateMagic, stateVersionMin, stateVersion)
	if err != nil {
		return nil, 0, nil, err
	}
	r := enc.Reader{B: body}
	m = readMap(&r, version)
	what := "body"
	if r.Done() {
		if err = m.check(); err == nil {
			return m, version, rest, nil
		}
		what = err.Error()
	}
	return nil, 0, nil, &sealfs.Corruption{Where: mapName, Off: -1, What: what}
}

// encodeState returns the contents of a snapshot.
func encodeState(m *Map, t *sessionTable) []byte {
	b := make([]byte, stateHeader, stateHeader+16+len(t.live)*64)
	b = enc.AppendUvarint(b, t.version)
	b = enc.AppendUvarint(b, uint64(t.next))
	b = enc.AppendUvarint(b, uint64(len(t.live)))
	for _, s := range t.live {
		b = appendSession(enc.AppendUvarint(b, uint64(s.ID)), s)
	}
	sealBlock(b, sessionsMagic, sessionsVersion)
	return append(m.Encode(), b...)
}

// decodeState reads what encodeState wrote, and the snapshots of a time without sessions.
func decodeState(b []byte) (*Map, *sessionTable, error) {
	m, version, rest, err := decodeMap(b)
	if err != nil || version == 1 && len(rest) == 0 {
		return m, newSessionTable(), err
	}
	const name = "sessions in a snapshot"
	_, body, rest, err := openBlock(rest, name, sessionsMagic, sessionsVersion, sessionsVersion)
	if err != nil {
		return nil, nil, err
	}
	r := enc.Reader{B: body}
	t := &sessionTable{version: r.Uvarint(), next: sealfs.Session(r.Uvarint())}
	t.live = make([]Session, readCount(&r, SessionsMax))
	for i := range t.live {
		id := sealfs.Session(r.Uvarint())
		t.live[i] = readSession(&r)
		t.live[i].ID = id
	}
	if !r.Done() || len(rest) > 0 || !t.ok() {
		return nil, nil, &sealfs.Corruption{Where: name, Off: -1, What: "body"}
	}
	return m, t, nil
}

// readMap reads the body; it is to be believed only if r is Done.
func readMap(r *enc.Reader, version uint16) *Map {
	m := &Map{
		Version: r.Uvarint(), Cluster: readUUID(r), Name: string(r.VarBytes(NameMax)), Shards: readU32(r),
		Replicas: int(readU32(r)), OpVersion: readU32(r), NextVolume: sealfs.Volume(readU32(r)),
	}
	m.Stores = make([]StoreInfo, readCount(r, StoresMax))
	for i := range m.Stores {
		m.Stores[i] = readStore(r)
		m.Stores[i].State = StoreState(r.U8())
		if version >= 2 {
			m.Stores[i].Server, m.Stores[i].Bad = readUUID(r), readBool(r)
		}
	}
	m.Volumes = make([]VolumeInfo, readCount(r, VolumesMax))
	for i := range m.Volumes {
		m.Volumes[i] = VolumeInfo{
			ID: sealfs.Volume(readU32(r)), Name: string(r.VarBytes(NameMax)), Bytes: r.Uvarint(), Inodes: r.Uvarint(),
			Root: sealfs.Ino(r.Uvarint()), State: VolumeState(r.U8()), Created: time.Unix(0, r.Varint()).UTC(),
			Mode: readU32(r), UID: readU32(r), GID: readU32(r),
		}
		if version >= 3 {
			m.Volumes[i].Since = r.Uvarint()
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

func boolByte(v bool) byte {
	if v {
		return 1
	}
	return 0
}

// readBool reads what boolByte makes, and nothing else.
func readBool(r *enc.Reader) bool {
	v := r.U8()
	if v > 1 {
		r.Err = true
	}
	return v == 1
}

// appendSession appends s without its number; readSession reads it.
func appendSession(b []byte, s Session) []byte {
	b = enc.AppendVarBytes(b, s.Volume)
	b = enc.AppendVarBytes(b, s.Host)
	b = enc.AppendVarBytes(b, s.Mount)
	b = enc.AppendUvarint(b, uint64(s.PID))
	return enc.AppendVarint(b, s.Opened.UnixNano())
}

func readSession(r *enc.Reader) Session {
	return Session{SessionInfo: SessionInfo{
		Volume: string(r.VarBytes(NameMax)), Host: string(r.VarBytes(LocationMax)), Mount: string(r.VarBytes(LocationMax)), PID: int(readU32(r)),
	}, Opened: time.Unix(0, r.Varint()).UTC()}
}

// appendStore appends s without state, server and badness; readStore reads it.
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
