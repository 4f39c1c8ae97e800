package loader

import (
	"net/netip"
	"slices"

	"xdpcast/internal/flowtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// oracle models in plain Go what the programs do with a frame, and keeps the counters that they
// must keep.
type oracle struct {
	rules []flow.Flow
	own   []netip.Addr
	first flowtest.Ports
	want  map[string]*RuleStats
	// passed since the counters were passedBefore
	passed, passedBefore Counter
}

// newOracle starts with rules that have matched nothing yet; first has the ports of first
// fragments, which the programs remember beyond a rule set.
func newOracle(rules []flow.Flow, before Stats, first flowtest.Ports) *oracle {
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

// frame returns the verdict, and the copies by slot.
func (o *oracle) frame(index int, frame []byte, linear int) (verdict uint32, copies map[int][]byte) {
	h, ok := packet.Parse(frame)
	var rule *flow.Flow
	if ok && h.Payload <= linear {
		rule = o.first.Find(o.rules, index, frame, &h)
	}
	if rule == nil {
		o.passed.add(1, uint64(len(frame)))
		return xdpPass, nil
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

// dropAll returns why no output gets the packet.
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

// sendOne returns one output's copy, or why there is none. spread says that the frame itself is
// sent and has several buffers.
func sendOne(out flow.Output, frame []byte, h *packet.Headers, many, spread bool) ([]byte, Reason) {
	if !out.Ready {
		return nil, ReasonOf(out.Blocked)
	}
	mtu := int(min(out.MTU, flow.MaxMTU))
	// The kernel copies no frame that was already too long on arrival.
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
