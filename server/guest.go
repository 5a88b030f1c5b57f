package server

import (
	"context"
	"fmt"

	"sealfs"
	"sealfs/op"
)

// Guests returns the handler for clients outside of this process. It refuses
// what only servers may ask for, and sessions that have ended. Fields that the
// primary resolves are resolved anew whatever a client says.
func (s *Server) Guests() op.Handler { return guests{s} }

type guests struct{ s *Server }

// internal are the requests that only servers and managers may send.
var internal = func() (is [256]bool) {
	for _, t := range []op.Type{
		op.MakeRoot, op.DropVolume, op.DropSession, op.Reclaim, op.Prepare, op.Commit, op.Abort, op.Forget, op.Purge, op.Resolve, op.Ancestors,
		op.WaitFor, op.Waiting, op.Grant, op.Recall, op.Tally, op.Split, op.Partition,
	} {
		is[t] = true
	}
	return is
}()

// Do answers a client's request.
func (g guests) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	switch {
	case internal[req.Type] || req.Session == volumeSession:
		rep.Code = sealfs.ErrPerm
		return nil
	case g.s.o.KeepSessions && (req.Session == 0 || g.s.ended(req.Session)):
		rep.Code = sealfs.ErrSession
		return nil
	}
	req.Tx, req.Votes, req.Part, req.Coord = op.Tx{}, nil, 0, 0
	req.Flags &^= op.Walked | op.Purged
	return g.s.Do(ctx, req, rep)
}

// Peer returns the handler for the other servers of the cluster, and for its managers.
func (s *Server) Peer() op.Handler { return peer{s} }

type peer struct{ s *Server }

// Do answers a request of another server. What would wait for ever if the two
// waited for each other is refused: only what is meant for parties comes this way.
func (p peer) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	switch req.Type {
	case op.WaitLock, op.SetLock, op.Open, op.Release, op.Register, op.Watch:
		return fmt.Errorf("%v from a server: %w", req.Type, sealfs.ErrInvalid)
	}
	return p.s.Do(ctx, req, rep)
}
