package layout

import (
	"encoding/binary"

	"sealfs"
	"sealfs/internal/enc"
)

// Sum pages stand behind the bitmap of their group: four bytes for each page of
// the group, in the order of the pages. Header, intent and sum pages have none of
// their own; their four bytes, and those of pages beyond the region, are zeros.
const (
	SumBytes    = 4
	SumsPerPage = PageSize / SumBytes
	SumPages    = GroupPages / SumsPerPage // of a group
)

// Values of a sum that no page's bytes have.
const (
	SumNone = 0          // the page was never written: it is all zeros
	SumLost = 0xffffffff // a recovery found the page damaged and gave it up
)

// SumSeed returns what the sums of a store's pages begin with.
func SumSeed(store sealfs.UUID) uint32 {
	return enc.Seed(0, binary.LittleEndian.Uint64(store[:8]), binary.LittleEndian.Uint64(store[8:]))
}

// Sum returns the sum of page n with bytes p: their CRC-32C, seeded with the
// store and the page number, so that a page at another's place shows as well.
// The two values that have a meaning of their own give way to their neighbours.
func Sum(seed uint32, n uint64, p []byte) uint32 {
	switch sum := enc.CRC(enc.Seed(seed, n), p); sum {
	case SumNone:
		return SumNone + 1
	case SumLost:
		return SumLost - 1
	default:
		return sum
	}
}

// SumFault returns the rule that page n with bytes p and the stored sum break,
// "" if they fit each other; got is the sum that would fit.
func SumFault(seed uint32, n uint64, p []byte, stored uint32) (what string, got uint32) {
	switch stored {
	case SumNone:
		if isZero(p) {
			return "", SumNone
		}
		return "page has no sum and is not zeros", Sum(seed, n, p)
	case SumLost:
		return "page was found damaged and given up by a recovery", Sum(seed, n, p)
	}
	if got = Sum(seed, n, p); got != stored {
		return "page sum", got
	}
	return "", got
}

func isZero(b []byte) bool {
	for ; len(b) >= 8; b = b[8:] {
		if binary.LittleEndian.Uint64(b) != 0 {
			return false
		}
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// SumPage returns where the sum of page n stands: a page and a byte in it. In a
// region that ends inside the first pages of a group it may lie beyond the end;
// then the sum is SumNone.
func SumPage(n, tablePages uint64) (page uint64, off int) {
	g, i := n/GroupPages, n%GroupPages
	return BitmapPage(g, tablePages) + 1 + i/SumsPerPage, int(i % SumsPerPage * SumBytes)
}

// HasSum reports whether page n is of a kind that has a sum: root, table, bitmap
// and tree pages.
func HasSum(n, tablePages uint64) bool {
	if n < RootPage {
		return false
	}
	bitmap := BitmapPage(n/GroupPages, tablePages)
	return n <= bitmap || n > bitmap+SumPages
}

// Intent page:
//
//	  0  8  magic "SEALFSi1"
//	  8 16  store id
//	 24  8  update counter of the checkpoint
//	  …     zeros
//	508  4  CRC-32C of all before, seeded with the page number
//	  …     zeros
//
// It is durable before the checkpoint writes its first page, and void once there
// is a header with that counter or a later one. In between, and only then, a page
// may be torn, or not fit its sum. All of it stands in the first 512 bytes, so
// that a power cut leaves the old intent or the new one. A page of zeros says
// that there was none.
const (
	IntentMagic     = "SEALFSi1"
	intentStoreOff  = 8
	intentUpdateOff = 24
	intentUsed      = 32
	intentCRCOff    = 508
	intentEnd       = 512
)

// EncodeIntent returns the intent page for a checkpoint that will write the
// header with the given update counter.
func EncodeIntent(store sealfs.UUID, update uint64) []byte {
	b := make([]byte, PageSize)
	copy(b, IntentMagic)
	copy(b[intentStoreOff:], store[:])
	binary.LittleEndian.PutUint64(b[intentUpdateOff:], update)
	binary.LittleEndian.PutUint32(b[intentCRCOff:], intentSum(b))
	return b
}

func intentSum(b []byte) uint32 { return enc.CRC(enc.Seed(0, IntentPage), b[:intentCRCOff]) }

// DecodeIntent returns the update counter in the intent page b, 0 if there never
// was an intent. Damage, or another store's intent, is a *sealfs.Corruption;
// where names the region in it.
func DecodeIntent(where string, store sealfs.UUID, b []byte) (update uint64, err error) {
	bad := func(what string, want, got uint64) (uint64, error) {
		return 0, &sealfs.Corruption{Where: where, Off: IntentPage * PageSize, What: what, Want: want, Got: got}
	}
	switch {
	case len(b) != PageSize:
		return bad("intent page length", PageSize, uint64(len(b)))
	case isZero(b):
		return 0, nil
	case string(b[:8]) != IntentMagic:
		return bad("intent page magic", binary.BigEndian.Uint64([]byte(IntentMagic)), binary.BigEndian.Uint64(b))
	}
	if want, got := intentSum(b), binary.LittleEndian.Uint32(b[intentCRCOff:]); want != got {
		return bad("intent page checksum", uint64(want), uint64(got))
	}
	if !isZero(b[intentUsed:intentCRCOff]) || !isZero(b[intentEnd:]) {
		return bad("intent page padding", 0, 0)
	}
	if string(b[intentStoreOff:intentUpdateOff]) != string(store[:]) {
		return bad("intent page's store", binary.BigEndian.Uint64(store[:]), binary.BigEndian.Uint64(b[intentStoreOff:]))
	}
	return binary.LittleEndian.Uint64(b[intentUpdateOff:]), nil
}
