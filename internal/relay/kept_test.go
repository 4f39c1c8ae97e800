package relay

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"xdpcast/internal/history"
	"xdpcast/internal/plan"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/rules"
)

// checkKept compares what the control loop keeps, so that a change costs only what it changes, with what is made
// anew from the rules and the network.
func (r *running) checkKept() error {
	return r.do(r.t.Context(), func() error {
		return errors.Join(r.checkSummary(), r.checkTexts(), r.checkPlan(), r.checkJoined())
	})
}

func (r *Relay) checkSummary() (err error) {
	anew := rules.NewSummary()
	for _, rule := range r.rules {
		if rule.Origin != plan.OriginMroute {
			anew.Add(&rule.Rule)
		}
	}
	kept := r.summarize()
	for _, rule := range r.rules {
		other := rule.Rule
		other.Name, other.In.Port = "other", other.In.Port+1
		back := other
		back.In.Interface, back.Out = rule.Out[0].Interface, slices.Clone(rule.Out[:1])
		back.Out[0].Interface = rule.In.Interface
		for _, probe := range []*rules.Rule{&rule.Rule, &other, &back} {
			if kept.Admits(probe) != anew.Admits(probe) || kept.Releases(probe) != anew.Releases(probe) {
				err = errors.Join(err, fmt.Errorf("the summary admits %s: %v, releases it: %v; one made anew: %v, %v",
					probe, kept.Admits(probe), kept.Releases(probe), anew.Admits(probe), anew.Releases(probe)))
			}
		}
	}
	return err
}

func textOfParts(parts []*history.Part) []byte {
	var all [][]byte
	for _, p := range parts {
		all = append(all, p.Text)
	}
	return bytes.Join(all, nil)
}

func (r *Relay) checkTexts() (err error) {
	anew := setText{origin: plan.OriginAPI}
	if kept, anew := textOfParts(r.changes.api.of(r.rules)), textOfParts(anew.of(r.rules)); !bytes.Equal(kept, anew) {
		err = fmt.Errorf("the text of the rules of the API is\n%s\nand made anew\n%s", kept, anew)
	}
	file := setText{origin: plan.OriginFile}
	if kept, anew := r.changes.set.File, history.SumParts(withRoutes(file.of(r.rules), r.mroute)); kept != "" && kept != anew {
		err = errors.Join(err, fmt.Errorf("the digest of the rules of the file is %s, and made anew %s", kept, anew))
	}
	return err
}

func (r *Relay) checkPlan() (err error) {
	if r.stale {
		return nil // the next reconcile makes another
	}
	kept := r.plan
	anew := plan.Make(plan.World{Rules: r.rules, Interfaces: r.mroutes.vifs(), Network: r.network, Answers: r.answers()}, r.planOptions())
	if !slices.Equal(kept.Attach, anew.Attach) || !slices.Equal(kept.Tags, anew.Tags) || !slices.Equal(kept.Hops, anew.Hops) {
		err = fmt.Errorf("the plan attaches %v, tags %v, asks for %v; one made anew %v, %v, %v", kept.Attach, kept.Tags, kept.Hops, anew.Attach, anew.Tags, anew.Hops)
	}
	if len(kept.Rules) != len(anew.Rules) {
		return errors.Join(err, fmt.Errorf("the plan has %d rules, one made anew %d", len(kept.Rules), len(anew.Rules)))
	}
	published := map[string]flow.Path{}
	for i, a := range kept.Rules {
		b := anew.Rules[i]
		if a.Rule != b.Rule || a.State != b.State || a.Reason != b.Reason || !slices.EqualFunc(a.Flows, b.Flows, sameFlowPlan) {
			err = errors.Join(err, fmt.Errorf("the plan of rule %s is %s (%s), made anew %s (%s)", a.Rule.Name, a.State, a.Reason, b.State, b.Reason))
		}
		for f := range publishedOf(a) {
			published[f.Name] = f.Path
		}
	}
	for name, path := range r.loader.InForce() {
		if published[name] != path || r.tables.carried[name] != path {
			err = errors.Join(err, fmt.Errorf("flow %s is on path %v, planned for %v, and taken for %v", name, path, published[name], r.tables.carried[name]))
		}
		delete(published, name)
	}
	if len(published) > 0 {
		err = errors.Join(err, fmt.Errorf("flows %v are not in force", published))
	}
	return err
}

func sameFlowPlan(a, b *plan.FlowPlan) bool {
	return a.State == b.State && a.Reason == b.Reason && a.Publish == b.Publish && a.Flow.Equal(*b.Flow) && len(a.Outputs) == len(b.Outputs)
}

func (r *Relay) checkJoined() (err error) {
	if r.stale {
		return nil
	}
	wanted := map[plan.Membership]bool{}
	for m := range r.plan.Memberships() {
		wanted[m] = true
		if _, failed := r.memberships.failed[m]; !failed && !r.memberships.manager.Holds(joinable(m, "")) {
			err = errors.Join(err, fmt.Errorf("%+v is not joined", m))
		}
	}
	for _, s := range r.memberships.manager.List() {
		if !wanted[wantedOf(s.Membership)] {
			err = errors.Join(err, fmt.Errorf("%+v is joined, and no rule needs it", s.Membership))
		}
	}
	return err
}
