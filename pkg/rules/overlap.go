package rules

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"
	"sort"
	"strings"
)

// Before reports whether a gets the packets that both inputs match. An input of one address
// precedes a prefix, then one with a port one for any port, then one that names its source one that
// does not, then the longer of two prefixes of sources, then the longer prefix, then one that names
// its interface a pattern, then the longer pattern: the order in which the kernel's tables are
// searched. Inputs not ordered by this have no packet in common; they are ordered by their values,
// so that Before is a strict total order.
func Before(a, b Input) bool {
	return cmp.Or(
		precedence(a, b),
		a.Address.Compare(b.Address),
		cmp.Compare(a.Port, b.Port),
		a.Source.Compare(b.Source),
		cmp.Compare(a.Interface, b.Interface),
		compareVLAN(a.VLAN, b.VLAN),
		cmp.Compare(a.Len, b.Len),
		cmp.Compare(a.PortTo, b.PortTo),
		first(!a.FromHost, !b.FromHost),
	) < 0
}

// precedence is negative if a precedes b, and 0 if they do not overlap or are equal.
func precedence(a, b Input) int {
	return cmp.Or(
		first(a.Len == 0, b.Len == 0),
		first(a.Port != 0, b.Port != 0),
		cmp.Compare(b.senderBits(), a.senderBits()),
		cmp.Compare(b.Len, a.Len),
		first(!isPattern(a.Interface), !isPattern(b.Interface)),
		comparePattern(a.Interface, b.Interface),
	)
}

// first orders values that have something before those that do not.
func first(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}

// comparePattern orders the longer of two patterns first.
func comparePattern(a, b string) int {
	if !isPattern(a) || !isPattern(b) {
		return 0
	}
	return cmp.Compare(len(b), len(a))
}

func compareVLAN(a, b VLAN) int {
	return cmp.Or(cmp.Compare(a.Outer, b.Outer), cmp.Compare(a.ID, b.ID))
}

// Compare is a total order of inputs for display: by interface, address and port, any port last,
// and overlapping inputs of one interface and address by precedence, ranges of ports by their first
// port. It is 0 only for equal inputs.
func Compare(a, b Input) int {
	return cmp.Or(
		cmp.Compare(a.Interface, b.Interface),
		a.Address.Compare(b.Address),
		first(a.Len == 0, b.Len == 0),
		first(a.Port != 0, b.Port != 0),
		cmp.Compare(a.Port, b.Port),
		precedence(a, b),
		a.Source.Compare(b.Source),
		compareVLAN(a.VLAN, b.VLAN),
		cmp.Compare(a.PortTo, b.PortTo),
		first(!a.FromHost, !b.FromHost),
	)
}

// Overlaps reports whether some packet matches both inputs.
func (in Input) Overlaps(o Input) bool { return in.traffic().overlaps(o.traffic()) }

// Winner returns which of two inputs gets a packet that both match; see Before. It is false if no
// packet matches both.
func Winner(a, b Input) (Input, bool) {
	if !a.Overlaps(b) {
		return Input{}, false
	}
	if Before(b, a) {
		return b, true
	}
	return a, true
}

// Overlap is a rule that matches packets of another rule.
type Overlap struct {
	Rule int  // its index in the set
	Wins bool // it gets the packets that both match
}

// Overlaps lists for each rule of a set which others match some of its packets, at most limit of
// them, in order of precedence. Which ones are omitted beyond the limit is unspecified but
// deterministic. Of rules with the same input, which no valid set has, only the first is listed.
//
// Its running time grows nearly linearly with the number of rules and of listed overlaps.
func Overlaps(rules []Rule, limit int) [][]Overlap {
	set := newSet(rules, nil)
	pool := newInputPool(set.rules, set.inputs, func(int) bool { return true })
	all := make([][]Overlap, len(rules))
	for i, r := range set.rules {
		if limit <= 0 {
			break
		}
		var list []Overlap
		for other := range pool.each(r.In.traffic(), false) {
			if set.origin(other) == set.origin(i) {
				continue
			}
			in := set.rules[other].In
			list = append(list, Overlap{Rule: other, Wins: Before(in, r.In) || in == r.In})
			if len(list) == limit {
				break
			}
		}
		slices.SortFunc(list, func(a, b Overlap) int {
			if Before(set.rules[a.Rule].In, set.rules[b.Rule].In) {
				return -1
			}
			return 1
		})
		for j := range list {
			list[j].Rule = set.origin(list[j].Rule)
		}
		all[set.origin(i)] = mergeOverlaps(all[set.origin(i)], list, limit)
	}
	return all
}

// mergeOverlaps adds the overlaps of another input of a rule, each rule once.
func mergeOverlaps(have, more []Overlap, limit int) []Overlap {
	if have == nil {
		return more
	}
	for _, o := range more {
		if len(have) < limit && !slices.Contains(have, o) {
			have = append(have, o)
		}
	}
	return have
}

// anySource is the input without its source.
func (in Input) anySource() Input {
	in.Source = netip.Addr{}
	return in
}

// exact reports whether a map can find an input: it has one interface, one address, one port, and
// one source or any.
func (in Input) exact() bool {
	return in.Len == 0 && in.Port != 0 && in.PortTo == 0 && in.SourceLen == 0 && !isPattern(in.Interface)
}

// oneAddr is the prefix of one address, invalid for the zero Addr.
func oneAddr(a netip.Addr) netip.Prefix { return Input{Source: a}.Senders() }

func isPattern(iface string) bool {
	_, ok := IsPattern(iface)
	return ok
}

// ifaceCovers reports whether wide matches every name that narrow matches.
func ifaceCovers(wide, narrow string) bool {
	begin, ok := IsPattern(wide)
	name, _ := IsPattern(narrow)
	return wide == narrow || ok && strings.HasPrefix(name, begin)
}

// traffic is a set of packets: all that match an input, or all that an output sends.
type traffic struct {
	iface     string // a name or a pattern
	vlan      VLAN
	prefix    netip.Prefix // destination addresses, masked
	low, high uint16       // destination ports
	source    netip.Prefix // the sources if valid, otherwise:
	fromHost  bool         // packets that this host sends, never those of a rule
	every     bool         // any source, or one that no input names
}

func (in Input) traffic() traffic {
	return traffic{iface: in.Interface, vlan: in.VLAN, prefix: in.Prefix().Masked(), low: in.Port, high: in.lastPort(),
		source: in.Senders().Masked(), every: !in.Source.IsValid(), fromHost: in.FromHost}
}

// exact reports whether every input matches either all of the traffic, ignoring sources, or none of
// it.
func (t traffic) exact() bool {
	return t.low == t.high && t.low != 0 && t.prefix.IsSingleIP() && !isPattern(t.iface)
}

// overlaps reports whether some packet of t matches an input, u.
func (t traffic) overlaps(u traffic) bool {
	return t.fromHost == u.fromHost && t.vlan == u.vlan && t.low <= u.high && u.low <= t.high && meets(t.prefix, u.prefix) &&
		(ifaceCovers(t.iface, u.iface) || ifaceCovers(u.iface, t.iface)) &&
		(u.every || t.every || t.source.Overlaps(u.source))
}

// covers reports whether t contains all packets of u.
func (t traffic) covers(u traffic) bool {
	return t.fromHost == u.fromHost && t.vlan == u.vlan && t.low <= u.low && u.high <= t.high &&
		t.prefix.Bits() <= u.prefix.Bits() && t.prefix.Overlaps(u.prefix) && ifaceCovers(t.iface, u.iface) &&
		(t.every || t.source.IsValid() && u.source.IsValid() && t.source.Bits() <= u.source.Bits() && t.source.Overlaps(u.source))
}

// meet is the intersection; t and u overlap.
func (t traffic) meet(u traffic) traffic {
	if ifaceCovers(t.iface, u.iface) {
		t.iface = u.iface
	}
	if t.prefix.Bits() < u.prefix.Bits() {
		t.prefix = u.prefix
	}
	t.low, t.high = max(t.low, u.low), min(t.high, u.high)
	if u.source.IsValid() && (!t.source.IsValid() || t.source.Bits() < u.source.Bits()) {
		t.source = u.source
	}
	t.every = t.every && u.every
	return t
}

// inputPool finds the inputs of a set that traffic matches: exact ones for exact traffic by maps,
// all others by an index. It is not for concurrent use.
type inputPool struct {
	rules   []Rule
	members []int           // its rules, each with a different input
	inputs  map[Input]int   // all of the set
	sources map[Input][]int // exact inputs that name a source, by Input.anySource
	general *inputIndex     // those that are not exact
	all     *inputIndex     // of all, built on first use
}

func newInputPool(rules []Rule, inputs map[Input]int, has func(rule int) bool) *inputPool {
	p := &inputPool{rules: rules, inputs: inputs, sources: map[Input][]int{}}
	var general []int
	for i, r := range rules {
		if first, ok := inputs[r.In]; !ok || first != i || !has(i) {
			continue
		}
		p.members = append(p.members, i)
		switch {
		case !r.In.exact():
			general = append(general, i)
		case r.In.Source.IsValid():
			p.sources[r.In.anySource()] = append(p.sources[r.In.anySource()], i)
		}
	}
	p.general = newInputIndex(rules, general)
	return p
}

// each yields the rules whose inputs overlap with the traffic, or only those whose inputs cover it.
func (p *inputPool) each(t traffic, cover bool) iter.Seq[int] {
	return func(yield func(int) bool) {
		for i := range p.eachUnlessExcluded(t, cover) {
			if !p.rules[i].excludes(t) && !(cover && len(p.rules[i].Accept.Except()) > 0) && !yield(i) {
				return
			}
		}
	}
}

// eachUnlessExcluded is each, ignoring the senders that rules exclude.
func (p *inputPool) eachUnlessExcluded(t traffic, cover bool) iter.Seq[int] {
	if t.exact() {
		return p.eachOfExact(t, cover)
	}
	if p.all == nil {
		p.all = newInputIndex(p.rules, p.members)
	}
	return p.all.each(t, cover)
}

func (p *inputPool) eachOfExact(t traffic, cover bool) iter.Seq[int] {
	return func(yield func(int) bool) {
		in := Input{Interface: t.iface, Address: t.prefix.Addr(), Port: t.low, VLAN: t.vlan, FromHost: t.fromHost}
		if i, ok := p.inputs[in]; ok && !yield(i) {
			return
		}
		many := t.source.IsValid() && !t.source.IsSingleIP()
		if (t.every || many) && !cover {
			for _, i := range p.sources[in] {
				if (t.every || t.source.Contains(p.rules[i].In.Source)) && !yield(i) {
					return
				}
			}
		}
		if t.source.IsValid() && !many {
			in.Source = t.source.Addr()
			if i, ok := p.inputs[in]; ok && !yield(i) {
				return
			}
		}
		for i := range p.general.each(t, cover) {
			if !yield(i) {
				return
			}
		}
	}
}

// inputIndex finds inputs by their overlap with traffic. An input is in a table of its port and one
// of all ports, each by its source and for all sources, so that nearly everything examined
// overlaps: only port ranges are searched among all ports.
type inputIndex struct {
	rules  []Rule
	ifaces ifaceSet
	tables map[tableKey]*addressTable
}

type tableKey struct {
	iface   string
	vlan    VLAN
	host    bool       // of Input.FromHost
	port    int32      // allPorts, or Input.Port, where 0 is any port
	source  netip.Addr // Input.Source, where the zero Addr is any source
	sources bool       // the table of all sources
	prefix  bool       // the table of prefixes of sources
}

// Numbers of tables for several ports.
const (
	allPorts  = -1
	portRange = -2 // inputs with a range of ports
)

func newInputIndex(rules []Rule, members []int) *inputIndex {
	x := &inputIndex{rules: rules, tables: map[tableKey]*addressTable{}}
	sorted := make([]addressEntry, 0, len(members))
	for _, i := range members {
		if p := rules[i].In.Prefix().Masked(); p.IsValid() {
			sorted = append(sorted, addressEntry{prefix: p, rule: i})
			x.ifaces.add(rules[i].In.Interface)
		}
	}
	slices.SortFunc(sorted, func(a, b addressEntry) int {
		return cmp.Or(comparePrefix(a.prefix, b.prefix), cmp.Compare(a.rule, b.rule))
	})
	for _, e := range sorted {
		in := rules[e.rule].In
		own := int32(in.Port)
		if in.PortTo != 0 {
			own = portRange
		}
		for _, port := range [...]int32{allPorts, own} {
			key := tableKey{iface: in.Interface, vlan: in.VLAN, host: in.FromHost, port: port}
			if key.prefix = in.SourceLen != 0; !key.prefix {
				key.source = in.Source
			}
			x.table(key).add(e)
			key.source, key.sources, key.prefix = netip.Addr{}, true, false
			x.table(key).add(e)
		}
	}
	return x
}

func (x *inputIndex) table(key tableKey) *addressTable {
	t := x.tables[key]
	if t == nil {
		t = &addressTable{}
		x.tables[key] = t
	}
	return t
}

// each is inputPool.each for the inputs of the index.
func (x *inputIndex) each(t traffic, cover bool) iter.Seq[int] {
	return func(yield func(int) bool) {
		for _, iface := range x.ifaces.overlapping(t.iface) {
			if cover && !ifaceCovers(iface, t.iface) {
				continue
			}
			if !x.eachOn(iface, t, cover, yield) {
				return
			}
		}
	}
}

// eachOn yields the inputs with one interface text, and returns false if yield did.
func (x *inputIndex) eachOn(iface string, t traffic, cover bool, yield func(int) bool) bool {
	var portRoom [3]int32
	ports := portRoom[:0]
	switch some := t.low != t.high; { // more than one port
	case some && !cover:
		ports = append(ports, allPorts)
	case some || t.low == 0:
		ports = append(ports, 0, portRange)
	default:
		ports = append(ports, 0, portRange, int32(t.low))
	}
	var sourceRoom [3]tableKey
	sources := sourceRoom[:0]
	switch many := t.source.IsValid() && !t.source.IsSingleIP(); {
	case (t.every || many) && !cover:
		sources = append(sources, tableKey{sources: true})
	case many:
		sources = append(sources, tableKey{}, tableKey{prefix: true})
	case t.source.IsValid():
		sources = append(sources, tableKey{}, tableKey{prefix: true}, tableKey{source: t.source.Addr()})
	default:
		sources = append(sources, tableKey{})
	}
	for _, port := range ports {
		for _, key := range sources {
			key.iface, key.vlan, key.host, key.port = iface, t.vlan, t.fromHost, port
			table := x.tables[key]
			if table == nil {
				continue
			}
			for rule := range table.each(t.prefix, cover) {
				in := &x.rules[rule].In
				if in.Port > t.high || in.lastPort() < t.low || cover && (in.Port > t.low || in.lastPort() < t.high) {
					continue
				}
				if in.Len != 0 && !meets(in.Prefix(), t.prefix) {
					continue
				}
				if s := in.Senders(); !t.every && s.IsValid() && (!s.Overlaps(t.source) || cover && s.Bits() > t.source.Bits()) {
					continue
				}
				if !yield(rule) {
					return false
				}
			}
		}
	}
	return true
}

// addressTable has inputs ordered by prefix, an enclosing one before those in it.
type addressTable struct {
	entries []addressEntry
}

type addressEntry struct {
	prefix netip.Prefix // masked
	rule   int
	up     int // index of the last entry of the next shorter prefix that encloses this one, or -1
}

// comparePrefix orders by address, then the shorter prefix first.
func comparePrefix(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

func encloses(a, b netip.Prefix) bool { return a.Bits() < b.Bits() && a.Contains(b.Addr()) }

// add appends an entry, which must not sort before an existing one.
func (t *addressTable) add(e addressEntry) {
	e.up = len(t.entries) - 1
	for e.up >= 0 && !encloses(t.entries[e.up].prefix, e.prefix) {
		e.up = t.entries[e.up].up
	}
	t.entries = append(t.entries, e)
}

// each yields the rules whose prefixes overlap with p, or only those whose prefixes cover it.
func (t *addressTable) each(p netip.Prefix, cover bool) iter.Seq[int] {
	return func(yield func(int) bool) {
		from := sort.Search(len(t.entries), func(i int) bool { return comparePrefix(t.entries[i].prefix, p) >= 0 })
		for _, e := range t.entries[from:] {
			if !p.Contains(e.prefix.Addr()) || cover && e.prefix != p {
				break
			}
			if !yield(e.rule) {
				return
			}
		}
		for i := from - 1; i >= 0; i = t.entries[i].up {
			if !encloses(t.entries[i].prefix, p) {
				continue
			}
			for same := i; same >= 0 && t.entries[same].prefix == t.entries[i].prefix; same-- {
				if !yield(t.entries[same].rule) {
					return
				}
			}
		}
	}
}

// ifaceSet is a set of interface names and patterns. The zero value is empty. It is not for
// concurrent use.
type ifaceSet struct {
	has    map[string]bool
	sorted []string            // of has, built on first use
	found  map[string][]string // cached results of overlapping
}

func (s *ifaceSet) add(iface string) {
	if s.has == nil {
		s.has, s.found = map[string]bool{}, map[string][]string{}
	}
	s.has[iface] = true
}

// overlapping are the members that match some name which iface also matches. Nothing may be added
// after the first call.
func (s *ifaceSet) overlapping(iface string) []string {
	if len(s.has) == 0 {
		return nil
	}
	list, ok := s.found[iface]
	if !ok {
		list = s.find(iface)
		s.found[iface] = list
	}
	return list
}

func (s *ifaceSet) find(iface string) (list []string) {
	begin, pattern := IsPattern(iface)
	for n := range len(begin) + 1 { // patterns that cover it
		if p := begin[:n] + "+"; s.has[p] && p != iface {
			list = append(list, p)
		}
	}
	if !pattern {
		if s.has[iface] {
			list = append(list, iface)
		}
		return list
	}
	if s.sorted == nil {
		for member := range s.has {
			s.sorted = append(s.sorted, member)
		}
		slices.Sort(s.sorted)
	}
	from := sort.SearchStrings(s.sorted, begin)
	for _, member := range s.sorted[from:] { // members that it covers
		if !strings.HasPrefix(member, begin) {
			break
		}
		list = append(list, member)
	}
	return list
}
