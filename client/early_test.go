package client

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"sealfs/internal/oracle"
	"sealfs/op"
)

// readCounter counts the reads that get to the servers.
type readCounter struct {
	op.Handler
	reads atomic.Int64
}

func (r *readCounter) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	if req.Type == op.Read {
		r.reads.Add(1)
	}
	return r.Handler.Do(ctx, req, rep)
}

// TestReadWithOpening: what is read right after it was opened comes with the
// opening, and never instead of what was written since.
func TestReadWithOpening(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newCluster()
		net := oracle.NewNet(u.model, 3, 1)
		count := &readCounter{Handler: generous{net}}
		c := New(count, Options{Volume: 1, Root: u.root, Shards: testShards, Session: 1})
		defer c.Close()
		watched(t, c)
		ctx := context.Background()
		ino := createIn(t, c, net, 1, "f")
		write := func(text string) {
			t.Helper()
			if err := c.Write(ctx, ino, 0, []byte(text), 0); err != nil {
				t.Fatal(err)
			}
		}
		read := func(want string, asked int64) {
			t.Helper()
			before := count.reads.Load()
			b, err := c.Read(ctx, ino, 0, 100, nil)
			if err != nil || string(b) != want {
				t.Fatalf("%q, %v, want %q", b, err, want)
			}
			if n := count.reads.Load() - before; n != asked {
				t.Fatalf("%d reads were sent, want %d", n, asked)
			}
		}
		open := func() {
			t.Helper()
			if _, err := c.OpenToRead(ctx, ino); err != nil {
				t.Fatal(err)
			}
		}
		write("first")
		if err := c.Release(ctx, ino); err != nil {
			t.Fatal(err)
		}
		open()
		read("first", 0)
		read("first", 1) // it was believed once
		open()
		write("other")
		read("other", 1)
		open()
		if _, err := c.Setattr(ctx, ino, &SetAttr{Valid: op.SetSize, Size: 2}); err != nil {
			t.Fatal(err)
		}
		read("ot", 1)
		open()
		<-time.After(leaseTerm - watchTime) // the watch renews what is believed
		read("ot", 0)
		open()
		v := op.Revoke{Num: 1, Kind: op.RevokeInode, Ino: ino}
		c.carryOut([]op.Revoke{v})
		read("ot", 1)
		open()
		for range 6 {
			if err := c.Release(ctx, ino); err != nil {
				t.Fatal(err)
			}
		}
		if n := c.earlyBytes.Load(); n != 0 || c.nodes.get(ino) != nil {
			t.Fatalf("%d bytes are kept for closed files", n)
		}
		// A file that is larger is read when it is read.
		big := createIn(t, c, net, 2, "g")
		if err := c.Write(ctx, big, 0, make([]byte, earlyMax+1), 0); err != nil {
			t.Fatal(err)
		}
		if _, err := c.OpenToRead(ctx, big); err != nil {
			t.Fatal(err)
		}
		if n := c.earlyBytes.Load(); n != 0 {
			t.Fatalf("%d bytes came with a file of %d", n, earlyMax+1)
		}
	})
}
