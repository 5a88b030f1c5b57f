package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"testing"

	"sealfs"
	"sealfs/lsfs/layout"
	"sealfs/op"
)

// aclFor returns an ACL that gives a user something, and grants owner, group and others what mode does.
func aclFor(mode, user uint32) []byte {
	b := []byte{2, 0, 0, 0}
	for _, e := range [][3]uint32{{1, mode >> 6, 1<<32 - 1}, {2, 7, user}, {4, 7, 1<<32 - 1}, {16, mode >> 3 & 7, 1<<32 - 1}, {32, mode & 7, 1<<32 - 1}} {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return b
}

// asks sends requests to a world that must succeed.
func asks(w *world, c *retrier) func(op.Request) *op.Reply {
	return func(req op.Request) *op.Reply {
		w.t.Helper()
		rep := new(op.Reply)
		if req.Dir != 0 {
			req.Shard = req.Dir.Home(testShards)
		} else {
			req.Shard = req.Ino.Home(testShards)
		}
		req.Volume = 1
		if err := c.Do(context.Background(), &req, rep); err != nil || rep.Code != 0 {
			w.t.Errorf("%v %q: %v, %v", req.Type, req.Name, err, rep.Code)
		}
		return rep
	}
}

// TestACLAcrossStores makes directories whose parents have ACLs in other stores,
// while commits are lost and the parties die.
func TestACLAcrossStores(t *testing.T) {
	w := newWorld(t, 5, 1, 1, 1)
	do := asks(w, &retrier{w: w})
	near := w.root.Home(testShards)
	other := (near + 1) % testShards // in the store of the next server
	acl := aclFor(0o750, 77)
	do(op.Request{Type: op.Setxattr, Ino: w.root, Name: op.ACLDefault, Data: acl})
	for i, lost := range []op.Type{0, op.Commit, op.Prepare, op.Forget} {
		t.Run(lost.String(), func(t *testing.T) {
			n := 0
			w.silence(func(req *op.Request) bool { n++; return req.Type == lost && n < 3 })
			a := do(op.Request{Type: op.Mkdir, Dir: w.root, Name: fmt.Sprint(lost), Mode: 0o773, Valid: 0o777, Shard2: other}).Attr
			w.silence(nil)
			w.kill((i + 1) % 3)
			w.settle()
			a = do(op.Request{Type: op.Getattr, Ino: a.Ino}).Attr
			if a.Ino.Home(testShards) != other || a.Mode != 0o040750|op.ModeACL {
				t.Errorf("inode %d in shard %d with mode %#o", a.Ino, a.Ino.Home(testShards), a.Mode)
			}
			for _, name := range []string{op.ACLAccess, op.ACLDefault} {
				if got := do(op.Request{Type: op.Getxattr, Ino: a.Ino, Name: name, Len: sealfs.ACLMax}).Data; !bytes.Equal(got, acl) {
					t.Errorf("%s is %x, want %x", name, got, acl)
				}
			}
		})
	}
	w.check()
	for i := range w.srv {
		for _, st := range w.srv[i].Load().stores {
			has := st.Superblock().Incompat&layout.FeatureACL != 0
			want := st.local(near) || st.local(other)
			if has != want {
				t.Errorf("server %d: the device says that it has ACLs: %v", i, has)
			}
		}
	}
}

// TestACLChangesDuringMkdir changes what a directory hands down while subdirectories are
// made in it: each gets one or the other whole.
func TestACLChangesDuringMkdir(t *testing.T) {
	w := newWorld(t, 6, 1, 1)
	acls := [][]byte{aclFor(0o700, 1), aclFor(0o770, 2), nil}
	var others sync.WaitGroup
	stop := make(chan struct{})
	others.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			req := op.Request{Type: op.Setxattr, Ino: w.root, Name: op.ACLDefault, Data: acls[i%3], Shard: w.root.Home(testShards), Volume: 1}
			var rep op.Reply
			if err := w.Do(context.Background(), &req, &rep); err != nil || rep.Code != 0 {
				t.Errorf("setxattr: %v, %v", err, rep.Code)
				return
			}
		}
	})
	do := asks(w, &retrier{w: w})
	var made []sealfs.Ino
	modes := map[uint32]bool{}
	for i := 0; i < 150 || len(modes) < 2 && i < 20000; i++ { // until the other one had its turn
		a := do(op.Request{Type: op.Mkdir, Dir: w.root, Name: fmt.Sprint(i), Mode: 0o777, Valid: 0o022, Shard2: sealfs.Shard(i % testShards)}).Attr
		made = append(made, a.Ino)
		modes[a.Mode] = true
	}
	close(stop)
	others.Wait()
	w.settle()
	seen := map[uint32]int{}
	for _, ino := range made {
		a := do(op.Request{Type: op.Getattr, Ino: ino}).Attr
		want := map[uint32][]byte{0o040700 | op.ModeACL: acls[0], 0o040770 | op.ModeACL: acls[1], 0o040755: {}}[a.Mode]
		if want == nil {
			t.Errorf("mode %#o", a.Mode)
			continue
		}
		seen[a.Mode]++
		if len(want) == 0 {
			continue
		}
		for _, name := range []string{op.ACLAccess, op.ACLDefault} {
			if got := do(op.Request{Type: op.Getxattr, Ino: ino, Name: name, Len: sealfs.ACLMax}).Data; !bytes.Equal(got, want) {
				t.Errorf("mode %#o, and %s is %x", a.Mode, name, got)
			}
		}
	}
	t.Logf("%d", seen)
	if len(seen) < 2 {
		t.Errorf("the ACL never changed: %v", seen)
	}
}
