package meta

import (
	"sealfs"
	"sealfs/op"
	"sealfs/pmem"
)

// Query answers the questions that need nothing but the namespace: Lookup,
// Getattr, Readlink, Readdir, Getxattr, Listxattr, TestLock and Seek; others are
// refused with ErrNoSys. It empties rep first and appends to the room of its
// Data and Entries. A refusal is rep.Code; an error means damage.
func Query(r pmem.Reader, c Config, req *op.Request, rep *op.Reply) error {
	rep.Reset()
	err := query(r, c, req, rep)
	if req.Ino != 0 {
		err = c.absent(req, req.Ino, err) // a new directory may be on its way
	}
	of := rep.Off
	if err = answer(err, rep); err == nil && req.Type == op.Lookup {
		rep.Off = of // also of a name that is not there
	}
	return err
}

func query(r pmem.Reader, c Config, req *op.Request, rep *op.Reply) error {
	if !c.valid() {
		return refusal(sealfs.ErrInvalid)
	}
	switch req.Type {
	case op.Lookup:
		return lookup(r, c, req, rep)
	case op.Getattr:
		return getattr(r, c, req, rep)
	case op.Readlink:
		return readlink(r, c, req, rep)
	case op.Readdir:
		return readdir(r, c, req, rep)
	case op.Getxattr:
		return getxattr(r, c, req, rep)
	case op.Listxattr:
		return listxattr(r, c, req, rep)
	case op.TestLock:
		return testLock(r, c, req, rep)
	case op.Seek:
		return seek(r, c, req, rep)
	case op.Resolve:
		return resolve(r, req, rep)
	case op.Ancestors:
		return ancestors(r, c, req, rep)
	}
	return refusal(sealfs.ErrNoSys)
}

func getattr(r pmem.Reader, c Config, req *op.Request, rep *op.Reply) error {
	var in Inode
	if err := getInode(r, c, req.Ino, &in); err != nil {
		return err
	}
	if err := in.refuseClosed(); err != nil {
		return err
	}
	if err := c.touchAttr(req, &in); err != nil {
		return err
	}
	in.Attr(&rep.Attr)
	if req.Flags&op.Plus != 0 {
		return partitions(r, c, &in, rep)
	}
	return nil
}

// readlink answers Readlink with the target in Data.
func readlink(r pmem.Reader, c Config, req *op.Request, rep *op.Reply) error {
	var in Inode
	if err := getInode(r, c, req.Ino, &in); err != nil {
		return err
	}
	if !in.isLink() {
		return refusal(sealfs.ErrInvalid)
	}
	in.Attr(&rep.Attr)
	rep.Data = append(rep.Data, in.Target...)
	if len(in.Target) > 0 {
		return nil
	}
	for part, rest := 0, int(in.Size); rest > 0; part++ {
		k := SymlinkKey(c.Shards, in.Ino, uint8(part))
		b, err := pmem.Get(r, k[:])
		if err == sealfs.ErrNotExist || err == nil && len(b) != min(rest, symlinkPart) {
			return damaged("part %d of the target of symlink %d is missing or has another length", part, in.Ino)
		}
		if err != nil {
			return err
		}
		rep.Data = append(rep.Data, b...)
		rest -= len(b)
	}
	return nil
}
