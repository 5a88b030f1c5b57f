package cluster

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"

	"sealfs"
)

// ManagersMax bounds the managers of a cluster; usual are 1, 3 and 5.
const ManagersMax = 7

// ManagerInfo is a member of the cluster of managers.
type ManagerInfo struct {
	ID     sealfs.UUID `json:"id"`
	Addr   string      `json:"addr"`
	Leader bool        `json:"leader"`
	Voter  bool        `json:"voter"` // false while it is catching up
}

// Managers returns the managers of the cluster, as far as this one knows.
func (m *Manager) Managers(context.Context) ([]ManagerInfo, error) {
	if err := m.working(); err != nil {
		return nil, err
	}
	_, leader := m.raft.LeaderWithID()
	var list []ManagerInfo
	for _, s := range m.servers() {
		id, err := sealfs.ParseUUID(string(s.ID))
		if err != nil {
			return nil, &sealfs.Corruption{Where: m.o.Dir, Off: -1, What: "identifier of a manager in the configuration"}
		}
		list = append(list, ManagerInfo{ID: id, Addr: string(s.Address), Leader: s.ID == leader, Voter: s.Suffrage == raft.Voter})
	}
	return list, nil
}

// AddManager takes a manager in, or gives a member its new address, if this
// manager leads. The new one must be running at addr already and belong to this
// cluster. It first catches up without a vote; when ctx ends before it has, it
// stays without one, and AddManager may be called again.
func (m *Manager) AddManager(ctx context.Context, id sealfs.UUID, addr string) error {
	switch err := m.working(); {
	case err != nil:
		return err
	case !m.Leading():
		return m.notLeading()
	case m.stream == nil:
		return fmt.Errorf("this manager is embedded in another process and cannot be one of several: open it with an address: %w", sealfs.ErrNotSupported)
	case id.IsZero():
		return fmt.Errorf("a manager needs an identifier: %w", sealfs.ErrInvalid)
	}
	if err := checkAddr("manager's address", addr); err != nil {
		return err
	}
	m.membership.Lock()
	defer m.membership.Unlock()
	servers := m.servers()
	for _, s := range servers {
		if string(s.Address) == addr && string(s.ID) != id.String() {
			return fmt.Errorf("manager %s is at %s: remove it first: %w", s.ID, addr, sealfs.ErrExist)
		}
	}
	old, known := m.member(id)
	switch {
	case known && old.Suffrage == raft.Voter && string(old.Address) == addr:
		return nil
	case !known && len(servers) >= ManagersMax:
		return fmt.Errorf("the cluster has %d managers: %w", len(servers), sealfs.ErrNoSpace)
	}
	// A voter that cannot be reached could cost the majority.
	commit := m.raft.CommitIndex()
	if _, err := m.askManager(ctx, id, addr); err != nil {
		return err
	}
	if !known || string(old.Address) != addr && old.Suffrage != raft.Voter {
		if err := m.await(ctx, m.raft.AddNonvoter(raft.ServerID(id.String()), raft.ServerAddress(addr), 0, 0)); err != nil {
			return err
		}
		m.o.Logger.Info("a manager joins and catches up", "manager", id, "address", addr)
	}
	if !known || old.Suffrage != raft.Voter {
		if err := m.awaitCaughtUp(ctx, id, addr, commit); err != nil {
			return err
		}
	}
	if err := m.await(ctx, m.raft.AddVoter(raft.ServerID(id.String()), raft.ServerAddress(addr), 0, 0)); err != nil {
		return err
	}
	m.o.Logger.Info("a manager is a voter", "manager", id, "address", addr)
	return nil
}

// askManager makes sure that the manager is at addr, and returns how it is.
func (m *Manager) askManager(ctx context.Context, id sealfs.UUID, addr string) (ManagerStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, transportTimeout)
	defer cancel()
	r := NewRemote([]string{addr}, RemoteOptions{Cluster: m.cluster})
	defer r.Close()
	s, err := r.Status(ctx)
	if err != nil {
		return s, fmt.Errorf("the manager to be added is not there: %w", err)
	}
	if s.ID != id {
		return s, fmt.Errorf("at %s is manager %s, not %s: %w", addr, s.ID, id, sealfs.ErrInvalid)
	}
	return s, nil
}

func (m *Manager) awaitCaughtUp(ctx context.Context, id sealfs.UUID, addr string, index uint64) error {
	tick := time.NewTicker(m.o.timeout / 10)
	defer tick.Stop()
	for {
		s, err := m.askManager(ctx, id, addr)
		if err == nil && s.Applied >= index && s.MapVersion > 0 {
			return nil
		}
		if !m.Leading() {
			return m.notLeading()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("manager %s at %s has not caught up yet: %w: %w", id, addr, context.Cause(ctx), sealfs.ErrTimeout)
		case <-m.ctx.Done():
			return m.Err()
		case <-m.latch.done:
			return m.latch.Err()
		case <-tick.C:
		}
	}
}

// RemoveManager takes a manager out of the cluster, be it the leader, if this
// manager leads. The removed one stops when it learns of it, and does not come
// back: its directory cannot be used again.
func (m *Manager) RemoveManager(ctx context.Context, id sealfs.UUID) error {
	if err := m.working(); err != nil {
		return err
	}
	if !m.Leading() {
		return m.notLeading()
	}
	m.membership.Lock()
	defer m.membership.Unlock()
	old, ok := m.member(id)
	if !ok {
		return fmt.Errorf("manager %s is not in the cluster: %w", id, sealfs.ErrNotExist)
	}
	voters := slices.DeleteFunc(m.servers(), func(s raft.Server) bool { return s.Suffrage != raft.Voter || s.ID == old.ID })
	if len(voters) == 0 {
		return fmt.Errorf("manager %s is the last one: %w", id, sealfs.ErrBusy)
	}
	if err := m.await(ctx, m.raft.RemoveServer(old.ID, 0, 0)); err != nil {
		return err
	}
	m.o.Logger.Info("a manager was removed", "manager", id, "address", old.Address)
	return nil
}

// keepMembership makes this manager a member under its address, and stops it
// when it is one no more. Others are asked only while something is amiss.
func (m *Manager) keepMembership() {
	tick := time.NewTicker(m.o.timeout)
	defer tick.Stop()
	for said := ""; ; {
		err := m.checkMembership()
		if err != nil && err.Error() != said && m.ctx.Err() == nil {
			m.o.Logger.Warn("this manager is not a member of its cluster yet, or has no leader", "error", err)
		}
		if said = ""; err != nil {
			said = err.Error()
		}
		select {
		case <-m.ctx.Done():
			return
		case <-m.latch.done:
			return
		case <-tick.C:
		}
	}
}

func (m *Manager) checkMembership() error {
	self, ok := m.member(m.id)
	right := ok && self.Suffrage == raft.Voter && string(self.Address) == m.o.Addr
	if right && m.joining {
		m.joining = false
	}
	ctx, cancel := context.WithTimeout(m.ctx, max(10*m.o.timeout, transportTimeout))
	defer cancel()
	if right && m.Leader() != "" {
		return nil
	}
	if m.Leading() {
		if right || !ok { // one that is removed leads no more in a moment
			return nil
		}
		return m.await(ctx, m.raft.AddVoter(self.ID, raft.ServerAddress(m.o.Addr), 0, 0))
	}
	addrs := slices.Clone(m.o.Join)
	for _, s := range m.servers() {
		if s.ID != self.ID && string(s.Address) != embeddedAddr {
			addrs = append(addrs, string(s.Address))
		}
	}
	addrs = slices.DeleteFunc(addrs, func(a string) bool { return a == m.o.Addr })
	if len(addrs) == 0 {
		return nil
	}
	r := NewRemote(addrs, RemoteOptions{Cluster: m.cluster})
	defer r.Close()
	if right {
		// All seems well here, but nobody leads: the others may have gone on without this one.
		return m.checkRemoved(ctx, r)
	}
	if !m.joining {
		if err := m.checkRemoved(ctx, r); err != nil || m.latch.Err() != nil {
			return err
		}
	}
	if err := r.AddManager(ctx, m.id, m.o.Addr); err != nil {
		return fmt.Errorf("joining: %w", err)
	}
	return nil
}

// checkRemoved asks the leader whether this manager is a member still.
func (m *Manager) checkRemoved(ctx context.Context, r *Remote) error {
	list, err := r.Managers(ctx)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(list, func(i ManagerInfo) bool { return i.ID == m.id }) {
		return nil
	}
	if err := m.store.Set([]byte(removedKey), []byte{1}); err != nil {
		return err
	}
	m.latch.shut(errRemoved)
	return nil
}
