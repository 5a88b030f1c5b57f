package client

import (
	"context"
	"errors"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"sealfs"
	"sealfs/op"
)

// readResult hands the kernel what stands in its own buffer already.
type readResult struct{ data []byte }

var readResults = sync.Pool{New: func() any { return new(readResult) }}

func (r *readResult) Bytes([]byte) ([]byte, fuse.Status) { return r.data, fuse.OK }
func (r *readResult) Size() int                          { return len(r.data) }
func (r *readResult) Done() {
	r.data = nil
	readResults.Put(r)
}

func (f *filesystem) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	if f.lost(in.Fh) {
		return nil, fuse.EIO
	}
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	b, err := f.c.Read(ctx, f.ino(in.NodeId), in.Offset, min(int(in.Size), len(buf)), buf)
	if err != nil {
		return nil, status(err)
	}
	f.readBy(f.ino(in.NodeId), in.Flags)
	r := readResults.Get().(*readResult)
	r.data = b
	return r, fuse.OK
}

func (f *filesystem) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if f.lost(in.Fh) {
		return 0, fuse.EIO
	}
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	ino := f.ino(in.NodeId)
	var flags op.Flags
	if in.Flags&syscall.O_APPEND != 0 && in.WriteFlags&fuse.WRITE_CACHE == 0 {
		flags |= op.Append
	}
	if in.WriteFlags&fuse.WRITE_CACHE != 0 {
		// It was written to a mapping, which cannot make a file longer. The kernel may not know yet that it is shorter.
		flags |= op.Within
	}
	if in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0 {
		flags |= op.KillPriv
	}
	n, err := f.c.write(ctx, ino, in.Offset, data, flags)
	if flags&op.KillPriv != 0 {
		f.deprived(ino)
	}
	if f.k != nil {
		f.k.wrote(ino, flags&op.Append != 0)
	}
	if err == nil && in.Flags&syscall.O_DSYNC != 0 {
		if err = f.c.Fsync(ctx, ino); err != nil { // O_SYNC contains O_DSYNC
			return 0, status(err)
		}
	}
	if err != nil && (n == 0 || !errors.Is(err, sealfs.ErrInterrupted)) {
		return 0, status(err)
	}
	return uint32(n), fuse.OK
}

// deprived is for who has written to a file without the right to leave it privileges: the kernel
// believes its mode otherwise, and would go by it when it executes the file.
func (f *filesystem) deprived(ino sealfs.Ino) {
	if n := f.c.nodes.get(ino); n == nil || n.privileged.CompareAndSwap(false, true) {
		f.changed(ino)
	}
}

// Flush is called for every close(2) of a descriptor: the last moment at which an
// error can be told, and the end of the process's POSIX locks on the file.
func (f *filesystem) Flush(cancel <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	if f.lost(in.Fh) {
		return fuse.EIO
	}
	ctx, w := f.wait(cancel, in.Pid)
	w.flushes()
	defer w.over()
	ino := f.ino(in.NodeId)
	err := f.c.Flush(ctx, ino)
	if f.locks.closed(ino, in.LockOwner) {
		if derr := f.c.DropOwner(ctx, ino, in.LockOwner, 0); err == nil {
			err = derr
		}
	}
	return status(err)
}

func (f *filesystem) Fsync(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	if f.lost(in.Fh) {
		return fuse.EIO
	}
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	return status(f.c.Fsync(ctx, f.ino(in.NodeId)))
}

// killPriv clears the setuid and setgid bits for changes with which the kernel
// does not say whether to: root alone may keep them.
func (f *filesystem) killPriv(ctx context.Context, h *fuse.InHeader, ino sealfs.Ino) error {
	if h.Uid == 0 {
		return nil
	}
	_, err := f.c.Setattr(ctx, ino, &SetAttr{KillPriv: true})
	return err
}

func (f *filesystem) Fallocate(cancel <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if f.lost(in.Fh) {
		return fuse.EIO
	}
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	ino := f.ino(in.NodeId)
	err := f.c.Fallocate(ctx, ino, in.Offset, in.Length, in.Mode)
	if err == nil {
		err = f.killPriv(ctx, &in.InHeader, ino)
	}
	f.changed(ino)
	return status(err)
}

// copyMax bounds one copy, so that a program stays interruptible.
const copyMax = 16 << 20

func (f *filesystem) CopyFileRange(cancel <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	if in.Flags != 0 {
		return 0, fuse.EINVAL
	}
	if f.lost(in.FhIn) || f.lost(in.FhOut) {
		return 0, fuse.EIO
	}
	from, to := f.ino(in.NodeId), f.ino(in.NodeIdOut)
	n, err := f.c.CopyRange(ctx, from, in.OffIn, to, in.OffOut, min(in.Len, copyMax), 0)
	if n > 0 {
		err = f.killPriv(ctx, &in.InHeader, to)
	}
	f.changed(to)
	if err != nil {
		return 0, status(err)
	}
	return uint32(n), fuse.OK
}

func (f *filesystem) Lseek(cancel <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	if f.lost(in.Fh) {
		return fuse.EIO
	}
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	off, err := f.c.Seek(ctx, f.ino(in.NodeId), in.Offset, in.Whence)
	out.Offset = off
	return status(err)
}

func (f *filesystem) Ioctl(cancel <-chan struct{}, in *fuse.IoctlIn, inbuf []byte, out *fuse.IoctlOut, outbuf []byte) fuse.Status {
	return fuse.Status(syscall.ENOTTY)
}

func (f *filesystem) StatFs(cancel <-chan struct{}, h *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	ctx, w := f.wait(cancel, h.Pid)
	defer w.over()
	s, err := f.c.Statfs(ctx)
	if err != nil {
		return status(err)
	}
	out.Bsize, out.Frsize, out.NameLen = sealfs.BlockSize, sealfs.BlockSize, sealfs.NameMax
	out.Blocks = s.Bytes / sealfs.BlockSize
	out.Bfree = s.BytesFree / sealfs.BlockSize
	out.Bavail = out.Bfree
	out.Files, out.Ffree = s.Inodes, s.InodesFree
	return fuse.OK
}

// OpenDir holds the directory, so that it can still be read after its removal.
func (f *filesystem) OpenDir(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	ino := f.ino(in.NodeId)
	a, err := f.c.Open(ctx, ino)
	if err == nil {
		f.c.accessed(&a)
		if n := f.c.nodes.get(ino); n != nil {
			n.unread.Store(unread(&a))
		}
	}
	out.Fh = f.handle(ino)
	return inodeStatus(err)
}

// ReleaseDir is Release for directories.
func (f *filesystem) ReleaseDir(in *fuse.ReleaseIn) { f.Release(nil, in) }

func (f *filesystem) FsyncDir(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	defer f.within(f.ino(in.NodeId))()
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	return status(f.c.Fsync(ctx, f.ino(in.NodeId)))
}

func (f *filesystem) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.readDir(cancel, in, out, false)
}

func (f *filesystem) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.readDir(cancel, in, out, true)
}

var direntLists = sync.Pool{New: func() any { return new([]op.Dirent) }}

// readDir answers entries after the cookie in.Offset. "." and ".." are ours, with
// the cookies 1 and 2 that the server never gives.
func (f *filesystem) readDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList, plus bool) fuse.Status {
	ino, asked := f.ino(in.NodeId), f.c.leases.mark()
	defer f.within(ino)()
	var got listing
	add := func(e *op.Dirent, mode uint32, name, attr belief) bool {
		d := fuse.DirEntry{Name: e.Name, Ino: uint64(e.Ino), Off: e.Cookie, Mode: mode}
		if !plus {
			return out.AddDirEntry(d)
		}
		entry := out.AddDirLookupEntry(d)
		if entry != nil && e.Attr.Ino != 0 {
			f.fillEntry(entry, ino, e.Name, &answer{Attr: e.Attr, ino: attr, dir: name, mark: asked, at: got.at})
		} // else node 0: the kernel looks itself if it needs more
		return entry != nil
	}
	// The number of the parent is not known here, and the kernel shows its own.
	for cookie := in.Offset + 1; cookie <= 2; cookie++ {
		if !add(&op.Dirent{Name: ".."[:cookie], Ino: ino, Cookie: cookie}, modeDir, 0, 0) {
			return fuse.OK
		}
	}
	if !f.o.NoDirAtime {
		f.readBy(ino, 0)
	}
	ctx, w := f.wait(cancel, in.Pid)
	defer w.over()
	list := direntLists.Get().(*[]op.Dirent)
	defer func() {
		clear(*list)
		direntLists.Put(list)
	}()
	cookie := max(in.Offset, 2)
	got.entries = (*list)[:0]
	err := f.c.readdir(ctx, ino, cookie, int(in.Size), plus, &got)
	*list = got.entries
	if err != nil {
		return status(err)
	}
	for i := range *list {
		e := &(*list)[i]
		if !add(e, uint32(e.Type)<<12, got.dir, got.each[i]) {
			break
		}
	}
	return fuse.OK
}
