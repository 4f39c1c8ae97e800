package relay

import (
	"cmp"
	"fmt"
	"maps"
	"net"
	"slices"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/events"
	"xdpcast/internal/network"
	"xdpcast/internal/plan"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/rules"
)

// changeLog logs an event for every state that changed since the last round.
type changeLog struct {
	log      *events.Log
	plan     *plan.Plan // of the last round; nil before the first
	links    map[string]linkState
	queriers map[querierKey]querierState
}

// linkState is the state of an interface that rules need, as in events.
type linkState struct {
	id      network.LinkID
	link    string
	program string // how the relay program runs on it
	cause   string // why it does not
}

type querierState struct {
	address string
	silent  bool
}

// States of events that the API does not have.
const (
	stateStarted  = "started"
	stateEnding   = "ending"
	stateEnded    = "ended"
	stateRemoved  = "removed"
	stateNone     = "none"
	stateUnused   = "unused"
	stateAbsent   = control.LinkAbsent
	stateLeft     = "left"
	stateLost     = "lost"
	stateDone     = "done"
	stateHeard    = "heard"
	stateSilent   = "silent"
	stateResolved = "resolved"
)

func newChangeLog(log *events.Log) *changeLog {
	return &changeLog{log: log, links: map[string]linkState{}, queriers: map[querierKey]querierState{}}
}

// round compares a plan and its network with those of the last round.
func (c *changeLog) round(p *plan.Plan, now *network.Snapshot, attached map[network.LinkID]plan.Attached) {
	if c.log == nil {
		return
	}
	first := c.plan == nil
	var before []*plan.RulePlan
	if !first {
		before = c.plan.Rules
	}
	c.interfaces(p, now, attached) // they cause the changes below
	changedRules(before, p.Rules, func(old, new *plan.RulePlan) { c.rule(old, new, first) })
	c.plan = p
}

// changedRules calls fn for every rule whose plan changed; old or new is nil for a rule that was
// added or removed. Both slices are sorted by name.
func changedRules(before, after []*plan.RulePlan, fn func(old, new *plan.RulePlan)) {
	plan.Changed(before, after, func(r *plan.RulePlan) string { return r.Rule.Name }, fn)
}

// rule logs the changes of a rule. In a daemon's first round, healthy rules are summarized: nothing
// happened to them.
func (c *changeLog) rule(old, new *plan.RulePlan, first bool) {
	switch {
	case new == nil:
		c.log.Add(events.Event{Kind: events.KindRule, Rule: old.Rule.Name, State: stateRemoved, Before: old.State.String(), Cause: "from the " + string(old.Rule.Origin)})
		return
	case old == nil && first && new.Complete():
		c.log.Sum(events.Event{Kind: events.KindRule, Rule: new.Rule.Name, State: new.State.String()})
		return
	case old == nil:
		c.log.Add(events.Event{Kind: events.KindRule, Rule: new.Rule.Name, State: new.State.String(), Cause: cmp.Or(new.Reason, "added by the "+string(new.Rule.Origin))})
	case old.Rule != new.Rule && !rules.Equal(old.Rule.Rule, new.Rule.Rule):
		c.log.Add(events.Event{Kind: events.KindRule, Rule: new.Rule.Name, State: new.State.String(), Before: old.State.String(), Cause: cmp.Or(new.Reason, "changed by the "+string(new.Rule.Origin))})
	case old.State != new.State:
		c.log.Add(events.Event{Kind: events.KindRule, Rule: new.Rule.Name, State: new.State.String(), Before: old.State.String(), Cause: new.Reason})
	}
	c.flows(old, new)
}

// outputKeyOf identifies an output of a rule's flows, also across changes of the rule.
type outputKeyOf struct{ flow, output string }

// flows logs changed paths and outputs.
func (c *changeLog) flows(old, new *plan.RulePlan) {
	carried, outputs := map[string]*plan.FlowPlan{}, map[outputKeyOf]plan.State{}
	if old != nil {
		for _, f := range old.Flows {
			carried[f.Flow.Name] = f
			for i := range f.Outputs {
				outputs[outputKeyOf{f.Flow.Name, outputText(old, &f.Outputs[i])}] = f.Outputs[i].State
			}
		}
	}
	for _, f := range new.Flows {
		if old != nil {
			c.path(new, carried[f.Flow.Name], f)
			delete(carried, f.Flow.Name)
		}
		for i := range f.Outputs {
			o := &f.Outputs[i]
			text := outputText(new, o)
			was, known := outputs[outputKeyOf{f.Flow.Name, text}]
			if was == o.State || !known && o.State == plan.Active {
				continue // a new healthy one is covered by its rule
			}
			c.log.Add(events.Event{Kind: events.KindOutput, Rule: new.Rule.Name, Interface: patternInput(new, f), Output: text,
				State: o.State.String(), Before: stateOf(was, known), Cause: o.Reason})
		}
	}
	for _, f := range carried { // their interfaces are gone
		c.path(new, f, nil)
	}
}

// stateOf is the name of a known state, otherwise "".
func stateOf(s plan.State, known bool) string {
	if !known {
		return ""
	}
	return s.String()
}

// path logs that a flow changed its path; old or new is nil for one that was added or removed.
func (c *changeLog) path(p *plan.RulePlan, old, new *plan.FlowPlan) {
	was, now := pathOf(old), pathOf(new)
	if was == now {
		return
	}
	e := events.Event{Kind: events.KindPath, Rule: p.Rule.Name, Interface: patternInput(p, cmp.Or(new, old)), State: cmp.Or(now, stateNone), Before: was, Cause: p.Reason}
	if new != nil {
		e.Cause = cmp.Or(new.PathReason(), new.Reason)
	}
	c.log.Add(e)
}

// patternInput is the interface of a flow if its rule may have several.
func patternInput(p *plan.RulePlan, f *plan.FlowPlan) string {
	if isPattern(p.Rule.In.Interface) {
		return f.In.Name
	}
	return ""
}

// pathOf is the path of a published flow, otherwise "".
func pathOf(f *plan.FlowPlan) string {
	if f == nil || !f.Publish {
		return ""
	}
	return plan.PathName(f.Flow.Path)
}

// outputText formats an output as in the API.
func outputText(p *plan.RulePlan, o *plan.OutputPlan) string {
	out := p.Rule.Out[o.Out]
	out.Interface = o.Interface
	return out.String()
}

// interfaces logs changes of interfaces that rules need.
func (c *changeLog) interfaces(p *plan.Plan, now *network.Snapshot, attached map[network.LinkID]plan.Attached) {
	seen := make(map[string]linkState, len(p.Attach))
	for _, id := range p.Attach {
		link := now.ByIndex(id.Index)
		if link == nil || link.LinkID != id {
			continue
		}
		s := linkState{id: id, link: linkText(link)}
		if a, ok := attached[id]; ok {
			s.program, s.cause = "native", errorText(a.Err)
			switch {
			case a.Err != nil:
				s.program = plan.Failed.String()
			case a.Generic:
				s.program = "generic"
			}
		}
		seen[link.Name] = s
		if was := c.links[link.Name]; was != s {
			c.link(link.Name, was, s)
		}
	}
	for name, was := range c.links {
		if _, ok := seen[name]; ok {
			continue
		}
		s := linkState{link: stateUnused, cause: "no rule needs it any more"}
		if now.Link(name) == nil {
			s.link, s.cause = stateAbsent, ""
		}
		c.link(name, was, s)
	}
	c.links = seen
}

func (c *changeLog) link(name string, was, now linkState) {
	if was.link != now.link || was.id != now.id && was.link != "" {
		e := events.Event{Kind: events.KindInterface, Interface: name, State: now.link, Before: was.link}
		if now.link == stateUnused {
			e.Cause = now.cause
		} else if was.link != "" && was.id != now.id && now.id.Index != 0 {
			e.Cause = fmt.Sprintf("it reappeared with index %d", now.id.Index)
		}
		c.log.Add(e)
	}
	if was.program != now.program && now.link != stateAbsent {
		c.log.Add(events.Event{Kind: events.KindProgram, Interface: name, State: cmp.Or(now.program, stateNone), Before: was.program, Cause: now.cause})
	}
}

func linkText(link *network.Link) string {
	switch {
	case !link.Up:
		return control.LinkDown
	case !link.Carrier:
		return control.LinkNoCarrier
	}
	return control.LinkUp
}

// programLost logs that the kernel no longer has the program on an interface.
func (c *changeLog) programLost(ifname string) {
	was := c.links[ifname]
	c.log.Add(events.Event{Kind: events.KindProgram, Interface: ifname, State: stateLost, Before: was.program, Cause: "another program detached it"})
	if c.log != nil {
		was.program = stateLost
		c.links[ifname] = was
	}
}

// neighbours logs changed next hops of unicast outputs.
func (c *changeLog) neighbours(before, now *network.Snapshot, changed map[network.HopKey]bool) {
	if c.log == nil {
		return
	}
	keys := slices.SortedFunc(maps.Keys(changed), func(a, b network.HopKey) int {
		return cmp.Or(cmp.Compare(a.Link.Index, b.Link.Index), a.Dst.Compare(b.Dst))
	})
	for _, key := range keys {
		old, hop := before.Hop(key), now.Hop(key)
		was, is := hopState(old), hopState(hop)
		if is == was && old.MAC == hop.MAC && old.Via == hop.Via || is == plan.Pending.String() && hop.Err == nil {
			continue // unchanged, just requested, or no longer needed
		}
		e := events.Event{Kind: events.KindNeighbour, Interface: nameIn(now, key.Link.Index), Address: key.Dst.String(), State: is, Cause: errorText(hop.Err)}
		if was != plan.Pending.String() {
			e.Before = was
		}
		if is == stateResolved {
			e.Cause = "at " + net.HardwareAddr(hop.MAC[:]).String()
			if hop.Gateway {
				e.Cause = "gateway " + hop.Via.String() + " " + e.Cause
			}
		}
		c.log.Add(e)
	}
}

// hopState is the state of a next hop, as in events.
func hopState(hop network.Hop) string {
	switch {
	case hop.Kind == network.HopNone:
		return "no_route"
	case hop.Kind == network.HopBroadcast:
		return "broadcast"
	case hop.Kind == network.HopLocal:
		return "local"
	case hop.Kind == network.HopUnicast && hop.Resolved:
		return stateResolved
	case hop.Kind == network.HopUnicast && hop.Failed:
		return plan.NoNeighbour.String()
	}
	return plan.Pending.String()
}

func nameIn(s *network.Snapshot, index int) string {
	if link := s.ByIndex(index); link != nil {
		return link.Name
	}
	return fmt.Sprintf("if%d", index)
}

// heard logs queriers that appeared, changed or fell silent.
func (c *changeLog) heard(all []loader.Querier, now *network.Snapshot) {
	if c.log == nil {
		return
	}
	seen := make(map[querierKey]querierState, len(all))
	for _, q := range all {
		key := querierKey{q.Index, q.Family == 4}
		s := querierState{address: q.Address.String(), silent: q.LastSeen >= querierPresent}
		was, known := c.queriers[key]
		seen[key] = s
		if s == was || !known && s.silent {
			continue
		}
		e := events.Event{Kind: events.KindQuerier, Interface: nameIn(now, q.Index), Address: s.address, State: stateHeard, Cause: querierProtocol(q)}
		switch {
		case s.silent:
			e.State, e.Before = stateSilent, stateHeard
			e.Cause += fmt.Sprintf(", not heard for %v", q.LastSeen.Truncate(time.Second))
		case known && was.silent:
			e.Before = stateSilent
		case known:
			e.Before, e.Cause = stateHeard, e.Cause+", was "+was.address
		}
		c.log.Add(e)
	}
	c.queriers = seen
}

func querierProtocol(q loader.Querier) string {
	name := "MLD"
	if q.Family == 4 {
		name = "IGMP"
	}
	return fmt.Sprintf("%sv%d", name, q.Version)
}
