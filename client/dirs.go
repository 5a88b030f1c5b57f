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
	mu     sync.Mutex
	of     map[sealfs.Ino]dirAttr
	before uint64 // mark: what was asked before is not remembered
}

type dirAttr struct {
	attr   op.Attr
	belief belief
}

// note remembers attributes from the answer to a request with that mark. Answers may come in
// another order than they were given: the newest counts.
func (d *dirs) note(a *op.Attr, b belief, mark uint64) {
	if a.Mode&modeType != modeDir {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if mark <= d.before {
		return
	}
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

// oneDirAttr returns what is known of a directory: what stands at its home, if it is split.
func (c *Client) oneDirAttr(ino sealfs.Ino) (answer, bool) {
	d := &c.dirs
	asked := c.leases.mark() // what this client had changed by then is in it
	d.mu.Lock()
	known, ok := d.of[ino]
	d.mu.Unlock()
	if !ok || !c.believes(ino, known.belief) {
		return answer{}, false
	}
	return answer{Attr: known.attr, ino: known.belief, mark: asked}, true
}

// forget forgets a directory. now is the mark of who has changed it and was not told
// its attributes: an answer that is still on its way may be from before.
func (d *dirs) forget(now uint64, inos ...sealfs.Ino) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.before = max(d.before, now)
	for _, ino := range inos {
		delete(d.of, ino)
	}
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
	c.leases.makes(k)
	switch k.Type {
	case op.Create, op.Mknod, op.Mkdir, op.Symlink, op.Link, op.Unlink, op.Rmdir:
		if k.rep.Dir.Ino == k.Dir {
			c.dirs.note(&k.rep.Dir, k.dir, k.mark)
		} else {
			c.dirs.forget(c.leases.mark(), k.Dir)
		}
		if k.Type == op.Rmdir {
			c.dirs.forget(0, k.rep.Attr.Ino)
		}
	case op.Rename:
		c.dirs.forget(c.leases.mark(), k.Dir, k.Dir2, k.rep.Attr.Ino) // the last is what was moved
	case op.Setattr:
		c.dirs.note(&k.rep.Attr, k.ino, k.mark)
	case op.Setxattr, op.Removexattr:
		c.dirs.forget(c.leases.mark(), k.Ino)
	}
}
