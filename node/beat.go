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

// sendBeat sends one heartbeat with the disks that this server serves or is about
// to, and takes over what the answer says. A store that is refused while it is open ends the
// process: somebody else has its identity, and serves it.
func (s *StoreServer) sendBeat(ctx context.Context, leaving bool) (r cluster.BeatReply, err error) {
	s.beating.Lock() // answers must not overtake each other
	defer s.beating.Unlock()
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
		return cluster.BeatReply{}, err
	}
	s.mu.Lock()
	s.lease = sent.Add(r.Term)
	for _, x := range b.Stores {
		d := s.disks[x.ID]
		if d == nil {
			continue // removed meanwhile
		}
		why, refused := r.Refused[x.ID]
		d.reason = ""
		if refused {
			d.reason = s.unserved(d.Disk, why)
		}
		if refused && d.open {
			err = fault(sealfs.ErrBusy, "%s", d.reason)
		}
	}
	s.mu.Unlock()
	if r.Sessions != nil {
		s.sessions.Store(r.Sessions)
	}
	s.tellSessions()
	// After the list: what is fenced no more has ended in it.
	s.fenced.Store(&r.Fenced)
	if srv != nil {
		srv.Fence(r.Fenced)
		srv.Attend(time.Until(sent.Add(r.Term)))
	}
	return r, err
}

// tellSessions gives the server the newest list of sessions.
func (s *StoreServer) tellSessions() {
	if srv, l := s.server.Load(), s.sessions.Load(); srv != nil && l != nil && s.told.Swap(l.Version) != l.Version {
		srv.SetSessions(l.Next, l.Live)
	}
}

// composeBeat says how the disks are; srv is nil while they are not open. What this
// server does not serve it must not claim: the lease would keep those away who do.
func (s *StoreServer) composeBeat(srv *server.Server) cluster.Beat {
	b := cluster.Beat{Server: s.id, Instance: s.instance, Addr: s.addr, Host: s.host, Rack: s.rack}
	if l := s.fenced.Load(); l != nil {
		b.Fenced = *l
	}
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
		if d := s.disks[k.ID]; d == nil || !d.claim {
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
				if d.claim && d.reason != "" {
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
		var told []sealfs.Session
		if l := s.fenced.Load(); l != nil {
			told = *l
		}
		r, err := s.sendBeat(s.ctx, false)
		if err != nil {
			// Without managers no session ends.
			s.server.Load().Attend(4 * beatPatience)
		}
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
		if err == nil && slices.ContainsFunc(r.Fenced, func(id sealfs.Session) bool { return !slices.Contains(told, id) }) {
			continue // others wait for what these sessions hold
		}
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
	}
}
