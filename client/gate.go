package client

import (
	"context"
	"sync"
	"sync/atomic"
)

// gate is a lock that one can wait for with a context, and that another
// goroutine than the one that took it may release. It is not fair.
type gate struct {
	state atomic.Int32 // one of the gate constants

	mu    sync.Mutex
	freed chan struct{} // closed by the next release, if anybody waits
}

const (
	gateOpen = iota
	gateTaken
	gateWanted // taken, and perhaps somebody waits
)

// take takes the gate. When ctx ends first, it returns errGaveUp.
func (g *gate) take(ctx context.Context) error {
	if g.try() {
		return nil
	}
	for {
		g.mu.Lock()
		// Whoever releases the gate from here on comes through mu.
		if g.state.Swap(gateWanted) == gateOpen {
			g.mu.Unlock()
			return nil
		}
		if g.freed == nil {
			g.freed = make(chan struct{})
		}
		freed := g.freed
		g.mu.Unlock()
		select {
		case <-freed:
		case <-ctx.Done():
			return errGaveUp
		}
	}
}

// try takes the gate if it is open.
func (g *gate) try() bool { return g.state.CompareAndSwap(gateOpen, gateTaken) }

func (g *gate) release() {
	if g.state.Swap(gateOpen) == gateWanted {
		g.mu.Lock()
		if g.freed != nil {
			close(g.freed)
			g.freed = nil
		}
		g.mu.Unlock()
	}
}

// turn is somebody's time with the buffer of a node: the gate of the node is taken.
type turn struct {
	n      *node
	passed bool // a goroutine that goes on sending has the gate now
}

// turn waits for the gate of n. The turn must be ended.
func (n *node) turn(ctx context.Context) (turn, error) {
	return turn{n: n}, n.gate.take(ctx)
}

// end gives the gate back, unless somebody else has it by now.
func (t *turn) end() {
	if !t.passed {
		t.n.gate.release()
	}
}
