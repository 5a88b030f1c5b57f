// Package wire carries op's requests and replies between processes: frames on
// a byte stream (a unix socket or TCP), a client end that is an op.Handler, and
// a server end that calls one. This file is the protocol: its comment is
// normative, and it alone turns frames into bytes and back.
//
// # Frames
//
// Everything that travels is a frame: a header of 48 bytes, a head and a
// payload. Numbers are little-endian, checksums are CRC-32C.
//
//	off  size  field
//	  0     4  magic "SEAW"
//	  4     1  version of the frame's layout, 1
//	  5     1  type
//	  6     2  flags; those not defined for the type must be zero
//	  8     8  id
//	 16     4  length of the head
//	 20     4  length of the payload
//	 24     4  checksum of the head
//	 28     4  checksum of the payload
//	 32    12  zero
//	 44     4  checksum of bytes [0, 44)
//
// The place of magic, version and header checksum never changes, so that a
// later layout is recognised as such and refused by name. Both lengths are
// bounded per type (see limits) and refused before anything is allocated. What
// breaks a rule of this comment ends the connection: a stream that was wrong
// once has no next frame that could be believed.
//
//	type     from    id     head                       payload
//	hello    both    0      hello                      –
//	goaway   both    0      code and sentence          –
//	request  client  ≠ 0    op.Request                 data of a Write
//	reply    server  of it  op.Reply, or with flag     Data of the reply
//	                        failed: code and sentence
//	cancel   client  of it  –                          –
//	ping     client  ≠ 0    –                          –
//	pong     server  of it  –                          –
//
// # Order
//
// The client sends its hello first, the server answers with its own; then
// requests may follow. Ids are the client's: an id may be used again when its
// request was answered. Every request is answered once, in any order, also one
// that was cancelled: a cancel only asks the server to stop waiting (WaitLock,
// Watch, Sync), it has no answer of its own, and one that comes too late means nothing.
//
// A request that the server could not decode or its handler could not answer
// gets a reply with flag failed. A code within an op.Reply is an answer.
//
// A ping is answered by a pong of the same id. A pong with id 0 was not asked
// for: a server that cannot read on for a while, since its memory for requests
// is used up, sends one every second to say that it lives.
//
// Either side may end the connection with a goaway, whose sentence is for
// people and whose code is a sealfs.Code. Nothing follows a goaway. What was
// not answered before it may have happened or not.
//
// # Hello
//
//	off  size  field
//	  0     2  lowest protocol version spoken
//	  2     2  highest protocol version spoken
//	  4     4  zero
//	  8     8  features supported, one bit each
//	 16     8  features required of the other side
//	 24    16  cluster id; zero from a client: whichever it is
//	 40  1+n   name and version of the program, at most 127 bytes
//
// The version spoken is the highest that both know. A hello from another
// cluster, one without a common version and one that requires a feature
// unknown here is refused with a goaway. Bytes behind the last field belong to later
// versions and are skipped.
//
//	protocol  since
//	       2  several servers; nothing was released before
//
//	feature  supported by a server    required by a client
//	  bit 0  other servers may call   the caller is a server of the same cluster (a
//	         it as peers              peer) and names that cluster
//	  bit 1  it makes the mode of     all: requests that make inodes say mode and
//	         new inodes               umask apart
//
// The server treats all requests of a peer's connection as those of a peer. Who
// may not be one is refused with a goaway.
package wire

import (
	"encoding/binary"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/op"
)

// protocolMin is the lowest protocol version that this program speaks.
const protocolMin = 2

// ProtocolVersion is the highest protocol version that this program speaks.
const ProtocolVersion = 2

// The feature bits of a hello, and all that this program understands.
const (
	featurePeer   = 1 << 0
	featureUmask  = 1 << 1
	featuresKnown = featurePeer | featureUmask
)

const (
	magic        = "SEAW"
	frameVersion = 1
	headerSize   = 48

	// payloadMax bounds a payload in bytes: the largest write, grown to whole blocks.
	payloadMax = sealfs.IOMax + 64<<10
	// replyHeadMax bounds an encoded reply in bytes: the largest is a directory
	// listing of IOMax, with room for the last entry and what stands beside.
	replyHeadMax = sealfs.IOMax + 64<<10
	// sentenceMax bounds the text of a goaway or failure in bytes, and programMax that of a hello.
	sentenceMax = 1000
	programMax  = 127
)

// frameType says what a frame is. Append only, never reorder.
type frameType uint8

const (
	_ frameType = iota
	typeHello
	typeGoaway
	typeRequest
	typeReply
	typeCancel
	typePing
	typePong
	numTypes
)

// flagFailed marks a reply whose head is a code and a sentence.
const flagFailed = 1 << 0

// limits bounds the two lengths of each type and names the flags it may have.
// A goaway leaves some room for later versions to say more.
var limits = [numTypes]struct {
	name          string
	head, payload uint32
	flags         uint16
}{
	typeHello:   {"hello", 1024, 0, 0},
	typeGoaway:  {"goaway", 4096, 0, 0},
	typeRequest: {"request", op.EncodedMax, payloadMax, 0},
	typeReply:   {"reply", replyHeadMax, payloadMax, flagFailed},
	typeCancel:  {"cancel", 0, 0, 0},
	typePing:    {"ping", 0, 0, 0},
	typePong:    {"pong", 0, 0, 0},
}

func (t frameType) String() string {
	if t > 0 && t < numTypes {
		return limits[t].name
	}
	return fmt.Sprintf("frame type %d", uint8(t))
}

// header is the decoded header of a frame.
type header struct {
	typ        frameType
	flags      uint16
	id         uint64
	headLen    uint32
	payloadLen uint32
	headCRC    uint32
	payloadCRC uint32
}

// put writes h into the first headerSize bytes of b.
func (h *header) put(b []byte) {
	b = b[:headerSize]
	copy(b, magic)
	b[4], b[5] = frameVersion, byte(h.typ)
	binary.LittleEndian.PutUint16(b[6:], h.flags)
	binary.LittleEndian.PutUint64(b[8:], h.id)
	binary.LittleEndian.PutUint32(b[16:], h.headLen)
	binary.LittleEndian.PutUint32(b[20:], h.payloadLen)
	binary.LittleEndian.PutUint32(b[24:], h.headCRC)
	binary.LittleEndian.PutUint32(b[28:], h.payloadCRC)
	clear(b[32:44])
	binary.LittleEndian.PutUint32(b[44:], enc.CRC(0, b[:44]))
}

// parseHeader reads the header in the first headerSize bytes of b. It returns a
// *sealfs.Corruption for damage, ErrVersion for a layout of a later version, and
// ErrInvalid for what no version allows.
func parseHeader(b []byte) (header, error) {
	b = b[:headerSize]
	if string(b[:4]) != magic {
		return header{}, damaged("frame magic", binary.LittleEndian.Uint32([]byte(magic)), binary.LittleEndian.Uint32(b))
	}
	if got, want := enc.CRC(0, b[:44]), binary.LittleEndian.Uint32(b[44:]); got != want {
		return header{}, damaged("header checksum", want, got)
	}
	if b[4] != frameVersion {
		return header{}, fmt.Errorf("frame layout %d is not known, only %d: %w", b[4], frameVersion, sealfs.ErrVersion)
	}
	h := header{
		typ:        frameType(b[5]),
		flags:      binary.LittleEndian.Uint16(b[6:]),
		id:         binary.LittleEndian.Uint64(b[8:]),
		headLen:    binary.LittleEndian.Uint32(b[16:]),
		payloadLen: binary.LittleEndian.Uint32(b[20:]),
		headCRC:    binary.LittleEndian.Uint32(b[24:]),
		payloadCRC: binary.LittleEndian.Uint32(b[28:]),
	}
	if h.typ == 0 || h.typ >= numTypes {
		return header{}, fmt.Errorf("%v is not known: %w", h.typ, sealfs.ErrInvalid)
	}
	lim := &limits[h.typ]
	if h.headLen > lim.head || h.payloadLen > lim.payload {
		return header{}, fmt.Errorf("%v frame of %d+%d bytes is longer than %d+%d: %w",
			h.typ, h.headLen, h.payloadLen, lim.head, lim.payload, sealfs.ErrInvalid)
	}
	if h.flags&^lim.flags != 0 || binary.LittleEndian.Uint64(b[32:]) != 0 || binary.LittleEndian.Uint32(b[40:]) != 0 {
		return header{}, fmt.Errorf("%v frame has flags %#x or reserved bytes that are not known: %w", h.typ, h.flags, sealfs.ErrInvalid)
	}
	return h, nil
}

// damaged describes bytes of a frame that fail verification.
func damaged(what string, want, got uint32) error {
	return &sealfs.Corruption{Where: "frame", Off: -1, What: what, Want: uint64(want), Got: uint64(got)}
}

// An appender is the head of a frame: op.Request, op.Reply and the types below.
type appender interface{ AppendTo(b []byte) []byte }

// appendFrame appends header and head of a frame to b; the payload, whose
// checksum is in h, is to follow. It sets the lengths and checksum of the head. A
// head that is longer than its type allows leaves b as it was and is ErrInvalid.
func appendFrame(b []byte, h *header, head appender) ([]byte, error) {
	at := len(b)
	b = append(b, make([]byte, headerSize)...)
	if head != nil {
		b = head.AppendTo(b)
	}
	text := b[at+headerSize:]
	if len(text) > int(limits[h.typ].head) {
		return b[:at], fmt.Errorf("%v of %d bytes is longer than %d: %w", h.typ, len(text), limits[h.typ].head, sealfs.ErrInvalid)
	}
	h.headLen, h.headCRC = uint32(len(text)), enc.CRC(0, text)
	h.put(b[at:])
	return b, nil
}

// hello opens a connection in each direction.
type hello struct {
	min, max            uint16
	supported, required uint64
	cluster             sealfs.UUID
	program             string
}

// AppendTo appends the encoding of h; a long program text is cut.
func (h *hello) AppendTo(b []byte) []byte {
	b = enc.AppendU16(b, h.min)
	b = enc.AppendU16(b, h.max)
	b = enc.AppendU32(b, 0)
	b = enc.AppendU64(b, h.supported)
	b = enc.AppendU64(b, h.required)
	b = append(b, h.cluster[:]...)
	return enc.AppendVarBytes(b, h.program[:min(len(h.program), programMax)])
}

// parseHello reads what AppendTo wrote, or a later version's longer form.
func parseHello(b []byte) (hello, error) {
	in := enc.Reader{B: b}
	var h hello
	h.min, h.max = in.U16(), in.U16()
	zero := in.U32()
	h.supported, h.required = in.U64(), in.U64()
	copy(h.cluster[:], in.Bytes(len(h.cluster)))
	h.program = printable(string(in.VarBytes(programMax)))
	if in.Err || h.min == 0 || h.min > h.max || zero != 0 || h.required&^h.supported != 0 {
		return hello{}, fmt.Errorf("hello is malformed: %w", sealfs.ErrInvalid)
	}
	return h, nil
}

// agree decides, at either side, whether ours and theirs may talk, and in which
// protocol version. The error's sentence is what the goaway says.
func agree(ours, theirs *hello) (version uint16, err error) {
	if ours.cluster != theirs.cluster && !ours.cluster.IsZero() && !theirs.cluster.IsZero() {
		return 0, fmt.Errorf("this is cluster %v, not %v: %w", ours.cluster, theirs.cluster, sealfs.ErrInvalid)
	}
	version = min(ours.max, theirs.max)
	if version < ours.min || version < theirs.min {
		return 0, fmt.Errorf("this program speaks protocol %d to %d, yours (%q) speaks %d to %d: %w",
			ours.min, ours.max, theirs.program, theirs.min, theirs.max, sealfs.ErrVersion)
	}
	if unknown := theirs.required &^ ours.supported; unknown != 0 {
		return 0, fmt.Errorf("your program (%q) requires features %#x, which this one does not know: %w",
			theirs.program, unknown, sealfs.ErrVersion)
	}
	return version, nil
}

// refusal is the head of a goaway and of a failed reply: two bytes of code, then
// the sentence with its length in front. At the side that received it, it is
// the error.
type refusal struct {
	from string // address of the sender; not encoded
	code sealfs.Code
	text string
}

// AppendTo appends the encoding of r; a long sentence is cut.
func (r *refusal) AppendTo(b []byte) []byte {
	b = enc.AppendU16(b, uint16(r.code))
	return enc.AppendVarBytes(b, r.text[:min(len(r.text), sentenceMax)])
}

// parseRefusal reads what AppendTo wrote, or a later version's longer form.
func parseRefusal(from string, b []byte) (*refusal, error) {
	in := enc.Reader{B: b}
	r := &refusal{from: from, code: sealfs.Code(in.U16()), text: printable(string(in.VarBytes(sentenceMax)))}
	if in.Err || r.code == 0 {
		return nil, fmt.Errorf("code and sentence are malformed: %w", sealfs.ErrInvalid)
	}
	return r, nil
}

// Error names the sender and quotes its sentence.
func (r *refusal) Error() string { return fmt.Sprintf("server at %s: %s", r.from, r.text) }

// Unwrap returns the code.
func (r *refusal) Unwrap() error { return r.code }

// printable makes text from a peer fit for a terminal or a log.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}
