package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"sealfs"
	"sealfs/cluster"
	"sealfs/lsfs/layout"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// The keeper of a volume's quota is the store of its root's shard. It has a row for each
// store that may hold anything of the volume (meta.Grant): that store's limit, or more. A row is
// raised before the store hears of it, and lowered after the store has done so itself. Who asks
// gets what it needs and a part of what remains. When there is not enough, all stores are asked
// to give back what they do not use; only then somebody is told that the quota is used up.

const (
	// recallTimeout bounds how long a store may take to give back what it does not use.
	recallTimeout = 2 * time.Second
	// freeingMax is how long the keeper waits for what stores are about to free.
	freeingMax = 500 * time.Millisecond
	// shareBytes and shareInodes are the least that a store gets beyond what it needs, if
	// there is as much.
	shareBytes, shareInodes = 1 << 20, 64
)

// rounds are the volumes whose quotas a store keeps.
type rounds struct {
	mu sync.Mutex
	of map[sealfs.Volume]*keeping
}

// keeping is one of them: one store after the other is given something.
type keeping struct {
	sync.Mutex
	seen bool // the stores were asked since the start: a row may have been lost to a repair
}

func (r *rounds) volume(v sealfs.Volume) *keeping {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.of == nil {
		r.of = map[sealfs.Volume]*keeping{}
	}
	if r.of[v] == nil {
		r.of[v] = new(keeping)
	}
	return r.of[v]
}

// round is the keeper at work for one store that asks.
type round struct {
	st      *store
	volume  sealfs.Volume
	quota   quota
	members []member
	rows    map[sealfs.UUID]meta.Grant // of this quota
	changed map[sealfs.UUID]struct{}
	asker   sealfs.UUID
	need    charge
}

// member is a store that holds shards, and one of them.
type member struct {
	id    sealfs.UUID
	shard sealfs.Shard
}

// members lists the stores that hold shards.
func members(m *cluster.Map) []member {
	var list []member
	seen := make(map[uint16]struct{})
	for s, row := range m.Table {
		if len(row.Replicas) == 0 {
			continue
		}
		at := row.Replicas[0]
		if _, ok := seen[at]; ok || int(at) >= len(m.Stores) {
			continue
		}
		seen[at] = struct{}{}
		list = append(list, member{m.Stores[at].ID, sealfs.Shard(s)})
	}
	return list
}

// grant answers Grant.
func (st *store) grant(ctx context.Context, req *op.Request, rep *op.Reply) error {
	r := round{st: st, volume: req.Volume, changed: map[sealfs.UUID]struct{}{}, need: charge{req.Volume, req.Atime, req.Mtime}}
	if copy(r.asker[:], req.Data) != len(req.Data) || len(req.Data) != len(r.asker) || req.Shard != rootShard(req.Volume, st.srv.cfg.Shards) ||
		req.Atime < 0 || req.Mtime < 0 || max(req.Off, req.Len, uint64(req.Atime), uint64(req.Mtime)) > math.MaxInt64/4 {
		return fmt.Errorf("question for a quota is malformed: %w", sealfs.ErrInvalid)
	}
	k := st.rounds.volume(req.Volume)
	st.turns().Lock(k)
	defer k.Unlock()
	m := st.srv.newest()
	if m == nil || m.Version < uint64(req.Ctime) {
		return fmt.Errorf("who asks for a quota knows a newer map: %w", sealfs.ErrUnavailable)
	}
	info, ok := m.VolumeByID(req.Volume)
	if !ok {
		return fmt.Errorf("volume %d is gone: %w", req.Volume, sealfs.ErrNotExist)
	}
	r.quota, r.members = quota{info.Bytes, info.Inodes, info.Since}, members(m)
	if err := r.load(); err != nil {
		return err
	}
	claim := meta.Grant{Bytes: int64(req.Off), Inodes: int64(req.Len), Version: req.Gen, Since: req.Size}
	code, err := r.run(ctx, claim, k.seen)
	k.seen = true
	if serr := r.save(); serr != nil {
		return errors.Join(err, serr)
	}
	if err != nil || code != 0 {
		rep.Code = code
		return err
	}
	g, over := r.rows[r.asker], r.over()
	rep.Space, rep.Off = op.Space{Bytes: uint64(g.Bytes), Inodes: uint64(g.Inodes)}, g.Version
	// It may grow without asking only if there is not more than the quota.
	if !over.bytes {
		rep.Space.BytesFree = 1
	}
	if !over.inodes {
		rep.Space.InodesFree = 1
	}
	return st.Sync()
}

// load reads the rows. Those of the time before the quota came into force say nothing.
func (r *round) load() error {
	r.rows = make(map[sealfs.UUID]meta.Grant, len(r.members))
	return r.st.View(func(reg pmem.Reader) error {
		return meta.Grants(reg, rootShard(r.volume, r.st.srv.cfg.Shards), r.volume, func(id sealfs.UUID, g meta.Grant) {
			if g.Since == r.quota.since {
				r.rows[id] = g
			}
		})
	})
}

// set changes a row.
func (r *round) set(id sealfs.UUID, g meta.Grant) {
	if r.rows[id] != g {
		r.rows[id] = g
		r.changed[id] = struct{}{}
	}
}

// save writes the rows that have changed, that of who asks last: what others have given
// back must be in the log before it.
func (r *round) save() error {
	if len(r.changed) == 0 {
		return nil
	}
	if err := r.st.Require(layout.FeatureGrants); err != nil {
		return err
	}
	list := make([]sealfs.UUID, 0, len(r.changed))
	for id := range r.changed {
		list = append(list, id)
	}
	slices.SortFunc(list, func(a, b sealfs.UUID) int {
		switch {
		case a == r.asker:
			return 1
		case b == r.asker:
			return -1
		}
		return bytes.Compare(a[:], b[:])
	})
	for _, id := range list {
		g := r.rows[id]
		req := op.Request{
			Type: op.Grant, Shard: rootShard(r.volume, r.st.srv.cfg.Shards), Volume: r.volume, Data: id[:],
			Off: uint64(g.Bytes), Len: uint64(g.Inodes), Gen: g.Version, Size: g.Since,
		}
		var rep op.Reply
		if err := r.st.change(&req, &rep, nil); err != nil {
			return err
		}
		if rep.Code != 0 {
			return rep.Code
		}
	}
	return nil
}

// run gives the asker, whose limits are claim, what it needs. The code says why that
// cannot be: ErrQuota; ErrBusy if a store is away that may have something to give back;
// ErrUnavailable if it is not known what a store holds.
func (r *round) run(ctx context.Context, claim meta.Grant, seen bool) (sealfs.Code, error) {
	if _, ok := r.rows[r.asker]; !ok && claim.Since == r.quota.since {
		r.rows[r.asker] = claim // it is changed below, or recalled
	}
	if seen && r.known() && claim.Since == r.quota.since && r.over() == (tight{}) && r.give(claim, claim.Version) {
		return 0, nil
	}
	for until := time.Now().Add(freeingMax); ; {
		away, soon := r.recall(ctx)
		if row, ok := r.rows[r.asker]; ok && r.known() && r.give(row, claim.Version) {
			return 0, nil
		}
		switch {
		case !r.known() || away == r.asker:
			return sealfs.ErrUnavailable, nil
		case soon && time.Now().Before(until):
			if err := r.st.pause(ctx, 5*time.Millisecond); err != nil {
				return 0, err
			}
			continue
		case !away.IsZero():
			return sealfs.ErrBusy, nil
		}
		return sealfs.ErrQuota, nil
	}
}

// known reports whether it is known of all stores what they hold at most.
func (r *round) known() bool {
	if r.quota.since == cluster.BornLimited {
		return true // who has no row was given nothing
	}
	return !slices.ContainsFunc(r.members, func(m member) bool {
		_, ok := r.rows[m.id]
		return !ok
	})
}

// given adds all limits up.
func (r *round) given() (bytes, inodes int64) {
	for _, g := range r.rows {
		bytes, inodes = bytes+g.Bytes, inodes+g.Inodes
	}
	return bytes, inodes
}

// over reports of what more was given than there is, or may have been: the quota was lowered.
func (r *round) over() tight {
	bytes, inodes := r.given()
	return tight{
		r.quota.bytes != 0 && (!r.known() || uint64(bytes) > r.quota.bytes),
		r.quota.inodes != 0 && (!r.known() || uint64(inodes) > r.quota.inodes),
	}
}

// give raises the limits of who asks, which are now in force there as has says, as far as
// it needs and by a part of what remains, and reports whether there was enough. The asker
// knows of version.
func (r *round) give(has meta.Grant, version uint64) bool {
	row := r.rows[r.asker]
	bytes, inodes := r.given()
	b, ok1 := r.raise(has.Bytes, row.Bytes, r.need.bytes, bytes, r.quota.bytes, shareBytes)
	i, ok2 := r.raise(has.Inodes, row.Inodes, r.need.inodes, inodes, r.quota.inodes, shareInodes)
	if !ok1 || !ok2 {
		return false
	}
	r.set(r.asker, meta.Grant{Bytes: b, Inodes: i, Version: max(row.Version, has.Version, version) + 1, Since: r.quota.since})
	return true
}

// raise returns the new limit of one kind: has is in force, row is noted of it, given is
// the sum of all rows.
func (r *round) raise(has, row, need, given int64, quota uint64, least int64) (int64, bool) {
	wanted := max(has+need, row)
	if quota == 0 || need == 0 {
		return wanted, true
	}
	extra := wanted - row
	room := int64(min(quota, math.MaxInt64/2)) - given - extra
	if room < 0 {
		return 0, false
	}
	part := room
	if n := int64(len(r.members)); n > 1 {
		part = max(room/(2*n), min(room, least))
	}
	return wanted + part, true
}

// recall asks all stores to give back what they do not use. It returns one that does not answer, and
// whether one is about to free something.
func (r *round) recall(ctx context.Context) (away sealfs.UUID, soon bool) {
	bound, stop := context.WithTimeout(ctx, recallTimeout)
	defer stop()
	var mode uint32
	over := r.over()
	if over.bytes {
		mode |= tightBytes
	}
	if over.inodes {
		mode |= tightInodes
	}
	reps, errs := make([]op.Reply, len(r.members)), make([]error, len(r.members))
	r.st.each(len(r.members), func(i int) {
		m := r.members[i]
		req := op.Request{
			Type: op.Recall, Shard: m.shard, Volume: r.volume, Off: r.quota.bytes, Len: r.quota.inodes, Size: r.quota.since, Mode: mode,
			Gen: r.rows[m.id].Version + 1,
		}
		if errs[i] = r.st.srv.ask(bound, &req, &reps[i]); errs[i] == nil {
			errs[i] = reps[i].Err()
		}
	})
	for i, m := range r.members {
		if errs[i] != nil {
			r.st.srv.log.Debug("a store does not say what it uses of a volume", "volume", r.volume, "store", m.id, "err", errs[i])
			away = m.id
			continue
		}
		rep := &reps[i]
		r.set(m.id, meta.Grant{
			Bytes: int64(min(rep.Space.Bytes, math.MaxInt64/4)), Inodes: int64(min(rep.Space.Inodes, math.MaxInt64/4)),
			Version: max(rep.Off, 1), Since: r.quota.since,
		})
		soon = soon || !rep.Eof
	}
	return away, soon
}
