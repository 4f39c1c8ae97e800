package forward

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/account"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// Set holds the rules of a path, and the state that its workers share. Its methods may
// be called from any goroutine.
type Set struct {
	workers   int
	start     time.Time
	fragments *fragments
	accounts  Accounts
	path      flow.Path
	matches   account.Kind // as which a packet that reaches a worker is counted
	guard     *packet.Guard
	ownMACs   atomic.Pointer[map[[6]byte]struct{}]
	taps      *Taps

	mu      sync.Mutex
	numbers uint32 // last id given to a rule, for the guard
	table   *Table
	given   given
	engines []*Engine
}

// NewSet makes a set without rules, for inputs with so many workers each; it counts in its
// own memory.
func NewSet(workers int) *Set { return newSet(flow.PathFanout, workers, nil, nil) }

func newSet(path flow.Path, workers int, accounts Accounts, taps *Taps) *Set {
	now := time.Now()
	var clock unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &clock) // cannot fail for this clock
	s := &Set{
		workers:   max(1, workers),
		start:     now.Add(-time.Duration(clock.Nano())),
		fragments: newFragments(),
		guard:     &packet.Guard{Secret: rand.Uint32()},
		table:     &Table{},
		accounts:  accountsOr(accounts),
		path:      path,
		taps:      cmp.Or(taps, &Taps{}),
		matches:   account.Matched,
	}
	if path == flow.PathAFXDP {
		s.matches = account.Delivered
	}
	return s
}

// Clock converts t to the time that engines take for packets: nanoseconds of
// CLOCK_MONOTONIC.
func (s *Set) Clock(t time.Time) int64 { return int64(t.Sub(s.start)) }

// NewEngine adds an engine for the rules of one input interface. worker, from 0,
// is different for each engine of an input. open opens a sender on an interface, in
// the goroutine that calls Update. Call Remove when the engine's goroutine has ended.
func (s *Set) NewEngine(input, worker int, open func(index int) (Sender, error)) (*Engine, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if worker < 0 || worker >= s.workers {
		return nil, fmt.Errorf("worker %d: want 0 to %d", worker, s.workers-1)
	}
	e := &Engine{
		set: s, input: input, worker: worker, open: open,
		writer: account.WriterOf(uint8(s.path), worker),
		global: s.accounts.Account().Open(account.Target{Scope: account.Total}),
	}
	// It has no senders before the next Update, and therefore no rules.
	e.next.Store(&view{table: &Table{}})
	s.engines = append(s.engines, e)
	return e, nil
}

// Remove closes the senders of an engine, which must no longer be used.
func (s *Set) Remove(e *Engine) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := slices.Index(s.engines, e)
	if at < 0 {
		return nil
	}
	s.engines = slices.Delete(s.engines, at, at+1)
	return errors.Join(closeQueues(e.next.Load().queues, nil), e.global.Close())
}

// Update makes the rules exactly want; own are the host's unicast addresses, whose
// packets are loops. firstOutputs is for paths that look rules up by
// Table.ByFirstOutput: the number by rule name, nil elsewhere. Rules that stay keep
// their counters, even with other addresses.
//
// It opens a sender for each interface without one; if the interface does not exist,
// copies for it are dropped with reason NoDevice until the next Update. On an error
// nothing changes. Errors to match: *loader.RuleError.
func (s *Set) Update(want []flow.Flow, own []netip.Addr, firstOutputs map[string]uint32) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.holds(want, own, firstOutputs) {
		return nil
	}
	table, err := s.newTable(want, own, firstOutputs)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, table.closeCounters(s.table))
		}
	}()
	s.number(table)
	views := make([]*view, len(s.engines))
	for i, e := range s.engines {
		if views[i], err = e.view(s.table, table); err != nil {
			for j := range views[:i+1] {
				if views[j] != nil {
					err = errors.Join(err, closeQueues(views[j].queues, s.engines[j].next.Load().queues))
				}
			}
			return err
		}
	}
	old := make([]*view, len(s.engines))
	for i, e := range s.engines {
		old[i] = e.next.Swap(views[i])
	}
	before := s.table
	s.forget(s.table, table)
	s.table = table
	s.given = given{cloneRules(want), slices.Clone(own), maps.Clone(firstOutputs)}
	for i, e := range s.engines {
		e.settle()
		// Errors are ignored: close(2) frees the descriptor even if it fails.
		_ = closeQueues(old[i].queues, views[i].queues)
	}
	_ = before.closeCounters(table) // cannot fail: in memory, and not closed yet
	return nil
}

// closeCounters closes the counters of the rules, except those shared with another
// table.
func (t *Table) closeCounters(other *Table) error {
	stays := make(map[*account.RuleCounters]bool, len(other.rules))
	for _, r := range other.rules {
		stays[r.open] = true
	}
	var errs []error
	for _, r := range t.rules {
		if !stays[r.open] {
			errs = append(errs, r.open.Close())
		}
	}
	return errors.Join(errs...)
}

// close closes the counters of all rules; no engine may be left.
func (s *Set) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.table.closeCounters(&Table{})
	s.table, s.given = &Table{}, given{}
	return err
}

// settle waits until all current batches have ended.
func (s *Set) settle() {
	s.mu.Lock()
	engines := slices.Clone(s.engines)
	s.mu.Unlock()
	for _, e := range engines {
		e.idle()
	}
}

// given holds the arguments from which the table was made.
type given struct {
	rules        []flow.Flow
	own          []netip.Addr
	firstOutputs map[string]uint32
}

// has says whether these are the rules and addresses.
func (g *given) has(rules []flow.Flow, own []netip.Addr) bool {
	return slices.Equal(own, g.own) && slices.EqualFunc(rules, g.rules, equal)
}

// cloneRules copies the rules, since the caller may change its own later.
func cloneRules(rules []flow.Flow) []flow.Flow {
	rules = slices.Clone(rules)
	for i := range rules {
		rules[i].Out = slices.Clone(rules[i].Out)
	}
	return rules
}

// holds says whether the table and all engines are up to date.
func (s *Set) holds(rules []flow.Flow, own []netip.Addr, firstOutputs map[string]uint32) bool {
	if !maps.Equal(firstOutputs, s.given.firstOutputs) || !s.given.has(rules, own) {
		return false
	}
	for _, e := range s.engines {
		if !e.complete(s.table) {
			return false
		}
	}
	return true
}

func equal(a, b flow.Flow) bool {
	return a.Name == b.Name && a.In == b.In && a.AllowLoop == b.AllowLoop && a.Unguarded == b.Unguarded && a.TwoWay == b.TwoWay && a.Fronted == b.Fronted && a.Broadcast == b.Broadcast && slices.Equal(a.Except, b.Except) &&
		a.AllowNoChecksum == b.AllowNoChecksum && a.Rate == b.Rate && slices.Equal(a.Out, b.Out)
}

// complete says whether the engine uses this table and has all senders for it.
func (e *Engine) complete(table *Table) bool {
	v := e.next.Load()
	if v.table != table {
		return false
	}
	for i, used := range table.devicesOf(e.input) {
		if used && (v.queues[i] == nil || !v.queues[i].usable()) {
			return false
		}
	}
	return true
}

// view makes the engine's view for a table, reusing its queues and opening new ones.
func (e *Engine) view(before, table *Table) (*view, error) {
	v := &view{table: table, queues: make([]*queue, len(table.devices))}
	current := e.next.Load()
	used := table.devicesOf(e.input)
	for i, index := range table.devices {
		if !used[i] {
			continue
		}
		if at := slices.Index(before.devices, index); at >= 0 && at < len(current.queues) && current.queues[at] != nil && current.queues[at].usable() {
			v.queues[i] = current.queues[at]
			v.open++
			continue
		}
		sender, err := e.open(index)
		if errors.Is(err, unix.ENODEV) {
			continue
		}
		if err != nil {
			return v, &loader.RuleError{Rule: table.user(e.input, i), Err: err}
		}
		v.queues[i] = newQueue(sender)
		v.queues[i].index = index
		v.open++
	}
	return v, nil
}

// closeQueues closes the queues that are not in others.
func closeQueues(queues, others []*queue) error {
	var errs []error
	for _, q := range queues {
		if q != nil && !slices.Contains(others, q) {
			errs = append(errs, q.sender.Close())
		}
	}
	return errors.Join(errs...)
}

func (s *Set) newTable(want []flow.Flow, own []netip.Addr, firstOutputs map[string]uint32) (_ *Table, err error) {
	t := &Table{own: map[netip.Addr]struct{}{}, byFirst: map[uint32]*Rule{}}
	for _, a := range own {
		t.own[a.Unmap().WithZone("")] = struct{}{}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.closeCounters(s.table))
		}
	}()
	old := make(map[string]*Rule, len(s.table.rules))
	for _, r := range s.table.rules {
		old[r.rule.Name] = r
	}
	names, inputs := map[string]bool{}, map[flow.Input]string{}
	devices := map[int]int{}
	for i := range want {
		if err := want[i].Normalized().Check(); err != nil {
			return nil, &loader.RuleError{Rule: want[i].Name, Err: err}
		}
		in := want[i].Normalized().In.Key()
		if names[want[i].Name] {
			return nil, &loader.RuleError{Rule: want[i].Name, Err: errors.New("name is used twice")}
		}
		for in := range in.EveryPort() {
			if other, ok := inputs[in]; ok {
				return nil, &loader.RuleError{Rule: want[i].Name, Err: fmt.Errorf("has the same input as rule %s", other)}
			}
			inputs[in] = want[i].Name
		}
		r := s.newRule(want[i], old[want[i].Name])
		names[r.rule.Name] = true
		for slot := range r.out {
			o := &r.out[slot]
			if !o.Ready {
				continue
			}
			at, ok := devices[o.Index]
			if !ok {
				at = len(t.devices)
				devices[o.Index] = at
				t.devices = append(t.devices, o.Index)
			}
			o.device = at
		}
		t.add(r)
		if first, ok := firstOutputs[r.rule.Name]; ok {
			t.byFirst[first] = r
		}
	}
	slices.SortFunc(t.rules, func(a, b *Rule) int { return strings.Compare(a.rule.Name, b.rule.Name) })
	return t, nil
}

// number gives each new rule an id.
func (s *Set) number(t *Table) {
	for _, r := range t.rules {
		if r.number == 0 {
			s.numbers++
			r.number = s.numbers
		}
	}
}

// forget makes the guard forget removed rules.
func (s *Set) forget(before, now *Table) {
	stays := make(map[uint32]bool, len(now.rules))
	for _, r := range now.rules {
		stays[r.number] = true
	}
	gone := map[uint32]bool{}
	for _, r := range before.rules {
		if !stays[r.number] {
			gone[r.number] = true
		}
	}
	s.guard.Forget(gone)
}

func (t *Table) add(r *Rule) {
	t.rules = append(t.rules, r)
	in := r.rule.In
	if in.Group.Is4() {
		var source [4]byte
		if in.Source.IsValid() {
			source = in.Source.As4()
		}
		t.v4.add(in, in.Group.As4(), source, r)
		return
	}
	var source [16]byte
	if in.Source.IsValid() {
		source = in.Source.As16()
	}
	t.v6.add(in, in.Group.As16(), source, r)
}

// user returns the name of the first rule of an input that sends to a device.
func (t *Table) user(input, device int) string {
	for _, r := range t.rules {
		if r.rule.In.Index == input && slices.ContainsFunc(r.out, func(o output) bool { return o.device == device }) {
			return r.rule.Name
		}
	}
	return ""
}

// devicesOf says to which devices the rules of an input send.
func (t *Table) devicesOf(input int) []bool {
	used := make([]bool, len(t.devices))
	for _, r := range t.rules {
		if r.rule.In.Index != input {
			continue
		}
		for slot := range r.out {
			if device := r.out[slot].device; device >= 0 {
				used[device] = true
			}
		}
	}
	return used
}

// Stats reads the counters of the current rules with these names; nil means all. Each
// is exact; a packet that an engine still holds is matched but not yet sent.
func (s *Set) Stats(names []string) []loader.RuleStats {
	s.mu.Lock()
	table := s.table
	s.mu.Unlock()
	now := s.Clock(time.Now())
	if names == nil {
		all := make([]loader.RuleStats, len(table.rules))
		for i, r := range table.rules {
			all[i] = r.stats(now)
		}
		return all
	}
	all := make([]loader.RuleStats, 0, len(names))
	for _, name := range names {
		at, ok := slices.BinarySearchFunc(table.rules, name, func(r *Rule, name string) int { return strings.Compare(r.rule.Name, name) })
		if ok {
			all = append(all, table.rules[at].stats(now))
		}
	}
	return all
}

func (r *Rule) stats(now int64) loader.RuleStats {
	s := loader.RuleStats{Name: r.rule.Name, LastSeen: -1}
	var sums map[account.Kind]account.Sum
	sums, s.Drops = sentAndDropped(r.open.Rule)
	for _, kind := range []account.Kind{account.Matched, account.Delivered} {
		sum := sums[kind]
		s.Matched.Packets += sum.Packets
		s.Matched.Bytes += sum.Bytes
		if sum.LastSeen != 0 {
			s.LastSeen = time.Duration(max(0, now-int64(sum.LastSeen)))
		}
	}
	for slot := range r.out {
		out := loader.OutputStats{Rule: r.out[slot].Output}
		sums, out.Drops = sentAndDropped(r.open.Outputs[slot])
		out.Sent = loader.Counter{Packets: sums[account.Sent].Packets, Bytes: sums[account.Sent].Bytes}
		s.Outputs = append(s.Outputs, out)
	}
	return s
}

// Fragments returns the numbers of fragments that engines have processed.
func (s *Set) Fragments() (sum loader.Fragments) {
	s.accounts.Account().Each(func(_ account.Target, kind account.Kind, w account.Writer, n account.Sum) {
		if w.Path() != uint8(s.path) {
			return
		}
		var to *loader.Counter
		switch kind {
		case account.FragmentFirst:
			to = &sum.First
		case account.FragmentLater:
			to = &sum.Later
		case account.FragmentOrphan:
			to = &sum.Orphan
		default:
			return
		}
		to.Packets += n.Packets
		to.Bytes += n.Bytes
	})
	return sum
}
