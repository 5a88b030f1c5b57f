package op

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"sealfs"
)

// create is the request whose cost matters most.
var create = Request{
	Type: Create, Flags: Excl, Shard: 77, Epoch: 3, Volume: 1, Session: 1 << 40, Seq: 12345, Low: 12300,
	Dir: 4096*20 + 77, Name: "file-0123456789a", Mode: 0o100644, UID: 1000, GID: 1000, Time: 1763726215123456789,
}

// full is a request with every encoded field set; no type uses them all.
var full = Request{
	Type: Setxattr, Flags: flagsAll, Shard: 1, Shard2: 2, Epoch: 3, Volume: 4, Session: 5, Seq: 6, Low: 7,
	Ino: sealfs.InoMax, Dir: 9, Dir2: 10, Name: "a", Name2: "bc", Mode: 11, UID: 12, GID: 13, Rdev: 14,
	Valid: setAll, Size: sealfs.FileSizeMax, Atime: -1, Mtime: 1, Ctime: -1 << 63, Off: 1<<64 - 1, Len: 300,
	Lock: Lock{Type: WriteLock, Start: 1, End: 1<<63 - 1, Owner: 15, PID: 1<<32 - 1},
	Time: 16, Stamp: 17, Data: []byte("value"),
}

// everything is a reply with every encoded part set.
var everything = Reply{
	Code: sealfs.ErrNotExist,
	Attr: Attr{
		Ino: 1, Mode: 2, Nlink: 3, UID: 4, GID: 5, Rdev: 6, Size: 7, Blocks: 8,
		Atime: -1, Mtime: -2, Ctime: 1, Btime: 2, Version: 9,
	},
	Lock: Lock{Type: ReadLock, Start: 1, End: 2, Owner: 3, PID: 4},
	Off:  10, Eof: true, Held: 11,
	Entries: []Dirent{
		{Name: "x", Ino: 12, Cookie: 1 << 62, Type: 8},
		{Name: "dir", Ino: 13, Cookie: 3, Type: 4, Attr: Attr{Ino: 13, Mode: 0o40755, Nlink: 2}},
	},
	Space: Space{Bytes: 1 << 40, BytesFree: 2, Inodes: 3, InodesFree: 0},
	Lease: LeaseIno | LeaseWrite, Stamp: 7,
	Revokes: []Revoke{{Num: 6, Kind: RevokeName, Ino: 13, Name: "x"}, {Num: 7, Kind: RecallWrite, Ino: sealfs.InoMax}, {Num: 8, Kind: RevokeOwn, Ino: 2}, {Num: 9, Kind: RevokeOwn, Ino: 2, Name: "y"}},
}

// TestGoldenRequest holds the encoding to bytes: they stand in logs and on wires.
func TestGoldenRequest(t *testing.T) {
	for name, c := range map[string]struct {
		req  Request
		want string
	}{
		"create": {create, "02fbea0002014d0301808080808020b9608c60cd80051066696c652d30313233343536373839" +
			"61a48302e807e807aaccd2d7bce981fa30"},
		"write leaves its payload out": {
			Request{Type: Write, Ino: 4096 + 5, Off: 4096, Session: 9, Seq: 1, Data: []byte("payload")},
			"0b60014000090185208020"},
		"getattr": {Request{Type: Getattr, Ino: 300}, "1700010000ac02"},
		"sync":    {Request{Type: Sync}, "2000000000"},
		"full": {full, "0dffffff0fffff0701020304050607ffffffffffffff0f090a01610262630b0c0d0eff0fffffffffffffffff7f0102" +
			"ffffffffffffffffff01ffffffffffffffffff01ac020201ffffffffffffffff7f0fffffffff0f20110576616c7565"},
	} {
		t.Run(name, func(t *testing.T) {
			got := c.req.AppendTo(nil)
			if hex.EncodeToString(got) != c.want {
				t.Fatalf("encoding has changed:\n got %x\nwant %s", got, c.want)
			}
			var back Request
			if err := DecodeRequest(&back, got); err != nil {
				t.Fatal(err)
			}
			if c.req.Type == Write {
				back.Data = c.req.Data
			}
			if !reflect.DeepEqual(back, c.req) {
				t.Fatalf("decoded to\n%+v, want\n%+v", back, c.req)
			}
		})
	}
}

// TestGoldenReply is TestGoldenRequest's twin.
func TestGoldenReply(t *testing.T) {
	for name, c := range map[string]struct {
		rep  Reply
		want string
	}{
		"success":    {Reply{}, "000000"},
		"error":      {Reply{Code: sealfs.ErrStale}, "1b0000"},
		"data apart": {Reply{Eof: true, Data: []byte("beside")}, "000008"},
		"everything": {everything, "01007f" + "010203040506070801030204090000" + "0101020304" + "0a" + "0b" +
			"02" + "01780c000000000000004008" + "036469720d030000000000000084" + "0ded8301020000000000000000" + "00000000" +
			"808080808020" + "020300050706020d01780703ffffffffffffff0f00080402000904020179"},
	} {
		t.Run(name, func(t *testing.T) {
			got := c.rep.AppendTo(nil)
			if hex.EncodeToString(got) != c.want {
				t.Fatalf("encoding has changed:\n got %x\nwant %s", got, c.want)
			}
			back := Reply{Data: c.rep.Data}
			if err := DecodeReply(&back, got); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(back, c.rep) && !(len(back.Entries) == 0 && len(c.rep.Entries) == 0) {
				t.Fatalf("decoded to\n%+v, want\n%+v", back, c.rep)
			}
		})
	}
}

// TestGoldenNumbers freezes the numbers of types, flags and attribute bits.
func TestGoldenNumbers(t *testing.T) {
	want := strings.Fields(`makeroot create mknod mkdir symlink link unlink rmdir rename setattr write fallocate
		setxattr removexattr setlock dropowner dropsession reclaim tmpfile dropvolume lastchange
		lookup getattr readlink read readdir getxattr listxattr statfs testlock seek sync open release waitlock`)
	for i, name := range want {
		n := Type(i + 1)
		if name == "lastchange" {
			if n != lastChange {
				t.Errorf("the last change is %d, want %d", lastChange, n)
			}
			continue
		}
		if n.String() != name || !n.Valid() {
			t.Errorf("type %d is %q, want %q", n, n, name)
		}
		if n.Changes() != (n < lastChange) {
			t.Errorf("%v changes state: %v", n, n.Changes())
		}
	}
	if len(Types()) < len(want)-1 {
		t.Errorf("%d types are defined, %d were", len(Types()), len(want)-1)
	}
	for i, f := range []Flags{Excl, NoReplace, Exchange, Append, KillPriv, XCreate, XReplace, Plus, Flock, Held, OpenIt} {
		if f != 1<<i {
			t.Errorf("flag %d has become %#x", i, uint32(f))
		}
	}
	for i, v := range []uint32{SetMode, SetUID, SetGID, SetSize, SetAtime, SetMtime, SetAtimeNow, SetMtimeNow, SetCtime, SetNothing, SetAccess} {
		if v != 1<<i {
			t.Errorf("attribute bit %d has become %#x", i, v)
		}
	}
	if Unlock != 0 || ReadLock != 1 || WriteLock != 2 {
		t.Error("the kinds of locks have moved")
	}
	for _, bad := range []Type{0, lastChange, numTypes, 255} {
		if bad.Valid() || bad.String() != "unknown" {
			t.Errorf("type %d is valid as %q", uint8(bad), bad)
		}
	}
}

// TestRoundTrip sets random fields of random types.
func TestRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	types := Types()
	for range 20000 {
		r := full
		r.Type = types[rng.IntN(len(types))]
		// Each field is kept, zeroed or, where it is a number, made short.
		v := reflect.ValueOf(&r).Elem()
		for i := 1; i < v.NumField(); i++ {
			switch f := v.Field(i); rng.IntN(3) {
			case 0:
				f.SetZero()
			case 1:
				if f.CanUint() && f.Type() != reflect.TypeFor[Type]() {
					f.SetUint(rng.Uint64() & f.Uint())
				} else if f.CanInt() {
					f.SetInt(int64(rng.Uint64()) >> rng.IntN(64))
				}
			}
		}
		if r.Type == Write {
			r.Data = nil
		}
		b := r.AppendTo([]byte("kept"))
		if len(b) > EncodedMax || string(b[:4]) != "kept" {
			t.Fatalf("%+v: %d bytes", r, len(b))
		}
		var back Request
		if err := DecodeRequest(&back, b[4:]); err != nil || !reflect.DeepEqual(back, r) {
			t.Fatalf("decoded %+v\nto %+v: %v", r, back, err)
		}
	}
}

// TestEncodedMax encodes the largest request that the decoder accepts.
func TestEncodedMax(t *testing.T) {
	r := full
	r.Name, r.Name2 = strings.Repeat("n", sealfs.NameMax), strings.Repeat("m", sealfs.NameMax)
	r.Data = make([]byte, sealfs.XattrValueMax)
	r.Session, r.Seq, r.Low, r.Len = 1<<64-1, 1<<64-1, 1<<64-1, 1<<64-1
	r.Shard, r.Shard2, r.Epoch, r.Volume = 1<<16-1, 1<<16-1, 1<<32-1, 1<<32-1
	r.Mode, r.UID, r.GID, r.Rdev, r.Stamp = 1<<32-1, 1<<32-1, 1<<32-1, 1<<32-1, 1<<32-1
	r.Dir, r.Dir2 = sealfs.InoMax, sealfs.InoMax
	r.Lock = Lock{WriteLock, 1<<64 - 1, 1<<64 - 1, 1<<64 - 1, 1<<32 - 1}
	r.Atime, r.Mtime, r.Ctime, r.Time = -1<<63, -1<<63, -1<<63, -1<<63
	b := r.AppendTo(nil)
	if len(b) > EncodedMax {
		t.Fatalf("the largest request takes %d bytes, EncodedMax is %d", len(b), EncodedMax)
	}
	var back Request
	if err := DecodeRequest(&back, b); err != nil {
		t.Fatal(err)
	}
	r.Data = append(r.Data, 0)
	if err := DecodeRequest(&back, r.AppendTo(nil)); !errors.Is(err, sealfs.ErrInvalid) {
		t.Fatalf("a value beyond XattrValueMax: %v", err)
	}
	if err := DecodeRequest(&back, make([]byte, EncodedMax+1)); !errors.Is(err, sealfs.ErrInvalid) {
		t.Fatalf("an encoding beyond EncodedMax: %v", err)
	}
}

// TestRefuseRequest feeds bytes that AppendTo never writes.
func TestRefuseRequest(t *testing.T) {
	good := create.AppendTo(nil)
	for name, in := range map[string]string{
		"empty":                   "",
		"type 0":                  "0000000000",
		"type in the gap":         "1500000000",
		"unknown type":            "ff00000000",
		"unknown field":           "0200000010",
		"zero field present":      "170001000000",
		"long varint":             "170001000081" + "00",
		"field out of range":      "0202000000" + "808008", // shard 65536
		"inode beyond InoMax":     "1700010000" + "8080808080808010",
		"empty name":              "0200080000" + "00",
		"name longer than rest":   "0200080000" + "0561",
		"lock of unknown kind":    "0f00000001" + "0300000000",
		"zero lock":               "0f00000001" + "0000000000",
		"payload inside a write":  "0b00000008" + "0161",
		"bytes behind the end":    hex.EncodeToString(good) + "00",
		"cut before the end":      hex.EncodeToString(good[:len(good)-1]),
		"unknown flag":            "0201000000" + "808008",
		"name longer than 255":    "0200080000" + "8002" + strings.Repeat("61", 256),
		"varint longer than 64 b": "1700010000" + "ffffffffffffffffff02",
	} {
		b, err := hex.DecodeString(in)
		if err != nil {
			t.Fatal(err)
		}
		var r Request
		if err := DecodeRequest(&r, b); !errors.Is(err, sealfs.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRefuseReply is TestRefuseRequest's twin.
func TestRefuseReply(t *testing.T) {
	good := everything.AppendTo(nil)
	for name, in := range map[string]string{
		"empty":                "",
		"unknown part":         "000080",
		"zero attributes":      "000001" + strings.Repeat("00", 13),
		"mode beyond 32 bits":  "000001" + "01" + "8080808010" + strings.Repeat("00", 11),
		"zero offset":          "000004" + "00",
		"zero held":            "000010" + "00",
		"no entries":           "000020" + "00",
		"a billion entries":    "000020" + "80a8d6b907" + "000000000000000000000000",
		"entry without a name": "000020" + "01" + "00" + "0c" + "0000000000000040" + "08" + "0000",
		"entry of type 16":     "000020" + "01" + "0178" + "0c" + "0000000000000040" + "10",
		"zero space":           "000040" + "00000000",
		"bytes behind the end": hex.EncodeToString(good) + "00",
		"cut before the end":   hex.EncodeToString(good[:len(good)-1]),
	} {
		b, err := hex.DecodeString(in)
		if err != nil {
			t.Fatal(err)
		}
		var r Reply
		if err := DecodeReply(&r, b); !errors.Is(err, sealfs.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestReuse decodes replies into one struct: rooms are kept, contents are not.
func TestReuse(t *testing.T) {
	room := make([]byte, 3, 64)
	r := Reply{Data: room}
	if err := DecodeReply(&r, everything.AppendTo(nil)); err != nil {
		t.Fatal(err)
	}
	if len(r.Data) != 3 || len(r.Entries) != 2 {
		t.Fatalf("%d bytes of data, %d entries", len(r.Data), len(r.Entries))
	}
	if err := r.Err(); !errors.Is(err, sealfs.ErrNotExist) {
		t.Fatal(err)
	}
	if err := DecodeReply(&r, []byte{0, 0, 0}); err != nil || r.Err() != nil {
		t.Fatal(err, r.Err())
	}
	if len(r.Entries) != 0 || cap(r.Entries) < 2 || r.Attr != (Attr{}) || r.Eof {
		t.Fatalf("%+v is left of the reply before", r)
	}
	r.Reset()
	if len(r.Data) != 0 || cap(r.Data) != 64 {
		t.Fatalf("the room of data is %d bytes", cap(r.Data))
	}
}

// TestAllocations holds the hot path to its budget.
func TestAllocations(t *testing.T) {
	b := make([]byte, 0, 256)
	if n := testing.AllocsPerRun(100, func() { b = create.AppendTo(b[:0]) }); n != 0 {
		t.Errorf("encoding a request allocates %v times", n)
	}
	var r Request
	if n := testing.AllocsPerRun(100, func() { _ = DecodeRequest(&r, b) }); n > 1 {
		t.Errorf("decoding a request allocates %v times, once for the name is enough", n)
	}
	rep := Reply{Attr: everything.Attr}
	b = rep.AppendTo(b[:0])
	if n := testing.AllocsPerRun(100, func() { _ = DecodeReply(&rep, b) }); n != 0 {
		t.Errorf("decoding a reply allocates %v times", n)
	}
}

// FuzzDecodeRequest: whatever is accepted encodes to the same bytes again.
func FuzzDecodeRequest(f *testing.F) {
	f.Add(create.AppendTo(nil))
	f.Add(full.AppendTo(nil))
	f.Add([]byte{byte(Sync), 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var r Request
		if err := DecodeRequest(&r, b); err != nil {
			if !errors.Is(err, sealfs.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if again := r.AppendTo(nil); !bytes.Equal(again, b) {
			t.Fatalf("%x was accepted, but %+v encodes to %x", b, r, again)
		}
	})
}

// FuzzDecodeReply is FuzzDecodeRequest's twin.
func FuzzDecodeReply(f *testing.F) {
	f.Add(everything.AppendTo(nil))
	f.Add([]byte{0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var r Reply
		if err := DecodeReply(&r, b); err != nil {
			if !errors.Is(err, sealfs.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if again := r.AppendTo(nil); !bytes.Equal(again, b) {
			t.Fatalf("%x was accepted, but %+v encodes to %x", b, r, again)
		}
	})
}

func BenchmarkAppendRequest(b *testing.B) {
	buf := make([]byte, 0, 256)
	b.ReportAllocs()
	for b.Loop() {
		buf = create.AppendTo(buf[:0])
	}
}

func BenchmarkDecodeRequest(b *testing.B) {
	buf := create.AppendTo(nil)
	var r Request
	b.ReportAllocs()
	for b.Loop() {
		if err := DecodeRequest(&r, buf); err != nil {
			b.Fatal(err)
		}
	}
}
