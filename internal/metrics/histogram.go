package metrics

import (
	"math/bits"
	"strconv"
	"sync/atomic"
	"time"
)

// buckets is the number of bounds of a Histogram: a microsecond times 1, 1.5, 2,
// 3, 4, 6, 8, 12 and so on up to 2^26, which is 67 seconds.
const buckets = 2*26 + 1

// A Histogram counts latencies in buckets whose bounds lie at powers of two of a
// microsecond and half-way between them, so that any quantile is known to within
// a factor of 1.5. The zero value is ready for use.
type Histogram struct {
	counts [buckets + 1]atomic.Uint64 // the last is for what exceeds all bounds
	sum    atomic.Uint64              // nanoseconds
}

// Observe counts d; a negative one counts as 0. It takes two atomic additions
// and allocates nothing.
func (h *Histogram) Observe(d time.Duration) {
	d = max(d, 0)
	h.counts[bucket(d)].Add(1)
	h.sum.Add(uint64(d))
}

// bucket returns the index of the first bound that is not below d.
func bucket(d time.Duration) int {
	// In half microseconds bounds are 2, 3, 4, 6, 8, 12, …: the two highest bits
	// of a number tell between which it lies. A bound belongs to its own bucket,
	// hence the 1.
	u := uint64(max(d, 1)-1) / 500
	if u < 2 {
		return 0
	}
	n := bits.Len64(u) - 2
	return min(1+2*n+int(u>>n&1), buckets)
}

// bound returns the i-th bound.
func bound(i int) time.Duration {
	return time.Duration(2+i%2) << (i / 2) * 500 * time.Nanosecond
}

// boundTexts are the bounds in seconds, as they stand in the text format.
var boundTexts = func() (texts [buckets + 1]string) {
	for i := range buckets {
		// Both are whole, so the quotient is the float nearest to the true one
		// and prints short.
		texts[i] = strconv.FormatFloat(float64(bound(i))/1e9, 'g', -1, 64)
	}
	texts[buckets] = "+Inf"
	return texts
}()

// append appends the lines of the histogram. The count is that of the buckets as
// they were read, so they agree whatever is observed meanwhile.
func (h *Histogram) append(b []byte, name, labels string) []byte {
	var n uint64
	for i := range h.counts {
		n += h.counts[i].Load()
		b = appendSample(b, name, "_bucket", labels, boundTexts[i], float64(n))
	}
	b = appendSample(b, name, "_sum", labels, "", float64(h.sum.Load())/1e9)
	return appendSample(b, name, "_count", labels, "", float64(n))
}
