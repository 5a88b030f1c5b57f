// Package client is the client side of SealFS: a Go library and a FUSE mount
// over any op.Handler, be it a server in the same process, a transport to one
// elsewhere, or a router to many.
//
// Client works on inode numbers, as the kernel does. FS puts paths and files in the manner of
// package os on top of it, and Mount puts it below the kernel's VFS.
//
// # Writes
//
// Small writes to a file are collected per inode and sent at 128 KiB, at flush, fsync,
// the last release and unlock, after a second, or when anybody on this
// client looks at the inode. So everybody on one client sees every write at once.
// What a killed client had not sent is lost; Options.Durable sends every write before it is answered.
//
// # Leases
//
// Clients with a session never disagree: what one has done, another one sees in every
// call that begins later. A client keeps of a server's answers only what the server has
// given it a lease for, and gives it back when asked to: see lease.go, watch.go, and
// for the kernel's caches notify.go. Writes are delayed only under a lease, too;
// without one each is sent before it is answered. A client without a session delays in any
// case, and other clients see its writes at the latest when the file is closed.
//
// # Servers that are away
//
// A client with a session waits for a server that does not answer, for ever or
// for Options.Retry. Every wait ends with its context: the caller hears
// sealfs.ErrInterrupted, and does not know whether a change happened; delayed
// writes, though, are sent on in the background, each of them once. Work on files of
// other servers goes on.
//
// # Large files
//
// The first sealfs.HomeBytes of a file lie with its inode. Beyond, a file is
// either whole in its home shard as well, or has chunks in shards of their own:
// op.Attr.Bound tells. See chunk.go.
//
// # Locks
//
// A node's gate (the buffer of one inode) is taken before the locks of the node table, of
// the list of dirty nodes and of what is known of a node's layout; while it is held the handler may be called, so that
// writes to one inode keep their order. Nothing else is held across a request.
package client

import (
	"context"
	"hash/maphash"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/op"
)

// Options of a Client.
type Options struct {
	Volume sealfs.Volume // the volume that is worked on
	Root   sealfs.Ino    // its root directory, or any directory that shall be the root here
	Shards uint32        // of the cluster, a power of two

	// Session is the client's identity at the cluster: under it changes are
	// numbered, so that a retry happens once, and leases are held, so that clients never
	// disagree. 0 is a client without either, which suits a handler in the same
	// process that nobody else uses. See Fence for what follows it.
	Session sealfs.Session

	// Local says that the handler is in the same process: its answers cannot get
	// lost, and it is never away. Changes need no numbers then.
	Local bool

	// Retry is for how long a request without an answer is tried again (only with
	// a session); then it fails with an error that wraps sealfs.ErrIO. 0: for ever.
	Retry time.Duration

	// Chunked lets files that grow beyond sealfs.HomeBytes have chunks in other
	// shards. Files that have chunks are read and written in any case.
	Chunked bool

	// Each calls the function for one shard of each store there is, not at the same
	// time, and returns the first error. nil: there is one store.
	Each func(ctx context.Context, fn func(sealfs.Shard) error) error

	// Quota answers what the volume may take, 0 for no limit. nil: no limits.
	Quota func() (bytes, inodes uint64)

	// Epoch answers the epoch of a shard as the newest cluster map has it. nil: always 0.
	Epoch func(sealfs.Shard) sealfs.Epoch

	// Durable sends every write before it is answered (--durability=sync); the
	// server's own option of that name makes answers survive a power cut.
	Durable bool

	// BufferBytes bounds what all delayed writes take together (64 MiB when 0).
	BufferBytes int64

	// Logger hears of failed writes that nobody is left to be told of. nil: nobody.
	Logger *slog.Logger
}

// Cred is on whose behalf something is made: the owner of new inodes, and the
// umask, which the server applies unless the directory has a default ACL. A Client
// checks no permissions; the kernel does for a mount.
type Cred struct{ UID, GID, Umask uint32 }

// Client speaks to a handler in terms of inodes. It is safe for concurrent use.
type Client struct {
	h       op.Handler
	o       Options
	remote  bool // answers can get lost, and servers be away
	leasing bool // there is a session, so servers grant leases
	seed    maphash.Seed
	log     *slog.Logger
	age     time.Duration // for how long a write is delayed at most
	life    context.Context
	die     context.CancelFunc

	ses        atomic.Pointer[identity]
	sesMu      sync.Mutex      // held while ses changes
	registered []atomic.Uint32 // by shard: how often Register was called for it; only with a session

	nodes      table
	releases   releases
	earlyBytes atomic.Int64 // in early of all nodes
	lazy       atomic.Bool  // releases are gathered, as a mount wants it
	dirs       dirs
	accesses   accesses
	splits     splits
	leases     leases
	watch      watching
	kernel     atomic.Pointer[kernel] // of the mount, if there is one
	requests   [256]atomic.Uint64     // sent, by type
	dirty      dirtyList
	sent       sentLog
	sending    chan struct{} // a token for each aged buffer that is just being sent
	unsynced   unsynced
	layoutAge  atomic.Int64 // for how long a layout is believed, in nanoseconds

	dirtyCount atomic.Int64 // nodes with a buffer
	buffered   atomic.Int64 // bytes of all buffers' room
	stuck      atomic.Int64 // bytes of those among them whose server is away
}

// New returns a client of h. Close it to send what is still delayed.
func New(h op.Handler, o Options) *Client {
	if o.BufferBytes <= 0 {
		o.BufferBytes = 64 << 20
	}
	if o.Shards == 0 {
		o.Shards = 1
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	c := &Client{
		h: h, o: o, remote: o.Session != 0 && !o.Local, leasing: o.Session != 0, seed: maphash.MakeSeed(), log: o.Logger, age: bufferAge,
		sending: make(chan struct{}, sendersMax),
	}
	c.life, c.die = context.WithCancel(context.Background())
	c.ses.Store(newIdentity(o.Session, o.Shards))
	c.layoutAge.Store(int64(layoutAge))
	if c.remote {
		c.registered = make([]atomic.Uint32, o.Shards)
	}
	if c.leasing {
		c.leases.init(o.Shards)
	}
	c.nodes.init()
	return c
}

// Requests calls fn for each type of request with how many were sent.
func (c *Client) Requests(fn func(op.Type, uint64)) {
	for _, t := range op.Types() {
		fn(t, c.requests[t].Load())
	}
}

func (c *Client) count(k *call) { c.requests[k.Type].Add(1) }

// Root returns the inode number of the root directory.
func (c *Client) Root() sealfs.Ino { return c.o.Root }

// closePatience is for how long Close waits for servers that are away.
const closePatience = 30 * time.Second

// Close sends all delayed writes and returns the first error. What cannot be sent
// within half a minute, because its server is away, is lost, and the error
// says how much. Then all who still wait are answered sealfs.ErrInterrupted.
// The handler stays open.
func (c *Client) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closePatience)
	defer cancel()
	return c.Shutdown(ctx)
}

// Shutdown is Close with a patience of the caller's.
func (c *Client) Shutdown(ctx context.Context) error {
	err := c.flushAll(ctx)
	last, stop := context.WithTimeout(ctx, accessDelay)
	c.tellAccesses(last)
	stop()
	c.die()
	return err
}

// call is a request and its reply, pooled: both escape to the heap on their way
// through the handler's interface.
type call struct {
	op.Request
	rep op.Reply

	ses        *identity // whose number Seq is; nil: not numbered yet
	unsure     bool      // an attempt got no answer
	layout     bool      // "stale" may be about the layout of the file: it is an answer
	registered uint32    // Client.registered of the shard, from before the last attempt
	mark       uint64    // from before the last attempt: see leases

	self, self2 sealfs.Ino // the directories, where Dir and Dir2 are partitions of them: see named

	ino, dir belief   // what of the reply may be believed: its inode; the request's directory
	each     []belief // and in Readdir each entry's inode
}

var calls = sync.Pool{New: func() any { return new(call) }}

// begin returns an empty call of type t, addressed to the home of ino.
func (c *Client) begin(t op.Type, ino sealfs.Ino) *call {
	k := calls.Get().(*call)
	k.Type = t
	k.Shard = ino.Home(c.o.Shards)
	return k
}

// end gives k back. Its reply must not be used any more.
func (k *call) end() {
	clear(k.rep.Entries)
	*k = call{rep: op.Reply{Entries: k.rep.Entries[:0]}, each: k.each[:0]}
	calls.Put(k)
}

// tooLong refuses what is too long for a request to be sent at all: a server would not
// understand it.
func (k *call) tooLong() error {
	switch {
	case len(k.Name) <= sealfs.NameMax && len(k.Name2) <= sealfs.NameMax:
		return nil
	case k.Type == op.Setxattr || k.Type == op.Getxattr || k.Type == op.Removexattr:
		return sealfs.ErrRange
	}
	return sealfs.ErrNameTooLong
}

// address fills in what all requests carry.
func (c *Client) address(k *call) {
	k.Volume = c.o.Volume
	if c.o.Epoch != nil {
		k.Epoch = c.o.Epoch(k.Shard)
	}
}

// do sends k to where it belongs, and returns what went wrong, a sealfs.Code or an error that wraps one.
func (c *Client) do(ctx context.Context, k *call) error {
	if err := k.tooLong(); err != nil {
		return err
	}
	switch k.Type {
	case op.Lookup, op.Create, op.Mknod, op.Mkdir, op.Symlink, op.Link, op.Unlink, op.Rmdir, op.Rename:
		return c.named(ctx, k, c.direct)
	}
	return c.direct(ctx, k)
}

// direct is do for a request whose place is known.
func (c *Client) direct(ctx context.Context, k *call) error {
	c.address(k)
	if c.remote {
		err := c.ask(ctx, k)
		if err == errGaveUp && k.unsure && pursued(k.Type) {
			c.pursue(k)
			return err
		}
		c.finish(k)
		return err
	}
	if !c.leasing {
		c.about(k)
		return once(ctx, c.h, k)
	}
	c.startWatching()
	s := c.ses.Load()
	k.ses, k.Session = s, s.id
	err := c.patiently(ctx, k)
	if err == nil || k.rep.Code == sealfs.ErrNotExist {
		c.learn(k)
	}
	return err
}

// about notes that k is about to be sent.
func (c *Client) about(k *call) {
	k.mark, k.ino, k.dir = c.leases.mark(), 0, 0
	if c.leasing {
		c.leases.makes(k)
	}
	c.count(k)
}

// once asks h one time.
func once(ctx context.Context, h op.Handler, k *call) error {
	if err := h.Do(ctx, &k.Request, &k.rep); err != nil {
		return err
	}
	if k.rep.Code != 0 {
		return k.rep.Code
	}
	return nil
}

// spread chooses the home of a new directory: any shard, so that the load of a
// tree is everywhere.
func (c *Client) spread(dir sealfs.Ino, name string) sealfs.Shard {
	h := maphash.String(c.seed, name) ^ uint64(dir)*0x9e3779b97f4a7c15 ^ rand.Uint64()
	return sealfs.Shard(h & uint64(c.o.Shards-1))
}
