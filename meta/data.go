package meta

import (
	"encoding/binary"
	"math"

	"sealfs"
	"sealfs/op"
	"sealfs/pmem"
)

// noBlock is beyond the last block of any file.
const noBlock = math.MaxUint64

// blocksOf returns how many blocks hold n bytes.
func blocksOf(n uint64) uint64 { return n/block + min(n%block, 1) }

// hasRows reports whether in has extents outside its record.
func (in *Inode) hasRows() bool { return in.Bytes != uint64(in.First.Stored()) }

// putExtent writes e as a row. The record is built before the tree changes, so
// e may alias it.
func (ch *change) putExtent(in *Inode, e *Extent) error {
	var b [extentRecordMax]byte
	k := PartExtentKey(in.place(ch.c), in.Ino, e.lastBlock())
	return ch.tx.Set(k[:], e.Append(b[:0]))
}

// release gives back blocks [i, j) of e.
func (ch *change) release(in *Inode, e *Extent, i, j int) error {
	end := uint32(j) * block
	if j == e.Blocks() {
		end = e.Stored()
	}
	n := end - uint32(i)*block
	if uint64(n) > in.Bytes {
		return damaged("inode %d counts %d bytes and has more", in.Ino, in.Bytes)
	}
	in.Bytes -= uint64(n)
	if err := ch.charge(in, -int64(n), 0); err != nil {
		return err
	}
	return ch.sp.Release(e.Addr+sealfs.LSN(i*block), n)
}

// cut returns which blocks [i, j) of e lie in blocks [from, to) of the file.
func (e *Extent) cut(from, to uint64) (i, j int) {
	n, at := uint64(e.Blocks()), e.Off/block
	if from > at {
		i = int(min(from-at, n))
	}
	j = int(n)
	if to < at+n {
		j = int(max(to, at) - at)
	}
	return i, max(i, j)
}

// clear makes a hole of the blocks [from, to) of in, whose record the caller writes.
// It goes upwards and reports false when the budget ended before the range did.
func (ch *change) clear(in *Inode, from, to uint64) (done bool, err error) {
	if to = min(to, in.endBlock()); from >= to {
		return true, nil
	}
	if first := in.first(); first.Len != 0 {
		if i, j := first.cut(from, to); i < j {
			if ch.budget == 0 {
				return false, nil
			}
			ch.budget--
			if err := ch.clearFirst(in, &first, i, j); err != nil {
				return false, err
			}
		}
	}
	for in.hasRows() {
		var e Extent
		found, err := nextExtent(ch.tx, in.place(ch.c), in.Ino, from, &e)
		if err != nil {
			return false, err
		}
		if !found {
			break
		}
		i, j := e.cut(from, to)
		if i >= j {
			break
		}
		if ch.budget == 0 {
			return false, nil
		}
		ch.budget--
		if err := ch.clearRow(in, &e, i, j); err != nil {
			return false, err
		}
	}
	return true, nil
}

// clearFirst takes blocks [i, j) out of the extent inside in.
func (ch *change) clearFirst(in *Inode, first *Extent, i, j int) error {
	if err := ch.release(in, first, i, j); err != nil {
		return err
	}
	if n := first.Blocks(); j < n {
		back := first.back(j)
		if err := ch.putExtent(in, &back); err != nil {
			return err
		}
	}
	var front Extent
	if i > 0 {
		front = first.front(i)
	}
	in.setFirst(&front)
	return nil
}

// clearRow takes blocks [i, j) out of the extent e in the tree.
func (ch *change) clearRow(in *Inode, e *Extent, i, j int) error {
	if err := ch.release(in, e, i, j); err != nil {
		return err
	}
	// What is written first destroys what e.Sums aliases.
	var sums [4 * ExtentBlocksMax]byte
	old := *e
	old.Sums = sums[:copy(sums[:], e.Sums)]
	if j < old.Blocks() {
		// The back keeps its last block and so its key.
		back := old.back(j)
		if err := ch.putExtent(in, &back); err != nil {
			return err
		}
	} else {
		k := PartExtentKey(in.place(ch.c), in.Ino, e.lastBlock())
		if err := ch.tx.Delete(k[:]); err != nil {
			return err
		}
	}
	if i == 0 {
		return nil
	}
	front := old.front(i)
	return ch.putExtent(in, &front)
}

// nextExtent finds the extent in shard s that holds block from of ino, or the
// next one after it. Sums alias the page.
func nextExtent(r pmem.Reader, s sealfs.Shard, ino sealfs.Ino, from uint64, e *Extent) (bool, error) {
	k := PartExtentKey(s, ino, from)
	var cur pmem.Cursor
	if !cur.Seek(r, k[:]) || !inRange(&cur, k[:11]) {
		return false, cur.Err()
	}
	return true, readExtent(&cur, e)
}

// readExtent decodes the extent on which the cursor stands.
func readExtent(cur *pmem.Cursor, e *Extent) error {
	key := cur.Key()
	if len(key) != 19 {
		return damaged("key %x", key)
	}
	return DecodeExtent(cur.Value(), binary.BigEndian.Uint64(key[11:]), e)
}

// write makes one extent of the payload. It must be resolved: begin at a block
// and cover whole blocks but for the end of the file.
func (ch *change) write() error {
	req := ch.req
	n := uint64(len(req.Data))
	switch {
	case req.Off%block != 0 || n == 0 || n > ExtentBlocksMax*block:
		return refusal(sealfs.ErrInvalid)
	case req.Off > sealfs.FileSizeMax || n > sealfs.FileSizeMax-req.Off:
		return refusal(sealfs.ErrTooBig)
	}
	var in Inode
	if err := ch.loadData(&in); err != nil {
		return err
	}
	if in.part {
		if err := ch.admit(&in, req.Off+n); err != nil {
			return err
		}
	} else {
		if in.Bound != 0 && req.Off+n > sealfs.HomeBytes {
			return refusal(sealfs.ErrStale)
		}
		if err := in.grow(req.Size); err != nil {
			return err
		}
		if req.Off+n > in.Size {
			return refusal(sealfs.ErrInvalid)
		}
	}
	var raw [4 * ExtentBlocksMax]byte
	e := Extent{Off: req.Off, Len: uint32(n), Addr: ch.sp.Payload(), Stamp: req.Stamp}
	e.Sums = raw[:4*e.Blocks()]
	if err := fillSums(e.Sums, req); err != nil {
		return err
	}
	if uint64(e.Addr.Off())+n > 1<<32 {
		return refusal(sealfs.ErrInvalid)
	}
	// No more extents than blocks can be in the way, so the budget does not end here.
	at := req.Off / block
	if _, err := ch.clear(&in, at, at+uint64(e.Blocks())); err != nil {
		return err
	}
	if err := ch.sp.Retain(e.Addr, e.Len); err != nil {
		return err
	}
	in.Bytes += n
	if err := ch.charge(&in, int64(n), 0); err != nil {
		return err
	}
	if e.Off == 0 && e.Blocks() <= inlineBlocks && in.First.Len == 0 {
		in.setFirst(&e)
	} else if err := ch.putExtent(&in, &e); err != nil {
		return err
	}
	ch.rep.Off = req.Off
	if in.part {
		in.partAttr(&ch.rep.Attr)
		return ch.putPart(&in)
	}
	if req.Flags&op.KillPriv != 0 {
		in.killPriv()
	}
	in.touch(req.Time)
	in.Attr(&ch.rep.Attr)
	return ch.put(&in)
}

// fillSums writes the sums of a Write's blocks: those that came with it, or
// else computed here.
func fillSums(to []byte, req *op.Request) error {
	n := len(to) / 4
	if len(req.Sums) != 0 && len(req.Sums) != n {
		return refusal(sealfs.ErrInvalid)
	}
	for i := range n {
		var sum uint32
		if len(req.Sums) != 0 {
			sum = req.Sums[i]
		} else {
			b := req.Data[i*block:]
			sum = BlockSum(req.Ino, req.Off/block+uint64(i), req.Stamp, b[:min(len(b), block)])
		}
		binary.LittleEndian.PutUint32(to[4*i:], sum)
	}
	return nil
}

// Bits of fallocate(2)'s mode.
const (
	fallocKeepSize  = 0x01
	fallocPunchHole = 0x02
	fallocZeroRange = 0x10
)

// fallocate makes holes of the whole blocks in a range, or grows a file. Space
// is not reserved: the log has no place to keep it. The reply's Off says up to
// where the range is done; the caller asks again for the rest.
func (ch *change) fallocate() error {
	req := ch.req
	var in Inode
	if err := ch.loadData(&in); err != nil {
		return err
	}
	switch {
	case req.Len == 0:
		return refusal(sealfs.ErrInvalid)
	case req.Off > sealfs.FileSizeMax || req.Len > sealfs.FileSizeMax-req.Off:
		return refusal(sealfs.ErrTooBig)
	}
	end, zero := req.Off+req.Len, true
	switch req.Mode {
	case 0, fallocKeepSize:
		zero = false
	case fallocPunchHole | fallocKeepSize, fallocZeroRange, fallocZeroRange | fallocKeepSize:
	default:
		return refusal(sealfs.ErrNotSupported)
	}
	if in.part {
		return ch.punchPart(&in)
	}
	ch.rep.Off = end
	if zero {
		if err := ch.punch(&in, end); err != nil {
			return err
		}
	}
	if req.Mode&fallocKeepSize == 0 && ch.rep.Off == end {
		if err := in.lengthen(end); err != nil {
			return err
		}
	}
	in.touch(req.Time)
	in.Attr(&ch.rep.Attr)
	return ch.put(&in)
}

// punch makes a hole of the whole blocks between req.Off and end; the file's
// last block counts as whole when the range reaches its end.
func (ch *change) punch(in *Inode, end uint64) error {
	from, to := blocksOf(ch.req.Off), end/block
	if !in.part && end >= in.Size {
		to = blocksOf(in.Size)
	}
	done, err := ch.clear(in, from, to)
	if err != nil || done {
		return err
	}
	var e Extent
	found, err := nextExtent(ch.tx, in.place(ch.c), in.Ino, from, &e)
	if err != nil {
		return err
	}
	if found {
		ch.rep.Off = max(e.Off, from*block)
	}
	return nil
}

// Extents calls fn for the extents of ino that overlap the n bytes at off, in
// order and as far as the file goes, until fn returns false. Of a file that has
// chunks these are only those at home. What lies between
// them reads as zeros. The extent and its sums are valid until fn returns. It
// returns the inode's attributes, or sealfs.ErrNotExist.
func Extents(r pmem.Reader, c Config, ino sealfs.Ino, off, n uint64, fn func(*Extent) bool) (op.Attr, error) {
	var attr op.Attr
	var in Inode
	if err := GetInode(r, c, ino, &in); err != nil {
		return attr, err
	}
	in.Attr(&attr)
	end := in.Size
	if n < end-min(off, end) {
		end = off + n
	}
	return attr, in.extents(r, c, off, end, fn)
}

// extents calls fn for the extents that overlap the bytes [off, end). The
// record of in must alias its page, not own what stands in it: an extent that
// reaches an unknown function would drag all of in to the heap.
func (in *Inode) extents(r pmem.Reader, c Config, off, end uint64, fn func(*Extent) bool) error {
	if b := in.endBlock(); b != noBlock {
		end = min(end, b*block)
	}
	if off >= end {
		return nil
	}
	e := in.First
	if e.Len != 0 && uint64(e.Len) > off && !fn(&e) || !in.hasRows() {
		return nil
	}
	return extentRows(r, in.place(c), in.Ino, off, end, &e, fn)
}

// extentRows is extents for the rows in a shard, whatever they belong to. e is room
// for each of them.
func extentRows(r pmem.Reader, s sealfs.Shard, ino sealfs.Ino, off, end uint64, e *Extent, fn func(*Extent) bool) error {
	k := PartExtentKey(s, ino, off/block)
	var cur pmem.Cursor
	for ok := cur.Seek(r, k[:]); ok && inRange(&cur, k[:11]); ok = cur.Next() {
		if err := readExtent(&cur, e); err != nil {
			return err
		}
		if e.Off >= end {
			break
		}
		if e.Off+uint64(e.Len) > off && !fn(e) {
			break
		}
	}
	return cur.Err()
}

// Live calls fn for the extents of ino that still refer to bytes of
// [addr, addr+n), a payload that was written for file offset off. Their
// Stored bytes live, everything else of the payload is dead.
func Live(r pmem.Reader, c Config, ino sealfs.Ino, off uint64, addr sealfs.LSN, n uint32, fn func(*Extent)) error {
	refers := func(e *Extent) bool {
		if e.Addr >= addr && e.Addr+sealfs.LSN(e.Stored()) <= addr+sealfs.LSN(n) {
			fn(e)
		}
		return true
	}
	// The address tells to whom an extent belongs, so all places are looked at
	// where one for this offset may stand.
	if s := ino.DataShard(off, c.Shards); s != ino.Home(c.Shards) {
		var e Extent
		if err := extentRows(r, s, ino, off, off+uint64(n), &e, refers); err != nil {
			return err
		}
	} else if off >= sealfs.HomeBytes {
		var e Extent
		return extentRows(r, s, ino, off, off+uint64(n), &e, refers)
	}
	var in Inode
	err := GetInode(r, c, ino, &in)
	if err == sealfs.ErrNotExist {
		return nil
	}
	if err != nil {
		return err
	}
	// Extents beyond the size, a tail, are referenced until they are freed.
	return in.extents(r, c, off, off+uint64(n), refers)
}

// Move makes the extent of ino at off refer to to instead of from, provided
// that it still is the n stored bytes at from; else it reports false and
// changes nothing. The shard's sequence does not move: on another replica the
// extent lies elsewhere.
func Move(tx *pmem.Tx, sp Space, c Config, ino sealfs.Ino, off uint64, n uint32, from, to sealfs.LSN) (moved bool, err error) {
	if uint64(to.Off())+uint64(n) > 1<<32 {
		return false, sealfs.ErrInvalid
	}
	ch := change{tx: tx, sp: sp, c: c}
	if off == 0 {
		moved, err = ch.moveFirst(ino, n, from, to)
	}
	for _, s := range [...]sealfs.Shard{ino.DataShard(off, c.Shards), ino.Home(c.Shards)} {
		if err != nil || moved {
			break
		}
		moved, err = ch.moveRow(s, ino, off, n, from, to)
	}
	if err != nil || !moved {
		return false, err
	}
	if err := sp.Retain(to, n); err != nil {
		return false, err
	}
	return true, sp.Release(from, n)
}

// moveFirst is Move for the extent that stands in the inode.
func (ch *change) moveFirst(ino sealfs.Ino, n uint32, from, to sealfs.LSN) (moved bool, err error) {
	var in Inode
	if err := GetInode(ch.tx, ch.c, ino, &in); err == sealfs.ErrNotExist {
		return false, nil
	} else if err != nil {
		return false, err
	}
	in.own()
	e := in.first()
	if e.Len == 0 || e.Addr != from || e.Stored() != n {
		return false, nil
	}
	in.First.Addr = to
	return true, ch.put(&in)
}

// moveRow is Move for an extent in shard s.
func (ch *change) moveRow(s sealfs.Shard, ino sealfs.Ino, off uint64, n uint32, from, to sealfs.LSN) (moved bool, err error) {
	var e Extent
	found, err := nextExtent(ch.tx, s, ino, off/block, &e)
	if err != nil || !found || e.Off != off || e.Addr != from || e.Stored() != n {
		return false, err
	}
	e.Addr = to
	return true, ch.putExtent(&Inode{Ino: ino, part: true, at: s}, &e)
}

// seek answers Seek, for SEEK_DATA (Mode 3) and SEEK_HOLE (Mode 4). Holes are
// whole blocks, and the end of the file is one. A file's home knows only what
// it holds itself, and so does the shard of a chunk: neither says what comes behind.
func seek(r pmem.Reader, c Config, req *op.Request, rep *op.Reply) error {
	const seekData, seekHole = 3, 4
	if req.Mode != seekData && req.Mode != seekHole {
		return refusal(sealfs.ErrInvalid)
	}
	var in Inode
	if err := loadData(r, c, req, &in); err != nil {
		return err
	}
	end := in.Size
	if in.part {
		end = chunkEnd(req.Off)
		if req.Mode == seekData && req.Off < boundMax {
			end = max(end, req.Off+min(req.Len, boundMax-req.Off)) // in all chunks of the shard
		}
		in.partAttr(&rep.Attr)
	} else {
		if req.Off >= end {
			return refusal(sealfs.ErrNoDevice)
		}
		in.Attr(&rep.Attr)
	}
	// Data and holes are told apart by whole blocks.
	at, found := req.Off&^(block-1), false
	err := in.extents(r, c, at, end, func(e *Extent) bool {
		if req.Mode == seekData {
			at, found = max(at, e.Off), true
			return false
		}
		if e.Off > at {
			return false
		}
		at = e.Off + uint64(e.Blocks())*block
		return true
	})
	if err != nil {
		return err
	}
	if req.Mode == seekData && !found {
		return refusal(sealfs.ErrNoDevice)
	}
	rep.Off = min(max(at, req.Off), end)
	return nil
}
