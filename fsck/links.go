package fsck

import (
	"fmt"
	"sync/atomic"

	"sealfs/meta"
)

// refer notes that the directory dir, which lies on this store, has the entry e.
func (r *reader) refer(dir *inode, e *meta.Entry) {
	d := &r.more[dir.more]
	where := func() string { return fmt.Sprintf("directory %d, entry %q", dir.ino, e.Name) }
	home, in := r.w.lookup(e.Ino)
	if in == nil {
		if e.Type == typeDir {
			d.subdirs++
		}
		if home == nil || home.c.holes || r.w.maybe[e.Ino] {
			r.rep.NotJudged++
		} else {
			r.problem(EntryNoInode, where(), "inode %d", e.Ino)
			r.w.missed(e.Ino, lostName{dir.ino, r.volumes[dir.volume], e.Type})
			r.mendNoInode(where(), e)
		}
		return
	}
	atomic.AddUint32(&in.names, 1) // of any shard
	if in.typ != e.Type {
		r.problem(EntryType, where(), "type %#o, inode %d has %#o", e.Type, e.Ino, in.typ)
		r.mendType(where(), e, in.typ)
	}
	if a, b := r.volumes[dir.volume], home.volumes[in.volume]; a != b {
		d.strange++
		r.problem(EntryVolume, where(), "volume %d, inode %d is in %d", a, e.Ino, b)
		r.mendVolume(where(), dir.ino, e.Ino, a)
	}
	if in.typ != typeDir {
		return
	}
	d.subdirs++
	self := d.self()
	if p := home.more[in.more].parent; p != self && p != in.ino && (!r.w.prepared || in.flags&doubtful == 0) {
		r.out.problem(home.c, DirParent, name(in.ino), "its parent is %d, its name %q stands in %d", p, e.Name, dir.ino)
		to := self
		r.out.mendBy(home.c, DirParent, name(in.ino), func(x *editor) string {
			what := ""
			x.change(in.ino, func(d *meta.Inode) {
				if d.Mode>>12 == typeDir && d.Parent != to {
					d.Parent = to
					what = fmt.Sprintf("its parent is %d", to)
				}
			})
			return what
		})
	}
}

// finish judges what only the whole can tell of the store's inodes.
func (n *namespace) finish() error {
	c := n.c
	for j := range n.inodes {
		if j%65536 == 0 {
			if err := c.tick(5, int64(j), int64(len(n.inodes))); err != nil {
				return err
			}
		}
		i := &n.inodes[j]
		if !n.owns(i.ino) {
			continue
		}
		if i.typ == typeDir && n.more[i.more].asInode().IsPartition() {
			n.partition(i, &n.more[i.more])
		} else if i.flags&doubtful != 0 {
			c.rep.NotJudged++
		} else {
			n.links(i)
		}
		if i.more == 0 {
			continue
		}
		d := &n.more[i.more]
		if d.attrs != 0 {
			c.problem(AttrNames, name(i.ino), "off by %d bytes", d.attrs)
			n.mendAttrNames(i.ino)
		} else if both := d.acls ^ d.gotACLs; both != 0 {
			c.problem(AttrNames, name(i.ino), "ACLs of which inode and attributes do not both know: %#x", both)
			n.mendAttrNames(i.ino)
		}
		switch i.typ {
		case typeDir:
			if i.flags&doubtful == 0 {
				n.directory(i, d)
			}
			if d.strange > 0 && uint64(d.strange)*2 > d.found {
				n.mendDirVolume(i.ino)
			}
		case typeFile:
			if d.found != d.bytes {
				c.problem(BytesWrong, name(i.ino), "%d, its extents hold %d", d.bytes, d.found)
				n.mendBytes(i.ino)
			}
		case typeLink:
			if d.size > inlineTarget && d.found != d.size {
				c.problem(TargetParts, name(i.ino), "%d bytes of %d", d.found, d.size)
				n.mendTarget(i.ino)
			}
		}
	}
	n.finishParts()
	for row, u := range n.usage {
		if u != (meta.Usage{}) {
			where := fmt.Sprintf("shard %d, volume %d", row.shard, row.volume)
			c.problem(UsageWrong, where, "%d bytes and %d inodes too few", u.Bytes, u.Inodes)
			n.mendUsage(row, u, where)
		}
	}
	return nil
}

// links judges an inode's names and its rows in the orphan table.
func (n *namespace) links(i *inode) {
	c := n.c
	dir := i.typ == typeDir
	root := dir && n.more[i.more].parent == i.ino
	switch {
	case dir && root && i.names != 0, dir && i.names > 1:
		c.problem(DirNames, name(i.ino), "%d", i.names)
		n.mendNames(i, root)
	case i.nlink == 0 && i.names > 0, !dir && i.names > i.nlink:
		c.problem(LinkCount, name(i.ino), "%s, %s", count(int(i.nlink), "link"), count(int(i.names), "name"))
		n.mendLinks(i)
	case root, dir && (i.nlink == 0 || i.names > 0), !dir && i.names == i.nlink:
		// As it should be.
	case dir && !n.w.firm(n.more[i.more].parent), !dir && !n.w.complete():
		c.rep.NotJudged++ // names may stand where we cannot look
	case i.names == 0:
		c.problem(NoName, name(i.ino), "%s", count(int(i.nlink), "link"))
		ino := i.ino
		c.mendBy(NoName, name(ino), func(*editor) string { return n.w.rescue(ino, nil) })
	default:
		c.problem(LinkCount, name(i.ino), "%s, %s", count(int(i.nlink), "link"), count(int(i.names), "name"))
		n.mendLinks(i)
	}
	switch {
	case i.flags&rowNameless != 0 && i.nlink != 0:
		c.problem(OrphanRow, name(i.ino), "%s", count(int(i.nlink), "link"))
		n.mendOrphanRow(OrphanRow, i)
	case i.flags&rowNameless == 0 && i.nlink == 0:
		c.problem(OrphanMissing, name(i.ino), "of type %#o", i.typ)
		n.mendOrphan(i.ino)
	}
	if tailed := i.flags&(tail|cutOff) != 0; tailed != (i.flags&rowTail != 0) {
		c.problem(TailRow, name(i.ino), "the inode says %v, the table %v", tailed, !tailed)
		n.mendOrphanRow(TailRow, i)
	}
}

func (n *namespace) directory(i *inode, d *detail) {
	if d.found != d.size {
		n.c.problem(DirSize, name(i.ino), "%d, there are %d", d.size, d.found)
		// As much more or less as transactions in doubt do not account for.
		off := int64(d.found) - int64(d.size)
		n.mendInode(DirSize, i.ino, func(in *meta.Inode) string {
			in.Size = uint64(max(int64(in.Size)+off, 0))
			return fmt.Sprintf("it counts %s", plural(in.Size, "entry", "entries"))
		})
	}
	in := d.asInode()
	if !in.IsPartition() {
		n.split(i, d)
	}
	if i.nlink != 0 && i.nlink != 2+d.subdirs && in.InUse() {
		n.c.problem(DirLinks, name(i.ino), "%d links, %s", i.nlink, plural(int(d.subdirs), "subdirectory", "subdirectories"))
		off := int64(2+d.subdirs) - int64(i.nlink)
		n.mendInode(DirLinks, i.ino, func(in *meta.Inode) string {
			in.Nlink = uint32(max(int64(in.Nlink)+off, 2))
			return fmt.Sprintf("it counts %d links", in.Nlink)
		})
	}
}

// loops follows every directory's parents up to a root, from store to store.
func (w *whole) loops() {
	const unknown, onPath, fine = 0, 1, 2
	type step struct {
		n  *namespace
		at uint32 // index in n.more
	}
	state := map[*namespace][]uint8{}
	for _, n := range w.stores {
		state[n] = make([]uint8, len(n.more))
	}
	var path []step
	for _, n := range w.stores {
		for at := range n.more {
			path = path[:0]
			for s := (step{n, uint32(at)}); s.at != 0 && state[s.n][s.at] == unknown; {
				state[s.n][s.at] = onPath
				path = append(path, s)
				d := &s.n.more[s.at]
				if d.parent == 0 || d.parent == d.ino {
					break
				}
				home, up := w.lookup(d.parent)
				if up == nil || up.typ != typeDir {
					break
				}
				if s = (step{home, up.more}); state[home][up.more] == onPath {
					home.c.problem(DirLoop, name(up.ino), "by way of %d", d.ino)
					w.mendLoop(home, up.ino)
				}
			}
			for _, s := range path {
				state[s.n][s.at] = fine
			}
		}
	}
}
