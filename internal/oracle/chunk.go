package oracle

import (
	"sealfs"
	"sealfs/op"
)

// Here all bytes of a file stand together. Requests for chunks are answered as
// they must be: only for files that have chunks, in the shard that holds the
// chunk, by generation and bound. A truncation is complete at once.

// Whole makes the model one of files without chunks: a request to a file's home
// may be about any of its bytes, and Extend is not understood. It is to be
// called before anything else.
func (fs *FS) Whole() { fs.whole = true }

// aboutChunk reports whether req, for data at req.Off, is about a chunk of in.
func (fs *FS) aboutChunk(req *op.Request, in *inode) bool {
	if in.attr.Bound == 0 || req.Off < sealfs.HomeBytes || req.Off > sealfs.FileSizeMax ||
		req.Ino.DataShard(req.Off, fs.shards) != req.Shard {
		return false
	}
	switch req.Type {
	case op.Read, op.Write, op.Seek:
		return req.Flags&op.Append == 0
	case op.Fallocate:
		return req.Mode&(punchHole|zeroRange) != 0
	}
	return false
}

// chunk answers a request for a chunk.
func (fs *FS) chunk(req *op.Request, rep *op.Reply, in *inode) sealfs.Code {
	chunkEnd := req.Off/sealfs.ChunkBytes*sealfs.ChunkBytes + sealfs.ChunkBytes
	n := req.Len
	if req.Type == op.Write {
		n = uint64(len(req.Data))
	}
	switch {
	case req.Type != op.Seek && n > chunkEnd-req.Off, req.Type != op.Read && req.Type != op.Seek && n == 0:
		return sealfs.ErrInvalid
	case req.Gen != in.attr.Gen, req.Type == op.Write && req.Off+n > in.attr.Bound:
		return sealfs.ErrStale
	}
	rep.Attr = op.Attr{Ino: in.attr.Ino, Mode: typeFile, Gen: in.attr.Gen}
	switch req.Type {
	case op.Write:
		rep.Off = req.Off
		if code := fs.room(in, req.Off, n); code != 0 {
			return code
		}
		in.fill(req.Off, req.Data)
	case op.Read:
		in.copyTo(rep, req.Off, n)
	case op.Fallocate:
		switch req.Mode {
		case punchHole | keepSize, zeroRange, zeroRange | keepSize:
		default:
			return sealfs.ErrNotSupported
		}
		rep.Off = req.Off + n
		in.zero(req.Off, rep.Off, sealfs.FileSizeMax)
	case op.Seek:
		if req.Mode != seekData && req.Mode != seekHole {
			return sealfs.ErrInvalid
		}
		if req.Mode == seekData {
			chunkEnd = max(chunkEnd, req.Off+min(req.Len, sealfs.FileSizeMax+1-req.Off))
		}
		return in.seekTo(req, rep, chunkEnd, func(at uint64) bool { return in.attr.Ino.DataShard(at, fs.shards) == req.Shard })
	}
	return 0
}

// extend answers Extend.
func (fs *FS) extend(req *op.Request, rep *op.Reply, in *inode, now int64) sealfs.Code {
	a := &in.attr
	size, bound := req.Size, req.Off
	if code := in.refuseNoFile(); code != 0 {
		return code
	}
	if fs.whole {
		return sealfs.ErrNotSupported
	}
	if req.Flags&op.Append != 0 {
		if req.Len > sealfs.FileSizeMax-a.Size {
			return sealfs.ErrTooBig
		}
		size = a.Size + req.Len
		if bound = max(bound, a.Bound); size > bound {
			bound = min(sealfs.BoundFor(size), sealfs.FileSizeMax+1)
		}
		rep.Off = a.Size
	}
	switch {
	case size > sealfs.FileSizeMax || bound > sealfs.FileSizeMax+1:
		return sealfs.ErrTooBig
	case req.Gen != a.Gen || a.Bound == 0 && a.Size > sealfs.HomeBytes:
		return sealfs.ErrStale
	}
	a.Size = max(a.Size, size)
	a.Bound = max(a.Bound, bound, sealfs.HomeBytes)
	if req.Flags&op.KillPriv != 0 {
		in.killPriv()
	}
	in.touched(now)
	rep.Attr = *a
	return 0
}

// chunked gives a file chunks that is about to get the size without data.
func (fs *FS) chunked(in *inode, size uint64) {
	if a := &in.attr; !fs.whole && a.Bound == 0 && a.Size <= sealfs.HomeBytes && size > sealfs.HomeBytes {
		a.Bound = sealfs.HomeBytes
	}
}

// cut begins another generation when chunks may have something beyond the size.
func (in *inode) cut() {
	a := &in.attr
	if edge := max(a.Size, sealfs.HomeBytes); a.Bound > edge {
		a.Gen++
		a.Bound = edge
	}
}
