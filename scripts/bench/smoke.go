package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"
)

// smoke proves that the bench and all its subjects work, without measuring: every packet sent
// arrives, or the subject reports dropping it. A subject that is not installed is skipped with a
// log line.
func smoke(ctx context.Context, o options, log *slog.Logger) (err error) {
	o.trial, o.precision, o.rounds, o.searches = 20*time.Millisecond, 0.3, 1, 1
	proofs, _, err := prove(ctx, o)
	if err != nil {
		return err
	}
	for _, p := range proofs {
		log.Info("proved", "what", p.Name, "result", p.Result)
	}
	chosen, err := named(o.subjects)
	if err != nil {
		return err
	}
	for _, s := range chosen {
		for _, with := range smokeSetups(s) {
			if why := s.can(with); why != "" {
				log.Warn("skipped", "subject", s.name, "why", why)
				continue
			}
			if err := smokeSubject(ctx, s, with, o, log); err != nil {
				return fmt.Errorf("%s, %v: %w", s.name, with, err)
			}
		}
	}
	return smokeReport(ctx, o, log)
}

// smokeSetups are the smallest setup and one that differs in every value.
func smokeSetups(s subject) []setup {
	least := func(want, most int) int {
		if most > 0 {
			return min(want, most)
		}
		return want
	}
	rules := least(20, s.most.Rules)
	return []setup{everyday, {
		Outputs: least(5, s.most.Outputs), Frame: least(1400, s.most.Frame), Rules: rules, Flows: least(10, s.most.Flows), Queues: least(2, s.most.Queues),
	}}
}

// smokeSubject sends slowly until everything arrives or is accounted for.
func smokeSubject(ctx context.Context, s subject, with setup, o options, log *slog.Logger) (err error) {
	b, err := newBench(ctx, s, with, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	var t trial
	arrived, tries := uint64(0), proofTries
	patience := 2 * time.Second // a copy that comes after its trial would be missing in the count
	if s.spins {
		tries *= 10
		patience = settleTime
	}
	for range tries {
		if t, err = b.run(ctx, trialPlan{frames: 500, rate: 5000, timed: true, patience: patience}); err != nil {
			return err
		}
		arrived = max(arrived, t.packets)
		if t.lost() == 0 || s.spins && arrived > 0 {
			break
		}
		log.Warn("lost", "subject", s.name, "copies", t.lost(), "of", t.wanted)
	}
	switch {
	case t.missing > uint64(max(t.lost(), 0)) || t.late != 0:
		return fmt.Errorf("%d numbers missing, %d late, %d copies lost: want none in disorder", t.missing, t.late, t.lost())
	case s.spins:
		if arrived == 0 {
			return fmt.Errorf("no copy arrived in %d tries", tries)
		}
	case b.running.account == nil && t.lost() != 0:
		return fmt.Errorf("%d of %d copies arrived, in %d tries never all: want all at least once", t.packets, t.wanted, tries)
	}
	// A worker may count a packet after it arrived.
	if err := until(ctx, func() string { return b.contradiction(ctx) }); err != nil {
		return err
	}
	log.Info("works", "subject", s.name, "setup", with.String(), "frames", b.frames, "copies", b.copies)
	return nil
}

// contradiction returns how the subject's count differs from what the bench saw.
func (b *bench) contradiction(ctx context.Context) string {
	said, err := b.compare(ctx)
	switch {
	case err != nil:
		return err.Error()
	case said != nil && (said.Unaccounted != 0 || said.Matched != b.frames*uint64(max(1, b.subject.legs)) || said.Sent != b.copies):
		return fmt.Sprintf("%d frames sent and %d copies arrived, but the subject says %d matched, %d sent, %d dropped", b.frames, b.copies, said.Matched, said.Sent, said.Dropped)
	}
	return ""
}

// smokeReport does the shortest possible run, only to produce a report.
func smokeReport(ctx context.Context, o options, log *slog.Logger) (err error) {
	if o.report, err = os.MkdirTemp("", "xb-report-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(o.report)) }()
	o.subjects = []string{"redirect", "xdpcast-kernel"}
	o.jobs = axes{outputs: []int{1, 2}, rules: []int{1, 10}, lossFree: []int{1}, latency: []int{1}}.jobs(o.subjects)
	return measureAll(ctx, o, log)
}
