package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.yaml.in/yaml/v4"
	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/cluster"
	"sealfs/router"
)

// What the mount daemon adds to the admin socket (see api.go):
//
//	GET    /v1/mounts                    [MountStatus]
//	POST   /v1/mounts                    MountSpec → MountStatus, when it is mounted
//	DELETE /v1/mounts?mount=DIR&lazy=B

// DefaultDaemonDir returns where the mount daemon of this user keeps its socket
// and its list of mounts: a place that does not outlive the machine's run.
func DefaultDaemonDir(getenv func(string) string) string {
	if dir := getenv("SEALFS_DAEMON"); dir != "" {
		return dir
	}
	if os.Geteuid() == 0 {
		return "/run/sealfs"
	}
	if dir := getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "sealfs")
	}
	return filepath.Join(os.TempDir(), "sealfs-"+strconv.Itoa(os.Getuid()))
}

// private refuses a directory that another user has made or may write, as somebody
// might in a directory for temporary files: it would decide what is mounted.
func (d Dir) private() error {
	var st unix.Stat_t
	err := unix.Lstat(d.path, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case err != nil:
		return fmt.Errorf("directory of the daemon: %w", &fs.PathError{Op: "stat", Path: d.path, Err: err})
	case st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0:
		return fault(sealfs.ErrAccess, "%s is not a directory that only you can write: remove it, or name another one for the daemon", d)
	}
	return nil
}

// MountSpec is what a mount of a cluster's volume is made from.
type MountSpec struct {
	Mount    string   `yaml:"mount" json:"mount"` // mount point, absolute
	Volume   string   `yaml:"volume" json:"volume"`
	Managers []string `yaml:"managers" json:"managers"`
	Options  string   `yaml:"options,omitempty" json:"options,omitempty"` // as after -o
}

func (s MountSpec) equal(o MountSpec) bool {
	return s.Mount == o.Mount && s.Volume == o.Volume && s.Options == o.Options && slices.Equal(s.Managers, o.Managers)
}

// The states of a mount.
const (
	MountActive  = "mounted"
	MountWaiting = "waiting" // cannot be mounted yet: see Reason
)

// MountStatus is what the daemon says of a mount.
type MountStatus struct {
	MountSpec
	State   string         `json:"state"`
	Reason  string         `json:"reason,omitempty"`
	Session sealfs.Session `json:"session"`
	Cluster sealfs.UUID    `json:"cluster"`
	PID     int            `json:"pid"` // of the daemon
	Servers []ServerReach  `json:"servers"`
}

// ServerReach says whether a mount reaches a server.
type ServerReach struct {
	Addr  string `json:"addr"`
	State string `json:"state"` // connected, idle, or why it cannot be reached
	OK    bool   `json:"ok"`
}

// remembered is the content of DIR/mounts.yaml: what a daemon that comes after
// this one mounts again.
type remembered struct {
	Version int           `yaml:"version"`
	Mounts  []mountRecord `yaml:"mounts"`
}

// mountRecord is a mount that is remembered, with the session to be ended if
// this daemon was killed, and the cluster that both are of.
type mountRecord struct {
	MountSpec `yaml:",inline"`
	Cluster   sealfs.UUID    `yaml:"cluster,omitempty"`
	Session   sealfs.Session `yaml:"session,omitempty"`
}

const mountsHead = "# The mounts of the SealFS daemon of this directory. It writes this file, and reads\n# it when it starts.\n"

// Daemon serves all mounts of a machine.
type Daemon struct {
	life
	settings Settings

	mu     sync.Mutex
	mounts map[string]*clusterMount // by mount point
	// detached are those that have left their mount point, and are served until the
	// last file on them is closed.
	detached map[*clusterMount]bool
	remote   map[remoteKey]*sharedRemote

	writing sync.Mutex // of mounts.yaml; taken before mu
}

// DaemonOptions says what StartDaemon shall do.
type DaemonOptions struct {
	Dir      Dir
	Values   *Values
	Detached bool // see Options
}

// StartDaemon begins to serve mounts. What a daemon before it had mounted is
// cleared, and mounted again: those that can be at once before it returns, the
// others as soon as their managers answer.
func StartDaemon(ctx context.Context, o DaemonOptions) (d *Daemon, err error) {
	d = &Daemon{mounts: make(map[string]*clusterMount), detached: make(map[*clusterMount]bool), remote: make(map[remoteKey]*sharedRemote)}
	d.begin(ctx, o.Dir.as(RoleDaemon))
	defer func() {
		if err != nil {
			err = d.abort(err)
			d = nil
		}
	}()
	if d.settings, err = o.Values.settings(); err != nil {
		return d, err
	}
	if err := canMount(); err != nil {
		return d, err
	}
	if err := d.dir.make(); err != nil {
		return d, err
	}
	if err := d.dir.private(); err != nil {
		return d, err
	}
	if err := d.lock(); err != nil {
		return d, err
	}
	if err := d.openLog(d.settings, o.Detached); err != nil {
		return d, err
	}
	if err := d.dir.forgetRole(RoleDaemon); err != nil {
		return d, err
	}
	if err := d.register(Process{Role: RoleDaemon}); err != nil {
		return d, err
	}
	records, err := d.dir.rememberedMounts()
	if err != nil {
		return d, err
	}
	d.onClose(d.closeMounts)
	d.remount(ctx, records)
	d.meters.peers(d.peers)
	d.meters.mounts(d.mounted)
	d.meters.gauge("sealfs_mounts", "Mounts of the daemon.", func() float64 { return float64(len(d.list())) })
	if err := d.serveAdmin(d.api()); err != nil {
		return d, err
	}
	d.log.Info("ready", "pid", os.Getpid(), "dir", d.dir.path)
	return d, nil
}

// Started describes the daemon for people and scripts.
func (d *Daemon) Started() Started {
	return Started{PID: os.Getpid(), Role: RoleDaemon, Data: d.dir.path, Log: d.dir.LogPath()}
}

// rememberedMounts reads DIR/mounts.yaml.
func (d Dir) rememberedMounts() ([]mountRecord, error) {
	path := d.join("mounts.yaml")
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list of mounts: %w", err)
	}
	var r remembered
	if err := yaml.Load(text, &r, yaml.WithKnownFields()); err != nil {
		return nil, configFault(path, err)
	}
	if r.Version != configVersion {
		return nil, fault(sealfs.ErrVersion, "%s: version %d is not known: this program reads version %d", path, r.Version, configVersion)
	}
	return r.Mounts, nil
}

// remember writes DIR/mounts.yaml.
func (d *Daemon) remember() error {
	d.writing.Lock()
	defer d.writing.Unlock()
	r := remembered{Version: configVersion, Mounts: []mountRecord{}}
	d.mu.Lock()
	for _, m := range d.mounts {
		r.Mounts = append(r.Mounts, m.record())
	}
	d.mu.Unlock()
	slices.SortFunc(r.Mounts, func(a, b mountRecord) int { return strings.Compare(a.Mount, b.Mount) })
	text, err := yaml.Dump(r)
	if err == nil {
		err = replaceFile(d.dir.join("mounts.yaml"), append([]byte(mountsHead), text...), 0o600)
	}
	if err != nil {
		return fmt.Errorf("list of mounts: %w", err)
	}
	return nil
}

// remountPatience is how long a start waits for what was mounted before.
const remountPatience = 10 * time.Second

// remount mounts again what an earlier daemon had mounted.
func (d *Daemon) remount(ctx context.Context, records []mountRecord) {
	ctx, cancel := context.WithTimeout(ctx, remountPatience)
	defer cancel()
	var first []chan struct{}
	for _, r := range records {
		m := newClusterMount(d, r.MountSpec)
		m.old, m.cluster = r.Session, r.Cluster
		d.mounts[r.Mount] = m
		tried := make(chan struct{})
		first = append(first, tried)
		m.kept.Go(func() { m.persist(tried) })
	}
	for _, tried := range first {
		select {
		case <-tried:
		case <-ctx.Done():
		}
	}
}

// mount mounts a volume, or returns the mount that is there if it is the same.
func (d *Daemon) mount(ctx context.Context, spec MountSpec) (MountStatus, error) {
	var err error
	if _, err = parseMountOptions(spec.Options); err != nil {
		return MountStatus{}, err
	}
	if spec.Mount, err = mountPath(spec.Mount); err != nil {
		return MountStatus{}, err
	}
	if spec.Managers, err = ParseAddrs("--manager", strings.Join(spec.Managers, ",")); err != nil {
		return MountStatus{}, err
	}
	m := newClusterMount(d, spec)
	d.mu.Lock()
	old := d.mounts[spec.Mount]
	if old != nil && old.left() {
		delete(d.mounts, spec.Mount)
		d.detached[old] = true
		old = nil
	}
	if old == nil {
		d.mounts[spec.Mount] = m
	}
	d.mu.Unlock()
	if old != nil {
		if !old.spec.equal(spec) {
			return MountStatus{}, fault(sealfs.ErrBusy, "mount point %s is busy: volume %s of %s is mounted there with options %q; unmount it first", spec.Mount, old.spec.Volume, strings.Join(old.spec.Managers, ","), old.spec.Options)
		}
		patience := time.NewTimer(mapPatience)
		defer patience.Stop()
		select {
		case <-old.up:
			return old.status(), nil
		case <-ctx.Done():
		case <-patience.C:
		case <-old.ctx.Done():
		}
		return MountStatus{}, fault(sealfs.ErrUnavailable, "mount %s is being mounted already, and waits: %s", spec.Mount, old.status().Reason)
	}
	if err := m.begin(ctx); err != nil {
		err = errors.Join(err, m.end(context.WithoutCancel(ctx)))
		d.forget(m)
		return MountStatus{}, err
	}
	return m.status(), nil
}

// umount ends a mount for good.
func (d *Daemon) umount(ctx context.Context, point string, lazy bool) error {
	d.mu.Lock()
	m := d.mounts[point]
	d.mu.Unlock()
	if m == nil {
		return fault(sealfs.ErrNotExist, "the daemon of %s has no mount at %s: see `sealfs list-mountpoints`", d.dir, point)
	}
	if m.status().State == MountActive && !m.left() {
		// First from the kernel: what is in use stays, as it was.
		if err := Unmount(point, lazy); err != nil {
			return err
		}
		if lazy { // keep ends it, at once if nothing is open
			d.mu.Lock()
			d.detached[m] = true
			delete(d.mounts, point)
			d.mu.Unlock()
			return d.remember()
		}
	}
	err := m.end(ctx)
	d.forget(m)
	return errors.Join(err, d.remember())
}

// forget takes a mount off the lists.
func (d *Daemon) forget(m *clusterMount) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.detached, m)
	if d.mounts[m.spec.Mount] == m {
		delete(d.mounts, m.spec.Mount)
	}
}

// closeMounts unmounts everything, and remembers it for the next daemon.
func (d *Daemon) closeMounts() error {
	d.stop()
	d.work.Wait()
	d.mu.Lock()
	list := slices.AppendSeq(slices.Collect(maps.Values(d.mounts)), maps.Keys(d.detached))
	d.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), adminGrace)
	defer cancel()
	errs := make([]error, len(list)+1)
	var wg sync.WaitGroup
	for i, m := range list {
		wg.Go(func() { errs[i] = m.end(ctx) })
	}
	wg.Wait()
	if len(list) > 0 {
		errs[len(list)] = d.remember()
	}
	return errors.Join(errs...)
}

func (d *Daemon) list() []MountStatus {
	d.mu.Lock()
	list := slices.Collect(maps.Values(d.mounts))
	d.mu.Unlock()
	all := []MountStatus{}
	for _, m := range list {
		all = append(all, m.status())
	}
	slices.SortFunc(all, func(a, b MountStatus) int { return strings.Compare(a.Mount, b.Mount) })
	return all
}

// mounted returns the mounts that the kernel knows.
func (d *Daemon) mounted() (list []*mount) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mounts {
		m.mu.Lock()
		if m.mount != nil {
			list = append(list, m.mount)
		}
		m.mu.Unlock()
	}
	return list
}

// peers returns what all mounts together know of the servers.
func (d *Daemon) peers() []router.ServerStats {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := make(map[string]router.ServerStats)
	for _, m := range d.mounts {
		for _, s := range m.servers() {
			if t, ok := all[s.Addr]; ok {
				s.Requests, s.Failures, s.Links = s.Requests+t.Requests, s.Failures+t.Failures, s.Links+t.Links
				s.Wire.Add(t.Wire)
				if t.State != router.Up {
					s.State = t.State // the worst counts
				}
			}
			all[s.Addr] = s
		}
	}
	return slices.Collect(maps.Values(all))
}

// DaemonStatus is what /v1/status of a daemon says.
type DaemonStatus struct {
	State  string        `json:"state"`
	Reason string        `json:"reason,omitempty"`
	PID    int           `json:"pid"`
	Mounts []MountStatus `json:"mounts"`
}

func (d *Daemon) status() DaemonStatus {
	s := DaemonStatus{State: StateRunning, PID: os.Getpid(), Mounts: d.list()}
	for _, m := range s.Mounts {
		if m.State != MountActive {
			s.State, s.Reason = StateDegraded, fmt.Sprintf("mount %s is %s: %s", m.Mount, m.State, m.Reason)
		}
	}
	return s
}

func (d *Daemon) api() *api {
	a := d.newAPI(RoleDaemon, func() string { return d.status().Reason }, func(context.Context) (any, error) { return d.status(), nil })
	a.get("GET /v1/mounts", func(*http.Request) (any, error) { return d.list(), nil })
	a.get("POST /v1/mounts", func(r *http.Request) (any, error) {
		var spec MountSpec
		if err := readBody(r, &spec); err != nil {
			return nil, err
		}
		return d.mount(r.Context(), spec)
	})
	a.get("DELETE /v1/mounts", func(r *http.Request) (any, error) {
		lazy, _ := strconv.ParseBool(r.FormValue("lazy"))
		return struct{}{}, d.umount(r.Context(), r.FormValue("mount"), lazy)
	})
	return a
}

// remoteKey says which managers: whoever listens at an address later on may be
// another cluster's.
type remoteKey struct {
	addrs   string
	cluster sealfs.UUID
}

// sharedRemote is the way to the managers of a cluster, which all mounts from it share.
type sharedRemote struct {
	*cluster.Remote
	key   remoteKey
	users int
	stop  context.CancelFunc
	done  chan struct{}
}

// openRemote returns the way to a cluster's managers at these addresses.
func (d *Daemon) openRemote(addrs []string, id sealfs.UUID) *sharedRemote {
	key := remoteKey{strings.Join(addrs, ","), id}
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.remote[key]
	if r == nil {
		ctx, stop := context.WithCancel(context.Background())
		r = &sharedRemote{cluster.NewRemote(addrs, cluster.RemoteOptions{Cluster: id, Logger: d.log.With("part", "managers")}), key, 0, stop, make(chan struct{})}
		d.remote[key] = r
		go func() {
			defer close(r.done)
			r.Run(ctx)
		}()
	}
	r.users++
	return r
}

// closeRemote gives it back.
func (d *Daemon) closeRemote(r *sharedRemote) {
	d.mu.Lock()
	r.users--
	last := r.users == 0
	if last {
		delete(d.remote, r.key)
	}
	d.mu.Unlock()
	if last {
		r.stop()
		<-r.done
		r.Close()
	}
}
