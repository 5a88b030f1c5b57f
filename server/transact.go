package server

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
	"sealfs/txn"
)

const (
	// prepareTimeout bounds how long a party may take to vote. The operation
	// starts anew then, or is told that the party is away.
	prepareTimeout = 10 * time.Second
	// commitTimeout is how long the answer waits for the parties to commit; what
	// is left then goes on in the background.
	commitTimeout = 2 * time.Second
	// abortTimeout is how long parties are told of an abort. Who does not hear of
	// it asks.
	abortTimeout = time.Second
)

// errDie is for who must give up instead of waiting for an older transaction.
var errDie = errors.New("an older transaction is in the way")

// active holds the transactions that this server coordinates and that may still
// be decided.
type active struct {
	mu  sync.Mutex
	txs map[op.Tx]struct{}
}

func (a *active) add(tx op.Tx) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.txs == nil {
		a.txs = map[op.Tx]struct{}{}
	}
	a.txs[tx] = struct{}{}
}

func (a *active) remove(tx op.Tx) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.txs, tx)
}

func (a *active) has(tx op.Tx) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, ok := a.txs[tx]
	return ok
}

// await waits until the transaction that err tells of is out of the way. It
// returns other errors as they are, and errDie if tx must not wait.
func (st *store) await(ctx context.Context, err error, tx op.Tx) error {
	blocked, ok := err.(*txn.Blocked)
	if !ok {
		return err
	}
	if blocked.Dies(tx) {
		return errDie
	}
	mine := st.turns().Mine()
	defer mine.Take()
	select {
	case <-blocked.Done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: %w: %w", blocked, context.Cause(ctx), sealfs.ErrInterrupted)
	case <-st.srv.quit:
		return fmt.Errorf("server: %w", sealfs.ErrClosed)
	}
}

// transact executes an operation whose parties lie on several stores; this
// store holds the shard that the request is addressed to, and coordinates.
func (st *store) transact(ctx context.Context, req *op.Request, rep *op.Reply) error {
	cl := claimFor(req)
	defer cl.end(st)
	age := st.now()
	var last meta.Plan
	same := 0 // attempts in which the parties did not know what the plan was made for
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		rep.Reset()
		a := attempt{st: st, tx: op.Tx{Age: age, Nonce: st.srv.random()}}
		again, err := a.run(ctx, cl, req, rep)
		if err != nil || !again {
			return err
		}
		if !a.stale || !a.plan.Equal(&last) {
			same = 0
		}
		if last = a.plan; same == staleMax {
			return fmt.Errorf("%v of %q in directory %d: its inode is not as the name says: %w", req.Type, req.Name, req.Dir, sealfs.ErrCorrupt)
		}
		same++
		mine := st.turns().Mine()
		timer := time.NewTimer(wait/2 + time.Duration(st.srv.random()%uint64(wait)))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("%v: %w: %w", req.Type, context.Cause(ctx), sealfs.ErrInterrupted)
		case <-st.srv.quit:
			timer.Stop()
			return fmt.Errorf("server: %w", sealfs.ErrClosed)
		}
		mine.Take()
		// It may have become an ordinary change meanwhile, or one to be refused.
		rep.Reset()
		if end, err := st.executePatiently(ctx, cl, req, rep, nil); !isForeign(err) {
			if err == nil && rep.Code == 0 && st.srv.o.Durable {
				err = st.SyncTo(end)
			}
			return err
		}
	}
}

// random returns a number that nobody else has.
func (s *Server) random() uint64 {
	if s.o.Random != nil {
		return s.o.Random()
	}
	return rand.Uint64()
}

func isForeign(err error) bool {
	_, is := err.(*meta.Foreign)
	return is
}

// staleMax is how often the same plan may be refused as stale. Names change under
// way, but not always to what they were.
const staleMax = 40

// attempt is one attempt to do an operation as a transaction.
type attempt struct {
	st    *store
	tx    op.Tx
	plan  meta.Plan
	stale bool // a party did not know what the plan was made for
}

// run makes the attempt. again says that it was in somebody's way, or found another
// state than it had planned for.
func (a *attempt) run(ctx context.Context, cl *claim, req *op.Request, rep *op.Reply) (again bool, err error) {
	st, tx := a.st, a.tx
	plan, err := st.plan(ctx, req)
	a.plan = plan
	var code sealfs.Code
	if errors.As(err, &code) && err == error(code) {
		rep.Code = code
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if len(plan.Parts) == 0 {
		return true, nil // it is not foreign any more
	}
	if err := st.vacate(ctx, cl, req, &plan); err != nil {
		return false, err
	}
	c := txn.Begin(tx, req.Shard, plan.Parts)
	st.srv.active.add(tx)
	st.collect(ctx, c)
	if c.State() == txn.Ready {
		bound, stop := context.WithTimeout(ctx, prepareTimeout)
		for _, w := range plan.Walks {
			code := st.walk(bound, tx, w)
			if code == sealfs.ErrInterrupted && ctx.Err() == nil {
				code = sealfs.ErrDeadlock // it took too long: let others go first
			}
			if code != 0 {
				c.Abort(code)
				break
			}
		}
		stop()
	}
	if c.State() == txn.Ready {
		if err := st.decide(ctx, c, cl, plan, req, rep); err != nil {
			return false, err
		}
	}
	st.srv.active.remove(tx)
	if c.State() == txn.Aborted {
		st.announce(c, op.Abort, 0, abortTimeout)
		switch c.Code() {
		case 0: // the decision said why
			return false, nil
		case sealfs.ErrDeadlock, sealfs.ErrStale, sealfs.ErrAgain:
			a.stale = c.Code() == sealfs.ErrStale
			return true, nil
		case sealfs.ErrUnavailable, sealfs.ErrInterrupted:
		default:
			// A party has refused what was planned. That counts only if it still would be.
			if now, err := st.plan(ctx, req); err != nil || !now.Equal(&plan) {
				return true, nil
			}
		}
		if ctx.Err() != nil {
			return false, fmt.Errorf("%v: %w: %w", req.Type, context.Cause(ctx), sealfs.ErrInterrupted)
		}
		rep.Reset()
		rep.Code = c.Code()
		return false, nil
	}
	d := txn.Decide(req.Shard, tx, req.Time, c.Parties())
	for s, life := range st.announce(c, op.Commit, req.Time, commitTimeout) {
		d.Committed(s, life)
	}
	st.srv.finisher.add(st, d)
	return false, nil
}

// plan says what parts other stores have in the operation. It holds nothing, so
// it waits for whatever transaction is in the way.
func (st *store) plan(ctx context.Context, req *op.Request) (meta.Plan, error) {
	var before meta.Target
	for {
		target, err := st.target(ctx, req)
		if err != nil {
			return meta.Plan{}, err
		}
		cfg := st.config()
		var plan meta.Plan
		err = st.View(func(r pmem.Reader) (err error) {
			plan, err = meta.MakePlan(r, cfg, req, target, func(v sealfs.Volume) sealfs.Ino {
				if info := st.srv.volumeInfo(v); info != nil {
					return info.Root
				}
				return 0
			})
			return err
		})
		if err == nil {
			return plan, nil
		}
		if _, refused := err.(sealfs.Code); refused && target != before {
			// The target may be of another moment than the names here: ask once more.
			before = target
			continue
		}
		if err = st.await(ctx, err, op.Tx{}); err != nil {
			return meta.Plan{}, err
		}
	}
}

// target asks what the new name of a Rename stands for, if its directory lies elsewhere.
func (st *store) target(ctx context.Context, req *op.Request) (meta.Target, error) {
	if req.Type != op.Rename || st.local(req.Dir2.Home(st.srv.cfg.Shards)) {
		return meta.Target{}, nil
	}
	look := op.Request{Type: op.Lookup, Session: internalSession, Dir: req.Dir2, Name: req.Name2, Shard: req.Dir2.Home(st.srv.cfg.Shards), Volume: req.Volume}
	var found op.Reply
	if err := st.srv.peers().Do(ctx, &look, &found); err != nil {
		return meta.Target{}, err
	}
	if found.Code != 0 && found.Code != sealfs.ErrNotExist {
		return meta.Target{}, found.Code
	}
	return meta.Target{Ino: found.Attr.Ino, Type: uint8(found.Attr.Mode >> 12 & 0xf), Of: sealfs.Ino(found.Off)}, nil
}

// collect sends the Prepares and gathers the votes.
func (st *store) collect(outer context.Context, c *txn.Coordinator) {
	ctx, stop := context.WithTimeout(outer, prepareTimeout)
	defer stop()
	parts := c.Parts()
	codes, votes := make([]sealfs.Code, len(parts)), make([]op.Attr, len(parts))
	st.each(len(parts), func(i int) {
		part := parts[i]
		var rep op.Reply
		codes[i] = codeOf(st.srv.peers().Do(ctx, &part, &rep), &rep)
		votes[i] = rep.Attr
	})
	for i := range parts {
		if codes[i] == sealfs.ErrInterrupted && outer.Err() == nil {
			codes[i] = sealfs.ErrDeadlock // it took too long: let others go first
		}
		c.Voted(i, codes[i], votes[i])
	}
}

// each calls fn for 0 to n-1 at the same time.
func (st *store) each(n int, fn func(i int)) {
	var others sync.WaitGroup
	mine := st.turns().Mine()
	for i := 1; i < n; i++ {
		others.Go(func() {
			mine.Child(i).Take()
			fn(i)
		})
	}
	if n > 0 {
		fn(0)
	}
	others.Wait()
	mine.Take()
}

// codeOf returns why a request was not done, 0 if it was.
func codeOf(err error, rep *op.Reply) sealfs.Code {
	if err == nil {
		return rep.Code
	}
	var code sealfs.Code
	if errors.As(err, &code) && code == sealfs.ErrInterrupted {
		return code
	}
	return sealfs.ErrUnavailable
}

// decide records the decision durably. An error leaves it open whether there is
// one: then the transaction stays active, and nobody is told anything.
func (st *store) decide(ctx context.Context, c *txn.Coordinator, cl *claim, plan meta.Plan, req *op.Request, rep *op.Reply) error {
	d := *req
	d.Tx, d.Coord, d.Votes = c.Tx(), req.Shard, c.Votes()
	switch req.Type {
	case op.Rename:
		d.Off, d.Ino, d.Flags = uint64(plan.Src), plan.Ino, d.Flags|op.Walked
	case op.Mkdir:
		d.Data = plan.Parts[0].Data
	}
	bound, stop := context.WithTimeout(ctx, prepareTimeout)
	defer stop()
	end, err := st.executeFor(bound, cl, &d, rep, nil)
	req.Time = d.Time
	if err == errLeased {
		rep.Reset()
		c.Abort(sealfs.ErrDeadlock) // the next attempt waits for it before anybody prepares
		return nil
	}
	if errors.Is(err, sealfs.ErrInterrupted) && ctx.Err() == nil {
		c.Abort(sealfs.ErrDeadlock) // it holds what others wait for, so it does not wait for long
		return nil
	}
	if isForeign(err) {
		c.Abort(sealfs.ErrStale) // something else has come into it
		return nil
	}
	if err != nil && st.Torn() {
		return err // the decision may stand in the log: the next start tells
	}
	if err != nil {
		c.Abort(0)
		st.srv.active.remove(c.Tx())
		st.announce(c, op.Abort, 0, abortTimeout)
		return err
	}
	if rep.Code == sealfs.ErrDeadlock || rep.Code == sealfs.ErrStale {
		c.Abort(rep.Code)
		return nil
	}
	decided, err := rep.Code == 0, error(nil)
	if decided {
		if decided, err = st.decided(req.Shard, c.Tx()); err != nil {
			return err
		}
	}
	if !decided {
		// Refused, or answered from the row of an earlier attempt.
		c.Abort(0)
		return nil
	}
	if err := st.SyncTo(end); err != nil {
		return err
	}
	c.Decided()
	return nil
}

// decided reports whether there is a decision.
func (st *store) decided(coord sealfs.Shard, tx op.Tx) (bool, error) {
	req := op.Request{Type: op.Resolve, Shard: coord, Tx: tx}
	var rep op.Reply
	err := st.View(func(r pmem.Reader) error { return meta.Query(r, st.srv.cfg, &req, &rep) })
	return rep.Off == op.FateCommitted, err
}

// announce tells the parties of the outcome, and waits no longer than limit.
// What the client does meanwhile does not matter. It returns in which incarnation
// of its store each party has heard of it.
func (st *store) announce(c *txn.Coordinator, t op.Type, at int64, limit time.Duration) map[sealfs.Shard]uint64 {
	ctx, stop := context.WithTimeout(context.Background(), limit)
	defer stop()
	open := append([]sealfs.Shard(nil), c.Open()...)
	heard := make([]uint64, len(open))
	st.each(len(open), func(i int) {
		req := op.Request{Type: t, Shard: open[i], Coord: c.Parts()[0].Coord, Tx: c.Tx(), Mtime: at}
		var rep op.Reply
		if st.srv.peers().Do(ctx, &req, &rep) == nil && rep.Code == 0 {
			heard[i] = rep.Off
		}
	})
	in := make(map[sealfs.Shard]uint64, len(open))
	for i, incarnation := range heard {
		if incarnation != 0 {
			c.Acknowledged(open[i])
			in[open[i]] = incarnation
		}
	}
	return in
}

// walkMax bounds a walk: no tree is that deep, so it has come into a circle.
const walkMax = 1 << 20

// walk makes sure that a directory is not found from another one on upwards.
// Nobody else moves directories in the volume meanwhile.
func (st *store) walk(ctx context.Context, tx op.Tx, w meta.Walk) sealfs.Code {
	at := w.From
	for steps := 0; at != 0; {
		if at == w.Not {
			return sealfs.ErrInvalid
		}
		req := op.Request{Type: op.Ancestors, Ino: at, Shard: at.Home(st.srv.cfg.Shards), Tx: tx, Coord: sealfs.Shard(0)}
		var rep op.Reply
		if code := codeOf(st.srv.peers().Do(ctx, &req, &rep), &rep); code != 0 {
			if code == sealfs.ErrNotExist {
				return sealfs.ErrStale // removed meanwhile: the parts will tell
			}
			return code
		}
		for i := range rep.Entries {
			if rep.Entries[i].Ino == w.Not {
				return sealfs.ErrInvalid
			}
		}
		if steps += len(rep.Entries); steps > walkMax || len(rep.Entries) == 0 {
			st.srv.log.Error("directories contain each other", "ino", uint64(at))
			return sealfs.ErrCorrupt
		}
		at = sealfs.Ino(rep.Off)
	}
	return 0
}

// prepare answers Prepare: the vote is durable before it is given.
func (st *store) prepare(ctx context.Context, req *op.Request, rep *op.Reply) error {
	// Who has asked does not wait for ever either, and cannot say so: see wire.
	bound, stop := context.WithTimeout(ctx, prepareTimeout)
	defer stop()
	cl := claimFor(req)
	defer cl.end(st)
	end, err := st.executeFor(bound, cl, req, rep, nil)
	if err == errLeased {
		// The other parties may have promised already.
		short, stop := context.WithTimeout(ctx, prepareLeases)
		defer stop()
		if err = st.regain(short, cl); err == nil {
			end, err = st.executePatiently(short, cl, req, rep, nil)
		}
	}
	if errors.Is(err, sealfs.ErrInterrupted) && ctx.Err() == nil {
		rep.Reset()
		rep.Code = sealfs.ErrDeadlock
		return nil
	}
	if err != nil || rep.Code != 0 {
		return err
	}
	st.parties.noted(req.Tx)
	return st.SyncTo(end)
}
