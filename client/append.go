package client

import (
	"context"
	"errors"

	"sealfs"
	"sealfs/op"
)

// An append is one request to the file's home as long as it ends below
// sealfs.HomeBytes there, or when the file has no chunks. Beyond, home gives out the place:
// Extend with the flag Append raises the size by the length and answers the old
// size, so that no two appends ever get the same place; then the bytes are written
// there, with the generation that the place was given out for. A crash
// between the two leaves zeros. A truncation between the two has taken the
// place away, and with it the bytes. A place is given out, too, for what takes several records of
// the server's, where the server may die between two of them and the client go on.

// appendLimit is up to where an append may go to the home of a file that may get
// chunks, 0 for no limit.
func (c *Client) appendLimit(n *node) uint64 {
	if !c.o.Chunked {
		return 0
	}
	if n != nil {
		if l, ok, _ := n.kept.get(c, n.ino); ok && l.bound == 0 && l.size > sealfs.HomeBytes {
			return 0 // it is whole, and stays so
		}
	}
	return sealfs.HomeBytes
}

// appendNow sends data to the end of the file.
func (c *Client) appendNow(ctx context.Context, n *node, ino sealfs.Ino, data []byte, flags op.Flags) (int, error) {
	most := sealfs.IOMax
	done := 0
	limit := c.appendLimit(n)
	far := n != nil && n.far.Load()
	if c.o.Chunked && c.remote {
		most = bufferMax // one record of the server's, so that a retry finds all of it or nothing
		// What others append must not come between the records of a larger one: it gets its place first.
		far = far || len(data) > most
	}
	for done < len(data) {
		var part int
		var err error
		if far {
			part = min(len(data)-done, sealfs.IOMax)
			var whole bool
			whole, err = c.appendFar(ctx, n, ino, data[done:done+part], flags)
			if whole {
				far, limit = false, 0
				continue
			}
		} else {
			part = min(len(data)-done, most)
			k := c.begin(op.Write, ino)
			k.Ino, k.Flags, k.Len, k.Data = ino, flags, limit, data[done:done+part]
			err = c.none(ctx, k)
			if err == sealfs.ErrTooBig && !far {
				// A file without chunks that cannot be longer is found out below.
				if far = limit != 0 || c.hasChunks(ctx, n, ino); far {
					continue
				}
			}
		}
		if err != nil {
			return done, err
		}
		done += part
	}
	return done, nil
}

// hasChunks reports whether the file is known to have chunks.
func (c *Client) hasChunks(ctx context.Context, n *node, ino sealfs.Ino) bool {
	if n != nil {
		n.kept.forget()
	}
	l, err := c.layoutOf(ctx, n, ino)
	return err == nil && l.bound != 0
}

// appendFar appends data, at most sealfs.IOMax, to a file that has chunks or shall
// get some. whole says that it has none and gets none; nothing has happened then.
func (c *Client) appendFar(ctx context.Context, n *node, ino sealfs.Ino, data []byte, flags op.Flags) (whole bool, err error) {
	var r redo
	for {
		l, err := c.layoutOf(ctx, n, ino)
		if err == nil && l.bound == 0 {
			l, err = c.reserve(ctx, n, ino, l, max(l.size, sealfs.HomeBytes)+uint64(len(data)))
			if err == nil && l.bound == 0 {
				if n != nil {
					n.far.Store(false)
				}
				return true, nil
			}
		}
		if err == nil {
			err = c.appendAt(ctx, n, ino, l, data, flags)
		}
		if err == nil {
			return false, nil
		}
		if err = r.again(ctx, c, n, err); err != nil {
			return false, err
		}
	}
}

// appendAt gets a place from home and writes there. It returns sealfs.ErrStale if
// nothing has happened because the generation is another one.
func (c *Client) appendAt(ctx context.Context, n *node, ino sealfs.Ino, l layout, data []byte, flags op.Flags) error {
	k := c.begin(op.Extend, ino)
	k.Ino, k.Gen, k.Len, k.Flags, k.layout = ino, l.gen, uint64(len(data)), op.Append|flags&op.KillPriv, true
	err := c.do(ctx, k)
	a, off := k.answer(), k.rep.Off
	k.end()
	if err != nil {
		return err
	}
	if n != nil && a.Gen == l.gen {
		n.kept.grown(layoutOf(&a.Attr), a.ino)
		n.far.Store(a.Size > sealfs.HomeBytes)
	}
	// The place is ours until the file is truncated, which home knows.
	var r redo
	for {
		err = c.writePieces(ctx, ino, l, off, data)
		c.disturbed(ctx, n, ino, l)
		if !errors.Is(err, sealfs.ErrStale) {
			return err
		}
		if err = r.again(ctx, c, n, err); err != nil {
			return err
		}
		now, err := c.layoutOf(ctx, n, ino)
		if err != nil {
			return err
		}
		if now.gen != l.gen {
			return nil
		}
	}
}
