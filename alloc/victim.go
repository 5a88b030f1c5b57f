package alloc

import (
	"math"
	"slices"
)

// A Segment is what the choice of a victim looks at.
type Segment struct {
	Slot uint32
	Live uint32 // bytes that are still referenced
	Used uint32 // bytes that were written, Live included; above 0
	Age  int64  // since its bytes were written by their users, on average, in any unit
}

// A Choice picks the segments to clean among those that it is told of. The rule
// is that of the log-structured file system of Rosenblum and Ousterhout (1992),
// freed space times age over the cost of reading all and writing what lives, but
// with the fourth root of the age: (1-u)·age^¼ / (1+u), where u = Live/Size.
// Their age is that of a segment; this one is that of the data, which grows
// as it is moved, and would drown the gain. With the root uniformly random
// overwrites cost hardly more than under the greedy rule, and skewed ones much
// less than under either (TestCleaningCost).
type Choice struct {
	Size  uint32  // bytes of a segment
	Limit float64 // segments with u above it gain too little and are left out
	N     int     // so many are picked
	best  []scored
}

type scored struct {
	Segment
	score float64
}

// Reset forgets all segments.
func (c *Choice) Reset() { c.best = c.best[:0] }

// Add tells of a segment. It takes constant time, for a constant N.
func (c *Choice) Add(g Segment) {
	u := float64(g.Live) / float64(c.Size)
	if u > c.Limit {
		return
	}
	x := scored{g, (1 - u) * math.Sqrt(math.Sqrt(float64(max(g.Age, 1)))) / (1 + u)}
	if len(c.best) == c.N {
		if c.N == 0 || !x.before(c.best[c.N-1]) {
			return
		}
		c.best = c.best[:c.N-1]
	}
	i := len(c.best)
	for i > 0 && x.before(c.best[i-1]) {
		i--
	}
	c.best = slices.Insert(c.best, i, x)
}

func (x scored) before(y scored) bool {
	return x.score > y.score || x.score == y.score && x.Slot < y.Slot
}

// alike is how far apart the ages of two segments may be, as a factor, if what
// lives in them is to be put together.
const alike = 2

// Victims returns the picked segments, best first; but those that are about as
// old as the best come before all others. Cleaned together in this order,
// data is sorted by age: what is likely to live as long stands together, and a
// segment is either soon empty or full for long.
func (c *Choice) Victims() []Segment {
	out := make([]Segment, 0, len(c.best))
	if len(c.best) == 0 {
		return out
	}
	age := float64(max(c.best[0].Age, 1))
	for _, want := range []bool{true, false} {
		for _, x := range c.best {
			a := float64(max(x.Age, 1))
			if (a <= age*alike && a*alike >= age) == want {
				out = append(out, x.Segment)
			}
		}
	}
	return out
}
