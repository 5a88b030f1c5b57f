package wire

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// rawPair returns both ends of a connection, ours with little room in the kernel.
func rawPair(t *testing.T, network string) (ours *rawSocket, theirs net.Conn) {
	t.Helper()
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(t.TempDir(), "s")
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	nc, err := net.Dial(network, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	if theirs, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	if err := nc.(interface{ SetWriteBuffer(int) error }).SetWriteBuffer(4096); err != nil {
		t.Fatal(err)
	}
	ours, ok := newRawSocket(nc).(*rawSocket)
	if !ok {
		t.Fatalf("a socket of %s is not used raw", network)
	}
	return ours, theirs
}

// TestRawWrites: what is written arrives whole and in order, in one piece or many,
// below and above the longest raw transfer, also when the kernel takes it bit by bit.
func TestRawWrites(t *testing.T) {
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			ours, theirs := rawPair(t, network)
			var want []byte
			for _, shape := range [][]int{{1}, {100, 5000}, {rawMax}, {rawMax + 1}, {1, rawMax}, {7, 3 * rawMax, 9},
				{3000, 1, 3000, 2, 3000, 3, 3000, 4, 3000, 5, 3000, 6, 3000, 7, 3000, 8, 3000, 9, 3000, 10, 3000}} {
				var parts net.Buffers
				size := 0
				for i, n := range shape {
					parts = append(parts, pattern(make([]byte, n), uint64(i+n)))
					size += n
				}
				whole := bytes.Join(parts, nil)
				want = append(append(want, whole...), whole...)
				got := make([]byte, 2*size)
				read := make(chan error, 1)
				go func() {
					_, err := io.ReadFull(theirs, got)
					read <- err
				}()
				if n, err := writeParts(ours, &parts, size); n != size || err != nil {
					t.Fatalf("%v: %d bytes written, %v", shape, n, err)
				}
				if n, err := ours.Write(whole); n != size || err != nil {
					t.Fatalf("%v: %d bytes written at once, %v", shape, n, err)
				}
				if err := within(t, "the other end", read); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, want[len(want)-2*size:]) {
					t.Fatalf("%v: other bytes arrived", shape)
				}
			}
		})
	}
}

// TestRawErrors: a raw socket fails as package net's do, which the ends of a
// connection judge by.
func TestRawErrors(t *testing.T) {
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			ours, theirs := rawPair(t, network)
			p := make([]byte, 100)
			if err := ours.SetReadDeadline(time.Unix(1, 0)); err != nil {
				t.Fatal(err)
			}
			if n, err := ours.Read(p); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("after the deadline: %d, %v", n, err)
			}
			if err := ours.SetReadDeadline(time.Time{}); err != nil {
				t.Fatal(err)
			}
			if _, err := theirs.Write(p[:60]); err != nil {
				t.Fatal(err)
			}
			if n, err := ours.Read(p); n != 60 || err != nil {
				t.Errorf("%d bytes, %v", n, err)
			}
			if err := ours.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if n, err := theirs.Read(p); n != 0 || err != io.EOF {
				t.Errorf("after CloseWrite: %d, %v", n, err)
			}
			if n, err := ours.Write(p); n != 0 || !errors.Is(err, syscall.EPIPE) {
				t.Errorf("write after CloseWrite: %d, %v", n, err)
			}
			theirs.Close()
			if n, err := ours.Read(p); n != 0 || err != io.EOF {
				t.Errorf("after their end: %d, %v", n, err)
			}
			ours.Close()
			for call, f := range map[string]func([]byte) (int, error){"read": ours.Read, "write": ours.Write} {
				n, err := f(p)
				if _, ok := errors.AsType[net.Error](err); n != 0 || !ok || !errors.Is(err, net.ErrClosed) {
					t.Errorf("%s after Close: %d, %v", call, n, err)
				}
			}
		})
	}
	ours, theirs := rawPair(t, "tcp")
	if err := theirs.(*net.TCPConn).SetLinger(0); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	n, err := ours.Read(make([]byte, 1))
	if _, ok := errors.AsType[net.Error](err); n != 0 || !ok || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("after a reset: %d, %v", n, err)
	}
}

// TestRawOnlySockets: what has no socket, or one that blocks, is used as it is.
func TestRawOnlySockets(t *testing.T) {
	here, there := net.Pipe()
	defer there.Close()
	defer here.Close()
	if newRawSocket(here) != here {
		t.Error("a pipe in memory is no socket")
	}
	ours, _ := rawPair(t, "tcp")
	err := ours.raw.Control(func(fd uintptr) {
		if err := syscall.SetNonblock(int(fd), false); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if newRawSocket(ours.Conn) != ours.Conn {
		t.Error("a socket that blocks would hold up the scheduler")
	}
}
