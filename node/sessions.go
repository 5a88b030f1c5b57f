package node

import (
	"crypto/rand"
	"encoding/binary"
	"slices"
	"time"

	"sealfs"
	"sealfs/client"
)

const (
	// lookInterval is how often the main process looks after the sessions of further mounts.
	lookInterval = 5 * time.Second
	// overdueLooks is for how many looks a mount may keep others waiting: more than a minute, although
	// ticks may follow each other faster once.
	overdueLooks = 14
)

// openSession is the session of a further mount.
type openSession struct {
	Session
	over chan struct{} // closed when it was ended from here
}

// newSession returns the number of a session: random, since result rows of
// sessions outlive this process; never 0, and below the numbers that servers use for
// themselves.
func newSession() sealfs.Session {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return sealfs.Session(binary.LittleEndian.Uint64(b[:])>>1 | 1)
}

// openSession admits a further mount.
func (n *Node) openSession(volume, mount string, pid int) (*openSession, error) {
	n.volumes.Lock()
	defer n.volumes.Unlock()
	v, err := n.mountable(volume)
	if err != nil {
		return nil, err
	}
	s := &openSession{over: make(chan struct{}), Session: Session{
		ID: newSession(), Volume: v.ID, Root: v.Root,
		Shards: n.cfg.Shards, Cluster: n.cfg.Cluster, PID: pid, Mount: mount,
	}}
	n.sessions[s.ID] = s
	n.log.Info("session begins", "session", uint64(s.ID), "volume", volume, "mount", mount, "pid", pid)
	return s, nil
}

// endSession releases what the session held.
func (n *Node) endSession(s *openSession) {
	if err := n.server.EndSession(s.ID); err != nil {
		n.log.Error("locks of a session are not all released; a restart releases them", "session", uint64(s.ID), "err", err)
	}
	n.volumes.Lock()
	defer n.volumes.Unlock()
	delete(n.sessions, s.ID)
	n.log.Info("session ended", "session", uint64(s.ID), "mount", s.Mount, "pid", s.PID)
}

// watchSessions ends sessions of mounts whose processes do not answer any more: others wait for what
// they hold. As long as a process hangs its connection stays, so nothing else tells.
func (n *Node) watchSessions() {
	tick := time.NewTicker(lookInterval)
	defer tick.Stop()
	for {
		select {
		case <-n.ctx.Done():
			return
		case <-tick.C:
			n.lookAfter(overdueLooks)
		}
	}
}

// lookAfter looks once, and ends what has been late for so many looks. That of the mount in this
// process is not among them: it has no successor.
func (n *Node) lookAfter(looks int) {
	late, silent := n.server.Overdue(looks)
	n.volumes.Lock()
	defer n.volumes.Unlock()
	for id, s := range n.sessions {
		client.AbortDying(s.PID)
		if !slices.Contains(late, id) {
			continue
		}
		if !slices.Contains(n.expelled, id) {
			n.log.Warn("a mount does not give back what others wait for: its session is ended", "session", uint64(id), "mount", s.Mount, "pid", s.PID)
			n.expelled = append(n.expelled, id)
			n.server.Fence(n.expelled)
		}
		if slices.Contains(silent, id) {
			close(s.over)
			delete(n.sessions, id)
		}
	}
}
