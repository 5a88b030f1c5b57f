package fsck

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"sealfs"
	"sealfs/meta"
)

// Repairs of directories and names.

// lostFound is the name of the directory in a volume's root that gets what has
// lost its name.
const lostFound = "lost+found"

// root returns the root of a volume, nil if its store is not given. A root that is lost is
// made again: it is the directory that most nameless ones of the volume call their parent.
func (w *whole) root(v sealfs.Volume) (*editor, *meta.Inode) {
	var in meta.Inode
	if ino, ok := w.roots()[v]; ok {
		if e := w.editor(ino); e != nil && e.inode(ino, &in) {
			return e, &in
		}
		return nil, nil
	}
	if !w.complete() {
		return nil, nil
	}
	votes := map[sealfs.Ino]int{}
	var ino sealfs.Ino
	for _, n := range w.stores {
		for i := range n.inodes {
			d := &n.inodes[i]
			if d.typ != typeDir || n.volumes[d.volume] != v || d.names > 0 {
				continue
			}
			if p := n.more[d.more].parent; p != 0 && p <= sealfs.InoMax && w.editor(p) != nil {
				if _, there := w.lookup(p); there == nil {
					if votes[p]++; votes[p] > votes[ino] || votes[p] == votes[ino] && p < ino {
						ino = p
					}
				}
			}
		}
	}
	if ino == 0 {
		return nil, nil
	}
	e := w.editor(ino)
	if !e.inode(ino, &in) { // another repair may have made it already
		now := e.lastTime(ino.Home(w.shards))
		in = meta.Inode{Ino: ino, Mode: typeDir<<12 | 0o755, Nlink: 2, Parent: ino, Volume: v, Version: 1, Atime: now, Mtime: now, Ctime: now, Btime: now}
		counterFix(ino)(e)
		e.putInode(&in)
		e.charge(ino.Home(w.shards), v, 0, 1)
	}
	return e, &in
}

// lostFound returns lost+found of a volume, which is made if need be.
func (w *whole) lostFound(v sealfs.Volume) (*editor, *meta.Inode) {
	e, root := w.root(v)
	if e == nil {
		return nil, nil
	}
	if x, ok := e.look(root, []byte(lostFound)); ok && x.Type == typeDir {
		var in meta.Inode
		if at := w.editor(x.Ino); at != nil && at.inode(x.Ino, &in) && in.Mode>>12 == typeDir && in.Nlink >= 2 {
			return at, &in
		}
	}
	home := root.Ino.Home(w.shards)
	now := e.lastTime(home)
	in := meta.Inode{Ino: e.number(home), Mode: typeDir<<12 | 0o700, Nlink: 2, Parent: root.Ino, Volume: v, Version: 1,
		Atime: now, Mtime: now, Ctime: now, Btime: now}
	if _, ok := e.enter(root, []byte(lostFound), in.Ino, typeDir); !ok {
		return nil, nil
	}
	e.putInode(&in)
	e.charge(home, v, 0, 1)
	return e, &in
}

// rescue gives an inode a name in lost+found. It returns in words what was done, or "".
func (w *whole) rescue(ino sealfs.Ino, as []byte) string {
	e := w.editor(ino)
	var in meta.Inode
	if e == nil || !e.inode(ino, &in) {
		return ""
	}
	at, dir := w.lostFound(in.Volume)
	if at == nil && w.complete() && e.c.names.usual() != in.Volume { // there is no such volume
		if at, dir = w.lostFound(e.c.names.usual()); at != nil {
			home := ino.Home(w.shards)
			e.charge(home, in.Volume, -int64(in.Bytes), -1)
			e.charge(home, dir.Volume, int64(in.Bytes), 1)
			in.Volume = dir.Volume
			e.putInode(&in)
		}
	}
	if at == nil || dir.Ino == ino {
		return ""
	}
	if known := w.recorded[ino]; as == nil {
		as = known
	}
	if len(as) == 0 {
		as = fmt.Appendf(nil, "#%d", ino)
	}
	given, ok := at.enter(dir, as, ino, uint8(in.Mode>>12))
	if !ok {
		return ""
	}
	e.change(ino, func(in *meta.Inode) {
		if in.Flags &^= linkable; in.Mode>>12 == typeDir {
			in.Parent, in.Nlink = dir.Ino, max(in.Nlink, 2)
		} else {
			in.Nlink = max(in.Nlink, 1)
		}
	})
	return fmt.Sprintf("it is called %q in /%s", given, lostFound)
}

// record remembers the name that an inode is known to have had.
func (w *whole) record(ino sealfs.Ino, name []byte) {
	if w.recorded == nil {
		w.recorded = map[sealfs.Ino][]byte{}
	}
	if w.recorded[ino] == nil && clean(name) == nil {
		w.recorded[ino] = bytes.Clone(name)
	}
}

// clean returns a possible name in place of an impossible one, nil if name is possible.
func clean(name []byte) []byte {
	if s := string(name); s != "." && s != ".." && !bytes.ContainsAny(name, "/\x00") {
		return nil
	}
	if s := string(name); s == "." || s == ".." {
		return bytes.Repeat([]byte("_"), len(name))
	}
	return bytes.Map(func(r rune) rune {
		if r == '/' || r == 0 {
			return '_'
		}
		return r
	}, name)
}

// drop saves and removes an entry.
func (e *editor) drop(id ID, where string, key []byte, x *meta.Entry) bool {
	old := e.get(key)
	if old == nil {
		return false
	}
	e.c.save(Saved{Problem: id, Where: where, Key: bytes.Clone(key), Old: bytes.Clone(old)})
	e.c.w.record(x.Ino, x.Name)
	e.leave(key, x.Dir, x.Type)
	return true
}

// own makes an entry outlive the page that it was read from.
func own(x *meta.Entry) *meta.Entry {
	y := *x
	y.Name = bytes.Clone(x.Name)
	return &y
}

// mendNoDir plans what becomes of an entry in what is no directory: that is made again
// if it is gone.
func (r *reader) mendNoDir(where string, key []byte, found *meta.Entry) {
	key, x := bytes.Clone(key), own(found)
	r.mendBy(EntryNoDir, where, func(e *editor) string {
		var in meta.Inode
		if !e.inode(x.Dir, &in) {
			if possible(x.Dir, e.c.w.shards) {
				return e.rebuildDirectory(x.Dir)
			}
		}
		if in.Ino != 0 && in.Mode>>12 != typeDir && e.mustBeDirectory(&in) {
			k := meta.InodeKey(e.c.w.shards, in.Ino)
			e.c.save(Saved{Problem: EntryNoDir, Where: where, Key: k[:], Old: bytes.Clone(e.get(k[:]))})
			e.del(k[:])
			e.charge(in.Ino.Home(e.c.w.shards), in.Volume, 0, -1)
			return e.rebuildDirectory(x.Dir)
		}
		if in.Mode>>12 == typeDir || !e.drop(EntryNoDir, where, key, x) {
			return ""
		}
		return fmt.Sprintf("the entry is saved and removed; if inode %d has no other name, it gets this one in /%s", x.Ino, lostFound)
	})
}

// mustBeDirectory reports whether what has entries and is no directory has lost its type:
// it has no data, and several entries, or its volume has no root without it.
func (e *editor) mustBeDirectory(in *meta.Inode) bool {
	if in.Bytes != 0 || len(in.Target) != 0 {
		return false
	}
	k := meta.EntryKey(e.c.w.shards, in.Ino, 0)
	_, rooted := e.c.w.roots()[in.Volume]
	return !rooted || len(e.under(k[:11], 2)) > 1
}

// rebuildDirectory makes a directory again of which only entries are left.
func (e *editor) rebuildDirectory(ino sealfs.Ino) string {
	w := e.c.w
	k := meta.EntryKey(w.shards, ino, 0)
	now := e.lastTime(ino.Home(w.shards))
	in := meta.Inode{Ino: ino, Mode: typeDir<<12 | 0o700, Nlink: 2, Version: 1, Volume: e.volumeOf(ino), Atime: now, Mtime: now, Ctime: now, Btime: now}
	for _, r := range e.under(k[:11], 1<<40) {
		var x meta.Entry
		if meta.DecodeEntry(r.val, ino, binary.BigEndian.Uint64(r.key[11:]), &x) == nil {
			if in.Size++; x.Type == typeDir {
				in.Nlink++
			}
		}
	}
	in.Parent = ino // of a root
	if names := w.missingNames[ino]; len(names) > 0 {
		in.Parent = names[0].dir
	} else if root, ok := w.roots()[in.Volume]; ok {
		in.Parent = root // until it has a name
	}
	counterFix(ino)(e)
	e.putInode(&in)
	e.charge(ino.Home(w.shards), in.Volume, 0, 1)
	return fmt.Sprintf("directory %d is made again, with %s", ino, plural(in.Size, "entry", "entries"))
}

// lostName is an entry that refers to an inode that is not there.
type lostName struct {
	dir    sealfs.Ino
	volume sealfs.Volume
	typ    uint8
}

// volumeOf returns the volume that an inode which is not there was of, as far as can be told.
func (e *editor) volumeOf(ino sealfs.Ino) sealfs.Volume {
	if names := e.c.w.missingNames[ino]; len(names) > 0 {
		return names[0].volume
	}
	return e.c.names.usual()
}

// mendName plans to give an entry a possible name, or its own cookie.
func (r *reader) mendName(id ID, where string, key []byte, found *meta.Entry) {
	key, x := bytes.Clone(key), own(found)
	r.mendBy(id, where, func(e *editor) string {
		var dir meta.Inode
		if e.get(key) == nil || !e.inode(x.Dir, &dir) || dir.Mode>>12 != typeDir {
			return ""
		}
		e.leave(key, x.Dir, x.Type)
		e.inode(x.Dir, &dir)
		as := x.Name
		if better := clean(as); better != nil {
			as = better
		}
		if id == EntryTwice {
			if other, ok := e.look(&dir, as); ok && other.Ino == x.Ino {
				e.c.save(Saved{Problem: id, Where: where, Key: key})
				return "it is removed: the other one is of the same inode"
			}
		}
		given, ok := e.enter(&dir, as, x.Ino, x.Type)
		if !ok {
			return ""
		}
		return fmt.Sprintf("it becomes %q under its own cookie", given)
	})
}

// mendNoInode plans to remove an entry that refers to nothing.
func (r *reader) mendNoInode(where string, found *meta.Entry) {
	x := own(found)
	r.mendBy(EntryNoInode, where, func(e *editor) string {
		w := e.c.w
		var in meta.Inode
		if at := w.editor(x.Ino); at == nil || at.inode(x.Ino, &in) {
			return ""
		}
		k := meta.EntryKey(w.shards, x.Dir, x.Cookie)
		if !e.drop(EntryNoInode, where, k[:], x) {
			return ""
		}
		return fmt.Sprintf("the entry is saved and removed, since nothing is left of inode %d", x.Ino)
	})
}

// mendType plans to give an entry the type of its inode.
func (r *reader) mendType(where string, found *meta.Entry, typ uint8) {
	x := own(found)
	r.mendBy(EntryType, where, func(e *editor) string {
		k := meta.EntryKey(e.c.w.shards, x.Dir, x.Cookie)
		if e.get(k[:]) == nil {
			return ""
		}
		e.change(x.Dir, func(in *meta.Inode) {
			if x.Type == typeDir && in.Nlink > 2 {
				in.Nlink--
			} else if typ == typeDir {
				in.Nlink++
			}
		})
		y := meta.Entry{Ino: x.Ino, Type: typ, Name: x.Name}
		e.put(k[:], y.Append(nil))
		return fmt.Sprintf("its type becomes %#o", typ)
	})
}

// mendVolume plans to give an inode the volume of a directory that names it.
func (r *reader) mendVolume(where string, dir, ino sealfs.Ino, v sealfs.Volume) {
	r.mendBy(EntryVolume, where, func(e *editor) string {
		w := e.c.w
		at := w.editor(ino)
		var in meta.Inode
		if at == nil || !at.inode(ino, &in) || in.Volume == v || w.revolumed[dir] {
			return "" // the directory's own volume may have been wrong
		}
		if w.revolumed == nil {
			w.revolumed = map[sealfs.Ino]bool{}
		}
		w.revolumed[ino] = true
		old := in.Volume
		in.Volume = v
		at.putInode(&in)
		if !in.IsPartition() {
			at.charge(ino.Home(w.shards), old, -int64(in.Bytes), -1)
			at.charge(ino.Home(w.shards), v, int64(in.Bytes), 1)
		}
		return fmt.Sprintf("inode %d is of volume %d, not %d", ino, v, old)
	})
}

// mendDirVolume plans to give a directory the volume that most of its entries are of.
func (n *namespace) mendDirVolume(dir sealfs.Ino) {
	where := name(dir)
	do := func(e *editor) string {
		w := e.c.w
		var d, in meta.Inode
		if !e.inode(dir, &d) {
			return ""
		}
		votes := map[sealfs.Volume]int{}
		best := d.Volume
		k := meta.EntryKey(w.shards, dir, 0)
		for _, r := range e.under(k[:11], 1<<20) {
			var x meta.Entry
			if meta.DecodeEntry(r.val, dir, binary.BigEndian.Uint64(r.key[11:]), &x) != nil {
				continue
			}
			if at := w.editor(x.Ino); at != nil && at.inode(x.Ino, &in) {
				if votes[in.Volume]++; votes[in.Volume] > votes[best] {
					best = in.Volume
				}
			}
		}
		if best == d.Volume {
			return ""
		}
		home, old := dir.Home(w.shards), d.Volume
		d.Volume = best
		e.putInode(&d)
		if !d.IsPartition() {
			e.charge(home, old, 0, -1)
			e.charge(home, best, 0, 1)
		}
		return fmt.Sprintf("the directory is of volume %d, as most of its entries are, not %d", best, old)
	}
	n.c.addFix(&fix{Step: Step{Problem: EntryVolume, Where: where}, do: do, early: true})
}

// mendInode plans to change an inode; what says what becomes of it.
func (n *namespace) mendInode(id ID, ino sealfs.Ino, fn func(in *meta.Inode) string) {
	n.c.mendBy(id, name(ino), func(e *editor) string {
		what := ""
		e.change(ino, func(in *meta.Inode) { what = fn(in) })
		return what
	})
}

// mendNames plans to leave a directory the one name that its parent agrees with.
func (n *namespace) mendNames(i *inode, root bool) {
	ino, parent := i.ino, n.more[i.more].parent
	n.c.mendBy(DirNames, name(ino), func(e *editor) string {
		w := e.c.w
		dropped := 0
		kept := false
		for _, s := range w.stores {
			if s.c.editor == nil {
				continue
			}
			s.c.eachEntry(func(key []byte, x *meta.Entry) {
				if x.Ino != ino {
					return
				}
				if !root && !kept && x.Dir == parent {
					kept = true
					return
				}
				where := fmt.Sprintf("directory %d, entry %q", x.Dir, x.Name)
				if s.c.editor.drop(DirNames, where, key, own(x)) {
					dropped++
				}
			})
		}
		if dropped == 0 {
			return ""
		}
		return fmt.Sprintf("%s saved and removed", count(dropped, "name"))
	})
}

// eachEntry calls fn for every entry of the store, as it was when the round began.
func (c *checker) eachEntry(fn func(key []byte, x *meta.Entry)) {
	c.rows(5, 0, 1<<16, func(_ ref, key, val []byte) error {
		k, err := meta.DecodeKey(key)
		var x meta.Entry
		if err == nil && k.Kind == meta.KindEntry && meta.DecodeEntry(val, k.Ino, k.Pos, &x) == nil {
			fn(key, &x)
		}
		return nil
	})
}

// mendLoop plans to take a directory out of a loop.
func (w *whole) mendLoop(home *namespace, ino sealfs.Ino) {
	home.c.mendBy(DirLoop, name(ino), func(e *editor) string {
		var in meta.Inode
		if !e.inode(ino, &in) {
			return ""
		}
		if p := w.editor(in.Parent); p != nil {
			k := meta.EntryKey(w.shards, in.Parent, 0)
			for _, r := range p.under(k[:11], 1<<40) {
				var x meta.Entry
				if meta.DecodeEntry(r.val, in.Parent, binary.BigEndian.Uint64(r.key[11:]), &x) == nil && x.Ino == ino {
					p.drop(DirLoop, name(ino), r.key, own(&x))
				}
			}
		}
		if what := w.rescue(ino, nil); what != "" {
			return "it is taken out of its parent; " + what
		}
		return ""
	})
}

// mendOrphan plans what becomes of an inode without links that nobody would free.
func (n *namespace) mendOrphan(ino sealfs.Ino) {
	n.c.mendBy(OrphanMissing, name(ino), func(e *editor) string {
		const dying = 4
		var in meta.Inode
		if !e.inode(ino, &in) || in.Nlink != 0 {
			return ""
		}
		if in.Flags&dying == 0 && (in.Bytes > 0 || in.Mode>>12 == typeDir && in.Size > 0) {
			return n.w.rescue(ino, nil)
		}
		return e.setOrphan(ino, true, in.Flags&tail != 0 || in.Cut != 0)
	})
}

// mendOrphanRow plans to make the row of an inode in the orphan table what the inode says.
func (n *namespace) mendOrphanRow(id ID, i *inode) {
	ino := i.ino
	n.c.mendBy(id, name(ino), func(e *editor) string {
		var in meta.Inode
		if !e.inode(ino, &in) {
			return ""
		}
		return e.setOrphan(ino, in.Nlink == 0, in.Flags&tail != 0 || in.Cut != 0)
	})
}

// mendLinks plans to count the names of an inode anew.
func (n *namespace) mendLinks(i *inode) {
	// As many more or fewer as transactions in doubt do not account for.
	off, dir := int64(i.names)-int64(i.nlink), i.typ == typeDir
	n.mendInode(LinkCount, i.ino, func(in *meta.Inode) string {
		links := uint32(max(int64(in.Nlink)+off, 0))
		if dir {
			links = max(in.Nlink, 2) // what it has of subdirectories is counted afterwards
		}
		was := in.Nlink
		in.Nlink = links
		in.Flags &^= linkable
		return fmt.Sprintf("it counts %d links, not %d", links, was)
	})
}

// missed remembers that an entry refers to an inode that is not there.
func (w *whole) missed(ino sealfs.Ino, x lostName) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.missingNames == nil {
		w.missingNames = map[sealfs.Ino][]lostName{}
	}
	if len(w.missingNames) < fixesMax {
		w.missingNames[ino] = append(w.missingNames[ino], x)
	}
}

// setOrphan makes the row of an inode in the orphan table say what it shall.
func (e *editor) setOrphan(ino sealfs.Ino, nameless, tailed bool) string {
	k := meta.OrphanKey(e.c.w.shards, ino)
	var b byte
	if nameless {
		b |= 1
	}
	if tailed {
		b |= 2
	}
	if b == 0 {
		e.del(k[:])
		return "the row is removed"
	}
	e.put(k[:], []byte{b})
	return fmt.Sprintf("the row says without a name: %v, with a tail: %v", nameless, tailed)
}
