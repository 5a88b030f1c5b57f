package client

import (
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/op"
)

// node is an inode that somebody on this client holds open, or is about to.
type node struct {
	ino     sealfs.Ino
	ses     atomic.Pointer[identity] // under which it was opened
	opens   uint64                   // guarded by the table: by Open, Create and Tmpfile, less Release
	pending uint64                   // guarded by the table: openings without an answer so far; only with a session
	held    uint64                   // guarded by the table: how often the server was told

	locked     atomic.Bool // somebody took a POSIX lock
	capability atomic.Bool // the next write must take the capability attribute away
	dirty      atomic.Bool // there is a buffer; false only when the server has answered it
	far        atomic.Bool // the file has grown beyond what an append to its home may write
	kept       kept        // what is known of its layout
	early      atomic.Pointer[early]
	changes    atomic.Uint64 // by this client, at their beginning and end
	uncapped   atomic.Uint32 // the thread that has just taken the capability attribute away
	unread     atomic.Bool   // reading it may change its time of access
	privileged atomic.Bool   // the kernel was told to forget the mode, since writes take privileges away

	gate  gate     // taken while the buffer changes or is sent; guards the following
	gone  bool     // released: no buffer may begin
	room  []byte   // the pooled array of the buffer, all of it
	buf   []byte   // what is delayed, the beginning of room
	off   uint64   // its place in the file; without meaning for an append
	flags op.Flags // Append or not, and KillPriv when any write wanted it
	stuck bool     // its server is away: see Client.stuck
	err   error    // of a delayed write, not yet told to anybody

	since      time.Time // in the list: when the buffer began
	prev, next *node     // in the list
	busy       bool      // in the list: somebody is about to send the buffer
	passed     bool      // in the list: a goroutine of its own sends the buffer
}

// table finds nodes by inode number.
type table struct {
	parts [64]tablePart
}

type tablePart struct {
	mu    sync.Mutex
	nodes map[sealfs.Ino]*node
	// leaving are inodes that the server was told to release, and has not
	// answered; closed when it has. Only with a session.
	leaving map[sealfs.Ino]chan struct{}
	_       [40]byte // a cache line each
}

func (t *table) init() {
	for i := range t.parts {
		t.parts[i].nodes = map[sealfs.Ino]*node{}
		t.parts[i].leaving = map[sealfs.Ino]chan struct{}{}
	}
}

// part spreads by the counter and by the shard in an inode number.
func (t *table) part(ino sealfs.Ino) *tablePart {
	return &t.parts[uint64(ino)*0x9e3779b97f4a7c15>>58]
}

// get returns the node of ino, or nil when nobody holds it open.
func (t *table) get(ino sealfs.Ino) *node {
	p := t.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.nodes[ino]
}

// node returns the node of ino, a new one if need be. p is locked.
func (p *tablePart) node(ino sealfs.Ino, s *identity) *node {
	n := p.nodes[ino]
	if n == nil {
		n = &node{ino: ino}
		n.ses.Store(s)
		p.nodes[ino] = n
	}
	return n
}

// open notes that the server was told of one more opening of ino.
func (t *table) open(ino sealfs.Ino, s *identity) {
	p := t.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.node(ino, s)
	n.opens++
	n.held++
}

// release undoes one open of n, whose gate is taken. After the last one n is gone,
// and the result is how often the server must be told.
func (t *table) release(n *node, remote bool) uint64 {
	p := t.part(n.ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	if n.gone || p.nodes[n.ino] != n {
		return 0
	}
	if n.opens--; n.opens > 0 || n.pending > 0 {
		return 0
	}
	delete(p.nodes, n.ino)
	n.gone = true
	if remote && n.held > 0 {
		p.leaving[n.ino] = make(chan struct{})
	}
	return n.held
}

// left notes that the server has answered the release of ino.
func (t *table) left(ino sealfs.Ino) {
	p := t.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	if over, ok := p.leaving[ino]; ok {
		close(over)
		delete(p.leaving, ino)
	}
}

// clear empties the table and returns what was in it.
func (t *table) clear() []*node {
	var all []*node
	for i := range t.parts {
		p := &t.parts[i]
		p.mu.Lock()
		for _, n := range p.nodes {
			all = append(all, n)
		}
		clear(p.nodes)
		for _, over := range p.leaving {
			close(over)
		}
		clear(p.leaving)
		p.mu.Unlock()
	}
	return all
}

// markLocked notes that somebody takes a POSIX lock, which a close must drop.
func (t *table) markLocked(ino sealfs.Ino) {
	if n := t.get(ino); n != nil {
		n.locked.Store(true)
	}
}

// markCapability notes that ino has a capability attribute now.
func (t *table) markCapability(ino sealfs.Ino) {
	if n := t.get(ino); n != nil {
		n.capability.Store(true)
	}
}
