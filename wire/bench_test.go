package wire

import (
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sealfs"
	"sealfs/op"
)

// BenchmarkRoundTrip measures requests to a handler that does nothing, beside
// the least that a round trip over the same socket can cost: bytes of the same
// number written and read in lock-step.
func BenchmarkRoundTrip(b *testing.B) {
	for _, network := range []string{"unix", "tcp"} {
		for _, size := range []int{16, 4096} {
			b.Run(fmt.Sprintf("%s/%dB/raw", network, size), func(b *testing.B) {
				nc, there, back := benchRaw(b, network, headerSize+16+size, headerSize+3)
				for b.Loop() {
					if _, err := nc.Write(there); err != nil {
						b.Fatal(err)
					}
					if _, err := io.ReadFull(nc, back); err != nil {
						b.Fatal(err)
					}
				}
			})
			for _, callers := range []int{1, 64} {
				b.Run(fmt.Sprintf("%s/%dB/write/%d", network, size, callers), func(b *testing.B) {
					benchCalls(b, network, callers, op.Request{Type: op.Write, Ino: 5000, Data: make([]byte, size)})
				})
				b.Run(fmt.Sprintf("%s/%dB/read/%d", network, size, callers), func(b *testing.B) {
					benchCalls(b, network, callers, op.Request{Type: op.Read, Ino: 5000, Len: uint64(size)})
				})
			}
		}
		for _, callers := range []int{1, 64} {
			b.Run(fmt.Sprintf("%s/getattr/%d", network, callers), func(b *testing.B) {
				benchCalls(b, network, callers, op.Request{Type: op.Getattr, Ino: 5000})
			})
		}
	}
}

// BenchmarkLoneReader measures, turn by turn, the round trip of a lone caller
// that reads, and that of the same bytes over a socket of their own in lock-step:
// the second is what the machine allows at best.
func BenchmarkLoneReader(b *testing.B) {
	for _, network := range []string{"unix", "tcp"} {
		for _, size := range []int{16, 4096} {
			b.Run(fmt.Sprintf("%s/%dB", network, size), func(b *testing.B) {
				c, _ := benchServe(b, network)
				req := op.Request{Type: op.Read, Ino: 5000, Len: uint64(size)}
				rep := op.Reply{Data: make([]byte, 0, sealfs.BlockSize)}
				raw, there, back := benchRaw(b, network, headerSize+len(req.AppendTo(nil)), headerSize+3+size)
				var ours, least time.Duration
				const turn = 100
				for range b.N/turn + 1 {
					begun := time.Now()
					for range turn {
						rep.Reset()
						if err := c.Do(context.Background(), &req, &rep); err != nil {
							b.Fatal(err)
						}
					}
					between := time.Now()
					for range turn {
						if _, err := raw.Write(there); err != nil {
							b.Fatal(err)
						}
						if _, err := io.ReadFull(raw, back); err != nil {
							b.Fatal(err)
						}
					}
					ours += between.Sub(begun)
					least += time.Since(between)
				}
				n := float64(b.N/turn+1) * turn
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(float64(ours)/n, "wire-ns/op")
				b.ReportMetric(float64(least)/n, "raw-ns/op")
				b.ReportMetric(float64(ours)/float64(least), "wire/raw")
			})
		}
	}
}

func benchListen(b *testing.B, network string) (net.Listener, string) {
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(b.TempDir(), "s")
	}
	l, err := net.Listen(network, address)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	return l, l.Addr().String()
}

// benchRaw returns a connection whose other end answers messages of as many
// bytes as there with as many as back, in lock-step.
func benchRaw(b *testing.B, network string, request, reply int) (nc net.Conn, there, back []byte) {
	l, address := benchListen(b, network)
	go func() {
		nc, err := l.Accept()
		if err != nil {
			return
		}
		defer nc.Close()
		in, out := make([]byte, request), make([]byte, reply)
		for {
			if _, err := io.ReadFull(nc, in); err != nil {
				return
			}
			if _, err := nc.Write(out); err != nil {
				return
			}
		}
	}()
	nc, err := net.Dial(network, address)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { nc.Close() })
	return nc, make([]byte, request), make([]byte, reply)
}

// benchServe returns both ends of a connection to a server whose handler does next to nothing.
func benchServe(b *testing.B, network string) (*Conn, *Server) {
	l, address := benchListen(b, network)
	data := make([]byte, sealfs.BlockSize)
	h := handlerFunc(func(_ context.Context, req *op.Request, rep *op.Reply) error {
		switch req.Type {
		case op.Read:
			rep.Data = append(rep.Data, data[:req.Len]...)
		case op.Getattr:
			rep.Attr = op.Attr{Ino: req.Ino, Mode: 0o100644, Nlink: 1, Mtime: 1763726215123456789}
		}
		return nil
	})
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error)
	s := NewServer(h, ServerOptions{Cluster: testCluster})
	go func() { served <- s.Serve(ctx, l) }()
	c, err := Dial(ctx, network, address, Options{Cluster: testCluster})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		c.Close()
		cancel()
		if err := <-served; err != nil {
			b.Error(err)
		}
	})
	return c, s
}

func benchCalls(b *testing.B, network string, callers int, req op.Request) {
	c, s := benchServe(b, network)
	b.ReportAllocs()
	b.ResetTimer()
	var left atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			req := req
			rep := op.Reply{Data: make([]byte, 0, sealfs.BlockSize)}
			for left.Add(-1) >= 0 {
				rep.Reset()
				if err := c.Do(context.Background(), &req, &rep); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	cs, ss, n := c.Stats(), s.Stats(), float64(b.N)
	calls := float64(cs.Reads + cs.Writes + ss.Reads + ss.Writes) // of both ends
	b.ReportMetric(calls/n, "syscalls/op")
	b.ReportMetric(n/float64(max(cs.Writes, 1)), "reqs/write")
	b.ReportMetric(float64(cs.Wakeups+ss.Wakeups)/n, "wakeups/op")
}
