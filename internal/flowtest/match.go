package flowtest

import (
	"net/netip"
	"slices"

	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// Ports are the destination ports of first fragments, for later ones.
type Ports map[datagram]uint16

// datagram identifies the fragments of a datagram.
type datagram struct {
	index       int
	vlan, outer uint16
	id          uint32
	src, dst    netip.Addr
}

func datagramOf(index int, h *packet.Headers) datagram {
	return datagram{index, h.VLAN, h.OuterVLAN, h.FragmentID, h.Src, h.Dst}
}

// Find returns the rule of a parsed frame that arrives on an interface, nil if none matches: the
// most specific one, however it is stored. It records the port of a first fragment that matches a
// rule.
func (p Ports) Find(rules []flow.Flow, index int, frame []byte, h *packet.Headers) *flow.Flow {
	port := h.DstPort
	if h.Part == packet.LaterFragment {
		if port = p[datagramOf(index, h)]; port == 0 {
			return nil
		}
	}
	rule := Match(rules, index, h, port)
	if rule == nil || rule.Unicast() && [6]byte(frame[0:6]) != rule.In.MAC {
		return nil
	}
	if h.Part == packet.FirstFragment {
		p[datagramOf(index, h)] = h.DstPort
	}
	return rule
}

// Match returns the most specific rule of a packet to a port, ignoring MAC addresses.
func Match(rules []flow.Flow, index int, h *packet.Headers, port uint16) (best *flow.Flow) {
	for i := range rules {
		r := &rules[i]
		if !matches(r.In, index, h, port) || slices.ContainsFunc(r.Except, func(p netip.Prefix) bool { return p.Contains(h.Src) }) {
			continue
		}
		if best == nil || rank(r.In) > rank(best.In) {
			best = r
		}
	}
	return best
}

func matches(in flow.Input, index int, h *packet.Headers, port uint16) bool {
	length := in.Len
	if length == 0 {
		length = in.Group.BitLen()
	}
	return in.Index == index && in.VLAN == h.VLAN && in.OuterVLAN == h.OuterVLAN &&
		(in.Port == 0 || in.Port <= port && port <= max(in.Port, in.PortTo)) &&
		(!in.Source.IsValid() || in.Source == h.Src || in.SourceLen != 0 && netip.PrefixFrom(in.Source, in.SourceLen).Contains(h.Src)) &&
		netip.PrefixFrom(in.Group, length).Contains(h.Dst) && (in.Len == 0 || !ofOneLink(h.Dst))
}

// ofOneLink says whether a group is link-local, so that no prefix takes it.
func ofOneLink(dst netip.Addr) bool {
	return netip.MustParsePrefix("224.0.0.0/24").Contains(dst) || dst.Is6() && dst.IsMulticast() && dst.As16()[1]&15 < 3
}

// rank orders the inputs that match a packet: a group before a prefix, then with a port, then with
// a source or the longer source prefix, then the longer prefix, then one that excludes senders.
func rank(in flow.Input) (n int) {
	if in.Len == 0 {
		n += 800_000
	}
	if in.Port != 0 {
		n += 400_000
	}
	switch {
	case in.BySource:
		n += 1 + 1000*in.SourceLen
	case in.Source.IsValid():
		n += 1000 * in.Source.BitLen()
	}
	return n + 2*in.Len
}
