package meta

import (
	"encoding/binary"

	"sealfs"
	"sealfs/pmem"
)

// ShardState is the row that every shard has: 28 bytes, little-endian, in the
// order of the fields. A shard without a row has the zero state with
// the first counter.
type ShardState struct {
	Epoch   sealfs.Epoch
	Seq     uint64 // of the last change
	Time    int64  // of the last change, in nanoseconds since 1970; never goes back
	Counter uint64 // of the next inode
}

const shardRecordLen = 28

// Append appends the record of s to b.
func (s *ShardState) Append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(s.Epoch))
	b = binary.LittleEndian.AppendUint64(b, s.Seq)
	b = binary.LittleEndian.AppendUint64(b, uint64(s.Time))
	return binary.LittleEndian.AppendUint64(b, s.Counter)
}

// DecodeShardState reads what Append wrote, or returns a *sealfs.Corruption.
func DecodeShardState(b []byte) (ShardState, error) {
	if len(b) != shardRecordLen {
		return ShardState{}, damaged("shard record %x", b)
	}
	s := ShardState{
		Epoch:   sealfs.Epoch(binary.LittleEndian.Uint32(b)),
		Seq:     binary.LittleEndian.Uint64(b[4:]),
		Time:    int64(binary.LittleEndian.Uint64(b[12:])),
		Counter: binary.LittleEndian.Uint64(b[20:]),
	}
	if s.Counter < sealfs.InoCounterMin || s.Counter > sealfs.InoMax+1 {
		return ShardState{}, damaged("shard record %x", b)
	}
	return s, nil
}

// ShardInfo returns the state of a shard.
func ShardInfo(r pmem.Reader, s sealfs.Shard) (ShardState, error) {
	var st ShardState
	err := readShard(r, s, &st)
	return st, err
}

func readShard(r pmem.Reader, s sealfs.Shard, st *ShardState) error {
	k := ShardKey(s)
	b, err := pmem.Get(r, k[:])
	if err == sealfs.ErrNotExist {
		*st = ShardState{Counter: sealfs.InoCounterMin}
		return nil
	}
	if err == nil {
		*st, err = DecodeShardState(b)
	}
	return err
}

func writeShard(tx *pmem.Tx, s sealfs.Shard, st *ShardState) error {
	var b [shardRecordLen]byte
	k := ShardKey(s)
	return tx.Set(k[:], st.Append(b[:0]))
}

// allocate returns a new inode number of shard s.
func (ch *change) allocate(s sealfs.Shard) (sealfs.Ino, error) {
	st := &ch.shard
	var other ShardState
	if s != ch.req.Shard {
		st = &other
		if err := readShard(ch.tx, s, st); err != nil {
			return 0, err
		}
	}
	if st.Counter > (sealfs.InoMax-uint64(s))/uint64(ch.c.Shards) {
		return 0, refusal(sealfs.ErrNoSpace)
	}
	ino := sealfs.Ino(st.Counter*uint64(ch.c.Shards) + uint64(s))
	st.Counter++
	if s == ch.req.Shard {
		return ino, nil
	}
	return ino, writeShard(ch.tx, s, st)
}
