package server

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/lsfs/layout"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

const (
	// splitEntries is how many entries a directory has at least when it is split.
	splitEntries = 1 << 16
	// splitTimeout bounds one request to a partition.
	splitTimeout = 10 * time.Second
	// freezeTimeout bounds for how long names of a directory do not change for the sake of its split.
	freezeTimeout = 2 * time.Second
	// splitTries is how often such a request is sent that got no answer, each time after a longer pause.
	splitTries = 6
	splitPause = 5 * time.Millisecond
	// splitRetry is when what could not be done for a directory is tried again.
	splitRetry = time.Second
)

// partitioner does at the home of directories what package meta cannot do with one store alone: it moves
// their entries into partitions, changes what partitions hand down, and takes empty
// ones back. The rows in the region are the truth (meta.WorkOn): todo is their shadow.
//
// All of it goes partition by partition, with the directory's lock here, so that only one thing
// at a time happens to it. A partition moves like this: its names are frozen at home (txn.Locks.Freeze), its
// entries copied and durable where they go, the home switches over in one record that is durable, and then
// the partition is opened. Until that record the copy counts for nothing, and from it on what is left at home.
type partitioner struct {
	st   *store
	busy atomic.Int64 // directories in todo
	mu   sync.Mutex
	todo map[sealfs.Ino]bool // true: nothing is known of what the last run of the server has left
	held map[sealfs.Ino]chan struct{}
	wake chan struct{}
	run  bool
	ctx  context.Context
	end  context.CancelFunc
	done sync.WaitGroup
}

func (q *partitioner) start(st *store) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.st, q.wake = st, make(chan struct{}, 1)
	q.ctx, q.end = context.WithCancel(context.Background())
	q.begin()
}

// begin starts the goroutine as soon as there is something to do for it. Needs mu.
func (q *partitioner) begin() {
	if q.st == nil || len(q.todo) == 0 || q.ctx.Err() != nil {
		return
	}
	if !q.run {
		q.run = true
		q.done.Go(q.loop)
	}
	poke(q.wake)
}

func (q *partitioner) stop() {
	q.mu.Lock()
	end := q.end
	q.mu.Unlock()
	if end != nil {
		end()
		q.done.Wait()
	}
}

// add has the goroutine look at a directory.
func (q *partitioner) add(dir sealfs.Ino, unknown bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.todo == nil {
		q.todo = map[sealfs.Ino]bool{}
	}
	q.todo[dir] = q.todo[dir] || unknown
	q.busy.Store(int64(len(q.todo)))
	q.begin()
}

// has reports whether something goes on with a directory: nobody may believe then what is said of it.
func (q *partitioner) has(dir sealfs.Ino) bool {
	if q.busy.Load() == 0 {
		return false
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	_, ok := q.todo[dir]
	return ok
}

// notice looks at a directory, given its attributes after a change.
func (st *store) notice(a *op.Attr) {
	limit := st.srv.o.SplitEntries
	if limit == 0 {
		limit = splitEntries
	}
	if a.Size < limit || a.Bound != 0 || a.Gen != 0 || st.srv.routes().alone || st.splits.has(a.Ino) {
		return
	}
	st.splits.add(a.Ino, false)
}

// lock waits until nothing else goes on with a directory.
func (q *partitioner) lock(ctx context.Context, dir sealfs.Ino) error {
	for {
		q.mu.Lock()
		held := q.held[dir]
		if held == nil {
			if q.held == nil {
				q.held = map[sealfs.Ino]chan struct{}{}
			}
			q.held[dir] = make(chan struct{})
			q.mu.Unlock()
			return nil
		}
		q.mu.Unlock()
		mine := q.st.turns().Mine()
		select {
		case <-held:
			mine.Take()
		case <-ctx.Done():
			return fmt.Errorf("directory %d: %w: %w", dir, context.Cause(ctx), sealfs.ErrInterrupted)
		case <-q.st.srv.quit:
			return fmt.Errorf("server: %w", sealfs.ErrClosed)
		}
	}
}

func (q *partitioner) unlock(dir sealfs.Ino) {
	q.mu.Lock()
	defer q.mu.Unlock()
	close(q.held[dir])
	delete(q.held, dir)
}

func (q *partitioner) loop() {
	lane := q.st.turns().Lane(turnSplits)
	retry := time.NewTicker(splitRetry)
	defer retry.Stop()
	for {
		lane.Take()
		q.mu.Lock()
		var list []sealfs.Ino
		for dir := range q.todo {
			list = append(list, dir)
		}
		q.mu.Unlock()
		slices.Sort(list)
		for _, dir := range list {
			if err := q.work(dir); err != nil && q.ctx.Err() == nil {
				q.st.srv.log.Warn("the partitions of a directory are not as they shall be, it is tried again", "dir", uint64(dir), "err", err)
			}
		}
		select {
		case <-q.ctx.Done():
			return
		case <-q.wake:
		case <-retry.C:
		}
	}
}

// work does all that is to be done for a directory.
func (q *partitioner) work(dir sealfs.Ino) error {
	for {
		if err := q.lock(q.ctx, dir); err != nil {
			return err
		}
		done, err := q.step(dir)
		if done && err == nil {
			q.mu.Lock()
			delete(q.todo, dir)
			q.busy.Store(int64(len(q.todo)))
			q.mu.Unlock()
		}
		q.unlock(dir)
		if done || err != nil {
			return err
		}
	}
}

// step does the next thing, and reports whether nothing is left. The directory is locked.
func (q *partitioner) step(dir sealfs.Ino) (done bool, err error) {
	st := q.st
	var in meta.Inode
	if err := st.inode(dir, &in); err != nil {
		if errors.Is(err, sealfs.ErrNotExist) {
			err = nil
		}
		return true, err
	}
	q.mu.Lock()
	unknown := q.todo[dir]
	q.mu.Unlock()
	switch {
	case in.Nlink == 0 || in.IsPartition() || in.Bound == 0 && !in.Working():
		if in.Nlink == 0 || in.IsPartition() || in.Size == 0 || unknown {
			return true, nil
		}
		if err := st.Require(layout.FeatureSplit); err != nil {
			return false, err
		}
		_, err := st.splitStep(q.ctx, &op.Request{Ino: dir, Mode: op.SplitBegin}, true)
		return false, err
	case in.Bound == 0:
		return true, q.dropAll(q.ctx, &in)
	case unknown:
		// What was under way is not known: whatever was sealed is opened.
		if err := q.recover(q.ctx, &in); err != nil {
			return false, err
		}
		q.mu.Lock()
		q.todo[dir] = false
		q.mu.Unlock()
		return false, nil
	case in.Moved() < op.Partitions:
		return false, q.move(q.ctx, &in)
	}
	return true, q.over(q.ctx, dir)
}

// splitStep executes a Split, durably if it is said so.
func (st *store) splitStep(ctx context.Context, req *op.Request, durable bool) (eof bool, err error) {
	req.Type, req.Shard = op.Split, req.Ino.Home(st.srv.cfg.Shards)
	if err := st.awaitSessions(ctx, req); err != nil {
		return false, err
	}
	var rep op.Reply
	end, err := st.execute(ctx, req, &rep, nil)
	if err == nil && rep.Code != 0 {
		err = rep.Code
	}
	if err == nil && durable {
		err = st.SyncTo(end)
	}
	return rep.Eof, err
}

// over notes that all is done for a directory.
func (q *partitioner) over(ctx context.Context, dir sealfs.Ino) error {
	if err := q.clean(ctx, dir); err != nil {
		return err
	}
	_, err := q.st.splitStep(ctx, &op.Request{Ino: dir, Mode: op.SplitDone}, false)
	return err
}

// clean frees the entries that have moved.
func (q *partitioner) clean(ctx context.Context, dir sealfs.Ino) error {
	for {
		eof, err := q.st.splitStep(ctx, &op.Request{Ino: dir, Mode: op.SplitClean}, false)
		if eof || err != nil {
			return err
		}
	}
}

// partitionStep answers Partition: what it does is durable before it is said.
func (st *store) partitionStep(ctx context.Context, req *op.Request, rep *op.Reply) error {
	if req.Mode == op.PartitionBegin {
		if err := st.Require(layout.FeatureSplit); err != nil {
			return err
		}
	}
	end, err := st.execute(ctx, req, rep, nil)
	if err != nil || rep.Code != 0 {
		return err
	}
	return st.SyncTo(end)
}

// tell sends a Partition to the store of the partition. Each may come twice.
func (q *partitioner) tell(ctx context.Context, req *op.Request) (op.Reply, error) {
	bound, stop := context.WithTimeout(ctx, splitTimeout)
	defer stop()
	req.Type = op.Partition
	if req.Ino != 0 {
		req.Shard = req.Ino.Home(q.st.srv.cfg.Shards)
	}
	pause := splitPause
	for try := 1; ; try++ {
		var rep op.Reply
		once := *req
		err := q.st.srv.peers().Do(bound, &once, &rep)
		if err == nil && rep.Code != 0 {
			err = rep.Code
		}
		if err == nil || try == splitTries || !errors.Is(err, sealfs.ErrUnavailable) {
			return rep, err
		}
		mine := q.st.turns().Mine()
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-bound.Done():
			timer.Stop()
			return rep, err
		}
		mine.Take()
		pause *= 2
	}
}

// tellAll sends one Partition to each of list, all at once.
func (q *partitioner) tellAll(ctx context.Context, list []sealfs.Ino, req op.Request) ([]op.Reply, []error) {
	replies, errs := make([]op.Reply, len(list)), make([]error, len(list))
	q.st.each(len(list), func(i int) {
		if list[i] == 0 {
			return
		}
		r := req
		r.Ino, r.Off = list[i], uint64(i)
		replies[i], errs[i] = q.tell(ctx, &r)
	})
	return replies, errs
}

// move moves the next partition.
func (q *partitioner) move(ctx context.Context, in *meta.Inode) error {
	st, dir, number := q.st, in.Ino, in.Moved()
	gen := uint64(st.now())
	part, err := q.beginPartition(ctx, in, gen)
	if err != nil {
		return err
	}
	count, err := q.moveEntries(ctx, in, part, gen)
	if err != nil {
		return err
	}
	if _, err := q.tell(ctx, &op.Request{Ino: part, Mode: op.PartitionOpen, Gen: gen, Len: count}); err != nil {
		q.add(dir, true) // it is opened by recover
		return fmt.Errorf("partition %d: %w", number, err)
	}
	return q.clean(ctx, dir)
}

// beginPartition makes the next partition, or empties what an earlier attempt has made of it.
func (q *partitioner) beginPartition(ctx context.Context, in *meta.Inode, gen uint64) (sealfs.Ino, error) {
	var begin op.Request
	err := q.st.View(func(r pmem.Reader) error { return meta.Inherited(r, q.st.srv.cfg, in, &begin) })
	if err != nil {
		return 0, err
	}
	begin.Mode, begin.Dir, begin.Off, begin.Gen = op.PartitionBegin, in.Ino, in.Moved(), gen
	begin.Shard = q.st.partitionShard(in.Ino, in.Moved())
	for {
		req := begin
		rep, err := q.tell(ctx, &req)
		if err != nil || rep.Eof {
			return rep.Attr.Ino, err
		}
	}
}

// moveEntries copies the entries of the next partition, and lets the copy count. Nobody changes them meanwhile.
func (q *partitioner) moveEntries(ctx context.Context, in *meta.Inode, part sealfs.Ino, gen uint64) (count uint64, err error) {
	st, dir, number := q.st, in.Ino, in.Moved()
	ctx, stop := context.WithTimeout(ctx, freezeTimeout)
	defer stop()
	mine := func(name string) bool {
		return op.PartitionOf(max(op.NameHash(dir, in.Volume, name), 1)<<op.OrdinalBits) == number
	}
	// Nobody dies for it: it waits for nobody who could wait for it.
	tx := op.Tx{Age: math.MaxInt64, Nonce: st.srv.random()}
	defer st.parties.locks.Thaw(dir)
	for frozen := false; ; {
		err := st.View(func(pmem.Reader) error {
			if !frozen {
				st.parties.locks.Freeze(tx, dir, mine)
				frozen = true
			}
			return st.parties.locks.Within(dir, mine)
		})
		if err == nil {
			break
		}
		if err := st.await(ctx, err, op.Tx{}); err != nil {
			return 0, err
		}
	}
	count, subdirs, err := q.copyEntries(ctx, dir, part, number, gen)
	if err != nil {
		return 0, err
	}
	moved := op.Request{Ino: dir, Mode: op.SplitMoved, Off: number, Dir2: part, Len: count, Size: subdirs}
	if _, err := st.splitStep(q.ctx, &moved, true); err != nil {
		q.add(dir, true)
		return 0, err
	}
	return count, nil
}

// copyEntries sends the entries of a partition to where it will be.
func (q *partitioner) copyEntries(ctx context.Context, dir, part sealfs.Ino, number, gen uint64) (count, subdirs uint64, err error) {
	cfg := q.st.config()
	var next uint64
	for {
		var data []byte
		n := uint64(0)
		err := q.st.View(func(r pmem.Reader) error {
			return meta.MovedEntries(r, cfg, dir, number, next, func(e *meta.Entry) bool {
				data = op.AppendEntry(data, &op.MovedEntry{Cookie: e.Cookie, Ino: e.Ino, Type: e.Type, Name: string(e.Name)})
				if e.Type == modeDirectory>>12 {
					subdirs++
				}
				next = e.Cookie + 1
				n++
				return len(data) < op.MovedBytes
			})
		})
		if err != nil || n == 0 {
			return count, subdirs, err
		}
		if _, err := q.tell(ctx, &op.Request{Ino: part, Mode: op.PartitionAdd, Gen: gen, Len: count, Data: data}); err != nil {
			return count, subdirs, err
		}
		count += n
	}
}

// partitionShard returns the shard of a partition: the stores take turns, and always in the same way,
// so that a partition that was begun is found again.
func (st *store) partitionShard(dir sealfs.Ino, number uint64) sealfs.Shard {
	shards := st.srv.cfg.Shards
	var stores []int
	for s := range shards {
		if at := st.srv.primary(sealfs.Shard(s)); !slices.Contains(stores, at) {
			stores = append(stores, at)
		}
	}
	slices.Sort(stores)
	hash := func(i uint64) uint64 {
		h := uint64(dir)*0x9e3779b97f4a7c15 + i
		h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
		h = (h ^ h>>27) * 0x94d049bb133111eb
		return h ^ h>>31
	}
	want := stores[(hash(0)+number)%uint64(len(stores))]
	first := hash(1 + number)
	for i := range uint64(shards) {
		if s := sealfs.Shard((first + i) & uint64(shards-1)); st.srv.primary(s) == want {
			return s
		}
	}
	return dir.Home(shards)
}

// list returns the partitions of a directory.
func (q *partitioner) list(in *meta.Inode) (list []sealfs.Ino, err error) {
	err = q.st.View(func(r pmem.Reader) error {
		list, err = meta.PartitionsOf(r, q.st.srv.cfg, in)
		return err
	})
	return list, err
}

// recover opens all partitions, whatever was going on.
func (q *partitioner) recover(ctx context.Context, in *meta.Inode) error {
	list, err := q.list(in)
	if err != nil {
		return err
	}
	_, errs := q.tellAll(ctx, list, op.Request{Mode: op.PartitionOpen})
	for i, err := range errs {
		if err == sealfs.ErrStale {
			errs[i] = nil
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	// A number of its own makes those void that are still on their way.
	gen := uint64(q.st.now())
	if _, errs = q.tellAll(ctx, list, op.Request{Mode: op.PartitionSeal, Gen: gen}); errors.Join(errs...) != nil {
		return errors.Join(errs...)
	}
	return q.reopen(ctx, in.Ino, list, gen)
}

// reopen opens partitions that were sealed with a number, with what the directory hands down now.
func (q *partitioner) reopen(ctx context.Context, dir sealfs.Ino, list []sealfs.Ino, gen uint64) error {
	var req op.Request
	var in meta.Inode
	err := q.st.View(func(r pmem.Reader) error {
		if err := meta.GetInode(r, q.st.srv.cfg, dir, &in); err != nil {
			return err
		}
		return meta.Inherited(r, q.st.srv.cfg, &in, &req)
	})
	if err != nil {
		return err
	}
	req.Mode, req.Gen = op.PartitionReopen, gen
	_, errs := q.tellAll(ctx, list, req)
	return errors.Join(errs...)
}

// seal seals all partitions of a directory. If that fails somewhere, what is not known is left to recover.
// refused is why one cannot be sealed, where all the others are open again.
func (q *partitioner) seal(ctx context.Context, in *meta.Inode, list []sealfs.Ino, gen uint64, flags op.Flags) (replies []op.Reply, refused, err error) {
	if _, err := q.st.splitStep(ctx, &op.Request{Ino: in.Ino, Mode: op.SplitSealed}, true); err != nil {
		return nil, nil, err
	}
	replies, errs := q.tellAll(ctx, list, op.Request{Mode: op.PartitionSeal, Gen: gen, Flags: flags})
	var sealed []sealfs.Ino
	for i, e := range errs {
		switch e {
		case nil:
			sealed = append(sealed, list[i])
		case sealfs.ErrNotEmpty:
			refused = e
		default:
			err = fmt.Errorf("partition %d: %w: %w", i, sealfs.ErrUnavailable, e)
		}
	}
	if err == nil && refused != nil {
		if err = q.reopen(ctx, in.Ino, sealed, gen); err == nil {
			err = q.settled(ctx, in)
		}
	}
	if err != nil {
		q.add(in.Ino, true)
	}
	return replies, refused, err
}

// settled notes that a directory is as before a seal.
func (q *partitioner) settled(ctx context.Context, in *meta.Inode) error {
	if in.Moved() < op.Partitions {
		return nil // the split goes on
	}
	return q.over(ctx, in.Ino)
}

// changeOf is changeWithin.
func (st *store) changeOf(ctx context.Context, req *op.Request, rep *op.Reply) error {
	return st.changeWithin(ctx, req, rep)
}

// recasting does what may change what a directory hands down to new inodes: all its partitions learn of it
// at once, while nothing is made in them.
func (st *store) recasting(ctx context.Context, req *op.Request, rep *op.Reply, do func(*store, context.Context, *op.Request, *op.Reply) error) error {
	req.Flags &^= op.Walked
	if err := st.splits.reopened(ctx, req.Ino); err != nil {
		return err
	}
	if err := do(st, ctx, req, rep); err != nil || rep.Code != sealfs.ErrStale {
		return err
	}
	q := &st.splits
	if err := q.lock(ctx, req.Ino); err != nil {
		return err
	}
	defer q.unlock(req.Ino)
	rep.Reset()
	var in meta.Inode
	if err := st.inode(req.Ino, &in); err != nil {
		return err
	}
	if in.Moved() == 0 {
		return do(st, ctx, req, rep)
	}
	list, err := q.list(&in)
	if err != nil {
		return err
	}
	gen := uint64(st.now())
	replies, _, err := q.seal(ctx, &in, list, gen, 0)
	if err != nil {
		return err
	}
	fold := op.Request{Ino: in.Ino, Mode: op.SplitFold}
	for i := range replies {
		fold.Mtime, fold.Ctime = max(fold.Mtime, replies[i].Attr.Mtime), max(fold.Ctime, replies[i].Attr.Ctime)
	}
	_, err = st.splitStep(ctx, &fold, false)
	if err == nil {
		req.Flags |= op.Walked
		err = do(st, ctx, req, rep)
		req.Flags &^= op.Walked
	}
	// It has happened, or not: what the directory says now counts.
	again := q.reopen(q.ctx, in.Ino, list, gen)
	if again == nil {
		again = q.settled(q.ctx, &in)
	}
	if again != nil {
		q.add(in.Ino, true)
		err = errors.Join(err, fmt.Errorf("%w: %w", sealfs.ErrUnavailable, again)) // it is answered when they are open
	}
	return err
}

// reopened makes sure that all partitions of a directory have learned of what was done before: a server that
// has died since may not have told all.
func (q *partitioner) reopened(ctx context.Context, dir sealfs.Ino) error {
	if !q.unknown(dir) {
		return nil
	}
	if err := q.lock(ctx, dir); err != nil {
		return err
	}
	defer q.unlock(dir)
	var in meta.Inode
	if err := q.st.inode(dir, &in); err != nil || in.Bound == 0 || !q.unknown(dir) {
		return nil // whatever it is, the request is told
	}
	if err := q.recover(ctx, &in); err != nil {
		return fmt.Errorf("%w: %w", sealfs.ErrUnavailable, err)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, ok := q.todo[dir]; ok {
		q.todo[dir] = false
	}
	return nil
}

// unknown reports whether it is not known what was left for a directory.
func (q *partitioner) unknown(dir sealfs.Ino) bool {
	if q.busy.Load() == 0 {
		return false
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.todo[dir]
}

// join answers Join: a directory without entries gets its partitions back, and is like any other.
func (st *store) join(ctx context.Context, req *op.Request) error {
	q := &st.splits
	if err := q.lock(ctx, req.Ino); err != nil {
		return err
	}
	defer q.unlock(req.Ino)
	var in meta.Inode
	if err := st.inode(req.Ino, &in); err != nil {
		return err
	}
	switch {
	case in.Mode&modeType != modeDirectory || in.IsPartition():
		return sealfs.ErrNotDir
	case in.Bound == 0 && !in.Working():
		return nil
	case in.Size != 0:
		return sealfs.ErrNotEmpty
	}
	if in.Bound != 0 {
		list, err := q.list(&in)
		if err != nil {
			return err
		}
		gen := uint64(st.now())
		replies, refused, err := q.seal(ctx, &in, list, gen, op.Excl)
		if err != nil {
			return err
		}
		if refused != nil {
			return refused
		}
		joined := op.Request{Ino: in.Ino, Mode: op.SplitJoined}
		for i := range replies {
			a := &replies[i].Attr
			joined.Mtime, joined.Ctime, joined.Len = max(joined.Mtime, a.Mtime), max(joined.Ctime, a.Ctime), joined.Len+a.Version
		}
		if _, err := st.splitStep(ctx, &joined, true); err != nil {
			q.add(in.Ino, true)
			return err
		}
		in.Bound = 0
	}
	if err := q.dropAll(ctx, &in); err != nil {
		q.add(in.Ino, true)
		return fmt.Errorf("%w: %w", sealfs.ErrUnavailable, err)
	}
	return nil
}

// dropAll frees the partitions that a directory has had.
func (q *partitioner) dropAll(ctx context.Context, in *meta.Inode) error {
	list, err := q.list(in)
	if err != nil {
		return err
	}
	gen := uint64(q.st.now())
	_, errs := q.tellAll(ctx, list, op.Request{Mode: op.PartitionSeal, Gen: gen, Flags: op.Excl})
	for i, err := range errs {
		if list[i] == 0 {
			continue
		}
		if err == nil {
			drop := op.Request{Mode: op.PartitionDrop, Dir: in.Ino, Off: uint64(i), Gen: gen, Shard: list[i].Home(q.st.srv.cfg.Shards)}
			_, err = q.tell(ctx, &drop)
		}
		if err != nil && err != sealfs.ErrNotExist {
			return err
		}
	}
	_, err = q.st.splitStep(ctx, &op.Request{Ino: in.Ino, Mode: op.SplitDone}, false)
	return err
}

// loadSplits queues what the last run has left to do for directories.
func (st *store) loadSplits(r pmem.Reader, s sealfs.Shard) error {
	return meta.WorkOn(r, st.srv.cfg, s, func(dir sealfs.Ino) { st.splits.add(dir, true) })
}
