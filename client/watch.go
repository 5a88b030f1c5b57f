package client

import (
	"context"
	"errors"
	"sync"
	"time"

	"sealfs"
	"sealfs/op"
)

const (
	// watchTime is for how long a server may wait for something to revoke. Each answer
	// is a sign of life, too.
	watchTime = 10 * time.Second
	// aliveStep is how exactly it is known when a store was last heard of: all its shards are told.
	aliveStep = time.Second
	// recallPatience is for how long an acknowledgement waits for delayed writes to be
	// sent. They go to the server that asks for them, unless the file has chunks elsewhere:
	// a store that is away must not hold up all that another one revokes.
	recallPatience = 5 * time.Second
	// leftMax and leftAge bound the inodes that were left and whose server was not told.
	leftMax = 2048
	leftAge = time.Second
)

// watching is the part of a client that hears revocations, of each store by a request
// that waits there: op.Watch. What an answer lists is carried out before the next
// Watch, which acknowledges it.
//
// A connection to a server that may have started anew begins with Register, which ends
// all belief in that store, and has the Watch begin from the start; so has the end
// of the session. An answer that belongs to a Watch from before counts for nothing.
type watching struct {
	begin sync.Once

	mu    sync.Mutex
	all   []*watcher
	known bool     // all has every store
	group []uint32 // by shard, one more than the first shard of its store; 0 where nobody has said which that is
}

// watcher is the loop for one store. The lock of watching guards all but the first two.
type watcher struct {
	c     *Client
	shard sealfs.Shard // any of the store

	ses    *identity
	round  uint64     // counts what makes answers void
	seq    uint64     // of Watches in the session: a late one does nothing
	alive  *time.Time // when the last one was sent that was answered
	off    uint64     // the last revocation that was carried out
	ready  bool       // in this round, a Watch was answered
	left   []sealfs.Ino
	timer  bool // somebody will send what is left
	cancel context.CancelFunc
}

// startWatching begins to watch all stores. It is done with the first request, since an owner needs
// the client before it can be called by the handler.
func (c *Client) startWatching() {
	c.watch.begin.Do(func() { go c.findStores() })
}

// findStores starts a watcher for each store.
func (c *Client) findStores() {
	for pause := pauseMin; ; pause = min(2*pause, pauseMax) {
		var shards []sealfs.Shard
		note := func(s sealfs.Shard) error { shards = append(shards, s); return nil }
		err := error(nil)
		if c.o.Each != nil {
			err = c.o.Each(c.life, note)
		} else {
			note(c.o.Root.Home(c.o.Shards))
		}
		if err == nil && len(shards) > 0 {
			w := &c.watch
			w.mu.Lock()
			for _, s := range shards {
				w.all = append(w.all, &watcher{c: c, shard: s})
			}
			w.known = true
			all := w.all
			w.mu.Unlock()
			for _, one := range all {
				go one.run()
			}
			return
		}
		if !c.rest(pause) {
			return
		}
	}
}

// rest waits, and reports whether the client is still there.
func (c *Client) rest(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-c.life.Done():
		return false
	}
}

// restart voids what the watchers that match were about to hear, for a reason that made
// belief end. The lock is held.
func (w *watcher) restart() {
	w.round++
	w.off, w.ready, w.left = 0, false, nil
	if w.cancel != nil {
		w.cancel()
	}
}

// run watches until the client is closed.
func (w *watcher) run() {
	c := w.c
	pause := pauseMin
	for c.life.Err() == nil {
		s := c.ses.Load()
		if s.ended.Load() {
			select {
			case <-s.next:
			case <-c.life.Done():
			}
			continue
		}
		err := w.poll(s)
		switch {
		case err == nil:
			pause = pauseMin
			continue
		case errors.Is(err, sealfs.ErrSession):
			c.fence(s, err)
			continue
		case errors.Is(err, sealfs.ErrInterrupted) && c.life.Err() == nil:
			continue // by restart, or to tell what is left
		case errors.Is(err, sealfs.ErrInvalid):
			// It is another incarnation than the one that we know.
			c.disbelieve(c.sameStore(w.shard))
		}
		if !c.rest(pause) {
			return
		}
		pause = min(2*pause, pauseMax)
	}
}

// poll sends one Watch and carries out what it is answered.
func (w *watcher) poll(s *identity) error {
	c := w.c
	ctx, cancel := context.WithCancel(c.life)
	defer cancel()
	k := c.begin(op.Watch, 0)
	defer k.end()
	c.watch.mu.Lock()
	if w.ses != s {
		w.ses, w.seq = s, 0
		w.restart()
	}
	w.cancel = cancel
	round, left := w.round, w.left
	w.seq++
	k.Off, k.Seq = w.off, w.seq
	if w.left = nil; w.ready && len(left) == 0 {
		k.Len = uint64(watchTime / time.Millisecond)
	}
	c.watch.mu.Unlock()
	for _, ino := range left {
		k.Data = op.AppendOpens(k.Data, op.Opens{Ino: ino, Count: 1})
	}
	k.Shard = w.shard
	c.address(k)
	k.ses, k.Session = s, s.id
	sent := time.Now()
	c.count(k)
	err := once(ctx, c.h, k)
	if err != nil {
		c.watch.mu.Lock()
		if w.round == round {
			w.left = append(w.left, left...)
		}
		c.watch.mu.Unlock()
		return err
	}
	c.watch.mu.Lock()
	stale := w.round != round
	if !stale && (w.alive == nil || sent.Sub(*w.alive) > aliveStep) {
		w.alive = &sent
		c.watch.lives(c, c.watch.groupOf(w.shard))
	}
	c.watch.mu.Unlock()
	if stale {
		return nil
	}
	if len(k.rep.Revokes) > 0 {
		c.carryOut(k.rep.Revokes)
	}
	c.leases.told(left)
	c.watch.mu.Lock()
	defer c.watch.mu.Unlock()
	if w.round != round {
		return nil
	}
	if n := len(k.rep.Revokes); n > 0 {
		w.off = k.rep.Revokes[n-1].Num
	}
	if !w.ready {
		w.ready = true
		c.watch.settled(c, c.watch.groupOf(w.shard))
	}
	return nil
}

func (w *watching) groupOf(s sealfs.Shard) uint32 {
	if w.group == nil {
		return 0
	}
	return w.group[s]
}

// lives notes for the shards of a group since when all its stores were heard of. The lock is held.
func (w *watching) lives(c *Client, group uint32) {
	var first *time.Time
	for _, one := range w.all {
		switch {
		case w.groupOf(one.shard) != group:
		case one.alive == nil:
			return
		case first == nil || one.alive.Before(*first):
			first = one.alive
		}
	}
	for s := range c.leases.alive {
		if w.groupOf(sealfs.Shard(s)) == group {
			c.leases.alive[s].Store(first)
		}
	}
}

// settled lets answers be believed of a group of shards once all its stores are watched. The lock is held.
func (w *watching) settled(c *Client, group uint32) {
	for _, one := range w.all {
		if w.groupOf(one.shard) == group && !one.ready {
			return
		}
	}
	c.leases.allow(func(s sealfs.Shard) bool { return w.groupOf(s) == group })
}

// sameStore returns which shards may lie in the store of a shard.
func (c *Client) sameStore(shard sealfs.Shard) func(sealfs.Shard) bool {
	c.watch.mu.Lock()
	defer c.watch.mu.Unlock()
	group, groups := c.watch.groupOf(shard), c.watch.group
	return func(s sealfs.Shard) bool { return groups == nil || groups[s] == group }
}

// registering is for Register: belief in a store ends, whose shards are those that
// mine accepts, first the first of them.
func (c *Client) registering(mine func(sealfs.Shard) bool, first sealfs.Shard) {
	if !c.leasing {
		return
	}
	w := &c.watch
	w.mu.Lock()
	groups := make([]uint32, c.o.Shards)
	copy(groups, w.group)
	for s := range groups {
		if mine(sealfs.Shard(s)) {
			groups[s] = uint32(first) + 1
		}
	}
	w.group = groups // never changed in place: see sameStore
	w.mu.Unlock()
	c.disbelieve(mine)
}

// disbelieve ends all belief in shards, here and in the kernel, until their stores have
// answered a Watch anew.
func (c *Client) disbelieve(mine func(sealfs.Shard) bool) {
	if !c.leasing {
		return
	}
	w := &c.watch
	w.mu.Lock()
	for _, one := range w.all {
		if mine(one.shard) {
			one.restart()
		}
	}
	gone := c.leases.drop(mine) // before a Watch of the new round is answered
	w.mu.Unlock()
	for i := range gone {
		gone[i] = c.splits.whose(gone[i]) // the kernel knows no partitions
	}
	if k := c.kernel.Load(); k != nil && len(gone) > 0 {
		k.everything(gone)
	}
}

// left has the server told that nothing is believed of ino any more.
func (c *Client) left(ino sealfs.Ino) {
	if n := c.nodes.get(ino); n != nil && n.dirty.Load() {
		return // of a process that was killed: the server shall ask for it before others look
	}
	w := &c.watch
	w.mu.Lock()
	defer w.mu.Unlock()
	var to *watcher
	for _, one := range w.all {
		if w.groupOf(one.shard) == w.groupOf(ino.Home(c.o.Shards)) {
			if to != nil {
				to = nil // which of them is not known: the server will revoke it some day
				break
			}
			to = one
		}
	}
	if !c.leases.leave(ino, to != nil && to.ready) {
		return
	}
	to.left = append(to.left, ino)
	switch {
	case len(to.left) == leftMax && to.cancel != nil:
		to.cancel()
	case !to.timer:
		to.timer = true
		time.AfterFunc(leftAge, func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			to.timer = false
			if len(to.left) > 0 && to.cancel != nil {
				to.cancel()
			}
		})
	}
}

// asks reports whether a revocation asks for delayed writes.
func asks(k op.RevokeKind) bool { return k == op.RecallWrite || k == op.RevokeInode }

// carryOut does what revocations say; when it returns they may be acknowledged. It waits
// for nobody but the store of delayed writes. In particular it takes no gate of a node but under a
// write lease: there, whoever has the gate writes what the server takes at once, while
// another writer may wait at the server for acknowledgements of others, and they
// for ours.
func (c *Client) carryOut(list []op.Revoke) {
	ctx, cancel := context.WithTimeout(c.life, recallPatience)
	defer cancel()
	var sending sync.WaitGroup
	var names []op.Revoke
	all := false
	kernel := c.kernel.Load()
	for i := range list {
		v := &list[i]
		was := c.leases.revoke(v)
		if v.Kind != op.RecallWrite {
			c.dirs.forget(0, v.Ino)
		}
		known := c.splits.whose(v.Ino) // to the kernel
		if v.Kind == op.RevokeName {
			names = append(names, op.Revoke{Ino: known, Name: v.Name})
		}
		n := c.nodes.get(v.Ino)
		if n != nil && (was.write || asks(v.Kind) && n.dirty.Load()) { // or delayed before the store was lost
			sending.Go(func() {
				if err := c.sendNode(ctx, n); err != nil && c.life.Err() == nil {
					c.log.Warn("delayed writes could not be sent when another client asked for them", "ino", uint64(n.ino), "err", err)
				}
			})
		}
		if v.Kind == op.RevokeInode {
			c.changes(n) // by another client
		}
		if kernel != nil && v.Kind != op.RecallWrite {
			kernel.inode(known, v.Kind == op.RevokeInode)
			if v.Kind == op.RevokeInode {
				var more bool
				names, more = kernel.take(known, names)
				all = all || more
			}
		}
	}
	if kernel != nil && (all || len(names) > 0) {
		kernel.forgetNames(names, all)
	}
	sending.Wait()
}
