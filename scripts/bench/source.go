package main

import (
	"context"
	"errors"
	"math"
	"time"

	"golang.org/x/sync/errgroup"

	"xdpcast/internal/lab"
	"xdpcast/internal/live"
)

// plan is what the source sends.
type plan struct {
	trial   uint32
	frames  int
	rate    float64 // frames per second; 0: as fast as possible
	batch   int     // most frames sent at once
	stamped bool
	first   uint32 // number of each flow's first frame
}

// sent is what the source did.
type sent struct {
	frames uint64 // of one leg
	// started and ended are when the first and last frames were sent, in nanoseconds of
	// CLOCK_MONOTONIC.
	started, ended uint64
	// waited is the time the source's CPUs spent waiting for the next frame to be due, and setUp
	// the kernel's time before and after.
	waited, setUp time.Duration
}

// rate is in frames per second.
func (s sent) rate() float64 { return float64(s.frames) / (float64(s.ended-s.started) / 1e9) }

// source sends frames from the source host. It is not safe for concurrent use.
type source interface {
	// send sends as planned, or less if ctx ends, which is an error.
	send(ctx context.Context, p plan) (sent, error)
	close() error
}

// newSource returns a source that sends the same frames on each of the host's interfaces. The caller
// closes it.
func newSource(host *lab.Host, s setup, ifnames []string) (source, error) {
	if s.Frame > live.MaxFrame && len(ifnames) == 1 {
		return newXSKSource(host, s)
	}
	return newLiveSource(host, s, ifnames)
}

// liveSource sends by BPF_PROG_RUN with live frames: one program per CPU, each of which sends a share
// of the flows on one interface.
type liveSource struct {
	host  *lab.Host
	legs  int
	parts []*live.Source
}

func newLiveSource(host *lab.Host, s setup, ifnames []string) (_ *liveSource, err error) {
	src := &liveSource{host: host, legs: len(ifnames)}
	defer func() {
		if err != nil {
			err = errors.Join(err, src.close())
		}
	}()
	for _, name := range ifnames {
		l, err := host.Link(name)
		if err != nil {
			return nil, err
		}
		for i := range s.Queues {
			part, err := live.NewSource(live.SourceOptions{
				Frame: s.template(), Index: l.Attrs().Index,
				FirstGroup: firstGroup, GroupStep: s.groupStep(), FirstPort: flowPort,
				FirstFlow: i, FlowStep: s.Queues, Flows: s.Flows, Mixed: s.Mixed,
			})
			if err != nil {
				return nil, err
			}
			src.parts = append(src.parts, part)
		}
	}
	return src, nil
}

func (s *liveSource) close() error {
	var errs []error
	for _, p := range s.parts {
		errs = append(errs, p.Close())
	}
	return errors.Join(errs...)
}

func (s *liveSource) send(ctx context.Context, p plan) (sent, error) {
	var group errgroup.Group
	done := make([]live.Sent, len(s.parts))
	sharing := len(s.parts) / s.legs
	share := live.Plan{
		Trial: p.trial, Frames: p.frames / sharing, Rate: p.rate / float64(sharing), Batch: p.batch, Stamped: p.stamped, First: p.first,
	}
	for i, part := range s.parts {
		group.Go(func() error {
			return s.host.Do(func() (err error) {
				if err := live.Pin(i); err != nil {
					return err
				}
				done[i], err = part.Send(ctx, share)
				return err
			})
		})
	}
	if err := group.Wait(); err != nil {
		return sent{}, err
	}
	all := sent{started: math.MaxUint64}
	for _, d := range done {
		all.frames += d.Frames
		all.waited += d.Waited
		all.setUp += d.SetUp
		all.started, all.ended = min(all.started, d.Started), max(all.ended, d.Ended)
	}
	all.frames /= uint64(s.legs)
	return all, ctx.Err()
}
