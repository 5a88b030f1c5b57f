package client

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sealfs"
	"sealfs/op"
)

// TestNewDirectoriesAreKnown asks for names in directories that were empty once: only for those that there may be.
func TestNewDirectoriesAreKnown(t *testing.T) {
	leased(t, func(t *testing.T, c *Client, l *lessor) {
		ctx := context.Background()
		made := func(name string) sealfs.Ino {
			t.Helper()
			a, err := c.Mkdir(ctx, c.Root(), name, 0o755, Cred{})
			if err != nil {
				t.Fatal(err)
			}
			return a.Ino
		}
		look := func(dir sealfs.Ino, name string, there bool, requests uint64) {
			t.Helper()
			before := c.requests[op.Lookup].Load()
			_, err := c.Lookup(ctx, dir, name)
			if (err == nil) != there || err != nil && err != sealfs.ErrNotExist {
				t.Errorf("%s: %v", name, err)
			}
			if n := c.requests[op.Lookup].Load() - before; n != requests {
				t.Errorf("%s: %d requests, want %d", name, n, requests)
			}
		}
		d := made("d")
		look(d, "x", false, 0)
		if _, err := c.Mknod(ctx, d, "y", 0o100644, 0, Cred{}); err != nil {
			t.Fatal(err)
		}
		look(d, "y", true, 1)
		if err := c.Rename(ctx, d, "y", d, "z", 0); err != nil {
			t.Fatal(err)
		}
		look(d, "z", true, 1)
		look(d, "x", false, 0)
		if _, err := c.Lookup(ctx, d, strings.Repeat("n", 300)); err == nil || err == sealfs.ErrNotExist {
			t.Errorf("a name that is too long: %v", err)
		}
		l.await(l.revoke(op.RevokeName, d, "x"))
		look(d, "x", false, 1)
		look(d, "w", false, 0)
		l.await(l.revoke(op.RevokeInode, d, ""))
		look(d, "w", false, 1)
		if err := c.Unlink(ctx, d, "z"); err != nil { // it is empty again
			t.Fatal(err)
		}
		if _, err := c.Getattr(ctx, d); err != nil {
			t.Fatal(err)
		}
		look(d, "w", false, 0)
		// A directory of which it is told that it is empty after a name was made there.
		e := made("e")
		l.await(l.revoke(op.RevokeInode, e, ""))
		old := c.begin(op.Getattr, e)
		defer old.end()
		c.about(old)
		if _, err := c.Mknod(ctx, e, "new", 0o100644, 0, Cred{}); err != nil {
			t.Fatal(err)
		}
		old.rep.Attr, old.rep.Lease, old.rep.Stamp = op.Attr{Ino: e, Mode: modeDir, Version: 1}, op.LeaseIno, l.issued
		c.believe(old)
		look(e, "new", true, 1)
		for i := range rosterMax + 1 {
			p := c.leases.part(d)
			p.mu.Lock()
			c.leases.add(p, d, fmt.Sprint(i))
			p.mu.Unlock()
		}
		look(d, "w", false, 1)
		if n := c.leases.names.Load(); n != 0 {
			t.Errorf("%d names are counted", n)
		}
	})
}

// TestNewDirectoriesAgree has one mount make a directory, and the other one names in it.
func TestNewDirectoriesAgree(t *testing.T) {
	p := startPair(t)
	for i := range 50 {
		d := func(m int) string { return filepath.Join(p.dirs[m], fmt.Sprint("d", i)) }
		if err := os.Mkdir(d(0), 0o755); err != nil {
			t.Fatal(err)
		}
		for j := range 20 {
			name := fmt.Sprint("f", j)
			if _, err := os.Stat(filepath.Join(d(0), name)); !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(d(1-j%2), name), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			for m := range 2 {
				if _, err := os.Stat(filepath.Join(d(m), name)); err != nil {
					t.Fatalf("round %d, name %d, mount %d: %v", i, j, m, err)
				}
			}
		}
	}
}

// TestNewFilesTakeTwoRequests counts what new files with their content cost a client of a cluster, in a
// directory that it has made: the file, and its content; releases go many at a time.
func TestNewFilesTakeTwoRequests(t *testing.T) {
	_, c, _, dir := netMount(t)
	connected(t, c)
	// The model tells nothing of a directory with what is made in it, so its attributes are asked for; a
	// server does (TestSmallFilesCost).
	sent := func() (n uint64) {
		for _, typ := range []op.Type{op.Lookup, op.Create, op.Open, op.Write, op.Setattr} {
			n += c.requests[typ].Load()
		}
		return n
	}
	const files = 300
	before := sent()
	script := `mkdir "$0" && i=0 && while [ $i -lt 300 ]; do i=$((i+1)); echo text > "$0/$i" || exit 1; done`
	if out, err := exec.Command("sh", "-c", script, filepath.Join(dir, "d")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	await(t, "writes are delayed", func() bool { return c.dirtyCount.Load() == 0 })
	n, releases := sent()-before, c.requests[op.Release].Load()
	t.Logf("%d requests for %d files, and %d releases", n, files, releases)
	if n > 2*files+5 || releases >= files {
		t.Errorf("%d requests for %d files, and %d releases", n, files, releases)
	}
}
