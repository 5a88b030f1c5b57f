package client

import (
	"context"
	"fmt"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"sealfs"
	"sealfs/op"
)

// unsureHandler loses the answers of requests for locks when it is told to: the server grants
// them, and is away then.
type unsureHandler struct {
	op.Handler
	lose atomic.Bool
	lost chan struct{} // gets a token for each
}

func (h *unsureHandler) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	if h.lose.Load() && (req.Type == op.WaitLock || req.Type == op.SetLock) {
		err := h.Handler.Do(ctx, req, rep)
		rep.Reset()
		select {
		case h.lost <- struct{}{}:
		default:
		}
		return fmt.Errorf("the answer is lost: %w: %w", err, sealfs.ErrUnavailable)
	}
	return h.Handler.Do(ctx, req, rep)
}

// TestUnsureLocks: who is interrupted while a lock may have been granted, has afterwards what he had
// before, and nobody else notices.
func TestUnsureLocks(t *testing.T) {
	u := newCluster()
	_, net := u.client(t, 7, Options{})
	h := &unsureHandler{Handler: net, lost: make(chan struct{}, 1)}
	c := u.clientOf(t, net, h, 8, Options{})
	ctx := context.Background()
	a, err := c.Create(ctx, u.root, "f", 0o600, Cred{})
	if err != nil {
		t.Fatal(err)
	}
	f := newFilesystem(c, MountOptions{})
	handle := f.handle(a.Ino)
	request := func(kind uint32, owner, start, end uint64, flags uint32) *fuse.LkIn {
		in := &fuse.LkIn{Fh: handle, Owner: owner, Lk: fuse.FileLock{Typ: kind, Start: start, End: end}, LkFlags: flags}
		in.NodeId = uint64(a.Ino)
		return in
	}
	never := make(chan struct{})
	set := func(kind uint32, owner, start, end uint64, flags uint32) {
		t.Helper()
		if st := f.SetLkw(never, request(kind, owner, start, end, flags)); !st.Ok() {
			t.Fatal(st)
		}
	}
	// interrupted asks for a lock, and gives up when its answer is lost.
	interrupted := func(kind uint32, owner, start, end uint64, flags uint32) {
		t.Helper()
		select {
		case <-h.lost:
		default:
		}
		h.lose.Store(true)
		cancel, got := make(chan struct{}), make(chan fuse.Status, 1)
		go func() { got <- f.SetLkw(cancel, request(kind, owner, start, end, flags)) }()
		<-h.lost
		close(cancel)
		if st := <-got; st != fuse.EINTR {
			t.Fatalf("interrupted: %v", st)
		}
		h.lose.Store(false)
	}
	// held returns what an owner holds, byte by byte.
	held := func(owner uint64, n uint64, flags op.Flags) string {
		t.Helper()
		b := make([]byte, n)
		for i := range b {
			l := op.Lock{Type: op.WriteLock, Start: uint64(i), End: uint64(i), Owner: 99}
			for _, as := range []uint64{99, owner} { // what is in the way of others, and not of him, is his
				l.Owner = as
				got, err := c.TestLock(ctx, a.Ino, l, flags)
				if err != nil {
					t.Fatal(err)
				}
				switch {
				case as == owner && got.Type != op.Unlock:
					b[i] = 'x'
				case as == 99:
					b[i] = "-rw"[got.Type]
				}
			}
		}
		return string(b)
	}
	const owner = 5
	set(syscall.F_RDLCK, owner, 2, 5, 0)
	set(syscall.F_WRLCK, owner, 8, 9, 0)
	for range 5 {
		interrupted(syscall.F_WRLCK, owner, 4, 12, 0)
		// The next request of the owner comes after all is as it was.
		set(syscall.F_RDLCK, owner, 14, 14, 0)
		if got, want := held(owner, 16, 0), "--rrrr--ww----r-"; got != want {
			t.Errorf("after an interrupted wait: %s, want %s", got, want)
		}
		set(syscall.F_UNLCK, owner, 14, 14, 0)
	}
	interrupted(syscall.F_WRLCK, 6, 0, 1, 0)
	set(syscall.F_RDLCK, 6, 14, 14, 0)
	if got, want := held(owner, 16, 0), "--rrrr--ww----x-"; got != want {
		t.Errorf("after another one's interrupted wait: %s, want %s", got, want)
	}
	interrupted(syscall.F_WRLCK, owner, 0, 1<<63-1, fuse.LK_FLOCK)
	set(syscall.F_WRLCK, 7, 0, 1<<63-1, fuse.LK_FLOCK) // which would wait for ever
	// What the process closes goes, and the open file with its handle.
	if !f.locks.closed(a.Ino, 6) || f.locks.closed(a.Ino, 6) {
		t.Error("a process that closes the file had locks, once")
	}
	if got := fmt.Sprint(f.locks.released(a.Ino, handle)); got != "[5]" {
		t.Errorf("with the handle go %s", got)
	}
	if len(f.locks.owners) != 0 {
		t.Errorf("left: %v", f.locks.owners)
	}
}

// TestDoubtfulSession: a write is told at once that the session has ended when by the client's own
// clock it may have, and goes on when it has not.
func TestDoubtfulSession(t *testing.T) {
	u := newCluster()
	c, _ := u.lone(t, 7, Options{})
	a, err := c.Create(context.Background(), u.root, "f", 0o600, Cred{})
	if err != nil {
		t.Fatal(err)
	}
	f := newFilesystem(c, MountOptions{})
	fh := f.handle(a.Ino)
	write := func() fuse.Status {
		in := &fuse.WriteIn{Fh: fh}
		in.NodeId = uint64(a.Ino)
		_, st := f.Write(make(chan struct{}), in, []byte("x"))
		return st
	}
	if st := write(); !st.Ok() || c.dirtyCount.Load() != 1 {
		t.Fatalf("write: %v, %d buffers", st, c.dirtyCount.Load())
	}
	c.Renewed(time.Now().Add(time.Hour))
	if st := write(); !st.Ok() || c.dirtyCount.Load() != 1 {
		t.Fatalf("write: %v, %d buffers", st, c.dirtyCount.Load())
	}
	c.Renewed(time.Now().Add(-time.Second)) // no manager has answered since
	if st := write(); !st.Ok() || c.dirtyCount.Load() != 0 {
		t.Fatalf("write in doubt: %v, %d buffers", st, c.dirtyCount.Load())
	}
	u.model.EndSession(7)
	if st := write(); st != fuse.EIO {
		t.Fatalf("write after the end: %v", st)
	}
}
