package lsfs

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"sealfs"
	"sealfs/pmem"
	"sealfs/pmem/layout"
)

// TestRottenRegion flips a bit in each page of a closed store's region. Root
// page, table and bitmap refuse the store, by name. With any other page it opens,
// answers what it can, refuses the rest, and never answers wrong.
func TestRottenRegion(t *testing.T) {
	const files = 300
	dev, region := testDevices(24)
	format(t, dev, region)
	s := open(t, dev, region, nil, testOptions())
	data := func(i sealfs.Ino) []byte { return fmt.Appendf(nil, "the data of file %d", i) }
	for i := range sealfs.Ino(files) {
		if _, err := s.put(i+1, data(i+1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	_, h, err := pmem.Open(pmem.NewMemory(region.Reopen()), pmem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	bitmap := layout.BitmapPage(0, h.TablePages())
	refused, lost := 0, 0
	for n := uint64(layout.IntentPage); n < bitmap+48; n++ {
		d, r := dev.Reopen(), region.Reopen()
		r.FlipBit(int64(n)*pmem.PageSize+100, 5)
		s, err := Open(d, pmem.NewMemory(r), nil, tinyFS{}, testOptions())
		fixed := n > layout.IntentPage && n <= bitmap
		// The first sum page has the sums of those, and one of them is hurt.
		if err != nil && (fixed || n == bitmap+1) {
			refused++
			if !errors.Is(err, sealfs.ErrCorrupt) || !strings.Contains(err.Error(), "sealfs-fsck --rebuild-region") || !strings.Contains(err.Error(), "region") {
				t.Errorf("page %d: %v", n, err)
			}
			continue
		}
		if err != nil || fixed {
			t.Fatalf("page %d has rotted: open: %v", n, err)
		}
		bad := 0
		for i := range sealfs.Ino(files) {
			got, err := s.get(i + 1)
			switch {
			case errors.Is(err, sealfs.ErrCorrupt):
				bad++
				if _, err := s.put(i+1, []byte("other")); !errors.Is(err, sealfs.ErrCorrupt) {
					t.Fatalf("page %d: change of what has rotted: %v", n, err)
				}
			case err != nil || !bytes.Equal(got, data(i+1)):
				t.Fatalf("page %d: file %d: %q, %v", n, i+1, got, err)
			default:
				if _, err := s.put(i+1, data(i+1)); err != nil {
					t.Fatalf("page %d: change of what is whole: %v", n, err)
				}
			}
		}
		if bad > 0 {
			lost++
		}
		if err := s.Close(); err != nil { // it is not read-only
			t.Fatal(err)
		}
	}
	if refused < 3 || lost < 4 {
		t.Errorf("%d pages refuse the store, %d lose files", refused, lost)
	}
}
