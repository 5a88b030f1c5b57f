package fsck

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/lsfs/layout"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// Stores of a cluster to be judged together: shard s lies on store s modulo
// their number. Operations over several stores are made as the server makes them.
type stores struct {
	t     testing.TB
	all   []*world
	media []images
	ids   []sealfs.UUID
	clock int64
	root  sealfs.Ino
}

var testCluster = sealfs.UUID{0xc1}

func newStores(t testing.TB, n int) *stores {
	t.Helper()
	c := &stores{t: t, clock: 1e18}
	for i := range n {
		m := images{dev: disk.NewSim(fmt.Sprint("device", i), layout.DataStart+40*testSegment), region: disk.NewSim(fmt.Sprint("region", i), 96*pageSize)}
		id := sealfs.UUID{1, byte(i)}
		w := &world{t: t, clock: 1e18, local: func(s sealfs.Shard) bool { return int(s)%n == i }}
		_, err := lsfs.Format(m.dev, pmem.NewMemory(m.region), lsfs.Geometry{SegmentBytes: testSegment, Cluster: testCluster, Store: id})
		w.must(err)
		w.s, err = lsfs.Open(m.dev, pmem.NewMemory(m.region), nil, owner{}, lazy)
		w.must(err)
		c.all, c.media, c.ids = append(c.all, w), append(c.media, m), append(c.ids, id)
	}
	t.Cleanup(func() {
		for _, w := range c.all {
			w.must(w.s.Close())
		}
	})
	c.root = c.of(3).do(&op.Request{Type: op.MakeRoot, Shard: 3, Volume: testVolume, Mode: 0o755}).Attr.Ino
	return c
}

// of returns the store of a shard.
func (c *stores) of(s sealfs.Shard) *world { return c.all[int(s)%len(c.all)] }

// home returns the store of an inode.
func (c *stores) home(ino sealfs.Ino) *world { return c.of(ino.Home(testShards)) }

// layout is the cluster map's.
func (c *stores) layout() *Layout {
	l := &Layout{Cluster: testCluster}
	for s := range testShards {
		l.Store = append(l.Store, c.ids[s%len(c.ids)])
	}
	return l
}

// stage is how far an operation over several stores goes.
type stage int

const (
	prepared  stage = iota // all parties have prepared
	decided                // and there is a decision
	halfDone               // and the first party has committed
	committed              // and all have
	forgotten              // and the decision is forgotten
)

// do executes an operation, and goes as far as until with one that is a
// transaction. It returns the reply and the transaction, if it was one.
func (c *stores) do(req *op.Request, until stage) (*op.Reply, *tx) {
	c.t.Helper()
	w := c.home(max(req.Dir, req.Ino))
	if req.Dir != 0 {
		w = c.home(req.Dir)
	}
	rep, err := w.try(req)
	var foreign *meta.Foreign
	if !errors.As(err, &foreign) {
		w.must(err)
		return rep, nil
	}
	return c.transact(w, req, until)
}

// tx is a transaction under way.
type tx struct {
	c     *stores
	coord *world
	req   *op.Request
	parts []op.Request
}

func (c *stores) transact(w *world, req *op.Request, until stage) (*op.Reply, *tx) {
	c.t.Helper()
	req.Volume = testVolume
	c.clock++
	req.Tx = op.Tx{Age: c.clock, Nonce: uint64(c.clock) * 0x9e3779b97f4a7c15}
	req.Coord = req.Shard
	var target meta.Target
	if req.Type == op.Rename {
		look := op.Request{Type: op.Lookup, Dir: req.Dir2, Name: req.Name2, Shard: req.Dir2.Home(testShards), Volume: testVolume}
		a := c.query(&look).Attr
		target = meta.Target{Ino: a.Ino, Type: uint8(a.Mode >> 12)}
	}
	r := w.s.BeginRead()
	plan, err := meta.MakePlan(r, w.config(), req, target, func(sealfs.Volume) sealfs.Ino { return c.root })
	w.s.EndRead()
	w.must(err)
	t := &tx{c, w, req, plan.Parts}
	for i := range t.parts {
		t.parts[i].Tx = req.Tx
		req.Votes = append(req.Votes, c.of(t.parts[i].Shard).do(&t.parts[i]).Attr)
	}
	switch {
	case req.Type == op.Rename:
		req.Ino, req.Off, req.Flags = plan.Ino, uint64(plan.Src), req.Flags|op.Walked
	case req.Type == op.Mkdir && len(plan.Parts) > 0:
		req.Data = plan.Parts[0].Data
	}
	if until == prepared {
		return nil, t
	}
	rep := w.do(req)
	if until >= halfDone {
		t.tell(op.Commit, 0)
	}
	if until >= committed {
		t.finish(op.Commit)
	}
	if until >= forgotten {
		w.do(&op.Request{Type: op.Forget, Shard: req.Coord, Tx: req.Tx})
	}
	return rep, t
}

// tell sends a party the outcome.
func (t *tx) tell(outcome op.Type, i int) {
	t.c.t.Helper()
	s := t.parts[i].Shard
	t.c.of(s).do(&op.Request{Type: outcome, Shard: s, Tx: t.req.Tx, Coord: t.req.Coord, Mtime: max(t.req.Time, 1)})
}

// finish sends all parties the outcome.
func (t *tx) finish(outcome op.Type) {
	t.c.t.Helper()
	for i := range t.parts {
		t.tell(outcome, i)
	}
}

func (c *stores) query(req *op.Request) *op.Reply {
	c.t.Helper()
	w := c.of(req.Shard)
	rep := &op.Reply{}
	r := w.s.BeginRead()
	defer w.s.EndRead()
	w.must(meta.Query(r, w.config(), req, rep))
	return rep
}

// run is do for what must be done wholly.
func (c *stores) run(req *op.Request) *op.Reply {
	c.t.Helper()
	rep, _ := c.do(req, forgotten)
	return rep
}

func (c *stores) mkdir(dir sealfs.Ino, name string, shard sealfs.Shard) sealfs.Ino {
	c.t.Helper()
	return c.run(&op.Request{Type: op.Mkdir, Dir: dir, Name: name, Mode: 0o755, Shard2: shard}).Attr.Ino
}

func (c *stores) create(dir sealfs.Ino, name string) sealfs.Ino {
	c.t.Helper()
	return c.run(&op.Request{Type: op.Create, Dir: dir, Name: name, Mode: 0o644}).Attr.Ino
}

// tree is what the tests damage.
type tree struct {
	a, b, c, d                sealfs.Ino // directories: a in shard 2, b in 5, b/c in 8, b/c/d in 10
	file, both, moved, gone   sealfs.Ino // a/file; a/both, also b/both; b/moved, made in a; removed from a while its home is b's
	empty, inA, inB, replaced sealfs.Ino // a/empty in shard 1; files for transactions
	tmp, acl                  sealfs.Ino // without a name, at a; a directory in shard 2 with an ACL for what is made in it
}

// grow fills the stores with what refers from one to another.
func (c *stores) grow() (z tree) {
	c.t.Helper()
	z.a, z.b = c.mkdir(c.root, "a", 2), c.mkdir(c.root, "b", 5)
	z.c = c.mkdir(z.b, "c", 8)
	z.d = c.mkdir(z.c, "d", 10)
	z.file, z.both, z.moved = c.create(z.a, "file"), c.create(z.a, "both"), c.create(z.a, "moving")
	c.run(&op.Request{Type: op.Link, Dir: z.b, Name: "both", Ino: z.both})
	c.run(&op.Request{Type: op.Rename, Dir: z.a, Name: "moving", Dir2: z.b, Name2: "moved"})
	z.gone = c.create(z.b, "going")
	c.run(&op.Request{Type: op.Rename, Dir: z.b, Name: "going", Dir2: z.a, Name2: "going"})
	c.run(&op.Request{Type: op.Unlink, Dir: z.a, Name: "going"})
	z.empty = c.mkdir(z.a, "empty", 1)
	z.inA, z.inB, z.replaced = c.create(z.a, "in a"), c.create(z.b, "in b"), c.create(z.b, "replaced")
	z.tmp = c.run(&op.Request{Type: op.Tmpfile, Dir: z.a, Mode: 0o600}).Attr.Ino
	for i := range 20 {
		sub := c.mkdir(z.d, fmt.Sprint("sub", i), sealfs.Shard(i%testShards))
		f := c.create(sub, "f")
		c.home(f).write(f, 0, pattern(byte(i), 3000))
	}
	z.acl = c.mkdir(c.root, "acl", 2)
	c.run(&op.Request{Type: op.Setxattr, Ino: z.acl, Name: op.ACLDefault, Data: testACL})
	c.mkdir(z.acl, "handed on", 5)
	return z
}

// copies returns the media as a power cut behind a checkpoint would leave them.
func (c *stores) copies() []images {
	c.t.Helper()
	var all []images
	for i, w := range c.all {
		w.must(w.s.Checkpoint())
		w.must(w.s.Sync())
		all = append(all, c.media[i].clone())
	}
	return all
}

// together judges stores, of which those with nil devices are not given.
func together(t testing.TB, all []images, l *Layout) *Together {
	t.Helper()
	var o []Options
	var out strings.Builder
	for _, m := range all {
		if m.dev != nil {
			o = append(o, Options{Dev: m.dev, Reg: m.region, Out: &out})
		}
	}
	rep, err := CheckAll(t.Context(), o, l)
	if err := errors.Join(append(rep.Errors, err)...); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log("\n" + out.String())
		}
	})
	return rep
}

// mended repairs stores, all that are given, and expects that want is left, and that
// doing it again does nothing.
func mended(t testing.TB, all []images, l *Layout, want []ID) *Together {
	t.Helper()
	var o []Options
	var out strings.Builder
	for _, m := range all {
		o = append(o, Options{Dev: m.dev, Reg: m.region, Out: &out, Repair: RepairAll, SaveDir: t.TempDir()})
	}
	var first *Together
	for again := range 2 {
		before := make([]images, len(all))
		for i, m := range all {
			before[i] = m.clone()
		}
		rep, err := CheckAll(t.Context(), o, l)
		if err := errors.Join(append(rep.Errors, err)...); err != nil {
			t.Fatalf("%v\n%s", err, out.String())
		}
		for i, r := range rep.Stores {
			if again == 1 && (len(r.Fixed) > 0 || !all[i].same(before[i])) {
				t.Errorf("store %d: the second repair has changed something: %v", i, r.Plan)
			}
		}
		if again == 0 {
			first = rep
		} else if got := rep.numbers(); !slices.Equal(got, want) {
			t.Errorf("after the repair: %v, want %v", got, want)
		}
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log("\n" + out.String())
		}
	})
	return first
}

// numbers returns the problems of all stores, each once.
func (t *Together) numbers() []ID {
	var ids []ID
	for _, r := range t.Stores {
		ids = append(ids, r.IDs()...)
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// subsets calls fn with all choices of some of the stores.
func subsets(all []images, fn func(given []images, whole bool)) {
	for bits := 1; bits < 1<<len(all); bits++ {
		given := slices.Clone(all)
		for i := range given {
			if bits>>i&1 == 0 {
				given[i] = images{}
			}
		}
		fn(given, bits == 1<<len(all)-1)
	}
}

// Stores of a cluster are clean together, and what is left of them when some
// are missing is clean as far as it can be judged.
func TestStoresAreCleanTogether(t *testing.T) {
	for _, n := range []int{1, 2, 3} {
		c := newStores(t, n)
		c.grow()
		all := c.copies()
		for _, l := range []*Layout{nil, c.layout()} {
			subsets(all, func(given []images, whole bool) {
				rep := together(t, given, l)
				if ids := rep.numbers(); len(ids) != 0 {
					t.Errorf("%d of %d stores, layout %v: %v", len(rep.Stores), n, l != nil, ids)
				}
				if (rep.NotJudged == 0) != whole || (rep.Absent == 0) != whole || l != nil && len(rep.Missing) != n-len(rep.Stores) {
					t.Errorf("%d of %d stores: %d not judged, %d shards absent, %d stores missing", len(rep.Stores), n, rep.NotJudged, rep.Absent, len(rep.Missing))
				}
				if whole && rep.Shards != testShards {
					t.Errorf("%d shards", rep.Shards)
				}
			})
		}
		for i, m := range all {
			if rep := judge(t, m.options()); !rep.Clean() || (rep.NotJudged == 0) != (n == 1) {
				t.Errorf("store %d of %d alone: %v, %d not judged", i, n, rep.IDs(), rep.NotJudged)
			}
		}
	}
}

// A store that cannot be read is missing for the others.
func TestUnreadableStore(t *testing.T) {
	c := newStores(t, 3)
	c.grow()
	all := c.copies()
	all[1].region.Zero(0, 2*pageSize)
	for _, l := range []*Layout{nil, c.layout()} {
		rep := together(t, all, l)
		for i, want := range [][]ID{nil, {RegionLost}, nil} {
			if got := rep.Stores[i].IDs(); !slices.Equal(got, want) {
				t.Errorf("store %d: %v, want %v", i, got, want)
			}
		}
		if rep.Stores[0].NotJudged == 0 || rep.Stores[2].NotJudged == 0 {
			t.Error("everything was judged")
		}
	}
}

func TestForeignStoresAreRefused(t *testing.T) {
	a, b := newStores(t, 1), newStores(t, 2)
	all := append(b.copies(), a.copies()...)
	check := func(what, want string, l *Layout, given ...images) {
		t.Helper()
		var o []Options
		for _, m := range given {
			o = append(o, m.options())
		}
		rep, err := CheckAll(t.Context(), o, l)
		if !errors.Is(err, sealfs.ErrInvalid) || !strings.Contains(err.Error(), want) || len(rep.Stores) != len(given) {
			t.Errorf("%s: %v", what, err)
		}
	}
	check("a copy", "device0 and device0 are both store", nil, all[0], all[2])
	foreign := b.layout()
	foreign.Cluster[3]++
	check("the map", "device0 belongs to cluster "+testCluster.String(), foreign, all...)
	h := &hurt{images: all[1].clone(), t: t}
	h.supers(func(sb *layout.Superblock) { sb.Cluster[5] = 7 })
	check("another cluster", "device0 belongs to cluster "+testCluster.String()+", device1 to cluster", nil, all[0], h.images)
}
