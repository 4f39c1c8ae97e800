package main

import "slices"

// figure summarizes repeated measurements of one value.
type figure struct {
	Median float64 `json:"median"`
	// Spread is half the interquartile range as a share of the median.
	Spread float64   `json:"spread"`
	All    []float64 `json:"all"`
}

// summarize returns nil if there are no measurements.
func summarize(all []float64) *figure {
	if len(all) == 0 {
		return nil
	}
	sorted := slices.Sorted(slices.Values(all))
	f := &figure{Median: quantile(sorted, 0.5), All: all}
	if f.Median != 0 {
		f.Spread = (quantile(sorted, 0.75) - quantile(sorted, 0.25)) / 2 / f.Median
	}
	return f
}

// quantile returns the value at the share q of sorted values, interpolated linearly.
func quantile(sorted []float64, q float64) float64 {
	at := q * float64(len(sorted)-1)
	i := int(at)
	if i+1 >= len(sorted) {
		return sorted[len(sorted)-1]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}
