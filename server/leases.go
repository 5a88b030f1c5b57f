package server

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"sealfs"
	"sealfs/lease"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

const (
	// prepareLeases is how long a party that has promised nothing yet waits for a
	// lease to be given back: the other parties are held up meanwhile.
	prepareLeases = 50 * time.Millisecond
	// watchMax bounds how long a Watch waits.
	watchMax = time.Minute
)

// errLeased says that others hold leases on what a change would alter, or a
// question would tell: they are being taken back, and it must be done anew. Who gets it
// gives up what it holds before it waits: see regain.
var errLeased = errors.New("leased to others")

// internalSession is that of questions which servers ask for their own purposes:
// nobody believes the answers beyond the request, and whoever delays writes may be
// waiting for just that request.
const internalSession = volumeSession

// claim is what one request takes back from others, over all the changes that it
// makes and all its attempts.
type claim struct {
	as     sealfs.Session // on whose behalf; steps of a request may have no session of their own
	keep   bool           // what is taken back stays so until the end, since half of it may be done
	ticket *lease.Ticket
	woken  chan struct{}
	poke   func() // of woken

	// Of quotas: a change that finds no room returns errShort with what is short, since its sender
	// holds a stripe and can begin again.
	first bool
	// part says that a chunk is changed, which is leased with the inode: see op.Extend.
	part  bool
	short charge
	plea  plea
}

var claims = sync.Pool{New: func() any {
	c := &claim{woken: make(chan struct{}, 1)}
	c.poke = func() { poke(c.woken) }
	return c
}}

func claimFor(req *op.Request) *claim {
	c := claims.Get().(*claim)
	c.as = req.Session
	return c
}

// end gives up what the request keeps from others.
func (c *claim) end(st *store) {
	if c.ticket != nil {
		st.leases.Done(c.ticket)
		c.ticket = nil
	}
	st.usage.release(&c.plea)
	c.keep, c.first, c.part, c.plea = false, false, false, plea{}
	claims.Put(c)
}

// regain waits until what a request has asked back has been given back, or its
// holders' sessions have ended. The caller holds nothing that anybody waits for.
func (st *store) regain(ctx context.Context, c *claim) error {
	select {
	case <-c.woken: // of an earlier wait
	default:
	}
	mine := st.turns().Mine()
	defer mine.Take()
	for !st.leases.Notify(c.ticket, c.poke) {
		select {
		case <-c.woken:
		case <-ctx.Done():
			return fmt.Errorf("%w: %w: %w", errLeased, context.Cause(ctx), sealfs.ErrInterrupted)
		case <-st.srv.quit:
			return fmt.Errorf("server: %w", sealfs.ErrClosed)
		}
	}
	return nil
}

// patiently does something that takes locks of its own to make changes, as often as
// others hold leases that are in the way.
func (st *store) patiently(ctx context.Context, req *op.Request, rep *op.Reply, do func(*store, context.Context, *claim, *op.Request, *op.Reply) error) error {
	c := claimFor(req)
	defer c.end(st)
	for {
		err := do(st, ctx, c, req, rep)
		switch err {
		case errLeased:
			err = st.regain(ctx, c)
		case errShort:
			err = st.obtain(ctx, req.Type, c.short, &c.plea)
		default:
			return err
		}
		rep.Reset()
		if err != nil {
			return err
		}
	}
}

// alters reports whether requests of type t change what sessions may believe. What
// a Commit does has been taken back by its Prepare; Reclaim and its like free
// what nobody sees.
func alters(t op.Type) bool {
	switch t {
	case op.Create, op.Mknod, op.Mkdir, op.Symlink, op.Link, op.Unlink, op.Rmdir, op.Rename, op.Tmpfile,
		op.Setattr, op.Write, op.Fallocate, op.Setxattr, op.Removexattr, op.Extend, op.Prepare,
		op.Split, op.Partition:
		return true
	}
	return false
}

// note is meta.Config.Altered.
func (c *change) note(ino sealfs.Ino, name string, gone bool) {
	switch n := len(c.altered); {
	case gone:
		c.gone = append(c.gone, ino)
	case c.claim != nil && (n == 0 || c.altered[n-1].Ino != ino || c.altered[n-1].Name != name):
		c.altered = append(c.altered, lease.Change{Ino: ino, Name: name})
	}
}

// lease takes back what others hold of what the change has just altered, under the
// store's lock, and reports whether there is nothing. Then it grants what the answer tells.
func (c *change) lease() bool {
	st, req, rep := c.st, c.req, c.rep
	if c.claim == nil || st.leases.Idle() && !c.claim.keep {
		return true
	}
	a := lease.Ask{Session: c.claim.as, Changes: c.altered, Keep: c.claim.keep, Ticket: c.claim.ticket}
	if req.Type == op.Prepare {
		a.Behalf = sealfs.Session(req.Lock.Owner)
	}
	told := false
	for i := range a.Changes {
		x := &a.Changes[i]
		same := x.Name == "" && x.Ino == rep.Attr.Ino
		told = told || same
		// Its sender does not know of it by the answer. But a mount knows what it has read.
		x.Self = x.Name == "" && !same && (req.Type != op.Setattr || req.Valid&op.SetAccess == 0)
	}
	if attr := &rep.Attr; attr.Version != 0 && req.Type != op.Prepare && st.local(attr.Ino.Home(st.srv.cfg.Shards)) {
		if !told {
			a.Tells = attr.Ino
		}
		if st.settledAttr(&c.cfg, req, attr) && (attr.Nlink > 0 || req.Type == op.Tmpfile) {
			a.Ino = attr.Ino
			a.Write = attr.Mode&modeType == modeRegular && c.writes()
		}
	}
	if rep.Dir.Ino == req.Dir {
		a.Dir = req.Dir
	}
	st.withhold(&a)
	free := st.leases.Ask(&a)
	c.claim.ticket = a.Ticket
	rep.Lease, rep.Stamp = a.Lease, a.Stamp
	return free
}

// writes reports whether the sender of a change of a file would delay writes to it.
func (c *change) writes() bool {
	switch c.req.Type {
	case op.Create, op.Tmpfile:
		return c.req.Flags&op.OpenIt != 0 && (len(c.altered) > 0 || c.req.Flags&op.WantWrite != 0 || c.req.Type == op.Tmpfile)
	case op.Write, op.Setattr, op.Fallocate, op.Extend:
		return c.st.holds.writes(c.claim.as, c.req.Ino, c.req.Flags&op.WantWrite != 0)
	}
	return false
}

// settledAttr is meta.Settled, which most of the time need not be asked.
func (st *store) settledAttr(cfg *meta.Config, req *op.Request, a *op.Attr) bool {
	return st.parties.locks.Empty() || meta.Settled(cfg, req, a)
}

// tell makes sure that nobody else alone knows what the answer to a question tells,
// and grants what its sender may believe of it. It is called under the lock under
// which the answer was read.
func (st *store) tell(req *op.Request, rep *op.Reply, c *claim) error {
	if st.leases.Idle() || req.Session == internalSession {
		return nil
	}
	a := lease.Ask{Session: req.Session, Ticket: c.ticket}
	cfg := st.config()
	// Attributes that a transaction has in hand are told after a while, and so are
	// those that a later one has: nobody may believe them for long.
	ino := rep.Attr.Ino
	if rep.Attr.Version == 0 || !st.local(ino.Home(st.srv.cfg.Shards)) {
		ino = 0
	}
	settled := ino != 0 && st.settledAttr(&cfg, req, &rep.Attr)
	switch req.Type {
	case op.Lookup:
		if rep.Code != 0 && rep.Code != sealfs.ErrNotExist {
			return nil
		}
		if st.parties.locks.Empty() || st.guard(req.Tx, meta.Touch{Kind: meta.TouchName, Ino: req.Dir, Name: req.Name}) == nil {
			a.Dir = req.Dir
		}
		a.Tells = ino
	case op.Getattr, op.Readlink, op.Seek, op.Open:
		a.Tells = ino
	case op.Readdir:
		if settled {
			a.Dir, settled = ino, false // LeaseIno is about the entries
		}
	default:
		return nil
	}
	if rep.Code != 0 && req.Type != op.Lookup {
		return nil
	}
	if settled {
		a.Ino = ino
		a.Write = req.Type == op.Open && req.Flags&op.WantWrite != 0 && rep.Attr.Mode&modeType == modeRegular
	}
	st.withhold(&a)
	if !st.leases.Ask(&a) {
		c.ticket = a.Ticket
		return errLeased
	}
	if req.Type == op.Readdir && req.Flags&op.Plus != 0 {
		if st.splits.busy.Load() > 0 {
			for i := range rep.Entries {
				if e := &rep.Entries[i].Attr; st.splits.has(e.Ino) {
					*e = op.Attr{} // see withhold
				}
			}
		}
		if !st.parties.locks.Empty() {
			for i := range rep.Entries {
				if e := &rep.Entries[i].Attr; e.Ino != 0 && !meta.Settled(&cfg, req, e) {
					*e = op.Attr{}
				}
			}
		}
		a.Lease |= st.leases.List(&a, rep.Entries)
	}
	if rep.Lease = a.Lease; a.Lease != 0 {
		rep.Stamp = a.Stamp
	}
	return nil
}

// withhold grants nothing on a directory with whose partitions something goes on: what is
// said of it may change without a revocation.
func (st *store) withhold(a *lease.Ask) {
	if a.Ino != 0 && st.splits.has(a.Ino) {
		a.Ino, a.Write = 0, false
	}
	if a.Dir != 0 && st.splits.has(a.Dir) {
		a.Dir = 0
	}
}

// awaitWriter returns when nobody but a session itself delays writes to ino, for a
// question for data. Nothing is granted, so it need not be asked together with the
// data: a write that is delayed later is not answered before the question has begun.
func (st *store) awaitWriter(ctx context.Context, req *op.Request) error {
	if st.leases.Idle() || req.Session == internalSession {
		return nil
	}
	a := lease.Ask{Session: req.Session, Tells: req.Ino}
	if st.leases.Ask(&a) {
		return nil
	}
	c := claimFor(req)
	defer c.end(st)
	for {
		c.ticket = a.Ticket
		if err := st.regain(ctx, c); err != nil {
			return err
		}
		if st.leases.Ask(&a) {
			return nil
		}
	}
}

// vacate takes back what others hold of what a transaction will alter in the store
// of its coordinator, before anybody prepares anything; nobody gets it until the claim ends.
func (st *store) vacate(ctx context.Context, c *claim, req *op.Request, plan *meta.Plan) error {
	local := func(ino sealfs.Ino) bool { return ino != 0 && st.local(ino.Home(st.srv.cfg.Shards)) }
	list := []lease.Change{{Ino: req.Dir, Name: req.Name}}
	if req.Type == op.Rename {
		if local(req.Dir2) {
			list = append(list, lease.Change{Ino: req.Dir2, Name: req.Name2})
		}
		if local(plan.Src) {
			list = append(list, lease.Change{Ino: plan.Src})
		}
		if local(plan.Ino) {
			list = append(list, lease.Change{Ino: plan.Ino, Self: true})
		}
	}
	if c.ticket != nil { // what stopped the attempt before
		if err := st.regain(ctx, c); err != nil {
			return err
		}
	}
	c.keep = true
	for {
		a := lease.Ask{Session: c.as, Changes: list, Keep: true, Ticket: c.ticket}
		free := false
		err := st.View(func(pmem.Reader) error {
			free = st.leases.Ask(&a)
			return nil
		})
		c.ticket = a.Ticket
		if err == nil && !free {
			err = st.regain(ctx, c)
		}
		if err != nil || free {
			return err
		}
	}
}

// watch answers Watch: revocations as soon as there are any.
func (st *store) watch(ctx context.Context, req *op.Request, rep *op.Reply) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%v: %w: %w", req.Type, context.Cause(ctx), sealfs.ErrInterrupted)
	}
	var drops []sealfs.Ino
	if err := op.DecodeOpens(req.Data, func(o op.Opens) { drops = append(drops, o.Ino) }); err != nil {
		return err
	}
	if st.srv.ended(req.Session) {
		return sealfs.ErrSession
	}
	woken := make(chan struct{}, 1)
	w, err := st.leases.Watch(req.Session, req.Seq, req.Off, drops, func() { poke(woken) })
	if err != nil {
		return err
	}
	if st.srv.ended(req.Session) { // just now
		if st.srv.sessions.Load().ended(req.Session) { // not only fenced: who ends it may have looked before
			st.leases.End(func(at sealfs.Session) bool { return at == req.Session })
		}
		return sealfs.ErrSession
	}
	timer := time.NewTimer(min(time.Duration(min(req.Len, uint64(watchMax/time.Millisecond)))*time.Millisecond, watchMax))
	defer timer.Stop()
	for late := false; ; {
		var wait bool
		if rep.Revokes, rep.Stamp, wait, err = st.leases.Poll(w, rep.Revokes[:0]); err != nil || !wait || late {
			return err
		}
		select {
		case <-woken:
		case <-timer.C:
			late = true
		case <-ctx.Done():
			return fmt.Errorf("%v: %w: %w", req.Type, context.Cause(ctx), sealfs.ErrInterrupted)
		case <-st.srv.quit:
			return fmt.Errorf("server: %w", sealfs.ErrClosed)
		}
	}
}

// Overdue looks, once each time that it is called, at who does not give back what others wait for. It
// returns the sessions that have not acknowledged a revocation for more than looks calls, and
// which of these have not been heard of meanwhile. Who calls it ends sessions: those that are late
// by Fence, those that are silent then by EndSession. A client that was fenced hears so
// with its next request, and believes nothing any more; one that cannot hear stops to believe 54
// seconds after the last Watch that was answered. So calls shall take a minute, at least, for looks.
func (s *Server) Overdue(looks int) (late, silent []sealfs.Session) {
	s.overdueMu.Lock()
	defer s.overdueMu.Unlock()
	var tables []*lease.Table
	for _, st := range s.all() {
		tables = append(tables, st.leases)
	}
	return s.overdue.Look(tables, looks)
}

// awaitSessions returns when it is known what sessions hold: after a start, what
// they were granted before is not, so nothing is changed, and nothing told that they
// may have delayed, until all that live have come back or their time is over.
func (st *store) awaitSessions(ctx context.Context, req *op.Request) error {
	over := st.holds.graceful()
	if over == nil || req.Session == internalSession {
		return nil
	}
	switch req.Type {
	case op.Lookup, op.Getattr, op.Readlink, op.Read, op.Readdir, op.Seek, op.Open:
	case op.Prepare:
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, prepareLeases)
		defer stop()
	default:
		if !alters(req.Type) {
			return nil
		}
	}
	select {
	case <-over:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%v: not all sessions have registered after a start: %w: %w", req.Type, context.Cause(ctx), sealfs.ErrInterrupted)
	case <-st.srv.quit:
		return fmt.Errorf("server: %w", sealfs.ErrClosed)
	}
}
