package client

import (
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"

	"sealfs"
	"sealfs/op"
)

// refuseAttr refuses namespaces of attributes that we do not have. The kernel checks
// permissions for those that we have. Of "system." that is POSIX ACLs.
func refuseAttr(name string) error {
	if isACL(name) || name == PartitionsName {
		return nil
	}
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
	if err := refuseAttr(name); err != nil && !strings.HasPrefix(name, op.AttrTotals) {
		return 0, status(err)
	}
	if name == op.ACLAccess && f.bare.has(f.c, f.ino(h.NodeId)) {
		return 0, fuse.ENODATA
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
	defer f.within(f.ino(in.NodeId))()
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
	if isACL(name) {
		flags = 0
		if f.aclFlags && in.SetXAttrFlags&fuse.SETXATTR_ACL_KILL_SGID != 0 {
			flags = op.KillPriv
		}
	}
	ino := f.ino(in.NodeId)
	err := f.c.Setxattr(ctx, ino, name, value, flags)
	if isACL(name) {
		f.bare.forget(f.c, ino)
	}
	f.changed(ino)
	return status(err)
}

func (f *filesystem) RemoveXAttr(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	defer f.within(f.ino(h.NodeId))()
	ctx, w := f.wait(cancel, h.Pid)
	defer w.over()
	if err := refuseAttr(name); err != nil {
		return status(err)
	}
	ino := f.ino(h.NodeId)
	if n := f.c.nodes.get(ino); n != nil && name == capability {
		n.uncapped.Store(h.Pid)
	}
	err := f.c.Removexattr(ctx, ino, name)
	f.changed(ino)
	return status(err)
}
