package meta

import (
	"sealfs"
)

// letterRow names the letters of a shard to a directory.
type letterRow struct {
	to   sealfs.Ino
	from sealfs.Shard
}

type outboxRow struct {
	letterRow
	Outbox
}

// found notes a name of the inode in a directory.
func (s *seen) found(dir sealfs.Ino) {
	if s.dir != 0 && s.dir != dir {
		s.scattered = true
	}
	s.dir = dir
	if s.places == nil {
		s.places = map[sealfs.Ino]uint64{}
	}
	s.places[dir]--
}

// totalsRecord takes note of what an inode has told.
func (ck *checker) totalsRecord(in *Inode, s *seen) {
	s.counted, s.total, s.told = in.Counted, in.Total, in.Told
	if !in.isDir() && in.Parent != 0 {
		ck.inode(in.Parent).sum.Add(Totals{Bytes: int64(in.Size)}, int64(in.Nlink))
	}
}

func (ck *checker) placeRecord(k *Key, p *Place) {
	s := ck.inode(k.Ino)
	if s.flags&flagSpread == 0 {
		ck.problem("inode %d has a place in directory %d, which does not count", k.Ino, k.Dir)
	}
	if p.Told != s.size && s.flags&flagQueued == 0 {
		ck.problem("directory %d was told the size %d of inode %d, which is %d, and nothing is due", k.Dir, p.Told, k.Ino, s.size)
	}
	if s.places == nil {
		s.places = map[sealfs.Ino]uint64{}
	}
	s.places[k.Dir] += p.Names
	ck.inode(k.Dir).sum.Add(Totals{Bytes: int64(p.Told)}, int64(p.Names))
}

// letterSums takes what is under way off the sums.
func (ck *checker) letterSums() {
	for _, o := range ck.outboxes {
		d := ck.inodes[o.to]
		if d == nil || !d.exists {
			continue // it will be dropped
		}
		d.sum.Add(o.Waiting, -1)
		if o.Number > ck.letters[o.letterRow] {
			d.sum.Add(o.Letter, -1)
		}
	}
}

// totals checks what an inode tells, or is told.
func (ck *checker) totals(ino sealfs.Ino, s *seen) {
	if queued := s.flags&flagQueued != 0; queued != s.rowQueued {
		ck.problem("inode %d has flags %#x, its row in the queue is there: %v", ino, s.flags, s.rowQueued)
	}
	if s.mode&typeMask != typeDir {
		switch {
		case s.flags&flagDying != 0:
		case s.parent != 0 && (s.scattered || s.dir != s.parent):
			ck.problem("inode %d counts in directory %d and has names elsewhere, in %d", ino, s.parent, s.dir)
		case s.flags&flagSpread != 0:
			for dir, n := range s.places {
				if n != 0 {
					ck.problem("inode %d has a place in directory %d that is wrong by %d names", ino, dir, int64(n))
				}
			}
		}
		return
	}
	if !s.counted || s.nlink == 0 {
		return
	}
	if s.total != s.sum {
		ck.problem("directory %d has the totals %d, which should be %d", ino, s.total, s.sum)
	}
	if s.total != s.told && s.flags&flagQueued == 0 && s.parent != ino {
		ck.problem("directory %d has the totals %d, its parent knows %d, and nothing is due", ino, s.total, s.told)
	}
}
