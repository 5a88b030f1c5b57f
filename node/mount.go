package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/client"
	"sealfs/cluster"
	"sealfs/op"
	"sealfs/router"
	"sealfs/wire"
)

// mountOptions is what stands after -o.
type mountOptions struct {
	readOnly, suid, dev, debug bool
	noAtime, noDirAtime        bool
	allowOther                 *bool // nil: as root, or where fuse.conf permits it
	// Of mounts from a cluster only.
	timeout time.Duration // how long a call waits for a server that is away, 0 for ever
	conns   int           // connections to each server
}

// What holds for mounts from a cluster where nothing else is said.
const (
	// A program that is told EIO in the middle of its work may leave half of it; one
	// that waits goes on, and can be interrupted.
	defaultMountTimeout = 0 * time.Second
	// With two, most callers find one that nobody else waits on.
	defaultConns = 2
	connsMax     = 64
)

// parseMountOptions reads options as mount(8) passes them on. Those that are
// meant for others are ignored, those that nobody knows are refused.
func parseMountOptions(s string) (o mountOptions, err error) {
	yes, no := true, false
	o.timeout, o.conns = defaultMountTimeout, defaultConns
	for opt := range strings.SplitSeq(s, ",") {
		switch opt {
		case "ro":
			o.readOnly = true
		case "rw":
			o.readOnly = false
		case "suid", "nosuid":
			o.suid = opt == "suid"
		case "dev", "nodev":
			o.dev = opt == "dev"
		case "debug":
			o.debug = true
		case "noatime", "relatime":
			o.noAtime = opt == "noatime"
		case "nodiratime", "diratime":
			o.noDirAtime = opt == "nodiratime"
		case "allow_other":
			o.allowOther = &yes
		case "noallow_other":
			o.allowOther = &no
		case "", "default_permissions", "defaults", "exec", "async", "lazytime", "silent",
			"_netdev", "nofail", "auto", "noauto", "user", "users", "nouser", "owner", "group":
			// What holds anyway, or is meant for others than us.
		default:
			if strings.HasPrefix(opt, "x-") || strings.HasPrefix(opt, "comment=") || strings.HasPrefix(opt, "user=") {
				continue
			}
			if err := o.number(opt); err != nil {
				return o, err
			}
		}
	}
	return o, nil
}

// number reads an option that has a number.
func (o *mountOptions) number(opt string) error {
	key, value, _ := strings.Cut(opt, "=")
	n, err := strconv.ParseUint(value, 10, 31)
	switch {
	case key == "timeout" && (err != nil || n > 86400):
		return fault(sealfs.ErrInvalid, "mount option %q: seconds from 1 to 86400 are needed, or 0 to wait for ever", opt)
	case key == "timeout":
		o.timeout = time.Duration(n) * time.Second
	case key == "conns" && (err != nil || n < 1 || n > connsMax):
		return fault(sealfs.ErrInvalid, "mount option %q: from 1 to %d connections are possible", opt, connsMax)
	case key == "conns":
		o.conns = int(n)
	default:
		return fault(sealfs.ErrInvalid, "mount option %q is not known: there are ro, rw, suid, dev, noatime, nodiratime, allow_other, noallow_other, debug, and from a cluster timeout=SECONDS and conns=N", opt)
	}
	return nil
}

// client returns the options in the client's words.
func (o mountOptions) client(point, volume string, log *slog.Logger, p *client.Processors) client.MountOptions {
	return client.MountOptions{
		Dir: point, Name: volume, ReadOnly: o.readOnly, Suid: o.suid, Dev: o.dev, Debug: o.debug, Logger: log, Processors: p,
		NoAtime: o.noAtime, NoDirAtime: o.noDirAtime,
		AllowOther: o.allowOther == nil && othersAllowed() || o.allowOther != nil && *o.allowOther,
	}
}

// othersAllowed reports whether this user may let others use a mount.
func othersAllowed() bool {
	if os.Geteuid() == 0 {
		return true
	}
	text, err := os.ReadFile("/etc/fuse.conf")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		if strings.TrimSpace(line) == "user_allow_other" {
			return true
		}
	}
	return false
}

// mount is a mounted volume.
type mount struct {
	point  string
	volume cluster.VolumeInfo
	client *client.Client
	at     *client.MountPoint
	over   chan struct{} // closed when the kernel has let go of it
	ending atomic.Bool   // by ourselves
}

// newMount mounts a volume with a client of h.
func newMount(ctx context.Context, h op.Handler, v cluster.VolumeInfo, co client.Options, mo client.MountOptions) (*mount, error) {
	if err := canMount(); err != nil {
		return nil, err
	}
	co.Volume, co.Root = v.ID, v.Root
	return mountClient(ctx, client.New(h, co), v, mo)
}

// mountClient mounts what a client sees. The client is closed with the mount, or
// after an error.
func mountClient(ctx context.Context, c *client.Client, v cluster.VolumeInfo, mo client.MountOptions) (*mount, error) {
	m := &mount{point: mo.Dir, volume: v, client: c, over: make(chan struct{})}
	var err error
	if m.at, err = client.Mount(ctx, m.client, mo); err != nil {
		if m.at != nil {
			err = errors.Join(err, m.at.Unmount())
		}
		return nil, errors.Join(err, m.client.Close())
	}
	go func() {
		m.at.Wait()
		close(m.over)
	}()
	return m, nil
}

// canMount says why nothing can be mounted on this machine, if so.
func canMount() error {
	_, err := os.Stat("/dev/fuse")
	if err == nil && os.Geteuid() != 0 {
		if _, err := exec.LookPath("fusermount3"); err != nil {
			return fault(sealfs.ErrNotSupported, "an ordinary user needs fusermount3 to mount: install the package fuse3, or run as root; without --mount everything else works")
		}
		return nil
	}
	var f *os.File
	if err == nil {
		f, err = os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	}
	if err != nil {
		return fault(sealfs.ErrNotSupported, "/dev/fuse cannot be used (%v): load the kernel's module with `modprobe fuse`, or give the container the device; without --mount everything else works", err)
	}
	return f.Close()
}

// ended reports whether the mount is gone.
func (m *mount) ended() bool {
	select {
	case <-m.over:
		return true
	default:
		return false
	}
}

// close unmounts; what is still used is detached.
func (m *mount) close() error {
	m.ending.Store(true)
	if e, mounted, err := mountAt(m.point); m.ended() || err == nil && !(mounted && e.ours()) {
		return m.client.Close() // somebody else was first
	}
	return errors.Join(m.at.Unmount(), m.client.Close())
}

// mountDefault mounts the default volume in this process, without any transport.
func (n *Node) mountDefault(ctx context.Context, point string, s Settings) error {
	o, err := parseMountOptions(s.MountOptions)
	if err != nil {
		return err
	}
	n.volumes.Lock()
	defer n.volumes.Unlock()
	v, err := n.mountable(DefaultVolume)
	if err != nil {
		return err
	}
	log := n.log.With("part", "mount")
	co := client.Options{
		// Its session holds leases beside those of further mounts.
		Session: newSession(), Local: true,
		Shards: n.cfg.Shards, Epoch: func(s sealfs.Shard) sealfs.Epoch { return epoch(n.manager.Map(), s) }, Durable: s.Durable, Logger: log,
		Each: eachOf(n.router), Chunked: len(n.cfg.Stores) > 1, Quota: quotaOf(n.manager.Map, v.ID),
	}
	n.mount, err = newMount(ctx, n.server, v, co, o.client(point, v.Name, log, &n.processors))
	if err != nil {
		return err
	}
	session := n.mount.client.Session()
	n.onClose(func() error { return errors.Join(n.mount.close(), n.server.EndSession(session)) })
	n.work.Go(func() {
		select {
		case <-n.ctx.Done():
		case <-n.mount.over:
			if !n.mount.ending.Load() {
				n.log.Warn("unmounted from outside; volumes are still served", "mount", point)
			}
		}
	})
	return nil
}

// eachOf returns how a client reaches every store by a router.
func eachOf(r *router.Router) func(context.Context, func(sealfs.Shard) error) error {
	return func(ctx context.Context, fn func(sealfs.Shard) error) error {
		return r.Each(ctx, func(_ cluster.StoreInfo, s sealfs.Shard) error { return fn(s) })
	}
}

// eachIn returns how a client reaches every store of a map that does not change.
func eachIn(m *cluster.Map) func(context.Context, func(sealfs.Shard) error) error {
	var first []sealfs.Shard
	seen := make(map[uint16]bool)
	for s, row := range m.Table {
		if len(row.Replicas) > 0 && !seen[row.Replicas[0]] {
			seen[row.Replicas[0]] = true
			first = append(first, sealfs.Shard(s))
		}
	}
	return func(_ context.Context, fn func(sealfs.Shard) error) error {
		var errs []error
		for _, s := range first {
			errs = append(errs, fn(s))
		}
		return errors.Join(errs...)
	}
}

// shardsOf returns which shards have a store as their primary.
func shardsOf(m *cluster.Map, store sealfs.UUID) func(sealfs.Shard) bool {
	i := m.StoreIndex(store)
	return func(s sealfs.Shard) bool {
		return int(s) < len(m.Table) && len(m.Table[s].Replicas) > 0 && int(m.Table[s].Replicas[0]) == i
	}
}

// quotaOf returns what a volume may take as the newest map has it.
func quotaOf(newest func() *cluster.Map, id sealfs.Volume) func() (bytes, inodes uint64) {
	return func() (bytes, inodes uint64) {
		if m := newest(); m != nil {
			if v, ok := m.VolumeByID(id); ok {
				return v.Bytes, v.Inodes
			}
		}
		return 0, 0
	}
}

// quotaAge is for how long a further mount believes what it was told of its volume's quota.
const quotaAge = time.Second

// asked returns what a volume may take as the main process says, asked for at most once in quotaAge.
func asked(a *Admin, v cluster.VolumeInfo) func() (bytes, inodes uint64) {
	var mu sync.Mutex
	at := time.Now()
	return func() (bytes, inodes uint64) {
		mu.Lock()
		defer mu.Unlock()
		if time.Since(at) < quotaAge {
			return v.Bytes, v.Inodes
		}
		ctx, stop := context.WithTimeout(context.Background(), quotaAge)
		defer stop()
		// One that does not answer is about to end, and the mount with it.
		list, err := a.Volumes(ctx)
		if i := slices.IndexFunc(list, func(x VolumeStatus) bool { return x.ID == v.ID }); err == nil && i >= 0 {
			v.Bytes, v.Inodes = uint64(list[i].Size), list[i].Inodes
		}
		at = time.Now()
		return v.Bytes, v.Inodes
	}
}

func epoch(m *cluster.Map, s sealfs.Shard) sealfs.Epoch {
	if m != nil && int(s) < len(m.Table) {
		return m.Table[s].Epoch
	}
	return 0
}

// MountOptions says what Mount shall do.
type MountOptions struct {
	Dir      Dir
	Volume   string
	Mount    string // mount point
	Options  string // as after -o
	Detached bool   // see Options
}

// Mounted is a further mount: a process of its own that speaks with the main one
// over sockets, and ends with it.
type Mounted struct {
	started Started
	log     *slog.Logger
	mount   *mount
	lost    chan error // why it cannot go on
	undo    []func() error

	processors client.Processors
}

// Mount mounts a volume of a data directory on which a main process runs. When it
// returns, the mount can be used.
func Mount(ctx context.Context, o MountOptions) (m *Mounted, err error) {
	m = &Mounted{lost: make(chan error, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
			m = nil
		}
	}()
	mo, err := parseMountOptions(o.Options)
	if err != nil {
		return m, err
	}
	cfg, err := o.Dir.Config()
	if err != nil {
		return m, err
	}
	settings, _, err := cfg.Effective(nil, os.Getenv)
	if err != nil {
		return m, err
	}
	// Whether there is a main process and such a volume is asked before anything
	// is made or looked at.
	admin := o.Dir.Admin()
	m.onClose(func() error { admin.Close(); return nil })
	if o.Mount, err = mountPath(o.Mount); err != nil {
		return m, err
	}
	sctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	m.onClose(func() error { stop(); return nil })
	s, goodbye, alive, err := admin.session(sctx, sessionRequest{Volume: o.Volume, Mount: o.Mount, PID: os.Getpid()})
	if err != nil {
		return m, err
	}
	m.onClose(alive.Close)
	if err := clearMount(o.Mount); err != nil {
		return m, err
	}
	if err := checkMountPoint(o.Mount); err != nil {
		return m, err
	}
	// One log per mount point, with a name that survives a restart.
	path := filepath.Join(filepath.Dir(o.Dir.LogPath()), "mount"+clip(strings.ReplaceAll(o.Mount, "/", "-"), 200)+".log")
	lf, err := openLog(path, int64(settings.LogSize), settings.LogKeep, o.Detached)
	if err != nil {
		return m, err
	}
	m.onClose(lf.Close)
	m.log = slog.New(slog.NewTextHandler(lf, &slog.HandlerOptions{Level: settings.LogLevel})).With("mount", o.Mount)
	r, err := o.Dir.register(Process{Role: RoleMount, Mount: o.Mount, Volume: o.Volume})
	if err != nil {
		return m, err
	}
	m.onClose(r.end)
	if err := m.connect(ctx, o, s, admin, settings, mo); err != nil {
		return m, err
	}
	m.started = Started{PID: os.Getpid(), Data: o.Dir.path, Volume: o.Volume, Mount: o.Mount, Log: path}
	go func() {
		goodbye() // until the session is closed, requests are still answered
		m.end(fault(sealfs.ErrUnavailable, "the main process of %s ends, or has given mount %s up: the mount ends", o.Dir, o.Mount))
	}()
	m.log.Info("mounted", "volume", o.Volume, "session", uint64(s.ID))
	return m, nil
}

// clip shortens s to its last n bytes.
func clip(s string, n int) string { return s[max(len(s)-n, 0):] }

// connect mounts the volume over the data socket.
func (m *Mounted) connect(ctx context.Context, o MountOptions, s Session, admin *Admin, settings Settings, mo mountOptions) error {
	cm, err := admin.Map(ctx)
	if err != nil {
		return err
	}
	// With one server epochs change only when it starts anew; this session ends with it.
	v, ok := cm.VolumeByID(s.Volume)
	if !ok {
		return fault(sealfs.ErrNotExist, "volume %q is gone", o.Volume)
	}
	conn, err := wire.Dial(ctx, "unix", o.Dir.dataSocket(), wire.Options{Cluster: s.Cluster})
	if err != nil {
		return err
	}
	m.onClose(conn.Close)
	watch, err := wire.Dial(ctx, "unix", o.Dir.dataSocket(), wire.Options{Cluster: s.Cluster})
	if err != nil {
		return err
	}
	m.onClose(watch.Close)
	co := client.Options{
		Shards: s.Shards, Session: s.ID, Durable: settings.Durable, Logger: m.log, Retry: time.Second,
		Epoch: func(s sealfs.Shard) sealfs.Epoch { return epoch(cm, s) }, Each: eachIn(cm),
		Chunked: len(cm.Stores) > 1, Quota: asked(admin, v),
	}
	if m.mount, err = newMount(ctx, watchApart{conn, watch}, v, co, mo.client(o.Mount, o.Volume, m.log, &m.processors)); err != nil {
		return err
	}
	m.onClose(m.mount.close)
	go func() {
		select {
		case <-m.mount.over:
		case <-m.mount.client.Expired():
			m.end(fault(sealfs.ErrSession, "the main process of %s has given mount %s up, which did not answer: the mount ends", o.Dir, o.Mount))
		}
	}()
	go func() {
		<-conn.Done()
		m.end(fmt.Errorf("mount %s: connection to the main process: %w", o.Mount, conn.Err()))
	}()
	return nil
}

// watchApart sends Watch, which waits at the server all the time, over a connection of its
// own: a lone caller on the other one then reads its answer itself.
type watchApart struct{ conn, watch *wire.Conn }

// Do answers as op.Handler says.
func (w watchApart) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	if req.Type == op.Watch {
		return w.watch.Do(ctx, req, rep)
	}
	return w.conn.Do(ctx, req, rep)
}

func (m *Mounted) onClose(f func() error) { m.undo = append(m.undo, f) }

func (m *Mounted) end(err error) {
	select {
	case m.lost <- err:
	default:
	}
}

// Started describes the mount.
func (m *Mounted) Started() Started { return m.started }

// Wait returns when ctx is done, when the mount was unmounted (nil), or with an
// error when the main process is gone.
func (m *Mounted) Wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		m.log.Info("told to end", "cause", context.Cause(ctx))
		return nil
	case <-m.mount.over:
		m.log.Info("unmounted")
		return nil
	case err := <-m.lost:
		m.log.Error("cannot go on", "err", err)
		return err
	}
}

// Close unmounts and ends the session.
func (m *Mounted) Close() error {
	var errs []error
	for i := len(m.undo) - 1; i >= 0; i-- {
		errs = append(errs, m.undo[i]())
	}
	m.undo = nil
	return errors.Join(errs...)
}

// Unmount unmounts SealFS from a mount point; with lazy set also while it is in
// use. Whichever process serves it notices by itself.
func Unmount(point string, lazy bool) error {
	path, err := mountPath(point)
	if err != nil {
		return err
	}
	m, mounted, err := mountAt(path)
	switch {
	case err != nil:
		return err
	case !mounted:
		return fault(sealfs.ErrInvalid, "nothing is mounted at %s", path)
	case !m.ours():
		return fault(sealfs.ErrInvalid, "what is mounted at %s is %s, not SealFS: use umount", path, m.fstype)
	}
	if stale(path) {
		lazy = true
	}
	err = unmountPath(path, lazy)
	if errors.Is(err, unix.EBUSY) {
		return fault(sealfs.ErrBusy, "%s is in use: close what has files open there, or add --lazy", path)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}
