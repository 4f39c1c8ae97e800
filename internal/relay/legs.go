package relay

import (
	"fmt"
	"slices"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/plan"
	"xdpcast/pkg/loader"
)

// Alarm thresholds.
const (
	legSilent = time.Second // without a packet, while another input has some
	legBehind = 0.75        // of the delay that the numbers of an input allow
)

// legStatus describes one of several inputs.
func legStatus(s *loader.RuleStats, won uint64, now time.Time) *control.LegStatus {
	l := s.Leg
	status := &control.LegStatus{
		Relayed: l.Active, Won: l.Won, Lost: l.Lost, Doubled: l.Doubled, Reordered: l.Reordered, Resets: l.Resets, Senders: l.Senders,
		Different: l.Differ, Unnumbered: l.Others, Behind: l.Behind, Bound: l.Bound,
	}
	if won > 0 {
		status.Share = float64(l.Won) / float64(won)
	}
	if l.LastSeen >= 0 {
		at := now.Add(-l.LastSeen)
		status.LastSeen = &at
	}
	return status
}

// StreamStatusOf describes the stream of a rule with several inputs, given the statistics of its
// flows; nil for other rules.
func StreamStatusOf(legs []*loader.RuleStats) *control.StreamStatus {
	at := slices.IndexFunc(legs, func(s *loader.RuleStats) bool { return s != nil && s.Stream != nil })
	if at < 0 {
		return nil
	}
	s := legs[at].Stream
	status := &control.StreamStatus{Expected: s.Expected, Restarts: s.Restarts}
	status.Lost = s.Expected - min(s.Expected, s.Passed)
	freshest := time.Duration(-1)
	for _, leg := range legs {
		if leg != nil && leg.Leg != nil && leg.Leg.LastSeen >= 0 && (freshest < 0 || leg.Leg.LastSeen < freshest) {
			freshest = leg.Leg.LastSeen
		}
	}
	for i, leg := range legs {
		switch {
		case leg == nil || leg.Leg == nil || freshest < 0 || freshest > legSilent:
		case leg.Leg.LastSeen < 0:
			status.Alarms = append(status.Alarms, fmt.Sprintf("in[%d] has brought no packet", i))
		case leg.Leg.LastSeen > freshest+legSilent:
			status.Alarms = append(status.Alarms, fmt.Sprintf("in[%d] is silent for %v", i, leg.Leg.LastSeen.Round(time.Second)))
		case leg.Leg.Differs:
			status.Alarms = append(status.Alarms, fmt.Sprintf("in[%d] brings other packets than those relayed with the same numbers (%d of them seen): is it another stream?", i, leg.Leg.Differ))
		case float64(leg.Leg.Behind) > legBehind*float64(leg.Leg.Bound):
			status.Alarms = append(status.Alarms, fmt.Sprintf("in[%d] is %d numbers behind: from %d on copies pass again, or are lost (more window, or legs that are closer)", i, leg.Leg.Behind, leg.Leg.Bound))
		}
	}
	return status
}

// describeLegs describes the inputs of a rule with several.
func describeLegs(status *control.RuleStatus, p *plan.RulePlan, stats map[string]*loader.RuleStats) {
	if p.Rule.Stream == nil {
		return
	}
	all := make([]*loader.RuleStats, len(p.Flows))
	won := uint64(0)
	for i, f := range p.Flows {
		if all[i] = stats[f.Flow.Name]; all[i] != nil && all[i].Leg != nil {
			won += all[i].Leg.Won
		}
	}
	status.Stream = StreamStatusOf(all)
	now := time.Now()
	for i, f := range p.Flows {
		in := p.Rule.Leg(i)
		s := control.InputStatus{Interface: f.In.Name, Input: control.FormatInput(in), State: f.State.String(), Reason: f.Reason}
		if all[i] != nil {
			s.Matched = control.Counter(all[i].Matched)
			s.Drops = Drops(all[i].Drops)
			if all[i].Leg != nil {
				s.Leg = legStatus(all[i], won, now)
			}
		}
		status.Inputs = append(status.Inputs, s)
	}
	if status.Stream != nil && len(status.Stream.Alarms) > 0 && status.Reason == "" {
		status.Reason = status.Stream.Alarms[0]
	}
}
