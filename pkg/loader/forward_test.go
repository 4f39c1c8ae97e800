package loader

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

func isUDP(f []byte) bool {
	_, ok := packet.Parse(f)
	return ok
}

// forwarded is the copy of a frame after rewrite r, computed by the Go twin.
func forwarded(t testing.TB, frame []byte, r packet.Rewrite) []byte {
	t.Helper()
	out := bytes.Clone(frame)
	h, ok := packet.Parse(out)
	if !ok || r.Apply(out, &h) != packet.Rewritten {
		t.Fatalf("the twin does not forward %x", frame)
	}
	return out
}

func sourceFrame(n *testLab, group string, port uint16, payload []byte) packet.Frame {
	dst, src := netip.MustParseAddr(group), netip.MustParseAddr("192.168.7.7")
	if dst.Is6() {
		src = netip.MustParseAddr("fd00:7::7")
	}
	return packet.Frame{
		DstMAC: packet.MulticastMAC(dst), SrcMAC: [6]byte{2, 0, 0, 0, 0, 1},
		Src: src, Dst: dst, SrcPort: 4321, DstPort: port, TTL: 12, TOS: 0x89, Payload: payload,
	}
}

// Every byte of every copy, with several outputs on one interface, is as the rule says, and the
// counters add up.
func TestForwardByteExact(t *testing.T) {
	t.Parallel()
	for _, outputs := range []int{1, 2, 4, 16, 64} {
		t.Run(fmt.Sprintf("%d outputs", outputs), func(t *testing.T) {
			n := newLab(t, min(outputs, 3))
			l := open(t, testOptions(t))
			attachAll(t, l, append(n.out, n.in)...)
			rule := flow.Flow{Name: "cam1", In: input(n.in, "239.1.1.1", "", 5000)}
			for i := range outputs {
				o := output(n.out[i%len(n.out)], fmt.Sprintf("239.2.%d.%d", i/8, i+1), fmt.Sprintf("10.1.%d.1", i%len(n.out)), uint16(6000+i))
				switch i % 4 {
				case 1:
					o.TTLMode, o.TTL, o.SrcPort = packet.TTLSet, uint8(i+1), 777
				case 2:
					o.TTLMode, o.Src = packet.TTLDecrement, netip.Addr{}
				case 3:
					o.SetDSCP, o.DSCP = true, 46
				}
				rule.Out = append(rule.Out, o)
			}
			sync1(t, l, rule)
			source := labtest.NewTap(t, n.source, "eth0")
			var sinks []*labtest.Tap
			for _, s := range n.sinks {
				sinks = append(sinks, labtest.NewTap(t, s, "eth0"))
			}
			var frames [][]byte
			var total uint64
			for _, size := range []int{0, 1, 18, 19, 86, 87, 470, 1470, 1471, 1472} {
				for _, zero := range []bool{false, true} {
					f := sourceFrame(n, "239.1.1.1", 5000, bytes.Repeat([]byte{byte(size), 0xa5}, size/2+1)[:size])
					f.NoChecksum = zero
					f.Padding = max(0, 18-size)
					frames = append(frames, f.Build())
				}
			}
			for _, f := range frames {
				source.Send(f)
				total += uint64(len(f))
			}
			got := map[netip.AddrPort][][]byte{}
			for i, sink := range sinks {
				copies := (outputs + len(sinks) - 1 - i) / len(sinks) * len(frames)
				for _, f := range sink.Collect(copies, isUDP) {
					h, _ := packet.Parse(f)
					to := netip.AddrPortFrom(h.Dst, h.DstPort)
					got[to] = append(got[to], f)
				}
			}
			for i, o := range rule.Out {
				copies := got[netip.AddrPortFrom(o.Dst, o.DstPort)]
				if len(copies) != len(frames) {
					t.Fatalf("output %d: %d of %d frames arrived", i, len(copies), len(frames))
				}
				for j, f := range frames {
					if want := forwarded(t, f, o.Rewrite); !bytes.Equal(copies[j], want) {
						t.Fatalf("output %d, frame %d:\n got %x\nwant %x", i, j, copies[j], want)
					}
					h, _ := packet.Parse(copies[j])
					if ip, udp := packet.Checksums(copies[j], &h); !ip || !udp {
						t.Fatalf("output %d, frame %d: checksums ip %v udp %v", i, j, ip, udp)
					}
				}
			}
			s := statsOf(t, l, "cam1")
			if want := (Counter{uint64(len(frames)), total}); s.Matched != want {
				t.Errorf("matched %+v, want %+v", s.Matched, want)
			}
			for i, o := range s.Outputs {
				if o.Sent != s.Matched || len(o.Drops) != 0 {
					t.Errorf("output %d: sent %+v, drops %v", i, o.Sent, o.Drops)
				}
			}
		})
	}
}
