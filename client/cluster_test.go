package client

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"sealfs"
	"sealfs/internal/oracle"
	"sealfs/op"
)

// cluster is a model in three stores, and its clients.
type cluster struct {
	model *oracle.FS
	root  sealfs.Ino
}

func newCluster() *cluster {
	model, root := newModel()
	return &cluster{model, root}
}

// client returns a client with session id and the network that is between.
func (u *cluster) client(t testing.TB, id sealfs.Session, o Options) (*Client, *oracle.Net) {
	net := oracle.NewNet(u.model, 3, uint64(id))
	return u.clientOf(t, net, net, id, o), net
}

// lone is client for the only one there is, who gets every lease.
func (u *cluster) lone(t testing.TB, id sealfs.Session, o Options) (*Client, *oracle.Net) {
	net := oracle.NewNet(u.model, 3, uint64(id))
	c := u.clientOf(t, net, generous{net}, id, o)
	connected(t, c)
	return c, net
}

// clientOf returns a client that sends to h what goes to net in the end.
func (u *cluster) clientOf(t testing.TB, net *oracle.Net, h op.Handler, id sealfs.Session, o Options) *Client {
	o.Volume, o.Root, o.Shards, o.Session, o.Chunked, o.Each = 1, u.root, testShards, id, true, net.Each
	c := New(h, o)
	net.Register = c.Register
	t.Cleanup(func() {
		net.Lose(0)
		for i := range 3 {
			net.Back(i)
		}
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return c
}

// createIn makes an open file whose home is in the given store.
func createIn(t testing.TB, c *Client, net *oracle.Net, store int, name string) sealfs.Ino {
	t.Helper()
	ctx := context.Background()
	for i := 0; ; i++ {
		d, err := c.Mkdir(ctx, c.Root(), fmt.Sprintf("%s.%d", name, i), 0o755, Cred{})
		if err != nil {
			t.Fatal(err)
		}
		if net.Store(d.Ino.Home(testShards)) == store {
			a, err := c.Create(ctx, d.Ino, name, 0o644, Cred{})
			if err != nil {
				t.Fatal(err)
			}
			return a.Ino
		}
	}
}

// near returns an offset near one of the borders of a large file.
func near(rng *rand.Rand) uint64 {
	borders := []uint64{0, sealfs.HomeBytes, sealfs.HomeBytes + sealfs.ChunkBytes, sealfs.HomeBytes + 2*sealfs.ChunkBytes}
	b := borders[rng.IntN(len(borders))]
	return max(b, 300<<10) - 300<<10 + uint64(rng.IntN(600<<10))
}

// TestLargeFiles compares one file with chunks, used in turn by two clients, with
// a byte slice, while answers get lost.
func TestLargeFiles(t *testing.T) {
	for _, loss := range []float64{0, 0.05} {
		t.Run(fmt.Sprint(loss), func(t *testing.T) {
			u := newCluster()
			var clients []*Client
			for i := range 2 {
				c, net := u.client(t, sealfs.Session(i+1), Options{BufferBytes: 4 << 20})
				net.Lose(loss)
				clients = append(clients, c)
			}
			largeFiles(t, clients)
		})
	}
	for _, chunked := range []bool{false, true} {
		t.Run(fmt.Sprint("engine ", chunked), func(t *testing.T) {
			s, root, err := newEngine(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			var clients []*Client
			for range 2 {
				clients = append(clients, New(s, Options{Volume: 1, Root: root, Shards: testShards, Chunked: chunked}))
			}
			largeFiles(t, clients)
		})
	}
}

func largeFiles(t *testing.T, clients []*Client) {
	steps := 1500
	if testing.Short() {
		steps /= 4
	}
	ctx := context.Background()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	a, err := clients[0].Create(ctx, clients[0].Root(), "f", 0o644, Cred{})
	if err != nil {
		t.Fatal(err)
	}
	ino := a.Ino
	if _, err := clients[1].Open(ctx, ino); err != nil {
		t.Fatal(err)
	}
	const most = sealfs.HomeBytes + 3*sealfs.ChunkBytes
	want := make([]byte, 0, most)
	grow := func(size uint64) {
		if n := uint64(len(want)); size > n {
			want = want[:size]
			clear(want[n:])
		}
	}
	check := func(i int, what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("step %d: %s: %v", i, what, err)
		}
	}
	c := clients[0]
	for i := range steps {
		if rng.IntN(10) == 0 { // close-to-open: the other one looks before it reads
			check(i, "flush", c.Flush(ctx, ino))
			c = clients[rng.IntN(2)]
			_, err := c.Getattr(ctx, ino)
			check(i, "getattr", err)
		}
		off, n := near(rng), uint64(1+rng.IntN(200<<10))
		if rng.IntN(10) == 0 {
			n = uint64(1 + rng.IntN(3<<20))
		}
		if n = min(n, most-off); len(want) > most-4<<20 && rng.IntN(3) == 0 {
			off = uint64(rng.IntN(most - 4<<20))
		}
		switch kind := rng.IntN(12); kind {
		case 0, 1, 2:
			data := bytes.Repeat([]byte{byte(i) | 1}, int(n))
			check(i, "write", c.Write(ctx, ino, off, data, 0))
			grow(off + n)
			copy(want[off:], data)
		case 3, 4:
			if uint64(len(want))+n > most {
				continue
			}
			data := bytes.Repeat([]byte{byte(i) | 1}, int(n))
			check(i, "append", c.Write(ctx, ino, 0, data, op.Append))
			want = append(want, data...)
		case 5, 6, 7:
			got, err := c.Read(ctx, ino, off, int(min(n, sealfs.IOMax)), nil)
			check(i, "read", err)
			lo, hi := min(off, uint64(len(want))), min(off+min(n, sealfs.IOMax), uint64(len(want)))
			if !bytes.Equal(got, want[lo:hi]) {
				t.Fatalf("step %d: read at %d+%d: %d bytes, want %d, or other ones", i, off, n, len(got), hi-lo)
			}
		case 8:
			if rng.IntN(4) > 0 && off < sealfs.HomeBytes {
				continue
			}
			a, err := c.Setattr(ctx, ino, &SetAttr{Valid: op.SetSize, Size: off})
			check(i, "truncate", err)
			if a.Size != off {
				t.Fatalf("step %d: size %d, want %d", i, a.Size, off)
			}
			grow(off)
			want = want[:off]
		case 9:
			mode := []uint32{0, keepSize, punchHole | keepSize, zeroRange, zeroRange | keepSize}[rng.IntN(5)]
			check(i, "fallocate", c.Fallocate(ctx, ino, off, n, mode))
			if mode&keepSize == 0 {
				grow(off + n)
			}
			if end := min(off+n, uint64(len(want))); mode&(punchHole|zeroRange) != 0 && off < end {
				clear(want[off:end])
			}
		case 10:
			a, err := c.Getattr(ctx, ino)
			check(i, "getattr", err)
			if a.Size != uint64(len(want)) {
				t.Fatalf("step %d: size %d, want %d", i, a.Size, len(want))
			}
		case 11:
			whence := SeekData + uint32(rng.IntN(2))
			at, err := c.Seek(ctx, ino, off, whence)
			if off >= uint64(len(want)) {
				if err != sealfs.ErrNoDevice {
					t.Fatalf("step %d: seek beyond the end: %d, %v", i, at, err)
				}
				continue
			}
			checkSeek(t, want, off, at, whence, err)
		}
	}
	for _, c := range clients {
		check(steps, "fsync", c.Fsync(ctx, ino))
		check(steps, "release", c.Release(ctx, ino))
	}
}

// checkSeek checks that data is not in what seek says to be a hole, and that a
// hole is where it says.
func checkSeek(t *testing.T, want []byte, off, at uint64, whence uint32, err error) {
	t.Helper()
	end := uint64(len(want))
	switch {
	case whence == SeekData && err == sealfs.ErrNoDevice:
		at = end
	case err != nil:
		t.Fatalf("seek %d from %d: %v", whence, off, err)
	case at < off || at > end:
		t.Fatalf("seek %d from %d answers %d of %d", whence, off, at, end)
	}
	if whence == SeekData {
		if len(bytes.TrimLeft(want[off:at], "\x00")) > 0 {
			t.Fatalf("there is data between %d and %d", off, at)
		}
	} else if at < end && len(bytes.Trim(want[at:min((at/sealfs.BlockSize+1)*sealfs.BlockSize, end)], "\x00")) > 0 {
		t.Fatalf("there is data at %d", at)
	}
}

// TestAppendersNeverOverwrite lets two clients append to a file while it grows
// over the border of its home and answers get lost: each record is there once.
func TestAppendersNeverOverwrite(t *testing.T) {
	for _, test := range []struct{ records, length, start int }{
		{300, 3000, sealfs.HomeBytes - 450_000}, {15, 300_000, sealfs.HomeBytes - 2_000_000}, {15, 300_000, 0},
	} {
		t.Run(fmt.Sprintf("%d at %d", test.length, test.start), func(t *testing.T) {
			appendTogether(t, test.records, test.length, uint64(test.start))
		})
	}
}

func appendTogether(t *testing.T, records, length int, start uint64) {
	u := newCluster()
	ctx := context.Background()
	var wg sync.WaitGroup
	var ino sealfs.Ino
	for i := range 2 {
		c, net := u.client(t, sealfs.Session(i+1), Options{})
		c.age = 5 * time.Millisecond
		if i == 0 {
			a, err := c.Create(ctx, u.root, "log", 0o644, Cred{})
			if err != nil {
				t.Fatal(err)
			}
			ino = a.Ino
			if _, err := c.Setattr(ctx, ino, &SetAttr{Valid: op.SetSize, Size: start}); err != nil {
				t.Fatal(err)
			}
		} else if _, err := c.Open(ctx, ino); err != nil {
			t.Fatal(err)
		}
		net.Lose(0.05)
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 2))
			for r := range records {
				rec := bytes.Repeat([]byte{byte(i + 1)}, length)
				copy(rec, fmt.Sprintf("%d:%d:", i, r))
				if err := c.Write(ctx, ino, 0, rec, op.Append); err != nil {
					t.Errorf("append: %v", err)
				}
				if rng.IntN(5) == 0 {
					if err := c.Flush(ctx, ino); err != nil {
						t.Errorf("flush: %v", err)
					}
				}
			}
			if err := c.Release(ctx, ino); err != nil {
				t.Errorf("release: %v", err)
			}
		})
	}
	wg.Wait()
	c, _ := u.client(t, 3, Options{})
	a, err := c.Getattr(ctx, ino)
	if err != nil || a.Size != start+2*uint64(records*length) {
		t.Fatalf("size %d, want %d, %v", a.Size, int(start)+2*records*length, err)
	}
	seen := map[string]bool{}
	for off := start; off < a.Size; off += uint64(length) {
		rec, err := c.Read(ctx, ino, off, length, nil)
		if err != nil || len(rec) != length {
			t.Fatalf("record at %d: %d bytes, %v", off, len(rec), err)
		}
		var i, r int
		if _, err := fmt.Sscanf(string(rec[:20]), "%d:%d:", &i, &r); err != nil {
			t.Fatalf("record at %d: %q", off, rec[:20])
		}
		name := fmt.Sprintf("%d:%d:", i, r)
		if seen[name] || len(bytes.Trim(rec[len(name):], string(rune(i+1)))) > 0 {
			t.Fatalf("record %q is there twice, or torn", name)
		}
		seen[name] = true
	}
}

// TestExtendsAreFew counts what a stream of small writes beyond the home costs.
func TestExtendsAreFew(t *testing.T) {
	for _, flags := range []op.Flags{0, op.Append} {
		u := newCluster()
		net := oracle.NewNet(u.model, 3, 1)
		s := &spy{Handler: net}
		c := u.clientOf(t, net, generous{s}, 1, Options{})
		connected(t, c)
		c.age = time.Hour
		ctx := context.Background()
		a, err := c.Create(ctx, u.root, "f", 0o644, Cred{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Setattr(ctx, a.Ino, &SetAttr{Valid: op.SetSize, Size: sealfs.HomeBytes + 1}); err != nil {
			t.Fatal(err)
		}
		if _, err := c.layoutOf(ctx, c.nodes.get(a.Ino), a.Ino); err != nil {
			t.Fatal(err)
		}
		before := s.n(op.Extend)
		const total = 8 << 20
		for off := uint64(0); off < total; off += 4096 {
			if err := c.Write(ctx, a.Ino, sealfs.HomeBytes+off, make([]byte, 4096), flags); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Release(ctx, a.Ino); err != nil {
			t.Fatal(err)
		}
		if n := s.n(op.Extend) - before; n > total>>20+2 {
			t.Errorf("flags %d: %d Extends for %d MiB", flags, n, total>>20)
		}
	}
}

// TestFsyncReachesEveryStore looks where Sync goes.
func TestFsyncReachesEveryStore(t *testing.T) {
	u := newCluster()
	c, net := u.client(t, 1, Options{})
	ctx := context.Background()
	a, err := c.Create(ctx, u.root, "f", 0o644, Cred{})
	if err != nil {
		t.Fatal(err)
	}
	synced := func() map[sealfs.Shard]int { return u.model.Syncs() }
	write := func(off uint64) {
		t.Helper()
		if err := c.Write(ctx, a.Ino, off, []byte("x"), 0); err != nil {
			t.Fatal(err)
		}
	}
	offs := []uint64{0, sealfs.HomeBytes, sealfs.HomeBytes + 5*sealfs.ChunkBytes}
	for _, off := range offs {
		write(off)
	}
	if err := c.Fsync(ctx, a.Ino); err != nil {
		t.Fatal(err)
	}
	first := synced()
	for _, off := range offs {
		if first[a.Ino.DataShard(off, testShards)] == 0 {
			t.Errorf("the shard of offset %d was not synced", off)
		}
	}
	write(1)
	if err := c.Fsync(ctx, a.Ino); err != nil {
		t.Fatal(err)
	}
	home := a.Ino.Home(testShards)
	for s, n := range synced() {
		if n != first[s] && s != home {
			t.Errorf("shard %d was synced again", s)
		}
	}
	// Many chunks: one request to each store.
	for i := range uint64(20) {
		write(sealfs.HomeBytes + i*sealfs.ChunkBytes)
	}
	before := synced()
	if err := c.Fsync(ctx, a.Ino); err != nil {
		t.Fatal(err)
	}
	stores := map[int]int{}
	for s, n := range synced() {
		stores[net.Store(s)] += n - before[s]
	}
	if len(stores) != 3 || stores[0] != 1 || stores[1] != 1 || stores[2] != 1 {
		t.Errorf("synced %v", stores)
	}
	if err := c.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.Release(ctx, a.Ino); err != nil {
		t.Fatal(err)
	}
}
