package fsck

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"slices"
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

// hurt is a store in memory that is to be damaged.
type hurt struct {
	images
	t *testing.T
	z ids
	w *world
	o Options // of the judge
}

// supers changes both copies of the superblock, and keeps their checksums right.
func (h *hurt) supers(fn func(*layout.Superblock)) {
	h.t.Helper()
	for i := range int64(2) {
		sb, err := layout.DecodeSuperblock(read(h.t, h.dev, i*layout.BlockSize, layout.BlockSize), "", 0)
		if err != nil {
			h.t.Fatal(err)
		}
		fn(sb)
		h.dev.Overwrite(i*layout.BlockSize, sb.Encode())
	}
}

func (h *hurt) super() *layout.Superblock {
	var newest layout.Superblock
	h.supers(func(sb *layout.Superblock) {
		if sb.Update >= newest.Update {
			newest = *sb
		}
	})
	return &newest
}

// headers changes both header slots of the region, and returns the newest.
func (h *hurt) headers(fn func(*pmlayout.Header)) (newest pmlayout.Header) {
	h.t.Helper()
	for i := range 2 {
		hd, err := pmlayout.DecodeHeader("", i, read(h.t, h.region, int64(i)*pageSize, pageSize))
		if err != nil {
			h.t.Fatal(err)
		}
		fn(&hd)
		h.region.Overwrite(int64(i)*pageSize, hd.Encode())
		if hd.Update >= newest.Update {
			newest = hd
		}
	}
	return newest
}

func (h *hurt) header() pmlayout.Header { return h.headers(func(*pmlayout.Header) {}) }

// page changes a page of the region, and its sum with it.
func (h *hurt) page(n uint64, fn func(b []byte)) {
	b := read(h.t, h.region, int64(n)*pageSize, pageSize)
	fn(b)
	h.region.Overwrite(int64(n)*pageSize, b)
	resealPage(h.region, n)
}

// sum overwrites the sum of a page.
func (h *hurt) sum(n uint64, sum uint32) {
	hd := h.header()
	at, off := pmlayout.SumPage(n, hd.TablePages())
	h.region.Overwrite(int64(at)*pageSize+int64(off), binary.LittleEndian.AppendUint32(nil, sum))
}

// resealPage sets the sum of a page of a region right, if its header can be read
// and the page has one.
func resealPage(region *disk.Sim, n uint64) {
	for slot := range 2 {
		hd, err := pmlayout.DecodeHeader("", slot, bytesAt(region, int64(slot)*pageSize, pageSize))
		if err != nil || !pmlayout.HasSum(n, hd.TablePages()) {
			continue
		}
		at, off := pmlayout.SumPage(n, hd.TablePages())
		sum := pmlayout.Sum(pmlayout.SumSeed(hd.Store), n, bytesAt(region, int64(n)*pageSize, pageSize))
		if to := int64(at)*pageSize + int64(off); to < region.Size() {
			region.Overwrite(to, binary.LittleEndian.AppendUint32(nil, sum))
		}
	}
}

func (h *hurt) root() pmlayout.Root {
	r, err := pmlayout.DecodeRoot("", read(h.t, h.region, pmlayout.RootPage*pageSize, pageSize))
	if err != nil {
		h.t.Fatal(err)
	}
	return r
}

// leafPage returns the first leaf, and in an inner root's place the root.
func (h *hurt) leafPage() uint64 {
	root := h.root().Tree
	p := (*[pageSize]byte)(read(h.t, h.region, int64(root)*pageSize, pageSize))
	if p[pmlayout.TreeLevelOff] != 1 {
		h.t.Fatalf("the tree's root has level %d, the tests need 1", p[pmlayout.TreeLevelOff])
	}
	_, val := cell(p, 0)
	return uint64(binary.LittleEndian.Uint32(val))
}

func (h *hurt) bitmapPage() uint64 {
	hd := h.header()
	return pmlayout.BitmapPage(0, hd.TablePages())
}

// tx changes the region by a transaction.
func (h *hurt) tx(fn func(tx *pmem.Tx) error) {
	h.t.Helper()
	h.edit(h.t, fn)
}

// inode changes an inode's record.
func (h *hurt) inode(ino sealfs.Ino, fn func(in *meta.Inode)) {
	h.t.Helper()
	h.tx(func(tx *pmem.Tx) error {
		var in meta.Inode
		if err := meta.GetInode(tx, testConfig, ino, &in); err != nil {
			return err
		}
		fn(&in)
		k := meta.InodeKey(testShards, ino)
		return tx.Set(k[:], in.Append(nil))
	})
}

// set writes and del deletes a record.
func (h *hurt) set(key, val []byte) {
	h.t.Helper()
	h.tx(func(tx *pmem.Tx) error { return tx.Set(key, val) })
}

// queue makes a Tally of an inode due.
func (h *hurt) queue(ino sealfs.Ino) {
	h.inode(ino, func(in *meta.Inode) { in.SetQueued(true) })
	k := meta.QueuedKey(testShards, ino)
	h.set(k[:], meta.QueuedValue())
}

func (h *hurt) del(key []byte) {
	h.t.Helper()
	h.tx(func(tx *pmem.Tx) error { return tx.Delete(key) })
}

// get returns a copy of a record.
func (h *hurt) get(key []byte) (val []byte) {
	h.t.Helper()
	h.tx(func(tx *pmem.Tx) error {
		b, err := pmem.Get(tx, key)
		val = bytes.Clone(b)
		return err
	})
	return val
}

// link makes an entry without any bookkeeping; ordinal is added to its cookie.
func (h *hurt) link(dir sealfs.Ino, name string, ino sealfs.Ino, typ uint8, ordinal uint64) {
	h.t.Helper()
	k := meta.EntryKey(testShards, dir, firstCookie(dir, testVolume, []byte(name))+ordinal)
	e := meta.Entry{Ino: ino, Type: typ, Name: []byte(name)}
	h.set(k[:], e.Append(nil))
}

// split makes the inode gone the first partition of the directory sub, as if more of them were to come.
func (h *hurt) split() {
	h.t.Helper()
	dir, part := h.z.sub, h.z.gone
	h.inode(dir, func(in *meta.Inode) {
		in.Gen, in.Bound = 1, 2
		p := meta.Inode{
			Ino: part, Mode: in.Mode, Nlink: 2, Parent: dir, Volume: in.Volume, Version: 1, Gen: 7, Bound: op.PartitionBound + 1,
			Atime: 5, Mtime: 5, Ctime: 5, Btime: 5, Counted: in.Counted,
		}
		k := meta.InodeKey(testShards, part)
		h.set(k[:], p.Append(nil))
	})
	for _, row := range []struct {
		of     sealfs.Ino
		number uint8
		ino    sealfs.Ino
	}{{dir, 0, part}, {part, 0, part}, {dir, workRow, dir}} {
		k := meta.PartitionKey(row.of.Home(testShards), dir, row.number)
		h.set(k[:], binary.AppendUvarint(nil, uint64(row.ino)))
	}
}

func (h *hurt) unlink(dir sealfs.Ino, name string) {
	h.t.Helper()
	k := meta.EntryKey(testShards, dir, firstCookie(dir, testVolume, []byte(name)))
	h.del(k[:])
}

func (h *hurt) usage(ino sealfs.Ino, v sealfs.Volume, bytes, inodes int64) {
	h.t.Helper()
	k := meta.UsageKey(ino.Home(testShards), v)
	h.tx(func(tx *pmem.Tx) error {
		var u meta.Usage
		b, err := pmem.Get(tx, k[:])
		if err == nil {
			u, err = meta.DecodeUsage(b)
		}
		if err != nil && err != sealfs.ErrNotExist {
			return err
		}
		u.Bytes += bytes
		u.Inodes += inodes
		return tx.Set(k[:], u.Append(nil))
	})
}

// entries calls fn for the entry of every slot of the segment table and writes it back.
func (h *hurt) entries(fn func(slot uint32, b []byte)) {
	h.t.Helper()
	h.tx(func(tx *pmem.Tx) error {
		for slot := range h.super().Segments {
			b, err := tx.Table(int(slot)*entryBytes, entryBytes)
			if err != nil {
				return err
			}
			b = bytes.Clone(b)
			fn(slot, b)
			if err := tx.PutTable(int(slot)*entryBytes, b); err != nil {
				return err
			}
		}
		return nil
	})
}

func (h *hurt) addLive(seq uint32, n int32) {
	h.t.Helper()
	h.entries(func(_ uint32, b []byte) {
		if binary.LittleEndian.Uint32(b) == seq {
			binary.LittleEndian.PutUint32(b[8:], binary.LittleEndian.Uint32(b[8:])+uint32(n))
		}
	})
}

// livingSlot returns a sealed slot with live data in which the log does not end.
func (h *hurt) livingSlot() (slot uint32, seq uint32) {
	h.t.Helper()
	end := h.header().StartSlot
	h.entries(func(s uint32, b []byte) {
		g, ok := decodeEntry(b, testSegment)
		if ok && g.state == slotSealed && g.live > 0 && s != end && seq == 0 {
			slot, seq = s, g.seq
		}
	})
	if seq == 0 {
		h.t.Fatal("no sealed segment has live data")
	}
	return slot, seq
}

// place returns the device byte of a position in the log.
func (h *hurt) place(at sealfs.LSN) int64 {
	h.t.Helper()
	off := int64(-1)
	h.entries(func(s uint32, b []byte) {
		if binary.LittleEndian.Uint32(b) == at.Seq() {
			off = h.super().SlotOffset(s) + int64(at.Off())
		}
	})
	if off < 0 {
		h.t.Fatalf("no segment %d", at.Seq())
	}
	return off
}

// first returns the address of the extent inside an inode.
func (h *hurt) first(ino sealfs.Ino) (at sealfs.LSN, n uint32) {
	h.t.Helper()
	h.inode(ino, func(in *meta.Inode) { at, n = in.First.Addr, in.First.Len })
	return at, n
}

// unreadable makes reads fail that touch the block at off.
func unreadable(off int64) disk.Fault {
	return disk.Fault{Kind: disk.ReadError, Match: func(at int64, n, _ int) bool {
		return at < off+layout.BlockSize && off < at+int64(n)
	}}
}

func (h *hurt) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// elsewhere are the numbers that tests of their own expect.
var elsewhere = []ID{RegionRing, LogHeader, LogStaging, StagingLost, ShardTwice, ShardForeign, PreparedWrong, DecisionWrong,
	ChunkPlace, ChunkNoPart, PartNoFile, PartBytes, PartVolume, PartGen, PartBound}

// zooImages returns a closed store with one of everything.
func zooImages(t testing.TB) (images, ids, *world) {
	t.Helper()
	m := images{dev: disk.NewSim("device", layout.DataStart+40*testSegment), region: disk.NewSim("region", 96*pageSize)}
	w := &world{t: t, clock: 1e18}
	_, err := lsfs.Format(m.dev, pmem.NewMemory(m.region), lsfs.Geometry{SegmentBytes: testSegment})
	w.must(err)
	w.s, err = lsfs.Open(m.dev, pmem.NewMemory(m.region), nil, owner{}, lazy)
	w.must(err)
	w.makeRoot()
	for i := range 60 { // a tree of two levels
		w.create(w.root, fmt.Sprint("filler", i))
	}
	z := w.zoo()
	w.must(w.s.Checkpoint()) // so that both header slots are of this log
	w.create(z.sub, "last")
	w.must(w.s.Close())
	return images{dev: m.dev.Reopen(), region: m.region.Reopen()}, z, w
}

func TestProblems(t *testing.T) {
	m, z, w := zooImages(t)
	if rep := judge(t, m.options()); !rep.Clean() {
		t.Fatalf("before any damage: %v", rep.Found)
	}
	tested := slices.Clone(elsewhere)
	for _, d := range damages {
		t.Run(d.name, func(t *testing.T) {
			h := &hurt{images: m.clone(), t: t, z: z, w: w}
			h.o = h.options()
			d.do(h)
			if h.o.Dev == m.dev || h.o.Reg == m.region {
				t.Fatal("the original is being judged")
			}
			dev, region := h.dev.Clone(), h.region.Clone()
			rep := judge(t, h.o)
			if got := rep.IDs(); !slices.Equal(got, d.want) {
				t.Errorf("found %v, want %v", got, d.want)
			}
			if rep.Exit() != ExitUncorrected || rep.Clean() {
				t.Errorf("exit status %d, clean %v", rep.Exit(), rep.Clean())
			}
			// Nothing is written, whatever is found.
			h.dev.ClearFaults()
			if !bytes.Equal(read(t, dev, 0, int(dev.Size())), read(t, h.dev, 0, int(h.dev.Size()))) ||
				!bytes.Equal(read(t, region, 0, int(region.Size())), read(t, h.region, 0, int(h.region.Size()))) {
				t.Error("the check has changed something")
			}
		})
		tested = append(tested, d.want...)
	}
	for _, p := range Problems() {
		if !slices.Contains(tested, p.ID) {
			t.Errorf("no test damages a store so that %d (%s) is found", p.ID, p.Name)
		}
	}
}

func TestProblemTable(t *testing.T) {
	names := map[string]bool{}
	last := ID(0)
	for _, p := range Problems() {
		if p.ID <= last || names[p.Name] || p.Sentence == "" || p.Mend == "" || int(p.ID)/100 < 1 || int(p.ID)/100 > len(passes) {
			t.Errorf("row %d %q", p.ID, p.Name)
		}
		last, names[p.Name] = p.ID, true
	}
}

// TestSplitIsClean: a directory whose entries are about to move is as it should be.
func TestSplitIsClean(t *testing.T) {
	m, z, w := zooImages(t)
	h := &hurt{images: m.clone(), t: t, z: z, w: w}
	h.o = h.options()
	h.split()
	if rep := judge(t, h.o); !rep.Clean() || rep.Partitions != 1 {
		t.Errorf("%v, %d partitions", rep.Found, rep.Partitions)
	}
	// A name in the partition counts for the directory; what has moved and is still at home does not.
	name := ""
	for i := 0; name == ""; i++ {
		if try := fmt.Sprint("name", i); op.PartitionOf(firstCookie(z.sub, testVolume, []byte(try))) == 0 {
			name = try
		}
	}
	var size uint64
	h.inode(z.small, func(in *meta.Inode) { in.Nlink++; size = in.Size })
	h.inode(z.gone, func(in *meta.Inode) { in.Size++ })
	cookie := firstCookie(z.sub, testVolume, []byte(name))
	for _, at := range []sealfs.Ino{z.sub, z.gone} {
		k, e := meta.EntryKey(testShards, at, cookie), meta.Entry{Ino: z.small, Type: typeFile, Name: []byte(name)}
		h.set(k[:], e.Append(nil))
	}
	if rep := judge(t, h.o); !slices.Equal(rep.IDs(), []ID{TotalsWrong}) {
		t.Errorf("a name in a partition counts for nobody: %v", rep.Found)
	}
	h.inode(z.sub, func(in *meta.Inode) { in.Total.Add(meta.Totals{Bytes: int64(size), Files: 1}, 1) })
	h.queue(z.sub)
	if rep := judge(t, h.o); !rep.Clean() {
		t.Errorf("a name in a partition: %v", rep.Found)
	}
	h.inode(z.small, func(in *meta.Inode) { in.Parent = z.gone })
	if rep := judge(t, h.o); !slices.Equal(rep.IDs(), []ID{TotalsWrong, TotalsPlace}) {
		t.Errorf("a file counts in a partition: %v", rep.Found)
	}
	h.o.Repair, h.o.SaveDir = RepairAll, t.TempDir()
	judge(t, h.o)
	h.o.Repair = RepairNone
	if rep := judge(t, h.o); !rep.Clean() {
		t.Errorf("repaired: %v", rep.Found)
	}
}

// A record that rots in staging before it was drained cuts off all behind it.
func TestDamagedStaging(t *testing.T) {
	w := newWorld(t, 60, lazy)
	w.must(w.s.Checkpoint())
	early := images{dev: load(t, w.dev), region: load(t, w.region)}
	for i := range 10 {
		w.create(w.root, fmt.Sprint("file", i))
	}
	w.kill()
	early.ring = w.load().ring
	whole := judge(t, early.options())
	if !whole.Clean() || whole.Staged < 10 {
		t.Fatalf("%v, %d staged", whole.Found, whole.Staged)
	}
	for i := range int(early.ring.Header().Chunks) {
		if early.ring.ChunkSeq(i) == whole.LogEnd.Seq() {
			early.ring.Chunk(i)[whole.LogEnd.Off()-1000] ^= 4
		}
	}
	cut := judge(t, early.options())
	if !slices.Equal(cut.IDs(), []ID{LogStaging}) || cut.LogEnd >= whole.LogEnd {
		t.Errorf("%v, end %v", cut.IDs(), cut.LogEnd)
	}
	mend := early.clone().options()
	mend.Repair, mend.SaveDir = RepairAll, t.TempDir()
	if rep := judge(t, mend); rep.Exit() != ExitUncorrected || len(rep.Plan) > 0 {
		t.Errorf("what was logged is given up without consent: exit status %d, %v", rep.Exit(), rep.Plan)
	}
	mend.CutLog = true
	if rep := judge(t, mend); rep.Exit() != ExitRepaired || rep.Fixed[LogStaging] != 1 || !bytes.Contains(saved(t, rep), []byte(`"problem":306`)) {
		t.Errorf("repair: exit status %d, %v", rep.Exit(), rep.Fixed)
	}
	mend.Ring = nil
	if rep := judge(t, mend); rep.Exit() != ExitClean || rep.Files != cut.Files {
		t.Errorf("repaired: exit status %d, %d files, %d before", rep.Exit(), rep.Files, cut.Files)
	}

	path := t.TempDir() + "/ring"
	if err := os.WriteFile(path, []byte("no ring"), 0o600); err != nil {
		t.Fatal(err)
	}
	o := early.options()
	o.Ring, o.Staging = nil, path
	if rep := judge(t, o); !slices.Equal(rep.IDs(), []ID{StagingLost}) || !rep.Sound() {
		t.Errorf("%v", rep.IDs())
	}
	o.Repair, o.SaveDir = RepairAll, t.TempDir()
	if rep := judge(t, o); rep.Exit() != ExitRepaired {
		t.Errorf("repair: exit status %d, %v", rep.Exit(), rep.IDs())
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file of the ring is still there: %v", err)
	}
	if rep := judge(t, o); rep.Exit() != ExitClean {
		t.Errorf("repaired: exit status %d, %v", rep.Exit(), rep.IDs())
	}
}

// A format of the future is refused by name, not called damaged.
func TestVersion(t *testing.T) {
	m, _, _ := zooImages(t)
	m.dev.Overwrite(8, []byte{9})
	b := read(t, m.dev, 0, layout.BlockSize)
	m.dev.Overwrite(0, resealSuper(b))
	if _, err := Check(t.Context(), m.options()); !errors.Is(err, sealfs.ErrVersion) {
		t.Errorf("%v", err)
	}
}

// remainders are what a repair leaves of some of the damages; of others it leaves nothing.
var remainders = map[string][]ID{
	"no superblock":               {SuperLost},
	"short device":                {DeviceShort},
	"no region header":            {RegionLost},
	"newer header slot":           {RegionSlot, RegionStale},
	"newest superblock":           {SuperCopy, DeviceStale},
	"other store's region":        {RegionForeign},
	"table size":                  {RegionTable},
	"stale region":                {RegionStale},
	"short region":                {RegionShort},
	"stale device":                {DeviceStale},
	"checkpoint outside":          {LogStart},
	"checkpoint's segment":        {LogStartHeader},
	"bad redo":                    {LogRedo},
	"unreadable log":              {LogUnreadable},
	"root page":                   {RootPage},
	"bit of the root page's tree": {RootPage, PageSum},
	"root of the tree":            {RootPage},
	"extent nowhere":              {DataSum},
	"extent outside":              {DataSum},
	"extents share":               {DataSum},
	"unreadable block":            {SegmentRead, DataSum, SegmentRecord},
	"rotten data":                 {DataSum},
	"sum":                         {DataSum},
	"partition that is none":      {PartitionLost},
	"stray partition":             {PartitionStray},
	"entry in another partition":  {EntryApart},
}

// Every damage is repaired, all but what the table of problems says is not; twice
// is once, and what is removed is saved.
func TestRepairs(t *testing.T) {
	m, z, w := zooImages(t)
	fixed := map[ID]bool{}
	for _, d := range damages {
		t.Run(d.name, func(t *testing.T) {
			h := &hurt{images: m.clone(), t: t, z: z, w: w}
			h.o = h.options()
			d.do(h)
			o := h.o
			o.Repair, o.CutLog, o.SaveDir, o.NoData = RepairAll, true, t.TempDir(), false
			o.Confirm = func([]Step) bool { return false }
			before := h.clone()
			plan := judge(t, o)
			if len(plan.Fixed) != 0 || !h.same(before) {
				t.Error("something was repaired without consent")
			}
			o.Confirm = nil
			rep := judge(t, o)
			want := remainders[d.name]
			before = h.clone()
			if second := judge(t, o); !slices.Equal(second.IDs(), want) || len(second.Plan) > 0 || len(second.Fixed) > 0 {
				t.Errorf("after the repair: %v, want %v, %v", second.IDs(), want, second.Plan)
				return
			}
			if !h.same(before) {
				t.Error("the second repair has changed something")
			}
			repaired := false
			for _, id := range d.want {
				p, _ := Lookup(id)
				fixed[id] = fixed[id] || rep.Fixed[id] > 0
				if repaired = repaired || rep.Fixed[id] > 0; rep.Fixed[id] > 0 && p.Remedy == None {
					t.Errorf("%d is repaired, and the table says that it is not", id)
				}
				if p.Remedy != None && !slices.Contains(want, id) && rep.Fixed[id] == 0 {
					t.Errorf("%d is gone and not said to be repaired", id)
				}
			}
			exit := ExitClean
			if repaired {
				exit |= ExitRepaired
			}
			if len(want) > 0 {
				exit |= ExitUncorrected
			}
			if rep.Exit() != exit || len(plan.Plan) != len(rep.Plan) || (len(rep.Plan) > 0) != (len(rep.Saved) > 0) {
				t.Errorf("exit status %d, want %d; %d steps, %d before; saved in %q", rep.Exit(), exit, len(rep.Plan), len(plan.Plan), rep.Saved)
			}
			h.lives(t)
		})
	}
	for _, p := range Problems() {
		if (p.Remedy != None) != fixed[p.ID] && !slices.Contains(elsewhere, p.ID) {
			t.Errorf("%d (%s) is repaired: %v, the table says %v", p.ID, p.Name, fixed[p.ID], p.Remedy)
		}
	}
}

// same reports whether two stores are the same, byte for byte.
func (m images) same(o images) bool {
	a, b := m.clone(), o.clone() // without their faults
	for _, x := range []struct{ a, b *disk.Sim }{{a.dev, b.dev}, {a.region, b.region}} {
		x.a.ClearFaults()
		x.b.ClearFaults()
		p, q := make([]byte, x.a.Size()), make([]byte, x.b.Size())
		x.a.ReadAt(p, 0)
		x.b.ReadAt(q, 0)
		if !bytes.Equal(p, q) {
			return false
		}
	}
	return true
}

// resealSuper sets the checksum of a superblock right.
func resealSuper(b []byte) []byte {
	crc := crc32.Update(crc32.Checksum(b[:12], crc32.MakeTable(crc32.Castagnoli)), crc32.MakeTable(crc32.Castagnoli), b[16:])
	binary.LittleEndian.PutUint32(b[12:], crc)
	return b
}
