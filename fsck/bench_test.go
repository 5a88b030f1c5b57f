package fsck

import (
	"errors"
	"fmt"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// benchFiles is how many files the store of the benchmark has: the check is of
// the same speed with ten times as many, filling the store is not.
const benchFiles = 200_000

// BenchmarkCheck measures the check of small files in directories of 500,
// without their data, as it runs when the region is in the page cache.
func BenchmarkCheck(b *testing.B) {
	dir := b.TempDir()
	w := &world{t: b, dir: dir, dev: filepath.Join(dir, "device.img"), region: filepath.Join(dir, RegionName), staging: filepath.Join(dir, "ring"), clock: 1e18}
	const segment = 1 << 20
	w.must(disk.CreateImage(w.dev, layout.DataStart+1024*segment))
	dev, err := disk.Open(w.dev, disk.OpenOptions{Exclusive: true})
	w.must(err)
	region, err := pmem.OpenFile(w.region, true)
	w.must(err)
	_, err = lsfs.Format(dev, region, lsfs.Geometry{SegmentBytes: segment})
	w.must(errors.Join(err, dev.Close(), region.Close()))
	w.open(lsfs.Options{})
	w.makeRoot()
	data := pattern(1, 200)
	in := w.root
	for i := range benchFiles {
		if i%500 == 0 {
			in = w.mkdir(w.root, fmt.Sprint("directory", i), sealfs.Shard(i/500%testShards))
			if i%1000 == 0 {
				in = w.mkdir(in, "deeper", sealfs.Shard(i/700%testShards))
			}
		}
		w.write(w.create(in, fmt.Sprint("some file ", i)), 0, data)
	}
	w.must(w.s.Close())
	o := Options{Device: w.dev, Staging: w.staging, NoData: true}
	if rep := judge(b, o); !rep.Clean() || rep.Files != benchFiles {
		b.Fatalf("%d files, %v", rep.Files, rep.IDs())
	}
	var before, after syscall.Rusage
	w.must(syscall.Getrusage(syscall.RUSAGE_SELF, &before))
	best := time.Hour
	for b.Loop() {
		start := time.Now()
		judge(b, o)
		best = min(best, time.Since(start))
	}
	w.must(syscall.Getrusage(syscall.RUSAGE_SELF, &after))
	cpu := time.Duration(after.Utime.Nano() - before.Utime.Nano() + after.Stime.Nano() - before.Stime.Nano())
	b.ReportMetric(benchFiles/best.Seconds(), "files/s") // of the fastest run: the machine may be busy otherwise
	b.ReportMetric(float64(cpu)/benchFiles/float64(b.N), "cpu-ns/file")
}
