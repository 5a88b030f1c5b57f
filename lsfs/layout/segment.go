package layout

import (
	"encoding/binary"

	"sealfs"
	"sealfs/internal/enc"
)

// SegmentMagic opens every segment header.
const SegmentMagic = "SEGh"

// SegmentKind says what a segment is for. Values stand on the device.
type SegmentKind uint8

// The kinds of segments.
const (
	Hot  SegmentKind = 1 // part of the log
	Cold SegmentKind = 2 // payloads that the cleaner moved
	Far  SegmentKind = 3 // copies of the region's pages
)

// SegmentHeader opens every segment; the rest of its 4 KiB block is zero.
//
//	off size field
//	  0    4 magic       "SEGh"
//	  4    4 crc         CRC-32C of bytes [8, 4096), seeded with the store's id
//	  8    4 incarnation under which the segment was opened
//	 12    4 seq         its sequence number, from 1
//	 16    1 kind        1 hot, 2 cold, 3 far
//	 17    3 zero
//	 20    4 slot        where it stands: a header at another slot is a misdirected write
//	 24    4 chain       header checksum of the record before the first
//	 28    4 zero
//	 32    8 prev        hot: LSN where the log stood when the segment was opened
//	 40    8 created     nanoseconds since 1970
//	 48      zero
type SegmentHeader struct {
	Incarnation uint32
	Seq         uint32
	Kind        SegmentKind
	Slot        uint32
	Chain       uint32
	Prev        sealfs.LSN
	Created     int64
}

// Put writes the header into the first 4 KiB of b and zeroes the rest of that block.
func (h *SegmentHeader) Put(b []byte, store sealfs.UUID) {
	b = b[:BlockSize]
	clear(b)
	copy(b, SegmentMagic)
	le := binary.LittleEndian
	le.PutUint32(b[8:], h.Incarnation)
	le.PutUint32(b[12:], h.Seq)
	b[16] = byte(h.Kind)
	le.PutUint32(b[20:], h.Slot)
	le.PutUint32(b[24:], h.Chain)
	le.PutUint64(b[32:], uint64(h.Prev))
	le.PutUint64(b[40:], uint64(h.Created))
	le.PutUint32(b[4:], enc.CRC(enc.CRC(0, store[:]), b[8:]))
}

// DecodeSegmentHeader reads the header block of the segment in the given slot.
func DecodeSegmentHeader(b []byte, store sealfs.UUID, where string, slot uint32, off int64) (*SegmentHeader, error) {
	bad := func(what string, want, got uint64) error {
		return &sealfs.Corruption{Where: where, Off: off, What: what, Want: want, Got: got}
	}
	if len(b) < BlockSize {
		return nil, bad("segment header is cut short", BlockSize, uint64(len(b)))
	}
	b = b[:BlockSize]
	if string(b[:4]) != SegmentMagic {
		return nil, bad("no segment header (magic)", 0, 0)
	}
	r := enc.Reader{B: b[4:]}
	crc := r.U32()
	if want := enc.CRC(enc.CRC(0, store[:]), b[8:]); crc != want {
		return nil, bad("segment header checksum", uint64(want), uint64(crc))
	}
	h := &SegmentHeader{Incarnation: r.U32(), Seq: r.U32(), Kind: SegmentKind(r.U8())}
	reserved := zero(r.Bytes(3))
	h.Slot, h.Chain = r.U32(), r.U32()
	reserved = zero(r.Bytes(4)) && reserved
	h.Prev, h.Created = sealfs.LSN(r.U64()), int64(r.U64())
	if !reserved || !zero(r.B) {
		return nil, bad("segment header's reserved bytes are not zero", 0, 0)
	}
	if h.Slot != slot {
		return nil, bad("segment header belongs to another slot", uint64(slot), uint64(h.Slot))
	}
	if h.Kind < Hot || h.Kind > Far || h.Seq == 0 {
		return nil, bad("segment header's kind or sequence number is impossible", 0, uint64(h.Kind))
	}
	return h, nil
}
