package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"sealfs"
)

// Raft's tuning.
const (
	// timeoutEmbedded and timeoutNetwork are Raft's heartbeat, election and lease
	// time-outs. A single voter waits between one and two of them before it elects
	// itself, and from then on never loses its own heartbeats: short is only quick.
	// Several have to bear the pauses of networks and processes.
	timeoutEmbedded = 40 * time.Millisecond
	timeoutNetwork  = 500 * time.Millisecond
	// transportTimeout bounds one exchange between managers.
	transportTimeout = 2 * time.Second
	transportPool    = 3 // idle connections to each manager
	// A map is small, so snapshots are frequent and the log is short. What stays
	// behind a snapshot reaches back beyond the one before, so that this one
	// still serves if the newest is damaged.
	snapshotAfter    = 256
	snapshotInterval = 2 * time.Second
	snapshotsKept    = 2
	trailing         = 8 // in units of snapshotAfter
	logCache         = 512
)

// embeddedAddr stands in the configuration for a manager without an address.
const embeddedAddr = "embedded"

// raftConfig returns Raft's configuration.
func (m *Manager) raftConfig() *raft.Config {
	conf := raft.DefaultConfig()
	conf.LocalID = raft.ServerID(m.id.String())
	conf.HeartbeatTimeout, conf.ElectionTimeout, conf.LeaderLeaseTimeout = m.o.timeout, m.o.timeout, m.o.timeout
	conf.SnapshotThreshold, conf.SnapshotInterval = m.o.snapshotAfter, snapshotInterval
	if m.o.snapshotAfter < snapshotAfter {
		conf.SnapshotInterval = 20 * time.Millisecond
	}
	conf.TrailingLogs = trailing * m.o.snapshotAfter
	conf.BatchApplyCh, conf.NoLegacyTelemetry = true, true
	conf.ShutdownOnRemove = false // keepMembership finds out, and says why it stops
	conf.Logger = raftLogger(m.o.Logger)
	return conf
}

// startRaft starts Raft: on the state that there is, as the first voter of a
// new cluster, or without a state until others take it in.
func (m *Manager) startRaft() (err error) {
	conf := m.raftConfig()
	snaps, err := raft.NewFileSnapshotStoreWithLogger(m.o.Dir, snapshotsKept, conf.Logger)
	if err != nil {
		return err
	}
	cache, err := raft.NewLogCache(logCache, m.store)
	if err != nil {
		return err
	}
	used, err := m.checkReach(snaps)
	if err != nil {
		return err
	}
	// Raft panics over what it cannot read.
	defer func() {
		if r := recover(); r != nil {
			err = &sealfs.Corruption{Where: m.store.path, Off: -1, What: fmt.Sprint("Raft log: ", r)}
		}
	}()
	addr, transport := raft.ServerAddress(m.o.Addr), raft.Transport(nil)
	if m.o.Addr == "" {
		addr, transport = raft.NewInmemTransport(embeddedAddr)
	} else {
		m.stream = newStream(m)
		g := newGuard(raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
			Stream: m.stream, MaxPool: transportPool, Timeout: transportTimeout, Logger: conf.Logger,
		}))
		defer func() {
			if m.raft == nil { // which else closes it
				g.Close()
			}
		}()
		transport = g
	}
	switch {
	case used:
	case len(m.o.Join) > 0:
		m.joining = true
	case m.o.Addr != "" && !m.o.Bootstrap:
		return fmt.Errorf("the manager belongs to no cluster: say whether to make or to join one: %w", sealfs.ErrNotExist)
	default:
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
	if m.stream != nil {
		m.stream.raft.Store(r)
	}
	return m.checkMember()
}

// checkMember holds the configuration against the options.
func (m *Manager) checkMember() error {
	servers := m.servers()
	_, ok := m.member(m.id)
	switch {
	case m.o.Addr == "" && len(servers) != 1:
		return fmt.Errorf("the cluster has %d managers, so this one needs an address: %w", len(servers), sealfs.ErrInvalid)
	case ok || m.joining:
	case len(m.o.Join) > 0:
		m.joining = true // it was interrupted
	default:
		return fmt.Errorf("the manager is no member of its cluster: it was removed, or never completed joining: %w", sealfs.ErrNotExist)
	}
	return nil
}

// servers returns the members of the latest configuration, in a slice of its
// own: raft's is shared.
func (m *Manager) servers() []raft.Server {
	f := m.raft.GetConfiguration()
	if f.Error() != nil {
		return nil
	}
	return slices.Clone(f.Configuration().Servers)
}

// member returns the manager with the given identifier, if it is a member.
func (m *Manager) member(id sealfs.UUID) (raft.Server, bool) {
	for _, s := range m.servers() {
		if s.ID == raft.ServerID(id.String()) {
			return s, true
		}
	}
	return raft.Server{}, false
}

// alone reports whether this manager is the only member of its cluster.
func (m *Manager) alone() bool {
	_, ok := m.member(m.id)
	return ok && len(m.servers()) == 1
}

// raftLogger passes raft's messages on. Elections and snapshots are business as
// usual; raft's errors are the operator's business too, except that one manager
// may be away, which raft says again and again.
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
		for _, a := range args {
			if err, ok := a.(error); ok && isNetwork(err) {
				to = slog.LevelDebug
			}
		}
	}
	s.to.Log(context.Background(), to, name+": "+msg, args...)
}

// awaitLead waits until this manager leads and has applied its whole log.
func (m *Manager) awaitLead(ctx context.Context) error {
	for {
		changed := m.LeaderChanged()
		if m.Leading() {
			return nil
		}
		select {
		case <-changed:
		case <-m.latch.done:
			return m.latch.Err()
		case <-ctx.Done():
			return fmt.Errorf("no leader yet: %w: %w", context.Cause(ctx), sealfs.ErrUnavailable)
		}
	}
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
		switch {
		case err == nil:
			return nil
		case errors.Is(err, raft.ErrNotLeader) || errors.Is(err, raft.ErrLeadershipTransferInProgress):
			return m.notLeading()
		case errors.Is(err, raft.ErrLeadershipLost) || errors.Is(err, raft.ErrRaftShutdown) || errors.Is(err, raft.ErrAbortedByRestore):
			return fmt.Errorf("not known whether the change happened: %w: %w", err, sealfs.ErrInterrupted)
		}
		return fmt.Errorf("raft: %w: %w", err, sealfs.ErrUnavailable)
	case <-m.latch.done:
		// Raft may have ended without an answer: see logStore.running.
		return fmt.Errorf("the manager has stopped: %w", m.latch.Err())
	case <-ctx.Done():
		return fmt.Errorf("not known whether the change happened: %w: %w", context.Cause(ctx), sealfs.ErrInterrupted)
	}
}
