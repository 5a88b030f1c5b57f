package oracle

import (
	"cmp"
	"slices"

	"sealfs"
	"sealfs/op"
)

func (fs *FS) makeRoot(req *op.Request, rep *op.Reply, now int64) sealfs.Code {
	in := fs.allocate(req.Shard, req.Volume, typeDir|req.Mode&permMask, req, now)
	in.parent = in.attr.Ino
	rep.Attr = in.attr
	return 0
}

// child makes an inode in shard s below dir, which hands down its group when it
// has the setgid bit, and to directories the bit, and its default ACL.
func (fs *FS) child(req *op.Request, dir *inode, s sealfs.Shard, mode uint32, now int64) *inode {
	in := fs.allocate(s, dir.volume, mode, req, now)
	if dir.attr.Mode&setgid != 0 {
		in.attr.GID = dir.attr.GID
		if in.isDir() {
			in.attr.Mode |= setgid
		}
	}
	in.inherit(dir, req.Valid)
	return in
}

// enter gives in the name of the request in dir, and answers it.
func (fs *FS) enter(req *op.Request, rep *op.Reply, dir, in *inode, now int64) sealfs.Code {
	dir.cookies++
	dir.entries[req.Name] = &entry{in.attr.Ino, dir.cookies}
	dir.attr.Size++
	dir.touched(now)
	rep.Attr = fs.seen(in, req.Shard)
	return 0
}

func (fs *FS) open(req *op.Request, ino sealfs.Ino) {
	if req.Flags&op.OpenIt != 0 {
		fs.holds[hold{req.Session, ino}]++
	}
}

func (fs *FS) create(req *op.Request, rep *op.Reply, dir *inode, now int64) sealfs.Code {
	if e := dir.entries[req.Name]; e != nil {
		in := fs.inodes[e.ino]
		switch {
		case req.Flags&op.Excl != 0:
			return sealfs.ErrExist
		case in.isDir():
			return sealfs.ErrIsDir
		case !in.isFile():
			return sealfs.ErrExist
		}
		fs.open(req, e.ino)
		rep.Attr = in.attr
		return 0
	}
	in := fs.child(req, dir, req.Shard, typeFile|req.Mode&permMask, now)
	fs.open(req, in.attr.Ino)
	return fs.enter(req, rep, dir, in, now)
}

func (fs *FS) mknod(req *op.Request, rep *op.Reply, dir *inode, now int64) sealfs.Code {
	mode, rdev := req.Mode&(typeMask|permMask), uint32(0)
	switch mode & typeMask {
	case 0:
		mode |= typeFile
	case typeChar, typeBlock:
		rdev = req.Rdev
	case typeFile, typeFifo, typeSock:
	default:
		return sealfs.ErrInvalid
	}
	if dir.entries[req.Name] != nil {
		return sealfs.ErrExist
	}
	in := fs.child(req, dir, req.Shard, mode, now)
	in.attr.Rdev = rdev
	return fs.enter(req, rep, dir, in, now)
}

func (fs *FS) mkdir(req *op.Request, rep *op.Reply, dir *inode, now int64) sealfs.Code {
	switch {
	case uint32(req.Shard2) >= fs.shards:
		return sealfs.ErrInvalid
	case dir.entries[req.Name] != nil:
		return sealfs.ErrExist
	case dir.attr.Nlink >= sealfs.LinkMax:
		return sealfs.ErrTooManyLinks
	}
	home := req.Shard2
	if len(dir.xattrs[op.ACLDefault]) > aclMovesMax {
		home = req.Shard
	}
	in := fs.child(req, dir, home, typeDir|req.Mode&permMask, now)
	in.parent = dir.attr.Ino
	dir.attr.Nlink++
	return fs.enter(req, rep, dir, in, now)
}

func (fs *FS) symlink(req *op.Request, rep *op.Reply, dir *inode, now int64) sealfs.Code {
	switch {
	case len(req.Data) == 0:
		return sealfs.ErrInvalid
	case len(req.Data) > sealfs.SymlinkMax:
		return sealfs.ErrNameTooLong
	case dir.entries[req.Name] != nil:
		return sealfs.ErrExist
	}
	in := fs.child(req, dir, req.Shard, typeLink|0o777, now)
	in.target = string(req.Data)
	in.attr.Size = uint64(len(req.Data))
	return fs.enter(req, rep, dir, in, now)
}

func (fs *FS) tmpfile(req *op.Request, rep *op.Reply, dir *inode, now int64) sealfs.Code {
	in := fs.child(req, dir, req.Shard, typeFile|req.Mode&permMask, now)
	in.attr.Nlink, in.final = 0, req.Flags&op.Excl != 0
	fs.open(req, in.attr.Ino)
	rep.Attr = in.attr
	fs.free(in)
	return 0
}

func (fs *FS) link(req *op.Request, rep *op.Reply, dir *inode, now int64) sealfs.Code {
	in := fs.inodes[req.Ino]
	switch {
	case in == nil:
		return sealfs.ErrNotExist
	case in.isDir():
		return sealfs.ErrPerm
	case in.final:
		return sealfs.ErrNotExist
	case in.volume != dir.volume:
		return sealfs.ErrCrossDevice
	case dir.entries[req.Name] != nil:
		return sealfs.ErrExist
	case in.attr.Nlink >= sealfs.LinkMax:
		return sealfs.ErrTooManyLinks
	}
	in.attr.Nlink++
	in.changed(now)
	return fs.enter(req, rep, dir, in, now)
}

// remove is Unlink and Rmdir.
func (fs *FS) remove(req *op.Request, rep *op.Reply, dir *inode, now int64) sealfs.Code {
	e := dir.entries[req.Name]
	if e == nil {
		return sealfs.ErrNotExist
	}
	in := fs.inodes[e.ino]
	switch {
	case req.Type == op.Unlink && in.isDir():
		return sealfs.ErrIsDir
	case req.Type == op.Rmdir && !in.isDir():
		return sealfs.ErrNotDir
	case len(in.entries) > 0:
		return sealfs.ErrNotEmpty
	}
	delete(dir.entries, req.Name)
	dir.attr.Size--
	if in.isDir() {
		dir.attr.Nlink--
	}
	dir.touched(now)
	fs.dropLink(in, now)
	rep.Attr = in.attr
	return 0
}

// dropLink takes a name from in: a directory has only one.
func (fs *FS) dropLink(in *inode, now int64) {
	in.changed(now)
	if in.attr.Nlink--; in.isDir() {
		in.attr.Nlink = 0
	}
	in.final = in.attr.Nlink == 0
	fs.free(in)
}

func (fs *FS) rename(req *op.Request, rep *op.Reply, from *inode, now int64) sealfs.Code {
	if code := checkName(req.Name2); code != 0 {
		return code
	}
	exchange, noReplace := req.Flags&op.Exchange != 0, req.Flags&op.NoReplace != 0
	if exchange && noReplace {
		return sealfs.ErrInvalid
	}
	to := fs.inodes[req.Dir2]
	switch {
	case to == nil:
		return sealfs.ErrNotExist
	case !to.isDir():
		return sealfs.ErrNotDir
	case to.attr.Nlink == 0:
		return sealfs.ErrNotExist
	case to.volume != from.volume:
		return sealfs.ErrCrossDevice
	}
	src, dst := from.entries[req.Name], to.entries[req.Name2]
	switch {
	case src == nil:
		return sealfs.ErrNotExist
	case dst != nil && noReplace:
		return sealfs.ErrExist
	case dst == nil && exchange:
		return sealfs.ErrNotExist
	}
	moved := fs.inodes[src.ino]
	if dst != nil && dst.ino == src.ino {
		rep.Attr = moved.attr // the same file under two names: nothing happens
		return 0
	}
	var other *inode
	if dst != nil {
		other = fs.inodes[dst.ino]
	}
	if fs.below(to, moved) || exchange && fs.below(from, other) {
		return sealfs.ErrInvalid
	}
	if exchange {
		fs.reparent(moved, from, to)
		fs.reparent(other, to, from)
		src.ino, dst.ino = dst.ino, src.ino
		other.changed(now)
	} else {
		if other != nil {
			switch {
			case moved.isDir() && !other.isDir():
				return sealfs.ErrNotDir
			case !moved.isDir() && other.isDir():
				return sealfs.ErrIsDir
			case len(other.entries) > 0:
				return sealfs.ErrNotEmpty
			}
		}
		fs.reparent(moved, from, to)
		delete(from.entries, req.Name)
		from.attr.Size--
		if other != nil {
			dst.ino = src.ino
			if other.isDir() {
				to.attr.Nlink--
			}
			fs.dropLink(other, now)
		} else {
			to.cookies++
			to.entries[req.Name2] = &entry{src.ino, to.cookies}
			to.attr.Size++
		}
	}
	from.touched(now)
	if to != from {
		to.touched(now)
	}
	moved.changed(now)
	rep.Attr = moved.attr
	return 0
}

// below reports whether dir is top or lies below it.
func (fs *FS) below(dir, top *inode) bool {
	for {
		if dir == top {
			return true
		}
		if dir.parent == dir.attr.Ino {
			return false
		}
		dir = fs.inodes[dir.parent]
	}
}

// reparent moves the ".." of in, if it is a directory.
func (fs *FS) reparent(in, from, to *inode) {
	if in.isDir() {
		in.parent = to.attr.Ino
		from.attr.Nlink--
		to.attr.Nlink++
	}
}

func (fs *FS) lookup(req *op.Request, rep *op.Reply, dir *inode) sealfs.Code {
	e := dir.entries[req.Name]
	if e == nil {
		return sealfs.ErrNotExist
	}
	rep.Attr = fs.seen(fs.inodes[e.ino], req.Shard)
	return 0
}

// readdir answers entries by their cookies, always one at least unless none is left.
func (fs *FS) readdir(req *op.Request, rep *op.Reply, dir *inode) sealfs.Code {
	var all []op.Dirent
	for name, e := range dir.entries {
		if e.cookie > req.Off {
			in := fs.inodes[e.ino]
			d := op.Dirent{Name: name, Ino: e.ino, Cookie: e.cookie, Type: uint8(in.attr.Mode >> 12 & 0xf)}
			if req.Flags&op.Plus != 0 && fs.same(e.ino, req.Shard) {
				d.Attr = in.attr
			}
			all = append(all, d)
		}
	}
	slices.SortFunc(all, func(a, b op.Dirent) int { return cmp.Compare(a.Cookie, b.Cookie) })
	var size, attr uint64
	if req.Flags&op.Plus != 0 {
		attr = 128
	}
	for i := range all {
		if size += 24 + uint64(len(all[i].Name)) + attr; i > 0 && size > req.Len {
			return 0
		}
		rep.Entries = append(rep.Entries, all[i])
	}
	rep.Eof = true
	return 0
}
