package cluster

import (
	"fmt"
	"time"

	"sealfs"
	"sealfs/internal/enc"
)

// A command is a change of the map as it stands in an entry of the Raft log:
//
//	b format (1), b kind, then by kind:
//	 1 init           u cluster, t name, v shards, v replicas, v op version
//	 2 store          u id, t addr, t host, t rack, v weight, v bytes
//	 3 store state    u id, b state
//	 4 create volume  t name, v bytes, v inodes, z created, v mode, v uid, v gid
//	 5 volume ready   v id, v root
//	 6 resize volume  v id, v bytes, v inodes
//	 7 delete volume  v id
//	 8 volume deleted v id
//	 9 serve store    u server, then as 2: a known store keeps its weight
//	10 set store      u id, v weight, b bad (0, 1)
//	11 open session   t volume, t host, t mount, v pid, z opened
//	12 end sessions   v count, each: v id
//	13 make volume    as 4; it is known since when its quota holds
//	14 set quota      as 6; likewise
//
// Notation as in state.go. Everything that is not deterministic, like the time,
// is decided before a command is encoded. The entry's checksum is logstore.go's.
type command struct {
	kind   commandKind
	init   Map        // cluster, name, shards, replicas, op version
	store  StoreInfo  // of store: all but the state; of store state: identifier and state
	volume VolumeInfo // what the kind needs of it

	session Session          // of open session: all but the number
	ended   []sealfs.Session // of end sessions
}

const commandFormat = 1

type commandKind uint8

// Values are persistent: append only. A command that is to be executed in
// another way than before is another kind.
const (
	cmdInit commandKind = 1 + iota
	cmdStore
	cmdStoreState
	cmdCreateVolume
	cmdVolumeReady
	cmdResizeVolume
	cmdDeleteVolume
	cmdVolumeDeleted
	cmdServeStore
	cmdSetStore
	cmdOpenSession
	cmdEndSessions
	cmdMakeVolume
	cmdSetQuota
)

func (c *command) encode() []byte {
	b := []byte{commandFormat, byte(c.kind)}
	v := &c.volume
	switch c.kind {
	case cmdInit:
		b = append(b, c.init.Cluster[:]...)
		b = enc.AppendVarBytes(b, c.init.Name)
		b = enc.AppendUvarint(b, uint64(c.init.Shards))
		b = enc.AppendUvarint(b, uint64(c.init.Replicas))
		b = enc.AppendUvarint(b, uint64(c.init.OpVersion))
	case cmdStore:
		b = appendStore(b, c.store)
	case cmdStoreState:
		b = append(append(b, c.store.ID[:]...), byte(c.store.State))
	case cmdCreateVolume, cmdMakeVolume:
		b = enc.AppendVarBytes(b, v.Name)
		b = enc.AppendUvarint(b, v.Bytes)
		b = enc.AppendUvarint(b, v.Inodes)
		b = enc.AppendVarint(b, v.Created.UnixNano())
		b = enc.AppendUvarint(b, uint64(v.Mode))
		b = enc.AppendUvarint(b, uint64(v.UID))
		b = enc.AppendUvarint(b, uint64(v.GID))
	case cmdVolumeReady:
		b = enc.AppendUvarint(enc.AppendUvarint(b, uint64(v.ID)), uint64(v.Root))
	case cmdResizeVolume, cmdSetQuota:
		b = enc.AppendUvarint(enc.AppendUvarint(enc.AppendUvarint(b, uint64(v.ID)), v.Bytes), v.Inodes)
	case cmdDeleteVolume, cmdVolumeDeleted:
		b = enc.AppendUvarint(b, uint64(v.ID))
	case cmdServeStore:
		b = appendStore(append(b, c.store.Server[:]...), c.store)
	case cmdSetStore:
		b = enc.AppendUvarint(append(b, c.store.ID[:]...), uint64(c.store.Weight))
		b = append(b, boolByte(c.store.Bad))
	case cmdOpenSession:
		b = appendSession(b, c.session)
	case cmdEndSessions:
		b = enc.AppendUvarint(b, uint64(len(c.ended)))
		for _, id := range c.ended {
			b = enc.AppendUvarint(b, uint64(id))
		}
	}
	return b
}

// decodeCommand reads what encode wrote. A format or kind that this program
// does not know is ErrVersion: a newer manager wrote it.
func decodeCommand(b []byte) (*command, error) {
	r := enc.Reader{B: b}
	format, c := r.U8(), &command{kind: commandKind(r.U8())}
	v := &c.volume
	switch {
	case r.Err:
	case format != commandFormat:
		return nil, fmt.Errorf("Raft log has a command of format %d, this program knows %d: %w", format, commandFormat, sealfs.ErrVersion)
	case c.kind == cmdInit:
		c.init = Map{
			Cluster: readUUID(&r), Name: string(r.VarBytes(NameMax)), Shards: readU32(&r), Replicas: int(readU32(&r)), OpVersion: readU32(&r),
		}
	case c.kind == cmdStore:
		c.store = readStore(&r)
	case c.kind == cmdStoreState:
		c.store.ID, c.store.State = readUUID(&r), StoreState(r.U8())
	case c.kind == cmdCreateVolume || c.kind == cmdMakeVolume:
		v.Name, v.Bytes, v.Inodes = string(r.VarBytes(NameMax)), r.Uvarint(), r.Uvarint()
		v.Created = time.Unix(0, r.Varint()).UTC()
		v.Mode, v.UID, v.GID = readU32(&r), readU32(&r), readU32(&r)
	case c.kind == cmdVolumeReady:
		v.ID, v.Root = sealfs.Volume(readU32(&r)), sealfs.Ino(r.Uvarint())
	case c.kind == cmdResizeVolume || c.kind == cmdSetQuota:
		v.ID, v.Bytes, v.Inodes = sealfs.Volume(readU32(&r)), r.Uvarint(), r.Uvarint()
	case c.kind == cmdDeleteVolume || c.kind == cmdVolumeDeleted:
		v.ID = sealfs.Volume(readU32(&r))
	case c.kind == cmdServeStore:
		server := readUUID(&r)
		c.store = readStore(&r)
		c.store.Server = server
	case c.kind == cmdSetStore:
		c.store.ID, c.store.Weight, c.store.Bad = readUUID(&r), readU32(&r), readBool(&r)
	case c.kind == cmdOpenSession:
		c.session = readSession(&r)
	case c.kind == cmdEndSessions:
		c.ended = make([]sealfs.Session, readCount(&r, SessionsMax))
		for i := range c.ended {
			c.ended[i] = sealfs.Session(r.Uvarint())
		}
	default:
		return nil, fmt.Errorf("Raft log has a command of kind %d, which this program does not know: %w", c.kind, sealfs.ErrVersion)
	}
	if !r.Done() {
		return nil, &sealfs.Corruption{Where: "command in the Raft log", Off: int64(len(b) - len(r.B)), What: "encoding"}
	}
	return c, nil
}
