package relay

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"xdpcast/pkg/control"
	"xdpcast/pkg/membership"
	"xdpcast/pkg/rules"
)

// retry is how joins are tried again. All are tried for as long as they are
// wanted: what cannot work today may after the next change of the network.
var retry = membership.Backoff{Min: 200 * time.Millisecond, Max: 30 * time.Second, Factor: 2, Jitter: 0.2}

// wantedMembership is a membership that some rule needs.
type wantedMembership struct {
	membership.Membership
	used   uint64 // the last round in which a rule needed it
	joined bool
	since  time.Time // when it was joined, or first wanted
	tries  int
	next   time.Time // when to try again
	err    error     // of the last try
}

// keyOf is what identifies a membership: an interface may be renamed.
func keyOf(m membership.Membership) membership.Membership {
	m.Interface = ""
	return m
}

// join tries the memberships that the rules need and that are due.
func (r *Relay) join(all []*wantedRule) {
	now := time.Now()
	for _, w := range all {
		for _, n := range w.instances {
			if n.publish {
				r.joinFor(w, n, now)
			}
		}
	}
}

func (r *Relay) joinFor(w *wantedRule, n *instance, now time.Time) {
	in := r.interfaces[n.in]
	groups := wantedGroups(&w.rule)
	n.joins = make([]*wantedMembership, 0, groupCount(&w.rule))
	for group := range groups {
		n.joins = append(n.joins, r.wanted(membership.Membership{Interface: in.name, Index: in.index, Group: group, Source: w.rule.In.Source}, now))
	}
	for _, m := range n.joins {
		if !m.joined && !now.Before(m.next) {
			r.tryJoin(m, now)
		}
		if !m.joined {
			r.showJoinFailure(n, m)
			return // the others wait for this one
		}
	}
}

func (r *Relay) wanted(m membership.Membership, now time.Time) *wantedMembership {
	key := keyOf(m)
	w := r.wants[key]
	if w == nil {
		w = &wantedMembership{Membership: m, since: now}
		r.wants[key] = w
	}
	return w
}

// wantedGroups are the groups that a rule wants joined.
func wantedGroups(rule *rules.Rule) func(yield func(netip.Addr) bool) {
	return func(yield func(netip.Addr) bool) {
		switch joinPolicy(rule) {
		case rules.JoinDefault:
			yield(rule.In.Address)
		case rules.JoinList:
			for _, group := range rule.Accept.Groups {
				if !yield(group) {
					return
				}
			}
		case rules.JoinAll:
			prefix := prefixOf(rule.In.Address, rule.In.Len)
			for group := rule.In.Address; prefix.Contains(group); group = group.Next() {
				if !yield(group) {
					return
				}
			}
		}
	}
}

// joinPolicy is what a rule's policy comes to: without one the group itself is
// joined, and no prefix; for a unicast input there is nothing to join.
func joinPolicy(rule *rules.Rule) rules.JoinPolicy {
	switch {
	case !rule.In.Multicast(), rule.Accept.Join == rules.JoinDefault && rule.In.Len != 0:
		return rules.JoinNone
	case rule.Accept.Join == rules.JoinAll && groupCount(rule) > rules.MaxJoinAll:
		return rules.JoinNone // refused when the rule is validated
	}
	return rule.Accept.Join
}

// groupCount is how many groups a rule's policy asks to join, clipped above
// rules.MaxJoinAll.
func groupCount(rule *rules.Rule) int {
	switch rule.Accept.Join {
	case rules.JoinList:
		return len(rule.Accept.Groups)
	case rules.JoinAll:
		return 1 << min(rule.In.Address.BitLen()-prefixOf(rule.In.Address, rule.In.Len).Bits(), 16)
	}
	return 1
}

func (r *Relay) tryJoin(w *wantedMembership, now time.Time) {
	w.tries++
	if w.err = r.groups.Join(w.Membership); w.err != nil {
		w.next = now.Add(retry.Next(w.tries, rand.Float64()))
		r.log.Error("join failed", "membership", w.Membership.String(), "tries", w.tries, "error", w.err)
		return
	}
	w.joined, w.since = true, time.Now()
	r.log.Info("joined", "membership", w.Membership.String())
}

// showJoinFailure marks an instance whose group is not joined. A new one is not
// added then. One that is in the kernel already stays: what arrives without a
// membership is still to be relayed.
func (r *Relay) showJoinFailure(n *instance, m *wantedMembership) {
	n.publish = r.loader.Has(n.resolved.Name)
	n.err = m.err
	n.reason = fmt.Sprintf("%v; %d tries, next at %s", m.err, m.tries, m.next.Format(time.TimeOnly))
	n.state = control.StateFailed
	if membership.Transient(m.err) {
		n.state = control.StatePending
	}
}

// leave leaves what no rule needs any more. A failure is no more than a warning,
// which the manager logs.
func (r *Relay) leave() {
	for _, rule := range r.rules {
		for _, n := range rule.instances {
			for _, m := range n.joins {
				m.used = r.round
			}
		}
	}
	var left []*wantedMembership
	for key, w := range r.wants {
		if w.used == r.round {
			continue
		}
		delete(r.wants, key)
		if w.joined {
			left = append(left, w)
		}
	}
	// The newest first: the kernel looks for them in that order.
	slices.SortFunc(left, func(a, b *wantedMembership) int { return b.since.Compare(a.since) })
	for _, w := range left {
		if err := r.groups.Leave(w.Membership); err == nil {
			r.log.Info("left", "membership", w.Membership.String())
		}
	}
}

// refreshMemberships makes the kernel take up what it mixes up while an interface
// is down; what it then refuses is joined again.
func (r *Relay) refreshMemberships(i *iface) {
	for _, failed := range r.groups.Refresh(i.index) {
		if w := r.wants[keyOf(failed.Membership)]; w != nil {
			w.joined, w.err, w.tries, w.next = false, failed.Err, 0, time.Time{}
		}
	}
}
