package cluster

import (
	"fmt"
	"sync"
	"time"

	"sealfs"
)

// leases judges which server process may serve which store, and sums up what
// volumes use. It has no clock of its own.
//
// A store is served by one process at a time. Whoever is heard of first holds
// its lease, which every heartbeat extends by a term; a lease ends in silence,
// or when its holder says goodbye. That the same server is back at the same
// address under another instance number proves that the old process has ended:
// two cannot listen there. (If the old one is heard of again nevertheless, two
// machines have been given one identity, and it is refused.)
type leases struct {
	term  time.Duration
	since time.Time // the leases of the leader before may last until a term after this

	mu     sync.Mutex
	holder map[sealfs.UUID]*holder // by store
	total  map[sealfs.Volume]VolumeUsage
}

// holder is who serves a store.
type holder struct {
	server   sealfs.UUID
	instance uint64
	before   uint64 // instance that this one took over from, 0 if none
	addr     string
	until    time.Time // end of the lease
	heard    time.Time
	state    string // what the store says of itself
	usage    []VolumeUsage
}

func newLeases(term time.Duration, now time.Time) *leases {
	return &leases{term: term, since: now, holder: make(map[sealfs.UUID]*holder), total: make(map[sealfs.Volume]VolumeUsage)}
}

// grant extends the leases of the stores in b as far as they are b's to serve,
// and says why others are not.
func (l *leases) grant(now time.Time, b *Beat, mp *Map) (refused map[sealfs.UUID]string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	refused = make(map[sealfs.UUID]string)
	for i := range b.Stores {
		s := &b.Stores[i]
		if why := l.refuse(now, b, s.ID, mp); why != "" {
			refused[s.ID] = why
			continue
		}
		h := l.holder[s.ID]
		if h == nil {
			h = &holder{}
			l.holder[s.ID] = h
		}
		if h.instance != b.Instance {
			h.before, h.instance = h.instance, b.Instance
		}
		h.server, h.addr, h.heard, h.until, h.state = b.Server, b.Addr, now, now.Add(l.term), s.State
		l.count(h.usage, -1)
		h.usage = s.Usage
		l.count(h.usage, 1)
	}
	return refused
}

// LeftForEver is why a store that was removed from the cluster is refused.
const LeftForEver = "it has left the cluster for ever; to use the disk again, start its server anew, and make a new store on it with `mkfs.sealfs --force`"

// refuse says why the sender of b may not serve a store, "" if it may.
func (l *leases) refuse(now time.Time, b *Beat, id sealfs.UUID, mp *Map) string {
	i := mp.StoreIndex(id)
	if i >= 0 && mp.Stores[i].State == StoreLeft {
		return LeftForEver
	}
	h := l.holder[id]
	switch {
	case h == nil && i >= 0 && now.Before(l.since.Add(l.term)):
		s := mp.Stores[i]
		if s.Addr == "" || s.Addr == b.Addr && (s.Server.IsZero() || s.Server == b.Server) {
			return ""
		}
		return fmt.Sprintf("server %s at %s may hold it for %s yet, under the manager that led before", s.Server, s.Addr, l.since.Add(l.term).Sub(now).Round(time.Millisecond))
	case h == nil || !now.Before(h.until) || h.instance == b.Instance && h.server == b.Server:
		return ""
	case h.server == b.Server && h.addr == b.Addr && h.before != b.Instance:
		return "" // the process was started again
	}
	return fmt.Sprintf("server %s at %s (instance %x) serves it, and was heard of %s ago: is this a copy of that disk? If that server is gone for good, its lease ends in %s",
		h.server, h.addr, h.instance, now.Sub(h.heard).Round(time.Millisecond), h.until.Sub(now).Round(time.Millisecond))
}

// release ends the leases of b's sender on the stores in b.
func (l *leases) release(now time.Time, b *Beat) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range b.Stores {
		if h := l.holder[b.Stores[i].ID]; h != nil && h.server == b.Server && h.instance == b.Instance {
			h.until = now
		}
	}
}

// forget undoes the grant of a store that could not be put into the map.
func (l *leases) forget(id sealfs.UUID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h := l.holder[id]; h != nil {
		l.count(h.usage, -1)
		delete(l.holder, id)
	}
}

func (l *leases) count(usage []VolumeUsage, sign int64) {
	for _, u := range usage {
		t := l.total[u.ID]
		t.ID = u.ID
		t.Bytes += uint64(sign) * u.Bytes
		t.Inodes += uint64(sign) * u.Inodes
		if t.Bytes == 0 && t.Inodes == 0 {
			delete(l.total, u.ID)
			continue
		}
		l.total[u.ID] = t
	}
}

// usage returns what a volume uses on all stores that have been heard of.
func (l *leases) usage(id sealfs.Volume) VolumeUsage {
	l.mu.Lock()
	defer l.mu.Unlock()
	u := l.total[id]
	u.ID = id
	return u
}

// says returns what a store last said of itself.
func (l *leases) says(id sealfs.UUID) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h := l.holder[id]; h != nil {
		return h.state
	}
	return ""
}
