package loader

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
)

// Flows with a prefix of groups, and a prefix of sources or excluded senders (takesBoth), are
// stored in the prefix tables in two steps. Each prefix of sources that such flows of one
// interface, tags and port name, taken or excluded, belongs to a class: the prefixes that the same
// flows take as a whole. The longest prefix of a packet's source gives the class (PREFIX_CLASS),
// and within the class the longest prefix of groups gives the flow (PREFIX_IN_CLASS).
//
// A flow that takes any sender with exceptions is no more specific than one that takes any: the
// longer prefix of groups decides. So where it contains a flow for any sender, a class has an entry
// of path none, and the lookup kind of any sender finds that flow.

// step says which of the two steps an entry of a prefix table belongs to.
type step uint8

const (
	oneStep step = iota // neither: a prefix of groups, or one of sources and one group
	classStep
	inClassStep
)

// MaxBothEntries is the maximum number of flow table entries, in one address family, of flows with
// both a prefix of groups and one of senders. Only rules that each exclude many different senders
// come near it.
const MaxBothEntries = 1 << 18

// takesBoth says whether a flow is found by prefixes of sources and of groups.
func takesBoth(in flow.Input) bool { return in.BySource && in.Len != 0 }

// countBoth counts the current flows with takesBoth.
func (l *Loader) countBoth(in flow.Input, n int) {
	if takesBoth(in) {
		l.both += n
	}
}

// space is an input without its sources and groups: the scope of classes.
func space(in flow.Input) flow.Input {
	family := netip.IPv4Unspecified()
	if in.Group.Is6() {
		family = netip.IPv6Unspecified()
	}
	in = in.AnySource()
	in.Group, in.Len = family, 0
	return in
}

func groups(in flow.Input) netip.Prefix { return netip.PrefixFrom(in.Group, in.Len) }

// bothFlows are the entries of flows with takesBoth, given those of any sender and a prefix of
// groups.
func bothFlows(entries, anySender []*entry) (flows []flowEntry, err error) {
	type members struct{ both, any []*entry }
	spaces := map[flow.Input]*members{}
	for _, e := range entries {
		for in := range e.rule.In.EveryPort() {
			m := spaces[space(in)]
			if m == nil {
				m = &members{}
				spaces[space(in)] = m
			}
			m.both = append(m.both, e)
		}
	}
	for _, e := range anySender {
		for in := range e.rule.In.EveryPort() {
			if m := spaces[space(in)]; m != nil {
				m.any = append(m.any, e)
			}
		}
	}
	for in, m := range spaces {
		if flows, err = appendClasses(flows, in, m.both, m.any); err != nil {
			return nil, err
		}
	}
	return flows, nil
}

// appendClasses is bothFlows for one space.
func appendClasses(flows []flowEntry, in flow.Input, both, anySender []*entry) ([]flowEntry, error) {
	// In order of precedence.
	slices.SortFunc(both, func(a, b *entry) int {
		return cmp.Or(cmp.Compare(b.rule.In.SourceLen, a.rule.In.SourceLen), cmp.Compare(b.rule.In.Len, a.rule.In.Len))
	})
	points := map[netip.Prefix]bool{}
	for _, e := range both {
		points[e.rule.In.Senders()] = true
		for _, p := range e.rule.Except {
			points[p] = true
		}
	}
	classes := map[string]uint32{} // by the ids of the flows that take it
	for p := range points {
		var taking []*entry
		var name []byte
		for i, e := range both {
			if e.rule.TakesAll(p) {
				taking = append(taking, e)
				name = binary.NativeEndian.AppendUint32(name, uint32(i))
			}
		}
		class, known := classes[string(name)]
		if !known {
			class = uint32(len(classes))
			classes[string(name)] = class
			flows = appendClass(flows, in, class, taking, anySender)
		}
		f := flowEntry{in: in, step: classStep, class: class}
		f.in.BySource, f.in.Source, f.in.SourceLen = true, p.Addr(), p.Bits()
		flows = append(flows, f)
		if len(flows) > MaxBothEntries {
			return nil, fmt.Errorf("%w: rules with prefixes of senders and of groups at once have more than %d entries: leave out fewer senders", ErrFull, MaxBothEntries)
		}
	}
	return flows, nil
}

// appendClass appends the entries of a class: the flows that take its sources, in order of
// precedence.
func appendClass(flows []flowEntry, in flow.Input, class uint32, taking, anySender []*entry) []flowEntry {
	winner := func(p netip.Prefix) *entry {
		for _, e := range taking {
			if flow.Covers(groups(e.rule.In), p) {
				return e
			}
		}
		return nil
	}
	add := func(p netip.Prefix, value bpf.RelayFlow) {
		f := flowEntry{in: in, value: value, step: inClassStep, class: class}
		f.in.Group, f.in.Len = p.Addr(), p.Bits()
		flows = append(flows, f)
	}
	have := map[netip.Prefix]bool{}
	for _, e := range taking {
		if p := groups(e.rule.In); !have[p] {
			have[p] = true
			add(p, encodeFlow(winner(p)))
		}
	}
	for _, e := range anySender {
		p := groups(e.rule.In)
		if e := winner(p); e != nil && e.rule.In.SourceLen == 0 && !have[p] {
			have[p] = true
			add(p, bpf.RelayFlow{})
		}
	}
	return flows
}

// classes are the entries of flows with takesBoth in one space, as read back.
type classes struct {
	sources map[uint32][]netip.Prefix // of each class
	flows   map[uint32][]flowEntry    // in each class
}

// gatherBoth merges all entries of a flow with takesBoth into one. Inconsistent entries are left
// for the caller to detect as damaged.
func gatherBoth(flows []flowEntry) (all []flowEntry) {
	spaces := map[flow.Input]*classes{}
	rules := map[uint32][]flowEntry{}
	for _, f := range flows {
		at := space(f.in)
		c := spaces[at]
		if c == nil {
			c = &classes{map[uint32][]netip.Prefix{}, map[uint32][]flowEntry{}}
			spaces[at] = c
		}
		if f.step == classStep {
			c.sources[f.class] = append(c.sources[f.class], f.in.Senders())
			continue
		}
		c.flows[f.class] = append(c.flows[f.class], f)
		if !isNone(f) {
			rules[f.value.Rule] = append(rules[f.value.Rule], f)
		}
	}
	own := map[uint32]flowEntry{} // of each rule
	for _, id := range sortedKeys(rules) {
		f, ok := gatherSteps(rules[id], spaces)
		if !ok {
			return append(all, rules[id]...)
		}
		own[id] = f
	}
	for _, id := range sortedKeys(own) {
		f := own[id]
		for in := range f.in.EveryPort() {
			f.except = append(f.except, spaces[space(in)].excepted(in, own)...)
		}
		f.except = flow.NormalExcept(f.except)
		if f.in.SourceLen == 0 {
			f.in.Source = netip.Addr{}
		}
		all = append(all, f)
	}
	return all
}

// gatherSteps is the entry of a rule without its excluded senders: with the shortest prefixes,
// which contain all others. It is false if the entries are inconsistent.
func gatherSteps(flows []flowEntry, spaces map[flow.Input]*classes) (one flowEntry, ok bool) {
	anyPort := func(in flow.Input) flow.Input {
		in = space(in)
		in.Port = 0
		return in
	}
	one = flows[0]
	one.step, one.class, one.in.BySource, one.in.SourceLen = oneStep, 0, true, -1
	ports := map[uint16]bool{}
	for _, f := range flows {
		if anyPort(f.in) != anyPort(one.in) || f.value != one.value {
			return one, false
		}
		ports[f.in.Port] = true
		if f.in.Len < one.in.Len {
			one.in.Group, one.in.Len = f.in.Group, f.in.Len
		}
		for _, p := range spaces[space(f.in)].sources[f.class] {
			if one.in.SourceLen < 0 || p.Bits() < one.in.SourceLen {
				one.in.Source, one.in.SourceLen = p.Addr(), p.Bits()
			}
		}
	}
	if one.in.SourceLen < 0 {
		return one, false
	}
	for _, f := range flows {
		if !flow.Covers(groups(one.in), groups(f.in)) {
			return one, false
		}
		for _, p := range spaces[space(f.in)].sources[f.class] {
			if !flow.Covers(one.in.Senders(), p) {
				return one, false
			}
		}
	}
	return one, one.setPorts(ports)
}

// excepted are the source prefixes that a flow excludes, as far as the entries show: those whose
// packets go to a flow over which it takes precedence, or to none. Prefixes taken by a preceding
// flow may have been excluded, too, which makes no difference.
func (c *classes) excepted(in flow.Input, own map[uint32]flowEntry) (except []netip.Prefix) {
	for class, sources := range c.sources {
		taker := flowEntry{in: flow.Input{Len: -1}} // of the flow's groups
		for _, f := range c.flows[class] {
			if flow.Covers(groups(f.in), groups(in)) && f.in.Len > taker.in.Len {
				taker = f
			}
		}
		if !isNone(taker) {
			other := own[taker.value.Rule].in
			if cmp.Or(cmp.Compare(other.SourceLen, in.SourceLen), cmp.Compare(other.Len, in.Len)) >= 0 {
				continue // itself, or a preceding one
			}
		}
		for _, p := range sources {
			if flow.Covers(in.Senders(), p) && p.Bits() != in.SourceLen {
				except = append(except, p)
			}
		}
	}
	return except
}
