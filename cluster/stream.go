package cluster

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"sealfs"
	"sealfs/internal/enc"
)

// A connection between managers begins with a preamble, which tells it from
// HTTP and keeps clusters and identities apart. What follows is Raft's.
//
//	off size field
//	  0    8 magic    "SEALFSr1"
//	  8   16 cluster
//	 24   16 from     manager that connects
//	 40   16 to       manager that is meant, zero if that is not known
//	 56    4 crc      CRC-32C of what is before
//
// The other side answers with one byte: 0, or why it refuses, and closes.
const (
	preambleMagic = "SEALFSr1"
	preambleLen   = 60

	preambleAccepted     = 0
	preambleOtherCluster = 1
	preambleOtherManager = 2
	preambleStopped      = 3
	preambleDamaged      = 4
	preambleBusy         = 5

	// preambleTimeout bounds the wait for the start of a connection.
	preambleTimeout = 5 * time.Second
	// raftConnsMax bounds the connections from other managers.
	raftConnsMax = 64
)

var preambleText = []string{
	preambleOtherCluster: "it belongs to another cluster", preambleOtherManager: "another manager is there",
	preambleStopped: "it has stopped", preambleDamaged: "it does not understand this manager", preambleBusy: "it has too many connections",
}

func preamble(cluster, from, to sealfs.UUID) []byte {
	b := append([]byte(preambleMagic), cluster[:]...)
	b = append(append(b, from[:]...), to[:]...)
	return enc.AppendU32(b, enc.CRC(0, b))
}

// stream carries Raft's connections. It is Raft's way out, and gets those that
// come in from Serve.
type stream struct {
	m    *Manager
	raft atomic.Pointer[raft.Raft] // nil at first
	in   chan net.Conn

	mu     sync.Mutex
	conns  map[*raftConn]bool // open ones; true: accepted
	closed chan struct{}
}

func newStream(m *Manager) *stream {
	return &stream{m: m, in: make(chan net.Conn), conns: make(map[*raftConn]bool), closed: make(chan struct{})}
}

// raftConn is a connection that ends with its stream.
type raftConn struct {
	net.Conn
	s *stream
}

// Close closes the connection.
func (c *raftConn) Close() error {
	c.s.mu.Lock()
	delete(c.s.conns, c)
	c.s.mu.Unlock()
	return c.Conn.Close()
}

// keep returns c as one that ends with the stream, and whether that is so: not
// if the stream has ended, or if too many were accepted.
func (s *stream) keep(c net.Conn, accepted bool) (*raftConn, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, a := range s.conns {
		if a {
			n++
		}
	}
	if s.isClosed() || accepted && n >= raftConnsMax {
		return nil, false
	}
	rc := &raftConn{c, s}
	s.conns[rc] = accepted
	return rc, true
}

func (s *stream) isClosed() bool {
	select {
	case <-s.closed:
		return true
	default:
		return false
	}
}

// Accept implements net.Listener.
func (s *stream) Accept() (net.Conn, error) {
	select {
	case c := <-s.in:
		return c, nil
	case <-s.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener. It closes all connections too, which raft does not.
func (s *stream) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isClosed() {
		return nil
	}
	close(s.closed)
	for c := range s.conns {
		c.Conn.Close()
	}
	clear(s.conns)
	return nil
}

// Addr implements net.Listener: the address that others use.
func (s *stream) Addr() net.Addr { return advertised(s.m.o.Addr) }

type advertised string

// Network implements net.Addr.
func (advertised) Network() string { return "tcp" }

// String implements net.Addr.
func (a advertised) String() string { return string(a) }

// Dial implements raft.StreamLayer.
func (s *stream) Dial(addr raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	deadline := time.Now().Add(timeout)
	c, err := (&net.Dialer{Deadline: deadline}).DialContext(s.m.ctx, "tcp", string(addr))
	if err != nil {
		return nil, err
	}
	if err := s.greet(c, addr, deadline); err != nil {
		c.Close()
		return nil, err
	}
	rc, ok := s.keep(c, false)
	if !ok {
		c.Close()
		return nil, net.ErrClosed
	}
	return rc, nil
}

func (s *stream) greet(c net.Conn, addr raft.ServerAddress, deadline time.Time) error {
	if err := c.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err := c.Write(preamble(s.m.cluster, s.m.id, s.meant(addr))); err != nil {
		return err
	}
	var answer [1]byte
	if _, err := io.ReadFull(c, answer[:]); err != nil {
		return err
	}
	if a := int(answer[0]); a != preambleAccepted {
		why := fmt.Sprintf("answer %d", a)
		if a < len(preambleText) {
			why = preambleText[a]
		}
		return &net.OpError{Op: "dial", Net: "tcp", Addr: advertised(addr), Err: fmt.Errorf("the manager refuses: %s", why)}
	}
	return c.SetDeadline(time.Time{})
}

// meant returns which manager is expected at addr, zero if that is not known.
// Raft believes whoever answers: if an address is given to another manager, the
// one that left it would seem to have stored what it never got.
func (s *stream) meant(addr raft.ServerAddress) (id sealfs.UUID) {
	r := s.raft.Load()
	if r == nil {
		return id
	}
	if f := r.GetConfiguration(); f.Error() == nil {
		for _, server := range f.Configuration().Servers {
			if server.Address == addr {
				id, _ = sealfs.ParseUUID(string(server.ID))
			}
		}
	}
	return id
}

// receive judges the preamble of a connection and passes it to raft. On failure
// the caller closes it.
func (s *stream) receive(c net.Conn, b []byte) error {
	answer := byte(preambleAccepted)
	r := enc.Reader{B: b}
	r.Bytes(len(preambleMagic))
	cluster, from, to, sum := readUUID(&r), readUUID(&r), readUUID(&r), r.U32()
	switch {
	case !r.Done() || sum != enc.CRC(0, b[:preambleLen-4]):
		answer = preambleDamaged
	case cluster != s.m.cluster:
		answer = preambleOtherCluster
	case !to.IsZero() && to != s.m.id || from == s.m.id:
		answer = preambleOtherManager
	case s.m.latch.Err() != nil || s.isClosed():
		answer = preambleStopped
	}
	var rc *raftConn
	if answer == preambleAccepted {
		var ok bool
		if rc, ok = s.keep(c, true); !ok {
			answer = preambleBusy
		}
	}
	err := c.SetDeadline(time.Now().Add(preambleTimeout))
	if err == nil {
		_, err = c.Write([]byte{answer})
	}
	if err == nil {
		err = c.SetDeadline(time.Time{})
	}
	switch {
	case answer != preambleAccepted:
		return fmt.Errorf("refused manager %s of cluster %s at %s: %s", from, cluster, c.RemoteAddr(), preambleText[answer])
	case err != nil:
		rc.Close()
		return err
	}
	select {
	case s.in <- rc:
		return nil
	case <-s.closed:
		return net.ErrClosed
	}
}

// isNetwork reports whether an error only says that another manager is away.
func isNetwork(err error) bool {
	_, ok := errors.AsType[net.Error](err)
	return ok || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrUnexpectedEOF)
}
