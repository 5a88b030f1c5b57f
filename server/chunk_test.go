package server

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"sealfs"
	"sealfs/internal/oracle"
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
		bound := (end + sealfs.BoundStep - 1) / sealfs.BoundStep * sealfs.BoundStep
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
	s    *simServer
	c    splitter
	o    *oracle.FS
	rng  *rand.Rand
	inos []sealfs.Ino
	n    int
	far  uint64 // offsets go so far beyond HomeBytes
}

func newLarge(t *testing.T, s *simServer, seed uint64) *large {
	l := &large{t: t, s: s, o: oracle.New(testShards), rng: rand.New(rand.NewPCG(seed, 7)), far: 5 * sealfs.ChunkBytes}
	l.c = splitter{s, context.Background()}
	l.plain(op.Request{Type: op.MakeRoot, Shard: s.root.Home(testShards), Mode: 0o755})
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
	req := op.Request{Type: op.Create, Dir: l.s.root, Name: name, Mode: 0o644}
	a, b := l.s.must(l.t, req), l.plain(req)
	if a.Attr.Ino != b.Attr.Ino {
		l.t.Fatalf("inode %d, the oracle's %d", a.Attr.Ino, b.Attr.Ino)
	}
	l.inos = append(l.inos, a.Attr.Ino)
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
	l := newLarge(t, newSim(t, 512<<20, 1<<20), 1)
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
			req := op.Request{Type: op.Unlink, Dir: l.s.root, Name: name}
			l.s.must(t, req)
			l.plain(req)
			gone := l.inos[i]
			l.inos = append(l.inos[:0], l.inos...)
			req = op.Request{Type: op.Create, Dir: l.s.root, Name: name, Mode: 0o644}
			l.inos[i] = l.s.must(t, req).Attr.Ino
			l.plain(req)
			if err := l.c.write(gone, sealfs.HomeBytes, []byte("late")); err != sealfs.ErrNotExist && err != sealfs.ErrAgain {
				t.Fatalf("write to a deleted file: %v", err)
			}
		}
	}
	l.s.stores[0].reclaim.settle()
	l.s.check(t)
	for i := range l.inos {
		l.s.must(t, op.Request{Type: op.Unlink, Dir: l.s.root, Name: fmt.Sprint("f", i)})
	}
	l.s.stores[0].reclaim.settle()
	if b, n := l.s.Usage(1); b != 0 || n != 1 {
		t.Errorf("%d bytes in %d inodes are left, want 0 in 1", b, n)
	}
}
