package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// MrouteMain is the kernel's default table of multicast routes.
const MrouteMain uint32 = 0

// Mroute selects which multicast routes of the kernel are mirrored. The zero Mroute selects all of
// the default table.
type Mroute struct {
	// Tables are table ids, MrouteMain included; none means only MrouteMain.
	Tables []uint32
	// IPv4 and IPv6 select the families; neither means both.
	IPv4, IPv6 bool
	// Interfaces are the interfaces, or patterns ("eth+"), that a route may use; none means any.
	Interfaces []string
	// Groups are the prefixes that must contain a route's group; none means any.
	Groups []netip.Prefix
	// Leave are prefixes of groups that stay with the kernel.
	Leave []netip.Prefix
	// TakeJoined also takes groups that a program on this host has joined on the input: it then
	// receives none of their packets.
	TakeJoined bool
}

// mrouteKeys are the keys of Mroute.Set, in the order of a file.
var mrouteKeys = []string{"tables", "families", "interfaces", "groups", "leave", "joined"}

// Values of the key "joined".
const (
	joinedLeave = "leave"
	joinedTake  = "take"
)

// Families returns which families are mirrored.
func (m *Mroute) Families() (ipv4, ipv6 bool) {
	both := m.IPv4 == m.IPv6
	return m.IPv4 || both, m.IPv6 || both
}

// HasTables returns the tables, at least one.
func (m *Mroute) HasTables() []uint32 {
	if len(m.Tables) == 0 {
		return []uint32{MrouteMain}
	}
	return m.Tables
}

// Set sets one value of a key of the mroute section. Call it once per value. The error is a
// *FieldError.
func (m *Mroute) Set(key, value string) error {
	want, again := "", false
	switch key {
	case "tables":
		table := uint64(MrouteMain)
		if value != "main" {
			var err error
			if table, err = strconv.ParseUint(value, 10, 32); err != nil || table == 0 {
				want = "main, or a number from 1 to 4294967295"
				break
			}
		}
		m.Tables, again = addNew(m.Tables, uint32(table))
	case "families":
		switch value {
		case "ipv4":
			m.IPv4, again = true, m.IPv4
		case "ipv6":
			m.IPv6, again = true, m.IPv6
		default:
			want = "ipv4 or ipv6"
		}
	case "interfaces":
		if want = interfaceFault(value); want == "" {
			m.Interfaces, again = addNew(m.Interfaces, value)
		}
	case "groups", "leave":
		prefix, ok := groupPrefix(value)
		switch {
		case !ok:
			want = "a prefix of multicast groups, such as 239.1.0.0/16, or a group"
		case key == "groups":
			m.Groups, again = addNew(m.Groups, prefix)
		default:
			m.Leave, again = addNew(m.Leave, prefix)
		}
	case "joined":
		switch value {
		case joinedLeave, joinedTake:
			m.TakeJoined = value == joinedTake
		default:
			want = joinedLeave + " or " + joinedTake
		}
	default:
		return &FieldError{Field: "mroute", Value: key, Want: "one of " + strings.Join(mrouteKeys, ", ")}
	}
	if again {
		want = "each value once"
	}
	if want != "" {
		return &FieldError{Field: "mroute." + key, Value: value, Want: want}
	}
	return nil
}

// addNew appends a value; again reports a duplicate.
func addNew[V comparable](all []V, value V) (_ []V, again bool) {
	if slices.Contains(all, value) {
		return all, true
	}
	return append(all, value), false
}

// groupPrefix parses a prefix of groups; a single group has its full length.
func groupPrefix(text string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(text)
	if addr, e := netip.ParseAddr(text); e == nil && addr.Zone() == "" {
		p, err = netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	return p, err == nil && p.Addr().IsMulticast() && !p.Addr().Is4In6() && p == p.Masked()
}

// Validate reports contradictory settings. The error is a *FieldError.
func (m *Mroute) Validate() error {
	ipv4, ipv6 := m.Families()
	for _, list := range []struct {
		field string
		all   []netip.Prefix
	}{{"mroute.groups", m.Groups}, {"mroute.leave", m.Leave}} {
		for _, p := range list.all {
			switch {
			case p.Addr().Is4() && !ipv4:
				return &FieldError{Field: list.field, Value: p.String(), Want: "IPv6 groups: families has only ipv6", Err: ErrFamily}
			case p.Addr().Is6() && !ipv6:
				return &FieldError{Field: list.field, Value: p.String(), Want: "IPv4 groups: families has only ipv4", Err: ErrFamily}
			}
		}
	}
	return nil
}

// Left says why a route of a group with interfaces of these names is not selected; "" if it is.
func (m *Mroute) Left(group netip.Addr, interfaces []string) string {
	in := func(all []netip.Prefix) bool {
		return slices.ContainsFunc(all, func(p netip.Prefix) bool { return p.Contains(group) })
	}
	switch {
	case len(m.Groups) > 0 && !in(m.Groups):
		return "its group is in none of the mirrored prefixes"
	case in(m.Leave):
		return "its group is in a prefix left to the kernel"
	}
	for _, name := range interfaces {
		if !m.Names(name) {
			return fmt.Sprintf("interface %s is not mirrored", name)
		}
	}
	return ""
}

// Names says whether a route may have an interface.
func (m *Mroute) Names(ifname string) bool {
	return len(m.Interfaces) == 0 || slices.ContainsFunc(m.Interfaces, func(i string) bool { return ifaceCovers(i, ifname) })
}

// Equal says whether two settings are the same; nil mirrors nothing.
func (m *Mroute) Equal(o *Mroute) bool {
	if m == nil || o == nil {
		return m == o
	}
	m4, m6 := m.Families()
	o4, o6 := o.Families()
	return m4 == o4 && m6 == o6 && m.TakeJoined == o.TakeJoined && sameSet(m.HasTables(), o.HasTables()) &&
		sameSet(m.Interfaces, o.Interfaces) && sameSet(m.Groups, o.Groups) && sameSet(m.Leave, o.Leave)
}

// sameSet compares lists without duplicates, in any order.
func sameSet[V comparable](a, b []V) bool {
	return len(a) == len(b) && !slices.ContainsFunc(a, func(v V) bool { return !slices.Contains(b, v) })
}

// AppendMroute appends the mroute section to the end of a file; nothing for nil. ParseConfig parses
// it.
func AppendMroute(b []byte, m *Mroute) []byte {
	if m == nil {
		return b
	}
	var keys []byte
	list := func(key string, values []string) {
		if len(values) == 0 {
			return
		}
		keys = append(append(append(keys, "  "...), key...), ":\n"...)
		for _, v := range values {
			keys = append(append(append(keys, "    - "...), strconv.Quote(v)...), '\n')
		}
	}
	var tables, families []string
	for _, t := range m.Tables {
		tables = append(tables, MrouteTable(t))
	}
	if ipv4, ipv6 := m.Families(); !ipv4 || !ipv6 {
		families = []string{map[bool]string{true: "ipv4", false: "ipv6"}[ipv4]}
	}
	list("tables", tables)
	list("families", families)
	list("interfaces", m.Interfaces)
	list("groups", texts(m.Groups))
	list("leave", texts(m.Leave))
	if m.TakeJoined {
		keys = append(keys, "  joined: "+joinedTake+"\n"...)
	}
	if len(keys) == 0 {
		return append(b, "mroute: {}\n"...)
	}
	return append(append(b, "mroute:\n"...), keys...)
}

// MrouteTable formats a table id.
func MrouteTable(t uint32) string {
	if t == MrouteMain {
		return "main"
	}
	return strconv.FormatUint(uint64(t), 10)
}

func texts(all []netip.Prefix) (out []string) {
	for _, p := range all {
		out = append(out, p.String())
	}
	return out
}

// mrouteSection is the section of a file, with the line that it begins at.
type mrouteSection struct {
	Mroute
	line  int
	lines map[string]int // line of each key, by field
}

// mroute parses the section.
func (p *fileParser) mroute(n *yaml.Node) {
	if n.Kind != yaml.MappingNode {
		p.fault(n.Line, fmt.Errorf("mroute: want a mapping (%s), or {} for all routes, not %s", strings.Join(mrouteKeys, ", "), kindOf(n)))
		return
	}
	s := &mrouteSection{line: n.Line, lines: map[string]int{}}
	before := len(p.faults) + p.hidden
	for i, value := range p.mapping(n, "", mrouteKeys...) {
		if value != nil {
			s.lines["mroute."+mrouteKeys[i]] = value.Line
			p.mrouteKey(s, mrouteKeys[i], value)
		}
	}
	if len(p.faults)+p.hidden == before {
		if err := s.Validate(); err != nil {
			p.fault(s.lines[err.(*FieldError).Field], err)
		}
	}
	p.routes = s
}

// mrouteKey parses the values of a key.
func (p *fileParser) mrouteKey(s *mrouteSection, key string, n *yaml.Node) {
	items := []*yaml.Node{n}
	if n.Kind == yaml.SequenceNode && key != "joined" {
		items = n.Content
	}
	if len(items) == 0 {
		p.fault(n.Line, fmt.Errorf("mroute.%s: want at least one value: without the key all are taken", key))
	}
	for _, item := range items {
		text, ok := textOf(item)
		if !ok || isNull(item) {
			p.fault(item.Line, fmt.Errorf("mroute.%s: want text, not %s", key, kindOf(item)))
		} else if err := s.Set(key, text); err != nil {
			p.fault(item.Line, err)
		}
	}
}

// routes is the file with the mroute section; nil if none has it.
func (s *fileSet) routes() (first *fileParser) {
	for _, p := range s.files {
		switch {
		case p.routes == nil:
		case first == nil:
			first = p
		default:
			p.fault(p.routes.line, fmt.Errorf("mroute: given already in %s:%d: want it once", bounded(first.name), first.routes.line))
		}
	}
	return first
}

// refuseRoutes reports mroute sections where only rules are accepted.
func (s *fileSet) refuseRoutes() {
	for _, p := range s.files {
		if p.routes != nil {
			p.fault(p.routes.line, fmt.Errorf("mroute: want only rules here: it belongs in the file of xdpcast run"))
		}
	}
}
