package client

import (
	"context"

	"sealfs"
	"sealfs/op"
)

const (
	// earlyMax is the size up to which a file's content comes with the answer to
	// its opening, in bytes.
	earlyMax = 64 << 10
	// earlyTotal bounds what all files have in memory of it.
	earlyTotal = 8 << 20
)

// early is the content of a small file, as it was when it was opened: most small
// files are read right then, and whole, and so cost one request less. It is kept until it
// was read, or changed, or the file is closed, and believed under the file's lease.
type early struct {
	data   []byte
	belief belief
}

// OpenToRead is Open for somebody who will read the file now.
func (c *Client) OpenToRead(ctx context.Context, ino sealfs.Ino) (op.Attr, error) {
	a, err := c.openToRead(ctx, ino)
	return a.Attr, err
}

func (c *Client) openToRead(ctx context.Context, ino sealfs.Ino) (answer, error) {
	if !c.leasing || c.earlyBytes.Load() > earlyTotal {
		return c.openFor(ctx, ino, 0, 0)
	}
	return c.openFor(ctx, ino, earlyMax, 0)
}

// earlyMark is for keepEarly, from before the opening of n was asked for. n may be nil.
func earlyMark(n *node) uint64 {
	if n == nil {
		return 0
	}
	return n.changes.Load()
}

// keepEarly notes what came with the answer to an opening of n, unless this client has
// changed the file since mark.
func (c *Client) keepEarly(n *node, data []byte, b belief, mark uint64) {
	if len(data) == 0 || b == 0 || !c.leasing {
		return
	}
	c.earlyBytes.Add(int64(len(data)))
	if old := n.early.Swap(&early{data, b}); old != nil {
		c.earlyBytes.Add(-int64(len(old.data)))
	}
	if n.changes.Load() != mark {
		c.dropEarly(n)
	}
}

// dropEarly is for who changes the file, before and after it, has read all of it, or lets it go.
func (c *Client) dropEarly(n *node) {
	if n == nil {
		return
	}
	n.changes.Add(1)
	if n.early.Load() == nil {
		return
	}
	if old := n.early.Swap(nil); old != nil {
		c.earlyBytes.Add(-int64(len(old.data)))
	}
}

// changes is for who is about to change the file. n may be nil.
func (c *Client) changes(n *node) {
	if n != nil && !n.unread.Load() {
		n.unread.Store(true)
	}
	c.dropEarly(n)
}

// readEarly answers a read from what came with the opening, if that is to be
// believed: the bytes are copied to room.
func (c *Client) readEarly(ino sealfs.Ino, off uint64, size int, room []byte) ([]byte, bool) {
	if c.earlyBytes.Load() == 0 {
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
	if n.dirty.Load() || !c.believes(ino, e.belief) {
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
