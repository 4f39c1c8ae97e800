package loader

import (
	"cmp"
	"net/netip"
	"slices"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
)

// A rule with a range of ports has a flow table entry for each port. Rules with source prefixes
// (Input.BySource) are entries of the prefix tables with the longest prefix over the source. Each
// prefix that such rules of a group and port name, taken or excluded, is an entry that says which
// of them gets it, or that none does: so the longest prefix gives the correct answer, whatever the
// rules exclude.

// sourceFlows are the entries of rules with BySource and one group.
func sourceFlows(entries []*entry) (flows []flowEntry) {
	groups := map[flow.Input][]*entry{} // by all fields except the sources
	for _, e := range entries {
		for in := range e.rule.In.EveryPort() {
			groups[in.AnySource()] = append(groups[in.AnySource()], e)
		}
	}
	for in, members := range groups {
		// The longest prefix takes precedence.
		slices.SortFunc(members, func(a, b *entry) int { return cmp.Compare(b.rule.In.SourceLen, a.rule.In.SourceLen) })
		points := map[netip.Prefix]bool{}
		for _, e := range members {
			points[e.rule.In.Senders()] = true
			for _, p := range e.rule.Except {
				points[p] = true
			}
		}
		for p := range points {
			f := flowEntry{in: in}
			f.in.BySource, f.in.Source, f.in.SourceLen = true, p.Addr(), p.Bits()
			for _, e := range members {
				if e.rule.TakesAll(p) {
					f.value = encodeFlow(e)
					break
				}
			}
			flows = append(flows, f)
		}
	}
	return flows
}

// gather merges all entries of a rule into one. Inconsistent entries are left for the caller to
// detect as damaged.
func gather(flows []flowEntry) []flowEntry {
	count := map[uint32]int{}
	several := false
	for i := range flows {
		f := &flows[i]
		if f.step != oneStep {
			several = true
			continue
		}
		if f.in.BySource {
			several = true
			continue
		}
		count[f.value.Rule]++
		several = several || count[f.value.Rule] > 1
	}
	if !several {
		return flows
	}
	var all []flowEntry
	rules := map[uint32][]flowEntry{}
	sources := map[flow.Input][]flowEntry{} // entries of source prefixes, by all other fields
	var both []flowEntry
	for _, f := range flows {
		if f.step != oneStep {
			both = append(both, f)
			continue
		}
		if f.in.BySource {
			sources[f.in.AnySource()] = append(sources[f.in.AnySource()], f)
		}
		switch {
		case f.in.BySource && isNone(f):
		case f.in.BySource || count[f.value.Rule] > 1:
			rules[f.value.Rule] = append(rules[f.value.Rule], f)
		default:
			all = append(all, f)
		}
	}
	for _, id := range sortedKeys(rules) {
		all = append(all, gatherRule(rules[id], sources)...)
	}
	return append(all, gatherBoth(both)...)
}

func isNone(f flowEntry) bool { return bpf.RelayRulePath(f.value.Path) == bpf.RelayRulePathPATH_NONE }

func sortedKeys[V any](m map[uint32]V) []uint32 {
	keys := make([]uint32, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

// gatherRule is gather for the entries of one rule.
func gatherRule(flows []flowEntry, sources map[flow.Input][]flowEntry) []flowEntry {
	withoutPort := func(in flow.Input) flow.Input {
		if in.BySource {
			in.Source, in.SourceLen = netip.Addr{}, 0
		}
		in.Port = 0
		return in
	}
	one := flows[0]
	ports := map[uint16]bool{}
	for _, f := range flows {
		if withoutPort(f.in) != withoutPort(one.in) || f.value != one.value {
			return flows
		}
		if ports[f.in.Port] && !f.in.BySource {
			return flows
		}
		ports[f.in.Port] = true
	}
	for _, f := range flows {
		if f.in.SourceLen < one.in.SourceLen {
			one.in = f.in
		}
	}
	if !one.setPorts(ports) {
		return flows
	}
	if one.in.BySource {
		one.except = excepted(one, sources)
		if one.in.SourceLen == 0 {
			one.in.Source = netip.Addr{}
		}
	}
	return []flowEntry{one}
}

// setPorts merges entries of these ports into one, and returns false if they are not a range.
func (f *flowEntry) setPorts(ports map[uint16]bool) bool {
	first, last := f.in.Port, f.in.Port
	for port := range ports {
		first, last = min(first, port), max(last, port)
	}
	f.in.Port, f.in.PortTo = first, 0
	if last > first {
		f.in.PortTo = last
	}
	return int(last-first)+1 == len(ports)
}

// excepted are the sources that a rule excludes, as far as the entries of all its ports show: those
// of its prefix that go to a shorter prefix's rule, or to none. Sources taken by a longer prefix's
// rule may have been excluded, too, which makes no difference.
func excepted(f flowEntry, sources map[flow.Input][]flowEntry) (except []netip.Prefix) {
	own := f.in.Senders()
	for in := range f.in.EveryPort() {
		entries := sources[in.AnySource()]
		shortest := map[uint32]int{} // prefix of each rule
		for _, e := range entries {
			if bits, ok := shortest[e.value.Rule]; !isNone(e) && (!ok || e.in.SourceLen < bits) {
				shortest[e.value.Rule] = e.in.SourceLen
			}
		}
		for _, e := range entries {
			p := e.in.Senders()
			if flow.Covers(own, p) && p != own && (isNone(e) || shortest[e.value.Rule] < own.Bits()) {
				except = append(except, p)
			}
		}
	}
	return flow.NormalExcept(except)
}

// unpublish deletes the entries of a rule from its flow table.
func (l *Loader) unpublish(e *entry) error {
	if e.rule.In.IsOne() {
		return l.tableOf(e.rule.In).Delete(encodeKey(e.rule.In))
	}
	table := l.tableOf(e.rule.In)
	flows, err := readKind(kindOf(e.rule.In), table)
	if err != nil {
		return err
	}
	for _, f := range flows {
		if f.value.Rule == e.id && !isNone(f) {
			if err := table.Delete(f.key()); err != nil {
				return err
			}
		}
	}
	return nil
}
