package layout

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sealfs"
	"sealfs/internal/enc"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var testStore = sealfs.UUID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}

func testSuper() *Superblock {
	return &Superblock{
		Store: testStore, Cluster: sealfs.UUID{0xc1}, Update: 7, Incarnation: 3, SegmentBytes: 32 << 20, Segments: 128,
		FirstSlot: 5, Tail: sealfs.MakeLSN(9, 4096), FirstPrev: sealfs.MakeLSN(9, 8192),
		DeviceBytes: DataStart + 128*32<<20, Created: 1_700_000_000_000_000_000, Label: "grüße",
	}
}

func testHeader() *SegmentHeader {
	return &SegmentHeader{Incarnation: 3, Seq: 17, Kind: Hot, Slot: 6, Chain: 0xdeadbeef, Prev: sealfs.MakeLSN(16, 12345*64), Created: 42}
}

func testRecord() (r Record, seed uint32, b, op, payload, redo []byte) {
	op, payload, redo = []byte("operation"), []byte("the payload"), []byte("redo bytes")
	r = Record{
		LSN: sealfs.MakeLSN(17, 4096), Prev: 0x01020304, Kind: KindOp, OpLen: uint32(len(op)), PayloadLen: uint32(len(payload)),
		RedoLen: uint32(len(redo)), PayloadCRC: enc.CRC(0, payload), Ino: 4711, Offset: 8192,
	}
	seed = ChainSeed(testStore, 3)
	b = bytes.Repeat([]byte{0xee}, int(r.Bytes())) // what stood in the ring before
	copy(b[RecordHeaderBytes+len(op):], payload)
	r.Put(b, seed, op, redo)
	return r, seed, b, op, payload, redo
}

// golden compares bytes with a frozen hex dump. A difference is a change of
// the format: it needs a new version, not a new file.
func golden(t *testing.T, name string, b []byte) {
	t.Helper()
	path := filepath.Join("testdata", name+".hex")
	got := hex.Dump(bytes.TrimRight(b, "\x00"))
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: the bytes differ from the frozen format\n%s", name, got)
	}
}

func TestGoldenBytes(t *testing.T) {
	golden(t, "superblock", testSuper().Encode())
	b := make([]byte, BlockSize)
	testHeader().Put(b, testStore)
	golden(t, "segment", b)
	_, _, rec, _, _, _ := testRecord()
	golden(t, "record", rec)
}

func TestSuperblockRoundTrip(t *testing.T) {
	want := testSuper()
	got, err := DecodeSuperblock(want.Encode(), "dev", 0)
	if err != nil {
		t.Fatal(err)
	}
	if *got != *want {
		t.Errorf("decoded %+v, want %+v", got, want)
	}
}

func TestSegmentHeaderRoundTrip(t *testing.T) {
	b := make([]byte, BlockSize)
	want := testHeader()
	want.Put(b, testStore)
	got, err := DecodeSegmentHeader(b, testStore, "dev", 6, 0)
	if err != nil {
		t.Fatal(err)
	}
	if *got != *want {
		t.Errorf("decoded %+v, want %+v", got, want)
	}
	if _, err := DecodeSegmentHeader(b, testStore, "dev", 7, 0); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("the header of slot 6 was accepted in slot 7: %v", err)
	}
	if _, err := DecodeSegmentHeader(b, sealfs.UUID{9}, "dev", 6, 0); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("another store's header was accepted: %v", err)
	}
}

func TestRecordRoundTrip(t *testing.T) {
	want, seed, b, op, payload, redo := testRecord()
	got, crc, op2, payload2, redo2, err := DecodeRecord(b, seed, want.LSN, want.Prev)
	if err != nil {
		t.Fatal(err)
	}
	if got != want || crc == 0 || !bytes.Equal(op, op2) || !bytes.Equal(payload, payload2) || !bytes.Equal(redo, redo2) || !got.PayloadOK(payload2) {
		t.Errorf("decoded %+v %q %q %q", got, op2, payload2, redo2)
	}
	if len(b)%RecordAlign != 0 || !zero(b[RecordHeaderBytes+len(op)+len(payload)+len(redo):]) {
		t.Errorf("the padding of a record of %d bytes is not zero", len(b))
	}
	for name, err := range map[string]error{
		"another position":    decodeErr(b, seed, want.LSN+64, want.Prev),
		"another predecessor": decodeErr(b, seed, want.LSN, want.Prev+1),
		"another incarnation": decodeErr(b, ChainSeed(testStore, 4), want.LSN, want.Prev),
		"another store":       decodeErr(b, ChainSeed(sealfs.UUID{}, 3), want.LSN, want.Prev),
		"a cut":               decodeErr(b[:len(b)-1], seed, want.LSN, want.Prev),
	} {
		if err != ErrNoRecord {
			t.Errorf("%s: %v, want ErrNoRecord", name, err)
		}
	}
}

func decodeErr(b []byte, seed uint32, at sealfs.LSN, prev uint32) error {
	_, _, _, _, _, err := DecodeRecord(b, seed, at, prev)
	return err
}

// TestBitFlips: every single flipped bit is noticed.
func TestBitFlips(t *testing.T) {
	flips := func(name string, b []byte, n int, ok func([]byte) bool) {
		for i := range n * 8 {
			b[i/8] ^= 1 << (i % 8)
			if ok(b) {
				t.Errorf("%s: bit %d of byte %d flipped, and accepted", name, i%8, i/8)
			}
			b[i/8] ^= 1 << (i % 8)
		}
	}
	flips("superblock", testSuper().Encode(), 300, func(b []byte) bool {
		_, err := DecodeSuperblock(b, "dev", 0)
		return err == nil
	})
	h := make([]byte, BlockSize)
	testHeader().Put(h, testStore)
	flips("segment", h, 128, func(b []byte) bool {
		_, err := DecodeSegmentHeader(b, testStore, "dev", 6, 0)
		return err == nil
	})
	want, seed, b, op, payload, redo := testRecord()
	flips("record", b, RecordHeaderBytes+len(op)+len(payload)+len(redo), func(b []byte) bool {
		r, _, _, p, _, err := DecodeRecord(b, seed, want.LSN, want.Prev)
		return err == nil && r.PayloadOK(p)
	})
}

// TestVersionRefused: what a newer program wrote is refused by name.
func TestVersionRefused(t *testing.T) {
	seal := func(b []byte) []byte { putU32(b[12:], superCRC(b)); return b }
	newer := testSuper().Encode()
	newer[8] = 2
	feature := testSuper()
	feature.Incompat = 1 << 40
	for name, b := range map[string][]byte{"format 2": seal(newer), "features 0x10000000000": feature.Encode()} {
		_, err := DecodeSuperblock(b, "/dev/x", 0)
		if !errors.Is(err, sealfs.ErrVersion) || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "/dev/x") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzSuperblock(f *testing.F) {
	f.Add(testSuper().Encode())
	f.Add([]byte(Magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= BlockSize {
			putU32(b[12:], superCRC(b)) // reach what lies behind the checksum
		}
		sb, err := DecodeSuperblock(b, "dev", 0)
		if err == nil && !bytes.Equal(sb.Encode(), b[:BlockSize]) {
			t.Errorf("decoded and encoded again, the superblock differs")
		}
	})
}

func FuzzSegmentHeader(f *testing.F) {
	b := make([]byte, BlockSize)
	testHeader().Put(b, testStore)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= BlockSize {
			putU32(b[4:], enc.CRC(enc.CRC(0, testStore[:]), b[8:BlockSize]))
		}
		h, err := DecodeSegmentHeader(b, testStore, "dev", 6, 0)
		if err == nil {
			again := make([]byte, BlockSize)
			h.Put(again, testStore)
			if !bytes.Equal(again, b[:BlockSize]) {
				t.Errorf("decoded and encoded again, the header differs")
			}
		}
	})
}

func FuzzRecord(f *testing.F) {
	_, _, b, _, _, _ := testRecord()
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		seed := ChainSeed(testStore, 3)
		r, _, op, payload, redo, err := DecodeRecordLoose(b, seed, sealfs.MakeLSN(17, 4096))
		if err != nil {
			return
		}
		again := bytes.Clone(b[:r.Bytes()])
		copy(again[RecordHeaderBytes+len(op):], payload)
		r.Put(again, seed, op, redo)
		if n := RecordHeaderBytes + len(op) + len(payload) + len(redo); !bytes.Equal(again[:n], b[:n]) {
			t.Errorf("decoded and encoded again, the record differs")
		}
	})
}
