package plan

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"xdpcast/internal/network"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/rules"
)

// Planner makes successive plans. A rule whose plan depends on nothing that changed keeps its plan,
// by pointer; the result equals that of Make. It is not for concurrent use; the returned plans are.
type Planner struct {
	opts Options
	last *Plan
}

// New returns a Planner without history.
func New(opts Options) *Planner { return &Planner{opts: opts} }

// Make plans a World from scratch.
func Make(w World, opts Options) *Plan { return New(opts).Plan(w) }

// seen is what a plan was made from, as far as the next one compares with it. The maps of a World
// belong to the caller, who may modify them later.
type seen struct {
	rules      []*Rule
	interfaces []string
	network    *network.Snapshot
	attached   map[network.LinkID]Attached
	tags       map[network.LinkID]error
	failed     map[Membership]Join
	refused    map[string]error
	noTransmit map[network.LinkID]string
	neighbours map[network.NeighbourKey]error
	inputs     *inputIndex
	names      map[string]bool // interfaces that rules name or have flows on, and whether tags are matched there
}

// Plan plans a World.
func (p *Planner) Plan(w World) *Plan {
	last := p.last
	if last == nil {
		last = &Plan{}
	}
	now := see(w)
	byName := func(a, b *Rule) int { return strings.Compare(a.Name, b.Name) }
	if !sameSlice(now.rules, last.seen.rules) && !slices.IsSortedFunc(now.rules, byName) {
		now.rules = slices.Clone(now.rules)
		slices.SortFunc(now.rules, byName)
	}
	c := compare(&last.seen, &now)
	if !c.rules {
		now.inputs = last.seen.inputs
	}
	m := &maker{
		opts: &p.opts, net: now.network, answers: &w.Answers, failed: now.failed, inputs: now.inputs,
		taken: takenInputs(now.rules, now.network, w.Answers.Carried),
	}
	if m.inputs == nil {
		m.inputs = newInputIndex(now.rules)
		now.inputs = m.inputs
	}
	plan := &Plan{Rules: make([]*RulePlan, len(now.rules)), seen: now}
	e := p.rules(plan, last, m, &c)
	p.sets(plan, last, &c, e)
	p.last = plan
	return plan
}

// sameSlice says whether two slices are the same memory.
func sameSlice(a, b []*Rule) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}

// see records a World.
func see(w World) seen {
	s := seen{
		rules: w.Rules, interfaces: slices.Clone(w.Interfaces), network: w.Network, attached: maps.Clone(w.Answers.Attached), tags: maps.Clone(w.Answers.Tags),
		refused: maps.Clone(w.Answers.Refused), noTransmit: maps.Clone(w.Answers.NoTransmit), neighbours: maps.Clone(w.Answers.Neighbours),
	}
	if s.network == nil {
		s.network = network.NewSnapshot(nil, nil)
	}
	for membership, join := range w.Answers.Joined {
		if join.Err != nil {
			if s.failed == nil {
				s.failed = map[Membership]Join{}
			}
			s.failed[membership] = join
		}
	}
	return s
}

// effect is what planning the rules changed besides their plans.
type effect struct {
	names, memberships, hops bool
}

// rules plans the rules that need it.
func (p *Planner) rules(plan, last *Plan, m *maker, c *changes) (e effect) {
	old := last.Rules
	for i, r := range plan.seen.rules {
		for len(old) > 0 && old[0].Rule.Name < r.Name {
			e.note(old[0], nil)
			old = old[1:]
		}
		var before *RulePlan
		if len(old) > 0 && old[0].Rule.Name == r.Name {
			before, old = old[0], old[1:]
		}
		if before != nil && before.Rule == r && !c.touch(before, m) {
			plan.Rules[i] = before
			continue
		}
		plan.Rules[i] = m.rule(r)
		plan.Rules[i].shareFlows(before)
		e.note(before, plan.Rules[i])
	}
	for _, r := range old {
		e.note(r, nil)
	}
	return e
}

// shareFlows reuses unchanged flows of the last plan, so that there is one copy of each, however
// many plans and tables hold it.
func (r *RulePlan) shareFlows(before *RulePlan) {
	if before == nil {
		return
	}
	old := before.Flows
	for _, f := range r.Flows {
		for len(old) > 0 && old[0].Flow.Name < f.Flow.Name {
			old = old[1:]
		}
		if len(old) > 0 && old[0].Flow.Equal(*f.Flow) {
			f.Flow = old[0].Flow
		}
	}
}

// note records the differences between two plans of a rule; each may be nil.
func (e *effect) note(before, now *RulePlan) {
	e.names = e.names || before == nil || now == nil || before.Rule != now.Rule || hasPattern(now.Rule)
	e.memberships = e.memberships || !sameMemberships(before, now)
	e.hops = e.hops || hasHops(before) || hasHops(now)
}

func sameMemberships(a, b *RulePlan) bool {
	var before, now []*FlowPlan
	if a != nil {
		before = a.Flows
	}
	if b != nil {
		now = b.Flows
	}
	return slices.EqualFunc(before, now, (*FlowPlan).sameMemberships)
}

// hasPattern says whether the interfaces of a rule depend on which links exist.
func hasPattern(r *Rule) bool {
	return isPattern(r.In.Interface) || slices.ContainsFunc(r.Out, func(o rules.Output) bool { return isPattern(o.Interface) })
}

func hasHops(r *RulePlan) bool {
	return r != nil && slices.ContainsFunc(r.Rule.Out, rules.Output.Unicast)
}

// changes are the differences between two Worlds that the plan of a rule can depend on.
type changes struct {
	rules      bool            // some rule was added, removed or changed
	links      map[string]bool // names of links that changed, or have a new answer
	own        bool            // the host's addresses
	hops       map[network.HopKey]bool
	joins      map[Membership]bool // that fail differently than before
	refused    map[string]bool
	neighbours map[network.NeighbourKey]bool
}

// compare finds the differences.
func compare(before, now *seen) changes {
	c := changes{
		rules:      !sameSlice(before.rules, now.rules) && !slices.Equal(before.rules, now.rules),
		joins:      differing(before.failed, now.failed, sameJoin),
		refused:    differing(before.refused, now.refused, sameError),
		neighbours: differing(before.neighbours, now.neighbours, sameError),
		links:      map[string]bool{},
	}
	if before.network != now.network {
		diff := network.Diff(before.network, now.network)
		c.own, c.hops = diff.Own, diff.Hops
		maps.Copy(c.links, diff.Links)
		for _, l := range now.network.Links() { // a port depends on its master
			if l.Master != 0 && diff.Indexes[l.Master] {
				c.link(l)
			}
		}
	}
	for id := range differing(before.attached, now.attached, func(a, b Attached) bool { return a.Generic == b.Generic && sameError(a.Err, b.Err) }) {
		c.link(now.network.ByIndex(id.Index))
	}
	for id := range differing(before.tags, now.tags, sameError) {
		c.link(now.network.ByIndex(id.Index))
	}
	for id := range differing(before.noTransmit, now.noTransmit, func(a, b string) bool { return a == b }) {
		c.link(now.network.ByIndex(id.Index))
	}
	return c
}

// link records a link by all its names; a nil link is gone, which the comparison of the snapshots
// has found.
func (c *changes) link(l *network.Link) {
	if l == nil {
		return
	}
	c.links[l.Name] = true
	for _, name := range l.AltNames {
		c.links[name] = true
	}
}

// differing are the keys whose values differ between two maps, or that only one has.
func differing[K comparable, V any](a, b map[K]V, same func(V, V) bool) map[K]bool {
	var keys map[K]bool
	note := func(key K) {
		if keys == nil {
			keys = map[K]bool{}
		}
		keys[key] = true
	}
	for key, x := range a {
		if y, ok := b[key]; !ok || !same(x, y) {
			note(key)
		}
	}
	for key := range b {
		if _, ok := a[key]; !ok {
			note(key)
		}
	}
	return keys
}

func sameError(a, b error) bool {
	return (a == nil) == (b == nil) && (a == nil || a.Error() == b.Error())
}

func sameJoin(a, b Join) bool {
	return a.Joined == b.Joined && a.Transient == b.Transient && a.Tries == b.Tries && a.Next.Equal(b.Next) && sameError(a.Err, b.Err)
}

// touch says whether the plan of a rule may change.
func (c *changes) touch(p *RulePlan, m *maker) bool {
	r := p.Rule
	switch {
	case m.takenFirst(r) != p.taken, r.Stream != nil && len(m.taken) > 0, c.touchesInput(r), c.touchesOutputs(r):
		return true
	}
	for _, f := range p.Flows {
		if c.touchesFlow(f, m.answers.Carried[f.Flow.Name]) {
			return true
		}
	}
	return false
}

func (c *changes) touchesInput(r *Rule) bool {
	// A pattern depends on the other rules; whether a unicast address is the host's depends on all
	// links.
	for leg := range r.InputCount() {
		in := r.Leg(leg).In
		if c.touchesName(in.Interface) || c.rules && isPattern(in.Interface) || c.own && !in.Multicast() {
			return true
		}
	}
	return false
}

func (c *changes) touchesOutputs(r *Rule) bool {
	if len(c.links) == 0 && !c.own {
		return false
	}
	for i := range r.Out {
		if o := &r.Out[i]; c.touchesName(o.Interface) || c.own && o.Unicast() {
			return true
		}
	}
	return false
}

func (c *changes) touchesName(name string) bool {
	if len(c.links) == 0 {
		return false
	}
	if !isPattern(name) {
		return c.links[name]
	}
	for changed := range c.links {
		if matches(name, changed) {
			return true
		}
	}
	return false
}

func (c *changes) touchesFlow(f *FlowPlan, carried flow.Path) bool {
	// Publishing a flow as planned changes nothing: see TestStable.
	if carried != f.carried && !(f.Publish && carried == f.Flow.Path) {
		return true
	}
	if c.refused[f.Flow.Name] {
		return true
	}
	if len(c.joins) > 0 {
		for m := range f.Memberships() {
			if c.joins[m] {
				return true
			}
		}
	}
	return c.touchesHops(f)
}

func (c *changes) touchesHops(f *FlowPlan) bool {
	if len(c.hops) == 0 && len(c.neighbours) == 0 {
		return false
	}
	for i := range f.Outputs {
		key := f.Outputs[i].Hop
		if key == nil {
			continue
		}
		if c.hops[*key] {
			return true
		}
		for n := range c.neighbours {
			if n.Index == key.Link.Index {
				return true
			}
		}
	}
	return false
}

// sets computes the rest of the plan besides flows, or reuses it if nothing in it can have changed.
func (p *Planner) sets(plan, last *Plan, c *changes, e effect) {
	first := p.last == nil
	plan.Attach, plan.Tags, plan.Joins, plan.Hops, plan.Neighbours = last.Attach, last.Tags, last.Joins, last.Hops, last.Neighbours
	plan.seen.names = last.seen.names
	names := e.names || !slices.Equal(last.seen.interfaces, plan.seen.interfaces)
	if first || names {
		plan.seen.names = p.names(plan.Rules, plan.seen.interfaces)
	}
	if first || names || len(c.links) > 0 {
		plan.Attach, plan.Tags = attachments(plan.seen.names, plan.seen.network)
	}
	if first || e.memberships {
		plan.Joins++
	}
	if first || e.hops {
		plan.Hops, plan.Neighbours = hops(plan.Rules, plan.seen.network)
	}
}

// names are the interfaces that rules name or have flows on, and whether tags are matched there.
func (p *Planner) names(all []*RulePlan, more []string) map[string]bool {
	names := map[string]bool{}
	add := func(name string, tagged bool) {
		if was, ok := names[name]; !ok || tagged && !was {
			names[name] = tagged
		}
	}
	for _, name := range slices.Concat(p.opts.Interfaces, more) {
		add(name, false)
	}
	for _, r := range all {
		tagged := r.Rule.In.VLAN.ID != 0
		if !isPattern(r.Rule.In.Interface) {
			add(r.Rule.In.Interface, tagged)
		}
		for leg := 1; leg < r.Rule.InputCount(); leg++ {
			in := r.Rule.Leg(leg).In
			add(in.Interface, in.VLAN.ID != 0)
		}
		for i := range r.Rule.Out {
			if name := r.Rule.Out[i].Interface; !isPattern(name) {
				add(name, false)
			}
		}
		if !hasPattern(r.Rule) {
			continue
		}
		for _, f := range r.Flows {
			if !f.Flow.Leg.Several() {
				add(f.In.Name, tagged)
			}
			for i := range f.Outputs {
				add(f.Outputs[i].Interface, false)
			}
		}
	}
	return names
}

// attachments are the named links that can have a program, and those whose frames should keep their
// tags.
func attachments(names map[string]bool, net *network.Snapshot) (attach, tags []network.LinkID) {
	for name, tagged := range names {
		l := net.Link(name)
		if l == nil || l.Loopback {
			continue
		}
		if l.Ethernet {
			attach = append(attach, l.LinkID)
		}
		if tagged {
			tags = append(tags, l.LinkID)
		}
	}
	return sorted(attach), sorted(tags)
}

func sorted(links []network.LinkID) []network.LinkID {
	slices.SortFunc(links, func(a, b network.LinkID) int {
		return cmp.Or(cmp.Compare(a.Index, b.Index), cmp.Compare(a.Generation, b.Generation))
	})
	return slices.Compact(links)
}

// hops are the next hops that outputs need, and the neighbours on them, without duplicates, in the
// order of the rules.
func hops(all []*RulePlan, net *network.Snapshot) ([]network.HopKey, []network.NeighbourKey) {
	keys, neighbours := newDistinct[network.HopKey](0), newDistinct[network.NeighbourKey](0)
	for _, r := range all {
		if !hasHops(r) {
			continue
		}
		for _, f := range r.Flows {
			for i := range f.Outputs {
				key := f.Outputs[i].Hop
				if key == nil || !keys.add(*key) {
					continue
				}
				if hop := net.Hop(*key); hop.Kind == network.HopUnicast {
					neighbours.add(network.NeighbourKey{Index: key.Link.Index, Addr: hop.Via})
				}
			}
		}
	}
	return keys.list, neighbours.list
}
