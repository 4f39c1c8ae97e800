package plan

import (
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"time"

	"xdpcast/internal/network"
	"xdpcast/pkg/rules"
)

// resolveMemberships adds the memberships of a flow, to be joined once it is published, and notes
// failed ones. A membership that was not tried yet holds nothing back: the flow is published before
// the join. A failed one keeps a flow from being published, but does not withdraw it: packets that
// arrive without a membership should still be relayed.
func (m *maker) resolveMemberships(f *FlowPlan, rule *rules.Rule, in *network.Link) {
	if !f.Publish {
		return
	}
	f.joins = joinPolicy(rule) != rules.JoinNone
	if !f.joins {
		return
	}
	if master := m.master(in); master != nil {
		f.noted().master = master
		f.note(fmt.Sprintf("interface %s is a port of the %s %s, which answers queries for it: groups are joined on %s, too", in.Name, master.Kind, master.Name, master.Name))
	}
	if len(m.failed) == 0 {
		return
	}
	for membership := range f.Memberships() {
		if join, failed := m.failed[membership]; failed {
			f.notJoined(join)
			return
		}
	}
}

// Memberships returns the groups that the flow needs, on its input and on the master that answers
// queries for it.
func (f *FlowPlan) Memberships() iter.Seq[Membership] {
	return func(yield func(Membership) bool) {
		if !f.joins {
			return
		}
		master, sender := f.notes().master, f.rule.In.Sender()
		for group := range wantedGroups(&f.rule.Rule) {
			if !yield(Membership{f.In.LinkID, group, sender}) || master != nil && !yield(Membership{master.LinkID, group, sender}) {
				return
			}
		}
	}
}

// sameMemberships says whether two flow plans need the same memberships.
func (f *FlowPlan) sameMemberships(g *FlowPlan) bool {
	if f.joins != g.joins || !f.joins {
		return f.joins == g.joins
	}
	if f.rule == g.rule {
		a, b := f.notes().master, g.notes().master
		return f.In.LinkID == g.In.LinkID && (a == nil) == (b == nil) && (a == nil || a.LinkID == b.LinkID)
	}
	return slices.Equal(slices.Collect(f.Memberships()), slices.Collect(g.Memberships()))
}

// Memberships are those that flows need, in the order of the rules, with duplicates.
func (p *Plan) Memberships() iter.Seq[Membership] {
	return func(yield func(Membership) bool) {
		for _, r := range p.Rules {
			for _, f := range r.Flows {
				for m := range f.Memberships() {
					if !yield(m) {
						return
					}
				}
			}
		}
	}
}

// notJoined notes a failed membership.
func (f *FlowPlan) notJoined(join Join) {
	f.noted().notJoined = join.Err
	f.Publish = f.Publish && f.carried != 0
	f.Reason = fmt.Sprintf("%v; %d tries, next at %s", join.Err, join.Tries, join.Next.Format(time.TimeOnly))
	if join.Transient {
		f.State = Pending
		return
	}
	f.State, f.noted().err = Failed, join.Err
}

// master is the bridge, bond or team that answers queries for a port. It is nil for a link that is
// not a port, and for other kinds of masters.
func (m *maker) master(in *network.Link) *network.Link {
	if in.Master == 0 {
		return nil
	}
	switch master := m.net.ByIndex(in.Master); {
	case master == nil:
		return nil
	case master.Kind == "bridge", master.Kind == "bond", master.Kind == "team":
		return master
	}
	return nil
}

// wantedGroups are the groups that a rule joins.
func wantedGroups(rule *rules.Rule) iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		switch joinPolicy(rule) {
		case rules.JoinDefault:
			yield(rule.In.Address)
		case rules.JoinList:
			for _, group := range rule.Accept.Groups() {
				if !yield(group) {
					return
				}
			}
		case rules.JoinAll:
			prefix := rule.In.Prefix()
			for group := rule.In.Address; prefix.Contains(group); group = group.Next() {
				if !yield(group) {
					return
				}
			}
		}
	}
}

// joinPolicy is the effective join policy of a rule: by default a single group is joined, and a
// prefix is not; for a unicast input there is nothing to join.
func joinPolicy(rule *rules.Rule) rules.JoinPolicy {
	switch {
	case !rule.In.Multicast(), rule.In.FromHost, rule.Accept.Join == rules.JoinDefault && rule.In.Len != 0:
		return rules.JoinNone
	case rule.Accept.Join == rules.JoinAll && groupCount(rule) > rules.MaxJoinAll:
		return rules.JoinNone // rejected by validation
	}
	return rule.Accept.Join
}

// groupCount is the number of groups that a rule's policy joins, clipped above rules.MaxJoinAll.
func groupCount(rule *rules.Rule) int {
	switch rule.Accept.Join {
	case rules.JoinList:
		return len(rule.Accept.Groups())
	case rules.JoinAll:
		return 1 << min(rule.In.Address.BitLen()-rule.In.Prefix().Bits(), 16)
	}
	return 1
}
