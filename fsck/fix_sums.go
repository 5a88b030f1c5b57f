package fsck

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"sealfs/disk"
	"sealfs/pmem/layout"
)

// Repairs of pages that do not fit their sums, and of sums.

// mendRotten plans what becomes of the pages that do not fit their sums. Root page,
// segment table and bitmaps cannot be made again from nothing: they get the sum of what they say,
// all of which is compared with what else there is. The tree is built anew
// without those of its pages; when nothing refers to them any more, they become zeros.
func (w *walker) mendRotten() {
	c := w.c
	for _, n := range slices.Sorted(maps.Keys(c.img.rotten)) {
		tree, reached := w.trees(n), w.reached.has(n)
		c.mendBy(PageSum, w.where(n), func(*editor) string {
			if p, err := c.img.raw(n); err == nil {
				c.save(Saved{Problem: PageSum, Where: w.where(n), Old: bytes.Clone(p[:])})
			}
			c.w.effects++
			if tree {
				c.last = append(c.last, func(m medium) error { return c.wipe(m, n) })
				if reached {
					return c.newTree() + "; of this one, what can be read"
				}
				return "it is not the tree's: it is overwritten with zeros"
			}
			if m, ok := c.reg.(medium); ok {
				c.raw = append(c.raw, func() error { return c.believe(m, n) })
			}
			if n == layout.RootPage {
				return "what it says is believed as far as it is possible, and " + c.newTree()
			}
			return "what it says is believed as far as nothing contradicts it"
		})
	}
}

// medium is a region that can be written.
type medium interface {
	Medium
	Writer
}

// believe gives a page the sum of what it says.
func (c *checker) believe(m medium, n uint64) error {
	b := disk.AlignedBuffer(pageSize)
	if _, err := m.ReadAt(b, int64(n)*pageSize); err != nil && err != io.EOF {
		return fmt.Errorf("read of page %d of %s: %w", n, m.Name(), err)
	}
	return c.putSum(m, n, c.sums.sum(n, b))
}

// wipe makes a page that nothing refers to one that was never written.
func (c *checker) wipe(m medium, n uint64) error {
	if _, err := m.WriteAt(disk.AlignedBuffer(pageSize), int64(n)*pageSize); err != nil {
		return err
	}
	return c.putSum(m, n, layout.SumNone)
}

// clearSum plans to clear the sum of a page that has none.
func (c *checker) clearSum(n uint64, sum uint32) string {
	m, ok := c.reg.(medium)
	if !ok {
		return ""
	}
	at, off := layout.SumPage(n, c.sums.table)
	c.save(Saved{Problem: SumStray, Where: fmt.Sprintf("%s, page %d, byte %d", c.reg.Name(), at, off), Old: binary.LittleEndian.AppendUint32(nil, sum)})
	c.w.effects++
	c.raw = append(c.raw, func() error { return c.putSum(m, n, layout.SumNone) })
	return "it is cleared"
}

// putSum writes the sum of a page.
func (c *checker) putSum(m medium, n uint64, sum uint32) error {
	at, off := layout.SumPage(n, c.sums.table)
	b := disk.AlignedBuffer(pageSize)
	if _, err := m.ReadAt(b, int64(at)*pageSize); err != nil && err != io.EOF {
		return fmt.Errorf("read of sum page %d of %s: %w", at, m.Name(), err)
	}
	binary.LittleEndian.PutUint32(b[off:], sum)
	if _, err := m.WriteAt(b, int64(at)*pageSize); err != nil {
		return err
	}
	return m.Flush()
}

// finish makes the writes to the region that come after everything else.
func (c *checker) finish() (err error) {
	if len(c.last) == 0 {
		return nil
	}
	m, ok := c.o.Reg.(medium)
	if c.o.Reg == nil {
		if err := c.closeRegion(); err != nil {
			return err
		}
		reg, err := disk.Open(c.rep.Region, disk.OpenOptions{Exclusive: true})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, reg.Close()) }()
		m, ok = reg, true
	}
	for _, write := range c.last {
		if ok {
			err = errors.Join(err, write(m))
		}
	}
	return err
}
