package plan

import (
	"slices"

	"xdpcast/pkg/rules"
)

// maxOverlaps is how many overlaps are told of a rule.
const maxOverlaps = 8

// Overlaps are the rules that match packets of another, in the order in which they win.
type Overlaps struct {
	YieldsTo []string // rules that get packets which this one matches, too
	WinsOver []string // rules that this one takes packets from
}

// Overlaps looks at all rules; only those with overlaps are in the result, at most 8 of each. The
// time that it takes grows with the number of rules.
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
