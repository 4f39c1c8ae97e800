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
	var instances []string
	for _, name := range names {
		for _, n := range r.rules[name].instances {
			instances = append(instances, n.resolved.Name)
		}
	}
	stats, err := r.statsOf(instances, false)
	if err != nil {
		return nil, err
	}
	return r.describeRules(names, stats, r.workerStatus().lost), nil
}

func (r *Relay) describeRules(names []string, stats loader.Stats, lost []control.ReceiveDrop) []control.RuleStatus {
	byName := make(map[string]*loader.RuleStats, len(stats.Rules))
	for i := range stats.Rules {
		byName[stats.Rules[i].Name] = &stats.Rules[i]
	}
	all := make([]control.RuleStatus, 0, len(names))
	for _, name := range names {
		status := r.rules[name].status(byName)
		status.ReceiveDrops = r.rules[name].receiveDrops(lost)
		all = append(all, status)
	}
	return all
}

// status describes a rule: what its instances have done, added up.
func (w *wantedRule) status(stats map[string]*loader.RuleStats) control.RuleStatus {
	status := control.RuleStatus{
		Rule: control.FromRule(w.rule), Origin: w.origin, State: w.state, Reason: w.reason,
		Drops: []control.Drop{},
	}
	sum, notes := map[loader.Reason]loader.Counter{}, map[loader.Note]loader.Counter{}
	var last time.Duration = -1
	for _, n := range w.instances {
		if status.Reason == "" {
			status.Reason = n.note
		}
		s := stats[n.resolved.Name]
		if s == nil { // not in the kernel
			continue
		}
		if status.ID == 0 {
			status.ID, status.UsedPath = s.ID, PathName(n.resolved.Path)
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
	status.Inputs = w.inputStatuses()
	status.Outputs = w.outputStatuses(stats)
	return status
}

// inputStatuses describes the interfaces of a pattern.
func (w *wantedRule) inputStatuses() []control.InputStatus {
	all := []control.InputStatus{}
	if !isPattern(w.rule.In.Interface) {
		return all
	}
	for _, n := range w.instances {
		all = append(all, control.InputStatus{Interface: n.in, State: n.state, Reason: n.reason})
	}
	return all
}

// outputKey is one output of a rule on one interface.
type outputKey struct {
	out    int
	ifname string
}

// outputSum is what the instances say of an output, added up.
type outputSum struct {
	state, reason string
	hop           *nextHop
	sent          control.Counter
	drops         map[loader.Reason]loader.Counter
}

func (w *wantedRule) outputStatuses(stats map[string]*loader.RuleStats) []control.OutputStatus {
	sums := map[outputKey]*outputSum{}
	var keys []outputKey
	get := func(key outputKey) *outputSum {
		if sums[key] == nil {
			sums[key] = &outputSum{drops: map[loader.Reason]loader.Counter{}}
			keys = append(keys, key)
		}
		return sums[key]
	}
	for _, n := range w.instances {
		s := stats[n.resolved.Name]
		for i, slot := range n.slots {
			sum := get(outputKey{slot.out, slot.ifname})
			if rank(slot.state) > rank(sum.state) {
				sum.state, sum.reason, sum.hop = slot.state, slot.reason, slot.hop
			}
			if s != nil && i < len(s.Outputs) {
				add(&sum.sent, s.Outputs[i].Sent)
				addDrops(sum.drops, s.Outputs[i].Drops)
			}
		}
	}
	served := map[int]bool{}
	for _, key := range keys {
		served[key.out] = true
	}
	for out, o := range w.rule.Out {
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
		o, sum := w.rule.Out[key.out], sums[key]
		o.Interface = key.ifname
		all[i] = control.OutputStatus{
			Slot: i, Output: o.String(), State: cmp.Or(sum.state, control.StatePending), Reason: sum.reason,
			Sent: sum.sent, Drops: Drops(sum.drops),
		}
		if !isPattern(key.ifname) {
			all[i].Interface = key.ifname
		}
		all[i].NextHop, all[i].MAC = sum.hop.addresses()
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

// PathName is the word of a path in the API.
func PathName(p loader.Path) string {
	switch p {
	case loader.PathAFXDP:
		return "afxdp"
	case loader.PathFanout:
		return "fanout"
	default:
		return "kernel"
	}
}

// Fragments writes counters of fragments as the API has them.
func Fragments(f loader.Fragments) control.Fragments {
	return control.Fragments{First: control.Counter(f.First), Later: control.Counter(f.Later), Orphan: control.Counter(f.Orphan)}
}

// Drops writes counters by reason as the API has them.
func Drops(counted map[loader.Reason]loader.Counter) []control.Drop {
	all := make([]control.Drop, 0, len(counted))
	for _, reason := range slices.Sorted(maps.Keys(counted)) {
		all = append(all, control.Drop{Reason: reason.String(), Counter: control.Counter(counted[reason])})
	}
	return all
}

// Notes writes counters of notes as the API has them; nil when there are none.
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
		all = make([]control.Group, 0, len(r.wants))
		now := time.Now()
		on := r.supervise(stats.Queriers, now)
		users := r.users()
		for _, w := range r.wants {
			g := w.status(users[w], seen)
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

// users finds the rules that want each membership.
func (r *Relay) users() map[*wantedMembership][]*instanceOf {
	users := make(map[*wantedMembership][]*instanceOf, len(r.wants))
	for _, w := range r.ordered {
		for _, n := range w.instances {
			user := &instanceOf{w, n}
			for _, m := range n.joins {
				users[m] = append(users[m], user)
			}
		}
	}
	return users
}

// instanceOf is an instance with its rule.
type instanceOf struct {
	rule     *wantedRule
	instance *instance
}

func (w *wantedMembership) status(users []*instanceOf, seen map[string]time.Duration) control.Group {
	since := w.since // a copy, since others read it
	g := control.Group{
		Interface: w.Interface, Index: w.Index, Group: w.Group.String(), State: control.GroupJoined,
		Since: &since, Tries: int(w.tries), Rules: []string{},
	}
	if w.Source.IsValid() {
		g.Source = w.Source.String()
	}
	if !w.joined {
		g.State = control.GroupWanted
		if w.failed != nil {
			g.State, g.Cause = control.GroupFailed, w.failed.err.Error()
			next := w.failed.next
			g.Next = &next
			if membership.Transient(w.failed.err) {
				g.State = control.GroupRetrying
			}
		}
	}
	for _, u := range users {
		g.Rules = append(g.Rules, u.rule.rule.Name)
		if age, ok := seen[u.instance.resolved.Name]; ok && age >= 0 {
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
		stats, err := r.statsOf(nil, true)
		if err != nil {
			return err
		}
		lost := r.workerStatus().lost
		all = control.Stats{
			Time: time.Now(), Rules: r.describeRules(r.names(), stats, lost), ReceiveDrops: lost,
			Passed: control.Counter(stats.Passed), Drops: Drops(stats.Drops), TransmitDrops: r.transmitDrops(stats.Ports, r.paths.unsent()),
			Fragments: Fragments(stats.Fragments),
		}
		return nil
	})
	return all, err
}

func (r *Relay) transmitDrops(ports []loader.PortStats, unsent map[int]uint64) []control.TransmitDrop {
	all := []control.TransmitDrop{}
	for index, packets := range unsent {
		all = append(all, control.TransmitDrop{Interface: r.nameOf(index), Reason: "afxdp", Packets: packets})
	}
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
		stats, err := r.statsOf(nil, false)
		if err != nil {
			return err
		}
		status = control.Status{
			Version: r.opts.Version, PID: os.Getpid(), Started: r.started, Ready: r.ready,
			PinDir: r.opts.Loader.PinDir, Schema: bpf.Schema, Config: r.opts.ConfigFile,
			Rules: len(r.rules), Interfaces: r.interfaceStatuses(stats), Workers: r.workerStatus().workers,
			Passed: control.Counter(stats.Passed), Drops: Drops(stats.Drops), Warnings: slices.Clone(r.loader.Warnings()),
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
				s.Note = cmp.Or(s.Note, r.offloads.note(name))
			}
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

// roles returns the interfaces that rules name or match with a pattern.
func (r *Relay) roles() (inputs, outputs map[string]bool) {
	inputs, outputs = map[string]bool{}, map[string]bool{}
	for _, w := range r.ordered {
		if !isPattern(w.rule.In.Interface) {
			inputs[w.rule.In.Interface] = true
		}
		for i := range w.rule.Out {
			if name := w.rule.Out[i].Interface; !isPattern(name) {
				outputs[name] = true
			}
		}
		for _, n := range w.instances {
			inputs[n.in] = true
			for i := range n.slots {
				outputs[n.slots[i].ifname] = true
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
