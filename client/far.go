package client

import (
	"context"
	"sync"

	"sealfs"
	"sealfs/op"
)

// Bits of fallocate(2)'s mode.
const (
	keepSize  = 0x01
	punchHole = 0x02
	zeroRange = 0x10
)

// Fallocate changes the space of [off, off+n) as fallocate(2) says; mode is its mode.
func (c *Client) Fallocate(ctx context.Context, ino sealfs.Ino, off, n uint64, mode uint32) error {
	if err := c.settle(ctx, ino); err != nil {
		return err
	}
	node := c.nodes.get(ino)
	c.changes(node)
	defer c.dropEarly(node)
	if mode&(punchHole|zeroRange) != 0 && off <= sealfs.FileSizeMax && n <= sealfs.FileSizeMax-off && off+n > sealfs.HomeBytes {
		return c.zeroFar(ctx, ino, off, off+n, mode)
	}
	// Nothing is reserved anywhere: what is left is a matter of the size, and so of the home.
	return c.fallocateHome(ctx, ino, off, n, mode)
}

func (c *Client) fallocateHome(ctx context.Context, ino sealfs.Ino, off, n uint64, mode uint32) error {
	k := c.begin(op.Fallocate, ino)
	k.Ino, k.Off, k.Len, k.Mode, k.layout = ino, off, n, mode, off+n > sealfs.HomeBytes
	err := c.none(ctx, k)
	if mode&keepSize == 0 && off+n > sealfs.HomeBytes {
		c.resized(ino)
	}
	return err
}

// zeroFar makes a hole that reaches beyond sealfs.HomeBytes.
func (c *Client) zeroFar(ctx context.Context, ino sealfs.Ino, off, end uint64, mode uint32) error {
	switch mode {
	case punchHole | keepSize, zeroRange, zeroRange | keepSize:
	default:
		return sealfs.ErrNotSupported
	}
	node := c.nodes.get(ino)
	var r redo
	for {
		l, err := c.layoutOf(ctx, node, ino)
		switch {
		case err != nil:
		case l.bound == 0:
			err = c.fallocateHome(ctx, ino, off, end-off, mode)
		default:
			err = c.zeroChunks(ctx, node, ino, l, off, end, mode)
		}
		if err == nil {
			return nil
		}
		if err = r.again(ctx, c, node, err); err != nil {
			return err
		}
	}
}

func (c *Client) zeroChunks(ctx context.Context, n *node, ino sealfs.Ino, l layout, off, end uint64, mode uint32) error {
	err := pieces(off, min(end, l.bound), sealfs.ChunkBytes, func(from, to uint64) error {
		if from >= to {
			return nil // all of it is beyond the bound
		}
		k := c.beginAt(op.Fallocate, ino, from, l)
		k.Len, k.Mode = to-from, mode|keepSize
		shard := k.Shard
		err := c.none(ctx, k)
		if err == nil && from >= sealfs.HomeBytes {
			c.unsynced.add(ino, shard)
		}
		return err
	})
	switch {
	case err != nil:
		c.disturbed(ctx, n, ino, l)
		return err
	case mode&keepSize == 0 && end > l.size:
		return c.fallocateHome(ctx, ino, off, end-off, 0)
	}
	_, err = c.extend(ctx, n, ino, layout{gen: l.gen, size: l.size}, 0) // which touches the times
	return err
}

// Whence values of Seek, those of lseek(2).
const (
	SeekData = 3
	SeekHole = 4
)

// Seek returns the next data or hole at or after off, or sealfs.ErrNoDevice.
func (c *Client) Seek(ctx context.Context, ino sealfs.Ino, off uint64, whence uint32) (uint64, error) {
	if err := c.settle(ctx, ino); err != nil {
		return 0, err
	}
	if off < sealfs.HomeBytes {
		k := c.begin(op.Seek, ino)
		k.Ino, k.Off, k.Mode = ino, off, whence
		at, a, err := c.seekAt(ctx, k)
		beyond := err == nil && at >= sealfs.HomeBytes && a.Bound != 0
		if !beyond && (err != sealfs.ErrNoDevice || whence != SeekData) {
			return at, err
		}
		// The home has nothing more: chunks may.
		at, err = c.seekFar(ctx, ino, sealfs.HomeBytes, whence)
		if beyond && err == sealfs.ErrNoDevice {
			return sealfs.HomeBytes, nil // where the file ends
		}
		return at, err
	}
	return c.seekFar(ctx, ino, off, whence)
}

// seekAt sends k and returns the offset that it is answered, and attributes.
func (c *Client) seekAt(ctx context.Context, k *call) (uint64, op.Attr, error) {
	err := c.do(ctx, k)
	at, a := k.rep.Off, k.rep.Attr
	k.end()
	return at, a, err
}

// seekFar is Seek from off, which is not below sealfs.HomeBytes.
func (c *Client) seekFar(ctx context.Context, ino sealfs.Ino, off uint64, whence uint32) (uint64, error) {
	node := c.nodes.get(ino)
	var r redo
	for {
		l, err := c.layoutOf(ctx, node, ino)
		if err != nil {
			return 0, err
		}
		var at uint64
		switch {
		case l.bound == 0:
			k := c.begin(op.Seek, ino)
			k.Ino, k.Off, k.Mode, k.layout = ino, off, whence, true
			at, _, err = c.seekAt(ctx, k)
		case off >= l.size:
			return 0, sealfs.ErrNoDevice
		default:
			at, err = c.seekChunks(ctx, ino, l, off, whence)
		}
		if err == nil {
			return at, nil
		}
		if err = r.again(ctx, c, node, err); err != nil {
			return 0, err
		}
	}
}

// seekChunks asks chunk by chunk, several at the same time. What is beyond the
// bound is a hole, and so is the end of the file.
func (c *Client) seekChunks(ctx context.Context, ino sealfs.Ino, l layout, off uint64, whence uint32) (uint64, error) {
	const chunk = sealfs.ChunkBytes
	end := min(l.size, l.bound)
	for off < end {
		if whence == SeekData && (end-off)/chunk > uint64(c.o.Shards) {
			break // each shard is asked but once
		}
		first := off / chunk
		stop := min(end, (first+piecesMax)*chunk)
		var found [piecesMax]uint64 // one more than the offset, for each chunk that has one
		err := pieces(off, stop, chunk, func(from, to uint64) error {
			k := c.beginAt(op.Seek, ino, from, l)
			k.Mode = whence
			at, _, err := c.seekAt(ctx, k)
			switch {
			case err == sealfs.ErrNoDevice:
				return nil
			case err == nil && at < to:
				found[from/chunk-first] = at + 1
			}
			return err
		})
		if err != nil {
			return 0, err
		}
		for _, at := range found {
			if at != 0 {
				if at--; at < l.size {
					return at, nil
				}
				break
			}
		}
		off = stop
	}
	switch {
	case whence == SeekHole:
		return min(max(off, end), l.size), nil
	case off < end:
		return c.seekShards(ctx, ino, l, off, end)
	}
	return 0, sealfs.ErrNoDevice
}

// seekShards looks for data in [off, end), which has more chunks than there are shards: it asks
// each shard for all chunks there, from the first one on.
func (c *Client) seekShards(ctx context.Context, ino sealfs.Ino, l layout, off, end uint64) (uint64, error) {
	const chunk = sealfs.ChunkBytes
	asked := make([]bool, c.o.Shards)
	var from []uint64
	for at := off; at < end && len(from) < len(asked); at = (at/chunk + 1) * chunk {
		if s := ino.DataShard(at, c.o.Shards); !asked[s] {
			asked[s] = true
			from = append(from, at)
		}
	}
	var mu sync.Mutex
	best := end
	err := pieces(0, uint64(len(from)), 1, func(i, _ uint64) error {
		mu.Lock()
		most := best
		mu.Unlock()
		if from[i] >= most {
			return nil
		}
		k := c.beginAt(op.Seek, ino, from[i], l)
		k.Mode, k.Len = SeekData, most-from[i]
		at, _, err := c.seekAt(ctx, k)
		switch err {
		case sealfs.ErrNoDevice:
			return nil
		case nil:
			mu.Lock()
			best = min(best, at)
			mu.Unlock()
		}
		return err
	})
	switch {
	case err != nil:
		return 0, err
	case best >= end:
		return 0, sealfs.ErrNoDevice
	}
	return best, nil
}
