package client

import (
	"context"
	"sync"
	"time"

	"sealfs"
	"sealfs/op"
)

// layoutAge is for how long a layout is believed without a session, when no mount says
// otherwise. With one it is believed under the file's lease.
const layoutAge = time.Second

// layout is what matters of a file beyond sealfs.HomeBytes.
type layout struct {
	gen   uint64 // requests for chunks carry it: a truncation makes another one
	bound uint64 // no chunk has data beyond; 0: there are no chunks
	size  uint64
}

func layoutOf(a *op.Attr) layout { return layout{a.Gen, a.Bound, a.Size} }

// kept is the layout of a node, kept for a while.
type kept struct {
	mu     sync.Mutex
	layout layout
	since  time.Time // zero: unknown
	belief belief
	change uint64 // counts what happened to it: an answer from before is old
}

// get returns the layout if it is to be believed. Otherwise the mark shall be
// given to put with what is asked then.
func (k *kept) get(c *Client, ino sealfs.Ino) (l layout, ok bool, mark uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.since.IsZero():
	case c.leasing:
		ok = c.believes(ino, k.belief)
	default:
		ok = time.Since(k.since) < time.Duration(c.layoutAge.Load())
	}
	return k.layout, ok, k.change
}

// same reports whether l is what was heard last.
func (k *kept) same(l layout) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.layout == l
}

// put keeps what was asked since mark, unless something happened since. It
// returns what is to be believed.
func (k *kept) put(l layout, b belief, mark uint64) layout {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.change == mark {
		k.layout, k.since, k.belief = l, time.Now(), b
	} else if !k.since.IsZero() && k.layout.gen == l.gen {
		// It has grown by this client's own writes, perhaps later.
		l.size, l.bound = max(l.size, k.layout.size), max(l.bound, k.layout.bound)
	}
	return l
}

// grown notes what a change by this client was answered.
func (k *kept) grown(l layout, b belief) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.since.IsZero() && k.layout.gen == l.gen {
		// Answers to parallel changes may come in another order.
		l.size, l.bound = max(l.size, k.layout.size), max(l.bound, k.layout.bound)
	}
	if b == 0 && !k.since.IsZero() {
		b = k.belief // one's own changes leave it
	}
	k.layout, k.since, k.belief = l, time.Now(), b
	k.change++
}

// forget makes the next one ask.
func (k *kept) forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.since = time.Time{}
	k.change++
}

// layoutOf returns the layout of ino, whose node is n or nil.
func (c *Client) layoutOf(ctx context.Context, n *node, ino sealfs.Ino) (layout, error) {
	var mark uint64
	if n != nil {
		l, ok, m := n.kept.get(c, ino)
		if ok {
			return l, nil
		}
		mark = m
	}
	k := c.begin(op.Getattr, ino)
	k.Ino = ino
	a, err := c.attrs(ctx, k)
	if err != nil {
		return layout{}, err
	}
	l := layoutOf(&a.Attr)
	if n != nil {
		l = n.kept.put(l, a.ino, mark)
		n.far.Store(l.bound != 0 && l.size >= sealfs.HomeBytes)
	}
	return l, nil
}

// seen compares attributes that somebody asked for with what is kept: readers
// shall find what a stat has shown.
func (c *Client) seen(a *op.Attr) {
	if a.Size <= sealfs.HomeBytes && a.Bound == 0 && a.Gen == 0 {
		return
	}
	if n := c.nodes.get(a.Ino); n != nil {
		if !n.kept.same(layoutOf(a)) {
			n.kept.forget()
		}
	}
}

// resized forgets the layout of a file whose size this client has set.
func (c *Client) resized(ino sealfs.Ino) {
	if n := c.nodes.get(ino); n != nil {
		n.kept.forget()
	}
}

// extend asks the home of a file to raise bound and size, and returns the layout
// then. It returns sealfs.ErrStale if the file has not generation l.gen any more.
func (c *Client) extend(ctx context.Context, n *node, ino sealfs.Ino, l layout, flags op.Flags) (layout, error) {
	k := c.begin(op.Extend, ino)
	k.Ino, k.Gen, k.Off, k.Size, k.Flags, k.layout = ino, l.gen, l.bound, l.size, flags, true
	a, err := c.attrs(ctx, k)
	if err != nil {
		return layout{}, err
	}
	l = layoutOf(&a.Attr)
	if n != nil {
		n.kept.grown(l, a.ino)
		n.far.Store(l.bound != 0 && l.size >= sealfs.HomeBytes)
	}
	return l, nil
}

// bound returns the bound that a file needs that shall reach to end.
func bound(end uint64) uint64 {
	if end > sealfs.FileSizeMax-sealfs.BoundStep {
		return sealfs.FileSizeMax
	}
	return sealfs.BoundFor(end)
}

// reserve makes sure that chunks may have data up to end, and returns the layout
// then. A file that has no chunks gets some if it may. bound 0 in the
// answer says that the file is whole in its home.
func (c *Client) reserve(ctx context.Context, n *node, ino sealfs.Ino, l layout, end uint64) (layout, error) {
	if l.bound == 0 && (!c.o.Chunked || l.size > sealfs.HomeBytes) || l.bound >= end {
		return l, nil
	}
	l, err := c.extend(ctx, n, ino, layout{gen: l.gen, bound: bound(end)}, 0)
	if err == nil && l.bound != 0 && l.bound < end {
		err = sealfs.ErrStale // truncated in between
	}
	return l, err
}
