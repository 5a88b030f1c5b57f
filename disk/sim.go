package disk

import (
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"slices"
	"sync"

	"sealfs"
)

// simSector is the sector of a Sim: the unit that a power cut keeps or loses.
const simSector = 512

// exhaustiveSectors is how many pending sectors CrashStates still enumerates
// completely.
const exhaustiveSectors = 12

// OpKind is the kind of an operation that a Sim reports to its hook.
type OpKind int

// The kinds that a hook sees.
const (
	OpWrite OpKind = iota
	OpFlush
	OpDiscard

	opRead // for faults only
)

func (k OpKind) String() string {
	switch k {
	case OpWrite:
		return "write"
	case OpFlush:
		return "flush"
	case OpDiscard:
		return "discard"
	case opRead:
		return "read"
	}
	return fmt.Sprintf("op kind %d", int(k))
}

// Op is one operation that reached a Sim.
type Op struct {
	Kind     OpKind
	Off, Len int64 // range in bytes, zeros for a flush
	N        int   // counts the device's writes, flushes and discards, from 0
	Err      error // what the operation returned
}

func (o Op) String() string {
	if o.Kind == OpFlush {
		return fmt.Sprintf("op %d: flush", o.N)
	}
	return fmt.Sprintf("op %d: %v of [%d, +%d)", o.N, o.Kind, o.Off, o.Len)
}

// Sim is a Device in memory that knows what a power cut can leave of it. It is
// sparse and starts as zeros. Writes between two flushes are kept one by one,
// so memory grows until the next Flush. A Discard reads as zeros at once, and
// like a write is pending until the next Flush.
type Sim struct {
	name   string
	size   int64
	faults faults
	stall  stall
	latch  latch
	counters

	mu      sync.RWMutex
	now     pages    // what a read sees
	durable pages    // what the last flush left
	pending []change // since then, oldest first; entries are immutable
	ops     int
	hook    func(Op)
	closed  bool
}

var _ Device = (*Sim)(nil)

// change is one unflushed write, or, with nil data, discard.
type change struct {
	off, n int64
	data   []byte
}

// NewSim returns a simulated device of size bytes, all zeros, with sectors of
// 512 bytes. It panics unless size is a positive multiple of them.
func NewSim(name string, size int64) *Sim {
	if size <= 0 || size%simSector != 0 {
		panic(fmt.Sprintf("disk: simulated size %d is not whole sectors", size))
	}
	return newSim(name, size, newPages(size))
}

// newSim returns a device whose durable bytes are p's; p itself stays as it is.
func newSim(name string, size int64, p pages) *Sim {
	return &Sim{name: name, size: size, now: p.fork(), durable: p.fork()}
}

// Name returns the name given to NewSim.
func (d *Sim) Name() string { return d.name }

// Size returns the size in bytes.
func (d *Sim) Size() int64 { return d.size }

// SectorSize returns 512.
func (d *Sim) SectorSize() int { return simSector }

// Stats implements Device.
func (d *Sim) Stats() Stats { return d.stats() }

// SetHook makes fn be called after every WriteAt, Flush and Discard that reached
// the device, whether it succeeded or not, on the caller's goroutine and with no
// lock held: it may clone the device or enumerate its crashes. nil removes it.
func (d *Sim) SetHook(fn func(Op)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hook = fn
}

// Fail adds a fault. When several select the same operation, the one set first
// strikes.
func (d *Sim) Fail(f Fault) { d.faults.add(f) }

// ClearFaults removes all faults.
func (d *Sim) ClearFaults() { d.faults.clear() }

// ReadAt implements Device.
func (d *Sim) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read %s at %d: %w", d.name, off, sealfs.ErrInvalid)
	}
	d.stall.pass(opRead)
	if f, hit := d.faults.strike(opRead, off, len(p)); hit {
		return 0, f.fail(d.name, off)
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.closed {
		return 0, fmt.Errorf("read %s at %d: %w", d.name, off, sealfs.ErrClosed)
	}
	if len(p) == 0 {
		return 0, nil
	}
	if off >= d.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), d.size-off))
	d.now.read(p[:n], off)
	d.read(n)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt implements Device.
func (d *Sim) WriteAt(p []byte, off int64) (n int, err error) {
	if err := aligned(d, "write", off, int64(len(p))); err != nil {
		return 0, err
	}
	d.stall.pass(OpWrite)
	report, err := d.begin("write")
	if err != nil {
		return 0, err
	}
	defer func() { report(Op{Kind: OpWrite, Off: off, Len: int64(len(p)), Err: err}) }()
	if f, hit := d.faults.strike(OpWrite, off, len(p)); hit {
		return d.faultyWrite(f, p, off)
	}
	d.store(slices.Clone(p), off)
	d.write(len(p))
	return len(p), nil
}

// faultyWrite does to a write what f says. REQUIRES: d.mu.
func (d *Sim) faultyWrite(f Fault, p []byte, off int64) (int, error) {
	n := 0
	switch f.Kind {
	case TornWrite:
		n = len(p) / 2 / simSector * simSector
		d.store(slices.Clone(p[:n]), off)
		fallthrough
	case WriteError, NoSpace:
		return n, d.latch.trip(d.name, f.fail(d.name, off))
	case Misdirect:
		shift := f.Shift
		if shift == 0 {
			shift = int64(len(p))
		}
		room := d.size - int64(len(p)) + simSector // places where p fits
		place := ((off+shift/simSector*simSector)%room + room) % room
		d.store(slices.Clone(p), place)
	case BitFlip:
		q := slices.Clone(p)
		if len(q) > 0 {
			bits := int64(len(q)) * 8
			bit := (f.Bit%bits + bits) % bits
			q[bit/8] ^= 1 << (bit % 8)
		}
		d.store(q, off)
	case LostWrite:
	}
	d.write(len(p))
	return len(p), nil
}

// store makes data, which it keeps, the newest bytes at off. REQUIRES: d.mu.
func (d *Sim) store(data []byte, off int64) {
	if len(data) == 0 {
		return
	}
	d.now.write(data, off)
	d.pending = append(d.pending, change{off: off, n: int64(len(data)), data: data})
}

// Flush implements Device.
func (d *Sim) Flush() (err error) {
	d.stall.pass(OpFlush)
	report, err := d.begin("flush")
	if err != nil {
		return err
	}
	defer func() { report(Op{Kind: OpFlush, Err: err}) }()
	if f, hit := d.faults.strike(OpFlush, 0, 0); hit {
		return d.latch.trip(d.name, f.fail(d.name, 0))
	}
	d.durable = d.now.share()
	d.pending = nil
	d.flushes.Add(1)
	return nil
}

// Discard implements Device. The range reads as zeros at once.
func (d *Sim) Discard(off, n int64) (err error) {
	if err := aligned(d, "discard", off, n); err != nil {
		return err
	}
	report, err := d.begin("discard")
	if err != nil {
		return err
	}
	defer func() { report(Op{Kind: OpDiscard, Off: off, Len: n}) }()
	if n > 0 {
		d.now.zero(off, n)
		d.pending = append(d.pending, change{off: off, n: n})
	}
	d.discards.Add(1)
	return nil
}

// begin locks d for a change, unless it is closed or latched. The function it
// returns unlocks and tells the hook.
func (d *Sim) begin(what string) (report func(Op), err error) {
	d.mu.Lock()
	if d.closed {
		err = fmt.Errorf("%s %s: %w", what, d.name, sealfs.ErrClosed)
	} else {
		err = d.latch.check()
	}
	if err != nil {
		d.mu.Unlock()
		return nil, err
	}
	return func(op Op) {
		hook := d.hook
		op.N = d.ops
		d.ops++
		d.mu.Unlock()
		if hook != nil {
			hook(op)
		}
	}, nil
}

// Close implements Device. The contents stay, for Clone, Reopen and Crashes.
func (d *Sim) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return fmt.Errorf("close %s: %w", d.name, sealfs.ErrClosed)
	}
	d.closed = true
	return nil
}

// Clone returns a device of its own with the same bytes, durable and pending,
// and the same latch, but without hook, faults and counts.
func (d *Sim) Clone() *Sim {
	c := d.Reopen()
	c.latch.first.Store(d.latch.first.Load())
	return c
}

// Reopen returns what a process finds that opens the device anew without a
// power cut: the same bytes, durable and pending, no latch, no faults. d itself
// goes on apart from it. After a FlushError, what a kernel has dropped is one of
// d's CrashStates.
func (d *Sim) Reopen() *Sim {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := &Sim{name: d.name, size: d.size, now: d.now.share(), durable: d.durable.share()}
	// Both sides append to the pending changes: the capacity ends here.
	d.pending = slices.Clip(d.pending)
	c.pending = d.pending
	return c
}

// CrashClone returns the device after a power cut that kept the newest version
// of the pending sectors that keep selects (by number, of 512 bytes), and of the
// others the durable bytes. A nil keep keeps none.
func (d *Sim) CrashClone(keep func(sector int64) bool) *Sim {
	c := d.cut()
	t := c.durable.fork()
	if keep != nil {
		for _, s := range c.sectors {
			if keep(s.sector) {
				s.put(&t, len(s.versions))
			}
		}
	}
	return newSim(d.name, d.size, t)
}

// PendingSectors returns how many sectors have been written or discarded since
// the last flush.
func (d *Sim) PendingSectors() int { return len(d.cut().sectors) }

// Crashes yields every device state a power cut at this instant can leave: each
// unflushed sector independently keeps its durable bytes or any one of its
// unflushed versions. Their number is the product of (1 + versions) over the
// pending sectors: sensible for few. Several may hold equal bytes. The first
// state has lost everything pending.
func (d *Sim) Crashes() iter.Seq[*Sim] {
	c := d.cut()
	return func(yield func(*Sim) bool) { c.all(yield) }
}

// CrashStates yields at most limit of the states that Crashes would: all of them
// while no more than 12 sectors are pending and limit allows. Beyond, it yields
// the state that lost everything and the one that kept everything; then those in
// which one sector is missing, one sector alone was written, or a prefix of the
// sectors in the order in which they were written; if these are more than three
// quarters of limit, a random choice of them; and in the remaining places
// random states. Draws from rng happen during the iteration.
func (d *Sim) CrashStates(rng *rand.Rand, limit int) iter.Seq[*Sim] {
	c := d.cut()
	return func(yield func(*Sim) bool) {
		if c.count(limit) <= limit && len(c.sectors) <= exhaustiveSectors {
			c.all(yield)
			return
		}
		c.sample(rng, limit, yield)
	}
}

// FlipBit inverts a bit (0 to 7) of the byte at off in the durable bytes and in
// every pending version of them. Like all damage it is beyond the device's
// control: no alignment, no latch, no hook, no count. It panics outside the
// device.
func (d *Sim) FlipBit(off int64, bit uint) {
	d.damage(off, 1, func(b []byte, _ int64) { b[0] ^= 1 << (bit % 8) })
}

// Zero clears n bytes at off, with the properties of FlipBit.
func (d *Sim) Zero(off, n int64) {
	d.damage(off, n, func(b []byte, _ int64) { clear(b) })
}

// Overwrite replaces the bytes at off by p, with the properties of FlipBit. p is
// copied.
func (d *Sim) Overwrite(off int64, p []byte) {
	d.damage(off, int64(len(p)), func(b []byte, at int64) { copy(b, p[at:]) })
}

// damage applies fn to the bytes [off, off+n) of every view of the device. fn
// gets a piece of them and where in the range it begins.
func (d *Sim) damage(off, n int64, fn func(b []byte, at int64)) {
	if off < 0 || n < 0 || off > d.size-n {
		panic(fmt.Sprintf("disk: damage to bytes [%d, +%d) of %s, which has %d", off, n, d.name, d.size))
	}
	if n == 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	buf := make([]byte, n)
	for _, view := range []*pages{&d.now, &d.durable} {
		view.read(buf, off)
		fn(buf, 0)
		view.write(buf, off)
	}
	d.pending = slices.Clone(d.pending) // clones share the old entries
	for i, c := range d.pending {
		from, to := max(off, c.off), min(off+n, c.off+c.n)
		if from >= to {
			continue
		}
		data := make([]byte, c.n)
		copy(data, c.data)
		fn(data[from-c.off:to-c.off], from-off)
		d.pending[i].data = data
	}
}
