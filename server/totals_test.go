package server

import (
	"context"
	"fmt"
	"strconv"
	"testing"

	"sealfs"
	"sealfs/op"
)

// total asks a directory for one of its totals.
func total(t *testing.T, h op.Handler, shards uint32, dir sealfs.Ino, name string) uint64 {
	t.Helper()
	req := op.Request{Type: op.Getxattr, Ino: dir, Shard: dir.Home(shards), Name: name, Len: 20}
	var rep op.Reply
	if err := h.Do(context.Background(), &req, &rep); err != nil || rep.Code != 0 {
		t.Fatal(err, rep.Code)
	}
	n, err := strconv.ParseUint(string(rep.Data), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestTotalsAtOnce: who has changed something on a server, and asks that server for totals, need
// not wait for a moment himself; nor is he held up while others work.
func TestTotalsAtOnce(t *testing.T) {
	s := newSim(t, 32<<20, 1<<20)
	s.Server.pace.tell = 1 << 50 // nothing is passed on but for those who ask
	dir := s.root
	for level := range 12 {
		rep := s.must(t, op.Request{Type: op.Mkdir, Dir: dir, Name: fmt.Sprint("dir", level), Mode: 0o755, Shard2: sealfs.Shard(level % int(s.cfg.Shards))})
		dir = rep.Attr.Ino
	}
	for i := range uint64(30) {
		s.must(t, op.Request{Type: op.Create, Dir: dir, Name: fmt.Sprint("file", i), Mode: 0o644})
		if files := total(t, s, s.cfg.Shards, s.root, op.AttrFiles); files != i+1 {
			t.Fatalf("the root has %d files, %d were made", files, i+1)
		}
	}
	if dirs := total(t, s, s.cfg.Shards, s.root, op.AttrDirs); dirs != 12 {
		t.Errorf("%d directories", dirs)
	}
}
