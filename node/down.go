package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/client"
)

// DownOptions says how Down goes about it.
type DownOptions struct {
	Timeout time.Duration // how long processes may take to end by themselves
	Force   bool          // kill those that did not
}

// Down ends all processes of the directory, mounts first, and clears stale
// mounts. It returns the processes that it ended; if there were none, that
// is a success too. Processes that do not end in time are named by the error,
// unless Force is set.
func (d Dir) Down(ctx context.Context, o DownOptions) (ended []Process, err error) {
	if _, err := os.Stat(d.path); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for _, role := range []string{RoleMount, RoleDaemon, RoleServer, RoleManager, RoleMain} {
		e, err := d.end(ctx, role, o)
		ended = append(ended, e...)
		if err != nil {
			return ended, err
		}
	}
	return ended, d.tidy()
}

// roles are those that take a lock of their own, in the order in which locks
// are taken.
var roles = []string{RoleMain, RoleManager, RoleServer, RoleDaemon}

// lockAll takes the locks of all roles; release gives them back. The directory
// must have been made.
func (d Dir) lockAll(wait time.Duration) (release func(), err error) {
	var held []lock
	release = func() {
		for _, l := range held {
			l.release()
		}
	}
	for _, role := range roles {
		l, err := d.as(role).lock(wait)
		if err != nil {
			release()
			return nil, err
		}
		held = append(held, l)
	}
	return release, nil
}

// sockets returns the paths of all sockets that processes of d may have left.
func (d Dir) sockets() []string {
	paths := []string{d.dataSocket()}
	for _, role := range roles {
		paths = append(paths, d.as(role).adminSocket())
	}
	return paths
}

// known reports whether SealFS has made the directory.
func (d Dir) known() bool {
	for _, name := range []string{"config.yaml", "server.yaml", "mounts.yaml", "manager"} {
		if _, err := os.Stat(d.join(name)); err == nil {
			return true
		}
	}
	return false
}

// target is a process that is being ended.
type target struct {
	Process
	fd int // pidfd: names this process even when its number is used again
}

// end ends the processes of one role.
func (d Dir) end(ctx context.Context, role string, o DownOptions) (ended []Process, err error) {
	live, _, err := d.processes()
	if err != nil {
		return nil, err
	}
	// A process that has not come to its entry yet has the lock already.
	if role != RoleMount {
		if pid, held, err := d.as(role).holder(); err != nil {
			return nil, err
		} else if held && pid > 0 && !slices.ContainsFunc(live, func(p Process) bool { return p.PID == pid }) {
			live = append(live, Process{PID: pid, Role: role})
		}
	}
	var targets []target
	defer func() {
		for _, t := range targets {
			unix.Close(t.fd)
		}
	}()
	for _, p := range live {
		if cmp.Or(p.Role, RoleMain) != role {
			continue // an entry that cannot be read is treated as a main process
		}
		fd, err := unix.PidfdOpen(p.PID, 0)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("process %d: %w", p.PID, err)
		}
		targets = append(targets, target{p, fd})
		// Only now is it sure that fd is of the process that has the lock.
		if !d.alive(p) {
			continue
		}
		if err := unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return nil, fmt.Errorf("end process %d: %w", p.PID, err)
		}
	}
	left, err := await(ctx, targets, o.Timeout)
	if err == nil && len(left) > 0 && o.Force {
		for _, t := range left {
			if err := unix.PidfdSendSignal(t.fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
				return nil, fmt.Errorf("kill process %d: %w", t.PID, err)
			}
		}
		left, err = await(ctx, left, o.Timeout)
	}
	for _, t := range targets {
		if !slices.ContainsFunc(left, func(l target) bool { return l.PID == t.PID }) {
			ended = append(ended, t.Process)
		}
	}
	if err != nil || len(left) == 0 {
		return ended, err
	}
	var names []string
	for _, t := range left {
		name := fmt.Sprintf("process %d", t.PID)
		if t.Mount != "" {
			name += " (mount " + t.Mount + ")"
		}
		names = append(names, name)
	}
	what := "wait longer with --timeout, or kill with --force"
	if o.Force {
		what = "not even SIGKILL ended it: it hangs in the kernel, look at /proc/PID/stack"
	}
	return ended, fault(sealfs.ErrTimeout, "%s did not end within %v: see %s; %s", strings.Join(names, " and "), o.Timeout, d.as(role).LogPath(), what)
}

// alive reports whether p still is the process of its entry, or of the lock.
func (d Dir) alive(p Process) bool {
	if _, alive, err := d.process(p.PID); err == nil {
		return alive
	}
	if p.Role == RoleMount {
		return false
	}
	pid, held, err := d.as(p.Role).holder()
	return err == nil && held && pid == p.PID
}

// await waits until all processes have ended, but not longer than timeout, and
// returns those that have not.
func await(ctx context.Context, targets []target, timeout time.Duration) (left []target, err error) {
	// A pidfd becomes readable when its process ends; so does this pipe when ctx does.
	r, w, err := os.Pipe()
	if err != nil {
		return targets, err
	}
	defer r.Close()
	stop := context.AfterFunc(ctx, func() { w.Close() })
	defer func() {
		if stop() {
			w.Close()
		}
	}()
	deadline := time.Now().Add(timeout)
	left = slices.Clone(targets)
	for len(left) > 0 {
		fds := []unix.PollFd{{Fd: int32(r.Fd()), Events: unix.POLLIN}}
		for _, t := range left {
			fds = append(fds, unix.PollFd{Fd: int32(t.fd), Events: unix.POLLIN})
		}
		wait := time.Until(deadline)
		if wait <= 0 {
			return left, nil
		}
		_, err := unix.Poll(fds, int(wait.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return left, fmt.Errorf("wait for processes: %w", err)
		}
		if ctx.Err() != nil {
			return left, fault(sealfs.ErrInterrupted, "interrupted while waiting for processes to end")
		}
		var still []target
		for i, t := range left {
			if err != nil || fds[i+1].Revents == 0 {
				still = append(still, t)
			}
		}
		left = still
	}
	return nil, nil
}

// tidy removes what killed processes left: mounts, entries, sockets. Staging is
// left where it is: it holds what the next start recovers.
func (d Dir) tidy() error {
	if _, err := os.Stat(d.join("pids")); errors.Is(err, fs.ErrNotExist) {
		return nil // nothing of ours was ever here
	}
	release, err := d.lockAll(lockWait)
	if err != nil {
		return err
	}
	defer release()
	errs := []error{d.clearStale("")}
	for _, path := range d.sockets() {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// clearStale clears the mounts of dead processes, and the one at point if it
// is stale, and forgets the processes. The caller holds the directory's lock.
func (d Dir) clearStale(point string) error {
	_, dead, err := d.processes()
	if err != nil {
		return err
	}
	points := []string{point}
	if point != "" {
		if points[0], err = mountPath(point); err != nil {
			return err
		}
	}
	for _, p := range dead {
		if client.Dying(p.PID) {
			client.AbortDying(p.PID)
			awaitExit(p.PID, lockWait) // only then is its mount dead
		}
		points = append(points, p.Mount)
	}
	for _, p := range points {
		if err := clearMount(p); err != nil {
			return err
		}
	}
	return d.forget(dead)
}

// forgetRole removes the entries of dead processes of a role. The caller holds the
// role's lock.
func (d Dir) forgetRole(role string) error {
	_, dead, err := d.processes()
	if err != nil {
		return err
	}
	return d.forget(slices.DeleteFunc(dead, func(p Process) bool { return p.Role != role }))
}

// Destroy removes what SealFS made in the directory, and the directory itself
// if nothing else is in it. It refuses while a process runs, and a directory
// that was not made by SealFS. All data is lost.
func (d Dir) Destroy() error {
	if _, err := os.Stat(d.path); errors.Is(err, fs.ErrNotExist) {
		return fault(sealfs.ErrNotExist, "there is no data directory %s: name one with --data", d)
	}
	if !d.known() {
		return fault(sealfs.ErrNotExist, "%s is no data directory of SealFS (it has no config.yaml): nothing was removed", d)
	}
	live, _, err := d.processes()
	if err != nil {
		return err
	}
	if len(live) > 0 {
		return fault(sealfs.ErrBusy, "%s is in use by process %d: stop it with `sealfs down --data %s` first", d, live[0].PID, d)
	}
	release, err := d.lockAll(lockWait)
	if err != nil {
		return err
	}
	defer release()
	if err := d.clearStale(""); err != nil {
		return err
	}
	// Rings lie outside the directory. A damaged configuration names none; that
	// does not keep the rest.
	var errs []error
	remove := func(path string) {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if stores, err := d.Stores(); err == nil {
		for _, s := range stores {
			ring := StagingPath(s.ID, s.Device)
			remove(ring)
			remove(ring + ".lock")
		}
	}
	for name := range ours {
		if name != "lock" {
			errs = append(errs, os.RemoveAll(d.join(name)))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("not all could be removed: %w", err)
	}
	remove(d.join("lock"))
	// What is not ours stays, and the directory with it.
	if err := os.Remove(d.path); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EBUSY) && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
