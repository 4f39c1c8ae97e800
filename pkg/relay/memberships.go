package relay

import (
	"context"
	"fmt"
	"log/slog"
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
	used   uint64    // the last round in which a rule needed it
	since  time.Time // when it was joined, or first wanted
	joined bool
	tries  int32
	failed *failedJoin // the last try; nil: there was none yet, or it is joined
}

// failedJoin is why a membership is not joined.
type failedJoin struct {
	err  error
	next time.Time // when to try again
}

// due says whether it is time to try.
func (w *wantedMembership) due(now time.Time) bool {
	return !w.joined && (w.failed == nil || !now.Before(w.failed.next))
}

// membershipKey is what identifies a membership: an interface may be renamed.
type membershipKey struct {
	index         int
	group, source netip.Addr
}

func keyOf(m membership.Membership) membershipKey {
	return membershipKey{m.Index, m.Group, m.Source}
}

// dueJoin is a membership to try, and an instance that needs it.
type dueJoin struct {
	membership *wantedMembership
	instance   *instance
}

// join tries the memberships that the rules need and that are due: those of an instance
// until one fails.
func (r *Relay) join(all []*wantedRule) {
	now := time.Now()
	failed := map[*instance]*wantedMembership{}
	var due []dueJoin
	for _, w := range all {
		for _, n := range w.instances {
			if n.publish {
				due = r.dueFor(w, n, now, due, failed)
			}
		}
	}
	slices.SortFunc(due, func(a, b dueJoin) int {
		return membership.CompareToJoin(a.membership.Membership, b.membership.Membership)
	})
	joined := make([]*wantedMembership, 0, len(due))
	for _, d := range due {
		if d.membership.joined || failed[d.instance] != nil {
			continue
		}
		if !d.membership.due(now) || !r.tryJoin(d.membership, now) {
			failed[d.instance] = d.membership
			continue
		}
		joined = append(joined, d.membership)
	}
	for n, m := range failed {
		r.showJoinFailure(n, m)
	}
	r.logMemberships("joined", joined)
}

// manyMemberships is how many at once are not worth a line each in the log.
const manyMemberships = 32

// logMemberships logs what was done to memberships, at once for very many.
func (r *Relay) logMemberships(done string, all []*wantedMembership) {
	byGroup := func(a, b *wantedMembership) int { return a.Compare(b.Membership) }
	level := slog.LevelInfo
	if len(all) > manyMemberships {
		r.log.Info(done, "memberships", len(all), "first", slices.MinFunc(all, byGroup).Membership.String(), "last", slices.MaxFunc(all, byGroup).Membership.String())
		level = slog.LevelDebug
	}
	if !r.log.Enabled(context.Background(), level) {
		return
	}
	slices.SortFunc(all, byGroup)
	for _, w := range all {
		r.log.Log(context.Background(), level, done, "membership", w.Membership.String())
	}
}

// dueFor adds to due what an instance needs and is not joined, as far as the first that
// failed and is not due yet: the others wait for that one.
func (r *Relay) dueFor(w *wantedRule, n *instance, now time.Time, due []dueJoin, failed map[*instance]*wantedMembership) []dueJoin {
	in := r.interfaces[n.in]
	n.joins = make([]*wantedMembership, 0, groupCount(&w.rule))
	for group := range wantedGroups(&w.rule) {
		n.joins = append(n.joins, r.wanted(membership.Membership{Interface: in.name, Index: in.index, Group: group, Source: w.rule.In.Sender()}, now))
	}
	for _, m := range n.joins {
		if m.joined {
			continue
		}
		if !m.due(now) {
			failed[n] = m
			break
		}
		due = append(due, dueJoin{m, n})
	}
	return due
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
	case !rule.In.Multicast(), rule.In.FromHost, rule.Accept.Join == rules.JoinDefault && rule.In.Len != 0:
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

func (r *Relay) tryJoin(w *wantedMembership, now time.Time) bool {
	w.tries++
	if err := r.groups.Join(w.Membership); err != nil {
		w.failed = &failedJoin{err, now.Add(retry.Next(int(w.tries), rand.Float64()))}
		r.log.Error("join failed", "membership", w.Membership.String(), "tries", w.tries, "error", err)
		return false
	}
	w.joined, w.since, w.failed = true, time.Now(), nil
	return true
}

// showJoinFailure marks an instance whose group is not joined. A new one is not
// added then. One that is in the kernel already stays: what arrives without a
// membership is still to be relayed.
func (r *Relay) showJoinFailure(n *instance, m *wantedMembership) {
	n.publish = r.loader.Has(n.resolved.Name)
	err := m.failed.err
	n.err = err
	n.reason = fmt.Sprintf("%v; %d tries, next at %s", err, m.tries, m.failed.next.Format(time.TimeOnly))
	n.state = control.StateFailed
	if membership.Transient(err) {
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
	left = slices.DeleteFunc(left, func(w *wantedMembership) bool { return r.groups.Leave(w.Membership) != nil })
	r.logMemberships("left", left)
}

// refreshMemberships makes the kernel take up what it mixes up while an interface
// is down; what it then refuses is joined again.
func (r *Relay) refreshMemberships(i *iface) {
	for _, failed := range r.groups.Refresh(i.index) {
		if w := r.wants[keyOf(failed.Membership)]; w != nil {
			w.joined, w.tries, w.failed = false, 0, &failedJoin{err: failed.Err}
		}
	}
}
