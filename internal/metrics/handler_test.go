package metrics

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sealfs"
	"sealfs/op"
)

// handlerFunc is an op.Handler.
type handlerFunc func(ctx context.Context, req *op.Request, rep *op.Reply) error

func (f handlerFunc) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	return f(ctx, req, rep)
}

// TestClasses has every code of the project in one class.
func TestClasses(t *testing.T) {
	want := map[class]string{
		classRefused:     "1 2 3 4 5 6 7 8 9 12 13 14 15 16 20 21 22 32 33 34",
		classFull:        "10 11 19",
		classConflict:    "17 18 23 27 28 36",
		classUnavailable: "29 30 31",
		classFailed:      "24 25 26 35",
	}
	got := make(map[class][]string)
	for _, c := range sealfs.Codes() {
		got[classOf(c)] = append(got[classOf(c)], fmt.Sprint(uint16(c)))
	}
	for k := range numClasses {
		if strings.Join(got[k], " ") != want[k] {
			t.Errorf("%s has the codes %v, want %v", classNames[k], got[k], want[k])
		}
	}
	if classOf(0) != classOK || classOf(65535) != classFailed {
		t.Errorf("success is %s, an unknown code %s", classNames[classOf(0)], classNames[classOf(65535)])
	}
	for _, c := range []struct {
		err  error
		want class
	}{
		{fmt.Errorf("lost: %w", sealfs.ErrUnavailable), classUnavailable},
		{sealfs.ErrInterrupted, classConflict},
		{context.Canceled, classConflict},
		{context.DeadlineExceeded, classUnavailable},
		{errors.New("other"), classUnavailable},
		{&sealfs.Corruption{Off: -1}, classFailed},
	} {
		if got := classOfError(c.err); got != c.want {
			t.Errorf("%v is %s, want %s", c.err, classNames[got], classNames[c.want])
		}
	}
}

// TestHandler passes requests through and reads what was counted.
func TestHandler(t *testing.T) {
	r := NewRegistry()
	gone := errors.New("gone")
	type key struct{}
	ctx := context.WithValue(t.Context(), key{}, "value")
	h := must[op.Handler](t)(Handler(r, "server", handlerFunc(func(got context.Context, req *op.Request, rep *op.Reply) error {
		if got != ctx {
			t.Error("another context has come")
		}
		switch req.Type {
		case op.Read:
			rep.Data = append(rep.Data, "hello"...)
		case op.Write:
			if req.Off > 0 {
				rep.Code = sealfs.ErrNoSpace
			}
			req.Data = nil // as a caller's buffer may be used again at once
		case op.Lookup:
			rep.Code = sealfs.ErrNotExist
		case op.Sync:
			return gone
		}
		return nil
	})))
	if text, _ := scrape(t, r); strings.Contains(text, requestsName) {
		t.Errorf("requests that never came are shown:\n%s", text)
	}
	do := func(req op.Request, rep op.Reply, want error) op.Reply {
		t.Helper()
		if err := h.Do(ctx, &req, &rep); err != want {
			t.Errorf("%v: %v, want %v", req.Type, err, want)
		}
		return rep
	}
	if rep := do(op.Request{Type: op.Read}, op.Reply{Data: []byte("before")}, nil); string(rep.Data) != "beforehello" {
		t.Errorf("read %q", rep.Data)
	}
	do(op.Request{Type: op.Write, Data: make([]byte, 100)}, op.Reply{}, nil)
	do(op.Request{Type: op.Write, Data: make([]byte, 100), Off: 1}, op.Reply{}, nil)
	if rep := do(op.Request{Type: op.Lookup}, op.Reply{}, nil); rep.Code != sealfs.ErrNotExist {
		t.Errorf("the code is %v", rep.Code)
	}
	do(op.Request{Type: op.Sync}, op.Reply{}, gone)
	do(op.Request{Type: 0}, op.Reply{}, nil)
	do(op.Request{Type: 255}, op.Reply{}, nil)
	do(op.Request{Type: op.Readdir - 1 + 200}, op.Reply{}, nil)

	text, values := scrape(t, r)
	for series, want := range map[string]float64{
		`sealfs_requests_total{op="read",result="ok",role="server"}`:                  1,
		`sealfs_requests_total{op="read",result="failed",role="server"}`:              0,
		`sealfs_requests_total{op="write",result="ok",role="server"}`:                 1,
		`sealfs_requests_total{op="write",result="full",role="server"}`:               1,
		`sealfs_requests_total{op="lookup",result="refused",role="server"}`:           1,
		`sealfs_requests_total{op="sync",result="unavailable",role="server"}`:         1,
		`sealfs_requests_total{op="unknown",result="ok",role="server"}`:               3,
		`sealfs_requests_under_way{op="read",role="server"}`:                          0,
		`sealfs_request_duration_seconds_count{op="lookup",role="server"}`:            1,
		`sealfs_request_duration_seconds_bucket{op="lookup",role="server",le="+Inf"}`: 1,
		`sealfs_request_read_bytes_total{role="server"}`:                              5,
		`sealfs_request_written_bytes_total{role="server"}`:                           100,
		refusedName: 0,
	} {
		if got, ok := values[series]; !ok || got != want {
			t.Errorf("%s is %v (%v), want %v", series, got, ok, want)
		}
	}
	if strings.Contains(text, `op="mkdir"`) {
		t.Error("a type that never came is shown")
	}
}

// TestHandlerUnderWay holds requests back and scrapes meanwhile.
func TestHandlerUnderWay(t *testing.T) {
	r := NewRegistry()
	came, leave := make(chan struct{}), make(chan struct{})
	h := must[op.Handler](t)(Handler(r, "client", handlerFunc(func(context.Context, *op.Request, *op.Reply) error {
		came <- struct{}{}
		<-leave
		return nil
	})))
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() { h.Do(t.Context(), &op.Request{Type: op.WaitLock}, new(op.Reply)) })
		<-came
	}
	const series = `sealfs_requests_under_way{op="waitlock",role="client"}`
	if _, values := scrape(t, r); values[series] != 3 {
		t.Errorf("%v requests are under way, want 3", values[series])
	}
	close(leave)
	wg.Wait()
	if _, values := scrape(t, r); !contains(values, series) || values[series] != 0 {
		t.Errorf("%v requests are under way, want 0", values[series])
	}
}

func TestHandlerRefused(t *testing.T) {
	r := NewRegistry()
	nothing := handlerFunc(func(context.Context, *op.Request, *op.Reply) error { return nil })
	for _, role := range []string{"server", "client"} {
		if _, err := Handler(r, role, nothing); err != nil {
			t.Fatal(err)
		}
	}
	if h, err := Handler(r, "server", nothing); !errors.Is(err, sealfs.ErrExist) || h != nil {
		t.Errorf("a role for the second time: %v, %v", h, err)
	}
	if h, err := Handler(r, "", nothing); !errors.Is(err, sealfs.ErrInvalid) || h != nil {
		t.Errorf("no role: %v, %v", h, err)
	}
	if h, err := Handler(r, "x", nil); !errors.Is(err, sealfs.ErrInvalid) || h != nil {
		t.Errorf("no handler: %v, %v", h, err)
	}
	scrape(t, r)
}

// TestHandlerConcurrent uses a handler from several goroutines during scrapes.
func TestHandlerConcurrent(t *testing.T) {
	r := NewRegistry()
	h := must[op.Handler](t)(Handler(r, "server", handlerFunc(func(_ context.Context, req *op.Request, rep *op.Reply) error {
		rep.Code = sealfs.Code(req.Off % 40)
		return nil
	})))
	types := op.Types()
	const n = 4000
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			var rep op.Reply
			for j := range n {
				rep.Reset()
				h.Do(t.Context(), &op.Request{Type: types[(i+j)%len(types)], Off: uint64(j)}, &rep)
			}
		})
	}
	for range 10 {
		_, values := scrape(t, r)
		for series, v := range values {
			if strings.HasPrefix(series, underWayName) && (v < 0 || v > 3) {
				t.Errorf("%s is %v", series, v)
			}
		}
	}
	wg.Wait()
	_, values := scrape(t, r)
	sum := 0.0
	for series, v := range values {
		if strings.HasPrefix(series, requestsName) {
			sum += v
		}
	}
	if sum != 3*n {
		t.Errorf("%v requests were counted, want %v", sum, 3*n)
	}
}

// TestSampling checks which requests are timed where the clock is slow.
func TestSampling(t *testing.T) {
	for cost, want := range map[time.Duration]uint64{
		0: 0, 100: 0, 101: 1, 200: 1, 400: 3, 1500: 15, time.Second: 1<<10 - 1,
	} {
		if got := untimedMask(cost); got != want {
			t.Errorf("two readings of %v: mask %d, want %d", cost, got, want)
		}
	}
	if cost := clockCost(time.Now()); cost <= 0 || cost > time.Second {
		t.Errorf("two readings of the clock cost %v", cost)
	}
	r := NewRegistry()
	h := must[op.Handler](t)(Handler(r, "server", handlerFunc(func(context.Context, *op.Request, *op.Reply) error { return nil })))
	h.(*handler).untimed = 3
	for range 9 {
		h.Do(t.Context(), &op.Request{Type: op.Open}, new(op.Reply))
	}
	_, values := scrape(t, r)
	if got := values[`sealfs_request_duration_seconds_count{op="open",role="server"}`]; got != 3 {
		t.Errorf("%v of 9 requests were timed, want the first, the fifth and the ninth", got)
	}
	if got := values[`sealfs_requests_total{op="open",result="ok",role="server"}`]; got != 9 {
		t.Errorf("%v of 9 requests were counted", got)
	}
}

// TestHandlerAllocations: whatever the outcome, counting allocates nothing.
func TestHandlerAllocations(t *testing.T) {
	lost := fmt.Errorf("lost: %w", sealfs.ErrTimeout)
	h := must[op.Handler](t)(Handler(NewRegistry(), "server", handlerFunc(func(_ context.Context, req *op.Request, rep *op.Reply) error {
		if req.Type == op.Sync {
			return lost
		}
		rep.Code = sealfs.Code(req.Off)
		return nil
	})))
	ctx := t.Context()
	var rep op.Reply
	for _, req := range []op.Request{{Type: op.Create}, {Type: op.Write, Off: 10}, {Type: op.Sync}, {Type: 77}} {
		if n := testing.AllocsPerRun(100, func() { h.Do(ctx, &req, &rep) }); n != 0 {
			t.Errorf("%v allocates %v times", req.Type, n)
		}
	}
}

func BenchmarkHandler(b *testing.B) {
	nothing := handlerFunc(func(context.Context, *op.Request, *op.Reply) error { return nil })
	counted := must[op.Handler](b)(Handler(NewRegistry(), "server", nothing))
	untimed := must[op.Handler](b)(Handler(NewRegistry(), "server", nothing))
	untimed.(*handler).untimed = 1<<63 - 1
	names := []string{"bare", "counted", "untimed"}
	for i, h := range []op.Handler{nothing, counted, untimed} {
		b.Run(names[i], func(b *testing.B) {
			b.ReportAllocs()
			ctx := context.Background()
			req, rep := op.Request{Type: op.Getattr}, op.Reply{}
			for b.Loop() {
				h.Do(ctx, &req, &rep)
			}
		})
		b.Run(names[i]+"/parallel", func(b *testing.B) {
			b.RunParallel(func(pb *testing.PB) {
				ctx := context.Background()
				req, rep := op.Request{Type: op.Getattr}, op.Reply{}
				for pb.Next() {
					h.Do(ctx, &req, &rep)
				}
			})
		})
	}
	if slices.Max(op.Types()) > 250 {
		b.Fatal("types have become many")
	}
}
