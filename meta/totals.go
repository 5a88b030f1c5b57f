package meta

import (
	"encoding/binary"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/op"
	"sealfs/pmem"
)

// Totals of a directory say what the tree below it holds, without a walk. Each directory of
// a volume that was made with totals has two of them in its record: Total is the sum of
//
//   - for each of its names: one file or one directory,
//   - for each name of a regular file or symbolic link: the size, as last told to it,
//   - for each subdirectory: what that has told,
//
// and Told is what it has told its own parent. So they change in the record that changes
// the names; what is new is told upwards later, by a Tally for each directory whose row of
// KindQueued says that there is something. A directory that moves takes what it has told
// from one parent to the other.
//
// A file knows its Parent as long as all its names are in one directory of its own shard, or were made there in a
// partition (partition.go) of one: then a change of its size is told at once. Else it has flagSpread, and a row of KindPlace
// for each directory in which it has names, with the size that was told; a change of its
// size is told by a Tally.
//
// What is to be told to a directory on another store is added up in a row of KindOutbox in the
// shard of the sender. From there it goes in letters, one at a time: a letter has a
// number, it is durable before it is sent, and stays until the receiver has it durably, who
// remembers the number of the last one from each shard in a row of KindInbox. What is told to a
// directory that is gone is dropped: its parent has lost all that it had told.
//
// The totals of a directory that is split are at its home: whatever happens to names in a partition, or to what has names
// there, is told to the directory (Inode.self), and partitions have none. So entries that move change nothing.
//
// At any time, and in each shard's state between two records, for each directory:
// Total + what outboxes hold for it and it has not taken = the sum above.

// Totals is the sum over a tree. Sums are modulo 2^64: a few sparse files can exceed it.
type Totals struct {
	Bytes int64 // sizes of regular files and symbolic links, once for each name
	Files int64 // names that are no directory's
	Dirs  int64 // directories, without the tree's own
}

// Add adds n times o.
func (t *Totals) Add(o Totals, n int64) {
	t.Bytes += n * o.Bytes
	t.Files += n * o.Files
	t.Dirs += n * o.Dirs
}

// Append appends the encoding of t: three varints, signed since sums may be wrong for a moment.
func (t *Totals) Append(b []byte) []byte {
	for _, v := range [...]int64{t.Bytes, t.Files, t.Dirs} {
		b = binary.AppendVarint(b, v)
	}
	return b
}

func (t *Totals) read(r *enc.Reader) {
	t.Bytes, t.Files, t.Dirs = r.Varint(), r.Varint(), r.Varint()
}

const totalsMax = 3 * binary.MaxVarintLen64

// nameTotals is what a name counts for where it stands.
func nameTotals(mode uint32) Totals {
	if mode&typeMask == typeDir {
		return Totals{Dirs: 1}
	}
	return Totals{Files: 1}
}

// sized reports whether the size of in counts.
func (in *Inode) sized() bool { return in.isFile() || in.isLink() }

// Place is a row of a file that has names in several directories, or in one of another
// shard: how many it has in this one, and the size that this one was told (varints).
type Place struct {
	Names uint64
	Told  uint64
}

// Append appends the record of p to b.
func (p *Place) Append(b []byte) []byte {
	return binary.AppendUvarint(binary.AppendUvarint(b, p.Names), p.Told)
}

// DecodePlace reads what Append wrote, or returns a *sealfs.Corruption.
func DecodePlace(b []byte) (Place, error) {
	r := enc.Reader{B: b}
	p := Place{Names: r.Uvarint(), Told: r.Uvarint()}
	if !r.Done() || p.Names == 0 || p.Names > sealfs.LinkMax || p.Told > sealfs.FileSizeMax {
		return Place{}, damaged("place %x", b)
	}
	return p, nil
}

// Outbox is a row of what a shard has to tell a directory on another store: what no letter
// holds yet, and the letter that is under way, if Number is not 0.
type Outbox struct {
	Waiting Totals
	Number  uint64
	Letter  Totals
}

// Append appends the record of o to b.
func (o *Outbox) Append(b []byte) []byte {
	b = o.Waiting.Append(b)
	b = binary.AppendUvarint(b, o.Number)
	if o.Number != 0 {
		b = o.Letter.Append(b)
	}
	return b
}

// DecodeOutbox reads what Append wrote, or returns a *sealfs.Corruption.
func DecodeOutbox(b []byte) (Outbox, error) {
	r := enc.Reader{B: b}
	var o Outbox
	o.Waiting.read(&r)
	if o.Number = r.Uvarint(); o.Number != 0 {
		o.Letter.read(&r)
	}
	if !r.Done() || o.Number == 0 && o.Waiting == (Totals{}) {
		return Outbox{}, damaged("outbox %x", b)
	}
	return o, nil
}

// DecodeInbox reads the number of the last letter that a directory has taken from a shard.
func DecodeInbox(b []byte) (uint64, error) {
	r := enc.Reader{B: b}
	n := r.Uvarint()
	if !r.Done() || n == 0 {
		return 0, damaged("inbox %x", b)
	}
	return n, nil
}

// DecodeQueued checks a row of KindQueued.
func DecodeQueued(b []byte) error {
	if string(b) != queuedRow {
		return damaged("queue row %x", b)
	}
	return nil
}

// GetOutbox reads what shard s has for the directory to, sealfs.ErrNotExist if there is nothing.
func GetOutbox(r pmem.Reader, s sealfs.Shard, to sealfs.Ino) (Outbox, error) {
	k := OutboxKey(s, to)
	b, err := pmem.Get(r, k[:])
	if err != nil {
		return Outbox{}, err
	}
	return DecodeOutbox(b)
}

// tellings is what an operation has to tell directories, and has yet to write.
type tellings struct {
	few  [4]telling // as many as most operations have: those do without the heap
	n    int
	more []telling
}

// telling is what is to be added to the total of a directory.
type telling struct {
	dir sealfs.Ino
	Totals
}

// at returns the telling number i.
func (t *tellings) at(i int) *telling {
	if i < len(t.few) {
		return &t.few[i]
	}
	return &t.more[i-len(t.few)]
}

// tell adds n times t to the total of a directory, when its record is written or the operation ends.
func (ch *change) tell(dir sealfs.Ino, t Totals, n int64) {
	all := &ch.totals
	i := 0
	for i < all.n && all.at(i).dir != dir {
		i++
	}
	if i == all.n {
		if all.n++; all.n > len(all.few) {
			all.more = append(all.more, telling{})
		}
		*all.at(i) = telling{dir: dir}
	}
	all.at(i).Add(t, n)
}

// tellName counts a name of an inode of the given mode in dir, or takes it out.
func (ch *change) tellName(dir *Inode, mode uint32, n int64) {
	if dir.Counted && !dir.foreign {
		ch.tell(dir.self(), nameTotals(mode), n)
	}
}

// takeTold adds to the directory in what the operation has to tell it. The caller writes in.
func (ch *change) takeTold(in *Inode) error {
	for i := range ch.totals.n {
		if d := ch.totals.at(i); d.dir == in.Ino {
			in.Total.Add(d.Totals, 1)
			d.Totals = Totals{}
		}
	}
	if in.Total == in.Told || in.Parent == in.Ino || in.Nlink == 0 {
		return nil
	}
	return ch.queue(in)
}

// queue makes a Tally of in due. The caller writes in.
func (ch *change) queue(in *Inode) error {
	if in.Flags&flagQueued != 0 {
		return nil
	}
	in.Flags |= flagQueued
	if ch.c.Queued != nil {
		ch.c.Queued(in.Ino.Home(ch.c.Shards), in.Ino, false)
	}
	k := QueuedKey(ch.c.Shards, in.Ino)
	return ch.tx.Set(k[:], []byte(queuedRow))
}

// Queued reports whether in says that a Tally is due.
func (in *Inode) Queued() bool { return in.Flags&flagQueued != 0 }

// Spread reports whether in has places.
func (in *Inode) Spread() bool { return in.Flags&flagSpread != 0 }

// SetQueued is for repairs, which see to the row, as SetSpread is.
func (in *Inode) SetQueued(is bool) { in.setFlag(flagQueued, is) }

// SetSpread makes in a file that has places, or is none.
func (in *Inode) SetSpread(is bool) { in.setFlag(flagSpread, is) }

func (in *Inode) setFlag(flag uint8, is bool) {
	in.Flags &^= flag
	if is {
		in.Flags |= flag
	}
}

// QueuedValue is the value of every row of KindQueued.
func QueuedValue() []byte { return []byte(queuedRow) }

// queuedRow is the value of a row of KindQueued.
const queuedRow = "\x01"

// unqueue takes in out of the queue. The caller writes in.
func (ch *change) unqueue(in *Inode) error {
	if in.Flags&flagQueued == 0 {
		return nil
	}
	in.Flags &^= flagQueued
	k := QueuedKey(ch.c.Shards, in.Ino)
	return ch.tx.Delete(k[:])
}

// flushTotals writes what is left to be told, to directories that the operation has not written.
func (ch *change) flushTotals() error {
	for i := 0; i < ch.totals.n; i++ {
		d := *ch.totals.at(i)
		if d.Totals == (Totals{}) {
			continue
		}
		if !ch.c.local(d.dir) {
			if err := ch.post(d.dir, d.Totals); err != nil {
				return err
			}
			continue
		}
		var in Inode
		err := GetInode(ch.tx, ch.c, d.dir, &in)
		if err == sealfs.ErrNotExist || err == nil && !in.Counted {
			continue // it is gone, and what it had told is taken from its parent
		}
		if err != nil {
			return err
		}
		if err := ch.record(&in); err != nil { // which takes it
			return err
		}
	}
	return nil
}

// post puts what is to be told to a directory elsewhere into the outbox of the request's shard.
func (ch *change) post(to sealfs.Ino, t Totals) error {
	o, err := GetOutbox(ch.tx, ch.req.Shard, to)
	if err != nil && err != sealfs.ErrNotExist {
		return err
	}
	o.Waiting.Add(t, 1)
	if ch.c.Queued != nil {
		ch.c.Queued(ch.req.Shard, to, true)
	}
	return ch.putOutbox(to, &o)
}

func (ch *change) putOutbox(to sealfs.Ino, o *Outbox) error {
	k := OutboxKey(ch.req.Shard, to)
	if *o == (Outbox{}) {
		if err := ch.tx.Delete(k[:]); err != sealfs.ErrNotExist {
			return err
		}
		return nil
	}
	var b [2*totalsMax + binary.MaxVarintLen64]byte
	return ch.tx.Set(k[:], o.Append(b[:0]))
}

// born lets a new inode in shard s, which gets its name in dir, take part in the
// totals if dir does.
func (in *Inode) born(dir *Inode, s sealfs.Shard, shards uint32) {
	switch {
	case !dir.Counted:
	case in.isDir():
		in.Counted = true
	case !in.sized():
	case dir.Ino.Home(shards) == s:
		in.Parent = dir.self()
	default:
		in.Flags |= flagSpread
	}
}

// rehome is for an inode that loses a name in the directory from and gets one in the
// directory to, 0 for none. It comes before the links are counted; the caller writes in.
func (ch *change) rehome(in *Inode, from, to sealfs.Ino) error {
	switch {
	case in.foreign || from == to || in.Nlink == 0 && from != 0:
		return nil
	case in.isDir():
		if !in.Counted {
			return nil
		}
		if from != 0 {
			ch.tell(from, in.Told, -1)
		}
		if to != 0 {
			ch.tell(to, in.Told, 1)
		} else {
			in.Told = Totals{}
		}
		return nil
	case in.Parent != 0:
		size := Totals{Bytes: int64(in.told)}
		switch {
		case from == in.Parent && to == 0:
			ch.tell(from, size, -1)
			if in.Nlink == 1 {
				in.Parent = 0
				in.Flags |= flagSpread // without a place: Link may give it a name again
			}
			return nil
		case to == in.Parent && from == 0:
			ch.tell(to, size, 1)
			return nil
		case from == in.Parent && in.Nlink == 1 && to.Home(ch.c.Shards) == in.Ino.Home(ch.c.Shards):
			ch.tell(from, size, -1)
			ch.tell(to, size, 1)
			in.Parent = to
			return nil
		}
		if err := ch.putPlace(in.Ino, in.Parent, Place{uint64(in.Nlink), in.told}); err != nil {
			return err
		}
		in.Parent = 0
		in.Flags |= flagSpread
	case in.Flags&flagSpread == 0:
		return nil
	}
	return ch.replace(in, from, to)
}

// replace is rehome for a file that has places.
func (ch *change) replace(in *Inode, from, to sealfs.Ino) error {
	if from != 0 {
		p, err := ch.place(in.Ino, from)
		if err != nil {
			return err
		}
		if p.Names > 0 { // else a total is wrong, which must keep nobody from his files
			ch.tell(from, Totals{Bytes: int64(p.Told)}, -1)
			p.Names--
			if err := ch.putPlace(in.Ino, from, p); err != nil {
				return err
			}
		}
	}
	if to == 0 {
		return nil
	}
	links := in.Nlink
	if from != 0 {
		links--
	}
	if links == 0 && to.Home(ch.c.Shards) == in.Ino.Home(ch.c.Shards) {
		in.Parent = to // its only name
		in.Flags &^= flagSpread
		ch.tell(to, Totals{Bytes: int64(in.told)}, 1)
		return ch.unqueue(in)
	}
	p, err := ch.place(in.Ino, to)
	if err != nil {
		return err
	}
	if p.Names == 0 {
		p.Told = in.told
	}
	p.Names++
	ch.tell(to, Totals{Bytes: int64(p.Told)}, 1)
	return ch.putPlace(in.Ino, to, p)
}

// place returns what in has in a directory: no names if there is no row.
func (ch *change) place(ino, dir sealfs.Ino) (Place, error) {
	k := PlaceKey(ch.c.Shards, ino, dir)
	b, err := pmem.Get(ch.tx, k[:])
	if err == sealfs.ErrNotExist {
		return Place{}, nil
	}
	if err != nil {
		return Place{}, err
	}
	return DecodePlace(b)
}

func (ch *change) putPlace(ino, dir sealfs.Ino, p Place) error {
	k := PlaceKey(ch.c.Shards, ino, dir)
	if p.Names == 0 {
		return ch.tx.Delete(k[:])
	}
	var b [2 * binary.MaxVarintLen64]byte
	return ch.tx.Set(k[:], p.Append(b[:0]))
}

// tellSize is for an inode, no directory, whose record is about to be written.
func (ch *change) tellSize(in *Inode) error {
	if in.Size == in.told || in.Nlink == 0 {
		return nil
	}
	if in.Parent != 0 {
		ch.tell(in.Parent, Totals{Bytes: int64(in.Size - in.told)}, int64(in.Nlink))
		in.told = in.Size
	} else if in.Flags&flagSpread != 0 {
		in.told = in.Size
		return ch.queue(in)
	}
	return nil
}

// tally does the step Mode of passing totals on.
func (ch *change) tally() error {
	switch ch.req.Mode {
	case op.TallyTell:
		return ch.tallyTell()
	case op.TallySend:
		return ch.tallySend()
	case op.TallyTake:
		return ch.tallyTake()
	case op.TallySent:
		return ch.tallySent()
	}
	return refusal(sealfs.ErrInvalid)
}

// tallyTell tells the parent of a directory, or the directories of a file, what is new.
func (ch *change) tallyTell() error {
	var in Inode
	ch.quiet, ch.rep.Eof = true, true
	err := GetInode(ch.tx, ch.c, ch.req.Ino, &in)
	if err == sealfs.ErrNotExist || err == nil && in.Flags&flagQueued == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	in.own()
	if in.isDir() {
		if in.Nlink != 0 && in.Parent != in.Ino {
			ch.tell(in.Parent, in.Total, 1)
			ch.tell(in.Parent, in.Told, -1)
			in.Told = in.Total
		}
	} else if done, err := ch.tellPlaces(&in); err != nil || !done {
		return err
	}
	ch.quiet = false
	if err := ch.unqueue(&in); err != nil {
		return err
	}
	return ch.record(&in)
}

// Limits of one step with the places of a file.
const (
	placesSeen = 1024
	placesTold = 32
)

// tellPlaces tells directories of a file the size, from req.Dir on, 0 at first. Until all have
// been told the same size, the reply's Off says where to go on, and Attr of which version of
// the file, for req.Gen.
func (ch *change) tellPlaces(in *Inode) (done bool, err error) {
	first := PlaceKey(ch.c.Shards, in.Ino, ch.req.Dir)
	var todo [placesTold]struct {
		dir sealfs.Ino
		p   Place
	}
	seen, n, at := 0, 0, sealfs.Ino(0)
	var cur pmem.Cursor
	ok := cur.Seek(ch.tx, first[:])
	for ; ok && inRange(&cur, first[:11]); ok = cur.Next() {
		if len(cur.Key()) != len(first) {
			return false, damaged("key %x", cur.Key())
		}
		dir := sealfs.Ino(binary.BigEndian.Uint64(cur.Key()[11:]))
		if seen++; seen > placesSeen || n == placesTold {
			at = dir
			break
		}
		p, err := DecodePlace(cur.Value())
		if err != nil {
			return false, err
		}
		if p.Told != in.Size {
			todo[n].dir, todo[n].p = dir, p
			n++
		}
	}
	if err := cur.Err(); err != nil {
		return false, err
	}
	for _, t := range todo[:n] {
		ch.tell(t.dir, Totals{Bytes: int64(in.Size - t.p.Told)}, int64(t.p.Names))
		t.p.Told = in.Size
		if err := ch.putPlace(in.Ino, t.dir, t.p); err != nil {
			return false, err
		}
	}
	if at == 0 && (ch.req.Dir == 0 || ch.req.Gen == in.Version) {
		return true, nil
	}
	ch.quiet = n == 0
	ch.rep.Eof, ch.rep.Off = false, uint64(at)
	ch.rep.Attr = op.Attr{Ino: in.Ino, Version: in.Version}
	return false, nil
}

// tallySend makes a letter of what waits in req.Shard for the directory req.Ino, unless one is
// under way. The reply's Eof says that there is nothing to be sent.
func (ch *change) tallySend() error {
	ch.quiet = true
	o, err := GetOutbox(ch.tx, ch.req.Shard, ch.req.Ino)
	if err == sealfs.ErrNotExist {
		ch.rep.Eof = true
		return nil
	}
	if err != nil || o.Number != 0 {
		return err
	}
	// The sequence of the shard is never issued again once it is durable, and nothing
	// is sent before.
	o.Number, o.Letter, o.Waiting = ch.shard.Seq+1, o.Waiting, Totals{}
	ch.quiet = false
	return ch.putOutbox(ch.req.Ino, &o)
}

// tallySent ends the letter number req.Gen: its receiver has it durably.
func (ch *change) tallySent() error {
	o, err := GetOutbox(ch.tx, ch.req.Shard, ch.req.Ino)
	if err == sealfs.ErrNotExist || err == nil && o.Number != ch.req.Gen {
		ch.quiet, ch.rep.Eof = true, true
		return nil
	}
	if err != nil {
		return err
	}
	o.Number, o.Letter = 0, Totals{}
	ch.rep.Eof = o.Waiting == (Totals{})
	return ch.putOutbox(ch.req.Ino, &o)
}

// tallyTake takes the letter number req.Gen of shard req.Shard2 for the directory req.Ino, once.
func (ch *change) tallyTake() error {
	req := ch.req
	r := enc.Reader{B: req.Data}
	var t Totals
	if t.read(&r); !r.Done() || req.Gen == 0 || req.Ino.Home(ch.c.Shards) != req.Shard {
		return refusal(sealfs.ErrInvalid)
	}
	ch.quiet = true
	var in Inode
	err := GetInode(ch.tx, ch.c, req.Ino, &in)
	if err == sealfs.ErrNotExist || err == nil && !in.Counted {
		return nil
	}
	if err != nil {
		return err
	}
	k := InboxKey(ch.c.Shards, req.Ino, req.Shard2)
	b, err := pmem.Get(ch.tx, k[:])
	if err == nil {
		last, err := DecodeInbox(b)
		if err != nil || last >= req.Gen {
			return err
		}
	} else if err != sealfs.ErrNotExist {
		return err
	}
	ch.quiet = false
	ch.tell(req.Ino, t, 1)
	if err := ch.record(&in); err != nil {
		return err
	}
	return ch.tx.Set(k[:], binary.AppendUvarint(nil, req.Gen))
}

// Queued calls fn for all that waits to be told in any shard: for inodes with a Tally due, and for
// directories elsewhere for which an outbox of shard s holds something.
func Queued(r pmem.Reader, shards uint32, fn func(s sealfs.Shard, ino sealfs.Ino, outbox bool)) error {
	var cur pmem.Cursor
	for s := range shards {
		for _, kind := range [...]Kind{KindQueued, KindOutbox} {
			var k [3]byte
			putHead(k[:], sealfs.Shard(s), kind)
			for ok := cur.Seek(r, k[:]); ok && inRange(&cur, k[:]); ok = cur.Next() {
				key, err := DecodeKey(cur.Key())
				if err != nil {
					return err
				}
				fn(key.Shard, key.Ino, kind == KindOutbox)
			}
			if err := cur.Err(); err != nil {
				return err
			}
		}
	}
	return nil
}

// totalsAttr answers for the attributes under which directories tell their totals.
func (in *Inode) totalsAttr(name string) (value uint64, ok bool) {
	if !in.Counted {
		return 0, false
	}
	switch name {
	case op.AttrBytes:
		return uint64(in.Total.Bytes), true
	case op.AttrFiles:
		return uint64(in.Total.Files), true
	case op.AttrDirs:
		return uint64(in.Total.Dirs), true
	}
	return 0, false
}
