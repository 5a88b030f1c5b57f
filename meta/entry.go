package meta

import (
	"bytes"
	"encoding/binary"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/op"
	"sealfs/pmem"
)

const (
	ordinalBits = op.OrdinalBits
	ordinals    = 1 << ordinalBits
	// cookieMin is the smallest cookie: 0 to 2 are the beginning, "." and "..".
	cookieMin = 1 << ordinalBits
)

// Entry is a directory entry's record: one byte of type (the mode's upper four
// bits), the inode number as a varint, and the name up to the end.
type Entry struct {
	Dir    sealfs.Ino // from the key
	Cookie uint64     // from the key
	Ino    sealfs.Ino
	Type   uint8
	Name   []byte // aliases the page
}

// Append appends the record of e to b.
func (e *Entry) Append(b []byte) []byte {
	b = append(b, e.Type)
	b = binary.AppendUvarint(b, uint64(e.Ino))
	return append(b, e.Name...)
}

// DecodeEntry reads the record b of the entry of dir at cookie; Name aliases b.
// It returns a *sealfs.Corruption for bytes that Append cannot have written.
func DecodeEntry(b []byte, dir sealfs.Ino, cookie uint64, e *Entry) error {
	in := enc.Reader{B: b}
	t := in.U8()
	ino := in.Uvarint()
	if in.Err || t == 0 || t > 15 || ino == 0 || ino > sealfs.InoMax || len(in.B) == 0 || len(in.B) > sealfs.NameMax {
		return damaged("record %x of entry %d in directory %d", b, cookie, dir)
	}
	*e = Entry{Dir: dir, Cookie: cookie, Ino: sealfs.Ino(ino), Type: t, Name: in.B}
	return nil
}

// firstCookie returns the cookie of ordinal 0 for name in dir.
func (c Config) firstCookie(dir *Inode, name string) uint64 {
	return max(op.NameHash(dir.self(), dir.Volume, name)&^c.hashMask, 1) << ordinalBits
}

// inRange reports whether the cursor stands on a key that begins with prefix.
func inRange(cur *pmem.Cursor, prefix []byte) bool { return bytes.HasPrefix(cur.Key(), prefix) }

// findEntry looks for name in dir. Without a match it leaves in e.Cookie
// the first free cookie for name, or 0 when all ordinals are taken. A name that is to
// be looked for in a partition is ErrStale.
func findEntry(r pmem.Reader, c Config, dir *Inode, name string, e *Entry) (bool, error) {
	first := c.firstCookie(dir, name)
	if dir.hasMoved(first) || dir.IsPartition() && op.PartitionOf(first) != dir.Number() {
		return false, refusal(sealfs.ErrStale)
	}
	k := EntryKey(c.Shards, dir.Ino, first)
	free, full := first, first+ordinals
	var cur pmem.Cursor
	for ok := cur.Seek(r, k[:]); ok && inRange(&cur, k[:len(k)-1]); ok = cur.Next() {
		if len(cur.Key()) != len(k) {
			return false, damaged("key %x", cur.Key())
		}
		cookie := binary.BigEndian.Uint64(cur.Key()[11:])
		if err := DecodeEntry(cur.Value(), dir.Ino, cookie, e); err != nil {
			return false, err
		}
		if string(e.Name) == name {
			return true, nil
		}
		if cookie == free {
			free++
		}
	}
	if err := cur.Err(); err != nil {
		return false, err
	}
	*e = Entry{Dir: dir.Ino}
	if free < full {
		e.Cookie = free
	}
	return false, nil
}

// putEntry writes the entry of dir at cookie.
func (ch *change) putEntry(dir sealfs.Ino, cookie uint64, name string, in *Inode) error {
	ch.altered(dir, name)
	var b [1 + binary.MaxVarintLen64 + sealfs.NameMax]byte
	e := Entry{Ino: in.Ino, Type: uint8(in.Mode >> 12)}
	v := append(e.Append(b[:0]), name...)
	k := EntryKey(ch.c.Shards, dir, cookie)
	return ch.tx.Set(k[:], v)
}

// addEntry writes a new entry at the cookie that findEntry left, and counts it in dir.
func (ch *change) addEntry(dir *Inode, cookie uint64, name string, in *Inode) error {
	if cookie == 0 {
		return refusal(sealfs.ErrNoSpace)
	}
	dir.Size++
	ch.tellName(dir, in.Mode, 1)
	return ch.putEntry(dir.Ino, cookie, name, in)
}

// dropEntry deletes the entry of dir at cookie, whose inode has the mode mode.
func (ch *change) dropEntry(dir *Inode, cookie uint64, name string, mode uint32) error {
	ch.altered(dir.Ino, name)
	if dir.Size == 0 {
		return damaged("directory %d counts no entries but has one", dir.Ino)
	}
	dir.Size--
	ch.tellName(dir, mode, -1)
	k := EntryKey(ch.c.Shards, dir.Ino, cookie)
	return ch.tx.Delete(k[:])
}

// attr is what an entry alone knows of its inode: the number and the type.
func (e *Entry) attr() op.Attr { return op.Attr{Ino: e.Ino, Mode: uint32(e.Type) << 12} }

// lookup answers Lookup. Of an inode in another store it knows no more than the entry does.
func lookup(r pmem.Reader, c Config, req *op.Request, rep *op.Reply) error {
	if err := checkName(req.Name, sealfs.NameMax); err != nil {
		return err
	}
	var in Inode
	if err := getDir(r, c, req.Dir, &in); err != nil {
		return c.absent(req, req.Dir, err)
	}
	if in.IsPartition() {
		rep.Off = uint64(in.Parent)
	}
	if err := in.refuseClosed(); err != nil {
		return err
	}
	if err := c.touch(req, TouchName, req.Dir, req.Name); err != nil {
		return err
	}
	var e Entry
	found, err := findEntry(r, c, &in, req.Name, &e)
	if err != nil {
		return err
	}
	if !found {
		return refusal(sealfs.ErrNotExist)
	}
	if !c.local(e.Ino) {
		rep.Attr = e.attr()
		return nil
	}
	if err = GetInode(r, c, e.Ino, &in); err == sealfs.ErrNotExist {
		return damaged("entry %d of directory %d refers to inode %d, which does not exist", e.Cookie, e.Dir, e.Ino)
	} else if err != nil {
		return err
	}
	in.Attr(&rep.Attr)
	return c.touchAttr(req, &in)
}

// What an entry counts for against the length of a readdir, in bytes.
const (
	direntBytes = 24
	attrBytes   = 128
)

// readdir answers Readdir. The first entry is given whatever the length.
func readdir(r pmem.Reader, c Config, req *op.Request, rep *op.Reply) error {
	var dir, in Inode
	if err := getDir(r, c, req.Dir, &dir); err != nil {
		return c.absent(req, req.Dir, err)
	}
	if err := dir.refuseClosed(); err != nil {
		return err
	}
	if err := c.touchAttr(req, &dir); err != nil {
		return err
	}
	dir.Attr(&rep.Attr)
	if req.Off >= 1<<63-1 {
		rep.Eof = true
		return nil
	}
	if dir.hasMoved(req.Off + 1) {
		return refusal(sealfs.ErrStale)
	}
	k := EntryKey(c.Shards, dir.Ino, req.Off+1)
	var cur pmem.Cursor
	var e Entry
	for ok, used := cur.Seek(r, k[:]), uint64(0); ok && inRange(&cur, k[:11]); ok = cur.Next() {
		key := cur.Key()
		if len(key) != len(k) {
			return damaged("key %x", key)
		}
		if err := DecodeEntry(cur.Value(), dir.Ino, binary.BigEndian.Uint64(key[11:]), &e); err != nil {
			return err
		}
		used += direntBytes + uint64(len(e.Name))
		if req.Flags&op.Plus != 0 {
			used += attrBytes
		}
		if used > req.Len && len(rep.Entries) > 0 {
			return nil
		}
		rep.Entries = append(rep.Entries, op.Dirent{Name: string(e.Name), Ino: e.Ino, Cookie: e.Cookie, Type: e.Type})
		if req.Flags&op.Plus == 0 {
			continue
		}
		// The inode of a subdirectory may lie in another store, and a transaction may
		// be about to change one that lies here: who wants to know more asks for it, and waits.
		if err := GetInode(r, c, e.Ino, &in); err == nil {
			if c.touchAttr(req, &in) == nil {
				in.Attr(&rep.Entries[len(rep.Entries)-1].Attr)
			}
		} else if err != sealfs.ErrNotExist {
			return err
		}
	}
	rep.Eof = true
	return cur.Err()
}
