// Package oracle is a file system in plain Go maps: the model with which the
// engine, the library and the mount are compared. It implements op.Handler for
// every type of request that clients send, with one mutex and no thought of speed, durability or
// damage. Where it and another implementation differ, one of the two is wrong.
//
// It does what POSIX and Linux say, with these choices that the rest of SealFS shares:
// a directory's size is its number of entries, reads leave the access time alone,
// fallocate reserves nothing, holes are multiples of 4 KiB, and a name that
// replaces another by rename takes over its cookie.
package oracle

import (
	"context"
	"strings"
	"sync"
	"time"

	"sealfs"
	"sealfs/op"
)

// FS is the model. All methods are safe for concurrent use.
type FS struct {
	shards uint32

	mu       sync.Mutex
	inodes   map[sealfs.Ino]*inode
	counters map[sealfs.Shard]uint64
	holds    map[hold]uint64
	lastTime int64
	unlocked chan struct{} // closed and replaced whenever a lock goes
	limit    uint64        // bytes that all files may take, 0: no limit
	whole    bool          // no file gets chunks

	stores int // shard s lies in store s modulo stores; 0: all in one
	rows   map[rowsOf]*rows
	ended  map[sealfs.Session]bool
	synced map[sealfs.Shard]int
}

// hold says which session holds which inode open.
type hold struct {
	session sealfs.Session
	ino     sealfs.Ino
}

// inode is a file of any type.
type inode struct {
	attr   op.Attr
	volume sealfs.Volume

	parent  sealfs.Ino            // directory: its parent; the root is its own
	entries map[string]*entry     // directory
	cookies uint64                // directory: the last cookie given
	blocks  map[uint64]*dataBlock // regular file: what is no hole
	target  string                // symlink
	xattrs  map[string][]byte
	locks   []lock
	final   bool // without a name, and not to get one: it is not a new Tmpfile
}

type entry struct {
	ino    sealfs.Ino
	cookie uint64
}

type dataBlock [sealfs.BlockSize]byte

// The parts of a mode.
const (
	typeMask  = 0o170000
	typeFifo  = 0o010000
	typeChar  = 0o020000
	typeDir   = 0o040000
	typeBlock = 0o060000
	typeFile  = 0o100000
	typeLink  = 0o120000
	typeSock  = 0o140000
	permMask  = 0o7777
	setuid    = 0o4000
	setgid    = 0o2000
	groupExec = 0o0010
)

// New returns an empty model for a cluster of shards shards, a power of two.
// It needs a MakeRoot before anything else.
func New(shards uint32) *FS {
	return &FS{
		shards:   shards,
		inodes:   map[sealfs.Ino]*inode{},
		counters: map[sealfs.Shard]uint64{},
		holds:    map[hold]uint64{},
		unlocked: make(chan struct{}),
		rows:     map[rowsOf]*rows{},
		ended:    map[sealfs.Session]bool{},
		synced:   map[sealfs.Shard]int{},
	}
}

// storeOf returns the store of a shard.
func (fs *FS) storeOf(s sealfs.Shard) int {
	if fs.stores == 0 {
		return 0
	}
	return int(s) % fs.stores
}

// same reports whether an inode lies in the store of the shard s.
func (fs *FS) same(ino sealfs.Ino, s sealfs.Shard) bool {
	return fs.storeOf(ino.Home(fs.shards)) == fs.storeOf(s)
}

// seen returns the attributes of in as the store of the shard s knows them: those
// of an inode in another store are Ino and type.
func (fs *FS) seen(in *inode, s sealfs.Shard) op.Attr {
	if fs.same(in.attr.Ino, s) {
		return in.attr
	}
	return op.Attr{Ino: in.attr.Ino, Mode: in.attr.Mode & typeMask}
}

// Limit bounds the bytes that all files together may take, in whole blocks;
// 0 lifts the bound. Writes beyond it are answered ErrNoSpace.
func (fs *FS) Limit(bytes uint64) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.limit = bytes
}

// Expect makes the next inode in the shard of ino have that number. Whoever is
// compared with the model may have passed over some: a transaction that is given
// up does.
func (fs *FS) Expect(ino sealfs.Ino) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.counters[ino.Home(fs.shards)] = uint64(ino) / uint64(fs.shards)
}

// Inodes returns how many inodes exist, for tests that look for leaks.
func (fs *FS) Inodes() int {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return len(fs.inodes)
}

// Do answers one request: see op.Handler. It returns an error only when ctx ends
// a WaitLock. Like a server it answers a numbered change of a session that comes
// again from what it remembers.
func (fs *FS) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for {
		rep.Reset()
		code := fs.dispatch(req, rep)
		if req.Type != op.WaitLock || code != sealfs.ErrAgain {
			if code != 0 {
				lock := rep.Lock
				rep.Reset()
				rep.Code, rep.Lock = code, lock
			}
			return nil
		}
		unlocked := fs.unlocked
		fs.mu.Unlock()
		select {
		case <-unlocked:
		case <-ctx.Done():
			fs.mu.Lock()
			return sealfs.ErrInterrupted
		}
		fs.mu.Lock()
	}
}

func (fs *FS) dispatch(req *op.Request, rep *op.Reply) sealfs.Code {
	if fs.ended[req.Session] {
		return sealfs.ErrSession
	}
	if !numbered(req) {
		return fs.answer(req, rep)
	}
	if again, code := fs.answered(req, rep); again {
		return code
	}
	code := fs.answer(req, rep)
	if code == 0 {
		fs.remember(req, rep)
	}
	return code
}

func (fs *FS) answer(req *op.Request, rep *op.Reply) sealfs.Code {
	now := fs.now(req)
	switch req.Type {
	case op.MakeRoot:
		return fs.makeRoot(req, rep, now)
	case op.DropSession:
		return fs.dropSession(req, rep)
	case op.DropVolume:
		return fs.dropVolume(req, rep)
	case op.Statfs:
		return fs.statfs(req, rep)
	case op.Sync:
		fs.synced[req.Shard]++
		return 0
	case op.Register:
		return fs.register(req)
	case op.Purge:
		rep.Eof = true // nothing waits to be purged here
		return 0
	}
	// Everything else is addressed to an inode or a directory.
	ino, isDir := req.Ino, false
	switch req.Type {
	case op.Create, op.Mknod, op.Mkdir, op.Symlink, op.Tmpfile, op.Link, op.Unlink, op.Rmdir, op.Rename, op.Lookup, op.Readdir:
		ino, isDir = req.Dir, true
	}
	in := fs.inodes[ino]
	switch {
	case req.Type == op.Setattr && req.Valid&op.SetAccess != 0:
		return fs.access(req, rep)
	case in == nil:
		return sealfs.ErrNotExist
	case fs.aboutChunk(req, in):
		return fs.chunk(req, rep, in)
	case ino.Home(fs.shards) != req.Shard:
		return sealfs.ErrInvalid
	case isDir && !in.isDir():
		return sealfs.ErrNotDir
	case isDir && in.attr.Nlink == 0 && req.Type.Changes():
		return sealfs.ErrNotExist
	}
	switch req.Type {
	case op.Create, op.Mknod, op.Mkdir, op.Symlink, op.Link, op.Unlink, op.Rmdir, op.Rename, op.Lookup:
		if code := checkName(req.Name); code != 0 {
			return code
		}
	}
	switch req.Type {
	case op.Create:
		return fs.create(req, rep, in, now)
	case op.Mknod:
		return fs.mknod(req, rep, in, now)
	case op.Mkdir:
		return fs.mkdir(req, rep, in, now)
	case op.Symlink:
		return fs.symlink(req, rep, in, now)
	case op.Tmpfile:
		return fs.tmpfile(req, rep, in, now)
	case op.Link:
		return fs.link(req, rep, in, now)
	case op.Unlink, op.Rmdir:
		return fs.remove(req, rep, in, now)
	case op.Rename:
		return fs.rename(req, rep, in, now)
	case op.Lookup:
		return fs.lookup(req, rep, in)
	case op.Readdir:
		return fs.readdir(req, rep, in)
	case op.Getattr:
		rep.Attr = in.attr
		return 0
	case op.Readlink:
		if in.attr.Mode&typeMask != typeLink {
			return sealfs.ErrInvalid
		}
		rep.Attr, rep.Data = in.attr, append(rep.Data, in.target...)
		return 0
	case op.Setattr:
		return fs.setattr(req, rep, in, now)
	case op.Write:
		return fs.write(req, rep, in, now)
	case op.Fallocate:
		return fs.fallocate(req, rep, in, now)
	case op.Extend:
		return fs.extend(req, rep, in, now)
	case op.Read:
		return fs.read(req, rep, in)
	case op.Seek:
		return fs.seek(req, rep, in)
	case op.Setxattr:
		return fs.setxattr(req, rep, in, now)
	case op.Removexattr:
		return fs.removexattr(req, rep, in, now)
	case op.Getxattr:
		return fs.getxattr(req, rep, in)
	case op.Listxattr:
		return fs.listxattr(req, rep, in)
	case op.SetLock, op.WaitLock:
		return fs.setLock(req, rep, in)
	case op.TestLock:
		return fs.testLock(req, rep, in)
	case op.DropOwner:
		return fs.dropOwner(req, in)
	case op.Open:
		fs.hold(req, rep, in)
		return 0
	case op.Release:
		fs.release(hold{req.Session, ino}, max(req.Len, 1))
		if op.DecodeOpens(req.Data, func(o op.Opens) { fs.release(hold{req.Session, o.Ino}, o.Count) }) != nil {
			return sealfs.ErrInvalid
		}
		return 0
	case op.Reclaim:
		// Nothing waits here: what nobody can reach is freed at once.
		rep.Eof = true
		return 0
	}
	return sealfs.ErrNoSys
}

// now returns when a change happens: the time that the request brings, or the clock's.
func (fs *FS) now(req *op.Request) int64 {
	t := req.Time
	if t == 0 {
		t = max(time.Now().UnixNano(), fs.lastTime+1)
	}
	fs.lastTime = max(fs.lastTime, t)
	return t
}

func checkName(name string) sealfs.Code {
	switch {
	case len(name) > sealfs.NameMax:
		return sealfs.ErrNameTooLong
	case name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00"):
		return sealfs.ErrInvalid
	}
	return 0
}

func (in *inode) isDir() bool  { return in.attr.Mode&typeMask == typeDir }
func (in *inode) isFile() bool { return in.attr.Mode&typeMask == typeFile }

// refuseNoFile refuses what only regular files allow.
func (in *inode) refuseNoFile() sealfs.Code {
	switch {
	case in.isFile():
		return 0
	case in.isDir():
		return sealfs.ErrIsDir
	}
	return sealfs.ErrInvalid
}

// changed notes a change of attributes, touched one of the contents.
func (in *inode) changed(now int64) {
	in.attr.Ctime = now
	in.attr.Version++
}

func (in *inode) touched(now int64) {
	in.attr.Mtime = now
	in.changed(now)
}

// allocate makes an inode of volume v in shard s.
func (fs *FS) allocate(s sealfs.Shard, v sealfs.Volume, mode uint32, req *op.Request, now int64) *inode {
	n := max(fs.counters[s], sealfs.InoCounterMin)
	fs.counters[s] = n + 1
	in := &inode{
		attr: op.Attr{
			Ino: sealfs.Ino(n*uint64(fs.shards) + uint64(s)), Mode: mode, Nlink: 1, UID: req.UID, GID: req.GID,
			Atime: now, Mtime: now, Ctime: now, Btime: now, Version: 1,
		},
		volume: v,
	}
	switch mode & typeMask {
	case typeDir:
		in.attr.Nlink = 2
		in.entries = map[string]*entry{}
		in.cookies = 2
	case typeFile:
		in.blocks = map[uint64]*dataBlock{}
	}
	fs.inodes[in.attr.Ino] = in
	return in
}

// free forgets in when neither a name nor a holder keeps it.
func (fs *FS) free(in *inode) {
	if in.attr.Nlink > 0 {
		return
	}
	for h := range fs.holds {
		if h.ino == in.attr.Ino {
			return
		}
	}
	delete(fs.inodes, in.attr.Ino)
	fs.wake()
}

func (fs *FS) release(h hold, n uint64) {
	if fs.holds[h] > n {
		fs.holds[h] -= n
		return
	}
	delete(fs.holds, h)
	if in := fs.inodes[h.ino]; in != nil {
		fs.free(in)
	}
}

func (fs *FS) dropSession(req *op.Request, rep *op.Reply) sealfs.Code {
	fs.drop(sealfs.Session(req.Lock.Owner), func(s sealfs.Shard) bool { return s == req.Shard })
	rep.Eof = true
	return 0
}

func (fs *FS) dropVolume(req *op.Request, rep *op.Reply) sealfs.Code {
	for ino, in := range fs.inodes {
		if in.volume == req.Volume && ino.Home(fs.shards) == req.Shard {
			delete(fs.inodes, ino)
		}
	}
	rep.Eof = true
	return 0
}

// used returns what the blocks of all files take.
func (fs *FS) used() uint64 {
	var n uint64
	for _, in := range fs.inodes {
		n += uint64(len(in.blocks)) * block
	}
	return n
}

// usedAt returns what the blocks in the store of the shard s take.
func (fs *FS) usedAt(s sealfs.Shard) uint64 {
	if fs.stores == 0 {
		return fs.used()
	}
	var n uint64
	for _, in := range fs.inodes {
		for b := range in.blocks {
			at := in.attr.Ino.Home(fs.shards)
			if in.attr.Bound != 0 {
				at = in.attr.Ino.DataShard(b*block, fs.shards)
			}
			if fs.storeOf(at) == fs.storeOf(s) {
				n += block
			}
		}
	}
	return n
}

func (fs *FS) statfs(req *op.Request, rep *op.Reply) sealfs.Code {
	const inodes = 1 << 32
	total := fs.limit
	if total == 0 {
		total = 1 << 40
	}
	count := uint64(0)
	for ino := range fs.inodes {
		if fs.same(ino, req.Shard) {
			count++
		}
	}
	rep.Space = op.Space{
		Bytes: total, BytesFree: total - min(fs.usedAt(req.Shard), total),
		Inodes: inodes, InodesFree: inodes - count,
	}
	return 0
}

// hold answers Open.
func (fs *FS) hold(req *op.Request, rep *op.Reply, in *inode) {
	fs.holds[hold{req.Session, req.Ino}]++
	rep.Attr = in.attr
	if in.isFile() && in.attr.Bound == 0 && in.attr.Size <= req.Len {
		in.copyTo(rep, 0, in.attr.Size)
	}
}
