package traffic

import "math/bits"

// A histogram is log-linear: each power of two is divided into 32 steps, so that a value read back
// is at most 1/32 (3.2 %) too high. Values from 2^40 ns (18 minutes) on share the last bucket.
const (
	histStepBits = 5
	histSteps    = 1 << histStepBits
	histMaxBits  = 40
	histBuckets  = (histMaxBits - histStepBits + 1) * histSteps
)

// Histogram records latencies in nanoseconds, in fixed memory (9 KiB). The zero value is empty and
// ready. It is not safe for concurrent use.
type Histogram struct {
	buckets  [histBuckets]uint64
	n        uint64
	negative uint64
	min, max int64
	sum      float64
}

// Record adds one value in nanoseconds. A negative one (the receiver's clock is behind the
// sender's) counts as zero in the percentiles and unchanged in the minimum.
func (h *Histogram) Record(ns int64) {
	if h.n == 0 {
		h.min, h.max = ns, ns
	}
	h.n++
	h.min, h.max = min(h.min, ns), max(h.max, ns)
	h.sum += float64(ns)
	if ns < 0 {
		h.negative++
		ns = 0
	}
	h.buckets[bucketOf(uint64(ns))]++
}

// Merge adds the contents of other.
func (h *Histogram) Merge(other *Histogram) {
	if other.n == 0 {
		return
	}
	if h.n == 0 {
		*h = *other
		return
	}
	for i, n := range other.buckets {
		h.buckets[i] += n
	}
	h.n += other.n
	h.negative += other.negative
	h.min, h.max = min(h.min, other.min), max(h.max, other.max)
	h.sum += other.sum
}

// Quantile returns a value that at least the share q (0 to 1) of the recorded ones do not exceed:
// the upper end of the bucket, limited to the maximum. It is 0 if nothing was recorded.
func (h *Histogram) Quantile(q float64) int64 {
	if h.n == 0 {
		return 0
	}
	rank := max(uint64(q*float64(h.n)+0.999999), 1)
	var below uint64
	for i, n := range h.buckets {
		if below += n; below >= rank && i < histBuckets-1 {
			return min(bucketEnd(i), h.max)
		}
	}
	return h.max
}

// Latency is the summary of a histogram.
func (h *Histogram) Latency() Latency {
	l := Latency{Samples: h.n, Negative: h.negative, MinNS: h.min, MaxNS: h.max}
	if h.n == 0 {
		return l
	}
	l.MeanNS = int64(h.sum / float64(h.n))
	l.P50NS = h.Quantile(0.5)
	l.P90NS = h.Quantile(0.9)
	l.P99NS = h.Quantile(0.99)
	l.P999NS = h.Quantile(0.999)
	return l
}

// bucketOf numbers the buckets contiguously: the first histSteps values have one each, then every
// octave has histSteps.
func bucketOf(v uint64) int {
	if v < histSteps {
		return int(v)
	}
	octave := bits.Len64(v) - histStepBits - 1
	return min(octave*histSteps+int(v>>octave), histBuckets-1)
}

// bucketEnd is the highest value of bucket i.
func bucketEnd(i int) int64 {
	if i < histSteps {
		return int64(i)
	}
	octave := i/histSteps - 1
	return (int64(i-octave*histSteps)+1)<<octave - 1
}
