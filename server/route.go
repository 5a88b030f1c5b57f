package server

import (
	"context"
	"fmt"

	"sealfs"
	"sealfs/cluster"
	"sealfs/meta"
	"sealfs/op"
)

// routes says for one version of the map which of the server's stores holds
// which shard.
type routes struct {
	m     *cluster.Map
	of    []*store // by shard; nil: another server's
	alone bool     // there is one store in the cluster that holds shards, or no map
	only  *store   // without a map
}

// routes returns the routes of the current map.
func (s *Server) routes() *routes {
	var m *cluster.Map
	if s.o.Map != nil {
		m = s.o.Map()
	}
	if w := s.way.Load(); w != nil && w.m == m {
		return w
	}
	return s.buildRoutes(m)
}

func (s *Server) buildRoutes(m *cluster.Map) *routes {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := &routes{m: m, alone: true}
	if m == nil {
		if len(s.stores) == 0 {
			return w // the first store is being opened
		}
		w.only = s.stores[0]
		s.way.Store(w)
		return w
	}
	byIndex := make(map[uint16]*store)
	for _, st := range s.stores {
		if i := m.StoreIndex(st.ID()); i >= 0 {
			byIndex[uint16(i)] = st
		}
	}
	w.of = make([]*store, len(m.Table))
	for shard := range m.Table {
		if row := m.Table[shard].Replicas; len(row) > 0 {
			w.of[shard] = byIndex[row[0]]
			w.alone = w.alone && row[0] == m.Table[0].Replicas[0]
		} else {
			w.alone = false
		}
	}
	s.way.Store(w)
	return w
}

// route returns the store that is responsible for a request.
func (s *Server) route(req *op.Request) (*store, error) {
	if uint32(req.Shard) >= s.o.Shards {
		return nil, fmt.Errorf("shard %d of %d: %w", req.Shard, s.o.Shards, sealfs.ErrInvalid)
	}
	w := s.routes()
	if w.m == nil {
		if s.o.Map != nil || w.only == nil {
			return nil, fmt.Errorf("where shard %d lies is not known yet: %w", req.Shard, sealfs.ErrUnavailable)
		}
		return w.only, nil
	}
	if int(req.Shard) >= len(w.m.Table) {
		return nil, fmt.Errorf("shard %d is not in the cluster map: %w", req.Shard, sealfs.ErrInvalid)
	}
	if row := &w.m.Table[req.Shard]; row.Epoch != req.Epoch {
		return nil, fmt.Errorf("shard %d is at epoch %d, the request at %d: %w", req.Shard, row.Epoch, req.Epoch, sealfs.ErrStale)
	}
	if st := w.of[req.Shard]; st != nil {
		return st, nil
	}
	return nil, fmt.Errorf("shard %d lies on another server: %w", req.Shard, sealfs.ErrStale)
}

// config returns what the namespace has to know of where things lie, for one operation.
func (st *store) config() meta.Config {
	c := st.srv.cfg
	if !st.srv.routes().alone {
		c.Local = st.isLocal
	}
	c.Guard = st.guard
	c.Queued = st.queued
	return c
}

// local reports whether the store holds a shard.
func (st *store) local(shard sealfs.Shard) bool {
	w := st.srv.routes()
	return w.m == nil || int(shard) < len(w.of) && w.of[shard] == st
}

// peers returns who sends requests to whichever store holds their shard.
func (s *Server) peers() op.Handler {
	if s.o.Peers != nil {
		return s.o.Peers
	}
	return (*self)(s)
}

// self is a server that is alone: it fills in the epoch as a router does.
type self Server

// Do answers a request of the server to itself.
func (p *self) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	s := (*Server)(p)
	req.Epoch = s.epoch(req.Shard)
	return s.Do(ctx, req, rep)
}

// primary returns which store of the map holds a shard, -1 if that is not known.
func (s *Server) primary(shard sealfs.Shard) int {
	w := s.routes()
	if w.m == nil || int(shard) >= len(w.m.Table) || len(w.m.Table[shard].Replicas) == 0 {
		return -1
	}
	return int(w.m.Table[shard].Replicas[0])
}
