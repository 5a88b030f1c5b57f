package client

import (
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"sealfs"
)

// TestHolderThatHangs stops the process that serves a mount, which holds leases: others wait for
// it, and no longer once its session has ended.
func TestHolderThatHangs(t *testing.T) {
	needFUSE(t)
	s, root, err := newEngine(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	client := func(id sealfs.Session) *Client {
		return New(s, Options{Volume: 1, Root: root, Shards: testShards, Session: id})
	}
	holder, other := client(1), client(2)
	defer other.Close()
	m, err := Mount(t.Context(), holder, MountOptions{Dir: mountDir(t), Name: "holder"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Unmount(); err != nil {
			t.Error(err)
		}
		holder.Close()
	}()
	connected(t, holder)
	connected(t, other)
	file := filepath.Join(m.Dir(), "f")
	if out, err := exec.Command("sh", "-c", `echo x > "$0" && stat "$0"`, file).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	// As if it did not run: nothing is carried out any more.
	holder.watch.mu.Lock()
	hung := true
	defer func() {
		if hung {
			holder.watch.mu.Unlock()
		}
	}()
	done := make(chan error, 1)
	go func() { done <- other.Unlink(t.Context(), root, "f") }()
	select {
	case err := <-done:
		t.Fatalf("the name was taken from a holder that hangs: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	if err := s.EndSession(1); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("others wait for a session that has ended")
	}
	// It finds out when it runs again.
	holder.watch.mu.Unlock()
	hung = false
	await(t, "the session's end is not noticed", func() bool {
		select {
		case <-holder.Expired():
			return true
		default:
			return false
		}
	})
	if err := holder.Resume(3); err != nil {
		t.Fatal(err)
	}
	if _, err := exec.Command("stat", file).CombinedOutput(); err == nil {
		t.Error("the name is still believed")
	}
	if err := exec.Command("test", "-e", m.Dir()).Run(); err != nil {
		t.Error(err)
	}
}
