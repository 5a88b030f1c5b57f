package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sealfs"
)

// BeatStoresMax bounds the stores of one server.
const BeatStoresMax = 1024

// Beat is the heartbeat of a server process. It should be sent three times per
// SuspectAfter, and is how a server and its stores get into the map.
type Beat struct {
	Server          sealfs.UUID `json:"server"`
	Instance        uint64      `json:"instance"` // random per process, not 0
	Addr            string      `json:"addr"`     // where clients and peers reach it
	Host            string      `json:"host"`     // failure domains
	Rack            string      `json:"rack"`
	Stores          []StoreBeat `json:"stores"`
	SessionsVersion uint64      `json:"sessions_version"`  // of the list that the sender has, 0 for none
	Leaving         bool        `json:"leaving,omitempty"` // it stops serving: its leases end now
	// Fenced are sessions of which it takes no requests, though they have not ended.
	Fenced []sealfs.Session `json:"fenced,omitempty"`
}

// StoreBeat is what a server says of one of its stores.
type StoreBeat struct {
	ID     sealfs.UUID `json:"id"`
	Bytes  uint64      `json:"bytes"`            // capacity
	Weight uint32      `json:"weight,omitempty"` // when it is first heard of; 0: one per GiB
	StoreStats
	State string        `json:"state"` // in the server's words
	Usage []VolumeUsage `json:"usage,omitempty"`
}

// VolumeUsage is what a volume uses.
type VolumeUsage struct {
	ID     sealfs.Volume `json:"id"`
	Bytes  uint64        `json:"bytes"`
	Inodes uint64        `json:"inodes"`
}

// BeatReply is the answer to a heartbeat.
type BeatReply struct {
	MapVersion uint64 `json:"map_version"`
	// Term is how long the stores that are not refused may be served, counted by
	// the sender's monotonic clock from when it sent the Beat.
	Term time.Duration `json:"term"`
	// Interval is how often to send a Beat.
	Interval time.Duration `json:"interval"`
	// Sessions is there if the sender has another version of the list.
	Sessions *SessionList `json:"sessions,omitempty"`
	// Fenced are sessions that are about to end: their requests must be refused, and the
	// next heartbeat must say so. What they hold they keep.
	Fenced []sealfs.Session `json:"fenced,omitempty"`
	// Refused says of stores why they must not be served.
	Refused map[sealfs.UUID]string `json:"refused,omitempty"`
}

// check reports the first rule that b breaks. What cannot be committed is told
// when it is tried.
func (b *Beat) check() error {
	if b.Server.IsZero() || b.Instance == 0 || b.Addr == "" {
		return fmt.Errorf("a heartbeat needs server, instance and address: %w", sealfs.ErrInvalid)
	}
	if err := errors.Join(checkLocation("address", b.Addr), checkLocation("host", b.Host), checkLocation("rack", b.Rack)); err != nil {
		return err
	}
	if len(b.Stores) > BeatStoresMax {
		return fmt.Errorf("a heartbeat of %d stores, more than %d: %w", len(b.Stores), BeatStoresMax, sealfs.ErrInvalid)
	}
	seen := make(map[sealfs.UUID]bool)
	for i := range b.Stores {
		s := &b.Stores[i]
		switch {
		case s.ID.IsZero() || seen[s.ID]:
			return fmt.Errorf("a heartbeat names store %s twice, or none: %w", s.ID, sealfs.ErrInvalid)
		case len(s.State) > LocationMax || len(s.Failed) > 16*LocationMax || len(s.Usage) > VolumesMax:
			return fmt.Errorf("a heartbeat says too much about store %s: %w", s.ID, sealfs.ErrInvalid)
		}
		seen[s.ID] = true
	}
	return nil
}

// ServerBeat takes a server's heartbeat, if this manager leads; it blocks only
// to commit what is new. A store of the cluster that it does not know yet is
// added, a changed address or capacity is committed.
func (m *Manager) ServerBeat(ctx context.Context, b Beat) (BeatReply, error) {
	if err := m.working(); err != nil {
		return BeatReply{}, err
	}
	lead, mp := m.lead.Load(), m.Map()
	switch {
	case lead == nil:
		return BeatReply{}, m.notLeading()
	case mp == nil:
		return BeatReply{}, errNoMap
	}
	if err := b.check(); err != nil {
		return BeatReply{}, err
	}
	now := m.o.now()
	refused := lead.leases.grant(now, &b, mp)
	for i := range b.Stores {
		s := &b.Stores[i]
		if _, no := refused[s.ID]; no {
			continue
		}
		if err := m.serveStore(ctx, mp, &b, s); err != nil {
			if errors.Is(err, sealfs.ErrInterrupted) || errors.Is(err, sealfs.ErrUnavailable) || m.Err() != nil {
				return BeatReply{}, err
			}
			lead.leases.forget(s.ID)
			refused[s.ID] = err.Error()
			continue
		}
		if b.Leaving {
			lead.live.leave(s.ID, now)
			m.wake()
			continue
		}
		m.heard(lead, mp, s.ID, s.StoreStats)
	}
	if b.Leaving {
		lead.leases.release(now, &b)
	}
	// A beat that was judged by a leader who then was none grants nothing.
	if err := m.verify(ctx, lead); err != nil {
		return BeatReply{}, err
	}
	if m.lead.Load() != lead {
		return BeatReply{}, m.notLeading()
	}
	mp = m.Map()
	r := BeatReply{MapVersion: mp.Version, Interval: m.o.SuspectAfter / 3, Refused: refused}
	// The sender's clock may be a little slower than this one.
	r.Term = m.o.DownAfter - m.o.DownAfter/10
	if lead.fences.Confirm(b.Server, b.Fenced) {
		m.wake()
	}
	r.Fenced = lead.fences.List() // before the sessions: one that ends meanwhile is in this list or not in that
	if t := m.fsm.sessions.Load(); t.version != b.SessionsVersion {
		l := t.list()
		r.Sessions = &l
	}
	return r, nil
}

// serveStore commits what b says about a store, if the map says something else.
func (m *Manager) serveStore(ctx context.Context, mp *Map, b *Beat, s *StoreBeat) error {
	info := StoreInfo{ID: s.ID, Addr: b.Addr, Host: b.Host, Rack: b.Rack, Weight: s.Weight, Bytes: s.Bytes, Server: b.Server}
	if info.Weight == 0 {
		info.Weight = defaultWeight(s.Bytes)
	}
	if i := mp.StoreIndex(s.ID); i >= 0 {
		old := mp.Stores[i]
		info.Weight, info.State, info.Bad = old.Weight, old.State, old.Bad
		if info == old {
			return nil
		}
	}
	_, err := m.propose(ctx, command{kind: cmdServeStore, store: info})
	if err == nil {
		m.o.Logger.Info("a store is served", "store", s.ID, "server", b.Server, "address", b.Addr)
	}
	return err
}

// Beat takes a store's heartbeat from this process; it does not block. A store
// should send one three times per Options.SuspectAfter.
func (m *Manager) Beat(id sealfs.UUID, s StoreStats) error {
	if err := m.working(); err != nil {
		return err
	}
	lead, mp := m.lead.Load(), m.Map()
	switch {
	case lead == nil:
		return m.notLeading()
	case mp == nil:
		return errNoMap
	}
	i := mp.StoreIndex(id)
	if i < 0 || mp.Stores[i].State == StoreLeft {
		return fmt.Errorf("store %s is not in the cluster: %w", id, sealfs.ErrNotExist)
	}
	m.heard(lead, mp, id, s)
	return nil
}

func (m *Manager) heard(lead *leadership, mp *Map, id sealfs.UUID, s StoreStats) {
	lead.live.beat(id, m.o.now(), s)
	if i := mp.StoreIndex(id); i >= 0 && mp.Stores[i].State != StoreUp {
		m.wake()
	}
}

// working returns why the manager takes no calls, or nil.
func (m *Manager) working() error {
	if m.closed.Load() {
		return fmt.Errorf("manager: %w", sealfs.ErrClosed)
	}
	if err := m.latch.Err(); err != nil {
		return fmt.Errorf("the manager has stopped: %w", err)
	}
	return nil
}

// LastBeat returns a store's last heartbeat since this manager came to lead.
func (m *Manager) LastBeat(id sealfs.UUID) (s StoreStats, at time.Time, ok bool) {
	if lead := m.lead.Load(); lead != nil {
		return lead.live.last(id)
	}
	return StoreStats{}, time.Time{}, false
}

// StoreStatus is what a leader knows about a store.
type StoreStatus struct {
	StoreInfo
	StoreStats
	Says    string        `json:"says"`    // the store's state in its server's words
	Heard   bool          `json:"heard"`   // since the manager came to lead
	Silence time.Duration `json:"silence"` // since the last heartbeat
	Shards  int           `json:"shards"`  // rows that name it
	Primary int           `json:"primary"` // rows that name it first
}

// Stores returns all stores, those that have left too, in the order of the map.
func (m *Manager) Stores(context.Context) ([]StoreStatus, error) {
	if err := m.working(); err != nil {
		return nil, err
	}
	lead, mp := m.lead.Load(), m.Map()
	switch {
	case lead == nil:
		return nil, m.notLeading()
	case mp == nil:
		return nil, errNoMap
	}
	list := make([]StoreStatus, len(mp.Stores))
	for i, s := range mp.Stores {
		list[i].StoreInfo = s
		stats, at, ok := lead.live.last(s.ID)
		if list[i].StoreStats, list[i].Heard = stats, ok; ok {
			list[i].Silence = m.o.now().Sub(at)
		}
		list[i].Says = lead.leases.says(s.ID)
	}
	for _, row := range mp.Table {
		for k, i := range row.Replicas {
			list[i].Shards++
			if k == 0 {
				list[i].Primary++
			}
		}
	}
	return list, nil
}
