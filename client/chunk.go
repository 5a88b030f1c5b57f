package client

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"sealfs"
	"sealfs/op"
)

// How a file with chunks is written beyond sealfs.HomeBytes:
//
//	reserve    Extend at home: no chunk has data beyond Bound, so that home knows
//	           what to free when the file goes; once per step (sealfs.BoundFor)
//	write      each chunk in its own shard, all with the generation of the file
//	announce   Extend at home: the size, the times, the privileges that are lost; home
//	           refuses it when the file was truncated meanwhile, and then all is done anew
//
// A write counts only when it is announced. Readers cut what they read at the size. Who has looked at a chunk
// before it was written believes what he saw until it is announced, so that is done, too, when only some of the pieces
// could be written, and after an append, although home knows its size already (Client.disturbed).

const (
	// piecesMax is how many pieces of one call are under way at the same time.
	piecesMax = 8
	// redoMax is how often a call finds that the layout has changed. Between the
	// last ones it waits like for a server that is away.
	redoMax = 64
)

// redo counts how often an operation was begun anew because the layout has changed.
type redo struct {
	times int
	pause time.Duration
}

// again makes the operation ask for the layout anew. It returns err when there
// is no sense in that.
func (r *redo) again(ctx context.Context, c *Client, n *node, err error) error {
	if err != sealfs.ErrStale && !errors.Is(err, sealfs.ErrStale) {
		return err
	}
	if n != nil {
		n.kept.forget()
	}
	if r.times++; r.times > redoMax {
		return fmt.Errorf("the file changes all the time: %w: %w", sealfs.ErrIO, err)
	}
	if r.times < 4 {
		return nil
	}
	r.pause = min(max(2*r.pause, pauseMin), pauseMax)
	timer := time.NewTimer(r.pause/2 + rand.N(r.pause/2))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
	case <-c.life.Done():
	}
	return errGaveUp
}

// pieceEnd returns where the piece that begins at off ends at the latest: at the
// border of the home or of a chunk, or where it is most bytes long.
func pieceEnd(off, most uint64) uint64 {
	end := uint64(sealfs.HomeBytes)
	if off >= end {
		end = (off/sealfs.ChunkBytes + 1) * sealfs.ChunkBytes
	}
	return min(end, off+most)
}

// pieces calls fn for the pieces of [off, end), of at most most bytes, and returns the
// first error. If there are several they run at the same time, and no more
// are begun after an error.
func pieces(off, end, most uint64, fn func(off, end uint64) error) error {
	if pieceEnd(off, most) >= end {
		return fn(off, end)
	}
	var mu sync.Mutex
	var first error
	work := func() {
		mu.Lock()
		defer mu.Unlock()
		for off < end && first == nil {
			from, to := off, min(pieceEnd(off, most), end)
			off = to
			mu.Unlock()
			err := fn(from, to)
			mu.Lock()
			if first == nil {
				first = err
			}
		}
	}
	var wg sync.WaitGroup
	for range min(piecesMax-1, (end-off-1)/most) {
		wg.Go(work)
	}
	work()
	wg.Wait()
	return first
}

// beginAt returns a call of type t for the piece of a file with chunks that lies at off.
func (c *Client) beginAt(t op.Type, ino sealfs.Ino, off uint64, l layout) *call {
	k := c.begin(t, ino)
	k.Shard = ino.DataShard(off, c.o.Shards)
	k.Ino, k.Off, k.Gen, k.layout = ino, off, l.gen, true
	return k
}

// Read returns the n bytes at off (at most sealfs.IOMax), fewer only at the end of
// the file. It puts them into room if its capacity suffices; what room holds is lost.
func (c *Client) Read(ctx context.Context, ino sealfs.Ino, off uint64, n int, room []byte) ([]byte, error) {
	if err := c.settle(ctx, ino); err != nil {
		return nil, err
	}
	n = min(n, sealfs.IOMax)
	if b, ok := c.readEarly(ino, off, n, room); ok {
		return b, nil
	}
	if off+uint64(n) > sealfs.HomeBytes {
		return c.readFar(ctx, ino, off, n, room)
	}
	k := c.begin(op.Read, ino)
	k.Ino, k.Off, k.Len = ino, off, uint64(n)
	return c.data(ctx, k, room)
}

// data sends k, whose reply brings Data, and ends it.
func (c *Client) data(ctx context.Context, k *call, room []byte) ([]byte, error) {
	k.rep.Data = room[:0]
	err := c.do(ctx, k)
	b := k.rep.Data
	k.end()
	return b, err
}

// readFar is Read beyond sealfs.HomeBytes.
func (c *Client) readFar(ctx context.Context, ino sealfs.Ino, off uint64, n int, room []byte) ([]byte, error) {
	node := c.nodes.get(ino)
	var r redo
	for {
		l, err := c.layoutOf(ctx, node, ino)
		if err != nil {
			return nil, err
		}
		var b []byte
		if l.bound == 0 {
			k := c.begin(op.Read, ino)
			k.Ino, k.Off, k.Len, k.layout = ino, off, uint64(n), true
			b, err = c.data(ctx, k, room)
		} else {
			b, err = c.readChunks(ctx, ino, l, off, n, room)
		}
		if err == nil {
			return b, nil
		}
		if err = r.again(ctx, c, node, err); err != nil {
			return nil, err
		}
	}
}

func (c *Client) readChunks(ctx context.Context, ino sealfs.Ino, l layout, off uint64, n int, room []byte) ([]byte, error) {
	if off >= l.size {
		return room[:0], nil
	}
	end := min(off+uint64(n), l.size)
	if cap(room) < int(end-off) {
		room = make([]byte, end-off)
	}
	room = room[:end-off]
	short := end // where the home's data ends, if the file was truncated meanwhile
	err := pieces(off, end, sealfs.IOMax, func(from, to uint64) error {
		b := room[from-off : to-off : to-off]
		if from >= l.bound {
			clear(b)
			return nil
		}
		k := c.beginAt(op.Read, ino, from, l)
		k.Len = to - from
		if from < sealfs.HomeBytes {
			k.Gen = 0
		}
		got, err := c.data(ctx, k, b)
		if err != nil {
			return err
		}
		if len(got) < len(b) {
			if from >= sealfs.HomeBytes {
				return fmt.Errorf("%d of %d bytes at %d of inode %d: %w", len(got), len(b), from, ino, sealfs.ErrIO)
			}
			short = from + uint64(len(got)) // there is one such piece at most
		}
		if len(got) > 0 && &got[0] != &b[0] {
			copy(b, got)
		}
		return nil
	})
	return room[:min(short, end)-off], err
}

// writeNow sends data. n is the node of ino, or nil. It returns how much was
// written for certain, all of it if there is no error.
func (c *Client) writeNow(ctx context.Context, n *node, ino sealfs.Ino, off uint64, data []byte, flags op.Flags) (int, error) {
	switch {
	case flags&op.Append != 0:
		return c.appendNow(ctx, n, ino, data, flags)
	case off+uint64(len(data)) > sealfs.HomeBytes:
		return c.writeFar(ctx, n, ino, off, data, flags)
	}
	return c.writeHome(ctx, ino, off, data, flags, false)
}

// writeHome sends data to the home of the file, one piece after the other. With a session a piece may
// take several records of the server's: a retry writes the same bytes again.
func (c *Client) writeHome(ctx context.Context, ino sealfs.Ino, off uint64, data []byte, flags op.Flags, layout bool) (int, error) {
	done := 0
	for done < len(data) {
		k := c.begin(op.Write, ino)
		k.Ino, k.Off, k.Flags, k.layout = ino, off+uint64(done), flags, layout
		k.Data = data[done:min(len(data), done+sealfs.IOMax)]
		part := len(k.Data)
		if err := c.none(ctx, k); err != nil {
			return done, err
		}
		done += part
	}
	return done, nil
}

// writeFar is a write that reaches beyond sealfs.HomeBytes.
func (c *Client) writeFar(ctx context.Context, n *node, ino sealfs.Ino, off uint64, data []byte, flags op.Flags) (int, error) {
	all := len(data)
	end := off + uint64(all)
	var r redo
	for {
		l, err := c.layoutOf(ctx, n, ino)
		if err == nil && flags&op.Within != 0 && l.bound != 0 && end > l.size {
			if off >= l.size {
				return all, nil
			}
			data, end = data[:l.size-off], l.size
		}
		if err == nil {
			l, err = c.reserve(ctx, n, ino, l, end)
		}
		done := 0
		switch {
		case err != nil:
		case l.bound == 0:
			done, err = c.writeHome(ctx, ino, off, data, flags, true)
		default:
			if err = c.writePieces(ctx, ino, l, off, data); err == nil {
				done = all
				_, err = c.extend(ctx, n, ino, layout{gen: l.gen, size: end}, flags&op.KillPriv)
			} else {
				c.disturbed(ctx, n, ino, l)
			}
		}
		if err == nil {
			return done, nil
		}
		if err = r.again(ctx, c, n, err); err != nil {
			return 0, err
		}
	}
}

// disturbed tells home that chunks of a file may have changed, although what was about to change them may have failed: others
// may have what was there before in their caches. While nobody but this client may know anything of
// the file, that is not needed.
func (c *Client) disturbed(ctx context.Context, n *node, ino sealfs.Ino, l layout) {
	if c.leasing && c.leases.has(ino).write {
		return
	}
	c.extend(ctx, n, ino, layout{gen: l.gen}, 0) // a stale generation has no readers
}

// writePieces writes data to the home and the chunks of a file.
func (c *Client) writePieces(ctx context.Context, ino sealfs.Ino, l layout, off uint64, data []byte) error {
	return pieces(off, off+uint64(len(data)), sealfs.IOMax, func(from, to uint64) error {
		k := c.beginAt(op.Write, ino, from, l)
		k.Data = data[from-off : to-off]
		shard := k.Shard
		err := c.none(ctx, k)
		if err == nil && from >= sealfs.HomeBytes {
			c.unsynced.add(ino, shard)
		}
		return err
	})
}
