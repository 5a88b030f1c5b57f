package server

import (
	"context"
	"fmt"
	"math"
	"sync"

	"sealfs"
	"sealfs/cluster"
	"sealfs/op"
)

// charge is the change of a volume's usage by one request.
type charge struct {
	volume        sealfs.Volume
	bytes, inodes int64
}

// usage is what the volumes hold on this store: the sum of the shards' usage
// rows, kept so that a limit is checked without reading them.
type usage struct {
	mu sync.Mutex
	of map[sealfs.Volume]charge
}

func (u *usage) add(v sealfs.Volume, bytes, inodes int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.of == nil {
		u.of = map[sealfs.Volume]charge{}
	}
	c := u.of[v]
	u.of[v] = charge{v, c.bytes + bytes, c.inodes + inodes}
}

func (u *usage) get(v sealfs.Volume) charge {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.of[v]
}

// volumeInfo returns what the cluster map says of a volume, nil if it says nothing.
func (s *Server) volumeInfo(v sealfs.Volume) *cluster.VolumeInfo {
	if s.o.Map == nil {
		return nil
	}
	m := s.o.Map()
	if m == nil {
		return nil
	}
	for i := range m.Volumes {
		if m.Volumes[i].ID == v {
			return &m.Volumes[i]
		}
	}
	return nil
}

// pay books charges and reports whether every volume may hold what it then
// holds; if not, nothing is booked.
func (st *store) pay(cs []charge) bool {
	for _, c := range cs {
		if c.bytes <= 0 && c.inodes <= 0 {
			continue
		}
		v := st.srv.volumeInfo(c.volume)
		if v == nil || v.Bytes == 0 && v.Inodes == 0 {
			continue
		}
		u := st.usage.get(c.volume)
		if c.bytes > 0 && v.Bytes != 0 && uint64(u.bytes+c.bytes) > v.Bytes ||
			c.inodes > 0 && v.Inodes != 0 && uint64(u.inodes+c.inodes) > v.Inodes {
			return false
		}
	}
	for _, c := range cs {
		st.usage.add(c.volume, c.bytes, c.inodes)
	}
	return true
}

func (st *store) refund(cs []charge) {
	for _, c := range cs {
		st.usage.add(c.volume, -c.bytes, -c.inodes)
	}
}

// bytesPerInode is a cautious guess of region bytes per file, for statfs.
const bytesPerInode = 300

// statfs answers with the smaller of what the volume may hold and what the
// store has room for.
func (st *store) statfs(req *op.Request, rep *op.Reply) {
	s := st.Stats()
	u := st.usage.get(req.Volume)
	free := uint64(max(s.Usable-s.Live, 0))
	ifree := uint64(max(st.regionMax()-int64(s.Region.Used)*sealfs.BlockSize, 0)) / bytesPerInode
	sp := op.Space{Bytes: uint64(u.bytes) + free, BytesFree: free, Inodes: uint64(u.inodes) + ifree, InodesFree: ifree}
	if v := st.srv.volumeInfo(req.Volume); v != nil {
		if v.Bytes != 0 {
			sp.Bytes = v.Bytes
			sp.BytesFree = min(free, uint64(max(int64(v.Bytes)-u.bytes, 0)))
		}
		if v.Inodes != 0 {
			sp.Inodes = v.Inodes
			sp.InodesFree = min(ifree, uint64(max(int64(v.Inodes)-u.inodes, 0)))
		}
	}
	rep.Space = sp
}

// regionMax returns how large the store's region may grow.
func (st *store) regionMax() int64 {
	if st.opts.Log.RegionMaxBytes != 0 {
		return st.opts.Log.RegionMaxBytes
	}
	return 64 << 30
}

// volumeSession is the session under which volumes' roots are made: its result
// rows make that idempotent, also over restarts.
const volumeSession sealfs.Session = math.MaxUint64

// MakeRoot makes the root directory of a volume, or returns the one made
// before. It is durable on return.
func (s *Server) MakeRoot(ctx context.Context, v sealfs.Volume, mode, uid, gid uint32) (sealfs.Ino, error) {
	req := op.Request{
		Type: op.MakeRoot, Volume: v, Shard: sealfs.Shard(uint32(v) * 2654435761 >> 8 & (s.o.Shards - 1)),
		Mode: mode, UID: uid, GID: gid, Session: volumeSession, Seq: uint64(v),
	}
	req.Epoch = s.epoch(req.Shard)
	var rep op.Reply
	if err := s.Do(ctx, &req, &rep); err != nil {
		return 0, err
	}
	if rep.Code != 0 {
		return 0, fmt.Errorf("root of volume %d: %w", v, rep.Code)
	}
	st, err := s.route(&req)
	if err != nil {
		return 0, err
	}
	return rep.Attr.Ino, st.Sync()
}

func (s *Server) epoch(shard sealfs.Shard) sealfs.Epoch {
	if s.o.Map != nil {
		if m := s.o.Map(); m != nil && int(shard) < len(m.Table) {
			return m.Table[shard].Epoch
		}
	}
	return 0
}

// DropVolume frees everything that belongs to a volume, shard by shard in
// bounded steps. progress, if not nil, hears how many shards are done. It can
// be called again after a crash or a cancelled ctx.
func (s *Server) DropVolume(ctx context.Context, v sealfs.Volume, progress func(done int)) error {
	if err := s.dropShards(ctx, v, progress); err != nil {
		return err
	}
	// A write under way may have left a chunk in a shard that was done, as long as
	// its file was there. Now no file is.
	if err := s.dropShards(ctx, v, nil); err != nil {
		return err
	}
	for _, st := range s.stores {
		st.reclaim.settle()
		if err := st.Sync(); err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) dropShards(ctx context.Context, v sealfs.Volume, progress func(done int)) error {
	for shard := range s.o.Shards {
		for from := sealfs.Ino(0); ; {
			if err := ctx.Err(); err != nil {
				return err
			}
			req := op.Request{Type: op.DropVolume, Volume: v, Ino: from, Shard: sealfs.Shard(shard), Epoch: s.epoch(sealfs.Shard(shard))}
			var rep op.Reply
			if err := s.Do(ctx, &req, &rep); err != nil {
				return err
			}
			if rep.Code != 0 {
				return fmt.Errorf("shard %d of volume %d: %w", shard, v, rep.Code)
			}
			if rep.Eof {
				break
			}
			from = sealfs.Ino(rep.Off)
		}
		if progress != nil {
			progress(int(shard) + 1)
		}
	}
	return nil
}

// Usage returns what a volume holds.
func (s *Server) Usage(v sealfs.Volume) (bytes, inodes int64) {
	for _, st := range s.stores {
		c := st.usage.get(v)
		bytes += c.bytes
		inodes += c.inodes
	}
	return bytes, inodes
}
