package loader

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
)

// entry is a rule as it is in the kernel.
type entry struct {
	rule       Rule
	id         uint32 // index of rules and rule_stats
	first      uint32 // first output
	firstStats uint32
	row        uint32 // row of ports, with one output
}

// change is one rule's way from old to new; either may be nil.
type change struct {
	old, new *entry
	// continues: the same rule with other addresses. It keeps its id and counters.
	continues bool
}

// sync is one call of Sync: what it changes, and how to take back what it has
// done so far.
type sync struct {
	*Loader
	changes []change
	undo    []func() error
	staged  []stagedSlots
	done    []func() error // what is left to do after success
	// ids of rules, and of output counters, that others had before
	reused, reusedStats map[uint32]bool
}

// Sync makes the kernel hold exactly the rules in want. Rules that are there
// already are not touched, and their packets see nothing. Several changes come
// into force in one write for each address family. After an error the rules in
// the kernel are those from before.
//
// Interfaces are not attached here: see Attach. Errors to match: *RuleError,
// ErrFull.
func (l *Loader) Sync(want []Rule) (err error) {
	s := &sync{Loader: l, reused: map[uint32]bool{}, reusedStats: map[uint32]bool{}}
	if err := s.plan(want); err != nil {
		return err
	}
	if len(s.changes) == 0 {
		return nil
	}
	defer func() {
		if err != nil {
			s.closeStaged()
			err = errors.Join(err, s.takeBack())
		}
	}()
	for _, c := range s.changes {
		if c.new == nil {
			continue
		}
		if err := s.stage(c); err != nil {
			return &RuleError{Rule: c.new.rule.Name, Err: err}
		}
	}
	if err := s.writeFanout(); err != nil {
		return err
	}
	if err := l.dropStaleCounters(s.reused, s.reusedStats); err != nil {
		return err
	}
	if err := s.publish(); err != nil {
		return err
	}
	s.undo = nil // from here on the new rules are in force
	if err := s.retire(); err != nil {
		// Nothing that a packet sees: at worst some memory is held in vain.
		l.log.Warn("clean up after old rules", "error", err)
	}
	return nil
}

// plan compares want with what is there. Additions come in the order of want.
func (s *sync) plan(want []Rule) error {
	wanted := make(map[string]bool, len(want))
	inputs := make(map[Input]string, len(want))
	for _, r := range want {
		r = normalize(r)
		if err := check(r); err != nil {
			return &RuleError{Rule: r.Name, Err: err}
		}
		if wanted[r.Name] {
			return &RuleError{Rule: r.Name, Err: errors.New("name is used twice")}
		}
		if other, ok := inputs[r.In.key()]; ok {
			return &RuleError{Rule: r.Name, Err: fmt.Errorf("has the same input as rule %s", other)}
		}
		wanted[r.Name], inputs[r.In.key()] = true, r.Name
		old := s.rules[r.Name]
		if old != nil && old.rule.equal(r) {
			continue
		}
		s.changes = append(s.changes, change{old: old, new: &entry{rule: r}, continues: old != nil && r.continues(old.rule)})
	}
	var gone []change
	for name, e := range s.rules {
		if !wanted[name] {
			gone = append(gone, change{old: e})
		}
	}
	slices.SortFunc(gone, func(a, b change) int { return strings.Compare(a.old.rule.Name, b.old.rule.Name) })
	s.changes = append(s.changes, gone...)
	return nil
}

func (s *sync) onFailure(fn func() error) { s.undo = append(s.undo, fn) }

func (s *sync) takeBack() error {
	var errs []error
	for _, fn := range slices.Backward(s.undo) {
		errs = append(errs, fn())
	}
	return errors.Join(errs...)
}

// stage writes everything of a rule but its flow entry.
func (s *sync) stage(c change) error {
	e, n := c.new, uint32(len(c.new.rule.Out))
	if err := s.allocate(c); err != nil {
		return err
	}
	if !c.continues {
		// Before the flow entry: what dies in between leaves no rule without a name.
		row := encodeRule(e)
		if err := s.maps.Rules.Put(e.id, &row); err != nil {
			return fmt.Errorf("describe rule: %w", err)
		}
		s.onFailure(func() error { return s.maps.Rules.Put(e.id, &bpf.RelayRule{}) })
	}
	for slot, o := range e.rule.Out {
		value := encodeOutput(o, e.firstStats+uint32(slot))
		if err := s.maps.Outputs.Put(e.first+uint32(slot), &value); err != nil {
			return fmt.Errorf("write output %d: %w", slot, err)
		}
	}
	if n > 1 {
		return s.stageSlots(e)
	}
	if !e.rule.Out[0].Ready {
		return nil
	}
	p, err := s.usePort(e.rule.Out[0].Index)
	if err != nil {
		return err
	}
	e.row = p.row
	s.onFailure(func() error { return s.releasePort(p.index) })
	return nil
}

func (s *sync) allocate(c change) error {
	e, n := c.new, uint32(len(c.new.rule.Out))
	first, used, err := s.outputs.take(n)
	if err != nil {
		return fmt.Errorf("outputs: %w", err)
	}
	e.first = first
	s.onFailure(func() error { s.outputs.give(first, n); return nil })
	if used && n > 1 {
		// A frame with the number of the last one that another rule counted turns
		// for would go on with its turns.
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

// stageSlots makes the devmap of a rule with several outputs.
func (s *sync) stageSlots(e *entry) error {
	slots, err := s.newSlots(len(e.rule.Out))
	if err != nil {
		return err
	}
	s.staged = append(s.staged, stagedSlots{e.first, slots})
	for slot, o := range e.rule.Out {
		if !o.Ready {
			continue
		}
		if err := s.useSlot(o.Index); err != nil {
			return err
		}
		s.onFailure(func() error { return s.releaseSlot(o.Index) })
		if err := s.setSlot(slots, uint32(slot), o.Index); err != nil {
			return err
		}
	}
	for i, c := range encodeCopies(e.rule.Out) {
		if err := s.maps.Copies.Put(e.first+uint32(i), &c); err != nil {
			return fmt.Errorf("write copies: %w", err)
		}
	}
	if len(s.staged) >= fanoutBatch {
		return s.writeFanout()
	}
	return nil
}

// fanoutBatch bounds the devmaps that are open at once.
const fanoutBatch = 256

// stagedSlots is the devmap of a rule that the map fanout does not hold yet.
type stagedSlots struct {
	first uint32
	slots *ebpf.Map
}

// writeFanout hands the staged devmaps to the map fanout, which holds them from
// then on. The kernel returns from the write only when no program that started
// before it runs any more - once for all of them, since Linux 6.8 - so that a row
// of ports that useSlot has changed is in force, too.
func (s *sync) writeFanout() error {
	if len(s.staged) == 0 {
		return nil
	}
	defer s.closeStaged()
	rows := make([]uint32, len(s.staged))
	fds := make([]uint32, len(s.staged))
	for i, staged := range s.staged {
		rows[i], fds[i] = staged.first, uint32(staged.slots.FD())
		s.onFailure(func() error {
			if err := s.maps.Fanout.Delete(staged.first); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("take back fanout: %w", err)
			}
			return nil
		})
	}
	n, err := s.maps.Fanout.BatchUpdate(rows, fds, nil)
	if errors.Is(err, ebpf.ErrNotSupported) {
		for i := range rows {
			if err := s.maps.Fanout.Put(rows[i], fds[i]); err != nil {
				return fmt.Errorf("write fanout: %w", err)
			}
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("write fanout: %d of %d rows: %w", n, len(rows), err)
	}
	return nil
}

func (s *sync) closeStaged() {
	for _, staged := range s.staged {
		if err := staged.slots.Close(); err != nil {
			s.log.Warn("close devmap", "error", err)
		}
	}
	s.staged = nil
}

func (l *Loader) newSlots(n int) (*ebpf.Map, error) {
	spec := l.specs[bpf.RelayMapFanout].InnerMap.Copy()
	spec.Name = "slots"
	// The kernel takes no BTF for a devmap; to find out takes 20 ms a map.
	spec.Key, spec.Value = nil, nil
	spec.MaxEntries = uint32(n)
	slots, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, fmt.Errorf("make devmap of %d slots: %w", n, err)
	}
	return slots, nil
}

// setSlot fills a row of a devmap with an interface and the egress program.
func (l *Loader) setSlot(slots *ebpf.Map, slot uint32, index int) error {
	value := bpf.RelayBpfDevmapVal{Ifindex: uint32(index)}
	value.BpfProg.Fd = int32(l.egress.FD())
	if err := slots.Put(slot, &value); err != nil {
		return fmt.Errorf("output %d to interface with index %d: %w", slot, index, err)
	}
	return nil
}

// publish brings the changes into force.
func (s *sync) publish() error {
	before := s.Loader.kinds()
	needed := before
	for _, c := range s.changes {
		if c.new != nil {
			needed |= kindOf(c.new.rule.In)
		}
	}
	if needed != before {
		// A kind more than needed costs a lookup; a kind less would lose packets.
		if err := s.writeConfig(needed); err != nil {
			return err
		}
		s.onFailure(func() error { return s.writeConfig(before) })
	}
	var err error
	if s.isSingle() {
		err = s.publishOne(s.changes[0])
		if err == nil && s.changes[0].old != nil {
			// The kernel may use the old entry's memory for the next one, and retire
			// frees what it points to. A swap of tables waits by itself.
			waitForPrograms()
		}
	} else {
		err = s.publishTables()
	}
	if err != nil {
		return err
	}
	for _, c := range s.changes {
		if c.old != nil && (c.new == nil || c.old.rule.Name != c.new.rule.Name) {
			delete(s.rules, c.old.rule.Name)
		}
		if c.new != nil {
			s.rules[c.new.rule.Name] = c.new
		}
	}
	if kinds := s.Loader.kinds(); kinds != needed {
		s.done = append(s.done, func() error { return s.writeConfig(kinds) })
	}
	return nil
}

// kinds returns the lookup kinds that some rule in force uses.
func (l *Loader) kinds() (kinds uint32) {
	for _, e := range l.rules {
		kinds |= kindOf(e.rule.In)
	}
	return kinds
}

func kindOf(in Input) uint32 {
	switch {
	case in.Group.Is4() && in.Source.IsValid():
		return uint32(bpf.RelayLookupKindLOOKUP_SOURCE4)
	case in.Group.Is4():
		return uint32(bpf.RelayLookupKindLOOKUP_ANY4)
	case in.Source.IsValid():
		return uint32(bpf.RelayLookupKindLOOKUP_SOURCE6)
	default:
		return uint32(bpf.RelayLookupKindLOOKUP_ANY6)
	}
}

// isSingle says whether one write to the flow table in force does it all.
func (s *sync) isSingle() bool {
	if len(s.changes) != 1 {
		return false
	}
	c := s.changes[0]
	if c.old != nil && c.new != nil {
		return c.old.rule.In.key() == c.new.rule.In.key()
	}
	return c.new == nil || len(s.rules) < int(s.tableOf(c.new.rule.In).MaxEntries())
}

func (s *sync) tableOf(in Input) *ebpf.Map {
	if in.Group.Is4() {
		return s.table4
	}
	return s.table6
}

func (s *sync) publishOne(c change) error {
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

// publishTables builds new flow tables beside those in force and swaps them.
func (s *sync) publishTables() (err error) {
	flows4, flows6, changed4, changed6 := s.flowsAfter()
	if changed4 {
		if err := s.swap(&s.table4, s.maps.FlowTables4, bpf.RelayMapFlowTables4, pinFlows4, flows4); err != nil {
			return err
		}
	}
	if changed6 {
		return s.swap(&s.table6, s.maps.FlowTables6, bpf.RelayMapFlowTables6, pinFlows6, flows6)
	}
	return nil
}

// flowsAfter lists the flow entries of all rules as they will be, and which family
// changes.
func (s *sync) flowsAfter() (flows4, flows6 []flowEntry, changed4, changed6 bool) {
	touched := map[string]bool{}
	add := func(e *entry) {
		f := flowEntry{key: encodeKey(e.rule.In), value: encodeFlow(e)}
		if e.rule.In.Group.Is4() {
			flows4 = append(flows4, f)
		} else {
			flows6 = append(flows6, f)
		}
	}
	for _, c := range s.changes {
		for _, e := range []*entry{c.old, c.new} {
			if e == nil {
				continue
			}
			touched[e.rule.Name] = true
			if e.rule.In.Group.Is4() {
				changed4 = true
			} else {
				changed6 = true
			}
		}
		if c.new != nil {
			add(c.new)
		}
	}
	for name, e := range s.rules {
		if !touched[name] {
			add(e)
		}
	}
	return flows4, flows6, changed4, changed6
}

// swap puts a new flow table into force with one write.
func (s *sync) swap(inForce **ebpf.Map, outer *ebpf.Map, name, pin string, flows []flowEntry) error {
	table, err := s.newTable(name, flows)
	if err != nil {
		return err
	}
	if err := outer.Put(uint32(0), table); err != nil {
		return errors.Join(fmt.Errorf("swap flow table: %w", err), table.Close())
	}
	old := *inForce
	*inForce = table
	path := filepath.Join(s.opts.PinDir, pin)
	back := func() error {
		*inForce = old
		// A clone, since old remembers where it was pinned and would move that pin.
		clone, err := old.Clone()
		if err == nil {
			err = errors.Join(repin(clone, path), clone.Close())
		}
		return errors.Join(outer.Put(uint32(0), old), err, table.Close())
	}
	if err := repin(table, path); err != nil {
		return errors.Join(err, back())
	}
	s.onFailure(back)
	s.done = append(s.done, old.Close)
	return nil
}

// retire frees what only the old rules used, and brings the descriptions of the
// rules up to date.
func (s *sync) retire() error {
	var errs []error
	gone, goneStats := map[uint32]bool{}, map[uint32]bool{}
	for _, c := range s.changes {
		if c.old != nil {
			errs = append(errs, s.retireOne(c, gone, goneStats))
		}
		if c.continues {
			row := encodeRule(c.new)
			errs = append(errs, s.maps.Rules.Put(c.new.id, &row))
		}
	}
	errs = append(errs, s.dropStaleCounters(gone, goneStats))
	for _, fn := range s.done {
		errs = append(errs, fn())
	}
	return errors.Join(errs...)
}

func (s *sync) retireOne(c change, gone, goneStats map[uint32]bool) error {
	old, n := c.old, uint32(len(c.old.rule.Out))
	var errs []error
	if n > 1 {
		errs = append(errs, s.maps.Fanout.Delete(old.first))
		for _, o := range old.rule.Out {
			if o.Ready {
				errs = append(errs, s.releaseSlot(o.Index))
			}
		}
	} else if old.rule.Out[0].Ready {
		errs = append(errs, s.releasePort(old.rule.Out[0].Index))
	}
	s.outputs.give(old.first, n)
	if c.continues {
		return errors.Join(errs...)
	}
	gone[old.id] = true
	for i := range n {
		goneStats[old.firstStats+i] = true
	}
	s.ids.give(old.id)
	s.stats.give(old.firstStats, n)
	return errors.Join(append(errs, s.maps.Rules.Put(old.id, &bpf.RelayRule{}))...)
}

// dropStaleCounters deletes the drop counters of rules and outputs that are no
// more.
func (l *Loader) dropStaleCounters(ids, stats map[uint32]bool) error {
	if len(ids) == 0 && len(stats) == 0 {
		return nil
	}
	var stale []bpf.RelayDropKey
	var key bpf.RelayDropKey
	var values []bpf.RelayCounter
	iter := l.maps.RuleDrops.Iterate()
	for iter.Next(&key, &values) {
		gone := ids
		if bpf.RelayDropScope(key.Scope) == bpf.RelayDropScopeDROP_OUTPUT {
			gone = stats
		}
		if gone[key.Id] {
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
