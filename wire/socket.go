package wire

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sealfs"
)

// sunPathMax is the longest path that fits a socket address, in bytes (108 with its NUL).
const sunPathMax = 107

// listenLockMax is how long ListenUnix waits for others that are about to
// listen in the same directory; each of them needs microseconds.
const listenLockMax = 2 * time.Second

// viaFD returns a path of bounded length for the socket at path: where path is too
// long for a socket address, it leads through the opened directory, which must
// stay open (dir, may be nil) until the address has been used.
func viaFD(path string) (short string, dir *os.File, err error) {
	if strings.HasPrefix(path, "@") { // package net would take it for an abstract name
		path = "./" + path
	}
	if len(path) <= sunPathMax {
		return path, nil, nil
	}
	dir, err = os.OpenFile(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return "", nil, err
	}
	short = "/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + filepath.Base(path)
	if len(short) > sunPathMax {
		dir.Close()
		return "", nil, fmt.Errorf("socket name %q is too long: %w", filepath.Base(path), sealfs.ErrNameTooLong)
	}
	return short, dir, nil
}

// DialUnix connects to the unix socket at path, which may be longer than a
// socket address allows.
func DialUnix(ctx context.Context, path string) (net.Conn, error) {
	short, dir, err := viaFD(path)
	if err != nil {
		return nil, err
	}
	if dir != nil {
		defer dir.Close()
	}
	var d net.Dialer
	return d.DialContext(ctx, "unix", short)
}

// ListenUnix listens at path, which may be longer than a socket address allows;
// only the owner may connect. A socket left behind by a dead process is
// replaced, one that somebody answers at is ErrBusy, and anything else in the
// way is ErrExist. Closing the listener removes the socket.
func ListenUnix(path string) (net.Listener, error) {
	l, err := listenUnix(path)
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", path, err)
	}
	return l, nil
}

func listenUnix(path string) (net.Listener, error) {
	// Two servers that start at once must not remove each other's socket:
	// looking, removing and binding happen under a lock of the directory.
	lock, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	for deadline := time.Now().Add(listenLockMax); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, os.NewSyscallError("flock", err)
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("somebody keeps the directory locked: %w", sealfs.ErrBusy)
		}
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	short, dir, err := viaFD(path)
	if err != nil {
		return nil, err
	}
	if dir != nil {
		defer dir.Close()
	}
	nl, err := net.Listen("unix", short)
	if err != nil {
		return nil, err
	}
	l := &unixListener{UnixListener: nl.(*net.UnixListener), path: path}
	l.SetUnlinkOnClose(false) // it would use the short path, which leads nowhere by then
	if err = os.Chmod(path, 0o600); err == nil {
		l.inode, err = os.OpenFile(path, unix.O_PATH|unix.O_NOFOLLOW, 0)
	}
	if err != nil {
		l.UnixListener.Close()
		os.Remove(path)
		return nil, err
	}
	return l, nil
}

// removeStale removes the socket at path if nobody listens there.
func removeStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("%v is in the way: %w", fi.Mode(), sealfs.ErrExist)
	}
	nc, err := DialUnix(context.Background(), path)
	if err == nil {
		nc.Close()
		return fmt.Errorf("another server answers there: %w", sealfs.ErrBusy)
	}
	if errors.Is(err, syscall.EAGAIN) { // its backlog is full
		return fmt.Errorf("another server is busy there: %w", sealfs.ErrBusy)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return err
	}
	return os.Remove(path)
}

// unixListener removes its socket, and nobody else's, when it is closed.
type unixListener struct {
	*net.UnixListener
	path  string
	inode *os.File // keeps the socket's inode number from being used again
	once  sync.Once
}

// Addr returns the path that the listener was opened with.
func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Net: "unix", Name: l.path} }

// Close removes the socket first, so that nobody connects to what does not accept.
func (l *unixListener) Close() error {
	l.once.Do(func() {
		defer l.inode.Close()
		ours, err := l.inode.Stat()
		if err != nil {
			return
		}
		if fi, err := os.Lstat(l.path); err == nil && os.SameFile(fi, ours) {
			os.Remove(l.path)
		}
	})
	return l.UnixListener.Close()
}
