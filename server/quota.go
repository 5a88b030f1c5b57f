package server

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"sealfs"
	"sealfs/cluster"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// A volume's quota is shared out among the stores: each has a limit, up to which what it
// holds of the volume may grow. All limits together are never more than the quota, as long as
// that is not lowered. The store that holds the volume's root keeps account of them (keeper.go),
// durably; here is what a store knows of its own, in memory. It never is more than the
// keeper has noted: after a start a store may use what it holds, and no more, until it asks.

const (
	// pleaMin is how long a change waits for a keeper that does not answer, or not yet: the
	// client asks again. It also bounds the wait of who votes for a store that may have something to
	// give back (pace.plea): others wait for the vote with what they have prepared.
	pleaMin = 200 * time.Millisecond
	// askTimeout bounds one question to the keeper, who may wait for stores itself.
	askTimeout = 4 * time.Second
)

// errShort says that a change does not fit into its store's limit of a volume.
var errShort = errors.New("beyond the store's share of the volume's quota")

// charge is an amount of a volume: what a request changes, or what there is.
type charge struct {
	volume        sealfs.Volume
	bytes, inodes int64
}

// quota is what a volume may hold, 0 for any number of them, and since when: see
// cluster.VolumeInfo.
type quota struct {
	bytes, inodes uint64
	since         uint64
}

// usage is what the volumes hold on this store: the sum of the shards' usage
// rows, kept so that a limit is checked without reading them.
type usage struct {
	mu     sync.Mutex
	of     map[sealfs.Volume]charge
	limits map[sealfs.Volume]*limit
}

// limit is how far one volume may grow on a store. It is guarded by usage.mu, but for asking.
type limit struct {
	m             *cluster.Map // by which the quota was looked up last
	quota         quota
	begun         bool // the numbers below count
	bytes, inodes int64
	tight         tight
	version       uint64    // of the newest that the keeper has said
	pinned        charge    // what requests on their way were given: it is not given back
	unknown       bool      // the map is too old to know the volume
	loose         bool      // lowered, and what was deleted before may not survive a power cut yet
	refused       charge    // what there was no room for,
	refusedAt     time.Time // when the keeper was asked for it last

	asking sync.Mutex // held by who asks the keeper; refused is guarded by it
}

// tight says of what nothing may grow without asking, also where something was freed: that the
// numbers of a limit are those of what there was, and there may be more than the quota.
type tight struct{ bytes, inodes bool }

// The bits of a Recall's Mode: there is more than the quota.
const (
	tightBytes = 1 << iota
	tightInodes
)

// plea is what a request was given that did not fit before.
type plea struct {
	soon, until time.Time // when it gives up if the keeper is away, or a store that has something
	given       charge
}

func (u *usage) add(v sealfs.Volume, bytes, inodes int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.book(charge{v, bytes, inodes})
}

// book is add with the lock held.
func (u *usage) book(c charge) {
	if u.of == nil {
		u.of = map[sealfs.Volume]charge{}
	}
	has := u.of[c.volume]
	u.of[c.volume] = charge{c.volume, has.bytes + c.bytes, has.inodes + c.inodes}
}

func (u *usage) get(v sealfs.Volume) charge {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.of[v]
}

// limit returns what the store may hold of a volume, brought up to date with the map.
// The lock is held.
func (u *usage) limit(v sealfs.Volume, m *cluster.Map) *limit {
	l := u.limits[v]
	if l == nil {
		if u.limits == nil {
			u.limits = map[sealfs.Volume]*limit{}
		}
		l = new(limit)
		u.limits[v] = l
	}
	if m == nil || l.m == m || l.m != nil && m.Version < l.m.Version {
		return l
	}
	l.m = m
	info, ok := m.VolumeByID(v)
	l.unknown = !ok && v >= m.NextVolume
	l.follow(quota{info.Bytes, info.Inodes, info.Since}, u.of[v])
	return l
}

// follow makes q the quota. Under one that is new the store may hold what it holds, and
// under one that was lowered no more than that: the keeper has to say what else.
func (l *limit) follow(q quota, has charge) {
	if l.begun && q.since < l.quota.since {
		return // a Recall knew a newer map
	}
	if !l.begun || q.since > l.quota.since {
		l.begun, l.bytes, l.inodes, l.tight = true, has.bytes, has.inodes, tight{true, true}
	}
	l.loose = true
	if q.bytes < l.quota.bytes {
		l.bytes, l.tight.bytes = min(l.bytes, has.bytes), true
	}
	if q.inodes < l.quota.inodes {
		l.inodes, l.tight.inodes = min(l.inodes, has.inodes), true
	}
	l.quota = q
}

// fits reports whether a volume that holds has may take c, too.
func (l *limit) fits(has, c charge) bool {
	return (l.quota.bytes == 0 || c.bytes <= 0 || !l.tight.bytes && has.bytes+c.bytes <= l.bytes) &&
		(l.quota.inodes == 0 || c.inodes <= 0 || !l.tight.inodes && has.inodes+c.inodes <= l.inodes)
}

// release gives up what a request was given and has not used. What it used it has booked.
func (u *usage) release(p *plea) {
	if p.given == (charge{}) {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.unpin(p)
}

// unpin is release with the lock held.
func (u *usage) unpin(p *plea) {
	if l := u.limits[p.given.volume]; l != nil {
		l.pinned.bytes -= p.given.bytes
		l.pinned.inodes -= p.given.inodes
	}
	p.given = charge{}
}

// newest returns the newest cluster map, nil if there is none.
func (s *Server) newest() *cluster.Map {
	if s.o.Map == nil {
		return nil
	}
	return s.o.Map()
}

// pay books charges, if every volume may hold what it then holds; else nothing is booked,
// the error is errShort, and what is short does not fit. What was voted for is paid for, and a
// volume without a root is of no use.
func (st *store) pay(t op.Type, cs []charge, p *plea) (short charge, err error) {
	m := st.srv.newest()
	u := &st.usage
	u.mu.Lock()
	defer u.mu.Unlock()
	u.unpin(p)
	for _, c := range cs {
		if m == nil || c.bytes <= 0 && c.inodes <= 0 || t == op.Commit || t == op.MakeRoot {
			continue
		}
		l := u.limit(c.volume, m)
		if l.unknown {
			return c, fmt.Errorf("volume %d is not in the cluster map of version %d yet: %w", c.volume, m.Version, sealfs.ErrUnavailable)
		}
		if !l.fits(u.of[c.volume], c) {
			return c, errShort
		}
	}
	for _, c := range cs {
		u.book(c)
	}
	return charge{}, nil
}

func (st *store) refund(cs []charge) {
	for _, c := range cs {
		st.usage.add(c.volume, -c.bytes, -c.inodes)
	}
}

// pin sets need apart for a request, if there is room for it.
func (u *usage) pin(need charge, p *plea) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	l, has := u.limits[need.volume], u.of[need.volume]
	if l == nil || !l.fits(charge{bytes: has.bytes + l.pinned.bytes, inodes: has.inodes + l.pinned.inodes}, need) {
		return false
	}
	p.given = charge{need.volume, max(need.bytes, 0), max(need.inodes, 0)}
	l.pinned.bytes += p.given.bytes
	l.pinned.inodes += p.given.inodes
	return true
}

// obtain waits until need fits, and sets it apart for the request of p. It returns
// sealfs.ErrQuota if the volume has no room for it.
func (st *store) obtain(ctx context.Context, t op.Type, need charge, p *plea) error {
	if p.until.IsZero() {
		p.until = time.Now().Add(st.srv.pace.plea)
		if p.soon = time.Now().Add(pleaMin); t == op.Prepare {
			p.until = p.soon
		}
	}
	came := time.Now()
	st.usage.mu.Lock()
	l := st.usage.limit(need.volume, st.srv.newest())
	st.usage.mu.Unlock()
	st.turns().Lock(&l.asking)
	defer l.asking.Unlock()
	for wait := time.Millisecond; !st.usage.pin(need, p); wait = min(2*wait, 100*time.Millisecond) {
		if l.refusedAt.After(came) && need.bytes >= l.refused.bytes && need.inodes >= l.refused.inodes {
			return sealfs.ErrQuota // another one has asked in the meantime
		}
		begun := time.Now()
		if begun.After(p.until) && wait == time.Millisecond {
			return fmt.Errorf("quota of volume %d: its keeper does not answer: %w", need.volume, sealfs.ErrUnavailable)
		}
		err := st.ask(ctx, need)
		now := time.Now()
		busy := errors.Is(err, sealfs.ErrBusy)
		switch {
		case errors.Is(err, sealfs.ErrQuota), busy && now.After(p.until): // what is left lies with a store that is away
			l.refused, l.refusedAt = need, begun
			return sealfs.ErrQuota
		case errors.Is(err, sealfs.ErrNotExist):
			return err // the volume is being deleted
		case err != nil && !busy && now.After(p.soon):
			st.srv.log.Debug("the keeper of a quota does not answer, or cannot know what is used", "volume", need.volume, "err", err)
			return fmt.Errorf("quota of volume %d: %w: %w", need.volume, sealfs.ErrUnavailable, err)
		case err == nil && now.After(p.until) && !st.usage.pin(need, p):
			return fmt.Errorf("quota of volume %d: others are always first: %w", need.volume, sealfs.ErrUnavailable)
		case err == nil && p.given != (charge{}):
			return nil
		case err == nil:
			continue // it is there, or was recalled at once
		}
		if err := st.pause(ctx, wait); err != nil {
			return err
		}
	}
	return nil
}

// room refuses a Fallocate of more than the volume has room for now. Nothing is set apart for
// it. What chunks hold is not known here, and counts as if nothing had to be added.
func (st *store) room(ctx context.Context, req *op.Request) error {
	m := st.srv.newest()
	if m == nil || req.Mode&(punchHole|zeroRange) != 0 || req.Len == 0 || req.Off > sealfs.FileSizeMax || req.Len > sealfs.FileSizeMax-req.Off {
		return nil
	}
	var in meta.Inode
	if err := st.inode(req.Ino, &in); err != nil {
		return err
	}
	st.usage.mu.Lock()
	quota := st.usage.limit(in.Volume, m).quota.bytes
	st.usage.mu.Unlock()
	home, end := uint64(math.MaxInt64), req.Off+req.Len
	if in.Chunked() {
		home = sealfs.HomeBytes
	}
	need := min(end, home) - min(req.Off, home)
	need -= min(need, in.Bytes)
	if from := max(req.Off, in.Bound, home); end > from {
		need += end - from
	}
	switch {
	case quota == 0 || need == 0:
		return nil
	case need > quota:
		return sealfs.ErrQuota
	}
	var p plea
	defer st.usage.release(&p)
	return st.obtain(ctx, req.Type, charge{in.Volume, int64(need), 0}, &p)
}

// pause waits for a while, unless ctx or the server ends.
func (st *store) pause(ctx context.Context, d time.Duration) error {
	mine := st.turns().Mine()
	defer mine.Take()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", context.Cause(ctx), sealfs.ErrInterrupted)
	case <-st.srv.quit:
		return fmt.Errorf("server: %w", sealfs.ErrClosed)
	}
}

// ask asks the keeper of the quota for room for need.
func (st *store) ask(ctx context.Context, need charge) error {
	m, u, v := st.srv.newest(), &st.usage, need.volume
	u.mu.Lock()
	l, has := u.limit(v, m), u.of[v]
	q, version := l.quota, l.version
	bytes, inodes := max(l.bytes, has.bytes), max(l.inodes, has.inodes)
	u.mu.Unlock()
	id := st.ID()
	req := op.Request{
		Type: op.Grant, Shard: rootShard(v, st.srv.cfg.Shards), Volume: v, Data: id[:], Off: uint64(bytes), Len: uint64(inodes), Gen: version,
		Size: q.since, Ctime: int64(m.Version), Atime: max(need.bytes, 0), Mtime: max(need.inodes, 0),
	}
	var rep op.Reply
	bound, stop := context.WithTimeout(ctx, askTimeout)
	defer stop()
	err := st.srv.ask(bound, &req, &rep)
	if err == nil && rep.Code != 0 {
		err = rep.Code
	}
	if err != nil {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	// What was recalled meanwhile, or given under an older quota, does not count.
	if rep.Off > l.version && l.quota == q {
		l.version, l.bytes, l.inodes = rep.Off, int64(rep.Space.Bytes), int64(rep.Space.Inodes)
		l.tight = tight{rep.Space.BytesFree == 0, rep.Space.InodesFree == 0}
	}
	return nil
}

// recall answers Recall: the store may hold of the volume what it holds, and no more. That
// survives a power cut when it is answered: nobody else gets what a deletion has freed that
// could still be undone.
func (st *store) recall(req *op.Request, rep *op.Reply) error {
	u, lowered := &st.usage, false
	soon := st.reclaim.soon() // before: what is freed in between is seen
	// No change is half-way while the store is looked at.
	err := st.View(func(pmem.Reader) error {
		u.mu.Lock()
		defer u.mu.Unlock()
		l, has := u.limit(req.Volume, st.srv.newest()), u.of[req.Volume]
		if q := (quota{req.Off, req.Len, req.Size}); !l.begun || q.since > l.quota.since {
			l.follow(q, has)
		}
		bytes, inodes := has.bytes+l.pinned.bytes, has.inodes+l.pinned.inodes
		lowered = l.loose || bytes < l.bytes || inodes < l.inodes
		l.bytes, l.inodes, l.loose = min(l.bytes, bytes), min(l.inodes, inodes), lowered
		l.version = max(l.version, req.Gen)
		l.tight.bytes, l.tight.inodes = l.tight.bytes || req.Mode&tightBytes != 0, l.tight.inodes || req.Mode&tightInodes != 0
		rep.Space = op.Space{Bytes: uint64(max(l.bytes, has.bytes, 0)), Inodes: uint64(max(l.inodes, has.inodes, 0))}
		rep.Off = l.version
		return nil
	})
	rep.Eof = !soon
	if err != nil || !lowered {
		return err
	}
	if err := st.Sync(); err != nil {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if l := u.limits[req.Volume]; int64(rep.Space.Bytes) <= l.bytes && int64(rep.Space.Inodes) <= l.inodes {
		l.loose = false // it was not lowered again meanwhile
	}
	return nil
}
