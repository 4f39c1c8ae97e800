package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"time"
)

// result is everything measured of a subject with a setup.
type result struct {
	Axis    string `json:"axis"`
	Subject string `json:"subject"`
	setup
	// Skipped is the reason if nothing was measured.
	Skipped string `json:"skipped,omitempty"`

	// Full is copies per second at full offered load, FullLoss the share of copies lost.
	Full     *figure `json:"full_copies_per_second,omitempty"`
	FullLoss *figure `json:"full_loss,omitempty"`
	// CPU is seconds of processor time per million copies, at full load.
	CPU *figure `json:"cpu_seconds_per_million,omitempty"`
	// LossFree is frames per second into the relay.
	LossFree *figure `json:"loss_free_frames_per_second,omitempty"`
	// AtFullLoad: no search found loss at any rate that the source can keep.
	AtFullLoad bool            `json:"loss_free_at_full_load,omitempty"`
	Latency    []latencyResult `json:"latency,omitempty"`

	// ResidentBytes is the resident memory of all processes, KernelBytes the memory of the maps,
	// AppliedSeconds the time from the start of the daemon until all rules are active.
	ResidentBytes  uint64  `json:"resident_bytes,omitempty"`
	KernelBytes    uint64  `json:"kernel_bytes,omitempty"`
	AppliedSeconds float64 `json:"applied_seconds,omitempty"`
	// Account is the subject's own count over all trials, nil if it keeps none.
	Account *comparison `json:"account,omitempty"`
}

// latencyResult is the latency of copies at a rate.
type latencyResult struct {
	// Load is the share of the loss-free rate, 0 if Rate is a fixed one.
	Load float64 `json:"load,omitempty"`
	Rate float64 `json:"frames_per_second"`
	P50  *figure `json:"p50_ns"`
	P99  *figure `json:"p99_ns"`
	P999 *figure `json:"p999_ns"`
	CPU  *figure `json:"cpu_seconds_per_million"`
	// Lost is the number of copies lost in all rounds.
	Lost int64 `json:"lost"`
}

// samples are the results of a subject's rounds.
type samples struct {
	bench                         *bench
	result                        *result
	full, fullLoss, cpu, lossFree []float64
	estimate                      float64 // frames per second at full load
	p50, p99, p999, latencyCPU    map[int][]float64
	loads                         []latencyResult
	atFullLoad                    bool
}

// fixedRate is a rate at which the latency of all subjects can be compared.
const fixedRate = 100_000

// loads are the shares of the loss-free rate at which latency is measured.
var loads = []float64{0.1, 0.5, 0.9}

// latencyRounds is the maximum number of measurements of each latency.
const latencyRounds = 3

// measurer runs jobs.
type measurer struct {
	options options
	log     *slog.Logger
	stolen  time.Duration // in all trials
	others  float64       // the highest share of all CPUs seen in use by others
}

// listen measures the load from others while the bench is idle.
func (m *measurer) listen(ctx context.Context) error {
	const listening = 200 * time.Millisecond
	before, err := readCPU()
	if err != nil {
		return err
	}
	start := time.Now()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(listening):
	}
	after, err := readCPU()
	if err != nil {
		return err
	}
	m.stolen += after.stolen - before.stolen
	m.others = max(m.others, (after.busy-before.busy).Seconds()/time.Since(start).Seconds()/float64(runtime.NumCPU()))
	return nil
}

// do measures all subjects of a job in turns.
func (m *measurer) do(ctx context.Context, j job) (results []*result, err error) {
	var running []*samples
	defer func() {
		for _, s := range running {
			err = errors.Join(err, s.bench.close())
		}
	}()
	for _, e := range j.entries {
		found, err := named([]string{e.subject})
		if err != nil {
			return nil, err
		}
		s := found[0]
		r := &result{Axis: j.axis, Subject: s.name, setup: e.setup, Skipped: s.can(e.setup)}
		results = append(results, r)
		if r.Skipped != "" {
			continue
		}
		b, err := newBench(ctx, s, e.setup, m.options)
		if err != nil {
			return nil, err
		}
		running = append(running, &samples{bench: b, result: r})
	}
	for _, step := range m.steps(j) {
		for _, s := range running {
			if err := step(ctx, s); err != nil {
				return nil, fmt.Errorf("%s, %v: %w", s.result.Subject, s.result.setup, err)
			}
		}
	}
	for _, s := range running {
		if err := s.finish(ctx); err != nil {
			return nil, fmt.Errorf("%s, %v: %w", s.result.Subject, s.result.setup, err)
		}
	}
	return results, nil
}

// steps are the steps of a job; each runs for every subject before the next begins.
func (m *measurer) steps(j job) (steps []func(context.Context, *samples) error) {
	steps = append(steps, m.warmUp)
	for round := range m.options.rounds {
		steps = append(steps, m.fullLoad)
		if j.lossFree && round < m.options.searches {
			steps = append(steps, func(ctx context.Context, s *samples) error {
				if s.bench.subject.spins && round > 0 {
					return nil // it loses at most rates, each of which is tried twice
				}
				return m.lossFree(ctx, s)
			})
		}
	}
	if !j.latency {
		return steps
	}
	steps = append(steps, m.planLatency)
	for range min(m.options.rounds, latencyRounds) {
		for i := range len(loads) + 1 {
			steps = append(steps, func(ctx context.Context, s *samples) error { return m.latency(ctx, s, i) })
		}
	}
	return steps
}

// warmUp estimates how fast the source can send to this subject.
func (m *measurer) warmUp(ctx context.Context, s *samples) error {
	for frames := 2000; ; frames *= 10 {
		t, err := s.bench.run(ctx, trialPlan{frames: frames})
		if err != nil {
			return err
		}
		if t.packets == 0 {
			return errors.New("nothing arrived")
		}
		// Until it takes long enough to be measured.
		if t.took() > m.options.trial/10 {
			s.estimate = t.rate()
			return nil
		}
	}
}

func (m *measurer) fullLoad(ctx context.Context, s *samples) error {
	t, err := s.bench.run(ctx, trialPlan{frames: framesFor(s.estimate, m.options.trial)})
	if err != nil {
		return err
	}
	m.stolen += t.stolen
	s.estimate = t.rate()
	s.full = append(s.full, t.copies())
	s.fullLoss = append(s.fullLoss, t.lossRatio())
	s.cpu = append(s.cpu, t.cpuSeconds())
	m.log.Debug("full load", "subject", s.result.Subject, "copies/s", t.copies(), "lost", t.lossRatio(), "cpu", t.cpuSeconds(), "took", t.took(), "setup", t.setUp)
	return nil
}

func (m *measurer) lossFree(ctx context.Context, s *samples) error {
	// A subject that loses at full load may do more at a lower load, but not much.
	start := 1.5 * s.full[len(s.full)-1] / float64(s.bench.network.setup.Outputs)
	if n := len(s.lossFree); n > 0 && s.lossFree[n-1] > 0 {
		start = s.lossFree[n-1] * 1.05
	}
	find := search{start: start, most: s.estimate, least: max(500, s.full[len(s.full)-1]/float64(64*s.bench.network.setup.Outputs)), precision: m.options.precision, tries: 2}
	rate, all, err := find.lossFree(func(rate float64) (bool, error) {
		return s.bench.passes(ctx, rate, 2*m.options.trial)
	})
	if err != nil {
		return err
	}
	s.atFullLoad = all && (s.atFullLoad || len(s.lossFree) == 0)
	s.lossFree = append(s.lossFree, rate)
	m.log.Debug("loss-free", "subject", s.result.Subject, "frames/s", rate)
	return nil
}

// planLatency chooses the rates.
func (m *measurer) planLatency(_ context.Context, s *samples) error {
	most := s.estimate
	if f := summarize(s.lossFree); f != nil {
		most = f.Median
	}
	for _, load := range loads {
		s.loads = append(s.loads, latencyResult{Load: load, Rate: most * load})
	}
	s.loads = append(s.loads, latencyResult{Rate: fixedRate})
	s.p50, s.p99, s.p999, s.latencyCPU = map[int][]float64{}, map[int][]float64{}, map[int][]float64{}, map[int][]float64{}
	return nil
}

func (m *measurer) latency(ctx context.Context, s *samples, i int) error {
	rate := s.loads[i].Rate
	if rate == 0 {
		return nil
	}
	t, err := s.bench.run(ctx, trialPlan{frames: framesFor(rate, m.options.trial), rate: rate, timed: true})
	if err != nil {
		return err
	}
	m.stolen += t.stolen
	s.p50[i] = append(s.p50[i], float64(t.arrived.latency.quantile(0.5)))
	s.p99[i] = append(s.p99[i], float64(t.arrived.latency.quantile(0.99)))
	s.p999[i] = append(s.p999[i], float64(t.arrived.latency.quantile(0.999)))
	s.latencyCPU[i] = append(s.latencyCPU[i], t.cpuSeconds())
	s.loads[i].Lost += t.lost()
	m.log.Debug("latency", "subject", s.result.Subject, "rate", rate, "p50", t.arrived.latency.quantile(0.5), "p99", t.arrived.latency.quantile(0.99), "cpu", t.cpuSeconds(), "lost", t.lost())
	return nil
}

// finish summarizes the samples.
func (s *samples) finish(ctx context.Context) (err error) {
	r := s.result
	r.Full, r.FullLoss, r.CPU, r.LossFree = summarize(s.full), summarize(s.fullLoss), summarize(s.cpu), summarize(s.lossFree)
	r.AtFullLoad = s.atFullLoad
	for i, l := range s.loads {
		l.P50, l.P99, l.P999, l.CPU = summarize(s.p50[i]), summarize(s.p99[i]), summarize(s.p999[i]), summarize(s.latencyCPU[i])
		if l.P50 != nil {
			r.Latency = append(r.Latency, l)
		}
	}
	run := s.bench.running
	r.AppliedSeconds = run.applied
	for _, pid := range run.pids {
		n, err := residentMemory(pid)
		if err != nil {
			return err
		}
		r.ResidentBytes += n
	}
	if run.kernelMemory != nil {
		if r.KernelBytes, err = run.kernelMemory(); err != nil {
			return err
		}
	}
	r.Account, err = s.bench.compare(ctx)
	return err
}
