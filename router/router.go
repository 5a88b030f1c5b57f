package router

import (
	"cmp"
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
	"sealfs/op"
	"sealfs/wire"
)

// Options says how a Router behaves. Map is needed; the zero value of every
// other field means its default.
type Options struct {
	// Cluster is the cluster that servers must belong to. Default: the map's.
	Cluster sealfs.UUID
	// Map returns the newest map known, nil if there is none yet. It is called for
	// every request and must not block.
	Map func() *cluster.Map
	// Refresh brings the map's row of a shard up to date, when a server has said
	// that it is not. Default: the map is only looked at again.
	Refresh func(ctx context.Context, shard sealfs.Shard) error
	// Local returns what answers for a store of this process, nil for all others.
	// It is called once per store and version of the map (see Renew), and must
	// not call the router. Default: no store is.
	Local func(store sealfs.UUID) op.Handler
	// Register, if set, is called on every new link (see the package's comment)
	// before anything else goes over it. h is like the router's Do (which would wait
	// for Register), but only for shards that lie there, all others being ErrStale;
	// it must not be used after Register returned. stores are those that the map
	// places at addr. An error ends the link. With Register, a link that was lost
	// is made anew without waiting for a request.
	Register func(ctx context.Context, addr string, stores []sealfs.UUID, h op.Handler) error

	// Conns is the number of connections per server. Default 1.
	Conns int
	// Peer says that this process is a server of the cluster. Commit, Abort, Forget,
	// Resolve and Sync then go over a connection of their own, where no Prepare
	// that waits is in their way. With Register, which clients have, Watch does so.
	Peer bool
	// Program is the name and version of this program, told to servers. Default "sealfs".
	Program string
	// Logger hears of servers that come and go. Default: nobody does.
	Logger *slog.Logger

	// DialTimeout bounds making a link, apart from Register. Default 5 s.
	DialTimeout time.Duration
	// RegisterTimeout bounds Register. Default 30 s.
	RegisterTimeout time.Duration
	// RefreshTimeout bounds Refresh. Default 5 s.
	RefreshTimeout time.Duration
	// Keepalive and Timeout are those of wire.Options. Defaults 3 s and 10 s.
	Keepalive, Timeout time.Duration
	// Backoff is how long a server is left alone after a first failure, about; it
	// doubles with every further one up to BackoffMax. A link that lasts for
	// BackoffMax ends the row of failures. Defaults 50 ms and 1 s.
	Backoff, BackoffMax time.Duration
}

func (o *Options) setDefaults() {
	o.Conns = max(o.Conns, 1)
	o.Logger = cmp.Or(o.Logger, slog.New(slog.DiscardHandler))
	o.DialTimeout = cmp.Or(o.DialTimeout, 5*time.Second)
	o.RegisterTimeout = cmp.Or(o.RegisterTimeout, 30*time.Second)
	o.RefreshTimeout = cmp.Or(o.RefreshTimeout, 5*time.Second)
	o.Keepalive = cmp.Or(o.Keepalive, 3*time.Second)
	o.Timeout = cmp.Or(o.Timeout, 10*time.Second)
	o.Backoff = cmp.Or(o.Backoff, 50*time.Millisecond)
	o.BackoffMax = max(cmp.Or(o.BackoffMax, time.Second), o.Backoff)
}

// Router is an op.Handler for all shards of a cluster. Any number of goroutines
// may use it at once.
//
// Locks: Router.mu is taken before server.mu; neither is held while anything
// is waited for.
type Router struct {
	o     Options
	table atomic.Pointer[table] // nil: to be made from the map

	ctx    context.Context // of everything that goes on by itself
	cancel context.CancelFunc
	wg     sync.WaitGroup // of the same; grows only under mu with closed unset

	mu         sync.Mutex
	closed     bool
	servers    map[string]*server // by address
	refreshing map[sealfs.Shard]*refresh
}

// table is what the router made of one version of the map. It is immutable.
type table struct {
	m      *cluster.Map
	places []place // by the index of the store in the map
}

// place is where the requests for a store go. Without handler and server the
// store cannot be reached.
type place struct {
	id     sealfs.UUID
	local  op.Handler
	server *server
}

// New returns a router; Close ends it. Nothing is connected yet.
func New(o Options) *Router {
	o.setDefaults()
	r := &Router{o: o, servers: make(map[string]*server), refreshing: make(map[sealfs.Shard]*refresh)}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// Close ends all links; what is under way, and later requests, return ErrClosed.
// It returns when nothing that the router started runs any more.
func (r *Router) Close() {
	r.mu.Lock()
	r.closed = true
	r.table.Store(nil)
	servers := r.servers
	r.servers = nil
	r.mu.Unlock()
	for _, s := range servers {
		s.retire(errClosed) // before cancel, which must not be taken for a failure
	}
	r.cancel()
	r.wg.Wait()
}

var errClosed = fmt.Errorf("router: %w", sealfs.ErrClosed)

// spawn runs f on a goroutine that Close waits for, unless the router is closed.
func (r *Router) spawn(f func()) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		r.wg.Go(f)
	}
	return !r.closed
}

// Renew makes the routing table anew: after a change of what Options.Local
// answers, or to leave servers that are no longer in the map before the
// next request does so.
func (r *Router) Renew() {
	r.mu.Lock()
	r.table.Store(nil)
	r.mu.Unlock()
	_, _ = r.current()
}

// current returns the table of the newest map.
func (r *Router) current() (*table, error) {
	if t := r.table.Load(); t != nil && t.m == r.o.Map() {
		return t, nil
	}
	return r.build()
}

// build makes the table of the newest map, and leaves servers without a store.
func (r *Router) build() (*table, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, errClosed
	}
	m := r.o.Map() // here, so that the newest is not followed by an older one
	if m == nil {
		return nil, fmt.Errorf("no cluster map yet: %w", sealfs.ErrUnavailable)
	}
	if t := r.table.Load(); t != nil && t.m == m {
		return t, nil
	}
	t := &table{m: m, places: make([]place, len(m.Stores))}
	stores := make(map[string][]sealfs.UUID)
	for i, info := range m.Stores {
		p := &t.places[i]
		p.id = info.ID
		if info.State == cluster.StoreLeft {
			continue
		}
		if r.o.Local != nil {
			p.local = r.o.Local(info.ID)
		}
		if p.local == nil && info.Addr != "" {
			if p.server = r.servers[info.Addr]; p.server == nil {
				p.server = newServer(r, info.Addr, cmp.Or(r.o.Cluster, m.Cluster))
				r.servers[info.Addr] = p.server
			}
			stores[info.Addr] = append(stores[info.Addr], info.ID)
		}
	}
	for addr, s := range r.servers {
		if ids := stores[addr]; ids != nil {
			if old := *s.stores.Swap(&ids); r.o.Register != nil && slices.ContainsFunc(ids, func(id sealfs.UUID) bool { return !slices.Contains(old, id) }) {
				s.moved()
			}
		} else {
			delete(r.servers, addr)
			s.retire(fmt.Errorf("server at %s: %w: the map names it no more", addr, sealfs.ErrUnavailable))
		}
	}
	r.table.Store(t)
	return t, nil
}

// primary returns the row of a shard and the place of its primary.
func (t *table) primary(shard sealfs.Shard) (*cluster.ShardInfo, *place, error) {
	if int(shard) >= len(t.m.Table) {
		return nil, nil, fmt.Errorf("shard %d of %d: %w", shard, len(t.m.Table), sealfs.ErrInvalid)
	}
	row := &t.m.Table[shard]
	if len(row.Replicas) == 0 || int(row.Replicas[0]) >= len(t.places) {
		return nil, nil, fmt.Errorf("shard %d lies in no store that is known yet: %w", shard, sealfs.ErrUnavailable)
	}
	return row, &t.places[row.Replicas[0]], nil
}

// Do sends the request to the primary of req.Shard and sets req.Epoch: see
// op.Handler. When the server answers ErrStale, the shard's row is refreshed
// and the request is sent once more; a second ErrStale, or one while the row
// cannot be refreshed, is the answer.
func (r *Router) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	return r.do(ctx, req, rep, nil)
}

// do is Do, over the connection of f if that is given.
func (r *Router) do(ctx context.Context, req *op.Request, rep *op.Reply, f *fresh) error {
	t, err := r.current()
	if err != nil {
		return err
	}
	row, p, err := t.primary(req.Shard)
	if err != nil {
		return err
	}
	data := rep.Data
	err = r.send(ctx, row, p, req, rep, f)
	if !stale(rep, err) {
		return err
	}
	if t = r.refreshed(ctx, row, req.Shard); t == nil {
		return err
	}
	if row, p, err = t.primary(req.Shard); err != nil {
		return err
	}
	rep.Reset()
	rep.Data = data
	return r.send(ctx, row, p, req, rep, f)
}

// stale reports whether the answer says that the sender's row is out of date.
func stale(rep *op.Reply, err error) bool {
	if err == nil {
		return rep.Code == sealfs.ErrStale
	}
	return errors.Is(err, sealfs.ErrStale)
}

func (r *Router) send(ctx context.Context, row *cluster.ShardInfo, p *place, req *op.Request, rep *op.Reply, f *fresh) error {
	req.Epoch = row.Epoch
	switch {
	case f != nil && p.server != f.s:
		return fmt.Errorf("shard %d does not lie at the server at %s: %w", req.Shard, f.s.addr, sealfs.ErrStale)
	case f != nil:
		return f.c.Do(ctx, req, rep)
	case p.local != nil:
		return p.local.Do(ctx, req, rep)
	case p.server == nil:
		return fmt.Errorf("store %v has left, or its address is not known: %w", p.id, sealfs.ErrUnavailable)
	}
	if err := p.server.do(ctx, req, rep); err != nil {
		return fmt.Errorf("store %v: %w", p.id, err)
	}
	return nil
}

// refresh is one under way, for all who need it.
type refresh struct {
	done chan struct{}
	err  error
}

// refreshed returns a table that is newer than row, or at least has been
// refreshed after row was found to be stale; nil if that is not to be had.
func (r *Router) refreshed(ctx context.Context, row *cluster.ShardInfo, shard sealfs.Shard) *table {
	t, err := r.current()
	if err != nil {
		return nil
	}
	if now, _, err := t.primary(shard); err != nil || now.Epoch != row.Epoch || !slices.Equal(now.Replicas, row.Replicas) {
		return t
	}
	if r.o.Refresh == nil {
		return nil
	}
	r.mu.Lock()
	f := r.refreshing[shard]
	if f == nil {
		if r.closed {
			r.mu.Unlock()
			return nil
		}
		f = &refresh{done: make(chan struct{})}
		r.refreshing[shard] = f
		r.wg.Go(func() { r.refresh(f, shard) })
	}
	r.mu.Unlock()
	select {
	case <-f.done:
	case <-ctx.Done():
		return nil
	}
	if f.err != nil {
		return nil
	}
	if t, err = r.current(); err != nil {
		return nil
	}
	return t
}

func (r *Router) refresh(f *refresh, shard sealfs.Shard) {
	ctx, cancel := context.WithTimeout(r.ctx, r.o.RefreshTimeout)
	defer cancel()
	if f.err = r.o.Refresh(ctx, shard); f.err != nil {
		r.o.Logger.Warn("a row of the map cannot be refreshed", "shard", uint64(shard), "error", f.err)
	}
	r.mu.Lock()
	delete(r.refreshing, shard)
	r.mu.Unlock()
	close(f.done)
}

// Each calls fn, one after the other, for every store that is the primary of a
// shard, with the least such shard: so a request for that shard is one for the
// store. It goes on after an error, but not after ctx has ended, and returns all errors.
func (r *Router) Each(ctx context.Context, fn func(store cluster.StoreInfo, shard sealfs.Shard) error) error {
	t, err := r.current()
	if err != nil {
		return err
	}
	first := make([]int, len(t.m.Stores))
	for shard, row := range slices.Backward(t.m.Table) {
		if len(row.Replicas) > 0 {
			first[row.Replicas[0]] = shard + 1
		}
	}
	var errs []error
	for i, shard := range first {
		if shard == 0 {
			continue
		}
		if ctx.Err() != nil {
			errs = append(errs, fmt.Errorf("%w: %w", sealfs.ErrInterrupted, context.Cause(ctx)))
			break
		}
		if err := fn(t.m.Stores[i], sealfs.Shard(shard-1)); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// State says how the router stands with a server.
type State string

// The states of a server.
const (
	Idle       State = "idle" // not needed since the last link, if there was one, ended
	Connecting State = "connecting"
	Up         State = "up"
	Away       State = "away" // the last attempt failed, and so do requests for a while
)

// ServerStats is what the router knows of one server.
type ServerStats struct {
	Addr   string
	Stores []sealfs.UUID // that the map places there and that are not of this process
	State  State
	Since  time.Time // of the state; zero if nothing has happened yet
	Err    string    // why the last link or attempt failed; empty while Up

	Requests uint64     // sent there, or meant to be
	Failures uint64     // of them that got ErrUnavailable
	Links    uint64     // made so far; the second is the first reconnect
	Wire     wire.Stats // of all connections, those that have ended included
}

// Stats returns what the router knows of the servers in the map, by address.
// Stores of this process have none.
func (r *Router) Stats() []ServerStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]ServerStats, 0, len(r.servers))
	for _, s := range r.servers {
		all = append(all, s.stats())
	}
	slices.SortFunc(all, func(a, b ServerStats) int { return strings.Compare(a.Addr, b.Addr) })
	return all
}
