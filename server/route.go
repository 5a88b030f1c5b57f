package server

import (
	"fmt"

	"sealfs"
	"sealfs/op"
)

// route returns the store that is responsible for a request. Here the epoch of
// the shard is compared and, once a server owns several stores or there are
// several servers, here it is decided whether the parties of a request lie on
// one store. Two-phase commit between stores will begin here.
func (s *Server) route(req *op.Request) (*store, error) {
	if uint32(req.Shard) >= s.o.Shards {
		return nil, fmt.Errorf("shard %d of %d: %w", req.Shard, s.o.Shards, sealfs.ErrInvalid)
	}
	if s.o.Map != nil {
		if m := s.o.Map(); m != nil && int(req.Shard) < len(m.Table) && m.Table[req.Shard].Epoch != req.Epoch {
			return nil, fmt.Errorf("shard %d is at epoch %d, the request at %d: %w", req.Shard, m.Table[req.Shard].Epoch, req.Epoch, sealfs.ErrStale)
		}
	}
	return s.stores[0], nil
}
