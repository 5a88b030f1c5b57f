package node

import (
	"errors"
	"testing"

	"sealfs"
)

// TestClaim: a heartbeat names what is served or about to be, and nothing else:
// a disk that was refused stays with whom it belongs to.
func TestClaim(t *testing.T) {
	s := &StoreServer{disks: make(map[sealfs.UUID]*servedDisk), inv: new(inventory)}
	var ids []sealfs.UUID
	for range 3 {
		id := sealfs.NewUUID()
		ids = append(ids, id)
		s.inv.Disks = append(s.inv.Disks, Disk{ID: id})
		s.disks[id] = &servedDisk{Disk: s.inv.Disks[len(ids)-1], claim: true}
	}
	named := func() (n int, second bool) {
		b := s.composeBeat(nil)
		for _, x := range b.Stores {
			second = second || x.ID == ids[1]
		}
		return len(b.Stores), second
	}
	if n, _ := named(); n != 3 {
		t.Errorf("%d disks are claimed, want 3", n)
	}
	s.setAside(s.disks[ids[1]], errors.New("it belongs to another"))
	if n, second := named(); n != 2 || second {
		t.Errorf("%d disks are claimed, want 2; the refused one: %v", n, second)
	}
	delete(s.disks, ids[0])
	if n, _ := named(); n != 1 {
		t.Errorf("%d disks are claimed after one was removed, want 1", n)
	}
}
