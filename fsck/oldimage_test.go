package fsck

import (
	"archive/zip"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/lsfs/layout"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
	pmlayout "sealfs/pmem/layout"
)

var writeOld = flag.Bool("write", false, "write images of the present formats: go test ./fsck -run OldImage -args -write")

// oldImages is where a small image of every format is kept for ever, each with a list
// of what is in it. Later versions must read it, or refuse it by name.
const oldImages = "testdata/old"

// oldName names the images of the present formats.
func oldName(kind string) string {
	return fmt.Sprintf("device%d-region%d-%s.zip", layout.Version, pmlayout.Version, kind)
}

// TestOldImages reads all images that were ever written.
func TestOldImages(t *testing.T) {
	if *writeOld {
		writeOldImages(t)
	}
	files, err := filepath.Glob(oldImages + "/*.zip")
	if err != nil {
		t.Fatal(err)
	}
	present := 0
	for _, path := range files {
		t.Run(filepath.Base(path), func(t *testing.T) {
			if info, err := os.Stat(path); err != nil || info.Size() > 100<<10 {
				t.Errorf("%d bytes are too many to be kept (%v)", info.Size(), err)
			}
			m, list := readOld(t, path)
			now := filepath.Base(path) == oldName("closed") || filepath.Base(path) == oldName("cut")
			if now {
				present++
			}
			rep, err := Check(t.Context(), m.options())
			if errors.Is(err, sealfs.ErrVersion) && !now {
				if !strings.Contains(err.Error(), "version") {
					t.Errorf("it is not refused by name: %v", err)
				}
				if s, err := lsfs.Open(m.dev, pmem.NewMemory(m.region), nil, owner{}, lazy); !errors.Is(err, sealfs.ErrVersion) {
					t.Errorf("the check refuses it, and the store opens it: %v", err)
					s.Close()
				}
				return
			}
			if err != nil || !rep.Clean() || rep.ReadBytes == 0 || rep.ReadBytes != rep.Bytes {
				t.Fatalf("%v, %v, %d of %d bytes verified", err, rep.Found, rep.ReadBytes, rep.Bytes)
			}
			if got := listing(t, m); got != list {
				t.Errorf("it holds\n%s\nnot\n%s", got, list)
			}
		})
	}
	if present != 2 {
		t.Errorf("%d of the 2 images of the present formats are there: write them with -args -write", present)
	}
}

// readOld reads an image.
func readOld(t *testing.T, path string) (m images, list string) {
	t.Helper()
	z, err := zip.OpenReader(path)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	part := func(name string) []byte {
		f, err := z.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b, err := io.ReadAll(f)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	sim := func(name string) *disk.Sim {
		b := part(name)
		d := disk.NewSim(name, int64(len(b)))
		d.Overwrite(0, b)
		return d
	}
	return images{dev: sim("device"), region: sim("region")}, string(part("list"))
}

// writeOldImages writes the images of the present formats: one of a closed store, and one
// of a store that lost its power, whose log is still to be replayed.
func writeOldImages(t *testing.T) {
	t.Helper()
	m, _, _ := zooImages(t)
	cut := m.clone()
	s, err := lsfs.Open(cut.dev, pmem.NewMemory(cut.region), nil, owner{}, lazy)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, s: s, clock: 3e18}
	w.root = m.path(t, rootOf(t, m))
	for i := range 20 {
		w.write(w.create(w.root, fmt.Sprint("after the checkpoint ", i)), 0, pattern(byte(i), 400*i+1))
	}
	w.must(s.Sync())
	cut = cut.clone()
	w.must(s.Close())
	for kind, m := range map[string]images{"closed": m, "cut": cut} {
		var b bytes.Buffer
		z := zip.NewWriter(&b)
		for name, part := range map[string][]byte{
			"device": read(t, m.dev, 0, int(m.dev.Size())), "region": read(t, m.region, 0, int(m.region.Size())), "list": []byte(listing(t, m)),
		} {
			f, err := z.Create(name)
			if err == nil {
				_, err = f.Write(part)
			}
			w.must(err)
		}
		w.must(errors.Join(z.Close(), os.MkdirAll(oldImages, 0o755), os.WriteFile(filepath.Join(oldImages, oldName(kind)), b.Bytes(), 0o644)))
	}
}

// rootOf returns the root of a store's only volume.
func rootOf(t *testing.T, m images) (root sealfs.Ino) {
	t.Helper()
	c := newChecker(t.Context(), m.options())
	c.w, c.alone = &whole{absent: map[sealfs.Shard]bool{}, maybe: map[sealfs.Ino]bool{}}, true
	if err := c.open(); err != nil {
		t.Fatal(err)
	}
	c.w.check([]*checker{c})
	return c.w.roots()[testVolume]
}

// listing lists what is in a store, by path, after a recovery of a copy of it.
func listing(t *testing.T, m images) string {
	t.Helper()
	root := rootOf(t, m)
	m = m.clone()
	s, err := lsfs.Open(m.dev, pmem.NewMemory(m.region), nil, owner{}, lazy)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var b strings.Builder
	listTo(t, &b, s, root)
	return b.String()
}

// listTo lists what is in an open store.
func listTo(t *testing.T, b io.Writer, s *lsfs.Store, root sealfs.Ino) {
	t.Helper()
	r := s.BeginRead()
	defer s.EndRead()
	ask := func(req op.Request) *op.Reply {
		rep := &op.Reply{}
		req.Shard, req.Volume = max(req.Dir, req.Ino).Home(testShards), testVolume
		if err := meta.Query(r, testConfig, &req, rep); err != nil || rep.Err() != nil {
			t.Fatalf("%v: %v, %v", req.Type, err, rep.Err())
		}
		return rep
	}
	var walk func(path string, dir sealfs.Ino)
	walk = func(path string, dir sealfs.Ino) {
		var entries []op.Dirent
		for cookie := uint64(0); ; {
			some := ask(op.Request{Type: op.Readdir, Dir: dir, Off: cookie, Len: 1 << 20, Flags: op.Plus}).Entries
			if len(some) == 0 {
				break
			}
			entries, cookie = append(entries, some...), some[len(some)-1].Cookie
		}
		for _, e := range entries {
			at := path + "/" + e.Name
			a := ask(op.Request{Type: op.Getattr, Ino: e.Ino}).Attr
			fmt.Fprintf(b, "%s: mode %o, %d links, %d bytes, times %d %d %d, volume %d", at, a.Mode, a.Nlink, a.Size, a.Atime, a.Mtime, a.Ctime, testVolume)
			if a.Mode>>12 == typeLink {
				fmt.Fprintf(b, ", to %s", ask(op.Request{Type: op.Readlink, Ino: e.Ino}).Data)
			}
			for name := range bytes.SplitSeq(ask(op.Request{Type: op.Listxattr, Ino: e.Ino, Len: 1 << 16}).Data, []byte{0}) {
				if len(name) > 0 {
					fmt.Fprintf(b, ", %s = %x", name, ask(op.Request{Type: op.Getxattr, Ino: e.Ino, Name: string(name), Len: 1 << 16}).Data)
				}
			}
			_, err := meta.Extents(r, testConfig, e.Ino, 0, 1<<40, func(x *meta.Extent) bool {
				fmt.Fprintf(b, ", %d at %d: %x", x.Len, x.Off, x.Sums)
				return true
			})
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintln(b)
			if e.Type == typeDir {
				walk(at, e.Ino)
			}
		}
	}
	walk("", root)
}
