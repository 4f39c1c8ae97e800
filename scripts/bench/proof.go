package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// proof shows that the bench measures what it says.
type proof struct {
	Name   string `json:"name"`
	What   string `json:"what"`
	Result string `json:"result"`
}

// ceiling is what source and sink achieve when connected directly.
type ceiling struct {
	Full     float64 `json:"full_frames_per_second"`
	LossFree float64 `json:"loss_free_frames_per_second"`
	CPU      float64 `json:"cpu_seconds_per_million"`
}

// proofTries is the number of attempts per proof: a busy machine may occasionally lose frames or
// delay the source.
const proofTries = 5

// prove runs all proofs; a failed one is an error.
func prove(ctx context.Context, o options) (all []proof, top ceiling, err error) {
	for _, p := range []func(context.Context, options, *ceiling) (proof, error){proveDirect, proveLoss, proveAddress} {
		var done proof
		for range proofTries {
			if done, err = p(ctx, o, &top); err == nil || ctx.Err() != nil {
				break
			}
		}
		if err != nil {
			return nil, top, fmt.Errorf("proof: %w", err)
		}
		all = append(all, done)
	}
	return all, top, nil
}

// with runs fn on a subject in the everyday setup.
func with(ctx context.Context, s subject, o options, fn func(*bench) error) error {
	b, err := newBench(ctx, s, everyday, o)
	if err != nil {
		return err
	}
	return errors.Join(fn(b), b.close())
}

// proveDirect: with source and sink connected directly, nothing is lost, duplicated or reordered.
func proveDirect(ctx context.Context, o options, top *ceiling) (p proof, err error) {
	p = proof{Name: "source to sink", What: "with nothing between, everything sent arrives once and in order, slowly and at full load"}
	err = with(ctx, direct(), o, func(b *bench) error {
		slow, err := b.run(ctx, trialPlan{frames: framesFor(fixedRate, o.trial), rate: fixedRate, timed: true})
		if err != nil {
			return err
		}
		m := measurer{options: o}
		s := &samples{bench: b, result: &result{}}
		if err := m.warmUp(ctx, s); err != nil {
			return err
		}
		fast, err := b.run(ctx, trialPlan{frames: framesFor(s.estimate, o.trial)})
		if err != nil {
			return err
		}
		for _, t := range []trial{slow, fast} {
			if t.lost() != 0 || t.missing != 0 || t.late != 0 || t.stray != 0 {
				return fmt.Errorf("source to sink: %d of %d frames lost, %d numbers missing, %d late, %d strays: want none", t.lost(), t.wanted, t.missing, t.late, t.stray)
			}
		}
		find := search{start: fast.rate(), most: fast.rate(), least: fixedRate, precision: o.precision, tries: 2}
		free, _, err := find.lossFree(func(rate float64) (bool, error) { return b.passes(ctx, rate, o.trial) })
		if err != nil {
			return err
		}
		*top = ceiling{Full: fast.copies(), LossFree: free, CPU: fast.cpuSeconds()}
		p.Result = fmt.Sprintf("%d of %d and %d of %d frames arrived; at most %.2f million frames/s, %.2f with order and time checked; p99 %v at %d frames/s",
			slow.packets, slow.frames, fast.packets, fast.frames, top.Full/1e6, free/1e6, slow.arrived.latency.quantile(0.99).Round(10*time.Nanosecond), fixedRate)
		return nil
	})
	return p, err
}

// proveLoss: the bench reports as lost exactly what a program drops on purpose.
func proveLoss(ctx context.Context, o options, _ *ceiling) (p proof, err error) {
	p = proof{Name: "deliberate loss", What: "a program that drops one frame in 100 shows as that, in the count and in the numbers of the frames"}
	err = with(ctx, lossy(), o, func(b *bench) error {
		// The last frame must pass, or the gap before it would not show.
		t, err := b.run(ctx, trialPlan{frames: 50_000, rate: fixedRate, timed: true})
		if err != nil {
			return err
		}
		if want := int64(t.frames / 100); t.lost() != want || t.missing != uint64(want) {
			return fmt.Errorf("deliberate loss: %d of %d frames lost and %d numbers missing: want %d", t.lost(), t.frames, t.missing, want)
		}
		p.Result = fmt.Sprintf("%d of %d lost: %.2f %%", t.lost(), t.frames, t.lossRatio()*100)
		return nil
	})
	return p, err
}

// proveAddress: frames that were not rewritten do not count as arrived.
func proveAddress(ctx context.Context, o options, _ *ceiling) (p proof, err error) {
	p = proof{Name: "wrong address", What: "frames that nothing rewrote are refused by a sink that wants them rewritten"}
	s := redirect()
	s.rewrites = true
	err = with(ctx, s, o, func(b *bench) error {
		t, err := b.run(ctx, trialPlan{frames: 1000, rate: fixedRate})
		if !errors.Is(err, errAddress) {
			return fmt.Errorf("wrong address: %d of %d frames were taken (%v): want none", t.packets, t.frames, err)
		}
		if t.address != t.frames || t.packets != 0 {
			return fmt.Errorf("wrong address: %d of %d frames refused, %d taken: want all refused", t.address, t.frames, t.packets)
		}
		p.Result = fmt.Sprintf("%d of %d refused", t.address, t.frames)
		return nil
	})
	return p, err
}
