package client

import (
	"math"
	"sync"
	"time"

	"sealfs"
	"sealfs/op"
)

const (
	// releaseDelay is how long releases are gathered, so that many files of a
	// directory cost one request. Nobody waits for them but who opens the file again.
	releaseDelay = 2 * time.Millisecond
	// releasesMax is how many go in one request at most.
	releasesMax = 64
)

// releases are files that nobody has open any more and whose server is yet to
// be told, by their shard.
type releases struct {
	mu sync.Mutex
	of map[sealfs.Shard][]leaver
}

type leaver struct {
	ino sealfs.Ino
	ses *identity // under which it was open
}

// releaseSoon has the server told that the session lets ino go altogether.
func (c *Client) releaseSoon(ino sealfs.Ino, ses *identity) {
	shard := ino.Home(c.o.Shards)
	r := &c.releases
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.of == nil {
		r.of = map[sealfs.Shard][]leaver{}
	}
	list := append(r.of[shard], leaver{ino, ses})
	r.of[shard] = list
	switch len(list) {
	case 1:
		time.AfterFunc(releaseDelay, func() { c.sendReleases(shard) })
	case releasesMax:
		delete(r.of, shard)
		go c.sendRelease(shard, list)
	}
}

// sendReleases sends what is gathered for a shard.
func (c *Client) sendReleases(shard sealfs.Shard) {
	r := &c.releases
	r.mu.Lock()
	list := r.of[shard]
	delete(r.of, shard)
	r.mu.Unlock()
	if len(list) > 0 {
		c.sendRelease(shard, list)
	}
}

// sendRelease sends one request for up to releasesMax files of a shard.
func (c *Client) sendRelease(shard sealfs.Shard, list []leaver) {
	k := c.begin(op.Release, list[0].ino)
	k.Ino, k.Len, k.Shard = list[0].ino, math.MaxUint64, shard
	k.ses, k.Session = list[0].ses, list[0].ses.id
	for _, l := range list[1:] {
		if l.ses == k.ses { // what an ended session held is let go already
			k.Data = op.AppendOpens(k.Data, op.Opens{Ino: l.ino, Count: math.MaxUint64})
		}
	}
	c.address(k)
	c.ask(c.life, k)
	for _, l := range list {
		c.nodes.left(l.ino)
	}
	k.end()
}
