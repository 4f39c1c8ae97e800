package relay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netns"

	"xdpcast/internal/control"
	"xdpcast/internal/events"
	"xdpcast/internal/network"
	"xdpcast/internal/plan"
	"xdpcast/pkg/membership"
)

// retry is the backoff of joins. They are retried as long as they are wanted: what fails today may
// work after the next change of the network.
var retry = membership.Backoff{Min: 200 * time.Millisecond, Max: 30 * time.Second, Factor: 2, Jitter: 0.2}

// memberships reconciles the joined groups of flows. The manager knows the joined ones, and checks
// them with the kernel (membership.Manager.Observe).
type memberships struct {
	manager *membership.Manager
	log     *slog.Logger
	events  *events.Log
	// settling: the daemon is starting, so its joins are not logged one by one.
	settling bool
	// tries has the wanted memberships that are not joined, and those that took several attempts.
	tries map[plan.Membership]*joinTries
	// failed has the failed memberships, as passed to the next plan.
	failed map[plan.Membership]plan.Join
	// settled is a plan whose memberships are all joined, or failed; nil: none.
	settled *plan.Plan
	// left is the plan to which the joined memberships were last reduced, and since are the
	// memberships that were tried after that. nil: none, any may be joined.
	left  *plan.Plan
	since []plan.Membership
	// observed is when the kernel was last read, how long it took, and with how many memberships.
	observed time.Time
	took     time.Duration
	size     int
	// look is a read in progress, in another goroutine, which delivers its result to looks; nil:
	// none.
	look    *membership.Look
	again   bool // and another one is due afterwards
	looking sync.WaitGroup
	looks   chan lookResult
}

// joinTries is the state of a membership that is not joined: since when it is wanted, and, if it
// failed, when to retry.
type joinTries struct {
	since  time.Time
	count  int
	failed *failedJoin // the last attempt; nil: none yet, or it is joined
}

// failedJoin is why a membership is not joined.
type failedJoin struct {
	err  error
	next time.Time // when to retry
}

// due says whether a membership that is not joined should be tried now.
func (t *joinTries) due(now time.Time) bool {
	return t == nil || t.failed == nil || !now.Before(t.failed.next)
}

func newMemberships(m *membership.Manager, log *slog.Logger, events *events.Log) *memberships {
	return &memberships{
		manager: m, log: log, events: events, settling: true, looks: make(chan lookResult, 1),
		tries: map[plan.Membership]*joinTries{}, failed: map[plan.Membership]plan.Join{},
	}
}

// restore takes over the memberships of an earlier process. letGo later leaves those that the plan
// does not need.
func (s *memberships) restore(now *network.Snapshot) {
	s.left = nil
	s.manager.Restore(func(index int) (string, uint64, bool) {
		link := now.ByIndex(index)
		if link == nil {
			return "", 0, false
		}
		return link.Name, link.Generation, true
	})
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
	flow *plan.FlowPlan
}

// join tries the due memberships of the plan: those of each flow until one fails. It returns
// whether the set of failures or their errors changed. With names, only those of these rules are
// tried.
func (s *memberships) join(p *plan.Plan, now *network.Snapshot, names []string) (changed bool) {
	at := time.Now()
	blocked := map[*plan.FlowPlan]bool{}
	due, any := s.due(p, now, names, at, blocked)
	if !any {
		s.settled = p // rather than an older one, which would stay in memory
		return false
	}
	var joined []membership.Membership
	var failed []dueJoin
	for _, d := range due {
		if s.manager.Holds(d.Membership) {
			continue // another flow also needs it
		}
		if !blocked[d.flow] {
			tried := s.tries[wantedOf(d.Membership)].due(at)
			if tried && s.try(d.Membership) {
				joined = append(joined, d.Membership)
				changed = s.answer(d.Membership) || changed
				continue
			}
			blocked[d.flow] = true
			failed = append(failed, d)
			changed = s.answer(d.Membership) || changed
		}
		s.wait(wantedOf(d.Membership), at)
	}
	s.logMemberships("joined", joined)
	s.logFailures(failed)
	if names == nil {
		s.settled = p
	}
	return changed
}

// wait records a membership that is not joined.
func (s *memberships) wait(m plan.Membership, at time.Time) *joinTries {
	t := s.tries[m]
	if t == nil {
		t = &joinTries{since: at}
		s.tries[m] = t
		s.tried(m)
	}
	return t
}

// due returns the due memberships, in the order in which to try them, and adds to blocked the flows
// that have a failed one which is not due. It returns false if nothing is to be done: all are joined,
// or have failed.
func (s *memberships) due(p *plan.Plan, now *network.Snapshot, names []string, at time.Time, blocked map[*plan.FlowPlan]bool) (due []dueJoin, any bool) {
	retries := names == nil && s.anyDue(at)
	switch {
	case names != nil:
		for _, name := range names {
			if r := p.Rule(name); r != nil {
				due = s.dueOf(r, now, at, due, blocked)
			}
		}
	case s.settled == nil || retries:
		if s.settled == nil {
			due = make([]dueJoin, 0, len(p.Rules)) // most have one
		}
		for _, r := range p.Rules {
			due = s.dueOf(r, now, at, due, blocked)
		}
	case s.settled.Joins == p.Joins:
		return nil, false
	default: // what is new since then
		changedRules(s.settled.Rules, p.Rules, func(_, r *plan.RulePlan) {
			if r != nil {
				due = s.dueOf(r, now, at, due, blocked)
			}
		})
	}
	slices.SortFunc(due, func(a, b dueJoin) int { return membership.CompareToJoin(a.Membership, b.Membership) })
	return due, true
}

// manyJoins is the number of memberships from which joinAhead uses another thread.
const manyJoins = 4096

// joinAhead begins to join very many memberships in a thread of its own, while the caller publishes
// the flows: the two together take half a start with 100,000 rules. It ends with the first failure:
// join then does the rest. The caller must call wait, and not use s before.
func (s *memberships) joinAhead(p *plan.Plan, now *network.Snapshot) (wait func()) {
	blocked := map[*plan.FlowPlan]bool{}
	due, _ := s.due(p, now, nil, time.Now(), blocked)
	if len(due) < manyJoins || len(blocked) > 0 {
		return func() {}
	}
	here, err := netns.Get()
	if err != nil {
		return func() {} // join does all
	}
	joined := make([]membership.Membership, 0, len(due))
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // it ends with the goroutine
		if enter(here) != nil {
			return
		}
		for i := range due {
			m := due[i].Membership
			if s.manager.Holds(m) {
				continue
			}
			if s.manager.Join(m) != nil {
				return
			}
			joined = append(joined, m)
		}
	}()
	return func() {
		<-done
		if err := here.Close(); err != nil {
			s.log.Warn("network namespace", "error", err)
		}
		for _, m := range joined {
			s.succeeded(m, "")
		}
		s.logMemberships("joined", joined)
	}
}

// succeeded records a successful join; was is the state before.
func (s *memberships) succeeded(m membership.Membership, was string) {
	s.tried(wantedOf(m))
	if t := s.tries[wantedOf(m)]; t != nil {
		t.failed = nil
		if t.count++; t.count == 1 {
			delete(s.tries, wantedOf(m))
		}
	}
	s.tell(m, control.GroupJoined, was, "")
}

// tried records a membership for the next leave.
func (s *memberships) tried(m plan.Membership) {
	if len(s.since) < manyCandidates { // with that many, it looks at all
		s.since = append(s.since, m)
	}
}

func (s *memberships) anyDue(now time.Time) bool {
	for m := range s.failed {
		if t := s.tries[m]; t != nil && t.failed != nil && t.due(now) {
			return true
		}
	}
	return false
}

// dueOf appends to due the unjoined memberships of a rule's flows, of each up to the first that
// failed and is not due yet: the others wait for that one.
func (s *memberships) dueOf(r *plan.RulePlan, now *network.Snapshot, at time.Time, due []dueJoin, blocked map[*plan.FlowPlan]bool) []dueJoin {
	for _, f := range r.Flows {
		for m := range f.Memberships() {
			if s.manager.Holds(joinable(m, "")) {
				continue
			}
			if !s.tries[m].due(at) {
				blocked[f] = true
				break
			}
			link := now.ByIndex(m.Link.Index)
			if link == nil || link.LinkID != m.Link {
				continue // the next plan omits it
			}
			due = append(due, dueJoin{joinable(m, link.Name), f})
		}
	}
	return due
}

func (s *memberships) try(m membership.Membership) bool {
	was := s.tries[wantedOf(m)].state()
	err := s.manager.Join(m)
	if err == nil {
		s.succeeded(m, was)
		return true
	}
	t := s.wait(wantedOf(m), time.Now())
	t.count++
	t.failed = &failedJoin{err, time.Now().Add(retry.Next(t.count, rand.Float64()))}
	if now := t.state(); now != was {
		s.tell(m, now, was, err.Error())
	}
	return false
}

// state is the state of a membership that is not joined, as in the API; empty before the first
// attempt.
func (t *joinTries) state() string {
	switch {
	case t == nil || t.failed == nil:
		return ""
	case membership.Transient(t.failed.err):
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

// answer updates a membership's answer for the next plan, and returns whether it changed.
func (s *memberships) answer(of membership.Membership) (changed bool) {
	m := wantedOf(of)
	before, was := s.failed[m]
	t := s.tries[m]
	if t == nil || t.failed == nil {
		delete(s.failed, m)
		return was
	}
	now := plan.Join{Err: t.failed.err, Transient: membership.Transient(t.failed.err), Tries: t.count, Next: t.failed.next}
	s.failed[m] = now
	return !was || before.Tries != now.Tries
}

// manyMemberships is the number of changes from which they are logged as a summary.
const manyMemberships = 32

// logMemberships logs changes of memberships, as a summary if there are many.
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

// logFailures logs failed joins, as a summary if there are many.
func (s *memberships) logFailures(all []dueJoin) {
	level := slog.LevelError
	if len(all) > manyMemberships {
		s.log.Error("joins failed", "memberships", len(all), "first", all[0].String(), "error", s.failed[wantedOf(all[0].Membership)].Err)
		level = slog.LevelDebug
	}
	for _, d := range all {
		join := s.failed[wantedOf(d.Membership)]
		s.log.Log(context.Background(), level, "join failed", "membership", d.String(), "tries", join.Tries, "error", join.Err)
	}
}

// leave leaves the memberships that the plan no longer needs. A failure is only a warning, logged
// by the manager.
func (s *memberships) leave(p *plan.Plan) {
	if s.left != nil && s.left.Joins == p.Joins {
		s.left = p // rather than an older one, which would stay in memory
		return     // nothing changed since the last call
	}
	unwanted := s.unwanted(p)
	var done []membership.Membership
	for _, m := range unwanted {
		if s.manager.Leave(m) == nil {
			done = append(done, m)
			s.tell(m, stateLeft, control.GroupJoined, "no rule wants it any more")
		}
	}
	s.left, s.since = p, nil
	s.logMemberships("left", done)
}

// manyCandidates is the number of memberships from which all that are joined are compared with the
// plan's, instead of looking for each.
const manyCandidates = 1000

// unwanted returns the joined memberships that the plan does not need, the newest first, and forgets
// the attempts of others.
func (s *memberships) unwanted(p *plan.Plan) []membership.Membership {
	if s.left != nil && len(s.since) < manyCandidates {
		if gone, ok := s.goneSince(p); ok {
			var held []membership.Status
			for m := range gone {
				if status, ok := s.manager.Held(joinable(m, "")); ok {
					held = append(held, status)
				}
				if s.tries[m] != nil {
					s.forget(m)
				}
			}
			slices.SortFunc(held, func(a, b membership.Status) int {
				return cmp.Or(b.Since.Compare(a.Since), a.Compare(b.Membership))
			})
			all := make([]membership.Membership, len(held))
			for i := range held {
				all[i] = held[i].Membership
			}
			return all
		}
	}
	if len(s.tries) > 0 {
		s.forgetTries(p)
	}
	return s.manager.Unwanted(func(yield func(membership.Membership) bool) {
		for m := range p.Memberships() {
			if !yield(joinable(m, "")) {
				return
			}
		}
	})
}

// goneSince finds the memberships that the plan does not need, among those of rules that changed
// since the last leave, and those tried since. It returns false if there are too many.
func (s *memberships) goneSince(p *plan.Plan) (gone map[plan.Membership]bool, ok bool) {
	gone = map[plan.Membership]bool{}
	for _, m := range s.since {
		gone[m] = true
	}
	changedRules(s.left.Rules, p.Rules, func(old, _ *plan.RulePlan) {
		if old == nil || len(gone) > manyCandidates {
			return
		}
		for _, f := range old.Flows {
			for m := range f.Memberships() {
				gone[m] = true
			}
		}
	})
	if len(gone) > manyCandidates {
		return nil, false
	}
	// New and changed rules first: mostly these need what is new.
	changedRules(s.left.Rules, p.Rules, func(_, now *plan.RulePlan) { without(gone, now) })
	for _, r := range p.Rules {
		if len(gone) == 0 {
			break
		}
		without(gone, r)
	}
	return gone, true
}

// without removes the memberships of a rule from a set. The rule may be nil.
func without(set map[plan.Membership]bool, r *plan.RulePlan) {
	if r == nil {
		return
	}
	for _, f := range r.Flows {
		for m := range f.Memberships() {
			delete(set, m)
		}
	}
}

// forgetTries forgets the attempts of memberships that the plan does not need.
func (s *memberships) forgetTries(p *plan.Plan) {
	wanted := map[plan.Membership]bool{}
	for m := range p.Memberships() {
		if s.tries[m] != nil {
			wanted[m] = true
		}
	}
	for m := range s.tries {
		if !wanted[m] {
			s.forget(m)
		}
	}
}

func (s *memberships) forget(m plan.Membership) {
	delete(s.tries, m)
	delete(s.failed, m)
	s.settled = nil
}

// lost records a membership that is no longer held, to be joined again.
func (s *memberships) lost(m membership.Membership, err error) {
	s.tell(m, stateLost, control.GroupJoined, cmp.Or(errorText(err), "the kernel no longer holds it"))
	s.forget(wantedOf(m))
	if err != nil {
		s.wait(wantedOf(m), time.Now()).failed = &failedJoin{err: err}
	}
}

// refresh makes the kernel correct state that it corrupts while an interface is down; memberships
// that it then refuses are joined again.
func (s *memberships) refresh(id network.LinkID) {
	for _, failed := range s.manager.Refresh(id.Index, id.Generation) {
		s.lost(failed.Membership, failed.Err)
	}
}

// drop forgets the memberships of a removed interface.
func (s *memberships) drop(id network.LinkID) {
	for _, m := range s.manager.DropInterface(id.Index, id.Generation) {
		s.tell(m, stateLeft, control.GroupJoined, "the interface is gone")
	}
	s.settled = nil
	for m := range s.tries {
		if m.Link == id {
			s.forget(m)
		}
	}
}

// reborn carries over the memberships of an interface's previous generation, for observe to check
// whether the kernel still holds them: if notifications were lost, an interface may only seem to be
// new.
func (s *memberships) reborn(before, now network.LinkID) {
	s.manager.Reborn(before.Index, before.Generation, now.Generation)
	s.settled, s.left = nil, nil
	for m, t := range s.tries {
		if m.Link == before {
			s.forget(m)
			m.Link = now
			s.tries[m] = t
		}
	}
}

// observe reads the joined groups from the kernel, unless that was recent relative to its cost and
// now is false. If it is slow because of very many groups, the answer comes later: see looked.
func (s *memberships) observe(now bool) error {
	if s.look != nil {
		s.again = s.again || now
		return nil
	}
	if !now && time.Since(s.observed) < askedShare*s.took {
		return nil
	}
	started := time.Now()
	look, err := s.manager.Look()
	if err != nil {
		return fmt.Errorf("what is joined: %w", err)
	}
	size := s.manager.Len()
	// Only as many as last time are as quick: reading takes quadratic time, 13 s for 100,000.
	if s.took < quickLook && (size < quickLen || size <= s.size) {
		err := look.Read()
		s.observed, s.took, s.size = time.Now(), time.Since(started), size
		return s.found(look, err)
	}
	s.look, s.size = look, size
	s.looking.Go(func() {
		err := look.Read()
		s.looks <- lookResult{look, err, time.Since(started)}
	})
	return nil
}

// quickLook is how long the control loop may block for that, and quickLen the number of memberships
// up to which it certainly takes less.
const (
	quickLook = 5 * time.Millisecond
	quickLen  = 2000
)

// lookResult is the result of a slow read.
type lookResult struct {
	look *membership.Look
	err  error
	took time.Duration
}

// looked handles the delayed answer to observe.
func (s *memberships) looked(l lookResult) error {
	s.look = nil
	s.observed, s.took = time.Now(), l.took
	err := s.found(l.look, l.err)
	if s.again {
		s.again = false
		return errors.Join(err, s.observe(true))
	}
	return err
}

// found handles lost memberships.
func (s *memberships) found(look *membership.Look, err error) error {
	lost := s.manager.Forget(look)
	for _, m := range lost {
		s.lost(m, nil)
	}
	if len(lost) > 0 {
		s.logMemberships("the kernel no longer holds it", lost)
	}
	if err != nil {
		return fmt.Errorf("what is joined: %w", err)
	}
	return nil
}

// close leaves all memberships.
func (s *memberships) close() error {
	if s.look != nil {
		s.look.Stop()
		s.looking.Wait()
	}
	return s.manager.Close()
}

func (s *memberships) wake() time.Duration {
	wake := idle
	for m := range s.failed {
		if t := s.tries[m]; t != nil && t.failed != nil {
			wake = min(wake, time.Until(t.failed.next))
		}
	}
	return wake
}

// families are the interfaces, by index, and families with wanted memberships.
func families(p *plan.Plan) map[querierKey]bool {
	found := map[querierKey]bool{}
	for m := range p.Memberships() {
		found[querierKey{m.Link.Index, m.Group.Is4()}] = true
	}
	return found
}
