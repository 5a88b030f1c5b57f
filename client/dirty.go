package client

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
)

const (
	// sendersMax bounds the aged buffers that are sent at the same time, those of
	// servers that are away apart.
	sendersMax = 16
	// briefMax is for how long an aged buffer may keep others from being sent.
	briefMax = 100 * time.Millisecond
)

// dirtyList holds the nodes with buffers, the oldest first.
type dirtyList struct {
	mu          sync.Mutex
	first, last *node
	timer       bool
}

func (l *dirtyList) add(c *Client, n *node) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.link(n)
	if !l.timer {
		l.timer = true
		time.AfterFunc(c.age, c.sendAged)
	}
}

func (l *dirtyList) remove(n *node) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unlink(n)
	n.busy, n.passed = false, false
}

// link makes n the youngest. The list is locked.
func (l *dirtyList) link(n *node) {
	n.since = time.Now()
	n.prev, n.next = l.last, nil
	if l.last != nil {
		l.last.next = n
	} else {
		l.first = n
	}
	l.last = n
}

func (l *dirtyList) unlink(n *node) {
	if n.prev != nil {
		n.prev.next = n.next
	} else {
		l.first = n.next
	}
	if n.next != nil {
		n.next.prev = n.prev
	} else {
		l.last = n.prev
	}
	n.prev, n.next = nil, nil
}

// claim returns the oldest node that nobody is busy with, and makes it busy until
// rest, or nil if there is none. If it is not as old as age, it is not made busy, and
// the second result says when it will be.
func (l *dirtyList) claim(age time.Duration) (*node, time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for n := l.first; n != nil; n = n.next {
		if n.busy || n.passed {
			continue
		}
		if wait := age - time.Since(n.since); wait > 0 {
			return nil, wait
		}
		n.busy = true
		return n, 0
	}
	return nil, 0
}

// rest ends a claim. A buffer that is still there has to age again.
func (l *dirtyList) rest(n *node) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n.busy = false
	if l.first == n || n.prev != nil {
		l.unlink(n)
		l.link(n)
	}
}

// pass leaves a node to a goroutine of its own until its buffer is sent.
func (l *dirtyList) pass(n *node) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n.passed = true
}

// all returns the nodes with buffers.
func (l *dirtyList) all() []*node {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []*node
	for n := l.first; n != nil; n = n.next {
		all = append(all, n)
	}
	return all
}

// again arranges for sendAged to be called in wait, or when there is something new.
func (l *dirtyList) again(wait time.Duration, f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.timer = l.first != nil; l.timer {
		time.AfterFunc(wait, f)
	}
}

// sendAged sends what was delayed long enough, and comes again while there is anything.
// A buffer whose server is away is left to a goroutine of its own.
func (c *Client) sendAged() {
	for {
		n, wait := c.dirty.claim(c.age)
		if n == nil {
			if wait == 0 {
				wait = c.age // all are busy
			}
			c.dirty.again(wait, c.sendAged)
			return
		}
		if !c.remote {
			c.sendNode(context.Background(), n)
			c.dirty.rest(n)
			continue
		}
		c.sending <- struct{}{}
		go func() {
			c.sendBriefly(n)
			<-c.sending
		}()
	}
}

// sendBriefly sends the buffer of n, which the caller has claimed, in the
// background if that takes long. When somebody else has the gate, he is most
// likely sending it.
func (c *Client) sendBriefly(n *node) {
	defer c.dirty.rest(n)
	if !n.gate.try() {
		return
	}
	ctx, cancel := brief(context.Background(), briefMax)
	defer cancel()
	t := turn{n: n}
	c.sendAndKeep(ctx, &t)
	t.end()
}

// crowded reports whether delayed writes take too much memory. Those of servers
// that are away are counted apart, so that they leave room for others; together they
// take twice Options.BufferBytes at most, and a buffer for everybody who writes.
func (c *Client) crowded() bool {
	stuck := c.stuck.Load()
	return c.buffered.Load()-stuck > c.o.BufferBytes || stuck > c.o.BufferBytes
}

// relieve makes room for delayed writes: the oldest are sent. Where that does not help,
// the caller's own buffer, that of n, is.
func (c *Client) relieve(ctx context.Context, n *node) error {
	for range c.dirtyCount.Load() {
		if c.buffered.Load()-c.stuck.Load() <= c.o.BufferBytes {
			break
		}
		oldest, _ := c.dirty.claim(0)
		if oldest == nil {
			break
		}
		if c.remote {
			c.sendBriefly(oldest)
		} else {
			c.sendNode(context.Background(), oldest)
			c.dirty.rest(oldest)
		}
	}
	if c.remote && c.crowded() {
		if err := c.sendNode(ctx, n); err != nil && ctx.Err() == nil {
			return err
		}
		// An interrupt comes too late: the data was taken.
	}
	return nil
}

// FlushAll sends everything that is delayed and returns the first error. Like
// Close, it does not wait for ever for servers that are away.
func (c *Client) FlushAll() error {
	ctx, cancel := context.WithTimeout(context.Background(), closePatience)
	defer cancel()
	return c.flushAll(ctx)
}

// flushAll is FlushAll until ctx ends.
func (c *Client) flushAll(ctx context.Context) error {
	var first error
	for {
		nodes := c.dirty.all()
		if len(nodes) == 0 {
			return first
		}
		var mu sync.Mutex
		var wg sync.WaitGroup
		slots := make(chan struct{}, sendersMax)
		for _, n := range nodes {
			slots <- struct{}{}
			wg.Go(func() {
				if c.remote {
					// Nobody may keep the others from being sent.
					short, cancel := brief(ctx, briefMax)
					c.sendNode(short, n)
					cancel()
				}
				<-slots
				err := c.flushNode(ctx, n)
				mu.Lock()
				if first == nil {
					first = err
				}
				mu.Unlock()
			})
		}
		wg.Wait()
		if ctx.Err() != nil {
			if n := c.dirtyCount.Load(); n > 0 {
				first = errors.Join(first, fmt.Errorf("%d files with delayed writes, of up to %d bytes together, could not be sent: %w",
					n, c.buffered.Load(), sealfs.ErrUnavailable))
			}
			return first
		}
	}
}

// flushNode sends what is delayed of n; the error is both returned and kept.
func (c *Client) flushNode(ctx context.Context, n *node) error {
	t, err := n.turn(ctx)
	if err != nil {
		return nil
	}
	defer t.end()
	if c.sendAndKeep(ctx, &t) != nil {
		return nil
	}
	return n.err
}

// sentLog remembers whose buffers were sent last. An answer with attributes that
// was under way meanwhile may be from before: whoever got it asks current.
type sentLog struct {
	count atomic.Uint64
	ring  [64]atomic.Uint64
}

func (l *sentLog) mark() uint64 { return l.count.Load() }

func (l *sentLog) add(ino sealfs.Ino) {
	l.ring[l.count.Add(1)%uint64(len(l.ring))].Store(uint64(ino))
}

// current reports whether attributes of ino hold what was written before mark was
// taken, which was before they were asked for.
func (c *Client) current(mark uint64, ino sealfs.Ino) bool {
	if c.dirtyCount.Load() != 0 {
		if n := c.nodes.get(ino); n != nil && n.dirty.Load() {
			return false
		}
	}
	// A buffer of ino that was sent since is in the ring now: it is noted before
	// the node stops being dirty.
	now := c.sent.count.Load()
	if now-mark >= uint64(len(c.sent.ring))/2 {
		return now == mark
	}
	for i := mark + 1; i <= now; i++ {
		if c.sent.ring[i%uint64(len(c.sent.ring))].Load() == uint64(ino) {
			return false
		}
	}
	return true
}
