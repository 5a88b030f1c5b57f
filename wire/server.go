package wire

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/op"
)

// ServerOptions says how a server end behaves. The zero value of each field
// but Cluster means its default.
type ServerOptions struct {
	// Cluster is the cluster that the server belongs to; clients of another one are refused.
	Cluster sealfs.UUID
	// Program is the name and version of this program, told to clients. Default "sealfs".
	Program string
	// Peer answers the requests of other servers of the cluster, which get memory
	// of their own (another MaxInflightBytes), so that clients cannot hold them
	// up. nil refuses such connections.
	Peer op.Handler
	// MaxConns bounds the connections; further ones are refused with ErrBusy. Default 4096.
	MaxConns int
	// MaxInflightPerConn bounds the requests of one connection whose reply is
	// not yet sent, but for those that wait for a lock, and Watches; no more are read then. Default 512.
	MaxInflightPerConn int
	// MaxWaitersPerConn bounds the WaitLocks and Watches of one connection; further ones
	// are answered ErrNoLocks. They are apart from the others, because the request
	// that ends their wait must still get through. Default 1024.
	MaxWaitersPerConn int
	// MaxInflightBytes bounds the memory of all clients' requests and replies under way;
	// no more requests are read then. Default 256 MiB.
	MaxInflightBytes int64
	// HandshakeTimeout bounds the exchange of hellos. Default 10 s.
	HandshakeTimeout time.Duration
	// Timeout is the time without a frame from the client, or without progress of
	// a write to it, after which it is given up. Clients ask for signs of life
	// more often than that. Default 60 s.
	Timeout time.Duration
	// Grace is how long requests under way may take to finish at shutdown
	// before their context is cancelled. Default 5 s.
	Grace time.Duration
	// Log hears of refused and failed connections. Default: nobody does.
	Log *slog.Logger
}

func (o *ServerOptions) setDefaults() {
	o.Program = cmp.Or(o.Program, "sealfs")
	o.MaxConns = cmp.Or(o.MaxConns, 4096)
	o.MaxInflightPerConn = cmp.Or(o.MaxInflightPerConn, 512)
	o.MaxWaitersPerConn = cmp.Or(o.MaxWaitersPerConn, 1024)
	o.MaxInflightBytes = cmp.Or(o.MaxInflightBytes, 256<<20)
	o.HandshakeTimeout = cmp.Or(o.HandshakeTimeout, 10*time.Second)
	o.Timeout = cmp.Or(o.Timeout, 60*time.Second)
	o.Grace = cmp.Or(o.Grace, 5*time.Second)
	o.Log = cmp.Or(o.Log, slog.New(slog.DiscardHandler))
}

const (
	// inlineMax is how long, up to twice, a request may run on the reader's
	// goroutine before another one reads on: well above what a request costs that
	// finds all in memory, well below what a person or a time-out would notice. While there are
	// requests, each such time costs a thread being woken.
	inlineMax = 5 * time.Millisecond
	// pauseTick is how often a server that cannot read on says that it lives.
	pauseTick = time.Second
	// lingerMax is how long a refused or dismissed client may take to hang up;
	// to close a socket with unread input would take the goaway from it.
	lingerMax = 250 * time.Millisecond
	// refusersMax bounds the connections beyond MaxConns that are told why they are refused.
	refusersMax = 16
)

var errShutdown = fmt.Errorf("the server shuts down: %w", sealfs.ErrUnavailable)

// A Server calls a handler for the requests of its clients. Its limits hold for
// all listeners together.
type Server struct {
	handler op.Handler
	opts    ServerOptions
	memory  budget // of clients
	peers   budget // of peers
	lookout lookout

	mu       sync.Mutex
	conns    map[*serverConn]struct{}
	refusers int
	past     Stats // of connections that have ended
}

// NewServer returns a server for h. The context that h gets is cancelled when
// the client is gone, for WaitLock and Sync also when the client gives up; h
// must heed it. Everything that h gets is the server's again when it returns.
func NewServer(h op.Handler, o ServerOptions) *Server {
	o.setDefaults()
	s := &Server{handler: h, opts: o, conns: make(map[*serverConn]struct{})}
	s.memory.free, s.peers.free = o.MaxInflightBytes, o.MaxInflightBytes
	return s
}

// Serve is NewServer(h, o).Serve(ctx, l).
func Serve(ctx context.Context, l net.Listener, h op.Handler, o ServerOptions) error {
	return NewServer(h, o).Serve(ctx, l)
}

// Stats returns what all connections did so far, including those that have ended.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	sum := s.past
	for c := range s.conns {
		sum.Add(c.n.stats())
	}
	return sum
}

// Serve accepts connections from l until ctx is done; then it closes l, lets
// requests under way finish within Grace, dismisses its clients and returns nil.
// It returns an error when l fails. Several calls may run at once, with a listener each.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	if s.opts.Cluster.IsZero() {
		l.Close()
		return fmt.Errorf("a server needs its cluster's id: %w", sealfs.ErrInvalid)
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	g := &group{conns: make(map[*serverConn]struct{})}
	watchDone := make(chan struct{})
	go func() {
		defer close(watchDone)
		s.watch(g)
	}()

	err := s.accept(ctx, l, g)
	cancel()
	stop()
	l.Close()
	g.each((*serverConn).dismiss)
	force := time.AfterFunc(s.opts.Grace, func() { g.each((*serverConn).kill) })
	g.wait()
	force.Stop()
	<-watchDone
	return err
}

// accept starts a goroutine for each connection until ctx is done or l fails.
func (s *Server) accept(ctx context.Context, l net.Listener, g *group) error {
	delay := time.Duration(0)
	for {
		nc, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				nc.Close()
			}
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accept at %v: %w", l.Addr(), err)
			}
			// Typically the process has no more file descriptors: others must
			// close theirs first.
			delay = min(max(2*delay, 5*time.Millisecond), time.Second)
			s.opts.Log.Warn("cannot accept a connection", "at", l.Addr().String(), "error", err)
			select {
			case <-time.After(delay):
			case <-ctx.Done():
			}
			continue
		}
		delay = 0
		var c *serverConn
		s.mu.Lock()
		full := len(s.conns) >= s.opts.MaxConns
		switch {
		case !full:
			c = s.newConn(ctx, nc, g)
			s.conns[c] = struct{}{}
		case s.refusers < refusersMax:
			c = s.newConn(ctx, nc, g)
			s.refusers++
		}
		s.mu.Unlock()
		if c == nil {
			nc.Close()
			continue
		}
		g.add(c)
		if full {
			go c.turnAway()
		} else {
			go c.start()
		}
	}
}

// watch gives up the group's clients that are silent or do not read.
func (s *Server) watch(g *group) {
	tick := time.NewTicker(max(min(s.opts.Timeout/4, time.Second), time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-g.ended():
			return
		case now := <-tick.C:
			g.each(func(c *serverConn) {
				silent, stuck := c.watch.look(now, c.n.framesIn.Load()+c.pauses.Load(), &c.out)
				if silent >= s.opts.Timeout || stuck >= s.opts.Timeout {
					s.opts.Log.Warn("client is given up", "client", c.peer, "silent", silent, "not reading", stuck)
					c.kill()
				}
			})
		}
	}
}

// group is the set of connections of one Serve.
type group struct {
	mu     sync.Mutex
	conns  map[*serverConn]struct{}
	wg     sync.WaitGroup
	closed chan struct{}
}

func (g *group) add(c *serverConn) {
	g.wg.Add(1)
	g.mu.Lock()
	g.conns[c] = struct{}{}
	g.mu.Unlock()
}

func (g *group) remove(c *serverConn) {
	g.mu.Lock()
	delete(g.conns, c)
	g.mu.Unlock()
	g.wg.Done()
}

// each calls f, which must not block, for all connections.
func (g *group) each(f func(*serverConn)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for c := range g.conns {
		f(c)
	}
}

// wait waits until all connections are gone; none may be added any more.
func (g *group) wait() {
	g.wg.Wait()
	close(g.ended())
}

// ended returns a channel that is closed when the group is gone.
func (g *group) ended() chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed == nil {
		g.closed = make(chan struct{})
	}
	return g.closed
}

// serverConn is the server end of a connection.
//
// One goroutine has the role of reader. It decodes requests and runs most of
// them itself; their replies gather in the outbox until no whole request is left in
// the inbox. A request runs on a goroutine of its own if its type waits by
// nature, or if it may wait for a device and others are under way.
// Whatever runs on the reader's goroutine for long (see inlineMax) loses it the
// role: the lookout starts another reader. So no handler can block a connection.
//
// Goroutines are bounded by MaxInflightPerConn + MaxWaitersPerConn + 1.
type serverConn struct {
	s       *Server
	g       *group
	nc      net.Conn
	peer    string     // its address
	handler op.Handler // for clients or for peers, since the hello
	memory  *budget    // likewise
	n       counters
	in      inbox // of the reader
	out     outbox
	watch   watch // of Server.watch
	pauses  atomic.Uint64
	ctx     context.Context // of handlers
	cancel  context.CancelFunc

	closing atomic.Bool   // the server shuts down
	turn    atomic.Uint64 // odd: the reader runs a request; who makes it even has the role
	watched atomic.Bool   // the lookout has it; changes under lookout.mu
	seen    uint64        // turn when the lookout looked last; of the lookout

	open    atomic.Int64 // requests read, but for waiters, and other frames, that are not yet sent
	stalled atomic.Bool  // the reader waits for open to fall
	fell    chan struct{}

	mu      sync.Mutex
	changed sync.Cond
	running int                    // handlers that are not the reader's
	cancels map[uint64]cancellable // by id
	waiters int                    // WaitLocks and Watches
}

// cancellable is a request that the client may cancel.
type cancellable struct {
	stop  context.CancelCauseFunc
	waits bool // one of the waiters, which nothing but its cancelling may ever end
}

func (s *Server) newConn(ctx context.Context, nc net.Conn, g *group) *serverConn {
	nc = newRawSocket(nc)
	c := &serverConn{s: s, g: g, nc: nc, peer: "unix", handler: s.handler, memory: &s.memory,
		fell: make(chan struct{}, 1), cancels: make(map[uint64]cancellable)}
	if a := nc.RemoteAddr(); a != nil && a.String() != "" {
		c.peer = a.String()
	}
	// Shutdown leaves handlers their grace: their context is not ctx's child.
	c.ctx, c.cancel = context.WithCancel(context.WithoutCancel(ctx))
	c.changed.L = &c.mu
	c.in = inbox{nc: nc, n: &c.n, buf: make([]byte, inboxSize)}
	c.out.init(nc, &c.n)
	c.out.wrote = c.wrote
	c.out.failed = func(error) { nc.Close() }
	return c
}

// dismiss lets the connection end when its requests under way are answered.
func (c *serverConn) dismiss() {
	c.closing.Store(true)
	_ = c.nc.SetReadDeadline(time.Unix(1, 0)) // if it fails, the reader notices as well
}

// kill ends the connection at once. It is closed first: that its handlers get
// cancelled is no answer for the client.
func (c *serverConn) kill() {
	c.nc.Close()
	c.cancel()
}

// greet reads the client's hello and judges it; refused is what the client is
// told instead of our hello.
func (c *serverConn) greet(timeout time.Duration, refused error) error {
	if err := c.nc.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if c.closing.Load() { // whose deadline was overwritten just now
		return errShutdown
	}
	h, head, err := c.in.next()
	if err != nil {
		return err
	}
	if h.typ != typeHello {
		return fmt.Errorf("%v instead of a hello: %w", h.typ, sealfs.ErrInvalid)
	}
	theirs, err := parseHello(head)
	if err != nil {
		return err
	}
	ours := hello{protocolMin, ProtocolVersion, featuresKnown, 0, c.s.opts.Cluster, c.s.opts.Program}
	if _, err := agree(&ours, &theirs); err != nil {
		return err
	}
	if theirs.required&featurePeer != 0 {
		if err := c.greetPeer(&theirs); err != nil {
			return err
		}
	}
	if c.s.opts.Peer == nil {
		ours.supported &^= featurePeer
	}
	if refused != nil {
		return refused
	}
	c.send(header{typ: typeHello}, &ours)
	c.out.flush(false)
	return c.nc.SetDeadline(time.Time{})
}

// greetPeer makes the connection that of a peer, or says why it may not be one.
func (c *serverConn) greetPeer(theirs *hello) error {
	if theirs.cluster.IsZero() {
		return fmt.Errorf("another server (%q) must name its cluster: %w", theirs.program, sealfs.ErrInvalid)
	}
	if c.s.opts.Peer == nil {
		return fmt.Errorf("other servers (%q) may not call here: %w", theirs.program, sealfs.ErrPerm)
	}
	c.handler, c.memory = c.s.opts.Peer, &c.s.peers
	return nil
}

// turnAway tells a client beyond MaxConns why it is refused.
func (c *serverConn) turnAway() {
	defer func() {
		c.s.mu.Lock()
		c.s.refusers--
		c.s.mu.Unlock()
	}()
	c.finish(c.greet(min(time.Second, c.s.opts.HandshakeTimeout), fmt.Errorf("the server has its %d connections: %w", c.s.opts.MaxConns, sealfs.ErrBusy)))
}

// start is the life of a connection up to its first request.
func (c *serverConn) start() {
	if err := c.greet(c.s.opts.HandshakeTimeout, nil); err != nil {
		c.finish(err)
		return
	}
	c.read()
}

// read is the role of reader. It returns when the role went to another
// goroutine or the connection has ended.
func (c *serverConn) read() {
	for {
		if c.closing.Load() {
			c.finish(errShutdown)
			return
		}
		if !c.in.ready() {
			c.out.flush(false)
		}
		h, head, err := c.in.next()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			if err = c.nc.SetReadDeadline(time.Time{}); err == nil {
				continue // closing, or a late deadline of the handshake
			}
		}
		if err != nil {
			c.finish(err)
			return
		}
		keep := true
		switch h.typ {
		case typeRequest:
			keep, err = c.request(&h, head)
		case typeCancel:
			c.mu.Lock()
			if k, ok := c.cancels[h.id]; ok {
				k.stop(nil)
			}
			c.mu.Unlock()
		case typePing:
			if err = c.admit(0); err == nil {
				c.open.Add(-1) // send counts it
				c.send(header{typ: typePong, id: h.id}, nil)
			}
		case typeGoaway:
			err = io.EOF
			if r, _ := parseRefusal(c.peer, head); r != nil {
				err = r
			}
		default:
			err = fmt.Errorf("%v from a client: %w", h.typ, sealfs.ErrInvalid)
		}
		if err != nil {
			c.finish(err)
			return
		}
		if !keep {
			return
		}
	}
}

// A task is a request being run.
type task struct {
	id      uint64
	req     op.Request
	rep     op.Reply
	data    []byte  // room for req.Data when that is not a payload
	payload *buffer // holds req.Data of a Write
	charge  int64
}

var taskPool = sync.Pool{New: func() any { return new(task) }}

// entriesKept is the largest room for directory entries that a task keeps.
const entriesKept = 256

func (t *task) free() {
	t.req = op.Request{}
	t.payload, t.charge = nil, 0
	if cap(t.rep.Entries) > entriesKept {
		t.rep.Entries = nil
	}
	clear(t.rep.Entries)
	t.rep.Reset()
	if cap(t.data) > sealfs.BlockSize {
		t.data = nil
	}
	taskPool.Put(t)
}

// charge returns what a request may hold of the server's memory, in bytes: its
// own data and its reply's.
func charge(r *op.Request, payload uint32) int64 {
	const small = 1 << 10
	n := small + int64(payload) + int64(len(r.Data))
	switch r.Type {
	case op.Read, op.Open:
		n += int64(min(r.Len, sealfs.IOMax))
	case op.Readdir: // entries are larger as structs than when encoded
		n += 4 * int64(min(r.Len, sealfs.IOMax))
	case op.Getxattr, op.Listxattr:
		n += sealfs.XattrValueMax
	}
	return n
}

// request reads a request whole and runs it, here or elsewhere. It reports
// whether this goroutine is still the reader.
func (c *serverConn) request(h *header, head []byte) (reader bool, err error) {
	t := taskPool.Get().(*task)
	t.id = h.id
	bad := op.DecodeRequest(&t.req, head)
	if bad == nil && h.payloadLen > 0 && t.req.Type != op.Write {
		err := fmt.Errorf("%v request with a payload: %w", t.req.Type, sealfs.ErrInvalid)
		t.free()
		return false, err
	}
	if len(t.req.Data) > 0 { // it stands in the inbox, which another reader may use soon
		t.data = append(t.data[:0], t.req.Data...)
		t.req.Data = t.data
	}
	waits := bad == nil && waits(t.req.Type)
	if !waits {
		t.charge = min(charge(&t.req, h.payloadLen), c.s.opts.MaxInflightBytes)
		if err := c.admit(t.charge); err != nil {
			t.free()
			return false, err
		}
	}
	if bad != nil {
		err := c.in.discard(int(h.payloadLen))
		c.answer(t, nil, bad)
		return true, err
	}
	if h.payloadLen > 0 {
		t.payload = getBuffer(int(h.payloadLen))
		t.req.Data = t.payload.b[:h.payloadLen]
		if err := c.in.payload(h, t.req.Data); err != nil {
			c.answer(t, nil, err) // nobody will read it, but it settles what t holds
			return false, err
		}
	}

	switch t.req.Type {
	case op.WaitLock, op.Watch, op.Sync:
		return true, c.runCancellable(t)
	case op.Read, op.Write, op.Fallocate, op.Reclaim, op.DropSession, op.DropVolume, op.Purge,
		op.Prepare, op.Mkdir, op.Rmdir, op.Rename, op.Link, op.Register, op.Partition, op.Join:
		// These may wait for a device, or for other servers.
		if c.in.w > c.in.r || c.open.Load() > 1 {
			c.spawn(func() { c.run(c.ctx, t) })
			return true, nil
		}
	}
	return c.runInline(t), nil
}

// admit waits until the connection and the server may take one more request,
// which then counts as open and holds n bytes.
func (c *serverConn) admit(n int64) error {
	limit := int64(c.s.opts.MaxInflightPerConn)
	if c.open.Load() >= limit {
		c.out.flush(false) // replies held back for their batch count, too
		c.stalled.Store(true)
		for c.open.Load() >= limit {
			if err := c.pause(c.fell); err != nil {
				return err
			}
		}
		c.stalled.Store(false)
	}
	if granted := c.memory.take(n); granted != nil {
		c.out.flush(false)
		if err := c.pause(granted); err != nil {
			c.memory.leave(granted, n)
			return err
		}
	}
	c.open.Add(1)
	return nil
}

// pause waits for ch and meanwhile tells the client now and then that we live.
func (c *serverConn) pause(ch <-chan struct{}) error {
	tick := time.NewTicker(pauseTick)
	defer tick.Stop()
	for {
		select {
		case <-ch:
			return nil
		case <-c.ctx.Done():
			return context.Cause(c.ctx)
		case <-tick.C:
			c.pauses.Add(1)
			c.send(header{typ: typePong}, nil)
			c.out.flush(false)
		}
	}
}

// wrote is told by the outbox that frames were sent or dropped.
func (c *serverConn) wrote(frames int, charge int64) {
	c.open.Add(int64(-frames))
	if c.stalled.Load() {
		select {
		case c.fell <- struct{}{}:
		default:
		}
	}
	c.memory.give(charge)
}

// send queues a frame that no task accounts for. Its head is never too long.
func (c *serverConn) send(h header, head appender) {
	c.open.Add(1)
	_, _ = c.out.add(h, head, nil, nil, 0)
}

// runInline runs t on the reader's goroutine and reports whether that is the
// reader still. Its reply is left for the reader to send.
func (c *serverConn) runInline(t *task) bool {
	turn := c.turn.Add(1)
	if !c.watched.Load() {
		c.s.lookout.add(c)
	}
	c.run(c.ctx, t)
	if c.turn.CompareAndSwap(turn, turn+1) {
		return true
	}
	c.out.flush(false)
	c.leave()
	return false
}

// lookout finds the requests that keep a reader for long, and has another
// goroutine read on. It looks at the connections of a server that have had requests
// lately, all at once: a timer for each request, or for each connection, would cost
// more than most requests do, since every one wakes a thread.
type lookout struct {
	mu    sync.Mutex
	conns []*serverConn
	timer *time.Timer // set while there are any
}

// add has the connection looked at until it has no requests.
func (l *lookout) add(c *serverConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.watched.Load() {
		return
	}
	c.watched.Store(true)
	c.seen = c.turn.Load()
	l.conns = append(l.conns, c)
	if len(l.conns) > 1 {
		return
	}
	if l.timer == nil {
		l.timer = time.AfterFunc(inlineMax, l.look)
	} else {
		l.timer.Reset(inlineMax)
	}
}

// look is the timer's function.
func (l *lookout) look() {
	l.mu.Lock()
	defer l.mu.Unlock()
	kept := l.conns[:0]
	for _, c := range l.conns {
		if c.look() {
			kept = append(kept, c)
		}
	}
	clear(l.conns[len(kept):])
	if l.conns = kept; len(kept) > 0 {
		l.timer.Reset(inlineMax)
	}
}

// look starts another reader if the reader has been running the same request since
// the last look. It reports whether it wants to be looked at again. Requires lookout.mu.
func (c *serverConn) look() bool {
	turn := c.turn.Load()
	if turn != c.seen {
		c.seen = turn
		return true
	}
	c.watched.Store(false)
	if turn%2 == 1 && c.turn.CompareAndSwap(turn, turn+1) {
		go c.takeOver()
		return false
	}
	// Nothing runs, or not for long. What began before watched was cleared has not
	// asked to be looked at.
	if c.seen = c.turn.Load(); c.seen%2 == 1 {
		c.watched.Store(true)
	}
	return c.watched.Load()
}

// takeOver makes its goroutine the reader after a look.
func (c *serverConn) takeOver() {
	// The other one may leave before it is counted here. That shows nowhere:
	// only the reader waits for running to be 0, and that is us now.
	c.mu.Lock()
	c.running++
	c.mu.Unlock()
	c.n.handoffs.Add(1)
	c.n.wakeups.Add(1)
	c.read()
}

// spawn runs f, a request, on a goroutine of its own, which sends the reply.
func (c *serverConn) spawn(f func()) {
	c.mu.Lock()
	c.running++
	c.mu.Unlock()
	c.n.wakeups.Add(1)
	go func() {
		f()
		c.out.flush(c.open.Load() > 1)
		c.leave()
	}()
}

// leave notes that a goroutine which is not the reader's has ended its request.
func (c *serverConn) leave() {
	c.mu.Lock()
	c.running--
	c.changed.Broadcast()
	c.mu.Unlock()
}

// waits reports whether requests of type t wait for what other clients do. A Watch
// also tells what its sender has done, for which other requests of the connection may wait.
func waits(t op.Type) bool { return t == op.WaitLock || t == op.Watch }

// runCancellable runs t, which may wait for long, until the client says cancel.
func (c *serverConn) runCancellable(t *task) error {
	id, waits := t.id, waits(t.req.Type)
	c.mu.Lock()
	if _, ok := c.cancels[id]; ok {
		c.mu.Unlock()
		c.open.Add(bit(waits))
		err := fmt.Errorf("request %d is under way already: %w", id, sealfs.ErrInvalid)
		c.answer(t, nil, err)
		return err
	}
	if waits && c.waiters >= c.s.opts.MaxWaitersPerConn {
		c.mu.Unlock()
		if err := c.admit(0); err != nil { // as an answer like any other
			t.free()
			return err
		}
		t.rep.Code = sealfs.ErrNoLocks
		c.answer(t, nil, nil)
		return nil
	}
	c.waiters += int(bit(waits))
	ctx, cancel := context.WithCancelCause(c.ctx)
	c.cancels[id] = cancellable{cancel, waits}
	c.mu.Unlock()
	c.spawn(func() {
		err := c.handler.Do(ctx, &t.req, &t.rep)
		if err != nil && context.Cause(ctx) == errShutdown {
			err = errShutdown // nobody has interrupted the client
		}
		cancel(nil)
		c.mu.Lock()
		delete(c.cancels, id)
		c.waiters -= int(bit(waits))
		c.mu.Unlock()
		c.open.Add(bit(waits))
		c.answer(t, nil, err)
	})
	return nil
}

func bit(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// run calls the handler for t and queues the reply.
func (c *serverConn) run(ctx context.Context, t *task) {
	var room *buffer
	if t.req.Type == op.Read {
		room = getBuffer(int(min(t.req.Len, sealfs.IOMax)))
		t.rep.Data = room.b[:0]
	}
	err := c.handler.Do(ctx, &t.req, &t.rep)
	c.answer(t, room, err)
}

// answer queues the reply of t, or err as its failure, and frees t. room is
// where the reply's data stands, to be freed once sent; nil if it is nobody's.
func (c *serverConn) answer(t *task, room *buffer, err error) {
	h := header{typ: typeReply, id: t.id}
	data := t.rep.Data
	if err == nil && len(data) > payloadMax {
		err = fmt.Errorf("reply has %d bytes of data: %w", len(data), sealfs.ErrRange)
	}
	if err == nil {
		if _, long := c.out.add(h, &t.rep, data, room, t.charge); long != nil {
			err = fmt.Errorf("%w: %w", sealfs.ErrRange, long)
		}
	}
	if err != nil {
		h.flags = flagFailed
		_, _ = c.out.add(h, refuse(err), nil, room, t.charge)
	}
	if room != nil || len(data) > copyMax {
		t.rep.Data = nil // the outbox has it
	}
	t.payload.free()
	t.free()
}

// finish ends the connection: it stops or waits for what is under way, tells
// the client why, unless it is the one that left, and closes. Only the reader calls it.
func (c *serverConn) finish(cause error) {
	_, gone := errors.AsType[net.Error](cause)
	_, dismissed := errors.AsType[*refusal](cause)
	gone = gone || dismissed || errors.Is(cause, io.EOF) || errors.Is(cause, io.ErrUnexpectedEOF) ||
		errors.Is(cause, net.ErrClosed) || c.ctx.Err() != nil
	switch {
	case gone:
		c.s.opts.Log.Debug("client is gone", "client", c.peer, "reason", cause)
		c.kill()
	case errors.Is(cause, errShutdown):
		c.mu.Lock()
		for _, k := range c.cancels {
			if k.waits {
				k.stop(errShutdown)
			}
		}
		c.mu.Unlock()
	default:
		c.s.opts.Log.Warn("client is refused", "client", c.peer, "reason", cause)
		c.cancel()
	}
	c.mu.Lock()
	for c.running > 0 {
		c.changed.Wait()
	}
	c.mu.Unlock()
	if !gone {
		c.send(header{typ: typeGoaway}, refuse(cause))
		c.out.flush(false)
		c.out.drain()
		c.linger()
	}
	c.kill()
	c.out.stop(net.ErrClosed)
	c.out.drain()

	c.s.mu.Lock()
	if _, ok := c.s.conns[c]; ok {
		delete(c.s.conns, c)
		c.s.past.Add(c.n.stats())
	}
	c.s.mu.Unlock()
	c.g.remove(c)
}

// linger gives the client a moment to read the goaway and hang up.
func (c *serverConn) linger() {
	if w, ok := c.nc.(interface{ CloseWrite() error }); !ok || w.CloseWrite() != nil {
		return
	}
	if c.nc.SetReadDeadline(time.Now().Add(lingerMax)) == nil {
		_, _ = io.CopyN(io.Discard, c.nc, payloadMax)
	}
}
