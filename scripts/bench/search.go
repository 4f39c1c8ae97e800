package main

import (
	"context"
	"math"
	"time"
)

// search is RFC 2544's (section 26.1): the highest rate at which nothing is lost.
type search struct {
	// most is a rate, in frames a second, at which it begins, and least one below
	// which it gives up.
	most, least float64
	// precision is what the rate found may be below the one that exists, as a part.
	precision float64
	// tries is how often a rate must fail.
	tries int
}

// lossFree returns the highest rate that passed, and whether it is the most asked
// for; 0 when none did. It goes down in halves to a rate that passes, and then cuts
// the distance between the highest that passed and the lowest that failed.
func (s search) lossFree(passes func(rate float64) (bool, error)) (rate float64, all bool, err error) {
	again := func(rate float64) (bool, error) {
		for range max(1, s.tries) {
			if ok, err := passes(rate); ok || err != nil {
				return ok, err
			}
		}
		return false, nil
	}
	low, high := s.most, s.most
	for {
		ok, err := again(low)
		if err != nil {
			return 0, false, err
		}
		if ok {
			break
		}
		if low <= s.least {
			return 0, false, nil
		}
		high, low = low, max(low/2, s.least)
	}
	if low == s.most {
		return low, true, nil
	}
	for high > low*(1+s.precision) {
		middle := math.Sqrt(low * high)
		ok, err := again(middle)
		if err != nil {
			return 0, false, err
		}
		if ok {
			low = middle
		} else {
			high = middle
		}
	}
	return low, false, nil
}

// onTime is the part of the rate that the source must have reached: it shares a CPU
// with the relay, so that a relay that is too slow makes it late before anything is
// lost.
const onTime = 0.99

// passes tries a rate: everything arrives, and the source is on time.
func (b *bench) passes(ctx context.Context, rate float64, took time.Duration) (bool, error) {
	t, err := b.run(ctx, trialPlan{frames: framesFor(rate, took), rate: rate, timed: true})
	if err != nil {
		return false, err
	}
	return t.lost() == 0 && t.rate() >= rate*onTime, nil
}

// framesFor is how many frames a rate sends in a time.
func framesFor(rate float64, took time.Duration) int {
	return max(100, int(rate*took.Seconds()))
}
