package main

import "slices"

// figure sums up measurements of one thing.
type figure struct {
	Median float64 `json:"median"`
	// Spread is half the distance of the outer quartiles as a part of the median.
	Spread float64   `json:"spread"`
	All    []float64 `json:"all"`
}

// summarize returns nil for no measurements.
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

// quantile is the value at the share q of sorted ones, between two of them in
// proportion.
func quantile(sorted []float64, q float64) float64 {
	at := q * float64(len(sorted)-1)
	i := int(at)
	if i+1 >= len(sorted) {
		return sorted[len(sorted)-1]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}
