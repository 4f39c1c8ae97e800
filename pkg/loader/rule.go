package loader

import (
	"maps"
	"slices"

	"xdpcast/pkg/flow"
)

// Used returns the indexes of all interfaces named by the current rules.
func (l *Loader) Used() []int {
	used := map[int]bool{}
	for _, e := range l.rules {
		used[e.rule.In.Index] = true
		for _, o := range e.rule.Out {
			if o.Index != 0 {
				used[o.Index] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(used))
}

// InForce returns the names of the current rules, with their paths.
func (l *Loader) InForce() map[string]flow.Path {
	all := make(map[string]flow.Path, len(l.rules))
	for name, e := range l.rules {
		all[name] = e.rule.Path
	}
	return all
}

// Has says whether a rule is loaded.
func (l *Loader) Has(name string) bool { return l.rules[name] != nil }

// FirstOutput returns the number by which the relay program identifies a rule to the sockets of
// PathAFXDP (struct handover of bpf/include/handover.h). It changes with the number of outputs, and
// may then be reused for another rule.
func (l *Loader) FirstOutput(name string) (uint32, bool) {
	e := l.rules[name]
	if e == nil {
		return 0, false
	}
	return e.first, true
}

// Rules returns the current rules in resolved form, unordered.
func (l *Loader) Rules() []flow.Flow {
	all := make([]flow.Flow, 0, len(l.rules))
	for _, e := range l.rules {
		all = append(all, *e.rule)
	}
	return all
}
