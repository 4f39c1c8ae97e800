package loader

import (
	"net/netip"
	"slices"

	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// oracle says in plain Go what the programs do with a frame, and keeps the counters
// that they must keep.
type oracle struct {
	rules []flow.Flow
	own   []netip.Addr
	first map[fragmentKey]uint16 // ports of first fragments
	want  map[string]*RuleStats
	// passed since the counters were as before
	passed, passedBefore Counter
}

// newOracle starts with rules that have matched nothing yet; first are the ports of
// first fragments, which the programs remember beyond a rule set.
func newOracle(rules []flow.Flow, before Stats, first map[fragmentKey]uint16) *oracle {
	o := &oracle{rules: rules, own: ownAddresses, first: first, want: map[string]*RuleStats{}, passedBefore: before.Passed}
	for _, r := range rules {
		s := &RuleStats{Name: r.Name, Drops: map[Reason]Counter{}}
		for _, out := range r.Out {
			s.Outputs = append(s.Outputs, OutputStats{Rule: out, Drops: map[Reason]Counter{}})
		}
		o.want[r.Name] = s
	}
	return o
}

// match finds the rule of a packet to a port: the most specific one.
func (o *oracle) match(index int, h *packet.Headers, port uint16) (best *flow.Flow) {
	for i := range o.rules {
		r := &o.rules[i]
		if !matches(r.In, index, h, port) || slices.ContainsFunc(r.Except, func(p netip.Prefix) bool { return p.Contains(h.Src) }) {
			continue
		}
		if best == nil || moreSpecific(r.In, best.In) {
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

// ofOneLink says whether no prefix takes a group.
func ofOneLink(dst netip.Addr) bool {
	return netip.MustParsePrefix("224.0.0.0/24").Contains(dst) || dst.Is6() && dst.IsMulticast() && dst.As16()[1]&15 < 3
}

// moreSpecific orders two inputs that match the same packet: a group before a
// prefix, then with a port, then with a source or the longer prefix of sources, then the
// longer prefix.
func moreSpecific(a, b flow.Input) bool {
	rank := func(in flow.Input) (n int) {
		if in.Len == 0 {
			n += 400_000
		}
		if in.Port != 0 {
			n += 200_000
		}
		switch {
		case in.BySource:
			n += 1000 * (1 + in.SourceLen)
		case in.Source.IsValid():
			n += 1000 * (1 + in.Source.BitLen())
		}
		return n + in.Len
	}
	return rank(a) > rank(b)
}

// fragmentKey is what the fragments of a datagram share.
type fragmentKey struct {
	index       int
	vlan, outer uint16
	id          uint32
	src, dst    netip.Addr
}

// port is the destination port of a packet; for a later fragment the one that the
// first one had, 0 when it has not come.
func (o *oracle) port(index int, h *packet.Headers) uint16 {
	if h.Part == packet.LaterFragment {
		return o.first[fragmentKey{index, h.VLAN, h.OuterVLAN, h.FragmentID, h.Src, h.Dst}]
	}
	return h.DstPort
}

// frame returns the verdict, and the copies by slot.
func (o *oracle) frame(index int, frame []byte, linear int) (verdict uint32, copies map[int][]byte) {
	h, ok := packet.Parse(frame)
	var rule *flow.Flow
	if ok && h.Payload <= linear {
		if port := o.port(index, &h); port != 0 || h.Part != packet.LaterFragment {
			rule = o.match(index, &h, port)
		}
	}
	if rule != nil && !rule.In.Group.IsMulticast() && !rule.Broadcast && [6]byte(frame[0:6]) != rule.In.MAC {
		rule = nil // for another host
	}
	if rule == nil {
		o.passed.add(1, uint64(len(frame)))
		return xdpPass, nil
	}
	if h.Part == packet.FirstFragment {
		o.first[fragmentKey{index, h.VLAN, h.OuterVLAN, h.FragmentID, h.Src, h.Dst}] = h.DstPort
	}
	stats, n := o.want[rule.Name], uint64(len(frame))
	stats.Matched.add(1, n)
	if reason, ok := o.dropAll(rule, frame, linear, &h); ok {
		c := stats.Drops[reason]
		c.add(1, n)
		stats.Drops[reason] = c
		return xdpDrop, nil
	}
	copies = map[int][]byte{}
	for slot := range rule.Out {
		out := &stats.Outputs[slot]
		sent, reason := sendOne(rule.Out[slot], frame, &h, len(rule.Out) > 1, len(rule.Out) == 1 && linear < len(frame))
		if sent == nil {
			c := out.Drops[reason]
			c.add(1, n)
			out.Drops[reason] = c
			continue
		}
		out.Sent.add(1, n)
		copies[slot] = sent
	}
	if len(rule.Out) == 1 && len(copies) == 0 {
		return xdpDrop, nil
	}
	return xdpRedirect, copies
}

// dropAll says why no output gets the packet.
func (o *oracle) dropAll(rule *flow.Flow, frame []byte, linear int, h *packet.Headers) (Reason, bool) {
	switch {
	case !rule.AllowLoop && ([6]byte(frame[6:12]) == rule.In.MAC || slices.Contains(o.own, h.Src)):
		return Loop, true
	case !rule.AllowNoChecksum && h.Part != packet.LaterFragment && h.Dst.Is6() && frame[h.UDP+6] == 0 && frame[h.UDP+7] == 0:
		return NoChecksum, true
	case len(rule.Out) > 1 && linear < len(frame):
		return MultiBuffer, true
	default:
		return 0, false
	}
}

// sendOne returns one output's copy, or why there is none. spread says that the frame
// itself is sent and has several buffers.
func sendOne(out flow.Output, frame []byte, h *packet.Headers, many, spread bool) ([]byte, Reason) {
	if !out.Ready {
		return nil, ReasonOf(out.Blocked)
	}
	mtu := int(min(out.MTU, flow.MaxMTU))
	// The kernel copies no frame that is too long as it came.
	if out.TooLong(h, len(frame), mtu, true) || many && len(frame) > mtu+18 {
		return nil, MTU
	}
	if spread && out.OneBuffer {
		return nil, MultiBuffer
	}
	switch sent, outcome := out.Append(nil, frame, h); outcome {
	case packet.EndsByTTL:
		return nil, TTL
	case packet.EndsByPort:
		return nil, Port
	default:
		return append(sent, frame[h.Payload:]...), 0
	}
}
