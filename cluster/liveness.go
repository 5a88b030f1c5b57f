package cluster

import (
	"sync"
	"time"

	"sealfs"
)

// StoreStats is what a store says of itself with a heartbeat. It is not part of
// the map: it lives in the leader's memory.
type StoreStats struct {
	Used   uint64 `json:"used"`   // bytes
	Free   uint64 `json:"free"`   // bytes, reserves excluded
	Inodes uint64 `json:"inodes"` // in use
	Failed string `json:"failed"` // why the store accepts no changes, empty if it does
}

// liveness judges stores by the time since their last heartbeat. It has no
// clock of its own.
type liveness struct {
	suspectAfter time.Duration
	downAfter    time.Duration

	mu     sync.Mutex
	judged time.Time // last call of due
	beats  map[sealfs.UUID]beat
}

type beat struct {
	at    time.Time // zero if none arrived since the manager started
	since time.Time // the silence counts from here
	stats StoreStats
}

func newLiveness(suspectAfter, downAfter time.Duration) *liveness {
	return &liveness{suspectAfter: suspectAfter, downAfter: downAfter, beats: make(map[sealfs.UUID]beat)}
}

// beat records a heartbeat.
func (l *liveness) beat(id sealfs.UUID, now time.Time, s StoreStats) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.beats[id] = beat{now, now, s}
}

// leave says that a store's server has said goodbye: its silence is over DownAfter at once.
func (l *liveness) leave(id sealfs.UUID, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.beats[id] = beat{since: now.Add(-l.downAfter), stats: l.beats[id].stats}
}

// last returns the last heartbeat of a store.
func (l *liveness) last(id sealfs.UUID) (StoreStats, time.Time, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, ok := l.beats[id]
	return b.stats, b.at, ok && !b.at.IsZero()
}

// A verdict is a state that a store should have.
type verdict struct {
	id sealfs.UUID
	to StoreState
}

// due returns the stores whose state differs from what their heartbeats say. It
// has to be called every period.
//
// A store that has not been heard of since the manager started counts from
// then on: a new leader grants everybody a full term. When a call comes late,
// it was the manager that stood still (stopped, swapped out), and everybody
// gets that time again.
func (l *liveness) due(now time.Time, period time.Duration, stores []StoreInfo) []verdict {
	l.mu.Lock()
	defer l.mu.Unlock()
	var lost time.Duration
	if !l.judged.IsZero() {
		lost = now.Sub(l.judged) - period
	}
	l.judged = now
	var vs []verdict
	for _, s := range stores {
		if s.State == StoreLeft {
			delete(l.beats, s.ID)
			continue
		}
		b := l.beats[s.ID]
		if b.since.IsZero() {
			b.since = now
		}
		if lost > 0 {
			if b.since = b.since.Add(lost); b.since.After(now) {
				b.since = now
			}
		}
		l.beats[s.ID] = b
		to := StoreUp
		switch age := now.Sub(b.since); {
		case age >= l.downAfter:
			to = StoreDown
		case age >= l.suspectAfter:
			to = StoreSuspect
		}
		// Things get worse by silence, but better only by a heartbeat.
		if to > s.State || to == StoreUp && s.State != StoreUp && !b.at.IsZero() {
			vs = append(vs, verdict{s.ID, to})
		}
	}
	return vs
}
