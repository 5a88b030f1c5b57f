package server

import (
	"fmt"
	"slices"
	"time"

	"sealfs"
	"sealfs/op"
)

// sessionList is what the manager says of sessions: those below next that are
// not live have ended.
type sessionList struct {
	next sealfs.Session
	live map[sealfs.Session]struct{}
}

// ended reports whether a session is known to have ended. Newer ones than the
// list are taken for alive.
func (l *sessionList) ended(sess sealfs.Session) bool {
	if l == nil || sess == 0 || sess == volumeSession || sess >= l.next {
		return false
	}
	_, live := l.live[sess]
	return !live
}

// ended reports whether a session's requests must be refused.
func (s *Server) ended(sess sealfs.Session) bool {
	if f := s.fenced.Load(); f != nil && sess != 0 {
		if _, ok := (*f)[sess]; ok {
			return true
		}
	}
	return s.sessions.Load().ended(sess)
}

// Fence replaces the sessions that are about to end. When it returns, no request of
// them changes anything any more, as if they had ended, but they keep what they hold: other servers
// may not have heard of it yet.
func (s *Server) Fence(list []sealfs.Session) {
	f := make(map[sealfs.Session]struct{}, len(list))
	for _, id := range list {
		f[id] = struct{}{}
	}
	s.fenced.Store(&f)
	if len(f) == 0 {
		return
	}
	// What passed the check before it has happened when its store's lock is free.
	for _, st := range s.all() {
		st.BeginRead()
		st.EndRead()
	}
}

// Attend says that the managers were heard of, or sought in vain: sessions are known for a while.
// After that, as when the process stood still, changes of sessions are put off with ErrUnavailable until the next
// call: sessions may have ended, and others have what they held. Before the first call
// nothing is put off.
func (s *Server) Attend(d time.Duration) {
	until := time.Now().Add(d)
	s.attended.Store(&until)
}

// unattended reports whether changes of sessions must wait for Attend.
func (s *Server) unattended() bool {
	until := s.attended.Load()
	return until != nil && time.Now().After(*until)
}

// SetSessions takes the manager's list: all sessions below next that are not
// live have ended, and lose what they hold. It does nothing without KeepSessions.
func (s *Server) SetSessions(next sealfs.Session, live []sealfs.Session) {
	if !s.o.KeepSessions {
		return
	}
	l := &sessionList{next, make(map[sealfs.Session]struct{}, len(live))}
	for _, at := range live {
		l.live[at] = struct{}{}
	}
	old := s.sessions.Swap(l)
	if old == nil {
		// From now on those that live have their time to register.
		time.AfterFunc(s.o.Grace, s.endGrace)
	}
	if old == nil || l.newlyEnded(old) {
		if err := s.endSessions(l.ended); err != nil {
			s.log.Error("locks of ended sessions are not all released; a restart releases them", "err", err)
		}
	}
	for _, st := range s.all() {
		st.settleGrace(l)
	}
}

// newlyEnded reports whether sessions have ended that were not known to have: those that
// lived, and those that came and went since.
func (l *sessionList) newlyEnded(old *sessionList) bool {
	for at := range old.live {
		if l.ended(at) {
			return true
		}
	}
	lived := 0
	for at := range l.live {
		if at >= old.next && at < l.next {
			lived++
		}
	}
	return l.next > old.next && uint64(l.next-old.next) > uint64(lived)
}

// endGrace ends the time in which files without a name wait for who holds them.
func (s *Server) endGrace() {
	for _, st := range s.all() {
		st.reclaimKept(st.holds.endGrace())
	}
}

// settleGrace ends it early, when all sessions that live have registered.
func (st *store) settleGrace(l *sessionList) {
	if l != nil && st.holds.allRegistered(l.live) {
		st.reclaimKept(st.holds.endGrace())
	}
}

// reclaimKept has files freed that were kept for sessions that did not come back.
func (st *store) reclaimKept(ended bool) {
	if !ended {
		return
	}
	for _, ino := range st.reclaim.keptFiles() {
		if !st.holds.any(ino) {
			st.reclaim.add(ino)
		}
	}
}

// register answers Register: with the last part of its list, the session holds
// these files open here and no others.
func (st *store) register(req *op.Request) error {
	var list []op.Opens
	if err := op.DecodeOpens(req.Data, func(o op.Opens) { list = append(list, o) }); err != nil {
		return err
	}
	if st.srv.ended(req.Session) {
		return sealfs.ErrSession
	}
	for _, o := range list {
		if o.Count&op.OpensDelayed != 0 {
			// Before the time of grace can end.
			st.leases.Restore(req.Session, o.Ino)
		}
	}
	free, err := st.holds.register(req.Session, list, req.Off, req.Len)
	if err != nil {
		return err
	}
	if st.srv.ended(req.Session) { // just now: who ends it may have looked before
		free = append(free, st.holds.end(func(at sealfs.Session) bool { return at == req.Session })...)
		err = sealfs.ErrSession
	}
	for _, ino := range free {
		if st.reclaim.nameless(ino) {
			st.reclaim.add(ino)
		}
	}
	if err == nil {
		st.settleGrace(st.srv.sessions.Load())
	}
	return err
}

// register takes a part of what a session holds: the files from number off on, of total.
// With the last part it replaces what the session held before, at once, and returns what
// nobody holds any more.
func (h *holds) register(sess sealfs.Session, list []op.Opens, off, total uint64) (free []sealfs.Ino, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if off == 0 {
		delete(h.telling, sess)
	}
	if before := uint64(len(h.telling[sess])); before != off || off+uint64(len(list)) > total || len(list) == 0 && total > 0 {
		return nil, fmt.Errorf("files %d to %d of %d that a session holds, after %d: %w", off, off+uint64(len(list)), total, before, sealfs.ErrInvalid)
	}
	list = append(h.telling[sess], list...)
	if uint64(len(list)) < total {
		if h.telling == nil {
			h.telling = map[sealfs.Session][]op.Opens{}
		}
		h.telling[sess] = list
		return nil, nil
	}
	delete(h.telling, sess)
	before := h.drops(func(at sealfs.Session) bool { return at == sess })
	for _, o := range list {
		h.put(sess, o.Ino, o.Count&^(wantsWrite|op.OpensDelayed))
	}
	if h.grace {
		if h.registered == nil {
			h.registered = map[sealfs.Session]struct{}{}
		}
		h.registered[sess] = struct{}{}
	}
	return slices.DeleteFunc(before, func(ino sealfs.Ino) bool { return len(h.files[ino]) > 0 }), nil
}

// allRegistered reports whether all of the sessions have come back.
func (h *holds) allRegistered(live map[sealfs.Session]struct{}) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.grace {
		return false
	}
	for at := range live {
		if _, ok := h.registered[at]; !ok {
			return false
		}
	}
	return true
}

// endGrace reports whether the time of grace ended just now.
func (h *holds) endGrace() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	was := h.grace
	if was {
		close(h.over)
		h.starting.Store(false)
	}
	h.grace, h.registered = false, nil
	return was
}
