package lsfs

import (
	"fmt"
	"io"
	"math"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// farReader reads a far checkpoint: all of it can be found from the superblock
// and the headers of segments, without a region.
type farReader struct {
	s      *Store
	slotOf func(seq uint32) (uint32, bool) // of a far segment
	buf    []byte                          // what was read last
	off    int64                           // its place on the device
}

func (r *farReader) bad(slot uint32, at sealfs.LSN, format string, args ...any) error {
	off := int64(-1)
	if slot < uint32(len(r.s.segs)) {
		off = r.s.slotOffset(slot) + int64(at.Off())
	}
	return &sealfs.Corruption{Where: r.s.dev.Name(), Off: off, What: fmt.Sprintf(format, args...)}
}

// read returns n bytes of the device, and reads ahead. They are valid until the
// next call.
func (r *farReader) read(off int64, n int) ([]byte, error) {
	if at := off - r.off; at >= 0 && at+int64(n) <= int64(len(r.buf)) {
		return r.buf[at:][:n], nil
	}
	if cap(r.buf) < n {
		r.buf = disk.AlignedBuffer(max(n, 1<<20))
	}
	r.buf = r.buf[:cap(r.buf)]
	got, err := r.s.dev.ReadAt(r.buf, off)
	if err != nil && (err != io.EOF || got < n) {
		// A bad block further on must not hide this one.
		if got, err = r.s.dev.ReadAt(r.buf[:n], off); err != nil && (err != io.EOF || got < n) {
			r.buf = r.buf[:0]
			return nil, fmt.Errorf("read of %d bytes at byte %d of %s: %w: %w", n, off, r.s.dev.Name(), err, sealfs.ErrIO)
		}
	}
	r.buf, r.off = r.buf[:got], off
	return r.buf[:n], nil
}

// page returns the copy that ref refers to, verified. It is valid until the next
// call.
func (r *farReader) page(ref layout.FarRef, what string, no uint64) ([]byte, error) {
	slot, ok := r.slotOf(ref.At.Seq())
	if !ok {
		return nil, r.bad(layout.NoSlot, ref.At, "the far segment %d, which should hold the copy of %s %d, is not there", ref.At.Seq(), what, no)
	}
	if off := ref.At.Off(); off%layout.BlockSize != 0 || off < 2*layout.BlockSize || int64(off)+layout.BlockSize > r.s.seg {
		return nil, r.bad(slot, ref.At, "the copy of %s %d is said to stand at %v, where none can", what, no, ref.At)
	}
	p, err := r.read(r.s.slotOffset(slot)+int64(ref.At.Off()), layout.BlockSize)
	if err != nil {
		return nil, err
	}
	if !ref.Is(p) {
		return nil, r.bad(slot, ref.At, "the copy of %s %d does not verify", what, no)
	}
	return p, nil
}

// part returns one part of a root and the references in it.
func (r *farReader) part(slot uint32, at sealfs.LSN) (root layout.FarRoot, refs []byte, err error) {
	s := r.s
	bad := func(what string) (layout.FarRoot, []byte, error) {
		return root, nil, r.bad(slot, at, "the root of the far checkpoint at %v: %s", at, what)
	}
	if slot >= uint32(len(s.segs)) || at.Off()%layout.BlockSize != 0 || at.Off() < layout.BlockSize || int64(at.Off()) >= s.seg {
		return bad("it stands where none can")
	}
	b, err := r.read(s.slotOffset(slot), layout.BlockSize)
	if err != nil {
		return root, nil, err
	}
	h, err := layout.DecodeSegmentHeader(b, s.store, s.dev.Name(), slot, s.slotOffset(slot))
	if err != nil {
		return root, nil, err
	}
	if h.Kind != layout.Far || h.Seq != at.Seq() {
		return bad("another segment has taken its place")
	}
	n := int(min(s.seg-int64(at.Off()), recordMax))
	if b, err = r.read(s.slotOffset(slot)+int64(at.Off()), n); err != nil {
		return root, nil, err
	}
	rec, _, op, payload, _, err := layout.DecodeRecordLoose(b, layout.ChainSeed(s.store, h.Incarnation), at)
	if err != nil || rec.Kind != layout.KindFarRoot || !rec.PayloadOK(payload) {
		return bad("its record does not verify")
	}
	root, ok := layout.ReadFarRoot(op)
	if !ok || uint64(root.Refs)*layout.FarRefBytes > uint64(len(payload)) {
		return bad("it contradicts itself")
	}
	return root, append([]byte(nil), payload[:int(root.Refs)*layout.FarRefBytes]...), nil
}

// root reads the root that the superblock names: its last part, and where the
// copies of all map pages stand.
func (r *farReader) root(sb *layout.Superblock) (last layout.FarRoot, maps []layout.FarRef, err error) {
	var parts [][]byte
	for slot, at := sb.FarSlot, sb.FarRoot; ; {
		p, refs, err := r.part(slot, at)
		if err != nil {
			return last, nil, err
		}
		if parts = append(parts, refs); len(parts) == 1 {
			last = p
		}
		if p.Generation != last.Generation || p.Start != last.Start || p.Parts != last.Parts || p.Pages != last.Pages ||
			int(p.Part) != int(last.Parts)-len(parts) || p.Prev >= at || last.Start != sb.FarStart {
			return last, nil, r.bad(slot, at, "the parts of the far checkpoint's root at %v do not belong together", sb.FarRoot)
		}
		if p.Part == 0 {
			break
		}
		slot, at = p.PrevSlot, p.Prev
	}
	for i := len(parts) - 1; i >= 0; i-- {
		for b := parts[i]; len(b) > 0; b = b[layout.FarRefBytes:] {
			maps = append(maps, layout.GetFarRef(b))
		}
	}
	if uint64(len(maps)) != layout.FarMaps(last.Pages) {
		return last, nil, r.bad(sb.FarSlot, sb.FarRoot, "the far checkpoint's root has %d map pages for %d pages", len(maps), last.Pages)
	}
	return last, maps, nil
}

// refs calls fn for the copy of every page that is not zeros, by page number.
func (r *farReader) refs(maps []layout.FarRef, pages uint64, fn func(no pmem.PageNo, ref layout.FarRef) error) error {
	for i, at := range maps {
		if at.At == 0 {
			continue
		}
		b, err := r.page(at, "map page", uint64(i))
		if err != nil {
			return err
		}
		b = append([]byte(nil), b...)
		for j := range layout.FarMapPages {
			no := pmem.PageNo(i*layout.FarMapPages + j)
			ref := layout.GetFarRef(b[j*layout.FarRefBytes:])
			if ref.At == 0 {
				continue
			}
			if uint64(no) >= pages {
				return r.bad(layout.NoSlot, at.At, "a copy of page %d of a region of %d", no, pages)
			}
			if err := fn(no, ref); err != nil {
				return err
			}
		}
	}
	return nil
}

// loadFar finds out, when the segment table is known, what the last process left
// of far checkpoints. If it cannot be read all that it may need is kept.
func (s *Store) loadFar(sb *layout.Superblock) {
	f := &s.far
	f.segs = map[uint32]*farSegment{}
	for slot, g := range s.segs {
		switch {
		case g.state != segFree && g.kind == layout.Far:
			f.segs[g.seq] = &farSegment{seq: g.seq, slot: uint32(slot)}
		case g.state != segFree && g.kind == layout.Hot && sb.FarRoot != 0 && g.seq >= sb.FarStart.Seq():
			f.base--
		}
	}
	f.reason = "no far checkpoint has been made yet"
	if s.farBytes() < 0 {
		f.reason = "far checkpoints are switched off"
	}
	if sb.FarRoot == 0 || s.farBytes() < 0 {
		return // settle takes the root out of the superblock
	}
	f.root, f.start = sb.FarRoot, sb.FarStart
	if err := s.readFar(sb); err != nil {
		s.log.Error("far checkpoint cannot be read", "dev", s.dev.Name(), "err", err)
		f.maps, f.reason = nil, fmt.Sprintf("the far checkpoint cannot be read: %v", err)
		for _, g := range f.segs {
			g.current, g.named = 0, true
		}
		return
	}
	f.sound, f.reason = true, ""
}

// readFar reads root and map of the durable far checkpoint.
func (s *Store) readFar(sb *layout.Superblock) error {
	f := &s.far
	r := &farReader{s: s, slotOf: f.slotOf}
	root, maps, err := r.root(sb)
	if err != nil {
		return err
	}
	if root.Pages > math.MaxInt/2 || root.Pages > s.region.Counts().MaxPages {
		return r.bad(sb.FarSlot, sb.FarRoot, "the far checkpoint is of a region of %d pages", root.Pages)
	}
	err = r.refs(maps, root.Pages, func(no pmem.PageNo, ref layout.FarRef) error {
		if f.segs[ref.At.Seq()] == nil {
			return r.bad(layout.NoSlot, ref.At, "the far segment %d, which should hold the copy of page %d, is not there", ref.At.Seq(), no)
		}
		f.set(no, ref)
		return nil
	})
	if err != nil {
		return err
	}
	for i, at := range maps {
		if i < len(f.maps) && f.maps[i] != nil && at.At != 0 {
			f.maps[i].at = at
			f.segs[at.At.Seq()].current++
		}
	}
	for _, g := range f.segs {
		g.named = g.current > 0
	}
	for at, slot, n := sb.FarRoot, sb.FarSlot, root.Parts; n > 0; n-- {
		g := f.segs[at.Seq()]
		if g == nil {
			return r.bad(slot, at, "the segment table does not know the far checkpoint's root at %v", at)
		}
		g.named = true
		p, _, err := r.part(slot, at)
		if err != nil {
			return err
		}
		at, slot = p.Prev, p.PrevSlot
	}
	f.gen = root.Generation
	return nil
}

// headers are those of all segments that stand on a device, for who has no
// segment table.
type headers struct {
	slot map[uint32]*layout.SegmentHeader       // by sequence number
	from map[sealfs.LSN][]*layout.SegmentHeader // hot ones, by where the log stood when they were opened
}

// scanHeaders reads the header of every slot. What is not sound is left out: if
// it is needed, its absence will show.
func (s *Store) scanHeaders(incarnation uint32) *headers {
	x := &headers{slot: map[uint32]*layout.SegmentHeader{}, from: map[sealfs.LSN][]*layout.SegmentHeader{}}
	b := disk.AlignedBuffer(layout.BlockSize)
	for slot := range uint32(len(s.segs)) {
		if _, err := s.dev.ReadAt(b, s.slotOffset(slot)); err != nil {
			continue
		}
		h, err := layout.DecodeSegmentHeader(b, s.store, s.dev.Name(), slot, s.slotOffset(slot))
		if err != nil || h.Incarnation > incarnation {
			continue
		}
		// A number can be issued twice: when a power cut took its first use. The last use counts.
		if old := x.slot[h.Seq]; old == nil || old.Incarnation < h.Incarnation {
			x.slot[h.Seq] = h
		}
		if h.Kind == layout.Hot {
			x.from[h.Prev] = append(x.from[h.Prev], h)
		}
	}
	return x
}

// after returns the segment that continues the log at end. If several
// recoveries came to that end, the last one's does: the others were never
// entered, or their records were lost.
func (x *headers) after(end sealfs.LSN, chain uint32) *layout.SegmentHeader {
	var best *layout.SegmentHeader
	for _, h := range x.from[end] {
		if h.Chain == chain && h.Seq > end.Seq() && (best == nil || h.Incarnation > best.Incarnation) {
			best = h
		}
	}
	return best
}

// ends reports whether the log of an incarnation ended at at, since a later one
// went on from there.
func (x *headers) ends(at sealfs.LSN, chain, incarnation uint32) bool {
	h := x.after(at, chain)
	return h != nil && h.Incarnation > incarnation
}

// VerifyFar reads what the far checkpoint consists of, and compares the sums. What
// does not verify is copied again by a far checkpoint that the collector makes
// soon; until then Stats says that the region cannot be rebuilt. It returns how
// many pages were damaged. pace is called with nothing held after about every
// megabyte, with the bytes that were read; its error ends the verification. It
// fails with ErrNotExist if there is no far checkpoint.
func (s *Store) VerifyFar(pace func(bytes int) error) (bad int, err error) {
	for i := -1; ; i++ {
		read, damaged, more, err := s.verifyFar(i)
		bad += damaged
		if err != nil || !more {
			return bad, err
		}
		if read > 0 {
			if err := pace(read); err != nil {
				return bad, err
			}
		}
	}
}

// verifyFar verifies the copies that map page i names, and its own; for -1 the root.
func (s *Store) verifyFar(i int) (read, bad int, more bool, err error) {
	s.gc.mu.Lock()
	defer s.gc.mu.Unlock()
	f := &s.far
	if f.root == 0 || !f.sound {
		s.mu.RLock()
		defer s.mu.RUnlock()
		return 0, 0, false, fmt.Errorf("store on %s has no far checkpoint to verify (%s): %w", s.dev.Name(), f.reason, sealfs.ErrNotExist)
	}
	r := &farReader{s: s, slotOf: f.slotOf}
	if i < 0 {
		sb := s.Superblock()
		if _, _, err := r.root(&sb); err != nil {
			s.farDamaged(err)
			bad++
		}
		return layout.BlockSize, bad, true, nil
	}
	if i >= len(f.maps) {
		return 0, 0, false, nil
	}
	m := f.maps[i]
	if m == nil {
		return 0, 0, true, nil
	}
	if m.at.At != 0 {
		if _, err := r.page(m.at, "map page", uint64(i)); err != nil {
			f.touch(m)
			s.farDamaged(err)
			bad++
		}
	}
	for j, ref := range m.refs {
		if ref.At == 0 {
			continue
		}
		no := pmem.PageNo(i*layout.FarMapPages + j)
		if _, err := r.page(ref, "page", uint64(no)); err != nil {
			f.set(no, layout.FarRef{})
			s.mu.Lock()
			s.region.MarkFar(no)
			s.mu.Unlock()
			s.farDamaged(err)
			bad++
		}
		read += layout.BlockSize
	}
	return read, bad, true, nil
}

// farDamaged notes that the durable far checkpoint is of no use any more.
func (s *Store) farDamaged(err error) {
	s.log.Error("far checkpoint is damaged", "dev", s.dev.Name(), "err", err)
	s.mu.Lock()
	s.far.reason, s.far.retry = fmt.Sprintf("the far checkpoint is damaged: %v", err), 0
	s.mu.Unlock()
	s.pokeCollector()
}

// slotOf returns where a far segment stands.
func (f *farState) slotOf(seq uint32) (uint32, bool) {
	if g := f.segs[seq]; g != nil {
		return g.slot, true
	}
	return 0, false
}
