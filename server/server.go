package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/cluster"
	"sealfs/disk"
	"sealfs/internal/turn"
	"sealfs/lease"
	"sealfs/lsfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
	"sealfs/txn"
)

// StoreOptions names the parts of one store.
type StoreOptions struct {
	Device  string       // image file or block device
	Region  string       // region file
	Staging string       // ring file, on tmpfs; with a region on persistent memory only what a last run left in it matters
	Log     lsfs.Options // StagingPath is overwritten by Staging

	// Dev and Reg are open handles to be used in place of the paths Device and
	// Region, for simulation. They belong to the store from the start of its opening
	// on, whatever the error.
	Dev disk.Device
	Reg pmem.Backing
	// RegionMode is how the region is mapped: pmem.ModeAuto, the default,
	// pmem.ModeFile or pmem.ModeDax.
	RegionMode string
}

// Options of a server.
type Options struct {
	Shards  uint32              // of the cluster
	Map     func() *cluster.Map // the current cluster map; nil: no volumes' limits are known
	Stores  []StoreOptions
	Durable bool // every answer survives a power cut (--durability=sync)
	Logger  *slog.Logger

	// Peers sends a request to whichever store holds its shard, this server's
	// own included; nil: all shards are here.
	Peers op.Handler
	// KeepSessions lets sessions outlive the server: SetSessions says which ones
	// there are. Otherwise a start ends all of them.
	KeepSessions bool
	// Grace is for how long after a start sessions may register what they hold
	// open. Default 60 s.
	Grace time.Duration

	// SplitEntries is from how many entries on a directory is split over the stores of the
	// cluster. Default 65,536.
	SplitEntries uint64

	// Random names transactions, and spreads those that begin again. Default
	// math/rand; a simulation numbers them.
	Random func() uint64
	// Turns are the lanes of the server's goroutines in a simulation; each store has
	// its own, in StoreOptions.Log.
	Turns turn.Turns
}

// The lanes of a server's goroutines, and of those for a store.
const (
	turnFinisher = 0
	turnTeller   = 1

	turnReclaimer = lsfs.TurnsUsed + iota - 2
	turnParties
	turnRetry
	turnHurry
	turnSplits
	turnPurges // the first of turnsPurge

	turnsPurge = 12
)

// Server owns stores and answers requests. It implements op.Handler.
type Server struct {
	o      Options
	cfg    meta.Config // of a store that holds all shards
	log    *slog.Logger
	mu     sync.Mutex // guards changes of stores and way
	stores []*store   // replaced, never changed
	way    atomic.Pointer[routes]
	closed atomic.Bool
	quit   chan struct{} // closed when closed becomes true
	gate   sync.RWMutex  // held shared by requests under way, so that Close comes after them

	sessions atomic.Pointer[sessionList] // nil: not known yet
	fenced   atomic.Pointer[map[sealfs.Session]struct{}]

	overdueMu sync.Mutex // a leaf but for the tables
	overdue   lease.Overdue
	attended  atomic.Pointer[time.Time] // until when the sessions are known; nil: for ever
	pace      pace
	// lockLimits bound the locks of a store.
	lockLimits lockLimits
	active     active
	finisher   finisher
	teller     teller
}

// store is one open store with what the server keeps about it in memory.
type store struct {
	*lsfs.Store
	srv  *Server
	opts StoreOptions
	last atomic.Int64  // time of the last change, nanoseconds since 1970
	mark atomic.Uint32 // stamps of block sums

	stripes [256]sync.Mutex // by inode: data changes
	holds   holds
	leases  *lease.Table
	usage   usage
	rounds  rounds
	locks   waiters
	circles waitGraph
	// lockCounts is how many locks there are.
	lockCounts lockCounts
	reclaim    reclaimer
	parties    parties
	splits     partitioner
	// unfinished are the decisions that were found at the start, until run takes them.
	unfinished []*txn.Decision
	untold     []untold // found at the start, too
	callsMu    sync.Mutex
	calls      map[sealfs.Shard]*txn.Calls // sessions count their changes by shard
	chunks     chunks

	// Method values, made once: each takes an allocation.
	guard   func(op.Tx, meta.Touch) error        // parties.locks.Guard
	isLocal func(sealfs.Shard) bool              // local
	queued  func(sealfs.Shard, sealfs.Ino, bool) // to the teller
	follows func(sealfs.Shard, sealfs.Ino, bool) // the same, from a Tally
}

// Open recovers all stores and begins to answer.
func Open(ctx context.Context, o Options) (*Server, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Shards == 0 || o.Shards > sealfs.ShardsMax || o.Shards&(o.Shards-1) != 0 {
		return nil, fmt.Errorf("%d shards: not a power of two up to %d: %w", o.Shards, sealfs.ShardsMax, sealfs.ErrInvalid)
	}
	if o.Grace == 0 {
		o.Grace = time.Minute
	}
	s := &Server{o: o, cfg: meta.Config{Shards: o.Shards}, log: o.Logger, quit: make(chan struct{}), pace: usualPace}
	for _, so := range o.Stores {
		if err := s.AddStore(ctx, so); err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	return s, nil
}

// AddStore recovers another store and begins to answer for it.
func (s *Server) AddStore(ctx context.Context, so StoreOptions) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	st, err := s.openStore(so)
	if err != nil {
		return err
	}
	if err := s.enlist(st); err != nil {
		return errors.Join(err, st.close())
	}
	// A list of sessions that was here before the store has not reached it.
	if l := s.sessions.Load(); l != nil {
		time.AfterFunc(s.o.Grace, func() { st.reclaimKept(st.holds.endGrace()) })
		if err := st.endSessions(l.ended); err != nil {
			s.log.Error("locks of ended sessions are not all released; a restart releases them", "err", err)
		}
		st.settleGrace(l)
	}
	return nil
}

// enlist makes a store be found.
func (s *Server) enlist(st *store) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed.Load() {
		return fmt.Errorf("server: %w", sealfs.ErrClosed)
	}
	for _, o := range s.stores {
		if o.ID() == st.ID() {
			return fmt.Errorf("store %s is open already, at %s: %w", st.ID(), o.opts.Device, sealfs.ErrExist)
		}
	}
	s.stores = append(slices.Clip(s.stores), st)
	s.way.Store(nil)
	st.run()
	return nil
}

// Owns reports whether the store is one of this server's.
func (s *Server) Owns(id sealfs.UUID) bool {
	return slices.ContainsFunc(s.all(), func(st *store) bool { return st.ID() == id })
}

// all returns the stores.
func (s *Server) all() []*store {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stores
}

func (s *Server) openStore(so StoreOptions) (*store, error) {
	if so.Dev != nil {
		so.Log.StagingPath = so.Staging
		return s.attach(so.Dev, so.Reg, nil, so)
	}
	dev, err := disk.Open(so.Device, disk.OpenOptions{Direct: true, Exclusive: true})
	if err != nil {
		return nil, err
	}
	region, err := pmem.OpenFileMode(so.Region, so.RegionMode)
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	so.Log.StagingPath = so.Staging
	if so.Log.Logger == nil {
		so.Log.Logger = s.log
	}
	return s.attach(dev, region, nil, so)
}

// attach opens a store on a device and a region, and rebuilds what the server
// keeps about it. After an error both are closed.
func (s *Server) attach(dev disk.Device, region pmem.Backing, kept *pmem.Staging, so StoreOptions) (*store, error) {
	ls, err := lsfs.Open(dev, region, kept, &owner{s.cfg}, so.Log)
	if err != nil {
		return nil, err
	}
	st := &store{Store: ls, srv: s, opts: so, leases: lease.New(ls.Incarnation(), 0)}
	st.holds.closed = st.leases.Lower
	st.guard, st.isLocal = st.parties.locks.Guard, st.local
	st.queued = func(s sealfs.Shard, ino sealfs.Ino, outbox bool) { st.srv.teller.add(st, s, ino, outbox, false) }
	st.follows = func(s sealfs.Shard, ino sealfs.Ino, outbox bool) { st.srv.teller.add(st, s, ino, outbox, true) }
	st.mark.Store(uint32(time.Now().UnixNano() >> 10))
	if err := st.load(); err != nil {
		return nil, errors.Join(err, ls.Close())
	}
	if s.o.KeepSessions {
		st.holds.begin()
	} else if err := st.dropSessions(func(at sealfs.Session) bool { return at != volumeSession }); err != nil {
		// What sessions of the last run held is free; the rows that make volumes'
		// roots idempotent stay.
		return nil, errors.Join(err, ls.Close())
	}
	return st, nil
}

// run starts what goes on in the background, once the store is found by its shards.
func (st *store) run() {
	st.reclaim.start(st)
	st.parties.start(st)
	st.splits.start(st)
	for _, d := range st.unfinished {
		st.srv.finisher.add(st, d)
	}
	st.unfinished = nil
	for _, w := range st.untold {
		st.queued(w.shard, w.ino, w.outbox)
	}
	st.untold = nil
}

// turns are the lanes of what runs for the store.
func (st *store) turns() turn.Turns { return st.opts.Log.Turns }

// close ends what runs for the store, and makes it durable.
func (st *store) close() error {
	st.splits.stop()
	st.parties.stop()
	st.reclaim.stop()
	return st.Close()
}

// load rebuilds usage from the region and queues what a crash left to be freed.
func (st *store) load() error {
	return st.View(func(r pmem.Reader) error {
		if err := meta.VolumeUsage(r, st.srv.cfg.Shards, st.usage.add); err != nil {
			return err
		}
		if err := st.loadShards(r); err != nil {
			return err
		}
		if err := meta.Queued(r, st.srv.cfg.Shards, func(s sealfs.Shard, ino sealfs.Ino, outbox bool) {
			st.untold = append(st.untold, untold{s, ino, outbox})
		}); err != nil {
			return err
		}
		return meta.Orphans(r, func(ino sealfs.Ino) bool {
			st.reclaim.add(ino)
			return true
		})
	})
}

// Close makes everything durable and gives the devices back.
func (s *Server) Close() error {
	s.mu.Lock()
	if !s.closed.Swap(true) && s.quit != nil {
		close(s.quit)
	}
	stores := s.stores
	s.mu.Unlock()
	for _, st := range stores {
		st.locks.close() // who waits for a lock goes home
		st.chunks.cuts.close()
	}
	s.finisher.stop()
	s.teller.stop(s.o.Turns)
	s.o.Turns.Lock(&s.gate)
	defer s.gate.Unlock()
	var errs []error
	for _, st := range stores {
		errs = append(errs, st.close())
	}
	return errors.Join(errs...)
}

// Do answers one request: see op.Handler. Changes are visible when it returns
// and survive SIGKILL; with Options.Durable also a power cut.
func (s *Server) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	// A request may lead to others of the server itself, which must not wait for
	// a Close that waits for the request.
	if !s.gate.TryRLock() {
		return fmt.Errorf("server: %w", sealfs.ErrClosed)
	}
	defer s.gate.RUnlock()
	if s.closed.Load() {
		return fmt.Errorf("server: %w", sealfs.ErrClosed)
	}
	st, err := s.route(req)
	switch {
	case err != nil:
	case req.Seq != 0 && req.Session != 0 && req.Session != volumeSession && req.Type.Changes():
		err = st.once(ctx, req, rep)
	default:
		err = st.do(ctx, req, rep)
	}
	if err != nil {
		return st.answer(s, req, rep, err)
	}
	return nil
}

// do dispatches on the type. An error is turned into a code by answer.
func (st *store) do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	if err := st.awaitSessions(ctx, req); err != nil {
		if req.Type == op.Prepare && ctx.Err() == nil && errors.Is(err, sealfs.ErrInterrupted) {
			return sealfs.ErrDeadlock // the coordinator begins anew
		}
		return err
	}
	switch req.Type {
	case op.Write:
		return st.patiently(ctx, req, rep, (*store).write)
	case op.Fallocate:
		return st.patiently(ctx, req, rep, (*store).fallocate)
	case op.Setattr:
		return st.recasting(ctx, req, rep, (*store).setattr)
	case op.Setxattr, op.Removexattr:
		return st.recasting(ctx, req, rep, (*store).changeOf)
	case op.Partition:
		return st.partitionStep(ctx, req, rep)
	case op.Split:
		return sealfs.ErrPerm // the home does it by itself
	case op.Join:
		return st.join(ctx, req)
	case op.Extend:
		return st.patiently(ctx, req, rep, (*store).resize)
	case op.Purge:
		return st.purge(req, rep)
	case op.Getattr:
		return st.getattr(ctx, req, rep)
	case op.Read:
		return st.read(ctx, req, rep)
	case op.Sync:
		rep.Off = uint64(st.Incarnation())
		return st.Sync()
	case op.Open:
		return st.hold(ctx, req, rep)
	case op.Release:
		st.release(req.Session, req.Ino, max(req.Len, 1))
		return op.DecodeOpens(req.Data, func(o op.Opens) { st.release(req.Session, o.Ino, o.Count) })
	case op.SetLock:
		return st.setLock(req, rep)
	case op.WaitLock:
		return st.waitLock(ctx, req, rep)
	case op.Statfs:
		st.statfs(req, rep)
		return nil
	case op.Prepare:
		return st.prepare(ctx, req, rep)
	case op.Resolve:
		if st.srv.active.has(req.Tx) {
			rep.Off = op.FatePending
			return nil
		}
	case op.Getxattr:
		if strings.HasPrefix(req.Name, op.AttrTotals) {
			st.srv.teller.hurry(ctx, st)
		}
	case op.Register:
		return st.register(req)
	case op.WaitFor:
		return st.noteWait(req, rep)
	case op.Waiting:
		return st.stillWaits(req, rep)
	case op.Watch:
		return st.watch(ctx, req, rep)
	case op.Grant:
		return st.grant(ctx, req, rep)
	case op.Recall:
		return st.recall(req, rep)
	}
	if req.Type.Changes() {
		return st.changeWithin(ctx, req, rep)
	}
	return st.query(ctx, req, rep)
}

// once is do for a change that may come twice: the requests for it go one after
// the other, and what was refused stays refused.
func (st *store) once(ctx context.Context, req *op.Request, rep *op.Reply) error {
	for {
		st.callsMu.Lock()
		calls := st.calls[req.Shard]
		if calls == nil {
			if st.calls == nil {
				st.calls = map[sealfs.Shard]*txn.Calls{}
			}
			calls = new(txn.Calls)
			st.calls[req.Shard] = calls
		}
		call, first, err := calls.Enter(req.Session, req.Seq, req.Low)
		st.callsMu.Unlock()
		if err != nil {
			return err
		}
		if first {
			err := st.do(ctx, req, rep)
			code := rep.Code
			errors.As(err, &code)
			switch code {
			case sealfs.ErrUnavailable, sealfs.ErrInterrupted, sealfs.ErrClosed, sealfs.ErrBusy:
				code = 0 // not answered: it will be asked again
			}
			st.callsMu.Lock()
			calls.Leave(req.Session, req.Seq, call, code)
			st.callsMu.Unlock()
			return err
		}
		select {
		case <-call.Done:
		case <-ctx.Done():
			return fmt.Errorf("%v: %w: %w", req.Type, context.Cause(ctx), sealfs.ErrInterrupted)
		case <-st.srv.quit:
			return fmt.Errorf("server: %w", sealfs.ErrClosed)
		}
		if call.Code != 0 {
			return call.Code
		}
	}
}

// query answers what the namespace alone knows.
func (st *store) query(ctx context.Context, req *op.Request, rep *op.Reply) error {
	cl := claimFor(req)
	defer cl.end(st)
	cfg := st.config()
	if req.Type != op.Ancestors {
		cfg.Guard = st.parties.locks.Now()
	}
	var patience context.Context // of this question for attributes
	var late time.Time           // see awaitNames
	for {
		err := st.View(func(r pmem.Reader) error {
			if err := meta.Query(r, cfg, req, rep); err != nil {
				return err
			}
			return st.tell(req, rep, cl)
		})
		if err == errLeased {
			if err := st.regain(ctx, cl); err != nil {
				return err
			}
			continue
		}
		blocked, ok := err.(*txn.Blocked)
		if !ok {
			return err
		}
		attributes := blocked.Kind == meta.TouchLinks || blocked.Kind == meta.TouchEmpty
		if attributes {
			if patience == nil {
				var stop context.CancelFunc
				patience, stop = context.WithTimeout(ctx, st.srv.pace.attributes)
				defer stop()
				late = time.Now().Add(st.srv.pace.hurry)
			}
			err = st.awaitNames(patience, blocked, req.Tx, late)
		} else {
			err = st.await(ctx, blocked, req.Tx)
		}
		// A transaction on its walk holds locks itself, so it must not wait for an older one.
		switch {
		case err == errDie:
			rep.Reset()
			rep.Code = sealfs.ErrDeadlock
			return nil
		case err != nil && attributes && patience.Err() != nil && ctx.Err() == nil && req.Type != op.Ancestors:
			// Its coordinator is away, or has not decided since the question was asked.
			// That must not make everything below a directory wait: its attributes are
			// told as they are without the transaction.
			guard := cfg.Guard
			cfg.Guard = func(tx op.Tx, t meta.Touch) error {
				if t.Kind == meta.TouchLinks || t.Kind == meta.TouchEmpty {
					return nil
				}
				return guard(tx, t)
			}
		case err != nil:
			return err
		}
	}
}

// awaitNames is await for a question for attributes. A coordinator answers its client
// although a party has not heard of the Commit yet, so who has had that answer may
// ask here for what is still prepared: from the moment late on, the coordinator is asked.
func (st *store) awaitNames(ctx context.Context, blocked *txn.Blocked, tx op.Tx, late time.Time) error {
	early, stop := context.WithDeadline(ctx, late)
	defer stop()
	if err := st.await(early, blocked, tx); err == nil || early.Err() == nil {
		return err
	}
	st.parties.hurry(blocked.By)
	return st.await(ctx, blocked, tx)
}

// settled waits, as a question for the attributes of the request's inode does, for
// the transactions that have its names in hand: for changes whose answer tells the
// attributes, or that a Commit afterwards might overwrite.
func (st *store) settled(ctx context.Context, req *op.Request) error {
	if st.parties.locks.Empty() {
		return nil
	}
	q := op.Request{Type: op.Getattr, Session: internalSession, Ino: req.Ino, Shard: req.Shard, Volume: req.Volume}
	var rep op.Reply
	return st.query(ctx, &q, &rep) // what it refuses the change will refuse
}

// answer turns an error of the store into the reply's code and logs what an
// operator must know. Only what kept the request from being answered at all is
// returned.
func (st *store) answer(s *Server, req *op.Request, rep *op.Reply, err error) error {
	rep.Reset()
	var code sealfs.Code
	switch {
	case errors.Is(err, sealfs.ErrInterrupted) || errors.Is(err, sealfs.ErrClosed) || errors.Is(err, sealfs.ErrUnavailable):
		return err
	case errors.Is(err, sealfs.ErrCorrupt):
		s.log.Error("damaged", "op", req.Type.String(), "ino", uint64(req.Ino), "dir", uint64(req.Dir), "err", err)
		code = sealfs.ErrIO
	case st != nil && st.Failure() != nil && errors.Is(err, st.Failure()) && (req.Type.Changes() || req.Type == op.Sync):
		code = sealfs.ErrReadOnly
	case !errors.As(err, &code):
		s.log.Error("request failed", "op", req.Type.String(), "ino", uint64(req.Ino), "dir", uint64(req.Dir), "err", err)
		code = sealfs.ErrIO
	case code == sealfs.ErrIO:
		s.log.Error("input/output error", "op", req.Type.String(), "ino", uint64(req.Ino), "err", err)
	}
	rep.Code = code
	return nil
}

// owner tells a store which payloads live.
type owner struct{ cfg meta.Config }

func (o *owner) Live(r pmem.Reader, ino sealfs.Ino, off uint64, at sealfs.LSN, n uint32, fn func(lsfs.Part)) error {
	return meta.Live(r, o.cfg, ino, off, at, n, func(e *meta.Extent) {
		fn(lsfs.Part{Off: e.Off, At: e.Addr, Len: e.Stored()})
	})
}

func (o *owner) Move(tx *lsfs.Tx, ino sealfs.Ino, p lsfs.Part, to sealfs.LSN) (bool, error) {
	return meta.Move(tx.Tx, uncharged{tx}, o.cfg, ino, p.Off, p.Len, p.At, to)
}

// uncharged is the account of a change that no volume pays for.
type uncharged struct{ *lsfs.Tx }

func (uncharged) Charge(sealfs.Volume, int64, int64) {}
