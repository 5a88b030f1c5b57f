package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"sealfs"
	"sealfs/server"
)

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
	before := s.inv // nobody else changes it
	p, err := s.dir.adoptDisk(&inv, spec)
	if err != nil {
		return DiskStatus{}, err
	}
	k := *p
	known := slices.ContainsFunc(before.Disks, func(o Disk) bool { return o.ID == k.ID })
	if err = s.dir.checkDisk(&inv, k); err == nil {
		err = s.serveDisk(ctx, &inv, k)
	}
	if err != nil && !known {
		// It can be tried again, and nobody has to take it out.
		s.mu.Lock()
		s.inv = before
		delete(s.disks, k.ID)
		s.mu.Unlock()
		err = errors.Join(err, s.dir.writeInventory(before))
	}
	if err != nil {
		return DiskStatus{}, err
	}
	return s.disk(k.ID.String())
}

// serveDisk opens a disk of the new inventory, unless it is open.
func (s *StoreServer) serveDisk(ctx context.Context, inv *inventory, k Disk) error {
	s.mu.Lock()
	d := s.disks[k.ID]
	if d == nil {
		d = new(servedDisk)
	}
	if !d.open {
		d.Disk = k
	}
	s.inv, s.disks[k.ID] = inv, d
	s.mu.Unlock()
	if d.open {
		return nil
	}
	if err := s.openDisk(ctx, d); err != nil {
		return err
	}
	s.log.Info("disk added", "device", k.Device, "store", k.ID)
	return nil
}

// openDisk claims a disk, and serves it. One that cannot be opened says why, and
// can be tried again.
func (s *StoreServer) openDisk(ctx context.Context, d *servedDisk) (err error) {
	claim := func(yes bool) {
		s.mu.Lock()
		d.claim = yes
		s.mu.Unlock()
	}
	claim(true)
	defer func() {
		if err != nil {
			s.setAside(d, err)
		}
	}()
	if _, err := s.sendBeat(ctx, false); err != nil {
		return err
	}
	s.mu.Lock()
	why := d.reason
	s.mu.Unlock()
	if why != "" {
		return fault(sealfs.ErrBusy, "%s", why)
	}
	if err := s.addStore(ctx, s.server.Load(), d); err != nil {
		return err
	}
	s.router.Renew()
	return nil
}

// setAside notes why a disk is not served. Others may claim it.
func (s *StoreServer) setAside(d *servedDisk, err error) {
	s.mu.Lock()
	d.open, d.claim, d.reason = false, false, err.Error()
	s.mu.Unlock()
}

// addStore opens a disk in a server that has others.
func (s *StoreServer) addStore(ctx context.Context, srv *server.Server, d *servedDisk) error {
	so, err := s.takeDisk(d)
	if err != nil {
		return err
	}
	if err := srv.AddStore(ctx, so); err != nil {
		return errors.Join(fmt.Errorf("disk %s cannot be opened: %w", s.dir.abs(d.Device), err), s.releaseDisk(d))
	}
	s.mu.Lock()
	d.open = true
	s.mu.Unlock()
	return nil
}

// takeDisk takes the disk's ring for this process, and says how to open the store.
func (s *StoreServer) takeDisk(d *servedDisk) (server.StoreOptions, error) {
	so, release, err := s.storeOptions(s.dir.diskStore(d.Disk), s.settings)
	if err == nil {
		s.mu.Lock()
		d.release = release
		s.mu.Unlock()
	}
	return so, err
}

// releaseDisk gives the disk's ring back.
func (s *StoreServer) releaseDisk(d *servedDisk) error {
	s.mu.Lock()
	release := d.release
	d.release = nil
	s.mu.Unlock()
	if release == nil {
		return nil
	}
	return release()
}

// releaseDisks gives back all rings.
func (s *StoreServer) releaseDisks() error {
	s.mu.Lock()
	list := slices.AppendSeq(slices.Clone(s.removed), maps.Values(s.disks))
	s.mu.Unlock()
	var errs []error
	for _, d := range list {
		errs = append(errs, s.releaseDisk(d))
	}
	return errors.Join(errs...)
}

// openServer opens those disks of the inventory that can be opened: a broken one
// does not keep the others from being served.
func (s *StoreServer) openServer(ctx context.Context, o server.Options) (*server.Server, error) {
	var usable []*servedDisk
	for _, k := range s.inv.Disks {
		d := s.disks[k.ID]
		if d.reason != "" {
			continue
		}
		so, err := s.takeDisk(d)
		if err != nil {
			s.setAside(d, err)
			continue
		}
		o.Stores = append(o.Stores, so)
		usable = append(usable, d)
	}
	var srv *server.Server
	var err error
	if len(usable) > 0 {
		srv, err = server.Open(ctx, o)
	}
	if err != nil && ctx.Err() == nil && len(usable) > 1 {
		srv, usable, err = s.openEach(ctx, o, usable)
	}
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	for _, d := range usable {
		d.open = true
	}
	var reasons []string
	for _, k := range s.inv.Disks {
		d := s.disks[k.ID]
		d.claim = d.open
		if !d.open {
			reasons = append(reasons, d.reason)
		}
	}
	s.mu.Unlock()
	if srv == nil {
		return nil, fault(sealfs.ErrBusy, "%s", strings.Join(reasons, "; "))
	}
	for _, why := range reasons {
		s.tell(why)
	}
	return srv, nil
}

// openEach opens disks one by one, since they could not be opened together, and
// returns those that were.
func (s *StoreServer) openEach(ctx context.Context, o server.Options, disks []*servedDisk) (srv *server.Server, opened []*servedDisk, err error) {
	stores := o.Stores
	var errs []error
	for i, d := range disks {
		var err error
		if srv == nil {
			o.Stores = stores[i : i+1]
			srv, err = server.Open(ctx, o)
		} else {
			err = srv.AddStore(ctx, stores[i])
		}
		if err == nil {
			opened = append(opened, d)
			continue
		}
		err = fmt.Errorf("disk %s cannot be opened, all others are served: %w", s.dir.abs(d.Device), err)
		s.setAside(d, errors.Join(err, s.releaseDisk(d)))
		errs = append(errs, err)
	}
	if srv == nil {
		return nil, nil, errors.Join(errs...)
	}
	return srv, opened, nil
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
	if d := s.disks[k.ID]; d != nil {
		s.removed = append(s.removed, d)
		delete(s.disks, k.ID)
	}
	s.mu.Unlock()
	s.log.Info("disk removed", "device", k.Device, "store", k.ID)
	return s.dir.writeInventory(&inv)
}
