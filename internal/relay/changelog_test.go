package relay

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/events"
	"xdpcast/internal/labtest"
	"xdpcast/internal/network"
	"xdpcast/pkg/loader"
)

// logOf gives relays of a place an event log, whose events happened tells.
func logOf(t *testing.T, p *place) (happened func() []events.Event) {
	t.Helper()
	log := events.Open(events.Options{})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		log.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	p.opts.Events = log
	var all []events.Event
	r := log.ReadAfter(0)
	return func() []events.Event {
		all = append(all, r.Next(make([]events.Event, 0, events.Kept+2))...)
		return all
	}
}

// wantEvent waits for an event that says so, and has a number above after; it returns its number.
func wantEvent(t *testing.T, happened func() []events.Event, after uint64, text string) (number uint64) {
	t.Helper()
	defer func() {
		if t.Failed() {
			for _, e := range happened() {
				t.Log(e.Number, e.Text())
			}
		}
	}()
	labtest.Eventually(t, fmt.Sprintf("an event %q", text), func() bool {
		for _, e := range happened() {
			if e.Number > after && strings.Contains(e.Text(), text) {
				number = e.Number
				return true
			}
		}
		return false
	})
	return number
}

// TestEvents makes each kind of change, and finds an event of it that says what and why.
func TestEvents(t *testing.T) {
	p := newPlace(t)
	happened := logOf(t, p)
	file := p.file("rules.yaml", "rules:\n  - {name: f, in: \"239.9.9.9:5000%in0\", out: [\"239.8.8.8:5000%out0\"]}\n")
	p.opts.ConfigFile = file
	r := p.start()
	n := wantEvent(t, happened, 0, "daemon: started: version test with 1 rules")
	wantEvent(t, happened, n, "rule f: active")
	wantEvent(t, happened, n, "membership 239.9.9.9%in0: joined")
	wantEvent(t, happened, n, "interface in0: up")
	wantEvent(t, happened, n, "program in0: native")

	r.mustAdd("cam", "239.1.1.1:5000%in0", "239.2.2.2:6000%out0", "239.2.2.3:6000%late0", "10.2.0.2:6000%out1")
	wantEvent(t, happened, n, "rule cam: active")
	wantEvent(t, happened, n, "output 239.2.2.3:6000%late0 of rule cam: pending: interface late0 not found")
	n = wantEvent(t, happened, n, "neighbour 10.2.0.2 on out1: resolved: at ")

	labtest.NewTap(t, p.peer, "in0").Send(labtest.IGMP2Query("10.0.0.2"))
	n = wantEvent(t, happened, n, "querier 10.0.0.2 on in0: heard: IGMPv2")

	// A cable is pulled, and plugged again.
	if err := p.peer.SetUp("out0", false); err != nil {
		t.Fatal(err)
	}
	wantEvent(t, happened, n, "interface out0: no_carrier, was up")
	n = wantEvent(t, happened, n, "output 239.2.2.2:6000%out0 of rule cam: pending, was active: interface out0 has no carrier")
	if err := p.peer.SetUp("out0", true); err != nil {
		t.Fatal(err)
	}
	wantEvent(t, happened, n, "interface out0: up, was no_carrier")
	n = wantEvent(t, happened, n, "output 239.2.2.2:6000%out0 of rule cam: active, was pending")

	// The input goes.
	labtest.RemoveLink(t, p.host, "in0")
	wantEvent(t, happened, n, "interface in0: absent, was up")
	wantEvent(t, happened, n, "membership 239.1.1.1%in0: left, was joined: the interface is gone")
	wantEvent(t, happened, n, "path cam: none, was kernel")
	n = wantEvent(t, happened, n, "rule cam: pending, was active: interface in0 not found")

	// Reloads that fail and that do not.
	if err := os.WriteFile(file, []byte("rules: [{}]"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Reload(t.Context(), control.ApplyOptions{}); err == nil {
		t.Error("a broken file is taken")
	}
	n = wantEvent(t, happened, n, "reload: failed: ")
	if err := os.WriteFile(file, []byte("rules: []"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Reload(t.Context(), control.ApplyOptions{}); err != nil {
		t.Error(err)
	}
	wantEvent(t, happened, n, "reload: done: 0 added, 0 changed, 1 removed, 0 kept")
	n = wantEvent(t, happened, n, "rule f: removed, was pending: from the file")

	if err := r.DeleteRule(t.Context(), "cam"); err != nil {
		t.Fatal(err)
	}
	wantEvent(t, happened, n, "rule cam: removed, was pending: from the api")
	n = wantEvent(t, happened, n, "interface out0: unused")
	r.stop()
	wantEvent(t, happened, n, "daemon: ending")
	for i, e := range happened() {
		if e.Number != uint64(i+1) || e.Time.IsZero() || !slices.Contains(events.Kinds(), e.Kind) {
			t.Errorf("event %d: %+v", i, e)
		}
	}
}

// TestQuerierEvents: a querier that appears, is another, falls silent and is heard again has an event each; one that was
// silent before the daemon came has none.
func TestQuerierEvents(t *testing.T) {
	p := newPlace(t)
	happened := logOf(t, p)
	c := &changeLog{log: p.opts.Events}
	heard := func(address string, ago time.Duration) {
		c.heard([]loader.Querier{{Index: 7, Family: 4, Address: addr(address), Version: 3, LastSeen: ago}}, network.NewSnapshot(nil, nil))
	}
	heard("10.0.0.1", querierPresent)
	heard("10.0.0.1", time.Second)
	heard("10.0.0.1", 2*time.Second)
	n := wantEvent(t, happened, 0, "querier 10.0.0.1 on if7: heard, was silent: IGMPv3")
	heard("10.0.0.2", 0)
	n = wantEvent(t, happened, n, "querier 10.0.0.2 on if7: heard, was heard: IGMPv3, was 10.0.0.1")
	heard("10.0.0.2", querierPresent)
	n = wantEvent(t, happened, n, "querier 10.0.0.2 on if7: silent, was heard: IGMPv3, not heard for 4m20s")
	heard("10.0.0.2", 0)
	if n = wantEvent(t, happened, n, "querier 10.0.0.2 on if7: heard, was silent: IGMPv3"); n != 4 {
		t.Errorf("%d events", n)
	}
}

// TestEventsSayTheState: replayed, the events of rules and outputs give the states that the API tells, after
// whatever has happened to the interfaces.
func TestEventsSayTheState(t *testing.T) {
	p := newPlace(t)
	happened := logOf(t, p)
	r := p.start()
	for i := range 20 {
		out := []string{fmt.Sprintf("239.2.%d.1:6000%%out%d", i, i%2), fmt.Sprintf("239.3.%d.1:6000%%late%d", i, i%3)}
		r.mustAdd(fmt.Sprintf("r%d", i), fmt.Sprintf("239.1.1.%d:5000%%in0", i), out...)
	}
	for i := range 12 {
		if err := p.peer.SetUp([]string{"in0", "out0", "out1"}[i%3], i/3%2 == 1); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"r3", "r7"} {
		if err := r.DeleteRule(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	var diff string
	labtest.Eventually(t, "the events lead to the states", func() bool {
		rules, outputs := map[string]string{}, map[string]string{}
		for _, e := range happened() {
			switch e.Kind {
			case events.KindRule:
				rules[e.Rule] = e.State
			case events.KindOutput:
				outputs[e.Rule+" "+e.Output] = e.State
			}
		}
		all, err := r.Rules(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		diff = ""
		for _, rule := range all {
			if rules[rule.Name] != rule.State {
				diff += fmt.Sprintf("rule %s is %s, its events say %s\n", rule.Name, rule.State, rules[rule.Name])
			}
			for _, o := range rule.Outputs {
				if said := outputs[rule.Name+" "+o.Output]; said != o.State && (said != "" || o.State != control.StateActive) {
					diff += fmt.Sprintf("output %s of %s is %s, its events say %s\n", o.Output, rule.Name, o.State, said)
				}
			}
		}
		return diff == "" && rules["r3"] == stateRemoved
	})
	if diff != "" {
		t.Error(diff)
	}
}

// TestPutRule: a rule is added or replaced in one step, told of in a dry run, and one of the file is left alone.
func TestPutRule(t *testing.T) {
	p := newPlace(t)
	p.opts.ConfigFile = p.file("rules.yaml", "rules:\n  - {name: f, in: \"239.9.9.9:5000%in0\", out: [\"239.8.8.8:5000%out0\"]}\n")
	r := p.start()
	rule := control.Rule{Name: "cam", In: "239.1.1.1:5000%in0", Out: []string{"239.2.2.2:6000%out0"}}
	put := func(o control.ApplyOptions) string {
		t.Helper()
		result, err := r.PutRule(t.Context(), rule, o)
		if err != nil {
			return err.Error()
		}
		return fmt.Sprint(result.Added, result.Changed, result.Removed, len(result.Changes))
	}
	want := func(what, got, want string) {
		t.Helper()
		if !strings.Contains(got, want) {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
	}
	want("dry run", put(control.ApplyOptions{DryRun: true}), "1 0 0 1")
	if _, err := r.Rule(t.Context(), "cam"); err == nil {
		t.Error("a dry run adds the rule")
	}
	want("add", put(control.ApplyOptions{}), "1 0 0 1")
	r.mustAdd("other", "239.1.1.2:5000%in0", "239.2.2.3:6000%out0")
	rule.Out[0] += ",ttl=7"
	want("change", put(control.ApplyOptions{}), "0 1 0 1")
	want("again", put(control.ApplyOptions{}), "0 0 0 0")
	status, err := r.Rule(t.Context(), "cam")
	if err != nil || status.Out[0] != "239.2.2.2:6000%out0,ttl=7" || status.State != control.StateActive {
		t.Errorf("%+v, %v", status, err)
	}
	if _, err := r.Rule(t.Context(), "other"); err != nil {
		t.Error(err)
	}
	rule.In = "239.1.1.2:5000%in0"
	want("input of another", put(control.ApplyOptions{}), "want an input of its own")
	rule.In = "239.9.9.9:5000%in0"
	want("input of the file", put(control.ApplyOptions{}), "want an input of its own")
	rule.Name = "f"
	want("rule of the file", put(control.ApplyOptions{}), "change it there and reload")
}

// TestGroupStates: the counts are those of the list.
func TestGroupStates(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	for i := range 7 {
		r.mustAdd(fmt.Sprint("r", i), fmt.Sprintf("239.1.1.%d:5000%%%s", i, []string{"in0", "out1"}[i%2]), "239.2.2.2:6000%out0")
	}
	groups, err := r.Groups(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]map[string]int{}
	for _, g := range groups {
		if want[g.Interface] == nil {
			want[g.Interface] = map[string]int{}
		}
		want[g.Interface][g.State]++
	}
	got, err := r.GroupStates(t.Context())
	if fmt.Sprint(got) != fmt.Sprint(want) || err != nil || len(got) != 2 {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
}
