package relay

import (
	"errors"
	"log/slog"
	"slices"
	"testing"

	"xdpcast/internal/network"
	"xdpcast/internal/plan"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
)

// TestRefusals: outputs whose drivers do not tell are asked about while the kernel path sends on
// them, and what one refused holds until the interface is another.
func TestRefusals(t *testing.T) {
	link := func(index int, generation uint64, known bool) *network.Link {
		return &network.Link{LinkID: network.LinkID{Index: index, Generation: generation}, Name: "eth" + string(rune('0'+index)), Ethernet: true, Features: network.Features{Known: known}}
	}
	in, told, silent := link(1, 1, false), link(2, 1, true), link(3, 1, false)
	now := network.NewSnapshot([]*network.Link{in, told, silent}, nil)
	out := func(index int) flow.Output { return flow.Output{Ready: true, Index: index} }
	p := &plan.Plan{Rules: []*plan.RulePlan{{Flows: []*plan.FlowPlan{
		{Publish: true, Flow: &flow.Flow{Path: flow.PathKernel, Out: []flow.Output{out(2), out(3), out(3)}}},
		{Publish: true, Flow: &flow.Flow{Path: flow.PathAFXDP, Out: []flow.Output{out(1)}}},
	}}}}
	var asked []int
	var answer []loader.Refusal
	var fault error
	r := newRefusals(func(indexes []int) ([]loader.Refusal, error) { asked = indexes; return answer, fault }, slog.New(slog.DiscardHandler))

	if changed, err := r.observe(p, now); changed || err != nil || !slices.Equal(asked, []int{3}) {
		t.Errorf("changed %v, %v, asked about %v", changed, err, asked)
	}
	answer = []loader.Refusal{{Index: 3, Frames: 20, Refused: 19}}
	if changed, err := r.observe(p, now); !changed || err != nil || r.answers[silent.LinkID] != "it refused 19 of 20 frames" {
		t.Errorf("changed %v, %v, answers %v", changed, err, r.answers)
	}
	if changed, err := r.observe(p, now); changed || err != nil {
		t.Errorf("told again: %v, %v", changed, err)
	}
	fault = errors.New("no counters")
	if _, err := r.observe(p, now); !errors.Is(err, fault) {
		t.Errorf("error is %v", err)
	}
	fault, answer = nil, nil
	if changed, err := r.observe(p, network.NewSnapshot([]*network.Link{in, told, link(3, 1, false)}, nil)); !changed || err != nil || len(r.answers) != 0 {
		t.Errorf("changed %v, %v, answers %v", changed, err, r.answers)
	}
}
