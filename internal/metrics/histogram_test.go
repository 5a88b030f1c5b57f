package metrics

import (
	"math/rand/v2"
	"testing"
	"time"
)

// TestBuckets compares the arithmetic of bucket with a search among the bounds.
func TestBuckets(t *testing.T) {
	slow := func(d time.Duration) int {
		for i := range buckets {
			if d <= bound(i) {
				return i
			}
		}
		return buckets
	}
	check := func(d time.Duration) {
		if got, want := bucket(d), slow(d); got != want {
			t.Errorf("%v (%d ns) falls in bucket %d, want %d", d, int64(d), got, want)
		}
	}
	for i := range buckets {
		if i > 0 && bound(i) <= bound(i-1) {
			t.Errorf("bound %d is %v after %v", i, bound(i), bound(i-1))
		}
		for d := bound(i) - 2; d <= bound(i)+2; d++ {
			check(d)
		}
	}
	for _, d := range []time.Duration{-1 << 63, -1, 0, 1, 999, 1 << 62, 1<<63 - 1} {
		check(d)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for range 100000 {
		check(time.Duration(rng.Uint64() >> (1 + rng.IntN(63))))
	}
	for i, want := range map[int]string{0: "1e-06", 1: "1.5e-06", 2: "2e-06", 19: "0.000768", buckets - 1: "67.108864", buckets: "+Inf"} {
		if boundTexts[i] != want {
			t.Errorf("bound %d reads %q, want %q", i, boundTexts[i], want)
		}
	}
}

func TestObserve(t *testing.T) {
	r := NewRegistry()
	h := must[*Histogram](t)(r.Histogram("h_seconds", "h", nil))
	for _, d := range []time.Duration{-time.Second, 0, time.Microsecond, time.Millisecond, time.Minute, 2 * time.Minute} {
		h.Observe(d)
	}
	_, values := scrape(t, r)
	for series, want := range map[string]float64{
		`h_seconds_bucket{le="1e-06"}`: 3, `h_seconds_bucket{le="0.000768"}`: 3, `h_seconds_bucket{le="0.001024"}`: 4,
		`h_seconds_bucket{le="50.331648"}`: 4, `h_seconds_bucket{le="67.108864"}`: 5, `h_seconds_bucket{le="+Inf"}`: 6,
		"h_seconds_count": 6, "h_seconds_sum": 180.001001,
	} {
		if values[series] != want {
			t.Errorf("%s is %v, want %v", series, values[series], want)
		}
	}
	if n := testing.AllocsPerRun(100, func() { h.Observe(time.Millisecond) }); n != 0 {
		t.Errorf("an observation allocates %v times", n)
	}
}

func BenchmarkObserve(b *testing.B) {
	var h Histogram
	for b.Loop() {
		h.Observe(5 * time.Microsecond)
	}
}

// BenchmarkObserveClock has one reading of the clock in each observation.
func BenchmarkObserveClock(b *testing.B) {
	var h Histogram
	start := time.Now()
	for b.Loop() {
		h.Observe(time.Since(start))
	}
}

// BenchmarkObserveParallel has all cores at one bucket.
func BenchmarkObserveParallel(b *testing.B) {
	var h Histogram
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			h.Observe(5 * time.Microsecond)
		}
	})
}
