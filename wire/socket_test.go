package wire

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"sealfs"
)

// longDir returns a directory whose path alone is longer than a socket address.
func longDir(t *testing.T) string {
	dir := t.TempDir()
	for len(dir) <= 3*sunPathMax {
		dir = filepath.Join(dir, strings.Repeat("d", 60))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// answers reports whether l's socket takes connections that reach l.
func answers(t *testing.T, l net.Listener, path string) {
	t.Helper()
	accepted := make(chan error, 1)
	go func() {
		nc, err := l.Accept()
		if err == nil {
			nc.Close()
		}
		accepted <- err
	}()
	nc, err := DialUnix(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	nc.Close()
	if err := within(t, "the connection", accepted); err != nil {
		t.Fatal(err)
	}
}

func TestLongSocketPath(t *testing.T) {
	path := filepath.Join(longDir(t), "socket")
	l, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	answers(t, l, path)
	if l.Addr().String() != path {
		t.Errorf("the listener's address is %v", l.Addr())
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
	_, err = ListenUnix(filepath.Join(longDir(t), strings.Repeat("n", 100)))
	wantCode(t, err, sealfs.ErrNameTooLong)
	_, err = ListenUnix(filepath.Join(t.TempDir(), "no", "such", "directory"))
	if !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// TestStaleSocket: only what nobody answers at is replaced.
func TestStaleSocket(t *testing.T) {
	for _, dir := range []string{t.TempDir(), longDir(t)} {
		path := filepath.Join(dir, "socket")
		l, err := ListenUnix(path)
		if err != nil {
			t.Fatal(err)
		}
		_, err = ListenUnix(path)
		wantCode(t, err, sealfs.ErrBusy, path)
		answers(t, l, path) // the first attempt was not taken for a client to serve
		answers(t, l, path)

		// A process that dies leaves its socket: closing below the wrapper does the same.
		if err := l.(*unixListener).UnixListener.Close(); err != nil {
			t.Fatal(err)
		}
		l2, err := ListenUnix(path)
		if err != nil {
			t.Fatal(err)
		}
		answers(t, l2, path)
		l.Close() // the late close of the first must not remove the second's socket
		answers(t, l2, path)
		l2.Close()

		if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err = ListenUnix(path)
		wantCode(t, err, sealfs.ErrExist, path)
		if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
			t.Errorf("the file in the way is damaged: %q, %v", b, err)
		}
	}
}

// TestListenRace: of many that start over a stale socket at once, one wins.
func TestListenRace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	l, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*unixListener).UnixListener.Close()
	var won atomic.Int64
	var winner net.Listener
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			l, err := ListenUnix(path)
			if err == nil {
				winner = l
				won.Add(1)
			} else if !errors.Is(err, sealfs.ErrBusy) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Fatalf("%d listen at one path", won.Load())
	}
	defer winner.Close()
	if _, err := DialUnix(t.Context(), path); err != nil {
		t.Error(err)
	}
}
