package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"sealfs"
)

// TestFence: a session ends when all servers that serve say that they refuse it, and not before.
func TestFence(t *testing.T) {
	o := networkOptions(t.TempDir())
	o.Bootstrap, o.SessionTTL = true, 5*testTimeout
	o.SuspectAfter, o.DownAfter = 20*time.Second, time.Minute
	p := run(t, o)
	r := remote(t, []string{p.o.Addr})
	servers := []Beat{serverBeat(5, 1, "s:1", 6), serverBeat(7, 2, "s:2", 8)}
	beat := func(i int, fenced ...sealfs.Session) BeatReply {
		t.Helper()
		servers[i].Fenced = fenced
		reply, err := r.Beat(ask(t), servers[i])
		if err != nil {
			t.Fatal(err)
		}
		return reply
	}
	beat(0)
	beat(1)
	for range 2 {
		if _, err := r.OpenSession(ask(t), SessionInfo{}); err != nil {
			t.Fatal(err)
		}
	}
	// Neither is renewed; the second one is fenced by its successor.
	done := make(chan error, 1)
	go func() { done <- r.FenceSession(ask(t), 2) }()
	for _, id := range []sealfs.Session{1, 2} {
		eventually(t, fmt.Sprint("session is fenced: ", id), func() bool { return slices.Contains(beat(0).Fenced, id) })
		if err := r.RenewSession(ask(t), id); !errors.Is(err, sealfs.ErrSession) {
			t.Errorf("session %d is renewed though it is fenced: %v", id, err)
		}
	}
	for range 10 {
		beat(0, 1, 2)
		beat(1, 1)
		p.wake()
	}
	eventually(t, "session 1 ends", func() bool { l := p.SessionList(); return l.Ended(1) })
	if l := p.SessionList(); l.Ended(2) {
		t.Fatal("a session has ended that a server still serves")
	}
	select {
	case err := <-done:
		t.Fatalf("FenceSession returns before the end: %v", err)
	default:
	}
	if got := fmt.Sprint(beat(1, 1).Fenced); got != "[2]" {
		t.Errorf("fenced: %s", got)
	}
	beat(1, 2)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if l := p.SessionList(); !l.Ended(2) {
		t.Error("FenceSession has returned, and the session lives")
	}
	if reply := beat(1, 2); len(reply.Fenced) > 0 || reply.Sessions == nil || !reply.Sessions.Ended(2) {
		t.Errorf("what a server is told at last: %+v", reply)
	}
	if err := r.FenceSession(ask(t), 2); err != nil {
		t.Errorf("once more: %v", err)
	}
}

// TestFenceDown: a server that is down is not waited for.
func TestFenceDown(t *testing.T) {
	o := networkOptions(t.TempDir())
	o.Bootstrap, o.SessionTTL = true, 5*testTimeout
	p := run(t, o)
	r := remote(t, []string{p.o.Addr})
	if _, err := r.Beat(ask(t), serverBeat(5, 1, "s:1", 6)); err != nil {
		t.Fatal(err)
	}
	s, err := r.OpenSession(ask(t), SessionInfo{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for err = errors.New("not asked"); err != nil && ctx.Err() == nil; {
		err = r.FenceSession(ctx, s.ID)
	}
	if l := p.SessionList(); err != nil || !l.Ended(s.ID) || p.Map().Stores[0].State != StoreDown {
		t.Errorf("the session has not ended, or the store is up: %+v, %+v, %v", l, p.Map().Stores, err)
	}
}
