package pmem

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/pmem/layout"
)

func testStagingHeader(t *testing.T) StagingHeader {
	boot, err := BootID()
	if err != nil || boot == [16]byte{} {
		t.Fatalf("BootID: %x, %v", boot, err)
	}
	return StagingHeader{Store: sealfs.NewUUID(), Incarnation: 3, BootID: boot, SegmentBytes: 8 * PageSize, Chunks: 3}
}

func TestStagingFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "staging")
	if _, err := OpenStaging(path); !errors.Is(err, sealfs.ErrNotExist) {
		t.Fatalf("OpenStaging of no file: %v", err)
	}
	h := testStagingHeader(t)
	s, err := CreateStaging(path, h)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if s.ChunkSeq(i) != 0 || len(s.Chunk(i)) != 8*PageSize || cap(s.Chunk(i)) != 8*PageSize {
			t.Fatalf("chunk %d: seq %d, %d bytes", i, s.ChunkSeq(i), len(s.Chunk(i)))
		}
		s.SetChunkSeq(i, uint32(100+i))
		copy(s.Chunk(i)[8*PageSize-4:], []byte{'e', 'n', 'd', byte(i)})
	}
	look := func(s *Staging) {
		t.Helper()
		if s.Header() != h {
			t.Errorf("header %+v, want %+v", s.Header(), h)
		}
		for i := range 3 {
			if s.ChunkSeq(i) != uint32(100+i) || !bytes.HasSuffix(s.Chunk(i), []byte{'e', 'n', 'd', byte(i)}) {
				t.Errorf("chunk %d: seq %d, ends % x", i, s.ChunkSeq(i), s.Chunk(i)[8*PageSize-4:])
			}
		}
	}
	clone := s.Clone()
	look(clone)
	s.SetChunkSeq(0, 1)
	look(clone)
	if err := clone.Close(true); err != nil {
		t.Error(err)
	}
	s.SetChunkSeq(0, 100)
	if err := s.Close(false); err != nil {
		t.Fatal(err)
	}
	if st, _ := os.Stat(path); st.Mode() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	if s, err = OpenStaging(path); err != nil {
		t.Fatal(err)
	}
	look(s)
	if err := s.Close(false); err != nil {
		t.Fatal(err)
	}

	// Created anew, nothing of the old ring is left.
	if s, err = CreateStaging(path, h); err != nil {
		t.Fatal(err)
	}
	if s.ChunkSeq(0) != 0 || !bytes.Equal(s.Chunk(2), make([]byte, 8*PageSize)) {
		t.Error("the ring was not replaced")
	}
	if err := s.Close(true); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close(true): %v", err)
	}
}

func TestStagingRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "staging")
	h := testStagingHeader(t)
	for _, bad := range []StagingHeader{
		{SegmentBytes: 0, Chunks: 1}, {SegmentBytes: 100, Chunks: 1},
		{SegmentBytes: PageSize, Chunks: 0}, {SegmentBytes: PageSize, Chunks: layout.StagingChunksMax + 1},
	} {
		if _, err := CreateStaging(path, bad); !errors.Is(err, sealfs.ErrInvalid) {
			t.Errorf("CreateStaging of %+v: %v", bad, err)
		}
	}
	sound := append(encodeStaging(h), make([]byte, h.bytes()-layout.StagingSeqOff)...)
	newer := bytes.Clone(sound)
	newer[8]++
	binary.LittleEndian.PutUint32(newer[layout.StagingCRCOff:], enc.CRC(0, newer[:layout.StagingCRCOff]))
	flipped := bytes.Clone(sound)
	flipped[500] ^= 4
	for _, c := range []struct {
		name string
		b    []byte
		want error
	}{
		{"sound", sound, nil},
		{"empty", nil, sealfs.ErrCorrupt},
		{"short", sound[:len(sound)-1], sealfs.ErrCorrupt},
		{"long", append(bytes.Clone(sound), 0), sealfs.ErrCorrupt},
		{"magic", append([]byte("x"), sound[1:]...), sealfs.ErrCorrupt},
		{"flipped bit", flipped, sealfs.ErrCorrupt},
		{"newer version", newer, sealfs.ErrVersion},
	} {
		if err := os.WriteFile(path, c.b, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := OpenStaging(path)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
		if err == nil {
			s.Close(false)
		}
	}
}

// FuzzStagingHeader: any bytes are a header or an error.
func FuzzStagingHeader(f *testing.F) {
	f.Add(encodeStaging(StagingHeader{SegmentBytes: PageSize, Chunks: 4}))
	f.Add([]byte(layout.StagingMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := decodeStaging("staging", b)
		if err != nil {
			return
		}
		if !bytes.Equal(encodeStaging(h)[:56], b[:56]) {
			t.Errorf("%+v does not encode to what it was decoded from", h)
		}
	})
}
