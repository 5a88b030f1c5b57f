package cluster

import (
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"sealfs"
)

// apply executes a command: it returns the next map and the volume or store
// that the command was about, or m itself and why the command was refused. It
// is deterministic and leaves m alone. m is nil before the cluster exists.
func apply(m *Map, c *command) (*Map, result) {
	if m == nil || c.kind == cmdInit {
		return applyInit(m, c)
	}
	next := *m
	next.Version++
	var r result
	var changed bool
	switch c.kind {
	case cmdStore, cmdServeStore:
		changed, r.err = next.putStore(c)
	case cmdSetStore:
		changed, r.err = next.setStore(c.store)
	case cmdStoreState:
		changed, r.err = next.setStoreState(c.store.ID, c.store.State)
	case cmdCreateVolume, cmdMakeVolume:
		v := c.volume
		if c.kind == cmdMakeVolume && (v.Bytes != 0 || v.Inodes != 0) {
			v.Since = BornLimited
		}
		changed = true
		r.volume, r.err = next.createVolume(v)
	default:
		changed, r.volume, r.err = next.changeVolume(c)
	}
	if r.err != nil || !changed {
		return m, r
	}
	return &next, r
}

// result is what the proposer of a command learns.
type result struct {
	volume  VolumeInfo // after the change, of commands about volumes
	session Session    // of open session
	err     error
}

func applyInit(m *Map, c *command) (*Map, result) {
	if c.kind != cmdInit {
		return m, result{err: fmt.Errorf("the cluster is not initialised: %w", sealfs.ErrUnavailable)}
	}
	if m != nil {
		return m, result{err: fmt.Errorf("cluster %s exists: %w", m.Cluster, sealfs.ErrExist)}
	}
	next := c.init
	if err := checkGeometry(next.Name, next.Shards, next.Replicas); err != nil {
		return nil, result{err: err}
	}
	if next.Cluster.IsZero() {
		return nil, result{err: fmt.Errorf("the cluster's identifier is zero: %w", sealfs.ErrInvalid)}
	}
	next.Version, next.NextVolume = 1, 1
	next.Table = make([]ShardInfo, next.Shards)
	return &next, result{}
}

// putStore adds a store or changes what is known of it. While there has never
// been a volume the shards are empty, and are placed anew over all stores.
// Later changes of the membership leave the table alone: data would have to move.
func (m *Map) putStore(c *command) (changed bool, err error) {
	s := c.store
	if s.ID.IsZero() || s.Weight == 0 {
		return false, fmt.Errorf("a store needs an identifier and a weight: %w", sealfs.ErrInvalid)
	}
	if err := errors.Join(checkLocation("address", s.Addr), checkLocation("host", s.Host), checkLocation("rack", s.Rack)); err != nil {
		return false, err
	}
	i := m.StoreIndex(s.ID)
	switch {
	case i < 0 && len(m.Stores) == StoresMax:
		return false, fmt.Errorf("the cluster has had %d stores already: %w", StoresMax, sealfs.ErrNoSpace)
	case i < 0:
		s.State = StoreUp
		m.Stores = append(slices.Clip(m.Stores), s)
	case m.Stores[i].State == StoreLeft:
		return false, fmt.Errorf("store %s has left the cluster for ever: %w", s.ID, sealfs.ErrExist)
	default:
		old := m.Stores[i]
		s.State, s.Bad = old.State, old.Bad
		if c.kind == cmdServeStore {
			s.Weight = old.Weight
		} else {
			s.Server = old.Server
		}
		if s == old {
			return false, nil
		}
		m.Stores = slices.Clone(m.Stores)
		m.Stores[i] = s
	}
	if m.NextVolume == 1 {
		m.place()
	}
	return true, nil
}

// setStore sets what an operator decides about a store.
func (m *Map) setStore(s StoreInfo) (changed bool, err error) {
	i := m.StoreIndex(s.ID)
	switch {
	case i < 0:
		return false, fmt.Errorf("store %s is not in the cluster: %w", s.ID, sealfs.ErrNotExist)
	case m.Stores[i].State == StoreLeft:
		return false, fmt.Errorf("store %s has left the cluster for ever: %w", s.ID, sealfs.ErrInvalid)
	case s.Weight == 0:
		return false, fmt.Errorf("store %s: a weight of 0: %w", s.ID, sealfs.ErrInvalid)
	case m.Stores[i].Weight == s.Weight && m.Stores[i].Bad == s.Bad:
		return false, nil
	}
	m.Stores = slices.Clone(m.Stores)
	m.Stores[i].Weight, m.Stores[i].Bad = s.Weight, s.Bad
	if m.NextVolume == 1 {
		m.place()
	}
	return true, nil
}

func (m *Map) setStoreState(id sealfs.UUID, to StoreState) (changed bool, err error) {
	i := m.StoreIndex(id)
	switch {
	case i < 0:
		return false, fmt.Errorf("store %s is not in the cluster: %w", id, sealfs.ErrNotExist)
	case to < StoreUp || to > StoreLeft:
		return false, fmt.Errorf("store %s to %s: %w", id, to, sealfs.ErrInvalid)
	case m.Stores[i].State == to:
		return false, nil
	case m.Stores[i].State == StoreLeft:
		return false, fmt.Errorf("store %s has left the cluster for ever: %w", id, sealfs.ErrInvalid)
	case to == StoreLeft && m.NextVolume > 1 && m.holds(uint16(i)):
		return false, fmt.Errorf("store %s holds shards: %w", id, sealfs.ErrBusy)
	}
	m.Stores = slices.Clone(m.Stores)
	m.Stores[i].State = to
	if to == StoreLeft && m.NextVolume == 1 {
		m.place()
	}
	return true, nil
}

// holds reports whether a replica of any shard is on store i.
func (m *Map) holds(i uint16) bool {
	return slices.ContainsFunc(m.Table, func(row ShardInfo) bool { return slices.Contains(row.Replicas, i) })
}

func (m *Map) createVolume(v VolumeInfo) (VolumeInfo, error) {
	if err := CheckName(v.Name); err != nil {
		return VolumeInfo{}, fmt.Errorf("volume: %w", err)
	}
	if old, ok := m.Volume(v.Name); ok {
		return VolumeInfo{}, fmt.Errorf("volume %q (%s): %w", v.Name, old.State, sealfs.ErrExist)
	}
	switch {
	case v.Mode&^RootModeMask != 0:
		return VolumeInfo{}, fmt.Errorf("volume %q: mode %#o: %w", v.Name, v.Mode, sealfs.ErrInvalid)
	case len(m.Volumes) == VolumesMax || m.NextVolume == math.MaxUint32:
		return VolumeInfo{}, fmt.Errorf("volume %q: the cluster has %d volumes: %w", v.Name, len(m.Volumes), sealfs.ErrNoSpace)
	case len(m.Table[0].Replicas) == 0:
		return VolumeInfo{}, fmt.Errorf("volume %q: the cluster has no stores: %w", v.Name, sealfs.ErrUnavailable)
	}
	v.ID, v.Root, v.State = m.NextVolume, 0, VolumeCreating
	m.NextVolume++
	m.Volumes = append(slices.Clip(m.Volumes), v)
	return v, nil
}

// changeVolume executes the commands about an existing volume.
func (m *Map) changeVolume(c *command) (changed bool, v VolumeInfo, err error) {
	i := m.volumeIndex(c.volume.ID)
	if i < 0 {
		return false, v, fmt.Errorf("volume %d: no such volume: %w", c.volume.ID, sealfs.ErrNotExist)
	}
	old := m.Volumes[i]
	v = old
	refuse := func(code sealfs.Code, why string) (bool, VolumeInfo, error) {
		return false, old, fmt.Errorf("volume %q %s: %w", old.Name, why, code)
	}
	switch c.kind {
	case cmdVolumeReady:
		switch {
		case c.volume.Root == 0 || c.volume.Root > sealfs.InoMax:
			return refuse(sealfs.ErrInvalid, fmt.Sprintf("cannot have inode %d as its root", c.volume.Root))
		case old.State == VolumeDeleting:
			return refuse(sealfs.ErrBusy, "is being deleted")
		case old.State == VolumeReady && old.Root != c.volume.Root:
			return refuse(sealfs.ErrExist, "has another root")
		}
		v.State, v.Root = VolumeReady, c.volume.Root
	case cmdResizeVolume, cmdSetQuota:
		if old.State == VolumeDeleting {
			return refuse(sealfs.ErrBusy, "is being deleted")
		}
		v.Bytes, v.Inodes = c.volume.Bytes, c.volume.Inodes
		if c.kind == cmdSetQuota && old.Bytes == 0 && v.Bytes != 0 || c.kind == cmdSetQuota && old.Inodes == 0 && v.Inodes != 0 {
			v.Since = m.Version
		}
	case cmdDeleteVolume:
		v.State = VolumeDeleting
	case cmdVolumeDeleted:
		if old.State != VolumeDeleting {
			return refuse(sealfs.ErrInvalid, "is "+old.State.String()+", not deleting")
		}
		m.Volumes = slices.Delete(slices.Clone(m.Volumes), i, i+1)
		return true, old, nil
	}
	if v == old {
		return false, v, nil
	}
	m.Volumes = slices.Clone(m.Volumes)
	m.Volumes[i] = v
	return true, v, nil
}

// fsm adapts apply and sessionTable.apply to raft. Raft calls Apply, Snapshot
// and Restore on one goroutine; the current state is read from anywhere.
type fsm struct {
	latch    *latch // shut when an entry cannot be understood
	m        atomic.Pointer[Map]
	sessions atomic.Pointer[sessionTable] // never nil

	mu      sync.Mutex
	changed chan struct{} // closed when m changes
	refused error         // why the last Restore failed
}

func newFSM(l *latch) *fsm {
	f := &fsm{latch: l, changed: make(chan struct{})}
	f.sessions.Store(newSessionTable())
	return f
}

// Apply executes a log entry and returns a result.
//
// An entry that cannot be understood must not be skipped: the maps of two
// managers would differ from here on. So nothing is executed after it.
func (f *fsm) Apply(entry *raft.Log) any {
	if err := f.latch.Err(); err != nil {
		return result{err: err}
	}
	c, err := decodeCommand(entry.Data)
	if err != nil {
		err = fmt.Errorf("entry %d: %w", entry.Index, err)
		f.latch.shut(err)
		return result{err: err}
	}
	old := f.m.Load()
	if old != nil && c.isSession() {
		next, r := f.sessions.Load().apply(c)
		f.sessions.Store(next)
		return r
	}
	next, r := apply(old, c)
	if next != old {
		f.set(next)
	}
	return r
}

func (f *fsm) set(m *Map) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.m.Store(m)
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fsm) wait() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

// Snapshot captures the state, which costs nothing: it is immutable.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	if err := f.latch.Err(); err != nil {
		return nil, err // the map lacks an entry that the log may not lose
	}
	m := f.m.Load()
	if m == nil {
		return nil, errors.New("there is no cluster map yet")
	}
	return snapshot{m, f.sessions.Load()}, nil
}

// Restore replaces the state with that of a snapshot.
func (f *fsm) Restore(r io.ReadCloser) error {
	b, err := io.ReadAll(io.LimitReader(r, 2*StateMax))
	if err == nil {
		var m *Map
		var t *sessionTable
		if m, t, err = decodeState(b); err == nil {
			f.sessions.Store(t)
			f.set(m)
		}
	}
	f.mu.Lock()
	f.refused = err
	f.mu.Unlock()
	return err
}

// snapshot is a state on its way to a file.
type snapshot struct {
	m *Map
	t *sessionTable
}

// Persist writes the encoding of the state.
func (s snapshot) Persist(sink raft.SnapshotSink) error {
	if _, err := sink.Write(encodeState(s.m, s.t)); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// Release has nothing to do.
func (s snapshot) Release() {}
