package alloc

import (
	"math/rand/v2"
	"slices"
	"testing"
)

func TestVictims(t *testing.T) {
	const size = 1000
	for _, c := range []struct {
		name string
		segs []Segment
		n    int
		want []uint32
	}{
		{"none", nil, 3, []uint32{}},
		{"the emptiest first", []Segment{{1, 900, 1000, 10}, {2, 100, 1000, 10}, {3, 500, 1000, 10}}, 3, []uint32{2, 3, 1}},
		{"the old before the young", []Segment{{1, 500, 1000, 1}, {2, 500, 1000, 100}}, 2, []uint32{2, 1}},
		{"age outweighs a little use", []Segment{{1, 400, 1000, 10}, {2, 500, 1000, 1000}}, 1, []uint32{2}},
		{"too full to gain", []Segment{{1, 951, 1000, 1000}, {2, 950, 1000, 1}}, 5, []uint32{2}},
		{"equal ones in order", []Segment{{9, 1, 1000, 5}, {4, 1, 1000, 5}}, 2, []uint32{4, 9}},
		{"no age counts as a little", []Segment{{1, 10, 1000, 0}, {2, 900, 1000, 0}}, 2, []uint32{1, 2}},
	} {
		if got := Victims(slices.Clone(c.segs), size, 0.95, c.n); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// TestVictimsModel compares with the rule worked out one by one: no segment that
// was left out would have been better than one that was taken.
func TestVictimsModel(t *testing.T) {
	const size = 1 << 20
	rng := rand.New(rand.NewPCG(1, 2))
	benefit := func(s Segment) float64 {
		u := float64(s.Live) / size
		return (1 - u) * float64(max(s.Age, 1)) / (1 + u)
	}
	for range 500 {
		segs := make([]Segment, rng.IntN(40))
		by := map[uint32]Segment{}
		for i := range segs {
			segs[i] = Segment{uint32(i), rng.Uint32N(size + 1), size, rng.Int64N(1000)}
			by[uint32(i)] = segs[i]
		}
		n := rng.IntN(10)
		got := Victims(slices.Clone(segs), size, 0.9, n)
		worst := -1.0
		for _, slot := range got {
			s := by[slot]
			delete(by, slot)
			if float64(s.Live) > 0.9*size {
				t.Fatalf("took a segment with %d live bytes", s.Live)
			}
			if b := benefit(s); worst < 0 || b < worst {
				worst = b
			}
		}
		left := 0
		for _, s := range by {
			if float64(s.Live) > 0.9*size {
				continue
			}
			left++
			if len(got) > 0 && benefit(s) > worst {
				t.Fatalf("left %+v, which is better than the worst taken (%g)", s, worst)
			}
		}
		if len(got) < n && left > 0 {
			t.Fatalf("took %d of %d and left %d", len(got), n, left)
		}
	}
}
