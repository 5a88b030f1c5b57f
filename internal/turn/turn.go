// Package turn makes the goroutines of a simulation go one at a time, in an order
// that depends on nothing but the simulation.
//
// In a bubble of testing/synctest the clock moves on only when everybody waits. What
// it leaves open is the order of goroutines that can go on at the same instant:
// who wakes another, and who is woken; all whom one signal wakes; those whose timers
// end together. Preemption and the number of processors decide it. Here each
// goroutine has a lane: instants, one in each Period, at which nobody else
// goes on. It takes its lane when it starts, and again each time that others may have
// woken it, before it looks at anything. All that is waited for by time in the
// simulation must be whole Periods, so that it keeps its lane without help.
//
// Outside of a simulation, with the zero Turns, all of this does nothing.
package turn

import (
	"sync"
	"time"
)

// Period is how often each lane has its turn.
const Period = 10 * time.Microsecond

// lanes is how many lanes Turns has, and a lane children: the nanoseconds of a Period
// are numbered by both.
const lanes = 100

// Turns are lanes for a part of a program. The zero value is for programs that run
// in real time.
type Turns struct {
	on   bool
	base int
}

// Simulated returns the lanes of a simulation from number base on, which must be
// below 100. Lane 0 is of whoever drives the simulation: it must begin at a whole
// Period.
func Simulated(base int) Turns { return Turns{true, base} }

// Lane returns lane n of t.
func (t Turns) Lane(n int) Lane { return Lane{t.on, time.Duration(t.base+n) % lanes} }

// Mine returns the lane in which the caller goes on at present.
func (t Turns) Mine() Lane {
	if !t.on {
		return Lane{}
	}
	return Lane{true, instant()}
}

// Wait is c.Wait for a goroutine that keeps its lane. c.L is not held for a while
// after the signal.
func (t Turns) Wait(c *sync.Cond) {
	l := t.Mine()
	c.Wait()
	if t.on {
		c.L.Unlock()
		l.Take()
		c.L.Lock()
	}
}

// Mutex is a sync.Mutex, or a sync.RWMutex for who locks it alone.
type Mutex interface {
	sync.Locker
	TryLock() bool
}

// Lock locks a mutex that may be held by somebody who waits. A goroutine that waits
// for a mutex would keep the clock of the simulation from moving on.
func (t Turns) Lock(mu Mutex) {
	if !t.on {
		mu.Lock()
		return
	}
	for !mu.TryLock() {
		time.Sleep(Period)
	}
}

// Lane is the turn of one goroutine.
type Lane struct {
	on bool
	at time.Duration // in a Period
}

// Child returns the lane of the ith goroutine, from 0 on, that the one with lane l starts.
func (l Lane) Child(i int) Lane {
	l.at = (l.at + time.Duration(1+i)*lanes) % Period
	return l
}

// Take waits for the lane's next turn, unless it is its turn already. The caller must
// not hold a lock for which others wait.
func (l Lane) Take() {
	if !l.on {
		return
	}
	if d := (l.at - instant() + Period) % Period; d > 0 {
		time.Sleep(d)
	}
}

func instant() time.Duration { return time.Duration(time.Now().UnixNano()) % Period }
