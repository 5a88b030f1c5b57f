package meta

import (
	"sealfs"
	"sealfs/op"
)

// rename moves Name in Dir to Name2 in Dir2, as rename(2) and renameat2(2) say.
func (ch *change) rename() error {
	req := ch.req
	if err := checkName(req.Name2, sealfs.NameMax); err != nil {
		return err
	}
	exchange := req.Flags&op.Exchange != 0
	if exchange && req.Flags&op.NoReplace != 0 {
		return refusal(sealfs.ErrInvalid)
	}
	var from, into Inode
	if err := ch.loadDir(req.Dir, &from); err != nil {
		return err
	}
	to := &from // one directory must be one record
	if req.Dir2 != req.Dir {
		to = &into
		if err := ch.loadDir(req.Dir2, to); err != nil {
			return err
		}
		if !to.foreign && to.Volume != from.Volume {
			return refusal(sealfs.ErrCrossDevice)
		}
	}
	if err := ch.touch(TouchName, from.Ino, req.Name); err != nil {
		return err
	}
	if err := ch.touch(TouchName, to.Ino, req.Name2); err != nil {
		return err
	}
	var src, dst Entry
	found, err := findEntry(ch.tx, ch.c, &from, req.Name, &src)
	if err != nil {
		return err
	}
	if !found {
		return refusal(sealfs.ErrNotExist)
	}
	if to.foreign {
		// Its store has made sure that the name stands for this inode.
		found, dst = req.Ino != 0, Entry{Dir: to.Ino, Ino: req.Ino}
	} else if found, err = findEntry(ch.tx, ch.c, to, req.Name2, &dst); err != nil {
		return err
	}
	if !req.Tx.IsZero() && (uint64(src.Ino) != req.Off || dst.Ino != req.Ino) {
		return refusal(sealfs.ErrStale) // not what the other parties have prepared for
	}
	switch {
	case found && req.Flags&op.NoReplace != 0:
		return refusal(sealfs.ErrExist)
	case !found && exchange:
		return refusal(sealfs.ErrNotExist)
	}
	var moved, other Inode
	if found && src.Ino == dst.Ino {
		ch.quiet = true
		if ch.rep.Attr = src.attr(); !ch.c.local(src.Ino) {
			return nil
		}
		if err := ch.loadEntry(&src, &moved); err != nil {
			return err
		}
		moved.Attr(&ch.rep.Attr)
		return nil
	}
	if err := ch.loadEntry(&src, &moved); err != nil {
		return err
	}
	if found {
		if to.foreign {
			err = ch.load(dst.Ino, &other)
		} else {
			err = ch.loadEntry(&dst, &other)
		}
		if err != nil {
			return err
		}
	}
	if err := ch.touch(TouchLinks, moved.Ino, ""); err != nil {
		return err
	}
	if found && other.isDir() && !exchange {
		if err := ch.touch(TouchEmpty, other.Ino, ""); err != nil {
			return err
		}
	}
	if to.self() != from.self() && ch.c.Local != nil && req.Flags&op.Walked == 0 && (moved.isDir() || exchange && other.isDir()) {
		// What is above lies on other stores, and must stay as it is meanwhile.
		return &Foreign{Ino: moved.Ino}
	}
	if to.self() != from.self() && req.Flags&op.Walked == 0 {
		if err := ch.refuseLoop(&moved, to); err != nil {
			return err
		}
		if exchange {
			if err := ch.refuseLoop(&other, &from); err != nil {
				return err
			}
		}
	}
	if exchange {
		return ch.exchange(&from, to, &src, &dst, &moved, &other)
	}
	if found {
		switch {
		case moved.isDir() && !other.isDir():
			return refusal(sealfs.ErrNotDir)
		case !moved.isDir() && other.isDir():
			return refusal(sealfs.ErrIsDir)
		case other.isDir() && other.occupied():
			return refusal(sealfs.ErrNotEmpty)
		}
	}
	return ch.move(&from, to, &src, &dst, &moved, &other)
}

// move puts moved under the name of dst, in the place of other if that has an inode.
func (ch *change) move(from, to *Inode, src, dst *Entry, moved, other *Inode) error {
	now := ch.req.Time
	replaced := dst.Ino != 0
	if moved.isDir() {
		if err := from.loseSubdir(); err != nil {
			return err
		}
		to.Nlink++
		moved.Parent = to.self()
	}
	if replaced && other.isDir() {
		if err := to.loseSubdir(); err != nil {
			return err
		}
	}
	if to.Nlink > sealfs.LinkMax {
		return refusal(sealfs.ErrTooManyLinks)
	}
	if err := ch.dropEntry(from, src.Cookie, ch.req.Name, moved.Mode); err != nil {
		return err
	}
	if err := ch.rehome(moved, from.self(), to.self()); err != nil {
		return err
	}
	if replaced {
		if err := ch.rehome(other, to.self(), 0); err != nil {
			return err
		}
	}
	if to.foreign {
		// Its own store does it.
	} else if replaced {
		// The name keeps its cookie: who reads the directory sees it once.
		if err := ch.putEntry(to.Ino, dst.Cookie, ch.req.Name2, moved); err != nil {
			return err
		}
	} else if err := ch.addEntry(to, dst.Cookie, ch.req.Name2, moved); err != nil {
		return err
	}
	if err := ch.touchBoth(from, to); err != nil {
		return err
	}
	moved.change(now)
	if err := ch.put(moved); err != nil {
		return err
	}
	if replaced {
		if err := ch.dropLink(other, now); err != nil {
			return err
		}
	}
	moved.Attr(&ch.rep.Attr)
	return nil
}

// exchange lets two names change places.
func (ch *change) exchange(from, to *Inode, src, dst *Entry, moved, other *Inode) error {
	now := ch.req.Time
	if err := ch.touch(TouchLinks, other.Ino, ""); err != nil {
		return err
	}
	if moved.isDir() {
		if err := from.loseSubdir(); err != nil {
			return err
		}
		to.Nlink++
		moved.Parent = to.self()
	}
	if other.isDir() {
		if err := to.loseSubdir(); err != nil {
			return err
		}
		from.Nlink++
		other.Parent = from.self()
	}
	if to.Nlink > sealfs.LinkMax || from.Nlink > sealfs.LinkMax {
		return refusal(sealfs.ErrTooManyLinks)
	}
	ch.tellName(from, moved.Mode, -1)
	ch.tellName(from, other.Mode, 1)
	ch.tellName(to, moved.Mode, 1)
	ch.tellName(to, other.Mode, -1)
	if err := ch.rehome(moved, from.self(), to.self()); err != nil {
		return err
	}
	if err := ch.rehome(other, to.self(), from.self()); err != nil {
		return err
	}
	if err := ch.putEntry(from.Ino, src.Cookie, ch.req.Name, other); err != nil {
		return err
	}
	if to.foreign {
		// Its own store does it.
	} else if err := ch.putEntry(to.Ino, dst.Cookie, ch.req.Name2, moved); err != nil {
		return err
	}
	if err := ch.touchBoth(from, to); err != nil {
		return err
	}
	moved.change(now)
	other.change(now)
	if err := ch.put(moved); err != nil {
		return err
	}
	moved.Attr(&ch.rep.Attr)
	return ch.put(other)
}

// touchBoth notes a change of the directories' contents and writes them.
func (ch *change) touchBoth(from, to *Inode) error {
	from.touch(ch.req.Time)
	if err := ch.putDir(from); err != nil || to == from {
		return err
	}
	to.touch(ch.req.Time)
	return ch.putDir(to)
}

// refuseLoop refuses to move a directory into itself or below itself: it walks
// from the new parent up to the root.
func (ch *change) refuseLoop(moved, parent *Inode) error {
	if !moved.isDir() {
		return nil
	}
	var in Inode
	at, up := parent.Ino, parent.Parent
	mark, steps, limit := at, 0, 8 // Brent's: a loop in damaged parents comes back to mark
	for {
		if at == moved.Ino {
			return refusal(sealfs.ErrInvalid)
		}
		if up == at {
			return nil
		}
		if up == mark {
			return damaged("directory %d is its own ancestor", up)
		}
		if steps++; steps == limit {
			mark, steps, limit = up, 0, 2*limit
		}
		err := GetInode(ch.tx, ch.c, up, &in)
		if err == sealfs.ErrNotExist || err == nil && !in.isDir() {
			return damaged("directory %d has the parent %d, which is none", at, up)
		}
		if err != nil {
			return err
		}
		at, up = up, in.Parent
	}
}
