package node

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"sealfs"
	"sealfs/cluster"
	"sealfs/server"
)

// beatInterval is how often a server is heard of, unless the managers wish it
// otherwise. It is a third of the silence after which a store is suspected.
const beatInterval = time.Second

// beatPatience is how long a server waits for the answer to a heartbeat.
const beatPatience = 3 * time.Second

// sendBeat sends one heartbeat with all disks that are this server's, and takes
// over what the answer says. A store that is refused while it is open ends the
// process: somebody else has its identity, and serves it.
func (s *StoreServer) sendBeat(ctx context.Context, leaving bool) (r cluster.BeatReply, err error) {
	ctx, cancel := context.WithTimeout(ctx, beatPatience)
	defer cancel()
	srv := s.server.Load()
	if leaving {
		srv = nil // it is closed
	}
	b := s.composeBeat(srv)
	b.Leaving = leaving
	sent := time.Now()
	if r, err = s.remote.Beat(ctx, b); err != nil || leaving {
		return r, err
	}
	s.mu.Lock()
	s.lease = sent.Add(r.Term)
	for id, d := range s.disks {
		why, refused := r.Refused[id]
		d.reason = ""
		if refused {
			d.reason = fmt.Sprintf("store %s on %s is not served: %s", id, s.dir.abs(d.Device), why)
		}
		if refused && d.open {
			err = fault(sealfs.ErrBusy, "%s", d.reason)
		}
	}
	s.mu.Unlock()
	others := make(map[sealfs.Volume]cluster.VolumeUsage, len(r.Others))
	for _, u := range r.Others {
		others[u.ID] = u
	}
	s.others.Store(&others)
	if r.Sessions != nil {
		s.sessions.Store(r.Sessions)
	}
	s.tellSessions()
	return r, err
}

// tellSessions gives the server the newest list of sessions.
func (s *StoreServer) tellSessions() {
	if srv, l := s.server.Load(), s.sessions.Load(); srv != nil && l != nil && s.told.Swap(l.Version) != l.Version {
		srv.SetSessions(l.Next, l.Live)
	}
}

// composeBeat says how all disks are; srv is nil while they are not open.
func (s *StoreServer) composeBeat(srv *server.Server) cluster.Beat {
	b := cluster.Beat{Server: s.id, Instance: s.instance, Addr: s.addr, Host: s.host, Rack: s.rack}
	if l := s.sessions.Load(); l != nil {
		b.SessionsVersion = l.Version
	}
	var stores []server.StoreStatus
	var usage []cluster.VolumeUsage
	if srv != nil {
		stores = srv.Status().Stores
		for _, u := range srv.Usages() {
			usage = append(usage, cluster.VolumeUsage{ID: u.ID, Bytes: uint64(max(u.Bytes, 0)), Inodes: uint64(max(u.Inodes, 0))})
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.inv.Disks {
		if s.disks[k.ID] == nil {
			continue
		}
		x := cluster.StoreBeat{ID: k.ID, Bytes: uint64(k.Size), Weight: k.Weight, State: "starting"}
		if i := slices.IndexFunc(stores, func(o server.StoreStatus) bool { return o.ID == k.ID }); i >= 0 {
			x.State, x.StoreStats = stores[i].State, storeStats(stores[i])
			// Usage is of all stores together: the first that is open carries it.
			x.Usage, usage = usage, nil
		}
		b.Stores = append(b.Stores, x)
	}
	return b
}

// storeStats returns what a heartbeat says of a store.
func storeStats(st server.StoreStatus) cluster.StoreStats {
	return cluster.StoreStats{
		Used: uint64(max(st.Stats.Live, 0)), Free: uint64(max(st.Stats.Usable-st.Stats.Live, 0)),
		Inodes: uint64(max(st.Files, 0)), Failed: st.Reason,
	}
}

// claim asks the managers for all disks, before any is opened: one that another
// process serves must not be written to by this one. What is refused may be
// the lease of a process that was killed, so that is waited for.
func (s *StoreServer) claim(ctx context.Context) error {
	var deadline time.Time
	for said := ""; ; {
		r, err := s.sendBeat(ctx, false)
		if ctx.Err() != nil {
			return fault(sealfs.ErrInterrupted, "interrupted while waiting for a manager at %s", strings.Join(s.managers, ","))
		}
		now := ""
		switch {
		case err != nil:
			now = fmt.Sprintf("waiting for a manager that leads at %s: %v", strings.Join(s.managers, ","), err)
		case len(r.Refused) == 0:
			s.onClose(s.leave)
			return nil
		case deadline.IsZero():
			deadline = time.Now().Add(r.Term + r.Term/4)
			for _, d := range s.disks {
				if d.reason != "" {
					now = d.reason + "; waiting for that to end"
				}
			}
		case time.Now().After(deadline):
			s.onClose(s.leave)
			return nil
		}
		if now != "" && said == "" {
			s.tell(now)
			said = now
		}
		wait := time.NewTimer(beatInterval / 2)
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
		}
	}
}

// leave tells the managers that this server ends, so that nobody waits for its
// leases. If none hears it, they find out by themselves.
func (s *StoreServer) leave() error {
	ctx, cancel := context.WithTimeout(context.Background(), beatPatience)
	defer cancel()
	if _, err := s.sendBeat(ctx, true); err != nil {
		s.log.Info("no manager was told that this server ends", "err", err)
	}
	return nil
}

// beat tells the managers every second how the stores are, until the end. Files
// are served whether managers answer or not.
func (s *StoreServer) beat() {
	interval := beatInterval
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		r, err := s.sendBeat(s.ctx, false)
		s.mu.Lock()
		was := s.trust
		s.trust = ""
		if err != nil {
			s.trust = fmt.Sprintf("no manager takes its heartbeats (%v); files stay usable", err)
		}
		now := s.trust
		s.mu.Unlock()
		switch {
		case s.ctx.Err() != nil:
			return
		case err != nil && r.Term != 0: // it was answered, and that is the end
			s.fail(err)
			return
		case now != "" && was == "":
			s.log.Warn("no manager takes heartbeats; files stay usable", "err", err)
		case now == "" && was != "":
			s.log.Info("a manager takes heartbeats again")
		case err == nil && r.Interval > 0 && r.Interval != interval:
			interval = r.Interval
			tick.Reset(interval)
		}
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// addDisk takes a disk into a server that runs.
func (s *StoreServer) addDisk(ctx context.Context, spec diskSpec) (DiskStatus, error) {
	s.changing.Lock()
	defer s.changing.Unlock()
	s.mu.Lock()
	inv := *s.inv
	inv.Disks = slices.Clone(s.inv.Disks)
	s.mu.Unlock()
	if len(inv.Disks) >= ServersMax {
		return DiskStatus{}, fault(sealfs.ErrNoSpace, "this server has %d disks, and cannot have more: start another server", len(inv.Disks))
	}
	p, err := s.dir.adoptDisk(&inv, spec)
	if err != nil {
		return DiskStatus{}, err
	}
	k := *p
	if err := s.dir.checkDisk(&inv, k); err != nil {
		return DiskStatus{}, err
	}
	s.mu.Lock()
	d := s.disks[k.ID]
	if d == nil {
		d = &servedDisk{Disk: k}
	}
	s.inv, s.disks[k.ID] = &inv, d
	s.mu.Unlock()
	if !d.open {
		if _, err := s.sendBeat(ctx, false); err != nil {
			return DiskStatus{}, err
		}
		s.mu.Lock()
		why := d.reason
		s.mu.Unlock()
		if why != "" {
			return DiskStatus{}, fault(sealfs.ErrBusy, "%s", why)
		}
		so, err := s.storeOptions(s.dir.diskStore(k), s.settings)
		if err != nil {
			return DiskStatus{}, err
		}
		if err := s.server.Load().AddStore(ctx, so); err != nil {
			return DiskStatus{}, err
		}
		s.mu.Lock()
		d.open = true
		s.mu.Unlock()
		s.router.Renew()
		s.log.Info("disk added", "device", k.Device, "store", k.ID)
	}
	return s.disk(k.ID.String())
}

// disk finds a disk by its store, or by its device.
func (s *StoreServer) disk(name string) (DiskStatus, error) {
	var names []string
	for _, k := range s.listDisks() {
		if k.ID.String() == name || k.Device == name {
			return k, nil
		}
		names = append(names, k.Device)
	}
	return DiskStatus{}, fault(sealfs.ErrNotExist, "this server has no disk %q (there are: %q)", name, names)
}

// drainDisk refuses to empty a disk that shards lie on: they cannot be moved yet.
func (s *StoreServer) drainDisk(name string) error {
	k, err := s.disk(name)
	if err == nil && k.Shards > 0 {
		err = fault(sealfs.ErrNotSupported, "disk %s cannot be drained: %d shards lie on it, and shards cannot be moved to other disks yet; `sealfs disk bad` keeps new ones away from it", k.Device, k.Shards)
	}
	return err
}

// markDisk says whether new shards may come to lie on a disk.
func (s *StoreServer) markDisk(ctx context.Context, name string, bad bool) error {
	k, err := s.disk(name)
	if err != nil {
		return err
	}
	weight := k.Weight
	if m := s.remote.Map(); m != nil {
		if i := m.StoreIndex(k.ID); i >= 0 {
			weight = m.Stores[i].Weight
		}
	}
	return s.remote.SetStore(ctx, k.ID, weight, bad)
}

// removeDisk takes a disk that holds no shard out of the cluster for ever.
func (s *StoreServer) removeDisk(ctx context.Context, name string) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	k, err := s.disk(name)
	if err != nil {
		return err
	}
	if k.Shards > 0 {
		return fault(sealfs.ErrBusy, "disk %s cannot be removed: %d shards lie on it, and shards cannot be moved to other disks yet", k.Device, k.Shards)
	}
	if err := s.remote.RemoveStore(ctx, k.ID); err != nil {
		return err
	}
	s.mu.Lock()
	inv := *s.inv
	inv.Disks = slices.DeleteFunc(slices.Clone(s.inv.Disks), func(o Disk) bool { return o.ID == k.ID })
	s.inv = &inv
	delete(s.disks, k.ID)
	s.mu.Unlock()
	s.log.Info("disk removed", "device", k.Device, "store", k.ID)
	return s.dir.writeInventory(&inv)
}
