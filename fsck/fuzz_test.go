package fsck

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
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
			flip(m.region, pmlayout.RootPage*pageSize+at%(20*pageSize), x) // the pages in use
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
