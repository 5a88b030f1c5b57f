package client

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/op"
)

const (
	// accessDelay is for how long a time of access is kept here at most: files that are
	// written, read once and removed shall not cost a change more.
	accessDelay = time.Second
	// accessMax bounds the inodes whose times are kept. Beyond it reading does not count.
	accessMax = 32768
	// accessPatience is for how long a server that is away holds up the times for others. Then
	// those for this one are lost.
	accessPatience = 5 * time.Second
	// accessReread is up to which size a file in the kernel's page cache is read anew so
	// that its reading is seen. A larger one counts as read when it is opened.
	accessReread = 1 << 20
)

// accesses are the times at which a mount has read inodes, until the server knows them.
// Linux leaves times of access to us, and its page cache answers most reads by itself.
// But of those that count by the rules of relatime (op.Accessed) each is the first one after a
// change, and so comes here, or is made to.
//
// This mount shows a time at once; the server, and through it other mounts, learn it within
// accessDelay.
type accesses struct {
	some atomic.Bool // there is something in of
	mu   sync.Mutex
	of   map[sealfs.Ino]access
	busy bool // somebody will send them
}

type access struct {
	at   int64
	told int // 0: not yet; grows with each look afterwards
}

// read notes that ino was read now. It waits for nobody.
func (c *Client) read(ino sealfs.Ino) {
	a := &c.accesses
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, ok := a.of[ino]; !ok && len(a.of) >= accessMax {
		return
	}
	if a.of == nil {
		a.of = map[sealfs.Ino]access{}
	}
	a.of[ino] = access{at: time.Now().UnixNano()}
	a.some.Store(true)
	if !a.busy {
		a.busy = true
		time.AfterFunc(accessDelay, c.sendAccesses)
	}
}

// accessed puts the time into attributes at which this mount has read their inode.
func (c *Client) accessed(a *op.Attr) {
	if !c.accesses.some.Load() {
		return
	}
	c.accesses.mu.Lock()
	defer c.accesses.mu.Unlock()
	if r, ok := c.accesses.of[a.Ino]; ok {
		a.Atime = op.Accessed(a.Atime, a.Mtime, a.Ctime, r.at)
	}
}

// unread reports whether reading an inode with these attributes changes its time of access.
func unread(a *op.Attr) bool {
	now := time.Now().UnixNano()
	return op.Accessed(a.Atime, a.Mtime, a.Ctime, now) != a.Atime
}

// sendAccesses tells the servers, and comes again as long as there is something.
func (c *Client) sendAccesses() {
	c.tellAccesses(c.life)
	a := &c.accesses
	a.mu.Lock()
	defer a.mu.Unlock()
	a.busy = len(a.of) > 0 && c.life.Err() == nil
	a.some.Store(len(a.of) > 0)
	if a.busy {
		time.AfterFunc(accessDelay, c.sendAccesses)
	}
}

// tellAccesses tells the servers what they do not know. What they were told stays for another
// round: attributes that were asked for before may still be under way.
func (c *Client) tellAccesses(ctx context.Context) {
	a := &c.accesses
	lists := map[sealfs.Shard][]op.Opens{}
	a.mu.Lock()
	for ino, r := range a.of {
		switch {
		case r.told == 0:
			home := ino.Home(c.o.Shards)
			lists[home] = append(lists[home], op.Opens{Ino: ino, Count: uint64(r.at)})
		case r.told > 1:
			delete(a.of, ino)
			continue
		}
		r.told++
		a.of[ino] = r
	}
	a.mu.Unlock()
	for _, list := range lists {
		for part := range slices.Chunk(list, op.AccessMax) {
			if ctx.Err() != nil {
				return
			}
			k := c.begin(op.Setattr, part[0].Ino)
			k.Ino, k.Valid, k.Atime = part[0].Ino, op.SetAccess, int64(part[0].Count)
			for _, o := range part[1:] {
				k.Data = op.AppendOpens(k.Data, o)
			}
			patient, cancel := context.WithTimeout(ctx, accessPatience)
			c.none(patient, k) // nobody can be told of an error
			cancel()
			for _, o := range part[1:] {
				c.dirs.forget(0, o.Ino) // the answer tells of the first only
			}
		}
	}
}
