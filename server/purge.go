package server

import (
	"context"
	"fmt"
	"sync"
	"time"

	"sealfs"
	"sealfs/internal/turn"
	"sealfs/meta"
	"sealfs/op"
)

// What a truncation cuts off of a file's chunks, and all chunks of a file that is
// deleted, is purged by the server of the file's home: it asks each shard that may hold
// some. The Cut in the inode remembers it until all have answered that it is gone,
// durably; so a purge can be begun again at any time.

const (
	purgesMax    = 4  // files whose chunks are purged at once
	purgeAtOnce  = 16 // shards that are asked at once for one file: they share flushes
	purgeBackMin = 50 * time.Millisecond
	purgeBackMax = 5 * time.Second
)

// purger is what purges share.
type purger struct {
	ctx     context.Context
	cancel  context.CancelFunc
	running int // purges that are not waiting to try again
	begun   int
	slots   chan struct{} // as many as may run
}

func (p *purger) init() {
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.slots = make(chan struct{}, purgesMax)
}

// purge is the purge of one file.
type purge struct {
	gen     uint64         // all that is older goes
	from    uint64         // from here on in the file
	left    []sealfs.Shard // that have not answered
	back    time.Duration  // how long to wait before they are asked again
	running bool
}

// purge begins or continues to purge the chunks of ino, if there is anything to
// purge and nothing else to free before. It reports whether it did; ino is added to the queue
// again when there is something new.
func (q *reclaimer) purge(ino sealfs.Ino) bool {
	st := q.st
	var in meta.Inode
	if err := st.inode(ino, &in); err != nil || in.Cut == 0 {
		return false
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.quit {
		return true
	}
	p := q.purges[ino]
	if p == nil || p.gen != in.Gen && !p.running {
		p = &purge{gen: in.Gen, from: max(in.Size, sealfs.HomeBytes)}
		p.left = shardsOf(ino, p.from, in.Cut, st.srv.cfg.Shards)
		if q.purges == nil {
			q.purges = map[sealfs.Ino]*purge{}
		}
		q.purges[ino] = p
	}
	if !p.running {
		p.running = true
		q.running++
		q.done.Add(1)
		lane := st.turns().Lane(turnPurges + q.begun%turnsPurge)
		q.begun++
		go q.runPurge(ino, p, lane)
	}
	home, _ := in.Tails()
	return !home && (in.Nlink != 0 || in.Bytes == 0 || st.holds.any(ino))
}

// shardsOf returns the shards that may hold chunks of ino with bytes of [from, to).
func shardsOf(ino sealfs.Ino, from, to uint64, shards uint32) []sealfs.Shard {
	var list []sealfs.Shard
	first, last := from/sealfs.ChunkBytes, (to-1)/sealfs.ChunkBytes
	if last-first >= 4*uint64(shards) {
		for s := range shards { // hardly any is left out
			list = append(list, sealfs.Shard(s))
		}
		return list
	}
	seen := make(map[sealfs.Shard]struct{})
	for c := first; c <= last; c++ {
		s := ino.DataShard(c*sealfs.ChunkBytes, shards)
		if _, ok := seen[s]; !ok {
			seen[s] = struct{}{}
			list = append(list, s)
		}
	}
	return list
}

// runPurge asks all shards that are left, once.
func (q *reclaimer) runPurge(ino sealfs.Ino, p *purge, lane turn.Lane) {
	defer q.done.Done()
	lane.Take()
	st := q.st
	var err error
	select {
	case q.slots <- struct{}{}:
		lane.Take()
		// What others are told must not be undone by a power cut here.
		if err = st.Sync(); err == nil {
			err = q.askAll(ino, p)
		}
		<-q.slots
	case <-q.ctx.Done():
		err = context.Cause(q.ctx)
	}
	if err == nil {
		err = st.purged(ino, p.gen)
	}
	if err == nil {
		st.chunks.cuts.wake(ino)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	p.running = false
	q.running--
	q.cond.Broadcast()
	switch {
	case q.quit:
	case err == nil:
		delete(q.purges, ino)
		q.put(ino)
	default:
		if p.back == 0 {
			st.srv.log.Warn("chunks are not purged yet", "ino", uint64(ino), "shards", len(p.left), "err", err)
		}
		p.back = min(max(2*p.back, purgeBackMin), purgeBackMax)
		time.AfterFunc(p.back, func() { q.addAgain(ino) })
	}
}

// askAll asks the shards that are left to purge what they hold. It returns one of the
// errors, and leaves those who made any.
func (q *reclaimer) askAll(ino sealfs.Ino, p *purge) error {
	var mu sync.Mutex
	var failed []sealfs.Shard
	var first error
	next := make(chan sealfs.Shard)
	var workers sync.WaitGroup
	mine := q.st.turns().Mine()
	for i := range min(purgeAtOnce, len(p.left)) {
		workers.Go(func() {
			mine.Child(i).Take()
			for s := range next {
				mine.Child(i).Take()
				if err := q.askOne(ino, p, s); err != nil {
					mu.Lock()
					failed = append(failed, s)
					if first == nil {
						first = err
					}
					mu.Unlock()
				}
			}
		})
	}
	for _, s := range p.left {
		next <- s
		mine.Take()
	}
	close(next)
	workers.Wait()
	mine.Take()
	p.left = failed
	return first
}

// askOne has one shard purge what it holds, step by step.
func (q *reclaimer) askOne(ino sealfs.Ino, p *purge, s sealfs.Shard) error {
	for {
		if err := q.ctx.Err(); err != nil {
			return err
		}
		req := op.Request{Type: op.Purge, Ino: ino, Shard: s, Off: p.from, Gen: p.gen}
		var rep op.Reply
		err := q.st.srv.ask(q.ctx, &req, &rep)
		if err == nil && rep.Code != 0 {
			err = fmt.Errorf("purge of inode %d in shard %d: %w", ino, s, rep.Code)
		}
		if err != nil || rep.Eof {
			return err
		}
	}
}

// purged notes that nothing older than gen is left of what was cut off of ino.
func (st *store) purged(ino sealfs.Ino, gen uint64) error {
	req := op.Request{Type: op.Reclaim, Flags: op.Purged, Ino: ino, Shard: ino.Home(st.srv.cfg.Shards), Gen: gen}
	var rep op.Reply
	if err := st.change(&req, &rep, nil); err != nil {
		return err
	}
	if rep.Code != 0 && rep.Code != sealfs.ErrNotExist {
		return fmt.Errorf("reclaim of inode %d: %w", ino, rep.Code)
	}
	return nil
}
