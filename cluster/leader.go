package cluster

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"sealfs"
	"sealfs/cluster/fencing"
)

// leadership is what the leading manager keeps in memory: who was heard of, and
// when. It begins empty whenever a manager comes to lead, and with it begin all
// silences, so that nobody is blamed for the time without a leader. All times
// are this process's own readings of the monotonic clock: what the clocks of
// the machines say does not matter.
type leadership struct {
	live     *liveness
	leases   *leases
	sessions *renewals
	fences   *fencing.Fences

	verifying sync.Mutex
	verified  time.Time // this manager led then, certainly
}

// verify makes sure that this manager led a moment ago: one that stood still
// wakes up believing that it does, while another has long counted the leases
// from its own beginning. Leases are shorter for their holders than for the
// manager by more than this moment.
func (m *Manager) verify(ctx context.Context, l *leadership) error {
	l.verifying.Lock()
	defer l.verifying.Unlock()
	now := m.o.now()
	if !l.verified.IsZero() && now.Sub(l.verified) < m.o.timeout/4 {
		return nil
	}
	if err := m.await(ctx, m.raft.VerifyLeader()); err != nil {
		return err
	}
	l.verified = now
	return nil
}

// Leading reports whether this manager leads, with everything applied that was
// committed before.
func (m *Manager) Leading() bool { return m.lead.Load() != nil }

// LeaderChanged returns a channel that is closed when this manager comes to
// lead or ceases to, or when it learns of another leader. Take the channel
// first and ask then, and no change is missed.
func (m *Manager) LeaderChanged() <-chan struct{} {
	m.leadMu.Lock()
	defer m.leadMu.Unlock()
	return m.leadChanged
}

// Leader returns the address of the manager that leads, "" if none is known. An
// embedded manager's address is "embedded".
func (m *Manager) Leader() string {
	addr, _ := m.raft.LeaderWithID()
	return string(addr)
}

// WaitReady waits until there is a leader, and this manager is a member of the
// cluster that knows its map.
func (m *Manager) WaitReady(ctx context.Context) error {
	for {
		lead, changed := m.LeaderChanged(), m.Changed()
		if s, ok := m.member(m.id); ok && s.Suffrage == raft.Voter && m.Leader() != "" && m.Map() != nil {
			return nil
		}
		tick := time.NewTimer(m.o.timeout / 4) // membership has no channel
		select {
		case <-lead:
		case <-changed:
		case <-tick.C:
		case <-m.latch.done:
			return m.latch.Err()
		case <-m.ctx.Done():
			return m.Err()
		case <-ctx.Done():
			return fmt.Errorf("the manager in %s has no leader or is no member yet: %w: %w", m.o.Dir, context.Cause(ctx), sealfs.ErrUnavailable)
		}
		tick.Stop()
	}
}

// notLeading is the error of a manager that does not lead.
func (m *Manager) notLeading() error {
	if leader := m.Leader(); leader != "" {
		return fmt.Errorf("this manager does not lead, %s does: %w", leader, sealfs.ErrUnavailable)
	}
	return fmt.Errorf("no manager leads: %w", sealfs.ErrUnavailable)
}

// follow keeps m.lead in step with raft.
func (m *Manager) follow() {
	seen := make(chan raft.Observation, 16)
	o := raft.NewObserver(seen, false, func(o *raft.Observation) bool {
		_, ok := o.Data.(raft.LeaderObservation)
		return ok
	})
	m.raft.RegisterObserver(o)
	defer m.raft.DeregisterObserver(o)
	defer m.setLead(nil)
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-m.latch.done:
			return
		case <-seen:
			m.setLead(m.lead.Load())
		case leads := <-m.raft.LeaderCh():
			// All that was committed before has to be applied first.
			if !leads || m.await(m.ctx, m.raft.Barrier(0)) != nil {
				m.setLead(nil)
				continue
			}
			now := m.o.now()
			m.setLead(&leadership{
				live:   newLiveness(m.o.SuspectAfter, m.o.DownAfter),
				leases: newLeases(m.o.DownAfter, now), sessions: newRenewals(m.o.SessionTTL),
				fences: fencing.New(2 * m.o.DownAfter),
			})
		}
	}
}

func (m *Manager) setLead(l *leadership) {
	m.leadMu.Lock()
	defer m.leadMu.Unlock()
	m.lead.Store(l)
	close(m.leadChanged)
	m.leadChanged = make(chan struct{})
}

// watch commits what silences say about stores and sessions while this manager
// leads, and shuts Raft down when the latch shuts: no vote, no leading from a
// damaged state.
func (m *Manager) watch() {
	period := min(m.o.SuspectAfter, m.o.SessionTTL) / 4
	tick := time.NewTicker(period)
	defer tick.Stop()
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-m.latch.done:
			m.o.Logger.Error("the manager stops", "dir", m.o.Dir, "error", m.latch.Err())
			if err := m.raft.Shutdown().Error(); err != nil {
				m.o.Logger.Error("shutting raft down", "error", err)
			}
			if m.stream != nil {
				m.stream.Close()
			}
			return
		case <-tick.C:
		case <-m.poke:
		}
		lead, mp := m.lead.Load(), m.Map()
		if lead == nil || mp == nil {
			continue
		}
		m.judgeStores(lead, mp, period)
		m.judgeSessions(lead, mp, period)
	}
}

func (m *Manager) judgeStores(lead *leadership, mp *Map, period time.Duration) {
	for _, v := range lead.live.due(m.o.now(), period, mp.Stores) {
		if err := m.setStoreState(m.ctx, v.id, v.to); err != nil {
			m.o.Logger.Warn("a store's state is not committed", "store", v.id, "state", v.to, "error", err)
			continue
		}
		m.o.Logger.Info("a store changed its state", "store", v.id, "state", v.to)
	}
}

// wake has watch look at once.
func (m *Manager) wake() {
	select {
	case m.poke <- struct{}{}:
	default:
	}
}

// renewals judges sessions by the time since they were last renewed. It has no
// clock of its own.
type renewals struct {
	ttl time.Duration

	mu     sync.Mutex
	judged time.Time // last call of due
	at     map[sealfs.Session]time.Time
}

func newRenewals(ttl time.Duration) *renewals {
	return &renewals{ttl: ttl, at: make(map[sealfs.Session]time.Time)}
}

// renew records that a session was opened or renewed.
func (r *renewals) renew(id sealfs.Session, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.at[id] = now
}

// due returns the sessions that have lived without renewal for too long. It has
// to be called every period; time in which it was not, because the manager
// stood still, does not count. Nor does the time before its first call.
func (r *renewals) due(now time.Time, period time.Duration, live []Session) (ended []sealfs.Session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var lost time.Duration
	if !r.judged.IsZero() {
		lost = max(now.Sub(r.judged)-period, 0)
	}
	r.judged = now
	at := make(map[sealfs.Session]time.Time, len(live))
	for _, s := range live {
		last, ok := r.at[s.ID]
		if !ok {
			last = now
		}
		if last = last.Add(lost); last.After(now) {
			last = now
		}
		at[s.ID] = last
		if now.Sub(last) >= r.ttl {
			ended = append(ended, s.ID)
		}
	}
	// One that was renewed between its opening and this look at live stays.
	for id, last := range r.at {
		if _, ok := at[id]; !ok && now.Sub(last) < period {
			at[id] = last
		}
	}
	r.at = at
	return ended
}
