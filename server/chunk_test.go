package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/internal/oracle"
	"sealfs/lsfs"
	"sealfs/meta"
	"sealfs/op"
)

// splitter does what a client does for files that have chunks: it takes requests
// for whole files and sends each piece to where it belongs.
type splitter struct {
	h   op.Handler
	ctx context.Context
}

func (c *splitter) ask(req op.Request, shard sealfs.Shard) (*op.Reply, error) {
	req.Shard, req.Volume = shard, 1
	rep := &op.Reply{}
	if err := c.h.Do(c.ctx, &req, rep); err != nil {
		return nil, err
	}
	return rep, rep.Err()
}

func (c *splitter) home(req op.Request) (*op.Reply, error) {
	return c.ask(req, req.Ino.Home(testShards))
}

func (c *splitter) chunk(req op.Request) (*op.Reply, error) {
	return c.ask(req, req.Ino.DataShard(req.Off, testShards))
}

func (c *splitter) attr(ino sealfs.Ino) (op.Attr, error) {
	rep, err := c.home(op.Request{Type: op.Getattr, Ino: ino})
	if err != nil {
		return op.Attr{}, err
	}
	return rep.Attr, nil
}

func whole(a *op.Attr) bool { return a.Bound == 0 && a.Size > sealfs.HomeBytes }

// pieces calls fn for the parts of [off, end) that lie at home or in one chunk each.
func pieces(off, end uint64, fn func(off, end uint64) error) error {
	for off < end {
		to := min(end, sealfs.HomeBytes)
		if off >= sealfs.HomeBytes {
			to = min(end, (off/sealfs.ChunkBytes+1)*sealfs.ChunkBytes)
		}
		if err := fn(off, to); err != nil {
			return err
		}
		off = to
	}
	return nil
}

func (c *splitter) write(ino sealfs.Ino, off uint64, data []byte) error {
	for {
		a, err := c.attr(ino)
		if err == nil {
			err = c.writeAs(&a, off, data)
		}
		if err != sealfs.ErrStale {
			return err
		}
	}
}

// writeAs writes to a file that looks like a.
func (c *splitter) writeAs(a *op.Attr, off uint64, data []byte) error {
	end := off + uint64(len(data))
	if whole(a) || end <= sealfs.HomeBytes {
		_, err := c.home(op.Request{Type: op.Write, Ino: a.Ino, Off: off, Data: data})
		return err
	}
	if a.Bound < end {
		bound := sealfs.BoundFor(end)
		if _, err := c.home(op.Request{Type: op.Extend, Ino: a.Ino, Gen: a.Gen, Off: bound}); err != nil {
			return err
		}
	}
	return pieces(off, end, func(from, to uint64) error {
		req := op.Request{Type: op.Write, Ino: a.Ino, Off: from, Data: data[from-off : to-off], Gen: a.Gen}
		if from < sealfs.HomeBytes {
			_, err := c.home(req)
			return err
		}
		rep, err := c.chunk(req)
		if err != nil {
			return err
		}
		if rep.Off != from || rep.Attr.Ino != a.Ino || rep.Attr.Version != 0 {
			return fmt.Errorf("write to a chunk answers %+v", rep)
		}
		_, err = c.home(op.Request{Type: op.Extend, Ino: a.Ino, Gen: a.Gen, Size: to})
		return err
	})
}

func (c *splitter) read(ino sealfs.Ino, off, n uint64) (data []byte, err error) {
	a, err := c.attr(ino)
	if err != nil {
		return nil, err
	}
	end := min(off+n, max(a.Size, off))
	if whole(&a) {
		rep, err := c.home(op.Request{Type: op.Read, Ino: ino, Off: off, Len: n})
		if err != nil {
			return nil, err
		}
		return rep.Data, nil
	}
	err = pieces(off, end, func(from, to uint64) error {
		req := op.Request{Type: op.Read, Ino: ino, Off: from, Len: to - from, Gen: a.Gen}
		ask := c.home
		if from >= sealfs.HomeBytes {
			ask = c.chunk
		}
		rep, err := ask(req)
		if err != nil {
			return err
		}
		if uint64(len(rep.Data)) != to-from || rep.Eof != (from < sealfs.HomeBytes && to == a.Size) {
			return fmt.Errorf("read of %d bytes at %d of %d: %d bytes, end of file %v", to-from, from, a.Size, len(rep.Data), rep.Eof)
		}
		data = append(data, rep.Data...)
		return nil
	})
	return data, err
}

func (c *splitter) truncate(ino sealfs.Ino, size uint64) error {
	_, err := c.home(op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetSize, Size: size})
	return err
}

func (c *splitter) fallocate(ino sealfs.Ino, mode uint32, off, n uint64) error {
	for {
		a, err := c.attr(ino)
		if err == nil {
			err = c.fallocateAs(&a, mode, off, n)
		}
		if err != sealfs.ErrStale {
			return err
		}
	}
}

func (c *splitter) fallocateAs(a *op.Attr, mode uint32, off, n uint64) error {
	req := op.Request{Type: op.Fallocate, Ino: a.Ino, Mode: mode, Off: off, Len: n, Gen: a.Gen}
	if mode&(punchHole|zeroRange) == 0 || a.Bound == 0 {
		_, err := c.home(req)
		return err
	}
	end := min(off+n, max(a.Size, off))
	if end == a.Size {
		end = (end + sealfs.BlockSize - 1) / sealfs.BlockSize * sealfs.BlockSize // the last block is whole
	}
	err := pieces(off, end, func(from, to uint64) error {
		r := req
		r.Mode |= keepSize
		r.Off, r.Len = from, to-from
		if from < sealfs.HomeBytes {
			_, err := c.home(r)
			return err
		}
		if from >= a.Bound {
			return nil
		}
		rep, err := c.chunk(r)
		if err == nil && rep.Off != to {
			err = fmt.Errorf("hole up to %d, not %d", rep.Off, to)
		}
		return err
	})
	if err != nil || mode&keepSize != 0 {
		return err
	}
	req.Mode = 0
	_, err = c.home(req)
	return err
}

func (c *splitter) seek(ino sealfs.Ino, mode uint32, off uint64) (uint64, error) {
	const seekData = 3
	a, err := c.attr(ino)
	if err != nil {
		return 0, err
	}
	if off >= a.Size {
		return 0, sealfs.ErrNoDevice
	}
	var at uint64
	found := false
	limit := a.Size
	if whole(&a) {
		limit = min(limit, 1) // one request
	}
	err = pieces(off, max(limit, off+1), func(from, to uint64) error {
		if found {
			return nil
		}
		req := op.Request{Type: op.Seek, Ino: ino, Mode: mode, Off: from, Gen: a.Gen}
		ask := c.home
		if from >= sealfs.HomeBytes && a.Bound != 0 {
			if from >= a.Bound {
				if mode != seekData {
					at, found = from, true
				}
				return nil
			}
			ask = c.chunk
		}
		rep, err := ask(req)
		if err == sealfs.ErrNoDevice {
			return nil
		}
		if err != nil {
			return err
		}
		if rep.Off < to || rep.Off >= a.Size || a.Bound == 0 {
			at, found = min(rep.Off, a.Size), true
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	if at >= a.Size && mode == seekData || !found && mode == seekData {
		return 0, sealfs.ErrNoDevice
	}
	if !found {
		at = a.Size
	}
	return at, nil
}

// large compares large files on a server with the oracle's.
type large struct {
	t    *testing.T
	s    *simServer // nil: c sends to an oracle
	root sealfs.Ino
	c    splitter
	o    *oracle.FS
	rng  *rand.Rand
	inos []sealfs.Ino
	n    int
	far  uint64 // offsets go so far beyond HomeBytes
}

func newLarge(t *testing.T, h op.Handler, root sealfs.Ino, seed uint64) *large {
	l := &large{t: t, root: root, o: oracle.New(testShards), rng: rand.New(rand.NewPCG(seed, 7)), far: 5 * sealfs.ChunkBytes}
	l.c = splitter{h, context.Background()}
	l.o.Whole()
	l.plain(op.Request{Type: op.MakeRoot, Shard: root.Home(testShards), Mode: 0o755})
	for i := range 3 {
		l.create(fmt.Sprint("f", i))
	}
	return l
}

// plain sends a request to the oracle alone.
func (l *large) plain(req op.Request) *op.Reply {
	l.t.Helper()
	shard := req.Shard
	if address(&req); req.Ino == 0 && req.Dir == 0 {
		req.Shard = shard
	}
	rep := &op.Reply{}
	if err := l.o.Do(context.Background(), &req, rep); err != nil {
		l.t.Fatal(err)
	}
	return rep
}

func (l *large) create(name string) {
	l.inos = append(l.inos, l.both(op.Request{Type: op.Create, Dir: l.root, Name: name, Mode: 0o644}).Attr.Ino)
}

// both sends a request that must succeed to both sides.
func (l *large) both(req op.Request) *op.Reply {
	l.t.Helper()
	a, err := l.c.ask(req, l.root.Home(testShards))
	b := l.plain(req)
	if err != nil || b.Code != 0 || a.Attr.Ino != b.Attr.Ino {
		l.t.Fatalf("%v: inode %d, %v, the oracle's %d, %v", req.Type, a.Attr.Ino, err, b.Attr.Ino, b.Code)
	}
	return a
}

// offset returns an offset near something that matters.
func (l *large) offset() uint64 {
	rng := l.rng
	var at uint64
	switch rng.IntN(8) {
	case 0:
		at = uint64(rng.IntN(1 << 20))
	case 1, 2:
		at = sealfs.HomeBytes
	case 3:
		at = sealfs.HomeBytes + rng.Uint64N(l.far)
	case 4:
		at = sealfs.BoundStep
	default:
		at = sealfs.HomeBytes + rng.Uint64N(l.far)/sealfs.ChunkBytes*sealfs.ChunkBytes
	}
	switch rng.IntN(4) {
	case 0:
		return at
	case 1:
		return at + uint64(rng.IntN(4))*sealfs.BlockSize
	case 2:
		return at + uint64(rng.IntN(20000))
	}
	return at - min(at, uint64(rng.IntN(20000)))
}

func (l *large) step() {
	l.t.Helper()
	l.n++
	rng := l.rng
	ino := l.inos[rng.IntN(len(l.inos))]
	off := l.offset()
	fail := func(what string, got, want any) {
		l.t.Helper()
		l.t.Fatalf("step %d: %s of inode %d at %d: %v, want %v", l.n, what, ino, off, got, want)
	}
	code := func(what string, err error, want *op.Reply) bool {
		l.t.Helper()
		if err != want.Err() {
			fail(what, err, want.Err())
		}
		return err == nil
	}
	switch rng.IntN(12) {
	case 0, 1, 2, 3:
		data := make([]byte, 1+rng.IntN([]int{100, 5000, 300000}[rng.IntN(3)]))
		for i := range data {
			data[i] = byte(rng.Uint32()) | 1
		}
		code("write", l.c.write(ino, off, data), l.plain(op.Request{Type: op.Write, Ino: ino, Off: off, Data: data}))
	case 4, 5:
		code("truncation", l.c.truncate(ino, off), l.plain(op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetSize, Size: off}))
	case 6:
		mode := []uint32{0, keepSize, punchHole | keepSize, punchHole | keepSize, zeroRange, zeroRange | keepSize}[rng.IntN(6)]
		n := 1 + rng.Uint64N([]uint64{10000, 1 << 20, 10 << 20}[rng.IntN(3)])
		code("fallocate", l.c.fallocate(ino, mode, off, n), l.plain(op.Request{Type: op.Fallocate, Ino: ino, Mode: mode, Off: off, Len: n}))
	case 7:
		mode := uint32(3 + rng.IntN(2))
		got, err := l.c.seek(ino, mode, off)
		want := l.plain(op.Request{Type: op.Seek, Ino: ino, Mode: mode, Off: off})
		if code(fmt.Sprint("seek ", mode), err, want) && got != want.Off {
			fail(fmt.Sprint("seek ", mode), got, want.Off)
		}
	default:
		n := 1 + rng.Uint64N(400000)
		got, err := l.c.read(ino, off, n)
		want := l.plain(op.Request{Type: op.Read, Ino: ino, Off: off, Len: n})
		if code("read", err, want) && !bytes.Equal(got, want.Data) {
			fail("read", fmt.Sprintf("%d bytes", len(got)), fmt.Sprintf("%d; they differ at %d", len(want.Data), firstDifference(got, want.Data)))
		}
	}
	a, err := l.c.attr(ino)
	if want := l.plain(op.Request{Type: op.Getattr, Ino: ino}).Attr; err != nil || a.Size != want.Size {
		fail("size", a.Size, want.Size)
	}
}

// TestModelLarge: random operations on large sparse files across the border of
// what stands at home and of chunks give what the oracle gives, also across kills.
func TestModelLarge(t *testing.T) {
	steps := 6000
	if testing.Short() {
		steps = 1200
	}
	s := newSim(t, 512<<20, 1<<20)
	l := newLarge(t, s, s.root, 1)
	l.s = s
	for l.n < steps {
		l.step()
		switch l.rng.IntN(300) {
		case 0:
			l.s.kill(t)
			l.c.h = l.s
			l.s.check(t)
		case 1:
			i := l.rng.IntN(len(l.inos))
			name := fmt.Sprint("f", i)
			l.both(op.Request{Type: op.Unlink, Dir: l.root, Name: name})
			gone := l.inos[i]
			l.inos[i] = l.both(op.Request{Type: op.Create, Dir: l.root, Name: name, Mode: 0o644}).Attr.Ino
			if err := l.c.write(gone, sealfs.HomeBytes, []byte("late")); err != sealfs.ErrNotExist {
				t.Fatalf("write to a deleted file: %v", err)
			}
		}
	}
	l.s.stores[0].reclaim.settle()
	l.s.check(t)
	for i := range l.inos {
		l.both(op.Request{Type: op.Unlink, Dir: l.root, Name: fmt.Sprint("f", i)})
	}
	l.s.stores[0].reclaim.settle()
	if b, n := l.s.Usage(1); b != 0 || n != 1 {
		t.Errorf("%d bytes in %d inodes are left, want 0 in 1", b, n)
	}
}

// TestOracleLarge: the oracle's files with chunks behave as those without.
func TestOracleLarge(t *testing.T) {
	o := oracle.New(testShards)
	rep := &op.Reply{}
	if err := o.Do(context.Background(), &op.Request{Type: op.MakeRoot, Volume: 1, Shard: 3, Mode: 0o755}, rep); err != nil || rep.Code != 0 {
		t.Fatal(err, rep.Code)
	}
	l := newLarge(t, o, rep.Attr.Ino, 2)
	for l.n < 3000 {
		l.step()
	}
}

// between lets a test see, and hold up, what servers ask each other.
type between struct {
	h    op.Handler
	hook func(req *op.Request, rep *op.Reply) error // after the request was answered
}

func (b *between) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	if err := b.h.Do(ctx, req, rep); err != nil {
		return err
	}
	return b.hook(req, rep)
}

// far is where a chunk begins that matters to the tests below.
const far = sealfs.HomeBytes + 3*sealfs.ChunkBytes

// TestPurgeVoids: a write whose file was looked at before a truncation, and which
// goes on after its purge, is refused.
func TestPurgeVoids(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	ino := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: "f", Mode: 0o644}).Attr.Ino
	c := splitter{s, context.Background()}
	s.must(t, op.Request{Type: op.Extend, Ino: ino, Off: sealfs.BoundStep})
	asked := 0
	s.Server.o.Peers = &between{s, func(req *op.Request, rep *op.Reply) error {
		if req.Type != op.Getattr {
			return nil
		}
		if asked++; asked > 1 {
			return nil
		}
		seen := rep.Attr
		// The truncation, its purge and what comes after happen before the answer arrives.
		s.must(t, op.Request{Type: op.Extend, Ino: ino, Size: far + 1})
		if err := c.truncate(ino, 0); err != nil {
			return err
		}
		s.stores[0].reclaim.settle()
		if err := c.truncate(ino, far+sealfs.ChunkBytes); err != nil {
			return err
		}
		rep.Attr = seen
		return nil
	}}
	_, err := c.chunk(op.Request{Type: op.Write, Ino: ino, Off: far, Data: []byte("late")})
	if err != sealfs.ErrStale || asked < 2 {
		t.Errorf("late write: %v; the home was asked %d times", err, asked)
	}
	if got, err := c.read(ino, far, 4); err != nil || !bytes.Equal(got, make([]byte, 4)) {
		t.Errorf("read %q, %v", got, err)
	}
}

// TestAway: while a server is away that holds chunks which were cut off, the file can
// be shortened and read but does not grow, and all is well when it comes back.
func TestAway(t *testing.T) {
	p := newPair(t, 64<<20)
	c := splitter{p, context.Background()}
	ino := p.must(op.Request{Type: op.Create, Dir: p.root, Name: "f", Mode: 0o644}).Attr.Ino
	for i := range uint64(8) {
		if err := c.write(ino, sealfs.HomeBytes+i*sealfs.ChunkBytes, bytes.Repeat([]byte{1}, 5000)); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.write(ino, 10, []byte("small")); err != nil {
		t.Fatal(err)
	}
	p.away[1].Store(true)
	for _, size := range []uint64{sealfs.HomeBytes + 1, 100} {
		if err := c.truncate(ino, size); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.write(ino, 200, []byte("more")); err != nil {
		t.Errorf("write at home: %v", err)
	}
	if got, err := c.read(ino, 10, 5); err != nil || string(got) != "small" {
		t.Errorf("read %q, %v", got, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.s[0].stores[0].chunks.cuts.wake(ino)
	waits := make(chan error)
	go func() {
		grow := op.Request{Type: op.Setattr, Ino: ino, Volume: 1, Shard: ino.Home(testShards), Valid: op.SetSize, Size: 1 << 30}
		waits <- p.Do(ctx, &grow, &op.Reply{})
	}()
	cancel()
	if err := <-waits; !errors.Is(err, sealfs.ErrInterrupted) && !errors.Is(err, sealfs.ErrUnavailable) {
		t.Errorf("growth: %v", err)
	}
	p.must(op.Request{Type: op.Unlink, Dir: p.root, Name: "f"})
	p.away[1].Store(false)
	st := p.s[0].stores[0]
	for p.s[0].Server.usage(1)+p.s[1].Server.usage(1) != 0 {
		st.reclaim.add(ino)
		st.reclaim.settle()
	}
}

func (s *Server) usage(v sealfs.Volume) int64 {
	bytes, _ := s.Usage(v)
	return bytes
}

// TestUnlinkDurable: chunks of a deleted file go only when the power cannot bring
// the file back.
func TestUnlinkDurable(t *testing.T) {
	p := newPair(t, 64<<20)
	c := splitter{p, context.Background()}
	ino := p.must(op.Request{Type: op.Create, Dir: p.root, Name: "f", Mode: 0o644}).Attr.Ino
	want := bytes.Repeat([]byte{1}, 5000)
	var at []uint64
	for i := range uint64(16) {
		off := sealfs.HomeBytes + i*sealfs.ChunkBytes
		if ino.DataShard(off, testShards)%2 == ino.Home(testShards)%2 {
			continue // what the home's own store purges, it makes durable
		}
		if at = append(at, off); c.write(ino, off, want) != nil {
			t.Fatal("write failed")
		}
	}
	p.sync()
	p.must(op.Request{Type: op.Unlink, Dir: p.root, Name: "f"})
	p.settle()
	if p.s[1].usage(1) != 0 {
		t.Fatal("chunks are left")
	}
	p.cut(0, rand.New(rand.NewPCG(0, 0)), 0)
	p.settle()
	for _, off := range at {
		if got, err := c.read(ino, off, 5000); err != sealfs.ErrNotExist && (err != nil || !bytes.Equal(got, want)) {
			t.Errorf("at %d: %d bytes, %v", off, len(got), err)
		}
	}
}

// TestHeldTail: what is cut off of a file without a name that is held open goes, too.
func TestHeldTail(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	c := splitter{s, context.Background()}
	ino := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: "f", Mode: 0o644, Flags: op.OpenIt}).Attr.Ino
	write := func(off uint64) {
		t.Helper()
		if err := c.write(ino, off, bytes.Repeat([]byte{1}, 5000)); err != nil {
			t.Fatal(err)
		}
	}
	write(far)
	write(0)
	s.must(t, op.Request{Type: op.Unlink, Dir: s.root, Name: "f"})
	write(far + sealfs.ChunkBytes)
	if err := c.truncate(ino, far+10); err != nil {
		t.Fatal(err)
	}
	write(far + 5*sealfs.ChunkBytes)
	s.stores[0].reclaim.settle()
	got, err := c.read(ino, far, 100)
	if want := append(bytes.Repeat([]byte{1}, 10), make([]byte, 90)...); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %x, %v", got, err)
	}
	s.must(t, op.Request{Type: op.Release, Ino: ino})
	s.stores[0].reclaim.settle()
	if b, n := s.Usage(1); b != 0 || n != 1 {
		t.Errorf("%d bytes in %d inodes are left, want 0 in 1", b, n)
	}
}

// TestAppendPlaces: no two appends beyond the home get the same place.
func TestAppendPlaces(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	c := splitter{s, context.Background()}
	ino := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: "f", Mode: 0o644}).Attr.Ino
	if err := c.truncate(ino, sealfs.HomeBytes-3); err != nil {
		t.Fatal(err)
	}
	limited := op.Request{Type: op.Write, Ino: ino, Flags: op.Append, Len: sealfs.HomeBytes, Data: []byte("abc")}
	if rep := s.must(t, limited); rep.Off != sealfs.HomeBytes-3 {
		t.Errorf("append within the home goes to %d", rep.Off)
	}
	if rep := s.try(t, limited); rep.Code != sealfs.ErrTooBig {
		t.Errorf("append beyond the home: %v", rep.Code)
	}
	at := uint64(sealfs.HomeBytes)
	for n := uint64(1); n < 2*sealfs.BoundStep; n = 3*n + 1 {
		rep := s.must(t, op.Request{Type: op.Extend, Ino: ino, Flags: op.Append, Len: n})
		if at += n; rep.Off != at-n || rep.Attr.Size != at || rep.Attr.Bound < at {
			t.Fatalf("place for %d bytes: %d, %+v", n, rep.Off, rep.Attr)
		}
	}
	if rep := s.try(t, op.Request{Type: op.Write, Ino: ino, Flags: op.Append, Data: []byte("abc")}); rep.Code != sealfs.ErrTooBig {
		t.Errorf("append to a file with chunks: %v", rep.Code)
	}
}

// TestChunkRefusals: who does not know a file as it is learns so.
func TestChunkRefusals(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	c := splitter{s, context.Background()}
	ino := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: "f", Mode: 0o644}).Attr.Ino
	if err := c.write(ino, far, []byte("content")); err != nil {
		t.Fatal(err)
	}
	if err := c.truncate(ino, far+1); err != nil {
		t.Fatal(err)
	}
	if err := c.write(ino, far+10, []byte("content")); err != nil { // in generation 1
		t.Fatal(err)
	}
	whole := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: "whole", Mode: 0o644}).Attr.Ino
	s.must(t, op.Request{Type: op.Write, Ino: whole, Off: sealfs.HomeBytes - 1, Data: []byte("content")})
	data := []byte("x")
	at := func(req op.Request) sealfs.Shard { return req.Ino.DataShard(req.Off, testShards) }
	elsewhere := func(req op.Request) sealfs.Shard { return (at(req) + 1) % testShards }
	home := func(req op.Request) sealfs.Shard { return req.Ino.Home(testShards) }
	if at(op.Request{Ino: ino, Off: far}) == home(op.Request{Ino: ino}) {
		t.Fatal("the chunk lies at home: choose another")
	}
	for i, x := range []struct {
		to   func(op.Request) sealfs.Shard
		code sealfs.Code
		req  op.Request
	}{
		{at, sealfs.ErrStale, op.Request{Type: op.Read, Ino: ino, Off: far, Len: 1}},
		{at, sealfs.ErrStale, op.Request{Type: op.Seek, Ino: ino, Off: far, Mode: 3}},
		{at, sealfs.ErrStale, op.Request{Type: op.Write, Ino: ino, Off: far, Data: data}},
		{at, sealfs.ErrStale, op.Request{Type: op.Fallocate, Ino: ino, Off: far, Len: 1, Mode: 3}},
		{at, sealfs.ErrStale, op.Request{Type: op.Write, Ino: ino, Off: far, Data: data, Gen: 2}},
		{at, sealfs.ErrStale, op.Request{Type: op.Write, Ino: ino, Off: 2 * sealfs.BoundStep, Data: data, Gen: 1}},
		{at, sealfs.ErrInvalid, op.Request{Type: op.Read, Ino: ino, Off: far + sealfs.ChunkBytes - 1, Len: 2, Gen: 1}},
		{at, sealfs.ErrInvalid, op.Request{Type: op.Write, Ino: ino, Off: far - 1, Data: []byte("xy"), Gen: 1}},
		{at, sealfs.ErrInvalid, op.Request{Type: op.Fallocate, Ino: ino, Off: far, Len: sealfs.ChunkBytes + 1, Mode: 3, Gen: 1}},
		{at, sealfs.ErrInvalid, op.Request{Type: op.Fallocate, Ino: ino, Off: far, Mode: 3, Gen: 1}},
		{at, sealfs.ErrNotSupported, op.Request{Type: op.Fallocate, Ino: ino, Off: far, Len: 1, Mode: 0x22, Gen: 1}},
		{at, sealfs.ErrInvalid, op.Request{Type: op.Seek, Ino: ino, Off: far, Mode: 5, Gen: 1}},
		{at, sealfs.ErrStale, op.Request{Type: op.Write, Ino: whole, Off: far, Data: data}},
		{at, sealfs.ErrNotExist, op.Request{Type: op.Write, Ino: ino + 100*testShards, Off: far, Data: data}},
		{elsewhere, sealfs.ErrInvalid, op.Request{Type: op.Read, Ino: ino, Off: far, Len: 1, Gen: 1}},
		{elsewhere, sealfs.ErrInvalid, op.Request{Type: op.Write, Ino: ino, Off: far, Data: data, Gen: 1}},
		{home, sealfs.ErrStale, op.Request{Type: op.Read, Ino: ino, Off: far, Len: 1}},
		{home, sealfs.ErrStale, op.Request{Type: op.Write, Ino: ino, Off: far, Data: data}},
		{home, sealfs.ErrStale, op.Request{Type: op.Write, Ino: ino, Off: sealfs.HomeBytes - 1, Data: []byte("xy")}},
		{home, sealfs.ErrStale, op.Request{Type: op.Extend, Ino: ino, Size: far}},
		{home, sealfs.ErrStale, op.Request{Type: op.Extend, Ino: whole, Size: far}},
		{home, sealfs.ErrTooBig, op.Request{Type: op.Extend, Ino: ino, Gen: 1, Size: 1 << 63}},
		{home, sealfs.ErrTooBig, op.Request{Type: op.Extend, Ino: ino, Gen: 1, Off: 1<<63 + 1}},
		{home, sealfs.ErrTooBig, op.Request{Type: op.Extend, Ino: ino, Gen: 1, Flags: op.Append, Len: 1<<63 - 1}},
		{home, sealfs.ErrIsDir, op.Request{Type: op.Extend, Ino: s.root, Size: far}},
		{home, 0, op.Request{Type: op.Read, Ino: whole, Off: sealfs.HomeBytes, Len: 3}},
		{home, 0, op.Request{Type: op.Write, Ino: whole, Off: far, Data: data}},
		{at, 0, op.Request{Type: op.Read, Ino: ino, Off: far, Len: 1, Gen: 1}},
		{at, 0, op.Request{Type: op.Read, Ino: ino, Off: far, Len: 1, Gen: 9}},
	} {
		_, err := c.ask(x.req, x.to(x.req))
		var want error
		if x.code != 0 {
			want = x.code
		}
		if err != want {
			t.Errorf("%d: %v at %d: %v, want %v", i, x.req.Type, x.req.Off, err, want)
		}
	}
}

// TestDropVolumeChunks: a volume goes with the chunks of its files, also
// those that a power cut or a dropped volume has left alone.
func TestDropVolumeChunks(t *testing.T) {
	s := newSim(t, 64<<20, 1<<20)
	c := splitter{s, context.Background()}
	for i := range 5 {
		ino := s.must(t, op.Request{Type: op.Create, Dir: s.root, Name: fmt.Sprint("f", i), Mode: 0o644}).Attr.Ino
		for j := range uint64(400) {
			if err := c.write(ino, sealfs.HomeBytes-100*sealfs.BlockSize+j*2*sealfs.BlockSize+uint64(i)*sealfs.ChunkBytes, []byte("x")); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := s.DropVolume(context.Background(), 1, nil); err != nil {
		t.Fatal(err)
	}
	if b, n := s.Usage(1); b != 0 || n != 0 {
		t.Errorf("%d bytes in %d inodes are left", b, n)
	}
	r := s.stores[0].BeginRead()
	defer s.stores[0].EndRead()
	var dump bytes.Buffer
	if err := meta.Dump(r, &dump); err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(dump.Bytes(), []byte("part of")) || bytes.Contains(dump.Bytes(), []byte("extent of")) {
		t.Error("parts or extents are left")
	}
}

// TestCleanChunks: the cleaner moves chunks and what stands at home without
// mixing them up, on a store where it has to.
func TestCleanChunks(t *testing.T) {
	s := newSimWith(t, disk.NewSim("device", 1<<20+60*128<<10), disk.NewSim("region", 8<<20), 128<<10, lsfs.Options{StagingBytes: 256 << 10, CleanLow: 30})
	l := newLarge(t, s, s.root, 5)
	l.s = s
	// A whole file beyond the home's size, too: its data stands at home.
	big := l.inos[0]
	for _, off := range []uint64{sealfs.HomeBytes - 5000, far} {
		data := bytes.Repeat([]byte{7}, 10000)
		s.must(t, op.Request{Type: op.Write, Ino: big, Off: off, Data: data})
		l.plain(op.Request{Type: op.Write, Ino: big, Off: off, Data: data})
	}
	held := []uint64{0, sealfs.HomeBytes - 4096, sealfs.HomeBytes, far, far + 5*sealfs.ChunkBytes}
	for round := range 400 {
		ino := l.inos[round%3]
		off := held[l.rng.IntN(len(held))] + l.rng.Uint64N(60)*sealfs.BlockSize
		data := make([]byte, 1+l.rng.IntN(40000))
		for i := range data {
			data[i] = byte(l.rng.Uint32())
		}
		if err := l.c.write(ino, off, data); err != nil {
			t.Fatal(err)
		}
		l.plain(op.Request{Type: op.Write, Ino: ino, Off: off, Data: data})
	}
	for _, ino := range l.inos {
		for _, off := range held {
			got, err := l.c.read(ino, off, 300000)
			if want := l.plain(op.Request{Type: op.Read, Ino: ino, Off: off, Len: 300000}); err != want.Err() || !bytes.Equal(got, want.Data) {
				t.Errorf("inode %d at %d: %d bytes, %v, want %d", ino, off, len(got), err, len(want.Data))
			}
		}
	}
	if moved := s.stores[0].Stats().Moved; moved < 100 {
		t.Errorf("%d extents were moved: the test did not reach its point", moved)
	}
}
