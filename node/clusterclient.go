package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"sealfs"
	"sealfs/cluster"
)

// Cluster administers a cluster by way of its managers.
type Cluster struct {
	*cluster.Remote
	addrs []string
}

// OpenCluster returns a client of the managers at these addresses. Nothing is
// connected yet.
func OpenCluster(addrs []string) *Cluster {
	return &Cluster{cluster.NewRemote(addrs, cluster.RemoteOptions{}), addrs}
}

// Close gives idle connections back.
func (c *Cluster) Close() { c.Remote.Close() }

// follow keeps the map fresh while f runs.
func (c *Cluster) follow(ctx context.Context, f func(context.Context) error) error {
	ctx, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.Run(ctx)
	}()
	err := f(ctx)
	stop()
	<-done
	return err
}

// await waits until ok holds for the map.
func (c *Cluster) await(ctx context.Context, ok func(*cluster.Map) bool) error {
	return c.follow(ctx, func(ctx context.Context) error {
		for {
			changed := c.Changed()
			if m := c.Map(); m != nil && ok(m) {
				return nil
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	})
}

// volumePatience is how long a command waits for the managers' work on a volume.
const volumePatience = 60 * time.Second

// Volumes returns all volumes.
func (c *Cluster) Volumes(ctx context.Context) ([]VolumeStatus, error) {
	infos, err := c.Remote.Volumes(ctx)
	list := []VolumeStatus{}
	for _, v := range infos {
		x := describe(v.VolumeInfo)
		x.UsedBytes, x.UsedInodes = int64(v.UsedBytes), int64(v.UsedInodes)
		list = append(list, x)
	}
	slices.SortFunc(list, func(a, b VolumeStatus) int { return cmp.Compare(a.ID, b.ID) })
	return list, err
}

// CreateVolume makes a volume, and waits until it can be mounted.
func (c *Cluster) CreateVolume(ctx context.Context, spec cluster.VolumeSpec) (VolumeStatus, error) {
	stores, err := c.Stores(ctx)
	if err != nil {
		return VolumeStatus{}, err
	}
	// The first volume decides where shards lie, so there must be somewhere.
	if !slices.ContainsFunc(stores, func(s cluster.StoreStatus) bool { return s.State != cluster.StoreLeft }) {
		return VolumeStatus{}, fault(sealfs.ErrUnavailable, "the cluster has no disk yet: start `sealfs server` processes first")
	}
	v, err := c.Remote.CreateVolume(ctx, spec)
	if errors.Is(err, sealfs.ErrExist) {
		return VolumeStatus{}, fault(sealfs.ErrExist, "there is a volume %q already: take another name", spec.Name)
	}
	if err != nil {
		return VolumeStatus{}, err
	}
	wctx, cancel := context.WithTimeout(ctx, volumePatience)
	defer cancel()
	err = c.await(wctx, func(m *cluster.Map) bool {
		now, ok := m.VolumeByID(v.ID)
		if ok {
			v = now
		}
		return m.Version > 0 && (ok && now.State != cluster.VolumeCreating || !ok && m.NextVolume > v.ID)
	})
	switch {
	case err != nil:
		return VolumeStatus{}, fault(sealfs.ErrTimeout, "volume %q is not ready yet, since a server that it needs is away: see `sealfs list-servers`; it becomes ready by itself", spec.Name)
	case v.State != cluster.VolumeReady:
		return VolumeStatus{}, fault(sealfs.ErrNotExist, "volume %q was deleted meanwhile", spec.Name)
	}
	x := describe(v)
	x.UsedBytes, x.UsedInodes = 0, 1
	return x, nil
}

// volume returns the volume of a name.
func (c *Cluster) volume(ctx context.Context, name string) (cluster.VolumeStatus, error) {
	list, err := c.Remote.Volumes(ctx)
	if err != nil {
		return cluster.VolumeStatus{}, err
	}
	var names []string
	i := slices.IndexFunc(list, func(v cluster.VolumeStatus) bool { names = append(names, v.Name); return v.Name == name })
	if i < 0 {
		return cluster.VolumeStatus{}, fault(sealfs.ErrNotExist, "there is no volume %q (there are: %q)", name, names)
	}
	return list[i], nil
}

// SetQuota changes what a volume may hold. Servers hear of it as soon as they reach a manager.
func (c *Cluster) SetQuota(ctx context.Context, name string, q Quota) (VolumeStatus, error) {
	v, err := c.volume(ctx, name)
	if err != nil {
		return VolumeStatus{}, err
	}
	bytes, inodes := q.of(v.VolumeInfo)
	info, err := c.Remote.ResizeVolume(ctx, v.ID, bytes, inodes)
	x := describe(info)
	x.UsedBytes, x.UsedInodes = int64(v.UsedBytes), int64(v.UsedInodes)
	return x, err
}

// DeleteVolume deletes a volume and all that is in it, and waits for that.
func (c *Cluster) DeleteVolume(ctx context.Context, name string) error {
	v, err := c.volume(ctx, name)
	if err != nil {
		return err
	}
	sessions, err := c.Sessions(ctx)
	if err != nil {
		return err
	}
	for _, s := range sessions {
		if s.Volume == name {
			return fault(sealfs.ErrBusy, "volume %q is mounted at %s on %s (session %d, process %d): unmount it first", name, s.Mount, s.Host, s.ID, s.PID)
		}
	}
	if v.State != cluster.VolumeDeleting {
		if _, err := c.Remote.DeleteVolume(ctx, v.ID); err != nil {
			return err
		}
	}
	err = c.await(ctx, func(m *cluster.Map) bool {
		_, ok := m.VolumeByID(v.ID)
		return !ok
	})
	if err != nil {
		return fault(sealfs.ErrInterrupted, "volume %q is being deleted; `sealfs list-volumes` shows it until that is done", name)
	}
	return nil
}

// FindManager returns the manager of an identifier or address.
func (c *Cluster) FindManager(ctx context.Context, name string) (cluster.ManagerInfo, error) {
	list, err := c.Managers(ctx)
	if err != nil {
		return cluster.ManagerInfo{}, err
	}
	for _, m := range list {
		if m.ID.String() == name || m.Addr == name {
			return m, nil
		}
	}
	return cluster.ManagerInfo{}, fault(sealfs.ErrNotExist, "the cluster has no manager %q: see `sealfs list-managers`", name)
}

// ClusterStatus describes a cluster as its managers see it.
type ClusterStatus struct {
	State    string                  `json:"state"` // running, degraded, unavailable
	Reason   string                  `json:"reason,omitempty"`
	Cluster  sealfs.UUID             `json:"cluster"`
	Name     string                  `json:"name"`
	Shards   uint32                  `json:"shards"`
	Managers []cluster.ManagerStatus `json:"managers"`
	Stores   []cluster.StoreStatus   `json:"stores"`
	Volumes  []VolumeStatus          `json:"volumes"`
	Sessions []cluster.Session       `json:"sessions"`
}

// statusPatience is how long a look at a cluster may take: as long as an election.
const statusPatience = 4 * time.Second

// StateUnavailable is the state of a cluster without a leading manager: files
// stay usable, nothing can be changed.
const StateUnavailable = "unavailable"

// Status asks all managers. That they cannot do their work is a state, and no error.
func (c *Cluster) Status(ctx context.Context) (*ClusterStatus, error) {
	s := &ClusterStatus{State: StateRunning, Managers: []cluster.ManagerStatus{}, Stores: []cluster.StoreStatus{}, Volumes: []VolumeStatus{}, Sessions: []cluster.Session{}}
	ctx, cancel := context.WithTimeout(ctx, statusPatience)
	defer cancel()
	s.Managers = c.StatusAll(ctx)
	members, err := c.Managers(ctx) // makes all of them known
	if len(members) > len(s.Managers) {
		s.Managers = c.StatusAll(ctx)
	}
	slices.SortFunc(s.Managers, func(a, b cluster.ManagerStatus) int { return strings.Compare(a.Addr, b.Addr) })
	var faults []string
	for _, m := range s.Managers {
		if !m.Cluster.IsZero() {
			s.Cluster, s.Name = m.Cluster, m.Name
		}
		if m.State != "leader" && m.State != "follower" {
			faults = append(faults, fmt.Sprintf("manager %s is %s", m.Addr, m.State))
		}
	}
	if err == nil {
		err = c.fill(ctx, s)
	}
	if err != nil {
		s.State, s.Reason = StateUnavailable, err.Error()
		return s, nil
	}
	for _, x := range s.Stores {
		if x.State != cluster.StoreUp && x.State != cluster.StoreLeft {
			faults = append(faults, fmt.Sprintf("store %s at %s is %s", x.ID, x.Addr, x.State))
		}
		if x.Failed != "" {
			faults = append(faults, fmt.Sprintf("store %s at %s accepts no changes: %s", x.ID, x.Addr, x.Failed))
		}
	}
	if len(faults) > 0 {
		s.State, s.Reason = StateDegraded, strings.Join(faults, "; ")
	}
	return s, nil
}

func (c *Cluster) fill(ctx context.Context, s *ClusterStatus) error {
	m, err := c.WaitMap(ctx)
	if err != nil {
		return err
	}
	s.Shards = m.Shards
	if s.Stores, err = c.Stores(ctx); err != nil {
		return err
	}
	if s.Volumes, err = c.Volumes(ctx); err != nil {
		return err
	}
	sessions, err := c.Sessions(ctx)
	s.Sessions = append(s.Sessions, sessions...)
	return err
}

// WriteTo writes the status for people. Its first word is the state.
func (s *ClusterStatus) WriteTo(w io.Writer) (int64, error) {
	c := &counter{w: w}
	fmt.Fprintln(c, s.State)
	if s.Reason != "" {
		fmt.Fprintf(c, "because %s\n", s.Reason)
	}
	t := tabwriter.NewWriter(c, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "cluster\t%s\t%s, %d shards\n", s.Name, s.Cluster, s.Shards)
	for _, m := range s.Managers {
		fmt.Fprintf(t, "manager\t%s\t%s\n", m.Addr, m.State)
	}
	for _, x := range s.Stores {
		fmt.Fprintf(t, "store\t%s\t%s at %s, %s of %s used, %d shards\n", x.ID, x.State, x.Addr, Size(x.Used).About(), Size(x.Bytes).About(), x.Primary)
	}
	for _, v := range s.Volumes {
		fmt.Fprintf(t, "volume\t%s\t%s\n", v.Name, v.describe())
	}
	for _, x := range s.Sessions {
		fmt.Fprintf(t, "mount\t%s\tvolume %s on %s, session %d\n", x.Mount, x.Volume, x.Host, x.ID)
	}
	return c.n, errors.Join(t.Flush(), c.err)
}
