package client

import (
	"context"
	"math"
	"testing"
	"time"

	"sealfs/op"
)

// generous grants every lease to the only client there is, and never takes one back.
type generous struct{ op.Handler }

func (g generous) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	if req.Type == op.Watch {
		if req.Len == 0 {
			return nil
		}
		timer := time.NewTimer(time.Duration(req.Len) * time.Millisecond)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return errGaveUp
		}
		return nil
	}
	err := g.Handler.Do(ctx, req, rep)
	rep.Lease = op.LeaseIno | op.LeaseDir
	if req.Type == op.Create || req.Type == op.Tmpfile || req.Flags&op.WantWrite != 0 {
		rep.Lease |= op.LeaseWrite
	}
	return err
}

// watched returns when c believes what it is told.
func watched(t testing.TB, c *Client) {
	t.Helper()
	c.startWatching()
	for range 5000 {
		ready := true
		for i := range c.leases.after {
			ready = ready && c.leases.after[i].Load() != math.MaxUint64
		}
		if ready {
			return
		}
		<-time.After(time.Millisecond)
	}
	t.Fatal("the stores are not watched")
}

// connected is watched after a connection to each store, which ends all belief in it.
func connected(t testing.TB, c *Client) {
	t.Helper()
	if err := c.Sync(context.Background()); err != nil {
		t.Fatal(err)
	}
	watched(t, c)
}
