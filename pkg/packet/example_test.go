package packet_test

import (
	"fmt"
	"net/netip"

	"xdpcast/pkg/packet"
)

// Relay a packet to another group: what the relay program does to it in the kernel.
func ExampleRewrite_Append() {
	frame := packet.Frame{
		SrcMAC: [6]byte{2, 0, 0, 0, 0, 1}, DstMAC: packet.MulticastMAC(netip.MustParseAddr("239.1.1.1")),
		Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddr("239.1.1.1"), SrcPort: 4000, DstPort: 5000,
		TTL: 16, Payload: []byte("hello"),
	}.Build()
	h, ok := packet.Parse(frame)
	if !ok {
		fmt.Println("not UDP over IP")
		return
	}
	group := netip.MustParseAddr("239.2.2.2")
	to := packet.Rewrite{
		SrcMAC: [6]byte{2, 0, 0, 0, 0, 2}, DstMAC: packet.MulticastMAC(group),
		Src: netip.MustParseAddr("10.9.0.1"), Dst: group, DstPort: 6000, TTLMode: packet.TTLDecrement,
	}
	headers, outcome := to.Append(nil, frame, &h)
	if outcome != packet.Rewritten {
		fmt.Println("dropped:", outcome)
		return
	}
	out := append(headers, frame[h.Payload:]...)
	sent, _ := packet.Parse(out)
	ip, udp := packet.Checksums(out, &sent)
	fmt.Println(sent.Src, "->", sent.Dst, sent.DstPort, "checksums right:", ip, udp)
	// Output: 10.9.0.1 -> 239.2.2.2 6000 checksums right: true true
}
