package client

import (
	"context"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/op"
)

// filesystem answers the kernel. A node id is an inode number, but for the root,
// which is node 1; so forgetting needs nothing. There are no file handles either:
// what a handle would remember, the kernel says with each request, and what
// belongs to a file stands in its node. The number of a handle contains that of the session
// under which the file was opened: it ends with that. And it is another one for
// each open file, for the sake of record locks.
//
// The cancel channels matter only where somebody may wait for another, or for a
// server: see interrupts.
type filesystem struct {
	fuse.RawFileSystem
	c *Client
	o MountOptions

	k          *kernel // nil without leases
	seen       seenVersions
	bare       bareInodes
	aclFlags   bool // SETXATTR has flags of its own
	interrupts interrupts
	locks      recordLocks
	handles    atomic.Uint64 // counts them
}

// ttl is a duration in the form in which the kernel takes it.
type ttl struct {
	sec  uint64
	nsec uint32
}

func makeTTL(d time.Duration) ttl {
	return ttl{uint64(d / time.Second), uint32(d % time.Second)}
}

func newFilesystem(c *Client, o MountOptions) *filesystem {
	f := &filesystem{RawFileSystem: fuse.NewDefaultRawFileSystem(), c: c, o: o}
	if c.leasing {
		f.k = newKernel(f.node)
	}
	return f
}

func (f *filesystem) String() string { return "sealfs" }

// Init is told what the kernel can do.
func (f *filesystem) Init(s *fuse.Server) {
	f.aclFlags = s.KernelSettings().Flags64()&fuse.CAP_SETXATTR_EXT != 0
}

// ino returns the inode that a node id stands for.
func (f *filesystem) ino(node uint64) sealfs.Ino {
	if node == fuse.FUSE_ROOT_ID {
		return f.c.o.Root
	}
	return sealfs.Ino(node)
}

// node is the way back.
func (f *filesystem) node(ino sealfs.Ino) uint64 {
	if ino == f.c.o.Root {
		return fuse.FUSE_ROOT_ID
	}
	return uint64(ino)
}

func cred(h *fuse.InHeader, umask uint32) Cred { return Cred{h.Uid, h.Gid, umask} }

// bg is the context of operations that wait for nobody else.
var bg = context.Background()

// handleBits is how much of a handle's number counts handles; the rest is of the session's.
const handleBits = 36

// handle returns the number of a handle of ino, which was just opened.
func (f *filesystem) handle(ino sealfs.Ino) uint64 {
	count := f.handles.Add(1) & (1<<handleBits - 1)
	if f.c.leasing {
		if n := f.c.nodes.get(ino); n != nil {
			return uint64(n.ses.Load().id)<<handleBits | count
		}
	}
	return count // no session's, or one's that has ended already
}

// lost reports whether a handle was opened under a session that has ended: who
// has it must not go on as if nothing had happened.
func (f *filesystem) lost(handle uint64) bool {
	s := f.c.ses.Load()
	return (handle^uint64(s.id)<<handleBits)>>handleBits != 0 || s.ended.Load()
}

// status translates an error. ENOSYS would make the kernel never ask again, so it is not said
// here; methods that mean it say it themselves.
func status(err error) fuse.Status {
	errno := Errno(err)
	if errno == syscall.ENOSYS {
		errno = syscall.EOPNOTSUPP
	}
	return fuse.Status(errno)
}

// inodeStatus is status for a request about an inode that the kernel has found under a name. If it
// is gone, another one may have that name by now: ESTALE lets the kernel look again.
func inodeStatus(err error) fuse.Status {
	if err == sealfs.ErrNotExist {
		return fuse.Status(syscall.ESTALE)
	}
	return status(err)
}

// blockSize is what programs shall read and write at once. It stays below the size
// from which the C library would map memory for every buffer.
const blockSize = 64 << 10

func fillAttr(out *fuse.Attr, a *op.Attr) {
	out.Ino = uint64(a.Ino)
	out.Size = a.Size
	out.Blocks = a.Blocks
	if a.Bound != 0 && a.Size > sealfs.HomeBytes && a.Mode&modeType != modeDir {
		// The home does not know what chunks take. Programs must not take data for a hole.
		out.Blocks += (a.Size - sealfs.HomeBytes + 511) / 512
	}
	out.Atime, out.Atimensec = splitTime(a.Atime)
	out.Mtime, out.Mtimensec = splitTime(a.Mtime)
	out.Ctime, out.Ctimensec = splitTime(a.Ctime)
	out.Mode = a.Mode &^ op.ModeACL
	out.Nlink = a.Nlink
	out.Uid = a.UID
	out.Gid = a.GID
	out.Rdev = a.Rdev
	out.Blksize = blockSize
}

// splitTime splits nanoseconds since 1970, also before it.
func splitTime(ns int64) (sec uint64, nsec uint32) {
	s, n := ns/1e9, ns%1e9
	if n < 0 {
		s, n = s-1, n+1e9
	}
	return uint64(s), uint32(n)
}

// joinTime is the way back; what int64 nanoseconds cannot hold becomes the nearest that they can.
func joinTime(sec uint64, nsec uint32) int64 {
	const most = int64(1<<63 - 1)
	s := int64(sec)
	switch {
	case s >= most/1e9:
		return most
	case s <= -most/1e9:
		return -most
	}
	return s*1e9 + int64(nsec)
}

// attrTTL returns for how long the kernel may believe attributes that it is told.
func (f *filesystem) attrTTL(a *answer, how telling) ttl {
	f.bare.note(a, f.o.AttrTimeout)
	if f.k == nil {
		return makeTTL(f.o.AttrTimeout)
	}
	left := f.k.tell(f.c, a, how)
	return makeTTL(min(left, f.o.AttrTimeout))
}

// entryTTL returns for how long the kernel may believe what it is told of a name.
func (f *filesystem) entryTTL(dir sealfs.Ino, name string, a *answer, timeout time.Duration) ttl {
	if f.k == nil {
		return makeTTL(timeout)
	}
	return makeTTL(min(f.k.name(f.c, dir, name, a), timeout))
}

func (f *filesystem) fillAttrOut(out *fuse.AttrOut, a *answer, how telling) {
	t := f.attrTTL(a, how)
	out.AttrValid, out.AttrValidNsec = t.sec, t.nsec
	f.c.accessed(&a.Attr)
	fillAttr(&out.Attr, &a.Attr)
}

// fillEntry tells of a name in dir.
func (f *filesystem) fillEntry(out *fuse.EntryOut, dir sealfs.Ino, name string, a *answer) {
	out.NodeId = f.node(a.Ino)
	t := f.entryTTL(dir, name, a, f.o.EntryTimeout)
	out.EntryValid, out.EntryValidNsec = t.sec, t.nsec
	t = f.attrTTL(a, tellNamed)
	out.AttrValid, out.AttrValidNsec = t.sec, t.nsec
	f.c.accessed(&a.Attr)
	fillAttr(&out.Attr, &a.Attr)
}

// made answers an operation that made a name in dir.
func (f *filesystem) made(out *fuse.EntryOut, dir sealfs.Ino, name string, a *answer, err error) fuse.Status {
	if err != nil {
		return status(err)
	}
	f.changed(dir)
	f.fillEntry(out, dir, name, a)
	return fuse.OK
}

// changed is for whoever has changed an inode in a way that the kernel forgets its
// attributes, but would take an older answer for a new one that comes afterwards.
func (f *filesystem) changed(ino sealfs.Ino) {
	if f.k != nil {
		f.k.touched(f.c, ino)
	}
}

// within notes that a request is under way for which the kernel holds a directory's lock, until
// the result is called. For other inodes it means nothing.
func (f *filesystem) within(dir sealfs.Ino) func() {
	if f.k == nil {
		return func() {}
	}
	f.k.enter(dir)
	return func() { f.k.leave(dir) }
}

// refresh makes sure that the kernel has no content that is older than a.
func (f *filesystem) refresh(a *answer, cancel <-chan struct{}) {
	if f.k != nil {
		f.k.refresh(&a.Attr, cancel)
	}
}

// Forget takes back what the answers that name an inode gave.
func (f *filesystem) Forget(node, lookups uint64) {
	if f.k != nil {
		f.k.forget(f.c, f.ino(node), lookups)
	}
}

func (f *filesystem) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	defer f.within(f.ino(h.NodeId))()
	ctx, w := f.wait(cancel, h.Pid)
	defer w.over()
	dir := f.ino(h.NodeId)
	a, err := f.c.lookup(ctx, dir, name)
	if err == sealfs.ErrNotExist {
		if t := f.entryTTL(dir, name, &a, f.o.NegativeTimeout); t != (ttl{}) {
			// Node 0 lets the kernel remember that there is no such name.
			out.EntryValid, out.EntryValidNsec = t.sec, t.nsec
			return fuse.OK
		}
	}
	if err != nil {
		return status(err)
	}
	f.fillEntry(out, dir, name, &a)
	return fuse.OK
}

func (f *filesystem) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	ino := f.ino(in.NodeId)
	if a, ok := f.c.dirAttr(ino); ok {
		f.fillAttrOut(out, &a, 0)
		return fuse.OK
	}
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	a, err := f.c.getattr(ctx, ino)
	if err != nil {
		return inodeStatus(err)
	}
	f.refresh(&a, cancel)
	f.fillAttrOut(out, &a, 0)
	return fuse.OK
}

// Statx serves who asks for the birth time; others are answered by GetAttr.
func (f *filesystem) Statx(cancel <-chan struct{}, in *fuse.StatxIn, out *fuse.StatxOut) fuse.Status {
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	ino := f.ino(in.NodeId)
	a, err := f.c.getattr(ctx, ino)
	if err != nil {
		return inodeStatus(err)
	}
	f.refresh(&a, cancel)
	t := f.attrTTL(&a, 0)
	out.AttrValid, out.AttrValidNsec = t.sec, t.nsec
	const basicAndBirth = 0xfff // STATX_BASIC_STATS | STATX_BTIME
	var b fuse.Attr
	f.c.accessed(&a.Attr)
	fillAttr(&b, &a.Attr)
	s := &out.Statx
	s.Mask, s.Blksize, s.Nlink, s.Uid, s.Gid = basicAndBirth, b.Blksize, b.Nlink, b.Uid, b.Gid
	s.Mode, s.Ino, s.Size, s.Blocks = uint16(b.Mode), b.Ino, b.Size, b.Blocks
	s.Atime = fuse.SxTime{Sec: b.Atime, Nsec: b.Atimensec}
	s.Mtime = fuse.SxTime{Sec: b.Mtime, Nsec: b.Mtimensec}
	s.Ctime = fuse.SxTime{Sec: b.Ctime, Nsec: b.Ctimensec}
	s.Btime.Sec, s.Btime.Nsec = splitTime(a.Btime)
	// The kernel's 32-bit form: 12 bits of major among 20 of minor.
	s.RdevMajor, s.RdevMinor = b.Rdev>>8&0xfff, b.Rdev&0xff|b.Rdev>>12&^0xff
	return fuse.OK
}

func (f *filesystem) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	defer f.within(f.ino(in.NodeId))()
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	s := SetAttr{Mode: in.Mode & modePerm, Cred: Cred{UID: in.Owner.Uid, GID: in.Owner.Gid}, Size: in.Size}
	for _, b := range [...]struct{ kernel, ours uint32 }{
		{fuse.FATTR_MODE, op.SetMode}, {fuse.FATTR_UID, op.SetUID}, {fuse.FATTR_GID, op.SetGID}, {fuse.FATTR_SIZE, op.SetSize},
	} {
		if in.Valid&b.kernel != 0 {
			s.Valid |= b.ours
		}
	}
	if in.Valid&fuse.FATTR_ATIME_NOW != 0 {
		s.Valid |= op.SetAtimeNow
	} else if in.Valid&fuse.FATTR_ATIME != 0 {
		s.Valid |= op.SetAtime
		s.Atime = joinTime(in.Atime, in.Atimensec)
	}
	if in.Valid&fuse.FATTR_MTIME_NOW != 0 {
		s.Valid |= op.SetMtimeNow
	} else if in.Valid&fuse.FATTR_MTIME != 0 {
		s.Valid |= op.SetMtime
		s.Mtime = joinTime(in.Mtime, in.Mtimensec)
	}
	if in.Valid&fuse.FATTR_CTIME != 0 {
		s.Valid |= op.SetCtime
		s.Ctime = joinTime(in.Ctime, in.Ctimensec)
	}
	// With HANDLE_KILLPRIV_V2 a change of owner is ours to see through, while a
	// truncation says whether the caller may keep the bits.
	if fh, ok := in.GetFh(); ok && f.lost(fh) {
		return fuse.EIO
	}
	s.KillPriv = in.Valid&(fuse.FATTR_UID|fuse.FATTR_GID|fuse.FATTR_KILL_SUIDGID) != 0
	if n := f.c.nodes.get(f.ino(in.NodeId)); s.Valid == 0 && (in.InHeader.Uid != 0 || n == nil || n.uncapped.Swap(0) != in.Pid) {
		// A change of owner and group that changes neither, which costs the bits all the same. But
		// before a write that takes capabilities away the kernel asks for the same, without meaning the bits.
		s.Valid, s.KillPriv = op.SetNothing, true
	}
	ino := f.ino(in.NodeId)
	a, err := f.c.setattr(ctx, ino, &s)
	if err != nil {
		return inodeStatus(err)
	}
	if n := f.c.nodes.get(ino); n != nil {
		n.privileged.Store(false)
	}
	f.changed(ino)
	f.fillAttrOut(out, &a, tellBlind)
	return fuse.OK
}

func (f *filesystem) Readlink(cancel <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	ctx, w := f.wait(cancel, h.Pid)
	defer w.over()
	b, a, err := f.c.readlink(ctx, f.ino(h.NodeId))
	if f.c.accessed(&a); err == nil && a.Ino != 0 && unread(&a) {
		f.read(a.Ino)
	}
	return b, status(err)
}

func (f *filesystem) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	defer f.within(f.ino(in.NodeId))()
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	dir := f.ino(in.NodeId)
	a, err := f.c.mknod(ctx, dir, name, in.Mode, in.Rdev, cred(&in.InHeader, in.Umask))
	return f.made(out, dir, name, &a, err)
}

func (f *filesystem) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	defer f.within(f.ino(in.NodeId))()
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	dir := f.ino(in.NodeId)
	a, err := f.c.mkdir(ctx, dir, name, in.Mode, cred(&in.InHeader, in.Umask))
	return f.made(out, dir, name, &a, err)
}

func (f *filesystem) Symlink(cancel <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	defer f.within(f.ino(h.NodeId))()
	ctx, w := f.wait(cancel, h.Pid)
	defer w.over()
	dir := f.ino(h.NodeId)
	a, err := f.c.symlink(ctx, dir, name, target, cred(h, 0))
	return f.made(out, dir, name, &a, err)
}

func (f *filesystem) Link(cancel <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	defer f.within(f.ino(in.NodeId))()
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	dir := f.ino(in.NodeId)
	a, err := f.c.link(ctx, f.ino(in.Oldnodeid), dir, name)
	f.changed(f.ino(in.Oldnodeid))
	return f.made(out, dir, name, &a, err)
}

func (f *filesystem) Unlink(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	defer f.within(f.ino(h.NodeId))()
	ctx, w := f.wait(cancel, h.Pid)
	defer w.over()
	dir := f.ino(h.NodeId)
	err := f.c.Unlink(ctx, dir, name)
	f.changed(dir)
	return status(err)
}

func (f *filesystem) Rmdir(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	defer f.within(f.ino(h.NodeId))()
	ctx, w := f.wait(cancel, h.Pid)
	defer w.over()
	dir := f.ino(h.NodeId)
	err := f.c.Rmdir(ctx, dir, name)
	f.changed(dir)
	return status(err)
}

// Flags of renameat2(2).
const (
	renameNoReplace = 1
	renameExchange  = 2
)

func (f *filesystem) Rename(cancel <-chan struct{}, in *fuse.RenameIn, name, name2 string) fuse.Status {
	defer f.within(f.ino(in.NodeId))()
	defer f.within(f.ino(in.Newdir))()
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	var flags op.Flags
	switch in.Flags {
	case 0:
	case renameNoReplace:
		flags = op.NoReplace
	case renameExchange:
		flags = op.Exchange
	default:
		return fuse.EINVAL
	}
	dir, dir2 := f.ino(in.NodeId), f.ino(in.Newdir)
	moved, err := f.c.rename(ctx, dir, name, dir2, name2, flags)
	if f.k != nil {
		f.k.renamed(f.c, dir, name, dir2, name2, flags&op.Exchange != 0)
		for _, ino := range [...]sealfs.Ino{dir, dir2, moved.Ino} {
			f.changed(ino)
		}
	}
	return status(err)
}

// Create makes and opens a file. The kernel has looked before, so a name that
// exists came from elsewhere meanwhile: ESTALE lets it look again, and then
// check permissions as for any open.
func (f *filesystem) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	defer f.within(f.ino(in.NodeId))()
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	dir := f.ino(in.NodeId)
	a, err := f.c.create(ctx, dir, name, in.Mode, cred(&in.InHeader, in.Umask))
	if (err == sealfs.ErrExist || err == sealfs.ErrIsDir) && in.Flags&syscall.O_EXCL == 0 {
		return fuse.Status(syscall.ESTALE)
	}
	if err != nil {
		return status(err)
	}
	f.made(&out.EntryOut, dir, name, &a, nil)
	f.opened(a.Ino)
	out.Fh, out.OpenFlags = f.handle(a.Ino), newFileFlags(in.Flags)
	return fuse.OK
}

func (f *filesystem) Tmpfile(cancel <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	dir := f.ino(in.NodeId)
	a, err := f.c.tmpfile(ctx, dir, in.Mode, cred(&in.InHeader, in.Umask))
	if err != nil {
		return status(err)
	}
	a.dir = 0 // it has no name
	f.fillEntry(&out.EntryOut, dir, "", &a)
	f.opened(a.Ino)
	out.Fh, out.OpenFlags = f.handle(a.Ino), newFileFlags(in.Flags)
	return fuse.OK
}

const directIO = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES

// newFileFlags says how the kernel shall treat a new file. Opened for writing only, it
// gains nothing from the page cache, and without that the kernel does
// not ask for security.capability before the first write: a new file has none,
// and who gives it one here is noticed (node.capability).
func newFileFlags(flags uint32) uint32 {
	if flags&(syscall.O_DIRECT|syscall.O_APPEND) != 0 || flags&syscall.O_ACCMODE == syscall.O_WRONLY {
		return directIO
	}
	return 0
}

func (f *filesystem) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	ino := f.ino(in.NodeId)
	var a answer
	var err error
	switch {
	case in.Flags&syscall.O_ACCMODE != syscall.O_RDONLY:
		a, err = f.c.openFor(ctx, ino, 0, op.WantWrite)
	case in.Flags&(syscall.O_TRUNC|syscall.O_DIRECT) == 0 && !f.seen.has(ino):
		a, err = f.c.openToRead(ctx, ino) // the kernel has nothing of it
	default:
		a, err = f.c.openFor(ctx, ino, 0, 0)
	}
	if err != nil {
		return inodeStatus(err)
	}
	f.opened(ino)
	if in.Flags&syscall.O_TRUNC != 0 {
		s := SetAttr{Valid: op.SetSize, KillPriv: in.Mode&fuse.OPEN_KILL_SUIDGID != 0}
		if a, err = f.c.setattr(ctx, ino, &s); err != nil {
			f.c.Release(ctx, ino)
			return status(err)
		}
		f.changed(ino)
	}
	f.c.accessed(&a.Attr)
	n, fresh := f.c.nodes.get(ino), unread(&a.Attr)
	if n != nil {
		n.unread.Store(fresh)
	}
	out.Fh = f.handle(ino)
	appends := in.Flags&syscall.O_APPEND != 0 && in.Flags&syscall.O_ACCMODE != syscall.O_RDONLY
	if in.Flags&syscall.O_DIRECT != 0 || appends {
		// By way of its page cache the kernel writes in pieces, and what others append could
		// come between two of them. Past its cache it takes capabilities from nobody: such
		// a file is written the slower way.
		if _, _, err := f.c.Getxattr(ctx, ino, capability, 0, nil); err == sealfs.ErrNoData || in.Flags&syscall.O_ACCMODE == syscall.O_RDONLY {
			out.OpenFlags = directIO
		}
		return fuse.OK
	}
	if !f.seen.same(ino, a.Version) || f.k != nil && !(f.c.believes(ino, a.ino) && f.k.fresh(ino)) {
		return fuse.OK
	}
	if fresh && f.countsReads(in.Flags) && in.Flags&syscall.O_ACCMODE != syscall.O_WRONLY {
		if a.Size <= accessReread {
			return fuse.OK
		}
		f.readBy(ino, in.Flags)
	}
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	return fuse.OK
}

// countsReads reports whether what is read through a file with these flags counts as read.
func (f *filesystem) countsReads(flags uint32) bool {
	return !f.o.ReadOnly && !f.o.NoAtime && flags&unix.O_NOATIME == 0
}

// readBy notes that the file ino was read through a handle with these flags.
func (f *filesystem) readBy(ino sealfs.Ino, flags uint32) {
	if n := f.c.nodes.get(ino); n != nil && n.unread.Load() && f.countsReads(flags) {
		n.unread.Store(false)
		f.c.read(ino)
	}
}

// read is for what has no handle.
func (f *filesystem) read(ino sealfs.Ino) {
	if f.countsReads(0) {
		f.c.read(ino)
	}
}

// opened notes that the kernel may have content of ino from now on.
func (f *filesystem) opened(ino sealfs.Ino) {
	if f.k != nil {
		f.k.opened(ino)
	}
}

// Release lets a file go. Nobody waits for the answer, but the kernel bounds the
// requests of that kind: those for servers that are away must not use them up.
func (f *filesystem) Release(cancel <-chan struct{}, in *fuse.ReleaseIn) {
	const flockUnlock = 1 << 1
	ino, handle, owner, flocked := f.ino(in.NodeId), in.Fh, in.LockOwner, in.ReleaseFlags&flockUnlock != 0
	owners := f.locks.released(ino, handle)
	if flocked {
		f.locks.leaves(ino, owner)
	}
	release := func() {
		lost := f.lost(handle) // the session's end has let it go
		for _, o := range owners {
			if !lost {
				f.c.DropOwner(bg, ino, o, 0)
			}
		}
		if flocked {
			if !lost {
				f.c.DropOwner(bg, ino, owner, op.Flock)
			}
			owners = append(owners, owner)
		}
		for _, o := range owners {
			f.locks.left(ino, o)
		}
		if lost {
			return
		}
		if err := f.c.Release(bg, ino); err != nil {
			// Flush told what could be told.
			f.c.log.Error("release failed", "ino", uint64(ino), "err", err)
		}
	}
	if f.c.remote {
		go release()
		return
	}
	release()
}

// seenVersions remembers the version that files had when they were opened here
// last. A file that still has it is in the kernel's page cache as it is on
// the server, whatever happened while it was closed.
type seenVersions struct {
	parts [16]struct {
		mu sync.Mutex
		m  map[sealfs.Ino]uint64
	}
}

// seenMax bounds the files that one part remembers.
const seenMax = 4096

// has reports whether the kernel may hold something of ino.
func (s *seenVersions) has(ino sealfs.Ino) bool {
	p := &s.parts[uint64(ino)*0x9e3779b97f4a7c15>>60]
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.m[ino]
	return ok
}

// same notes the version of ino and reports whether it was the same before.
func (s *seenVersions) same(ino sealfs.Ino, version uint64) bool {
	p := &s.parts[uint64(ino)*0x9e3779b97f4a7c15>>60]
	p.mu.Lock()
	defer p.mu.Unlock()
	old, ok := p.m[ino]
	if ok && old == version {
		return true
	}
	if p.m == nil {
		p.m = map[sealfs.Ino]uint64{}
	}
	if !ok && len(p.m) >= seenMax {
		for victim := range p.m { // any: it only costs a cache that could be kept
			delete(p.m, victim)
			break
		}
	}
	p.m[ino] = version
	return false
}
