package client

import (
	"hash/maphash"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/op"
)

// What a client may believe. A server grants leases with its answers, and takes them
// back by revocations (see watch.go); while a lease is held, nobody else changes
// what it is for. All that outlives an answer, in this process and in the kernel, rests
// on a belief: an answer's place in the life of a lease. A belief holds as long as the lease
// does and nothing of it was revoked since the answer.
//
// Answers and revocations travel apart, so an answer may come after the
// revocation of what it grants. Three things tell:
//
//   - Reply.Stamp counts the revocations that the server had issued when it answered.
//     An answer with a lower one than a revocation of the same inode is older (leasePart.revoked,
//     and leases.floor for what that has forgotten).
//   - Each request takes a mark before it is sent. Where a store is registered anew, or
//     a lease was dropped by the client itself, answers to requests from before are
//     not believed (leases.after).
//   - Nothing is believed of a store before it has answered a Watch: who issues a
//     revocation must be able to reach us.
//
// And a belief ends by itself with the session's term (Client.believedUntil), so that a
// client that was paused, or cut off, does not go on with what others may have
// changed since.
type leases struct {
	parts [64]leasePart
	clock atomic.Uint64               // of marks
	after []atomic.Uint64             // by shard of the inode: what was asked up to this mark is not believed
	floor []atomic.Uint64             // by shard of the inode: what has a lower stamp is not believed
	alive []atomic.Pointer[time.Time] // by shard of the inode: when the last Watch was sent that its store has answered
	names atomic.Int64                // in the rosters of all leases
	seed  maphash.Seed                // of their hashes
}

// belief is the serial number of a lease in the part of its inode; 0: nothing is to be believed.
type belief uint64

// lease is what is held on an inode, or on a directory and its names.
type lease struct {
	serial belief // another one after the revocation of a name
	write  bool   // writes may be delayed
	roster roster // of a directory; nil: not known
}

type leasePart struct {
	mu      sync.Mutex
	held    map[sealfs.Ino]lease
	revoked map[sealfs.Ino]uint64   // number of the last revocation
	left    map[sealfs.Ino]struct{} // dropped by ourselves, and the server may not know it yet
	added   map[sealfs.Ino]uint64   // mark: this client has made a name there, which was not noted
	later   uint64                  // mark: the same for all that added has forgotten
	serial  belief
}

// revokedMax bounds what one part remembers of revocations.
const revokedMax = 1024

// answer is attributes that a server told, and what makes them believable.
type answer struct {
	op.Attr
	ino belief // under the lease of Attr.Ino
	dir belief // under that of the request's directory: the name, and its directory's attributes

	mark uint64 // of the request: the attributes are not older

	at    sealfs.Ino   // the directory, or partition of it, that dir is about
	parts []partBelief // that the attributes of a split directory are put together from
}

// answer returns the attributes in the reply to k.
func (k *call) answer() answer {
	return answer{Attr: k.rep.Attr, ino: k.ino, dir: k.dir, mark: k.mark, at: k.Dir}
}

func (l *leases) init(shards uint32) {
	l.after, l.floor = make([]atomic.Uint64, shards), make([]atomic.Uint64, shards)
	l.seed = maphash.MakeSeed()
	l.alive = make([]atomic.Pointer[time.Time], shards)
	for i := range l.after {
		l.after[i].Store(math.MaxUint64)
	}
	for i := range l.parts {
		p := &l.parts[i]
		p.held, p.revoked, p.left = map[sealfs.Ino]lease{}, map[sealfs.Ino]uint64{}, map[sealfs.Ino]struct{}{}
		p.added = map[sealfs.Ino]uint64{}
	}
}

func (l *leases) part(ino sealfs.Ino) *leasePart {
	return &l.parts[uint64(ino)*0x9e3779b97f4a7c15>>58]
}

// home returns the shard by which after and floor know ino.
func (l *leases) home(ino sealfs.Ino) sealfs.Shard { return ino.Home(uint32(len(l.after))) }

// mark numbers a request that is about to be sent, or a moment.
func (l *leases) mark() uint64 { return l.clock.Add(1) }

// believe takes the leases that the reply to k grants.
func (c *Client) believe(k *call) {
	k.ino, k.dir, k.each = 0, 0, k.each[:0]
	if k.rep.Lease == 0 || !c.leasing {
		return
	}
	l := &c.leases
	if k.rep.Lease&op.LeaseDir != 0 && k.Dir != 0 {
		k.dir = l.grant(k.Dir, k, false)
		l.empty(&k.rep.Dir, k.dir, k)
	}
	if k.rep.Lease&(op.LeaseIno|op.LeaseWrite) == 0 {
		return
	}
	if k.Type != op.Readdir {
		if k.rep.Attr.Version != 0 {
			k.ino = l.grant(k.rep.Attr.Ino, k, k.rep.Lease&op.LeaseWrite != 0)
			l.empty(&k.rep.Attr, k.ino, k)
		}
		return
	}
	for i := range k.rep.Entries {
		var b belief
		if a := &k.rep.Entries[i].Attr; a.Ino != 0 && a.Version != 0 {
			b = l.grant(a.Ino, k, false)
		}
		k.each = append(k.each, b)
	}
}

// grant notes that the answer to k grants a lease on ino, unless the answer is old.
func (l *leases) grant(ino sealfs.Ino, k *call, write bool) belief {
	home := l.home(ino)
	p := l.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	if k.mark <= l.after[home].Load() || k.rep.Stamp < l.floor[home].Load() || k.rep.Stamp < p.revoked[ino] {
		return 0
	}
	if _, left := p.left[ino]; left {
		return 0
	}
	h, ok := p.held[ino]
	if !ok {
		p.serial++
		h.serial = p.serial
	}
	h.write = h.write || write
	p.held[ino] = h
	return h.serial
}

// holds reports whether a belief about ino still holds.
func (l *leases) holds(ino sealfs.Ino, b belief) bool {
	if b == 0 {
		return false
	}
	p := l.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.held[ino].serial == b
}

// has returns the lease on ino that is held, the zero lease if none is.
func (l *leases) has(ino sealfs.Ino) lease {
	p := l.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.held[ino]
}

// revoke takes away what v says, and returns the lease from before.
func (l *leases) revoke(v *op.Revoke) lease {
	p := l.part(v.Ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	old, held := p.held[v.Ino]
	switch now := old; {
	case !held:
	case v.Kind == op.RevokeName || v.Kind == op.RevokeOwn:
		if v.Name != "" {
			l.add(p, v.Ino, v.Name) // it may be made now
			now = p.held[v.Ino]
		}
		p.serial++
		now.serial = p.serial
		p.held[v.Ino] = now
	case v.Kind == op.RecallWrite:
		now.write = false
		p.held[v.Ino] = now
	default:
		l.end(p, v.Ino)
	}
	if len(p.revoked) >= revokedMax {
		for ino, num := range p.revoked {
			raise(&l.floor[l.home(ino)], num)
		}
		clear(p.revoked)
	}
	p.revoked[v.Ino] = v.Num
	return old
}

func raise(a *atomic.Uint64, to uint64) {
	for old := a.Load(); old < to && !a.CompareAndSwap(old, to); old = a.Load() {
	}
}

// drop forgets all about inodes whose home is among mine, until allow, and returns
// those of which something was believed.
func (l *leases) drop(mine func(sealfs.Shard) bool) []sealfs.Ino {
	for s := range l.after {
		if mine(sealfs.Shard(s)) {
			l.after[s].Store(math.MaxUint64) // before the parts: nothing comes in any more
		}
	}
	var all []sealfs.Ino
	for i := range l.parts {
		p := &l.parts[i]
		p.mu.Lock()
		for ino := range p.held {
			if mine(l.home(ino)) {
				all = append(all, ino)
				l.end(p, ino)
			}
		}
		for ino := range p.revoked {
			if mine(l.home(ino)) {
				delete(p.revoked, ino)
			}
		}
		for ino := range p.left {
			if mine(l.home(ino)) {
				delete(p.left, ino)
			}
		}
		p.mu.Unlock()
	}
	for s := range l.floor {
		if mine(sealfs.Shard(s)) {
			l.floor[s].Store(0)
		}
	}
	return all
}

// allow ends a drop: what is asked from now on may be believed again.
func (l *leases) allow(mine func(sealfs.Shard) bool) {
	now := l.mark()
	for s := range l.after {
		if mine(sealfs.Shard(s)) {
			l.after[s].CompareAndSwap(math.MaxUint64, now)
		}
	}
}

// lower ends the delaying of writes to ino: nobody here has it open any more, and
// the server will hear that.
func (l *leases) lower(ino sealfs.Ino) {
	p := l.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	if h, ok := p.held[ino]; ok && h.write {
		h.write = false
		p.held[ino] = h
	}
}

// leave forgets ino because nobody here needs it, and reports whether the server is to be told.
// Until told, nothing is believed of it: an answer may be from before the server
// has heard of it, and mean the lease that the server is about to forget.
func (l *leases) leave(ino sealfs.Ino, tell bool) bool {
	p := l.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, held := p.held[ino]; !held {
		return false
	}
	l.end(p, ino)
	if tell {
		p.left[ino] = struct{}{}
	}
	return tell
}

// told notes that the server knows that these were left.
func (l *leases) told(list []sealfs.Ino) {
	now := l.mark()
	for _, ino := range list {
		// Answers that are under way are from before, or may be.
		if a := &l.after[l.home(ino)]; a.Load() != math.MaxUint64 {
			raise(a, now)
		}
		p := l.part(ino)
		p.mu.Lock()
		delete(p.left, ino)
		p.mu.Unlock()
	}
}

// leaseTerm is for how long after a sign of life a store certainly waits for a client: a session that was heard of does not
// end within a minute, unless Renewed says so, and a server that starts anew lets it come back for a minute.
const leaseTerm = 54 * time.Second

// believedUntil returns until when beliefs about ino hold that are not revoked: as long as the session is certain to
// live, and for a term after the last sign of life of the inode's store. That may be cut off from this client alone, be
// started anew, and not wait any longer for it to come back.
func (c *Client) believedUntil(ino sealfs.Ino) time.Time {
	at := c.leases.alive[c.leases.home(ino)].Load()
	if at == nil {
		return time.Time{}
	}
	lease := at.Add(leaseTerm)
	if until := c.ses.Load().until.Load(); until != nil && until.Before(lease) {
		return *until
	}
	return lease
}

// believes reports whether a belief about ino holds now.
func (c *Client) believes(ino sealfs.Ino, b belief) bool {
	return c.leases.holds(ino, b) && time.Now().Before(c.believedUntil(ino))
}

// mayDelay reports whether writes to ino may wait here. A client without a session
// has nobody who would ask it for them, and goes by what its owner wants.
func (c *Client) mayDelay(ino sealfs.Ino) bool {
	return !c.leasing || c.leases.has(ino).write && time.Now().Before(c.believedUntil(ino))
}
