package wire

import (
	"io"
	"net"
	"os"
	"syscall"
	"unsafe"
)

// rawMax is the longest transfer, in bytes, that is done without telling Go's
// scheduler: one that takes some ten microseconds at most.
const rawMax = 64 << 10

// rawParts is how many pieces of a gathering write go in one system call.
const rawParts = 16

// rawSocket is a socket whose short reads and writes do not tell Go's scheduler
// that they are system calls. They never wait, since the socket does not block,
// so that the scheduler has nothing to do about them; but being told wakes its
// monitor, which then looks around every 20 µs for a while, and that costs a server
// with few requests more than it takes to answer them. To wait it uses the
// network poller like any other connection, with its deadlines and Close.
//
// It may have one reader and one writer at a time.
type rawSocket struct {
	net.Conn
	raw syscall.RawConn

	// Of the reader and of the writer, for the functions that raw calls: made
	// once, they cost no allocation.
	in, out               transfer
	readReady, writeReady func(fd uintptr) bool
}

// transfer is a read or write under way.
type transfer struct {
	parts [][]byte // what is left of it
	n     int      // bytes done
	err   error
	vec   [rawParts]syscall.Iovec
}

// newRawSocket returns nc as a rawSocket, or as it is if it has no socket that
// does not block.
func newRawSocket(nc net.Conn) net.Conn {
	c, ok := nc.(syscall.Conn)
	if !ok {
		return nc
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nc
	}
	blocks := true
	err = raw.Control(func(fd uintptr) {
		flags, _, e := syscall.RawSyscall(syscall.SYS_FCNTL, fd, syscall.F_GETFL, 0)
		blocks = e != 0 || flags&syscall.O_NONBLOCK == 0
	})
	if err != nil || blocks {
		return nc
	}
	s := &rawSocket{Conn: nc, raw: raw}
	s.in.parts = make([][]byte, 1)
	s.out.parts = make([][]byte, 0, 1)
	s.readReady, s.writeReady = s.in.read, s.out.write
	return s
}

// Read is net.Conn's.
func (s *rawSocket) Read(p []byte) (int, error) {
	if len(p) == 0 || len(p) > rawMax {
		return s.Conn.Read(p)
	}
	t := &s.in
	t.parts[0], t.n, t.err = p, 0, nil
	err := s.raw.Read(s.readReady)
	t.parts[0] = nil
	switch {
	case t.n > 0:
		return t.n, nil
	case err != nil:
		return 0, err
	case t.err == nil:
		return 0, io.EOF
	}
	return 0, s.failure("read", t.err)
}

// Write is net.Conn's.
func (s *rawSocket) Write(p []byte) (int, error) {
	if len(p) == 0 || len(p) > rawMax {
		return s.Conn.Write(p)
	}
	s.out.parts = append(s.out.parts[:0], p)
	return s.send()
}

// CloseWrite tells the peer that nothing follows, if the kind of socket can.
func (s *rawSocket) CloseWrite() error {
	if w, ok := s.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return os.ErrInvalid
}

// writeParts writes parts, which have size bytes together, to nc and uses them up.
func writeParts(nc net.Conn, parts *net.Buffers, size int) (int, error) {
	if s, ok := nc.(*rawSocket); ok {
		if size <= rawMax {
			s.out.parts = append(s.out.parts[:0], *parts...)
			return s.send()
		}
		nc = s.Conn // package net gathers for its own types only
	}
	n, err := parts.WriteTo(nc)
	return int(n), err
}

// send writes what stands in out.
func (s *rawSocket) send() (int, error) {
	t := &s.out
	all := t.parts
	t.n, t.err = 0, nil
	err := s.raw.Write(s.writeReady)
	clear(all) // keep nothing alive
	t.parts = all[:0]
	if err == nil && t.err != nil {
		err = s.failure("write", t.err)
	}
	return t.n, err
}

func (s *rawSocket) failure(call string, err error) error {
	local := s.LocalAddr()
	return &net.OpError{Op: call, Net: local.Network(), Source: local, Addr: s.RemoteAddr(), Err: os.NewSyscallError(call, err)}
}

// read reads once. It reports false if it must be waited for.
func (t *transfer) read(fd uintptr) (done bool) {
	p := t.parts[0]
	n, e := retry(syscall.SYS_READ, fd, unsafe.Pointer(unsafe.SliceData(p)), len(p))
	switch e {
	case 0:
		t.n = n
	case syscall.EAGAIN:
		return false
	default:
		t.err = e
	}
	return true
}

// write writes until nothing is left. It reports false if it must be waited for.
func (t *transfer) write(fd uintptr) (done bool) {
	for len(t.parts) > 0 {
		var n int
		var e syscall.Errno
		if p := t.parts[0]; len(t.parts) == 1 {
			n, e = retry(syscall.SYS_WRITE, fd, unsafe.Pointer(unsafe.SliceData(p)), len(p))
		} else {
			n, e = t.gather(fd)
		}
		switch e {
		case 0:
		case syscall.EAGAIN:
			return false
		default:
			t.err = e
			return true
		}
		t.n += n
		for len(t.parts) > 0 && n >= len(t.parts[0]) {
			n -= len(t.parts[0])
			t.parts = t.parts[1:]
		}
		if n > 0 {
			t.parts[0] = t.parts[0][n:]
		}
	}
	return true
}

// gather writes several parts at once.
func (t *transfer) gather(fd uintptr) (int, syscall.Errno) {
	k := 0
	for ; k < min(len(t.parts), rawParts); k++ {
		t.vec[k].Base = unsafe.SliceData(t.parts[k])
		t.vec[k].SetLen(len(t.parts[k]))
	}
	n, e := retry(syscall.SYS_WRITEV, fd, unsafe.Pointer(&t.vec), k)
	clear(t.vec[:k])
	return n, e
}

// retry makes a system call that does not wait, again when a signal interrupted it.
func retry(call, fd uintptr, p unsafe.Pointer, n int) (int, syscall.Errno) {
	for {
		r, _, e := syscall.RawSyscall(call, fd, uintptr(p), uintptr(n))
		if e != syscall.EINTR {
			return int(r), e
		}
	}
}
