package main

import (
	"fmt"
	"slices"
)

// linesOf makes one line per subject from the results of some axes.
func (r *report) linesOf(axes []string, at func(*result) (point, bool)) (lines []line) {
	for _, res := range r.Results {
		if !slices.Contains(axes, res.Axis) || res.Skipped != "" {
			continue
		}
		p, ok := at(res)
		if !ok {
			continue
		}
		name := res.Subject
		if len(axes) > 1 {
			name += ", " + res.Axis
		}
		i := slices.IndexFunc(lines, func(l line) bool { return l.name == name })
		if i < 0 {
			i = len(lines)
			lines = append(lines, line{name: name})
		}
		lines[i].points = append(lines[i].points, p)
	}
	return lines
}

func (r *report) rateByOutputs() chart {
	return chart{
		title: fmt.Sprintf("Copies by outputs, %d-byte frames, full offered load", everyday.Frame), x: "outputs", y: "copies a second",
		lines: r.linesOf([]string{"outputs"}, func(res *result) (point, bool) {
			if res.Full == nil {
				return point{}, false
			}
			return point{float64(res.Outputs), res.Full.Median}, true
		}),
	}
}

func (r *report) rateByRules() chart {
	return chart{
		title: fmt.Sprintf("Packets by rules, %d-byte frames, full offered load", everyday.Frame), x: "rules (rules in use: the traffic is spread over them)", y: "packets a second",
		lines: r.linesOf([]string{"rules", "rules in use"}, func(res *result) (point, bool) {
			if res.Full == nil {
				return point{}, false
			}
			return point{float64(res.Rules), res.Full.Median}, true
		}),
	}
}

// latencyChart shows the 99th percentile by load.
func (r *report) latencyChart() chart {
	c := chart{title: fmt.Sprintf("Latency p99, 1 output, %d-byte frames", everyday.Frame), x: "part of the subject's own loss-free rate", y: "microseconds"}
	for _, load := range loads {
		c.categories = append(c.categories, fmt.Sprintf("%.0f %%", load*100))
	}
	c.categories = append(c.categories, fmt.Sprintf("%s frames/s", short(fixedRate)))
	for _, res := range r.Results {
		if res.Axis != "outputs" || res.setup != everyday {
			continue
		}
		l := line{name: res.Subject}
		for _, at := range res.Latency {
			place := len(c.categories)
			if i := slices.Index(loads, at.Load); i >= 0 {
				place = i + 1
			}
			l.points = append(l.points, point{float64(place), at.P99.Median / 1e3})
		}
		c.lines = append(c.lines, l)
	}
	return c
}
