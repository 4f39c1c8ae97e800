package loader

import (
	"net/netip"
	"testing"

	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// Plain packets take the short way through the relay program, and no others: only the long way
// notes when a rule last matched, at each tick's first packet, and here no tick need have begun.
// TestDifferential compares what both do.
func TestPlainPackets(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 2)
	group := func(i int) string { return netip.AddrFrom4([4]byte{239, 1, 0, byte(i)}).String() }
	for i, c := range []struct {
		name   string
		plain  bool
		rule   func(*flow.Flow)
		frame  func(*packet.Frame)
		change func([]byte)
	}{
		{name: "whole IPv4", plain: true},
		{name: "without a UDP checksum", plain: true, frame: func(f *packet.Frame) { f.NoChecksum = true }},
		{name: "padding", plain: true, frame: func(f *packet.Frame) { f.Padding = 7 }},
		{name: "a source", plain: true, rule: func(f *flow.Flow) { f.In.Source = netip.MustParseAddr("10.0.0.9") }},
		{name: "TTL one less", plain: true, rule: func(f *flow.Flow) { f.Out[0].TTLMode = packet.TTLDecrement }},
		{name: "several outputs", plain: true, rule: func(f *flow.Flow) { f.Out = append(f.Out, output(n.out[1], "239.9.9.9", "10.1.1.1", 6000)) }},
		{name: "output with a rare feature", rule: func(f *flow.Flow) { f.Out[0].MinTTL = 2 }},
		{name: "output not ready", rule: func(f *flow.Flow) { f.Out[0].Ready = false }},
		{name: "several outputs, one with a rare feature", plain: true, rule: func(f *flow.Flow) {
			f.Out = append(f.Out, output(n.out[1], "239.9.9.9", "10.1.1.1", 6000))
			f.Out[1].MinTTL = 2
		}},
		{name: "rate", rule: func(f *flow.Flow) { f.Rate = flow.Rate{Packets: 1000, Burst: 10} }},
		{name: "unfinished checksums", rule: func(f *flow.Flow) { f.Finish = true }},
		{name: "too long", rule: func(f *flow.Flow) { f.Out[0].MTU = 60 }},
		{name: "tagged", rule: func(f *flow.Flow) { f.In.VLAN = 7 }, frame: func(f *packet.Frame) { f.VLANs = []uint16{7} }},
		{name: "options", frame: func(f *packet.Frame) { f.Options = []byte{1, 1, 1, 1} }},
		{name: "first fragment", change: func(f []byte) { f[20] |= 0x20 }},
		{name: "later fragment", change: func(f []byte) { f[21] = 2 }},
		{name: "own MAC", frame: func(f *packet.Frame) { f.SrcMAC = mac(n.in) }},
		{name: "datagram beyond its packet", change: func(f []byte) { f[39] = 0xff }},
		{name: "packet beyond its frame", change: func(f []byte) { f[17]++ }},
		{name: "datagram without its header", change: func(f []byte) { f[39] = 7 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.enter(t)
			rule := flow.Flow{Name: c.name, In: input(n.in, group(i), "", 5000), Out: []flow.Output{output(n.out[0], "239.9.0.1", "10.1.0.1", 6000)}}
			if c.rule != nil {
				c.rule(&rule)
			}
			f := sourceFrame(n, group(i), 5000, make([]byte, 40))
			f.Src = netip.MustParseAddr("10.0.0.9")
			if c.frame != nil {
				c.frame(&f)
			}
			frame := f.Build()
			if c.change != nil {
				c.change(frame)
			}
			sync1(t, r.l, rule)
			r.run(t, n.in.Index, frame, len(frame))
			s := statsOf(t, r.l, c.name)
			if plain := s.Matched.Packets == 1 && s.LastSeen < 0; plain != c.plain {
				t.Errorf("the packet took the short way: %v, want %v; counters %+v", plain, c.plain, s)
			}
			if c.plain && (s.Outputs[0].Sent.Packets != 1 || s.Outputs[len(s.Outputs)-1].Sent.Packets != 1) {
				t.Errorf("counters %+v, want one packet sent by each output", s)
			}
		})
	}
}
