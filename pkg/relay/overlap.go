package relay

import (
	"xdpcast/pkg/control"
	"xdpcast/pkg/rules"
)

// maxOverlaps is how many overlaps are told of a rule.
const maxOverlaps = 8

// overlap is a rule that matches packets of another.
type overlap struct {
	name string
	wins bool
}

// addOverlaps says of rules which others take packets that they match.
func (r *Relay) addOverlaps(all []control.RuleStatus) {
	if r.overlaps == nil {
		r.overlaps = r.findOverlaps()
	}
	for i := range all {
		for _, o := range r.overlaps[all[i].Name] {
			if o.wins {
				all[i].YieldsTo = append(all[i].YieldsTo, o.name)
			} else {
				all[i].WinsOver = append(all[i].WinsOver, o.name)
			}
		}
	}
}

// findOverlaps looks at all rules; only those with overlaps are in the result.
func (r *Relay) findOverlaps() map[string][]overlap {
	set := r.wantedRules()
	found := map[string][]overlap{}
	for i, list := range rules.Overlaps(set, maxOverlaps) {
		for _, o := range list {
			found[set[i].Name] = append(found[set[i].Name], overlap{set[o.Rule].Name, o.Wins})
		}
	}
	return found
}
