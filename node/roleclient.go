package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/wire"
)

// DiskAdmin administers the disks of a server that runs.
type DiskAdmin struct{ caller }

// Disks returns a client of the directory's server, which need not run.
func (d Dir) Disks() *DiskAdmin { return &DiskAdmin{d.as(RoleServer).caller()} }

// List returns all disks.
func (a *DiskAdmin) List(ctx context.Context) (list []DiskStatus, err error) {
	err = a.call(ctx, http.MethodGet, "/v1/disks", nil, &list)
	return list, err
}

// Add takes a disk in, as `sealfs server --disk` describes it.
func (a *DiskAdmin) Add(ctx context.Context, text string) (k DiskStatus, err error) {
	spec, err := parseDisk(text)
	if err != nil {
		return k, err
	}
	err = a.call(ctx, http.MethodPost, "/v1/disks", spec, &k)
	return k, err
}

// Drain empties a disk, which is named by its store or device.
func (a *DiskAdmin) Drain(ctx context.Context, name string) error {
	return a.change(ctx, http.MethodPost, name, "/drain", nil)
}

// SetBad says whether new shards are kept away from a disk.
func (a *DiskAdmin) SetBad(ctx context.Context, name string, bad bool) error {
	return a.change(ctx, http.MethodPost, name, "/bad", struct{ Bad bool }{bad})
}

// Remove takes an empty disk out of the cluster for ever.
func (a *DiskAdmin) Remove(ctx context.Context, name string) error {
	return a.change(ctx, http.MethodDelete, name, "", nil)
}

func (a *DiskAdmin) change(ctx context.Context, method, name, what string, in any) error {
	return a.call(ctx, method, "/v1/disks/"+url.PathEscape(name)+what, in, nil)
}

// MountAdmin asks the mount daemon.
type MountAdmin struct{ caller }

// Mounts returns a client of the directory's mount daemon, which need not run.
func (d Dir) Mounts() *MountAdmin { return &MountAdmin{d.as(RoleDaemon).caller()} }

// List returns all mounts. If no daemon runs, the error is ErrUnavailable.
func (a *MountAdmin) List(ctx context.Context) (list []MountStatus, err error) {
	err = a.call(ctx, http.MethodGet, "/v1/mounts", nil, &list)
	return list, err
}

// Find returns the mount at a mount point; ok is false if the daemon has none
// there, or does not run.
func (a *MountAdmin) Find(ctx context.Context, point string) (m MountStatus, ok bool, err error) {
	path, err := mountPath(point)
	if err != nil {
		return m, false, err
	}
	if _, held, err := a.dir.holder(); err != nil || !held {
		return m, false, err
	}
	list, err := a.List(ctx)
	for _, m := range list {
		if m.Mount == path {
			return m, true, err
		}
	}
	return m, false, err
}

// Mount mounts a volume, and returns when it can be used. If no daemon runs, it
// calls start first, and tries again.
func (a *MountAdmin) Mount(ctx context.Context, spec MountSpec, start func() error) (m MountStatus, err error) {
	if err := a.dir.private(); err != nil {
		return m, err
	}
	if !a.Running() {
		// Another may start one at the same moment: the second then ends by itself.
		if err := start(); err != nil && !errors.Is(err, sealfs.ErrBusy) {
			return m, err
		}
	}
	patience := time.NewTimer(lockWait)
	defer patience.Stop()
	for {
		err = a.call(ctx, http.MethodPost, "/v1/mounts", spec, &m)
		if !errors.Is(err, sealfs.ErrUnavailable) || !a.starting() {
			return m, err
		}
		again := time.NewTimer(20 * time.Millisecond)
		select {
		case <-again.C:
			continue
		case <-patience.C:
		case <-ctx.Done():
		}
		again.Stop()
		return m, err
	}
}

// starting reports whether there is a daemon that does not listen yet.
func (a *MountAdmin) starting() bool {
	if !a.Running() {
		return false
	}
	nc, err := wire.DialUnix(context.Background(), a.dir.adminSocket())
	if err == nil {
		nc.Close()
	}
	return err != nil
}

// Unmount ends a mount for good; with lazy set also while it is in use.
func (a *MountAdmin) Unmount(ctx context.Context, point string, lazy bool) error {
	q := url.Values{"mount": {point}, "lazy": {strconv.FormatBool(lazy)}}
	return a.call(ctx, http.MethodDelete, "/v1/mounts?"+q.Encode(), nil, nil)
}

// Running reports whether a daemon runs.
func (a *MountAdmin) Running() bool { return a.dir.Runs(RoleDaemon) }

// Runs reports whether the process of a role runs on the directory.
func (d Dir) Runs(role string) bool {
	_, held, err := d.as(role).holder()
	return err == nil && held
}

// Probe is what is known of the life of a mount.
type Probe struct {
	Mount  string       `json:"mount"`
	Alive  bool         `json:"alive"`
	Reason string       `json:"reason,omitempty"` // why it is not
	Daemon *MountStatus `json:"daemon"`           // what the daemon says; null if it is not its mount
}

// Probe asks a mount whether it is alive, for at most timeout, and the daemon
// about it.
func (a *MountAdmin) Probe(ctx context.Context, point string, timeout time.Duration) (p Probe, err error) {
	if p.Mount, err = mountPath(point); err != nil {
		return p, err
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if m, ok, err := a.Find(ctx, point); err == nil && ok {
		p.Daemon = &m
	}
	e, mounted, err := mountAt(p.Mount)
	switch {
	case err != nil:
		return p, err
	case !mounted && p.Daemon == nil:
		return p, fault(sealfs.ErrInvalid, "nothing is mounted at %s", p.Mount)
	case !mounted:
		p.Reason = "it is not mounted yet: " + p.Daemon.Reason
		return p, nil
	case !e.ours():
		return p, fault(sealfs.ErrInvalid, "what is mounted at %s is %s, not SealFS", p.Mount, e.fstype)
	}
	// A dead server makes this call hang, and nothing can end it: it is left behind.
	answer := make(chan error, 1)
	go func() {
		var st unix.Statfs_t
		answer <- unix.Statfs(p.Mount, &st)
	}()
	select {
	case err := <-answer:
		if p.Alive = err == nil; err == unix.ENOTCONN {
			p.Reason = "the process that served it has died"
		} else if err != nil {
			p.Reason = err.Error()
		}
	case <-ctx.Done():
		p.Reason = fmt.Sprintf("it did not answer within %v", timeout)
	}
	return p, nil
}
