package fsck

import (
	"encoding/binary"
	"fmt"
	"io"

	"sealfs"
	"sealfs/pmem/layout"
)

const (
	pageSize = layout.PageSize
	// pagesMax bounds the region: redo beyond is damage, not growth (1 TiB).
	pagesMax = 1 << 28
	// cachePages is how many unchanged pages are kept, of all stores together;
	// cachePagesMin at least of each.
	cachePages    = 8192
	cachePagesMin = 512
)

// image is the region as the next recovery will find it: the medium's pages,
// and over them, in memory, those that redo changes.
type image struct {
	m       Medium
	pages   uint64 // of the region, with what redo adds
	stored  uint64 // of them, on the medium
	changed map[uint64]*[pageSize]byte
	cache   []cached // by page number, direct-mapped
	sums    *pageSums
	rotten  map[uint64]string // pages that do not fit their sums, and how
	swept   bool              // all of those are known
}

type cached struct {
	no uint64
	p  *[pageSize]byte
}

func newImage(m Medium, cache int, sums *pageSums) *image {
	n := min(uint64(m.Size())/pageSize, pagesMax)
	return &image{m: m, pages: n, stored: n, changed: map[uint64]*[pageSize]byte{}, cache: make([]cached, cache),
		sums: sums, rotten: map[uint64]string{}}
}

// page returns a page, which the caller must not change. It stays valid. One
// that does not fit its sum is a *sealfs.Corruption, as it is for the store.
func (g *image) page(n uint64) (*[pageSize]byte, error) {
	if what := g.rotten[n]; what != "" {
		return nil, &sealfs.Corruption{Where: g.m.Name(), Off: int64(n) * pageSize, What: what}
	}
	if p := g.changed[n]; p != nil {
		return p, nil
	}
	if n >= g.pages {
		return nil, &sealfs.Corruption{Where: g.m.Name(), Off: -1, What: fmt.Sprintf("page %d lies beyond the region's %d", n, g.pages)}
	}
	slot := &g.cache[n%uint64(len(g.cache))]
	if slot.p != nil && slot.no == n {
		return slot.p, nil
	}
	p, err := g.read(n)
	if err != nil {
		return nil, err
	}
	if !g.swept {
		what, _, err := g.sums.fault(n, p[:])
		if err != nil {
			return nil, err
		}
		if what != "" {
			g.rotten[n] = what
			return g.page(n)
		}
	}
	*slot = cached{n, p}
	return p, nil
}

// read returns a page as it is on the medium.
func (g *image) read(n uint64) (*[pageSize]byte, error) {
	p := new([pageSize]byte)
	if n < g.stored {
		if got, err := g.m.ReadAt(p[:], int64(n)*pageSize); err != nil && (err != io.EOF || got < pageSize) {
			return nil, fmt.Errorf("read of page %d of %s: %w: %w", n, g.m.Name(), err, sealfs.ErrIO)
		}
	}
	return p, nil
}

// redo applies the redo of one record. Redo that breaks a rule is a
// *sealfs.Corruption; what stood before the fault has been applied then.
//
//	page    uvarint: page number less that of the page before (0 for the first)
//	ranges  one or more, ascending, neither touching nor overlapping:
//	        uvarint: (offset less the end of the range before) * 2, plus 1 if another follows
//	        uvarint: length, at least 1
//	        bytes
func (g *image) redo(redo []byte) error {
	bad := func(what string) error {
		return &sealfs.Corruption{Where: g.m.Name(), Off: -1, What: what}
	}
	short := false
	number := func() uint64 {
		v, n := binary.Uvarint(redo)
		if n <= 0 {
			short = true
			return 0
		}
		redo = redo[n:]
		return v
	}
	page := uint64(0)
	for len(redo) > 0 {
		delta := number()
		switch {
		case short || delta == 0 || delta >= pagesMax || page+delta >= pagesMax:
			return bad("redo page")
		case !layout.HasSum(page+delta, g.sums.table):
			return bad("redo of a header slot, intent or sum page")
		}
		page += delta
		p, err := g.change(page)
		if err != nil {
			return err
		}
		end := uint64(0)
		for more := true; more; {
			off, size := number(), number()
			more = off&1 != 0
			off >>= 1
			if short || off > pageSize || size == 0 || size > pageSize || end+off+size > pageSize || end > 0 && off == 0 {
				return bad("redo range")
			}
			if size > uint64(len(redo)) {
				return bad("redo ends early")
			}
			copy(p[end+off:], redo[:size])
			redo = redo[size:]
			end += off + size
		}
	}
	return nil
}

// change returns page n to be changed; the region grows to hold it. Redo heals a
// torn page if a checkpoint was writing; else a page that does not fit its sum has
// rotted, and stays so.
func (g *image) change(n uint64) (*[pageSize]byte, error) {
	if p := g.changed[n]; p != nil {
		return p, nil
	}
	p, err := g.read(n)
	if err != nil {
		return nil, err
	}
	what, givenUp, err := g.sums.fault(n, p[:])
	if err != nil {
		return nil, err
	}
	if what != "" && (givenUp || !g.sums.healing) {
		g.rotten[n] = what
	}
	g.pages = max(g.pages, n+1)
	g.changed[n] = p
	return p, nil
}

// state returns the 2 KiB of the root page that belong to the store.
func (g *image) state() ([]byte, error) {
	p, err := g.page(layout.RootPage)
	if err != nil {
		return nil, err
	}
	return p[layout.StateOff:], nil
}
