// Package imports holds the packages to the direction in which they may import
// each other, so that each can be understood, and tested, without those above it.
package imports

import (
	"maps"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "xdpcast/"

// allowed lists, for each package, which of ours it may import; test files are
// free. What is not here may import anything and be imported by nothing: commands,
// scripts and tests.
var allowed = map[string][]string{
	"bpf":                 {},
	"pkg/fanout":          {},
	"pkg/xsk":             {},
	"pkg/packet":          {},
	"pkg/flow":            {"pkg/packet"},
	"pkg/rules":           {},
	"internal/traffic":    {"pkg/rules"},
	"pkg/membership":      {},
	"internal/network":    {"internal/genl"},
	"internal/plan":       {"pkg/flow", "internal/network", "pkg/packet", "pkg/rules"},
	"internal/account":    {},
	"internal/tap":        {},
	"pkg/loader":          {"bpf", "internal/tap", "internal/lockfile", "internal/account", "pkg/flow", "pkg/packet"},
	"internal/control":    {"internal/events", "internal/tap", "internal/lockfile", "internal/pause", "pkg/rules"},
	"internal/forward":    {"bpf", "internal/account", "internal/tap", "pkg/fanout", "pkg/flow", "pkg/loader", "pkg/packet", "pkg/xsk"},
	"internal/metrics":    {"internal/control", "internal/events"},
	"internal/web":        {"internal/control", "internal/events"},
	"internal/events":     {},
	"internal/demo":       {"internal/lab", "internal/control", "pkg/loader", "pkg/rules", "internal/traffic"},
	"internal/discover":   {"pkg/fanout", "pkg/membership", "pkg/packet", "pkg/rules"},
	"internal/doctor":     {"internal/control", "internal/discover", "pkg/loader", "pkg/membership", "internal/network", "pkg/packet", "pkg/rules"},
	"internal/mroute":     {"bpf", "pkg/flow", "pkg/packet", "pkg/rules"},
	"internal/relay":      {"bpf", "internal/tap", "internal/events", "internal/history", "internal/rulefile", "internal/savefile", "internal/control", "pkg/fanout", "pkg/flow", "internal/forward", "internal/mroute", "pkg/loader", "pkg/membership", "internal/network", "internal/plan", "pkg/packet", "pkg/rules"},
	"internal/genl":       {},
	"internal/lockfile":   {},
	"internal/pause":      {},
	"internal/privilege":  {},
	"internal/notify":     {},
	"internal/hold":       {"internal/notify"},
	"internal/lab":        {},
	"internal/nice":       {},
	"internal/live":       {},
	"internal/streamtest": {"pkg/packet"},
	"internal/flowtest":   {"pkg/flow", "pkg/packet"},
	"internal/labtest":    {"internal/lab"},
	"internal/rulefile":   {"pkg/rules"},
	"internal/convert":    {"pkg/rules"},
	"internal/savefile":   {},
	"internal/history":    {"internal/savefile"},
}

// free are the folders of packages that nothing imports.
var free = []string{"cmd/", "scripts/", "test/"}

func TestImports(t *testing.T) {
	cmd := exec.Command("go", "list", "-f", "{{.ImportPath}} {{join .Imports \" \"}}", module+"...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v", cmd, err)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		name := strings.TrimPrefix(fields[0], module)
		seen[name] = true
		may, known := allowed[name]
		if !known && !slices.ContainsFunc(free, func(dir string) bool { return strings.HasPrefix(name, dir) }) {
			t.Errorf("package %s: say in this test what it may import", name)
			continue
		}
		for _, listed := range may {
			if !slices.Contains(fields[1:], module+listed) {
				t.Errorf("package %s does not import %s any more: remove it here", name, listed)
			}
		}
		for _, path := range fields[1:] {
			imported, ours := strings.CutPrefix(path, module)
			switch {
			case !ours:
			case known && !slices.Contains(may, imported):
				t.Errorf("package %s imports %s, may only %v", name, imported, may)
			case !known && allowed[imported] == nil:
				t.Errorf("package %s imports %s, which is not to be imported", name, imported)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(allowed)) {
		if !seen[name] {
			t.Errorf("package %s is gone: remove it here", name)
		}
	}
}
