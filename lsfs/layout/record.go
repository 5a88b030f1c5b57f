package layout

import (
	"encoding/binary"
	"errors"

	"sealfs"
	"sealfs/internal/enc"
)

const (
	// RecordMagic opens every record.
	RecordMagic = "SRec"
	// RecordHeaderBytes is the size of a record's header.
	RecordHeaderBytes = 64
	// RecordAlign is the alignment of records. Since it is the header's size,
	// any gap before the end of a block can hold a pad record.
	RecordAlign = 64
)

// Kind says what a record is. Values stand on the device: append only.
type Kind uint8

// The kinds of records.
const (
	KindOp   Kind = 1 // a logical operation with its redo and payload
	KindMove Kind = 2 // redo of the cleaner's moves
	KindOpen Kind = 3 // first of a segment: Op is the successor's slot, redo that of the segment table
	KindNext Kind = 4 // Op names a successor's slot after all
	KindPad  Kind = 5 // PayloadLen bytes of nothing
	KindCold Kind = 6 // a payload moved by the cleaner, in a cold segment

	KindFarPage Kind = 7 // copies of region pages, in a far segment
	KindFarMap  Kind = 8 // where the copies stand
	KindFarRoot Kind = 9 // what a rebuild begins with
	kindMax          = KindFarRoot
)

// Record is the header of a record. On the device follow Op, payload and redo,
// and zeros up to the next multiple of RecordAlign.
//
//	off size field
//	  0    4 magic      "SRec"
//	  4    4 crc        CRC-32C of bytes [8, 64), op and redo, seeded with store id and incarnation
//	  8    8 lsn        its own position
//	 16    4 prev       crc of the record before it: the chain
//	 20    1 kind
//	 21    3 zero
//	 24    4 op length
//	 28    4 payload length
//	 32    4 redo length
//	 36    4 payload crc  CRC-32C of the payload, 0 for pads
//	 40    8 inode      whose data the payload is, 0 for none
//	 48    8 offset     of the payload in the file, in bytes; of a pad, open or next record
//	                    a witness: the LSN up to which the log was durable when it was written
//	 56    8 zero
type Record struct {
	LSN                        sealfs.LSN
	Prev                       uint32
	Kind                       Kind
	OpLen, PayloadLen, RedoLen uint32
	PayloadCRC                 uint32
	Ino                        sealfs.Ino
	Offset                     uint64
}

// Bytes returns the room that the record takes, padding included.
func (r *Record) Bytes() int64 {
	return align(RecordHeaderBytes + int64(r.OpLen) + int64(r.PayloadLen) + int64(r.RedoLen))
}

func align(n int64) int64 { return (n + RecordAlign - 1) &^ (RecordAlign - 1) }

// Witness returns up to where the log was durable when the record was written,
// 0 for records that do not say.
func (r *Record) Witness() sealfs.LSN {
	if r.Kind == KindPad || r.Kind == KindOpen || r.Kind == KindNext {
		return sealfs.LSN(r.Offset)
	}
	return 0
}

// PayloadLSN returns the position of the payload.
func (r *Record) PayloadLSN() sealfs.LSN { return r.LSN + RecordHeaderBytes + sealfs.LSN(r.OpLen) }

// ChainSeed returns the CRC seed of all records under one incarnation of a store.
func ChainSeed(store sealfs.UUID, incarnation uint32) uint32 {
	return enc.Seed(enc.CRC(0, store[:]), uint64(incarnation))
}

// Put writes header, op and redo around the place of the payload into b, which
// must be r.Bytes() long, zeroes the padding and returns the header's CRC. The
// payload itself is the caller's to copy to b[64+OpLen:].
func (r *Record) Put(b []byte, seed uint32, op, redo []byte) uint32 {
	le := binary.LittleEndian
	copy(b, RecordMagic)
	le.PutUint64(b[8:], uint64(r.LSN))
	le.PutUint32(b[16:], r.Prev)
	le.PutUint32(b[20:], uint32(r.Kind))
	le.PutUint32(b[24:], r.OpLen)
	le.PutUint32(b[28:], r.PayloadLen)
	le.PutUint32(b[32:], r.RedoLen)
	le.PutUint32(b[36:], r.PayloadCRC)
	le.PutUint64(b[40:], uint64(r.Ino))
	le.PutUint64(b[48:], r.Offset)
	le.PutUint64(b[56:], 0)
	n := RecordHeaderBytes + copy(b[RecordHeaderBytes:], op) + int(r.PayloadLen)
	n += copy(b[n:], redo)
	clear(b[n:r.Bytes()])
	crc := enc.CRC(enc.CRC(enc.CRC(seed, b[8:RecordHeaderBytes]), op), redo)
	le.PutUint32(b[4:], crc)
	return crc
}

// ErrNoRecord is DecodeRecord's answer where no valid record stands: the usual
// end of a log.
var ErrNoRecord = errors.New("no record")

// DecodeRecord reads the record at position at from the front of b, which holds
// the rest of the segment as far as it is known. It verifies lengths, header
// checksum, position and the chain value; not the payload (see PayloadOK). The
// returned op, payload and redo alias b. The answer is ErrNoRecord if any rule
// fails.
func DecodeRecord(b []byte, seed uint32, at sealfs.LSN, prev uint32) (r Record, crc uint32, op, payload, redo []byte, err error) {
	r, crc, op, payload, redo, err = DecodeRecordLoose(b, seed, at)
	if err == nil && r.Prev != prev {
		err = ErrNoRecord
	}
	return r, crc, op, payload, redo, err
}

// RecordLen returns how long the record at the front of b says that it is, to
// know how much to read; nothing is verified. b holds a record's header at least.
func RecordLen(b []byte) int64 {
	if len(b) < RecordHeaderBytes {
		return RecordHeaderBytes
	}
	le := binary.LittleEndian
	r := Record{OpLen: le.Uint32(b[24:]), PayloadLen: le.Uint32(b[28:]), RedoLen: le.Uint32(b[32:])}
	return r.Bytes()
}

// DecodeRecordLoose is DecodeRecord without the chain: for the cleaner, which
// reads sealed segments whose records are known to be true.
func DecodeRecordLoose(b []byte, seed uint32, at sealfs.LSN) (r Record, crc uint32, op, payload, redo []byte, err error) {
	fail := func() (Record, uint32, []byte, []byte, []byte, error) {
		return Record{}, 0, nil, nil, nil, ErrNoRecord
	}
	if len(b) < RecordHeaderBytes || string(b[:4]) != RecordMagic {
		return fail()
	}
	in := enc.Reader{B: b[4:RecordHeaderBytes]}
	crc = in.U32()
	r = Record{LSN: sealfs.LSN(in.U64()), Prev: in.U32()}
	kind := in.U32()
	r.Kind = Kind(kind)
	r.OpLen, r.PayloadLen, r.RedoLen, r.PayloadCRC = in.U32(), in.U32(), in.U32(), in.U32()
	r.Ino, r.Offset = sealfs.Ino(in.U64()), in.U64()
	if in.U64() != 0 || kind == 0 || kind > uint32(kindMax) || r.LSN != at || r.Bytes() > int64(len(b)) {
		return fail()
	}
	op = b[RecordHeaderBytes:][:r.OpLen:r.OpLen]
	payload = b[RecordHeaderBytes+int(r.OpLen):][:r.PayloadLen:r.PayloadLen]
	redo = b[RecordHeaderBytes+int(r.OpLen)+int(r.PayloadLen):][:r.RedoLen:r.RedoLen]
	if enc.CRC(enc.CRC(enc.CRC(seed, b[8:RecordHeaderBytes]), op), redo) != crc {
		return fail()
	}
	return r, crc, op, payload, redo, nil
}

// PayloadOK verifies the payload of a decoded record. A pad's is never looked at.
func (r *Record) PayloadOK(payload []byte) bool {
	return r.Kind == KindPad || enc.CRC(0, payload) == r.PayloadCRC
}

// AppendSlot and ReadSlot are the op part of KindOpen and KindNext records: the
// successor's slot in four bytes.
func AppendSlot(b []byte, slot uint32) []byte { return enc.AppendU32(b, slot) }

// ReadSlot reads what AppendSlot wrote.
func ReadSlot(op []byte) (uint32, bool) {
	r := enc.Reader{B: op}
	s := r.U32()
	return s, r.Done()
}
