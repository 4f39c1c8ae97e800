package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// bench is a subject in its network, ready for trials.
type bench struct {
	subject subject
	network *network
	running *running
	trials  uint32
	first   uint32 // number that no trial has used, if each flow has all frames
	// Totals of all trials.
	frames, copies uint64
}

// newBench creates the network and starts the subject. The caller closes it.
func newBench(ctx context.Context, s subject, with setup, o options) (*bench, error) {
	n, err := newNetwork(with, s)
	if err != nil {
		return nil, err
	}
	b := &bench{subject: s, network: n}
	r, err := s.start(ctx, n, o)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", s.name, err), n.close())
	}
	b.running = r
	n.cleanup.add(r.stop)
	if s.spins {
		if err := b.signal(unix.SIGSTOP); err != nil {
			return nil, errors.Join(err, b.close())
		}
	}
	return b, nil
}

// signal sends a signal to the subject's processes.
func (b *bench) signal(s unix.Signal) error {
	for _, pid := range b.running.pids {
		if err := unix.Kill(pid, s); err != nil {
			return fmt.Errorf("send %v to %s: %w", s, b.subject.name, err)
		}
	}
	return nil
}

func (b *bench) close() error { return b.network.close() }

// trialPlan describes a trial.
type trialPlan struct {
	frames int
	rate   float64 // frames per second; 0: as fast as possible
	timed  bool    // frames carry a timestamp, and their order is checked
	// patience is how long to wait for another copy; 0: settleTime.
	patience time.Duration
}

// trial is the outcome of a trial.
type trial struct {
	sent
	arrived
	wanted uint64 // copies
	// busy is the time all CPUs spent working until everything had arrived, and stolen the time
	// withheld by a hypervisor.
	busy, stolen time.Duration
}

func (t trial) lost() int64 { return int64(t.wanted) - int64(t.packets) }

func (t trial) lossRatio() float64 { return float64(t.lost()) / float64(t.wanted) }

// took is the time from the first frame sent to the last one sent or received.
func (t trial) took() time.Duration { return time.Duration(max(t.ended, t.last) - t.started) }

// drained is the time from the last frame sent to the last copy received.
func (t trial) drained() time.Duration { return t.took() - time.Duration(t.ended-t.started) }

// copies is the number received per second.
func (t trial) copies() float64 { return float64(t.packets) / t.took().Seconds() }

// cpuSeconds is the processor time per million copies: all work of the machine except the source's
// waiting and setup.
func (t trial) cpuSeconds() float64 {
	return max(t.busy-t.waited-t.setUp, 0).Seconds() / float64(max(t.packets, 1)) * 1e6
}

// burst is the longest span of frames that the source sends at once in a paced trial, with a
// minimum of one frame.
const burst = 8 * time.Microsecond

// run runs a trial. Everything that arrives must have been sent: an address that no output has, a
// duplicate frame, or one of another trial is an error, not a loss.
func (b *bench) run(ctx context.Context, p trialPlan) (t trial, err error) {
	b.trials++
	send := plan{trial: b.trials, frames: p.frames, rate: p.rate, batch: b.network.batch(), stamped: p.timed}
	if b.subject.legs > 1 {
		send.first = b.first // what merges by numbers has seen the earlier ones
	}
	b.first += uint32(p.frames)
	if p.rate > 0 {
		send.batch = max(1, min(send.batch, int(p.rate*burst.Seconds())))
	}
	if b.subject.spins {
		if err := b.signal(unix.SIGCONT); err != nil {
			return t, err
		}
		defer func() { err = errors.Join(err, b.signal(unix.SIGSTOP)) }()
	}
	n := b.network
	// Copies that are not rewritten cannot be told apart if they share a sink; those of different legs
	// come from different CPUs.
	ordered := p.timed && b.subject.legs <= 1 && (b.subject.rewrites || n.setup.Outputs <= len(n.sinks.objs))
	if err := n.sinks.expect(b.trials, ordered, p.timed); err != nil {
		return t, err
	}
	before, err := readCPU()
	if err != nil {
		return t, err
	}
	if t.sent, err = n.source.send(ctx, send); err != nil {
		return t, err
	}
	t.wanted = t.frames * uint64(n.setup.Outputs)
	if err := n.settle(ctx, t.wanted, cmp.Or(p.patience, settleTime)); err != nil {
		return t, err
	}
	after, err := readCPU()
	if err != nil {
		return t, err
	}
	t.busy, t.stolen = after.busy-before.busy, after.stolen-before.stolen
	if t.arrived, err = n.sinks.read(n.setup.Outputs); err != nil {
		return t, err
	}
	b.frames += t.frames
	b.copies += t.packets
	return t, t.check()
}

// errAddress: something arrived with a destination that no output has.
var errAddress = errors.New("a destination that no output has")

// check returns an error for what must never happen.
func (t trial) check() error {
	switch {
	case t.frames == 0:
		return errors.New("the source sent nothing")
	case t.packets > t.wanted:
		return fmt.Errorf("%d copies arrived of %d", t.packets, t.wanted)
	case t.address > 0:
		return fmt.Errorf("%d copies: %w", t.address, errAddress)
	}
	return nil
}

// settleTime is how long a trial waits for another copy.
const settleTime = 60 * time.Millisecond

// settle waits until all copies have arrived, or none for some time.
func (n *network) settle(ctx context.Context, wanted uint64, quiet time.Duration) error {
	last, since := uint64(0), time.Now()
	for {
		now, err := n.sinks.packets(n.setup.Outputs)
		if err != nil || now == wanted {
			return err
		}
		if now != last {
			last, since = now, time.Now()
		}
		if time.Since(since) > quiet {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}
