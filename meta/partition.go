package meta

import (
	"encoding/binary"
	"errors"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/op"
	"sealfs/pmem"
)

// The entries of a large directory move, one partition after the other, from its home to
// directories that have no name: partitions (op.Partitions). A partition is an inode like
// that of any directory, in the shard that its number says; its entries stand under the
// cookies that they have in the directory that it is a part of. So whoever works on a name in a partition does
// what he does in any directory. What differs:
//
//   - The home answers ErrStale for a name whose partition has moved, and a partition that is not in
//     use ErrUnavailable.
//   - The parent of a subdirectory is the directory itself, whatever partition names it (Inode.self).
//   - A partition counts its entries and subdirectories, and has their times; the home has those of
//     what has not moved. Merge says what that is together.
//   - What is handed down to new inodes stands in each partition as well. The home changes it
//     while all of them are sealed.
//
// Rows of KindPartition say which inodes the partitions are: at home for those that are in use,
// and in the shard of each, so that one that was made is found again whatever becomes of
// the answer. One more row at home, under the number workRow, says that the home's server
// has something to do for the directory; then its Gen is 1.

// The Bound of a directory: of one that was split, one more than the number of partitions that have
// moved; of a partition, partitionBound plus four times its number plus its state.
const (
	homeBoundMax   = 1 + op.Partitions
	partitionBound = op.PartitionBound
	workRow        = 255
)

// The states of a partition.
const (
	partFilling = iota // entries are coming, nobody else knows of it
	partOpen
	partSealed  // no changes
	partClosing // no changes and no questions: it is empty, and may go
	partStates
)

// IsSplit reports whether entries of the directory may stand in partitions.
func (in *Inode) IsSplit() bool { return in.isDir() && in.Bound != 0 && in.Bound < partitionBound }

// IsPartition reports whether in is no directory of its own but a part of one, its Parent.
func (in *Inode) IsPartition() bool { return in.isDir() && in.Bound >= partitionBound }

// Moved returns how many partitions of the directory are in use: those with lower numbers.
func (in *Inode) Moved() uint64 {
	if !in.IsSplit() {
		return 0
	}
	return in.Bound - 1
}

// Working reports whether the home's server has something to do for the directory.
func (in *Inode) Working() bool { return in.isDir() && !in.IsPartition() && in.Gen != 0 }

// InUse reports whether the entries in the directory count: it is no partition that is just being filled.
func (in *Inode) InUse() bool { return !in.IsPartition() || in.partState() != partFilling }

// Number returns the number of a partition.
func (in *Inode) Number() uint64 { return (in.Bound - partitionBound) / partStates }

func (in *Inode) partState() uint64 { return (in.Bound - partitionBound) % partStates }

func (in *Inode) setState(state uint64) {
	in.Bound = partitionBound + in.Number()*partStates + state
}

// self returns the directory that in is, or is a partition of.
func (in *Inode) self() sealfs.Ino {
	if in.IsPartition() {
		return in.Parent
	}
	return in.Ino
}

// occupied reports whether there are entries in a directory, or partitions in which there
// may be some.
func (in *Inode) occupied() bool { return in.Size != 0 || in.Bound != 0 || in.Gen != 0 }

// plausibleDir reports whether generation and bound can be those of a directory.
func (in *Inode) plausibleDir() bool {
	switch {
	case in.Cut != 0:
		return false
	case in.Bound >= partitionBound:
		return in.Bound < partitionBound+op.Partitions*partStates && in.Gen != 0 && in.Parent != in.Ino
	}
	return in.Bound <= homeBoundMax && in.Gen <= 1 && in.Gen+in.Bound != 0
}

// hasMoved reports whether the entry at cookie, if any, stands in a partition.
func (in *Inode) hasMoved(cookie uint64) bool { return op.PartitionOf(cookie) < in.Moved() }

// refuseClosed refuses questions about a partition that is not in use.
func (in *Inode) refuseClosed() error {
	if in.IsPartition() && (in.partState() == partFilling || in.partState() == partClosing) {
		return refusal(sealfs.ErrUnavailable)
	}
	return nil
}

// refuseSealed refuses changes of entries of a partition that does not take any.
func (in *Inode) refuseSealed() error {
	if in.IsPartition() && in.partState() != partOpen {
		return refusal(sealfs.ErrUnavailable)
	}
	return nil
}

// DecodePartition reads a row of KindPartition, or returns a *sealfs.Corruption.
func DecodePartition(b []byte) (sealfs.Ino, error) {
	r := enc.Reader{B: b}
	ino := sealfs.Ino(r.Uvarint())
	if !r.Done() || ino == 0 || ino > sealfs.InoMax {
		return 0, damaged("record %x of a partition", b)
	}
	return ino, nil
}

func (ch *change) putPartition(s sealfs.Shard, dir sealfs.Ino, number uint8, ino sealfs.Ino) error {
	k := PartitionKey(s, dir, number)
	return ch.tx.Set(k[:], binary.AppendUvarint(nil, uint64(ino)))
}

func (ch *change) dropPartition(s sealfs.Shard, dir sealfs.Ino, number uint8) error {
	k := PartitionKey(s, dir, number)
	if err := ch.tx.Delete(k[:]); err != sealfs.ErrNotExist {
		return err
	}
	return nil
}

// PartitionAt returns the inode that is a partition of dir, as shard s knows it, 0 for none.
func PartitionAt(r pmem.Reader, s sealfs.Shard, dir sealfs.Ino, number uint8) (sealfs.Ino, error) {
	k := PartitionKey(s, dir, number)
	b, err := pmem.Get(r, k[:])
	if err == sealfs.ErrNotExist {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return DecodePartition(b)
}

// PartitionsOf returns the partitions that the home of dir knows, by number. Of one that is not split any more
// that are those it has had, 0 for such as are gone.
func PartitionsOf(r pmem.Reader, c Config, in *Inode) ([]sealfs.Ino, error) {
	most := uint64(op.Partitions)
	if in.Bound != 0 {
		most = in.Moved()
	}
	home := in.Ino.Home(c.Shards)
	var list []sealfs.Ino
	for i := range most {
		ino, err := PartitionAt(r, home, in.Ino, uint8(i))
		if err != nil {
			return nil, err
		}
		if ino == 0 && in.Bound != 0 {
			return nil, damaged("partition %d of directory %d is not known", i, in.Ino)
		}
		list = append(list, ino)
	}
	return list, nil
}

// WorkOn calls fn for the directories for which their home's server has something to do, in a shard.
func WorkOn(r pmem.Reader, c Config, s sealfs.Shard, fn func(dir sealfs.Ino)) error {
	var head [3]byte
	putHead(head[:], s, KindPartition)
	var cur pmem.Cursor
	for ok := cur.Seek(r, head[:]); ok && inRange(&cur, head[:]); {
		key, err := DecodeKey(cur.Key())
		if err != nil {
			return err
		}
		if key.Part < workRow {
			// The rows between are of no interest.
			k := PartitionKey(s, key.Ino, workRow)
			ok = cur.Seek(r, k[:])
			continue
		}
		if key.Ino.Home(c.Shards) == s {
			fn(key.Ino)
		}
		ok = cur.Next()
	}
	return cur.Err()
}

// Inherited is what a directory hands down to what is made in it, for its partitions.
func Inherited(r pmem.Reader, c Config, in *Inode, req *op.Request) error {
	a, err := handedDown(r, c, in)
	req.Rdev, req.UID, req.GID, req.Volume, req.Mtime, req.Data = in.Mode, in.UID, in.GID, in.Volume, in.Mtime, a
	if in.Counted {
		req.Flags |= op.Counted
	}
	return err
}

// handsDownOther reports whether partitions must learn of a change of a directory that had this mode and group.
func (in *Inode) handsDownOther(mode, gid uint32) bool {
	return in.Moved() > 0 && ((in.Mode^mode)&setgid != 0 || in.Mode&setgid != 0 && in.GID != gid)
}

// mayRecast refuses a change of what partitions must learn, unless they are sealed: the server sees to that.
func (ch *change) mayRecast(in *Inode) error {
	if in.Moved() > 0 && ch.req.Flags&op.Walked == 0 {
		return refusal(sealfs.ErrStale)
	}
	return nil
}

// partitions answers a Getattr with the flag Plus: the partitions of a directory, in Data.
func partitions(r pmem.Reader, c Config, in *Inode, rep *op.Reply) error {
	if !in.IsSplit() {
		return nil
	}
	list, err := PartitionsOf(r, c, in)
	for _, ino := range list {
		rep.Data = op.AppendPartition(rep.Data, ino)
	}
	return err
}

// split does one step at the home of a directory.
func (ch *change) split() error {
	req := ch.req
	var in Inode
	if err := ch.load(req.Ino, &in); err != nil {
		return err
	}
	if !in.isDir() || in.IsPartition() {
		return refusal(sealfs.ErrNotDir)
	}
	home := req.Shard
	switch req.Mode {
	case op.SplitBegin:
		if in.Nlink == 0 || in.Bound == 0 && in.Gen != 0 {
			return refusal(sealfs.ErrStale)
		}
		in.Gen, in.Bound = 1, max(in.Bound, 1)
		if err := ch.putPartition(home, in.Ino, workRow, in.Ino); err != nil {
			return err
		}
		return ch.put(&in)
	case op.SplitMoved:
		return ch.splitMoved(&in)
	case op.SplitClean:
		return ch.splitClean(&in)
	case op.SplitSealed:
		if in.Bound == 0 {
			return refusal(sealfs.ErrStale)
		}
		in.Gen = 1
		if err := ch.putPartition(home, in.Ino, workRow, in.Ino); err != nil {
			return err
		}
		return ch.record(&in)
	case op.SplitFold, op.SplitJoined:
		if in.Bound == 0 || in.Gen == 0 {
			return refusal(sealfs.ErrStale)
		}
		in.Mtime, in.Ctime = max(in.Mtime, req.Mtime), max(in.Ctime, req.Ctime)
		in.Version += req.Len
		if req.Mode == op.SplitFold {
			return ch.record(&in)
		}
		if in.Size != 0 {
			return refusal(sealfs.ErrNotEmpty)
		}
		in.Bound = 0
		return ch.put(&in)
	case op.SplitDone:
		if in.Bound == 0 {
			for i := range op.Partitions {
				if err := ch.dropPartition(home, in.Ino, uint8(i)); err != nil {
					return err
				}
			}
		}
		in.Gen = 0
		if err := ch.dropPartition(home, in.Ino, workRow); err != nil {
			return err
		}
		return ch.record(&in)
	}
	return refusal(sealfs.ErrInvalid)
}

// splitMoved lets a partition stand elsewhere. What has moved is not looked at any more here.
func (ch *change) splitMoved(in *Inode) error {
	req := ch.req
	switch {
	case in.Nlink == 0 || in.Bound != req.Off+1 || req.Off >= op.Partitions || req.Dir2 == 0 || req.Size > req.Len:
		return refusal(sealfs.ErrStale)
	case in.Size < req.Len || uint64(in.Nlink) < 2+req.Size:
		return damaged("directory %d counts %d entries and %d links, but %d and %d have moved", in.Ino, in.Size, in.Nlink, req.Len, req.Size)
	}
	in.Size -= req.Len
	in.Nlink -= uint32(req.Size)
	in.Bound++
	if err := ch.putPartition(req.Shard, in.Ino, uint8(req.Off), req.Dir2); err != nil {
		return err
	}
	return ch.record(in)
}

// splitClean frees some of the entries that have moved.
func (ch *change) splitClean(in *Inode) error {
	var prefix [11]byte
	putIno(prefix[:], ch.c.Shards, KindEntry, in.Ino)
	end := EntryKey(ch.c.Shards, in.Ino, op.PartitionStart(in.Moved()))
	n, _, err := ch.deleteUpTo(prefix[:], end[:])
	ch.quiet = n == 0
	ch.rep.Eof = ch.budget > 0
	return err
}

// partition does one step of a partition.
func (ch *change) partition() error {
	req := ch.req
	switch req.Mode {
	case op.PartitionBegin:
		return ch.partitionBegin()
	case op.PartitionDrop:
		return ch.partitionDrop()
	}
	var in Inode
	if err := ch.at(req.Ino); err != nil {
		return err
	}
	if err := ch.load(req.Ino, &in); err != nil {
		return err
	}
	if !in.IsPartition() {
		return refusal(sealfs.ErrNotDir)
	}
	in.Attr(&ch.rep.Attr)
	switch req.Mode {
	case op.PartitionAdd:
		return ch.partitionAdd(&in)
	case op.PartitionOpen:
		if ch.quiet = in.partState() == partOpen; ch.quiet {
			return nil
		}
		if in.partState() != partFilling || req.Gen != 0 && (in.Gen != req.Gen || in.Size != req.Len) {
			return refusal(sealfs.ErrStale)
		}
		in.setState(partOpen)
	case op.PartitionSeal:
		again := in.Gen == req.Gen && in.partState() == sealedAs(req.Flags)
		if ch.quiet = again; again {
			return nil
		}
		if in.partState() == partFilling || req.Gen <= in.Gen {
			return refusal(sealfs.ErrStale)
		}
		if err := ch.touch(TouchEmpty, in.Ino, ""); err != nil {
			return err
		}
		in.Gen = req.Gen
		in.setState(sealedAs(req.Flags))
		if req.Flags&op.Excl == 0 {
			break
		}
		if in.Size != 0 {
			return refusal(sealfs.ErrNotEmpty)
		}
		return ch.put(&in)
	case op.PartitionReopen:
		if ch.quiet = in.Gen == req.Gen && in.partState() == partOpen; ch.quiet {
			return nil
		}
		if in.partState() < partSealed || req.Gen != in.Gen {
			return refusal(sealfs.ErrStale)
		}
		if err := ch.inheritAs(&in); err != nil {
			return err
		}
		in.setState(partOpen)
		if in.Mtime != req.Mtime {
			in.Mtime = req.Mtime
			in.Version++
			return ch.put(&in)
		}
	default:
		return refusal(sealfs.ErrInvalid)
	}
	return ch.record(&in)
}

func sealedAs(f op.Flags) uint64 {
	if f&op.Excl != 0 {
		return partClosing
	}
	return partSealed
}

// inheritAs lets a partition hand down what its directory does.
func (ch *change) inheritAs(in *Inode) error {
	req := ch.req
	a, err := parseACL(req.Data)
	if err != nil {
		return err
	}
	in.Mode, in.UID, in.GID = typeDir|req.Rdev&permMask, req.UID, req.GID
	switch {
	case a != nil:
		in.Flags |= flagDefault
		return ch.putAttr(in, op.ACLDefault, a, 0)
	case in.Flags&flagDefault != 0:
		in.Flags &^= flagDefault
		return ch.dropAttr(in, op.ACLDefault)
	}
	return nil
}

// partitionBegin makes a partition, or begins anew with one that is not in use yet.
func (ch *change) partitionBegin() error {
	req := ch.req
	if req.Dir == 0 || req.Dir > sealfs.InoMax || req.Off >= op.Partitions || req.Gen == 0 || req.Volume == 0 {
		return refusal(sealfs.ErrInvalid)
	}
	ino, err := PartitionAt(ch.tx, req.Shard, req.Dir, uint8(req.Off))
	if err != nil {
		return err
	}
	var in Inode
	if ino == 0 {
		if err := ch.issue(&in, req.Shard, req.Volume, typeDir); err != nil {
			return err
		}
		in.Parent, in.Bound = req.Dir, partitionBound+req.Off*partStates
		if err := ch.putPartition(req.Shard, req.Dir, uint8(req.Off), in.Ino); err != nil {
			return err
		}
	} else {
		if err := ch.load(ino, &in); err != nil {
			return err
		}
		if in.partState() != partFilling || in.Gen > req.Gen {
			return refusal(sealfs.ErrStale)
		}
	}
	var prefix [11]byte
	putIno(prefix[:], ch.c.Shards, KindEntry, in.Ino)
	if _, _, err := ch.deleteRange(prefix[:]); err != nil {
		return err
	}
	ch.rep.Eof = ch.budget > 0
	in.Gen, in.Size, in.Nlink, in.Counted = req.Gen, 0, 2, req.Flags&op.Counted != 0
	if err := ch.inheritAs(&in); err != nil {
		return err
	}
	in.Atime, in.Mtime, in.Ctime, in.Btime = req.Mtime, req.Mtime, req.Mtime, req.Mtime
	in.Attr(&ch.rep.Attr)
	return ch.record(&in)
}

// partitionAdd adds entries to a partition that is not in use yet.
func (ch *change) partitionAdd(in *Inode) error {
	req := ch.req
	if in.partState() != partFilling || in.Gen != req.Gen || in.Size != req.Len {
		return refusal(sealfs.ErrStale)
	}
	err := op.DecodeEntries(req.Data, func(e *op.MovedEntry) error {
		if op.PartitionOf(e.Cookie) != in.Number() {
			return refusal(sealfs.ErrInvalid)
		}
		in.Size++
		if e.Type == typeDir>>12 {
			in.Nlink++
		}
		row := Entry{Ino: e.Ino, Type: e.Type, Name: []byte(e.Name)}
		k := EntryKey(ch.c.Shards, in.Ino, e.Cookie)
		return ch.tx.Set(k[:], row.Append(nil))
	})
	if err == nil {
		err = ch.record(in)
	}
	if errors.Is(err, sealfs.ErrInvalid) {
		return refusal(sealfs.ErrInvalid)
	}
	return err
}

// partitionDrop frees a partition that is empty and closed.
func (ch *change) partitionDrop() error {
	req := ch.req
	if req.Off >= op.Partitions {
		return refusal(sealfs.ErrInvalid)
	}
	ino, err := PartitionAt(ch.tx, req.Shard, req.Dir, uint8(req.Off))
	if err != nil {
		return err
	}
	if ch.quiet = ino == 0; ch.quiet {
		return nil
	}
	var in Inode
	if err := ch.load(ino, &in); err != nil {
		return err
	}
	if in.partState() != partClosing || in.Size != 0 || in.Gen != req.Gen {
		return refusal(sealfs.ErrStale)
	}
	done, err := ch.free(&in)
	if err == nil && !done {
		err = damaged("partition %d is empty and cannot be freed at once", in.Ino)
	}
	return err
}

// dropPartitions does one bounded step of freeing the partitions of req.Volume in req.Shard, which are not in its usage. It
// reports whether there was none.
func (ch *change) dropPartitions() (none bool, err error) {
	none = true
	var head [3]byte
	putHead(head[:], ch.req.Shard, KindPartition)
	next := append([]byte(nil), head[:]...)
	for {
		var cur pmem.Cursor
		var in Inode
		if !cur.Seek(ch.tx, next) || !inRange(&cur, head[:]) {
			return none, cur.Err()
		}
		next = append(append(next[:0], cur.Key()...), 0)
		ino, err := DecodePartition(cur.Value())
		if err != nil {
			return false, err
		}
		if ino.Home(ch.c.Shards) != ch.req.Shard {
			continue
		}
		if err := GetInode(ch.tx, ch.c, ino, &in); err == sealfs.ErrNotExist || err == nil && in.Volume != ch.req.Volume {
			continue
		} else if err != nil {
			return false, err
		}
		none = false
		if done, err := ch.dropMember(ino); err != nil || !done || ch.budget == 0 {
			return false, err
		}
	}
}

// freePartitions deletes the rows of partitions that belong to a directory which is being freed.
func (ch *change) freePartitions(in *Inode) error {
	if in.IsPartition() {
		return ch.dropPartition(in.Ino.Home(ch.c.Shards), in.Parent, uint8(in.Number()))
	}
	var prefix [11]byte
	putIno(prefix[:], ch.c.Shards, KindPartition, in.Ino)
	_, _, err := ch.deleteRange(prefix[:])
	return err
}

// MovedEntries calls fn for the entries of the directory dir that belong to a partition, from cookie on,
// until it returns false.
func MovedEntries(r pmem.Reader, c Config, dir sealfs.Ino, number, cookie uint64, fn func(*Entry) bool) error {
	k := EntryKey(c.Shards, dir, max(cookie, op.PartitionStart(number)))
	var cur pmem.Cursor
	var e Entry
	for ok := cur.Seek(r, k[:]); ok && inRange(&cur, k[:11]); ok = cur.Next() {
		key := cur.Key()
		if len(key) != len(k) {
			return damaged("key %x", key)
		}
		at := binary.BigEndian.Uint64(key[11:])
		if op.PartitionOf(at) != number {
			return nil
		}
		if err := DecodeEntry(cur.Value(), dir, at, &e); err != nil {
			return err
		}
		if !fn(&e) {
			return nil
		}
	}
	return cur.Err()
}
