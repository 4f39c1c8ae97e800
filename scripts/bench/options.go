package main

import (
	"errors"
	"flag"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"xdpcast/internal/live"
)

// options are the settings from the command line.
type options struct {
	program  string // the xdpcast to measure
	report   string // directory
	subjects []string
	jobs     []job
	rounds   int
	// searches is the number of searches for the loss-free rate, at most rounds.
	searches int
	trial    time.Duration
	// precision of the loss-free rate.
	precision float64
	smoke     bool
	verbose   bool
	profile   string
}

// job is a set of entries measured in turns.
type job struct {
	axis     string
	entries  []entry
	lossFree bool
	latency  bool
}

// entry is a subject and the setup it is measured with.
type entry struct {
	subject string
	setup   setup
}

// everyday is the base setup; each axis varies one of its values.
var everyday = setup{Outputs: 1, Frame: 128, Rules: 1, Flows: 1, Queues: 1}

// axes are the values of each axis, for a full and for a quick run.
type axes struct {
	outputs, frames, rules, flows, queues []int
	// copies are the output counts for which long and mixed frames are measured.
	copies []int
	// lossFree and latency are the output counts for which these are measured.
	lossFree, latency []int
}

func fullAxes() axes {
	return axes{
		outputs: []int{1, 2, 4, 8, 16, 32, 64}, frames: []int{64, 128, 512, 1400, 9000}, rules: []int{1, 100, 10_000, 100_000},
		flows: []int{1, 64, 4096}, queues: []int{1, 2}, copies: []int{4, 16, 64}, lossFree: []int{1, 4}, latency: []int{1, 4},
	}
}

func quickAxes() axes {
	return axes{outputs: []int{1, 4, 16}, rules: []int{1, 10_000}, lossFree: []int{1}, latency: []int{1}}
}

// Axes of outputs for frames of other lengths.
var (
	longCopies  = fmt.Sprintf("outputs, frames of %d bytes", live.MaxFrame)
	mixedCopies = fmt.Sprintf("outputs, frames of 60, 590 and %d bytes", mixedFrame)
)

// fewRules is the number of rules that all paths are measured with; more take long to start.
const fewRules = 10_000

// forwarders are all subjects except those of the proofs.
func forwarders() (names []string) {
	for _, s := range subjects() {
		if !s.direct && s.name != "lossy" {
			names = append(names, s.name)
		}
	}
	return names
}

func ours() []string { return []string{"xdpcast-kernel", "xdpcast-afxdp", "xdpcast-fanout"} }

// jobs lists what to measure.
func (a axes) jobs(subjects []string) (jobs []job) {
	vary := func(axis string, values []int, change func(*setup, int)) {
		of := subjects
		if axis == longCopies || axis == mixedCopies {
			of = intersect([]string{"xdpcast-kernel", "broadcast"}, subjects)
		}
		for _, value := range values {
			j := job{axis: axis}
			j.add(of, value, change)
			if axis == "outputs" {
				j.lossFree, j.latency = slices.Contains(a.lossFree, value), slices.Contains(a.latency, value)
			}
			if len(j.entries) > 0 {
				jobs = append(jobs, j)
			}
		}
	}
	vary("outputs", a.outputs, func(s *setup, n int) { s.Outputs = n })
	vary("frames", a.frames, func(s *setup, n int) { s.Frame = n })
	vary("flows", a.flows, func(s *setup, n int) { s.Flows = n })
	vary("queues", a.queues, func(s *setup, n int) { s.Queues, s.Flows = n, 64 })
	vary(longCopies, a.copies, func(s *setup, n int) { s.Outputs, s.Frame = n, live.MaxFrame })
	vary(mixedCopies, a.copies, func(s *setup, n int) { s.Outputs, s.Frame, s.Mixed = n, mixedFrame, true })
	// Only xdpcast has many rules. Each that merges has a window of its own. All rule counts take turns, since their relative cost is the
	// question.
	for _, axis := range []string{"rules", "rules in use"} {
		j := job{axis: axis}
		for _, n := range a.rules {
			of := append(ours(), "xdpcast-merge")
			if n > fewRules || axis == "rules in use" {
				of = []string{"xdpcast-kernel"}
			}
			j.add(intersect(of, subjects), n, func(s *setup, n int) {
				if s.Rules = n; axis == "rules in use" {
					s.Flows = min(n, maxFlows)
				}
			})
		}
		if len(j.entries) > 0 {
			jobs = append(jobs, j)
		}
	}
	return jobs
}

// add adds the everyday setup with one value changed, for each subject.
func (j *job) add(subjects []string, value int, change func(*setup, int)) {
	s := everyday
	change(&s, value)
	for _, name := range subjects {
		j.entries = append(j.entries, entry{name, s})
	}
}

func intersect(a, b []string) (both []string) {
	for _, s := range a {
		if slices.Contains(b, s) {
			both = append(both, s)
		}
	}
	return both
}

// parseFlags reads the command line.
func parseFlags(args []string) (o options, err error) {
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	quick := f.Bool("quick", false, "the core in under three minutes")
	f.BoolVar(&o.smoke, "smoke", false, "prove that every subject and the bench work; no figures, no report")
	f.BoolVar(&o.verbose, "v", false, "log every measurement")
	f.StringVar(&o.program, "xdpcast", "bin/xdpcast", "the `program` to measure")
	f.StringVar(&o.report, "report", "bench/report", "`directory` of the report")
	f.IntVar(&o.rounds, "rounds", 0, "measurements of each subject, in turns (default 5, quick 3)")
	f.IntVar(&o.searches, "searches", 0, "searches for the loss-free rate of each subject (default 2, quick 2)")
	f.DurationVar(&o.trial, "trial", 0, "length of a measurement; those of the loss-free rate take twice that (default 400ms, quick 150ms)")
	f.Float64Var(&o.precision, "precision", 0, "of the loss-free rate (default 0.03, quick 0.05)")
	names := f.String("subjects", strings.Join(forwarders(), ","), "what to measure")
	axis := map[string]*string{}
	for _, name := range []string{"outputs", "frames", "rules", "flows", "queues", "copies", "lossfree", "latency"} {
		axis[name] = f.String(name, "", "`values` of this axis with commas between, - for none; copies, lossfree and latency: numbers of outputs that long and mixed frames, and these, are measured with")
	}
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q: want flags only", f.Arg(0))
	}
	a := fullAxes()
	o.profile = "full"
	defaults := options{rounds: 5, searches: 2, trial: 400 * time.Millisecond, precision: 0.03}
	if *quick {
		a, o.profile = quickAxes(), "quick"
		defaults = options{rounds: 3, searches: 2, trial: 150 * time.Millisecond, precision: 0.05}
	}
	if o.rounds == 0 {
		o.rounds = defaults.rounds
	}
	if o.searches == 0 {
		o.searches = min(defaults.searches, o.rounds)
	}
	if o.trial == 0 {
		o.trial = defaults.trial
	}
	if o.precision == 0 {
		o.precision = defaults.precision
	}
	if o.rounds < 1 || o.searches < 1 || o.searches > o.rounds || o.trial < 10*time.Millisecond || o.precision < 0.001 {
		return o, errors.New("want at least one round, one to as many searches, trials of 10ms and a precision of 0.001")
	}
	for name, values := range map[string]*[]int{
		"outputs": &a.outputs, "frames": &a.frames, "rules": &a.rules, "flows": &a.flows, "queues": &a.queues, "copies": &a.copies,
		"lossfree": &a.lossFree, "latency": &a.latency,
	} {
		if err := parseAxis(*axis[name], values); err != nil {
			return o, fmt.Errorf("-%s: %w", name, err)
		}
	}
	o.subjects = strings.Split(*names, ",")
	if _, err := named(o.subjects); err != nil {
		return o, err
	}
	o.jobs = a.jobs(o.subjects)
	for _, j := range o.jobs {
		for _, e := range j.entries {
			if err := e.setup.check(); err != nil {
				return o, err
			}
		}
	}
	return o, nil
}

// parseAxis leaves the values as they are when the text is empty.
func parseAxis(text string, values *[]int) error {
	if text == "" {
		return nil
	}
	*values = nil
	if text == "-" {
		return nil
	}
	for field := range strings.SplitSeq(text, ",") {
		n, err := strconv.Atoi(field)
		if err != nil {
			return fmt.Errorf("%q: want numbers with commas between", text)
		}
		*values = append(*values, n)
	}
	return nil
}
