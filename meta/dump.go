package meta

import (
	"bufio"
	"fmt"
	"io"

	"sealfs"
	"sealfs/op"
	"sealfs/pmem"
)

// Dump writes a human view of the whole namespace, one line for each record in
// the order of keys. Addresses, the only thing in which replicas differ, are
// left out: equal histories give equal dumps.
func Dump(r pmem.Reader, w io.Writer) error {
	b := bufio.NewWriter(w)
	err := walk(r, func(k *Key, v *record) error {
		v.dump(b, k)
		return nil
	})
	if err != nil {
		return err
	}
	return b.Flush()
}

// record is a decoded record of any kind; the field of its key's kind is set.
type record struct {
	shard          ShardState
	usage          Usage
	grant          Grant
	inode          Inode
	chunks         Part
	entry          Entry
	extent         Extent
	attribute      Attribute // with Part 0
	part           []byte    // of an attribute (other parts) or a symlink
	nameless, tail bool      // of an orphan
	lock           LockRow
	partition      sealfs.Ino
	session        SessionState
	result         ResultRow
	prepared       *op.Request
	decision       Decision
	place          Place
	outbox         Outbox
	letter         uint64 // of an inbox
}

// decode decodes the value b under the key k.
func (v *record) decode(k *Key, b []byte) (err error) {
	switch k.Kind {
	case KindShard:
		v.shard, err = DecodeShardState(b)
	case KindUsage:
		v.usage, err = DecodeUsage(b)
	case KindGrant:
		v.grant, err = DecodeGrant(b)
	case KindInode:
		err = DecodeInode(b, k.Ino, &v.inode)
	case KindPart:
		v.chunks, err = DecodePart(b)
	case KindPartition:
		v.partition, err = DecodePartition(b)
	case KindEntry:
		err = DecodeEntry(b, k.Ino, k.Pos, &v.entry)
	case KindExtent:
		err = DecodeExtent(b, k.Pos, &v.extent)
	case KindAttribute:
		if v.part = b; k.Part == 0 {
			err = DecodeAttribute(b, &v.attribute)
		}
	case KindSymlink:
		v.part = b
	case KindOrphan:
		v.nameless, v.tail, err = DecodeOrphan(b)
	case KindLock:
		v.lock, err = DecodeLock(b, k)
	case KindSession:
		if k.Pos == 0 {
			v.session, err = DecodeSession(b)
		} else {
			v.result, err = DecodeResult(b)
		}
	case KindPrepared:
		v.prepared, err = DecodePrepared(b)
	case KindDecision:
		v.decision, err = DecodeDecision(b)
	case KindQueued:
		err = DecodeQueued(b)
	case KindPlace:
		v.place, err = DecodePlace(b)
	case KindOutbox:
		v.outbox, err = DecodeOutbox(b)
	case KindInbox:
		v.letter, err = DecodeInbox(b)
	}
	return err
}

// walk calls fn for all records in the order of keys.
func walk(r pmem.Reader, fn func(*Key, *record) error) error {
	var cur pmem.Cursor
	var v record
	for ok := cur.Seek(r, nil); ok; ok = cur.Next() {
		k, err := DecodeKey(cur.Key())
		if err == nil {
			err = v.decode(&k, cur.Value())
		}
		if err == nil {
			err = fn(&k, &v)
		}
		if err != nil {
			return err
		}
	}
	return cur.Err()
}

func (v *record) dump(w io.Writer, k *Key) {
	switch k.Kind {
	case KindShard:
		fmt.Fprintf(w, "shard %d: epoch %d seq %d time %d counter %d\n", k.Shard, v.shard.Epoch, v.shard.Seq, v.shard.Time, v.shard.Counter)
	case KindUsage:
		fmt.Fprintf(w, "shard %d: volume %d uses %d bytes, %d inodes\n", k.Shard, k.Volume, v.usage.Bytes, v.usage.Inodes)
	case KindGrant:
		fmt.Fprintf(w, "shard %d: volume %d, store %s: limits %d bytes, %d inodes, version %d since %d\n", k.Shard, k.Volume, k.Store, v.grant.Bytes, v.grant.Inodes, v.grant.Version, v.grant.Since)
	case KindInode:
		in := &v.inode
		fmt.Fprintf(w, "inode %d: mode %o nlink %d uid %d gid %d rdev %#x size %d bytes %d times %d %d %d %d version %d volume %d parent %d flags %#x names %d target %q\n",
			in.Ino, in.Mode, in.Nlink, in.UID, in.GID, in.Rdev, in.Size, in.Bytes, in.Atime, in.Mtime, in.Ctime, in.Btime,
			in.Version, in.Volume, in.Parent, in.Flags, in.Names, in.Target)
		if in.First.Len != 0 {
			in.First.dump(w, k.Ino)
		}
		if in.Counted {
			fmt.Fprintf(w, "totals of %d: %d told %d\n", k.Ino, in.Total, in.Told)
		}
		if in.isDir() && (in.Gen != 0 || in.Bound != 0) {
			fmt.Fprintf(w, "directory %d: generation %d bound %d\n", k.Ino, in.Gen, in.Bound)
		} else if in.Bound != 0 {
			fmt.Fprintf(w, "chunks of %d: generation %d bound %d cut %d\n", k.Ino, in.Gen, in.Bound, in.Cut)
		}
	case KindQueued:
		fmt.Fprintf(w, "queued %d\n", k.Ino)
	case KindPlace:
		fmt.Fprintf(w, "place of %d in %d: %d names told %d\n", k.Ino, k.Dir, v.place.Names, v.place.Told)
	case KindOutbox:
		fmt.Fprintf(w, "outbox of shard %d for %d: %d letter %d %d\n", k.Shard, k.Ino, v.outbox.Waiting, v.outbox.Number, v.outbox.Letter)
	case KindInbox:
		fmt.Fprintf(w, "inbox of %d from shard %d: letter %d\n", k.Ino, k.From, v.letter)
	case KindPart:
		p := &v.chunks
		fmt.Fprintf(w, "part of %d in shard %d: generation %d bound %d bytes %d volume %d\n", k.Ino, k.Shard, p.Gen, p.Bound, p.Bytes, p.Volume)
	case KindPartition:
		fmt.Fprintf(w, "partition %d of %d, in shard %d: %d\n", k.Part, k.Ino, k.Shard, v.partition)
	case KindEntry:
		fmt.Fprintf(w, "entry %d of %d: %q inode %d type %o\n", k.Pos, k.Ino, v.entry.Name, v.entry.Ino, v.entry.Type)
	case KindExtent:
		v.extent.dump(w, k.Ino)
	case KindAttribute:
		if k.Part == 0 {
			fmt.Fprintf(w, "attribute %x.%d of %d: %q %d bytes %x\n", k.Hash, k.Ordinal, k.Ino, v.attribute.Name, v.attribute.Total, v.attribute.Value)
		} else {
			fmt.Fprintf(w, "attribute %x.%d of %d: part %d %x\n", k.Hash, k.Ordinal, k.Ino, k.Part, v.part)
		}
	case KindSymlink:
		fmt.Fprintf(w, "target of %d: part %d %q\n", k.Ino, k.Part, v.part)
	case KindOrphan:
		fmt.Fprintf(w, "orphan %d: nameless %v tail %v\n", k.Ino, v.nameless, v.tail)
	case KindLock:
		l := &v.lock
		fmt.Fprintf(w, "lock on %d: class %d type %d bytes %d-%d session %d owner %d process %d\n", k.Ino, l.Class, l.Type, l.Start, l.End, l.Session, l.Owner, l.PID)
	case KindSession:
		if k.Pos == 0 {
			fmt.Fprintf(w, "session %d in shard %d: low %d, %d rows\n", k.Session, k.Shard, v.session.Low, v.session.Rows)
		} else {
			fmt.Fprintf(w, "session %d in shard %d: result of %d: inode %d off %d held %d eof %v\n", k.Session, k.Shard, k.Pos, v.result.Ino, v.result.Off, v.result.Held, v.result.Eof)
		}
	case KindPrepared:
		p := v.prepared
		fmt.Fprintf(w, "prepared in shard %d for %d.%x: part %d inode %d directories %d %d name %q now %d mode %o coordinator %d\n",
			k.Shard, k.Tx.Age, k.Tx.Nonce, p.Part, p.Ino, p.Dir, p.Dir2, p.Name, p.Off, p.Mode, p.Coord)
	case KindDecision:
		fmt.Fprintf(w, "decision in shard %d for %d.%x: time %d parties %d\n", k.Shard, k.Tx.Age, k.Tx.Nonce, v.decision.Time, v.decision.Parties)
	}
}

func (e *Extent) dump(w io.Writer, ino sealfs.Ino) {
	fmt.Fprintf(w, "extent of %d at %d: %d bytes cover %d stamp %d sums %x\n", ino, e.Off, e.Len, e.Cover, e.Stamp, e.Sums)
}
