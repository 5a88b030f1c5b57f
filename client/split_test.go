package client

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
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
	"sealfs/fsck"
	"sealfs/op"
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
	m.Volumes = []clustermap.VolumeInfo{{ID: 1, Name: "apart", State: clustermap.VolumeReady}}
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
	known := *m
	known.Volumes = slices.Clone(m.Volumes)
	known.Version, known.Volumes[0].Root = 2, o.Root
	at.Store(&known)
	return s, err
}

// startApart is startPair on several stores.
func startApart(t testing.TB, split int) *pair {
	t.Helper()
	needFUSE(t)
	p := &pair{dirs: [2]string{mountDir(t), mountDir(t)}, store: t.TempDir()}
	p.server = startServerAt(t, strings.Join(p.dirs[:], ":"), serveEnv+"_STORE="+p.store, fmt.Sprint(serveEnv, "_SPLIT=", split))
	return p
}

// checkApart ends the server and has fsck look at its stores. It returns how many partitions there are.
func (p *pair) checkApart(t *testing.T) (partitions uint64) {
	t.Helper()
	p.stop(t)
	var stores []fsck.Options
	for i := range apart {
		name := func(what string) string { return filepath.Join(p.store, fmt.Sprint(what, i)) }
		stores = append(stores, fsck.Options{Device: name("device"), Region: name("region"), Shards: testShards})
	}
	all, err := fsck.CheckAll(t.Context(), stores, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i, rep := range all.Stores {
		if all.Errors[i] != nil || !rep.Clean() {
			t.Errorf("store %d: %v, %v", i, all.Errors[i], rep.Found)
		}
		partitions += rep.Partitions
	}
	return partitions
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
	// Another one, which stays.
	other := filepath.Join(p.dirs[0], "e")
	if err := os.Mkdir(other, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 700 {
		if err := os.WriteFile(filepath.Join(other, fmt.Sprint(i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "the other directory is not split", func() bool { return strings.HasPrefix(partitionsOf(t, other), "64/64") })
	if n := p.checkApart(t); n != op.Partitions {
		t.Errorf("%d partitions", n)
	}
}

// hugeEnv says with how many files TestHugeDirectory is done; `make huge` does it with a million.
const hugeEnv = "SEALFS_TEST_HUGE"

// TestHugeDirectory fills one directory from two mounts over four stores, and tells how long it takes to find
// a name while it grows; then it reads it.
func TestHugeDirectory(t *testing.T) {
	total, err := strconv.Atoi(os.Getenv(hugeEnv))
	if err != nil {
		t.Skip(hugeEnv + " does not say how many files there shall be")
	}
	p := startApart(t, 1<<16)
	dir := func(m int) string { return filepath.Join(p.dirs[m], "d") }
	if err := os.Mkdir(dir(0), 0o755); err != nil {
		t.Fatal(err)
	}
	name := func(i int) string { return fmt.Sprintf("file-%08d", i) }
	const workers = 4 // on each mount
	fill := func(from, to int) {
		var all sync.WaitGroup
		for w := range 2 * workers {
			all.Go(func() {
				for i := from + w; i < to; i += 2 * workers {
					fd, err := unix.Open(filepath.Join(dir(w%2), name(i)), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644)
					if err != nil {
						t.Errorf("%s: %v", name(i), err)
						return
					}
					unix.Close(fd)
				}
			})
		}
		all.Wait()
	}
	// look returns medians of the time that it takes to find names that are there, and that are not, with nothing
	// known of them before.
	look := func(n int) (there, absent time.Duration) {
		var took [2][]time.Duration
		for k := range 500 {
			i := rand.IntN(n)
			for what, path := range [...]string{filepath.Join(dir(1-i%2), name(i)), filepath.Join(dir(k%2), fmt.Sprint("none", n, k))} {
				begun := time.Now()
				_, err := os.Lstat(path)
				took[what] = append(took[what], time.Since(begun))
				if (err == nil) != (what == 0) {
					t.Fatalf("%s: %v", path, err)
				}
			}
		}
		slices.Sort(took[0])
		slices.Sort(took[1])
		return took[0][len(took[0])/2], took[1][len(took[1])/2]
	}
	done := 0
	for _, n := range []int{total / 100, total / 10, total} {
		begun := time.Now()
		fill(done, n)
		took := time.Since(begun)
		there, absent := look(n)
		t.Logf("%d files: %.0f creations/s; a name is found in %v, its absence in %v; partitions: %.5s", n, float64(n-done)/took.Seconds(), there, absent, partitionsOf(t, dir(0)))
		done = n
	}
	var before, peak int64
	for m := range 2 {
		begun := time.Now()
		f, err := os.Open(dir(m))
		if err != nil {
			t.Fatal(err)
		}
		before = resident(t, p.cmd.Process.Pid)
		peak = before
		seen := make([]bool, total)
		count := 0
		for {
			names, err := f.Readdirnames(1000)
			for _, s := range names {
				var i int
				if _, err := fmt.Sscanf(s, "file-%d", &i); err != nil || seen[i] {
					t.Fatalf("%q: %v, or it came twice", s, err)
				}
				seen[i] = true
				count++
			}
			if count%100_000 < len(names) {
				peak = max(peak, resident(t, p.cmd.Process.Pid))
			}
			if err != nil {
				break
			}
		}
		f.Close()
		if count != total {
			t.Fatalf("%d of %d names", count, total)
		}
		t.Logf("mount %d reads it in %v; servers and mounts grow by %d MiB", m, time.Since(begun).Round(time.Millisecond), (peak-before)>>20)
	}
}

// resident returns the bytes of memory that a process has of its own, without what it maps of files.
func resident(t *testing.T, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if kib, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(kib), "kB")), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatalf("process %d tells no RssAnon", pid)
	return 0
}
