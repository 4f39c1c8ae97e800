package relay

import (
	"slices"

	"xdpcast/internal/history"
	"xdpcast/internal/plan"
	"xdpcast/pkg/rules"
)

// setText is the text of the rules of an origin as a rule file, in parts of a few rules. A change of
// one rule formats, and compresses for the history, one part: see history.Part.
type setText struct {
	origin plan.Origin
	parts  []textPart
}

// textPart is the text of the wanted rules from its first one up to that of the next part. Those of
// another origin have none.
type textPart struct {
	rules []*plan.Rule
	text  *history.Part
}

// A part has partRules rules, or up to twice as many after changes; one with fewer than minPart is
// joined with the next.
const (
	partRules = 128
	minPart   = partRules / 4
)

// of returns the text of the rules of the origin among all, which are ordered by name. It formats
// the parts in which a rule differs, by pointer, from the last time.
func (t *setText) of(all []*plan.Rule) []*history.Part {
	old := t.parts
	parts := make([]textPart, 0, len(old)+1)
	for len(all) > 0 {
		if len(old) > 0 && len(all) >= len(old[0].rules) && t.unchanged(old, all) {
			parts, all, old = append(parts, old[0]), all[len(old[0].rules):], old[1:]
			continue
		}
		n := 0
		for n < minPart && n < len(all) {
			n = len(all)
			if len(old) > 1 {
				n, _ = findRule(all, old[1].rules[0].Name)
			}
			old = old[min(1, len(old)):]
		}
		parts, all = t.format(parts, all[:n]), all[n:]
	}
	t.parts = parts
	begin := rules.EndFile(nil)
	text := make([]*history.Part, 1, 1+len(parts))
	for i := range parts {
		if parts[i].text != nil {
			text, begin = append(text, parts[i].text), fileBegin
		}
	}
	text[0] = &history.Part{Text: begin}
	return text
}

// fileBegin is the begin of a rule file with rules.
var fileBegin = []byte("rules:\n")

// unchanged says whether all begins with the rules of the first part, and then those of the next.
func (t *setText) unchanged(parts []textPart, all []*plan.Rule) bool {
	n := len(parts[0].rules)
	if !slices.Equal(parts[0].rules, all[:n]) {
		return false
	}
	if len(all) == n || len(parts) == 1 {
		return len(all) == n
	}
	next := parts[1].rules[0]
	return all[n] == next || all[n].Name >= next.Name
}

// format appends parts with some rules.
func (t *setText) format(parts []textPart, all []*plan.Rule) []textPart {
	for len(all) > 0 {
		n := min(len(all), partRules)
		if len(all) <= 2*partRules {
			n = len(all)
		}
		part := textPart{rules: slices.Clone(all[:n])}
		text := slices.Clone(fileBegin) // AppendRule begins a file otherwise
		for _, rule := range part.rules {
			if rule.Origin == t.origin {
				text = rules.AppendRule(text, rule.Rule)
			}
		}
		if text = text[len(fileBegin):]; len(text) > 0 {
			part.text = &history.Part{Text: slices.Clip(text)}
		}
		parts, all = append(parts, part), all[n:]
	}
	return parts
}

// withRoutes appends the settings of mirrored multicast routes to the text of a file.
func withRoutes(text []*history.Part, mroute *rules.Mroute) []*history.Part {
	if mroute == nil {
		return text
	}
	return append(text, &history.Part{Text: rules.AppendMroute(nil, mroute)})
}
