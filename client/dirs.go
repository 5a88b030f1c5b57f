package client

import (
	"sync"

	"sealfs"
	"sealfs/op"
)

// dirsMax bounds how many directories dirs remembers.
const dirsMax = 4096

// dirs remembers the attributes of directories whose entries this client has
// changed. The kernel forgets them with each change and asks for them before the next
// one; the answer to the change has told them already. They are believed under the
// directory's lease.
type dirs struct {
	mu sync.Mutex
	of map[sealfs.Ino]dirAttr
}

type dirAttr struct {
	attr   op.Attr
	belief belief
}

// note remembers attributes. Answers may come in another order than they were
// given: the newest counts.
func (d *dirs) note(a *op.Attr, b belief) {
	if a.Mode&modeType != modeDir {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if old, ok := d.of[a.Ino]; ok && old.attr.Version > a.Version {
		return
	}
	if len(d.of) >= dirsMax {
		clear(d.of)
	}
	if d.of == nil {
		d.of = map[sealfs.Ino]dirAttr{}
	}
	d.of[a.Ino] = dirAttr{*a, b} // without belief, too: older answers must not come back
}

// dirAttr returns what is known of a directory.
func (c *Client) dirAttr(ino sealfs.Ino) (answer, bool) {
	d := &c.dirs
	d.mu.Lock()
	known, ok := d.of[ino]
	d.mu.Unlock()
	if !ok || !c.believes(ino, known.belief) {
		return answer{}, false
	}
	return answer{Attr: known.attr, ino: known.belief}, true
}

// forget is for who changes a directory and is not told its attributes.
func (d *dirs) forget(ino sealfs.Ino) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.of, ino)
}

// learn takes from the answer to k what it grants, and what it tells of directories. An answer
// from a result row, to a request that came twice, does not tell the directory.
func (c *Client) learn(k *call) {
	if !c.leasing {
		return
	}
	c.believe(k)
	if k.rep.Code != 0 {
		return
	}
	switch k.Type {
	case op.Create, op.Mknod, op.Mkdir, op.Symlink, op.Link, op.Unlink, op.Rmdir:
		if k.rep.Dir.Ino == k.Dir {
			c.dirs.note(&k.rep.Dir, k.dir)
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
		c.dirs.note(&k.rep.Attr, k.ino)
	case op.Setxattr, op.Removexattr:
		c.dirs.forget(k.Ino)
	}
}
