package txn

import (
	"slices"

	"sealfs"
	"sealfs/op"
)

// Coordinator is the state machine of one attempt of a transaction. Its owner
// sends what it is told to send, in any order and as often as it takes, and
// reports what comes back; it never waits inside.
//
//	preparing ── all voted ──► ready ── Decided(true) ──► committing ── all acknowledged ──► done
//	    │                        └───── Decided(false) ─┐
//	    └── a refusal, or no answer ────────────────────┴► aborted
type Coordinator struct {
	tx    op.Tx
	coord sealfs.Shard
	parts []op.Request
	voted []bool
	votes []op.Attr
	state State
	code  sealfs.Code // why it was aborted
	open  []sealfs.Shard
}

// State is where a Coordinator stands.
type State uint8

// The states.
const (
	Preparing  State = iota // votes are out
	Ready                   // all have voted: the decision may be recorded
	Committing              // decided: the parties must hear of it
	Done                    // all parties have committed
	Aborted                 // the parties should hear of it, or find out
)

// Begin returns the coordinator of an attempt, in the state Preparing, or Ready
// when there are no parts.
func Begin(tx op.Tx, coord sealfs.Shard, parts []op.Request) *Coordinator {
	c := &Coordinator{tx: tx, coord: coord, parts: parts, voted: make([]bool, len(parts)), votes: make([]op.Attr, len(parts))}
	for i := range parts {
		parts[i].Type, parts[i].Tx, parts[i].Coord = op.Prepare, tx, coord
	}
	if len(parts) == 0 {
		c.state = Ready
	}
	return c
}

// Tx returns the transaction.
func (c *Coordinator) Tx() op.Tx { return c.tx }

// State returns where c stands.
func (c *Coordinator) State() State { return c.state }

// Code says why c is Aborted.
func (c *Coordinator) Code() sealfs.Code { return c.code }

// Parts returns the Prepares to be sent.
func (c *Coordinator) Parts() []op.Request { return c.parts }

// Votes returns what the parties have answered, for the decision.
func (c *Coordinator) Votes() []op.Attr { return c.votes }

// Voted takes the answer to part i: code 0 and the attributes, or why not.
// ErrUnavailable stands for no answer, which may or may not have been a vote.
func (c *Coordinator) Voted(i int, code sealfs.Code, vote op.Attr) {
	if c.state != Preparing || c.voted[i] {
		return
	}
	if p := c.parts[i].Part; code == sealfs.ErrNotExist && (p == op.PartDrop || p == op.PartMove) {
		// A name stood for it when the parts were planned: somebody was faster.
		code = sealfs.ErrStale
	}
	if code != 0 {
		c.Abort(code)
		return
	}
	c.voted[i], c.votes[i] = true, vote
	if !slices.Contains(c.voted, false) {
		c.state = Ready
	}
}

// Abort gives the attempt up. It must not be called once the decision may have
// been recorded.
func (c *Coordinator) Abort(code sealfs.Code) {
	if c.state == Preparing || c.state == Ready {
		c.state, c.code = Aborted, code
		c.open = c.Parties()
	}
}

// Decided says that the decision is durable.
func (c *Coordinator) Decided() {
	if c.state == Ready {
		c.state = Committing
		if c.open = c.Parties(); len(c.open) == 0 {
			c.state = Done
		}
	}
}

// Parties returns the shards of all parts, each once.
func (c *Coordinator) Parties() []sealfs.Shard {
	var shards []sealfs.Shard
	for i := range c.parts {
		if s := c.parts[i].Shard; !slices.Contains(shards, s) {
			shards = append(shards, s)
		}
	}
	return shards
}

// Open returns the parties that have not acknowledged the outcome. Each is to
// be sent a Commit, or an Abort, until Acknowledged; Aborts may be given up.
func (c *Coordinator) Open() []sealfs.Shard { return c.open }

// Acknowledged says that a party has executed Commit or Abort.
func (c *Coordinator) Acknowledged(s sealfs.Shard) {
	c.open = slices.DeleteFunc(c.open, func(o sealfs.Shard) bool { return o == s })
	if c.state == Committing && len(c.open) == 0 {
		c.state = Done
	}
}
