package layout

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"sealfs"
)

func sample() Header {
	return Header{
		Version: Version, Compat: 0x8000000000000001, Store: sealfs.UUID{0xa0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0xaf},
		Incarnation: 0x11121314, Update: 0x2122232425262728, Start: 0x3132333435363738, StartSlot: 0x41424344,
		Chain: 0x51525354, TableBytes: 0x616263, Pages: 0x7172737475,
	}
}

// TestGoldenHeader pins every byte of a header slot.
func TestGoldenHeader(t *testing.T) {
	h := sample()
	b := h.Encode()
	const want = "5345414c46537231" + "02000000" + "00000000" + "0000000000000000" + "0100000000000080" +
		"a00102030405060708090a0b0c0d0eaf" + "14131211" + "44434241" + "2827262524232221" + "3837363534333231" +
		"54535251" + "00000000" + "6362610000000000" + "7574737271000000"
	if got := hex.EncodeToString(b[:headerUsed]); got != want {
		t.Errorf("header is\n%s, want\n%s", got, want)
	}
	if !bytes.Equal(b[headerUsed:headerCRC], make([]byte, headerCRC-headerUsed)) {
		t.Error("the rest of the header is not zeros")
	}
	if got, want := hex.EncodeToString(b[headerCRC:]), "d9486774"; got != want {
		t.Errorf("checksum %s, want %s", got, want)
	}
	got, err := DecodeHeader("r", 0, b)
	if err != nil || got != h {
		t.Errorf("decoded: %+v, %v", got, err)
	}
}

// TestGoldenPages pins the root page, an empty leaf, and the places of things.
func TestGoldenPages(t *testing.T) {
	b := EncodeRoot(Root{Tree: 0x0102030405060708, Pages: 0x11, Keys: 0x22})
	const root = "5345414c726f6f74" + "0807060504030201" + "1100000000000000" + "2200000000000000"
	if got := hex.EncodeToString(b[:32]); got != root || len(b) != 4096 || !bytes.Equal(b[32:], make([]byte, 4064)) {
		t.Errorf("root page %s, want %s", got, root)
	}
	if r, err := DecodeRoot("r", b); err != nil || r != (Root{0x0102030405060708, 0x11, 0x22}) {
		t.Errorf("decoded: %+v, %v", r, err)
	}
	b[3] ^= 1
	if _, err := DecodeRoot("r", b); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("damaged root page: %v", err)
	}
	const leaf = "54500000" + "0000" + "0000" + "0010" + "0000"
	if got := hex.EncodeToString(EncodeTree()[:TreeHeader]); got != leaf {
		t.Errorf("empty leaf %s, want %s", got, leaf)
	}
	for _, c := range []struct{ got, want uint64 }{
		{GroupPages, 32768}, {IntentPage, 2}, {RootPage, 3}, {TablePage, 4}, {StateOff, 2048}, {StateBytes, 2048},
		{BitmapPage(0, 7), 11}, {Reserved(0, 7), 44}, {BitmapPage(3, 7), 98304}, {Reserved(3, 7), 33}, {SumPages, 32},
		{(&Header{TableBytes: 1}).TablePages(), 1}, {(&Header{TableBytes: 4096}).TablePages(), 1},
		{(&Header{TableBytes: 4097}).TablePages(), 2}, {(&Header{}).TablePages(), 0},
		{TableBytesMax, 64 << 20}, {StagingSeqOff, 1024}, {StagingChunksMax, 764},
	} {
		if c.got != c.want {
			t.Errorf("got %d, want %d", c.got, c.want)
		}
	}
}

// TestFlippedBit: no single bit of a header slot can change unnoticed, nor can a
// sound header be taken for the other slot's.
func TestFlippedBit(t *testing.T) {
	h := sample()
	b := h.Encode()
	for bit := range PageSize * 8 {
		b[bit/8] ^= 1 << (bit % 8)
		if _, err := DecodeHeader("r", 0, b); !errors.Is(err, sealfs.ErrCorrupt) {
			t.Fatalf("bit %d flipped: %v", bit, err)
		}
		b[bit/8] ^= 1 << (bit % 8)
	}
	if _, err := DecodeHeader("r", 1, b); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("in the other slot: %v", err)
	}
	for _, n := range []int{0, 7, PageSize - 1} {
		if _, err := DecodeHeader("r", 0, b[:n]); !errors.Is(err, sealfs.ErrCorrupt) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

// TestVersion: sound headers that this program must not use are refused by name.
func TestVersion(t *testing.T) {
	h := sample()
	h.Version = 7
	if _, err := DecodeHeader("the region", 0, h.Encode()); !errors.Is(err, sealfs.ErrVersion) ||
		!strings.Contains(err.Error(), "the region") || !strings.Contains(err.Error(), "version 7") {
		t.Errorf("version 7: %v", err)
	}
	h = sample()
	h.Incompat = 1<<3 | 1<<40
	if _, err := DecodeHeader("the region", 0, h.Encode()); !errors.Is(err, sealfs.ErrVersion) ||
		!strings.Contains(err.Error(), "bit 3, bit 40") {
		t.Errorf("features: %v", err)
	}
	h = sample()
	h.TableBytes = TableBytesMax + 1
	if _, err := DecodeHeader("r", 0, h.Encode()); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("table too large: %v", err)
	}
	h = sample()
	h.Pages = 1 << 60
	if _, err := DecodeHeader("r", 0, h.Encode()); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("too many pages: %v", err)
	}
}

// FuzzDecodeHeader: what is accepted is exactly what Encode writes.
func FuzzDecodeHeader(f *testing.F) {
	h := sample()
	f.Add(h.Encode(), uint8(0))
	h.Update++
	f.Add(h.Encode(), uint8(1))
	h.Version = 9
	f.Add(h.Encode(), uint8(1))
	f.Add([]byte(Magic), uint8(0))
	f.Fuzz(func(t *testing.T, b []byte, slot uint8) {
		h, err := DecodeHeader("r", int(slot&1), b)
		if err != nil {
			if !errors.Is(err, sealfs.ErrCorrupt) && !errors.Is(err, sealfs.ErrVersion) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(h.Encode(), b) {
			t.Errorf("%+v does not encode to what it was decoded from", h)
		}
		DecodeRoot("r", b)
	})
}

// TestHasSum: of each group, what is not reserved and the bitmap have sums, and
// of the first root and table.
func TestHasSum(t *testing.T) {
	const table = 5
	want := map[uint64]bool{RootPage: true, BitmapPage(0, table): true, BitmapPage(2, table): true, BitmapPage(1, table): true}
	for i := range uint64(table) {
		want[TablePage+i] = true
	}
	for n := range uint64(3 * GroupPages) {
		g := n / GroupPages
		if got := HasSum(n, table); got != (want[n] || n-g*GroupPages >= Reserved(g, table)) {
			t.Fatalf("page %d: %v", n, got)
		}
	}
	if HasSum(0, table) || HasSum(1, table) {
		t.Error("a header has a sum")
	}
}
