package client

import (
	"hash/maphash"
	"time"

	"sealfs"
	"sealfs/op"
)

// roster is all names that a directory may have, by their hashes: other ones it has not. A client knows
// that of a directory that was empty when it got the lease, as new ones are. From then on it
// makes names itself, or hears of those that others are about to make: as long as it
// holds the lease, each is revoked before. So who fills a new directory need not ask for each
// name whether it is there. Names that are removed stay: to ask for them does no harm.
type roster map[uint64]struct{}

const (
	// rosterMax bounds the names of one directory that are known, rostersMax those of all.
	rosterMax  = 1 << 16
	rostersMax = 1 << 20
	// addedMax bounds the directories in each part of which it is remembered when a name was made.
	addedMax = 1024
)

// empty notes that the answer to k, which grants b, tells that a directory is empty.
func (l *leases) empty(a *op.Attr, b belief, k *call) {
	if b == 0 || a.Mode&modeType != modeDir || a.Size != 0 || a.Bound != 0 || k.unsure {
		return
	}
	p := l.part(a.Ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	// A name that was made after the question was sent may be missing in the answer.
	if h := p.held[a.Ino]; h.serial == b && h.roster == nil && k.mark > p.later && k.mark > p.added[a.Ino] {
		h.roster = roster{}
		p.held[a.Ino] = h
	}
}

// add notes a name that there may be from now on. The part is locked.
func (l *leases) add(p *leasePart, dir sealfs.Ino, name string) {
	h := p.held[dir]
	if h.roster == nil {
		return
	}
	sum := maphash.String(l.seed, name)
	if _, known := h.roster[sum]; known {
		return
	}
	if len(h.roster) >= rosterMax || l.names.Load() >= rostersMax {
		l.names.Add(int64(-len(h.roster)))
		h.roster = nil
		p.held[dir] = h
		return
	}
	h.roster[sum] = struct{}{}
	l.names.Add(1)
}

// end ends the lease on ino. The part is locked.
func (l *leases) end(p *leasePart, ino sealfs.Ino) {
	l.names.Add(int64(-len(p.held[ino].roster)))
	delete(p.held, ino)
}

// makes notes the name that k makes, before it is sent and when it is answered.
func (l *leases) makes(k *call) {
	dir, name := k.Dir, k.Name
	switch k.Type {
	case op.Create, op.Mknod, op.Mkdir, op.Symlink, op.Link:
	case op.Rename:
		dir, name = k.Dir2, k.Name2
	default:
		return
	}
	p := l.part(dir)
	p.mu.Lock()
	defer p.mu.Unlock()
	if l.add(p, dir, name); p.held[dir].roster != nil {
		return
	}
	now := l.mark()
	if len(p.added) >= addedMax {
		clear(p.added)
		p.later = now
	}
	p.added[dir] = now
}

// absent returns under which belief there is no such name in a directory, 0 if that is not known.
func (c *Client) absent(dir sealfs.Ino, name string) belief {
	if !c.leasing || name == "" || len(name) > sealfs.NameMax {
		return 0
	}
	l := &c.leases
	p := l.part(dir)
	p.mu.Lock()
	h := p.held[dir]
	there := h.roster == nil
	if !there {
		_, there = h.roster[maphash.String(l.seed, name)]
	}
	p.mu.Unlock()
	if there || !time.Now().Before(c.believedUntil(dir)) {
		return 0
	}
	return h.serial
}
