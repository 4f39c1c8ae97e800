package control

import "xdpcast/pkg/rules"

// ToRule parses and validates r by itself; rules.ValidateSet checks it against other rules. Errors
// match ErrInvalid and those of package rules, and name the rule; they have a line for every fault.
func ToRule(r Rule) (rules.Rule, error) {
	out, err := toRule(r)
	if err != nil {
		return rules.Rule{}, Errorf(KindInvalid, "rule %.100q: %w", r.Name, err)
	}
	if err := out.Validate(); err != nil { // its errors name the rule
		return rules.Rule{}, Wrap(KindInvalid, err)
	}
	return out, nil
}

func toRule(r Rule) (rules.Rule, error) {
	out := rules.Rule{Name: r.Name}
	var err error
	if err = out.ParseInputs(r.In); err != nil {
		return rules.Rule{}, err
	}
	if err = out.ParseStream(r.Merge, r.Failover); err != nil {
		return rules.Rule{}, err
	}
	for _, text := range r.Out {
		o, err := rules.ParseOutput(text)
		if err != nil {
			return rules.Rule{}, err
		}
		out.Out = append(out.Out, o)
	}
	if r.Path != "" {
		if out.Path, err = rules.ParsePath(r.Path); err != nil {
			return rules.Rule{}, err
		}
	}
	return out, nil
}

// FromRule is the inverse of ToRule: every part in its canonical form.
func FromRule(r rules.Rule) Rule {
	out := Rule{Name: r.Name, In: r.FormatInputs(), Out: make([]string, 0, len(r.Out)), Path: r.Path.String()}
	out.Merge, out.Failover = r.FormatStream()
	for _, o := range r.Out {
		out.Out = append(out.Out, o.String())
	}
	return out
}

// FormatInput formats an input of a rule in its canonical form.
func FormatInput(leg rules.Leg) string { return rules.FormatInput(leg.In, leg.Accept) }
