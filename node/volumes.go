package node

import (
	"cmp"
	"context"
	"os"
	"slices"

	"sealfs"
	"sealfs/cluster"
)

// Session is a further mount as the main process knows it.
type Session struct {
	ID      sealfs.Session `json:"id"`
	Volume  sealfs.Volume  `json:"volume"`
	Root    sealfs.Ino     `json:"root"`
	Shards  uint32         `json:"shards"`
	Cluster sealfs.UUID    `json:"cluster"`
	PID     int            `json:"pid"`
	Mount   string         `json:"mount"`
}

// VolumeStatus describes a volume.
type VolumeStatus struct {
	Name   string        `json:"name"`
	ID     sealfs.Volume `json:"id"`
	State  string        `json:"state"`  // creating, ready or deleting
	Size   Size          `json:"bytes"`  // limit, 0: none but the stores'
	Inodes uint64        `json:"inodes"` // limit, 0: none
	Root   sealfs.Ino    `json:"root"`
	// What it holds; unknown (-1) while nothing runs.
	UsedBytes  int64 `json:"used_bytes"`
	UsedInodes int64 `json:"used_inodes"`
}

// resumeVolumes finishes what an earlier run began, and makes the default
// volume if there has never been one.
func (n *Node) resumeVolumes(ctx context.Context) error {
	if n.manager.Map().NextVolume == 1 {
		// Its root belongs to who runs this, so that an ordinary user can use it.
		spec := cluster.VolumeSpec{Name: DefaultVolume, Mode: 0o755, UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
		if _, err := n.manager.CreateVolume(ctx, spec); err != nil {
			return err
		}
	}
	for _, v := range n.manager.Map().Volumes {
		switch v.State {
		case cluster.VolumeCreating:
			if _, err := n.finishVolume(ctx, v); err != nil {
				return err
			}
		case cluster.VolumeDeleting:
			n.dropVolume(v)
		}
	}
	return nil
}

// finishVolume makes the root directory of a volume that is being created.
func (n *Node) finishVolume(ctx context.Context, v cluster.VolumeInfo) (cluster.VolumeInfo, error) {
	root, err := n.server.MakeRoot(ctx, v.ID, v.Mode, v.UID, v.GID)
	if err != nil {
		return v, err
	}
	return n.manager.VolumeReady(ctx, v.ID, root)
}

// drop is the freeing of a volume that is being deleted.
type drop struct {
	done chan struct{}
	err  error // when done is closed
}

// dropVolume frees a volume in the background, whoever waits for it. Requires
// volumes' lock, or that nobody else is there yet.
func (n *Node) dropVolume(v cluster.VolumeInfo) *drop {
	if d := n.drops[v.ID]; d != nil {
		return d
	}
	d := &drop{done: make(chan struct{})}
	n.drops[v.ID] = d
	n.work.Go(func() {
		defer close(d.done)
		d.err = n.server.DropVolume(n.ctx, v.ID, nil)
		if d.err == nil {
			d.err = n.manager.VolumeDeleted(n.ctx, v.ID)
		}
		n.volumes.Lock()
		delete(n.drops, v.ID)
		n.volumes.Unlock()
		if d.err != nil {
			n.log.Error("a volume is not yet deleted; the next start goes on", "volume", v.Name, "err", d.err)
			return
		}
		n.log.Info("volume deleted", "volume", v.Name, "id", v.ID)
	})
	return d
}

// createVolume makes a volume that can be mounted when it returns.
func (n *Node) createVolume(ctx context.Context, spec cluster.VolumeSpec) (VolumeStatus, error) {
	n.volumes.Lock()
	defer n.volumes.Unlock()
	if old, ok := n.manager.Map().Volume(spec.Name); ok && old.State != cluster.VolumeCreating {
		return VolumeStatus{}, fault(sealfs.ErrExist, "there is a volume %q already (%s): take another name", spec.Name, old.State)
	} else if ok {
		v, err := n.finishVolume(ctx, old) // what an interrupted attempt began
		return n.volumeStatus(v), err
	}
	v, err := n.manager.CreateVolume(ctx, spec)
	if err == nil {
		v, err = n.finishVolume(ctx, v)
	}
	if err != nil {
		return VolumeStatus{}, err
	}
	n.log.Info("volume created", "volume", v.Name, "id", v.ID, "bytes", v.Bytes)
	return n.volumeStatus(v), nil
}

// Quota says what a volume may hold, 0 for any number of them. What is nil stays as it is.
type Quota struct {
	Bytes  *uint64 `json:"bytes,omitempty"`
	Inodes *uint64 `json:"inodes,omitempty"`
}

// of returns the whole quota of a volume under q.
func (q Quota) of(v cluster.VolumeInfo) (bytes, inodes uint64) {
	bytes, inodes = v.Bytes, v.Inodes
	if q.Bytes != nil {
		bytes = *q.Bytes
	}
	if q.Inodes != nil {
		inodes = *q.Inodes
	}
	return bytes, inodes
}

// setQuota changes what a volume may hold. That is in force when it returns.
func (n *Node) setQuota(ctx context.Context, name string, q Quota) (VolumeStatus, error) {
	n.volumes.Lock()
	defer n.volumes.Unlock()
	v, err := n.volume(name)
	if err != nil {
		return VolumeStatus{}, err
	}
	bytes, inodes := q.of(v)
	if v, err = n.manager.ResizeVolume(ctx, v.ID, bytes, inodes); err != nil {
		return VolumeStatus{}, err
	}
	n.log.Info("quota set", "volume", v.Name, "bytes", v.Bytes, "inodes", v.Inodes)
	return n.volumeStatus(v), nil
}

// deleteVolume frees a volume and all that is in it. When ctx ends first, that
// goes on nevertheless.
func (n *Node) deleteVolume(ctx context.Context, name string) error {
	d, err := n.beginDelete(ctx, name)
	if err != nil {
		return err
	}
	select {
	case <-d.done:
		return d.err
	case <-ctx.Done():
		return fault(sealfs.ErrInterrupted, "volume %q is being deleted; `sealfs list-volumes` shows it until that is done", name)
	}
}

func (n *Node) beginDelete(ctx context.Context, name string) (*drop, error) {
	n.volumes.Lock()
	defer n.volumes.Unlock()
	v, err := n.volume(name)
	if err != nil {
		return nil, err
	}
	if n.mount != nil && n.mount.volume.ID == v.ID && !n.mount.ended() {
		return nil, mountedFault(v.Name, n.mount.point, os.Getpid())
	}
	for _, s := range n.sessions {
		if s.Volume == v.ID {
			return nil, mountedFault(v.Name, s.Mount, s.PID)
		}
	}
	if v.State != cluster.VolumeDeleting {
		if _, err := n.manager.DeleteVolume(ctx, v.ID); err != nil {
			return nil, err
		}
	}
	return n.dropVolume(v), nil
}

func mountedFault(volume, point string, pid int) error {
	return fault(sealfs.ErrBusy, "volume %q is mounted at %s (process %d): unmount it first", volume, point, pid)
}

// volume returns the volume of a name from the current map.
func (n *Node) volume(name string) (cluster.VolumeInfo, error) {
	m := n.manager.Map()
	v, ok := m.Volume(name)
	if !ok {
		var names []string
		for _, v := range m.Volumes {
			names = append(names, v.Name)
		}
		return v, fault(sealfs.ErrNotExist, "there is no volume %q (there are: %q): make it with `sealfs create-volume`", name, names)
	}
	return v, nil
}

// mountable returns a volume that can be mounted. Requires volumes' lock.
func (n *Node) mountable(name string) (cluster.VolumeInfo, error) {
	v, err := n.volume(name)
	if err == nil && v.State != cluster.VolumeReady {
		err = fault(sealfs.ErrUnavailable, "volume %q cannot be mounted: its state is %s", name, v.State)
	}
	return v, err
}

func (n *Node) volumeStatus(v cluster.VolumeInfo) VolumeStatus {
	s := describe(v)
	s.UsedBytes, s.UsedInodes = n.server.Usage(v.ID)
	return s
}

func describe(v cluster.VolumeInfo) VolumeStatus {
	return VolumeStatus{Name: v.Name, ID: v.ID, State: v.State.String(), Size: Size(v.Bytes), Inodes: v.Inodes, Root: v.Root, UsedBytes: -1, UsedInodes: -1}
}

func (n *Node) listVolumes() []VolumeStatus {
	list := []VolumeStatus{}
	for _, v := range n.manager.Map().Volumes {
		list = append(list, n.volumeStatus(v))
	}
	slices.SortFunc(list, func(a, b VolumeStatus) int { return cmp.Compare(a.ID, b.ID) })
	return list
}

// Location says where an inode lies.
type Location struct {
	Path     string          `json:"path"`
	Ino      sealfs.Ino      `json:"ino"`
	Volume   string          `json:"volume"`
	Shard    sealfs.Shard    `json:"shard"`
	Epoch    sealfs.Epoch    `json:"epoch"`
	Replicas []StoreLocation `json:"replicas"` // the primary first
}

// StoreLocation names a store that keeps a shard.
type StoreLocation struct {
	Store  sealfs.UUID `json:"store"`
	Addr   string      `json:"addr,omitempty"`
	State  string      `json:"state"`
	Device string      `json:"device,omitempty"` // where it is one of this machine's
	Region string      `json:"region,omitempty"`
}

// locate finds an inode's shard, and that shard's stores.
func (n *Node) locate(ino sealfs.Ino) (Location, error) {
	l, err := locateIn(n.manager.Map(), ino)
	for i := range l.Replicas {
		for _, own := range n.dir.stores(n.cfg) {
			if r := &l.Replicas[i]; own.ID == r.Store {
				r.Device, r.Region = own.Device, own.Region
			}
		}
	}
	return l, err
}
