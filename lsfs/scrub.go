package lsfs

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
)

// findingsKept bounds the findings of one round that are remembered and
// logged; all are counted.
const findingsKept = 1000

// ScrubOptions says how a scrub goes about its work.
type ScrubOptions struct {
	Rate    int64 // bytes a second at most; 0: as fast as the device reads
	Restart bool  // from the beginning, also when the last one was stopped midway
	auto    bool
}

// The kinds of findings.
const (
	FoundSuperblock = "superblock" // a copy of the superblock; it was written again if Healed
	FoundUnreadable = "unreadable" // the device cannot read it
	FoundHeader     = "header"     // of a segment
	FoundRecord     = "record"     // header, operation or redo of a record
	FoundChain      = "chain"      // a sound record that does not continue the one before
	FoundPayload    = "payload"    // of a record, where no file refers to it
	FoundBlock      = "block"      // data of a file: reading it gives EIO
	FoundAccount    = "account"    // live bytes of a segment are not those that its table entry says
	FoundRegion     = "region"     // the region, as far as it can be said
)

// A Finding is damage that a scrub has found.
type Finding struct {
	Time   time.Time  `json:"time"`
	Kind   string     `json:"kind"`
	Offset int64      `json:"offset"` // in bytes of the device; -1: not there
	Len    int64      `json:"len"`    // bytes that are concerned
	Slot   uint32     `json:"slot"`
	LSN    sealfs.LSN `json:"lsn"`
	Ino    sealfs.Ino `json:"ino,omitempty"`         // whose data it is, 0: nobody's
	At     uint64     `json:"file_offset,omitempty"` // where in the file
	What   string     `json:"what"`
	Healed bool       `json:"healed,omitempty"`
}

// ScrubRound is one way through a store.
type ScrubRound struct {
	Begun    time.Time     `json:"begun"`
	Ended    time.Time     `json:"ended,omitzero"`
	Auto     bool          `json:"automatic"`
	Segments int           `json:"segments"`    // verified
	Bytes    int64         `json:"bytes"`       // of the device, read
	Total    int64         `json:"total_bytes"` // that there are to read, about
	Claims   uint64        `json:"extents"`     // verified against the sums of their files
	Busy     time.Duration `json:"busy_ns"`     // time in which it ran
	Yielded  time.Duration `json:"yielded_ns"`  // of that, in which it let others go first
	Damages  uint64        `json:"damages"`
	Findings []Finding     `json:"findings,omitempty"` // the first 1000
}

// The states of a scrub.
const (
	ScrubIdle    = "idle"
	ScrubRunning = "running"
	ScrubStopped = "stopped" // midway; it goes on there
)

// ScrubStatus is what is known of a store's scrubs since it was opened.
type ScrubStatus struct {
	State   string      `json:"state"`
	Rate    int64       `json:"rate"`            // of the one that runs, in bytes a second; 0: no limit
	Round   *ScrubRound `json:"round,omitempty"` // under way, or stopped
	Last    *ScrubRound `json:"last,omitempty"`  // the last that came to its end
	Rounds  uint64      `json:"rounds"`          // that came to their end
	Bytes   uint64      `json:"bytes"`           // read by all
	Damages uint64      `json:"damages"`         // found by all; the same damage counts in each round
	Next    time.Time   `json:"next,omitzero"`   // when one begins by itself
}

// Standing returns how many places are damaged as far as is known: what the
// last whole round found, or, if that is more, the present one.
func (s *ScrubStatus) Standing() (n uint64) {
	for _, r := range []*ScrubRound{s.Last, s.Round} {
		if r != nil {
			n = max(n, r.Damages)
		}
	}
	return n
}

// scrubber is a store's scrub: at most one run at a time.
type scrubber struct {
	rate atomic.Int64

	mu     sync.Mutex // guards the rest; taken before no other lock
	closed bool
	stop   chan struct{} // closed to end the run under way; nil if there is none
	done   chan struct{} // closed when it has ended
	round  *ScrubRound   // under way or stopped midway
	last   *ScrubRound
	slot   uint32 // where the round goes on
	rounds uint64
	next   time.Time
}

var errScrubStopped = errors.New("scrub stopped")

// StartScrub begins to verify all that the store holds, in the background, or
// goes on where StopScrub ended it. If one runs already it gets the new rate.
func (s *Store) StartScrub(o ScrubOptions) error {
	if o.Rate < 0 {
		return fmt.Errorf("scrub at %d bytes a second: %w", o.Rate, sealfs.ErrInvalid)
	}
	c := &s.scrub
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return fmt.Errorf("store on %s: %w", s.dev.Name(), sealfs.ErrClosed)
	}
	if c.stop != nil && o.auto {
		return nil
	}
	c.rate.Store(o.Rate)
	if c.stop != nil {
		return nil
	}
	if c.round == nil || o.Restart {
		c.round, c.slot = &ScrubRound{Begun: time.Now(), Auto: o.auto}, 0
	}
	c.stop, c.done = make(chan struct{}), make(chan struct{})
	go s.runScrub(c.stop, c.done)
	return nil
}

// StopScrub ends a scrub that runs; StartScrub goes on there. It does not wait
// for the device.
func (s *Store) StopScrub() {
	c := &s.scrub
	c.mu.Lock()
	defer c.mu.Unlock()
	c.interrupt()
}

// interrupt tells the run to end. Needs mu.
func (c *scrubber) interrupt() {
	if c.stop == nil {
		return
	}
	select {
	case <-c.stop:
	default:
		close(c.stop)
	}
}

// closeScrub ends scrubbing for good and waits for the run under way.
func (s *Store) closeScrub() {
	c := &s.scrub
	c.mu.Lock()
	c.closed = true
	c.interrupt()
	done := c.done
	c.mu.Unlock()
	if done != nil {
		<-done
	}
}

// Scrub returns the state of the store's scrubs, with findings only if asked for.
func (s *Store) Scrub(findings bool) ScrubStatus {
	c := &s.scrub
	c.mu.Lock()
	defer c.mu.Unlock()
	st := ScrubStatus{
		State: ScrubIdle, Round: c.round.copy(findings), Last: c.last.copy(findings), Rounds: c.rounds, Next: c.next,
		Bytes: s.stats.scrubBytes.Load(), Damages: s.stats.scrubDamages.Load(),
	}
	switch {
	case c.stop != nil:
		st.State, st.Rate = ScrubRunning, c.rate.Load()
	case c.round != nil:
		st.State = ScrubStopped
	}
	return st
}

func (r *ScrubRound) copy(findings bool) *ScrubRound {
	if r == nil {
		return nil
	}
	x := *r
	x.Findings = nil
	if findings {
		x.Findings = append(x.Findings, r.Findings...)
	}
	return &x
}

// scrubSoon bounds how long after a start the first scrub by itself begins,
// so that a process that is restarted every day scrubs nevertheless, and not all at once.
const scrubSoon = time.Hour

// scheduler starts scrubs by itself until the store is closed.
func (s *Store) scheduler() {
	defer s.bg.done.Done()
	wait := min(s.o.ScrubInterval, time.Duration(rand.Int64N(int64(scrubSoon))))
	for {
		s.scrub.mu.Lock()
		s.scrub.next = time.Now().Add(wait)
		s.scrub.mu.Unlock()
		timer := time.NewTimer(wait)
		select {
		case <-s.bg.stop:
			timer.Stop()
			return
		case <-timer.C:
		}
		if s.StartScrub(ScrubOptions{Rate: s.o.ScrubRate, auto: true}) != nil {
			return
		}
		wait = s.o.ScrubInterval
	}
}

// runScrub is one run, from the place where the last was stopped.
func (s *Store) runScrub(stop, done chan struct{}) {
	defer close(done)
	c := &s.scrub
	began := time.Now()
	c.mu.Lock()
	slot, auto := c.slot, c.round.Auto
	c.mu.Unlock()
	rest := s.scrubRest(slot)
	c.mu.Lock()
	c.round.Total = c.round.Bytes + rest
	c.mu.Unlock()
	s.log.Info("scrub begins", "dev", s.dev.Name(), "slot", slot, "rate", c.rate.Load(), "automatic", auto)
	err := s.scrubAll(newPacer(s, stop), slot)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stop = nil
	c.round.Busy += time.Since(began)
	if err != nil {
		s.log.Info("scrub stopped", "dev", s.dev.Name(), "slot", c.slot, "err", err)
		return
	}
	c.round.Ended = time.Now()
	c.last, c.round, c.slot = c.round, nil, 0
	c.rounds++
	level := s.log.Info
	if c.last.Damages > 0 {
		level = s.log.Error
	}
	level("scrub ended", "dev", s.dev.Name(), "bytes", c.last.Bytes, "segments", c.last.Segments, "extents", c.last.Claims, "dur", c.last.Busy, "damages", c.last.Damages)
}

// scrubAll verifies superblocks, segments from slot on, and the region.
func (s *Store) scrubAll(p *scrubPacer, slot uint32) error {
	if slot == 0 {
		if err := s.scrubSupers(); err != nil {
			return err
		}
	}
	a := &audit{s: s, pace: p}
	for ; slot < uint32(len(s.segs)); slot++ {
		if p.stopped() {
			return errScrubStopped
		}
		n, err := a.segment(slot)
		if err != nil {
			return err
		}
		s.scrub.mu.Lock()
		s.scrub.slot = slot + 1
		if n > 0 {
			s.scrub.round.Segments++
		}
		s.scrub.round.Claims += a.verified
		s.scrub.round.Yielded += p.takeYielded()
		s.scrub.mu.Unlock()
		a.verified = 0
	}
	return s.scrubRegion(p)
}

// scrubRest returns about how many bytes the segments from slot on hold.
func (s *Store) scrubRest(slot uint32) (n int64) {
	tail := s.Superblock().Tail
	s.mu.RLock()
	defer s.mu.RUnlock()
	for ; slot < uint32(len(s.segs)); slot++ {
		n += int64(s.scrubExtent(slot, tail))
	}
	return n
}

// scrubExtent returns how much of the segment in slot a scrub verifies: what is
// durable of it, nothing if it is of no use; tail is the superblock's. Needs mu,
// shared.
func (s *Store) scrubExtent(slot uint32, tail sealfs.LSN) uint32 {
	g := &s.segs[slot]
	used := g.used
	switch {
	case g.state == segFree || g.state == segOpen && g.kind != layout.Hot:
		return 0
	case g.state == segSealed && g.live == 0 && (g.kind == layout.Cold || g.kind == layout.Far && s.farDead(g.seq) || g.kind == layout.Hot && g.seq < tail.Seq()):
		return 0 // dead
	case g.state == segOpen:
		used = 0
		if s.open().seq == g.seq {
			used = s.open().filled
		}
	}
	if d := s.Durable(); g.kind == layout.Hot && g.seq >= d.Seq() {
		if g.seq > d.Seq() {
			return 0
		}
		used = min(used, d.Off())
	}
	return used
}

// found takes a finding in.
func (s *Store) found(f Finding) {
	f.Time = time.Now()
	s.stats.scrubDamages.Add(1)
	c := &s.scrub
	c.mu.Lock()
	c.round.Damages++
	tell := len(c.round.Findings) < findingsKept
	if tell {
		c.round.Findings = append(c.round.Findings, f)
	}
	c.mu.Unlock()
	if tell {
		s.log.Error("damage found", "dev", s.dev.Name(), "store", s.store, "kind", f.Kind, "offset", f.Offset, "len", f.Len,
			"slot", f.Slot, "lsn", f.LSN.String(), "ino", uint64(f.Ino), "file_offset", f.At, "what", f.What, "healed", f.Healed)
	}
}

// scrubSupers verifies both copies of the superblock, and writes one again that
// is not what was written there last: the first to need it would be the start
// after a power cut that tears the other one.
func (s *Store) scrubSupers() error {
	s.super.Lock()
	defer s.super.Unlock()
	for i := range uint64(2) {
		off := int64(i) * layout.BlockSize
		want := s.super.block
		if want.Update%2 != i {
			want.Update--
		}
		b := disk.AlignedBuffer(layout.BlockSize)
		_, err := s.dev.ReadAt(b, off)
		var sb *layout.Superblock
		if err == nil {
			sb, err = layout.DecodeSuperblock(b, s.dev.Name(), off)
		}
		switch {
		case errors.Is(err, sealfs.ErrClosed):
			return err
		case err == nil && (sb.Store != want.Store || sb.Update != want.Update):
			err = fmt.Errorf("it is not the one that was written last: update %d, not %d", sb.Update, want.Update)
		case err == nil && want.Update == s.super.block.Update && !bytes.Equal(b, want.Encode()):
			err = errors.New("it is not the one that was written last")
		}
		if err == nil {
			continue
		}
		f := Finding{Kind: FoundSuperblock, Offset: off, Len: layout.BlockSize, What: err.Error()}
		if s.Failure() == nil {
			if _, err := s.dev.WriteAt(want.Encode(), off); err != nil {
				return s.fail(fmt.Errorf("superblock of %s: %w", s.dev.Name(), err))
			}
			if err := s.dev.Flush(); err != nil {
				return s.fail(fmt.Errorf("superblock of %s: %w", s.dev.Name(), err))
			}
			f.Healed = true
		}
		s.found(f)
	}
	s.scrubbed(2 * layout.BlockSize)
	return nil
}

// scrubbed counts what was read.
func (s *Store) scrubbed(n int64) {
	s.stats.scrubBytes.Add(uint64(n))
	s.scrub.mu.Lock()
	s.scrub.round.Bytes += n
	s.scrub.mu.Unlock()
}

// verifiable is a region that can verify the sums of all its pages on its
// medium. It tells pace how many bytes it has read, and ends with the error that
// this returns; damage is told to bad.
type verifiable interface {
	VerifyAll(latch sync.Locker, pace func(bytes int) error, bad func(*sealfs.Corruption)) error
}

// scrubRegion verifies the region, if it has sums.
func (s *Store) scrubRegion(p *scrubPacer) error {
	r, ok := any(s.region).(verifiable)
	if !ok {
		return nil
	}
	damage := func(err error) { s.found(Finding{Kind: FoundRegion, Offset: -1, What: err.Error()}) }
	err := r.VerifyAll(s.mu.RLocker(), func(n int) error {
		if !p.wait(n) {
			return errScrubStopped
		}
		return nil
	}, func(c *sealfs.Corruption) { damage(c) })
	if err == nil || errors.Is(err, errScrubStopped) {
		return err
	}
	damage(err) // it cannot be read
	return nil
}

// scrubPacer keeps a scrub to its rate, and lets the device's other users go first.
type scrubPacer struct {
	s     *Store
	stop  <-chan struct{}
	timer *time.Timer

	due     time.Time // when the next piece may be read
	looked  time.Time // when it was last looked whether the device is in use
	others  uint64    // operations and bytes of others by then
	bytes   uint64
	own     atomic.Uint64 // reads of the scrub itself
	ownN    atomic.Uint64
	busy    bool
	yielded atomic.Int64
}

func newPacer(s *Store, stop <-chan struct{}) *scrubPacer {
	p := &scrubPacer{s: s, stop: stop, timer: time.NewTimer(time.Hour), due: time.Now(), looked: time.Now()}
	p.others, p.bytes = p.traffic()
	return p
}

func (p *scrubPacer) stopped() bool {
	select {
	case <-p.stop:
		return true
	default:
		return false
	}
}

func (p *scrubPacer) takeYielded() time.Duration { return time.Duration(p.yielded.Swap(0)) }

// The device is in use if others did so much in a second. Then a scrub goes on
// at an eighth of its rate, which without a limit is taken for busyRate: slow
// enough not to be felt, and yet it comes to its end.
const (
	busyOps   = 50
	busyBytes = 1 << 20
	busyRate  = 128 << 20
	lookEvery = 50 * time.Millisecond
)

// traffic returns what others have done on the device.
func (p *scrubPacer) traffic() (ops, n uint64) {
	d := p.s.dev.Stats()
	return d.Reads + d.Writes - p.own.Load(), d.ReadBytes + d.WriteBytes - p.ownN.Load()
}

// look notes whether the device is in use by others.
func (p *scrubPacer) look(now time.Time) {
	d := now.Sub(p.looked)
	if d < lookEvery {
		return
	}
	ops, n := p.traffic()
	p.busy = float64(ops-p.others) > busyOps*d.Seconds() || float64(n-p.bytes) > busyBytes*d.Seconds()
	p.looked, p.others, p.bytes = now, ops, n
}

// wait waits until n more bytes may be read; false says that the scrub is to end.
func (p *scrubPacer) wait(n int) bool {
	now := time.Now()
	p.look(now)
	rate := p.s.scrub.rate.Load()
	free := p.due
	if rate > 0 {
		free = free.Add(time.Duration(float64(n) / float64(rate) * 1e9))
	}
	next := free
	if p.busy {
		slow := float64(busyRate)
		if rate > 0 {
			slow = float64(rate)
		}
		next = p.due.Add(time.Duration(float64(n) / slow * 8e9))
	}
	// What was not used of the past is lost, but for a little.
	if now.Sub(next) > 100*time.Millisecond {
		next = now.Add(-100 * time.Millisecond)
	}
	p.due = next
	if d := next.Sub(now); d > 0 {
		if next.After(free) {
			p.yielded.Add(int64(min(d, next.Sub(free))))
		}
		p.timer.Reset(d)
		select {
		case <-p.timer.C:
		case <-p.stop:
			return false
		}
	}
	return !p.stopped()
}

// piece is how much is read at once.
func (p *scrubPacer) piece() int {
	rate := p.s.scrub.rate.Load()
	if rate == 0 {
		return pieceMax
	}
	return int(max(pieceMin, min(pieceMax, rate/8&^(layout.BlockSize-1))))
}

// Pieces are large, so that the device reads at its best, and small where the
// rate is, so that it is even.
const (
	pieceMin = 64 << 10
	pieceMax = 2 << 20
)

// count notes what the scrub itself has read.
func (p *scrubPacer) count(n int) {
	p.own.Add(1)
	p.ownN.Add(uint64(n))
}
