package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
)

// gone is a context that has ended.
var gone = func() context.Context {
	ctx, end := context.WithCancel(context.Background())
	end()
	return ctx
}()

// reclaimRetry is when a failed step is tried again.
const reclaimRetry = time.Second

// reclaimer frees in bounded steps what nobody can reach: files that lost their
// last name, tails of truncated ones. The orphan table in the region is the
// truth; the queue is its shadow in memory, filled again at every start.
type reclaimer struct {
	st   *store
	mu   sync.Mutex
	cond sync.Cond
	todo map[sealfs.Ino]struct{}
	line []sealfs.Ino            // todo in the order in which they came
	kept map[sealfs.Ino]struct{} // nameless, but held open
	late time.Time               // when the last one was kept
	busy bool
	quit bool
	done sync.WaitGroup

	purges map[sealfs.Ino]*purge
	purger // of all of them
}

func (q *reclaimer) add(ino sealfs.Ino) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.todo == nil {
		q.todo = map[sealfs.Ino]struct{}{}
		q.kept = map[sealfs.Ino]struct{}{}
	}
	q.put(ino)
	if q.st != nil {
		q.cond.Broadcast()
	}
}

// put is add with the lock held, without waking anybody.
func (q *reclaimer) put(ino sealfs.Ino) {
	if _, in := q.todo[ino]; !in {
		q.todo[ino] = struct{}{}
		q.line = append(q.line, ino)
	}
}

// addAgain is add for timers.
func (q *reclaimer) addAgain(ino sealfs.Ino) {
	q.st.turns().Lane(turnRetry).Take()
	q.add(ino)
}

// nameless reports whether ino waits for its last release.
func (q *reclaimer) nameless(ino sealfs.Ino) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	_, ok := q.kept[ino]
	return ok
}

// keptFiles returns the nameless files that somebody holds open.
func (q *reclaimer) keptFiles() []sealfs.Ino {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Collect(maps.Keys(q.kept))
}

func (q *reclaimer) start(st *store) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.st = st
	q.cond.L = &q.mu
	if q.todo == nil {
		q.todo = map[sealfs.Ino]struct{}{}
		q.kept = map[sealfs.Ino]struct{}{}
	}
	q.purger.init()
	q.done.Add(1)
	go q.run()
}

func (q *reclaimer) stop() {
	q.mu.Lock()
	if q.st == nil {
		q.mu.Unlock()
		return
	}
	q.quit = true
	q.cancel()
	q.cond.Broadcast()
	q.mu.Unlock()
	q.done.Wait()
}

// settle waits until the queue is empty and no purge is under way but for those
// that wait for a server that is away: for tests.
func (q *reclaimer) settle() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for (len(q.todo) > 0 || q.busy || q.running > 0) && !q.quit {
		q.cond.Wait()
	}
}

// soon reports whether something is being freed, or will be when a file is closed that has
// just lost its name.
func (q *reclaimer) soon() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.todo) > 0 || q.busy || q.running > 0 || len(q.kept) > 0 && time.Since(q.late) < freeingMax
}

func (q *reclaimer) run() {
	defer q.done.Done()
	turns := q.st.turns()
	turns.Lane(turnReclaimer).Take()
	for {
		q.mu.Lock()
		for len(q.todo) == 0 && !q.quit {
			turns.Wait(&q.cond)
		}
		if q.quit {
			q.mu.Unlock()
			return
		}
		ino := q.line[0]
		q.line = q.line[1:]
		delete(q.todo, ino)
		q.busy = true
		q.mu.Unlock()

		keep := q.free(ino)

		q.mu.Lock()
		q.busy = false
		if keep {
			q.kept[ino] = struct{}{}
			q.late = time.Now()
			// It may have been released before it stood here.
			if !q.st.holds.any(ino) {
				q.put(ino)
			}
		} else {
			delete(q.kept, ino)
		}
		q.cond.Broadcast()
		q.mu.Unlock()
	}
}

// free frees one inode's leftovers, step by step. It reports whether the inode
// must be kept because somebody holds it open without a name.
func (q *reclaimer) free(ino sealfs.Ino) (keep bool) {
	st := q.st
	for {
		q.mu.Lock()
		quit := q.quit
		q.mu.Unlock()
		if quit {
			return false
		}
		if st.holds.any(ino) && st.lostName(ino) && !st.hasTail(ino) {
			return true
		}
		// Nothing waits here: all others would wait, too.
		done, err := st.reclaimWithin(gone, ino)
		if err != nil {
			// The orphan table remembers it; so must the queue.
			if !errors.Is(err, sealfs.ErrUnavailable) {
				st.srv.log.Error("reclaim", "ino", uint64(ino), "err", err)
			}
			time.AfterFunc(reclaimRetry, func() { q.addAgain(ino) })
			return false
		}
		if done {
			// Somebody may have opened it since it was looked at.
			return st.holds.any(ino) && st.lostName(ino)
		}
		if q.purge(ino) {
			return false // it comes back when its chunks are gone
		}
	}
}

// hasTail reports whether something was cut off of ino and is not freed.
func (st *store) hasTail(ino sealfs.Ino) bool {
	var in meta.Inode
	if st.inode(ino, &in) != nil {
		return false
	}
	home, chunks := in.Tails()
	return home || chunks
}

func (st *store) lostName(ino sealfs.Ino) bool {
	var in meta.Inode
	return st.inode(ino, &in) == nil && in.Nlink == 0
}

// reclaimStep executes one Reclaim and reports whether nothing is left. A
// transaction that has the inode in hand for long is ErrUnavailable.
func (st *store) reclaimStep(ino sealfs.Ino) (done bool, err error) {
	ctx, stop := context.WithTimeout(context.Background(), reclaimRetry)
	defer stop()
	return st.reclaimWithin(ctx, ino)
}

// reclaimWithin is reclaimStep that waits no longer than ctx lives.
func (st *store) reclaimWithin(ctx context.Context, ino sealfs.Ino) (done bool, err error) {
	req := op.Request{Type: op.Reclaim, Ino: ino, Shard: ino.Home(st.srv.cfg.Shards)}
	var rep op.Reply
	end, err := st.execute(ctx, &req, &rep, nil)
	if errors.Is(err, sealfs.ErrInterrupted) {
		return false, fmt.Errorf("%v: %w", err, sealfs.ErrUnavailable)
	}
	if err == nil && rep.Code == 0 && st.srv.o.Durable {
		err = st.SyncTo(end)
	}
	if err != nil {
		return false, err
	}
	return rep.Code != 0 || rep.Held == 0 || rep.Eof, nil
}
