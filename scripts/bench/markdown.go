package main

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// markdown renders the report for people.
func (r *report) markdown() []byte {
	var b bytes.Buffer
	r.writeHead(&b)
	r.writeTargets(&b)
	r.writeProofs(&b)
	r.writeContents(&b)
	r.writeFullLoad(&b)
	r.writeLossFree(&b)
	r.writeLatency(&b)
	r.writeRules(&b)
	r.writeMemory(&b)
	r.writeSkipped(&b)
	return b.Bytes()
}

func (r *report) writeHead(b *bytes.Buffer) {
	fmt.Fprintf(b, "# Bench report\n\n%s, %s run of %v: `%s`\n\n", r.Started.UTC().Format("2006-01-02 15:04 MST"), r.Profile,
		time.Duration(r.Seconds*float64(time.Second)).Round(time.Second), strings.Join(r.Command, " "))
	fmt.Fprintf(b, "Linux %s, %s, %d CPUs (%s).\n", r.Machine.Kernel, r.Machine.System, r.Machine.CPUs, r.Machine.CPU)
	for _, name := range slices.Sorted(maps.Keys(r.Machine.Versions)) {
		fmt.Fprintf(b, "%s: %s. ", name, r.Machine.Versions[name])
	}
	b.WriteString("\n\n")
	b.WriteString(r.pace())
	if len(r.Noise) == 0 {
		b.WriteString("The machine was quiet.\n")
		return
	}
	b.WriteString("**The machine was noisy: do not trust small differences.**\n\n")
	for _, why := range r.Noise {
		fmt.Fprintf(b, "- %s\n", why)
	}
}

// pace reports the machine's speed: virtual machines differ by a factor of four from day to day.
func (r *report) pace() string {
	var parts []string
	if r.Ceiling.Full > 0 {
		parts = append(parts, fmt.Sprintf("source and sink alone take %.0f ns a frame", 1e9/r.Ceiling.Full))
	}
	if r.PaceNS > 0 {
		parts = append(parts, fmt.Sprintf("with a bare redirect between them it is %.0f ns", r.PaceNS))
	}
	if len(parts) == 0 {
		return ""
	}
	return "Pace of the machine: " + strings.Join(parts, ", ") + ". Runs at another pace do not compare.\n\n"
}

func (r *report) writeTargets(b *bytes.Buffer) {
	b.WriteString("\n## Targets\n\n")
	t := table{{"figure", "wanted", "measured", ""}}
	for _, target := range r.Targets {
		t.add(target.Figure, target.Want, target.Measured, target.verdict())
	}
	t.write(b)
}

func (r *report) writeProofs(b *bytes.Buffer) {
	b.WriteString("\n## Proofs\n\nDone first; without them there is no report.\n\n")
	for _, p := range r.Proofs {
		fmt.Fprintf(b, "- **%s**: %s. %s.\n", p.Name, p.What, p.Result)
	}
}

func (r *report) writeContents(b *bytes.Buffer) {
	trial := time.Duration(r.TrialTime * float64(time.Second))
	fmt.Fprintf(b, `
## What the figures contain

Source, relay and sinks share the machine. A veth's receiver runs on the CPU of its
sender: with kernel subjects, source, relay and sinks are all on CPU 0, and a figure is
the time of all three; user-space workers may take the other CPUs. Source and sink alone
take %.0f ns a frame at full load, %.3f s of processor time a million.

Figures are medians of %d measurements of %v in turns, loss-free rates of %d searches with
trials of %v; ± is half the distance of the outer quartiles. Copies are what arrived at the sinks, by the time until the last one did; at full
load many may have been lost before, which the loss says. The loss-free rate is the highest, within %.0f %%, at which
all arrived, the last copy within %v of its frame, and the source kept within %.0f %% of its
schedule; no loss is tolerated, and a rate fails when it failed twice. CPU is what all CPUs did, but for the source's waiting: it includes source,
sinks, and whatever else ran.
`, 1e9/r.Ceiling.Full, r.Ceiling.CPU, r.Rounds, trial, r.Searches, 2*trial, r.Precision*100, drainTime, (1-onTime)*100)
}

func (r *report) writeFullLoad(b *bytes.Buffer) {
	for _, axis := range []string{"outputs", "frames", "flows", "queues", longCopies, mixedCopies} {
		found := r.on(axis)
		if len(found) == 0 {
			continue
		}
		fmt.Fprintf(b, "\n## Full load, by %s\n\n", axis)
		if axis == "outputs" {
			b.WriteString("![rate by outputs](rate-by-outputs.svg)\n\n")
		}
		name, _, _ := strings.Cut(axis, ",")
		t := table{{name, "subject", "Mcopies/s", "±", "ns a copy", "lost", "CPU s/million"}}
		for _, res := range found {
			if res.Full != nil {
				t.add(fmt.Sprint(res.value(axis)), res.Subject, million(res.Full), percent(res.Full.Spread), fmt.Sprintf("%.0f", 1e9/res.Full.Median),
					percent(res.FullLoss.Median), fmt.Sprintf("%.3f", res.CPU.Median))
			}
		}
		t.write(b)
	}
}

func (r *report) writeLossFree(b *bytes.Buffer) {
	t := table{{"outputs", "subject", "Mframes/s in", "±", "Mcopies/s out", ""}}
	for _, res := range r.Results {
		if res.LossFree == nil {
			continue
		}
		note := ""
		if res.AtFullLoad {
			note = "nothing is lost at full load"
		}
		t.add(fmt.Sprint(res.Outputs), res.Subject, million(res.LossFree), percent(res.LossFree.Spread),
			fmt.Sprintf("%.3f", res.LossFree.Median*float64(res.Outputs)/1e6), note)
	}
	if len(t) > 1 {
		b.WriteString("\n## Loss-free rate\n\n")
		t.write(b)
	}
}

func (r *report) writeLatency(b *bytes.Buffer) {
	t := table{{"outputs", "subject", "load", "frames/s", "p50 µs", "p99 µs", "p99.9 µs", "±p99", "lost", "CPU s/million"}}
	for _, res := range r.Results {
		for _, l := range res.Latency {
			load := "fixed"
			if l.Load > 0 {
				load = fmt.Sprintf("%.0f %%", l.Load*100)
			}
			t.add(fmt.Sprint(res.Outputs), res.Subject, load, fmt.Sprintf("%.0f", l.Rate), micro(l.P50), micro(l.P99), micro(l.P999), percent(l.P99.Spread), fmt.Sprint(l.Lost), fmt.Sprintf("%.3f", l.CPU.Median))
		}
	}
	if len(t) > 1 {
		b.WriteString("\n## Latency\n\nFrom the source's program to the sink's, within 3 %.\n\n![latency](latency.svg)\n\n")
		t.write(b)
	}
}

func (r *report) writeRules(b *bytes.Buffer) {
	found := append(r.on("rules"), r.on("rules in use")...)
	if len(found) == 0 {
		return
	}
	b.WriteString("\n## Rules\n\nBy rules: one carries the traffic and the others listen to other groups. By rules in use: up to\n4,096 flows are spread over all of them.\n\n![rate by rules](rate-by-rules.svg)\n\n")
	t := table{{"axis", "rules", "flows", "subject", "Mpackets/s", "±", "lost", "active after s", "resident MB", "maps MB"}}
	for _, res := range found {
		if res.Full != nil {
			t.add(res.Axis, fmt.Sprint(res.Rules), fmt.Sprint(res.Flows), res.Subject, million(res.Full), percent(res.Full.Spread), percent(res.FullLoss.Median),
				fmt.Sprintf("%.2f", res.AppliedSeconds), megabytes(res.ResidentBytes), megabytes(res.KernelBytes))
		}
	}
	t.write(b)
}

func (r *report) writeMemory(b *bytes.Buffer) {
	t := table{{"outputs", "subject", "resident MB", "maps MB", "offered", "received", "dropped and counted", "not accounted for"}}
	for _, res := range r.on("outputs") {
		if res.ResidentBytes == 0 {
			continue
		}
		row := []string{fmt.Sprint(res.Outputs), res.Subject, megabytes(res.ResidentBytes), megabytes(res.KernelBytes), "", "", "", ""}
		if a := res.Account; a != nil {
			row = append(row[:4], fmt.Sprint(a.Offered), fmt.Sprint(a.Received), fmt.Sprint(a.Dropped), fmt.Sprint(a.Unaccounted))
		}
		t.add(row...)
	}
	if len(t) > 1 {
		b.WriteString("\n## Memory and accounts\n\nCopies of all trials, and what the subject says of those that were lost. Not accounted for is\nwhat was lost where the subject does not count: in rings of the kernel.\n\n")
		t.write(b)
	}
}

func (r *report) writeSkipped(b *bytes.Buffer) {
	var lines []string
	for _, res := range r.Results {
		if res.Skipped != "" {
			lines = append(lines, fmt.Sprintf("- %s (%v): %s\n", res.Subject, res.setup, res.Skipped))
		}
	}
	if len(lines) > 0 {
		fmt.Fprintf(b, "\n## Not measured\n\n%s", strings.Join(lines, ""))
	}
}

// on returns the results of an axis.
func (r *report) on(axis string) (found []*result) {
	for _, res := range r.Results {
		if res.Axis == axis {
			found = append(found, res)
		}
	}
	return found
}

// value returns the setup's value on an axis.
func (s setup) value(axis string) int {
	return map[string]int{"outputs": s.Outputs, longCopies: s.Outputs, mixedCopies: s.Outputs, "frames": s.Frame, "flows": s.Flows, "queues": s.Queues, "rules": s.Rules, "rules in use": s.Rules}[axis]
}

func million(f *figure) string { return fmt.Sprintf("%.3f", f.Median/1e6) }

func micro(f *figure) string { return fmt.Sprintf("%.2f", f.Median/1e3) }

func percent(part float64) string { return fmt.Sprintf("%.1f %%", part*100) }

func megabytes(n uint64) string { return fmt.Sprintf("%.1f", float64(n)/1e6) }

// table is rows of cells, with the header first.
type table [][]string

func (t *table) add(cells ...string) { *t = append(*t, cells) }

func (t table) write(b *bytes.Buffer) {
	for i, row := range t {
		fmt.Fprintf(b, "| %s |\n", strings.Join(row, " | "))
		if i == 0 {
			fmt.Fprintf(b, "|%s\n", strings.Repeat("---|", len(row)))
		}
	}
}
