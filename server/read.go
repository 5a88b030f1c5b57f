package server

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"sealfs"
	"sealfs/lsfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// aroundMax is the length of an extent up to which its neighbours in the log
// are read along: small files that were written together are read together.
const aroundMax = 32 << 10

// The type bits of a mode that matter here.
const (
	modeType      = 0o170000
	modeDirectory = 0o040000
	modeRegular   = 0o100000
)

// piece is the part of one extent that a read needs, in whole blocks of the extent.
type piece struct {
	fetch   lsfs.Fetch // Dst holds the blocks
	block   uint64     // number in the file of the first
	stamp   uint32
	sums    []uint32
	stored  int  // bytes of the blocks, as the sums cover them
	scratch bool // the blocks are not just what is wanted, so they get room of their own
	// Bytes [from, from+n) of the blocks belong at byte at of the result.
	from, n, at int
}

// reading is one read on its way; pooled.
type reading struct {
	pieces  []piece
	sums    []uint32
	scratch []byte
}

var readings = sync.Pool{New: func() any { return new(reading) }}

// read answers Read: rep.Data gets up to req.Len bytes, fewer only at the end
// of the file, or of what stands at home.
func (st *store) read(ctx context.Context, req *op.Request, rep *op.Reply) error {
	d, err := st.place(req)
	if err != nil {
		return err
	}
	if !d.part {
		if err := st.awaitWriter(ctx, req); err != nil {
			return err
		}
	}
	n := int(min(req.Len, sealfs.IOMax))
	if d.part && req.Off%sealfs.ChunkBytes+uint64(n) > sealfs.ChunkBytes {
		return fmt.Errorf("read of %d bytes at %d goes beyond a chunk: %w", n, req.Off, sealfs.ErrInvalid)
	}
	have := len(rep.Data)
	if cap(rep.Data)-have < n {
		rep.Data = append(make([]byte, 0, have+n), rep.Data...)
	}
	got, size, err := st.readData(d, req.Off, rep.Data[have:have+n])
	if err != nil {
		return err
	}
	rep.Data = rep.Data[:have+got]
	rep.Eof = !d.part && req.Off+uint64(got) >= size
	return nil
}

// place is where the bytes of a file stand that somebody wants: at the file's
// home, or in a shard that holds chunks of it.
type place struct {
	ino   sealfs.Ino
	shard sealfs.Shard // of a part
	part  bool
}

// place returns where the bytes stand that a request is about.
func (st *store) place(req *op.Request) (place, error) {
	if req.Off < sealfs.HomeBytes {
		return atHome(req.Ino), nil
	}
	var part bool
	err := st.View(func(r pmem.Reader) error {
		var in meta.Inode
		err := meta.Subject(r, st.srv.cfg, req, &in)
		part = in.IsPart()
		return err
	})
	if err != nil {
		return place{}, err
	}
	return place{req.Ino, req.Shard, part}, nil
}

// extents calls fn for the extents that overlap the n bytes at off, and returns the
// file's size and where the data that stands there may end at most. With a part nobody
// knows the size.
func (st *store) extents(r pmem.Reader, d place, off, n uint64, fn func(*meta.Extent) bool) (size, end uint64, err error) {
	if d.part {
		_, err := meta.PartExtents(r, d.shard, d.ino, off, n, fn)
		if err == sealfs.ErrNotExist {
			err = nil // nothing was written yet
		}
		return sealfs.FileSizeMax, sealfs.FileSizeMax, err
	}
	attr, err := meta.Extents(r, st.srv.cfg, d.ino, off, n, fn)
	if err == nil && attr.Mode&modeType != modeRegular {
		err = sealfs.ErrInvalid
		if attr.Mode&modeType == modeDirectory {
			err = sealfs.ErrIsDir
		}
	}
	if attr.Bound != 0 {
		return attr.Size, min(attr.Size, sealfs.HomeBytes), err
	}
	return attr.Size, attr.Size, err
}

// readData fills dst with a file's bytes from off on, verified, and returns how
// many there are and the file's size.
func (st *store) readData(d place, off uint64, dst []byte) (int, uint64, error) {
	rd := readings.Get().(*reading)
	defer rd.free()
	var size, end uint64
	loaded := 0
	err := st.View(func(r pmem.Reader) (err error) {
		size, end, err = st.extents(r, d, off, uint64(len(dst)), func(e *meta.Extent) bool {
			rd.add(e, off, dst)
			return true
		})
		if err != nil || end <= off {
			return err
		}
		dst = dst[:min(uint64(len(dst)), end-off)]
		rd.place(dst)
		for loaded < len(rd.pieces) && err == nil {
			loaded++
			err = st.Load(&rd.pieces[loaded-1].fetch)
		}
		return err
	})
	if err == nil && end <= off {
		return 0, size, nil
	}
	// Every piece that was loaded must be finished, also after an error.
	for i := range rd.pieces[:loaded] {
		err = errors.Join(err, st.Finish(&rd.pieces[i].fetch))
	}
	if err != nil {
		return 0, 0, err
	}
	done := 0
	for i := range rd.pieces {
		p := &rd.pieces[i]
		if err := st.verify(d.ino, p); err != nil {
			return 0, 0, err
		}
		clear(dst[done:p.at])
		if p.scratch {
			copy(dst[p.at:], p.fetch.Dst[p.from:p.from+p.n])
		}
		done = p.at + p.n
	}
	clear(dst[done:])
	return len(dst), size, nil
}

// add notes what is needed of extent e for the bytes dst at off of the file.
func (rd *reading) add(e *meta.Extent, off uint64, dst []byte) {
	begin := max(off, e.Off)
	end := min(off+uint64(len(dst)), e.Off+uint64(e.Len))
	if begin >= end {
		return
	}
	first := int((begin - e.Off) / sealfs.BlockSize)
	last := int((end - 1 - e.Off) / sealfs.BlockSize)
	p := piece{
		block: e.Off/sealfs.BlockSize + uint64(first), stamp: e.Stamp,
		stored: (last-first)*sealfs.BlockSize + int(e.Covered(last)),
		at:     int(begin - off), n: int(end - begin), from: int(begin-e.Off) - first*sealfs.BlockSize,
	}
	p.fetch.At = e.Addr + sealfs.LSN(first*sealfs.BlockSize)
	p.fetch.Around = e.Len <= aroundMax
	p.scratch = p.from != 0 || p.n != p.stored
	at := len(rd.sums)
	for i := first; i <= last; i++ {
		rd.sums = append(rd.sums, e.Sum(i))
	}
	p.sums = rd.sums[at:]
	rd.pieces = append(rd.pieces, p)
}

// place gives every piece its room: in dst where its blocks are just what is
// wanted there, else in scratch memory.
func (rd *reading) place(dst []byte) {
	need := 0
	for i := range rd.pieces {
		if p := &rd.pieces[i]; p.scratch {
			need += p.stored
		}
	}
	if cap(rd.scratch) < need {
		rd.scratch = make([]byte, need)
	}
	room := rd.scratch[:need]
	for i := range rd.pieces {
		p := &rd.pieces[i]
		if p.scratch {
			p.fetch.Dst, room = room[:p.stored], room[p.stored:]
		} else {
			p.fetch.Dst = dst[p.at:][:p.stored]
		}
	}
}

func (rd *reading) free() {
	if cap(rd.scratch) > 4*sealfs.BlockSize {
		rd.scratch = nil
	}
	rd.pieces, rd.sums = rd.pieces[:0], rd.sums[:0]
	readings.Put(rd)
}

// verify compares every block with its sum. A block that does not match is
// read once more past the cache, in case memory was to blame.
func (st *store) verify(ino sealfs.Ino, p *piece) error {
	if bad := p.mismatch(ino); bad >= 0 {
		st.Forget(&p.fetch)
		if err := st.again(p); err != nil {
			return err
		}
		if bad := p.mismatch(ino); bad >= 0 {
			return &sealfs.Corruption{
				Where: st.opts.Device, Off: st.Place(p.fetch.At + sealfs.LSN(bad*sealfs.BlockSize)),
				What: fmt.Sprintf("block %d of inode %d at %v does not match its sum", p.block+uint64(bad), ino, p.fetch.At+sealfs.LSN(bad*sealfs.BlockSize)),
			}
		}
	}
	return nil
}

// again reads a piece a second time. The file may have changed meanwhile, so
// the segment may be gone: then the first verdict stands.
func (st *store) again(p *piece) error {
	err := st.View(func(pmem.Reader) error { return st.Load(&p.fetch) })
	if err != nil {
		return err
	}
	return st.Finish(&p.fetch)
}

// mismatch returns the index of the first block whose sum is wrong, -1 if none is.
func (p *piece) mismatch(ino sealfs.Ino) int {
	for i, sum := range p.sums {
		b := p.fetch.Dst[i*sealfs.BlockSize:]
		b = b[:min(len(b), sealfs.BlockSize)]
		if meta.BlockSum(ino, p.block+uint64(i), p.stamp, b) != sum {
			return i
		}
	}
	return -1
}
