package meta

import (
	"encoding/binary"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/op"
	"sealfs/pmem"
)

// SessionRowsMax bounds the result rows of a session in one shard: so many
// changes may be under way there at once.
const SessionRowsMax = 256

// SessionState is what a shard knows of a session: 12 bytes, little-endian, in
// the order of the fields.
type SessionState struct {
	Low  uint64 // answers to all below have arrived: their rows are gone
	Rows uint32
}

const sessionRecordLen = 12

// Append appends the record of s to b.
func (s *SessionState) Append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, s.Low)
	return binary.LittleEndian.AppendUint32(b, s.Rows)
}

// DecodeSession reads what Append wrote, or returns a *sealfs.Corruption.
func DecodeSession(b []byte) (SessionState, error) {
	if len(b) != sessionRecordLen {
		return SessionState{}, damaged("session record %x", b)
	}
	s := SessionState{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint32(b[8:])}
	if s.Rows > SessionRowsMax {
		return SessionState{}, damaged("session record %x", b)
	}
	return s, nil
}

// ResultRow is what is kept of the answer to a change, so that a retry gets it
// again: flags (bit 0: Eof), then ino, off and held as varints. A refused change
// has changed nothing and leaves none: its retry is decided anew.
type ResultRow struct {
	Ino  sealfs.Ino // of the reply's attributes, which are read afresh
	Off  uint64
	Held sealfs.Ino
	Eof  bool
}

const resultRowMax = 1 + 8 + 10 + 8

// Append appends the record of w to b.
func (w *ResultRow) Append(b []byte) []byte {
	var flags byte
	if w.Eof {
		flags = 1
	}
	b = append(b, flags)
	b = binary.AppendUvarint(b, uint64(w.Ino))
	b = binary.AppendUvarint(b, w.Off)
	return binary.AppendUvarint(b, uint64(w.Held))
}

// DecodeResult reads what Append wrote, or returns a *sealfs.Corruption.
func DecodeResult(b []byte) (ResultRow, error) {
	in := enc.Reader{B: b}
	flags := in.U8()
	w := ResultRow{Ino: sealfs.Ino(in.Uvarint()), Off: in.Uvarint(), Held: sealfs.Ino(in.Uvarint()), Eof: flags&1 != 0}
	if !in.Done() || flags > 1 || w.Ino > sealfs.InoMax || w.Held > sealfs.InoMax {
		return ResultRow{}, damaged("result row %x", b)
	}
	return w, nil
}

// numbered reports whether the request may come twice.
func (ch *change) numbered() bool { return ch.req.Session != 0 && ch.req.Seq != 0 }

// answered answers a retry from its result row and reports whether it could.
func (ch *change) answered() (bool, error) {
	if !ch.numbered() {
		return false, nil
	}
	req, rep := ch.req, ch.rep
	k := SessionKey(req.Shard, req.Session, req.Seq)
	b, err := pmem.Get(ch.tx, k[:])
	if err == sealfs.ErrNotExist {
		return false, ch.refuseStale()
	}
	if err != nil {
		return false, err
	}
	w, err := DecodeResult(b)
	if err != nil {
		return false, err
	}
	rep.Off, rep.Held, rep.Eof = w.Off, w.Held, w.Eof
	if w.Ino == 0 {
		return true, nil
	}
	var in Inode
	if err := GetInode(ch.tx, ch.c, w.Ino, &in); err == nil {
		in.Attr(&rep.Attr)
	} else if err == sealfs.ErrNotExist {
		// It was removed since; its number is all there is to say.
		rep.Attr = op.Attr{Ino: w.Ino}
	} else {
		return false, err
	}
	return true, nil
}

// session reads what the shard knows of the request's session.
func (ch *change) session() (s SessionState, err error) {
	k := SessionKey(ch.req.Shard, ch.req.Session, 0)
	b, err := pmem.Get(ch.tx, k[:])
	if err == sealfs.ErrNotExist {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	return DecodeSession(b)
}

// refuseStale refuses a change whose answer the session has given up: whether it
// has happened cannot be said any more.
func (ch *change) refuseStale() error {
	s, err := ch.session()
	switch {
	case err != nil:
		return err
	case ch.req.Low > ch.req.Seq:
		return refusal(sealfs.ErrInvalid)
	case ch.req.Seq < s.Low:
		return refusal(sealfs.ErrStale)
	}
	return nil
}

// remember writes the result row of the change and drops those below req.Low.
func (ch *change) remember() error {
	if !ch.numbered() {
		return nil
	}
	req, rep := ch.req, ch.rep
	s, err := ch.session()
	if err != nil {
		return err
	}
	if req.Low > s.Low {
		if s.Rows, err = ch.prune(s.Rows); err != nil {
			return err
		}
		s.Low = req.Low
	}
	if s.Rows >= SessionRowsMax {
		return refusal(sealfs.ErrBusy)
	}
	s.Rows++
	k := SessionKey(req.Shard, req.Session, 0)
	var head [sessionRecordLen]byte
	if err := ch.tx.Set(k[:], s.Append(head[:0])); err != nil {
		return err
	}
	w := ResultRow{Ino: rep.Attr.Ino, Off: rep.Off, Held: rep.Held, Eof: rep.Eof}
	var row [resultRowMax]byte
	k = SessionKey(req.Shard, req.Session, req.Seq)
	return ch.tx.Set(k[:], w.Append(row[:0]))
}

// prune deletes the session's rows below req.Low and returns how many of rows are left.
func (ch *change) prune(rows uint32) (uint32, error) {
	k := SessionKey(ch.req.Shard, ch.req.Session, 1)
	for {
		var cur pmem.Cursor
		if !cur.Seek(ch.tx, k[:]) || !inRange(&cur, k[:11]) {
			return rows, cur.Err()
		}
		key, err := DecodeKey(cur.Key())
		if err != nil {
			return rows, err
		}
		if key.Pos >= ch.req.Low {
			return rows, nil
		}
		if rows == 0 {
			return rows, damaged("session %d has more result rows than it counts", key.Session)
		}
		rows--
		old := SessionKey(ch.req.Shard, ch.req.Session, key.Pos)
		if err := ch.tx.Delete(old[:]); err != nil {
			return rows, err
		}
	}
}
