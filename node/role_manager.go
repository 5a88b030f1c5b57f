package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"sealfs"
	"sealfs/cluster"
	"sealfs/router"
	"sealfs/server"
)

// ManagerNode is a process that is one of a cluster's managers. The one that
// leads also makes the root directories of new volumes, and frees what deleted
// ones held.
type ManagerNode struct {
	life
	addr    string // advertised
	manager *cluster.Manager
	router  *router.Router

	mu   sync.Mutex
	jobs map[sealfs.Volume]bool // volumes that are being worked on
}

// ManagerOptions says what StartManager shall do.
type ManagerOptions struct {
	Dir      Dir
	Values   *Values
	Detached bool // see Options
}

// StartManager begins to serve as a manager. When it returns, others can reach
// it; a manager that makes or joins a cluster is a member then. One of several
// that starts again does not wait for the others.
func StartManager(ctx context.Context, o ManagerOptions) (n *ManagerNode, err error) {
	n = &ManagerNode{jobs: make(map[sealfs.Volume]bool)}
	n.begin(ctx, o.Dir.as(RoleManager))
	defer func() {
		if err != nil {
			err = n.abort(err)
			n = nil
		}
	}()
	s, err := o.Values.settings()
	if err != nil {
		return n, err
	}
	co, fresh, err := n.clusterOptions(o.Values)
	if err != nil {
		return n, err
	}
	if err := n.openDir(s, o.Detached); err != nil {
		return n, err
	}
	l := o.Values.listen()
	listener, addr, err := l.open(ctx)
	if err != nil {
		return n, err
	}
	n.onClose(func() error { return closeListener(listener) })
	n.addr, co.Addr, co.Logger = addr, addr, n.log.With("part", "manager")
	if n.manager, err = cluster.Open(ctx, co); err != nil {
		return n, err
	}
	n.onClose(n.manager.Close)
	n.router = router.New(router.Options{Map: n.manager.Map, Peer: true, Program: "sealfs manager", Logger: n.log.With("part", "servers")})
	n.onClose(func() error { n.router.Close(); return nil })
	n.onClose(func() error { n.stop(); n.work.Wait(); return nil })
	n.run("listener", func(ctx context.Context) error { return n.manager.Serve(ctx, listener) })
	if fresh {
		if err := n.manager.WaitReady(ctx); err != nil {
			return n, err
		}
	}
	n.work.Go(n.reconcile)
	n.work.Go(func() {
		select {
		case <-n.manager.Failed():
			n.fail(n.manager.Err())
		case <-n.ctx.Done():
		}
	})
	n.meters.manager(n.manager)
	n.meters.peers(n.router.Stats)
	if err := n.serveAdmin(n.api()); err != nil {
		return n, err
	}
	n.log.Info("ready", "pid", os.Getpid(), "dir", n.dir.path, "addr", n.addr)
	return n, nil
}

// clusterOptions reads the options. fresh says that there is no manager in the
// directory yet.
func (n *ManagerNode) clusterOptions(v *Values) (o cluster.Options, fresh bool, err error) {
	o = cluster.Options{Dir: n.dir.join("manager"), Name: v.Text("name"), Bootstrap: v.Yes("bootstrap")}
	shards, err := strconv.ParseUint(v.Text("shards"), 10, 32)
	if err != nil || shards < 1 || shards > sealfs.ShardsMax || shards&(shards-1) != 0 {
		return o, false, v.fault("shards", fault(sealfs.ErrInvalid, "%q is not a power of two up to %d", v.Text("shards"), sealfs.ShardsMax))
	}
	o.Shards = uint32(shards)
	if list := v.Text("join"); list != "" {
		if o.Join, err = ParseAddrs("--join", list); err != nil {
			return o, false, v.fault("join", err)
		}
	}
	_, err = os.Stat(n.dir.join("manager", "raft.db"))
	fresh = errors.Is(err, fs.ErrNotExist)
	switch {
	case fresh && o.Bootstrap && len(o.Join) > 0:
		return o, fresh, fault(sealfs.ErrInvalid, "--bootstrap makes a new cluster, and --join joins one that exists: leave one of them away")
	case fresh && !o.Bootstrap && len(o.Join) == 0:
		return o, fresh, fault(sealfs.ErrNotExist, "there is no manager in %s yet: make a new cluster with --bootstrap, or join one with --join HOST:PORT", n.dir)
	case !fresh: // both count for a new one only
		o.Bootstrap, o.Join = false, nil
	}
	return o, fresh, nil
}

// openDir takes the directory's lock for this role.
func (n *ManagerNode) openDir(s Settings, detached bool) error {
	if err := n.dir.make(); err != nil {
		return err
	}
	if err := n.lock(); err != nil {
		return err
	}
	if err := n.openLog(s, detached); err != nil {
		return err
	}
	if err := n.dir.forgetRole(RoleManager); err != nil {
		return err
	}
	if err := n.register(Process{Role: RoleManager}); err != nil {
		return err
	}
	return n.dir.takeOver()
}

// RecoverManager makes the manager of a directory the only one of its cluster,
// for when most managers are lost for good. The options say where it will listen.
func RecoverManager(ctx context.Context, d Dir, v *Values) error {
	d = d.as(RoleManager)
	if _, err := os.Stat(d.join("manager", "raft.db")); errors.Is(err, fs.ErrNotExist) {
		return fault(sealfs.ErrNotExist, "there is no manager in %s: name the directory of one that is left", d)
	}
	l := v.listen()
	addr := cmp.Or(l.Advertise, l.Addr)
	if _, err := l.check("--listen", addr); err != nil {
		return err
	}
	k, err := d.lock(0)
	if err != nil {
		return err
	}
	defer k.release()
	return cluster.Recover(ctx, cluster.Options{Dir: d.join("manager"), Addr: addr})
}

// Started describes the manager for people and scripts.
func (n *ManagerNode) Started() Started {
	return Started{PID: os.Getpid(), Role: RoleManager, Data: n.dir.path, Addr: n.addr, Log: n.dir.LogPath()}
}

// reconcileRetry is how long work on a volume rests after a failure.
const reconcileRetry = time.Second

// reconcile does, while this manager leads, what the map says is to be done
// with volumes.
func (n *ManagerNode) reconcile() {
	again := make(chan struct{}, 1)
	for {
		changed, leads := n.manager.Changed(), n.manager.LeaderChanged()
		if m := n.manager.Map(); m != nil && n.manager.Leading() {
			for _, v := range m.Volumes {
				if v.State != cluster.VolumeReady {
					n.settle(m, v, again)
				}
			}
		}
		select {
		case <-n.ctx.Done():
			return
		case <-changed:
		case <-leads:
		case <-again:
		}
	}
}

// settle works on a volume in the background, unless that is being done already.
func (n *ManagerNode) settle(m *cluster.Map, v cluster.VolumeInfo, again chan<- struct{}) {
	n.mu.Lock()
	busy := n.jobs[v.ID]
	n.jobs[v.ID] = true
	n.mu.Unlock()
	if busy {
		return
	}
	n.work.Go(func() {
		err := n.settleVolume(m, v)
		if err != nil && n.ctx.Err() == nil {
			n.log.Warn("work on a volume is tried again", "volume", v.Name, "state", v.State, "err", err)
			wait := time.NewTimer(reconcileRetry)
			select {
			case <-wait.C:
			case <-n.ctx.Done():
				wait.Stop()
			}
		}
		n.mu.Lock()
		delete(n.jobs, v.ID)
		n.mu.Unlock()
		select {
		case again <- struct{}{}:
		default:
		}
	})
}

func (n *ManagerNode) settleVolume(m *cluster.Map, v cluster.VolumeInfo) error {
	switch v.State {
	case cluster.VolumeCreating:
		root, err := server.MakeRoot(n.ctx, n.router, m.Shards, v.ID, v.Mode, v.UID, v.GID)
		if err == nil {
			_, err = n.manager.VolumeReady(n.ctx, v.ID, root)
		}
		if err == nil {
			n.log.Info("volume created", "volume", v.Name, "id", v.ID)
		}
		return err
	case cluster.VolumeDeleting:
		err := server.DropVolume(n.ctx, n.router, m.Shards, v.ID, nil)
		if err == nil {
			err = n.manager.VolumeDeleted(n.ctx, v.ID)
		}
		if err == nil {
			n.log.Info("volume deleted", "volume", v.Name, "id", v.ID)
		}
		return err
	}
	return nil
}

// ManagerStatus is what /v1/status of a manager says.
type ManagerStatus struct {
	State   string      `json:"state"`
	Reason  string      `json:"reason,omitempty"`
	PID     int         `json:"pid"`
	ID      sealfs.UUID `json:"id"`
	Cluster sealfs.UUID `json:"cluster"`
	Addr    string      `json:"addr"`
	Leading bool        `json:"leading"`
	Leader  string      `json:"leader"` // address, empty if none is known
	Map     uint64      `json:"map_version"`
}

func (n *ManagerNode) status() ManagerStatus {
	s := ManagerStatus{State: StateRunning, PID: os.Getpid(), ID: n.manager.ID(), Addr: n.addr, Leading: n.manager.Leading(), Leader: n.manager.Leader()}
	if m := n.manager.Map(); m != nil {
		s.Map, s.Cluster = m.Version, m.Cluster
	}
	var faults []string
	if err := n.manager.Err(); err != nil {
		faults = append(faults, fmt.Sprintf("it has stopped: %v", err))
	}
	if s.Leader == "" {
		faults = append(faults, "no manager leads: most of them must be running")
	}
	if len(faults) > 0 {
		s.State, s.Reason = StateDegraded, strings.Join(faults, "; ")
	}
	return s
}

func (n *ManagerNode) api() *api {
	a := n.newAPI(RoleManager, func() string { return n.status().Reason }, func(context.Context) (any, error) { return n.status(), nil })
	a.get("GET /v1/map", func(*http.Request) (any, error) { return n.manager.Map(), nil })
	return a
}
