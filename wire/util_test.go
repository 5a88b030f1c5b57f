package wire

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/op"
)

var (
	testCluster = sealfs.UUID{0x5e, 0xa1, 15: 0xf5}
	networks    = []string{"unix", "tcp"}
)

// patience is how long a test waits for what should come at once.
const patience = 20 * time.Second

// handlerFunc is a function as an op.Handler.
type handlerFunc func(ctx context.Context, req *op.Request, rep *op.Reply) error

func (f handlerFunc) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	return f(ctx, req, rep)
}

func addressOf(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

// pattern fills p with bytes that depend on seed.
func pattern(p []byte, seed uint64) []byte {
	for i := range p {
		p[i] = byte(seed>>(i%8*8)) ^ byte(i) ^ byte(i>>8)
	}
	return p
}

// echo answers each type with something that follows from the request.
func echo(ctx context.Context, req *op.Request, rep *op.Reply) error {
	switch req.Type {
	case op.Read:
		at := len(rep.Data)
		rep.Data = slices.Grow(rep.Data, int(req.Len))[:at+int(req.Len)]
		pattern(rep.Data[at:], req.Off)
		rep.Eof = true
	case op.Write:
		rep.Off = uint64(enc.CRC(0, req.Data))
	case op.Readdir:
		for i := range req.Len {
			rep.Entries = append(rep.Entries, op.Dirent{Name: fmt.Sprintf("entry%d", i), Ino: 1000, Cookie: req.Off + i + 3, Type: 8})
		}
	case op.Setxattr, op.Symlink:
		rep.Data = append(rep.Data, req.Data...)
	case op.WaitLock:
		<-ctx.Done()
		return context.Cause(ctx)
	case op.Lookup:
		rep.Code = sealfs.ErrNotExist
	case op.Statfs:
		return fmt.Errorf("the store is at lunch: %w", sealfs.ErrReadOnly)
	default:
		rep.Attr = op.Attr{Ino: req.Ino, Mode: 0o100644, Nlink: 1, Size: req.Off}
	}
	return nil
}

// listen returns a listener whose address is its own.
func listen(t testing.TB, network string) net.Listener {
	t.Helper()
	var l net.Listener
	var err error
	if network == "unix" {
		l, err = ListenUnix(filepath.Join(t.TempDir(), "s"))
	} else {
		l, err = net.Listen("tcp", "127.0.0.1:0")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// testServer is a running server; its end is checked when the test ends.
type testServer struct {
	*Server
	network, address string
	stop             func() // shuts down and waits
}

func serve(t testing.TB, network string, h handlerFunc, o ServerOptions) *testServer {
	t.Helper()
	l := listen(t, network)
	if o.Cluster.IsZero() {
		o.Cluster = testCluster
	}
	s := &testServer{Server: NewServer(h, o), network: network, address: l.Addr().String()}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	stopped := false
	s.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(patience):
			t.Errorf("Serve did not return:\n%s", stacks())
		}
		// Whatever happened, nothing is left: no memory held, no connection.
		for _, m := range []*budget{&s.memory, &s.peers} {
			if m.free != s.opts.MaxInflightBytes || len(m.queue) != 0 {
				t.Errorf("%d of %d bytes are free after the end, %d wait", m.free, s.opts.MaxInflightBytes, len(m.queue))
			}
		}
		if len(s.conns) != 0 || s.refusers != 0 {
			t.Errorf("%d connections and %d refusals are left", len(s.conns), s.refusers)
		}
	}
	t.Cleanup(s.stop)
	return s
}

func stacks() []byte {
	buf := make([]byte, 1<<20)
	return buf[:runtime.Stack(buf, true)]
}

func (s *testServer) dial(t testing.TB, o Options) *Conn {
	t.Helper()
	return dial(t, s.network, s.address, o)
}

func dial(t testing.TB, network, address string, o Options) *Conn {
	t.Helper()
	if o.Cluster.IsZero() {
		o.Cluster = testCluster
	}
	c, err := Dial(t.Context(), network, address, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		// When all is over no call is left and the roles are free.
		eventually(t, "the calls to end", func() bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			return len(c.calls) == 0 && c.reader == nil
		})
	})
	return c
}

// eventually waits for a condition that no channel tells of.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(100 * time.Microsecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s:\n%s", what, stacks())
		}
		<-tick.C
	}
}

// within returns what comes from ch, which should come soon.
func within[T any](t testing.TB, what string, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		t.Fatalf("waited in vain for %s:\n%s", what, stacks())
		panic("unreachable")
	}
}

// start starts a call and returns a channel for its error.
func start(ctx context.Context, c *Conn, req *op.Request, rep *op.Reply) <-chan error {
	ch := make(chan error, 1)
	go func() { ch <- c.Do(ctx, req, rep) }()
	return ch
}

// wantCode fails unless err is of the code and its text has the words.
func wantCode(t testing.TB, err error, code sealfs.Code, words ...string) {
	t.Helper()
	if !errors.Is(err, code) {
		t.Errorf("the error is %v, want code %q", err, code)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the error %q does not say %q", err, w)
		}
	}
}

// check does one request of each kind and compares the answers.
func check(t testing.TB, c *Conn) {
	t.Helper()
	ctx := context.Background()
	var rep op.Reply
	do := func(req op.Request) {
		t.Helper()
		rep.Reset()
		if err := c.Do(ctx, &req, &rep); err != nil {
			t.Errorf("%v: %v", req.Type, err)
		}
	}
	for _, n := range []int{0, 1, 16, copyMax, copyMax + 1, 4096, inboxSize, 100000, sealfs.IOMax} {
		do(op.Request{Type: op.Read, Ino: 1000, Off: 77, Len: uint64(n)})
		if want := pattern(make([]byte, n), 77); !rep.Eof || !bytes.Equal(rep.Data, want) {
			t.Errorf("read of %d bytes: %d bytes, eof %v", n, len(rep.Data), rep.Eof)
		}
		data := pattern(make([]byte, n), 78)
		do(op.Request{Type: op.Write, Ino: 1000, Data: data})
		if rep.Off != uint64(enc.CRC(0, data)) {
			t.Errorf("write of %d bytes came over damaged", n)
		}
	}
	for _, n := range []int{1, 4000, sealfs.XattrValueMax} {
		data := pattern(make([]byte, n), 79)
		do(op.Request{Type: op.Setxattr, Ino: 1000, Name: "user.x", Data: data})
		if !bytes.Equal(rep.Data, data) {
			t.Errorf("attribute of %d bytes came over damaged", n)
		}
	}
	do(op.Request{Type: op.Readdir, Dir: 1000, Off: 9, Len: 2000})
	if len(rep.Entries) != 2000 || rep.Entries[1999].Name != "entry1999" || rep.Entries[1999].Cookie != 2011 {
		t.Errorf("%d entries came over", len(rep.Entries))
	}
	do(op.Request{Type: op.Getattr, Ino: 1234, Off: 5})
	if rep.Attr.Ino != 1234 || rep.Attr.Size != 5 {
		t.Errorf("attributes came over as %+v", rep.Attr)
	}
	do(op.Request{Type: op.Lookup, Dir: 1, Name: "x"})
	if rep.Code != sealfs.ErrNotExist {
		t.Errorf("the code came over as %v", rep.Code)
	}
	do(op.Request{Type: op.Sync})
	err := c.Do(ctx, &op.Request{Type: op.Statfs}, &rep)
	wantCode(t, err, sealfs.ErrReadOnly, "at lunch", c.addr)
	if err := c.Ping(ctx); err != nil {
		t.Error(err)
	}
}
