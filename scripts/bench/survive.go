package main

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"
)

// survival is the outcome of a stream while the control loop was killed and restarted several
// times.
type survival struct {
	Rate     float64 `json:"frames_per_second"` // achieved
	Sent     uint64  `json:"sent"`
	Lost     int64   `json:"lost"`
	Restarts int     `json:"restarts"`
}

const (
	survivalRate    = 500_000
	survivalSeconds = 2
)

// survive sends through the kernel path and restarts the daemon as many times as fit.
func survive(ctx context.Context, o options) (found survival, err error) {
	err = with(ctx, xdpcast("kernel"), o, func(b *bench) error {
		sending, done := context.WithCancel(ctx)
		var group errgroup.Group
		group.Go(func() error {
			defer done()
			t, err := b.run(ctx, trialPlan{frames: survivalRate * survivalSeconds, rate: survivalRate, timed: true})
			if err != nil {
				return err
			}
			if t.late > 0 || t.stray > 0 {
				return fmt.Errorf("%d frames came twice or late, %d of another trial: want none", t.late, t.stray)
			}
			found.Rate, found.Sent, found.Lost = t.rate(), t.frames, t.lost()
			return nil
		})
		group.Go(func() error {
			for sending.Err() == nil {
				if err := b.running.restart(ctx); err != nil {
					return err
				}
				// A restart that outlasted the stream does not count.
				if sending.Err() == nil {
					found.Restarts++
				}
			}
			return nil
		})
		return group.Wait()
	})
	return found, err
}
