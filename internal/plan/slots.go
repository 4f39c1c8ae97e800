package plan

import (
	"cmp"
	"fmt"
	"net/netip"

	"xdpcast/internal/network"
	"xdpcast/pkg/rules"
)

// slot is one output of a flow before it is resolved: an output of the rule on one interface.
type slot struct {
	out    int // index of the output in the rule
	ifname string
	link   *network.Link // nil while it is absent
}

// slotsOf expands the outputs of a rule with packets from an input link: a pattern into one slot
// for each link, by name. The reason names omitted outputs that a user may miss. The slots are
// valid until the next call.
func (m *maker) slotsOf(rule *rules.Rule, in *network.Link) (slots []slot, reason string) {
	slots = m.scratch[:0]
	for number := range rule.Out {
		o := &rule.Out[number]
		if !isPattern(o.Interface) {
			s := slot{out: number, ifname: o.Interface, link: m.net.Link(o.Interface)}
			if s.link != nil {
				s.ifname = s.link.Name
				if same := sameOutput(rule, slots, s, o); same >= 0 {
					reason = cmp.Or(reason, fmt.Sprintf("interface %s is known by several names: out[%d] sends the same there", s.link.Name, same))
					continue
				}
			}
			slots = append(slots, s)
			continue
		}
		found := false
		for _, l := range m.matching(o.Interface) {
			if m.namedElsewhere(rule, number, l) || l.Index == in.Index && feeds(rule, o, in) {
				continue
			}
			found = true
			slots = append(slots, slot{out: number, ifname: l.Name, link: l})
		}
		if !found {
			reason = cmp.Or(reason, fmt.Sprintf("no interface matches %s", o.Interface))
		}
	}
	if len(slots) > rules.MaxOutputs {
		reason = fmt.Sprintf("%d outputs after expanding the patterns: only the first %d are served, up to %s", len(slots), rules.MaxOutputs, slots[rules.MaxOutputs-1].ifname)
		slots = slots[:rules.MaxOutputs]
	}
	m.scratch = slots
	return slots, reason
}

// sameOutput is an earlier output that sends the same on the same link under another name; -1 if
// there is none.
func sameOutput(rule *rules.Rule, slots []slot, s slot, o *rules.Output) int {
	for i := range slots {
		p := &rule.Out[slots[i].out]
		if slots[i].link == s.link && p.Interface != o.Interface && !isPattern(p.Interface) && sameDestination(p, o) && sameWrittenTags(p, o) {
			return slots[i].out
		}
	}
	return -1
}

func sameDestination(a, b *rules.Output) bool {
	return a.Address == b.Address && a.Len == b.Len && a.PortMode == b.PortMode && a.Port == b.Port && a.PortShift == b.PortShift
}

func sameWrittenTags(a, b *rules.Output) bool {
	return a.Policy.VLAN == b.Policy.VLAN && a.Policy.VLANTags == b.Policy.VLANTags
}

// namedElsewhere says whether another output of the rule that sends the same covers a link: by one
// of its names, or by a longer pattern.
func (m *maker) namedElsewhere(rule *rules.Rule, number int, l *network.Link) bool {
	o := &rule.Out[number]
	for other := range rule.Out {
		p := &rule.Out[other]
		if other == number || !sameDestination(p, o) {
			continue
		}
		if !isPattern(p.Interface) {
			if m.net.Link(p.Interface) == l {
				return true
			}
			continue
		}
		if matches(p.Interface, l.Name) && len(p.Interface) > len(o.Interface) {
			return true
		}
	}
	return false
}

// feeds says whether an output on the input's own link could send packets that the input takes, if
// they came back.
func feeds(rule *rules.Rule, o *rules.Output, in *network.Link) bool {
	return !rule.Accept.AllowLoop && sameAddresses(rule.In, o) && samePorts(rule.In, o) && sameTags(rule.In, o) && sameSource(rule.In, o, in)
}

func sameAddresses(in rules.Input, o *rules.Output) bool {
	return in.Prefix().Overlaps(prefixOf(o.Address, o.Len))
}

func prefixOf(addr netip.Addr, length uint8) netip.Prefix {
	return rules.Input{Address: addr, Len: length}.Prefix()
}

func samePorts(in rules.Input, o *rules.Output) bool {
	switch {
	case in.Port == 0 || o.PortMode == rules.PortKeep:
		return true
	case o.PortMode == rules.PortAdd || in.PortTo != 0:
		return o.PortsMeet(in) // a port and another, or ranges that may overlap
	default:
		return o.Port == in.Port
	}
}

func sameTags(in rules.Input, o *rules.Output) bool {
	switch o.Policy.VLAN {
	case rules.VLANPop:
		return in.VLAN == rules.VLAN{}
	case rules.VLANSet:
		return in.VLAN == o.Policy.VLANTags
	default:
		return true
	}
}

func sameSource(in rules.Input, o *rules.Output, l *network.Link) bool {
	switch {
	case !in.Source.IsValid():
		return true
	case o.Policy.Source == rules.SourceAddress:
		return in.Senders().Contains(o.Policy.SourceAddr)
	case o.Policy.Source == rules.SourceInterface:
		addr, ok := sourceTo(l, o.Address)
		return ok && in.Senders().Contains(addr)
	default:
		return true
	}
}

// sourceTo is the source address of an output with src=iface on a link: for an IPv6 link-local
// group the link's own (RFC 6724 section 5, rule 2), otherwise the link's first.
func sourceTo(l *network.Link, dst netip.Addr) (netip.Addr, bool) {
	if dst.Is6() && rules.LinkScope(dst) {
		for _, a := range l.Addrs {
			if a.Is6() && a.IsLinkLocalUnicast() {
				return a, true
			}
		}
	}
	return l.FirstAddr(dst.Is4())
}
