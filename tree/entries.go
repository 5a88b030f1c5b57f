package tree

import (
	"bytes"
	"encoding/binary"
	"iter"

	"golang.org/x/sys/unix"
)

// entry is one name of a directory, as getdents64(2) tells it.
type entry struct {
	name []byte // aliases the buffer
	dir  bool   // a directory, or a file system does not tell: then as if it were none
	off  int64  // the position behind it
}

// entries yields the entries of a buffer but "." and "..".
func entries(b []byte) iter.Seq[entry] {
	const head = 19 // inode, position, length, type
	return func(yield func(entry) bool) {
		for len(b) > head {
			n := int(binary.NativeEndian.Uint16(b[16:]))
			if n <= head || n > len(b) {
				return
			}
			e := entry{off: int64(binary.NativeEndian.Uint64(b[8:])), dir: b[18] == unix.DT_DIR, name: b[head:n]}
			b = b[n:]
			e.name, _, _ = bytes.Cut(e.name, []byte{0})
			if s := string(e.name); s != "." && s != ".." && !yield(e) {
				return
			}
		}
	}
}
