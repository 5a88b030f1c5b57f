package server

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"sealfs"
	"sealfs/internal/oracle"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// finder is a client that finds the entries of directories which are split, and puts together
// what their parts tell.
type finder struct {
	retrier
	parts map[sealfs.Ino][]sealfs.Ino
}

// at returns what holds a name of dir, as far as that is known.
func (c *finder) at(dir sealfs.Ino, name string) sealfs.Ino {
	cookie := max(op.NameHash(dir, 1, name), 1) << op.OrdinalBits
	if p := op.PartitionOf(cookie); p < uint64(len(c.parts[dir])) {
		return c.parts[dir][p]
	}
	return dir
}

// learn asks for the partitions of a directory, and reports whether there is news.
func (c *finder) learn(ctx context.Context, dir sealfs.Ino) (bool, error) {
	req := op.Request{Type: op.Getattr, Ino: dir, Flags: op.Plus, Shard: dir.Home(testShards)}
	var rep op.Reply
	if err := c.retrier.Do(ctx, &req, &rep); err != nil {
		return false, err
	}
	list, err := op.DecodePartitions(rep.Data)
	news := !slices.Equal(list, c.parts[dir])
	c.parts[dir] = list
	return news, err
}

func (c *finder) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	for {
		r := *req
		switch req.Type {
		case op.Create, op.Mknod, op.Mkdir, op.Symlink, op.Link, op.Unlink, op.Rmdir, op.Lookup, op.Rename:
			r.Dir = c.at(req.Dir, req.Name)
			r.Shard = r.Dir.Home(testShards)
			if req.Type == op.Rename {
				r.Dir2 = c.at(req.Dir2, req.Name2)
			}
		case op.Readdir:
			return c.readdir(ctx, req, rep)
		}
		err := c.retrier.Do(ctx, &r, rep)
		req.Time = r.Time
		if err != nil {
			return err
		}
		elsewhere := r.Dir != req.Dir || r.Dir2 != req.Dir2
		switch {
		case rep.Code == sealfs.ErrStale, rep.Code == sealfs.ErrNotExist && elsewhere:
			news, err := c.learn(ctx, req.Dir)
			if err == nil && req.Type == op.Rename {
				var more bool
				more, err = c.learn(ctx, req.Dir2)
				news = news || more
			}
			if err != nil {
				return err
			}
			if news || rep.Code == sealfs.ErrStale {
				continue
			}
		case rep.Code == sealfs.ErrNotEmpty:
			again, err := c.join(ctx, req)
			if err != nil {
				return err
			}
			if again {
				continue
			}
		}
		return c.merge(ctx, &rep.Attr, rep.Code)
	}
}

// join takes the partitions of the directory back that is in the way of a request, if it has any.
func (c *finder) join(ctx context.Context, req *op.Request) (again bool, err error) {
	look := op.Request{Type: op.Lookup, Dir: req.Dir, Name: req.Name}
	if req.Type == op.Rename {
		look.Dir, look.Name = req.Dir2, req.Name2
	}
	look.Dir = c.at(look.Dir, look.Name)
	look.Shard = look.Dir.Home(testShards)
	var rep op.Reply
	if err := c.retrier.Do(ctx, &look, &rep); err != nil || rep.Code != 0 || rep.Attr.Gen+rep.Attr.Bound == 0 {
		return false, err
	}
	join := op.Request{Type: op.Join, Ino: rep.Attr.Ino, Shard: rep.Attr.Ino.Home(testShards)}
	err = c.retrier.Do(ctx, &join, &rep)
	return rep.Code == 0, err
}

// merge makes attributes of the home of a directory those of the whole.
func (c *finder) merge(ctx context.Context, a *op.Attr, code sealfs.Code) error {
	if a.Mode&modeType != modeDirectory || code != 0 {
		return nil
	}
	for a.IsSplit() {
		if _, err := c.learn(ctx, a.Ino); err != nil {
			return err
		}
		whole, gone := *a, false
		for _, p := range c.parts[a.Ino] {
			req := op.Request{Type: op.Getattr, Ino: p, Shard: p.Home(testShards)}
			var rep op.Reply
			if err := c.retrier.Do(ctx, &req, &rep); err != nil {
				return err
			}
			if gone = rep.Code != 0; gone {
				break
			}
			whole.Merge(&rep.Attr)
		}
		// While entries move, some may be counted twice, or not at all.
		req := op.Request{Type: op.Getattr, Ino: a.Ino, Shard: a.Ino.Home(testShards)}
		var rep op.Reply
		if err := c.retrier.Do(ctx, &req, &rep); err != nil || rep.Code != 0 {
			return err
		}
		if same := rep.Attr == *a; same && !gone {
			*a = whole
			break
		}
		*a = rep.Attr
	}
	a.Gen, a.Bound = 0, 0
	return nil
}

func (c *finder) readdir(ctx context.Context, req *op.Request, rep *op.Reply) error {
	all := op.Reply{}
	for cookie := uint64(0); ; {
		r := *req
		p := op.PartitionOf(cookie + 1)
		known := p < uint64(len(c.parts[req.Dir]))
		r.Off = cookie
		if known {
			r.Dir = c.parts[req.Dir][p]
		}
		r.Shard = r.Dir.Home(testShards)
		var one op.Reply
		if err := c.retrier.Do(ctx, &r, &one); err != nil {
			return err
		}
		if one.Code == sealfs.ErrStale || one.Code == sealfs.ErrNotExist && known {
			if _, err := c.learn(ctx, req.Dir); err != nil {
				return err
			}
			continue
		}
		if *rep = one; one.Code != 0 {
			return nil
		}
		all.Entries = append(all.Entries, one.Entries...)
		switch {
		case !one.Eof:
			cookie = one.Entries[len(one.Entries)-1].Cookie
		case known && p+1 < op.Partitions:
			cookie = op.PartitionStart(p+1) - 1
		default:
			if !slices.IsSortedFunc(all.Entries, func(a, b op.Dirent) int { return cmp.Compare(a.Cookie, b.Cookie) }) {
				return fmt.Errorf("cookies are not in order")
			}
			rep.Entries = all.Entries
			whole := op.Request{Type: op.Getattr, Ino: req.Dir, Shard: req.Dir.Home(testShards)}
			var attr op.Reply
			if err := c.retrier.Do(ctx, &whole, &attr); err != nil {
				return err
			}
			rep.Attr = attr.Attr
			return c.merge(ctx, &rep.Attr, attr.Code)
		}
	}
}

// TestModelSplit: random operations on directories that are split as soon as they have a few entries
// give what the oracle gives, while messages are lost and come twice, and servers are killed.
func TestModelSplit(t *testing.T) {
	steps := 6000
	if testing.Short() {
		steps = 1500
	}
	for _, loss := range []int{0, 100} {
		t.Run(fmt.Sprint(loss), func(t *testing.T) {
			w := newWorldWith(t, 1, 4, 2, 2, 1)
			tw := &twin{
				t: t, apart: true, root: w.root, o: oracle.New(testShards), rng: rand.New(rand.NewPCG(23, 1)),
				ours: map[sealfs.Ino]sealfs.Ino{w.root: w.root}, theirs: map[sealfs.Ino]sealfs.Ino{w.root: w.root},
			}
			client := &finder{retrier: retrier{w: w}, parts: map[sealfs.Ino][]sealfs.Ino{}}
			tw.s = client
			tw.begin()
			for i := range 12 {
				tw.names = append(tw.names, fmt.Sprintf("name%d", i))
			}
			split := 0
			for tw.n < steps {
				w.lose(loss * (tw.n / 100 % 2))
				tw.step()
				if tw.n%500 == 0 {
					w.kill(tw.rng.IntN(3))
				}
				if tw.n%2000 == 0 {
					w.lose(0)
					w.settle()
					w.check()
				}
				split = max(split, len(slices.Collect(maps.Keys(client.parts))))
			}
			if split < 4 {
				t.Errorf("%d directories were split", split)
			}
		})
	}
}

// TestSplitCrash kills the home's server, or another one, when a message of a certain kind is lost, and those
// after it: in a migration, while partitions are sealed, and while they are given back.
func TestSplitCrash(t *testing.T) {
	for mode, name := range map[uint32]string{
		op.PartitionBegin: "begin", op.PartitionAdd: "add", op.PartitionOpen: "open",
		op.PartitionSeal: "seal", op.PartitionReopen: "reopen", op.PartitionDrop: "drop",
	} {
		for victim := range 2 {
			for _, nth := range []int{1, 40} {
				if mode == op.PartitionAdd {
					nth = min(nth, 5) // only partitions that have entries early
				}
				t.Run(fmt.Sprintf("%s/%d/%d", name, victim, nth), func(t *testing.T) { splitCrash(t, mode, victim, nth) })
			}
		}
	}
}

func splitCrash(t *testing.T, mode uint32, victim, nth int) {
	const limit, files = 20, 70
	w := newWorldWith(t, 5, limit, 2, 2)
	c := &finder{retrier: retrier{w: w}, parts: map[sealfs.Ino][]sealfs.Ino{}}
	do := func(req op.Request) *op.Reply {
		address(&req)
		rep := &op.Reply{}
		if err := c.Do(context.Background(), &req, rep); err != nil || rep.Code != 0 {
			t.Fatalf("%v %q: %v, %v", req.Type, req.Name, err, rep.Code)
		}
		return rep
	}
	dir := do(op.Request{Type: op.Mkdir, Dir: w.root, Name: "d", Mode: 0o755}).Attr.Ino
	if w.of[int(dir.Home(testShards))%len(w.of)] == 1 {
		victim = 1 - victim
	}
	var count atomic.Int64
	reached := make(chan struct{})
	await := func() {
		w.silence(func(req *op.Request) bool {
			if req.Type != op.Partition || req.Mode != mode && count.Load() < int64(nth) {
				return false
			}
			if req.Mode == mode && count.Add(1) == int64(nth) {
				close(reached)
			}
			return count.Load() >= int64(nth)
		})
	}
	var work sync.WaitGroup
	crash := func() {
		<-reached
		w.kill(victim)
		w.silence(nil)
	}
	early := mode == op.PartitionBegin || mode == op.PartitionAdd || mode == op.PartitionOpen
	if early {
		await()
		work.Go(crash)
	}
	want := map[string]sealfs.Ino{}
	for i := range files {
		name := fmt.Sprint("n", i)
		if i%10 == 0 {
			want[name] = do(op.Request{Type: op.Mkdir, Dir: dir, Name: name, Mode: 0o755, Shard2: sealfs.Shard(i % testShards)}).Attr.Ino
		} else {
			want[name] = do(op.Request{Type: op.Create, Dir: dir, Name: name, Mode: 0o644, Flags: op.Excl}).Attr.Ino
		}
	}
	if !early {
		w.settle()
	}
	switch mode {
	case op.PartitionSeal, op.PartitionReopen:
		await()
		done := make(chan struct{})
		go func() {
			defer close(done)
			do(op.Request{Type: op.Setattr, Ino: dir, Valid: op.SetMode | op.SetMtime | op.SetGID, Mode: 0o2755, GID: 77, Mtime: 12345})
		}()
		crash()
		<-done
		if a := do(op.Request{Type: op.Getattr, Ino: dir}).Attr; a.Mtime != 12345 || a.GID != 77 {
			t.Errorf("mtime %d, group %d", a.Mtime, a.GID)
		}
		for i := range 20 {
			name := fmt.Sprint("late", i)
			a := do(op.Request{Type: op.Create, Dir: dir, Name: name, Mode: 0o644}).Attr
			if want[name] = a.Ino; a.GID != 77 {
				t.Errorf("%s has the group %d", name, a.GID)
			}
		}
	case op.PartitionDrop:
		for name := range want {
			kind := op.Unlink
			if strings.HasSuffix(name, "0") {
				kind = op.Rmdir
			}
			do(op.Request{Type: kind, Dir: dir, Name: name})
		}
		clear(want)
		await()
		done := make(chan struct{})
		go func() {
			defer close(done)
			do(op.Request{Type: op.Rmdir, Dir: w.root, Name: "d"})
		}()
		crash()
		<-done
		w.settle()
		return
	}
	work.Wait()
	w.settle()
	got := map[string]sealfs.Ino{}
	rep := do(op.Request{Type: op.Readdir, Dir: dir, Len: 1 << 20})
	for _, e := range rep.Entries {
		got[e.Name] = e.Ino
	}
	if !maps.Equal(got, want) || len(rep.Entries) != len(want) {
		t.Errorf("%d entries, %d names of %d", len(rep.Entries), len(got), len(want))
	}
	for name, ino := range want {
		if a := do(op.Request{Type: op.Lookup, Dir: dir, Name: name}).Attr; a.Ino != ino {
			t.Errorf("%s is inode %d, not %d", name, a.Ino, ino)
		}
	}
	if a := do(op.Request{Type: op.Getattr, Ino: dir}).Attr; a.Nlink != 2+files/10 || a.Size != uint64(len(want)) {
		t.Errorf("%d links, size %d", a.Nlink, a.Size)
	}
	if len(c.parts[dir]) != op.Partitions {
		t.Errorf("%d partitions", len(c.parts[dir]))
	}
}

// walked adds up what is below a directory, as its totals do, and holds those of each against that.
func walked(t *testing.T, w *world, do func(op.Request) *op.Reply, dir sealfs.Ino) (sum meta.Totals) {
	t.Helper()
	for _, e := range do(op.Request{Type: op.Readdir, Dir: dir, Len: 1 << 20}).Entries {
		if e.Type == modeDirectory>>12 {
			sum.Add(walked(t, w, do, e.Ino), 1)
			sum.Dirs++
			continue
		}
		sum.Files++
		sum.Bytes += int64(do(op.Request{Type: op.Getattr, Ino: e.Ino}).Attr.Size)
	}
	var got meta.Totals
	for name, to := range map[string]*int64{op.AttrBytes: &got.Bytes, op.AttrFiles: &got.Files, op.AttrDirs: &got.Dirs} {
		*to = int64(total(t, w, testShards, dir, name))
	}
	if got != sum {
		t.Errorf("directory %d has the totals %d, a walk finds %d", dir, got, sum)
	}
	return sum
}

// TestSplitTotals: totals of a directory are right before it is split, meanwhile, when its partitions are in use and
// when it has none any more, whatever is done with its names, with servers killed and messages lost. And partitions cost no
// quota.
func TestSplitTotals(t *testing.T) {
	const limit, files = 20, 160
	w := newWorldWith(t, 8, limit, 2, 2)
	c := &finder{retrier: retrier{w: w}, parts: map[sealfs.Ino][]sealfs.Ino{}}
	do := func(req op.Request) *op.Reply {
		t.Helper()
		address(&req)
		rep := &op.Reply{}
		if err := c.Do(context.Background(), &req, rep); err != nil || rep.Code != 0 {
			t.Fatalf("%v %q: %v, %v", req.Type, req.Name, err, rep.Code)
		}
		return rep
	}
	name := func(i int) string { return fmt.Sprint("name", i) }
	size := func(ino sealfs.Ino, n int) {
		do(op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetSize, Size: uint64(n)})
	}
	d := do(op.Request{Type: op.Mkdir, Dir: w.root, Name: "d", Mode: 0o755, Shard2: 1}).Attr.Ino
	other := do(op.Request{Type: op.Mkdir, Dir: w.root, Name: "other", Mode: 0o755, Shard2: 2}).Attr.Ino
	inodes := uint64(3)
	w.limit(1<<30, inodes+files)
	var all []sealfs.Ino
	for i := range files {
		switch w.lose(40 * (i / 10 % 2)); {
		case i%40 == 39:
			w.kill(i / 40 % 2)
		case i == files/2:
			w.settle()
		}
		if i%10 == 9 {
			sub := do(op.Request{Type: op.Mkdir, Dir: d, Name: name(i), Mode: 0o755, Shard2: sealfs.Shard(i % testShards)}).Attr.Ino
			all = append(all, sub)
			do(op.Request{Type: op.Link, Dir: sub, Name: "link", Ino: all[i-1]})
			continue
		}
		ino := do(op.Request{Type: op.Create, Dir: d, Name: name(i), Mode: 0o644}).Attr.Ino
		all = append(all, ino)
		size(ino, 1000+i)
		switch i % 10 {
		case 1: // two names in the directory, and one elsewhere
			do(op.Request{Type: op.Link, Dir: d, Name: "also" + name(i), Ino: ino})
			do(op.Request{Type: op.Link, Dir: other, Name: name(i), Ino: ino})
		case 2:
			do(op.Request{Type: op.Rename, Dir: d, Name: name(i), Dir2: other, Name2: name(i)})
		}
	}
	w.lose(0)
	w.settle()
	w.check()
	if _, n := w.settled(); uint64(n) != inodes+files {
		t.Errorf("%d inodes count, %d are there", n, inodes+files)
	}
	if c.learn(context.Background(), d); len(c.parts[d]) != op.Partitions {
		t.Fatalf("%d partitions", len(c.parts[d]))
	}
	if sum := walked(t, w, do, w.root); sum.Files < files || sum.Bytes < files*1000 || sum.Dirs != files/10+2 {
		t.Errorf("%d is below the root", sum)
	}
	// Names that have moved, and those that were made in partitions, are treated alike.
	for i := range files {
		switch i % 10 {
		case 0:
			size(all[i], 10+i)
		case 1:
			size(all[i], 20+i)
			do(op.Request{Type: op.Unlink, Dir: d, Name: name(i)})
		case 2:
			do(op.Request{Type: op.Rename, Dir: other, Name: name(i), Dir2: d, Name2: name(i)})
			size(all[i], 30+i)
		case 3:
			do(op.Request{Type: op.Rename, Dir: d, Name: name(i), Dir2: d, Name2: "new" + name(i)})
			size(all[i], 40+i)
		case 4:
			do(op.Request{Type: op.Rename, Dir: d, Name: name(i), Dir2: d, Name2: name(i + 1)})
		case 6:
			do(op.Request{Type: op.Rename, Dir: d, Name: name(i), Dir2: other, Name2: name(i)})
			size(all[i], 50+i)
		case 7:
			do(op.Request{Type: op.Rename, Dir: d, Name: name(i), Dir2: d, Name2: name(i + 2), Flags: op.Exchange})
		case 8:
			do(op.Request{Type: op.Rename, Dir: d, Name: name(i - 1), Dir2: other, Name2: name(i)}) // a directory
		}
		if i%40 == 39 {
			w.kill(1 - i/40%2)
		}
	}
	w.settle()
	w.check()
	walked(t, w, do, w.root)
	for _, e := range do(op.Request{Type: op.Readdir, Dir: d, Len: 1 << 20}).Entries {
		do(op.Request{Type: op.Unlink, Dir: d, Name: e.Name})
	}
	w.settle()
	w.check()
	if sum := walked(t, w, do, d); sum != (meta.Totals{}) {
		t.Errorf("%d is in an empty directory", sum)
	}
	do(op.Request{Type: op.Rmdir, Dir: w.root, Name: "d"})
	w.settle()
	w.check()
	walked(t, w, do, w.root)
}

// TestSplitVolumeGoes: with a volume all partitions go, also where a shard has nothing else of it.
func TestSplitVolumeGoes(t *testing.T) {
	w := newWorldWith(t, 9, 20, 2, 2)
	for i := range 20 {
		w.must(op.Request{Type: op.Create, Dir: w.root, Name: fmt.Sprint("name", i), Mode: 0o644})
	}
	poll(t, "the root is not split", func() bool {
		return w.must(op.Request{Type: op.Getattr, Ino: w.root}).Attr.Moved() == op.Partitions
	})
	w.settle()
	w.check()
	if err := DropVolume(context.Background(), w, testShards, 1, nil); err != nil {
		t.Fatal(err)
	}
	for i := range w.srv {
		for _, st := range w.srv[i].Load().stores {
			err := st.View(func(r pmem.Reader) error {
				var cur pmem.Cursor
				for ok := cur.Seek(r, nil); ok; ok = cur.Next() {
					if k, err := meta.DecodeKey(cur.Key()); err != nil || k.Kind == meta.KindInode || k.Kind == meta.KindPartition || k.Kind == meta.KindEntry {
						t.Errorf("a record of kind %#x of inode %d is left: %v", k.Kind, k.Ino, err)
					}
				}
				return cur.Err()
			})
			if err != nil {
				t.Error(err)
			}
		}
	}
}

// TestLeaseTruthSplit is TestLeaseTruth with directories that are split meanwhile: nobody believes what is not
// true any more of names that have moved, and of partitions.
func TestLeaseTruthSplit(t *testing.T) {
	w := newWorldWith(t, 6, 3, 2, 1, 1)
	steps := 1500
	if testing.Short() {
		steps = 250
	}
	var mounts []*believer
	for id := range sealfs.Session(3) {
		mounts = append(mounts, believe(t, w, 10+id, 0, 1, 2, 3))
	}
	c := &finder{retrier: retrier{w: w}, parts: map[sealfs.Ino][]sealfs.Ino{}}
	ctx, inParts, asked := context.Background(), 0, 0
	truthAt(t, w, w.root, mounts, steps, 3, func(req *op.Request) {
		if asked++; asked%50 == 0 {
			w.settle() // on a slow machine, else, nothing would be split before the end
		}
		for _, dir := range [...]sealfs.Ino{req.Dir, req.Dir2} {
			look := op.Request{Type: op.Getattr, Ino: dir, Flags: op.Plus, Shard: dir.Home(testShards)}
			var rep op.Reply
			if dir == 0 || w.Do(ctx, &look, &rep) != nil || rep.Code != 0 {
				continue
			}
			c.parts[dir], _ = op.DecodePartitions(rep.Data)
		}
		dir := req.Dir
		if req.Type == op.Readdir {
			if p := req.Len % op.Partitions; uint64(len(c.parts[dir])) > p {
				req.Dir = c.parts[dir][p]
			}
			return
		}
		if req.Dir != 0 {
			req.Dir = c.at(dir, req.Name)
		}
		if req.Dir2 != 0 {
			req.Dir2 = c.at(req.Dir2, req.Name2)
		}
		if req.Dir != dir {
			inParts++
		}
	})
	w.settle() // a split that begins later would wait for mounts which are gone
	for _, b := range mounts {
		b.stop()
	}
	if inParts < steps/10 {
		t.Errorf("%d requests went to partitions", inParts)
	}
}
