package client

import (
	"bytes"
	"context"
	"testing"

	"sealfs"
	"sealfs/op"
)

// piecemeal calls a function when a piece of a chunk is about to be changed; its error keeps that from happening.
type piecemeal struct {
	op.Handler
	before func(req *op.Request) error
}

func (h *piecemeal) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	if (req.Type == op.Write || req.Type == op.Fallocate) && req.Off >= sealfs.HomeBytes && h.before != nil {
		if err := h.before(req); err != nil {
			return err
		}
	}
	return h.Handler.Do(ctx, req, rep)
}

// TestChunksAreAnnounced has a client look at a file just when another one is about to change a chunk of it. What it
// believes of the file from then on must end with the change, whether all of that succeeds or
// not: in its kernel there may be pages from before.
func TestChunksAreAnnounced(t *testing.T) {
	s, root, err := newEngine(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	h := &piecemeal{Handler: s}
	ctx := context.Background()
	var clients [2]*Client
	for i := range clients {
		o := Options{Volume: 1, Root: root, Shards: testShards, Session: sealfs.Session(i + 1), Local: true, Chunked: true}
		if i == 0 {
			clients[i] = New(h, o)
		} else {
			clients[i] = New(s, o)
		}
		defer s.EndSession(o.Session)
		defer clients[i].Close()
		connected(t, clients[i])
	}
	writer, reader := clients[0], clients[1]
	a, err := writer.Create(ctx, root, "f", 0o644, Cred{})
	if err != nil {
		t.Fatal(err)
	}
	// Opened like this its writes are never delayed. (Else the reader would wait for the writer, though not for ever.)
	if err := writer.Release(ctx, a.Ino); err != nil {
		t.Fatal(err)
	}
	if _, err := writer.Open(ctx, a.Ino); err != nil {
		t.Fatal(err)
	}
	const at = sealfs.HomeBytes + sealfs.ChunkBytes - 4
	write := func(off uint64, data string, flags op.Flags) error {
		err := writer.Write(ctx, a.Ino, off, []byte(data), flags)
		if err == nil {
			err = writer.Fsync(ctx, a.Ino)
		}
		return err
	}
	if err := write(at, "old data", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := reader.Open(ctx, a.Ino); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		act  func() error
		fail bool // the second piece
	}{
		{"write", func() error { return write(at, "new data", 0) }, false},
		{"write that fails", func() error { return write(at, "bad data", 0) }, true},
		{"append", func() error { return write(0, "more", op.Append) }, false},
		{"append that fails", func() error { return write(0, string(bytes.Repeat([]byte("more"), sealfs.ChunkBytes/4)), op.Append) }, true},
		{"hole", func() error { return writer.Fallocate(ctx, a.Ino, at, 8, punchHole|keepSize) }, false},
		{"hole that fails", func() error { return writer.Fallocate(ctx, a.Ino, at, 8, punchHole|keepSize) }, true},
	} {
		var seen answer
		pieces := make(chan int, 1)
		pieces <- 0
		h.before = func(req *op.Request) error {
			n := <-pieces + 1
			defer func() { pieces <- n }()
			if test.fail && req.Off%sealfs.ChunkBytes == 0 {
				return sealfs.ErrNoSpace
			}
			var err error
			seen, err = reader.getattr(ctx, a.Ino)
			return err
		}
		err := test.act()
		h.before = nil
		if n := <-pieces; (err != nil) != test.fail || n == 0 {
			t.Errorf("%s: %v after %d pieces", test.name, err, n)
		}
		if seen.ino != 0 && reader.leases.holds(a.Ino, seen.ino) {
			t.Errorf("%s: what was seen before it is still believed", test.name)
		}
	}
}
