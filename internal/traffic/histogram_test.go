package traffic

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestBucketsAreContiguousAndNarrow(t *testing.T) {
	if bucketOf(0) != 0 || bucketOf(1<<histMaxBits-1) != histBuckets-1 || bucketOf(math.MaxInt64) != histBuckets-1 {
		t.Fatalf("ends: %d, %d, %d", bucketOf(0), bucketOf(1<<histMaxBits-1), bucketOf(math.MaxInt64))
	}
	start := int64(0)
	for i := range histBuckets {
		end := bucketEnd(i)
		if bucketOf(uint64(start)) != i || bucketOf(uint64(end)) != i {
			t.Fatalf("bucket %d: %d is in %d, %d is in %d", i, start, bucketOf(uint64(start)), end, bucketOf(uint64(end)))
		}
		if width := end - start; width > start/histSteps {
			t.Fatalf("bucket %d: %d to %d is too wide", i, start, end)
		}
		start = end + 1
	}
}

func TestHistogramAgainstSortedValues(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var h, left, right Histogram
	values := make([]int64, 0, 10_000)
	for i := range cap(values) {
		v := int64(math.Exp(rng.Float64() * 25)) // 1 ns to 72 s
		values = append(values, v)
		h.Record(v)
		if i%3 == 0 {
			left.Record(v)
		} else {
			right.Record(v)
		}
	}
	left.Merge(&right)
	left.Merge(&Histogram{})
	slices.Sort(values)
	for _, q := range []float64{0, 0.001, 0.5, 0.9, 0.99, 0.999, 1} {
		exact := values[max(int(math.Ceil(q*float64(len(values)))), 1)-1]
		got := h.Quantile(q)
		if got < exact || float64(got) > float64(exact)*(1+1.0/histSteps)+1 {
			t.Errorf("quantile %g: got %d, exact %d", q, got, exact)
		}
		if merged := left.Quantile(q); merged != got {
			t.Errorf("quantile %g: merged %d, whole %d", q, merged, got)
		}
	}
	l, m := h.Latency(), left.Latency()
	if l.Samples != 10_000 || l.MinNS != values[0] || l.MaxNS != values[len(values)-1] || l.Negative != 0 {
		t.Errorf("got %+v", l)
	}
	if m.MeanNS = l.MeanNS; m != l { // sums of floats in another order
		t.Errorf("merged %+v, whole %+v", m, l)
	}
}

func TestHistogramEdges(t *testing.T) {
	var h Histogram
	if h.Latency() != (Latency{}) {
		t.Errorf("empty: %+v", h.Latency())
	}
	h.Record(-500)
	if got, want := h.Latency(), (Latency{Samples: 1, Negative: 1, MinNS: -500, MeanNS: -500, P50NS: -500, P90NS: -500, P99NS: -500, P999NS: -500, MaxNS: -500}); got != want {
		t.Errorf("one negative: got %+v, want %+v", got, want)
	}
	h.Record(math.MaxInt64)
	if got := h.Quantile(1); got != math.MaxInt64 {
		t.Errorf("longest: got %d", got)
	}
	if got := h.Quantile(0.5); got != 0 {
		t.Errorf("half: got %d, want 0", got)
	}
}
