package tree

import (
	"context"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"sealfs/op"
)

// Usage is what a file or tree holds. The size of a file counts once for each name.
type Usage struct {
	Path   string `json:"path"`
	Bytes  uint64 `json:"bytes"` // sizes, as stat(2) tells them
	Files  uint64 `json:"files"` // names that are no directory's
	Dirs   uint64 `json:"dirs"`  // without the tree's own
	Walked bool   `json:"walked"`
}

// Measure calls fn for what is below path, down to depth levels, and for path itself at last. Where
// the file system keeps totals of directories, they are asked for; elsewhere it walks. What is mounted
// below path does not count.
func Measure(ctx context.Context, path string, depth int, fn func(Usage) error) error {
	fd, err := retry(func() (int, error) { return unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0) })
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return fn(Usage{Path: path, Bytes: sizeOf(&st), Files: 1})
	}
	m := meter{ctx: ctx, dev: st.Dev, fn: fn}
	_, err = m.dir(unix.AT_FDCWD, path, path, depth)
	return err
}

// sizeOf returns what the size of a file counts.
func sizeOf(st *unix.Stat_t) uint64 {
	if t := st.Mode & unix.S_IFMT; t != unix.S_IFREG && t != unix.S_IFLNK {
		return 0
	}
	return uint64(st.Size)
}

// meter is one Measure.
type meter struct {
	ctx context.Context
	dev uint64
	fn  func(Usage) error
}

// dir measures the directory name of the directory at, and tells of it if depth is not negative.
func (m *meter) dir(at int, name, path string, depth int) (Usage, error) {
	u := Usage{Path: path}
	if err := m.ctx.Err(); err != nil {
		return u, err
	}
	fd, err := retry(func() (int, error) {
		return unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return u, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	known := m.ask(fd, &u)
	if known && depth <= 0 {
		return u, m.tell(u, depth)
	}
	sum := Usage{Path: path, Walked: true}
	names, err := read(fd)
	if err != nil {
		return u, &fs.PathError{Op: "read", Path: path, Err: err}
	}
	for _, e := range names {
		var st unix.Stat_t
		full := filepath.Join(path, e)
		err := unix.Fstatat(fd, e, &st, unix.AT_SYMLINK_NOFOLLOW)
		switch {
		case err == unix.ENOENT: // gone meanwhile
		case err != nil:
			return u, &fs.PathError{Op: "stat", Path: full, Err: err}
		case st.Mode&unix.S_IFMT != unix.S_IFDIR:
			sum.Bytes += sizeOf(&st)
			sum.Files++
		case st.Dev == m.dev:
			below, err := m.dir(fd, e, full, depth-1)
			if err != nil && !isGone(err) {
				return u, err
			}
			sum.Bytes += below.Bytes
			sum.Files += below.Files
			sum.Dirs += below.Dirs + 1
		}
	}
	if !known {
		u = sum
	}
	return u, m.tell(u, depth)
}

// isGone reports whether a directory has been removed, or replaced, since its name was read.
func isGone(err error) bool {
	pe, ok := err.(*fs.PathError)
	return ok && pe.Op == "open" && (pe.Err == unix.ENOENT || pe.Err == unix.ENOTDIR || pe.Err == unix.ELOOP)
}

func (m *meter) tell(u Usage, depth int) error {
	if depth < 0 {
		return nil
	}
	return m.fn(u)
}

// ask fills in the totals that the file system keeps of a directory. It reports whether there are any.
func (m *meter) ask(fd int, u *Usage) bool {
	for name, to := range map[string]*uint64{op.AttrBytes: &u.Bytes, op.AttrFiles: &u.Files, op.AttrDirs: &u.Dirs} {
		var b [20]byte
		n, err := retry(func() (int, error) { return unix.Fgetxattr(fd, name, b[:]) })
		if err == nil {
			*to, err = strconv.ParseUint(string(b[:n]), 10, 64)
		}
		if err != nil {
			return false
		}
	}
	return true
}

// read returns the names in an open directory, sorted.
func read(fd int) (names []string, err error) {
	b := make([]byte, entriesLen)
	for {
		n, err := retry(func() (int, error) { return unix.ReadDirent(fd, b) })
		if err != nil {
			return nil, err
		}
		if n == 0 {
			slices.Sort(names)
			return names, nil
		}
		for e := range entries(b[:n]) {
			names = append(names, string(e.name))
		}
	}
}
