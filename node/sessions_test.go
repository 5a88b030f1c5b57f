package node

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"sealfs"
	"sealfs/op"
)

// TestSilentMount: the session of a mount that holds what others wait for, and says nothing, is ended;
// what others want goes on then, and nothing of that session happens any more.
func TestSilentMount(t *testing.T) {
	ctx := t.Context()
	dir, err := OpenDir(filepath.Join(t.TempDir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	n, err := Up(ctx, Options{Dir: dir, Size: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	admin := dir.Admin()
	defer admin.Close()
	s, goodbye, alive, err := admin.session(ctx, sessionRequest{Volume: "main", Mount: "/nowhere"})
	if err != nil {
		t.Fatal(err)
	}
	defer alive.Close()
	do := func(ctx context.Context, r op.Request) (rep op.Reply, err error) {
		r.Volume, r.Shard = s.Volume, s.Root.Home(s.Shards)
		r.Epoch = epoch(n.manager.Map(), r.Shard)
		if err = n.server.Do(ctx, &r, &rep); err == nil && rep.Code != 0 {
			err = rep.Code
		}
		return rep, err
	}
	if _, err := do(ctx, op.Request{Type: op.Watch, Session: s.ID}); err != nil {
		t.Fatal(err)
	}
	if rep, err := do(ctx, op.Request{Type: op.Getattr, Ino: s.Root, Session: s.ID}); err != nil || rep.Lease&op.LeaseIno == 0 {
		t.Fatalf("lease %x, %v", rep.Lease, err)
	}
	n.lookAfter(1)
	n.lookAfter(1)
	n.lookAfter(1)
	if n.server.Status().Stores[0].Leases.Sessions != 1 {
		t.Fatal("the session was ended although nobody waits for it")
	}
	made := make(chan error, 1)
	go func() {
		_, err := do(ctx, op.Request{Type: op.Mknod, Dir: s.Root, Name: "f", Mode: 0o100600})
		made <- err
	}()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for n.server.Status().Stores[0].Leases.Waits == 0 {
		select {
		case err := <-made:
			t.Fatalf("made without the lease: %v", err)
		case <-tick.C:
		}
	}
	n.lookAfter(2) // sees it
	n.lookAfter(2)
	select {
	case err := <-made:
		t.Fatalf("made too early: %v", err)
	default:
	}
	n.lookAfter(2)
	goodbye()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	for _, r := range []op.Request{{Type: op.Watch, Session: s.ID}, {Type: op.Mknod, Session: s.ID, Seq: 1, Low: 1, Dir: s.Root, Name: "g", Mode: 0o100600}} {
		if _, err := do(ctx, r); !errors.Is(err, sealfs.ErrSession) {
			t.Errorf("%v of the ended session: %v", r.Type, err)
		}
	}
	if left := n.running().Sessions; len(left) != 0 {
		t.Errorf("sessions %v", left)
	}
}
