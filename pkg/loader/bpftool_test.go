package loader

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xdpcast/bpf"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
)

// People look at the maps with bpftool: it prints the names of fields, and
// addresses byte by byte.
func TestBpftoolShowsRules(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("bpftool"); err != nil {
		labtest.Lacking(t, "bpftool is not installed: scripts/setup --test installs it")
	}
	n := newLab(t, 2)
	opts := stateOptions(t)
	opts.MaxRules, opts.MaxOutputs = 64, 256 // bpftool is slow for each row
	l := open(t, opts)
	sync1(t, l, someRules(n)...)
	plain := func(name string) string {
		t.Helper()
		var stderr bytes.Buffer
		cmd := exec.Command("bpftool", "map", "dump", "pinned", filepath.Join(l.opts.PinDir, name))
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("bpftool: %v: %s%s", err, out, stderr.Bytes())
		}
		if !json.Valid(out) {
			t.Errorf("map %s: no JSON: %s", name, out)
		}
		return regexp.MustCompile(`\s+`).ReplaceAllString(string(out), "")
	}
	for _, c := range []struct {
		pin  string
		want []string
	}{
		{tableNames[exact4].pin, []string{`"group":[239,1,1,1]`, `"source":[192,168,7,7]`, `"port":5000`, `"first_output":`, `"outputs":3`}},
		{tableNames[exact6].pin, []string{`"group":[255,62,0,0,0,0,0,0,0,0,0,0,0,0,0,1]`}},
		{bpf.RelayMapRules, []string{`"name":"one"`, `"name":"waiting"`, `"first_stats":`}},
		{bpf.RelayMapOutputs, []string{`"dst":[239,2,2,1,`, `"src":[10,1,0,1,`, `"dst_port":6000`, `"ttl_mode":`}},
		{bpf.RelayMapConfig, []string{fmt.Sprintf(`"schema":%d`, bpf.Schema), `"max_rules":64`}},
		{bpf.RelayMapShortcuts, []string{`"group":[239,1,1,1]`, `"port":5000`, `"family":6`}},
		{bpf.RelayMapRuleStats, []string{`"packets":0`, `"last_seen_ns":`}},
	} {
		got := plain(c.pin)
		for _, want := range c.want {
			if !strings.Contains(got, want) {
				t.Errorf("map %s: no %s in %.2000s", c.pin, want, got)
			}
		}
	}
	// The pins follow the current tables.
	for range 3 {
		sync1(t, l)
		sync1(t, l, someRules(n)[:2]...)
	}
	if got := plain(tableNames[exact4].pin); !strings.Contains(got, `"group":[239,1,1,2]`) || strings.Contains(got, `"source":[192,168,7,7]`) {
		t.Errorf("map flows4 is not the one in force: %s", got)
	}
}

// The dump in docs/operations.md has the fields that bpftool shows.
func TestDocsShowFlowEntriesAsTheyAre(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("bpftool"); err != nil {
		labtest.Lacking(t, "bpftool is not installed: scripts/setup --test installs it")
	}
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	const command = "$ bpftool map dump pinned /sys/fs/bpf/xdpcast/flows4\n"
	_, documented, _ := strings.Cut(string(text), command)
	documented, _, _ = strings.Cut(documented, "$ ")
	n := newLab(t, 1)
	l := open(t, stateOptions(t))
	sync1(t, l, flow.Flow{Name: "cam1", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{output(n.out[0], "239.2.2.1", "10.1.0.1", 6000)}})
	shown, err := exec.Command("bpftool", "map", "dump", "pinned", filepath.Join(l.opts.PinDir, tableNames[exact4].pin)).Output()
	if err != nil {
		t.Fatal(err)
	}
	// Numbers depend on the host.
	shape := func(dump string) string { return regexp.MustCompile(`\b\d+\b`).ReplaceAllString(dump, "N") }
	if diff := cmp.Diff(shape(string(shown)), shape(documented)); diff != "" {
		t.Errorf("docs/operations.md has another dump (-bpftool +docs); it is now\n%s\n%s", shown, diff)
	}
}
