package op

import (
	"encoding/binary"
	"fmt"

	"sealfs"
	"sealfs/internal/enc"
)

// Opens says how often a session holds a file open.
type Opens struct {
	Ino   sealfs.Ino
	Count uint64
}

// OpensDelayed in the Count of a Register says that the session has writes to the file that it
// answered and has not sent: nobody may be told of the file before they are taken from it.
const OpensDelayed = 1 << 62

// OpensMax is how many Opens fit the Data of one Register.
const OpensMax = sealfs.XattrValueMax / 18

// AppendOpens appends the encoding of o, for the Data of a Register, to b.
func AppendOpens(b []byte, o Opens) []byte {
	b = binary.AppendUvarint(b, uint64(o.Ino))
	return binary.AppendUvarint(b, o.Count)
}

// DecodeOpens calls fn for what AppendOpens wrote. It returns ErrInvalid for
// other bytes.
func DecodeOpens(b []byte, fn func(Opens)) error {
	in := enc.Reader{B: b}
	for len(in.B) > 0 {
		o := Opens{sealfs.Ino(in.Uvarint()), in.Uvarint()}
		if in.Err || o.Ino == 0 || o.Ino > sealfs.InoMax || o.Count == 0 {
			return fmt.Errorf("list of open files is malformed: %w", sealfs.ErrInvalid)
		}
		fn(o)
	}
	return nil
}
