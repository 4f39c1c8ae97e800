package relay

import (
	"fmt"
	"math/rand/v2"
	"time"

	"xdpcast/pkg/control"
	"xdpcast/pkg/membership"
)

// retry is how joins are tried again. All are tried for as long as they are
// wanted: what cannot work today may after the next change of the network.
var retry = membership.Backoff{Min: 200 * time.Millisecond, Max: 30 * time.Second, Factor: 2, Jitter: 0.2}

// wantedMembership is a membership that some rule needs.
type wantedMembership struct {
	membership.Membership
	rules  []string
	joined bool
	since  time.Time // when it was joined, or first wanted
	tries  int
	next   time.Time // when to try again
	err    error     // of the last try
}

func (w *wantedMembership) key() membership.Membership { return keyOf(w.Membership) }

// keyOf is what identifies a membership: an interface may be renamed.
func keyOf(m membership.Membership) membership.Membership {
	m.Interface = ""
	return m
}

// join tries the memberships that rules need and that are due.
func (r *Relay) join(ordered []*wantedRule) {
	for _, w := range r.wants {
		w.rules = w.rules[:0]
	}
	now := time.Now()
	for _, rule := range ordered {
		m, ok := r.membershipOf(rule)
		if !ok || rule.resolved == nil {
			continue
		}
		w := r.wants[keyOf(m)]
		if w == nil {
			w = &wantedMembership{Membership: m, since: now}
			r.wants[keyOf(m)] = w
		}
		w.rules = append(w.rules, rule.rule.Name)
		if !w.joined && !now.Before(w.next) {
			r.tryJoin(w, now)
		}
		if !w.joined {
			r.showJoinFailure(rule, w)
		}
	}
}

func (r *Relay) tryJoin(w *wantedMembership, now time.Time) {
	w.tries++
	if w.err = r.groups.Join(w.Membership); w.err != nil {
		w.next = now.Add(retry.Next(w.tries, rand.Float64()))
		r.log.Error("join failed", "membership", w.Membership.String(), "tries", w.tries, "error", w.err)
		return
	}
	w.joined, w.since = true, now
	r.log.Info("joined", "membership", w.Membership.String())
}

// showJoinFailure marks a rule whose group is not joined. A new rule is not added
// then. One that is in the kernel already stays: what arrives without a membership
// is still to be relayed.
func (r *Relay) showJoinFailure(rule *wantedRule, w *wantedMembership) {
	if !r.loader.Has(rule.rule.Name) {
		rule.resolved = nil
	}
	rule.err = w.err
	rule.reason = fmt.Sprintf("%v; %d tries, next at %s", w.err, w.tries, w.next.Format(time.TimeOnly))
	rule.state = control.StateFailed
	if membership.Transient(w.err) {
		rule.state = control.StatePending
	}
}

// leave leaves what no rule needs any more. A failure is no more than a warning,
// which the manager logs.
func (r *Relay) leave() {
	for key, w := range r.wants {
		if len(w.rules) > 0 {
			continue
		}
		delete(r.wants, key)
		if !w.joined {
			continue
		}
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
