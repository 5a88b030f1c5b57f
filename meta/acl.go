package meta

import (
	"bytes"
	"encoding/binary"

	"sealfs"
	"sealfs/op"
	"sealfs/pmem"
)

// acl is a POSIX ACL as Linux has it in extended attributes, all numbers
// little-endian: four bytes of version, then eight for each entry, which are tag (2),
// permissions (2) and who (4), all ones where the tag needs none. Entries come in the
// order of their tags; within a tag they stand as they were given. A nil acl is none.
//
// The bits of a mode and an access ACL say the same: the owner's are those of
// aclUserObj, others' those of aclOther, the group's those of aclMask, or, without one,
// those of aclGroupObj. An access ACL with nothing else in it is no more than a mode and
// is not stored.
type acl []byte

const (
	aclVersion = 2
	aclHead    = 4
	aclEntry   = 8
	aclNobody  = 1<<32 - 1

	// aclPartMax is the longest ACL that goes into a part of a transaction, whose
	// row is bounded: 112 entries.
	aclPartMax = aclHead + 112*aclEntry
)

// The tags of entries.
const (
	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

// aclFlag returns the flag of an inode that has the attribute name, 0 if that is no ACL.
func aclFlag(name string) uint8 {
	switch name {
	case op.ACLAccess:
		return flagAccess
	case op.ACLDefault:
		return flagDefault
	}
	return 0
}

func aclName(flag uint8) string {
	if flag == flagAccess {
		return op.ACLAccess
	}
	return op.ACLDefault
}

// parseACL returns a copy of what b says, nil for an ACL without entries. What
// Linux refuses is refused in the same way.
func parseACL(b []byte) (acl, error) {
	switch {
	case len(b) > sealfs.ACLMax:
		return nil, refusal(sealfs.ErrArgTooBig)
	case len(b) == 0:
		return nil, nil
	case len(b) < aclHead:
		return nil, refusal(sealfs.ErrInvalid)
	case binary.LittleEndian.Uint32(b) != aclVersion:
		return nil, refusal(sealfs.ErrNotSupported)
	case len(b) == aclHead:
		return nil, nil
	case (len(b)-aclHead)%aclEntry != 0:
		return nil, refusal(sealfs.ErrInvalid)
	}
	a := acl(bytes.Clone(b))
	last, named := uint16(0), false
	seen := uint16(0)
	for i := range a.len() {
		tag, e := a.tag(i), a.entry(i)
		who := binary.LittleEndian.Uint32(e[4:])
		switch tag {
		case aclUser, aclGroup:
			named = true
			if who == aclNobody {
				return nil, refusal(sealfs.ErrInvalid)
			}
		case aclUserObj, aclGroupObj, aclMask, aclOther:
			if tag == last {
				return nil, refusal(sealfs.ErrInvalid)
			}
			binary.LittleEndian.PutUint32(e[4:], aclNobody)
		default:
			return nil, refusal(sealfs.ErrInvalid)
		}
		if tag < last || binary.LittleEndian.Uint16(e[2:]) > 7 {
			return nil, refusal(sealfs.ErrInvalid)
		}
		last = tag
		seen |= tag
	}
	const least = aclUserObj | aclGroupObj | aclOther
	if seen&least != least || named && seen&aclMask == 0 {
		return nil, refusal(sealfs.ErrInvalid)
	}
	return a, nil
}

// CheckACL reports whether b may stand in an attribute that is an ACL.
func CheckACL(b []byte) bool {
	a, err := parseACL(b)
	return err == nil && a != nil && bytes.Equal(a, b)
}

// checkHandedDown refuses what cannot be handed down to a directory in another store.
func checkHandedDown(b []byte) error {
	if len(b) > 0 && (len(b) > aclPartMax || !CheckACL(b)) {
		return refusal(sealfs.ErrInvalid)
	}
	return nil
}

// travels reports whether a fits into a part of a transaction.
func (a acl) travels() bool { return len(a) <= aclPartMax }

func (a acl) len() int           { return max(len(a)-aclHead, 0) / aclEntry }
func (a acl) entry(i int) []byte { return a[aclHead+i*aclEntry:][:aclEntry] }
func (a acl) tag(i int) uint16   { return binary.LittleEndian.Uint16(a.entry(i)) }

// mode returns the nine bits of a mode that say what a says, and whether that is all
// that it says.
func (a acl) mode() (bits uint32, all bool) {
	group, mask, all := uint32(0), uint32(0), true
	for i := range a.len() {
		perm := uint32(a.entry(i)[2])
		switch a.tag(i) {
		case aclUserObj:
			bits |= perm << 6
		case aclGroupObj:
			group = perm
		case aclMask:
			mask, all = perm|8, false
		case aclOther:
			bits |= perm
		default:
			all = false
		}
	}
	if mask != 0 {
		group = mask & 7
	}
	return bits | group<<3, all
}

// with returns a copy of a that says what mode says.
func (a acl) with(mode uint32) acl {
	a = bytes.Clone(a)
	var group []byte
	for i := range a.len() {
		e := a.entry(i)
		switch a.tag(i) {
		case aclUserObj:
			e[2] = byte(mode >> 6 & 7)
		case aclGroupObj, aclMask: // the mask comes later
			group = e
		case aclOther:
			e[2] = byte(mode & 7)
		}
	}
	if group != nil {
		group[2] = byte(mode >> 3 & 7)
	}
	return a
}

// flags returns the flags of a new inode to which a is handed down.
func (a acl) flags(dir bool) (flags uint8) {
	if a == nil {
		return 0
	}
	if _, all := a.mode(); !all {
		flags |= flagAccess
	}
	if dir {
		flags |= flagDefault
	}
	return flags
}

// readACL reads an ACL that in has, as its flags say.
func readACL(r pmem.Reader, c Config, in *Inode, flag uint8) (acl, error) {
	var old Attribute
	at, found, err := findAttr(r, c, in, aclName(flag), &old)
	if err != nil {
		return nil, err
	}
	if !found || old.Total > sealfs.ACLMax {
		return nil, damaged("inode %d has the flag %#x of an ACL that is missing or too long", in.Ino, flag)
	}
	b, err := appendAttr(make([]byte, 0, old.Total), r, c, in, at, &old)
	if err != nil {
		return nil, err
	}
	if !CheckACL(b) {
		return nil, damaged("the ACL %x of inode %d", b, in.Ino)
	}
	return b, nil
}

// handedDown returns the ACL that dir hands down to what is made in it.
func handedDown(r pmem.Reader, c Config, dir *Inode) (acl, error) {
	if dir.Flags&flagDefault == 0 {
		return nil, nil
	}
	return readACL(r, c, dir, flagDefault)
}

// giveACL gives a new inode what its directory hands down. Its mode is within that.
func (ch *change) giveACL(in *Inode, a acl) error {
	if len(a) == 0 {
		return nil
	}
	in.Flags |= a.flags(in.isDir())
	if in.Flags&flagAccess != 0 {
		if err := ch.putAttr(in, op.ACLAccess, a.with(in.Mode), 0); err != nil {
			return err
		}
	}
	if in.Flags&flagDefault != 0 {
		return ch.putAttr(in, op.ACLDefault, a, 0)
	}
	return nil
}

// setACL sets an ACL of in to the request's Data, and what the mode says of it. The
// flags XCreate and XReplace mean nothing here, as on other file systems.
func (ch *change) setACL(in *Inode, flag uint8) error {
	a, err := parseACL(ch.req.Data)
	switch {
	case in.isLink():
		return refusal(sealfs.ErrNotSupported)
	case err != nil:
		return err
	case a == nil:
		return ch.removeACL(in, flag)
	}
	if flag == flagDefault {
		if !in.isDir() {
			return refusal(sealfs.ErrAccess)
		}
		if err := ch.mayRecast(in); err != nil {
			return err
		}
		in.Flags |= flagDefault
		if err := ch.putAttr(in, op.ACLDefault, a, 0); err != nil {
			return err
		}
		return ch.attrChanged(in)
	}
	bits, all := a.mode()
	before := in.Mode
	in.Mode = in.Mode&^0o777 | bits
	if ch.req.Flags&op.KillPriv != 0 {
		in.Mode &^= setgid
	}
	if in.handsDownOther(before, in.GID) {
		if err := ch.mayRecast(in); err != nil {
			return err
		}
	}
	switch {
	case !all:
		in.Flags |= flagAccess
		err = ch.putAttr(in, op.ACLAccess, a, 0)
	case in.Flags&flagAccess != 0:
		in.Flags &^= flagAccess
		err = ch.dropAttr(in, op.ACLAccess)
	}
	if err != nil {
		return err
	}
	return ch.attrChanged(in)
}

// removeACL removes an ACL of in, if there is one. The mode stays.
func (ch *change) removeACL(in *Inode, flag uint8) error {
	if in.isLink() {
		return refusal(sealfs.ErrNotSupported)
	}
	if in.Flags&flag == 0 {
		ch.quiet = true
		in.Attr(&ch.rep.Attr)
		return nil
	}
	if flag == flagDefault {
		if err := ch.mayRecast(in); err != nil {
			return err
		}
	}
	in.Flags &^= flag
	if err := ch.dropAttr(in, aclName(flag)); err != nil {
		return err
	}
	return ch.attrChanged(in)
}

// chmodACL lets the access ACL of in say what its mode says.
func (ch *change) chmodACL(in *Inode) error {
	if in.Flags&flagAccess == 0 {
		return nil
	}
	a, err := readACL(ch.tx, ch.c, in, flagAccess)
	if err != nil {
		return err
	}
	return ch.putAttr(in, op.ACLAccess, a.with(in.Mode), 0)
}
