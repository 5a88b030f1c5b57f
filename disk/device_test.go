package disk

import (
	"bytes"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"

	"sealfs"
)

const testSize = 1 << 20

// openers are the devices that must all keep the contract of Device.
var openers = []struct {
	name string
	open func(t testing.TB) Device
}{
	{"sim", func(testing.TB) Device { return NewSim("sim", testSize) }},
	{"buffered", func(t testing.TB) Device { return openImage(t, OpenOptions{}) }},
	{"direct", func(t testing.TB) Device { return openImage(t, OpenOptions{Direct: true}) }},
	{"exclusive", func(t testing.TB) Device { return openImage(t, OpenOptions{Direct: true, Exclusive: true}) }},
}

// openImage opens a new image of testSize bytes.
func openImage(t testing.TB, o OpenOptions) *File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := CreateImage(path, testSize); err != nil {
		t.Fatal(err)
	}
	return mustOpen(t, path, o)
}

// mustOpen opens path and closes it when the test ends, if it has not done so.
func mustOpen(t testing.TB, path string, o OpenOptions) *File {
	t.Helper()
	d, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil && !errors.Is(err, sealfs.ErrClosed) {
			t.Error(err)
		}
	})
	return d
}

func mustWrite(t testing.TB, d Device, off int64, p []byte) {
	t.Helper()
	if n, err := d.WriteAt(p, off); n != len(p) || err != nil {
		t.Fatalf("WriteAt(%d bytes, %d) = %d, %v", len(p), off, n, err)
	}
}

func mustFlush(t testing.TB, d Device) {
	t.Helper()
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
}

func mustRead(t testing.TB, d Device, off int64, n int) []byte {
	t.Helper()
	p := make([]byte, n)
	if m, err := d.ReadAt(p, off); m != n || err != nil {
		t.Fatalf("ReadAt(%d bytes, %d) = %d, %v", n, off, m, err)
	}
	return p
}

func wantError(t testing.TB, what string, err error, code sealfs.Code) {
	t.Helper()
	if !errors.Is(err, code) {
		t.Errorf("%s: %v, want %v", what, err, code)
	}
}

func fill(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n) }

func TestContract(t *testing.T) {
	for _, o := range openers {
		t.Run(o.name, func(t *testing.T) {
			t.Run("geometry", func(t *testing.T) { testGeometry(t, o.open(t)) })
			t.Run("model", func(t *testing.T) { testModel(t, o.open(t)) })
			t.Run("range", func(t *testing.T) { testRange(t, o.open(t)) })
			t.Run("discard", func(t *testing.T) { testDiscard(t, o.open(t)) })
			t.Run("stats", func(t *testing.T) { testStats(t, o.open(t)) })
			t.Run("concurrent", func(t *testing.T) { testConcurrent(t, o.open(t)) })
			t.Run("close", func(t *testing.T) { testClose(t, o.open(t)) })
		})
	}
}

func testGeometry(t *testing.T, d Device) {
	if d.Size() != testSize {
		t.Errorf("size %d, want %d", d.Size(), testSize)
	}
	if s := d.SectorSize(); s != 512 && s != 4096 {
		t.Errorf("sector of %d bytes", s)
	}
	if d.Name() == "" {
		t.Error("no name")
	}
	if got := mustRead(t, d, 0, testSize); !bytes.Equal(got, make([]byte, testSize)) {
		t.Error("a new device does not read as zeros")
	}
}

// testModel compares random writes and reads, aligned or not, with a slice.
func testModel(t *testing.T, d Device) {
	rng := rand.New(rand.NewPCG(1, 2))
	model := make([]byte, testSize)
	sector := d.SectorSize()
	for range 300 {
		if n := rng.IntN(testSize/sector) * sector; rng.IntN(2) == 0 {
			n = min(n, 1<<rng.IntN(8)*sector)
			p := AlignedBuffer(n + 1)
			p = p[rng.IntN(2):][:n] // aligned memory or not
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			off := rng.IntN((testSize-n)/sector+1) * sector
			mustWrite(t, d, int64(off), p)
			copy(model[off:], p)
			clear(p) // the device must have kept none of it
		}
		if rng.IntN(8) == 0 {
			mustFlush(t, d)
		}
		n := rng.IntN(testSize)
		if rng.IntN(2) == 0 {
			n = rng.IntN(3 * sector)
		}
		off := rng.IntN(testSize - n + 1)
		if got := mustRead(t, d, int64(off), n); !bytes.Equal(got, model[off:off+n]) {
			t.Fatalf("read of [%d, +%d) differs", off, n)
		}
	}
	buf := AlignedBuffer(testSize)
	if _, err := d.ReadAt(buf, 0); err != nil || !bytes.Equal(buf, model) {
		t.Errorf("aligned read of everything differs (%v)", err)
	}
}

func testRange(t *testing.T, d Device) {
	sector := d.SectorSize()
	p := AlignedBuffer(sector)
	end := d.Size()
	for _, off := range []int64{1, -1, int64(-sector), end, end + int64(sector), math.MaxInt64, math.MinInt64} {
		n, err := d.WriteAt(p, off)
		if n != 0 {
			t.Errorf("write at %d wrote %d bytes", off, n)
		}
		wantError(t, "write out of range", err, sealfs.ErrInvalid)
		wantError(t, "discard out of range", d.Discard(off, int64(sector)), sealfs.ErrInvalid)
	}
	_, err := d.WriteAt(p[:sector-1], 0)
	wantError(t, "write of a part of a sector", err, sealfs.ErrInvalid)
	wantError(t, "discard of a negative length", d.Discard(0, int64(-sector)), sealfs.ErrInvalid)

	_, err = d.ReadAt(p, -1)
	wantError(t, "read at -1", err, sealfs.ErrInvalid)
	mustWrite(t, d, end-int64(sector), fill(sector, 7)) // a refusal must not latch
	mustFlush(t, d)

	for _, c := range []struct {
		off  int64
		n    int
		want int
		err  error
	}{
		{end - 10, 10, 10, nil}, {end - 10, 11, 10, io.EOF}, {end - int64(sector), 3 * sector, sector, io.EOF},
		{end, 1, 0, io.EOF}, {end + 1, 1, 0, io.EOF}, {math.MaxInt64, 1, 0, io.EOF},
		{0, 0, 0, nil}, {end, 0, 0, nil},
	} {
		got := make([]byte, c.n)
		if n, err := d.ReadAt(got, c.off); n != c.want || err != c.err {
			t.Errorf("read of %d bytes at %d: %d, %v; want %d, %v", c.n, c.off, n, err, c.want, c.err)
		} else if !bytes.Equal(got[:n], fill(n, 7)) {
			t.Errorf("read of %d bytes at %d returned the wrong ones", c.n, c.off)
		}
	}
	if n, err := d.WriteAt(nil, end); n != 0 || err != nil {
		t.Errorf("empty write at the end: %d, %v", n, err)
	}
}

func testDiscard(t *testing.T, d Device) {
	mustWrite(t, d, 0, fill(64<<10, 9))
	mustFlush(t, d)
	err := d.Discard(16<<10, 32<<10)
	if err != nil && !errors.Is(err, sealfs.ErrNotSupported) {
		t.Fatal(err)
	}
	if !bytes.Equal(mustRead(t, d, 0, 16<<10), fill(16<<10, 9)) ||
		!bytes.Equal(mustRead(t, d, 48<<10, 16<<10), fill(16<<10, 9)) {
		t.Error("discard took bytes outside its range")
	}
	if got := mustRead(t, d, 16<<10, 32<<10); err == nil && !bytes.Equal(got, make([]byte, 32<<10)) {
		t.Error("discarded bytes of an image or simulation are not zeros")
	}
	if err := d.Discard(0, 0); err != nil {
		t.Errorf("empty discard: %v", err)
	}
	mustWrite(t, d, 16<<10, fill(4096, 3))
	mustFlush(t, d)
	if !bytes.Equal(mustRead(t, d, 16<<10, 4096), fill(4096, 3)) {
		t.Error("a write after the discard is not there")
	}
}

func testStats(t *testing.T, d Device) {
	mustWrite(t, d, 0, AlignedBuffer(4096))
	mustWrite(t, d, 8192, AlignedBuffer(8192))
	mustFlush(t, d)
	mustRead(t, d, 5, 100)
	if _, err := d.WriteAt(AlignedBuffer(4096), 1); err == nil {
		t.Error("misaligned write succeeded")
	}
	if err := d.Discard(0, 4096); err != nil && !errors.Is(err, sealfs.ErrNotSupported) {
		t.Error(err)
	}
	got := d.Stats()
	if got.Discards > 1 {
		t.Errorf("%d discards", got.Discards)
	}
	got.Discards = 0
	if want := (Stats{Reads: 1, ReadBytes: 100, Writes: 2, WriteBytes: 12288, Flushes: 1}); got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
}

// testConcurrent writes, flushes and reads from several goroutines.
func testConcurrent(t *testing.T, d Device) {
	const workers, each = 8, 20
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			part := int64(testSize / workers * w)
			for i := range each {
				p := fill(4096, byte(w*each+i+1))
				off := part + int64(i)*4096
				if _, err := d.WriteAt(p, off); err != nil {
					t.Error(err)
				}
				if err := d.Flush(); err != nil {
					t.Error(err)
				}
				got := make([]byte, 4096)
				if _, err := d.ReadAt(got, off); err != nil || !bytes.Equal(got, p) {
					t.Errorf("worker %d reads something else than it wrote (%v)", w, err)
				}
			}
		})
	}
	wg.Wait()
	s := d.Stats()
	if s.Writes != workers*each || s.Reads != workers*each || s.Flushes == 0 || s.Flushes > workers*each {
		t.Errorf("stats %+v", s)
	}
}

func testClose(t *testing.T, d Device) {
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	p := AlignedBuffer(4096)
	_, err := d.ReadAt(p, 0)
	wantError(t, "read", err, sealfs.ErrClosed)
	_, err = d.WriteAt(p, 0)
	wantError(t, "write", err, sealfs.ErrClosed)
	wantError(t, "flush", d.Flush(), sealfs.ErrClosed)
	wantError(t, "discard", d.Discard(0, 4096), sealfs.ErrClosed)
	wantError(t, "close", d.Close(), sealfs.ErrClosed)
	if d.Size() != testSize {
		t.Error("a closed device forgot its size")
	}
}

func BenchmarkWriteAt(b *testing.B) {
	for _, o := range openers[:3] {
		for _, size := range []int{4 << 10, 64 << 10} {
			b.Run(o.name+"/"+map[int]string{4 << 10: "4K", 64 << 10: "64K"}[size], func(b *testing.B) {
				d := o.open(b)
				p := AlignedBuffer(size)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				off := int64(0)
				for b.Loop() {
					if _, err := d.WriteAt(p, off); err != nil {
						b.Fatal(err)
					}
					if off += int64(size); off == testSize {
						off = 0
						if err := d.Flush(); err != nil {
							b.Fatal(err)
						}
					}
				}
			})
		}
	}
}
