package node

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"time"

	"sealfs"
	"sealfs/client"
	"sealfs/cluster"
	"sealfs/op"
	"sealfs/router"
)

// fencePatience is how long a mount waits for the end of its predecessor's session.
const fencePatience = 3 * time.Second

// clusterMount is one mount of the daemon, with a session, connections and a
// kernel mount of its own.
type clusterMount struct {
	d    *Daemon
	spec MountSpec
	old  sealfs.Session // of the daemon before this one

	mu      sync.Mutex
	state   string
	reason  string
	session cluster.Session
	until   time.Time   // it is certain to live as long
	cluster sealfs.UUID // zero until it is known; the mount is of no other one ever
	router  *router.Router
	mount   *mount
	remote  *sharedRemote

	up     chan struct{}   // closed when it is mounted
	ctx    context.Context // ends when end begins, or the daemon's does
	stop   context.CancelFunc
	kept   sync.WaitGroup // goroutines that end with ctx
	work   sync.Mutex     // begin and end, one after the other; taken before mu
	ending sync.Once
	ended  error
}

func newClusterMount(d *Daemon, spec MountSpec) *clusterMount {
	m := &clusterMount{d: d, spec: spec, state: MountWaiting, reason: "it is being mounted", up: make(chan struct{})}
	m.ctx, m.stop = context.WithCancel(d.ctx)
	return m
}

// record returns what is remembered of the mount.
func (m *clusterMount) record() mountRecord {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := mountRecord{MountSpec: m.spec, Cluster: m.cluster, Session: m.session.ID}
	if r.Session == 0 {
		r.Session = m.old
	}
	return r
}

func (m *clusterMount) status() MountStatus {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := MountStatus{MountSpec: m.spec, State: m.state, Reason: m.reason, Session: m.session.ID, Cluster: m.cluster, PID: os.Getpid(), Servers: []ServerReach{}}
	if m.router != nil {
		s.Servers = reaches(m.router)
	}
	return s
}

// left reports whether somebody has unmounted it already; files on it may be open yet.
func (m *clusterMount) left() bool {
	m.mu.Lock()
	active := m.state == MountActive
	m.mu.Unlock()
	if !active {
		return false
	}
	e, mounted, err := mountAt(m.spec.Mount)
	return err == nil && !(mounted && e.ours())
}

// servers returns what the mount knows of the servers.
func (m *clusterMount) servers() []router.ServerStats {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.router == nil {
		return nil
	}
	return m.router.Stats()
}

// mapPatience is how long a mount waits for the cluster map.
const mapPatience = 10 * time.Second

// begin mounts. After an error, end gives back what had been taken.
func (m *clusterMount) begin(ctx context.Context) error {
	m.work.Lock()
	defer m.work.Unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(m.ctx, func() { cancel(fault(sealfs.ErrInterrupted, "mount %s is being unmounted", m.spec.Mount)) })()
	if ctx.Err() != nil || m.ctx.Err() != nil {
		return fault(sealfs.ErrInterrupted, "mount %s: interrupted", m.spec.Mount)
	}
	if err := clearMount(m.spec.Mount); err != nil {
		return err
	}
	if err := checkMountPoint(m.spec.Mount); err != nil {
		return err
	}
	mo, err := parseMountOptions(m.spec.Options)
	if err != nil {
		return err
	}
	mctx, done := context.WithTimeoutCause(ctx, mapPatience, fault(sealfs.ErrTimeout, "no manager at %s has answered within %v: are they running?", strings.Join(m.spec.Managers, ","), mapPatience))
	defer done()
	if err := m.findCluster(mctx); err != nil {
		return err
	}
	cm, err := m.remote.WaitMap(mctx)
	if err != nil {
		return err
	}
	if m.old != 0 {
		// What the killed daemon held must not be in the way of its successor. Requests of it
		// may still be under way.
		fctx, cancel := context.WithTimeout(mctx, fencePatience)
		err := m.remote.FenceSession(fctx, m.old)
		late := fctx.Err() != nil && mctx.Err() == nil // a server has just died; the session ends by itself
		cancel()
		if err != nil && !late && !errors.Is(err, sealfs.ErrNotExist) && !errors.Is(err, sealfs.ErrSession) {
			return err
		}
		m.old = 0
	}
	v, err := m.volume(mctx, cm)
	if err != nil {
		return err
	}
	s, err := m.openSession(mctx)
	if err != nil {
		return err
	}
	if err := m.d.remember(); err != nil { // before anything can be held under it
		return err
	}
	log := m.d.log.With("mount", m.spec.Mount)
	ro := router.Options{Cluster: cm.Cluster, Map: m.remote.Map, Refresh: m.remote.Refresh, Conns: mo.conns, Program: "sealfs mount", Logger: log}
	var kc *client.Client // which is there before its first request
	ro.Register = func(ctx context.Context, _ string, stores []sealfs.UUID, h op.Handler) error {
		for _, id := range stores {
			if err := kc.Register(ctx, h, shardsOf(m.remote.Map(), id)); err != nil {
				return err
			}
		}
		return nil
	}
	r := router.New(ro)
	co := client.Options{
		Volume: v.ID, Root: v.Root, Shards: cm.Shards, Session: s.ID, Logger: log, Retry: mo.timeout, Chunked: true,
		Epoch: func(s sealfs.Shard) sealfs.Epoch { return epoch(m.remote.Map(), s) },
		Each:  eachOf(r), Quota: quotaOf(m.remote.Map, v.ID),
	}
	kc = client.New(r, co)
	m.mu.Lock()
	until := m.until
	m.mu.Unlock()
	kc.Renewed(until)
	mt, err := mountClient(ctx, kc, v, mo.client(m.spec.Mount, v.Name, log, &m.d.processors))
	m.mu.Lock()
	defer m.mu.Unlock()
	m.router = r
	if err != nil {
		return err
	}
	m.mount, m.state, m.reason = mt, MountActive, ""
	close(m.up)
	m.kept.Go(func() { m.keep(m.ctx) })
	log.Info("mounted", "volume", v.Name, "session", uint64(s.ID))
	return nil
}

// findCluster opens the way to the managers. A new mount takes whatever cluster is
// there; from then on, and when it is mounted again by a later daemon, it has to be
// that one: sessions and volumes of another have the same numbers and names.
func (m *clusterMount) findCluster(ctx context.Context) error {
	if m.remote != nil {
		return nil
	}
	m.mu.Lock()
	id := m.cluster
	m.mu.Unlock()
	if id.IsZero() {
		first := cluster.NewRemote(m.spec.Managers, cluster.RemoteOptions{})
		defer first.Close()
		cm, err := first.WaitMap(ctx)
		if err != nil {
			return err
		}
		id = cm.Cluster
		m.mu.Lock()
		m.cluster = id
		m.old = 0 // nobody knows whose it was
		m.mu.Unlock()
	}
	m.remote = m.d.openRemote(m.spec.Managers, id)
	return nil
}

// volume returns the volume from the map, which may have come to be only now.
func (m *clusterMount) volume(ctx context.Context, cm *cluster.Map) (cluster.VolumeInfo, error) {
	for {
		changed := m.remote.Changed()
		if now := m.remote.Map(); now != nil {
			cm = now
		}
		v, ok := cm.Volume(m.spec.Volume)
		switch {
		case ok && v.State == cluster.VolumeReady:
			return v, nil
		case ok && v.State == cluster.VolumeDeleting:
			return v, fault(sealfs.ErrUnavailable, "volume %q cannot be mounted: its state is %s", m.spec.Volume, v.State)
		case !ok:
			var names []string
			for _, v := range cm.Volumes {
				names = append(names, v.Name)
			}
			return v, fault(sealfs.ErrNotExist, "there is no volume %q (there are: %q): make it with `sealfs create-volume`", m.spec.Volume, names)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return v, fault(sealfs.ErrUnavailable, "volume %q cannot be mounted: its state is %s: are the servers running?", m.spec.Volume, v.State)
		}
	}
}

func (m *clusterMount) openSession(ctx context.Context) (cluster.Session, error) {
	host, _ := os.Hostname()
	sent := time.Now()
	s, err := m.remote.OpenSession(ctx, cluster.SessionInfo{Volume: m.spec.Volume, Host: host, Mount: m.spec.Mount, PID: os.Getpid()})
	if err != nil {
		return s, err
	}
	m.mu.Lock()
	m.session, m.until = s, certain(sent, s)
	m.mu.Unlock()
	return s, nil
}

// keep renews the session, replaces it when it has ended, and notices when
// somebody unmounts.
//
// That managers do not answer is no reason to give the session up: it cannot
// end while nobody leads, and if it ended while only this machine was cut
// off, the servers know that and say so.
func (m *clusterMount) keep(ctx context.Context) {
	log := m.d.log.With("mount", m.spec.Mount)
	m.mu.Lock()
	s, mt := m.session, m.mount
	m.mu.Unlock()
	interval := max(s.TTL/4, time.Second/10)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	reason := ""
	expired := mt.client.Expired()
	for {
		var err error
		select {
		case <-ctx.Done():
			return
		case <-mt.over:
			if !mt.ending.Load() {
				log.Info("unmounted from outside")
				go m.gone()
			}
			return
		case <-expired:
			err = m.again(ctx, interval)
			expired = nil // if that failed, the next tick tries again
		case <-tick.C:
			select {
			case <-mt.client.Expired():
				err = m.again(ctx, interval)
			default:
				err = m.renew(ctx, interval)
			}
		}
		if errors.Is(err, sealfs.ErrSession) || errors.Is(err, sealfs.ErrNotExist) {
			mt.client.Fence(err)
			err = m.again(ctx, interval)
		}
		if err == nil {
			expired = mt.client.Expired()
		}
		now := ""
		if err != nil {
			now = err.Error()
		}
		m.mu.Lock()
		m.reason = now
		m.mu.Unlock()
		if now != "" && reason == "" {
			log.Warn("no manager keeps the session; files stay usable as long as servers know it", "err", err)
		}
		reason = now
	}
}

// renew tells the managers that the session is still needed.
func (m *clusterMount) renew(ctx context.Context, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	m.mu.Lock()
	s := m.session
	m.mu.Unlock()
	sent := time.Now()
	err := m.remote.RenewSession(ctx, s.ID)
	if err == nil {
		m.mount.client.Renewed(certain(sent, s))
	}
	return err
}

// certain answers until when a session is certain to live that was renewed by a request sent
// at that time: managers count from when it arrives, and clocks run at different speeds.
func certain(sent time.Time, s cluster.Session) time.Time { return sent.Add(s.TTL * 9 / 10) }

// again begins a new session when the old one has ended: files that were open
// have lost what they held there.
func (m *clusterMount) again(ctx context.Context, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	lost := m.record().Session
	s, err := m.openSession(ctx)
	if err != nil {
		return err
	}
	if err := m.mount.client.Resume(s.ID); err != nil {
		return err
	}
	m.believe()
	m.d.log.Warn("the session had ended: files that were open fail with EIO, new ones work", "mount", m.spec.Mount, "lost", uint64(lost), "session", uint64(s.ID))
	return m.d.remember()
}

// believe tells the client for how long its new session lives at least.
func (m *clusterMount) believe() {
	m.mu.Lock()
	until := m.until
	m.mu.Unlock()
	m.mount.client.Renewed(until)
}

// gone cleans up after somebody else has unmounted.
func (m *clusterMount) gone() {
	ctx, cancel := context.WithTimeout(context.Background(), adminGrace)
	defer cancel()
	err := m.end(ctx)
	m.d.forget(m)
	if err = errors.Join(err, m.d.remember()); err != nil {
		m.d.log.Warn("clean-up of a mount", "mount", m.spec.Mount, "err", err)
	}
}

// end unmounts and ends the session. It may be called repeatedly.
func (m *clusterMount) end(ctx context.Context) error {
	m.ending.Do(func() {
		m.stop()
		m.kept.Wait()
		m.work.Lock()
		defer m.work.Unlock()
		m.mu.Lock()
		mt, r, s := m.mount, m.router, m.session
		m.state, m.reason = MountWaiting, "it is being unmounted"
		m.mu.Unlock()
		var errs []error
		if mt != nil {
			errs = append(errs, mt.close())
		}
		if s.ID != 0 {
			// If this fails, the session ends when its time is over.
			if err := m.remote.EndSession(ctx, s.ID); err != nil && !errors.Is(err, sealfs.ErrSession) && !errors.Is(err, sealfs.ErrNotExist) {
				m.d.log.Warn("the session was not ended; its locks are held until its time is over", "mount", m.spec.Mount, "session", uint64(s.ID), "err", err)
			}
			m.mu.Lock()
			m.session = cluster.Session{}
			m.mu.Unlock()
		}
		if r != nil {
			r.Close()
		}
		if m.remote != nil {
			m.d.closeRemote(m.remote)
		}
		m.ended = errors.Join(errs...)
	})
	return m.ended
}

// persist tries to mount until that succeeds, or the daemon ends. tried is
// closed after the first attempt.
func (m *clusterMount) persist(tried chan struct{}) {
	delay := time.Second / 4
	for {
		err := m.begin(m.ctx)
		if tried != nil {
			close(tried)
			tried = nil
		}
		if err == nil || m.ctx.Err() != nil {
			return
		}
		m.retreat()
		m.mu.Lock()
		news := m.reason != err.Error()
		m.reason = err.Error()
		m.mu.Unlock()
		if news {
			m.d.log.Warn("cannot mount yet", "mount", m.spec.Mount, "err", err)
		}
		wait := time.NewTimer(delay)
		select {
		case <-wait.C:
		case <-m.ctx.Done():
			wait.Stop()
			return
		}
		delay = min(2*delay, 10*time.Second)
	}
}

// retreat gives back what a failed attempt has taken, so that there can be
// another. The session is ended by that.
func (m *clusterMount) retreat() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.router != nil {
		m.router.Close()
		m.router = nil
	}
	if m.session.ID != 0 {
		m.old, m.session = m.session.ID, cluster.Session{}
	}
}
