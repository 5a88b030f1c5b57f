package fsck

import (
	"bytes"
	"slices"
	"testing"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
)

// transactions are operations over several stores, on the tree of grow.
func transactions(c *stores, z tree) map[string]*op.Request {
	return map[string]*op.Request{
		"mkdir":              {Type: op.Mkdir, Dir: z.a, Name: "new", Mode: 0o700, Shard2: 1},
		"mkdir with an ACL":  {Type: op.Mkdir, Dir: z.acl, Name: "new", Mode: 0o700, Shard2: 1},
		"rmdir":              {Type: op.Rmdir, Dir: z.a, Name: "empty"},
		"link":               {Type: op.Link, Dir: z.b, Name: "linked", Ino: z.file},
		"first link":         {Type: op.Link, Dir: z.b, Name: "tmp", Ino: z.tmp},
		"unlink":             {Type: op.Unlink, Dir: z.b, Name: "both"},
		"unlink the last":    {Type: op.Unlink, Dir: z.b, Name: "moved"},
		"rename":             {Type: op.Rename, Dir: z.a, Name: "in a", Dir2: z.b, Name2: "in b too"},
		"rename back":        {Type: op.Rename, Dir: z.b, Name: "moved", Dir2: z.a, Name2: "moved"},
		"replace":            {Type: op.Rename, Dir: z.a, Name: "in a", Dir2: z.b, Name2: "replaced"},
		"replace a link":     {Type: op.Rename, Dir: z.b, Name: "in b", Dir2: z.a, Name2: "both"},
		"move directory":     {Type: op.Rename, Dir: z.b, Name: "c", Dir2: z.a, Name2: "c"},
		"replace directory":  {Type: op.Rename, Dir: z.c, Name: "d", Dir2: z.a, Name2: "c2"},
		"over a directory":   {Type: op.Rename, Dir: z.b, Name: "c", Dir2: z.a, Name2: "empty"},
		"exchange":           {Type: op.Rename, Dir: z.a, Name: "in a", Dir2: z.b, Name2: "in b", Flags: op.Exchange},
		"exchange both":      {Type: op.Rename, Dir: z.a, Name: "in a", Dir2: z.b, Name2: "c", Flags: op.Exchange},
		"exchange the other": {Type: op.Rename, Dir: z.b, Name: "c", Dir2: z.a, Name2: "file", Flags: op.Exchange},
		"rename in one":      {Type: op.Rename, Dir: z.b, Name: "both", Dir2: z.b, Name2: "both again"},
	}
}

// A transaction in doubt is no problem, and the namespace is judged as it will
// be afterwards: both ways, from any of the stores, and at every step.
func TestTransactionsInDoubt(t *testing.T) {
	for _, n := range []int{2, 3} {
		for name := range transactions(newStores(t, n), tree{}) {
			for stop := prepared; stop <= forgotten; stop++ {
				c := newStores(t, n)
				z := c.grow()
				_, at := c.do(transactions(c, z)[name], stop)
				if at == nil {
					break // on one store
				}
				for _, l := range []*Layout{nil, c.layout()} {
					inDoubt(t, c, name, stop, l)
				}
				if stop == prepared {
					at.finish(op.Abort)
				} else {
					at.finish(op.Commit)
				}
				if rep := together(t, c.copies(), nil); len(rep.numbers()) != 0 || rep.InDoubt != 0 || rep.NotJudged != 0 {
					t.Errorf("%s on %d stores, ended after stage %d: %v, %d in doubt, %d not judged", name, n, stop, rep.numbers(), rep.InDoubt, rep.NotJudged)
				}
			}
		}
	}
}

func inDoubt(t *testing.T, c *stores, name string, stop stage, l *Layout) {
	want := Aborted
	if stop > prepared {
		want = Committed
	}
	subsets(c.copies(), func(given []images, whole bool) {
		rep := together(t, given, l)
		if ids := rep.numbers(); len(ids) != 0 {
			t.Errorf("%s, stopped at stage %d, %d of %d stores: %v", name, stop, len(rep.Stores), len(given), ids)
		}
		for _, r := range rep.Stores {
			for _, x := range r.Transactions {
				coord := c.of(x.Coordinator)
				fate := want
				if given[slices.Index(c.all, coord)].dev == nil {
					fate = UnknownFate
				}
				if x.Fate != fate {
					t.Errorf("%s, stopped at stage %d: the fate is %s, want %s", name, stop, x.Fate, fate)
				}
			}
		}
		if whole && (rep.NotJudged != 0 || rep.InDoubt > 1 || rep.InDoubt != 1 && stop < halfDone || rep.InDoubt != 0 && stop > halfDone) {
			t.Errorf("%s, stopped at stage %d: %d in doubt, %d not judged", name, stop, rep.InDoubt, rep.NotJudged)
		}
	})
}

// damagedTx is a transaction in doubt on two stores, and the damage to it.
type damagedTx struct {
	h  []*hurt
	z  tree
	at *tx
}

// row changes the first prepared row of a kind.
func (d *damagedTx) row(kind op.Part, fn func(p *op.Request)) {
	d.h[0].t.Helper()
	ordinals := map[sealfs.Shard]uint8{}
	for i := range d.at.parts {
		s := d.at.parts[i].Shard
		if d.at.parts[i].Part != kind {
			ordinals[s]++
			continue
		}
		h, k := d.h[int(s)%len(d.h)], meta.PreparedKey(s, d.at.req.Tx, ordinals[s])
		p, err := meta.DecodePrepared(h.get(k[:]))
		h.must(err)
		fn(p)
		h.set(k[:], p.AppendTo(nil))
		return
	}
	d.h[0].t.Fatalf("the transaction has no part %d", kind)
}

func (d *damagedTx) decision(fn func(x *meta.Decision)) {
	h := d.h[int(d.at.req.Coord)%len(d.h)]
	k := meta.DecisionKey(d.at.req.Coord, d.at.req.Tx)
	x, err := meta.DecodeDecision(h.get(k[:]))
	h.must(err)
	fn(&x)
	h.set(k[:], x.Append(nil))
}

// leftInDoubt is what cannot be repaired before the transaction has ended: what is wrong
// in a directory that is still to be made.
var leftInDoubt = map[string][]ID{
	"new: number to be issued": {NoName},
	"new: other parent":        {DirParent},
	"new: volume":              {EntryVolume},
	"name: type":               {EntryType},
}

func TestDamagedTransactions(t *testing.T) {
	type fn = func(d *damagedTx)
	row := func(kind op.Part, f func(p *op.Request)) fn { return func(d *damagedTx) { d.row(kind, f) } }
	wrong, ok := []ID{PreparedWrong}, []ID(nil)
	for _, x := range []struct {
		name, tx string
		want     []ID
		do       fn
	}{
		{"sound", "mkdir", ok, func(*damagedTx) {}},
		{"transaction", "mkdir", wrong, row(op.PartNew, func(p *op.Request) { p.Tx.Nonce++ })},
		{"shard", "mkdir", wrong, row(op.PartNew, func(p *op.Request) { p.Shard ^= 2 })},
		{"coordinator", "mkdir", wrong, row(op.PartNew, func(p *op.Request) { p.Coord = testShards })},
		{"new: number", "mkdir", []ID{EntryNoInode, PreparedWrong}, row(op.PartNew, func(p *op.Request) { p.Ino++ })},
		{"new: number to be issued", "mkdir", []ID{InoBeyond, EntryNoInode, NoName}, row(op.PartNew, func(p *op.Request) { p.Ino += 100 * testShards })},
		{"new: it exists", "mkdir", []ID{EntryNoInode, PreparedWrong}, func(d *damagedTx) {
			d.row(op.PartNew, func(p *op.Request) { p.Ino = d.z.empty })
		}},
		{"new: mode", "mkdir", wrong, row(op.PartNew, func(p *op.Request) { p.Mode ^= 0o140000 })},
		{"new: ACL", "mkdir", wrong, row(op.PartNew, func(p *op.Request) { p.Data = []byte("no ACL") })},
		{"new: no parent", "mkdir", wrong, row(op.PartNew, func(p *op.Request) { p.Dir = 0 })},
		{"new: other parent", "mkdir", []ID{DirParent}, func(d *damagedTx) {
			d.row(op.PartNew, func(p *op.Request) { p.Dir = d.z.b })
		}},
		{"new: volume", "mkdir", []ID{EntryVolume, UsageWrong}, row(op.PartNew, func(p *op.Request) { p.Volume++ })},
		{"drop: parent", "rmdir", wrong, row(op.PartDrop, func(p *op.Request) { p.Dir = 99 })},
		{"drop: volume", "rmdir", wrong, row(op.PartDrop, func(p *op.Request) { p.Volume++ })},
		{"drop: no links", "unlink", wrong, func(d *damagedTx) {
			d.h[0].inode(d.z.both, func(in *meta.Inode) { in.Nlink = 0 })
		}},
		{"drop: not empty", "rmdir", wrong, func(d *damagedTx) {
			d.h[1].inode(d.z.empty, func(in *meta.Inode) { in.Size++ })
		}},
		{"drop: another file", "unlink", []ID{LinkCount}, func(d *damagedTx) {
			d.row(op.PartDrop, func(p *op.Request) { p.Ino = d.z.file })
		}},
		{"link: a directory", "link", []ID{LinkCount, PreparedWrong}, func(d *damagedTx) {
			d.row(op.PartLink, func(p *op.Request) { p.Ino = d.z.a })
		}},
		{"link: of what is gone", "first link", []ID{PreparedWrong}, func(d *damagedTx) {
			d.h[0].inode(d.z.tmp, func(in *meta.Inode) { in.Flags = 0 })
		}},
		{"move: where from", "move directory", wrong, row(op.PartMove, func(p *op.Request) { p.Dir2++ })},
		{"move: where to", "move directory", []ID{DirParent}, func(d *damagedTx) {
			d.row(op.PartMove, func(p *op.Request) { p.Dir = d.z.b })
		}},
		{"name: what it stood for", "replace", wrong, row(op.PartName, func(p *op.Request) { p.Off = uint64(p.Ino) })},
		{"name: that it stood for nothing", "replace", wrong, row(op.PartName, func(p *op.Request) { p.Off = 0 })},
		{"name: that it stood for something", "rename", wrong, row(op.PartName, func(p *op.Request) { p.Off = uint64(p.Ino) })},
		{"name: directory", "rename", wrong, func(d *damagedTx) {
			d.row(op.PartName, func(p *op.Request) { p.Dir = d.z.a })
		}},
		{"name: type", "rename", []ID{EntryType}, row(op.PartName, func(p *op.Request) { p.Mode = 0o120000 })},
		{"name: of another", "rename", []ID{LinkCount, NoName}, func(d *damagedTx) {
			d.row(op.PartName, func(p *op.Request) { p.Ino = d.z.file })
		}},
		{"the root", "replace directory", wrong, func(d *damagedTx) {
			d.row(op.PartVolume, func(p *op.Request) { p.Ino = d.z.b })
		}},
		{"a row is lost", "rmdir", []ID{NoName}, func(d *damagedTx) {
			k := meta.PreparedKey(d.at.parts[0].Shard, d.at.req.Tx, 0)
			d.h[1].del(k[:])
		}},
		{"row", "rmdir", []ID{RecordDamaged}, func(d *damagedTx) {
			k := meta.PreparedKey(d.at.parts[0].Shard, d.at.req.Tx, 0)
			d.h[1].set(k[:], bytes.Repeat([]byte{0xff}, 30))
		}},
		{"decision: party", "rmdir", []ID{DecisionWrong}, func(d *damagedTx) {
			d.decision(func(x *meta.Decision) { x.Parties[0] ^= 2 })
		}},
		{"decision: no such party", "rmdir", []ID{DecisionWrong}, func(d *damagedTx) {
			d.decision(func(x *meta.Decision) { x.Parties = append(x.Parties, 1000) })
		}},
		{"decision: time", "rmdir", []ID{DecisionWrong}, func(d *damagedTx) {
			d.decision(func(x *meta.Decision) { x.Time = 0 })
		}},
		{"decision is lost", "rmdir", []ID{NoName}, func(d *damagedTx) {
			k := meta.DecisionKey(d.at.req.Coord, d.at.req.Tx)
			d.h[0].del(k[:])
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			c := newStores(t, 2)
			z := c.grow()
			_, at := c.do(transactions(c, z)[x.tx], decided)
			d := &damagedTx{z: z, at: at}
			for _, m := range c.copies() {
				d.h = append(d.h, &hurt{images: m, t: t})
			}
			x.do(d)
			for _, l := range []*Layout{nil, c.layout()} {
				if rep := together(t, []images{d.h[0].images, d.h[1].images}, l); !slices.Equal(rep.numbers(), x.want) {
					t.Errorf("%v, want %v", rep.numbers(), x.want)
				}
				mended(t, []images{d.h[0].images.clone(), d.h[1].images.clone()}, l, leftInDoubt[x.name])
			}
		})
	}
}

// What is prepared counts from then on, also if it comes to nothing.
func TestPreparedIsCounted(t *testing.T) {
	c := newStores(t, 2)
	z := c.grow()
	_, at := c.do(&op.Request{Type: op.Mkdir, Dir: z.a, Name: "new", Mode: 0o700, Shard2: 1}, prepared)
	all := c.copies()
	if rep := together(t, all, nil); len(rep.numbers()) != 0 || rep.InDoubt != 1 {
		t.Fatalf("%v, %d in doubt", rep.numbers(), rep.InDoubt)
	}
	h := &hurt{images: all[1], t: t}
	h.usage(sealfs.Ino(at.parts[0].Shard), testVolume, 0, -1)
	if rep := together(t, all, nil); !slices.Equal(rep.numbers(), []ID{UsageWrong}) {
		t.Errorf("%v", rep.numbers())
	}
}
