package router

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/op"
	"sealfs/wire"
)

// server is one address and the way there.
type server struct {
	r       *Router
	addr    string
	network string
	cluster sealfs.UUID

	stores   atomic.Pointer[[]sealfs.UUID] // at addr, by the newest map
	link     atomic.Pointer[link]          // that requests may use; changes under mu
	requests atomic.Uint64
	failures atomic.Uint64

	mu      sync.Mutex
	attempt *attempt // to make a link, under way
	away    backoff
	err     error // why the last link or attempt failed; nil from then on when one succeeds
	gone    error // set for ever once the server is not in the map any more
	keeping bool  // a goroutine makes a new link, again and again
	since   time.Time
	links   uint64
	past    wire.Stats // of links that have ended
}

// attempt is one to make a link, for all who need it.
type attempt struct {
	greeted chan struct{} // closed when only Register is left to do
	done    chan struct{} // closed when link or err is set
	link    *link
	err     error
	void    error // why the link must not be used although it was made; changes under server.mu
}

// link is a set of connections to one life of a server.
type link struct {
	conns   []*wire.Conn // for requests
	control *wire.Conn   // for requests that must not stand behind others, or would keep a connection busy; nil: there is none
	peer    bool
	since   time.Time
}

func newServer(r *Router, addr string, id sealfs.UUID) *server {
	s := &server{r: r, addr: addr, network: "tcp", cluster: id}
	if strings.ContainsRune(addr, '/') {
		s.network = "unix"
	}
	s.away.min, s.away.max = r.o.Backoff, r.o.BackoffMax
	s.stores.Store(new([]sealfs.UUID))
	return s
}

// do sends a request over the link, which it makes if there is none.
func (s *server) do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	s.requests.Add(1)
	l := s.link.Load()
	if l == nil {
		var err error
		if l, err = s.connect(ctx); err != nil {
			s.failed(err)
			return err
		}
	}
	c := l.conn(req)
	err := c.Do(ctx, req, rep)
	if err == nil {
		return nil
	}
	if end := c.Err(); end != nil {
		s.lost(l, end)
		if errors.Is(err, sealfs.ErrClosed) { // by us, together with the rest of the link
			err = s.reason()
		}
	}
	s.failed(err)
	return err
}

func (s *server) failed(err error) {
	if errors.Is(err, sealfs.ErrUnavailable) {
		s.failures.Add(1)
	}
}

// conn returns the connection that a request goes over.
func (l *link) conn(req *op.Request) *wire.Conn {
	if l.control != nil {
		switch req.Type {
		case op.Commit, op.Abort, op.Forget, op.Resolve, op.Sync, op.WaitFor, op.Waiting, op.Grant, op.Recall:
			if l.peer {
				return l.control
			}
		case op.Watch: // which waits there all the time
			return l.control
		}
	}
	// One that nobody waits on spares its caller the hand-over of answers.
	first := int(req.Shard) % len(l.conns)
	for i := range l.conns {
		if c := l.conns[(first+i)%len(l.conns)]; c.Busy() == 0 {
			return c
		}
	}
	return l.conns[first]
}

// each calls f for all connections.
func (l *link) each(f func(*wire.Conn)) {
	for _, c := range l.conns {
		f(c)
	}
	if l.control != nil {
		f(l.control)
	}
}

func (l *link) close() { l.each(func(c *wire.Conn) { c.Close() }) }

func (l *link) stats() (sum wire.Stats) {
	l.each(func(c *wire.Conn) { sum.Add(c.Stats()) })
	return sum
}

// reason returns why there is no link.
func (s *server) reason() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.gone != nil:
		return s.gone
	case s.err != nil:
		return s.err
	}
	return fmt.Errorf("server at %s: %w: the connection was given up", s.addr, sealfs.ErrUnavailable)
}

// connect returns the link, making it or waiting for it if need be.
func (s *server) connect(ctx context.Context) (*link, error) {
	s.mu.Lock()
	if l := s.link.Load(); l != nil {
		s.mu.Unlock()
		return l, nil
	}
	a, err := s.begin()
	away := s.err
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	var over <-chan time.Time
	greeted := a.greeted
	if away != nil {
		// The server may be one that never answers: it gets no more than a moment.
		t := time.NewTimer(s.r.o.Backoff)
		defer t.Stop()
		over = t.C
	}
	for {
		select {
		case <-a.done:
			return a.link, a.err
		case <-greeted:
			greeted, over = nil, nil
		case <-over:
			return nil, fmt.Errorf("%w (another attempt is under way)", away)
		case <-ctx.Done():
			return nil, fmt.Errorf("server at %s: no connection yet: %w: %w", s.addr, sealfs.ErrInterrupted, context.Cause(ctx))
		}
	}
}

// begin returns the attempt under way, or starts one unless the server is away. Requires mu.
func (s *server) begin() (*attempt, error) {
	if s.gone != nil {
		return nil, s.gone
	}
	if s.attempt != nil {
		return s.attempt, nil
	}
	now := time.Now()
	if left := s.away.until.Sub(now); left > 0 {
		return nil, fmt.Errorf("%w (the next attempt is in %v)", s.err, left.Round(time.Millisecond))
	}
	s.attempt = &attempt{greeted: make(chan struct{}), done: make(chan struct{})}
	s.since = now
	a := s.attempt
	// Who retires the server sets gone under s.mu before it waits for the
	// router's goroutines, so that this one is counted in time.
	s.r.wg.Go(func() { s.try(a) })
	return a, nil
}

// try makes a link and tells those who wait for it.
func (s *server) try(a *attempt) {
	l, err := s.dial(a)
	s.mu.Lock()
	now := time.Now()
	if err == nil && a.void != nil {
		defer l.close()
		err = a.void
	}
	first := s.err == nil // the first attempt, or the first failure after a success
	s.attempt, s.since = nil, now
	switch {
	case s.gone != nil:
		if err == nil {
			defer l.close()
		}
		a.err = s.gone
	case err != nil:
		if !errors.Is(err, sealfs.ErrUnavailable) {
			err = fmt.Errorf("%w: %w", sealfs.ErrUnavailable, err)
		}
		s.away.fail(now)
		a.err, s.err = err, err
	default:
		l.since = now
		a.link, s.err = l, nil
		s.links++
		s.link.Store(l)
		l.each(func(c *wire.Conn) {
			s.r.wg.Go(func() {
				<-c.Done()
				s.lost(l, c.Err())
			})
		})
	}
	gone := s.gone != nil
	s.mu.Unlock()
	close(a.done)
	log := s.r.o.Logger
	switch {
	case gone:
	case err == nil:
		log.Info("server is connected", "server", s.addr)
	case first:
		log.Warn("server is away", "server", s.addr, "error", err)
	default:
		log.Debug("server is still away", "server", s.addr, "error", err)
	}
}

// dial makes a link for a, registered and ready for use.
func (s *server) dial(a *attempt) (*link, error) {
	o := &s.r.o
	l := new(link)
	err := s.call(l)
	if err == nil && o.Register != nil {
		// All connections are made by now: those that are still alive when this one
		// has been answered lead to the same life of the server as it does.
		close(a.greeted)
		c := l.conns[0]
		ctx, cancel := context.WithTimeout(s.r.ctx, o.RegisterTimeout)
		defer cancel()
		if err = o.Register(ctx, s.addr, slices.Clone(*s.stores.Load()), &fresh{s, c}); err == nil {
			err = c.Err()
		} else {
			err = fmt.Errorf("server at %s: cannot register: %w", s.addr, err)
		}
	}
	if err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

// call makes the connections of l.
func (s *server) call(l *link) (err error) {
	o := &s.r.o
	ctx, cancel := context.WithTimeout(s.r.ctx, o.DialTimeout)
	defer cancel()
	wo := wire.Options{
		Cluster: s.cluster, Program: o.Program, Peer: o.Peer,
		HandshakeTimeout: o.DialTimeout, Keepalive: o.Keepalive, Timeout: o.Timeout,
	}
	for range o.Conns {
		c, err := wire.Dial(ctx, s.network, s.addr, wo)
		if err != nil {
			return err
		}
		l.conns = append(l.conns, c)
	}
	if l.peer = o.Peer; o.Peer || o.Register != nil {
		l.control, err = wire.Dial(ctx, s.network, s.addr, wo)
	}
	return err
}

// fresh is the handler that Options.Register gets.
type fresh struct {
	s *server
	c *wire.Conn
}

// Do sends the request over the new connection, with the shard's epoch.
func (f *fresh) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	return f.s.r.do(ctx, req, rep, f)
}

// lost ends a link of which a connection has failed.
func (s *server) lost(l *link, cause error) {
	s.mu.Lock()
	if s.link.Load() != l {
		s.mu.Unlock()
		return
	}
	keep := s.cut(l, cause)
	s.mu.Unlock()
	l.close()
	s.r.o.Logger.Warn("server is lost", "server", s.addr, "error", cause)
	if keep {
		s.r.spawn(s.keep)
	}
}

// cut takes the link out of use for a reason; it is to be closed. It reports whether
// keep is to be run. Requires mu.
func (s *server) cut(l *link, cause error) (keep bool) {
	s.drop(l)
	s.err = cause
	if now := time.Now(); now.Sub(l.since) < s.r.o.BackoffMax {
		s.away.fail(now) // or one that crashes at the first request would be called without a rest
	} else {
		s.away.reset()
	}
	keep = s.r.o.Register != nil && !s.keeping
	s.keeping = s.keeping || keep
	return keep
}

// moved ends the link after a store has come to the server, which Register has not
// told anything; so it does with an attempt that is under way. It is called with
// Router.mu held.
func (s *server) moved() {
	cause := fmt.Errorf("server at %s: %w: a store has come to it", s.addr, sealfs.ErrUnavailable)
	s.mu.Lock()
	if s.attempt != nil {
		s.attempt.void = cause
	}
	l := s.link.Load()
	keep := l != nil && s.cut(l, cause)
	s.mu.Unlock()
	if l == nil {
		return
	}
	s.r.wg.Go(func() {
		l.close()
		if keep {
			s.keep()
		}
	})
}

// drop forgets the link; it is to be closed. Requires mu.
func (s *server) drop(l *link) {
	s.link.Store(nil)
	s.past.Add(l.stats())
	s.since = time.Now()
}

// keep tries to make a link until there is one or nobody needs it any more.
func (s *server) keep() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-s.r.ctx.Done():
			return
		}
		_, _ = s.r.current() // it may say that the server is not in the map any more
		s.mu.Lock()
		if s.link.Load() != nil || s.gone != nil {
			s.keeping = false
			s.mu.Unlock()
			return
		}
		a, err := s.begin()
		s.mu.Unlock()
		if err == nil {
			<-a.done
		}
		s.mu.Lock()
		timer.Reset(time.Until(s.away.until))
		s.mu.Unlock()
	}
}

// retire ends the server for the given reason: the map does not name it any
// more, or the router is closed.
func (s *server) retire(reason error) {
	s.mu.Lock()
	s.gone = reason
	l := s.link.Load()
	if l != nil {
		s.drop(l)
	}
	s.mu.Unlock()
	if l != nil {
		l.close()
	}
}

// stats returns what is known of the server.
func (s *server) stats() ServerStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := ServerStats{
		Addr: s.addr, Stores: *s.stores.Load(), State: Idle, Since: s.since,
		Requests: s.requests.Load(), Failures: s.failures.Load(), Links: s.links, Wire: s.past,
	}
	if s.err != nil {
		st.Err = s.err.Error()
	}
	switch l := s.link.Load(); {
	case l != nil:
		st.State = Up
		st.Wire.Add(l.stats())
	case s.attempt != nil:
		st.State = Connecting
	case s.err != nil && time.Now().Before(s.away.until):
		st.State = Away
	}
	return st
}

// backoff says until when somebody who failed is left alone.
type backoff struct {
	min, max time.Duration
	delay    time.Duration // after the next failure, before jitter; 0: min
	until    time.Time
}

// fail notes a failure at the time now. The rest is between half and all of a
// delay that doubles each time, so that many clients do not come back at once.
func (b *backoff) fail(now time.Time) {
	d := min(max(b.delay, b.min), b.max)
	b.delay = min(2*d, b.max)
	b.until = now.Add(d/2 + rand.N(d/2+1))
}

// reset notes a success.
func (b *backoff) reset() { b.delay, b.until = 0, time.Time{} }
