package fsck

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"sealfs"
	"sealfs/lsfs/layout"
	"sealfs/meta"
)

// Repairs of records that are damaged or in the wrong place.

// mendRow plans to save and remove a record.
func (r *reader) mendRow(id ID, where string, key []byte, what string) {
	key = bytes.Clone(key)
	r.mendBy(id, where, func(e *editor) string {
		old := e.get(key)
		if old == nil {
			return ""
		}
		e.c.save(Saved{Problem: id, Where: where, Key: key, Old: bytes.Clone(old), Data: e.c.dataOf(key, old)})
		e.del(key)
		return what
	})
}

// dataOf returns what the log holds for the extent in a record, nil if that has none.
func (c *checker) dataOf(key, val []byte) []byte {
	k, err := meta.DecodeKey(key)
	if err != nil {
		return nil
	}
	var x meta.Extent
	switch k.Kind {
	case meta.KindExtent:
		err = meta.DecodeExtent(val, k.Pos, &x)
	case meta.KindInode:
		var in meta.Inode
		err = meta.DecodeInode(val, k.Ino, &in)
		x = in.First
	}
	if err != nil || x.Len == 0 {
		return nil
	}
	data, _ := c.bytesOf(&x)
	return data
}

// bytesOf reads what the log holds at the place of an extent. What cannot be
// read is zeros, and then the answer is false.
func (c *checker) bytesOf(x *meta.Extent) ([]byte, bool) {
	b := make([]byte, x.Stored())
	slot, ok := c.slotOf[x.Addr.Seq()]
	from := int64(x.Addr.Off())
	if !ok || from+int64(len(b)) > int64(c.sb.SegmentBytes) {
		return b, false
	}
	// In whole blocks: the device may be open for direct access.
	lo := from &^ (layout.BlockSize - 1)
	hi := (from + int64(len(b)) + layout.BlockSize - 1) &^ (layout.BlockSize - 1)
	whole, err := c.span(slot, lo, min(hi, int64(c.sb.SegmentBytes)))
	copy(b, whole[from-lo:])
	return b, err == nil
}

// verifies reports whether the data of an extent of ino verifies where it lies.
func (c *checker) verifies(ino sealfs.Ino, x *meta.Extent) bool {
	data, ok := c.bytesOf(x)
	if !ok {
		return false
	}
	for i := range x.Blocks() {
		if meta.BlockSum(ino, x.Off/block+uint64(i), x.Stamp, data[uint32(i)*block:][:x.Covered(i)]) != x.Sum(i) {
			return false
		}
	}
	return true
}

// mendPlace plans to put a record of an inode into the inode's home.
func (r *reader) mendPlace(key []byte, k *meta.Key) {
	key, ino := bytes.Clone(key), k.Ino
	r.mendBy(ShardWrong, name(ino), func(e *editor) string {
		old := e.get(key)
		if old == nil {
			return ""
		}
		e.c.save(Saved{Problem: ShardWrong, Where: name(ino), Key: key, Old: bytes.Clone(old), Data: e.c.dataOf(key, old)})
		to := bytes.Clone(key)
		home := ino.Home(e.c.w.shards)
		binary.BigEndian.PutUint16(to, uint16(home))
		old = bytes.Clone(old)
		e.del(key)
		if ino == 0 || e.c.w.owner[home] != e.c.names || e.get(to) != nil {
			return "the record is saved and removed"
		}
		e.put(to, old)
		return fmt.Sprintf("the record is moved to shard %d", home)
	})
}

// possible reports whether a number is one that shards issue.
func possible(ino sealfs.Ino, shards uint32) bool {
	return uint64(ino)/uint64(shards) >= sealfs.InoCounterMin && ino <= sealfs.InoMax
}

// mendCounter plans to set a shard's counter behind a number.
func (r *reader) mendCounter(ino sealfs.Ino) { r.mendBy(InoBeyond, name(ino), counterFix(ino)) }

func counterFix(ino sealfs.Ino) func(e *editor) string {
	return func(e *editor) string {
		w := e.c.w
		q, home := uint64(ino)/uint64(w.shards), ino.Home(w.shards)
		k := meta.ShardKey(home)
		st := meta.ShardState{Counter: sealfs.InoCounterMin}
		if b := e.get(k[:]); b != nil {
			var err error
			if st, err = meta.DecodeShardState(b); err != nil {
				return ""
			}
		}
		if q < sealfs.InoCounterMin || q < st.Counter {
			return ""
		}
		st.Counter = q + 1
		e.put(k[:], st.Append(nil))
		return fmt.Sprintf("shard %d will issue counter %d next", home, st.Counter)
	}
}

// mendTwice plans to remove the one of two inodes of a number that stands in the wrong shard.
func (n *namespace) mendTwice(ino sealfs.Ino) {
	n.c.mendBy(InoTwice, name(ino), func(e *editor) string {
		home := ino.Home(n.w.shards)
		removed := 0
		for _, s := range n.starts {
			var k [11]byte
			own := meta.InodeKey(n.w.shards, ino)
			copy(k[:], own[:])
			binary.BigEndian.PutUint16(k[:], uint16(s.shard))
			if old := e.get(k[:]); old != nil && s.shard != home {
				e.c.save(Saved{Problem: InoTwice, Where: name(ino), Key: bytes.Clone(k[:]), Old: bytes.Clone(old), Data: e.c.dataOf(k[:], old)})
				e.del(k[:])
				removed++
			}
		}
		if removed == 0 {
			return ""
		}
		return "the one in another shard than its home is saved and removed"
	})
}

// mendSession plans to count the result rows of a session anew.
func (r *reader) mendSession(s sealfs.Shard, session sealfs.Session, where string) {
	r.mendBy(SessionRows, where, func(e *editor) string {
		k := meta.SessionKey(s, session, 0)
		var st meta.SessionState
		old := e.get(k[:])
		if old != nil {
			var err error
			if st, err = meta.DecodeSession(old); err != nil {
				return ""
			}
		}
		rows := e.under(k[:11], meta.SessionRowsMax+2)
		n := len(rows)
		if old != nil {
			n--
		}
		if n > meta.SessionRowsMax { // more than can be: the first ones are answered
			for _, x := range rows[1 : n-meta.SessionRowsMax+1] {
				e.del(x.key)
			}
			n = meta.SessionRowsMax
		}
		st.Rows = uint32(n)
		e.put(k[:], st.Append(nil))
		return fmt.Sprintf("it counts %s", count(n, "row"))
	})
}

// mendUsage plans to correct what a volume uses in a shard.
func (n *namespace) mendUsage(row usageOf, off meta.Usage, where string) {
	n.c.mendBy(UsageWrong, where, func(e *editor) string {
		k := meta.UsageKey(row.shard, row.volume)
		var u meta.Usage
		if b := e.get(k[:]); b != nil {
			var err error
			if u, err = meta.DecodeUsage(b); err != nil {
				return ""
			}
		}
		now := meta.Usage{Bytes: u.Bytes + off.Bytes, Inodes: u.Inodes + off.Inodes}
		if now == u || now.Bytes < 0 || now.Inodes < 0 {
			return ""
		}
		e.putUsage(row.shard, row.volume, now)
		return fmt.Sprintf("%d bytes and %d inodes, not %d and %d", now.Bytes, now.Inodes, u.Bytes, u.Inodes)
	})
}

// mendPrepared plans to remove a part of a transaction that contradicts what it is about.
func (n *namespace) mendPrepared(p *part) {
	n.c.mendBy(PreparedWrong, p.where(), func(e *editor) string {
		if !n.w.complete() {
			return ""
		}
		key := p.key.Append(nil)
		old := e.get(key)
		if old == nil {
			return ""
		}
		e.c.save(Saved{Problem: PreparedWrong, Where: p.where(), Key: key, Old: bytes.Clone(old)})
		e.del(key)
		return "the part is saved and removed"
	})
}

// mendDecision plans to change the row of a decision.
func (n *namespace) mendDecision(at txKey, fn func(d *meta.Decision) string) {
	n.c.mendBy(DecisionWrong, at.String(), func(e *editor) string {
		k := meta.DecisionKey(at.coord, at.tx)
		b := e.get(k[:])
		d, err := meta.DecodeDecision(b)
		if b == nil || err != nil {
			return ""
		}
		what := fn(&d)
		if what != "" {
			e.put(k[:], d.Append(nil))
		}
		return what
	})
}

// lastTime returns the time of the last change of a shard.
func (e *editor) lastTime(s sealfs.Shard) int64 {
	k := meta.ShardKey(s)
	if b := e.get(k[:]); b != nil {
		if st, err := meta.DecodeShardState(b); err == nil && st.Time > 0 {
			return st.Time
		}
	}
	return 1
}
