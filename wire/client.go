package wire

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/op"
)

// Options says how a client end behaves. The zero value of each field but
// Cluster means its default.
type Options struct {
	// Cluster is the cluster that the server must belong to; the zero UUID
	// accepts any, and Conn.Cluster tells which.
	Cluster sealfs.UUID
	// Program is the name and version of this program, told to the server. Default "sealfs".
	Program string
	// Peer says that this process is a server of Cluster, which must be named. A
	// server that takes no peers refuses it with ErrPerm.
	Peer bool
	// HandshakeTimeout bounds dialling and the exchange of hellos. Default 10 s.
	HandshakeTimeout time.Duration
	// Keepalive is the silence after which the server is asked whether it
	// lives. It must be well below the server's Timeout. Default 10 s.
	Keepalive time.Duration
	// Timeout is the silence after such a question, or the time that a write makes
	// no progress, after which the connection is given up. Default 30 s.
	Timeout time.Duration
}

func (o *Options) setDefaults() {
	o.Program = cmp.Or(o.Program, "sealfs")
	o.HandshakeTimeout = cmp.Or(o.HandshakeTimeout, 10*time.Second)
	o.Keepalive = cmp.Or(o.Keepalive, 10*time.Second)
	o.Timeout = cmp.Or(o.Timeout, 30*time.Second)
}

// Conn is the client end of a connection and an op.Handler: any number of
// goroutines may call Do at once. It never connects again and never repeats a
// request: once it has failed, all calls return ErrUnavailable, and its owner
// decides.
//
// # Roles
//
// A Conn has no goroutine in the path of requests. The callers take two roles in turn:
//
//   - writer: see outbox. A caller that finds nobody writing writes its own
//     request, and what others queued meanwhile.
//   - reader: a caller that waits for its reply while nobody reads becomes the
//     reader. It gives the replies of others to them, and when its own has come (and all
//     that is already in the buffer) passes the role to one that still waits.
//
// So a lone caller writes and reads itself, without a goroutine woken anywhere.
//
// Every request that was sent has a goroutine that waits for its reply or is
// about to: when a caller gives up, one is started in its place. Therefore
// somebody always reads while the server has something to say.
//
// # Locks
//
// Conn.mu is taken before outbox.mu, never the other way round; neither is held
// during a system call.
type Conn struct {
	nc       net.Conn
	addr     string
	opts     Options
	theirs   hello
	protocol uint16
	n        counters
	out      outbox
	in       inbox // of the reader
	done     chan struct{}
	busy     atomic.Int32 // callers inside of do

	mu     sync.Mutex
	calls  map[uint64]*call // sent, or about to be, and not yet answered
	lastID uint64
	reader *call // who has the role of reader
	err    error // why the connection is at its end
}

// A call is one request on its way. The fields below wake are guarded by
// Conn.mu but where they say otherwise.
type call struct {
	id   uint64
	rep  *op.Reply
	room uint64        // bound of the reply's payload
	ping bool          // wants a pong
	sure bool          // a cancelled call waits for what the server says to that
	wake chan struct{} // of one element: something below has changed

	waiting   bool // may be made the reader
	receiving bool // the reader is filling rep
	done      bool // rep or err is filled; both may be read without the lock
	err       error
}

var callPool = sync.Pool{New: func() any { return &call{wake: make(chan struct{}, 1)} }}

func getCall(rep *op.Reply) *call {
	k := callPool.Get().(*call)
	*k = call{wake: k.wake, rep: rep}
	return k
}

func (k *call) free() {
	select {
	case <-k.wake:
	default:
	}
	k.rep, k.err = nil, nil
	callPool.Put(k)
}

// finish wakes the caller. Requires Conn.mu.
func (k *call) finish(err error) {
	k.done, k.err = true, err
	k.signal()
}

func (k *call) signal() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// Dial connects to the server at address ("unix": a path of any length; "tcp":
// host:port) and exchanges hellos. A server that does not answer is
// ErrUnavailable; one that refuses gives its own code and sentence; one of
// another cluster is ErrInvalid, one without a common protocol ErrVersion. ctx
// bounds dialling only, not the connection's life.
func Dial(ctx context.Context, network, address string, o Options) (*Conn, error) {
	o.setDefaults()
	if o.Peer && o.Cluster.IsZero() {
		return nil, fmt.Errorf("server at %s: a peer needs its cluster's id: %w", address, sealfs.ErrInvalid)
	}
	ctx, cancel := context.WithTimeout(ctx, o.HandshakeTimeout)
	defer cancel()
	var nc net.Conn
	var err error
	if network == "unix" {
		nc, err = DialUnix(ctx, address)
	} else {
		nc, err = new(net.Dialer).DialContext(ctx, network, address)
	}
	if err != nil {
		return nil, fmt.Errorf("server at %s: %w: %w", address, sealfs.ErrUnavailable, err)
	}
	nc = newRawSocket(nc)
	c := &Conn{nc: nc, addr: address, opts: o, calls: make(map[uint64]*call), done: make(chan struct{})}
	c.out.init(nc, &c.n)
	c.out.failed = c.writeFailed
	c.in = inbox{nc: nc, n: &c.n, buf: make([]byte, inboxSize)}
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	err = c.handshake()
	if !stop() && (err == nil || errors.Is(err, net.ErrClosed)) {
		err = fmt.Errorf("%w: no hello: %w", sealfs.ErrUnavailable, context.Cause(ctx))
	}
	if err != nil {
		nc.Close()
		if _, ok := errors.AsType[*refusal](err); ok {
			return nil, err // it names the server already
		}
		return nil, fmt.Errorf("server at %s: %w", address, err)
	}
	go c.keepAlive()
	return c, nil
}

// handshake sends our hello and judges the server's.
func (c *Conn) handshake() error {
	ours := hello{protocolMin, ProtocolVersion, featuresKnown, featureUmask, c.opts.Cluster, c.opts.Program}
	if c.opts.Peer {
		ours.required |= featurePeer
	}
	if _, err := c.out.add(header{typ: typeHello}, &ours, nil, nil, 0); err != nil {
		return err
	}
	c.out.flush(false)
	h, head, err := c.in.next()
	switch {
	case errors.Is(err, sealfs.ErrCorrupt) || errors.Is(err, sealfs.ErrInvalid):
		return fmt.Errorf("it does not speak SealFS's protocol: %w", err)
	case errors.Is(err, sealfs.ErrVersion):
		return err
	case err != nil:
		return fmt.Errorf("%w: no hello: %w", sealfs.ErrUnavailable, err)
	case h.typ == typeGoaway:
		r, err := parseRefusal(c.addr, head)
		if err != nil {
			return err
		}
		return r
	case h.typ != typeHello:
		return fmt.Errorf("%v instead of a hello: %w", h.typ, sealfs.ErrInvalid)
	}
	if c.theirs, err = parseHello(head); err != nil {
		return err
	}
	c.protocol, err = agree(&ours, &c.theirs)
	if err != nil {
		c.goAway(err)
	}
	return err
}

// goAway tells the server why the connection is given up.
func (c *Conn) goAway(err error) {
	_, _ = c.out.add(header{typ: typeGoaway}, refuse(err), nil, nil, 0)
	c.out.flush(false)
}

// refuse makes the head of a goaway or failed reply from an error.
func refuse(err error) *refusal {
	code, ok := errors.AsType[sealfs.Code](err)
	switch {
	case ok && code != 0:
	case errors.Is(err, context.Canceled):
		code = sealfs.ErrInterrupted
	case errors.Is(err, context.DeadlineExceeded):
		code = sealfs.ErrTimeout
	default:
		code = sealfs.ErrIO
	}
	return &refusal{code: code, text: err.Error()}
}

// Cluster returns the cluster that the server belongs to.
func (c *Conn) Cluster() sealfs.UUID { return c.theirs.cluster }

// Program returns the name and version of the server's program.
func (c *Conn) Program() string { return c.theirs.program }

// Protocol returns the protocol version that both sides speak.
func (c *Conn) Protocol() uint16 { return c.protocol }

// Stats returns what the connection did so far.
func (c *Conn) Stats() Stats { return c.n.stats() }

// Done returns a channel that is closed when the connection has failed or was
// closed. An idle connection notices its loss at the next keepalive only.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err returns why the connection is at its end, or nil.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the connection. Calls under way, and later ones, return ErrClosed.
func (c *Conn) Close() error {
	c.end(fmt.Errorf("connection to %s: %w", c.addr, sealfs.ErrClosed))
	return nil
}

// fail ends the connection as lost.
func (c *Conn) fail(cause error) {
	if _, ok := errors.AsType[*refusal](cause); ok {
		c.end(fmt.Errorf("%w: %w", sealfs.ErrUnavailable, cause))
	} else {
		c.end(fmt.Errorf("server at %s: %w: %w", c.addr, sealfs.ErrUnavailable, cause))
	}
}

// end makes err the connection's end, unless it has one, and every call's answer.
func (c *Conn) end(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	c.mu.Unlock()

	// The socket is closed before calls are answered: a reader or writer in the
	// middle of a call's buffers comes back from it then.
	c.nc.Close()
	c.out.stop(err)
	c.mu.Lock()
	for id, k := range c.calls {
		delete(c.calls, id)
		k.finish(err)
	}
	c.mu.Unlock()
	close(c.done)
}

// writeFailed is told that nothing can be sent any more. The server may have
// said why before it closed: the reader gets a moment to find out.
func (c *Conn) writeFailed(err error) {
	time.AfterFunc(time.Second, func() { c.fail(err) })
}

// Do sends the request and waits for its reply; see op.Handler. It returns
// ErrInterrupted, with the cause, when ctx is done first; if req has a payload
// that is just being written, it waits for that. A cancelled WaitLock returns
// what the server says: that it was interrupted, or that the lock was granted. If the payload of a Read's
// reply fits the room of rep.Data, it is read straight into it.
//
// A ctx of a type of its own should have a method AfterFunc (see package
// context), otherwise each call costs a goroutine.
func (c *Conn) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	var payload []byte
	room := uint64(payloadMax)
	switch req.Type {
	case op.Write:
		if payload = req.Data; len(payload) > payloadMax {
			return fmt.Errorf("write of %d bytes is longer than %d: %w", len(payload), payloadMax, sealfs.ErrInvalid)
		}
	case op.Read:
		room = min(room, req.Len)
	}
	k := getCall(rep)
	k.room = room
	// A lock that was granted just when its wait was cancelled must not be left
	// behind: only the server knows.
	k.sure = req.Type == op.WaitLock
	return c.do(ctx, k, header{typ: typeRequest}, req, payload)
}

// Busy returns how many callers are waiting for answers at this moment.
func (c *Conn) Busy() int { return int(c.busy.Load()) }

// Ping asks the server whether it lives.
func (c *Conn) Ping(ctx context.Context) error {
	k := getCall(nil)
	k.ping = true
	return c.do(ctx, k, header{typ: typePing}, nil, nil)
}

// do sends a frame and waits for what answers k, which it frees.
func (c *Conn) do(ctx context.Context, k *call, h header, head appender, payload []byte) error {
	if ctx.Err() != nil {
		k.free()
		return c.interrupted(ctx)
	}
	c.busy.Add(1)
	defer c.busy.Add(-1)
	c.mu.Lock()
	if c.err != nil {
		err := c.err
		c.mu.Unlock()
		k.free()
		return err
	}
	c.lastID++
	k.id = c.lastID
	c.calls[k.id] = k
	crowded := len(c.calls) > 1
	c.mu.Unlock()

	h.id = k.id
	sent, err := c.out.add(h, head, payload, nil, 0)
	if err != nil {
		c.mu.Lock()
		delete(c.calls, k.id) // nothing was sent, so that only end can have finished it
		c.mu.Unlock()
		k.free()
		return err
	}
	c.out.flush(crowded)
	if k.sure {
		stop := context.AfterFunc(ctx, func() { c.sendCancel(h.id) })
		err = c.await(context.Background(), k)
		if !stop() && errors.Is(err, sealfs.ErrInterrupted) {
			err = c.interrupted(ctx)
		}
	} else {
		err = c.await(ctx, k)
	}
	// Even an answered call must not return while its payload is in a write
	// that is under way: a broken server may answer early.
	c.out.released(sent)
	k.free()
	return err
}

func (c *Conn) interrupted(ctx context.Context) error {
	return fmt.Errorf("request to %s: %w: %w", c.addr, sealfs.ErrInterrupted, context.Cause(ctx))
}

// await waits until k is answered or, leaving a goroutine in k's place, until ctx
// is done.
func (c *Conn) await(ctx context.Context, k *call) error {
	cancelled := ctx.Done()
	c.mu.Lock()
	for !k.done {
		if c.reader == nil || c.reader == k {
			c.reader = k
			c.mu.Unlock()
			c.readFor(ctx, k)
			c.mu.Lock()
			c.passOn()
		} else {
			k.waiting = true
			c.mu.Unlock()
			c.sleep(k, cancelled)
			c.mu.Lock()
			k.waiting = false
		}
		if !k.done && !k.receiving && ctx.Err() != nil {
			if c.reader == k {
				c.passOn()
			}
			c.giveUp(k)
			c.mu.Unlock()
			return c.interrupted(ctx)
		}
		if k.receiving {
			cancelled = nil // the reader is at it: the answer is nearly here
		}
	}
	if c.reader == k {
		c.passOn() // made the reader while the answer came in
	}
	c.mu.Unlock()
	return k.err
}

// sleep waits until k is woken or cancelled is closed.
func (c *Conn) sleep(k *call, cancelled <-chan struct{}) {
	if cancelled == nil { // a plain receive is cheaper than a select
		<-k.wake
		c.n.wakeups.Add(1)
		return
	}
	select {
	case <-k.wake:
		c.n.wakeups.Add(1)
	case <-cancelled:
	}
}

// passOn gives the role of reader to a caller that waits, or to nobody: then the
// next one that waits takes it. Requires mu.
func (c *Conn) passOn() {
	c.reader = nil
	for _, k := range c.calls {
		if k.waiting {
			c.reader = k
			c.n.handoffs.Add(1)
			k.signal()
			return
		}
	}
}

// giveUp leaves a goroutine to wait in place of k, whose caller returns. Requires mu.
func (c *Conn) giveUp(k *call) {
	orphan := getCall(&op.Reply{})
	orphan.id, orphan.room, orphan.ping = k.id, k.room, k.ping
	c.calls[k.id] = orphan
	go func() {
		if !orphan.ping {
			c.sendCancel(orphan.id)
		}
		_ = c.await(context.Background(), orphan) // whatever it was, nobody asks any more
		orphan.free()
	}()
}

// sendCancel tells the server that nobody waits for request id any more.
func (c *Conn) sendCancel(id uint64) {
	_, _ = c.out.add(header{typ: typeCancel, id: id}, nil, nil, nil, 0)
	c.out.flush(false)
}

// readFor is the role of reader: it reads and gives out replies until k's has
// come, ctx is done or the connection ends.
func (c *Conn) readFor(ctx context.Context, k *call) {
	if ctx.Done() != nil {
		// A deadline in the past interrupts the wait for a frame. One that comes
		// too late for k is lifted by whoever reads then.
		stop := context.AfterFunc(ctx, func() { _ = c.nc.SetReadDeadline(time.Unix(1, 0)) })
		defer stop()
	}
	for mine := false; !mine || c.in.ready(); {
		h, head, err := c.in.next()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = c.nc.SetReadDeadline(time.Time{})
			if err == nil && ctx.Err() == nil {
				continue
			}
		} else if err == nil {
			var got *call
			if got, err = c.take(&h, head); err == nil && got == k {
				mine = true
			}
		}
		if err != nil {
			c.fail(err)
			c.abort(k)
			return
		}
		if !mine && ctx.Err() != nil {
			return
		}
	}
}

// abort makes the connection's end the answer of k. The reader does so for itself
// and for the call that it was receiving, which nobody else can finish.
func (c *Conn) abort(k *call) {
	c.mu.Lock()
	if !k.done {
		delete(c.calls, k.id)
		k.finish(c.err)
	}
	c.mu.Unlock()
}

// take acts on a frame from the server. It returns the call that was answered, if one was.
func (c *Conn) take(h *header, head []byte) (*call, error) {
	switch h.typ {
	case typeReply:
	case typePong:
		if h.id == 0 {
			return nil, nil
		}
	case typeGoaway:
		r, err := parseRefusal(c.addr, head)
		if err != nil {
			return nil, err
		}
		return nil, r
	default:
		return nil, fmt.Errorf("%v from a server: %w", h.typ, sealfs.ErrInvalid)
	}

	c.mu.Lock()
	k := c.calls[h.id]
	if k == nil || k.ping != (h.typ == typePong) {
		err := c.err // after the end nobody waits for anything
		c.mu.Unlock()
		return nil, cmp.Or(err, fmt.Errorf("%v %d was not asked for: %w", h.typ, h.id, sealfs.ErrInvalid))
	}
	delete(c.calls, h.id)
	k.receiving = true
	c.mu.Unlock()

	answer, err := c.receive(h, head, k)
	if err != nil {
		c.fail(err)
		c.abort(k)
		return nil, err
	}
	c.mu.Lock()
	k.finish(answer)
	c.mu.Unlock()
	return k, nil
}

// receive fills the reply of k, or returns the failure that the server answers
// with. err is the end of the connection.
func (c *Conn) receive(h *header, head []byte, k *call) (failure, err error) {
	if k.ping {
		return nil, nil
	}
	if h.flags&flagFailed != 0 {
		if h.payloadLen != 0 {
			return nil, fmt.Errorf("failed reply with a payload: %w", sealfs.ErrInvalid)
		}
		r, err := parseRefusal(c.addr, head)
		if err != nil {
			return nil, err
		}
		return r, nil
	}
	if uint64(h.payloadLen) > k.room {
		return nil, fmt.Errorf("reply has %d bytes of data, at most %d were asked for: %w", h.payloadLen, k.room, sealfs.ErrInvalid)
	}
	if err := op.DecodeReply(k.rep, head); err != nil {
		return nil, err
	}
	if n := int(h.payloadLen); n > 0 {
		have := len(k.rep.Data)
		data := slices.Grow(k.rep.Data, n)[:have+n]
		if err := c.in.payload(h, data[have:]); err != nil {
			return nil, err
		}
		k.rep.Data = data
	}
	return nil, nil
}

// keepAlive asks a silent server for a sign of life and gives up a dead one.
func (c *Conn) keepAlive() {
	tick := time.NewTicker(max(min(c.opts.Keepalive, c.opts.Timeout)/2, time.Millisecond))
	defer tick.Stop()
	var w watch
	var answered chan struct{} // closed when the ping under way is; nil if there is none
	var asked time.Time
	for {
		var now time.Time
		select {
		case <-c.done:
			return
		case now = <-tick.C:
		}
		silent, stuck := w.look(now, c.n.bytesIn.Load(), &c.out)
		select {
		case <-answered:
			answered = nil
		default:
		}
		switch {
		case stuck >= c.opts.Timeout:
			c.fail(fmt.Errorf("it has read nothing for %v", stuck.Round(time.Millisecond)))
		case answered == nil && silent >= c.opts.Keepalive:
			asked, answered = now, make(chan struct{})
			go func(answered chan struct{}) {
				defer close(answered)
				_ = c.Ping(context.Background()) // its failure is the connection's
			}(answered)
		case answered != nil && min(silent, now.Sub(asked)) >= c.opts.Timeout:
			c.fail(fmt.Errorf("it has said nothing for %v", silent.Round(time.Millisecond)))
		}
	}
}
