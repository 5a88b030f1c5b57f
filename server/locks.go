package server

import (
	"context"
	"errors"
	"fmt"
	"sync"

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

// waitLock answers WaitLock: SetLock as soon as nobody is in the way.
func (st *store) waitLock(ctx context.Context, req *op.Request, rep *op.Reply) error {
	ch := st.locks.enter(req.Ino)
	if ch == nil {
		return fmt.Errorf("server: %w", sealfs.ErrClosed)
	}
	defer st.locks.leave(req.Ino, ch)
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
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for a lock on inode %d: %w: %w", req.Ino, context.Cause(ctx), sealfs.ErrInterrupted)
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
		for f := range found {
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
