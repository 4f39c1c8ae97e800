package relay

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/plan"
	"xdpcast/internal/rulefile"
	"xdpcast/pkg/rules"
)

// edit is a change of the wanted rules: put replaces rules with the same names.
type edit struct {
	put    []*plan.Rule
	remove []string
	mirror *mirrorEdit // nil: the mirrored routes stay
}

// mirrorEdit sets which multicast routes are mirrored, if any.
type mirrorEdit struct{ as *rules.Mroute }

// manyEdits is the number of changed rules from which a change frees memory to the host
// (FreeOSMemory), after tidyAfter. Until then, and with as many rules, garbage may take busyGarbage percent of what is in
// use.
const (
	manyEdits   = 10_000
	tidyAfter   = 2 * time.Second
	busyGarbage = 40
)

// edited returns the rules after a change, by name. before is not modified. It looks only at the
// rules between which the changed ones belong.
func edited(before []*plan.Rule, e edit) []*plan.Rule {
	put := slices.SortedFunc(slices.Values(e.put), func(a, b *plan.Rule) int { return cmp.Compare(a.Name, b.Name) })
	remove := slices.Sorted(slices.Values(e.remove))
	after := make([]*plan.Rule, 0, max(0, len(before)+len(put)-len(remove)))
	for len(put)+len(remove) > 0 {
		var name string
		if len(put) == 0 || len(remove) > 0 && remove[0] < put[0].Name {
			name = remove[0]
		} else {
			name = put[0].Name
		}
		at, found := findRule(before, name)
		after, before = append(after, before[:at]...), before[at:]
		if found {
			before = before[1:]
		}
		for len(put) > 0 && put[0].Name == name {
			after, put = append(after, put[0]), put[1:]
		}
		for len(remove) > 0 && remove[0] == name {
			remove = remove[1:]
		}
	}
	return append(after, before...)
}

// findRule finds a name among rules, ordered by name: its index, or that where it belongs.
func findRule(all []*plan.Rule, name string) (at int, found bool) {
	return slices.BinarySearchFunc(all, name, func(rule *plan.Rule, name string) int { return strings.Compare(rule.Name, name) })
}

// setRules replaces the wanted rules.
func (r *Relay) setRules(all []*plan.Rule) {
	r.rules, r.overlaps, r.stale = all, nil, true
	r.many.Store(len(all) >= manyEdits)
	r.tables.retryRefused()
}

// rule finds a wanted rule; nil if there is none of that name.
func (r *Relay) rule(name string) *plan.Rule {
	at, ok := findRule(r.rules, name)
	if !ok {
		return nil
	}
	return r.rules[at]
}

// checkAdded checks whether the wanted rules stay valid with one more, which is valid by itself and
// whose name is unique.
func (r *Relay) checkAdded(rule *rules.Rule) error {
	if r.summarize().Admits(rule) {
		return nil
	}
	return control.ValidateSet(append(r.wantedRules(), *rule))
}

// checkRemoved checks whether the wanted rules stay valid without one of them: it may take packets that
// others would send to each other in a loop.
func (r *Relay) checkRemoved(rule *rules.Rule) error {
	if r.summarize().Releases(rule) {
		return nil
	}
	rest := slices.DeleteFunc(r.wantedRules(), func(other rules.Rule) bool { return other.Name == rule.Name })
	if err := control.ValidateSet(rest); err != nil {
		return control.Errorf(control.KindConflict, "rule %s is needed: it takes packets that other rules would send to each other without it; delete one of those first: %w", rule.Name, err)
	}
	return nil
}

// summarize returns the summary of the wanted rules.
func (r *Relay) summarize() *rules.Summary {
	if r.summary == nil {
		r.summary = rules.NewSummary()
	}
	changedByName(r.summed, r.rules, func(old, new *plan.Rule) {
		if old != nil && old.Origin != plan.OriginMroute {
			r.summary.Remove(&old.Rule)
		}
		if new != nil && new.Origin != plan.OriginMroute {
			r.summary.Add(&new.Rule)
		}
	})
	r.summed = r.rules
	return r.summary
}

// changedByName calls fn for every rule that differs between two sets, each ordered by name; old or
// new is nil for one that was added or removed. It looks only at those that do.
func changedByName(before, after []*plan.Rule, fn func(old, new *plan.Rule)) {
	plan.Changed(before, after, func(r *plan.Rule) string { return r.Name }, fn)
}

// wantedRules returns the rules of the file and of the API, with capacity for one more.
func (r *Relay) wantedRules() []rules.Rule {
	all := make([]rules.Rule, 0, len(r.rules)+1)
	for _, rule := range r.rules {
		if rule.Origin != plan.OriginMroute {
			all = append(all, rule.Rule)
		}
	}
	return all
}

// readInitialRules reads the file and the saved API rules of an earlier process. Rules of the file
// take precedence.
func (r *Relay) readInitialRules() error {
	fromFile, err := r.readConfig()
	if err != nil {
		return err
	}
	saved, isSaved, err := readState(r.opts.StateFile)
	if err != nil {
		return err
	}
	first, saved := r.initialSets(fromFile, saved, isSaved)
	r.rules, r.mroute = r.accepted(first.Rules, saved), first.Mroute
	r.many.Store(len(r.rules) >= manyEdits)
	if p := r.changes.pending; p != nil && p.before == nil {
		p.before, p.mroute = r.rules, r.mroute // its time is over
	}
	r.changes.formatAhead(r.rules, r.mroute)
	return nil
}

// accepted are the rules of the file, and those of the API that do not conflict with them.
func (r *Relay) accepted(fromFile, saved []rules.Rule) []*plan.Rule {
	e := edit{put: make([]*plan.Rule, 0, len(fromFile)+len(saved))}
	for _, rule := range fromFile {
		e.put = append(e.put, &plan.Rule{Rule: rule, Origin: plan.OriginFile})
	}
	all := fitting(fromFile, r.withoutConflicts(fromFile, saved), rules.ValidateSet, func(rule rules.Rule, err error) {
		r.log.Warn("rule added through the API is omitted: it conflicts with the file", "rule", rule.Name, "error", err)
	})
	for _, rule := range all[len(fromFile):] {
		e.put = append(e.put, &plan.Rule{Rule: rule, Origin: plan.OriginAPI})
	}
	return edited(nil, e)
}

// fitting returns a valid set, and those of more rules that are valid with it. It calls omit for the others.
// It validates all at once, and halves of what is not valid: one by one would be quadratic, and a
// daemon with 20,000 rules of the API, one of which conflicts, would not start for minutes.
func fitting(set, more []rules.Rule, validate func([]rules.Rule) error, omit func(rules.Rule, error)) []rules.Rule {
	if len(more) == 0 {
		return set
	}
	all := append(make([]rules.Rule, 0, len(set)+len(more)), set...)
	var add func(some []rules.Rule)
	add = func(some []rules.Rule) {
		if len(some) == 0 {
			return
		}
		switch err := validate(append(all, some...)); {
		case err == nil:
			all = append(all, some...)
		case len(some) == 1:
			omit(some[0], err)
		default:
			add(some[:len(some)/2])
			add(some[len(some)/2:])
		}
	}
	add(more)
	return all
}

// withoutConflicts omits the saved rules with a name or an input of the file.
func (r *Relay) withoutConflicts(fromFile, saved []rules.Rule) []rules.Rule {
	if len(saved) == 0 {
		return nil
	}
	names, inputs := make(map[string]bool, len(fromFile)), make(map[rules.Input]bool, len(fromFile))
	for i := range fromFile {
		names[fromFile[i].Name] = true
		for leg := range fromFile[i].InputCount() {
			inputs[fromFile[i].Leg(leg).In] = true
		}
	}
	return slices.DeleteFunc(saved, func(rule rules.Rule) bool {
		taken := names[rule.Name]
		for leg := range rule.InputCount() {
			taken = taken || inputs[rule.Leg(leg).In]
		}
		if taken {
			r.log.Warn("rule added through the API is omitted: the file has its name or its input", "rule", rule.Name)
		}
		return taken
	})
}

func (r *Relay) readConfig() (c rules.Config, err error) {
	if r.opts.ConfigFile == "" {
		return c, nil
	}
	data, err := rulefile.ReadFile(r.opts.ConfigFile)
	if err != nil {
		return c, fmt.Errorf("read configuration: %w", err)
	}
	if c, err = rulefile.Parse(r.opts.ConfigFile, data); err == nil && c.Mroute != nil && r.opts.Mroutes != nil {
		err = &rules.FileError{File: c.MrouteFile, Line: c.MrouteLine, Err: errMrouteTwice}
		return rules.Config{}, err
	}
	return c, err
}

var errMrouteTwice = errors.New("mroute: also given by --mroute: want it in only one place")

// addOverlaps adds to rules which others take precedence for their packets.
func (r *Relay) addOverlaps(all []control.RuleStatus) {
	if r.overlaps == nil {
		r.overlaps = r.plan.Overlaps()
	}
	for i := range all {
		o := r.overlaps[all[i].Name]
		all[i].YieldsTo, all[i].WinsOver = o.YieldsTo, o.WinsOver
	}
}
