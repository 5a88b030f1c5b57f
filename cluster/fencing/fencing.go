// Package fencing keeps the sessions that are about to end. It is plain state; clocks come from its caller.
//
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
package fencing

import (
	"slices"
	"sync"
	"time"

	"sealfs"
)

// Fences are the sessions that are about to end.
type Fences struct {
	patience time.Duration // for a server that is heard of and does not say that it refuses a session

	mu sync.Mutex
	of map[sealfs.Session]*fence
}

type fence struct {
	since   time.Time
	refused map[sealfs.UUID]struct{} // by these servers
	over    chan struct{}            // closed when the session has ended
}

// New returns the fences of a leader that waits so long for a server.
func New(patience time.Duration) *Fences {
	return &Fences{patience: patience, of: make(map[sealfs.Session]*fence)}
}

// Add fences a session and returns what is closed when it has ended.
func (f *Fences) Add(now time.Time, id sealfs.Session) <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	x := f.of[id]
	if x == nil {
		x = &fence{since: now, refused: make(map[sealfs.UUID]struct{}), over: make(chan struct{})}
		f.of[id] = x
	}
	return x.over
}

// Has reports whether a session is about to end.
func (f *Fences) Has(id sealfs.Session) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.of[id] != nil
}

// List returns the sessions that servers shall refuse.
func (f *Fences) List() []sealfs.Session {
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

// Confirm notes which sessions a server refuses, and reports whether one of them is news.
func (f *Fences) Confirm(server sealfs.UUID, refused []sealfs.Session) (news bool) {
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

// Due returns the sessions that all of the servers refuse. late are servers that do
// not say so in time, and are waited for no longer.
func (f *Fences) Due(now time.Time, servers []sealfs.UUID) (ended []sealfs.Session, late []sealfs.UUID) {
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

// Over notes that sessions have ended.
func (f *Fences) Over(ended []sealfs.Session) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, id := range ended {
		if x := f.of[id]; x != nil {
			close(x.over)
			delete(f.of, id)
		}
	}
}
