package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"sealfs"
)

// Options says where a manager lives and how it behaves.
type Options struct {
	// Dir holds the manager's state. It is made if there is none and Cluster,
	// Bootstrap or Join says so.
	Dir string
	// Cluster is the identifier of the cluster. If Dir holds a manager already,
	// it must be this one; zero opens whatever Dir holds. If it does not, an
	// embedded manager makes a cluster of this identifier, and without one fails.
	Cluster sealfs.UUID

	// Addr is where other managers, servers and clients reach this manager, as
	// host:port. The manager is embedded if it is empty: alone in its cluster, and
	// open for this process only. A directory that was made by an embedded manager
	// can be opened with an address, and is then the first of several.
	Addr string
	// Bootstrap makes a new cluster, with this manager as the only one; Join
	// makes this manager one more of the cluster that has managers at these
	// addresses. Both need Addr, and count only until the manager is a member.
	Bootstrap bool
	Join      []string

	// The following count only when a cluster is made.

	Name      string // of the cluster; "sealfs" if empty
	Shards    uint32 // a power of two, sealfs.ShardsDefault if 0
	Replicas  int    // of each shard, 1 if 0
	OpVersion uint32 // 1 if 0

	// SuspectAfter and DownAfter are the silences after which a store is
	// suspected and given up; 3 s and 10 s if 0. DownAfter is also how long a
	// server's lease lasts; it must be the same at all managers.
	SuspectAfter, DownAfter time.Duration
	// SessionTTL is how long a client's session lives without being renewed; 60 s if 0.
	SessionTTL time.Duration

	// Logger gets what an operator should know; nil discards it.
	Logger *slog.Logger

	// The rest is for tests: log entries between snapshots, what comes between
	// the log store and its file, Raft's time-outs, and the clock.
	snapshotAfter uint64
	wrap          func(boltStore) boltStore
	timeout       time.Duration
	now           func() time.Time
}

func (o Options) withDefaults() Options {
	def := func(p *time.Duration, d time.Duration) {
		if *p == 0 {
			*p = d
		}
	}
	if o.Name == "" {
		o.Name = "sealfs"
	}
	if o.Shards == 0 {
		o.Shards = sealfs.ShardsDefault
	}
	if o.Replicas == 0 {
		o.Replicas = 1
	}
	if o.OpVersion == 0 {
		o.OpVersion = 1
	}
	def(&o.SuspectAfter, 3*time.Second)
	def(&o.DownAfter, max(10*time.Second, 3*o.SuspectAfter))
	def(&o.SessionTTL, time.Minute)
	if o.Addr == "" {
		def(&o.timeout, timeoutEmbedded)
	}
	def(&o.timeout, timeoutNetwork)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.snapshotAfter == 0 {
		o.snapshotAfter = snapshotAfter
	}
	if o.now == nil {
		o.now = time.Now
	}
	return o
}

// Validate reports all faults of o at once. Zero values stand for defaults.
func (o Options) Validate() error {
	d := o.withDefaults()
	var errs []error
	fault := func(bad bool, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf(format+": %w", append(args, sealfs.ErrInvalid)...))
		}
	}
	fault(d.Dir == "", "a directory is needed")
	errs = append(errs, checkGeometry(d.Name, d.Shards, d.Replicas))
	fault(d.SuspectAfter < 10*time.Millisecond, "suspect after %s: less than 10ms", d.SuspectAfter)
	fault(d.DownAfter <= d.SuspectAfter, "down after %s: not more than suspect after %s", d.DownAfter, d.SuspectAfter)
	fault(d.SessionTTL < 10*time.Millisecond, "sessions of %s: less than 10ms", d.SessionTTL)
	fault(d.Addr == "" && (d.Bootstrap || len(d.Join) > 0), "to make or join a cluster of managers, an address is needed")
	fault(d.Bootstrap && len(d.Join) > 0, "either make a cluster or join one")
	if d.Addr != "" {
		errs = append(errs, checkAddr("this manager's address", d.Addr))
		// A lease has to outlive an election, at the worst: the leader is missed
		// after one to two time-outs, and a vote that is split costs as much again.
		fault(d.DownAfter < 5*d.timeout, "down after %s: less than five of Raft's time-outs of %s", d.DownAfter, d.timeout)
		fault(d.SessionTTL < 5*d.timeout, "sessions of %s: less than five of Raft's time-outs of %s", d.SessionTTL, d.timeout)
	}
	for _, a := range d.Join {
		errs = append(errs, checkAddr("address to join", a))
	}
	return errors.Join(errs...)
}

// checkAddr reports why nobody could connect to addr.
func checkAddr(what, addr string) error {
	if err := checkLocation(what, addr); err != nil {
		return err
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil || port == "" || port == "0" {
		return fmt.Errorf("%s %q is not host:port: %w", what, addr, sealfs.ErrInvalid)
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		return fmt.Errorf("%s %q: others need a host or an address that leads here: %w", what, addr, sealfs.ErrInvalid)
	}
	return nil
}

// Manager is an open manager. Its methods may be called from anywhere; those
// that change the map return when the change is durable and visible in Map.
// When ctx ends before that, the change may or may not happen later, which is
// ErrInterrupted. Of several managers only the one that leads takes changes and
// heartbeats; on the others these methods fail with ErrUnavailable, and nothing
// happened. (Remote finds the leader.)
type Manager struct {
	o       Options
	id      sealfs.UUID // this manager's in Raft's configuration
	cluster sealfs.UUID // zero until known
	latch   *latch
	lock    *os.File
	store   *logStore
	fsm     *fsm
	raft    *raft.Raft
	stream  *stream // Raft's connections; nil if embedded
	joining bool    // not a member of its cluster yet

	lead        atomic.Pointer[leadership] // nil while another leads
	leadMu      sync.Mutex
	leadChanged chan struct{} // closed when the leader changes
	poke        chan struct{} // a store may have another state, or a session may have ended
	membership  sync.Mutex    // one change at a time
	encoded     atomic.Pointer[encodedMap]

	ctx      context.Context // ends with Close
	stop     context.CancelFunc
	work     sync.WaitGroup
	closed   atomic.Bool
	closing  sync.Once
	closeErr error // of Close
}

// Open opens the manager in o.Dir, or makes it there. Only one process can have
// a manager open; for others Open fails with ErrBusy and names the pid of the
// holder. If there is none and none is to be made: ErrNotExist.
//
// A manager that is alone in its cluster leads and has its map when Open
// returns: within about 0.2 s if it is embedded, within two of Raft's time-outs
// otherwise. One of several only begins: others reach it once Serve runs, and
// Map returns nil until there is a leader; see WaitReady.
func Open(ctx context.Context, o Options) (_ *Manager, err error) {
	if err := o.Validate(); err != nil {
		return nil, fmt.Errorf("options of the manager: %w", err)
	}
	m := newManager(o)
	defer func() {
		if err == nil {
			return
		}
		if failed := m.latch.Err(); failed != nil {
			err = failed // what raft makes of it has lost the code
		}
		err = fmt.Errorf("manager in %s: %w", m.o.Dir, errors.Join(err, m.Close()))
	}()
	if err := m.openFiles(ctx); err != nil {
		return nil, err
	}
	if err := m.startRaft(); err != nil {
		return nil, err
	}
	m.work.Go(m.follow)
	if m.alone() {
		if err := m.awaitLead(ctx); err != nil {
			return nil, err
		}
		if err := m.initialise(ctx); err != nil {
			return nil, err
		}
	}
	m.work.Go(m.watch)
	if m.stream != nil {
		m.work.Go(m.keepMembership)
	}
	return m, nil
}

func newManager(o Options) *Manager {
	m := &Manager{o: o.withDefaults(), latch: newLatch(), leadChanged: make(chan struct{}), poke: make(chan struct{}, 1)}
	m.ctx, m.stop = context.WithCancel(context.Background())
	m.fsm = newFSM(m.latch)
	return m
}

// initialise makes the cluster if there is none, checks that it is the right
// one, and gives this manager its address in the configuration.
func (m *Manager) initialise(ctx context.Context) error {
	mp := m.Map()
	switch {
	case mp == nil && m.o.Cluster.IsZero() && !m.o.Bootstrap:
		return fmt.Errorf("the cluster was never initialised: %w", sealfs.ErrNotExist)
	case mp == nil:
		_, err := m.propose(ctx, command{kind: cmdInit, init: Map{
			Cluster: m.cluster, Name: m.o.Name, Shards: m.o.Shards, Replicas: m.o.Replicas, OpVersion: m.o.OpVersion,
		}})
		if err != nil {
			return err
		}
	case !m.o.Cluster.IsZero() && mp.Cluster != m.o.Cluster:
		return m.otherCluster(mp.Cluster)
	}
	if s, ok := m.member(m.id); m.stream != nil && ok && string(s.Address) != m.o.Addr {
		return m.await(ctx, m.raft.AddVoter(s.ID, raft.ServerAddress(m.o.Addr), 0, 0))
	}
	return nil
}

func (m *Manager) otherCluster(have sealfs.UUID) error {
	return fmt.Errorf("it is of cluster %s, not %s: %w", have, m.o.Cluster, sealfs.ErrInvalid)
}

// Close stops the manager; what was acknowledged is durable already. It may be
// called repeatedly, and returns the same again. A Serve that runs ends too.
func (m *Manager) Close() error {
	m.closing.Do(func() {
		m.closed.Store(true)
		m.stop()
		m.work.Wait()
		var errs []error
		if m.raft != nil {
			errs = append(errs, m.raft.Shutdown().Error())
		}
		if m.stream != nil {
			errs = append(errs, m.stream.Close())
		}
		if m.store != nil {
			errs = append(errs, m.store.Close())
		}
		if m.lock != nil {
			errs = append(errs, m.lock.Close())
		}
		m.closeErr = errors.Join(errs...)
	})
	return m.closeErr
}

// Failed returns a channel that is closed when the manager stops for good by
// itself, and Err then says why.
func (m *Manager) Failed() <-chan struct{} { return m.latch.done }

// Err returns why the manager has stopped for good, ErrClosed after Close, or nil.
func (m *Manager) Err() error {
	if err := m.latch.Err(); err != nil || !m.closed.Load() {
		return err
	}
	return fmt.Errorf("manager: %w", sealfs.ErrClosed)
}

// ID returns this manager's identifier, which it has for ever.
func (m *Manager) ID() sealfs.UUID { return m.id }

// Map returns the latest map that this manager knows, nil if it knows none yet.
// It stays what it was when the manager is closed.
func (m *Manager) Map() *Map { return m.fsm.m.Load() }

// Changed returns a channel that is closed with the next change of the map. Take
// the channel first and the map then, and no change is missed.
func (m *Manager) Changed() <-chan struct{} { return m.fsm.wait() }
