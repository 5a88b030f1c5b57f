package server

import (
	"context"
	"maps"
	"sync"
	"sync/atomic"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// holds counts who holds which file open. It is memory only: a session that
// outlives the server says Open again.
type holds struct {
	mu    sync.Mutex
	files map[sealfs.Ino]map[sealfs.Session]uint64
	// grace is true after a start, as long as sessions may still register what
	// they hold: everything counts as held.
	grace      bool
	over       chan struct{}                    // closed when it ends
	starting   atomic.Bool                      // grace, for a quick look
	closed     func(sealfs.Session, sealfs.Ino) // hears of files that a session does not hold any more
	registered map[sealfs.Session]struct{}
	// telling is what sessions have told so far of what they hold: see register.
	telling map[sealfs.Session][]op.Opens
}

// wantsWrite in a count says that the session has opened the file to write to it.
const wantsWrite = 1 << 63

// add counts one more opening; writing says that it is to write to the file.
func (h *holds) add(sess sealfs.Session, ino sealfs.Ino, writing bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.put(sess, ino, 1)
	if writing {
		h.files[ino][sess] |= wantsWrite
	}
}

// writes reports whether a session holds a file open and is going to write to it:
// it said so then, or it says so now.
func (h *holds) writes(sess sealfs.Session, ino sealfs.Ino, now bool) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := h.files[ino][sess]
	return n&wantsWrite != 0 || n != 0 && now
}

// begin begins the time of grace.
func (h *holds) begin() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.grace, h.over = true, make(chan struct{})
	h.starting.Store(true)
}

// graceful returns what is closed when the time of grace is over, nil if it is.
func (h *holds) graceful() <-chan struct{} {
	if !h.starting.Load() {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.grace {
		return nil
	}
	return h.over
}

// put is add of n, with the lock held.
func (h *holds) put(sess sealfs.Session, ino sealfs.Ino, n uint64) {
	if h.files == nil {
		h.files = map[sealfs.Ino]map[sealfs.Session]uint64{}
	}
	m := h.files[ino]
	if m == nil {
		m = make(map[sealfs.Session]uint64, 1)
		h.files[ino] = m
	}
	m[sess] += n
}

// drop reports whether nobody holds the file any more.
func (h *holds) drop(sess sealfs.Session, ino sealfs.Ino, n uint64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.files[ino]
	if m[sess]&^wantsWrite > n {
		m[sess] -= n
		return false
	}
	delete(m, sess)
	if h.closed != nil {
		h.closed(sess, ino) // at once: it may be opened again right now
	}
	if len(m) > 0 {
		return false
	}
	delete(h.files, ino)
	return !h.grace
}

func (h *holds) any(ino sealfs.Ino) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.grace || len(h.files[ino]) > 0
}

// end drops everything that the sessions hold that match, and returns what nobody
// holds any more.
func (h *holds) end(match func(sealfs.Session) bool) []sealfs.Ino {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.drops(match)
}

// drops is end with the lock held.
func (h *holds) drops(match func(sealfs.Session) bool) []sealfs.Ino {
	maps.DeleteFunc(h.telling, func(at sealfs.Session, _ []op.Opens) bool { return match(at) })
	var free []sealfs.Ino
	for ino, m := range h.files {
		before := len(m)
		maps.DeleteFunc(m, func(at sealfs.Session, _ uint64) bool { return match(at) })
		if len(m) == before {
			continue
		}
		if len(m) == 0 {
			delete(h.files, ino)
			free = append(free, ino)
		}
	}
	return free
}

// hold answers Open. The inode is looked up under the same lock under which
// changes decide whether a file is held, so it cannot vanish in between.
func (st *store) hold(ctx context.Context, req *op.Request, rep *op.Reply) error {
	return st.patiently(ctx, req, rep, (*store).holdFor)
}

func (st *store) holdFor(ctx context.Context, cl *claim, req *op.Request, rep *op.Reply) error {
	for {
		// Asked for before, so that what has come by then is seen.
		busy := st.guard(op.Tx{}, meta.Touch{Kind: meta.TouchExists, Ino: req.Ino})
		if err := st.holdNow(cl, req, rep); err != nil || rep.Code != sealfs.ErrNotExist || busy == nil {
			if err == nil && rep.Code == 0 {
				st.bring(req, rep)
			}
			return err
		}
		if err := st.await(ctx, busy, op.Tx{}); err != nil { // a new directory is on its way
			return err
		}
		rep.Reset()
	}
}

func (st *store) holdNow(cl *claim, req *op.Request, rep *op.Reply) error {
	if st.srv.ended(req.Session) {
		return sealfs.ErrSession
	}
	return st.View(func(r pmem.Reader) error { return st.holdAt(r, cl, req, rep) })
}

// holdAt registers a hold in the state r, which is locked: no change can come
// between the look at the inode and the hold.
func (st *store) holdAt(r pmem.Reader, cl *claim, req *op.Request, rep *op.Reply) error {
	q := op.Request{Type: op.Getattr, Ino: req.Ino, Shard: req.Shard, Volume: req.Volume}
	if err := meta.Query(r, st.srv.cfg, &q, rep); err != nil || rep.Code != 0 {
		return err
	}
	if rep.Attr.Nlink == 0 && !st.holds.any(req.Ino) {
		rep.Reset()
		rep.Code = sealfs.ErrStale // it is being freed
		return nil
	}
	// Before the lease: who closes the file meanwhile gives up the one to write.
	st.holds.add(req.Session, req.Ino, req.Flags&op.WantWrite != 0)
	if err := st.tell(req, rep, cl); err != nil {
		st.release(req.Session, req.Ino, 1)
		return err
	}
	if st.srv.ended(req.Session) { // just now: who ends it may have looked before
		st.release(req.Session, req.Ino, 1)
		return sealfs.ErrSession
	}
	return nil
}

// release answers Release: the last one frees a file without a name.
func (st *store) release(sess sealfs.Session, ino sealfs.Ino, n uint64) {
	if st.holds.drop(sess, ino, n) && st.reclaim.nameless(ino) {
		st.reclaim.add(ino)
	}
}

// bringMax bounds what an opening brings along, in bytes.
const bringMax = 128 << 10

// bring adds the content of a small file to the answer to its opening. What
// cannot be read is told to who reads.
func (st *store) bring(req *op.Request, rep *op.Reply) {
	size := rep.Attr.Size
	if size == 0 || size > min(req.Len, bringMax) || rep.Attr.Mode&modeType != modeRegular || rep.Attr.Bound != 0 {
		return
	}
	data := make([]byte, size)
	got, now, err := st.readData(place{ino: req.Ino, shard: req.Shard}, 0, data)
	if err == nil && now == size && uint64(got) == size {
		rep.Data = append(rep.Data, data...)
	}
}
