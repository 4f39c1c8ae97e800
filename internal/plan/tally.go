package plan

import "xdpcast/internal/network"

// tally counts what rules and their plans name, so that a Planner need not look at all of them when
// one changes. It follows from the rules and plans alone, in whatever order they came.
type tally struct {
	inputs   map[string]int // inputs by the text of their interface
	patterns map[string]int // rules with an input on a pattern, by name; 1, but for names that are not unique
	names    map[string]nameCount
	renamed  bool // another set of names, or of tagged ones, since it was last cleared
}

// nameCount is how often rules and flows name an interface: tagged, where tags are matched.
type nameCount struct{ all, tagged int }

// count adds n to a count, and removes a count of 0.
func count[K comparable](counts *map[K]int, key K, n int) {
	if *counts == nil {
		*counts = map[K]int{}
	}
	if (*counts)[key] += n; (*counts)[key] == 0 {
		delete(*counts, key)
	}
}

func (t *tally) addRule(r *Rule)    { t.countRule(r, 1) }
func (t *tally) removeRule(r *Rule) { t.countRule(r, -1) }

func (t *tally) countRule(r *Rule, n int) {
	pattern := false
	for leg := range r.InputCount() {
		name := r.Leg(leg).In.Interface
		count(&t.inputs, name, n)
		pattern = pattern || isPattern(name)
	}
	if pattern {
		count(&t.patterns, r.Name, n)
	}
}

// severalNames says whether inputs name some link by another name than its own, so that two inputs
// may be the same.
func (t *tally) severalNames(net *network.Snapshot) bool {
	for name := range t.inputs {
		if l := net.Link(name); l != nil && l.Name != name {
			return true
		}
	}
	return false
}

// replace counts the names of a rule's plan instead of those of the one before; each may be nil.
func (t *tally) replace(before, now *RulePlan) {
	if before != nil && now != nil && before.Rule == now.Rule && !hasPattern(now.Rule) {
		return // without a pattern they follow from the rule
	}
	t.countNames(now, 1)
	t.countNames(before, -1)
}

func (t *tally) countNames(p *RulePlan, n int) {
	if p == nil {
		return
	}
	if t.names == nil {
		t.names = map[string]nameCount{}
	}
	add := func(name string, tagged bool) {
		was := t.names[name]
		is := nameCount{all: was.all + n, tagged: was.tagged}
		if tagged {
			is.tagged += n
		}
		if t.names[name] = is; is.all == 0 {
			delete(t.names, name)
		}
		t.renamed = t.renamed || (was.all == 0) != (is.all == 0) || (was.tagged == 0) != (is.tagged == 0)
	}
	r := p.Rule
	for leg := range r.InputCount() {
		if in := r.Leg(leg).In; leg > 0 || !isPattern(in.Interface) {
			add(in.Interface, in.VLAN.ID != 0)
		}
	}
	for i := range r.Out {
		if name := r.Out[i].Interface; !isPattern(name) {
			add(name, false)
		}
	}
	if !hasPattern(r) {
		return
	}
	for _, f := range p.Flows {
		if !f.Flow.Leg.Several() {
			add(f.In.Name, r.In.VLAN.ID != 0)
		}
		for i := range f.Outputs {
			add(f.Outputs[i].Interface, false)
		}
	}
}
