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

	"sealfs"
	"sealfs/op"
)

// BenchmarkRoundTrip measures requests to a handler that does nothing, beside
// the least that a round trip over the same socket can cost: bytes of the same
// number written and read in lock-step.
func BenchmarkRoundTrip(b *testing.B) {
	for _, network := range []string{"unix", "tcp"} {
		for _, size := range []int{16, 4096} {
			b.Run(fmt.Sprintf("%s/%dB/raw", network, size), func(b *testing.B) { benchRaw(b, network, size) })
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

func benchRaw(b *testing.B, network string, size int) {
	l, address := benchListen(b, network)
	n := headerSize + 16 + size
	go func() {
		nc, err := l.Accept()
		if err != nil {
			return
		}
		defer nc.Close()
		buf := make([]byte, n)
		for {
			if _, err := io.ReadFull(nc, buf); err != nil {
				return
			}
			if _, err := nc.Write(buf[:headerSize+3]); err != nil {
				return
			}
		}
	}()
	nc, err := net.Dial(network, address)
	if err != nil {
		b.Fatal(err)
	}
	defer nc.Close()
	buf := make([]byte, n)
	for b.Loop() {
		if _, err := nc.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(nc, buf[:headerSize+3]); err != nil {
			b.Fatal(err)
		}
	}
}

func benchCalls(b *testing.B, network string, callers int, req op.Request) {
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
	ctx, cancel := context.WithCancel(b.Context())
	served := make(chan error)
	s := NewServer(h, ServerOptions{Cluster: testCluster})
	go func() { served <- s.Serve(ctx, l) }()
	c, err := Dial(ctx, network, address, Options{Cluster: testCluster})
	if err != nil {
		b.Fatal(err)
	}
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
	b.ReportMetric(float64(cs.Reads+cs.Writes+ss.Reads+ss.Writes)/n, "syscalls/op")
	b.ReportMetric(float64(cs.Wakeups+ss.Wakeups)/n, "wakeups/op")
	c.Close()
	cancel()
	if err := <-served; err != nil {
		b.Fatal(err)
	}
}
