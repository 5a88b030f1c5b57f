package fsck

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"slices"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/meta"
	pmlayout "sealfs/pmem/layout"
)

// mutate applies the changes that b describes, eight bytes each: what is
// changed, where (4 bytes), and three bytes to XOR. Checksums of what has one
// that stands alone are set right again, or no damage would get beyond them.
func mutate(m images, b []byte) {
	for ; len(b) >= 8; b = b[8:] {
		at, x := int64(binary.LittleEndian.Uint32(b[1:])), b[5:8]
		switch b[0] % 6 {
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
		}
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
