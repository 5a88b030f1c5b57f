package cluster

import (
	"context"
	"fmt"
	"slices"
	"time"

	"sealfs"
)

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
	over := lead.fences.Add(m.o.now(), id)
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
		if !lead.fences.Has(id) {
			m.o.Logger.Info("a session was not renewed: it is fenced", "session", id)
		}
		lead.fences.Add(now, id)
	}
	ended, late := lead.fences.Due(now, serving(mp))
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
	lead.fences.Over(ended)
	m.o.Logger.Info("sessions have ended", "sessions", ended)
}
