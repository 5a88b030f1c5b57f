package cluster

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// What a stranger can take of a manager.
const (
	connsMax      = 8192 // connections at one time; others are closed at once
	pendingMax    = 256  // of them such that have sent nothing yet
	headerMax     = 16 << 10
	headerTimeout = 5 * time.Second
	readTimeout   = 30 * time.Second // of a request with its body
	writeTimeout  = waitMax + 60*time.Second
	idleTimeout   = 90 * time.Second
	goodbye       = time.Second // for answers that are under way when Serve ends
)

// Serve answers on l: other managers, servers and clients. It blocks until ctx
// ends, which is no error, or the manager stops, and then closes l and all
// connections, and returns why.
func (m *Manager) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var work sync.WaitGroup
	defer work.Wait()
	s := &front{m: m, http: make(chan net.Conn), addr: l.Addr(), closed: make(chan struct{})}
	srv := &http.Server{
		Handler: m.Handler(), MaxHeaderBytes: headerMax, ReadHeaderTimeout: headerTimeout, ReadTimeout: readTimeout,
		WriteTimeout: writeTimeout, IdleTimeout: idleTimeout, ErrorLog: slog.NewLogLogger(m.o.Logger.Handler(), slog.LevelDebug),
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	served := make(chan error, 1)
	work.Go(func() { served <- srv.Serve(s) })
	accepted := make(chan error, 1)
	work.Go(func() { accepted <- s.accept(ctx, l) })
	var err error
	select {
	case <-ctx.Done():
	case <-m.ctx.Done():
	case <-m.latch.done:
	case err = <-accepted:
	case err = <-served:
	}
	cancel() // ends what waits: the answers are sent yet
	err = errors.Join(err, ignoreClosed(l.Close()))
	s.Close()
	ending, done := context.WithTimeout(context.Background(), goodbye)
	defer done()
	if srv.Shutdown(ending) != nil {
		srv.Close()
	}
	s.end()
	if failed := m.latch.Err(); failed != nil {
		return failed
	}
	return err
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// front tells managers' connections from HTTP. It is the listener of the HTTP server.
type front struct {
	m       *Manager
	http    chan net.Conn
	addr    net.Addr
	closed  chan struct{}
	once    sync.Once
	sniffs  sync.WaitGroup
	conns   atomic.Int64
	pending atomic.Int64

	mu      sync.Mutex
	waiting map[net.Conn]bool // have sent nothing yet
}

// accept takes connections until l is closed.
func (s *front) accept(ctx context.Context, l net.Listener) error {
	pause := 5 * time.Millisecond
	for {
		c, err := l.Accept()
		switch {
		case err == nil:
			pause = 5 * time.Millisecond
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			if ctx.Err() != nil {
				return nil
			}
			return err
		default:
			// Out of descriptors, most likely: others will be closed.
			s.m.o.Logger.Warn("cannot accept a connection", "error", err)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return nil
			}
			pause = min(2*pause, time.Second)
			continue
		}
		if s.conns.Load() >= connsMax || s.pending.Load() >= pendingMax {
			c.Close()
			continue
		}
		s.conns.Add(1)
		s.pending.Add(1)
		counted := &countedConn{Conn: c, front: s}
		s.sniffs.Go(func() {
			defer s.pending.Add(-1)
			s.sniff(counted)
		})
	}
}

// sniff reads the first bytes of a connection and passes it on.
func (s *front) sniff(c *countedConn) {
	if !s.wait(c, true) {
		c.Close()
		return
	}
	b := make([]byte, preambleLen)
	n := len(preambleMagic) // less than any HTTP request
	err := c.SetReadDeadline(time.Now().Add(preambleTimeout))
	if err == nil {
		_, err = io.ReadFull(c, b[:n])
	}
	if err == nil && string(b[:n]) == preambleMagic {
		_, err = io.ReadFull(c, b[n:])
		s.wait(c, false)
		switch {
		case err != nil || s.m.stream == nil:
			c.Close()
		default:
			if err := s.m.stream.receive(c, b); err != nil {
				c.Close()
				if !isNetwork(err) {
					s.m.o.Logger.Warn("a manager's connection", "error", err)
				}
			}
		}
		return
	}
	s.wait(c, false)
	if err == nil {
		err = c.SetReadDeadline(time.Time{})
	}
	if err != nil {
		c.Close()
		return
	}
	c.first = b[:n]
	select {
	case s.http <- c:
	case <-s.closed:
		c.Close()
	}
}

// wait notes that a connection has sent nothing yet, or that it has. It reports
// whether there is time left to wait.
func (s *front) wait(c net.Conn, yes bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !yes {
		delete(s.waiting, c)
		return true
	}
	select {
	case <-s.closed:
		return false
	default:
	}
	if s.waiting == nil {
		s.waiting = make(map[net.Conn]bool)
	}
	s.waiting[c] = true
	return true
}

// Accept implements net.Listener.
func (s *front) Accept() (net.Conn, error) {
	select {
	case c := <-s.http:
		return c, nil
	case <-s.closed:
		return nil, http.ErrServerClosed
	}
}

// Close implements net.Listener.
func (s *front) Close() error {
	s.once.Do(func() { close(s.closed) })
	return nil
}

// Addr implements net.Listener.
func (s *front) Addr() net.Addr { return s.addr }

// end closes the connections that have sent nothing, and waits for those who read them.
func (s *front) end() {
	s.mu.Lock()
	for c := range s.waiting {
		c.Close()
	}
	s.mu.Unlock()
	s.sniffs.Wait()
}

// countedConn is a connection that counts until it is closed, and whose first
// bytes were read already.
type countedConn struct {
	net.Conn
	front *front
	first []byte
	once  sync.Once
}

// Read implements net.Conn.
func (c *countedConn) Read(b []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(b, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}

// Close implements net.Conn.
func (c *countedConn) Close() error {
	c.once.Do(func() { c.front.conns.Add(-1) })
	return c.Conn.Close()
}

// headerText returns s as it may stand in a header.
func headerText(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}
