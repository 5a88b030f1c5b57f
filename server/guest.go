package server

import (
	"context"

	"sealfs"
	"sealfs/op"
)

// Guests returns the handler for clients outside of this process. It refuses
// what only the server itself may ask for: requests that free what others hold.
// Fields that the primary resolves are resolved anew whatever a client says.
func (s *Server) Guests() op.Handler { return guests{s} }

type guests struct{ s *Server }

func (g guests) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	switch req.Type {
	case op.MakeRoot, op.DropVolume, op.DropSession, op.Reclaim, op.Purge,
		op.Prepare, op.Commit, op.Abort, op.Forget, op.Resolve, op.Ancestors:
		rep.Code = sealfs.ErrPerm
		return nil
	}
	if req.Session == volumeSession {
		rep.Code = sealfs.ErrPerm
		return nil
	}
	return g.s.Do(ctx, req, rep)
}
