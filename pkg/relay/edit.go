package relay

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"xdpcast/pkg/rules"
)

// edit is a change of the wanted rules: put replaces rules of the same names.
type edit struct {
	put    []*wantedRule
	remove []string
}

// manyEdits is from how many rules on the memory that a change has taken is given back
// to the host, tidyAfter later.
const (
	manyEdits = 10_000
	tidyAfter = 2 * time.Second
)

// fewEdits is up to how many rules are put into the order one by one.
const fewEdits = 16

// apply makes a change, and returns the one that takes it back.
func (r *Relay) apply(e edit) (undo edit) {
	few := len(e.put)+len(e.remove) <= fewEdits
	for _, name := range e.remove {
		old := r.rules[name]
		undo.put = append(undo.put, old)
		delete(r.rules, name)
		if few {
			r.orderOut(name)
		}
	}
	for _, w := range e.put {
		name := w.rule.Name
		if old := r.rules[name]; old != nil {
			undo.put = append(undo.put, old)
			if few {
				r.orderOut(name)
			}
		} else {
			undo.remove = append(undo.remove, name)
		}
		r.rules[name] = w
		w.dirty = true
		if few {
			at, _ := r.placeOf(name)
			r.ordered = slices.Insert(r.ordered, at, w)
		}
	}
	if !few {
		r.order()
	}
	r.inputs, r.overlaps, r.unsynced = nil, nil, true
	r.dirtyPatterns()
	return undo
}

// dirtyPatterns has the rules with patterns resolved again: a rule that came or went
// may win, or have won, over them on an interface.
func (r *Relay) dirtyPatterns() {
	for _, w := range r.ordered {
		w.dirty = w.dirty || isPattern(w.rule.In.Interface)
	}
}

func (r *Relay) placeOf(name string) (int, bool) {
	return slices.BinarySearchFunc(r.ordered, name, func(w *wantedRule, name string) int {
		return strings.Compare(w.rule.Name, name)
	})
}

func (r *Relay) orderOut(name string) {
	if at, ok := r.placeOf(name); ok {
		r.ordered = slices.Delete(r.ordered, at, at+1)
	}
}

// order makes the order anew.
func (r *Relay) order() {
	r.ordered = slices.SortedFunc(maps.Values(r.rules), func(a, b *wantedRule) int {
		return cmp.Compare(a.rule.Name, b.rule.Name)
	})
}

// names returns the names of all rules, sorted.
func (r *Relay) names() []string {
	all := make([]string, len(r.ordered))
	for i, w := range r.ordered {
		all[i] = w.rule.Name
	}
	return all
}

// wantedRules returns the rules of all origins, with room for one more.
func (r *Relay) wantedRules() []rules.Rule {
	all := make([]rules.Rule, 0, len(r.ordered)+1)
	for _, w := range r.ordered {
		all = append(all, w.rule)
	}
	return all
}
