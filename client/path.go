package client

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"sealfs"
	"sealfs/op"
)

// FS is a volume by paths, in the manner of package os. Paths are separated by
// slashes and start at the client's root, with or without a slash. Symbolic
// links are followed inside the volume: an absolute target starts at the root.
//
// Errors are *fs.PathError or *os.LinkError. Both errors.Is(err, fs.ErrNotExist) and
// errors.Is(err, sealfs.ErrNotExist) hold for a missing file, and so on.
// Permissions are not checked: whoever has the client may do everything.
type FS struct {
	c   *Client
	who Cred
}

// FS returns the volume by paths; what is made belongs to who.
func (c *Client) FS(who Cred) *FS { return &FS{c, who} }

// linksMax is how many symbolic links one path may lead through.
const linksMax = 40

// codeError lets a Code stand for the errors of package fs, too.
type codeError struct{ sealfs.Code }

func (e codeError) Unwrap() error { return e.Code }

func (e codeError) Is(target error) bool {
	switch target {
	case fs.ErrNotExist:
		return e.Code == sealfs.ErrNotExist
	case fs.ErrExist:
		return e.Code == sealfs.ErrExist || e.Code == sealfs.ErrNotEmpty
	case fs.ErrPermission:
		return e.Code == sealfs.ErrPerm || e.Code == sealfs.ErrAccess
	case fs.ErrInvalid:
		return e.Code == sealfs.ErrInvalid
	case fs.ErrClosed:
		return e.Code == sealfs.ErrClosed
	}
	return false
}

func plain(err error) error {
	var code sealfs.Code
	if errors.As(err, &code) && err == error(code) {
		return codeError{code}
	}
	return err
}

func pathError(what, name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: what, Path: name, Err: plain(err)}
}

// walk follows the directories of name and returns the last one with the rest
// of name, which is "" when name is the root.
func (f *FS) walk(ctx context.Context, name string, links *int) (dir sealfs.Ino, last string, err error) {
	stack := []sealfs.Ino{f.c.o.Root}
	todo := splitPath(name)
	for i := 0; i < len(todo); i++ {
		part := todo[i]
		top := stack[len(stack)-1]
		if part == ".." {
			if len(stack) > 1 {
				stack = stack[:len(stack)-1]
			}
			continue
		}
		if i == len(todo)-1 {
			return top, part, nil
		}
		a, err := f.c.Lookup(ctx, top, part)
		if err != nil {
			return 0, "", err
		}
		switch a.Mode & modeType {
		case modeDir:
			stack = append(stack, a.Ino)
		case modeLink:
			target, err := f.target(ctx, a.Ino, links)
			if err != nil {
				return 0, "", err
			}
			if strings.HasPrefix(target, "/") {
				stack = stack[:1]
			}
			todo = slices.Concat(splitPath(target), todo[i+1:])
			i = -1
		default:
			return 0, "", sealfs.ErrNotDir
		}
	}
	return stack[len(stack)-1], "", nil
}

func splitPath(name string) []string {
	return slices.DeleteFunc(strings.Split(name, "/"), func(s string) bool { return s == "" || s == "." })
}

// target reads a symbolic link and counts it.
func (f *FS) target(ctx context.Context, ino sealfs.Ino, links *int) (string, error) {
	if *links++; *links > linksMax {
		return "", sealfs.ErrTooManySymlinks
	}
	b, err := f.c.Readlink(ctx, ino)
	return string(b), err
}

// find returns the attributes of name, and follows a link at its end if follow.
func (f *FS) find(ctx context.Context, name string, follow bool) (op.Attr, error) {
	links := 0
	for {
		dir, last, err := f.walk(ctx, name, &links)
		if err != nil {
			return op.Attr{}, err
		}
		if last == "" {
			return f.c.Getattr(ctx, dir)
		}
		a, err := f.c.Lookup(ctx, dir, last)
		if err != nil || !follow || a.Mode&modeType != modeLink {
			return a, err
		}
		target, err := f.target(ctx, a.Ino, &links)
		if err != nil {
			return op.Attr{}, err
		}
		name = join(name, target)
	}
}

// join returns the path of what a link at name with the given target points to.
// It does not shorten "x/..", since x may be a link.
func join(name, target string) string {
	if strings.HasPrefix(target, "/") {
		return target
	}
	i := strings.LastIndexByte(strings.TrimRight(name, "/"), '/')
	return name[:i+1] + target
}

// parent finds the directory in which name is to be made or removed.
func (f *FS) parent(ctx context.Context, name string) (sealfs.Ino, string, error) {
	links := 0
	dir, last, err := f.walk(ctx, name, &links)
	if err == nil && last == "" {
		err = sealfs.ErrInvalid
	}
	return dir, last, err
}

// Stat returns the FileInfo of name; its Sys is an *op.Attr.
func (f *FS) Stat(name string) (fs.FileInfo, error) { return f.stat("stat", name, true) }

// Lstat is Stat that does not follow a symbolic link at the end of name.
func (f *FS) Lstat(name string) (fs.FileInfo, error) { return f.stat("lstat", name, false) }

func (f *FS) stat(what, name string, follow bool) (fs.FileInfo, error) {
	a, err := f.find(context.Background(), name, follow)
	if err != nil {
		return nil, pathError(what, name, err)
	}
	return &fileInfo{path.Base(name), a}, nil
}

// Mkdir makes a directory.
func (f *FS) Mkdir(name string, perm fs.FileMode) error {
	ctx := context.Background()
	dir, last, err := f.parent(ctx, name)
	if err == nil {
		_, err = f.c.Mkdir(ctx, dir, last, unixPerm(perm), f.who)
	} else if err == sealfs.ErrInvalid {
		err = sealfs.ErrExist // the root
	}
	return pathError("mkdir", name, err)
}

// MkdirAll makes a directory and those above that are missing.
func (f *FS) MkdirAll(name string, perm fs.FileMode) error {
	if a, err := f.find(context.Background(), name, true); err == nil {
		if a.Mode&modeType != modeDir {
			return pathError("mkdir", name, sealfs.ErrNotDir)
		}
		return nil
	}
	if up := path.Dir(name); up != name && up != "." {
		if err := f.MkdirAll(up, perm); err != nil {
			return err
		}
	}
	err := f.Mkdir(name, perm)
	if errors.Is(err, sealfs.ErrExist) {
		if a, serr := f.find(context.Background(), name, true); serr == nil && a.Mode&modeType == modeDir {
			return nil // somebody else was quicker
		}
	}
	return err
}

// Remove removes a file or an empty directory.
func (f *FS) Remove(name string) error {
	ctx := context.Background()
	dir, last, err := f.parent(ctx, name)
	if err == nil {
		if err = f.c.Unlink(ctx, dir, last); err == sealfs.ErrIsDir {
			err = f.c.Rmdir(ctx, dir, last)
		}
	}
	return pathError("remove", name, err)
}

// RemoveAll removes name and everything below. A name that does not exist is no error.
func (f *FS) RemoveAll(name string) error {
	err := f.Remove(name)
	if !errors.Is(err, sealfs.ErrNotEmpty) {
		if errors.Is(err, sealfs.ErrNotExist) {
			return nil
		}
		return err
	}
	for {
		entries, err := f.ReadDir(name)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := f.RemoveAll(path.Join(name, e.Name())); err != nil {
				return err
			}
		}
		if err = f.Remove(name); !errors.Is(err, sealfs.ErrNotEmpty) {
			return err
		}
	}
}

// Rename moves oldname to newname and replaces what is there.
func (f *FS) Rename(oldname, newname string) error {
	ctx := context.Background()
	dir, last, err := f.parent(ctx, oldname)
	if err == nil {
		var dir2 sealfs.Ino
		var last2 string
		if dir2, last2, err = f.parent(ctx, newname); err == nil {
			err = f.c.Rename(ctx, dir, last, dir2, last2, 0)
		}
	}
	return linkError("rename", oldname, newname, err)
}

// Link gives the file oldname another name.
func (f *FS) Link(oldname, newname string) error {
	ctx := context.Background()
	a, err := f.find(ctx, oldname, false)
	if err == nil {
		var dir sealfs.Ino
		var last string
		if dir, last, err = f.parent(ctx, newname); err == nil {
			_, err = f.c.Link(ctx, a.Ino, dir, last)
		}
	}
	return linkError("link", oldname, newname, err)
}

// Symlink makes newname a symbolic link to oldname.
func (f *FS) Symlink(oldname, newname string) error {
	ctx := context.Background()
	dir, last, err := f.parent(ctx, newname)
	if err == nil {
		_, err = f.c.Symlink(ctx, dir, last, oldname, f.who)
	}
	return linkError("symlink", oldname, newname, err)
}

func linkError(what, oldname, newname string, err error) error {
	if err == nil {
		return nil
	}
	return &os.LinkError{Op: what, Old: oldname, New: newname, Err: plain(err)}
}

// Readlink returns the target of a symbolic link.
func (f *FS) Readlink(name string) (string, error) {
	ctx := context.Background()
	a, err := f.find(ctx, name, false)
	if err != nil {
		return "", pathError("readlink", name, err)
	}
	b, err := f.c.Readlink(ctx, a.Ino)
	return string(b), pathError("readlink", name, err)
}

// Truncate changes the size of a file.
func (f *FS) Truncate(name string, size int64) error {
	if size < 0 {
		return pathError("truncate", name, sealfs.ErrInvalid)
	}
	return f.setattr("truncate", name, &SetAttr{Valid: op.SetSize, Size: uint64(size)})
}

// Chmod changes the permission bits of name.
func (f *FS) Chmod(name string, mode fs.FileMode) error {
	return f.setattr("chmod", name, &SetAttr{Valid: op.SetMode, Mode: unixPerm(mode)})
}

// Chown changes owner and group of name; -1 leaves one as it is.
func (f *FS) Chown(name string, uid, gid int) error {
	s := SetAttr{KillPriv: true}
	if uid >= 0 {
		s.Valid |= op.SetUID
		s.UID = uint32(uid)
	}
	if gid >= 0 {
		s.Valid |= op.SetGID
		s.GID = uint32(gid)
	}
	return f.setattr("chown", name, &s)
}

// Chtimes changes the access and modification times; a zero Time leaves one as it is.
func (f *FS) Chtimes(name string, atime, mtime time.Time) error {
	var s SetAttr
	if !atime.IsZero() {
		s.Valid |= op.SetAtime
		s.Atime = atime.UnixNano()
	}
	if !mtime.IsZero() {
		s.Valid |= op.SetMtime
		s.Mtime = mtime.UnixNano()
	}
	return f.setattr("chtimes", name, &s)
}

func (f *FS) setattr(what, name string, s *SetAttr) error {
	ctx := context.Background()
	a, err := f.find(ctx, name, true)
	if err == nil {
		_, err = f.c.Setattr(ctx, a.Ino, s)
	}
	return pathError(what, name, err)
}

// ReadDir returns the entries of a directory, sorted by name.
func (f *FS) ReadDir(name string) ([]fs.DirEntry, error) {
	file, err := f.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	entries, err := file.ReadDir(-1)
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return entries, err
}

// ReadFile returns the contents of a file.
func (f *FS) ReadFile(name string) ([]byte, error) {
	file, err := f.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return file.readAll()
}

// WriteFile makes data the contents of a file, which it creates with perm if need be.
func (f *FS) WriteFile(name string, data []byte, perm fs.FileMode) error {
	file, err := f.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, perm)
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	if cerr := file.Close(); err == nil {
		err = cerr
	}
	return err
}

// Setxattr sets an extended attribute of name.
func (f *FS) Setxattr(name, attr string, value []byte) error {
	ctx := context.Background()
	a, err := f.find(ctx, name, true)
	if err == nil {
		err = f.c.Setxattr(ctx, a.Ino, attr, value, 0)
	}
	return pathError("setxattr", name, err)
}

// Getxattr returns an extended attribute of name.
func (f *FS) Getxattr(name, attr string) ([]byte, error) {
	ctx := context.Background()
	a, err := f.find(ctx, name, true)
	var b []byte
	if err == nil {
		b, _, err = f.c.Getxattr(ctx, a.Ino, attr, sealfs.XattrValueMax, nil)
	}
	return b, pathError("getxattr", name, err)
}

// Listxattr returns the names of all extended attributes of name.
func (f *FS) Listxattr(name string) ([]string, error) {
	ctx := context.Background()
	a, err := f.find(ctx, name, true)
	var b []byte
	if err == nil {
		b, _, err = f.c.Listxattr(ctx, a.Ino, sealfs.XattrListMax, nil)
	}
	return xattrNames(b), pathError("listxattr", name, err)
}

// Removexattr removes an extended attribute of name.
func (f *FS) Removexattr(name, attr string) error {
	ctx := context.Background()
	a, err := f.find(ctx, name, true)
	if err == nil {
		err = f.c.Removexattr(ctx, a.Ino, attr)
	}
	return pathError("removexattr", name, err)
}

// IOFS returns the volume as an io/fs.FS, for reading.
func (f *FS) IOFS() fs.FS { return ioFS{f} }

type ioFS struct{ f *FS }

func (i ioFS) Open(name string) (fs.File, error) {
	if !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
	}
	file, err := i.f.Open(name)
	if err != nil {
		return nil, err // not a nil *File in an interface
	}
	return file, nil
}

func (i ioFS) Stat(name string) (fs.FileInfo, error) {
	if !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: "stat", Path: name, Err: fs.ErrInvalid}
	}
	return i.f.Stat(name)
}

func (i ioFS) Lstat(name string) (fs.FileInfo, error) {
	if !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: "lstat", Path: name, Err: fs.ErrInvalid}
	}
	return i.f.Lstat(name)
}

func (i ioFS) ReadLink(name string) (string, error) {
	if !fs.ValidPath(name) {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: fs.ErrInvalid}
	}
	return i.f.Readlink(name)
}

func (i ioFS) ReadFile(name string) ([]byte, error) {
	if !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
	}
	return i.f.ReadFile(name)
}

func (i ioFS) ReadDir(name string) ([]fs.DirEntry, error) {
	if !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
	}
	return i.f.ReadDir(name)
}
