package client

import (
	"context"
	"io"
	"io/fs"
	"os"
	"path"
	"sync"
	"time"

	"sealfs"
	"sealfs/op"
)

// The parts of a mode.
const (
	modeType   = 0o170000
	modeFifo   = 0o010000
	modeChar   = 0o020000
	modeDir    = 0o040000
	modeBlock  = 0o060000
	modeFile   = 0o100000
	modeLink   = 0o120000
	modeSocket = 0o140000
	modePerm   = 0o7777
)

// File is an open file or directory. It is safe for concurrent use.
type File struct {
	f    *FS
	name string
	ino  sealfs.Ino
	dir  bool
	flag int
	ses  *identity // under which it was opened

	mu     sync.Mutex
	closed bool
	off    int64       // of Read, Write and Seek
	cookie uint64      // directory: of the last entry read
	ahead  []op.Dirent // directory: read but not returned yet
	eof    bool        // directory: nothing follows ahead
}

// Open opens a file or directory for reading.
func (f *FS) Open(name string) (*File, error) { return f.OpenFile(name, os.O_RDONLY, 0) }

// Create makes a file, or empties the one that is there, and opens it for
// reading and writing.
func (f *FS) Create(name string) (*File, error) {
	return f.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o666)
}

// OpenFile opens a file with the O_ flags of package os; a new one gets perm.
func (f *FS) OpenFile(name string, flag int, perm fs.FileMode) (*File, error) {
	file, err := f.open(context.Background(), name, flag, perm)
	if err != nil {
		return nil, pathError("open", name, err)
	}
	return file, nil
}

func (f *FS) open(ctx context.Context, name string, flag int, perm fs.FileMode) (*File, error) {
	at := name
	for links, tries := 0, 0; ; {
		dir, last, err := f.walk(ctx, at, &links)
		if err != nil {
			return nil, err
		}
		if last == "" {
			return f.openDir(ctx, name, dir, flag)
		}
		a, err := f.c.Lookup(ctx, dir, last)
		if err == sealfs.ErrNotExist && flag&os.O_CREATE != 0 {
			a, err = f.c.Create(ctx, dir, last, unixPerm(perm), f.who)
			if err == nil {
				return f.file(name, a.Ino, flag), nil
			}
			if err == sealfs.ErrExist && flag&os.O_EXCL == 0 {
				continue // somebody else was quicker
			}
		}
		switch {
		case err != nil:
			return nil, err
		case flag&(os.O_CREATE|os.O_EXCL) == os.O_CREATE|os.O_EXCL:
			return nil, sealfs.ErrExist
		case a.Mode&modeType == modeDir:
			return f.openDir(ctx, name, a.Ino, flag)
		case a.Mode&modeType == modeLink:
			target, err := f.target(ctx, a.Ino, &links)
			if err != nil {
				return nil, err
			}
			at = join(at, target)
			continue
		case a.Mode&modeType != modeFile:
			return nil, sealfs.ErrNotSupported
		}
		open := f.c.Open
		if flag&(os.O_WRONLY|os.O_RDWR) != 0 {
			open = f.c.OpenToWrite
		}
		if _, err := open(ctx, a.Ino); err == sealfs.ErrNotExist && tries < lookupMax {
			tries++ // another file may have this name by now
			continue
		} else if err != nil {
			return nil, err
		}
		file := f.file(name, a.Ino, flag)
		if flag&os.O_TRUNC != 0 {
			if _, err := f.c.Setattr(ctx, a.Ino, &SetAttr{Valid: op.SetSize}); err != nil {
				file.Close()
				return nil, err
			}
		}
		return file, nil
	}
}

func (f *FS) openDir(ctx context.Context, name string, ino sealfs.Ino, flag int) (*File, error) {
	if flag&(os.O_WRONLY|os.O_RDWR|os.O_CREATE|os.O_TRUNC) != 0 {
		return nil, sealfs.ErrIsDir
	}
	if _, err := f.c.Open(ctx, ino); err != nil {
		return nil, err
	}
	file := f.file(name, ino, os.O_RDONLY)
	file.dir = true
	return file, nil
}

// file returns the file for an inode that was just opened.
func (f *FS) file(name string, ino sealfs.Ino, flag int) *File {
	file := &File{f: f, name: name, ino: ino, flag: flag, ses: f.c.ses.Load()}
	if n := f.c.nodes.get(ino); n != nil {
		file.ses = n.ses.Load()
	}
	return file
}

// Name returns the name with which the file was opened.
func (f *File) Name() string { return f.name }

// Ino returns the inode number, for the methods of Client.
func (f *File) Ino() sealfs.Ino { return f.ino }

// start refuses what a closed file, or one of another kind or mode, cannot do.
func (f *File) start(dir bool, mode int) error {
	switch {
	case f.closed:
		return sealfs.ErrClosed
	case f.ses.ended.Load():
		return sealfs.ErrSession
	case f.dir && !dir:
		return sealfs.ErrIsDir
	case !f.dir && dir:
		return sealfs.ErrNotDir
	case mode == os.O_RDONLY && f.flag&os.O_WRONLY != 0,
		mode == os.O_WRONLY && f.flag&(os.O_WRONLY|os.O_RDWR) == 0:
		return sealfs.ErrPerm
	}
	return nil
}

// Read reads from the current offset.
func (f *File) Read(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.readAt(b, f.off)
	f.off += int64(n)
	return n, err
}

// ReadAt reads from off, which the current offset does not follow.
func (f *File) ReadAt(b []byte, off int64) (int, error) {
	f.mu.Lock()
	err := f.start(false, os.O_RDONLY)
	f.mu.Unlock()
	if err != nil {
		return 0, pathError("read", f.name, err)
	}
	n := 0
	for n < len(b) {
		m, err := f.fetch(b[n:], off+int64(n))
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

func (f *File) readAt(b []byte, off int64) (int, error) {
	if err := f.start(false, os.O_RDONLY); err != nil {
		return 0, pathError("read", f.name, err)
	}
	return f.fetch(b, off)
}

// fetch reads with one request.
func (f *File) fetch(b []byte, off int64) (int, error) {
	if off < 0 {
		return 0, pathError("read", f.name, sealfs.ErrInvalid)
	}
	if len(b) == 0 {
		return 0, nil
	}
	part := b[:min(len(b), sealfs.IOMax)]
	got, err := f.f.c.Read(context.Background(), f.ino, uint64(off), len(part), part)
	if err != nil {
		return 0, pathError("read", f.name, err)
	}
	if len(got) == 0 {
		return 0, io.EOF
	}
	return copy(part, got), nil // onto itself when the handler used our room
}

// readAll returns everything from the current offset on.
func (f *File) readAll() ([]byte, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b := make([]byte, 0, info.Size()+1)
	for {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := f.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if err == io.EOF {
			return b, nil
		}
		if err != nil {
			return b, err
		}
	}
}

// Write writes at the current offset, or at the end if the file was opened with
// O_APPEND. The data may be delayed: see the package comment.
func (f *File) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.store(b, f.off)
	f.off += int64(n)
	return n, err
}

// WriteAt writes at off, which the current offset does not follow.
func (f *File) WriteAt(b []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.flag&os.O_APPEND != 0 {
		return 0, pathError("write", f.name, sealfs.ErrInvalid)
	}
	return f.store(b, off)
}

func (f *File) store(b []byte, off int64) (int, error) {
	err := f.start(false, os.O_WRONLY)
	if err == nil && off < 0 {
		err = sealfs.ErrInvalid
	}
	var flags op.Flags
	if f.flag&os.O_APPEND != 0 {
		flags, off = op.Append, 0
	}
	if err == nil {
		err = f.f.c.Write(context.Background(), f.ino, uint64(off), b, flags)
	}
	if err == nil && f.flag&os.O_SYNC != 0 {
		err = f.f.c.Fsync(context.Background(), f.ino)
	}
	if err != nil {
		return 0, pathError("write", f.name, err)
	}
	return len(b), nil
}

// Seek sets the current offset.
func (f *File) Seek(off int64, whence int) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.start(f.dir, -1)
	switch whence {
	case io.SeekStart:
	case io.SeekCurrent:
		off += f.off
	case io.SeekEnd:
		if err == nil {
			var a op.Attr
			a, err = f.f.c.Getattr(context.Background(), f.ino)
			off += int64(a.Size)
		}
	default:
		err = sealfs.ErrInvalid
	}
	if err == nil && (off < 0 || f.dir && off != 0) {
		err = sealfs.ErrInvalid
	}
	if err != nil {
		return 0, pathError("seek", f.name, err)
	}
	f.off = off
	if f.dir {
		f.cookie, f.ahead, f.eof = 0, nil, false
	}
	return off, nil
}

// Stat returns the file's FileInfo; its Sys is an *op.Attr.
func (f *File) Stat() (fs.FileInfo, error) {
	f.mu.Lock()
	err := f.start(f.dir, -1)
	f.mu.Unlock()
	if err != nil {
		return nil, pathError("stat", f.name, err)
	}
	a, err := f.f.c.Getattr(context.Background(), f.ino)
	if err != nil {
		return nil, pathError("stat", f.name, err)
	}
	return &fileInfo{path.Base(f.name), a}, nil
}

// Truncate changes the size of the file.
func (f *File) Truncate(size int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.start(false, os.O_WRONLY)
	if err == nil && size < 0 {
		err = sealfs.ErrInvalid
	}
	if err == nil {
		_, err = f.f.c.Setattr(context.Background(), f.ino, &SetAttr{Valid: op.SetSize, Size: uint64(size)})
	}
	return pathError("truncate", f.name, err)
}

// Sync returns when all that was written survives a power cut.
func (f *File) Sync() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.start(f.dir, -1)
	if err == nil {
		err = f.f.c.Fsync(context.Background(), f.ino)
	}
	return pathError("sync", f.name, err)
}

// Close sends what is delayed, returns the error of that, and lets the file go.
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return pathError("close", f.name, sealfs.ErrClosed)
	}
	f.closed = true
	if f.ses.ended.Load() {
		return pathError("close", f.name, sealfs.ErrSession)
	}
	return pathError("close", f.name, f.f.c.Release(context.Background(), f.ino))
}

// ReadDir returns the next n entries of a directory, or all that are left if n <= 0,
// as fs.ReadDirFile says.
func (f *File) ReadDir(n int) ([]fs.DirEntry, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.start(true, -1); err != nil {
		return nil, pathError("readdir", f.name, err)
	}
	var list []fs.DirEntry
	for n <= 0 || len(list) < n {
		if len(f.ahead) == 0 {
			if f.eof {
				break
			}
			var err error
			f.ahead, f.eof, err = f.f.c.Readdir(context.Background(), f.ino, f.cookie, 64<<10, false, f.ahead[:0])
			if err != nil {
				return list, pathError("readdir", f.name, err)
			}
			f.eof = f.eof || len(f.ahead) == 0
			continue
		}
		e := f.ahead[0]
		f.ahead, f.cookie = f.ahead[1:], e.Cookie
		list = append(list, &dirEntry{f, e})
	}
	if n > 0 && len(list) == 0 {
		return nil, io.EOF
	}
	return list, nil
}

// dirEntry is an fs.DirEntry.
type dirEntry struct {
	dir *File
	e   op.Dirent
}

func (d *dirEntry) Name() string               { return d.e.Name }
func (d *dirEntry) IsDir() bool                { return d.Type().IsDir() }
func (d *dirEntry) Type() fs.FileMode          { return goMode(uint32(d.e.Type) << 12).Type() }
func (d *dirEntry) String() string             { return fs.FormatDirEntry(d) }
func (d *dirEntry) Info() (fs.FileInfo, error) { return d.info() }

// info asks again: what came with the entry may be old by now.
func (d *dirEntry) info() (fs.FileInfo, error) {
	a, err := d.dir.f.c.Lookup(context.Background(), d.dir.ino, d.e.Name)
	if err != nil {
		return nil, pathError("lstat", path.Join(d.dir.name, d.e.Name), err)
	}
	return &fileInfo{d.e.Name, a}, nil
}

// fileInfo is an fs.FileInfo.
type fileInfo struct {
	name string
	attr op.Attr
}

func (i *fileInfo) Name() string       { return i.name }
func (i *fileInfo) Size() int64        { return int64(i.attr.Size) }
func (i *fileInfo) Mode() fs.FileMode  { return goMode(i.attr.Mode) }
func (i *fileInfo) ModTime() time.Time { return time.Unix(0, i.attr.Mtime) }
func (i *fileInfo) IsDir() bool        { return i.attr.Mode&modeType == modeDir }
func (i *fileInfo) Sys() any           { return &i.attr }
func (i *fileInfo) String() string     { return fs.FormatFileInfo(i) }

// goMode translates a Unix mode.
func goMode(mode uint32) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	switch mode & modeType {
	case modeDir:
		m |= fs.ModeDir
	case modeLink:
		m |= fs.ModeSymlink
	case modeFifo:
		m |= fs.ModeNamedPipe
	case modeSocket:
		m |= fs.ModeSocket
	case modeChar:
		m |= fs.ModeDevice | fs.ModeCharDevice
	case modeBlock:
		m |= fs.ModeDevice
	}
	for bit, is := range map[uint32]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if mode&bit != 0 {
			m |= is
		}
	}
	return m
}

// unixPerm translates permission bits back.
func unixPerm(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	if m&fs.ModeSetuid != 0 {
		mode |= 0o4000
	}
	if m&fs.ModeSetgid != 0 {
		mode |= 0o2000
	}
	if m&fs.ModeSticky != 0 {
		mode |= 0o1000
	}
	return mode
}
