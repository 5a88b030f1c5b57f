package server

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"sealfs"
	"sealfs/op"
)

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
