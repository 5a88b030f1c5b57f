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
	// bufferSmall is the room that a buffer begins with: most files end there.
	bufferSmall = 8 << 10
	// bufferAge is for how long a write is usually delayed at most.
	bufferAge = time.Second
)

var (
	bigBuffers   = sync.Pool{New: func() any { return new([bufferMax]byte) }}
	smallBuffers = sync.Pool{New: func() any { return new([bufferSmall]byte) }}
)

// node is an inode that somebody on this client holds open.
type node struct {
	ino   sealfs.Ino
	opens uint64 // guarded by the table: by Open, Create and Tmpfile, less Release
	held  uint64 // guarded by the table: how often the server was told

	locked     atomic.Bool // somebody took a POSIX lock
	capability atomic.Bool // the next write must take the capability attribute away
	dirty      atomic.Bool // there is a buffer; false only when the server has answered it

	mu    sync.Mutex // held while the buffer is sent
	gone  bool       // released: no buffer may begin
	room  []byte     // the pooled array of the buffer, all of it
	buf   []byte     // what is delayed, the beginning of room
	off   uint64     // its place in the file; without meaning for an append
	flags op.Flags   // Append or not, and KillPriv when any write wanted it
	err   error      // of a delayed write, not yet told to anybody

	since      time.Time // in the list: when the buffer began
	prev, next *node     // in the list
}

// Write writes data at off, or with op.Append at the end of the file; op.KillPriv
// clears the setuid and setgid bits. The data may be delayed (see the package
// comment); an earlier delayed write's error is returned here, and then nothing is written.
// data is not kept.
func (c *Client) Write(ctx context.Context, ino sealfs.Ino, off uint64, data []byte, flags op.Flags) error {
	if len(data) == 0 {
		return nil
	}
	if off > sealfs.FileSizeMax-uint64(len(data)) {
		return sealfs.ErrTooBig
	}
	n := c.nodes.get(ino)
	if n == nil {
		return c.writeNow(ctx, ino, off, data, flags)
	}
	if n.capability.Load() {
		// The kernel takes it away itself, but not where it writes past its cache.
		if err := c.Removexattr(ctx, ino, capability); err != nil && err != sealfs.ErrNoData {
			return err
		}
		n.capability.Store(false)
	}
	n.mu.Lock()
	if err := n.err; err != nil {
		n.err = nil
		n.mu.Unlock()
		return err
	}
	var err error
	if n.gone || c.o.Durable || len(data) >= bufferMax {
		if err = c.send(n); err == nil {
			err = c.writeNow(ctx, ino, off, data, flags)
		}
	} else {
		err = c.delay(n, off, data, flags)
	}
	n.mu.Unlock()
	for err == nil && c.buffered.Load() > c.o.BufferBytes {
		oldest := c.dirty.oldest()
		if oldest == nil {
			break
		}
		c.settleNode(oldest)
	}
	return err
}

// writeNow sends data in pieces that a request can carry.
func (c *Client) writeNow(ctx context.Context, ino sealfs.Ino, off uint64, data []byte, flags op.Flags) error {
	most := sealfs.IOMax
	if c.o.Session != 0 {
		most = bufferMax // one record, so that a retry finds all of it or nothing
	}
	for len(data) > 0 {
		k := c.begin(op.Write, ino)
		k.Ino, k.Off, k.Flags = ino, off, flags
		k.Data = data[:min(len(data), most)]
		if flags&op.Append != 0 {
			k.Off = 0
		}
		off += uint64(len(k.Data))
		data = data[len(k.Data):]
		if err := c.none(ctx, k); err != nil {
			return err
		}
	}
	return nil
}

// delay puts data, shorter than bufferMax, into the buffer of n and sends what
// does not go together. n is locked.
func (c *Client) delay(n *node, off uint64, data []byte, flags op.Flags) error {
	if len(n.buf) > 0 && !n.joins(off, flags) {
		if err := c.send(n); err != nil {
			return err
		}
	}
	for {
		at := 0 // in the buffer
		limit := bufferMax
		if flags&op.Append == 0 {
			if len(n.buf) == 0 {
				n.off = off
			}
			at = int(off - n.off)
			limit -= int(n.off % bufferMax)
		} else {
			at = len(n.buf)
		}
		part := min(len(data), limit-at)
		c.put(n, at, data[:part])
		n.flags |= flags
		data, off = data[part:], off+uint64(part)
		if at+part == limit {
			if err := c.send(n); err != nil {
				return err
			}
		}
		if len(data) == 0 {
			return nil
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
		if end <= bufferSmall {
			n.room = smallBuffers.Get().(*[bufferSmall]byte)[:]
		} else {
			n.room = bigBuffers.Get().(*[bufferMax]byte)[:]
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
	}
}

// send sends the buffer of n, which is locked, and returns the error. The buffer is
// empty then in any case: what could not be written is lost, as on any file system.
func (c *Client) send(n *node) error {
	if len(n.buf) == 0 {
		return nil
	}
	// Nobody's interrupt may tear what was answered long ago.
	err := c.writeNow(context.Background(), n.ino, n.off, n.buf, n.flags)
	c.dirty.remove(n)
	c.buffered.Add(-int64(len(n.room)))
	freeBuffer(n.room)
	n.room, n.buf, n.off, n.flags = nil, nil, 0, 0
	c.sent.add(n.ino)
	n.dirty.Store(false)
	c.dirtyCount.Add(-1)
	return err
}

// sendAndTell is send that also returns an earlier error that nobody was told.
// n is locked.
func (c *Client) sendAndTell(n *node) error {
	err := n.err
	n.err = nil
	if serr := c.send(n); err == nil {
		err = serr
	}
	return err
}

// Flush sends what is delayed of ino and returns the error of that or of an
// earlier delayed write. The error stays for the next write or fsync: whoever
// closes a descriptor of the file, a child process or a reader, may be told of
// it, but must not take it away from the writer.
func (c *Client) Flush(ino sealfs.Ino) error {
	n := c.nodes.get(ino)
	if n == nil {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	c.sendAndKeep(n)
	return n.err
}

// sendAndKeep sends what is delayed and keeps the first error. n is locked.
func (c *Client) sendAndKeep(n *node) {
	if err := c.send(n); err != nil && n.err == nil {
		n.err = err
	}
}

// flushAndTake is Flush for who asked for durability: the error is told once.
func (c *Client) flushAndTake(ino sealfs.Ino) error {
	n := c.nodes.get(ino)
	if n == nil {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return c.sendAndTell(n)
}

// settle sends what is delayed of ino for somebody who looks at it. An error is
// kept for who wrote it.
func (c *Client) settle(ino sealfs.Ino) {
	if c.dirtyCount.Load() == 0 {
		return
	}
	if n := c.nodes.get(ino); n != nil && n.dirty.Load() {
		c.settleNode(n)
	}
}

func (c *Client) settleNode(n *node) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := c.send(n); err != nil {
		if n.err == nil {
			n.err = err
		}
		if n.gone {
			c.log.Error("a delayed write failed", "ino", uint64(n.ino), "err", err)
		}
	}
}

// FlushAll sends everything that is delayed and returns the first error.
func (c *Client) FlushAll() error {
	var first error
	for {
		n := c.dirty.oldest()
		if n == nil {
			return first
		}
		n.mu.Lock()
		if err := c.send(n); err != nil {
			if first == nil {
				first = err
			}
			n.err = err
		}
		n.mu.Unlock()
	}
}

// dirtyList holds the nodes with buffers, the oldest first.
type dirtyList struct {
	mu          sync.Mutex
	first, last *node
	timer       bool
}

func (l *dirtyList) add(c *Client, n *node) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n.since = time.Now()
	n.prev, n.next = l.last, nil
	if l.last != nil {
		l.last.next = n
	} else {
		l.first = n
	}
	l.last = n
	if !l.timer {
		l.timer = true
		time.AfterFunc(c.age, c.sendAged)
	}
}

func (l *dirtyList) remove(n *node) {
	l.mu.Lock()
	defer l.mu.Unlock()
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

func (l *dirtyList) oldest() *node {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.first
}

// aged returns the oldest node if its buffer is as old as age; otherwise, when to look again.
func (l *dirtyList) aged(age time.Duration) (*node, time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.first == nil {
		l.timer = false
		return nil, 0
	}
	if wait := age - time.Since(l.first.since); wait > 0 {
		return nil, wait
	}
	return l.first, 0
}

// sendAged sends what was delayed long enough, and comes again while there is anything.
func (c *Client) sendAged() {
	for {
		n, wait := c.dirty.aged(c.age)
		switch {
		case n != nil:
			c.settleNode(n)
		case wait > 0:
			time.AfterFunc(wait, c.sendAged)
			return
		default:
			return
		}
	}
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

// table finds nodes by inode number.
type table struct {
	parts [64]tablePart
}

type tablePart struct {
	mu    sync.Mutex
	nodes map[sealfs.Ino]*node
	_     [48]byte // a cache line each
}

func (t *table) init() {
	for i := range t.parts {
		t.parts[i].nodes = map[sealfs.Ino]*node{}
	}
}

// part spreads by the counter and by the shard in an inode number.
func (t *table) part(ino sealfs.Ino) *tablePart {
	return &t.parts[uint64(ino)*0x9e3779b97f4a7c15>>58]
}

// get returns the node of ino, or nil when nobody holds it open.
func (t *table) get(ino sealfs.Ino) *node {
	p := t.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.nodes[ino]
}

// open notes that the server was told of one more opening of ino.
func (t *table) open(ino sealfs.Ino) {
	p := t.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.nodes[ino]
	if n == nil {
		n = &node{ino: ino}
		p.nodes[ino] = n
	}
	n.opens++
	n.held++
}

// release undoes one open of n, which is locked. After the last one n is gone,
// and the result is how often the server must be told.
func (t *table) release(n *node) uint64 {
	p := t.part(n.ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	if n.gone {
		return 0
	}
	if n.opens--; n.opens > 0 {
		return 0
	}
	delete(p.nodes, n.ino)
	n.gone = true
	return n.held
}

// markLocked notes that somebody takes a POSIX lock, which a close must drop.
func (t *table) markLocked(ino sealfs.Ino) {
	if n := t.get(ino); n != nil {
		n.locked.Store(true)
	}
}

// hasLocks reports whether anybody took a POSIX lock on ino since it was opened.
func (t *table) hasLocks(ino sealfs.Ino) bool {
	n := t.get(ino)
	return n != nil && n.locked.Load()
}

// markCapability notes that ino has a capability attribute now.
func (t *table) markCapability(ino sealfs.Ino) {
	if n := t.get(ino); n != nil {
		n.capability.Store(true)
	}
}
