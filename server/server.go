package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/cluster"
	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// StoreOptions names the parts of one store.
type StoreOptions struct {
	Device  string       // image file or block device
	Region  string       // region file
	Staging string       // ring file, on tmpfs
	Log     lsfs.Options // StagingPath is overwritten by Staging
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
}

// Server owns stores and answers requests. It implements op.Handler.
type Server struct {
	o      Options
	cfg    meta.Config
	log    *slog.Logger
	stores []*store
	closed atomic.Bool
	gate   sync.RWMutex // held shared by requests under way, so that Close comes after them
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
	usage   usage
	locks   waiters
	reclaim reclaimer
	chunks  chunks
}

// Open recovers all stores and begins to answer.
func Open(ctx context.Context, o Options) (*Server, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Shards == 0 || o.Shards > sealfs.ShardsMax || o.Shards&(o.Shards-1) != 0 {
		return nil, fmt.Errorf("%d shards: not a power of two up to %d: %w", o.Shards, sealfs.ShardsMax, sealfs.ErrInvalid)
	}
	if len(o.Stores) != 1 {
		return nil, fmt.Errorf("%d stores: a server owns one: %w", len(o.Stores), sealfs.ErrNotSupported)
	}
	s := &Server{o: o, cfg: meta.Config{Shards: o.Shards}, log: o.Logger}
	for _, so := range o.Stores {
		st, err := s.openStore(so)
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
		s.stores = append(s.stores, st)
	}
	return s, ctx.Err()
}

func (s *Server) openStore(so StoreOptions) (*store, error) {
	dev, err := disk.Open(so.Device, disk.OpenOptions{Direct: true, Exclusive: true})
	if err != nil {
		return nil, err
	}
	region, err := pmem.OpenFile(so.Region, false)
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	so.Log.StagingPath = so.Staging
	if so.Log.Logger == nil {
		so.Log.Logger = s.log
	}
	st, err := s.attach(dev, region, nil, so)
	if err != nil {
		return nil, errors.Join(err, region.Close(), dev.Close())
	}
	return st, nil
}

// attach opens a store on a device and a region, and rebuilds what the server
// keeps about it.
func (s *Server) attach(dev disk.Device, region pmem.Backing, kept *pmem.Staging, so StoreOptions) (*store, error) {
	ls, err := lsfs.Open(dev, region, kept, &owner{s.cfg}, so.Log)
	if err != nil {
		return nil, err
	}
	st := &store{Store: ls, srv: s, opts: so}
	st.mark.Store(uint32(time.Now().UnixNano() >> 10))
	if err := st.load(); err != nil {
		return nil, errors.Join(err, ls.Close())
	}
	// No session outlives the server yet: what those of the last run held is
	// free. The rows that make volumes' roots idempotent stay.
	if err := st.dropSessions(func(at sealfs.Session) bool { return at != volumeSession }); err != nil {
		return nil, errors.Join(err, ls.Close())
	}
	st.reclaim.start(st)
	return st, nil
}

// load rebuilds usage from the region and queues what a crash left to be freed.
func (st *store) load() error {
	r := st.BeginRead()
	defer st.EndRead()
	if err := meta.VolumeUsage(r, st.srv.cfg.Shards, st.usage.add); err != nil {
		return err
	}
	return meta.Orphans(r, func(ino sealfs.Ino) bool {
		st.reclaim.add(ino)
		return true
	})
}

// Close makes everything durable and gives the devices back.
func (s *Server) Close() error {
	s.closed.Store(true)
	for _, st := range s.stores {
		st.locks.close() // who waits for a lock goes home
		st.chunks.cuts.close()
	}
	s.gate.Lock()
	defer s.gate.Unlock()
	var errs []error
	for _, st := range s.stores {
		st.reclaim.stop()
		errs = append(errs, st.Close())
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
	if err == nil {
		err = st.do(ctx, req, rep)
	}
	if err != nil {
		return st.answer(s, req, rep, err)
	}
	return nil
}

// do dispatches on the type. An error is turned into a code by answer.
func (st *store) do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	switch req.Type {
	case op.Write:
		return st.write(ctx, req, rep)
	case op.Fallocate:
		return st.fallocate(ctx, req, rep)
	case op.Setattr:
		return st.setattr(ctx, req, rep)
	case op.Extend:
		return st.resize(ctx, req, rep)
	case op.Purge:
		return st.purge(req, rep)
	case op.Getattr:
		return st.getattr(req, rep)
	case op.Read:
		return st.read(req, rep)
	case op.Sync:
		return st.Sync()
	case op.Open:
		return st.hold(req, rep)
	case op.Release:
		st.release(req.Session, req.Ino, max(req.Len, 1))
		return nil
	case op.SetLock:
		return st.setLock(req, rep)
	case op.WaitLock:
		return st.waitLock(ctx, req, rep)
	case op.Statfs:
		st.statfs(req, rep)
		return nil
	}
	if req.Type.Changes() {
		return st.change(req, rep, nil)
	}
	r := st.BeginRead()
	defer st.EndRead()
	return meta.Query(r, st.srv.cfg, req, rep)
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
	case st != nil && st.Failure() != nil && errors.Is(err, st.Failure()):
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
