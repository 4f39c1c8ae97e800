package relay

import (
	"context"
	"errors"
	"fmt"

	"xdpcast/internal/control"
	"xdpcast/internal/plan"
	"xdpcast/pkg/loader"
)

// Explain implements control.Backend.
func (r *Relay) Explain(ctx context.Context, text string) (e control.Explanation, err error) {
	err = r.do(ctx, func() error {
		packet, err := r.plan.ParsePacket(text)
		switch {
		case errors.Is(err, plan.ErrNoRule):
			return control.Wrap(control.KindNotFound, err)
		case err != nil:
			return control.Wrap(control.KindInvalid, err)
		}
		if e, err = r.explain(packet); err == nil {
			r.explainNotes(&e)
		}
		return err
	})
	return e, err
}

// explainNotes lists similar packets that the winner has not relayed so far, or not normally.
func (r *Relay) explainNotes(e *control.Explanation) {
	if len(e.Candidates) == 0 {
		return
	}
	status, err := r.ruleStatus(e.Candidates[0].Rule)
	if err != nil {
		return // the counters cannot be read; stats reports that
	}
	for _, n := range status.Notes {
		switch n.Reason {
		case loader.Malformed.String():
			e.Why += fmt.Sprintf("; %d packets for it were malformed and passed to the host", n.Packets)
		case loader.OrphanFragment.String():
			e.Why += fmt.Sprintf("; %d fragments came before the first of their datagram and passed to the host", n.Packets)
		case loader.UnfinishedChecksum.String():
			e.Why += fmt.Sprintf("; %d packets came with an unfinished checksum", n.Packets)
		case loader.Echo.String():
			e.Why += fmt.Sprintf("; %d packets came again from another sender (echo): if a host resends the rule's own, loop=two-way on the input drops them", n.Packets)
		}
	}
}

// explain explains a packet, as in the API.
func (r *Relay) explain(packet plan.Packet) (control.Explanation, error) {
	stats, err := r.statsOf(nil, false)
	if err != nil {
		return control.Explanation{}, err
	}
	known := plan.Known{}
	if link := r.network.Link(packet.Interface); link != nil {
		for _, q := range stats.Queriers {
			if q.Index == link.Index && (q.Family == 4) == packet.Destination.Is4() {
				known.QuerierVersion = q.Version
			}
		}
	}
	found := r.plan.Explain(packet, known)
	e := control.Explanation{
		Packet: found.Packet.String(), Why: found.Why, Path: found.Path, PathReason: found.PathReason, Notes: found.Notes,
	}
	if found.Flow != nil && len(found.Candidates) > 0 {
		if text := r.loopText(found.Candidates[0].Rule, r.loops()); text != "" {
			e.Why += "; it is looping: " + text
		}
	}
	for _, c := range found.Candidates {
		state, reason := c.Rule.State, c.Rule.Reason
		if c.Flow != nil {
			state, reason = c.Flow.State, c.Flow.Reason
		}
		e.Candidates = append(e.Candidates, control.Candidate{
			Rule: c.Rule.Rule.Name, Input: c.Input().String(), Kind: c.Kind, State: state.String(), Reason: reason,
		})
	}
	for slot, o := range found.Outputs {
		e.Outputs = append(e.Outputs, control.ExplainedOutput{
			Slot: slot, Output: o.Output, Rewrite: o.Rewrite, State: o.State.String(), Reason: o.Reason, NextHop: o.NextHop, Dropped: o.Dropped,
		})
	}
	for _, m := range found.Memberships {
		users := []flowOf{{found.Candidates[0].Rule, found.Flow}}
		e.Memberships = append(e.Memberships, r.group(m, users, nil, nil))
	}
	return e, nil
}
