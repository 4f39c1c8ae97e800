package e2e_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"xdpcast/internal/labtest"
	"xdpcast/internal/streamtest"
	"xdpcast/pkg/packet"
)

// legCase is a rule that merges two inputs, and the frames before and after.
type legCase struct {
	name string
	in   [2]string
	out  []string
	// frame changes the RTP frames that arrive on each leg: from 10.1.0.2:4000 to 239.1.1.1:5000
	// and 239.1.1.2:5000. want changes them into those that leave.
	frame [2]func(f *packet.Frame)
	want  []func(f *packet.Frame)
	// fragments is the payload length of each fragment, 0 for whole frames.
	fragments int
}

var legCases = []legCase{
	{name: "one output", out: []string{"239.2.2.2:6000%out0,ttl=8"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000, func(f *packet.Frame) { f.TTL = 8 })}},
	{name: "four outputs", out: []string{"239.2.2.2:6000%out0", "239.2.2.3:6001%out1,ttl=3", "239.2.2.4:6002%out2,vlan=9", "239.2.2.5:6003%out0,dscp=be"}, want: []func(f *packet.Frame){
		dst("239.2.2.2", 6000), dst("239.2.2.3", 6001, func(f *packet.Frame) { f.TTL = 3 }), dst("239.2.2.4", 6002, tags(9)), dst("239.2.2.5", 6003, func(f *packet.Frame) { f.TOS = 1 })}},
	{name: "vlan, and vlan in a vlan", in: [2]string{"239.1.1.1:5000%in0,vlan=7", "239.1.1.2:5000%in0,vlan=9.7"}, frame: [2]func(f *packet.Frame){tags(7), tags(9, 7)},
		out: []string{"239.2.2.2:6000%out0,vlan=pop"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000, tags())}},
	{name: "ipv6", in: [2]string{"fd00:1::2@[ff3e:0:0:1::7]:5000%in0", "fd00:1::2@[ff3e:0:0:2::7]:5000%in0"}, frame: [2]func(f *packet.Frame){v6(), v6(func(f *packet.Frame) { f.Dst = netip.MustParseAddr("ff3e:0:0:2::7") })},
		out: []string{"[ff3e::2]:6000%out0", "[ff3e::3]:6000%out1"}, want: []func(f *packet.Frame){dst("ff3e::2", 6000), dst("ff3e::3", 6000)}},
	{name: "fragments", fragments: 32, out: []string{"239.2.2.2:6000%out0"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000)}},
	{name: "fragments, two outputs", fragments: 32, out: []string{"239.2.2.2:6000%out0", "239.2.2.3:6000%out1"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000), dst("239.2.2.3", 6000)}},
	{name: "ipv6 fragments", fragments: 32, in: [2]string{"fd00:1::2@[ff3e:0:0:1::7]:5000%in0", "fd00:1::2@[ff3e:0:0:2::7]:5000%in0"}, frame: [2]func(f *packet.Frame){v6(), v6(func(f *packet.Frame) { f.Dst = netip.MustParseAddr("ff3e:0:0:2::7") })},
		out: []string{"[ff3e::2]:6000%out0"}, want: []func(f *packet.Frame){dst("ff3e::2", 6000)}},
}

// legNumbers is the number of packets of a case. Each leg loses some.
const legNumbers = 40

func legLoses(leg, number int) bool { return number%5 == 1+2*leg }

// run sends on both legs, the second after the first, and checks every byte of the output: each number
// once.
func (c legCase) run(t *testing.T, n *network, in *instance, path, name string) {
	if c.in[0] == "" {
		c.in = [2]string{"239.1.1.1:5000%in0", "239.1.1.2:5000%in0"}
	}
	args := []string{"rule", "add", name, "--path", path, "--in", c.in[0], "--in", c.in[1], "--merge", "rtp,skew=2s,reset=4s"}
	for _, o := range c.out {
		args = append(args, "--out", o)
	}
	in.mustCLI(args...)
	defer in.mustCLI("rule", "del", name)
	in.waitState(name, "active")
	source := labtest.NewTap(t, n.source, "src0")
	taps := n.taps(t, c.out)
	packets := [2]int{}
	labtest.OnOneCPU(func() { // which then empties the queue that it fills
		for i := range legNumbers + 3 {
			for leg, number := range [2]int{i, i - 3} {
				if number < 0 || number >= legNumbers || legLoses(leg, number) {
					continue
				}
				packets[leg]++
				for _, b := range c.cut(c.arriving(t, n, leg, number), leg, number) {
					source.Send(b)
				}
			}
		}
	})
	wanted := map[string][]string{}
	for slot, edit := range c.want {
		for number := range legNumbers {
			// From either leg: both look the same after the relay, except for the fragments' identification.
			leg := 0
			if legLoses(0, number) {
				leg = 1
			}
			ifname := outputInterface(c.out[slot])
			f := c.arriving(t, n, leg, number)
			f.SrcMAC, f.Src, f.DstMAC = macOf(t, n.relay, ifname), n.firstAddr(t, ifname, f.Dst.Is4()), [6]byte{}
			edit(&f)
			if f.DstMAC == ([6]byte{}) {
				f.DstMAC = packet.MulticastMAC(f.Dst)
			}
			for _, b := range c.cut(f, leg, number) {
				wanted[ifname] = append(wanted[ifname], c.unmarked(b))
			}
		}
	}
	for ifname, want := range wanted {
		var got []string
		for _, b := range taps[ifname].Collect(len(want), isUDP) {
			got = append(got, c.unmarked(b))
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			for i := range want {
				if got[i] != want[i] {
					t.Errorf("%s, frame %d:\n got  %x\n want %x", ifname, i, got[i], want[i])
					break
				}
			}
		}
	}
	parts := uint64(len(c.cut(c.arriving(t, n, 0, 0), 0, 0)))
	eventually(t, "every copy is counted", func() string {
		s := in.rule(name)
		copies := uint64(0)
		for _, d := range s.Drops {
			copies += d.Packets
		}
		all := uint64(packets[0] + packets[1])
		if s.Matched.Packets != all*parts || copies != (all-legNumbers)*parts || s.Outputs[0].Sent.Packets != legNumbers*parts {
			return fmt.Sprintf("%+v, %d packets of %d parts", s, all, parts)
		}
		return ""
	})
	for name, tap := range taps {
		if b := tap.Receive(0, isUDP); b != nil {
			t.Errorf("%s: a frame too many: %x", name, b)
		}
	}
}

// arriving is the frame with a number on a leg.
func (c legCase) arriving(t *testing.T, n *network, leg, number int) packet.Frame {
	f := n.frame(t, fmt.Sprintf("239.1.1.%d", leg+1))
	f.Payload = streamtest.RTP(uint32(65_520+number), 7)
	if c.frame[leg] != nil {
		c.frame[leg](&f)
	}
	f.DstMAC = packet.MulticastMAC(f.Dst)
	return f
}

// unmarked is a frame without its fragment identification, which a relay that changes the source chooses randomly, and
// without the checksum over it.
func (c legCase) unmarked(b []byte) string {
	if h, ok := packet.Parse(b); ok && h.Dst.Is4() && c.fragments > 0 {
		copy(b[h.L3+4:], []byte{0, 0})
		copy(b[h.L3+10:], []byte{0, 0})
	}
	return string(b)
}

// cut fragments a frame if the case says so.
func (c legCase) cut(f packet.Frame, leg, number int) [][]byte {
	if c.fragments == 0 {
		return [][]byte{f.Build()}
	}
	return packet.Fragment(f.Build(), uint32(1000*leg+number+1), c.fragments)
}

// TestLegsFrames: the frames of merged streams, on every path and in generic mode.
func TestLegsFrames(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ mode, path string }{{"native", "kernel"}, {"native", "afxdp"}, {"native", "fanout"}, {"generic", "kernel"}} {
		t.Run(tt.mode+" "+tt.path, func(t *testing.T) {
			t.Parallel()
			n := newNetwork(t)
			n.addIPv6(t)
			in := newInstance(t, n.relay)
			in.start("--mode", tt.mode)
			in.mustCLI("rule", "add", "first", "--path", tt.path, "--in", "239.99.99.99:9%in0", "--out", "239.99.99.98:9%out0")
			for i, c := range legCases {
				if tt.mode == "generic" && len(c.out) > 1 {
					continue // docs/decisions/0004
				}
				t.Run(c.name, func(t *testing.T) { c.run(t, n, in, tt.path, fmt.Sprintf("case%d", i)) })
			}
		})
	}
}
