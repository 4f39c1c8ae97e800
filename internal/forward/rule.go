package forward

import (
	"strings"

	"xdpcast/internal/account"
	"xdpcast/pkg/flow"
)

// Rule is a rule in a Table. What counts and polices is shared with the same rule
// in the Tables before and behind.
type Rule struct {
	rule    flow.Flow
	name    string // that people know it by, which its other inputs have, too
	unicast bool
	number  uint32 // by which the guard knows it
	policer *policer
	open    *account.RuleCounters
	counts  *perWorker
	out     []output
}

// Name returns the rule's name.
func (r *Rule) Name() string { return r.rule.Name }

type output struct {
	flow.Output
	device  int // index into Table.devices; -1: none
	policer *policer
	counts  *perWorker
}

// newRule makes a rule; old is the one with the same name in the table before, or
// nil.
func (s *Set) newRule(r flow.Flow, old *Rule) *Rule {
	n := &Rule{rule: r.Normalized(), unicast: r.Unicast()}
	n.name, _, _ = strings.Cut(r.Name, flow.LegSeparator)
	goesOn := old != nil && n.rule.Continues(old.rule)
	n.policer = newPolicer(r.Rate)
	if goesOn {
		n.open, n.counts, n.number = old.open, old.counts, old.number
		if r.Rate == old.rule.Rate {
			n.policer = old.policer
		}
	} else {
		n.open = s.accounts.OpenCounters(n.rule)
		n.counts = newPerWorker(n.open.Rule, s.workers)
	}
	n.out = make([]output, len(r.Out))
	for slot := range n.out {
		o := &n.out[slot]
		*o = output{Output: n.rule.Out[slot], device: -1, policer: newPolicer(r.Out[slot].Rate)}
		if !goesOn {
			o.counts = newPerWorker(n.open.Outputs[slot], s.workers)
			continue
		}
		before := &old.out[slot]
		o.counts = before.counts
		if o.Rate == before.Rate {
			o.policer = before.policer
		}
	}
	return n
}
