package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/op"
)

// The kernel names the owner of a lock by a number, which stands for a process's table
// of files (POSIX locks), or for an open file (OFD locks and flocks). It does not say which of the
// first two it is, but they go at different moments:
//
//   - A POSIX lock with any close of a descriptor of the file by its process. That is a FLUSH,
//     which names the owner.
//   - An OFD lock with the last close of the open file. That is a RELEASE, which names the
//     handle alone.
//
// So a mount remembers through which handles an owner took record locks. What a
// RELEASE finds of owners that used that handle and no other was taken by the open file:
// each process that used it has closed it, and was forgotten by its FLUSH.

// recordLocks are the record locks that were taken through a mount, and the owners that are
// just being dropped.
type recordLocks struct {
	mu     sync.Mutex
	owners map[sealfs.Ino]map[uint64]*lockOwner
	// leaving are owners whose locks are being released. The kernel may give the number to
	// somebody else already, who must wait until that is done.
	leaving map[leavingOwner]chan struct{}
}

type leavingOwner struct {
	ino   sealfs.Ino
	owner uint64
}

// lockOwner is what an owner has of a file.
type lockOwner struct {
	handles map[uint64]struct{} // through which it took locks
	held    []op.Lock           // for certain; they do not overlap
}

// enter waits until the owner may lock, and notes that it is about to, through a handle.
func (r *recordLocks) enter(ctx context.Context, ino sealfs.Ino, owner, handle uint64, flock bool) error {
	for {
		r.mu.Lock()
		over := r.leaving[leavingOwner{ino, owner}]
		if over == nil {
			if !flock {
				r.owner(ino, owner).handles[handle] = struct{}{}
			}
			r.mu.Unlock()
			return nil
		}
		r.mu.Unlock()
		select {
		case <-over:
		case <-ctx.Done():
			return errGaveUp
		}
	}
}

// owner returns what is known of an owner. r is locked.
func (r *recordLocks) owner(ino sealfs.Ino, owner uint64) *lockOwner {
	if r.owners == nil {
		r.owners = map[sealfs.Ino]map[uint64]*lockOwner{}
	}
	if r.owners[ino] == nil {
		r.owners[ino] = map[uint64]*lockOwner{}
	}
	o := r.owners[ino][owner]
	if o == nil {
		o = &lockOwner{handles: map[uint64]struct{}{}}
		r.owners[ino][owner] = o
	}
	return o
}

// drop forgets an owner. r is locked.
func (r *recordLocks) drop(ino sealfs.Ino, owner uint64) {
	if delete(r.owners[ino], owner); len(r.owners[ino]) == 0 {
		delete(r.owners, ino)
	}
}

// took notes what an owner has just been granted, or has released.
func (r *recordLocks) took(ino sealfs.Ino, handle uint64, l op.Lock) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l.Type == op.Unlock && r.owners[ino][l.Owner] == nil {
		return
	}
	// A close may have come since enter; what was granted after it is there nevertheless.
	o := r.owner(ino, l.Owner)
	if l.Type != op.Unlock {
		o.handles[handle] = struct{}{}
	}
	o.held = replaced(o.held, l)
}

// replaced returns held with l in the place of what it overlaps.
func replaced(held []op.Lock, l op.Lock) (now []op.Lock) {
	for _, h := range held {
		if h.End < l.Start || l.End < h.Start {
			now = append(now, h)
			continue
		}
		if left := h; left.Start < l.Start {
			left.End = l.Start - 1
			now = append(now, left)
		}
		if right := h; right.End > l.End {
			right.Start = l.End + 1
			now = append(now, right)
		}
	}
	if l.Type != op.Unlock {
		now = append(now, l)
	}
	return now
}

// closed forgets the process that closes the file, and reports whether it took record locks.
func (r *recordLocks) closed(ino sealfs.Ino, owner uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.owners[ino][owner] == nil {
		return false
	}
	r.drop(ino, owner)
	return true
}

// released returns the owners that go with a handle. They leave until they have left.
func (r *recordLocks) released(ino sealfs.Ino, handle uint64) (owners []uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for owner, o := range r.owners[ino] {
		if _, ok := o.handles[handle]; !ok {
			continue
		}
		if delete(o.handles, handle); len(o.handles) == 0 {
			r.drop(ino, owner)
			r.leave(ino, owner)
			owners = append(owners, owner)
		}
	}
	return owners
}

// leave has an owner wait before it locks again. r is locked.
func (r *recordLocks) leave(ino sealfs.Ino, owner uint64) {
	if r.leaving == nil {
		r.leaving = map[leavingOwner]chan struct{}{}
	}
	if at := (leavingOwner{ino, owner}); r.leaving[at] == nil {
		r.leaving[at] = make(chan struct{})
	}
}

// leaves is leave of one that holds a flock.
func (r *recordLocks) leaves(ino sealfs.Ino, owner uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leave(ino, owner)
}

// left lets an owner lock again.
func (r *recordLocks) left(ino sealfs.Ino, owner uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := leavingOwner{ino, owner}
	if over := r.leaving[at]; over != nil {
		close(over)
		delete(r.leaving, at)
	}
}

// before returns what makes the range of l as it was before somebody asked for l, who
// must wait until left is called.
func (r *recordLocks) before(ino sealfs.Ino, l op.Lock) []op.Lock {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leave(ino, l.Owner)
	l.Type = op.Unlock
	back := []op.Lock{l}
	if o := r.owners[ino][l.Owner]; o != nil {
		for _, h := range o.held {
			if h.Start <= l.End && l.Start <= h.End {
				h.Start, h.End = max(h.Start, l.Start), min(h.End, l.End)
				back = append(replaced(back, op.Lock{Start: h.Start, End: h.End}), h)
			}
		}
	}
	return back
}

// lockOf translates the kernel's lock.
func lockOf(in *fuse.LkIn) (l op.Lock, flags op.Flags, err error) {
	l = op.Lock{Start: in.Lk.Start, End: in.Lk.End, Owner: in.Owner, PID: in.Lk.Pid}
	switch in.Lk.Typ {
	case syscall.F_RDLCK:
		l.Type = op.ReadLock
	case syscall.F_WRLCK:
		l.Type = op.WriteLock
	case syscall.F_UNLCK:
		l.Type = op.Unlock
	default:
		err = sealfs.ErrInvalid
	}
	if in.LkFlags&fuse.LK_FLOCK != 0 {
		flags = op.Flock
	}
	return l, flags, err
}

func (f *filesystem) GetLk(cancel <-chan struct{}, in *fuse.LkIn, out *fuse.LkOut) fuse.Status {
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	l, flags, err := lockOf(in)
	if err == nil {
		l, err = f.c.TestLock(ctx, f.ino(in.NodeId), l, flags)
	}
	if err != nil {
		return status(err)
	}
	out.Lk = fuse.FileLock{Start: l.Start, End: l.End, Typ: syscall.F_UNLCK, Pid: l.PID}
	switch l.Type {
	case op.ReadLock:
		out.Lk.Typ = syscall.F_RDLCK
	case op.WriteLock:
		out.Lk.Typ = syscall.F_WRLCK
	}
	return fuse.OK
}

func (f *filesystem) SetLk(cancel <-chan struct{}, in *fuse.LkIn) fuse.Status {
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	l, flags, err := lockOf(in)
	if err == nil {
		err = f.lock(ctx, in, l, flags)
	}
	return status(err)
}

// SetLkw waits for a lock until it is free or the caller gets a signal. It keeps its
// goroutine meanwhile; go-fuse reads on with another one.
func (f *filesystem) SetLkw(cancel <-chan struct{}, in *fuse.LkIn) fuse.Status {
	l, flags, err := lockOf(in)
	if err != nil {
		return status(err)
	}
	ctx, w := f.wait(cancel, 0)
	err = f.lock(ctx, in, l, flags)
	w.over()
	if errors.Is(err, sealfs.ErrAgain) {
		if flags&op.Flock == 0 && waitsAsFile(in.Pid) {
			flags |= op.OFD
		}
		ino := f.ino(in.NodeId)
		err = f.c.WaitLock(&fuse.Context{Cancel: cancel}, ino, l, flags)
		f.locked(ino, in.Fh, l, flags, err)
	}
	return status(err)
}

// lock sets a lock, if it can be had now.
func (f *filesystem) lock(ctx context.Context, in *fuse.LkIn, l op.Lock, flags op.Flags) error {
	if f.lost(in.Fh) {
		return sealfs.ErrSession
	}
	ino := f.ino(in.NodeId)
	if l.Type != op.Unlock {
		if err := f.locks.enter(ctx, ino, l.Owner, in.Fh, flags&op.Flock != 0); err != nil {
			return err
		}
	}
	err := f.c.SetLock(ctx, ino, l, flags)
	f.locked(ino, in.Fh, l, flags, err)
	return err
}

// locked notes how asking for a lock has ended. One that may have been granted
// although its caller was told otherwise is given back.
func (f *filesystem) locked(ino sealfs.Ino, handle uint64, l op.Lock, flags op.Flags, err error) {
	switch {
	case err == errUnsure && flags&op.Flock != 0:
		f.locks.leaves(ino, l.Owner)
		go func() {
			defer f.locks.left(ino, l.Owner)
			f.c.DropOwner(f.c.life, ino, l.Owner, op.Flock)
		}()
	case err == errUnsure && l.Type != op.Unlock:
		back := f.locks.before(ino, l)
		go func() {
			defer f.locks.left(ino, l.Owner)
			for _, b := range back {
				if err := f.c.SetLock(f.c.life, ino, b, 0); err != nil {
					f.c.log.Warn("a lock for which an interrupted process waited is not given back until it closes the file", "ino", uint64(ino), "err", err)
				}
			}
		}()
	case err == nil && flags&op.Flock == 0:
		f.locks.took(ino, handle, l)
	}
}

// waitsAsFile reports whether a thread waits for an OFD lock just now. Of one that we must not
// look at, it is not assumed.
func waitsAsFile(tid uint32) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", tid))
	if err != nil {
		return false
	}
	words := bytes.Fields(b) // number, arguments…
	if len(words) < 3 {
		return false
	}
	call, err := strconv.Atoi(string(words[0]))
	if err != nil || call != unix.SYS_FCNTL {
		return false
	}
	cmd, err := strconv.ParseUint(string(words[2]), 0, 64)
	return err == nil && uint32(cmd) == unix.F_OFD_SETLKW
}
