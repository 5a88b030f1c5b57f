package pmem

import "bytes"

// Cursor walks the keys in ascending order:
//
//	var c pmem.Cursor
//	for ok := c.Seek(r, from); ok; ok = c.Next() { … c.Key() … c.Value() … }
//	if err := c.Err(); err != nil { … }
//
// The zero Cursor is ready for Seek; it allocates nothing. Any change of what it
// reads, also by the Tx that it reads, ends its validity until the next Seek.
// REQUIRES: latch, from Seek to the last use.
type Cursor struct {
	r     Reader
	no    PageNo
	leaf  *node
	slot  int
	upper []byte // first key beyond the leaf, nil if it is the last; aliases a page
	key   []byte
	val   []byte
	err   error
}

// Seek moves to the first key that is not below key, and reports whether there
// is one.
func (c *Cursor) Seek(r Reader, key []byte) bool {
	c.r, c.err = r, nil
	if !c.descend(key) {
		return false
	}
	i, _, ok := c.leaf.search(key, 0)
	if !ok {
		return c.fail(corrupt(r, c.no, "leaf cell"))
	}
	c.slot = i
	return c.settle()
}

// Next moves to the next key and reports whether there is one. After a false
// Seek or Next it must not be called.
func (c *Cursor) Next() bool {
	c.slot++
	return c.settle()
}

// Key returns the present key, valid until the next move.
func (c *Cursor) Key() []byte { return c.key }

// Value returns the present value, valid until the next move.
func (c *Cursor) Value() []byte { return c.val }

// Err returns what ended the walk, nil if it was the last key.
func (c *Cursor) Err() error { return c.err }

func (c *Cursor) fail(err error) bool {
	c.err, c.key, c.val = err, nil, nil
	return false
}

// settle reads the present cell, in the next leaf if this one has no more.
func (c *Cursor) settle() bool {
	for c.slot >= c.leaf.count() {
		from := c.upper
		if from == nil {
			c.key, c.val = nil, nil
			return false
		}
		if !c.descend(from) {
			return false
		}
		if c.upper != nil && bytes.Compare(c.upper, from) <= 0 {
			return c.fail(corrupt(c.r, c.no, "tree pages out of order"))
		}
		c.slot = 0
	}
	var ok bool
	if c.key, c.val, ok = c.leaf.cell(c.slot); !ok {
		return c.fail(corrupt(c.r, c.no, "leaf cell"))
	}
	return true
}

// descend finds the leaf for key and the first key beyond it.
func (c *Cursor) descend(key []byte) bool {
	n, err := treeRoot(c.r)
	if err != nil {
		return c.fail(err)
	}
	p, err := load(c.r, n, -1)
	if err != nil {
		return c.fail(err)
	}
	c.upper = nil
	for level := p.level(); level > 0; level-- {
		i, ok := p.route(key)
		if !ok {
			return c.fail(corrupt(c.r, n, "inner page cell"))
		}
		if i+1 < p.count() {
			if c.upper, _, ok = p.cell(i + 1); !ok {
				return c.fail(corrupt(c.r, n, "inner page cell"))
			}
		}
		kid, ok := p.child(i)
		if !ok {
			return c.fail(corrupt(c.r, n, "inner page child"))
		}
		n = kid
		if p, err = load(c.r, n, level-1); err != nil {
			return c.fail(err)
		}
	}
	c.no, c.leaf = n, p
	return true
}
