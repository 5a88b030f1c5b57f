package linear

import (
	"slices"
	"strings"
	"syscall"
)

// state is a file system after some calls. It and its nodes are never changed.
type state struct {
	nodes []*node // by birth
	sum   uint64
}

// node is an inode. One that has lost its last name stays, since somebody may have it open.
type node struct {
	birth   int
	ino     uint64 // 0: nobody has been told yet
	dir     bool
	links   int // names; of a directory 1, or 0 when it was removed
	parent  int // birth of a directory's directory; 0: it is one of the arena's
	data    string
	entries []name // sorted
	locks   []hold // sorted by owner
	sum     uint64
}

type name struct {
	name  string
	birth int
}

type hold struct {
	owner     int
	exclusive bool
}

// newState returns the arena: empty directories with these inodes.
func newState(dirs []uint64) *state {
	s := &state{}
	for i, ino := range dirs {
		s.put(&node{birth: i - len(dirs), ino: ino, dir: true, links: 1})
	}
	return s
}

// seal computes the sum of a node that is complete.
func (n *node) seal() *node {
	var h uint64 = 14695981039346656037
	mix := func(v uint64) { h = (h ^ v) * 1099511628211; h ^= h >> 29 }
	text := func(t string) {
		for i := range len(t) {
			mix(uint64(t[i]))
		}
		mix(256)
	}
	mix(uint64(n.birth))
	mix(n.ino)
	mix(uint64(n.links))
	mix(uint64(n.parent))
	text(n.data)
	for _, e := range n.entries {
		text(e.name)
		mix(uint64(e.birth))
	}
	for _, l := range n.locks {
		mix(uint64(l.owner) << 1)
		if l.exclusive {
			mix(1)
		}
	}
	n.sum = h
	return n
}

func (n *node) equal(o *node) bool {
	return n == o || n.sum == o.sum && n.birth == o.birth && n.ino == o.ino && n.dir == o.dir && n.links == o.links && n.parent == o.parent &&
		n.data == o.data && slices.Equal(n.entries, o.entries) && slices.Equal(n.locks, o.locks)
}

func (s *state) equal(o *state) bool {
	return s == o || s.sum == o.sum && slices.EqualFunc(s.nodes, o.nodes, (*node).equal)
}

// next returns a state that may be changed by put until it is given to somebody.
func (s *state) next() *state { return &state{nodes: slices.Clone(s.nodes), sum: s.sum} }

// put adds or replaces a node.
func (s *state) put(n *node) {
	n.seal()
	i, found := slices.BinarySearchFunc(s.nodes, n.birth, func(o *node, b int) int { return o.birth - b })
	if found {
		s.sum -= s.nodes[i].sum
		s.nodes[i] = n
	} else {
		s.nodes = slices.Insert(s.nodes, i, n)
	}
	s.sum += n.sum
}

func (s *state) born(birth int) *node {
	i, found := slices.BinarySearchFunc(s.nodes, birth, func(o *node, b int) int { return o.birth - b })
	if !found {
		return nil
	}
	return s.nodes[i]
}

// at returns the node with an inode number that somebody was told.
func (s *state) at(ino uint64) *node {
	for _, n := range s.nodes {
		if n.ino == ino {
			return n
		}
	}
	return nil
}

// entry returns what a name stands for, nil if it stands for nothing.
func (s *state) entry(dir *node, at string) *node {
	if i, found := dir.find(at); found {
		return s.born(dir.entries[i].birth)
	}
	return nil
}

func (n *node) find(at string) (int, bool) {
	return slices.BinarySearchFunc(n.entries, at, func(e name, at string) int { return strings.Compare(e.name, at) })
}

// with returns a copy of a node that f has changed.
func (n *node) with(f func(n *node)) *node {
	c := *n
	f(&c)
	return &c
}

func (n *node) withEntry(at string, birth int) *node {
	return n.with(func(c *node) {
		c.entries = slices.Clone(c.entries)
		if i, found := c.find(at); found {
			c.entries[i].birth = birth
		} else {
			c.entries = slices.Insert(c.entries, i, name{at, birth})
		}
	})
}

func (n *node) withoutEntry(at string) *node {
	return n.with(func(c *node) {
		i, _ := c.find(at)
		c.entries = slices.Delete(slices.Clone(c.entries), i, i+1)
	})
}

// called returns the state in which n is known by ino, which it must be, or nobody.
func (s *state) called(n *node, ino uint64) (*state, bool) {
	switch {
	case ino == 0 || n.ino == ino:
		return s, true
	case n.ino != 0 || s.at(ino) != nil:
		return s, false
	}
	s = s.next()
	s.put(n.with(func(c *node) { c.ino = ino }))
	return s, true
}

// refusals are the errors with which a call may be refused, whichever a file system looks at first.
type refusals []syscall.Errno

func (r *refusals) add(no bool, e syscall.Errno) {
	if no {
		*r = append(*r, e)
	}
}

// step says whether a call may be answered so, and what is then.
func (s *state) step(c *Call, a *Answer) (bool, *state) {
	switch c.Kind {
	case Getattr, Read, Write, Append, Truncate, TryLock, TryShare, WaitLock, Unlock:
		n := s.at(c.Ino)
		if n == nil {
			return false, s
		}
		return s.stepFile(n, c, a)
	}
	dir := s.at(c.Dir)
	if dir == nil {
		return false, s
	}
	if c.Kind == Readdir {
		return s.list(dir, a)
	}
	no := s.refuse(dir, c)
	if a.Errno == syscall.ESTALE {
		// An open looks a name up, and finds it gone when it opens the file, or there when it
		// makes one; and once more, when it looks again. Then Linux gives up.
		return c.Kind == Create || c.Kind == Open || s.meetsDir(dir, c), s
	}
	switch {
	case a.Loose && c.Kind == Link:
		return true, s
	case a.Lost && len(no) > 0:
		return true, s
	case a.Loose && a.Errno != 0:
		return true, s
	case a.Loose && len(no) > 0:
		other := s.entry(s.at(c.Dir2), c.Name2)
		return other != nil, s
	case !a.Lost && (len(no) > 0 || a.Errno != 0):
		return slices.Contains(no, a.Errno), s
	}
	there := s.entry(dir, c.Name)
	switch c.Kind {
	case Lookup, Open, OpenDir:
		if c.Kind == Lookup && a.Dir != there.dir {
			return false, s
		}
		s, ok := s.called(there, a.Ino)
		return ok, s
	case Create, CreateExcl, Mkdir:
		if there != nil {
			s, ok := s.called(there, a.Ino)
			return ok, s
		}
		return s.make(dir, c, a)
	}
	return true, s.rewire(dir, there, c)
}

// meetsDir reports whether a call meets a directory under one of its names. Linux may refuse it
// with ESTALE then, and nothing has happened: what another mount has moved has to
// move in the tree of its dentries, too, for which it only tries to take the locks (d_splice_alias).
func (s *state) meetsDir(dir *node, c *Call) bool {
	there := s.entry(dir, c.Name)
	if there != nil && there.dir {
		return true
	}
	dir2 := s.at(c.Dir2)
	if dir2 == nil || c.Name2 == "" {
		return false
	}
	other := s.entry(dir2, c.Name2)
	return other != nil && other.dir
}

// make adds a new inode.
func (s *state) make(dir *node, c *Call, a *Answer) (bool, *state) {
	if a.Ino != 0 && s.at(a.Ino) != nil {
		return false, s // there was one already
	}
	n := &node{birth: c.Birth, ino: a.Ino, links: 1, dir: c.Kind == Mkdir}
	if n.dir {
		n.parent = dir.birth
	}
	s = s.next()
	s.put(n)
	s.put(dir.withEntry(c.Name, n.birth))
	return true, s
}

// rewire changes names; that nothing speaks against it is known.
func (s *state) rewire(dir, there *node, c *Call) *state {
	now := s.next()
	unlink := func(n *node) { now.put(n.with(func(c *node) { c.links-- })) }
	switch c.Kind {
	case Unlink, Rmdir:
		unlink(there)
		now.put(dir.withoutEntry(c.Name))
	case Link:
		n := s.at(c.Ino)
		now.put(n.with(func(c *node) { c.links++ }))
		now.put(dir.withEntry(c.Name, n.birth))
	case Rename, RenameNoReplace, Exchange:
		other := s.entry(s.at(c.Dir2), c.Name2)
		if other == there {
			return s // two names of one inode: nothing happens
		}
		move := func(n *node, to *node) {
			if n.dir {
				now.put(n.with(func(c *node) { c.parent = to.birth }))
			}
		}
		dir2 := s.at(c.Dir2)
		switch {
		case c.Kind == Exchange:
			now.put(dir.withEntry(c.Name, other.birth))
			now.put(now.born(dir2.birth).withEntry(c.Name2, there.birth))
			move(now.born(other.birth), dir)
		case other != nil:
			unlink(other)
			fallthrough
		default:
			now.put(dir.withoutEntry(c.Name))
			now.put(now.born(dir2.birth).withEntry(c.Name2, there.birth))
		}
		move(now.born(there.birth), dir2)
	}
	return now
}

// below reports whether dir is top, or lies in it.
func (s *state) below(dir, top *node) bool {
	for dir != nil {
		if dir == top {
			return true
		}
		dir = s.born(dir.parent)
	}
	return false
}

// refuse says for what a call on names may be refused; empty: it may not.
func (s *state) refuse(dir *node, c *Call) (no refusals) {
	there := s.entry(dir, c.Name)
	switch c.Kind {
	case Lookup, Open, OpenDir, Unlink, Rmdir:
		no.add(there == nil, syscall.ENOENT)
		if there == nil {
			break
		}
		no.add(there.dir && (c.Kind == Open || c.Kind == Unlink), syscall.EISDIR)
		no.add(!there.dir && (c.Kind == OpenDir || c.Kind == Rmdir), syscall.ENOTDIR)
		no.add(len(there.entries) > 0 && c.Kind == Rmdir, syscall.ENOTEMPTY)
	case Create:
		no.add(there != nil && there.dir, syscall.EISDIR)
		no.add(there == nil && dir.links == 0, syscall.ENOENT)
	case CreateExcl, Mkdir:
		no.add(there != nil, syscall.EEXIST)
		no.add(dir.links == 0, syscall.ENOENT)
	case Link:
		no.add(there != nil, syscall.EEXIST)
		no.add(dir.links == 0, syscall.ENOENT)
		n := s.at(c.Ino)
		no.add(n == nil || n.links == 0, syscall.ENOENT)
	case Rename, RenameNoReplace, Exchange:
		s.refuseRename(there, c, &no)
	}
	return no
}

func (s *state) refuseRename(there *node, c *Call, no *refusals) {
	dir, dir2 := s.at(c.Dir), s.at(c.Dir2)
	if dir2 == nil {
		no.add(true, syscall.ENOENT)
		return
	}
	other := s.entry(dir2, c.Name2)
	no.add(there == nil || dir2.links == 0, syscall.ENOENT)
	no.add(c.Kind == RenameNoReplace && other != nil, syscall.EEXIST)
	no.add(c.Kind == Exchange && other == nil, syscall.ENOENT)
	if there == nil || there == other {
		return
	}
	no.add(there.dir && s.below(dir2, there), syscall.EINVAL)
	if other == nil {
		return
	}
	if c.Kind == Exchange {
		no.add(other.dir && s.below(dir, other), syscall.EINVAL)
		return
	}
	no.add(there.dir && !other.dir, syscall.ENOTDIR)
	no.add(!there.dir && other.dir, syscall.EISDIR)
	no.add(len(other.entries) > 0, syscall.ENOTEMPTY)
}

// list judges a listing.
func (s *state) list(dir *node, a *Answer) (bool, *state) {
	switch {
	case a.Errno == syscall.ENOENT:
		return dir.links == 0, s
	case a.Errno != 0 || len(a.Entries) != len(dir.entries):
		return false, s
	}
	for i, e := range a.Entries {
		if e.Name != dir.entries[i].name {
			return false, s
		}
		var ok bool
		if s, ok = s.called(s.born(dir.entries[i].birth), e.Ino); !ok {
			return false, s
		}
	}
	return true, s
}

// stepFile is step for what is open.
func (s *state) stepFile(n *node, c *Call, a *Answer) (bool, *state) {
	if c.Kind == Getattr && a.Errno == 0 {
		links := n.links
		switch {
		case n.dir && links == 0:
			return true, s // what it says of itself then is its own affair
		case n.dir:
			links = 2
			for _, e := range n.entries {
				if s.born(e.birth).dir {
					links++
				}
			}
			return a.Links == links, s
		}
		return a.Links == links && a.Size == len(n.data), s
	}
	if c.Kind >= TryLock {
		return s.stepLock(n, c, a)
	}
	if a.Errno != 0 {
		return false, s
	}
	grown := func(size int) []byte {
		b := make([]byte, max(size, len(n.data)))
		copy(b, n.data)
		return b
	}
	now := n.data
	switch c.Kind {
	case Read:
		told := n.data[min(c.Off, len(n.data)):min(c.Off+c.Len, len(n.data))]
		if a.Loose && len(a.Data) <= c.Len {
			told += strings.Repeat("\x00", max(0, len(a.Data)-len(told)))
			told = told[:len(a.Data)]
		}
		return a.Data == told, s
	case Write:
		b := grown(c.Off + len(c.Data))
		copy(b[c.Off:], c.Data)
		now = string(b)
	case Append:
		now += c.Data
	case Truncate:
		now = string(grown(c.Len)[:c.Len])
	}
	s = s.next()
	s.put(n.with(func(o *node) { o.data = now }))
	return true, s
}

func (s *state) stepLock(n *node, c *Call, a *Answer) (bool, *state) {
	taken, mine := false, -1
	for i, l := range n.locks {
		if l.owner == c.Owner {
			mine = i
		} else {
			taken = taken || l.exclusive || c.Kind != TryShare
		}
	}
	if c.Kind == Unlock {
		if a.Errno != 0 || mine < 0 {
			return a.Errno == 0, s
		}
		s = s.next()
		s.put(n.with(func(o *node) { o.locks = slices.Delete(slices.Clone(o.locks), mine, mine+1) }))
		return true, s
	}
	switch {
	case taken:
		// A lost wait never got it then.
		return a.Lost || a.Errno == syscall.EAGAIN && c.Kind != WaitLock, s
	case a.Errno != 0:
		return false, s
	}
	s = s.next()
	s.put(n.with(func(o *node) {
		o.locks = append(slices.Clone(o.locks), hold{c.Owner, c.Kind != TryShare})
		slices.SortFunc(o.locks, func(x, y hold) int { return x.owner - y.owner })
	}))
	return true, s
}
