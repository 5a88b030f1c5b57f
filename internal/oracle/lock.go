package oracle

import (
	"cmp"
	"slices"

	"sealfs"
	"sealfs/op"
)

// lockEnd is the last byte that a lock can cover: "to the end".
const lockEnd = 1<<63 - 1

// locksMax bounds the locks of one inode and class.
const locksMax = 4096

// lock is a granted lock. Those of one owner on an inode do not overlap within a class.
type lock struct {
	op.Lock
	session sealfs.Session
	flock   bool
}

func (l *lock) sameOwner(o *lock) bool {
	return l.session == o.session && l.Owner == o.Owner && l.flock == o.flock
}
func (l *lock) overlaps(o *lock) bool { return l.Start <= o.End && o.Start <= l.End }

// wanted returns the lock that a request is about.
func wanted(req *op.Request) (lock, sealfs.Code) {
	w := lock{req.Lock, req.Session, req.Flags&op.Flock != 0}
	if w.flock {
		w.Start, w.End = 0, lockEnd
	}
	if w.Type > op.WriteLock || w.Start > w.End || w.End > lockEnd {
		return w, sealfs.ErrInvalid
	}
	return w, 0
}

// obstacle returns the first lock of somebody else that w must wait for.
func (in *inode) obstacle(w *lock) (op.Lock, bool) {
	var first *lock
	for i := range in.locks {
		l := &in.locks[i]
		if l.flock == w.flock && !l.sameOwner(w) && l.overlaps(w) && w.Type != op.Unlock &&
			(l.Type == op.WriteLock || w.Type == op.WriteLock) && (first == nil || l.Start < first.Start) {
			first = l
		}
	}
	if first == nil {
		return op.Lock{}, false
	}
	return first.Lock, true
}

func (fs *FS) setLock(req *op.Request, rep *op.Reply, in *inode) sealfs.Code {
	w, code := wanted(req)
	if code != 0 {
		return code
	}
	if other, blocked := in.obstacle(&w); blocked {
		rep.Lock = other
		return sealfs.ErrAgain
	}
	locks := in.replace(w)
	n := 0
	for i := range locks {
		if locks[i].flock == w.flock {
			n++
		}
	}
	if n > locksMax {
		return sealfs.ErrNoLocks
	}
	in.locks = locks
	fs.wake()
	return 0
}

// replace returns the locks of in with w in the place of what its owner had
// there: the rest of a lock that w cuts stays, and neighbours of w's type become one with it.
func (in *inode) replace(w lock) []lock {
	var locks []lock
	start, end := w.Start, w.End
	for _, l := range in.locks {
		switch {
		case !l.sameOwner(&w):
			locks = append(locks, l)
		case l.Type == w.Type && l.Start <= end+1 && start <= l.End+1:
			w.Start, w.End = min(w.Start, l.Start), max(w.End, l.End)
		case !l.overlaps(&lock{Lock: op.Lock{Start: start, End: end}}):
			locks = append(locks, l)
		default:
			if l.Start < start {
				left := l
				left.End = start - 1
				locks = append(locks, left)
			}
			if l.End > end {
				l.Start = end + 1
				locks = append(locks, l)
			}
		}
	}
	if w.Type != op.Unlock {
		locks = append(locks, w)
	}
	slices.SortStableFunc(locks, func(a, b lock) int { return cmp.Compare(a.Start, b.Start) })
	return locks
}

func (fs *FS) testLock(req *op.Request, rep *op.Reply, in *inode) sealfs.Code {
	w, code := wanted(req)
	if code != 0 {
		return code
	}
	rep.Lock = op.Lock{Start: w.Start, End: w.End}
	if other, blocked := in.obstacle(&w); blocked {
		rep.Lock = other
	}
	return 0
}

func (fs *FS) dropOwner(req *op.Request, in *inode) sealfs.Code {
	w := lock{op.Lock{Owner: req.Lock.Owner}, req.Session, req.Flags&op.Flock != 0}
	in.locks = slices.DeleteFunc(in.locks, func(l lock) bool { return l.sameOwner(&w) })
	fs.wake()
	return 0
}

// wake lets everybody who waits for a lock try again.
func (fs *FS) wake() {
	close(fs.unlocked)
	fs.unlocked = make(chan struct{})
}
