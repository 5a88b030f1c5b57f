package fsck

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
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

// saved returns the file of what a repair has removed or changed.
func saved(t testing.TB, rep *Report) []byte {
	t.Helper()
	var b []byte
	for _, path := range rep.Saved {
		one, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, one...)
	}
	for line := range bytes.Lines(b) {
		if err := json.Unmarshal(line, new(Saved)); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
	}
	return b
}

// dump returns all that the namespace of a closed store says.
func (m images) dump(t testing.TB) string {
	t.Helper()
	r, _, err := pmem.Open(pmem.NewMemory(m.region.Clone()), pmem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var b strings.Builder
	if err := meta.Dump(r, &b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// path finds an inode by its path from the root, 0 if there is none.
func (m images) path(t testing.TB, root sealfs.Ino, path ...string) sealfs.Ino {
	t.Helper()
	r, _, err := pmem.Open(pmem.NewMemory(m.region.Clone()), pmem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for _, name := range path {
		var rep op.Reply
		req := op.Request{Type: op.Lookup, Dir: root, Name: name, Shard: root.Home(testShards), Volume: testVolume}
		if err := meta.Query(r, testConfig, &req, &rep); err != nil || rep.Err() != nil {
			return 0
		}
		root = rep.Attr.Ino
	}
	return root
}

// repaired repairs a damaged store and expects it to be clean.
func (h *hurt) repaired() *Report {
	h.t.Helper()
	o := h.options()
	o.Repair, o.CutLog, o.SaveDir = RepairAll, true, h.t.TempDir()
	rep := judge(h.t, o)
	if !rep.Clean() {
		h.t.Errorf("left: %v", rep.IDs())
	}
	if second := judge(h.t, o); second.Exit() != ExitClean {
		h.t.Errorf("left: %v", second.IDs())
	}
	return rep
}

// What has lost its name is found under the name that it is known to have had, or
// under its number, with all that is below it.
func TestLostAndFound(t *testing.T) {
	m, z, w := zooImages(t)
	number := func(ino sealfs.Ino) string { return fmt.Sprintf("#%d", ino) }
	for _, x := range []struct {
		name string
		do   func(h *hurt)
		ino  sealfs.Ino
		path []string
	}{
		{"a file", func(h *hurt) { h.unlink(z.sub, "small") }, z.small, []string{lostFound, number(z.small)}},
		{"a directory", func(h *hurt) { h.unlink(w.root, "sub") }, z.small, []string{lostFound, number(z.sub), "small"}},
		{"a directory and one in it", func(h *hurt) {
			h.unlink(w.root, "sub")
			h.unlink(z.sub, "deeper")
		}, z.hard, []string{lostFound, number(z.dir2), "hard2"}},
		{"an entry in a file", func(h *hurt) {
			h.unlink(z.sub, "tall")
			h.link(z.small, "the tall one", z.tall, typeFile, 0)
		}, z.tall, []string{lostFound, "the tall one"}},
		{"a directory's inode", func(h *hurt) {
			k := meta.InodeKey(testShards, z.sub)
			h.del(k[:])
		}, z.small, []string{"sub", "small"}},
		{"a directory's inode and its name", func(h *hurt) {
			k := meta.InodeKey(testShards, z.sub)
			h.del(k[:])
			h.unlink(w.root, "sub")
		}, z.hard, []string{lostFound, number(z.sub), "deeper", "hard2"}},
		{"the root's inode", func(h *hurt) {
			k := meta.InodeKey(testShards, w.root)
			h.del(k[:])
		}, z.small, []string{"sub", "small"}},
		{"the root's type", func(h *hurt) {
			h.inode(w.root, func(in *meta.Inode) { in.Mode, in.Parent, in.Size, in.Nlink = 0o010600, 0, 0, 1 })
		}, z.small, []string{"sub", "small"}},
		{"all of the root", func(h *hurt) {
			k := meta.InodeKey(testShards, w.root)
			h.del(k[:])
			for i := range 60 {
				h.unlink(w.root, fmt.Sprint("filler", i))
			}
			h.unlink(w.root, "sub")
			h.unlink(w.root, "hard")
		}, z.small, []string{lostFound, number(z.sub), "small"}},
		{"a file's inode", func(h *hurt) {
			k := meta.InodeKey(testShards, z.tall)
			h.del(k[:])
		}, z.tall, []string{"sub", "tall"}},
		{"a link's inode", func(h *hurt) {
			k := meta.InodeKey(testShards, z.link)
			h.del(k[:])
		}, z.link, []string{"sub", "long"}},
		{"a name that is taken", func(h *hurt) {
			h.unlink(z.sub, "tall")
			h.link(z.small, lostFound, z.tall, typeFile, 0)
			h.unlink(z.dir2, "attr")
			h.link(z.small, "x", z.attr, typeFile, 0)
			h.unlink(z.sub, "small")
			h.link(z.held, "x", z.small, typeFile, 0)
		}, z.tall, []string{lostFound, lostFound}},
		{"held and lost", func(h *hurt) {
			k := meta.OrphanKey(testShards, z.held)
			h.del(k[:])
		}, z.held, []string{lostFound, number(z.held)}},
		{"lost+found is a file", func(h *hurt) {
			h.link(w.root, lostFound, z.tall, typeFile, 0)
			h.unlink(z.sub, "small")
		}, z.small, []string{lostFound + ".2", number(z.small)}},
	} {
		t.Run(x.name, func(t *testing.T) {
			h := &hurt{images: m.clone(), t: t, z: z, w: w}
			x.do(h)
			rep := h.repaired()
			if got := h.path(t, w.root, x.path...); got != x.ino {
				t.Errorf("%q is inode %d, want %d", x.path, got, x.ino)
			}
			saved(t, rep)
			h.lives(t)
		})
	}
}

// manyImages returns a closed store with a tree of three levels.
func manyImages(t testing.TB) (images, *world) {
	t.Helper()
	const segment = 128 << 10
	m := images{dev: disk.NewSim("device", layout.DataStart+60*segment), region: disk.NewSim("region", 2000*pageSize)}
	w := &world{t: t, clock: 1e18}
	_, err := lsfs.Format(m.dev, pmem.NewMemory(m.region), lsfs.Geometry{SegmentBytes: segment})
	w.must(err)
	w.s, err = lsfs.Open(m.dev, pmem.NewMemory(m.region), nil, owner{}, lazy)
	w.must(err)
	w.makeRoot()
	dir := w.root
	for i := range 4000 {
		if i%200 == 0 {
			dir = w.mkdir(dir, fmt.Sprint("directory", i), sealfs.Shard(i/200%testShards))
		}
		ino := w.create(dir, fmt.Sprint("a file with a longer name ", i, strings.Repeat("x", i%150)))
		if i%50 == 0 {
			w.write(ino, 0, pattern(byte(i), 300))
		}
	}
	w.must(w.s.Close())
	return images{dev: m.dev.Reopen(), region: m.region.Reopen()}, w
}

// A tree whose inner pages are damaged is built anew with all its records, and
// one of a damaged leaf with all that can be read.
func TestSalvage(t *testing.T) {
	m, w := manyImages(t)
	before := m.dump(t)
	top := (&hurt{images: m, t: t}).root().Tree
	p := (*[pageSize]byte)(read(t, m.region, int64(top)*pageSize, pageSize))
	if p[pmlayout.TreeLevelOff] < 2 {
		t.Fatalf("the root has level %d, the test needs 2", p[pmlayout.TreeLevelOff])
	}
	child := func(n uint64, i int) uint64 {
		p := (*[pageSize]byte)(read(t, m.region, int64(n)*pageSize, pageSize))
		_, val := cell(p, i%u16(p, pmlayout.TreeCountOff))
		return uint64(val[0]) | uint64(val[1])<<8 | uint64(val[2])<<16
	}
	for _, x := range []struct {
		name string
		same bool
		do   func(h *hurt)
	}{
		{"the root", true, func(h *hurt) { h.page(top, func(b []byte) { clear(b[:200]) }) }},
		{"an inner page", true, func(h *hurt) { h.page(child(top, 0), func(b []byte) { b[0] ^= 4 }) }},
		{"all inner pages", true, func(h *hurt) {
			for i := range u16(p, pmlayout.TreeCountOff) {
				h.page(child(top, i), func(b []byte) { clear(b) })
			}
			h.page(top, func(b []byte) { clear(b) })
		}},
		{"a child is lost", true, func(h *hurt) {
			h.page(child(top, 0), func(b []byte) {
				_, val := cell((*[pageSize]byte)(b), 1)
				clear(val)
			})
		}},
		{"a leaf's header", true, func(h *hurt) { h.page(child(child(top, 0), 3), func(b []byte) { b[pmlayout.TreeDeadOff]++ }) }},
		{"a leaf's order", true, func(h *hurt) {
			h.page(child(child(top, 0), 3), func(b []byte) {
				s := b[pmlayout.TreeHeader:]
				s[0], s[1], s[2], s[3] = s[2], s[3], s[0], s[1]
			})
		}},
		{"a leaf", false, func(h *hurt) { h.page(child(child(top, 0), 3), func(b []byte) { clear(b) }) }},
		{"many leaves", false, func(h *hurt) {
			for i := range 10 {
				h.page(child(child(top, 0), 3*i), func(b []byte) { clear(b) })
			}
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			h := &hurt{images: m.clone(), t: t, w: w}
			x.do(h)
			rep := h.repaired()
			if after := h.dump(t); x.same != (after == before) {
				t.Errorf("the records are the same: %v", !x.same)
			}
			saved(t, rep)
			h.lives(t)
		})
	}
}

// A power cut at any point of a repair leaves a store that can be repaired.
func TestRepairIsCrashSafe(t *testing.T) {
	m, z, w := zooImages(t)
	rng := rand.New(rand.NewPCG(9, 10))
	states := 0
	for _, d := range damages {
		switch d.name {
		case "lost name", "key count", "page free", "leaf's magic", "page twice", "table entry", "segment twice", "entry of nothing",
			"live bytes", "extents share", "segment header", "directory of two names", "inode record", "log cut",
			"intent page", "bit of a leaf", "bit of an inner page", "bit of the root page", "bit of the table", "bit of a bitmap", "sum of a header":
		default:
			continue
		}
		t.Run(d.name, func(t *testing.T) {
			h := &hurt{images: m.clone(), t: t, z: z, w: w}
			h.o = h.options()
			d.do(h)
			n := &instants{dev: h.dev, region: h.region, every: 1}
			o := h.o
			o.Dev, o.Reg, o.Repair, o.CutLog, o.SaveDir = gate{h.dev, n}, gate{h.region, n}, RepairAll, true, t.TempDir()
			judge(t, o)
			for i, at := range n.taken {
				for dev := range at[0].CrashStates(rng, 1) {
					for reg := range at[1].CrashStates(rng, 1) {
						again := &hurt{images: images{dev: dev, region: reg}, t: t}
						o := again.options()
						o.Repair, o.CutLog, o.SaveDir = RepairAll, true, t.TempDir()
						rep, err := Check(t.Context(), o)
						if err != nil {
							t.Fatalf("instant %d: %v", i, err)
						}
						if second := judge(t, o); !slices.Equal(second.IDs(), remainders[d.name]) {
							t.Fatalf("instant %d: %v, after %v", i, second.IDs(), rep.Plan)
						}
						states++
					}
				}
			}
		})
	}
	if states < 100 {
		t.Errorf("only %d states were repaired", states)
	}
}

// With -p nothing is repaired but what is safe, and that only if all is.
func TestSafeRepairs(t *testing.T) {
	m, z, w := zooImages(t)
	for _, x := range []struct {
		names string
		exit  int
	}{
		{"first superblock", ExitRepaired}, {"older header slot", ExitRepaired}, {"page leaked", ExitRepaired}, {"live bytes", ExitRepaired},
		{"usage", ExitRepaired}, {"directory's size", ExitRepaired}, {"lost name", ExitUncorrected}, {"usage,lost name", ExitUncorrected},
		{"page leaked,usage", ExitRepaired},
	} {
		h := &hurt{images: m.clone(), t: t, z: z, w: w}
		for name := range strings.SplitSeq(x.names, ",") {
			damages[slices.IndexFunc(damages, func(d damage) bool { return d.name == name })].do(h)
		}
		o := h.options()
		o.Repair, o.SaveDir = RepairSafe, t.TempDir()
		before := h.clone()
		rep := judge(t, o)
		if rep.Exit() != x.exit || (x.exit == ExitRepaired) == h.same(before) {
			t.Errorf("%s: exit status %d: %v", x.names, rep.Exit(), rep.Found)
		}
	}
}

// Stores in files are repaired, also with what only the ring holds; nothing is done if what
// is removed cannot be saved.
func TestRepairOfFiles(t *testing.T) {
	w := newWorld(t, 60, lazy)
	z := w.zoo()
	w.kill() // the ring is to be recovered as well
	o := Options{Device: w.dev, Staging: w.staging, Repair: RepairAll}
	if rep := judge(t, o); rep.Exit() != ExitClean || rep.Staged == 0 {
		t.Fatalf("exit status %d, %d staged", rep.Exit(), rep.Staged)
	}
	w.open(lazy)
	w.do(&op.Request{Type: op.Unlink, Dir: z.sub, Name: "small", Flags: op.Held})
	w.must(w.s.Close())
	h := &hurt{images: w.load(), t: t}
	k := meta.OrphanKey(testShards, z.small)
	h.del(k[:])
	h.must(errors.Join(os.WriteFile(w.region, read(t, h.region, 0, int(h.region.Size())), 0o600)))
	o.SaveDir = w.dir + "/nowhere"
	if rep, err := Check(t.Context(), o); !errors.Is(err, os.ErrNotExist) || len(rep.Fixed) != 0 {
		t.Errorf("nowhere to save: %v", err)
	}
	o.SaveDir = ""
	rep := judge(t, o)
	if rep.Exit() != ExitRepaired || len(rep.Saved) != 1 || !strings.HasPrefix(rep.Saved[0], w.dir+"/") || len(saved(t, rep)) == 0 {
		t.Errorf("exit status %d, saved in %q: %v", rep.Exit(), rep.Saved, rep.IDs())
	}
	w.clean("repaired", Options{})
	w.open(lazy)
	w.must(w.s.Close())
}
