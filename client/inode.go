package client

import (
	"bytes"
	"context"

	"sealfs"
	"sealfs/op"
)

// attrs sends k, ends it and returns the attributes of the reply, and what may be believed of them.
func (c *Client) attrs(ctx context.Context, k *call) (answer, error) {
	err := c.do(ctx, k)
	a := k.answer()
	k.end()
	return a, err
}

// none sends k, ends it and returns the error.
func (c *Client) none(ctx context.Context, k *call) error {
	err := c.do(ctx, k)
	k.end()
	return err
}

// lookupMax is how often a name is looked up whose inode is gone when its home is asked.
const lookupMax = 8

// Lookup finds name in dir.
func (c *Client) Lookup(ctx context.Context, dir sealfs.Ino, name string) (op.Attr, error) {
	a, err := c.lookup(ctx, dir, name)
	return a.Attr, err
}

func (c *Client) lookup(ctx context.Context, dir sealfs.Ino, name string) (answer, error) {
	if b := c.absent(dir, name); b != 0 {
		return answer{dir: b, mark: c.leases.mark()}, sealfs.ErrNotExist
	}
	for tries := 1; ; tries++ {
		mark := c.sent.mark()
		k := c.begin(op.Lookup, dir)
		k.Dir, k.Name = dir, name
		a, err := c.attrs(ctx, k)
		if err != nil {
			return a, err
		}
		if a.Version != 0 && c.current(mark, a.Ino) {
			name, at := a.dir, a.at
			a, err = c.whole(ctx, a, nil)
			a.dir, a.at = name, at
			return a, err
		}
		partial, name, at := a.Version == 0, a.dir, a.at
		a, err = c.getattr(ctx, a.Ino)
		a.dir, a.at = name, at
		if !partial || err != sealfs.ErrNotExist || tries >= lookupMax {
			return a, err
		}
		// The inode went, and its name with it or to another inode.
	}
}

// complete asks for the rest of attributes that came with a name that was made in another
// store than the inode's. Where others have removed it since, what is known is all there is to tell: it was made.
func (c *Client) complete(ctx context.Context, a answer, err error) (answer, error) {
	if err != nil || a.Version != 0 {
		return a, err
	}
	all, err := c.getattr(ctx, a.Ino)
	if err == sealfs.ErrNotExist {
		return a, nil
	}
	all.dir, all.at = a.dir, a.at
	return all, err
}

// Getattr returns the attributes of ino, delayed writes included.
func (c *Client) Getattr(ctx context.Context, ino sealfs.Ino) (op.Attr, error) {
	a, err := c.getattr(ctx, ino)
	return a.Attr, err
}

func (c *Client) getattr(ctx context.Context, ino sealfs.Ino) (answer, error) {
	if err := c.settle(ctx, ino); err != nil {
		return answer{}, err
	}
	k := c.begin(op.Getattr, ino)
	k.Ino = ino
	a, err := c.attrs(ctx, k)
	c.seen(&a.Attr)
	return c.whole(ctx, a, err)
}

// SetAttr says which attributes Setattr changes to what.
type SetAttr struct {
	Valid    uint32 // the op.Set bits of what is to be changed
	Mode     uint32
	Cred     // new owner, new group
	Size     uint64
	Atime    int64 // nanoseconds since 1970
	Mtime    int64
	Ctime    int64
	KillPriv bool // clear the setuid and setgid bits, as a change by another than the owner does
}

// Setattr changes attributes and returns all.
func (c *Client) Setattr(ctx context.Context, ino sealfs.Ino, s *SetAttr) (op.Attr, error) {
	a, err := c.setattr(ctx, ino, s)
	return a.Attr, err
}

func (c *Client) setattr(ctx context.Context, ino sealfs.Ino, s *SetAttr) (answer, error) {
	// A delayed write that came first must not undo a new size or time.
	if err := c.settle(ctx, ino); err != nil {
		return answer{}, err
	}
	n := c.nodes.get(ino)
	c.changes(n)
	defer c.dropEarly(n)
	k := c.begin(op.Setattr, ino)
	k.Ino, k.Valid, k.Mode, k.UID, k.GID = ino, s.Valid, s.Mode, s.UID, s.GID
	k.Size, k.Atime, k.Mtime, k.Ctime = s.Size, s.Atime, s.Mtime, s.Ctime
	if s.KillPriv {
		k.Flags = op.KillPriv
	}
	a, err := c.attrs(ctx, k)
	if s.Valid&op.SetSize != 0 {
		c.resized(ino)
	}
	return c.whole(ctx, a, err)
}

// Create makes the regular file name in dir and holds it open until Release.
// The name must be new.
func (c *Client) Create(ctx context.Context, dir sealfs.Ino, name string, mode uint32, who Cred) (op.Attr, error) {
	a, err := c.create(ctx, dir, name, mode, who)
	return a.Attr, err
}

func (c *Client) create(ctx context.Context, dir sealfs.Ino, name string, mode uint32, who Cred) (answer, error) {
	k := c.begin(op.Create, dir)
	k.Dir, k.Name, k.Mode, k.UID, k.GID, k.Flags = dir, name, mode, who.UID, who.GID, op.Excl|op.OpenIt
	k.Valid = who.Umask & 0o777
	return c.open(ctx, k)
}

// Tmpfile makes a regular file without a name and holds it open until Release.
// dir says where Link may put it.
func (c *Client) Tmpfile(ctx context.Context, dir sealfs.Ino, mode uint32, who Cred) (op.Attr, error) {
	a, err := c.tmpfile(ctx, dir, mode, who)
	return a.Attr, err
}

func (c *Client) tmpfile(ctx context.Context, dir sealfs.Ino, mode uint32, who Cred) (answer, error) {
	k := c.begin(op.Tmpfile, dir)
	k.Dir, k.Mode, k.UID, k.GID, k.Flags = dir, mode, who.UID, who.GID, op.OpenIt
	k.Valid = who.Umask & 0o777
	return c.open(ctx, k)
}

// Mknod makes a regular file, device, fifo or socket, as the type in mode says.
func (c *Client) Mknod(ctx context.Context, dir sealfs.Ino, name string, mode, rdev uint32, who Cred) (op.Attr, error) {
	a, err := c.mknod(ctx, dir, name, mode, rdev, who)
	return a.Attr, err
}

func (c *Client) mknod(ctx context.Context, dir sealfs.Ino, name string, mode, rdev uint32, who Cred) (answer, error) {
	k := c.begin(op.Mknod, dir)
	k.Dir, k.Name, k.Mode, k.Rdev, k.UID, k.GID = dir, name, mode, rdev, who.UID, who.GID
	k.Valid = who.Umask & 0o777
	return c.attrs(ctx, k)
}

// Mkdir makes a directory.
func (c *Client) Mkdir(ctx context.Context, dir sealfs.Ino, name string, mode uint32, who Cred) (op.Attr, error) {
	a, err := c.mkdir(ctx, dir, name, mode, who)
	return a.Attr, err
}

func (c *Client) mkdir(ctx context.Context, dir sealfs.Ino, name string, mode uint32, who Cred) (answer, error) {
	k := c.begin(op.Mkdir, dir)
	k.Dir, k.Name, k.Mode, k.UID, k.GID = dir, name, mode, who.UID, who.GID
	k.Valid = who.Umask & 0o777
	k.Shard2 = c.spread(dir, name)
	a, err := c.attrs(ctx, k)
	if err == nil && a.Version == 0 {
		a.Mode, a.UID, a.GID = modeDir|mode&^who.Umask, who.UID, who.GID
	}
	return c.complete(ctx, a, err)
}

// Symlink makes a symbolic link to target.
func (c *Client) Symlink(ctx context.Context, dir sealfs.Ino, name, target string, who Cred) (op.Attr, error) {
	a, err := c.symlink(ctx, dir, name, target, who)
	return a.Attr, err
}

func (c *Client) symlink(ctx context.Context, dir sealfs.Ino, name, target string, who Cred) (answer, error) {
	k := c.begin(op.Symlink, dir)
	k.Dir, k.Name, k.Data, k.UID, k.GID = dir, name, []byte(target), who.UID, who.GID
	return c.attrs(ctx, k)
}

// Link gives ino another name and returns its attributes.
func (c *Client) Link(ctx context.Context, ino, dir sealfs.Ino, name string) (op.Attr, error) {
	a, err := c.link(ctx, ino, dir, name)
	return a.Attr, err
}

func (c *Client) link(ctx context.Context, ino, dir sealfs.Ino, name string) (answer, error) {
	if err := c.settle(ctx, ino); err != nil {
		return answer{}, err
	}
	k := c.begin(op.Link, dir)
	k.Ino, k.Dir, k.Name = ino, dir, name
	a, err := c.attrs(ctx, k)
	return c.complete(ctx, a, err)
}

// Unlink removes a name that is not a directory's.
func (c *Client) Unlink(ctx context.Context, dir sealfs.Ino, name string) error {
	k := c.begin(op.Unlink, dir)
	k.Dir, k.Name = dir, name
	return c.none(ctx, k)
}

// Rmdir removes an empty directory.
func (c *Client) Rmdir(ctx context.Context, dir sealfs.Ino, name string) error {
	k := c.begin(op.Rmdir, dir)
	k.Dir, k.Name = dir, name
	return c.none(ctx, k)
}

// Rename moves a name; flags are op.NoReplace or op.Exchange.
func (c *Client) Rename(ctx context.Context, dir sealfs.Ino, name string, dir2 sealfs.Ino, name2 string, flags op.Flags) error {
	_, err := c.rename(ctx, dir, name, dir2, name2, flags)
	return err
}

// rename is Rename that says what was moved.
func (c *Client) rename(ctx context.Context, dir sealfs.Ino, name string, dir2 sealfs.Ino, name2 string, flags op.Flags) (answer, error) {
	k := c.begin(op.Rename, dir)
	k.Dir, k.Name, k.Dir2, k.Name2, k.Flags = dir, name, dir2, name2, flags
	return c.attrs(ctx, k)
}

// Readlink returns the target of a symbolic link.
func (c *Client) Readlink(ctx context.Context, ino sealfs.Ino) ([]byte, error) {
	b, _, err := c.readlink(ctx, ino)
	return b, err
}

// readlink is Readlink that also returns attributes.
func (c *Client) readlink(ctx context.Context, ino sealfs.Ino) ([]byte, op.Attr, error) {
	k := c.begin(op.Readlink, ino)
	k.Ino = ino
	err := c.do(ctx, k)
	b, a := k.rep.Data, k.rep.Attr
	k.end()
	return b, a, err
}

// Open holds ino open until Release, so that it outlives its name, and returns
// its attributes.
func (c *Client) Open(ctx context.Context, ino sealfs.Ino) (op.Attr, error) {
	a, err := c.openFor(ctx, ino, 0, 0)
	return a.Attr, err
}

// OpenToWrite is Open for somebody who is going to write: his writes may be
// delayed, unless others have the file open meanwhile.
func (c *Client) OpenToWrite(ctx context.Context, ino sealfs.Ino) (op.Attr, error) {
	a, err := c.openFor(ctx, ino, 0, op.WantWrite)
	return a.Attr, err
}

// openFor is Open that also wants the content of a file of at most n bytes, or flags op.WantWrite.
func (c *Client) openFor(ctx context.Context, ino sealfs.Ino, n uint64, flags op.Flags) (answer, error) {
	if err := c.settle(ctx, ino); err != nil {
		return answer{}, err
	}
	k := c.begin(op.Open, ino)
	k.Ino, k.Len, k.Flags = ino, n, flags
	a, err := c.open(ctx, k)
	c.seen(&a.Attr)
	return a, err
}

// Readdir appends entries of dir after cookie (0: from the start) to list, for
// about n bytes of names, with attributes if plus. eof says that no more follow.
// "." and ".." are not among them.
func (c *Client) Readdir(ctx context.Context, dir sealfs.Ino, cookie uint64, n int, plus bool, list []op.Dirent) (_ []op.Dirent, eof bool, err error) {
	r := listing{entries: list}
	err = c.readdir(ctx, dir, cookie, n, plus, &r)
	return r.entries, r.eof, err
}

// listing is what a Readdir is answered.
type listing struct {
	entries []op.Dirent
	eof     bool
	at      sealfs.Ino // the directory, or partition of it, that the entries are from
	dir     belief     // of at
	each    []belief   // of each entry, that has attributes or not
}

// readdir is Readdir that also says what may be believed. Entries that it appends are all from
// one place; it appends none only at the end.
func (c *Client) readdir(ctx context.Context, dir sealfs.Ino, cookie uint64, n int, plus bool, list *listing) error {
	before := len(list.entries)
	var r redo
	for {
		at, next := c.readdirAt(dir, cookie)
		err := c.readdirFrom(ctx, at, cookie, n, plus, list)
		switch {
		case err == sealfs.ErrStale, err == sealfs.ErrNotExist && at != dir:
			if err := r.again(ctx, c, nil, sealfs.ErrStale); err != nil {
				return err
			}
			if _, _, err := c.learnSplit(ctx, dir); err != nil {
				return err
			}
			continue
		case err != nil:
			return err
		}
		if list.eof && next != 0 {
			list.eof = false
			if len(list.entries) == before {
				cookie = next
				continue
			}
		}
		return nil
	}
}

// readdirFrom is readdir in one place.
func (c *Client) readdirFrom(ctx context.Context, at sealfs.Ino, cookie uint64, n int, plus bool, list *listing) error {
	mark := c.sent.mark()
	k := c.begin(op.Readdir, at)
	k.Dir, k.Off, k.Len, k.layout = at, cookie, uint64(n), true
	if plus {
		k.Flags = op.Plus
	}
	err := c.do(ctx, k)
	if err == nil {
		for i := range k.rep.Entries {
			e := &k.rep.Entries[i]
			if plus && e.Attr.Ino != 0 && (e.Attr.Version == 0 || e.Attr.IsSplit() || !c.current(mark, e.Ino)) {
				// Its store does not know all, or a delayed write is on its way: the
				// caller has to ask for this one.
				e.Attr = op.Attr{}
			}
		}
		list.entries = append(list.entries, k.rep.Entries...)
		list.eof, list.at, list.dir = k.rep.Eof, at, k.dir
		list.each = append(list.each, k.each...)
		for len(list.each) < len(list.entries) {
			list.each = append(list.each, 0)
		}
	}
	k.end()
	return err
}

// Getxattr appends the value of an attribute to dst, at most n bytes (0: none),
// and returns its size.
func (c *Client) Getxattr(ctx context.Context, ino sealfs.Ino, name string, n int, dst []byte) ([]byte, int, error) {
	if name == PartitionsName {
		v, err := c.partitionsValue(ctx, ino)
		switch {
		case err != nil:
			return dst, 0, err
		case n == 0:
			return dst, len(v), nil
		case len(v) > n:
			return dst, 0, sealfs.ErrRange
		}
		return append(dst, v...), len(v), nil
	}
	k := c.begin(op.Getxattr, ino)
	k.Ino, k.Name, k.Len = ino, name, uint64(n)
	err := c.do(ctx, k)
	dst = append(dst, k.rep.Data...)
	size := int(k.rep.Off)
	k.end()
	return dst, size, err
}

// Listxattr appends the names of all attributes, each ended by NUL, to dst, at
// most n bytes (0: none), and returns their size.
func (c *Client) Listxattr(ctx context.Context, ino sealfs.Ino, n int, dst []byte) ([]byte, int, error) {
	k := c.begin(op.Listxattr, ino)
	k.Ino, k.Len = ino, uint64(n)
	err := c.do(ctx, k)
	dst = append(dst, k.rep.Data...)
	size := int(k.rep.Off)
	k.end()
	return dst, size, err
}

// capability is the attribute that gives a program privileges; a write to the file takes it away.
const capability = "security.capability"

// Setxattr sets an attribute; flags are op.XCreate or op.XReplace. Under the names
// op.ACLAccess and op.ACLDefault that is a POSIX ACL; then op.KillPriv is the only flag.
func (c *Client) Setxattr(ctx context.Context, ino sealfs.Ino, name string, value []byte, flags op.Flags) error {
	k := c.begin(op.Setxattr, ino)
	k.Ino, k.Name, k.Data, k.Flags = ino, name, value, flags
	err := c.none(ctx, k)
	if err == nil && name == capability {
		c.nodes.markCapability(ino)
	}
	return err
}

// Removexattr removes an attribute.
func (c *Client) Removexattr(ctx context.Context, ino sealfs.Ino, name string) error {
	k := c.begin(op.Removexattr, ino)
	k.Ino, k.Name = ino, name
	return c.none(ctx, k)
}

// TestLock returns a lock that is in the way of l, or one of type op.Unlock.
// flags is op.Flock or 0.
func (c *Client) TestLock(ctx context.Context, ino sealfs.Ino, l op.Lock, flags op.Flags) (op.Lock, error) {
	k := c.begin(op.TestLock, ino)
	k.Ino, k.Lock, k.Flags = ino, l, flags
	err := c.do(ctx, k)
	l = k.rep.Lock
	k.end()
	return l, err
}

// SetLock takes or releases a lock without waiting: sealfs.ErrAgain says that it
// is taken. flags is op.Flock or 0.
func (c *Client) SetLock(ctx context.Context, ino sealfs.Ino, l op.Lock, flags op.Flags) error {
	return c.lock(ctx, op.SetLock, ino, l, flags)
}

// WaitLock is SetLock that waits until the lock is free or ctx ends. It returns
// sealfs.ErrDeadlock for a POSIX lock that would be waited for for ever: the owner holds, at
// the end of a chain, what it waits for. flags op.OFD says that the owner waits in any case.
func (c *Client) WaitLock(ctx context.Context, ino sealfs.Ino, l op.Lock, flags op.Flags) error {
	return c.lock(ctx, op.WaitLock, ino, l, flags)
}

func (c *Client) lock(ctx context.Context, t op.Type, ino sealfs.Ino, l op.Lock, flags op.Flags) error {
	if l.Type == op.Unlock {
		// The next owner, on whatever machine, must find what was written under the lock.
		if err := c.settle(ctx, ino); err != nil {
			return err
		}
	} else if flags&op.Flock == 0 {
		c.nodes.markLocked(ino)
	}
	k := c.begin(t, ino)
	k.Ino, k.Lock, k.Flags = ino, l, flags
	if l.Type == op.Unlock {
		return c.insist(ctx, k)
	}
	err := c.do(ctx, k)
	if err == errGaveUp && k.unsure {
		err = errUnsure
	}
	k.end()
	return err
}

// DropOwner releases all POSIX locks of owner on ino, or with flags op.Flock its
// flock, in the background if ctx ends first.
func (c *Client) DropOwner(ctx context.Context, ino sealfs.Ino, owner uint64, flags op.Flags) error {
	err := c.settle(ctx, ino)
	if err != nil {
		if c.life.Err() == nil {
			go c.DropOwner(c.life, ino, owner, flags) // the locks must go, and after the data
		}
		return err
	}
	k := c.begin(op.DropOwner, ino)
	k.Ino, k.Lock.Owner, k.Flags = ino, owner, flags
	return c.insist(ctx, k)
}

// CopyRange copies up to n bytes from one file to another, or within one, and
// returns how many; fewer come only at the end of the source. The ranges must not overlap.
func (c *Client) CopyRange(ctx context.Context, from sealfs.Ino, off uint64, to sealfs.Ino, off2, n uint64, flags op.Flags) (uint64, error) {
	buf := bigBuffers.Get().(*[bufferMax]byte)
	defer bigBuffers.Put(buf)
	var done uint64
	for done < n {
		part := int(min(n-done, uint64(len(buf))))
		b, err := c.Read(ctx, from, off+done, part, buf[:0])
		if err != nil || len(b) == 0 {
			return done, err
		}
		m, err := c.write(ctx, to, off2+done, b, flags)
		done += uint64(m)
		if err != nil {
			return done, err
		}
		if len(b) < part || ctx.Err() != nil {
			break
		}
	}
	return done, nil
}

// xattrNames splits a list of names ended by NUL.
func xattrNames(list []byte) []string {
	var names []string
	for len(list) > 0 {
		name, rest, _ := bytes.Cut(list, []byte{0})
		names = append(names, string(name))
		list = rest
	}
	return names
}
