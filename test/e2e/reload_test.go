package e2e_test

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xdpcast/internal/control"
)

// TestReload: a broken file changes nothing, and every fault is logged with its line; a good one
// changes only what differs.
func TestReload(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	file := in.write("rules.yaml", streamRules("239.2.9.1:6000%out0"))
	d := in.start("-c", file)
	in.add("api", "239.1.8.1:5000%in0", "239.2.8.1:6000%out0")
	before := in.everything()

	for _, bad := range []struct {
		text  string
		lines []string
	}{
		{badYAML, badYAMLFaults(file)},
		{"rules: [", []string{file + ":1: "}},
		{"rules:\n  - {name: x, in: " + oneIn + ", out: [" + oneOut + "]}\n  - {name: y, in: " + oneIn + ", out: [" + oneOut + "]}\n",
			[]string{file + `:3: rule "y": in "` + oneIn + `": want an input of its own`}},
		// Conflicts with a rule of the API.
		{"rules:\n  - {name: api, in: " + oneIn + ", out: [" + oneOut + "]}\n", []string{`rule "api": name "api": want a unique name`}},
	} {
		in.write("rules.yaml", bad.text)
		d.signal(syscall.SIGHUP)
		for _, line := range bad.lines {
			d.waitLog(logged(line), 1)
		}
		in.unchanged(t, before, "a broken file")
		got := in.cli("reload")
		for _, line := range bad.lines {
			if got.code != 1 || !strings.Contains(got.stderr, line) {
				t.Errorf("reload of a broken file: %s\nwant %s", got, line)
			}
		}
		in.unchanged(t, before, "a broken file")
	}

	in.write("rules.yaml", streamRules())
	d.signal(syscall.SIGHUP)
	d.waitLog("msg=reloaded added=0 changed=0 removed=1 kept=2", 1)
	in.write("rules.yaml", strings.Replace(streamRules("239.2.9.1:6000%out2"), "ttl=9", "ttl=10", 1))
	if text, want := in.mustCLI("reload"), "1 added, 0 removed, 1 changed, 1 kept\n"; !strings.HasSuffix(text, want) {
		t.Errorf("reload says %q, want %q", text, want)
	}
	after := map[string]string{}
	for _, r := range in.rules() {
		after[r.Name] = fmt.Sprintf("%s from %s", r.State, r.Origin)
	}
	want := map[string]string{"one": "active from file", "three": "active from file", "other0": "active from file", "api": "active from api"}
	if d := cmp.Diff(want, after); d != "" {
		t.Errorf("rules after reload:\n%s", d)
	}
	for _, r := range before.Rules {
		if now := in.rule(r.Name); r.Name != "other0" && now.ID != r.ID {
			t.Errorf("rule %s has number %d in the kernel, had %d", r.Name, now.ID, r.ID)
		}
	}

	got := in.cli("rule", "del", "one")
	if want := "xdpcast: rule one comes from " + file + ":2: remove it there and reload\n"; got.code != 1 || got.stderr != want {
		t.Errorf("rule del of a rule of the file: %s\nwant %s", got, want)
	}
	if text := in.mustCLI("rule", "export", "--origin", "file"); !strings.Contains(text, "ttl=10") || strings.Contains(text, "api") {
		t.Errorf("export says %q", text)
	}
	if in.rule("three").State != control.StateActive {
		t.Error("rule three is not active")
	}
}

// logged is a text as quoted by the log.
func logged(line string) string { return strings.ReplaceAll(line, `"`, `\"`) }
