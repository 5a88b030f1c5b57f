package fsck

import (
	"encoding/binary"
	"math/bits"

	"sealfs"
)

// A name's place in its directory is fixed by a hash of it, so that a lookup
// finds it; a name at another place is lost. The keys of the hashes:
const (
	entryKey0 = 0x5345414c46536469 // with the directory's inode number
	entryKey1 = 0x72656e7472696573 // with its volume
	attrKey0  = 0x5345414c46534174 // with the inode number
	attrKey1  = 0x7472696275746573 // with its volume
	// ordinals is how many names may share a hash.
	ordinals = 256
)

// firstCookie returns the first of the cookies under which name can stand.
func firstCookie(dir sealfs.Ino, v sealfs.Volume, name []byte) uint64 {
	return max(siphash(uint64(dir)^entryKey0, uint64(v)^entryKey1, name)>>9, 1) * ordinals
}

// attrHash returns the hash under which the attribute name of an inode stands.
func attrHash(ino sealfs.Ino, v sealfs.Volume, name []byte) uint32 {
	return uint32(siphash(uint64(ino)^attrKey0, uint64(v)^attrKey1, name))
}

// siphash is SipHash-2-4 (Aumasson and Bernstein, 2012).
func siphash(k0, k1 uint64, msg []byte) uint64 {
	v := sip{k0 ^ 0x736f6d6570736575, k1 ^ 0x646f72616e646f6d, k0 ^ 0x6c7967656e657261, k1 ^ 0x7465646279746573}
	last := uint64(len(msg)) << 56
	for ; len(msg) >= 8; msg = msg[8:] {
		v = v.word(binary.LittleEndian.Uint64(msg))
	}
	for i, b := range msg {
		last |= uint64(b) << (8 * i)
	}
	v = v.word(last)
	v.c ^= 0xff
	v = v.round().round().round().round()
	return v.a ^ v.b ^ v.c ^ v.d
}

// sip is the state of a siphash.
type sip struct{ a, b, c, d uint64 }

func (v sip) word(m uint64) sip {
	v.d ^= m
	v = v.round().round()
	v.a ^= m
	return v
}

func (v sip) round() sip {
	v.a += v.b
	v.b = bits.RotateLeft64(v.b, 13) ^ v.a
	v.a = bits.RotateLeft64(v.a, 32)
	v.c += v.d
	v.d = bits.RotateLeft64(v.d, 16) ^ v.c
	v.a += v.d
	v.d = bits.RotateLeft64(v.d, 21) ^ v.a
	v.c += v.b
	v.b = bits.RotateLeft64(v.b, 17) ^ v.c
	v.c = bits.RotateLeft64(v.c, 32)
	return v
}
