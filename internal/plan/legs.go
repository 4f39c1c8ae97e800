package plan

import (
	"fmt"

	"xdpcast/internal/network"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/rules"
)

// legs plans each of several inputs by itself. The rule is active as soon as one is.
func (m *maker) legs(r *Rule) *RulePlan {
	p := &RulePlan{Rule: r, taken: m.takenFirst(r), Flows: make([]*FlowPlan, r.InputCount())}
	for i := range p.Flows {
		one := &Rule{Rule: r.OfLeg(i), Origin: r.Origin}
		leg := &flow.Leg{Of: r.Name, Number: i, Settings: streamOf(&r.Rule)}
		p.Flows[i] = &FlowPlan{}
		if inputs, reason := m.inputsOf(one.In); len(inputs) > 0 {
			m.flow(p.Flows[i], one, m.taken[legRef{r, i}], leg, inputs[0])
		} else {
			absent := &network.Link{Name: one.In.Interface}
			*p.Flows[i] = FlowPlan{In: absent, State: Pending, Reason: reason, rule: one, Flow: &flow.Flow{Name: legName(leg), Leg: leg}}
		}
	}
	p.sum()
	return p
}

// legName is the name of a leg's flow.
func legName(leg *flow.Leg) string { return fmt.Sprint(leg.Of, flow.LegSeparator, leg.Number) }

// streamOf converts the options of merge, failover and health. It is the only place that does.
func streamOf(r *rules.Rule) packet.Stream {
	s, h := r.Stream, r.Health()
	switch {
	case s != nil && s.Failover != (rules.Failover{}):
		out := watched(h)
		out.Kind, out.Silence, out.Back = packet.StreamFailover, s.Failover.Silence, s.Failover.Back
		return out
	case s == nil:
		out := watched(h)
		out.Kind = packet.StreamSingle
		return out
	}
	out := numbers(s.Merge.Format, s.Merge.Field)
	out.PassOther, out.Clock = s.Merge.PassOther, h.Clock
	out.Skew, out.Reset, out.Window = s.Merge.Times()
	return out
}

// watched is a stream whose numbers are watched: Kind is still to be set.
func watched(h rules.Health) packet.Stream {
	if h == (rules.Health{}) {
		return packet.Stream{}
	}
	out := numbers(h.Format, h.Field)
	out.Watch, out.Kind, out.Clock = out.Kind, packet.StreamNone, h.Clock
	return out
}

// numbers says where packets have their numbers.
func numbers(format rules.MergeFormat, f rules.MergeField) (out packet.Stream) {
	switch format {
	case rules.MergeRTP:
		out.Kind = packet.StreamRTP
	case rules.MergeRFC4175:
		out.Kind = packet.StreamRFC4175
	case rules.MergeMoldUDP64:
		out.Kind = packet.StreamMoldUDP64
	case rules.MergePitch: // Cboe PITCH: length 2, count 1, unit 1, sequence 4
		out.Kind, out.Offset, out.Width, out.CountOffset, out.CountWidth, out.Little = packet.StreamField, 4, 4, 2, 1, true
	case rules.MergeMDP3: // CME MDP 3.0: MsgSeqNum 4, SendingTime 8
		out.Kind, out.Width, out.Little = packet.StreamField, 4, true
	default:
		out.Kind, out.Offset, out.Width, out.Little, out.CountOffset, out.CountWidth = packet.StreamField, f.Offset, f.Bytes, f.Little, f.CountOffset, f.CountBytes
	}
	return out
}

// HealthOf is what watches a flow with one input, as rules have it: the reverse of what the plan
// makes of it.
func HealthOf(leg *flow.Leg) rules.Health {
	if leg == nil || leg.Several() {
		return rules.Health{}
	}
	s := leg.Settings
	h := rules.Health{Format: rules.MergeByField, Clock: s.Clock}
	for f := rules.MergeNone + 1; f < rules.MergeByField; f++ {
		if watched(rules.Health{Format: f, Clock: s.Clock}) == (packet.Stream{Watch: s.Watch, Clock: s.Clock, Offset: s.Offset, Width: s.Width, Little: s.Little, CountOffset: s.CountOffset, CountWidth: s.CountWidth}) {
			h.Format = f
			return h
		}
	}
	h.Field = rules.MergeField{Offset: s.Offset, Bytes: s.Width, Little: s.Little, CountOffset: s.CountOffset, CountBytes: s.CountWidth}
	return h
}

// checkLeg says why an interface cannot carry one of several inputs: only the relay program detects
// duplicates among them.
func (m *maker) checkLeg(in *network.Link) error {
	if !in.Ethernet {
		return fmt.Errorf("interface %s has no Ethernet header, which the relay program needs to merge several inputs", in.Name)
	}
	return nil
}

// legRef identifies an input of a rule.
type legRef struct {
	rule *Rule
	leg  int
}

// takenFirst is the rule that takes the same as the first conflicting input of a rule, under
// another name of its interface; nil if there is none.
func (m *maker) takenFirst(r *Rule) *Rule {
	if len(m.taken) == 0 {
		return nil
	}
	for i := range r.InputCount() {
		if winner := m.taken[legRef{r, i}]; winner != nil {
			return winner
		}
	}
	return nil
}

// flow is the name of the input's flow, if it names its interface.
func (l legRef) flow() string {
	if l.rule.Stream == nil {
		return l.rule.Name
	}
	return legName(&flow.Leg{Of: l.rule.Name, Number: l.leg})
}

// streamNote says how packets of one of several inputs are handled.
func streamNote(s *rules.Stream, leg int) string {
	if failover := s.Failover.String(); failover != "" {
		return fmt.Sprintf("it comes by input %d of %d (failover=%s): the first that is not silent is relayed, and the packets of the others are dropped, reason standby", leg, 1+len(s.Legs), failover)
	}
	return fmt.Sprintf("it comes by input %d of %d (merge=%s): the first copy of each number is relayed, and the others are dropped, reason duplicate", leg, 1+len(s.Legs), s.Merge)
}
