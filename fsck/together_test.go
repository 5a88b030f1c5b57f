package fsck

import (
	"slices"
	"testing"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
)

// hurts are stores of a cluster that are to be damaged.
type hurts struct {
	all []*hurt
	z   tree
	c   *stores
}

// of returns the store of an inode.
func (d *hurts) of(ino sealfs.Ino) *hurt { return d.all[int(ino.Home(testShards))%len(d.all)] }

// acrossDamages break one thing each that only several stores together tell.
// The judge must find just these numbers, on the store of the inode that returns.
var acrossDamages = []struct {
	name string
	want []ID
	do   func(d *hurts) sealfs.Ino
}{
	{"entry of nothing", []ID{EntryNoInode}, func(d *hurts) sealfs.Ino {
		d.of(d.z.a).link(d.z.a, "ghost", d.z.gone, typeFile, 0)
		d.of(d.z.a).inode(d.z.a, func(in *meta.Inode) { in.Size++ })
		return d.z.a
	}},
	{"entry of no directory", []ID{EntryNoInode}, func(d *hurts) sealfs.Ino {
		d.of(d.z.a).link(d.z.a, "ghost", d.z.gone, typeDir, 0)
		d.of(d.z.a).inode(d.z.a, func(in *meta.Inode) { in.Size++; in.Nlink++ })
		return d.z.a
	}},
	{"entry's type", []ID{EntryType}, func(d *hurts) sealfs.Ino {
		d.of(d.z.b).link(d.z.b, "moved", d.z.moved, typeLink, 0)
		return d.z.b
	}},
	{"directory as a file", []ID{EntryType}, func(d *hurts) sealfs.Ino {
		d.of(d.z.a).link(d.z.a, "empty", d.z.empty, typeFile, 0)
		return d.z.a
	}},
	{"entry's volume", []ID{EntryVolume}, func(d *hurts) sealfs.Ino {
		h := d.of(d.z.moved)
		h.inode(d.z.moved, func(in *meta.Inode) { in.Volume++ })
		h.usage(d.z.moved, testVolume, 0, -1)
		h.usage(d.z.moved, testVolume+1, 0, 1)
		return d.z.b
	}},
	{"one link too many", []ID{LinkCount}, func(d *hurts) sealfs.Ino {
		d.of(d.z.both).inode(d.z.both, func(in *meta.Inode) { in.Nlink++ })
		return d.z.both
	}},
	{"one link too few", []ID{LinkCount}, func(d *hurts) sealfs.Ino {
		d.of(d.z.both).inode(d.z.both, func(in *meta.Inode) { in.Nlink-- })
		return d.z.both
	}},
	{"one name of two is lost", []ID{LinkCount}, func(d *hurts) sealfs.Ino {
		d.of(d.z.b).unlink(d.z.b, "both")
		d.of(d.z.b).inode(d.z.b, func(in *meta.Inode) { in.Size-- })
		return d.z.both
	}},
	{"the name is lost", []ID{NoName}, func(d *hurts) sealfs.Ino {
		d.of(d.z.b).unlink(d.z.b, "moved")
		d.of(d.z.b).inode(d.z.b, func(in *meta.Inode) { in.Size-- })
		return d.z.moved
	}},
	{"a directory's name is lost", []ID{NoName}, func(d *hurts) sealfs.Ino {
		d.of(d.z.a).unlink(d.z.a, "empty")
		d.of(d.z.a).inode(d.z.a, func(in *meta.Inode) { in.Size--; in.Nlink-- })
		return d.z.empty
	}},
	{"an orphan with a name elsewhere", []ID{LinkCount}, func(d *hurts) sealfs.Ino {
		h := d.of(d.z.moved)
		h.inode(d.z.moved, func(in *meta.Inode) { in.Nlink = 0 })
		k := meta.OrphanKey(testShards, d.z.moved)
		h.set(k[:], []byte{1})
		return d.z.moved
	}},
	{"subdirectories elsewhere", []ID{DirLinks}, func(d *hurts) sealfs.Ino {
		d.of(d.z.a).inode(d.z.a, func(in *meta.Inode) { in.Nlink++ })
		return d.z.a
	}},
	{"parent", []ID{DirParent}, func(d *hurts) sealfs.Ino {
		d.of(d.z.empty).inode(d.z.empty, func(in *meta.Inode) { in.Parent = d.z.b })
		return d.z.empty
	}},
	{"parent that does not exist", []ID{DirParent}, func(d *hurts) sealfs.Ino {
		d.of(d.z.empty).inode(d.z.empty, func(in *meta.Inode) { in.Parent = d.z.gone })
		return d.z.empty
	}},
	{"directory of two names", []ID{DirParent, DirNames}, func(d *hurts) sealfs.Ino {
		d.of(d.z.b).link(d.z.b, "empty too", d.z.empty, typeDir, 0)
		d.of(d.z.b).inode(d.z.b, func(in *meta.Inode) { in.Size++; in.Nlink++ })
		return d.z.empty
	}},
	{"loop", []ID{DirLoop}, func(d *hurts) sealfs.Ino {
		// b → c → d, and b below d.
		d.of(d.c.root).unlink(d.c.root, "b")
		d.of(d.c.root).inode(d.c.root, func(in *meta.Inode) { in.Size--; in.Nlink-- })
		d.of(d.z.d).link(d.z.d, "b", d.z.b, typeDir, 0)
		d.of(d.z.d).inode(d.z.d, func(in *meta.Inode) { in.Size++; in.Nlink++ })
		d.of(d.z.b).inode(d.z.b, func(in *meta.Inode) { in.Parent = d.z.d })
		return 0
	}},
	{"lost directory", []ID{EntryNoDir, EntryNoInode, LinkCount, NoName, UsageWrong}, func(d *hurts) sealfs.Ino {
		// With all that it says of itself; its entries and its children stay.
		k := meta.InodeKey(testShards, d.z.b)
		d.of(d.z.b).del(k[:])
		return 0
	}},
}

func (d *hurts) judge(t *testing.T, l *Layout) *Together {
	t.Helper()
	var all []images
	for _, h := range d.all {
		all = append(all, h.images)
	}
	return together(t, all, l)
}

func TestProblemsAcrossStores(t *testing.T) {
	for _, n := range []int{2, 3} {
		c := newStores(t, n)
		z := c.grow()
		all := c.copies()
		for _, x := range acrossDamages {
			t.Run(x.name, func(t *testing.T) {
				d := &hurts{z: z, c: c}
				for _, m := range all {
					d.all = append(d.all, &hurt{images: m.clone(), t: t})
				}
				at := x.do(d)
				for _, l := range []*Layout{nil, c.layout()} {
					rep := d.judge(t, l)
					if got := rep.numbers(); !slices.Equal(got, x.want) {
						t.Errorf("%d stores: %v, want %v", n, got, x.want)
					}
					for i, r := range rep.Stores {
						if at != 0 && r.Clean() == (d.all[i] == d.of(at)) {
							t.Errorf("%d stores: store %d has %v", n, i, r.IDs())
						}
					}
				}
				for _, l := range []*Layout{nil, c.layout()} {
					var copies []images
					for _, h := range d.all {
						copies = append(copies, h.images.clone())
					}
					mended(t, copies, l, nil)
				}
				// What others are wrong in is not found on a store alone.
				for i, h := range d.all {
					if rep := judge(t, h.options()); at != 0 && d.of(at) != d.all[i] && !rep.Clean() {
						t.Errorf("store %d of %d alone: %v", i, n, rep.IDs())
					}
				}
			})
		}
	}
}

// Records of a shard must be on one store only, and on that which the map names.
func TestShardOnTwoStores(t *testing.T) {
	c := newStores(t, 3)
	z := c.grow()
	all := c.copies()
	s := z.b.Home(testShards)
	owner, other := int(s)%3, (int(s)+1)%3
	h := &hurt{images: all[other], t: t}
	from := &hurt{images: all[owner], t: t}
	k := meta.ShardKey(s)
	h.set(k[:], from.get(k[:]))
	for want, l := range map[ID]*Layout{ShardTwice: nil, ShardForeign: c.layout()} {
		rep := together(t, all, l)
		for i, r := range rep.Stores {
			if got := r.IDs(); (len(got) != 0) != (i == other) || i == other && !slices.Equal(got, []ID{want}) {
				t.Errorf("store %d: %v, want %d", i, got, want)
			}
		}
	}
	// Copies of records are not taken for the real ones.
	in, usage := meta.InodeKey(testShards, z.b), meta.UsageKey(s, testVolume)
	h.set(in[:], from.get(in[:]))
	u := meta.Usage{Inodes: 1}
	h.set(usage[:], u.Append(nil))
	if rep := together(t, all, nil); !slices.Equal(rep.numbers(), []ID{ShardTwice}) {
		t.Errorf("%v", rep.numbers())
	}
	// A map of other stores is not this cluster's any more.
	l := c.layout()
	l.Store[s], l.Store[s+1] = l.Store[s+1], l.Store[s]
	if rep := together(t, c.copies(), l); !slices.Contains(rep.numbers(), ShardForeign) {
		t.Errorf("a wrong map: %v", rep.numbers())
	}
}

// An inode without a name is an orphan, wherever its last name was.
func TestOrphansOverStores(t *testing.T) {
	c := newStores(t, 2)
	z := c.grow()
	before := together(t, c.copies(), nil)
	req := &op.Request{Type: op.Unlink, Dir: z.b, Name: "moved", Flags: op.Held}
	_, at := c.do(req, decided)
	s := at.parts[0].Shard
	c.of(s).do(&op.Request{Type: op.Commit, Shard: s, Tx: at.req.Tx, Mtime: at.req.Time, Flags: op.Held})
	all := c.copies()
	rep := together(t, all, nil)
	if i := int(s) % 2; len(rep.numbers()) != 0 || rep.Stores[i].Orphans != before.Stores[i].Orphans+1 || rep.InDoubt != 0 {
		t.Errorf("%v, %d orphans, %d in doubt", rep.numbers(), rep.Stores[i].Orphans, rep.InDoubt)
	}
	h := &hurt{images: all[int(s)%2], t: t}
	k := meta.OrphanKey(testShards, z.moved)
	h.del(k[:])
	if rep := together(t, all, nil); !slices.Equal(rep.numbers(), []ID{OrphanMissing}) {
		t.Errorf("%v", rep.numbers())
	}
}
