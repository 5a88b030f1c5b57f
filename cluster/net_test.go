package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"sealfs"
)

// testTimeout is Raft's in these tests: short, but two slow cores have to do.
const testTimeout = 250 * time.Millisecond

// patience bounds every wait.
const patience = 30 * time.Second

// eventually polls until ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); !ok(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s", patience, what)
		}
	}
}

// process is a manager that serves, as a process of its own would.
type process struct {
	*Manager
	t      *testing.T
	o      Options
	stop   context.CancelFunc
	served chan error
	once   sync.Once
}

func networkOptions(dir string) Options {
	return Options{Dir: dir, Cluster: testID(1), Name: "lab", Shards: 64, timeout: testTimeout, SuspectAfter: 500 * time.Millisecond, DownAfter: 3 * time.Second}
}

// run opens a manager on a free port, or on o.Addr if there is one.
func run(t *testing.T, o Options) *process {
	t.Helper()
	if o.Addr == "" {
		o.Addr = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", o.Addr)
	if err != nil {
		t.Fatal(err)
	}
	o.Addr = l.Addr().String()
	m, err := Open(t.Context(), o)
	if err != nil {
		l.Close()
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	p := &process{Manager: m, t: t, o: o, stop: stop, served: make(chan error, 1)}
	go func() { p.served <- m.Serve(ctx, l) }()
	t.Cleanup(func() { p.kill() })
	return p
}

// kill ends the process without a word to the others, and returns what Serve said.
func (p *process) kill() (err error) {
	p.once.Do(func() {
		if err := p.Close(); err != nil {
			p.t.Error(err)
		}
		p.stop()
		err = <-p.served
	})
	return err
}

// again starts a process that was killed, at the same address.
func (p *process) again() *process {
	p.t.Helper()
	return run(p.t, p.o)
}

func (p *process) ready() *process {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	if err := p.WaitReady(ctx); err != nil {
		p.t.Fatal(err)
	}
	return p
}

// trio runs three managers.
func trio(t *testing.T, change func(i int, o *Options)) []*process {
	t.Helper()
	var ps []*process
	for i := range 3 {
		o := networkOptions(filepath.Join(t.TempDir(), "manager"))
		if change != nil {
			change(i, &o)
		}
		if i == 0 {
			o.Bootstrap = true
		} else {
			o.Join = []string{ps[0].o.Addr}
		}
		ps = append(ps, run(t, o).ready())
	}
	return ps
}

func addrs(ps []*process) (list []string) {
	for _, p := range ps {
		list = append(list, p.o.Addr)
	}
	return list
}

// leader waits until one of ps leads.
func leader(t *testing.T, ps []*process) (lead int) {
	t.Helper()
	eventually(t, "a leader", func() bool {
		for lead = range ps {
			if ps[lead].Leading() {
				return true
			}
		}
		return false
	})
	return lead
}

func remote(t *testing.T, addrs []string) *Remote {
	r := NewRemote(addrs, RemoteOptions{Cluster: testID(1)})
	t.Cleanup(func() { r.Close() })
	return r
}

func ask(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func serverBeat(n byte, instance uint64, addr string, stores ...byte) Beat {
	b := Beat{Server: testID(n), Instance: instance, Addr: addr, Host: fmt.Sprint("h", n)}
	for _, s := range stores {
		b.Stores = append(b.Stores, StoreBeat{ID: testID(s), Bytes: 10 << 30, State: "running"})
	}
	return b
}

// TestFailover kills the leader of three: volumes go on being made, what was
// made is there, and a restart of all keeps it.
func TestFailover(t *testing.T) {
	ps := trio(t, nil)
	r := remote(t, addrs(ps))
	if _, err := r.Beat(ask(t), serverBeat(5, 1, "s:1", 6)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.CreateVolume(ask(t), VolumeSpec{Name: "before"}); err != nil {
		t.Fatal(err)
	}
	s, err := r.OpenSession(ask(t), SessionInfo{Volume: "before", PID: 7})
	if err != nil {
		t.Fatal(err)
	}
	lead := leader(t, ps)
	ps[lead].kill()
	began := time.Now()
	if _, err := r.CreateVolume(ask(t), VolumeSpec{Name: "after"}); err != nil {
		t.Fatal(err)
	}
	t.Logf("a volume %s after the leader died", time.Since(began).Round(time.Millisecond))
	if err := r.RenewSession(ask(t), s.ID); err != nil {
		t.Errorf("a session of before: %v", err)
	}
	ps[lead] = ps[lead].again().ready()
	eventually(t, "the same map everywhere", func() bool {
		return ps[0].Map().Version == ps[1].Map().Version && ps[0].Map().Version == ps[2].Map().Version && ps[0].Map().NextVolume == 3
	})

	for _, p := range ps {
		p.kill()
	}
	for i := range ps {
		ps[i] = ps[i].again()
	}
	for _, p := range ps {
		p.ready()
	}
	m := ps[leader(t, ps)].Map()
	for _, name := range []string{"before", "after"} {
		if _, ok := m.Volume(name); !ok {
			t.Errorf("after the restart of all, volume %q is gone: %+v", name, m.Volumes)
		}
	}
	if list, err := r.Sessions(ask(t)); err != nil || len(list) != 1 || list[0].ID != s.ID || list[0].PID != 7 {
		t.Errorf("after the restart of all, sessions: %+v, %v", list, err)
	}
}

// TestFollower asks a follower only: it forwards, once.
func TestFollower(t *testing.T) {
	ps := trio(t, nil)
	lead := leader(t, ps)
	follower := ps[(lead+1)%3]
	if _, err := follower.CreateVolume(ask(t), VolumeSpec{Name: "direct"}); !errors.Is(err, sealfs.ErrUnavailable) || !strings.Contains(err.Error(), ps[lead].o.Addr) {
		t.Errorf("called directly: %v", err)
	}
	if _, err := follower.ServerBeat(ask(t), serverBeat(5, 1, "s:1", 6)); !errors.Is(err, sealfs.ErrUnavailable) {
		t.Errorf("a heartbeat, called directly: %v", err)
	}
	r := remote(t, []string{follower.o.Addr})
	reply, err := r.attemptBeat(t, follower.o.Addr, serverBeat(5, 1, "s:1", 6))
	if err != nil || reply.MapVersion < 2 || reply.Term != 2700*time.Millisecond || reply.Sessions == nil || len(reply.Refused) > 0 {
		t.Errorf("a heartbeat, forwarded: %+v, %v", reply, err)
	}
	if _, err := r.CreateVolume(ask(t), VolumeSpec{Name: "forwarded"}); err != nil {
		t.Error(err)
	}
	if _, err := r.CreateVolume(ask(t), VolumeSpec{Name: "forwarded"}); !errors.Is(err, sealfs.ErrExist) || !strings.Contains(err.Error(), "creating") {
		t.Errorf("what the leader refuses: %v", err)
	}
	r.mu.Lock()
	known := len(r.addrs)
	r.mu.Unlock()
	if known != 3 {
		t.Errorf("a client that was told of one manager knows %d", known)
	}
}

// attemptBeat sends a beat to one manager only.
func (r *Remote) attemptBeat(t *testing.T, addr string, b Beat) (reply BeatReply, err error) {
	body, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.attempt(ask(t), addr, request{method: "POST", path: "/v1/beat", out: &reply}, body)
	return reply, err
}

// TestMembership lets a fourth and a fifth manager join, and removes two, one
// of which leads.
func TestMembership(t *testing.T) {
	ps := trio(t, func(_ int, o *Options) { o.snapshotAfter = 4 })
	r := remote(t, addrs(ps[:1]))
	if _, err := r.Beat(ask(t), serverBeat(5, 1, "s:1", 6)); err != nil {
		t.Fatal(err)
	}
	for i := range 40 { // so that joining takes a snapshot
		if _, err := r.CreateVolume(ask(t), VolumeSpec{Name: fmt.Sprint("v", i)}); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		o := networkOptions(filepath.Join(t.TempDir(), "manager"))
		o.Join, o.Cluster, o.snapshotAfter = addrs(ps[:2]), sealfs.UUID{}, 4
		ps = append(ps, run(t, o).ready())
	}
	if list, err := r.Managers(ask(t)); err != nil || len(list) != 5 {
		t.Fatalf("managers: %+v, %v", list, err)
	}
	ps[4].kill()
	ps[4] = ps[4].again().ready() // from a snapshot of the leader's, and no log
	eventually(t, "the manager that joined has all volumes", func() bool { return len(ps[4].Map().Volumes) == 40 })
	if err := r.RemoveManager(ask(t), testID(9)); !errors.Is(err, sealfs.ErrNotExist) {
		t.Errorf("removing a stranger: %v", err)
	}

	lead := leader(t, ps)
	for _, i := range []int{(lead + 1) % 5, lead} {
		gone := ps[i]
		if err := r.RemoveManager(ask(t), gone.ID()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the removed manager stops", func() bool { return gone.Err() != nil })
		if err := <-gone.served; !errors.Is(err, sealfs.ErrNotExist) || !strings.Contains(err.Error(), "removed") {
			t.Errorf("the removed manager's Serve: %v", err)
		}
		gone.served <- nil
		gone.kill()
		if _, err := Open(t.Context(), gone.o); !errors.Is(err, sealfs.ErrNotExist) || !strings.Contains(err.Error(), "removed") {
			t.Errorf("the removed manager opens again: %v", err)
		}
	}
	if _, err := r.CreateVolume(ask(t), VolumeSpec{Name: "last"}); err != nil {
		t.Error(err)
	}
	if list, err := r.Managers(ask(t)); err != nil || len(list) != 3 {
		t.Errorf("managers: %+v, %v", list, err)
	}
}

// TestRecover loses two of three for good.
func TestRecover(t *testing.T) {
	ps := trio(t, nil)
	r := remote(t, addrs(ps))
	if _, err := r.Beat(ask(t), serverBeat(5, 1, "s:1", 6)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.CreateVolume(ask(t), VolumeSpec{Name: "home"}); err != nil {
		t.Fatal(err)
	}
	s, err := r.OpenSession(ask(t), SessionInfo{})
	if err != nil {
		t.Fatal(err)
	}
	left := ps[2]
	eventually(t, "all is everywhere", func() bool { return len(left.SessionList().Live) == 1 })
	version := left.Map().Version
	if err := Recover(t.Context(), left.o); !errors.Is(err, sealfs.ErrBusy) {
		t.Errorf("while it runs: %v", err)
	}
	ps[0].kill()
	ps[1].kill()
	short, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err = r.CreateVolume(short, VolumeSpec{Name: "more"})
	if !errors.Is(err, sealfs.ErrUnavailable) && !errors.Is(err, sealfs.ErrInterrupted) {
		t.Errorf("without a majority: %v", err)
	}
	left.kill()
	if err := Recover(t.Context(), Options{Dir: t.TempDir(), Cluster: testID(1)}); !errors.Is(err, sealfs.ErrNotExist) {
		t.Errorf("of nothing: %v", err)
	}
	for range 2 { // a second one is as good
		if err := Recover(t.Context(), left.o); err != nil {
			t.Fatal(err)
		}
	}
	left = left.again().ready()
	m := left.Map()
	if v, ok := m.Volume("home"); !ok || v.ID != 1 || m.Version <= version+recoverVersions {
		t.Errorf("after Recover: %+v", m)
	}
	alone := remote(t, []string{left.o.Addr})
	if v, err := alone.CreateVolume(ask(t), VolumeSpec{Name: "new"}); err != nil || v.ID <= recoverVolumes {
		t.Errorf("a new volume: %+v, %v", v, err)
	}
	if n, err := alone.OpenSession(ask(t), SessionInfo{}); err != nil || n.ID <= s.ID+recoverSessions {
		t.Errorf("a new session: %+v, %v", n, err)
	}
	o := networkOptions(filepath.Join(t.TempDir(), "manager"))
	o.Join = []string{left.o.Addr}
	run(t, o).ready()
}

// TestGrow makes the directory of an embedded manager the first of three.
func TestGrow(t *testing.T) {
	dir := t.TempDir()
	m := open(t, testOptions(dir))
	if err := m.AddStore(t.Context(), store(2)); err != nil {
		t.Fatal(err)
	}
	if _, err := m.CreateVolume(t.Context(), VolumeSpec{Name: "home"}); err != nil {
		t.Fatal(err)
	}
	if err := m.AddManager(t.Context(), testID(9), "h:1"); !errors.Is(err, sealfs.ErrNotSupported) {
		t.Errorf("a second manager beside an embedded one: %v", err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	o := networkOptions(dir)
	o.Cluster = sealfs.UUID{}
	first := run(t, o)
	if !first.Leading() || first.Map() == nil {
		t.Error("a manager that is alone does not lead when it is open")
	}
	o = networkOptions(filepath.Join(t.TempDir(), "manager"))
	o.Join = []string{first.o.Addr}
	second := run(t, o).ready()
	eventually(t, "the map arrives", func() bool { m := second.Map(); _, ok := m.Volume("home"); return ok })
	// The store has no address yet: whoever brings it is believed.
	reply, err := remote(t, addrs([]*process{first, second})).Beat(ask(t), serverBeat(5, 1, "s:1", 2))
	if err != nil || len(reply.Refused) > 0 {
		t.Errorf("a heartbeat: %+v, %v", reply, err)
	}
	first.kill()
	second.kill()
	if _, err := Open(t.Context(), Options{Dir: dir}); !errors.Is(err, sealfs.ErrInvalid) || !strings.Contains(err.Error(), "2 managers") {
		t.Errorf("embedded again: %v", err)
	}
}

// TestGrowVersion1 opens a directory whose identity does not name the cluster.
func TestGrowVersion1(t *testing.T) {
	dir := t.TempDir()
	m := open(t, testOptions(dir))
	id := m.ID()
	if err := m.store.Set([]byte(identityKey), append([]byte(identityMagic+"\x01\x00"), id[:]...)); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	o := networkOptions(dir)
	o.Cluster = sealfs.UUID{}
	if p := run(t, o); p.cluster != testID(1) || p.ID() != id {
		t.Errorf("cluster %s, manager %s", p.cluster, p.ID())
	}
}

// TestNewAddress moves a manager to another port.
func TestNewAddress(t *testing.T) {
	ps := trio(t, nil)
	moved := ps[(leader(t, ps)+1)%3]
	moved.kill()
	old := moved.o.Addr
	moved.o.Addr = ""
	moved = moved.again()
	if moved.o.Addr == old {
		t.Skip("the system gave the same port again")
	}
	moved.ready()
	r := remote(t, []string{moved.o.Addr})
	eventually(t, "the new address is known", func() bool {
		list, err := r.Managers(ask(t))
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range list {
			if i.ID == moved.ID() {
				return i.Addr == moved.o.Addr
			}
		}
		return false
	})
}

// TestOneDiskFails: a manager whose medium fails stops with its reason, and the
// others go on.
func TestOneDiskFails(t *testing.T) {
	var mu sync.Mutex
	broken := make([]bool, 3)
	ps := trio(t, func(i int, o *Options) {
		o.wrap = func(b boltStore) boltStore {
			return &switched{b, func() bool { mu.Lock(); defer mu.Unlock(); return broken[i] }}
		}
	})
	r := remote(t, addrs(ps))
	if _, err := r.Beat(ask(t), serverBeat(5, 1, "s:1", 6)); err != nil {
		t.Fatal(err)
	}
	lead := leader(t, ps)
	mu.Lock()
	broken[lead] = true
	mu.Unlock()
	made := func(name string) {
		t.Helper()
		eventually(t, "volume "+name, func() bool {
			_, err := r.CreateVolume(ask(t), VolumeSpec{Name: name})
			if err != nil && !errors.Is(err, sealfs.ErrInterrupted) && !errors.Is(err, sealfs.ErrExist) {
				t.Fatal(err)
			}
			return err == nil || errors.Is(err, sealfs.ErrExist)
		})
	}
	made("one")
	if err := <-ps[lead].served; !errors.Is(err, errMedium) || !errors.Is(err, sealfs.ErrIO) {
		t.Errorf("Serve of the manager whose medium failed: %v", err)
	}
	ps[lead].served <- nil
	made("two")
	if err := ps[lead].Err(); !errors.Is(err, errMedium) {
		t.Errorf("Err = %v", err)
	}
	ps[lead].kill()
	mu.Lock()
	broken[lead] = false
	mu.Unlock()
	p := ps[lead].again().ready()
	eventually(t, "it has caught up", func() bool { _, ok := p.Map().Volume("two"); return ok })
}

// switched is a medium that fails while it is told to.
type switched struct {
	boltStore
	broken func() bool
}

func (s *switched) StoreLogs(l []*raft.Log) error {
	if s.broken() {
		return errMedium
	}
	return s.boltStore.StoreLogs(l)
}

func (s *switched) Set(k, v []byte) error {
	if s.broken() {
		return errMedium
	}
	return s.boltStore.Set(k, v)
}

// TestOtherCluster: managers of different clusters do not mix.
func TestOtherCluster(t *testing.T) {
	o := networkOptions(filepath.Join(t.TempDir(), "a"))
	o.Bootstrap = true
	a := run(t, o)
	o = networkOptions(filepath.Join(t.TempDir(), "b"))
	o.Join, o.Cluster = []string{a.o.Addr}, testID(7)
	o.Addr = "127.0.0.1:1"
	if _, err := Open(ask(t), o); !errors.Is(err, sealfs.ErrInvalid) || !strings.Contains(err.Error(), testID(7).String()) {
		t.Errorf("joining another cluster: %v", err)
	}
	if _, err := os.Stat(o.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the manager that did not join left its directory: %v", err)
	}
	r := NewRemote([]string{a.o.Addr}, RemoteOptions{Cluster: testID(7)})
	defer r.Close()
	began := time.Now()
	if _, err := r.CreateVolume(ask(t), VolumeSpec{Name: "v"}); !errors.Is(err, sealfs.ErrInvalid) || !strings.Contains(err.Error(), testID(1).String()) {
		t.Errorf("a client of another cluster: %v", err)
	}
	if d := time.Since(began); d > patience/2 {
		t.Errorf("that took %s, though it is hopeless", d)
	}
	o.Join, o.Bootstrap, o.Addr = nil, true, ""
	b := run(t, o)
	if err := a.AddManager(ask(t), b.ID(), b.o.Addr); !errors.Is(err, sealfs.ErrInvalid) {
		t.Errorf("taking in a manager of another cluster: %v", err)
	}
	if _, err := a.stream.Dial(raft.ServerAddress(b.o.Addr), patience); err == nil || !strings.Contains(err.Error(), "another cluster") {
		t.Errorf("raft's connection: %v", err)
	}
}

func TestOptionsNetwork(t *testing.T) {
	good := networkOptions("x")
	good.Addr = "h:1"
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for fault, change := range map[string]func(o *Options){
		"not host:port": func(o *Options) { o.Addr = "h" },
		"port":          func(o *Options) { o.Addr = "h:0" },
		"leads here":    func(o *Options) { o.Addr = "0.0.0.0:7" },
		"either make":   func(o *Options) { o.Bootstrap, o.Join = true, []string{"a:1"} },
		"to join":       func(o *Options) { o.Join = []string{"a"} },
		"is needed":     func(o *Options) { o.Addr, o.Bootstrap = "", true },
		"less than five": func(o *Options) {
			o.timeout = time.Second
		},
		"sessions of": func(o *Options) { o.SessionTTL = time.Millisecond },
	} {
		o := good
		change(&o)
		if err := o.Validate(); !errors.Is(err, sealfs.ErrInvalid) || !strings.Contains(err.Error(), fault) {
			t.Errorf("%s: %v", fault, err)
		}
	}
	if _, err := Open(t.Context(), Options{Dir: t.TempDir(), Addr: "h:1", Cluster: testID(1)}); !errors.Is(err, sealfs.ErrNotExist) {
		t.Errorf("neither made nor joined: %v", err)
	}
}
