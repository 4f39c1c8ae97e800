package relay

import (
	"context"
	"errors"
	"runtime/debug"

	"xdpcast/pkg/control"
	"xdpcast/pkg/rules"
)

var _ control.Backend = (*Relay)(nil)

// AddRule implements control.Backend.
func (r *Relay) AddRule(ctx context.Context, c control.Rule) (status control.RuleStatus, err error) {
	rule, err := control.ToRule(c)
	if err != nil {
		return control.RuleStatus{}, err
	}
	err = r.do(ctx, func() error {
		if old := r.rules[rule.Name]; old != nil {
			return control.Errorf(control.KindConflict, "rule %s is there already (from the %s): delete it first, or choose another name", rule.Name, old.origin)
		}
		if err := validateSet(append(r.wantedRules(), rule)); err != nil {
			return err
		}
		if err := r.replace(edit{put: []*wantedRule{{rule: rule, origin: control.OriginAPI}}}, true); err != nil {
			return err
		}
		r.saveState()
		status, err = r.ruleStatus(rule.Name)
		return err
	})
	return status, err
}

// validateSet gives the faults between rules their kind.
func validateSet(all []rules.Rule) error {
	err := rules.ValidateSet(all)
	if errors.Is(err, rules.ErrDuplicateInput) || errors.Is(err, rules.ErrDuplicateName) || errors.Is(err, rules.ErrLoop) {
		return control.Wrap(control.KindConflict, err)
	}
	return control.Wrap(control.KindInvalid, err)
}

// replace edits the wanted rules. After an error everything is as before: the
// kernel does not take them, or, when strict, one that was put in failed.
func (r *Relay) replace(e edit, strict bool) error {
	var names []string
	if strict {
		for _, w := range e.put {
			names = append(names, w.rule.Name)
		}
	}
	undo := r.apply(e)
	err := r.reconcile(names)
	if err == nil {
		if len(e.put) >= manyEdits {
			r.tidy.Go(debug.FreeOSMemory)
		}
		return nil
	}
	r.apply(undo)
	_ = r.reconcile(nil) // lets go of what was joined and attached for them
	return control.Wrap(control.KindFailed, err)
}

func (r *Relay) saveState() {
	if err := r.writeState(); err != nil {
		r.warn("saved rules", err)
		return
	}
	delete(r.warnings, "saved rules")
}

// DeleteRule implements control.Backend.
func (r *Relay) DeleteRule(ctx context.Context, name string) error {
	return r.do(ctx, func() error {
		w := r.rules[name]
		switch {
		case w == nil:
			return control.Errorf(control.KindNotFound, "no rule is called %s", name)
		case w.origin == control.OriginFile:
			return control.Errorf(control.KindConflict, "rule %s comes from %s: remove it there and reload", name, r.opts.ConfigFile)
		}
		if err := r.replace(edit{remove: []string{name}}, false); err != nil {
			return err
		}
		r.saveState()
		return nil
	})
}

// Apply implements control.Backend.
func (r *Relay) Apply(ctx context.Context, want []control.Rule, dryRun bool) (result control.ApplyResult, err error) {
	parsed := make([]rules.Rule, 0, len(want))
	var errs []error
	for _, c := range want {
		rule, err := control.ToRule(c)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		parsed = append(parsed, rule)
	}
	if len(errs) > 0 {
		return result, control.Wrap(control.KindInvalid, errors.Join(errs...))
	}
	err = r.do(ctx, func() error {
		result, err = r.applyOrigin(control.OriginAPI, parsed, dryRun, true)
		if err == nil && !dryRun {
			r.saveState()
		}
		return err
	})
	return result, err
}

// Reload implements control.Backend. Unlike a rule that is added through the API,
// one of the file that cannot be brought in stays wanted, is shown as failed, and
// is tried again.
func (r *Relay) Reload(ctx context.Context) (result control.ApplyResult, err error) {
	err = r.do(ctx, func() error {
		if r.opts.ConfigFile == "" {
			return control.Errorf(control.KindConflict, "nothing to reload: the relay was started without a file")
		}
		fromFile, err := r.readConfig()
		if err != nil {
			return control.Wrap(control.KindInvalid, err)
		}
		result, err = r.applyOrigin(control.OriginFile, fromFile, false, false)
		return err
	})
	return result, err
}

// applyOrigin makes the rules of one origin exactly want.
func (r *Relay) applyOrigin(origin string, want []rules.Rule, dryRun, strict bool) (control.ApplyResult, error) {
	result := control.ApplyResult{DryRun: dryRun}
	var have, all []rules.Rule
	for _, w := range r.ordered {
		if w.origin == origin {
			have = append(have, w.rule)
			continue
		}
		all = append(all, w.rule)
	}
	if err := validateSet(append(all, want...)); err != nil {
		return result, err
	}
	diff := rules.Compute(have, want)
	result.Changes = changes(diff)
	if dryRun {
		return result, nil
	}
	var e edit
	for _, rule := range diff.Add {
		e.put = append(e.put, &wantedRule{rule: rule, origin: origin})
	}
	for _, c := range diff.Change {
		e.put = append(e.put, &wantedRule{rule: c.New, origin: origin})
	}
	for _, rule := range diff.Remove {
		e.remove = append(e.remove, rule.Name)
	}
	return result, r.replace(e, strict)
}

func changes(diff rules.Diff) []control.Change {
	all := []control.Change{}
	for _, rule := range diff.Add {
		all = append(all, control.Change{Op: control.OpAdd, Rule: control.FromRule(rule)})
	}
	for _, c := range diff.Change {
		old := control.FromRule(c.Old)
		all = append(all, control.Change{Op: control.OpChange, Rule: control.FromRule(c.New), Old: &old})
	}
	for _, rule := range diff.Remove {
		all = append(all, control.Change{Op: control.OpRemove, Rule: control.FromRule(rule)})
	}
	for _, rule := range diff.Keep {
		all = append(all, control.Change{Op: control.OpKeep, Rule: control.FromRule(rule)})
	}
	return all
}

// Rules implements control.Backend.
func (r *Relay) Rules(ctx context.Context) (all []control.RuleStatus, err error) {
	err = r.do(ctx, func() error {
		if all, err = r.ruleStatuses(r.names()); err == nil {
			r.addOverlaps(all)
		}
		return err
	})
	return all, err
}

// Rule implements control.Backend.
func (r *Relay) Rule(ctx context.Context, name string) (status control.RuleStatus, err error) {
	err = r.do(ctx, func() error {
		if status, err = r.ruleStatus(name); err == nil {
			one := []control.RuleStatus{status}
			r.addOverlaps(one)
			status = one[0]
		}
		return err
	})
	return status, err
}
