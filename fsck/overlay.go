package fsck

import (
	"bytes"
	"slices"
)

// edit is what repairs make of one record.
type edit struct {
	key, val []byte
	gone     bool // there is no such record any more
}

// overlay holds the edits of repairs in the order of their keys: a check that
// is made with it judges the store as it will be. The nil overlay is empty.
type overlay struct {
	list  []edit
	fresh map[string]edit // since the last sort
}

// find returns where the edit of a key stands in the list, or would.
func (o *overlay) find(key []byte) (at int, ok bool) {
	if o == nil {
		return 0, false
	}
	return slices.BinarySearchFunc(o.list, key, func(e edit, k []byte) int { return bytes.Compare(e.key, k) })
}

// get returns the edit of a key.
func (o *overlay) get(key []byte) (edit, bool) {
	if o == nil {
		return edit{}, false
	}
	if e, ok := o.fresh[string(key)]; ok {
		return e, true
	}
	if at, ok := o.find(key); ok {
		return o.list[at], true
	}
	return edit{}, false
}

// put makes an edit, which scans see after sort.
func (o *overlay) put(e edit) {
	if o.fresh == nil {
		o.fresh = map[string]edit{}
	}
	o.fresh[string(e.key)] = e
}

// sort brings the edits in order.
func (o *overlay) sort() {
	for key, e := range o.fresh {
		if at, ok := o.find([]byte(key)); ok {
			o.list[at] = e
			delete(o.fresh, key)
		}
	}
	for _, e := range o.fresh {
		o.list = append(o.list, e)
	}
	slices.SortFunc(o.list, func(a, b edit) int { return bytes.Compare(a.key, b.key) })
	o.fresh = nil
}

// from returns a cursor at the first edit of the shard or one behind it.
func (o *overlay) from(shard int) *overlayCursor {
	at, _ := o.find([]byte{byte(shard >> 8), byte(shard)})
	if shard == 0 {
		at = 0
	}
	return &overlayCursor{o, at}
}

type overlayCursor struct {
	o  *overlay
	at int
}

func (c *overlayCursor) active() bool { return c.o != nil && c.at < len(c.o.list) }

// before calls fn for the edits up to key, and reports whether the last was that of key.
func (c *overlayCursor) before(key []byte, hi int, fn func(at ref, key, val []byte) error) (replaced bool, err error) {
	for c.active() {
		e := &c.o.list[c.at]
		order := bytes.Compare(e.key, key)
		if order > 0 || shardOf(e.key) >= hi {
			return false, nil
		}
		c.at++
		if !e.gone {
			if err := fn(ref{leaf: edited | uint32(c.at-1)}, e.key, e.val); err != nil {
				return false, err
			}
		}
		if order == 0 {
			return true, nil
		}
	}
	return false, nil
}

// rest calls fn for the remaining edits of shards below hi.
func (c *overlayCursor) rest(hi int, fn func(at ref, key, val []byte) error) error {
	for ; c.active() && shardOf(c.o.list[c.at].key) < hi; c.at++ {
		if e := &c.o.list[c.at]; !e.gone {
			if err := fn(ref{leaf: edited | uint32(c.at)}, e.key, e.val); err != nil {
				return err
			}
		}
	}
	return nil
}
