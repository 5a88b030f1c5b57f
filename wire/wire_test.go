package wire

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/op"
)

// Both ends against each other.

func TestEveryKind(t *testing.T) {
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			s := serve(t, network, echo, ServerOptions{Program: "server 1"})
			c := s.dial(t, Options{Program: "client 1"})
			check(t, c)
			if c.Cluster() != testCluster || c.Program() != "server 1" || c.Protocol() != ProtocolVersion {
				t.Errorf("cluster %v, program %q, protocol %d", c.Cluster(), c.Program(), c.Protocol())
			}
			if err := c.Err(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestLoneCaller holds the lock-step path to its system calls: one write and
// one read at each end, nobody woken, nothing allocated.
func TestLoneCaller(t *testing.T) {
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			s := serve(t, network, echo, ServerOptions{})
			c := s.dial(t, Options{})
			req := op.Request{Type: op.Getattr, Ino: 1000}
			var rep op.Reply
			do := func() {
				rep.Reset()
				if err := c.Do(context.Background(), &req, &rep); err != nil {
					t.Error(err)
				}
			}
			do()
			cs, ss := c.Stats(), s.Stats()
			const n = 500
			allocs := testing.AllocsPerRun(n-1, do) // and once to warm up
			cs2, ss2 := c.Stats(), s.Stats()
			if got := cs2.Writes - cs.Writes; got != n {
				t.Errorf("%d requests took %d writes", n, got)
			}
			if got := cs2.Reads - cs.Reads; got != n {
				t.Errorf("%d replies took %d reads", n, got)
			}
			if got := ss2.Reads - ss.Reads; got != n {
				t.Errorf("the server read %d times for %d requests", got, n)
			}
			if got := cs2.Wakeups - cs.Wakeups + cs2.Handoffs - cs.Handoffs; got != 0 {
				t.Errorf("%d goroutines were woken for a lone caller", got)
			}
			// A busy machine may make a request last longer than inlineMax.
			if got := ss2.Wakeups - ss.Wakeups; got > n/20 {
				t.Errorf("the server woke %d goroutines for %d requests of a lone caller", got, n)
			}
			if allocs > 0.5 && !raceEnabled {
				t.Errorf("a request allocates %v times", allocs)
			}
		})
	}
}

// TestReadInPlace: the data of a read lands in the caller's room.
func TestReadInPlace(t *testing.T) {
	s := serve(t, "unix", echo, ServerOptions{})
	c := s.dial(t, Options{})
	for _, n := range []int{100, 4096, 200000} {
		room := make([]byte, 7+n)
		rep := op.Reply{Data: room[:7]}
		if err := c.Do(t.Context(), &op.Request{Type: op.Read, Off: 3, Len: uint64(n)}, &rep); err != nil {
			t.Fatal(err)
		}
		if len(rep.Data) != 7+n || &rep.Data[0] != &room[0] {
			t.Errorf("%d bytes did not land in the room that was given", n)
		}
		if !bytes.Equal(rep.Data[7:], pattern(make([]byte, n), 3)) || !bytes.Equal(rep.Data[:7], make([]byte, 7)) {
			t.Errorf("%d bytes are wrong", n)
		}
	}
}

// TestConcurrent runs 64 callers of mixed requests, some of which give up.
func TestConcurrent(t *testing.T) {
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			s := serve(t, network, echo, ServerOptions{MaxInflightPerConn: 40, MaxInflightBytes: 4 << 20})
			c := s.dial(t, Options{})
			var wg sync.WaitGroup
			for caller := range 64 {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(caller), 1))
					data := make([]byte, 64<<10)
					var rep op.Reply
					for i := range 60 {
						ctx, cancel := context.WithCancel(context.Background())
						req := op.Request{Type: op.Getattr, Ino: sealfs.Ino(1000 + rng.IntN(1e6)), Off: rng.Uint64() >> 1}
						if rng.IntN(4) == 0 {
							time.AfterFunc(time.Duration(rng.IntN(300))*time.Microsecond, cancel)
						}
						size := rng.IntN(1 << rng.IntN(17))
						switch rng.IntN(8) {
						case 0:
							req.Type, req.Data = op.Write, pattern(data[:size], rng.Uint64())
						case 1:
							req.Type, req.Len = op.Read, uint64(size)
						case 2:
							req.Type = op.Sync
						case 3:
							req.Type = op.WaitLock
							time.AfterFunc(time.Duration(rng.IntN(1000))*time.Microsecond, cancel)
						case 4:
							req.Type, req.Name, req.Data = op.Setxattr, "user.y", pattern(data[:min(size, sealfs.XattrValueMax)], 5)
						}
						rep.Reset()
						err := c.Do(ctx, &req, &rep)
						switch {
						case errors.Is(err, sealfs.ErrInterrupted) && ctx.Err() != nil:
							// The caller may use its buffers again at once.
							clear(req.Data)
							rep = op.Reply{}
						case err != nil:
							t.Errorf("caller %d, request %d (%v): %v", caller, i, req.Type, err)
						case req.Type == op.Write && rep.Off != uint64(enc.CRC(0, req.Data)),
							req.Type == op.Read && !bytes.Equal(rep.Data, pattern(make([]byte, size), req.Off)),
							req.Type == op.Setxattr && !bytes.Equal(rep.Data, req.Data),
							req.Type == op.Getattr && (rep.Attr.Ino != req.Ino || rep.Attr.Size != req.Off):
							t.Errorf("caller %d, request %d (%v): answered wrongly", caller, i, req.Type)
						}
						cancel()
					}
				})
			}
			wg.Wait()
			check(t, c)
		})
	}
}

// TestBatching: many callers share writes and reads.
func TestBatching(t *testing.T) {
	for _, network := range networks {
		t.Run(network, func(t *testing.T) { testBatching(t, network) })
	}
}

func testBatching(t *testing.T, network string) {
	s := serve(t, network, echo, ServerOptions{})
	c := s.dial(t, Options{})
	const callers, each = 64, 200
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			req := op.Request{Type: op.Getattr, Ino: 1000}
			var rep op.Reply
			for range each {
				rep.Reset()
				if err := c.Do(context.Background(), &req, &rep); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	cs, ss := c.Stats(), s.Stats()
	if cs.FramesIn != callers*each+1 || ss.FramesIn != callers*each+1 {
		t.Errorf("%d and %d frames came in for %d requests", cs.FramesIn, ss.FramesIn, callers*each)
	}
	for what, n := range map[string]uint64{
		"the client's writes": cs.Writes, "the client's reads": cs.Reads,
		"the server's writes": ss.Writes, "the server's reads": ss.Reads,
	} {
		if n > callers*each/3 {
			t.Errorf("%s: %d for %d requests", what, n, callers*each)
		}
	}
	if cs.Handoffs > callers*each/3 {
		t.Errorf("the role of reader went from hand to hand %d times", cs.Handoffs)
	}
}

// TestGatheringWrite: what is queued while somebody writes goes in one write,
// payloads included.
func TestGatheringWrite(t *testing.T) {
	s := serve(t, "unix", echo, ServerOptions{})
	c := s.dial(t, Options{})
	// The role of writer is held by hand while the callers queue.
	c.out.mu.Lock()
	c.out.writing.Store(true)
	c.out.mu.Unlock()
	const n = 20
	var answers []<-chan error
	replies := make([]op.Reply, n)
	data := pattern(make([]byte, 4096), 1)
	for i := range n {
		answers = append(answers, start(context.Background(), c, &op.Request{Type: op.Write, Ino: 1000, Data: data}, &replies[i]))
	}
	eventually(t, "the callers to queue", func() bool {
		c.out.mu.Lock()
		defer c.out.mu.Unlock()
		return c.out.queue.frames == n
	})
	before := c.Stats()
	c.out.mu.Lock()
	c.out.write()
	for i, answer := range answers {
		if err := within(t, "an answer", answer); err != nil || replies[i].Off != uint64(enc.CRC(0, data)) {
			t.Errorf("request %d: %v", i, err)
		}
	}
	after := c.Stats()
	if w, f := after.Writes-before.Writes, after.FramesOut-before.FramesOut; w != 1 || f != n {
		t.Errorf("%d frames went in %d writes", f, w)
	}
}

// TestCancel: a caller that gives up gets ErrInterrupted with the cause, the
// server's handler hears of it, and the connection goes on.
func TestCancel(t *testing.T) {
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			begun, ended := make(chan struct{}), make(chan error, 1)
			s := serve(t, network, func(ctx context.Context, req *op.Request, rep *op.Reply) error {
				if req.Type != op.WaitLock {
					return echo(ctx, req, rep)
				}
				begun <- struct{}{}
				<-ctx.Done()
				ended <- ctx.Err()
				return ctx.Err()
			}, ServerOptions{})
			c := s.dial(t, Options{})
			for _, others := range []bool{false, true} { // as the reader, and as one that waits
				reason := errors.New("the user pressed ctrl-c")
				ctx, cancel := context.WithCancelCause(context.Background())
				var first <-chan error
				ctx1, cancel1 := context.WithCancel(context.Background())
				if others {
					first = start(ctx1, c, &op.Request{Type: op.WaitLock, Ino: 1}, new(op.Reply))
					within(t, "the first request", begun)
				}
				answer := start(ctx, c, &op.Request{Type: op.WaitLock, Ino: 2}, new(op.Reply))
				within(t, "the request", begun)
				cancel(reason)
				err := within(t, "the call to return", answer)
				wantCode(t, err, sealfs.ErrInterrupted, s.address)
				if !errors.Is(err, reason) {
					t.Errorf("%v does not wrap the cause", err)
				}
				if err := within(t, "the handler to end", ended); err != context.Canceled {
					t.Error(err)
				}
				check(t, c)
				cancel1()
				if others {
					wantCode(t, within(t, "the first call to return", first), sealfs.ErrInterrupted)
					within(t, "the first handler to end", ended)
				}
			}
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			frames := c.Stats().FramesOut
			wantCode(t, c.Do(ctx, &op.Request{Type: op.Sync}, new(op.Reply)), sealfs.ErrInterrupted)
			if c.Stats().FramesOut != frames {
				t.Error("a request was sent although its context was done")
			}
		})
	}
}

// TestReaderGivesUp: the reader is cancelled while others wait for their
// replies, again and again: the role is never lost.
func TestReaderGivesUp(t *testing.T) {
	release := make(chan struct{})
	s := serve(t, "unix", func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		if req.Type == op.Sync {
			select {
			case <-release:
			case <-ctx.Done():
			}
		}
		return nil
	}, ServerOptions{})
	c := s.dial(t, Options{})
	const n = 8
	var answers [n]<-chan error
	var cancels [n]context.CancelFunc
	for i := range n {
		var ctx context.Context
		ctx, cancels[i] = context.WithCancel(context.Background())
		defer cancels[i]()
		answers[i] = start(ctx, c, &op.Request{Type: op.Sync}, new(op.Reply))
	}
	eventually(t, "the requests to be sent", func() bool { return s.Stats().FramesIn == n+1 })
	for i := range n - 1 {
		cancels[i]()
		wantCode(t, within(t, "a call to return", answers[i]), sealfs.ErrInterrupted)
	}
	close(release)
	if err := within(t, "the last call", answers[n-1]); err != nil {
		t.Error(err)
	}
	if err := c.Do(t.Context(), &op.Request{Type: op.Getattr}, new(op.Reply)); err != nil {
		t.Error(err)
	}
}

// TestWaitersDoNotBlock: locks that are waited for use up no room of others,
// so that the unlock gets through; beyond their own limit they are refused.
func TestWaitersDoNotBlock(t *testing.T) {
	unlocked := make(chan struct{})
	s := serve(t, "unix", func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		switch req.Type {
		case op.WaitLock:
			select {
			case <-unlocked:
			case <-ctx.Done():
				return ctx.Err()
			}
		case op.SetLock:
			close(unlocked)
		}
		return nil
	}, ServerOptions{MaxInflightPerConn: 1, MaxWaitersPerConn: 5})
	c := s.dial(t, Options{})
	var answers []<-chan error
	for range 5 {
		answers = append(answers, start(context.Background(), c, &op.Request{Type: op.WaitLock}, new(op.Reply)))
	}
	eventually(t, "the waiters to be sent", func() bool { return s.Stats().FramesIn == 6 })
	var rep op.Reply
	if err := c.Do(t.Context(), &op.Request{Type: op.WaitLock}, &rep); err != nil || rep.Code != sealfs.ErrNoLocks {
		t.Errorf("a waiter too many: %v, %v", err, rep.Code)
	}
	if err := c.Do(t.Context(), &op.Request{Type: op.SetLock}, &rep); err != nil {
		t.Error(err)
	}
	for _, answer := range answers {
		if err := within(t, "a lock", answer); err != nil {
			t.Error(err)
		}
	}
}

// TestSlowHandler: a request that takes long on the reader's goroutine does not
// hold up the others of its connection.
func TestSlowHandler(t *testing.T) {
	for _, typ := range []op.Type{op.Getattr, op.Read, op.Write, op.Sync} {
		t.Run(typ.String(), func(t *testing.T) {
			begun, release := make(chan struct{}, 10), make(chan struct{})
			s := serve(t, "unix", func(ctx context.Context, req *op.Request, rep *op.Reply) error {
				if req.Ino == 666 {
					begun <- struct{}{}
					<-release
				}
				return echo(ctx, req, rep)
			}, ServerOptions{})
			c := s.dial(t, Options{})
			var answers []<-chan error
			for range 3 {
				answers = append(answers, start(context.Background(), c, &op.Request{Type: typ, Ino: 666}, new(op.Reply)))
				within(t, "a slow request", begun)
				check(t, c)
			}
			close(release)
			for _, answer := range answers {
				if err := within(t, "a slow answer", answer); err != nil {
					t.Error(err)
				}
			}
			check(t, c)
		})
	}
}

// TestConnectionLoss: all calls that wait, and all later ones, are ErrUnavailable
// and name the server.
func TestConnectionLoss(t *testing.T) {
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			s := serve(t, network, echo, ServerOptions{})
			c := s.dial(t, Options{})
			var answers []<-chan error
			for range 10 {
				answers = append(answers, start(context.Background(), c, &op.Request{Type: op.WaitLock}, new(op.Reply)))
			}
			eventually(t, "the requests to be sent", func() bool { return s.Stats().FramesIn == 11 })
			s.Server.mu.Lock()
			for sc := range s.conns {
				sc.kill()
			}
			s.Server.mu.Unlock()
			for _, answer := range answers {
				wantCode(t, within(t, "a call to return", answer), sealfs.ErrUnavailable, s.address)
			}
			within(t, "Done", c.Done())
			wantCode(t, c.Do(t.Context(), &op.Request{Type: op.Getattr}, new(op.Reply)), sealfs.ErrUnavailable, s.address)
			wantCode(t, c.Err(), sealfs.ErrUnavailable)
			check(t, s.dial(t, Options{})) // the server is still there for others
		})
	}
}

// TestClose: calls under way and later ones return ErrClosed.
func TestClose(t *testing.T) {
	s := serve(t, "unix", echo, ServerOptions{})
	c := s.dial(t, Options{})
	var answers []<-chan error
	for range 10 {
		answers = append(answers, start(context.Background(), c, &op.Request{Type: op.WaitLock}, new(op.Reply)))
	}
	eventually(t, "the requests to be sent", func() bool { return s.Stats().FramesIn == 11 })
	c.Close()
	for _, answer := range answers {
		wantCode(t, within(t, "a call to return", answer), sealfs.ErrClosed)
	}
	wantCode(t, c.Ping(t.Context()), sealfs.ErrClosed)
	c.Close()
}

// TestShutdown: what is under way is answered, waiters are sent home, and the
// clients learn why.
func TestShutdown(t *testing.T) {
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			begun, release := make(chan struct{}, 10), make(chan struct{})
			s := serve(t, network, func(ctx context.Context, req *op.Request, rep *op.Reply) error {
				if req.Type == op.Sync {
					begun <- struct{}{}
					<-release
					return ctx.Err() // the grace keeps it from being cancelled
				}
				return echo(ctx, req, rep)
			}, ServerOptions{Grace: patience})
			c, idle := s.dial(t, Options{}), s.dial(t, Options{})
			waiter := start(context.Background(), c, &op.Request{Type: op.WaitLock}, new(op.Reply))
			eventually(t, "the waiter", func() bool { return c.Stats().FramesOut == 2 })
			syncs := []<-chan error{
				start(context.Background(), c, &op.Request{Type: op.Sync}, new(op.Reply)),
				start(context.Background(), c, &op.Request{Type: op.Getattr, Ino: 1}, new(op.Reply)),
			}
			within(t, "the sync", begun)
			if err := within(t, "the getattr", syncs[1]); err != nil {
				t.Error(err)
			}
			stopped := make(chan struct{})
			go func() {
				s.stop()
				close(stopped)
			}()
			wantCode(t, within(t, "the waiter", waiter), sealfs.ErrUnavailable, "shuts down")
			// The waiter has been sent home: now the shutdown waits for the sync.
			close(release)
			if err := within(t, "the sync's answer", syncs[0]); err != nil {
				t.Error(err)
			}
			within(t, "the server to stop", stopped)
			wantCode(t, c.Do(t.Context(), &op.Request{Type: op.Getattr}, new(op.Reply)), sealfs.ErrUnavailable, "shuts down")
			wantCode(t, idle.Do(t.Context(), &op.Request{Type: op.Getattr}, new(op.Reply)), sealfs.ErrUnavailable, "shuts down")
			_, err := Dial(t.Context(), s.network, s.address, Options{})
			wantCode(t, err, sealfs.ErrUnavailable, s.address)
		})
	}
}

// TestShutdownForce: handlers that do not end get their context cancelled when
// the grace is over.
func TestShutdownForce(t *testing.T) {
	begun := make(chan struct{})
	s := serve(t, "unix", func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		close(begun)
		<-ctx.Done()
		return ctx.Err()
	}, ServerOptions{Grace: time.Millisecond})
	c := s.dial(t, Options{})
	answer := start(context.Background(), c, &op.Request{Type: op.Getattr}, new(op.Reply))
	within(t, "the request", begun)
	s.stop()
	if err := within(t, "the answer", answer); err == nil {
		t.Error("a request that never ended was answered")
	}
}

// TestRefusals: clients that may not talk to the server hear why.
func TestRefusals(t *testing.T) {
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			s := serve(t, network, echo, ServerOptions{MaxConns: 2})
			_, err := Dial(t.Context(), network, s.address, Options{Cluster: sealfs.UUID{9}})
			wantCode(t, err, sealfs.ErrInvalid, s.address, testCluster.String(), sealfs.UUID{9}.String())

			if c, err := Dial(t.Context(), network, s.address, Options{}); err != nil || c.Cluster() != testCluster {
				t.Errorf("a client that knows no cluster: %v", err)
			} else {
				c.Close()
			}
			eventually(t, "the connections to end", func() bool {
				s.Server.mu.Lock()
				defer s.Server.mu.Unlock()
				return len(s.conns) == 0
			})
			a, b := s.dial(t, Options{}), s.dial(t, Options{})
			_, err = Dial(t.Context(), network, s.address, Options{})
			wantCode(t, err, sealfs.ErrBusy, s.address, "2 connections")
			check(t, a)
			b.Close()
			eventually(t, "room for another connection", func() bool {
				c, err := Dial(t.Context(), network, s.address, Options{})
				if err == nil {
					c.Close()
				}
				return err == nil
			})
		})
	}
	_, err := Dial(t.Context(), "unix", t.TempDir()+"/nobody", Options{})
	wantCode(t, err, sealfs.ErrUnavailable, "nobody")
	if err := Serve(t.Context(), listen(t, "unix"), handlerFunc(echo), ServerOptions{}); !errors.Is(err, sealfs.ErrInvalid) {
		t.Errorf("a server without a cluster: %v", err)
	}
}

// TestMemoryBound: requests wait for memory instead of using more than allowed,
// and the client does not take that for death.
func TestMemoryBound(t *testing.T) {
	const size, limit = 64 << 10, 300 << 10
	var now, peak, calls atomic.Int64
	release := make(chan struct{})
	s := serve(t, "unix", func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		n := now.Add(int64(len(req.Data)))
		for p := peak.Load(); n > p && !peak.CompareAndSwap(p, n); p = peak.Load() {
		}
		if calls.Add(1) <= 4 {
			<-release
		}
		now.Add(int64(-len(req.Data)))
		return nil
	}, ServerOptions{MaxInflightBytes: limit})
	conns := []*Conn{s.dial(t, Options{}), s.dial(t, Options{})}
	var answers []<-chan error
	for i := range 40 {
		answers = append(answers, start(context.Background(), conns[i%2], &op.Request{Type: op.Write, Data: make([]byte, size)}, new(op.Reply)))
	}
	eventually(t, "the server to pause", func() bool {
		s.memory.mu.Lock()
		defer s.memory.mu.Unlock()
		return len(s.memory.queue) == 2
	})
	// While it pauses, it says that it lives.
	frames := conns[0].Stats().FramesIn
	eventually(t, "a sign of life", func() bool { return conns[0].Stats().FramesIn > frames })
	close(release)
	for _, answer := range answers {
		if err := within(t, "an answer", answer); err != nil {
			t.Fatal(err)
		}
	}
	if p := peak.Load(); p > limit {
		t.Errorf("requests held %d bytes, allowed are %d", p, limit)
	}
	// A request that is larger than all the memory there is runs alone.
	if err := conns[0].Do(t.Context(), &op.Request{Type: op.Write, Data: make([]byte, sealfs.IOMax)}, new(op.Reply)); err != nil {
		t.Error(err)
	}
}

// TestTooLong: what does not fit a frame is refused, at either end, and the
// connection goes on.
func TestTooLong(t *testing.T) {
	s := serve(t, "unix", func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		switch req.Type {
		case op.Readdir:
			for i := range replyHeadMax / 200 {
				rep.Entries = append(rep.Entries, op.Dirent{Name: strings.Repeat("n", 200), Ino: 1, Cookie: uint64(i)})
			}
			return nil
		case op.Listxattr:
			rep.Data = make([]byte, payloadMax+1)
			return nil
		}
		return echo(ctx, req, rep)
	}, ServerOptions{})
	c := s.dial(t, Options{})
	ctx := t.Context()
	wantCode(t, c.Do(ctx, &op.Request{Type: op.Readdir, Len: 1}, new(op.Reply)), sealfs.ErrRange)
	wantCode(t, c.Do(ctx, &op.Request{Type: op.Listxattr}, new(op.Reply)), sealfs.ErrRange)
	wantCode(t, c.Do(ctx, &op.Request{Type: op.Write, Data: make([]byte, payloadMax+1)}, new(op.Reply)), sealfs.ErrInvalid)
	wantCode(t, c.Do(ctx, &op.Request{Type: op.Setxattr, Data: make([]byte, op.EncodedMax)}, new(op.Reply)), sealfs.ErrInvalid)
	wantCode(t, c.Do(ctx, &op.Request{Type: op.Lookup, Name: strings.Repeat("n", 256)}, new(op.Reply)), sealfs.ErrInvalid, s.address)
	for range 3 {
		if err := c.Do(ctx, &op.Request{Type: op.Write, Data: make([]byte, payloadMax)}, new(op.Reply)); err != nil {
			t.Error(err)
		}
	}
	if err := c.Do(ctx, &op.Request{Type: op.Getattr}, new(op.Reply)); err != nil {
		t.Error(err)
	}
}

// TestSeveralListeners: one server, two listeners, shared limits.
func TestSeveralListeners(t *testing.T) {
	s := NewServer(handlerFunc(echo), ServerOptions{Cluster: testCluster})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, network := range networks {
		l := listen(t, network)
		wg.Go(func() {
			if err := s.Serve(ctx, l); err != nil {
				t.Error(err)
			}
		})
		check(t, dial(t, network, l.Addr().String(), Options{}))
	}
	if s.Stats().FramesIn == 0 {
		t.Error("no frames were counted")
	}
	cancel()
	wg.Wait()
}

// flakyListener fails some Accepts.
type flakyListener struct {
	net.Listener
	failures atomic.Int64
}

func (l *flakyListener) Accept() (net.Conn, error) {
	if l.failures.Add(-1) >= 0 {
		return nil, fmt.Errorf("no file descriptors")
	}
	return l.Listener.Accept()
}

// TestAcceptFails: a server outlives a shortage, and notices the end of its listener.
func TestAcceptFails(t *testing.T) {
	l := &flakyListener{Listener: listen(t, "unix")}
	l.failures.Store(3)
	ended := make(chan error, 1)
	go func() { ended <- Serve(t.Context(), l, handlerFunc(echo), ServerOptions{Cluster: testCluster}) }()
	check(t, dial(t, "unix", l.Addr().String(), Options{}))
	l.Close()
	if err := within(t, "Serve to return", ended); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}
