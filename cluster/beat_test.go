package cluster

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"sealfs"
)

// TestLeases drives the judge of leases with a clock of its own.
func TestLeases(t *testing.T) {
	const term = 10 * time.Second
	start := time.Unix(1000, 0)
	at := func(s int) time.Time { return start.Add(time.Duration(s) * time.Second) }
	m := testMap() // stores 2 and 3, at addresses of their own, served by nobody and by server 4
	l := newLeases(term, at(0))
	beat := func(s int, server byte, instance uint64, addr string, store byte, want string) {
		t.Helper()
		b := serverBeat(server, instance, addr, store)
		why, no := l.grant(at(s), &b, m)[testID(store)]
		if no != (want != "") || !strings.Contains(why, want) {
			t.Errorf("after %d s, server %d (%d) at %s: refused with %q, want %q", s, server, instance, addr, why, want)
		}
	}
	// Leases of the leader before.
	beat(1, 5, 1, "other:1", 3, "led before")
	beat(1, 5, 1, "10.0.0.2:7000", 3, "led before") // another server at that address
	beat(1, 4, 1, "10.0.0.2:7000", 3, "")
	beat(1, 9, 1, "10.0.0.1:7000", 2, "") // the map names no server
	beat(1, 9, 1, "10.0.0.1:7000", 8, "") // not known yet
	// Two with one identity.
	beat(2, 5, 2, "other:1", 3, "serves it")
	beat(2, 4, 2, "other:1", 3, "serves it")
	beat(9, 4, 1, "10.0.0.2:7000", 3, "")
	beat(18, 5, 2, "other:1", 3, "serves it")
	beat(19, 5, 2, "other:1", 3, "") // the lease is over
	beat(19, 4, 1, "10.0.0.2:7000", 3, "serves it")
	// The same server was started again; the one before must have ended.
	beat(20, 5, 3, "other:1", 3, "")
	beat(21, 5, 2, "other:1", 3, "serves it")
	beat(22, 5, 3, "other:1", 3, "")
	// A goodbye ends a lease, but only one's own.
	b := serverBeat(5, 2, "other:1", 3)
	l.release(at(23), &b)
	beat(23, 6, 1, "new:1", 3, "serves it")
	b.Instance = 3
	l.release(at(23), &b)
	beat(23, 6, 1, "new:1", 3, "")
	// A store that was never heard of under this leader, after its term.
	l = newLeases(term, at(100))
	beat(109, 6, 1, "new:1", 3, "led before")
	beat(110, 6, 1, "new:1", 3, "")
	m.Stores[1].State = StoreLeft
	beat(110, 6, 1, "new:1", 3, "left the cluster")
}

func TestUsage(t *testing.T) {
	l := newLeases(time.Minute, time.Unix(1, 0))
	m := testMap()
	report := func(server byte, store byte, bytes uint64) VolumeUsage {
		b := serverBeat(server, 1, fmt.Sprint("s:", server), store)
		b.Stores[0].Usage = []VolumeUsage{{ID: 1, Bytes: bytes, Inodes: bytes / 10}, {ID: 8, Bytes: 5}}
		l.grant(time.Unix(100, 0), &b, m)
		return l.usage(1)
	}
	for _, step := range []struct {
		server, store byte
		bytes         uint64
		want          uint64 // bytes of volume 1 on all stores
	}{{5, 6, 100, 100}, {7, 8, 40, 140}, {9, 10, 10, 150}, {5, 6, 20, 70}, {7, 8, 0, 30}} {
		if got := report(step.server, step.store, step.bytes); got != (VolumeUsage{1, step.want, step.want / 10}) {
			t.Errorf("%+v: volume 1 uses %+v", step, got)
		}
	}
	l.forget(testID(6))
	if u := l.usage(1); u != (VolumeUsage{1, 10, 1}) {
		t.Errorf("without a store, volume 1 uses %+v", u)
	}
}

// TestServers has two servers beat, move, and part.
func TestServers(t *testing.T) {
	ps := trio(t, nil)
	r := remote(t, addrs(ps))
	if err := r.fetch(ask(t), 0); err != nil {
		t.Fatal(err)
	}
	reply, err := r.Beat(ask(t), serverBeat(5, 1, "s:1", 2, 3))
	if err != nil || len(reply.Refused) > 0 {
		t.Fatalf("%+v, %v", reply, err)
	}
	m := ps[leader(t, ps)].Map()
	if len(m.Stores) != 2 || m.Stores[0].Addr != "s:1" || m.Stores[0].Server != testID(5) || m.Stores[0].Weight != 10 || m.Stores[1].Host != "h5" {
		t.Fatalf("stores: %+v", m.Stores)
	}
	again, err := r.Beat(ask(t), serverBeat(5, 1, "s:1", 2, 3))
	if err != nil || again.MapVersion != reply.MapVersion {
		t.Errorf("a heartbeat changed the map: %+v, %v", again, err)
	}
	// A copy of one of its disks, elsewhere.
	reply, err = r.Beat(ask(t), serverBeat(7, 2, "copy:1", 3, 4))
	if err != nil || len(reply.Refused) != 1 || !strings.Contains(reply.Refused[testID(3)], "s:1") {
		t.Errorf("a store served twice: %+v, %v", reply, err)
	}
	// The first one falls silent: the other is taken after the lease, not before.
	began := time.Now()
	eventually(t, "the other server is accepted", func() bool {
		reply, err := r.Beat(ask(t), serverBeat(7, 2, "copy:1", 3, 4))
		if err != nil {
			t.Fatal(err)
		}
		return len(reply.Refused) == 0
	})
	if d := time.Since(began); d < time.Second {
		t.Errorf("accepted %s after the last heartbeat, with a lease of %s", d, ps[0].o.DownAfter)
	}
	eventually(t, "the silent store is down, the moved one up at its new address", func() bool {
		if _, err := r.Beat(ask(t), serverBeat(7, 2, "copy:1", 3, 4)); err != nil {
			t.Fatal(err)
		}
		m := ps[leader(t, ps)].Map()
		return m.Stores[0].State == StoreDown && m.Stores[1].State == StoreUp && m.Stores[1].Addr == "copy:1" && m.Stores[1].Server == testID(7)
	})
	// The row of a shard follows.
	old := r.Map()
	if err := r.Refresh(ask(t), 3); err != nil || r.Map() == old || len(r.Map().Stores) != 3 {
		t.Errorf("refreshed: %+v, %v", r.Map(), err)
	}
	list, err := r.Stores(ask(t))
	if err != nil || len(list) != 3 || list[2].Says != "running" || !list[2].Heard || list[0].Shards+list[1].Shards+list[2].Shards != 64 || list[2].Primary == 0 {
		t.Errorf("stores: %+v, %v", list, err)
	}
	// A goodbye.
	bye := serverBeat(7, 2, "copy:1", 3, 4)
	bye.Leaving = true
	if _, err := r.Beat(ask(t), bye); err != nil {
		t.Fatal(err)
	}
	eventually(t, "stores whose server said goodbye are down", func() bool {
		m := ps[leader(t, ps)].Map()
		return m.Stores[1].State == StoreDown && m.Stores[2].State == StoreDown
	})
	if reply, err := r.Beat(ask(t), serverBeat(5, 3, "s:2", 3)); err != nil || len(reply.Refused) > 0 {
		t.Errorf("after a goodbye: %+v, %v", reply, err)
	}
	// What operators say.
	if err := r.SetStore(ask(t), testID(4), 77, true); err != nil {
		t.Error(err)
	}
	if err := r.RemoveStore(ask(t), testID(2)); err != nil {
		t.Error(err)
	}
	if err := r.SetStore(ask(t), testID(9), 1, false); !errors.Is(err, sealfs.ErrNotExist) {
		t.Errorf("a stranger's weight: %v", err)
	}
	m = ps[leader(t, ps)].Map()
	if m.Stores[2].Weight != 77 || !m.Stores[2].Bad || m.Stores[0].State != StoreLeft {
		t.Errorf("stores: %+v", m.Stores)
	}
	for _, row := range m.Table {
		if row.Replicas[0] != 1 {
			t.Fatalf("a shard is on a bad store, or on one that has left: %+v", m.Table)
		}
	}
	reply, err = r.Beat(ask(t), serverBeat(5, 3, "s:2", 2, 4))
	if err != nil || !strings.Contains(reply.Refused[testID(2)], "for ever") {
		t.Errorf("a store that has left: %+v, %v", reply, err)
	}
	if m := ps[leader(t, ps)].Map(); m.Stores[2].Weight != 77 || !m.Stores[2].Bad {
		t.Errorf("a heartbeat overruled the operator: %+v", m.Stores[2])
	}
}

func TestBeatRefuses(t *testing.T) {
	m := open(t, testOptions(t.TempDir()))
	for name, change := range map[string]func(b *Beat){
		"no server":   func(b *Beat) { b.Server = sealfs.UUID{} },
		"no instance": func(b *Beat) { b.Instance = 0 },
		"no address":  func(b *Beat) { b.Addr = "" },
		"long":        func(b *Beat) { b.Rack = strings.Repeat("x", LocationMax+1) },
		"twice":       func(b *Beat) { b.Stores = append(b.Stores, b.Stores[0]) },
		"no store":    func(b *Beat) { b.Stores[0].ID = sealfs.UUID{} },
		"many":        func(b *Beat) { b.Stores = make([]StoreBeat, BeatStoresMax+1) },
		"state":       func(b *Beat) { b.Stores[0].State = strings.Repeat("x", LocationMax+1) },
	} {
		b := serverBeat(5, 1, "s:1", 6)
		change(&b)
		if _, err := m.ServerBeat(t.Context(), b); !errors.Is(err, sealfs.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(m.Map().Stores) > 0 {
		t.Errorf("a refused heartbeat added %+v", m.Map().Stores)
	}
}

// TestClocks gives each manager a clock an hour off another's: a new leader
// must not take anything that the one before noted for old, or for the future.
func TestClocks(t *testing.T) {
	ps := trio(t, func(i int, o *Options) {
		off := time.Duration(i-1) * time.Hour
		o.now = func() time.Time { return time.Now().Add(off) }
		o.SuspectAfter, o.DownAfter = 20*time.Second, time.Minute
	})
	r := remote(t, addrs(ps))
	s, err := r.OpenSession(ask(t), SessionInfo{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Beat(ask(t), serverBeat(5, 1, "s:1", 6)); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		lead := leader(t, ps)
		ps[lead].kill()
		left := []*process{ps[(lead+1)%3], ps[(lead+2)%3]}
		// The predecessor's lease is honoured, for a term.
		reply, err := r.Beat(ask(t), serverBeat(7, 2, "copy:1", 6))
		if err != nil || !strings.Contains(reply.Refused[testID(6)], "led before") {
			t.Errorf("another server, under the new leader: %+v, %v", reply, err)
		}
		if reply, err := r.Beat(ask(t), serverBeat(5, 1, "s:1", 6)); err != nil || len(reply.Refused) > 0 {
			t.Errorf("the same server, under the new leader: %+v, %v", reply, err)
		}
		if err := r.RenewSession(ask(t), s.ID); err != nil {
			t.Errorf("the session, under the new leader: %v", err)
		}
		if m := left[leader(t, left)].Map(); m.Stores[0].State != StoreUp {
			t.Errorf("the store is %s", m.Stores[0].State)
		}
		ps[lead] = ps[lead].again().ready()
	}
}

// TestSessions opens, renews, ends sessions, and lets one expire.
func TestSessions(t *testing.T) {
	o := networkOptions(t.TempDir())
	o.Bootstrap, o.SessionTTL = true, 8*testTimeout
	p := run(t, o)
	r := remote(t, []string{p.o.Addr})
	list := p.SessionList()
	if list.Next != 1 || len(list.Live) != 0 {
		t.Errorf("at first: %+v", list)
	}
	var ids []sealfs.Session
	for i := range 3 {
		s, err := r.OpenSession(ask(t), SessionInfo{Volume: "home", Host: "h", Mount: "/" + strings.Repeat("m", 500), PID: -1 - i})
		if err != nil || s.ID != sealfs.Session(i+1) || s.TTL != o.SessionTTL || len(s.Mount) != LocationMax {
			t.Fatalf("session: %+v, %v", s, err)
		}
		ids = append(ids, s.ID)
	}
	if err := r.EndSession(ask(t), ids[0]); err != nil {
		t.Error(err)
	}
	if err := r.EndSession(ask(t), ids[0]); err != nil {
		t.Errorf("ended again: %v", err)
	}
	if err := r.RenewSession(ask(t), ids[0]); !errors.Is(err, sealfs.ErrSession) {
		t.Errorf("renewed after its end: %v", err)
	}
	if err := r.RenewSession(ask(t), 99); !errors.Is(err, sealfs.ErrSession) {
		t.Errorf("renewed what never was: %v", err)
	}
	version := p.Map().Version
	eventually(t, "the session that is not renewed ends", func() bool {
		if err := r.RenewSession(ask(t), ids[1]); err != nil {
			t.Fatal(err)
		}
		list = p.SessionList()
		return list.Ended(ids[2])
	})
	if !list.Ended(ids[0]) || list.Ended(ids[1]) || list.Ended(4) || list.Ended(0) || list.Next != 4 {
		t.Errorf("at last: %+v", list)
	}
	if p.Map().Version != version {
		t.Error("sessions changed the map's version")
	}
	b := serverBeat(5, 1, "s:1", 6)
	reply, err := r.Beat(ask(t), b)
	if err != nil || reply.Sessions == nil || reply.Sessions.Version != list.Version || fmt.Sprint(reply.Sessions.Live) != "[2]" {
		t.Fatalf("what a server is told: %+v, %v", reply, err)
	}
	b.SessionsVersion = list.Version
	if reply, err = r.Beat(ask(t), b); err != nil || reply.Sessions != nil {
		t.Errorf("what a server knows is told again: %+v, %v", reply, err)
	}
	if _, err := r.OpenSession(ask(t), SessionInfo{Volume: "a b"}); !errors.Is(err, sealfs.ErrInvalid) || p.Err() != nil {
		t.Errorf("a volume that cannot be: %v, %v", err, p.Err())
	}
	p.kill()
	p = p.again()
	if again := p.SessionList(); again.Next != 4 || again.Ended(ids[1]) {
		t.Errorf("after a restart: %+v", again)
	}
}

// TestRenewals drives the judge of sessions with a clock of its own.
func TestRenewals(t *testing.T) {
	r := newRenewals(10 * time.Second)
	start := time.Unix(1000, 0)
	at := func(s int) time.Time { return start.Add(time.Duration(s) * time.Second) }
	live := []Session{{ID: 1}, {ID: 2}}
	due := func(s int, want string) {
		t.Helper()
		if got := fmt.Sprint(r.due(at(s), time.Second, live)); got != want {
			t.Errorf("after %d s: %s, want %s", s, got, want)
		}
	}
	due(0, "[]")
	for s := 1; s < 10; s++ {
		if s == 5 {
			r.renew(1, at(s))
		}
		due(s, "[]")
	}
	due(10, "[2]")
	live = live[:1]
	due(11, "[]")
	due(3600, "[]") // the manager stood still
	for s := 3601; s < 3603; s++ {
		due(s, "[]")
	}
	due(3603, "[1]")
	r.renew(3, at(3603)) // opened, and not in the list that is judged
	due(3603, "[1]")
	live = []Session{{ID: 3}}
	due(3604, "[]")
}
