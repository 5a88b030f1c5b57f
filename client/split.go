package client

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/op"
)

// A large directory is split: its entries stand in partitions (op.Partitions), which are
// directories in other shards. Everything up to Client.do and what it is answered speaks of the directory; requests
// about one of its names go to the partition that has it, and what may be believed of a name is
// believed under the partition's lease.
//
// Which directories are split, and how far, need not be known: who is asked for a name that
// he does not have says ErrStale, and the home knows. What was told once remains true until the
// directory gets its partitions back because it is empty, and then they are gone.

// splits are the directories that are known to be split.
type splits struct {
	some atomic.Bool
	mu   sync.RWMutex
	of   map[sealfs.Ino][]sealfs.Ino // partitions that are in use, by directory; never changed in place
	self map[sealfs.Ino]sealfs.Ino   // the directory of each partition that was ever told
}

// list returns the partitions of a directory that are known.
func (s *splits) list(dir sealfs.Ino) []sealfs.Ino {
	if !s.some.Load() {
		return nil
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.of[dir]
}

// whose returns the directory of which ino is a partition, ino itself if it is none.
func (s *splits) whose(ino sealfs.Ino) sealfs.Ino {
	if !s.some.Load() {
		return ino
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if dir, ok := s.self[ino]; ok {
		return dir
	}
	return ino
}

// set notes the partitions of a directory, and reports whether that is news.
func (s *splits) set(dir sealfs.Ino, list []sealfs.Ino) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.Equal(s.of[dir], list) {
		return false
	}
	if s.of == nil {
		s.of, s.self = map[sealfs.Ino][]sealfs.Ino{}, map[sealfs.Ino]sealfs.Ino{}
	}
	if len(list) == 0 {
		delete(s.of, dir)
		return true
	}
	for _, p := range list {
		s.self[p] = dir // before anything is asked of it
	}
	s.of[dir] = list
	s.some.Store(true)
	return true
}

// at returns what holds the name of a directory, as far as is known.
func (c *Client) at(dir sealfs.Ino, name string) sealfs.Ino {
	list := c.splits.list(dir)
	if len(list) == 0 {
		return dir
	}
	if p := op.PartitionOf(max(op.NameHash(dir, c.o.Volume, name), 1) << op.OrdinalBits); p < uint64(len(list)) {
		return list[p]
	}
	return dir
}

// learnSplit asks the home of a directory for its partitions, and reports whether there is news.
func (c *Client) learnSplit(ctx context.Context, dir sealfs.Ino) (a answer, news bool, err error) {
	k := c.begin(op.Getattr, dir)
	k.Ino, k.Flags = dir, op.Plus
	err = c.direct(ctx, k)
	a = k.answer()
	var list []sealfs.Ino
	if err == nil {
		list, err = op.DecodePartitions(k.rep.Data)
	}
	k.end()
	if err != nil {
		return a, false, err
	}
	c.dirs.note(&a.Attr, a.ino, a.mark)
	return a, c.splits.set(dir, list), nil
}

// named sends k, which is about names of directories, to where they are. One that gave up may be sent
// again: it goes where it went before, since it may have happened.
func (c *Client) named(ctx context.Context, k *call, send func(context.Context, *call) error) error {
	k.layout = true
	again := k.self != 0
	if !again {
		k.self, k.self2 = k.Dir, k.Dir2
	}
	dir, dir2 := k.self, k.self2
	var r redo
	for ; ; again = false {
		if !again {
			k.Dir = c.at(dir, k.Name)
			if dir2 != 0 {
				k.Dir2 = c.at(dir2, k.Name2)
			}
			k.Shard = k.Dir.Home(c.o.Shards)
		}
		err := send(ctx, k)
		switch apart := k.Dir != dir || k.Dir2 != dir2; {
		case err == nil:
			return nil
		case err == sealfs.ErrStale:
			if err := r.again(ctx, c, nil, err); err != nil {
				return err
			}
			if _, err := c.learnBoth(ctx, dir, dir2); err != nil {
				return err
			}
		case err == sealfs.ErrNotExist && apart && !(k.Type == op.Lookup && k.rep.Off == uint64(dir)):
			// The partition may have gone, and not the name.
			news, lerr := c.learnBoth(ctx, dir, dir2)
			if lerr != nil || !news {
				return err
			}
		case err == sealfs.ErrNotEmpty && (k.Type == op.Rmdir || k.Type == op.Rename):
			victim, name := dir, k.Name
			if k.Type == op.Rename {
				victim, name = dir2, k.Name2
			}
			if !c.joined(ctx, victim, name) {
				return err
			}
		default:
			return err
		}
		// It was refused: this is another request.
		c.finish(k)
		k.rep.Reset()
		k.ses, k.Seq, k.Low, k.unsure = nil, 0, 0, false
	}
}

func (c *Client) learnBoth(ctx context.Context, dir, dir2 sealfs.Ino) (bool, error) {
	_, news, err := c.learnSplit(ctx, dir)
	if err != nil || dir2 == 0 || dir2 == dir {
		return news, err
	}
	_, more, err := c.learnSplit(ctx, dir2)
	return news || more, err
}

// joined has the directory that a name stands for take its partitions back, if it has any and they
// are empty. It reports whether that was done.
func (c *Client) joined(ctx context.Context, dir sealfs.Ino, name string) bool {
	k := c.begin(op.Lookup, dir)
	k.Dir, k.Name = dir, name
	err := c.named(ctx, k, c.direct)
	a := k.rep.Attr
	k.end()
	if err == nil && a.Version == 0 {
		k = c.begin(op.Getattr, a.Ino)
		k.Ino = a.Ino
		err = c.direct(ctx, k)
		a = k.rep.Attr
		k.end()
	}
	if err != nil || a.Mode&modeType != modeDir || a.Bound == 0 && a.Gen == 0 {
		return false
	}
	k = c.begin(op.Join, a.Ino)
	k.Ino = a.Ino
	err = c.direct(ctx, k)
	k.end()
	return err == nil
}

// patiently asks a handler in this process, which is never away but may have to do something first: a
// partition that is about to be opened.
func (c *Client) patiently(ctx context.Context, k *call) error {
	for pause := pauseMin; ; pause = min(2*pause, pauseMax) {
		c.about(k)
		err := once(ctx, c.h, k)
		if err != sealfs.ErrUnavailable { // refused, and not an answer that was lost
			return err
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
		case <-c.life.Done():
		}
		timer.Stop()
		if ctx.Err() != nil || c.life.Err() != nil {
			return err
		}
		k.rep.Reset()
	}
}

// partBelief is what is believed of one partition.
type partBelief struct {
	ino    sealfs.Ino
	belief belief
}

const (
	// wholeTries is how often the attributes of a directory are put together, until all parts of them
	// can be believed at one moment.
	wholeTries = 3
	// askAtOnce is how many partitions are asked at the same time.
	askAtOnce = 16
)

// whole makes attributes from the home of a directory those of all of it.
func (c *Client) whole(ctx context.Context, a answer, err error) (answer, error) {
	for try := 1; err == nil && a.IsSplit(); try++ {
		home := a.Attr
		list := c.splits.list(home.Ino)
		if n := home.Moved(); uint64(len(list)) < n {
			if a, _, err = c.learnSplit(ctx, home.Ino); err != nil {
				return a, err
			}
			continue
		} else {
			list = list[:n]
		}
		c.dirs.note(&home, a.ino, a.mark)
		parts, gone, perr := c.partAttrs(ctx, list)
		if perr != nil {
			return a, perr
		}
		if gone {
			if a, _, err = c.learnSplit(ctx, home.Ino); err != nil {
				return a, err
			}
			continue
		}
		a = merged(&a, parts)
		if c.stands(&a) || a.ino == 0 || try >= wholeTries {
			return a, nil
		}
		a.Attr, a.parts = home, nil // some of it has changed meanwhile
		if !c.believes(home.Ino, a.ino) {
			k := c.begin(op.Getattr, home.Ino)
			k.Ino = home.Ino
			a, err = c.attrs(ctx, k)
		}
	}
	return a, err
}

// merged puts together what is known of a directory and its partitions.
func merged(a *answer, parts []answer) answer {
	all := *a
	all.parts = make([]partBelief, len(parts))
	for i := range parts {
		p := &parts[i]
		all.Attr.Merge(&p.Attr)
		all.parts[i] = partBelief{p.Ino, p.ino}
		all.mark = min(all.mark, p.mark)
	}
	all.Gen, all.Bound = 0, 0
	return all
}

// stands reports whether all of a can be believed now.
func (c *Client) stands(a *answer) bool { return c.holds(a) && time.Now().Before(c.heldUntil(a)) }

// heldUntil returns until when the leases hold on which the attributes in a rest, if none is revoked.
func (c *Client) heldUntil(a *answer) time.Time {
	until := c.believedUntil(a.Ino)
	for _, p := range a.parts {
		if t := c.believedUntil(p.ino); t.Before(until) {
			until = t
		}
	}
	return until
}

// holds reports whether the leases hold on which the attributes in a rest.
func (c *Client) holds(a *answer) bool {
	if !c.leases.holds(a.Ino, a.ino) {
		return false
	}
	for _, p := range a.parts {
		if !c.leases.holds(p.ino, p.belief) {
			return false
		}
	}
	return true
}

// partAttrs returns the attributes of partitions; those that are not believed are asked for. gone says
// that one is not there any more.
func (c *Client) partAttrs(ctx context.Context, list []sealfs.Ino) (parts []answer, gone bool, err error) {
	parts = make([]answer, len(list))
	errs := make([]error, len(list))
	slots := make(chan struct{}, askAtOnce)
	var all sync.WaitGroup
	for i, p := range list {
		if known, ok := c.oneDirAttr(p); ok {
			parts[i] = known
			continue
		}
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			k := c.begin(op.Getattr, p)
			k.Ino = p
			parts[i], errs[i] = c.attrs(ctx, k)
			if errs[i] == nil {
				c.dirs.note(&parts[i].Attr, parts[i].ino, parts[i].mark)
			}
		})
	}
	all.Wait()
	for _, e := range errs {
		if e == sealfs.ErrNotExist {
			gone = true
		} else if e != nil {
			return nil, false, e
		}
	}
	return parts, gone, nil
}

// dirAttr returns what is known of a directory without asking.
func (c *Client) dirAttr(ino sealfs.Ino) (answer, bool) {
	a, ok := c.oneDirAttr(ino)
	if !ok || !a.IsSplit() {
		return a, ok
	}
	list := c.splits.list(ino)
	if uint64(len(list)) < a.Moved() {
		return answer{}, false
	}
	parts := make([]answer, a.Moved())
	for i := range parts {
		if parts[i], ok = c.oneDirAttr(list[i]); !ok {
			return answer{}, false
		}
	}
	return merged(&a, parts), true
}

// readdirAt returns where the entries of a directory after a cookie are, and the cookie
// after which those of the next place begin, 0 if there is none.
func (c *Client) readdirAt(dir sealfs.Ino, cookie uint64) (at sealfs.Ino, next uint64) {
	list := c.splits.list(dir)
	p := op.PartitionOf(cookie + 1)
	if p >= uint64(len(list)) {
		return dir, 0
	}
	if p+1 < op.Partitions {
		next = op.PartitionStart(p+1) - 1
	}
	return list[p], next
}

// PartitionsName is the attribute of a directory whose entries are split over shards that says so.
const PartitionsName = "sealfs.dir.partitions"

// partitionsValue returns the value of PartitionsName: how many partitions of how many are in use, and
// the shard of each.
func (c *Client) partitionsValue(ctx context.Context, dir sealfs.Ino) (string, error) {
	a, _, err := c.learnSplit(ctx, dir)
	if err != nil {
		return "", err
	}
	if !a.IsSplit() {
		return "", sealfs.ErrNoData
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d/%d", a.Moved(), op.Partitions)
	for _, p := range c.splits.list(dir) {
		fmt.Fprintf(&b, " %d", p.Home(c.o.Shards))
	}
	return b.String(), nil
}
