package router

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"sealfs"
	"sealfs/op"
	"sealfs/wire"
)

// BenchmarkLocal measures what the router adds to the call of a store in this
// process, beside that call alone.
func BenchmarkLocal(b *testing.B) {
	h := handlerFunc(func(_ context.Context, req *op.Request, rep *op.Reply) error {
		rep.Off = uint64(req.Shard)
		return nil
	})
	r := newRouter(b, makeMap(1, "", "", ""), Options{Local: func(sealfs.UUID) op.Handler { return h }})
	for name, h := range map[string]op.Handler{"direct": h, "router": r} {
		b.Run(name, func(b *testing.B) {
			req := op.Request{Type: op.Getattr, Ino: 5000}
			var rep op.Reply
			b.ReportAllocs()
			for b.Loop() {
				req.Shard = (req.Shard + 1) % testShards
				if err := h.Do(context.Background(), &req, &rep); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("router/parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			req := op.Request{Type: op.Getattr, Ino: 5000}
			var rep op.Reply
			for pb.Next() {
				if err := r.Do(context.Background(), &req, &rep); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

// BenchmarkRemote measures round trips to a handler that does nothing, over a
// connection alone and through the router.
func BenchmarkRemote(b *testing.B) {
	for _, network := range []string{"unix", "tcp"} {
		b.Run(network, func(b *testing.B) {
			f := newFake(b, network, func(context.Context, *op.Request, *op.Reply) error { return nil })
			c, err := wire.Dial(b.Context(), network, f.addr, wire.Options{Cluster: testCluster})
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			r := newRouter(b, makeMap(1, f.addr), Options{})
			for _, callers := range []int{1, 64} {
				b.Run(fmt.Sprintf("%d/wire", callers), func(b *testing.B) { benchCallers(b, callers, c) })
				b.Run(fmt.Sprintf("%d/router", callers), func(b *testing.B) { benchCallers(b, callers, r) })
			}
		})
	}
}

func benchCallers(b *testing.B, callers int, h op.Handler) {
	b.ReportAllocs()
	var left atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			req := op.Request{Type: op.Getattr, Ino: 5000}
			var rep op.Reply
			for left.Add(-1) >= 0 {
				rep.Reset()
				if err := h.Do(context.Background(), &req, &rep); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// BenchmarkTable measures what a new version of the map costs the first request.
func BenchmarkTable(b *testing.B) {
	addrs := make([]string, 1000)
	for i := range addrs {
		addrs[i] = fmt.Sprintf("192.0.2.1:%d", 1+i)
	}
	r := newRouter(b, makeMap(1, addrs...), Options{})
	b.ReportAllocs()
	for b.Loop() {
		r.Renew()
	}
}
