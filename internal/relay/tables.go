package relay

import (
	"errors"
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
	// carried has the published flows, with their paths.
	carried map[string]flow.Path
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
	want := published(p)
	t.applied = nil
	if err := t.syncPaths(want, own); err != nil {
		names, cause := blame(p, err)
		if t.refuse(p, names, cause, strict) {
			return true, nil
		}
		return false, err
	}
	t.applied, t.own, t.refresh, t.settled = p, own, false, true
	changed = t.carry(want)
	return t.forgetRefused(p) || changed, nil
}

// published are the flows of a plan to publish.
func published(p *plan.Plan) []*flow.Flow {
	want := make([]*flow.Flow, 0, len(p.Rules))
	for _, r := range p.Rules {
		for _, f := range r.Flows {
			if f.Publish {
				want = append(want, f.Flow)
			}
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
	for i := range want {
		if path := want[i].Path; t.carried[want[i].Name] != path {
			t.carried[want[i].Name], changed = path, true
		}
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
			delete(t.carried, name)
		}
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
