package pmem

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/pmem/layout"
)

// TestFile takes a region in a file through its life: growth over groups,
// checkpoint, close, open.
func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "region")
	if _, err := OpenFile(path, false); !errors.Is(err, sealfs.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Fatalf("OpenFile of no file: %v", err)
	}
	b, err := OpenFile(path, true)
	if err != nil {
		t.Fatal(err)
	}
	if st, _ := os.Stat(path); st.Mode() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	if _, err := OpenFile(path, false); !errors.Is(err, sealfs.ErrBusy) || !strings.Contains(err.Error(), path) {
		t.Errorf("OpenFile of an open region: %v", err)
	}
	store := sealfs.NewUUID()
	if err := Format(b, Geometry{Store: store, TableBytes: 100 * 32}); err != nil {
		t.Fatal(err)
	}
	r, h, err := Open(b, Options{GrowBytes: 136 << 20, MaxBytes: 300 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if h.Store != store || h.TableBytes != 100*32 || h.Start != 0 || h.Pages != uint64(b.Size()/PageSize) {
		t.Errorf("header %+v", h)
	}
	if !r.NeedsGrowth() {
		t.Error("a fresh region need not grow")
	}
	for r.NeedsGrowth() {
		if err := r.Grow(); err != nil {
			t.Fatal(err)
		}
	}
	u := r.Usage()
	if u.Pages <= layout.GroupPages || u.Free != u.Pages-u.Reserved-1 || u.Used != 1 {
		t.Fatalf("usage after growth: %+v", u)
	}
	// Allocate in the second group, and come back to the first.
	r.hint = layout.GroupPages - 2
	want := map[string]string{}
	for i := range 500 {
		k, v := fmt.Sprintf("key %05d", i*7%500), strings.Repeat("v", 200)
		tx := r.Begin()
		if err := tx.Set([]byte(k), []byte(v)); err != nil {
			t.Fatal(err)
		}
		tx.Commit()
		want[k] = v
	}
	if r.used[1].Load() == 0 {
		t.Error("no page of the second group is used")
	}
	mustCheck(t, r)
	c := r.BeginCheckpoint()
	for c.Copy() {
		if err := c.Write(); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Write(); err != nil {
		t.Fatal(err)
	}
	if err := c.Finish(Header{Start: 77, StartSlot: 5, Chain: 6, Incarnation: 9}); err != nil {
		t.Fatal(err)
	}
	used := r.Usage()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}

	if b, err = OpenFile(path, false); err != nil {
		t.Fatal(err)
	}
	r, h, err = Open(b, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if h.Start != 77 || h.StartSlot != 5 || h.Chain != 6 || h.Incarnation != 9 || h.Store != store || h.Update != 2 {
		t.Errorf("header after a checkpoint: %+v", h)
	}
	if u := r.Usage(); u.Used != used.Used || u.Keys != used.Keys || u.Dirty != 0 || u.Private != 0 {
		t.Errorf("usage after opening: %+v, before %+v", u, used)
	}
	compareAll(t, r, want)
	mustCheck(t, r)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 100<<20); err != nil {
		t.Fatal(err)
	}
	if b, err = OpenFile(path, false); err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, _, err = Open(b, Options{}); !errors.Is(err, sealfs.ErrCorrupt) || !strings.Contains(err.Error(), "shorter than its header says") {
		t.Errorf("Open of a truncated region: %v", err)
	}
}

// TestHeaderSlots: one damaged slot is survived by the other, two are not, and
// another version is refused by name.
func TestHeaderSlots(t *testing.T) {
	newest := func(dev *disk.Sim) (sealfs.LSN, error) {
		r, h, err := Open(NewMemory(dev), Options{})
		if err == nil {
			r.Close()
		}
		return h.Start, err
	}
	r, dev := newRegion(t, 1<<20)
	for lsn := range 3 {
		c := r.BeginCheckpoint()
		c.Copy()
		if err := c.Write(); err != nil {
			t.Fatal(err)
		}
		if err := c.Finish(Header{Start: sealfs.LSN(lsn + 1)}); err != nil {
			t.Fatal(err)
		}
	}
	// Updates 0 and 1 are Format's, so update 4, start 3, is in slot 0.
	for _, c := range []struct {
		damage []int64
		want   sealfs.LSN
	}{{nil, 3}, {[]int64{0}, 2}, {[]int64{1}, 3}} {
		d := dev.Clone()
		for _, slot := range c.damage {
			d.FlipBit(slot*PageSize+70, 3)
		}
		if got, err := newest(d); err != nil || got != c.want {
			t.Errorf("slots %v damaged: start %d, %v; want %d", c.damage, got, err, c.want)
		}
	}
	d := dev.Clone()
	d.FlipBit(0, 1)
	d.FlipBit(2*PageSize-1, 1)
	if _, err := newest(d); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("both slots damaged: %v", err)
	}
	d = dev.Clone()
	h := Header{Version: layout.Version + 1, Update: 9}
	d.Overwrite(PageSize, h.Encode())
	if _, err := newest(d); !errors.Is(err, sealfs.ErrVersion) || !strings.Contains(err.Error(), "version 2") {
		t.Errorf("a newer version: %v", err)
	}
	if _, err := newest(disk.NewSim("blank", 1<<20)); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("a blank device: %v", err)
	}
	if _, err := newest(disk.NewSim("tiny", 512)); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("a device of one sector: %v", err)
	}
}

// TestFormat: what cannot be formatted, and that an old region leaves nothing.
func TestFormat(t *testing.T) {
	dev := disk.NewSim("region", 1<<20)
	for _, g := range []Geometry{{TableBytes: -1}, {TableBytes: layout.TableBytesMax + 1}} {
		if err := Format(NewMemory(dev), g); !errors.Is(err, sealfs.ErrInvalid) {
			t.Errorf("Format with a table of %d bytes: %v", g.TableBytes, err)
		}
	}
	for _, g := range []Geometry{{TableBytes: 1 << 20}, {MaxBytes: 4 * PageSize}} {
		if err := Format(NewMemory(dev), g); !errors.Is(err, sealfs.ErrNoSpace) {
			t.Errorf("Format of %+v on 1 MiB: %v", g, err)
		}
	}
	dev.Overwrite(0, bytes.Repeat([]byte{0xa5}, 1<<20))
	if err := Format(NewMemory(dev), Geometry{TableBytes: 5000}); err != nil {
		t.Fatal(err)
	}
	r := open(t, NewMemory(dev.CrashClone(nil)), Options{})
	mustCheck(t, r)
	if !bytes.Equal(r.State(), make([]byte, layout.StateBytes)) {
		t.Error("the state is not zeros")
	}
	for off := 0; off < 4992; off += 32 {
		if b, err := r.Table(off, 32); err != nil || !bytes.Equal(b, make([]byte, 32)) {
			t.Fatalf("table at %d: % x, %v", off, b, err)
		}
	}
	if _, err := r.Page(256); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("a page beyond the region: %v", err)
	}
}

// TestCrashFormat: after a power cut in Format over an old region there is
// the old region, none, or the new one; a region is whole.
func TestCrashFormat(t *testing.T) {
	_, dev := newRegion(t, 1<<20)
	done := false
	states := 0
	dev.SetHook(func(disk.Op) {
		for d := range dev.CrashStates(newRand(9), 12) {
			states++
			r, h, err := Open(NewMemory(d), Options{})
			switch {
			case errors.Is(err, sealfs.ErrCorrupt):
				if done {
					t.Errorf("no region after Format: %v", err)
				}
			case err != nil:
				t.Error(err)
			case h.Store != sealfs.UUID{1} && h.Store != sealfs.UUID{2}:
				t.Errorf("a region of store %v", h.Store)
			default:
				mustCheck(t, r)
			}
			if r != nil {
				r.Close()
			}
		}
	})
	if err := Format(NewMemory(dev), Geometry{Store: sealfs.UUID{2}, TableBytes: 4096}); err != nil {
		t.Fatal(err)
	}
	done = true
	if err := dev.Flush(); err != nil || states < 20 {
		t.Fatalf("%d states, %v", states, err)
	}
}

// TestAllocations: the steady state allocates nothing.
func TestAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	r, _ := newRegion(t, 8<<20)
	rng := newRand(1)
	key, val := composite(1, 1, 0), make([]byte, 50)
	redo := make([]byte, 0, 1<<20)
	n := 0
	cycle := func() {
		n++
		tx := r.Begin()
		for range 20 {
			for i := len(key) - 8; i < len(key)-6; i++ {
				key[i] = byte(rng.Uint32())
			}
			val[0]++
			if n/200%2 == 0 {
				if err := tx.Set(key, val[:10+rng.IntN(40)]); err != nil {
					t.Fatal(err)
				}
			} else if err := tx.Delete(key); err != nil && err != sealfs.ErrNotExist {
				t.Fatal(err)
			}
			if _, err := Get(tx, key); err != nil && err != sealfs.ErrNotExist {
				t.Fatal(err)
			}
		}
		var c Cursor
		for ok, i := c.Seek(tx, key), 0; ok && i < 150; ok, i = c.Next(), i+1 {
		}
		redo = tx.AppendRedo(redo[:0])
		tx.Commit()
		for ok, i := c.Seek(r, key), 0; ok && i < 150; ok, i = c.Next(), i+1 {
		}
	}
	for range 2000 {
		cycle()
	}
	if a := testing.AllocsPerRun(800, cycle); a != 0 {
		t.Errorf("%v allocations per transaction", a)
	}
	mustCheck(t, r)
}

// TestLargeTransaction: thousands of pages in one transaction.
func TestLargeTransaction(t *testing.T) {
	r, _ := newRegion(t, 24<<20)
	tx := r.Begin()
	want := map[string]string{}
	for i := range uint64(12000) {
		k, v := composite(1, mix(i), i), bytes.Repeat([]byte{byte(i)}, 800)
		if err := tx.Set(k, v); err != nil {
			t.Fatal(err)
		}
		want[string(k)] = string(v)
	}
	if tx.n < 3000 {
		t.Fatalf("only %d pages are touched", tx.n)
	}
	redo := tx.AppendRedo(nil)
	tx.Commit()
	compareAll(t, r, want)
	mustCheck(t, r)
	other, _ := newRegion(t, 24<<20)
	if err := other.ApplyRedo(redo); err != nil {
		t.Fatal(err)
	}
	sameRegion(t, "a large transaction", other, r)
	if r.Begin(); len(r.tx.overlays) > overlaysKept {
		t.Errorf("%d page buffers are kept", len(r.tx.overlays))
	}
}

// failing is a Backing whose mapping fails.
type failing struct{ Backing }

func (failing) Map(off, n int64) (Mapping, error) { return nil, io.ErrUnexpectedEOF }

// TestOpenFails: an error of the medium is Open's, and the medium stays usable.
func TestOpenFails(t *testing.T) {
	_, dev := newRegion(t, 1<<20)
	if _, _, err := Open(failing{NewMemory(dev)}, Options{}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("Open: %v", err)
	}
	dev.Fail(disk.Fault{Kind: disk.ReadError, Once: true})
	if _, _, err := Open(NewMemory(dev), Options{}); !errors.Is(err, sealfs.ErrIO) {
		t.Errorf("Open: %v", err)
	}
	open(t, NewMemory(dev), Options{})
}
