package relay

import (
	"slices"
	"testing"

	"xdpcast/internal/plan"
	"xdpcast/pkg/rules"
)

// TestLoopLog: a loop is logged once while it lasts, and again for a rule that was removed and added
// under the same name, however short the time between.
func TestLoopLog(t *testing.T) {
	named := func(name string) *plan.Rule { return &plan.Rule{Rule: rules.Rule{Name: name}} }
	a, b, again := named("a"), named("b"), named("a")
	var l loopLog
	for i, c := range []struct {
		looping, began []*plan.Rule
		ended          []string
	}{
		{looping: nil},
		{looping: []*plan.Rule{a, b}, began: []*plan.Rule{a, b}},
		{looping: []*plan.Rule{a, b}},
		{looping: []*plan.Rule{a}, ended: []string{"b"}},
		{looping: []*plan.Rule{again, b}, began: []*plan.Rule{again, b}},
		{looping: []*plan.Rule{again, b}},
		{looping: nil, ended: []string{"a", "b"}},
		{looping: []*plan.Rule{b}, began: []*plan.Rule{b}},
	} {
		if began, ended := l.look(c.looping); !slices.Equal(began, c.began) || !slices.Equal(ended, c.ended) {
			t.Errorf("%d: began %v, ended %v, want %v, %v", i, began, ended, c.began, c.ended)
		}
	}
}
