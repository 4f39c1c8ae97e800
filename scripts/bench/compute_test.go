package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
	"xdpcast/internal/live"
	"xdpcast/pkg/packet"
)

// A percentile read back is at least the value, and at most 1/32 too high.
func TestHistogramQuantile(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var all []float64
	var counts [buckets]uint64
	for range 10_000 {
		ns := uint64(math.Exp(random.Float64() * 22)) // up to 2^32, evenly over the magnitudes
		all = append(all, float64(ns))
		counts[bucketOf(ns)]++
	}
	slices.Sort(all)
	var h histogram
	h.add(&counts)
	for _, q := range []float64{0, 0.5, 0.99, 0.999, 1} {
		want := all[max(0, int(math.Ceil(q*float64(len(all))))-1)]
		if got := float64(h.quantile(q)); got < want || got > want*33/32 {
			t.Errorf("quantile %v is %v, want from %v to 1/32 more", q, got, want)
		}
	}
	if got := (&histogram{}).quantile(0.5); got != 0 {
		t.Errorf("of nothing it is %v", got)
	}
}

// bucketOf is bucket of bpf/sink.bpf.c.
func bucketOf(ns uint64) int {
	for i := range buckets {
		if ns <= bucketEnd(i) {
			return i
		}
	}
	return buckets
}

func TestBucketEnds(t *testing.T) {
	for i := 1; i < buckets; i++ {
		if bucketEnd(i) <= bucketEnd(i-1) {
			t.Fatalf("bucket %d ends at %d, the one before at %d", i, bucketEnd(i), bucketEnd(i-1))
		}
	}
	if got := bucketEnd(buckets - 1); got != math.MaxUint32 {
		t.Errorf("the last one ends at %d, want %d", got, uint32(math.MaxUint32))
	}
}

// The search finds the rate above which a subject loses packets, within the precision.
func TestSearch(t *testing.T) {
	for _, can := range []float64{700, 1234, 50_000, 99_999, 1e6, 13.9e6} {
		for _, start := range []float64{600, can / 3, can, can * 1.4, 1e9} {
			trials := 0
			s := search{start: start, most: 14e6, least: 500, precision: 0.02, tries: 1}
			got, all, err := s.lossFree(func(rate float64) (bool, error) {
				trials++
				return rate <= can, nil
			})
			if err != nil || all || got > can || got < can/1.02 {
				t.Errorf("from %v: rate %v, all %v, %v; want from %v to %v", start, got, all, err, can/1.02, can)
			}
			if trials > 25 {
				t.Errorf("from %v: %d trials for %v, want at most 25", start, trials, can)
			}
		}
	}
}

func TestSearchEnds(t *testing.T) {
	s := search{start: 1000, most: 1000, least: 100, precision: 0.1, tries: 3}
	if rate, all, err := s.lossFree(func(float64) (bool, error) { return true, nil }); rate != 1000 || !all || err != nil {
		t.Errorf("of one that loses nothing: %v, %v, %v", rate, all, err)
	}
	trials := 0
	if rate, all, err := s.lossFree(func(float64) (bool, error) { trials++; return false, nil }); rate != 0 || all || err != nil {
		t.Errorf("of one that always loses: %v, %v, %v", rate, all, err)
	}
	if trials != 5*3 { // 1000, 500, 250, 125, 100
		t.Errorf("it was tried %d times, want 15", trials)
	}
	broken := errors.New("broken")
	if _, _, err := s.lossFree(func(float64) (bool, error) { return false, broken }); !errors.Is(err, broken) {
		t.Errorf("the error is %v", err)
	}
	// One failure in two is tolerated.
	n := 0
	if rate, _, err := s.lossFree(func(float64) (bool, error) { n++; return n%2 == 0, nil }); rate != 1000 || err != nil {
		t.Errorf("of one that fails now and then: %v, %v", rate, err)
	}
}

func TestSummarize(t *testing.T) {
	if got := summarize(nil); got != nil {
		t.Errorf("of nothing: %+v", got)
	}
	for _, test := range []struct {
		all            []float64
		median, spread float64
	}{
		{[]float64{7}, 7, 0},
		{[]float64{3, 1}, 2, 0.25},
		{[]float64{5, 1, 3, 2, 4}, 3, 1.0 / 3},
		{[]float64{0, 0, 0}, 0, 0},
	} {
		got := summarize(test.all)
		if got.Median != test.median || math.Abs(got.Spread-test.spread) > 1e-9 {
			t.Errorf("of %v: median %v, spread %v; want %v, %v", test.all, got.Median, got.Spread, test.median, test.spread)
		}
	}
}

func TestParseCPU(t *testing.T) {
	got, err := parseCPU("cpu  100 20 3 4000 500 6 7 8 90 10\ncpu0 1 2 3\n")
	want := cpuTime{busy: (100 + 20 + 3 + 6 + 7) * 10 * time.Millisecond, stolen: 80 * time.Millisecond}
	if err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	for _, bad := range []string{"", "cpu 1 2 3", "intr 1 2 3 4 5 6 7 8 9", "cpu 1 2 3 4 5 6 x 8"} {
		if _, err := parseCPU(bad); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
	if now, err := readCPU(); err != nil || now.busy == 0 {
		t.Errorf("this machine: %+v, %v", now, err)
	}
}

// A filled header has the same checksums as a frame built whole.
func TestHeaderFill(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	with := everyday
	with.Rules, with.Flows = 5*maxFlows, maxFlows
	h := live.NewHeader(with.template())
	for range 10_000 {
		frame := with.template()
		flow := uint32(random.IntN(maxFlows))
		fill(&h, frame, random.Uint32(), flow, random.Uint32(), random.Uint32(), with.groupStep())
		parsed, ok := packet.Parse(frame)
		if want := plus(firstGroup, int(flow)*5); !ok || parsed.Dst != want || packet.MulticastMAC(want) != [6]byte(frame[:6]) {
			t.Fatalf("flow %d: %+v, %v; want the group %v", flow, parsed, ok, want)
		}
		built := slices.Clone(frame)
		packet.FillChecksums(built, &parsed)
		if !slices.Equal(built, frame) {
			t.Fatalf("frame\n% x, built anew\n% x", frame[:58], built[:58])
		}
	}
}

func TestSetups(t *testing.T) {
	for _, args := range [][]string{{}, {"-quick"}, {"-outputs", "1,64", "-rules", "-"}} {
		o, err := parseFlags(args)
		if err != nil || len(o.jobs) == 0 || len(o.subjects) != len(subjects())-2 {
			t.Errorf("%v: %d jobs of %v, %v", args, len(o.jobs), o.subjects, err)
		}
	}
	for _, args := range [][]string{
		{"-outputs", "65"}, {"-outputs", "x"}, {"-frames", "57"}, {"-rules", "131073"}, {"-flows", "4097"}, {"-queues", "65"},
		{"-subjects", "nobody"}, {"-rounds", "-1"}, {"-trial", "1ms"}, {"stray"},
	} {
		if _, err := parseFlags(args); err == nil {
			t.Errorf("%v: no error", args)
		}
	}
}

func TestFlowsAreSpreadOverRules(t *testing.T) {
	for _, test := range []struct{ rules, flows, step int }{{1, 1, 1}, {1, 4096, 0}, {100, 100, 1}, {100_000, 4096, 24}} {
		s := everyday
		s.Rules, s.Flows = test.rules, test.flows
		if got := s.groupStep(); got != test.step {
			t.Errorf("%d rules, %d flows: step %d, want %d", test.rules, test.flows, got, test.step)
		}
		if last := s.groupStep() * (s.Flows - 1); last >= s.Rules {
			t.Errorf("%d rules, %d flows: the last flow is for rule %d", test.rules, test.flows, last)
		}
	}
}

// example is a report with every field set.
func example() *report {
	result := func(axis, subject string, s setup, rate float64) *result {
		f := summarize([]float64{rate, rate * 1.1, rate * 0.9})
		return &result{
			Axis: axis, Subject: subject, setup: s, Full: f, FullLoss: summarize([]float64{0}), CPU: f, LossFree: f, ResidentBytes: 20e6, AppliedSeconds: 2,
			Latency: []latencyResult{
				{Load: 0.1, Rate: rate / 10, P50: f, P99: summarize([]float64{1000}), P999: f, CPU: f},
				{Rate: fixedRate, P50: f, P99: summarize([]float64{1500}), P999: f, CPU: f},
			},
			Account: &comparison{},
		}
	}
	r := &report{Rounds: 3, TrialTime: 1, Precision: 0.02, Proofs: []proof{{"a", "b", "c"}}, Ceiling: ceiling{Full: 1e7}}
	for i, outputs := range []int{1, 4, 16} {
		s := everyday
		s.Outputs = outputs
		for j, name := range forwarders() {
			r.Results = append(r.Results, result("outputs", name, s, 1e6/float64(i+1)/float64(j+1)))
		}
	}
	for _, rules := range []int{1, 100_000} {
		s := everyday
		s.Rules = rules
		r.Results = append(r.Results, result("rules", "xdpcast-kernel", s, 1e6))
	}
	r.Results = append(r.Results, &resultSkipped)
	r.Targets = targets(r.Results, &survival{Rate: survivalRate, Sent: 5, Restarts: 1})
	r.PaceNS = paceOf(r.Results)
	return r
}

var resultSkipped = result{Axis: "outputs", Subject: "<socat>", setup: everyday, Skipped: "not installed"}

// A lost packet counts once at each output, whichever of the daemon's counters have it.
func TestAccountOf(t *testing.T) {
	drop := func(reason string, packets uint64) []control.Drop {
		return []control.Drop{{Reason: reason, Counter: control.Counter{Packets: packets}}}
	}
	for _, c := range []struct {
		name  string
		stats control.Stats
		want  uint64
	}{
		{"afxdp, rings full", control.Stats{
			Rules:        []control.RuleStatus{{Drops: drop("worker_lost", 5)}},
			ReceiveDrops: []control.ReceiveDrop{{Path: "afxdp", Loss: control.Loss{Reason: "ring_full", Packets: 5}}},
		}, 10},
		{"fanout, rings full", control.Stats{
			ReceiveDrops: []control.ReceiveDrop{{Path: "fanout", Loss: control.Loss{Reason: "ring_full", Packets: 5}}},
		}, 10},
		{"copies of another input", control.Stats{Rules: []control.RuleStatus{{Drops: drop("duplicate", 5)}}}, 0},
		{"one output", control.Stats{Rules: []control.RuleStatus{{Outputs: []control.OutputStatus{{Drops: drop("mtu", 5)}, {}}}}}, 5},
		{"refused by a device", control.Stats{TransmitDrops: []control.TransmitDrop{{Packets: 5}}}, 5},
	} {
		if got := accountOf(c.stats, 2).Dropped; got != c.want {
			t.Errorf("%s: %d copies dropped, want %d", c.name, got, c.want)
		}
	}
}

func TestReport(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "report")
	r := example()
	if err := r.write(dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"rate-by-outputs.svg", "rate-by-rules.svg", "latency.svg"} {
		data := readFile(t, filepath.Join(dir, name))
		texts := wellFormed(t, name, data)
		for _, want := range []string{"xdpcast-kernel", "1"} {
			if !slices.ContainsFunc(texts, func(s string) bool { return strings.Contains(s, want) }) {
				t.Errorf("%s has no text %q", name, want)
			}
		}
	}
	md := readFile(t, filepath.Join(dir, "report.md"))
	redirect := int(1e9/of(r.Results, "outputs", "redirect", everyday).Full.Median + 0.5)
	pace := fmt.Sprintf("Pace of the machine: source and sink alone take 100 ns a frame, with a bare redirect between them it is %d ns.", redirect)
	for _, want := range []string{pace, "The machine was quiet", "| missed |", "| met |", "## Loss-free rate", "## Latency", "## Rules", "not installed"} {
		if !strings.Contains(md, want) {
			t.Errorf("report.md has no %q", want)
		}
	}
	for line := range strings.Lines(md) {
		if strings.Contains(line, "%!") || strings.Contains(line, "NaN") || strings.Contains(line, "Inf") {
			t.Errorf("report.md: %q", line)
		}
	}
	for _, target := range r.Targets {
		if target.Measured == "" && !strings.Contains(target.Why, "./pkg/membership") {
			t.Errorf("%s: %s", target.Figure, target.verdict())
		}
	}
}

// An empty chart and names that need XML escaping are drawn as well.
func TestChartsAreXML(t *testing.T) {
	empty := &report{}
	if got := empty.pace(); got != "" || paceOf(nil) != 0 {
		t.Errorf("pace of an empty report: %q, %v ns", got, paceOf(nil))
	}
	for _, c := range []chart{
		empty.rateByOutputs(), empty.rateByRules(), empty.latencyChart(),
		{title: `a < b & "c"`, x: "]]>", lines: []line{{name: "<&>", points: []point{{1, 1}}}}},
		{lines: []line{{points: []point{{0, 1}, {1, -1}}}}},
	} {
		wellFormed(t, c.title, string(c.svg()))
	}
}

// wellFormed parses XML to its end and returns its text nodes.
func wellFormed(t *testing.T, name, data string) (texts []string) {
	t.Helper()
	if strings.Contains(data, "NaN") || strings.Contains(data, "Inf") {
		t.Errorf("%s has numbers that are none", name)
	}
	d := xml.NewDecoder(strings.NewReader(data))
	for {
		token, err := d.Token()
		if err == io.EOF {
			return texts
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if c, ok := token.(xml.CharData); ok {
			texts = append(texts, string(c))
		}
	}
}

func TestNoise(t *testing.T) {
	bare := &result{Subject: "redirect", Full: &figure{Median: 1, Spread: 0.051}}
	if got := noise([]*result{bare}, time.Millisecond, 0.06); len(got) != 3 {
		t.Errorf("three kinds of noise: %q", got)
	}
	bare.Full.Spread = 0.05
	if got := noise([]*result{bare, {Subject: "socat", Full: &figure{Median: 1, Spread: 1}}}, 0, 0.05); len(got) != 0 {
		t.Errorf("no noise: %q", got)
	}
}

func TestTargets(t *testing.T) {
	missing := targets(nil, nil)
	for _, got := range missing {
		if got.Measured != "" || got.Met || !strings.HasPrefix(got.verdict(), "not measured") {
			t.Errorf("with no results: %+v is %s", got, got.verdict())
		}
	}
	four := everyday
	four.Outputs = 4
	got := targets([]*result{
		{Axis: "outputs", Subject: "xdpcast-kernel", setup: four, Full: summarize([]float64{95})},
		{Axis: "outputs", Subject: "broadcast", setup: four, Full: summarize([]float64{100})},
		{Axis: "outputs", Subject: "mroute", setup: four, Full: summarize([]float64{20})},
	}, &survival{Rate: survivalRate, Sent: 100, Lost: 1, Restarts: 1})
	if got[1].verdict() != "met" || got[1].Measured != "0.950" || got[3].verdict() != "missed" || got[3].Measured != "4.750" {
		t.Errorf("%+v, %+v", got[1], got[3])
	}
	if i := slices.IndexFunc(got, func(t target) bool { return strings.HasPrefix(t.Measured, "1 of 100") }); i < 0 || got[i].Met {
		t.Errorf("a packet lost in a restart: %+v", got)
	}
}

// The committed objects match the committed C sources, as in package bpf: those of the bench and of
// internal/live.
func TestObjectsAreNotStale(t *testing.T) {
	const root = "../../"
	for of, patterns := range map[string][]string{
		"scripts/bench": {"scripts/bench/bpf/*.[ch]", "internal/live/bpf/*.h"},
		"internal/live": {"internal/live/bpf/*.[ch]"},
	} {
		recorded := map[string]string{}
		for line := range strings.Lines(readFile(t, root+of+"/bpf/sources.txt")) {
			if fields := strings.Fields(line); len(fields) == 2 && len(fields[0]) == hex.EncodedLen(sha256.Size) {
				recorded[fields[1]] = fields[0]
			}
		}
		var sources []string
		for _, pattern := range patterns {
			found, err := filepath.Glob(root + pattern)
			if err != nil || len(found) == 0 {
				t.Fatalf("sources %s: %v, %v", pattern, found, err)
			}
			sources = append(sources, found...)
		}
		for _, source := range sources {
			name := strings.TrimPrefix(source, root)
			hash := sha256.Sum256([]byte(readFile(t, source)))
			if recorded[name] != hex.EncodeToString(hash[:]) {
				t.Errorf("%s has changed since the objects of %s were made: run make generate", name, of)
			}
			delete(recorded, name)
		}
		for name := range recorded {
			t.Errorf("the objects of %s were made from %s, which is gone: run make generate", of, name)
		}
	}
}

// The reference forwarder compiles without warnings; skipped without a compiler.
func TestReferenceCompiles(t *testing.T) {
	if _, err := exec.LookPath("clang"); err != nil {
		labtest.Lacking(t, "clang is not installed: scripts/setup --bench installs it")
	}
	if err := compile(t.Context(), forwardSource, filepath.Join(t.TempDir(), "forward")); err != nil {
		t.Error(err)
	}
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
