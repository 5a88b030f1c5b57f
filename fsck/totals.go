package fsck

import (
	"maps"
	"slices"
	"sync"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
)

// Totals of directories are judged by what the records of all stores add up to: see
// meta/totals.go for the rule. It holds between any two records of each store, also in the
// middle of transactions, so nothing is in doubt. Which directories files count in is
// judged by sums of hashes of their numbers, which take no memory for the files.

// sums is what the records say a directory should have.
type sums struct {
	totals meta.Totals
	names  uint64 // hashes of the files that have names in it, once for each name
	told   uint64 // and of those that count in it
}

func (s *sums) add(o *sums) {
	s.totals.Add(o.totals, 1)
	s.names += o.names
	s.told += o.told
}

// counted is what is kept of a directory.
type counted struct {
	ino, parent sealfs.Ino
	volume      sealfs.Volume
	counted     bool
	named       bool // it has a name, or is a root
	total, told meta.Totals
}

// mail names letters.
type mail struct {
	to   sealfs.Ino
	from sealfs.Shard
}

// What is noted of an inode and the queue.
const (
	queueFlag = 1 << iota // the inode says that it is queued
	queueRow              // there is a row
	queueDue              // something is to be told
)

// tally is what a store has about totals.
type tally struct {
	sums     map[sealfs.Ino]*sums
	dirs     []counted
	outboxes map[mail]meta.Outbox
	letters  map[mail]uint64 // the last ones that were taken
	queue    map[sealfs.Ino]uint8
	spread   map[sealfs.Ino]uint64     // sizes of the files with places
	strays   map[sealfs.Ino]bool       // what has places, and is no such file
	apart    map[sealfs.Ino]meta.Inode // directories that are split, and partitions: what says so

	last   *sums // of lastOf, which the record before was about
	lastOf sealfs.Ino
}

func newTally() tally {
	return tally{
		sums: map[sealfs.Ino]*sums{}, outboxes: map[mail]meta.Outbox{}, letters: map[mail]uint64{},
		queue: map[sealfs.Ino]uint8{}, spread: map[sealfs.Ino]uint64{}, strays: map[sealfs.Ino]bool{},
		apart: map[sealfs.Ino]meta.Inode{},
	}
}

func (t *tally) of(dir sealfs.Ino) *sums {
	if dir == t.lastOf {
		return t.last
	}
	s := t.sums[dir]
	if s == nil {
		s = new(sums)
		t.sums[dir] = s
	}
	t.last, t.lastOf = s, dir
	return s
}

// hashOf spreads numbers, so that sums of them tell sets apart.
func hashOf(ino sealfs.Ino) uint64 {
	h := uint64(ino) * 0x9e3779b97f4a7c15
	h ^= h >> 29
	h *= 0xbf58476d1ce4e5b9
	return h ^ h>>32
}

// sized reports whether the size of what has the type typ counts.
func sized(typ uint8) bool { return typ == typeFile || typ == typeLink }

// countsIn returns the directory in which the name at an entry's key counts, 0 if it does in none: it has moved, or is
// about to.
func (t *tally) countsIn(k *meta.Key) sealfs.Ino {
	in, ok := t.apart[k.Ino]
	switch {
	case !ok:
		return k.Ino
	case !in.InUse() || op.PartitionOf(k.Pos) < in.Moved():
		return 0
	}
	return self(&in)
}

// inode takes note of an inode.
func (t *tally) inode(in *meta.Inode) {
	if in.Queued() {
		t.queue[in.Ino] |= queueFlag
	}
	typ := uint8(in.Mode >> 12)
	if typ != typeDir {
		if in.Spread() {
			t.spread[in.Ino] = in.Size
		}
		if in.Parent != 0 && sized(typ) {
			s := t.of(in.Parent)
			s.totals.Add(meta.Totals{Bytes: int64(in.Size)}, int64(in.Nlink))
			s.told += uint64(in.Nlink) * hashOf(in.Ino)
		}
		return
	}
	if in.Bound != 0 {
		t.apart[in.Ino] = meta.Inode{Ino: in.Ino, Mode: in.Mode, Parent: in.Parent, Bound: in.Bound}
	}
	root := in.Parent == in.Ino
	t.dirs = append(t.dirs, counted{in.Ino, in.Parent, in.Volume, in.Counted, in.Nlink != 0, in.Total, in.Told})
	if !root && in.Nlink != 0 {
		t.of(in.Parent).totals.Add(in.Told, 1)
		if in.Counted && in.Total != in.Told {
			t.queue[in.Ino] |= queueDue
		}
	}
}

// row takes note of a record of another kind. The error means that it is damaged.
func (t *tally) row(k *meta.Key, val []byte) error {
	switch k.Kind {
	case meta.KindEntry:
		var e meta.Entry
		if meta.DecodeEntry(val, k.Ino, k.Pos, &e) != nil {
			return nil // it is judged elsewhere
		}
		dir := t.countsIn(k)
		if dir == 0 {
			return nil
		}
		s := t.of(dir)
		if e.Type == typeDir {
			s.totals.Dirs++
			return nil
		}
		s.totals.Files++
		if sized(e.Type) {
			s.names += hashOf(e.Ino)
		}
	case meta.KindPlace:
		p, err := meta.DecodePlace(val)
		if err != nil {
			return err
		}
		size, spread := t.spread[k.Ino]
		if !spread {
			t.strays[k.Ino] = true
			return nil
		}
		s := t.of(k.Dir)
		s.totals.Add(meta.Totals{Bytes: int64(p.Told)}, int64(p.Names))
		s.told += p.Names * hashOf(k.Ino)
		if p.Told != size {
			t.queue[k.Ino] |= queueDue
		}
	case meta.KindOutbox:
		o, err := meta.DecodeOutbox(val)
		if err != nil {
			return err
		}
		t.outboxes[mail{k.Ino, k.Shard}] = o
	case meta.KindInbox:
		n, err := meta.DecodeInbox(val)
		if err != nil {
			return err
		}
		t.letters[mail{k.Ino, k.From}] = n
	case meta.KindQueued:
		if err := meta.DecodeQueued(val); err != nil {
			return err
		}
		t.queue[k.Ino] |= queueRow
	}
	return nil
}

// join adds what another part of the store has.
func (t *tally) join(o *tally) {
	for dir, s := range o.sums {
		t.of(dir).add(s)
	}
	t.dirs = append(t.dirs, o.dirs...)
	maps.Copy(t.outboxes, o.outboxes)
	maps.Copy(t.letters, o.letters)
	maps.Copy(t.spread, o.spread)
	maps.Copy(t.strays, o.strays)
	maps.Copy(t.apart, o.apart)
	for ino, q := range o.queue {
		t.queue[ino] |= q
	}
}

// totals judges the totals of all directories.
func (w *whole) totals() {
	if len(w.stores) == 0 || !w.complete() {
		return // what is told may come from where we cannot look
	}
	for _, n := range w.stores {
		for id, found := range n.c.rep.Counts {
			if found > 0 && id >= KeyUnknown && id < ExtentNowhere {
				return // they follow from names and sizes, which are to be put right first
			}
		}
	}
	all := newTally()
	for _, n := range w.stores {
		all.join(&n.tally)
	}
	for m, o := range all.outboxes {
		s := all.of(m.to)
		s.totals.Add(o.Waiting, -1)
		if o.Number > all.letters[m] {
			s.totals.Add(o.Letter, -1)
		}
	}
	has := map[sealfs.Volume]bool{}
	for i := range all.dirs {
		if all.dirs[i].counted {
			has[all.dirs[i].volume] = true
		}
	}
	wrong := &misplaced{all: &all, dirs: map[sealfs.Ino]bool{}}
	for _, n := range w.stores {
		for i := range n.tally.dirs {
			if d := &n.tally.dirs[i]; n.owns(d.ino) {
				n.judgeTotals(d, all.of(d.ino), has, wrong)
			}
		}
		for _, ino := range slices.Sorted(maps.Keys(n.tally.strays)) {
			n.c.problem(TotalsPlace, name(ino), "it has places, and should have none")
			n.c.mendBy(TotalsPlace, name(ino), func(e *editor) string {
				k := meta.PlaceKey(w.shards, ino, 0)
				for _, r := range e.under(k[:11], 1<<20) {
					e.del(r.key)
				}
				return "they are removed"
			})
		}
		n.judgeQueue()
	}
}

func (n *namespace) judgeTotals(d *counted, s *sums, has map[sealfs.Volume]bool, wrong *misplaced) {
	c, ino := n.c, d.ino
	if !d.named {
		return
	}
	if !d.counted {
		if has[d.volume] {
			c.problem(TotalsWrong, name(ino), "it has none, though others of its volume have")
			n.mendInode(TotalsWrong, ino, func(in *meta.Inode) string {
				in.Counted = in.Mode>>12 == typeDir
				return "it gets some"
			})
		}
		return
	}
	if s.names != s.told && !n.w.prepared {
		c.problem(TotalsPlace, name(ino), "files with names there, and those that count there, are not the same")
		wrong.dirs[ino] = true
		c.mendBy(TotalsPlace, name(ino), func(e *editor) string { return wrong.mend(n.w) })
	}
	if d.total != s.totals {
		c.problem(TotalsWrong, name(ino), "bytes, files, directories: %d, there are %d", d.total, s.totals)
		off := s.totals
		off.Add(d.total, -1)
		c.mendBy(TotalsWrong, name(ino), func(e *editor) string {
			e.change(ino, func(in *meta.Inode) {
				in.Total.Add(off, 1)
				in.SetQueued(true)
			})
			k := meta.QueuedKey(n.w.shards, ino)
			e.put(k[:], meta.QueuedValue())
			return "they are counted anew"
		})
	}
}

// judgeQueue compares rows of the queue with what their inodes say.
func (n *namespace) judgeQueue() {
	for _, ino := range slices.Sorted(maps.Keys(n.tally.queue)) {
		q := n.tally.queue[ino]
		if flag, row := q&queueFlag != 0, q&queueRow != 0; flag == row && (flag || q&queueDue == 0) {
			continue
		}
		n.c.problem(TotalsQueue, name(ino), "the inode says %v, the row %v, something is to be told %v", q&queueFlag != 0, q&queueRow != 0, q&queueDue != 0)
		n.c.mendBy(TotalsQueue, name(ino), func(e *editor) string {
			k := meta.QueuedKey(n.w.shards, ino)
			var in meta.Inode
			if !e.inode(ino, &in) || !sized(uint8(in.Mode>>12)) && in.Mode>>12 != typeDir {
				e.del(k[:])
				return "the row is removed"
			}
			in.SetQueued(true)
			e.putInode(&in)
			e.put(k[:], meta.QueuedValue())
			return "both say that something is due; if nothing is, the server finds out"
		})
	}
}

// misplaced are directories in which other files count than have names there. They are
// mended all at once.
type misplaced struct {
	all  *tally
	dirs map[sealfs.Ino]bool
	once sync.Once
}

func (m *misplaced) mend(w *whole) string {
	m.once.Do(func() { m.place(w) })
	return "files count where their names are"
}

// place lets the files of the directories count where they have names.
func (m *misplaced) place(w *whole) {
	files := map[sealfs.Ino]map[sealfs.Ino]uint64{} // names by directory
	places := map[sealfs.Ino][][]byte{}             // keys
	each := func(fn func(k *meta.Key, key, val []byte)) {
		for _, s := range w.stores {
			s.c.rows(5, 0, 1<<16, func(_ ref, key, val []byte) error {
				if k, err := meta.DecodeKey(key); err == nil {
					fn(&k, key, val)
				}
				return nil
			})
		}
	}
	each(func(k *meta.Key, _, val []byte) {
		var e meta.Entry
		var in meta.Inode
		switch {
		case k.Kind == meta.KindEntry && m.dirs[m.all.countsIn(k)] && meta.DecodeEntry(val, k.Ino, k.Pos, &e) == nil && sized(e.Type):
			files[e.Ino] = map[sealfs.Ino]uint64{}
		case k.Kind == meta.KindPlace && m.dirs[k.Dir]:
			files[k.Ino] = map[sealfs.Ino]uint64{}
		case k.Kind == meta.KindInode && meta.DecodeInode(val, k.Ino, &in) == nil && sized(uint8(in.Mode>>12)) && m.dirs[in.Parent]:
			files[k.Ino] = map[sealfs.Ino]uint64{}
		}
	})
	each(func(k *meta.Key, key, val []byte) {
		var e meta.Entry
		switch {
		case k.Kind == meta.KindEntry && meta.DecodeEntry(val, k.Ino, k.Pos, &e) == nil && files[e.Ino] != nil:
			if dir := m.all.countsIn(k); dir != 0 {
				files[e.Ino][dir]++
			}
		case k.Kind == meta.KindPlace && files[k.Ino] != nil:
			places[k.Ino] = append(places[k.Ino], slices.Clone(key))
		}
	})
	for _, ino := range slices.Sorted(maps.Keys(files)) {
		e := w.editor(ino)
		var in meta.Inode
		if e == nil {
			continue
		}
		for _, key := range places[ino] {
			e.del(key)
		}
		if !e.inode(ino, &in) || !sized(uint8(in.Mode>>12)) {
			continue
		}
		in.Parent = 0
		in.SetSpread(true)
		for dir, n := range files[ino] {
			if len(files[ino]) == 1 && dir.Home(w.shards) == ino.Home(w.shards) {
				in.Parent = dir
				in.SetSpread(false)
				break
			}
			k := meta.PlaceKey(w.shards, ino, dir)
			p := meta.Place{Names: n, Told: in.Size}
			e.put(k[:], p.Append(nil))
		}
		e.putInode(&in)
	}
}
