package pmem

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/pmem/layout"
)

func newDaxRegion(t *testing.T) (*SimDax, *Region) {
	t.Helper()
	mem := NewSimDax("pmem", 1<<20)
	if err := Format(mem, Geometry{TableBytes: 4096}); err != nil {
		t.Fatal(err)
	}
	r, _, err := Open(mem, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return mem, r
}

// TestDaxHeader shows that no power cut leaves a header without what lies below its
// start: what was committed before it.
func TestDaxHeader(t *testing.T) {
	mem, r := newDaxRegion(t)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 40 {
		key, val := []byte(fmt.Sprint("key", i)), bytes.Repeat([]byte{byte(i)}, 100)
		tx := r.Begin()
		if err := tx.Set(key, val); err != nil {
			t.Fatal(err)
		}
		tx.Commit()
		seen := 0
		mem.SetHook(func() {
			for m := range mem.CrashStates(rng, 8) {
				r, h, err := Open(m, Options{})
				if err != nil {
					t.Fatal(err)
				}
				if h.Start != sealfs.LSN(i+1) {
					continue
				}
				seen++
				if got, err := Get(r, key); err != nil || !bytes.Equal(got, val) {
					t.Fatalf("header %d is there, the key before it is not: %v", i+1, err)
				}
			}
		})
		if err := r.PutHeader(Header{Start: sealfs.LSN(i + 1)}); err != nil {
			t.Fatal(err)
		}
		mem.SetHook(nil)
		if seen == 0 {
			t.Fatal("no state had the new header")
		}
	}
}

// TestSimDax holds the simulation to what persistent memory may do.
func TestSimDax(t *testing.T) {
	mem := NewSimDax("pmem", 4*PageSize)
	m, err := mem.Map(0, 4*PageSize)
	if err != nil {
		t.Fatal(err)
	}
	b, rng := m.Bytes(), rand.New(rand.NewPCG(1, 2))
	states := func() map[string]int {
		found := map[string]int{}
		for s := range mem.CrashStates(rng, 100) {
			found[string([]byte{s.region.now[0], s.region.now[8], s.region.now[16]})]++
		}
		return found
	}
	expect := func(what string, want ...string) {
		t.Helper()
		got := states()
		if len(got) != len(want) {
			t.Errorf("%s: states %v, want %q", what, got, want)
		}
		for _, w := range want {
			if got[w] == 0 {
				t.Errorf("%s: state %q is missing in %v", what, w, got)
			}
		}
	}
	p := mem.Persistence()
	b[0] = 'a'
	expect("stored", "\x00\x00\x00", "a\x00\x00")
	p.Fence()
	expect("fenced, but not written back", "\x00\x00\x00", "a\x00\x00")
	p.WriteBack(b[:1])
	expect("written back", "\x00\x00\x00", "a\x00\x00")
	p.Fence()
	expect("fenced", "a\x00\x00")
	b[0], b[8] = 'b', 'B'
	p.WriteBack(b[:1]) // the whole line
	b[0] = 'c'
	expect("two words, one twice", "a\x00\x00", "b\x00\x00", "c\x00\x00", "aB\x00", "bB\x00", "cB\x00")
	p.Fence()
	expect("the last store is not written back", "bB\x00", "cB\x00")
	line := bytes.Repeat([]byte{'d'}, LineBytes)
	p.Store(b, line)
	p.Fence()
	expect("stored past the cache", "ddd")
}

// TestProcessor runs the instructions on ordinary memory: they must leave every
// byte as it was stored, wherever ranges begin and end.
func TestProcessor(t *testing.T) {
	cpu, err := detect()
	if errors.Is(err, sealfs.ErrNotSupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", cpu.name)
	mem := make([]byte, 4*PageSize) // large enough to begin at a page
	src := make([]byte, len(mem))
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range src {
		src[i] = byte(rng.Uint32())
	}
	for range 1000 {
		lo := rng.IntN(len(mem) / LineBytes)
		hi := lo + rng.IntN(len(mem)/LineBytes-lo+1)
		clear(mem)
		cpu.Store(mem[lo*LineBytes:], src[lo*LineBytes:hi*LineBytes])
		cpu.Fence()
		want := make([]byte, len(mem))
		copy(want[lo*LineBytes:], src[lo*LineBytes:hi*LineBytes])
		if !bytes.Equal(mem, want) {
			t.Fatalf("store of lines %d to %d", lo, hi)
		}
		lo, hi = rng.IntN(len(mem)), len(mem)
		cpu.WriteBack(mem[lo : lo+rng.IntN(hi-lo+1)])
		cpu.Fence()
		if !bytes.Equal(mem, want) {
			t.Fatal("a write-back changed memory")
		}
	}
}

// TestModes opens a region on a file system that is no persistent memory.
func TestModes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "region")
	b, err := OpenFile(path, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(Format(b, Geometry{}), b.Close()); err != nil {
		t.Fatal(err)
	}
	if err := CheckDax(path); err == nil {
		t.Skip("the directory for temporary files lies on persistent memory")
	} else if !errors.Is(err, sealfs.ErrNotSupported) {
		t.Errorf("check: %v", err)
	}
	if _, err := OpenFileMode(path, ModeDax); !errors.Is(err, sealfs.ErrNotSupported) {
		t.Errorf("dax: %v", err)
	}
	if _, err := OpenFileMode(path, "direct"); !errors.Is(err, sealfs.ErrInvalid) {
		t.Errorf("an unknown mode: %v", err)
	}
	for _, mode := range []string{"", ModeAuto, ModeFile} {
		b, err := OpenFileMode(path, mode)
		if err != nil {
			t.Fatalf("mode %q: %v", mode, err)
		}
		if _, ok := b.(Persistent); ok {
			t.Errorf("mode %q is persistent memory", mode)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
	if list, err := os.ReadDir(filepath.Dir(path)); err != nil || len(list) != 1 {
		t.Errorf("left behind: %v, %v", list, err)
	}
}

// TestDaxFeature shows that an unknown feature is refused beside the known one.
func TestDaxFeature(t *testing.T) {
	h := Header{Version: layout.Version, Incompat: layout.FeatureDax}
	if got, err := layout.DecodeHeader("region", 0, h.Encode()); err != nil || got.Incompat != layout.FeatureDax {
		t.Errorf("%v, %v", got, err)
	}
	h.Incompat |= 1 << 40
	if _, err := layout.DecodeHeader("region", 0, h.Encode()); !errors.Is(err, sealfs.ErrVersion) {
		t.Errorf("an unknown feature: %v", err)
	}
}

// TestDaxNoSums shows that regions for persistent memory are made without page sums,
// and that one with sums is not used as such.
func TestDaxNoSums(t *testing.T) {
	mem := NewSimDax("pmem", 1<<20)
	if err := Format(mem, Geometry{Store: sealfs.UUID{1}}); err != nil {
		t.Fatal(err)
	}
	r, h, err := Open(mem, Options{})
	if err != nil || h.Incompat != FeatureNoSums {
		t.Fatalf("features %#x, %v", h.Incompat, err)
	}
	for _, bits := range []uint64{FeatureDax, 0} {
		if err := r.PutHeader(Header{Incompat: bits}); err != nil || r.Header().Incompat != FeatureNoSums|bits {
			t.Errorf("features %#x, %v", r.Header().Incompat, err)
		}
	}
	file := NewMemory(disk.NewSim("file", 1<<20))
	if err := Format(file, Geometry{Store: sealfs.UUID{1}}); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1<<20)
	if _, err := file.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := mem.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Open(mem, Options{}); !errors.Is(err, sealfs.ErrNotSupported) {
		t.Errorf("a region with sums: %v", err)
	}
}

// BenchmarkPersist: what a create does to make itself durable (server TestDaxCost),
// on ordinary memory.
func BenchmarkPersist(b *testing.B) {
	cpu, err := detect()
	if err != nil {
		b.Skip(err)
	}
	ring, region, record := make([]byte, 1<<20), make([]byte, 1<<20), make([]byte, 5*LineBytes)
	off := 0
	for b.Loop() {
		cpu.Store(ring[off:], record)
		cpu.Fence()
		for i := range 11 {
			line := region[(off*7+i*4096)%len(region):]
			line[0]++
			cpu.WriteBack(line[:8])
		}
		off = (off + len(record)) % (len(ring) - len(record))
	}
}
