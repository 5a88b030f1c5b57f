package fsck

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"sealfs/pmem/layout"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// pageSums judges pages by the sums that stand in the region, as the next
// recovery will.
type pageSums struct {
	m       Medium
	off     bool   // the region has none
	seed    uint32 // CRC of the store's id
	table   uint64 // pages of the segment table
	healing bool   // a checkpoint was writing: what redo changes may be torn
	page    [pageSize]byte
	no      uint64 // of the sum page in page; 0: none
}

// intent reads the intent page, and prepares the judgement of all others.
func (c *checker) intent() error {
	h := &c.hdr
	c.sums = &pageSums{m: c.reg, off: h.Incompat&layout.FeatureNoSums != 0, seed: crc32.Checksum(h.Store[:], castagnoli), table: h.TablePages()}
	b := make([]byte, pageSize)
	n, err := c.reg.ReadAt(b, layout.IntentPage*pageSize)
	if err != nil && err != io.EOF {
		return fmt.Errorf("read of the intent page of %s: %w", c.reg.Name(), err)
	}
	update, err := layout.DecodeIntent(c.reg.Name(), h.Store, b[:n])
	if err != nil {
		c.planIntent(c.problem(RegionIntent, c.reg.Name(), "%v", err))
		return nil
	}
	c.sums.healing = update > h.Update
	return nil
}

// planIntent plans to write an intent that is void. If there was one that
// counted, pages are torn, and nothing is repaired.
func (c *checker) planIntent(found int) {
	w, ok := c.reg.(Writer)
	if !ok {
		return
	}
	c.plan(RegionIntent, found, fmt.Sprintf("the intent page of %s is written anew", c.reg.Name()), func() error {
		if _, err := w.WriteAt(layout.EncodeIntent(c.hdr.Store, c.hdr.Update), layout.IntentPage*pageSize); err != nil {
			return err
		}
		return w.Flush()
	})
}

// of returns the stored sum of page n.
func (s *pageSums) of(n uint64) (uint32, error) {
	at, off := layout.SumPage(n, s.table)
	if s.no != at {
		s.no = 0
		got, err := s.m.ReadAt(s.page[:], int64(at)*pageSize)
		if err != nil && err != io.EOF {
			return 0, fmt.Errorf("read of sum page %d of %s: %w", at, s.m.Name(), err)
		}
		clear(s.page[got:])
		s.no = at
	}
	return binary.LittleEndian.Uint32(s.page[off:]), nil
}

// fault returns what is wrong with the bytes p of page n on the medium, or "".
// given up says that a recovery has found the page damaged before.
func (s *pageSums) fault(n uint64, p []byte) (what string, givenUp bool, err error) {
	if s.off || !layout.HasSum(n, s.table) {
		return "", false, nil
	}
	stored, err := s.of(n)
	switch {
	case err != nil:
		return "", false, err
	case stored == layout.SumLost:
		return "a recovery found it damaged and gave it up", true, nil
	case stored == layout.SumNone && allZero(p):
		return "", false, nil
	case stored == layout.SumNone:
		return "it has no sum and is not zeros", false, nil
	}
	sum := crc32.Update(s.seed, castagnoli, binary.LittleEndian.AppendUint64(nil, n))
	sum = crc32.Update(sum, castagnoli, p)
	switch sum { // two values have another meaning
	case layout.SumNone:
		sum = 1
	case layout.SumLost:
		sum--
	}
	if sum != stored {
		return fmt.Sprintf("sum %#x, %#x is stored", sum, stored), false, nil
	}
	return "", false, nil
}

// sweep compares every page of the region with its sum, and reports those that do
// not fit, and sums of pages that have none. Those that redo changes were judged
// before it did.
func (c *checker) sweep() error {
	if c.sums.off {
		return nil
	}
	const step = 256
	buf := make([]byte, step*pageSize)
	for n := uint64(0); n < c.img.stored; n += step {
		if err := c.tick(4, int64(n), int64(c.img.stored)); err != nil {
			return err
		}
		got, err := c.reg.ReadAt(buf, int64(n)*pageSize)
		clear(buf[got:])
		for i := range min(uint64(step), c.img.stored-n) {
			if err != nil && err != io.EOF && uint64(got) < (i+1)*pageSize {
				continue // whoever needs the page says so
			}
			if e := c.judge(n+i, buf[i*pageSize:][:pageSize]); e != nil {
				return e
			}
		}
	}
	for n := c.img.stored; n%layout.GroupPages != 0; n++ { // of the last group
		if err := c.stray(n); err != nil {
			return err
		}
	}
	c.img.swept = true
	return nil
}

// judge reports what is wrong with a page.
func (c *checker) judge(n uint64, p []byte) error {
	if !layout.HasSum(n, c.sums.table) {
		return c.stray(n)
	}
	what := c.img.rotten[n]
	if what == "" && c.img.changed[n] == nil {
		var err error
		if what, _, err = c.sums.fault(n, p); err != nil {
			return c.unreadable(n, err)
		}
	}
	if what == "" {
		return nil
	}
	if c.img.rotten[n] == "" {
		c.img.rotten[n] = what
	}
	c.problem(PageSum, fmt.Sprintf("%s, page %d", c.reg.Name(), n), "%s", what)
	return nil
}

// stray reports a sum of a page that has none.
func (c *checker) stray(n uint64) error {
	if n >= c.img.stored && c.img.changed[n] != nil {
		return nil // the next recovery makes the region larger
	}
	sum, err := c.sums.of(n)
	if err != nil {
		return c.unreadable(n, err)
	}
	if sum != layout.SumNone {
		at, off := layout.SumPage(n, c.sums.table)
		c.problem(SumStray, fmt.Sprintf("%s, page %d", c.reg.Name(), at), "%#x at byte %d, for page %d", sum, off, n)
	}
	return nil
}

// unreadable reports a sum page that cannot be read, at the first of its pages.
func (c *checker) unreadable(n uint64, err error) error {
	if n%layout.SumsPerPage == 0 || n == layout.RootPage {
		c.problem(PageSum, fmt.Sprintf("%s, page %d", c.reg.Name(), n), "%v", err)
	}
	return nil
}
