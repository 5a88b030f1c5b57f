package fsck

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"sort"
	"strings"

	"sealfs"
	"sealfs/fsck/mend"
	"sealfs/meta"
)

// editor changes the records of a store, in memory: what it does is part of the
// plan, and what is judged next is the store as it will be. It is used between
// passes, for one repair after the other.
type editor struct {
	c     *checker
	batch *mend.Batch // of the present repair, nil before its first change
}

// row is a record.
type row struct{ key, val []byte }

// get returns a record, nil if there is none.
func (e *editor) get(key []byte) []byte {
	if o, ok := e.c.over.get(key); ok {
		if o.gone {
			return nil
		}
		return o.val
	}
	if val, ok := e.c.stored(key); ok {
		return val
	}
	return nil
}

// stored finds a record in the leaves.
func (c *checker) stored(key []byte) ([]byte, bool) {
	i := c.leafOf(key)
	if i < 0 {
		return nil, false
	}
	p, err := c.img.page(c.leaves[i].page)
	if err != nil {
		return nil, false
	}
	n := int(c.leaves[i].cells)
	j, ok := sort.Find(n, func(j int) int {
		k, _ := cell(p, j)
		return bytes.Compare(key, k)
	})
	if !ok {
		return nil, false
	}
	_, val := cell(p, j)
	return val, true
}

// leafOf returns the index of the last leaf that begins at key or before, -1 if there is none.
func (c *checker) leafOf(key []byte) int {
	return sort.Search(len(c.leaves), func(i int) bool {
		p, err := c.img.page(c.leaves[i].page)
		if err != nil {
			return true
		}
		k, _ := cell(p, 0)
		return bytes.Compare(k, key) > 0
	}) - 1
}

// under returns the records whose keys begin with prefix, in order, at most most of them.
func (e *editor) under(prefix []byte, most int) (rows []row) {
	c := e.c
	for i := max(c.leafOf(prefix), 0); i < len(c.leaves) && len(rows) < most; i++ {
		p, err := c.img.page(c.leaves[i].page)
		if err != nil {
			break
		}
		for j := range int(c.leaves[i].cells) {
			k, v := cell(p, j)
			if bytes.HasPrefix(k, prefix) {
				if _, ok := c.over.get(k); !ok {
					rows = append(rows, row{k, v})
				}
			} else if bytes.Compare(k, prefix) > 0 {
				i = len(c.leaves)
				break
			}
		}
	}
	if c.over != nil {
		at, _ := c.over.find(prefix)
		for ; at < len(c.over.list) && bytes.HasPrefix(c.over.list[at].key, prefix); at++ {
			if o, _ := c.over.get(c.over.list[at].key); !o.gone {
				rows = append(rows, row{o.key, o.val})
			}
		}
		for k, o := range c.over.fresh {
			if _, listed := c.over.find(o.key); !listed && !o.gone && strings.HasPrefix(k, string(prefix)) {
				rows = append(rows, row{o.key, o.val})
			}
		}
	}
	slices.SortFunc(rows, func(a, b row) int { return bytes.Compare(a.key, b.key) })
	return rows[:min(len(rows), most)]
}

// put makes val the value of key; nil deletes it.
func (e *editor) put(key, val []byte) {
	old := e.get(key)
	if old == nil && val == nil || old != nil && val != nil && bytes.Equal(old, val) {
		return
	}
	if e.batch == nil {
		e.c.job.Batches = append(e.c.job.Batches, mend.Batch{})
		e.batch = &e.c.job.Batches[len(e.c.job.Batches)-1]
	}
	e.c.w.effects++
	key, val = bytes.Clone(key), bytes.Clone(val)
	e.batch.Rows = append(e.batch.Rows, mend.Row{Key: key, Old: bytes.Clone(old), New: val})
	e.c.over.put(edit{key: key, val: val, gone: val == nil})
}

func (e *editor) del(key []byte) { e.put(key, nil) }

// inode reads an inode; what it aliases stays valid.
func (e *editor) inode(ino sealfs.Ino, in *meta.Inode) bool {
	k := meta.InodeKey(e.c.w.shards, ino)
	b := e.get(k[:])
	return b != nil && meta.DecodeInode(bytes.Clone(b), ino, in) == nil
}

func (e *editor) putInode(in *meta.Inode) {
	k := meta.InodeKey(e.c.w.shards, in.Ino)
	e.put(k[:], in.Append(nil))
}

// change changes an inode, and reports whether there is one.
func (e *editor) change(ino sealfs.Ino, fn func(in *meta.Inode)) bool {
	var in meta.Inode
	if !e.inode(ino, &in) {
		return false
	}
	fn(&in)
	e.putInode(&in)
	return true
}

// charge changes what a volume uses in a shard. A wrong row is left for its own repair.
func (e *editor) charge(s sealfs.Shard, v sealfs.Volume, bytes, inodes int64) {
	k := meta.UsageKey(s, v)
	var u meta.Usage
	if b := e.get(k[:]); b != nil {
		var err error
		if u, err = meta.DecodeUsage(b); err != nil {
			return
		}
	}
	e.putUsage(s, v, meta.Usage{Bytes: u.Bytes + bytes, Inodes: u.Inodes + inodes})
}

func (e *editor) putUsage(s sealfs.Shard, v sealfs.Volume, u meta.Usage) {
	k := meta.UsageKey(s, v)
	switch {
	case u.Bytes < 0 || u.Inodes < 0:
	case u == (meta.Usage{}):
		e.del(k[:])
	default:
		e.put(k[:], u.Append(nil))
	}
}

// number issues an inode number of a shard of the store. From a shard whose counter
// has run beyond all numbers it takes the one behind the last that is in use.
func (e *editor) number(s sealfs.Shard) sealfs.Ino {
	shards := uint64(e.c.w.shards)
	k := meta.ShardKey(s)
	st := meta.ShardState{Counter: sealfs.InoCounterMin}
	if b := e.get(k[:]); b != nil {
		if read, err := meta.DecodeShardState(b); err == nil {
			st = read
		}
	}
	if st.Counter > (sealfs.InoMax-uint64(s))/shards {
		q := uint64(sealfs.InoCounterMin)
		prefix := meta.InodeKey(e.c.w.shards, sealfs.Ino(s))
		for _, r := range e.under(prefix[:3], 1<<40) {
			if k, err := meta.DecodeKey(r.key); err == nil {
				q = max(q, uint64(k.Ino)/shards+1)
			}
		}
		if q > (sealfs.InoMax-uint64(s))/shards { // then one between
			for q = sealfs.InoCounterMin; e.inode(sealfs.Ino(q*shards+uint64(s)), new(meta.Inode)); q++ {
			}
		}
		return sealfs.Ino(q*shards + uint64(s))
	}
	ino := sealfs.Ino(st.Counter*shards + uint64(s))
	st.Counter++
	e.put(k[:], st.Append(nil))
	return ino
}

// entries returns the entries of a directory that have the hash of a name.
func (e *editor) entries(dir *meta.Inode, name []byte) (list []meta.Entry, keys [][]byte) {
	k := meta.EntryKey(e.c.w.shards, dir.Ino, firstCookie(self(dir), dir.Volume, name))
	for _, r := range e.under(k[:len(k)-1], ordinals) {
		var x meta.Entry
		if meta.DecodeEntry(r.val, dir.Ino, binary.BigEndian.Uint64(r.key[len(r.key)-8:]), &x) == nil {
			list, keys = append(list, x), append(keys, r.key)
		}
	}
	return list, keys
}

// look finds a name in a directory.
func (e *editor) look(dir *meta.Inode, name []byte) (meta.Entry, bool) {
	list, _ := e.entries(dir, name)
	for _, x := range list {
		if bytes.Equal(x.Name, name) {
			return x, true
		}
	}
	return meta.Entry{}, false
}

// enter gives ino a name in a directory, one that is free: if name is not, a
// number is added to it. It returns the name that was given. A directory that is split takes none here.
func (e *editor) enter(dir *meta.Inode, name []byte, ino sealfs.Ino, typ uint8) ([]byte, bool) {
	if dir.IsSplit() {
		return nil, false
	}
	given := name
	for i := 2; i < 1<<20; i++ {
		if _, taken := e.look(dir, given); !taken {
			break
		}
		tail := fmt.Sprintf(".%d", i)
		given = append(bytes.Clone(name[:min(len(name), sealfs.NameMax-len(tail))]), tail...)
	}
	_, keys := e.entries(dir, given)
	for ordinal := range uint64(ordinals) {
		k := meta.EntryKey(e.c.w.shards, dir.Ino, firstCookie(self(dir), dir.Volume, given)+ordinal)
		if slices.ContainsFunc(keys, func(b []byte) bool { return bytes.Equal(b, k[:]) }) || e.get(k[:]) != nil {
			continue
		}
		x := meta.Entry{Ino: ino, Type: typ, Name: given}
		e.put(k[:], x.Append(nil))
		dir.Size++
		if typ == typeDir {
			dir.Nlink++
		}
		e.putInode(dir)
		return given, true
	}
	return nil, false
}

// leave takes the entry at a key from its directory, if that is one.
func (e *editor) leave(key []byte, dir sealfs.Ino, typ uint8) {
	if e.get(key) == nil {
		return
	}
	e.del(key)
	e.change(dir, func(in *meta.Inode) {
		if in.Mode>>12 != typeDir {
			return
		}
		in.Size -= min(in.Size, 1)
		if typ == typeDir && in.Nlink > 2 {
			in.Nlink--
		}
	})
}

// extents returns the extents of an inode at home, with their keys: nil for that in the inode.
func (e *editor) extents(ino sealfs.Ino) (list []meta.Extent, keys [][]byte) {
	var in meta.Inode
	if e.inode(ino, &in) && in.First.Len != 0 {
		list, keys = append(list, in.First), append(keys, nil)
	}
	k := meta.ExtentKey(e.c.w.shards, ino, 0)
	for _, r := range e.under(k[:11], 1<<20) {
		var x meta.Extent
		if meta.DecodeExtent(r.val, binary.BigEndian.Uint64(r.key[11:]), &x) == nil && !(in.Chunked() && x.Off >= sealfs.HomeBytes) {
			list, keys = append(list, x), append(keys, r.key)
		}
	}
	return list, keys
}

// roots returns the root directories that are known, by volume.
func (w *whole) roots() map[sealfs.Volume]sealfs.Ino {
	m := map[sealfs.Volume]sealfs.Ino{}
	for _, n := range w.stores {
		for i := range n.inodes {
			in := &n.inodes[i]
			if in.typ == typeDir && n.more[in.more].parent == in.ino && n.owns(in.ino) {
				v := n.volumes[in.volume]
				if old, ok := m[v]; !ok || in.ino < old {
					m[v] = in.ino
				}
			}
		}
	}
	return m
}

// editor returns the editor of the store on which an inode must be, nil if it is not given.
func (w *whole) editor(ino sealfs.Ino) *editor {
	if n := w.home(ino); n != nil && n.c.editor != nil {
		return n.c.editor
	}
	return nil
}

// usual returns the volume of which most inodes of the store are.
func (n *namespace) usual() sealfs.Volume {
	count := make([]int, len(n.volumes))
	for i := range n.inodes {
		count[n.inodes[i].volume]++
	}
	best := sealfs.Volume(1)
	most := 0
	for i, v := range n.volumes {
		if count[i] > most || count[i] == most && cmp.Less(v, best) {
			best, most = v, count[i]
		}
	}
	return best
}
