package main

import (
	"context"
	"math"
	"time"
)

// search is that of RFC 2544 (section 26.1): the highest rate without loss.
type search struct {
	// start is the first rate tried, in frames per second; most is the upper limit, and below least
	// the search gives up.
	start, most, least float64
	// precision is how far the result may be below the true rate, as a share of it.
	precision float64
	// tries is how many times a rate must fail.
	tries int
}

// lossFree returns the highest rate that passed, and whether it is most; 0 if none passed. It
// doubles or halves the rate until a passing rate is below a failing one, then bisects between them
// geometrically.
func (s search) lossFree(passes func(rate float64) (bool, error)) (rate float64, all bool, err error) {
	low, high := 0.0, 0.0 // highest that passed, lowest that failed; 0: none yet
	for at := min(s.start, s.most); ; {
		ok, err := s.try(at, passes)
		if err != nil {
			return 0, false, err
		}
		if ok {
			low = at
		} else {
			high = at
		}
		switch {
		case low == s.most:
			return low, true, nil
		case low == 0 && high <= s.least:
			return 0, false, nil
		case low == 0:
			at = max(high/2, s.least)
		case high == 0:
			at = min(low*2, s.most)
		case high <= low*(1+s.precision):
			return low, false, nil
		default:
			at = math.Sqrt(low * high)
		}
	}
}

// try reports whether a rate passes at least once.
func (s search) try(rate float64, passes func(rate float64) (bool, error)) (bool, error) {
	for range max(1, s.tries) {
		if ok, err := passes(rate); ok || err != nil {
			return ok, err
		}
	}
	return false, nil
}

// onTime is the share of the rate that the source must reach: it shares a CPU with the relay, so a
// relay that is too slow delays it before anything is lost.
const onTime = 0.99

// drainTime is the deadline of the last copy: otherwise a relay with deep queues that cannot keep
// up would pass every short trial.
const drainTime = 10 * time.Millisecond

// passes tries a rate: everything arrives by drainTime, and the source is on time.
func (b *bench) passes(ctx context.Context, rate float64, took time.Duration) (bool, error) {
	t, err := b.run(ctx, trialPlan{frames: framesFor(rate, took), rate: rate, timed: true})
	if err != nil {
		return false, err
	}
	return t.lost() == 0 && t.drained() <= drainTime && t.rate() >= rate*onTime, nil
}

// framesFor is the number of frames sent at a rate in a given time.
func framesFor(rate float64, took time.Duration) int {
	return max(100, int(rate*took.Seconds()))
}
