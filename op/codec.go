package op

import (
	"encoding/binary"
	"fmt"

	"sealfs"
	"sealfs/internal/enc"
)

// EncodedMax bounds the encoding of a request, in bytes: the largest carries an
// attribute's value, two names, the votes and some dozens of varints.
const EncodedMax = sealfs.XattrValueMax + 2*sealfs.NameMax + 512 + VotesMax*150

// VotesMax bounds the votes of a decision: a rename has as many parties.
const VotesMax = 8

// The bits of the presence mask, in the order of the fields.
const (
	hasFlags = 1 << iota
	hasShard
	hasShard2
	hasEpoch
	hasVolume
	hasSession
	hasSeq
	hasLow
	hasIno
	hasDir
	hasDir2
	hasName
	hasName2
	hasMode
	hasUID
	hasGID
	hasRdev
	hasValid
	hasSize
	hasAtime
	hasMtime
	hasCtime
	hasOff
	hasLen
	hasLock
	hasTime
	hasStamp
	hasData
	hasTx
	hasGen
	hasVotes
	hasAll = 1<<iota - 1
)

func zigzag(v int64) uint64   { return uint64(v)<<1 ^ uint64(v>>63) }
func unzigzag(u uint64) int64 { return int64(u>>1) ^ -int64(u&1) }

// encoder appends fields that are not zero and notes them in the mask.
type encoder struct {
	b    []byte
	mask uint32
}

func (e *encoder) num(bit uint32, v uint64) {
	if v != 0 {
		e.mask |= bit
		e.b = binary.AppendUvarint(e.b, v)
	}
}

func (e *encoder) text(bit uint32, s string) {
	if s != "" {
		e.mask |= bit
		e.b = enc.AppendVarBytes(e.b, s)
	}
}

// AppendTo appends the encoding of r to b. The payload of a Write is left out.
// Its lines are DecodeRequest's, in the same order.
func (r *Request) AppendTo(b []byte) []byte {
	maskAt := len(b) + 1
	e := encoder{b: append(b, byte(r.Type), 0, 0, 0, 0)}
	e.num(hasFlags, uint64(r.Flags))
	e.num(hasShard, uint64(r.Shard))
	e.num(hasShard2, uint64(r.Shard2))
	e.num(hasEpoch, uint64(r.Epoch))
	e.num(hasVolume, uint64(r.Volume))
	e.num(hasSession, uint64(r.Session))
	e.num(hasSeq, r.Seq)
	e.num(hasLow, r.Low)
	e.num(hasIno, uint64(r.Ino))
	e.num(hasDir, uint64(r.Dir))
	e.num(hasDir2, uint64(r.Dir2))
	e.text(hasName, r.Name)
	e.text(hasName2, r.Name2)
	e.num(hasMode, uint64(r.Mode))
	e.num(hasUID, uint64(r.UID))
	e.num(hasGID, uint64(r.GID))
	e.num(hasRdev, uint64(r.Rdev))
	e.num(hasValid, uint64(r.Valid))
	e.num(hasSize, r.Size)
	e.num(hasAtime, zigzag(r.Atime))
	e.num(hasMtime, zigzag(r.Mtime))
	e.num(hasCtime, zigzag(r.Ctime))
	e.num(hasOff, r.Off)
	e.num(hasLen, r.Len)
	if r.Lock != (Lock{}) {
		e.mask |= hasLock
		e.b = appendLock(e.b, &r.Lock)
	}
	e.num(hasTime, zigzag(r.Time))
	e.num(hasStamp, uint64(r.Stamp))
	if r.Type != Write && len(r.Data) > 0 {
		e.mask |= hasData
		e.b = enc.AppendVarBytes(e.b, r.Data)
	}
	if !r.Tx.IsZero() {
		e.mask |= hasTx
		e.b = binary.AppendUvarint(e.b, zigzag(r.Tx.Age))
		e.b = enc.AppendU64(e.b, r.Tx.Nonce)
		e.b = enc.AppendU16(e.b, uint16(r.Coord))
		e.b = append(e.b, byte(r.Part))
	}
	e.num(hasGen, r.Gen)
	if len(r.Votes) > 0 {
		e.mask |= hasVotes
		e.b = append(e.b, byte(len(r.Votes)))
		for i := range r.Votes {
			e.b = appendAttr(e.b, &r.Votes[i])
		}
	}
	binary.LittleEndian.PutUint32(e.b[maskAt:], e.mask)
	return e.b
}

// DecodeRequest reads one request from all of b; Data aliases b. It returns
// ErrInvalid for bytes that AppendTo cannot have written.
func DecodeRequest(r *Request, b []byte) error {
	*r = Request{}
	if len(b) > EncodedMax {
		return fmt.Errorf("request of %d bytes is longer than %d: %w", len(b), EncodedMax, sealfs.ErrInvalid)
	}
	in := enc.Reader{B: b}
	r.Type = Type(in.U8())
	mask := in.U32()
	if in.Err || !r.Type.Valid() || mask&^hasAll != 0 {
		return fmt.Errorf("request of type %d with fields %#x: %w", r.Type, mask, sealfs.ErrInvalid)
	}
	ok := true
	num := func(bit uint32, max uint64) uint64 {
		if mask&bit == 0 {
			return 0
		}
		v := in.Uvarint()
		if v == 0 || v > max {
			ok = false
		}
		return v
	}
	const u16, u32, u64 = 1<<16 - 1, 1<<32 - 1, 1<<64 - 1
	r.Flags = Flags(num(hasFlags, uint64(flagsAll)))
	r.Shard = sealfs.Shard(num(hasShard, u16))
	r.Shard2 = sealfs.Shard(num(hasShard2, u16))
	r.Epoch = sealfs.Epoch(num(hasEpoch, u32))
	r.Volume = sealfs.Volume(num(hasVolume, u32))
	r.Session = sealfs.Session(num(hasSession, u64))
	r.Seq = num(hasSeq, u64)
	r.Low = num(hasLow, u64)
	r.Ino = sealfs.Ino(num(hasIno, sealfs.InoMax))
	r.Dir = sealfs.Ino(num(hasDir, sealfs.InoMax))
	r.Dir2 = sealfs.Ino(num(hasDir2, sealfs.InoMax))
	text := func(bit uint32) string {
		if mask&bit == 0 {
			return ""
		}
		s := in.VarBytes(sealfs.NameMax)
		if len(s) == 0 {
			ok = false
		}
		return string(s)
	}
	r.Name = text(hasName)
	r.Name2 = text(hasName2)
	r.Mode = uint32(num(hasMode, u32))
	r.UID = uint32(num(hasUID, u32))
	r.GID = uint32(num(hasGID, u32))
	r.Rdev = uint32(num(hasRdev, u32))
	r.Valid = uint32(num(hasValid, uint64(setAll)))
	const _ = uint(setAll) - 0o777 // there is room for a umask
	r.Size = num(hasSize, sealfs.FileSizeMax)
	r.Atime = unzigzag(num(hasAtime, u64))
	r.Mtime = unzigzag(num(hasMtime, u64))
	r.Ctime = unzigzag(num(hasCtime, u64))
	r.Off = num(hasOff, u64)
	r.Len = num(hasLen, u64)
	if mask&hasLock != 0 {
		ok = readLock(&in, &r.Lock) && ok
	}
	r.Time = unzigzag(num(hasTime, u64))
	r.Stamp = uint32(num(hasStamp, u32))
	if mask&hasData != 0 {
		r.Data = in.VarBytes(sealfs.XattrValueMax)
		if len(r.Data) == 0 || r.Type == Write {
			ok = false
		}
	}
	if mask&hasTx != 0 {
		r.Tx = Tx{unzigzag(in.Uvarint()), in.U64()}
		r.Coord, r.Part = sealfs.Shard(in.U16()), Part(in.U8())
		ok = ok && !r.Tx.IsZero() && r.Part < numParts
	}
	r.Gen = num(hasGen, u64)
	if mask&hasVotes != 0 {
		n := int(in.U8())
		if n == 0 || n > VotesMax {
			return fmt.Errorf("%v request with %d votes: %w", r.Type, n, sealfs.ErrInvalid)
		}
		r.Votes = make([]Attr, n)
		for i := range r.Votes {
			ok = readAttr(&in, &r.Votes[i]) && ok
		}
	}
	if !ok || !in.Done() {
		return fmt.Errorf("%v request is malformed: %w", r.Type, sealfs.ErrInvalid)
	}
	return nil
}

func appendLock(b []byte, l *Lock) []byte {
	b = append(b, byte(l.Type))
	b = binary.AppendUvarint(b, l.Start)
	b = binary.AppendUvarint(b, l.End)
	b = binary.AppendUvarint(b, l.Owner)
	return binary.AppendUvarint(b, uint64(l.PID))
}

// readLock reads what appendLock wrote and reports whether it is a lock.
func readLock(in *enc.Reader, l *Lock) bool {
	l.Type = LockType(in.U8())
	l.Start, l.End, l.Owner = in.Uvarint(), in.Uvarint(), in.Uvarint()
	pid := in.Uvarint()
	l.PID = uint32(pid)
	return !in.Err && l.Type <= WriteLock && pid < 1<<32 && *l != (Lock{})
}
