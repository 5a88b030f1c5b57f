package sealfs

import "fmt"

// Code classifies a failure for callers that must act on it. A Code is itself
// an error, so errors.Is(err, ErrNotExist) works through any wrapping. Values
// travel on the wire and stand in result rows: append only, never reorder.
type Code uint16

// The codes. 0 is reserved: success is a nil error.
const (
	_                  Code = iota
	ErrNotExist             // 1: no such name or inode
	ErrExist                // 2: the name is taken
	ErrNotDir               // 3: a directory was needed
	ErrIsDir                // 4: a directory is in the way
	ErrNotEmpty             // 5: the directory has entries
	ErrPerm                 // 6: not permitted whoever asks
	ErrAccess               // 7: permission denied
	ErrInvalid              // 8: an argument is out of its range
	ErrNameTooLong          // 9
	ErrNoSpace              // 10: the store or volume is full
	ErrQuota                // 11: the volume's quota is used up
	ErrTooManyLinks         // 12
	ErrTooBig               // 13: larger than a file may be
	ErrRange                // 14: the result does not fit the caller's buffer
	ErrArgTooBig            // 15: an attribute or list is larger than allowed
	ErrNoData               // 16: no such attribute
	ErrAgain                // 17: a lock is held by somebody else
	ErrDeadlock             // 18
	ErrNoLocks              // 19: the lock table is full
	ErrCrossDevice          // 20: the parties lie in different volumes
	ErrNotSupported         // 21
	ErrNoSys                // 22: the operation is not known
	ErrBusy                 // 23
	ErrReadOnly             // 24: the store or mount accepts no changes
	ErrIO                   // 25: the medium or the way to it failed
	ErrCorrupt              // 26: a checksum or a structural rule failed
	ErrStale                // 27: epoch or generation is older than the holder's
	ErrInterrupted          // 28: the caller gave up waiting
	ErrTimeout              // 29
	ErrUnavailable          // 30: the server or manager does not answer
	ErrClosed               // 31: the object was closed
	ErrWouldLoop            // 32: a directory would become its own ancestor
	ErrNoDevice             // 33: seek beyond the last data or hole
	ErrTooManySymlinks      // 34
	ErrVersion              // 35: a format or protocol is newer than this program
	ErrSession              // 36: the session has ended; what it held is lost
	numCodes
)

var codeText = [numCodes]string{
	ErrNotExist:        "no such file or directory",
	ErrExist:           "file exists",
	ErrNotDir:          "not a directory",
	ErrIsDir:           "is a directory",
	ErrNotEmpty:        "directory not empty",
	ErrPerm:            "operation not permitted",
	ErrAccess:          "permission denied",
	ErrInvalid:         "invalid argument",
	ErrNameTooLong:     "name too long",
	ErrNoSpace:         "no space left",
	ErrQuota:           "quota exceeded",
	ErrTooManyLinks:    "too many links",
	ErrTooBig:          "file too large",
	ErrRange:           "result does not fit",
	ErrArgTooBig:       "argument too large",
	ErrNoData:          "no such attribute",
	ErrAgain:           "lock held by another owner",
	ErrDeadlock:        "deadlock avoided",
	ErrNoLocks:         "lock table full",
	ErrCrossDevice:     "objects lie in different volumes",
	ErrNotSupported:    "operation not supported",
	ErrNoSys:           "operation not known",
	ErrBusy:            "busy",
	ErrReadOnly:        "read-only",
	ErrIO:              "input/output error",
	ErrCorrupt:         "data is damaged",
	ErrStale:           "stale epoch or handle",
	ErrInterrupted:     "interrupted",
	ErrTimeout:         "timed out",
	ErrUnavailable:     "server unavailable",
	ErrClosed:          "closed",
	ErrWouldLoop:       "directory would contain itself",
	ErrNoDevice:        "offset beyond the last data",
	ErrTooManySymlinks: "too many levels of symbolic links",
	ErrVersion:         "format or protocol not known to this version",
	ErrSession:         "session has ended",
}

// Error returns the sentence for c.
func (c Code) Error() string {
	if c < numCodes && codeText[c] != "" {
		return codeText[c]
	}
	return fmt.Sprintf("error code %d", uint16(c))
}

// Known reports whether this version of the program defines c.
func (c Code) Known() bool { return c > 0 && c < numCodes }

// Codes returns all defined codes in order, for tables that must cover them.
func Codes() []Code {
	cs := make([]Code, 0, numCodes-1)
	for c := Code(1); c < numCodes; c++ {
		cs = append(cs, c)
	}
	return cs
}

// Corruption reports bytes that fail verification. It unwraps to ErrCorrupt.
type Corruption struct {
	Where     string // device or region file
	Off       int64  // byte offset of the bad structure, -1 if unknown
	What      string // rule that failed, e.g. "segment header checksum"
	Want, Got uint64 // the two sides of the comparison, where there are any
}

func (e *Corruption) Error() string {
	s := fmt.Sprintf("%s is damaged: %s", e.Where, e.What)
	if e.Off >= 0 {
		s = fmt.Sprintf("%s is damaged at byte %d: %s", e.Where, e.Off, e.What)
	}
	if e.Want != e.Got {
		s += fmt.Sprintf(" (want %#x, got %#x)", e.Want, e.Got)
	}
	return s
}

// Unwrap makes errors.Is(err, ErrCorrupt) true.
func (e *Corruption) Unwrap() error { return ErrCorrupt }
