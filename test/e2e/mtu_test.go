package e2e_test

import (
	"fmt"
	"strings"
	"testing"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// setMTU sets the MTU of a sink's interface, which is the peer of one of the relay.
func (n *network) setMTU(sink, mtu int) {
	n.t.Helper()
	l, err := n.sinks[sink].Link("sink0")
	if err != nil {
		n.t.Fatal(err)
	}
	if err := n.sinks[sink].Netlink().LinkSetMTU(l, mtu); err != nil {
		n.t.Fatal(err)
	}
}

// A veth accepts a bulk of redirected frames up to the first that is too long for its peer, whose
// MTU is in another network namespace, and drops the rest. So frames that are too long are dropped
// earlier, with reason mtu, and take no packet of another rule with them; on every path.
func TestPeerMTU(t *testing.T) {
	const packets = 400
	onPaths(t, func(t *testing.T, n *network, in *instance, path string) {
		n.setMTU(0, 1000)
		for rule, outs := range map[string][]string{
			"long":  {"239.2.1.1:6000%out0"},
			"short": {"239.2.1.2:6000%out0"},
			"both":  {"239.2.1.3:6000%out0", "239.2.1.4:6000%out1"},
		} {
			group := map[string]string{"long": "239.1.1.1", "short": "239.1.1.2", "both": "239.1.1.3"}[rule]
			args := []string{"rule", "add", rule, "--path", path, "--in", group + ":5000%in0"}
			for _, out := range outs {
				args = append(args, "--out", out)
			}
			in.mustCLI(args...)
		}
		const note = "interface out0 has an MTU of 1500, and its peer one of 1000: longer packets are dropped, reason mtu"
		eventually(t, "rule show tells of the MTU", func() string {
			if text := in.mustCLI("rule", "show", "long"); !strings.Contains(text, note) {
				return text
			}
			return ""
		})
		source, sink := labtest.NewTap(t, n.source, "src0"), labtest.NewTap(t, n.sinks[0], "sink0")
		var frames [][]byte
		for group, size := range map[string]int{"239.1.1.1": 973, "239.1.1.2": 972, "239.1.1.3": 1400} {
			frame := n.frame(t, group)
			frame.DstMAC, frame.Payload = packet.MulticastMAC(frame.Dst), make([]byte, size)
			frames = append(frames, frame.Build())
		}
		labtest.OnOneCPU(func() { // which then empties the queue that it fills
			for range packets {
				for _, frame := range frames {
					source.Send(frame)
				}
			}
		})
		sent := func(rule string, slot int, want, tooLong uint64) {
			eventually(t, fmt.Sprintf("output %d of %s is counted", slot, rule), func() string {
				o := in.rule(rule).Outputs[slot]
				dropped := uint64(0)
				for _, d := range o.Drops {
					if d.Reason == "mtu" {
						dropped += d.Packets
					}
				}
				if o.Sent.Packets != want || dropped != tooLong || len(o.Drops) > 1 {
					return fmt.Sprintf("%+v, want %d sent and %d dropped, reason mtu", o, want, tooLong)
				}
				return ""
			})
		}
		sent("long", 0, 0, packets)
		sent("short", 0, packets, 0)
		sent("both", 0, 0, packets)
		sent("both", 1, packets, 0)
		sink.Collect(packets, isUDP)
		n.setMTU(0, 1500)
		eventually(t, "the larger MTU is seen", func() string {
			if text := in.mustCLI("rule", "show", "long"); strings.Contains(text, note) {
				return text
			}
			return ""
		})
	})
}
