// Package client is the client side of SealFS: a Go library and a FUSE mount
// over any op.Handler, be it a server in the same process or a transport to one
// elsewhere.
//
// Client works on inode numbers, as the kernel does. FS puts paths and files in the manner of
// package os on top of it, and Mount puts it below the kernel's VFS.
//
// # Writes
//
// Small writes to a file are collected per inode and sent at 128 KiB, at flush, fsync,
// the last release and unlock, after a second, or when anybody on this
// client looks at the inode. So everybody on one client sees every write at once;
// other clients see it at the latest when the file is closed. What a killed
// client had not sent is lost; Options.Durable sends every write before it is answered.
//
// # Locks
//
// A node's lock (the buffer of one inode) is taken before the node table's and
// the list of dirty nodes'; while it is held the handler may be called, so that
// writes to one inode keep their order. Nothing else is held across a request.
package client

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"math/rand/v2"
	"slices"
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

	// Session is the client's identity at the cluster, under which changes are
	// numbered so that a retry happens once. 0 suits a handler in the same
	// process, whose answers cannot get lost.
	Session sealfs.Session

	// Retry is for how long a request without an answer is tried again (only with
	// a session; 30 s when 0).
	Retry time.Duration

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

// Cred is on whose behalf something is made: the owner of new inodes. A Client
// checks no permissions; the kernel does for a mount.
type Cred struct{ UID, GID uint32 }

// Client speaks to a handler in terms of inodes. It is safe for concurrent use.
type Client struct {
	h    op.Handler
	o    Options
	seed maphash.Seed
	log  *slog.Logger
	age  time.Duration // for how long a write is delayed at most

	seq   sequence
	nodes table
	dirty dirtyList
	sent  sentLog

	dirtyCount atomic.Int64 // nodes with a buffer
	buffered   atomic.Int64 // bytes of all buffers' room
}

// New returns a client of h. Close it to send what is still delayed.
func New(h op.Handler, o Options) *Client {
	if o.BufferBytes <= 0 {
		o.BufferBytes = 64 << 20
	}
	if o.Retry <= 0 {
		o.Retry = 30 * time.Second
	}
	if o.Shards == 0 {
		o.Shards = 1
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	c := &Client{h: h, o: o, seed: maphash.MakeSeed(), log: o.Logger, age: bufferAge}
	c.nodes.init()
	return c
}

// Root returns the inode number of the root directory.
func (c *Client) Root() sealfs.Ino { return c.o.Root }

// Close sends all delayed writes and returns the first error. The handler stays open.
func (c *Client) Close() error {
	return c.FlushAll()
}

// call is a request and its reply, pooled: both escape to the heap on their way
// through the handler's interface.
type call struct {
	op.Request
	rep op.Reply
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
	k.Request = op.Request{}
	clear(k.rep.Entries)
	k.rep = op.Reply{Entries: k.rep.Entries[:0]}
	calls.Put(k)
}

// do sends k and returns what went wrong, a sealfs.Code or an error that wraps one.
func (c *Client) do(ctx context.Context, k *call) error {
	k.Volume = c.o.Volume
	k.Session = c.o.Session
	if c.o.Epoch != nil {
		k.Epoch = c.o.Epoch(k.Shard)
	}
	if c.o.Session == 0 {
		if err := c.h.Do(ctx, &k.Request, &k.rep); err != nil {
			return err
		}
		if k.rep.Code != 0 {
			return k.rep.Code
		}
		return nil
	}
	if k.Type.Changes() {
		k.Seq, k.Low = c.seq.start()
		defer c.seq.finish(k.Seq)
	}
	return c.retry(ctx, k)
}

// retry sends k until there is an answer, time is up, or ctx ends.
func (c *Client) retry(ctx context.Context, k *call) error {
	wait := 5 * time.Millisecond
	deadline := time.Now().Add(c.o.Retry)
	for {
		k.rep.Reset()
		err := c.h.Do(ctx, &k.Request, &k.rep)
		switch {
		case err == nil && k.rep.Code == 0:
			return nil
		case err == nil && k.rep.Code != sealfs.ErrStale && k.rep.Code != sealfs.ErrUnavailable && k.rep.Code != sealfs.ErrBusy:
			return k.rep.Code
		case err == nil:
			err = k.rep.Code
		case !errors.Is(err, sealfs.ErrUnavailable) && !errors.Is(err, sealfs.ErrTimeout):
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%v: no answer for %v: %w", k.Type, c.o.Retry, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%v: %w", k.Type, sealfs.ErrInterrupted)
		case <-time.After(wait):
		}
		wait = min(2*wait, time.Second)
		if c.o.Epoch != nil {
			k.Epoch = c.o.Epoch(k.Shard)
		}
	}
}

// sequence numbers the changes of a session and knows the lowest one that is
// not answered yet.
type sequence struct {
	mu   sync.Mutex
	last uint64
	open []uint64 // not answered yet, ascending
}

func (s *sequence) start() (seq, low uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last++
	s.open = append(s.open, s.last)
	return s.last, s.open[0]
}

func (s *sequence) finish(seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i, ok := slices.BinarySearch(s.open, seq); ok {
		s.open = slices.Delete(s.open, i, i+1)
	}
}

// spread chooses the home of a new directory: any shard, so that the load of a
// tree is everywhere.
func (c *Client) spread(dir sealfs.Ino, name string) sealfs.Shard {
	h := maphash.String(c.seed, name) ^ uint64(dir)*0x9e3779b97f4a7c15 ^ rand.Uint64()
	return sealfs.Shard(h & uint64(c.o.Shards-1))
}
