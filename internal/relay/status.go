package relay

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"xdpcast/bpf"
	"xdpcast/internal/control"
	"xdpcast/internal/network"
	"xdpcast/internal/plan"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/rules"
)

func (r *Relay) ruleStatus(name string) (control.RuleStatus, error) {
	if r.plan.Rule(name) == nil {
		return control.RuleStatus{}, control.Errorf(control.KindNotFound, "no rule is named %s", name)
	}
	all, err := r.ruleStatuses([]string{name})
	if err != nil {
		return control.RuleStatus{}, err
	}
	return all[0], nil
}

// ruleStatuses describes the named rules; all for nil.
func (r *Relay) ruleStatuses(names []string) ([]control.RuleStatus, error) {
	all := r.plan.Rules
	if names != nil {
		all = make([]*plan.RulePlan, len(names))
		for i, name := range names {
			all[i] = r.plan.Rule(name)
		}
	}
	var flows []string
	for _, p := range all {
		for _, f := range p.Flows {
			flows = append(flows, f.Flow.Name)
		}
	}
	stats, err := r.statsOf(flows, false)
	if err != nil {
		return nil, err
	}
	return r.describeRules(all, stats, r.workerStatus().lost), nil
}

func (r *Relay) describeRules(rules []*plan.RulePlan, stats loader.Stats, lost []control.ReceiveDrop) []control.RuleStatus {
	byName := make(map[string]*loader.RuleStats, len(stats.Rules))
	for i := range stats.Rules {
		byName[stats.Rules[i].Name] = &stats.Rules[i]
	}
	all := make([]control.RuleStatus, 0, len(rules))
	loops := r.loops()
	for _, p := range rules {
		status := r.describeRule(p, byName)
		r.markLooping(&status, p, loops)
		r.markEcho(&status, p)
		status.ReceiveDrops = receiveDrops(p, lost)
		all = append(all, status)
	}
	return all
}

// describeRule describes a rule, with the counters of its flows added up.
func (r *Relay) describeRule(p *plan.RulePlan, stats map[string]*loader.RuleStats) control.RuleStatus {
	status := control.RuleStatus{
		Rule: control.FromRule(p.Rule.Rule), Origin: string(p.Rule.Origin), State: p.State.String(), Reason: cmp.Or(p.Reason, p.Note()),
		Drops: []control.Drop{},
	}
	sum, notes := map[loader.Reason]loader.Counter{}, map[loader.Note]loader.Counter{}
	var last time.Duration = -1
	for _, f := range p.Flows {
		s := stats[f.Flow.Name]
		if s == nil { // not in the kernel
			continue
		}
		if status.ID == 0 {
			status.ID, status.UsedPath = s.ID, PathName(f.Flow.Path)
		}
		add(&status.Matched, s.Matched)
		addDrops(sum, s.Drops)
		addDrops(notes, s.Notes)
		if s.LastSeen >= 0 && (last < 0 || s.LastSeen < last) {
			last = s.LastSeen
		}
	}
	if last >= 0 {
		at := time.Now().Add(-last)
		status.LastSeen = &at
	}
	status.Drops, status.Notes = Drops(sum), Notes(notes)
	status.Inputs = inputStatuses(p)
	r.describeLegs(&status, p, stats)
	status.Outputs = r.outputStatuses(p, stats)
	return status
}

// inputStatuses describes the interfaces of a pattern.
func inputStatuses(p *plan.RulePlan) []control.InputStatus {
	all := []control.InputStatus{}
	if !isPattern(p.Rule.In.Interface) {
		return all
	}
	for _, f := range p.Flows {
		all = append(all, control.InputStatus{Interface: f.In.Name, State: f.State.String(), Reason: f.Reason})
	}
	return all
}

func isPattern(ifname string) bool {
	_, ok := rules.IsPattern(ifname)
	return ok
}

// outputKey is one output of a rule on one interface.
type outputKey struct {
	out    int
	ifname string
}

// outputSum is the total over the flows of an output.
type outputSum struct {
	plan   *plan.OutputPlan // of the flow in the best state; nil for none
	reason string
	sent   control.Counter
	drops  map[loader.Reason]loader.Counter
}

func (r *Relay) outputStatuses(p *plan.RulePlan, stats map[string]*loader.RuleStats) []control.OutputStatus {
	sums := map[outputKey]*outputSum{}
	var keys []outputKey
	get := func(key outputKey) *outputSum {
		if sums[key] == nil {
			sums[key] = &outputSum{drops: map[loader.Reason]loader.Counter{}}
			keys = append(keys, key)
		}
		return sums[key]
	}
	served := map[int]bool{}
	for _, f := range p.Flows {
		s := stats[f.Flow.Name]
		for i := range f.Outputs {
			o := &f.Outputs[i]
			served[int(o.Out)] = true
			sum := get(outputKey{int(o.Out), o.Interface})
			if sum.plan == nil || plan.Rank(o.State) > plan.Rank(sum.plan.State) {
				sum.plan, sum.reason = o, o.Reason
			}
			if s != nil && i < len(s.Outputs) {
				add(&sum.sent, s.Outputs[i].Sent)
				addDrops(sum.drops, s.Outputs[i].Drops)
			}
		}
	}
	for out, o := range p.Rule.Out {
		if !served[out] {
			sum := get(outputKey{out, o.Interface})
			if isPattern(o.Interface) {
				sum.reason = fmt.Sprintf("no interface matches %s", o.Interface)
			}
		}
	}
	slices.SortFunc(keys, func(a, b outputKey) int {
		return cmp.Or(cmp.Compare(a.out, b.out), cmp.Compare(a.ifname, b.ifname))
	})
	all := make([]control.OutputStatus, len(keys))
	for i, key := range keys {
		o, sum := p.Rule.Out[key.out], sums[key]
		o.Interface = key.ifname
		all[i] = control.OutputStatus{
			Slot: i, Output: o.String(), State: control.StatePending, Reason: sum.reason,
			Sent: sum.sent, Drops: Drops(sum.drops),
		}
		if !isPattern(key.ifname) {
			all[i].Interface = key.ifname
		}
		if sum.plan != nil {
			all[i].State = sum.plan.State.String()
			all[i].NextHop, all[i].MAC = r.plan.NextHop(sum.plan)
		}
	}
	return all
}

func add(to *control.Counter, c loader.Counter) {
	to.Packets += c.Packets
	to.Bytes += c.Bytes
}

func addDrops[R comparable](to, from map[R]loader.Counter) {
	for reason, c := range from {
		to[reason] = loader.Counter{Packets: to[reason].Packets + c.Packets, Bytes: to[reason].Bytes + c.Bytes}
	}
}

// PathName is the name of a path in the API.
func PathName(p flow.Path) string { return plan.PathName(p) }

// Fragments converts counters of fragments to the API.
func Fragments(f loader.Fragments) control.Fragments {
	return control.Fragments{First: control.Counter(f.First), Later: control.Counter(f.Later), Orphan: control.Counter(f.Orphan)}
}

// Drops converts counters by reason to the API.
func Drops(counted map[loader.Reason]loader.Counter) []control.Drop {
	all := make([]control.Drop, 0, len(counted))
	for _, reason := range slices.Sorted(maps.Keys(counted)) {
		all = append(all, control.Drop{Reason: reason.String(), Counter: control.Counter(counted[reason])})
	}
	return all
}

// Notes converts counters of notes to the API; nil if there are none.
func Notes(counted map[loader.Note]loader.Counter) (all []control.Drop) {
	for _, note := range slices.Sorted(maps.Keys(counted)) {
		all = append(all, control.Drop{Reason: note.String(), Counter: control.Counter(counted[note])})
	}
	return all
}

// Groups implements control.Backend.
func (r *Relay) Groups(ctx context.Context) (all []control.Group, err error) {
	err = r.do(ctx, func() error {
		stats, err := r.statsOf(nil, true)
		if err != nil {
			return err
		}
		seen := map[string]time.Duration{}
		for _, s := range stats.Rules {
			seen[s.Name] = s.LastSeen
		}
		now := time.Now()
		on := r.supervise(stats.Queriers, now)
		users := r.users()
		all = make([]control.Group, 0, len(users))
		for m, flows := range users {
			all = append(all, r.group(m, flows, seen, on))
		}
		slices.SortFunc(all, func(a, b control.Group) int {
			return cmp.Or(cmp.Compare(a.Interface, b.Interface), cmp.Compare(a.Group, b.Group), cmp.Compare(a.Source, b.Source))
		})
		return nil
	})
	return all, err
}

// GroupStates counts memberships by interface and state.
func (r *Relay) GroupStates(ctx context.Context) (states map[string]map[string]int, err error) {
	err = r.do(ctx, func() error {
		states = map[string]map[string]int{}
		seen := make(map[plan.Membership]bool, len(r.plan.Rules))
		for _, p := range r.plan.Rules {
			for _, f := range p.Flows {
				for m := range f.Memberships() {
					if seen[m] {
						continue
					}
					seen[m] = true
					g := control.Group{Interface: r.nameOf(m.Link.Index), State: control.GroupWanted}
					r.memberships.describe(m, &g)
					if states[g.Interface] == nil {
						states[g.Interface] = map[string]int{}
					}
					states[g.Interface][g.State]++
				}
			}
		}
		return nil
	})
	return states, err
}

// users finds the flows that need each membership.
func (r *Relay) users() map[plan.Membership][]flowOf {
	users := make(map[plan.Membership][]flowOf, len(r.plan.Rules))
	for _, p := range r.plan.Rules {
		for _, f := range p.Flows {
			for m := range f.Memberships() {
				users[m] = append(users[m], flowOf{p, f})
			}
		}
	}
	return users
}

// flowOf is a flow with its rule.
type flowOf struct {
	rule *plan.RulePlan
	flow *plan.FlowPlan
}

// group describes a membership.
func (r *Relay) group(m plan.Membership, users []flowOf, seen map[string]time.Duration, on *supervision) control.Group {
	g := control.Group{Interface: r.nameOf(m.Link.Index), Index: m.Link.Index, Group: m.Group.String(), State: control.GroupWanted, Rules: []string{}}
	if m.Source.IsValid() {
		g.Source = m.Source.String()
	}
	r.memberships.describe(m, &g)
	for _, u := range users {
		g.Rules = append(g.Rules, u.rule.Rule.Name)
		if u.flow.In.LinkID != m.Link {
			g.For = append(g.For, u.flow.In.Name)
		}
		if age, ok := seen[u.flow.Flow.Name]; ok && age >= 0 {
			at := time.Now().Add(-age)
			if g.LastPacket == nil || at.After(*g.LastPacket) {
				g.LastPacket = &at
			}
		}
	}
	slices.Sort(g.For)
	g.For = slices.Compact(g.For)
	if link := r.network.ByIndex(m.Link.Index); link != nil {
		g.Master = r.masterOf(link)
	}
	if on != nil {
		g.Multicast = on.multicast(g.Interface, g.Index, m.Group.Is4())
		g.Detail = detail(g, on.now)
	}
	return g
}

// describe describes the state of a membership.
func (s *memberships) describe(m plan.Membership, g *control.Group) {
	try := s.tries[m]
	if held, ok := s.manager.Held(joinable(m, "")); ok {
		g.State, g.Since, g.Tries = control.GroupJoined, &held.Since, 1
		if try != nil {
			g.Tries = try.count
		}
		return
	}
	if try == nil {
		return
	}
	since := try.since // a copy, since others read it
	g.Since, g.Tries = &since, try.count
	if try.failed != nil {
		g.State, g.Cause = try.state(), try.failed.err.Error()
		next := try.failed.next
		g.Next = &next
	}
}

// masterOf names the interface that an interface is a port of; empty if none.
func (r *Relay) masterOf(link *network.Link) string {
	if link.Master == 0 {
		return ""
	}
	return r.nameOf(link.Master)
}

// Stats implements control.Backend.
func (r *Relay) Stats(ctx context.Context) (all control.Stats, err error) {
	err = r.do(ctx, func() error {
		stats, err := r.statsOf(nil, true)
		if err != nil {
			return err
		}
		lost := r.workerStatus().lost
		all = control.Stats{
			Time: time.Now(), Rules: r.describeRules(r.plan.Rules, stats, lost), ReceiveDrops: lost,
			Passed: control.Counter(stats.Passed), Drops: Drops(stats.Drops), TransmitDrops: r.transmitDrops(stats.Devices, r.tables.paths.unsent()),
			PassedBroadcast: control.Counter(stats.PassedBroadcast), Fragments: Fragments(stats.Fragments),
		}
		return nil
	})
	return all, err
}

// Matched says how many packets each rule has matched, and costs a small part of Stats.
func (r *Relay) Matched(ctx context.Context) (matched map[string]uint64, err error) {
	err = r.do(ctx, func() error {
		flows, err := r.loader.Matched()
		if err != nil {
			return err
		}
		matched = make(map[string]uint64, len(r.plan.Rules))
		for _, p := range r.plan.Rules {
			var n uint64
			for _, f := range p.Flows {
				n += flows[f.Flow.Name]
			}
			matched[p.Rule.Name] = n
		}
		return nil
	})
	return matched, err
}

func (r *Relay) transmitDrops(devices []loader.DeviceStats, unsent map[int]uint64) []control.TransmitDrop {
	all := []control.TransmitDrop{}
	for index, packets := range unsent {
		all = append(all, control.TransmitDrop{Interface: r.nameOf(index), Reason: "afxdp", Packets: packets})
	}
	for _, p := range devices {
		name := r.nameOf(p.Index)
		if p.TransmitDrops > 0 {
			all = append(all, control.TransmitDrop{Interface: name, Reason: "driver", Packets: p.TransmitDrops})
		}
		if p.RedirectRefused > 0 {
			all = append(all, control.TransmitDrop{Interface: name, Reason: "refused", Packets: p.RedirectRefused})
		}
	}
	slices.SortFunc(all, func(a, b control.TransmitDrop) int {
		return cmp.Or(cmp.Compare(a.Interface, b.Interface), cmp.Compare(a.Reason, b.Reason))
	})
	return all
}

func (r *Relay) nameOf(index int) string {
	if link := r.network.ByIndex(index); link != nil {
		return link.Name
	}
	return fmt.Sprintf("if%d", index)
}

// Status implements control.Backend.
func (r *Relay) Status(ctx context.Context) (status control.Status, err error) {
	err = r.do(ctx, func() error {
		stats, err := r.statsOf(nil, false)
		if err != nil {
			return err
		}
		status = control.Status{
			Version: r.opts.Version, PID: os.Getpid(), Started: r.started, Ready: r.ready,
			PinDir: r.opts.Loader.PinDir, Schema: bpf.Schema, Config: r.opts.ConfigFile, Revision: r.revision(), Unconfirmed: unconfirmed(r.changes.pending),
			Rules: len(r.rules), Mroutes: r.mrouteStatus(), Interfaces: r.interfaceStatuses(stats), Workers: r.workerStatus().workers,
			Passed: control.Counter(stats.Passed), Drops: Drops(stats.Drops), Warnings: slices.Clone(r.loader.Warnings()),
		}
		for _, p := range r.plan.Rules {
			switch p.State {
			case plan.Active:
				status.Active++
			case plan.Pending:
				status.Pending++
			default:
				status.Failed++
			}
		}
		status.Warnings = append(status.Warnings, r.attachWarnings()...)
		status.Warnings = append(status.Warnings, r.streamWarnings()...)
		for _, about := range slices.Sorted(maps.Keys(r.warnings)) {
			status.Warnings = append(status.Warnings, about+": "+r.warnings[about])
		}
		return nil
	})
	return status, err
}

// attachWarnings lists where the operator requested the program but it is not attached, whether
// rules need it or not.
func (r *Relay) attachWarnings() (warnings []string) {
	for _, name := range r.opts.Interfaces {
		if link := r.network.Link(name); link != nil {
			if err := r.attachments.answers[link.LinkID].Err; err != nil {
				warnings = append(warnings, fmt.Sprintf("interface %s: %v", name, err))
			}
		}
	}
	return warnings
}

// interfaceStatuses describes the interfaces named by rules or attachments.
func (r *Relay) interfaceStatuses(stats loader.Stats) []control.InterfaceStatus {
	byName := map[string]*control.InterfaceStatus{}
	get := func(name string) *control.InterfaceStatus {
		link := r.network.Link(name)
		if link != nil {
			name = link.Name // known by an alternative name
		}
		s := byName[name]
		if s == nil {
			s = r.interfaceStatus(name, link)
			byName[name] = s
		}
		return s
	}
	for _, name := range r.opts.Interfaces {
		get(name)
	}
	inputs, outputs := r.roles()
	for name := range inputs {
		addRole(get(name), control.RoleInput)
	}
	for name := range outputs {
		addRole(get(name), control.RoleOutput)
	}
	for _, a := range r.loader.Attachments() {
		if r.network.ByIndex(a.Index) == nil {
			continue // removed just now
		}
		s := get(r.nameOf(a.Index))
		s.Mode, s.ProgramID, s.LinkID = a.Mode.String(), a.ProgramID, a.LinkID
		if a.Fallback != nil {
			s.Note = a.Fallback.Error()
		}
	}
	for _, p := range stats.Devices {
		if r.network.ByIndex(p.Index) != nil {
			get(r.nameOf(p.Index)).TransmitDrops = p.TransmitDrops + p.RedirectRefused
		}
	}
	for m := range r.plan.Memberships() {
		get(r.nameOf(m.Link.Index))
	}
	for _, c := range r.memberships.manager.Counters() {
		s := byName[c.Interface]
		if s == nil && r.network.Link(c.Interface) != nil {
			s = get(c.Interface)
		}
		if s == nil {
			continue // of a removed interface that no rule names
		}
		s.JoinsAttempted, s.JoinsSucceeded, s.JoinsFailed = c.Joins.Attempted, c.Joins.Succeeded, c.Joins.Failed
		s.LeavesAttempted, s.LeavesSucceeded, s.LeavesFailed = c.Leaves.Attempted, c.Leaves.Succeeded, c.Leaves.Failed
	}
	r.describeMulticast(byName, stats.Queriers)
	all := make([]control.InterfaceStatus, 0, len(byName))
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		all = append(all, *byName[name])
	}
	return all
}

// interfaceStatus describes an interface; link is nil while it is absent.
func (r *Relay) interfaceStatus(name string, link *network.Link) *control.InterfaceStatus {
	s := &control.InterfaceStatus{Name: name, Roles: []string{}, Link: control.LinkAbsent}
	if link == nil {
		return s
	}
	s.Index, s.Master = link.Index, r.masterOf(link)
	switch {
	case !link.Up:
		s.Link = control.LinkDown
	case !link.Carrier:
		s.Link = control.LinkNoCarrier
	default:
		s.Link = control.LinkUp
	}
	if err := r.attachments.answers[link.LinkID].Err; err != nil {
		s.Note = err.Error()
	}
	s.Note = cmp.Or(s.Note, r.tags.note(name))
	return s
}

// roles returns the interfaces that rules name or match with a pattern.
func (r *Relay) roles() (inputs, outputs map[string]bool) {
	inputs, outputs = map[string]bool{}, map[string]bool{}
	for _, p := range r.plan.Rules {
		for leg := range p.Rule.InputCount() {
			if name := p.Rule.Leg(leg).In.Interface; !isPattern(name) {
				inputs[name] = true
			}
		}
		for i := range p.Rule.Out {
			if name := p.Rule.Out[i].Interface; !isPattern(name) {
				outputs[name] = true
			}
		}
		for _, f := range p.Flows {
			inputs[f.In.Name] = true
			for i := range f.Outputs {
				outputs[f.Outputs[i].Interface] = true
			}
		}
	}
	return inputs, outputs
}

func addRole(s *control.InterfaceStatus, role string) {
	if !slices.Contains(s.Roles, role) {
		s.Roles = append(s.Roles, role)
		slices.Sort(s.Roles)
	}
}
