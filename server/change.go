package server

import (
	"context"
	"errors"
	"sync"
	"time"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/lease"
	"sealfs/lsfs"
	"sealfs/lsfs/layout"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/txn"
)

// change is one request on its way through the store. It is the lsfs.Change
// that executes it and the meta.Space that keeps account of it.
type change struct {
	*lsfs.Tx // while Apply runs
	st       *store
	req      *op.Request
	rep      *op.Reply
	in       lsfs.Intent
	buf      []byte // the encoded operation
	cfg      meta.Config
	charges  []charge
	paid     bool   // the charges are booked
	short    charge // what does not fit into a volume's quota
	plea     *plea  // to get it: own, or the claim's
	own      plea
	locks    []lockCount
	counted  bool        // the locks are booked
	held     sealfs.Ino  // registered as held by this change
	locked   *op.Request // the part whose locks were taken
	freed    txn.Dropped // the locks that were given up
	claim    *claim      // what the request takes back from others; nil: it alters nothing that they could believe
	altered  []lease.Change
	gone     []sealfs.Ino                   // inodes that were freed
	noted    func(sealfs.Ino, string, bool) // note; made once, since it takes an allocation
}

// errRefused carries a refusal through the store, errHeld the news that what
// loses its last name is held open.
var (
	errRefused = errors.New("refused")
	errHeld    = errors.New("held open")
)

var changes = sync.Pool{New: func() any {
	c := new(change)
	c.noted = c.note
	return c
}}

// change executes a request that changes the namespace. payload is what a Write
// logs.
func (st *store) change(req *op.Request, rep *op.Reply, payload []byte) error {
	return st.changeFor(nil, req, rep, payload)
}

// changeFor is change of a request that may alter what others believe; then it
// returns errLeased.
func (st *store) changeFor(cl *claim, req *op.Request, rep *op.Reply, payload []byte) error {
	end, err := st.executeFor(context.Background(), cl, req, rep, payload)
	if err != nil || !st.srv.o.Durable || rep.Code != 0 {
		return err
	}
	return st.SyncTo(end)
}

// changeWithin is change of a request without a payload, that may have to wait for
// transactions, and may become one itself.
func (st *store) changeWithin(ctx context.Context, req *op.Request, rep *op.Reply) error {
	end, err := st.execute(ctx, req, rep, nil)
	if isForeign(err) {
		return st.transact(ctx, req, rep)
	}
	if err != nil || !st.srv.o.Durable || rep.Code != 0 {
		return err
	}
	return st.SyncTo(end)
}

// execute executes a change and returns where its record ends. It waits for
// transactions that are in its way, unless it must die: then it answers ErrDeadlock. It
// waits for leases, too.
func (st *store) execute(ctx context.Context, req *op.Request, rep *op.Reply, payload []byte) (sealfs.LSN, error) {
	cl := claimFor(req)
	defer cl.end(st)
	return st.executePatiently(ctx, cl, req, rep, payload)
}

func (st *store) executePatiently(ctx context.Context, cl *claim, req *op.Request, rep *op.Reply, payload []byte) (sealfs.LSN, error) {
	for {
		end, err := st.executeFor(ctx, cl, req, rep, payload)
		if err != errLeased {
			return end, err
		}
		if err := st.regain(ctx, cl); err != nil {
			return end, err
		}
	}
}

// executeFor is execute that returns errLeased instead of waiting for leases. A
// request that alters nothing that others could believe needs no claim.
func (st *store) executeFor(ctx context.Context, cl *claim, req *op.Request, rep *op.Reply, payload []byte) (sealfs.LSN, error) {
	c := changes.Get().(*change)
	c.st, c.req, c.rep = st, req, rep
	c.plea = &c.own
	if cl != nil {
		c.plea = &cl.plea
		if alters(req.Type) && !cl.part {
			c.claim = cl
		}
	}
	defer c.free()
	if req.Type == op.Commit {
		st.follow(req.Mtime)
	}
	if need := brings(req); need != 0 {
		if err := st.Require(need); err != nil {
			return 0, err
		}
	}
	req.Time = st.now()
	req.Flags &^= op.Held
	c.in = lsfs.Intent{Class: class(req.Type), Payload: payload, Ino: req.Ino, Offset: req.Off}
	if payload != nil {
		c.in.PayloadCRC = enc.CRC(0, payload)
	}
	for {
		c.cfg = st.config()
		c.cfg.Altered = c.noted
		if req.Type == op.Tally {
			c.cfg.Queued = st.follows
		}
		c.buf = req.AppendTo(c.buf[:0])
		c.in.Op = c.buf
		end, err := st.Update(&c.in, c)
		switch {
		case err == nil:
			c.freed.Tell()
			for _, ino := range c.gone {
				st.leases.Forget(ino)
			}
			st.after(req, rep)
			return end, nil
		case err == errHeld:
			req.Flags |= op.Held
			continue
		}
		c.Undo()
		if err == errRefused {
			return end, nil
		}
		if err == errShort && cl != nil && cl.first {
			cl.short = c.short
			return end, err
		}
		if err == errShort {
			if err := st.obtain(ctx, req.Type, c.short, c.plea); err == sealfs.ErrQuota {
				rep.Reset()
				rep.Code = sealfs.ErrQuota
				return end, nil
			} else if err != nil {
				return end, err
			}
			continue
		}
		if err = st.await(ctx, err, req.Tx); err == errDie {
			rep.Reset()
			rep.Code = sealfs.ErrDeadlock
			return end, nil
		}
		if err != nil {
			return end, err
		}
	}
}

// brings returns the features that a request may bring to a store that has them not: ACLs
// and totals, which are handed down from there on.
func brings(req *op.Request) (features uint64) {
	switch req.Type {
	case op.Setxattr:
		if req.Name == op.ACLAccess || req.Name == op.ACLDefault {
			features = layout.FeatureACL
		}
	case op.MakeRoot:
		features = layout.FeatureTotals
	case op.Prepare:
		if req.Part == op.PartNew && len(req.Data) > 0 {
			features = layout.FeatureACL
		}
		if req.Part == op.PartNew && req.Flags&op.Counted != 0 {
			features |= layout.FeatureTotals
		}
	case op.Partition:
		if req.Mode != op.PartitionAdd && len(req.Data) > 0 {
			features = layout.FeatureACL
		}
		if req.Mode == op.PartitionBegin && req.Flags&op.Counted != 0 {
			features |= layout.FeatureTotals
		}
	}
	return features
}

// class says which requests may use the reserve of a full store.
func class(t op.Type) lsfs.Class {
	switch t {
	case op.Commit, op.Abort, op.Forget, op.Unlink, op.Rmdir, op.Reclaim, op.Purge, op.Split, op.Removexattr, op.DropOwner, op.DropSession, op.DropVolume, op.Setattr, op.SetLock, op.Grant, op.Tally:
		return lsfs.Freeing
	}
	return lsfs.Normal
}

// now returns the time of a change: the clock, or just after the last change
// if the clock stands still or goes back.
func (st *store) now() int64 {
	for {
		last := st.last.Load()
		t := max(time.Now().UnixNano(), last+1)
		if st.last.CompareAndSwap(last, t) {
			return t
		}
	}
}

// aheadMax bounds how far another server's clock may pull a store's along.
const aheadMax = time.Minute

// follow makes what happens from now on later than t, a time of another server's clock.
func (st *store) follow(t int64) {
	if t > time.Now().Add(aheadMax).UnixNano() {
		return
	}
	for last := st.last.Load(); last < t && !st.last.CompareAndSwap(last, t); {
		last = st.last.Load()
	}
}

// Apply executes the request under the store's lock.
func (c *change) Apply(tx *lsfs.Tx) error {
	c.Undo()
	c.Tx = tx
	c.rep.Reset()
	if c.st.srv.ended(c.req.Session) {
		c.rep.Code = sealfs.ErrSession
		return errRefused
	}
	if c.req.Session != 0 && c.req.Session != volumeSession && c.st.srv.unattended() {
		c.rep.Code = sealfs.ErrUnavailable
		return errRefused
	}
	if err := meta.Apply(tx.Tx, c, c.cfg, c.req, c.rep); err != nil {
		return err
	}
	if c.rep.Code != 0 {
		return errRefused
	}
	if c.rep.Dir.Ino != 0 && !meta.Settled(&c.cfg, c.req, &c.rep.Dir) {
		c.rep.Dir = op.Attr{} // who wants to know asks, and waits
	}
	if c.rep.Held != 0 && c.req.Flags&op.Held == 0 && c.st.holds.any(c.rep.Held) {
		return errHeld
	}
	var err error
	if c.short, err = c.st.pay(c.req.Type, c.charges, c.plea); err != nil {
		return err
	}
	c.paid = true
	if c.counted = c.st.lockCounts.add(c.locks, &c.st.srv.lockLimits); !c.counted {
		c.rep.Reset()
		c.rep.Code = sealfs.ErrNoLocks
		return errRefused
	}
	if c.req.Flags&op.OpenIt != 0 && c.rep.Attr.Ino != 0 {
		c.held = c.rep.Attr.Ino
		c.st.holds.add(c.req.Session, c.held, c.writes())
		if c.st.srv.ended(c.req.Session) { // just now: who ends it may have looked before
			c.Undo()
			c.rep.Reset()
			c.rep.Code = sealfs.ErrSession
			return errRefused
		}
	}
	// After the hold: who closes a file gives up its lease to write.
	if !c.lease() {
		return errLeased
	}
	switch c.req.Type {
	case op.Prepare:
		part := *c.req
		if c.st.parties.locks.Add(&part) {
			c.locked = &part
		}
	case op.Commit, op.Abort:
		c.freed = c.st.parties.locks.Drop(c.req.Tx, c.req.Shard)
	}
	return nil
}

// Undo takes back what an execution did outside the region: the store may
// execute a change again.
func (c *change) Undo() {
	if c.paid {
		c.st.refund(c.charges)
	}
	c.charges, c.paid = c.charges[:0], false
	if c.counted {
		c.st.lockCounts.undo(c.locks)
	}
	c.locks, c.counted = c.locks[:0], false
	c.altered, c.gone = c.altered[:0], c.gone[:0]
	if c.held != 0 {
		c.st.holds.drop(c.req.Session, c.held, 1)
		c.held = 0
	}
	if c.locked != nil {
		c.st.parties.locks.Remove(c.locked)
		c.locked = nil
	}
	c.st.parties.locks.Undo(c.freed)
	c.freed = txn.Dropped{}
}

// Charge keeps account for the volume (meta.Space).
func (c *change) Charge(v sealfs.Volume, bytes, inodes int64) {
	for i := range c.charges {
		if c.charges[i].volume == v {
			c.charges[i].bytes += bytes
			c.charges[i].inodes += inodes
			return
		}
	}
	c.charges = append(c.charges, charge{v, bytes, inodes})
}

// CountLocks counts what sessions hold (meta.LockAccount).
func (c *change) CountLocks(sess sealfs.Session, n int) {
	for i := range c.locks {
		if c.locks[i].session == sess {
			c.locks[i].n += n
			return
		}
	}
	c.locks = append(c.locks, lockCount{sess, n})
}

func (c *change) free() {
	c.st.usage.release(&c.own)
	*c = change{buf: c.buf[:0], charges: c.charges[:0], locks: c.locks[:0], altered: c.altered[:0], gone: c.gone[:0], noted: c.noted}
	changes.Put(c)
}

// after does what a change that happened entails.
func (st *store) after(req *op.Request, rep *op.Reply) {
	switch req.Type {
	case op.Commit, op.Abort:
		rep.Off = uint64(st.Incarnation()) // see finisher
	case op.Tally:
		if req.Mode == op.TallyTake {
			rep.Off = uint64(st.Incarnation()) // see teller
		}
	case op.Create, op.Mknod, op.Mkdir, op.Symlink, op.Link:
		if rep.Dir.Ino != 0 {
			st.notice(&rep.Dir)
		}
	case op.SetLock, op.DropOwner:
		st.locks.wake(req.Ino)
	case op.DropSession:
		st.locks.wakeAll()
	}
	if rep.Held != 0 && !rep.Eof && req.Type != op.Reclaim {
		st.reclaim.add(rep.Held)
	}
	switch req.Type {
	case op.Reclaim, op.Purge, op.DropVolume, op.DropSession, op.Tally, op.Split, op.Partition:
	default:
		rep.Held, rep.Eof = 0, false // the server's own business
	}
}
