package meta

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"sealfs"
	"sealfs/op"
	"sealfs/pmem"
)

// An operation whose parties lie on several stores is a transaction. The store
// of the request's shard coordinates. Every party elsewhere executes a Prepare, which
// checks that its part can be done, and leaves a row of KindPrepared; from then on
// nothing else may come in its way (Config.Guard). The coordinator executes the operation
// itself with what the parties have told of their inodes, the votes; the
// record that does so is the decision, and leaves a row of KindDecision. Then each
// party executes Commit, which does its part. Without a row of decision a
// transaction has never happened (presumed abort).

// TouchKind is how an operation depends on something.
type TouchKind uint8

// The kinds of touches.
const (
	TouchExists TouchKind = iota // there is an inode Ino, or there is none
	TouchLinks                   // the names that Ino has, its parent
	TouchName                    // the entry Name of the directory Ino
	TouchEmpty                   // the directory Ino has no entries
	TouchVolume                  // the directories of the volume whose root is Ino
)

// Touch is what an operation depends on and transactions may have in hand.
type Touch struct {
	Kind TouchKind
	Ino  sealfs.Ino
	Name string
}

// Foreign is returned by Apply for an operation that needs what lies on another
// store, and has not come with it: it must become a transaction.
type Foreign struct{ Ino sealfs.Ino }

// Error names the inode.
func (f *Foreign) Error() string { return fmt.Sprintf("inode %d lies on another store", f.Ino) }

// local reports whether ino's home lies on this store.
func (c *Config) local(ino sealfs.Ino) bool { return c.Local == nil || c.Local(ino.Home(c.Shards)) }

func (c *Config) touch(req *op.Request, kind TouchKind, ino sealfs.Ino, name string) error {
	if c.Guard == nil {
		return nil
	}
	return c.Guard(req.Tx, Touch{kind, ino, name})
}

// touchAttr is for who tells the attributes of in: of a directory, its entries
// are a part of them.
func (c *Config) touchAttr(req *op.Request, in *Inode) error {
	if c.Guard == nil {
		return nil
	}
	if err := c.touch(req, TouchLinks, in.Ino, ""); err != nil || !in.isDir() {
		return err
	}
	return c.touch(req, TouchEmpty, in.Ino, "")
}

// Settled reports whether no other transaction than req's is about to change the
// attributes a of an inode on this store. It never waits.
func Settled(c *Config, req *op.Request, a *op.Attr) bool {
	in := Inode{Ino: a.Ino, Mode: a.Mode}
	return c.touchAttr(req, &in) == nil
}

// absent turns the news that ino does not exist into Guard's error, if a
// transaction is about to make it.
func (c *Config) absent(req *op.Request, ino sealfs.Ino, err error) error {
	if err == refusal(sealfs.ErrNotExist) {
		if busy := c.touch(req, TouchExists, ino, ""); busy != nil {
			return busy
		}
	}
	return err
}

func (ch *change) touch(kind TouchKind, ino sealfs.Ino, name string) error {
	if !ch.c.local(ino) {
		return nil // its own store watches over it
	}
	return ch.c.touch(ch.req, kind, ino, name)
}

func (ch *change) absent(ino sealfs.Ino, err error) error { return ch.c.absent(ch.req, ino, err) }

// vote fills in with what the request knows of an inode on another store.
func (ch *change) vote(ino sealfs.Ino, in *Inode) error {
	if ino == 0 || ino > sealfs.InoMax {
		return refusal(sealfs.ErrNotExist)
	}
	for i := range ch.req.Votes {
		if a := &ch.req.Votes[i]; a.Ino == ino {
			in.fromVote(a)
			return nil
		}
	}
	return &Foreign{ino}
}

func (in *Inode) fromVote(a *op.Attr) {
	*in = Inode{
		Ino: a.Ino, Mode: a.Mode &^ op.ModeACL, Nlink: a.Nlink, UID: a.UID, GID: a.GID, Rdev: a.Rdev, Size: a.Size, Bytes: a.Blocks * 512,
		Atime: a.Atime, Mtime: a.Mtime, Ctime: a.Ctime, Btime: a.Btime, Version: a.Version, Gen: a.Gen, Bound: a.Bound, foreign: true,
	}
	if a.Mode&op.ModeACL != 0 {
		in.Flags = flagAccess
	}
	if in.IsPartition() {
		in.Parent = sealfs.Ino(a.Gen)
	}
}

// votedChild fills in with the new directory that another store has prepared for
// mkdir; a is what dir hands down.
func (ch *change) votedChild(in, dir *Inode, mode uint32, a acl) error {
	want := Inode{Mode: mode, GID: ch.req.GID}
	want.inherit(dir, a, ch.req.Valid)
	if len(ch.req.Votes) > 0 && !bytes.Equal(ch.req.Data, a) {
		return refusal(sealfs.ErrStale)
	}
	for i := range ch.req.Votes {
		a := &ch.req.Votes[i]
		if a.Ino.Home(ch.c.Shards) != ch.req.Shard2 {
			continue
		}
		if a.Mode&^op.ModeACL != want.Mode || a.GID != want.GID {
			return refusal(sealfs.ErrStale) // what dir hands down has changed since
		}
		in.fromVote(a)
		now := ch.req.Time
		in.Atime, in.Mtime, in.Ctime, in.Btime = now, now, now, now
		return nil
	}
	return &Foreign{sealfs.Ino(ch.req.Shard2)}
}

// decide writes the row that makes the operation of a transaction irrevocable.
func (ch *change) decide() error {
	if ch.req.Tx.IsZero() || ch.req.Part != 0 || len(ch.req.Votes) == 0 || ch.quiet {
		return nil
	}
	d := Decision{Time: ch.req.Time}
	for i := range ch.req.Votes {
		d.Parties = append(d.Parties, ch.req.Votes[i].Ino.Home(ch.c.Shards))
	}
	k := DecisionKey(ch.req.Shard, ch.req.Tx)
	return ch.tx.Set(k[:], d.Append(nil))
}

// Decision is the row that says that a transaction is committed: eight bytes
// of time, then two for each party, little-endian.
type Decision struct {
	Time    int64          // of the operation, in nanoseconds since 1970
	Parties []sealfs.Shard // the other ones; some may come twice
}

// Append appends the record of d to b.
func (d *Decision) Append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(d.Time))
	for _, s := range d.Parties {
		b = binary.LittleEndian.AppendUint16(b, uint16(s))
	}
	return b
}

// DecodeDecision reads what Append wrote, or returns a *sealfs.Corruption.
func DecodeDecision(b []byte) (Decision, error) {
	if len(b) <= 8 || len(b)%2 != 0 || len(b) > 8+2*op.VotesMax {
		return Decision{}, damaged("decision %x", b)
	}
	d := Decision{Time: int64(binary.LittleEndian.Uint64(b))}
	for b = b[8:]; len(b) > 0; b = b[2:] {
		d.Parties = append(d.Parties, sealfs.Shard(binary.LittleEndian.Uint16(b)))
	}
	return d, nil
}

// DecodePrepared reads a prepared row, or returns a *sealfs.Corruption. The
// request does not alias b.
func DecodePrepared(b []byte) (*op.Request, error) {
	req := new(op.Request)
	if err := op.DecodeRequest(req, b); err != nil || req.Type != op.Prepare || !req.Part.Valid() || req.Tx.IsZero() {
		return nil, damaged("prepared row %x", b)
	}
	req.Data = bytes.Clone(req.Data)
	return req, nil
}

// preparedMax bounds what one transaction prepares in one shard.
const preparedMax = op.VotesMax

// prepared calls fn for the rows of tx in a shard.
func prepared(r pmem.Reader, s sealfs.Shard, tx op.Tx, fn func(ordinal uint8, part *op.Request)) error {
	k := PreparedKey(s, tx, 0)
	var cur pmem.Cursor
	for ok := cur.Seek(r, k[:]); ok && inRange(&cur, k[:19]); ok = cur.Next() {
		key, err := DecodeKey(cur.Key())
		if err != nil {
			return err
		}
		part, err := DecodePrepared(cur.Value())
		if err != nil {
			return err
		}
		fn(key.Ordinal, part)
	}
	return cur.Err()
}

// Prepared calls fn for all that is prepared in a shard.
func Prepared(r pmem.Reader, s sealfs.Shard, fn func(part *op.Request)) error {
	return eachTx(r, s, KindPrepared, func(_ *Key, b []byte) error {
		part, err := DecodePrepared(b)
		if err == nil {
			fn(part)
		}
		return err
	})
}

// Decisions calls fn for all decisions in a shard that are not forgotten.
func Decisions(r pmem.Reader, s sealfs.Shard, fn func(tx op.Tx, d Decision)) error {
	return eachTx(r, s, KindDecision, func(k *Key, b []byte) error {
		d, err := DecodeDecision(b)
		if err == nil {
			fn(k.Tx, d)
		}
		return err
	})
}

func eachTx(r pmem.Reader, s sealfs.Shard, kind Kind, fn func(*Key, []byte) error) error {
	var head [3]byte
	putHead(head[:], s, kind)
	var cur pmem.Cursor
	for ok := cur.Seek(r, head[:]); ok && inRange(&cur, head[:]); ok = cur.Next() {
		key, err := DecodeKey(cur.Key())
		if err == nil {
			err = fn(&key, cur.Value())
		}
		if err != nil {
			return err
		}
	}
	return cur.Err()
}

// samePart reports whether a and b ask for the same: one of them came twice.
func samePart(a, b *op.Request) bool {
	return a.Part == b.Part && (a.Part == op.PartNew || a.Ino == b.Ino) && a.Dir == b.Dir && a.Name == b.Name
}

// prepare makes sure that a part of a transaction can be done, and notes it.
// It answers the attributes of the object as they are.
func (ch *change) prepare() error {
	req := ch.req
	if req.Tx.IsZero() || req.Tx.Age <= 0 || !req.Part.Valid() || uint32(req.Coord) >= ch.c.Shards {
		return refusal(sealfs.ErrInvalid)
	}
	part, ordinal := *req, -1
	var before *op.Request
	err := prepared(ch.tx, req.Shard, req.Tx, func(n uint8, p *op.Request) {
		ordinal = max(ordinal, int(n))
		if samePart(p, req) {
			before = p
		}
	})
	if err != nil {
		return err
	}
	if before != nil {
		// It came twice. What it found cannot have changed since.
		ch.quiet = true
		return ch.voteAgain(before)
	}
	if ordinal++; ordinal >= preparedMax {
		return refusal(sealfs.ErrInvalid)
	}
	if err := ch.preparePart(&part); err != nil {
		return err
	}
	part.Epoch, part.Session, part.Seq, part.Low = 0, 0, 0, 0
	if part.Part != op.PartNew {
		part.Data = nil
	}
	k := PreparedKey(req.Shard, req.Tx, uint8(ordinal))
	req.Ino = part.Ino // resolved
	return ch.tx.Set(k[:], part.AppendTo(nil))
}

// preparePart checks one part, and answers its object.
func (ch *change) preparePart(p *op.Request) error {
	var in Inode
	switch p.Part {
	case op.PartNew:
		if p.Mode&typeMask != typeDir || p.Dir == 0 {
			return refusal(sealfs.ErrInvalid)
		}
		if err := checkHandedDown(p.Data); err != nil {
			return err
		}
		ino, err := ch.allocate(p.Shard)
		if err != nil {
			return err
		}
		p.Ino = ino
		in.fromPart(p)
		in.Attr(&ch.rep.Attr)
		return ch.charge(&in, PaidAhead(p), 1)
	case op.PartName:
		return ch.prepareName(p)
	}
	if err := ch.at(p.Ino); err != nil {
		return err
	}
	if err := ch.load(p.Ino, &in); err != nil {
		return err
	}
	in.Attr(&ch.rep.Attr)
	if in.Volume != p.Volume {
		return refusal(sealfs.ErrCrossDevice)
	}
	if p.Part == op.PartVolume {
		return ch.touch(TouchVolume, in.Ino, "")
	}
	if err := ch.touch(TouchLinks, in.Ino, ""); err != nil {
		return err
	}
	ch.altered(in.Ino, "")
	switch p.Part {
	case op.PartDrop:
		switch {
		case in.Nlink == 0 || in.isDir() && in.Parent != p.Dir:
			return refusal(sealfs.ErrStale)
		case in.isDir() && in.occupied():
			return refusal(sealfs.ErrNotEmpty)
		case in.isDir():
			return ch.touch(TouchEmpty, in.Ino, "")
		}
	case op.PartLink:
		return in.refuseLink(&in)
	case op.PartMove:
		if in.Nlink == 0 || in.isDir() && in.Parent != p.Dir2 {
			return refusal(sealfs.ErrStale)
		}
	}
	return nil
}

// PaidAhead returns what the attributes of a directory that was prepared count in its volume's
// usage, in bytes: they are paid for, as the inode is, since a Commit cannot be refused.
func PaidAhead(p *op.Request) (n int64) {
	if p.Part != op.PartNew || !CheckACL(p.Data) {
		return 0
	}
	flags := acl(p.Data).flags(true)
	for _, flag := range [...]uint8{flagAccess, flagDefault} {
		if flags&flag != 0 {
			n += attrLength(len(aclName(flag)), len(p.Data))
		}
	}
	return n
}

// fromPart fills in with the directory that a PartNew makes.
func (in *Inode) fromPart(p *op.Request) {
	*in = Inode{
		Ino: p.Ino, Mode: p.Mode, Nlink: 2, UID: p.UID, GID: p.GID, Parent: p.Dir, Volume: p.Volume, Version: 1,
		Atime: p.Time, Mtime: p.Time, Ctime: p.Time, Btime: p.Time,
	}
	in.Flags = acl(p.Data).flags(true)
	in.Counted = p.Flags&op.Counted != 0
}

// prepareName checks that a name of a directory stands for what the coordinator believes.
func (ch *change) prepareName(p *op.Request) error {
	if err := ch.at(p.Dir); err != nil {
		return err
	}
	if err := checkName(p.Name, sealfs.NameMax); err != nil {
		return err
	}
	var dir Inode
	var e Entry
	if err := ch.loadDir(p.Dir, &dir); err != nil {
		return err
	}
	dir.Attr(&ch.rep.Attr)
	if dir.Volume != p.Volume {
		return refusal(sealfs.ErrCrossDevice)
	}
	if p.Ino == 0 || p.Mode&typeMask == 0 || p.Mode&^typeMask != 0 {
		return refusal(sealfs.ErrInvalid)
	}
	if err := ch.touch(TouchName, dir.Ino, p.Name); err != nil {
		return err
	}
	ch.altered(dir.Ino, p.Name)
	found, err := findEntry(ch.tx, ch.c, &dir, p.Name, &e)
	switch {
	case err != nil:
		return err
	case found && uint64(e.Ino) != p.Off || !found && p.Off != 0:
		return refusal(sealfs.ErrStale)
	case !found && e.Cookie == 0:
		return refusal(sealfs.ErrNoSpace)
	case p.Mode&typeMask == typeDir && dir.Nlink >= sealfs.LinkMax:
		return refusal(sealfs.ErrTooManyLinks)
	}
	return nil
}

// voteAgain answers a Prepare that was executed before.
func (ch *change) voteAgain(p *op.Request) error {
	var in Inode
	ino := p.Ino
	switch p.Part {
	case op.PartNew:
		ch.req.Ino = p.Ino
		in.fromPart(p)
		in.Attr(&ch.rep.Attr)
		return nil
	case op.PartName:
		ino = p.Dir
	}
	if err := ch.load(ino, &in); err != nil {
		return err
	}
	in.Attr(&ch.rep.Attr)
	return nil
}

// settle calls fn for each part that the request's transaction has prepared in
// its shard, and deletes the rows. That there are none is no error: an answer was lost.
func (ch *change) settle(fn func(p *op.Request) error) error {
	var parts [preparedMax]*op.Request
	err := prepared(ch.tx, ch.req.Shard, ch.req.Tx, func(n uint8, p *op.Request) {
		if int(n) < len(parts) {
			parts[n] = p
		}
	})
	if err != nil {
		return err
	}
	ch.quiet = true
	for n, p := range parts {
		if p == nil {
			continue
		}
		ch.quiet = false
		if err := fn(p); err != nil {
			return err
		}
		k := PreparedKey(ch.req.Shard, ch.req.Tx, uint8(n))
		if err := ch.tx.Delete(k[:]); err != nil {
			return err
		}
	}
	return nil
}

// commit does what was prepared. It happens at the time of the decision, Mtime.
func (ch *change) commit() error {
	if ch.req.Mtime <= 0 {
		return refusal(sealfs.ErrInvalid)
	}
	return ch.settle(func(p *op.Request) error {
		err := ch.commitPart(p)
		if err == refusal(sealfs.ErrNotExist) {
			return nil // its volume was deleted meanwhile
		}
		return err
	})
}

func (ch *change) commitPart(p *op.Request) error {
	var in Inode
	switch p.Part {
	case op.PartNew:
		in.fromPart(p)
		now := ch.req.Mtime
		in.Atime, in.Mtime, in.Ctime, in.Btime = now, now, now, now
		if err := ch.giveACL(&in, p.Data); err != nil {
			return err
		}
		if err := ch.charge(&in, -PaidAhead(p), 0); err != nil {
			return err
		}
		return ch.put(&in)
	case op.PartName:
		return ch.commitName(p)
	case op.PartVolume:
		return nil
	}
	if err := ch.load(p.Ino, &in); err != nil {
		return err
	}
	now := max(ch.req.Mtime, in.Ctime)
	switch p.Part {
	case op.PartDrop:
		if err := ch.rehome(&in, p.Dir, 0); err != nil {
			return err
		}
		return ch.dropLink(&in, now)
	case op.PartLink:
		if err := ch.rehome(&in, 0, p.Dir); err != nil {
			return err
		}
		if err := ch.addLink(&in, now); err != nil {
			return err
		}
	case op.PartMove:
		if err := ch.rehome(&in, p.Dir2, p.Dir); err != nil {
			return err
		}
		if in.isDir() {
			in.Parent = p.Dir
		}
		in.change(now)
	}
	return ch.put(&in)
}

// commitName lets a name stand for its new inode.
func (ch *change) commitName(p *op.Request) error {
	var dir Inode
	var e Entry
	if err := getDir(ch.tx, ch.c, p.Dir, &dir); err != nil {
		return err
	}
	dir.own()
	found, err := findEntry(ch.tx, ch.c, &dir, p.Name, &e)
	if err != nil {
		return err
	}
	in := Inode{Ino: p.Ino, Mode: p.Mode}
	if found && e.Type == typeDir>>12 {
		if err := dir.loseSubdir(); err != nil {
			return err
		}
	}
	if in.isDir() {
		dir.Nlink++
	}
	if found {
		ch.tellName(&dir, uint32(e.Type)<<12, -1)
		ch.tellName(&dir, in.Mode, 1)
		err = ch.putEntry(dir.Ino, e.Cookie, p.Name, &in)
	} else {
		err = ch.addEntry(&dir, e.Cookie, p.Name, &in)
	}
	if err != nil {
		return err
	}
	now, mtime := ch.req.Mtime, dir.Mtime
	dir.touch(max(now, dir.Ctime))
	if now < dir.Ctime {
		dir.Mtime = max(now, mtime) // what has happened since need not have changed entries
	}
	return ch.putDir(&dir)
}

// abort forgets what was prepared. The number of a new inode is lost.
func (ch *change) abort() error {
	return ch.settle(func(p *op.Request) error {
		if p.Part != op.PartNew {
			return nil
		}
		var in Inode
		in.fromPart(p)
		return ch.charge(&in, -PaidAhead(p), -1)
	})
}

// forget deletes a decision that all parties have executed.
func (ch *change) forget() error {
	k := DecisionKey(ch.req.Shard, ch.req.Tx)
	err := ch.tx.Delete(k[:])
	if err == sealfs.ErrNotExist {
		ch.quiet = true
		return nil
	}
	return err
}

// resolve answers Resolve from what is durable state; that a transaction is
// still under way is known to the server alone.
func resolve(r pmem.Reader, req *op.Request, rep *op.Reply) error {
	k := DecisionKey(req.Shard, req.Tx)
	b, err := pmem.Get(r, k[:])
	if err == sealfs.ErrNotExist {
		rep.Off = op.FateAborted
		return nil
	}
	if err != nil {
		return err
	}
	d, err := DecodeDecision(b)
	rep.Off, rep.Attr.Mtime = op.FateCommitted, d.Time
	return err
}

// ancestorsMax bounds one answer to Ancestors.
const ancestorsMax = 1024

// ancestors answers Ancestors: req.Ino and the directories above it, as long as
// they lie on this store. The caller has seen to it that none is moved meanwhile.
func ancestors(r pmem.Reader, c Config, req *op.Request, rep *op.Reply) error {
	var in Inode
	for at := req.Ino; ; at = in.Parent {
		if !c.local(at) || len(rep.Entries) == ancestorsMax {
			rep.Off = uint64(at)
			return nil
		}
		if err := getDir(r, c, at, &in); err != nil {
			return c.absent(req, at, err)
		}
		if err := c.touch(req, TouchLinks, at, ""); err != nil {
			return err
		}
		rep.Entries = append(rep.Entries, op.Dirent{Name: ".", Ino: at, Type: typeDir >> 12})
		if in.Parent == at {
			return nil
		}
	}
}
