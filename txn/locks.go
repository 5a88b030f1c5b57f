package txn

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
)

// Locks are what the transactions prepared in one store hold. Its owner changes
// it under the lock that also guards the store's state, so that an operation sees
// both alike; its own lock is for those who give up afterwards.
type Locks struct {
	held   atomic.Int64 // transactions in txs
	last   atomic.Uint64
	mu     sync.RWMutex
	inodes map[sealfs.Ino]*holder
	names  map[name]*holder
	within map[sealfs.Ino]int // names held in a directory
	roots  map[sealfs.Ino]*holder
	txs    map[op.Tx]*holder
	frozen map[sealfs.Ino]*freeze
}

// freeze holds names of a directory, prepared or not, without a transaction.
type freeze struct {
	Blocked
	match func(name string) bool
	done  chan struct{}
}

type name struct {
	dir  sealfs.Ino
	name string
}

// holder is a transaction with what it has prepared here.
type holder struct {
	tx    op.Tx
	seq   uint64 // in the order in which they came
	parts []*op.Request
	done  chan struct{} // closed when nothing of it is left here
}

// Blocked is the error of an operation that a prepared transaction is in the way of.
type Blocked struct {
	By   op.Tx
	Kind meta.TouchKind
	Done <-chan struct{} // closed when it is out of the way
	seq  uint64
}

// Error names the transaction.
func (b *Blocked) Error() string {
	return fmt.Sprintf("transaction %d.%x is in the way", b.By.Age, b.By.Nonce)
}

// Dies reports whether tx must give up instead of waiting. What is no
// transaction (the zero Tx) may always wait.
func (b *Blocked) Dies(tx op.Tx) bool { return !tx.IsZero() && b.By.Before(tx) }

// Empty reports whether nothing is held.
func (l *Locks) Empty() bool { return l.held.Load() == 0 }

// Now returns a Guard for questions that are asked now: transactions that come
// later are not in their way, so that no stream of them can hold a question up. It
// is nil when nothing is held.
func (l *Locks) Now() func(tx op.Tx, t meta.Touch) error {
	if l.Empty() {
		return nil
	}
	now := l.last.Load()
	return func(tx op.Tx, t meta.Touch) error {
		err := l.Guard(tx, t)
		if b, ok := err.(*Blocked); ok && b.seq > now {
			return nil
		}
		return err
	}
}

// Len returns how many transactions hold something.
func (l *Locks) Len() int { return int(l.held.Load()) }

// Add takes the locks of a part that was prepared. The part is kept. One that
// was added before changes nothing, and Add reports false.
func (l *Locks) Add(part *op.Request) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.txs == nil {
		l.inodes, l.names, l.within = map[sealfs.Ino]*holder{}, map[name]*holder{}, map[sealfs.Ino]int{}
		l.roots, l.txs = map[sealfs.Ino]*holder{}, map[op.Tx]*holder{}
	}
	h := l.txs[part.Tx]
	if h == nil {
		h = &holder{tx: part.Tx, seq: l.last.Add(1), done: make(chan struct{})}
		l.txs[part.Tx] = h
		l.held.Add(1)
	}
	for _, p := range h.parts {
		if p.Part == part.Part && p.Ino == part.Ino && p.Dir == part.Dir && p.Name == part.Name {
			return false
		}
	}
	l.take(h, part)
	return true
}

// take notes that h holds what part names. Needs mu.
func (l *Locks) take(h *holder, part *op.Request) {
	h.parts = append(h.parts, part)
	switch part.Part {
	case op.PartName:
		l.names[name{part.Dir, part.Name}] = h
		l.within[part.Dir]++
	case op.PartVolume:
		l.roots[part.Ino] = h
	default:
		l.inodes[part.Ino] = h
	}
}

// Dropped is what a Drop has given up. The zero Dropped is nothing.
type Dropped struct {
	h     *holder
	parts []*op.Request
	last  bool // h holds nothing any more
}

// Parts returns the parts that were given up.
func (d *Dropped) Parts() []*op.Request { return d.parts }

// Tell tells those who wait for the transaction, if nothing of it is left.
func (d *Dropped) Tell() {
	if d.last {
		close(d.h.done)
	}
}

// Drop gives up what tx holds for its parts in a shard. Nobody is told before
// Tell, and until then Undo takes it back.
func (l *Locks) Drop(tx op.Tx, shard sealfs.Shard) Dropped {
	return l.drop(tx, func(p *op.Request) bool { return p.Shard == shard })
}

// Undo takes back a Drop whose cause has not happened, before anything else is
// added or dropped. The transaction keeps its place among the others: a question that
// waits for it goes on waiting.
func (l *Locks) Undo(d Dropped) {
	if d.h == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if d.last {
		l.txs[d.h.tx] = d.h
		l.held.Add(1)
	}
	for _, p := range d.parts {
		l.take(d.h, p)
	}
}

// Remove undoes an Add of the same part, which has come to nothing.
func (l *Locks) Remove(part *op.Request) {
	d := l.drop(part.Tx, func(p *op.Request) bool { return p == part })
	d.Tell()
}

func (l *Locks) drop(tx op.Tx, match func(*op.Request) bool) Dropped {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.txs[tx]
	if h == nil {
		return Dropped{}
	}
	d := Dropped{h: h}
	var rest []*op.Request
	for _, p := range h.parts {
		if !match(p) {
			rest = append(rest, p)
			continue
		}
		d.parts = append(d.parts, p)
		switch p.Part {
		case op.PartName:
			delete(l.names, name{p.Dir, p.Name})
			if l.within[p.Dir]--; l.within[p.Dir] == 0 {
				delete(l.within, p.Dir)
			}
		case op.PartVolume:
			delete(l.roots, p.Ino)
		default:
			delete(l.inodes, p.Ino)
		}
	}
	if h.parts = rest; len(rest) == 0 {
		delete(l.txs, tx)
		l.held.Add(-1)
		d.last = true
	}
	return d
}

// Guard is meta.Config.Guard: it returns a *Blocked when another transaction
// than tx is in the way of t.
func (l *Locks) Guard(tx op.Tx, t meta.Touch) error {
	if l.Empty() {
		return nil
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	var h *holder
	switch t.Kind {
	case meta.TouchExists:
		if at := l.inodes[t.Ino]; at != nil && at.has(op.PartNew, t.Ino) {
			h = at
		}
	case meta.TouchLinks:
		h = l.inodes[t.Ino]
	case meta.TouchName:
		if h = l.names[name{t.Ino, t.Name}]; h == nil {
			// A directory that is about to go takes no names.
			if at := l.inodes[t.Ino]; at != nil && at.has(op.PartDrop, t.Ino) {
				h = at
			}
		}
		if f := l.frozen[t.Ino]; h == nil && f != nil && f.By != tx && f.match(t.Name) {
			b := f.Blocked
			return &b
		}
	case meta.TouchEmpty:
		if l.within[t.Ino] > 0 {
			// The oldest of them, so that who must die does so at once.
			for n, at := range l.names {
				if n.dir == t.Ino && at.tx != tx && (h == nil || at.tx.Before(h.tx)) {
					h = at
				}
			}
		}
	case meta.TouchVolume:
		h = l.roots[t.Ino]
	}
	if h == nil || h.tx == tx {
		return nil
	}
	return &Blocked{h.tx, t.Kind, h.done, h.seq}
}

// Freeze lets nobody prepare or change the names of a directory that match, until Thaw. It counts as held
// by tx. Names that are prepared already stay so: see Within.
func (l *Locks) Freeze(tx op.Tx, dir sealfs.Ino, match func(name string) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.frozen == nil {
		l.frozen = map[sealfs.Ino]*freeze{}
	}
	done := make(chan struct{})
	l.frozen[dir] = &freeze{Blocked{tx, meta.TouchName, done, l.last.Add(1)}, match, done}
	l.held.Add(1)
}

// Thaw ends a Freeze, if there is one.
func (l *Locks) Thaw(dir sealfs.Ino) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f := l.frozen[dir]; f != nil {
		delete(l.frozen, dir)
		l.held.Add(-1)
		close(f.done)
	}
}

// Within returns the oldest transaction that has prepared a name of a directory that matches, nil if none has.
func (l *Locks) Within(dir sealfs.Ino, match func(name string) bool) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	var h *holder
	for n, at := range l.names {
		if n.dir == dir && match(n.name) && (h == nil || at.tx.Before(h.tx)) {
			h = at
		}
	}
	if h == nil {
		return nil
	}
	return &Blocked{h.tx, meta.TouchName, h.done, h.seq}
}

func (h *holder) has(part op.Part, ino sealfs.Ino) bool {
	for _, p := range h.parts {
		if p.Part == part && p.Ino == ino {
			return true
		}
	}
	return false
}

// Each calls fn for each transaction that holds something, with the shard that
// decides it and those in which it is prepared. fn must not call l.
func (l *Locks) Each(fn func(tx op.Tx, coord sealfs.Shard, in []sealfs.Shard)) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	for _, h := range l.txs {
		fn(h.tx, h.parts[0].Coord, h.shards())
	}
}

// Where returns the shard that decides tx and those in which it is prepared, none
// if it holds nothing.
func (l *Locks) Where(tx op.Tx) (coord sealfs.Shard, in []sealfs.Shard) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	h := l.txs[tx]
	if h == nil {
		return 0, nil
	}
	return h.parts[0].Coord, h.shards()
}

func (h *holder) shards() (in []sealfs.Shard) {
	for _, p := range h.parts {
		if !slices.Contains(in, p.Shard) {
			in = append(in, p.Shard)
		}
	}
	return in
}
