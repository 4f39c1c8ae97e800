package relay

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/events"
	"xdpcast/internal/network"
	"xdpcast/internal/plan"
	"xdpcast/pkg/membership"
)

// retry is how joins are tried again. All are tried for as long as they are
// wanted: what cannot work today may after the next change of the network.
var retry = membership.Backoff{Min: 200 * time.Millisecond, Max: 30 * time.Second, Factor: 2, Jitter: 0.2}

// memberships reconciles the groups that flows want joined. Which are, the manager asks the
// kernel (membership.Manager.Observe).
type memberships struct {
	manager *membership.Manager
	log     *slog.Logger
	events  *events.Log
	// settling: the daemon starts, and what it joins are not news one by one.
	settling bool
	// wanted are all memberships of the last plan, and those that are to be left.
	wanted map[plan.Membership]*wantedMembership
	// failed has those that could not be joined, as the next plan hears of them.
	failed map[plan.Membership]plan.Join
	round  uint32
	// settled is the list whose memberships are all joined, or failed.
	settled []plan.Membership
	// observed says when the kernel was last asked, and how long it took.
	observed time.Time
	took     time.Duration
}

// wantedMembership is what is remembered of a membership: since when, and of one that failed,
// when to try again.
type wantedMembership struct {
	since  time.Time // when it was joined, or first wanted
	name   string    // of the interface, as of the last try
	used   uint32    // the last round in which a plan wanted it
	tries  int32
	joined bool
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

func newMemberships(m *membership.Manager, log *slog.Logger, events *events.Log) *memberships {
	return &memberships{manager: m, log: log, events: events, settling: true, wanted: map[plan.Membership]*wantedMembership{}, failed: map[plan.Membership]plan.Join{}}
}

// restore takes over what an earlier process has joined. What of it the plan does not want is
// left with letGo, as all that it does not want any more.
func (s *memberships) restore(now *network.Snapshot) {
	for _, held := range s.manager.Restore(func(index int) (string, uint64, bool) {
		link := now.ByIndex(index)
		if link == nil {
			return "", 0, false
		}
		return link.Name, link.Generation, true
	}) {
		s.wanted[wantedOf(held.Membership)] = &wantedMembership{since: held.Since, name: held.Interface, joined: true}
	}
}

// joinable is a membership with the name of its interface.
func joinable(m plan.Membership, ifname string) membership.Membership {
	return membership.Membership{Interface: ifname, Index: m.Link.Index, Generation: m.Link.Generation, Group: m.Group, Source: m.Source}
}

func wantedOf(m membership.Membership) plan.Membership {
	return plan.Membership{Link: network.LinkID{Index: m.Index, Generation: m.Generation}, Group: m.Group, Source: m.Source}
}

// dueJoin is a membership to try, and a flow that needs it.
type dueJoin struct {
	membership.Membership
	wanted *wantedMembership
	flow   *plan.FlowPlan
}

// join tries the memberships that the plan wants and that are due: those of a flow until one
// fails. It says whether more or fewer have failed now, or in another way. With names, those
// of the rules alone are tried.
func (s *memberships) join(p *plan.Plan, now *network.Snapshot, names []string) (changed bool) {
	if names == nil && sameList(s.settled, p.Memberships) && !s.anyDue(time.Now()) {
		return false
	}
	at := time.Now()
	blocked := map[*plan.FlowPlan]bool{}
	var due []dueJoin
	if names == nil {
		for _, r := range p.Rules {
			due = s.dueOf(r, now, at, due, blocked)
		}
	} else {
		for _, name := range names {
			if r := p.Rule(name); r != nil {
				due = s.dueOf(r, now, at, due, blocked)
			}
		}
	}
	slices.SortFunc(due, func(a, b dueJoin) int { return membership.CompareToJoin(a.Membership, b.Membership) })
	var joined []membership.Membership
	var failed []dueJoin
	for _, d := range due {
		if d.wanted.joined || blocked[d.flow] {
			continue
		}
		if d.wanted.due(at) && s.try(d.Membership, d.wanted) {
			joined = append(joined, d.Membership)
			changed = s.answer(d) || changed
			continue
		}
		blocked[d.flow] = true
		failed = append(failed, d)
		changed = s.answer(d) || changed
	}
	s.logMemberships("joined", joined)
	s.logFailures(failed)
	if names == nil {
		s.settled = p.Memberships
	}
	return changed
}

func sameList(a, b []plan.Membership) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}

func (s *memberships) anyDue(now time.Time) bool {
	for m := range s.failed {
		if w := s.wanted[m]; w != nil && w.due(now) {
			return true
		}
	}
	return false
}

// dueOf adds to due what the flows of a rule need and is not joined, of each as far as the
// first that failed and is not due yet: the others wait for that one.
func (s *memberships) dueOf(r *plan.RulePlan, now *network.Snapshot, at time.Time, due []dueJoin, blocked map[*plan.FlowPlan]bool) []dueJoin {
	for _, f := range r.Flows {
		for _, m := range f.Memberships {
			w := s.wanted[m]
			if w == nil {
				w = &wantedMembership{since: at}
				s.wanted[m] = w
			}
			if w.joined {
				continue
			}
			if !w.due(at) {
				blocked[f] = true
				break
			}
			link := now.ByIndex(m.Link.Index)
			if link == nil || link.LinkID != m.Link {
				continue // the next plan is without it
			}
			w.name = link.Name
			due = append(due, dueJoin{joinable(m, link.Name), w, f})
		}
	}
	return due
}

func (s *memberships) try(m membership.Membership, w *wantedMembership) bool {
	w.tries++
	was := w.state()
	if err := s.manager.Join(m); err != nil {
		w.failed = &failedJoin{err, time.Now().Add(retry.Next(int(w.tries), rand.Float64()))}
		if now := w.state(); now != was {
			s.tell(m, now, was, err.Error())
		}
		return false
	}
	w.joined, w.since, w.failed = true, time.Now(), nil
	s.tell(m, control.GroupJoined, was, "")
	return true
}

// state is the membership's, as the API has it; empty before the first try.
func (w *wantedMembership) state() string {
	switch {
	case w.joined:
		return control.GroupJoined
	case w.failed == nil:
		return ""
	case membership.Transient(w.failed.err):
		return control.GroupRetrying
	}
	return control.GroupFailed
}

// tell logs an event.
func (s *memberships) tell(m membership.Membership, now, before, cause string) {
	e := events.Event{Kind: events.KindMembership, Interface: m.Interface, Group: m.Group.String(), State: now, Before: before, Cause: cause}
	if m.Source.IsValid() {
		e.Group = m.Source.String() + "@" + e.Group
	}
	if s.settling && now == control.GroupJoined {
		s.events.Sum(e)
		return
	}
	s.events.Add(e)
}

// answer tells the next plan how a membership is, and says whether that is news.
func (s *memberships) answer(d dueJoin) (changed bool) {
	m := wantedOf(d.Membership)
	before, was := s.failed[m]
	f := d.wanted.failed
	if f == nil {
		delete(s.failed, m)
		return was
	}
	now := plan.Join{Err: f.err, Transient: membership.Transient(f.err), Tries: int(d.wanted.tries), Next: f.next}
	s.failed[m] = now
	return !was || before.Tries != now.Tries
}

// manyMemberships is how many at once are not worth a line each in the log.
const manyMemberships = 32

// logMemberships logs what was done to memberships, at once for very many.
func (s *memberships) logMemberships(done string, all []membership.Membership) {
	level := slog.LevelInfo
	if len(all) > manyMemberships {
		s.log.Info(done, "memberships", len(all), "first", slices.MinFunc(all, membership.Membership.Compare).String(), "last", slices.MaxFunc(all, membership.Membership.Compare).String())
		level = slog.LevelDebug
	}
	if !s.log.Enabled(context.Background(), level) {
		return
	}
	slices.SortFunc(all, membership.Membership.Compare)
	for _, m := range all {
		s.log.Log(context.Background(), level, done, "membership", m.String())
	}
}

// logFailures logs joins that failed, at once for very many.
func (s *memberships) logFailures(all []dueJoin) {
	level := slog.LevelError
	if len(all) > manyMemberships {
		s.log.Error("joins failed", "memberships", len(all), "first", all[0].String(), "error", all[0].wanted.failed.err)
		level = slog.LevelDebug
	}
	for _, d := range all {
		s.log.Log(context.Background(), level, "join failed", "membership", d.String(), "tries", d.wanted.tries, "error", d.wanted.failed.err)
	}
}

// leave leaves what the plan does not want any more. A failure is no more than a warning,
// which the manager logs.
func (s *memberships) leave(p *plan.Plan) {
	if len(s.wanted) == len(p.Memberships) {
		if len(s.wanted) == 0 || sameList(s.settled, p.Memberships) && s.round != 0 && s.wanted[p.Memberships[0]] != nil && s.wanted[p.Memberships[0]].used == s.round {
			return // nothing has come or gone since the last time
		}
	}
	s.round++
	for _, m := range p.Memberships {
		if w := s.wanted[m]; w != nil {
			w.used = s.round
		}
	}
	type leaving struct {
		membership.Membership
		since time.Time
	}
	var left []leaving
	for m, w := range s.wanted {
		if w.used == s.round {
			continue
		}
		delete(s.wanted, m)
		delete(s.failed, m)
		if w.joined {
			left = append(left, leaving{joinable(m, w.name), w.since})
		}
	}
	// The newest first: the kernel looks for them in that order.
	slices.SortFunc(left, func(a, b leaving) int { return b.since.Compare(a.since) })
	var done []membership.Membership
	for _, l := range left {
		if s.manager.Leave(l.Membership) == nil {
			done = append(done, l.Membership)
			s.tell(l.Membership, stateLeft, control.GroupJoined, "no rule wants it any more")
		}
	}
	s.logMemberships("left", done)
}

// lost notes memberships that are not held any more, to be joined again.
func (s *memberships) lost(m plan.Membership, err error) {
	s.settled = nil
	if w := s.wanted[m]; w != nil {
		s.tell(joinable(m, w.name), stateLost, w.state(), cmp.Or(errorText(err), "the kernel does not hold it any more"))
		w.joined, w.tries, w.failed = false, 0, nil
		if err != nil {
			w.failed = &failedJoin{err: err}
		}
	}
}

// refresh makes the kernel take up what it mixes up while an interface is down; what it
// then refuses is joined again.
func (s *memberships) refresh(id network.LinkID) {
	for _, failed := range s.manager.Refresh(id.Index, id.Generation) {
		s.lost(wantedOf(failed.Membership), failed.Err)
	}
}

// drop forgets what was joined on an interface that is gone.
func (s *memberships) drop(id network.LinkID) {
	s.manager.DropInterface(id.Index, id.Generation)
	for m := range s.wanted {
		if m.Link == id {
			if w := s.wanted[m]; w.joined {
				s.tell(joinable(m, w.name), stateLeft, control.GroupJoined, "the interface is gone")
			}
			delete(s.wanted, m)
			delete(s.failed, m)
			s.settled = nil
		}
	}
}

// reborn carries over what was joined in the last life of an interface to the present one, for
// observe to find out whether the kernel still holds it: where announcements were lost, an
// interface only seems to be another.
func (s *memberships) reborn(before, now network.LinkID) {
	s.manager.Reborn(before.Index, before.Generation, now.Generation)
	for m, w := range s.wanted {
		if m.Link == before {
			delete(s.wanted, m)
			delete(s.failed, m)
			m.Link = now
			s.wanted[m] = w
			s.settled = nil
		}
	}
}

// observe asks the kernel what is joined, unless that was done a short time ago for what
// it costs and need not be now.
func (s *memberships) observe(now bool) error {
	if !now && time.Since(s.observed) < askedShare*s.took {
		return nil
	}
	started := time.Now()
	lost, err := s.manager.Observe()
	s.observed, s.took = time.Now(), time.Since(started)
	for _, m := range lost {
		s.lost(wantedOf(m), nil)
	}
	if len(lost) > 0 {
		s.logMemberships("the kernel does not hold it any more", lost)
	}
	if err != nil {
		return fmt.Errorf("what is joined: %w", err)
	}
	return nil
}

func (s *memberships) wake() time.Duration {
	wake := idle
	for m := range s.failed {
		if w := s.wanted[m]; w != nil && w.failed != nil {
			wake = min(wake, time.Until(w.failed.next))
		}
	}
	return wake
}

// families are the interfaces, by index, and families that memberships are wanted in.
func (s *memberships) families() map[querierKey]bool {
	found := map[querierKey]bool{}
	for m := range s.wanted {
		found[querierKey{m.Link.Index, m.Group.Is4()}] = true
	}
	return found
}
