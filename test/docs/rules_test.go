package docs

import (
	"regexp"
	"strings"
	"testing"

	"xdpcast/pkg/rules"
)

// TestRulesDocument holds the reference of rules to the program: every example is a
// good rule, all of them together are a good set, and what it says is refused is, in
// the words that it gives.
func TestRulesDocument(t *testing.T) {
	text := read(t, "docs/rules.md")
	var all []rules.Rule
	for _, b := range blocks(text) {
		switch b.language {
		case "rules":
			for line := range strings.Lines(b.text) {
				rule, err := parseLine(line)
				if err == nil {
					err = rule.Validate()
				}
				if err != nil {
					t.Errorf("docs/rules.md, %q: %v", strings.TrimSpace(line), err)
				}
				all = append(all, rule)
			}
		case "yaml":
			if _, err := rules.ParseFile("docs/rules.md", []byte(b.text)); err != nil {
				t.Error(err)
			}
		}
	}
	if len(all) < 20 {
		t.Errorf("only %d examples", len(all))
	}
	if err := rules.ValidateSet(all); err != nil {
		t.Errorf("docs/rules.md, all examples together: %v", err)
	}
	refused := regexp.MustCompile("(?m)^\\| `([^`]*%[^`]*)` \\| `([^`]*)` \\|$").FindAllStringSubmatch(text, -1)
	if len(refused) < 10 {
		t.Errorf("only %d refusals", len(refused))
	}
	for _, m := range refused {
		if !strings.Contains(m[1], "->") {
			m[1] += " -> 239.9.9.9:9%eth9"
		}
		rule, err := parseLine("x: " + m[1])
		if err == nil {
			err = rule.Validate()
		}
		if err == nil || !strings.Contains(err.Error(), m[2]) {
			t.Errorf("docs/rules.md, %q: %v, the document says %q", m[1], err, m[2])
		}
	}
}

// parseLine reads NAME: INPUT -> OUTPUT OUTPUT.
func parseLine(line string) (rule rules.Rule, err error) {
	name, rest, _ := strings.Cut(line, ":")
	in, outs, _ := strings.Cut(rest, "->")
	rule.Name = name
	if rule.In, rule.Accept, err = rules.ParseInput(strings.TrimSpace(in)); err != nil {
		return rule, err
	}
	for out := range strings.FieldsSeq(outs) {
		o, err := rules.ParseOutput(out)
		if err != nil {
			return rule, err
		}
		rule.Out = append(rule.Out, o)
	}
	return rule, nil
}
