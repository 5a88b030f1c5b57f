package layout

import (
	"encoding/binary"
	"hash/crc32"

	"sealfs"
	"sealfs/internal/enc"
)

// A far checkpoint is a copy of the region's pages in far segments. Its records
// are whole blocks: the first holds header and operation, the payload follows.
// So every copy stands in a device block of its own.
//
//	far-page  op: list of page numbers       payload: the pages
//	far-map   op: list of map page numbers   payload: the map pages
//	far-root  op: FarRoot                    payload: FarRefs of map pages, then zeros
//
// A list is a 4-byte count, 4 bytes of zero, and 8 bytes a number; zeros fill
// the operation up to FarOpBytes. A map page is the FarRefs of FarMapPages pages.
const (
	// FarOpBytes is the size of the operation of every far record.
	FarOpBytes = BlockSize - RecordHeaderBytes
	// FarListMax is the most numbers that a list holds.
	FarListMax = (FarOpBytes - 8) / 8
	// FarRefBytes is the size of an encoded FarRef.
	FarRefBytes = 16
	// FarMapPages is how many pages a map page describes.
	FarMapPages = BlockSize / FarRefBytes
)

// AppendFarList appends a list as the operation of a far-page or far-map record.
// It must not have more than FarListMax numbers.
func AppendFarList(b []byte, nos []uint64) []byte {
	n := len(b) + FarOpBytes
	b = enc.AppendU32(b, uint32(len(nos)))
	b = enc.AppendU32(b, 0)
	for _, v := range nos {
		b = enc.AppendU64(b, v)
	}
	return append(b, make([]byte, n-len(b))...)
}

// ReadFarList reads what AppendFarList wrote.
func ReadFarList(op []byte) ([]uint64, bool) {
	r := enc.Reader{B: op}
	n := r.U32()
	if zeros := r.U32(); len(op) != FarOpBytes || zeros != 0 || n > FarListMax {
		return nil, false
	}
	nos := make([]uint64, n)
	for i := range nos {
		nos[i] = r.U64()
	}
	return nos, !r.Err && zero(r.B)
}

// FarRef says where the copy of a page stands, and what it is. At 0 stands for a
// page of zeros, without a copy. The two sums are CRCs of different polynomials:
// together they also tell a page that has changed since from one that has not.
//
//	off size field
//	  0    8 at    LSN of the copy's first byte
//	  8    4 crc   CRC-32C of the 4 KiB
//	 12    4 ieee  CRC-32 (IEEE) of the 4 KiB
type FarRef struct {
	At        sealfs.LSN
	CRC, IEEE uint32
}

// MakeFarRef returns the reference to page, whose copy stands at at.
func MakeFarRef(at sealfs.LSN, page []byte) FarRef {
	return FarRef{at, enc.CRC(0, page), crc32.ChecksumIEEE(page)}
}

// Is reports whether page is what r refers to.
func (r FarRef) Is(page []byte) bool {
	if r.At == 0 {
		return zero(page)
	}
	return enc.CRC(0, page) == r.CRC && crc32.ChecksumIEEE(page) == r.IEEE
}

// Put writes r to the first FarRefBytes of b.
func (r FarRef) Put(b []byte) {
	le := binary.LittleEndian
	le.PutUint64(b, uint64(r.At))
	le.PutUint32(b[8:], r.CRC)
	le.PutUint32(b[12:], r.IEEE)
}

// GetFarRef reads what Put wrote; b holds at least FarRefBytes.
func GetFarRef(b []byte) FarRef {
	le := binary.LittleEndian
	return FarRef{sealfs.LSN(le.Uint64(b)), le.Uint32(b[8:]), le.Uint32(b[12:])}
}

// FarRoot is the operation of a far-root record: one part of the root of a far
// checkpoint. The superblock names the last part.
//
//	off size field
//	  0    8 generation      counts the far checkpoints of the store
//	  8    8 start           LSN where replay begins
//	 16    8 applied         LSN that the log must reach for the copies to be whole
//	 24    4 start slot
//	 28    4 chain           chain value at start
//	 32    4 incarnation     of the log at the start
//	 36    4 part            of the root, from 0
//	 40    4 parts
//	 44    4 previous slot   of the part before, NoSlot for part 0
//	 48    8 previous        LSN of the part before, 0 for part 0
//	 56    4 region version
//	 60    4 refs            FarRefs in the payload
//	 64    8 region features incompatible ones
//	 72    8 table bytes     of the region
//	 80    8 pages           of the region
//	 88      zero
type FarRoot struct {
	Generation     uint64
	Start, Applied sealfs.LSN
	StartSlot      uint32
	Chain          uint32
	Incarnation    uint32
	Part, Parts    uint32
	PrevSlot       uint32
	Prev           sealfs.LSN
	RegionVersion  uint32
	Refs           uint32
	RegionIncompat uint64
	TableBytes     int64
	Pages          uint64
}

// AppendFarRoot appends the FarOpBytes of r.
func AppendFarRoot(b []byte, r *FarRoot) []byte {
	n := len(b) + FarOpBytes
	b = enc.AppendU64(b, r.Generation)
	b = enc.AppendU64(b, uint64(r.Start))
	b = enc.AppendU64(b, uint64(r.Applied))
	for _, v := range []uint32{r.StartSlot, r.Chain, r.Incarnation, r.Part, r.Parts, r.PrevSlot} {
		b = enc.AppendU32(b, v)
	}
	b = enc.AppendU64(b, uint64(r.Prev))
	b = enc.AppendU32(b, r.RegionVersion)
	b = enc.AppendU32(b, r.Refs)
	b = enc.AppendU64(b, r.RegionIncompat)
	b = enc.AppendU64(b, uint64(r.TableBytes))
	b = enc.AppendU64(b, r.Pages)
	return append(b, make([]byte, n-len(b))...)
}

// farPagesMax bounds the size of a region, in pages: 1 PiB.
const farPagesMax = 1 << 38

// ReadFarRoot reads what AppendFarRoot wrote; ok is false for what it never writes.
func ReadFarRoot(op []byte) (root FarRoot, ok bool) {
	in := enc.Reader{B: op}
	root = FarRoot{Generation: in.U64(), Start: sealfs.LSN(in.U64()), Applied: sealfs.LSN(in.U64())}
	for _, v := range []*uint32{&root.StartSlot, &root.Chain, &root.Incarnation, &root.Part, &root.Parts, &root.PrevSlot} {
		*v = in.U32()
	}
	root.Prev = sealfs.LSN(in.U64())
	root.RegionVersion, root.Refs = in.U32(), in.U32()
	root.RegionIncompat = in.U64()
	root.TableBytes, root.Pages = int64(in.U64()), in.U64()
	first := root.Part == 0
	ok = !in.Err && len(op) == FarOpBytes && zero(in.B) &&
		root.Start != 0 && root.Applied >= root.Start && root.Part < root.Parts &&
		first == (root.Prev == 0) && first == (root.PrevSlot == NoSlot) &&
		root.TableBytes >= 0 && root.TableBytes <= int64(SegmentsMax)*64 && root.Pages <= farPagesMax
	return root, ok
}

// FarMaps returns how many map pages describe a region of that many pages.
func FarMaps(pages uint64) uint64 { return (pages + FarMapPages - 1) / FarMapPages }
