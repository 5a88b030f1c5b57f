package meta

import (
	"bytes"

	"sealfs"
	"sealfs/op"
)

// newInode fills in with a new inode of shard s and counts it. The record is not written yet.
func (ch *change) newInode(in *Inode, s sealfs.Shard, volume sealfs.Volume, mode uint32) error {
	if err := ch.issue(in, s, volume, mode); err != nil {
		return err
	}
	return ch.charge(in, 0, 1)
}

// issue is newInode for what is not counted.
func (ch *change) issue(in *Inode, s sealfs.Shard, volume sealfs.Volume, mode uint32) error {
	ino, err := ch.allocate(s)
	if err != nil {
		return err
	}
	now := ch.req.Time
	*in = Inode{
		Ino: ino, Mode: mode, Nlink: 1, UID: ch.req.UID, GID: ch.req.GID,
		Atime: now, Mtime: now, Ctime: now, Btime: now, Version: 1, Volume: volume, fresh: true,
	}
	return nil
}

// newChild is newInode for a child of dir in shard s, which takes from dir what that hands down.
func (ch *change) newChild(in, dir *Inode, s sealfs.Shard, mode uint32) error {
	a, err := handedDown(ch.tx, ch.c, dir)
	if err != nil {
		return err
	}
	return ch.newChildWith(in, dir, s, mode, a)
}

// newChildWith is newChild for who knows the ACL that dir hands down.
func (ch *change) newChildWith(in, dir *Inode, s sealfs.Shard, mode uint32, a acl) error {
	if err := ch.newInode(in, s, dir.Volume, mode); err != nil {
		return err
	}
	in.inherit(dir, a, ch.req.Valid)
	in.born(dir, s, ch.c.Shards)
	if in.isLink() {
		return nil
	}
	return ch.giveACL(in, a)
}

// inherit makes mode and group of a new child of dir what they are to be: a directory with
// the setgid bit hands down its group, and to directories the bit; an ACL that it hands
// down bounds the mode in place of the umask. A symbolic link has no permissions.
func (in *Inode) inherit(dir *Inode, a acl, umask uint32) {
	switch {
	case in.isLink():
	case a != nil:
		bits, _ := a.mode()
		in.Mode &= bits | ^uint32(0o777)
	default:
		in.Mode &^= umask & 0o777
	}
	if dir.Mode&setgid == 0 {
		return
	}
	in.GID = dir.GID
	if in.isDir() {
		in.Mode |= setgid
	}
}

// makeRoot makes the root directory of req.Volume, its own parent.
func (ch *change) makeRoot() error {
	var in Inode
	if err := ch.newInode(&in, ch.req.Shard, ch.req.Volume, typeDir|ch.req.Mode&permMask); err != nil {
		return err
	}
	in.Nlink = 2
	in.Parent = in.Ino
	in.Counted = true
	in.Attr(&ch.rep.Attr)
	return ch.put(&in)
}

// open loads the directory of the request and looks for its name.
func (ch *change) open(dir *Inode, e *Entry) (found bool, err error) {
	if err := ch.loadDir(ch.req.Dir, dir); err != nil {
		return false, err
	}
	if err := ch.touch(TouchName, dir.Ino, ch.req.Name); err != nil {
		return false, err
	}
	return findEntry(ch.tx, ch.c, dir, ch.req.Name, e)
}

// create makes a regular file. Without Excl it finds one that is there already,
// and then changes nothing.
func (ch *change) create() error {
	var dir, in Inode
	var e Entry
	found, err := ch.open(&dir, &e)
	if err != nil {
		return err
	}
	if !found {
		return ch.makeFile(&dir, &e, typeFile|ch.req.Mode&permMask, 0)
	}
	if ch.req.Flags&op.Excl != 0 {
		return refusal(sealfs.ErrExist)
	}
	switch e.Type {
	case typeFile >> 12:
	case typeDir >> 12:
		return refusal(sealfs.ErrIsDir)
	default:
		return refusal(sealfs.ErrExist)
	}
	ch.quiet = true
	if !ch.c.local(e.Ino) {
		ch.rep.Attr = e.attr()
		return nil
	}
	if err := ch.loadEntry(&e, &in); err != nil {
		return err
	}
	in.Attr(&ch.rep.Attr)
	return ch.touch(TouchLinks, in.Ino, "")
}

// mknod makes what is neither directory nor symlink.
func (ch *change) mknod() error {
	var dir Inode
	var e Entry
	found, err := ch.open(&dir, &e)
	if err != nil {
		return err
	}
	mode, rdev := ch.req.Mode&(typeMask|permMask), uint32(0)
	switch mode & typeMask {
	case 0:
		mode |= typeFile
	case typeChar, typeBlock:
		rdev = ch.req.Rdev
	case typeFile, typeFifo, typeSocket:
	default:
		return refusal(sealfs.ErrInvalid)
	}
	if found {
		return refusal(sealfs.ErrExist)
	}
	return ch.makeFile(&dir, &e, mode, rdev)
}

// makeFile makes an inode in the directory's shard, and its entry.
func (ch *change) makeFile(dir *Inode, e *Entry, mode, rdev uint32) error {
	var in Inode
	if err := ch.newChild(&in, dir, dir.Ino.Home(ch.c.Shards), mode); err != nil {
		return err
	}
	in.Rdev = rdev
	return ch.enter(dir, e, &in)
}

// enter writes the new inode in and its entry in dir, and answers in.
func (ch *change) enter(dir *Inode, e *Entry, in *Inode) error {
	if err := ch.addEntry(dir, e.Cookie, ch.req.Name, in); err != nil {
		return err
	}
	if in.fresh && in.Flags&flagSpread != 0 { // born in another shard than dir
		if err := ch.replace(in, 0, dir.self()); err != nil {
			return err
		}
	}
	dir.touch(ch.req.Time)
	if err := ch.putDir(dir); err != nil {
		return err
	}
	dir.Attr(&ch.rep.Dir)
	in.Attr(&ch.rep.Attr)
	return ch.put(in)
}

// mkdir makes a directory, its inode in shard req.Shard2, or beside dir's if dir hands
// down more than goes into a part of a transaction.
func (ch *change) mkdir() error {
	var dir, in Inode
	var e Entry
	if uint32(ch.req.Shard2) >= ch.c.Shards {
		return refusal(sealfs.ErrInvalid)
	}
	found, err := ch.open(&dir, &e)
	if err != nil {
		return err
	}
	if found {
		return refusal(sealfs.ErrExist)
	}
	if dir.Nlink >= sealfs.LinkMax {
		return refusal(sealfs.ErrTooManyLinks)
	}
	a, err := handedDown(ch.tx, ch.c, &dir)
	if err != nil {
		return err
	}
	mode, home := typeDir|ch.req.Mode&permMask, ch.req.Shard2
	if !a.travels() {
		home = ch.req.Shard
	}
	if ch.c.Local != nil && !ch.c.Local(home) {
		err = ch.votedChild(&in, &dir, mode, a)
	} else if len(ch.req.Votes) > 0 {
		err = refusal(sealfs.ErrStale) // what dir hands down has changed since
	} else {
		err = ch.newChildWith(&in, &dir, home, mode, a)
	}
	if err != nil {
		return err
	}
	in.Nlink = 2
	in.Parent = dir.self()
	dir.Nlink++
	return ch.enter(&dir, &e, &in)
}

// symlinkPart is how much of a long target one row holds, in bytes.
const symlinkPart = 900

// symlink makes a symbolic link to req.Data.
func (ch *change) symlink() error {
	target := ch.req.Data
	switch {
	case len(target) > sealfs.SymlinkMax:
		return refusal(sealfs.ErrNameTooLong)
	case len(target) == 0 || bytes.IndexByte(target, 0) >= 0:
		return refusal(sealfs.ErrInvalid)
	}
	var dir, in Inode
	var e Entry
	found, err := ch.open(&dir, &e)
	if err != nil {
		return err
	}
	if found {
		return refusal(sealfs.ErrExist)
	}
	if err := ch.newChild(&in, &dir, dir.Ino.Home(ch.c.Shards), typeLink|0o777); err != nil {
		return err
	}
	in.Size = uint64(len(target))
	if len(target) <= inlineTarget {
		in.Target = target
		return ch.enter(&dir, &e, &in)
	}
	for part := 0; len(target) > 0; part++ {
		n := min(len(target), symlinkPart)
		k := SymlinkKey(ch.c.Shards, in.Ino, uint8(part))
		if err := ch.tx.Set(k[:], target[:n]); err != nil {
			return err
		}
		target = target[n:]
	}
	return ch.enter(&dir, &e, &in)
}

// tmpfile makes a regular file without a name, in the orphan table from the
// start: only whoever holds it open keeps it. With Excl it can never get a name.
func (ch *change) tmpfile() error {
	var dir, in Inode
	if err := ch.loadDir(ch.req.Dir, &dir); err != nil {
		return err
	}
	if err := ch.newChild(&in, &dir, dir.Ino.Home(ch.c.Shards), typeFile|ch.req.Mode&permMask); err != nil {
		return err
	}
	in.Nlink = 0
	if in.Parent != 0 {
		in.Parent = 0
		in.Flags |= flagSpread
	}
	if ch.req.Flags&op.Excl == 0 {
		in.Flags |= flagLinkable
	}
	if err := ch.setOrphan(in.Ino, orphanNameless); err != nil {
		return err
	}
	in.Attr(&ch.rep.Attr)
	ch.rep.Held = in.Ino
	return ch.put(&in)
}

// link gives req.Ino another name, or a Tmpfile its first.
func (ch *change) link() error {
	var dir, in Inode
	var e Entry
	found, err := ch.open(&dir, &e)
	if err != nil {
		return err
	}
	err = ch.load(ch.req.Ino, &in)
	if _, foreign := err.(*Foreign); foreign && found {
		return refusal(sealfs.ErrExist)
	}
	if err == nil {
		err = in.refuseLink(&dir)
	}
	if err != nil {
		return err
	}
	if found {
		return refusal(sealfs.ErrExist)
	}
	if err := ch.rehome(&in, 0, dir.self()); err != nil {
		return err
	}
	if err := ch.addLink(&in, ch.req.Time); err != nil {
		return err
	}
	return ch.enter(&dir, &e, &in)
}

// refuseLink says why in cannot get another name in dir.
func (in *Inode) refuseLink(dir *Inode) error {
	switch {
	case in.isDir():
		return refusal(sealfs.ErrPerm)
	case in.foreign:
		return nil // its own store has looked at the rest
	case in.Nlink == 0 && in.Flags&flagLinkable == 0: // a dying inode never is linkable
		return refusal(sealfs.ErrNotExist)
	case in.Volume != dir.Volume:
		return refusal(sealfs.ErrCrossDevice)
	case in.Nlink >= sealfs.LinkMax:
		return refusal(sealfs.ErrTooManyLinks)
	}
	return nil
}

// addLink counts another name of in, whose record the caller writes.
func (ch *change) addLink(in *Inode, now int64) error {
	if err := ch.touch(TouchLinks, in.Ino, ""); err != nil {
		return err
	}
	if in.Nlink == 0 && !in.foreign {
		if err := ch.clearOrphan(in.Ino, orphanNameless); err != nil {
			return err
		}
		in.Flags &^= flagLinkable
	}
	in.Nlink++
	in.change(now)
	return nil
}
