package e2e_test

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
)

// TestBpftool: people can read the pinned state with the kernel's own tool.
func TestBpftool(t *testing.T) {
	bpftool, err := exec.LookPath("bpftool")
	if err != nil {
		labtest.Lacking(t, "bpftool is not installed: scripts/setup --test installs it")
	}
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.start("--max-rules", "64", "--max-outputs", "256") // limits that keep bpftool fast
	in.add("cam1", "10.1.0.2@239.1.1.1:5000%in0", "239.2.1.1:6000%out0,ttl=9", "239.2.1.2:6001%out1")
	n.probe("239.1.1.1:5000", ends{n.sinks[0], "239.2.1.1:6000%sink0", "10.2.0.1"})

	type entry struct {
		Formatted struct {
			Key    any `json:"key"`
			Value  any `json:"value"`
			Values any `json:"values"` // per CPU
		} `json:"formatted"`
	}
	find := func(name string, parts ...string) {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), bpftool, "-j", "map", "dump", "pinned", filepath.Join(in.pinDir, name)).Output()
		if err != nil {
			t.Fatalf("dump of %s: %v", name, err)
		}
		var entries []entry
		if err := json.Unmarshal(out, &entries); err != nil {
			t.Fatalf("dump of %s: %v\n%.500s", name, err, out)
		}
		for _, e := range entries {
			text, err := json.Marshal(e.Formatted)
			if err != nil {
				t.Fatal(err)
			}
			found := true
			for _, part := range parts {
				found = found && strings.Contains(string(text), part)
			}
			if found {
				return
			}
		}
		t.Errorf("no entry of %s holds %q:\n%.1000s", name, parts, out)
	}
	find("flows4", `"group":[239,1,1,1]`, `"source":[10,1,0,2]`, `"port":5000`)
	find("rules", `"name":"cam1"`, `"outputs":2`)
	find("outputs", `"dst":[239,2,1,1,`, `"src":[10,2,0,1,`, `"dst_port":6000`, `"ttl":9`)
	find("outputs", `"dst":[239,2,1,2,`, `"src":[10,2,1,1,`, `"dst_port":6001`)
	find("rule_stats", `"packets":200`)
}

// TestTwoRelays: relays in two namespaces of one host, each with its own pin directory, do not
// disturb each other; each refuses the other's state.
func TestTwoRelays(t *testing.T) {
	first, second := newNetwork(t), newNetwork(t)
	a, b := newInstance(t, first.relay), newInstance(t, second.relay)
	a.start()
	b.start()
	// The same names, groups and rules on both.
	a.add("one", oneIn, oneOut)
	b.add("one", oneIn, oneOut)
	sinks := []*sink{
		receive(t, first.sinks[0], "239.2.1.1:6000%sink0", traffic.Expected{}),
		receive(t, second.sinks[0], "239.2.1.1:6000%sink0", traffic.Expected{}),
	}
	cfg := traffic.SendConfig{Target: target(t, streamTarget), TTL: 16, Rate: traffic.Rate{Value: 10_000}}
	streams := []*stream{send(t, first.source, cfg), send(t, second.source, cfg)}
	streams[0].flows(1_000)
	b.add("three", threeIn, threeOut...)
	for _, name := range []string{"three", "one"} {
		if err := b.client.DeleteRule(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	sent := streams[1].stop()
	b.running.stop(15)
	b.mustCLI("unload", "--all")
	streams[0].flows(1_000)
	if fault := sinks[0].finish(streams[0].stop()); fault != "" {
		t.Error(fault)
	}
	checkCounted(t, a.rule("one"), streams[0].sender.Report().Packets)
	if got := sinks[1].received(); got > sent {
		t.Errorf("%d packets of %d arrived beside the other relay", got, sent)
	}

	// With the first daemon stopped its directory is free, but not for this namespace.
	a.running.stop(15)
	a.running = nil
	before := a.everything()
	intruder := a.on(second.relay)
	in0, err := first.relay.Link("in0")
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("pinned state belongs to another network namespace (%s): it relays there, by link if%d on the interface with index %d: start xdpcast there, use another pin directory, or end it with unload --all --pin-dir %s",
		a.pinDir, in0.Attrs().Index, in0.Attrs().Index, a.pinDir)
	intruder.refused(t, 1, []string{want}, "run")
	intruder.refused(t, 1, []string{want}, "load", "-i", "in0")
	a.unchanged(t, before, "a relay in another namespace")
	a.start()
	first.probe("239.1.1.1:5000", ends{first.sinks[0], "239.2.1.1:6000%sink0", "10.2.0.1"})
}
