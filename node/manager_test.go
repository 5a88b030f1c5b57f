package node

import (
	"context"
	"path/filepath"
	"strings"
	"testing"

	"sealfs/cluster"
	"sealfs/op"
)

// TestDeadManager: files stay usable when the manager has stopped; what needs
// it says so, and status tells why and what to do.
func TestDeadManager(t *testing.T) {
	ctx := context.Background()
	dir, err := OpenDir(filepath.Join(t.TempDir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	n, err := Up(ctx, Options{Dir: dir, Size: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if s := n.running(); s.State != StateRunning {
		t.Fatalf("state %s: %s", s.State, s.Reason)
	}
	if err := n.manager.Close(); err != nil {
		t.Fatal(err)
	}
	if s := n.running(); s.State != StateDegraded || !strings.Contains(s.Reason, "manager") || !strings.Contains(s.Reason, "restart") {
		t.Errorf("state %s: %s", s.State, s.Reason)
	}
	if _, err := n.createVolume(ctx, cluster.VolumeSpec{Name: "more"}); err == nil || !strings.Contains(err.Error(), "manager") {
		t.Errorf("a volume without a manager: %v", err)
	}
	v, err := n.volume("main")
	if err != nil {
		t.Fatal(err)
	}
	req := op.Request{Type: op.Create, Volume: v.ID, Dir: v.Root, Shard: v.Root.Home(n.cfg.Shards), Epoch: n.manager.Map().Table[v.Root.Home(n.cfg.Shards)].Epoch, Name: "f", Mode: 0o644}
	var rep op.Reply
	if err := n.server.Do(ctx, &req, &rep); err != nil || rep.Code != 0 {
		t.Errorf("a file without a manager: %v, %v", err, rep.Code)
	}
}
