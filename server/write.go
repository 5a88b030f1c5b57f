package server

import (
	"context"
	"fmt"
	"sync"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// writing is the room for one merged payload; pooled.
type writing struct {
	to    place
	claim *claim
	bound uint64 // what the file's home has just said, for a part: see meta.Part
	req   op.Request
	buf   []byte
	sums  []uint32
}

var writings = sync.Pool{New: func() any { return new(writing) }}

func (st *store) stripe(ino sealfs.Ino) *sync.Mutex {
	return &st.stripes[uint64(ino)*0x9e3779b97f4a7c15>>56]
}

// lockStripe locks it.
func (st *store) lockStripe(ino sealfs.Ino) *sync.Mutex {
	mu := st.stripe(ino)
	st.turns().Lock(mu)
	return mu
}

// write answers Write. Data is cut into payloads that a record can hold; each
// is merged with what the file has in the blocks at its ends. An Append with a Len must
// not go beyond HomeBytes: its sender wants the file to get chunks then. What is Within is cut at the size. The inode's
// stripe is held over the merge, so that nobody changes those blocks meanwhile. It is
// given up when others hold leases, with nothing done yet: then write returns errLeased.
// rep.Off says where the data went.
func (st *store) write(ctx context.Context, cl *claim, req *op.Request, rep *op.Reply) error {
	off, data := req.Off, req.Data
	cl.part = false
	if len(data) == 0 || len(data) > sealfs.IOMax {
		rep.Code = sealfs.ErrInvalid
		return nil
	}
	if req.Flags&op.Append == 0 {
		if off > sealfs.FileSizeMax || uint64(len(data)) > sealfs.FileSizeMax-off {
			rep.Code = sealfs.ErrTooBig
			return nil
		}
		if d, err := st.place(req); err != nil {
			return err
		} else if d.part {
			return st.writePart(ctx, cl, req, rep, d)
		}
	}
	defer st.lockStripe(req.Ino).Unlock()
	size, chunked, err := st.size(req.Ino)
	if err != nil {
		return err
	}
	if req.Flags&op.Append != 0 {
		off = size
	}
	if req.Flags&op.Within != 0 && off+uint64(len(data)) > size {
		if off >= size {
			rep.Off = off
			return nil
		}
		cut := *req
		cut.Data = data[:size-off]
		req, data = &cut, cut.Data
	}
	switch {
	case off > sealfs.FileSizeMax || uint64(len(data)) > sealfs.FileSizeMax-off:
		rep.Code = sealfs.ErrTooBig
		return nil
	case req.Flags&op.Append != 0 && (chunked || req.Len != 0) && off+uint64(len(data)) > sealfs.HomeBytes:
		rep.Code = sealfs.ErrTooBig // Extend gives out the place
		return nil
	case chunked && off+uint64(len(data)) > sealfs.HomeBytes:
		rep.Code = sealfs.ErrStale // the sender thinks that the file is whole
		return nil
	}
	w := st.writing(atHome(req.Ino), cl)
	defer w.free()
	return st.writePieces(w, req, rep, off, size)
}

// writing returns room for payloads.
func (st *store) writing(to place, cl *claim) *writing {
	w := writings.Get().(*writing)
	w.to, w.claim = to, cl
	return w
}

func atHome(ino sealfs.Ino) place { return place{ino: ino} }

// writePieces writes req.Data at off.
func (st *store) writePieces(w *writing, req *op.Request, rep *op.Reply, off, size uint64) error {
	data := req.Data
	if uint64(len(data)) > uint64(st.PayloadMax())-off%sealfs.BlockSize {
		w.claim.keep = true
	}
	for at, rest := off, data; len(rest) > 0; {
		// What comes later must follow what is written.
		w.claim.first = at == off
		n := int(min(uint64(len(rest)), at&^(sealfs.BlockSize-1)+uint64(st.PayloadMax())-at))
		last := n == len(rest)
		if err := st.writePiece(w, req, rep, at, rest[:n], size, last); err != nil || rep.Code != 0 {
			return err
		}
		at += uint64(n)
		rest = rest[n:]
		size = max(size, at)
	}
	w.claim.first = false
	rep.Off = off
	return nil
}

func (w *writing) free() {
	w.req, w.bound, w.claim = op.Request{}, 0, nil
	writings.Put(w)
}

// size returns the size of a file and whether it has chunks.
func (st *store) size(ino sealfs.Ino) (size uint64, chunked bool, err error) {
	err = st.View(func(r pmem.Reader) error {
		var in meta.Inode
		err := meta.GetInode(r, st.srv.cfg, ino, &in)
		size, chunked = in.Size, in.Chunked()
		return err
	})
	return size, chunked, err
}

// writePiece writes what fits one record. Only the last piece of a request
// leaves a result row: a retry writes the same bytes again.
func (st *store) writePiece(w *writing, req *op.Request, rep *op.Reply, off uint64, data []byte, size uint64, last bool) error {
	w.req = *req
	r := &w.req
	r.Flags &^= op.Append | op.Within
	r.Data, r.Off, r.Size, r.Len = data, off, off+uint64(len(data)), w.bound
	if !last {
		r.Seq, r.Low = 0, 0
	}
	if w.to.part {
		var err error
		if size, err = st.partEnd(w.to, r.Size); err != nil {
			return err
		}
	}
	if err := st.merge(w, size); err != nil {
		return err
	}
	r.Stamp = st.mark.Add(1)
	if r.Stamp == 0 {
		r.Stamp = st.mark.Add(1)
	}
	w.sums = w.sums[:0]
	for i := 0; i < len(r.Data); i += sealfs.BlockSize {
		b := r.Data[i:min(i+sealfs.BlockSize, len(r.Data))]
		w.sums = append(w.sums, meta.BlockSum(r.Ino, (r.Off+uint64(i))/sealfs.BlockSize, r.Stamp, b))
	}
	r.Sums = w.sums
	for {
		rep.Reset()
		if err := st.changeFor(w.claim, r, rep, r.Data); err != nil || rep.Code != sealfs.ErrAgain {
			req.Time = r.Time
			return err
		}
		// The tail of an earlier truncation is still to be freed.
		if _, err := st.reclaimStep(r.Ino); err != nil {
			return err
		}
	}
}

// merge widens w.req to whole blocks with what the file holds there: the block
// before its first byte, and the one behind its last unless the file ends there.
// Nothing is copied when there is nothing to merge.
func (st *store) merge(w *writing, size uint64) error {
	r := &w.req
	from, to := r.Off&^(sealfs.BlockSize-1), r.Size
	if to%sealfs.BlockSize != 0 && to < size {
		to = min(size, (to|(sealfs.BlockSize-1))+1)
	}
	if from == r.Off && to == r.Size {
		return nil
	}
	n := int(to - from)
	if cap(w.buf) < n {
		w.buf = make([]byte, st.PayloadMax())
	}
	b := w.buf[:n]
	head, tail := int(r.Off-from), int(r.Size-from)
	if head > 0 {
		if err := st.fill(w.to, from, b[:head]); err != nil {
			return err
		}
	}
	if tail < n {
		if err := st.fill(w.to, r.Size, b[tail:]); err != nil {
			return err
		}
	}
	copy(b[head:tail], r.Data)
	r.Data, r.Off = b, from
	return nil
}

// fill reads b from the file; what lies beyond its end is zeros.
func (st *store) fill(from place, off uint64, b []byte) error {
	n, _, err := st.readData(from, off, b)
	clear(b[n:])
	return err
}

// setattr answers Setattr; changes of the size are changes of the data.
func (st *store) setattr(ctx context.Context, req *op.Request, rep *op.Reply) error {
	if req.Valid != 0 {
		if err := st.settled(ctx, req); err != nil {
			return err
		}
	}
	if req.Valid&op.SetSize == 0 {
		return st.changeWithin(ctx, req, rep)
	}
	return st.patiently(ctx, req, rep, (*store).resize)
}

// resize answers what changes the size of a file, or how far its chunks reach.
func (st *store) resize(ctx context.Context, cl *claim, req *op.Request, rep *op.Reply) error {
	defer st.lockStripe(req.Ino).Unlock()
	return st.grow(ctx, cl, req, rep)
}

// grow executes a change that may lengthen a file. A file is not lengthened
// over a tail that an earlier truncation left to be freed: that comes first. The
// inode's stripe must be held; it is given up while others purge their chunks.
func (st *store) grow(ctx context.Context, cl *claim, req *op.Request, rep *op.Reply) error {
	for {
		rep.Reset()
		if err := st.settledChange(cl, req, rep); err != nil || rep.Code != sealfs.ErrAgain {
			return err
		}
		var in meta.Inode
		if err := st.inode(req.Ino, &in); err != nil {
			return err
		}
		var err error
		switch home, chunks := in.Tails(); {
		case home:
			_, err = st.reclaimStep(req.Ino)
		case chunks || req.Type != op.Extend: // who extends is a writer, and tells of it now
			err = st.clearChunks(ctx, &in)
		}
		if err != nil {
			return err
		}
	}
}

// Bits of fallocate(2)'s mode.
const (
	keepSize  = 0x01
	punchHole = 0x02
	zeroRange = 0x10
)

// fallocate answers Fallocate. The namespace makes holes of whole blocks; the
// parts of blocks at the ends of the range are overwritten with zeros first.
func (st *store) fallocate(ctx context.Context, cl *claim, req *op.Request, rep *op.Reply) error {
	if req.Mode&(punchHole|zeroRange) != 0 {
		if d, err := st.place(req); err != nil {
			return err
		} else if d.part {
			return st.punchPart(ctx, req, rep, d)
		}
	}
	if err := st.room(ctx, req); err != nil {
		return err
	}
	defer st.lockStripe(req.Ino).Unlock()
	size, _, err := st.size(req.Ino)
	if err != nil {
		return err
	}
	cl.keep = true
	w := st.writing(atHome(req.Ino), cl)
	defer w.free()
	return st.punch(w, req, rep, size, func(step *op.Request) error { return st.grow(ctx, cl, step, rep) })
}

// punch does what Fallocate asks for, by steps that execute one change each. The
// inode's stripe must be held.
func (st *store) punch(w *writing, req *op.Request, rep *op.Reply, size uint64, execute func(*op.Request) error) error {
	if req.Mode&(punchHole|zeroRange) != 0 && req.Len > 0 && req.Off < size && req.Len <= sealfs.FileSizeMax-min(req.Off, sealfs.FileSizeMax) {
		if err := st.zeroEdges(w, req, rep, size); err != nil || rep.Code != 0 {
			return err
		}
	}
	// The range may be done in several steps; the reply says how far it got.
	// All steps but one that reaches the end are without a number: its result
	// row must answer a retry for the whole.
	end := req.Off + req.Len
	for step := *req; ; {
		step.Seq, step.Low = 0, 0
		last := st.fewExtents(w.to, req, step.Off)
		if last {
			step.Seq, step.Low = req.Seq, req.Low
		}
		err := execute(&step)
		req.Time = step.Time
		if err != nil || rep.Code != 0 || rep.Off >= end {
			return err
		}
		if last || rep.Off <= step.Off {
			return fmt.Errorf("fallocate of inode %d makes no progress at %d: %w", req.Ino, step.Off, sealfs.ErrIO)
		}
		step.Len -= rep.Off - step.Off
		step.Off = rep.Off
	}
}

// fewExtents reports whether what a fallocate has left to do is one step's work.
func (st *store) fewExtents(d place, req *op.Request, from uint64) bool {
	if req.Mode&(punchHole|zeroRange) == 0 || req.Len == 0 || req.Len > sealfs.FileSizeMax || from > req.Off+req.Len {
		return true
	}
	n := 0
	err := st.View(func(r pmem.Reader) error {
		_, _, err := st.extents(r, d, from, req.Off+req.Len-from, func(*meta.Extent) bool {
			n++
			return n < meta.FreeMax
		})
		return err
	})
	return err != nil || n < meta.FreeMax
}

// zeroEdges writes zeros over the parts of blocks at the ends of the range, as
// far as the file has bytes there.
func (st *store) zeroEdges(w *writing, req *op.Request, rep *op.Reply, size uint64) error {
	const mask = sealfs.BlockSize - 1
	end := min(req.Off+req.Len, size)
	headEnd := min((req.Off+mask)&^mask, end)
	tail := max(end&^mask, headEnd)
	if end == size && size <= req.Off+req.Len {
		tail = end // the file's last block counts as whole
	}
	var zeros [sealfs.BlockSize]byte
	for _, p := range [][2]uint64{{req.Off, headEnd}, {tail, end}} {
		if p[0] >= p[1] {
			continue
		}
		if data, err := st.hasData(w.to, p[0]&^mask); err != nil || !data {
			if err != nil {
				return err
			}
			continue
		}
		if w.to.part {
			// Beyond its data a chunk has zeros already, and maybe no bound.
			end, err := st.partEnd(w.to, p[0]|1)
			if err != nil {
				return err
			}
			if p[1] = min(p[1], end); p[0] >= p[1] {
				continue
			}
		}
		z := *req
		z.Type, z.Mode, z.Len, z.Flags = op.Write, 0, 0, req.Flags&op.KillPriv
		if err := st.writePiece(w, &z, rep, p[0], zeros[:p[1]-p[0]], size, false); err != nil || rep.Code != 0 {
			return err
		}
	}
	return nil
}

// hasData reports whether the block at off is no hole.
func (st *store) hasData(d place, off uint64) (data bool, err error) {
	err = st.View(func(r pmem.Reader) error {
		_, _, err := st.extents(r, d, off, sealfs.BlockSize, func(*meta.Extent) bool {
			data = true
			return false
		})
		return err
	})
	return data, err
}
