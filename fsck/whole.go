package fsck

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
)

// Layout says which shard lies on which store, as the cluster map does.
type Layout struct {
	Cluster sealfs.UUID
	Store   []sealfs.UUID // of each shard; zero: on none
}

func (l *Layout) check() error {
	if l == nil {
		return nil
	}
	if n := len(l.Store); n == 0 || n > sealfs.ShardsMax || n&(n-1) != 0 {
		return fmt.Errorf("a map of %d shards, which is not a power of two up to %d: %w", n, sealfs.ShardsMax, sealfs.ErrInvalid)
	}
	return nil
}

// Together is what the check of several stores of a cluster found.
type Together struct {
	Stores []*Report `json:"-"` // in the order in which they were given; none is nil
	Errors []error   `json:"-"` // why a store could not be checked to the end; nil: it was

	Cluster   sealfs.UUID   `json:"cluster"`
	Shards    uint32        `json:"shards"`
	Missing   []sealfs.UUID `json:"missing_stores,omitempty"` // that have shards and were not given, as far as a Layout tells
	Absent    int           `json:"absent_shards"`            // that are referred to and lie on none of the stores that could be read
	InDoubt   int           `json:"in_doubt"`                 // transactions that have begun and not ended
	NotJudged uint64        `json:"not_judged"`               // of all stores
}

// Check checks one store and blocks until that is done. The error is for a
// check that could not be made: ErrBusy for a live store, ErrNotExist, ErrVersion
// for a format this program does not know, ErrInterrupted when ctx ended. The
// report is not nil in any case; after an error it holds what was found until then.
//
// If the store refers to shards that it has not, it is one of several: what
// cannot be judged without the others is only counted.
func Check(ctx context.Context, o Options) (*Report, error) {
	t, err := CheckAll(ctx, []Options{o}, nil)
	return t.Stores[0], errors.Join(err, t.Errors[0])
}

// CheckAll checks stores of one cluster, each for itself and all together: an
// entry on one of them can stand for an inode on another. Without l, a shard belongs to
// the store that has records of it. The error is for stores that cannot be judged
// together, of different clusters for instance; nothing was checked then.
func CheckAll(ctx context.Context, stores []Options, l *Layout) (*Together, error) {
	w := &whole{layout: l, absent: map[sealfs.Shard]bool{}, maybe: map[sealfs.Ino]bool{}}
	t := &Together{}
	var all []*checker
	for _, o := range stores {
		c := newChecker(ctx, o)
		c.w, c.alone, c.cachePages = w, len(stores) == 1, max(c.cachePages/len(stores), cachePagesMin)
		c.err = c.open()
		all = append(all, c)
		t.Stores = append(t.Stores, c.rep)
	}
	err := l.check()
	if err == nil {
		err = w.belong(all)
	}
	if err == nil {
		w.check(all)
	}
	if err == nil {
		err = w.plan(all)
	}
	if err == nil {
		w.apply(all, 0)
	}
	for _, c := range all {
		t.Errors = append(t.Errors, errors.Join(c.err, c.close()))
	}
	w.summarize(t, all)
	return t, err
}

// check makes all passes over all stores.
func (w *whole) check(all []*checker) {
	each := func(fn func(c *checker) error) {
		for _, c := range all {
			if c.err == nil {
				c.err = fn(c)
			}
			if c.err != nil {
				w.missing = true
			}
		}
	}
	each(func(c *checker) error {
		return c.run(1, 4)
	})
	w.namespaces(all, (*checker).collect)
	each(func(c *checker) error { return c.run(6, 7) })
}

// namespaces is pass 5 of all stores; collect is its first half, or nothing for stores that
// have no namespace to be judged.
func (w *whole) namespaces(all []*checker, collect func(c *checker) error) {
	for _, c := range all {
		if c.err == nil && c.ground() {
			c.err = collect(c)
		}
		w.missing = w.missing || c.err != nil || !c.ground()
	}
	w.gather(all)
	for _, c := range all {
		if c.err == nil {
			c.err = c.run(5, 5)
		}
	}
	for _, n := range w.stores {
		w.missing = w.missing || n.c.holes || n.c.err != nil
	}
	for _, n := range w.stores {
		if n.c.err == nil && !n.c.holes {
			n.c.err = n.finish()
		}
	}
	w.loops()
	w.totals()
}

// ground reports whether there are records that can be judged.
func (c *checker) ground() bool { return !c.failed[3] && !c.failed[4] && c.segs != nil }

// whole is what the namespaces of several stores are together.
type whole struct {
	layout *Layout
	stores []*namespace // those that could be read
	shards uint32
	owner  []*namespace          // by shard; nil: it is on none of the stores
	absent map[sealfs.Shard]bool // shards that are referred to and have no owner
	// missing says that a store is not there, or parts of one.
	missing bool
	// maybe has the inodes that transactions of unknown fate make.
	maybe map[sealfs.Ino]bool
	// prepared says that stores have prepared parts of transactions.
	prepared bool
	effects  int // how much repairs have changed
	// recorded are names that inodes are known to have had. It outlives the rounds of a plan.
	recorded map[sealfs.Ino][]byte
	// missingNames are the entries that refer to inodes which are not there.
	mu           sync.Mutex
	missingNames map[sealfs.Ino][]lostName
	// revolumed are the inodes whose volume a repair of this round has changed.
	revolumed map[sealfs.Ino]bool
	// inDoubt are the transactions that have begun and not ended.
	inDoubt map[txKey]bool
}

// forget makes w what it was before anything was read.
func (w *whole) forget() {
	w.stores, w.owner, w.shards, w.prepared, w.missing = nil, nil, 0, false, false
	w.absent, w.maybe, w.inDoubt = map[sealfs.Shard]bool{}, map[sealfs.Ino]bool{}, nil
	w.missingNames, w.revolumed = nil, nil
}

// belong refuses stores that are not of one cluster.
func (w *whole) belong(all []*checker) error {
	var first *checker
	var of *layout.Superblock
	seen := map[sealfs.UUID]string{}
	for _, c := range all {
		sb := c.peek()
		if sb == nil {
			continue
		}
		if other, twice := seen[sb.Store]; twice {
			return fmt.Errorf("%s and %s are both store %v: one is a copy of the other, or it is named twice: %w", other, c.rep.Device, sb.Store, sealfs.ErrInvalid)
		}
		seen[sb.Store] = c.rep.Device
		if of == nil {
			first, of = c, sb
		}
		if sb.Cluster != of.Cluster {
			return fmt.Errorf("%s belongs to cluster %v, %s to cluster %v: check each cluster for itself: %w", first.rep.Device, of.Cluster, c.rep.Device, sb.Cluster, sealfs.ErrInvalid)
		}
		if w.layout != nil && sb.Cluster != w.layout.Cluster {
			return fmt.Errorf("%s belongs to cluster %v, the map is of cluster %v: %w", c.rep.Device, sb.Cluster, w.layout.Cluster, sealfs.ErrInvalid)
		}
	}
	return nil
}

// peek returns the superblock as far as it can be told without judging it, nil if it cannot.
func (c *checker) peek() (newest *layout.Superblock) {
	if c.err != nil {
		return nil
	}
	b := disk.AlignedBuffer(layout.BlockSize)
	for i := range int64(2) {
		n, _ := c.dev.ReadAt(b, i*layout.BlockSize)
		sb, err := layout.DecodeSuperblock(b[:n], c.dev.Name(), i*layout.BlockSize)
		if err == nil && (newest == nil || sb.Update > newest.Update) {
			newest = sb
		}
	}
	return newest
}

// gather finds out which shard lies where, and what the namespace will be once
// the transactions under way have ended.
func (w *whole) gather(all []*checker) {
	var votes [18]int
	for _, c := range all {
		if c.names == nil {
			continue
		}
		w.stores = append(w.stores, c.names)
		for bits, v := range c.names.votes {
			votes[bits] += v
		}
		if c.o.Shards != 0 {
			w.shards = c.o.Shards
		}
	}
	if w.layout != nil {
		w.shards = uint32(len(w.layout.Store))
	}
	if w.shards == 0 {
		w.shards = shardCount(&votes)
	}
	for _, n := range w.stores {
		n.index()
	}
	w.owner = make([]*namespace, w.shards)
	for s := range w.owner {
		w.place(sealfs.Shard(s))
	}
	w.settle()
	for _, n := range w.stores {
		for i := range n.more {
			if p := n.more[i].parent; p != 0 {
				w.home(p)
			}
		}
		for i := range n.parts {
			w.home(n.parts[i].ino)
		}
	}
}

// shardCount returns the number of shards that explains most inode numbers. Of
// equal ones the usual number is taken.
func shardCount(diffs *[18]int) uint32 {
	votes := *diffs
	for i := 1; i < len(votes); i++ {
		votes[i] += votes[i-1]
	}
	best := slices.Max(votes[:17])
	for bits, v := range votes[:17] {
		if v == best && 1<<bits == sealfs.ShardsDefault {
			return sealfs.ShardsDefault
		}
	}
	return 1 << slices.Index(votes[:17], best)
}

// place finds the owner of a shard, and reports other stores that have records of it.
func (w *whole) place(s sealfs.Shard) {
	var owner *namespace
	for _, n := range w.stores {
		if w.layout != nil {
			if n.c.sb.Store == w.layout.Store[s] {
				owner = n
			}
		} else if n.rows[s] > 0 && (owner == nil || n.rows[s] > owner.rows[s]) {
			owner = n
		}
	}
	w.owner[s] = owner
	if w.layout != nil && owner == nil && !w.layout.Store[s].IsZero() {
		w.missing = true
	}
	for _, n := range w.stores {
		where := fmt.Sprintf("shard %d", s)
		switch {
		case n.rows[s] == 0 || n == owner:
		case w.layout != nil:
			n.c.problem(ShardForeign, where, "%s, it belongs to store %v", count(n.rows[s], "record"), w.layout.Store[s])
		default:
			n.c.problem(ShardTwice, where, "%s here, %d on %s", count(n.rows[s], "record"), owner.rows[s], owner.c.rep.Device)
		}
	}
}

// home returns the store on which an inode must be, nil if it is not given.
func (w *whole) home(ino sealfs.Ino) *namespace { return w.at(ino.Home(w.shards)) }

// at returns the store that has a shard, nil if it is not given.
func (w *whole) at(s sealfs.Shard) *namespace {
	n := w.owner[s]
	if n == nil {
		w.absent[s] = true
	}
	return n
}

// lookup finds an inode on all stores, and the store on which it must be.
func (w *whole) lookup(ino sealfs.Ino) (home *namespace, i *inode) {
	if home = w.home(ino); home != nil {
		i = home.lookup(ino)
	}
	return home, i
}

// owns reports whether an inode belongs on this store.
func (n *namespace) owns(ino sealfs.Ino) bool { return n.w.owner[ino.Home(n.w.shards)] == n }

// firm reports whether everything is known of the records of an inode.
func (w *whole) firm(ino sealfs.Ino) bool {
	home := w.home(ino)
	return home != nil && home.c.err == nil && !home.c.holes
}

// complete reports whether all of the cluster's namespace is known, as far as can be told.
func (w *whole) complete() bool { return !w.missing && len(w.absent) == 0 }

// summarize fills in what t says of all stores.
func (w *whole) summarize(t *Together, all []*checker) {
	t.Shards, t.Absent, t.InDoubt = w.shards, len(w.absent), len(w.inDoubt)
	for _, r := range t.Stores {
		t.NotJudged += r.NotJudged
	}
	given := map[sealfs.UUID]bool{{}: true}
	for _, c := range all {
		if c.sb != nil {
			t.Cluster, given[c.sb.Store] = c.sb.Cluster, true
		}
	}
	if w.layout == nil {
		return
	}
	for _, id := range w.layout.Store {
		if !given[id] {
			given[id] = true
			t.Missing = append(t.Missing, id)
		}
	}
}
