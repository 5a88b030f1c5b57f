package op

import (
	"encoding/binary"
	"fmt"

	"sealfs"
	"sealfs/internal/enc"
)

// Owner is who holds or wants locks: one of a session's owners.
type Owner struct {
	Session sealfs.Session
	Owner   uint64
}

// OwnersMax is how many owners fit the Data of one WaitFor.
const OwnersMax = sealfs.XattrValueMax / 20

// AppendOwner appends the encoding of o, for the Data of a WaitFor, to b.
func AppendOwner(b []byte, o Owner) []byte {
	b = binary.AppendUvarint(b, uint64(o.Session))
	return binary.AppendUvarint(b, o.Owner)
}

// DecodeOwners calls fn for what AppendOwner wrote. It returns ErrInvalid for other bytes.
func DecodeOwners(b []byte, fn func(Owner)) error {
	in := enc.Reader{B: b}
	for len(in.B) > 0 {
		o := Owner{sealfs.Session(in.Uvarint()), in.Uvarint()}
		if in.Err {
			return fmt.Errorf("list of lock owners is malformed: %w", sealfs.ErrInvalid)
		}
		fn(o)
	}
	return nil
}

// Wait is an edge of the graph of waits: Who waits on Ino for For.
type Wait struct {
	Who, For Owner
	Ino      sealfs.Ino
	ID       uint64 // of the wait, not 0
}

// AppendWait appends the encoding of w to b.
func AppendWait(b []byte, w Wait) []byte {
	b = AppendOwner(AppendOwner(b, w.Who), w.For)
	b = binary.AppendUvarint(b, uint64(w.Ino))
	return enc.AppendU64(b, w.ID)
}

// DecodeWaits calls fn for what AppendWait wrote. It returns ErrInvalid for other bytes.
func DecodeWaits(b []byte, fn func(Wait)) error {
	in := enc.Reader{B: b}
	for len(in.B) > 0 {
		var w Wait
		w.Who = Owner{sealfs.Session(in.Uvarint()), in.Uvarint()}
		w.For = Owner{sealfs.Session(in.Uvarint()), in.Uvarint()}
		w.Ino, w.ID = sealfs.Ino(in.Uvarint()), in.U64()
		if in.Err || w.Ino == 0 || w.Ino > sealfs.InoMax || w.ID == 0 {
			return fmt.Errorf("list of waits is malformed: %w", sealfs.ErrInvalid)
		}
		fn(w)
	}
	return nil
}
