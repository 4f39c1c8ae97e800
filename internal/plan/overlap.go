package plan

import (
	"slices"

	"xdpcast/pkg/rules"
)

// maxOverlaps limits the overlaps listed for a rule.
const maxOverlaps = 8

// Overlaps lists the rules that match the same packets as another, in order of precedence.
type Overlaps struct {
	YieldsTo []string // rules that take precedence for packets that this one also matches
	WinsOver []string // rules from which this one takes packets
}

// Overlaps compares all rules; the result has only those with overlaps, at most 8 of each kind. Its
// running time grows with the number of rules.
func (p *Plan) Overlaps() map[string]Overlaps {
	set := make([]rules.Rule, len(p.Rules))
	for i, r := range p.Rules {
		set[i] = r.Rule.Rule
		set[i].In = p.canonical(set[i].In)
		if s := set[i].Stream; s != nil {
			one := *s
			one.Legs = slices.Clone(s.Legs)
			for leg := range one.Legs {
				one.Legs[leg].In = p.canonical(one.Legs[leg].In)
			}
			set[i].Stream = &one
		}
	}
	found := map[string]Overlaps{}
	for i, list := range rules.Overlaps(set, maxOverlaps) {
		if len(list) == 0 {
			continue
		}
		var o Overlaps
		for _, other := range list {
			name := set[other.Rule].Name
			if other.Wins {
				o.YieldsTo = append(o.YieldsTo, name)
			} else {
				o.WinsOver = append(o.WinsOver, name)
			}
		}
		found[set[i].Name] = o
	}
	return found
}
