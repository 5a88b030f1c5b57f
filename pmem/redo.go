package pmem

import (
	"encoding/binary"
	"math/bits"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/pmem/layout"
)

// Redo is the bytes that a transaction changes in the region, by page in
// ascending order:
//
//	page    uvarint: page number less that of the page before (0 for the first)
//	ranges  one or more, ascending, neither touching nor overlapping:
//	        uvarint: (offset less the end of the range before) * 2, plus 1 if another follows
//	        uvarint: length, at least 1
//	        bytes
//
// Header slots, the intent page and sum pages are never in it.

// redoGap is the number of equal bytes that are cheaper to repeat than to step
// over: a range costs two or three bytes.
const redoGap = 4

// diff appends the ranges inside s in which the pages differ, joining those
// less than redoGap apart also with the last of spans.
func diff(spans []span, old, new *node, s span) []span {
	for i := s.lo; i < s.hi; i += 8 {
		var x uint64
		if i+8 <= s.hi {
			x = binary.LittleEndian.Uint64(old[i:]) ^ binary.LittleEndian.Uint64(new[i:])
		} else {
			for j := i; j < s.hi; j++ {
				x |= uint64(old[j]^new[j]) << (8 * (j - i))
			}
		}
		if x == 0 {
			continue
		}
		// Between its first and last differing byte a word is one range.
		lo := i + bits.TrailingZeros64(x)/8
		hi := i + 8 - bits.LeadingZeros64(x)/8
		if n := len(spans); n > 0 && lo-spans[n-1].hi <= redoGap {
			spans[n-1].hi = hi
		} else {
			spans = append(spans, span{lo, hi})
		}
	}
	return spans
}

// appendPage appends the redo of one page.
func appendPage(b []byte, delta PageNo, spans []span, p *node) []byte {
	b = enc.AppendUvarint(b, uint64(delta))
	end := 0
	for i, s := range spans {
		off := uint64(s.lo-end) << 1
		if i+1 < len(spans) {
			off |= 1
		}
		b = enc.AppendUvarint(b, off)
		b = enc.AppendUvarint(b, uint64(s.hi-s.lo))
		b = append(b, p[s.lo:s.hi]...)
		end = s.hi
	}
	return b
}

// walkRedo calls fn for each range of redo, which lies in a page of a kind that
// has a sum, below limit. It returns the rule that redo breaks, or ""; fn may have
// been called for what stood before the fault.
func walkRedo(redo []byte, tablePages uint64, limit PageNo, fn func(n PageNo, off int, b []byte)) string {
	r := enc.Reader{B: redo}
	prev := PageNo(0)
	for len(r.B) > 0 {
		delta := r.Uvarint()
		n := prev + PageNo(delta)
		switch {
		case r.Err || delta == 0 || n < prev:
			return "redo page"
		case n >= limit:
			return "redo beyond the region's largest size"
		case !layout.HasSum(uint64(n), tablePages):
			return "redo of a header slot, intent or sum page"
		}
		prev = n
		for end, more := 0, true; more; {
			off, size := r.Uvarint(), r.Uvarint()
			more = off&1 != 0
			off >>= 1
			if r.Err || off > PageSize || size == 0 || size > PageSize ||
				end+int(off)+int(size) > PageSize || end > 0 && off == 0 {
				return "redo range"
			}
			lo := end + int(off)
			end = lo + int(size)
			b := r.Bytes(int(size))
			if r.Err {
				return "redo ends early"
			}
			fn(n, lo, b)
		}
	}
	return ""
}

// ApplyRedo applies redo that AppendRedo made, grows the region to hold it, and
// marks its pages dirty. Redo that breaks a rule is a *sealfs.Corruption and
// changes nothing.
//
// Before Recovered a page that does not fit its sum is healed by its redo if a
// checkpoint was writing when the power went; otherwise it stays as it is, and
// every later use of it is an error. After Recovered it is an error at once, and
// part of the redo may have been applied. It may block on the medium. REQUIRES:
// exclusive latch, no transaction under way.
func (r *Region) ApplyRedo(redo []byte) error {
	last := PageNo(0)
	what := walkRedo(redo, r.tablePages, PageNo(r.maxPages), func(n PageNo, _ int, _ []byte) { last = n })
	if what != "" {
		return &sealfs.Corruption{Where: r.name, Off: -1, What: what}
	}
	if uint64(last) >= r.pages.Load() {
		if err := r.growTo(int64(last+1) * PageSize); err != nil {
			return err
		}
	}
	var err error
	walkRedo(redo, r.tablePages, PageNo(r.maxPages), func(n PageNo, off int, b []byte) {
		if !r.isVerified(n) {
			use, e := r.admit(n)
			if e != nil {
				err = e
			}
			if !use {
				return
			}
		}
		r.replay(n, r.raw(n), off, b)
		r.markDirty(n)
	})
	r.hint = 0
	return err
}
