package server

import (
	"bytes"
	"testing"

	"sealfs/op"
)

// TestOpenBrings: the content of a file that is small enough comes with its opening.
func TestOpenBrings(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	ino := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: "f", Mode: 0o644}).Attr.Ino
	data := bytes.Repeat([]byte("seal"), 3000)
	s.must(t, op.Request{Type: op.Write, Ino: ino, Data: data})
	for n, want := range map[uint64][]byte{0: nil, uint64(len(data)) - 1: nil, uint64(len(data)): data, 1 << 20: data} {
		if rep := s.must(t, op.Request{Type: op.Open, Ino: ino, Len: n}); !bytes.Equal(rep.Data, want) {
			t.Errorf("for %d bytes come %d", n, len(rep.Data))
		}
	}
	s.must(t, op.Request{Type: op.Write, Ino: ino, Off: bringMax, Data: data})
	if rep := s.must(t, op.Request{Type: op.Open, Ino: ino, Len: 1 << 30}); len(rep.Data) != 0 {
		t.Errorf("%d bytes come with a large file", len(rep.Data))
	}
	if rep := s.must(t, op.Request{Type: op.Open, Ino: s.root, Len: 1 << 20}); len(rep.Data) != 0 {
		t.Error("a directory has content")
	}
}
