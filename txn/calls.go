package txn

import "sealfs"

// Calls keeps apart the requests of sessions for the same change. A client that
// lost an answer asks again, while the first request may still wait for a
// transaction, be one, or lie in a buffer of the old connection. If both ran, one
// could find done what the other did, and be refused; or one be refused, and
// the other do it later. A success leaves a row in the namespace, a refusal leaves none:
// so it is remembered here, until the session has its answer. The memory may go with the
// process, whose connections go with it.
//
// A Calls is not safe for concurrent use. The zero Calls is ready.
type Calls struct {
	sessions map[sealfs.Session]*calls
}

type calls struct {
	low   uint64 // the session has answers to all below
	bySeq map[uint64]*Call
	// refused says that something was refused: then low is remembered, so that a
	// late copy of it is refused as well.
	refused bool
}

// Call is a change of a session that was asked for.
type Call struct {
	Done <-chan struct{} // closed when it was answered
	Code sealfs.Code     // then: why it was refused; 0: ask again, it has left a row if it was done

	done chan struct{}
}

// Enter announces a request for the change seq of a session that has all
// answers below low. first says that the caller is to execute it, and to call Leave.
// Otherwise it waits for the Call's Done, and then answers its Code, or
// enters again if that is 0. ErrStale: the session has had the answer.
func (c *Calls) Enter(session sealfs.Session, seq, low uint64) (call *Call, first bool, err error) {
	if c.sessions == nil {
		c.sessions = map[sealfs.Session]*calls{}
	}
	s := c.sessions[session]
	if s == nil {
		s = &calls{bySeq: map[uint64]*Call{}}
		c.sessions[session] = s
	}
	if low > s.low {
		s.low = low
		for n, call := range s.bySeq {
			if n < low && call.Code != 0 {
				delete(s.bySeq, n)
			}
		}
	}
	if seq < s.low {
		return nil, false, sealfs.ErrStale
	}
	if call = s.bySeq[seq]; call != nil {
		return call, false, nil
	}
	done := make(chan struct{})
	call = &Call{Done: done, done: done}
	s.bySeq[seq] = call
	return call, true, nil
}

// Leave says how the change that was entered first was answered: with a code of
// the reply, 0 if it was done or not answered at all.
func (c *Calls) Leave(session sealfs.Session, seq uint64, call *Call, code sealfs.Code) {
	s := c.sessions[session]
	if s == nil || s.bySeq[seq] != call {
		return // the session has ended, and what waited for call knows it
	}
	if call.Code = code; code == 0 || seq < s.low {
		delete(s.bySeq, seq)
	} else {
		s.refused = true
	}
	close(call.done)
	if len(s.bySeq) == 0 && !s.refused {
		// Its rows in the namespace tell all there is to tell.
		delete(c.sessions, session)
	}
}

// End forgets the sessions that match.
func (c *Calls) End(match func(sealfs.Session) bool) {
	for session, s := range c.sessions {
		if !match(session) {
			continue
		}
		delete(c.sessions, session)
		for _, call := range s.bySeq {
			if call.Code == 0 {
				close(call.done)
			}
		}
	}
}
