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
// already (op.ModeACL), and it is believed under the lease that they are believed under. An inode
// takes the place of another one with the same hash: then the server is asked.
type bareInodes struct {
	changed atomic.Uint64 // mark of when this mount has changed an ACL last: what was asked before may be older
	slots   [bareSlots]struct {
		mu     sync.Mutex
		ino    sealfs.Ino
		belief belief
		until  time.Time // for a client without leases
	}
}

func (b *bareInodes) slot(ino sealfs.Ino) int {
	return int(uint64(ino) * 0x9e3779b97f4a7c15 >> (64 - 12))
}

// note takes what attributes say. Without leases it counts for the time ttl.
func (b *bareInodes) note(a *answer, ttl time.Duration) {
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
	} else if a.mark > b.changed.Load() {
		s.ino, s.belief, s.until = a.Ino, a.ino, time.Now().Add(ttl)
	}
}

// has reports whether ino is known to have no access ACL.
func (b *bareInodes) has(c *Client, ino sealfs.Ino) bool {
	s := &b.slots[b.slot(ino)]
	s.mu.Lock()
	known, belief, until := s.ino == ino, s.belief, s.until
	s.mu.Unlock()
	if !known || c.leasing {
		return known && c.believes(ino, belief)
	}
	return time.Now().Before(until)
}

// forget is for who has changed an ACL of ino.
func (b *bareInodes) forget(c *Client, ino sealfs.Ino) {
	b.changed.Store(c.leases.mark())
	s := &b.slots[b.slot(ino)]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ino == ino {
		s.ino = 0
	}
}
