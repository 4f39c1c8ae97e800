package loader

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
)

// entry is a rule as stored in the kernel.
type entry struct {
	rule       *flow.Flow // never modified; Sync's caller may hold it, too
	id         uint32     // index of rules and rule_stats
	first      uint32     // first output
	firstStats uint32
	row        uint32 // row of devices, with one output
	sockets    uint32 // row of xsks, with PathAFXDP
	stream     uint32 // index of streams, of a leg; 0: none
	planned    uint32 // value of Loader.plans at the last Sync that wanted it
	inForce    bool   // it is in Loader.rules
	leaving    bool   // the transaction in progress removes or replaces it
	next       *entry // of places
}

// change replaces old by new; either may be nil.
type change struct {
	old, new *entry
	// continues: the same rule with changed addresses. It keeps its id and counters.
	continues bool
}

// transaction is one call of Sync: its changes, and how to undo the steps done so far.
type transaction struct {
	*Loader
	changes []change
	undo    []func() error
	done    []func() error // run after success
	staged  staged
	// ids of rules, and of output counters, that were used by others before
	reused, reusedStats map[uint32]bool
	adds                bool // see addsOne
}

// Sync makes the kernel hold exactly the rules in want. Rules that it holds already are not
// touched, and their packets see nothing. Several changes are published in one write for each
// address family. After an error the kernel has the same rules as before. The Loader keeps the
// rules, not copies of them: the caller must not modify them afterwards.
//
// It does not attach interfaces: see Attach. Errors to match: *RuleError, ErrFull.
func (l *Loader) Sync(want []*flow.Flow) error {
	return l.transact(func(s *transaction) error { return s.plan(want) })
}

// Change is Sync for a set of rules that differs from the current one in a few: put has those that
// are added, or replace those of the same names, and remove the names of those that are not wanted
// any more. It costs what they cost, however many others there are.
func (l *Loader) Change(put []*flow.Flow, remove []string) error {
	return l.transact(func(s *transaction) error { return s.planChange(put, remove) })
}

func (l *Loader) transact(plan func(*transaction) error) error {
	if err := l.sync(plan); err != nil {
		return err
	}
	return l.endReplaced()
}

func (l *Loader) sync(plan func(*transaction) error) (err error) {
	s := &transaction{Loader: l, reused: map[uint32]bool{}, reusedStats: map[uint32]bool{}, staged: staged{open: openBroadcasts{}}}
	if err := plan(s); err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, s.staged.open.close(), s.staged.closeWindows())
		if err != nil {
			err = errors.Join(err, s.takeBack())
		}
	}()
	if err := s.claimInputs(); err != nil {
		return err
	}
	inputs, steered := s.needs()
	l.attachTapped(inputs)
	l.steer(steered)
	if len(s.changes) == 0 {
		return nil
	}
	if err := l.clearOrphanBroadcasts(); err != nil {
		return err
	}
	for _, c := range s.changes {
		if c.new == nil {
			continue
		}
		if err := s.stage(c); err != nil {
			return &RuleError{Rule: c.new.rule.Name, Err: err}
		}
	}
	if err := s.flush(); err != nil {
		return err
	}
	if err := l.dropCountersOf(s.reused, s.reusedStats); err != nil {
		return err
	}
	if err := s.publish(); err != nil {
		return err
	}
	s.undo = nil // from here on the new rules are published
	open := s.addShortcut
	if !s.adds {
		// Programs that have seen the old rules may still use the rows that these point to, the
		// memory of their entries, and the shortcuts to them.
		l.opts.wait()
		open = s.openShortcuts
	}
	if err := open(s.changes); err != nil {
		l.log.Warn("packets find their rules in the flow tables alone, which takes longer", "error", err)
	}
	if err := errors.Join(s.retire(), l.detachTapped(inputs)); err != nil {
		// No packet is affected: at worst some memory stays in use.
		l.log.Warn("clean up after old rules", "error", err)
	}
	return nil
}

// plan compares want with the current rules. Additions keep the order of want. An unchanged flow
// costs one lookup of its name.
func (s *transaction) plan(want []*flow.Flow) error {
	s.plans++
	kept := 0 // number of current rules that stay
	for _, r := range want {
		old := s.rules[r.Name]
		if old != nil {
			if old.planned == s.plans {
				return nameTwice(r.Name)
			}
			old.planned = s.plans
			kept++
		}
		if err := s.want(old, r); err != nil {
			return err
		}
	}
	if err := s.checkNames(); err != nil {
		return err
	}
	if kept == len(s.rules) {
		return nil
	}
	var gone []change
	for _, e := range s.rules {
		if e.planned != s.plans {
			gone = append(gone, change{old: e})
		}
	}
	slices.SortFunc(gone, func(a, b change) int { return strings.Compare(a.old.rule.Name, b.old.rule.Name) })
	s.changes = append(s.changes, gone...)
	return nil
}

// planChange looks at the given rules only.
func (s *transaction) planChange(put []*flow.Flow, remove []string) error {
	stay := make(map[string]bool, len(put))
	for _, r := range put {
		if stay[r.Name] {
			return nameTwice(r.Name)
		}
		stay[r.Name] = true
		if err := s.want(s.rules[r.Name], r); err != nil {
			return err
		}
	}
	gone := map[string]bool{}
	for _, name := range remove {
		if e := s.rules[name]; e != nil && !stay[name] && !gone[name] {
			gone[name] = true
			s.changes = append(s.changes, change{old: e})
		}
	}
	return nil
}

// want adds the change, if any, by which a rule becomes r. old is the current rule of its name, nil
// for none.
func (s *transaction) want(old *entry, r *flow.Flow) error {
	if old != nil && old.rule == r {
		return nil // it was checked when it was published
	}
	if normal := r.Normalized(); !normal.Equal(*r) {
		other := normal
		r = &other
	}
	if err := r.Check(); err != nil {
		return &RuleError{Rule: r.Name, Err: err}
	}
	if old != nil && old.rule.Equal(*r) {
		old.rule = r // share the caller's instead of keeping two
		return nil
	}
	s.changes = append(s.changes, change{old: old, new: &entry{rule: r}, continues: old != nil && r.Continues(*old.rule)})
	return nil
}

func nameTwice(name string) error {
	return &RuleError{Rule: name, Err: errors.New("name is used twice")}
}

// checkNames rejects new rules with the same name.
func (s *transaction) checkNames() error {
	names := make(map[string]bool, len(s.changes))
	for _, c := range s.changes {
		if c.old != nil {
			continue // plan has found it only once
		}
		if names[c.new.rule.Name] {
			return nameTwice(c.new.rule.Name)
		}
		names[c.new.rule.Name] = true
	}
	return nil
}

// fewChanges is the number of changes up to which only rules of their places are looked at. For more, all rules
// are: very many of one place would be compared with each other.
const fewChanges = 64

// claimInputs rejects two rules with the same input. It compares only new rules, with those of the
// same place: the inputs of unchanged rules are distinct already.
func (s *transaction) claimInputs() error {
	if len(s.changes) > fewChanges {
		return s.claimManyInputs()
	}
	claimed := 0
	s.onFailure(func() error {
		for i, c := range s.changes {
			if c.old != nil {
				c.old.leaving = false
			}
			if c.new != nil && i < claimed {
				s.places.remove(c.new)
			}
		}
		return nil
	})
	for _, c := range s.changes {
		if c.old != nil {
			c.old.leaving = true
		}
	}
	for _, c := range s.changes {
		if c.new != nil {
			if other := s.places.sameInput(c.new); other != nil {
				return sameInput(c.new.rule.Name, other.rule.Name)
			}
			s.places.add(c.new)
		}
		claimed++
	}
	return nil
}

// claimManyInputs is claimInputs for many changes. The new rules come into places with publish.
func (s *transaction) claimManyInputs() error {
	inputs := make(map[flow.Input]string, len(s.changes))
	gone := make(map[*entry]bool, len(s.changes))
	for _, c := range s.changes {
		if c.old != nil {
			gone[c.old] = true
		}
		if c.new == nil {
			continue
		}
		for in := range c.new.rule.In.Key().EveryPort() {
			if other, ok := inputs[in]; ok {
				return sameInput(c.new.rule.Name, other)
			}
			inputs[in] = c.new.rule.Name
		}
	}
	for _, e := range s.rules {
		if gone[e] {
			continue
		}
		for in := range e.rule.In.Key().EveryPort() {
			if name, ok := inputs[in]; ok {
				return sameInput(name, e.rule.Name)
			}
		}
	}
	return nil
}

// needs are the inputs of PathFanout whose packets must not reach the host's stack, and whether a
// rule is steered, after the change.
func (s *transaction) needs() (inputs map[int]bool, steered bool) {
	keep, steer := maps.Clone(s.keep), s.steered
	count := func(e *entry, n int) {
		if e != nil && keepsFromStack(e.rule) {
			keep[e.rule.In.Index] += n
		}
		if e != nil && e.rule.Steered {
			steer += n
		}
	}
	for _, c := range s.changes {
		count(c.old, -1)
		count(c.new, 1)
	}
	inputs = map[int]bool{}
	for index, n := range keep {
		if n > 0 {
			inputs[index] = true
		}
	}
	return inputs, steer > 0
}

func sameInput(name, other string) error {
	return &RuleError{Rule: name, Err: fmt.Errorf("has the same input as rule %s", other)}
}

func (s *transaction) onFailure(fn func() error) { s.undo = append(s.undo, fn) }

func (s *transaction) takeBack() error {
	var errs []error
	for _, fn := range slices.Backward(s.undo) {
		errs = append(errs, fn())
	}
	return errors.Join(errs...)
}

// stage prepares everything of a rule except its flow entry.
func (s *transaction) stage(c change) error {
	e, n := c.new, uint32(len(c.new.rule.Out))
	if err := s.allocate(c); err != nil {
		return err
	}
	if !c.continues {
		// Before the flow entry: a crash in between leaves no rule without a name.
		s.staged.rules.add(e.id, encodeRule(e))
		s.onFailure(func() error { return s.maps.Rules.Put(e.id, &bpf.RelayRule{}) })
	}
	s.bindCounters(e)
	s.stagePolicers(c)
	if err := s.useStream(e); err != nil {
		return err
	}
	if e.rule.Routed != 0 {
		if err := s.routed.stage(e.first); err != nil {
			return err
		}
	}
	for slot, o := range e.rule.Out {
		stats := e.firstStats + uint32(slot)
		b := encodeOutput(o, stats, s.outputPolicer(stats))
		if e.rule.Routed != 0 {
			b.Held = 1 // until ReleaseRouted; the first one counts
			b.Flags |= uint16(bpf.RelayOutputFlagOUTPUT_ROUTED)
		}
		s.staged.outputs.add(e.first+uint32(slot), b)
	}
	if e.rule.Path == flow.PathAFXDP {
		var err error
		if e.sockets, err = s.socketRow(e.rule.In.Index); err != nil {
			return err
		}
	}
	if n > 1 {
		return s.stageSlots(e)
	}
	if !e.rule.Out[0].Ready {
		return nil
	}
	p, err := s.useDevice(e.rule.Out[0].Index)
	if err != nil {
		return err
	}
	e.row = p.row
	s.onFailure(func() error { return s.releaseDevice(p.index) })
	return s.flushIfFull()
}

// outputPolicer is the policer of an output with the given counters. Those of the rules come first.
func (l *Loader) outputPolicer(stats uint32) uint32 { return l.maps.Rules.MaxEntries() + stats }

// stagePolicers fills the token buckets of a rule's rates. A bucket whose rate is unchanged keeps
// its state.
func (s *transaction) stagePolicers(c change) {
	stage := func(index uint32, old, rate flow.Rate) {
		if rate == (flow.Rate{}) || c.continues && old == rate {
			return
		}
		s.staged.policers.add(index, encodePolicer(rate))
		if c.continues {
			before := encodePolicer(old)
			s.onFailure(func() error { return s.maps.Policers.Put(index, &before) })
		}
	}
	old := &flow.Flow{}
	if c.continues {
		old = c.old.rule
	}
	stage(c.new.id, old.Rate, c.new.rule.Rate)
	for slot, o := range c.new.rule.Out {
		var before flow.Rate
		if c.continues {
			before = old.Out[slot].Rate
		}
		stage(s.outputPolicer(c.new.firstStats+uint32(slot)), before, o.Rate)
	}
}

func (s *transaction) allocate(c change) error {
	e, n := c.new, uint32(len(c.new.rule.Out))
	first, used, err := s.outputs.take(n)
	if err != nil {
		return fmt.Errorf("outputs: %w", err)
	}
	e.first = first
	s.onFailure(func() error { s.outputs.give(first, n); return nil })
	if used && n > 1 {
		// A frame whose number equals the last one counted here for another rule would continue
		// that count of turns.
		if err := zeroPerCPU[bpf.RelayTurn](s.maps.Turns, first, n); err != nil {
			return err
		}
	}
	if c.continues {
		e.id, e.firstStats = c.old.id, c.old.firstStats
		return nil
	}
	id, used, err := s.ids.take()
	if err != nil {
		return fmt.Errorf("rules: %w", err)
	}
	e.id = id
	s.onFailure(func() error { s.ids.give(id); return nil })
	if used {
		s.reused[id] = true
		if err := zeroPerCPU[bpf.RelayRuleStats](s.maps.RuleStats, id, 1); err != nil {
			return err
		}
	}
	firstStats, used, err := s.stats.take(n)
	if err != nil {
		return fmt.Errorf("output counters: %w", err)
	}
	e.firstStats = firstStats
	s.onFailure(func() error { s.stats.give(firstStats, n); return nil })
	if used {
		for i := range n {
			s.reusedStats[firstStats+i] = true
		}
		return zeroPerCPU[bpf.RelayOutputStats](s.maps.OutputStats, firstStats, n)
	}
	return nil
}

// stageSlots prepares the row of map broadcast and the copies of a rule with several outputs.
func (s *transaction) stageSlots(e *entry) error {
	for _, o := range e.rule.Out {
		if !o.Ready {
			continue
		}
		if err := s.useSlot(o.Index); err != nil {
			return err
		}
		s.onFailure(func() error { return s.releaseSlot(o.Index) })
	}
	devmap, err := s.useBroadcast(e.rule.Out, s.staged.open)
	if err != nil {
		return err
	}
	s.onFailure(func() error { return s.releaseBroadcast(e.rule.Out) })
	s.staged.broadcast.add(e.first, uint32(devmap.FD()))
	for i, c := range encodeCopies(e.rule.Out) {
		s.staged.copies.add(e.first+uint32(i), c)
	}
	return s.flushIfFull()
}

// publish makes the changes visible to the programs.
func (s *transaction) publish() error {
	before := s.lookups.kinds()
	needed := before
	for _, c := range s.changes {
		if c.new != nil {
			needed |= lookupOf(c.new.rule.In)
		}
	}
	if s.adds = s.addsOne(); !s.adds {
		s.closeShortcuts()
	}
	// An unneeded kind costs a lookup; a missing kind would lose packets.
	if err := s.writeLookups(needed); err != nil {
		return err
	}
	s.onFailure(func() error { return s.writeLookups(before) })
	var err error
	if s.isSingle() {
		err = s.publishOne(s.changes[0])
	} else {
		if needed != before {
			// A program that has not seen the new kinds would look up a rule that moved to one of
			// them in its old table.
			s.opts.wait()
		}
		err = s.publishTables()
	}
	if err != nil {
		return err
	}
	many := len(s.changes) > fewChanges
	for _, c := range s.changes {
		s.routed.replace(c.old, c.new)
		if c.old != nil {
			if !many {
				s.places.remove(c.old)
			}
			s.leave(c.old)
		}
		if c.new != nil {
			s.enter(c.new)
		}
	}
	if many {
		s.places = places{}
		for _, e := range s.rules {
			s.places.add(e)
		}
	}
	return nil
}

// enter counts a rule that is published. It is in places, or its caller adds it.
func (l *Loader) enter(e *entry) {
	l.rules[e.rule.Name] = e
	e.inForce = true
	l.lookups.add(e.rule.In)
	l.count(e, 1)
}

// leave is the inverse of enter.
func (l *Loader) leave(e *entry) {
	delete(l.rules, e.rule.Name)
	e.inForce = false
	l.lookups.remove(e.rule.In)
	l.count(e, -1)
}

func (l *Loader) count(e *entry, n int) {
	l.extra += n * e.rule.ExtraEntries()
	l.countBoth(e.rule.In, n)
	if e.rule.Steered {
		l.steered += n
	}
	if keepsFromStack(e.rule) {
		if l.keep[e.rule.In.Index] += n; l.keep[e.rule.In.Index] == 0 {
			delete(l.keep, e.rule.In.Index)
		}
	}
}

// lookupCount counts the published rules by the lookup kind that finds them.
type lookupCount map[lookups]int

func (c lookupCount) add(in flow.Input) { c[lookupOf(in)]++ }

func (c lookupCount) remove(in flow.Input) {
	kind := lookupOf(in)
	if c[kind]--; c[kind] == 0 {
		delete(c, kind)
	}
}

func (c lookupCount) kinds() (kinds lookups) {
	for kind := range c {
		kinds |= kind
	}
	return kinds
}

// isSingle says whether a single write to the current flow table is enough.
func (s *transaction) isSingle() bool {
	if len(s.changes) != 1 {
		return false
	}
	c := s.changes[0]
	if c.old != nil && !c.old.rule.In.IsOne() || c.new != nil && !c.new.rule.In.IsOne() {
		return false
	}
	if c.old != nil && c.new != nil {
		return c.old.rule.In.Key() == c.new.rule.In.Key()
	}
	if s.both > 0 && cmp.Or(c.new, c.old).rule.In.Len != 0 {
		return false // it affects the entries of other rules
	}
	return c.new == nil || len(s.rules)+s.extra < int(s.tableOf(c.new.rule.In).MaxEntries())
}

// addsOne says whether the only change is a new rule that takes no packets from a shortcut, and finds
// one of its own slots empty: no program uses anything that changes, and the shortcuts stay open.
func (s *transaction) addsOne() bool {
	if !s.shortcuts.open || !s.shortcuts.known || !s.isSingle() || s.changes[0].old != nil {
		return false
	}
	e := s.changes[0].new
	for other := range s.places.of(e.rule.In) {
		if other != e && shadows(e.rule.In, other.rule.In) && s.shortcuts.has(other) {
			return false
		}
	}
	if !s.wantsShortcut(e) {
		return true
	}
	_, empty := s.shortcuts.emptySlot(e)
	return empty
}

func (l *Loader) tableOf(in flow.Input) *ebpf.Map { return l.tables[kindOf(in)] }

func (s *transaction) publishOne(c change) error {
	if c.new == nil {
		if err := s.tableOf(c.old.rule.In).Delete(encodeKey(c.old.rule.In)); err != nil {
			return fmt.Errorf("unpublish rule %s: %w", c.old.rule.Name, err)
		}
		return nil
	}
	flow := encodeFlow(c.new)
	if err := s.tableOf(c.new.rule.In).Put(encodeKey(c.new.rule.In), &flow); err != nil {
		return fmt.Errorf("publish rule %s: %w", c.new.rule.Name, err)
	}
	return nil
}

// publishTables builds new flow tables next to the current ones and swaps them. Each swap waits
// until no program uses the previous table.
//
// Programs look in the exact table of a packet's family and then in the prefix table (except for
// prefixes of sources, which go before any source), so the prefixes are swapped last: a rule that
// became exact is found in the exact table first. Rules that leave the exact table may move to a
// prefix, so they stay in it until the prefixes are swapped. Thus a packet finds either its old
// rule or its new one, never none and never a third one.
func (s *transaction) publishTables() (err error) {
	flows, changed, err := s.flowsAfter()
	if err != nil {
		return err
	}
	for kind := range prefixes4 {
		prefixes := kind + prefixes4
		var leaving []flowEntry
		if changed[prefixes] {
			leaving = s.leaving(kind)
		}
		if len(leaving) > 0 {
			if err := s.swap(kind, slices.Concat(flows[kind], leaving)); err != nil {
				return err
			}
		} else if changed[kind] {
			if err := s.swap(kind, flows[kind]); err != nil {
				return err
			}
		}
		if changed[prefixes] {
			if err := s.swap(prefixes, flows[prefixes]); err != nil {
				return err
			}
		}
		if len(leaving) > 0 {
			if err := s.swap(kind, flows[kind]); err != nil {
				return err
			}
		}
	}
	return nil
}

// leaving lists the flow entries of a table whose inputs no rule has any longer.
func (s *transaction) leaving(kind tableKind) (flows []flowEntry) {
	kept := map[flow.Input]bool{}
	for _, c := range s.changes {
		if c.new != nil {
			for in := range c.new.rule.In.Key().EveryPort() {
				kept[in] = true
			}
		}
	}
	for _, c := range s.changes {
		if c.old == nil || kindOf(c.old.rule.In) != kind {
			continue
		}
		for in := range c.old.rule.In.EveryPort() {
			if !kept[in.Key()] {
				flows = append(flows, flowEntry{in: in, value: encodeFlow(c.old)})
			}
		}
	}
	return flows
}

// flowsAfter lists the flow entries of all rules after the change, and which tables change.
func (s *transaction) flowsAfter() (flows [tableKinds][]flowEntry, changed [tableKinds]bool, err error) {
	touched := make(map[string]bool, len(s.changes))
	var n [tableKinds]int
	for _, c := range s.changes {
		if c.new != nil {
			n[kindOf(c.new.rule.In)]++
		}
	}
	for kind := range flows {
		flows[kind] = make([]flowEntry, 0, n[kind])
	}
	var sourced, both, anySender [tableKinds][]*entry
	add := func(e *entry) {
		kind, in := kindOf(e.rule.In), e.rule.In
		switch {
		case takesBoth(in):
			both[kind] = append(both[kind], e)
			return
		case in.BySource:
			sourced[kind] = append(sourced[kind], e)
			return
		case in.Len != 0 && !in.Source.IsValid():
			anySender[kind] = append(anySender[kind], e)
		}
		for in := range e.rule.In.EveryPort() {
			flows[kind] = append(flows[kind], flowEntry{in: in, value: encodeFlow(e)})
		}
	}
	for _, c := range s.changes {
		for _, e := range []*entry{c.old, c.new} {
			if e == nil {
				continue
			}
			touched[e.rule.Name] = true
			changed[kindOf(e.rule.In)] = true
		}
		if c.new != nil {
			add(c.new)
		}
	}
	for name, e := range s.rules {
		if !touched[name] && changed[kindOf(e.rule.In)] {
			add(e)
		}
	}
	for kind := range sourced {
		flows[kind] = append(flows[kind], sourceFlows(sourced[kind])...)
		more, err := bothFlows(both[kind], anySender[kind])
		if err != nil {
			return flows, changed, s.blame(tableKind(kind), err)
		}
		flows[kind] = append(flows[kind], more...)
	}
	return flows, changed, nil
}

// blame attributes an error to the last changed rule of the table that is full.
func (s *transaction) blame(kind tableKind, err error) error {
	for _, c := range slices.Backward(s.changes) {
		if c.new != nil && kindOf(c.new.rule.In) == kind {
			return &RuleError{Rule: c.new.rule.Name, Err: err}
		}
	}
	return err
}

// swap publishes a new flow table with one write.
func (s *transaction) swap(kind tableKind, flows []flowEntry) error {
	inForce := &s.tables[kind]
	table, err := s.newTable(kind, flows)
	if err != nil {
		return err
	}
	old := *inForce
	back := func() error {
		*inForce = old
		return errors.Join(s.putTable(kind, old), table.Close())
	}
	if err := s.putTable(kind, table); err != nil {
		return errors.Join(err, back())
	}
	*inForce = table
	s.onFailure(back)
	s.done = append(s.done, old.Close)
	return nil
}

// retire frees what only the old rules used, and updates the descriptions of the rules.
func (s *transaction) retire() error {
	var errs []error
	var rows batch[bpf.RelayRule]
	var broadcasts, copies []uint32
	gone, goneStats := map[uint32]bool{}, map[uint32]bool{}
	for _, c := range s.changes {
		if c.continues {
			rows.add(c.new.id, encodeRule(c.new))
		}
		if c.old == nil {
			continue
		}
		errs = append(errs, s.releaseOutputs(c.old), s.releaseStream(c.old.rule.Leg))
		if len(c.old.rule.Out) > 1 {
			broadcasts = append(broadcasts, c.old.first)
			for slot := range c.old.rule.Out {
				copies = append(copies, c.old.first+uint32(slot))
			}
		}
		s.outputs.give(c.old.first, uint32(len(c.old.rule.Out)))
		if !c.continues {
			s.retireCounters(c.old, gone, goneStats)
			rows.add(c.old.id, bpf.RelayRule{})
		}
	}
	s.forgetSockets()
	errs = append(errs, s.clearBroadcasts(broadcasts, copies), rows.put(s.maps.Rules), s.dropCountersOf(gone, goneStats))
	for _, fn := range s.done {
		errs = append(errs, fn())
	}
	return errors.Join(errs...)
}

// releaseOutputs releases the interfaces on which a rule sends.
func (s *transaction) releaseOutputs(e *entry) error {
	out := e.rule.Out
	if len(out) == 1 {
		if out[0].Ready {
			return s.releaseDevice(out[0].Index)
		}
		return nil
	}
	errs := []error{s.releaseBroadcast(out)}
	for _, o := range out {
		if o.Ready {
			errs = append(errs, s.releaseSlot(o.Index))
		}
	}
	return errors.Join(errs...)
}

func (s *transaction) retireCounters(e *entry, gone, goneStats map[uint32]bool) {
	n := uint32(len(e.rule.Out))
	s.retireAccount(e)
	gone[e.id] = true
	for i := range n {
		goneStats[e.firstStats+i] = true
	}
	s.ids.give(e.id)
	s.stats.give(e.firstStats, n)
}

// dropCountersOf deletes the drop counters of some rules and outputs.
func (l *Loader) dropCountersOf(ids, stats map[uint32]bool) error {
	switch {
	case len(ids) == 0 && len(stats) == 0:
		return nil
	case len(ids)+len(stats) > fewCounters:
		return l.dropStaleCounters(has(ids), has(stats))
	}
	for id := range ids {
		if err := l.maps.Loops.Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("clear map loops: %w", err)
		}
	}
	for key := range dropKeys(maps.Keys(ids), maps.Keys(stats)) {
		if err := l.maps.RuleDrops.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("clear map rule_drops: %w", err)
		}
	}
	return nil
}

// dropStaleCounters deletes the drop counters of removed rules and outputs.
func (l *Loader) dropStaleCounters(isGone, isGoneStats func(uint32) bool) error {
	if err := l.forgetLoops(isGone); err != nil {
		return err
	}
	var stale []bpf.RelayDropKey
	var key bpf.RelayDropKey
	var values []bpf.RelayCounter
	iter := l.maps.RuleDrops.Iterate()
	for iter.Next(&key, &values) {
		gone := isGone
		if bpf.RelayDropScope(key.Scope) == bpf.RelayDropScopeDROP_OUTPUT {
			gone = isGoneStats
		}
		if gone(key.Id) {
			stale = append(stale, key)
		}
	}
	if err := iter.Err(); err != nil {
		return fmt.Errorf("read map rule_drops: %w", err)
	}
	for _, key := range stale {
		if err := l.maps.RuleDrops.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("clear map rule_drops: %w", err)
		}
	}
	return nil
}

// has returns the membership test of a set.
func has(set map[uint32]bool) func(uint32) bool {
	return func(i uint32) bool { return set[i] }
}

// zeroPerCPU clears n values of a per-CPU array.
func zeroPerCPU[V any](m *ebpf.Map, first, n uint32) error {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("possible cpus: %w", err)
	}
	zero := make([]V, cpus)
	for i := range n {
		if err := m.Put(first+i, zero); err != nil {
			return fmt.Errorf("clear counters: %w", err)
		}
	}
	return nil
}
