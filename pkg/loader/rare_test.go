package loader

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"xdpcast/bpf"
	"xdpcast/internal/flowtest"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// Prefixes, any port, VLANs and rare output options, byte for byte.
func TestRelayProgramRare(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 3)
	if err := r.l.SetOwnAddresses([]netip.Addr{netip.MustParseAddr("10.9.9.9"), netip.MustParseAddr("fd00::9")}); err != nil {
		t.Fatal(err)
	}
	toDefault := func(f *packet.Frame) {
		o := output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)
		f.DstMAC, f.SrcMAC, f.Dst, f.Src, f.DstPort = o.DstMAC, o.SrcMAC, o.Dst, o.Src, o.DstPort
	}
	to := func(edit func(f *packet.Frame)) func(f *packet.Frame) {
		return func(f *packet.Frame) { toDefault(f); edit(f) }
	}
	in := func(edit func(in *flow.Input)) func(r *flow.Flow) { return func(r *flow.Flow) { edit(&r.In) } }
	out := func(edit func(o *flow.Output)) func(r *flow.Flow) { return func(r *flow.Flow) { edit(&r.Out[0]) } }
	prefix := func(s string) func(in *flow.Input) {
		p := netip.MustParsePrefix(s)
		return func(in *flow.Input) { in.Group, in.Len = p.Addr(), p.Bits() }
	}
	other := func(edit func(in *flow.Input)) []flow.Flow {
		r := flow.Flow{Name: "other", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{output(n.out[1], "239.3.3.3", "10.1.1.1", 7000)}}
		edit(&r.In)
		return []flow.Flow{r}
	}
	toOther := func(f *packet.Frame) {
		o := other(func(*flow.Input) {})[0].Out[0]
		f.DstMAC, f.SrcMAC, f.Dst, f.Src, f.DstPort = o.DstMAC, o.SrcMAC, o.Dst, o.Src, o.DstPort
	}
	tags := func(tci ...uint16) func(f *packet.Frame) { return func(f *packet.Frame) { f.VLANs = tci } }
	vlan := func(mode packet.VLANMode, id, outer uint16) func(r *flow.Flow) {
		return out(func(o *flow.Output) { o.VLAN, o.VLANID, o.OuterVLAN = mode, id, outer })
	}
	taggedIn := func(id, outer uint16, more func(r *flow.Flow)) func(r *flow.Flow) {
		return func(r *flow.Flow) { r.In.VLAN, r.In.OuterVLAN = id, outer; more(r) }
	}
	qinq := func(b []byte) []byte { return put16(b, 12, 0x88a8) }
	for i, c := range []programCase{
		// Inputs.
		{name: "any port", rule: in(func(in *flow.Input) { in.Port = 0 }), frame: func(f *packet.Frame) { f.DstPort = 1 }, want: toDefault},
		{name: "any port, another group", rule: in(func(in *flow.Input) { in.Port = 0 }), frame: func(f *packet.Frame) { f.Dst = netip.MustParseAddr("239.1.1.2") }, passes: true},
		{name: "port before any port", rule: in(func(in *flow.Input) { in.Port = 0 }), more: other(func(*flow.Input) {}), by: "other", want: toOther},
		{name: "port before source with any port", rule: in(func(in *flow.Input) { in.Port, in.Source = 0, netip.MustParseAddr("192.168.7.7") }), more: other(func(*flow.Input) {}), by: "other", want: toOther},
		{name: "source with any port before any source with any port", rule: in(func(in *flow.Input) { in.Port = 0 }), more: other(func(in *flow.Input) { in.Port, in.Source = 0, netip.MustParseAddr("192.168.7.7") }), by: "other", want: toOther},
		{name: "prefix", rule: in(prefix("239.1.0.0/16")), frame: func(f *packet.Frame) { f.Dst = netip.MustParseAddr("239.1.255.255") }, want: toDefault},
		{name: "beside the prefix", rule: in(prefix("239.1.0.0/16")), frame: func(f *packet.Frame) { f.Dst = netip.MustParseAddr("239.2.0.0") }, passes: true},
		{name: "prefix, another port", rule: in(prefix("239.1.0.0/16")), frame: func(f *packet.Frame) { f.DstPort = 1 }, passes: true},
		{name: "prefix with any port", rule: in(func(in *flow.Input) { prefix("239.0.0.0/8")(in); in.Port = 0 }), frame: func(f *packet.Frame) { f.DstPort = 9 }, want: toDefault},
		{name: "group before prefix", rule: in(prefix("239.1.1.0/24")), more: other(func(in *flow.Input) { in.Port = 0 }), by: "other", want: toOther},
		{name: "longer prefix before shorter", rule: in(prefix("239.1.0.0/16")), more: other(prefix("239.1.1.0/24")), by: "other", want: toOther},
		{name: "prefix with a port before a longer one with any", rule: in(func(in *flow.Input) { prefix("239.1.1.0/24")(in); in.Port = 0 }), more: other(prefix("239.0.0.0/8")), by: "other", want: toOther},
		{name: "prefix of a source before one of any", rule: in(prefix("239.1.1.0/24")), more: other(func(in *flow.Input) {
			prefix("239.0.0.0/8")(in)
			in.Source = netip.MustParseAddr("192.168.7.7")
		}), by: "other", want: toOther},
		{name: "prefix of another source", rule: in(func(in *flow.Input) {
			prefix("239.0.0.0/8")(in)
			in.Source = netip.MustParseAddr("192.168.7.8")
		}), passes: true},
		{name: "vlan", rule: taggedIn(7, 0, func(*flow.Flow) {}), frame: tags(0x6007), want: toDefault},
		{name: "another vlan", rule: taggedIn(7, 0, func(*flow.Flow) {}), frame: tags(0x6008), passes: true},
		{name: "untagged, for a rule of a vlan", rule: taggedIn(7, 0, func(*flow.Flow) {}), passes: true},
		{name: "vlan, prefix", rule: taggedIn(7, 0, in(prefix("239.0.0.0/8"))), frame: tags(7), want: toDefault},
		{name: "another vlan, prefix", rule: taggedIn(7, 0, in(prefix("239.0.0.0/8"))), frame: tags(8), passes: true},
		{name: "vlan in a vlan", rule: taggedIn(7, 100, func(*flow.Flow) {}), frame: tags(100, 7), want: toDefault},
		{name: "vlan in a service vlan", rule: taggedIn(7, 100, func(*flow.Flow) {}), frame: tags(100, 7), mangle: qinq, want: toDefault},
		{name: "vlan in another vlan", rule: taggedIn(7, 100, func(*flow.Flow) {}), frame: tags(101, 7), passes: true},
		{name: "vlan without the other", rule: taggedIn(7, 100, func(*flow.Flow) {}), frame: tags(7), passes: true},

		// Own packets.
		{name: "own address", frame: func(f *packet.Frame) { f.Src = netip.MustParseAddr("10.9.9.9") }, drop: Loop, rulewide: true},
		{name: "own address, allowed", rule: func(r *flow.Flow) { r.AllowLoop = true }, frame: func(f *packet.Frame) { f.Src = netip.MustParseAddr("10.9.9.9") }, want: toDefault},
		{name: "own mac, allowed", rule: func(r *flow.Flow) { r.AllowLoop = true }, frame: func(f *packet.Frame) { f.SrcMAC = mac(n.in) }, want: toDefault},

		// Outputs.
		{name: "prefix to prefix", rule: func(r *flow.Flow) {
			prefix("239.1.0.0/16")(&r.In)
			r.Out[0].Dst, r.Out[0].DstLen = netip.MustParseAddr("239.200.0.0"), 16
		}, frame: func(f *packet.Frame) { f.Dst = netip.MustParseAddr("239.1.145.6") }, want: to(func(f *packet.Frame) {
			f.Dst, f.DstMAC = netip.MustParseAddr("239.200.145.6"), [6]byte{1, 0, 0x5e, 72, 145, 6}
		})},
		{name: "prefix of odd length", rule: func(r *flow.Flow) {
			prefix("239.1.1.0/29")(&r.In)
			r.Out[0].Dst, r.Out[0].DstLen = netip.MustParseAddr("239.255.255.248"), 29
		}, frame: func(f *packet.Frame) { f.Dst = netip.MustParseAddr("239.1.1.5") }, want: to(func(f *packet.Frame) {
			f.Dst, f.DstMAC = netip.MustParseAddr("239.255.255.253"), [6]byte{1, 0, 0x5e, 0x7f, 255, 253}
		})},
		{name: "port kept", rule: out(func(o *flow.Output) { o.PortAdd = true }), want: to(func(f *packet.Frame) { f.DstPort = 5000 })},
		{name: "port shifted up", rule: out(func(o *flow.Output) { o.PortAdd, o.PortShift = true, 60535 }), want: to(func(f *packet.Frame) { f.DstPort = 65535 })},
		{name: "port shifted beyond", rule: out(func(o *flow.Output) { o.PortAdd, o.PortShift = true, 60536 }), drop: Port},
		{name: "port shifted down", rule: out(func(o *flow.Output) { o.PortAdd, o.PortShift = true, -4999 }), want: to(func(f *packet.Frame) { f.DstPort = 1 })},
		{name: "port shifted to 0", rule: out(func(o *flow.Output) { o.PortAdd, o.PortShift = true, -5000 }), drop: Port},
		{name: "ttl as low as may be", rule: out(func(o *flow.Output) { o.MinTTL = 12 }), want: toDefault},
		{name: "ttl too low", rule: out(func(o *flow.Output) { o.MinTTL = 13 }), drop: TTL},
		{name: "ttl too low, though it would be set", rule: out(func(o *flow.Output) { o.MinTTL, o.TTLMode, o.TTL = 13, packet.TTLSet, 64 }), drop: TTL},
		{name: "no neighbour", rule: out(func(o *flow.Output) { o.Ready, o.Blocked = false, flow.NoNeighbour }), drop: NoNeighbour},
		{name: "push a tag", rule: vlan(packet.VLANSet, 100, 0), want: to(tags(100))},
		{name: "push a tag with a priority", rule: func(r *flow.Flow) { vlan(packet.VLANSet, 100, 0)(r); r.Out[0].SetPCP, r.Out[0].PCP = true, 5 }, want: to(tags(0xa064))},
		{name: "rewrite a tag, priority kept", rule: taggedIn(7, 0, vlan(packet.VLANSet, 100, 0)), frame: tags(0x7007), want: to(tags(0x7064))},
		{name: "rewrite a tag, drop eligible kept", rule: taggedIn(7, 0, func(r *flow.Flow) { vlan(packet.VLANSet, 100, 0)(r); r.Out[0].SetPCP, r.Out[0].PCP = true, 2 }), frame: tags(0x7007), want: to(tags(0x5064))},
		{name: "pop a tag", rule: taggedIn(7, 0, vlan(packet.VLANPop, 0, 0)), frame: tags(0x6007), want: to(tags())},
		{name: "pop two tags", rule: taggedIn(7, 9, vlan(packet.VLANPop, 0, 0)), frame: tags(9, 7), want: to(tags())},
		{name: "nothing to pop", rule: vlan(packet.VLANPop, 0, 0), want: toDefault},
		{name: "pop a priority tag", rule: vlan(packet.VLANPop, 0, 0), frame: tags(0xe000), want: to(tags())},
		{name: "priority set in tags that are kept", rule: taggedIn(7, 9, out(func(o *flow.Output) { o.SetPCP, o.PCP = true, 3 })), frame: tags(0xe009, 0x1007), want: to(tags(0x6009, 0x7007))},
		{name: "push a tag, padding and options kept", rule: vlan(packet.VLANSet, 100, 0), frame: func(f *packet.Frame) { f.Options, f.Padding = []byte{0x94, 4, 0, 0}, 3 }, want: to(tags(100))},
		{name: "everything at once", rule: func(r *flow.Flow) {
			prefix("239.1.0.0/16")(&r.In)
			r.In.VLAN, r.In.Port = 7, 0
			o := &r.Out[0]
			o.Dst, o.DstLen, o.PortAdd, o.PortShift, o.MinTTL = netip.MustParseAddr("239.7.0.0"), 16, true, -1000, 12
			o.VLAN, o.VLANID, o.SetPCP, o.PCP, o.SetDSCP, o.DSCP = packet.VLANSet, 8, true, 7, true, 46
			o.TTLMode, o.SrcPort, o.ZeroChecksum = packet.TTLDecrement, 1, true
		}, frame: tags(7), want: to(func(f *packet.Frame) {
			f.Dst, f.DstMAC, f.DstPort = netip.MustParseAddr("239.7.1.1"), [6]byte{1, 0, 0x5e, 7, 1, 1}, 4000
			f.TTL, f.TOS, f.SrcPort, f.NoChecksum, f.VLANs = 11, 46<<2|f.TOS&3, 1, true, []uint16{0xe008}
		})},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.enter(t)
			for j := range c.more {
				c.more[j].Name = fmt.Sprint("other", i)
			}
			if c.by != "" {
				c.by = fmt.Sprint("other", i)
			}
			runProgramCase(t, n, r, fmt.Sprintf("rare%d", i), c)
		})
	}
}

// IPv6: datagrams after extension headers are relayed, and rare output options work as in IPv4.
func TestRelayProgramRare6(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	src, group := netip.MustParseAddr("2001:db8::7"), netip.MustParseAddr("ff3e:0:0:1::5:6")
	hopByHop := []byte{17, 0, 5, 2, 0, 0, 1, 0} // router alert
	destination := append([]byte{17, 2}, make([]byte, 22)...)
	atomic := []byte{17, 0, 0, 0, 1, 2, 3, 4}
	chain := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	leads := func(next uint8, ext []byte) []byte { return append([]byte{next}, ext[1:]...) }
	for i, c := range []struct {
		name   string
		first  uint8
		ext    []byte
		rule   func(r *flow.Flow)
		want   func(f *packet.Frame)
		passes bool
	}{
		{name: "hop-by-hop", first: 0, ext: hopByHop},
		{name: "destination options", first: 60, ext: destination},
		{name: "hop-by-hop, destination options", first: 0, ext: chain(leads(60, hopByHop), destination)},
		{name: "atomic fragment", first: 44, ext: atomic},
		{name: "four headers", first: 0, ext: chain(leads(60, hopByHop), leads(60, hopByHop), leads(44, hopByHop), atomic)},
		{name: "five headers", first: 0, ext: chain(leads(60, hopByHop), leads(60, hopByHop), leads(60, hopByHop), leads(60, hopByHop), hopByHop), passes: true},
		{name: "as long as may be", first: 60, ext: append([]byte{17, 19}, make([]byte, 158)...)},
		{name: "longer", first: 60, ext: append([]byte{17, 20}, make([]byte, 166)...), passes: true},
		{name: "routing header", first: 43, ext: hopByHop, passes: true},
		{name: "no next header", first: 60, ext: leads(59, destination), passes: true},
		{name: "prefix to prefix", rule: func(r *flow.Flow) {
			r.In.Group, r.In.Len = netip.MustParseAddr("ff3e:0:0:1::"), 64
			r.Out[0].Dst, r.Out[0].DstLen = netip.MustParseAddr("ff38:40:2001:db8::"), 64
		}, want: func(f *packet.Frame) {
			f.Dst, f.DstMAC = netip.MustParseAddr("ff38:40:2001:db8::5:6"), [6]byte{0x33, 0x33, 0, 5, 0, 6}
		}},
		{name: "options, pushed tags", first: 0, ext: hopByHop, rule: func(r *flow.Flow) { r.Out[0].VLAN, r.Out[0].VLANID = packet.VLANSet, 5 }, want: func(f *packet.Frame) { f.VLANs = []uint16{5} }},
		{name: "no checksum, allowed", rule: func(r *flow.Flow) { r.AllowNoChecksum = true }, want: func(*packet.Frame) {}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.enter(t)
			out := output(n.out[0], "ff3e::2:2", "fd00::1", 6000)
			rule := flow.Flow{Name: fmt.Sprint("rare", i), In: input(n.in, group.String(), "", 5000), Out: []flow.Output{out}}
			if c.rule != nil {
				c.rule(&rule)
			}
			sync1(t, r.l, rule)
			frame := packet.Frame{SrcMAC: [6]byte{2, 0, 0, 0, 0, 1}, DstMAC: packet.MulticastMAC(group), Src: src, Dst: group, SrcPort: 9, DstPort: 5000,
				TTL: 12, TOS: 0xff, FirstExtension: c.first, Extensions: c.ext, NoChecksum: rule.AllowNoChecksum, Payload: []byte("payload")}
			sent := frame.Build()
			frame.SrcMAC, frame.DstMAC, frame.Src, frame.Dst, frame.DstPort = out.SrcMAC, out.DstMAC, out.Src, out.Dst, out.DstPort
			if c.want != nil {
				c.want(&frame)
			}
			got := r.run(t, n.in.Index, sent, len(sent))
			if c.passes {
				if got.verdict != xdpPass || !bytes.Equal(got.frame, sent) {
					t.Errorf("verdict %d, want it to pass unchanged", got.verdict)
				}
				return
			}
			if want := frame.Build(); !bytes.Equal(got.copies[0], want) {
				t.Errorf("frame\n got  %x\n want %x", got.copies[0], want)
			}
		})
	}
}

// Fragments follow their first one, through rules of one output and of several, and are counted if
// it is missing or too old.
func TestFragments(t *testing.T) {
	t.Parallel()
	for _, dst := range []string{"239.1.1.1", "ff3e::1"} {
		t.Run(dst, func(t *testing.T) {
			n, r := programLab(t, 2)
			to, from := []string{"239.2.2.2", "239.3.3.3"}, "10.1.0.1"
			frame := sourceFrame(n, "239.1.1.1", 5000, bytes.Repeat([]byte("fragments "), 100))
			if netip.MustParseAddr(dst).Is6() {
				to, from = []string{"ff3e::2", "ff3e::3"}, "fd00::1"
				frame.Dst, frame.Src = netip.MustParseAddr(dst), netip.MustParseAddr("2001:db8::7")
				frame.DstMAC = packet.MulticastMAC(frame.Dst)
			}
			for outputs := range 3 {
				if outputs == 0 {
					continue
				}
				rule := flow.Flow{Name: fmt.Sprint("cam", outputs), In: input(n.in, dst, "", 5000)}
				for i := range outputs {
					rule.Out = append(rule.Out, output(n.out[i], to[i], from, 6000))
				}
				sync1(t, r.l, rule)
				checkFragments(t, n, r, rule, frame, uint32(100*outputs))
			}
		})
	}
}

func checkFragments(t *testing.T, n *testLab, r *runner, rule flow.Flow, frame packet.Frame, id uint32) {
	t.Helper()
	before := globalStats(t, r.l).Fragments
	parts := packet.Fragment(frame.Build(), id, 256)
	orphan := parts[len(parts)-1]
	if got := r.run(t, n.in.Index, orphan, len(orphan)); got.verdict != xdpPass {
		t.Errorf("a fragment before the first one: verdict %d, want it to pass", got.verdict)
	}
	var first, later Counter
	copies := make([][][]byte, len(rule.Out))
	for i, part := range parts {
		got := r.run(t, n.in.Index, part, len(part))
		for slot := range rule.Out {
			copies[slot] = append(copies[slot], got.copies[slot])
		}
		if i == 0 {
			first.add(1, uint64(len(part)))
		} else {
			later.add(1, uint64(len(part)))
		}
	}
	for slot, o := range rule.Out {
		want := frame
		want.SrcMAC, want.DstMAC, want.Src, want.Dst, want.DstPort = o.SrcMAC, o.DstMAC, o.Src, o.Dst, o.DstPort
		number := id
		if want.Dst.Is4() {
			number = uint32(renumbered(uint16(id), frame.Src))
		}
		if wanted := packet.Fragment(want.Build(), number, 256); !slices.EqualFunc(copies[slot], wanted, bytes.Equal) {
			t.Errorf("output %d sent\n%x, want\n%x", slot, copies[slot], wanted)
		}
	}
	after := globalStats(t, r.l).Fragments
	after.First.subtract(before.First)
	after.Later.subtract(before.Later)
	after.Orphan.subtract(before.Orphan)
	if want := (Fragments{first, later, Counter{1, uint64(len(orphan))}}); after != want {
		t.Errorf("counted %+v, want %+v", after, want)
	}
}

// A first fragment is not valid for others forever.
func TestFragmentsTooOld(t *testing.T) {
	n := newLab(t, 1)
	opts := testOptions(t)
	opts.programs = embedded{fragmentTimeout: time.Nanosecond}
	l := open(t, opts)
	attachAll(t, l, n.in, n.out[0])
	r := newRunner(t, l, n.relay)
	sync1(t, l, flow.Flow{Name: "cam1", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)}})
	frame := sourceFrame(n, "239.1.1.1", 5000, make([]byte, 600))
	parts := packet.Fragment(frame.Build(), 7, 512)
	if got := r.run(t, n.in.Index, parts[0], len(parts[0])); got.verdict != xdpRedirect {
		t.Fatalf("first fragment: verdict %d", got.verdict)
	}
	labtest.Eventually(t, "the first fragment is too old", func() bool {
		return r.run(t, n.in.Index, parts[1], len(parts[1])).verdict == xdpPass
	})
}

// Token buckets of a rule and of an output: a burst passes, the rest is counted, other rules are
// not affected, and the bucket refills.
func TestPolicing(t *testing.T) {
	n, r := programLab(t, 2)
	frame := sourceFrame(n, "239.1.1.1", 5000, make([]byte, 58)) // 100 bytes
	other := sourceFrame(n, "239.1.1.2", 5000, make([]byte, 58))
	outputs := func(count int) (out []flow.Output) {
		for i := range count {
			out = append(out, output(n.out[i], fmt.Sprint("239.2.2.", i), "10.1.0.1", 6000))
		}
		return out
	}
	slowest := flow.Rate{Packets: 1, Burst: 5}
	for i, c := range []struct {
		name    string
		rule    func(r *flow.Flow)
		outputs int
		passes  []int // by output
		rule0   bool  // the drops are the rule's
	}{
		{"rule, packets", func(r *flow.Flow) { r.Rate = slowest }, 1, []int{5}, true},
		{"rule, bytes", func(r *flow.Flow) { r.Rate = flow.Rate{Bits: 1000, Burst: 299} }, 1, []int{2}, true},
		{"rule of several, packets", func(r *flow.Flow) { r.Rate = slowest }, 2, []int{5, 5}, true},
		{"output", func(r *flow.Flow) { r.Out[0].Rate = slowest }, 1, []int{5}, false},
		{"output of several", func(r *flow.Flow) { r.Out[1].Rate = flow.Rate{Bits: 1000, Burst: 800} }, 2, []int{20, 8}, false},
		{"fast enough", func(r *flow.Flow) { r.Rate = flow.Rate{Bits: 400e9, Burst: 1 << 40} }, 1, []int{20}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.enter(t)
			rule := flow.Flow{Name: fmt.Sprint("policed", i), In: input(n.in, "239.1.1.1", "", 5000), Out: outputs(c.outputs)}
			c.rule(&rule)
			free := flow.Flow{Name: fmt.Sprint("free", i), In: input(n.in, "239.1.1.2", "", 5000), Out: outputs(1)}
			sync1(t, r.l, rule, free)
			b, f := frame.Build(), other.Build()
			passed := make([]int, c.outputs)
			for range 20 {
				got := r.run(t, n.in.Index, b, len(b))
				for slot := range passed {
					if got.copies[slot] != nil {
						passed[slot]++
					}
				}
				if got := r.run(t, n.in.Index, f, len(f)); got.verdict != xdpRedirect {
					t.Fatalf("rule without a rate: verdict %d", got.verdict)
				}
			}
			if diff := cmp.Diff(c.passes, passed); diff != "" {
				t.Errorf("passed (-want +got):\n%s", diff)
			}
			checkPoliced(t, r.l, rule, 20, c.passes, c.rule0)
			refill(t, r.l)
			if got := r.run(t, n.in.Index, b, len(b)); got.verdict != xdpRedirect || len(got.copies) != c.outputs {
				t.Errorf("full again: verdict %d, %d copies", got.verdict, len(got.copies))
			}
		})
	}
}

func checkPoliced(t *testing.T, l *Loader, rule flow.Flow, sent int, passes []int, ruleWide bool) {
	t.Helper()
	s, err := l.StatsOf([]string{rule.Name})
	if err != nil {
		t.Fatal(err)
	}
	got := s.Rules[0]
	for slot, n := range passes {
		dropped := got.Outputs[slot].Drops[Policed]
		if ruleWide {
			dropped = got.Drops[Policed]
		}
		if int(dropped.Packets) != sent-n || int(got.Outputs[slot].Sent.Packets) != n {
			t.Errorf("output %d: %d sent and %d policed, want %d and %d", slot, got.Outputs[slot].Sent.Packets, dropped.Packets, n, sent-n)
		}
	}
}

// refill makes every bucket full.
func refill(t *testing.T, l *Loader) {
	t.Helper()
	var index uint32
	var p bpf.RelayPolicer
	var all []uint32
	iter := l.maps.Policers.Iterate()
	for iter.Next(&index, &p) {
		if p.Rate != 0 {
			all = append(all, index)
		}
	}
	for _, index := range all {
		if err := l.maps.Policers.Lookup(index, &p); err != nil {
			t.Fatal(err)
		}
		p.Full = 0
		if err := l.maps.Policers.Put(index, &p); err != nil {
			t.Fatal(err)
		}
	}
}

// An unchanged rate keeps its bucket when the rule's addresses change.
func TestPolicerGoesOn(t *testing.T) {
	n, r := programLab(t, 1)
	rule := flow.Flow{Name: "cam1", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)}, Rate: flow.Rate{Packets: 1, Burst: 1}}
	sync1(t, r.l, rule)
	b := sourceFrame(n, "239.1.1.1", 5000, nil)
	frame := b.Build()
	if got := r.run(t, n.in.Index, frame, len(frame)); got.verdict != xdpRedirect {
		t.Fatalf("verdict %d", got.verdict)
	}
	rule.Out = slices.Clone(rule.Out)
	rule.Out[0].Src = netip.MustParseAddr("10.1.0.77")
	sync1(t, r.l, rule)
	if got := r.run(t, n.in.Index, frame, len(frame)); got.verdict != xdpDrop {
		t.Errorf("the bucket is full again: verdict %d", got.verdict)
	}
	rule.Rate.Burst = 2
	sync1(t, r.l, rule)
	if got := r.run(t, n.in.Index, frame, len(frame)); got.verdict != xdpRedirect {
		t.Errorf("with another rate: verdict %d", got.verdict)
	}
}

// Every setting of a rule survives a restart.
func TestAdoptRareRules(t *testing.T) {
	t.Parallel()
	n := newLab(t, 3)
	l := open(t, testOptions(t))
	w := newWorld(7, n)
	var rules []flow.Flow
	for set := range 8 {
		for _, r := range w.Rules(set) {
			if slices.ContainsFunc(rules, func(o flow.Flow) bool { return o.In.Key() == r.In.Key() }) {
				continue
			}
			r.Rate = flowtest.Pick(w, flow.Rate{}, flow.Rate{Packets: 7, Burst: 3}, flow.Rate{Bits: 1_234_567, Burst: 1500})
			r.Out[0].Rate = flowtest.Pick(w, flow.Rate{}, flow.Rate{Packets: 77_777, Burst: 13}, flow.Rate{Bits: 400e9, Burst: 1 << 30})
			r.Path, r.Fallback = flowtest.Pick(w, flow.PathKernel, flow.PathAFXDP, flow.PathFanout), w.Chance(50)
			rules = append(rules, r)
		}
	}
	sync1(t, l, rules...)
	own := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}
	if err := l.SetOwnAddresses(own); err != nil {
		t.Fatal(err)
	}
	before := dump(t, l)
	l = reopen(t, l)
	byName := cmpopts.SortSlices(func(a, b flow.Flow) bool { return a.Name < b.Name })
	if diff := cmp.Diff(normalized(rules), rulesOf(l), byName, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("adopted (-want +got):\n%s", diff)
	}
	sync1(t, l, rules...)
	if diff := cmp.Diff(before, dump(t, l)); diff != "" {
		t.Errorf("adopting has changed something:\n%s", diff)
	}
	kernelFits(t, l)
}

// Rules whose outputs are on the same interfaces share a devmap, which is freed with the last of
// them.
func TestBroadcastsAreShared(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 2)
	several := func(name, group string, at ...int) flow.Flow {
		rule := flow.Flow{Name: name, In: input(n.in, group, "", 5000)}
		for i, o := range at {
			rule.Out = append(rule.Out, output(n.out[o], fmt.Sprint("239.5.5.", i), "10.1.0.1", 6000))
		}
		return rule
	}
	a, b, c := several("a", "239.1.1.1", 0, 1), several("b", "239.1.1.2", 1, 0), several("c", "239.1.1.3", 1, 1)
	sync1(t, r.l, a, b, c)
	broadcasts := func() map[ebpf.MapID]bool {
		ids := map[ebpf.MapID]bool{}
		for _, id := range fanoutRows(t, r.l) {
			ids[id] = true
		}
		return ids
	}
	if got := broadcasts(); len(got) != 2 || len(r.l.broadcasts) != 2 {
		t.Fatalf("%d devmaps and %d broadcasts, want 2", len(got), len(r.l.broadcasts))
	}
	for _, rule := range []flow.Flow{a, b, c} {
		frame := sourceFrame(n, rule.In.Group.String(), 5000, []byte("payload"))
		sent := frame.Build()
		got := r.run(t, n.in.Index, sent, len(sent))
		for slot, o := range rule.Out {
			want := frame
			want.SrcMAC, want.DstMAC, want.Src, want.Dst, want.DstPort = o.SrcMAC, o.DstMAC, o.Src, o.Dst, o.DstPort
			if !bytes.Equal(got.copies[slot], want.Build()) {
				t.Errorf("rule %s, output %d: %x", rule.Name, slot, got.copies[slot])
			}
		}
	}
	sync1(t, r.l, b, c)
	if got := broadcasts(); len(got) != 2 {
		t.Errorf("%d devmaps, want 2", len(got))
	}
	sync1(t, r.l, c)
	if got := broadcasts(); len(got) != 1 || len(r.l.broadcasts) != 1 {
		t.Errorf("%d devmaps and %d broadcasts, want 1", len(got), len(r.l.broadcasts))
	}
	kernelFits(t, r.l)
}

// Own addresses are added and removed, including those that share filter bits.
func TestOwnAddresses(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	rule := flow.Flow{Name: "cam1", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)}}
	rule6 := flow.Flow{Name: "cam6", In: input(n.in, "ff3e::1", "", 5000), Out: []flow.Output{output(n.out[0], "ff3e::2", "fd00::1", 6000)}}
	sync1(t, r.l, rule, rule6)
	verdict := func(src string) uint32 {
		frame := sourceFrame(n, "239.1.1.1", 5000, nil)
		frame.Src = netip.MustParseAddr(src)
		if frame.Src.Is6() {
			frame.Dst = rule6.In.Group
		}
		b := frame.Build()
		return r.run(t, n.in.Index, b, len(b)).verdict
	}
	var many []netip.Addr
	for i := range 600 { // more than the filter has bits
		many = append(many, netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)}))
	}
	for _, c := range []struct {
		own         []netip.Addr
		dropped, ok []string
	}{
		{nil, nil, []string{"10.9.9.9", "fd00::9"}},
		{[]netip.Addr{netip.MustParseAddr("10.9.9.9"), netip.MustParseAddr("fd00::9")}, []string{"10.9.9.9", "fd00::9"}, []string{"10.9.9.8", "fd00::8"}},
		{many, []string{"172.16.0.0", "172.16.2.87"}, []string{"10.9.9.9", "172.16.2.88", "fd00::9"}},
		{nil, nil, []string{"172.16.0.0"}},
	} {
		if err := r.l.SetOwnAddresses(c.own); err != nil {
			t.Fatal(err)
		}
		for _, src := range c.dropped {
			if got := verdict(src); got != xdpDrop {
				t.Errorf("from %s: verdict %d, want it dropped", src, got)
			}
		}
		for _, src := range c.ok {
			if got := verdict(src); got != xdpRedirect {
				t.Errorf("from %s: verdict %d, want it sent", src, got)
			}
		}
	}
}

// Rows of the map xsks are reused by other interfaces, however many come and go.
func TestSocketRowsAreUsedAgain(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	for i := range 200 {
		rule := flow.Flow{Name: "cam1", In: input(n.in, "239.1.1.1", "", 5000), Path: flow.PathAFXDP, Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)}}
		rule.In.Index = 1000 + i
		sync1(t, r.l, rule)
		if len(r.l.sockets) != 1 {
			t.Fatalf("%d interfaces have rows", len(r.l.sockets))
		}
		sync1(t, r.l)
	}
	if len(r.l.sockets) != 0 {
		t.Errorf("%d interfaces have rows", len(r.l.sockets))
	}
}
