package e2e_test

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// documentedCapabilities reads the table of docs/operations.md: what each command needs.
func documentedCapabilities(t *testing.T) map[string][]string {
	t.Helper()
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	needs := map[string][]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `xdpcast (load|upgrade)` \\| ([A-Z_, ]+) \\|$").FindAllStringSubmatch(string(text), -1) {
		needs[row[1]] = strings.Split(row[2], ", ")
	}
	return needs
}

// Commands that change the kernel work with exactly the capabilities that their table names, and
// without any one of them are refused with its name.
func TestCapabilities(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.mustCLI("load", "-i", "in0") // mounts the BPF file system, which takes CAP_SYS_ADMIN
	as := func(capabilities []string, args ...string) result {
		bounds := "-all"
		for _, c := range capabilities {
			bounds += ",+" + strings.ToLower(c)
		}
		before := program
		defer func() { program = before }()
		program = "setpriv"
		return in.cli(append([]string{"--bounding-set=" + bounds, "--inh-caps=-all", before}, args...)...)
	}
	needs := documentedCapabilities(t)
	for command, args := range map[string][]string{"load": {"load", "-i", "in0"}, "upgrade": {"upgrade"}} {
		if len(needs[command]) == 0 {
			t.Fatalf("docs/operations.md does not say what xdpcast %s needs", command)
		}
		if got := as(needs[command], args...); got.code != 0 {
			t.Errorf("%s with %v: %s", command, needs[command], got)
		}
		for _, without := range needs[command] {
			rest := slices.DeleteFunc(slices.Clone(needs[command]), func(c string) bool { return c == without })
			if got := as(rest, args...); got.code != 1 || !strings.Contains(got.stderr, "without CAP_"+without+" (see capabilities(7))") {
				t.Errorf("%s without %s: %s", command, without, got)
			}
		}
	}
}
