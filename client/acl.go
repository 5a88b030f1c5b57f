package client

import (
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/op"
)

func isACL(name string) bool { return name == op.ACLAccess || name == op.ACLDefault }

// bareSlots is how many inodes bareInodes remembers at most, a power of two.
const bareSlots = 4096

// bareInodes remembers which inodes have no access ACL. The kernel asks for it whenever
// somebody else than the owner comes by, after it has got attributes anew; those have told it
// already (op.ModeACL), and it is not believed for longer than they are. An inode
// takes the place of another one with the same hash: then the server is asked.
type bareInodes struct {
	changed atomic.Pointer[time.Time] // when this mount has changed an ACL last: what was asked before may be older
	slots   [bareSlots]struct {
		mu    sync.Mutex
		ino   sealfs.Ino
		until time.Time
	}
}

func (b *bareInodes) slot(ino sealfs.Ino) int {
	return int(uint64(ino) * 0x9e3779b97f4a7c15 >> (64 - 12))
}

// note takes what attributes say that were asked for at the time asked.
func (b *bareInodes) note(a *op.Attr, asked time.Time, ttl time.Duration) {
	if a.Ino == 0 || a.Version == 0 {
		return
	}
	s := &b.slots[b.slot(a.Ino)]
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.Mode&op.ModeACL != 0 {
		if s.ino == a.Ino {
			s.ino = 0
		}
	} else if changed := b.changed.Load(); changed == nil || asked.After(*changed) {
		s.ino, s.until = a.Ino, asked.Add(ttl)
	}
}

// has reports whether ino is known to have no access ACL.
func (b *bareInodes) has(ino sealfs.Ino) bool {
	s := &b.slots[b.slot(ino)]
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ino == ino && time.Now().Before(s.until)
}

// forget is for who has changed an ACL of ino.
func (b *bareInodes) forget(ino sealfs.Ino) {
	now := time.Now()
	b.changed.Store(&now)
	s := &b.slots[b.slot(ino)]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ino == ino {
		s.ino = 0
	}
}
