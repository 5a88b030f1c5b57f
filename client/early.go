package client

import (
	"context"
	"time"

	"sealfs"
	"sealfs/op"
)

const (
	// earlyMax is the size up to which a file's content comes with the answer to
	// its opening, in bytes.
	earlyMax = 64 << 10
	// earlyAge is for how long that is believed: a read follows at once, or it asks.
	// The kernel's own cache is believed for longer (see layoutAge).
	earlyAge = 5 * time.Millisecond
	// earlyTotal bounds what all files have in memory of it.
	earlyTotal = 8 << 20
)

// early is the content of a small file, as it was when it was opened: most small
// files are read right then, and whole, and so cost one request less.
type early struct {
	data  []byte
	asked time.Time
}

// OpenToRead is Open for somebody who will read the file now.
func (c *Client) OpenToRead(ctx context.Context, ino sealfs.Ino) (op.Attr, error) {
	if !c.remote || c.earlyBytes.Load() > earlyTotal {
		return c.Open(ctx, ino)
	}
	return c.openFor(ctx, ino, earlyMax)
}

// keepEarly notes what came with the answer to an opening of n.
func (c *Client) keepEarly(n *node, data []byte, asked time.Time) {
	if len(data) == 0 {
		return
	}
	c.earlyBytes.Add(int64(len(data)))
	if old := n.early.Swap(&early{data, asked}); old != nil {
		c.earlyBytes.Add(-int64(len(old.data)))
	}
}

// dropEarly is for who changes the file, has read all of it, or lets it go.
func (c *Client) dropEarly(n *node) {
	if n == nil || n.early.Load() == nil {
		return
	}
	if old := n.early.Swap(nil); old != nil {
		c.earlyBytes.Add(-int64(len(old.data)))
	}
}

// readEarly answers a read from what came with the opening, if that is young
// enough: the bytes are copied to room.
func (c *Client) readEarly(ino sealfs.Ino, off uint64, size int, room []byte) ([]byte, bool) {
	if !c.remote || c.earlyBytes.Load() == 0 {
		return nil, false
	}
	n := c.nodes.get(ino)
	if n == nil {
		return nil, false
	}
	e := n.early.Load()
	if e == nil {
		return nil, false
	}
	if time.Since(e.asked) > earlyAge || n.dirty.Load() {
		c.dropEarly(n)
		return nil, false
	}
	from := min(off, uint64(len(e.data)))
	to := min(from+uint64(size), uint64(len(e.data)))
	b := append(room[:0], e.data[from:to]...)
	if to == uint64(len(e.data)) {
		c.dropEarly(n)
	}
	return b, true
}
