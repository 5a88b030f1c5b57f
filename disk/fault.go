package disk

import (
	"fmt"
	"sync"

	"sealfs"
)

// FaultKind is a way in which a disk fails while the power stays on.
type FaultKind int

// The kinds of faults. Those that return an error from a write or flush latch
// the device; the silent ones are for the checksums above to find.
const (
	// ReadError fails a read with ErrIO.
	ReadError FaultKind = iota
	// WriteError fails a write with ErrIO; nothing was written.
	WriteError
	// FlushError fails a flush with ErrIO; what was pending stays pending, so a
	// power cut can still keep or lose each sector of it.
	FlushError
	// TornWrite fails a write with ErrIO after the first half of its sectors.
	TornWrite
	// Misdirect reports success, but the bytes land Fault.Shift away from their
	// place, which keeps its old ones.
	Misdirect
	// BitFlip reports success, but stores the bytes with one bit inverted.
	BitFlip
	// LostWrite reports success and stores nothing.
	LostWrite
	// NoSpace fails a write with ErrNoSpace; nothing was written.
	NoSpace

	numFaultKinds
)

var faultText = [numFaultKinds]string{
	ReadError: "read error", WriteError: "write error", FlushError: "flush error",
	TornWrite: "torn write", Misdirect: "misdirected write", BitFlip: "bit flip",
	LostWrite: "lost write", NoSpace: "no space",
}

func (k FaultKind) String() string {
	if k >= 0 && k < numFaultKinds {
		return faultText[k]
	}
	return fmt.Sprintf("fault kind %d", int(k))
}

// op is the operation that faults of kind k strike.
func (k FaultKind) op() OpKind {
	switch k {
	case ReadError:
		return opRead
	case FlushError:
		return OpFlush
	}
	return OpWrite
}

// Fault is a predicate over the operations of a Sim and what happens to those it
// selects.
type Fault struct {
	Kind FaultKind
	// Match selects by range (zeros for a flush) and by nth, which counts the
	// reads, writes or flushes since this fault was set, from 0. nil selects all.
	// It must not call the device.
	Match func(off int64, n int, nth int) bool
	// Once retires the fault after its first hit.
	Once bool
	// Shift is how far from its place a Misdirect lands, in bytes: a multiple of
	// the sector size, 0 for the length of the write. A place outside the device
	// is taken modulo its size.
	Shift int64
	// Bit is the bit of the write that a BitFlip inverts, counted from the lowest
	// of the first byte, modulo its length.
	Bit int64
}

// faults is the list of a Sim's faults in the order in which they were set.
type faults struct {
	mu   sync.Mutex
	list []*armed
}

type armed struct {
	Fault
	seen int // operations of its kind so far
	done bool
}

func (fs *faults) add(f Fault) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.list = append(fs.list, &armed{Fault: f})
}

func (fs *faults) clear() {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.list = nil
}

// strike returns the first fault that selects this operation. Every fault of
// its kind counts the operation, also when another one strikes.
func (fs *faults) strike(op OpKind, off int64, n int) (Fault, bool) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	var hit *armed
	for _, f := range fs.list {
		if f.done || f.Kind.op() != op {
			continue
		}
		nth := f.seen
		f.seen++
		if hit == nil && (f.Match == nil || f.Match(off, n, nth)) {
			hit = f
		}
	}
	if hit == nil {
		return Fault{}, false
	}
	hit.done = hit.Once
	return hit.Fault, true
}

// fail returns the error of a fault that does not stay silent.
func (f Fault) fail(name string, off int64) error {
	code := sealfs.ErrIO
	if f.Kind == NoSpace {
		code = sealfs.ErrNoSpace
	}
	return fmt.Errorf("simulated %v on %s at %d: %w", f.Kind, name, off, code)
}

// stall holds operations up while a Sim is stalled.
type stall struct {
	mu      sync.Mutex
	gate    chan struct{} // closed when the stall ends; nil: there is none
	reads   bool          // reads wait too
	waiting int
}

// pass returns when an operation of that kind may go on.
func (s *stall) pass(op OpKind) {
	s.mu.Lock()
	gate := s.gate
	if gate == nil || op == opRead && !s.reads {
		s.mu.Unlock()
		return
	}
	s.waiting++
	s.mu.Unlock()
	<-gate
	s.mu.Lock()
	s.waiting--
	s.mu.Unlock()
}

// Stall makes the device answer no write and no flush, and with reads no read
// either, until the function that it returns is called.
func (d *Sim) Stall(reads bool) (resume func()) {
	gate := make(chan struct{})
	d.stall.mu.Lock()
	defer d.stall.mu.Unlock()
	d.stall.gate, d.stall.reads = gate, reads
	return sync.OnceFunc(func() {
		d.stall.mu.Lock()
		defer d.stall.mu.Unlock()
		d.stall.gate = nil
		close(gate)
	})
}

// Waiting returns how many operations wait for the end of a stall.
func (d *Sim) Waiting() int {
	d.stall.mu.Lock()
	defer d.stall.mu.Unlock()
	return d.stall.waiting
}
