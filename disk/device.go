package disk

import (
	"fmt"
	"sync/atomic"

	"sealfs"
)

// Device is a raw block device or image file, or the simulation of one. All
// methods may be called concurrently; writes that overlap while both are under
// way leave either's bytes in each sector. No method keeps a buffer after it has
// returned. Every method but Name, Size, SectorSize and Stats may block on the
// medium.
//
// Errors wrap a sealfs.Code and name the device and the place: ErrInvalid for an
// argument out of range (nothing was done), ErrReadOnly, ErrClosed, ErrNoSpace
// where a sparse image finds its file system full, ErrIO for the rest.
type Device interface {
	// ReadAt reads len(p) bytes at off as io.ReaderAt does: a read that reaches
	// the end of the device returns what there is and io.EOF. Offset, length and
	// memory need no alignment; what is aligned is read without a copy. A failed
	// read does not latch the device.
	ReadAt(p []byte, off int64) (int, error)

	// WriteAt writes p at off; both off and len(p) must be multiples of
	// SectorSize and the range must lie within the device. Memory from
	// AlignedBuffer is written without a copy. The bytes are durable after the
	// next Flush, not before. A failure may leave any sectors of the range
	// written, and latches the device.
	WriteAt(p []byte, off int64) (int, error)

	// Flush returns when everything written before the call survives a power
	// cut. After the first failed Flush or WriteAt the device is latched: all
	// later calls of WriteAt, Flush and Discard fail with an error that wraps the
	// first one, until the device is opened again.
	Flush() error

	// Discard tells the device that the n bytes at off, multiples of SectorSize,
	// are of no use any more. It is a hint: afterwards they read as zeros, as
	// what was there, or as anything else, and a power cut before the next Flush
	// may bring them back. An error that wraps ErrNotSupported means that nothing
	// was done; no failure of Discard latches the device.
	Discard(off, n int64) error

	// Size is the length in bytes, a multiple of SectorSize, constant while open.
	Size() int64

	// SectorSize is the unit of alignment of writes, and what a power cut leaves
	// whole: 512 or 4096 bytes.
	SectorSize() int

	// Name is the path, for messages.
	Name() string

	// Stats returns what has been done since the device was opened.
	Stats() Stats

	// Close releases the device and its lock; it does not flush. It waits for
	// calls under way; later ones fail with ErrClosed.
	Close() error
}

// Stats counts the operations that succeeded since the device was opened.
// Flushes counts those of the device: concurrent calls may share one.
type Stats struct {
	Reads, ReadBytes   uint64
	Writes, WriteBytes uint64
	Flushes            uint64
	Discards           uint64
}

// counters are Stats while they are being counted.
type counters struct {
	reads, readBytes   atomic.Uint64
	writes, writeBytes atomic.Uint64
	flushes, discards  atomic.Uint64
}

func (c *counters) read(n int) {
	c.reads.Add(1)
	c.readBytes.Add(uint64(n))
}

func (c *counters) write(n int) {
	c.writes.Add(1)
	c.writeBytes.Add(uint64(n))
}

func (c *counters) stats() Stats {
	return Stats{
		Reads: c.reads.Load(), ReadBytes: c.readBytes.Load(),
		Writes: c.writes.Load(), WriteBytes: c.writeBytes.Load(),
		Flushes:  c.flushes.Load(),
		Discards: c.discards.Load(),
	}
}

// latch holds the first failure of a device's writes and flushes.
type latch struct{ first atomic.Pointer[error] }

// check returns nil, or the error with which a latched device refuses changes.
func (l *latch) check() error {
	if err := l.first.Load(); err != nil {
		return *err
	}
	return nil
}

// trip latches the device of that name with err, which it returns unchanged.
func (l *latch) trip(name string, err error) error {
	refusal := fmt.Errorf("%s takes no more changes after a failure: %w", name, err)
	l.first.CompareAndSwap(nil, &refusal)
	return err
}

// aligned refuses a range that is not whole sectors within the device.
func aligned(d Device, what string, off, n int64) error {
	sector := int64(d.SectorSize())
	switch {
	case off < 0 || n < 0 || off > d.Size()-n:
		return fmt.Errorf("%s %s: bytes [%d, +%d) lie outside its %d: %w",
			what, d.Name(), off, n, d.Size(), sealfs.ErrInvalid)
	case off%sector != 0 || n%sector != 0:
		return fmt.Errorf("%s %s: bytes [%d, +%d) are not whole sectors of %d: %w",
			what, d.Name(), off, n, sector, sealfs.ErrInvalid)
	}
	return nil
}
