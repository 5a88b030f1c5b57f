// Package layout is the normative description of a region's bytes: what stands
// in the header slots and the root page, where the table and the page bitmaps
// lie, and how a tree page is cut up. Package pmem is built on it. It encodes
// and decodes, and keeps no state.
//
//	page 0, 1      header slots (Header), written in turn: an update goes to slot Update%2
//	page 2         intent page: the checkpoint that is about to write pages
//	page 3         root page (Root), then from byte 2048 on lsfs's state
//	page 4…4+T-1   table of device segments, 32 bytes each; its content is lsfs's
//	page 4+T       bitmap of group 0
//	then           32 sum pages of group 0
//	rest           tree pages
//
// A group is 32,768 pages (128 MiB). Every other group begins with its bitmap
// and its sum pages. A set bit of a bitmap (package alloc's order) is a tree page;
// all other kinds of pages never have theirs set, so that a page of zeros is the
// right bitmap of a fresh group, and growth writes nothing. See sums.go for the
// sums and the intent.
//
// All numbers are little-endian; page numbers count pages of 4,096 bytes from
// the start of the region.
package layout

import (
	"encoding/binary"
	"fmt"
	"math"

	"sealfs"
	"sealfs/internal/enc"
)

// Geometry that every region shares.
const (
	PageSize   = 4096
	GroupPages = PageSize * 8 // pages that one bitmap page describes

	IntentPage = 2
	RootPage   = 3
	TablePage  = 4 // first page of the table
	StateOff   = 2048
	StateBytes = PageSize - StateOff

	// TableBytesMax keeps table, bitmap and sums of group 0 inside that group, with
	// nearly half of its pages left for the tree. It is enough for two million segments.
	TableBytesMax = GroupPages / 2 * PageSize
)

// Version is the format this program writes and the only one it reads.
const Version = 2

// Magic opens a header slot.
const Magic = "SEALFSr1"

// The incompatible features that this version knows.
const (
	// FeatureNoSums: the pages have no sums. Intent and sum pages are in their
	// places and stay zeros. It is decided when the region is made.
	FeatureNoSums = 1 << 0
	// FeatureDax: the region is used as persistent memory. It may be newer than
	// the log on the device, and is of use only with its ring: that of the
	// header's incarnation, in the file beside it. A clean end of the store
	// clears the bit.
	FeatureDax = 1 << 1

	known = FeatureNoSums | FeatureDax
)

// featureNames gives the incompatible features of the format by bit, for
// messages.
var featureNames = map[uint]string{0: "no page sums", 1: "dax"}

// Header is the content of a header slot.
//
//	 0  8  magic "SEALFSr1"
//	 8  4  version
//	12  4  zero
//	16  8  incompatible features: an unknown bit refuses the region
//	24  8  compatible features: unknown bits are ignored and kept
//	32 16  store id
//	48  4  incarnation
//	52  4  start slot
//	56  8  update counter
//	64  8  start LSN
//	72  4  chain value at start
//	76  4  zero
//	80  8  table size in bytes
//	88  8  pages
//	 …     zeros
//	4092 4 CRC-32C of all before, seeded with the slot number
//
// The places of magic and checksum never change in any version, so that a newer
// region is told from a damaged one.
type Header struct {
	Version     uint32
	Incompat    uint64 // feature bits that a reader must know
	Compat      uint64 // feature bits that a reader may ignore
	Store       sealfs.UUID
	Incarnation uint32     // of the store, when the header was written
	Update      uint64     // grows by one with every header written
	Start       sealfs.LSN // replay begins here
	StartSlot   uint32     // device slot of the segment that Start lies in
	Chain       uint32     // log chain value before Start
	TableBytes  int64      // size of the table as lsfs uses it
	Pages       uint64     // pages of the region when the header was written
}

const (
	headerUsed = 96
	headerCRC  = PageSize - 4
)

// Slot returns the header slot (its page number) that update u goes to.
func Slot(u uint64) int { return int(u & 1) }

// TablePages returns how many pages the table takes.
func (h *Header) TablePages() uint64 { return (uint64(h.TableBytes) + PageSize - 1) / PageSize }

// Encode returns the page for the slot that h.Update selects.
func (h *Header) Encode() []byte {
	b := make([]byte, 0, PageSize)
	b = append(b, Magic...)
	b = enc.AppendU32(b, h.Version)
	b = enc.AppendU32(b, 0)
	b = enc.AppendU64(b, h.Incompat)
	b = enc.AppendU64(b, h.Compat)
	b = append(b, h.Store[:]...)
	b = enc.AppendU32(b, h.Incarnation)
	b = enc.AppendU32(b, h.StartSlot)
	b = enc.AppendU64(b, h.Update)
	b = enc.AppendU64(b, uint64(h.Start))
	b = enc.AppendU32(b, h.Chain)
	b = enc.AppendU32(b, 0)
	b = enc.AppendU64(b, uint64(h.TableBytes))
	b = enc.AppendU64(b, h.Pages)
	b = b[:PageSize]
	binary.LittleEndian.PutUint32(b[headerCRC:], checksum(Slot(h.Update), b))
	return b
}

func checksum(slot int, b []byte) uint32 {
	return enc.CRC(enc.Seed(0, uint64(slot)), b[:headerCRC])
}

// DecodeHeader reads slot (0 or 1) from its page; where names the region in
// errors. Damage is a *sealfs.Corruption; a sound header of another version, or
// with features this program does not know, is refused with sealfs.ErrVersion.
func DecodeHeader(where string, slot int, b []byte) (Header, error) {
	bad := func(what string, want, got uint64) (Header, error) {
		return Header{}, &sealfs.Corruption{Where: where, Off: int64(slot) * PageSize, What: what, Want: want, Got: got}
	}
	if len(b) != PageSize {
		return bad("region header length", PageSize, uint64(len(b)))
	}
	if string(b[:8]) != Magic {
		return bad("region header magic", binary.BigEndian.Uint64([]byte(Magic)), binary.BigEndian.Uint64(b))
	}
	if want, got := checksum(slot, b), binary.LittleEndian.Uint32(b[headerCRC:]); want != got {
		return bad("region header checksum", uint64(want), uint64(got))
	}
	var h Header
	r := enc.Reader{B: b[8:headerUsed]}
	h.Version = r.U32()
	if h.Version != Version {
		return Header{}, fmt.Errorf("region %s has format version %d, this program knows version %d: %w",
			where, h.Version, Version, sealfs.ErrVersion)
	}
	pad := r.U32()
	h.Incompat = r.U64()
	if h.Incompat&^known != 0 {
		return Header{}, fmt.Errorf("region %s uses features that this program does not know (%s): %w",
			where, features(h.Incompat&^known), sealfs.ErrVersion)
	}
	h.Compat = r.U64()
	copy(h.Store[:], r.Bytes(16))
	h.Incarnation = r.U32()
	h.StartSlot = r.U32()
	h.Update = r.U64()
	h.Start = sealfs.LSN(r.U64())
	h.Chain = r.U32()
	pad |= r.U32()
	table := r.U64()
	h.Pages = r.U64()
	switch {
	case pad != 0:
		return bad("region header padding", 0, uint64(pad))
	case Slot(h.Update) != slot:
		return bad("region header slot", uint64(Slot(h.Update)), uint64(slot))
	case table > TableBytesMax:
		return bad("table size", TableBytesMax, table)
	case h.Pages > math.MaxInt64/PageSize:
		return bad("region size in pages", math.MaxInt64/PageSize, h.Pages)
	}
	h.TableBytes = int64(table)
	for i, c := range b[headerUsed:headerCRC] {
		if c != 0 {
			return bad(fmt.Sprintf("region header padding at %d", headerUsed+i), 0, uint64(c))
		}
	}
	return h, nil
}

// features lists the bits of v by name, or by number where there is none.
func features(v uint64) string {
	s := ""
	for bit := uint(0); bit < 64; bit++ {
		if v>>bit&1 == 0 {
			continue
		}
		if s != "" {
			s += ", "
		}
		if name := featureNames[bit]; name != "" {
			s += name
		} else {
			s += fmt.Sprintf("bit %d", bit)
		}
	}
	return s
}

// Root page:
//
//	0   8  magic "SEALroot"
//	8   8  page of the tree's root
//	16  8  tree pages
//	24  8  keys
//	…      zeros
//	2048 … lsfs's state
const (
	RootMagic    = "SEALroot"
	RootTreeOff  = 8
	RootPagesOff = 16
	RootKeysOff  = 24
)

// Root is the decoded first part of the root page.
type Root struct {
	Tree  uint64 // page of the tree's root
	Pages uint64 // tree pages, the root's included
	Keys  uint64 // keys in the tree
}

// EncodeRoot returns a root page with zeros for lsfs's state.
func EncodeRoot(r Root) []byte {
	b := make([]byte, 0, PageSize)
	b = append(b, RootMagic...)
	b = enc.AppendU64(b, r.Tree)
	b = enc.AppendU64(b, r.Pages)
	b = enc.AppendU64(b, r.Keys)
	return b[:PageSize]
}

// DecodeRoot reads the root page b; where names the region in errors, which are
// *sealfs.Corruption.
func DecodeRoot(where string, b []byte) (Root, error) {
	if len(b) != PageSize || string(b[:8]) != RootMagic {
		return Root{}, &sealfs.Corruption{Where: where, Off: RootPage * PageSize, What: "root page magic"}
	}
	return Root{
		Tree:  binary.LittleEndian.Uint64(b[RootTreeOff:]),
		Pages: binary.LittleEndian.Uint64(b[RootPagesOff:]),
		Keys:  binary.LittleEndian.Uint64(b[RootKeysOff:]),
	}, nil
}

// BitmapPage returns the page of group g's bitmap in a region whose table takes
// tablePages.
func BitmapPage(g, tablePages uint64) uint64 {
	if g == 0 {
		return TablePage + tablePages
	}
	return g * GroupPages
}

// Reserved returns how many pages at the start of group g are not the tree's.
func Reserved(g, tablePages uint64) uint64 {
	if g == 0 {
		return TablePage + tablePages + 1 + SumPages
	}
	return 1 + SumPages
}

// Tree page:
//
//	0   2  magic 0x5054
//	2   1  level, 0 for a leaf
//	3   1  zero
//	4   2  dead bytes between heap start and the end of the page
//	6   2  number of cells
//	8   2  heap start: the lowest byte of a cell
//	10  2  slot of the last insert, plus 1; 0 for none (only a hint)
//	12  …  slots: offsets of the cells, 2 bytes each, in the order of the keys
//	…   …  gap, then cells
//
// Cell: 3 bytes length (key length in the low 9 bits, value length above), key,
// value. In an inner page the value is the child's page number in 6 bytes, the
// child holds the keys from the cell's key up to the next cell's, and the key of
// cell 0 is empty, which stands for minus infinity.
const (
	TreeMagic    = 0x5054
	TreeLevelOff = 2
	TreeDeadOff  = 4
	TreeCountOff = 6
	TreeHeapOff  = 8
	TreeLastOff  = 10
	TreeHeader   = 12
	CellHeader   = 3
	CellKeyBits  = 9
	ChildBytes   = 6
	TreeLevelMax = 15
)

// EncodeTree returns an empty leaf.
func EncodeTree() []byte {
	b := make([]byte, PageSize)
	binary.LittleEndian.PutUint16(b, TreeMagic)
	binary.LittleEndian.PutUint16(b[TreeHeapOff:], PageSize)
	return b
}

// Header page of the staging file; its chunks follow, each as large as a
// segment:
//
//	 0    8  magic "SEALFSs1"
//	 8    4  version (of the region's format)
//	12    4  incarnation
//	16   16  store id
//	32   16  boot id
//	48    4  chunk size in bytes
//	52    4  chunks
//	 …       zeros
//	1020  4  CRC-32C of all before
//	1024  …  4 bytes per chunk: sequence number of the segment in it, not summed
//	4080  8  tail of the log, not summed: after a crash the log reaches so far at least
//	4088  8  its complement; if it is not, the tail is not known
const (
	StagingMagic     = "SEALFSs1"
	StagingCRCOff    = 1020
	StagingSeqOff    = 1024
	StagingTailOff   = PageSize - 16
	StagingChunksMax = (StagingTailOff - StagingSeqOff) / 4
)
