package cluster

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"os"

	"sealfs"
)

// bbolt believes its pages: damaged ones make it panic, on goroutines of its
// own too, or read beyond its mapping. checkBolt is a judge of its own, which
// walks the whole file before bbolt opens it and returns what is damaged as
// *sealfs.Corruption. It asks for more than bbolt does: pages packed without
// gaps, and both meta pages good. (If bbolt finds one of them damaged it takes
// the other, which is to forget the last transaction, an acknowledged one.)
//
// bbolt's format, version 2, is that of the processor; ours are little-endian.
//
//	page    8 id, 2 flags, 2 count, 4 overflow (pages that follow), elements, data
//	branch  elements of 4 pos, 4 key size, 8 page
//	leaf    elements of 4 flags (1: a bucket), 4 pos, 4 key size, 4 value size
//	bucket  value of 8 root page, 8 sequence; with root 0 a leaf page follows in place
//	meta    4 magic, 4 version, 4 page size, 4 flags, 16 root bucket, 8 free list,
//	        8 number of pages, 8 transaction, 8 FNV-1a of what is before
func checkBolt(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	c := &boltChecker{path: path, b: b, seen: make(map[uint64]bool)}
	return c.file()
}

const (
	boltMagic     = 0xed0cdaed
	boltVersion   = 2
	boltPageHead  = 16
	boltElement   = 16
	boltMetaLen   = 64
	boltBucketLen = 16

	boltBranch   = 1
	boltLeaf     = 2
	boltMeta     = 4
	boltFreelist = 16

	boltNoFreelist = 1<<64 - 1
	boltDepthMax   = 32
)

type boltChecker struct {
	path     string
	b        []byte
	pageSize uint64
	pages    uint64          // number of pages that are in use or free
	seen     map[uint64]bool // pages reached
}

func (c *boltChecker) damaged(page uint64, what string) error {
	return &sealfs.Corruption{Where: c.path, Off: int64(page * c.pageSize), What: "bbolt page: " + what}
}

func (c *boltChecker) file() error {
	if len(c.b) < boltPageHead+boltMetaLen {
		return c.damaged(0, "file is too short")
	}
	c.pageSize = uint64(binary.LittleEndian.Uint32(c.b[boltPageHead+8:]))
	if c.pageSize < 1024 || c.pageSize > 1<<16 || c.pageSize&(c.pageSize-1) != 0 || uint64(len(c.b)) < 4*c.pageSize {
		return c.damaged(0, "page size, or file is too short")
	}
	var meta []byte // the newer one
	for i := range uint64(2) {
		p := c.b[i*c.pageSize:]
		m := p[boltPageHead : boltPageHead+boltMetaLen]
		sum := fnv.New64a()
		sum.Write(m[:boltMetaLen-8])
		switch {
		case binary.LittleEndian.Uint32(m) != boltMagic:
			return c.damaged(i, "meta magic")
		case binary.LittleEndian.Uint32(m[4:]) != boltVersion:
			return fmt.Errorf("%s: bbolt format version %d: %w", c.path, binary.LittleEndian.Uint32(m[4:]), sealfs.ErrVersion)
		case sum.Sum64() != binary.LittleEndian.Uint64(m[56:]):
			return c.damaged(i, "meta checksum")
		case binary.LittleEndian.Uint64(p) != i || binary.LittleEndian.Uint16(p[8:]) != boltMeta || uint64(binary.LittleEndian.Uint32(m[8:])) != c.pageSize:
			return c.damaged(i, "meta page header")
		}
		if meta == nil || binary.LittleEndian.Uint64(m[48:]) > binary.LittleEndian.Uint64(meta[48:]) {
			meta = m
		}
	}
	c.pages = binary.LittleEndian.Uint64(meta[40:])
	if c.pages > uint64(len(c.b))/c.pageSize {
		return c.damaged(0, "file is shorter than its pages")
	}
	if err := c.bucket(0, meta[16:32], 0); err != nil {
		return err
	}
	return c.freelist(binary.LittleEndian.Uint64(meta[32:]))
}

// page returns a page with its overflow, by its number.
func (c *boltChecker) page(id uint64) ([]byte, error) {
	if id < 2 || id >= c.pages {
		return nil, c.damaged(0, fmt.Sprintf("page %d does not exist", id))
	}
	p := c.b[id*c.pageSize:]
	n := uint64(binary.LittleEndian.Uint32(p[12:])) + 1
	if binary.LittleEndian.Uint64(p) != id || n > c.pages-id {
		return nil, c.damaged(id, "header")
	}
	for i := id; i < id+n; i++ {
		if c.seen[i] {
			return nil, c.damaged(id, "referred to twice")
		}
		c.seen[i] = true
	}
	return p[:n*c.pageSize], nil
}

// bucket checks a bucket's value, found on page at.
func (c *boltChecker) bucket(at uint64, v []byte, depth int) error {
	if len(v) < boltBucketLen {
		return c.damaged(at, "bucket header")
	}
	if root := binary.LittleEndian.Uint64(v); root != 0 {
		if len(v) != boltBucketLen {
			return c.damaged(at, "bucket header")
		}
		return c.tree(root, nil, nil, depth)
	}
	p := v[boltBucketLen:]
	if len(p) < boltPageHead || binary.LittleEndian.Uint16(p[8:]) != boltLeaf || binary.LittleEndian.Uint32(p[12:]) != 0 {
		return c.damaged(at, "inline bucket")
	}
	return c.elements(at, p, nil, nil, depth)
}

// tree checks the page and what is below it; its keys are in [low, high), where
// nil is no bound.
func (c *boltChecker) tree(id uint64, low, high []byte, depth int) error {
	p, err := c.page(id)
	if err != nil {
		return err
	}
	if f := binary.LittleEndian.Uint16(p[8:]); f != boltLeaf && f != boltBranch {
		return c.damaged(id, "type")
	}
	return c.elements(id, p, low, high, depth)
}

// elements checks the elements of page p, which is at page id or in a value there.
func (c *boltChecker) elements(id uint64, p, low, high []byte, depth int) error {
	if depth > boltDepthMax {
		return c.damaged(id, "tree is too deep")
	}
	branch := binary.LittleEndian.Uint16(p[8:]) == boltBranch
	count := int(binary.LittleEndian.Uint16(p[10:]))
	next := uint64(boltPageHead + count*boltElement) // where the next data must be
	if next > uint64(len(p)) || branch && count == 0 {
		return c.damaged(id, "count")
	}
	type child struct {
		page uint64
		key  []byte
	}
	var children []child
	for i := range count {
		at := uint64(boltPageHead + i*boltElement)
		e := p[at : at+boltElement]
		var flags, pos, ksize, vsize uint64
		if branch {
			pos, ksize = uint64(binary.LittleEndian.Uint32(e)), uint64(binary.LittleEndian.Uint32(e[4:]))
		} else {
			flags, pos = uint64(binary.LittleEndian.Uint32(e)), uint64(binary.LittleEndian.Uint32(e[4:]))
			ksize, vsize = uint64(binary.LittleEndian.Uint32(e[8:])), uint64(binary.LittleEndian.Uint32(e[12:]))
		}
		if flags > 1 || at+pos != next || ksize == 0 || next+ksize+vsize > uint64(len(p)) {
			return c.damaged(id, "element")
		}
		key, value := p[next:next+ksize], p[next+ksize:next+ksize+vsize]
		next += ksize + vsize
		if low != nil && (bytes.Compare(key, low) < 0 || i > 0 && bytes.Equal(key, low)) || high != nil && bytes.Compare(key, high) >= 0 {
			return c.damaged(id, "order of keys")
		}
		low = key
		switch {
		case branch:
			children = append(children, child{binary.LittleEndian.Uint64(e[8:]), key})
		case flags == 1:
			if err := c.bucket(id, value, depth+1); err != nil {
				return err
			}
		}
	}
	for i, ch := range children {
		end := high
		if i+1 < len(children) {
			end = children[i+1].key
		}
		if err := c.tree(ch.page, ch.key, end, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// freelist checks the list of free pages, if the file has one.
func (c *boltChecker) freelist(id uint64) error {
	if id == boltNoFreelist {
		return nil
	}
	p, err := c.page(id)
	if err != nil {
		return err
	}
	n, ids := uint64(binary.LittleEndian.Uint16(p[10:])), p[boltPageHead:]
	if n == 0xffff { // then the first element is the count
		n, ids = binary.LittleEndian.Uint64(ids), ids[8:]
	}
	if binary.LittleEndian.Uint16(p[8:]) != boltFreelist || n > uint64(len(ids))/8 {
		return c.damaged(id, "free list")
	}
	for i := range n {
		free := binary.LittleEndian.Uint64(ids[i*8:])
		if free < 2 || free >= c.pages || c.seen[free] {
			return c.damaged(id, "free list names a page in use")
		}
		c.seen[free] = true
	}
	return nil
}
