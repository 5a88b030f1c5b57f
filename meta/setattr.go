package meta

import (
	"sealfs"
	"sealfs/op"
	"sealfs/pmem"
)

// setattr changes the attributes that req.Valid names.
func (ch *change) setattr() error {
	req := ch.req
	if req.Valid&op.SetAccess != 0 {
		return ch.access()
	}
	var in Inode
	if err := ch.load(req.Ino, &in); err != nil {
		return err
	}
	before, group := in.Mode, in.GID
	if req.Flags&op.KillPriv != 0 {
		in.killPriv()
	}
	if req.Valid == 0 && in.Mode == before {
		in.Attr(&ch.rep.Attr)
		ch.quiet = true
		return nil
	}
	if req.Valid&op.SetSize != 0 {
		if err := ch.resize(&in, req.Size); err != nil {
			return err
		}
		in.Mtime = req.Time
	}
	if req.Valid&op.SetMode != 0 {
		in.Mode = in.Mode&typeMask | req.Mode&permMask
		if err := ch.chmodACL(&in); err != nil {
			return err
		}
	}
	if req.Valid&op.SetUID != 0 {
		in.UID = req.UID
	}
	if req.Valid&op.SetGID != 0 {
		in.GID = req.GID
	}
	if req.Valid&op.SetAtime != 0 {
		in.Atime = req.Atime
	}
	if req.Valid&op.SetAtimeNow != 0 {
		in.Atime = req.Time
	}
	if req.Valid&op.SetMtime != 0 {
		in.Mtime = req.Mtime
	}
	if req.Valid&op.SetMtimeNow != 0 {
		in.Mtime = req.Time
	}
	if in.isDir() && (in.handsDownOther(before, group) || req.Valid&op.SetMtime != 0) {
		if err := ch.mayRecast(&in); err != nil {
			return err
		}
	}
	in.change(req.Time)
	if req.Valid&op.SetCtime != 0 {
		in.Ctime = req.Ctime
	}
	in.Attr(&ch.rep.Attr)
	return ch.put(&in)
}

// access notes that inodes were read. Neither their times of change nor their versions tell:
// what was read is as it was. Those that have gone meanwhile are left out.
func (ch *change) access() error {
	list := []op.Opens{{Ino: ch.req.Ino, Count: uint64(ch.req.Atime)}}
	err := op.DecodeOpens(ch.req.Data, func(o op.Opens) { list = append(list, o) })
	if err != nil || len(list) > op.AccessMax {
		return refusal(sealfs.ErrInvalid)
	}
	ch.quiet = true
	for i, o := range list {
		if err := ch.at(o.Ino); err != nil {
			return err
		}
		var in Inode
		if err := getInode(ch.tx, ch.c, o.Ino, &in); err == refusal(sealfs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		in.own()
		before := in.Atime
		in.Atime = op.Accessed(in.Atime, in.Mtime, in.Ctime, int64(o.Count))
		if i == 0 {
			in.Attr(&ch.rep.Attr)
		}
		if in.Atime == before {
			continue
		}
		ch.quiet = false
		if err := ch.put(&in); err != nil {
			return err
		}
	}
	return nil
}

// killPriv clears the bits that let a program run as somebody else: a write or a
// change of owner by another must not keep them. Setgid without group
// execution is no such bit (it once meant mandatory locking).
func (in *Inode) killPriv() {
	if in.isDir() {
		return
	}
	in.Mode &^= setuid
	if in.Mode&groupExec != 0 {
		in.Mode &^= setgid
	}
}

// refuseNoFile refuses what only regular files allow.
func (in *Inode) refuseNoFile() error {
	switch {
	case in.isFile():
		return nil
	case in.isDir():
		return refusal(sealfs.ErrIsDir)
	}
	return refusal(sealfs.ErrInvalid)
}

// grow makes in at least size bytes long. It must not uncover a tail that is
// not freed yet: then the caller has to Reclaim first.
func (in *Inode) grow(size uint64) error {
	if size <= in.Size {
		return nil
	}
	if size > sealfs.FileSizeMax {
		return refusal(sealfs.ErrTooBig)
	}
	if in.Flags&flagTail != 0 {
		return refusal(sealfs.ErrAgain)
	}
	// Nor must it uncover what chunks hold, of older generations or of writers
	// that have not told of it (and may be dead): that is cut off and purged before.
	if in.Bound != 0 && size > sealfs.HomeBytes && (in.Cut != 0 || in.Bound > max(in.Size, sealfs.HomeBytes)) {
		return refusal(sealfs.ErrAgain)
	}
	in.Size = size
	return nil
}

// lengthen is grow without data: what is beyond HomeBytes will stand in chunks.
func (in *Inode) lengthen(size uint64) error {
	small := in.Bound == 0 && in.Size <= sealfs.HomeBytes
	if err := in.grow(size); err != nil {
		return err
	}
	if small && in.Size > sealfs.HomeBytes {
		in.Bound = sealfs.HomeBytes
	}
	return nil
}

// resize changes the size of a regular file. The reply's Held names the inode
// when a tail is left for Reclaim.
func (ch *change) resize(in *Inode, size uint64) error {
	if err := in.refuseNoFile(); err != nil {
		return err
	}
	if size >= in.Size {
		return in.lengthen(size)
	}
	in.Size = size
	ch.cut(in)
	done, err := ch.clear(in, blocksOf(size), noBlock)
	if err != nil {
		return err
	}
	before := in.Flags
	in.Flags &^= flagTail
	if !done {
		in.Flags |= flagTail
	}
	if home, chunks := in.Tails(); home || chunks {
		ch.rep.Held = in.Ino
	}
	if ch.rep.Held != 0 || before&flagTail != 0 {
		if err := ch.settleTail(in); err != nil {
			return err
		}
	}
	return ch.trimAt(in, size)
}

// trimAt cuts the extent that holds the block in which size lies to end there.
// Extents beyond that block have been cleared or wait as a tail.
func (ch *change) trimAt(in *Inode, size uint64) error {
	if size%block == 0 {
		return nil
	}
	last := size / block
	if last >= in.endBlock() {
		return nil
	}
	if e := in.first(); e.Len != 0 && e.lastBlock() >= last {
		if e.lastBlock() == last && uint64(e.Len) > size {
			e.trim(uint32(size))
			in.setFirst(&e)
		}
		return nil
	}
	if !in.hasRows() {
		return nil
	}
	k := PartExtentKey(in.place(ch.c), in.Ino, last)
	b, err := pmem.Get(ch.tx, k[:])
	if err == sealfs.ErrNotExist {
		return nil
	}
	if err != nil {
		return err
	}
	var e Extent
	if err := DecodeExtent(b, last, &e); err != nil {
		return err
	}
	if e.Off+uint64(e.Len) <= size {
		return nil
	}
	e.trim(uint32(size - e.Off))
	return ch.putExtent(in, &e)
}
