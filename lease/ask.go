package lease

import (
	"sealfs"
	"sealfs/op"
)

// Change is something that an operation is about to change.
type Change struct {
	Ino  sealfs.Ino
	Name string // of the directory Ino: this name, its listing and its attributes; empty: all of Ino
	Self bool   // the answer will not tell of it, so the sender itself must forget it, too
}

// Ask is what one execution of a request means for leases. Requests without a
// session, and those of one that does not watch, take from others and get nothing.
type Ask struct {
	Session sealfs.Session
	Behalf  sealfs.Session // that has asked for the changes, if these are a part of a transaction
	Changes []Change
	Tells   sealfs.Ino // its attributes or data are told; 0: nobody's
	Keep    bool       // nobody gets anything of what changes until the ticket is done

	// What the answer tells, and its sender could believe from now on; 0: nothing.
	Ino   sealfs.Ino
	Write bool       // it would delay writes to Ino
	Dir   sealfs.Ino // names and attributes of a directory

	// Ticket is that of earlier attempts of the same request. It is made when the
	// request must wait, or keeps something, and must be given back by Done.
	Ticket *Ticket

	// The answer.
	Lease op.Lease
	Stamp uint64 // with Lease
}

// Ticket is a request that waits for something to be given back. It belongs to
// the goroutine of the request.
type Ticket struct {
	wants []want
	inos  []sealfs.Ino // of which nobody gets anything
	wake  func()
}

// want is a revocation that must be carried out.
type want struct {
	s    *session
	num  uint64
	ino  sealfs.Ino
	name string
}

func (w *want) met() bool { return w.s.ended || w.s.acked >= w.num }

// ready reports whether the request may ask again.
func (k *Ticket) ready() bool {
	for i := range k.wants {
		if !k.wants[i].met() {
			return false
		}
	}
	return true
}

// returned reports whether s has given back a name for this request.
func (k *Ticket) returned(s *session, ino sealfs.Ino, name string) bool {
	if k == nil {
		return false
	}
	for i := range k.wants {
		if w := &k.wants[i]; w.s == s && w.ino == ino && w.name == name && w.met() {
			return true
		}
	}
	return false
}

func (k *Ticket) has(ino sealfs.Ino) bool {
	if k == nil {
		return false
	}
	for _, i := range k.inos {
		if i == ino {
			return true
		}
	}
	return false
}

// Idle reports whether nobody holds anything, or ever did.
func (t *Table) Idle() bool { return t.live.Load() == 0 }

// Ask reports whether nobody is in the way of a. Then what can be granted is in
// a.Lease. Otherwise nothing must have happened: what is in the way is being taken back,
// and the request waits (Notify) and asks again with the same Ticket. It must be
// called under the lock of the store's state, exclusive for a change.
func (t *Table) Ask(a *Ask) bool {
	a.Lease, a.Stamp = 0, 0
	if t.live.Load() == 0 && !a.Keep {
		return true
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.free(a) {
		return false
	}
	if s := t.sessions[a.Session]; s != nil {
		if a.Ino != 0 {
			a.Lease |= t.grant(s, a.Ino, a.Write, a.Ticket)
		}
		if a.Dir != 0 && t.grant(s, a.Dir, false, a.Ticket) != 0 {
			a.Lease |= op.LeaseDir
		}
		if a.Lease != 0 {
			a.Stamp = s.issued
		}
	}
	return true
}

// free takes what is in the way of a, and reports whether there is nothing.
func (t *Table) free(a *Ask) bool {
	free := true
	for i := range a.Changes {
		c := &a.Changes[i]
		blocked := false
		in := t.inodes[c.Ino]
		for k := range in.len() {
			h := in.at(k)
			if h.s.ended || h.s.id == a.Session && !c.Self {
				continue
			}
			own := h.mode == read && (h.s.id == a.Session || a.Behalf != 0 && h.s.id == a.Behalf)
			if (c.Name != "" || own) && (t.faults&faultForgetNames != 0 || a.Ticket.returned(h.s, c.Ino, c.Name)) {
				continue
			}
			a.want(h.s, t.revoke(h, c.Ino, c.Name, own), c.Ino, c.Name)
			blocked = true
		}
		if blocked {
			t.put(c.Ino, &in) // holders count what is taken from them
			free = false
		}
		if blocked || a.Keep {
			t.keep(a, c.Ino)
		}
	}
	if a.Tells == 0 {
		return free
	}
	in := t.inodes[a.Tells]
	for k := range in.len() {
		if h := in.at(k); !h.s.ended && h.s.id != a.Session && h.mode == write {
			a.want(h.s, t.recall(h, a.Tells), a.Tells, "")
			t.keep(a, a.Tells)
			free = false
		}
	}
	return free
}

// keep makes sure that nobody gets anything of ino until a's ticket is done.
func (t *Table) keep(a *Ask, ino sealfs.Ino) {
	if a.Ticket.has(ino) {
		return
	}
	if a.Ticket == nil {
		a.Ticket = new(Ticket)
	}
	if len(a.Ticket.inos) == 0 {
		t.waiting++
	}
	a.Ticket.inos = append(a.Ticket.inos, ino)
	in := t.inodes[ino]
	in.waits++
	t.put(ino, &in)
}

func (a *Ask) want(s *session, num uint64, ino sealfs.Ino, name string) {
	if a.Ticket == nil {
		a.Ticket = new(Ticket)
	}
	for i := range a.Ticket.wants {
		if w := &a.Ticket.wants[i]; w.s == s && w.num == num && w.name == name {
			return
		}
	}
	a.Ticket.wants = append(a.Ticket.wants, want{s, num, ino, name})
}

// grant gives s a lease on ino, if that may be, and returns which: LeaseIno, with
// write and if nobody else holds anything also LeaseWrite.
func (t *Table) grant(s *session, ino sealfs.Ino, exclusive bool, own *Ticket) op.Lease {
	in := t.inodes[ino]
	waits := in.waits
	if own.has(ino) {
		waits--
	}
	if waits > 0 && t.faults&faultGrantWaiting == 0 || len(s.queue) > 0 && s.marks[ino] > 0 && t.faults&faultGrantPending == 0 {
		return 0
	}
	var mine *holder
	for k := range in.len() {
		switch h := in.at(k); {
		case h.s == s:
			mine = h
		case h.s.ended || t.faults&faultShareWrite != 0:
		case h.mode == write:
			return 0
		default:
			exclusive = false
		}
	}
	switch {
	case mine != nil && (mine.taken != 0 || exclusive && mine.mode != write):
		mine.taken = 0
		if exclusive {
			mine.mode = write
		}
		t.put(ino, &in)
	case mine != nil:
	case t.held >= t.max:
		return 0
	default:
		h := holder{s: s, mode: read}
		if exclusive {
			h.mode = write
		}
		in.add(h)
		t.held++
		t.put(ino, &in)
	}
	if exclusive {
		return op.LeaseIno | op.LeaseWrite
	}
	return op.LeaseIno
}

// List is for what a listing of a directory tells of the inodes in it. It takes
// the attributes out of entries of which somebody else alone knows them, and, for a
// session that may believe what it is told, out of those of which it may not. It
// returns LeaseIno if the session holds a lease on all that have attributes then.
// It never waits; a's answer to the directory itself must be known.
func (t *Table) List(a *Ask, entries []op.Dirent) op.Lease {
	if t.live.Load() == 0 {
		return 0
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.sessions[a.Session]
	full, given := false, false
	for i := range entries {
		e := &entries[i].Attr
		if e.Ino == 0 {
			continue
		}
		in := t.inodes[e.Ino]
		for k := range in.len() {
			if h := in.at(k); !h.s.ended && h.s.id != a.Session && h.mode == write {
				*e = op.Attr{}
				break
			}
		}
		if e.Ino == 0 || s == nil {
			continue
		}
		switch {
		case t.grant(s, e.Ino, false, a.Ticket) != 0:
			given = true
		case t.held >= t.max:
			full = true
		default:
			*e = op.Attr{}
		}
	}
	if !given || full {
		return 0
	}
	a.Stamp = s.issued
	return op.LeaseIno
}

// Notify has wake called when the ticket's request may ask again, and reports
// whether it may already. wake is called under the table's mutex, perhaps more than
// once and without need; it must neither block nor call the table.
func (t *Table) Notify(k *Ticket, wake func()) (ready bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if k.ready() {
		return true
	}
	t.waits++
	k.wake = wake
	for i := range k.wants {
		if w := &k.wants[i]; !w.met() {
			w.s.tickets[k] = struct{}{}
		}
	}
	return false
}

// Done ends what k keeps from others. It may be nil.
func (t *Table) Done(k *Ticket) {
	if k == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(k.inos) > 0 {
		t.waiting--
	}
	for _, ino := range k.inos {
		in := t.inodes[ino]
		in.waits--
		t.put(ino, &in)
	}
	for i := range k.wants {
		delete(k.wants[i].s.tickets, k)
	}
	k.inos, k.wants, k.wake = nil, nil, nil
}
