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
	v := [4]uint64{k0 ^ 0x736f6d6570736575, k1 ^ 0x646f72616e646f6d, k0 ^ 0x6c7967656e657261, k1 ^ 0x7465646279746573}
	last := uint64(len(msg)) << 56
	for ; len(msg) >= 8; msg = msg[8:] {
		v = sipWord(v, binary.LittleEndian.Uint64(msg))
	}
	for i, b := range msg {
		last |= uint64(b) << (8 * i)
	}
	v = sipWord(v, last)
	v[2] ^= 0xff
	for range 4 {
		v = sipRound(v)
	}
	return v[0] ^ v[1] ^ v[2] ^ v[3]
}

func sipWord(v [4]uint64, m uint64) [4]uint64 {
	v[3] ^= m
	v = sipRound(sipRound(v))
	v[0] ^= m
	return v
}

func sipRound(v [4]uint64) [4]uint64 {
	v[0] += v[1]
	v[1] = bits.RotateLeft64(v[1], 13) ^ v[0]
	v[0] = bits.RotateLeft64(v[0], 32)
	v[2] += v[3]
	v[3] = bits.RotateLeft64(v[3], 16) ^ v[2]
	v[0] += v[3]
	v[3] = bits.RotateLeft64(v[3], 21) ^ v[0]
	v[2] += v[1]
	v[1] = bits.RotateLeft64(v[1], 17) ^ v[2]
	v[2] = bits.RotateLeft64(v[2], 32)
	return v
}
