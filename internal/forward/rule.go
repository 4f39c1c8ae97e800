package forward

import (
	"strings"

	"xdpcast/internal/account"
	"xdpcast/pkg/flow"
)

// Rule is a rule in a Table. Its counters and policers are shared with the same rule in
// earlier and later Tables.
type Rule struct {
	rule    flow.Flow
	name    string // as shown to users, shared by all its inputs
	unicast bool
	number  uint32 // its id in the guard
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

// newRule makes a rule; old is the one with the same name in the previous table, or
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
