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
// (FreeOSMemory), after tidyAfter.
const (
	manyEdits = 10_000
	tidyAfter = 2 * time.Second
)

// edited returns the rules after a change, by name. before is not modified.
func edited(before []*plan.Rule, e edit) []*plan.Rule {
	gone := make(map[string]bool, len(e.put)+len(e.remove))
	for _, name := range e.remove {
		gone[name] = true
	}
	for _, r := range e.put {
		gone[r.Name] = true
	}
	put := slices.SortedFunc(slices.Values(e.put), func(a, b *plan.Rule) int { return cmp.Compare(a.Name, b.Name) })
	after := make([]*plan.Rule, 0, len(before)+len(put))
	for _, r := range before {
		for len(put) > 0 && put[0].Name < r.Name {
			after, put = append(after, put[0]), put[1:]
		}
		if !gone[r.Name] {
			after = append(after, r)
		}
	}
	return append(after, put...)
}

// setRules replaces the wanted rules.
func (r *Relay) setRules(all []*plan.Rule) {
	r.rules, r.overlaps, r.stale = all, nil, true
	r.tables.retryRefused()
}

// rule finds a wanted rule; nil if there is none of that name.
func (r *Relay) rule(name string) *plan.Rule {
	at, ok := slices.BinarySearchFunc(r.rules, name, func(rule *plan.Rule, name string) int { return strings.Compare(rule.Name, name) })
	if !ok {
		return nil
	}
	return r.rules[at]
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
	if p := r.changes.pending; p != nil && p.before == nil {
		p.before, p.mroute = r.rules, r.mroute // its time is over
	}
	return nil
}

// accepted are the rules of the file, and those of the API that do not conflict with them.
func (r *Relay) accepted(fromFile, saved []rules.Rule) []*plan.Rule {
	var e edit
	for _, rule := range fromFile {
		e.put = append(e.put, &plan.Rule{Rule: rule, Origin: plan.OriginFile})
	}
	saved = r.withoutConflicts(fromFile, saved)
	// One by one only if there is a conflict, since that is quadratic.
	fits := len(saved) == 0 || rules.ValidateSet(slices.Concat(fromFile, saved)) == nil
	accepted := slices.Clone(fromFile)
	for _, rule := range saved {
		if !fits {
			if err := rules.ValidateSet(append(accepted, rule)); err != nil {
				r.log.Warn("rule added through the API is omitted: it conflicts with the file", "rule", rule.Name, "error", err)
				continue
			}
		}
		accepted = append(accepted, rule)
		e.put = append(e.put, &plan.Rule{Rule: rule, Origin: plan.OriginAPI})
	}
	return edited(nil, e)
}

// withoutConflicts omits the saved rules with a name or an input of the file.
func (r *Relay) withoutConflicts(fromFile, saved []rules.Rule) []rules.Rule {
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
