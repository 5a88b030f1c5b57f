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
	"sealfs/cluster"
)

// A place is a file on a mount.
type place struct {
	path string // absolute
	dev  string // of the file system: major:minor
	ino  uint64 // as the kernel has it
}

// findPlace looks at a file. Symbolic links in the path are followed, but for the last.
func findPlace(path string) (p place, err error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return p, err
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return p, lookFault(path, err)
	}
	abs = filepath.Join(parent, filepath.Base(abs))
	var st unix.Stat_t
	if err := unix.Lstat(abs, &st); err != nil {
		return p, lookFault(path, &os.PathError{Op: "stat", Path: path, Err: err})
	}
	return place{abs, fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)), st.Ino}, nil
}

// on reports whether the file is on our mount at point. Then root says whether it
// is its root, of which the kernel's number is not ours.
func (p place) on(point string) (yes, root bool, err error) {
	m, ok, err := mountAt(point)
	if err != nil || !ok || !m.ours() || m.dev != p.dev {
		return false, false, err
	}
	return true, p.path == point || !strings.HasPrefix(p.path, point+"/"), nil
}

// Locate finds the stores that keep a file on one of the daemon's mounts; ok is
// false if it is on none of them. Symbolic links in the path are followed, but for the last.
func (a *MountAdmin) Locate(ctx context.Context, path string) (l Location, ok bool, err error) {
	if !a.Running() {
		return l, false, nil
	}
	p, err := findPlace(path)
	if err != nil {
		return l, false, err
	}
	list, err := a.List(ctx)
	if err != nil {
		return l, false, err
	}
	for _, m := range list {
		yes, root, err := p.on(m.Mount)
		if err != nil {
			return l, false, err
		}
		if !yes {
			continue
		}
		r := cluster.NewRemote(m.Managers, cluster.RemoteOptions{Cluster: m.Cluster})
		defer r.Close()
		cm, err := r.WaitMap(ctx)
		if err != nil {
			return l, true, err
		}
		ino := sealfs.Ino(p.ino)
		if root {
			v, _ := cm.Volume(m.Volume)
			ino = v.Root
		}
		l, err = locateIn(cm, ino)
		l.Path, l.Volume = p.path, m.Volume
		return l, true, err
	}
	return l, false, nil
}

// locateIn finds an inode's shard, and that shard's stores.
func locateIn(m *cluster.Map, ino sealfs.Ino) (Location, error) {
	if ino < sealfs.InoCounterMin || ino > sealfs.InoMax {
		return Location{}, fmt.Errorf("inode %d: %w", ino, sealfs.ErrInvalid)
	}
	shard := ino.Home(m.Shards)
	if int(shard) >= len(m.Table) {
		return Location{}, errors.New("the cluster map has no such shard")
	}
	row := m.Table[shard]
	l := Location{Ino: ino, Shard: shard, Epoch: row.Epoch}
	for _, i := range row.Replicas {
		info := m.Stores[i]
		l.Replicas = append(l.Replicas, StoreLocation{Store: info.ID, Addr: info.Addr, State: info.State.String()})
	}
	return l, nil
}

// Locate finds the stores that keep a file, given by a path in one of the
// directory's mounts. Symbolic links in the path are followed, but for the last.
func (d Dir) Locate(ctx context.Context, path string) (Location, error) {
	p, err := findPlace(path)
	if err != nil {
		return Location{}, err
	}
	live, _, err := d.processes()
	if err != nil {
		return Location{}, err
	}
	a := d.Admin()
	defer a.Close()
	for _, proc := range live {
		yes, root, err := p.on(proc.Mount)
		if err != nil {
			return Location{}, err
		}
		if !yes {
			continue
		}
		ino := sealfs.Ino(p.ino)
		if root {
			if ino, err = d.root(ctx, a, proc.Volume); err != nil {
				return Location{}, err
			}
		}
		l, err := a.Locate(ctx, ino)
		l.Path, l.Volume = p.path, proc.Volume
		return l, err
	}
	if len(live) == 0 {
		return Location{}, a.unreachable(ctx, errors.New("no process"))
	}
	return Location{}, fault(sealfs.ErrInvalid, "%s is not in a mount of %s: name a file below one of its mounts (see `sealfs status --data %s`), or another --data", p.path, d, d)
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
