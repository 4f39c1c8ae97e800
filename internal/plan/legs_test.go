package plan

import (
	"slices"
	"strings"
	"testing"

	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

const twoLegs = "a: 239.1.1.1:5000%eth0 239.1.2.1:5000%eth2 -> 239.2.2.2:6000%eth1 merge=rtp,skew=20ms"

// Each input of a rule with several is resolved by itself, and the rule is active as soon as one is.
func TestLegs(t *testing.T) {
	for _, tt := range []struct {
		name  string
		links []string
		rule  string
		edit  func(*testing.T, *World)
		want  []string
	}{
		{name: "all is well", links: three, rule: twoLegs,
			want: []string{"rule a active", "flow a%0 on eth0 active kernel", "flow a%1 on eth2 active kernel", "out a%0 eth1 active", "out a%1 eth1 active"}},
		{name: "one is absent", links: []string{"eth0 10.0.0.1", "eth1 10.1.0.1"}, rule: twoLegs,
			want: []string{"rule a active: in[1]: interface eth2 not found", "flow a%0 on eth0 active kernel", "flow a%1 on eth2 pending waits: interface eth2 not found"}},
		{name: "both are absent", links: []string{"eth1 10.1.0.1"}, rule: twoLegs,
			want: []string{"rule a pending: in[0]: interface eth0 not found"}},
		{name: "their output is absent", links: []string{"eth0 10.0.0.1", "eth2 10.2.0.1"}, rule: twoLegs,
			want: []string{"rule a pending: interface eth1 not found"}},
		{name: "on one interface", links: three, rule: "a: 239.1.1.1:5000%eth0 239.1.2.1:5000%eth0 -> 239.2.2.2:6000%eth1 merge=rtp",
			want: []string{"rule a active", "flow a%0 on eth0 active kernel", "flow a%1 on eth0 active kernel"}},
		{name: "without an Ethernet header", links: []string{"eth0 10.0.0.1", "eth1 10.1.0.1", "eth2 noeth"}, rule: twoLegs,
			want: []string{"rule a active: in[1]: interface eth2 has no Ethernet header, which the relay program needs to merge several inputs"}},
		{name: "the program cannot be attached", links: three, rule: twoLegs,
			edit: func(t *testing.T, w *World) {
				w.Answers.Attached[w.link(t, "eth2").LinkID] = Attached{Err: errTaken}
			},
			want: []string{"rule a active: in[1]: the relay program must merge several inputs: another program has it"}},
		{name: "a path each", links: three, rule: "a: 239.1.1.1:5000%eth0 239.1.2.1:5000%eth2 -> 239.2.2.2:6000%eth1 239.2.2.3:6000%eth1 merge=rtp",
			edit: func(t *testing.T, w *World) {
				w.Answers.Attached[w.link(t, "eth2").LinkID] = Attached{Generic: true}
			},
			want: []string{"flow a%0 on eth0 active kernel", "flow a%1 on eth2 active afxdp"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, tt.links, tt.rule)
			if tt.edit != nil {
				tt.edit(t, &w)
			}
			p := Make(w, Options{})
			has(t, p, tt.want)
			for _, f := range p.Rules[0].Flows {
				want := flow.Leg{Of: "a", Number: f.Flow.Leg.Number, Settings: f.Flow.Leg.Settings}
				if *f.Flow.Leg != want || want.Settings.Kind != packet.StreamRTP || f.Publish && f.Flow.Check() != nil {
					t.Errorf("flow %s is leg %+v: %v", f.Flow.Name, f.Flow.Leg, f.Flow.Check())
				}
				if rule, found := p.Flow(f.Flow.Name); found != f || rule != p.Rules[0] {
					t.Errorf("flow %s is not found by its name", f.Flow.Name)
				}
			}
		})
	}
}

// What the plan of a rule with several inputs depends on is noticed: a plan that follows another is
// the one that is made anew.
func TestLegsFollowTheWorld(t *testing.T) {
	planner := New(Options{})
	for i, links := range [][]string{
		{"eth1 10.1.0.1"}, {"eth0 10.0.0.1", "eth1 10.1.0.1"}, three, {"eth0 10.0.0.1", "eth1 10.1.0.1", "eth2 down"}, three,
		{"eth0 10.0.0.1 alt=eth2", "eth1 10.1.0.1"}, {"eth1 10.1.0.1", "eth2 10.2.0.1"},
	} {
		w := newWorld(t, links, twoLegs, "b: 239.1.2.1:5000%eth0"+toEth1)
		got, want := describe(planner.Plan(w)), describe(Make(w, Options{}))
		if !slices.Equal(got, want) {
			t.Errorf("step %d: the plan is\n%s\nanew it is\n%s", i, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		p := Make(w, Options{})
		if n := len(slices.Collect(p.Memberships())); i == 2 && n != 3 {
			t.Errorf("%d memberships, want one for each input", n)
		}
	}
}

// A packet is explained by the input that it matches.
func TestExplainLegs(t *testing.T) {
	p := Make(newWorld(t, three, twoLegs), Options{})
	k, err := p.ParsePacket("239.1.2.1:5000%eth2")
	if err != nil {
		t.Fatal(err)
	}
	e := p.Explain(k, Known{})
	if e.Flow == nil || e.Flow.Flow.Name != "a%1" || !strings.Contains(strings.Join(e.Notes, "\n"), "input 1 of 2 (merge=rtp,skew=20ms)") {
		t.Errorf("explained as %+v", e)
	}
	if k, err = p.ParsePacket("a"); err != nil || k.Interface != "eth0" {
		t.Errorf("the rule is explained by %v, %v", k, err)
	}
	k.Interface = "eth2"
	if e := p.Explain(k, Known{}); e.Flow != nil || !strings.Contains(e.Why, "another interface") {
		t.Errorf("explained as %+v", e)
	}
}

// health= of an input makes its flow one whose numbers are watched, on every path, and costs nothing
// where that is impossible. What is made of it leads back to it.
func TestHealth(t *testing.T) {
	for _, text := range []string{"rtp", "rtp/90000", "rfc4175", "moldudp64", "pitch", "mdp3", "field:8:4le", "field:0:2:count=4:1"} {
		w := newWorld(t, three, "a: 239.1.1.1:5000%eth0,health="+text+" -> 239.2.2.2:6000%eth1")
		f := Make(w, Options{}).Rules[0].Flows[0].Flow
		if f.Leg == nil || f.Leg.Of != "a" || f.Leg.Several() || f.Leg.Settings.Kind != packet.StreamSingle || f.Check() != nil || HealthOf(f.Leg).String() != text {
			t.Errorf("%s: leg %+v, back %v: %v", text, f.Leg, HealthOf(f.Leg), f.Check())
		}
	}
	const watched = "a: 239.1.1.1:5000%eth0,health=rtp -> 239.2.2.2:6000%eth1"
	w := newWorld(t, three, "a: 239.1.1.1:5000%eth+,health=rtp -> 239.2.2.2:6000%eth1")
	for _, f := range Make(w, Options{}).Rules[0].Flows {
		if f.Flow.Leg == nil || f.Flow.Leg.Of != f.Flow.Name || f.Flow.Check() != nil {
			t.Errorf("flow %s of a pattern is leg %+v: %v", f.Flow.Name, f.Flow.Leg, f.Flow.Check())
		}
	}
	w = newWorld(t, three, watched)
	w.Answers.Attached[w.link(t, "eth0").LinkID] = Attached{Err: errTaken}
	p := Make(w, Options{})
	if f := p.Rules[0].Flows[0]; f.Flow.Leg != nil || f.State != Active || !strings.Contains(f.Note(), "health= is without effect: the relay program, which watches numbers, is not on interface eth0") {
		t.Errorf("without the program: %v, %q, leg %+v", f.State, f.Note(), f.Flow.Leg)
	}
	p = Make(newWorld(t, []string{"eth0 noeth", "eth1 10.1.0.1"}, watched), Options{})
	if f := p.Rules[0].Flows[0]; f.Flow.Leg != nil || f.State != Active || !strings.Contains(f.Note(), "health= is without effect: interface eth0 has no Ethernet header") {
		t.Errorf("without an Ethernet header: %v, %q, leg %+v", f.State, f.Note(), f.Flow.Leg)
	}
	p = Make(newWorld(t, three, "a: 239.1.1.1:5000%eth0 239.1.2.1:5000%eth2,health=rtp/48000 -> 239.2.2.2:6000%eth1 failover=30ms"), Options{})
	for _, f := range p.Rules[0].Flows {
		if s := f.Flow.Leg.Settings; s.Kind != packet.StreamFailover || s.Watch != packet.StreamRTP || s.Clock != 48000 || f.Flow.Check() != nil {
			t.Errorf("failover: %+v: %v", s, f.Flow.Check())
		}
	}
	p = Make(newWorld(t, three, "a: 239.1.1.1:5000%eth0,health=rtp/48000 239.1.2.1:5000%eth2 -> 239.2.2.2:6000%eth1 merge=rtp"), Options{})
	if s := p.Rules[0].Flows[1].Flow.Leg.Settings; s.Kind != packet.StreamRTP || s.Clock != 48000 {
		t.Errorf("merge: %+v", s)
	}
}
