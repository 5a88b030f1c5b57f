package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/op"
)

// stream is a connection from which fixed bytes are read.
type stream struct {
	net.Conn
	r io.Reader
}

func (s *stream) Read(p []byte) (int, error)      { return s.r.Read(p) }
func (s *stream) SetReadDeadline(time.Time) error { return nil }

func newInbox(r io.Reader) *inbox {
	return &inbox{nc: &stream{r: r}, n: new(counters), buf: make([]byte, inboxSize)}
}

// frame returns the bytes of a whole frame.
func frame(t testing.TB, h header, head appender, payload []byte) []byte {
	t.Helper()
	h.payloadLen, h.payloadCRC = uint32(len(payload)), enc.CRC(0, payload)
	b, err := appendFrame(nil, &h, head)
	if err != nil {
		t.Fatal(err)
	}
	return append(b, payload...)
}

// rawHead is a head of any bytes.
type rawHead []byte

func (r rawHead) AppendTo(b []byte) []byte { return append(b, r...) }

var testHello = hello{2, 2, 0, 0, testCluster, "golden"}

// TestGolden holds every frame to its bytes.
func TestGolden(t *testing.T) {
	for name, c := range map[string]struct {
		got  []byte
		want string
	}{
		"hello": {frame(t, header{typ: typeHello}, &testHello, nil), `
			53454157 01 01 0000 0000000000000000 2f000000 00000000 89e43715 00000000 000000000000000000000000 0353281e
			0200 0200 00000000 0000000000000000 0000000000000000 5ea100000000000000000000000000f5 06 676f6c64656e`},
		"goaway": {frame(t, header{typ: typeGoaway}, &refusal{code: sealfs.ErrBusy, text: "full"}, nil), `
			53454157 01 02 0000 0000000000000000 07000000 00000000 1f2c9870 00000000 000000000000000000000000 c911dbab
			1700 04 66756c6c`},
		"request": {frame(t, header{typ: typeRequest, id: 7}, &op.Request{Type: op.Write, Ino: 5000, Off: 1}, []byte("data")), `
			53454157 01 03 0000 0700000000000000 08000000 04000000 4cd0cd89 d17dd8ae 000000000000000000000000 79700f58
			0b 00014000 8827 01 64617461`},
		"reply": {frame(t, header{typ: typeReply, id: 7}, &op.Reply{Eof: true}, []byte("data")), `
			53454157 01 04 0000 0700000000000000 03000000 04000000 b5fbbdea d17dd8ae 000000000000000000000000 b13d6352
			0000 08 64617461`},
		"failed reply": {frame(t, header{typ: typeReply, id: 7, flags: flagFailed}, &refusal{code: sealfs.ErrStale, text: "old"}, nil), `
			53454157 01 04 0100 0700000000000000 06000000 00000000 36b4603e 00000000 000000000000000000000000 97bcfa10
			1b00 03 6f6c64`},
		"cancel": {frame(t, header{typ: typeCancel, id: 7}, nil, nil), `
			53454157 01 05 0000 0700000000000000 00000000 00000000 00000000 00000000 000000000000000000000000 a3c4c508`},
		"ping": {frame(t, header{typ: typePing, id: 8}, nil, nil), `
			53454157 01 06 0000 0800000000000000 00000000 00000000 00000000 00000000 000000000000000000000000 044e2969`},
		"pong": {frame(t, header{typ: typePong, id: 8}, nil, nil), `
			53454157 01 07 0000 0800000000000000 00000000 00000000 00000000 00000000 000000000000000000000000 7a4fd749`},
	} {
		want := strings.Join(strings.Fields(c.want), "")
		if got := hex.EncodeToString(c.got); got != want {
			t.Errorf("%s has changed:\n got %s\nwant %s", name, got, want)
		}
	}
}

// TestFrameBitFlips flips every bit of a frame: each must be noticed.
func TestFrameBitFlips(t *testing.T) {
	good := frame(t, header{typ: typeRequest, id: 7}, &op.Request{Type: op.Write, Ino: 5000}, []byte("some data"))
	read := func(b []byte) error {
		in := newInbox(bytes.NewReader(b))
		h, _, err := in.next()
		if err == nil {
			err = in.payload(&h, make([]byte, h.payloadLen))
		}
		return err
	}
	if err := read(good); err != nil {
		t.Fatal(err)
	}
	for i := range 8 * len(good) {
		bad := bytes.Clone(good)
		bad[i/8] ^= 1 << (i % 8)
		if err := read(bad); !errors.Is(err, sealfs.ErrCorrupt) {
			t.Errorf("bit %d of byte %d flipped: %v", i%8, i/8, err)
		}
	}
	for n := range good {
		if err := read(good[:n]); !errors.Is(err, io.ErrUnexpectedEOF) && !(n == 0 && err == io.EOF) {
			t.Errorf("cut after %d bytes: %v", n, err)
		}
	}
}

// TestFrameLimits declares lengths at the limits and beyond them.
func TestFrameLimits(t *testing.T) {
	parse := func(h header, change func(b []byte)) error {
		b := make([]byte, headerSize)
		h.put(b)
		if change != nil {
			change(b)
			copy(b[44:], enc.AppendU32(nil, enc.CRC(0, b[:44])))
		}
		_, err := parseHeader(b)
		return err
	}
	for typ := frameType(1); typ < numTypes; typ++ {
		l := limits[typ]
		if err := parse(header{typ: typ, headLen: l.head, payloadLen: l.payload, flags: l.flags}, nil); err != nil {
			t.Errorf("%v at its limits: %v", typ, err)
		}
		for what, h := range map[string]header{
			"head":    {typ: typ, headLen: l.head + 1},
			"payload": {typ: typ, payloadLen: l.payload + 1},
			"huge":    {typ: typ, headLen: 1<<32 - 1, payloadLen: 1<<32 - 1},
			"flag":    {typ: typ, flags: 1 << 15},
		} {
			if err := parse(h, nil); !errors.Is(err, sealfs.ErrInvalid) {
				t.Errorf("%v with its %s beyond the limit: %v", typ, what, err)
			}
		}
	}
	for _, typ := range []frameType{0, numTypes, 255} {
		if err := parse(header{typ: typ}, nil); !errors.Is(err, sealfs.ErrInvalid) {
			t.Errorf("%v: %v", typ, err)
		}
	}
	for i := 32; i < 44; i++ {
		if err := parse(header{typ: typePing}, func(b []byte) { b[i] = 1 }); !errors.Is(err, sealfs.ErrInvalid) {
			t.Errorf("reserved byte %d is set: %v", i, err)
		}
	}
	err := parse(header{typ: typePing}, func(b []byte) { b[4] = 2 })
	if !errors.Is(err, sealfs.ErrVersion) || !strings.Contains(err.Error(), "layout 2") {
		t.Errorf("a later layout is refused as: %v", err)
	}
}

// TestNoAllocationBeforeCheck: lengths that lie cost no memory.
func TestNoAllocationBeforeCheck(t *testing.T) {
	var input []byte
	for range 1000 {
		b := make([]byte, headerSize)
		(&header{typ: typeRequest, headLen: 1<<32 - 1, payloadLen: 1<<32 - 1}).put(b)
		input = append(input, b...)
	}
	in := newInbox(bytes.NewReader(input))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 1000 {
		if _, _, err := in.next(); err == nil {
			t.Fatal("a head of 4 GiB was accepted")
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 4<<20 {
		t.Fatalf("1000 refusals took %d bytes", n)
	}
}

// TestAppendFrameTooLong: a head beyond its limit leaves the buffer as it was.
func TestAppendFrameTooLong(t *testing.T) {
	b, err := appendFrame([]byte("before"), &header{typ: typeCancel}, rawHead("x"))
	if !errors.Is(err, sealfs.ErrInvalid) || string(b) != "before" {
		t.Fatalf("%q, %v", b, err)
	}
}

// TestVersionAgreement decides who may talk to whom.
func TestVersionAgreement(t *testing.T) {
	other := sealfs.UUID{1}
	us := hello{2, 4, 0b011, 0, testCluster, "us"}
	for name, c := range map[string]struct {
		theirs hello
		want   uint16
		code   sealfs.Code
	}{
		"same":               {hello{2, 4, 0, 0, testCluster, ""}, 4, 0},
		"older":              {hello{1, 3, 0, 0, testCluster, ""}, 3, 0},
		"newer":              {hello{4, 9, 0, 0, testCluster, ""}, 4, 0},
		"any cluster":        {hello{2, 4, 0, 0, sealfs.UUID{}, ""}, 4, 0},
		"too old":            {hello{1, 1, 0, 0, testCluster, ""}, 0, sealfs.ErrVersion},
		"too new":            {hello{5, 6, 0, 0, testCluster, ""}, 0, sealfs.ErrVersion},
		"other cluster":      {hello{2, 4, 0, 0, other, ""}, 0, sealfs.ErrInvalid},
		"known feature":      {hello{2, 4, 0b111, 0b010, testCluster, ""}, 4, 0},
		"supported features": {hello{2, 4, 1 << 63, 0, testCluster, ""}, 4, 0},
		"unknown feature":    {hello{2, 4, 0b111, 0b100, testCluster, ""}, 0, sealfs.ErrVersion},
	} {
		got, err := agree(&us, &c.theirs)
		if got != c.want && err == nil || c.code == 0 && err != nil || c.code != 0 && !errors.Is(err, c.code) {
			t.Errorf("%s: version %d, %v", name, got, err)
		}
	}
	if _, err := agree(&us, &hello{2, 4, 4, 4, testCluster, "x"}); !strings.Contains(err.Error(), "0x4") {
		t.Errorf("the unknown feature is not named: %v", err)
	}
	if _, err := agree(&us, &hello{2, 4, 0, 0, other, "x"}); !strings.Contains(err.Error(), other.String()) {
		t.Errorf("the other cluster is not named: %v", err)
	}
}

// TestHelloForms reads hellos of later versions and refuses malformed ones.
func TestHelloForms(t *testing.T) {
	b := testHello.AppendTo(nil)
	if h, err := parseHello(append(bytes.Clone(b), "from the future"...)); err != nil || h != testHello {
		t.Errorf("%+v, %v", h, err)
	}
	for n := range b {
		if _, err := parseHello(b[:n]); !errors.Is(err, sealfs.ErrInvalid) {
			t.Errorf("cut after %d bytes: %v", n, err)
		}
	}
	for name, h := range map[string]hello{
		"protocol 0":                 {0, 1, 0, 0, testCluster, ""},
		"turned range":               {2, 1, 0, 0, testCluster, ""},
		"required but not supported": {1, 1, 1, 3, testCluster, ""},
	} {
		if _, err := parseHello(h.AppendTo(nil)); !errors.Is(err, sealfs.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	long := testHello
	long.program = strings.Repeat("p", 1000)
	if h, err := parseHello(long.AppendTo(nil)); err != nil || len(h.program) != programMax {
		t.Errorf("a long program text: %d bytes, %v", len(h.program), err)
	}
	r, err := parseRefusal("here", (&refusal{code: sealfs.ErrBusy, text: "a\x1b[2Jb" + strings.Repeat("x", 2000)}).AppendTo(nil))
	if err != nil || len(r.text) != sentenceMax || strings.ContainsRune(r.text, 0x1b) || !errors.Is(r, sealfs.ErrBusy) {
		t.Errorf("%v, %v", r, err)
	}
}

// TestBufferAlignment holds payload buffers to page alignment and size.
func TestBufferAlignment(t *testing.T) {
	for _, n := range []int{0, 1, 4096, 4097, 65536, sealfs.IOMax, payloadMax, replyHeadMax, op.EncodedMax} {
		var held []*buffer
		for range 8 {
			p := getBuffer(n)
			held = append(held, p)
			if len(p.b) < n {
				t.Errorf("a buffer for %d bytes has %d", n, len(p.b))
			}
			if a := addressOf(p.b); a%sealfs.BlockSize != 0 {
				t.Errorf("a buffer for %d bytes lies at %#x", n, a)
			}
		}
		for _, p := range held {
			p.free()
		}
	}
}

// FuzzFrames reads any bytes as frames; what is accepted encodes to the same bytes again.
func FuzzFrames(f *testing.F) {
	f.Add(frame(f, header{typ: typeHello}, &testHello, nil))
	f.Add(append(frame(f, header{typ: typePing, id: 1}, nil, nil), frame(f, header{typ: typeRequest, id: 7}, &op.Request{Type: op.Write, Ino: 5}, []byte("data"))...))
	f.Fuzz(func(t *testing.T, b []byte) {
		in := newInbox(bytes.NewReader(b))
		var again []byte
		for {
			h, head, err := in.next()
			if err != nil {
				break
			}
			head = bytes.Clone(head)
			payload := make([]byte, h.payloadLen)
			if err := in.payload(&h, payload); err != nil {
				break
			}
			again = append(again, frame(t, h, rawHead(head), payload)...)
			if !bytes.HasPrefix(b, again) {
				t.Fatalf("%x was read from %x", again, b)
			}
		}
	})
}

// FuzzHeader gives the parser headers with a valid checksum.
func FuzzHeader(f *testing.F) {
	f.Add(frame(f, header{typ: typeReply, id: 3}, &op.Reply{}, nil)[:44])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 44 {
			return
		}
		b = enc.AppendU32(bytes.Clone(b[:44]), enc.CRC(0, b[:44]))
		h, err := parseHeader(b)
		if err != nil {
			return
		}
		if h.headLen > replyHeadMax || h.payloadLen > payloadMax {
			t.Fatalf("%+v", h)
		}
		again := make([]byte, headerSize)
		if h.put(again); !bytes.Equal(again, b) {
			t.Fatalf("%x was accepted and encodes to %x", b, again)
		}
	})
}

// FuzzHello: whatever is accepted encodes to the same bytes, but for a tail
// and for what is not fit to print.
func FuzzHello(f *testing.F) {
	f.Add(testHello.AppendTo(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHello(b)
		if err != nil {
			return
		}
		if again := h.AppendTo(nil); !bytes.HasPrefix(b, again[:40]) {
			t.Fatalf("%x was accepted and encodes to %x", b, again)
		}
		_, _ = agree(&testHello, &h)
	})
}

// FuzzRefusal is FuzzHello's twin for goaways and failed replies.
func FuzzRefusal(f *testing.F) {
	f.Add((&refusal{code: sealfs.ErrBusy, text: "full"}).AppendTo(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRefusal("here", b)
		if err != nil {
			return
		}
		if again := r.AppendTo(nil); !bytes.HasPrefix(b, again[:2]) {
			t.Fatalf("%x was accepted and encodes to %x", b, again)
		}
	})
}
