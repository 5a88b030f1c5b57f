package meta

import (
	"encoding/binary"
	"slices"

	"sealfs"
	"sealfs/op"
	"sealfs/pmem"
)

// Why an inode stands in the orphan table: the only byte of its row.
const (
	orphanNameless = 1 << iota // it has no name
	orphanTail                 // what is beyond its size waits to be freed (flagTail, Cut)
	orphanAll      = 1<<iota - 1
)

// DecodeOrphan reads a row of the orphan table, or returns a *sealfs.Corruption.
func DecodeOrphan(b []byte) (nameless, tail bool, err error) {
	if len(b) != 1 || b[0] == 0 || b[0] > orphanAll {
		return false, false, damaged("orphan row %x", b)
	}
	return b[0]&orphanNameless != 0, b[0]&orphanTail != 0, nil
}

// orphan returns the flags under which ino stands in the orphan table, 0 if it does not.
func (ch *change) orphan(ino sealfs.Ino) (byte, error) {
	k := OrphanKey(ch.c.Shards, ino)
	b, err := pmem.Get(ch.tx, k[:])
	if err == sealfs.ErrNotExist {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	if _, _, err := DecodeOrphan(b); err != nil {
		return 0, err
	}
	return b[0], nil
}

// setOrphan adds a reason for ino to stand in the orphan table.
func (ch *change) setOrphan(ino sealfs.Ino, why byte) error {
	old, err := ch.orphan(ino)
	if err != nil || old|why == old {
		return err
	}
	k := OrphanKey(ch.c.Shards, ino)
	b := [1]byte{old | why}
	return ch.tx.Set(k[:], b[:])
}

// clearOrphan takes a reason away, and with the last one the row.
func (ch *change) clearOrphan(ino sealfs.Ino, why byte) error {
	old, err := ch.orphan(ino)
	if err != nil || old&why == 0 {
		return err
	}
	k := OrphanKey(ch.c.Shards, ino)
	if b := [1]byte{old &^ why}; b[0] != 0 {
		return ch.tx.Set(k[:], b[:])
	}
	return ch.tx.Delete(k[:])
}

// Orphans calls fn for every inode in the orphan table of any shard until fn
// returns false. The caller who knows that nobody holds an inode has it
// freed by Reclaim.
func Orphans(r pmem.Reader, fn func(sealfs.Ino) bool) error {
	var cur pmem.Cursor
	// Jump from shard to shard over everything but their orphan rows.
	for s := 0; s < sealfs.ShardsMax; s++ {
		var k [3]byte
		putHead(k[:], sealfs.Shard(s), KindOrphan)
		ok := cur.Seek(r, k[:])
		for ; ok && inRange(&cur, k[:]); ok = cur.Next() {
			key, err := DecodeKey(cur.Key())
			if err != nil {
				return err
			}
			if !fn(key.Ino) {
				return nil
			}
		}
		if !ok {
			return cur.Err()
		}
		// The next shard that has anything at all.
		if next := cur.Key(); len(next) >= 2 {
			s = max(s, int(binary.BigEndian.Uint16(next))-1)
		}
	}
	return nil
}

// unlink removes a name that is not a directory's.
func (ch *change) unlink() error {
	var dir, in Inode
	var e Entry
	found, err := ch.open(&dir, &e)
	if err != nil {
		return err
	}
	if !found {
		return refusal(sealfs.ErrNotExist)
	}
	if e.Type == typeDir>>12 {
		return refusal(sealfs.ErrIsDir)
	}
	return ch.detach(&dir, &e, &in)
}

// rmdir removes an empty directory.
func (ch *change) rmdir() error {
	var dir, in Inode
	var e Entry
	found, err := ch.open(&dir, &e)
	if err != nil {
		return err
	}
	if !found {
		return refusal(sealfs.ErrNotExist)
	}
	if e.Type != typeDir>>12 {
		return refusal(sealfs.ErrNotDir)
	}
	return ch.detach(&dir, &e, &in)
}

// detach removes the entry e from dir and a link from its inode.
func (ch *change) detach(dir *Inode, e *Entry, in *Inode) error {
	if votes := ch.req.Votes; len(votes) > 0 && votes[0].Ino != e.Ino {
		return refusal(sealfs.ErrStale) // not what the other party has prepared for
	}
	if err := ch.loadEntry(e, in); err != nil {
		return err
	}
	if in.isDir() {
		if in.occupied() {
			return refusal(sealfs.ErrNotEmpty)
		}
		if err := ch.touch(TouchEmpty, in.Ino, ""); err != nil {
			return err
		}
		if err := dir.loseSubdir(); err != nil {
			return err
		}
	}
	if err := ch.dropEntry(dir, e.Cookie, ch.req.Name, in.Mode); err != nil {
		return err
	}
	if err := ch.rehome(in, dir.self(), 0); err != nil {
		return err
	}
	dir.touch(ch.req.Time)
	if err := ch.putDir(dir); err != nil {
		return err
	}
	dir.Attr(&ch.rep.Dir)
	return ch.dropLink(in, ch.req.Time)
}

// loseSubdir takes from the directory in the link that a subdirectory's ".." was.
func (in *Inode) loseSubdir() error {
	if in.Nlink <= 2 {
		return damaged("directory %d has %d links but a subdirectory", in.Ino, in.Nlink)
	}
	in.Nlink--
	return nil
}

// dropLink takes a name from in, a directory its only one, and writes in or
// frees it. It answers in's attributes.
func (ch *change) dropLink(in *Inode, now int64) error {
	if in.Nlink == 0 {
		return damaged("inode %d has an entry but no links", in.Ino)
	}
	if err := ch.touch(TouchLinks, in.Ino, ""); err != nil {
		return err
	}
	if !in.foreign {
		ch.altered(in.Ino, "")
	}
	in.change(now)
	if in.Nlink--; in.isDir() {
		in.Nlink = 0
	}
	in.Attr(&ch.rep.Attr)
	if in.Nlink > 0 || in.foreign {
		return ch.put(in)
	}
	ch.rep.Held = in.Ino
	if ch.req.Flags&op.Held == 0 {
		done, err := ch.free(in)
		if err != nil || done {
			ch.rep.Eof = done
			return err
		}
	}
	if err := ch.setOrphan(in.Ino, orphanNameless); err != nil {
		return err
	}
	return ch.put(in)
}

// free frees what belongs to in, and in itself once nothing is left. When the
// budget ends before, it reports false, and in must be written.
func (ch *change) free(in *Inode) (done bool, err error) {
	in.Flags = in.Flags&^flagLinkable | flagDying
	if ch.req.Type == op.DropVolume {
		in.Cut = 0 // parts go with their own shards
	} else if in.Chunked() {
		// From now on the home refuses everything for chunks.
		in.Size = min(in.Size, sealfs.HomeBytes)
		if ch.cut(in); in.Cut != 0 {
			if err := ch.settleTail(in); err != nil {
				return false, err
			}
		}
	}
	if done, err = ch.clear(in, 0, noBlock); !done || err != nil {
		return false, err
	}
	if err := ch.unqueue(in); err != nil {
		return false, err
	}
	var prefix [11]byte
	for _, kind := range [...]Kind{KindAttribute, KindSymlink, KindLock, KindEntry, KindPlace, KindInbox} {
		switch {
		case kind == KindPlace && in.Flags&flagSpread == 0,
			kind == KindInbox && !in.Counted:
			continue
		case kind == KindAttribute && in.Names == 0,
			kind == KindSymlink && (!in.isLink() || in.Size <= inlineTarget),
			kind == KindEntry && !in.occupied():
			continue
		}
		putIno(prefix[:], ch.c.Shards, kind, in.Ino)
		n, bytes, err := ch.deleteRange(prefix[:])
		if err != nil {
			return false, err
		}
		if kind == KindAttribute {
			if err := ch.charge(in, -bytes, 0); err != nil {
				return false, err
			}
		}
		if kind == KindEntry {
			if uint64(n) > in.Size && !in.IsSplit() { // there may be some that have moved
				return false, damaged("directory %d counts %d entries and has more", in.Ino, in.Size)
			}
			in.Size -= min(uint64(n), in.Size)
		}
		if ch.budget == 0 {
			return false, nil
		}
	}
	if in.Cut != 0 {
		return false, nil
	}
	if in.isDir() && in.occupied() {
		if err := ch.freePartitions(in); err != nil || ch.budget == 0 {
			return false, err
		}
	}
	if err := ch.charge(in, 0, -1); err != nil {
		return false, err
	}
	if err := ch.clearOrphan(in.Ino, orphanAll); err != nil {
		return false, err
	}
	k := InodeKey(ch.c.Shards, in.Ino)
	if err := ch.tx.Delete(k[:]); err != nil && err != sealfs.ErrNotExist {
		return false, err
	}
	if ch.c.Altered != nil {
		ch.c.Altered(in.Ino, "", true)
	}
	return true, nil
}

// deleteRange deletes rows whose keys begin with prefix, within the budget, and
// returns how many, and how long their values were together.
func (ch *change) deleteRange(prefix []byte) (n int, bytes int64, err error) {
	return ch.deleteUpTo(prefix, nil)
}

// deleteUpTo is deleteRange that stops at the key end, if that is not nil.
func (ch *change) deleteUpTo(prefix, end []byte) (n int, bytes int64, err error) {
	var cur pmem.Cursor
	for ch.budget > 0 {
		// A cursor does not outlive a change, so keys are collected first.
		var keys [16][40]byte
		var lens [len(keys)]int
		got := 0
		for ok := cur.Seek(ch.tx, prefix); ok && got < min(len(keys), ch.budget) && inRange(&cur, prefix); ok = cur.Next() {
			key := cur.Key()
			if end != nil && string(key) >= string(end) {
				break
			}
			if len(key) > len(keys[got]) {
				return n, bytes, damaged("key %x", key)
			}
			lens[got] = copy(keys[got][:], key)
			bytes += int64(len(cur.Value()))
			got++
		}
		if err := cur.Err(); err != nil {
			return n, bytes, err
		}
		for i := range got {
			if err := ch.tx.Delete(keys[i][:lens[i]]); err != nil {
				return n, bytes, err
			}
			if Kind(keys[i][2]) == KindLock {
				key, err := DecodeKey(slices.Clone(keys[i][:lens[i]])) // which would put all on the heap
				if err != nil {
					return n, bytes, err
				}
				ch.countLocks(key.Session, -1)
			}
		}
		n += got
		ch.budget -= got
		if got == 0 {
			break
		}
	}
	return n, bytes, nil
}

// reclaim does one bounded step of freeing what nobody can reach of req.Ino: an
// inode without a name, or with the flag Held only what is cut off of it. With SetSize
// in Valid that is also what unknown writers may have left in chunks beyond the
// size. The reply names the inode in Held, and its Eof says that nothing is left. Otherwise its Off
// says, if not 0, that parts up to there must be purged for the generation in
// Attr, from the size in Attr on; the flag Purged with that generation says that it
// is done.
func (ch *change) reclaim() error {
	req := ch.req
	var in Inode
	if err := ch.load(req.Ino, &in); err != nil {
		return err
	}
	ch.rep.Held = in.Ino
	if err := ch.touch(TouchLinks, in.Ino, ""); err != nil {
		return err
	}
	gen, cut, flags := in.Gen, in.Cut, in.Flags
	if req.Flags&op.Purged != 0 && req.Gen == in.Gen {
		in.Cut = 0
	}
	if req.Valid&op.SetSize != 0 {
		ch.cut(&in)
	}
	nameless := in.Nlink == 0 && req.Flags&op.Held == 0
	if nameless {
		done, err := ch.free(&in)
		if err != nil || done {
			ch.rep.Eof = done
			return err
		}
	} else if in.Flags&flagTail != 0 {
		done, err := ch.clear(&in, blocksOf(in.Size), noBlock)
		if err != nil {
			return err
		}
		if done {
			in.Flags &^= flagTail
		}
	}
	in.Attr(&ch.rep.Attr)
	ch.rep.Off = in.Cut
	home, chunks := in.Tails()
	ch.rep.Eof = !nameless && !home && !chunks
	if ch.quiet = in.Gen == gen && in.Cut == cut && in.Flags == flags && ch.budget == FreeMax; ch.quiet {
		return nil
	}
	if err := ch.settleTail(&in); err != nil {
		return err
	}
	return ch.put(&in)
}

// dropVolume does one bounded step of freeing the inodes and parts of req.Volume in
// req.Shard, with their entries, without regard to names and holders: it looks at FreeMax of them
// at most, from req.Ino on. The reply says in Off where to go on, and in Eof
// that the end was reached.
func (ch *change) dropVolume() error {
	uk := UsageKey(ch.req.Shard, ch.req.Volume)
	u, err := getUsage(ch.tx, uk[:])
	if err != nil {
		return err
	}
	if u == (Usage{}) {
		if none, err := ch.dropPartitions(); err != nil || !none {
			ch.rep.Off = uint64(ch.req.Ino)
			return err
		}
		return ch.dropGrants()
	}
	// Inode numbers of a shard only grow, so ino is a cursor that survives
	// changes. Parts, of inodes of all shards, may come later than it.
	ino := ch.req.Ino
	for range FreeMax {
		next, err := ch.nextOf(ino)
		if err != nil {
			return err
		}
		if next == 0 {
			ch.rep.Eof = true
			return nil
		}
		ino = next
		done, err := ch.dropMember(ino)
		if err != nil {
			return err
		}
		if !done {
			ch.rep.Off = uint64(ino)
			return nil
		}
		ino++
	}
	ch.rep.Off = uint64(ino)
	return nil
}

// nextOf returns the first inode from ino on that req.Shard has itself or a part of, 0
// if there is none.
func (ch *change) nextOf(ino sealfs.Ino) (next sealfs.Ino, err error) {
	for _, kind := range [...]Kind{KindInode, KindPart} {
		var k [11]byte
		putInoAt(k[:], ch.req.Shard, kind, ino)
		var cur pmem.Cursor
		if !cur.Seek(ch.tx, k[:]) || !inRange(&cur, k[:3]) {
			if err := cur.Err(); err != nil {
				return 0, err
			}
			continue
		}
		key, err := DecodeKey(cur.Key())
		if err != nil {
			return 0, err
		}
		if kind == KindInode && key.Ino.Home(ch.c.Shards) != ch.req.Shard {
			return 0, damaged("inode %d stands in shard %d", key.Ino, ch.req.Shard)
		}
		if next == 0 || key.Ino < next {
			next = key.Ino
		}
	}
	return next, nil
}

// dropMember does one bounded step of freeing ino and the part of it in
// req.Shard, as far as they stand there and are of req.Volume.
func (ch *change) dropMember(ino sealfs.Ino) (done bool, err error) {
	var in Inode
	if err := loadPart(ch.tx, ch.req.Shard, ino, &in); err != nil {
		return false, err
	}
	if in.Bytes != 0 && in.Volume == ch.req.Volume {
		if done, err := ch.dropPart(&in); err != nil || !done {
			return false, err
		}
	}
	if ino.Home(ch.c.Shards) != ch.req.Shard {
		return true, nil
	}
	if err := GetInode(ch.tx, ch.c, ino, &in); err == sealfs.ErrNotExist {
		return true, nil
	} else if err != nil {
		return false, err
	}
	if in.Volume != ch.req.Volume {
		return true, nil
	}
	in.own()
	if done, err = ch.free(&in); err != nil || done {
		return done, err
	}
	return false, ch.put(&in)
}
