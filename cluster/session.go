package cluster

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"sealfs"
)

// SessionsMax bounds the sessions that live at one time.
const SessionsMax = 1 << 16

// SessionInfo is what a client says of itself. It is for operators: nothing
// depends on it. Host and Mount are cut to LocationMax bytes.
type SessionInfo struct {
	Volume string `json:"volume"` // name of the volume it mounts
	Host   string `json:"host"`
	Mount  string `json:"mount"` // where
	PID    int    `json:"pid"`
}

// Session is a client's session: it lives until it is ended, or until it was
// not renewed for TTL.
type Session struct {
	ID sealfs.Session `json:"id"` // 1, 2, 3…, never issued twice
	SessionInfo
	Opened time.Time     `json:"opened"`        // UTC, for people to read
	TTL    time.Duration `json:"ttl,omitempty"` // renew it three times as often
}

// SessionList says which sessions live. A session below Next that is not in
// Live has ended; one of Next and above is newer than the list.
type SessionList struct {
	Version uint64           `json:"version"` // grows with every change
	Next    sealfs.Session   `json:"next"`
	Live    []sealfs.Session `json:"live"` // ascending
}

// Ended reports whether the list knows that the session has ended.
func (l *SessionList) Ended(id sealfs.Session) bool {
	if id == 0 || id >= l.Next {
		return false
	}
	_, ok := slices.BinarySearch(l.Live, id)
	return !ok
}

// sessionTable is the sessions' part of the Raft state. Like a Map it is
// immutable. It is kept apart from the map, whose version must not change
// whenever a client comes or goes.
type sessionTable struct {
	version uint64
	next    sealfs.Session
	live    []Session // in the order of their numbers
}

func newSessionTable() *sessionTable { return &sessionTable{version: 1, next: 1} }

// ok reports whether t keeps the rules of a table.
func (t *sessionTable) ok() bool {
	last := sealfs.Session(0)
	for _, s := range t.live {
		if s.ID <= last || s.ID >= t.next || checkSessionVolume(s.Volume) != nil {
			return false
		}
		last = s.ID
	}
	return t.version > 0 && t.next > 0 && len(t.live) <= SessionsMax
}

// checkSessionVolume reports why a session cannot name this volume: a name that
// no volume can have. An empty one is no volume in particular.
func checkSessionVolume(name string) error {
	if name == "" {
		return nil
	}
	return CheckName(name)
}

func (t *sessionTable) index(id sealfs.Session) (int, bool) {
	return slices.BinarySearchFunc(t.live, id, func(s Session, id sealfs.Session) int {
		switch {
		case s.ID < id:
			return -1
		case s.ID > id:
			return 1
		}
		return 0
	})
}

func (t *sessionTable) list() SessionList {
	l := SessionList{Version: t.version, Next: t.next, Live: make([]sealfs.Session, len(t.live))}
	for i, s := range t.live {
		l.Live[i] = s.ID
	}
	return l
}

// isSession reports whether a command is about sessions.
func (c *command) isSession() bool { return c.kind == cmdOpenSession || c.kind == cmdEndSessions }

// apply executes a command about sessions; like the function apply it is
// deterministic and leaves t alone.
func (t *sessionTable) apply(c *command) (*sessionTable, result) {
	next := &sessionTable{version: t.version + 1, next: t.next}
	if c.kind == cmdOpenSession {
		s := c.session
		switch err := checkSessionVolume(s.Volume); {
		case err != nil:
			return t, result{err: fmt.Errorf("session: %w", err)}
		case len(t.live) >= SessionsMax:
			return t, result{err: fmt.Errorf("%d sessions are open, no more are possible: %w", SessionsMax, sealfs.ErrNoSpace)}
		case t.next == math.MaxUint64:
			return t, result{err: fmt.Errorf("all session numbers are used up: %w", sealfs.ErrNoSpace)}
		}
		s.ID = t.next
		next.next++
		next.live = append(slices.Clip(t.live), s)
		return next, result{session: s}
	}
	ended := make(map[sealfs.Session]bool, len(c.ended))
	for _, id := range c.ended {
		ended[id] = true
	}
	for _, s := range t.live {
		if !ended[s.ID] {
			next.live = append(next.live, s)
		}
	}
	if len(next.live) == len(t.live) {
		return t, result{}
	}
	return next, result{}
}

// OpenSession begins a session. It lives for Session.TTL from the last time it
// was opened or renewed; what the client holds is lost when it ends.
func (m *Manager) OpenSession(ctx context.Context, info SessionInfo) (Session, error) {
	if err := checkSessionVolume(info.Volume); err != nil {
		return Session{}, fmt.Errorf("session: %w", err)
	}
	info.Host, info.Mount = info.Host[:min(len(info.Host), LocationMax)], info.Mount[:min(len(info.Mount), LocationMax)]
	info.PID = int(uint32(info.PID))
	r, err := m.propose(ctx, command{kind: cmdOpenSession, session: Session{SessionInfo: info, Opened: time.Now().UTC()}})
	if err != nil {
		return Session{}, err
	}
	if lead := m.lead.Load(); lead != nil {
		lead.sessions.renew(r.session.ID, m.o.now())
	}
	r.session.TTL = m.o.SessionTTL
	return r.session, nil
}

// RenewSession lets a session live for another TTL. ErrSession says that it has
// ended.
func (m *Manager) RenewSession(_ context.Context, id sealfs.Session) error {
	if err := m.working(); err != nil {
		return err
	}
	lead := m.lead.Load()
	if lead == nil {
		return m.notLeading()
	}
	if _, ok := m.fsm.sessions.Load().index(id); !ok || lead.fences.Has(id) {
		return fmt.Errorf("session %d: %w", id, sealfs.ErrSession)
	}
	lead.sessions.renew(id, m.o.now())
	return nil
}

// EndSession ends a session of which nothing is under way any more, as its client says (else
// see FenceSession); one that has ended is none of its business.
func (m *Manager) EndSession(ctx context.Context, id sealfs.Session) error {
	_, err := m.propose(ctx, command{kind: cmdEndSessions, ended: []sealfs.Session{id}})
	if lead := m.lead.Load(); err == nil && lead != nil {
		lead.fences.Over([]sealfs.Session{id})
	}
	return err
}

// SessionList returns the sessions that live, as far as this manager knows.
func (m *Manager) SessionList() SessionList { return m.fsm.sessions.Load().list() }

// Sessions returns the sessions that live with what clients said of themselves.
func (m *Manager) Sessions(context.Context) ([]Session, error) {
	if err := m.working(); err != nil {
		return nil, err
	}
	live := slices.Clone(m.fsm.sessions.Load().live)
	for i := range live {
		live[i].TTL = m.o.SessionTTL
	}
	return live, nil
}
