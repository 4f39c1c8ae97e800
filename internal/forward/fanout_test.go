package forward

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"

	"xdpcast/pkg/fanout"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// Every copy has exactly the bytes that its output specifies.
func TestForward(t *testing.T) {
	b := newBench(t, 2)
	f := b.path(t, FanoutOptions{Workers: 2, Mode: fanout.ModeHash})
	taps := []*catcher{catch(t, b.sinks[0], "eth0"), catch(t, b.sinks[1], "eth0")}
	source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	v4, v6 := numbered(1, 2), numbered(3, 4)
	v6.Src, v6.Dst = netip.MustParseAddr("fd00::1"), netip.MustParseAddr("ff3e::1")
	v6.DstMAC = packet.MulticastMAC(v6.Dst)
	tagged := func(f packet.Frame, tags ...uint16) packet.Frame {
		f.VLANs = tags
		return f
	}
	padded := v4
	padded.Padding = 11
	long := v4
	long.Payload = bytes.Repeat([]byte{7}, 1400)
	in4, in6 := flow.Input{Group: v4.Dst, Port: 5000}, flow.Input{Group: v6.Dst, Port: 5000}
	vlan := func(in flow.Input, inner, outer uint16) flow.Input {
		in.VLAN, in.OuterVLAN = inner, outer
		return in
	}
	set := func(mode packet.VLANMode, id, outer uint16) func(*flow.Output) {
		return func(o *flow.Output) { o.VLAN, o.VLANID, o.OuterVLAN = mode, id, outer }
	}
	prefix := func(o *flow.Output) { o.DstLen = 16 }
	for _, c := range []struct {
		name   string
		in     flow.Input
		frames [][]byte
		to     string
		change func(*flow.Output)
	}{
		{"IPv4", in4, [][]byte{v4.Build()}, "239.9.9.9", nil},
		{"IPv6", in6, [][]byte{v6.Build()}, "ff3e::99", nil},
		{"padding", in4, [][]byte{padded.Build()}, "239.9.9.9", nil},
		{"tag kept", vlan(in4, 7, 0), [][]byte{tagged(v4, 0x6007).Build()}, "239.9.9.9", nil},
		{"two tags kept", vlan(in6, 7, 9), [][]byte{tagged(v6, 9, 0x6007).Build()}, "ff3e::99", nil},
		{"tag popped", vlan(in4, 7, 0), [][]byte{tagged(v4, 0x6007).Build()}, "239.9.9.9", set(packet.VLANPop, 0, 0)},
		{"two tags popped", vlan(in4, 7, 9), [][]byte{tagged(v4, 9, 7).Build()}, "239.9.9.9", set(packet.VLANPop, 0, 0)},
		{"tag pushed", in4, [][]byte{v4.Build()}, "239.9.9.9", set(packet.VLANSet, 11, 0)},
		{"two tags pushed", in6, [][]byte{v6.Build()}, "ff3e::99", set(packet.VLANSet, 11, 12)},
		{"tag exchanged", vlan(in4, 7, 0), [][]byte{tagged(v4, 0xe007).Build()}, "239.9.9.9", set(packet.VLANSet, 11, 0)},
		{"prefix", flow.Input{Group: netip.MustParseAddr("239.1.0.0"), Len: 16}, [][]byte{v4.Build()}, "239.77.0.0", prefix},
		{"port shift", in4, [][]byte{v4.Build()}, "239.9.9.9", func(o *flow.Output) { o.PortAdd, o.PortShift = true, 1000 }},
		{"IPv4 fragments", in4, packet.Fragment(long.Build(), 99, 400), "239.9.9.9", nil},
		{"IPv6 fragments", in6, packet.Fragment(v6.Build(), 99, 8), "ff3e::99", nil},
	} {
		for _, outputs := range []int{1, 4, 16} {
			t.Run(fmt.Sprintf("%s, %d outputs", c.name, outputs), func(t *testing.T) {
				r := rule(t.Name(), b.in, c.in.Group.String(), 0)
				index, own := r.In.Index, r.In.MAC
				r.In = c.in
				r.In.Index, r.In.MAC = index, own
				for i := range outputs {
					o := sendTo(b.out[i%2], c.to, uint16(6000+i))
					if c.change != nil {
						c.change(&o)
					}
					r.Out = append(r.Out, o)
				}
				b.sync(t, f, r)
				sendFrames(t, source, c.frames)
				for i, tap := range taps {
					var want [][]byte
					for _, frame := range c.frames {
						for slot := i; slot < outputs; slot += 2 {
							want = append(want, expect(t, r.Out[slot], frame))
						}
					}
					receive(t, tap, want)
				}
				s := adds(t, f, r.Name, uint64(len(c.frames)))
				for slot := range s.Outputs {
					if s.Outputs[slot].Sent != s.Matched {
						t.Errorf("output %d sent %+v of %+v", slot, s.Outputs[slot].Sent, s.Matched)
					}
				}
			})
		}
	}
}
