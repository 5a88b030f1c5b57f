package server

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"sealfs"
	"sealfs/internal/turn"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// tellBackMax bounds how long the teller waits before it asks servers again that are away.
const tellBackMax = 5 * time.Second

// teller passes totals of directories on, a while after something has changed. The
// rows in the regions are the truth; the queue is their shadow, filled again at every start.
type teller struct {
	mu   sync.Mutex
	todo map[*store]*tellings
	wake chan struct{}
	kick chan struct{} // cuts the wait before a round short
	over chan struct{} // closed when the present round, or else the next one, has ended
	ctx  context.Context
	end  context.CancelFunc
	done sync.WaitGroup
	busy bool
	quit bool
}

// tellings is what a store has to tell.
type tellings struct {
	inodes []sealfs.Ino // for which a Tally is due, in the order in which they came
	now    []sealfs.Ino // those of this round
	boxes  []outbox     // that hold something
	has    map[outbox]struct{}
}

// outbox names what a shard has to tell a directory elsewhere; shard -1 stands for an inode's Tally.
type outbox struct {
	shard int
	to    sealfs.Ino
}

// untold is what meta.Queued tells.
type untold struct {
	shard  sealfs.Shard
	ino    sealfs.Ino
	outbox bool
}

// letter is one on its way.
type letter struct {
	outbox
	number uint64
	data   []byte
	life   uint64 // the incarnation of the store that has taken it, 0: nobody has
}

// add queues what meta.Config.Queued tells. What follows from a Tally is of the same round;
// all else waits for the next: else a directory that is worked in would be told of without end.
func (t *teller) add(st *store, s sealfs.Shard, ino sealfs.Ino, elsewhere, follows bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.quit {
		return // the row stays, and the next start finds it
	}
	if t.todo == nil {
		t.todo = map[*store]*tellings{}
		t.wake, t.kick, t.over = make(chan struct{}, 1), make(chan struct{}, 1), make(chan struct{})
		t.ctx, t.end = context.WithCancel(context.Background())
		t.done.Go(func() { t.run(st.srv.pace.tell, st.srv.o.Turns.Lane(turnTeller)) })
	}
	q := t.todo[st]
	if q == nil {
		q = &tellings{has: map[outbox]struct{}{}}
		t.todo[st] = q
	}
	o := outbox{-1, ino}
	if elsewhere {
		o.shard = int(s)
	}
	if _, in := q.has[o]; in {
		return
	}
	q.has[o] = struct{}{}
	switch {
	case elsewhere:
		q.boxes = append(q.boxes, o)
	case follows && t.busy:
		q.now = append(q.now, ino)
		return
	default:
		q.inodes = append(q.inodes, ino)
	}
	t.wakeUp()
}

func (t *teller) wakeUp() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

func (t *teller) stop(turns turn.Turns) {
	mine := turns.Mine()
	defer mine.Take()
	t.mu.Lock()
	t.quit = true
	end := t.end
	t.mu.Unlock()
	if end != nil {
		end()
		t.done.Wait()
	}
}

func (t *teller) run(every time.Duration, lane turn.Lane) {
	lane.Take()
	for back := every; ; {
		if t.ctx.Err() != nil { // of two reasons to go on, the choice would be by chance
			return
		}
		select {
		case <-t.ctx.Done():
			return
		case <-t.wake:
		}
		lane.Take()
		// A while, since where one file is made there will be more.
		timer := time.NewTimer(back)
		select {
		case <-t.ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		case <-t.kick:
			timer.Stop()
		}
		if lane.Take(); t.ctx.Err() != nil {
			return
		}
		t.mu.Lock()
		t.busy = true
		stores := make([]*store, 0, len(t.todo))
		for st, q := range t.todo {
			stores = append(stores, st)
			q.now, q.inodes = append(q.now, q.inodes...), nil
		}
		t.mu.Unlock()
		slices.SortFunc(stores, byID)
		all := true
		for _, st := range stores {
			all = t.tell(st) && t.send(st) && all
		}
		t.mu.Lock()
		t.busy = false
		close(t.over)
		t.over = make(chan struct{})
		for _, q := range t.todo {
			if len(q.now) > 0 { // letters have come since the store had its turn
				t.wakeUp()
			}
		}
		t.mu.Unlock()
		if back = every; !all {
			back = min(2*back, tellBackMax)
			t.wakeUp()
		}
	}
}

// Limits of hurry.
const (
	hurryRounds = 4
	hurryMax    = 300 * time.Millisecond
)

// hurry passes on what waits, for somebody who asks for totals: who asks for what he has just
// changed on this server finds it. It waits for a round that begins later, and for those
// that follow when it has sent letters, but neither for other servers nor for long.
func (t *teller) hurry(ctx context.Context, st *store) {
	mine := st.turns().Mine()
	bound, stop := context.WithTimeout(ctx, hurryMax)
	defer stop()
	for round := 0; round < hurryRounds; {
		t.mu.Lock()
		waits, letters := false, false
		for _, q := range t.todo {
			waits = waits || len(q.has) > 0
			letters = letters || len(q.boxes) > 0 || len(q.now) > 0
		}
		over, late := t.over, t.busy
		t.mu.Unlock()
		if t.quitting() || !late && (!waits || round > 0 && !letters) {
			return
		}
		if !late {
			round++
			select {
			case t.kick <- struct{}{}:
			default:
			}
			t.wakeUp()
		}
		select {
		case <-over:
		case <-bound.Done():
			return
		}
		mine.Take()
	}
}

func (t *teller) quitting() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.quit || t.todo == nil
}

// next takes the first inode out of the queue.
func (t *teller) next(st *store) (ino sealfs.Ino, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	q := t.todo[st]
	if len(q.now) == 0 || t.ctx.Err() != nil {
		return 0, false
	}
	ino, q.now = q.now[0], q.now[1:]
	delete(q.has, outbox{-1, ino})
	return ino, true
}

// tell executes the Tallies that are due, and those that follow from them: so it works its way
// up to where directories have a parent on another store. It reports whether all is done.
func (t *teller) tell(st *store) bool {
	for {
		ino, ok := t.next(st)
		if !ok {
			return true
		}
		req := op.Request{Type: op.Tally, Mode: op.TallyTell, Ino: ino, Shard: ino.Home(st.srv.cfg.Shards)}
		for {
			var rep op.Reply
			if err := t.execute(st, &req, &rep); err != nil {
				if st.Failure() == nil {
					t.add(st, req.Shard, ino, false, false)
				}
				return false
			}
			if rep.Eof {
				break
			}
			req.Dir, req.Gen = sealfs.Ino(rep.Off), rep.Attr.Version
		}
	}
}

// execute executes a step that need not be durable: what a power cut undoes is queued again.
func (t *teller) execute(st *store, req *op.Request, rep *op.Reply) error {
	_, err := st.execute(t.ctx, req, rep, nil)
	if err == nil {
		err = rep.Err()
	}
	if err != nil && !errors.Is(err, sealfs.ErrNoSpace) && !errors.Is(err, sealfs.ErrInterrupted) && st.Failure() == nil {
		st.srv.log.Error("totals are not passed on", "ino", uint64(req.Ino), "step", req.Mode, "err", err)
	}
	return err
}

// send sends what outboxes of the store hold. It reports whether all have taken it.
func (t *teller) send(st *store) bool {
	t.mu.Lock()
	q := t.todo[st]
	boxes := q.boxes
	q.boxes = nil
	for _, o := range boxes {
		delete(q.has, o)
	}
	t.mu.Unlock()
	var letters []*letter
	for _, o := range boxes {
		req := op.Request{Type: op.Tally, Mode: op.TallySend, Ino: o.to, Shard: sealfs.Shard(o.shard)}
		var rep op.Reply
		if err := t.execute(st, &req, &rep); err != nil || !rep.Eof {
			letters = append(letters, &letter{outbox: o})
		}
	}
	if len(letters) == 0 {
		return true
	}
	if st.Failure() != nil {
		return true // the rows stay
	}
	if err := st.Sync(); err == nil && t.ctx.Err() == nil {
		t.deliver(st, letters)
	}
	all := true
	for _, l := range letters {
		left := l.life == 0
		if !left {
			req := op.Request{Type: op.Tally, Mode: op.TallySent, Ino: l.to, Shard: sealfs.Shard(l.shard), Gen: l.number}
			var rep op.Reply
			left = t.execute(st, &req, &rep) != nil || !rep.Eof
		}
		if left {
			t.add(st, sealfs.Shard(l.shard), l.to, true, false)
			all = false
		}
	}
	return all
}

// deliver brings letters, which are durable, to their directories, and has that made
// durable: then they have a life.
func (t *teller) deliver(st *store, letters []*letter) {
	by := map[int][]*letter{} // by the store that takes it
	err := st.View(func(r pmem.Reader) error {
		for _, l := range letters {
			o, err := meta.GetOutbox(r, sealfs.Shard(l.shard), l.to)
			if err != nil || o.Number == 0 {
				continue // it could not be written
			}
			l.number, l.data = o.Number, o.Letter.Append(nil)
			at := st.srv.primary(l.to.Home(st.srv.cfg.Shards))
			by[at] = append(by[at], l)
		}
		return nil
	})
	if err != nil {
		return
	}
	eachStore(st.srv.o.Turns, by, func(l *letter) (answered bool) {
		l.life, answered = t.ask(st, op.Request{
			Type: op.Tally, Mode: op.TallyTake, Ino: l.to, Shard: l.to.Home(st.srv.cfg.Shards), Shard2: sealfs.Shard(l.shard), Gen: l.number, Data: l.data,
		})
		return answered
	})
	// One Sync of a store makes durable all that it has taken.
	type durable struct {
		shard sealfs.Shard
		life  uint64
	}
	syncs := map[int][]*durable{}
	for at, some := range by {
		if at >= 0 {
			syncs[at] = []*durable{{shard: some[0].to.Home(st.srv.cfg.Shards)}}
		}
	}
	eachStore(st.srv.o.Turns, syncs, func(y *durable) (answered bool) {
		y.life, answered = t.ask(st, op.Request{Type: op.Sync, Shard: y.shard})
		return answered
	})
	for at, some := range by {
		for _, l := range some {
			if at < 0 || l.life != syncs[at][0].life {
				l.life = 0 // another incarnation may not know of it
			}
		}
	}
}

// ask sends a request and returns which incarnation of the store has done it, 0
// if it has not, and whether there was an answer at all.
func (t *teller) ask(st *store, req op.Request) (life uint64, answered bool) {
	ctx, stop := context.WithTimeout(t.ctx, finishTimeout)
	defer stop()
	var rep op.Reply
	switch err := st.srv.peers().Do(ctx, &req, &rep); {
	case err != nil:
		return 0, false
	case rep.Code != 0:
		return 0, true
	}
	return rep.Off, true
}
