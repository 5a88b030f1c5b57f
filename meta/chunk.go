package meta

import (
	"encoding/binary"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/op"
	"sealfs/pmem"
)

// A file that has chunks keeps its first HomeBytes of data with its inode; what is
// beyond stands in chunks, each in a shard of its own (sealfs.Ino.DataShard). A
// shard knows of all chunks of a file that it holds by one row, the part.
//
//   - A file has chunks when its inode has a Bound, and then for ever. A file
//     without one is whole at home, whatever its size.
//   - Gen counts how often chunks were cut off. Within a generation Bound only
//     grows, and nothing is written beyond it: each part remembers the Bound up to which
//     the file's home has been asked, and a write beyond comes with a newer one.
//   - A truncation raises Gen, lowers Bound to the new size and notes in Cut how far
//     older chunks may reach. Until all parts from the size up to Cut are purged,
//     durably, the file does not grow beyond HomeBytes, so that nothing that was cut
//     off is ever seen again. A purged part refuses writes of older generations; one
//     that is gone has the home asked, which refuses them.
//   - A part that no purge concerns keeps its older generation until a write of a newer
//     one comes. It may take that over when it holds nothing beyond the file's size:
//     then a purge that is still to come would find nothing.
//   - An inode goes only after its parts: to be freed is to be cut at HomeBytes.

// boundMax limits Bound and Cut, in bytes: one more than the last byte of a file.
const boundMax = sealfs.FileSizeMax + 1

// homeBlocks is how many blocks of a file that has chunks stand at home.
const homeBlocks = sealfs.HomeBytes / block

// chunkEnd returns where the chunk that holds off ends.
func chunkEnd(off uint64) uint64 { return off/sealfs.ChunkBytes*sealfs.ChunkBytes + sealfs.ChunkBytes }

// Part is what a shard knows of the chunks of a file that it holds: generation,
// bound, bytes and volume, as varints. There is none without bytes.
type Part struct {
	Gen    uint64        // all that the truncations before this generation cut off is gone
	Bound  uint64        // of the file in that generation, as far as its home was asked
	Bytes  uint64        // stored, of all extents
	Volume sealfs.Volume // which is charged for them
}

const partRecordMax = 10 + 10 + 10 + 5

// Append appends the record of p to b.
func (p *Part) Append(b []byte) []byte {
	for _, v := range [...]uint64{p.Gen, p.Bound, p.Bytes, uint64(p.Volume)} {
		b = binary.AppendUvarint(b, v)
	}
	return b
}

// DecodePart reads what Append wrote, or returns a *sealfs.Corruption.
func DecodePart(b []byte) (Part, error) {
	r := enc.Reader{B: b}
	p := Part{Gen: r.Uvarint(), Bound: r.Uvarint(), Bytes: r.Uvarint()}
	volume := r.Uvarint()
	p.Volume = sealfs.Volume(volume)
	if !r.Done() || p.Bound <= sealfs.HomeBytes || p.Bound > boundMax || p.Bytes == 0 || volume == 0 || volume > 1<<32-1 {
		return Part{}, damaged("record %x of a part", b)
	}
	return p, nil
}

// GetPart reads what shard s knows of the chunks of ino. It returns
// sealfs.ErrNotExist when it holds none.
func GetPart(r pmem.Reader, s sealfs.Shard, ino sealfs.Ino) (Part, error) {
	k := PartKey(s, ino)
	b, err := pmem.Get(r, k[:])
	if err != nil {
		return Part{}, err
	}
	return DecodePart(b)
}

// PartExtents is Extents for the chunks of ino that shard s holds. It returns
// sealfs.ErrNotExist when it holds none.
func PartExtents(r pmem.Reader, s sealfs.Shard, ino sealfs.Ino, off, n uint64, fn func(*Extent) bool) (Part, error) {
	p, err := GetPart(r, s, ino)
	if err != nil {
		return p, err
	}
	var e Extent
	end := off + min(n, boundMax-min(off, boundMax))
	return p, extentRows(r, s, ino, max(off, sealfs.HomeBytes), end, &e, fn)
}

// Chunked reports whether the file has chunks.
func (in *Inode) Chunked() bool { return in.Bound != 0 && in.isFile() }

// Tails reports what is cut off of the file and not yet freed: at home, and in chunks.
func (in *Inode) Tails() (home, chunks bool) { return in.Flags&flagTail != 0, in.Cut != 0 }

// place returns the shard where the extents of in stand.
func (in *Inode) place(c Config) sealfs.Shard {
	if in.part {
		return in.at
	}
	return in.Ino.Home(c.Shards)
}

// endBlock returns the block behind the last one whose extents are in's: those
// of chunks may stand in the same shard.
func (in *Inode) endBlock() uint64 {
	if in.Bound != 0 && !in.part {
		return homeBlocks
	}
	return noBlock
}

// loadPart fills in with what stands in shard s of the chunks of ino: an inode
// that has nothing but extents, a volume, a generation and a bound. It has no
// bytes when the shard holds none.
func loadPart(r pmem.Reader, s sealfs.Shard, ino sealfs.Ino, in *Inode) error {
	p, err := GetPart(r, s, ino)
	if err != nil && err != sealfs.ErrNotExist {
		return err
	}
	*in = Inode{Ino: ino, Mode: typeFile, Gen: p.Gen, Bound: p.Bound, Bytes: p.Bytes, Volume: p.Volume, part: true, at: s}
	return nil
}

// putPart writes the row of a part, or deletes it when no bytes are left.
func (ch *change) putPart(in *Inode) error {
	k := PartKey(in.at, in.Ino)
	if in.Bytes == 0 {
		if err := ch.tx.Delete(k[:]); err != sealfs.ErrNotExist {
			return err
		}
		return nil
	}
	p := Part{Gen: in.Gen, Bound: in.Bound, Bytes: in.Bytes, Volume: in.Volume}
	var b [partRecordMax]byte
	return ch.tx.Set(k[:], p.Append(b[:0]))
}

// partAttr fills a with the little that is known of a file where its chunks are.
func (in *Inode) partAttr(a *op.Attr) {
	*a = op.Attr{Ino: in.Ino, Mode: in.Mode, Gen: in.Gen}
}

// aboutChunk reports whether req, for data at req.Off, is about a chunk if the
// file has any.
func aboutChunk(req *op.Request) bool {
	return req.Off >= sealfs.HomeBytes && (req.Type != op.Fallocate || req.Mode&(fallocPunchHole|fallocZeroRange) != 0)
}

// atData is at for a request for data.
func (ch *change) atData() error {
	req := ch.req
	if req.Ino == 0 || req.Ino > sealfs.InoMax {
		return refusal(sealfs.ErrNotExist)
	}
	if aboutChunk(req) && req.Ino.DataShard(req.Off, ch.c.Shards) == req.Shard {
		return nil
	}
	return ch.at(req.Ino)
}

// loadData reads the file or the part of it that a request for data is about.
func loadData(r pmem.Reader, c Config, req *op.Request, in *Inode) error {
	if req.Ino == 0 || req.Ino > sealfs.InoMax {
		return refusal(sealfs.ErrNotExist)
	}
	home := req.Ino.Home(c.Shards)
	chunk := aboutChunk(req)
	if !chunk || req.Shard == home {
		if err := getInode(r, c, req.Ino, in); err != nil {
			return err
		}
		if err := in.refuseNoFile(); err != nil {
			return err
		}
		if !chunk || in.Bound == 0 {
			return nil
		}
	}
	switch {
	case req.Off > sealfs.FileSizeMax:
		return refusal(sealfs.ErrTooBig)
	case req.Shard == req.Ino.DataShard(req.Off, c.Shards):
	case req.Shard == home:
		return refusal(sealfs.ErrStale) // the sender thinks that the file is whole
	default:
		return refusal(sealfs.ErrInvalid)
	}
	gen := req.Gen
	if err := loadPart(r, req.Shard, req.Ino, in); err != nil {
		return err
	}
	if in.Bytes != 0 && in.Gen > gen {
		return refusal(sealfs.ErrStale)
	}
	return nil
}

// Subject reads the file or, as IsPart then says, the part of it that a request for
// data at req.Off is about: Read, Write, Fallocate or Seek. Nothing of it may be
// looked at but its size, generation, bound and bytes. A part without bytes does not exist yet.
// Refusals are sealfs.Codes: ErrStale for a sender that does not know the file as it is.
func Subject(r pmem.Reader, c Config, req *op.Request, in *Inode) error {
	err := loadData(r, c, req, in)
	if code, ok := err.(refusal); ok {
		return sealfs.Code(code)
	}
	return err
}

// IsPart reports whether in stands for a part: see Subject.
func (in *Inode) IsPart() bool { return in.part }

// loadData is loadData for a change.
func (ch *change) loadData(in *Inode) error {
	if err := loadData(ch.tx, ch.c, ch.req, in); err != nil {
		return err
	}
	in.own()
	return nil
}

// admit admits a write up to end to a part. What the sender knows of the file is
// believed if the part has heard it from the file's home, now (the request's
// Len is the Bound in its generation; resolved) or before.
func (ch *change) admit(in *Inode, end uint64) error {
	req := ch.req
	switch {
	case end > chunkEnd(req.Off) || req.Volume == 0:
		return refusal(sealfs.ErrInvalid)
	case in.Bytes != 0 && in.Volume != req.Volume:
		return refusal(sealfs.ErrCrossDevice)
	case req.Len > boundMax:
		return refusal(sealfs.ErrInvalid)
	}
	known := in.Bytes != 0 && in.Gen == req.Gen
	if req.Len != 0 {
		if !known {
			in.Bound = 0
		}
		in.Gen, in.Bound, in.Volume = req.Gen, max(in.Bound, req.Len), req.Volume
	} else if !known {
		return refusal(sealfs.ErrStale)
	}
	if end > in.Bound {
		return refusal(sealfs.ErrStale)
	}
	return nil
}

// punchPart is fallocate for a range of a chunk: it makes holes only.
func (ch *change) punchPart(in *Inode) error {
	end := ch.req.Off + ch.req.Len
	if end > chunkEnd(ch.req.Off) {
		return refusal(sealfs.ErrInvalid)
	}
	ch.rep.Off = end
	in.partAttr(&ch.rep.Attr)
	before := in.Bytes
	if err := ch.punch(in, end); err != nil {
		return err
	}
	if ch.quiet = in.Bytes == before; ch.quiet {
		return nil
	}
	return ch.putPart(in)
}

// cut makes what chunks hold at or beyond the size a thing of the past, to be
// purged.
func (ch *change) cut(in *Inode) {
	edge := max(in.Size, sealfs.HomeBytes)
	if in.Bound <= edge {
		return
	}
	in.Gen++
	in.Cut = max(in.Cut, in.Bound)
	in.Bound = edge
}

// settleTail makes in's row in the orphan table say whether a tail is left.
func (ch *change) settleTail(in *Inode) error {
	if home, chunks := in.Tails(); home || chunks {
		return ch.setOrphan(in.Ino, orphanTail)
	}
	return ch.clearOrphan(in.Ino, orphanTail)
}

// extend notes that chunks are written, or are about to be. With the flag Append the
// sender wants req.Len bytes behind the end, whose place is in the reply's Off.
func (ch *change) extend() error {
	req := ch.req
	var in Inode
	if err := ch.load(req.Ino, &in); err != nil {
		return err
	}
	if err := in.refuseNoFile(); err != nil {
		return err
	}
	size, bound := req.Size, req.Off
	if req.Flags&op.Append != 0 {
		if req.Len > sealfs.FileSizeMax-in.Size {
			return refusal(sealfs.ErrTooBig)
		}
		size = in.Size + req.Len
		if bound = max(bound, in.Bound); size > bound {
			bound = min(sealfs.BoundFor(size), boundMax)
		}
		ch.rep.Off = in.Size
	}
	home, chunks := in.Tails()
	switch {
	case size > sealfs.FileSizeMax || bound > boundMax:
		return refusal(sealfs.ErrTooBig)
	case req.Gen != in.Gen:
		return refusal(sealfs.ErrStale)
	case in.Bound == 0 && in.Size > sealfs.HomeBytes:
		return refusal(sealfs.ErrStale) // it is whole, and stays so
	case home && (in.Bound == 0 || size > in.Size), chunks && (bound > in.Bound || size > max(in.Size, sealfs.HomeBytes)):
		return refusal(sealfs.ErrAgain)
	}
	in.Size = max(in.Size, size)
	in.Bound = max(in.Bound, bound, sealfs.HomeBytes)
	if req.Flags&op.KillPriv != 0 {
		in.killPriv()
	}
	in.touch(req.Time)
	in.Attr(&ch.rep.Attr)
	return ch.put(&in)
}

// purge does one bounded step of freeing what the part in req.Shard holds of
// req.Ino at or beyond req.Off and is older than req.Gen. The reply's Eof says that nothing is left.
func (ch *change) purge() error {
	req := ch.req
	if req.Ino == 0 || req.Ino > sealfs.InoMax || req.Off < sealfs.HomeBytes || req.Off > boundMax {
		return refusal(sealfs.ErrInvalid)
	}
	var in Inode
	if err := loadPart(ch.tx, req.Shard, req.Ino, &in); err != nil {
		return err
	}
	if in.Bytes == 0 || in.Gen >= req.Gen {
		ch.rep.Eof, ch.quiet = true, true
		return nil
	}
	done, err := ch.clear(&in, blocksOf(req.Off), noBlock)
	if err != nil {
		return err
	}
	if done {
		if err := ch.trimAt(&in, req.Off); err != nil {
			return err
		}
		// The size that is cut to is the file's bound in this generation so far.
		in.Gen, in.Bound = req.Gen, req.Off
	}
	ch.rep.Eof = done
	return ch.putPart(&in)
}

// dropPart does one bounded step of freeing a part whatever it holds.
func (ch *change) dropPart(in *Inode) (done bool, err error) {
	if done, err = ch.clear(in, homeBlocks, noBlock); err != nil {
		return false, err
	}
	return done, ch.putPart(in)
}
