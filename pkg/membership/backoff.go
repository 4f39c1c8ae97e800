package membership

import (
	"math"
	"time"
)

// Backoff says how long to wait between tries of something that fails for a
// while. The zero value is usable.
type Backoff struct {
	// Min is the wait after the first failure. 0 means 100 ms.
	Min time.Duration
	// Max bounds every wait. 0 means 30 s; it is never less than Min.
	Max time.Duration
	// Factor is what each wait is longer than the one before. Below 1 means 2.
	Factor float64
	// Jitter, from 0 to 1, is the part of a wait that is left to chance, so that
	// many that failed together do not try again together.
	Jitter float64
}

// Next returns the wait after failure number try, the first being 1. random is
// a number in [0, 1): the wait is shortened by at most Jitter of itself. Numbers
// out of range are taken as the nearest that is not.
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
	if wait >= float64(longest) { // also what a Duration cannot hold
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
