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
	"xdpcast/pkg/control"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/membership"
)

func (r *Relay) ruleStatus(name string) (control.RuleStatus, error) {
	if r.rules[name] == nil {
		return control.RuleStatus{}, control.Errorf(control.KindNotFound, "no rule is called %s", name)
	}
	all, err := r.ruleStatuses([]string{name})
	if err != nil {
		return control.RuleStatus{}, err
	}
	return all[0], nil
}

func (r *Relay) ruleStatuses(names []string) ([]control.RuleStatus, error) {
	stats, err := r.loader.StatsOf(names)
	if err != nil {
		return nil, err
	}
	return r.describeRules(names, stats), nil
}

func (r *Relay) describeRules(names []string, stats loader.Stats) []control.RuleStatus {
	byName := make(map[string]*loader.RuleStats, len(stats.Rules))
	for i := range stats.Rules {
		byName[stats.Rules[i].Name] = &stats.Rules[i]
	}
	all := make([]control.RuleStatus, 0, len(names))
	for _, name := range names {
		all = append(all, r.rules[name].status(byName[name]))
	}
	return all
}

// status describes a rule; s is nil while it is not in the kernel.
func (w *wantedRule) status(s *loader.RuleStats) control.RuleStatus {
	status := control.RuleStatus{
		Rule: control.FromRule(w.rule), Origin: w.origin, State: w.state, Reason: w.reason,
		Drops: []control.Drop{},
	}
	if s != nil {
		status.ID = s.ID
		status.UsedPath = "kernel"
		status.Matched = control.Counter(s.Matched)
		status.Drops = drops(s.Drops)
		if s.LastSeen >= 0 {
			at := time.Now().Add(-s.LastSeen)
			status.LastSeen = &at
		}
	}
	for slot, o := range w.rule.Out {
		out := control.OutputStatus{Slot: slot, Output: o.String(), Drops: []control.Drop{}}
		if slot < len(w.outputs) {
			out.State, out.Reason = w.outputs[slot].state, w.outputs[slot].reason
		}
		if s != nil && slot < len(s.Outputs) {
			out.Sent = control.Counter(s.Outputs[slot].Sent)
			out.Drops = drops(s.Outputs[slot].Drops)
		}
		status.Outputs = append(status.Outputs, out)
	}
	return status
}

func drops(counted map[loader.Reason]loader.Counter) []control.Drop {
	all := make([]control.Drop, 0, len(counted))
	for _, reason := range slices.Sorted(maps.Keys(counted)) {
		all = append(all, control.Drop{Reason: reason.String(), Counter: control.Counter(counted[reason])})
	}
	return all
}

// Groups implements control.Backend.
func (r *Relay) Groups(ctx context.Context) (all []control.Group, err error) {
	err = r.do(ctx, func() error {
		stats, err := r.loader.Stats()
		if err != nil {
			return err
		}
		seen := map[string]time.Duration{}
		for _, s := range stats.Rules {
			seen[s.Name] = s.LastSeen
		}
		all = make([]control.Group, 0, len(r.wants))
		now := time.Now()
		on := r.supervise(stats.Queriers, now)
		for _, w := range r.wants {
			g := w.status(seen)
			g.Multicast = on.multicast(w.Interface, w.Index, w.Group.Is4())
			g.Detail = detail(g, now)
			all = append(all, g)
		}
		slices.SortFunc(all, func(a, b control.Group) int {
			return cmp.Or(cmp.Compare(a.Interface, b.Interface), cmp.Compare(a.Group, b.Group), cmp.Compare(a.Source, b.Source))
		})
		return nil
	})
	return all, err
}

func (w *wantedMembership) status(seen map[string]time.Duration) control.Group {
	since := w.since // a copy, since others read it
	g := control.Group{
		Interface: w.Interface, Index: w.Index, Group: w.Group.String(), State: control.GroupJoined,
		Since: &since, Tries: w.tries, Rules: slices.Clone(w.rules),
	}
	if w.Source.IsValid() {
		g.Source = w.Source.String()
	}
	if !w.joined {
		g.State = control.GroupWanted
		if w.err != nil {
			g.State, g.Cause = control.GroupFailed, w.err.Error()
			next := w.next
			g.Next = &next
			if membership.Transient(w.err) {
				g.State = control.GroupRetrying
			}
		}
	}
	for _, name := range w.rules {
		if age, ok := seen[name]; ok && age >= 0 {
			at := time.Now().Add(-age)
			if g.LastPacket == nil || at.After(*g.LastPacket) {
				g.LastPacket = &at
			}
		}
	}
	return g
}

// Stats implements control.Backend.
func (r *Relay) Stats(ctx context.Context) (all control.Stats, err error) {
	err = r.do(ctx, func() error {
		stats, err := r.loader.Stats()
		if err != nil {
			return err
		}
		all = control.Stats{
			Time: time.Now(), Rules: r.describeRules(slices.Sorted(maps.Keys(r.rules)), stats),
			Passed: control.Counter(stats.Passed), Drops: drops(stats.Drops), TransmitDrops: r.transmitDrops(stats.Ports),
		}
		return nil
	})
	return all, err
}

func (r *Relay) transmitDrops(ports []loader.PortStats) []control.TransmitDrop {
	all := []control.TransmitDrop{}
	for _, p := range ports {
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
	for name, i := range r.interfaces {
		if i.index == index {
			return name
		}
	}
	return fmt.Sprintf("if%d", index)
}

// Status implements control.Backend.
func (r *Relay) Status(ctx context.Context) (status control.Status, err error) {
	err = r.do(ctx, func() error {
		stats, err := r.loader.StatsOf(nil)
		if err != nil {
			return err
		}
		status = control.Status{
			Version: r.opts.Version, PID: os.Getpid(), Started: r.started, Ready: r.ready,
			PinDir: r.opts.Loader.PinDir, Schema: bpf.Schema, Config: r.opts.ConfigFile,
			Rules: len(r.rules), Interfaces: r.interfaceStatuses(stats),
			Passed: control.Counter(stats.Passed), Drops: drops(stats.Drops), Warnings: slices.Clone(r.loader.Warnings()),
		}
		for _, w := range r.rules {
			switch w.state {
			case control.StateActive:
				status.Active++
			case control.StatePending:
				status.Pending++
			default:
				status.Failed++
			}
		}
		for _, about := range slices.Sorted(maps.Keys(r.warnings)) {
			status.Warnings = append(status.Warnings, about+": "+r.warnings[about])
		}
		return nil
	})
	return status, err
}

// interfaceStatuses describes the interfaces that rules or attachments name.
func (r *Relay) interfaceStatuses(stats loader.Stats) []control.InterfaceStatus {
	byName := map[string]*control.InterfaceStatus{}
	get := func(name string) *control.InterfaceStatus {
		s := byName[name]
		if s == nil {
			s = &control.InterfaceStatus{Name: name, Roles: []string{}}
			if i := r.interfaces[name]; i != nil {
				s.Index = i.index
				if err := r.attachErrs[i.index]; err != nil {
					s.Note = err.Error()
				}
			}
			byName[name] = s
		}
		return s
	}
	for _, name := range r.opts.Interfaces {
		get(name)
	}
	for _, w := range r.rules {
		addRole(get(w.rule.In.Interface), control.RoleInput)
		for _, o := range w.rule.Out {
			addRole(get(o.Interface), control.RoleOutput)
		}
	}
	for _, a := range r.loader.Attachments() {
		s := get(r.nameOf(a.Index))
		s.Mode, s.ProgramID, s.LinkID = a.Mode.String(), a.ProgramID, a.LinkID
		if a.Fallback != nil {
			s.Note = a.Fallback.Error()
		}
	}
	for _, p := range stats.Ports {
		get(r.nameOf(p.Index)).TransmitDrops = p.TransmitDrops + p.RedirectRefused
	}
	for _, c := range r.groups.Counters() {
		s := get(c.Interface)
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

func addRole(s *control.InterfaceStatus, role string) {
	if !slices.Contains(s.Roles, role) {
		s.Roles = append(s.Roles, role)
		slices.Sort(s.Roles)
	}
}
