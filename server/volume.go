package server

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
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
func (st *store) pay(t op.Type, cs []charge) bool {
	for _, c := range cs {
		if c.bytes <= 0 && c.inodes <= 0 || t == op.Commit || t == op.Partition {
			continue // what was voted for is paid for, and partitions are nobody's wish
		}
		v := st.srv.volumeInfo(c.volume)
		if v == nil || v.Bytes == 0 && v.Inodes == 0 {
			continue
		}
		bytes, inodes := st.srv.Usage(c.volume)
		if st.srv.o.Others != nil {
			b, i := st.srv.o.Others(c.volume)
			bytes, inodes = bytes+b, inodes+i
		}
		if c.bytes > 0 && v.Bytes != 0 && uint64(bytes+c.bytes) > v.Bytes ||
			c.inodes > 0 && v.Inodes != 0 && uint64(inodes+c.inodes) > v.Inodes {
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

// statfs answers with what the volume holds on this store and what the store
// has room for. The limits of the volume are for who adds the stores up.
func (st *store) statfs(req *op.Request, rep *op.Reply) {
	s := st.Stats()
	u := st.usage.get(req.Volume)
	free := uint64(max(s.Usable-s.Live, 0))
	ifree := uint64(max(st.regionMax()-int64(s.Region.Used)*sealfs.BlockSize, 0)) / bytesPerInode
	rep.Space = op.Space{Bytes: uint64(max(u.bytes, 0)) + free, BytesFree: free, Inodes: uint64(max(u.inodes, 0)) + ifree, InodesFree: ifree}
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

// rootShard is where the root directory of a volume lies.
func rootShard(v sealfs.Volume, shards uint32) sealfs.Shard {
	return sealfs.Shard(uint32(v) * 2654435761 >> 8 & (shards - 1))
}

// MakeRoot has the root directory of a volume made by whichever store it
// belongs to, or finds the one made before. It is durable on return. h sends
// requests to the stores, for a server of the cluster.
func MakeRoot(ctx context.Context, h op.Handler, shards uint32, v sealfs.Volume, mode, uid, gid uint32) (sealfs.Ino, error) {
	req := op.Request{
		Type: op.MakeRoot, Volume: v, Shard: rootShard(v, shards),
		Mode: mode, UID: uid, GID: gid, Session: volumeSession, Seq: uint64(v),
	}
	rep, err := ask(ctx, h, &req)
	if err != nil {
		return 0, fmt.Errorf("root of volume %d: %w", v, err)
	}
	_, err = ask(ctx, h, &op.Request{Type: op.Sync, Shard: req.Shard})
	return rep.Attr.Ino, err
}

// ask sends a request that must succeed.
func ask(ctx context.Context, h op.Handler, req *op.Request) (*op.Reply, error) {
	rep := &op.Reply{}
	if err := h.Do(ctx, req, rep); err != nil {
		return rep, err
	}
	return rep, rep.Err()
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
// bounded steps, on all stores. progress, if not nil, hears how many shards are done. It can
// be called again after a crash or a cancelled ctx. It is durable on return.
func DropVolume(ctx context.Context, h op.Handler, shards uint32, v sealfs.Volume, progress func(done int)) error {
	if err := dropShards(ctx, h, shards, v, progress); err != nil {
		return err
	}
	// A write under way may have left a chunk in a shard that was done, as long as
	// its file was there. Now no file is.
	if err := dropShards(ctx, h, shards, v, nil); err != nil {
		return err
	}
	// A flush costs little where nothing is new, and there are fewer stores than shards.
	for shard := range shards {
		if _, err := ask(ctx, h, &op.Request{Type: op.Sync, Shard: sealfs.Shard(shard)}); err != nil {
			return err
		}
	}
	return nil
}

func dropShards(ctx context.Context, h op.Handler, shards uint32, v sealfs.Volume, progress func(done int)) error {
	for shard := range shards {
		for from := sealfs.Ino(0); ; {
			if err := ctx.Err(); err != nil {
				return err
			}
			rep, err := ask(ctx, h, &op.Request{Type: op.DropVolume, Volume: v, Ino: from, Shard: sealfs.Shard(shard)})
			if err != nil {
				return fmt.Errorf("shard %d of volume %d: %w", shard, v, err)
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

// MakeRoot is MakeRoot of a volume whose stores are all in this cluster.
func (s *Server) MakeRoot(ctx context.Context, v sealfs.Volume, mode, uid, gid uint32) (sealfs.Ino, error) {
	return MakeRoot(ctx, s.peers(), s.o.Shards, v, mode, uid, gid)
}

// DropVolume is DropVolume by way of this server.
func (s *Server) DropVolume(ctx context.Context, v sealfs.Volume, progress func(done int)) error {
	return DropVolume(ctx, s.peers(), s.o.Shards, v, progress)
}

// Usage returns what a volume holds.
func (s *Server) Usage(v sealfs.Volume) (bytes, inodes int64) {
	for _, st := range s.all() {
		c := st.usage.get(v)
		bytes += c.bytes
		inodes += c.inodes
	}
	return bytes, inodes
}

// VolumeUsage is what one volume holds on the stores of a server.
type VolumeUsage struct {
	ID            sealfs.Volume
	Bytes, Inodes int64
}

// Usages returns what each volume holds here, by its number.
func (s *Server) Usages() []VolumeUsage {
	sum := map[sealfs.Volume]VolumeUsage{}
	for _, st := range s.all() {
		st.usage.mu.Lock()
		for v, c := range st.usage.of {
			u := sum[v]
			sum[v] = VolumeUsage{v, u.Bytes + c.bytes, u.Inodes + c.inodes}
		}
		st.usage.mu.Unlock()
	}
	list := slices.Collect(maps.Values(sum))
	slices.SortFunc(list, func(a, b VolumeUsage) int { return cmp.Compare(a.ID, b.ID) })
	return list
}
