package linear

import (
	"encoding/binary"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Mounted is an actor that makes system calls below a directory, be it a mount or not.
type Mounted struct {
	root string
	fds  map[uint64]int
	buf  []byte
}

// NewMounted returns an actor that works below the directory root.
func NewMounted(root string) *Mounted {
	return &Mounted{root: root, fds: map[uint64]int{}, buf: make([]byte, 32<<10)}
}

// Enter implements Actor.
func (m *Mounted) Enter(path string) (uint64, error) {
	fd, err := unix.Open(filepath.Join(m.root, path), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	return m.hold(fd)
}

// hold keeps a descriptor under its inode number.
func (m *Mounted) hold(fd int) (uint64, error) {
	var st unix.Stat_t
	if err := again(func() error { return unix.Fstat(fd, &st) }); err != nil {
		unix.Close(fd)
		return 0, err
	}
	if _, have := m.fds[st.Ino]; have {
		unix.Close(fd)
	} else {
		m.fds[st.Ino] = fd
	}
	return st.Ino, nil
}

// again repeats a question that a signal has interrupted.
func again(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

// Close implements Actor.
func (m *Mounted) Close(ino uint64) {
	if fd, ok := m.fds[ino]; ok {
		unix.Close(fd)
		delete(m.fds, ino)
	}
}

// Do implements Actor.
func (m *Mounted) Do(c *Call) (a Answer) {
	err := m.do(c, &a)
	if err != nil {
		e := syscall.EIO
		errors.As(err, &e)
		a = failed(e)
		switch c.Kind {
		case Link:
			a.Loose = e == syscall.ENOENT
		case Rename, RenameNoReplace, Exchange:
			a.Loose = e == syscall.ENOTDIR || e == syscall.EISDIR || e == syscall.EINVAL || e == syscall.ENOTEMPTY
		}
	}
	return a
}

func (m *Mounted) do(c *Call, a *Answer) (err error) {
	dir, dir2, fd := m.fds[c.Dir], m.fds[c.Dir2], m.fds[c.Ino]
	openat := func(flags int) error {
		got, err := unix.Openat(dir, c.Name, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o644)
		if err == nil {
			a.Ino, err = m.hold(got)
		}
		return err
	}
	var st unix.Stat_t
	switch c.Kind {
	case Lookup:
		err = unix.Fstatat(dir, c.Name, &st, unix.AT_SYMLINK_NOFOLLOW)
		a.Ino, a.Dir = st.Ino, st.Mode&unix.S_IFMT == unix.S_IFDIR
	case Getattr:
		err = unix.Fstat(fd, &st)
		a.Links, a.Size = int(st.Nlink), int(st.Size)
	case Readdir:
		a.Entries, err = m.list(dir)
	case Create:
		return openat(unix.O_RDWR | unix.O_CREAT)
	case CreateExcl:
		return openat(unix.O_RDWR | unix.O_CREAT | unix.O_EXCL)
	case Open:
		return openat(unix.O_RDWR)
	case OpenDir:
		return openat(unix.O_RDONLY | unix.O_DIRECTORY)
	case Mkdir:
		return unix.Mkdirat(dir, c.Name, 0o755)
	case Rmdir:
		return unix.Unlinkat(dir, c.Name, unix.AT_REMOVEDIR)
	case Unlink:
		return unix.Unlinkat(dir, c.Name, 0)
	case Link:
		return unix.Linkat(fd, "", dir, c.Name, unix.AT_EMPTY_PATH)
	case Rename:
		a.Loose = true
		return unix.Renameat2(dir, c.Name, dir2, c.Name2, 0)
	case RenameNoReplace:
		return unix.Renameat2(dir, c.Name, dir2, c.Name2, unix.RENAME_NOREPLACE)
	case Exchange:
		a.Loose = true
		return unix.Renameat2(dir, c.Name, dir2, c.Name2, unix.RENAME_EXCHANGE)
	case Read:
		var n int
		n, err = unix.Pread(fd, m.buf[:c.Len], int64(c.Off))
		a.Data, a.Loose = string(m.buf[:max(n, 0)]), true
	case Write, Append:
		return m.write(fd, c)
	case Truncate:
		return unix.Ftruncate(fd, int64(c.Len))
	case TryLock:
		return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	case TryShare:
		return unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB)
	case WaitLock:
		return unix.Flock(fd, unix.LOCK_EX)
	case Unlock:
		return unix.Flock(fd, unix.LOCK_UN)
	}
	return err
}

func (m *Mounted) write(fd int, c *Call) error {
	flags := 0
	if c.Kind == Append {
		flags = unix.O_APPEND
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags); err != nil {
		return err
	}
	n, err := unix.Pwrite(fd, []byte(c.Data), int64(c.Off))
	if err == nil && n < len(c.Data) {
		err = unix.EIO // a part of it
	}
	return err
}

// list is one getdents: what a file system answers at once.
func (m *Mounted) list(fd int) (all []Entry, err error) {
	if _, err := unix.Seek(fd, 0, 0); err != nil {
		return nil, err
	}
	n, err := unix.Getdents(fd, m.buf)
	if err != nil {
		return nil, err
	}
	for b := m.buf[:n]; len(b) > 19; {
		ino, size := binary.NativeEndian.Uint64(b), int(binary.NativeEndian.Uint16(b[16:]))
		at, _, _ := strings.Cut(string(b[19:size]), "\x00")
		if at != "." && at != ".." {
			all = append(all, Entry{at, ino})
		}
		b = b[size:]
	}
	slices.SortFunc(all, func(x, y Entry) int { return strings.Compare(x.Name, y.Name) })
	return all, nil
}
