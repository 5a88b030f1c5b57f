package txn_test

import (
	"fmt"

	"sealfs"
	"sealfs/op"
)

// names is the sequential specification: names, links and parents, and nothing else.
type names map[sealfs.Ino]*node

type node struct {
	dir     bool
	links   uint32
	parent  sealfs.Ino
	entries map[string]sealfs.Ino
	subdirs uint32
}

func newNames(root sealfs.Ino) names {
	return names{root: {dir: true, links: 1, parent: root, entries: map[string]sealfs.Ino{}}}
}

// codes is a set of codes; code 0 stands for a success that changes nothing.
type codes uint64

func (c *codes) add(code sealfs.Code) { *c |= 1 << code }

func (c codes) has(code sealfs.Code) bool { return code < 64 && c&(1<<code) != 0 }

func (m names) below(dir, top sealfs.Ino) bool {
	for steps := 0; steps <= len(m); steps++ {
		if dir == top {
			return true
		}
		n := m[dir]
		if n == nil || n.parent == dir {
			return false
		}
		dir = n.parent
	}
	return true
}

func (m names) dirOf(ino sealfs.Ino, why *codes) *node {
	n := m[ino]
	switch {
	case n == nil:
		why.add(sealfs.ErrNotExist)
		return nil
	case !n.dir:
		why.add(sealfs.ErrNotDir)
		return nil
	}
	return n
}

// refusals returns for what reasons req would be refused now, whichever of them
// is looked at first. Empty: it would be done. {0}: it would succeed and change nothing.
func (m names) refusals(req *op.Request) (why codes) {
	dir := m.dirOf(req.Dir, &why)
	if dir == nil {
		return why
	}
	ino, found := dir.entries[req.Name]
	in := m[ino]
	switch req.Type {
	case op.Create, op.Mkdir:
		if found {
			why.add(sealfs.ErrExist)
		}
	case op.Link:
		if found {
			why.add(sealfs.ErrExist)
		}
		if in := m[req.Ino]; in == nil {
			why.add(sealfs.ErrNotExist)
		} else if in.dir {
			why.add(sealfs.ErrPerm)
		}
	case op.Unlink:
		if !found {
			why.add(sealfs.ErrNotExist)
		} else if in.dir {
			why.add(sealfs.ErrIsDir)
		}
	case op.Rmdir:
		if !found {
			why.add(sealfs.ErrNotExist)
		} else if !in.dir {
			why.add(sealfs.ErrNotDir)
		} else if len(in.entries) > 0 {
			why.add(sealfs.ErrNotEmpty)
		}
	case op.Rename:
		m.renameRefusals(req, ino, found, &why)
	}
	return why
}

func (m names) renameRefusals(req *op.Request, ino sealfs.Ino, found bool, why *codes) {
	if !found {
		why.add(sealfs.ErrNotExist)
	}
	to := m.dirOf(req.Dir2, why)
	if to == nil {
		return
	}
	ino2, found2 := to.entries[req.Name2]
	exchange := req.Flags&op.Exchange != 0
	if found2 && req.Flags&op.NoReplace != 0 {
		why.add(sealfs.ErrExist)
	}
	if !found2 && exchange {
		why.add(sealfs.ErrNotExist)
	}
	if !found {
		return
	}
	if found2 && ino2 == ino {
		if *why == 0 {
			why.add(0)
		}
		return
	}
	in, other := m[ino], m[ino2]
	if in.dir && m.below(req.Dir2, ino) || exchange && found2 && other.dir && m.below(req.Dir, ino2) {
		why.add(sealfs.ErrInvalid)
	}
	if !found2 || exchange {
		return
	}
	switch {
	case in.dir && !other.dir:
		why.add(sealfs.ErrNotDir)
	case !in.dir && other.dir:
		why.add(sealfs.ErrIsDir)
	case other.dir && len(other.entries) > 0:
		why.add(sealfs.ErrNotEmpty)
	}
}

// apply does req, whose answer named ino.
func (m names) apply(req *op.Request, ino sealfs.Ino) error {
	if dir, to := m[req.Dir], m[req.Dir2]; req.Type == op.Rename && dir != nil && to != nil {
		at, there := dir.entries[req.Name]
		if there && at == to.entries[req.Name2] && req.Flags&op.NoReplace == 0 {
			return nil // both names are one inode's: nothing is to be done
		}
	}
	if why := m.refusals(req); why != 0 {
		return fmt.Errorf("%s was done, but should have been refused (codes %b)", describe(req), why)
	}
	dir := m[req.Dir]
	switch req.Type {
	case op.Create, op.Mkdir:
		if m[ino] != nil || ino == 0 {
			return fmt.Errorf("%s made inode %d, which is there already", describe(req), ino)
		}
		n := &node{links: 1, dir: req.Type == op.Mkdir}
		if n.dir {
			n.parent, n.entries = req.Dir, map[string]sealfs.Ino{}
			dir.subdirs++
		}
		m[ino], dir.entries[req.Name] = n, ino
	case op.Link:
		m[req.Ino].links++
		dir.entries[req.Name] = req.Ino
	case op.Unlink, op.Rmdir:
		if at := dir.entries[req.Name]; at != ino {
			return fmt.Errorf("%s removed inode %d, the name stood for %d", describe(req), ino, at)
		}
		m.drop(dir, req.Name)
	case op.Rename:
		moved := dir.entries[req.Name]
		if moved != ino {
			return fmt.Errorf("%s moved inode %d, the name stood for %d", describe(req), ino, moved)
		}
		to := m[req.Dir2]
		other, found := to.entries[req.Name2]
		if req.Flags&op.Exchange != 0 {
			m.reparent(moved, req.Dir, req.Dir2)
			m.reparent(other, req.Dir2, req.Dir)
			dir.entries[req.Name], to.entries[req.Name2] = other, moved
			return nil
		}
		if found {
			m.drop(to, req.Name2)
		}
		m.reparent(moved, req.Dir, req.Dir2)
		delete(dir.entries, req.Name)
		to.entries[req.Name2] = moved
	}
	return nil
}

func (m names) drop(dir *node, name string) {
	ino := dir.entries[name]
	delete(dir.entries, name)
	in := m[ino]
	if in.dir {
		dir.subdirs--
	}
	if in.links--; in.links == 0 {
		delete(m, ino)
	}
}

func (m names) reparent(ino, from, to sealfs.Ino) {
	if in := m[ino]; in.dir {
		in.parent = to
		m[from].subdirs--
		m[to].subdirs++
	}
}

// outcome is what a question is answered.
type outcome struct {
	code  sealfs.Code
	ino   sealfs.Ino
	links uint32
	size  uint64
}

// ask answers a Lookup, Readdir or Getattr.
func (m names) ask(req *op.Request) outcome {
	if req.Type != op.Getattr {
		var why codes
		dir := m.dirOf(req.Dir, &why)
		if dir == nil {
			if why.has(sealfs.ErrNotDir) {
				return outcome{code: sealfs.ErrNotDir}
			}
			return outcome{code: sealfs.ErrNotExist}
		}
		if req.Type == op.Readdir {
			o := outcome{ino: req.Dir}
			for name, ino := range dir.entries {
				o.size += hash(name, ino)
			}
			return o
		}
		ino, ok := dir.entries[req.Name]
		if !ok {
			return outcome{code: sealfs.ErrNotExist}
		}
		return outcome{ino: ino}
	}
	in := m[req.Ino]
	if in == nil {
		return outcome{code: sealfs.ErrNotExist}
	}
	if in.dir {
		return outcome{ino: req.Ino, links: 2 + in.subdirs, size: uint64(len(in.entries))}
	}
	return outcome{ino: req.Ino, links: in.links}
}

// outcomeOf is what an answer says of what ask answers.
func outcomeOf(req *op.Request, rep *op.Reply) outcome {
	o := outcome{code: rep.Code, ino: rep.Attr.Ino}
	switch req.Type {
	case op.Readdir:
		for i := range rep.Entries {
			o.size += hash(rep.Entries[i].Name, rep.Entries[i].Ino)
		}
	case op.Getattr:
		o.links, o.size = rep.Attr.Nlink, rep.Attr.Size
	}
	return o
}

// hash stands for an entry; a directory's is the sum of them.
func hash(name string, ino sealfs.Ino) uint64 {
	h := uint64(ino)*0x9e3779b97f4a7c15 ^ uint64(name[0])*0xbf58476d1ce4e5b9
	return h ^ h>>29
}

// describe names a request in a trace.
func describe(req *op.Request) string {
	s := fmt.Sprintf("%v", req.Type)
	if req.Session != 0 {
		s = fmt.Sprintf("c%d.%d %v", req.Session, req.Seq, req.Type)
	}
	switch req.Type {
	case op.Create, op.Mkdir, op.Unlink, op.Rmdir, op.Lookup:
		s += fmt.Sprintf(" %d/%s", req.Dir, req.Name)
	case op.Link:
		s += fmt.Sprintf(" %d as %d/%s", req.Ino, req.Dir, req.Name)
	case op.Rename:
		s += fmt.Sprintf(" %d/%s to %d/%s flags %#x", req.Dir, req.Name, req.Dir2, req.Name2, req.Flags&(op.NoReplace|op.Exchange))
	case op.Readdir:
		s += fmt.Sprintf(" %d", req.Dir)
	case op.Getattr, op.Ancestors:
		s += fmt.Sprintf(" %d", req.Ino)
	case op.Prepare:
		s += fmt.Sprintf(" part %d shard %d ino %d dirs %d %d name %q now %d", req.Part, req.Shard, req.Ino, req.Dir, req.Dir2, req.Name, req.Off)
	case op.Commit, op.Abort, op.Forget, op.Resolve, op.Sync:
		s += fmt.Sprintf(" shard %d", req.Shard)
	}
	if !req.Tx.IsZero() {
		s += fmt.Sprintf(" tx %x.%04x", req.Tx.Age, req.Tx.Nonce&0xffff)
	}
	return s
}
