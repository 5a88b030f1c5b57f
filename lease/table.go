package lease

import (
	"fmt"
	"sync"
	"sync/atomic"

	"sealfs"
	"sealfs/op"
)

// HoldersMax is how many leases a Table grants by default.
const HoldersMax = 1 << 20

const (
	// takenMax is after how many names in a row a directory is taken back as a
	// whole: whoever looked into it once must not be asked for every name that others
	// make in it.
	takenMax = 16
	// goneMax is how many ended sessions are remembered, so that a late Watch does
	// not bring one back.
	goneMax = 1024
	// sweepStep is how many inodes End looks at before it lets others in.
	sweepStep = 1024
)

// Table is what the sessions of one store hold. Its methods may be called by
// several goroutines.
type Table struct {
	live atomic.Int64 // sessions, so that a store that nobody watches pays nothing

	mu       sync.Mutex
	max      int
	base     uint64 // of revocation numbers
	sessions map[sealfs.Session]*session
	inodes   map[sealfs.Ino]inode
	gone     map[sealfs.Session]struct{}
	order    []sealfs.Session // gone, oldest first
	held     int
	waiting  int
	issued   uint64
	waits    uint64

	faults fault // tests: rules that are broken, to show that it is noticed
}

// fault is a set of rules that are broken.
type fault uint

const (
	faultGrantWaiting fault = 1 << iota // grant while a ticket waits
	faultGrantPending                   // grant while a revocation is not acknowledged
	faultAckSent                        // what was sent counts as acknowledged
	faultForgetNames                    // names need not be given back
	faultShareWrite                     // Write beside others
	faultLateWatch                      // an old Watch counts as a new one
)

// New returns the table of a store in one of its incarnations, that grants at
// most max leases, or HoldersMax if max is 0.
func New(incarnation uint32, max int) *Table {
	if max == 0 {
		max = HoldersMax
	}
	return &Table{
		max: max, base: uint64(incarnation) << 32,
		sessions: map[sealfs.Session]*session{}, inodes: map[sealfs.Ino]inode{}, gone: map[sealfs.Session]struct{}{},
	}
}

// mode is how much a holder may believe.
type mode uint8

const (
	read mode = iota + 1
	write
)

// holder is a session's lease on an inode.
type holder struct {
	s     *session
	mode  mode
	taken uint8 // names taken from it since it was last told of one
}

// inode is who holds leases on an inode. Most have one holder.
type inode struct {
	first holder
	rest  *[]holder
	waits int // tickets that wait for it or keep it
}

func (in *inode) len() int {
	switch {
	case in.first.s == nil:
		return 0
	case in.rest == nil:
		return 1
	}
	return 1 + len(*in.rest)
}

func (in *inode) at(k int) *holder {
	if k == 0 {
		return &in.first
	}
	return &(*in.rest)[k-1]
}

func (in *inode) find(s *session) *holder {
	for k := range in.len() {
		if h := in.at(k); h.s == s {
			return h
		}
	}
	return nil
}

func (in *inode) add(h holder) {
	switch {
	case in.first.s == nil:
		in.first = h
	case in.rest == nil:
		in.rest = &[]holder{h}
	default:
		*in.rest = append(*in.rest, h)
	}
}

// drop removes holder k.
func (in *inode) drop(k int) {
	n := in.len()
	*in.at(k) = *in.at(n - 1)
	switch {
	case n == 1:
		in.first = holder{}
	case n == 2:
		in.rest = nil
	default:
		*in.rest = (*in.rest)[:n-2]
	}
}

// put stores what has become of an inode.
func (t *Table) put(ino sealfs.Ino, in *inode) {
	if in.first.s == nil && in.waits == 0 {
		delete(t.inodes, ino)
		return
	}
	t.inodes[ino] = *in
}

// dropHolder forgets the lease of s on ino.
func (t *Table) dropHolder(s *session, ino sealfs.Ino) {
	in := t.inodes[ino]
	for k := range in.len() {
		if in.at(k).s == s {
			in.drop(k)
			t.held--
			t.put(ino, &in)
			return
		}
	}
}

// lower makes Write of s on ino Read.
func (t *Table) lower(s *session, ino sealfs.Ino) {
	in := t.inodes[ino]
	if h := in.find(s); h != nil && h.mode == write {
		h.mode = read
		t.put(ino, &in)
	}
}

// Lower says that a session has nothing to write to ino any more: it has closed
// the file, and sent what was delayed.
func (t *Table) Lower(sess sealfs.Session, ino sealfs.Ino) {
	if t.live.Load() == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.sessions[sess]; s != nil {
		t.lower(s, ino)
	}
}

// Forget says that ino is gone. Numbers of inodes are not reused, so what
// somebody believes of it stays true.
func (t *Table) Forget(ino sealfs.Ino) {
	if t.live.Load() == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	in, known := t.inodes[ino]
	if !known {
		return
	}
	t.held -= in.len()
	in.first, in.rest = holder{}, nil
	t.put(ino, &in)
}

// Stats counts what a Table does.
type Stats struct {
	Sessions int    `json:"sessions"` // that may hold leases
	Held     int    `json:"held"`
	Waiting  int    `json:"waiting"` // requests that wait for something to be given back, or keep it from others
	Revoked  uint64 `json:"revoked"` // revocations issued
	Waits    uint64 `json:"waits"`   // requests that had to wait
}

// Stats returns the counts.
func (t *Table) Stats() Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	return Stats{Sessions: len(t.sessions), Held: t.held, Waiting: t.waiting, Revoked: t.issued, Waits: t.waits}
}

// key is what a revocation takes.
type key struct {
	ino  sealfs.Ino
	kind op.RevokeKind
	name string
}

// session is one that watches.
type session struct {
	id      sealfs.Session
	ended   bool
	issued  uint64 // number of the last revocation
	acked   uint64 // all up to this one are carried out
	queue   []op.Revoke
	pending map[key]uint64       // the queue, to issue nothing twice
	marks   map[sealfs.Ino]int   // how many of the queue are about an inode
	tickets map[*Ticket]struct{} // that wait for it
	watch   uint64               // number of the last Watch that came
	seq     uint64               // that its sender gave it
	wake    func()               // of that Watch
	fresh   bool                 // the Watch is to be answered at once
}

// issue adds a revocation to the stream and returns its number.
func (t *Table) issue(s *session, kind op.RevokeKind, ino sealfs.Ino, name string) uint64 {
	s.issued++
	t.issued++
	s.queue = append(s.queue, op.Revoke{Num: s.issued, Kind: kind, Ino: ino, Name: name})
	s.pending[key{ino, kind, name}] = s.issued
	s.marks[ino]++
	if s.wake != nil {
		s.wake()
	}
	return s.issued
}

// revoke takes the lease of h on ino, or with a name no more than that, and
// returns the number of the revocation to wait for. For a change of its own the session keeps
// the lease: its kernel knows what it has asked for.
func (t *Table) revoke(h *holder, ino sealfs.Ino, name string, own bool) uint64 {
	s := h.s
	if num, ok := s.pending[key{ino, op.RevokeInode, ""}]; ok {
		return num
	}
	if own {
		if num, ok := s.pending[key{ino, op.RevokeOwn, name}]; ok {
			return num
		}
		return t.issue(s, op.RevokeOwn, ino, name)
	}
	if name != "" {
		if num, ok := s.pending[key{ino, op.RevokeName, name}]; ok {
			return num
		}
		if h.taken < takenMax {
			h.taken++
			return t.issue(s, op.RevokeName, ino, name)
		}
	}
	if h.mode == write {
		t.recall(h, ino) // what is delayed comes first
	}
	return t.issue(s, op.RevokeInode, ino, "")
}

// recall takes Write from h.
func (t *Table) recall(h *holder, ino sealfs.Ino) uint64 {
	for _, kind := range [...]op.RevokeKind{op.RevokeInode, op.RecallWrite} {
		if num, ok := h.s.pending[key{ino, kind, ""}]; ok {
			return num
		}
	}
	return t.issue(h.s, op.RecallWrite, ino, "")
}

// acknowledge notes that s has carried out all revocations up to off.
func (t *Table) acknowledge(s *session, off uint64) {
	if off <= s.acked {
		return
	}
	s.acked = off
	n := 0
	for ; n < len(s.queue) && s.queue[n].Num <= off; n++ {
		r := &s.queue[n]
		delete(s.pending, key{r.Ino, r.Kind, r.Name})
		if s.marks[r.Ino]--; s.marks[r.Ino] == 0 {
			delete(s.marks, r.Ino)
		}
		switch r.Kind {
		case op.RevokeInode:
			t.dropHolder(s, r.Ino)
		case op.RecallWrite:
			t.lower(s, r.Ino)
		}
	}
	if s.queue = s.queue[n:]; len(s.queue) == 0 {
		s.queue = nil
	}
	s.tell()
}

// tell wakes the tickets that have all they wait for.
func (s *session) tell() {
	for k := range s.tickets {
		if k.ready() && k.wake != nil {
			k.wake()
		}
	}
}

// End ends the sessions that match: they hold nothing any more, and never will.
func (t *Table) End(match func(sealfs.Session) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	ended := 0
	for id, s := range t.sessions {
		if !match(id) {
			continue
		}
		delete(t.sessions, id)
		t.live.Add(-1)
		ended++
		if t.gone[id] = struct{}{}; len(t.order) >= goneMax {
			delete(t.gone, t.order[0])
			t.order = t.order[1:]
		}
		t.order = append(t.order, id)
		s.ended = true
		if s.wake != nil {
			s.wake()
		}
		s.tell()
	}
	if ended == 0 {
		return
	}
	looked := 0
	for ino, in := range t.inodes {
		if looked++; looked%sweepStep == 0 {
			// Others may change the table meanwhile, as a loop over a map allows.
			t.mu.Unlock()
			t.mu.Lock()
			if in = t.inodes[ino]; in.len() == 0 {
				continue
			}
		}
		before := in.len()
		for k := before - 1; k >= 0; k-- {
			if in.at(k).s.ended {
				in.drop(k)
			}
		}
		if now := in.len(); now < before {
			t.held -= before - now
			t.put(ino, &in)
		}
	}
}

// Watcher is one Watch that waits.
type Watcher struct {
	s   *session
	num uint64
}

// Watch takes a Watch of a session: it has carried out its revocations up to
// off, and believes nothing any more of the inodes in drops. seq numbers what the
// session sends here, 0 if it does not; an older one than was seen does nothing.
// wake is called, under the table's mutex, when Poll may have something new; it must
// neither block nor call the table.
//
// It returns ErrInvalid for a number that this incarnation has not issued, and
// ErrSession for a session that has ended.
func (t *Table) Watch(sess sealfs.Session, seq, off uint64, drops []sealfs.Ino, wake func()) (Watcher, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, gone := t.gone[sess]; gone || sess == 0 {
		return Watcher{}, fmt.Errorf("session %d does not live: %w", sess, sealfs.ErrSession)
	}
	s := t.sessions[sess]
	issued := t.base
	if s != nil {
		issued = s.issued
	}
	if off != 0 && off < t.base || off > issued || s == nil && off != 0 {
		return Watcher{}, fmt.Errorf("session %d has carried out revocation %d, the last of this run is %d: %w", sess, off, issued, sealfs.ErrInvalid)
	}
	if s == nil {
		s = t.join(sess)
	}
	if seq != 0 && seq <= s.seq && t.faults&faultLateWatch == 0 {
		return Watcher{s, 0}, nil // its answer is not waited for any more
	}
	s.seq = max(s.seq, seq)
	t.acknowledge(s, off)
	for _, ino := range drops {
		t.dropHolder(s, ino)
	}
	s.fresh = s.fresh || len(drops) > 0 // the session waits for it: see op.Watch
	if s.wake != nil {
		s.wake()
	}
	s.watch++
	s.wake = wake
	return Watcher{s, s.watch}, nil
}

// join makes a session one that may hold leases.
func (t *Table) join(sess sealfs.Session) *session {
	s := &session{
		id: sess, issued: t.base, acked: t.base, fresh: true,
		pending: map[key]uint64{}, marks: map[sealfs.Ino]int{}, tickets: map[*Ticket]struct{}{},
	}
	t.sessions[sess] = s
	t.live.Add(1)
	return s
}

// Restore gives a session that registers the lease Write that it has delayed writes to ino under:
// they must be taken from it before anybody is told of ino. Where others hold something by now it has
// come too late, and gets nothing.
func (t *Table) Restore(sess sealfs.Session, ino sealfs.Ino) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, gone := t.gone[sess]; gone || sess == 0 {
		return
	}
	s := t.sessions[sess]
	if s == nil {
		s = t.join(sess)
	}
	in := t.inodes[ino]
	mine := in.find(s)
	switch {
	case mine != nil && in.len() == 1:
		mine.mode = write
	case in.len() == 0 && t.held < t.max:
		in.add(holder{s: s, mode: write})
		t.held++
	default:
		return
	}
	t.put(ino, &in)
}

// Bounds of the answer to one Watch, in revocations and in bytes of names.
const (
	revokesMax = op.RevokesMax
	namesMax   = 32 << 10
)

// Poll appends to revs what w has to be told, and reports whether there is nothing
// yet: then it may be asked again. stamp is the number of the last revocation
// that was issued to the session. ErrSession says that the session has ended.
func (t *Table) Poll(w Watcher, revs []op.Revoke) (_ []op.Revoke, stamp uint64, wait bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := w.s
	switch {
	case s.ended:
		return revs, 0, false, fmt.Errorf("session %d has ended: %w", s.id, sealfs.ErrSession)
	case w.num != s.watch:
		return revs, s.issued, false, nil // a newer one has come
	}
	names := 0
	for i := range s.queue {
		if names += len(s.queue[i].Name); names > namesMax && i > 0 || i == revokesMax {
			break
		}
		revs = append(revs, s.queue[i])
	}
	if t.faults&faultAckSent != 0 && len(revs) > 0 {
		t.acknowledge(s, revs[len(revs)-1].Num)
	}
	wait = len(revs) == 0 && !s.fresh
	if !wait {
		s.fresh = false
	}
	return revs, s.issued, wait, nil
}
