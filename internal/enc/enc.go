// Package enc is the one way in which SealFS turns numbers into bytes and back:
// a bounded little-endian cursor and CRC-32C seeded with identity. Decoding
// never panics: a Reader that ran out of bytes returns zeros and remembers it.
package enc

import (
	"encoding/binary"
	"hash/crc32"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// CRC returns the CRC-32C of b, continuing from seed (0 to start).
func CRC(seed uint32, b []byte) uint32 { return crc32.Update(seed, castagnoli, b) }

// Seed folds identifying numbers into a CRC seed, so that equal bytes at
// another place or of another owner have another checksum.
func Seed(seed uint32, vs ...uint64) uint32 {
	// By hand: what is given to crc32.Update escapes to the heap.
	seed = ^seed
	for _, v := range vs {
		for range 8 {
			seed = castagnoli[byte(seed)^byte(v)] ^ seed>>8
			v >>= 8
		}
	}
	return ^seed
}

// Reader decodes from a byte slice. After any read beyond the end, Err is true
// and all further reads return zero values; check it once at the end.
type Reader struct {
	B   []byte // what is left
	Err bool
}

// take returns the next n bytes, or nil with Err set.
func (r *Reader) take(n int) []byte {
	if r.Err || n < 0 || n > len(r.B) {
		r.Err = true
		return nil
	}
	b := r.B[:n:n]
	r.B = r.B[n:]
	return b
}

// U8 reads one byte.
func (r *Reader) U8() uint8 {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

// U16 reads two bytes.
func (r *Reader) U16() uint16 {
	if b := r.take(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

// U32 reads four bytes.
func (r *Reader) U32() uint32 {
	if b := r.take(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

// U64 reads eight bytes.
func (r *Reader) U64() uint64 {
	if b := r.take(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

// Uvarint reads an unsigned varint in its shortest form only.
func (r *Reader) Uvarint() uint64 {
	if r.Err {
		return 0
	}
	v, n := binary.Uvarint(r.B)
	if n <= 0 || n > 1 && r.B[n-1] == 0 {
		r.Err = true
		return 0
	}
	r.B = r.B[n:]
	return v
}

// Varint reads a signed (zigzag) varint.
func (r *Reader) Varint() int64 {
	u := r.Uvarint()
	return int64(u>>1) ^ -int64(u&1)
}

// Bytes reads n bytes; the slice aliases the input.
func (r *Reader) Bytes(n int) []byte { return r.take(n) }

// VarBytes reads a length (at most limit) and that many bytes, aliasing the input.
func (r *Reader) VarBytes(limit int) []byte {
	n := r.Uvarint()
	if n > uint64(limit) {
		r.Err = true
		return nil
	}
	return r.take(int(n))
}

// Done reports whether everything was read, without error.
func (r *Reader) Done() bool { return !r.Err && len(r.B) == 0 }

// The Append functions are binary's, under the names that match Reader's.

// AppendU16 appends v in two bytes.
func AppendU16(b []byte, v uint16) []byte { return binary.LittleEndian.AppendUint16(b, v) }

// AppendU32 appends v in four bytes.
func AppendU32(b []byte, v uint32) []byte { return binary.LittleEndian.AppendUint32(b, v) }

// AppendU64 appends v in eight bytes.
func AppendU64(b []byte, v uint64) []byte { return binary.LittleEndian.AppendUint64(b, v) }

// AppendUvarint appends v as a varint.
func AppendUvarint(b []byte, v uint64) []byte { return binary.AppendUvarint(b, v) }

// AppendVarint appends v as a zigzag varint.
func AppendVarint(b []byte, v int64) []byte { return binary.AppendVarint(b, v) }

// AppendVarBytes appends the length of p and p.
func AppendVarBytes[T ~string | ~[]byte](b []byte, p T) []byte {
	return append(binary.AppendUvarint(b, uint64(len(p))), p...)
}
