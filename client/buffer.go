package client

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/op"
)

const (
	// bufferMax is how much of a file is delayed at most, in bytes. Buffers also
	// end at its multiples in the file, so that streams are sent in aligned pieces.
	bufferMax = 128 << 10
	// bufferHuge takes its place, with a session, where a file may have chunks:
	// each buffer there costs a further request to the file's home.
	bufferHuge = 1 << 20
	// bufferSmall is the room that a buffer begins with: most files end there.
	bufferSmall = 8 << 10
	// bufferAge is for how long a write is usually delayed at most.
	bufferAge = time.Second
)

var (
	hugeBuffers  = sync.Pool{New: func() any { return new([bufferHuge]byte) }}
	bigBuffers   = sync.Pool{New: func() any { return new([bufferMax]byte) }}
	smallBuffers = sync.Pool{New: func() any { return new([bufferSmall]byte) }}
)

// Write writes data at off, or with op.Append at the end of the file; op.KillPriv
// clears the setuid and setgid bits, and op.Within leaves out what is beyond the end. The data may be delayed (see the package
// comment); an earlier delayed write's error is returned here, and then nothing is written.
// data is not kept. When ctx ends, a part of it may have been written.
func (c *Client) Write(ctx context.Context, ino sealfs.Ino, off uint64, data []byte, flags op.Flags) error {
	_, err := c.write(ctx, ino, off, data, flags)
	return err
}

// write is Write that also says how much was written; that is all unless there
// is an error.
func (c *Client) write(ctx context.Context, ino sealfs.Ino, off uint64, data []byte, flags op.Flags) (int, error) {
	if len(data) == 0 {
		return 0, nil
	}
	if off > sealfs.FileSizeMax-uint64(len(data)) {
		return 0, sealfs.ErrTooBig
	}
	n := c.nodes.get(ino)
	c.changes(n)
	defer c.dropEarly(n)
	if n == nil {
		return c.writeNow(ctx, nil, ino, off, data, flags)
	}
	if n.capability.Load() {
		// The kernel takes it away itself, but not where it writes past its cache.
		if err := c.Removexattr(ctx, ino, capability); err != nil && err != sealfs.ErrNoData {
			return 0, err
		}
		n.capability.Store(false)
	}
	t, err := n.turn(ctx)
	if err != nil {
		return 0, err
	}
	if err := n.err; err != nil {
		n.err = nil
		t.end()
		return 0, err
	}
	done := 0
	through := c.o.Durable || flags&op.Within != 0 || !c.mayDelay(ino)
	switch {
	case c.remote && flags&op.Append != 0 && !n.gone:
		// An append is in several parts when the file has chunks, and the caller's
		// interrupt must not tear it: it goes through a buffer in any case.
		done, err = c.delay(ctx, &t, off, data, flags)
		if err == nil && through {
			err = c.send(ctx, &t)
		}
	case n.gone || through || len(data) >= c.most(n, off, flags):
		if err = c.send(ctx, &t); err == nil {
			done, err = c.writeNow(ctx, n, ino, off, data, flags)
		}
	default:
		done, err = c.delay(ctx, &t, off, data, flags)
		if err == nil && !c.mayDelay(ino) {
			// A Register came in between, which may not have told of it.
			err = c.send(ctx, &t)
		}
	}
	t.end()
	if err == nil && c.crowded() {
		err = c.relieve(ctx, n)
	}
	return done, err
}

// most is how long a buffer may be that begins in the block of off.
func (c *Client) most(n *node, off uint64, flags op.Flags) int {
	if c.remote && (flags&op.Append == 0 && off >= sealfs.HomeBytes || flags&op.Append != 0 && n.far.Load()) {
		return bufferHuge
	}
	return bufferMax
}

// delay puts data into the buffer and sends what does not go together. It
// returns how much was taken.
func (c *Client) delay(ctx context.Context, t *turn, off uint64, data []byte, flags op.Flags) (int, error) {
	n := t.n
	if len(n.buf) > 0 && !n.joins(off, flags) {
		if err := c.send(ctx, t); err != nil {
			return 0, err
		}
	}
	done := 0
	if flags&op.Append != 0 && len(n.buf) > 0 && len(n.buf)+len(data) > c.most(n, off, flags) {
		// An append goes in one piece, or those of others could come between.
		if err := c.send(ctx, t); err != nil {
			return 0, err
		}
	}
	for {
		most := c.most(n, off, flags)
		if flags&op.Append != 0 && len(data) > most {
			most = bufferHuge
		}
		at, limit := len(n.buf), most // in the buffer
		if flags&op.Append == 0 {
			if len(n.buf) == 0 {
				n.off = off
			}
			at = int(off - n.off)
			limit -= int(n.off % uint64(most))
		}
		part := max(min(len(data)-done, limit-at), 0)
		c.put(n, at, data[done:done+part])
		n.flags |= flags
		done, off = done+part, off+uint64(part)
		if at+part >= limit {
			if err := c.send(ctx, t); err == errGaveUp && done == len(data) {
				return done, nil // it is on its way
			} else if err != nil {
				return done, err
			}
		}
		if done == len(data) {
			return done, nil
		}
	}
}

// joins reports whether a write can begin inside the buffer or at its end.
func (n *node) joins(off uint64, flags op.Flags) bool {
	if (n.flags^flags)&op.Append != 0 {
		return false
	}
	return flags&op.Append != 0 || off >= n.off && off-n.off <= uint64(len(n.buf))
}

// put copies data into the buffer at at, which is not beyond its end.
func (c *Client) put(n *node, at int, data []byte) {
	end := at + len(data)
	if end > len(n.room) {
		old := n.room
		switch {
		case end <= bufferSmall:
			n.room = smallBuffers.Get().(*[bufferSmall]byte)[:]
		case end <= bufferMax:
			n.room = bigBuffers.Get().(*[bufferMax]byte)[:]
		default:
			n.room = hugeBuffers.Get().(*[bufferHuge]byte)[:]
		}
		copy(n.room, n.buf)
		freeBuffer(old)
		c.buffered.Add(int64(len(n.room) - len(old)))
	}
	if len(n.buf) == 0 {
		n.dirty.Store(true)
		c.dirtyCount.Add(1)
		c.dirty.add(c, n)
	}
	n.buf = n.room[:max(end, len(n.buf))]
	copy(n.buf[at:], data)
}

func freeBuffer(b []byte) {
	switch len(b) {
	case bufferSmall:
		smallBuffers.Put((*[bufferSmall]byte)(b))
	case bufferMax:
		bigBuffers.Put((*[bufferMax]byte)(b))
	case bufferHuge:
		hugeBuffers.Put((*[bufferHuge]byte)(b))
	}
}

// send sends the buffer and returns the error. The buffer is empty then:
// what could not be written is lost, as on any file system. But when it
// returns errGaveUp, the buffer is sent on in the background, and the turn is passed
// to that: whoever waits for the gate waits for the sending.
func (c *Client) send(ctx context.Context, t *turn) error {
	n := t.n
	if len(n.buf) == 0 {
		return nil
	}
	if !c.remote {
		_, err := c.writeNow(context.Background(), n, n.ino, n.off, n.buf, n.flags)
		c.sentBuffer(n)
		return err
	}
	if n.ses.Load().ended.Load() {
		c.sentBuffer(n)
		return sealfs.ErrSession
	}
	k := c.homeWrite(n)
	if k == nil {
		return c.sendFar(ctx, t)
	}
	err := c.ask(ctx, k)
	if err == errGaveUp {
		t.passed = true
		c.markStuck(n)
		go func() {
			err := c.ask(c.life, k)
			c.finish(k)
			k.end()
			if err == sealfs.ErrTooBig {
				_, err = c.writeNow(c.life, n, n.ino, n.off, n.buf, n.flags)
			}
			c.sentLate(n, err)
		}()
		return err
	}
	c.finish(k)
	k.end()
	if err == sealfs.ErrTooBig && n.flags&op.Append != 0 {
		return c.sendFar(ctx, t)
	}
	c.sentBuffer(n)
	return err
}

// homeWrite returns the call that sends the buffer of n, nil if that takes more than one.
func (c *Client) homeWrite(n *node) *call {
	far := n.off+uint64(len(n.buf)) > sealfs.HomeBytes
	if n.flags&op.Append != 0 {
		far = n.far.Load()
	}
	if far || len(n.buf) > bufferMax {
		return nil
	}
	k := c.begin(op.Write, n.ino)
	k.Ino, k.Off, k.Flags, k.Data = n.ino, n.off, n.flags, n.buf
	if n.flags&op.Append != 0 {
		k.Off, k.Len = 0, c.appendLimit(n)
	}
	c.address(k)
	return k
}

// sendFar is send for a buffer whose sending takes several requests. They run on
// a goroutine of their own, so that the caller can leave it alone.
func (c *Client) sendFar(ctx context.Context, t *turn) error {
	n := t.n
	const working, finished, left = 0, 1, 2
	var state atomic.Int32
	over := make(chan error, 1)
	go func() {
		_, err := c.writeNow(c.life, n, n.ino, n.off, n.buf, n.flags)
		if state.CompareAndSwap(working, finished) {
			over <- err
			return
		}
		c.sentLate(n, err)
	}()
	select {
	case err := <-over:
		c.sentBuffer(n)
		return err
	case <-ctx.Done():
	}
	c.markStuck(n) // before the goroutine may undo it
	if !state.CompareAndSwap(working, left) {
		err := <-over
		c.sentBuffer(n)
		return err
	}
	t.passed = true
	return errGaveUp
}

// markStuck takes the buffer of n out of what crowded counts as usual. The gate is taken.
func (c *Client) markStuck(n *node) {
	if !n.stuck {
		n.stuck = true
		c.dirty.pass(n)
		c.stuck.Add(int64(len(n.room)))
	}
}

// sentLate ends a turn that was passed on: nobody waits for the error.
func (c *Client) sentLate(n *node, err error) {
	c.sentBuffer(n)
	if err != nil {
		c.keep(n, err)
	}
	n.gate.release()
}

// keep keeps the error of a delayed write for who wrote it. The gate is taken.
func (c *Client) keep(n *node, err error) {
	if n.err == nil {
		n.err = err
	}
	if n.gone || n.ses.Load().ended.Load() {
		c.log.Error("a delayed write failed", "ino", uint64(n.ino), "err", err)
	}
}

// sentBuffer empties the buffer of n, whose gate is taken.
func (c *Client) sentBuffer(n *node) {
	c.dirty.remove(n)
	c.buffered.Add(-int64(len(n.room)))
	if n.stuck {
		n.stuck = false
		c.stuck.Add(-int64(len(n.room)))
	}
	freeBuffer(n.room)
	n.room, n.buf, n.off, n.flags = nil, nil, 0, 0
	c.sent.add(n.ino)
	n.dirty.Store(false)
	c.dirtyCount.Add(-1)
}

// Flush sends what is delayed of ino and returns the error of that or of an
// earlier delayed write. The error stays for the next write or fsync: whoever
// closes a descriptor of the file, a child process or a reader, may be told of
// it, but must not take it away from the writer. When ctx ends, sending goes on.
func (c *Client) Flush(ctx context.Context, ino sealfs.Ino) error {
	n := c.nodes.get(ino)
	if n == nil {
		return nil
	}
	t, err := n.turn(ctx)
	if err != nil {
		return err
	}
	defer t.end()
	if err := c.sendAndKeep(ctx, &t); err != nil {
		return err
	}
	return n.err
}

// sendAndKeep sends what is delayed and keeps the first error. It returns only errGaveUp.
func (c *Client) sendAndKeep(ctx context.Context, t *turn) error {
	err := c.send(ctx, t)
	if err == errGaveUp {
		return err
	}
	if err != nil {
		c.keep(t.n, err)
	}
	return nil
}

// flushAndTake is Flush for who asked for durability: the error is told once.
func (c *Client) flushAndTake(ctx context.Context, ino sealfs.Ino) error {
	n := c.nodes.get(ino)
	if n == nil {
		return nil
	}
	t, err := n.turn(ctx)
	if err != nil {
		return err
	}
	defer t.end()
	if err := c.sendAndKeep(ctx, &t); err != nil {
		return err
	}
	err, n.err = n.err, nil
	return err
}

// settle sends what is delayed of ino for somebody who looks at it. An error is
// kept for who wrote it; the result says only that ctx has ended.
func (c *Client) settle(ctx context.Context, ino sealfs.Ino) error {
	if c.dirtyCount.Load() == 0 {
		return nil
	}
	if n := c.nodes.get(ino); n != nil && n.dirty.Load() {
		return c.sendNode(ctx, n)
	}
	return nil
}

// sendNode sends what is delayed of n. The result says only that ctx has ended.
func (c *Client) sendNode(ctx context.Context, n *node) error {
	t, err := n.turn(ctx)
	if err != nil {
		return err
	}
	defer t.end()
	return c.sendAndKeep(ctx, &t)
}
