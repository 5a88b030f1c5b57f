package crash

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing/synctest"
	"time"

	"sealfs"
	"sealfs/cluster"
	"sealfs/disk"
	"sealfs/fsck"
	"sealfs/internal/enc"
	"sealfs/internal/turn"
	"sealfs/lsfs"
	"sealfs/op"
	"sealfs/pmem"
	"sealfs/pmem/layout"
	"sealfs/server"
)

const (
	shards = 8
	volume = sealfs.Volume(1)
)

// geometry is the shape of the stores of a sequence, small enough that a state is
// judged within milliseconds.
type geometry struct {
	stores   int
	segment  uint32 // bytes
	segments int    // of each store
	region   int64  // bytes
	log      lsfs.Options
	durable  bool // every answer survives a power cut
	chunks   bool // files may have chunks
	// dir is where the rings of the stores lie, "": in memory. Only in files do they
	// survive the death of the process.
	dir string
}

// rings are what the death of a process leaves of the stores' rings; nil: nothing.
type rings [][]byte

func (g *geometry) ringPath(i int) string {
	if g.dir == "" {
		return ""
	}
	return filepath.Join(g.dir, fmt.Sprint("ring", i))
}

// rings reads what is there now.
func (g *geometry) rings() (r rings) {
	for i := range g.stores {
		if b, err := os.ReadFile(g.ringPath(i)); err == nil {
			r = append(r, b)
		}
	}
	if len(r) < g.stores {
		return nil // at the very beginning, or it is none of files
	}
	return r
}

// put makes the rings be what a process finds.
func (g *geometry) put(r rings) error {
	for i := range g.stores {
		if g.dir == "" {
			break
		}
		if err := os.Remove(g.ringPath(i)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if r == nil {
			continue
		}
		if err := os.WriteFile(g.ringPath(i), r[i], 0o600); err != nil {
			return err
		}
	}
	return nil
}

// rebooted returns rings that were left in an earlier boot.
func (r rings) rebooted() rings {
	old := make(rings, len(r))
	for i := range r {
		b := slices.Clone(r[i])
		b[bootIDOff]++
		binary.LittleEndian.PutUint32(b[layout.StagingCRCOff:], enc.CRC(0, b[:layout.StagingCRCOff]))
		old[i] = b
	}
	return old
}

// bootIDOff is where the boot stands in the header of a ring.
const bootIDOff = 32

var clusterID = sealfs.UUID{0xc1}

func storeID(i int) sealfs.UUID { return sealfs.UUID{1, byte(i)} }

// media are what a power cut leaves of the stores: of store i, medium 2i is the
// device and 2i+1 the region.
type media []*disk.Sim

func (m media) clone() media {
	c := make(media, len(m))
	for i := range m {
		c[i] = m[i].Clone()
	}
	return c
}

// format makes empty stores.
func (g *geometry) format() (media, error) {
	var m media
	for i := range g.stores {
		dev := disk.NewSim(fmt.Sprint("device", i), 1<<20+int64(g.segments)*int64(g.segment))
		reg := disk.NewSim(fmt.Sprint("region", i), g.region)
		m = append(m, dev, reg)
		if err := g.formatStore(i, dev, reg); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (g *geometry) formatStore(i int, dev, reg *disk.Sim) error {
	_, err := lsfs.Format(dev, pmem.NewMemory(reg), lsfs.Geometry{Store: storeID(i), Cluster: clusterID, SegmentBytes: g.segment, Label: "crash"})
	return err
}

// world is a server on media. It lives in a bubble of testing/synctest: time passes
// only when all of it waits. Its goroutines take turns (internal/turn): who drives it
// has lane 0, and whatever takes time takes whole turn.Periods.
type world struct {
	g    *geometry
	m    media
	srv  *server.Server
	root sealfs.Ino
	cmap atomic.Pointer[cluster.Map]
}

// open recovers the stores on m, after what the clock says: in every bubble it
// begins in the same year.
func (g *geometry) open(m media, clock int64) (*world, error) {
	<-time.After(time.Until(time.Unix(0, clock).Truncate(turn.Period).Add(turn.Period)))
	w := &world{g: g, m: m}
	o := server.Options{Shards: shards, Durable: g.durable, Logger: slog.New(slog.DiscardHandler), Turns: turn.Simulated(1), Random: numbers(uint64(clock))}
	if g.stores > 1 {
		cm := &cluster.Map{Version: 1, Cluster: clusterID, Name: "crash", Shards: shards, Replicas: 1, NextVolume: 2}
		for i := range g.stores {
			cm.Stores = append(cm.Stores, cluster.StoreInfo{ID: storeID(i), Weight: 1, State: cluster.StoreUp})
		}
		for s := range shards {
			cm.Table = append(cm.Table, cluster.ShardInfo{Replicas: []uint16{uint16(s % g.stores)}})
		}
		w.cmap.Store(cm)
		o.Map = w.cmap.Load
	}
	for i := range g.stores {
		log := g.log
		log.Turns = turn.Simulated(20 * (i + 1))
		o.Stores = append(o.Stores, server.StoreOptions{Log: log, Staging: g.ringPath(i), Dev: m[2*i], Reg: pmem.NewMemory(m[2*i+1])})
	}
	var err error
	if w.srv, err = server.Open(context.Background(), o); err != nil {
		return nil, err
	}
	// Making the root finds the one that is there.
	if w.root, err = w.srv.MakeRoot(context.Background(), volume, 0o755, 0, 0); err != nil {
		return nil, errors.Join(err, w.srv.Close())
	}
	if cm := w.cmap.Load(); cm != nil {
		next := *cm
		next.Volumes = []cluster.VolumeInfo{{ID: volume, Name: "v", Root: w.root, State: cluster.VolumeReady}}
		w.cmap.Store(&next)
	}
	return w, nil
}

// numbers returns numbers that depend on the seed alone.
func numbers(seed uint64) func() uint64 {
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(seed, 5))
	return func() uint64 {
		mu.Lock()
		defer mu.Unlock()
		return rng.Uint64()
	}
}

// Do answers a request.
func (w *world) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	return w.srv.Do(ctx, req, rep)
}

// settle waits until nothing goes on that does not wait for time to pass; with
// several stores also until transactions have come to their end.
func (w *world) settle() {
	<-time.After(time.Millisecond) // many turns of all goroutines
	synctest.Wait()
	if w.g.stores > 1 {
		<-time.After(3 * time.Second)
		synctest.Wait()
	}
}

// storeOf returns on which store a shard lies.
func (g *geometry) storeOf(s sealfs.Shard) int { return int(s) % g.stores }

// address fills in the shard of a request as a client does.
func address(req *op.Request) {
	at := req.Dir
	if at == 0 {
		at = req.Ino
	}
	switch {
	case at == 0:
	case req.Type == op.Read || req.Type == op.Write:
		req.Shard = at.DataShard(req.Off, shards)
	default:
		req.Shard = at.Home(shards)
	}
	req.Volume = volume
}

// check judges the media with fsck.
func (g *geometry) check(m media) (*fsck.Together, error) {
	var o []fsck.Options
	for i := range g.stores {
		o = append(o, fsck.Options{Dev: m[2*i], Reg: m[2*i+1], Staging: g.ringPath(i), Shards: shards})
	}
	var l *fsck.Layout
	if g.stores > 1 {
		l = &fsck.Layout{Cluster: clusterID}
		for s := range sealfs.Shard(shards) {
			l.Store = append(l.Store, storeID(g.storeOf(s)))
		}
	}
	t, err := fsck.CheckAll(context.Background(), o, l)
	return t, errors.Join(append(t.Errors, err)...)
}
