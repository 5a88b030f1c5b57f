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
