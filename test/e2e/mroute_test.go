package e2e_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

const (
	routedSource = "10.1.0.2"
	routedGroup  = "239.1.1.1"
)

// routedFrame is a frame that a multicast router may meet.
type routedFrame struct {
	name  string
	frame []byte
	// kernel: the kernel forwards or drops it also with the mirror.
	kernel bool
}

// numberedPayload has a number in its last bytes.
func numberedPayload(n, length int) []byte {
	b := bytes.Repeat([]byte{0xa5}, length)
	binary.BigEndian.PutUint32(b, uint32(n))
	return b
}

// routedFrames are frames from a source to a group, each starting its payload with its number.
func (n *network) routedFrames(t *testing.T, source, group string) (all []routedFrame) {
	plain := func() packet.Frame {
		g := netip.MustParseAddr(group)
		return packet.Frame{
			SrcMAC: macOf(t, n.source, "src0"), DstMAC: packet.MulticastMAC(g), Src: netip.MustParseAddr(source), Dst: g,
			SrcPort: 4000, DstPort: 5000, TTL: 16, TOS: 0x2e<<2 | 3, Payload: numberedPayload(len(all), 40),
		}
	}
	add := func(name string, kernel bool, change func(f *packet.Frame), after ...func(b []byte) []byte) {
		f := plain()
		if change != nil {
			change(&f)
		}
		b := f.Build()
		for _, edit := range after {
			b = edit(b)
		}
		all = append(all, routedFrame{name, b, kernel})
	}
	is4 := netip.MustParseAddr(group).Is4()
	add("plain", false, nil)
	add("another port", false, func(f *packet.Frame) { f.DstPort = 1 })
	add("odd length", false, func(f *packet.Frame) { f.Payload = f.Payload[:23] })
	add("TTL 1", true, func(f *packet.Frame) { f.TTL = 1 })
	add("TTL 2", is4, func(f *packet.Frame) { f.TTL = 2 })
	add("TTL at the threshold of an output", is4, func(f *packet.Frame) { f.TTL = 4 })
	add("TTL above it", false, func(f *packet.Frame) { f.TTL = 5 })
	add("TTL 255", false, func(f *packet.Frame) { f.TTL = 255 })
	add("priority tag", true, func(f *packet.Frame) { f.VLANs = []uint16{5 << 13} })
	add("of another VLAN", true, func(f *packet.Frame) { f.VLANs = []uint16{7} })
	add("padded", true, func(f *packet.Frame) { f.Padding = 20 })
	add("to a host's MAC address", true, func(f *packet.Frame) { f.DstMAC = macOf(t, n.relay, "in0") })
	add("to another group's MAC address", true, func(f *packet.Frame) { f.DstMAC[5]++ })
	add("from the router's address", true, func(f *packet.Frame) { f.Src = n.firstAddr(t, "in0", is4) })
	add("longer than an output's MTU", true, func(f *packet.Frame) { f.Payload = append(f.Payload, make([]byte, 1300)...) })
	add("wrong UDP checksum", false, nil, func(b []byte) []byte { b[len(b)-1] ^= 1; return b })
	if is4 {
		add("without a UDP checksum", false, func(f *packet.Frame) { f.NoChecksum = true })
		add("options", true, func(f *packet.Frame) { f.Options = []byte{1, 1, 1, 0} })
		add("router alert", true, func(f *packet.Frame) { f.Options = []byte{148, 4, 0, 0} })
		add("wrong IP checksum", true, nil, func(b []byte) []byte { b[24] ^= 0x40; return b })
		add("not UDP", true, nil, func(b []byte) []byte {
			b[23] = 253
			sum := binary.BigEndian.Uint16(b[24:])
			binary.BigEndian.PutUint16(b[24:], sum-(253-17)) // RFC 1624
			return b
		})
		// The checksum whose update is 0, in one of its two forms.
		for id := range 1 << 16 {
			f := plain()
			b := f.Build()
			binary.BigEndian.PutUint16(b[18:], uint16(id))
			b[24], b[25] = 0, 0
			sum := uint32(0)
			for i := 14; i < 34; i += 2 {
				sum += uint32(binary.BigEndian.Uint16(b[i:]))
			}
			sum = sum&0xffff + sum>>16
			if check := ^uint16(sum + sum>>16); check == 0xfeff {
				binary.BigEndian.PutUint16(b[24:], check)
				all = append(all, routedFrame{"checksum becomes 0", b, false})
				break
			}
		}
		whole := plain()
		whole.Payload = numberedPayload(len(all), 400)
		for i, b := range packet.Fragment(whole.Build(), 77, 200) {
			all = append(all, routedFrame{fmt.Sprintf("fragment %d", i), b, false})
		}
	} else {
		add("hop-by-hop options", true, func(f *packet.Frame) { f.FirstExtension, f.Extensions = 0, []byte{17, 0, 1, 4, 0, 0, 0, 0} })
	}
	// Frames of XDP arrive in their order, and so do those of the kernel: with the last of both all have arrived.
	add("last", false, nil)
	add("last of the kernel", true, func(f *packet.Frame) { f.VLANs = []uint16{5 << 13} })
	return all
}

// routed sends the frames and returns what arrives at each sink, in order.
func (n *network) routed(t *testing.T, frames []routedFrame, group string) (out [2][][]byte) {
	t.Helper()
	to := netip.MustParseAddr(group)
	from := labtest.NewTap(t, n.source, "src0")
	taps := [2]*labtest.Tap{labtest.NewTap(t, n.sinks[0], "sink0"), labtest.NewTap(t, n.sinks[1], "sink0")}
	labtest.OnOneCPU(func() {
		for _, f := range frames {
			from.Send(f.frame)
		}
	})
	numbered := func(f []byte, number int) bool {
		return bytes.Contains(f, append(binary.BigEndian.AppendUint32(nil, uint32(number)), bytes.Repeat([]byte{0xa5}, 20)...))
	}
	toGroup := func(f []byte) bool {
		if to.Is4() {
			return len(f) >= 34 && f[12] == 8 && f[13] == 0 && bytes.Equal(f[30:34], to.AsSlice())
		}
		return len(f) >= 54 && f[12] == 0x86 && bytes.Equal(f[38:54], to.AsSlice())
	}
	for i, tap := range taps {
		for last, lastOfKernel := false, false; !last || !lastOfKernel; {
			f := tap.Collect(1, toGroup)[0]
			last, lastOfKernel = last || numbered(f, len(frames)-2), lastOfKernel || numbered(f, len(frames)-1)
			out[i] = append(out[i], f)
		}
	}
	return out
}

// TestMroutes: with its routes mirrored a router forwards the same frames, byte for byte, and most
// of them in XDP; its routing daemon sees its counters grow. Daemons that end, change a route or
// are killed leave the forwarding to the kernel.
func TestMroutes(t *testing.T) {
	for _, family := range []string{"ipv4", "ipv6"} {
		t.Run(family, func(t *testing.T) {
			n := newNetwork(t)
			source, group, is4 := routedSource, routedGroup, family == "ipv4"
			if !is4 {
				n.addIPv6(t)
				source, group = "fd00:1::2", "ff0e::1:1"
			}
			setMTU(t, n, "out1", 1280)
			router := labtest.NewRouter(t, n.relay, is4, 0)
			router.AddVIF("in0", 1)
			router.AddVIF("out0", 1)
			router.AddVIF("out1", 4)
			outputs := map[string]uint8{"out0": 1, "out1": 4}
			router.Add(source, group, "in0", outputs)

			frames := n.routedFrames(t, source, group)
			want := n.routed(t, frames, group)

			in := newInstance(t, n.relay)
			in.start("--mroute")
			name := "mroute/" + source + "/" + group
			in.waitRoute(name, control.StateActive, len(outputs))
			before := in.rule(name).Matched.Packets
			got := n.routed(t, frames, group)
			for i := range want {
				compareRouted(t, fmt.Sprintf("sink %d", i), got[i], want[i])
			}
			taken := 0
			for _, f := range frames {
				if !f.kernel {
					taken++
				}
			}
			if matched := int(in.rule(name).Matched.Packets - before); matched != taken {
				t.Errorf("%d frames were forwarded in XDP, want the %d that the kernel need not see", matched, taken)
			}
			if r := in.rule(name); r.Origin != control.OriginMroute || r.Outputs[0].Sent.Packets != uint64(taken) {
				t.Errorf("rule: %+v", r)
			}
			// The kernel's counter increases within seconds, without disturbing the stream.
			counted := router.Packets(source, group)
			from := labtest.NewTap(t, n.source, "src0")
			eventually(t, "the routing daemon sees packets counted", func() string {
				from.Send(frames[0].frame)
				if now := router.Packets(source, group); now > counted {
					return ""
				}
				return "the counter stands still"
			})

			t.Run("commands", func(t *testing.T) {
				if got := in.cli("rule", "del", name); got.code != 1 || !strings.Contains(got.stderr, "its routing daemon") {
					t.Errorf("rule del: %s", got)
				}
				if text := in.mustCLI("rule", "export"); strings.Contains(text, group) {
					t.Errorf("exported: %s", text)
				}
			})
			t.Run("a rule of the API wins", func(t *testing.T) {
				anyPort := group
				if !is4 {
					anyPort = "[" + group + "]"
				}
				in.mustCLI("rule", "add", "mine", "--in", anyPort+"%in0", "--out", anyPort+":7000%out0,src=keep", "--path", "kernel")
				eventually(t, "the route is left to the kernel", func() string {
					if r := in.rule(name); r.State != control.StatePending || r.Reason != "left to the kernel: rule mine takes packets of it" {
						return r.State + ": " + r.Reason
					}
					return ""
				})
				in.mustCLI("rule", "del", "mine")
				in.waitRoute(name, control.StateActive, len(outputs))
			})
			t.Run("changes", func(t *testing.T) {
				router.Add(source, group, "in0", map[string]uint8{"out1": 4})
				in.waitRoute(name, control.StateActive, 1)
				router.Add(source, group, "in0", outputs)
				in.waitRoute(name, control.StateActive, 2)
				// The kernel does not notify of routes whose interface left the router.
				router.DeleteVIF("out1")
				in.waitRoute(name, control.StateActive, 1)
				router.AddVIF("out1", 4)
				router.Add(source, group, "in0", outputs)
				in.waitRoute(name, control.StateActive, len(outputs))
				router.Delete(source, group, "in0")
				eventually(t, "the route is gone", func() string {
					if rules := in.rules(); len(rules) != 0 {
						return fmt.Sprintf("%+v", rules)
					}
					return ""
				})
				router.Add(source, group, "in0", outputs)
				in.waitRoute(name, control.StateActive, len(outputs))
			})
			t.Run("killed", func(t *testing.T) {
				in.running.stop(syscall.SIGKILL)
				// A route changes while no daemon mirrors it: the kernel follows within seconds.
				router.Add(source, group, "in0", map[string]uint8{"out0": 1})
				from, sink := labtest.NewTap(t, n.source, "src0"), labtest.NewTap(t, n.sinks[1], "sink0")
				eventually(t, "nothing comes by the route of before", func() string {
					from.Send(frames[0].frame)
					if f := sink.Receive(1e8, func(f []byte) bool { return bytes.Contains(f, netip.MustParseAddr(group).AsSlice()) }); f != nil {
						return "a packet came"
					}
					return ""
				})
				router.Add(source, group, "in0", outputs)
				in.start("--mroute")
				in.waitRoute(name, control.StateActive, len(outputs))
			})
			t.Run("stopped", func(t *testing.T) {
				if code := in.running.stop(syscall.SIGTERM); code != 0 {
					t.Errorf("exit code %d", code)
				}
				back := n.routed(t, frames, group)
				for i := range want {
					compareRouted(t, fmt.Sprintf("sink %d", i), back[i], want[i])
				}
				if text := in.mustCLI("stats"); strings.Contains(text, group) {
					t.Errorf("the kernel still has the flow: %s", text)
				}
			})
		})
	}
}

// waitRoute waits until the rule of a route has a state and a number of outputs.
func (in *instance) waitRoute(name, state string, outputs int) {
	in.t.Helper()
	eventually(in.t, fmt.Sprintf("%s is %s with %d outputs", name, state, outputs), func() string {
		for _, r := range in.rules() {
			if r.Name == name {
				if r.State == state && len(r.Outputs) == outputs {
					return ""
				}
				return fmt.Sprintf("%s: %s, %d outputs", r.State, r.Reason, len(r.Outputs))
			}
		}
		return "no such rule"
	})
}

// compareRouted compares frames in any order: those forwarded by the kernel may arrive before or
// after those from XDP.
func compareRouted(t *testing.T, where string, got, want [][]byte) {
	t.Helper()
	got, want = slices.Clone(got), slices.Clone(want)
	slices.SortFunc(got, bytes.Compare)
	slices.SortFunc(want, bytes.Compare)
	if len(got) != len(want) {
		t.Errorf("%s: %d frames, want %d", where, len(got), len(want))
	}
	for i := range min(len(got), len(want)) {
		if !bytes.Equal(got[i], want[i]) {
			t.Errorf("%s:\n got  %x\n want %x", where, got[i], want[i])
			return
		}
	}
}

func setMTU(t *testing.T, n *network, ifname string, mtu int) {
	t.Helper()
	l, err := n.relay.Link(ifname)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.relay.Netlink().LinkSetMTU(l, mtu); err != nil {
		t.Fatal(err)
	}
}
