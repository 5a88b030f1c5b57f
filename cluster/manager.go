package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/internal/enc"
)

// Options says where a manager lives and how it behaves.
type Options struct {
	// Dir holds the manager's state. It is made if Cluster is given.
	Dir string
	// Cluster is the identifier of the cluster. If Dir holds no manager yet, one
	// is made for this cluster; if it does, it must be this one. Zero opens
	// whatever Dir holds, and makes nothing.
	Cluster sealfs.UUID

	// The following count only when a cluster is made.

	Name      string // of the cluster; "sealfs" if empty
	Shards    uint32 // a power of two, sealfs.ShardsDefault if 0
	Replicas  int    // of each shard, 1 if 0
	OpVersion uint32 // 1 if 0

	// SuspectAfter and DownAfter are the silences after which a store is
	// suspected and given up; 3 s and 10 s if 0.
	SuspectAfter, DownAfter time.Duration

	// Logger gets what an operator should know; nil discards it.
	Logger *slog.Logger

	// snapshotAfter and wrap are for tests: log entries between snapshots, and
	// what comes between the log store and its file.
	snapshotAfter uint64
	wrap          func(boltStore) boltStore
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
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.snapshotAfter == 0 {
		o.snapshotAfter = snapshotAfter
	}
	return o
}

// Validate reports all faults of o at once. Zero values stand for defaults.
func (o Options) Validate() error {
	d := o.withDefaults()
	var errs []error
	if d.Dir == "" {
		errs = append(errs, fmt.Errorf("a directory is needed: %w", sealfs.ErrInvalid))
	}
	errs = append(errs, checkGeometry(d.Name, d.Shards, d.Replicas))
	if d.SuspectAfter < 10*time.Millisecond {
		errs = append(errs, fmt.Errorf("suspect after %s: less than 10ms: %w", d.SuspectAfter, sealfs.ErrInvalid))
	}
	if d.DownAfter <= d.SuspectAfter {
		errs = append(errs, fmt.Errorf("down after %s: not more than suspect after %s: %w", d.DownAfter, d.SuspectAfter, sealfs.ErrInvalid))
	}
	return errors.Join(errs...)
}

// Raft's tuning.
const (
	// timeout is Raft's heartbeat, election and lease time-out. A single voter
	// waits between one and two of them before it elects itself, and from then
	// on never loses its own heartbeats: short is only quick.
	timeout = 40 * time.Millisecond
	// A map is small, so snapshots are frequent and the log is short. What stays
	// behind a snapshot reaches back beyond the one before, so that this one
	// still serves if the newest is damaged.
	snapshotAfter    = 256
	snapshotInterval = 2 * time.Second
	snapshotsKept    = 2
	trailing         = 8 // in units of snapshotAfter
	logCache         = 512
)

// Manager is an open manager. Its methods may be called from anywhere; those
// that change the map return when the change is durable and visible in Map.
// When ctx ends before that, the change may or may not happen later.
type Manager struct {
	o     Options
	id    string // this manager's in Raft's configuration
	latch *latch
	lock  *os.File
	store *logStore
	fsm   *fsm
	raft  *raft.Raft
	live  *liveness
	poke  chan struct{} // a store that was not up has been heard of

	stop     context.CancelFunc // ends watch
	watched  sync.WaitGroup
	closed   atomic.Bool
	closing  sync.Once
	closeErr error // of Close
}

// Open opens the manager in o.Dir, or makes it there if o.Cluster says so, and
// returns when it leads and its map is current: within about 0.2 s. Only one
// process can have a manager open; for others Open fails with ErrBusy and names
// the pid of the holder. If there is none and none is to be made: ErrNotExist.
func Open(ctx context.Context, o Options) (_ *Manager, err error) {
	if err := o.Validate(); err != nil {
		return nil, fmt.Errorf("options of the manager: %w", err)
	}
	m := &Manager{o: o.withDefaults(), latch: newLatch(), poke: make(chan struct{}, 1), stop: func() {}}
	m.fsm = newFSM(m.latch)
	m.live = newLiveness(m.o.SuspectAfter, m.o.DownAfter)
	defer func() {
		if err == nil {
			return
		}
		if failed := m.latch.Err(); failed != nil {
			err = failed // what raft makes of it has lost the code
		}
		err = fmt.Errorf("manager in %s: %w", m.o.Dir, errors.Join(err, m.Close()))
	}()
	if err := m.openFiles(); err != nil {
		return nil, err
	}
	if err := m.startRaft(); err != nil {
		return nil, err
	}
	if err := m.awaitLead(ctx); err != nil {
		return nil, err
	}
	if err := m.initialise(ctx); err != nil {
		return nil, err
	}
	watching, stop := context.WithCancel(context.Background())
	m.stop = stop
	m.watched.Go(func() { m.watch(watching) })
	return m, nil
}

// openFiles takes the directory's lock, opens the log and finds out who we are.
func (m *Manager) openFiles() error {
	path := filepath.Join(m.o.Dir, boltFile)
	_, statErr := os.Stat(path)
	switch fresh := errors.Is(statErr, os.ErrNotExist); {
	case fresh && m.o.Cluster.IsZero():
		return fmt.Errorf("there is no %s: %w", boltFile, sealfs.ErrNotExist)
	case fresh:
		if err := os.MkdirAll(filepath.Join(m.o.Dir, "snapshots"), 0o755); err != nil {
			return err
		}
		if err := syncDir(filepath.Dir(filepath.Clean(m.o.Dir))); err != nil {
			return err
		}
	case statErr != nil:
		return statErr
	}
	if err := m.takeLock(); err != nil {
		return err
	}
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		if old, err := filepath.Glob(filepath.Join(m.o.Dir, "snapshots", "*")); err != nil || len(old) > 0 {
			return &sealfs.Corruption{Where: path, Off: -1, What: "the file is missing, but there are snapshots"}
		}
	}
	if err := m.sweep(); err != nil {
		return err
	}
	var err error
	if m.store, err = openLogStore(m.o.Dir, m.latch); err != nil {
		return err
	}
	if m.o.wrap != nil {
		m.store.bolt = m.o.wrap(m.store.bolt)
	}
	if err := m.store.verify(); err != nil {
		return err
	}
	return m.identify()
}

// takeLock makes sure that no other process has the directory open.
func (m *Manager) takeLock() error {
	f, err := os.OpenFile(filepath.Join(m.o.Dir, "lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		pid, _ := io.ReadAll(io.LimitReader(f, 20))
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			if len(pid) == 0 { // it is about to write it
				pid = []byte("unknown (it is just starting)")
			}
			return fmt.Errorf("held by pid %s: %w", strings.TrimSpace(string(pid)), sealfs.ErrBusy)
		}
		return fmt.Errorf("lock: %w", err)
	}
	m.lock = f
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err = fmt.Fprintln(f, os.Getpid())
	return err
}

// sweep removes snapshots that a killed process left unfinished.
func (m *Manager) sweep() error {
	drafts, err := filepath.Glob(filepath.Join(m.o.Dir, "snapshots", "*.tmp"))
	for _, d := range drafts {
		err = errors.Join(err, os.RemoveAll(d))
	}
	return err
}

// identityKey is the variable that says who this manager is: 8 magic
// "SEALFSm1", 2 version (1), 16 identifier of the manager.
const (
	identityKey     = "SealFSManager"
	identityMagic   = "SEALFSm1"
	identityVersion = 1
)

// identify reads the manager's identity, or makes one in an empty log.
func (m *Manager) identify() error {
	b, err := m.store.Get([]byte(identityKey))
	switch {
	case err == nil:
		r := enc.Reader{B: b}
		magic, version, id := r.Bytes(8), r.U16(), readUUID(&r)
		if r.Err || string(magic) != identityMagic {
			return &sealfs.Corruption{Where: m.store.path, Off: -1, What: "identity of the manager"}
		}
		if version != identityVersion {
			return fmt.Errorf("%s is of format version %d, this program knows %d: %w", m.store.path, version, identityVersion, sealfs.ErrVersion)
		}
		m.id = id.String()
		return nil
	case !errors.Is(err, raftboltdb.ErrKeyNotFound):
		return err
	}
	if last, err := m.store.LastIndex(); err != nil {
		return err
	} else if last > 0 {
		return &sealfs.Corruption{Where: m.store.path, Off: -1, What: "a Raft log without an identity"}
	}
	if m.o.Cluster.IsZero() {
		return fmt.Errorf("the manager was never initialised: %w", sealfs.ErrNotExist)
	}
	id := sealfs.NewUUID()
	m.id = id.String()
	return m.store.Set([]byte(identityKey), append(enc.AppendU16([]byte(identityMagic), identityVersion), id[:]...))
}

// startRaft starts Raft with this manager as the only voter.
func (m *Manager) startRaft() (err error) {
	log := raftLogger(m.o.Logger)
	snaps, err := raft.NewFileSnapshotStoreWithLogger(m.o.Dir, snapshotsKept, log)
	if err != nil {
		return err
	}
	cache, err := raft.NewLogCache(logCache, m.store)
	if err != nil {
		return err
	}
	addr, transport := raft.NewInmemTransport("embedded")
	conf := raft.DefaultConfig()
	conf.LocalID = raft.ServerID(m.id)
	conf.HeartbeatTimeout, conf.ElectionTimeout, conf.LeaderLeaseTimeout = timeout, timeout, timeout
	conf.SnapshotThreshold, conf.SnapshotInterval = m.o.snapshotAfter, snapshotInterval
	if m.o.snapshotAfter < snapshotAfter {
		conf.SnapshotInterval = 20 * time.Millisecond
	}
	conf.TrailingLogs = trailing * m.o.snapshotAfter
	conf.BatchApplyCh, conf.NoLegacyTelemetry = true, true
	conf.Logger = log
	// Raft panics over what it cannot read.
	defer func() {
		if r := recover(); r != nil {
			err = &sealfs.Corruption{Where: m.store.path, Off: -1, What: fmt.Sprint("Raft log: ", r)}
		}
	}()
	last, err := m.store.LastIndex()
	if err != nil {
		return err
	}
	if old, err := snaps.List(); err != nil {
		return err
	} else if last == 0 && len(old) > 0 {
		return &sealfs.Corruption{Where: m.store.path, Off: -1, What: "the Raft log is empty, but there are snapshots"}
	}
	if last == 0 {
		voters := raft.Configuration{Servers: []raft.Server{{ID: conf.LocalID, Address: addr}}}
		// A crash between Raft's first variable and its first log entry leaves
		// a state that looks used: it is not, nothing was ever proposed.
		if err := raft.BootstrapCluster(conf, cache, m.store, snaps, transport, voters); errors.Is(err, raft.ErrCantBootstrap) {
			err = cache.StoreLog(&raft.Log{Index: 1, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(voters)})
			if err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
	}
	r, err := raft.NewRaft(conf, m.fsm, cache, m.store, snaps, transport)
	if err != nil {
		m.fsm.mu.Lock()
		defer m.fsm.mu.Unlock()
		return errors.Join(err, m.fsm.refused)
	}
	m.store.running.Store(true)
	m.raft = r
	return nil
}

// raftLogger passes raft's messages on. Elections and snapshots are business as
// usual for a single voter; raft's errors are the operator's business too.
func raftLogger(to *slog.Logger) hclog.Logger {
	log := hclog.NewInterceptLogger(&hclog.LoggerOptions{Name: "raft", Output: io.Discard, Level: hclog.Off})
	log.RegisterSink(sink{to})
	return log
}

type sink struct{ to *slog.Logger }

// Accept implements hclog.SinkAdapter.
func (s sink) Accept(name string, level hclog.Level, msg string, args ...any) {
	to := slog.LevelDebug
	if level >= hclog.Error {
		to = slog.LevelError
	}
	s.to.Log(context.Background(), to, name+": "+msg, args...)
}

// awaitLead waits until this manager leads and has applied its whole log.
func (m *Manager) awaitLead(ctx context.Context) error {
	for lead := false; !lead; {
		select {
		case lead = <-m.raft.LeaderCh():
		case <-m.latch.done:
			return m.latch.Err()
		case <-ctx.Done():
			return fmt.Errorf("no leader yet: %w: %w", context.Cause(ctx), sealfs.ErrUnavailable)
		}
	}
	return m.await(ctx, m.raft.Barrier(0))
}

// await waits for a future of raft.
func (m *Manager) await(ctx context.Context, f raft.Future) error {
	done := make(chan error, 1)
	go func() { done <- f.Error() }()
	select {
	case err := <-done:
		if failed := m.latch.Err(); failed != nil {
			return fmt.Errorf("the manager has stopped: %w", failed)
		}
		if m.closed.Load() {
			return fmt.Errorf("manager: %w", sealfs.ErrClosed)
		}
		if err != nil {
			return fmt.Errorf("raft: %w: %w", err, sealfs.ErrUnavailable)
		}
		return nil
	case <-m.latch.done:
		// Raft may have ended without an answer: see logStore.running.
		return fmt.Errorf("the manager has stopped: %w", m.latch.Err())
	case <-ctx.Done():
		return fmt.Errorf("not known whether the change happened: %w: %w", context.Cause(ctx), sealfs.ErrInterrupted)
	}
}

// initialise makes the cluster if there is none, and checks that it is the
// right one.
func (m *Manager) initialise(ctx context.Context) error {
	mp := m.Map()
	switch {
	case mp == nil && m.o.Cluster.IsZero():
		return fmt.Errorf("the cluster was never initialised: %w", sealfs.ErrNotExist)
	case mp == nil:
		_, err := m.propose(ctx, command{kind: cmdInit, init: Map{
			Cluster: m.o.Cluster, Name: m.o.Name, Shards: m.o.Shards, Replicas: m.o.Replicas, OpVersion: m.o.OpVersion,
		}})
		return err
	case !m.o.Cluster.IsZero() && mp.Cluster != m.o.Cluster:
		return fmt.Errorf("it is of cluster %s, not %s: %w", mp.Cluster, m.o.Cluster, sealfs.ErrInvalid)
	}
	return nil
}

// Close stops the manager; what was acknowledged is durable already. It may be
// called repeatedly, and returns the same again.
func (m *Manager) Close() error {
	m.closing.Do(func() {
		m.closed.Store(true)
		m.stop()
		m.watched.Wait()
		var errs []error
		if m.raft != nil {
			errs = append(errs, m.raft.Shutdown().Error())
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

// Map returns the latest map. It stays what it was when the manager is closed.
func (m *Manager) Map() *Map { return m.fsm.m.Load() }

// Changed returns a channel that is closed with the next change of the map. Take
// the channel first and the map then, and no change is missed.
func (m *Manager) Changed() <-chan struct{} { return m.fsm.wait() }

// propose has a command committed and executed.
func (m *Manager) propose(ctx context.Context, c command) (VolumeInfo, error) {
	switch {
	case m.closed.Load():
		return VolumeInfo{}, fmt.Errorf("manager: %w", sealfs.ErrClosed)
	case ctx.Err() != nil:
		return VolumeInfo{}, fmt.Errorf("%w: %w", context.Cause(ctx), sealfs.ErrInterrupted)
	}
	b := c.encode()
	if _, err := decodeCommand(b); err != nil {
		// What no manager could read must not get into the log.
		return VolumeInfo{}, fmt.Errorf("an argument is too long: %w", sealfs.ErrInvalid)
	}
	f := m.raft.Apply(b, 0)
	if err := m.await(ctx, f); err != nil {
		return VolumeInfo{}, err
	}
	r, ok := f.Response().(result)
	if !ok { // raft answers nil when it shuts down in between
		return VolumeInfo{}, fmt.Errorf("raft gave no answer: %w", sealfs.ErrUnavailable)
	}
	return r.volume, r.err
}

// AddStore makes a store part of the cluster, or changes what the cluster knows
// of it (its state apart); it costs nothing if there is no difference. Weight 0
// stands for one per GiB of Bytes.
//
// Until the first volume is made, shards are placed over all stores there are.
// A store that comes later holds none until shards can be moved.
func (m *Manager) AddStore(ctx context.Context, s StoreInfo) error {
	if s.Weight == 0 {
		s.Weight = uint32(min(max(s.Bytes>>30, 1), 1<<31))
	}
	mp := m.Map()
	if i := mp.StoreIndex(s.ID); i >= 0 && mp.Stores[i].State != StoreLeft {
		if s.State = mp.Stores[i].State; s == mp.Stores[i] {
			return nil
		}
	}
	_, err := m.propose(ctx, command{kind: cmdStore, store: s})
	return err
}

// RemoveStore takes a store out of the cluster for ever. One that holds shards
// with data is refused with ErrBusy.
func (m *Manager) RemoveStore(ctx context.Context, id sealfs.UUID) error {
	return m.setStoreState(ctx, id, StoreLeft)
}

func (m *Manager) setStoreState(ctx context.Context, id sealfs.UUID, to StoreState) error {
	_, err := m.propose(ctx, command{kind: cmdStoreState, store: StoreInfo{ID: id, State: to}})
	return err
}

// VolumeSpec is what the maker of a volume decides.
type VolumeSpec struct {
	Name     string // see CheckName
	Bytes    uint64 // quota, 0 for none
	Inodes   uint64 // quota, 0 for none
	Mode     uint32 // permissions of the root directory
	UID, GID uint32 // owner of the root directory
}

// CreateVolume gives a new volume its number. The volume is in state creating:
// whoever makes its root directory calls VolumeReady then. ErrExist if there is
// a volume of that name, be it one that is being deleted.
func (m *Manager) CreateVolume(ctx context.Context, spec VolumeSpec) (VolumeInfo, error) {
	if err := CheckName(spec.Name); err != nil {
		return VolumeInfo{}, fmt.Errorf("volume: %w", err)
	}
	return m.propose(ctx, command{kind: cmdCreateVolume, volume: VolumeInfo{
		Name: spec.Name, Bytes: spec.Bytes, Inodes: spec.Inodes, Created: time.Now().UTC(), Mode: spec.Mode, UID: spec.UID, GID: spec.GID,
	}})
}

// VolumeReady says that the volume's root directory exists: from now on it can
// be mounted.
func (m *Manager) VolumeReady(ctx context.Context, id sealfs.Volume, root sealfs.Ino) (VolumeInfo, error) {
	return m.propose(ctx, command{kind: cmdVolumeReady, volume: VolumeInfo{ID: id, Root: root}})
}

// ResizeVolume sets the volume's quotas, 0 for none. They may be below what is in use.
func (m *Manager) ResizeVolume(ctx context.Context, id sealfs.Volume, quotaBytes, quotaInodes uint64) (VolumeInfo, error) {
	return m.propose(ctx, command{kind: cmdResizeVolume, volume: VolumeInfo{ID: id, Bytes: quotaBytes, Inodes: quotaInodes}})
}

// DeleteVolume begins to delete a volume. It keeps its name and number until
// its inodes are gone and VolumeDeleted is called.
func (m *Manager) DeleteVolume(ctx context.Context, id sealfs.Volume) (VolumeInfo, error) {
	return m.propose(ctx, command{kind: cmdDeleteVolume, volume: VolumeInfo{ID: id}})
}

// VolumeDeleted takes a volume that is being deleted off the map.
func (m *Manager) VolumeDeleted(ctx context.Context, id sealfs.Volume) error {
	_, err := m.propose(ctx, command{kind: cmdVolumeDeleted, volume: VolumeInfo{ID: id}})
	return err
}

// Beat takes a store's heartbeat; it does not block. A store should send one
// three times per Options.SuspectAfter.
func (m *Manager) Beat(id sealfs.UUID, s StoreStats) error {
	if m.closed.Load() {
		return fmt.Errorf("manager: %w", sealfs.ErrClosed)
	}
	if err := m.latch.Err(); err != nil {
		return fmt.Errorf("the manager has stopped: %w", err)
	}
	mp := m.Map()
	i := mp.StoreIndex(id)
	if i < 0 || mp.Stores[i].State == StoreLeft {
		return fmt.Errorf("store %s is not in the cluster: %w", id, sealfs.ErrNotExist)
	}
	m.live.beat(id, time.Now(), s)
	if mp.Stores[i].State != StoreUp {
		select {
		case m.poke <- struct{}{}:
		default:
		}
	}
	return nil
}

// LastBeat returns a store's last heartbeat since the manager was opened.
func (m *Manager) LastBeat(id sealfs.UUID) (s StoreStats, at time.Time, ok bool) {
	return m.live.last(id)
}

// watch commits what heartbeats say about stores, and shuts Raft down when the
// latch shuts: no vote, no leading from a damaged state.
func (m *Manager) watch(ctx context.Context) {
	period := m.o.SuspectAfter / 4
	tick := time.NewTicker(period)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.latch.done:
			m.o.Logger.Error("the manager stops", "dir", m.o.Dir, "error", m.latch.Err())
			if err := m.raft.Shutdown().Error(); err != nil {
				m.o.Logger.Error("shutting raft down", "error", err)
			}
			return
		case <-tick.C:
		case <-m.poke:
		}
		for _, v := range m.live.due(time.Now(), period, m.Map().Stores) {
			if err := m.setStoreState(ctx, v.id, v.to); err != nil {
				m.o.Logger.Warn("a store's state is not committed", "store", v.id, "state", v.to, "error", err)
				continue
			}
			m.o.Logger.Info("a store changed its state", "store", v.id, "state", v.to)
		}
	}
}
