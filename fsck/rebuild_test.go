package fsck

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/meta"
	"sealfs/op"
)

var rebuildFiles = flag.Int("rebuild-files", 5000, "files of the store of which TestRebuildLargeStore loses the region; 100000 is the whole test")

// grow makes files in a deep tree: directories, hard and symbolic links, attributes, odd
// names. It also removes, renames and truncates some of them.
func (w *world) grow(rng *rand.Rand, dirs *[]sealfs.Ino, serial *int, files int) {
	w.t.Helper()
	odd := []string{"-rf %d", "two\nlines %d", "\xff\xfe %d", " %d ", "…ümläut %d", "%d" + strings.Repeat("x", 240), ".%d", "\\%d\"'", "%d\x01"}
	type file struct {
		ino, dir sealfs.Ino
		name     string
	}
	var made []file
	for i := range files {
		*serial++
		if len(*dirs) < 20 || i%40 == 0 {
			below := (*dirs)[len(*dirs)-1] // ever deeper
			if len(*dirs)%100 == 0 {
				below = w.root
			}
			*dirs = append(*dirs, w.mkdir(below, fmt.Sprint("dir", *serial), sealfs.Shard(rng.IntN(testShards))))
		}
		f := file{dir: (*dirs)[rng.IntN(len(*dirs))], name: fmt.Sprint("file", *serial)}
		if i%7 == 0 {
			f.name = fmt.Sprintf(odd[*serial%len(odd)], *serial)
		}
		if i%11 == 0 {
			w.do(&op.Request{Type: op.Symlink, Dir: f.dir, Name: f.name, Data: bytes.Repeat([]byte("../x"), 1+rng.IntN(300))})
			continue
		}
		f.ino = w.create(f.dir, f.name)
		if n := rng.IntN(1000); n < 900 {
			w.write(f.ino, uint64(rng.IntN(3))*block, pattern(byte(*serial), 1+n))
		} else if n > 995 {
			for b := range uint64(5) {
				w.write(f.ino, 2*b*block, pattern(byte(*serial), 2*block))
			}
		}
		switch i % 13 {
		case 1:
			w.do(&op.Request{Type: op.Setxattr, Ino: f.ino, Name: "user.small", Data: []byte(f.name)})
		case 2:
			w.do(&op.Request{Type: op.Setxattr, Ino: f.ino, Name: "user.large", Data: pattern(byte(i), 2500)})
		case 3, 4:
			w.do(&op.Request{Type: op.Link, Dir: (*dirs)[rng.IntN(len(*dirs))], Name: fmt.Sprint("link", *serial), Ino: f.ino})
		case 5:
			w.do(&op.Request{Type: op.Setattr, Ino: f.ino, Valid: op.SetSize, Size: uint64(rng.IntN(2000))})
		}
		made = append(made, f)
	}
	for i, f := range made {
		switch i % 17 {
		case 0:
			w.do(&op.Request{Type: op.Unlink, Dir: f.dir, Name: f.name})
		case 1:
			w.do(&op.Request{Type: op.Rename, Dir: f.dir, Name: f.name, Dir2: (*dirs)[rng.IntN(len(*dirs))], Name2: f.name + "'"})
		}
	}
}

// state returns digests of all records and of all that can be seen of the store.
func (w *world) state(t *testing.T) (records, seen uint64) {
	t.Helper()
	h := fnv.New64a()
	w.must(meta.Dump(w.s.BeginRead(), h))
	w.s.EndRead()
	records = h.Sum64()
	h.Reset()
	listTo(t, h, w.s, w.root)
	return records, h.Sum64()
}

// TestRebuildLargeStore: the region of a store is lost, with log behind the far
// checkpoint on the device and in staging, and everything is there again.
func TestRebuildLargeStore(t *testing.T) {
	n := *rebuildFiles
	segment := testSegment
	if n > 10_000 {
		segment = 1 << 20
	}
	o := lsfs.Options{FarBytes: 1 << 40, DrainBytes: 1 << 20, DrainInterval: time.Second, LagMax: time.Second, StagingBytes: 64 << 20}
	w := newWorldOf(t, segment, 64+n*12<<10/segment, o)
	rng := rand.New(rand.NewPCG(1, 2))
	dirs, serial := []sealfs.Ino{w.root}, 0
	for _, part := range []int{6, 2} {
		w.grow(rng, &dirs, &serial, n*part/10)
		w.must(w.s.FarCheckpoint())
	}
	w.grow(rng, &dirs, &serial, n/10)
	w.must(errors.Join(w.s.Sync(), w.s.Checkpoint()))
	w.grow(rng, &dirs, &serial, n/10)
	records, seen := w.state(t)
	w.kill()
	before := w.clean("killed", Options{})
	w.must(os.Remove(w.region))

	start := time.Now()
	dev, err := disk.Open(w.dev, disk.OpenOptions{Exclusive: true})
	w.must(err)
	out, err := lsfs.RebuildRegionFile(dev, w.region, lsfs.Options{})
	w.must(errors.Join(err, dev.Close()))
	t.Logf("%d files: %+v in %v", n, *out, time.Since(start))
	if out.Copies == 0 || out.Records == 0 {
		t.Errorf("%+v: the test did not reach its point", *out)
	}
	after := w.clean("rebuilt", Options{})
	if after.Keys != before.Keys || after.Files != before.Files || after.Directories != before.Directories || after.Bytes != before.Bytes || after.ReadBytes != after.Bytes || after.LogEnd != before.LogEnd {
		t.Errorf("after: %+v, before: %+v", after, before)
	}
	w.open(o)
	if r, s := w.state(t); r != records || s != seen {
		t.Errorf("records %x, %x before; seen %x, %x before", r, records, s, seen)
	}
	w.grow(rng, &dirs, &serial, 50)
	w.must(w.s.Close())
	w.clean("used again", Options{})
}
