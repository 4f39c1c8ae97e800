package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	o, err := parseFlags(args)
	if err != nil {
		return err
	}
	if _, err := exec.LookPath(o.program); err != nil {
		return fmt.Errorf("%w: make build makes it", err)
	}
	level := slog.LevelInfo
	if o.verbose {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	if o.smoke {
		return smoke(ctx, o, log)
	}
	return measureAll(ctx, o, log)
}

// measureAll proves, measures and reports.
func measureAll(ctx context.Context, o options, log *slog.Logger) (err error) {
	r := report{
		Started: time.Now(), Command: append([]string{"bench"}, os.Args[1:]...), Profile: o.profile, Rounds: o.rounds, Searches: o.searches, TrialTime: o.trial.Seconds(),
		Precision: o.precision, Machine: thisMachine(ctx, o),
	}
	m := &measurer{options: o, log: log}
	if err := m.listen(ctx); err != nil {
		return err
	}
	if r.Proofs, r.Ceiling, err = prove(ctx, o); err != nil {
		return err
	}
	if slices.Contains(o.subjects, "xdpcast-kernel") {
		survived, err := survive(ctx, o)
		if err != nil {
			return fmt.Errorf("restart under load: %w", err)
		}
		r.Survival = &survived
	}
	for i, j := range o.jobs {
		log.Info("measure", "job", fmt.Sprintf("%d of %d", i+1, len(o.jobs)), "axis", j.axis, "what", j.entries[0].setup.String())
		if err := m.listen(ctx); err != nil {
			return err
		}
		results, err := m.do(ctx, j)
		if err != nil {
			return err
		}
		r.Results = append(r.Results, results...)
	}
	r.Targets, r.PaceNS = targets(r.Results, r.Survival), paceOf(r.Results)
	r.Noise = noise(r.Results, m.stolen, m.others)
	r.Seconds = time.Since(r.Started).Seconds()
	if err := r.write(o.report); err != nil {
		return err
	}
	fmt.Printf("%s", r.markdown())
	log.Info("report written", "directory", o.report, "took", time.Since(r.Started).Round(time.Second))
	return nil
}
