package bench

import (
	"encoding/json"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func TestHistogramBuckets(t *testing.T) {
	last := -1
	for _, v := range []int64{0, 1, sub - 1, sub, sub + 1, 2*sub - 1, 2 * sub, 1000, 1 << 20, 1<<40 - 1, 1 << 40, math.MaxInt64 - 1, math.MaxInt64} {
		b := bucketOf(v)
		if b < last || b >= histBuckets {
			t.Fatalf("bucket of %d is %d, after %d, of %d", v, b, last, histBuckets)
		}
		last = b
	}
	if last != histBuckets-1 {
		t.Errorf("the largest value is in bucket %d, want the last, %d", last, histBuckets-1)
	}
	for i := range histBuckets {
		if got := bucketOf(bucketMid(i)); got != i {
			t.Fatalf("the middle of bucket %d lies in bucket %d", i, got)
		}
	}
}

// TestHistogramQuantiles compares with the exact quantiles of random samples of
// several shapes: the error is at most half a bucket, 1/64 of the value.
func TestHistogramQuantiles(t *testing.T) {
	shapes := map[string]func(r *rand.Rand) int64{
		"uniform":     func(r *rand.Rand) int64 { return r.Int64N(1_000_000) },
		"small":       func(r *rand.Rand) int64 { return r.Int64N(40) },
		"exponential": func(r *rand.Rand) int64 { return int64(r.ExpFloat64() * 50_000) },
		"log-normal":  func(r *rand.Rand) int64 { return int64(math.Exp(r.NormFloat64()*3 + 10)) },
		"bimodal":     func(r *rand.Rand) int64 { return 2_000 + r.Int64N(2)*5_000_000 },
		"constant":    func(*rand.Rand) int64 { return 12_345 },
	}
	for name, draw := range shapes {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(20) {
				r := rand.New(rand.NewPCG(seed, 1))
				n := 1 + r.IntN(3000)
				exact := make([]int64, n)
				// Two halves merged must be as good as one whole.
				var parts [2]histogram
				for i := range exact {
					exact[i] = draw(r)
					parts[r.IntN(2)].add(time.Duration(exact[i]))
				}
				slices.Sort(exact)
				h := &parts[0]
				h.merge(&parts[1])
				if h.n != uint64(n) || h.min != exact[0] || h.max != exact[n-1] {
					t.Fatalf("seed %d: n, min, max are %d, %d, %d, want %d, %d, %d", seed, h.n, h.min, h.max, n, exact[0], exact[n-1])
				}
				for _, q := range []float64{0.001, 0.25, 0.5, 0.9, 0.99, 0.999, 1} {
					want := exact[max(int(math.Ceil(q*float64(n))), 1)-1]
					got := int64(h.quantile(q))
					if diff := max(got-want, want-got); diff > want/64+1 {
						t.Errorf("seed %d, %d values: quantile %v is %d, want %d", seed, n, q, got, want)
					}
				}
			}
		})
	}
}

func TestHistogramEmptyAndNegative(t *testing.T) {
	var h, empty histogram
	h.merge(&empty)
	if h.quantile(0.5) != 0 || h.n != 0 {
		t.Errorf("an empty histogram has median %v", h.quantile(0.5))
	}
	h.add(-5)
	if h.quantile(1) != 0 || h.n != 1 {
		t.Errorf("a negative latency became %v", h.quantile(1))
	}
}

func TestHistogramJSON(t *testing.T) {
	h := new(histogram)
	r := rand.New(rand.NewPCG(1, 2))
	for range 1000 {
		h.add(time.Duration(r.ExpFloat64() * 1e5))
	}
	b, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	back := new(histogram)
	if err := json.Unmarshal(b, back); err != nil {
		t.Fatal(err)
	}
	if *back != *h {
		t.Error("a histogram is not the same after a round trip")
	}
	if err := json.Unmarshal([]byte(`{"counts":[[100000,1]]}`), back); err == nil {
		t.Error("a bucket that does not exist was accepted")
	}
}

func TestMedian(t *testing.T) {
	for _, tc := range []struct {
		in   []int64
		want int64
	}{{nil, 0}, {[]int64{7}, 7}, {[]int64{9, 1, 5}, 5}, {[]int64{4, 1, 3, 2}, 2}, {[]int64{8, 2}, 5}} {
		if got := median(tc.in); got != tc.want {
			t.Errorf("median of %v is %d, want %d", tc.in, got, tc.want)
		}
	}
}
