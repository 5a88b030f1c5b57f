package meta

import (
	"encoding/binary"

	"sealfs"
	"sealfs/op"
	"sealfs/pmem"
)

// lockEnd is the last byte that a lock can cover: "to the end".
const lockEnd = 1<<63 - 1

// LockAccount may be implemented by a Space that bounds how many locks there are.
type LockAccount interface {
	// CountLocks says that a session has n more locks. Like all of a Space it must be
	// forgotten with the operation.
	CountLocks(sess sealfs.Session, n int)
}

func (ch *change) countLocks(sess sealfs.Session, n int) {
	if a, ok := ch.sp.(LockAccount); ok {
		a.CountLocks(sess, n)
	}
}

// LockRow is a lock. Its record is type (1), last byte (8), process (4),
// little-endian; the rest stands in its key. The POSIX locks of one owner on an
// inode do not overlap.
type LockRow struct {
	Class   uint8 // 0 POSIX, 1 flock
	Session sealfs.Session
	op.Lock
}

const lockRecordLen = 13

// Append appends the record of l to b.
func (l *LockRow) Append(b []byte) []byte {
	b = append(b, byte(l.Type))
	b = binary.LittleEndian.AppendUint64(b, l.End)
	return binary.LittleEndian.AppendUint32(b, l.PID)
}

// DecodeLock reads the record b of the lock with key k, or returns a *sealfs.Corruption.
func DecodeLock(b []byte, k *Key) (LockRow, error) {
	if len(b) != lockRecordLen {
		return LockRow{}, damaged("lock record %x of inode %d", b, k.Ino)
	}
	l := LockRow{k.Class, k.Session, op.Lock{
		Type: op.LockType(b[0]), Start: k.Pos, End: binary.LittleEndian.Uint64(b[1:]),
		Owner: k.Owner, PID: binary.LittleEndian.Uint32(b[9:]),
	}}
	if l.Type != op.ReadLock && l.Type != op.WriteLock || l.End < l.Start || l.End > lockEnd {
		return LockRow{}, damaged("lock record %x of inode %d", b, k.Ino)
	}
	return l, nil
}

// locks calls fn for the locks of a class on ino, by their start, until fn returns false.
func locks(r pmem.Reader, c Config, ino sealfs.Ino, class uint8, fn func(*LockRow) bool) error {
	k := LockKey(c.Shards, ino, class, 0, 0, 0)
	var cur pmem.Cursor
	var l LockRow
	for ok := cur.Seek(r, k[:]); ok && inRange(&cur, k[:12]); ok = cur.Next() {
		key, err := DecodeKey(cur.Key())
		if err != nil {
			return err
		}
		if l, err = DecodeLock(cur.Value(), &key); err != nil {
			return err
		}
		if !fn(&l) {
			break
		}
	}
	return cur.Err()
}

// wanted returns the lock that a request is about, as a row.
func wanted(req *op.Request) (LockRow, error) {
	l := LockRow{classPOSIX, req.Session, req.Lock}
	if req.Flags&op.Flock != 0 {
		l.Class, l.Start, l.End = classFlock, 0, lockEnd
	}
	if l.Type > op.WriteLock || l.Start > l.End || l.End > lockEnd {
		return l, refusal(sealfs.ErrInvalid)
	}
	return l, nil
}

func (l *LockRow) sameOwner(o *LockRow) bool { return l.Session == o.Session && l.Owner == o.Owner }
func (l *LockRow) overlaps(o *LockRow) bool  { return l.Start <= o.End && o.Start <= l.End }

// blocks reports whether the lock l of somebody else stands in the way of w.
func (l *LockRow) blocks(w *LockRow) bool {
	return !l.sameOwner(w) && l.overlaps(w) && w.Type != op.Unlock && (l.Type == op.WriteLock || w.Type == op.WriteLock)
}

// setLock takes, changes or releases a lock, as fcntl(2) and flock(2) say.
// ErrAgain comes with the lock in the way.
func (ch *change) setLock() error {
	w, err := wanted(ch.req)
	if err != nil {
		return err
	}
	var in Inode
	if err := getInode(ch.tx, ch.c, ch.req.Ino, &in); err != nil {
		return err
	}
	var few [8]LockRow
	mine, count, blocked := few[:0], 0, false
	err = locks(ch.tx, ch.c, in.Ino, w.Class, func(l *LockRow) bool {
		count++
		if l.blocks(&w) {
			ch.rep.Lock, blocked = l.Lock, true
			return false
		}
		// Neighbours of the same type become one lock.
		if l.sameOwner(&w) && (l.overlaps(&w) || l.Type == w.Type && (l.End+1 == w.Start || w.End+1 == l.Start)) {
			mine = append(mine, *l)
		}
		return true
	})
	if err != nil {
		return err
	}
	if blocked {
		return refusal(sealfs.ErrAgain)
	}
	if w.Type == op.Unlock && len(mine) == 0 {
		ch.quiet = true
		return nil
	}
	return ch.replaceLocks(in.Ino, mine, w, count)
}

// replaceLocks puts w in the place of the owner's locks in mine, whose parts
// outside w stay. The inode has count locks of the class now.
func (ch *change) replaceLocks(ino sealfs.Ino, mine []LockRow, w LockRow, count int) error {
	start, end := w.Start, w.End
	for i := range mine {
		l := &mine[i]
		k := LockKey(ch.c.Shards, ino, l.Class, l.Start, l.Session, l.Owner)
		if err := ch.tx.Delete(k[:]); err != nil {
			return err
		}
		ch.countLocks(l.Session, -1)
		count--
		if l.Type == w.Type {
			w.Start, w.End = min(w.Start, l.Start), max(w.End, l.End)
			continue
		}
		if left := *l; left.Start < start {
			left.End = start - 1
			count++
			if err := ch.putLock(ino, &left); err != nil {
				return err
			}
		}
		if right := *l; right.End > end {
			right.Start = end + 1
			count++
			if err := ch.putLock(ino, &right); err != nil {
				return err
			}
		}
	}
	if w.Type != op.Unlock {
		count++
		if err := ch.putLock(ino, &w); err != nil {
			return err
		}
	}
	if count > sealfs.LocksPerFile {
		return refusal(sealfs.ErrNoLocks)
	}
	return nil
}

func (ch *change) putLock(ino sealfs.Ino, l *LockRow) error {
	var b [lockRecordLen]byte
	k := LockKey(ch.c.Shards, ino, l.Class, l.Start, l.Session, l.Owner)
	ch.countLocks(l.Session, 1)
	return ch.tx.Set(k[:], l.Append(b[:0]))
}

// dropOwner releases all that Lock.Owner of the session holds on Ino, as
// close(2) does, or with AllOwners all that the session holds.
func (ch *change) dropOwner() error {
	w := LockRow{classPOSIX, ch.req.Session, op.Lock{End: lockEnd, Owner: ch.req.Lock.Owner}}
	if ch.req.Flags&op.Flock != 0 {
		w.Class = classFlock
	}
	var few [8]LockRow
	mine := few[:0]
	all := ch.req.Flags&op.AllOwners != 0
	err := locks(ch.tx, ch.c, ch.req.Ino, w.Class, func(l *LockRow) bool {
		if l.sameOwner(&w) || all && l.Session == w.Session {
			mine = append(mine, *l)
		}
		return true
	})
	if err != nil {
		return err
	}
	if len(mine) == 0 {
		ch.quiet = true
		return nil
	}
	if all {
		for i := range mine {
			l := &mine[i]
			k := LockKey(ch.c.Shards, ch.req.Ino, l.Class, l.Start, l.Session, l.Owner)
			if err := ch.tx.Delete(k[:]); err != nil {
				return err
			}
		}
		ch.countLocks(w.Session, -len(mine))
		return nil
	}
	return ch.replaceLocks(ch.req.Ino, mine, w, len(mine))
}

// dropSession frees what the session Lock.Owner holds in the shard: its locks
// and its result rows, FreeMax at most. The reply's Eof says that it was all.
func (ch *change) dropSession() error {
	session := sealfs.Session(ch.req.Lock.Owner)
	var prefix [11]byte
	putHead(prefix[:], ch.req.Shard, KindLock)
	var cur pmem.Cursor
	var keys [FreeMax][36]byte
	got := 0
	for ok := cur.Seek(ch.tx, prefix[:3]); ok && got < len(keys) && inRange(&cur, prefix[:3]); ok = cur.Next() {
		key, err := DecodeKey(cur.Key())
		if err != nil {
			return err
		}
		if key.Session == session {
			copy(keys[got][:], cur.Key())
			got++
		}
	}
	if err := cur.Err(); err != nil {
		return err
	}
	for i := range got {
		if err := ch.tx.Delete(keys[i][:]); err != nil {
			return err
		}
	}
	ch.countLocks(session, -got)
	ch.budget -= got
	k := SessionKey(ch.req.Shard, session, 0)
	rows, _, err := ch.deleteRange(k[:11])
	if err != nil {
		return err
	}
	ch.rep.Eof = ch.budget > 0
	ch.quiet = got+rows == 0
	return nil
}

// testLock answers TestLock: the lock in the way, or one of type Unlock.
func testLock(r pmem.Reader, c Config, req *op.Request, rep *op.Reply) error {
	w, err := wanted(req)
	if err != nil {
		return err
	}
	var in Inode
	if err := getInode(r, c, req.Ino, &in); err != nil {
		return err
	}
	rep.Lock = op.Lock{Start: w.Start, End: w.End}
	return locks(r, c, in.Ino, w.Class, func(l *LockRow) bool {
		if l.blocks(&w) {
			rep.Lock = l.Lock
			return false
		}
		return true
	})
}

// Blockers calls fn for each lock in the way of the one that a SetLock or WaitLock
// asks for, until it returns false.
func Blockers(r pmem.Reader, c Config, req *op.Request, fn func(op.Owner) bool) error {
	w, err := wanted(req)
	if err != nil {
		return err
	}
	return locks(r, c, req.Ino, w.Class, func(l *LockRow) bool {
		return !l.blocks(&w) || fn(op.Owner{Session: l.Session, Owner: l.Owner})
	})
}

// Locks calls fn for the session of every lock in a shard.
func Locks(r pmem.Reader, s sealfs.Shard, fn func(sealfs.Session)) error {
	return sessions(r, s, KindLock, fn)
}

// Sessions calls fn for the sessions that hold anything in a shard that
// DropSession would free, result rows or locks; for some more than once.
func Sessions(r pmem.Reader, s sealfs.Shard, fn func(sealfs.Session)) error {
	if err := sessions(r, s, KindLock, fn); err != nil {
		return err
	}
	return sessions(r, s, KindSession, fn)
}

// sessions calls fn for the session of each row of a kind.
func sessions(r pmem.Reader, s sealfs.Shard, kind Kind, fn func(sealfs.Session)) error {
	var head [3]byte
	putHead(head[:], s, kind)
	var cur pmem.Cursor
	for ok := cur.Seek(r, head[:]); ok && inRange(&cur, head[:]); ok = cur.Next() {
		key, err := DecodeKey(cur.Key())
		if err != nil {
			return err
		}
		fn(key.Session)
	}
	return cur.Err()
}
