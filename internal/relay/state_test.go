package relay

import (
	"fmt"
	"log/slog"
	"net/netip"
	"testing"

	"xdpcast/pkg/rules"
)

// TestWithoutConflicts: what the file has by name or input is left out of the saved
// rules, and however many there are, each is looked at once.
func TestWithoutConflicts(t *testing.T) {
	rule := func(name string, i int) rules.Rule {
		return rules.Rule{Name: name, In: rules.Input{Interface: "in0", Address: netip.AddrFrom4([4]byte{239, 1, byte(i >> 8), byte(i)}), Port: 1}}
	}
	var file, saved []rules.Rule
	for i := range 20_000 {
		file = append(file, rule(fmt.Sprint("file", i), i))
		saved = append(saved, rule(fmt.Sprint("saved", i), i)) // the inputs of the file
	}
	saved = append(saved, rule("file7", 30_000), rule("free", 30_001))
	r := &Relay{log: slog.New(slog.DiscardHandler)}
	if left := r.withoutConflicts(file, saved); len(left) != 1 || left[0].Name != "free" {
		t.Errorf("%d rules are left: %v", len(left), left[:min(3, len(left))])
	}
}
