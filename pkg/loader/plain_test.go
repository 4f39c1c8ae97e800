package loader

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"xdpcast/bpf"
	"xdpcast/internal/flowtest"
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
		name     string
		plain    bool
		prepared bool // the rule's output is
		rule     func(*flow.Flow)
		frame    func(*packet.Frame)
		change   func([]byte)
	}{
		{name: "whole IPv4", plain: true, prepared: true},
		{name: "without a UDP checksum", plain: true, prepared: true, frame: func(f *packet.Frame) { f.NoChecksum = true }},
		{name: "padding", plain: true, prepared: true, frame: func(f *packet.Frame) { f.Padding = 7 }},
		{name: "a source", plain: true, prepared: true, rule: func(f *flow.Flow) { f.In.Source = netip.MustParseAddr("10.0.0.9") }},
		{name: "TTL one less", plain: true, prepared: true, rule: func(f *flow.Flow) { f.Out[0].TTLMode = packet.TTLDecrement }},
		{name: "TTL and source port set", plain: true, prepared: true, rule: func(f *flow.Flow) {
			f.Out[0].TTLMode, f.Out[0].TTL, f.Out[0].SrcPort = packet.TTLSet, 255, 7
		}},
		{name: "source kept", plain: true, rule: func(f *flow.Flow) { f.Out[0].Src = netip.Addr{} }},
		{name: "DSCP", plain: true, rule: func(f *flow.Flow) { f.Out[0].SetDSCP = true }},
		{name: "no checksum sent", plain: true, rule: func(f *flow.Flow) { f.Out[0].ZeroChecksum = true }},
		{name: "own packets allowed", plain: true, rule: func(f *flow.Flow) { f.AllowLoop = true }},
		{name: "several outputs", plain: true, rule: func(f *flow.Flow) { f.Out = append(f.Out, output(n.out[1], "239.9.9.9", "10.1.1.1", 6000)) }},
		{name: "output with a rare feature", rule: func(f *flow.Flow) { f.Out[0].MinTTL = 2 }},
		{name: "output not ready", rule: func(f *flow.Flow) { f.Out[0].Ready = false }},
		{name: "several outputs, one with a rare feature", plain: true, rule: func(f *flow.Flow) {
			f.Out = append(f.Out, output(n.out[1], "239.9.9.9", "10.1.1.1", 6000))
			f.Out[1].MinTTL = 2
		}},
		{name: "rate", rule: func(f *flow.Flow) { f.Rate = flow.Rate{Packets: 1000, Burst: 10} }},
		{name: "unfinished checksums", rule: func(f *flow.Flow) { f.Finish = true }},
		{name: "too long", prepared: true, rule: func(f *flow.Flow) { f.Out[0].MTU = 60 }},
		{name: "tagged", prepared: true, rule: func(f *flow.Flow) { f.In.VLAN = 7 }, frame: func(f *packet.Frame) { f.VLANs = []uint16{7} }},
		{name: "options", prepared: true, frame: func(f *packet.Frame) { f.Options = []byte{1, 1, 1, 1} }},
		{name: "first fragment", prepared: true, change: func(f []byte) { f[20] |= 0x20 }},
		{name: "later fragment", prepared: true, change: func(f []byte) { f[21] = 2 }},
		{name: "own MAC", prepared: true, frame: func(f *packet.Frame) { f.SrcMAC = mac(n.in) }},
		{name: "TTL ends", prepared: true, rule: func(f *flow.Flow) { f.Out[0].TTLMode = packet.TTLDecrement }, frame: func(f *packet.Frame) { f.TTL = 1 }},
		{name: "datagram shorter than its packet", prepared: true, change: func(f []byte) { f[39]-- }},
		{name: "datagram beyond its packet", prepared: true, change: func(f []byte) { f[39] = 0xff }},
		{name: "packet beyond its frame", prepared: true, change: func(f []byte) { f[17]++ }},
		{name: "datagram without its header", prepared: true, change: func(f []byte) { f[39] = 7 }},
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
			prepared := false
			for _, slot := range shortcutsOf(t, r.l.maps) {
				prepared = slot.Flow.Rule == r.l.rules[c.name].id && slot.HasOutput == uint8(bpf.RelayShortcutOutputSHORTCUT_PREPARED)
			}
			if prepared != c.prepared {
				t.Errorf("the output is prepared: %v, want %v", prepared, c.prepared)
			}
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

// Copies for prepared outputs are those of the twin, whatever a packet's checksums, right or wrong, source, ports and TTL: the
// values at which one's complement sums have two zeros among them.
func TestPreparedOutputs(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	random := rand.New(rand.NewPCG(20261130, 1))
	pick := func(edges ...uint32) uint32 { return append(edges, random.Uint32())[random.IntN(len(edges)+1)] }
	address := func() netip.Addr {
		return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, pick(1, 0x01000000, 0x0000ffff, 0xfffe0001, 0x7fffffff))))
	}
	for i := range 60 {
		rule := flow.Flow{Name: fmt.Sprint("rule", i), In: input(n.in, "239.1.1.1", "", uint16(pick(1, 0xff, 0xfffe, 0xffff)|1)), Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", uint16(pick(1, 0xff, 0xfffe, 0xffff)|1))}}
		o := &rule.Out[0]
		o.Src, o.SrcPort = address(), uint16(pick(0, 0, 1, 0xffff))
		o.TTLMode, o.TTL = packet.TTLMode(random.IntN(3)), uint8(pick(1, 2, 254, 255)|1)
		sync1(t, r.l, rule)
		for _, slot := range shortcutsOf(t, r.l.maps) {
			if slot.HasOutput != uint8(bpf.RelayShortcutOutputSHORTCUT_PREPARED) {
				t.Fatalf("%+v is not prepared", o)
			}
		}
		twin := newOracle(normalized([]flow.Flow{rule}), globalStats(t, r.l), flowtest.Ports{})
		for range 100 {
			f := sourceFrame(n, "239.1.1.1", rule.In.Port, make([]byte, random.IntN(40)))
			f.Src, f.SrcPort, f.TTL = address(), uint16(pick(1, 0xffff)), uint8(pick(0, 1, 2, 254, 255))
			f.NoChecksum = random.IntN(8) == 0
			frame := f.Build()
			set := func(at int) {
				if random.IntN(2) == 0 {
					binary.BigEndian.PutUint16(frame[at:], uint16(pick(0, 1, 0xfffe, 0xffff)))
				}
			}
			set(24) // the IP header's checksum
			set(40) // the datagram's
			differential(t, r, twin, n.in.Index, frame, len(frame))
		}
	}
}
