package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"sealfs"
)

func single(t *testing.T) *process {
	o := networkOptions(filepath.Join(t.TempDir(), "manager"))
	o.Bootstrap = true
	return run(t, o)
}

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c
}

// TestPreamble sends every kind of wrong preamble, and damages a right one.
func TestPreamble(t *testing.T) {
	p := single(t)
	flipped := preamble(testID(1), testID(3), p.ID())
	flipped[20] ^= 1
	for name, c := range map[string]struct {
		b    []byte
		want byte
	}{
		"right":           {preamble(testID(1), testID(3), p.ID()), preambleAccepted},
		"to anybody":      {preamble(testID(1), testID(3), sealfs.UUID{}), preambleAccepted},
		"another cluster": {preamble(testID(2), testID(3), p.ID()), preambleOtherCluster},
		"another manager": {preamble(testID(1), testID(3), testID(4)), preambleOtherManager},
		"from itself":     {preamble(testID(1), p.ID(), p.ID()), preambleOtherManager},
		"damaged":         {flipped, preambleDamaged},
	} {
		conn := dial(t, p.o.Addr)
		if _, err := conn.Write(c.b); err != nil {
			t.Fatal(err)
		}
		var answer [1]byte
		if _, err := io.ReadFull(conn, answer[:]); err != nil || answer[0] != c.want {
			t.Errorf("%s: answer %d, %v; want %d", name, answer[0], err, c.want)
		}
		if c.want != preambleAccepted {
			if _, err := conn.Read(answer[:]); !errors.Is(err, io.EOF) {
				t.Errorf("%s: not closed: %v", name, err)
			}
		}
	}
	conn := dial(t, p.o.Addr)
	if _, err := conn.Write([]byte(preambleMagic + "short")); err != nil {
		t.Fatal(err)
	}
	conn.(*net.TCPConn).CloseWrite()
	if b, err := io.ReadAll(conn); err != nil || len(b) > 0 {
		t.Errorf("a short preamble: %q, %v", b, err)
	}
	if err := p.Err(); err != nil {
		t.Error(err)
	}
}

// TestRaftConns: the number of managers' connections is bounded, and a
// connection that ends makes room.
func TestRaftConns(t *testing.T) {
	p := single(t)
	connect := func() (net.Conn, byte) {
		c := dial(t, p.o.Addr)
		if _, err := c.Write(preamble(testID(1), testID(3), p.ID())); err != nil {
			t.Fatal(err)
		}
		var answer [1]byte
		if _, err := io.ReadFull(c, answer[:]); err != nil {
			t.Fatal(err)
		}
		return c, answer[0]
	}
	var first net.Conn
	for i := range raftConnsMax {
		c, answer := connect()
		if answer != preambleAccepted {
			t.Fatalf("connection %d: answer %d", i, answer)
		}
		if first == nil {
			first = c
		}
	}
	if _, answer := connect(); answer != preambleBusy {
		t.Errorf("one too many: answer %d", answer)
	}
	first.Close()
	eventually(t, "room", func() bool { _, answer := connect(); return answer == preambleAccepted })
}

// TestRaftGarbage sends what is not Raft's after a right preamble, and what
// would make it panic.
func TestRaftGarbage(t *testing.T) {
	p := single(t)
	for _, b := range [][]byte{[]byte("garbage garbage garbage"), bytes.Repeat([]byte{0xff}, 4096), {0}, {2, 0xdf, 0xff, 0xff, 0xff, 0xff}} {
		c := dial(t, p.o.Addr)
		if _, err := c.Write(append(preamble(testID(1), testID(3), p.ID()), b...)); err != nil {
			t.Fatal(err)
		}
		c.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, c)
	}
	o := networkOptions("")
	other := &Manager{o: o, id: testID(3), cluster: testID(1), latch: newLatch(), ctx: t.Context()}
	s := newStream(other)
	defer s.Close()
	trans := raft.NewNetworkTransport(s, 1, patience, io.Discard)
	defer trans.Close()
	term := p.raft.CurrentTerm() + 10
	header := raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(testID(3).String()), Addr: []byte("h:1")}
	to, at := raft.ServerID(p.ID().String()), raft.ServerAddress(p.o.Addr)
	bad := []byte("no configuration")
	var entries raft.AppendEntriesResponse
	err := trans.AppendEntries(to, at, &raft.AppendEntriesRequest{
		RPCHeader: header, Term: term, PrevLogEntry: p.raft.LastIndex(), PrevLogTerm: p.raft.CurrentTerm(),
		Entries: []*raft.Log{{Index: p.raft.LastIndex() + 1, Term: term, Type: raft.LogConfiguration, Data: bad}},
	}, &entries)
	if err == nil {
		t.Error("a configuration that cannot be decoded was taken")
	}
	var snap raft.InstallSnapshotResponse
	err = trans.InstallSnapshot(to, at, &raft.InstallSnapshotRequest{RPCHeader: header, SnapshotVersion: 1, Term: term, Configuration: bad, Size: 3}, &snap, strings.NewReader("abc"))
	if err == nil {
		t.Error("a snapshot with a configuration that cannot be decoded was taken")
	}
	if err := p.AddStore(t.Context(), store(2)); err != nil || p.Err() != nil {
		t.Errorf("afterwards: %v, %v", err, p.Err())
	}
}

// TestHostileHTTP: requests that are too long, or wrong, are refused, and leave
// the manager well.
func TestHostileHTTP(t *testing.T) {
	p := single(t)
	send := func(method, path, cluster, body string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(ask(t), method, "http://"+p.o.Addr+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if cluster != "" {
			req.Header.Set(headerCluster, cluster)
		}
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			return resp.StatusCode, err.Error()
		}
		if got := resp.Header.Get(headerCluster); got != testID(1).String() && resp.StatusCode != 431 {
			t.Errorf("%s %s: the answer names cluster %q", method, path, got)
		}
		return resp.StatusCode, string(b)
	}
	long := strings.Repeat(" ", bodyMax) + `{"name":"v"}`
	for _, c := range []struct {
		method, path, cluster, body string
		status                      int
		say                         string
	}{
		{"GET", "/v1/nothing", "", "", 404, `"code":22`},
		{"PUT", "/v1/map", "", "", 404, "not known"},
		{"GET", "/v1/map?after=x", "", "", 400, "after or wait"},
		{"GET", "/v1/map?after=1&wait=1ms", "", "", 204, ""},
		{"GET", "/v1/shards/64", "", "", 404, "does not exist"},
		{"GET", "/v1/shards/99999999999999999999", "", "", 404, "does not exist"},
		{"GET", "/v1/status", testID(7).String(), "", 400, "belongs to cluster " + testID(1).String()},
		{"GET", "/v1/status", "nonsense", "", 400, "nonsense"},
		{"POST", "/v1/volumes", "", long, 413, `"code":15`},
		{"POST", "/v1/volumes", "", `{"name":`, 400, "body"},
		{"POST", "/v1/volumes", "", `{"name":"a b"}`, 400, "character"},
		{"POST", "/v1/volumes/x/ready", "", `{"root":64}`, 404, "invalid syntax"},
		{"POST", "/v1/volumes/7/ready", "", `{"root":64}`, 404, "volume 7"},
		{"DELETE", "/v1/volumes/4294967296", "", "", 404, "out of range"},
		{"DELETE", "/v1/stores/nonsense", "", "", 404, "not a UUID"},
		{"DELETE", "/v1/managers/" + p.ID().String(), "", "", 409, "last one"},
		{"POST", "/v1/managers", "", `{"id":"` + testID(3).String() + `","addr":"no address"}`, 400, "host:port"},
		{"POST", "/v1/beat", "", `{"stores":[{"id":"x"}]}`, 400, "UUID"},
		{"POST", "/v1/sessions/1/renew", "", "", 410, `"code":36`},
		{"GET", "/v1/status", "", "", 200, `"state":"leader"`},
		{"GET", "/v1/stores", "", "", 200, "[]"},
	} {
		if status, b := send(c.method, c.path, c.cluster, c.body); status != c.status || !strings.Contains(b, c.say) {
			t.Errorf("%s %s %.30s: %d %s; want %d with %q", c.method, c.path, c.body, status, b, c.status, c.say)
		}
	}
	if status, b := send("GET", "/v1/status?"+strings.Repeat("x", 2*headerMax), "", ""); status == 200 {
		t.Errorf("a request line of %d bytes: %d %s", 2*headerMax, status, b)
	}
	if err := p.Err(); err != nil {
		t.Error(err)
	}
}

// TestSilentConnections: those that send nothing are bounded in number and in
// time, and Serve ends in spite of them.
func TestSilentConnections(t *testing.T) {
	p := single(t)
	var silent []net.Conn
	for range pendingMax + 5 {
		silent = append(silent, dial(t, p.o.Addr))
	}
	closed := 0
	var b [1]byte
	for _, c := range silent[pendingMax:] {
		if _, err := c.Read(b[:]); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			closed++
		}
	}
	if closed != 5 {
		t.Errorf("%d of 5 connections too many were closed", closed)
	}
	silent[0].Close()
	eventually(t, "a place for one that speaks", func() bool {
		resp, err := http.Get("http://" + p.o.Addr + "/v1/status")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == 200
	})
	if err := p.kill(); err != nil {
		t.Error(err)
	}
	if _, err := silent[1].Read(b[:]); err == nil {
		t.Error("a connection outlives Serve")
	}
}

// TestServeEmbedded: an embedded manager answers HTTP, and no managers.
func TestServeEmbedded(t *testing.T) {
	m := open(t, testOptions(t.TempDir()))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error)
	go func() { served <- m.Serve(ctx, l) }()
	if s, err := remote(t, []string{l.Addr().String()}).Status(ask(t)); err != nil || s.State != "leader" || s.ID != m.ID() {
		t.Errorf("status: %+v, %v", s, err)
	}
	c := dial(t, l.Addr().String())
	if _, err := c.Write(preamble(testID(1), testID(3), m.ID())); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil {
		t.Error("an embedded manager takes a manager's connection")
	}
	stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// TestRemoteMap keeps maps fresh over a change of the leader.
func TestRemoteMap(t *testing.T) {
	ps := trio(t, nil)
	ctx, stop := context.WithCancel(t.Context())
	r := remote(t, addrs(ps))
	ran := make(chan error, 1)
	go func() { ran <- r.Run(ctx) }()
	if m, err := r.WaitMap(ask(t)); err != nil || m.Cluster != testID(1) {
		t.Fatalf("%+v, %v", m, err)
	}
	if _, err := r.Beat(ask(t), serverBeat(5, 1, "s:1", 6)); err != nil {
		t.Fatal(err)
	}
	until := func(name string) {
		t.Helper()
		timeout := time.After(patience)
		for {
			changed := r.Changed()
			if _, ok := r.Map().Volume(name); ok {
				return
			}
			select {
			case <-changed:
			case <-timeout:
				t.Fatalf("volume %q does not come", name)
			}
		}
	}
	for _, name := range []string{"one", "two", "three"} {
		v, err := r.CreateVolume(ask(t), VolumeSpec{Name: name})
		if err != nil {
			t.Fatal(err)
		}
		until(name)
		if _, err := r.VolumeReady(ask(t), v.ID, 64); err != nil {
			t.Error(err)
		}
		if v, err := r.ResizeVolume(ask(t), v.ID, 7, 8); err != nil || v.Bytes != 7 || v.Inodes != 8 || v.State != VolumeReady {
			t.Errorf("%+v, %v", v, err)
		}
		lead := leader(t, ps)
		ps[lead].kill()
		ps[lead] = ps[lead].again()
	}
	if _, err := r.DeleteVolume(ask(t), 1); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := r.VolumeDeleted(ask(t), 1); err != nil {
			t.Error(err)
		}
	}
	list, err := r.Volumes(ask(t))
	if err != nil || len(list) != 2 || list[0].Name != "two" {
		t.Errorf("volumes: %+v, %v", list, err)
	}
	for _, s := range r.StatusAll(ask(t)) {
		if s.Cluster != testID(1) || len(s.Managers) != 3 {
			t.Errorf("status: %+v", s)
		}
	}
	stop()
	if err := <-ran; !errors.Is(err, context.Canceled) {
		t.Errorf("Run = %v", err)
	}
}

// TestNoManagers: the error names who was asked, and what to do.
func TestNoManagers(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Server{Handler: http.NotFoundHandler()}
	go web.Serve(l)
	defer web.Close()
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()
	for want, addrs := range map[error][]string{
		sealfs.ErrUnavailable: {gone.Addr().String()}, sealfs.ErrInvalid: {l.Addr().String(), gone.Addr().String()},
	} {
		r := NewRemote(addrs, RemoteOptions{Timeout: 300 * time.Millisecond})
		_, err := r.WaitMap(t.Context())
		for _, a := range addrs {
			if !errors.Is(err, want) || !strings.Contains(fmt.Sprint(err), a) || !strings.Contains(err.Error(), "check that") {
				t.Errorf("%v: %v", addrs, err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := r.OpenSession(ctx, SessionInfo{}); !errors.Is(err, sealfs.ErrInterrupted) || !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
		r.Close()
	}
	r := NewRemote(nil, RemoteOptions{Timeout: 100 * time.Millisecond})
	if _, err := r.Status(t.Context()); !errors.Is(err, sealfs.ErrUnavailable) {
		t.Errorf("without an address: %v", err)
	}
}

// TestOnce: what may have happened is not done again.
func TestOnce(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan string, 100)
	web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.URL.Path
		panic(http.ErrAbortHandler) // as if it died
	})}
	go web.Serve(l)
	defer web.Close()
	r := NewRemote([]string{l.Addr().String()}, RemoteOptions{Timeout: 300 * time.Millisecond})
	defer r.Close()
	if _, err := r.CreateVolume(t.Context(), VolumeSpec{Name: "v"}); !errors.Is(err, sealfs.ErrInterrupted) || !strings.Contains(err.Error(), "not known") {
		t.Errorf("a volume: %v", err)
	}
	if len(asked) != 1 {
		t.Errorf("asked %d times", len(asked))
	}
	if err := r.RenewSession(t.Context(), 1); !errors.Is(err, sealfs.ErrUnavailable) {
		t.Errorf("a session: %v", err)
	}
	if len(asked) < 3 {
		t.Errorf("what may be repeated was not: %d", len(asked))
	}
}
