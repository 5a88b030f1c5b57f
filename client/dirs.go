package client

import (
	"sync"
	"time"

	"sealfs"
	"sealfs/op"
)

// dirsMax bounds how many directories dirs remembers.
const dirsMax = 4096

// dirs remembers for a moment the attributes of directories whose entries this
// client has changed. The kernel forgets them with each change and asks for them
// before the next one; the answer to the change has told them already. They are not
// believed for longer than the kernel itself would.
type dirs struct {
	mu sync.Mutex
	of map[sealfs.Ino]dirAttr
}

type dirAttr struct {
	attr  op.Attr
	until time.Time
}

// note remembers attributes as they were at the time asked or later. Answers may
// come in another order than they were given: the newest counts.
func (d *dirs) note(a *op.Attr, asked time.Time, ttl time.Duration) {
	if a.Mode&modeType != modeDir {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.of[a.Ino].attr.Version > a.Version {
		return
	}
	if len(d.of) >= dirsMax {
		clear(d.of)
	}
	if d.of == nil {
		d.of = map[sealfs.Ino]dirAttr{}
	}
	d.of[a.Ino] = dirAttr{*a, asked.Add(ttl)}
}

// get returns what is known of a directory, and for how long it may be believed.
func (d *dirs) get(ino sealfs.Ino) (a op.Attr, left time.Duration, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	known, ok := d.of[ino]
	if !ok {
		return a, 0, false
	}
	if left = time.Until(known.until); left <= 0 {
		delete(d.of, ino)
		return a, 0, false
	}
	return known.attr, left, true
}

// forget is for who changes a directory and is not told its attributes.
func (d *dirs) forget(ino sealfs.Ino) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.of, ino)
}

// learn takes from the answer to k what it tells of directories. An answer from a
// result row, to a request that came twice, does not tell the directory.
func (c *Client) learn(k *call, asked time.Time) {
	ttl := time.Duration(c.layoutAge.Load())
	switch k.Type {
	case op.Create, op.Mknod, op.Mkdir, op.Symlink, op.Link, op.Unlink, op.Rmdir:
		if k.rep.Dir.Ino == k.Dir {
			c.dirs.note(&k.rep.Dir, asked, ttl)
		} else {
			c.dirs.forget(k.Dir)
		}
		if k.Type == op.Rmdir {
			c.dirs.forget(k.rep.Attr.Ino)
		}
	case op.Rename:
		c.dirs.forget(k.Dir)
		c.dirs.forget(k.Dir2)
		c.dirs.forget(k.rep.Attr.Ino) // what was moved
	case op.Setattr:
		c.dirs.note(&k.rep.Attr, asked, ttl)
	case op.Setxattr, op.Removexattr:
		c.dirs.forget(k.Ino)
	}
}
