package fsck

import (
	"encoding/binary"
	"fmt"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
)

// Directories whose entries are split over shards: a partition is an inode that nothing but
// rows name, one at the home of its directory and one beside it.

// partitionKey names a row.
type partitionKey struct {
	shard  sealfs.Shard
	dir    sealfs.Ino
	number uint16
}

// self returns the directory that in is, or is a partition of.
func self(in *meta.Inode) sealfs.Ino {
	if in.IsPartition() {
		return in.Parent
	}
	return in.Ino
}

// asInode returns what a detail says of a directory's partitions.
func (d *detail) asInode() *meta.Inode {
	return &meta.Inode{Ino: d.ino, Mode: typeDir << 12, Parent: d.parent, Bound: uint64(d.bound), Gen: d.gen}
}

func (d *detail) self() sealfs.Ino { return self(d.asInode()) }

// moved returns how many partitions of a directory are in use.
func (d *detail) moved() uint64 { return d.asInode().Moved() }

// leftover judges an entry at a cookie whose partition has moved from d, and reports whether it is one.
func (r *reader) leftover(k *meta.Key, d *detail, where func() string) bool {
	in := d.asInode()
	switch number := op.PartitionOf(k.Pos); {
	case in.IsPartition() && in.Number() != number:
		r.problem(EntryApart, where(), "it is in partition %d, not %d", in.Number(), number)
	case number >= d.moved():
		return false
	case d.gen == 0:
		r.problem(EntryApart, where(), "partition %d has moved, and it has not", number)
	}
	return true
}

// partitionRow takes note of a row.
func (r *reader) partitionRow(k *meta.Key, ino sealfs.Ino) {
	r.partitions[partitionKey{k.Shard, k.Ino, k.Part}] = ino
}

// split judges what the home of a directory says of its partitions.
func (n *namespace) split(i *inode, d *detail) {
	shard := i.ino.Home(n.w.shards)
	for number := range d.moved() {
		where := fmt.Sprintf("directory %d, partition %d", i.ino, number)
		row := n.partitions[partitionKey{shard, i.ino, uint16(number)}]
		if row == 0 {
			n.c.problem(PartitionLost, where, "no row names it")
			continue
		}
		home, p := n.w.lookup(row)
		switch {
		case home == nil || p == nil && home.c.holes:
			n.c.rep.NotJudged++
		case p == nil || p.typ != typeDir:
			n.c.problem(PartitionLost, where, "inode %d", row)
		default:
			in := home.more[p.more].asInode()
			if !in.IsPartition() || in.Parent != i.ino || in.Number() != number {
				n.c.problem(PartitionLost, where, "inode %d is none of its partitions", row)
			}
		}
	}
	if _, row := n.partitions[partitionKey{shard, i.ino, workRow}]; row != (d.gen != 0) {
		n.c.problem(PartitionWork, name(i.ino), "the inode says %v, a row %v", d.gen != 0, row)
		ino := i.ino
		n.mendInode(PartitionWork, ino, func(in *meta.Inode) string {
			in.Gen = 1
			k := meta.PartitionKey(shard, ino, workRow)
			n.c.editor.put(k[:], binary.AppendUvarint(nil, uint64(ino)))
			return "its server looks at its partitions"
		})
	}
}

// workRow is the number of the row that says that there is something to do.
const workRow = 255

// partition judges what a partition says of itself.
func (n *namespace) partition(i *inode, d *detail) {
	c, in := n.c, d.asInode()
	if i.names != 0 {
		c.problem(DirNames, name(i.ino), "%d of a partition", i.names)
		n.mendNames(i, true)
	}
	shard := i.ino.Home(n.w.shards)
	if row := n.partitions[partitionKey{shard, d.parent, uint16(in.Number())}]; row != i.ino {
		c.problem(PartitionRow, name(i.ino), "as partition %d of directory %d its row names inode %d", in.Number(), d.parent, row)
		ino, key := i.ino, meta.PartitionKey(shard, d.parent, uint8(in.Number()))
		c.mendBy(PartitionRow, name(ino), func(e *editor) string {
			e.put(key[:], binary.AppendUvarint(nil, uint64(ino)))
			return "the row names it"
		})
	}
	if !n.w.firm(d.parent) {
		c.rep.NotJudged++
		return
	}
	home, dir := n.w.lookup(d.parent)
	if dir == nil || dir.typ != typeDir {
		c.problem(PartitionStray, name(i.ino), "directory %d does not exist", d.parent)
		return
	}
	of := &home.more[dir.more]
	if row := home.partitions[partitionKey{d.parent.Home(n.w.shards), d.parent, uint16(in.Number())}]; of.gen == 0 && (of.moved() <= in.Number() || row != i.ino) {
		c.problem(PartitionStray, name(i.ino), "directory %d has another partition %d, or none", d.parent, in.Number())
	}
}
