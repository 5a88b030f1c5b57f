package cluster

import (
	"context"
	"fmt"
	"time"

	"sealfs"
)

// errNoMap is the answer of a manager that has not learned the map yet.
var errNoMap = fmt.Errorf("this manager does not know the cluster map yet: %w", sealfs.ErrUnavailable)

// propose has a command committed and executed. On a manager that does not lead
// it fails with ErrUnavailable, and then nothing happened. ErrInterrupted says
// that it is not known whether it did.
func (m *Manager) propose(ctx context.Context, c command) (result, error) {
	switch {
	case m.closed.Load():
		return result{}, fmt.Errorf("manager: %w", sealfs.ErrClosed)
	case ctx.Err() != nil:
		return result{}, fmt.Errorf("%w: %w", context.Cause(ctx), sealfs.ErrInterrupted)
	}
	b := c.encode()
	if _, err := decodeCommand(b); err != nil {
		// What no manager could read must not get into the log.
		return result{}, fmt.Errorf("an argument is too long or out of range: %w", sealfs.ErrInvalid)
	}
	f := m.raft.Apply(b, 0)
	if err := m.await(ctx, f); err != nil {
		return result{}, err
	}
	r, ok := f.Response().(result)
	if !ok { // raft answers nil when it shuts down in between
		return result{}, fmt.Errorf("raft gave no answer, it is not known whether the change happened: %w", sealfs.ErrInterrupted)
	}
	return r, r.err
}

// proposeVolume is propose for commands about volumes.
func (m *Manager) proposeVolume(ctx context.Context, c command) (VolumeInfo, error) {
	r, err := m.propose(ctx, c)
	return r.volume, err
}

// AddStore makes a store part of the cluster, or changes what the cluster knows
// of it (its state apart); it costs nothing if there is no difference. Weight 0
// stands for one per GiB of Bytes. What Server, State and Bad say does not count.
//
// Until the first volume is made, shards are placed over all stores there are.
// A store that comes later holds none until shards can be moved.
func (m *Manager) AddStore(ctx context.Context, s StoreInfo) error {
	if s.Weight == 0 {
		s.Weight = defaultWeight(s.Bytes)
	}
	mp := m.Map()
	if mp == nil {
		return errNoMap
	}
	if i := mp.StoreIndex(s.ID); i >= 0 && mp.Stores[i].State != StoreLeft {
		old := mp.Stores[i]
		if s.State, s.Server, s.Bad = old.State, old.Server, old.Bad; s == old {
			return nil
		}
	}
	_, err := m.propose(ctx, command{kind: cmdStore, store: s})
	return err
}

// defaultWeight is one per GiB.
func defaultWeight(bytes uint64) uint32 { return uint32(min(max(bytes>>30, 1), 1<<31)) }

// RemoveStore takes a store out of the cluster for ever. One that holds shards
// with data is refused with ErrBusy.
func (m *Manager) RemoveStore(ctx context.Context, id sealfs.UUID) error {
	return m.setStoreState(ctx, id, StoreLeft)
}

// SetStore sets a store's weight, its share of the shards, and whether it is
// bad. Until the first volume is made, the shards are placed anew; a weight of
// 0 is refused with ErrInvalid. It moves no data.
func (m *Manager) SetStore(ctx context.Context, id sealfs.UUID, weight uint32, bad bool) error {
	_, err := m.propose(ctx, command{kind: cmdSetStore, store: StoreInfo{ID: id, Weight: weight, Bad: bad}})
	return err
}

func (m *Manager) setStoreState(ctx context.Context, id sealfs.UUID, to StoreState) error {
	_, err := m.propose(ctx, command{kind: cmdStoreState, store: StoreInfo{ID: id, State: to}})
	return err
}

// VolumeSpec is what the maker of a volume decides.
type VolumeSpec struct {
	Name   string `json:"name"`   // see CheckName
	Bytes  uint64 `json:"bytes"`  // quota, 0 for none
	Inodes uint64 `json:"inodes"` // quota, 0 for none
	Mode   uint32 `json:"mode"`   // permissions of the root directory
	UID    uint32 `json:"uid"`    // owner of the root directory
	GID    uint32 `json:"gid"`
}

// CreateVolume gives a new volume its number. The volume is in state creating:
// whoever makes its root directory calls VolumeReady then. ErrExist if there is
// a volume of that name, be it one that is being deleted.
func (m *Manager) CreateVolume(ctx context.Context, spec VolumeSpec) (VolumeInfo, error) {
	if err := CheckName(spec.Name); err != nil {
		return VolumeInfo{}, fmt.Errorf("volume: %w", err)
	}
	return m.proposeVolume(ctx, command{kind: cmdMakeVolume, volume: VolumeInfo{
		Name: spec.Name, Bytes: spec.Bytes, Inodes: spec.Inodes, Created: time.Now().UTC(), Mode: spec.Mode, UID: spec.UID, GID: spec.GID,
	}})
}

// VolumeReady says that the volume's root directory exists: from now on it can
// be mounted.
func (m *Manager) VolumeReady(ctx context.Context, id sealfs.Volume, root sealfs.Ino) (VolumeInfo, error) {
	return m.proposeVolume(ctx, command{kind: cmdVolumeReady, volume: VolumeInfo{ID: id, Root: root}})
}

// ResizeVolume sets the volume's quotas, 0 for none. They may be below what is in use.
func (m *Manager) ResizeVolume(ctx context.Context, id sealfs.Volume, quotaBytes, quotaInodes uint64) (VolumeInfo, error) {
	return m.proposeVolume(ctx, command{kind: cmdSetQuota, volume: VolumeInfo{ID: id, Bytes: quotaBytes, Inodes: quotaInodes}})
}

// DeleteVolume begins to delete a volume. It keeps its name and number until
// its inodes are gone and VolumeDeleted is called.
func (m *Manager) DeleteVolume(ctx context.Context, id sealfs.Volume) (VolumeInfo, error) {
	return m.proposeVolume(ctx, command{kind: cmdDeleteVolume, volume: VolumeInfo{ID: id}})
}

// VolumeDeleted takes a volume that is being deleted off the map.
func (m *Manager) VolumeDeleted(ctx context.Context, id sealfs.Volume) error {
	_, err := m.propose(ctx, command{kind: cmdVolumeDeleted, volume: VolumeInfo{ID: id}})
	return err
}
