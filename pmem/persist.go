package pmem

import (
	"bytes"

	"sealfs/alloc"
	"sealfs/pmem/layout"
)

// replace brings committed bytes into the region: b replaces what stands at off
// of page n, whose bytes are p. In a file-backed region the checkpoint does all
// that is needed for them to be durable. On persistent memory the lines that
// change are written back, by the next fence: that of the next record, or of the
// header which says that replay begins behind this one.
func (r *Region) replace(n PageNo, p []byte, off int, b []byte) {
	if r.pm == nil {
		r.install(n, p, off, b)
		return
	}
	for len(b) > 0 {
		k := min(len(b), LineBytes-off%LineBytes)
		if !bytes.Equal(p[off:off+k], b[:k]) {
			r.install(n, p, off, b[:k])
			r.pm.flush(p, off, off+k)
		}
		off, b = off+k, b[k:]
	}
}

// replay is replace for redo. Bytes that are there already are written back, too:
// a process that died may have stored them, and gone no further.
func (r *Region) replay(n PageNo, p []byte, off int, b []byte) {
	r.install(n, p, off, b)
	if r.pm != nil {
		r.pm.flush(p, off, off+len(b))
	}
}

// install is the only way by which bytes enter the region.
func (r *Region) install(n PageNo, p []byte, off int, b []byte) {
	old := p[off : off+len(b)]
	g := uint64(n) / layout.GroupPages
	if uint64(n) != layout.BitmapPage(g, r.tablePages) {
		copy(old, b)
		return
	}
	// A bitmap changes: the count of used pages follows the bits.
	before := alloc.Bitmap(old).Count()
	copy(old, b)
	change := alloc.Bitmap(old).Count() - before
	r.used[g].Add(int32(change))
	r.usedTotal.Add(int64(change))
}
