package alloc

import (
	"cmp"
	"slices"
)

// A Segment is what the choice of a victim looks at.
type Segment struct {
	Slot uint32
	Live uint32 // bytes that are still referenced
	Used uint32 // bytes that were written, Live included; above 0
	Age  int64  // since its youngest byte was written, in any unit
}

// Victims returns the slots of at most n segments to clean, best first, by the
// cost-benefit rule of the log-structured file system of Rosenblum and
// Ousterhout (1992): freed space times age over the cost of reading all and
// writing what lives, (1-u)·age / (1+u), where u = Live/size. Segments with u
// above limit gain too little and are left out. segs is reordered.
func Victims(segs []Segment, size uint32, limit float64, n int) []uint32 {
	score := func(s Segment) float64 {
		u := float64(s.Live) / float64(size)
		return (1 - u) * float64(max(s.Age, 1)) / (1 + u)
	}
	segs = slices.DeleteFunc(segs, func(s Segment) bool { return float64(s.Live) > limit*float64(size) })
	slices.SortFunc(segs, func(a, b Segment) int {
		if c := cmp.Compare(score(b), score(a)); c != 0 {
			return c
		}
		return cmp.Compare(a.Slot, b.Slot)
	})
	out := make([]uint32, 0, min(n, len(segs)))
	for _, s := range segs[:min(n, len(segs))] {
		out = append(out, s.Slot)
	}
	return out
}
