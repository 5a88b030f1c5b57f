package fsck

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
)

// workersMax bounds how many goroutines share a pass.
const workersMax = 8

// ref says where a record stands: in which leaf, or in which edit.
type ref struct {
	leaf uint32 // index in leaves, or edited with an index in edits
	cell uint16
}

// edited marks a ref to a record that repairs have written.
const edited = 1 << 31

// shardOf returns the shard in whose order a key stands, whatever it is.
func shardOf(key []byte) int {
	switch len(key) {
	case 0:
		return 0
	case 1:
		return int(key[0]) << 8
	}
	return int(key[0])<<8 | int(key[1])
}

// parts divides the shards that have records into at most n ranges of about as
// many leaves. It returns the first shard of each, and the end.
func (c *checker) parts(n int) []int {
	bounds := []int{0}
	if len(c.leaves) < 64*n || c.unordered.Load() {
		n = 1
	}
	for i := 1; i < n; i++ {
		if s := int(c.leaves[len(c.leaves)*i/n].shard); s > bounds[len(bounds)-1] {
			bounds = append(bounds, s)
		}
	}
	return append(bounds, 1<<16)
}

// share runs fn for each of n parts of a pass, several at a time, and hands on
// what they have found in the order of the parts.
func (c *checker) share(n int, fn func(part int, s *sink) error) error {
	sinks, errs := make([]sink, n), make([]error, n)
	var next atomic.Int32
	var all sync.WaitGroup
	for range min(n, workersMax, runtime.GOMAXPROCS(0)) {
		all.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				sinks[i].c = c
				errs[i] = fn(i, &sinks[i])
			}
		})
	}
	all.Wait()
	for i := range sinks {
		sinks[i].flush()
	}
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// sink collects what one part of a pass finds.
type sink struct {
	c     *checker
	found []finding
	count map[ID]int
	holes bool
}

// finding is a problem of a store that is still to be reported, or a repair.
type finding struct {
	c             *checker
	id            ID
	where, detail string
	fix           *fix
}

// problem notes a problem of the store that c checks. Only as many as are
// reported in full keep their words.
func (s *sink) problem(c *checker, id ID, where, format string, args ...any) {
	if s.count == nil {
		s.count = map[ID]int{}
	}
	f := finding{c: c, id: id}
	if s.count[id]++; s.count[id] <= c.o.Keep {
		f.where, f.detail = where, fmt.Sprintf(format, args...)
	}
	s.found = append(s.found, f)
}

// flush reports what was found.
func (s *sink) flush() {
	s.c.holes = s.c.holes || s.holes
	for i := range s.found {
		f := &s.found[i]
		if f.fix != nil {
			f.c.addFix(f.fix)
			continue
		}
		f.c.problem(f.id, f.where, "%s", f.detail)
	}
	s.found = nil
}

// rows calls fn for the records of the sound leaves whose shard is in [lo, hi), in
// the order of their keys, with the edits of repairs in place of what they change.
// Key and value are valid until fn returns.
func (c *checker) rows(number, lo, hi int, fn func(at ref, key, val []byte) error) error {
	// The first leaf that may hold records of the shard lo: the last that begins before.
	first := 0
	if lo > 0 {
		n := len(c.leaves)
		for first < n {
			if m := int(uint(first+n) / 2); int(c.leaves[m].shard) < lo {
				first = m + 1
			} else {
				n = m
			}
		}
		first = max(first-1, 0)
	}
	ov := c.over.from(lo)
	pages := c.img.reader()
	for i := first; i < len(c.leaves) && int(c.leaves[i].shard) < hi; i++ {
		if i%256 == 0 {
			if err := c.tick(number, int64(i), int64(len(c.leaves))); err != nil {
				return err
			}
		}
		l := &c.leaves[i]
		p, err := pages.page(l.page)
		if err != nil { // it could be read before
			return err
		}
		for j := range int(l.cells) {
			key, val := cell(p, j)
			if s := shardOf(key); s < lo || s >= hi {
				continue
			}
			if ov.active() {
				replaced, err := ov.before(key, hi, fn)
				if err != nil {
					return err
				}
				if replaced {
					continue
				}
			}
			if err := fn(ref{uint32(i), uint16(j)}, key, val); err != nil {
				return err
			}
		}
	}
	return ov.rest(hi, fn)
}

// record returns the record at a place where a scan has found one.
func (c *checker) record(at ref) (key, val []byte, err error) {
	if at.leaf&edited != 0 {
		e := &c.over.list[at.leaf&^edited]
		return e.key, e.val, nil
	}
	p, err := c.img.page(c.leaves[at.leaf].page)
	if err != nil {
		return nil, nil, err
	}
	key, val = cell(p, int(at.cell))
	return key, val, nil
}
