package oracle

import (
	"encoding/binary"
	"slices"

	"sealfs"
	"sealfs/op"
)

// ace is an entry of an ACL.
type ace struct {
	tag, perm uint16
	who       uint32
}

// The kinds of entries, in the order in which they come.
const (
	aceOwner  = 1
	aceUser   = 2
	aceGroup  = 4
	aceGroups = 8
	aceMask   = 16
	aceOther  = 32
)

// aclMovesMax is the longest ACL of a directory whose subdirectories lie anywhere.
const aclMovesMax = 900

func isACL(name string) bool { return name == op.ACLAccess || name == op.ACLDefault }

// decodeACL reads an ACL; one without entries is nil.
func decodeACL(b []byte) ([]ace, sealfs.Code) {
	if len(b) > sealfs.ACLMax {
		return nil, sealfs.ErrArgTooBig
	}
	if len(b) == 0 {
		return nil, 0
	}
	if len(b) < 4 {
		return nil, sealfs.ErrInvalid
	}
	if binary.LittleEndian.Uint32(b) != 2 {
		return nil, sealfs.ErrNotSupported
	}
	var list []ace
	count := map[uint16]int{}
	for b = b[4:]; len(b) > 0; b = b[8:] {
		if len(b) < 8 {
			return nil, sealfs.ErrInvalid
		}
		e := ace{binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint16(b[2:]), binary.LittleEndian.Uint32(b[4:])}
		if !slices.Contains([]uint16{aceOwner, aceUser, aceGroup, aceGroups, aceMask, aceOther}, e.tag) || e.perm > 7 {
			return nil, sealfs.ErrInvalid
		}
		if e.tag == aceUser || e.tag == aceGroups {
			if e.who == 1<<32-1 {
				return nil, sealfs.ErrInvalid
			}
		} else {
			e.who = 1<<32 - 1
		}
		count[e.tag]++
		list = append(list, e)
	}
	if list == nil {
		return nil, 0
	}
	inOrder := slices.IsSortedFunc(list, func(a, b ace) int { return int(a.tag) - int(b.tag) })
	if !inOrder || count[aceOwner] != 1 || count[aceGroup] != 1 || count[aceOther] != 1 || count[aceMask] > 1 ||
		count[aceUser]+count[aceGroups] > 0 && count[aceMask] == 0 {
		return nil, sealfs.ErrInvalid
	}
	return list, 0
}

func encodeACL(list []ace) []byte {
	b := []byte{2, 0, 0, 0}
	for _, e := range list {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.who)
	}
	return b
}

// classes returns the entries that stand for owner, group and others in a mode.
func classes(list []ace) [3]*ace {
	find := func(tag uint16) *ace {
		for i := range list {
			if list[i].tag == tag {
				return &list[i]
			}
		}
		return nil
	}
	group := find(aceMask)
	if group == nil {
		group = find(aceGroup)
	}
	return [3]*ace{find(aceOwner), group, find(aceOther)}
}

func aclMode(list []ace) (mode uint32) {
	for _, e := range classes(list) {
		mode = mode<<3 | uint32(e.perm)
	}
	return mode
}

func aclChmod(list []ace, mode uint32) {
	for i, e := range classes(list) {
		e.perm = uint16(mode >> (6 - 3*i) & 7)
	}
}

// putACL gives in an access ACL, unless the mode says it all.
func (in *inode) putACL(list []ace) {
	if len(list) == 3 {
		in.dropACL(op.ACLAccess)
		return
	}
	in.put(op.ACLAccess, encodeACL(list))
	in.attr.Mode |= op.ModeACL
}

func (in *inode) put(name string, value []byte) {
	if in.xattrs == nil {
		in.xattrs = map[string][]byte{}
	}
	in.xattrs[name] = slices.Clone(value)
}

// dropACL takes an ACL away and reports whether there was one.
func (in *inode) dropACL(name string) bool {
	_, found := in.xattrs[name]
	delete(in.xattrs, name)
	if name == op.ACLAccess {
		in.attr.Mode &^= op.ModeACL
	}
	return found
}

func (fs *FS) setACL(req *op.Request, rep *op.Reply, in *inode, now int64) sealfs.Code {
	if in.attr.Mode&typeMask == typeLink {
		return sealfs.ErrNotSupported
	}
	list, code := decodeACL(req.Data)
	switch {
	case code != 0:
		return code
	case list == nil:
		return fs.removeACL(req, rep, in, now)
	case req.Name == op.ACLDefault && !in.isDir():
		return sealfs.ErrAccess
	case in.xattrs[req.Name] == nil && in.names()+len(req.Name)+1 > sealfs.XattrListMax:
		return sealfs.ErrArgTooBig
	case req.Name == op.ACLDefault:
		in.put(req.Name, encodeACL(list))
	default:
		in.attr.Mode = in.attr.Mode&^0o777 | aclMode(list)
		if req.Flags&op.KillPriv != 0 {
			in.attr.Mode &^= setgid
		}
		in.putACL(list)
	}
	in.changed(now)
	rep.Attr = in.attr
	return 0
}

func (fs *FS) removeACL(req *op.Request, rep *op.Reply, in *inode, now int64) sealfs.Code {
	if in.attr.Mode&typeMask == typeLink {
		return sealfs.ErrNotSupported
	}
	if in.dropACL(req.Name) {
		in.changed(now)
	}
	rep.Attr = in.attr
	return 0
}

// chmodACL lets an access ACL say what the mode says.
func (in *inode) chmodACL() {
	if value, found := in.xattrs[op.ACLAccess]; found {
		list, _ := decodeACL(value)
		aclChmod(list, in.attr.Mode)
		in.xattrs[op.ACLAccess] = encodeACL(list)
	}
}

// inherit gives a new child of dir its permissions.
func (in *inode) inherit(dir *inode, umask uint32) {
	value, found := dir.xattrs[op.ACLDefault]
	switch {
	case in.attr.Mode&typeMask == typeLink:
	case !found:
		in.attr.Mode &^= umask & 0o777
	default:
		list, _ := decodeACL(value)
		in.attr.Mode &= aclMode(list) | ^uint32(0o777)
		aclChmod(list, in.attr.Mode)
		in.putACL(list)
		if in.isDir() {
			in.put(op.ACLDefault, value)
		}
	}
}
