package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/cluster"
	"sealfs/op"
)

// fileServer is a server on real files.
func fileServer(b testing.TB, size int64) (*Server, sealfs.Ino) { return fileServerWith(b, size, nil) }

// fileServerWith is fileServer with volume 1 in its cluster map, unless that is nil.
func fileServerWith(b testing.TB, size int64, volume *cluster.VolumeInfo) (*Server, sealfs.Ino) {
	b.Helper()
	dir := b.TempDir()
	o := StoreOptions{Device: filepath.Join(dir, "device.img"), Region: filepath.Join(dir, "region"), Staging: ringPath(b)}
	sb, err := Format(FormatOptions{Device: o.Device, Region: o.Region, Size: size})
	if err != nil {
		b.Fatal(err)
	}
	opts := Options{Shards: 4096, Stores: []StoreOptions{o}, Logger: testLog(b)}
	if volume != nil {
		m := &cluster.Map{
			Version: 2, Shards: 4096, Replicas: 1, NextVolume: 2, Stores: []cluster.StoreInfo{{ID: sb.Store, State: cluster.StoreUp}},
			Volumes: []cluster.VolumeInfo{*volume}, Table: make([]cluster.ShardInfo, 4096),
		}
		for i := range m.Table {
			m.Table[i].Replicas = []uint16{0}
		}
		opts.Map = func() *cluster.Map { return m }
	}
	s, err := Open(context.Background(), opts)
	if err != nil {
		b.Fatal(err)
	}
	root, err := s.MakeRoot(context.Background(), 1, 0o755, 0, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := s.Close(); err != nil {
			b.Error(err)
		}
	})
	return s, root
}

// ringPath returns a place for a ring, in shared memory if there is some.
func ringPath(b testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "sealfs-bench-")
	if err != nil {
		dir = b.TempDir()
	}
	b.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			b.Error(err)
		}
	})
	return filepath.Join(dir, "ring")
}

// BenchmarkCreate: a small file made and written, as a mount does it.
func BenchmarkCreate(b *testing.B) { benchmarkCreate(b, 0, nil) }

// BenchmarkQuota is BenchmarkCreate in a volume without a quota and in one with one, far away.
func BenchmarkQuota(b *testing.B) {
	b.Run("none", func(b *testing.B) { benchmarkCreate(b, 0, &cluster.VolumeInfo{ID: 1}) })
	b.Run("set", func(b *testing.B) {
		benchmarkCreate(b, 0, &cluster.VolumeInfo{ID: 1, Bytes: 1 << 50, Inodes: 1 << 40, Since: 2})
	})
}

// BenchmarkCreateWatched is BenchmarkCreate by a session that watches and so is
// granted leases.
func BenchmarkCreateWatched(b *testing.B) { benchmarkCreate(b, 1, nil) }

func benchmarkCreate(b *testing.B, session sealfs.Session, volume *cluster.VolumeInfo) {
	for _, size := range []int{0, 4096} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			s, root := fileServerWith(b, 16<<30, volume)
			ctx := context.Background()
			data := make([]byte, size)
			var rep op.Reply
			if session != 0 {
				req := op.Request{Type: op.Watch, Session: session}
				if err := s.Do(ctx, &req, &rep); err != nil || rep.Code != 0 {
					b.Fatal(err, rep.Code)
				}
			}
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				n++
				req := op.Request{Type: op.Create, Volume: 1, Dir: root, Shard: root.Home(4096), Name: fmt.Sprintf("file.%08d", n), Mode: 0o644, Session: session}
				rep.Reset()
				if err := s.Do(ctx, &req, &rep); err != nil || rep.Code != 0 {
					b.Fatal(err, rep.Code)
				}
				if size == 0 {
					continue
				}
				req = op.Request{Type: op.Write, Volume: 1, Ino: rep.Attr.Ino, Shard: root.Home(4096), Data: data, Session: session}
				rep.Reset()
				if err := s.Do(ctx, &req, &rep); err != nil || rep.Code != 0 {
					b.Fatal(err, rep.Code)
				}
			}
			st := s.Status().Stores[0]
			b.ReportMetric(float64(st.Stats.RedoBytes)/float64(n), "redo-B/op")
			b.ReportMetric(float64(st.Stats.LogBytes)/float64(n), "log-B/op")
			b.ReportMetric(st.BytesPerFile, "region-B/file")
		})
	}
}

// BenchmarkRestart: how long a server takes until it answers, by the number of
// files it holds: after SIGKILL with some changes to replay, and after a power cut
// with the tail of the log at its limit, all of it on the device: the ring is
// gone and no file is in the page cache.
func BenchmarkRestart(b *testing.B) {
	for _, files := range []int{100_000, 1_000_000} {
		for _, cut := range []bool{false, true} {
			b.Run(fmt.Sprintf("files=%d/power-cut=%v", files, cut), func(b *testing.B) { restart(b, files, cut) })
		}
	}
}

func restart(b *testing.B, files int, cut bool) {
	dir := b.TempDir()
	o := StoreOptions{Device: filepath.Join(dir, "device.img"), Region: filepath.Join(dir, "region"), Staging: filepath.Join(dir, "ring")}
	if _, err := Format(FormatOptions{Device: o.Device, Region: o.Region, Size: 16 << 30}); err != nil {
		b.Fatal(err)
	}
	ctx := context.Background()
	open := func() *Server {
		s, err := Open(ctx, Options{Shards: 4096, Stores: []StoreOptions{o}, Logger: testLog(b)})
		if err != nil {
			b.Fatal(err)
		}
		return s
	}
	s := open()
	root, err := s.MakeRoot(ctx, 1, 0o755, 0, 0)
	if err != nil {
		b.Fatal(err)
	}
	fill(b, s, root, files)
	tail := 0.0
	// The timer counts from the death to the first answer.
	for b.Loop() {
		b.StopTimer()
		st := s.stores[0]
		if cut {
			tail = fillTail(b, s, root, &files)
			if err := st.Sync(); err != nil {
				b.Fatal(err)
			}
		} else {
			fillFrom(b, s, root, files, 50_000)
			files += 50_000
		}
		st.reclaim.stop()
		if _, err := st.Abandon(); err != nil {
			b.Fatal(err)
		}
		if cut {
			if err := os.Remove(o.Staging); err != nil {
				b.Fatal(err)
			}
			evict(b, o.Device)
			evict(b, o.Region)
		}
		b.StartTimer()
		s = open()
		req := op.Request{Type: op.Lookup, Volume: 1, Dir: root, Shard: root.Home(4096), Name: "d0"}
		var rep op.Reply
		if err := s.Do(ctx, &req, &rep); err != nil || rep.Code != 0 {
			b.Fatal(err, rep.Code)
		}
	}
	b.ReportMetric(s.Status().Stores[0].BytesPerFile, "region-B/file")
	if cut {
		b.ReportMetric(tail, "tail-MiB")
	}
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
}

// fillTail makes files until the log since the last checkpoint is nearly as long
// as it may be, and returns that in MiB.
func fillTail(b *testing.B, s *Server, root sealfs.Ino, files *int) float64 {
	const limit = 64 << 20
	for {
		was := s.stores[0].Stats()
		for since := was.LogBytes; s.stores[0].Stats().Checkpoints == was.Checkpoints; {
			fillFrom(b, s, root, *files, 1000)
			*files += 1000
			if log := s.stores[0].Stats().LogBytes - since; log > limit-limit/16 {
				return float64(log) / (1 << 20)
			}
		}
	}
}

// evict drops a file from the page cache.
func evict(b *testing.B, path string) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		b.Fatal(err)
	}
	if err := errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close()); err != nil {
		b.Fatal(err)
	}
}

func fill(b *testing.B, s *Server, root sealfs.Ino, files int) { fillFrom(b, s, root, 0, files) }

// fillFrom makes small files, a thousand to a directory.
func fillFrom(b *testing.B, s *Server, root sealfs.Ino, from, files int) {
	b.Helper()
	ctx := context.Background()
	data := make([]byte, 100)
	var rep op.Reply
	do := func(req op.Request) {
		req.Volume = 1
		rep.Reset()
		if err := s.Do(ctx, &req, &rep); err != nil || rep.Code != 0 && rep.Code != sealfs.ErrExist {
			b.Fatal(err, rep.Code)
		}
	}
	var dir sealfs.Ino
	for i := from; i < from+files; i++ {
		if i%1000 == 0 {
			do(op.Request{Type: op.Mkdir, Dir: root, Shard: root.Home(4096), Shard2: sealfs.Shard(i * 7919 % 4096), Name: fmt.Sprintf("d%d", i/1000), Mode: 0o755})
			if rep.Code != 0 {
				do(op.Request{Type: op.Lookup, Dir: root, Shard: root.Home(4096), Name: fmt.Sprintf("d%d", i/1000)})
			}
			dir = rep.Attr.Ino
		}
		do(op.Request{Type: op.Create, Dir: dir, Shard: dir.Home(4096), Name: fmt.Sprintf("file.%016d", i), Mode: 0o644})
		ino := rep.Attr.Ino
		do(op.Request{Type: op.Write, Ino: ino, Shard: ino.Home(4096), Data: data})
	}
}

// BenchmarkBudget fills a store with files and then works on all of them at
// random, and reports the most anonymous and shared memory that the process
// had. SEALFS_BENCH_FILES is their number (default a million).
func BenchmarkBudget(b *testing.B) {
	files := 1_000_000
	if v, err := strconv.Atoi(os.Getenv("SEALFS_BENCH_FILES")); err == nil {
		files = v
	}
	s, root := fileServer(b, 64<<30)
	peak := int64(0)
	look := func() { peak = max(peak, memory(b)) }
	step := 100_000
	for done := 0; done < files; done += step {
		fillFrom(b, s, root, done, step)
		look()
	}
	ctx := context.Background()
	var rep op.Reply
	n := 0
	for b.Loop() {
		i := n * 7919 % files
		n++
		rep.Reset()
		req := op.Request{Type: op.Lookup, Volume: 1, Dir: root, Shard: root.Home(4096), Name: fmt.Sprintf("d%d", i/1000)}
		if err := s.Do(ctx, &req, &rep); err != nil || rep.Code != 0 {
			b.Fatal(err, rep.Code)
		}
		dir := rep.Attr.Ino
		for _, t := range []op.Type{op.Lookup, op.Unlink, op.Create} {
			rep.Reset()
			req := op.Request{Type: t, Volume: 1, Dir: dir, Shard: dir.Home(4096), Name: fmt.Sprintf("file.%016d", i), Mode: 0o644}
			if err := s.Do(ctx, &req, &rep); err != nil || rep.Code != 0 {
				b.Fatal(err, rep.Code)
			}
		}
		if n%10_000 == 0 {
			look()
		}
	}
	look()
	st := s.Status().Stores[0]
	b.ReportMetric(float64(peak)/(1<<20), "peak-MiB")
	b.ReportMetric(float64(st.Files), "files")
	b.ReportMetric(float64(st.Stats.MemoryWaits), "memory-waits")
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	b.ReportMetric(float64(m.Sys)/(1<<20), "go-MiB")
	b.ReportMetric(float64(st.Stats.Region.PrivateBytes())/(1<<20), "private-MiB")
	b.ReportMetric(st.BytesPerFile, "region-B/file")
	b.ReportMetric(float64(st.Stats.Region.Used)*4096/(1<<20), "region-MiB")
}

// memory returns the anonymous and shared memory of the process, in bytes.
func memory(b *testing.B) int64 {
	b.Helper()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	var sum int64
	for _, line := range strings.Split(string(text), "\n") {
		if strings.HasPrefix(line, "RssAnon:") || strings.HasPrefix(line, "RssShmem:") {
			kb, err := strconv.ParseInt(strings.Fields(line)[1], 10, 64)
			if err != nil {
				b.Fatal(err)
			}
			sum += kb << 10
		}
	}
	return sum
}
