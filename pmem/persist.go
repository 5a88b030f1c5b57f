package pmem

import (
	"sealfs/alloc"
	"sealfs/pmem/layout"
)

// install is the only way by which committed bytes enter the region: b replaces
// what stands at off of page n, whose bytes are p. A medium whose mapping is
// durable itself flushes the lines of that range here, and fences once in Commit
// and ApplyRedo; in a file-backed region the checkpoint does all that is needed.
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
