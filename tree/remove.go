package tree

import (
	"context"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sealfs"
)

// Limits of a removal.
const (
	waitingMax = 256     // directories found that no worker has begun with
	openMax    = 512     // beyond so many open directories those that wait for others are closed
	retryMax   = 16      // times that a directory is read anew because something was put into it
	entriesLen = 1 << 15 // bytes of entries read at once
)

// Options say how to remove.
type Options struct {
	Jobs  int  // workers, at least 1
	Force bool // a path that does not exist is no error
	// Allow, if not nil, refuses a path of the request whose object lies on the device dev.
	Allow func(path string, dev uint64) error
	// Failed, if not nil, is told each error as it occurs, one at a time.
	Failed func(err error)
}

// Removed counts what is gone so far. It may be read while the removal runs.
type Removed struct{ Files, Dirs, Failed atomic.Int64 }

// Remove deletes the paths and all below them, as `rm -rf --one-file-system` does. A
// path is a name in its directory: a symbolic link itself is removed. It goes on
// after errors, of which each names its object, and returns the first, or ctx's when that
// ended it.
func Remove(ctx context.Context, o Options, paths []string, n *Removed) error {
	r := remover{ctx: ctx, o: o, n: n, queue: make(chan *dir, waitingMax)}
	r.pending.Store(1)
	var workers sync.WaitGroup
	for range r.o.Jobs - 1 {
		workers.Go(func() { r.work(new(worker)) })
	}
	w := new(worker)
	for _, p := range paths {
		if ctx.Err() != nil {
			break
		}
		r.path(w, p)
	}
	r.settle()
	r.work(w)
	workers.Wait()
	if err := ctx.Err(); err != nil {
		return err
	}
	return r.first
}

// remover is one Remove.
type remover struct {
	ctx context.Context
	o   Options
	n   *Removed

	queue   chan *dir    // closed when nothing is pending
	pending atomic.Int64 // directories in work or in the queue, and one while paths are gone through
	open    atomic.Int64 // directories open

	mu    sync.Mutex // of first, and of calls of Failed
	first error
}

// dir is a directory under removal. While it is not done, either it is open, or one of its
// subdirectories is, through whose ".." it is opened again.
type dir struct {
	parent   *dir   // nil: the directory of a path
	name     string // of a path's directory: the path itself, for messages
	dev, ino uint64

	mu    sync.Mutex
	fd    int  // -1: closed
	pins  int  // those who need fd: who reads it, and subdirectories that are not open yet
	left  int  // subdirectories that are not done, and one while it is read
	kept  bool // something in it stays
	reads int  // times that it was read
}

// worker is what a goroutine needs.
type worker struct{ entries [entriesLen]byte }

// settle is called for each that was pending.
func (r *remover) settle() {
	if r.pending.Add(-1) == 0 {
		close(r.queue)
	}
}

// offer leaves d to whoever has nothing to do. It reports false when enough wait already.
func (r *remover) offer(d *dir) bool {
	if r.o.Jobs <= 1 {
		return false
	}
	r.pending.Add(1)
	select {
	case r.queue <- d:
		return true
	default:
		r.pending.Add(-1) // cannot be the last: the reader of d's parent is pending
		return false
	}
}

// work empties directories until nothing is pending.
func (r *remover) work(w *worker) {
	for d := range r.queue {
		r.begun(w, d)
		r.settle()
	}
}

// begun opens, empties and removes d, for which its parent is pinned.
func (r *remover) begun(w *worker, d *dir) {
	if !r.openDir(d) {
		r.done(w, d.parent, true)
		return
	}
	r.drop(d.parent) // d's ".." leads there from now on
	r.done(w, d, r.empty(w, d))
}

// keepAll notes that something in d, which may be nil, stays, and so d and all above it.
func (d *dir) keepAll() {
	for ; d != nil && d.keep(); d = d.parent {
	}
}

// fail notes an error of an object and, if it has one, that its directory stays.
func (r *remover) fail(d *dir, err error) {
	d.keepAll()
	r.n.Failed.Add(1)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.first == nil {
		r.first = err
	}
	if r.o.Failed != nil {
		r.o.Failed(err)
	}
}

// keep notes that something in d stays. It reports whether that is news.
func (d *dir) keep() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	news := !d.kept
	d.kept = true
	return news
}

// path returns the path of a name in d, for messages.
func (d *dir) path(name string) string {
	for ; d != nil; d = d.parent {
		name = filepath.Join(d.name, name)
	}
	return name
}

func (r *remover) failed(op string, d *dir, name string, err error) {
	r.fail(d, &fs.PathError{Op: op, Path: d.path(name), Err: err})
}

// path removes what one path of the request names.
func (r *remover) path(w *worker, path string) {
	trimmed := strings.TrimRight(path, "/")
	base := trimmed[strings.LastIndexByte(trimmed, '/')+1:]
	if base == "" || base == "." || base == ".." {
		r.fail(nil, fmt.Errorf("%q: %w: name a file or directory, not \"/\", \".\" or \"..\"", path, sealfs.ErrInvalid))
		return
	}
	above := strings.TrimSuffix(trimmed, base)
	top := &dir{name: above, fd: -1, left: 1, pins: 1, kept: true}
	if above == "" {
		above = "."
	}
	fd, err := retry(func() (int, error) { return unix.Open(above, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0) })
	if err != nil {
		if !r.o.Force || err != unix.ENOENT {
			r.failed("remove", nil, path, err)
		}
		return
	}
	top.fd = fd
	r.open.Add(1)
	defer r.done(w, top, true)
	var st unix.Statx_t
	if err := unix.Statx(fd, base, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_TYPE, &st); err != nil {
		if !r.o.Force || err != unix.ENOENT {
			r.failed("remove", top, base, err)
		}
		return
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	dev := unix.Mkdev(st.Dev_major, st.Dev_minor)
	switch {
	case st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0:
		r.fail(top, fmt.Errorf("%s: %w: it is the root of a mount; name what is in it", path, sealfs.ErrBusy))
		return
	case trimmed != path && !isDir:
		r.failed("remove", top, base, unix.ENOTDIR)
		return
	}
	if r.o.Allow != nil {
		if err := r.o.Allow(path, dev); err != nil {
			r.fail(top, err)
			return
		}
	}
	if !isDir {
		r.unlink(top, base)
		return
	}
	d := r.child(top, base)
	d.dev = dev
	r.begun(w, d)
}

// child returns a subdirectory of d. It pins d, which must be open.
func (r *remover) child(d *dir, name string) *dir {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.left++
	d.pins++
	return &dir{parent: d, name: name, dev: d.dev, fd: -1, left: 1}
}

// openDir opens d in its parent, which is pinned, and pins it.
func (r *remover) openDir(d *dir) bool {
	if r.ctx.Err() != nil {
		d.parent.keepAll()
		return false
	}
	fd, err := retry(func() (int, error) {
		return unix.Openat(d.parent.fd, d.name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err == unix.ENOENT {
		return false // somebody was faster
	}
	if err == unix.ENOTDIR || err == unix.ELOOP { // it has become something else
		r.unlink(d.parent, d.name)
		return false
	}
	if err != nil {
		r.failed("open", d.parent, d.name, err)
		return false
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		r.failed("stat", d.parent, d.name, err)
		return false
	}
	if st.Dev != d.dev {
		unix.Close(fd)
		r.fail(d.parent, fmt.Errorf("%s: %w: another file system is mounted there; unmount it first", d.parent.path(d.name), sealfs.ErrBusy))
		return false
	}
	r.open.Add(1)
	d.fd, d.ino, d.pins = fd, st.Ino, 1
	return true
}

// pin makes d open and keeps it so, for which below, a subdirectory, is open. It
// reports false, and the error, if renames have left no way back.
func (r *remover) pin(d, below *dir) bool {
	d.mu.Lock()
	d.pins++
	if d.fd < 0 {
		d.fd = r.reopen(d, below.fd, "..")
	}
	ok := d.fd >= 0
	if !ok {
		d.pins--
	}
	d.mu.Unlock()
	if !ok {
		r.fail(d, fmt.Errorf("%s: %w: it was moved while its content was removed; what is left of it stays", d.path(""), sealfs.ErrStale))
	}
	return ok
}

// reopen opens what name stands for in the directory at, if that is d, or returns -1.
func (r *remover) reopen(d *dir, at int, name string) int {
	fd, err := retry(func() (int, error) {
		return unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return -1
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Dev != d.dev || st.Ino != d.ino {
		unix.Close(fd) // below was moved elsewhere, whose names are none of ours
		return -1
	}
	r.open.Add(1)
	return fd
}

// drop takes a pin off d. With many open directories one that is not needed just now is closed.
func (r *remover) drop(d *dir) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.pins--; d.pins == 0 && d.parent != nil && r.open.Load() > openMax {
		r.close(d)
	}
}

func (r *remover) close(d *dir) {
	if d.fd >= 0 {
		unix.Close(d.fd)
		d.fd = -1
		r.open.Add(-1)
	}
}

// done is called when one of those ends whom d waits for. The last one removes d, and so
// on upwards. The caller has d pinned, or else something in it stays.
func (r *remover) done(w *worker, d *dir, pinned bool) {
	for {
		d.mu.Lock()
		d.left--
		last, kept := d.left == 0, d.kept
		d.mu.Unlock()
		if pinned && !last {
			r.drop(d)
		}
		if !last {
			return
		}
		parent, up := d.parent, false
		if !kept {
			if up = r.pin(parent, d); up && !r.rmdir(parent, d) {
				r.drop(parent)
				pinned = r.empty(w, d)
				continue
			}
		}
		d.mu.Lock()
		r.close(d)
		d.mu.Unlock()
		if parent == nil {
			return
		}
		d, pinned = parent, up
	}
}

// rmdir removes d, which is read through. It reports false if d must be read again.
func (r *remover) rmdir(parent, d *dir) bool {
	_, err := retry(func() (int, error) { return 0, unix.Unlinkat(parent.fd, d.name, unix.AT_REMOVEDIR) })
	switch {
	case err == nil:
		r.n.Dirs.Add(1)
	case err == unix.ENOENT: // somebody was faster
	case err == unix.ENOTDIR: // d was moved elsewhere, and something else put in its place
		r.unlink(parent, d.name)
	case err == unix.ENOTEMPTY && d.reads < retryMax && r.ctx.Err() == nil:
		if _, err := unix.Seek(d.fd, 0, unix.SEEK_SET); err == nil {
			d.left = 1 // nobody else knows it any more
			return false
		}
		fallthrough
	default:
		r.failed("remove", parent, d.name, err)
	}
	return true
}

// unlink removes what is no directory. It reports false if it is one.
func (r *remover) unlink(d *dir, name string) bool {
	_, err := retry(func() (int, error) { return 0, unix.Unlinkat(d.fd, name, 0) })
	switch err {
	case nil:
		r.n.Files.Add(1)
	case unix.ENOENT: // somebody was faster
	case unix.EISDIR:
		return false
	default:
		r.failed("remove", d, name, err)
	}
	return true
}

// empty removes what is in d, for which d is pinned, but for subdirectories that
// others do. It reports whether d is still pinned.
func (r *remover) empty(w *worker, d *dir) bool {
	d.reads++
	var at int64
	for {
		if r.ctx.Err() != nil {
			d.keepAll()
			return true
		}
		n, err := retry(func() (int, error) { return unix.ReadDirent(d.fd, w.entries[:]) })
		if err != nil {
			r.failed("read", d.parent, d.name, err)
			return true
		}
		if n == 0 {
			return true
		}
		var dirs []string
		for e := range entries(w.entries[:n]) {
			at = e.off
			if name := string(e.name); e.dir || r.ctx.Err() == nil && !r.unlink(d, name) {
				dirs = append(dirs, name)
			}
		}
		for _, name := range dirs {
			if c := r.child(d, name); !r.offer(c) && !r.descend(w, d, c, at) {
				return false
			}
		}
	}
}

// descend removes c before d is read on at the position at. It reports whether d is still pinned.
func (r *remover) descend(w *worker, d, c *dir, at int64) bool {
	if !r.openDir(c) {
		r.done(w, d, true)
		return true
	}
	r.drop(d)
	r.drop(d) // the reader's: in a deep tree it may be closed meanwhile
	pinned := r.empty(w, c)
	back := pinned && r.pin(d, c)
	r.done(w, c, pinned)
	if !back {
		return false
	}
	_, err := unix.Seek(d.fd, at, unix.SEEK_SET)
	if err != nil {
		r.failed("read", d.parent, d.name, err)
	}
	return true
}

// retry calls fn until no signal has interrupted it.
func retry(fn func() (int, error)) (int, error) {
	for {
		n, err := fn()
		if err != unix.EINTR {
			return n, err
		}
	}
}
