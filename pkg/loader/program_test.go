package loader

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// programCase is one frame's path through the relay program. The expected output is built from
// scratch, checksums included, and not by the code under test.
type programCase struct {
	name string
	// rule modifies the default rule.
	rule func(r *flow.Flow)
	// more are further rules.
	more []flow.Flow
	// frame modifies the default frame, mangle its bytes.
	frame  func(f *packet.Frame)
	mangle func(b []byte) []byte
	index  int // the input; 0: the rule's
	linear int // bytes in the first buffer; 0: all
	// Exactly one of these: the frame that leaves, as a change of the one received; that it passes
	// untouched; why it is dropped.
	want   func(f *packet.Frame)
	passes bool
	drop   Reason
	// scope of the drop
	rulewide bool
	// by is the name of the rule that matches; empty: the default one
	by string
}

func put16(b []byte, at int, v uint16) []byte {
	binary.BigEndian.PutUint16(b[at:], v)
	return b
}

// renumbered is the identification of a fragment, numbered by its sender, when it is sent from
// another address.
func renumbered(id uint16, sender netip.Addr) uint16 {
	b := sender.As4()
	mask := uint16(binary.LittleEndian.Uint32(b[:]) * 0x9e3779b1 >> 16)
	return id ^ (mask<<8 | mask>>8)
}

// Offsets in an untagged IPv4 frame without options, and in an IPv6 frame.
const (
	atIP   = 14
	atUDP  = 34
	atUDP6 = 54
)

func TestRelayProgram(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 3)
	toDefault := func(f *packet.Frame) {
		o := output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)
		f.DstMAC, f.SrcMAC, f.Dst, f.Src, f.DstPort = o.DstMAC, o.SrcMAC, o.Dst, o.Src, o.DstPort
	}
	to := func(edit func(f *packet.Frame)) func(f *packet.Frame) {
		return func(f *packet.Frame) { toDefault(f); edit(f) }
	}
	out := func(edit func(o *flow.Output)) func(r *flow.Flow) { return func(r *flow.Flow) { edit(&r.Out[0]) } }
	other := func(name, source string) flow.Flow {
		o := output(n.out[1], "239.3.3.3", "10.1.1.1", 7000)
		return flow.Flow{Name: name, In: input(n.in, "239.1.1.1", source, 5000), Out: []flow.Output{o}}
	}
	toOther := func(f *packet.Frame) {
		o := other("", "").Out[0]
		f.DstMAC, f.SrcMAC, f.Dst, f.Src, f.DstPort = o.DstMAC, o.SrcMAC, o.Dst, o.Src, o.DstPort
	}
	cases := []programCase{
		{name: "rewritten", want: toDefault},
		{name: "no payload", frame: func(f *packet.Frame) { f.Payload = nil; f.Padding = 18 }, want: toDefault},
		{name: "padding is kept", frame: func(f *packet.Frame) { f.Padding = 7 }, want: toDefault},

		// Not ours.
		{name: "no rule for the group", frame: func(f *packet.Frame) { f.Dst = netip.MustParseAddr("239.1.1.2") }, passes: true},
		{name: "no rule for the port", frame: func(f *packet.Frame) { f.DstPort = 5001 }, passes: true},
		{name: "no rule on the interface", index: n.out[2].Index, passes: true},
		{name: "arp", mangle: func(b []byte) []byte { return put16(b, 12, 0x0806) }, passes: true},
		{name: "802.3 length instead of a type", mangle: func(b []byte) []byte { return put16(b, 12, 46) }, passes: true},
		{name: "tcp", mangle: func(b []byte) []byte { b[atIP+9] = 6; return b }, passes: true},
		{name: "udp-lite", mangle: func(b []byte) []byte { b[atIP+9] = 136; return b }, passes: true},
		{name: "ip version 6 behind the type of ipv4", mangle: func(b []byte) []byte { b[atIP] = 0x65; return b }, passes: true},
		{name: "ihl 4", mangle: func(b []byte) []byte { b[atIP] = 0x44; return b }, passes: true},
		{name: "ihl 0", mangle: func(b []byte) []byte { b[atIP] = 0x40; return b }, passes: true},
		{name: "ihl beyond the packet", mangle: func(b []byte) []byte { b[atIP] = 0x4f; return b }, passes: true},
		{name: "only an ethernet header", mangle: func(b []byte) []byte { return b[:14] }, passes: true},
		{name: "cut in the ip header", mangle: func(b []byte) []byte { return b[:atUDP-1] }, passes: true},
		{name: "cut in the udp header", mangle: func(b []byte) []byte { return b[:atUDP+7] }, passes: true},
		{name: "cut in the payload", mangle: func(b []byte) []byte { return b[:len(b)-1] }, passes: true},
		{name: "ip length without a udp header", mangle: func(b []byte) []byte { return put16(b, atIP+2, 27) }, passes: true},
		{name: "ip length beyond the frame", mangle: func(b []byte) []byte { return put16(b, atIP+2, uint16(len(b)-atIP+1)) }, passes: true},
		{name: "udp length beyond the ip packet", mangle: func(b []byte) []byte { return put16(b, atUDP+4, uint16(len(b)-atUDP+1)) }, passes: true},
		{name: "udp length under a header", mangle: func(b []byte) []byte { return put16(b, atUDP+4, 7) }, passes: true},
		{name: "later fragment", mangle: func(b []byte) []byte { return put16(b, atIP+6, 100) }, passes: true},
		{name: "later fragment, more to come", mangle: func(b []byte) []byte { return put16(b, atIP+6, 0x2000|100) }, passes: true},
		{name: "vlan", frame: func(f *packet.Frame) { f.VLANs = []uint16{7} }, passes: true},
		{name: "vlan behind a priority tag", frame: func(f *packet.Frame) { f.VLANs = []uint16{0xe000, 7} }, passes: true},
		{name: "three tags", frame: func(f *packet.Frame) { f.VLANs = []uint16{0, 0, 0} }, passes: true},
		{name: "tag cut short", frame: func(f *packet.Frame) { f.VLANs = []uint16{0} }, mangle: func(b []byte) []byte { return b[:17] }, passes: true},

		// Ours in other shapes.
		{name: "priority tag", frame: func(f *packet.Frame) { f.VLANs = []uint16{0xa000} }, want: toDefault},
		{name: "two priority tags", frame: func(f *packet.Frame) { f.VLANs = []uint16{0xa000, 0x2000} }, want: toDefault},
		{name: "ip options", frame: func(f *packet.Frame) { f.Options = []byte{0x94, 4, 0, 0} }, want: toDefault},
		{name: "all the ip options there can be", frame: func(f *packet.Frame) { f.Options = bytes.Repeat([]byte{1}, 40) }, want: toDefault},
		{name: "first fragment", mangle: func(b []byte) []byte {
			return fixIPChecksum(put16(b, atIP+6, 0x2000))
		}, want: toDefault},
		{name: "first fragment of a longer datagram", mangle: func(b []byte) []byte {
			return fixIPChecksum(put16(put16(b, atIP+6, 0x2000), atUDP+4, 60000))
		}, want: toDefault},
		{name: "do not fragment", mangle: func(b []byte) []byte {
			return fixIPChecksum(put16(b, atIP+6, 0x4000))
		}, want: toDefault},
		{name: "spread over buffers", linear: 64, frame: func(f *packet.Frame) { f.Payload = make([]byte, 200) }, want: toDefault},
		{name: "spread over buffers, to a device that sends one", linear: 64, rule: out(func(o *flow.Output) { o.OneBuffer = true }), frame: func(f *packet.Frame) { f.Payload = make([]byte, 200) }, drop: MultiBuffer},
		{name: "in one buffer, to a device that sends one", rule: out(func(o *flow.Output) { o.OneBuffer = true }), want: toDefault},
		{name: "headers spread over buffers", linear: 40, passes: true},

		// Precedence.
		{name: "the source's rule before any's", more: []flow.Flow{other("specific", "192.168.7.7")}, want: toOther, by: "specific"},
		{name: "any's rule for another source", more: []flow.Flow{other("specific", "192.168.7.8")}, want: toDefault},
		{name: "only the source's rule", rule: func(r *flow.Flow) { r.In.Source = netip.MustParseAddr("192.168.7.7") }, want: toDefault},
		{name: "only another source's rule", rule: func(r *flow.Flow) { r.In.Source = netip.MustParseAddr("192.168.7.8") }, passes: true},
		{name: "unicast", rule: func(r *flow.Flow) { r.In.Group = netip.MustParseAddr("10.0.0.2") }, frame: func(f *packet.Frame) { f.Dst, f.DstMAC = netip.MustParseAddr("10.0.0.2"), mac(n.in) }, want: toDefault},
		{name: "unicast to another host's mac", rule: func(r *flow.Flow) { r.In.Group = netip.MustParseAddr("10.0.0.2") }, frame: func(f *packet.Frame) { f.Dst = netip.MustParseAddr("10.0.0.2") }, passes: true},

		// Rewriting.
		{name: "ttl less one", rule: out(func(o *flow.Output) { o.TTLMode = packet.TTLDecrement }), want: to(func(f *packet.Frame) { f.TTL = 11 })},
		{name: "ttl set", rule: out(func(o *flow.Output) { o.TTLMode, o.TTL = packet.TTLSet, 99 }), want: to(func(f *packet.Frame) { f.TTL = 99 })},
		{name: "ttl 1 kept", frame: func(f *packet.Frame) { f.TTL = 1 }, want: toDefault},
		{name: "ttl 255 set to 1", frame: func(f *packet.Frame) { f.TTL = 255 }, rule: out(func(o *flow.Output) { o.TTLMode, o.TTL = packet.TTLSet, 1 }), want: to(func(f *packet.Frame) { f.TTL = 1 })},
		{name: "ttl 0 set", frame: func(f *packet.Frame) { f.TTL = 0 }, rule: out(func(o *flow.Output) { o.TTLMode, o.TTL = packet.TTLSet, 3 }), want: to(func(f *packet.Frame) { f.TTL = 3 })},
		{name: "ttl 1 less one", frame: func(f *packet.Frame) { f.TTL = 1 }, rule: out(func(o *flow.Output) { o.TTLMode = packet.TTLDecrement }), drop: TTL},
		{name: "ttl 0 less one", frame: func(f *packet.Frame) { f.TTL = 0 }, rule: out(func(o *flow.Output) { o.TTLMode = packet.TTLDecrement }), drop: TTL},
		{name: "ttl 0 kept", frame: func(f *packet.Frame) { f.TTL = 0 }, drop: TTL},
		{name: "dscp set, ecn kept", frame: func(f *packet.Frame) { f.TOS = 0x03 }, rule: out(func(o *flow.Output) { o.SetDSCP, o.DSCP = true, 46 }), want: to(func(f *packet.Frame) { f.TOS = 46<<2 | 3 })},
		{name: "dscp set to 0", frame: func(f *packet.Frame) { f.TOS = 0xfe }, rule: out(func(o *flow.Output) { o.SetDSCP, o.DSCP = true, 0 }), want: to(func(f *packet.Frame) { f.TOS = 2 })},
		{name: "source kept", rule: out(func(o *flow.Output) { o.Src = netip.Addr{} }), want: to(func(f *packet.Frame) { f.Src = netip.MustParseAddr("192.168.7.7") })},
		{name: "source port set", rule: out(func(o *flow.Output) { o.SrcPort = 777 }), want: to(func(f *packet.Frame) { f.SrcPort = 777 })},
		{name: "no checksum stays none", frame: func(f *packet.Frame) { f.NoChecksum = true }, want: toDefault},
		{name: "checksum left out", rule: out(func(o *flow.Output) { o.ZeroChecksum = true }), want: to(func(f *packet.Frame) { f.NoChecksum = true })},
		{name: "no checksum stays none when left out", frame: func(f *packet.Frame) { f.NoChecksum = true }, rule: out(func(o *flow.Output) { o.ZeroChecksum = true }), want: toDefault},
		{name: "computed zero is all ones", frame: func(f *packet.Frame) { f.Payload = zeroSumPayload(*f, toDefault) }, want: toDefault},
		{name: "everything at once", rule: out(func(o *flow.Output) {
			o.TTLMode, o.TTL, o.SetDSCP, o.DSCP, o.SrcPort = packet.TTLSet, 200, true, 63, 65535
		}), want: to(func(f *packet.Frame) { f.TTL, f.TOS, f.SrcPort = 200, 63<<2|1, 65535 })},

		// Dropped.
		{name: "own mac", frame: func(f *packet.Frame) { f.SrcMAC = mac(n.in) }, drop: Loop, rulewide: true},
		{name: "as long as the mtu", rule: out(func(o *flow.Output) { o.MTU = 28 + 100 }), frame: func(f *packet.Frame) { f.Payload = make([]byte, 100) }, want: toDefault},
		{name: "longer than the mtu", rule: out(func(o *flow.Output) { o.MTU = 28 + 99 }), frame: func(f *packet.Frame) { f.Payload = make([]byte, 100) }, drop: MTU},
		{name: "not ready", rule: out(func(o *flow.Output) { o.Ready = false }), drop: NotReady},
	}
	cases = append(cases, programCases6(n)...)
	for i, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			r.enter(t)
			if c.linear != 0 && !r.partial {
				t.Skip("this kernel cannot run a program on a frame of several buffers (needs Linux 6.18)")
			}
			runProgramCase(t, n, r, fmt.Sprintf("case%d", i), c)
		})
	}
}

// IPv6 has no header checksum, must have a UDP checksum, and keeps its traffic
// class across two bytes.
func programCases6(n *testLab) []programCase {
	rule6 := func(edit func(o *flow.Output)) func(r *flow.Flow) {
		return func(r *flow.Flow) {
			r.In.Group = netip.MustParseAddr("ff3e::1")
			r.Out[0] = output(n.out[0], "ff3e::2:2", "fd00::1", 6000)
			edit(&r.Out[0])
		}
	}
	plain := rule6(func(*flow.Output) {})
	frame6 := func(edit func(f *packet.Frame)) func(f *packet.Frame) {
		return func(f *packet.Frame) {
			f.Dst, f.Src = netip.MustParseAddr("ff3e::1"), netip.MustParseAddr("2001:db8::7")
			f.DstMAC = packet.MulticastMAC(f.Dst)
			edit(f)
		}
	}
	from := frame6(func(*packet.Frame) {})
	to := func(edit func(f *packet.Frame)) func(f *packet.Frame) {
		return func(f *packet.Frame) {
			o := output(n.out[0], "ff3e::2:2", "fd00::1", 6000)
			f.DstMAC, f.SrcMAC, f.Dst, f.Src, f.DstPort = o.DstMAC, o.SrcMAC, o.Dst, o.Src, o.DstPort
			edit(f)
		}
	}
	same := to(func(*packet.Frame) {})
	return []programCase{
		{name: "ipv6", rule: plain, frame: from, want: same},
		{name: "ipv6, priority tag", rule: plain, frame: frame6(func(f *packet.Frame) { f.VLANs = []uint16{0x6000} }), want: same},
		{name: "ipv6, wrong port", rule: plain, frame: frame6(func(f *packet.Frame) { f.DstPort = 5001 }), passes: true},
		{name: "ipv6, wrong group", rule: plain, frame: frame6(func(f *packet.Frame) { f.Dst = netip.MustParseAddr("ff3e::1:1") }), passes: true},
		{name: "ipv6, the source's rule", rule: func(r *flow.Flow) { plain(r); r.In.Source = netip.MustParseAddr("2001:db8::7") }, frame: from, want: same},
		{name: "ipv6, another source's rule", rule: func(r *flow.Flow) { plain(r); r.In.Source = netip.MustParseAddr("2001:db8::8") }, frame: from, passes: true},
		{name: "ipv6, udp read as options", rule: plain, frame: from, mangle: func(b []byte) []byte { b[atIP+6] = 0; return b }, passes: true},
		{name: "ipv6, udp read as a fragment header", rule: plain, frame: from, mangle: func(b []byte) []byte { b[atIP+6] = 44; return b }, passes: true},
		{name: "ipv6, routing header", rule: plain, frame: from, mangle: func(b []byte) []byte { b[atIP+6] = 43; return b }, passes: true},
		{name: "ipv6, version 4", rule: plain, frame: from, mangle: func(b []byte) []byte { b[atIP] = 0x45; return b }, passes: true},
		{name: "ipv6, cut in the header", rule: plain, frame: from, mangle: func(b []byte) []byte { return b[:atUDP6-1] }, passes: true},
		{name: "ipv6, cut in the udp header", rule: plain, frame: from, mangle: func(b []byte) []byte { return b[:atUDP6+7] }, passes: true},
		{name: "ipv6, cut in the payload", rule: plain, frame: from, mangle: func(b []byte) []byte { return b[:len(b)-1] }, passes: true},
		{name: "ipv6, payload length 0", rule: plain, frame: from, mangle: func(b []byte) []byte { return put16(b, atIP+4, 0) }, passes: true},
		{name: "ipv6, udp length beyond the packet", rule: plain, frame: from, mangle: func(b []byte) []byte { return put16(b, atUDP6+4, uint16(len(b))) }, passes: true},
		{name: "ipv6, no udp checksum", rule: plain, frame: frame6(func(f *packet.Frame) { f.NoChecksum = true }), drop: NoChecksum, rulewide: true},
		{name: "ipv6, checksum cannot be left out", rule: rule6(func(o *flow.Output) { o.ZeroChecksum = true }), frame: from, want: same},
		{name: "ipv6, computed zero is all ones", rule: plain, frame: frame6(func(f *packet.Frame) { f.Payload = zeroSumPayload(*f, same) }), want: same},
		{name: "ipv6, hop limit less one", rule: rule6(func(o *flow.Output) { o.TTLMode = packet.TTLDecrement }), frame: from, want: to(func(f *packet.Frame) { f.TTL = 11 })},
		{name: "ipv6, hop limit set", rule: rule6(func(o *flow.Output) { o.TTLMode, o.TTL = packet.TTLSet, 64 }), frame: from, want: to(func(f *packet.Frame) { f.TTL = 64 })},
		{name: "ipv6, hop limit 1 less one", rule: rule6(func(o *flow.Output) { o.TTLMode = packet.TTLDecrement }), frame: frame6(func(f *packet.Frame) { f.TTL = 1 }), drop: TTL},
		{name: "ipv6, dscp set, ecn and flow label kept", rule: rule6(func(o *flow.Output) { o.SetDSCP, o.DSCP = true, 46 }), frame: from, want: to(func(f *packet.Frame) { f.TOS = 46<<2 | 1 })},
		{name: "ipv6, source kept", rule: rule6(func(o *flow.Output) { o.Src = netip.Addr{} }), frame: from, want: to(func(f *packet.Frame) { f.Src = netip.MustParseAddr("2001:db8::7") })},
		{name: "ipv6, source port set", rule: rule6(func(o *flow.Output) { o.SrcPort = 1 }), frame: from, want: to(func(f *packet.Frame) { f.SrcPort = 1 })},
		{name: "ipv6, own mac", rule: plain, frame: frame6(func(f *packet.Frame) { f.SrcMAC = mac(n.in) }), drop: Loop, rulewide: true},
		{name: "ipv6, as long as the mtu", rule: rule6(func(o *flow.Output) { o.MTU = 48 + 5 }), frame: frame6(func(f *packet.Frame) { f.Payload = make([]byte, 5) }), want: same},
		{name: "ipv6, longer than the mtu", rule: rule6(func(o *flow.Output) { o.MTU = 48 + 4 }), frame: frame6(func(f *packet.Frame) { f.Payload = make([]byte, 5) }), drop: MTU},
		{name: "ipv6, not ready", rule: rule6(func(o *flow.Output) { o.Ready = false }), frame: from, drop: NotReady},
	}
}

func runProgramCase(t *testing.T, n *testLab, r *runner, name string, c programCase) {
	rule := flow.Flow{Name: name, In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)}}
	if c.rule != nil {
		c.rule(&rule)
	}
	rules := append([]flow.Flow{rule}, c.more...)
	sync1(t, r.l, rules...)

	frame := sourceFrame(n, "239.1.1.1", 5000, []byte("payload"))
	if c.frame != nil {
		c.frame(&frame)
	}
	sent := frame.Build()
	if c.mangle != nil {
		sent = c.mangle(sent)
	}
	index, linear := n.in.Index, len(sent)
	if c.index != 0 {
		index = c.index
	}
	if c.linear != 0 {
		linear = c.linear
	}
	before := globalStats(t, r.l)
	got := r.run(t, index, sent, linear)

	by := rule.Name
	if c.by != "" {
		by = c.by
	}
	want := RuleStats{Name: by, Drops: map[Reason]Counter{}, Outputs: []OutputStats{{Drops: map[Reason]Counter{}}}}
	one := Counter{1, uint64(len(sent))}
	wantVerdict, wantFrame := uint32(xdpDrop), sent
	drops := map[Reason]Counter{}
	var passed Counter
	switch {
	case c.passes:
		wantVerdict, passed = xdpPass, one
	case c.want != nil:
		wantVerdict = xdpRedirect
		c.want(&frame)
		wantFrame = frame.Build()
		if c.mangle != nil {
			wantFrame = c.mangle(wantFrame)
			if is4 := wantFrame[12] == 8; is4 && binary.BigEndian.Uint16(wantFrame[atIP+6:])&0x3fff != 0 {
				sender := netip.AddrFrom4([4]byte(sent[atIP+12:]))
				wantFrame = fixIPChecksum(put16(wantFrame, atIP+4, renumbered(binary.BigEndian.Uint16(wantFrame[atIP+4:]), sender)))
			}
		}
		want.Matched, want.Outputs[0].Sent = one, one
	case c.rulewide:
		want.Matched = one
		want.Drops[c.drop], drops[c.drop] = one, one
	default:
		want.Matched = one
		want.Outputs[0].Drops[c.drop], drops[c.drop] = one, one
	}
	if got.verdict != wantVerdict {
		t.Errorf("verdict %d, want %d", got.verdict, wantVerdict)
	}
	if !bytes.Equal(got.frame, wantFrame) {
		t.Errorf("frame\n got %x\nwant %x", got.frame, wantFrame)
	}
	if diff := cmp.Diff(counters(want), counters(statsOf(t, r.l, by))); diff != "" {
		t.Errorf("counters (-want +got):\n%s", diff)
	}
	after := globalStats(t, r.l)
	if diff := cmp.Diff(drops, subtractDrops(after.Drops, before.Drops)); diff != "" {
		t.Errorf("drops of all rules (-want +got):\n%s", diff)
	}
	if after.Passed.subtract(before.Passed); after.Passed != passed {
		t.Errorf("passed %+v, want %+v", after.Passed, passed)
	}
	for _, other := range rules {
		if other.Name != by && statsOf(t, r.l, other.Name).Matched != (Counter{}) {
			t.Errorf("rule %s has matched too", other.Name)
		}
	}
}

// fixIPChecksum computes the header checksum of an untagged IPv4 frame from scratch.
func fixIPChecksum(b []byte) []byte {
	put16(b, atIP+10, 0)
	var sum uint32
	for i := atIP; i < atUDP; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return put16(b, atIP+10, ^uint16(sum))
}

// zeroSumPayload finds a payload for which the outgoing checksum computes to zero, which is sent as
// all ones.
func zeroSumPayload(f packet.Frame, to func(f *packet.Frame)) []byte {
	to(&f)
	for i := range 1 << 16 {
		f.Payload = []byte{byte(i >> 8), byte(i), 0xaa}
		b := f.Build()
		if h, _ := packet.Parse(b); binary.BigEndian.Uint16(b[h.UDP+6:]) == 0xffff {
			return f.Payload
		}
	}
	panic("every sum is reached by some word")
}

// counted has the counters of a rule.
type counted struct {
	Matched Counter
	Drops   map[Reason]Counter
	Sent    []Counter
	Dropped []map[Reason]Counter // by slot
}

func counters(s RuleStats) counted {
	c := counted{Matched: s.Matched, Drops: s.Drops}
	for _, o := range s.Outputs {
		c.Sent = append(c.Sent, o.Sent)
		c.Dropped = append(c.Dropped, o.Drops)
	}
	return c
}

func globalStats(t testing.TB, l *Loader) Stats {
	t.Helper()
	s, err := l.Stats()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func subtractDrops(now, before map[Reason]Counter) map[Reason]Counter {
	now = maps.Clone(now)
	for reason, c := range now {
		c.subtract(before[reason])
		if now[reason] = c; c == (Counter{}) {
			delete(now, reason)
		}
	}
	return now
}

// A frame for several outputs is handed over: its two MACs are replaced by the data that the egress
// program needs, and nothing else changes.
func TestRelayProgramHandsOver(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 2)
	rule := flow.Flow{Name: "many", In: input(n.in, "239.1.1.1", "", 5000)}
	for i := range 3 {
		rule.Out = append(rule.Out, output(n.out[i%2], "239.2.2.2", "10.1.0.1", uint16(6000+i)))
	}
	sync1(t, r.l, flow.Flow{Name: "first", In: input(n.in, "239.9.9.9", "", 1), Out: rule.Out[:1]}, rule)
	first := r.l.rules["many"].first
	if first == 0 {
		t.Fatal("the rule has first output 0, which proves nothing")
	}
	for sequence := range uint32(3) {
		f := sourceFrame(n, "239.1.1.1", 5000, []byte("payload"))
		f.VLANs = []uint16{0xe000}
		frame := f.Build()
		verdict, got := r.must(t, r.l.relay, n.in.Index, frame, len(frame))
		if verdict != xdpRedirect {
			t.Fatalf("verdict %d", verdict)
		}
		want := bytes.Clone(frame)
		binary.NativeEndian.PutUint32(want[0:], first)
		want[4], want[5], want[6], want[7] = 18, 3, 0xff, 38
		binary.NativeEndian.PutUint32(want[8:], sequence+1)
		if !bytes.Equal(got, want) {
			t.Errorf("frame\n got %x\nwant %x", got, want)
		}
	}
}

// The egress program passes frames that were not handed over, and drops and counts those that no
// output claims.
func TestEgressProgramRefuses(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 3)
	rule := flow.Flow{Name: "many", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{
		output(n.out[0], "239.2.2.2", "10.1.0.1", 6000), output(n.out[1], "239.2.2.3", "10.1.1.1", 6000), output(n.out[1], "239.2.2.4", "10.1.1.1", 6000),
	}}
	sync1(t, r.l, rule)
	f := sourceFrame(n, "239.1.1.1", 5000, []byte("payload"))
	frame := f.Build()
	_, handed := r.must(t, r.l.relay, n.in.Index, frame, len(frame))
	internal := func() uint64 { return globalStats(t, r.l).Drops[Internal].Packets }
	for _, c := range []struct {
		name    string
		index   int
		frame   []byte
		verdict uint32
		drops   uint64
	}{
		{"rewritten already", n.out[0].Index, frame, xdpPass, 0},
		{"shortest frame", n.out[0].Index, frame[:14], xdpPass, 0},
		{"no output on the interface", n.out[2].Index, handed, xdpDrop, 1},
		{"handed over, headers gone", n.out[0].Index, handed[:14], xdpDrop, 1},
		{"first of two", n.out[1].Index, handed, xdpPass, 0},
		{"second of two", n.out[1].Index, handed, xdpPass, 0},
		{"third of two", n.out[1].Index, handed, xdpDrop, 1},
		{"unknown first output", n.out[0].Index, append([]byte{0xff, 0xff, 0xff, 0xff}, handed[4:]...), xdpDrop, 1},
		{"offset beyond the frame", n.out[0].Index, append(append(bytes.Clone(handed[:4]), 0xff), handed[5:]...), xdpDrop, 1},
		{"no outputs", n.out[1].Index, append(append(bytes.Clone(handed[:5]), 0), handed[6:]...), xdpDrop, 1},
	} {
		before := internal()
		verdict, _ := r.must(t, r.egress, c.index, c.frame, len(c.frame))
		if verdict != c.verdict {
			t.Errorf("%s: verdict %d, want %d", c.name, verdict, c.verdict)
		}
		if got := internal() - before; got != c.drops {
			t.Errorf("%s: %d drops, want %d", c.name, got, c.drops)
		}
	}
}

// Maps that contradict each other lead to counted drops, never to a wrong copy.
func TestRelayProgramWithDamagedMaps(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 2)
	one := flow.Flow{Name: "one", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)}}
	two := flow.Flow{Name: "two", In: input(n.in, "239.1.1.2", "", 5000), Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", 6000), output(n.out[1], "239.2.2.3", "10.1.1.1", 6000)}}
	sync1(t, r.l, one, two)
	r.l.shortcuts.open = false // the damage is in the flow table
	if err := r.l.writeConfig(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		group  string
		damage func(f *bpf.RelayFlow)
		rule   string
		drop   Reason
	}{
		{"first output beyond the map", "239.1.1.1", func(f *bpf.RelayFlow) { f.FirstOutput = 1 << 31 }, "one", Internal},
		{"no path", "239.1.1.1", func(f *bpf.RelayFlow) { f.Path = uint8(bpf.RelayRulePathPATH_NONE) }, "one", Internal},
		{"no devmap", "239.1.1.2", func(f *bpf.RelayFlow) { f.FirstOutput = 4000 }, "two", Internal},
		{"row beyond the map", "239.1.1.1", func(f *bpf.RelayFlow) { f.Device = 1 << 20 }, "one", NoDevice},
		{"empty row", "239.1.1.1", func(f *bpf.RelayFlow) { f.Device = 1000 }, "one", NoDevice},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.enter(t)
			key := encodeKey(input(n.in, c.group, "", 5000))
			flow := encodeFlow(r.l.rules[c.rule])
			c.damage(&flow)
			if err := r.l.tables[exact4].Put(key, &flow); err != nil {
				t.Fatal(err)
			}
			before := globalStats(t, r.l).Drops
			frame := sourceFrame(n, c.group, 5000, []byte("payload")).Build()
			if got := r.run(t, n.in.Index, frame, len(frame)); got.verdict != xdpDrop {
				t.Errorf("verdict %d", got.verdict)
			}
			want := map[Reason]Counter{c.drop: {1, uint64(len(frame))}}
			if diff := cmp.Diff(want, subtractDrops(globalStats(t, r.l).Drops, before)); diff != "" {
				t.Errorf("drops (-want +got):\n%s", diff)
			}
			good := encodeFlow(r.l.rules[c.rule])
			if err := r.l.tables[exact4].Put(key, &good); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// Every reason has a name of its own, and the programs' modes equal the twin's.
func TestReasonsAndModes(t *testing.T) {
	names := map[string]Reason{}
	for reason := range reasons {
		name := reason.String()
		if other, ok := names[name]; ok || name == fmt.Sprintf("reason_%d", reason) {
			t.Errorf("reason %d is called %s, as reason %d", reason, name, other)
		}
		names[name] = reason
	}
	for c, twin := range map[bpf.RelayTtlMode]packet.TTLMode{
		bpf.RelayTtlModeTTL_KEEP: packet.TTLKeep, bpf.RelayTtlModeTTL_DECREMENT: packet.TTLDecrement, bpf.RelayTtlModeTTL_SET: packet.TTLSet,
	} {
		if uint32(c) != uint32(twin) {
			t.Errorf("ttl mode %d is %d in the twin", c, twin)
		}
	}
}
