package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"sealfs"
)

// Locate finds the stores that keep a file, given by a path in one of the
// directory's mounts. Symbolic links in the path are followed, but for the last.
func (d Dir) Locate(ctx context.Context, path string) (Location, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return Location{}, err
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return Location{}, lookFault(path, err)
	}
	abs = filepath.Join(parent, filepath.Base(abs))
	var st unix.Stat_t
	if err := unix.Lstat(abs, &st); err != nil {
		return Location{}, lookFault(path, &os.PathError{Op: "stat", Path: path, Err: err})
	}
	live, _, err := d.processes()
	if err != nil {
		return Location{}, err
	}
	a := d.Admin()
	defer a.Close()
	for _, p := range live {
		m, ok, err := mountAt(p.Mount)
		if err != nil {
			return Location{}, err
		}
		if !ok || !m.ours() || m.dev != fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)) {
			continue
		}
		ino := sealfs.Ino(st.Ino)
		if abs == p.Mount || !strings.HasPrefix(abs, p.Mount+"/") {
			// The kernel's number for the root of a mount is not ours.
			if ino, err = d.root(ctx, a, p.Volume); err != nil {
				return Location{}, err
			}
		}
		l, err := a.Locate(ctx, ino)
		l.Path, l.Volume = abs, p.Volume
		return l, err
	}
	if len(live) == 0 {
		return Location{}, a.unreachable(ctx, errors.New("no process"))
	}
	return Location{}, fault(sealfs.ErrInvalid, "%s is not in a mount of %s: name a file below one of its mounts (see `sealfs status --data %s`), or another --data", abs, d, d)
}

func lookFault(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fault(sealfs.ErrNotExist, "there is no file %s", path)
	}
	return err
}

// root returns the root directory of a volume.
func (d Dir) root(ctx context.Context, a *Admin, volume string) (sealfs.Ino, error) {
	list, err := a.Volumes(ctx)
	if err != nil {
		return 0, err
	}
	for _, v := range list {
		if v.Name == volume {
			return v.Root, nil
		}
	}
	return 0, fault(sealfs.ErrNotExist, "volume %q is gone", volume)
}
