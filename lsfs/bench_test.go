package lsfs

import (
	"fmt"
	"path/filepath"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/pmem"
)

// openFiles opens a store on real files, with background work.
func openFiles(b testing.TB, size int64) *Store {
	b.Helper()
	dir := b.TempDir()
	path := filepath.Join(dir, "device.img")
	if err := disk.CreateImage(path, size); err != nil {
		b.Fatal(err)
	}
	dev, err := disk.Open(path, disk.OpenOptions{Direct: true, Exclusive: true})
	if err != nil {
		b.Fatal(err)
	}
	region, err := pmem.OpenFile(filepath.Join(dir, "region"), true)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := Format(dev, region, Geometry{}); err != nil {
		b.Fatal(err)
	}
	s, err := Open(dev, region, nil, tinyFS{}, Options{StagingPath: filepath.Join(dir, "ring")})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := s.Close(); err != nil {
			b.Error(err)
		}
	})
	return s
}

func BenchmarkUpdate(b *testing.B) {
	for _, size := range []int{0, 4096, 65536} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			s := openFiles(b, 8<<30)
			data := make([]byte, size)
			b.SetBytes(int64(size))
			n := 0
			for b.Loop() {
				n++
				if _, err := s.put(sealfs.Ino(n%20000+1), data); err != nil {
					b.Fatal(err)
				}
			}
			st := s.Stats()
			b.ReportMetric(float64(st.RedoBytes)/float64(st.Records), "redo-B/op")
			b.ReportMetric(float64(st.Drains)/float64(st.Records), "drains/op")
		})
	}
}

func BenchmarkSync(b *testing.B) {
	for _, workers := range []int{1, 4} {
		b.Run(fmt.Sprintf("workers=%d", workers), func(b *testing.B) {
			s := openFiles(b, 8<<30)
			data := make([]byte, 4096)
			b.SetParallelism(workers)
			b.RunParallel(func(p *testing.PB) {
				for p.Next() {
					end, err := s.put(sealfs.Ino(1), data)
					if err == nil {
						err = s.SyncTo(end)
					}
					if err != nil {
						b.Fatal(err)
					}
				}
			})
			b.ReportMetric(float64(s.Stats().Flushes)/float64(b.N), "flushes/op")
		})
	}
}

// BenchmarkFar shows what far checkpoints add to what is written: bytes of them
// for each byte of log, when new files are written one after the other, and when
// old ones are overwritten in random order. Run it with -benchtime 400000x: a
// far checkpoint comes every 512 MiB of log on this device.
func BenchmarkFar(b *testing.B) {
	for _, c := range []struct {
		name  string
		files int // 0: all new
		size  int
	}{{"new/size=4096", 0, 4096}, {"random/size=4096", 200000, 4096}, {"random/size=0", 200000, 0}} {
		b.Run(c.name, func(b *testing.B) {
			s := openFiles(b, 8<<30)
			data := make([]byte, c.size)
			n := uint64(0)
			for b.Loop() {
				n++
				ino := n
				if c.files > 0 {
					ino = n * 0x9e3779b97f4a7c15 >> 20 % uint64(c.files)
				}
				if _, err := s.put(sealfs.Ino(ino+1), data); err != nil {
					b.Fatal(err)
				}
			}
			st := s.Stats()
			b.ReportMetric(float64(st.FarBytes)/float64(st.LogBytes), "far-B/log-B")
			b.ReportMetric(float64(st.FarCheckpoints), "far-checkpoints")
			b.ReportMetric(float64(st.Region.Used), "region-pages")
		})
	}
}

// BenchmarkRebuild makes a region of a million small files again.
func BenchmarkRebuild(b *testing.B) {
	s := openFiles(b, 8<<30)
	for ino := range sealfs.Ino(1_000_000) {
		if _, err := s.put(ino+1, []byte("x")); err != nil {
			b.Fatal(err)
		}
	}
	if err := s.FarCheckpoint(); err != nil {
		b.Fatal(err)
	}
	path := filepath.Join(b.TempDir(), "rebuilt")
	for b.Loop() {
		out, err := RebuildRegionFile(s.dev, path, Options{})
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(out.Copies), "pages")
	}
}
