package meta

import (
	"strings"

	"sealfs"
	"sealfs/op"
	"sealfs/pmem"
)

// FreeMax is how many items (extents, parts of attributes and symlinks, locks,
// entries) one operation frees at most.
const FreeMax = 256

// Space keeps account of the store's space for an operation. What it is told
// is part of the operation and must be forgotten with it.
type Space interface {
	// Payload returns where the payload of this operation will stand.
	Payload() sealfs.LSN
	// Retain says that the n bytes at at are referenced from now on. An error ends the operation.
	Retain(at sealfs.LSN, n uint32) error
	// Release says that the n bytes at at are no longer referenced.
	Release(at sealfs.LSN, n uint32) error
	// Charge changes the usage of volume v.
	Charge(v sealfs.Volume, bytes, inodes int64)
}

// Config is what the namespace has to know of the cluster.
type Config struct {
	Shards uint32 // shard count, a power of two

	// Local reports whether a shard lies on this store; nil: all do. What an
	// operation needs of another store comes with the request, as a vote.
	Local func(sealfs.Shard) bool
	// Guard refuses what a transaction under way is in the way of; nil: there
	// are none. Its error ends the operation and is returned as it is.
	Guard func(tx op.Tx, t Touch) error
	// Altered, if not nil, hears what a change alters, or what it prepares to be
	// altered: the inode ino (attributes, data, extended attributes) or, with a name, this
	// entry of the directory ino, and with it the directory's attributes. It does not hear
	// of new inodes, of which nobody knows. An inode that is gone for good is told
	// apart by gone. Some it hears of more than once.
	Altered func(ino sealfs.Ino, name string, gone bool)

	// Queued, if not nil, hears of what is to be told later: of an inode for which a Tally is due,
	// or, with outbox, of a directory elsewhere for which an outbox of shard s holds something.
	// Some it hears of in vain.
	Queued func(s sealfs.Shard, ino sealfs.Ino, outbox bool)

	hashMask uint64 // tests: bits of name hashes that are dropped, so that names collide
}

// valid reports whether c can be worked with.
func (c Config) valid() bool {
	return c.Shards > 0 && c.Shards <= sealfs.ShardsMax && c.Shards&(c.Shards-1) == 0
}

// change is one operation under way.
type change struct {
	tx  *pmem.Tx
	sp  Space
	c   Config
	req *op.Request
	rep *op.Reply

	shard  ShardState // of req.Shard; written at the end
	quiet  bool       // the operation found nothing to change
	usage  [4]usageDelta
	usages int
	totals tellings
	budget int // items that may still be freed
}

// Apply executes a resolved change in tx and fills rep, which it empties first.
// A refusal is rep.Code, with the lock in the way in rep.Lock for ErrAgain of a
// SetLock; the caller must drop tx then. An error means damage
// (*sealfs.Corruption), a full region or a failure of sp; tx must be dropped, too.
//
// Apply keeps neither req nor its data. It may be called again with the same
// request and another sp.Payload after the transaction was reset.
func Apply(tx *pmem.Tx, sp Space, c Config, req *op.Request, rep *op.Reply) error {
	rep.Reset()
	ch := change{tx: tx, sp: sp, c: c, req: req, rep: rep, budget: FreeMax}
	return answer(ch.run(), rep)
}

// answer moves a refusal from err into rep.
func answer(err error, rep *op.Reply) error {
	if code, ok := err.(refusal); ok {
		lock := rep.Lock
		rep.Reset()
		rep.Code, rep.Lock = sealfs.Code(code), lock
		return nil
	}
	return err
}

func (ch *change) run() error {
	req := ch.req
	if !ch.c.valid() || uint32(req.Shard) >= ch.c.Shards {
		return refusal(sealfs.ErrInvalid)
	}
	if err := readShard(ch.tx, req.Shard, &ch.shard); err != nil {
		return err
	}
	if done, err := ch.answered(); done || err != nil {
		return err
	}
	if err := ch.dispatch(); err != nil || ch.quiet && !ch.numbered() {
		return err
	}
	// What a client may ask for twice leaves a row even if there was nothing to do:
	// a late copy of the request might find something.
	return ch.finish()
}

func (ch *change) dispatch() error {
	req := ch.req
	switch req.Type {
	case op.MakeRoot, op.DropSession, op.DropVolume, op.Prepare, op.Commit, op.Abort, op.Forget, op.Purge, op.Grant, op.Tally, op.Partition:
		// Addressed to a shard.
	case op.Create, op.Mknod, op.Mkdir, op.Symlink, op.Link, op.Unlink, op.Rmdir, op.Rename:
		if err := ch.at(req.Dir); err != nil {
			return err
		}
		if err := checkName(req.Name, sealfs.NameMax); err != nil {
			return err
		}
	case op.Tmpfile:
		if err := ch.at(req.Dir); err != nil {
			return err
		}
	case op.Write, op.Fallocate:
		if err := ch.atData(); err != nil {
			return err
		}
	default:
		if err := ch.at(req.Ino); err != nil {
			return err
		}
	}
	switch req.Type {
	case op.MakeRoot:
		return ch.makeRoot()
	case op.Create:
		return ch.create()
	case op.Mknod:
		return ch.mknod()
	case op.Mkdir:
		return ch.mkdir()
	case op.Symlink:
		return ch.symlink()
	case op.Tmpfile:
		return ch.tmpfile()
	case op.Link:
		return ch.link()
	case op.Unlink:
		return ch.unlink()
	case op.Rmdir:
		return ch.rmdir()
	case op.Rename:
		return ch.rename()
	case op.Setattr:
		return ch.setattr()
	case op.Write:
		return ch.write()
	case op.Fallocate:
		return ch.fallocate()
	case op.Setxattr:
		return ch.setxattr()
	case op.Removexattr:
		return ch.removexattr()
	case op.SetLock:
		return ch.setLock()
	case op.DropOwner:
		return ch.dropOwner()
	case op.DropSession:
		return ch.dropSession()
	case op.Reclaim:
		return ch.reclaim()
	case op.DropVolume:
		return ch.dropVolume()
	case op.Extend:
		return ch.extend()
	case op.Purge:
		return ch.purge()
	case op.Prepare:
		return ch.prepare()
	case op.Commit:
		return ch.commit()
	case op.Abort:
		return ch.abort()
	case op.Forget:
		return ch.forget()
	case op.Grant:
		return ch.grant()
	case op.Tally:
		return ch.tally()
	case op.Split:
		return ch.split()
	case op.Partition:
		return ch.partition()
	}
	return refusal(sealfs.ErrNoSys)
}

// at refuses a request that is not addressed to the home of ino: its
// sequence would be counted in a shard that it does not concern.
func (ch *change) at(ino sealfs.Ino) error {
	if ino == 0 || ino > sealfs.InoMax {
		return refusal(sealfs.ErrNotExist)
	}
	if ino.Home(ch.c.Shards) != ch.req.Shard {
		return refusal(sealfs.ErrInvalid)
	}
	return nil
}

// finish writes what every change leaves behind.
func (ch *change) finish() error {
	if err := ch.remember(); err != nil {
		return err
	}
	if err := ch.flushTotals(); err != nil {
		return err
	}
	if err := ch.flushUsage(); err != nil {
		return err
	}
	if err := ch.decide(); err != nil {
		return err
	}
	ch.shard.Seq++
	ch.shard.Time = max(ch.shard.Time, ch.req.Time)
	return writeShard(ch.tx, ch.req.Shard, &ch.shard)
}

// altered tells of what the operation alters.
func (ch *change) altered(ino sealfs.Ino, name string) {
	if ch.c.Altered != nil {
		ch.c.Altered(ino, name, false)
	}
}

// put writes the record of an inode that the operation alters.
func (ch *change) put(in *Inode) error {
	if !in.fresh && !in.foreign {
		ch.altered(in.Ino, "")
	}
	return ch.record(in)
}

// putDir writes the record of a directory in which the operation has altered
// entries, and nothing else but the attributes that follow from them.
func (ch *change) putDir(in *Inode) error { return ch.record(in) }

// record writes an inode's record.
func (ch *change) record(in *Inode) error {
	if in.foreign {
		return nil // its own store writes it, when it commits
	}
	var err error
	if in.Counted {
		err = ch.takeTold(in)
	} else if in.sized() {
		err = ch.tellSize(in)
	}
	if err != nil {
		return err
	}
	var b [inodeRecordMax]byte
	k := InodeKey(ch.c.Shards, in.Ino)
	return ch.tx.Set(k[:], in.Append(b[:0]))
}

// load reads an inode that the request names, to be changed.
func (ch *change) load(ino sealfs.Ino, in *Inode) error {
	if !ch.c.local(ino) {
		return ch.vote(ino, in)
	}
	if err := getInode(ch.tx, ch.c, ino, in); err != nil {
		return ch.absent(ino, err)
	}
	in.own()
	return nil
}

// loadDir reads a directory that the request names, to be changed. A removed
// directory that somebody still holds is none: nothing can be made in it.
func (ch *change) loadDir(ino sealfs.Ino, in *Inode) error {
	if !ch.c.local(ino) {
		if err := ch.vote(ino, in); err != nil {
			return err
		}
		if !in.isDir() {
			return refusal(sealfs.ErrNotDir)
		}
		return nil
	}
	if err := getDir(ch.tx, ch.c, ino, in); err != nil {
		return ch.absent(ino, err)
	}
	if in.Nlink == 0 {
		return refusal(sealfs.ErrNotExist)
	}
	return in.refuseSealed()
}

// loadEntry reads the inode that an entry refers to, to be changed.
func (ch *change) loadEntry(e *Entry, in *Inode) error {
	if !ch.c.local(e.Ino) {
		return ch.vote(e.Ino, in)
	}
	err := GetInode(ch.tx, ch.c, e.Ino, in)
	if err == sealfs.ErrNotExist {
		return damaged("entry %d of directory %d refers to inode %d, which does not exist", e.Cookie, e.Dir, e.Ino)
	}
	if err != nil {
		return err
	}
	if uint8(in.Mode>>12) != e.Type {
		return damaged("entry %d of directory %d has type %d, inode %d has mode %o", e.Cookie, e.Dir, e.Type, e.Ino, in.Mode)
	}
	in.own()
	return nil
}

// checkName refuses what cannot be the name of an entry or attribute.
func checkName(name string, limit int) error {
	if len(name) > limit {
		return refusal(sealfs.ErrNameTooLong)
	}
	if name == "" || name == "." || name == ".." || strings.IndexByte(name, '/') >= 0 || strings.IndexByte(name, 0) >= 0 {
		return refusal(sealfs.ErrInvalid)
	}
	return nil
}
