package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"sealfs"
	"sealfs/cluster"
	"sealfs/lsfs"
	"sealfs/server"
	"sealfs/wire"
)

// DefaultVolume is the name of the volume that a new data directory gets.
const DefaultVolume = "main"

// Options says what Up shall do.
type Options struct {
	Dir   Dir
	Mount string // mount point of the default volume; empty: no mount
	Size  Size   // of the image if it is to be made (0: DefaultSize)
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

func (o *Options) shape() shape { return shape{o.Size, o.Device, o.Region} }

// Node is the main process of a data directory: manager, server, sockets and
// the first mount.
type Node struct {
	dir     Dir
	cfg     *Config
	log     *slog.Logger
	manager *cluster.Manager
	server  *server.Server
	mount   *mount // nil without one

	// volumes serialises what changes volumes or sessions: a volume that is
	// being deleted gets no session, one with a session is not deleted.
	volumes  sync.Mutex
	sessions map[sealfs.Session]Session
	drops    map[sealfs.Volume]*drop // deletions under way

	ctx     context.Context // ends early in Close
	stop    context.CancelFunc
	work    sync.WaitGroup // goroutines that end with ctx
	undo    []func() error // what Close does, last first
	failed  chan error     // what ends the node by itself
	closing sync.Once
	closed  error
}

// Up opens the data directory, formats it if it is empty, and serves it. When
// it returns, the default volume is mounted and the sockets answer. Close ends
// all of it; an error of Up leaves nothing open.
func Up(ctx context.Context, o Options) (n *Node, err error) {
	if o.Getenv == nil {
		o.Getenv = os.Getenv
	}
	n = &Node{dir: o.Dir, sessions: make(map[sealfs.Session]Session), drops: make(map[sealfs.Volume]*drop), failed: make(chan error, 1)}
	n.ctx, n.stop = context.WithCancel(context.WithoutCancel(ctx))
	n.onClose(func() error { n.stop(); return nil })
	defer func() {
		if err != nil {
			if n.log != nil {
				n.log.Error("start failed", "err", err)
			}
			err = errors.Join(err, n.Close())
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

// onClose adds to what Close does; it is done in reverse order.
func (n *Node) onClose(f func() error) { n.undo = append(n.undo, f) }

// Close ends everything cleanly: mount, sockets, server, manager, in this
// order. What is still in use is detached: its users get errors from then on.
func (n *Node) Close() error {
	n.closing.Do(func() {
		var errs []error
		for _, f := range slices.Backward(n.undo) {
			errs = append(errs, f())
		}
		n.closed = errors.Join(errs...)
	})
	return n.closed
}

// Wait returns when ctx is done (nil), or with an error when the node cannot go on.
func (n *Node) Wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		n.log.Info("told to end", "cause", context.Cause(ctx))
		return nil
	case err := <-n.failed:
		return err
	}
}

// fail ends Wait with err.
func (n *Node) fail(err error) {
	select {
	case n.failed <- err:
	default:
	}
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
	l, err := d.lock(lockWait)
	if err != nil {
		return Settings{}, err
	}
	n.onClose(l.release)
	// Again: until a moment ago another process may have been at work.
	if n.cfg, err = d.inspect(o.shape()); err != nil {
		return Settings{}, err
	}
	s, _, err := n.cfg.Effective(o.Flags, o.Getenv)
	if err != nil {
		return Settings{}, err
	}
	n.log, err = n.openLog(s, o.Detached)
	return s, err
}

func (n *Node) openLog(s Settings, detached bool) (*slog.Logger, error) {
	f, err := openLog(n.dir.LogPath(), int64(s.LogSize), s.LogKeep, detached)
	if err != nil {
		return nil, err
	}
	n.onClose(f.Close)
	log := slog.New(slog.NewTextHandler(f, &slog.HandlerOptions{Level: s.LogLevel}))
	n.onClose(func() error { log.Info("ended", "pid", os.Getpid()); return nil })
	return log, nil
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
	r, err := n.dir.register(p)
	if err != nil {
		return "", err
	}
	n.onClose(r.end)
	return point, nil
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
		ring := StagingPath(st.ID, st.Device)
		l, err := lockStaging(ring, st.ID)
		if err != nil {
			return err
		}
		n.onClose(func() error { return errors.Join(os.Remove(ring+".lock"), l.release()) })
		stores = append(stores, server.StoreOptions{Device: st.Device, Region: st.Region, Staging: ring, Log: lsfs.Options{
			StagingBytes: int64(s.Staging), BudgetBytes: int64(s.Memory), CacheBytes: int64(s.Cache), Logger: n.log.With("part", "store"),
		}})
	}
	n.server, err = server.Open(ctx, server.Options{
		Shards: n.cfg.Shards, Map: n.manager.Map, Stores: stores, Durable: s.Durable, Logger: n.log.With("part", "server"),
	})
	if err != nil {
		return err
	}
	n.onClose(n.server.Close)
	n.onClose(func() error { n.stop(); n.work.Wait(); return nil })
	if err := n.resumeVolumes(ctx); err != nil {
		return err
	}
	n.work.Go(n.beat)
	n.work.Go(n.publishMap)
	return n.listen()
}

// listen opens the sockets: requests for further mounts, and administration.
func (n *Node) listen() error {
	data, err := wire.ListenUnix(n.dir.dataSocket())
	if err != nil {
		return err
	}
	admin, err := wire.ListenUnix(n.dir.adminSocket())
	if err != nil {
		return errors.Join(err, data.Close())
	}
	run := func(name string, serve func(context.Context) error) {
		ctx, stop := context.WithCancel(n.ctx)
		var done sync.WaitGroup
		done.Go(func() {
			if err := serve(ctx); err != nil {
				n.fail(fmt.Errorf("%s: %w", name, err))
			}
		})
		n.onClose(func() error { stop(); done.Wait(); return nil })
	}
	// The admin socket ends first: it bids goodbye to further mounts, which then
	// send what they have.
	run("socket for mounts", func(ctx context.Context) error {
		return wire.Serve(ctx, data, n.server.Guests(), wire.ServerOptions{Cluster: n.cfg.Cluster, Log: n.log.With("part", "wire")})
	})
	run("admin socket", func(ctx context.Context) error { return n.serveAdmin(ctx, admin) })
	return nil
}

// beatInterval is a third of the silence after which a store is suspected.
const beatInterval = time.Second

// beat tells the manager how the stores are.
func (n *Node) beat() {
	tick := time.NewTicker(beatInterval)
	defer tick.Stop()
	for {
		for _, st := range n.server.Status().Stores {
			s := cluster.StoreStats{Used: uint64(max(st.Stats.Live, 0)), Free: uint64(max(st.Stats.Usable-st.Stats.Live, 0)), Inodes: uint64(max(st.Files, 0)), Failed: st.Reason}
			if err := n.manager.Beat(st.ID, s); err != nil {
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
