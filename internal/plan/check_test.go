package plan

import (
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"xdpcast/internal/network"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/rules"
)

// check holds a plan to what is so of every plan.
func check(t testing.TB, w *World, p *Plan) {
	t.Helper()
	if len(p.Rules) != len(w.Rules) {
		t.Fatalf("%d rules are planned of %d", len(p.Rules), len(w.Rules))
	}
	inputs := map[flow.Input]string{}
	wanted := map[Membership]bool{}
	for i, r := range p.Rules {
		if r.Rule != w.Rules[i] {
			t.Errorf("rule %d is %s, want %s", i, r.Rule.Name, w.Rules[i].Name)
		}
		checkState(t, "rule "+r.Rule.Name, r.State, r.Reason, r.Err())
		if p.Rule(r.Rule.Name) != r {
			t.Errorf("rule %s is not found", r.Rule.Name)
		}
		if r.Rule.Stream == nil && !isPattern(r.Rule.In.Interface) && len(r.Flows) > 1 {
			t.Errorf("rule %s has %d flows", r.Rule.Name, len(r.Flows))
		}
		for _, f := range r.Flows {
			if r.Rule.Stream == nil || f.In.Index != 0 { // that of an absent leg has nothing else
				checkFlow(t, w, r, f)
			}
			if owner, flow := p.Flow(f.Flow.Name); owner != r || flow != f {
				t.Errorf("flow %s is not found", f.Flow.Name)
			}
			if other := inputs[f.Flow.In.Key()]; f.Publish && other != "" {
				t.Errorf("flows %s and %s take the same", other, f.Flow.Name)
			}
			if f.Publish {
				inputs[f.Flow.In.Key()] = f.Flow.Name
			}
			for m := range f.Memberships() {
				wanted[m] = true
			}
		}
	}
	checkSets(t, w, p, wanted)
}

func checkState(t testing.TB, what string, state State, reason string, err error) {
	t.Helper()
	switch {
	case state != Active && state != Pending && state != Failed:
		t.Errorf("%s is %q", what, state)
	case (state == Failed) != (err != nil):
		t.Errorf("%s is %s, and its error %v", what, state, err)
	case state != Active && reason == "":
		t.Errorf("%s is %s without a reason", what, state)
	case strings.Contains(reason, "\n"):
		t.Errorf("%s has a reason of several lines: %q", what, reason)
	}
}

func checkFlow(t testing.TB, w *World, r *RulePlan, f *FlowPlan) {
	t.Helper()
	what := "flow " + f.Flow.Name
	checkState(t, what, f.State, f.Reason, f.Err())
	link := w.Network.ByIndex(f.In.Index)
	if link == nil || !link.Equal(f.In) || r.Rule.Stream == nil && f.Flow.Name != FlowName(&r.Rule.Rule, f.In.Name) {
		t.Fatalf("%s is on %+v", what, f.In)
	}
	if len(f.Outputs) != len(f.Flow.Out) {
		t.Fatalf("%s has %d outputs and %d in the flow", what, len(f.Outputs), len(f.Flow.Out))
	}
	if f.Publish {
		if err := f.Flow.Normalized().Check(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if n := f.Flow.Normalized(); len(f.Flow.Out) > 0 && !slices.Equal(n.Out, f.Flow.Out) {
			t.Logf("%s is not in normal form", what)
		}
	} else if f.State == Active {
		t.Errorf("%s is active and not published", what)
	}
	if f.State == Failed && f.Publish && f.NotJoined() == nil {
		t.Errorf("%s is failed (%s) and published", what, f.Reason)
	}
	if link.Ethernet && f.Publish && f.carried == 0 {
		if _, tried := w.Answers.Attached[link.LinkID]; !tried {
			t.Errorf("%s is published before its input is attached", what)
		}
	}
	for i := range f.Outputs {
		checkOutput(t, w, r, f, i)
	}
}

func checkOutput(t testing.TB, w *World, r *RulePlan, f *FlowPlan, i int) {
	t.Helper()
	o, out := &f.Outputs[i], &f.Flow.Out[i]
	what := "flow " + f.Flow.Name + " output " + o.Interface
	rule := &r.Rule.Out[o.Out]
	switch {
	case o.State != Active && o.State != Pending && o.State != NoNeighbour:
		t.Errorf("%s is %q", what, o.State)
	case (o.State == Active) != out.Ready:
		t.Errorf("%s is %s, ready %v", what, o.State, out.Ready)
	case (o.State == Active) != (o.Reason == ""):
		t.Errorf("%s is %s (%s)", what, o.State, o.Reason)
	case (o.State == NoNeighbour) != (out.Blocked == flow.NoNeighbour) && f.Publish:
		t.Errorf("%s is %s, blocked for %v", what, o.State, out.Blocked)
	case rule.Address != out.Dst:
		t.Errorf("%s goes to %v, want %v", what, out.Dst, rule.Address)
	}
	link := w.Network.Link(o.Interface)
	if out.Ready && (link == nil || !link.Running() || link.Index != out.Index || link.MAC != out.SrcMAC || !out.Src.IsValid() && rule.Policy.Source != rules.SourceKeep) {
		t.Errorf("%s is ready: %+v", what, out)
	}
	if out.Ready && out.DstMAC == [6]byte{} && link.Ethernet {
		t.Errorf("%s has no address to send to", what)
	}
	// No trap: what could send does, where the path is ours to choose.
	if f.Publish && !out.Ready && r.Rule.Path == rules.PathAuto && o.State == Pending && f.carried == 0 || f.Publish && r.Rule.Path == rules.PathAuto && o.State == Pending {
		if link != nil && link.Running() && !link.Loopback && out.Src.IsValid() && rule.Address.IsMulticast() {
			t.Errorf("%s waits, although another path could serve it: %s", what, o.Reason)
		}
	}
}

func checkSets(t testing.TB, w *World, p *Plan, wanted map[Membership]bool) {
	t.Helper()
	found := map[Membership]bool{}
	for m := range p.Memberships() {
		found[m] = true
	}
	if !maps.Equal(found, wanted) {
		t.Errorf("memberships %v, want %v", found, wanted)
	}
	unique(t, "attach", p.Attach)
	unique(t, "tags", p.Tags)
	unique(t, "hops", p.Hops)
	unique(t, "neighbours", p.Neighbours)
	for _, r := range p.Rules {
		for _, f := range r.Flows {
			if f.In.Ethernet && !slices.Contains(p.Attach, f.In.LinkID) {
				t.Errorf("input %s is not attached", f.In.Name)
			}
			for _, o := range f.Outputs {
				if l := w.Network.Link(o.Interface); l != nil && l.Ethernet && !slices.Contains(p.Attach, l.LinkID) {
					t.Errorf("output %s is not attached", o.Interface)
				}
				if o.Hop != nil && !slices.Contains(p.Hops, *o.Hop) {
					t.Errorf("way %v is not asked for", *o.Hop)
				}
			}
		}
	}
}

func unique[T comparable](t testing.TB, what string, all []T) {
	t.Helper()
	seen := map[T]bool{}
	for _, x := range all {
		if seen[x] {
			t.Errorf("%s has %v twice", what, x)
		}
		seen[x] = true
	}
}

// samePlan fails unless two plans are the same in everything that can be seen of them.
func samePlan(t testing.TB, what string, got, want *Plan) {
	t.Helper()
	if equalPlans(got, want) {
		return
	}
	d := cmp.Diff(want, got,
		cmpopts.IgnoreUnexported(Plan{}, RulePlan{}, FlowPlan{}), cmpopts.EquateEmpty(), cmpopts.EquateComparable(flow.Output{}, flow.Input{}, network.HopKey{}, network.NeighbourKey{}, Membership{}),
		cmp.Comparer(func(a, b *Rule) bool { return a == b }), cmp.Comparer(sameError),
	)
	t.Errorf("%s (-want +got):\n%s", what, d)
}

// equalPlans is what samePlan asks: cmp.Diff takes long.
func equalPlans(a, b *Plan) bool {
	return slices.EqualFunc(a.Rules, b.Rules, equalRules) && slices.Equal(a.Attach, b.Attach) && slices.Equal(a.Tags, b.Tags) &&
		slices.Equal(slices.Collect(a.Memberships()), slices.Collect(b.Memberships())) && slices.Equal(a.Hops, b.Hops) && slices.Equal(a.Neighbours, b.Neighbours)
}

func equalRules(a, b *RulePlan) bool {
	if a == b {
		return true
	}
	x, y := *a, *b
	x.Flows, y.Flows = nil, nil
	return reflect.DeepEqual(x, y) && slices.EqualFunc(a.Flows, b.Flows, func(a, b *FlowPlan) bool {
		x, y := *a, *b
		x.carried, y.carried = 0, 0
		return reflect.DeepEqual(x, y)
	})
}
