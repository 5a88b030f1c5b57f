package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"sealfs"
	"sealfs/op"
)

// leaseTimeout is after how long a test takes something for hung.
const leaseTimeout = 2 * time.Minute

type dirName struct {
	dir  sealfs.Ino
	name string
}

// believer is a client of a session that keeps to the rules of leases: it believes
// what it was granted until that is revoked, and watches each store.
type believer struct {
	t       testing.TB
	h       op.Handler
	id      sealfs.Session
	ctx     context.Context
	end     context.CancelFunc
	done    sync.WaitGroup
	mu      sync.Mutex
	attrs   map[sealfs.Ino]op.Attr
	names   map[dirName]sealfs.Ino
	write   map[sealfs.Ino]bool
	dirty   map[sealfs.Ino]uint64 // up to where writes are delayed
	seen    map[sealfs.Ino]uint64
	revokes []op.Revoke
	seq     uint64     // of its changes
	gate    sync.Mutex // held by a test that lets it not carry out anything
}

// believe starts a session that watches the stores of the shards.
func believe(t testing.TB, h op.Handler, id sealfs.Session, shards ...sealfs.Shard) *believer {
	b := &believer{
		t: t, h: h, id: id, attrs: map[sealfs.Ino]op.Attr{}, names: map[dirName]sealfs.Ino{}, write: map[sealfs.Ino]bool{},
		dirty: map[sealfs.Ino]uint64{}, seen: map[sealfs.Ino]uint64{},
	}
	b.ctx, b.end = context.WithTimeout(context.Background(), leaseTimeout)
	for _, shard := range shards {
		var rep op.Reply // the first is answered at once
		if err := h.Do(b.ctx, &op.Request{Type: op.Watch, Session: id, Shard: shard, Len: 1000}, &rep); err != nil || rep.Code != 0 {
			t.Fatal(err, rep.Code)
		}
		b.done.Go(func() { b.watch(shard) })
	}
	t.Cleanup(b.stop)
	return b
}

func (b *believer) stop() {
	b.end()
	b.done.Wait()
}

func (b *believer) watch(shard sealfs.Shard) {
	var off uint64
	for seq := uint64(1); b.ctx.Err() == nil; seq++ {
		var rep op.Reply
		err := b.h.Do(b.ctx, &op.Request{Type: op.Watch, Session: b.id, Shard: shard, Off: off, Seq: seq, Len: 1000}, &rep)
		switch {
		case errors.Is(err, sealfs.ErrInterrupted), errors.Is(err, sealfs.ErrClosed), rep.Code == sealfs.ErrSession:
			return
		case err != nil || rep.Code != 0:
			b.t.Errorf("watch of session %d: %v, %v", b.id, err, rep.Code)
			return
		}
		for _, r := range rep.Revokes {
			if r.Num > off {
				b.carry(r)
				off = r.Num
			}
		}
	}
}

// carry carries out a revocation.
func (b *believer) carry(r op.Revoke) {
	b.gate.Lock()
	defer b.gate.Unlock()
	if r.Kind == op.RecallWrite {
		b.flush(r.Ino)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.revokes = append(b.revokes, r)
	b.seen[r.Ino] = r.Num
	delete(b.attrs, r.Ino)
	switch r.Kind {
	case op.RevokeName, op.RevokeOwn:
		delete(b.names, dirName{r.Ino, r.Name})
	case op.RevokeInode:
		maps.DeleteFunc(b.names, func(n dirName, _ sealfs.Ino) bool { return n.dir == r.Ino })
	}
	if r.Kind != op.RevokeName {
		delete(b.write, r.Ino)
	}
}

// flush sends what is delayed.
func (b *believer) flush(ino sealfs.Ino) {
	b.mu.Lock()
	end := b.dirty[ino]
	b.mu.Unlock()
	if end == 0 {
		return
	}
	// More than a record holds: its pieces are the session's, too.
	b.try(op.Request{Type: op.Write, Ino: ino, Off: end - min(end, 300_000), Data: make([]byte, min(end, 300_000))})
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.dirty, ino)
}

// try executes a request, and learns from the answer.
func (b *believer) try(req op.Request) *op.Reply {
	b.t.Helper()
	address(&req)
	req.Session = b.id
	if req.Type.Changes() {
		b.mu.Lock()
		for _, dir := range [...]sealfs.Ino{req.Dir, req.Dir2} {
			delete(b.attrs, dir)
			delete(b.names, dirName{dir, req.Name})
			delete(b.names, dirName{dir, req.Name2})
		}
		delete(b.attrs, req.Ino)
		b.seq++
		req.Seq, req.Low = b.seq, max(b.seq, 200)-199 // more are never under way
		b.mu.Unlock()
	}
	rep := &op.Reply{}
	for {
		again := req
		err := b.h.Do(b.ctx, &again, rep)
		if errors.Is(err, sealfs.ErrUnavailable) && b.ctx.Err() == nil {
			rep.Reset()
			continue // servers do not hear each other: it is asked again
		}
		if err != nil {
			b.t.Errorf("%v: %v", req.Type, err)
			return rep
		}
		break
	}
	b.learn(&req, rep)
	return rep
}

func (b *believer) must(req op.Request) *op.Reply {
	b.t.Helper()
	rep := b.try(req)
	if rep.Code != 0 {
		b.t.Fatalf("%v: %v", req.Type, rep.Code)
	}
	return rep
}

func (b *believer) learn(req *op.Request, rep *op.Reply) {
	b.mu.Lock()
	defer b.mu.Unlock()
	ino := rep.Attr.Ino
	if req.Type.Changes() {
		delete(b.attrs, ino)
	}
	if req.Type == op.Readdir {
		for _, e := range rep.Entries {
			if rep.Lease&op.LeaseIno != 0 && e.Attr.Ino != 0 && rep.Stamp >= b.seen[e.Attr.Ino] {
				b.attrs[e.Attr.Ino] = e.Attr
			}
			if rep.Lease&op.LeaseDir != 0 && rep.Stamp >= b.seen[req.Dir] {
				b.names[dirName{req.Dir, e.Name}] = e.Ino
			}
		}
		return
	}
	if rep.Lease&op.LeaseIno != 0 && rep.Stamp >= b.seen[ino] {
		b.attrs[ino] = rep.Attr
		if rep.Lease&op.LeaseWrite != 0 {
			b.write[ino] = true
		}
	}
	if rep.Lease&op.LeaseDir == 0 || rep.Stamp < b.seen[req.Dir] {
		return
	}
	if rep.Dir.Ino != 0 {
		b.attrs[req.Dir] = rep.Dir
	}
	if req.Type == op.Unlink || req.Type == op.Rmdir || rep.Code != 0 {
		ino = 0
	}
	b.names[dirName{req.Dir, req.Name}] = ino
}

// judge compares what b believes with the truth.
func (b *believer) judge() {
	b.t.Helper()
	b.mu.Lock()
	attrs, names := maps.Clone(b.attrs), maps.Clone(b.names)
	for ino := range b.dirty {
		delete(attrs, ino) // it knows better
	}
	b.mu.Unlock()
	ask := func(req op.Request) *op.Reply {
		address(&req)
		req.Session = internalSession
		rep := &op.Reply{}
		if err := b.h.Do(b.ctx, &req, rep); err != nil {
			b.t.Fatalf("%v: %v", req.Type, err)
		}
		return rep
	}
	// What a server does by itself may have been taken back since.
	still := func(ok func() bool) bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return ok()
	}
	for ino, a := range attrs {
		if now := ask(op.Request{Type: op.Getattr, Ino: ino}); now.Attr != a && still(func() bool { return b.attrs[ino] == a }) {
			b.t.Fatalf("session %d believes %+v, the truth is %+v, %v", b.id, a, now.Attr, now.Code)
		}
	}
	for n, ino := range names {
		believed := func() bool { now, ok := b.names[n]; return ok && now == ino }
		if now := ask(op.Request{Type: op.Lookup, Dir: n.dir, Name: n.name}); now.Attr.Ino != ino && still(believed) {
			b.t.Fatalf("session %d believes that %q in %d is %d, it is %d", b.id, n.name, n.dir, ino, now.Attr.Ino)
		}
	}
}

// told returns what was revoked since it was asked last.
func (b *believer) told() []op.Revoke {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := b.revokes
	b.revokes = nil
	for i := range r {
		r[i].Num = 0
	}
	return r
}

// begin executes a request on another goroutine, and returns when it waits for
// leases on a store.
func (b *believer) begin(st *store, req op.Request) <-chan *op.Reply {
	b.t.Helper()
	before := st.leases.Stats().Waits
	got := make(chan *op.Reply, 1)
	go func() { got <- b.try(req) }()
	poll(b.t, "the request does not wait", func() bool { return st.leases.Stats().Waits > before })
	return got
}

func (b *believer) wait(got <-chan *op.Reply) *op.Reply {
	b.t.Helper()
	select {
	case rep := <-got:
		return rep
	case <-b.ctx.Done():
		b.t.Fatal("the request is not answered")
		return nil
	}
}

// leased is a server with two sessions that watch.
func leased(t *testing.T) (s *simServer, one, two *believer) {
	s = newSim(t, 64<<20, 1<<20)
	return s, believe(t, s, 1, 0), believe(t, s, 2, 0)
}

// TestLeaseChange: a change waits until the other holder has acknowledged, holding
// nothing: others go on, also on the same stripe and the same file.
func TestLeaseChange(t *testing.T) {
	s, one, two := leased(t)
	st := s.stores[0]
	ino := s.file(t, "f", []byte("content"))
	changes := []op.Request{
		{Type: op.Setattr, Ino: ino, Valid: op.SetMode, Mode: 0o600},
		{Type: op.Setattr, Ino: ino, Valid: op.SetSize, Size: 3},
		{Type: op.Write, Ino: ino, Data: make([]byte, 500_000)},
		{Type: op.Write, Ino: ino, Data: []byte("more"), Flags: op.Append},
		{Type: op.Write, Ino: ino, Data: make([]byte, 500_000), Flags: op.Append},
		{Type: op.Fallocate, Ino: ino, Off: 10, Len: 9000, Mode: punchHole | keepSize},
		{Type: op.Fallocate, Ino: ino, Len: 2_000_000},
		{Type: op.Setxattr, Ino: ino, Name: "user.x", Data: []byte("x")},
		{Type: op.Removexattr, Ino: ino, Name: "user.x"},
		{Type: op.Link, Ino: ino, Dir: s.root, Name: "g"},
		{Type: op.Rename, Dir: s.root, Name: "g", Dir2: s.root, Name2: "h"},
		{Type: op.Unlink, Dir: s.root, Name: "h"},
	}
	for i, req := range changes {
		if rep := one.must(op.Request{Type: op.Getattr, Ino: ino}); rep.Lease != op.LeaseIno {
			t.Fatalf("%v: lease %v", req.Type, rep.Lease)
		}
		one.gate.Lock()
		got := two.begin(st, req)
		if rep := one.must(op.Request{Type: op.Getattr, Ino: ino}); rep.Lease != 0 {
			t.Errorf("%v waits, and a lease is granted", req.Type)
		}
		one.must(op.Request{Type: op.Write, Ino: ino, Off: 20, Data: []byte("its own")})
		select {
		case <-got:
			t.Fatalf("%v does not wait", req.Type)
		default:
		}
		size := one.must(op.Request{Type: op.Getattr, Ino: ino}).Attr.Size
		one.gate.Unlock()
		rep := two.wait(got)
		if rep.Code != 0 {
			t.Fatalf("%v: %v", req.Type, rep.Code)
		}
		if req.Flags&op.Append != 0 && (rep.Off != size || rep.Attr.Size != size+uint64(len(req.Data))) {
			t.Errorf("appended %d bytes to %d at %d: %d", len(req.Data), size, rep.Off, rep.Attr.Size)
		}
		if told := one.told(); len(told) == 0 || told[0] != (op.Revoke{Kind: op.RevokeInode, Ino: ino}) {
			t.Errorf("%v: revoked %v", req.Type, told)
		}
		if i < len(changes)-2 && rep.Lease&op.LeaseIno == 0 {
			t.Errorf("%v: lease %v", req.Type, rep.Lease)
		}
		one.judge()
		two.judge()
	}
	if n := st.leases.Stats().Waiting; n != 0 {
		t.Errorf("%d requests still keep something", n)
	}
}

// TestLeaseSilent: a session that does not answer is waited for until it has ended,
// and nobody else but those who want the same.
func TestLeaseSilent(t *testing.T) {
	s, one, two := leased(t)
	st := s.stores[0]
	ino := s.file(t, "f", nil)
	one.must(op.Request{Type: op.Open, Ino: ino, Flags: op.WantWrite})
	one.gate.Lock()
	change := two.begin(st, op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetUID, UID: 5})
	question := two.begin(st, op.Request{Type: op.Getattr, Ino: ino})
	read := two.begin(st, op.Request{Type: op.Read, Ino: ino, Len: 10})
	open := two.begin(st, op.Request{Type: op.Open, Ino: ino})
	ctx, stop := context.WithCancel(context.Background())
	stop()
	req := op.Request{Type: op.Getattr, Ino: ino, Session: 2}
	address(&req)
	if err := s.Do(ctx, &req, &op.Reply{}); !errors.Is(err, sealfs.ErrInterrupted) {
		t.Errorf("a question that is interrupted: %v", err)
	}
	for i := range 20 {
		other := two.must(op.Request{Type: op.Create, Dir: s.root, Name: fmt.Sprint(i), Mode: 0o644, Flags: op.OpenIt})
		two.must(op.Request{Type: op.Write, Ino: other.Attr.Ino, Data: []byte("x")})
	}
	if rep := two.must(op.Request{Type: op.Readdir, Dir: s.root, Len: 1 << 20, Flags: op.Plus}); len(rep.Entries) != 21 || rep.Lease != op.LeaseDir|op.LeaseIno {
		t.Errorf("%d entries, lease %v", len(rep.Entries), rep.Lease)
	} else {
		for _, e := range rep.Entries {
			if (e.Attr.Ino == 0) != (e.Ino == ino) {
				t.Errorf("entry %+v", e)
			}
		}
	}
	if err := s.EndSession(1); err != nil {
		t.Fatal(err)
	}
	for _, got := range []<-chan *op.Reply{change, question, read, open} {
		if rep := two.wait(got); rep.Code != 0 {
			t.Error(rep.Code)
		}
	}
	one.gate.Unlock()
	if rep := one.try(op.Request{Type: op.Getattr, Ino: ino}); rep.Lease != 0 {
		t.Error("a session that has ended is granted a lease")
	}
}

// TestLeaseWrite: who may delay writes sends them before anybody else is told of the
// file, keeps the rest, and gives the right up with the last release.
func TestLeaseWrite(t *testing.T) {
	s, one, two := leased(t)
	rep := one.must(op.Request{Type: op.Create, Dir: s.root, Name: "f", Mode: 0o644, Flags: op.OpenIt})
	ino := rep.Attr.Ino
	if rep.Lease != op.LeaseIno|op.LeaseWrite|op.LeaseDir {
		t.Errorf("create: lease %v", rep.Lease)
	}
	size := uint64(0)
	for i, req := range []op.Request{
		{Type: op.Getattr, Ino: ino},
		{Type: op.Lookup, Dir: s.root, Name: "f"},
		{Type: op.Seek, Ino: ino, Mode: 4},
		{Type: op.Open, Ino: ino, Flags: op.WantWrite},
		{Type: op.Create, Dir: s.root, Name: "f"},
	} {
		size += 400_000
		one.mu.Lock()
		if !one.write[ino] {
			t.Fatalf("%v: session 1 may not delay writes", req.Type)
		}
		one.dirty[ino] = size
		one.mu.Unlock()
		if rep := two.must(req); rep.Attr.Size != size || rep.Lease&^op.LeaseDir != op.LeaseIno {
			t.Errorf("%v tells size %d of %d, lease %v", req.Type, rep.Attr.Size, size, rep.Lease)
		}
		if told := one.told(); len(told) != 1 || told[0] != (op.Revoke{Kind: op.RecallWrite, Ino: ino}) {
			t.Errorf("%v: revoked %v", req.Type, told)
		}
		if rep := one.must(op.Request{Type: op.Write, Ino: ino, Data: []byte("x")}); rep.Lease != op.LeaseIno|op.LeaseWrite {
			t.Errorf("a write after all others were taken: lease %v", rep.Lease)
		}
		if told := two.told(); len(told) != 1 || told[0] != (op.Revoke{Kind: op.RevokeInode, Ino: ino}) {
			t.Errorf("step %d: revoked %v", i, told)
		}
	}
	one.must(op.Request{Type: op.Release, Ino: ino, Len: 1})
	one.mu.Lock()
	delete(one.write, ino)
	one.mu.Unlock()
	if rep := two.must(op.Request{Type: op.Getattr, Ino: ino}); rep.Lease != op.LeaseIno || len(one.told()) != 0 {
		t.Errorf("after the release: lease %v", rep.Lease)
	}
	if rep := one.must(op.Request{Type: op.Write, Ino: ino, Data: []byte("x")}); rep.Lease != op.LeaseIno {
		t.Errorf("a write to a file that is not open: lease %v", rep.Lease)
	}
}

// TestLeaseNames: who changes a name takes that name from others, and no more.
func TestLeaseNames(t *testing.T) {
	s, one, two := leased(t)
	s.file(t, "a", nil)
	for _, name := range []string{"a", "b", "c"} {
		want := op.LeaseDir
		if name == "a" {
			want |= op.LeaseIno
		}
		if rep := one.try(op.Request{Type: op.Lookup, Dir: s.root, Name: name}); rep.Lease != want {
			t.Errorf("lookup of %s: lease %v, %v", name, rep.Lease, rep.Code)
		}
	}
	a := one.must(op.Request{Type: op.Lookup, Dir: s.root, Name: "a"}).Attr.Ino
	d := two.must(op.Request{Type: op.Mkdir, Dir: s.root, Name: "b", Mode: 0o755}).Attr.Ino
	two.must(op.Request{Type: op.Rename, Dir: s.root, Name: "a", Dir2: d, Name2: "a"})
	name := func(n string) op.Revoke { return op.Revoke{Kind: op.RevokeName, Ino: s.root, Name: n} }
	want := []op.Revoke{name("b"), name("a"), {Kind: op.RevokeInode, Ino: a}}
	if told := one.told(); fmt.Sprint(told) != fmt.Sprint(want) {
		t.Errorf("revoked %v, want %v", told, want)
	}
	one.mu.Lock()
	if _, ok := one.names[dirName{s.root, "c"}]; !ok {
		t.Error("the third name is not believed any more")
	}
	one.mu.Unlock()
	one.judge()
	two.judge()
	// What a rename replaces the answer does not tell of: the sender itself must forget it.
	for _, n := range []string{"x", "y"} {
		two.must(op.Request{Type: op.Create, Dir: d, Name: n, Mode: 0o644})
	}
	y := two.must(op.Request{Type: op.Lookup, Dir: d, Name: "y"}).Attr.Ino
	two.must(op.Request{Type: op.Link, Dir: d, Name: "z", Ino: y})
	two.told()
	two.must(op.Request{Type: op.Rename, Dir: d, Name: "x", Dir2: d, Name2: "y"})
	if told := two.told(); len(told) != 1 || told[0] != (op.Revoke{Kind: op.RevokeOwn, Ino: y}) {
		t.Errorf("revoked %v", told)
	}
	two.judge()
}

// TestLeaseClose: a server that is closed ends Watches, and what waits for leases.
func TestLeaseClose(t *testing.T) {
	s, one, two := leased(t)
	st := s.stores[0]
	ino := s.file(t, "f", nil)
	one.must(op.Request{Type: op.Getattr, Ino: ino})
	one.gate.Lock()
	before := st.leases.Stats().Waits
	got := make(chan error, 1)
	go func() {
		req := op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetUID, UID: 5, Session: 2}
		address(&req)
		got <- s.Do(two.ctx, &req, &op.Reply{})
	}()
	poll(t, "the request does not wait", func() bool { return st.leases.Stats().Waits > before })
	one.gate.Unlock()
	one.gate.Lock() // it may have acknowledged before the server is closed
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	for i, ch := range []chan error{got, closed} {
		select {
		case err := <-ch:
			if err != nil && (i > 0 || !errors.Is(err, sealfs.ErrClosed)) {
				t.Error(err)
			}
		case <-two.ctx.Done():
			t.Fatal("the server does not close")
		}
	}
	one.gate.Unlock()
	one.stop()
	two.stop()
	s.dev, s.region = s.dev.Reopen(), s.region.Reopen()
	s.start(t, nil)
	req := op.Request{Type: op.Watch, Session: 1, Off: 1 << 32}
	var rep op.Reply
	if err := s.Do(context.Background(), &req, &rep); err != nil || rep.Code != sealfs.ErrInvalid {
		t.Errorf("a Watch of an earlier run: %v, %v", err, rep.Code)
	}
}

// TestLeaseGrace: after a start nothing is told or changed until all sessions that
// live have registered.
func TestLeaseGrace(t *testing.T) {
	w := newWorld(t, 3, 1, 1)
	for i := range w.srv {
		s := w.srv[i].Load()
		for _, st := range s.stores {
			st.holds.begin()
		}
		s.SetSessions(9, []sealfs.Session{7, 8})
	}
	shard := w.root.Home(testShards)
	st := w.srv[w.of[w.m.Load().Table[shard].Replicas[0]]].Load().stores[0]
	got := make(chan error, 3)
	for _, req := range []op.Request{
		{Type: op.Getattr, Ino: w.root}, {Type: op.Create, Dir: w.root, Name: "f", Mode: 0o644}, {Type: op.Mkdir, Dir: w.root, Name: "d", Mode: 0o755, Shard2: shard ^ 1},
	} {
		go func() {
			address(&req)
			req.Session = 8
			var rep op.Reply
			err := w.Do(context.Background(), &req, &rep)
			got <- errors.Join(err, rep.Err())
		}()
	}
	ctx, stop := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer stop()
	req := op.Request{Type: op.Getattr, Ino: w.root, Session: 8}
	address(&req)
	if err := w.Do(ctx, &req, &op.Reply{}); !errors.Is(err, sealfs.ErrInterrupted) {
		t.Errorf("a question after a start: %v", err)
	}
	for _, sess := range []sealfs.Session{7, 8} {
		if len(got) != 0 || st.holds.graceful() == nil {
			t.Error("somebody was answered before all have registered")
		}
		for shard := range sealfs.Shard(2) {
			var rep op.Reply
			if err := w.Do(context.Background(), &op.Request{Type: op.Register, Session: sess, Shard: shard}, &rep); err != nil || rep.Code != 0 {
				t.Fatal(err, rep.Code)
			}
		}
	}
	for range 3 {
		if err := <-got; err != nil {
			t.Error(err)
		}
	}
}

// truth has sessions that believe work on a few files and directories, one request
// after the other, and compares what all of them believe with the truth after each.
func truth(t *testing.T, h op.Handler, root sealfs.Ino, mounts []*believer, steps int, seed uint64) {
	truthAt(t, h, root, mounts, steps, seed, func(*op.Request) {})
}

// truthAt is truth of directories whose names may be elsewhere: at says where those of a request are.
func truthAt(t *testing.T, h op.Handler, root sealfs.Ino, mounts []*believer, steps int, seed uint64, at func(*op.Request)) {
	rng := rand.New(rand.NewPCG(seed, 17))
	dirs := []sealfs.Ino{root}
	files := map[sealfs.Ino]uint64{} // sizes
	var inos []sealfs.Ino
	told := 0
	for step := range steps {
		m := mounts[rng.IntN(len(mounts))]
		dir, dir2 := dirs[rng.IntN(len(dirs))], dirs[rng.IntN(len(dirs))]
		name, name2 := fmt.Sprint("n", rng.IntN(5)), fmt.Sprint("n", rng.IntN(5))
		ino := root
		if len(inos) > 0 {
			ino = inos[rng.IntN(len(inos))]
		}
		req := op.Request{Dir: dir, Name: name, Mode: 0o755}
		switch k := rng.IntN(16); k {
		case 0, 1:
			req.Type, req.Flags = op.Create, op.OpenIt
		case 2:
			req.Type, req.Shard2 = op.Mkdir, sealfs.Shard(rng.IntN(testShards))
		case 3:
			req.Type = op.Unlink
		case 4:
			req.Type = op.Rmdir
		case 5, 6, 7:
			req.Type, req.Dir2, req.Name2 = op.Rename, dir2, name2
			req.Flags = []op.Flags{0, 0, op.Exchange}[k-5]
		case 8:
			req.Type, req.Ino = op.Link, ino
		case 9:
			req = op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetMode, Mode: uint32(rng.IntN(0o1000))}
		case 10, 11:
			req.Type = op.Lookup
		case 12:
			req = op.Request{Type: op.Readdir, Dir: dir, Len: 1 << 20, Flags: op.Plus}
		case 13:
			req = op.Request{Type: op.Getattr, Ino: ino}
		default:
			// A write, delayed if that may be.
			end := uint64(1 + rng.IntN(500_000))
			m.mu.Lock()
			delays := m.write[ino]
			if delays {
				m.dirty[ino] = max(m.dirty[ino], end)
			}
			m.mu.Unlock()
			if _, file := files[ino]; delays {
				files[ino] = max(files[ino], end)
			} else if file && m.try(op.Request{Type: op.Write, Ino: ino, Off: end - 1, Data: []byte("x"), Flags: op.WantWrite}).Code == 0 {
				files[ino] = max(files[ino], end)
			}
			continue
		}
		at(&req)
		rep := m.try(req)
		if size, file := files[rep.Attr.Ino]; file && rep.Code == 0 && rep.Attr.Version != 0 && rep.Attr.Size != size {
			m.mu.Lock()
			if _, dirty := m.dirty[rep.Attr.Ino]; !dirty {
				t.Errorf("step %d: %v by session %d tells size %d of inode %d, which has %d", step, req.Type, m.id, rep.Attr.Size, rep.Attr.Ino, size)
			}
			m.mu.Unlock()
		}
		if rep.Code == 0 && (req.Type == op.Create || req.Type == op.Mkdir) {
			if _, known := files[rep.Attr.Ino]; req.Type == op.Create && !known && rep.Attr.Version == 1 {
				files[rep.Attr.Ino] = 0
			}
			if inos = append(inos, rep.Attr.Ino); len(inos) > 12 {
				inos = inos[1:]
			}
			if req.Type == op.Mkdir {
				if dirs = append(dirs, rep.Attr.Ino); len(dirs) > 5 {
					dirs = append(dirs[:1], dirs[len(dirs)-3:]...)
				}
			}
		}
		for _, b := range mounts {
			b.mu.Lock()
			told += len(b.attrs) + len(b.names)
			b.mu.Unlock()
			b.judge()
		}
		if t.Failed() {
			t.Fatalf("step %d: %v", step, req.Type)
		}
	}
	n := 0
	for _, b := range mounts {
		b.mu.Lock()
		n += len(b.revokes)
		b.mu.Unlock()
	}
	t.Logf("%d beliefs were compared, %d revocations", told, n)
	if told < steps || n < steps/20 {
		t.Errorf("%d beliefs, %d revocations in %d steps: the test did not reach its point", told, n, steps)
	}
}

// TestLeaseTruth: whatever sessions do on one server, none of them believes what is
// not true any more.
func TestLeaseTruth(t *testing.T) {
	s, one, two := leased(t)
	steps := 3000
	if testing.Short() {
		steps = 500
	}
	truth(t, s, s.root, []*believer{one, two, believe(t, s, 3, 0)}, steps, 1)
}

// TestLeaseTruthCluster is TestLeaseTruth over three servers with four stores, that
// lose what they say to each other.
func TestLeaseTruthCluster(t *testing.T) {
	w := newWorld(t, 4, 2, 1, 1)
	w.lose(20)
	steps := 1500
	if testing.Short() {
		steps = 250
	}
	var mounts []*believer
	for id := range sealfs.Session(3) {
		mounts = append(mounts, believe(t, w, 10+id, 0, 1, 2, 3))
	}
	truth(t, w, w.root, mounts, steps, 2)
	for _, b := range mounts {
		b.stop()
	}
}
