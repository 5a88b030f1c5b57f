package oracle

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"

	"sealfs"
	"sealfs/op"
)

// Net pretends that the shards of a model lie in several stores, each behind a
// connection of its own: a handler as a router is one. Stores can go away and come
// back, and answers get lost. All methods are safe for concurrent use.
type Net struct {
	fs     *FS
	stores int

	// Register, if not nil, is called for each connection before anything else goes over it.
	Register func(ctx context.Context, h op.Handler, mine func(sealfs.Shard) bool) error

	mu    sync.Mutex
	conns []conn
	rng   *rand.Rand
	loss  float64
	lost  int
}

// conn is the connection to a store.
type conn struct {
	away, hung bool
	changed    chan struct{} // closed and replaced when away or hung changes
	ready      bool          // registered
	busy       chan struct{} // somebody registers: closed when he is ready
	refused    int
	waiting    int
}

// NewNet divides the model of fs into stores: shard s lies in store s modulo stores.
// From now on what fs answers for one store does not know the attributes of
// inodes in others.
func NewNet(fs *FS, stores int, seed uint64) *Net {
	n := &Net{fs: fs, stores: stores, conns: make([]conn, stores), rng: rand.New(rand.NewPCG(seed, 0))}
	for i := range n.conns {
		n.conns[i].changed = make(chan struct{})
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.stores = stores
	return n
}

// Store returns the store of a shard.
func (n *Net) Store(s sealfs.Shard) int { return int(s) % n.stores }

// Each calls fn for one shard of each store, as client.Options.Each wants it.
func (n *Net) Each(_ context.Context, fn func(sealfs.Shard) error) error {
	for i := range n.stores {
		if err := fn(sealfs.Shard(i)); err != nil {
			return err
		}
	}
	return nil
}

// Away breaks the connection to a store: requests fail at once until Back.
func (n *Net) Away(store int) { n.set(store, true, false) }

// Hang lets requests to a store wait until Back, which fails them.
func (n *Net) Hang(store int) { n.set(store, false, true) }

// Back lets a store be reached again, after a registration.
func (n *Net) Back(store int) { n.set(store, false, false) }

func (n *Net) set(store int, away, hung bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	c := &n.conns[store]
	c.away, c.hung, c.ready = away, hung, false
	close(c.changed)
	c.changed = make(chan struct{})
}

// Lose makes requests fail with probability p from now on: half of them before and
// half after they were executed. One in eight of those breaks the connection, and
// one in sixteen restarts the store.
func (n *Net) Lose(p float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.loss = p
}

// Lost returns how many answers were lost.
func (n *Net) Lost() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.lost
}

// Refused returns how many requests have found a store away.
func (n *Net) Refused(store int) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.conns[store].refused
}

// Waiting returns how many requests wait for a store that hangs.
func (n *Net) Waiting(store int) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.conns[store].waiting
}

// Do answers one request as the store of its shard does, if that can be reached.
func (n *Net) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	store := n.Store(req.Shard)
	if err := n.connect(ctx, store); err != nil {
		return err
	}
	n.mu.Lock()
	lose, late, restart := n.rng.Float64() < n.loss, n.rng.IntN(2) == 0, n.rng.IntN(16) == 0
	drop := restart || n.rng.IntN(8) == 0
	n.mu.Unlock()
	if lose && !late {
		return n.lose(store, drop, restart)
	}
	if err := n.fs.Do(ctx, req, rep); err != nil {
		return err
	}
	if lose {
		rep.Reset()
		return n.lose(store, drop, restart)
	}
	return nil
}

func (n *Net) lose(store int, drop, restart bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lost++
	if drop {
		n.conns[store].ready = false
	}
	if restart {
		n.fs.Restart(store)
	}
	return away(store)
}

func away(store int) error {
	return fmt.Errorf("store %d does not answer: %w", store, sealfs.ErrUnavailable)
}

// connect returns when there is a registered connection to the store.
func (n *Net) connect(ctx context.Context, store int) error {
	c := &n.conns[store]
	n.mu.Lock()
	defer n.mu.Unlock()
	for {
		wait := c.busy
		switch {
		case c.away:
			c.refused++
			return away(store)
		case c.hung:
			wait = c.changed
		case c.ready || n.Register == nil:
			return nil
		case c.busy == nil:
			c.busy = make(chan struct{})
			n.mu.Unlock()
			err := n.Register(ctx, n.fs, func(s sealfs.Shard) bool { return n.Store(s) == store })
			n.mu.Lock()
			close(c.busy)
			c.busy = nil
			if err != nil {
				return err
			}
			c.ready = !c.away && !c.hung
			continue
		}
		hung := c.hung
		if hung {
			c.waiting++
		}
		n.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
		}
		n.mu.Lock()
		if hung {
			c.waiting--
		}
		if ctx.Err() != nil {
			return fmt.Errorf("store %d: %w", store, sealfs.ErrInterrupted)
		}
		if hung {
			return away(store) // what was sent is lost with the connection
		}
	}
}
