package relay

import (
	"context"
	"errors"

	"xdpcast/pkg/control"
	"xdpcast/pkg/plan"
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
		e, err = r.explain(packet)
		return err
	})
	return e, err
}

// explain says what becomes of a packet, as the API has it.
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
			Rule: c.Rule.Rule.Name, Input: c.Rule.Rule.In.String(), Kind: c.Kind, State: string(state), Reason: reason,
		})
	}
	for slot, o := range found.Outputs {
		e.Outputs = append(e.Outputs, control.ExplainedOutput{
			Slot: slot, Output: o.Output, Rewrite: o.Rewrite, State: string(o.State), Reason: o.Reason, NextHop: o.NextHop, Dropped: o.Dropped,
		})
	}
	for _, m := range found.Memberships {
		users := []flowOf{{found.Candidates[0].Rule, found.Flow}}
		e.Memberships = append(e.Memberships, r.group(m, users, nil, nil))
	}
	return e, nil
}
