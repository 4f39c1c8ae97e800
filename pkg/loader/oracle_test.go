package loader

import (
	"bytes"
	"net/netip"

	"xdpcast/pkg/packet"
)

// oracle says in plain Go what the programs do with a frame, and keeps the counters
// that they must keep.
type oracle struct {
	rules []Rule
	want  map[string]*RuleStats
	// passed since the counters were as before
	passed, passedBefore Counter
}

// newOracle starts with rules that have matched nothing yet.
func newOracle(rules []Rule, before Stats) *oracle {
	o := &oracle{rules: rules, want: map[string]*RuleStats{}, passedBefore: before.Passed}
	for _, r := range rules {
		s := &RuleStats{Name: r.Name, Drops: map[Reason]Counter{}}
		for _, out := range r.Out {
			s.Outputs = append(s.Outputs, OutputStats{Rule: out, Drops: map[Reason]Counter{}})
		}
		o.want[r.Name] = s
	}
	return o
}

// match finds the rule of a packet: the one for its source before the one for any.
func (o *oracle) match(index int, h *packet.Headers) *Rule {
	if h.VLAN != 0 {
		return nil
	}
	for _, source := range []netip.Addr{h.Src, {}} {
		want := Input{Index: index, Group: h.Dst, Source: source, Port: h.DstPort}
		for i := range o.rules {
			if o.rules[i].In.key() == want {
				return &o.rules[i]
			}
		}
	}
	return nil
}

// frame returns the verdict, and the copies by slot.
func (o *oracle) frame(index int, frame []byte, linear int) (verdict uint32, copies map[int][]byte) {
	h, ok := packet.Parse(frame)
	var rule *Rule
	if ok && h.UDP+8 <= linear {
		rule = o.match(index, &h)
	}
	if rule == nil {
		o.passed.add(1, uint64(len(frame)))
		return xdpPass, nil
	}
	stats, n := o.want[rule.Name], uint64(len(frame))
	stats.Matched.add(1, n)
	if reason, ok := dropAll(rule, frame, linear, &h); ok {
		c := stats.Drops[reason]
		c.add(1, n)
		stats.Drops[reason] = c
		return xdpDrop, nil
	}
	copies = map[int][]byte{}
	for slot := range rule.Out {
		out := &stats.Outputs[slot]
		sent, reason := sendOne(rule.Out[slot], frame, &h)
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
func dropAll(rule *Rule, frame []byte, linear int, h *packet.Headers) (Reason, bool) {
	switch {
	case [6]byte(frame[6:12]) == rule.In.MAC:
		return Loop, true
	case h.Fragment:
		return Fragment, true
	case h.Dst.Is6() && frame[h.UDP+6] == 0 && frame[h.UDP+7] == 0:
		return NoChecksum, true
	case len(rule.Out) > 1 && linear < len(frame):
		return MultiBuffer, true
	default:
		return 0, false
	}
}

// sendOne returns one output's copy, or why there is none.
func sendOne(out Output, frame []byte, h *packet.Headers) ([]byte, Reason) {
	if !out.Ready {
		return nil, NotReady
	}
	if h.L3Len > min(out.MTU, maxMTU) {
		return nil, MTU
	}
	sent := bytes.Clone(frame)
	if !out.Apply(sent, h) {
		return nil, TTL
	}
	return sent, 0
}
