package oracle

import (
	"maps"
	"slices"

	"sealfs"
	"sealfs/op"
)

// rowsOf names the results that a shard remembers of a session.
type rowsOf struct {
	shard   sealfs.Shard
	session sealfs.Session
}

// rows are the results of a session's changes that it may ask for again.
type rows struct {
	low  uint64
	rows map[uint64]row
}

// row is what a retry is answered. Attributes are those of the time of the retry.
type row struct {
	ino, held sealfs.Ino
	off       uint64
	eof       bool
}

func numbered(req *op.Request) bool { return req.Type.Changes() && req.Session != 0 && req.Seq != 0 }

// answered answers a retry and reports whether the request was one.
func (fs *FS) answered(req *op.Request, rep *op.Reply) (bool, sealfs.Code) {
	r := fs.rows[rowsOf{req.Shard, req.Session}]
	switch {
	case req.Low > req.Seq:
		return true, sealfs.ErrInvalid
	case r == nil:
		return false, 0
	}
	w, found := r.rows[req.Seq]
	if !found {
		if req.Seq < r.low {
			return true, sealfs.ErrStale
		}
		return false, 0
	}
	rep.Off, rep.Held, rep.Eof = w.off, w.held, w.eof
	if in := fs.inodes[w.ino]; in != nil {
		rep.Attr = in.attr
		if h := (hold{req.Session, w.ino}); req.Flags&op.OpenIt != 0 {
			fs.holds[h] = max(fs.holds[h], 1)
		}
	} else if w.ino != 0 {
		rep.Attr = op.Attr{Ino: w.ino}
	}
	return true, 0
}

// remember keeps the result of a change that happened.
func (fs *FS) remember(req *op.Request, rep *op.Reply) {
	k := rowsOf{req.Shard, req.Session}
	r := fs.rows[k]
	if r == nil {
		r = &rows{rows: map[uint64]row{}}
		fs.rows[k] = r
	}
	r.low = max(r.low, req.Low)
	maps.DeleteFunc(r.rows, func(seq uint64, _ row) bool { return seq < r.low })
	r.rows[req.Seq] = row{rep.Attr.Ino, rep.Held, rep.Off, rep.Eof}
}

// EndSession ends a session, as its expiry at the managers does: what it held is
// let go, and all it asks for is answered ErrSession.
func (fs *FS) EndSession(session sealfs.Session) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.ended[session] = true
	fs.drop(session, func(sealfs.Shard) bool { return true })
}

// drop lets go what a session holds in the shards that where accepts.
func (fs *FS) drop(session sealfs.Session, where func(sealfs.Shard) bool) {
	for ino, in := range fs.inodes {
		if where(ino.Home(fs.shards)) {
			in.locks = slices.DeleteFunc(in.locks, func(l lock) bool { return l.session == session })
		}
	}
	for h := range maps.Clone(fs.holds) {
		if h.session == session && where(h.ino.Home(fs.shards)) {
			fs.release(h, fs.holds[h])
		}
	}
	fs.wake()
}

// register counts what a session says that it holds open. Nothing is freed that
// it does not name: the rest of the list may come with another request. See Settle.
func (fs *FS) register(req *op.Request) sealfs.Code {
	if req.Flags&op.Excl != 0 {
		fs.forget(func(h hold) bool { return h.session == req.Session && fs.same(h.ino, req.Shard) })
	}
	var code sealfs.Code
	err := op.DecodeOpens(req.Data, func(o op.Opens) {
		if !fs.same(o.Ino, req.Shard) {
			code = sealfs.ErrInvalid
			return
		}
		fs.holds[hold{req.Session, o.Ino}] = o.Count &^ op.OpensDelayed
	})
	if err != nil {
		return sealfs.ErrInvalid
	}
	return code
}

func (fs *FS) forget(which func(hold) bool) {
	maps.DeleteFunc(fs.holds, func(h hold, _ uint64) bool { return which(h) })
}

// Restart does what the restart of a store does: who holds what open is forgotten, and
// sessions must register again before Settle frees what nobody holds.
func (fs *FS) Restart(store int) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.forget(func(h hold) bool { return fs.storeOf(h.ino.Home(fs.shards)) == store })
}

// Settle frees what has no name and is not held open.
func (fs *FS) Settle() {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for _, in := range slices.Collect(maps.Values(fs.inodes)) {
		fs.free(in)
	}
}

// Holds returns how often a session holds an inode open.
func (fs *FS) Holds(session sealfs.Session, ino sealfs.Ino) uint64 {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return fs.holds[hold{session, ino}]
}

// Held returns how many inodes are held open, counted for each session.
func (fs *FS) Held() int {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return len(fs.holds)
}

// Syncs returns how often each shard was asked to sync.
func (fs *FS) Syncs() map[sealfs.Shard]int {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return maps.Clone(fs.synced)
}
