package lsfs

import (
	"sync/atomic"
	"time"
)

// pacer makes the cleaner work as hard as space is needed, and changes come no
// faster than it frees space once little is left. Between CleanLow free
// segments and the reserve there is thus a place where both keep pace, instead
// of bursts of cleaning and requests that wait for whole rounds of it.
type pacer struct {
	// Of the cleaner (collector.mu).
	resumed time.Time     // its last rest ended
	debt    time.Duration // that it should still rest
	began   time.Time     // the round
	rested  time.Duration // in the round

	gains atomic.Int64 // bytes that cleaning at full speed gains in a second, on average
	brake atomic.Int64 // nanoseconds that a MiB of changes must take; 0: as little as it can
	next  atomic.Int64 // when the next change may come, in nanoseconds since 1970
}

// begin starts the clock of a round.
func (p *pacer) begin() {
	p.began, p.rested = time.Now(), 0
	p.resumed = p.began
}

// end notes what a round gained.
func (p *pacer) end(gain int64) {
	spent := time.Since(p.began) - p.rested
	if gain <= 0 || spent <= 0 {
		return
	}
	now, old := int64(float64(gain)/spent.Seconds()), p.gains.Load()
	if old == 0 {
		old = now
	}
	p.gains.Store(max(old+(now-old)/4, 1))
}

// spare returns how much is free, in segments, with the rest of the open one.
// Needs mu, shared.
func (s *Store) spare() float64 {
	return float64(len(s.free)) + 1 - float64(s.open().filled)/float64(s.seg)
}

// urgency says how much of its time the cleaner should work: from 1/16 where
// it begins to all of it half-way to the reserve.
func (s *Store) urgency() float64 {
	s.mu.RLock()
	spare := s.spare()
	s.mu.RUnlock()
	high, low := float64(s.o.CleanLow), float64(s.keepFor(Normal)+1)
	return min(1, max(1./16, 2*(high-spare)/max(high-low, 1)))
}

// restMin and restMax bound one rest: shorter ones are put together, and a
// longer one would not notice that there is a need.
const (
	restMin = time.Millisecond
	restMax = 50 * time.Millisecond
)

// rest is called by the cleaner after each piece of work. It rests as long as
// that piece allows. A checkpoint that is due does not wait for the end of the round.
// Needs collector.mu, and no segment's place but those pinned to stay what it is.
func (s *Store) rest() {
	p := &s.gc.pace
	if s.bg.off.Load() {
		return
	}
	s.mu.RLock()
	due := s.checkpointDue()
	s.mu.RUnlock()
	if due && s.checkpoint() != nil {
		return // the next change tells why
	}
	now := time.Now()
	if d := s.urgency(); d < 1 {
		p.debt += time.Duration(float64(now.Sub(p.resumed)) * (1 - d) / d)
	} else {
		p.debt = 0
	}
	if p.debt >= restMin {
		s.doze(min(p.debt, restMax))
		p.debt = 0
		p.rested += time.Since(now)
		now = time.Now()
	}
	p.resumed = now
}

// doze waits for a while, or until the store is closed.
func (s *Store) doze(d time.Duration) {
	lane := s.o.Turns.Mine()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.bg.stop:
	}
	lane.Take()
}

// gainsMin is a rate below which changes are not slowed down: they wait for
// space then, or learn that there is none.
const gainsMin = 1 << 20

// setBrake decides how fast changes may come. In the last eighth above the
// reserve they may come four times as fast as cleaning gains at first, and half
// as fast in the end. Needs mu.
func (s *Store) setBrake() {
	high, low := float64(s.o.CleanLow), float64(s.keepFor(Normal))
	p := &s.gc.pace
	rate := max(p.gains.Load(), gainsMin)
	x := (s.spare() - low) / max((high-low)/8, 1)
	if x >= 1 || p.gains.Load() == 0 {
		p.brake.Store(0)
		return
	}
	p.brake.Store(int64(float64(time.Second) * (1 << 20) / (float64(rate) * (0.5 + 3.5*max(x, 0)))))
}

// brakeMax bounds how long one change is held back.
const brakeMax = time.Second

// slowDown holds a change of n bytes back as long as the brake says.
func (s *Store) slowDown(n int) {
	p := &s.gc.pace
	cost := p.brake.Load() * int64(n) >> 20
	now := time.Now().UnixNano()
	for {
		next := p.next.Load()
		at := max(now, min(next, now+int64(brakeMax)))
		if !p.next.CompareAndSwap(next, at+cost) {
			continue
		}
		if at > now {
			s.stats.spaceBrakes.Add(1)
			s.doze(time.Duration(at - now))
		}
		return
	}
}
