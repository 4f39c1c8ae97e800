package main

import (
	"math"
	"time"
)

// The buckets of bpf/sink.bpf.c: each power of two has 32 steps, so a value read back is at most
// 1/32 (3.2 %) too high.
const (
	stepBits = 5
	steps    = 1 << stepBits
	buckets  = (32 - stepBits + 1) * steps
)

// histogram counts durations in nanoseconds, up to 2^32 (4.3 s).
type histogram struct {
	counts [buckets]uint64
	n      uint64
}

func (h *histogram) add(counts *[buckets]uint64) {
	for i, n := range counts {
		h.counts[i] += n
		h.n += n
	}
}

// quantile returns an upper bound of the share q (0 to 1) of the recorded durations; 0 if nothing
// was recorded.
func (h *histogram) quantile(q float64) time.Duration {
	rank := uint64(math.Ceil(q * float64(h.n)))
	var below uint64
	for i, n := range h.counts {
		if below += n; n > 0 && below >= rank {
			return time.Duration(bucketEnd(i))
		}
	}
	return 0
}

// bucketEnd is the highest value of bucket i.
func bucketEnd(i int) uint64 {
	if i < steps {
		return uint64(i)
	}
	octave := i/steps - 1
	return (uint64(i-octave*steps)+1)<<octave - 1
}
