package client

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"slices"
	"sync"
	"time"

	"sealfs"
	"sealfs/op"
)

// awayMax is how long Statfs waits for a store before it leaves it out.
const awayMax = time.Second

// Statfs returns the room in the volume: what all stores have, within the quota. A store that
// does not answer within a second is left out; when none does, Statfs waits.
func (c *Client) Statfs(ctx context.Context) (op.Space, error) {
	s, err := c.space(ctx)
	if err != nil || c.o.Quota == nil {
		return s, err
	}
	bytes, inodes := c.o.Quota()
	limit(&s.Bytes, &s.BytesFree, bytes)
	limit(&s.Inodes, &s.InodesFree, inodes)
	return s, nil
}

// limit applies a quota, 0 for none, to what there is and what is free of it.
func limit(all, free *uint64, quota uint64) {
	if quota == 0 {
		return
	}
	used := *all - min(*free, *all)
	*all = min(*all, quota)
	*free = min(*free, quota-min(used, quota))
}

func (c *Client) space(ctx context.Context) (op.Space, error) {
	if c.o.Each == nil {
		return c.spaceAt(ctx, c.o.Root.Home(c.o.Shards))
	}
	var p patience
	k := c.begin(op.Statfs, c.o.Root) // to wait with
	defer k.end()
	for {
		if k.ses = c.ses.Load(); k.ses.ended.Load() {
			if err := c.awaitSession(ctx, k.ses); err != nil {
				return op.Space{}, err
			}
			continue
		}
		var mu sync.Mutex
		var sum op.Space
		answers := 0
		short, cancel := brief(ctx, awayMax)
		err := c.eachStore(short, func(shard sealfs.Shard) error {
			s, err := c.spaceAt(short, shard)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			sum.Bytes, sum.BytesFree = sat(sum.Bytes, s.Bytes), sat(sum.BytesFree, s.BytesFree)
			sum.Inodes, sum.InodesFree = sat(sum.Inodes, s.Inodes), sat(sum.InodesFree, s.InodesFree)
			answers++
			return nil
		})
		cancel()
		switch {
		case answers > 0 && (err == nil || errors.Is(err, sealfs.ErrInterrupted)) && ctx.Err() == nil:
			return sum, nil
		case err == nil:
			return sum, fmt.Errorf("there are no stores: %w", sealfs.ErrUnavailable)
		case !errors.Is(err, sealfs.ErrInterrupted):
			return sum, err
		}
		if err := p.wait(ctx, c, k, err); err != nil {
			return op.Space{}, err
		}
	}
}

// sat adds as far as there are numbers.
func sat(a, b uint64) uint64 {
	sum, carry := bits.Add64(a, b, 0)
	if carry != 0 {
		return 1<<64 - 1
	}
	return sum
}

func (c *Client) spaceAt(ctx context.Context, shard sealfs.Shard) (op.Space, error) {
	k := c.begin(op.Statfs, c.o.Root)
	k.Shard = shard
	err := c.do(ctx, k)
	s := k.rep.Space
	k.end()
	return s, err
}

// eachStore calls fn for one shard of each store, at the same time, waits for
// all and returns the first error.
func (c *Client) eachStore(ctx context.Context, fn func(sealfs.Shard) error) error {
	if c.o.Each == nil {
		return fn(c.o.Root.Home(c.o.Shards))
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var first error
	err := c.o.Each(ctx, func(shard sealfs.Shard) error {
		wg.Go(func() {
			if err := fn(shard); err != nil {
				mu.Lock()
				defer mu.Unlock()
				if first == nil {
					first = err
				}
			}
		})
		return nil
	})
	wg.Wait()
	if err == nil {
		err = first
	}
	return err
}

// Fsync returns when all writes to ino so far survive a power cut.
func (c *Client) Fsync(ctx context.Context, ino sealfs.Ino) error {
	if err := c.flushAndTake(ctx, ino); err != nil {
		return err
	}
	if len(c.splits.list(ino)) > 0 && c.o.Each != nil {
		return c.eachStore(ctx, func(shard sealfs.Shard) error { return c.syncAt(ctx, ino, shard) })
	}
	home := ino.Home(c.o.Shards)
	written := c.unsynced.of(ino)
	if len(written) == 0 {
		return c.syncAt(ctx, ino, home)
	}
	shards := append(slices.Collect(maps.Keys(written)), home)
	var err error
	if len(shards) > piecesMax && c.o.Each != nil {
		err = c.eachStore(ctx, func(shard sealfs.Shard) error { return c.syncAt(ctx, ino, shard) })
	} else {
		err = c.syncShards(ctx, ino, shards)
	}
	if err == nil {
		c.unsynced.done(ino, written)
	}
	return err
}

// syncShards syncs some shards at the same time.
func (c *Client) syncShards(ctx context.Context, ino sealfs.Ino, shards []sealfs.Shard) error {
	var wg sync.WaitGroup
	errs := make([]error, len(shards))
	slots := make(chan struct{}, piecesMax)
	for i, shard := range shards {
		slots <- struct{}{}
		wg.Go(func() {
			errs[i] = c.syncAt(ctx, ino, shard)
			<-slots
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *Client) syncAt(ctx context.Context, ino sealfs.Ino, shard sealfs.Shard) error {
	k := c.begin(op.Sync, ino)
	k.Ino, k.Shard = ino, shard
	return c.none(ctx, k)
}

// Sync returns when everything that was written through this client survives a
// power cut, on all stores (syncfs).
func (c *Client) Sync(ctx context.Context) error {
	err := c.flushAll(ctx)
	if ctx.Err() != nil {
		return errGaveUp
	}
	serr := c.eachStore(ctx, func(shard sealfs.Shard) error { return c.syncAt(ctx, 0, shard) })
	if err == nil {
		err = serr
	}
	return err
}

const (
	// unsyncedMax bounds the files whose chunks unsynced knows.
	unsyncedMax = 1024
	// unsyncedAge is after what time they may be forgotten: a server makes durable by
	// itself what is older than a second.
	unsyncedAge = 10 * time.Second
)

// unsynced knows the shards in which chunks were written since the last fsync of
// their file, whether it is still open or not.
type unsynced struct {
	mu    sync.Mutex
	count uint64
	files map[sealfs.Ino]*unsyncedFile
}

type unsyncedFile struct {
	shards map[sealfs.Shard]uint64 // count at the last write
	last   time.Time
}

func (u *unsynced) add(ino sealfs.Ino, shard sealfs.Shard) {
	u.mu.Lock()
	defer u.mu.Unlock()
	now := time.Now()
	f := u.files[ino]
	if f == nil {
		if u.files == nil {
			u.files = map[sealfs.Ino]*unsyncedFile{}
		}
		if len(u.files) >= unsyncedMax {
			maps.DeleteFunc(u.files, func(_ sealfs.Ino, f *unsyncedFile) bool { return now.Sub(f.last) > unsyncedAge })
		}
		f = &unsyncedFile{shards: map[sealfs.Shard]uint64{}}
		u.files[ino] = f
	}
	u.count++
	f.last, f.shards[shard] = now, u.count
}

// of returns the shards of ino, for done.
func (u *unsynced) of(ino sealfs.Ino) map[sealfs.Shard]uint64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	if f := u.files[ino]; f != nil {
		return maps.Clone(f.shards)
	}
	return nil
}

// done notes that what of returned is synced; later writes stay.
func (u *unsynced) done(ino sealfs.Ino, synced map[sealfs.Shard]uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	f := u.files[ino]
	if f == nil {
		return
	}
	maps.DeleteFunc(f.shards, func(s sealfs.Shard, n uint64) bool { return synced[s] == n })
	if len(f.shards) == 0 {
		delete(u.files, ino)
	}
}
