package node

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/cluster"
	"sealfs/op"
	"sealfs/router"
	"sealfs/server"
	"sealfs/wire"
)

// DefaultVolume is the name of the volume that a new data directory gets.
const DefaultVolume = "main"

// Options says what Up shall do.
type Options struct {
	Dir   Dir
	Mount string // mount point of the default volume; empty: no mount
	Size  Size   // of each image if it is to be made (0: DefaultSize)
	// Servers is the number of stores of a new data directory (0: one), and for an
	// existing one must be what it was.
	Servers int
	// Device and Region, absolute, make the store of a new data directory lie
	// elsewhere than in it. For an existing one Size and these must be what they were.
	Device, Region string
	// Flags are settings from the command line, by key. See Defaults.
	Flags  map[string]string
	Getenv func(string) string // nil: os.Getenv
	// Detached is for a process without a terminal: the log also gets what the
	// process writes to its standard output and error.
	Detached bool
}

func (o *Options) shape() shape { return shape{o.Size, o.Device, o.Region, o.Servers} }

// Node is the main process of a data directory: manager, server, sockets and
// the first mount.
type Node struct {
	life
	cfg     *Config
	manager *cluster.Manager
	router  *router.Router // to the stores of this process
	server  *server.Server
	mount   *mount // nil without one

	// volumes serialises what changes volumes or sessions: a volume that is
	// being deleted gets no session, one with a session is not deleted.
	volumes  sync.Mutex
	sessions map[sealfs.Session]*openSession
	expelled []sealfs.Session        // sessions that this process has ended: their requests are refused
	drops    map[sealfs.Volume]*drop // deletions under way
}

// Up opens the data directory, formats it if it is empty, and serves it. When
// it returns, the default volume is mounted and the sockets answer. Close ends
// all of it; an error of Up leaves nothing open.
func Up(ctx context.Context, o Options) (n *Node, err error) {
	if o.Getenv == nil {
		o.Getenv = os.Getenv
	}
	n = &Node{sessions: make(map[sealfs.Session]*openSession), drops: make(map[sealfs.Volume]*drop)}
	n.begin(ctx, o.Dir)
	defer func() {
		if err != nil {
			err = n.abort(err)
			n = nil
		}
	}()
	settings, err := n.openDir(o)
	if err != nil {
		return n, err
	}
	if o.Mount, err = n.clearMounts(o.Mount, settings); err != nil {
		return n, err
	}
	if !n.cfg.formatted() {
		if err := n.dir.format(n.cfg, o.shape()); err != nil {
			return n, err
		}
		n.log.Info("formatted", "dir", n.dir.path, "size", n.cfg.Stores[0].Size.String(), "cluster", n.cfg.Cluster)
	}
	if err := n.serve(ctx, settings); err != nil {
		return n, err
	}
	if o.Mount != "" {
		if err := n.mountDefault(ctx, o.Mount, settings); err != nil {
			return n, err
		}
	}
	n.log.Info("ready", "pid", os.Getpid(), "dir", n.dir.path, "mount", o.Mount)
	return n, nil
}

// Started describes the node for people and scripts.
func (n *Node) Started() Started {
	s := Started{PID: os.Getpid(), Data: n.dir.path, Stores: n.dir.stores(n.cfg), Log: n.dir.LogPath()}
	if n.mount != nil {
		s.Mount, s.Volume = n.mount.point, DefaultVolume
	}
	return s
}

// openDir takes the data directory's lock and reads its configuration.
func (n *Node) openDir(o Options) (Settings, error) {
	d := n.dir
	// Before anything is made in what may be somebody else's directory.
	if _, err := d.inspect(o.shape()); err != nil {
		return Settings{}, err
	}
	if err := d.make(); err != nil {
		return Settings{}, err
	}
	// No role may be at work on it either.
	for _, d := range []Dir{d, d.as(RoleManager), d.as(RoleServer)} {
		l, err := d.lock(lockWait)
		if err != nil {
			return Settings{}, err
		}
		n.onClose(l.release)
	}
	var err error
	// Again: until a moment ago another process may have been at work.
	if n.cfg, err = d.inspect(o.shape()); err != nil {
		return Settings{}, err
	}
	s, _, err := n.cfg.Effective(o.Flags, o.Getenv)
	if err != nil {
		return Settings{}, err
	}
	return s, n.openLog(s, o.Detached)
}

// clearMounts clears what killed processes left mounted, checks the mount
// point, and enters this process into DIR/pids. It returns the mount point as the
// kernel names it.
func (n *Node) clearMounts(point string, s Settings) (string, error) {
	if err := n.dir.clearStale(point); err != nil {
		return "", err
	}
	p := Process{Role: RoleMain}
	if point != "" {
		if _, err := parseMountOptions(s.MountOptions); err != nil {
			return "", err
		}
		var err error
		if point, err = mountPath(point); err != nil {
			return "", err
		}
		if err := checkMountPoint(point); err != nil {
			return "", err
		}
		p.Mount, p.Volume = point, DefaultVolume
	}
	// Before the mount: whoever finds the mount of a dead process finds its entry.
	return point, n.register(p)
}

// serve opens manager and server, finishes what was begun with volumes, and
// opens the sockets.
func (n *Node) serve(ctx context.Context, s Settings) error {
	if err := n.dir.checkStores(n.cfg); err != nil {
		return err
	}
	var err error
	n.manager, err = cluster.Open(ctx, cluster.Options{
		Dir: n.dir.join("manager"), Cluster: n.cfg.Cluster, Shards: n.cfg.Shards, Logger: n.log.With("part", "manager"),
	})
	if err != nil {
		return err
	}
	n.onClose(n.manager.Close)
	if have := n.manager.Map().Shards; have != n.cfg.Shards {
		return fault(sealfs.ErrInvalid, "%s says %d shards, but the manager was made with %d: write shards: %d there", n.dir.join("config.yaml"), n.cfg.Shards, have, have)
	}
	var stores []server.StoreOptions
	for _, st := range n.dir.stores(n.cfg) {
		if err := n.manager.AddStore(ctx, cluster.StoreInfo{ID: st.ID, Bytes: uint64(st.Size)}); err != nil {
			return err
		}
		so, release, err := n.storeOptions(st, s)
		if err != nil {
			return err
		}
		n.onClose(release)
		stores = append(stores, so)
	}
	var srv atomic.Pointer[server.Server]
	n.router = router.New(router.Options{Cluster: n.cfg.Cluster, Map: n.manager.Map, Local: localStore(&srv), Logger: n.log.With("part", "peers")})
	n.onClose(func() error { n.router.Close(); return nil })
	o := server.Options{Shards: n.cfg.Shards, Map: n.manager.Map, Stores: stores, Durable: s.Durable, Logger: n.log.With("part", "server")}
	if len(stores) > 1 {
		o.Peers = n.router
	}
	if n.server, err = server.Open(ctx, o); err != nil {
		return err
	}
	srv.Store(n.server)
	n.router.Renew()
	n.onClose(n.server.Close)
	n.onClose(func() error { n.stop(); n.work.Wait(); return nil })
	if err := n.resumeVolumes(ctx); err != nil {
		return err
	}
	n.work.Go(n.beat)
	n.work.Go(n.publishMap)
	n.work.Go(n.watchSessions)
	return n.listen()
}

// localStore returns how a router finds the stores of this process, once they are open.
func localStore(srv *atomic.Pointer[server.Server]) func(sealfs.UUID) op.Handler {
	return func(id sealfs.UUID) op.Handler {
		if s := srv.Load(); s != nil && s.Owns(id) {
			return s
		}
		return nil
	}
}

// listen opens the sockets: requests for further mounts, and administration.
func (n *Node) listen() error {
	data, err := wire.ListenUnix(n.dir.dataSocket())
	if err != nil {
		return err
	}
	admin, err := n.dir.listenAdmin()
	if err != nil {
		return errors.Join(err, data.Close())
	}
	// The admin socket ends first: it bids goodbye to further mounts, which then
	// send what they have.
	ws := wire.NewServer(n.meters.counted("server", n.server.Guests()), wire.ServerOptions{Cluster: n.cfg.Cluster, Log: n.log.With("part", "wire")})
	n.meters.stores(n.server)
	n.meters.wire(ws.Stats)
	n.meters.manager(n.manager)
	n.meters.mounts(func() (list []*mount) {
		n.volumes.Lock()
		defer n.volumes.Unlock()
		if n.mount != nil {
			list = append(list, n.mount)
		}
		return list
	})
	if n.meters.err != nil {
		return errors.Join(n.meters.err, data.Close(), admin.Close())
	}
	n.run("socket for mounts", func(ctx context.Context) error { return ws.Serve(ctx, data) })
	n.run("admin socket", func(ctx context.Context) error { return n.api(ctx).serve(ctx, admin) })
	return nil
}

// beat tells the manager how the stores are.
func (n *Node) beat() {
	tick := time.NewTicker(beatInterval)
	defer tick.Stop()
	for {
		for _, st := range n.server.Status().Stores {
			if err := n.manager.Beat(st.ID, storeStats(st)); err != nil {
				n.log.Warn("the manager does not take heartbeats; files stay usable, volumes cannot be changed", "err", err)
				return
			}
		}
		select {
		case <-n.ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// publishMap keeps DIR/map a copy of the cluster map, for those who ask while
// nothing runs.
func (n *Node) publishMap() {
	for {
		changed := n.manager.Changed()
		if err := replaceFile(n.dir.join("map"), n.manager.Map().Encode(), 0o600); err != nil {
			n.log.Warn("cannot keep a copy of the cluster map", "err", err)
		}
		select {
		case <-n.ctx.Done():
			return
		case <-changed:
		}
	}
}

// savedMap returns the copy of the map, nil if there is none.
func (d Dir) savedMap() *cluster.Map {
	text, err := os.ReadFile(d.join("map"))
	if err != nil {
		return nil
	}
	m, err := cluster.Decode(text)
	if err != nil {
		return nil // it is made again by the next start
	}
	return m
}
