package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"math"
	"slices"
	"strconv"
)

// chart is a line chart with logarithmic axes; with categories, the horizontal positions are named.
type chart struct {
	title, x, y string
	// categories names the positions 1, 2, ... of the horizontal axis.
	categories []string
	lines      []line
}

// line is a line of a chart. Points with a non-positive coordinate are omitted.
type line struct {
	name   string
	points []point
}

type point struct{ x, y float64 }

// The layout, in pixels.
const (
	chartWidth, chartHeight = 860, 480
	plotLeft, plotRight     = 80, 620
	plotTop, plotBottom     = 50, 410
)

// colours can be told apart by most people (Okabe and Ito); dashes help.
var (
	colours = []string{"#0072b2", "#d55e00", "#009e73", "#000000", "#cc79a7", "#56b4e9", "#e69f00", "#777777", "#8a5a00", "#a00000"}
	dashes  = []string{"", "6 3", "2 2"}
)

// svg draws the chart.
func (c chart) svg() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" font-family=\"sans-serif\" font-size=\"12\">\n",
		chartWidth, chartHeight, chartWidth, chartHeight)
	fmt.Fprintf(&b, "<rect width=\"%d\" height=\"%d\" fill=\"white\"/>\n", chartWidth, chartHeight)
	text(&b, (plotLeft+plotRight)/2, 28, "middle", "font-size=\"16\"", c.title)
	text(&b, (plotLeft+plotRight)/2, plotBottom+48, "middle", "", c.x)
	text(&b, 20, (plotTop+plotBottom)/2, "middle", fmt.Sprintf("transform=\"rotate(-90 20 %d)\"", (plotTop+plotBottom)/2), c.y)
	xs, ys := c.values()
	if len(xs) == 0 {
		text(&b, (plotLeft+plotRight)/2, (plotTop+plotBottom)/2, "middle", "", "not measured in this run")
		b.WriteString("</svg>\n")
		return b.Bytes()
	}
	x, y := newScale(xs, plotLeft, plotRight), newScale(ys, plotBottom, plotTop)
	if len(c.categories) > 0 {
		x = scale{low: 0.5, high: float64(len(c.categories)) + 0.5, from: plotLeft, to: plotRight, linear: true}
	}
	c.drawAxes(&b, x, y, xs)
	for i, l := range c.lines {
		l.draw(&b, x, y, i)
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// values returns the coordinates of all points drawn.
func (c chart) values() (xs, ys []float64) {
	for _, l := range c.lines {
		for _, p := range l.drawn() {
			xs, ys = append(xs, p.x), append(ys, p.y)
		}
	}
	slices.Sort(xs)
	slices.Sort(ys)
	return slices.Compact(xs), ys
}

func (l line) drawn() (points []point) {
	for _, p := range l.points {
		if p.x > 0 && p.y > 0 {
			points = append(points, p)
		}
	}
	return points
}

func (c chart) drawAxes(b *bytes.Buffer, x, y scale, xs []float64) {
	const grid = "stroke=\"#dddddd\""
	for _, v := range y.ticks() {
		at := y.at(v)
		fmt.Fprintf(b, "<line x1=\"%d\" y1=\"%.1f\" x2=\"%d\" y2=\"%.1f\" %s/>\n", plotLeft, at, plotRight, at, grid)
		text(b, plotLeft-8, int(at)+4, "end", "", short(v))
	}
	labels := map[float64]string{}
	for _, v := range xs {
		labels[v] = short(v)
	}
	for i, name := range c.categories {
		labels[float64(i+1)] = name
	}
	for v, label := range labels {
		at := x.at(v)
		fmt.Fprintf(b, "<line x1=\"%.1f\" y1=\"%d\" x2=\"%.1f\" y2=\"%d\" %s/>\n", at, plotTop, at, plotBottom, grid)
		text(b, int(at), plotBottom+20, "middle", "", label)
	}
	fmt.Fprintf(b, "<path d=\"M%d %dV%dH%d\" fill=\"none\" stroke=\"black\"/>\n", plotLeft, plotTop, plotBottom, plotRight)
}

// draw draws the i-th line and its legend entry.
func (l line) draw(b *bytes.Buffer, x, y scale, i int) {
	style := fmt.Sprintf("stroke=\"%s\" stroke-width=\"2\" stroke-dasharray=\"%s\"", colours[i%len(colours)], dashes[i%len(dashes)])
	path := ""
	for n, p := range l.drawn() {
		verb := "L"
		if n == 0 {
			verb = "M"
		}
		path += fmt.Sprintf("%s%.1f %.1f", verb, x.at(p.x), y.at(p.y))
		fmt.Fprintf(b, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", x.at(p.x), y.at(p.y), colours[i%len(colours)])
	}
	if path == "" {
		return
	}
	fmt.Fprintf(b, "<path d=\"%s\" fill=\"none\" %s/>\n", path, style)
	at := plotTop + 10 + i*20
	fmt.Fprintf(b, "<path d=\"M%d %dh30\" %s/>\n", plotRight+20, at, style)
	text(b, plotRight+58, at+4, "start", "", l.name)
}

// text writes a text element; attributes are copied verbatim.
func text(b *bytes.Buffer, x, y int, anchor, attributes, s string) {
	fmt.Fprintf(b, "<text x=\"%d\" y=\"%d\" text-anchor=\"%s\" %s>", x, y, anchor, attributes)
	// Writing to a buffer cannot fail.
	_ = xml.EscapeText(b, []byte(s))
	b.WriteString("</text>\n")
}

// scale maps the values of an axis to positions.
type scale struct {
	low, high float64
	from, to  float64
	linear    bool
}

// newScale makes a logarithmic scale with room above the values, whose ends are ticks.
func newScale(values []float64, from, to float64) scale {
	low, high := slices.Min(values), slices.Max(values)
	return scale{low: floor125(low), high: floor125(high) * 2.5, from: from, to: to}
}

// floor125 is the highest of 1, 2 and 5 times a power of ten not above v.
func floor125(v float64) float64 {
	power := math.Pow(10, math.Floor(math.Log10(v)))
	for _, step := range []float64{5, 2} {
		if v >= step*power {
			return step * power
		}
	}
	return power
}

func (s scale) at(v float64) float64 {
	part := (v - s.low) / (s.high - s.low)
	if !s.linear {
		part = math.Log(v/s.low) / math.Log(s.high/s.low)
	}
	return s.from + part*(s.to-s.from)
}

// ticks are 1, 2 and 5 times each power of ten on the scale.
func (s scale) ticks() (all []float64) {
	for power := math.Pow(10, math.Floor(math.Log10(s.low))); power <= s.high; power *= 10 {
		for _, step := range []float64{1, 2, 5} {
			if v := step * power; v >= s.low*0.999 && v <= s.high {
				all = append(all, v)
			}
		}
	}
	return all
}

// short formats a number with k and M.
func short(v float64) string {
	switch {
	case v >= 1e6:
		return strconv.FormatFloat(v/1e6, 'g', 4, 64) + "M"
	case v >= 1e3:
		return strconv.FormatFloat(v/1e3, 'g', 4, 64) + "k"
	}
	return strconv.FormatFloat(v, 'g', 4, 64)
}
