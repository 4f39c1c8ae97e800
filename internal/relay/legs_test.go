package relay

import (
	"slices"
	"testing"
	"time"

	"xdpcast/pkg/loader"
)

// What somebody should look after is said of the input that it is about, and of nothing else.
func TestStreamAlarms(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(l *loader.LegStats) // of the second input
		want   []string
	}{
		"all is well":    {func(*loader.LegStats) {}, nil},
		"some behind":    {func(l *loader.LegStats) { l.Behind = 700 }, nil},
		"far behind":     {func(l *loader.LegStats) { l.Behind = 800 }, []string{"in[1] is 800 numbers behind: from 1000 on copies pass again, or are lost (more window, or legs that are closer)"}},
		"never heard":    {func(l *loader.LegStats) { l.LastSeen = -1 }, []string{"in[1] has brought no packet"}},
		"silent":         {func(l *loader.LegStats) { l.LastSeen = 5 * time.Second }, []string{"in[1] is silent for 5s"}},
		"another stream": {func(l *loader.LegStats) { l.Differ, l.Differs = 9, true }, []string{"in[1] brings other packets than those relayed with the same numbers (9 of them seen): is it another stream?"}},
		"it was one":     {func(l *loader.LegStats) { l.Differ = 9 }, nil},
	} {
		legs := make([]*loader.RuleStats, 2)
		for i := range legs {
			legs[i] = &loader.RuleStats{Leg: &loader.LegStats{Number: i, Bound: 1000, LastSeen: time.Millisecond}, Stream: &loader.StreamStats{Expected: 10, Passed: 9}}
		}
		tt.change(legs[1].Leg)
		s := StreamStatusOf(legs)
		if !slices.Equal(s.Alarms, tt.want) || s.Lost != 1 {
			t.Errorf("%s: %+v, want %q", name, s, tt.want)
		}
	}
}
