package main

import "fmt"

// target is a requirement on the relay.
type target struct {
	Figure string `json:"figure"`
	Want   string `json:"want"`
	// Measured is empty if this run did not measure it; Why gives the reason.
	Measured string `json:"measured,omitempty"`
	Met      bool   `json:"met"`
	Why      string `json:"why,omitempty"`
}

// verdict is the outcome in one word.
func (t target) verdict() string {
	switch {
	case t.Measured == "":
		return "not measured: " + t.Why
	case t.Met:
		return "met"
	}
	return "missed"
}

// of returns the first result of a subject with a setup, nil if there is none.
func of(all []*result, axis, subject string, with setup) *result {
	for _, r := range all {
		if r.Axis == axis && r.Subject == subject && r.setup == with && r.Skipped == "" {
			return r
		}
	}
	return nil
}

// targets compares the results of a run with the requirements.
func targets(all []*result, s *survival) []target {
	outputs := func(subject string, n int) *result {
		with := everyday
		with.Outputs = n
		return of(all, "outputs", subject, with)
	}
	rules := func(n int) *result {
		with := everyday
		with.Rules = n
		return of(all, "rules", "xdpcast-kernel", with)
	}
	kernel := outputs("xdpcast-kernel", 1)
	return []target{
		ratio("kernel path, 1 to 1, full load, to a bare redirect", 0.95, fullLoad, kernel, outputs("redirect", 1)),
		ratio("kernel path, 1 to 4, full load, to a bare broadcast", 0.95, fullLoad, outputs("xdpcast-kernel", 4), outputs("broadcast", 4)),
		ratio("kernel path, 1 to 16, full load, to a bare broadcast", 0.95, fullLoad, outputs("xdpcast-kernel", 16), outputs("broadcast", 16)),
		ratio("kernel path, 1 to 4, full load, to kernel multicast routing", 6, fullLoad, outputs("xdpcast-kernel", 4), outputs("mroute", 4)),
		ratio("mirrored multicast routes, 1 to 4, full load, to kernel multicast routing", 6, fullLoad, outputs("xdpcast-mroute", 4), outputs("mroute", 4)),
		ratio("kernel path, two inputs merged, 1 to 1, full load, to one input", 0.5, fullLoad, outputs("xdpcast-merge", 1), kernel),
		ratio("afxdp path, 1 to 1, loss-free, to the C forwarder", 1.2, lossFree, outputs("xdpcast-afxdp", 1), outputs("afxdp-c", 1)),
		ratio("fanout path, 1 to 1, loss-free, to kernel multicast routing", 1, lossFree, outputs("xdpcast-fanout", 1), outputs("mroute", 1)),
		ratio("fanout path, 1 to 1, loss-free, to socat", 4, lossFree, outputs("xdpcast-fanout", 1), outputs("socat", 1)),
		ratio("kernel path, 100,000 rules, full load, to 1 rule", 0.95, fullLoad, rules(100_000), rules(1)),
		below("kernel path, 100,000 rules: from the start of the daemon until all are active", "s", 3, rules(100_000), func(r *result) float64 { return r.AppliedSeconds }),
		below("kernel path, 100,000 rules: resident memory of the daemon", "MB", 200, rules(100_000), func(r *result) float64 { return float64(r.ResidentBytes) / 1e6 }),
		survived(s),
		addedLatency(kernel, outputs("redirect", 1)),
		{Figure: "10,000 groups on one interface joined", Want: "under 1 s", Why: "go test -count=1 -v -run TenThousand ./pkg/membership measures it"},
	}
}

const notInRun = "this run has not all that it takes"

func fullLoad(r *result) *figure { return r.Full }

func lossFree(r *result) *figure { return r.LossFree }

// ratio is a target for the ratio of two medians.
func ratio(what string, least float64, pick func(*result) *figure, ours, theirs *result) target {
	t := target{Figure: what, Want: fmt.Sprintf("at least %g", least), Why: notInRun}
	if ours == nil || theirs == nil {
		return t
	}
	a, b := pick(ours), pick(theirs)
	if a == nil || b == nil || b.Median == 0 {
		return t
	}
	measured := a.Median / b.Median
	return target{Figure: t.Figure, Want: t.Want, Measured: fmt.Sprintf("%.3f", measured), Met: measured >= least}
}

// below is a target for a figure that should be small.
func below(what, unit string, most float64, r *result, pick func(*result) float64) target {
	t := target{Figure: what, Want: fmt.Sprintf("under %g %s", most, unit), Why: notInRun}
	if r == nil {
		return t
	}
	return target{Figure: t.Figure, Want: t.Want, Measured: fmt.Sprintf("%.1f %s", pick(r), unit), Met: pick(r) < most}
}

// survived is the target for an uninterrupted stream.
func survived(s *survival) target {
	t := target{Figure: "kernel path, daemon killed (-9) and started again at 500,000 frames/s: packets lost", Want: "0", Why: notInRun}
	if s == nil {
		return t
	}
	if s.Restarts == 0 {
		t.Why = fmt.Sprintf("the daemon took longer to come back than it took to send %d frames", s.Sent)
		return t
	}
	measured := fmt.Sprintf("%d of %d, %d restarts, %.0f frames/s", s.Lost, s.Sent, s.Restarts, s.Rate)
	return target{Figure: t.Figure, Want: t.Want, Measured: measured, Met: s.Lost == 0}
}

// addedLatency compares the 99th percentiles at the fixed rate.
func addedLatency(ours, bare *result) target {
	t := target{Figure: "kernel path, 1 to 1: latency p99 added to a bare redirect's at 100,000 frames/s", Want: "under 2 µs", Why: notInRun}
	a, b := atFixedRate(ours), atFixedRate(bare)
	if a == nil || b == nil {
		return t
	}
	added := (a.P99.Median - b.P99.Median) / 1e3
	return target{Figure: t.Figure, Want: t.Want, Measured: fmt.Sprintf("%+.2f µs", added), Met: added < 2}
}

func atFixedRate(r *result) *latencyResult {
	if r == nil {
		return nil
	}
	for i := range r.Latency {
		if r.Latency[i].Load == 0 {
			return &r.Latency[i]
		}
	}
	return nil
}
