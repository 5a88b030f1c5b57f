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
		in.resize(req.Size)
		in.attr.Mtime = now
	}
	if req.Valid&op.SetMode != 0 {
		in.attr.Mode = in.attr.Mode&typeMask | req.Mode&permMask
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

// resize cuts or extends a file; what is cut reads as zeros if it ever comes back.
func (in *inode) resize(size uint64) {
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
	switch {
	case n > sealfs.IOMax:
		return sealfs.ErrInvalid
	case off > sealfs.FileSizeMax || n > sealfs.FileSizeMax-off:
		return sealfs.ErrTooBig
	case n == 0:
		rep.Attr, rep.Off = in.attr, off
		return 0
	}
	if fs.limit != 0 {
		grow := uint64(0)
		pieces(off, n, func(b uint64, _, _ int) {
			if in.blocks[b] == nil {
				grow += block
			}
		})
		if grow > 0 && fs.used()+grow > fs.limit {
			return sealfs.ErrNoSpace
		}
	}
	data := req.Data
	pieces(off, n, func(b uint64, from, to int) {
		if in.blocks[b] == nil {
			in.blocks[b] = new(dataBlock)
		}
		data = data[copy(in.blocks[b][from:to], data):]
	})
	in.attr.Size = max(in.attr.Size, off+n)
	in.count()
	if req.Flags&op.KillPriv != 0 {
		in.killPriv()
	}
	in.touched(now)
	rep.Attr, rep.Off = in.attr, off
	return 0
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
	pieces(req.Off, n, func(b uint64, from, to int) {
		if have := in.blocks[b]; have != nil {
			rep.Data = append(rep.Data, have[from:to]...)
		} else {
			rep.Data = append(rep.Data, make([]byte, to-from)...)
		}
	})
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
		for n, b := range in.blocks {
			from, to := max(req.Off, n*block), min(end, (n+1)*block)
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
	if req.Mode&keepSize == 0 {
		in.attr.Size = max(size, end)
	}
	if zero || in.attr.Size != size {
		in.touched(now)
	}
	rep.Attr, rep.Off = in.attr, end
	return 0
}

func (fs *FS) seek(req *op.Request, rep *op.Reply, in *inode) sealfs.Code {
	const seekData, seekHole = 3, 4
	if req.Mode != seekData && req.Mode != seekHole {
		return sealfs.ErrInvalid
	}
	if code := in.refuseNoFile(); code != 0 {
		return code
	}
	if req.Off >= in.attr.Size {
		return sealfs.ErrNoDevice
	}
	rep.Attr = in.attr
	for at := req.Off; at < in.attr.Size; at = (at/block + 1) * block {
		if (in.blocks[at/block] != nil) == (req.Mode == seekData) {
			rep.Off = at
			return 0
		}
	}
	if req.Mode == seekData {
		return sealfs.ErrNoDevice
	}
	rep.Off = in.attr.Size
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
	if in.xattrs == nil {
		in.xattrs = map[string][]byte{}
	}
	in.xattrs[req.Name] = slices.Clone(req.Data)
	in.changed(now)
	rep.Attr = in.attr
	return 0
}

func (fs *FS) removexattr(req *op.Request, rep *op.Reply, in *inode, now int64) sealfs.Code {
	if code := checkXattr(req.Name); code != 0 {
		return code
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
