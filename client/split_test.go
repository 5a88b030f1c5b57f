package client

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sealfs"
	clustermap "sealfs/cluster"
	sealserver "sealfs/server"
)

// apart is how many stores newApart has.
const apart = 4

// newApart makes a server of several stores, on which directories of so many entries are split, and the
// options of its clients.
func newApart(dir, split string, o *Options) (*sealserver.Server, error) {
	limit, err := strconv.ParseUint(split, 10, 64)
	if err != nil {
		return nil, err
	}
	var stores []sealserver.StoreOptions
	for i := range apart {
		name := func(what string) string { return filepath.Join(dir, fmt.Sprint(what, i)) }
		st := sealserver.StoreOptions{Device: name("device"), Region: name("region"), Staging: name("ring")}
		if _, err := sealserver.Format(sealserver.FormatOptions{Device: st.Device, Region: st.Region, Size: 2 << 30}); err != nil {
			return nil, err
		}
		stores = append(stores, st)
	}
	var at atomic.Pointer[clustermap.Map]
	s, err := sealserver.Open(context.Background(), sealserver.Options{Shards: testShards, Stores: stores, Map: at.Load, SplitEntries: limit})
	if err != nil {
		return nil, err
	}
	m := &clustermap.Map{Version: 1, Shards: testShards, Replicas: 1}
	for _, st := range s.Status().Stores {
		m.Stores = append(m.Stores, clustermap.StoreInfo{ID: st.ID, Weight: 1, State: clustermap.StoreUp})
	}
	for shard := range testShards {
		m.Table = append(m.Table, clustermap.ShardInfo{Replicas: []uint16{uint16(shard % apart)}})
	}
	at.Store(m)
	o.Each = func(_ context.Context, fn func(sealfs.Shard) error) error {
		for i := range apart {
			if err := fn(sealfs.Shard(i)); err != nil {
				return err
			}
		}
		return nil
	}
	o.Root, err = s.MakeRoot(context.Background(), 1, 0o755, 0, 0)
	return s, err
}

// startApart is startPair on several stores.
func startApart(t testing.TB, split int) *pair {
	t.Helper()
	needFUSE(t)
	p := &pair{dirs: [2]string{mountDir(t), mountDir(t)}}
	p.server = startServerAt(t, strings.Join(p.dirs[:], ":"), serveEnv+"_STORE="+t.TempDir(), fmt.Sprint(serveEnv, "_SPLIT=", split))
	return p
}

// partitionsOf returns what a mount says of the partitions of a directory.
func partitionsOf(t testing.TB, dir string) string {
	t.Helper()
	var b [1024]byte
	n, err := unix.Getxattr(dir, PartitionsName, b[:])
	if err == unix.ENODATA {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

func TestSplitMountsAgree(t *testing.T)      { mountsAgree(t, startApart(t, 1)) }
func TestSplitMountsAtOnce(t *testing.T)     { mountsAtOnce(t, startApart(t, 4)) }
func TestSplitStatsCostNothing(t *testing.T) { statsCostNothing(t, startApart(t, 1<<30)) }

// TestSplitUnderWay fills a directory from two mounts until it is split, and while that is under way both
// change and read it: what was there all along is seen exactly once, in each reading.
func TestSplitUnderWay(t *testing.T) {
	p := startApart(t, 600)
	dir := func(m int) string { return filepath.Join(p.dirs[m], "d") }
	if err := os.Mkdir(dir(0), 0o755); err != nil {
		t.Fatal(err)
	}
	const kept = 500
	for i := range kept {
		name := filepath.Join(dir(i%2), fmt.Sprint("kept", i))
		if i%50 == 0 {
			if err := os.Mkdir(name, 0o755); err != nil {
				t.Fatal(err)
			}
		} else if err := os.WriteFile(name, []byte(name[len(dir(i%2)):]), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if s := partitionsOf(t, dir(0)); s != "" {
		t.Fatalf("it is split early: %s", s)
	}
	var over atomic.Bool
	var all sync.WaitGroup
	fail := func(format string, args ...any) {
		t.Errorf(format, args...)
		over.Store(true)
	}
	var readings atomic.Int64
	for m := range 2 {
		for w := range 3 {
			all.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(m), uint64(w)))
				mine := map[string]bool{}
				for i := 0; !over.Load(); i++ {
					name := fmt.Sprintf("own%d.%d.%d", m, w, rng.IntN(120))
					path := filepath.Join(dir(rng.IntN(2)), name) // by either mount
					if !mine[name] {
						if err := os.WriteFile(path, []byte(name), 0o644); err != nil {
							fail("create: %v", err)
							return
						}
						mine[name] = true
						continue
					}
					if b, err := os.ReadFile(path); err != nil || string(b) != name {
						fail("%s: %q, %v", path, b, err)
						return
					}
					if rng.IntN(2) == 0 {
						to := fmt.Sprintf("moved%d.%d.%d", m, w, rng.IntN(120))
						if err := os.Rename(path, filepath.Join(filepath.Dir(path), to)); err != nil {
							fail("rename: %v", err)
							return
						}
						if b, err := os.ReadFile(filepath.Join(dir(rng.IntN(2)), to)); err != nil || string(b) != name {
							fail("%s, moved to %s: %q, %v", path, to, b, err)
							return
						}
					} else if err := os.Remove(path); err != nil {
						fail("unlink: %v", err)
						return
					}
					delete(mine, name)
					if _, err := os.Lstat(filepath.Join(dir(rng.IntN(2)), name)); !errors.Is(err, os.ErrNotExist) {
						fail("%s is still there: %v", name, err)
						return
					}
				}
			})
		}
		all.Go(func() {
			for !over.Load() {
				f, err := os.Open(dir(m))
				if err != nil {
					fail("%v", err)
					return
				}
				seen := map[string]int{}
				for {
					names, err := f.Readdirnames(100)
					for _, n := range names {
						seen[n]++
					}
					if err != nil {
						break
					}
				}
				f.Close()
				for i := range kept {
					if n := seen[fmt.Sprint("kept", i)]; n != 1 {
						fail("kept%d was seen %d times, of %d names", i, n, len(seen))
						return
					}
				}
				readings.Add(1)
			}
		})
	}
	await(t, "the directory is not split", func() bool {
		return over.Load() || strings.HasPrefix(partitionsOf(t, dir(0)), "64/64")
	})
	time.AfterFunc(time.Second, func() { over.Store(true) })
	all.Wait()
	if t.Failed() {
		return
	}
	t.Logf("%d readings; %s", readings.Load(), partitionsOf(t, dir(1)))
	for m := range 2 {
		info, err := os.Stat(dir(m))
		if err != nil {
			t.Fatal(err)
		}
		names, err := os.ReadDir(dir(m))
		if err != nil {
			t.Fatal(err)
		}
		st := info.Sys().(*syscall.Stat_t)
		if int64(len(names)) != info.Size() || st.Nlink != 2+kept/50 {
			t.Errorf("%d names, the size is %d; %d links", len(names), info.Size(), st.Nlink)
		}
		for i := range kept {
			if _, err := os.Lstat(filepath.Join(dir(m), fmt.Sprint("kept", i))); err != nil {
				t.Error(err)
			}
		}
	}
	// What it hands down is the same everywhere.
	if err := os.Chmod(dir(1), 0o2775|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir(1), -1, 4242); err != nil {
		t.Skip("only root changes groups")
	}
	for i := range 100 {
		name := filepath.Join(dir(i%2), fmt.Sprint("late", i))
		if err := os.WriteFile(name, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(name); err != nil || info.Sys().(*syscall.Stat_t).Gid != 4242 {
			t.Fatalf("%v, %v", info, err)
		}
	}
	past := time.Unix(1000, 5)
	if err := os.Chtimes(dir(0), past, past); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(dir(1)); err != nil || !info.ModTime().Equal(past) {
		t.Errorf("%v, %v", info.ModTime(), err)
	}
	if err := os.RemoveAll(dir(1)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir(0)); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
