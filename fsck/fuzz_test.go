package fsck

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/lsfs/layout"
	"sealfs/meta"
	"sealfs/pmem"
	pmlayout "sealfs/pmem/layout"
)

// mutate applies the changes that b describes, eight bytes each: what is
// changed, where (4 bytes), and three bytes to XOR. Checksums of what has one
// that stands alone are set right again, or no damage would get beyond them.
func mutate(m images, b []byte) {
	for ; len(b) >= 8; b = b[8:] {
		at, x := int64(binary.LittleEndian.Uint32(b[1:])), b[5:8]
		switch b[0] % 12 {
		case 0:
			flip(m.dev, at%(m.dev.Size()-8), x)
		case 1: // where the log is
			flip(m.dev, layout.DataStart+at%(8*testSegment), x)
		case 2:
			flip(m.region, at%(m.region.Size()-8), x)
		case 3:
			slot := at % 2
			flip(m.dev, slot*layout.BlockSize+16+at/2%200, x)
			p := bytesAt(m.dev, slot*layout.BlockSize, layout.BlockSize)
			m.dev.Overwrite(slot*layout.BlockSize, resealSuper(p))
		case 4:
			slot := at % 2
			flip(m.region, slot*pageSize+8+at/2%90, x)
			p := bytesAt(m.region, slot*pageSize, pageSize)
			table := crc32.MakeTable(crc32.Castagnoli)
			crc := crc32.Update(crc32.Checksum(binary.LittleEndian.AppendUint64(nil, uint64(slot)), table), table, p[:pageSize-4])
			binary.LittleEndian.PutUint32(p[pageSize-4:], crc)
			m.region.Overwrite(slot*pageSize, p)
		case 5:
			flip(m.region, pmlayout.RootPage*pageSize+at%(60*pageSize), x) // the pages in use
			if x[0]&1 == 0 {
				resealPage(m.region, pmlayout.RootPage+uint64(at)%(60*pageSize)/pageSize)
			}
		case 6:
			m.region.Zero(at%20*pageSize, pageSize)
		case 7: // one page over another
			m.region.Overwrite(at%20*pageSize, bytesAt(m.region, int64(x[0])%20*pageSize, pageSize))
		case 8:
			m.dev.Zero(at%(m.dev.Size()/pageSize)*pageSize, pageSize)
		case 9:
			m.dev.Overwrite(layout.DataStart+at%64*pageSize, bytesAt(m.dev, layout.DataStart+int64(x[0])%64*pageSize, pageSize))
		default:
			mutateRecord(m, int(at%4096), x)
		}
	}
}

// mutateRecord changes the n-th record, if the region can be opened: its value, its
// key, or whether it is there.
func mutateRecord(m images, n int, x []byte) {
	r, h, err := pmem.Open(pmem.NewMemory(m.region), pmem.Options{})
	if err != nil {
		return
	}
	defer r.Close()
	var keys [][]byte
	var cur pmem.Cursor
	for ok := cur.Seek(r, nil); ok && len(keys) < 4096; ok = cur.Next() {
		keys = append(keys, bytes.Clone(cur.Key()))
	}
	if len(keys) == 0 || cur.Err() != nil {
		return
	}
	key := keys[n%len(keys)]
	tx := r.Begin()
	val, err := pmem.Get(tx, key)
	if err != nil {
		return
	}
	val = bytes.Clone(val)
	switch x[0] % 4 {
	case 0:
		err = tx.Delete(key)
	case 1:
		key[int(x[1])%len(key)] ^= x[2]
		err = tx.Set(key, val)
	default:
		if len(val) > 0 {
			val[int(x[1])%len(val)] ^= x[2]
		}
		err = tx.Set(key, val)
	}
	if err != nil {
		return
	}
	tx.Commit()
	ck := r.BeginCheckpoint()
	for more := true; more; {
		if more = ck.Copy(); ck.Write() != nil {
			return
		}
	}
	ck.Finish(h)
}

// mends repairs a mutated store, after a recovery of a copy: both must end, without a
// panic and without much memory, and a second repair must find nothing to do.
func mends(t *testing.T, m images, b []byte) *Report {
	m = m.clone()
	mutate(m, b)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	c := m.clone()
	if s, err := lsfs.Open(c.dev, pmem.NewMemory(c.region), c.ring, owner{}, lazy); err == nil {
		s.Abandon()
	}
	o := m.options()
	o.Shards, o.Repair, o.CutLog = 0, RepairAll, true
	var out strings.Builder
	o.Out = &out
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	first, err := Check(ctx, o)
	if errors.Is(err, sealfs.ErrVersion) {
		return first
	}
	if err != nil {
		t.Fatalf("%x: %v\n%s", b, err, out.String())
	}
	o.Ring = nil
	again, err := Check(ctx, o)
	if err != nil || len(again.Plan) > 0 {
		t.Fatalf("%x: the second repair: %v, %v\n%s", b, err, again.Plan, out.String())
	}
	for _, id := range again.IDs() {
		if p, _ := Lookup(id); p.Remedy != None && again.fatals() == 0 && !stays(id, again) && !strings.Contains(out.String(), "nothing is repaired: writing") {
			t.Fatalf("%x: left: %v\n%s", b, again.Found, out.String())
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 1<<30 {
		t.Fatalf("%x: %d bytes were allocated", b, n)
	}
	return first
}

// stays reports whether a problem that is repaired in general is left for good
// reasons: what a segment holds does not verify, superblocks are of two stores, or
// the shards of the cluster have been taken for others.
func stays(id ID, rep *Report) bool {
	switch id {
	case SegmentHeader, SegmentOther, SegmentRecord, ExtentOrphan:
		return rep.Counts[DataSum] > 0
	case SuperDisagree, SuperCopy, RegionDisagree, RegionSlot, TableFull:
		return true
	}
	return rep.NotJudged > 0
}

func (r *Report) fatals() (n int) {
	for id := range r.Counts {
		if p, _ := Lookup(id); p.Severity == Fatal {
			n++
		}
	}
	return n
}

// once are mutations that repairs did not come to an end with, or left something of.
var once = []string{
	"4f47cc18e9db4651c37d0108cba6288ecdc625c6ddf48457", "75abceb5c2acb7705e4129b0aa99b901a1b8cb06973e93cf",
	"0b9854a96755d8156bdd5deda0852cf7f19005a522e2af930bb459086c7e6955",
	"0aa6b3d776e8b2ff0a3ba9282887570e0b2aef5f6f6c45a90a52b3732ab2c2107a03359d93036337",
	"774b35d2d0fa3dfe0b44351f42a484a12fb7bc44853ca8d30af9d221ea738e170bffb37c65b2536b0baaf7a75ae83f22",
	"0bea02caf0cbeb720a11b0c4e3c9dbf0590631e5ed715e970bdac707e15730710c3ab69b40448b5949a8531e0288bfc2",
	"63003158323130303830303030303030", "63ba3231243030303130303030303030",
}

// FuzzImages mutates whole images, device and region, and runs recovery and repairs
// over them.
func FuzzImages(f *testing.F) {
	m, _, _ := zooImages(f)
	f.Add([]byte{})
	f.Add([]byte{3, 0, 0, 0, 0, 1, 2, 3, 4, 9, 0, 0, 0, 1, 2, 3})
	f.Add([]byte{10, 9, 0, 0, 0, 0, 0, 0})
	for _, text := range once {
		b, err := hex.DecodeString(text)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) { mends(t, m, b[:min(len(b), 200)]) })
}

func TestMutatedImagesAreRepaired(t *testing.T) {
	m, _, _ := zooImages(t)
	rng := rand.New(rand.NewPCG(11, 12))
	fixed := map[ID]int{}
	n := 300
	if testing.Short() {
		n = 50
	}
	for range n {
		b := make([]byte, 8*(1+rng.IntN(4)))
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		for id := range mends(t, m, b).Fixed {
			fixed[id]++
		}
	}
	if len(fixed) < 20 && n == 300 {
		t.Errorf("only %d kinds of problems were repaired: %v", len(fixed), fixed)
	}
}

func bytesAt(d *disk.Sim, off int64, n int) []byte {
	b := make([]byte, n)
	d.ReadAt(b, off)
	return b
}

func flip(d *disk.Sim, off int64, x []byte) {
	b := bytesAt(d, off, len(x))
	for i := range b {
		b[i] ^= x[i]
	}
	d.Overwrite(off, b)
}

// survives checks a mutated store: the check must end, without a panic, and its
// report must be consistent.
func survives(t *testing.T, m images, b []byte) *Report {
	m = m.clone()
	mutate(m, b)
	o := m.options()
	o.Shards = 0
	rep, err := Check(t.Context(), o)
	if err != nil && !errors.Is(err, sealfs.ErrVersion) {
		t.Fatalf("%x: %v", b, err)
	}
	if rep.Clean() != (len(rep.Found) == 0) || rep.Sound() && rep.left(Error) > 0 {
		t.Fatalf("%x: %+v", b, rep)
	}
	return rep
}

func FuzzCheck(f *testing.F) {
	m, _, _ := zooImages(f)
	f.Add([]byte{})
	f.Add([]byte{3, 0, 0, 0, 0, 1, 2, 3, 4, 9, 0, 0, 0, 1, 2, 3})
	f.Add([]byte{5, 0, 16, 0, 0, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) { survives(t, m, b[:min(len(b), 400)]) })
}

func TestMutations(t *testing.T) {
	m, _, _ := zooImages(t)
	rng := rand.New(rand.NewPCG(5, 6))
	found := map[ID]int{}
	for range 1000 {
		b := make([]byte, 8*(1+rng.IntN(4)))
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		for i := 5; i < len(b); i += 8 { // one bit is the most usual damage
			b[i], b[i+1], b[i+2] = 1<<rng.IntN(8), 0, 0
		}
		for id := range survives(t, m, b).Counts {
			found[id]++
		}
	}
	if len(found) < 20 {
		t.Errorf("the damage led to only %d kinds of problems: %v", len(found), found)
	}
}

// Whatever is damaged on one of several stores, all are judged to the end.
func TestMutationsOfStores(t *testing.T) {
	c := newStores(t, 2)
	z := c.grow()
	c.big(z.a)
	var rows [2][][]byte // keys of what only several stores have
	for _, name := range []string{"mkdir", "replace"} {
		_, at := c.do(transactions(c, z)[name], decided)
		for _, p := range at.parts {
			k := meta.PreparedKey(p.Shard, at.req.Tx, 0)
			rows[p.Shard%2] = append(rows[p.Shard%2], k[:])
		}
		k := meta.DecisionKey(at.req.Coord, at.req.Tx)
		rows[at.req.Coord%2] = append(rows[at.req.Coord%2], k[:])
	}
	all := c.copies()
	rng := rand.New(rand.NewPCG(7, 8))
	found := map[ID]int{}
	for i := range 400 {
		hurtOne := i % 2
		m := slices.Clone(all)
		m[hurtOne] = m[hurtOne].clone()
		if rng.IntN(2) == 0 {
			b := make([]byte, 16)
			for j := range b {
				b[j] = byte(rng.Uint32())
			}
			mutate(m[hurtOne], b)
		} else {
			h := &hurt{images: m[hurtOne], t: t}
			key := rows[hurtOne][rng.IntN(len(rows[hurtOne]))]
			val := h.get(key)
			val[rng.IntN(len(val))] ^= 1 << rng.IntN(8)
			h.set(key, val)
		}
		o := []Options{{Dev: m[0].dev, Reg: m[0].region}, {Dev: m[1].dev, Reg: m[1].region}}
		rep, err := CheckAll(t.Context(), o, nil)
		if err != nil && !errors.Is(err, sealfs.ErrInvalid) { // another store's or cluster's identity
			t.Fatalf("%d: %v", i, err)
		}
		for j, err := range rep.Errors {
			if err != nil && !errors.Is(err, sealfs.ErrVersion) {
				t.Fatalf("%d: store %d: %v", i, j, err)
			}
		}
		for _, id := range rep.numbers() {
			found[id]++
		}
	}
	if len(found) < 20 {
		t.Errorf("the damage led to only %d kinds of problems: %v", len(found), found)
	}
}
