package pmem

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"sealfs"
)

// mix spreads numbers evenly, one to one.
func mix(i uint64) uint64 {
	i ^= i >> 31
	i *= 0x9e3779b97f4a7c15
	i ^= i >> 29
	i *= 0xbf58476d1ce4e5b9
	return i ^ i>>32
}

func benchKey(k *[19]byte, i uint64) []byte {
	binary.BigEndian.PutUint64(k[3:], mix(i))
	binary.BigEndian.PutUint64(k[11:], i)
	return k[:]
}

// fill returns a region in a file with n random keys of 19 bytes and values of
// 40, and how many bytes of redo they made.
func fill(tb testing.TB, n int) (r *Region, redoBytes int) {
	tb.Helper()
	b, err := OpenFile(filepath.Join(tb.TempDir(), "region"), true)
	if err != nil {
		tb.Fatal(err)
	}
	if err := Format(b, Geometry{Store: sealfs.UUID{1}, TableBytes: 1 << 20}); err != nil {
		tb.Fatal(err)
	}
	r = open(tb, b, Options{})
	var k [19]byte
	val := []byte("a value of forty bytes, like most of them")
	redo := make([]byte, 0, 1<<20)
	for i := range n {
		if r.NeedsGrowth() {
			if err := r.Grow(); err != nil {
				tb.Fatal(err)
			}
		}
		tx := r.Begin()
		if err := tx.Set(benchKey(&k, uint64(i)), val); err != nil {
			tb.Fatal(err)
		}
		redo = tx.AppendRedo(redo[:0])
		redoBytes += len(redo)
		tx.Commit()
	}
	return r, redoBytes
}

func BenchmarkGet(b *testing.B) {
	for _, n := range []int{1e5, 1e6, 1e7} {
		b.Run(fmt.Sprintf("keys=%.0e", float64(n)), func(b *testing.B) {
			if n > 1e6 && testing.Short() {
				b.Skip("takes a gigabyte of memory")
			}
			r, _ := fill(b, n)
			var k [19]byte
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Get(r, benchKey(&k, rand.Uint64N(uint64(n)))); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkSet is a whole transaction that inserts one key, its redo included.
func BenchmarkSet(b *testing.B) {
	for _, order := range []string{"random", "ascending"} {
		for _, n := range []int{1e5, 1e6} {
			b.Run(fmt.Sprintf("%s/keys=%.0e", order, float64(n)), func(b *testing.B) {
				r, _ := fill(b, n)
				var k [19]byte
				val := []byte("a value of forty bytes, like most of them")
				redo := make([]byte, 0, 1<<20)
				i, total := uint64(n), 0
				b.ReportAllocs()
				for b.Loop() {
					if r.NeedsGrowth() {
						if err := r.Grow(); err != nil {
							b.Fatal(err)
						}
					}
					key := benchKey(&k, i)
					if order == "ascending" {
						binary.BigEndian.PutUint64(k[3:], 1<<63)
					}
					tx := r.Begin()
					if err := tx.Set(key, val); err != nil {
						b.Fatal(err)
					}
					redo = tx.AppendRedo(redo[:0])
					total += len(redo)
					tx.Commit()
					i++
				}
				b.ReportMetric(float64(total)/float64(b.N), "redo-B/op")
			})
		}
	}
}

// BenchmarkUpdate replaces eight bytes of a value.
func BenchmarkUpdate(b *testing.B) {
	const n = 1e5
	r, _ := fill(b, n)
	var k [19]byte
	val := []byte("a value of forty bytes, like most of them")
	redo := make([]byte, 0, 1<<20)
	total := 0
	b.ReportAllocs()
	for b.Loop() {
		binary.LittleEndian.PutUint64(val, rand.Uint64())
		tx := r.Begin()
		if err := tx.Set(benchKey(&k, rand.Uint64N(n)), val); err != nil {
			b.Fatal(err)
		}
		redo = tx.AppendRedo(redo[:0])
		total += len(redo)
		tx.Commit()
	}
	b.ReportMetric(float64(total)/float64(b.N), "redo-B/op")
}

// BenchmarkWalk is one step of a cursor.
func BenchmarkWalk(b *testing.B) {
	r, _ := fill(b, 1e5)
	var c Cursor
	ok := false
	b.ReportAllocs()
	for b.Loop() {
		if !ok {
			ok = c.Seek(r, nil)
			continue
		}
		ok = c.Next()
	}
}

// BenchmarkPage is one look at a page that has been looked at before.
func BenchmarkPage(b *testing.B) {
	r, _ := fill(b, 1e5)
	pages := PageNo(r.Usage().Used)
	n := PageNo(0)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Page(1 + n); err != nil {
			b.Fatal(err)
		}
		if n++; n == pages {
			n = 0
		}
	}
}
