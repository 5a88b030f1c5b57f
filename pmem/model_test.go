package pmem

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/pmem/layout"
)

// newRegion returns an empty region of size bytes on a simulated device.
func newRegion(t testing.TB, size int64) (*Region, *disk.Sim) {
	t.Helper()
	dev := disk.NewSim("region", size)
	b := NewMemory(dev)
	if err := Format(b, Geometry{Store: sealfs.UUID{1}, TableBytes: 3 * PageSize}); err != nil {
		t.Fatal(err)
	}
	return open(t, b, Options{}), dev
}

func open(t testing.TB, b Backing, o Options) *Region {
	t.Helper()
	r, _, err := Open(b, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// mustCheck fails the test if the structural check finds anything.
func mustCheck(t testing.TB, c interface{ Check(func(string)) error }) {
	t.Helper()
	n := 0
	if err := c.Check(func(p string) {
		if n++; n <= 10 {
			t.Error(p)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if n > 0 {
		t.FailNow()
	}
}

// shape makes keys and values of one kind.
type shape struct {
	name string
	key  func(rng *rand.Rand, i int) []byte
	val  func(rng *rand.Rand) []byte
}

func randomBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// composite is a key as the namespace makes them: shard, kind, two numbers.
func composite(shard uint16, a, b uint64) []byte {
	k := binary.BigEndian.AppendUint16(nil, shard)
	k = append(k, 0x20)
	k = binary.BigEndian.AppendUint64(k, a)
	return binary.BigEndian.AppendUint64(k, b)
}

var shapes = []shape{
	{"ascending", func(_ *rand.Rand, i int) []byte { return composite(7, 1, uint64(i)) },
		func(rng *rand.Rand) []byte { return randomBytes(rng, 24) }},
	{"random", func(rng *rand.Rand, _ int) []byte { return composite(uint16(rng.IntN(4)), 1, rng.Uint64()%5000) },
		func(rng *rand.Rand) []byte { return randomBytes(rng, 20+rng.IntN(60)) }},
	{"runs", func(rng *rand.Rand, i int) []byte { return composite(uint16(rng.IntN(5)), 1, uint64(i)) },
		func(rng *rand.Rand) []byte { return randomBytes(rng, 40) }},
	{"variable", func(rng *rand.Rand, _ int) []byte {
		return append([]byte("prefix shared by all"), randomBytes(rng, 1+rng.IntN(2))...)
	}, func(rng *rand.Rand) []byte { return randomBytes(rng, rng.IntN(200)) }},
	{"long keys", func(rng *rand.Rand, _ int) []byte {
		k := bytes.Repeat([]byte{'k'}, 1+rng.IntN(KeyMax))
		k[len(k)-1] = byte(rng.IntN(8))
		return k
	}, func(rng *rand.Rand) []byte { return randomBytes(rng, rng.IntN(30)) }},
	{"long values", func(rng *rand.Rand, _ int) []byte { return fmt.Appendf(nil, "%04d", rng.IntN(800)) },
		func(rng *rand.Rand) []byte { return randomBytes(rng, rng.IntN(ValueMax+1)) }},
	{"largest", func(rng *rand.Rand, _ int) []byte {
		return fmt.Appendf(bytes.Repeat([]byte{'x'}, KeyMax-4), "%04d", rng.IntN(300))
	}, func(rng *rand.Rand) []byte { return randomBytes(rng, ValueMax-rng.IntN(3)) }},
}

// TestModel drives random operations against a map, in transactions that are
// committed or reset at random, and compares walks, lookups and the structure.
func TestModel(t *testing.T) {
	for _, s := range shapes {
		t.Run(s.name, func(t *testing.T) {
			for seed := range uint64(3) {
				modelRun(t, s, rand.New(rand.NewPCG(seed, 11)), 6000)
			}
		})
	}
}

func modelRun(t *testing.T, s shape, rng *rand.Rand, steps int) {
	r, _ := newRegion(t, 12<<20)
	committed := map[string]string{}
	live := maps.Clone(committed)
	tx := r.Begin()
	deletes := 30 // per cent; swings, so that the tree grows and shrinks
	for i := range steps {
		if i%(steps/6) == 0 {
			deletes = []int{10, 50, 30, 80, 20, 95}[i/(steps/6)%6]
		}
		key := s.key(rng, i)
		if rng.IntN(100) < deletes {
			if keys := slices.Sorted(maps.Keys(live)); len(keys) > 0 && rng.IntN(8) > 0 {
				// A run of neighbours, so that pages become empty.
				at := rng.IntN(len(keys))
				for _, k := range keys[at:min(len(keys), at+1+rng.IntN(12))] {
					if err := tx.Delete([]byte(k)); err != nil {
						t.Fatalf("step %d: Delete(%x): %v", i, k, err)
					}
					delete(live, k)
				}
			} else {
				_, have := live[string(key)]
				if err := tx.Delete(key); have != (err == nil) || err != nil && err != sealfs.ErrNotExist {
					t.Fatalf("step %d: Delete(%x): %v, in the model %v", i, key, err, have)
				}
				delete(live, string(key))
			}
		} else {
			val := s.val(rng)
			if err := tx.Set(key, val); err != nil {
				t.Fatalf("step %d: Set(%x): %v", i, key, err)
			}
			live[string(key)] = string(val)
		}
		switch rng.IntN(40) {
		case 0:
			tx.Reset()
			live = maps.Clone(committed)
		case 1, 2, 3, 4, 5, 6:
			tx.Commit()
			committed = maps.Clone(live)
			tx = r.Begin()
		case 7:
			compareWalk(t, tx, live, rng, s.key(rng, i))
		}
		if i%500 == 0 {
			compareAll(t, tx, live)
			compareAll(t, r, committed)
			mustCheck(t, tx)
			mustCheck(t, r)
		}
	}
	for k := range live {
		if err := tx.Delete([]byte(k)); err != nil {
			t.Fatalf("Delete(%x): %v", k, err)
		}
	}
	tx.Commit()
	mustCheck(t, r)
	if u := r.Usage(); u.Keys != 0 || u.Used != 1 {
		t.Fatalf("after deleting everything: %+v", u)
	}
}

// compareAll compares every key by Get and by a full walk.
func compareAll(t *testing.T, r Reader, want map[string]string) {
	t.Helper()
	for k, v := range want {
		got, err := Get(r, []byte(k))
		if err != nil || string(got) != v {
			t.Fatalf("Get(%x) = %x, %v; want %x", k, got, err, v)
		}
	}
	keys := slices.Sorted(maps.Keys(want))
	var c Cursor
	n := 0
	for ok := c.Seek(r, nil); ok; ok = c.Next() {
		if n >= len(keys) || string(c.Key()) != keys[n] || string(c.Value()) != want[keys[n]] {
			t.Fatalf("key %d of the walk is %x = %x", n, c.Key(), c.Value())
		}
		n++
	}
	if c.Err() != nil || n != len(keys) {
		t.Fatalf("the walk ends after %d of %d keys: %v", n, len(keys), c.Err())
	}
}

// compareWalk compares a short walk from a key that need not exist.
func compareWalk(t *testing.T, r Reader, want map[string]string, rng *rand.Rand, from []byte) {
	t.Helper()
	keys := slices.Sorted(maps.Keys(want))
	i, _ := slices.BinarySearch(keys, string(from))
	var c Cursor
	ok := c.Seek(r, from)
	for range 1 + rng.IntN(100) {
		if ok != (i < len(keys)) || ok && string(c.Key()) != keys[i] {
			t.Fatalf("walk from %x: %v %x, want number %d of %d keys", from, ok, c.Key(), i, len(keys))
		}
		if !ok {
			break
		}
		ok = c.Next()
		i++
	}
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
	if _, err := Get(r, from); (err == nil) != (want[string(from)] != "" || contains(want, from)) {
		t.Fatalf("Get(%x): %v", from, err)
	}
}

func contains(m map[string]string, k []byte) bool { _, ok := m[string(k)]; return ok }

// TestAliasing sets values that lie in the pages being changed.
func TestAliasing(t *testing.T) {
	r, _ := newRegion(t, 8<<20)
	rng := rand.New(rand.NewPCG(3, 4))
	tx := r.Begin()
	want := map[string]string{}
	if err := tx.Set([]byte("0"), randomBytes(rng, 300)); err != nil {
		t.Fatal(err)
	}
	v, _ := Get(tx, []byte("0"))
	want["0"] = string(v)
	for i := range 2000 {
		from := fmt.Sprint(rng.IntN(i + 1))
		v, err := Get(tx, []byte(from))
		if contains(want, []byte(from)) != (err == nil) {
			t.Fatalf("Get(%s): %v", from, err)
		}
		if err != nil {
			continue
		}
		to, val := fmt.Sprint(rng.IntN(i+2)), string(v)
		if err := tx.Set([]byte(to), v); err != nil {
			t.Fatal(err)
		}
		want[to] = val
	}
	compareAll(t, tx, want)
	mustCheck(t, tx)
}

// TestLimits checks what Set refuses.
func TestLimits(t *testing.T) {
	r, _ := newRegion(t, 8<<20)
	tx := r.Begin()
	for _, c := range []struct{ k, v int }{{0, 0}, {KeyMax + 1, 0}, {1, ValueMax + 1}} {
		if err := tx.Set(make([]byte, c.k), make([]byte, c.v)); !errors.Is(err, sealfs.ErrInvalid) {
			t.Errorf("Set of %d and %d bytes: %v", c.k, c.v, err)
		}
	}
	if err := tx.Set(make([]byte, KeyMax), make([]byte, ValueMax)); err != nil {
		t.Error(err)
	}
	if err := tx.Delete(nil); err != sealfs.ErrNotExist {
		t.Errorf("Delete of the empty key: %v", err)
	}
	if _, err := Get(tx, make([]byte, KeyMax+7)); err != sealfs.ErrNotExist {
		t.Errorf("Get of a key that is too long: %v", err)
	}
}

// TestFull fills small regions: Set then refuses without changing anything, and
// everything can be deleted. Long keys make the tree high, so that the last
// page can be short at any level.
func TestFull(t *testing.T) {
	for size := int64(73); size < 97; size++ {
		r, _ := newRegion(t, size*PageSize)
		want := map[string]string{}
		tx := r.Begin()
		for i := 0; ; i++ {
			k := fmt.Appendf(bytes.Repeat([]byte{'k'}, 280), "%06d", i*7919%10007)
			v := fmt.Appendf(nil, "%060d", i)
			before := tx.AppendRedo(nil)
			err := tx.Set(k, v)
			if errors.Is(err, sealfs.ErrNoSpace) {
				if got := tx.AppendRedo(nil); !bytes.Equal(got, before) {
					t.Fatalf("%d pages: a refused Set has changed the redo", size)
				}
				break
			}
			if err != nil || i > 10000 {
				t.Fatalf("%d pages: Set %d: %v", size, i, err)
			}
			want[string(k)] = string(v)
			if i%3 == 0 {
				tx.Commit()
			}
		}
		tx.Commit()
		mustCheck(t, r)
		compareAll(t, r, want)
		if r.NeedsGrowth() {
			t.Error("a region on a device of fixed size wants to grow")
		}
		if err := r.Grow(); !errors.Is(err, sealfs.ErrNoSpace) {
			t.Errorf("Grow: %v", err)
		}
		for k := range want {
			tx := r.Begin()
			if err := tx.Delete([]byte(k)); err != nil {
				t.Fatal(err)
			}
			tx.Commit()
		}
		mustCheck(t, r)
		if u := r.Usage(); u.Used != 1 || u.Free != u.Pages-u.Reserved-1 {
			t.Errorf("after deleting everything: %+v", u)
		}
	}
}

// TestFill pins how full pages become: ascending keys fill them, also when
// several runs interleave; random ones reach the usual two thirds.
func TestFill(t *testing.T) {
	for _, c := range []struct {
		name string
		key  func(i int) []byte
		min  float64
	}{
		{"ascending", func(i int) []byte { return composite(1, 1, uint64(i)) }, 0.97},
		{"runs", func(i int) []byte { return composite(uint16(i/300%7), 1, uint64(i)) }, 0.85},
		{"random", func(i int) []byte { return composite(1, 1, rand.NewPCG(1, uint64(i)).Uint64()) }, 0.62},
	} {
		r, _ := newRegion(t, 16<<20)
		const n, cell = 40000, 3 + 19 + 40 + 2
		for i := range n {
			tx := r.Begin()
			if err := tx.Set(c.key(i), make([]byte, 40)); err != nil {
				t.Fatal(err)
			}
			tx.Commit()
		}
		mustCheck(t, r)
		if got := float64(n*cell) / float64(r.Usage().Used*nodeBytes); got < c.min {
			t.Errorf("%s keys fill pages to %.2f, want %.2f", c.name, got, c.min)
		}
	}
}

// TestState checks table and state in and out of transactions.
func TestState(t *testing.T) {
	r, _ := newRegion(t, 8<<20)
	tx := r.Begin()
	if err := tx.PutTable(PageSize-16, bytes.Repeat([]byte{5}, 32)); err != nil {
		t.Fatal(err)
	}
	if err := tx.PutState(2000, []byte("state")); err != nil {
		t.Fatal(err)
	}
	if b, _ := r.Table(PageSize-32, 32); !bytes.Equal(b, make([]byte, 32)) || r.State()[2000] != 0 {
		t.Fatal("the region changed before Commit")
	}
	look := func(v interface {
		Table(off, n int) ([]byte, error)
		State() []byte
	}) {
		t.Helper()
		a, err1 := v.Table(PageSize-32, 32)
		b, err2 := v.Table(PageSize, 32)
		want := append(make([]byte, 16), bytes.Repeat([]byte{5}, 32)...)
		if err1 != nil || err2 != nil || !bytes.Equal(append(a[:32:32], b[:16]...), want) {
			t.Errorf("table: % x % x, %v, %v", a, b, err1, err2)
		}
		if s := v.State(); len(s) != layout.StateBytes || string(s[2000:2005]) != "state" {
			t.Errorf("state of %d bytes: %q", len(s), s[2000:2005])
		}
	}
	look(tx)
	tx.Commit()
	look(r)
	for _, c := range [][2]int{{-1, 4}, {3*PageSize - 16, 32}, {PageSize - 16, 32}, {0, -1}} {
		if _, err := r.Table(c[0], c[1]); !errors.Is(err, sealfs.ErrInvalid) {
			t.Errorf("Table(%d, %d): %v", c[0], c[1], err)
		}
	}
	if err := tx.PutTable(3*PageSize-16, make([]byte, 32)); !errors.Is(err, sealfs.ErrInvalid) {
		t.Errorf("PutTable beyond the end: %v", err)
	}
	if err := tx.PutState(layout.StateBytes-1, make([]byte, 2)); !errors.Is(err, sealfs.ErrInvalid) {
		t.Errorf("PutState beyond the end: %v", err)
	}
}

func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 1)) }
