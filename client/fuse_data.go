package client

import (
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
	b, err := f.c.Read(bg, f.ino(in.NodeId), in.Offset, min(int(in.Size), len(buf)), buf)
	if err != nil {
		return nil, status(err)
	}
	r := readResults.Get().(*readResult)
	r.data = b
	return r, fuse.OK
}

func (f *filesystem) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	ino := f.ino(in.NodeId)
	var flags op.Flags
	if in.Flags&syscall.O_APPEND != 0 && in.WriteFlags&fuse.WRITE_CACHE == 0 {
		flags |= op.Append
	}
	if in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0 {
		flags |= op.KillPriv
	}
	err := f.c.Write(bg, ino, in.Offset, data, flags)
	if err == nil && in.Flags&syscall.O_DSYNC != 0 {
		err = f.c.Fsync(bg, ino) // O_SYNC contains O_DSYNC
	}
	if err != nil {
		return 0, status(err)
	}
	return uint32(len(data)), fuse.OK
}

// Flush is called for every close(2) of a descriptor: the last moment at which an
// error can be told, and the end of the process's POSIX locks on the file.
func (f *filesystem) Flush(cancel <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	ino := f.ino(in.NodeId)
	err := f.c.Flush(ino)
	if f.c.nodes.hasLocks(ino) {
		if derr := f.c.DropOwner(bg, ino, in.LockOwner, 0); err == nil {
			err = derr
		}
	}
	return status(err)
}

func (f *filesystem) Fsync(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return status(f.c.Fsync(bg, f.ino(in.NodeId)))
}

// killPriv clears the setuid and setgid bits for changes with which the kernel
// does not say whether to: root alone may keep them.
func (f *filesystem) killPriv(h *fuse.InHeader, ino sealfs.Ino) error {
	if h.Uid == 0 {
		return nil
	}
	_, err := f.c.Setattr(bg, ino, &SetAttr{KillPriv: true})
	return err
}

func (f *filesystem) Fallocate(cancel <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	ino := f.ino(in.NodeId)
	err := f.c.Fallocate(bg, ino, in.Offset, in.Length, in.Mode)
	if err == nil {
		err = f.killPriv(&in.InHeader, ino)
	}
	return status(err)
}

// copyMax bounds one copy, so that a program stays interruptible.
const copyMax = 16 << 20

func (f *filesystem) CopyFileRange(cancel <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	if in.Flags != 0 {
		return 0, fuse.EINVAL
	}
	from, to := f.ino(in.NodeId), f.ino(in.NodeIdOut)
	n, err := f.c.CopyRange(bg, from, in.OffIn, to, in.OffOut, min(in.Len, copyMax), 0)
	if n > 0 {
		err = f.killPriv(&in.InHeader, to)
	}
	if err != nil {
		return 0, status(err)
	}
	return uint32(n), fuse.OK
}

func (f *filesystem) Lseek(cancel <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	off, err := f.c.Seek(bg, f.ino(in.NodeId), in.Offset, in.Whence)
	out.Offset = off
	return status(err)
}

func (f *filesystem) Ioctl(cancel <-chan struct{}, in *fuse.IoctlIn, inbuf []byte, out *fuse.IoctlOut, outbuf []byte) fuse.Status {
	return fuse.Status(syscall.ENOTTY)
}

func (f *filesystem) StatFs(cancel <-chan struct{}, h *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	s, err := f.c.Statfs(bg)
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
	_, err := f.c.Open(bg, f.ino(in.NodeId))
	return status(err)
}

func (f *filesystem) ReleaseDir(in *fuse.ReleaseIn) { f.c.Release(bg, f.ino(in.NodeId)) }

func (f *filesystem) FsyncDir(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return status(f.c.Fsync(bg, f.ino(in.NodeId)))
}

func (f *filesystem) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.readDir(in, out, false)
}

func (f *filesystem) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.readDir(in, out, true)
}

var direntLists = sync.Pool{New: func() any { return new([]op.Dirent) }}

// readDir answers entries after the cookie in.Offset. "." and ".." are ours, with
// the cookies 1 and 2 that the server never gives.
func (f *filesystem) readDir(in *fuse.ReadIn, out *fuse.DirEntryList, plus bool) fuse.Status {
	ino := f.ino(in.NodeId)
	add := func(e *op.Dirent, mode uint32) bool {
		d := fuse.DirEntry{Name: e.Name, Ino: uint64(e.Ino), Off: e.Cookie, Mode: mode}
		if !plus {
			return out.AddDirEntry(d)
		}
		entry := out.AddDirLookupEntry(d)
		if entry != nil && e.Attr.Ino != 0 {
			f.fillEntry(entry, &e.Attr)
		} // else node 0: the kernel looks itself if it needs more
		return entry != nil
	}
	// The number of the parent is not known here, and the kernel shows its own.
	for cookie := in.Offset + 1; cookie <= 2; cookie++ {
		if !add(&op.Dirent{Name: ".."[:cookie], Ino: ino, Cookie: cookie}, modeDir) {
			return fuse.OK
		}
	}
	list := direntLists.Get().(*[]op.Dirent)
	defer func() {
		clear(*list)
		direntLists.Put(list)
	}()
	cookie := max(in.Offset, 2)
	var err error
	*list, _, err = f.c.Readdir(bg, ino, cookie, int(in.Size), plus, (*list)[:0])
	if err != nil {
		return status(err)
	}
	for i := range *list {
		e := &(*list)[i]
		if !add(e, uint32(e.Type)<<12) {
			break
		}
	}
	return fuse.OK
}
