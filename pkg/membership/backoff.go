package membership

import (
	"math"
	"time"
)

// Backoff computes exponential delays between retries. The zero value is usable.
type Backoff struct {
	// Min is the delay after the first failure. 0 means 100 ms.
	Min time.Duration
	// Max limits every delay. 0 means 30 s; it is never less than Min.
	Max time.Duration
	// Factor is the ratio of each delay to the previous one. Below 1 means 2.
	Factor float64
	// Jitter, from 0 to 1, is the random part of a delay, so that many operations that failed
	// together do not retry together.
	Jitter float64
}

// Next returns the delay after failure number try, the first being 1. random is a number in [0, 1):
// it shortens the delay by at most Jitter of it. Numbers out of range are clamped.
func (b Backoff) Next(try int, random float64) time.Duration {
	shortest, longest, factor := b.Min, b.Max, b.Factor
	if shortest <= 0 {
		shortest = 100 * time.Millisecond
	}
	if longest <= 0 {
		longest = 30 * time.Second
	}
	longest = max(longest, shortest)
	if !(factor >= 1) { // NaN too
		factor = 2
	}
	wait := float64(shortest) * math.Pow(factor, float64(max(try, 1)-1))
	wait = min(wait, float64(longest))
	wait -= wait * unit(b.Jitter) * unit(random)
	if wait >= float64(longest) { // also if it exceeds a Duration
		return longest
	}
	return time.Duration(wait)
}

// unit clamps x to [0, 1], NaN to 0.
func unit(x float64) float64 {
	if !(x > 0) {
		return 0
	}
	return min(x, 1)
}
