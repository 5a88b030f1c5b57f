package mend

import (
	"encoding/binary"
	"fmt"

	"sealfs"
	"sealfs/lsfs"
	"sealfs/pmem"
	"sealfs/pmem/layout"
)

// A new tree is written to pages that the old one does not use. Until the root
// page names its root, which is one transaction, nothing has happened but that
// pages are taken.

// room returns the pages for the new tree, for which the region is made large enough.
func (j *Job) room() ([]uint64, error) {
	n := 0
	b := builder{emit: func(uint64, []byte) error { n++; return nil }, next: func() (uint64, error) { return 0, nil }}
	if _, err := b.build(j); err != nil {
		return nil, err
	}
	pages := j.Tree.Free
	if len(pages) >= n {
		return pages[:n], nil
	}
	at := uint64(j.Region.Size()) / layout.PageSize
	for ; len(pages) < n; at++ {
		if at%layout.GroupPages >= layout.Reserved(at/layout.GroupPages, 0) {
			pages = append(pages, at)
		}
	}
	return pages, j.Region.Grow(int64(at) * layout.PageSize)
}

// tree builds the new tree, makes it the region's, and frees the pages of the old one.
func (m *mender) tree(pages []uint64) error {
	table := m.tablePages()
	var batch []page
	write := func() error {
		err := m.update(lsfs.Intent{}, func(tx *lsfs.Tx) error {
			for _, p := range batch {
				if err := tx.Patch(pmem.PageNo(p.no), 0, p.bytes); err != nil {
					return err
				}
				if err := setBit(tx, table, p.no, true); err != nil {
					return err
				}
			}
			return nil
		})
		batch = batch[:0]
		return err
	}
	// A record must fit a segment.
	most := max(1, min(64, int(m.s.Superblock().SegmentBytes)/2/layout.PageSize-1))
	used := 0
	b := builder{
		next: func() (uint64, error) {
			if used == len(pages) {
				return 0, fmt.Errorf("the records are more than they were: %w", sealfs.ErrInvalid)
			}
			used++
			return pages[used-1], nil
		},
		emit: func(no uint64, bytes []byte) error {
			if batch = append(batch, page{no, bytes}); len(batch) < most {
				return nil
			}
			return write()
		},
	}
	root, err := b.build(m.j)
	if err == nil {
		err = write()
	}
	if err != nil {
		return err
	}
	err = m.update(lsfs.Intent{}, func(tx *lsfs.Tx) error {
		r := binary.LittleEndian.AppendUint64(nil, root)
		r = binary.LittleEndian.AppendUint64(r, uint64(used))
		r = binary.LittleEndian.AppendUint64(r, b.keys)
		return tx.Patch(layout.RootPage, layout.RootTreeOff, r)
	})
	if err != nil {
		return err
	}
	free := map[uint64]bool{}
	for _, n := range m.j.Tree.Old {
		free[n] = false
	}
	m.j.Bits, m.j.Counts = free, nil
	return m.pages()
}

type page struct {
	no    uint64
	bytes []byte
}

// builder makes the pages of a tree from records in order.
type builder struct {
	emit   func(no uint64, bytes []byte) error // keeps bytes
	next   func() (uint64, error)              // the number of the next page
	levels []*growing
	keys   uint64
}

// growing is a page that is being filled.
type growing struct {
	bytes []byte
	no    uint64
	cells int
	heap  int
	first []byte // key
}

// slack is left free in every page, so that the first inserts do not split all of them.
const slack = layout.PageSize / 10

// build makes the pages of all records and returns the number of the root's.
func (b *builder) build(j *Job) (root uint64, err error) {
	if err := b.open(0, nil); err != nil {
		return 0, err
	}
	err = j.Tree.Rows(func(key, val []byte) error {
		b.keys++
		return b.add(0, key, val)
	})
	if err != nil {
		return 0, err
	}
	for level := 0; ; level++ {
		p := b.levels[level]
		if level == len(b.levels)-1 {
			return p.no, b.emit(p.no, p.finish())
		}
		if err := b.close(level); err != nil {
			return 0, err
		}
	}
}

func (b *builder) open(level int, first []byte) error {
	no, err := b.next()
	if err != nil {
		return err
	}
	p := &growing{bytes: layout.EncodeTree(), no: no, heap: layout.PageSize, first: append([]byte(nil), first...)}
	p.bytes[layout.TreeLevelOff] = byte(level)
	if level == len(b.levels) {
		b.levels = append(b.levels, nil)
	}
	b.levels[level] = p
	return nil
}

// add adds a cell to the page that is being filled on a level.
func (b *builder) add(level int, key, val []byte) error {
	p := b.levels[level]
	need := layout.CellHeader + len(key) + len(val) + 2
	if p.cells > 0 && layout.TreeHeader+2*p.cells+need+slack > p.heap {
		if err := b.close(level); err != nil {
			return err
		}
		if err := b.open(level, key); err != nil {
			return err
		}
		p = b.levels[level]
	}
	if p.cells == 0 {
		p.first = append(p.first[:0], key...)
		if level > 0 {
			key = nil
		}
	}
	p.heap -= layout.CellHeader + len(key) + len(val)
	h := len(key) | len(val)<<layout.CellKeyBits
	c := p.bytes[p.heap:]
	c[0], c[1], c[2] = byte(h), byte(h>>8), byte(h>>16)
	copy(c[layout.CellHeader:], key)
	copy(c[layout.CellHeader+len(key):], val)
	binary.LittleEndian.PutUint16(p.bytes[layout.TreeHeader+2*p.cells:], uint16(p.heap))
	p.cells++
	return nil
}

// close hands a full page on, and makes it known on the level above.
func (b *builder) close(level int) error {
	p := b.levels[level]
	if level+1 == len(b.levels) {
		if err := b.open(level+1, p.first); err != nil {
			return err
		}
	}
	child := binary.LittleEndian.AppendUint64(nil, p.no)[:layout.ChildBytes]
	if err := b.emit(p.no, p.finish()); err != nil {
		return err
	}
	return b.add(level+1, p.first, child)
}

func (p *growing) finish() []byte {
	binary.LittleEndian.PutUint16(p.bytes[layout.TreeCountOff:], uint16(p.cells))
	binary.LittleEndian.PutUint16(p.bytes[layout.TreeHeapOff:], uint16(p.heap))
	return p.bytes
}
