package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/cluster"
	"sealfs/lsfs"
	"sealfs/router"
	"sealfs/server"
	"sealfs/wire"
)

// What a server adds to the admin socket (see api.go):
//
//	GET    /v1/disks              [DiskStatus]
//	POST   /v1/disks              diskSpec → DiskStatus
//	POST   /v1/disks/ID/drain
//	POST   /v1/disks/ID/bad       {"bad": B}
//	DELETE /v1/disks/ID

// StoreServer is a process that serves the disks of one machine to a cluster.
type StoreServer struct {
	life
	settings Settings
	say      func(string) // for people, while the start waits
	managers []string
	addr     string // advertised
	host     string
	rack     string
	instance uint64 // of this process: random
	cluster  sealfs.UUID
	id       sealfs.UUID // of this server, for ever

	remote *cluster.Remote
	router *router.Router
	server atomic.Pointer[server.Server] // nil until the stores are open

	sessions atomic.Pointer[cluster.SessionList] // the newest list
	told     atomic.Uint64                       // version of the one that server has
	fenced   atomic.Pointer[[]sealfs.Session]    // which it refuses although they have not ended

	beating sync.Mutex // held by one heartbeat at a time; taken before mu

	mu    sync.Mutex // taken before no other lock
	inv   *inventory
	disks map[sealfs.UUID]*servedDisk
	// removed are those that have left the cluster, and stay open until the end.
	removed []*servedDisk
	lease   time.Time // until when the managers count on us; zero: never yet
	trust   string    // why the managers are not heard, empty if they are

	changing sync.Mutex // serialises changes of disks; taken before mu
}

// servedDisk is a disk of the inventory in this run.
type servedDisk struct {
	Disk
	claim   bool         // heartbeats name it: it is open, or about to be
	open    bool         //
	reason  string       // why it is not open
	release func() error // gives its ring back; nil: it is not taken
}

// ServerOptions says what StartServer shall do.
type ServerOptions struct {
	Dir      Dir
	Values   *Values
	Detached bool         // see Options
	Say      func(string) // hears sentences for people while the start waits; may be nil
}

// StartServer begins to serve disks. It waits for a manager, for as long as ctx
// allows; from then on files are served whether managers live or not.
func StartServer(ctx context.Context, o ServerOptions) (s *StoreServer, err error) {
	s = &StoreServer{instance: rand.Uint64(), say: o.Say, disks: make(map[sealfs.UUID]*servedDisk)}
	s.begin(ctx, o.Dir.as(RoleServer))
	defer func() {
		if err != nil {
			err = s.abort(err)
			s = nil
		}
	}()
	specs, err := s.configure(o.Values)
	if err != nil {
		return s, err
	}
	if err := s.openDir(o.Detached); err != nil {
		return s, err
	}
	listener, addr, err := o.Values.listen().open(ctx)
	if err != nil {
		return s, err
	}
	s.onClose(func() error { return closeListener(listener) })
	s.addr = addr
	m, err := s.findManagers(ctx)
	if err != nil {
		return s, err
	}
	if err := s.findDisks(m, specs); err != nil {
		return s, err
	}
	if err := s.openStores(ctx, m); err != nil {
		return s, err
	}
	if err := s.listen(listener); err != nil {
		return s, err
	}
	s.log.Info("ready", "pid", os.Getpid(), "dir", s.dir.path, "addr", s.addr)
	return s, nil
}

// configure reads the options.
func (s *StoreServer) configure(v *Values) (specs []diskSpec, err error) {
	if s.settings, err = v.settings(); err != nil {
		return nil, err
	}
	if v.Text("manager") == "" {
		return nil, fault(sealfs.ErrInvalid, "which managers? name them with --manager HOST:PORT,HOST:PORT, SEALFS_MANAGER, or manager: in the configuration file")
	}
	if s.managers, err = ParseAddrs("--manager", v.Text("manager")); err != nil {
		return nil, v.fault("manager", err)
	}
	name, _ := os.Hostname()
	s.host, s.rack = cmp.Or(v.Text("host"), name), v.Text("rack")
	for _, text := range v.List("disk") {
		spec, err := parseDisk(text)
		if err != nil {
			return nil, v.fault("disk", err)
		}
		specs = append(specs, spec)
	}
	return specs, nil
}

// openDir takes the directory's lock for this role, and reads the inventory.
func (s *StoreServer) openDir(detached bool) error {
	if err := s.dir.make(); err != nil {
		return err
	}
	if err := s.lock(); err != nil {
		return err
	}
	if err := s.openLog(s.settings, detached); err != nil {
		return err
	}
	if err := s.dir.forgetRole(RoleServer); err != nil {
		return err
	}
	if err := s.register(Process{Role: RoleServer}); err != nil {
		return err
	}
	var err error
	if s.inv, err = s.dir.inventory(); err != nil {
		return err
	}
	return s.dir.takeOver()
}

// waitSay is how often a start that waits says so.
const waitSay = 10 * time.Second

func (s *StoreServer) tell(text string) {
	s.log.Info(text)
	if s.say != nil {
		s.say(text)
	}
	Notify("STATUS=" + text) // whoever does not listen misses nothing
}

// findManagers waits for a cluster map.
func (s *StoreServer) findManagers(ctx context.Context) (*cluster.Map, error) {
	s.remote = cluster.NewRemote(s.managers, cluster.RemoteOptions{Cluster: s.inv.Cluster, Logger: s.log.With("part", "managers")})
	s.run("managers' map", func(ctx context.Context) error {
		if err := s.remote.Run(ctx); ctx.Err() == nil {
			return err
		}
		return nil
	})
	for {
		wctx, cancel := context.WithTimeout(ctx, waitSay)
		m, err := s.remote.WaitMap(wctx)
		late := wctx.Err() != nil
		cancel()
		switch {
		case err == nil:
			return m, nil
		case ctx.Err() != nil:
			return nil, fault(sealfs.ErrInterrupted, "interrupted while waiting for a manager at %s", strings.Join(s.managers, ","))
		case !late:
			return nil, err // it will not get better by waiting
		}
		s.tell(fmt.Sprintf("waiting for a manager at %s: %v", strings.Join(s.managers, ","), err))
	}
}

// findDisks completes the inventory: with the cluster, and the disks asked for.
func (s *StoreServer) findDisks(m *cluster.Map, specs []diskSpec) error {
	if s.inv.Cluster.IsZero() {
		s.inv.Cluster = m.Cluster
	}
	if s.inv.Cluster != m.Cluster {
		return fault(sealfs.ErrInvalid, "%s belongs to cluster %s, and the managers at %s are of cluster %s: name the right ones", s.dir, s.inv.Cluster, strings.Join(s.managers, ","), m.Cluster)
	}
	s.cluster, s.id = s.inv.Cluster, s.inv.Server
	if err := s.dir.writeInventory(s.inv); err != nil {
		return err
	}
	for _, spec := range specs {
		if _, err := s.dir.adoptDisk(s.inv, spec); err != nil {
			return err
		}
	}
	if len(s.inv.Disks) == 0 {
		return fault(sealfs.ErrInvalid, "this server has no disk: name one with --disk DEVICE[,format], or an image with --disk FILE,size=SIZE")
	}
	if len(s.inv.Disks) > ServersMax {
		return fault(sealfs.ErrInvalid, "%d disks are more than one server can have, %d: start another server for some", len(s.inv.Disks), ServersMax)
	}
	// A broken disk does not keep the others from being served.
	var errs []error
	for _, k := range s.inv.Disks {
		d := &servedDisk{Disk: k, claim: true}
		s.disks[k.ID] = d
		err := s.dir.checkDisk(s.inv, k)
		if i := m.StoreIndex(k.ID); i >= 0 && m.Stores[i].State == cluster.StoreLeft {
			err = fault(sealfs.ErrInvalid, "%s", s.unserved(k, cluster.LeftForEver))
		}
		if k.Formatting {
			err = fault(sealfs.ErrInvalid, "the formatting of %s was interrupted: name it with --disk %s,format again", s.dir.abs(k.Device), s.dir.abs(k.Device))
		}
		if err != nil {
			d.claim, d.reason = false, err.Error()
			errs = append(errs, err)
		}
	}
	if len(errs) == len(s.inv.Disks) {
		return errors.Join(errs...)
	}
	return nil
}

// unserved says that a disk is not served, and why.
func (s *StoreServer) unserved(k Disk, why string) string {
	return fmt.Sprintf("store %s on %s is not served: %s", k.ID, s.dir.abs(k.Device), why)
}

// openStores opens all stores that the managers let us have.
func (s *StoreServer) openStores(ctx context.Context, m *cluster.Map) error {
	if err := s.claim(ctx); err != nil {
		return err
	}
	s.onClose(s.releaseDisks)
	if err := s.endInherited(ctx, m); err != nil {
		return err
	}
	s.router = router.New(router.Options{
		Cluster: s.cluster, Map: s.remote.Map, Refresh: s.remote.Refresh, Local: localStore(&s.server), Peer: true,
		Program: "sealfs server", Logger: s.log.With("part", "peers"),
	})
	s.onClose(func() error { s.router.Close(); return nil })
	srv, err := s.openServer(ctx, server.Options{
		Shards: m.Shards, Map: s.remote.Map, Durable: s.settings.Durable, Logger: s.log.With("part", "server"),
		Peers: s.router, KeepSessions: true,
	})
	if err != nil {
		return err
	}
	s.onClose(srv.Close)
	s.server.Store(srv)
	s.router.Renew()
	s.tellSessions()
	if l := s.fenced.Load(); l != nil {
		srv.Fence(*l)
	}
	s.onClose(func() error { s.stop(); s.work.Wait(); return nil })
	s.work.Go(s.beat)
	return nil
}

// endInherited ends the sessions that a killed `sealfs up` left in its stores: their
// numbers are none of the managers', who could not say that they have ended.
func (s *StoreServer) endInherited(ctx context.Context, m *cluster.Map) (err error) {
	if !s.inv.Inherited {
		return nil
	}
	// Of all disks, or the next start has to do it.
	defer func() { err = errors.Join(err, s.releaseDisks()) }()
	var stores []server.StoreOptions
	for _, k := range s.inv.Disks {
		d := s.disks[k.ID]
		if d.reason != "" {
			return fault(sealfs.ErrBusy, "the disks that `sealfs up` made in %s must all be there when a server opens them first: %s", s.dir, d.reason)
		}
		so, err := s.takeDisk(d)
		if err != nil {
			return err
		}
		stores = append(stores, so)
	}
	srv, err := server.Open(ctx, server.Options{Shards: m.Shards, Map: s.remote.Map, Stores: stores, Logger: s.log.With("part", "server")})
	if err != nil {
		return err
	}
	if err := srv.Close(); err != nil {
		return err
	}
	s.inv.Inherited = false
	return s.dir.writeInventory(s.inv)
}

// storeOptions takes a store's ring for this process, and says how to open it.
// release gives the ring back, when the store is closed.
func (l *life) storeOptions(st Store, s Settings) (so server.StoreOptions, release func() error, err error) {
	ring := StagingPath(st.ID, st.Device)
	k, err := lockStaging(ring, st.ID)
	if err != nil {
		return so, nil, err
	}
	release = func() error { return errors.Join(os.Remove(ring+".lock"), k.release()) }
	return server.StoreOptions{Device: st.Device, Region: st.Region, RegionMode: s.RegionMode, Staging: ring, Log: lsfs.Options{
		StagingBytes: int64(s.Staging), BudgetBytes: int64(s.Memory), CacheBytes: int64(s.Cache), Logger: l.log.With("part", "store"),
		ScrubInterval: s.ScrubEvery, ScrubRate: int64(s.ScrubRate),
	}}, release, nil
}

// listen begins to answer clients, peers and administrators.
func (s *StoreServer) listen(l net.Listener) error {
	srv := s.server.Load()
	ws := wire.NewServer(s.meters.counted("server", srv.Guests()), wire.ServerOptions{
		Cluster: s.cluster, Program: "sealfs server", Peer: s.meters.counted("peer", srv.Peer()), Log: s.log.With("part", "wire"),
	})
	s.meters.stores(srv)
	s.meters.peers(s.router.Stats)
	s.meters.wire(ws.Stats)
	s.meters.gauge("sealfs_server_lease_seconds", "For how long the managers still count on this server; negative: since when they do not.", func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return time.Until(s.lease).Seconds()
	})
	s.run("listener", func(ctx context.Context) error { return ws.Serve(ctx, l) })
	return s.serveAdmin(s.api())
}

// Started describes the server for people and scripts.
func (s *StoreServer) Started() Started {
	st := Started{PID: os.Getpid(), Role: RoleServer, Data: s.dir.path, Addr: s.addr, Log: s.dir.LogPath()}
	for _, k := range s.inv.Disks {
		st.Stores = append(st.Stores, s.dir.diskStore(k))
	}
	return st
}

// ServerStatus is what /v1/status of a server says.
type ServerStatus struct {
	State    string               `json:"state"`
	Reason   string               `json:"reason,omitempty"`
	PID      int                  `json:"pid"`
	Server   sealfs.UUID          `json:"server"`
	Cluster  sealfs.UUID          `json:"cluster"`
	Addr     string               `json:"addr"`
	Managers []string             `json:"managers"`
	Lease    time.Time            `json:"lease"` // until when the managers count on it
	Map      uint64               `json:"map_version"`
	Stores   []server.StoreStatus `json:"stores"`
	Disks    []DiskStatus         `json:"disks"`
	Peers    []ServerReach        `json:"peers"`
}

// DiskStatus is what a server says of a disk.
type DiskStatus struct {
	Disk
	State  string `json:"state"` // up, read-only, stalled, refused
	Reason string `json:"reason,omitempty"`
	Bad    bool   `json:"bad"` // gets no new shards
	Shards int    `json:"primary_of"`
	Files  int64  `json:"files"`
	Used   int64  `json:"used"`
}

func (s *StoreServer) status() ServerStatus {
	st := ServerStatus{
		State: StateRunning, PID: os.Getpid(), Cluster: s.cluster, Server: s.id, Addr: s.addr,
		Managers: s.managers, Stores: s.server.Load().Status().Stores, Disks: s.listDisks(), Peers: reaches(s.router),
	}
	if m := s.remote.Map(); m != nil {
		st.Map = m.Version
	}
	var faults []string
	s.mu.Lock()
	st.Lease = s.lease
	if s.trust != "" {
		faults = append(faults, s.trust)
	}
	s.mu.Unlock()
	for _, k := range st.Disks {
		if k.Reason != "" {
			faults = append(faults, fmt.Sprintf("disk %s is %s: %s", k.Device, k.State, k.Reason))
		}
	}
	if len(faults) > 0 {
		st.State, st.Reason = StateDegraded, strings.Join(faults, "; ")
	}
	return st
}

// reaches describes a router's servers.
func reaches(r *router.Router) []ServerReach {
	list := []ServerReach{}
	for _, p := range r.Stats() {
		x := ServerReach{Addr: p.Addr, State: string(p.State), OK: p.State != router.Away}
		if p.Err != "" {
			x.State += ": " + p.Err
		}
		list = append(list, x)
	}
	return list
}

func (s *StoreServer) listDisks() []DiskStatus {
	m := s.remote.Map()
	stores := s.server.Load().Status().Stores
	s.mu.Lock()
	defer s.mu.Unlock()
	list := []DiskStatus{}
	for _, k := range s.inv.Disks {
		d := s.disks[k.ID]
		x := DiskStatus{Disk: k, State: "refused", Reason: d.reason}
		x.Device, x.Region = s.dir.abs(k.Device), s.dir.abs(k.Region)
		if i := slices.IndexFunc(stores, func(o server.StoreStatus) bool { return o.ID == k.ID }); i >= 0 {
			x.State, x.Files, x.Used = stores[i].State, stores[i].Files, stores[i].Stats.Live
			x.Reason = cmp.Or(stores[i].Reason, x.Reason)
		}
		if m != nil {
			if i := m.StoreIndex(k.ID); i >= 0 {
				x.Bad, x.Shards = m.Stores[i].Bad, primaryOf(m, i)
			}
		}
		list = append(list, x)
	}
	return list
}

// primaryOf counts the shards that a store is the primary of.
func primaryOf(m *cluster.Map, store int) (n int) {
	for _, row := range m.Table {
		if len(row.Replicas) > 0 && int(row.Replicas[0]) == store {
			n++
		}
	}
	return n
}

func (s *StoreServer) api() *api {
	a := s.newAPI(RoleServer, func() string { return s.status().Reason }, func(context.Context) (any, error) { return s.status(), nil })
	a.scrub(s.server.Load())
	a.get("GET /v1/disks", func(*http.Request) (any, error) { return s.listDisks(), nil })
	a.get("POST /v1/disks", func(r *http.Request) (any, error) {
		var spec diskSpec
		if err := readBody(r, &spec); err != nil {
			return nil, err
		}
		return s.addDisk(r.Context(), spec)
	})
	a.get("POST /v1/disks/{id}/drain", func(r *http.Request) (any, error) { return struct{}{}, s.drainDisk(r.PathValue("id")) })
	a.get("POST /v1/disks/{id}/bad", func(r *http.Request) (any, error) {
		var q struct{ Bad bool }
		if err := readBody(r, &q); err != nil {
			return nil, err
		}
		return struct{}{}, s.markDisk(r.Context(), r.PathValue("id"), q.Bad)
	})
	a.get("DELETE /v1/disks/{id}", func(r *http.Request) (any, error) {
		return struct{}{}, s.removeDisk(r.Context(), r.PathValue("id"))
	})
	return a
}
