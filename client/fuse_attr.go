package client

import (
	"errors"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"sealfs"
	"sealfs/op"
)

// refuseAttr refuses namespaces of attributes that we do not have. The kernel checks
// permissions for those that we have. POSIX ACLs would stand in "system.".
func refuseAttr(name string) error {
	for _, ns := range [...]string{"user.", "trusted.", "security."} {
		if strings.HasPrefix(name, ns) {
			if len(name) == len(ns) {
				return sealfs.ErrInvalid
			}
			return nil
		}
	}
	return sealfs.ErrNotSupported
}

func (f *filesystem) GetXAttr(cancel <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	ctx, w := f.wait(cancel, h.Pid)
	defer w.over()
	if err := refuseAttr(name); err != nil {
		return 0, status(err)
	}
	b, size, err := f.c.Getxattr(ctx, f.ino(h.NodeId), name, len(dest), dest[:0])
	if err != nil {
		return 0, status(err)
	}
	if len(dest) > 0 {
		size = copy(dest, b)
	}
	return uint32(size), fuse.OK
}

func (f *filesystem) ListXAttr(cancel <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	ctx, w := f.wait(cancel, h.Pid)
	defer w.over()
	ino := f.ino(h.NodeId)
	if h.Uid == 0 {
		b, size, err := f.c.Listxattr(ctx, ino, len(dest), dest[:0])
		if err != nil {
			return 0, status(err)
		}
		if len(dest) > 0 {
			size = copy(dest, b)
		}
		return uint32(size), fuse.OK
	}
	// Only root may know of trusted attributes.
	b, _, err := f.c.Listxattr(ctx, ino, sealfs.XattrListMax, nil)
	if err != nil {
		return 0, status(err)
	}
	size := 0
	var list []byte
	for _, name := range xattrNames(b) {
		if !strings.HasPrefix(name, "trusted.") {
			list = append(append(list, name...), 0)
		}
	}
	if size = len(list); len(dest) > 0 {
		if size > len(dest) {
			return 0, fuse.ERANGE
		}
		copy(dest, list)
	}
	return uint32(size), fuse.OK
}

// Flags of setxattr(2).
const (
	xattrCreate  = 1
	xattrReplace = 2
)

func (f *filesystem) SetXAttr(cancel <-chan struct{}, in *fuse.SetXAttrIn, name string, value []byte) fuse.Status {
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	if err := refuseAttr(name); err != nil {
		return status(err)
	}
	var flags op.Flags
	if in.Flags&xattrCreate != 0 {
		flags |= op.XCreate
	}
	if in.Flags&xattrReplace != 0 {
		flags |= op.XReplace
	}
	ino := f.ino(in.NodeId)
	err := f.c.Setxattr(ctx, ino, name, value, flags)
	f.changed(ino)
	return status(err)
}

func (f *filesystem) RemoveXAttr(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	ctx, w := f.wait(cancel, h.Pid)
	defer w.over()
	if err := refuseAttr(name); err != nil {
		return status(err)
	}
	ino := f.ino(h.NodeId)
	err := f.c.Removexattr(ctx, ino, name)
	f.changed(ino)
	return status(err)
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
	if f.lost(in.Fh) {
		err = sealfs.ErrSession
	}
	if err == nil {
		err = f.c.SetLock(ctx, f.ino(in.NodeId), l, flags)
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
	if f.lost(in.Fh) {
		return fuse.EIO
	}
	ctx, w := f.wait(cancel, 0)
	err = f.c.SetLock(ctx, f.ino(in.NodeId), l, flags)
	w.over()
	if errors.Is(err, sealfs.ErrAgain) {
		err = f.c.WaitLock(&fuse.Context{Cancel: cancel}, f.ino(in.NodeId), l, flags)
	}
	return status(err)
}
