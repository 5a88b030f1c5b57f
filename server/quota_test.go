package server

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sealfs"
	"sealfs/cluster"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// limit gives volume 1 another quota, as a resize of the managers does.
func (w *world) limit(bytes, inodes uint64) {
	next := *w.m.Load()
	v := next.Volumes[0]
	next.Version++
	if v.Bytes == 0 && bytes != 0 || v.Inodes == 0 && inodes != 0 {
		v.Since = next.Version
	}
	v.Bytes, v.Inodes = bytes, inodes
	next.Volumes = []cluster.VolumeInfo{v}
	w.m.Store(&next)
}

// stored adds up what the rows of all stores say of volume 1.
func (w *world) stored() (bytes, inodes int64) {
	w.t.Helper()
	for i := range w.srv {
		for _, st := range w.srv[i].Load().all() {
			err := st.View(func(r pmem.Reader) error {
				return meta.VolumeUsage(r, testShards, func(_ sealfs.Volume, b, n int64) { bytes, inodes = bytes+b, inodes+n })
			})
			if err != nil {
				w.t.Error(err)
			}
		}
	}
	return bytes, inodes
}

// settled is stored when nothing is left to be freed.
func (w *world) settled() (bytes, inodes int64) {
	w.t.Helper()
	for i := range w.srv {
		for _, st := range w.srv[i].Load().all() {
			st.reclaim.settle()
		}
	}
	return w.stored()
}

// asks sends a request of a client in volume 1, addressed as clients do.
func (w *world) asks(req op.Request) *op.Reply {
	w.t.Helper()
	if req.Shard == 0 {
		address(&req)
	}
	req.Volume = 1
	rep := &op.Reply{}
	if err := w.Do(context.Background(), &req, rep); err != nil {
		w.t.Fatalf("%v: %v", req.Type, err)
	}
	return rep
}

func (w *world) asksFor(code sealfs.Code, req op.Request) *op.Reply {
	w.t.Helper()
	rep := w.asks(req)
	if rep.Code != code {
		w.t.Errorf("%v %q: %v, want %v", req.Type, req.Name, rep.Code, code)
	}
	return rep
}

// acl is an ACL that says more than a mode, in Linux's bytes.
func quotaACL() []byte {
	b := []byte{2, 0, 0, 0}
	for _, e := range [][3]uint32{{1, 7, ^uint32(0)}, {2, 7, 1000}, {4, 5, ^uint32(0)}, {16, 7, ^uint32(0)}, {32, 0, ^uint32(0)}} {
		b = append(b, byte(e[0]), 0, byte(e[1]), 0, byte(e[2]), byte(e[2]>>8), byte(e[2]>>16), byte(e[2]>>24))
	}
	return b
}

// TestQuotaEveryOperation meets the quota with every operation that grows a volume, and
// makes sure that those which do not grow it go on.
func TestQuotaEveryOperation(t *testing.T) {
	for _, stores := range [][]int{{1}, {2, 2}} {
		t.Run(fmt.Sprint(stores), func(t *testing.T) {
			w := newWorld(t, 31, stores...)
			file := w.asksFor(0, op.Request{Type: op.Create, Dir: w.root, Name: "file", Mode: 0o644}).Attr.Ino
			w.asksFor(0, op.Request{Type: op.Write, Ino: file, Data: make([]byte, 8192)})
			w.asksFor(0, op.Request{Type: op.Setxattr, Ino: file, Name: "user.a", Data: []byte("12345")})
			w.asksFor(0, op.Request{Type: op.Create, Dir: w.root, Name: "gone", Mode: 0o644})
			dir := w.asksFor(0, op.Request{Type: op.Mkdir, Dir: w.root, Name: "dir", Mode: 0o755, Shard2: 3}).Attr.Ino
			_, inodes := w.settled()

			w.limit(0, uint64(inodes))
			for _, in := range []sealfs.Ino{w.root, dir} {
				w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Create, Dir: in, Name: "x", Mode: 0o644})
				w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Mknod, Dir: in, Name: "x", Mode: 0o010644})
				w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Symlink, Dir: in, Name: "x", Data: []byte("target")})
				w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Tmpfile, Dir: in, Mode: 0o600})
				for shard := range sealfs.Shard(testShards) {
					w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Mkdir, Dir: in, Name: "x", Mode: 0o755, Shard2: shard})
				}
			}
			w.asksFor(0, op.Request{Type: op.Link, Dir: w.root, Name: "second", Ino: file})
			w.asksFor(0, op.Request{Type: op.Rename, Dir: w.root, Name: "second", Dir2: dir, Name2: "third"})
			w.asksFor(0, op.Request{Type: op.Write, Ino: file, Off: 8192, Data: make([]byte, 8192)})
			w.asksFor(0, op.Request{Type: op.Unlink, Dir: w.root, Name: "gone"})
			w.asksFor(0, op.Request{Type: op.Mkdir, Dir: dir, Name: "instead", Mode: 0o755, Shard2: 2})
			w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Create, Dir: w.root, Name: "x", Mode: 0o644})

			bytes, _ := w.settled()
			w.limit(uint64(bytes), 0)
			page := make([]byte, 4096)
			w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Write, Ino: file, Off: 1 << 20, Data: page})
			w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Write, Ino: file, Flags: op.Append, Data: page})
			w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Setxattr, Ino: file, Name: "user.b", Data: []byte("1")})
			w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Setxattr, Ino: file, Name: "user.a", Data: []byte("123456")})
			w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Setxattr, Ino: file, Name: op.ACLAccess, Data: quotaACL()})
			w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Setxattr, Ino: dir, Name: op.ACLDefault, Data: quotaACL()})
			w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Fallocate, Ino: file, Off: 1 << 20, Len: 1 << 20})
			w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Fallocate, Ino: file, Off: 1 << 20, Len: 1 << 50, Mode: keepSize})
			w.asksFor(0, op.Request{Type: op.Fallocate, Ino: file, Len: 8192})
			w.asksFor(0, op.Request{Type: op.Setxattr, Ino: file, Name: "user.a", Data: []byte("54321")})
			w.asksFor(0, op.Request{Type: op.Write, Ino: file, Off: 4096, Data: page})
			w.asksFor(0, op.Request{Type: op.Write, Ino: file, Off: 100, Data: page[:10]})
			w.asksFor(0, op.Request{Type: op.Setattr, Ino: file, Valid: op.SetSize, Size: 1 << 30})
			w.asksFor(0, op.Request{Type: op.Create, Dir: dir, Name: "empty", Mode: 0o644})
			w.asksFor(0, op.Request{Type: op.Fallocate, Ino: file, Off: 0, Len: 4096, Mode: 3})
			w.asksFor(0, op.Request{Type: op.Write, Ino: file, Off: 1 << 20, Data: page})
			w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Write, Ino: file, Off: 2 << 20, Data: page})
			w.asksFor(0, op.Request{Type: op.Setattr, Ino: file, Valid: op.SetSize, Size: 5000})
			w.asksFor(0, op.Request{Type: op.Write, Ino: file, Off: 8192, Data: page})

			c := &splitter{w, context.Background()}
			if err := c.write(file, sealfs.HomeBytes+sealfs.ChunkBytes*5, page); err != sealfs.ErrQuota && err != nil {
				t.Errorf("write to a chunk: %v", err)
			}
			if err := c.write(file, sealfs.HomeBytes+sealfs.ChunkBytes*6, make([]byte, 65536)); err != sealfs.ErrQuota {
				t.Errorf("write to a chunk beyond the quota: %v", err)
			}
			if now, _ := w.settled(); now > bytes {
				t.Errorf("%d bytes are stored under a quota of %d", now, bytes)
			}

			// A directory inherits an ACL, into each shard: what it takes is paid for, or nothing happens.
			w.limit(0, 0)
			w.asksFor(0, op.Request{Type: op.Setxattr, Ino: dir, Name: op.ACLDefault, Data: quotaACL()})
			for shard := range sealfs.Shard(testShards) {
				have, _ := w.settled()
				w.limit(uint64(have)+100, 0)
				w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Mkdir, Dir: dir, Name: fmt.Sprint("i", shard), Mode: 0o755, Shard2: shard})
				if now, _ := w.settled(); now != have {
					t.Errorf("shard %d: %d bytes after a refusal, %d before", shard, now, have)
				}
				w.limit(uint64(have)+1000, 0)
				w.asksFor(0, op.Request{Type: op.Mkdir, Dir: dir, Name: fmt.Sprint("i", shard), Mode: 0o755, Shard2: shard})
				if now, _ := w.settled(); now <= have+100 {
					t.Errorf("shard %d: %d bytes with two more ACLs, %d before", shard, now, have)
				}
			}

			// Below what there is, and up again.
			w.limit(4096, 1)
			w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Create, Dir: w.root, Name: "x", Mode: 0o644})
			w.asksFor(sealfs.ErrQuota, op.Request{Type: op.Write, Ino: file, Off: 2 << 20, Data: page})
			w.asksFor(0, op.Request{Type: op.Write, Ino: file, Off: 4096, Data: page[:904]})
			w.asksFor(0, op.Request{Type: op.Unlink, Dir: dir, Name: "empty"})
			w.limit(1<<20, 100)
			w.asksFor(0, op.Request{Type: op.Create, Dir: w.root, Name: "x", Mode: 0o644})
			w.asksFor(0, op.Request{Type: op.Write, Ino: file, Off: 3 << 20, Data: page})
			w.limit(0, 0)
			w.asksFor(0, op.Request{Type: op.Write, Ino: file, Off: 4 << 20, Data: make([]byte, 1<<20)})
		})
	}
}

// TestQuotaParallel fills a volume from all sides: at no time there is more than the quota, and
// nobody is told that it is used up before it is, be it that servers are killed meanwhile.
func TestQuotaParallel(t *testing.T) {
	for _, kills := range []int{0, 6} {
		t.Run(fmt.Sprint(kills), func(t *testing.T) {
			const quota, piece, writers = 24 << 20, 20_000, 8
			w := newWorld(t, 32, 2, 2)
			for i := range w.srv {
				w.srv[i].Load().pace.plea = 50 * time.Millisecond // kill waits for whoever waits
			}
			w.pace.plea = 50 * time.Millisecond
			var calm atomic.Bool // nobody is killed any more
			var files []sealfs.Ino
			for i := range writers {
				dir := w.asksFor(0, op.Request{Type: op.Mkdir, Dir: w.root, Name: fmt.Sprint("d", i), Mode: 0o755, Shard2: sealfs.Shard(i % testShards)}).Attr.Ino
				files = append(files, w.asksFor(0, op.Request{Type: op.Create, Dir: dir, Name: "f", Mode: 0o644}).Attr.Ino)
			}
			w.limit(quota, 0)
			var written atomic.Int64
			var work sync.WaitGroup
			for i, file := range files {
				work.Go(func() {
					data := make([]byte, piece)
					for at := uint64(0); ; at += 5 * 4096 {
						req := op.Request{Type: op.Write, Ino: file, Off: at, Data: data, Shard: file.Home(testShards), Volume: 1}
						var rep op.Reply
						for {
							err := w.Do(context.Background(), &req, &rep)
							if err == nil {
								break
							}
							if !errors.Is(err, sealfs.ErrUnavailable) {
								t.Errorf("writer %d: %v", i, err)
								return
							}
						}
						if rep.Code == sealfs.ErrQuota {
							if calm.Load() {
								return
							}
							at -= 5 * 4096 // a store was away that had something
							continue
						}
						if rep.Code == 0 {
							written.Add(piece)
							continue
						}
						t.Errorf("writer %d: %v", i, rep.Code)
						return
					}
				})
			}
			done := make(chan struct{})
			go func() {
				work.Wait()
				close(done)
			}()
			for n, over := 0, false; !over; n++ {
				select {
				case <-done:
					over = true
				default:
					if n < kills {
						before := written.Load()
						poll(t, "nobody writes", func() bool { return written.Load() > before+quota/10 || before > quota*9/10 })
						w.kill(n % 2)
					} else {
						calm.Store(true)
					}
				}
				if n%1000 == 0 {
					if bytes, _ := w.stored(); bytes > quota {
						t.Fatalf("%d bytes are stored under a quota of %d", bytes, quota)
					}
				}
			}
			bytes, _ := w.stored()
			if bytes > quota || bytes <= quota-piece {
				t.Errorf("%d bytes are stored when %d more do not fit into %d", bytes, piece, quota)
			}
			t.Logf("%d of %d bytes", bytes, quota)
		})
	}
}

// TestQuotaModel does random things to a volume with a quota that changes, on five stores of
// three servers, which are killed, and whose messages are lost: a change is refused if, and only
// if, there would be more than the quota.
func TestQuotaModel(t *testing.T) {
	steps := 3000
	if testing.Short() {
		steps = 600
	}
	for _, loss := range []int{0, 60} {
		t.Run(fmt.Sprint(loss), func(t *testing.T) {
			w := newWorld(t, 33, 2, 2, 1)
			rng := rand.New(rand.NewPCG(34, uint64(loss)))
			c := &retrier{w: w}
			do := func(req op.Request) *op.Reply {
				address(&req)
				rep := &op.Reply{}
				if err := c.Do(context.Background(), &req, rep); err != nil {
					t.Fatalf("%v: %v", req.Type, err)
				}
				return rep
			}
			var dirs []sealfs.Ino
			for i := range 10 {
				dirs = append(dirs, do(op.Request{Type: op.Mkdir, Dir: w.root, Name: fmt.Sprint(i), Mode: 0o755, Shard2: sealfs.Shard(i % testShards)}).Attr.Ino)
			}
			type file struct {
				ino, dir sealfs.Ino
				name     string
				bytes    int64 // a whole number of blocks
			}
			var files []file
			var limitBytes, limitInodes, bytes int64
			inodes := int64(1 + len(dirs))
			refused := 0
			for n := range steps {
				if n%40 == 0 {
					limitBytes, limitInodes = int64(rng.IntN(4))*rng.Int64N(3<<20), int64(rng.IntN(4))*rng.Int64N(80)
					w.limit(uint64(limitBytes), uint64(limitInodes))
				}
				if n%150 == 149 {
					w.lose(0)
					w.kill(rng.IntN(3))
				}
				w.lose(loss)
				name := fmt.Sprint("f", n)
				dir := dirs[rng.IntN(len(dirs))]
				var needBytes, needInodes int64
				var rep *op.Reply
				var then func()
				switch k := rng.IntN(10); {
				case k < 3 || len(files) == 0:
					needInodes = 1
					rep = do(op.Request{Type: op.Create, Dir: dir, Name: name, Mode: 0o644})
					then = func() { files = append(files, file{rep.Attr.Ino, dir, name, 0}) }
				case k < 4:
					needInodes = 1
					rep = do(op.Request{Type: op.Mkdir, Dir: dir, Name: name, Mode: 0o755, Shard2: sealfs.Shard(rng.IntN(testShards))})
					then = func() {}
				case k < 8:
					f := &files[rng.IntN(len(files))]
					needBytes = 4096 * (1 + rng.Int64N(30))
					rep = do(op.Request{Type: op.Write, Ino: f.ino, Off: uint64(f.bytes), Data: make([]byte, needBytes)})
					then = func() { f.bytes += needBytes }
				case k < 9:
					f := &files[rng.IntN(len(files))]
					to := 4096 * (f.bytes / 8192)
					rep = do(op.Request{Type: op.Setattr, Ino: f.ino, Valid: op.SetSize, Size: uint64(to)})
					needBytes = to - f.bytes
					then = func() { f.bytes = to }
				default:
					i := rng.IntN(len(files))
					f := files[i]
					rep = do(op.Request{Type: op.Unlink, Dir: f.dir, Name: f.name})
					needBytes, needInodes = -f.bytes, -1
					then = func() { files = append(files[:i], files[i+1:]...) }
				}
				over := limitBytes != 0 && needBytes > 0 && bytes+needBytes > limitBytes || limitInodes != 0 && needInodes > 0 && inodes+needInodes > limitInodes
				switch {
				case rep.Code == sealfs.ErrQuota && over:
					refused++
				case rep.Code == 0 && !over:
					then()
					bytes, inodes = bytes+needBytes, inodes+needInodes
				default:
					t.Fatalf("step %d: %v, with %d+%d of %d bytes and %d+%d of %d inodes", n, rep.Code, bytes, needBytes, limitBytes, inodes, needInodes, limitInodes)
				}
			}
			w.lose(0)
			w.settle()
			if b, i := w.settled(); b != bytes || i != inodes {
				t.Errorf("%d bytes and %d inodes are stored, %d and %d were told", b, i, bytes, inodes)
			}
			t.Logf("%d of %d refused", refused, steps)
		})
	}
}

// TestQuotaPowerCut takes the power away from servers, one after the other: what a store had
// freed and not synced is there again, and nobody else may have got its room.
func TestQuotaPowerCut(t *testing.T) {
	const quota, piece = 4 << 20, 65536
	w := newWorld(t, 35, 1, 1, 1)
	w.damaged = true // names and what they stand for are of different moments
	rng := rand.New(rand.NewPCG(36, 0))
	var files []sealfs.Ino
	for i := range 6 {
		dir := w.asksFor(0, op.Request{Type: op.Mkdir, Dir: w.root, Name: fmt.Sprint("d", i), Mode: 0o755, Shard2: sealfs.Shard(i)}).Attr.Ino
		files = append(files, w.asksFor(0, op.Request{Type: op.Create, Dir: dir, Name: "f", Mode: 0o644}).Attr.Ino)
	}
	sync := func(server int) {
		for shard := range sealfs.Shard(testShards) {
			if w.of[w.m.Load().Table[shard].Replicas[0]] == server {
				w.asksFor(0, op.Request{Type: op.Sync, Shard: shard})
			}
		}
	}
	for server := range w.srv {
		sync(server)
	}
	w.limit(quota, 0)
	full := 0
	for round := range 40 {
		cut := rng.IntN(len(w.srv))
		for range 30 {
			// What goes is, more often, on the server that will lose it.
			file := files[rng.IntN(len(files))]
			row := w.m.Load().Table[file.Home(testShards)]
			if at := uint64(rng.IntN(40)) * piece; w.of[row.Replicas[0]] == cut && rng.IntN(2) == 0 {
				w.asksFor(0, op.Request{Type: op.Setattr, Ino: file, Valid: op.SetSize, Size: at / 4})
			} else if w.asks(op.Request{Type: op.Write, Ino: file, Off: at, Data: make([]byte, piece)}).Code == sealfs.ErrQuota {
				full++
			}
		}
		for server := range w.srv {
			if server != cut {
				sync(server)
			}
		}
		w.restart(cut, true)
		if bytes, _ := w.stored(); bytes > quota {
			t.Fatalf("round %d: %d bytes are stored under a quota of %d", round, bytes, quota)
		}
	}
	if full == 0 {
		t.Error("the volume was never full")
	}
	t.Logf("%d writes refused", full)
}

// rowsOf counts the rows that are kept of the quota of volume 1.
func (w *world) rowsOf() (n int) {
	w.t.Helper()
	for i := range w.srv {
		for _, st := range w.srv[i].Load().all() {
			err := st.View(func(r pmem.Reader) error {
				return meta.Grants(r, rootShard(1, testShards), 1, func(sealfs.UUID, meta.Grant) { n++ })
			})
			if err != nil {
				w.t.Error(err)
			}
		}
	}
	return n
}

// TestQuotaAway has the keeper of a quota, and a store that was given something, not answer.
func TestQuotaAway(t *testing.T) {
	w := newWorld(t, 37, 1, 1, 1, 1)
	for i := range w.srv {
		w.srv[i].Load().pace.plea = 100 * time.Millisecond
	}
	keeper := w.m.Load().Table[rootShard(1, testShards)].Replicas[0]
	files := map[uint16]sealfs.Ino{} // one on each store
	for shard := range sealfs.Shard(testShards) {
		dir := w.asksFor(0, op.Request{Type: op.Mkdir, Dir: w.root, Name: fmt.Sprint("d", shard), Mode: 0o755, Shard2: shard}).Attr.Ino
		files[w.m.Load().Table[shard].Replicas[0]] = w.asksFor(0, op.Request{Type: op.Create, Dir: dir, Name: "f", Mode: 0o644}).Attr.Ino
	}
	at := uint64(0)
	write := func(store uint16, n int) error {
		req := op.Request{Type: op.Write, Ino: files[store], Off: at, Data: make([]byte, n)}
		address(&req)
		at += uint64(n)
		var rep op.Reply
		if err := w.Do(context.Background(), &req, &rep); err != nil {
			return err
		}
		return rep.Err()
	}
	want := func(what string, err, want error) {
		t.Helper()
		if want == nil && err != nil || !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	others := slices.DeleteFunc([]uint16{0, 1, 2, 3}, func(s uint16) bool { return s == keeper })
	a, b, c := others[0], others[1], others[2]
	quiet := func(stores ...uint16) {
		w.silence(func(req *op.Request) bool {
			return (req.Type == op.Grant || req.Type == op.Recall) && slices.Contains(stores, w.m.Load().Table[req.Shard].Replicas[0])
		})
	}

	// A quota is set while a store is away: nobody knows what that holds.
	quiet(b)
	w.limit(8<<20, 0)
	want("with a store that has not been heard", write(a, 4096), sealfs.ErrUnavailable)
	quiet()
	want("when it was heard", write(a, 4096), nil)
	want("on the other one", write(b, 4096), nil)

	// Within what a store was given, nobody is asked.
	quiet(0, 1, 2, 3)
	want("within the limit, with nobody to ask", write(a, 65536), nil)
	want("beyond the limit, with nobody to ask", write(a, 1<<20), sealfs.ErrUnavailable)
	quiet()
	want("beyond the limit", write(a, 1<<20), nil)

	// What a store that is away was given counts as used.
	w.srv[w.of[b]].Load().stores[0].usage.mu.Lock()
	given := w.srv[w.of[b]].Load().stores[0].usage.limits[1].bytes
	w.srv[w.of[b]].Load().stores[0].usage.mu.Unlock()
	if given < 1<<19 {
		t.Fatalf("a store was given %d bytes of 8 MiB", given)
	}
	quiet(b)
	var err error
	for err == nil {
		err = write(c, 65536)
	}
	want("when all but what is away is used", err, sealfs.ErrQuota)
	if bytes, _ := w.stored(); bytes > 8<<20-given+2*65536 || bytes < 8<<20-given-2*65536 {
		t.Errorf("%d bytes are stored, and a store that is away was given %d of 8 MiB", bytes, given)
	}
	quiet()
	want("when it is back", write(c, 65536), nil)

	// Rows go with the volume.
	if n := w.rowsOf(); n != 4 {
		t.Errorf("%d stores have limits", n)
	}
	if err := DropVolume(context.Background(), w, testShards, 1, nil); err != nil {
		t.Fatal(err)
	}
	if n := w.rowsOf(); n != 0 {
		t.Errorf("%d stores have limits of a volume that was dropped", n)
	}
	for _, typ := range []op.Type{op.Grant, op.Recall} {
		var rep op.Reply
		if err := w.srv[0].Load().Guests().Do(context.Background(), &op.Request{Type: typ, Session: 7, Volume: 1}, &rep); err != nil || rep.Code != sealfs.ErrPerm {
			t.Errorf("%v from a client: %v, %v", typ, rep.Code, err)
		}
	}
}

// TestQuotaHostile sends what no server of ours does.
func TestQuotaHostile(t *testing.T) {
	w := newWorld(t, 38, 2)
	w.limit(1<<20, 10)
	id := w.m.Load().Stores[0].ID
	shard := rootShard(1, testShards)
	for i, req := range []op.Request{
		{}, {Data: id[:5]}, {Data: append(id[:], 1)}, {Data: id[:], Shard: shard ^ 2}, {Data: id[:], Atime: -1}, {Data: id[:], Mtime: -1 << 63},
		{Data: id[:], Off: 1 << 63}, {Data: id[:], Len: 1<<64 - 1}, {Data: id[:], Atime: 1<<63 - 1}, {Data: id[:], Ctime: 1 << 40}, {Data: id[:], Volume: 9},
	} {
		req.Type = op.Grant
		if req.Shard == 0 {
			req.Shard = shard
		}
		if req.Volume == 0 {
			req.Volume = 1
		}
		var rep op.Reply
		if err := w.Do(context.Background(), &req, &rep); err == nil && rep.Code == 0 {
			t.Errorf("%d: %+v is answered %+v", i, req, rep)
		}
	}
	var rep op.Reply
	req := op.Request{Type: op.Recall, Shard: shard, Volume: 12345, Off: 1<<64 - 1, Len: 1<<64 - 1, Size: 1<<63 - 1, Gen: 1<<64 - 1, Mode: 1<<32 - 1}
	if err := w.Do(context.Background(), &req, &rep); err != nil || rep.Code != 0 {
		t.Errorf("a strange Recall: %v, %v", err, rep.Code)
	}
	w.asksFor(0, op.Request{Type: op.Create, Dir: w.root, Name: "x", Mode: 0o644})
}

// TestQuotaRewrite truncates a file whose chunks fill the volume, and writes to it at once: the
// writer must not be in the way of those who free the chunks.
func TestQuotaRewrite(t *testing.T) {
	w := newWorld(t, 39, 1)
	file := w.asksFor(0, op.Request{Type: op.Create, Dir: w.root, Name: "file", Mode: 0o644}).Attr.Ino
	c := &splitter{w, context.Background()}
	for round := range 10 {
		w.limit(0, 0)
		for i := range uint64(16) {
			if err := c.write(file, sealfs.HomeBytes+i*sealfs.ChunkBytes, make([]byte, 65536)); err != nil {
				t.Fatal(err)
			}
		}
		bytes, _ := w.stored()
		w.limit(uint64(bytes), 0)
		w.asksFor(0, op.Request{Type: op.Setattr, Ino: file, Valid: op.SetSize})
		w.asksFor(0, op.Request{Type: op.Write, Ino: file, Data: make([]byte, 4096)})
		w.asksFor(0, op.Request{Type: op.Write, Ino: file, Flags: op.Append, Data: make([]byte, 65536)})
		if err := c.write(file, sealfs.HomeBytes+uint64(round)*sealfs.ChunkBytes, make([]byte, 65536)); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
		w.asksFor(0, op.Request{Type: op.Setattr, Ino: file, Valid: op.SetSize})
		w.settled()
	}
}
