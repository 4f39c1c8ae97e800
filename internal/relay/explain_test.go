package relay

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xdpcast/internal/control"
	"xdpcast/internal/plan"
	"xdpcast/pkg/rules"
)

func (r *running) explained(k plan.Packet) (e control.Explanation) {
	r.t.Helper()
	if err := r.do(r.t.Context(), func() (err error) { e, err = r.explain(k); return err }); err != nil {
		r.t.Fatal(err)
	}
	return e
}

// TestExplain: the precedence of rules that overlap, what the winner does, and why
// nothing takes a packet.
func TestExplain(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	out := to("out0", "239.2.2.1")
	sourced := stream("sourced", "in0", "239.1.1.1", out)
	sourced.In.Source = addr("10.0.0.2")
	anyPort := stream("any-port", "in0", "239.1.1.1", out)
	anyPort.In.Port = 0
	wide := stream("wide", "in0", "239.1.0.0", out)
	wide.In.Len, wide.In.Port, wide.Accept.Join = 16, 0, rules.JoinNone
	narrow := stream("narrow", "in0", "239.1.1.0", rules.Output{Interface: "out0", Address: addr("239.7.7.0"), Len: 24, PortMode: rules.PortAdd, PortShift: 10},
		rules.Output{Interface: "out1", Address: addr("10.2.0.99"), Port: 7000, Policy: rules.Policy{TTL: rules.TTLDecrement, SourcePort: 9}})
	narrow.In.Len, narrow.In.Port, narrow.Accept.Join = 24, 0, rules.JoinNone
	pattern := stream("pattern", "in+", "239.1.1.1", out)
	r.mustPut(sourced, anyPort, wide, narrow, pattern)

	names := func(e control.Explanation) (all []string) {
		for _, c := range e.Candidates {
			all = append(all, c.Rule)
		}
		return all
	}
	e := r.explained(plan.Packet{Interface: "in0", Source: addr("10.0.0.2"), Destination: addr("239.1.1.1"), Port: 5000})
	if d := cmp.Diff([]string{"sourced", "pattern", "any-port", "narrow", "wide"}, names(e)); d != "" {
		t.Errorf("candidates:\n%s", d)
	}
	if want := "rule sourced takes it: (source, group, port) comes before (any source, group, port)"; e.Why != want {
		t.Errorf("why is %q, want %q", e.Why, want)
	}
	if len(e.Memberships) != 1 || e.Memberships[0].Source != "10.0.0.2" || e.Path != "kernel" || e.PathReason != "native XDP on in0" {
		t.Errorf("control.Explanation is %+v", e)
	}

	e = r.explained(plan.Packet{Interface: "in0", Source: addr("10.0.0.9"), Destination: addr("239.1.1.7"), Port: 5000})
	if d := cmp.Diff([]string{"narrow", "wide"}, names(e)); d != "" {
		t.Errorf("candidates:\n%s", d)
	}
	if e.Candidates[0].Kind != "any source, prefix of 24 bits, any port" || len(e.Memberships) != 0 {
		t.Errorf("control.Explanation is %+v", e)
	}
	if want := "to 239.7.7.7:5010, from 10.1.0.1, source port kept"; e.Outputs[0].Rewrite != want || e.Outputs[0].Dropped {
		t.Errorf("output is %+v, want %q", e.Outputs[0], want)
	}
	if want := "to 10.2.0.99:7000, from 10.2.0.1:9, ttl one less"; e.Outputs[1].Rewrite != want || !e.Outputs[1].Dropped || e.Outputs[1].State != "no_neighbour" {
		t.Errorf("output is %+v, want %q", e.Outputs[1], want)
	}
	if err := p.peer.AddAddr("out1", "10.2.0.99/24"); err != nil {
		t.Fatal(err)
	}
	mac := macOf(t, p.peer, "out1")
	r.waitMAC("narrow", 1, mac)
	e = r.explained(plan.Packet{Interface: "in0", Destination: addr("239.1.1.7")})
	if got := e.Outputs[1].NextHop; !strings.HasPrefix(got, "10.2.0.99 at ") || e.Outputs[0].Rewrite != "to 239.7.7.7, port +10, from 10.1.0.1, source port kept" {
		t.Errorf("outputs are %+v", e.Outputs)
	}

	for _, tt := range []struct {
		packet plan.Packet
		want   string
	}{
		{plan.Packet{Interface: "eth9", Destination: addr("239.1.1.1"), Port: 5000}, "no rule takes it: interface eth9 not found"},
		{plan.Packet{Interface: "in0", Destination: addr("239.9.1.1"), Port: 5000}, "no rule takes it: it passes to the host unchanged"},
		{plan.Packet{Interface: "in0", Destination: addr("239.1.1.1"), Port: 5000, VLAN: rules.VLAN{ID: 3}}, "no rule takes it: rule any-port (" + anyPort.In.String() + ") takes another VLAN"},
		{plan.Packet{Interface: "out1", Destination: addr("239.1.1.1"), Port: 5000}, "no rule takes it: rule any-port (" + anyPort.In.String() + ") takes another interface"},
	} {
		if e := r.explained(tt.packet); e.Why != tt.want || len(e.Candidates) != 0 {
			t.Errorf("%+v: %q, %d candidates; want %q", tt.packet, e.Why, len(e.Candidates), tt.want)
		}
	}
}

// TestOverlapsAreTold: rules say which others take packets that they match, until the
// rule set changes.
func TestOverlapsAreTold(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	r.mustAdd("all", "239.1.0.0/16%in0,join=none", out0)
	r.mustAdd("one", "239.1.1.1:5000%in0", "239.2.2.7:6000%out0")
	check := func(name string, yields, wins []string) {
		t.Helper()
		s, err := r.Rule(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(s.YieldsTo, yields) || !slices.Equal(s.WinsOver, wins) {
			t.Errorf("rule %s yields to %v and wins over %v, want %v and %v", name, s.YieldsTo, s.WinsOver, yields, wins)
		}
	}
	check("all", []string{"one"}, nil)
	check("one", nil, []string{"all"})
	if err := r.DeleteRule(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	check("all", nil, nil)
	list, err := r.Rules(t.Context())
	if err != nil || len(list) != 1 || len(list[0].YieldsTo) != 0 {
		t.Errorf("%+v, %v", list, err)
	}
}

// TestStatusOfPatternsAndNextHops: on which interfaces a pattern takes packets, where an
// output leaves, and whom it sends to.
func TestStatusOfPatternsAndNextHops(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	r.mustAdd("pattern", "239.9.9.9:1%in+", out0, "10.2.0.99:7000%out1")
	got, err := r.Rule(t.Context(), "pattern")
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Inputs) != 1 || got.Inputs[0].Interface != "in0" || got.Inputs[0].State != control.StateActive {
		t.Errorf("inputs are %+v", got.Inputs)
	}
	if len(got.Outputs) != 2 || got.Outputs[0].Interface != "out0" || got.Outputs[0].NextHop != "" ||
		got.Outputs[1].Interface != "out1" || got.Outputs[1].NextHop != "10.2.0.99" {
		t.Errorf("outputs are %+v", got.Outputs)
	}
	if got, err = r.add("named", anyIn, "239.2.2.2:1%none+"); err != nil || got.Inputs == nil || len(got.Inputs) != 0 || got.Outputs[0].Interface != "" {
		t.Errorf("%+v, %v", got, err)
	}
}
