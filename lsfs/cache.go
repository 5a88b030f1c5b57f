package lsfs

import (
	"sync"

	"sealfs"
	"sealfs/disk"
)

// windowBytes is what one miss reads: small files that were written together
// stand together, and are often read together.
const windowBytes = 64 << 10

// A cache keeps windows of segments that are no longer in the ring. Nothing in
// such a segment changes while it exists, and its sequence number is never used
// again, so there is nothing to invalidate.
type cache struct {
	mu      sync.Mutex
	frames  []frame
	where   map[sealfs.LSN]int // window → frame
	hand    int                // of the clock
	scratch sync.Pool          // *[]byte, aligned, for reads that are not cached
}

type frame struct {
	at   sealfs.LSN // of the window; 0: free
	data []byte
	used bool // since the hand passed
	busy int  // copies under way
}

func newCache(bytes int64) *cache {
	c := &cache{frames: make([]frame, max(bytes/windowBytes, 2)), where: map[sealfs.LSN]int{}}
	c.scratch.New = func() any { b := disk.AlignedBuffer(PayloadMax + 2*4096); return &b }
	return c
}

// read fills f.Dst, whose segment is pinned.
func (c *cache) read(s *Store, f *Fetch) error {
	for done := 0; done < len(f.Dst); {
		at := f.At + sealfs.LSN(done)
		win := at &^ (windowBytes - 1)
		if n := c.copyOut(win, int(at-win), f.Dst[done:]); n > 0 {
			s.stats.cacheHits.Add(1)
			done += n
			continue
		}
		if !f.Around {
			return c.direct(s, f, done)
		}
		if c.fill(s, f.slot, win) != nil {
			return c.direct(s, f, done) // what cannot be read may be a neighbour's
		}
		s.stats.cacheMisses.Add(1)
		if n := c.copyOut(win, int(at-win), f.Dst[done:]); n > 0 {
			done += n
			continue
		}
		return c.direct(s, f, done) // evicted at once: the cache is tiny or under siege
	}
	return nil
}

// copyOut copies from a cached window and returns how much, 0 if it is not there.
func (c *cache) copyOut(win sealfs.LSN, off int, dst []byte) int {
	c.mu.Lock()
	i, ok := c.where[win]
	if !ok {
		c.mu.Unlock()
		return 0
	}
	fr := &c.frames[i]
	fr.used = true
	fr.busy++
	data := fr.data
	c.mu.Unlock()
	n := copy(dst, data[min(off, len(data)):])
	c.mu.Lock()
	fr.busy--
	c.mu.Unlock()
	return n
}

// fill reads a window into the cache.
func (c *cache) fill(s *Store, slot uint32, win sealfs.LSN) error {
	n := min(windowBytes, s.seg-int64(win.Off()))
	c.mu.Lock()
	i := c.victim()
	var data []byte
	if i >= 0 {
		fr := &c.frames[i]
		delete(c.where, fr.at)
		data, fr.at, fr.data = fr.data, 0, nil
		fr.busy = 1 // nobody's until it is filled
	}
	c.mu.Unlock()
	if i < 0 {
		return nil
	}
	if cap(data) < windowBytes {
		data = disk.AlignedBuffer(windowBytes)
	}
	data = data[:n]
	_, err := s.dev.ReadAt(data, s.slotOffset(slot)+int64(win.Off()))
	s.stats.deviceReads.Add(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	fr := &c.frames[i]
	fr.data, fr.busy = data, 0
	if err != nil {
		return err
	}
	if _, ok := c.where[win]; !ok { // else another reader was faster
		fr.at, fr.used = win, true
		c.where[win] = i
	}
	return nil
}

// victim returns a frame to fill, -1 if all are busy. Needs mu.
func (c *cache) victim() int {
	for range 2 * len(c.frames) {
		i := c.hand
		c.hand = (c.hand + 1) % len(c.frames)
		fr := &c.frames[i]
		if fr.busy == 0 && !fr.used {
			return i
		}
		fr.used = false
	}
	return -1
}

// direct reads the rest of f past the cache, through an aligned buffer.
func (c *cache) direct(s *Store, f *Fetch, done int) error {
	for done < len(f.Dst) {
		at := s.slotOffset(f.slot) + int64(f.At.Off()) + int64(done)
		from := at &^ 4095
		n := min(len(f.Dst)-done, PayloadMax)
		to := (at + int64(n) + 4095) &^ 4095
		bp := c.scratch.Get().(*[]byte)
		b := (*bp)[:to-from]
		_, err := s.dev.ReadAt(b, from)
		if err == nil {
			copy(f.Dst[done:done+n], b[at-from:])
		}
		c.scratch.Put(bp)
		s.stats.deviceReads.Add(1)
		if err != nil {
			return err
		}
		done += n
	}
	return nil
}

// forget drops the windows over [at, at+n).
func (c *cache) forget(at sealfs.LSN, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for win := at &^ (windowBytes - 1); win < at+sealfs.LSN(n); win += windowBytes {
		if i, ok := c.where[win]; ok && c.frames[i].busy == 0 {
			delete(c.where, win)
			c.frames[i].at, c.frames[i].used = 0, false
		}
	}
}
