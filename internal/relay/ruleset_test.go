package relay

import (
	"fmt"
	"math/bits"
	"slices"
	"strings"
	"testing"

	"xdpcast/pkg/rules"
)

// TestFitting: of very many rules of the API, those that conflict with the file are found with few
// validations of the set.
func TestFitting(t *testing.T) {
	parse := func(text string) []rules.Rule {
		t.Helper()
		all, err := rules.ParseFile("test", []byte("rules:\n"+text))
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	var text strings.Builder
	const many = 4096
	for i := range many {
		fmt.Fprintf(&text, "  - {name: r%04d, in: 239.1.%d.%d:5000%%eth0, out: 239.2.%d.%d:5000%%eth1}\n", i, i/256, i%256, i/256, i%256)
	}
	saved := parse(text.String())
	// Each sends back what one of them sends.
	file := parse("  - {name: back, in: 239.2.0.7:5000%eth1, out: 239.1.0.7:5000%eth0}\n  - {name: again, in: 239.2.9.1:5000%eth1, out: 239.1.9.1:5000%eth0}\n")
	calls := 0
	var omitted []string
	got := fitting(file, saved, func(all []rules.Rule) error {
		calls++
		return rules.ValidateSet(all)
	}, func(rule rules.Rule, err error) {
		omitted = append(omitted, rule.Name)
		if !strings.Contains(err.Error(), "loop") {
			t.Errorf("%s is omitted: %v", rule.Name, err)
		}
	})
	if want := []string{"r0007", "r2305"}; !slices.Equal(omitted, want) {
		t.Errorf("omitted %v, want %v", omitted, want)
	}
	if len(got) != len(file)+many-2 || rules.ValidateSet(got) != nil {
		t.Errorf("%d rules, %v", len(got), rules.ValidateSet(got))
	}
	if most := 4*bits.Len(many) + 1; calls > most {
		t.Errorf("%d validations for 2 conflicts among %d rules, want at most %d", calls, many, most)
	}
	if got := fitting(file, nil, func([]rules.Rule) error { panic("nothing to validate") }, nil); len(got) != len(file) {
		t.Errorf("%d rules without any of the API", len(got))
	}
}
