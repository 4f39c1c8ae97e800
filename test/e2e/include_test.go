package e2e_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestInclude: a file and its includes are one set, at startup, in a reload and in rule apply; a
// fault names its file and line, and changes nothing.
func TestInclude(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	main := in.write("rules.yaml", "include: rules.d/*.yaml\nrules: []\n")
	folder := filepath.Join(filepath.Dir(main), "rules.d")
	if err := os.Mkdir(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	part := func(name, rule string) {
		if err := os.WriteFile(filepath.Join(folder, name), []byte("rules:\n  - "+rule+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const first = "{name: first, in: 239.1.30.1:5000%in0, out: [239.2.30.1:5000%out0]}"
	const second = "{name: second, in: 239.1.30.2:5000%in0, out: [239.2.30.2:5000%out0]}"
	part("a.yaml", first)
	in.start("-c", main)
	if got := in.rule("first"); got.State != "active" || got.Origin != "file" {
		t.Fatalf("%+v", got)
	}

	part("b.yaml", second)
	if text, want := in.mustCLI("reload"), "1 added, 0 removed, 0 changed, 1 kept\n"; !strings.HasSuffix(text, want) {
		t.Errorf("reload says %q, want %q", text, want)
	}
	part("b.yaml", strings.Replace(second, "second", "first", 1))
	before := in.everything()
	for command, want := range map[string]string{
		"del first": "rule first comes from " + folder + "/a.yaml:2: remove it there and reload",
		"add first --in 239.1.30.9:5000%in0 --out 239.2.30.9:5000%out0": "rule first exists already (from " + folder + "/a.yaml:2): delete it first, or choose another name",
	} {
		if got := in.cli(append([]string{"rule"}, strings.Fields(command)...)...); got.code != 1 || got.stderr != "xdpcast: "+want+"\n" {
			t.Errorf("rule %s: %s\nwant %s", command, got, want)
		}
	}
	want := folder + `/b.yaml:2: rule "first": name "first": want a unique name: rule #1 (` + folder + `/a.yaml:2) has it`
	for _, command := range [][]string{{"reload"}, {"check", main}, {"rule", "apply", main}} {
		if got := in.cli(command...); got.code != 1 || got.stderr != "xdpcast: "+want+"\n" {
			t.Errorf("%v: %s\nwant %s", command, got, want)
		}
	}
	in.unchanged(t, before, "a name in two files")

	if err := os.Remove(filepath.Join(folder, "b.yaml")); err != nil {
		t.Fatal(err)
	}
	if text, want := in.mustCLI("reload"), "0 added, 1 removed, 0 changed, 1 kept\n"; !strings.HasSuffix(text, want) {
		t.Errorf("reload says %q, want %q", text, want)
	}
	part("c", strings.Replace(second, "second", "third", 1))
	other := in.write("other.yaml", "include: rules.d/c\n")
	if text, want := in.mustCLI("rule", "apply", other), "1 added, 0 removed, 0 changed, 0 kept\n"; !strings.HasSuffix(text, want) {
		t.Errorf("apply says %q, want %q", text, want)
	}
	if got := in.rule("third"); got.Origin != "api" {
		t.Errorf("%+v", got)
	}
}
