package layout

import (
	"bytes"
	"errors"
	"testing"

	"sealfs"
	"sealfs/internal/enc"
)

func testFarRoot() *FarRoot {
	return &FarRoot{
		Generation: 9, Start: sealfs.MakeLSN(17, 4096), Applied: sealfs.MakeLSN(18, 8192), StartSlot: 6, Chain: 0xdeadbeef, Incarnation: 3,
		Part: 1, Parts: 2, PrevSlot: 7, Prev: sealfs.MakeLSN(19, 4096), RegionVersion: 1, Refs: 2, RegionIncompat: 4, TableBytes: 4096, Pages: 70000,
	}
}

// farRecord is a far record, which is whole blocks.
func farRecord(kind Kind, op, payload []byte) []byte {
	rec := Record{LSN: sealfs.MakeLSN(20, 4096), Kind: kind, OpLen: uint32(len(op)), PayloadLen: uint32(len(payload)), PayloadCRC: enc.CRC(0, payload)}
	b := make([]byte, rec.Bytes())
	copy(b[BlockSize:], payload)
	rec.Put(b, ChainSeed(testStore, 3), op, nil)
	return b
}

func TestGoldenFar(t *testing.T) {
	sb := testSuper()
	sb.Incompat, sb.FarRoot, sb.FarStart, sb.FarSlot = FeatureFar, sealfs.MakeLSN(20, 4096), sealfs.MakeLSN(17, 4096), 8
	golden(t, "superblock-far", sb.Encode())
	page := bytes.Repeat([]byte{0xa5}, BlockSize)
	ref := MakeFarRef(sealfs.MakeLSN(20, 8192), page)
	refs := make([]byte, BlockSize)
	ref.Put(refs)
	golden(t, "far-page", farRecord(KindFarPage, AppendFarList(nil, []uint64{2, 4711}), append(page, refs...)))
	golden(t, "far-root", farRecord(KindFarRoot, AppendFarRoot(nil, testFarRoot()), refs))
	if got := GetFarRef(refs); got != ref || !got.Is(page) || got.Is(refs) || !(FarRef{}).Is(make([]byte, BlockSize)) || (FarRef{}).Is(page) {
		t.Errorf("reference %+v", got)
	}
}

func TestFarRoundTrip(t *testing.T) {
	root, ok := ReadFarRoot(AppendFarRoot(nil, testFarRoot()))
	if !ok || root != *testFarRoot() {
		t.Errorf("%+v, %v", root, ok)
	}
	for n := range FarListMax + 1 {
		nos := make([]uint64, n)
		for i := range nos {
			nos[i] = uint64(i) << 20
		}
		op := AppendFarList([]byte("x"), nos)[1:]
		got, ok := ReadFarList(op)
		if !ok || len(op) != FarOpBytes || len(got) != n || n > 0 && got[n-1] != nos[n-1] {
			t.Fatalf("list of %d: %d, %v", n, len(got), ok)
		}
	}
	sb := testSuper()
	sb.Incompat, sb.FarRoot, sb.FarStart, sb.FarSlot = FeatureFar, 1<<33, 1<<32, 127
	if got, err := DecodeSuperblock(sb.Encode(), "dev", 0); err != nil || *got != *sb {
		t.Errorf("%+v, %v", got, err)
	}
	h := testHeader()
	h.Kind = Far
	b := make([]byte, BlockSize)
	h.Put(b, testStore)
	if got, err := DecodeSegmentHeader(b, testStore, "dev", 6, 0); err != nil || *got != *h {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestFarContradictions: what cannot be is refused although its checksum is right.
func TestFarContradictions(t *testing.T) {
	for name, change := range map[string]func(*Superblock){
		"slot beyond the device": func(s *Superblock) { s.FarSlot = s.Segments },
		"root without a start":   func(s *Superblock) { s.FarStart = 0 },
		"start without a root":   func(s *Superblock) { s.FarRoot, s.FarSlot = 0, 0 },
		"slot without a root":    func(s *Superblock) { s.FarRoot, s.FarStart = 0, 0 },
		"root without feature":   func(s *Superblock) { s.Incompat = 0 },
	} {
		sb := testSuper()
		sb.Incompat, sb.FarRoot, sb.FarStart, sb.FarSlot = FeatureFar, 1<<33, 1<<32, 8
		change(sb)
		if _, err := DecodeSuperblock(sb.Encode(), "dev", 0); !errors.Is(err, sealfs.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, change := range map[string]func(*FarRoot){
		"no start":           func(r *FarRoot) { r.Start = 0 },
		"applied below it":   func(r *FarRoot) { r.Applied = r.Start - 1 },
		"part beyond parts":  func(r *FarRoot) { r.Part = r.Parts },
		"first with another": func(r *FarRoot) { r.Part = 0 },
		"second with none":   func(r *FarRoot) { r.Prev = 0 },
		"second nowhere":     func(r *FarRoot) { r.PrevSlot = NoSlot },
		"table of minus one": func(r *FarRoot) { r.TableBytes = -1 },
		"pages":              func(r *FarRoot) { r.Pages = 1 << 60 },
	} {
		r := testFarRoot()
		change(r)
		if _, ok := ReadFarRoot(AppendFarRoot(nil, r)); ok {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzFarRoot(f *testing.F) {
	f.Add(AppendFarRoot(nil, testFarRoot()))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, ok := ReadFarRoot(b); ok && !bytes.Equal(AppendFarRoot(nil, &r), b) {
			t.Error("decoded and encoded again, the root differs")
		}
	})
}

func FuzzFarList(f *testing.F) {
	f.Add(AppendFarList(nil, []uint64{1, 2, 3}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if nos, ok := ReadFarList(b); ok && !bytes.Equal(AppendFarList(nil, nos), b) {
			t.Error("decoded and encoded again, the list differs")
		}
	})
}
