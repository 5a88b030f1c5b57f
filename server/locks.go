package server

import (
	"cmp"
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
	"sealfs/pmem"
)

// waiters are requests that wait for a lock. The locks themselves stand in the
// region; here is only who wants to be told when one goes.
type waiters struct {
	mu     sync.Mutex
	of     map[sealfs.Ino]map[chan struct{}]struct{}
	closed bool
	long   map[uint64]*op.Request // by number: those that have waited for so long that the graph of waits knows them
}

func (w *waiters) enter(ino sealfs.Ino) chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil
	}
	ch := make(chan struct{}, 1)
	if w.of == nil {
		w.of = map[sealfs.Ino]map[chan struct{}]struct{}{}
	}
	if w.of[ino] == nil {
		w.of[ino] = map[chan struct{}]struct{}{}
	}
	w.of[ino][ch] = struct{}{}
	return ch
}

func (w *waiters) leave(ino sealfs.Ino, ch chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if delete(w.of[ino], ch); len(w.of[ino]) == 0 {
		delete(w.of, ino)
	}
}

func (w *waiters) wake(ino sealfs.Ino) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for ch := range w.of[ino] {
		poke(ch)
	}
}

func (w *waiters) wakeAll() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, m := range w.of {
		for ch := range m {
			poke(ch)
		}
	}
}

func poke(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// close lets nobody wait any more.
func (w *waiters) close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.wakeAll()
}

// lockCount is how many locks a session has, or gets more.
type lockCount struct {
	session sealfs.Session
	n       int
}

// lockLimits bound the locks of one store. Zeros stand for the usual limits.
type lockLimits struct{ session, store int }

// lockCounts counts the locks of a store, so that a limit is checked without looking for them.
type lockCounts struct {
	mu  sync.Mutex
	all int
	of  map[sealfs.Session]int
}

// found counts a lock that is there.
func (k *lockCounts) found(sess sealfs.Session) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.put(lockCount{sess, 1}, 1)
}

// put counts c so many times. k is locked.
func (k *lockCounts) put(c lockCount, times int) {
	if k.of == nil {
		k.of = map[sealfs.Session]int{}
	}
	k.all += times * c.n
	if k.of[c.session] += times * c.n; k.of[c.session] == 0 {
		delete(k.of, c.session)
	}
}

// add counts what a change adds, unless there would be too many, and reports whether it did.
func (k *lockCounts) add(cs []lockCount, l *lockLimits) bool {
	if len(cs) == 0 {
		return true
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, c := range cs {
		if c.n > 0 && (k.of[c.session]+c.n > cmp.Or(l.session, sealfs.LocksPerSession) || k.all+c.n > cmp.Or(l.store, sealfs.LocksPerStore)) {
			return false
		}
	}
	for _, c := range cs {
		k.put(c, 1)
	}
	return true
}

func (k *lockCounts) undo(cs []lockCount) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, c := range cs {
		k.put(c, -1)
	}
}

// setLock answers SetLock. A flock that is converted is given up first, as
// flock(2) says: two holders that both want more would wait for ever otherwise.
func (st *store) setLock(req *op.Request, rep *op.Reply) error {
	rep.Reset()
	if err := st.change(req, rep, nil); err != nil || rep.Code != sealfs.ErrAgain || req.Flags&op.Flock == 0 {
		return err
	}
	drop := op.Request{
		Type: op.DropOwner, Flags: op.Flock, Shard: req.Shard, Epoch: req.Epoch, Volume: req.Volume, Session: req.Session,
		Ino: req.Ino, Lock: op.Lock{Owner: req.Lock.Owner},
	}
	var given op.Reply
	if err := st.change(&drop, &given, nil); err != nil {
		return err
	}
	rep.Reset()
	return st.change(req, rep, nil)
}

// waitLock answers WaitLock: SetLock as soon as nobody is in the way, or ErrDeadlock.
func (st *store) waitLock(ctx context.Context, req *op.Request, rep *op.Reply) error {
	ch := st.locks.enter(req.Ino)
	if ch == nil {
		return fmt.Errorf("server: %w", sealfs.ErrClosed)
	}
	defer st.locks.leave(req.Ino, ch)
	// Most waits are over before a deadlock is worth a thought.
	var late <-chan time.Time
	var long *longWait
	if req.Flags&(op.Flock|op.OFD) == 0 {
		timer := time.NewTimer(st.srv.pace.search)
		defer timer.Stop()
		late = timer.C
	}
	defer func() { long.end() }()
	// What is converted is given up once, by the first attempt. Doing so wakes
	// those who wait, this request too, so a later attempt must not do it again.
	attempt := st.setLock
	for {
		set := *req
		set.Type = op.SetLock
		rep.Reset()
		if err := attempt(&set, rep); err != nil || rep.Code != sealfs.ErrAgain {
			return err
		}
		attempt = func(set *op.Request, rep *op.Reply) error { return st.change(set, rep, nil) }
		long.look()
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for a lock on inode %d: %w: %w", req.Ino, context.Cause(ctx), sealfs.ErrInterrupted)
		case <-late:
			long = st.waitLong(ctx, req)
			late = nil
		case <-long.dead():
			rep.Reset()
			rep.Code = sealfs.ErrDeadlock
			return nil
		case <-ch:
		}
		if st.srv.closed.Load() {
			return fmt.Errorf("server: %w", sealfs.ErrClosed)
		}
	}
}

// EndSession drops what a client held: its open files and its locks.
func (s *Server) EndSession(sess sealfs.Session) error {
	return s.endSessions(func(at sealfs.Session) bool { return at == sess })
}

// endSessions drops what the sessions held that match.
func (s *Server) endSessions(match func(sealfs.Session) bool) error {
	var errs []error
	for _, st := range s.all() {
		errs = append(errs, st.endSessions(match))
	}
	return errors.Join(errs...)
}

func (st *store) endSessions(match func(sealfs.Session) bool) error {
	st.callsMu.Lock()
	for _, calls := range st.calls {
		calls.End(match)
	}
	st.callsMu.Unlock()
	st.leases.End(match)
	for _, ino := range st.holds.end(match) {
		if st.reclaim.nameless(ino) {
			st.reclaim.add(ino)
		}
	}
	return st.dropSessions(match)
}

// shardSession is a session that has locks or result rows in a shard.
type shardSession struct {
	shard   sealfs.Shard
	session sealfs.Session
}

// dropSessions frees the locks and result rows of the sessions that match.
func (st *store) dropSessions(match func(sealfs.Session) bool) error {
	const batch = 256 // shards looked at under one hold of the store's lock
	for from := uint32(0); from < st.srv.cfg.Shards; from += batch {
		found := map[shardSession]struct{}{}
		err := st.View(func(r pmem.Reader) (err error) {
			for s := from; s < min(from+batch, st.srv.cfg.Shards) && err == nil; s++ {
				err = meta.Sessions(r, sealfs.Shard(s), func(at sealfs.Session) {
					if match(at) {
						found[shardSession{sealfs.Shard(s), at}] = struct{}{}
					}
				})
			}
			return err
		})
		if err != nil {
			return err
		}
		inOrder := func(a, b shardSession) int {
			return cmp.Or(cmp.Compare(a.shard, b.shard), cmp.Compare(a.session, b.session))
		}
		for _, f := range slices.SortedFunc(maps.Keys(found), inOrder) { // a simulation must be one that can be made again
			if err := st.dropSession(f); err != nil {
				return err
			}
		}
	}
	return nil
}

// dropSession frees what one session has in one shard, step by step.
func (st *store) dropSession(f shardSession) error {
	for {
		req := op.Request{Type: op.DropSession, Shard: f.shard, Lock: op.Lock{Owner: uint64(f.session)}, Epoch: st.srv.epoch(f.shard)}
		var rep op.Reply
		if err := st.change(&req, &rep, nil); err != nil || rep.Code == 0 && rep.Eof {
			return err
		}
		if rep.Code != 0 {
			return fmt.Errorf("end of session %d in shard %d: %w", f.session, f.shard, rep.Code)
		}
	}
}
