// Package layout is the format of a data device: superblock, segments, records.
// This file is normative; all numbers are little-endian, all reserved bytes are
// zero and checked. Nothing but this package encodes or decodes them.
//
//	byte 0       superblock A      4 KiB   ┐ written alternately; the valid one with the
//	byte 4096    superblock B      4 KiB   ┘ higher update counter counts
//	DataStart    slot 0            SegmentBytes each: a 4 KiB header block, then records
//	…            slot 1, 2, …
//
// A segment is the content of a slot under one sequence number. Hot segments
// form the log: each record names the checksum of the one before it. Cold
// segments hold payloads that the cleaner moved, far segments copies of the
// region's pages; their records form chains of their own that nothing but the
// cleaner and fsck follows.
package layout

import (
	"fmt"

	"sealfs"
	"sealfs/internal/enc"
)

const (
	// Magic opens every superblock, and so every formatted device.
	Magic = "SEALFSv1"
	// Version is the device format that this package writes.
	Version = 1
	// BlockSize is the size of a superblock and of a segment's header block,
	// and the unit in which the log is given to the device.
	BlockSize = 4096
	// DataStart is the byte at which slot 0 begins: room for what may come
	// to stand before the segments, at an alignment that suits all devices.
	DataStart = 1 << 20
	// LabelMax is the longest label, in bytes.
	LabelMax = 64
	// SegmentBytesMin is the smallest segment size, in bytes; it is a power of two.
	SegmentBytesMin = 32 << 10
	// SegmentBytesMax is the largest segment size, in bytes.
	SegmentBytesMax = 256 << 20
	// SegmentBytesDefault is the usual segment size.
	SegmentBytesDefault = 32 << 20
	// SegmentsMin is the smallest useful number of segments: two in use,
	// three reserved, some for data.
	SegmentsMin = 8
	// SegmentsMax keeps the region's table inside its first group of pages.
	SegmentsMax = 2 << 20
	// NoSlot is "no slot".
	NoSlot = ^uint32(0)
)

// FeatureFar is the incompatible feature of a device that has, or had, far
// segments: who does not know them takes their slots for damage.
const FeatureFar uint64 = 1 << 0

// FeatureACL is the incompatible feature of a device on which inodes have, or had,
// POSIX ACLs: who does not know them takes such inodes for damage.
const FeatureACL uint64 = 1 << 1

// FeatureSplit is the incompatible feature of a device on which directories are, or were,
// split over stores: who does not know of that takes their entries for lost.
const FeatureSplit uint64 = 1 << 2

// FeatureTotals is the incompatible feature of a device with a volume whose directories
// have totals: who does not know of them would make them wrong.
const FeatureTotals uint64 = 1 << 3

// FeatureGrants is the incompatible feature of a device on which it is noted what stores may
// use of volumes' quotas: who does not know such records takes them for damage.
const FeatureGrants uint64 = 1 << 4

// FeaturesKnown are the incompatible features that this program understands.
// A device with another bit is refused by the bit's number.
const FeaturesKnown = FeatureFar | FeatureACL | FeatureSplit | FeatureTotals | FeatureGrants

// Superblock is the identity and geometry of a device and the lower bound of
// its log.
//
//	off size field
//	  0    8 magic         "SEALFSv1"
//	  8    4 version       1
//	 12    4 crc           CRC-32C of bytes [16, 4096), seeded with bytes [0, 12)
//	 16    8 incompat      features one must know to read
//	 24    8 rocompat      features one must know to write
//	 32    8 compat        features one need not know
//	 40   16 store         identity of the store
//	 56   16 cluster       identity of its cluster, zero before it joins one
//	 72    8 update        counts writes of the superblock; slot = update mod 2
//	 80    4 incarnation   counts recoveries
//	 84    4 segment bytes power of two
//	 88    4 segments      number of slots
//	 92    4 first slot    slot of the first segment of this incarnation, NoSlot before it is open
//	 96    8 tail          LSN below which nothing is needed for recovery
//	104    8 first prev    LSN where the log ended when this incarnation began
//	112    8 device bytes  size of the device when it was formatted
//	120    8 created       nanoseconds since 1970
//	128   64 label         UTF-8, zero-padded
//	192    8 far root      LSN of the last part of the far checkpoint's root, 0 for none
//	200    8 far start     LSN below which a rebuild of the region needs no log
//	208    4 far slot      of the segment that far root lies in
//	212      zero
type Superblock struct {
	Store, Cluster sealfs.UUID
	Update         uint64
	Incarnation    uint32
	SegmentBytes   uint32
	Segments       uint32
	FirstSlot      uint32
	Tail           sealfs.LSN
	FirstPrev      sealfs.LSN
	DeviceBytes    int64
	Created        int64
	Label          string
	FarRoot        sealfs.LSN
	FarStart       sealfs.LSN
	FarSlot        uint32

	Incompat, ROCompat, Compat uint64
}

// Encode returns the 4 KiB of the superblock. The label is cut at LabelMax.
func (s *Superblock) Encode() []byte {
	b := make([]byte, 0, BlockSize)
	b = append(b, Magic...)
	b = enc.AppendU32(b, Version)
	b = enc.AppendU32(b, 0)
	b = enc.AppendU64(b, s.Incompat)
	b = enc.AppendU64(b, s.ROCompat)
	b = enc.AppendU64(b, s.Compat)
	b = append(b, s.Store[:]...)
	b = append(b, s.Cluster[:]...)
	b = enc.AppendU64(b, s.Update)
	b = enc.AppendU32(b, s.Incarnation)
	b = enc.AppendU32(b, s.SegmentBytes)
	b = enc.AppendU32(b, s.Segments)
	b = enc.AppendU32(b, s.FirstSlot)
	b = enc.AppendU64(b, uint64(s.Tail))
	b = enc.AppendU64(b, uint64(s.FirstPrev))
	b = enc.AppendU64(b, uint64(s.DeviceBytes))
	b = enc.AppendU64(b, uint64(s.Created))
	b = append(b, s.Label[:min(len(s.Label), LabelMax)]...)
	b = append(b, make([]byte, farOff-len(b))...)
	b = enc.AppendU64(b, uint64(s.FarRoot))
	b = enc.AppendU64(b, uint64(s.FarStart))
	b = enc.AppendU32(b, s.FarSlot)
	b = b[:BlockSize]
	putU32(b[12:], superCRC(b))
	return b
}

// farOff is where the superblock's far root stands.
const farOff = 192

func superCRC(b []byte) uint32 { return enc.CRC(enc.CRC(0, b[:12]), b[16:BlockSize]) }

func putU32(b []byte, v uint32) {
	b[0], b[1], b[2], b[3] = byte(v), byte(v>>8), byte(v>>16), byte(v>>24)
}

// DecodeSuperblock reads one superblock. where names the device and off the
// place for messages. A wrong magic or checksum is a *sealfs.Corruption; a
// version or feature that this program does not know is ErrVersion, by name.
func DecodeSuperblock(b []byte, where string, off int64) (*Superblock, error) {
	bad := func(what string, want, got uint64) error {
		return &sealfs.Corruption{Where: where, Off: off, What: what, Want: want, Got: got}
	}
	if len(b) < BlockSize {
		return nil, bad("superblock is cut short", BlockSize, uint64(len(b)))
	}
	b = b[:BlockSize]
	if string(b[:8]) != Magic {
		return nil, bad("no SealFS superblock (magic)", 0, 0)
	}
	r := enc.Reader{B: b[8:]}
	version, crc := r.U32(), r.U32()
	if want := superCRC(b); crc != want {
		return nil, bad("superblock checksum", uint64(want), uint64(crc))
	}
	if version != Version {
		return nil, fmt.Errorf("%s: device format %d, but this program reads only %d: %w", where, version, Version, sealfs.ErrVersion)
	}
	s := &Superblock{Incompat: r.U64(), ROCompat: r.U64(), Compat: r.U64()}
	if unknown := s.Incompat &^ FeaturesKnown; unknown != 0 {
		return nil, fmt.Errorf("%s: device needs features %#x that this program does not know: %w", where, unknown, sealfs.ErrVersion)
	}
	copy(s.Store[:], r.Bytes(16))
	copy(s.Cluster[:], r.Bytes(16))
	s.Update, s.Incarnation, s.SegmentBytes, s.Segments, s.FirstSlot = r.U64(), r.U32(), r.U32(), r.U32(), r.U32()
	s.Tail, s.FirstPrev = sealfs.LSN(r.U64()), sealfs.LSN(r.U64())
	s.DeviceBytes, s.Created = int64(r.U64()), int64(r.U64())
	label := r.Bytes(LabelMax)
	n := 0
	for n < len(label) && label[n] != 0 {
		n++
	}
	s.Label = string(label[:n])
	s.FarRoot, s.FarStart, s.FarSlot = sealfs.LSN(r.U64()), sealfs.LSN(r.U64()), r.U32()
	if !zero(label[n:]) || !zero(r.B) {
		return nil, bad("superblock's reserved bytes are not zero", 0, 0)
	}
	if err := CheckGeometry(s.SegmentBytes, s.Segments); err != nil {
		return nil, bad("superblock: "+err.Error(), 0, 0)
	}
	far := s.FarRoot != 0
	if s.FirstSlot != NoSlot && s.FirstSlot >= s.Segments || s.DeviceBytes < s.End() || s.FarSlot >= s.Segments ||
		far != (s.FarStart != 0) || !far && s.FarSlot != 0 || far && s.Incompat&FeatureFar == 0 {
		return nil, bad("superblock's numbers contradict each other", 0, 0)
	}
	return s, nil
}

// CheckGeometry says what is wrong with a segment size or count, if anything.
func CheckGeometry(segmentBytes, segments uint32) error {
	if segmentBytes < SegmentBytesMin || segmentBytes > SegmentBytesMax || segmentBytes&(segmentBytes-1) != 0 {
		return fmt.Errorf("segment size %d is not a power of two from %d to %d: %w", segmentBytes, SegmentBytesMin, SegmentBytesMax, sealfs.ErrInvalid)
	}
	if segments < SegmentsMin || segments > SegmentsMax {
		return fmt.Errorf("%d segments, not %d to %d: %w", segments, SegmentsMin, SegmentsMax, sealfs.ErrInvalid)
	}
	return nil
}

// SlotOffset returns the device byte at which slot n begins.
func (s *Superblock) SlotOffset(n uint32) int64 {
	return DataStart + int64(n)*int64(s.SegmentBytes)
}

// End returns the device byte behind the last slot.
func (s *Superblock) End() int64 { return s.SlotOffset(s.Segments) }

func zero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
