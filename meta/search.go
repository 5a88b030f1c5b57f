package meta

import (
	"bytes"

	"sealfs"
	"sealfs/pmem"
)

// searchStep is how many keys one call of Search looks at.
const searchStep = 256

// Search calls fn for the extents among the next keys from key on (nil: the
// first) that refer to the log in [from, to), and returns where to go on, nil
// at the end. What cannot be decoded is skipped: other checks tell of it. The
// extent and its sums are valid until fn returns.
func Search(r pmem.Reader, key []byte, from, to sealfs.LSN, fn func(sealfs.Ino, *Extent)) (next []byte, err error) {
	var cur pmem.Cursor
	ok := cur.Seek(r, key)
	for n := 0; ok; ok = cur.Next() {
		if n++; n > searchStep {
			return bytes.Clone(cur.Key()), nil
		}
		k, err := DecodeKey(cur.Key())
		if err != nil {
			continue
		}
		var e Extent
		switch k.Kind {
		case KindInode:
			var in Inode
			if DecodeInode(cur.Value(), k.Ino, &in) != nil {
				continue
			}
			e = in.First
		case KindExtent:
			if readExtent(&cur, &e) != nil {
				continue
			}
		}
		if e.Len != 0 && e.Addr < to && e.Addr+sealfs.LSN(e.Stored()) > from {
			fn(k.Ino, &e)
		}
	}
	return nil, cur.Err()
}
