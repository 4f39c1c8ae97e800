package relay

import (
	"errors"
	"iter"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"xdpcast/internal/plan"
	"xdpcast/pkg/fanout"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/membership"
)

// tables reconciles the published flows, in the kernel's tables and on the user-space paths. The
// loader knows the current ones: it is the only writer, and reads them back when it takes over
// pinned state.
type tables struct {
	loader *loader.Loader
	paths  userPaths
	log    *slog.Logger
	// carried has the published flows, with their paths; recarried are those of them that changed since
	// the last plan, at least. It is nil if that may be any.
	carried   map[string]flow.Path
	recarried []string
	// refused are the flows that a path refused, with its error.
	refused map[string]*refusedFlow
	// applied is the plan whose flows are published; nil if unknown.
	applied *plan.Plan
	// settled: the flows of a plan were published. Before, they may be those of a dead process.
	settled bool
	own     []netip.Addr // as set on the user-space paths
	refresh bool         // the user-space paths should check their devices
}

// refusedFlow is when to retry publishing a flow.
type refusedFlow struct {
	err     error
	tries   int
	next    time.Time
	retried bool // a retry is in progress: hidden from the plan
}

// retryRefuse is the backoff of refused flows.
var retryRefuse = membership.Backoff{Min: time.Second, Max: 30 * time.Second, Factor: 2}

func (r *Relay) newTables() *tables {
	return &tables{loader: r.loader, paths: r.newUserPaths(), log: r.log, carried: map[string]flow.Path{}, refused: map[string]*refusedFlow{}}
}

// planned says that a plan was made from the answers.
func (t *tables) planned() { t.recarried = []string{} }

// adopt records the flows published by an earlier process.
func (t *tables) adopt() { t.carried = t.loader.InForce() }

// apply publishes the flows of a plan, and returns whether the published or refused flows differ
// from the plan's input.
func (t *tables) apply(p *plan.Plan, own []netip.Addr, strict []string) (changed bool, err error) {
	if t.applied != nil && sameFlows(t.applied, p) {
		t.applied = p
		if (t.refresh || t.paths.pending() || !slices.Equal(own, t.own)) && t.paths.busy() {
			err = t.paths.refresh(own)
		}
		t.own, t.refresh = own, false
		return t.forgetRefused(p), err
	}
	before := t.applied
	t.applied = nil
	if d := differenceOf(before, p); before != nil && d.inKernel && !(t.paths.busy() && (t.refresh || t.paths.pending() || !slices.Equal(own, t.own))) {
		// The user-space paths keep their flows.
		if err = t.loader.Change(d.put, d.remove); err == nil {
			changed = t.carryChange(&d)
		}
	} else {
		want := published(p)
		if err = t.syncPaths(want, own); err == nil {
			changed = t.carry(want)
		}
	}
	if err != nil {
		names, cause := blame(p, err)
		if t.refuse(p, names, cause, strict) {
			return true, nil
		}
		return false, err
	}
	t.applied, t.own, t.refresh, t.settled = p, own, false, true
	return t.forgetRefused(p) || changed, nil
}

// difference is how the published flows of two plans differ.
type difference struct {
	put      []*flow.Flow // new, or different
	remove   []string     // published no more
	inKernel bool         // no flow of a user-space path is among them
}

// differenceOf compares two plans, of which before may be nil.
func differenceOf(before, now *plan.Plan) difference {
	d := difference{inKernel: true}
	if before == nil {
		return d
	}
	changedRules(before.Rules, now.Rules, func(old, new *plan.RulePlan) {
		for f := range publishedOf(new) {
			if had := flowNamed(old, f.Name); had == nil || had != f && !had.Equal(*f) {
				d.put = append(d.put, f)
				d.inKernel = d.inKernel && f.Path == flow.PathKernel && (had == nil || had.Path == flow.PathKernel)
			}
		}
		for f := range publishedOf(old) {
			if flowNamed(new, f.Name) == nil {
				d.remove = append(d.remove, f.Name)
				d.inKernel = d.inKernel && f.Path == flow.PathKernel
			}
		}
	})
	return d
}

// flowNamed is the flow of that name that a rule publishes; nil if there is none. The plan may be
// nil.
func flowNamed(r *plan.RulePlan, name string) *flow.Flow {
	for f := range publishedOf(r) {
		if f.Name == name {
			return f
		}
	}
	return nil
}

// publishedOf yields the flows of a rule to publish. The plan may be nil.
func publishedOf(r *plan.RulePlan) iter.Seq[*flow.Flow] {
	return func(yield func(*flow.Flow) bool) {
		if r == nil {
			return
		}
		for _, f := range r.Flows {
			if f.Publish && !yield(f.Flow) {
				return
			}
		}
	}
}

// published are the flows of a plan to publish.
func published(p *plan.Plan) []*flow.Flow {
	want := make([]*flow.Flow, 0, len(p.Rules))
	for _, r := range p.Rules {
		for f := range publishedOf(r) {
			want = append(want, f)
		}
	}
	return want
}

// sameFlows says whether two plans publish the same flows. Unchanged rules share their plan.
func sameFlows(a, b *plan.Plan) bool {
	if a == b {
		return true
	}
	return slices.EqualFunc(a.Rules, b.Rules, func(x, y *plan.RulePlan) bool {
		return x == y || slices.EqualFunc(x.Flows, y.Flows, func(f, g *plan.FlowPlan) bool {
			return f == g || f.Publish == g.Publish && (!f.Publish || f.Flow == g.Flow || f.Flow.Equal(*g.Flow))
		})
	})
}

// carry records the published flows.
func (t *tables) carry(want []*flow.Flow) (changed bool) {
	for _, f := range want {
		changed = t.set(f.Name, f.Path) || changed
	}
	if len(t.carried) == len(want) {
		return changed
	}
	names := make(map[string]bool, len(want))
	for i := range want {
		names[want[i].Name] = true
	}
	for name := range t.carried {
		if !names[name] {
			t.set(name, 0)
		}
	}
	return true
}

// carryChange is carry for a difference from the flows that were published before.
func (t *tables) carryChange(d *difference) (changed bool) {
	for _, f := range d.put {
		changed = t.set(f.Name, f.Path) || changed
	}
	for _, name := range d.remove {
		changed = t.set(name, 0) || changed
	}
	return changed
}

// manyRecarried is the number of changed flows from which the planner compares all instead.
const manyRecarried = 1000

// set records the path of a flow; 0: it is not published.
func (t *tables) set(name string, path flow.Path) (changed bool) {
	if t.carried[name] == path {
		return false
	}
	if t.carried[name] = path; path == 0 {
		delete(t.carried, name)
	}
	if t.recarried != nil {
		t.recarried = append(t.recarried, name)
	}
	if len(t.recarried) > manyRecarried {
		t.recarried = nil
	}
	return true
}

// drain is how long a rule that leaves the fanout path is still served there: many times the
// millisecond for which the rings delay packets.
const drain = 20 * time.Millisecond

// syncPaths publishes the flows on all paths. A flow that changes its path has both for a moment,
// in an order in which exactly one of them takes its packets: while the kernel path has them, none
// reach the packet tap.
func (t *tables) syncPaths(all []*flow.Flow, own []netip.Addr) error {
	want := map[flow.Path][]flow.Flow{}
	kernel := make([]*flow.Flow, len(all))
	for i, f := range all {
		if f.Path != flow.PathKernel {
			want[f.Path] = append(want[f.Path], *f)
		}
		kernel[i] = forKernel(f)
	}
	if err := t.paths.prepare(want, own); err != nil {
		return err
	}
	if err := t.loader.Sync(kernel); err != nil {
		return err
	}
	return t.paths.finish(want, own)
}

// blame finds the flows that an error of syncPaths is about; none if it names none.
func blame(p *plan.Plan, err error) (names []string, cause error) {
	var refused *loader.RuleError
	if errors.As(err, &refused) {
		return []string{refused.Rule}, refused.Err
	}
	var setUp *fanout.Error
	if !errors.As(err, &setUp) {
		return nil, nil
	}
	for _, r := range p.Rules {
		for _, f := range r.Flows {
			if f.Publish && f.Flow.Path == flow.PathFanout && f.In.Name == setUp.Interface {
				names = append(names, f.Flow.Name)
			}
		}
	}
	return names, err
}

// refuse records the refused flows; false if nothing can be left out.
func (t *tables) refuse(p *plan.Plan, names []string, cause error, strict []string) bool {
	for _, name := range names {
		rule, f := p.Flow(name)
		if f == nil || !f.Publish || slices.Contains(strict, rule.Rule.Name) {
			return false
		}
	}
	for _, name := range names {
		f := t.refused[name]
		if f == nil {
			f = &refusedFlow{}
			t.refused[name] = f
		}
		f.err, f.retried = cause, false
		f.tries++
		f.next = time.Now().Add(retryRefuse.Next(f.tries, 0))
	}
	return len(names) > 0
}

// refusedFlows are the flows that the plan must omit.
func (t *tables) refusedFlows() map[string]error {
	var all map[string]error
	for name, f := range t.refused {
		if !f.retried && !time.Now().Before(f.next) {
			f.retried = true
		}
		if !f.retried {
			if all == nil {
				all = map[string]error{}
			}
			all[name] = f.err
		}
	}
	return all
}

// retryRefused makes all refused flows due: there may be room now.
func (t *tables) retryRefused() {
	for _, f := range t.refused {
		f.retried = true
	}
}

// forgetRefused forgets those that are published now, or gone, and returns whether there were any.
func (t *tables) forgetRefused(p *plan.Plan) (any bool) {
	for name, f := range t.refused {
		if _, found := p.Flow(name); found == nil || f.retried && t.carried[name] != 0 {
			delete(t.refused, name)
			any = true
		}
	}
	return any
}

func (t *tables) wake() time.Duration {
	wake := idle
	for _, f := range t.refused {
		if !f.retried {
			wake = min(wake, time.Until(f.next))
		}
	}
	return wake
}
