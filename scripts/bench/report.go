package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// report is all results of a run.
type report struct {
	Started time.Time `json:"started"`
	// Seconds is the duration of the run.
	Seconds   float64  `json:"seconds"`
	Command   []string `json:"command"`
	Profile   string   `json:"profile"`
	Rounds    int      `json:"rounds"`
	Searches  int      `json:"loss_free_searches"`
	TrialTime float64  `json:"trial_seconds"`
	Precision float64  `json:"loss_free_precision"`
	Machine   machine  `json:"machine"`
	Proofs    []proof  `json:"proofs"`
	Ceiling   ceiling  `json:"ceiling"`
	// Survival is nil if the kernel path was not measured.
	Survival *survival `json:"survival,omitempty"`
	Results  []*result `json:"results"`
	Targets  []target  `json:"targets"`
	// PaceNS is the time per frame of a bare redirect to one output, from source to sink under full
	// load, in nanoseconds; 0: not measured. Figures of two runs compare only if their paces do.
	PaceNS float64 `json:"pace_ns"`
	// Noise lists what disturbed the figures; empty if nothing is known.
	Noise []string `json:"noise"`
}

const (
	// noisySpread is the spread of a bare redirect or broadcast from which the machine counts as
	// noisy: both do constant work.
	noisySpread = 0.05
	// noisyOthers is the share of all CPUs that others may use before a job.
	noisyOthers = 0.05
)

// noise returns why the machine is noisy, nil if it is not.
func noise(all []*result, stolen time.Duration, others float64) (why []string) {
	for _, r := range all {
		if (r.Subject == "redirect" || r.Subject == "broadcast") && r.Full != nil && r.Full.Spread > noisySpread {
			why = append(why, fmt.Sprintf("the spread of %s (%s, %v) is %.0f %%", r.Subject, r.Axis, r.setup, r.Full.Spread*100))
		}
	}
	if stolen > 0 {
		why = append(why, fmt.Sprintf("a hypervisor withheld %v of processor time", stolen))
	}
	if others > noisyOthers {
		why = append(why, fmt.Sprintf("other programs used up to %.0f %% of the CPUs", others*100))
	}
	return why
}

// paceOf returns PaceNS of a report with these results.
func paceOf(all []*result) float64 {
	r := of(all, "outputs", "redirect", everyday)
	if r == nil || r.Full == nil || r.Full.Median <= 0 {
		return 0
	}
	return 1e9 / r.Full.Median
}

// write writes the report's files.
func (r *report) write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	files := map[string][]byte{
		"report.json": append(data, '\n'), "report.md": r.markdown(),
		"rate-by-outputs.svg": r.rateByOutputs().svg(), "rate-by-rules.svg": r.rateByRules().svg(), "latency.svg": r.latencyChart().svg(),
	}
	var errs []error
	for name, data := range files {
		errs = append(errs, os.WriteFile(filepath.Join(dir, name), data, 0o644))
	}
	return errors.Join(errs...)
}
