package bench

import (
	"encoding/json"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"time"
)

// subBits is the resolution of a histogram: each power of two is cut into
// 2^subBits buckets, so that a bucket is at most 1/32 (3.1 %) of its value wide.
const (
	subBits = 5
	sub     = 1 << subBits
	// histBuckets: values below sub have a bucket each; above, the exponents
	// subBits..62 of a non-negative int64 have sub buckets each.
	histBuckets = sub + (63-subBits)*sub
)

// histogram counts latencies on a logarithmic scale in constant space (15 KiB
// in memory; sparse in JSON). The zero value is empty and ready to use. It is
// not safe for concurrent use.
type histogram struct {
	counts   [histBuckets]uint64
	n        uint64
	min, max int64 // ns, exact; meaningless while n is 0
}

// bucketOf returns the bucket of v >= 0.
func bucketOf(v int64) int {
	if v < sub {
		return int(v)
	}
	shift := bits.Len64(uint64(v)) - 1 - subBits
	return (shift+1)*sub + int(v>>shift) - sub
}

// bucketMid returns the middle of bucket i.
func bucketMid(i int) int64 {
	if i < sub {
		return int64(i)
	}
	shift := i/sub - 1
	low := int64(i%sub+sub) << shift
	return low + (int64(1)<<shift)/2
}

// add counts one latency. A negative one (no clock does that) counts as 0.
func (h *histogram) add(d time.Duration) {
	v := max(int64(d), 0)
	if h.n == 0 || v < h.min {
		h.min = v
	}
	if h.n == 0 || v > h.max {
		h.max = v
	}
	h.counts[bucketOf(v)]++
	h.n++
}

// merge adds all of o's values to h.
func (h *histogram) merge(o *histogram) {
	if o.n == 0 {
		return
	}
	if h.n == 0 || o.min < h.min {
		h.min = o.min
	}
	if h.n == 0 || o.max > h.max {
		h.max = o.max
	}
	for i, c := range o.counts {
		h.counts[i] += c
	}
	h.n += o.n
}

// quantile returns the value at rank ceil(q*n), q in (0, 1], with an error of
// at most half a bucket (1.6 %). An empty histogram returns 0.
func (h *histogram) quantile(q float64) time.Duration {
	if h.n == 0 {
		return 0
	}
	rank := min(max(uint64(math.Ceil(q*float64(h.n))), 1), h.n)
	var seen uint64
	for i, c := range h.counts {
		if seen += c; seen >= rank {
			return time.Duration(min(max(bucketMid(i), h.min), h.max))
		}
	}
	return time.Duration(h.max)
}

// histogramJSON is a histogram between processes: pairs of bucket and count.
type histogramJSON struct {
	Min    int64       `json:"min"`
	Max    int64       `json:"max"`
	Counts [][2]uint64 `json:"counts"`
}

func (h *histogram) MarshalJSON() ([]byte, error) {
	j := histogramJSON{Min: h.min, Max: h.max}
	for i, c := range h.counts {
		if c > 0 {
			j.Counts = append(j.Counts, [2]uint64{uint64(i), c})
		}
	}
	return json.Marshal(j)
}

func (h *histogram) UnmarshalJSON(b []byte) error {
	var j histogramJSON
	if err := json.Unmarshal(b, &j); err != nil {
		return err
	}
	*h = histogram{min: j.Min, max: j.Max}
	for _, p := range j.Counts {
		if p[0] >= histBuckets {
			return fmt.Errorf("histogram has no bucket %d", p[0])
		}
		h.counts[p[0]] += p[1]
		h.n += p[1]
	}
	return nil
}

// median returns the middle of vs, or the mean of the two middle ones; 0 of
// nothing. vs is left as it is.
func median[T int64 | float64 | time.Duration](vs []T) T {
	if len(vs) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(vs))
	m := len(s) / 2
	if len(s)%2 == 1 {
		return s[m]
	}
	return s[m-1] + (s[m]-s[m-1])/2
}
