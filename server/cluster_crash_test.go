package server

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/op"
)

// blackout samples moments at which the power of all stores goes at once.
type blackout struct {
	mu          sync.Mutex
	w           *world
	rng         *rand.Rand
	every, seen int
	acked       map[string]bool // directories whose mkdir on another store was answered
	dark        []darkness
}

type darkness struct {
	dev, reg []*disk.Sim
	acked    []string
}

func (b *blackout) hook(disk.Op) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.seen++; b.seen%b.every != 0 || len(b.dark) > 40 {
		return
	}
	var d darkness
	for name := range b.acked {
		d.acked = append(d.acked, name)
	}
	one := func(s *disk.Sim) *disk.Sim {
		var last *disk.Sim
		pick := 1 + b.rng.IntN(3)
		for c := range s.CrashStates(b.rng, pick) {
			last = c
		}
		return last
	}
	for i := range b.w.dev {
		d.dev, d.reg = append(d.dev, one(b.w.dev[i])), append(d.reg, one(b.w.reg[i]))
	}
	b.dark = append(b.dark, d)
}

// judge starts the cluster anew from what a blackout left.
func (b *blackout) judge(t *testing.T, d *darkness) {
	t.Helper()
	w := &world{t: t, rng: rand.New(rand.NewPCG(1, 1)), pace: testPace, of: b.w.of, dev: d.dev, reg: d.reg, root: b.w.root, srv: make([]atomic.Pointer[Server], len(b.w.srv))}
	w.m.Store(b.w.m.Load())
	for i := range w.srv {
		w.start(i, nil)
	}
	w.settle()
	w.check()
	for _, name := range d.acked {
		rep := op.Reply{}
		req := op.Request{Type: op.Lookup, Dir: w.root, Name: name, Shard: w.root.Home(testShards), Volume: 1}
		if err := w.Do(context.Background(), &req, &rep); err != nil || rep.Code != 0 {
			t.Errorf("directory %s, made on two stores and answered, is gone: %v %v", name, err, rep.Code)
		}
	}
	for i := range w.srv {
		if err := w.srv[i].Load().Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestCrashCluster: the power of all stores goes at any moment; afterwards an
// operation over several stores has happened on all of them or on none, and on
// all if it was answered.
func TestCrashCluster(t *testing.T) {
	steps := 1500
	if testing.Short() {
		steps = 300
	}
	w := newWorld(t, 3, 1, 1, 1)
	b := &blackout{w: w, rng: rand.New(rand.NewPCG(4, 4)), every: 7, acked: map[string]bool{}}
	for i := range w.dev {
		w.dev[i].SetHook(b.hook)
		w.reg[i].SetHook(b.hook)
	}
	tw := newTwinWorld(t, 5, w)
	judged := 0
	for i := range steps {
		tw.step()
		if i%10 == 0 {
			name := fmt.Sprint("made", i)
			shard := sealfs.Shard(tw.rng.IntN(testShards))
			rep := tw.do(op.Request{Type: op.Mkdir, Dir: w.root, Name: name, Mode: 0o755, Shard2: shard})
			if rep.Code == 0 && int(shard)%3 != int(w.root.Home(testShards))%3 {
				b.mu.Lock()
				b.acked[name] = true
				b.mu.Unlock()
			}
		}
		b.mu.Lock()
		dark := b.dark
		b.dark = nil
		b.mu.Unlock()
		for k := range dark {
			b.judge(t, &dark[k])
			judged++
		}
		if t.Failed() {
			t.Fatalf("at step %d", i)
		}
	}
	for i := range w.dev {
		w.dev[i].SetHook(nil)
		w.reg[i].SetHook(nil)
	}
	t.Logf("%d blackouts, %d answered directories on two stores", judged, len(b.acked))
	if judged < steps/30 || len(b.acked) < steps/30 {
		t.Error("the test did not reach its point")
	}
}

// TestClusterConflicts: many who rename, make and remove the same few
// directories over five stores get answers, and leave a sound tree.
func TestClusterConflicts(t *testing.T) {
	w := newWorld(t, 6, 2, 2, 1)
	ctx, stop := context.WithTimeout(context.Background(), 2*time.Minute)
	defer stop()
	each := 1500
	if testing.Short() {
		each = 200
	}
	var mu sync.Mutex
	dirs := []sealfs.Ino{w.root}
	var work sync.WaitGroup
	for g := range 8 {
		work.Go(func() {
			rng := rand.New(rand.NewPCG(7, uint64(g)))
			for range each {
				mu.Lock()
				dir, dir2 := dirs[rng.IntN(len(dirs))], dirs[rng.IntN(len(dirs))]
				mu.Unlock()
				name, name2 := fmt.Sprint("n", rng.IntN(4)), fmt.Sprint("n", rng.IntN(4))
				req := op.Request{Dir: dir, Name: name, Mode: 0o755, Shard: dir.Home(testShards), Volume: 1}
				switch rng.IntN(6) {
				case 0, 1:
					req.Type, req.Shard2 = op.Mkdir, sealfs.Shard(rng.IntN(testShards))
				case 2:
					req.Type = op.Rmdir
				case 3:
					req.Type = op.Create
				case 4, 5:
					req.Type, req.Dir2, req.Name2 = op.Rename, dir2, name2
					req.Flags = []op.Flags{0, op.NoReplace, op.Exchange}[rng.IntN(3)]
				}
				var rep op.Reply
				err := w.Do(ctx, &req, &rep)
				if errors.Is(err, sealfs.ErrInterrupted) {
					t.Errorf("%v is not answered in two minutes", req.Type)
					return
				}
				if err != nil {
					t.Errorf("%v: %v", req.Type, err)
					return
				}
				switch rep.Code {
				case 0, sealfs.ErrExist, sealfs.ErrNotExist, sealfs.ErrNotDir, sealfs.ErrIsDir, sealfs.ErrNotEmpty, sealfs.ErrInvalid:
				default:
					t.Errorf("%v: %v", req.Type, rep.Code)
				}
				if req.Type == op.Mkdir && rep.Code == 0 {
					mu.Lock()
					if dirs = append(dirs, rep.Attr.Ino); len(dirs) > 9 {
						dirs = append(dirs[:1], dirs[len(dirs)-7:]...)
					}
					mu.Unlock()
				}
			}
		})
	}
	work.Wait()
}
