package cluster

import (
	"context"
	"errors"
	"fmt"

	"github.com/hashicorp/raft"

	"sealfs"
)

// What Recover skips, so that nothing that the lost managers may have
// acknowledged and this one has not heard of is ever issued again.
const (
	recoverVersions = 1 << 32
	recoverVolumes  = 1 << 10
	recoverSessions = 1 << 20
)

// Recover makes the manager in o.Dir the only one of its cluster, for when the
// majority of the managers is lost for good. Its address becomes o.Addr. What the lost ones
// acknowledged last may be missing. It fails with ErrBusy while the manager
// runs. The other managers must never run again on their old directories: two
// of them could elect a leader of their own. When ctx ends before anything is
// changed, nothing is.
func Recover(ctx context.Context, o Options) (err error) {
	if err := o.Validate(); err != nil {
		return fmt.Errorf("options of the manager: %w", err)
	}
	o.Bootstrap, o.Join = false, nil
	m := newManager(o)
	defer func() {
		if failed := m.latch.Err(); failed != nil {
			err = failed
		}
		if err = errors.Join(err, m.Close()); err != nil {
			err = fmt.Errorf("recover the manager in %s: %w", o.Dir, err)
		}
	}()
	if err := m.openFiles(ctx); err != nil {
		return err
	}
	conf := m.raftConfig()
	snaps, err := raft.NewFileSnapshotStoreWithLogger(m.o.Dir, snapshotsKept, conf.Logger)
	if err != nil {
		return err
	}
	switch used, err := m.checkReach(snaps); {
	case err != nil:
		return err
	case !used:
		return fmt.Errorf("there is nothing to recover: %w", sealfs.ErrNotExist)
	case ctx.Err() != nil:
		return fmt.Errorf("%w: %w", context.Cause(ctx), sealfs.ErrInterrupted)
	}
	defer func() { // raft panics over what it cannot read
		if r := recover(); r != nil {
			err = &sealfs.Corruption{Where: m.store.path, Off: -1, What: fmt.Sprint("Raft log: ", r)}
		}
	}()
	addr := raft.ServerAddress(o.Addr)
	if o.Addr == "" {
		addr = embeddedAddr
	}
	_, transport := raft.NewInmemTransport(addr)
	alone := raft.Configuration{Servers: []raft.Server{{ID: conf.LocalID, Address: addr}}}
	if err := raft.RecoverCluster(conf, &recovering{m.fsm}, m.store, m.store, snaps, transport, alone); err != nil {
		return err
	}
	return nil
}

// recovering is the state machine of Recover: its snapshot leaves gaps.
type recovering struct{ *fsm }

// Snapshot implements raft.FSM.
func (r *recovering) Snapshot() (raft.FSMSnapshot, error) {
	if err := r.latch.Err(); err != nil {
		return nil, err
	}
	m, t := r.m.Load(), r.sessions.Load()
	if m == nil {
		return nil, fmt.Errorf("the cluster was never initialised: %w", sealfs.ErrNotExist)
	}
	nm, nt := *m, *t
	nm.Version += recoverVersions
	if nm.NextVolume > 1 { // else the shards are still being placed
		nm.NextVolume += recoverVolumes
	}
	nt.version += recoverVersions
	nt.next += recoverSessions
	return snapshot{&nm, &nt}, nil
}
