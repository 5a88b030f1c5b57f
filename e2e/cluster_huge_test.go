package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestClusterHugeDirectory fills one directory from two mounts until its entries are split over four stores, with a
// server killed meanwhile; all names are there then, each once, for both mounts.
func TestClusterHugeDirectory(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes 65,536 files")
	}
	s := newSite(t, shape{managers: 1, servers: 2, disks: 2, daemons: 2, size: "2G"}, nil)
	s.up(t)
	dir := func(mount int) string { return filepath.Join(s.mounts[mount].path, "huge") }
	if err := os.Mkdir(dir(0), 0o755); err != nil {
		t.Fatal(err)
	}
	const total, workers = 68_000, 8
	name := func(i int) string { return fmt.Sprint("file", i) }
	fill := func(from, to int) {
		var all sync.WaitGroup
		for w := range workers {
			all.Go(func() {
				for i := from + w; i < to; i += workers {
					if fd, err := unix.Open(filepath.Join(dir(w%2), name(i)), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644); err != nil {
						t.Errorf("%s: %v", name(i), err)
						return
					} else if err := unix.Close(fd); err != nil {
						t.Error(err)
					}
				}
			})
		}
		all.Wait()
	}
	attribute := func(name string) string {
		var b [1024]byte
		n, err := unix.Getxattr(dir(1), name, b[:])
		if err != nil {
			return err.Error()
		}
		first, _, _ := strings.Cut(string(b[:n]), " ")
		return first
	}
	partitions := func() string { return attribute("sealfs.dir.partitions") }
	began := time.Now()
	fill(0, 65_000)
	t.Logf("%.0f creations a second; partitions: %s", 65_000/time.Since(began).Seconds(), partitions())
	var filling sync.WaitGroup
	filling.Go(func() { fill(65_000, total) })
	for _, p := range s.servers {
		p.kill(t)
		p.start(t)
	}
	filling.Wait()
	for end := time.Now().Add(2 * time.Minute); partitions() != "64/64"; <-time.After(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the directory is not split: %s", partitions())
		}
	}
	for end := time.Now().Add(time.Minute); attribute("sealfs.dir.files") != fmt.Sprint(total); <-time.After(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("its totals count %s files", attribute("sealfs.dir.files"))
		}
	}
	for mount := range 2 {
		names, err := os.ReadDir(dir(mount))
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for _, e := range names {
			seen[e.Name()] = true
		}
		info, err := os.Stat(dir(mount))
		if err != nil {
			t.Fatal(err)
		}
		if len(names) != total || len(seen) != total || info.Size() != total {
			t.Errorf("mount %d: %d entries, %d names of %d, its size is %d", mount, len(names), len(seen), total, info.Size())
		}
		for i := 0; i < total; i += 97 {
			if _, err := os.Lstat(filepath.Join(dir(mount), name(i))); err != nil {
				t.Error(err)
			}
		}
	}
}
