package main

import (
	"context"
	"math"
	"time"
)

// search is RFC 2544's (section 26.1): the highest rate at which nothing is lost.
type search struct {
	// start is a rate, in frames a second, to begin with; most one that is not
	// exceeded, and least one below which it gives up.
	start, most, least float64
	// precision is what the rate found may be below the one that exists, as a part.
	precision float64
	// tries is how often a rate must fail.
	tries int
}

// lossFree returns the highest rate that passed, and whether it is the most asked
// for; 0 when none did. It goes up or down in doubles until it knows a rate that
// passes below one that fails, and then halves what is between, in proportion.
func (s search) lossFree(passes func(rate float64) (bool, error)) (rate float64, all bool, err error) {
	low, high := 0.0, 0.0 // the highest that passed, the lowest that failed; 0 for none yet
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

// try says whether a rate passes at least once.
func (s search) try(rate float64, passes func(rate float64) (bool, error)) (bool, error) {
	for range max(1, s.tries) {
		if ok, err := passes(rate); ok || err != nil {
			return ok, err
		}
	}
	return false, nil
}

// onTime is the part of the rate that the source must have reached: it shares a CPU
// with the relay, so that a relay that is too slow makes it late before anything is
// lost.
const onTime = 0.99

// drainTime is when the last copy must have come: a relay with deep queues that
// cannot keep up would else pass every trial that is short enough.
const drainTime = 10 * time.Millisecond

// passes tries a rate: everything arrives, soon, and the source is on time.
func (b *bench) passes(ctx context.Context, rate float64, took time.Duration) (bool, error) {
	t, err := b.run(ctx, trialPlan{frames: framesFor(rate, took), rate: rate, timed: true})
	if err != nil {
		return false, err
	}
	return t.lost() == 0 && t.drained() <= drainTime && t.rate() >= rate*onTime, nil
}

// framesFor is how many frames a rate sends in a time.
func framesFor(rate float64, took time.Duration) int {
	return max(100, int(rate*took.Seconds()))
}
