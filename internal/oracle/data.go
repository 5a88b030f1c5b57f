package oracle

import (
	"slices"
	"strings"

	"sealfs"
	"sealfs/op"
)

const block = sealfs.BlockSize

// killPriv clears the bits that let a program run as somebody else.
func (in *inode) killPriv() {
	if in.isDir() {
		return
	}
	in.attr.Mode &^= setuid
	if in.attr.Mode&groupExec != 0 {
		in.attr.Mode &^= setgid
	}
}

func (fs *FS) setattr(req *op.Request, rep *op.Reply, in *inode, now int64) sealfs.Code {
	if req.Valid&op.SetSize != 0 {
		if code := in.refuseNoFile(); code != 0 {
			return code
		}
		if req.Size > sealfs.FileSizeMax {
			return sealfs.ErrTooBig
		}
	}
	before := in.attr.Mode
	if req.Flags&op.KillPriv != 0 {
		in.killPriv()
	}
	if req.Valid == 0 && in.attr.Mode == before {
		rep.Attr = in.attr
		return 0
	}
	if req.Valid&op.SetSize != 0 {
		fs.resize(in, req.Size)
		in.attr.Mtime = now
	}
	if req.Valid&op.SetMode != 0 {
		in.attr.Mode = in.attr.Mode&^permMask | req.Mode&permMask
		in.chmodACL()
	}
	if req.Valid&op.SetUID != 0 {
		in.attr.UID = req.UID
	}
	if req.Valid&op.SetGID != 0 {
		in.attr.GID = req.GID
	}
	if req.Valid&op.SetAtime != 0 {
		in.attr.Atime = req.Atime
	}
	if req.Valid&op.SetAtimeNow != 0 {
		in.attr.Atime = now
	}
	if req.Valid&op.SetMtime != 0 {
		in.attr.Mtime = req.Mtime
	}
	if req.Valid&op.SetMtimeNow != 0 {
		in.attr.Mtime = now
	}
	in.changed(now)
	if req.Valid&op.SetCtime != 0 {
		in.attr.Ctime = req.Ctime
	}
	rep.Attr = in.attr
	return 0
}

// access answers a Setattr with SetAccess.
func (fs *FS) access(req *op.Request, rep *op.Reply) sealfs.Code {
	list := []op.Opens{{Ino: req.Ino, Count: uint64(req.Atime)}}
	if op.DecodeOpens(req.Data, func(o op.Opens) { list = append(list, o) }) != nil || len(list) > op.AccessMax {
		return sealfs.ErrInvalid
	}
	for i, o := range list {
		if o.Ino.Home(fs.shards) != req.Shard {
			return sealfs.ErrInvalid
		}
		in := fs.inodes[o.Ino]
		if in == nil {
			continue
		}
		in.attr.Atime = op.Accessed(in.attr.Atime, in.attr.Mtime, in.attr.Ctime, int64(o.Count))
		if i == 0 {
			rep.Attr = in.attr
		}
	}
	return 0
}

// resize cuts or extends a file; what is cut reads as zeros if it ever comes
// back, and so does what chunks got beyond the size.
func (fs *FS) resize(in *inode, size uint64) {
	before := in.attr.Size
	fs.chunked(in, size)
	in.clip(min(size, before))
	if size != before && (size < before || size > sealfs.HomeBytes) {
		in.cut()
	}
	in.attr.Size = size
}

// clip makes the file end at size.
func (in *inode) clip(size uint64) {
	for n := range in.blocks {
		if n*block >= size {
			delete(in.blocks, n)
		}
	}
	if b := in.blocks[size/block]; b != nil {
		clear(b[size%block:])
	}
	in.attr.Size = size
	in.count()
}

func (in *inode) count() { in.attr.Blocks = uint64(len(in.blocks)) * (block / 512) }

// pieces calls fn for the parts of [off, off+n) that lie in one block each.
func pieces(off, n uint64, fn func(blockNo uint64, from, to int)) {
	for n > 0 {
		from := off % block
		part := min(n, block-from)
		fn(off/block, int(from), int(from+part))
		off, n = off+part, n-part
	}
}

func (fs *FS) write(req *op.Request, rep *op.Reply, in *inode, now int64) sealfs.Code {
	if code := in.refuseNoFile(); code != 0 {
		return code
	}
	off, n := req.Off, uint64(len(req.Data))
	if req.Flags&op.Append != 0 {
		off = in.attr.Size
	}
	appends := req.Flags&op.Append != 0
	if req.Flags&op.Within != 0 {
		n = min(n, in.attr.Size-min(off, in.attr.Size))
	}
	switch {
	case n > sealfs.IOMax:
		return sealfs.ErrInvalid
	case off > sealfs.FileSizeMax || n > sealfs.FileSizeMax-off:
		return sealfs.ErrTooBig
	case n == 0:
		rep.Attr, rep.Off = in.attr, off
		return 0
	case off+n <= sealfs.HomeBytes || fs.whole:
	case appends && (in.attr.Bound != 0 || req.Len != 0):
		return sealfs.ErrTooBig
	case in.attr.Bound != 0:
		return sealfs.ErrStale
	}
	if code := fs.room(in, off, n); code != 0 {
		return code
	}
	in.fill(off, req.Data[:n])
	in.attr.Size = max(in.attr.Size, off+n)
	if req.Flags&op.KillPriv != 0 {
		in.killPriv()
	}
	in.touched(now)
	rep.Attr, rep.Off = in.attr, off
	return 0
}

// room says whether the n bytes at off may take the blocks that they need.
func (fs *FS) room(in *inode, off, n uint64) sealfs.Code {
	if fs.limit == 0 {
		return 0
	}
	grow := uint64(0)
	pieces(off, n, func(b uint64, _, _ int) {
		if in.blocks[b] == nil {
			grow += block
		}
	})
	if grow > 0 && fs.used()+grow > fs.limit {
		return sealfs.ErrNoSpace
	}
	return 0
}

func (in *inode) fill(off uint64, data []byte) {
	pieces(off, uint64(len(data)), func(b uint64, from, to int) {
		if in.blocks[b] == nil {
			in.blocks[b] = new(dataBlock)
		}
		data = data[copy(in.blocks[b][from:to], data):]
	})
	in.count()
}

func (in *inode) copyTo(rep *op.Reply, off, n uint64) {
	pieces(off, n, func(b uint64, from, to int) {
		if have := in.blocks[b]; have != nil {
			rep.Data = append(rep.Data, have[from:to]...)
		} else {
			rep.Data = append(rep.Data, make([]byte, to-from)...)
		}
	})
}

func (fs *FS) read(req *op.Request, rep *op.Reply, in *inode) sealfs.Code {
	if code := in.refuseNoFile(); code != 0 {
		return code
	}
	if req.Len > sealfs.IOMax {
		return sealfs.ErrInvalid
	}
	left := in.attr.Size - min(req.Off, in.attr.Size)
	n := min(req.Len, left)
	if in.attr.Bound != 0 {
		if req.Off >= sealfs.HomeBytes {
			return sealfs.ErrStale
		}
		n = min(n, sealfs.HomeBytes-req.Off)
	}
	in.copyTo(rep, req.Off, n)
	rep.Eof = n == left
	rep.Attr = in.attr
	return 0
}

// Bits of fallocate(2)'s mode.
const (
	keepSize  = 0x01
	punchHole = 0x02
	zeroRange = 0x10
)

func (fs *FS) fallocate(req *op.Request, rep *op.Reply, in *inode, now int64) sealfs.Code {
	if code := in.refuseNoFile(); code != 0 {
		return code
	}
	switch {
	case req.Len == 0:
		return sealfs.ErrInvalid
	case req.Off > sealfs.FileSizeMax || req.Len > sealfs.FileSizeMax-req.Off:
		return sealfs.ErrTooBig
	}
	end, size, zero := req.Off+req.Len, in.attr.Size, true
	switch req.Mode {
	case 0, keepSize:
		zero = false
	case punchHole | keepSize, zeroRange, zeroRange | keepSize:
	default:
		return sealfs.ErrNotSupported
	}
	if zero {
		if req.Off >= sealfs.HomeBytes && in.attr.Bound != 0 {
			return sealfs.ErrStale
		}
		to := end
		if in.attr.Bound != 0 {
			to = min(end, sealfs.HomeBytes)
		}
		in.zero(req.Off, to, size)
	}
	if req.Mode&keepSize == 0 && end > size {
		fs.resize(in, end)
	}
	in.touched(now)
	rep.Attr, rep.Off = in.attr, end
	return 0
}

// zero makes a hole of [off, end); a block is whole also up to the size.
func (in *inode) zero(off, end, size uint64) {
	for n, b := range in.blocks {
		from, to := max(off, n*block), min(end, (n+1)*block)
		if from >= to {
			continue
		}
		clear(b[from-n*block : to-n*block])
		if from == n*block && (to == (n+1)*block || end >= size) {
			delete(in.blocks, n)
		}
	}
	in.count()
}

const seekData, seekHole = 3, 4

func (fs *FS) seek(req *op.Request, rep *op.Reply, in *inode) sealfs.Code {
	if req.Mode != seekData && req.Mode != seekHole {
		return sealfs.ErrInvalid
	}
	if code := in.refuseNoFile(); code != 0 {
		return code
	}
	rep.Attr = in.attr
	end := in.attr.Size
	if in.attr.Bound != 0 {
		if req.Off >= sealfs.HomeBytes {
			return sealfs.ErrStale
		}
		end = min(end, sealfs.HomeBytes)
	}
	if req.Off >= in.attr.Size {
		return sealfs.ErrNoDevice
	}
	return in.seekTo(req, rep, end, nil)
}

// seekTo looks for data or a hole up to end. Data counts where mine says so, nil for everywhere.
func (in *inode) seekTo(req *op.Request, rep *op.Reply, end uint64, mine func(uint64) bool) sealfs.Code {
	if req.Mode == seekData {
		next := end
		for n := range in.blocks {
			if at := max(n*block, req.Off); n >= req.Off/block && at < next && (mine == nil || mine(at)) {
				next = at
			}
		}
		if next == end {
			return sealfs.ErrNoDevice
		}
		rep.Off = next
		return 0
	}
	for at := req.Off; at < end; at = (at/block + 1) * block {
		if in.blocks[at/block] == nil {
			rep.Off = at
			return 0
		}
	}
	rep.Off = end
	return 0
}

func checkXattr(name string) sealfs.Code {
	switch {
	case len(name) > sealfs.XattrNameMax:
		return sealfs.ErrRange
	case name == "" || strings.Contains(name, "\x00"):
		return sealfs.ErrInvalid
	}
	return 0
}

// names returns the length of the list of all attribute names.
func (in *inode) names() int {
	n := 0
	for name := range in.xattrs {
		n += len(name) + 1
	}
	return n
}

func (fs *FS) setxattr(req *op.Request, rep *op.Reply, in *inode, now int64) sealfs.Code {
	if code := checkXattr(req.Name); code != 0 {
		return code
	}
	if isACL(req.Name) && len(req.Data) <= sealfs.XattrValueMax {
		return fs.setACL(req, rep, in, now)
	}
	_, found := in.xattrs[req.Name]
	switch {
	case len(req.Data) > sealfs.XattrValueMax:
		return sealfs.ErrArgTooBig
	case found && req.Flags&op.XCreate != 0:
		return sealfs.ErrExist
	case !found && req.Flags&op.XReplace != 0:
		return sealfs.ErrNoData
	case !found && in.names()+len(req.Name)+1 > sealfs.XattrListMax:
		return sealfs.ErrArgTooBig
	}
	in.put(req.Name, req.Data)
	in.changed(now)
	rep.Attr = in.attr
	return 0
}

func (fs *FS) removexattr(req *op.Request, rep *op.Reply, in *inode, now int64) sealfs.Code {
	if code := checkXattr(req.Name); code != 0 {
		return code
	}
	if isACL(req.Name) {
		return fs.removeACL(req, rep, in, now)
	}
	if _, found := in.xattrs[req.Name]; !found {
		return sealfs.ErrNoData
	}
	delete(in.xattrs, req.Name)
	in.changed(now)
	rep.Attr = in.attr
	return 0
}

func (fs *FS) getxattr(req *op.Request, rep *op.Reply, in *inode) sealfs.Code {
	if code := checkXattr(req.Name); code != 0 {
		return code
	}
	value, found := in.xattrs[req.Name]
	if !found {
		return sealfs.ErrNoData
	}
	return answerSized(req, rep, value)
}

func (fs *FS) listxattr(req *op.Request, rep *op.Reply, in *inode) sealfs.Code {
	var list []string
	for name := range in.xattrs {
		list = append(list, name+"\x00")
	}
	slices.Sort(list)
	return answerSized(req, rep, []byte(strings.Join(list, "")))
}

// answerSized answers b, or only its length when Len is 0.
func answerSized(req *op.Request, rep *op.Reply, b []byte) sealfs.Code {
	rep.Off = uint64(len(b))
	if req.Len == 0 {
		return 0
	}
	if uint64(len(b)) > req.Len {
		return sealfs.ErrRange
	}
	rep.Data = append(rep.Data, b...)
	return 0
}
