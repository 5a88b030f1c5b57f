package client

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
)

// identity is one session of a client. That of a client without a session never ends.
type identity struct {
	id    sealfs.Session
	seqs  []sequence // by shard: a server that is away must not keep others from forgetting results
	ended atomic.Bool
	over  chan struct{}             // closed when ended
	next  chan struct{}             // closed when the client has another session
	until atomic.Pointer[time.Time] // see Renewed
}

func newIdentity(id sealfs.Session, shards uint32) *identity {
	s := &identity{id: id, over: make(chan struct{}), next: make(chan struct{})}
	if id != 0 {
		s.seqs = make([]sequence, shards)
	}
	return s
}

// enlist gives k a session, and a number in it if it is a change. It waits while
// the client has none. A call whose session has ended meanwhile gets
// another one if it can be sure that it did not happen.
func (c *Client) enlist(ctx context.Context, k *call) error {
	if k.ses != nil && !k.ses.ended.Load() {
		return nil
	}
	if k.ses != nil && (boundToSession(k.Type) || k.unsure && k.Type.Changes()) {
		return fmt.Errorf("%v: %w", k.Type, sealfs.ErrSession)
	}
	for {
		s := c.ses.Load()
		if !s.ended.Load() {
			k.ses, k.Session = s, s.id
			if !k.Type.Changes() {
				return nil
			}
			seq, low, full := s.seqs[k.Shard].start()
			if full == nil {
				k.Seq, k.Low = seq, low
				return nil
			}
			k.ses = nil
			select {
			case <-full:
			case <-s.over:
			case <-ctx.Done():
				return errGaveUp
			case <-c.life.Done():
				return errGaveUp
			}
			continue
		}
		if boundToSession(k.Type) {
			return fmt.Errorf("%v: %w", k.Type, sealfs.ErrSession)
		}
		if err := c.awaitSession(ctx, s); err != nil {
			return err
		}
	}
}

// awaitSession waits for the successor of s.
func (c *Client) awaitSession(ctx context.Context, s *identity) error {
	if ctx.Value(briefKey{}) != nil {
		return errGaveUp
	}
	var late <-chan time.Time
	if c.o.Retry > 0 {
		timer := time.NewTimer(c.o.Retry)
		defer timer.Stop()
		late = timer.C
	}
	select {
	case <-s.next:
		return nil
	case <-late:
		return fmt.Errorf("no new session for %v: %w: %w", c.o.Retry, sealfs.ErrIO, sealfs.ErrSession)
	case <-ctx.Done():
		return errGaveUp
	case <-c.life.Done():
		return errGaveUp
	}
}

// Session returns the client's session, 0 if it works without one.
func (c *Client) Session() sealfs.Session { return c.ses.Load().id }

// Expired is closed when the session that the client has now ends: because a
// server said so or because of Fence. The owner of the client shall then get
// another one from the manager and call Resume.
func (c *Client) Expired() <-chan struct{} { return c.ses.Load().over }

// Fence ends the session. Whoever owns the client must call it when the session may
// have ended at the manager, which is one term after the last renewal that
// was answered was sent: from then on others may hold what it held. why is logged.
//
// All files that are open at that time fail with sealfs.ErrSession (EIO) until they are
// closed; what was delayed for them is lost. Everything else waits for Resume.
// Without a session nothing happens.
func (c *Client) Fence(why error) {
	if c.remote {
		c.fence(c.ses.Load(), why)
	}
}

// Renewed says until when the session cannot have ended: less than one term after the last
// renewal that was answered was sent. After that time, until the next call, nothing is believed
// any more that was leased, and writes are not delayed: the server says whether the session lives.
// Without any call it is taken to live for 54 seconds after the last sign of life of a
// server, which must not end it within a minute of one.
func (c *Client) Renewed(until time.Time) { c.ses.Load().until.Store(&until) }

// Resume gives a client whose session has ended another one. It returns
// sealfs.ErrInvalid for a client without sessions or one whose session lives.
func (c *Client) Resume(id sealfs.Session) error {
	c.sesMu.Lock()
	defer c.sesMu.Unlock()
	old := c.ses.Load()
	if id == 0 || id == old.id || !old.ended.Load() {
		return fmt.Errorf("session %d cannot follow session %d: %w", id, old.id, sealfs.ErrInvalid)
	}
	c.ses.Store(newIdentity(id, c.o.Shards))
	close(old.next)
	return nil
}

// fence ends s. It may be called with a gate taken, and so waits for none.
func (c *Client) fence(s *identity, why error) {
	if !s.ended.CompareAndSwap(false, true) {
		return
	}
	// From here on no opening is counted for s.
	nodes := c.nodes.clear()
	close(s.over)
	go c.disbelieve(func(sealfs.Shard) bool { return true })
	c.log.Error("the session has ended: files that are open fail from now on", "session", uint64(s.id), "files", len(nodes), "err", why)
	go func() {
		for _, n := range nodes {
			if n.dirty.Load() {
				c.sendNode(c.life, n) // which finds the session ended
			}
		}
	}()
}

// sequence numbers the changes of a session in a shard and knows the lowest one
// that is not answered yet.
type sequence struct {
	mu   sync.Mutex
	last uint64
	open []uint64      // not answered yet, ascending
	full chan struct{} // closed when the lowest of them is answered, if somebody waits
}

// sequenceWindow is how far numbers may run ahead of the lowest that is not
// answered. A server remembers 256 results, so that the lowest would find no room.
const sequenceWindow = 250

// start returns the next number and the lowest, or what is closed when there may be one.
func (s *sequence) start() (seq, low uint64, full <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.open) > 0 && s.last+1-s.open[0] >= sequenceWindow {
		if s.full == nil {
			s.full = make(chan struct{})
		}
		return 0, 0, s.full
	}
	s.last++
	s.open = append(s.open, s.last)
	return s.last, s.open[0], nil
}

func (s *sequence) finish(seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i, ok := slices.BinarySearch(s.open, seq); ok {
		s.open = slices.Delete(s.open, i, i+1)
		if i == 0 && s.full != nil {
			close(s.full)
			s.full = nil
		}
	}
}
