package server

import (
	"context"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

const testShards = 8

// simServer is a server with one store on simulated devices.
type simServer struct {
	*Server
	dev, region *disk.Sim
	logOptions  lsfs.Options
	root        sealfs.Ino
	peers       op.Handler
}

func newSim(t testing.TB, deviceBytes, segment int64) *simServer {
	t.Helper()
	return newSimOn(t, disk.NewSim("device", deviceBytes), disk.NewSim("region", 32<<20), uint32(segment))
}

func newSimOn(t testing.TB, dev, region *disk.Sim, segment uint32) *simServer {
	t.Helper()
	return newSimWith(t, dev, region, segment, lsfs.Options{StagingBytes: 4 << 20})
}

func newSimWith(t testing.TB, dev, region *disk.Sim, segment uint32, log lsfs.Options) *simServer {
	t.Helper()
	s := &simServer{dev: dev, region: region, logOptions: log}
	if _, err := lsfs.Format(s.dev, pmem.NewMemory(s.region), lsfs.Geometry{SegmentBytes: segment}); err != nil {
		t.Fatal(err)
	}
	s.start(t, nil)
	var err error
	if s.root, err = s.MakeRoot(context.Background(), 1, 0o755, 0, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.check(t)
		if err := s.Close(); err != nil && s.stores[0].Failure() == nil {
			t.Error(err)
		}
	})
	return s
}

func (s *simServer) start(t testing.TB, kept *pmem.Staging) {
	t.Helper()
	s.startOn(t, pmem.NewMemory(s.region), kept)
}

func (s *simServer) startOn(t testing.TB, region pmem.Backing, kept *pmem.Staging) {
	t.Helper()
	s.Server = &Server{o: Options{Shards: testShards, Peers: s.peers}, cfg: meta.Config{Shards: testShards}, log: testLog(t), quit: make(chan struct{}), pace: usualPace}
	st, err := s.attach(s.dev, region, kept, StoreOptions{Device: "device", Region: "region", Log: s.logOptions})
	if err != nil {
		t.Fatal(err)
	}
	s.stores = []*store{st}
	st.run()
}

// check verifies the namespace and the tree under it.
func (s *simServer) check(t testing.TB) {
	t.Helper()
	if s.stores[0].Failure() != nil {
		return
	}
	r := s.stores[0].BeginRead()
	defer s.stores[0].EndRead()
	if err := meta.Check(r, s.cfg, func(p string) { t.Error(p) }); err != nil {
		t.Error(err)
	}
	if err := r.(*pmem.Region).Check(func(p string) { t.Error(p) }); err != nil {
		t.Error(err)
	}
}

// must executes a request that has to succeed.
func (s *simServer) must(t testing.TB, req op.Request) *op.Reply {
	t.Helper()
	rep := s.try(t, req)
	if rep.Code != 0 {
		t.Fatalf("%v: %v", req.Type, rep.Code)
	}
	return rep
}

func (s *simServer) try(t testing.TB, req op.Request) *op.Reply {
	t.Helper()
	address(&req)
	rep := &op.Reply{}
	if err := s.Do(context.Background(), &req, rep); err != nil {
		t.Fatalf("%v: %v", req.Type, err)
	}
	return rep
}

// address fills in the home shard as a client does.
func address(req *op.Request) {
	at := req.Dir
	if at == 0 {
		at = req.Ino
	}
	if at != 0 {
		req.Shard = at.Home(testShards)
	}
	req.Volume = 1
}
