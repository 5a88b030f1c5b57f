package wire

import (
	"bytes"
	"context"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/op"
)

// Clients that take more than their share, while others are served.

// TestManyConnections: of ten thousand connections (or what the machine's file
// descriptors allow) the server keeps MaxConns; who was there before is served
// all the while, and when they are gone there is room again.
func TestManyConnections(t *testing.T) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	n := int(min(10000, (lim.Cur-min(lim.Cur/2, 200))/2)) // both ends are in this process
	if raceEnabled {
		n = min(n, 2000)
	}
	const most = 50
	for i, network := range networks {
		n := n >> (2 * i) // fewer over TCP, where each takes a port for a while
		t.Run(network, func(t *testing.T) {
			s := serve(t, network, echo, ServerOptions{MaxConns: most})
			good := s.dial(t, Options{})
			stop := make(chan struct{})
			served := make(chan int, 1)
			go func() {
				k := 0
				defer func() { served <- k }()
				for ; ; k++ {
					select {
					case <-stop:
						return
					default:
					}
					if err := good.Do(context.Background(), &op.Request{Type: op.Getattr, Ino: 1}, new(op.Reply)); err != nil {
						t.Error(err)
						return
					}
				}
			}()
			before := runtime.NumGoroutine()
			var flood []net.Conn
			for i := range n {
				nc, err := net.Dial(s.network, s.address)
				if err != nil {
					t.Fatalf("connection %d: %v", i, err)
				}
				flood = append(flood, nc)
				if i%2 == 0 { // the others do not even greet
					_, _ = nc.Write(frame(t, header{typ: typeHello}, &testHello, nil))
				}
				if i%500 == 0 {
					s.Server.mu.Lock()
					conns, refusers := len(s.conns), s.refusers
					s.Server.mu.Unlock()
					if conns > most || refusers > refusersMax {
						t.Fatalf("%d connections and %d refusals", conns, refusers)
					}
					if g := runtime.NumGoroutine() - before; g > 2*(most+refusersMax) {
						t.Fatalf("%d goroutines for %d connections", g, conns)
					}
				}
			}
			close(stop)
			if k := within(t, "the good client", served); k < 100 {
				t.Errorf("%d requests were served during the flood", k)
			}
			if _, err := Dial(t.Context(), s.network, s.address, Options{}); err == nil {
				t.Error("a connection beyond the limit was taken")
			}
			for _, nc := range flood {
				nc.Close()
			}
			eventually(t, "room for others", func() bool {
				c, err := Dial(t.Context(), s.network, s.address, Options{})
				if err == nil {
					c.Close()
				}
				return err == nil
			})
			check(t, good)
		})
	}
}

// TestNeverReads: clients that send and never read are held up at their limits
// and given up in time, whatever they send; others are served meanwhile.
func TestNeverReads(t *testing.T) {
	request := func(typ op.Type, n uint64) []byte {
		return frame(t, header{typ: typeRequest, id: 1}, &op.Request{Type: typ, Ino: 1, Len: n}, nil)
	}
	kinds := [][]byte{
		request(op.Read, 64<<10),
		request(op.Getattr, 0),
		request(op.Readdir, 100),
		request(op.Statfs, 0), // fails
		frame(t, header{typ: typeRequest, id: 1}, rawHead("\xffxxxx"), nil), // malformed
		frame(t, header{typ: typePing, id: 1}, nil, nil),
	}
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			t.Parallel() // most of it is waiting
			const inflight = 8
			// While a server pauses it says each pauseTick that it lives. With a Timeout
			// beyond that only the write that makes no progress can tell.
			const timeout = 2 * pauseTick
			var now, peak atomic.Int64
			s := serve(t, network, func(ctx context.Context, req *op.Request, rep *op.Reply) error {
				n := now.Add(1)
				for p := peak.Load(); n > p && !peak.CompareAndSwap(p, n); p = peak.Load() {
				}
				defer now.Add(-1)
				return echo(ctx, req, rep)
			}, ServerOptions{Timeout: timeout, MaxInflightPerConn: inflight, MaxInflightBytes: 64 << 20})
			good := s.dial(t, Options{Keepalive: 20 * time.Millisecond, Timeout: patience})
			var flood []net.Conn
			var writers sync.WaitGroup
			for _, kind := range kinds {
				nc := hostileClient(t, s).nc
				flood = append(flood, nc)
				if err := nc.(interface{ SetReadBuffer(int) error }).SetReadBuffer(4096); err != nil {
					t.Error(err)
				}
				writers.Go(func() {
					many := bytes.Repeat(kind, 64)
					for {
						if _, err := nc.Write(many); err != nil {
							return
						}
					}
				})
			}
			most, worst, left := 0, time.Duration(0), 2
			tick := time.NewTicker(time.Millisecond)
			defer tick.Stop()
			for end := time.Now().Add(patience); left > 1 && time.Now().Before(end); <-tick.C {
				begun := time.Now()
				if err := good.Do(context.Background(), &op.Request{Type: op.Getattr, Ino: 1}, new(op.Reply)); err != nil {
					t.Error(err)
					break
				}
				worst = max(worst, time.Since(begun))
				s.Server.mu.Lock()
				left = len(s.conns)
				for c := range s.conns {
					c.out.mu.Lock()
					most = max(most, c.out.queue.frames)
					c.out.mu.Unlock()
				}
				s.Server.mu.Unlock()
			}
			// The kernel of a client may have no room to notice that the server hung up.
			for _, nc := range flood {
				nc.Close()
			}
			writers.Wait()
			if left != 1 {
				t.Errorf("the server keeps %d connections", left)
			}
			// Besides the replies a pong each second says that the server pauses.
			if n := peak.Load(); most > inflight+2 || n > int64(len(kinds)*(inflight+1)+1) {
				t.Errorf("%d replies of one connection were queued, %d handlers ran at once", most, n)
			}
			if worst > patience/4 {
				t.Errorf("another client waited for %v", worst)
			}
			check(t, good)
		})
	}
}

// TestPeer: a server of the cluster is told apart from clients, and only where
// it may call.
func TestPeer(t *testing.T) {
	whoami := func(name string) handlerFunc {
		return func(_ context.Context, req *op.Request, rep *op.Reply) error {
			rep.Data = append(rep.Data, name...)
			return nil
		}
	}
	ask := func(c *Conn, typ op.Type) string {
		var rep op.Reply
		if err := c.Do(t.Context(), &op.Request{Type: typ, Len: 100}, &rep); err != nil {
			t.Error(err)
		}
		return string(rep.Data)
	}
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			s := serve(t, network, whoami("client"), ServerOptions{Peer: whoami("peer")})
			c, p := s.dial(t, Options{}), s.dial(t, Options{Peer: true})
			for _, typ := range []op.Type{op.Readlink, op.Sync, op.WaitLock, op.Read, op.Prepare} {
				if a, b := ask(c, typ), ask(p, typ); a != "client" || b != "peer" {
					t.Errorf("%v: the client is answered as %q, the peer as %q", typ, a, b)
				}
			}
			_, err := Dial(t.Context(), network, s.address, Options{Peer: true})
			wantCode(t, err, sealfs.ErrInvalid, "cluster's id", s.address)
			_, err = Dial(t.Context(), network, s.address, Options{Peer: true, Cluster: sealfs.UUID{9}})
			wantCode(t, err, sealfs.ErrInvalid, testCluster.String(), sealfs.UUID{9}.String())

			s = serve(t, network, whoami("client"), ServerOptions{})
			_, err = Dial(t.Context(), network, s.address, Options{Peer: true, Cluster: testCluster})
			wantCode(t, err, sealfs.ErrPerm, "other servers", s.address)
			if got := ask(s.dial(t, Options{}), op.Readlink); got != "client" {
				t.Errorf("a client is answered as %q", got)
			}
		})
	}
	t.Run("raw", func(t *testing.T) {
		s := serve(t, "unix", whoami("client"), ServerOptions{Peer: whoami("peer")})
		for name, c := range map[string]struct {
			h    hello
			code sealfs.Code
		}{
			"a peer of no cluster": {hello{2, 2, featurePeer, featurePeer, sealfs.UUID{}, "x"}, sealfs.ErrInvalid},
			"an unknown feature":   {hello{2, 2, 1<<40 | 3, 1<<40 | 3, testCluster, "x"}, sealfs.ErrVersion},
			"protocol 1":           {hello{1, 1, 0, 0, testCluster, "x"}, sealfs.ErrVersion},
		} {
			t.Run(name, func(t *testing.T) {
				nc, err := net.Dial(s.network, s.address)
				if err != nil {
					t.Fatal(err)
				}
				defer nc.Close()
				p := newPeer(t, nc)
				p.write(frame(t, header{typ: typeHello}, &c.h, nil))
				p.wantGoaway(c.code)
			})
		}
	})
}

// TestPeersHaveTheirMemory: clients that use up all memory for requests do not
// hold up peers.
func TestPeersHaveTheirMemory(t *testing.T) {
	const limit = 1 << 20
	release := make(chan struct{})
	begun := make(chan struct{}, 10)
	s := serve(t, "unix", func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		begun <- struct{}{}
		<-release
		return nil
	}, ServerOptions{MaxInflightBytes: limit, Peer: handlerFunc(echo)})
	c := s.dial(t, Options{})
	var answers []<-chan error
	for range 3 {
		answers = append(answers, start(context.Background(), c, &op.Request{Type: op.Write, Data: make([]byte, limit)}, new(op.Reply)))
	}
	within(t, "a write", begun)
	eventually(t, "another to wait for memory", func() bool {
		s.memory.mu.Lock()
		defer s.memory.mu.Unlock()
		return len(s.memory.queue) > 0
	})
	p := s.dial(t, Options{Peer: true})
	for _, typ := range []op.Type{op.Commit, op.Prepare, op.Sync} {
		if err := within(t, typ.String(), start(t.Context(), p, &op.Request{Type: typ}, new(op.Reply))); err != nil {
			t.Error(err)
		}
	}
	check(t, p)
	close(release)
	for _, a := range answers {
		if err := within(t, "a write", a); err != nil {
			t.Error(err)
		}
	}
}

// TestPreparesShareTime: Prepares that wait for a device do not wait for each other.
func TestPreparesShareTime(t *testing.T) {
	const n = 20
	var all sync.WaitGroup
	all.Add(n)
	s := serve(t, "tcp", echo, ServerOptions{Peer: handlerFunc(func(context.Context, *op.Request, *op.Reply) error {
		all.Done()
		all.Wait() // as for a flush that they share
		return nil
	})})
	p := s.dial(t, Options{Peer: true})
	var answers []<-chan error
	for range n {
		answers = append(answers, start(t.Context(), p, &op.Request{Type: op.Prepare}, new(op.Reply)))
	}
	for _, a := range answers {
		if err := within(t, "a Prepare", a); err != nil {
			t.Error(err)
		}
	}
	if h := s.Stats().Handoffs; h > 3 {
		t.Errorf("the role of reader went from hand to hand %d times", h)
	}
}

// TestSocketOptions: over TCP nothing waits to be sent together with later
// bytes, and the kernel watches over the connection, at both ends.
func TestSocketOptions(t *testing.T) {
	s := serve(t, "tcp", echo, ServerOptions{})
	c := s.dial(t, Options{})
	ends := []net.Conn{c.nc}
	s.Server.mu.Lock()
	for sc := range s.conns {
		ends = append(ends, sc.nc)
	}
	s.Server.mu.Unlock()
	for i, nc := range ends {
		raw, err := nc.(*rawSocket).Conn.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		err = raw.Control(func(fd uintptr) {
			for name, o := range map[string][2]int{"TCP_NODELAY": {unix.IPPROTO_TCP, unix.TCP_NODELAY}, "SO_KEEPALIVE": {unix.SOL_SOCKET, unix.SO_KEEPALIVE}} {
				if v, err := unix.GetsockoptInt(int(fd), o[0], o[1]); err != nil || v == 0 {
					t.Errorf("end %d: %s is %d, %v", i, name, v, err)
				}
			}
		})
		if err != nil {
			t.Error(err)
		}
	}
}
