package cluster

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"sealfs"
)

// A session ends in two steps, since not all servers hear of it at one time: what it held at
// one server must not be given to others while another server would still take a
// late request of it.
//
//  1. It is fenced: it cannot be renewed any more, heartbeats' answers name it, and servers
//     refuse its requests; but it keeps what it holds.
//  2. When every server that serves has said in a heartbeat that it refuses it, its end is
//     committed, and servers drop what it held. A server that is down learns the
//     sessions before it serves again.
//
// Fences are in the leader's memory. One that is lost with its leader does no harm: nothing
// was given away, and the session is judged anew.

// fences are the sessions that are about to end.
type fences struct {
	patience time.Duration // for a server that is heard of and does not say that it refuses a session

	mu sync.Mutex
	of map[sealfs.Session]*fence
}

type fence struct {
	since   time.Time
	refused map[sealfs.UUID]struct{} // by these servers
	over    chan struct{}            // closed when the session has ended
}

func newFences(patience time.Duration) *fences {
	return &fences{patience: patience, of: make(map[sealfs.Session]*fence)}
}

// add fences a session and returns what is closed when it has ended.
func (f *fences) add(now time.Time, id sealfs.Session) <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	x := f.of[id]
	if x == nil {
		x = &fence{since: now, refused: make(map[sealfs.UUID]struct{}), over: make(chan struct{})}
		f.of[id] = x
	}
	return x.over
}

func (f *fences) has(id sealfs.Session) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.of[id] != nil
}

// list returns the sessions that servers shall refuse.
func (f *fences) list() []sealfs.Session {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.of) == 0 {
		return nil
	}
	list := make([]sealfs.Session, 0, len(f.of))
	for id := range f.of {
		list = append(list, id)
	}
	slices.Sort(list)
	return list
}

// confirm notes which sessions a server refuses, and reports whether one of them is news.
func (f *fences) confirm(server sealfs.UUID, refused []sealfs.Session) (news bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, id := range refused {
		if x := f.of[id]; x != nil {
			if _, known := x.refused[server]; !known {
				x.refused[server] = struct{}{}
				news = true
			}
		}
	}
	return news
}

// due returns the sessions that all of the servers refuse. late are servers that do
// not say so in time, and are waited for no longer.
func (f *fences) due(now time.Time, servers []sealfs.UUID) (ended []sealfs.Session, late []sealfs.UUID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, x := range f.of {
		missing := slices.DeleteFunc(slices.Clone(servers), func(s sealfs.UUID) bool { _, ok := x.refused[s]; return ok })
		if len(missing) == 0 || now.Sub(x.since) >= f.patience {
			ended = append(ended, id)
			late = append(late, missing...)
		}
	}
	slices.Sort(ended)
	return ended, late
}

// over notes that sessions have ended.
func (f *fences) over(ended []sealfs.Session) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, id := range ended {
		if x := f.of[id]; x != nil {
			close(x.over)
			delete(f.of, id)
		}
	}
}

// serving returns the servers that may serve: all but those that are down.
func serving(mp *Map) (servers []sealfs.UUID) {
	for _, s := range mp.Stores {
		if s.State != StoreDown && s.State != StoreLeft && !s.Server.IsZero() && !slices.Contains(servers, s.Server) {
			servers = append(servers, s.Server)
		}
	}
	return servers
}

// FenceSession ends a session of which requests may still be under way, as those of a
// process that was killed. It waits until all servers refuse it and its end is committed.
func (m *Manager) FenceSession(ctx context.Context, id sealfs.Session) error {
	if err := m.working(); err != nil {
		return err
	}
	lead := m.lead.Load()
	if lead == nil {
		return m.notLeading()
	}
	if _, ok := m.fsm.sessions.Load().index(id); !ok {
		return nil
	}
	over := lead.fences.add(m.o.now(), id)
	m.wake()
	for {
		changed := m.LeaderChanged()
		if m.lead.Load() != lead {
			return m.notLeading()
		}
		select {
		case <-over:
			return nil
		case <-changed:
		case <-m.ctx.Done():
			return fmt.Errorf("manager: %w", sealfs.ErrClosed)
		case <-ctx.Done():
			return fmt.Errorf("session %d is not refused by all servers yet: %w: %w", id, context.Cause(ctx), sealfs.ErrInterrupted)
		}
	}
}

// judgeSessions fences the sessions that were not renewed, and ends those that all servers refuse.
func (m *Manager) judgeSessions(lead *leadership, mp *Map, period time.Duration) {
	now := m.o.now()
	for _, id := range lead.sessions.due(now, period, m.fsm.sessions.Load().live) {
		if !lead.fences.has(id) {
			m.o.Logger.Info("a session was not renewed: it is fenced", "session", id)
		}
		lead.fences.add(now, id)
	}
	ended, late := lead.fences.due(now, serving(mp))
	if len(ended) == 0 {
		return
	}
	if len(late) > 0 {
		m.o.Logger.Warn("servers do not say that they refuse sessions that end", "sessions", ended, "servers", late)
	}
	if _, err := m.propose(m.ctx, command{kind: cmdEndSessions, ended: ended}); err != nil {
		m.o.Logger.Warn("the end of sessions is not committed", "sessions", ended, "error", err)
		return
	}
	lead.fences.over(ended)
	m.o.Logger.Info("sessions have ended", "sessions", ended)
}
