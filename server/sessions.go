package server

import (
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

func (s *Server) ended(sess sealfs.Session) bool { return s.sessions.Load().ended(sess) }

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
		for _, st := range s.all() {
			if err := st.dropSessions(l.ended); err != nil {
				s.log.Error("locks of ended sessions are not all released; a restart releases them", "err", err)
			}
		}
	} else {
		for at := range old.live {
			if l.ended(at) {
				if err := s.EndSession(at); err != nil {
					s.log.Error("locks of a session are not all released; a restart releases them", "session", uint64(at), "err", err)
				}
			}
		}
	}
	for _, st := range s.all() {
		st.settleGrace(l)
	}
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

// register answers Register: from now on the session holds these files open
// here, and with Excl no others.
func (st *store) register(req *op.Request) error {
	var list []op.Opens
	if err := op.DecodeOpens(req.Data, func(o op.Opens) { list = append(list, o) }); err != nil {
		return err
	}
	if st.srv.ended(req.Session) {
		return sealfs.ErrSession
	}
	for _, ino := range st.holds.register(req.Session, list, req.Flags&op.Excl != 0) {
		if st.reclaim.nameless(ino) {
			st.reclaim.add(ino)
		}
	}
	st.settleGrace(st.srv.sessions.Load())
	return nil
}

// register replaces or adds to what a session holds, and returns what nobody
// holds any more.
func (h *holds) register(sess sealfs.Session, list []op.Opens, afresh bool) (free []sealfs.Ino) {
	var before []sealfs.Ino
	if afresh {
		before = h.end(sess)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, o := range list {
		h.put(sess, o.Ino, o.Count)
	}
	if h.registered == nil {
		h.registered = map[sealfs.Session]struct{}{}
	}
	h.registered[sess] = struct{}{}
	return slices.DeleteFunc(before, func(ino sealfs.Ino) bool { return len(h.files[ino]) > 0 })
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
	h.grace, h.registered = false, nil
	return was
}
