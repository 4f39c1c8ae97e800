package plan

import (
	"cmp"
	"iter"
	"maps"
	"slices"
	"strings"

	"xdpcast/internal/network"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/rules"
)

// Planner makes successive plans. A rule whose plan depends on nothing that changed keeps its plan,
// by pointer; the result equals that of Make. A change of one rule costs the planning of that rule,
// and a comparison of pointers for each of the others. It is not for concurrent use; the returned
// plans are.
type Planner struct {
	opts  Options
	last  *Plan
	tally tally // of last
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
	taken      map[legRef]*Rule
	names      map[string]bool // interfaces that rules name or have flows on, and whether tags are matched there
}

// Plan plans a World.
func (p *Planner) Plan(w World) *Plan {
	last := p.last
	if last == nil {
		last = &Plan{}
	}
	now := see(w)
	if !sortedLike(last.seen.rules, now.rules) {
		now.rules = slices.Clone(now.rules)
		slices.SortFunc(now.rules, byName)
	}
	c := compare(&last.seen, &now)
	c.carried, c.allCarried = w.Answers.Recarried, w.Answers.Recarried == nil
	hadPatterns := len(p.tally.patterns) > 0
	for _, r := range c.gone {
		p.tally.removeRule(r)
	}
	for _, r := range c.come {
		p.tally.addRule(r)
	}
	switch {
	case p.last == nil, len(c.gone)+len(c.come) > 0 && (hadPatterns || len(p.tally.patterns) > 0):
		now.inputs = newInputIndex(now.rules)
	default:
		now.inputs = last.seen.inputs
	}
	if p.tally.severalNames(now.network) {
		now.taken = takenInputs(now.rules, now.network, w.Answers.Carried)
	}
	m := &maker{opts: &p.opts, net: now.network, answers: &w.Answers, failed: now.failed, inputs: now.inputs, taken: now.taken}
	plan := &Plan{seen: now}
	e := p.rules(plan, last, m, &c)
	p.sets(plan, last, &c, e)
	p.last = plan
	return plan
}

func byName(a, b *Rule) int { return strings.Compare(a.Name, b.Name) }

// sameSlice says whether two slices are the same memory.
func sameSlice[T any](a, b []*T) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}

// sortedLike says whether now is sorted by name, as before is. It looks only at the rules between
// those with which both begin and end.
func sortedLike(before, now []*Rule) bool {
	if sameSlice(before, now) {
		return true
	}
	begin, most := 0, min(len(before), len(now))
	for begin < most && before[begin] == now[begin] {
		begin++
	}
	end := 0
	for end < most-begin && before[len(before)-1-end] == now[len(now)-1-end] {
		end++
	}
	return slices.IsSortedFunc(now[max(0, begin-1):min(len(now), len(now)-end+1)], byName)
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
	memberships, hops bool
}

// rules plans the rules that need it. If none does, the plan shares the slice of the last one.
func (p *Planner) rules(plan, last *Plan, m *maker, c *changes) (e effect) {
	any := c.any(m, last) // what every rule may depend on has changed
	shared := !any && sameSlice(last.seen.rules, plan.seen.rules)
	if plan.Rules = last.Rules; !shared {
		p.eachRule(plan, last, m, c, any, &e)
	}
	if any {
		return e
	}
	for name := range c.named(&p.tally) {
		i, found := slices.BinarySearchFunc(plan.Rules, name, func(r *RulePlan, name string) int { return strings.Compare(r.Rule.Name, name) })
		if !found || !c.touch(plan.Rules[i], m) {
			continue
		}
		if shared {
			plan.Rules, shared = slices.Clone(plan.Rules), false
		}
		p.plan(plan, i, plan.Rules[i], m, &e)
	}
	return e
}

// eachRule compares the rules with those of the last plan, and plans those that are new or, if any may be, touched.
func (p *Planner) eachRule(plan, last *Plan, m *maker, c *changes, any bool, e *effect) {
	plan.Rules = make([]*RulePlan, len(plan.seen.rules))
	old, oldRules := last.Rules, last.seen.rules
	for i, r := range plan.seen.rules {
		for len(old) > 0 && oldRules[0] != r && oldRules[0].Name < r.Name {
			e.note(p, old[0], nil)
			old, oldRules = old[1:], oldRules[1:]
		}
		var before *RulePlan
		same := false
		if len(old) > 0 && (oldRules[0] == r || oldRules[0].Name == r.Name) {
			before, same = old[0], oldRules[0] == r
			old, oldRules = old[1:], oldRules[1:]
		}
		if same && !(any && c.touch(before, m)) {
			plan.Rules[i] = before
			continue
		}
		p.plan(plan, i, before, m, e)
	}
	for _, r := range old {
		e.note(p, r, nil)
	}
}

// plan plans one rule.
func (p *Planner) plan(plan *Plan, i int, before *RulePlan, m *maker, e *effect) {
	plan.Rules[i] = m.rule(plan.seen.rules[i])
	plan.Rules[i].shareFlows(before)
	plan.planned++
	e.note(p, before, plan.Rules[i])
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
func (e *effect) note(p *Planner, before, now *RulePlan) {
	p.tally.replace(before, now)
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
	gone, come []*Rule         // rules that were removed or replaced, and added or replaced
	links      map[string]bool // names of links that changed, or have a new answer
	own        bool            // the host's addresses
	hops       map[network.HopKey]bool
	joins      map[Membership]bool // that fail differently than before
	refused    map[string]bool
	neighbours map[network.NeighbourKey]bool
	carried    []string // flows whose path in force may have changed; of any, if allCarried
	allCarried bool
}

// compare finds the differences.
func compare(before, now *seen) changes {
	c := changes{
		joins:      differing(before.failed, now.failed, sameJoin),
		refused:    differing(before.refused, now.refused, sameError),
		neighbours: differing(before.neighbours, now.neighbours, sameError),
		links:      map[string]bool{},
	}
	c.compareRules(before.rules, now.rules)
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

// compareRules finds the rules that differ between two sets, ordered by name. It looks only at those
// that do.
func (c *changes) compareRules(before, now []*Rule) {
	Changed(before, now, (*Rule).name, func(old, new *Rule) {
		if old != nil {
			c.gone = append(c.gone, old)
		}
		if new != nil {
			c.come = append(c.come, new)
		}
	})
}

func (r *Rule) name() string { return r.Name }

// Changed calls fn for everything that differs, by pointer, between two slices ordered by name; old or new
// is nil for what was added or removed. It takes the names only of what differs.
func Changed[T any](before, now []*T, name func(*T) string, fn func(old, new *T)) {
	if sameSlice(before, now) {
		return
	}
	for len(before)+len(now) > 0 {
		order := 0
		switch {
		case len(before) == 0:
			order = 1
		case len(now) == 0:
			order = -1
		case before[0] == now[0]:
			before, now = before[1:], now[1:]
			continue
		default:
			order = strings.Compare(name(before[0]), name(now[0]))
		}
		var old, new *T
		if order <= 0 {
			old, before = before[0], before[1:]
		}
		if order >= 0 {
			new, now = now[0], now[1:]
		}
		fn(old, new)
	}
}

// any says whether the plan of every rule may change, so that all are compared.
func (c *changes) any(m *maker, last *Plan) bool {
	return len(c.links) > 0 || c.own || len(c.hops) > 0 || len(c.neighbours) > 0 || len(c.joins) > 0 || c.allCarried ||
		len(m.taken) > 0 || len(last.seen.taken) > 0
}

// named yields the names of the rules whose plan may change although any is false.
func (c *changes) named(t *tally) iter.Seq[string] {
	return func(yield func(string) bool) {
		if c.rules() {
			for name := range t.patterns {
				if !yield(name) {
					return
				}
			}
		}
		for _, name := range c.carried {
			if !yield(ruleOfFlow(name)) {
				return
			}
		}
		for name := range c.refused {
			if !yield(ruleOfFlow(name)) {
				return
			}
		}
	}
}

// rules says whether some rule was added, removed or replaced.
func (c *changes) rules() bool { return len(c.gone)+len(c.come) > 0 }

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
		if c.touchesName(in.Interface) || c.rules() && isPattern(in.Interface) || c.own && !in.Multicast() {
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
	names := p.tally.renamed || !slices.Equal(last.seen.interfaces, plan.seen.interfaces)
	if p.tally.renamed = false; first || names {
		plan.seen.names = p.names(plan.seen.interfaces)
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
func (p *Planner) names(more []string) map[string]bool {
	names := make(map[string]bool, len(p.tally.names))
	for name, n := range p.tally.names {
		names[name] = n.tagged > 0
	}
	for _, name := range slices.Concat(p.opts.Interfaces, more) {
		if _, ok := names[name]; !ok {
			names[name] = false
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
