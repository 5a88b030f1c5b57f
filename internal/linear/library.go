package linear

import (
	"context"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"sealfs"
	"sealfs/client"
	"sealfs/op"
)

// Library is an actor that calls the Go library.
type Library struct {
	c     *client.Client
	fs    *client.FS
	limit time.Duration // for one call
	paths map[uint64]string
	held  map[uint64]func()
}

// NewLibrary returns an actor that uses c. Calls that take longer than limit are lost; 0: none.
func NewLibrary(c *client.Client, limit time.Duration) *Library {
	return &Library{c: c, fs: c.FS(client.Cred{}), limit: limit, paths: map[uint64]string{}, held: map[uint64]func(){}}
}

// Enter implements Actor.
func (l *Library) Enter(name string) (uint64, error) {
	f, err := l.fs.Open(name)
	if err != nil {
		return 0, err
	}
	ino := uint64(f.Ino())
	l.paths[ino] = name
	l.keep(ino, func() { f.Close() })
	return ino, nil
}

// keep remembers how to close what is open; what is open already is closed again.
func (l *Library) keep(ino uint64, end func()) {
	if l.held[ino] != nil {
		end()
		return
	}
	l.held[ino] = end
}

// Close implements Actor.
func (l *Library) Close(ino uint64) {
	if end := l.held[ino]; end != nil {
		end()
		delete(l.held, ino)
	}
}

// Do implements Actor.
func (l *Library) Do(c *Call) (a Answer) {
	ctx := context.Background()
	if l.limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, l.limit)
		defer cancel()
	}
	if err := l.do(ctx, c, &a); err != nil {
		return failed(client.Errno(err))
	}
	return a
}

func (l *Library) do(ctx context.Context, c *Call, a *Answer) error {
	dir, dir2, ino := sealfs.Ino(c.Dir), sealfs.Ino(c.Dir2), sealfs.Ino(c.Ino)
	rename := func(flags op.Flags) error { return l.c.Rename(ctx, dir, c.Name, dir2, c.Name2, flags) }
	lock := func(t op.LockType) error {
		how := l.c.SetLock
		if c.Kind == WaitLock {
			how = l.c.WaitLock
		}
		return how(ctx, ino, op.Lock{Type: t, End: 1<<63 - 1, Owner: uint64(c.Owner)}, op.Flock)
	}
	switch c.Kind {
	case Lookup, Getattr:
		at, err := op.Attr{}, error(nil)
		if c.Kind == Lookup {
			at, err = l.c.Lookup(ctx, dir, c.Name)
		} else {
			at, err = l.c.Getattr(ctx, ino)
		}
		a.Ino, a.Dir, a.Links, a.Size = uint64(at.Ino), at.Mode&syscall.S_IFMT == syscall.S_IFDIR, int(at.Nlink), int(at.Size)
		return err
	case Readdir:
		list, _, err := l.c.Readdir(ctx, dir, 0, 64<<10, false, nil)
		for _, e := range list {
			a.Entries = append(a.Entries, Entry{e.Name, uint64(e.Ino)})
		}
		slices.SortFunc(a.Entries, func(x, y Entry) int { return strings.Compare(x.Name, y.Name) })
		return err
	case Create, CreateExcl, Open, OpenDir:
		return l.open(ctx, c, a)
	case Mkdir:
		at, err := l.c.Mkdir(ctx, dir, c.Name, 0o755, client.Cred{})
		a.Ino = uint64(at.Ino)
		return err
	case Rmdir:
		return l.c.Rmdir(ctx, dir, c.Name)
	case Unlink:
		return l.c.Unlink(ctx, dir, c.Name)
	case Link:
		_, err := l.c.Link(ctx, ino, dir, c.Name)
		return err
	case Rename:
		return rename(0)
	case RenameNoReplace:
		return rename(op.NoReplace)
	case Exchange:
		return rename(op.Exchange)
	case Read:
		b, err := l.c.Read(ctx, ino, uint64(c.Off), c.Len, nil)
		a.Data = string(b)
		return err
	case Write:
		return l.c.Write(ctx, ino, uint64(c.Off), []byte(c.Data), 0)
	case Append:
		return l.c.Write(ctx, ino, 0, []byte(c.Data), op.Append)
	case Truncate:
		_, err := l.c.Setattr(ctx, ino, &client.SetAttr{Valid: op.SetSize, Size: uint64(c.Len)})
		return err
	case TryShare:
		return lock(op.ReadLock)
	case Unlock:
		return lock(op.Unlock)
	}
	return lock(op.WriteLock)
}

// open opens by name: in the arena's directories as programs do, in others, which
// may have no path by now, step by step.
func (l *Library) open(ctx context.Context, c *Call, a *Answer) error {
	flags := map[Kind]int{Create: os.O_RDWR | os.O_CREATE, CreateExcl: os.O_RDWR | os.O_CREATE | os.O_EXCL, Open: os.O_RDWR}[c.Kind]
	if at, ok := l.paths[c.Dir]; ok && c.Kind != OpenDir {
		f, err := l.fs.OpenFile(path.Join(at, c.Name), flags, 0o644)
		if err != nil {
			return err
		}
		a.Ino = uint64(f.Ino())
		l.keep(a.Ino, func() { f.Close() })
		return nil
	}
	for {
		at, err := op.Attr{}, error(nil)
		if c.Kind == CreateExcl || c.Kind == Create {
			at, err = l.c.Create(ctx, sealfs.Ino(c.Dir), c.Name, 0o644, client.Cred{})
		}
		if c.Kind == Open || c.Kind == OpenDir || c.Kind == Create && err == sealfs.ErrExist {
			if at, err = l.c.Lookup(ctx, sealfs.Ino(c.Dir), c.Name); err != nil {
				if err == sealfs.ErrNotExist && c.Kind == Create {
					continue // it has gone meanwhile
				}
				return err
			}
			switch isDir := at.Mode&syscall.S_IFMT == syscall.S_IFDIR; {
			case isDir && c.Kind != OpenDir:
				return sealfs.ErrIsDir
			case !isDir && c.Kind == OpenDir:
				return sealfs.ErrNotDir
			}
			open := l.c.OpenToWrite
			if c.Kind == OpenDir {
				open = l.c.Open
			}
			if _, err = open(ctx, at.Ino); err == sealfs.ErrNotExist || err == sealfs.ErrStale {
				continue // another one has that name meanwhile, or none
			}
		}
		if err != nil {
			return err
		}
		a.Ino = uint64(at.Ino)
		l.keep(a.Ino, func() { l.c.Release(context.Background(), at.Ino) })
		return nil
	}
}
