package op

import (
	"encoding/binary"
	"fmt"

	"sealfs"
	"sealfs/internal/enc"
)

// The bits of a reply's presence byte. The encoding of a reply is: code (two
// bytes), presence byte, then the present parts in order of their bits; then, if
// there are any, the lease, stamp and revocations.
// Data is never part of it: like a Write's payload it travels beside.
const (
	replyAttr = 1 << iota
	replyLock
	replyOff
	replyEof
	replyHeld
	replyEntries
	replySpace
	replyDir
)

// AppendTo appends the encoding of r, without Data, to b.
func (r *Reply) AppendTo(b []byte) []byte {
	b = enc.AppendU16(b, uint16(r.Code))
	b = append(b, 0)
	at := len(b) - 1
	if r.Attr != (Attr{}) {
		b[at] |= replyAttr
		b = appendAttr(b, &r.Attr)
	}
	if r.Lock != (Lock{}) {
		b[at] |= replyLock
		b = appendLock(b, &r.Lock)
	}
	if r.Off != 0 {
		b[at] |= replyOff
		b = binary.AppendUvarint(b, r.Off)
	}
	if r.Eof {
		b[at] |= replyEof
	}
	if r.Held != 0 {
		b[at] |= replyHeld
		b = binary.AppendUvarint(b, uint64(r.Held))
	}
	if len(r.Entries) > 0 {
		b[at] |= replyEntries
		b = binary.AppendUvarint(b, uint64(len(r.Entries)))
		for i := range r.Entries {
			e := &r.Entries[i]
			b = enc.AppendVarBytes(b, e.Name)
			b = binary.AppendUvarint(b, uint64(e.Ino))
			b = enc.AppendU64(b, e.Cookie)
			if e.Attr.Ino != 0 {
				b = append(b, e.Type|0x80)
				b = appendAttr(b, &e.Attr)
			} else {
				b = append(b, e.Type)
			}
		}
	}
	if r.Space != (Space{}) {
		b[at] |= replySpace
		for _, v := range [...]uint64{r.Space.Bytes, r.Space.BytesFree, r.Space.Inodes, r.Space.InodesFree} {
			b = binary.AppendUvarint(b, v)
		}
	}
	if r.Dir != (Attr{}) {
		b[at] |= replyDir
		b = appendAttr(b, &r.Dir)
	}
	if r.Lease == 0 && r.Stamp == 0 && len(r.Revokes) == 0 {
		return b
	}
	b = append(b, byte(r.Lease))
	b = binary.AppendUvarint(b, r.Stamp)
	for i := range r.Revokes {
		v := &r.Revokes[i]
		b = binary.AppendUvarint(b, v.Num)
		b = append(b, byte(v.Kind))
		b = binary.AppendUvarint(b, uint64(v.Ino))
		b = enc.AppendVarBytes(b, v.Name)
	}
	return b
}

// RevokesMax bounds the revocations of one reply.
const RevokesMax = 256

// DecodeReply reads one reply from all of b. Data is left as it was; the room
// of Entries is reused. It returns ErrInvalid for bytes that AppendTo cannot
// have written.
func DecodeReply(r *Reply, b []byte) error {
	*r = Reply{Entries: r.Entries[:0], Revokes: r.Revokes[:0], Data: r.Data}
	in := enc.Reader{B: b}
	r.Code = sealfs.Code(in.U16())
	mask := in.U8()
	ok := true
	if mask&replyAttr != 0 {
		ok = readAttr(&in, &r.Attr) && ok
	}
	if mask&replyLock != 0 {
		ok = readLock(&in, &r.Lock) && ok
	}
	if mask&replyOff != 0 {
		r.Off = in.Uvarint()
		ok = ok && r.Off != 0
	}
	r.Eof = mask&replyEof != 0
	if mask&replyHeld != 0 {
		r.Held = sealfs.Ino(in.Uvarint())
		ok = ok && r.Held != 0 && r.Held <= sealfs.InoMax
	}
	if mask&replyEntries != 0 {
		n := in.Uvarint()
		// Every entry takes at least 12 bytes, so n is believed only as far as
		// the input could hold that many.
		if n == 0 || n > uint64(len(in.B))/12 {
			return fmt.Errorf("reply with %d entries in %d bytes: %w", n, len(in.B), sealfs.ErrInvalid)
		}
		for range n {
			e := Dirent{Name: string(in.VarBytes(sealfs.NameMax)), Ino: sealfs.Ino(in.Uvarint()), Cookie: in.U64()}
			t := in.U8()
			if e.Type = t &^ 0x80; t&0x80 != 0 {
				ok = readAttr(&in, &e.Attr) && e.Attr.Ino != 0 && ok
			}
			ok = ok && e.Type < 16 && e.Name != "" && e.Ino <= sealfs.InoMax
			if in.Err {
				break
			}
			r.Entries = append(r.Entries, e)
		}
	}
	if mask&replySpace != 0 {
		r.Space = Space{in.Uvarint(), in.Uvarint(), in.Uvarint(), in.Uvarint()}
		ok = ok && r.Space != (Space{})
	}
	if mask&replyDir != 0 {
		ok = readAttr(&in, &r.Dir) && ok
	}
	if ok && !in.Err && len(in.B) > 0 {
		ok = r.readLease(&in)
	}
	if !ok || !in.Done() {
		return fmt.Errorf("reply is malformed: %w", sealfs.ErrInvalid)
	}
	return nil
}

// readLease reads the end of a reply that tells of leases, and reports whether it is one.
func (r *Reply) readLease(in *enc.Reader) bool {
	r.Lease, r.Stamp = Lease(in.U8()), in.Uvarint()
	for len(in.B) > 0 && !in.Err && len(r.Revokes) < RevokesMax {
		v := Revoke{Num: in.Uvarint(), Kind: RevokeKind(in.U8()), Ino: sealfs.Ino(in.Uvarint()), Name: string(in.VarBytes(sealfs.NameMax))}
		if v.Num == 0 || v.Kind == 0 || v.Kind >= numRevokeKinds || v.Ino == 0 || v.Ino > sealfs.InoMax || v.Name != "" != (v.Kind == RevokeName) && v.Kind != RevokeOwn {
			return false
		}
		r.Revokes = append(r.Revokes, v)
	}
	return r.Lease <= leaseAll && (r.Lease != 0 || r.Stamp != 0 || len(r.Revokes) > 0)
}

func appendAttr(b []byte, a *Attr) []byte {
	for _, v := range [...]uint64{
		uint64(a.Ino), uint64(a.Mode), uint64(a.Nlink), uint64(a.UID), uint64(a.GID), uint64(a.Rdev),
		a.Size, a.Blocks, zigzag(a.Atime), zigzag(a.Mtime), zigzag(a.Ctime), zigzag(a.Btime), a.Version, a.Gen, a.Bound,
	} {
		b = binary.AppendUvarint(b, v)
	}
	return b
}

// readAttr reads what appendAttr wrote and reports whether it is an attribute block.
func readAttr(in *enc.Reader, a *Attr) bool {
	var v [15]uint64
	for i := range v {
		v[i] = in.Uvarint()
	}
	for _, i := range [...]int{1, 2, 3, 4, 5} {
		if v[i] >= 1<<32 {
			return false
		}
	}
	*a = Attr{
		Ino: sealfs.Ino(v[0]), Mode: uint32(v[1]), Nlink: uint32(v[2]), UID: uint32(v[3]), GID: uint32(v[4]), Rdev: uint32(v[5]),
		Size: v[6], Blocks: v[7], Atime: unzigzag(v[8]), Mtime: unzigzag(v[9]), Ctime: unzigzag(v[10]), Btime: unzigzag(v[11]), Version: v[12],
		Gen: v[13], Bound: v[14],
	}
	return !in.Err && v[0] <= sealfs.InoMax && *a != (Attr{})
}
