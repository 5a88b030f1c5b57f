package client

import (
	"context"
	"fmt"
	"math"

	"sealfs"
	"sealfs/op"
)

// A server keeps in memory which session holds which file open, and forgets it
// when it restarts; so Register tells it again, on every new connection, before
// anything else goes over that. It is right because of three rules:
//
//   - What is listed is what a server has answered (node.held). An opening that is
//     under way is not: it will be asked again after Register.
//   - An opening counts only if Register did not run between the moment before
//     its last attempt and the moment when it is counted (Client.registered,
//     compared under the lock of the table part, which Register takes after it
//     raised the number). Otherwise it is asked again. So no answer that
//     came over the old connection, and that Register could not know of yet, is relied on.
//   - A file is released altogether, and no opening of it is under way meanwhile:
//     an opening waits for a release that was sent, and a release is not sent
//     while an opening waits for its answer. So it does no harm when the server
//     counts an opening twice, and a release that is repeated releases nothing new.
//
// What an interrupted caller began is seen through in the background: an opening
// is released again.

// open sends k, an Open, Create or Tmpfile, ends it, and counts the opening.
func (c *Client) open(ctx context.Context, k *call) (answer, error) {
	if !c.remote {
		a, err := c.attrs(ctx, k)
		if err == nil {
			c.nodes.open(a.Ino, c.ses.Load())
		}
		return a, err
	}
	if err := k.tooLong(); err != nil {
		k.end()
		return answer{}, err
	}
	c.address(k)
	var n *node // nil for a new file
	if k.Type == op.Open {
		var err error
		if n, err = c.opening(ctx, k.Ino); err != nil {
			k.end()
			return answer{}, err
		}
	}
	a, err := c.askOpen(ctx, k, &n)
	if err != errGaveUp {
		k.end()
		return a, err
	}
	go func() {
		if a, err := c.askOpen(c.life, k, &n); err == nil {
			c.happened(k)
			c.Release(c.life, a.Ino)
		}
		k.end()
	}()
	return a, err
}

// opening announces an opening of ino, after a release that is under way, at the
// node that it returns.
func (c *Client) opening(ctx context.Context, ino sealfs.Ino) (*node, error) {
	p := c.nodes.part(ino)
	for {
		p.mu.Lock()
		over := p.leaving[ino]
		if over == nil {
			n := p.node(ino, c.ses.Load())
			n.pending++
			p.mu.Unlock()
			return n, nil
		}
		p.mu.Unlock()
		// It may not have been sent yet. We only wait for it, so that we can be interrupted.
		go c.sendReleases(ino.Home(c.o.Shards))
		select {
		case <-over:
		case <-ctx.Done():
			return nil, errGaveUp
		}
	}
}

// askAt is ask for a request whose shard has just been chosen.
func (c *Client) askAt(ctx context.Context, k *call) error {
	c.address(k)
	return c.ask(ctx, k)
}

// askOpen asks k until its answer counts. n is where the opening was announced.
// It may be called again when it gave up.
//
// A new file that was made, and has lost its name and all who hold it before its opening counts here (its
// server was started anew in between), cannot be opened any more. It was made, so
// that there is no such name would be a lie.
func (c *Client) askOpen(ctx context.Context, k *call, n **node) (answer, error) {
	made := false
	for {
		mark := earlyMark(*n)
		err := error(nil)
		if k.Type == op.Create {
			err = c.named(ctx, k, c.askAt)
		} else {
			err = c.ask(ctx, k)
		}
		if err == errGaveUp {
			return answer{}, err
		}
		c.finish(k)
		a := k.answer()
		switch {
		case err == nil && c.opened(a.Ino, k, *n):
			if k.Len != 0 && *n != nil {
				c.keepEarly(*n, k.rep.Data, a.ino, mark)
			}
			return a, nil
		case err != nil:
			if *n != nil {
				c.notOpened(*n)
			}
			if made && err == sealfs.ErrNotExist {
				err = fmt.Errorf("the file was made, and removed by others before it could be opened: %w", sealfs.ErrIO)
			}
			return a, err
		case *n == nil || k.ses.ended.Load():
			// A new file exists now, and is opened like any other.
			made = made || *n == nil
			k.Request = op.Request{Type: op.Open, Ino: a.Ino, Shard: k.Shard, Flags: op.WantWrite}
			c.address(k)
			if *n, err = c.opening(c.life, a.Ino); err != nil {
				return a, err
			}
		}
		k.ses, k.unsure = nil, false
	}
}

// opened counts the opening that k was answered, and reports whether it could.
func (c *Client) opened(ino sealfs.Ino, k *call, announced *node) bool {
	p := c.nodes.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	if k.ses.ended.Load() || c.registered[k.Shard].Load() != k.registered {
		return false
	}
	n := p.node(ino, k.ses)
	if n.opens == 0 {
		n.ses.Store(k.ses) // it may have been announced before that session began
	}
	n.opens++
	n.held++
	if n == announced {
		n.pending--
	}
	return true
}

// notOpened takes back an announced opening.
func (c *Client) notOpened(n *node) {
	p := c.nodes.part(n.ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.nodes[n.ino] != n {
		return // the session has ended
	}
	if n.pending--; n.pending > 0 || n.opens > 0 {
		return
	}
	if n.held == 0 {
		delete(p.nodes, n.ino)
		return
	}
	// The last one who had it open left the release to us.
	n.opens = 1
	go c.release(c.life, n)
}

// Release undoes one Open, Create or Tmpfile. It sends what is delayed, and
// returns the error of that; the inode is let go in any case, in the background
// if ctx ends first.
func (c *Client) Release(ctx context.Context, ino sealfs.Ino) error {
	n := c.nodes.get(ino)
	if n == nil {
		return sealfs.ErrClosed
	}
	err := c.release(ctx, n)
	if err == errGaveUp && c.life.Err() == nil {
		go c.release(c.life, n)
	}
	return err
}

// release is Release; when it gives up, nothing was let go.
func (c *Client) release(ctx context.Context, n *node) error {
	t, err := n.turn(ctx)
	if err != nil {
		return err
	}
	if err := c.sendAndKeep(ctx, &t); err == errGaveUp {
		t.end()
		return err
	}
	held := c.nodes.release(n, c.remote)
	last := n.gone
	if last {
		c.dropEarly(n)
		if c.leasing {
			c.leases.lower(n.ino)
		}
	}
	if last {
		err, n.err = n.err, nil // the last who can be told
	}
	t.end()
	if last && n.locked.Load() {
		// What closes of descriptors did not release belongs to open files (OFD
		// locks), and the last of those is closed now.
		if derr := c.DropOwner(ctx, n.ino, 0, op.AllOwners); err == nil && derr != errGaveUp {
			err = derr
		}
	}
	if held == 0 {
		return err
	}
	if c.remote && c.lazy.Load() {
		c.releaseSoon(n.ino, n.ses.Load())
		return err
	}
	k := c.begin(op.Release, n.ino)
	k.Ino, k.Len = n.ino, held
	if !c.remote {
		if rerr := c.none(ctx, k); err == nil {
			err = rerr
		}
		return err
	}
	k.Len = math.MaxUint64
	c.address(k)
	rerr := c.ask(ctx, k)
	if rerr == errGaveUp {
		go func() {
			c.ask(c.life, k)
			c.nodes.left(n.ino)
			k.end()
		}()
		return err
	}
	c.nodes.left(n.ino)
	k.end()
	if err == nil {
		err = rerr
	}
	return err
}

// Opens calls fn for every inode that is open, with how often the server of its
// home was told so and answered. fn must not use the client.
func (c *Client) Opens(fn func(ino sealfs.Ino, count uint64)) {
	for i := range c.nodes.parts {
		p := &c.nodes.parts[i]
		p.mu.Lock()
		for _, n := range p.nodes {
			if n.held > 0 {
				fn(n.ino, n.held)
			}
		}
		p.mu.Unlock()
	}
}

// owe returns what a Register adds to the count of ino: whether answered writes to it are not sent yet. Its
// lease has just been dropped: a write that is being delayed sees that behind it, and is sent
// before it is answered.
func (c *Client) owe(ino sealfs.Ino) uint64 {
	if n := c.nodes.get(ino); n == nil || !c.leasing || !n.dirty.Load() {
		return 0
	}
	return op.OpensDelayed
}

// Register tells h, a new connection to a server, which of the files in the
// shards that mine accepts the session holds open; the server forgets all others of the
// session there. It must be called, and must have succeeded, before any other
// request goes over a connection to a server to which there was none, and not for further
// connections to the same server. The shards that mine accepts must belong to
// one store; it may be called several times, also for several stores at once.
// Without a session, or when that has ended, there is nothing to tell.
func (c *Client) Register(ctx context.Context, h op.Handler, mine func(sealfs.Shard) bool) error {
	s := c.ses.Load()
	if !c.remote || s.ended.Load() {
		return nil
	}
	first := -1
	for i := range c.registered {
		if mine(sealfs.Shard(i)) {
			if first < 0 {
				first = i
			}
			c.registered[i].Add(1) // before the table is read
		}
	}
	if first < 0 {
		return nil
	}
	c.registering(mine, sealfs.Shard(first))
	var all []op.Opens
	c.Opens(func(ino sealfs.Ino, count uint64) {
		if mine(ino.Home(c.o.Shards)) {
			all = append(all, op.Opens{Ino: ino, Count: count})
		}
	})
	for i := range all {
		all[i].Count |= c.owe(all[i].Ino)
	}
	k := c.begin(op.Register, 0)
	defer k.end()
	k.Shard, k.Len = sealfs.Shard(first), uint64(len(all))
	c.address(k)
	k.Session = s.id
	for {
		some := all[k.Off:min(k.Len, k.Off+op.OpensMax)]
		k.Data = k.Data[:0]
		for _, o := range some {
			k.Data = op.AppendOpens(k.Data, o)
		}
		k.rep.Reset()
		err := once(ctx, h, k)
		if err == sealfs.ErrSession {
			c.fence(s, err)
		}
		if err != nil {
			return fmt.Errorf("tell the server what is open: %w", err)
		}
		if k.Off += uint64(len(some)); k.Off == k.Len {
			return nil
		}
	}
}
