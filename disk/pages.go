package disk

// Geometry of pages: a leaf covers 1 MiB, so that the first write after a
// fork copies the leaf table, 8 bytes per MiB of the device, and the first into
// each leaf 2 KiB of pointers. The fork itself copies nothing.
const (
	pageSize  = 4096
	leafPages = 256
	leafSize  = leafPages * pageSize
)

// pages is a sparse run of bytes that copies on write: forks share all they have
// in common. A table, leaf or page may be changed in place only by the owner
// that made it. Reads of one value may run concurrently; nothing else may.
type pages struct {
	me    *owner
	table *leafTable
}

// owner is an identity; it needs a size to have an address of its own.
type owner struct{ _ byte }

type leafTable struct {
	owner  *owner
	leaves []*leaf
}

type leaf struct {
	owner *owner
	own   [leafPages / 64]uint64 // pages that the owner of the leaf made
	pages [leafPages]*[pageSize]byte
}

func newPages(size int64) pages {
	me := &owner{}
	n := (size + leafSize - 1) / leafSize
	return pages{me: me, table: &leafTable{owner: me, leaves: make([]*leaf, n)}}
}

// fork returns pages of equal content that may be changed without changing t. t
// itself must not be changed any more.
func (t pages) fork() pages { return pages{me: &owner{}, table: t.table} }

// share is fork for a t that goes on changing: from here on both sides copy what
// they change.
func (t *pages) share() pages {
	t.me = &owner{}
	return t.fork()
}

// read fills p from off, which must lie inside.
func (t *pages) read(p []byte, off int64) {
	for len(p) > 0 {
		in := int(off % pageSize)
		n := min(len(p), pageSize-in)
		l := t.table.leaves[off/leafSize]
		if l == nil || l.pages[off%leafSize/pageSize] == nil {
			clear(p[:n])
		} else {
			copy(p[:n], l.pages[off%leafSize/pageSize][in:])
		}
		p, off = p[n:], off+int64(n)
	}
}

// write copies p to off, which must lie inside.
func (t *pages) write(p []byte, off int64) {
	for len(p) > 0 {
		in := int(off % pageSize)
		n := min(len(p), pageSize-in)
		l, i := t.leaf(off), off%leafSize/pageSize
		copy(l.page(i, n < pageSize)[in:], p[:n])
		p, off = p[n:], off+int64(n)
	}
}

// zero clears n bytes at off, which must lie inside, and frees whole pages.
func (t *pages) zero(off, n int64) {
	for n > 0 {
		in := off % pageSize
		m := min(n, pageSize-in)
		if l := t.table.leaves[off/leafSize]; l != nil && l.pages[off%leafSize/pageSize] != nil {
			l, i := t.leaf(off), off%leafSize/pageSize
			if m == pageSize {
				l.pages[i] = nil
			} else {
				clear(l.page(i, true)[in : in+m])
			}
		}
		off, n = off+m, n-m
	}
}

// leaf returns the leaf of off, made or copied so that t owns it.
func (t *pages) leaf(off int64) *leaf {
	if t.table.owner != t.me {
		leaves := append([]*leaf(nil), t.table.leaves...)
		t.table = &leafTable{owner: t.me, leaves: leaves}
	}
	l := t.table.leaves[off/leafSize]
	if l == nil || l.owner != t.me {
		mine := &leaf{owner: t.me}
		if l != nil {
			mine.pages = l.pages
		}
		l = mine
		t.table.leaves[off/leafSize] = l
	}
	return l
}

// page returns page i of an owned leaf for writing, with its old bytes if keep,
// else with any.
func (l *leaf) page(i int64, keep bool) *[pageSize]byte {
	p := l.pages[i]
	if p != nil && l.own[i/64]&(1<<(i%64)) != 0 {
		return p
	}
	mine := new([pageSize]byte)
	if p != nil && keep {
		*mine = *p
	}
	l.pages[i] = mine
	l.own[i/64] |= 1 << (i % 64)
	return mine
}
