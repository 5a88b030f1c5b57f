package pmem

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"unsafe"

	"sealfs"
)

const wordBytes = 8 // what a power cut keeps or loses whole

// SimDax is persistent memory in simulation: a region of fixed size and a ring.
// Beside the bytes that the program sees it keeps those that a power cut would
// leave, and every version of a word in between, so CrashStates can tell what
// memory may look like after a power cut at this instant. A store that nothing
// flushes stays in danger for ever. Another Open over the same SimDax finds what a
// killed process leaves.
type SimDax struct {
	mu     sync.Mutex
	name   string
	region *simArea
	ring   *simArea // nil: there is none
	header StagingHeader
	hook   func()
	wrap   func(Persistence) Persistence
}

// simArea is a piece of persistent memory.
type simArea struct {
	now     []byte           // what the program sees and stores to
	durable []byte           // what is certain to survive
	words   map[int][]uint64 // by offset: what was written back since the last fence, oldest first
}

// NewSimDax returns persistent memory of zeros for a region of size bytes.
func NewSimDax(name string, size int64) *SimDax {
	return &SimDax{name: name, region: newSimArea(int(size))}
}

func newSimArea(n int) *simArea {
	return &simArea{now: make([]byte, n), durable: make([]byte, n), words: map[int][]uint64{}}
}

// SetHook makes fn be called after each store, flush and fence, and each change
// of the ring's file; nil ends that. fn may call CrashStates and Clone.
func (d *SimDax) SetHook(fn func()) { d.hook = fn }

// SetWrap makes all further stores go through what wrap returns for d: for tests
// of the tests.
func (d *SimDax) SetWrap(wrap func(Persistence) Persistence) { d.wrap = wrap }

func (d *SimDax) event() {
	if d.hook != nil {
		d.hook()
	}
}

// Persistence implements Persistent.
func (d *SimDax) Persistence() Persistence {
	if d.wrap != nil {
		return d.wrap(d)
	}
	return d
}

// at finds the area of b, and where b begins in it. Needs mu.
func (d *SimDax) at(b []byte) (*simArea, int) {
	p := uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	for _, a := range []*simArea{d.region, d.ring} {
		if a == nil {
			continue
		}
		if off := offsetIn(a.now, p); off >= 0 && off+int64(len(b)) <= int64(len(a.now)) {
			return a, int(off)
		}
	}
	panic("pmem: store to memory that is not persistent") // a bug of the caller
}

// Store implements Persistence.
func (d *SimDax) Store(dst, src []byte) {
	d.mu.Lock()
	a, off := d.at(dst[:len(src)])
	if off%LineBytes != 0 || len(src)%LineBytes != 0 {
		panic(fmt.Sprintf("pmem: store of %d bytes at %d is not of whole lines", len(src), off))
	}
	copy(a.now[off:], src)
	a.writeBack(off, off+len(src))
	d.mu.Unlock()
	d.event()
}

// WriteBack implements Persistence.
func (d *SimDax) WriteBack(b []byte) {
	d.mu.Lock()
	a, off := d.at(b)
	a.writeBack(off&^(LineBytes-1), min((off+len(b)+LineBytes-1)&^(LineBytes-1), len(a.now)))
	d.mu.Unlock()
	d.event()
}

// writeBack notes the present words of [lo, hi), whole lines.
func (a *simArea) writeBack(lo, hi int) {
	for ; lo < hi; lo += wordBytes {
		now := binary.LittleEndian.Uint64(a.now[lo:])
		last := binary.LittleEndian.Uint64(a.durable[lo:])
		if w := a.words[lo]; len(w) > 0 {
			last = w[len(w)-1]
		}
		if now != last {
			a.words[lo] = append(a.words[lo], now)
		}
	}
}

// Fence implements Persistence.
func (d *SimDax) Fence() {
	d.mu.Lock()
	for _, a := range []*simArea{d.region, d.ring} {
		if a == nil {
			continue
		}
		for off, w := range a.words {
			binary.LittleEndian.PutUint64(a.durable[off:], w[len(w)-1])
		}
		clear(a.words)
	}
	d.mu.Unlock()
	d.event()
}

// ReadAt implements Backing.
func (d *SimDax) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off < 0 || off >= int64(len(d.region.now)) {
		return 0, io.EOF
	}
	n := copy(p, d.region.now[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt implements Backing.
func (d *SimDax) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off > int64(len(d.region.now)-len(p)) {
		return 0, fmt.Errorf("write region %s: %w", d.name, sealfs.ErrNoSpace)
	}
	d.Store(d.region.now[off:], p)
	return len(p), nil
}

// Flush implements Backing.
func (d *SimDax) Flush() error {
	d.Fence()
	return nil
}

// Name implements Backing.
func (d *SimDax) Name() string { return d.name }

// Size implements Backing.
func (d *SimDax) Size() int64 { return int64(len(d.region.now)) }

// Grow implements Backing: the size is fixed.
func (d *SimDax) Grow(size int64) error {
	if size > d.Size() {
		return fmt.Errorf("grow region %s to %d bytes: %w", d.name, size, sealfs.ErrNoSpace)
	}
	return nil
}

// Close implements Backing: the memory stays.
func (d *SimDax) Close() error { return nil }

// limits makes one window of the whole memory.
func (d *SimDax) limits() (window, size int64) {
	window = PageSize
	for window < d.Size() {
		window *= 2
	}
	return window, d.Size()
}

// Map implements Backing.
func (d *SimDax) Map(off, n int64) (Mapping, error) {
	return simMapping(d.region.now[off:min(off+n, d.Size())]), nil
}

type simMapping []byte

func (m simMapping) Bytes() []byte           { return m }
func (m simMapping) Drop(off, n int64) error { return nil }
func (m simMapping) Unmap() error            { return nil }

// CreateRing implements Persistent.
func (d *SimDax) CreateRing(h StagingHeader) (*Staging, error) {
	h.BootID = [16]byte{}
	if err := h.check(); err != nil {
		return nil, err
	}
	if err := d.RemoveRing(); err != nil {
		return nil, err
	}
	d.mu.Lock()
	d.ring, d.header = newSimArea(h.bytes()), h
	d.mu.Unlock()
	s := d.staging()
	s.putHeader()
	return s, nil
}

func (d *SimDax) staging() *Staging {
	return &Staging{header: d.header, mem: d.ring.now, pm: newMedium(d.Persistence()), remove: d.RemoveRing}
}

// OpenRing implements Rings.
func (d *SimDax) OpenRing() (*Staging, error) {
	if d.ring == nil {
		return nil, fmt.Errorf("ring of %s: %w", d.name, sealfs.ErrNotExist)
	}
	h, err := decodeStaging(d.name+".ring", d.ring.now)
	if err != nil {
		return nil, err
	}
	d.header = h
	return d.staging(), nil
}

// RemoveRing implements Rings.
func (d *SimDax) RemoveRing() error {
	d.mu.Lock()
	d.ring = nil
	d.mu.Unlock()
	d.event()
	return nil
}

// Clone returns memory in the same state, as another process would find it if
// this one died.
func (d *SimDax) Clone() *SimDax {
	d.mu.Lock()
	defer d.mu.Unlock()
	return &SimDax{name: d.name, region: d.region.clone(), ring: d.ring.clone(), header: d.header}
}

func (a *simArea) clone() *simArea {
	if a == nil {
		return nil
	}
	c := &simArea{now: bytes.Clone(a.now), durable: bytes.Clone(a.durable), words: make(map[int][]uint64, len(a.words))}
	for off, w := range a.words {
		c.words[off] = slices.Clone(w)
	}
	return c
}

// choice is a word that a power cut may leave in several ways.
type choice struct {
	a        int // area: 0 region, 1 ring
	off      int
	versions []uint64 // other than the durable one, oldest first
}

// choices returns all words that are not certain, in order. Needs mu.
func (a *simArea) choices(area int, list []choice) []choice {
	if a == nil {
		return list
	}
	offs := slices.Collect(maps.Keys(a.words))
	// What nobody flushed is seen by comparison.
	for lo := 0; lo < len(a.now); lo += PageSize {
		hi := min(lo+PageSize, len(a.now))
		if bytes.Equal(a.now[lo:hi], a.durable[lo:hi]) {
			continue
		}
		for off := lo; off < hi; off += wordBytes {
			if a.words[off] == nil && !bytes.Equal(a.now[off:off+wordBytes], a.durable[off:off+wordBytes]) {
				offs = append(offs, off)
			}
		}
	}
	slices.Sort(offs)
	for _, off := range offs {
		c := choice{a: area, off: off, versions: slices.Clone(a.words[off])}
		now := binary.LittleEndian.Uint64(a.now[off:])
		if n := len(c.versions); n == 0 || c.versions[n-1] != now {
			c.versions = append(c.versions, now)
		}
		list = append(list, c)
	}
	return list
}

// CrashStates yields what a power cut at this instant may leave: any version of
// each word that is not certain, independently. If there are at most limit states
// it yields all of them; else those that lost everything and nothing, some that
// lost or kept one word, and random ones, whole lines in half of them. The memories
// are the caller's, which may use d meanwhile, if it does so on this goroutine.
func (d *SimDax) CrashStates(rng *rand.Rand, limit int) iter.Seq[*SimDax] {
	d.mu.Lock()
	open := d.ring.choices(1, d.region.choices(0, nil))
	base := [2]*simArea{d.region.certain(), d.ring.certain()}
	header := d.header
	d.mu.Unlock()
	// state returns the memory in which word i has version pick(i), 0 the durable one.
	state := func(pick func(i int) int) *SimDax {
		s := &SimDax{name: d.name, region: base[0].certain(), ring: base[1].certain(), header: header}
		for i, c := range open {
			if v := pick(i); v > 0 {
				a := [2]*simArea{s.region, s.ring}[c.a]
				binary.LittleEndian.PutUint64(a.now[c.off:], c.versions[v-1])
				binary.LittleEndian.PutUint64(a.durable[c.off:], c.versions[v-1])
			}
		}
		return s
	}
	all := 1
	for _, c := range open {
		if all *= 1 + len(c.versions); all > limit {
			break
		}
	}
	return func(yield func(*SimDax) bool) {
		if all <= limit {
			for k := range all {
				if !yield(state(func(i int) int {
					for _, c := range open[:i] {
						k /= 1 + len(c.versions)
					}
					return k % (1 + len(open[i].versions))
				})) {
					return
				}
			}
			return
		}
		last := func(i int) int { return len(open[i].versions) }
		for k := range limit {
			one := rng.IntN(len(open))
			var pick func(i int) int
			switch {
			case k == 0:
				pick = func(int) int { return 0 }
			case k == 1:
				pick = last
			case k%4 == 2:
				pick = func(i int) int {
					if i == one {
						return 0
					}
					return last(i)
				}
			case k%4 == 3 && k%8 == 3:
				pick = func(i int) int {
					if i == one {
						return last(i)
					}
					return 0
				}
			default:
				kept, lines := rng.Float64(), k%2 == 0
				line, keep := choice{off: -1}, false
				pick = func(i int) int {
					c := open[i]
					if !lines || c.a != line.a || c.off/LineBytes != line.off/LineBytes || line.off < 0 {
						keep, line = rng.Float64() < kept, c
					}
					if !keep {
						return 0
					}
					if n := len(c.versions); n > 1 && rng.IntN(4) == 0 {
						return 1 + rng.IntN(n)
					}
					return last(i)
				}
			}
			if !yield(state(pick)) {
				return
			}
		}
	}
}

// certain returns an area of which everything but the certain bytes is lost.
func (a *simArea) certain() *simArea {
	if a == nil {
		return nil
	}
	return &simArea{now: bytes.Clone(a.durable), durable: bytes.Clone(a.durable), words: map[int][]uint64{}}
}
