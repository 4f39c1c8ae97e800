package docs

import (
	"regexp"
	"strings"
	"testing"

	"xdpcast/pkg/loader"
)

// TestDropReasonsAreExplained: docs/operations.md has a line for each existing reason, and no
// others.
func TestDropReasonsAreExplained(t *testing.T) {
	known := map[string]bool{}
	for reason := loader.Reason(0); reason < 255; reason++ {
		if name := reason.String(); !strings.HasPrefix(name, "reason_") {
			known[name] = true
		}
	}
	text := read(t, "docs/operations.md")
	_, text, _ = strings.Cut(text, "| reason | what was dropped")
	text, _, _ = strings.Cut(text, "\n\n")
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\|").FindAllStringSubmatch(text, -1) {
		if !known[row[1]] {
			t.Errorf("there is no reason %s", row[1])
		}
		delete(known, row[1])
	}
	for name := range known {
		t.Errorf("reason %s is not explained", name)
	}
}
