package meta

import (
	"encoding/binary"

	"sealfs"
	"sealfs/internal/enc"
)

const (
	block = sealfs.BlockSize
	// ExtentBlocksMax bounds the blocks of one extent, so that its sums fit a value of the tree.
	ExtentBlocksMax = 128
	// inlineBlocks bounds the blocks of the extent that stands in an inode record.
	inlineBlocks = 8
	// extentRecordMax is the longest extent record, in bytes.
	extentRecordMax = 8 + 4 + 3 + 2 + 4*ExtentBlocksMax
)

// Extent says where a piece of a file lies in the log.
//
//	size field
//	   8 address, little-endian
//	   4 stamp
//	   … length, varint
//	   … cover, varint
//	  4n sums
//
// Address and stamp stand first and at full width: moving an extent changes
// nothing but eight bytes of the region.
type Extent struct {
	Off   uint64     // in the file, a multiple of the block size; not part of the record
	Len   uint32     // bytes of the file; what follows up to the next extent reads as zeros
	Addr  sealfs.LSN // of the first byte; block i lies 4096*i further on
	Cover uint32     // bytes of the last block that its sum covers, 0: just those that Len counts
	Stamp uint32     // part of the seed of the sums
	Sums  []byte     // one little-endian CRC-32C for each block (see BlockSum); aliases the page
}

// BlockSum returns the checksum of the data of one block of a file, at most
// 4096 bytes. It is seeded with where the block belongs, so that a misdirected
// or stale block does not verify, and not with where it lies, so that it can be moved.
func BlockSum(ino sealfs.Ino, block uint64, stamp uint32, data []byte) uint32 {
	return enc.CRC(enc.Seed(0, uint64(ino), block, uint64(stamp)), data)
}

// Blocks returns the number of blocks that e touches.
func (e *Extent) Blocks() int { return int((uint64(e.Len) + block - 1) / block) }

// Stored returns the bytes that e keeps alive in the log at e.Addr: its length,
// and what the sum of a truncated last block still covers.
func (e *Extent) Stored() uint32 {
	if e.Cover == 0 {
		return e.Len
	}
	return uint32(e.Blocks()-1)*block + e.Cover
}

// Covered returns how many stored bytes the sum of block i (from 0) covers.
func (e *Extent) Covered(i int) uint32 {
	if i < e.Blocks()-1 {
		return block
	}
	return e.Stored() - uint32(i)*block
}

// Sum returns the checksum of block i (from 0).
func (e *Extent) Sum(i int) uint32 { return binary.LittleEndian.Uint32(e.Sums[4*i:]) }

// lastBlock returns the number in the file of e's last block.
func (e *Extent) lastBlock() uint64 { return e.Off/block + uint64(e.Blocks()) - 1 }

// lastBytes returns how many bytes of its last block a length of n > 0 counts.
func lastBytes(n uint32) uint32 { return (n-1)%block + 1 }

// front returns the first n > 0 blocks of e, fewer than it has.
func (e *Extent) front(n int) Extent {
	return Extent{Off: e.Off, Len: uint32(n) * block, Addr: e.Addr, Stamp: e.Stamp, Sums: e.Sums[:4*n]}
}

// back returns e without its first n blocks, fewer than it has.
func (e *Extent) back(n int) Extent {
	by := uint32(n) * block
	return Extent{Off: e.Off + uint64(by), Len: e.Len - by, Addr: e.Addr + sealfs.LSN(by), Cover: e.Cover, Stamp: e.Stamp, Sums: e.Sums[4*n:]}
}

// trim cuts e down to n bytes, in its last block.
func (e *Extent) trim(n uint32) {
	if covered := e.Covered(e.Blocks() - 1); covered > lastBytes(n) {
		e.Cover = covered
	}
	e.Len = n
}

// Append appends the record of e to b.
func (e *Extent) Append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(e.Addr))
	b = binary.LittleEndian.AppendUint32(b, e.Stamp)
	b = binary.AppendUvarint(b, uint64(e.Len))
	b = binary.AppendUvarint(b, uint64(e.Cover))
	return append(b, e.Sums...)
}

// read reads what Append wrote, without Off, and reports whether it is an
// extent of at most limit blocks.
func (e *Extent) read(in *enc.Reader, limit int) bool {
	e.Addr = sealfs.LSN(in.U64())
	e.Stamp = in.U32()
	n, cover := in.Uvarint(), in.Uvarint()
	if in.Err || n == 0 || n > uint64(limit)*block || cover > block {
		return false
	}
	e.Len, e.Cover = uint32(n), uint32(cover)
	if cover != 0 && e.Cover <= lastBytes(e.Len) {
		return false
	}
	if uint64(e.Addr.Off())+uint64(e.Stored()) > 1<<32 {
		return false
	}
	e.Sums = in.Bytes(4 * e.Blocks())
	return !in.Err
}

// DecodeExtent reads the record b of the extent whose key ends in last; Sums
// alias b. It returns a *sealfs.Corruption for bytes that Append cannot have written.
func DecodeExtent(b []byte, last uint64, e *Extent) error {
	in := enc.Reader{B: b}
	if !e.read(&in, ExtentBlocksMax) || !in.Done() || last >= 1<<52 || last+1 < uint64(e.Blocks()) {
		return damaged("extent record %x that ends in block %d", b, last)
	}
	e.Off = (last + 1 - uint64(e.Blocks())) * block
	return nil
}
